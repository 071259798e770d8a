"""What a class gets: one zip with the student notebook and a package of this course that holds no answers.

    shaped = shape("01", name="week_2", only=["parameter_count", "plan_load"])       # see llmcourse.shaping
    write(shaped)                                    # notebooks/week_2/week_2.ipynb of the current folder
    packed = pack("week_2", due=datetime(2026, 12, 4, 18))                           # week_2-kit.zip

    week_2/README.md
    week_2/week_2.ipynb
    week_2/package/pyproject.toml
    week_2/package/llmcourse/...                     of this package what the notebook, `check` and the command need,
                                                     and of its lessons only the exercises of the notebook

Each of those exercises keeps its statement, cases and costs, and the one-sentence description of every known mistake.
Reference, alternatives, the code of the mistakes (a mistake is mostly the reference with one step changed) and the
baseline of a race are left out, and so are all other lessons and `solutions/`. `check` in a kit compares with what
reference and mistakes gave on a few seeds, stored beside each exercise (see llmcourse.observations).

So a determined student can read the expected values of these seeds out of a kit, and write an answer that knows them.
It earns nothing: the teacher's grader draws a secret seed of its own and runs the full package. Never give that seed to
`pack`. A race cannot be run in a kit; `check` says so, and the grader races it.
"""

from __future__ import annotations

import ast
import io
import json
import re
import secrets
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llmcourse
from llmcourse import observations, source, submission, workspace
from llmcourse.exercise import Exercise, find
from llmcourse.finding import exercise_paths
from llmcourse.leaks import leaks, read_exercise
from llmcourse.notebook import replace_file
from llmcourse.shaping import Shaped, ShapeError, answers_in, shape, write

__all__ = ["KitError", "Packed", "ShapeError", "Shaped", "deadline_command", "pack", "shape", "write"]

DEFAULT_SEEDS = 3
LARGEST_SEED = (1 << 31) - 1
EARLIEST = (1980, 1, 1, 0, 0, 0)  # a zip's first date: the same content gives the same bytes
DATA = ("checkpoints/**/*", "*.json")  # of the package
NEEDED_ALWAYS = ("cli", "checking", "observations", "report", "workspace")
LEAVES_NO_ANSWER = "raise NotImplementedError"


class KitError(ValueError):
    """A kit that cannot be packed: what was expected, what was found, what to do, in one line."""


@dataclass(frozen=True)
class Packed:
    """A kit: where it lies, what is in it, its seeds, how large the stored observations are by exercise, and notes."""

    path: Path
    name: str
    exercises: tuple[str, ...]
    seeds: tuple[int, ...]
    size_bytes: int
    observations_bytes: Mapping[str, int]
    notes: tuple[str, ...] = ()


def pack(
    which: str,
    target: Path | None = None,
    *,
    seeds: Sequence[int] | int = DEFAULT_SEEDS,
    due: datetime | None = None,
    folder: Path | None = None,
    force: bool = False,
    done: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write the kit of a lesson, or of a teacher's version of one, and say what is in it.

    which: a name under `notebooks/` of the folder (the current one), else a lesson of the course. target: the zip,
    `NAME-kit.zip` in the folder unless given. seeds: how many to draw, or which; with the same ones, and the same
    course on the same machine, the bytes are the same, but for counts of memory, which no two runs share. due: told
    in the README, and `notes` holds the command that writes it into nbgrader's gradebook. done(finished, of) follows
    each exercise and seed. KitError, WorkspaceError or HarnessFault in one line; nothing is half-written.
    """
    here = folder or Path.cwd()
    drawn = _seeds(seeds)
    name, notebooks = _notebooks(which, here)
    path = target if target is not None else here / f"{name}-kit.zip"
    exercises = _exercises(notebooks)
    stored: dict[tuple[str, int], bytes] = {}
    for exercise in exercises:
        for seed in drawn:
            stored[exercise.name, seed] = observations.to_bytes(observations.record(exercise, seed))
            if done is not None:
                done(len(stored), len(exercises) * len(drawn))
    files = _files(name, notebooks, exercises, stored, due)
    content = zipped(files)
    if path.exists() and not force and path.read_bytes() != content:
        raise KitError(
            f"{path} is there already and differs; name another file, or say --force to replace it"
        )
    replace_file(path, content)
    sizes = {exercise.name: sum(len(stored[exercise.name, seed]) for seed in drawn) for exercise in exercises}
    names = tuple(exercise.name for exercise in exercises)
    return Packed(path, name, names, drawn, len(content), sizes, tuple(_notes(name, exercises, due)))


def deadline_command(name: str, due: datetime) -> str:
    """The nbgrader command that writes an assignment's deadline into the gradebook, or changes it there.

    A moment without a zone is one of this computer's. To be run in the folder of nbgrader_config.py.
    """
    moment = due.astimezone(UTC)
    return f'nbgrader db assignment add {name} --duedate="{moment:%Y-%m-%d %H:%M:%S} UTC"'


def _notes(name: str, exercises: Sequence[Exercise], due: datetime | None) -> list[str]:
    raced = [exercise.name for exercise in exercises if exercise.race is not None]
    notes = [
        f"{one} has a race, which only the grader runs: a kit holds nothing to race against" for one in raced
    ]
    if due is not None:
        notes.append(f"to set the deadline in the gradebook: {deadline_command(name, due)}")
    return notes


# ----------------------------------------------------------------------------------------------------- what is asked


def _seeds(wanted: Sequence[int] | int) -> tuple[int, ...]:
    """Seeds in order, each once; KitError for none, or for a number that is no seed."""
    if isinstance(wanted, int):
        if wanted < 1:
            raise KitError(f"{wanted} seeds; expected at least 1, since `check` compares with what is stored")
        found: set[int] = set()
        while len(found) < wanted:
            found.add(secrets.randbelow(LARGEST_SEED))
        return tuple(sorted(found))
    bad = [seed for seed in wanted if not 0 <= seed <= LARGEST_SEED]
    if bad or not wanted:
        raise KitError(f"the seeds {list(wanted)}; expected one or more whole numbers of 0 to {LARGEST_SEED}")
    return tuple(sorted(set(wanted)))


def _notebooks(which: str, folder: Path) -> tuple[str, dict[str, bytes]]:
    """(name, {file name: bytes}) of a teacher's version in the folder, else of a lesson of the course."""
    own = sorted((folder / "notebooks" / which).glob("*.ipynb")) if which not in ("", ".", "..") else []
    if own:
        return which, {path.name: path.read_bytes() for path in own}
    name = workspace.lesson_name(which)
    return name, {path.name: path.read_bytes() for path in workspace.lesson_sources()[name]}


def _exercises(notebooks: Mapping[str, bytes]) -> list[Exercise]:
    """The exercises that the notebooks have cells for; KitError where there are none, or no answers to record."""
    import nbformat

    paths = exercise_paths()
    names: dict[str, None] = {}
    for file, content in notebooks.items():
        try:
            notebook = nbformat.reads(content.decode(), as_version=nbformat.NO_CONVERT)
        except (ValueError, nbformat.ValidationError) as error:
            raise KitError(
                f"{file}: expected a notebook, found: {str(error).splitlines()[0]}; build it again"
            ) from error
        names.update(dict.fromkeys(answers_in(notebook)))
    unknown = [name for name in names if name not in paths]
    if unknown:
        raise KitError(
            f"no exercise is named {unknown[0]!r}; set LLMCOURSE_LESSONS to the folder that holds topic/{unknown[0]}.py"
        )
    if not names:
        raise KitError(
            f"{', '.join(notebooks)}: expected exercises, found none; there is nothing to check in a kit"
        )
    found = [find(name) for name in names]
    stripped = [exercise.name for exercise in found if observations.seeds(exercise)]
    if stripped:
        raise KitError(
            f"this is a kit itself: it holds no answer of {stripped[0]}; pack from the full course"
        )
    return found


# --------------------------------------------------------------------------------------------------- what is packed


def _files(
    name: str,
    notebooks: Mapping[str, bytes],
    exercises: Sequence[Exercise],
    stored: Mapping[tuple[str, int], bytes],
    due: datetime | None,
) -> dict[str, bytes]:
    """Every file of the kit; KitError where a notebook shows a line of an answer."""
    _demand_no_leak(notebooks, exercises)
    made = dict(notebooks)
    made["README.md"] = _readme(name, sorted(notebooks)[0], due).encode()
    made["package/pyproject.toml"] = _pyproject().encode()
    lessons = "package/llmcourse/lessons"
    made[f"{lessons}/__init__.py"] = b""
    for exercise in exercises:
        made[f"{lessons}/{exercise.topic}/__init__.py"] = b""
        made[f"{lessons}/{exercise.topic}/{exercise.name}.py"] = without_answers(exercise).encode()
    for (exercise_name, seed), content in stored.items():
        exercise = next(one for one in exercises if one.name == exercise_name)
        made[f"{lessons}/{exercise.topic}/{observations.place(exercise, seed).name}"] = content
    if re.fullmatch(r"[0-9][0-9]_.*", name):  # so that `llmcourse lab` and `reset` find the lesson
        made |= {f"package/llmcourse/notebooks/{name}/{file}": each for file, each in notebooks.items()}
    code = [
        *_code_cells(notebooks),
        *(content.decode() for file, content in made.items() if file.endswith(".py")),
    ]
    package = workspace.PACKAGE
    found = [package / "__init__.py", *(package / f"{module}.py" for module in _needed(code))]
    found += [path for pattern in DATA for path in package.glob(pattern) if path.is_file()]
    made |= {f"package/llmcourse/{path.relative_to(package).as_posix()}": path.read_bytes() for path in found}
    return {f"{name}/{file}": content for file, content in made.items()}


def _code_cells(notebooks: Mapping[str, bytes]) -> list[str]:
    """The code cells of notebooks as Python, without magics."""
    cells = [cell for content in notebooks.values() for cell in json.loads(content)["cells"]]
    code = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return [submission.without_magics(text)[0] for text in code]


def _needed(code: Sequence[str]) -> set[str]:
    """Modules of this package that some code imports, directly or through one another, and those a kit always has."""
    texts, queue = list(code), list(NEEDED_ALWAYS)
    needed: set[str] = set()
    while texts or queue:
        queue += [module for text in texts for module in _imported(text)]
        texts = []
        module = queue.pop() if queue else ""
        path = workspace.PACKAGE / f"{module}.py"
        if module not in needed and path.is_file():
            needed.add(module)
            texts.append(path.read_text(encoding="utf-8"))
    return needed


def _imported(text: str) -> Iterator[str]:
    """First names under `llmcourse` that some code imports, anywhere in it; nothing of what is not Python."""
    try:
        tree = source.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in names:
            first, *rest = f"{before}{name}".split(".")
            if first == "llmcourse" and rest:
                yield rest[0]


def without_answers(exercise: Exercise) -> str:
    """The exercise's file as a kit holds it: statement, cases, costs and what these reach, the mistakes' sentences.

    Comments go too. SourceError where a case reaches an alternative by name.
    """
    text, path, name = exercise.source, exercise.path, exercise.name
    tree = source.parse(text)
    own = [node for node in tree.body if isinstance(node, source.Definition)]
    reference = next(node for node in own if node.name == name)
    stub = source.parse(source.stub(source.definition(text, name, path), path)).body[0]
    assert isinstance(stub, source.Definition)
    stub.decorator_list = [_without_uses(decorator) for decorator in reference.decorator_list]
    replaced: dict[str, ast.stmt] = {name: stub}
    for wrong in exercise.mistakes.values():
        fails = "" if wrong.fails is None else f", fails={sorted(wrong.fails)!r}"
        replaced[wrong.name] = _statement(
            f"@mistake({name}, {wrong.sentence!r}{fails})\ndef {wrong.name}(*arguments, **options):\n"
            f"    {LEAVES_NO_ANSWER}"
        )
    if exercise.race is not None:
        raced = exercise.race
        replaced[raced.name] = _statement(
            f"@race({name}, inputs=not_in_a_kit, baseline=not_in_a_kit, share={raced.share!r}, keeps={raced.keeps!r})\n"
            f"def {raced.name}(answer, rng):\n    {raced.title!r}\n    {LEAVES_NO_ANSWER}"
        )
    body = [
        replaced.get(node.name, node) if isinstance(node, source.Definition) else node for node in tree.body
    ]
    at = next(index for index, node in enumerate(body) if node is stub)
    body.insert(at, _statement(f"def not_in_a_kit(*arguments, **options):\n    {LEAVES_NO_ANSWER}"))
    # One function that names all of it: what a root reaches keeps its decorators, which judge and serve.
    wanted = [name, *exercise.items, *replaced]
    body.append(_statement(f"def everything_kept():\n    return ({', '.join(wanted)},)"))
    whole = ast.unparse(ast.Module(body=body, type_ignores=[]))
    kept = source.parse(source.case_source(whole, ["everything_kept"], exercise.alternatives, path))
    return ast.unparse(ast.Module(body=kept.body[:-1], type_ignores=[])) + "\n"


def _statement(text: str) -> ast.stmt:
    return source.parse(text).body[0]


def _without_uses(decorator: ast.expr) -> ast.expr:
    """The decorator without `uses=`: it names the reference of another exercise, which need not be in the kit."""
    if isinstance(decorator, ast.Call):
        decorator.keywords = [keyword for keyword in decorator.keywords if keyword.arg != "uses"]
    return decorator


def _demand_no_leak(notebooks: Mapping[str, bytes], exercises: Sequence[Exercise]) -> None:
    """KitError where a notebook, which a teacher may have edited, shows a line of a reference or an alternative."""
    import nbformat

    answers = [read_exercise(exercise.path) for exercise in exercises]
    for file, content in notebooks.items():
        for _, message in leaks(nbformat.reads(content.decode(), as_version=nbformat.NO_CONVERT), answers):
            raise KitError(f"{file} {message}; take the line out of the notebook")


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip of the files, sorted by name: the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.create_system = 3  # Unix, whose permissions these are
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, 6)
    return buffer.getvalue()


def _readme(name: str, notebook: str, due: datetime | None) -> str:
    deadline = f"\nDue: {due.astimezone():%A, %d %B %Y, %H:%M %Z}\n" if due is not None else ""
    return f"""# {name}
{deadline}
You need Python 3.11, 3.12 or 3.13. In this folder:

    python -m venv .venv
    . .venv/bin/activate                   # on Windows: .venv\\Scripts\\activate
    pip install ./package
    jupyter lab {notebook}

Write each answer into its cell and run the `check` cell below it, as often as you like. Hand in the notebook, under the
name it has.

This kit holds no solutions. `check` compares your answer with what the course's own answers gave on a few stored
inputs. An answer made to fit these inputs passes here and earns nothing: it is graded on other inputs, which are
secret, with the full course. A check that says "not raced here" leaves a race of speed to the grader. The command
`llmcourse check` needs the full course; use the cells.
"""


def _pyproject() -> str:
    lines = "".join(f'    "{one}",\n' for one in _requirements())
    return f"""[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "llmcourse"
version = "{llmcourse.__version__}+kit"
description = "A lesson of the course, without its answers"
requires-python = ">=3.11,<3.14"
dependencies = [
{lines}]

[project.scripts]
llmcourse = "llmcourse.cli:main"

[tool.setuptools.packages.find]
include = ["llmcourse*"]

[tool.setuptools.package-data]
"*" = ["*"]
"""


def _requirements() -> list[str]:
    """What a learner's package needs: the course's own requirements, and JupyterLab to open the notebook."""
    root = workspace.repository()
    if root is not None:
        project: Any = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    from importlib.metadata import requires

    wanted = []
    for line in requires("llmcourse") or []:
        requirement, _, marker = line.partition(";")
        if not marker or re.search(r"extra\s*==\s*['\"]lab['\"]", marker):
            wanted.append(requirement.strip())
    return wanted
