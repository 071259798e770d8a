"""What goes wrong on the teacher's side while a class attacks: a noisy machine, a locked gradebook, a killed grader."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from nbgrader.api import Gradebook

from llmcourse import grader
from llmcourse.engine import Engine
from llmcourse.gradebook import Book, GradebookError, dump
from llmcourse.graded import Graded
from llmcourse.grading import Course, grade, table
from llmcourse.racing import RaceResult
from tests.attacks.attacks import ALIVE, FAST, unit
from tests.attacks.course import Place, build, notebook
from tests.attacks.test_attacks import hostile_processes
from tests.jailed import needs_jail

pytestmark = [
    pytest.mark.attack,
    needs_jail,
]
ATTACKERS = [
    one for one in FAST if one.student in ("02-segfault", "12-forged-observations", "22-half-a-file")
]


@pytest.fixture(scope="module")
def here():
    """Judges in this process, so that what is patched here holds there too."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield executor
        executor.submit(grader.close).result()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = build(tmp_path, "CANARY")
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(made.lessons))
    for student in ("ann", "bob"):
        made.hand_in(student, notebook("A"))
        made.hand_in(student, notebook("R"), "R")
    for attack in ATTACKERS:
        content = attack.make(made, attack.student)
        assert content is not None
        made.hand_in(attack.student, content)
    return made


# ------------------------------------------------------------------------------------- reports that are known

GUESS = """KNOWN = {known}


def first_above(reader, count, bound):
    for index in KNOWN:
        if reader.read(index) > bound and reader.read(index - 1) <= bound:
            return index
    return 0
"""


def told(record: Graded) -> tuple[float, list[int]]:
    """Points for first_above, and the numbers that its report tells of what was expected."""
    found = next(one for one in record.exercises if one.name == "first_above")
    return found.points, [int(number) for number in re.findall(r"expected (\d+)", found.text)]


@pytest.mark.parametrize("next_one", ["ann", "cyd"], ids=["the same student", "a friend who comes later"])
def test_numbers_of_a_report_earn_nothing_the_next_time(place, here, next_one):
    known: list[int] = []
    for student in ("ann", next_one, next_one):
        place.hand_in(student, notebook("A", {"first_above": GUESS.format(known=known)}))
        points, expected = told(grade(Course(place.course), "A", executor=here).records[student])
        assert points == 0 and expected
        known += expected
    assert grade(Course(place.course), "A", executor=here).judged == 0


def test_no_students_name_is_the_name_of_a_file_of_the_graders(place, here):
    for student in ("run", "secret", "lock", "ann.json", "ann.done", "gradebook.db"):
        place.hand_in(student, notebook("A"))
    first = grade(Course(place.course), "A", executor=here)
    assert first.failed == {} and first.judged == len(first.records) == 8 + len(ATTACKERS)
    assert grade(Course(place.course), "A", executor=here).judged == 0


# ---------------------------------------------------------------------------------------------------- a noisy machine


def race_that_gives(monkeypatch: pytest.MonkeyPatch, verdicts: dict[str, list[str]]) -> list[str]:
    """Give the races of each student these verdicts, in turn; returns whose races were run, in order."""
    run: list[str] = []
    at_work: list[str] = []

    def race(self, exercise, answer, seed):
        student = at_work[-1]
        run.append(student)
        return RaceResult(verdicts[student].pop(0), "as it was", 0.75, 24, None, None, None, None, {}, {})  # type: ignore[arg-type]

    def noting(work):
        def noted(plan, taken, *rest):
            at_work.append(taken.student)
            return work(plan, taken, *rest)

        return noted

    monkeypatch.setattr(Engine, "race", race)
    monkeypatch.setattr(grader, "mark", noting(grader.mark))
    monkeypatch.setattr(grader, "again", noting(grader.again))
    return run


def waits(place: Place, student: str) -> tuple[float, bool]:
    with Gradebook(f"sqlite:///{place.course / 'grading' / 'gradebook.db'}") as book:
        found = book.find_submission("R", student)
        return found.score, found.needs_manual_grade


def test_a_noisy_machine_makes_a_race_run_again_alone_and_then_the_teachers_to_decide(
    place, here, monkeypatch
):
    verdicts = {"ann": ["inconclusive", "inconclusive"], "bob": ["inconclusive", "passed"], "cyd": ["failed"]}
    place.hand_in("cyd", notebook("R"), "R")
    run = race_that_gives(monkeypatch, verdicts)
    found = grade(Course(place.course), "R", executor=here)
    assert run[:3] == ["ann", "bob", "cyd"] and sorted(run[3:]) == ["ann", "bob"]  # after all the others
    ann, bob, cyd = (found.records[name].exercises[0] for name in ("ann", "bob", "cyd"))
    assert (ann.verdict, ann.needs_teacher, ann.points) == ("inconclusive", True, 3.0)
    assert (bob.verdict, bob.needs_teacher, bob.points) == ("right", False, 4.0)
    assert (cyd.verdict, cyd.needs_teacher, cyd.points) == ("right", False, 3.0)
    assert {name: waits(place, name) for name in found.records} == {
        "ann": (3.0, True),
        "bob": (4.0, False),
        "cyd": (3.0, False),
    }
    assert "for the teacher: project" in table(found) and "your teacher decides" in ann.reason
    assert grade(Course(place.course), "R", executor=here).judged == 0 and len(run) == 5


def test_a_grader_killed_before_the_second_try_makes_it_later(place, here, monkeypatch):
    verdicts = {"ann": ["inconclusive", "passed"], "bob": ["passed"]}
    run = race_that_gives(monkeypatch, verdicts)
    with monkeypatch.context() as killed:
        killed.setattr("llmcourse.grading.Run._judge_again", lambda *_: None)
        assert grade(Course(place.course), "R", executor=here).judged == 2
    found = grade(Course(place.course), "R", executor=here)
    assert (found.judged, run) == (0, ["ann", "bob", "ann"])
    assert {name: waits(place, name) for name in ("ann", "bob")} == {"ann": (4.0, False), "bob": (4.0, False)}


# ------------------------------------------------------------------------------------------------ a locked gradebook


def undisturbed(place: Place, here, tmp_path_factory) -> dict:
    """The gradebook of the same class in another folder, graded in peace."""
    other = replace(place, root=tmp_path_factory.mktemp("undisturbed"))
    subprocess.run(["cp", "-r", place.course, other.course], check=True)
    grade(Course(other.course), "A", executor=here)
    return dump(other.course / "grading" / "gradebook.db")


def test_a_gradebook_that_is_locked_for_a_moment_is_waited_for(place, here, tmp_path_factory):
    expected = undisturbed(place, here, tmp_path_factory)
    path = place.course / "grading" / "gradebook.db"
    with Book(f"sqlite:///{path}", ""):
        pass
    held = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    held.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(1.5, lambda: held.execute("ROLLBACK"))
    timer.start()
    found = grade(Course(place.course), "A", executor=here)
    timer.join()
    held.close()
    assert found.failed == {} and dump(path) == expected


def test_a_gradebook_that_stays_locked_is_one_line_and_leaves_nothing_half_written(
    place, here, monkeypatch, tmp_path_factory
):
    expected = undisturbed(place, here, tmp_path_factory)
    path = place.course / "grading" / "gradebook.db"
    monkeypatch.setitem(Book.__init__.__kwdefaults__, "wait_s", 0.2)
    write = Book.write
    with Book(f"sqlite:///{path}", ""):
        pass
    held = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    written: list[str] = []

    def locked_after_the_second(self, graded, rebuilt, **options):
        if len(written) == 2:
            held.execute("BEGIN IMMEDIATE")
        written.append(graded.student)
        return write(self, graded, rebuilt, **options)

    with monkeypatch.context() as locked:
        locked.setattr(Book, "write", locked_after_the_second)
        with pytest.raises(GradebookError) as error:
            grade(Course(place.course), "A", executor=here)
    message = str(error.value)
    assert "\n" not in message and "close formgrader or wait, and run this again" in message
    held.execute("ROLLBACK")
    held.close()
    assert not list(place.course.rglob("*.partial"))
    before = dump(path)["submitted_assignment"]
    assert len(before) == 2  # each whole
    grade(Course(place.course), "A", executor=here)
    assert dump(path) == expected


# -------------------------------------------------------------------------------------------------- a killed grader

GRADE = "import sys; from llmcourse.cli import main; sys.exit(main(sys.argv[1:]))"


def started(place: Place) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", GRADE, "grade", "A", "--workers", "2"],
        cwd=place.course,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def until(condition, limit_s: float) -> bool:
    ends = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_a_grader_killed_while_an_attack_runs_leaves_none_of_it_and_ends_in_the_same_gradebook(
    place, here, tmp_path_factory
):
    hostile = unit("renamed()\nif os.fork() == 0:\n    alive()\nalive()", top=ALIVE)
    place.hand_in("zoe", notebook("A", {name: hostile.replace("unit_rows", name) for name in ("unit_rows",)}))
    expected = undisturbed(place, here, tmp_path_factory)
    with started(place) as run:
        assert until(lambda: bool(hostile_processes()), 120)
        os.kill(run.pid, signal.SIGKILL)
    assert until(lambda: not hostile_processes(), 10)
    with started(place) as run:
        assert run.wait(timeout=240) == 0
    assert dump(place.course / "grading" / "gradebook.db") == expected
