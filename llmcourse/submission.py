"""A learner's notebook as data: read without running it, and cut into the source a worker may run.

What runs, in order, in one module: the lesson's import cell (the teacher's version); from the learner's own cells
their imports, definitions and literal constants; then the exercise cells. Magics, shell lines and calls of
`check` and `hint` are dropped and named in the notes. No torch is imported for that, so a file that cannot be judged
is refused at once.

Nothing a notebook says of itself is believed but its cells' text and which exercise a cell is of: points, locks,
checksums, kernel, outputs and metadata are not looked at. Of a key that a JSON object has twice the last counts, as
in Jupyter. Where a class is graded, `TeacherNotebook` says what the exercises are. All that is read is bounded: a file
costs the reader some 10 s and 1 GiB at the very most, and raises nothing but UnreadableNotebook.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import stat
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse import source
from llmcourse.finding import exercise_paths
from llmcourse.source import Definition, bound_names, parse

if TYPE_CHECKING:
    from llmcourse.engine import Answer

MAX_BYTES, MAX_CELLS, MAX_NOTES = 20 << 20, 5_000, 200
MAX_BRACKETS = 1_000_000  # lists and objects of the JSON, which take 60 to 230 bytes of memory each
# A syntax tree takes up to 1 kB a character: 200,000 characters are 180 MiB and half a second.
MAX_CELL_CHARS, MAX_CODE_CHARS = 200_000, 1_000_000
MAGIC = re.compile(r"[%!?]|[\w, ]+=\s*[%!]|[\w.]+\?{1,2}\s*$")  # of a line without its indent
LINE_END = re.compile(r"\r\n|\r|\n")  # as Python counts lines; splitlines would also cut strings at U+2028
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what JSON can say and neither UTF-8 nor Python source can hold
OWN_CALLS = ("check", "hint")
LINE_MAGIC_CELLS = ("%%time", "%%timeit", "%%capture", "%%prun")
UNPARSABLE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)


class UnreadableNotebook(Exception):
    """A file that cannot be judged: one line that says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Cell:
    """A cell: its label ("cell 7", counted as JupyterLab shows them), its text, its nbgrader id if it has one.

    kind: as nbformat has it, "" where the file says nothing sensible. mended: the text held what is no text.
    """

    label: str
    text: str
    grade_id: str | None
    is_answer: bool
    kind: str = "code"
    mended: bool = False


@dataclass(frozen=True)
class TeacherNotebook:
    """What the teacher's version of a notebook settles for every student's, whatever theirs say.

    names: exercises in its order, of one topic or of several. imports: what is carried of its first code cell.
    manual: ids of the answer cells that are no exercise of the course, so that a person grades them. locked: text of
    the cells a student may not edit, by id. texts: of all its code cells, to tell a student's own cells from them.
    """

    names: tuple[str, ...]
    imports: str = ""
    manual: tuple[str, ...] = ()
    locked: dict[str, str] = field(default_factory=dict)
    texts: tuple[str, ...] = ()  # no set: its order, and so its repr, differs between processes

    @staticmethod
    def from_path(path: Path) -> TeacherNotebook:
        """Read the teacher's notebook, source or release; UnreadableNotebook when it is none."""
        raws, _ = _raw_cells(_content(path), path)
        cells = [_cell(raw, index, path) for index, raw in enumerate(raws, 1)]
        code = [cell for cell in cells if cell.kind == "code"]
        known = exercise_paths()
        settings = {
            cell.grade_id: (cell, raw["metadata"]["nbgrader"])
            for cell, raw in zip(cells, raws, strict=True)
            if cell.grade_id
        }
        names = [name for name, (cell, _) in settings.items() if name in known and cell.kind == "code"]
        manual = [
            name for name, (_, flags) in settings.items() if flags.get("solution") and name not in names
        ]
        settled = {*names, *manual}
        return TeacherNotebook(
            names=tuple(names),
            imports=carried(code[0])[0] if code else "",
            manual=tuple(manual),
            locked={
                name: cell.text
                for name, (cell, flags) in settings.items()
                if cell.kind == "code" and (flags.get("locked") or flags.get("grade")) and name not in settled
            },
            texts=tuple(cell.text.strip() for cell in code),
        )


@dataclass(frozen=True)
class Submission:
    """A notebook's answers: the lesson's topic, the names to judge, the parts that run, what was left out.

    answers: source of the exercise cells as the learner wrote it, and of cells that a person grades, by id. helpers:
    (label, carried text, the exercise whose cell comes next or "") of the learner's own cells.
    """

    path: Path
    topic: str
    names: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    own: dict[str, str]
    notes: tuple[str, ...]
    answers: dict[str, str] = field(default_factory=dict)
    helpers: tuple[tuple[str, str, str], ...] = ()

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
    return read_bytes(_content(path), path)


def read_bytes(raw: bytes, path: Path, teacher: TeacherNotebook | None = None) -> Submission:
    """Read a notebook from its content; UnreadableNotebook when it cannot be judged.

    path: what the content is called in messages; nothing is opened. teacher: what the exercises are; without it
    they are those of the lesson that most of the notebook's cells belong to.
    """
    with warnings.catch_warnings(action="ignore"):  # of Python, on a learner's source: `"\d"`
        raws, notes = _raw_cells(raw, path)
        cells = [_cell(raw_cell, index, path) for index, raw_cell in enumerate(raws, 1)]
        _refuse_too_much_code(cells, path)
        if teacher is None:
            topic = topic_of([cell for cell in cells if cell.kind == "code"], path)
            teacher = TeacherNotebook(tuple(lesson_exercises(topic)), import_cell(topic))
        else:
            paths = exercise_paths()
            topics = Counter(paths[name].parent.name for name in teacher.names)
            topic = topics.most_common(1)[0][0] if topics else ""
        parts, helpers, own_notes = _own_cells(cells, teacher)
        answer_parts, answers, own, answer_notes = _exercise_cells(cells, teacher)
        manual, manual_notes = _manual_cells(cells, teacher)
    notes += own_notes + answer_notes + manual_notes
    notes += [
        f"{cell.label}: characters that are no text were replaced by \N{REPLACEMENT CHARACTER}"
        for cell in cells
        if cell.mended
    ]
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"and {len(notes) - MAX_NOTES:,} more notes like these"]
    return Submission(
        path,
        topic,
        teacher.names,
        (*parts, *answer_parts),
        own,
        tuple(notes),
        answers | manual,
        tuple(helpers),
    )


def _is_of_exercise(cell: Cell, teacher: TeacherNotebook) -> bool:
    return cell.kind == "code" and cell.is_answer and cell.grade_id in teacher.names


Parts = list[tuple[str, str]]


def _own_cells(
    cells: Sequence[Cell], teacher: TeacherNotebook
) -> tuple[Parts, list[tuple[str, str, str]], list[str]]:
    """What runs before the exercise cells: the teacher's parts, then what is carried; the helpers; and notes."""
    parts, helpers, notes = Parts(), list[tuple[str, str, str]](), list[str]()
    if teacher.imports:
        parts.append(("the lesson's imports", teacher.imports))
    for name, text in teacher.locked.items():
        kept = carried(Cell(f"the lesson's cell {name}", text, name, False))[0]
        if kept.strip():
            parts.append((f"the lesson's cell {name}", kept))
    for cell, following in zip(cells, _following(cells, teacher), strict=True):
        if cell.kind != "code" or _is_of_exercise(cell, teacher):
            continue
        if cell.grade_id in teacher.locked:
            if cell.text.strip() != teacher.locked[cell.grade_id].strip():
                notes.append(
                    f"{cell.label}: {cell.grade_id} is a locked cell and was edited; the teacher's version counts"
                )
            continue
        if len(cell.text) > MAX_CELL_CHARS:
            notes.append(_too_long(cell))
            continue
        text, dropped = carried(cell)
        is_teachers = cell.text.strip() in teacher.texts
        if not is_teachers:
            notes += dropped
        if text.strip():
            parts.append((cell.label, text))
            if not is_teachers and cell.grade_id not in teacher.manual:
                helpers.append((cell.label, text.strip("\n"), following))
    return parts, helpers, notes


def _following(cells: Sequence[Cell], teacher: TeacherNotebook) -> list[str]:
    """For each cell the exercise whose cell comes next, "" after the last."""
    found: list[str] = []
    name = ""
    for cell in reversed(cells):
        if _is_of_exercise(cell, teacher):
            name = cell.grade_id or ""
        found.append(name)
    return found[::-1]


def _exercise_cells(
    cells: Sequence[Cell], teacher: TeacherNotebook
) -> tuple[Parts, dict[str, str], dict[str, str], list[str]]:
    """The exercise cells: parts that run, text as written by name, label by name, notes."""
    parts, answers, own, notes = Parts(), dict[str, str](), dict[str, str](), list[str]()
    for cell in cells:
        name = cell.grade_id
        if name is None or name not in teacher.names or not cell.is_answer:
            continue
        if cell.kind != "code":
            notes.append(f"{cell.label}: the cell of {name} is no code cell any more, and is not run")
            continue
        if len(cell.text) > MAX_CELL_CHARS:
            notes.append(_too_long(cell))
            answers.setdefault(name, _shortened(cell.text))
            continue
        text, dropped = whole(cell)
        notes += dropped
        earlier = own.get(name)
        if earlier is not None:
            both = f"{earlier} and {cell.label} are both the cell of {name}"
            if is_stub(text, name):
                notes.append(f"{both}; {cell.label} is not written yet, so {earlier} counts")
                continue
            notes.append(f"{both}; the later one counts")
        parts.append((cell.label, text))
        own[name] = cell.label
        answers[name] = cell.text
    notes += [
        f"the cell of {name} is gone; an answer of that name anywhere else counts"
        for name in teacher.names
        if name not in answers
    ]
    return parts, answers, own, notes


def _manual_cells(cells: Sequence[Cell], teacher: TeacherNotebook) -> tuple[dict[str, str], list[str]]:
    """Text of the cells that a person grades, by id, and notes; of two the later one that is not empty counts."""
    answers, labels, notes = dict[str, str](), dict[str, str](), list[str]()
    for cell in cells:
        name = cell.grade_id
        if name is None or name not in teacher.manual or (name in answers and not cell.text.strip()):
            continue
        if name in answers:
            notes.append(f"{labels[name]} and {cell.label} are both the cell of {name}; the later one counts")
        answers[name], labels[name] = _shortened(cell.text), cell.label
    notes += [f"the cell of {name} is gone" for name in teacher.manual if name not in answers]
    return answers, notes


def _too_long(cell: Cell) -> str:
    return f"{cell.label} has over {MAX_CELL_CHARS:,} characters and was left out"


def _shortened(text: str) -> str:
    """What is shown of a cell's text; nothing of that length is run."""
    left = len(text) - MAX_CELL_CHARS
    return (
        text if left <= 0 else f"{text[:MAX_CELL_CHARS]}\n# ... and {left:,} characters more, left out here"
    )


def one_line(text: str, limit: int = 60) -> str:
    """The start of a text of unknown origin, for a message: printable, in one line, cut at `limit` characters."""
    cut = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


# ----------------------------------------------------------------------------------------------------- the file


def code_cells(path: Path) -> list[Cell]:
    """The code cells of a notebook file, checked in size and form."""
    raws, _ = _raw_cells(_content(path), path)
    cells = [_cell(raw, index, path) for index, raw in enumerate(raws, 1)]
    return [cell for cell in cells if cell.kind == "code"]


def _content(path: Path) -> bytes:
    """The content of a learner's own file, at most one byte more than is judged."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableNotebook(
                f"{path}: expected a notebook file, found something that is not a plain file"
            )
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UnreadableNotebook(f"{path}: there is no such file; give the path of an .ipynb file") from error
    except OSError as error:
        raise UnreadableNotebook(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def _raw_cells(raw: bytes, path: Path) -> tuple[list[Any], list[str]]:
    """The cells of a notebook as JSON has them, of any kind and type, and notes."""
    if len(raw) > MAX_BYTES:
        raise UnreadableNotebook(
            f"{path}: more than {MAX_BYTES:,} bytes, which is all that is judged; "
            "clear the outputs and save it again"
        )
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise UnreadableNotebook(
            f"{path}: its JSON has more than {MAX_BRACKETS:,} lists and objects, which is all that is judged; "
            "clear the outputs and save it again"
        )
    notebook, notes = _parsed(raw, path)
    if not isinstance(notebook, dict):
        raise UnreadableNotebook(
            f"{path}: expected a notebook, found JSON of another kind ({type(notebook).__name__})"
        )
    version = notebook.get("nbformat")
    if version != 4:
        plain = isinstance(version, int | float | str | None)
        found = one_line(repr(version), 20) if plain else f"a {type(version).__name__}"
        raise UnreadableNotebook(
            f"{path}: expected notebook format 4, found {found}; open it in JupyterLab and save it, or run "
            f"`jupyter nbconvert --to notebook --inplace {path.name}`"
        )
    cells = notebook.get("cells")
    if not isinstance(cells, list):
        raise UnreadableNotebook(
            f"{path}: expected a list of cells, found none; take a fresh copy of the lesson"
        )
    if len(cells) > MAX_CELLS:
        raise UnreadableNotebook(f"{path}: {len(cells):,} cells; at most {MAX_CELLS:,} are judged")
    return cells, notes


def _parsed(raw: bytes, path: Path) -> tuple[Any, list[str]]:
    notes = []
    if raw.startswith(b"\xef\xbb\xbf"):
        notes.append("the file starts with a byte-order mark, which was skipped")
    try:
        return json.loads(raw.decode("utf-8-sig")), notes
    except (ValueError, RecursionError) as error:
        detail = one_line(str(error), 120)
        if isinstance(error, RecursionError):
            detail = "nested too deeply"
        elif raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            detail = "it is UTF-16; open it in JupyterLab and save it as UTF-8"
        raise UnreadableNotebook(
            f"{path}: expected a notebook in JSON, found something else ({detail})"
        ) from error


def _cell(raw: Any, index: int, path: Path) -> Cell:
    if not isinstance(raw, dict):
        raise UnreadableNotebook(
            f"{path}: cell {index} is not a cell but {type(raw).__name__}; take a fresh copy of the lesson"
        )
    kind = raw.get("cell_type")
    text = raw.get("source", "")
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "".join(text)
    if not isinstance(text, str):
        if kind == "code":
            raise UnreadableNotebook(
                f"{path}: cell {index} has no text but {type(text).__name__}; take a fresh copy of the lesson"
            )
        text = ""
    metadata = raw.get("metadata")
    grader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = grader.get("grade_id") if isinstance(grader, dict) else None
    # What the file says of points and locks is not believed; only which cell is which exercise's.
    is_answer = isinstance(grade_id, str) and not grade_id.startswith("check_")
    return Cell(
        f"cell {index}",
        NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text),
        grade_id if isinstance(grade_id, str) else None,
        is_answer,
        kind if isinstance(kind, str) else "",
        NO_TEXT.search(text) is not None,
    )


def _refuse_too_much_code(cells: Sequence[Cell], path: Path) -> None:
    texts = [cell.text for cell in cells if cell.kind == "code" and len(cell.text) <= MAX_CELL_CHARS]
    if (total := sum(map(len, texts))) > MAX_CODE_CHARS:
        raise UnreadableNotebook(
            f"{path}: {total:,} characters of code; at most {MAX_CODE_CHARS:,} are judged; "
            "take out cells that are no answers"
        )


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
    if len(text) > MAX_CELL_CHARS:
        return []
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
    lines = LINE_END.split(text)
    if not lines[-1]:
        del lines[-1]
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("%%") and not first.startswith(LINE_MAGIC_CELLS):
        return "", [first.strip()]
    dropped: list[str] = []
    magics = [number for number, line in enumerate(lines) if MAGIC.match(line.lstrip())]
    inside = _string_lines(text) if magics else set()
    for number in magics:
        if number + 1 not in inside:
            line = lines[number]
            dropped.append(line.strip())
            lines[number] = f"{line[: len(line) - len(line.lstrip())]}pass"
    return "\n".join(lines), dropped


def _string_lines(text: str) -> set[int]:
    """Lines that continue a string or an expression of a text that is Python as it stands: nothing there is a magic."""
    try:
        tree = parse(text)
    except UNPARSABLE:
        return set()
    spans = Counter[
        int
    ]()  # +1 where a node starts, -1 after its end: a deep tree has many nodes of many lines
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and node.end_lineno is not None:
            spans[node.lineno + (0 if isinstance(node, ast.stmt) else 1)] += 1
            spans[node.end_lineno + 1] -= 1
    changes = [spans[line] for line in range(max(spans, default=0) + 1)]
    return {line for line, depth in enumerate(accumulate(changes)) if depth > 0}


def carried(cell: Cell) -> tuple[str, list[str]]:
    """Imports, definitions and literal constants of a learner's own cell, line numbers kept; and notes on the rest."""
    text, magics = without_magics(cell.text)
    notes = [f"{cell.label}: `{one_line(line)}` is not run when the notebook is judged" for line in magics]
    try:
        tree = parse(text)
    except UNPARSABLE as error:
        line = getattr(error, "lineno", None)
        place = f" (line {line})" if line else ""
        return "", [*notes, f"{cell.label} is not valid Python{place} and was left out"]
    lines = [line.encode() for line in text.split("\n")]
    kept: list[list[bytes]] = [[] for _ in lines]
    for node in tree.body:
        if is_carried(node):
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            for number, piece in enumerate(_segment(lines, node, start), start - 1):
                kept[number].append(piece)
    return "\n".join(b"; ".join(pieces).decode() for pieces in kept), notes


def _segment(lines: list[bytes], node: ast.stmt, start: int) -> list[bytes]:
    # Statements may share a line (`import os; print(1)`): only this node's own columns (bytes of UTF-8) are kept.
    segment = lines[start - 1 : node.end_lineno]
    first_column = node.col_offset if start == node.lineno else 0
    if len(segment) == 1:
        return [segment[0][first_column : node.end_col_offset]]
    return [segment[0][first_column:], *segment[1:-1], segment[-1][: node.end_col_offset]]


def is_carried(node: ast.stmt) -> bool:
    """Whether a top-level statement of a learner's own cell runs when the notebook is judged."""
    if isinstance(node, Definition | ast.Import | ast.ImportFrom):
        return True
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    if value is None:
        return False
    try:
        ast.literal_eval(value)
    except (*UNPARSABLE, TypeError):
        return False
    return True


def whole(cell: Cell) -> tuple[str, list[str]]:
    """An exercise cell's whole text, without magics and without calls of `check` and `hint`."""
    text, magics = without_magics(cell.text)
    notes = [f"{cell.label}: `{one_line(line)}` is not run when the notebook is judged" for line in magics]
    try:
        tree = parse(text)
    except UNPARSABLE:
        return text, notes  # the worker says what is wrong with it, and where
    lines = text.split("\n")
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in OWN_CALLS:
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "\n".join(lines), notes


def is_stub(text: str, name: str) -> bool:
    """Whether a cell is an exercise's statement as it came and nothing else, whatever its docstrings say."""
    path = exercise_paths()[name]
    return _without_docstrings(text) == _statement(path.read_text(encoding="utf-8"), name, path)


@functools.lru_cache(maxsize=64)
def _statement(text: str, name: str, path: Path) -> str | None:
    """The tree of the statement in an exercise's file; kept, for a notebook with one cell a thousand times."""
    return _without_docstrings(source.stub(source.definition(text, name, path), path))


def _without_docstrings(text: str) -> str | None:
    """The syntax tree of a text, for comparison; None where it is not Python, or is none that can be written out."""
    try:
        tree = parse(text)
        for node in [each for each in ast.walk(tree) if isinstance(each, Definition)]:
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        return ast.dump(tree)
    except UNPARSABLE:
        return None


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
