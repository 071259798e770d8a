"""A lesson's text, `solutions/NN_topic/NN_topic.md`, and the notebook it expands to: found, read, never run.

    ```python                        code cells; a first line `# NBVAL_CHECK_OUTPUT` marks one whose output nbval
    ...                              compares; the first is the import cell, with `from llmcourse import check, hint`
    ```
    [Exercise: read_header](../../llmcourse/lessons/parameter_loading/read_header.py)
    [Question](interview.toml)       the question, in both languages
    [Interview](interview.toml)      answers, follow-ups and rubric, folded

Each of those links stands alone on its line. Other code blocks are text: ```console, ```text, ```toml and the like.
`NN_topic.zh.md` is a second edition: its own prose, the same code cells and exercises.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse.interview_source import interview_markdown, question_markdown, read_interview
from llmcourse.leaks import ExerciseText, LessonError, read_exercise, shown

LESSON_FOLDER = re.compile(r"\d\d_[a-z][a-z0-9_]*")
FENCE = re.compile(r"(?P<ticks>`{3,}|~{3,})(?P<info>[^`]*)$")
LINK = re.compile(
    r"\[(?:Exercise: (?P<exercise>\w+)|(?P<part>Question|Interview))\]\((?P<target>[^()\s]+)\)\s*$"
)
ALMOST_LINK = re.compile(r"\[\s*(?:exercise\b|question\s*\]|interview\s*\])", re.IGNORECASE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TEXT_BLOCKS = {"", "console", "text", "toml", "json", "yaml", "diff", "mermaid"}
HEADINGS = {
    "en": {
        "core": "### Exercise: `{name}` · {points:g} points · about {minutes} minutes",
        "extension": "### ★ Exercise: `{name}` · {points:g} extra points · about {minutes} minutes",
        "stuck": "Stuck?",
        "hint": "Run `hint({name})` in a cell of your own: each run unfolds one more hint.",
    },
    "zh": {
        "core": "### 练习：`{name}` · {points:g} 分 · 约 {minutes} 分钟",
        "extension": "### ★ 选做练习：`{name}` · 附加 {points:g} 分 · 约 {minutes} 分钟",
        "stuck": "没有思路？",
        "hint": "在自己的单元格里运行 `hint({name})`：每运行一次，多展开一条提示。",
    },
}


@dataclass(frozen=True)
class Course:
    """Where a course lies; every folder follows from its root."""

    root: Path

    @property
    def solutions(self) -> Path:
        return self.root / "solutions"

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def package(self) -> Path:
        return self.root / "llmcourse"

    @property
    def exercises(self) -> Path:
        return self.package / "lessons"

    @property
    def nbgrader_config(self) -> Path:
        return self.root / "grading" / "nbgrader_config.py"


REPOSITORY = Course(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Lesson:
    """One edition of a lesson: its text, and the language of what the build adds to it."""

    text: Path
    language: str

    @property
    def name(self) -> str:
        return self.text.parent.name

    @property
    def topic(self) -> str:
        return self.name[3:]

    @property
    def solution(self) -> Path:
        return self.text.with_suffix(".ipynb")

    def student(self, course: Course) -> Path:
        return course.notebooks / self.name / self.solution.name


@dataclass(frozen=True)
class Expanded:
    """A lesson's notebook without outputs, and the line of its text that each code cell comes from, by cell id."""

    notebook: Any
    lines: Mapping[str, int]
    exercises: Mapping[str, ExerciseText]


# --------------------------------------------------------------------------------------------------------- finding


def lessons(course: Course = REPOSITORY, wanted: Sequence[str] = ()) -> list[Lesson]:
    """The course's lessons in order, both editions; `wanted` names some by folder, number or topic."""
    found: list[Lesson] = []
    folders = sorted(path for path in course.solutions.glob("[!._]*") if path.is_dir())
    for folder in folders:
        text = folder / f"{folder.name}.md"
        if not LESSON_FOLDER.fullmatch(folder.name) or not text.is_file():
            raise LessonError(
                text, 1, "expected a lesson, named NN_topic like its folder; write it or move the folder"
            )
        found.append(Lesson(text, "en"))
        if (chinese := folder / f"{folder.name}.zh.md").is_file():
            found.append(Lesson(chinese, "zh"))
    for name in wanted:
        if not any(name in _names(lesson) for lesson in found):
            known = ", ".join(dict.fromkeys(lesson.name for lesson in found)) or "none"
            raise ValueError(f"no lesson is named {name}; there is: {known}")
    return [lesson for lesson in found if not wanted or _names(lesson) & set(wanted)]


def _names(lesson: Lesson) -> set[str]:
    return {lesson.name, lesson.name[:2], lesson.topic}


def exercise_paths(course: Course) -> dict[str, Path]:
    """Every exercise's name and file; LessonError when two have one name."""
    found: dict[str, Path] = {}
    for path in sorted(course.exercises.glob("*/[!_]*.py")):
        if path.stem in found:
            raise LessonError(
                path, 1, f"another exercise is named {path.stem}: {shown(found[path.stem])}; rename one"
            )
        found[path.stem] = path
    return found


# ------------------------------------------------------------------------------------------------------- expanding


@dataclass(frozen=True)
class Mark:
    """A line of a lesson's text that becomes cells: a `python` fence, or a link that stands alone."""

    line: int
    kind: str
    name: str = ""
    target: str = ""


def marks(text: str, path: Path) -> list[Mark]:
    """The lines of a lesson that become code; LessonError for a link that is nearly one of ours."""
    found: list[Mark] = []
    fence, opened_at = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if opened := FENCE.match(line):
            ticks, info = opened["ticks"], opened["info"].strip()
            if fence:
                if ticks.startswith(fence) and info:
                    message = f"a code block opens inside the one of line {opened_at}; close that one above"
                    raise LessonError(path, number, message)
                fence = "" if ticks.startswith(fence) else fence
                continue
            opened_at = number
            fence = ticks
            word = (info.split() or [""])[0]
            if word == "python" and ticks[0] == "`":
                found.append(Mark(number, "python"))
            elif word not in TEXT_BLOCKS:
                wanted = f"only ```python runs, and text is one of {', '.join(sorted(TEXT_BLOCKS - {''}))}"
                raise LessonError(path, number, f"a code block in {word}; {wanted}")
        elif not fence:
            if link := LINK.match(line):
                found.append(
                    Mark(number, (link["part"] or "Exercise").lower(), link["exercise"] or "", link["target"])
                )
            elif ALMOST_LINK.search(line):
                wanted = (
                    "`[Exercise: name](path)`, `[Question](interview.toml)` or `[Interview](interview.toml)`"
                )
                raise LessonError(path, number, f"expected {wanted}, alone on its line")
    if fence:
        raise LessonError(
            path, text.count("\n") + 1, f"a code block opened with {fence} is never closed; close it"
        )
    return found


def expand(lesson: Lesson, course: Course = REPOSITORY) -> Expanded:
    """A lesson's text as a notebook without outputs: the same text gives the same bytes."""
    import jupytext
    import nbformat

    text = lesson.text.read_text(encoding="utf-8")
    found = marks(text, lesson.text)
    drawn = jupytext.reads(text, fmt={"extension": ".md", "split_at_heading": True})
    fences = iter([mark for mark in found if mark.kind == "python"])
    links = iter([mark for mark in found if mark.kind != "python"])
    exercises = _linked_exercises(found, lesson, course)
    cells: list[tuple[Any, int]] = []
    for cell in drawn.cells:
        if cell.cell_type == "code":
            line = next(fences).line
            cells.append((_code_cell(cell, line, lesson.text), line))
        else:
            for piece in _pieces(cell.source, links):
                if isinstance(piece, str):
                    cells.append((nbformat.v4.new_markdown_cell(piece), 0))
                else:
                    cells += [(new, piece.line) for new in _linked_cells(piece, lesson, exercises)]
    assert next(fences, None) is None and next(links, None) is None, (
        "a mark of the text is missing in its cells"
    )
    _demand_import_cell(cells, lesson.text)
    notebook = nbformat.v4.new_notebook(
        cells=_identified(cell for cell, _ in cells),
        metadata={"kernelspec": dict(KERNEL), "language_info": {"name": "python"}},
    )
    notebook.nbformat_minor = 5
    nbformat.validate(notebook)
    lines = {cell.id: line for cell, line in cells if cell.cell_type == "code"}
    return Expanded(notebook, lines, exercises)


def _code_cell(cell: Any, line: int, path: Path) -> Any:
    import nbformat

    if not cell.source.strip():
        raise LessonError(path, line, "an empty code cell; fill it or remove it")
    tags = cell.metadata.get("tags")
    return nbformat.v4.new_code_cell(cell.source, metadata={"tags": tags} if tags else {})


def _pieces(source: str, links: Iterator[Mark]) -> Iterator[str | Mark]:
    """A Markdown cell cut at the links that stand alone, which come in the order of `links`."""
    kept: list[str] = []
    fence = ""
    for line in source.splitlines():
        if opened := FENCE.match(line):
            closes = fence and opened["ticks"].startswith(fence) and not opened["info"].strip()
            fence = "" if closes else fence or opened["ticks"]
        if fence or not LINK.match(line):
            kept.append(line)
            continue
        if before := "\n".join(kept).strip("\n"):
            yield before
        kept = []
        yield next(links)
    if rest := "\n".join(kept).strip("\n"):
        yield rest


def _linked_exercises(found: Sequence[Mark], lesson: Lesson, course: Course) -> dict[str, ExerciseText]:
    exercises: dict[str, ExerciseText] = {}
    folder = course.exercises / lesson.topic
    for mark in found:
        if mark.kind != "exercise":
            if mark.kind != "python" and mark.target != "interview.toml":
                raise LessonError(lesson.text, mark.line, f"expected (interview.toml), found ({mark.target})")
            continue
        expected = folder / f"{mark.name}.py"
        link = os.path.relpath(expected, lesson.text.parent)
        if not expected.is_file():
            known = ", ".join(sorted(path.stem for path in folder.glob("[!_]*.py"))) or "none yet"
            missing = f"no exercise is named {mark.name}: {shown(expected)} is missing; there is: {known}"
            raise LessonError(lesson.text, mark.line, missing)
        if mark.target != link:
            raise LessonError(
                lesson.text, mark.line, f"{mark.name} is linked as ({mark.target}); write ({link})"
            )
        if mark.name in exercises:
            raise LessonError(
                lesson.text, mark.line, f"{mark.name} is linked twice; a lesson asks each exercise once"
            )
        exercises[mark.name] = read_exercise(expected)
    return exercises


def _linked_cells(mark: Mark, lesson: Lesson, exercises: Mapping[str, ExerciseText]) -> list[Any]:
    import nbformat

    if mark.kind == "exercise":
        return exercise_cells(exercises[mark.name], lesson.language)
    path = lesson.text.parent / mark.target
    if not path.is_file():
        schema = "its schema: llmcourse/interview_source.py"
        raise LessonError(lesson.text, mark.line, f"{shown(path)} is missing; {schema}")
    interview = read_interview(path)
    if mark.kind == "question":
        return [nbformat.v4.new_markdown_cell(question_markdown(interview, language=lesson.language))]
    rendered = interview_markdown(interview, language=lesson.language)
    return [nbformat.v4.new_markdown_cell(part) for part in rendered]


def exercise_cells(exercise: ExerciseText, language: str) -> list[Any]:
    """Heading, answer and check. Stock nbgrader fails a whole submission whose cell earns more than its points, so the
    check of an extension, worth none there, is a locked cell that it does not grade."""
    import nbformat

    words, name = HEADINGS[language], exercise.name
    heading = words["extension" if exercise.extension else "core"].format(
        name=name, points=exercise.points, minutes=exercise.minutes
    )
    if exercise.has_hints:
        body = words["hint"].format(name=name)
        heading += f"\n\n<details>\n<summary>{words['stuck']}</summary>\n\n{body}\n\n</details>"
    answer = {"grade": False, "solution": True, "locked": False, "grade_id": name}
    check: dict[str, Any] = {"grade": True, "solution": False, "locked": True, "grade_id": f"check_{name}"}
    if exercise.extension:
        check["grade"] = False
    else:
        check["points"] = int(exercise.points) if exercise.points.is_integer() else exercise.points
    common = {"schema_version": 3, "task": False}
    return [
        nbformat.v4.new_markdown_cell(heading),
        nbformat.v4.new_code_cell(exercise.definition, metadata={"nbgrader": answer | common}),
        nbformat.v4.new_code_cell(f"check({name})", metadata={"nbgrader": check | common}),
    ]


def _identified(cells: Iterable[Any]) -> list[Any]:
    """The cells with ids that survive edits elsewhere: the grade id, else a hash of content plus occurrence number."""
    seen: dict[str, int] = {}
    identified = []
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = cell.metadata.get("nbgrader", {}).get("grade_id", f"{digest}-{seen[digest]}")
        identified.append(cell)
    return identified


def _demand_import_cell(cells: Sequence[tuple[Any, int]], path: Path) -> None:
    code = [(cell, line) for cell, line in cells if cell.cell_type == "code"]
    cell, line = code[0] if code else (None, 1)
    wanted = "the first code cell is the import cell: only imports, with `from llmcourse import check, hint`"
    try:
        tree = ast.parse(cell.source if cell else "")
    except SyntaxError as error:
        raise LessonError(path, line + (error.lineno or 0), f"not Python ({error.msg}); {wanted}") from error
    for node in tree.body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            raise LessonError(
                path, line + node.lineno, f"`{ast.unparse(node).splitlines()[0]}` is no import; {wanted}"
            )
    names = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "llmcourse"
        for alias in node.names
        if alias.asname is None
    }
    if missing := {"check", "hint"} - names:
        raise LessonError(path, line, f"{' and '.join(sorted(missing))} not imported; {wanted}")
