"""A small course and its class, as files: what tests of the grader share.

One exercise outside the package, a teacher's notebook with nbgrader's metadata, and a folder a student.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

ASSIGNMENT = "numbers"
EXERCISE = '''from __future__ import annotations

from torch import Tensor

from llmcourse.exercise import alternative, case, exercise, mistake


@exercise(points=2, minutes=5)
def scale_rows(weight: Tensor) -> Tensor:
    """Largest magnitude of each row of weight [out, in]: [out], same dtype."""
    ### BEGIN SOLUTION
    return weight.abs().amax(dim=1)
    ### END SOLUTION


@case(scale_rows)
def one_loud_row(answer, rng):
    """A loud row must not touch its neighbours."""
    weight = rng.normal(4, 6)
    weight[rng.integer(0, 3)] *= 100
    return {"scale": answer(weight)}


@mistake(scale_rows, "One scale serves every row.")
def per_tensor(weight):
    return weight.abs().max().expand(weight.shape[0])


@alternative(scale_rows, "The larger of both ends")
def both_ends(weight):
    return (-weight.amin(dim=1)).maximum(weight.amax(dim=1))
'''
IMPORTS = "import torch\nfrom torch import Tensor\nfrom llmcourse import check"
STUB = "def scale_rows(weight: Tensor) -> Tensor:\n    raise NotImplementedError"
RIGHT = "def scale_rows(weight):\n    return weight.abs().max(dim=1).values"
WRONG = "def scale_rows(weight):\n    return weight.abs().max().expand(weight.shape[0])"


def notebook(answer: str = STUB, *helpers: str) -> dict[str, Any]:
    """A notebook of the assignment, the teacher's with the stub, as plain JSON."""
    common = {"schema_version": 3, "task": False}
    answers = {"grade": False, "solution": True, "locked": False, "grade_id": "scale_rows"}
    checks = {"grade": True, "solution": False, "locked": True, "grade_id": "check_scale_rows", "points": 4}
    new = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell("# Numbers", id="title"),
        new(IMPORTS, id="imports"),
        *(new(text, id=f"own-{number}") for number, text in enumerate(helpers)),
        new(answer, id="scale_rows", metadata={"nbgrader": answers | common}),
        new("check(scale_rows)", id="check_scale_rows", metadata={"nbgrader": checks | common}),
    ]
    return json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


def course(folder: Path, answers: Mapping[str, str]) -> Path:
    """The course's folder: LESSONS beside it holds the exercise, `answers` is a cell a student."""
    lessons = folder / "lessons" / ASSIGNMENT
    lessons.mkdir(parents=True, exist_ok=True)
    (lessons / "scale_rows.py").write_text(EXERCISE, encoding="utf-8")
    root = folder / "course"
    write(root / "notebooks" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", notebook())
    for student, answer in answers.items():
        hand_in(root, student, notebook(answer))
    return root


def hand_in(root: Path, student: str, content: dict[str, Any] | bytes) -> Path:
    return write(root / "grading" / "submitted" / student / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", content)


def write(path: Path, content: dict[str, Any] | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path
