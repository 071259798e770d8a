"""A small released notebook with every kind of nbgrader cell, and the record of one submission of it."""

from __future__ import annotations

from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbgrader.utils import compute_checksum

from llmcourse.graded import Graded, GradedExercise

ASSIGNMENT, NOTEBOOK = "02_demo", "demo"
REPORT = "<div class='llmcourse-report' style='border-left:4px solid #0072b2'><b>{}</b> · a case</div>"


def cell(source: str, name: str, *, kind: str = "code", **grader: Any) -> NotebookNode:
    """A cell that nbgrader knows, with the checksum it has when it is released."""
    flags = {"grade": False, "locked": False, "solution": False, "task": False, "schema_version": 3}
    made = (new_code_cell if kind == "code" else new_markdown_cell)(source, id=name)
    made.metadata["nbgrader"] = NotebookNode({"grade_id": name, "cell_type": kind, **flags, **grader})
    made.metadata.nbgrader.checksum = compute_checksum(made)
    return made


def teacher() -> NotebookNode:
    """Two exercises worth 4 and 3 points, an essay, a free program, a task and an extension outside the score."""
    cells = [new_markdown_cell("# Demo\n\n<b>Bold</b> as the course wrote it.", id="intro")]
    for name, points in (("scale", 4), ("pack", 3)):
        cells.append(cell(f"def {name}(x):\n    raise NotImplementedError", name, solution=True))
        cells.append(cell(f"check({name})", f"check_{name}", grade=True, locked=True, points=points))
    cells += [
        new_code_cell("print('see it')", id="see-it"),
        cell("Your answer here.", "essay", kind="markdown", grade=True, solution=True, points=2),
        cell("# your program", "program", grade=True, solution=True, points=1),
        cell("Measure it on your machine.", "task", kind="markdown", task=True, locked=True, points=1),
        cell("def extra(x):\n    raise NotImplementedError", "extra", solution=True),
        cell("check(extra)", "check_extra", locked=True),
        new_markdown_cell("### Sources", id="sources"),
    ]
    return new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def exercise(name: str, points: float = 4, max_points: float = 4, **changes: Any) -> GradedExercise:
    verdict = "right" if points == max_points else "wrong"
    return GradedExercise(name, points, max_points, verdict, "", html=REPORT.format(name), **changes)


def graded(student: str = "anna", points: float = 2, **changes: Any) -> Graded:
    """A record in which `scale` earned `points` of 4, and everything else is right."""
    record: dict[str, Any] = {
        "student": student,
        "assignment": ASSIGNMENT,
        "key": "key",
        "exercises": (
            exercise("scale", points),
            exercise("pack", 6, 6),
            exercise("extra", 2, 2, extension=True),
        ),
        "answers": {
            "scale": "def scale(x):\n    return x",
            "pack": "def pack(x):\n    return HELP",
            "essay": "Bytes first.",
        },
        "helpers": (("cell 3", "HELP = 1", "pack"), ("cell 9", "LAST = 2", "")),
        "submitted_at": "2026-03-01T12:00:00+00:00",
    }
    return Graded(**record | changes)
