"""The autograded notebook: the teacher's released one, with a student's answers and what the judge found in it.

It is made from the record alone: nothing of the submitted file but text gets in, and none of that text can become
HTML or markdown that a browser acts on, for nbgrader shows this notebook unsanitised to the logged-in teacher.
Imports no torch.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from html import escape
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from llmcourse.graded import Graded, GradedExercise

MAX_SHOWN_CHARS = 100_000  # of one cell: colouring more costs seconds, also whenever a teacher opens the page
MAX_HELPER_CHARS, MAX_NOTES = 300_000, 100  # of all a student's own cells; more is no help to anyone
CHECK = "check_"
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def rebuild(teacher: NotebookNode, graded: Graded) -> NotebookNode:
    """The teacher's cells in order; the student's text in the answer cells; a score and a report under each check.

    A helper cell stands before the answer cell that followed it, the others at the end. A check of which the
    record says nothing has no output. The same arguments give the same notebook, cell ids included.
    """
    exercises = {exercise.name: exercise for exercise in graded.exercises}
    helpers = _helpers(graded, {cell.get("id") for cell in teacher.cells})
    cells = [_explanation(graded)] if graded.notes or graded.refused else []
    for original in teacher.cells:
        cell = copy.deepcopy(original)
        grader = cell.metadata.get("nbgrader", {})
        name = grader.get("grade_id", "")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if grader.get("solution"):
            cells += helpers.pop(name, [])
            _answer(cell, graded.answers.get(name))
        elif cell.cell_type == "code" and name.startswith(CHECK) and name[len(CHECK) :] in exercises:
            cell.outputs = [_result(exercises[name[len(CHECK) :]], grader)]
        cells.append(cell)
    cells += [cell for left in helpers.values() for cell in left]
    return NotebookNode({**copy.deepcopy({k: v for k, v in teacher.items() if k != "cells"}), "cells": cells})


def scaled(exercise: GradedExercise, worth: float) -> float:
    """Points on the scale of a teacher's cell that is worth `worth`: between 0 and exactly that."""
    if exercise.max_points <= 0:
        return 0.0
    return float(min(max(exercise.points / exercise.max_points * worth, 0.0), worth))


def readable(text: str) -> str:
    """A student's text as it can be written and shown: marks for control characters and what UTF-8 has no form for."""
    shown = UNWRITABLE.sub(_visible, text.replace("\r\n", "\n").replace("\r", "\n"))
    if len(shown) <= MAX_SHOWN_CHARS:
        return shown
    left = len(shown) - MAX_SHOWN_CHARS
    return f"{shown[:MAX_SHOWN_CHARS]}\n# {left:,} more characters are in the submitted file"


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # the block of control pictures
    return "\u2421" if code == 0x7F else "\ufffd"


def _answer(cell: NotebookNode, text: str | None) -> None:
    """Put a student's text into an answer cell; an untouched stub stays as it is, so that it is known as one."""
    if text is None or text == cell.source:
        return
    cell.pop("attachments", None)
    cell.source = readable(text) if cell.cell_type == "code" else fenced(readable(text))


def fenced(text: str) -> str:
    """A text as a code block of markdown that it cannot end.

    A written answer is shown as it was typed: rendered, it could carry scripts, through HTML, links and diagrams.
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _result(exercise: GradedExercise, grader: dict[str, Any]) -> NotebookNode:
    """What `check` would have shown: the score as a number, which nbgrader reads, and the report, which people do."""
    score = scaled(exercise, float(grader["points"])) if grader.get("grade") else float(exercise.points)
    data = {"text/plain": repr(score), "text/html": UNWRITABLE.sub(_visible, exercise.html)}
    return new_output("execute_result", data=data, execution_count=None)


def _helpers(graded: Graded, taken: set[str | None]) -> dict[str, list[NotebookNode]]:
    """The student's own cells by the exercise they stand before; past a bound only how many there are more."""
    cells: dict[str, list[NotebookNode]] = defaultdict(list)
    shown_chars = 0
    for number, (label, text, before) in enumerate(graded.helpers, 1):
        shown_chars += len(text)
        if shown_chars > MAX_HELPER_CHARS:
            left = len(graded.helpers) - number + 1
            label, text, before = (
                "end",
                f"# {left:,} more cells of the student's own are in the submitted file",
                "",
            )
        ident = f"helper-{number}"
        while ident in taken:
            ident += "-1"
        source = f"# {_line(label)} of the submission\n{readable(text)}"
        cells[before].append(new_code_cell(source, id=ident, execution_count=None))
        if shown_chars > MAX_HELPER_CHARS:
            break
    return cells


def _explanation(graded: Graded) -> NotebookNode:
    """What happened on the way from the file to the verdicts, as one block of HTML without an empty line in it."""
    lines = ["### How this was graded", "", "<div class='tex2jax_ignore'>"]
    if graded.refused:
        lines.append(f"<p><b>Nothing could be judged:</b> {_words(graded.refused)}</p>")
    if graded.notes:
        lines += ["<ul>", *(f"<li>{_words(note)}</li>" for note in graded.notes[:MAX_NOTES])]
        if len(graded.notes) > MAX_NOTES:
            lines.append(f"<li>and {len(graded.notes) - MAX_NOTES:,} more</li>")
        lines.append("</ul>")
    return new_markdown_cell("\n".join([*lines, "</div>"]), id="how-this-was-graded")


def _line(text: str) -> str:
    return " ".join(readable(text).split())


def _words(text: str) -> str:
    """A note as HTML: what stands between backticks as code, everything else as text."""
    parts = [escape(part).replace("$", "&#36;") for part in _line(text).split("`")]
    closed = len(parts) - 1 + len(parts) % 2  # a backtick without a partner is one
    coded = [f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts[:closed])]
    return "".join(coded) + "".join(f"`{part}" for part in parts[closed:])
