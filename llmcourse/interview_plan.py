"""An interview's plan: what the lessons offer, which of it is drawn, and the blank notebook that is made of it."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from llmcourse import interview_record, workspace
from llmcourse.interview_record import Book, Part, Record
from llmcourse.interview_source import Interview, read_interview
from llmcourse.interview_words import WORDS
from llmcourse.leaks import ExerciseText, LessonError, read_exercise
from llmcourse.lesson_text import HEADINGS, KERNEL
from llmcourse.workspace import WorkspaceError

QUESTION_MINUTES, FOLLOWUP_MINUTES = 3, 2  # to write down what one would say


# -------------------------------------------------------------------------------------------- what there is to draw


@dataclass(frozen=True)
class Material:
    """What a lesson gives an interview: its question (None without an interview.toml) and its exercises."""

    lesson: str
    question: Interview | None
    exercises: tuple[ExerciseText, ...]

    @property
    def topic(self) -> str:
        return self.lesson[3:]


def material(lesson: str) -> Material:
    """Read a lesson's questions and exercises, importing none of them; WorkspaceError for a file with an error."""
    root = workspace.repository()
    folder = workspace.PACKAGE / "notebooks" if root is None else root / "solutions"
    path = folder / lesson / "interview.toml"
    try:
        question = read_interview(path) if path.is_file() else None
        paths = sorted((workspace.PACKAGE / "lessons" / lesson[3:]).glob("[!_]*.py"))
        return Material(lesson, question, tuple(read_exercise(one) for one in paths))
    except LessonError as error:
        raise WorkspaceError(f"the lesson {lesson} cannot be read: {error}") from error


def draw(
    materials: Sequence[Material],
    *,
    minutes: float,
    book: Book,
    tries: dict[str, int],
    seed: int,
    at: datetime,
) -> list[Part]:
    """Parts that fit the minutes: due revisits, the oldest first; then questions and exercises by turns, those
    least practised first and otherwise by chance; then more follow-ups while there is time for them.

    tries: checks of each exercise so far. Empty when nothing fits.
    """
    rng = random.Random(seed)
    candidates = [part for one in materials for part in parts_of(one)]
    rng.shuffle(candidates)
    candidates.sort(
        key=lambda part: _times_asked(book, part) if part.kind == "spoken" else tries.get(part.name, 0)
    )
    due = {
        item: when
        for item, card in book.revisits.items()
        if (when := interview_record.due_at(card, at)) <= at
    }
    first = sorted((part for part in candidates if part.item in due), key=lambda part: due[part.item])
    chosen: list[Part] = []
    left = minutes
    for part in first:
        if part.minutes <= left:
            chosen.append(part)
            left -= part.minutes
    rest = [part for part in candidates if part not in first]
    while (following := _next(rest, chosen, left)) is not None:
        rest.remove(following)
        chosen.append(following)
        left -= following.minutes
    questions = {one.topic: one.question for one in materials}
    _ask_followups(chosen, questions, left, book, rng)
    return chosen


def parts_of(one: Material) -> list[Part]:
    parts = [
        Part("exercise", each.name, one.lesson, float(each.minutes), each.points) for each in one.exercises
    ]
    if one.question is not None:
        points = float(sum(line.points for line in one.question.rubric))
        parts.append(Part("spoken", one.topic, one.lesson, QUESTION_MINUTES + FOLLOWUP_MINUTES, points))
    return parts


def _times_asked(book: Book, part: Part) -> int:
    asked = (record.part(part.kind, part.name) for record in book.interviews.values())
    return sum(1 for other in asked if other is not None and other.answers)


def _next(rest: list[Part], chosen: list[Part], left: float) -> Part | None:
    """The first that fits, of the kind that has fewer minutes so far."""
    spent = {
        kind: sum(part.minutes for part in chosen if part.kind == kind) for kind in ("spoken", "exercise")
    }
    for kind in sorted(spent, key=lambda kind: spent[kind]):
        for part in rest:
            if part.kind == kind and part.minutes <= left:
                return part
    return None


def _ask_followups(
    chosen: list[Part], questions: dict[str, Interview | None], left: float, book: Book, rng: random.Random
) -> None:
    """Give each question its follow-ups: those asked least before, in the lesson's order (easiest first)."""
    spoken = [part for part in chosen if part.kind == "spoken"]
    counts = dict.fromkeys((part.name for part in spoken), 1)
    ladders = {}
    for part in spoken:
        question = questions[part.name]
        assert question is not None
        asked = [0] * len(question.followups)
        for record in book.interviews.values():
            before = record.part("spoken", part.name)
            for index in before.followups if before is not None else ():
                if index < len(asked):
                    asked[index] += 1
        ladders[part.name] = sorted(range(len(asked)), key=lambda index: (asked[index], rng.random()))
    while left >= FOLLOWUP_MINUTES:
        more = [part for part in spoken if counts[part.name] < len(ladders[part.name])]
        if not more:
            break
        part = min(more, key=lambda part: counts[part.name])
        counts[part.name] += 1
        part.minutes += FOLLOWUP_MINUTES
        left -= FOLLOWUP_MINUTES
    for part in spoken:
        part.followups = sorted(ladders[part.name][: counts[part.name]])


# ----------------------------------------------------------------------------------------------------- the notebook


def notebook(name: str, record: Record) -> bytes:
    """The blank notebook: for each part its statement and stub or its question, never a hint or an answer."""
    words = WORDS[record.language]
    materials = {lesson: material(lesson) for lesson in dict.fromkeys(part.lesson for part in record.parts)}
    what = "mixed" if record.mixed else record.lessons[0]
    start = f'from llmcourse import interview\n\nsession = interview.start("{name}")'
    cells = [
        _markdown(words["title"].format(what=what, minutes=record.minutes) + "\n\n" + words["how"]),
        _code(_imports(materials)),
        _code(start),
    ]
    for part in record.parts:
        cells += (_exercise_cells if part.kind == "exercise" else _spoken_cells)(
            part, materials[part.lesson], words
        )
    cells += [_markdown(words["report"]), _code("session.report()")]
    plan = replace(
        record, begun=None, seen=None, ended=None, elapsed_s=0.0, notes=[], parts=_blank(record.parts)
    )
    made = {
        "cells": [{**cell, "id": f"interview-{number}"} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": dict(KERNEL),
            "language_info": {"name": "python"},
            "llmcourse": {"interview": asdict(plan)},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return (json.dumps(made, indent=1, ensure_ascii=False) + "\n").encode()


# Written by hand, since importing nbformat takes longer than everything else here together. A test validates them.
def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(text: str) -> dict[str, Any]:
    lines = text.splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines}


def _blank(parts: Iterable[Part]) -> list[Part]:
    return [
        Part(part.kind, part.name, part.lesson, part.minutes, part.max_points, followups=list(part.followups))
        for part in parts
    ]


def _imports(lessons: Iterable[str]) -> str:
    """The import cells of the lessons' own notebooks, without `check` and `hint`."""
    found: dict[str, None] = {}
    for lesson in lessons:
        path = workspace.lesson_sources()[lesson][0]
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ImportFrom) and node.module == "llmcourse":
                node.names = [alias for alias in node.names if alias.name not in ("check", "hint")]
                if not node.names:
                    continue
            found[ast.unparse(node)] = None
    return "\n".join(found)


def _exercise_cells(part: Part, one: Material, words: dict[str, str]) -> list[dict[str, Any]]:
    exercise = next((each for each in one.exercises if each.name == part.name), None)
    if exercise is None:  # gone since the interview was drawn
        return []
    language = "zh" if words is WORDS["zh"] else "en"
    heading = HEADINGS[language]["extension" if exercise.extension else "core"]
    cells = [_markdown(heading.format(name=part.name, points=exercise.points, minutes=exercise.minutes))]
    if given := _uses(exercise):
        lines = [f"from llmcourse.lessons.{one.topic}.{name} import {name}" for name in given]
        cells.append(_code("\n".join(lines)))
    return [*cells, _code(exercise.stub), _code(f"session.check({part.name})")]


def _uses(exercise: ExerciseText) -> list[str]:
    """Names of the earlier exercises whose answers this one may call: `@exercise(uses=(...))`."""
    tree = ast.parse(exercise.path.read_text(encoding="utf-8"))
    options = (
        keyword.value
        for node in tree.body
        if getattr(node, "name", None) == exercise.name
        for call in getattr(node, "decorator_list", [])
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "uses"
    )
    return [name.id for option in options for name in ast.walk(option) if isinstance(name, ast.Name)]


def _spoken_cells(part: Part, one: Material, words: dict[str, str]) -> list[dict[str, Any]]:
    if one.question is None:
        return []
    language = "zh" if words is WORDS["zh"] else "en"
    heading = words["question"].format(minutes=part.minutes)
    cells = [_markdown(f"{heading}\n\n{one.question.question.of(language)}")]
    for step in range(len(asked_followups(part, one.question)) + 1):
        cells.append(_code(f"{answer_cell(part, step)}\n{words['placeholder']}"))
    how = words["rate"].format(total=part.max_points)
    return [*cells, _code(f'session.rate("{part.name}", ...)  # {how}')]


def answer_cell(part: Part, step: int) -> str:
    return f"%%answer {part.name} {step}".removesuffix(" 0")


def asked_followups(part: Part, question: Interview) -> list[int]:
    """The follow-ups that are asked: those drawn that the lesson still has."""
    return [index for index in part.followups if index < len(question.followups)]
