"""Every rule of the design over the committed lessons: what is in the repository is what its sources make."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest

from llmcourse import leaks, notebook
from llmcourse.interview_source import read_interview
from llmcourse.lesson_text import REPOSITORY, Course, Expanded, Lesson, exercise_paths, expand, lessons


def found() -> list[Lesson]:
    """The lessons, or none where a folder is not one yet: the first test then says which, and collection goes on."""
    try:
        return lessons()
    except leaks.LessonError:
        return []


LESSONS = found()
LONGEST_CELL_LINES = 15  # outside an exercise: STYLE, "Notebooks"
WIDEST_STATEMENT = 98  # columns of a cell in JupyterLab at 1280 pixels with its file browser open
CORE_MINUTES = 60  # a lesson's exercises without extensions: EXERCISES, "A budget first"
EXCLAIMED = re.compile(r"[\w)`*”\"]![\s)\"”]*$|！", re.MULTILINE)
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u2604\u2607-\u27bf\ufe0f]")  # ★ and ☆ are U+2605 and U+2606

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.text.stem)
each_lesson_with_exercises = pytest.mark.parametrize(
    "lesson",
    [lesson for lesson in LESSONS if "[Exercise: " in lesson.text.read_text(encoding="utf-8")],
    ids=lambda lesson: lesson.text.stem,
)


@cache
def expanded(lesson: Lesson) -> Expanded:
    return expand(lesson)


@cache
def committed(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def students() -> dict[Lesson, bytes]:
    """Every student notebook as nbgrader makes it now, in one run."""
    return notebook.release({lesson: expanded(lesson).notebook for lesson in LESSONS})


def test_every_folder_of_solutions_is_a_lesson() -> None:
    folders = {path.name for path in REPOSITORY.solutions.glob("[!._]*") if path.is_dir()}
    assert {lesson.name for lesson in lessons()} == folders


@each_lesson
def test_committed_solution_is_what_its_text_makes(lesson: Lesson) -> None:
    assert lesson.solution.is_file(), "run `make notebooks`"
    assert notebook.canonical(committed(lesson.solution)) == notebook.canonical(expanded(lesson).notebook)


@each_lesson
def test_committed_student_notebook_is_what_nbgrader_makes_byte_for_byte(
    lesson: Lesson, students: dict[Lesson, bytes]
) -> None:
    path = lesson.student(REPOSITORY)
    assert path.is_file(), "run `make notebooks`"
    assert path.read_bytes() == students[lesson]


@each_lesson
def test_outputs_follow_from_the_lesson_and_its_code(lesson: Lesson) -> None:
    executed_from = committed(lesson.solution).metadata.get("llmcourse", {}).get("executed_from")
    assert executed_from == notebook.execution_digest(lesson, expanded(lesson)), "run `make notebooks`"


@each_lesson
def test_outputs_are_clean_and_every_check_shows_all_its_points(lesson: Lesson) -> None:
    assert leaks.unclean(committed(lesson.solution), expanded(lesson).exercises) == []


@each_lesson
def test_notebooks_are_valid_and_at_most_a_megabyte(lesson: Lesson) -> None:
    for path in (lesson.solution, lesson.student(REPOSITORY)):
        nbformat.validate(committed(path))
        assert path.stat().st_size <= leaks.LARGEST_NOTEBOOK_BYTES


@each_lesson
def test_student_notebook_shows_no_line_of_a_solution_or_alternative(lesson: Lesson) -> None:
    exercises = [leaks.read_exercise(path) for path in exercise_paths(REPOSITORY).values()]
    assert leaks.leaks(committed(lesson.student(REPOSITORY)), exercises) == []


@each_lesson
def test_student_notebook_holds_no_output_and_a_stub_for_each_exercise(lesson: Lesson) -> None:
    student = committed(lesson.student(REPOSITORY))
    code = {cell.id: cell for cell in student.cells if cell.cell_type == "code"}
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code.values())
    for name, exercise in expanded(lesson).exercises.items():
        assert code[name].source == exercise.stub


@each_lesson
def test_a_statement_is_read_without_scrolling_sideways(lesson: Lesson) -> None:
    for exercise in expanded(lesson).exercises.values():
        wide = [line for line in exercise.stub.splitlines() if len(line) > WIDEST_STATEMENT]
        assert not wide, f"{exercise.name}: {wide[0]}"


@each_lesson
def test_student_folder_holds_notebooks_only(lesson: Lesson) -> None:
    made = {edition.student(REPOSITORY) for edition in LESSONS if edition.name == lesson.name}
    found = {
        path for path in lesson.student(REPOSITORY).parent.iterdir() if path.name != ".ipynb_checkpoints"
    }
    assert found == made


@each_lesson
def test_core_exercises_alone_make_nbgraders_points(lesson: Lesson) -> None:
    exercises = expanded(lesson).exercises.values()
    graded = [
        cell.metadata.nbgrader
        for cell in committed(lesson.student(REPOSITORY)).cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    ]
    assert {cell.grade_id: cell.points for cell in graded} == {
        f"check_{exercise.name}": exercise.points for exercise in exercises if not exercise.extension
    }


@each_lesson
def test_core_exercises_fit_into_an_hour(lesson: Lesson) -> None:
    exercises = expanded(lesson).exercises.values()
    assert sum(exercise.minutes for exercise in exercises if not exercise.extension) <= CORE_MINUTES


@each_lesson
def test_code_cells_outside_exercises_are_short(lesson: Lesson) -> None:
    for cell in expanded(lesson).notebook.cells:
        if cell.cell_type == "code" and "nbgrader" not in cell.metadata:
            lines = len(cell.source.splitlines())
            where = f"{lesson.text.name}:{expanded(lesson).lines[cell.id]}"
            assert lines <= LONGEST_CELL_LINES, f"{where}: {lines} lines"


@each_lesson
def test_prose_has_no_emoji_and_no_exclamation_mark(lesson: Lesson) -> None:
    for cell in expanded(lesson).notebook.cells:
        if cell.cell_type == "markdown":
            assert not EMOJI.search(cell.source), cell.source
            assert not EXCLAIMED.search(cell.source), cell.source


@each_lesson
def test_editions_share_their_code_and_exercises(lesson: Lesson) -> None:
    english = next(edition for edition in LESSONS if edition.name == lesson.name)
    assert notebook.editions_differ(expanded(english).notebook, expanded(lesson).notebook) is None
    assert list(expanded(english).exercises) == list(expanded(lesson).exercises)


@each_lesson
def test_lesson_with_exercises_asks_its_question_and_ends_with_the_answer(lesson: Lesson) -> None:
    """Lessons without an interview.toml (the start) have nothing to render; all others show all of it."""
    path = lesson.text.with_name("interview.toml")
    if not path.exists():
        assert lesson.name.startswith("00_"), f"{lesson.name} has no interview.toml"
        return
    interview = read_interview(path)
    everything = "\n".join(cell.source for cell in expanded(lesson).notebook.cells)
    for text in (interview.question.en, interview.question.zh):
        assert " ".join(text.split()) in everything
    for text in (
        interview.one_minute,
        interview.five_minutes,
        *(step.strong for step in interview.followups),
    ):
        assert text.of(lesson.language) in everything


@each_lesson
def test_local_links_lead_somewhere(lesson: Lesson) -> None:
    text = lesson.text.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)\s#]+)", text)
    missing = [target for target in targets if not (lesson.text.parent / target).exists()]
    assert missing == []


def test_every_exercise_of_the_course_is_asked_by_exactly_one_lesson() -> None:
    asked = [name for lesson in LESSONS if lesson.language == "en" for name in expanded(lesson).exercises]
    assert sorted(asked) == sorted(set(asked))
    topics = {lesson.topic for lesson in LESSONS}
    written = {name for name, path in exercise_paths(REPOSITORY).items() if path.parent.name in topics}
    assert set(asked) == written


# ---------------------------------------------------------------------------- untouched and solved, by both graders


@pytest.mark.slow
@each_lesson
def test_untouched_earns_nothing_and_solution_everything_by_stock_nbgrader(
    lesson: Lesson, tmp_path: Path
) -> None:
    course = Course(tmp_path)
    copied(REPOSITORY.nbgrader_config, course.nbgrader_config)
    with course.nbgrader_config.open(
        "a", encoding="utf-8"
    ) as settings:  # which ask the jailed judge otherwise
        settings.write('\ndel c.Autograde["autograde_preprocessors"]\n')
    copied(lesson.solution, course.solutions / lesson.name / lesson.solution.name)
    submitted = tmp_path / "grading" / "submitted"
    for student, path in (("untouched", lesson.student(REPOSITORY)), ("solved", lesson.solution)):
        copied(path, submitted / student / lesson.name / path.name)
    nbgrader = [sys.executable, "-m", "nbgrader"]
    # The folder of the configuration: nbgrader finds it there by itself.
    run([*nbgrader, "generate_assignment", lesson.name], folder=course.nbgrader_config.parent)
    run([*nbgrader, "autograde", lesson.name], folder=course.nbgrader_config.parent)

    from nbgrader.api import Gradebook

    core = [exercise.points for exercise in expanded(lesson).exercises.values() if not exercise.extension]
    with Gradebook(f"sqlite:///{tmp_path}/grading/gradebook.db", "llmcourse") as gradebook:
        scores = {each.student.id: each.score for each in gradebook.assignment_submissions(lesson.name)}
        most = gradebook.find_assignment(lesson.name).max_score
    assert (scores, most) == ({"untouched": 0, "solved": pytest.approx(sum(core))}, pytest.approx(sum(core)))


@each_lesson_with_exercises
def test_untouched_earns_nothing_and_solution_everything_by_llmcourse_check(lesson: Lesson) -> None:
    for path, all_of_it in ((lesson.student(REPOSITORY), False), (lesson.solution, True)):
        told = run(
            [sys.executable, "-m", "llmcourse.cli", "check", str(path), "--json"], folder=REPOSITORY.root
        )
        verdict = json.loads(told)
        earned = {each["name"]: each["points"] for each in verdict["exercises"]}
        exercises = expanded(lesson).exercises
        assert earned == pytest.approx(
            {name: exercises[name].points if all_of_it else 0 for name in exercises}
        )
        core = sum(each.points for each in exercises.values() if not each.extension)
        assert verdict["max_points"] == pytest.approx(core)
        assert verdict["points"] == pytest.approx(core if all_of_it else 0)
        assert verdict["extra_points"] == pytest.approx(sum(earned.values()) - verdict["points"])


def copied(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())


def run(command: list[str], *, folder: Path) -> str:
    """What a command prints; its stderr when it fails."""
    environment = notebook.execution_environment(REPOSITORY, str(folder / ".ipython"))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
