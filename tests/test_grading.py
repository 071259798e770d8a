"""A class from its folder to the gradebook: what is written, what is judged again, and what survives a kill."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook

from llmcourse import grader, grading, jail
from llmcourse.gradebook import dump
from llmcourse.grading import Course, GradingError, grade, table
from llmcourse.pools import ATTEMPTS, Pool
from llmcourse.zygote import HarnessFault
from tests.classes import ASSIGNMENT, RIGHT, STUB, WRONG, course, hand_in, notebook
from tests.jailed import needs_jail

pytestmark = needs_jail
CLASS = {"ann": RIGHT, "bob": WRONG, "cyd": STUB, "dan": RIGHT.replace("weight", "w")}


class Here(ThreadPoolExecutor):
    """Judges in this process: one zygote for the whole module, and nothing to start."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)


@pytest.fixture(scope="module")
def here():
    with Here() as executor:
        yield executor
        executor.submit(grader.close).result()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path / "lessons"))
    return course(tmp_path, CLASS)


def scores(root: Path) -> dict[str, float]:
    with Gradebook(f"sqlite:///{root / 'grading' / 'gradebook.db'}") as book:
        return {one.student.id: one.score for one in book.find_assignment(ASSIGNMENT).submissions}


def page(root: Path, student: str) -> str:
    return (root / "grading" / "feedback" / student / ASSIGNMENT / f"{ASSIGNMENT}.html").read_text()


# --------------------------------------------------------------------------------------------------- what is written


def test_a_class_is_graded_into_nbgraders_gradebook_notebooks_and_pages(root, here):
    found = grade(Course(root), ASSIGNMENT, executor=here)
    assert found.judged == 4 and not found.failed and found.level == "in a jail (bubblewrap)"
    assert scores(root) == {"ann": 4.0, "bob": 0.0, "cyd": 0.0, "dan": 4.0}
    assert "One scale serves every row." in page(root, "bob") and "seed" not in page(root, "bob")
    made = nbformat.read(
        root / "grading" / "autograded" / "ann" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", as_version=4
    )
    assert made.cells[-1].outputs[0].data["text/plain"] == "4.0"


def test_the_table_has_a_row_a_student_and_flags_what_is_the_same_program(root, here):
    hand_in(root, "eve", notebook("def scale_rows(weight):\n    'mine'\n    return weight.abs().amax(dim=1)"))
    rows = list(csv.DictReader(table(grade(Course(root), ASSIGNMENT, executor=here)).splitlines()))
    assert list(rows[0]) == ["student", "points", "max_points", "scale_rows", "same_as", "outcome"]
    told = {row["student"]: (row["points"], row["max_points"], row["same_as"]) for row in rows}
    assert told == {
        "ann": ("4", "4", "scale_rows: student dan"),
        "bob": ("0", "4", ""),
        "cyd": ("0", "4", ""),
        "dan": ("4", "4", "scale_rows: student ann"),
        "eve": ("4", "4", "scale_rows: reference"),
    }


def test_a_file_that_cannot_be_read_is_that_students_outcome_alone(root, here):
    hand_in(root, "bob", b'{"cells": [')
    found = grade(Course(root), ASSIGNMENT, executor=here)
    assert scores(root) == {"ann": 4.0, "bob": 0.0, "cyd": 0.0, "dan": 4.0}
    assert "expected a notebook in JSON" in str(found.records["bob"].refused)
    assert "expected a notebook in JSON" in page(root, "bob")
    with Gradebook(f"sqlite:///{root / 'grading' / 'gradebook.db'}") as book:
        waits = {
            one.student.id: one.needs_manual_grade for one in book.find_assignment(ASSIGNMENT).submissions
        }
    assert waits == {"ann": False, "bob": True, "cyd": False, "dan": False}


def test_what_an_exception_carries_out_of_the_inputs_is_not_in_the_feedback(root, here):
    leaks = "def scale_rows(weight):\n    raise ValueError('inputs ' + str(weight.tolist()))"
    hand_in(root, "bob", notebook(leaks))
    record = grade(Course(root), ASSIGNMENT, students=["bob"], executor=here).records["bob"]
    for told in (page(root, "bob"), json.dumps(record.to_json())):
        assert "raised ValueError" in told and "inputs [[" not in told


# ----------------------------------------------------------------------------------------------- what is judged again


def test_what_was_judged_is_not_judged_again_and_what_is_new_is(root, here):
    assert grade(Course(root), ASSIGNMENT, executor=here).judged == 4
    before = dump(root / "grading" / "gradebook.db")
    assert grade(Course(root), ASSIGNMENT, executor=here).judged == 0
    assert dump(root / "grading" / "gradebook.db") == before
    hand_in(root, "bob", notebook(RIGHT))
    found = grade(Course(root), ASSIGNMENT, executor=here)
    assert (found.judged, scores(root)["bob"]) == (1, 4.0)


@pytest.mark.parametrize("lost", ["gradebook.db", "autograded", "feedback"])
def test_what_was_lost_is_written_again_without_judging(root, here, lost):
    grade(Course(root), ASSIGNMENT, executor=here)
    subprocess.run(["rm", "-r", root / "grading" / lost], check=True)
    assert grade(Course(root), ASSIGNMENT, executor=here).judged == 0
    assert scores(root)["ann"] == 4.0 and "scale_rows" in page(root, "ann")
    assert (root / "grading" / "autograded" / "ann").exists()


def test_a_rerun_has_other_inputs_and_one_that_was_stopped_goes_on(root, here, monkeypatch):
    first = grade(Course(root), ASSIGNMENT, executor=here)
    rerun = grade(Course(root), ASSIGNMENT, rerun=True, students=["ann"], executor=here)
    assert rerun.judged == 1 and rerun.records["ann"].key != first.records["ann"].key
    assert (rerun.records["ann"].run, scores(root)["ann"]) == (1, 4.0)
    monkeypatch.setattr(
        grading.Run, "_judge", lambda self, pool, names: []
    )  # killed before anything came back
    grade(Course(root), ASSIGNMENT, rerun=True, executor=here)
    monkeypatch.undo()
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(root.parent / "lessons"))
    found = grade(Course(root), ASSIGNMENT, executor=here)
    assert found.judged == 4 and {record.run for record in found.records.values()} == {2}


def test_a_teachers_own_score_and_comment_stay(root, here):
    grade(Course(root), ASSIGNMENT, executor=here)
    with Gradebook(f"sqlite:///{root / 'grading' / 'gradebook.db'}") as book:
        book.find_grade("check_scale_rows", ASSIGNMENT, ASSIGNMENT, "bob").manual_score = 1.5
        book.find_comment("scale_rows", ASSIGNMENT, ASSIGNMENT, "bob").manual_comment = "Nearly."
        book.db.commit()
    hand_in(root, "bob", notebook(WRONG, "own = 1"))
    assert grade(Course(root), ASSIGNMENT, executor=here).judged == 1
    assert scores(root)["bob"] == 1.5 and "Nearly." in page(root, "bob")


def test_races_that_stay_inconclusive_are_left_to_the_teacher(root, here, monkeypatch):
    tries = []

    def noisy(plan, taken):
        graded = mark(plan, taken)
        if taken.student == "ann":
            one = replace(graded.exercises[0], verdict="inconclusive", points=1.5)
            graded = replace(graded, exercises=(one,))
        return graded

    def noisy_again(plan, taken, graded):
        tries.append(taken.student)
        return replace(graded, exercises=(replace(graded.exercises[0], needs_teacher=True),))

    mark = grader.mark
    monkeypatch.setattr(grader, "mark", noisy)
    monkeypatch.setattr(grader, "again", noisy_again)
    found = grade(Course(root), ASSIGNMENT, executor=here)
    assert tries == ["ann"] and scores(root)["ann"] == 3.0
    with Gradebook(f"sqlite:///{root / 'grading' / 'gradebook.db'}") as book:
        assert book.find_submission(ASSIGNMENT, "ann").needs_manual_grade
    assert "for the teacher: scale_rows" in table(found)
    assert grade(Course(root), ASSIGNMENT, executor=here).judged == 0 and tries == ["ann"]


# ---------------------------------------------------------------------------------------------- what cannot be graded


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"assignment": "no_such_lesson"}, "expected an assignment, found 'no_such_lesson'"),
        ({"students": ["zoe"]}, "none of the name zoe"),
    ],
)
def test_a_wrong_name_is_one_line(root, here, change, words):
    arguments = {"assignment": ASSIGNMENT, **change}
    with pytest.raises(GradingError, match=words):
        grade(Course(root), arguments.pop("assignment"), executor=here, **arguments)
    assert not (root / "grading" / "gradebook.db").exists()


def test_no_jail_no_grades_unless_it_is_said(root, here, monkeypatch):
    monkeypatch.setattr(jail, "missing", lambda: "there is no bubblewrap here")
    with pytest.raises(GradingError, match="--insecure"):
        grade(Course(root), ASSIGNMENT, executor=here)
    grader.close()
    found = grade(Course(root), ASSIGNMENT, executor=here, insecure=True)
    grader.close()
    assert scores(root)["ann"] == 4.0 and found.level == "without a jail: there is no bubblewrap here"


def test_two_graders_of_one_course_do_not_write_at_once(root, here):
    (root / "grading" / ".llmcourse").mkdir(parents=True)
    with (root / "grading" / ".llmcourse" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(GradingError, match="graded by another process"):
            grade(Course(root), ASSIGNMENT, executor=here)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (HarnessFault("the reference is ill"), "the reference is ill"),
        (IndexError("list"), "a fault of llmcourse, please report it: IndexError: list"),
    ],
    ids=["foreseen", "not"],
)
def test_a_judge_that_fails_is_told_and_stops_nobody_else(root, here, monkeypatch, fault, told):
    mark = grader.mark

    def failing(plan, taken):
        if taken.student == "bob":
            raise fault
        return mark(plan, taken)

    monkeypatch.setattr(grader, "mark", failing)
    found = grade(Course(root), ASSIGNMENT, executor=here)
    assert found.failed == {"bob": told}
    assert scores(root) == {"ann": 4.0, "cyd": 0.0, "dan": 4.0}
    monkeypatch.undo()
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(root.parent / "lessons"))
    assert grade(Course(root), ASSIGNMENT, executor=here).judged == 1 and scores(root)["bob"] == 0.0


# ------------------------------------------------------------------------------------------------------- what is killed


class Breaks(Executor):
    """Does the work at once, but for the first so many times that it breaks."""

    def __init__(self, times: list[int]) -> None:
        self.times = times

    def submit(self, work, *arguments):
        future: Future = Future()
        if self.times[0]:
            self.times[0] -= 1
            future.set_exception(BrokenProcessPool("a process ended"))
        else:
            future.set_result(work(*arguments))
        return future


def test_work_is_handed_out_again_when_a_process_ends_and_not_for_ever():
    left = [ATTEMPTS - 1]
    assert Pool(1, lambda: Breaks(left)).submit(max, 2, 3).result() == 3
    left = [ATTEMPTS]
    with pytest.raises(BrokenProcessPool):
        Pool(1, lambda: Breaks(left)).submit(max, 2, 3).result()


GRADE = "import sys; from llmcourse.cli import main; main(sys.argv[1:])"


@pytest.mark.slow
def test_a_grader_killed_at_any_moment_ends_in_the_same_gradebook(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path / "a" / "lessons"))
    answers = {f"s{number:02}": (RIGHT, WRONG, STUB)[number % 3] for number in range(24)}
    quiet, killed = course(tmp_path / "a", answers), course(tmp_path / "b", answers)
    command = [sys.executable, "-c", GRADE, "grade", ASSIGNMENT, "--workers", "2"]
    whole = time.monotonic()
    assert subprocess.run(command, cwd=quiet, capture_output=True).returncode == 0
    whole = time.monotonic() - whole
    draw = random.Random(seed)
    for _ in range(5):
        with subprocess.Popen(
            command, cwd=killed, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            time.sleep(draw.uniform(0.2, 0.8) * whole)
            os.kill(run.pid, signal.SIGKILL)
    assert subprocess.run(command, cwd=killed, capture_output=True).returncode == 0
    assert dump(killed / "grading" / "gradebook.db") == dump(quiet / "grading" / "gradebook.db")
    pages = list((killed / "grading" / "feedback").rglob("*.html"))
    assert len(pages) == 24 and not list(killed.rglob("*.partial"))
