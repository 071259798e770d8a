from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from llmcourse import interview_record, standing, workspace
from llmcourse.interview_record import Book, Part, Record

LESSON = "01_parameter_loading"
TRIED = datetime(2026, 11, 20, 18, 0, tzinfo=timezone.utc)  # noqa: UP017
EXERCISE = '''
from llmcourse.exercise import exercise

@exercise(points=3, minutes=5)
def {name}(values):
    """Return the sum; about 1 line."""
    ### BEGIN SOLUTION
    return sum(values)
    ### END SOLUTION
'''


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace of a clone with one lesson of two exercises; its clock stands three days after TRIED."""
    root = tmp_path / "clone"
    for folder in (f"notebooks/{LESSON}", "solutions", "work", "llmcourse/lessons/parameter_loading"):
        (root / folder).mkdir(parents=True)
    (root / "notebooks" / LESSON / f"{LESSON}.ipynb").write_text("{}")
    (root / "pyproject.toml").touch()
    for name in ("read_header", "map_tensor"):
        (root / "llmcourse" / "lessons" / "parameter_loading" / f"{name}.py").write_text(
            EXERCISE.format(name=name)
        )
    monkeypatch.setattr(workspace, "PACKAGE", root / "llmcourse")
    monkeypatch.setattr(interview_record, "now", lambda: TRIED + timedelta(days=3))
    for name in ("LLMCOURSE_WORKSPACE", "NBGRADER_EXECUTION", "LLMCOURSE_GRADING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root / "work")
    return root / "work"


def take_an_interview() -> None:
    """read_header solved in 4 minutes, the question rated 7 of 10; both come back within three days."""
    solved = Part("exercise", "read_header", LESSON, 5, 3, points=3, verdict="right", tries=2, solved_s=240)
    spoken = Part("spoken", "parameter_loading", LESSON, 5, 10, points=7, verdict="rated", answers=["bytes"])
    moment = TRIED.isoformat()

    def put(book: Book, work: Path) -> None:
        book.interviews["one"] = Record([LESSON], False, 20, "en", 1, moment, [solved, spoken], begun=moment)
        interview_record.schedule(book, solved, TRIED)
        interview_record.schedule(book, spoken, TRIED)

    interview_record.change(put)


def by_name() -> dict[str, standing.Standing]:
    return {one.name: one for one in standing.standings()[0]}


def test_checks_and_interviews_are_joined(work: Path) -> None:
    workspace.record("read_header", "right", 2.5, 3, lesson="parameter_loading")
    workspace.record("map_tensor", "wrong", 0, 3, lesson="parameter_loading")
    take_an_interview()
    found = by_name()
    assert (found["read_header"].best_points, found["read_header"].best_time_s) == (2.5, 240)
    assert found["read_header"].is_due and (found["read_header"].due or "").startswith("2026-11-21")
    assert (found["map_tensor"].best_time_s, found["map_tensor"].due) == (None, None)
    question = found["spoken/parameter_loading"]
    assert (question.kind, question.attempts, question.best_points, question.max_points) == (
        "spoken",
        1,
        7,
        10,
    )
    json.dumps([one.to_json() for one in found.values()])


def test_a_revisit_that_is_not_due_yet_is_named_and_not_due(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_an_interview()
    monkeypatch.setattr(interview_record, "now", lambda: TRIED + timedelta(hours=1))
    assert not by_name()["read_header"].is_due
    assert by_name()["read_header"].due is not None


def test_what_deleted_progress_has_lost_is_taken_from_the_interviews(work: Path) -> None:
    take_an_interview()
    found = by_name()["read_header"]
    assert (found.attempts, found.best_points, found.last_verdict, found.lesson) == (
        2,
        3,
        "right",
        "parameter_loading",
    )
    assert found.first_solved == TRIED.isoformat()


def test_each_damaged_file_is_a_line_and_costs_nothing_of_the_other(work: Path) -> None:
    take_an_interview()
    (work / "progress.json").write_text("{")
    found, notes = standing.standings()
    assert [one.name for one in found if one.kind == "exercise"] == ["read_header"]
    assert len(notes) == 1 and "progress.json is damaged" in notes[0]
    (work / "interviews.json").write_text("{")
    assert len(standing.standings()[1]) == 2


def test_the_dashboard_shows_every_exercise_and_the_questions_that_were_rated(work: Path) -> None:
    assert "question" not in standing.dashboard().alt_text  # type: ignore[union-attr]
    take_an_interview()
    figure: Any = standing.dashboard()
    assert figure.get_suptitle() == "1 of 2 exercises solved; 2 revisits are due"
    assert "read_header (solved, 2 tries, 4:00, revisit due)" in figure.alt_text
    assert "map_tensor (not tried)" in figure.alt_text
    assert "question (7 of 10, 1 try, revisit due)" in figure.alt_text


def test_built_outside_the_workspace_the_dashboard_shows_nobodys_progress(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_an_interview()
    monkeypatch.chdir(work.parent)
    assert "None of 2 exercises solved yet" in standing.dashboard().alt_text  # type: ignore[union-attr]
