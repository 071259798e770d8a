"""Workers from outside: whatever an answer does becomes a verdict on it alone, and a fault of ours never does.

Without the jail, as where there is no bubblewrap; tests/test_jail.py is about the other.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmcourse import engine as engine_module
from llmcourse import judging, wall
from llmcourse.engine import Answer, Engine
from llmcourse.judging import HarnessFault, InProcess, expectations, judge
from llmcourse.zygote import Zygote
from tests.answers import GOOD, LESSON, SEED, body, verdict, written

SERVED = """
from llmcourse.exercise import case, cost, exercise

class Shelf:
    calls = ("read", "fail")
    def __init__(self, rng):
        self.book, self.reads = rng.bytes(8), 0
    def read(self, start, stop):
        self.reads += 1
        return self.book[start:stop]
    def fail(self):
        raise FileNotFoundError("no such book")
    def secret(self):
        return self.book
    def counts(self):
        return {"reads": (self.reads, None)}

@exercise(points=3, minutes=5)
def read_all(shelf):
    ### BEGIN SOLUTION
    try:
        shelf.fail()
    except OSError as error:
        return shelf.read(0, 8) + str(error).encode()
    ### END SOLUTION

@case(read_all, service=Shelf)
def eight_bytes(answer, rng, shelf):
    return answer(shelf)

@cost(read_all, share=1/3, authority="protocol", service=Shelf)
def reads(answer, rng, shelf):
    answer(shelf)
"""

PHASED = """
import os
from llmcourse.exercise import case, exercise

@exercise(points=1, minutes=5)
def remember(value=None, saved=None):
    ### BEGIN SOLUTION
    return {"kept": value} if saved is None else saved["kept"]
    ### END SOLUTION

@case(remember)
def saves(answer, rng):
    found = answer(rng.integer(0, 1000))
    return {"kind": type(found).__name__, "saved": found}

@case(remember, after=saves)
def resumes(answer, rng, saved):
    return {"same inputs": rng.integer(0, 1000), "found": answer(saved=saved)}
"""
RANKED = """
from llmcourse.exercise import case, exercise

@exercise(points=1, minutes=5, ranks=2)
def swap(value, link):
    ### BEGIN SOLUTION
    link.send(1 - link.rank, value)
    return link.receive(1 - link.rank)
    ### END SOLUTION

@case(swap)
def numbers(answer, rng, link):
    return answer(rng.integer(0, 1000) + link.rank, link)
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One engine for the module, started in a folder whose random.py is not Python's."""
    hostile = tmp_path_factory.mktemp("hostile")
    (hostile / "random.py").write_text("raise SystemExit('the wrong random')")
    before = Path.cwd()
    os.chdir(hostile)
    try:
        with Engine(zygote=Zygote(in_jail=False)) as started:
            os.chdir(before)
            yield started
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def add(tmp_path_factory):
    return written(tmp_path_factory.mktemp("lesson"), "add", LESSON)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return written(tmp_path_factory.mktemp("lesson"), "read_all", SERVED)


@pytest.fixture(scope="module")
def phased(tmp_path_factory):
    return written(tmp_path_factory.mktemp("lesson"), "remember", PHASED)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return written(tmp_path_factory.mktemp("lesson"), "swap", RANKED)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    """A worker that hangs is given up soon; a right answer on a busy machine is not."""
    monkeypatch.setattr(engine_module, "LOAD_LIMIT_S", 1.5)
    monkeypatch.setattr(engine_module, "limit_s", lambda expected: 1.0)


# ------------------------------------------------------------------------------------------------ ordinary answers


def test_a_right_answer_earns_all_points_and_a_wrong_one_is_named(engine, add):
    assert (verdict(engine, add, GOOD).verdict, verdict(engine, add, GOOD).points) == ("right", 2)
    wrong = verdict(engine, add, GOOD.replace("x + y", "x - y"))
    assert (wrong.verdict, wrong.points, [m.name for m in wrong.mistakes]) == ("wrong", 0, ["subtracted"])


def test_our_own_answers_run_from_the_exercises_file(engine, add):
    expected = engine.expected(add, SEED)
    for name, word in (("add", "right"), ("turned", "right"), ("subtracted", "wrong")):
        assert judge(engine, add, engine.ours(add, name), SEED, expected).verdict == word


def test_a_learners_helper_import_and_constant_of_other_cells_are_there(engine, add):
    parts = [("imports", "import torch as t"), ("helper", "ONE = 1\ndef twice(x):\n    return 2 * x * ONE")]
    text = "def add(x, y):\n    return twice(x) - x + (t.as_tensor(y) if t.is_tensor(x) else y)"
    assert verdict(engine, add, *parts, text).verdict == "right"


def test_two_workers_never_share_a_state(engine, add):
    text = "import builtins\nassert not hasattr(builtins, 'left')\nbuiltins.left = 1\n" + GOOD
    assert [verdict(engine, add, text).verdict for _ in range(2)] == ["right", "right"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def added(x, y):\n    return x + y", "no `add` was found; found added"),
        ("", "no `add` was found; found no function or class"),
        ("def add(x, y):\n    raise NotImplementedError", "not written yet"),
    ],
    ids=["another name", "empty", "stub"],
)
def test_an_answer_that_is_not_there_is_not_attempted(engine, add, text, reason):
    found = verdict(engine, add, text)
    assert (found.verdict, found.points, found.reason) == ("not attempted", 0, reason)


def test_the_name_that_was_meant_is_shown_though_many_helpers_stand_before_it(engine, served):
    helpers = "".join(f"def helper_{index}():\n    pass\n" for index in range(30))
    found = verdict(engine, served, f"{helpers}def red_all(shelf):\n    pass\n")
    assert found.reason.startswith("no `read_all` was found; found red_all, helper_")
    assert found.reason.count("helper_") == engine_module.MAX_FOUND_NAMES - 1


# -------------------------------------------------------------------------------------- what an answer may do to us


@pytest.mark.parametrize(
    ("text", "word", "reason"),
    [
        (body("while True: pass"), "timed out", "it ran for more than 1.0 s"),
        (body("os._exit(7)"), "crashed", "exit status 7"),
        (body("ctypes.string_at(0)"), "crashed", "SIGSEGV"),
        (body("os.kill(os.getpid(), signal.SIGKILL)"), "crashed", "it was killed"),
        (body("os.abort()"), "crashed", "SIGABRT"),
        (body("raise KeyboardInterrupt"), "crashed", "exit status 3"),
        (body("sys.exit(0)"), "wrong", "raised SystemExit: 0 (line 4 of your cell)"),
        (body("return [] + 1"), "wrong", "raised TypeError"),
        (body("return 1 / 0"), "wrong", "raised ZeroDivisionError: division by zero (line 4 of your cell)"),
        (body("return add(x, y)"), "wrong", "raised RecursionError"),
        (
            body("x.add_(1) if torch.is_tensor(x) else 0"),
            "wrong",
            "changed its argument `x`",
        ),
        (body("return torch.ones(1 << 22)"), "crashed", "at most"),
        (body("return torch.ones(1).expand(1 << 34)"), "wrong", "too large to be compared"),
        (body("return 'x' * (20 << 20)"), "wrong", "raised ProtocolError: a header of"),
        # Closed connections are seen at once: the worker may be ended before its own exit status is there.
        (body("os.closerange(3, 512)"), "crashed", "ended its process"),
        (body("import llmcourse.lessons"), "wrong", "cannot import it"),
        (
            body(
                "sys.meta_path[:] = sys.meta_path[1:]\nimport llmcourse.lessons.parameter_loading.read_header"
            ),
            "wrong",
            "closed to an answer",
        ),
        (
            body("open(llmcourse.exercise.LESSONS)", "import llmcourse.exercise"),
            "wrong",
            "closed to an answer",
        ),
        (body("os.system('true')"), "wrong", "starts no other program"),
        (body("from llmcourse.lessons.numbers.add import add as ours"), "wrong", "course's own answers"),
        (body("return float('nan') * x"), "wrong", "found nan"),
        ("def add(x):\n    return x", "wrong", "expected parameters (x, y), found (x)"),
        ("add = 3", "wrong", "'int' object is not callable"),
        ("def add(x, y):\n    return x + y\nraise ValueError('later')", "right", "all cases agree"),
        (
            "raise ValueError('early')\ndef add(x, y):\n    return x + y",
            "wrong",
            "raised ValueError: early (line 1",
        ),
        ("def add(x, y)\n    return x + y", "wrong", "raised SyntaxError: expected ':' (line 1"),
        ("\ud800 = 1", "wrong", "raised UnicodeEncodeError"),
        ("import os\nos._exit(0)\n" + GOOD, "crashed", "while cell ran: exit status 0"),
        ("while True: pass\n" + GOOD, "timed out", "while cell ran: it ran for more than 2 s"),
    ],
    ids=lambda value: value.splitlines()[-2 if "\n" in value else 0].strip()[:40] if "def " in value else "",
)
def test_whatever_an_answer_does_becomes_its_own_verdict(engine, add, text, word, reason):
    found = verdict(engine, add, text)
    assert (found.verdict, found.points) == (word, 2.0 if word == "right" else 0.0)
    assert reason in found.reason
    assert verdict(engine, add, GOOD).verdict == "right"


LEAVES_A_DAEMON = """
import os, time
def add(x, y):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open("{note}", "w").write(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    while not os.path.exists("{note}") or not open("{note}").read():
        pass
    return x + y
"""


@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="this system does not list children"
)
def test_what_an_answer_leaves_behind_ends_with_it(engine, add, tmp_path):
    note = tmp_path / "pid"
    found = verdict(engine, add, LEAVES_A_DAEMON.format(note=note))
    assert found.verdict == "right"
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's anonymous memory")
@pytest.mark.parametrize(
    "text",
    ["return [bytes(1 << 26) for _ in range(1000)]", "return torch.ones(1 << 33)"],
    ids=["python", "torch"],
)
def test_a_memory_bomb_meets_its_bound_and_the_next_answer_is_judged(engine, add, monkeypatch, text):
    # Twice what torch's own data takes, far below the 8 GB and 32 GB asked for.
    monkeypatch.setattr(engine_module, "MAX_DATA_BYTES", 2 << 30)
    monkeypatch.setattr(engine_module, "limit_s", lambda expected: 60.0)  # its memory is what ends it here
    found = verdict(engine, add, body(text))
    assert found.verdict == "wrong" and ("MemoryError" in found.reason or "allocate memory" in found.reason)
    assert verdict(engine, add, GOOD).verdict == "right"


def test_printing_ten_megabytes_disturbs_nothing(engine, add, capfd):
    text = body("print('x' * 10_000_000); os.write(1, b'y' * 1000); sys.stderr.write('z' * 1000)")
    assert verdict(engine, add, text).verdict == "right"
    assert capfd.readouterr() == ("", "")


def test_settings_of_torch_changed_in_one_item_are_back_in_the_next(engine, add):
    text = body(
        "torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_default_device('meta')\n"
        "torch.manual_seed(1)"
    )
    assert verdict(engine, add, text).verdict == "right"


def test_the_seed_of_a_class_cannot_be_read_beside_an_answer(engine, add):
    text = body("assert SEEN != 20240 and torch.initial_seed() != 20240", head="SEEN = torch.initial_seed()")
    assert verdict(engine, add, text).verdict == "right"


@pytest.mark.parametrize(
    "end", ["while True: pass", "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)"]
)
def test_a_cell_that_hangs_or_kills_is_left_out_for_the_others(engine, add, end):
    found = verdict(engine, add, ("cell 3", end), ("cell 4", "ONE = 1"), GOOD + "assert ONE == 1")
    assert (found.verdict, found.points) == ("right", 2)


def test_which_cells_were_left_out_and_why_is_remembered(engine, add):
    engine.left_out.clear()
    verdict(engine, add, ("cell 3", "import os; os._exit(1)"), ("cell 4", "while True: pass"), GOOD)
    assert engine.left_out == {"cell 3": "exit status 1", "cell 4": "it ran for more than 2 s"}
    engine.left_out.clear()
    verdict(engine, add, "while True: pass")
    assert engine.left_out == {"cell": "it ran for more than 2 s"}


READS = {
    "with open": "found = open(path).read()",
    "with a system call": """
libc, room = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(99)
descriptor = libc.open(path.encode(), 0)
found = room.value if descriptor >= 0 and libc.read(descriptor, room, 99) > 0 else ''
""",
}


@pytest.mark.parametrize("how", READS)
def test_what_a_reference_wrote_is_closed_to_an_answer(add, tmp_path, how):
    """In a folder beside the worker's own, whose files stay open to it."""
    if how == "with a system call" and not kernel_closes(tmp_path):
        pytest.skip("this kernel closes no files")
    with (
        Engine(zygote=Zygote(in_jail=False)) as ahead,
        Engine(zygote=ahead.zygote, closed=[ahead.folder]) as engine,
    ):
        written_by_ours = Path(ahead.folder, "llmcourse-worker", "expected")
        written_by_ours.parent.mkdir()
        written_by_ours.write_text("what is expected")
        text = body(
            f"open('mine', 'w').write('mine'); path = {str(written_by_ours)!r}\n"
            f"assert open('mine').read() == 'mine'\n{READS[how]}\n"
            "if found:\n    raise LookupError(found)"
        )
        found = verdict(engine, add, text)
    assert "LookupError" not in found.reason
    assert "closed to an answer" in found.reason or found.verdict == "right"


def kernel_closes(folder: Path) -> bool:
    """Whether a process can close files to itself here."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if wall.close_files([str(folder)]) else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_a_notebook_of_cells_that_end_the_process_has_an_end(engine, add, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_LEFT_OUT", 3)
    engine.left_out.clear()
    bad = [(f"cell {number}", "import os; os._exit(1)") for number in range(9)]
    found = verdict(engine, add, *bad, GOOD)
    assert len(engine.left_out) == 3 and found.points == 0
    assert "3 cells of this notebook hung or ended their process" in found.reason
    engine.left_out.clear()
    assert verdict(engine, add, *bad[:2], GOOD).verdict == "right"
    engine.left_out.clear()


def test_two_bad_cells_are_left_out_one_after_the_other(engine, add):
    found = verdict(
        engine, add, ("cell 3", "import os; os._exit(1)"), ("cell 4", "import os; os._exit(2)"), GOOD
    )
    assert found.verdict == "right"


def test_an_answer_without_a_cell_of_its_own_can_stand_anywhere(engine, add):
    assert verdict(engine, add, ("cell 2", GOOD), own=None).verdict == "right"
    assert verdict(engine, add, ("cell 2", "import os; os._exit(1)"), own=None).verdict == "not attempted"


# ------------------------------------------------------------------------------------------------- forged messages

FORGE = '''
def forge(*raws):
    """Send bytes over every socket this process holds."""
    for descriptor in range(3, 64):
        try:
            channel = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        for raw in raws:
            channel.sendall(raw)

def frame(message, data=None, blobs=b"", lengths=None):
    header = json.dumps({"message": message, "data": data or {}, "blobs": lengths or []}).encode()
    return struct.pack(">4sIQ", b"LLMC", len(header), len(blobs)) + header + blobs

DONE = {"done": True, "seconds": 0.0, "error": None, "tried": [], "changed": []}
'''
FORGED = {
    "garbage": 'b"GET / HTTP/1.1" * 10',
    "a frame of an exabyte": 'struct.pack(">4sIQ", b"LLMC", 10, 1 << 60)',
    "no message": "frame({})",
    "done without the rest": 'frame({"done": True})',
    "no time": 'frame({**DONE, "seconds": "soon"})',
    "time that is not a number": 'frame({**DONE, "seconds": float("nan")})',
    "endless time": 'frame({**DONE, "seconds": float("inf")})',
    "an error of no kind": 'frame({**DONE, "error": {"kind": "harness"}})',
    "an error without type": 'frame({**DONE, "error": {"kind": "raised"}})',
    "an error that is text": 'frame({**DONE, "error": "raised"})',
    "a signature that is a number": """frame({**DONE, "error":
        {"kind": "raised", "type": "", "message": "", "signature": 5}})""",
    "a type that is a list": 'frame({**DONE, "error": {"kind": "raised", "type": [], "message": ""}})',
    "tried that is a number": 'frame({**DONE, "tried": 5})',
    "changed that is a dict": 'frame({**DONE, "changed": {}})',
    "thousands of texts": 'frame({**DONE, "tried": ["x"] * 5000})',
    "observations of another type": 'frame(DONE, {"observed": ["t", "float32", [9], "cpu", 0]}, b"1234", [4])',
    "a call without a service": 'frame({"call": 1, "method": "read"}, {"arguments": ["u", []]})',
    "a call with a method that is a list": 'frame({"call": [1], "method": []}, {"arguments": ["u", []]})',
    "loaded again": 'frame({"loaded": True, "errors": [], "case_error": None, "names": []})',
    "another part": 'frame({"part": 0})',
}


@pytest.mark.parametrize("raw", FORGED.values(), ids=FORGED.keys())
@pytest.mark.parametrize("when", ["in an item", "while loading"])
def test_a_forged_message_is_never_more_than_a_wrong_answer(engine, add, when, raw):
    text = body(f"forge({raw})", head=FORGE) if when == "in an item" else f"{body('', FORGE)}forge({raw})\n"
    found = verdict(engine, add, text)
    assert found.verdict in ("wrong", "crashed", "timed out", "right") and (found.verdict == "right") == (
        found.points == 2
    )
    if found.verdict == "right":  # only what is answered and ignored
        assert "call" in raw and when == "in an item"


@pytest.mark.parametrize(
    "message",
    [
        {"loaded": True},
        {"loaded": True, "errors": 5, "case_error": None, "names": []},
        {"loaded": True, "errors": [{"kind": "raised"}], "case_error": None, "names": []},
        {"loaded": True, "errors": [], "case_error": None, "names": [7]},
        {"loaded": True, "errors": [], "case_error": {"type": "Made up"}, "names": []},
        {"part": 99},
        {"part": -1},
        {"part": "0"},
        {"part": [1]},
        {"part": True},
    ],
    ids=str,
)
def test_a_forged_end_of_loading_is_no_fault_of_the_harness(engine, add, message):
    found = verdict(engine, add, f"{body('', FORGE)}forge(frame({message!r}))\nos._exit(0)\n")
    assert found.verdict == "crashed" and found.points == 0


def test_a_flood_of_calls_ends_the_answer_and_not_the_judge(engine, served):
    call = "threading.Thread(target=shelf.read, args=(0, 8)).start()"
    text = f"import threading\ndef read_all(shelf):\n    while True:\n        {call}"
    found = verdict(engine, served, text)
    assert found.verdict in ("crashed", "timed out", "wrong") and found.points == 0


# ----------------------------------------------------------------------------------------- services, phases, ranks


def test_a_service_answers_from_the_judges_process_and_counts_there(engine, served):
    right = "def read_all(shelf):\n    return shelf.read(0, 8) + b'no such book'"
    dear = (
        "def read_all(shelf):\n    return b''.join(shelf.read(i, i + 1) for i in range(8)) + b'no such book'"
    )
    found = verdict(engine, served, right)
    assert (found.verdict, found.points) == ("right", 3)
    assert [(c.name, c.counted, c.at_most) for r in found.results for c in r.costs] == [("reads", 1, 1)]
    found = verdict(engine, served, dear)
    assert (found.verdict, found.points) == ("right", 2) and "reads: at most 1, found 8" in found.reason


REBUILDS_THE_SERVICE = """
import sys
from llmcourse.exercise import Rng, derive_seed

def read_all(shelf):
    frame = sys._getframe()
    while "message" not in frame.f_locals:
        frame = frame.f_back
    return Rng(derive_seed(frame.f_locals["message"]["seed"], "service")).bytes(8) + b"no such book"
"""


def test_a_service_cannot_be_built_again_from_what_a_worker_is_given(engine, served):
    found = verdict(engine, served, REBUILDS_THE_SERVICE)
    assert (found.verdict, found.points) == ("wrong", 0)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("shelf.fail()", "raised FileNotFoundError: no such book"),
        ("shelf.read(1)", "raised TypeError"),
        ("shelf.read(object(), 2)", "raised TypeError"),
        ("shelf.secret()", "raised AttributeError"),
        ("shelf._channel.call(shelf._number, 'secret', ())", "offers no call 'secret'"),
        ("shelf._channel.call(shelf._number, '__init__', ())", "offers no call '__init__'"),
    ],
)
def test_what_a_service_refuses_is_raised_in_the_answer(engine, served, call, reason):
    found = verdict(engine, served, f"def read_all(shelf):\n    return {call}")
    assert found.verdict == "wrong" and reason in found.reason


def test_a_thread_left_behind_by_one_item_does_not_reach_the_service_of_the_next(engine, served):
    leaves_one = """
import threading
refused, calling = threading.Event(), []

def read_all(shelf):
    def call_on():
        try:
            while True:
                shelf.read(0, 8)
        except AttributeError:
            refused.set()
    if calling:
        assert refused.wait(30)
    else:
        calling.append(threading.Thread(target=call_on, daemon=True))
        calling[0].start()
    return shelf.read(0, 8) + b"no such book"
"""
    found = verdict(engine, served, leaves_one)
    assert [(c.name, c.counted) for r in found.results for c in r.costs] == [("reads", 1)]
    assert (found.verdict, found.points) == ("right", 3)


def test_a_second_phase_sees_only_what_was_saved(engine, phased):
    kept = "KEPT = []\ndef remember(value=None, saved=None):\n    {}\n    return KEPT[0]"
    honest = "def remember(value=None, saved=None):\n    return dict(kept=value) if saved is None else saved['kept']"
    assert verdict(engine, phased, honest).verdict == "right"
    cheat = kept.format("if saved is None:\n        KEPT.append(value)\n        return dict(kept=0)")
    found = verdict(engine, phased, cheat)
    assert found.verdict == "wrong" and "IndexError" in found.reason
    nothing = verdict(engine, phased, "def remember(value=None, saved=None):\n    raise ValueError")
    assert [r.outcome.kind for r in nothing.results] == ["raised", "not run"]


def test_ranks_exchange_messages_and_a_rank_that_dies_does_not_leave_the_other_waiting(engine, ranked):
    right = (
        "def swap(value, link):\n    link.send(1 - link.rank, value)\n    return link.receive(1 - link.rank)"
    )
    assert verdict(engine, ranked, right).verdict == "right"
    dies = "import os\ndef swap(value, link):\n    if link.rank == 0:\n        os._exit(5)\n    return link.receive(0)"
    found = verdict(engine, ranked, dies)
    assert found.verdict == "crashed" and "exit status 5" in found.reason
    waits = "def swap(value, link):\n    return link.receive(1 - link.rank)"
    found = verdict(engine, ranked, waits)
    assert found.verdict == "wrong" and "every rank waits" in found.reason
    odd = "def swap(value, link):\n    link.send(1 - link.rank, object())"
    assert "raised TypeError" in verdict(engine, ranked, odd).reason
    nobody = "def swap(value, link):\n    link.send(7, value)"
    assert "expected another rank of 0..1" in verdict(engine, ranked, nobody).reason


def test_a_rank_that_hangs_is_timed_out(engine, ranked):
    text = "def swap(value, link):\n    while link.rank == 0: pass\n    return link.receive(0)"
    assert verdict(engine, ranked, text).verdict == "timed out"


def test_a_deadlock_is_told_in_a_notebook_too(ranked):
    runner = InProcess()
    found = judge(
        runner, ranked, lambda value, link: link.receive(1 - link.rank), 1, expectations(runner, ranked, 1)
    )
    assert found.verdict == "wrong" and "every rank waits" in found.reason


# -------------------------------------------------------------------------------------------------- faults of ours


def broken(tmp_path, name, change):
    return written(tmp_path, name, LESSON.replace("add", name).replace(*change))


def test_a_reference_that_fails_its_own_case_is_a_fault_and_no_verdict(engine, tmp_path):
    exercise = broken(tmp_path, "fails_itself", ("return x + y\n    ###", "return x + nothing\n    ###"))
    with pytest.raises(HarnessFault, match="fails_itself.vectors: the reference itself failed"):
        engine.expected(exercise, SEED)


def test_cases_that_cannot_be_loaded_are_a_fault(engine, tmp_path):
    exercise = broken(tmp_path, "cannot_load", ("import os\n", "import os\nTABLE = {}\n"))
    path = exercise.path
    path.write_text(
        path.read_text()
        .replace("x, y = rng.normal(4)", "TABLE\n    x, y = rng.normal(4)")
        .replace("TABLE = {}", "TABLE = 1 / 0")
    )
    with pytest.raises(HarnessFault, match="ZeroDivisionError|could not be loaded"):
        engine.expected(exercise, SEED)


def test_a_forbidden_name_that_does_not_exist_is_a_fault_that_names_it(engine, tmp_path):
    exercise = broken(tmp_path, "forbids_nothing", ("minutes=5", "minutes=5, forbid=('torch.optim.NoSuch',)"))
    with pytest.raises(HarnessFault, match="NoSuch"):
        engine.expected(exercise, SEED)


def test_a_zygote_that_is_gone_is_a_fault_of_the_harness(add):
    with Engine(zygote=Zygote(in_jail=False)) as mine:
        expected = mine.expected(add, SEED)  # now there is a zygote that can go
        mine.zygote.process.kill()
        mine.zygote.process.wait()
        with pytest.raises(HarnessFault, match="zygote"):
            judge(mine, add, Answer("add", (("cell", GOOD),), own="cell"), SEED, expected)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def gone(pids, limit_s=10.0) -> bool:
    """Wait until none of the processes runs: the kernel needs a moment after SIGKILL."""
    deadline = time.monotonic() + limit_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


def test_an_engine_leaves_no_process_and_no_file(add, tmp_path):
    noted = tmp_path / "pids"
    text = body(
        "import time\n"
        "child = os.fork()\n"
        "child or (time.sleep(1000), os._exit(0))\n"
        "assert tempfile.gettempdir() == os.getcwd()\n"
        f"open({str(noted)!r}, 'a').write(f'{{os.getpid()}} {{child}} ')\n"
        "open('left behind', 'w').write('x'); open(tempfile.mkdtemp() + '/left behind', 'w').write('x')"
    )
    with Engine(zygote=Zygote(in_jail=False)) as mine:
        folder, zygote = Path(mine.folder), mine.zygote.process.pid
        assert verdict(mine, add, text).verdict == "right"
        pids = [int(pid) for pid in noted.read_text().split()]
        # Already when an answer was judged, before the engine closes.
        assert len(pids) == 4 and gone(pids) and not list(folder.rglob("left behind"))
        assert alive(zygote)
    assert gone([zygote]) and not folder.exists()


def test_a_temporary_folder_that_is_nearly_full_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(engine_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    with pytest.raises(HarnessFault) as fault:
        Engine()
    folder = tempfile.gettempdir()
    assert str(fault.value) == (
        f"{folder} has 5 MiB free and the files of the cases need 128 MiB; free some, or set TMPDIR to a folder "
        "that has them"
    )


def test_a_reference_without_room_says_what_it_met_and_shows_no_dict(engine, tmp_path):
    full = "import errno, os\n    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n    ###"
    exercise = broken(tmp_path, "meets_a_full_disk", ("return x + y\n    ###", full))
    with pytest.raises(HarnessFault) as fault:
        engine.expected(exercise, SEED)
    assert str(fault.value).endswith(
        "the reference itself failed: OSError: [Errno 28] No space left on device"
    )


def test_an_engine_that_is_closed_at_once_says_nothing(capfd):
    with Engine():
        pass
    assert capfd.readouterr() == ("", "")


def test_a_limit_grows_with_the_references_own_time():
    assert judging.limit_s(None) == 60.0
    assert judging.limit_s(judging.Outcome(seconds=0.5)) == 12.0
