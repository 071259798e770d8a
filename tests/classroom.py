"""A course folder with a small assignment and what students hand in: shared by tests of grading a class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPOSITORY = Path(__file__).parents[1]
ASSIGNMENT = "week_1"
STUB = "def {name}(x, y):\n    ### BEGIN SOLUTION\n    return {right}\n    ### END SOLUTION"
EXERCISE = '''
from llmcourse.exercise import case, exercise, mistake

@exercise(points=2, minutes=5, extension={extension})
def {name}(x, y):
    """Of two numbers or vectors."""
    ### BEGIN SOLUTION
    return {right}
    ### END SOLUTION

@case({name})
def vectors(answer, rng):
    """Two vectors."""
    return answer(rng.normal(4), rng.normal(4))

@case({name})
def numbers(answer, rng):
    """Two numbers."""
    return answer(rng.integer(1, 9), rng.integer(10, 19))

@mistake({name}, "The sign is the other one.")
def sign(x, y):
    return {wrong}
'''
RIGHT = {"add": "x + y", "turn": "y - x"}
WRONG = {"add": "x - y", "turn": "x - y"}
HOSTILE = (
    "import torch, sys\n"
    "for name in ('allclose', 'equal', 'isclose'):\n"
    "    setattr(torch, name, lambda *a, **k: True)\n"
    "torch.Tensor.__eq__ = lambda *a: True\n"
    "print('{\"points\": 2}')\n"
    "sys.stderr.write('noise' * 1000)\n"
)


def make_course(root: Path, *, names: tuple[str, ...] = ("add", "turn")) -> Path:
    """A course folder with this repository's nbgrader settings; returns the folder for LLMCOURSE_LESSONS."""
    lessons = root / "lessons"
    (lessons / "numbers").mkdir(parents=True)
    for name in names:
        text = EXERCISE.format(name=name, right=RIGHT[name], wrong=WRONG[name], extension=name == "turn")
        (lessons / "numbers" / f"{name}.py").write_text(text, encoding="utf-8")
    (root / "grading").mkdir()
    settings = (REPOSITORY / "grading" / "nbgrader_config.py").read_bytes()
    (root / "grading" / "nbgrader_config.py").write_bytes(settings)
    source = root / "solutions" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    source.parent.mkdir(parents=True)
    nbformat.write(new_notebook(cells=_cells(names), metadata=_kernel()), source)
    return lessons


def _kernel() -> dict[str, Any]:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"kernelspec": kernel, "language_info": {"name": "python"}}


def _cells(names: tuple[str, ...]) -> list[Any]:
    made = [new_markdown_cell("# Week 1", id="title")]
    made.append(new_code_cell("from llmcourse import check", id="imports"))
    for name in names:
        made.append(
            _flagged(new_code_cell(STUB.format(name=name, right=RIGHT[name]), id=name), solution=True)
        )
        check = new_code_cell(f"check({name})", id=f"check_{name}")
        # Worth 3 of the teacher's points, not the judge's 2; the extension counts for nothing.
        counts = {"points": 3} if name != "turn" else {}
        made.append(_flagged(check, locked=True, grade=bool(counts), **counts))
    spoken = new_markdown_cell("YOUR ANSWER HERE", id="spoken")
    made.append(_flagged(spoken, solution=True, grade=True, points=2))
    return made


def _flagged(cell: Any, **flags: Any) -> Any:
    nothing = {"grade": False, "locked": False, "solution": False, "task": False}
    cell.metadata["nbgrader"] = {"grade_id": cell.id, "schema_version": 3, **nothing, **flags}
    return cell


def release(root: Path) -> None:
    """Make the students' version and register it in the gradebook, by nbgrader's own command."""
    nbgrader(root / "grading", "generate_assignment", ASSIGNMENT)


def nbgrader(folder: Path, *arguments: str, expect: int = 0, **variables: str) -> str:
    """What an nbgrader command says, run in a folder; fails where it ends otherwise than expected."""
    return _said([sys.executable, "-m", "nbgrader", *arguments], folder, expect, variables)


def llmcourse(folder: Path, *arguments: str, expect: int = 0, **variables: str) -> str:
    return _said([sys.executable, "-m", "llmcourse.cli", *arguments], folder, expect, variables)


def _said(command: list[str], folder: Path, expect: int, variables: dict[str, str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    said = run.stdout + run.stderr
    assert run.returncode == expect, said
    return said


def handed_in(root: Path, answers: dict[str, str], *, own: str = "", spoken: str = "") -> bytes:
    """The released notebook with a student's answers in it, and a cell of the student's own before them."""
    released = root / "notebooks" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    notebook = nbformat.read(released, as_version=4)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name in answers:
            cell.source = f"def {name}(x, y):\n    return {answers[name]}"
        if name == "spoken" and spoken:
            cell.source = spoken
    if own:
        notebook.cells.insert(2, new_code_cell(own, id="own"))
    return nbformat.writes(notebook).encode()


def submit(root: Path, student: str, content: bytes, timestamp: str = "") -> Path:
    path = root / "grading" / "submitted" / student / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if timestamp:
        path.with_name("timestamp.txt").write_text(timestamp)
    return path
