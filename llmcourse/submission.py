"""A learner's notebook as data: read without running it, and cut into the source a worker may run.

What runs, in order, in one module: the lesson's import cell (the teacher's version); from the learner's own cells
their imports, definitions and literal constants; then the exercise cells. Magics, shell lines and calls of
`check` and `hint` are dropped and named in the notes. No torch is imported for that, so a file that cannot be judged
is refused at once.
"""

from __future__ import annotations

import ast
import json
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse import source
from llmcourse.finding import exercise_paths
from llmcourse.source import Definition, bound_names, parse

if TYPE_CHECKING:
    from llmcourse.engine import Answer

MAX_BYTES, MAX_CELLS, MAX_CELL_CHARS = 50 << 20, 5_000, 1_000_000
MAGIC = re.compile(r"^(?P<indent>\s*)(?:[%!?]|(?:[\w, ]+=\s*)[%!]|[\w.]+\?{1,2}\s*$)")
OWN_CALLS = ("check", "hint")
LINE_MAGIC_CELLS = ("%%time", "%%timeit", "%%capture", "%%prun")
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


class UnreadableNotebook(Exception):
    """A file that cannot be judged: one line that says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Cell:
    """A code cell: its label ("cell 7", counted as JupyterLab shows them), its text, its nbgrader id if it has one."""

    label: str
    text: str
    grade_id: str | None
    is_answer: bool


@dataclass(frozen=True)
class Submission:
    """A notebook's answers: the lesson's topic, the names to judge, the parts that run, what was left out."""

    path: Path
    topic: str
    names: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    own: dict[str, str]
    notes: tuple[str, ...]

    def answer(
        self, name: str, ours: Sequence[tuple[str, str]] = (), *, without: Collection[str] = ()
    ) -> Answer:
        """Source for one exercise; `ours` are the course's own parts, run last, in place of wrong answers.

        without: labels of parts that are left out, unless one is the exercise's own.
        """
        from llmcourse.engine import Answer

        own = self.own.get(name)
        parts = [part for part in self.parts if part[0] == own or part[0] not in without]
        return Answer(name, (*parts, *ours), own=own)


def read(path: Path) -> Submission:
    """Read a notebook file; UnreadableNotebook when it cannot be judged."""
    cells = code_cells(path)
    topic = topic_of(cells, path)
    names = lesson_exercises(topic)
    notes: list[str] = []
    parts: list[tuple[str, str]] = []
    teachers = import_cell(topic)
    if teachers:
        parts.append(("the lesson's imports", teachers))
    answers = [cell for cell in cells if cell.is_answer and cell.grade_id in names]
    for cell in cells:
        if cell not in answers:
            text, dropped = carried(cell)
            notes += dropped
            if text.strip():
                parts.append((cell.label, text))
    own: dict[str, str] = {}
    for cell in answers:
        text, dropped = whole(cell)
        notes += dropped
        assert cell.grade_id is not None
        earlier = own.get(cell.grade_id)
        if earlier is not None:
            both = f"{earlier} and {cell.label} are both the cell of {cell.grade_id}"
            if is_stub(text, cell.grade_id):
                notes.append(f"{both}; {cell.label} is not written yet, so {earlier} counts")
                continue
            notes.append(f"{both}; the later one counts")
        parts.append((cell.label, text))
        own[cell.grade_id] = cell.label
    notes += [
        f"the cell of {name} is gone; an answer of that name anywhere else counts"
        for name in names
        if name not in own
    ]
    return Submission(path, topic, tuple(names), tuple(parts), own, tuple(notes))


# ----------------------------------------------------------------------------------------------------- the file


def code_cells(path: Path) -> list[Cell]:
    """The code cells of a notebook file, checked in size and form."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableNotebook(
                f"{path}: expected a notebook file, found something that is not a plain file"
            )
        if status.st_size > MAX_BYTES:
            raise UnreadableNotebook(
                f"{path}: {status.st_size:,} bytes; at most {MAX_BYTES:,} are judged; "
                "clear the outputs and save it again"
            )
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableNotebook(f"{path}: there is no such file; give the path of an .ipynb file") from error
    except OSError as error:
        raise UnreadableNotebook(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    return [
        cell
        for index, raw_cell in enumerate(_raw_cells(raw, path), 1)
        for cell in _code_cell(raw_cell, index, path)
    ]


def _raw_cells(raw: bytes, path: Path) -> list[Any]:
    try:
        notebook = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "nested too deeply"
        raise UnreadableNotebook(
            f"{path}: expected a notebook in JSON, found something else ({detail})"
        ) from error
    if not isinstance(notebook, dict):
        raise UnreadableNotebook(
            f"{path}: expected a notebook, found JSON of another kind ({type(notebook).__name__})"
        )
    version = notebook.get("nbformat")
    if version != 4:
        raise UnreadableNotebook(
            f"{path}: expected notebook format 4, found {version!r}; open it in JupyterLab and save it, or run "
            f"`jupyter nbconvert --to notebook --inplace {path.name}`"
        )
    cells = notebook.get("cells")
    if not isinstance(cells, list):
        raise UnreadableNotebook(
            f"{path}: expected a list of cells, found none; take a fresh copy of the lesson"
        )
    if len(cells) > MAX_CELLS:
        raise UnreadableNotebook(f"{path}: {len(cells):,} cells; at most {MAX_CELLS:,} are judged")
    return cells


def _code_cell(raw: Any, index: int, path: Path) -> list[Cell]:
    if not isinstance(raw, dict):
        raise UnreadableNotebook(
            f"{path}: cell {index} is not a cell but {type(raw).__name__}; take a fresh copy of the lesson"
        )
    if raw.get("cell_type") != "code":
        return []
    text = raw.get("source", "")
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "".join(text)
    if not isinstance(text, str) or len(text) > MAX_CELL_CHARS:
        raise UnreadableNotebook(
            f"{path}: cell {index} has no text, or over {MAX_CELL_CHARS:,} characters of it"
        )
    metadata = raw.get("metadata")
    grader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = grader.get("grade_id") if isinstance(grader, dict) else None
    # What the file says of points and locks is not believed; only which cell is which exercise's.
    is_answer = isinstance(grade_id, str) and not grade_id.startswith("check_")
    return [Cell(f"cell {index}", text, grade_id if isinstance(grade_id, str) else None, is_answer)]


def topic_of(cells: Sequence[Cell], path: Path) -> str:
    """The lesson a notebook belongs to: the topic of most exercises it names or defines, else its file's name."""
    topics = {name: exercise.parent.name for name, exercise in exercise_paths().items()}
    votes: Counter[str] = Counter()
    for cell in cells:
        names = {cell.grade_id} if cell.is_answer else set()
        votes.update(topics[name] for name in {*names, *_defined(cell.text)} if name in topics)
    if votes:
        return votes.most_common(1)[0][0]
    stem = re.sub(r"^\d\d_", "", path.name.split(".")[0])
    if stem in topics.values():
        return stem
    known = ", ".join(sorted(set(topics.values())))
    raise UnreadableNotebook(
        f"{path}: expected a notebook of a lesson with exercises ({known}), found no exercise in it"
    )


def _defined(text: str) -> list[str]:
    try:
        tree = parse(without_magics(text)[0])
    except UNPARSABLE:
        return []
    return [node.name for node in tree.body if isinstance(node, Definition)]


def lesson_notebook(topic: str) -> Path | None:
    """The student notebook of a lesson, as released; None for exercises that belong to no lesson of the course."""
    from llmcourse import workspace

    try:
        sources = workspace.lesson_sources()
    except workspace.WorkspaceError:
        return None
    return next((paths[0] for name, paths in sources.items() if name[3:] == topic and paths), None)


def lesson_exercises(topic: str) -> list[str]:
    """Names of a lesson's exercises, in the order of its notebook."""
    names = sorted(name for name, path in exercise_paths().items() if path.parent.name == topic)
    released = lesson_notebook(topic)
    if released is None:
        return names
    order = [cell.grade_id for cell in code_cells(released) if cell.is_answer]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def import_cell(topic: str) -> str:
    """The lesson's first code cell, from the released notebook; empty where there is none."""
    released = lesson_notebook(topic)
    cells = code_cells(released) if released is not None else []
    return carried(cells[0])[0] if cells else ""


# ----------------------------------------------------------------------------------------- what of a cell is carried


def without_magics(text: str) -> tuple[str, list[str]]:
    """The text with magics and shell lines replaced by `pass`, line numbers kept; and the lines taken out."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("%%") and not first.startswith(LINE_MAGIC_CELLS):
        return "", [first.strip()]
    dropped: list[str] = []
    matches = [(number, line, MAGIC.match(line)) for number, line in enumerate(lines)]
    inside = _string_lines(text) if any(found for _, _, found in matches) else set()
    for number, line, found in matches:
        if found and number + 1 not in inside:
            dropped.append(line.strip())
            lines[number] = f"{found['indent']}pass"
    return "\n".join(lines), dropped


def _string_lines(text: str) -> set[int]:
    """Lines that continue a string or an expression of a text that is Python as it stands: nothing there is a magic."""
    try:
        tree = parse(text)
    except UNPARSABLE:
        return set()
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr) and node.end_lineno is not None
        for line in range(node.lineno + (0 if isinstance(node, ast.stmt) else 1), node.end_lineno + 1)
    }


def carried(cell: Cell) -> tuple[str, list[str]]:
    """Imports, definitions and literal constants of a learner's own cell, line numbers kept; and notes on the rest."""
    text, magics = without_magics(cell.text)
    notes = [f"{cell.label}: `{line[:60]}` is not run when the notebook is judged" for line in magics]
    try:
        tree = parse(text)
    except UNPARSABLE as error:
        line = getattr(error, "lineno", None)
        place = f" (line {line})" if line else ""
        return "", [*notes, f"{cell.label} is not valid Python{place} and was left out"]
    lines = text.splitlines()
    kept = [""] * len(lines)
    for node in tree.body:
        if is_carried(node):
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            kept[start - 1 : node.end_lineno] = _segment(lines, node, start)
    return "\n".join(kept), notes


def _segment(lines: list[str], node: ast.stmt, start: int) -> list[str]:
    # Statements may share a line (`import os; print(1)`): only this node's own columns are kept.
    end = node.end_lineno or node.lineno
    segment = list(lines[start - 1 : end])
    segment[-1] = segment[-1].encode()[: node.end_col_offset].decode()
    if start == node.lineno:
        segment[0] = (
            segment[0].encode()[node.col_offset :].decode()
            if len(segment) > 1 or node.col_offset
            else segment[0]
        )
    return segment


def is_carried(node: ast.stmt) -> bool:
    """Whether a top-level statement of a learner's own cell runs when the notebook is judged."""
    if isinstance(node, Definition | ast.Import | ast.ImportFrom):
        return True
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    if value is None:
        return False
    try:
        ast.literal_eval(value)
    except UNPARSABLE + (TypeError,):
        return False
    return True


def whole(cell: Cell) -> tuple[str, list[str]]:
    """An exercise cell's whole text, without magics and without calls of `check` and `hint`."""
    text, magics = without_magics(cell.text)
    notes = [f"{cell.label}: `{line[:60]}` is not run when the notebook is judged" for line in magics]
    try:
        tree = parse(text)
    except UNPARSABLE:
        return text, notes  # the worker says what is wrong with it, and where
    lines = text.splitlines()
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in OWN_CALLS:
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "\n".join(lines), notes


def is_stub(text: str, name: str) -> bool:
    """Whether a cell is an exercise's statement as it came and nothing else, whatever its docstrings say."""
    path = exercise_paths()[name]
    released = source.stub(source.definition(path.read_text(encoding="utf-8"), name, path), path)
    return _without_docstrings(text) == _without_docstrings(released)


def _without_docstrings(text: str) -> str | None:
    """The syntax tree of a text, for comparison; None where it is not Python."""
    try:
        tree = parse(text)
    except UNPARSABLE:
        return None
    for node in [each for each in ast.walk(tree) if isinstance(each, Definition)]:
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def carried_names(texts: Iterable[str]) -> set[str]:
    """Names that the rule above would carry from cells of these texts."""
    names: set[str] = set()
    for text in texts:
        try:
            tree = parse(without_magics(text)[0])
        except UNPARSABLE:
            continue
        names.update(name for node in tree.body if is_carried(node) for name in bound_names(node))
    return names
