"""Release, fetch, submit, collect, grade and feedback returned, through nbgrader's own exchange and commands."""

from __future__ import annotations

import html
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbgrader.api import Gradebook

from llmcourse import grader, intake, jail
from llmcourse.graded import Graded, GradedExercise
from llmcourse.grading import Course, grade
from tests import classroom
from tests.classroom import ASSIGNMENT, RIGHT, WRONG, handed_in, nbgrader, submit
from tests.jailed import needs_jail

GIVEN = {"anna": RIGHT, "ben": WRONG}


class Person:
    """Somebody with a home of their own, whose nbgrader knows the exchange."""

    def __init__(self, home: Path, exchange: Path) -> None:
        self.home = home
        settings = home / ".jupyter" / "nbgrader_config.py"
        settings.parent.mkdir(parents=True)
        settings.write_text(
            f"c = get_config()\nc.Exchange.root = {str(exchange)!r}\nc.CourseDirectory.course_id = 'llmcourse'\n"
        )

    def nbgrader(self, folder: Path, *arguments: str, expect: int = 0) -> str:
        variables = {"HOME": str(self.home), "USER": self.home.name, "LOGNAME": self.home.name}
        return nbgrader(folder, *arguments, expect=expect, **variables)


def fill_in(path: Path, answers: dict[str, str]) -> None:
    """What a student does in JupyterLab."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name in answers:
            cell.source = f"def {name}(x, y):\n    return {answers[name]}"
    nbformat.write(notebook, path)


@pytest.mark.slow
@needs_jail
def test_an_assignment_goes_out_comes_back_and_its_feedback_reaches_each_student(tmp_path: Path) -> None:
    exchange, root = tmp_path / "exchange", tmp_path / "course"
    exchange.mkdir(mode=0o777)
    exchange.chmod(0o777)
    root.mkdir()
    lessons = classroom.make_course(root)
    teacher = Person(tmp_path / "teacher", exchange)
    students = {name: Person(tmp_path / name, exchange) for name in GIVEN}
    desk = root / "grading"

    teacher.nbgrader(desk, "generate_assignment", ASSIGNMENT)
    teacher.nbgrader(desk, "release_assignment", ASSIGNMENT)
    for name, student in students.items():
        assert ASSIGNMENT in student.nbgrader(student.home, "list")
        student.nbgrader(student.home, "fetch_assignment", ASSIGNMENT)
        fill_in(student.home / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", GIVEN[name])
        # One account plays all of them, so each says who it is; on a hub the account does.
        student.nbgrader(student.home, "submit", ASSIGNMENT, f"--student={name}")
    teacher.nbgrader(desk, "collect", ASSIGNMENT)
    assert (desk / "submitted" / "anna" / ASSIGNMENT / "timestamp.txt").exists()

    said = classroom.llmcourse(root, "grade", ASSIGNMENT, "--workers", "1", LLMCOURSE_LESSONS=str(lessons))
    assert "anna" in said and "left out" not in said
    with Gradebook(f"sqlite:///{desk}/gradebook.db", "llmcourse") as book:
        scores = {one.student.id: one.score for one in book.assignment_submissions(ASSIGNMENT)}
        assert scores == {"anna": 3, "ben": 0}
        # As in formgrader: points for the spoken answer, and a word on it.
        book.find_grade("spoken", ASSIGNMENT, ASSIGNMENT, "ben").manual_score = 1.5
        book.find_comment("spoken", ASSIGNMENT, ASSIGNMENT, "ben").manual_comment = "Say it in bytes."
        book.db.commit()
    teacher.nbgrader(desk, "release_feedback", ASSIGNMENT)
    for name, student in students.items():
        assert page(student, name).count("llmcourse-report") >= 2
    assert "The sign is the other one." in page(students["ben"], "ben")
    assert "Say it in bytes." not in page(students["ben"], "ben")

    teacher.nbgrader(desk, "generate_feedback", ASSIGNMENT, "--force")
    teacher.nbgrader(desk, "release_feedback", ASSIGNMENT)
    assert "Say it in bytes." in page(students["ben"], "ben")
    assert "Say it in bytes." not in page(students["anna"], "anna")


def page(student: Person, name: str) -> str:
    """A student's feedback page, fetched anew."""
    student.nbgrader(student.home, "fetch_feedback", ASSIGNMENT, f"--student={name}")
    (found,) = (student.home / ASSIGNMENT / "feedback").glob("*/*.html")
    return html.unescape(found.read_text(encoding="utf-8"))


def judged(plan: Any, taken: intake.Taken) -> Graded:
    exercises = (GradedExercise("add", 2, 2, "right", ""),)
    key = grader.key_of(plan, taken)
    return Graded(
        taken.student, ASSIGNMENT, key, exercises, notes=taken.notes, submitted_at=taken.submitted_at
    )


def test_feedback_is_named_by_the_students_secret_and_by_one_of_ours_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbgrader's release_feedback stops for the whole class where the file is missing: anybody could delete theirs."""
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(classroom.make_course(tmp_path)))
    monkeypatch.setattr(grader, "mark", judged)
    monkeypatch.setattr(jail, "refusal", lambda: None)
    (tmp_path / "solutions").rename(tmp_path / "notebooks")
    places = {
        name: submit(tmp_path, name, handed_in(tmp_path, {}), "2026-03-01 12:00:00.5 UTC").parent
        for name in ("given", "linked", "none", "large")
    }
    (places["given"] / intake.SECRET).write_text("a" * 128)
    (places["large"] / intake.SECRET).write_text("a" * 1000)
    (tmp_path / "elsewhere").write_text("a teacher's own file")
    os.symlink(tmp_path / "elsewhere", places["linked"] / intake.SECRET)
    (places["none"] / "timestamp.txt").unlink()

    with ThreadPoolExecutor(1) as here:
        outcome = grade(Course(tmp_path), ASSIGNMENT, executor=here)
    assert outcome.records["given"].notes == ()
    assert (tmp_path / "solutions" / ASSIGNMENT).is_dir()  # or formgrader shows no such assignment
    for kind in ("feedback", "autograded"):
        folders = {name: tmp_path / "grading" / kind / name / ASSIGNMENT for name in places}
        found = {name: (folder / intake.SECRET).read_text() for name, folder in folders.items()}
        assert found["given"] == "a" * 128
        made_up = [found[name] for name in ("large", "linked", "none")]
        assert len(set(made_up)) == 3 and all(len(secret) == 64 for secret in made_up)
        assert (folders["given"] / "timestamp.txt").read_text() == "2026-03-01 12:00:00.500000 UTC"
        assert (folders["none"] / "timestamp.txt").read_text() == ""
