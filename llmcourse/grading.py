"""Grades a class: what was handed in, through the judge, into nbgrader's gradebook.

    grading/submitted/STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb      what students handed in: data, and nothing else
    notebooks/ASSIGNMENT/ASSIGNMENT.ipynb                      the teacher's version, which says what counts
    grading/.llmcourse/                                        the course's secret, and the record of each verdict
    grading/gradebook.db, grading/autograded/, grading/feedback/     what is written, as nbgrader has it

Submissions go through a pool of judging processes and come back as records; this process alone writes. A record is
on disk before anything is made of it, and everything that is made of it can be made again: killed at any moment and
started again, a run ends in the same gradebook.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse import intake, jail, rebuilding, workspace
from llmcourse.exercise import derive_seed
from llmcourse.graded import Graded
from llmcourse.intake import Taken
from llmcourse.pools import Cluster, Pool, opened_pool
from llmcourse.submission import TeacherNotebook, UnreadableNotebook

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from llmcourse.gradebook import Book
    from llmcourse.grader import Plan

AHEAD = 2  # submissions waiting for each worker


class GradingError(Exception):
    """What keeps a class from being graded: one line that says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Course:
    """The folders of a course, in nbgrader's layout below `root`, and its nbgrader settings where there are some."""

    root: Path

    @property
    def grading(self) -> Path:
        return self.root / "grading"

    @property
    def submitted(self) -> Path:
        return self.grading / "submitted"

    @cached_property
    def config(self) -> Any:
        """traitlets' configuration: the course's nbgrader_config.py, or nothing."""
        from traitlets.config import Config
        from traitlets.config.loader import PyFileConfigLoader

        path = self.grading / "nbgrader_config.py"
        return PyFileConfigLoader(str(path)).load_config() if path.exists() else Config()

    @property
    def db_url(self) -> str:
        given = self.config.CourseDirectory.get("db_url")
        return str(given) if given else f"sqlite:///{(self.grading / 'gradebook.db').resolve()}"

    @property
    def course_id(self) -> str:
        return str(self.config.CourseDirectory.get("course_id") or "")

    def teacher_path(self, assignment: str) -> Path:
        """The teacher's version of an assignment: the course's own release, or else the lesson as it comes."""
        own = self.root / "notebooks" / assignment / f"{assignment}.ipynb"
        if own.exists():
            return own
        lessons = {path.stem: path for paths in workspace.lesson_sources().values() for path in paths}
        if assignment in lessons:
            return lessons[assignment]
        raise GradingError(
            f"expected an assignment, found {assignment!r}, of which there is no {own}; lessons: "
            + ", ".join(sorted(lessons))
        )

    def state(self, assignment: str) -> Path:
        return self.grading / ".llmcourse" / assignment

    def output(self, kind: str, student: str, assignment: str, suffix: str) -> Path:
        return self.grading / kind / student / assignment / f"{assignment}{suffix}"

    def secret(self) -> str:
        """The course's own secret, made once: nobody who does not have it knows the inputs of a run."""
        path = self.grading / ".llmcourse" / "secret"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                workspace.create(path, secrets.token_hex(32).encode())
            path.chmod(0o600)
        return path.read_text()


@dataclass
class Progress:
    """How far a run is: submissions judged, to be judged in all, and inconclusive races still to be run again."""

    done: int = 0
    total: int = 0
    again: int = 0


@dataclass
class Outcome:
    """What a run did: every student's record, how answers were kept apart, notes, and who could not be judged."""

    assignment: str
    level: str
    records: dict[str, Graded] = field(default_factory=dict)
    worth: dict[str, float] = field(default_factory=dict)
    judged: int = 0
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def points(self, record: Graded) -> dict[str, float]:
        """Points of a record by exercise, on the teacher's scale; extensions on their own."""
        return {
            one.name: rebuilding.scaled(one, self.worth.get(one.name, one.max_points))
            for one in record.exercises
        }

    def total(self, record: Graded) -> float:
        """Points of the exercises that count."""
        return round(sum(points for name, points in self.points(record).items() if name in self.worth), 6)

    @property
    def max_points(self) -> float:
        return sum(self.worth.values())

    def to_json(self) -> dict[str, Any]:
        def row(record: Graded) -> dict[str, Any]:
            exercises = [
                {key: value for key, value in vars(one).items() if key not in ("html", "text", "form")}
                for one in record.exercises
            ]
            told = {"points": self.total(record), "max_points": self.max_points, "notes": record.notes}
            return told | {"refused": record.refused, "exercises": exercises}

        return {
            "assignment": self.assignment,
            "judged": self.level,
            "students": {student: row(record) for student, record in sorted(self.records.items())},
            "failed": self.failed,
            "notes": self.notes,
            "seconds": dict(self.seconds),
        }


def grade(
    course: Course,
    assignment: str,
    *,
    students: Collection[str] = (),
    rerun: bool = False,
    workers: int | None = None,
    insecure: bool = False,
    executor: Executor | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Judge what is new of an assignment, and write it.

    students: only these. rerun: judge again what was judged, on fresh inputs. workers: judging processes, one a core
    unless given. insecure: judge without a jail where there is none. executor: judges instead of a pool of this
    machine; it has the interface of concurrent.futures. GradingError when nothing can be done.
    """
    refusal = executor.refusal if isinstance(executor, Cluster) else jail.refusal
    with opened(course, assignment, insecure=insecure, refusal=refusal, tell=tell) as run:
        with opened_pool(executor, workers) as pool:
            run.grade(pool, students, rerun)
        return run.outcome


@contextlib.contextmanager
def opened(
    course: Course,
    assignment: str,
    *,
    insecure: bool = False,
    refusal: Callable[[], str | None] = lambda: jail.refusal(),
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Run]:
    """A run over an assignment, alone in its course; GradingError where that cannot be.

    refusal: why there is no jail where answers are judged, None where there is one.
    """
    level = _level(insecure, refusal())
    teacher_path = course.teacher_path(assignment)
    try:
        teacher = TeacherNotebook.from_path(teacher_path)
    except UnreadableNotebook as error:
        raise GradingError(str(error)) from error
    with _only_one(course):
        yield Run(course, assignment, teacher_path, teacher, insecure=insecure, level=level, tell=tell)


def _level(insecure: bool, refused: str | None) -> str:
    if refused is None:
        from llmcourse.zygote import IN_JAIL

        return IN_JAIL
    if not insecure:
        raise GradingError(
            f"expected a jail for what students wrote, found none ({refused}); or run it as it is with --insecure, "
            "on a machine that holds nothing else"
        )
    return f"without a jail: {refused}"


@contextlib.contextmanager
def _only_one(course: Course) -> Iterator[None]:
    """Hold the course's lock: one process writes."""
    path = course.grading / ".llmcourse" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise GradingError(f"{path}: cannot be written ({error.strerror}); check its permissions") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise GradingError(
                f"{course.grading} is being graded by another process; wait for it, or end it"
            ) from error
        yield


class Run:
    """One run over an assignment's submissions: takes, hands out, keeps records, writes."""

    def __init__(
        self,
        course: Course,
        assignment: str,
        teacher_path: Path,
        teacher: TeacherNotebook,
        *,
        insecure: bool,
        level: str,
        tell: Callable[[Progress], None],
    ) -> None:
        import nbformat

        self.course, self.assignment, self.teacher = course, assignment, teacher
        content = teacher_path.read_bytes()
        self.notebook: NotebookNode = nbformat.reads(content.decode(), as_version=4)
        self._version = hashlib.sha256(content).hexdigest()
        self.outcome = Outcome(assignment, level, worth=worth_of(self.notebook))
        if unknown := [name for name in self.outcome.worth if name not in teacher.names]:
            self.outcome.notes.append(
                f"no exercise is known here that check_{', check_'.join(unknown)} could judge, so it waits for you; "
                "an exercise of your own lies in a folder that LLMCOURSE_LESSONS names"
            )
        self._insecure, self._tell, self._progress = insecure, tell, Progress()
        self._state = course.state(assignment)
        self._state.mkdir(parents=True, exist_ok=True)
        self._book: Book
        self._pages: dict[Future[tuple[str, float]], tuple[str, str]] = {}

    # ---------------------------------------------------------------------------------------------- the whole run

    def grade(self, pool: Pool, students: Collection[str], rerun: bool) -> None:
        from llmcourse.gradebook import Book

        listed = intake.students(self.course.submitted, self.assignment)
        self.outcome.notes += listed.notes
        unknown = sorted(set(students) - set(listed.names))
        if unknown:
            raise GradingError(
                f"expected students who handed in {self.assignment}, found none of the name {', '.join(unknown)} in "
                f"{self.course.submitted}"
            )
        names = [name for name in listed.names if not students or name in students]
        if not names:
            raise GradingError(
                f"expected submissions of {self.assignment} in {self.course.submitted}, found none; "
                f"collect them there: STUDENT/{self.assignment}/{self.assignment}.ipynb"
            )
        self._settle_run(names, rerun)
        self._remove_partial_files()
        with Book(self.course.db_url, self.course.course_id, config=self.course.config) as self._book:
            self._book.register(self.assignment, self.assignment, self.notebook)
            if source := self.course.config.CourseDirectory.get("source_directory"):
                # formgrader lists assignments by their folders there, also an assignment that has no source
                (self.course.root / str(source) / self.assignment).mkdir(parents=True, exist_ok=True)
            self._progress.total = len(names)
            inconclusive = self._judge(pool, names)
            self._judge_again(pool, inconclusive)
            self._write_pages(0)
        self._end_run(names)
        self._compare_with_classmates()

    def _remove_partial_files(self) -> None:
        """What a run that was killed was writing; its content is made again."""
        left = list(self._state.glob(".*.partial"))
        for kind in ("autograded", "feedback"):
            left += self.course.grading.glob(f"{kind}/*/{self.assignment}/.*.partial")
        for path in left:
            path.unlink(missing_ok=True)

    def _settle_run(self, names: Sequence[str], rerun: bool) -> None:
        """Number the run, and who is still to be judged in it: one that was killed goes on with what it began."""
        self._settled: dict[str, Any] = {"run": 0, "students": [], "ended": False}
        if self._run_path.exists():
            self._settled = json.loads(self._run_path.read_text())
        if rerun:
            self._begin_run(names)
        self._run = self._settled["run"]
        self._in_run = set() if self._settled["ended"] else set(self._settled["students"])

    @property
    def _run_path(self) -> Path:
        return self._state / ".run.json"  # no student's record: their names do not begin with a dot

    def _begin_run(self, names: Sequence[str]) -> None:
        self._settled = {"run": self._settled["run"] + 1, "students": list(names), "ended": False}
        workspace.write_json(self._run_path, self._settled)

    def _run_of_new(self, known: Graded | None) -> int:
        """The run of something new, never one whose reports may be known: they tell what its inputs should give."""
        if self._settled["ended"] or (known is not None and known.run >= self._settled["run"]):
            self._begin_run(sorted(self._in_run))
        return int(self._settled["run"])

    def _is_told(self) -> bool:
        """Whether somebody's feedback was written since the run began: nbgrader's own commands end no run."""
        began = self._run_path.stat().st_mtime_ns if self._run_path.exists() else 0
        pages = self.course.grading.glob(f"feedback/*/{self.assignment}/*.html")
        return any(page.stat().st_mtime_ns > began for page in pages)

    def _end_run(self, names: Sequence[str]) -> None:
        if not self._settled["ended"] and {*names, *self._in_run} <= {*self.outcome.records}:
            workspace.write_json(self._run_path, {**self._settled, "ended": True})

    def _plan(self, run: int) -> Plan:
        from llmcourse.grader import Plan

        seed = derive_seed(self.course.secret(), self.assignment, run)
        lessons = os.environ.get("LLMCOURSE_LESSONS", "")
        return Plan(self.assignment, self.teacher, self._version, seed, run, not self._insecure, lessons)

    # ---------------------------------------------------------------------------------------------------- judging

    def _judge(self, pool: Pool, names: Sequence[str]) -> list[tuple[Plan, Taken, Graded]]:
        """Judge and write everything that is not there yet; what has an inconclusive race comes back."""
        from llmcourse.grader import mark

        inconclusive: list[tuple[Plan, Taken, Graded]] = []
        waiting: dict[Future[Graded], tuple[Plan, Taken]] = {}
        for name in names:
            plan, taken, known, final = self._look_up(name)
            if known is not None:
                self._progress.done += 1
                self._tell(self._progress)
                if final:
                    self._write(pool, known)
                else:
                    inconclusive.append((plan, taken, known))
                continue
            waiting[pool.submit(mark, plan, taken)] = plan, taken
            while len(waiting) >= pool.size * AHEAD:
                inconclusive += self._take_in(pool, waiting)
        while waiting:
            inconclusive += self._take_in(pool, waiting)
        return inconclusive

    def _look_up(self, student: str) -> tuple[Plan, Taken, Graded | None, bool]:
        """What is to be judged and by which plan; the record and whether it is final, if it was judged by just that."""
        from llmcourse.grader import key_of

        taken = intake.take(self.course.submitted, student, self.assignment)
        known, final = self._record(student)
        if known is not None:
            plan = self._plan(self._run if student in self._in_run else known.run)
            if known.key == key_of(plan, taken):
                return plan, taken, known, final
        if student in self._in_run and known is not None and known.run < self._run:
            return plan, taken, None, False
        return self._plan(self._run_of_new(known)), taken, None, False

    def one(self, student: str) -> Graded:
        """One student's final record, judged in this process unless it is there; nothing else is written.

        HarnessFault where the judge itself fails.
        """
        from llmcourse.grader import again, mark

        self._settle_run([student], rerun=False)
        if self._is_told():
            self._settled["ended"], self._in_run = True, set()
        plan, taken, known, final = self._look_up(student)
        if known is None:
            known = mark(plan, taken)
        if not final:
            if any(exercise.verdict == "inconclusive" for exercise in known.exercises):
                known = again(plan, taken, known)
            self._keep(known, final=True)
        return known

    def _take_in(
        self, pool: Pool, waiting: dict[Future[Graded], tuple[Plan, Taken]]
    ) -> list[tuple[Plan, Taken, Graded]]:
        """Wait for a verdict, keep its record, write it; those with inconclusive races come back."""
        inconclusive = []
        for future in pool.finished(waiting):
            plan, taken = waiting.pop(future)
            graded = self._verdict(future, plan, taken)
            self._progress.done += 1
            self._tell(self._progress)
            if graded is None:
                continue
            self.outcome.judged += 1
            for part, seconds in graded.seconds.items():
                self.outcome.seconds[part] += seconds
            final = all(one.verdict != "inconclusive" for one in graded.exercises)
            self._keep(graded, final=final)
            if final:
                self._write(pool, graded)
            else:
                inconclusive.append((plan, taken, graded))
        return inconclusive

    def _judge_again(self, pool: Pool, inconclusive: Sequence[tuple[Plan, Taken, Graded]]) -> None:
        """Run inconclusive races again, one submission at a time: nothing else is judged meanwhile."""
        from llmcourse.grader import again

        self._write_pages(0)
        self._progress.again = len(inconclusive)
        for plan, taken, graded in inconclusive:
            self._tell(self._progress)
            future = pool.submit(again, plan, taken, graded)
            pool.finished([future])
            anew = self._verdict(future, plan, taken)
            self._progress.again -= 1
            if anew is not None:
                self._keep(anew, final=True)
                self._write(pool, anew)
                self._write_pages(0)

    def _verdict(self, future: Future[Graded], plan: Plan, taken: Taken) -> Graded | None:
        """The record a future holds; None where the judge itself failed, which is told and stops nobody else."""
        from llmcourse.grader import key_of
        from llmcourse.zygote import HarnessFault

        fault = future.exception()
        if fault is not None:
            told = " ".join(str(fault).split())
            if not isinstance(fault, HarnessFault | BrokenExecutor):
                told = f"a fault of llmcourse, please report it: {type(fault).__name__}: {told}"
            self.outcome.failed[taken.student] = told
            return None
        graded = future.result()
        if graded.key == key_of(plan, taken):
            return graded
        self.outcome.failed[taken.student] = (
            "it was judged by other exercises than there are here; install the same version on every machine"
        )
        return None

    # ---------------------------------------------------------------------------------------------------- writing

    def _record(self, student: str) -> tuple[Graded | None, bool]:
        """What is known of a student's submission, and whether it is final."""
        path = self._state / f"{student}.json"
        try:
            kept = json.loads(path.read_bytes())
            return Graded.from_json(kept["graded"]), bool(kept["final"])
        except FileNotFoundError:
            return None, False
        except (ValueError, KeyError, TypeError):  # of an earlier version of the course: judged again
            return None, False

    def _keep(self, graded: Graded, *, final: bool) -> None:
        kept = json.dumps({"final": final, "graded": graded.to_json()}, ensure_ascii=True)
        workspace.write(self._state / f"{graded.student}.json", kept.encode())

    def _write(self, pool: Pool, graded: Graded) -> None:
        """Make of a record what nbgrader has of a submission, unless it is all there."""
        self.outcome.records[graded.student] = graded
        done = self._state / f"{graded.student}.done"
        paths = [
            self.course.output(kind, graded.student, self.assignment, suffix)
            for kind, suffix in (("autograded", ".ipynb"), ("feedback", ".html"))
        ]
        is_there = done.exists() and done.read_text() == _content(graded) and all(map(Path.exists, paths))
        if is_there and self._book.has(self.assignment, graded.student):
            return
        began = time.perf_counter()
        rebuilt = rebuilding.rebuild(self.notebook, graded)
        text = _notebook_text(rebuilt)
        self._put(paths[0], text, graded)
        self.outcome.seconds["rebuilding"] += time.perf_counter() - began
        began = time.perf_counter()
        standing = self._book.write(graded, rebuilt)
        self.outcome.seconds["database"] += time.perf_counter() - began
        self._pages[pool.submit(feedback_page, text, standing)] = graded.student, _content(graded)
        self._write_pages(pool.size * AHEAD)

    def _write_pages(self, at_most: int) -> None:
        """Write feedback pages as they come, until at most so many are still being made."""
        while len(self._pages) > at_most:
            for future in wait(self._pages, return_when=FIRST_COMPLETED)[0]:
                student, content = self._pages.pop(future)
                path = self.course.output("feedback", student, self.assignment, ".html")
                text, seconds = future.result()
                self.outcome.seconds["feedback"] += seconds
                self._put(path, text, self.outcome.records[student])
                workspace.write(self._state / f"{student}.done", content.encode())

    def _put(self, path: Path, text: str, graded: Graded) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        workspace.write(path, text.encode())
        self.leave_for_exchange(path.parent, graded)

    def leave_for_exchange(self, folder: Path, graded: Graded) -> None:
        """Lay beside a notebook or a page what nbgrader's exchange returns it by: when and how it was handed in."""
        written = ""
        if graded.submitted_at:  # nbgrader tells by it whether a newer one was handed in
            moment = datetime.fromisoformat(graded.submitted_at).astimezone(UTC)
            written = moment.strftime("%Y-%m-%d %H:%M:%S.%f UTC")
        workspace.write(folder / "timestamp.txt", written.encode())
        # nbgrader's release_feedback stops for the whole class where one of the two is missing.
        secret = intake.exchange_secret(self.course.submitted, graded.student, self.assignment)
        parts = ("feedback", self.course.secret(), self.assignment, graded.student)
        made_up = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        workspace.write(folder / intake.SECRET, (secret or made_up).encode())

    def _compare_with_classmates(self) -> None:
        """Flag answers that are the same program; of everybody's records, also those of earlier runs."""
        forms: dict[tuple[str, str], list[str]] = defaultdict(list)
        everybody = dict(self.outcome.records)
        for path in self._state.glob("*.json"):
            record, _ = self._record(path.stem) if path != self._run_path else (None, False)
            if record is not None:
                everybody.setdefault(record.student, record)
        for student, record in sorted(everybody.items()):
            for one in record.exercises:
                if one.form:
                    forms[one.name, one.form].append(student)
        for student, record in self.outcome.records.items():
            flagged = tuple(
                replace(
                    one,
                    same_as=(
                        *one.same_as,
                        *(f"student {other}" for other in forms[one.name, one.form] if other != student),
                    ),
                )
                if one.form
                else one
                for one in record.exercises
            )
            self.outcome.records[student] = replace(record, exercises=flagged)


def worth_of(notebook: NotebookNode) -> dict[str, float]:
    """What each graded exercise is worth in the teacher's version, by name."""
    worth = {}
    for cell in notebook.cells:
        grader = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "code" and grader.get("grade") and not grader.get("solution"):
            worth[grader["grade_id"].removeprefix(rebuilding.CHECK)] = float(grader["points"])
    return worth


def feedback_page(notebook: str, standing: Any) -> tuple[str, float]:
    """The feedback page of an autograded notebook, and the seconds that making it took."""
    from nbformat import v4

    from llmcourse import feedback

    began = time.perf_counter()
    html = feedback.page(v4.reads(notebook), standing)  # it is our own: no need to look whether it is valid
    return html, time.perf_counter() - began


def _notebook_text(notebook: NotebookNode) -> str:
    import nbformat

    text = nbformat.writes(notebook)
    return text if text.endswith("\n") else text + "\n"


def _content(graded: Graded) -> str:
    return f"{graded.key} {graded.run}"


# ------------------------------------------------------------------------------------------------------- the table


def table(outcome: Outcome) -> str:
    """The class as CSV: student, points, max_points, a column an exercise, then flags and what was said of the file."""
    names = [*outcome.worth]
    for record in outcome.records.values():
        names += [one.name for one in record.exercises if one.name not in names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", "points", "max_points", *names, "same_as", "outcome"])
    for student, record in sorted(outcome.records.items()):
        points = outcome.points(record)
        same = "; ".join(f"{one.name}: {', '.join(one.same_as)}" for one in record.exercises if one.same_as)
        waits = [one.name for one in record.exercises if one.needs_teacher]
        said = record.refused or (f"for the teacher: {', '.join(waits)}" if waits else "graded")
        row = [student, _plain(outcome.total(record)), _plain(outcome.max_points)]
        writer.writerow(
            [*row, *(_plain(points[name]) if name in points else "" for name in names), same, said]
        )
    return text.getvalue()


def _plain(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")
