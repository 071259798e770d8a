"""`nbgrader autograde` with the jailed judge writes what `llmcourse grade` writes, and executes nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from llmcourse import grader, grading, jail
from llmcourse.gradebook import dump
from tests import classroom
from tests.classroom import ASSIGNMENT, HOSTILE, RIGHT, WRONG, handed_in, submit
from tests.jailed import needs_jail

pytestmark = [
    needs_jail,
    pytest.mark.filterwarnings("ignore:Object of type"),  # SQLAlchemy's, of nbgrader's own code
]
STUDENTS = ("hostile", "linked", "right", "unwritten", "wrong")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course with a class that has handed in, as it is before grading."""
    root = tmp_path_factory.mktemp("given") / "course"
    root.mkdir()
    classroom.make_course(root)
    classroom.release(root)
    submit(root, "right", handed_in(root, RIGHT, spoken="In **bytes**."), "2026-03-01 12:00:00 UTC")
    submit(root, "wrong", handed_in(root, WRONG))
    submit(root, "unwritten", handed_in(root, {}))
    submit(root, "hostile", handed_in(root, WRONG, own=HOSTILE))
    submit(root, "linked", handed_in(root, RIGHT))
    return root


@pytest.fixture(scope="module")
def autograded(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The class graded by nbgrader's own command, and what the command said."""
    course = copied(given, tmp_path_factory.mktemp("graded") / "course")
    said = classroom.nbgrader(
        course / "grading", "autograde", ASSIGNMENT, LLMCOURSE_LESSONS=str(given / "lessons")
    )
    return course, said


@pytest.fixture
def course(autograded: tuple[Path, str]) -> Path:
    return autograded[0]


def copied(course: Path, to: Path) -> Path:
    shutil.copytree(course, to)
    path = to / "grading" / "submitted" / "linked" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    os.link(path, to / "another_name.ipynb")  # which llmcourse refuses, and nbgrader reads
    return to


@pytest.fixture(autouse=True)
def lessons(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(given / "lessons"))


def contents(course: Path) -> dict[str, str]:
    folder = course / "grading" / "autograded"
    return {path.parts[-3]: path.read_text() for path in sorted(folder.glob("*/*/*.ipynb"))}


@pytest.mark.slow
def test_nbgraders_own_command_gives_the_gradebook_and_the_notebooks_of_llmcourse_grade(
    given: Path, autograded: tuple[Path, str], tmp_path: Path
) -> None:
    graded, (course, _) = copied(given, tmp_path / "course"), autograded
    secret = graded / "grading" / ".llmcourse" / "secret"
    secret.parent.mkdir()
    secret.write_text(grading.Course(course).secret())  # so that both drew the same inputs
    classroom.llmcourse(graded, "grade", ASSIGNMENT, "--workers", "1")
    assert tuple(contents(graded)) == STUDENTS
    for student, text in contents(graded).items():
        assert contents(course)[student] == text, student
    assert dump(course / "grading" / "gradebook.db") == dump(graded / "grading" / "gradebook.db")


def test_what_nbgrader_says_is_readable(autograded: tuple[Path, str]) -> None:
    said = autograded[1]
    assert "right: 2 points on the judge's scale" in said
    assert "noise" not in said and "Traceback" not in said


def test_scores_reports_and_what_waits_for_the_teacher_are_there(course: Path) -> None:
    """Extensions get their report, and a hard link is refused and left to the teacher."""
    with Gradebook(f"sqlite:///{course}/grading/gradebook.db", "llmcourse") as book:
        found = {
            student: book.find_grade("check_add", ASSIGNMENT, ASSIGNMENT, student) for student in STUDENTS
        }
        assert {student: grade.auto_score for student, grade in found.items()} == {
            "right": 3,
            "wrong": 0,
            "unwritten": 0,
            "hostile": 0,
            "linked": 0,
        }
        assert [student for student in STUDENTS if found[student].needs_manual_grade] == ["linked"]
    places = [course / "grading" / "autograded" / student / ASSIGNMENT for student in STUDENTS]
    assert all((place / "submission_secret.txt").exists() for place in places)  # or no feedback is released
    assert all((place / "timestamp.txt").exists() for place in places)
    texts = contents(course)
    assert texts["right"].count("llmcourse-report") >= 2
    assert "hard link" in texts["linked"] and RIGHT["add"] not in texts["linked"]


def test_what_is_on_record_is_not_judged_again_by_either(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(*_: object) -> None:
        raise AssertionError("judged again")

    monkeypatch.setattr(grader, "mark", judged)
    with grading.opened(grading.Course(course), ASSIGNMENT) as run:
        assert run.one("right").exercises[0].points == 2


def test_whoever_comes_after_somebodys_feedback_gets_other_inputs(course: Path, tmp_path: Path) -> None:
    place = tmp_path / "course"
    shutil.copytree(course, place)

    def run_of(student: str) -> int:
        submit(place, student, handed_in(place, RIGHT))
        with grading.opened(grading.Course(place), ASSIGNMENT) as run:
            return run.one(student).run

    first = run_of("before")
    page = place / "grading" / "feedback" / "right" / ASSIGNMENT / f"{ASSIGNMENT}.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>2 of 2</p>")
    assert [run_of("after"), run_of("later"), run_of("before")] == [first + 1, first + 1, first]
    page.write_text("<p>2 of 2, once more</p>")
    assert run_of("last") == first + 2


def api_of(course: Path, **more: Any) -> NbGraderAPI:
    """As formgrader has it."""
    config = PyFileConfigLoader(str(course / "grading" / "nbgrader_config.py")).load_config()
    config.CourseDirectory.root = str(course)
    config.merge(Config(more))
    return NbGraderAPI(CourseDirectory(config=config), config=config)


def test_formgraders_button_judges_within_a_running_server(course: Path) -> None:
    submit(course, "late", handed_in(course, {"add": RIGHT["add"]}))

    async def clicked() -> dict[str, Any]:
        return api_of(course).autograde(ASSIGNMENT, "late")

    try:
        result = asyncio.run(clicked())
    finally:
        grader.close()
    assert result["success"], result
    with Gradebook(f"sqlite:///{course}/grading/gradebook.db", "llmcourse") as book:
        assert book.find_grade("check_add", ASSIGNMENT, ASSIGNMENT, "late").auto_score == 3


def test_without_a_jail_it_refuses_in_one_line_and_insecure_is_the_teachers_word(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(course, "nobody", handed_in(course, {}))
    monkeypatch.setattr(jail, "refusal", lambda: "there is no bubblewrap here")
    result = api_of(course).autograde(ASSIGNMENT, "nobody")
    assert not result["success"]
    assert (
        "expected a jail for what students wrote, found none (there is no bubblewrap here)" in result["log"]
    )
    assert not (course / "grading" / "autograded" / "nobody" / ASSIGNMENT).exists()

    seen = []
    monkeypatch.setattr(grader, "mark", lambda plan, taken: seen.append(plan.in_jail))
    api_of(course, JudgeInJail={"insecure": True}).autograde(ASSIGNMENT, "nobody")
    assert seen == [False]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"CourseDirectory": {"submitted_directory": "elsewhere"}}, "keep the folders as the course's"),
        ({"JudgeInJail": {"enabled": False}}, "put JudgeInJail before SaveVerdicts"),
    ],
    ids=["other-folders", "switched-off"],
)
def test_other_settings_are_refused_and_never_full_marks(
    course: Path, changed: dict[str, Any], told: str
) -> None:
    place = course / "elsewhere" / "odd" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(handed_in(course, {}))
    submit(course, "odd", handed_in(course, {}))
    result = api_of(course, **changed).autograde(ASSIGNMENT, "odd")
    assert not result["success"] and told in result["log"]
    with Gradebook(f"sqlite:///{course}/grading/gradebook.db", "llmcourse") as book:
        assert book.find_grade("check_add", ASSIGNMENT, ASSIGNMENT, "odd").auto_score is None


def test_what_nbgrader_cannot_parse_has_no_score(course: Path) -> None:
    """The difference to `llmcourse grade`, which gives 0 and says why."""
    submit(course, "broken", b'{"cells": [')
    assert not api_of(course).autograde(ASSIGNMENT, "broken")["success"]
    with Gradebook(f"sqlite:///{course}/grading/gradebook.db", "llmcourse") as book:
        assert book.find_grade("check_add", ASSIGNMENT, ASSIGNMENT, "broken").auto_score is None


def test_two_graders_of_one_course_do_not_meet(course: Path) -> None:
    submit(course, "busy", handed_in(course, {}))
    with grading.opened(grading.Course(course), ASSIGNMENT):
        result = api_of(course).autograde(ASSIGNMENT, "busy")
    assert not result["success"] and "is being graded by another process" in result["log"]


def test_a_check_that_nothing_can_judge_waits_for_the_teacher(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbgrader would give it full marks: it has no output."""
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path))
    submit(course, "unknown", handed_in(course, {}))
    result = api_of(course).autograde(ASSIGNMENT, "unknown")
    assert result["success"] and "no exercise is known here that check_add could judge" in result["log"]
    with Gradebook(f"sqlite:///{course}/grading/gradebook.db", "llmcourse") as book:
        grade = book.find_grade("check_add", ASSIGNMENT, ASSIGNMENT, "unknown")
        assert grade.auto_score is None and grade.needs_manual_grade
