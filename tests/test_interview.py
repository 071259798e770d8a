from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llmcourse import interview, interview_plan, interview_record, workspace
from llmcourse.interview_record import Book
from llmcourse.leaks import leaks, read_exercise
from llmcourse.workspace import WorkspaceError

LESSON, TOPIC = "01_first_topic", "first_topic"
EXERCISES = {"quick_one": 5, "slow_one": 9, "long_one": 16}
IMPORTS = "import math\nfrom typing import Any\n\nfrom llmcourse import check, hint, sizing"

EXERCISE = '''
from llmcourse.exercise import alternative, exercise


@exercise(points=3, minutes={minutes}, hints=("the idea of it", "the line that goes wrong"){uses})
def {name}(values):
    """Return the sum of the values; about 2 lines."""
    ### BEGIN SOLUTION
    total_of_{name} = sum(values)
    return total_of_{name}
    ### END SOLUTION


@alternative({name}, "Adds one by one")
def one_by_one(values):
    running_total_of_{name} = 0
    return running_total_of_{name}
'''

QUESTIONS = """
frequency = "often"
[question]
en = "How are the values stored?"
zh = "这些值如何存储？"
[answers]
one_minute = "The model answer of one minute."
five_minutes = "The model answer of five minutes."
[[followups]]
question_en = "First follow-up?"
question_zh = "追问一？"
strong = "Strong words one."
weak = "Weak words one."
[[followups]]
question_en = "Second follow-up?"
question_zh = "追问二？"
strong = "Strong words two."
weak = "Weak words two."
[[followups]]
question_en = "Third follow-up?"
question_zh = "追问三？"
strong = "Strong words three."
weak = "Weak words three."
[[rubric]]
points = 2
criterion = "Says the bound first."
[[rubric]]
points = 1
criterion = "Says how it was measured."
"""
SECRETS = (
    "model answer",
    "Strong words",
    "Weak words",
    "follow-up?",
    "bound first",
    "the idea of it",
    "goes wrong",
)


class Clocks:
    """The steady clock and the wall clock, moved by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steady_s = 1000.0
        self.wall = datetime(2026, 11, 23, 18, 0, tzinfo=timezone(timedelta(hours=1)))
        monkeypatch.setattr(interview, "_steady_s", lambda: self.steady_s)
        monkeypatch.setattr(interview_record, "now", lambda: self.wall)

    def work(self, *, minutes: float) -> None:
        self.steady_s += 60 * minutes
        self.wall += timedelta(minutes=minutes)

    def away(self, *, minutes: float) -> None:
        """No kernel runs: the next one's steady clock starts anywhere."""
        interview._live.clear()
        self.steady_s = 5.0
        self.wall += timedelta(minutes=minutes)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a lesson of a question and three exercises, one of exercises alone, and one of neither."""
    root = tmp_path / "a clone"
    monkeypatch.setattr(workspace, "PACKAGE", root / "llmcourse")
    monkeypatch.delenv("LLMCOURSE_WORKSPACE", raising=False)
    for lesson in ("00_start", LESSON, "02_second_topic"):
        (root / "solutions" / lesson).mkdir(parents=True)
        (root / "notebooks" / lesson).mkdir(parents=True)
        cells = [{"cell_type": "markdown", "source": ["# Prose"]}, {"cell_type": "code", "source": [IMPORTS]}]
        (root / "notebooks" / lesson / f"{lesson}.ipynb").write_text(json.dumps({"cells": cells}))
    (root / "solutions" / LESSON / "interview.toml").write_text(QUESTIONS, encoding="utf-8")
    for name, minutes in EXERCISES.items():
        add_exercise(root, TOPIC, name, minutes)
    add_exercise(root, "second_topic", "other_one", 4)
    (root / "pyproject.toml").touch()
    monkeypatch.chdir(root)
    return root


def add_exercise(root: Path, topic: str, name: str, minutes: int, uses: str = "") -> None:
    path = root / "llmcourse" / "lessons" / topic / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EXERCISE.format(name=name, minutes=minutes, uses=uses))


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stands for the judge: `verdicts("wrong", ["sentence"])` is what the next checks find."""
    found: dict[str, Any] = {}

    class Score(float):
        verdict: Any

    def check(answer: Any) -> Score:
        found.get("meanwhile", lambda: None)()
        score = Score(3.0 if found["verdict"] == "right" else 0.0)
        mistakes = [SimpleNamespace(sentence=sentence) for sentence in found["mistakes"]]
        score.verdict = SimpleNamespace(name=answer.__name__, verdict=found["verdict"], mistakes=mistakes)
        return score

    def next_is(
        verdict: str, mistakes: tuple[str, ...] = (), meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        found.update(verdict=verdict, mistakes=mistakes, meanwhile=meanwhile)

    module = ModuleType("llmcourse.checking")
    vars(module).update(check=check)
    monkeypatch.setitem(sys.modules, "llmcourse.checking", module)
    monkeypatch.setattr(sys.modules["llmcourse"], "checking", module, raising=False)
    next_is("right")
    return next_is


def quick_one(values: list[int]) -> int:
    return 0


@pytest.fixture
def session(clone: Path, clocks: Clocks, verdicts: Callable[..., None]) -> interview.Session:
    """Ten minutes of one question with one follow-up and of quick_one, begun."""
    return interview.start(interview.take("01", minutes=10, seed=1).name)


def state(clone: Path) -> dict[str, Any]:
    return dict(json.loads((clone / "work" / "interviews.json").read_text(encoding="utf-8")))


def finish(session: interview.Session) -> interview.Report:
    session.check(quick_one)
    session.answer(TOPIC, "bytes over bandwidth")
    session.answer(f"{TOPIC} 1", "I do not know")
    session.rate(TOPIC, 2, 0)
    return session.report()


def cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


# ------------------------------------------------------------------------------------------------------- drawing


def drawn(
    minutes: float, *, seed: int = 0, book: Book | None = None, tries: dict[str, int] | None = None
) -> list[str]:
    parts = interview_plan.draw(
        [interview_plan.material(LESSON)],
        minutes=minutes,
        book=book or Book(),
        tries=tries or {},
        seed=seed,
        at=interview_record.now(),
    )
    return [part.item for part in parts]


def test_what_is_drawn_fits_the_minutes(clone: Path, seed: int) -> None:
    for minutes in range(5, 60):
        parts = interview_plan.draw(
            [interview_plan.material(LESSON)],
            minutes=minutes,
            book=Book(),
            tries={},
            seed=seed + minutes,
            at=interview_record.now(),
        )
        assert parts and sum(part.minutes for part in parts) <= minutes
        assert len({part.item for part in parts}) == len(parts)


def test_the_same_seed_draws_the_same_and_others_differ(clone: Path) -> None:
    assert drawn(21, seed=3) == drawn(21, seed=3)
    assert len({tuple(drawn(21, seed=seed)) for seed in range(20)}) > 1


def test_what_was_practised_least_comes_first(clone: Path, seed: int) -> None:
    tries = {"quick_one": 4, "slow_one": 1, "long_one": 9}
    assert drawn(20, seed=seed, tries=tries) == ["spoken/first_topic", "slow_one", "quick_one"]
    assert drawn(10, seed=seed, tries=tries | {"quick_one": 0}) == ["spoken/first_topic", "quick_one"]


def test_a_due_revisit_comes_before_everything_else(clone: Path, clocks: Clocks, seed: int) -> None:
    book = Book()
    part = interview_record.Part("exercise", "long_one", LESSON, 16, 3, tries=1, verdict="wrong")
    interview_record.schedule(book, part, clocks.wall)
    tries = {"long_one": 50}
    assert drawn(20, seed=seed, book=book, tries=tries)[0] == "spoken/first_topic", "not due on the same day"
    clocks.work(minutes=24 * 60)
    assert drawn(16, seed=seed, book=book, tries=tries) == ["long_one"]
    assert "long_one" not in drawn(15, seed=seed, book=book, tries=tries), "however due, it has to fit"


def test_follow_ups_that_were_not_asked_come_first_and_stay_in_the_lessons_order(
    clone: Path, clocks: Clocks, seed: int
) -> None:
    asked: list[int] = []
    for _ in range(3):
        taken = interview.take("01", minutes=5.5, seed=seed, new=True)
        asked += taken.record.parts[0].followups
    assert sorted(asked) == [0, 1, 2]
    assert interview.take("01", minutes=60, seed=seed, new=True).record.parts[0].followups == [0, 1, 2]


def test_a_mixed_interview_draws_from_every_lesson_that_has_something(clone: Path) -> None:
    record = interview.take(mixed=True, minutes=90, seed=1).record
    assert record.lessons == [LESSON, "02_second_topic"]
    assert {part.name for part in record.parts} == {*EXERCISES, "other_one", TOPIC}


# -------------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_holds_statements_and_stubs_and_nothing_that_helps(clone: Path) -> None:
    path = interview.take("01", minutes=60, seed=1).path
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    secrets = [read_exercise(one) for one in (clone / "llmcourse" / "lessons" / TOPIC).glob("*.py")]
    assert leaks(notebook, secrets) == []
    text = path.read_text(encoding="utf-8")
    assert [words for words in SECRETS if words in text] == []
    assert "about 2 lines" in text and text.count("raise NotImplementedError") == 3
    assert "How are the values stored?" in text


def test_the_notebook_is_one_by_its_formats_own_schema(clone: Path) -> None:
    import nbformat

    path = interview.take("01", minutes=60, seed=1, zh=True).path
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


def test_a_notebook_with_a_solution_in_it_would_be_found(clone: Path) -> None:
    secrets = [read_exercise(clone / "llmcourse" / "lessons" / TOPIC / "quick_one.py")]
    cell = {"id": "a", "source": "    total_of_quick_one = sum(values)"}
    assert len(leaks({"cells": [cell]}, secrets)) == 1


def test_each_part_has_its_cells_in_order_under_the_lessons_imports(clone: Path) -> None:
    taken = interview.take("01", minutes=10, seed=1)
    _, imports, start, question, answer, followup, rate, heading, stub, check, _, report = cells(taken.path)
    assert imports == "import math\nfrom typing import Any\nfrom llmcourse import sizing"
    assert start.splitlines()[-1] == f'session = interview.start("{taken.name}")'
    assert "## Question · about 5 minutes" in question
    assert answer.splitlines()[0] == "%%answer first_topic"
    assert followup.splitlines()[0] == "%%answer first_topic 1"
    assert rate.startswith('session.rate("first_topic", ...)')
    assert "quick_one" in heading and stub.startswith("def quick_one(")
    assert check == "session.check(quick_one)"
    assert report == "session.report()"


def test_an_exercise_that_may_call_an_earlier_answer_is_given_it(clone: Path) -> None:
    add_exercise(clone, TOPIC, "quick_one", 5, uses=", uses=(slow_one, long_one)")
    text = "\n".join(cells(interview.take("01", minutes=10, seed=1).path))
    for name in ("slow_one", "long_one"):
        assert f"from llmcourse.lessons.{TOPIC}.{name} import {name}" in text


def test_in_chinese_the_headings_and_the_question_are_chinese(clone: Path) -> None:
    text = "\n".join(cells(interview.take("01", minutes=10, seed=1, zh=True).path))
    for words in ("模拟面试", "问答题 · 约 5 分钟", "这些值如何存储？", "练习：`quick_one`", "（在此作答）"):
        assert words in text
    assert "How are the values stored?" not in text


def test_going_on_is_taking_it_again_and_never_writes_over_the_notebook(clone: Path, session: Any) -> None:
    path = clone / "work" / "interviews" / f"{session.name}.ipynb"
    path.write_text("my answers")
    taken = interview.take("01", minutes=45)
    assert taken.resumed and taken.path == path
    assert path.read_text() == "my answers"
    assert "unfinished interview of 10 minutes (0:00 of 10:00 gone)" in taken.notes[0]


def test_a_notebook_that_was_deleted_is_written_anew_and_what_was_checked_is_kept(
    clone: Path, session: Any
) -> None:
    session.check(quick_one)
    path = clone / "work" / "interviews" / f"{session.name}.ipynb"
    before = path.read_bytes()
    path.unlink()
    assert interview.take("01").resumed
    assert path.read_bytes() == before
    assert session.record.part("exercise", "quick_one").tries == 1


def test_another_one_within_the_same_second_gets_another_name(clone: Path, clocks: Clocks) -> None:
    first = interview.take("01", minutes=10)
    second = interview.take("01", minutes=10, new=True)
    assert first.name != second.name and first.path.is_file() and second.path.is_file()


def test_one_that_was_never_begun_gives_way_to_other_wishes(clone: Path, clocks: Clocks) -> None:
    first = interview.take("01", minutes=10)
    assert interview.take("01", minutes=10).name == first.name
    assert interview.take("01", minutes=20).name != first.name
    assert interview.take(mixed=True, minutes=10).name != first.name


def test_in_a_notebook_the_taken_interview_is_a_link_to_it(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = interview.take("01", minutes=10)
    monkeypatch.chdir(clone / "work" / LESSON)
    assert f"<a href='../interviews/{taken.name}.ipynb'>" in taken._repr_html_()


# ------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize("minutes", [0, -5, float("nan"), float("inf"), True, "20", None])
def test_minutes_that_are_no_number_above_0_are_refused(clone: Path, minutes: Any) -> None:
    with pytest.raises(WorkspaceError, match="expected a number above 0, such as 20; found"):
        interview.take("01", minutes=minutes)
    assert not (clone / "work").exists()


def test_too_few_minutes_for_anything_name_the_least(clone: Path) -> None:
    with pytest.raises(WorkspaceError, match="3 minutes are too few: the shortest part takes 5"):
        interview.take("01", minutes=3)
    assert not (clone / "work" / "interviews").exists()


def test_more_minutes_than_there_is_to_do_is_said(clone: Path) -> None:
    # The question with three follow-ups takes 3 + 3 · 2 = 9 minutes, the exercises 5 + 9 + 16 = 30.
    assert interview.take("01", minutes=90).notes == ("Everything there is takes about 39 of the 90 minutes",)


def test_an_unknown_lesson_is_refused_with_the_ones_there_are(clone: Path) -> None:
    with pytest.raises(WorkspaceError, match=f"no lesson is named '07'; expected one of 00_start, {LESSON}"):
        interview.take("07")


@pytest.mark.parametrize("asked", [{}, {"lesson": "01", "mixed": True}], ids=["nothing", "both"])
def test_neither_or_both_of_lesson_and_mixed_is_refused(clone: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(WorkspaceError, match="not both"):
        interview.take(**asked)


def test_a_lesson_without_an_interview_toml_gives_exercises_only_and_says_so(clone: Path) -> None:
    taken = interview.take("02", minutes=10)
    assert [part.item for part in taken.record.parts] == ["other_one"]
    assert "no interview.toml" in taken.notes[0]


def test_a_lesson_with_nothing_to_ask_is_refused(clone: Path) -> None:
    with pytest.raises(WorkspaceError, match="00_start has neither a question nor an exercise"):
        interview.take("00")


def test_a_broken_interview_toml_is_one_line_with_file_and_line(clone: Path) -> None:
    (clone / "solutions" / LESSON / "interview.toml").write_text("frequency = 3")
    with pytest.raises(WorkspaceError, match=r"interview.toml:1: expected a table \[question\]"):
        interview.take("01")


# ------------------------------------------------------------------------------------------------- answers, ratings


def test_follow_ups_come_one_by_one_and_the_model_answers_after_the_last(clone: Path, clocks: Clocks) -> None:
    session = interview.start(interview.take("01", minutes=60, seed=1).name)
    for step, number in enumerate(("First", "Second", "Third")):
        shown = session.answer(f"{TOPIC} {step}".removesuffix(" 0"), "my words")
        assert f"{number} follow-up?" in shown
        assert "Strong words" not in shown and "model answer" not in shown
    shown = session.answer(f"{TOPIC} 3", "my words")
    for words in ("The model answer of one minute.", "Strong words three.", "Says the bound first."):
        assert words in shown
    assert shown._repr_markdown_() == str(shown) == repr(shown)


def test_only_the_follow_ups_that_were_asked_are_answered_in_the_end(session: Any) -> None:
    session.answer(TOPIC, "a")
    shown = session.answer(f"{TOPIC} 1", "b")
    assert shown.count("Strong words") == 1


@pytest.mark.parametrize("text", ["", " \n", "(your answer)\n", "（在此作答）"])
def test_an_empty_answer_shows_nothing(session: Any, text: str) -> None:
    assert "Write what you would say" in session.answer(TOPIC, text)
    assert session.record.part("spoken", TOPIC).answers == []


def test_a_follow_up_and_a_rating_wait_for_what_comes_before(session: Any) -> None:
    assert "First answer what comes before: %%answer first_topic." in session.answer(f"{TOPIC} 1", "early")
    session.answer(TOPIC, "an answer")
    assert "%%answer first_topic 1" in session.rate(TOPIC, 2, 1)
    assert session.record.part("spoken", TOPIC).points is None


def test_an_answer_may_be_mended_and_the_later_ones_stay(session: Any) -> None:
    session.answer(TOPIC, "first thought")
    session.answer(f"{TOPIC} 1", "more")
    assert "follow-up?" in session.answer(TOPIC, "second thought")
    assert session.record.part("spoken", TOPIC).answers == ["second thought", "more"]


@pytest.mark.parametrize("line", ["first_topic x", "first_topic 2", "first_topic -1"])
def test_a_follow_up_that_is_not_asked_is_said(session: Any, line: str) -> None:
    assert "a follow-up's number, 1 to 1" in session.answer(line, "text")


def test_a_question_of_another_name_is_said(session: Any) -> None:
    assert "it asks: first_topic" in session.answer("frist_topic", "text")
    assert "it asks: first_topic" in session.rate("frist_topic", 3)


@pytest.mark.parametrize(
    "points", [(), (...,), (4,), (-1,), (2, 2), (1, 1, 1), (True,), ("2",), (float("nan"),)], ids=repr
)
def test_a_rating_of_another_form_is_refused_with_the_form(session: Any, points: tuple[Any, ...]) -> None:
    session.answer(TOPIC, "a")
    session.answer(f"{TOPIC} 1", "b")
    assert "one number from 0 to 3, or one for each line of the rubric (0–2, 0–1)" in session.rate(
        TOPIC, *points
    )
    assert session.record.part("spoken", TOPIC).points is None


def test_a_rating_line_by_line_names_what_was_missed_and_one_sum_does_not(session: Any) -> None:
    session.answer(TOPIC, "a")
    session.answer(f"{TOPIC} 1", "b")
    assert "2 of 3 points" in session.rate(TOPIC, 2, 0)
    assert session.record.part("spoken", TOPIC).mistakes == ["Says how it was measured."]
    session.rate(TOPIC, 2)
    assert session.record.part("spoken", TOPIC).mistakes == []


# ----------------------------------------------------------------------------------------------- checks and time


def test_a_check_notes_the_try_the_mistake_and_the_time(
    session: Any, clocks: Clocks, verdicts: Callable[..., None]
) -> None:
    clocks.work(minutes=2)
    verdicts("wrong", ("One scale serves every row.",))
    session.check(quick_one)
    clocks.work(minutes=1)
    verdicts("right")
    assert session.check(quick_one) == 3.0
    part = session.record.part("exercise", "quick_one")
    assert (part.tries, part.verdict, part.points, part.solved_s) == (2, "right", 3.0, 180.0)
    assert part.mistakes == ["One scale serves every row."]


def test_a_later_wrong_answer_takes_nothing_back(
    session: Any, clocks: Clocks, verdicts: Callable[..., None]
) -> None:
    session.check(quick_one)
    clocks.work(minutes=1)
    verdicts("wrong")
    session.check(quick_one)
    part = session.record.part("exercise", "quick_one")
    assert (part.verdict, part.points, part.solved_s) == ("right", 3.0, 0.0)


def test_an_empty_stub_is_no_try(session: Any, verdicts: Callable[..., None]) -> None:
    verdicts("not attempted")
    session.check(quick_one)
    part = session.record.part("exercise", "quick_one")
    assert (part.tries, part.verdict) == (0, None)


def test_what_the_judge_takes_is_not_on_the_clock(
    session: Any, clocks: Clocks, verdicts: Callable[..., None]
) -> None:
    clocks.work(minutes=1)
    verdicts("right", meanwhile=lambda: clocks.work(minutes=3))
    session.check(quick_one)
    clocks.work(minutes=1)
    assert session.report().to_json()["elapsed_s"] == 120


def test_an_exercise_that_was_not_drawn_counts_as_practice(
    session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow_one() -> None: ...

    session.check(slow_one)
    assert "slow_one is not part of this interview" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ the report


def test_the_report_of_a_finished_interview_has_verdicts_times_mistakes_and_revisits(
    session: Any, clocks: Clocks
) -> None:
    clocks.work(minutes=4)
    report = finish(session)
    text = repr(report)
    assert "2 of 2 parts done, 4:00 of 10:00 gone" in text
    # 4 of the 5 minutes make a Good, 2 of 3 points a Hard recall: two days and one, by the library's first intervals.
    assert "quick_one: right, 3 of 3 points, 1 try, 4:00 of 5 min\n    revisit on 2026-11-25" in text
    assert "question on first_topic: rated by yourself, 2 of 3 points, 0:00 of 5 min" in text
    assert "to mend: Says how it was measured.\n    revisit on 2026-11-24" in text
    found = report.to_json()
    assert found["finished"] and found["overtime_s"] == 0
    assert [part["revisit"] for part in found["parts"]] == ["2026-11-24", "2026-11-25"]
    json.dumps(found)


def test_overtime_is_said_and_nothing_is_lost(session: Any, clocks: Clocks) -> None:
    clocks.work(minutes=13)
    report = finish(session)
    assert "13:00 gone, 3:00 over the 10:00 planned" in repr(report)
    assert report.to_json()["overtime_s"] == 180
    assert [part.done for part in report.record.parts] == [True, True]


def test_running_every_cell_of_a_blank_notebook_ends_nothing(
    session: Any, verdicts: Callable[..., None]
) -> None:
    verdicts("not attempted")
    session.answer(TOPIC, "(your answer)\n")
    session.rate(TOPIC, ...)
    session.check(quick_one)
    assert "Not finished" in repr(session.report())
    assert session.record.ended is None


def test_an_interview_ends_early_when_asked_and_schedules_only_what_was_tried(
    clone: Path, session: Any
) -> None:
    session.check(quick_one)
    report = session.report(end=True)
    assert "question on first_topic: not reached" in repr(report)
    assert set(state(clone)["revisits"]) == {"quick_one"}
    again = session.report(end=True)
    assert state(clone)["revisits"] and again.revisits == report.revisits, "ending twice schedules once"


def test_an_ended_interview_that_was_never_worked_on_has_nothing_to_revisit(session: Any) -> None:
    assert "nothing to revisit" in repr(session.report(end=True))


def test_after_its_end_the_clock_stands_and_another_is_drawn(
    clone: Path, session: Any, clocks: Clocks
) -> None:
    finish(session)
    clocks.work(minutes=30)
    assert session.report().to_json()["elapsed_s"] == 0
    assert interview.take("01", minutes=10).name != session.name


def test_the_command_reports_on_the_latest_and_ends_it(session: Any, clocks: Clocks) -> None:
    session.check(quick_one)
    assert interview.report().record.ended is None
    assert interview.report(end=True).record.ended is not None
    clocks.work(minutes=1)
    session.answer(TOPIC, "late")
    assert session.record.ended is not None, "the kernel hears of it"


def test_a_report_before_any_interview_says_how_to_begin(clone: Path) -> None:
    interview.take("01", minutes=10)
    with pytest.raises(WorkspaceError, match="begin with `llmcourse interview 01`"):
        interview.report()


def test_in_chinese_the_report_is_chinese(clone: Path, clocks: Clocks, verdicts: Callable[..., None]) -> None:
    session = interview.start(interview.take("01", minutes=10, seed=1, zh=True).name)
    assert "追问 1/1" in session.answer(TOPIC, "答案")
    assert "完成 0/2 题" in repr(session.report())


def test_both_languages_say_the_same_things() -> None:
    import string

    from llmcourse.interview_words import WORDS

    def names(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    assert {key: names(text) for key, text in WORDS["en"].items()} == {
        key: names(text) for key, text in WORDS["zh"].items()
    }


# ------------------------------------------------------------------------------- closed browsers, kernels, clocks


def test_a_dead_kernel_costs_nothing(
    session: Any, clocks: Clocks, capsys: pytest.CaptureFixture[str]
) -> None:
    clocks.work(minutes=4)
    session.check(quick_one)
    session.answer(TOPIC, "an answer")
    clocks.away(minutes=1)
    again = interview.start(session.name)
    assert "5:00 of 10:00 gone" in capsys.readouterr().out, "a short break is on the clock"
    assert again is not session
    assert again.record.part("exercise", "quick_one").verdict == "right"
    assert "Strong words" in again.answer(f"{TOPIC} 1", "goes on")


def test_a_long_break_is_said_and_counts_for_two_minutes(session: Any, clocks: Clocks) -> None:
    clocks.work(minutes=4)
    session.check(quick_one)
    clocks.away(minutes=9 * 60)
    again = interview.start(session.name)
    assert again.record.elapsed_s == 6 * 60
    assert again.record.notes == ["A break of 9:00:00: 2:00 of it on the clock."]


def test_a_clock_set_back_during_a_break_is_said_and_counts_nothing(session: Any, clocks: Clocks) -> None:
    clocks.work(minutes=4)
    session.check(quick_one)
    clocks.away(minutes=-600)
    again = interview.start(session.name)
    assert again.record.elapsed_s == 4 * 60
    assert "set back by 10:00:00" in again.record.notes[0]


@pytest.mark.parametrize(("moved", "way"), [(90, "ahead"), (-90, "behind")])
def test_a_clock_that_jumps_while_working_is_said_once_and_the_steady_one_counts(
    session: Any, clocks: Clocks, moved: int, way: str
) -> None:
    clocks.work(minutes=4)
    clocks.wall += timedelta(minutes=moved)
    session.check(quick_one)
    clocks.work(minutes=1)
    report = session.report()
    assert report.to_json()["elapsed_s"] == 300
    assert len(report.to_json()["notes"]) == 1
    assert f"moved 1:30:00 {way}" in repr(report)


def test_a_steady_clock_that_went_back_takes_no_time_away(session: Any, clocks: Clocks) -> None:
    clocks.work(minutes=2)
    session.check(quick_one)
    clocks.steady_s -= 500
    assert session.report().to_json()["elapsed_s"] == 120


def test_the_start_cell_run_twice_goes_on_without_a_break(session: Any, clocks: Clocks) -> None:
    clocks.work(minutes=5)
    assert interview.start(session.name) is session
    assert session.report().to_json()["elapsed_s"] == 300


def test_starting_registers_the_answer_magic(
    clone: Path, verdicts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[tuple[Any, ...]] = []
    shell = SimpleNamespace(register_magic_function=lambda *given: registered.append(given))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    session = interview.start(interview.take("01", minutes=10).name)
    assert registered == [(session.answer, "cell", "answer")]


# -------------------------------------------------------------------------------------------- edited, damaged, lost


def test_a_deleted_record_goes_on_from_the_notebooks_plan_and_says_so(
    clone: Path, session: Any, clocks: Clocks
) -> None:
    parts = [part.item for part in session.record.parts]
    (clone / "work" / "interviews.json").unlink()
    clocks.away(minutes=1)
    again = interview.start(session.name)
    assert [part.item for part in again.record.parts] == parts
    assert "goes on from its notebook's plan" in again.record.notes[0]
    assert state(clone)["interviews"][session.name]["begun"]


def test_a_record_deleted_under_a_running_kernel_is_written_again_whole(clone: Path, session: Any) -> None:
    session.check(quick_one)
    (clone / "work" / "interviews.json").unlink()
    session.answer(TOPIC, "an answer")
    by_item = {part["name"]: part for part in state(clone)["interviews"][session.name]["parts"]}
    assert by_item["quick_one"]["tries"] == 1 and by_item[TOPIC]["answers"] == ["an answer"]


def test_a_damaged_record_is_kept_under_a_dated_name(
    clone: Path, session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clone / "work" / "interviews.json"
    path.write_text('{"version": 1, "interv')
    session.check(quick_one)
    (aside,) = path.parent.glob("interviews.damaged-*.json")
    assert aside.read_text() == '{"version": 1, "interv'
    assert f"kept as {aside.name}" in capsys.readouterr().out
    assert session.name in state(clone)["interviews"]


def test_damaged_progress_does_not_keep_an_interview_from_being_drawn(clone: Path) -> None:
    workspace.prepare()
    (clone / "work" / "progress.json").write_text("{")
    taken = interview.take("01", minutes=10)
    assert taken.path.is_file() and "is damaged" in taken.notes[0]


def test_a_workspace_from_before_there_were_interviews_is_fine(clone: Path) -> None:
    workspace.prepare()
    workspace.record("slow_one", "wrong", 0, 3, place=clone / "work")
    assert interview.take("01", minutes=10).path.is_file()


def test_a_record_of_a_later_program_is_left_alone(clone: Path) -> None:
    workspace.prepare()
    path = clone / "work" / "interviews.json"
    path.write_text('{"version": 2}')
    with pytest.raises(WorkspaceError, match="git pull"):
        interview.take("01")
    assert path.read_text() == '{"version": 2}'


def test_an_interview_of_which_nothing_is_left_is_one_line(clone: Path, session: Any, clocks: Clocks) -> None:
    (clone / "work" / "interviews.json").unlink()
    (clone / "work" / "interviews" / f"{session.name}.ipynb").write_text('{"metadata": {}}')
    clocks.away(minutes=1)
    with pytest.raises(WorkspaceError, match="found neither whole; begin another"):
        interview.start(session.name)


def test_what_could_not_be_saved_is_said_and_saved_by_the_next_cell(
    clone: Path, session: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(workspace, "write_json", full)
        session.check(quick_one)
    assert "The interview was not saved: expected to read and write" in capsys.readouterr().out
    session.answer(TOPIC, "an answer")
    by_item = {part["name"]: part for part in state(clone)["interviews"][session.name]["parts"]}
    assert by_item["quick_one"]["tries"] == 1 and by_item[TOPIC]["answers"] == ["an answer"]


def test_an_end_that_could_not_be_saved_is_left_to_the_next_report(
    clone: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    session.check(quick_one)
    with monkeypatch.context() as patched:
        patched.setattr(workspace, "write_json", full)
        assert session.report(end=True).record.ended is None
    assert session.report(end=True).revisits
    assert set(state(clone)["revisits"]) == {"quick_one"}


def test_an_exercise_that_has_gone_since_is_left_out_of_a_notebook_written_anew(
    clone: Path, session: Any
) -> None:
    (clone / "llmcourse" / "lessons" / TOPIC / "quick_one.py").unlink()
    path = clone / "work" / "interviews" / f"{session.name}.ipynb"
    path.unlink()
    interview.take("01")
    assert "quick_one" not in "\n".join(cells(path))
