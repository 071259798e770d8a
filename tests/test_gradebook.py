"""What is written is what nbgrader would have written, whole or not at all, and a teacher's own work stays."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.dbutil import ALEMBIC_DIR
from nbgrader.plugins import BasePlugin
from nbgrader.preprocessors import AssignLatePenalties, SaveAutoGrades, SaveCells
from traitlets.config import Config

from llmcourse import gradebook
from llmcourse.gradebook import Book, GradebookError, dump
from llmcourse.graded import Graded
from llmcourse.rebuilding import rebuild
from tests.graded_samples import ASSIGNMENT, NOTEBOOK, cell, exercise, graded, teacher


class TwiceTheScore(BasePlugin):
    """A teacher's own rule, which asks for more than there is."""

    def late_submission_penalty(self, student_id: str, score: float, seconds_late: float) -> float:
        assert (student_id, seconds_late) == ("anna", 3600)
        return 2 * score


LATE = {
    "no-penalty": Config(),
    "zero": Config({"LateSubmissionPlugin": {"penalty_method": "zero"}}),
    "own": Config({"AssignLatePenalties": {"plugin_class": TwiceTheScore}}),
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A new gradebook: made once, for all tests."""
    path = tmp_path_factory.mktemp("book") / "gradebook.db"
    with Book(f"sqlite:///{path}", "course"):
        pass
    return path.read_bytes()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, fresh: bytes) -> bytes:
    """A gradebook in which the notebook is registered and nothing else."""
    path = tmp_path_factory.mktemp("book") / "gradebook.db"
    path.write_bytes(fresh)
    with opened(path):
        pass
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, empty: bytes) -> Path:
    found = tmp_path / "gradebook.db"
    found.write_bytes(empty)
    return found


@pytest.fixture
def book(path: Path) -> Iterator[Book]:
    with opened(path) as found:
        yield found


def opened(path: Path, **options: Any) -> Book:
    return Registered(f"sqlite:///{path}", "course", **{"wait_s": 0.2} | options)


class Registered(Book):
    """A book that knows the sample notebook as soon as it is open."""

    def __enter__(self) -> Book:
        super().__enter__()
        self.register(ASSIGNMENT, NOTEBOOK, teacher())
        return self


def write(book: Book, record: Graded) -> gradebook.Standing:
    return book.write(record, rebuild(teacher(), record))


def every_row(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(statement).rowcount != 0


def grades(path: Path) -> dict[str, tuple[Any, ...]]:
    """(auto score, manual score, extra credit, needs a person) of each graded cell."""
    return {row[1].split("/")[-2]: row[2:] for row in dump(path)["grade"]}


def comments(path: Path) -> dict[str, tuple[Any, ...]]:
    """(automatic, manual) of each answer cell."""
    return {row[1].split("/")[-2]: row[2:] for row in dump(path)["comment"]}


# --------------------------------------------------------------------------------------- the same as nbgrader's own


def stock(path: Path, record: Graded, rebuilt: NotebookNode, config: Config) -> None:
    """What `nbgrader autograde` does with the gradebook, by its own code, of a notebook with these outputs."""
    url = f"sqlite:///{path}"
    with Gradebook(url, "course") as book:
        book.update_or_create_student(record.student)
        book.update_or_create_submission(ASSIGNMENT, record.student, timestamp=record.submitted_at)
    place = {"notebook": NOTEBOOK, "assignment": ASSIGNMENT, "student": record.student, "db_url": url}
    for preprocessor in (SaveAutoGrades(config=config), AssignLatePenalties(config=config)):
        preprocessor.preprocess(rebuilt, {"nbgrader": place})


@pytest.mark.filterwarnings("ignore:Object of type")  # nbgrader's own, from SQLAlchemy
@pytest.mark.parametrize("late", LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("answers", [graded().answers, {}], ids=["answered", "untouched"])
def test_the_gradebook_is_what_nbgraders_own_steps_make_of_the_same_notebook(
    path: Path, tmp_path: Path, late: Config, answers: dict[str, str]
) -> None:
    with Gradebook(f"sqlite:///{path}", "course") as book:
        book.update_or_create_assignment(ASSIGNMENT, duedate="2026-03-01 11:00:00 UTC")
    theirs = tmp_path / "theirs.db"
    theirs.write_bytes(path.read_bytes())
    for points in (2, 3):
        record = graded(points=points, answers=answers)
        rebuilt = rebuild(teacher(), record)
        with opened(path, config=late) as ours:
            standing = ours.write(record, rebuilt)
        stock(theirs, record, rebuilt, late)
        assert dump(path) == dump(theirs)
    assert standing.late_penalty == (6 if late else 0)
    assert standing.total + standing.late_penalty == 6, "3 of 4 and 3 of 3; the essay waits for a person"


def test_registering_is_what_nbgraders_own_step_makes_of_the_released_notebook(
    path: Path, tmp_path: Path, fresh: bytes
) -> None:
    theirs = tmp_path / "theirs.db"
    theirs.write_bytes(fresh)
    with Gradebook(f"sqlite:///{theirs}", "course") as book:
        book.update_or_create_assignment(ASSIGNMENT)
    place = {"notebook": NOTEBOOK, "assignment": ASSIGNMENT, "db_url": f"sqlite:///{theirs}"}
    SaveCells().preprocess(teacher(), {"nbgrader": place})
    assert dump(path) == dump(theirs)


def test_what_stands_is_what_nbgrader_reads_back(path: Path, book: Book) -> None:
    standing = write(book, graded())
    assert standing.scores == {
        "check_scale": (2, 4),
        "check_pack": (3, 3),
        "essay": (0, 2),
        "program": (0, 1),
        "task": (0, 1),
    }
    assert standing.comments == {
        "scale": None,
        "pack": None,
        "essay": None,
        "program": "No response.",
        "task": None,
        "extra": "No response.",
    }
    assert (standing.total, standing.max_total, standing.late_penalty) == (5, 11, 0)
    with Gradebook(f"sqlite:///{path}", "course") as theirs:
        submission = theirs.find_submission(ASSIGNMENT, "anna")
        assert (submission.score, submission.max_score) == (5, 11)
        assert submission.timestamp.isoformat() == "2026-03-01T12:00:00"


# ------------------------------------------------------------------------------------------------ a teacher's work


def test_a_teachers_scores_credit_and_comments_stay_and_count(path: Path, book: Book) -> None:
    write(book, graded())
    scale = "cell_id = (SELECT id FROM base_cell WHERE name = 'check_scale')"
    change(path, f"UPDATE grade SET manual_score = 3.5, extra_credit = 0.25 WHERE {scale}")
    answer = "cell_id = (SELECT id FROM base_cell WHERE name = 'scale')"
    change(path, f"UPDATE comment SET manual_comment = 'Nearly.' WHERE {answer}")
    standing = write(book, graded(points=1))
    assert grades(path)["check_scale"] == (1, 3.5, 0.25, 1)
    assert comments(path)["scale"] == (None, "Nearly.")
    assert standing.scores["check_scale"] == (3.75, 4)
    assert standing.comments["scale"] == "Nearly."


def test_writing_the_same_again_changes_nothing(path: Path, book: Book) -> None:
    write(book, graded())
    before = every_row(path)
    write(book, graded())
    assert every_row(path) == before


def test_a_record_without_a_time_leaves_the_time_alone(path: Path, book: Book) -> None:
    write(book, graded())
    before = dump(path)["submitted_assignment"]
    write(book, graded(submitted_at=""))
    assert dump(path)["submitted_assignment"] == before


def test_what_only_a_person_can_decide_waits_for_one(path: Path, book: Book) -> None:
    unsure = (
        exercise("scale", 2, needs_teacher=True),
        exercise("pack"),
        exercise("extra", needs_teacher=True),
    )
    write(book, graded(exercises=unsure))
    assert {name: row[3] for name, row in grades(path).items()} == {
        "check_scale": 1,
        "check_pack": 0,
        "essay": 1,
        "program": 0,
        "task": 1,
    }
    assert grades(path)["check_scale"][0] == 2


def test_an_exercise_that_was_not_judged_has_no_score_where_nbgrader_would_give_full_marks(
    path: Path, book: Book
) -> None:
    standing = write(book, graded(exercises=(exercise("pack"),)))
    assert grades(path)["check_scale"] == (None, None, None, 1)
    assert standing.scores["check_scale"] == (0, 4)


def test_a_refused_submission_scores_nothing_and_waits_everywhere(path: Path, book: Book) -> None:
    standing = write(book, graded(exercises=(), answers={}, helpers=(), refused="not a notebook"))
    assert standing.total == 0
    assert {row[3] for row in grades(path).values()} == {1}
    write(book, graded(answers={**graded().answers, "program": "x = 1"}))
    assert grades(path)["check_scale"] == (2, None, None, 0), "a good submission lifts it"


# ------------------------------------------------------------------------------------------------------- registering


def test_registering_again_changes_nothing(path: Path, book: Book) -> None:
    before = every_row(path)
    book.register(ASSIGNMENT, NOTEBOOK, teacher())
    assert every_row(path) == before


def another_version() -> NotebookNode:
    changed = teacher()
    changed.cells[4] = cell("check(unpack)", "check_unpack", grade=True, locked=True, points=3)
    return changed


def test_a_new_version_replaces_one_without_submissions(path: Path, book: Book) -> None:
    book.register(ASSIGNMENT, NOTEBOOK, another_version())
    names = {row[1] for row in dump(path)["base_cell"]}
    assert "check_unpack" in names and "check_pack" not in names


def test_a_new_version_is_refused_where_submissions_of_the_old_one_are(path: Path, book: Book) -> None:
    write(book, graded())
    before = every_row(path)
    with pytest.raises(GradebookError) as told:
        book.register(ASSIGNMENT, NOTEBOOK, another_version())
    message = str(told.value)
    assert "1 submissions of another version" in message and "\n" not in message
    assert "(it lacks check_unpack; the notebook lacks check_pack)" in message
    assert "grade with the version you released" in message
    assert every_row(path) == before


def test_changed_points_are_taken_over_also_after_submissions(path: Path, book: Book) -> None:
    write(book, graded())
    changed = teacher()
    changed.cells[2].metadata.nbgrader.points = 8
    book.register(ASSIGNMENT, NOTEBOOK, changed)
    record = graded()
    assert book.write(record, rebuild(changed, record)).scores["check_scale"] == (4, 8)


def test_a_notebook_that_was_half_registered_is_registered_again(path: Path, book: Book) -> None:
    whole = dump(path)
    change(path, "DELETE FROM grade_cells")
    change(path, "DELETE FROM base_cell WHERE type = 'GradeCell'")
    change(path, "DELETE FROM source_cell")
    book.register(ASSIGNMENT, NOTEBOOK, teacher())
    assert dump(path)["grade_cells"] == whole["grade_cells"]
    assert dump(path)["source_cell"] == whole["source_cell"]


def test_writing_to_what_was_never_registered_says_so(path: Path, book: Book) -> None:
    record = graded(assignment="03_other")
    with pytest.raises(ValueError, match="03_other: expected one registered notebook, found"):
        write(book, record)
    with pytest.raises(GradebookError, match="found no such notebook; register it again"):
        book.write(record, rebuild(teacher(), record), notebook="other")


# ---------------------------------------------------------------------------------------------------------- the file


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(GradebookError) as told, opened(path, **options):
        pass
    message = str(told.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_a_gradebook_that_another_program_holds_is_told_after_the_wait(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "another program has held it for 0.2 s; close formgrader" in refusal(path)
        other.execute("ROLLBACK")
        with opened(path) as book:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(GradebookError, match="another program has held it"):
                write(book, graded())
            other.execute("ROLLBACK")
            write(book, graded())
    assert len(dump(path)["submitted_assignment"]) == 1


def test_a_gradebook_of_another_version_is_not_touched(path: Path) -> None:
    change(path, "ALTER TABLE student DROP COLUMN lms_user_id")
    before = path.read_bytes()
    assert "one without student.lms_user_id; keep a copy of it and run `nbgrader db upgrade`" in refusal(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_gradebook_is_told(path: Path) -> None:
    path.write_text("grades " * 100, encoding="utf-8")
    assert "not a database; restore it from a copy" in refusal(path)


def test_a_folder_that_is_missing_or_in_the_way_is_told(tmp_path: Path) -> None:
    assert "expected a folder" in refusal(tmp_path / "missing" / "gradebook.db")
    (tmp_path / "gradebook.db").mkdir()
    assert "check the permissions" in refusal(tmp_path / "gradebook.db")


def test_a_gradebook_that_cannot_be_written_is_told(path: Path) -> None:
    # Permissions do not bind root, so the file is opened read-only instead.
    with (
        pytest.raises(GradebookError, match="readonly database; check the permissions"),
        Book(f"sqlite:///file:{path}?mode=ro&uri=true", "course") as book,
    ):
        book.register(ASSIGNMENT, NOTEBOOK, teacher())
        write(book, graded())


def test_a_new_gradebook_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # The last thing that is done to a new one.
    monkeypatch.setattr(Gradebook, "check_course", killed)
    with pytest.raises(KeyboardInterrupt), Book(f"sqlite:///{tmp_path}/gradebook.db", "course"):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_new_gradebook_is_the_one_that_nbgrader_makes(
    fresh: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    ours.write_bytes(fresh)
    # Asking alembic takes nbgrader seconds; the head is the one revision that no other follows.
    texts = [each.read_text(encoding="utf-8") for each in (Path(ALEMBIC_DIR) / "versions").glob("*.py")]
    made, followed = (
        {found for text in texts for found in re.findall(rf"^{name} = '(\w+)'", text, re.MULTILINE)}
        for name in ("revision", "down_revision")
    )
    (head,) = made - followed
    monkeypatch.setattr("nbgrader.api.get_alembic_version", lambda: head)
    with Gradebook(f"sqlite:///{theirs}", "course"):
        pass
    assert dump(ours) == dump(theirs)
    assert dump(ours)["alembic_version"] == [(head,)]


def test_a_name_that_is_not_utf_8_is_told(book: Book) -> None:
    with pytest.raises(GradebookError, match="expected a name in UTF-8.*rename the folder"):
        write(book, graded("ann\udce9"))


# ---------------------------------------------------------------------------------------------------------- killed

STUDENTS = [f"student_{number}" for number in range(8)]


def write_round(path: Path, points: float) -> None:
    """A whole class, each late, so that a penalty follows from the points and is written last."""
    with opened(path, wait_s=30.0, config=LATE["zero"]) as book:
        for student in STUDENTS:
            write(book, graded(student, points))


def of_each_student(found: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[Any]]:
    """Every row that belongs to a student's submission."""
    rows: dict[str, list[Any]] = {student: [] for student in STUDENTS}
    for table in ("student", "submitted_assignment", "submitted_notebook", "grade", "comment"):
        for row in found[table]:
            owner = next(student for student in STUDENTS if student in repr(row))
            rows[owner].append((table, *row))
    return rows


def test_a_killed_process_leaves_each_submission_as_it_was_or_as_it_is_to_be(
    path: Path, tmp_path: Path, seed: int
) -> None:
    with Gradebook(f"sqlite:///{path}", "course") as book:
        book.update_or_create_assignment(ASSIGNMENT, duedate="2026-03-01 11:00:00 UTC")
    calm = tmp_path / "calm.db"
    start = path.read_bytes()
    calm.write_bytes(start)
    states: list[dict[str, list[Any]]] = []
    started = time.monotonic()
    for points in (1, 3):
        write_round(calm, points)
        states.append(of_each_student(dump(calm)))
    both_s = time.monotonic() - started
    draw, killed = random.Random(seed), 0
    for attempt in range(10):
        if attempt % 2:
            path.write_bytes(start)
        child = os.fork()
        if child == 0:
            try:
                write_round(path, 1)
                write_round(path, 3)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, both_s))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        for student, rows in of_each_student(dump(path)).items():
            assert rows in ([], states[0][student], states[1][student]), student
    assert killed, "no child was killed while it wrote"
    write_round(path, 3)
    assert dump(path) == dump(calm)


def test_a_dump_has_names_for_ids_and_tells_gradebooks_apart(path: Path, book: Book) -> None:
    write(book, graded())
    found = dump(path)
    assert found["submitted_notebook"] == [
        (
            f"{ASSIGNMENT}/anna/{ASSIGNMENT}/{NOTEBOOK}",
            f"{ASSIGNMENT}/anna",
            f"{ASSIGNMENT}/{NOTEBOOK}",
            0,
            None,
        )
    ]
    assert (f"{ASSIGNMENT}/{NOTEBOOK}/check_scale/GradeCell", 4.0, "code") in found["grade_cells"]
    write(book, graded(points=3))
    assert dump(path) != found


def test_an_empty_file_becomes_a_gradebook_without_asking_another_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "gradebook.db"
    path.touch()
    for _ in range(2):  # made, then opened
        with Book(f"sqlite:///{path}", "") as book:
            book.register(ASSIGNMENT, NOTEBOOK, teacher())
    assert len(dump(path)["alembic_version"]) == 1 and dump(path)["notebook"]
