"""The jail from inside: what an answer finds there, what it cannot do, and that nothing of it survives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcourse import auditing, jail, source
from llmcourse import engine as engine_module
from llmcourse.engine import Answer, Engine, WorkerProcess
from llmcourse.zygote import IN_JAIL, HarnessFault, Zygote
from tests.answers import GOOD, LESSON, SEED, body, verdict, written
from tests.jailed import needs_jail

REPOSITORY = Path(__file__).parents[1]

pytestmark = needs_jail


@pytest.fixture(scope="module")
def engine():
    with Engine(zygote=Zygote(in_jail=True)) as started:
        yield started


@pytest.fixture(scope="module")
def add(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    return written(folder, "add", LESSON)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(engine_module, "LOAD_LIMIT_S", 3)
    monkeypatch.setattr(engine_module, "limit_s", lambda expected: 8.0)


ONCE = "if os.path.exists('once'):\n    return x + y\n"  # a worker serves several cases


def holds(engine, add, text: str) -> None:
    """The text runs once inside an answer and raises nothing: its assertions are about the jail."""
    found = verdict(engine, add, body(f"{ONCE}{text}\nopen('once', 'w').close()"))
    assert found.verdict == "right", found.reason


def test_the_level_is_named(engine):
    assert engine.zygote.in_jail and engine.zygote.level == IN_JAIL


def test_an_answer_is_a_user_of_its_own_without_any_right(engine, add):
    holds(
        engine,
        add,
        "status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())\n"
        "assert os.getuid() == os.getgid() == 65534, os.getuid()\n"
        "for held in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'):\n"
        "    assert int(status[held], 16) == 0, held\n"
        "assert status['NoNewPrivs'].strip() == '1' and status['Seccomp'].strip() == '2'\n"
        "assert not os.getgroups() or set(os.getgroups()) == {65534}",
    )


def test_an_answer_sees_python_and_this_package_and_no_lesson(engine, add, tmp_path):
    secret = tmp_path / "gradebook.db"
    secret.write_text("grades")
    places = [
        secret,
        Path.home() / ".ssh",
        REPOSITORY / "solutions",
        REPOSITORY / ".git",
        REPOSITORY / "tests",
    ]
    places += [REPOSITORY / "grading", Path("/etc/passwd"), Path("/etc/shadow"), Path("/home"), Path("/var")]
    holds(
        engine,
        add,
        f"for place in {[str(place) for place in places]!r}:\n"
        "    assert not os.path.exists(place), place\n"
        "import llmcourse\n"
        "package = llmcourse.__path__[0]\n"
        # By native calls as well: the audit hook is not what keeps them closed here.
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for closed in ('lessons/parameter_loading/read_header.py', 'lessons/__init__.py'):\n"
        "    assert libc.open(os.path.join(package, closed).encode(), 0) == -1, closed\n"
        "assert libc.open(os.path.join(package, 'exercise.py').encode(), 0) >= 0",
    )


def test_the_file_of_the_exercise_itself_is_covered(engine, add):
    holds(
        engine,
        add,
        f"libc = ctypes.CDLL(None)\nassert libc.open({str(add.path).encode()!r}, 0) == -1",
    )


def test_exercises_that_a_relative_path_names_are_covered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    monkeypatch.setenv("LLMCOURSE_LESSONS", "mine")
    exercise = written(tmp_path / "mine", "add", LESSON)
    text = f"libc = ctypes.CDLL(None)\nassert libc.open({str(exercise.path).encode()!r}, 0) == -1"
    with Engine(zygote=Zygote(in_jail=True)) as mine:
        holds(mine, exercise, text)
        # It is there, or there would be nothing to cover.
        hidden = Answer(
            "add", (("cell", body(f"open({str(exercise.path)!r}).close()")),), own="cell", trusted=True
        )
        assert "vectors" in mine.run(exercise, hidden, [*exercise.items.values()], SEED, None)
        assert mine.run(exercise, hidden, [*exercise.items.values()], SEED, None)["vectors"].error is None


def test_an_answer_writes_nowhere_but_in_its_own_folder(engine, add):
    holds(
        engine,
        add,
        f"assert os.getcwd() == tempfile.gettempdir() == {jail.FOLDER!r}\n"
        "assert os.listdir('.') == []\n"
        "open('mine', 'w').write('x')\n"
        "for top, folders, files in os.walk('/'):\n"
        "    folders[:] = [one for one in folders if one not in ('proc', 'sys')] if top.count('/') < 4 else []\n"
        f"    if top.startswith({jail.FOLDER!r}):\n"
        "        continue\n"
        "    assert not os.access(top, os.W_OK), top\n"
        "    try:\n"
        "        open(os.path.join(top, 'note'), 'w')\n"
        "    except OSError:\n"
        "        continue\n"
        "    raise AssertionError(f'wrote into {top}')",
    )


def test_a_full_folder_is_the_answers_own_and_is_gone_with_it(engine, add):
    filled = (
        "import errno\n"
        "try:\n"
        "    for number in range(3000):\n"
        "        with open(f'{number}', 'wb') as file:\n"
        "            file.write(bytes(1 << 20))\n"
        "except OSError as full:\n"
        "    assert full.errno == errno.ENOSPC\n"
        "    assert 900 < number < 1100\n"
        "else:\n"
        "    raise AssertionError('no end of room')"
    )
    holds(engine, add, filled)
    holds(engine, add, "assert os.listdir('.') == []")


def test_the_environment_carries_no_secret(engine, add, monkeypatch):
    monkeypatch.setenv("REGISTRY_TOKEN", "a secret of the teacher's")
    with Engine(zygote=Zygote(in_jail=True)) as mine:
        text = "assert 'secret' not in str(os.environ) + open('/proc/self/environ').read()"
        assert verdict(mine, add, body(text)).verdict == "right"


def test_there_is_no_network_not_even_to_this_machine(engine, add):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        named.bind("\0llmcourse-test-of-the-jail")
        named.listen()
        holds(
            engine,
            add,
            "for family, address in (\n"
            f"    (socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})),\n"
            "    (socket.AF_INET, ('192.0.2.1', 80)),\n"
            "    (socket.AF_UNIX, '\\0llmcourse-test-of-the-jail'),\n"
            "):\n"
            "    try:\n"
            "        socket.socket(family).connect(address)\n"
            "    except OSError:\n"
            "        continue\n"
            "    raise AssertionError(address)",
        )


def test_an_answer_sees_no_process_but_its_own(engine, add):
    holds(
        engine,
        add,
        "import time\n"
        "assert os.getpid() == 1\n"
        "child = os.fork()\n"
        "child or (time.sleep(600), os._exit(0))\n"
        "assert {name for name in os.listdir('/proc') if name.isdigit()} == {'1', str(child)}\n"
        "assert os.getppid() == 0\n"
        "os.kill(child, signal.SIGKILL)",
    )


def test_system_calls_that_pass_the_limits_are_refused(engine, add):
    _, numbers = jail.REFUSED[os.uname().machine]
    holds(
        engine,
        add,
        "import errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers!r}.items():\n"
        "    ctypes.set_errno(0)\n"
        "    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1, name\n"
        "    assert ctypes.get_errno() == errno.EPERM, (name, ctypes.get_errno())",
    )


def gone(inside: str, limit_s: float = 5.0) -> bool:
    """Whether, soon, no process of this machine carries the text in its command line or name."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        left = 0
        for status in Path("/proc").glob("[0-9]*/comm"):
            try:
                left += inside in status.read_text()
            except OSError:
                continue
        if not left:
            return True
        time.sleep(0.02)
    return False


NAMED = "ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"  # PR_SET_NAME


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "bombfork",
            "import time, resource\n"
            "count = 0\n"
            "try:\n"
            "    while True:\n"
            "        if os.fork() == 0:\n"
            "            time.sleep(600)\n"
            "        count += 1\n"
            "except OSError:\n"
            "    pass\n"
            f"assert 100 < count < {jail.MAX_PROCESSES}, count",
        ),
        (
            "daemons",
            "import time\n"
            "if os.fork() == 0:\n"
            "    os.setsid()\n"
            "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "    if os.fork() == 0:\n"
            "        time.sleep(600)\n"
            "    os._exit(0)\n"
            "os.wait()",
        ),
    ],
)
def test_whatever_an_answer_starts_dies_with_it(engine, add, name, text):
    holds(engine, add, NAMED.format(name=name) + text)
    assert gone(name)
    assert verdict(engine, add, GOOD).verdict == "right"


def test_processes_that_hold_too_much_together_end_the_answer(engine, add, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_DATA_BYTES", 2 << 30)
    text = (
        "import time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        held = bytearray(700 << 20)\n"
        "        for at in range(0, len(held), 4096):\n"
        "            held[at] = 1\n"
        "        time.sleep(600)\n"
        "time.sleep(600)"
    )
    found = verdict(engine, add, body(NAMED.format(name="bombmem") + text))
    assert (found.verdict, found.points) == ("crashed", 0) and "2 GiB of memory" in found.reason
    assert gone("bombmem")


def test_an_answer_that_ends_itself_is_told_as_without_a_jail(engine, add):
    for text, reason in (
        ("os._exit(7)", "exit status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)\nos._exit(8)", "exit status 8"),  # it cannot end itself so
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.fork() or time.sleep(600)\nos.kill(-1, signal.SIGKILL)\nos._exit(9)", "exit status 9"),
    ):
        found = verdict(engine, add, body(text, "import time"))
        assert found.verdict == "crashed" and reason in found.reason, text
    assert verdict(engine, add, GOOD).verdict == "right"


def test_an_engine_in_the_jail_leaves_no_process_and_no_file(add):
    with Engine(zygote=Zygote(in_jail=True)) as mine:
        folder = Path(mine.folder)
        assert verdict(mine, add, body(NAMED.format(name="leftover"))).verdict == "right"
        zygote = mine.zygote.process.pid
    assert gone("leftover") and not folder.exists() and not Path(f"/proc/{zygote}").exists()


def test_the_jail_ends_with_its_judge():
    text = (
        "import os, signal\n"
        "from llmcourse.zygote import Zygote\n"
        "zygote = Zygote(in_jail=True)\n"
        "assert zygote.in_jail\n"
        "print(zygote.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    outer = int(ran.stdout)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{outer}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{outer}").exists()


# ------------------------------------------------------------------------------------------------ where there is none


def no_bubblewrap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bwrap").write_text("#!/bin/sh\necho 'bwrap: no namespaces for you' >&2\nexit 1\n")
    (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_system_that_refuses_the_jail_is_told_and_used_without(add, tmp_path, monkeypatch):
    no_bubblewrap(tmp_path, monkeypatch)
    with Engine() as mine:
        assert verdict(mine, add, GOOD).verdict == "right"
        assert mine.zygote.level == "without a jail: bwrap: no namespaces for you"


def test_a_jail_that_is_demanded_and_refused_is_a_fault(tmp_path, monkeypatch):
    no_bubblewrap(tmp_path, monkeypatch)
    with Zygote(in_jail=True) as zygote, pytest.raises(HarnessFault, match="no namespaces for you"):
        zygote.preload("json")


def test_a_system_without_bubblewrap_says_what_to_install(monkeypatch):
    monkeypatch.setattr(jail.shutil, "which", lambda name: None)
    assert "apt-get install bubblewrap" in str(jail.missing())
    with pytest.raises(HarnessFault, match="apt-get install bubblewrap"):
        Zygote(in_jail=True)


def test_what_is_covered_twice_is_bound_once(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    made = jail.command(["true"], [str(tmp_path), str(inner)])
    assert str(tmp_path) in made and str(inner) not in made


def test_a_contender_of_a_race_starts_threads_and_no_process(engine, add):
    text = body(
        "import multiprocessing, subprocess, threading\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "made = []\n"
        "for start in (os.fork, lambda: os.posix_spawn('/bin/true', ['true'], {}),\n"
        "              multiprocessing.get_context('fork').Process(target=print).start):\n"
        "    try:\n"
        "        made.append(start())\n"
        "    except OSError:\n"
        "        pass\n"
        "calls = [libc.fork, libc.vfork, lambda: libc.syscall(56, 17, 0, 0, 0, 0), lambda: libc.syscall(435, 0, 0)]\n"
        "for call in calls:\n"
        "    if call() >= 0:\n"
        "        os._exit(7) if os.getppid() != 1 else made.append('a child')\n"
        "assert not made, made\n"
        "ran = []\n"
        "thread = threading.Thread(target=ran.append, args=(1,))\n"
        "thread.start()\n"
        "thread.join()\n"
        "assert ran == [1]"
    )
    hidden = [add.name, *add.mistakes, *add.alternatives]
    worker = WorkerProcess(engine, add, Answer("add", (("cell", text),), own="cell"), SEED, alone=True)
    try:
        assert worker.load(source.case_source(add.source, [*add.items], hidden, add.path)).errors == ()
        found = worker.run(add.items["vectors"], (1, 2), 8.0, 1 << 20, None, (False, None))
    finally:
        worker.close()
    assert found.error is None


@pytest.mark.slow
def test_memory_is_told_apart_where_files_lie_in_memory(seed: int) -> None:
    """Every wrong answer of the exercises that allow for mapped files."""
    report = auditing.audit(["map_tensor", "load_without_double_memory"], seed=seed, jailed=True)
    assert report.complete, report


def test_what_is_counted_of_a_process_it_cannot_hide(engine, add):
    holds(
        engine,
        add,
        "library = ctypes.CDLL(None, use_errno=True)\n"
        "refused = library.prctl(4, 0, 0, 0, 0), ctypes.get_errno(), library.prctl(3, 0, 0, 0, 0)\n"
        "assert refused == (-1, 1, 1), refused\n",
    )


@pytest.mark.parametrize("runs", [False, True])
def test_a_process_that_ends_between_two_cases_is_its_own_loss(engine, add, monkeypatch, runs):
    engine.expected(add, SEED)

    def no_such_process(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(engine_module, "service_for", no_such_process)
    monkeypatch.setattr(engine_module, "is_running", lambda pid: runs)
    if runs:
        with pytest.raises(OSError, match="Invalid argument"):
            verdict(engine, add, GOOD)
    else:
        found = verdict(engine, add, GOOD)
        assert found.verdict == "crashed" and "before this case" in found.reason
