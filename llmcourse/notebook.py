"""Lesson text -> instructor notebook, executed -> student notebook.

`python -m llmcourse.notebook [--check] [LESSON...]` brings them up to date, or says what is stale. The text of a
lesson (see `llmcourse.lesson_text`) is all that is written by hand. The instructor notebook is built beside it, with
its outputs, and executed only when what it follows from has changed. The student's is made by nbgrader itself, in a
temporary course without a gradebook, to `notebooks/`. Every file is replaced whole or not at all.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcourse.leaks import (
    LARGEST_NOTEBOOK_BYTES,
    WIDGET_VIEW,
    ExerciseText,
    LessonError,
    leaks,
    read_exercise,
    shown,
    unclean,
)
from llmcourse.lesson_text import (
    KERNEL,
    REPOSITORY,
    Course,
    Expanded,
    Lesson,
    exercise_paths,
    expand,
    lessons,
)

CELL_LIMIT_S = 600
SETTINGS_OF_LEARNERS = {"LLMCOURSE_WORKSPACE", "LLMCOURSE_GRADING", "NBGRADER_EXECUTION"}
# Modules whose code cannot show in a lesson's outputs; a change in any other makes every lesson stale.
NEVER_RUN_BY_LESSONS = {
    "auditing",
    "benchmarks",
    "cli",
    "feedback",
    "graded",
    "gradebook",
    "grader",
    "grading",
    "grading_benchmarks",
    "intake",
    "interview",
    "interview_source",
    "interview_words",
    "kit",
    "leaks",
    "lesson_text",
    "likeness",
    "notebook",
    "pools",
    "preprocessor",
    "rebuilding",
    "shaping",
}


@dataclass
class Report:
    """What a build wrote, and what an author has to mend (each with file and line)."""

    written: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ comparing, writing


def canonical(notebook: Any) -> str:
    """A notebook as sorted JSON without outputs, execution counts and volatile metadata: what its source decides."""
    cells = [
        {
            "cell_type": cell["cell_type"],
            "id": cell["id"],
            "metadata": {
                key: value for key, value in cell["metadata"].items() if key in ("nbgrader", "tags")
            },
            "source": cell["source"],
        }
        for cell in notebook["cells"]
    ]
    kept = {
        "cells": cells,
        "metadata": {"kernelspec": notebook["metadata"].get("kernelspec")},
        "nbformat": [notebook["nbformat"], notebook["nbformat_minor"]],
    }
    return json.dumps(kept, sort_keys=True, ensure_ascii=False, indent=1)


def editions_differ(first: Any, second: Any) -> tuple[str, str] | None:
    """(cell id in the second, reason) when two editions of a lesson differ in code or exercises."""
    one, two = ([cell for cell in nb["cells"] if cell["cell_type"] == "code"] for nb in (first, second))
    for ours, theirs in zip(one, two, strict=False):
        if (ours["id"], ours["source"]) != (theirs["id"], theirs["source"]):
            start = ours["source"].strip().splitlines()[0]
            return theirs["id"], f"the English edition has another code cell here, which starts `{start}`"
    if len(one) != len(two):
        return (two[-1]["id"] if two else ""), f"{len(two)} code cells, the English edition has {len(one)}"
    return None


def read_notebook(path: Path) -> Any | None:
    """A notebook file, or None when it is missing or damaged: both mean that it has to be built."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (
        FileNotFoundError,
        nbformat.reader.NotJSONError,
        nbformat.ValidationError,
        UnicodeDecodeError,
        KeyError,
    ):
        return None


def to_bytes(notebook: Any) -> bytes:
    """The notebook as it is written to disk."""
    import nbformat

    return (nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n").encode()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- executing


def execution_digest(lesson: Lesson, expanded: Expanded, course: Course = REPOSITORY) -> str:
    """Hash of what a lesson's outputs follow from: its notebook, its exercises, the library's code, the models."""
    digest = hashlib.sha256(canonical(expanded.notebook).encode())
    files = [
        *(course.exercises / lesson.topic).glob("*.py"),
        *(path for path in course.package.glob("*.py") if path.stem not in NEVER_RUN_BY_LESSONS),
        *(path for path in (course.package / "zoo").glob("*") if path.is_file()),
    ]
    for path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"\0{path.relative_to(course.root).as_posix()}\0{content}".encode())
    return digest.hexdigest()


def execute(
    lesson: Lesson,
    expanded: Expanded,
    course: Course = REPOSITORY,
    *,
    ran: Callable[[int, int], None] | None = None,
) -> Any:
    """The notebook with outputs, run from top to bottom in an empty folder, one thread, seed 0; LessonError for a cell
    that raises, hangs or kills its kernel. `ran(done, cells)` is called after each cell."""
    import nbclient.exceptions

    notebook = copy.deepcopy(expanded.notebook)
    at = 0

    def started(cell: Any, cell_index: int) -> None:
        nonlocal at
        at = cell_index

    def executed(cell: Any, cell_index: int, execute_reply: Any) -> None:
        if ran is not None:
            ran(cell_index + 1, len(notebook.cells))

    with tempfile.TemporaryDirectory(prefix="llmcourse-") as folder, tempfile.TemporaryDirectory() as profile:
        client = nbclient.NotebookClient(
            notebook,
            timeout=CELL_LIMIT_S,
            kernel_name=KERNEL["name"],
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=[
                "--log-level=ERROR"
            ],  # no note about transports in the middle of the progress bar
            on_cell_start=started,
            on_cell_executed=executed,
        )
        try:
            client.execute(env=execution_environment(course, profile))
        except nbclient.exceptions.CellExecutionError as error:
            reason = f"raised {error.ename}: {error.evalue}"
        except nbclient.exceptions.CellTimeoutError:
            reason = f"ran for over {CELL_LIMIT_S} s"
        except nbclient.exceptions.DeadKernelError:
            reason = "ended its kernel"
        else:
            return _without_widgets(notebook)
    cell = expanded.notebook.cells[at]
    message = f"the cell `{_start(cell)}` {reason}; mend it and build again"
    raise LessonError(lesson.text, expanded.lines[cell.id], message)


def execution_environment(course: Course, profile: str) -> dict[str, str]:
    """The kernel's environment: this course's code first, fixed seeds, one thread, no profile or workspace of ours."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, [str(course.root), os.environ.get("PYTHONPATH", "")]))
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS_OF_LEARNERS}
    return {
        **kept,
        **threads,
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",
        "LLMCOURSE_SEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": profile,
    }


def _without_widgets(notebook: Any) -> Any:
    """Drop what a live widget leaves in a file (the static figure beside it stays) and what names this Python."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _start(cell: Any) -> str:
    return str(cell["source"]).strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------- student notebooks


def release(solutions: Mapping[Lesson, Any], course: Course = REPOSITORY) -> dict[Lesson, bytes]:
    """The student notebooks, by nbgrader's generate_assignment in a temporary course without a gradebook."""
    from nbgrader.converters import GenerateAssignment
    from nbgrader.converters.base import NbGraderException
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config.loader import PyFileConfigLoader

    log = logging.getLogger("llmcourse.notebook.release")
    heard = _Heard(level=logging.ERROR)
    log.handlers, log.propagate = [heard], False
    with tempfile.TemporaryDirectory(prefix="llmcourse-") as folder:
        temporary = Course(Path(folder).resolve())
        for lesson, notebook in solutions.items():
            replace_file(temporary.solutions / lesson.name / lesson.solution.name, to_bytes(notebook))
        config = PyFileConfigLoader(str(course.nbgrader_config)).load_config()
        config.CourseDirectory.root = str(temporary.root)
        config.CourseDirectory.assignment_id = "*"
        # nbgrader's own --no-db: against a gradebook with submissions it would refuse, and delete the release.
        config.GenerateAssignment.no_database = True
        config.SaveCells.enabled = False
        directory = CourseDirectory(config=config, log=log)
        try:
            GenerateAssignment(coursedir=directory, config=config, log=log).start()
        except NbGraderException as error:
            raise RuntimeError(
                f"nbgrader could not write the student notebooks: {error}\n{heard.text}"
            ) from error
        return {lesson: lesson.student(temporary).read_bytes() for lesson in solutions}


class _Heard(logging.Handler):
    """Keeps what nbgrader logs, so that it is shown only when it failed."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


# -------------------------------------------------------------------------------------------------------- the build


def build(
    course: Course = REPOSITORY,
    wanted: Sequence[str] = (),
    *,
    check_only: bool = False,
    ran: Callable[[Lesson, int, int], None] | None = None,
) -> Report:
    """Bring the notebooks of the wanted lessons (all, by default) up to date, or only say what is stale.

    A lesson with a problem keeps the files it had; the others are built. ran(lesson, done, cells) follows an execution.
    """
    report = Report()
    chosen = lessons(course, wanted)
    paths = exercise_paths(course)
    expanded = _expand_all(chosen, course, report)
    if not wanted:
        report.problems += _orphans(chosen, expanded, paths, course)
    if not expanded:
        return report
    students = release({lesson: each.notebook for lesson, each in expanded.items()}, course)
    secrets = _readable(paths.values(), report)
    for lesson, each in expanded.items():
        found = _leak_problems(lesson, each, students[lesson], secrets)
        report.problems += found
        if check_only:
            report.problems += _stale(lesson, each, students[lesson], course)
        elif not found:
            _bring_up_to_date(lesson, each, students[lesson], course, report, ran)
    return report


def _expand_all(chosen: Iterable[Lesson], course: Course, report: Report) -> dict[Lesson, Expanded]:
    expanded: dict[Lesson, Expanded] = {}
    for lesson in chosen:
        try:
            each = expand(lesson, course)
        except LessonError as error:
            report.problems.append(str(error))
            continue
        first = next((other for other in expanded if other.name == lesson.name), None)
        if first is not None and (differ := editions_differ(expanded[first].notebook, each.notebook)):
            cell_id, reason = differ
            line = each.lines.get(cell_id, 1)
            report.problems.append(
                f"{shown(lesson.text)}:{line}: {reason}; make both the same, comments included"
            )
            continue
        expanded[lesson] = each
    return expanded


def _orphans(
    chosen: Sequence[Lesson], expanded: Mapping[Lesson, Expanded], paths: Mapping[str, Path], course: Course
) -> list[str]:
    """Exercises that no lesson asks, and student files that no lesson makes."""
    asked = {name for each in expanded.values() for name in each.exercises}
    read = {lesson.topic for lesson in expanded}
    found = [
        f"{shown(path)}:1: no lesson asks {name}; link it from the lesson text of {path.parent.name}, or remove it"
        for name, path in paths.items()
        if name not in asked and path.parent.name in read
    ]
    known = {lesson.student(course) for lesson in chosen}
    files = (path for path in course.notebooks.glob("*/**/*") if path.is_file() and path not in known)
    found += [
        f"{shown(path)}:1: no lesson makes this file; remove it"
        for path in sorted(files)
        if ".ipynb_checkpoints" not in path.parts
    ]
    return found


def _readable(paths: Iterable[Path], report: Report) -> list[ExerciseText]:
    """The exercises that can be cut; for the others, one problem each."""
    found = []
    for path in paths:
        try:
            found.append(read_exercise(path))
        except LessonError as error:
            if str(error) not in report.problems:
                report.problems.append(str(error))
    return found


def _leak_problems(
    lesson: Lesson, each: Expanded, student: bytes, secrets: Iterable[ExerciseText]
) -> list[str]:
    import nbformat

    shown_to_students = nbformat.reads(student.decode(), as_version=nbformat.NO_CONVERT)
    return [
        f"{shown(lesson.text)}:{each.lines.get(cell_id, 1)}: the student notebook {message}; reword one of the two"
        for cell_id, message in leaks(shown_to_students, secrets)
    ]


def _cell_problems(lesson: Lesson, each: Expanded, notebook: Any) -> list[str]:
    """What is unclean in an executed notebook, with the lines of the lesson's text."""
    starts = {cell["id"]: _start(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    found = []
    for cell_id, message in unclean(notebook, each.exercises):
        cell = f"the cell `{starts[cell_id]}` " if cell_id in starts else "the notebook "
        found.append(f"{shown(lesson.text)}:{each.lines.get(cell_id or '', 1)}: {cell}{message}")
    size_bytes = len(to_bytes(notebook))
    if size_bytes > LARGEST_NOTEBOOK_BYTES:
        limit = f"{size_bytes:,} bytes, expected at most {LARGEST_NOTEBOOK_BYTES:,}; draw smaller figures"
        found.append(f"{shown(lesson.text)}:1: the executed notebook has {limit}")
    return found


def _stale(lesson: Lesson, each: Expanded, student: bytes, course: Course) -> list[str]:
    """Why the committed notebooks of a lesson are not what its source makes."""
    committed = read_notebook(lesson.solution)
    remedy = f"run `make notebooks` (python -m llmcourse.notebook {lesson.name})"
    found = []
    if committed is None:
        found.append(f"{shown(lesson.solution)}:1: missing or damaged; {remedy}")
    elif canonical(committed) != canonical(each.notebook):
        found.append(f"{shown(lesson.solution)}:1: not what {lesson.text.name} makes; {remedy}")
    elif _executed_from(committed) != execution_digest(lesson, each, course):
        found.append(
            f"{shown(lesson.solution)}:1: executed before the lesson or its code last changed; {remedy}"
        )
    else:
        found += _cell_problems(lesson, each, committed)
    path = lesson.student(course)
    if not path.is_file() or path.read_bytes() != student:
        found.append(f"{shown(path)}:1: not what nbgrader makes of {lesson.solution.name}; {remedy}")
    return found


def _executed_from(notebook: Any) -> str | None:
    found = notebook["metadata"].get("llmcourse", {}).get("executed_from")
    return found if isinstance(found, str) else None


def _bring_up_to_date(
    lesson: Lesson,
    each: Expanded,
    student: bytes,
    course: Course,
    report: Report,
    ran: Callable[[Lesson, int, int], None] | None,
) -> None:
    committed, digest = read_notebook(lesson.solution), execution_digest(lesson, each, course)
    current = committed is not None and canonical(committed) == canonical(each.notebook)
    if not current or _executed_from(committed) != digest or _cell_problems(lesson, each, committed):
        try:
            notebook = execute(
                lesson,
                each,
                course,
                ran=None if ran is None else lambda done, cells: ran(lesson, done, cells),
            )
        except LessonError as error:
            report.problems.append(str(error))
            return
        if problems := _cell_problems(lesson, each, notebook):
            report.problems += problems
            return
        notebook.metadata["llmcourse"] = {"executed_from": digest}
        replace_file(lesson.solution, to_bytes(notebook))
        report.written.append(lesson.solution)
    path = lesson.student(course)
    if not path.is_file() or path.read_bytes() != student:
        replace_file(path, student)
        report.written.append(path)


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None, *, course: Course = REPOSITORY) -> int:
    """Build or check; the exit status. 0: everything is current, 1: something has to be mended, 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m llmcourse.notebook",
        description="Build the notebooks of lessons from their texts, executing only what is stale.",
        epilog="example: python -m llmcourse.notebook --check 01",
    )
    parser.add_argument(
        "lesson", nargs="*", help="01, parameter_loading or 01_parameter_loading; all by default"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with what is stale")
    options = parser.parse_args(arguments)
    try:
        report = _with_progress(course, options.lesson, check_only=options.check)
    except KeyboardInterrupt:
        print("interrupted; every file is as it was or whole", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in report.written:
        print(f"wrote {shown(path)}")
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.written and not report.problems:
        print(
            "every notebook is current" if lessons(course) else f"no lessons in {shown(course.solutions)} yet"
        )
    return 1 if report.problems else 0


def _with_progress(course: Course, wanted: Sequence[str], *, check_only: bool) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[Lesson, Any] = {}

        def ran(lesson: Lesson, done: int, cells: int) -> None:
            if lesson not in tasks:
                tasks[lesson] = progress.add_task(lesson.solution.name, total=cells)
            progress.update(tasks[lesson], completed=done)

        return build(course, wanted, check_only=check_only, ran=ran)


if __name__ == "__main__":
    sys.exit(main())
