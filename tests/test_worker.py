"""Running one item: what an answer did is noted, what it broke is put back, what is forbidden is off."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

import numpy
import pytest
import torch

from llmcourse import wall, worker
from llmcourse.exercise import Rng
from llmcourse.judging import kept_torch_state
from llmcourse.worker import Forbidden, checksum, describe_error, perform, reset, summary, switched_off

HERE = [__file__]


def run(answer, case, **options):
    return perform(case, answer, Rng(1), labels=HERE, **options)


# ------------------------------------------------------------------------------------------------------ one item


def test_an_item_gives_its_observations_and_what_was_tried():
    happened, observed = run(lambda x, n=2: x * n, lambda answer, rng: {"y": answer(torch.ones(2, 3), n=3)})
    assert torch.equal(observed["y"], torch.full((2, 3), 3.0))
    assert happened["error"] is None and happened["changed"] == [] and happened["seconds"] >= 0
    assert happened["tried"] == ["<lambda>(x=float32 [2, 3], n=3)"]


def test_only_the_first_calls_are_noted_and_each_in_few_words():
    def answer(*arguments):
        return 1

    happened, _ = run(answer, lambda answer, rng: [answer(*["word" * 90] * 9) for _ in range(50)])
    assert len(happened["tried"]) == worker.MAX_NOTED_CALLS
    assert all(len(tried) <= worker.MAX_NOTED_CHARS for tried in happened["tried"])


def test_an_exception_is_told_with_its_type_message_and_the_learners_own_line():
    def answer(x):
        return torch.ones(2) @ torch.ones(3)

    happened, observed = run(answer, lambda answer, rng: answer(1))
    error = happened["error"]
    assert observed is None and (error["kind"], error["type"], error["label"]) == (
        "raised",
        "RuntimeError",
        __file__,
    )
    assert error["line"] == answer.__code__.co_firstlineno + 1 and error["message"]


def test_a_wrong_signature_is_told_beside_the_type_error():
    happened, _ = run(lambda weight, axis: weight, lambda answer, rng: answer(1))
    assert happened["error"]["type"] == "TypeError" and happened["error"]["signature"] == ["weight", "axis"]


@pytest.mark.parametrize(
    ("error", "kind", "name"),
    [
        (NotImplementedError, "not written", "NotImplementedError"),
        (NotImplementedError("'tril' is not implemented for 'Float8'"), "raised", "NotImplementedError"),
        (SystemExit(3), "raised", "SystemExit"),
        (MemoryError(), "raised", "MemoryError"),
        (RecursionError("deep"), "raised", "RecursionError"),
    ],
    ids=["stub", "an operation torch lacks", "exit", "memory", "recursion"],
)
def test_an_answer_that_stops_is_told_by_kind(error, kind, name):
    def answer():
        raise error

    happened, _ = run(answer, lambda answer, rng: answer())
    assert (happened["error"]["kind"], happened["error"]["type"]) == (kind, name)


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Unprintable(), "(its message cannot be printed: RuntimeError)"),
        (ValueError("\x1b]0;title\x07 \ud800"), "\\x1b]0;title\\x07 \\ud800"),
        (ValueError("x" * 10_000), "x" * worker.MAX_MESSAGE_CHARS),
        (SyntaxError("bad"), "bad"),
    ],
    ids=["unprintable", "control characters", "long", "syntax"],
)
def test_a_message_is_short_and_printable(error, message):
    assert describe_error(error, [])["message"] == message


def test_an_interrupt_goes_through():
    def answer():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(answer, lambda answer, rng: answer())


# --------------------------------------------------------------------------------------------- changed arguments


def changes(change, value):
    """Names of the arguments noted as changed when the answer applies `change` to `value`."""

    def answer(given, other):
        change(given)

    return run(answer, lambda answer, rng: answer(value, other=torch.ones(1)))[0]["changed"]


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (torch.ones(3), lambda x: x.add_(1)),
        (torch.ones(3), lambda x: x.data.add_(1)),
        (torch.ones(3), lambda x: x.numpy().__setitem__(0, 5)),
        (torch.ones(2, 3).T, lambda x: x.zero_()),
        (torch.ones(4)[::4], lambda x: x.zero_()),
        (torch.ones(3), lambda x: x.resize_(1)),
        (torch.ones(3, dtype=torch.bfloat16), lambda x: x.neg_()),
        (numpy.ones(3), lambda x: x.fill(2)),
        (bytearray(b"abc"), lambda x: x.reverse()),
        ({"a": [torch.ones(1)]}, lambda x: x["a"][0].zero_()),
        ({"a": 1}, lambda x: x.pop("a")),
        ([3, 1], lambda x: x.sort()),
    ],
    ids=[
        "in place",
        "data",
        "numpy view",
        "transposed",
        "one strided",
        "resized",
        "bfloat16",
        "numpy",
        "bytes",
        "nested",
        "dict",
        "list",
    ],
)
def test_a_changed_argument_is_noted_by_name(value, change):
    assert changes(change, value) == ["given"]


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        object(),
        float("nan"),
        iter([1]),
    ],
    ids=["tensor", "sparse", "meta", "object", "nan", "iterator"],
)
def test_an_argument_that_is_only_read_is_not_noted(value):
    assert changes(lambda given: None, value) == []


def test_an_answer_that_may_change_its_arguments_is_not_watched():
    happened, _ = run(lambda x: x.zero_(), lambda answer, rng: answer(torch.ones(1)), mutates=True)
    assert happened["changed"] == [] and happened["tried"]


def test_a_class_reaches_the_case_as_it_is():
    class Answer:
        pass

    happened, observed = run(Answer, lambda answer, rng: [answer])
    assert observed[0] is Answer and happened["tried"] == [] and happened["changed"] == []


def test_a_checksum_sees_dtype_shape_and_bytes():
    ones = torch.ones(2, 2)
    assert checksum(ones) == checksum(ones.clone()) == checksum(ones.T)
    assert len({str(checksum(x)) for x in (ones, ones.double(), ones.reshape(4), ones * 2, ones.int())}) == 5
    assert checksum(torch.empty(0, 3)) != checksum(torch.empty(3, 0))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.ones(2, dtype=torch.int8), "int8 [2]"),
        (b"abc", "3 bytes"),
        ([1, 2], "[1, 2]"),
        ([torch.ones(100)] * 50, "a list of 50"),
        ({"a": "x" * worker.MAX_SHOWN_CHARS}, "{'a': '" + "x" * (worker.MAX_SHOWN_CHARS - 8) + "…"),
        ({"a": torch.ones(3)}, "a dict of 1"),
        ("x" * 5_000, "'" + "x" * (worker.MAX_SHOWN_CHARS - 2) + "…"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "SGD of 1 group"),
        (torch.nn.Sequential(torch.nn.ReLU()), "Sequential( (0): ReLU() )"),
    ],
    ids=[
        "tensor",
        "bytes",
        "short list",
        "tensors",
        "long dict",
        "dict of a tensor",
        "text",
        "optimizer",
        "module",
    ],
)
def test_an_argument_is_shown_in_a_few_words(value, shown):
    assert summary(value) == shown


# ------------------------------------------------------------------------------------------------- switched off


def test_library_answers_are_off_inside_the_block_and_back_after_it():
    original, function = torch.optim.AdamW, torch.nn.functional.softmax
    with switched_off(["torch.optim.AdamW", "torch.nn.functional.softmax", "torch.Tensor.softmax"]):
        with pytest.raises(Forbidden, match="AdamW is what this exercise asks you to write"):
            torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
        with pytest.raises(Forbidden, match="softmax"):
            torch.nn.functional.softmax(torch.ones(2), dim=0)
        with pytest.raises(Forbidden):
            torch.ones(2).softmax(0)
    assert torch.optim.AdamW is original and torch.nn.functional.softmax is function
    assert torch.ones(2).softmax(0).sum() == 1


def test_modules_whose_names_their_package_deletes_are_found():
    with switched_off(["torch.optim.adamw.adamw"]), pytest.raises(Forbidden):
        sys.modules["torch.optim.adamw"].adamw()


def test_what_other_modules_of_the_library_call_it_is_off_too():
    import torch.optim.optimizer as elsewhere

    original = elsewhere._single_tensor_adam
    with switched_off(["torch.optim.adam._single_tensor_adam"]), pytest.raises(Forbidden):
        elsewhere._single_tensor_adam()
    assert elsewhere._single_tensor_adam is original


def test_a_refusal_carries_nothing_of_what_it_stands_for(monkeypatch):
    def original():
        return original.kept

    original.kept = original
    monkeypatch.setattr(torch.optim, "original", original, raising=False)
    with switched_off(["torch.optim.original"]):
        assert torch.optim.original is not original and vars(torch.optim.original) == {}
    assert torch.optim.original is original


@pytest.mark.parametrize("name", ["_fused_sgd_", "_fused_adamw_", "fake_quantize_per_tensor_affine"])
def test_an_operation_is_off_with_its_overloads_and_torch_keeps_its_packet(name):
    packet = getattr(torch.ops.aten, name)
    called = [packet, *(getattr(packet, overload) for overload in packet.overloads())]
    before = [one._op for one in called]
    with switched_off([f"torch.ops.aten.{name}"]):
        assert getattr(torch.ops.aten, name) is packet
        for one in called:
            with pytest.raises(Forbidden, match=f"torch.ops.aten.{name} is what this exercise asks"):
                one()
    assert [one._op for one in called] == before


def test_a_class_that_is_found_among_its_bases_subclasses_is_off_too():
    schedules = torch.optim.lr_scheduler

    def found():
        (one,) = [c for c in schedules.LRScheduler.__subclasses__() if c.__name__ == "ExponentialLR"]
        return one

    own = dict(vars(found()))
    with switched_off(["torch.optim.lr_scheduler.ExponentialLR"]):
        for use in (found().get_lr, found()):
            with pytest.raises(Forbidden, match="ExponentialLR is what this exercise asks"):
                use(None)
    assert dict(vars(found())) == own
    names = ["torch.optim.lr_scheduler.ExponentialLR", "torch.optim.lr_scheduler.ExponentialLR.get_lr"]
    with switched_off(names):
        assert vars(found())["__init__"] is own["__init__"], "where methods are named, those alone are off"
        with pytest.raises(Forbidden):
            found().get_lr(None)
    assert dict(vars(found())) == own


@pytest.mark.parametrize("name", ["torch.optim.NoSuchThing", "torch.no_such_module.f", "no_such_package.f"])
def test_a_name_that_does_not_exist_is_an_error_and_leaves_everything_on(name):
    original = torch.optim.SGD
    with pytest.raises((AttributeError, ImportError)), switched_off(["torch.optim.SGD", name]):
        pass
    assert torch.optim.SGD is original


# ------------------------------------------------------------------------------------------------ torch's settings


def disturb():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    torch.set_num_threads(2)


def settings():
    return (
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_num_threads(),
    )


def test_reset_puts_back_what_an_answer_may_have_set():
    with kept_torch_state(0):
        reset(5)
        clean = settings()
        first = (torch.rand(1).item(), random.random(), numpy.random.rand())
        disturb()
        reset(5)
        assert settings() == clean == (torch.float32, "cpu", True, "highest", False, False, 1)
        assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == first


def test_a_notebook_gets_its_own_settings_and_random_streams_back():
    before = settings()
    try:
        disturb()
        mine = settings()
        torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
        with kept_torch_state(7):
            assert settings() != mine
            torch.rand(5, device="cpu"), random.random(), numpy.random.rand()
        assert settings() == mine
        after = (
            torch.rand(1, device="cpu", dtype=torch.float32).item(),
            random.random(),
            numpy.random.rand(),
        )
    finally:
        reset(0)
        torch.set_num_threads(before[-1])
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    assert after == (torch.rand(1).item(), random.random(), numpy.random.rand())


def test_lessons_cannot_be_imported_beside_an_answer():
    finder = worker.NoLessons()
    for name in ("llmcourse.lessons", "llmcourse.lessons.parameter_loading.parameter_count"):
        with pytest.raises(ImportError, match="course's own answers"):
            finder.find_spec(name)
    assert finder.find_spec("llmcourse.lessons_of_others") is None and finder.find_spec("torch") is None


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder with an answer in it, behind a wall."""
    folder = tmp_path / "lessons"
    folder.mkdir()
    (folder / "twice.py").write_text("def twice(x): return 2 * x")
    (tmp_path / "free.txt").write_text("free")
    monkeypatch.chdir(tmp_path)
    return folder, wall.refusing([str(folder)])


def test_no_path_leads_to_an_answer_behind_the_wall(closed, tmp_path):
    folder, refuse = closed
    (tmp_path / "detour").symlink_to(folder)
    paths = [
        folder / "twice.py",
        str(folder),
        os.fsencode(folder / "twice.py"),
        "lessons/twice.py",
        "./lessons",
    ]
    for path in [*paths, tmp_path / "detour" / "twice.py", "twice.py", "__pycache__/twice.cpython-311.pyc"]:
        with pytest.raises(PermissionError, match="closed to an answer"):
            refuse("open", (path, "r", 0))
    for event, arguments in [
        ("os.rename", (folder, "mine", -1, -1)),
        ("os.link", (folder / "twice.py", "x", -1, -1)),
    ]:
        with pytest.raises(PermissionError, match="closed to an answer"):
            refuse(event, arguments)
    for path in ("free.txt", tmp_path / "lessons.txt", "twice.bin", 3):
        refuse("open", (path, "r", 0))
    refuse("import", ("lessons.twice", None))
    with pytest.raises(PermissionError, match="closed to an answer"):
        refuse("import", ("twice", str(folder / "twice.so")))


def test_an_answer_behind_the_wall_starts_no_program(closed):
    for event in wall.PROGRAM_EVENTS:
        with pytest.raises(PermissionError, match="no other program"):
            closed[1](event, ("cat", ["cat"], None, None))


def test_a_remote_service_waits_for_its_own_reply_when_several_threads_call():
    """Replies that arrive in another order than the calls reach the thread that asked."""
    import socket

    from llmcourse import wire

    ours, theirs = socket.socketpair()
    remote = worker.Remote(worker.Channel(theirs), 1, ("double",), {"rank": 1})
    found = {}

    def ask(number):
        found[number] = remote.double(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    calls = [wire.receive(ours, max_bytes=1 << 20) for _ in threads]
    for message, data in reversed(calls):
        wire.send(ours, {"reply": message["call"]}, {"result": data["arguments"][0] * 2})
    for thread in threads:
        thread.join(30)
    assert found == {number: number * 2 for number in range(4)} and remote.rank == 1
    # Not closed here: the channel's reader ends its process when the judge goes.
    worker_end_kept_open.append((ours, theirs))


worker_end_kept_open: list = []


def test_a_module_first_imported_while_names_are_switched_off_keeps_none_of_the_refusals(
    tmp_path, monkeypatch
):
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "__init__.py").write_text("def read(): return 1\n")
    (tmp_path / "shelf" / "later.py").write_text("from shelf import read\ndef load(): return read()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with switched_off(["shelf.read", "shelf.later.load"]):
        from shelf import later

        with pytest.raises(Forbidden):
            later.load()
    assert later.load() == 1


def test_of_several_calls_the_one_that_raised_is_told():
    def answer(n):
        return 1 // (3 - n)

    happened, _ = run(answer, lambda answer, rng: [answer(n) for n in range(9)])
    assert happened["error"]["type"] == "ZeroDivisionError" and happened["tried"] == ["answer(n=3)"]

    def caught(answer, rng):
        with pytest.raises(ZeroDivisionError):
            answer(3)
        raise OSError("of the case")

    happened, _ = run(answer, caught)
    assert happened["error"]["type"] == "OSError" and happened["tried"] == ["answer(n=3)"]


def test_an_object_is_told_by_its_type_and_not_by_its_address():
    assert (summary(threading.Lock()), summary(object()), summary(Rng(1))) == ("a lock", "a object", "a Rng")


@pytest.mark.parametrize("prepared", [False, True])
def test_what_a_zygote_looked_up_is_switched_off_like_what_a_worker_looks_up(prepared: bool) -> None:
    # In a process of its own: it is for good.
    code = f"""
import json, torch
from llmcourse import worker
names = ("json.loads", "torch.nn.Linear")
kept = json.loads
if {prepared}:
    worker.prepare(names)
    assert names in worker._prepared
    assert all(kept is not one for place in worker._prepared[names] for one in place)
worker.switch_off(names)
assert names not in worker._prepared
for call in (lambda: json.loads("1"), lambda: torch.nn.Linear(1, 1), lambda: torch.nn.modules.linear.Linear(1, 1)):
    try:
        call()
    except worker.Forbidden:
        continue
    raise SystemExit("not switched off")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_imported_to_look_up_what_is_forbidden() -> None:
    code = """
import sys
from llmcourse import worker
worker.prepare(("xmlrpc.client.dumps",))
worker.prepare(("json.no_such_name",))
assert not worker._prepared and "xmlrpc.client" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
