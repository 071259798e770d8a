"""A teacher's version of a lesson: exercises picked, points changed, exercises of one's own, a spoken answer.

    shaped = shape("01", name="week_2", only=["parameter_count", "plan_load"], points={"plan_load": 5}, spoken=4)
    write(shaped)                   # notebooks/week_2/week_2.ipynb of the current folder

It starts from the lesson's student notebook as it was released, and stays one that nbgrader knows. An exercise's
section, which runs from its heading to the next heading of the same or a higher level, goes with it, and so does the
prose section right above that leads to it. What elsewhere needs a dropped exercise, directly or through what another
cell made with it, goes too; a cell of a dropped section that others need stays. `notes` lists both.

An exercise of one's own lies outside the package: LLMCOURSE_LESSONS names folders of topic/exercise.py.
"""

from __future__ import annotations

import ast
import copy
import re
import symtable
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse import lesson_text, source, submission, workspace
from llmcourse.finding import exercise_paths
from llmcourse.interview_plan import material
from llmcourse.interview_source import HEADINGS as INTERVIEW_WORDS
from llmcourse.interview_source import Interview
from llmcourse.leaks import ExerciseText, LessonError, read_exercise
from llmcourse.notebook import replace_file, to_bytes

HEADING = re.compile(r"(#{1,6}) ")
NAME = re.compile(r"\w[\w.-]*")
SPOKEN = "in_one_minute"  # grade_id of the answer that a person grades
TO_BE_WRITTEN = "YOUR ANSWER HERE"  # nbgrader's own words, by which it knows an answer that is missing
SPOKEN_WORDS = {
    "en": "### In one minute · {points:g} points\n\nAnswer the lesson's question as you would aloud: about 150 words, "
    "with numbers of your own. Your teacher grades it by this table.",
    "zh": "### 一分钟回答 · {points:g} 分\n\n像面试时口述那样回答本课的问题：约 300 字，用上你自己测得的数字。"
    "老师按下表评分。",
}


class ShapeError(ValueError):
    """A choice that a notebook cannot follow: what was expected, what was found, what to do, in one line."""


@dataclass(frozen=True)
class Shaped:
    """A teacher's version: its name, notebook and exercises in order, and what the choices took with them."""

    name: str
    notebook: Any
    exercises: tuple[str, ...]
    notes: tuple[str, ...] = ()


def shape(
    lesson: str,
    *,
    name: str | None = None,
    only: Collection[str] | None = None,
    drop: Collection[str] = (),
    points: Mapping[str, float] | None = None,
    add: Sequence[str] = (),
    spoken: float | None = None,
    title: str | None = None,
    language: str = "en",
) -> Shaped:
    """The lesson's student notebook with a teacher's choices; ShapeError or WorkspaceError in one line.

    name: of the assignment, the lesson's own unless given. only, drop: exercises that stay, that go. points: by
    exercise, new ones; a ★ extension that is given points counts like the others. add: exercises of one's own.
    spoken: points of "In one minute", written, which a person grades by the lesson's rubric; the model answers go.
    """
    full = workspace.lesson_name(lesson)
    called = name if name is not None else full
    if not NAME.fullmatch(called):
        raise ShapeError(f"the name {called!r}: expected letters, digits and _ - . only, no space or slash")
    notebook = copy.deepcopy(_released(full, language))
    there = answers_in(notebook)
    dropped = _dropped(there, only, drop, full)
    _demand_what_is_used([name for name in there if name not in dropped], dropped)
    notebook.cells, notes = _without(notebook.cells, dropped)
    _add(notebook, [_own(name, there) for name in add], language)
    for exercise, worth in (points or {}).items():
        _set_points(notebook, exercise, worth, language)
    if spoken is not None:
        _ask_for_speech(notebook, full, spoken, language)
    if title is not None:
        _set_title(notebook, title)
    _sign(notebook)
    return Shaped(called, notebook, tuple(answers_in(notebook)), tuple(notes))


def write(shaped: Shaped, folder: Path | None = None, *, force: bool = False) -> Path:
    """Lay the notebook into the folder's `notebooks/NAME/NAME.ipynb`, where nbgrader looks for what is released.

    ShapeError where another file lies there, unless `force` says that it may go.
    """
    path = (folder or Path.cwd()) / "notebooks" / shaped.name / f"{shaped.name}.ipynb"
    content = to_bytes(shaped.notebook)
    if path.exists() and not force and path.read_bytes() != content:
        raise ShapeError(
            f"{path} is there already and differs; choose another name, or say --force to replace it"
        )
    replace_file(path, content)
    return path


# ---------------------------------------------------------------------------------------------------- reading cells


def _released(lesson: str, language: str) -> Any:
    import nbformat

    wanted = f"{lesson}.ipynb" if language == "en" else f"{lesson}.{language}.ipynb"
    paths = workspace.lesson_sources()[lesson]
    path = next((path for path in paths if path.name == wanted), None)
    if path is None:
        known = ", ".join(path.name for path in paths)
        raise ShapeError(f"{lesson} has no edition in {language!r}; expected one of {known}")
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def _grading(cell: Any) -> dict[str, Any]:
    found = cell.metadata.get("nbgrader", {})
    return found if isinstance(found, dict) else {}


def _grade_id(cell: Any) -> str:
    return str(_grading(cell).get("grade_id", ""))


def answers_in(notebook: Any) -> list[str]:
    """Names of the exercises a notebook has an answer cell for, in order."""
    return [_grade_id(cell) for cell in notebook.cells if _is_answer(cell)]


def _is_answer(cell: Any) -> bool:
    return cell.cell_type == "code" and bool(_grading(cell).get("solution")) and bool(_grade_id(cell))


def _level(cell: Any) -> int:
    """1 to 6 for a Markdown cell that begins with a heading, 0 for any other cell."""
    found = HEADING.match(cell.source) if cell.cell_type == "markdown" else None
    return len(found[1]) if found else 0


def _answer_at(cells: Sequence[Any], name: str) -> int:
    return next(index for index, cell in enumerate(cells) if _is_answer(cell) and _grade_id(cell) == name)


def _section(cells: Sequence[Any], name: str) -> range:
    """Indexes of an exercise's section, with the prose section of the same level that leads to it."""
    answer = _answer_at(cells, name)
    start = next(index for index in range(answer, -1, -1) if _level(cells[index]) or index == 0)
    level = _level(cells[start]) or 6
    ends = (index for index in range(answer + 1, len(cells)) if 0 < _level(cells[index]) <= level)
    end = next(ends, len(cells))
    before = start
    while before > 0 and cells[before - 1].cell_type == "markdown":
        before -= 1
        if _level(cells[before]):
            return range(before if _level(cells[before]) == level else start, end)
    return range(start, end)


@dataclass(frozen=True)
class _Names:
    """Names a cell reads from others and those it makes."""

    reads: frozenset[str]
    makes: frozenset[str]


def _names(cell: Any) -> _Names:
    """Of a code cell; nothing of one that is not Python."""
    try:
        table = symtable.symtable(submission.without_magics(cell.source)[0], "cell", "exec")
    except (SyntaxError, ValueError):
        return _Names(frozenset(), frozenset())
    makes = {name.get_name() for name in table.get_symbols() if name.is_assigned() or name.is_imported()}
    reads = {name.get_name() for name in table.get_symbols() if name.is_referenced()}
    return _Names(frozenset((reads | set(_globals_inside(table))) - makes), frozenset(makes))


def _globals_inside(table: symtable.SymbolTable) -> Iterator[str]:
    for inner in table.get_children():
        yield from (name.get_name() for name in inner.get_symbols() if name.is_global())
        yield from _globals_inside(inner)


# ------------------------------------------------------------------------------------------------ dropping exercises


def _dropped(
    there: Sequence[str], only: Collection[str] | None, drop: Collection[str], lesson: str
) -> set[str]:
    for name in [*(only or ()), *drop]:
        if name not in there:
            raise ShapeError(
                f"{lesson} has no exercise {name!r}; expected some of {', '.join(there) or 'none'}"
            )
    return {name for name in there if name in drop or (only is not None and name not in only)}


def _demand_what_is_used(kept: Sequence[str], dropped: Collection[str]) -> None:
    """ShapeError where an exercise that stays builds on one that goes."""
    from llmcourse.exercise import find

    for name in kept if dropped else ():
        missing = [used for used in find(name).uses if used in dropped]
        if missing:
            raise ShapeError(
                f"{name} builds on {' and '.join(missing)}, which would go; keep it, or drop {name} too"
            )


def _without(cells: Sequence[Any], dropped: Collection[str]) -> tuple[list[Any], list[str]]:
    """The cells that can stand without the dropped exercises, and a note on every other one that moved."""
    leaving = {index for name in dropped for index in _section(cells, name)}
    names = [_names(cell) if cell.cell_type == "code" else None for cell in cells]
    lost = _lost(cells, names, dropped)
    kept: list[int] = []
    notes: list[str] = []
    needed: set[str] = set()
    for index in range(len(cells) - 1, -1, -1):  # from below: a cell is needed by those after it
        found = names[index]
        if index in lost:
            if index not in leaving:
                notes.append(f"a cell went because it needs {lost[index]}: {_start(cells[index])}")
            continue
        if index in leaving:
            if found is None or not found.makes & needed:
                continue
            notes.append(
                f"a cell stayed because others need its {sorted(found.makes & needed)[0]}: {_start(cells[index])}"
            )
        kept.append(index)
        if found is not None:
            needed |= found.reads
    return [cells[index] for index in reversed(kept)], notes[::-1]


def _lost(cells: Sequence[Any], names: Sequence[_Names | None], dropped: Collection[str]) -> dict[int, str]:
    """Code cells that cannot run without the dropped exercises, each with the name that it misses.

    A name that such a cell makes is missing below it, even if another cell had made one above: it was meant to change.
    """
    missing = set(dropped)
    lost: dict[int, str] = {}
    for index, found in enumerate(names):
        if found is None:
            continue
        own = _grade_id(cells[index]).removeprefix("check_")
        without = {own} & set(dropped) or found.reads & missing
        if without:
            lost[index] = sorted(without)[0]
            missing |= found.makes
        else:
            missing -= found.makes
    return lost


def _start(cell: Any) -> str:
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
    return f"`{lines[0].strip() if lines else ''}`"


# ----------------------------------------------------------------------------------------------- adding and changing


def _own(name: str, there: Collection[str]) -> ExerciseText:
    paths = exercise_paths()
    if name in there:
        raise ShapeError(f"{name} is in the lesson already; name only exercises to add")
    if name not in paths:
        raise ShapeError(
            f"no exercise is named {name!r}; expected topic/{name}.py in a folder that LLMCOURSE_LESSONS names"
        )
    try:
        return read_exercise(paths[name])
    except LessonError as error:
        raise ShapeError(str(error)) from error


def _add(notebook: Any, exercises: Sequence[ExerciseText], language: str) -> None:
    """Put heading, answer and check of each after the last exercise's section, with the imports its stub needs."""
    import nbformat

    cells = notebook.cells
    there = answers_in(notebook)
    at = max((_section(cells, name).stop for name in there), default=len(cells))
    new: list[Any] = []
    for exercise in exercises:
        heading, answer, check = lesson_text.exercise_cells(exercise, language)
        answer.source = exercise.stub
        imports = _imports_for(exercise)
        new += [heading, *([nbformat.v4.new_code_cell(imports)] if imports else []), answer, check]
    for number, cell in enumerate(new, 1):
        cell.id = _grade_id(cell) or f"added-{number}-{len(cells)}"
    notebook.cells = [*cells[:at], *new, *cells[at:]]


def _imports_for(exercise: ExerciseText) -> str:
    """The imports of an exercise's file that its signature needs, as source."""
    tree = source.parse(exercise.path.read_text(encoding="utf-8"))
    used = source.used_names(source.parse(exercise.stub))
    lines = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not _of_the_course(node):
            node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
            if node.names:
                lines.append(ast.unparse(node))
    return "\n".join(lines)


def _of_the_course(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import is of what proves an exercise, not of what its answer uses."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    hidden = ("llmcourse.exercise", "llmcourse.lessons", "__future__")
    return any(name.startswith(hidden) for name in names)


def _set_points(notebook: Any, name: str, points: float, language: str) -> None:
    """Change what a check cell is worth and what the heading above says; an extension then counts like the others."""
    if name not in answers_in(notebook):
        raise ShapeError(f"points for {name!r}, which is not in this notebook; expected one of its exercises")
    if not points > 0 or points == float("inf"):
        raise ShapeError(f"{points:g} points for {name}; expected a number above 0")
    check = next((cell for cell in notebook.cells if _grade_id(cell) == f"check_{name}"), None)
    if check is None:
        raise ShapeError(f"{name} has no check cell, so it cannot be given points; build the lesson again")
    check.metadata["nbgrader"] |= {"grade": True, "points": int(points) if points == int(points) else points}
    answer = _answer_at(notebook.cells, name)
    heading = next(cell for cell in reversed(notebook.cells[:answer]) if _level(cell))
    words = lesson_text.HEADINGS[language]["core"]
    minutes = read_minutes(heading.source, name)
    first = words.format(name=name, points=points, minutes=minutes)
    heading.source = "\n".join([first, *heading.source.split("\n")[1:]])


def read_minutes(heading: str, name: str) -> int:
    """The minutes that an exercise's heading says, its last number."""
    numbers = re.findall(r"\d+", heading.split("\n")[0].replace(name, ""))
    if not numbers:
        raise ShapeError(
            f"the heading above {name} has changed: {heading.splitlines()[0]!r}; build the lesson again"
        )
    return int(numbers[-1])


def _ask_for_speech(notebook: Any, lesson: str, points: float, language: str) -> None:
    """Put a written answer of one minute, with its rubric, in the place of the model answers and the folded rubric."""
    import nbformat

    question = material(lesson).question
    if question is None:
        raise ShapeError(
            f"{lesson} has no interview.toml, so there is no rubric for a spoken answer; leave it out"
        )
    if not points > 0 or points == float("inf"):
        raise ShapeError(f"{points:g} points for the spoken answer; expected a number above 0")
    words = INTERVIEW_WORDS[language]
    told = [f"<summary>{words[part]}</summary>" for part in ("one_minute", "rubric")]
    folded = [
        index
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and any(summary in cell.source for summary in told)
    ]
    text = f"{SPOKEN_WORDS[language].format(points=points)}\n\n{_rubric(question, language)}"
    worth = int(points) if points == int(points) else points
    graded = {"grade": True, "solution": True, "locked": False, "task": False, "points": worth}
    new = [
        nbformat.v4.new_markdown_cell(text, id=f"{SPOKEN}-rubric"),
        nbformat.v4.new_markdown_cell(
            TO_BE_WRITTEN,
            id=SPOKEN,
            metadata={"nbgrader": graded | {"grade_id": SPOKEN, "schema_version": 3}},
        ),
    ]
    at = folded[0] if folded else len(notebook.cells)
    rest = [cell for index, cell in enumerate(notebook.cells) if index > at and index not in folded]
    notebook.cells = [*notebook.cells[:at], *new, *rest]


def _rubric(question: Interview, language: str) -> str:
    """The lesson's rubric as a table; its points are shares of what the answer is worth."""
    words = INTERVIEW_WORDS[language]
    rows = [
        f"| {line.points} | {' '.join(line.criterion.of(language).split())} |".replace("\\|", "|")
        for line in question.rubric
    ]
    return "\n".join([f"| {words['points']} | {words['criterion']} |", "|---:|---|", *rows])


def _set_title(notebook: Any, title: str) -> None:
    """Change the first heading of the notebook; put one above where there is none."""
    import nbformat

    line = f"# {' '.join(title.split())}"
    first = notebook.cells[0] if notebook.cells else None
    if first is not None and _level(first) == 1:
        first.source = "\n".join([line, *first.source.split("\n")[1:]])
    else:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(line, id="title"))


def _sign(notebook: Any) -> None:
    """nbgrader's own checksums, by which it later knows an untouched cell; and whether all of it is a notebook."""
    import nbformat
    from nbgrader.utils import compute_checksum

    for cell in notebook.cells:
        if _grading(cell):
            cell.metadata["nbgrader"] |= {"cell_type": cell.cell_type}
            cell.metadata["nbgrader"]["checksum"] = compute_checksum(cell)
    nbformat.validate(notebook)
