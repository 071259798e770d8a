"""What learners call: `check` and `hint` in a notebook, `check_notebook` behind `llmcourse check`."""

from __future__ import annotations

import builtins
import contextlib
import dis
import io
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from llmcourse import interrupts, report, source, submission, workspace
from llmcourse.engine import Answer, Company, Engine
from llmcourse.exercise import Exercise, find
from llmcourse.finding import exercise_paths
from llmcourse.judging import Outcome, Verdict, compared, expectations, holds_answers, judge, runner_for
from llmcourse.zygote import Zygote

MAX_STDERR_CHARS = 400
READS_OF_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
COMPILER, OPTIMIZER = "torch._dynamo", re.compile(r"\boptim\b")
_unfolded: dict[str, int] = {}


class Score(float):
    """Points earned, with the report as its notebook form: as a cell's last value it is both."""

    verdict: Verdict

    def __new__(cls, verdict: Verdict) -> Score:
        score = super().__new__(cls, verdict.points)
        score.verdict = verdict
        return score

    def __repr__(self) -> str:
        return float.__repr__(self)

    def _repr_html_(self) -> str:
        return report.html(self.verdict)


class Hint(str):
    """A hint as text, with a notebook form."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return report.hint_html(str(self))


def check(answer: Callable[..., Any], *, seed: int | None = None) -> Score:
    """Judge one answer in this process and report: each case, the misconception by name, costs, points.

    seed: repeat the inputs of an earlier report; fresh inputs otherwise. The value is the points earned.
    """
    number = seed if seed is not None else _fresh_seed()
    verdict = _check(answer, number)
    note = None
    if verdict.verdict != "not attempted" and verdict.exercise is not None:
        topic = verdict.exercise.topic
        note = workspace.record(
            verdict.name, verdict.verdict, verdict.points, verdict.max_points, lesson=topic
        )
    if note:
        verdict = _with_notes(verdict, [note])
    score = Score(verdict)
    if not _in_notebook():
        print(report.text(verdict))
    return score


def _check(answer: Callable[..., Any], seed: int) -> Verdict:
    name = getattr(answer, "__name__", None)
    if not callable(answer) or not isinstance(name, str):
        return _refused(
            f"check takes the function or class itself; found {type(answer).__name__} {report.short(answer)}"
        )
    try:
        exercise = find(name)
    except KeyError as error:
        return _refused(str(error.args[0]))
    if answer is exercise.reference or str(getattr(answer, "__module__", "")).startswith("llmcourse.lessons"):
        return _refused(f"{name} is the course's own answer; write yours in the exercise's cell", exercise)
    runner, seed = runner_for(exercise, seed)
    heard = io.StringIO()
    # A grader that reads a cell's outputs takes anything on stderr for a failure; it goes into the report instead.
    with contextlib.redirect_stderr(heard):
        verdict = judge(runner, exercise, answer, seed, expectations(runner, exercise, seed))
    notes = list(_not_carried(answer, exercise))
    if heard.getvalue().strip():
        notes.append(f"your answer wrote to stderr: {heard.getvalue().strip()[:MAX_STDERR_CHARS]}")
    return _with_notes(verdict, notes)


def _refused(reason: str, exercise: Exercise | None = None) -> Verdict:
    points = exercise.points if exercise else 0.0
    return Verdict(exercise, exercise.name if exercise else "?", 0.0, points, "not attempted", reason)


def _with_notes(verdict: Verdict, notes: list[str]) -> Verdict:
    from dataclasses import replace

    return replace(verdict, notes=(*verdict.notes, *notes))


def _fresh_seed() -> int:
    fixed = os.environ.get("LLMCOURSE_SEED")
    if fixed is None:
        return secrets.randbelow(1 << 31)
    if not fixed.isdigit():
        raise ValueError(f"LLMCOURSE_SEED: expected a whole number, found {fixed!r}")
    return int(fixed)


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


def _not_carried(answer: Callable[..., Any], exercise: Exercise) -> Iterator[str]:
    """Warn of names of the notebook that would not exist when it is judged outside."""
    history = getattr(sys.modules.get("__main__"), "In", None)
    if not isinstance(history, list):
        return
    space = vars(sys.modules["__main__"])
    known = submission.carried_names(text for text in history if isinstance(text, str))
    known |= {*exercise_paths(), *vars(builtins)}
    for name in sorted(global_names(answer)):
        if name in space and name not in known:
            yield (
                f"your answer uses `{name}`, which will not exist when the notebook is judged: only "
                "imports, functions, classes and literal constants are carried; compute it inside the answer"
            )


def global_names(answer: Callable[..., Any]) -> set[str]:
    """Global names the code of a function, or of a class's methods, reads."""
    codes = (
        [part.__code__ for part in vars(answer).values() if hasattr(part, "__code__")]
        if isinstance(answer, type)
        else []
    )
    if hasattr(answer, "__code__"):
        codes.append(answer.__code__)
    names: set[str] = set()
    while codes:
        code: CodeType = codes.pop()
        names.update(part.argval for part in dis.get_instructions(code) if part.opname in READS_OF_GLOBALS)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def hint(answer: Callable[..., Any] | str) -> Hint:
    """Unfold the next hint of an exercise; KeyError when there is none of that name."""
    exercise = find(answer if isinstance(answer, str) else getattr(answer, "__name__", repr(answer)))
    if not exercise.hints:
        return Hint(f"{exercise.name} has no hints; its statement says everything that is checked")
    level = min(_unfolded.get(exercise.name, 0) + 1, len(exercise.hints))
    _unfolded[exercise.name] = level
    lines = [f"{number}. {text}" for number, text in enumerate(exercise.hints[:level], 1)]
    left = len(exercise.hints) - level
    lines.append(f"({left} more: run it again)" if left else "(that was the last hint)")
    found = Hint("\n".join(lines))
    if not _in_notebook():
        print(found)
    return found


# --------------------------------------------------------------------------------------------- a whole notebook


@dataclass(frozen=True)
class NotebookVerdict:
    """The verdicts of a notebook's exercises; the points of ★ extensions are counted apart."""

    notebook: str
    exercises: tuple[Verdict, ...]
    notes: tuple[str, ...]
    level: str  # how the answers were kept apart

    @property
    def points(self) -> float:
        return round(sum(verdict.points for verdict in self.exercises if not _is_extension(verdict)), 6)

    @property
    def extra_points(self) -> float:
        return round(sum(verdict.points for verdict in self.exercises if _is_extension(verdict)), 6)

    @property
    def max_points(self) -> float:
        return sum(verdict.max_points for verdict in self.exercises if not _is_extension(verdict))

    def to_json(self) -> dict[str, Any]:
        return {
            "notebook": self.notebook,
            "points": self.points,
            "max_points": self.max_points,
            "extra_points": self.extra_points,
            "exercises": [verdict.to_json() for verdict in self.exercises],
            "notes": list(self.notes),
            "judged": self.level,
        }


def _is_extension(verdict: Verdict) -> bool:
    return verdict.exercise is not None and verdict.exercise.extension


def check_notebook(
    notebook: Path | submission.Submission, *, seed: int | None = None, zygote: Zygote | None = None
) -> NotebookVerdict:
    """Judge every exercise of a notebook, or of one that was read already, each alone unless it is right in company.

    zygote: one that was started before this module was imported; it is ended here. Raises
    UnreadableNotebook for a file that cannot be judged, HarnessFault when the judge itself fails.
    """
    found = submission.read(notebook) if isinstance(notebook, Path) else notebook
    number = seed if seed is not None else _fresh_seed()
    with interrupts.held():
        exercises = [find(name) for name in found.names]
    if not all(map(holds_answers, exercises)):
        raise submission.UnreadableNotebook(
            f"{found.path}: expected the full course, found a kit, which holds no answers to judge with; "
            "run the `check` cells of the notebook"
        )
    shared = Zygote() if zygote is None else zygote
    with (
        Engine(zygote=shared, preload=preloads(exercises)) as ahead,
        # Answers may not read what references write: it holds what is expected.
        Engine(zygote=shared, closed=[ahead.folder]) as engine,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        # While one exercise is judged, the reference of the next is run.
        coming = {exercise.name: pool.submit(ahead.expected, exercise, number) for exercise in exercises}
        try:
            verdicts = judge_all(engine, found, exercises, number, lambda one: coming[one.name].result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            shared.close()  # ends the workers that the pool waits for
            raise
        notes = (*found.notes, *left_out(engine))
        return NotebookVerdict(str(found.path), tuple(verdicts.values()), notes, shared.level)


def preloads(exercises: Sequence[Exercise]) -> list[str]:
    """Modules to import once in the zygote: torch imports its compiler for the first optimizer of every worker."""
    return [COMPILER] if any(OPTIMIZER.search(exercise.source) for exercise in exercises) else []


def judge_all(
    engine: Engine,
    found: submission.Submission,
    exercises: Sequence[Exercise],
    seed: int,
    expected: Callable[[Exercise], Mapping[str, Outcome]],
) -> dict[str, Verdict]:
    """The verdict on each exercise of a notebook by name, in their order; HarnessFault when the judge itself fails."""
    verdicts: dict[str, Verdict] = {}
    with contextlib.closing(Company(exercises)) as company:
        for exercise in exercises:
            company.begin(exercise)
            ours, notes = _ours_for(exercise, verdicts)
            # A cell that hangs takes its whole limit: once is enough.
            answer = found.answer(exercise.name, ours, without=engine.left_out)
            verdict = _judged(engine, exercise, answer, seed, expected(exercise), company)
            verdicts[exercise.name] = _with_notes(verdict, notes)
    return verdicts


def _judged(
    engine: Engine,
    exercise: Exercise,
    answer: Answer,
    seed: int,
    expected: Mapping[str, Outcome],
    company: Company,
) -> Verdict:
    """In one worker for a notebook's exercises as long as they are right; what is not is judged alone.

    An answer may change the process that it runs in. What is right in spite of that is right; for what is not,
    another exercise of the notebook may be to blame.
    """
    outcomes = engine.run(exercise, answer, list(exercise.items.values()), seed, expected, company=company)
    results = compared(exercise, outcomes, expected)
    kinds = {result.outcome.kind for result in results}
    settled = kinds == {"not written"} or all(result.agrees for result in results)
    if exercise.race is not None or not settled:
        company.close()  # beside a race nothing else may run, and what spoilt one exercise may spoil the next
    if company.was_there and not settled:
        return judge(engine, exercise, answer, seed, expected)
    return judge(engine, exercise, answer, seed, expected, results=results)


def left_out(engine: Engine) -> list[str]:
    """A note for each part of the answers judged so far that hung or killed its worker."""
    return [
        f"{label} was left out for every exercise but its own; while it ran: {why}"
        for label, why in engine.left_out.items()
    ]


def _ours_for(exercise: Exercise, verdicts: dict[str, Verdict]) -> tuple[list[tuple[str, str]], list[str]]:
    """Our source in place of earlier answers that this exercise uses and that were not right, with a note each."""
    parts, notes = [], []
    for name in exercise.uses:
        if name in verdicts and verdicts[name].verdict == "right":
            continue
        used = find(name)
        hidden = [*used.mistakes, *used.alternatives]
        parts.append((f"our {name}", source.case_source(used.source, [name], hidden, used.path)))
        notes.append(f"your {name} was not right, so this exercise was judged with ours")
    return parts, notes
