"""A small course to attack: its lesson, the teacher's notebooks, and submissions as nbgrader collects them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.graded_samples import cell as graded_cell

UNIT_ROWS = '''from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import case, cost, exercise, mistake


@exercise(points=3, minutes=5, forbid=("torch.nn.functional.normalize",))
def unit_rows(weight: Tensor) -> Tensor:
    """Each row of weight [out, in] divided by its Euclidean length: [out, in]; a row of zeros stays."""
    ### BEGIN SOLUTION
    length = weight.square().sum(dim=1, keepdim=True).sqrt()
    return weight / length.clamp_min(1e-12)
    ### END SOLUTION


@case(unit_rows)
def rows_of_one_shape(answer, rng):
    """Two weights of one shape, then the first again with other values in the same memory."""
    first, second = rng.normal(6, 8), rng.normal(6, 8)
    found = [answer(first), answer(second)]
    first.copy_(rng.normal(6, 8))
    return [*found, answer(first)]


@case(unit_rows)
def a_row_of_zeros(answer, rng):
    """One row of zeros, one that is large."""
    weight = rng.normal(5, 7)
    weight[rng.integer(0, 2)] = 0
    weight[rng.integer(3, 4)] *= 1000
    return {"rows": answer(weight)}


@cost(unit_rows, share=1 / 3)
def one_temporary(answer, rng):
    """The largest tensor that is allocated."""
    weight = rng.normal(64, 64)
    with TensorWork() as work:
        found = answer(weight)
    return {"observed": found, "largest, bytes": (work.largest_tensor_bytes, 64 * 64 * 4)}


@mistake(unit_rows, "One length serves every row.")
def of_all(weight):
    return weight / weight.norm()
'''

LEDGER = '''from __future__ import annotations

from llmcourse.exercise import case, exercise, mistake


@exercise(points=2, minutes=5)
class Ledger:
    """Amounts in a file of its own: `Ledger(path)` opens it or begins it, add(amount) appends, total() sums."""

    ### BEGIN SOLUTION
    def __init__(self, path):
        self.path = path
        open(path, "a").close()

    def add(self, amount):
        with open(self.path, "a") as file:
            file.write(f"{amount}\\n")

    def total(self):
        with open(self.path) as file:
            return sum(int(line) for line in file)
    ### END SOLUTION


@case(Ledger)
def opened_twice(answer, rng):
    """Amounts go in through one ledger and are summed by a second one of the same file."""
    amounts = [rng.integer(-99, 99) for _ in range(5)]
    ledger = answer("ledger.txt")
    for amount in amounts:
        ledger.add(amount)
    return {"total": ledger.total(), "again": answer("ledger.txt").total(), "other": answer("other.txt").total()}


@mistake(Ledger, "Amounts are kept in memory and lost.")
class Forgetful:
    def __init__(self, path):
        self.amounts = []

    def add(self, amount):
        self.amounts.append(amount)

    def total(self):
        return sum(self.amounts)
'''

FIRST_ABOVE = '''from __future__ import annotations

from llmcourse.exercise import case, cost, exercise, mistake


@exercise(points=3, minutes=5)
def first_above(reader, count, bound):
    """Index of the first of `count` rising numbers that is above bound; reader.read(i) gives number i."""
    ### BEGIN SOLUTION
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if reader.read(middle) > bound:
            high = middle
        else:
            low = middle + 1
    return low
    ### END SOLUTION


class Numbers:
    """Rising numbers in the judge's process, which counts every read."""

    calls = ("read", "bound")

    def __init__(self, rng):
        self.numbers = sorted(rng.integer(0, 10**9) for _ in range(1000))
        self.limit = rng.integer(0, 10**9)
        self.reads = 0

    def read(self, index):
        self.reads += 1
        if type(index) is not int or not 0 <= index < 1000:
            raise IndexError("no such number")
        return self.numbers[index]

    def bound(self):
        return self.limit

    def counts(self):
        return {"reads": (self.reads, 11)}


@case(first_above, service=Numbers)
def among_a_thousand(answer, rng, numbers):
    """A thousand numbers and a bound."""
    return {"index": answer(numbers, 1000, numbers.bound())}


@cost(first_above, share=1 / 3, authority="protocol", service=Numbers)
def few_reads(answer, rng, numbers):
    """How many numbers are read."""
    return {"observed": answer(numbers, 1000, numbers.bound())}


@mistake(first_above, "The first that is not below the bound.")
def one_too_far(reader, count, bound):
    return first_above(reader, count, bound) + 1
'''

# The baseline multiplies three times, so the reference is almost three times as fast, wherever it runs.
PROJECT = '''from __future__ import annotations

import torch

from llmcourse.exercise import case, exercise, mistake, race


@exercise(points=4, minutes=5)
def project(weight):
    """weight [N, K] -> run, and run(x) is weight @ x for x [K]; float32."""
    ### BEGIN SOLUTION
    kept = weight.clone()

    def run(x):
        return kept @ x

    return run
    ### END SOLUTION


@case(project)
def two_projections(answer, rng):
    """Two weights of one shape, each with two vectors; the weights are overwritten in between."""
    first, second = rng.normal(6, 5), rng.normal(6, 5)
    runs = [answer(first), answer(second)]
    first.zero_()
    return [run(rng.normal(5)) for run in runs for _ in range(2)]


@mistake(project, "The projection is transposed.")
def transposed(weight):
    return lambda x: weight.T @ x


def vector(rng):
    return rng.normal(2048)


def three_times(weight):
    kept = weight.clone()

    def run(x):
        return (kept @ x + kept @ x + kept @ x) / 3

    return run


@race(project, inputs=vector, baseline=three_times, share=1 / 4)
def a_wide_projection(answer, rng):
    """A square weight of 2,048."""
    return answer(rng.normal(2048, 2048))
'''

EXERCISES = {"unit_rows": UNIT_ROWS, "Ledger": LEDGER, "first_above": FIRST_ABOVE, "project": PROJECT}
POINTS = {"unit_rows": 3.0, "Ledger": 2.0, "first_above": 3.0, "project": 4.0}
ASSIGNMENTS = {"A": ("unit_rows", "Ledger", "first_above"), "R": ("project",)}
IMPORTS = "import os\nimport sys\n\nimport torch\n\nfrom llmcourse.checking import check"
STUBS = {
    "unit_rows": 'def unit_rows(weight):\n    """Rows of length one."""\n    raise NotImplementedError',
    "Ledger": "class Ledger:\n    def __init__(self, path):\n        raise NotImplementedError",
    "first_above": "def first_above(reader, count, bound):\n    raise NotImplementedError",
    "project": "def project(weight):\n    raise NotImplementedError",
}
RIGHT = {
    "unit_rows": "def unit_rows(weight):\n"
    "    return weight / weight.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)",
    "Ledger": """class Ledger:
    def __init__(self, path):
        self.path = path
        open(path, "a").close()

    def add(self, amount):
        with open(self.path, "a") as file:
            print(amount, file=file)

    def total(self):
        return sum(map(int, open(self.path).read().split()))""",
    "first_above": """def first_above(reader, count, bound):
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reader.read(middle) > bound else (middle + 1, high)
    return low""",
    "project": "def project(weight):\n    kept = weight.clone()\n    return lambda x: kept @ x",
}
WORTH = {name: sum(POINTS[one] for one in names) for name, names in ASSIGNMENTS.items()}


def teacher(assignment: str) -> NotebookNode:
    """The released notebook of an assignment."""
    cells = [new_markdown_cell(f"# {assignment}", id="intro"), new_code_cell(IMPORTS, id="imports")]
    for name in ASSIGNMENTS[assignment]:
        cells.append(graded_cell(STUBS[name], name, solution=True))
        cells.append(
            graded_cell(f"check({name})", f"check_{name}", grade=True, locked=True, points=POINTS[name])
        )
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def notebook(assignment: str, answers: dict[str, str] | None = None, first: str = "") -> dict[str, Any]:
    """A submission as JSON: right answers but for those given; `first` is a cell of the student's own before them."""
    made = teacher(assignment)
    for cell in made.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in ASSIGNMENTS[assignment]:
            cell.source = (answers or {}).get(name, RIGHT[name])
    if first:
        made.cells.insert(2, new_code_cell(first, id="own"))
    return json.loads(nbformat.writes(made))


@dataclass(frozen=True)
class Place:
    """Where things of the attacked course lie: attacks may know every path, and no secret."""

    root: Path
    secret: str

    @property
    def course(self) -> Path:
        return self.root / "course"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def lessons(self) -> Path:
        return self.root / "lessons"

    def folder(self, student: str, assignment: str = "A") -> Path:
        path = self.course / "grading" / "submitted" / student / assignment
        path.mkdir(parents=True, exist_ok=True)
        return path

    def hand_in(self, student: str, content: dict[str, Any] | bytes, assignment: str = "A") -> Path:
        path = self.folder(student, assignment) / f"{assignment}.ipynb"
        # Surrogates and odd numbers stay what they are: json.dumps writes them as escapes.
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path


def shrunk() -> None:
    """In a judging process: limits that are reached sooner than the course's own, of the same kinds."""
    from llmcourse import engine

    engine.LOAD_LIMIT_S, engine.MAX_DATA_BYTES, engine.LAP_LIMIT_S = 2.0, 1 << 30, 1.0


def build(root: Path, secret: str) -> Place:
    """The lesson, the teacher's notebooks, and secrets where a teacher has some."""
    place = Place(root, secret)
    (place.lessons / "attacked").mkdir(parents=True)
    for name, text in EXERCISES.items():
        (place.lessons / "attacked" / f"{name}.py").write_text(text, encoding="utf-8")
    for assignment in ASSIGNMENTS:
        path = place.course / "notebooks" / assignment / f"{assignment}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(teacher(assignment), path)
    (place.course / "grading" / "submitted").mkdir(parents=True)
    (place.course / "source").mkdir()
    (place.course / "source" / "solutions.py").write_text(f"# {secret}\n" + "\n\n".join(RIGHT.values()))
    (place.home / ".ssh").mkdir(parents=True)
    (place.home / ".ssh" / "id_ed25519").write_text(secret)
    return place
