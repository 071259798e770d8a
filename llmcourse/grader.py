"""Judges one submission of a class, in a process of a pool or on another machine: bytes in, a record out.

    mark(plan, taken) -> Graded          again(plan, taken, graded) -> Graded

A process keeps one engine for all the submissions it judges, so the zygote starts once, and references and known
mistakes are run once a process for the whole class: every submission of a run gets the same inputs.
"""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import multiprocessing.util
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmcourse import checking, likeness, report, source, submission
from llmcourse.engine import Engine
from llmcourse.exercise import Exercise, find, find_all
from llmcourse.graded import Graded, GradedExercise
from llmcourse.intake import Taken
from llmcourse.judging import Outcome, Verdict
from llmcourse.submission import Submission, TeacherNotebook, UnreadableNotebook
from llmcourse.zygote import HarnessFault, Zygote


@dataclass(frozen=True)
class Plan:
    """What is the same for every submission of a run.

    version: a digest of the teacher's notebook. seed: all inputs follow from it; it never enters a worker. in_jail:
    True refuses to judge without the jail. lessons: LLMCOURSE_LESSONS of the teacher's process, for one that was
    started elsewhere.
    """

    assignment: str
    teacher: TeacherNotebook
    version: str
    seed: int
    run: int
    in_jail: bool
    lessons: str


def key_of(plan: Plan, taken: Taken) -> str:
    """A digest of everything a verdict follows from: the content, the exercises as they are now, the run's seed."""
    digest = hashlib.sha256()
    parts: list[object] = [plan.seed, plan.version, taken.raw, taken.refused, taken.notes, taken.submitted_at]
    parts += [exercise.source for exercise in find_all(plan.teacher.names)]
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def mark(plan: Plan, taken: Taken) -> Graded:
    """Judge a submission. HarnessFault when the judge fails twice, in two engines."""
    began = time.perf_counter()
    os.environ["LLMCOURSE_LESSONS"] = plan.lessons
    exercises = find_all(plan.teacher.names)
    record = Graded(
        taken.student, plan.assignment, key_of(plan, taken), submitted_at=taken.submitted_at, run=plan.run
    )
    found = _read(plan, taken)
    if isinstance(found, str):
        nothing = tuple(
            GradedExercise(one.name, 0.0, one.points, "not attempted", found, extension=one.extension)
            for one in exercises
        )
        return replace(record, exercises=nothing, refused=found, notes=taken.notes)
    read_s = time.perf_counter() - began
    before_s = _engine(plan).zygote.cpu_seconds()
    verdicts, left_out = _judged(plan, found, exercises)
    # Negative where the engine had to be started again meanwhile.
    workers_s = max(0.0, _engine(plan).zygote.cpu_seconds() - before_s)
    judged_s = time.perf_counter() - began - read_s
    outcomes = [result.outcome for verdict in verdicts for result in verdict.results]
    # A worker may say what it likes of its own time; the judge's clock bounds it.
    cases_s = min(sum(outcome.seconds for outcome in outcomes), judged_s)
    return replace(
        record,
        exercises=tuple(_graded(verdict, found) for verdict in verdicts),
        answers=found.answers,
        helpers=found.helpers,
        notes=(*taken.notes, *found.notes, *left_out),
        seconds={
            "reading": read_s,
            "cases": cases_s,
            "cases on the CPU": sum(outcome.cpu_seconds for outcome in outcomes),
            "serving cases on the CPU": sum(outcome.served_cpu_seconds for outcome in outcomes),
            "workers on the CPU": workers_s,
            "judging": judged_s - cases_s,
        },
    )


def again(plan: Plan, taken: Taken, graded: Graded) -> Graded:
    """The record with every race that was inconclusive run once more, on a machine that is quiet by now.

    One that stays inconclusive is left to the teacher.
    """
    os.environ["LLMCOURSE_LESSONS"] = plan.lessons
    found = _read(plan, taken)
    assert not isinstance(found, str), "only what was judged can be inconclusive"
    open_ = [one.name for one in graded.exercises if one.verdict == "inconclusive"]
    verdicts, _ = _judged(plan, found, find_all(open_))
    anew = {verdict.name: _graded(verdict, found) for verdict in verdicts}
    for name, one in anew.items():
        if one.verdict == "inconclusive":
            reason = f"{one.reason}; your teacher decides about the race"
            anew[name] = replace(one, needs_teacher=True, reason=reason)
    return replace(graded, exercises=tuple(anew.get(one.name, one) for one in graded.exercises))


def _read(plan: Plan, taken: Taken) -> Submission | str:
    """The notebook as parts that may run, or why it cannot be judged."""
    if taken.raw is None:
        return taken.refused or "nothing was handed in"
    try:
        return submission.read_bytes(taken.raw, Path(f"{plan.assignment}.ipynb"), plan.teacher)
    except UnreadableNotebook as unreadable:
        return str(unreadable)


def _judged(
    plan: Plan, found: Submission, exercises: Sequence[Exercise]
) -> tuple[Iterable[Verdict], list[str]]:
    for attempt in (1, 2):
        engine = _engine(plan)
        engine.left_out.clear()
        try:
            expected = functools.partial(_expected, engine, plan.seed)
            verdicts = checking.judge_all(engine, found, exercises, plan.seed, expected)
            return list(verdicts.values()), checking.left_out(engine)
        except HarnessFault:
            close()
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _expected(engine: Engine, seed: int, exercise: Exercise) -> Mapping[str, Outcome]:
    return engine.expected(exercise, seed)


def _graded(verdict: Verdict, found: Submission) -> GradedExercise:
    shown = report.without_inputs(verdict)
    exercise = verdict.exercise
    assert exercise is not None
    form = likeness.form(found.answers.get(verdict.name, ""), verdict.name)
    return GradedExercise(
        verdict.name,
        verdict.points,
        verdict.max_points,
        verdict.verdict,
        shown.reason,
        mistake=" / ".join(mistake.sentence for mistake in verdict.mistakes) or None,
        html=report.html(shown),
        text=report.text(shown),
        extension=exercise.extension,
        same_as=_same_as(exercise, form),
        form=form,
    )


def _same_as(exercise: Exercise, form: str) -> tuple[str, ...]:
    """Which of the course's own right answers an answer is, by its form."""
    return tuple(words for words, ours in _our_forms(exercise.name).items() if form and form == ours)


@functools.cache
def _our_forms(name: str) -> dict[str, str]:
    exercise = find(name)
    ours = {"reference": name, **{f"alternative {one}": one for one in exercise.alternatives}}
    text, path = exercise.source, exercise.path
    return {words: likeness.form(source.definition(text, one, path), one) for words, one in ours.items()}


# ----------------------------------------------------------------------------------------- one engine for a process

_engines: dict[bool, Engine] = {}


def _engine(plan: Plan) -> Engine:
    if plan.in_jail not in _engines:
        preload = checking.preloads(find_all(plan.teacher.names))
        zygote = Zygote(in_jail=True if plan.in_jail else None)
        _engines[plan.in_jail] = Engine(zygote=zygote, preload=preload)
        gc.collect()
        gc.freeze()  # what is imported stays: looking through it would be each submission's
    return _engines[plan.in_jail]


def close() -> None:
    """End this process's engines; the next submission starts another."""
    while _engines:
        _engines.popitem()[1].close()


atexit.register(close)
# A process of multiprocessing ends without atexit.
multiprocessing.util.Finalize(None, close, exitpriority=0)
