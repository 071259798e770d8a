"""nbgrader's gradebook: what a judged submission adds to it, each submission in one transaction.

It writes through nbgrader's own models what `nbgrader autograde` would have written, so formgrader, export and feedback
find what they know. A killed process leaves a submission as it was or as it is to be. One writer at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory
from nbformat import NotebookNode
from nbgrader import utils
from nbgrader.api import (
    Assignment,
    Base,
    BaseCell,
    Comment,
    Grade,
    Gradebook,
    GradeCell,
    InvalidEntry,
    Notebook,
    SolutionCell,
    SourceCell,
    Student,
    SubmittedAssignment,
    SubmittedNotebook,
    TaskCell,
    new_uuid,
)
from nbgrader.dbutil import ALEMBIC_DIR
from nbgrader.preprocessors import AssignLatePenalties, SaveCells
from sqlalchemy import event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from traitlets.config import Config

from llmcourse.graded import Graded
from llmcourse.rebuilding import CHECK

WAIT_S = 30.0
NO_RESPONSE = "No response."


class GradebookError(Exception):
    """A gradebook that cannot be used: one line that says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Standing:
    """What the gradebook holds of one submitted notebook, a teacher's own scores and comments included.

    scores: (score, highest score) by grade_id; comments by grade_id; total has the late penalty taken off.
    """

    notebook: str
    scores: dict[str, tuple[float, float]]
    comments: dict[str, str | None]
    total: float
    max_total: float
    late_penalty: float


class Book:
    """nbgrader's gradebook, open for many writes: `with Book(db_url, course_id) as book`.

    config: the teacher's nbgrader settings, for the late penalty (`AssignLatePenalties`, `LateSubmissionPlugin`);
    nbgrader's default takes nothing off. wait_s: how long another program may hold the file. GradebookError where
    the file cannot be used.
    """

    def __init__(
        self, db_url: str, course_id: str, *, config: Config | None = None, wait_s: float = WAIT_S
    ) -> None:
        self._url, self._course_id, self._wait_s = make_url(db_url), course_id, wait_s
        self._penalties = AssignLatePenalties(config=config)
        self._penalties.init_plugin()
        self._notebooks: dict[str, list[str]] = {}
        self._where = self._url.database or self._url.render_as_string()

    def __enter__(self) -> Book:
        if self._url.get_backend_name() == "sqlite":
            if "uri" not in self._url.query:
                _make_or_check(Path(self._where), self._course_id, self._wait_s)
            self._url = self._url.update_query_dict({"timeout": str(self._wait_s)})
        with _one_line(self._where, self._wait_s):
            self._gradebook = Gradebook(self._address, self._course_id)
        engine = self._gradebook.engine
        if engine.dialect.name == "sqlite":
            # The writer's lock is taken before anything is read, so that what a write follows from cannot change.
            event.listen(
                engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None)
            )
            event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            engine.dispose()
        return self

    def __exit__(self, *_: object) -> None:
        self._gradebook.close()

    @property
    def _address(self) -> str:
        return self._url.render_as_string(hide_password=False)

    def register(self, assignment: str, notebook_name: str, teacher: NotebookNode) -> None:
        """Make an assignment's notebook known, by nbgrader's own rules; does nothing where it is.

        GradebookError where submissions of a version with other cells are in the gradebook.
        """
        wanted = _cells_of(teacher)
        with self._transaction() as db:
            known, submissions = _known(db, assignment, notebook_name)
        if known is not None and submissions and {*known} != {*wanted}:
            sides = (("it lacks", {*wanted} - {*known}), ("the notebook lacks", {*known} - {*wanted}))
            differ = "; ".join(
                f"{words} {', '.join(sorted({name for _, name in cells}))}" for words, cells in sides if cells
            )
            raise GradebookError(
                f"{self._where}: expected the cells of {notebook_name}.ipynb, found {submissions} submissions of "
                f"another version ({differ}); grade with the version you released, or under another assignment name"
            )
        if known != wanted:
            self._save_cells(assignment, notebook_name, teacher)
        names = self._notebooks.setdefault(assignment, [])
        if notebook_name not in names:
            names.append(notebook_name)

    def _save_cells(self, assignment: str, notebook_name: str, teacher: NotebookNode) -> None:
        # Killed in between, it leaves a notebook with too few cells and no submissions, which the next run replaces.
        place = {"notebook": notebook_name, "assignment": assignment, "db_url": self._address}
        with _one_line(self._where, self._wait_s):
            self._gradebook.update_or_create_assignment(assignment)
            self._gradebook.db.remove()
            SaveCells().preprocess(teacher, {"nbgrader": place})

    def write(self, graded: Graded, rebuilt: NotebookNode, *, notebook: str = "") -> Standing:
        """Write one submission as `nbgrader autograde` would have, whole or not at all; returns what then stands.

        A teacher's scores, extra credit and comments stay. notebook: which one, where several were registered.
        A check without an output has no score and waits for the teacher: nbgrader would give it full marks.
        """
        names = [notebook] if notebook else self._notebooks.get(graded.assignment, [])
        if len(names) != 1:
            raise ValueError(f"{graded.assignment}: expected one registered notebook, found {names}; name it")
        with self._transaction() as db:
            student = _writable(graded.student)
            submission, submitted = self._submission(db, graded.assignment, names[0], student)
            if graded.submitted_at:
                submission.timestamp = utils.parse_utc(graded.submitted_at)
            self._save_scores(db, submitted, automatic_scores(rebuilt), waiting(graded, rebuilt))
            self._save_comments(db, submitted, automatic_comments(rebuilt))
            db.flush()
            submitted.late_submission_penalty = self._late_penalty(submission, submitted)
            db.flush()
            return _standing(db, names[0], submitted)

    def has(self, assignment: str, student: str) -> bool:
        """Whether the gradebook holds a submission of that student."""
        found = select(SubmittedAssignment.id).join(Assignment)
        with self._transaction() as db:
            mine = found.where(Assignment.name == assignment, SubmittedAssignment.student_id == student)
            return db.scalar(mine) is not None

    def _submission(
        self, db: Session, assignment: str, notebook: str, student: str
    ) -> tuple[SubmittedAssignment, SubmittedNotebook]:
        """A student's submission, made with an empty grade and comment for each cell where there is none yet."""
        ids = select(Notebook.id, Notebook.name, Notebook.assignment_id).join(Assignment)
        rows = db.execute(ids.where(Assignment.name == assignment)).all()
        mine = next((row for row in rows if row.name == notebook), None)
        if mine is None:
            raise GradebookError(
                f"{self._where}: expected {notebook} of {assignment}, found no such notebook; register it again"
            )
        if db.get(Student, student) is None:
            db.add(Student(id=student))
        found = select(SubmittedAssignment).filter_by(assignment_id=mine.assignment_id, student_id=student)
        submission = db.scalar(found)
        if submission is None:
            submission = SubmittedAssignment(
                id=new_uuid(), assignment_id=mine.assignment_id, student_id=student
            )
            db.add(submission)
        there = db.scalars(select(SubmittedNotebook).filter_by(assignment_id=submission.id)).all()
        by_id = {submitted.notebook_id: submitted for submitted in there}
        for row in rows:
            if row.id not in by_id:
                by_id[row.id] = _empty_notebook(db, row.id, submission.id)
        return submission, by_id[mine.id]

    def _save_scores(
        self, db: Session, submitted: SubmittedNotebook, scores: dict[str, float | None], waits: set[str]
    ) -> None:
        grades = _by_name(db, Grade, submitted, GradeCell)
        self._require(scores, grades)
        for name, score in scores.items():
            grade = grades[name]
            grade.auto_score = score
            grade.needs_manual_grade = grade.manual_score is not None or score is None or name in waits

    def _save_comments(
        self, db: Session, submitted: SubmittedNotebook, comments: dict[str, str | None]
    ) -> None:
        rows = _by_name(db, Comment, submitted, SolutionCell) | _by_name(db, Comment, submitted, TaskCell)
        self._require(comments, rows)
        for name, comment in comments.items():
            rows[name].auto_comment = comment

    def _require(self, names: Iterable[str], rows: dict[str, Any]) -> None:
        missing = [name for name in names if name not in rows]
        if missing:
            raise GradebookError(
                f"{self._where}: expected a row for {', '.join(missing)}, found none; "
                "the assignment has changed since it was registered: start again"
            )

    def _late_penalty(self, submission: SubmittedAssignment, submitted: SubmittedNotebook) -> float | None:
        late_s = submission.total_seconds_late
        if late_s <= 0:
            return None
        plugin = self._penalties.plugin_inst
        penalty = plugin.late_submission_penalty(submission.student_id, submitted.score, late_s)
        return None if penalty is None else self._penalties._check_late_penalty(submitted, penalty)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Session]:
        with _one_line(self._where, self._wait_s):
            db = self._gradebook.db()
            try:
                yield db
                db.commit()
            finally:
                self._gradebook.db.remove()  # rolls back what was not committed


# ------------------------------------------------------------------------------------------- what the judge decides


def automatic_scores(rebuilt: NotebookNode) -> dict[str, float | None]:
    """Score of each graded cell by nbgrader's rule; None where only a person can give one, also without an output."""
    scores: dict[str, float | None] = {}
    for cell in rebuilt.cells:
        if utils.is_grade(cell):
            unjudged = cell.cell_type == "code" and not cell.outputs and not utils.is_solution(cell)
            scores[cell.metadata.nbgrader.grade_id] = None if unjudged else utils.determine_grade(cell)[0]
    return scores


def automatic_comments(rebuilt: NotebookNode) -> dict[str, str | None]:
    """nbgrader's remark on each answer cell that is still as it was released; None takes an old one back."""
    comments: dict[str, str | None] = {}
    for cell in rebuilt.cells:
        if utils.is_task(cell):
            comments[cell.metadata.nbgrader.grade_id] = None
        elif utils.is_solution(cell):
            untouched = cell.metadata.nbgrader.get("checksum") == utils.compute_checksum(cell)
            comments[cell.metadata.nbgrader.grade_id] = NO_RESPONSE if untouched else None
    return comments


def waiting(graded: Graded, rebuilt: NotebookNode) -> set[str]:
    """Graded cells that a teacher has to look at whatever their score: every one of a refused submission."""
    if graded.refused:
        return {cell.metadata.nbgrader.grade_id for cell in rebuilt.cells if utils.is_grade(cell)}
    return {f"{CHECK}{exercise.name}" for exercise in graded.exercises if exercise.needs_teacher}


def _standing(db: Session, notebook: str, submitted: SubmittedNotebook) -> Standing:
    scores = select(BaseCell.name, Grade.score, Grade.max_score).join(BaseCell, Grade.cell_id == BaseCell.id)
    comments = select(BaseCell.name, Comment.comment).join(BaseCell, Comment.cell_id == BaseCell.id)
    penalty = submitted.late_submission_penalty or 0.0
    return Standing(
        notebook=notebook,
        scores={
            name: (score, highest)
            for name, score, highest in db.execute(scores.where(Grade.notebook_id == submitted.id))
        },
        comments=_pairs(db, comments.where(Comment.notebook_id == submitted.id)),
        total=submitted.score - penalty,
        max_total=submitted.max_score,
        late_penalty=penalty,
    )


# ------------------------------------------------------------------------------------------------- rows and cells


def _empty_notebook(db: Session, notebook_id: str, submission_id: str) -> SubmittedNotebook:
    submitted = SubmittedNotebook(id=new_uuid(), notebook_id=notebook_id, assignment_id=submission_id)
    db.add(submitted)
    rows: list[Any] = []
    for model, kinds in ((Grade, (GradeCell, TaskCell)), (Comment, (SolutionCell, TaskCell))):
        for kind in kinds:
            ids = db.scalars(select(kind.id).where(kind.notebook_id == notebook_id))
            rows += [model(id=new_uuid(), cell_id=cell_id, notebook_id=submitted.id) for cell_id in ids]
    db.add_all(rows)
    db.flush()
    return submitted


def _pairs(db: Session, query: Any) -> dict[Any, Any]:
    return {row[0]: row[1] for row in db.execute(query)}


def _by_name(db: Session, model: Any, submitted: SubmittedNotebook, kind: Any) -> dict[str, Any]:
    """Grades or comments of a submitted notebook that belong to cells of one kind, by the cell's name."""
    query = select(BaseCell.name, model).join(BaseCell, model.cell_id == BaseCell.id)
    query = query.where(model.notebook_id == submitted.id, BaseCell.type == kind.__name__)
    return _pairs(db, query)


def _cells_of(teacher: NotebookNode) -> dict[tuple[str, str], float | None]:
    """(kind, name) of every cell that nbgrader records of a notebook, with what it is worth."""
    cells: dict[tuple[str, str], float | None] = {}
    for cell in teacher.cells:
        graded, task, solution = utils.is_grade(cell), utils.is_task(cell), utils.is_solution(cell)
        if graded or task or solution or utils.is_locked(cell):
            grader = cell.metadata.nbgrader
            cells["source", grader.grade_id] = None
            if graded:
                cells["grade", grader.grade_id] = float(grader.points)
            if task:
                cells["task", grader.grade_id] = float(grader.points)
            if solution:
                cells["solution", grader.grade_id] = None
    return cells


def _known(
    db: Session, assignment: str, notebook: str
) -> tuple[dict[tuple[str, str], float | None] | None, int]:
    """The same of a notebook in the gradebook, None where it is not there; and how many submissions it has."""
    ids = select(Notebook.id).join(Assignment).where(Assignment.name == assignment, Notebook.name == notebook)
    notebook_id = db.scalar(ids)
    if notebook_id is None:
        return None, 0
    cells: dict[tuple[str, str], float | None] = {}
    for kind, model in (("grade", GradeCell), ("task", TaskCell)):
        worth = select(model.name, model.max_score).where(model.notebook_id == notebook_id)
        cells |= {(kind, name): points for name, points in db.execute(worth)}
    for kind, model in (("solution", SolutionCell), ("source", SourceCell)):
        names = db.scalars(select(model.name).where(model.notebook_id == notebook_id))
        cells |= {(kind, name): None for name in names}
    count = select(func.count(SubmittedNotebook.id)).where(SubmittedNotebook.notebook_id == notebook_id)
    return cells, db.scalar(count) or 0


def _writable(student: str) -> str:
    try:
        student.encode()
    except UnicodeEncodeError as error:
        raise GradebookError(
            f"student {student!r}: expected a name in UTF-8, found bytes that are not; rename the folder"
        ) from error
    return student


# ------------------------------------------------------------------------------------------------------- the file


def _make_or_check(path: Path, course_id: str, wait_s: float) -> None:
    """Make a gradebook where there is none, whole or not at all; GradebookError where one cannot be written."""
    if not path.parent.is_dir():
        raise GradebookError(f"{path}: expected a folder {path.parent}, found none; create it")
    with _one_line(str(path), wait_s):
        if not path.exists():
            _make(path, course_id)
        with contextlib.closing(sqlite3.connect(path, timeout=wait_s, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            lacking, is_empty = _lacking(connection), _is_empty(connection)
            connection.execute("CREATE TABLE llmcourse_may_write (x)")  # a lock alone is given to readers too
            connection.execute("ROLLBACK")
            if is_empty:  # a file that something else made and did not fill
                _say_version(connection)
    if lacking:
        raise GradebookError(
            f"{path}: expected the gradebook of this version of nbgrader, found one without {lacking}; "
            "keep a copy of it and run `nbgrader db upgrade`"
        )


def _make(path: Path, course_id: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            _say_version(connection)
        with Gradebook(f"sqlite:///{new}", course_id):
            pass
        with contextlib.suppress(FileExistsError):  # somebody else was quicker; theirs stays
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


def _say_version(connection: sqlite3.Connection) -> None:
    """Note nbgrader's version in a file without tables, or it asks a program called `alembic`: often not on PATH."""
    version = ScriptDirectory(ALEMBIC_DIR).get_current_head()
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL)")
    connection.execute("INSERT INTO alembic_version VALUES (?)", (version,))
    connection.execute("COMMIT")


def _is_empty(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None


def _lacking(connection: sqlite3.Connection) -> str:
    """The first column of nbgrader's tables that a gradebook does not have; empty for one without tables."""
    if _is_empty(connection):
        return ""
    for table in Base.metadata.sorted_tables:
        there = {row[1] for row in connection.execute(f'PRAGMA table_info("{table.name}")')}
        missing = [column.name for column in table.columns if column.name not in there]
        if missing:
            return f"{table.name}.{missing[0]}"
    return ""


@contextlib.contextmanager
def _one_line(where: str, wait_s: float) -> Iterator[None]:
    """Turn what the database says into what a teacher can do."""
    try:
        yield
    except (DBAPIError, sqlite3.Error, InvalidEntry) as error:
        said = str(getattr(error, "orig", None) or error).splitlines()[0]
        if "locked" in said:
            advice = (
                f"another program has held it for {wait_s:g} s; close formgrader or wait, and run this again"
            )
        elif "readonly" in said or "unable to open" in said:
            advice = "check the permissions of the file and its folder"
        elif "no such table" in said or "no such column" in said or "has no column" in said:
            advice = "it is another version's; keep a copy of it and run `nbgrader db upgrade`"
        elif "not a database" in said or "malformed" in said:
            advice = "restore it from a copy, or move it away and start a new one"
        else:
            advice = "nothing of this submission was written"
        raise GradebookError(f"{where}: expected a gradebook to write to, found: {said}; {advice}") from error


def dump(db_path: str | Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every table of a gradebook as sorted rows, comparable between gradebooks: names in place of made-up ids."""
    with contextlib.closing(sqlite3.connect(db_path)) as connection:
        connection.row_factory = sqlite3.Row
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: connection.execute(f'SELECT * FROM "{table}"').fetchall() for table in tables}
    names: dict[Any, str] = {}
    for table, parts in (
        ("assignment", ("name",)),
        ("notebook", ("assignment_id", "name")),
        ("base_cell", ("notebook_id", "name", "type")),
        ("submitted_assignment", ("assignment_id", "student_id")),
        ("submitted_notebook", ("assignment_id", "notebook_id")),
    ):
        for row in rows.get(table, []):
            names[row["id"]] = "/".join(str(names.get(row[part], row[part])) for part in parts)
    nameless = {"grade", "comment", "source_cell"}
    return {
        table: sorted(
            (
                tuple(
                    names.get(row[column], row[column])
                    for column in row.keys()  # noqa: SIM118 (a Row iterates over its values)
                    if not (column == "id" and table in nameless)
                )
                for row in found
            ),
            key=repr,
        )
        for table, found in sorted(rows.items())
    }
