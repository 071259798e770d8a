"""What a notebook may show: an exercise's text, the lines no student may be given, outputs fit to be committed.

`read_exercise` cuts an exercise's file into what the notebooks need, without importing it. `leaks` looks for the
solution's lines in a student notebook, `unclean` for outputs that would differ on another machine or fail a grader.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse import source

SHORTEST_LEAK = 12  # characters; shorter lines are `return x` and the like, which say nothing
LARGEST_NOTEBOOK_BYTES = 1_000_000
GRADE_ID_LIMIT = 64  # nbformat's bound on a cell id, which an exercise's check cell shares
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
OBJECT_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{4,}")


class LessonError(ValueError):
    """Something an author has to mend: the file, the line, what was expected, what to do."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        super().__init__(f"{shown(path)}:{line}: {message}")


def shown(path: Path) -> str:
    """The path as a person would type it: relative where it lies under the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@dataclass(frozen=True)
class ExerciseText:
    """An exercise as a notebook shows it. `secrets` are the lines of the reference and of the alternatives."""

    name: str
    path: Path
    line: int
    points: float
    minutes: int
    extension: bool
    has_hints: bool
    definition: str
    stub: str
    secrets: tuple[str, ...]


def read_exercise(path: Path) -> ExerciseText:
    """Cut an exercise's file; LessonError with its line when it is not `@exercise(...)` on a name like the file's."""
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise LessonError(path, error.lineno or 1, f"not Python: {error.msg}") from error
    name = path.stem
    node, decorator = _decorated(tree, path)
    options = {keyword.arg: keyword.value for keyword in decorator.keywords if keyword.arg}
    if len(f"check_{name}") > GRADE_ID_LIMIT:
        raise LessonError(
            path, node.lineno, f"the name {name} has over {GRADE_ID_LIMIT - 6} characters; shorten it"
        )
    definition = source.definition(text, name, path)
    return ExerciseText(
        name=name,
        path=path,
        line=node.lineno,
        points=float(_literal(options, "points", (int, float), path, decorator)),
        minutes=_literal(options, "minutes", (int,), path, decorator),
        extension=_literal(options, "extension", (bool,), path, decorator, default=False),
        has_hints="hints" in options,
        definition=definition,
        stub=_stub(definition, path, node.lineno),
        secrets=(*_reference_lines(definition), *_alternative_lines(tree, text.splitlines())),
    )


def _decorated(tree: ast.Module, path: Path) -> tuple[source.Definition, ast.Call]:
    for node in tree.body:
        if isinstance(node, source.Definition) and node.name == path.stem:
            for decorator in node.decorator_list:
                if _called(decorator) == "exercise":
                    assert isinstance(decorator, ast.Call)
                    return node, decorator
            raise LessonError(path, node.lineno, f"{node.name} has no @exercise(points=…, minutes=…); add it")
    raise LessonError(
        path,
        1,
        f"no top-level function or class is named {path.stem}; the file and its exercise share one name",
    )


def _called(decorator: ast.expr) -> str | None:
    if not isinstance(decorator, ast.Call):
        return None
    function = decorator.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)


def _literal(
    options: dict[str, ast.expr],
    name: str,
    kinds: tuple[type, ...],
    path: Path,
    decorator: ast.Call,
    default: Any = None,
) -> Any:
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if name not in options:
        if default is None:
            raise LessonError(path, decorator.lineno, f"@exercise has no {name}; add {name}=<{wanted}>")
        return default
    value = options[name]
    try:
        found = ast.literal_eval(value)
    except ValueError:
        found = None
    if type(found) not in kinds or (kinds != (bool,) and found <= 0):
        raise LessonError(
            path, value.lineno, f"@exercise({name}={ast.unparse(value)}): expected a literal {wanted} above 0"
        )
    return found


def _stub(definition: str, path: Path, line: int) -> str:
    try:
        stub = source.stub(definition, path)
    except source.SourceError as error:
        raise LessonError(path, line, str(error).removeprefix(f"{path}: ")) from error
    if source.BEGIN not in definition:
        raise LessonError(path, line, f"no solution is marked; put {source.BEGIN} and {source.END} around it")
    try:
        ast.parse(stub)
    except SyntaxError as error:
        at = line + (error.lineno or 1) - 1
        message = f"without its solution this is not Python ({error.msg}); move the markers"
        raise LessonError(path, at, message) from error
    return stub


def _reference_lines(definition: str) -> Iterator[str]:
    inside = False
    for line in definition.splitlines():
        if line.strip() in (source.BEGIN, source.END):
            inside = line.strip() == source.BEGIN
        elif inside:
            yield line


def _alternative_lines(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, source.Definition) and any(
            _called(d) == "alternative" for d in node.decorator_list
        ):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
                yield from lines[first - 1 : node.end_lineno]


# ------------------------------------------------------------------------------------------------------- the scan


@functools.lru_cache(maxsize=512)
def telling_lines(exercise: ExerciseText) -> tuple[str, ...]:
    """The secret lines that would tell a student something: long enough, not an import, not in the statement."""
    statement = _one_spaced(exercise.stub)
    found: dict[str, None] = {}
    for line in map(_one_spaced, exercise.secrets):
        imports = line.startswith(("import ", "from "))
        if len(line) >= SHORTEST_LEAK and not imports and not _holds(statement, line):
            found[line] = None
    return tuple(found)


def leaks(notebook: Any, exercises: Iterable[ExerciseText]) -> list[tuple[str, str]]:
    """(cell id, message) for every line of a reference or an alternative that a student notebook shows.

    A line that a statement of any exercise shows is not one of them.
    """
    cells = [
        (cell["id"], [_one_spaced(line) for line in cell["source"].splitlines()])
        for cell in notebook["cells"]
    ]
    everything = "\n".join(line for _, lines in cells for line in lines)
    found = []
    exercises = list(exercises)
    # What a statement of the course shows as a line of its own (`def step(self):`) or names is nobody's secret.
    public = "\n".join(_one_spaced(line) for exercise in exercises for line in exercise.stub.splitlines())
    for exercise in exercises:
        for secret in telling_lines(exercise):
            if secret not in everything or _holds(public, secret):
                continue
            for cell_id, lines in cells:
                if any(_holds(line, secret) for line in lines):
                    where = f"{shown(exercise.path)} ({exercise.name})"
                    found.append(
                        (cell_id, f"shows `{secret}`, a line of the solution or an alternative in {where}")
                    )
    return found


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


def _holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text` as whole words."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


# ----------------------------------------------------------------------------------------------------- the outputs


def unclean(notebook: Any, exercises: Mapping[str, ExerciseText]) -> list[tuple[str | None, str]]:
    """(cell id, message) for every output that must not be committed; None as cell where it is the whole notebook.

    exercises, by name, tell how many points each check cell must show: the reference earns them all.
    """
    found: list[tuple[str | None, str]] = []
    if "widgets" in notebook["metadata"]:
        found.append((None, "holds widget state, which changes at every run; build it with `make notebooks`"))
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for expected, cell in enumerate(code_cells, 1):
        count = cell["execution_count"]
        if count != expected:
            found.append(
                (cell["id"], f"execution count {count}, expected {expected}: run from top to bottom, once")
            )
        found += [(cell["id"], problem) for output in cell["outputs"] for problem in _unclean_output(output)]
        checked = exercises.get(cell["id"].removeprefix("check_"))
        if (
            checked is not None
            and cell["id"] != checked.name
            and (problem := _unearned(cell, checked.points))
        ):
            found.append((cell["id"], problem))
    return found


def _unclean_output(output: Any) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"raised {output['ename']}: {output['evalue']}; an exhibit catches it and prints one line"
        return
    if output["output_type"] == "stream" and output["name"] == "stderr":
        yield f"wrote to stderr: {_first_line(output['text'])}; remove the cause, or print what matters"
    data = output.get("data", {})
    texts = [output.get("text", ""), *(value for kind, value in data.items() if kind.startswith("text/"))]
    for text in map(_joined, texts):
        if address := OBJECT_ADDRESS.search(text):
            yield f"shows an object's address ({address.group()}); print what the object holds instead"
        if folder := next((folder for folder in private_folders() if folder in text), None):
            yield f"shows a path under {folder}; print the file's name instead"
    if WIDGET_VIEW in data:
        yield "holds a widget, which nobody can move in a file; show a static figure beside it"
    for kind in data:
        if kind.startswith("image/") and kind != "image/png":
            yield f"holds {kind}; expected image/png"


def _unearned(cell: Any, expected: float) -> str | None:
    """What is wrong when a check cell does not show all the points of its exercise."""
    results = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
    text = _joined(results[-1].get("text/plain", "")) if results else "no result"
    try:
        earned = float(text)
    except ValueError:
        earned = float("nan")
    if abs(earned - expected) < 1e-6:
        return None
    return f"the reference earned {_first_line(text)} of {expected:g} points; run `llmcourse audit` on the exercise"


@functools.cache
def private_folders() -> tuple[str, ...]:
    """Folders whose names say whose machine it was; with a trailing slash, so that `/tmpfs` is none."""
    own = {str(Path.home()), tempfile.gettempdir(), os.path.realpath(tempfile.gettempdir())}
    usual = {"/home", "/Users", "/root", "/tmp", "/var/folders", "/private/var"}
    return tuple(sorted(f"{folder.rstrip('/')}/" for folder in own | usual if folder.rstrip("/")))


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _first_line(text: str | list[str]) -> str:
    return (_joined(text).strip().splitlines() or ["nothing"])[0]
