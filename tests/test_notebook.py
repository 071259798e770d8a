"""Lesson text -> notebooks, on a tiny course of its own: every guard is tripped, every file is compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from llmcourse import notebook as building
from llmcourse.interview_source import read_interview
from llmcourse.leaks import LessonError, leaks, private_folders, read_exercise, telling_lines, unclean
from llmcourse.lesson_text import Course, Lesson, expand, lessons

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "03_doubling"

LESSON = """\
# Doubling

[Question](interview.toml)

```python
from llmcourse import check, hint
```

## The smallest example

```python
# NBVAL_CHECK_OUTPUT
import os
print(os.environ["LLMCOURSE_SEED"], os.environ["OMP_NUM_THREADS"], os.listdir())
```

```console
$ ls
```

## Exercises

Why it matters.

[Exercise: double](../../llmcourse/lessons/doubling/double.py)

See it.

[Exercise: Total](../../llmcourse/lessons/doubling/Total.py)

[Exercise: triple](../../llmcourse/lessons/doubling/triple.py)

```python
print(double(21), triple(2))
```

## The answer you can now give

[Interview](interview.toml)

Sources: none.
"""

DOUBLE = '''\
from llmcourse.exercise import alternative, exercise, mistake


@exercise(points=2, minutes=5, hints=("Which number is twice another?",))
def double(number: int) -> int:
    """Twice the number: `double(2)` is 4."""
    ### BEGIN SOLUTION
    twice_the_number = number + number
    return twice_the_number
    ### END SOLUTION


@alternative(double, "Multiplies")
def multiplied(number):
    """Not a line of the body."""
    factor_of_doubling = 2
    return number * factor_of_doubling


@mistake(double, "Squares, which is right for 2 only.")
def squared(number):
    squared_number = number**2
    return squared_number
'''

TOTAL = '''\
from llmcourse.exercise import exercise


@exercise(points=1.5, minutes=10)
class Total:
    """A sum that is added to."""

    def __init__(self) -> None:
        """Starts at zero."""
        ### BEGIN SOLUTION
        self.added_so_far = 0
        ### END SOLUTION

    def add(self, number: int) -> int:
        """The sum after adding number."""
        ### BEGIN SOLUTION
        self.added_so_far += number
        return self.added_so_far
        ### END SOLUTION
'''

TRIPLE = '''\
from llmcourse.exercise import exercise


@exercise(points=4, minutes=10, extension=True)
def triple(number: int) -> int:
    """Three times the number."""
    ### BEGIN SOLUTION
    return number + number + number
    ### END SOLUTION
'''

INTERVIEW = """\
frequency = "rarely, by our judgement"

[question]
en = "What is twice two?"
zh = "二的两倍是多少？"

[answers]
one_minute = "Four, since *two and two* are four."
five_minutes = "Four, at length."

[[followups]]
question_en = "And thrice?"
question_zh = "三倍呢？"
strong = "Six, and says why."
weak = "Four."

[[rubric]]
points = 2
criterion = "says four | at once"
"""

# Stands for the library in the kernels of these tests: a check that knows three answers.
PACKAGE = """\
class Score(float):
    def _repr_html_(self):
        return f"<b>{float(self)}</b>"


def check(answer):
    try:
        if answer.__name__ == "Total":
            total = answer()
            return Score(1.5 if (total.add(3), total.add(4)) == (3, 7) else 0)
        return Score({"double": 2.0, "triple": 4.0}[answer.__name__] if answer(7) in (14, 21) else 0)
    except NotImplementedError:
        return Score(0)


def hint(answer):
    print("no hint")
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Course:
    course = Course(tmp_path_factory.mktemp("course"))
    write(course.solutions / NAME / f"{NAME}.md", LESSON)
    write(course.solutions / NAME / "interview.toml", INTERVIEW)
    for name, text in (("double", DOUBLE), ("Total", TOTAL), ("triple", TRIPLE)):
        write(course.exercises / "doubling" / f"{name}.py", text)
    write(course.package / "__init__.py", PACKAGE)
    write(course.nbgrader_config, (REPOSITORY / "grading" / "nbgrader_config.py").read_text(encoding="utf-8"))
    report = building.build(course)
    assert report.problems == []
    assert report.written == [
        course.solutions / NAME / f"{NAME}.ipynb",
        course.notebooks / NAME / f"{NAME}.ipynb",
    ]
    return course


@pytest.fixture
def course(built_once: Course, tmp_path: Path) -> Course:
    """A built course to change; a copy, so that tests do not meet."""
    return Course(Path(shutil.copytree(built_once.root, tmp_path / "course")))


def text_of(course: Course) -> Path:
    return course.solutions / NAME / f"{NAME}.md"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def line_of(path: Path, part: str) -> int:
    return next(n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if part in line)


def only_lesson(course: Course) -> Lesson:
    (lesson,) = lessons(course)
    return lesson


def cell(notebook: Any, cell_id: str) -> Any:
    return next(each for each in notebook.cells if each.id == cell_id)


def student_of(course: Course) -> Any:
    return nbformat.read(only_lesson(course).student(course), as_version=nbformat.NO_CONVERT)


def solution_of(course: Course) -> Any:
    return nbformat.read(only_lesson(course).solution, as_version=nbformat.NO_CONVERT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ what it makes


def test_exercise_becomes_a_heading_an_answer_and_a_check_with_nbgrader_metadata(built_once: Course) -> None:
    cells = expand(only_lesson(built_once), built_once).notebook.cells
    at = next(index for index, each in enumerate(cells) if each.id == "double")
    assert cells[at - 1].source.startswith("### Exercise: `double` · 2 points · about 5 minutes\n")
    assert "hint(double)" in cells[at - 1].source
    assert cells[at].source == DOUBLE[DOUBLE.index("def double") : DOUBLE.index("\n\n\n@alternative")]
    assert {key: cells[at].metadata.nbgrader[key] for key in ("grade", "solution", "locked", "grade_id")} == {
        "grade": False,
        "solution": True,
        "locked": False,
        "grade_id": "double",
    }
    check = cells[at + 1]
    assert (check.source, check.id) == ("check(double)", "check_double")
    assert (check.metadata.nbgrader.grade, check.metadata.nbgrader.locked) == (True, True)
    assert (check.metadata.nbgrader.solution, check.metadata.nbgrader.points) == (False, 2)


def test_exercise_without_hints_suggests_none(built_once: Course) -> None:
    cells = expand(only_lesson(built_once), built_once).notebook.cells
    heading = next(each for each in cells if "`Total`" in each.source)
    assert heading.source == "### Exercise: `Total` · 1.5 points · about 10 minutes"


def test_extension_is_starred_locked_and_outside_the_hundred_per_cent(built_once: Course) -> None:
    notebook = expand(only_lesson(built_once), built_once).notebook
    assert any(each.source.startswith("### ★ Exercise: `triple` · 4 extra points") for each in notebook.cells)
    check = cell(notebook, "check_triple").metadata.nbgrader
    assert (check.grade, check.locked, check.get("points")) == (False, True, None)


def test_student_notebook_has_stubs_and_no_line_of_an_answer(built_once: Course) -> None:
    student = student_of(built_once)
    assert cell(student, "double").source == (
        "def double(number: int) -> int:\n"
        '    """Twice the number: `double(2)` is 4."""\n'
        "    raise NotImplementedError"
    )
    assert cell(student, "Total").source.count("raise NotImplementedError") == 2
    everything = "\n".join(each.source for each in student.cells)
    for secret in ("twice_the_number", "factor_of_doubling", "added_so_far", "SOLUTION"):
        assert secret not in everything
    assert all(not each.get("outputs") for each in student.cells)
    assert "llmcourse" not in student.metadata


def test_solution_notebook_was_executed_in_an_empty_folder_under_a_fixed_seed_and_one_thread(
    built_once: Course,
) -> None:
    notebook = solution_of(built_once)
    printed = [
        output.text for each in notebook.cells for output in each.get("outputs", []) if "text" in output
    ]
    assert printed == ["0 1 []\n", "42 6\n"]
    assert cell(notebook, "check_double").outputs[0].data["text/plain"] == "2.0"
    counts = [each.execution_count for each in notebook.cells if each.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_interview_is_rendered_folded_and_the_question_stands_in_both_languages(built_once: Course) -> None:
    cells = expand(only_lesson(built_once), built_once).notebook.cells
    question = next(each.source for each in cells if "What is twice two?" in each.source)
    assert "二的两倍是多少？" in question and "rarely, by our judgement" in question
    assert cells[0].source == "# Doubling" and cells[1].source == question
    everything = "\n".join(each.source for each in cells)
    assert everything.count("<details>") == everything.count("</details>") == 1 + 2 + 1 + 1
    assert "(interview.toml)" not in everything
    for said in (
        "Four, at length.",
        "**Strong.** Six, and says why.",
        "**Weak.** Four.",
        r"| 2 | says four \| at once |",
    ):
        assert said in everything
    assert cells[-1].source == "Sources: none."


def test_text_blocks_stay_text_and_marked_cells_keep_their_mark(built_once: Course) -> None:
    cells = expand(only_lesson(built_once), built_once).notebook.cells
    assert any(each.cell_type == "markdown" and "```console\n$ ls\n```" in each.source for each in cells)
    assert sum(each.source.startswith("# NBVAL_CHECK_OUTPUT\n") for each in cells) == 1


def test_expanding_twice_gives_the_same_bytes(built_once: Course) -> None:
    lesson = only_lesson(built_once)
    first, second = (building.to_bytes(expand(lesson, built_once).notebook) for _ in range(2))
    assert first == second


def test_cell_ids_survive_edits_elsewhere_and_tell_equal_cells_apart(course: Course) -> None:
    before = [each.id for each in expand(only_lesson(course), course).notebook.cells]
    edit(text_of(course), "See it.\n", "See it.\n\n```python\nprint(1)\n```\n\n```python\nprint(1)\n```\n")
    after = [each.id for each in expand(only_lesson(course), course).notebook.cells]
    assert set(before) < set(after)
    added = [each for each in after if each not in before]
    assert len(added) == 2 and added[0][:-1] == added[1][:-1] and (added[0][-1], added[1][-1]) == ("1", "2")
    assert len(set(after)) == len(after)


def test_canonical_form_forgets_outputs_and_keeps_sources(built_once: Course) -> None:
    lesson = only_lesson(built_once)
    expanded = expand(lesson, built_once).notebook
    executed = solution_of(built_once)
    assert building.canonical(executed) == building.canonical(expanded)
    assert building.to_bytes(executed) != building.to_bytes(expanded)
    cell(executed, "double").source += "\n"
    assert building.canonical(executed) != building.canonical(expanded)


def test_second_edition_has_its_own_prose_and_the_same_code(course: Course) -> None:
    chinese = LESSON.replace("# Doubling", "# 加倍").replace("See it.", "看一看。")
    write(course.solutions / NAME / f"{NAME}.zh.md", chinese)
    english_lesson, chinese_lesson = lessons(course)
    english, other = (expand(each, course).notebook for each in (english_lesson, chinese_lesson))
    assert building.editions_differ(english, other) is None
    assert any(each.source.startswith("### 练习：`double` · 2 分") for each in other.cells)
    report = building.build(course)
    assert report.problems == []
    assert [path.name for path in report.written] == [f"{NAME}.zh.ipynb"] * 2


def test_second_edition_with_another_code_cell_is_refused(course: Course) -> None:
    path = write(course.solutions / NAME / f"{NAME}.zh.md", LESSON.replace("double(21)", "double(22)"))
    (problem,) = building.build(course, check_only=True).problems
    assert (
        f"{NAME}.zh.md:{line_of(path, 'double(22)') - 1}: the English edition has another code cell"
        in problem
    )


# ------------------------------------------------------------------------------------------------- what it refuses


LESSON_ERRORS: dict[str, tuple[str, str, str, str]] = {
    "unknown exercise": (
        "Exercise: double](../../llmcourse/lessons/doubling/double.py",
        "Exercise: halve](../../llmcourse/lessons/doubling/halve.py",
        "Exercise: halve",
        "no exercise is named halve",
    ),
    "exercise of another lesson": (
        "lessons/doubling/double.py",
        "lessons/tripling/double.py",
        "Exercise: double",
        "write (../../llmcourse/lessons/doubling/double.py)",
    ),
    "exercise twice": (
        "See it.",
        "[Exercise: double](../../llmcourse/lessons/doubling/double.py)",
        "Exercise: double",
        "linked twice",
    ),
    "link inside a sentence": (
        "Why it matters.",
        "Do [Exercise: double](x.py) now.",
        "Do [",
        "alone on its line",
    ),
    "link of another case": ("Why it matters.", "[exercise: double](x.py)", "[exercise", "alone on its line"),
    "another interview": (
        "[Interview](interview.toml)",
        "[Interview](other.toml)",
        "other.toml",
        "found (other.toml)",
    ),
    "code of another language": ("```console", "```bash", "```bash", "only ```python runs"),
    "code block left open": (
        "```\n\n## Exercises",
        "\n\n## Exercises",
        "```python",
        "opens inside the one of line 17",
    ),
    "last code block left open": ("Sources: none.", "```text\nnone", "", "is never closed"),
    "empty cell": ("print(double(21), triple(2))\n", "\n", "", "an empty code cell"),
    "first cell imports no hint": ("check, hint", "check", "", "hint not imported"),
    "first cell does more": (
        "check, hint\n",
        "check, hint\ncheck = 3\n",
        "check = 3",
        "`check = 3` is no import",
    ),
    "first cell is not Python": ("check, hint\n", "check, hint\n1 +\n", "1 +", "not Python"),
}


@pytest.mark.parametrize("error", LESSON_ERRORS)
def test_lesson_error_names_file_line_and_remedy(built_once: Course, tmp_path: Path, error: str) -> None:
    course = Course(Path(shutil.copytree(built_once.root, tmp_path / "course")))
    old, new, where, message = LESSON_ERRORS[error]
    edit(text_of(course), old, new)
    with pytest.raises(LessonError) as caught:
        expand(only_lesson(course), course)
    assert message in str(caught.value)
    if where:
        wanted = [n for n, line in enumerate(text_of(course).read_text().splitlines(), 1) if where in line]
        assert any(f"{NAME}.md:{line}: " in str(caught.value) for line in wanted)


def test_missing_interview_is_named(course: Course) -> None:
    (course.solutions / NAME / "interview.toml").unlink()
    with pytest.raises(LessonError, match=r"03_doubling\.md:3: .*interview\.toml is missing"):
        expand(only_lesson(course), course)


def test_folder_that_is_no_lesson_is_named(course: Course) -> None:
    (course.solutions / "drafts").mkdir()
    with pytest.raises(LessonError, match=r"drafts\.md:1: expected a lesson"):
        lessons(course)


EXERCISE_ERRORS: dict[str, tuple[str, str, str]] = {
    "no markers": ("    ### BEGIN SOLUTION\n", "", "without"),
    "no end": ("    ### END SOLUTION\n", "", "without"),
    "nothing marked": ("### ", "# ", "no solution is marked"),
    "no points": ("points=2, ", "", "@exercise has no points"),
    "points not literal": ("points=2", "points=1 + 1 * n", "expected a literal int or float above 0"),
    "no points at all": ("points=2", "points=0", "expected a literal int or float above 0"),
    "minutes of another type": ("minutes=5", "minutes='5'", "expected a literal int above 0"),
    "another name": ("def double(", "def twice(", "no top-level function or class is named double"),
    "no decorator": ("@exercise(", "@other(", "has no @exercise"),
    "not Python": ("def double(", "def (", "not Python"),
    "stub is not Python": (
        "    return twice_the_number\n    ### END SOLUTION\n",
        "    if number:\n    ### END SOLUTION\n        return twice_the_number\n",
        "without its solution this is not Python",
    ),
}


@pytest.mark.parametrize("error", EXERCISE_ERRORS)
def test_exercise_error_names_file_line_and_remedy(tmp_path: Path, error: str) -> None:
    old, new, message = EXERCISE_ERRORS[error]
    text = DOUBLE.replace(old, new) if error == "nothing marked" else DOUBLE.replace(old, new, 1)
    assert text != DOUBLE
    path = write(tmp_path / "double.py", text)
    with pytest.raises(LessonError, match=r"double\.py:\d+: ") as caught:
        read_exercise(path)
    assert message in str(caught.value)


def test_two_exercises_of_one_name_are_refused_with_both_files(course: Course) -> None:
    write(course.exercises / "tripling" / "double.py", DOUBLE)
    with pytest.raises(
        LessonError, match=r"tripling/double\.py:1: another exercise is named double: .*doubling/double\.py"
    ):
        building.build(course)


def test_exercise_that_no_lesson_asks_is_named(course: Course) -> None:
    write(course.exercises / "doubling" / "quadruple.py", TRIPLE.replace("triple", "quadruple"))
    problems = building.build(course, check_only=True).problems
    assert any("quadruple.py:1: no lesson asks quadruple" in problem for problem in problems)


INTERVIEW_ERRORS: dict[str, tuple[str, str, str]] = {
    "missing question": (
        'zh = "二的两倍是多少？"\n',
        "",
        r"toml:3: expected a text as 'zh' in \[question\], found nothing",
    ),
    "empty answer": ('"Four, at length."', '" "', r"toml:9: expected a text as 'five_minutes'"),
    "unknown key": ("weak =", "week =", r"toml:15: unknown key 'week' in \[followups\]; known: .*weak"),
    "no rubric": ("[[rubric]]", "[[rubrics]]", r"toml:\d+: unknown key 'rubrics'"),
    "no follow-ups": (
        "[[followups]]",
        "[followups]",
        r"toml:11: expected one or more tables \[\[followups\]\]",
    ),
    "half a point": ("points = 2", "points = 0.5", r"toml:18: expected a whole number above 0 as 'points'"),
    "not TOML": ('en = "', "en = ", r"toml:4: not TOML"),
}


@pytest.mark.parametrize("error", INTERVIEW_ERRORS)
def test_interview_error_names_file_line_and_key(tmp_path: Path, error: str) -> None:
    old, new, message = INTERVIEW_ERRORS[error]
    assert old in INTERVIEW
    path = write(tmp_path / "interview.toml", INTERVIEW.replace(old, new, 1))
    with pytest.raises(LessonError, match=message):
        read_interview(path)


def test_interview_shows_english_where_chinese_is_missing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "interview.toml", INTERVIEW.replace("[question]", 'frequency_zh = "很少"\n\n[question]')
    )
    interview = read_interview(path)
    assert (interview.frequency.zh, interview.one_minute.zh) == ("很少", interview.one_minute.en)


# ------------------------------------------------------------------------------------------------------------- leaks


def test_telling_lines_are_those_of_reference_and_alternatives_and_not_of_the_statement(
    built_once: Course,
) -> None:
    exercise = read_exercise(built_once.exercises / "doubling" / "double.py")
    assert set(telling_lines(exercise)) == {
        "twice_the_number = number + number",
        "return twice_the_number",
        "factor_of_doubling = 2",
        "return number * factor_of_doubling",
    }


def test_line_of_the_statement_is_no_secret(tmp_path: Path) -> None:
    path = write(tmp_path / "double.py", DOUBLE.replace("Twice the number:", "`return twice_the_number`:"))
    assert "return twice_the_number" not in telling_lines(read_exercise(path))


@pytest.mark.parametrize(
    "shown",
    [
        "Remember: `return number  * factor_of_doubling`.",
        "```text\n    return twice_the_number\n```",
        "```python\ntwice_the_number = number + number\n```",
    ],
    ids=["inline in prose, spaced otherwise", "in a text block", "in a code cell"],
)
def test_leaked_line_stops_the_build_and_names_the_exercise(course: Course, shown: str) -> None:
    before = contents(course.notebooks)
    edit(text_of(course), "Why it matters.", shown)
    problems = building.build(course).problems
    assert any(
        "a line of the solution or an alternative in" in problem and "(double)" in problem
        for problem in problems
    )
    assert contents(course.notebooks) == before


def test_part_of_a_longer_word_is_no_leak(built_once: Course) -> None:
    exercise = read_exercise(built_once.exercises / "doubling" / "double.py")
    harmless = {"cells": [{"id": "a", "source": "return twice_the_numbers"}]}
    assert leaks(harmless, [exercise]) == []


# ------------------------------------------------------------------------------------------------------ clean outputs


def executed(*outputs: dict[str, Any]) -> Any:
    source = nbformat.v4.new_code_cell(
        "check(double)", execution_count=1, outputs=[nbformat.from_dict(o) for o in outputs]
    )
    source.id = "somewhere"
    return nbformat.v4.new_notebook(cells=[source])


def shows(**data: str) -> dict[str, Any]:
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {kind.replace("_", "/"): v for kind, v in data.items()},
    }


DIRTY: dict[str, tuple[dict[str, Any], str]] = {
    "traceback": (
        {"output_type": "error", "ename": "TypeError", "evalue": "no", "traceback": []},
        "raised TypeError: no",
    ),
    "stderr": ({"output_type": "stream", "name": "stderr", "text": "careful\n"}, "wrote to stderr: careful"),
    "address": (
        shows(text_plain="<function f at 0x7f00deadbeef>"),
        "an object's address (at 0x7f00deadbeef)",
    ),
    "home": (shows(text_html=f"<b>{Path.home()}/models</b>"), "shows a path under"),
    "temporary folder": (
        {"output_type": "stream", "name": "stdout", "text": "/tmp/x/model\n"},
        "a path under /tmp/",
    ),
    "widget": ({**shows(), "data": {"application/vnd.jupyter.widget-view+json": {}}}, "holds a widget"),
    "another picture": (
        {**shows(), "data": {"image/svg+xml": "<svg/>"}},
        "holds image/svg+xml; expected image/png",
    ),
}


@pytest.mark.parametrize("kind", DIRTY)
def test_dirty_output_is_named(kind: str) -> None:
    output, message = DIRTY[kind]
    ((cell_id, found),) = unclean(executed(output), {})
    assert cell_id == "somewhere" and message in found


def test_ordinary_outputs_are_clean() -> None:
    figure = {
        **shows(),
        "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x480 with 1 Axes>"},
    }
    printed = {
        "output_type": "stream",
        "name": "stdout",
        "text": "offset 0x10, 3 / 4 tmp, TypeError: no chunks\n",
    }
    assert unclean(executed(figure, printed), {}) == []


def test_cells_run_out_of_order_and_widget_state_are_named() -> None:
    notebook = executed()
    notebook.cells[0].execution_count = 7
    notebook.metadata["widgets"] = {}
    messages = [message for _, message in unclean(notebook, {})]
    assert (
        len(messages) == 2
        and "widget state" in messages[0]
        and "execution count 7, expected 1" in messages[1]
    )


@pytest.mark.parametrize("result", ["1.0", "nan", None], ids=["less", "not a number", "nothing"])
def test_check_cell_that_shows_less_than_all_points_is_named(built_once: Course, result: str | None) -> None:
    exercise = read_exercise(built_once.exercises / "doubling" / "double.py")
    shown = {
        "output_type": "execute_result",
        "execution_count": 1,
        "metadata": {},
        "data": {"text/plain": result},
    }
    notebook = executed(*([shown] if result else []))
    notebook.cells[0].id = "check_double"
    ((cell_id, message),) = unclean(notebook, {"double": exercise})
    assert cell_id == "check_double" and "of 2 points" in message


def test_private_folders_end_in_a_slash_so_that_longer_names_are_others() -> None:
    assert all(folder.endswith("/") and len(folder) > 1 for folder in private_folders())


# -------------------------------------------------------------------------------------------------------- staleness


def test_second_build_writes_nothing(course: Course) -> None:
    before = {path: path.stat().st_mtime_ns for path in course.root.rglob("*.ipynb")}
    report = building.build(course)
    assert (report.written, report.problems) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in course.root.rglob("*.ipynb")} == before
    assert building.main(["--check"], course=course) == 0


def change_solution_by_hand(course: Course) -> None:
    path = only_lesson(course).solution
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    cell(notebook, "double").source += "  # by hand"
    nbformat.write(notebook, path)


def dirty_the_solution(course: Course) -> None:
    path = only_lesson(course).solution
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    cell(notebook, "check_double").execution_count = 99
    nbformat.write(notebook, path)


STALE: dict[str, tuple[Callable[[Course], Any], str]] = {
    "prose": (lambda course: edit(text_of(course), "See it.", "Look."), "not what 03_doubling.md makes"),
    "exercise": (
        lambda course: edit(course.exercises / "doubling" / "double.py", "number + number", "2 * number"),
        "not what 03_doubling.md makes",
    ),
    "what proves the exercise": (
        lambda course: edit(course.exercises / "doubling" / "double.py", "**2", "**3"),
        "executed before",
    ),
    "library": (lambda course: write(course.package / "model.py", "x = 1\n"), "executed before"),
    "model": (lambda course: write(course.package / "zoo" / "tiny.safetensors", "x"), "executed before"),
    "interview": (
        lambda course: edit(course.solutions / NAME / "interview.toml", "at length", "in full"),
        "not what 03_doubling.md makes",
    ),
    "solution by hand": (change_solution_by_hand, "not what 03_doubling.md makes"),
    "solution with a dirty output": (dirty_the_solution, "execution count 99"),
    "solution damaged": (lambda course: only_lesson(course).solution.write_text("{"), "missing or damaged"),
    "solution missing": (lambda course: only_lesson(course).solution.unlink(), "missing or damaged"),
    "student by hand": (
        lambda course: edit(only_lesson(course).student(course), "See it.", "See it"),
        "not what nbgrader makes",
    ),
    "student missing": (
        lambda course: only_lesson(course).student(course).unlink(),
        "not what nbgrader makes",
    ),
    "student file without lesson": (
        lambda course: write(course.notebooks / "09_gone" / "09_gone.ipynb", "{}"),
        "no lesson makes this file",
    ),
}


@pytest.mark.parametrize("change", STALE)
def test_check_names_what_is_stale_and_writes_nothing(
    course: Course, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    make, message = STALE[change]
    make(course)
    before = contents(course.root)
    assert building.main(["--check"], course=course) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "make notebooks" in told or change in (
        "solution with a dirty output",
        "student file without lesson",
    )
    assert contents(course.root) == before


def test_code_that_lessons_never_run_makes_nothing_stale(course: Course) -> None:
    write(course.package / "cli.py", "x = 1\n")
    assert building.main(["--check"], course=course) == 0


def test_build_mends_what_check_names(course: Course) -> None:
    edit(text_of(course), "double(21)", "double(22)")
    only_lesson(course).student(course).unlink()
    report = building.build(course, ["doubling"])
    assert report.problems == [] and len(report.written) == 2
    assert building.main(["--check", "03"], course=course) == 0


# --------------------------------------------------------------------------------------------------- failing half-way


FAILING_CELLS: dict[str, tuple[str, str]] = {
    "raises": ("raise ValueError('three')", "raised ValueError: three"),
    "writes to stderr": ("import sys; print('careful', file=sys.stderr)", "wrote to stderr: careful"),
    "ends its kernel": ("import os; os._exit(3)", "ended its kernel"),
}


@pytest.mark.parametrize("kind", FAILING_CELLS)
def test_cell_that_fails_is_named_by_its_line_and_every_file_stays(course: Course, kind: str) -> None:
    source, message = FAILING_CELLS[kind]
    edit(text_of(course), "print(double(21), triple(2))", source)
    before = contents(course.root)
    report = building.build(course)
    (problem,) = report.problems
    line = line_of(text_of(course), source) - 1
    assert f"{NAME}.md:{line}: the cell `{source}` {message}" in problem
    assert report.written == [] and contents(course.root) == before


def test_kernel_knows_nothing_of_a_learners_workspace_or_of_grading(
    built_once: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in building.SETTINGS_OF_LEARNERS:
        monkeypatch.setenv(name, "1")
    environment = building.execution_environment(built_once, "profile")
    assert not building.SETTINGS_OF_LEARNERS & set(environment)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(built_once.root)


def test_reference_that_fails_its_check_is_never_committed(course: Course) -> None:
    edit(course.exercises / "doubling" / "double.py", "number + number", "number + 1")
    (problem,) = building.build(course).problems
    assert "the cell `check(double)` the reference earned 0.0 of 2 points" in problem


def test_one_broken_lesson_does_not_hold_up_the_others(course: Course) -> None:
    write(course.solutions / "04_empty" / "04_empty.md", "# Nothing\n")
    edit(text_of(course), "See it.", "Look.")
    report = building.build(course)
    (problem,) = report.problems
    assert "04_empty.md:1: check and hint not imported" in problem
    assert {path.name for path in report.written} == {f"{NAME}.ipynb"}


def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "lesson.ipynb", "before")

    def no_space(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        building.replace_file(path, b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["lesson.ipynb"] and path.read_text() == "before"


def test_command_line_says_what_it_needs(
    course: Course, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert building.main(["--check", "08"], course=course) == 1
    assert "no lesson is named 08; there is: 03_doubling" in capsys.readouterr().err

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "build", interrupted)
    assert building.main([], course=course) == 130
    assert "interrupted" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- as stock nbgrader sees it


def test_build_copies_no_sibling_and_leaves_the_teachers_gradebook_alone(course: Course) -> None:
    gradebook = write(course.root / "grading" / "gradebook.db", "the teacher's")
    edit(text_of(course), "See it.", "Look.")
    assert building.build(course).problems == []
    assert gradebook.read_text() == "the teacher's"
    assert list(contents(course.notebooks)) == [f"{NAME}/{NAME}.ipynb"]
    assert sorted(path.name for path in course.root.iterdir()) == [
        "grading",
        "llmcourse",
        "notebooks",
        "solutions",
    ]


def nbgrader(course: Course, folder: str, *arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course.root / folder,
        env={**os.environ, "PYTHONPATH": str(course.root), "IPYTHONDIR": str(course.root / ".ipython")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def scores(course: Course) -> dict[str, tuple[float, float]]:
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course.root}/grading/gradebook.db", "llmcourse") as gradebook:
        found = gradebook.assignment_submissions(NAME)
        assert not any(submission.needs_manual_grade for submission in found)
        return {submission.student.id: (submission.score, submission.max_score) for submission in found}


def test_stock_nbgrader_refuses_more_points_than_a_cell_is_worth() -> None:
    """Why the check of an extension is locked and not graded: as a cell of 0 points it would fail the submission."""
    from nbgrader.utils import determine_grade

    score = {
        "output_type": "execute_result",
        "execution_count": 1,
        "metadata": {},
        "data": {"text/plain": "4.0"},
    }
    check = executed(score).cells[0]
    check.metadata["nbgrader"] = {"grade": True, "solution": False, "points": 0}
    with pytest.raises(ValueError, match="partial credit cannot be greater"):
        determine_grade(nbformat.from_dict(check))


def test_teacher_generates_the_same_bytes_and_grades_with_stock_nbgrader(course: Course) -> None:
    student = only_lesson(course).student(course)
    ours = student.read_bytes()
    nbgrader(
        course, "", "generate_assignment", NAME, "--force", "--NbGrader.config_file=grading/nbgrader_config"
    )
    assert student.read_bytes() == ours

    untouched = nbformat.reads(ours.decode(), as_version=nbformat.NO_CONVERT)
    solved = solution_of(course)
    shortened = json.loads(json.dumps(untouched))
    shortened["cells"] = [each for each in shortened["cells"] if each["id"] != "check_double"]
    helped = nbformat.reads(ours.decode(), as_version=nbformat.NO_CONVERT)
    own = nbformat.v4.new_code_cell(
        "import operator\n\nFACTOR = 2\n\n\ndef times(a, b):\n    return operator.mul(a, b)"
    )
    helped.cells.insert(2, own)
    answer = cell(helped, "double")
    answer.source = answer.source.replace("raise NotImplementedError", "return times(FACTOR, number)")
    for name, notebook in (
        ("untouched", untouched),
        ("solved", solved),
        ("shortened", shortened),
        ("helped", helped),
    ):
        path = course.root / "grading" / "submitted" / name / NAME / f"{NAME}.ipynb"
        write(path, nbformat.writes(nbformat.from_dict(notebook)))
    # The course's own settings ask the jailed judge; this is nbgrader as it comes, which executes notebooks.
    settings = course.nbgrader_config
    write(settings, settings.read_text(encoding="utf-8") + '\ndel c.Autograde["autograde_preprocessors"]\n')
    nbgrader(course, "grading", "autograde", NAME)
    assert scores(course) == {
        "untouched": (0, 3.5),
        "solved": (3.5, 3.5),
        "shortened": (0, 3.5),
        "helped": (2, 3.5),
    }
