"""Proves exercises: their mistakes fail and are named, their alternatives pass, mutants and lazy answers earn nothing.

Every answer goes through a worker, like a learner's, over several fresh seeds. What the audit finds wrong it lists as
`problems`, a line each; an exercise is proven when it has none.
"""

from __future__ import annotations

import ast
import contextlib
import os
import queue
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar

from llmcourse import source
from llmcourse.engine import Answer, Engine
from llmcourse.exercise import Exercise, Item, Mistake, load
from llmcourse.finding import exercise_paths
from llmcourse.judging import Outcome, Verdict, compare, judge
from llmcourse.mutants import Mutant, mutants
from llmcourse.worker import parameters
from llmcourse.zygote import Zygote

MIN_SEEDS = 3
Thing = TypeVar("Thing")

# Lazy answers: each is source that replaces the reference `{name}` by something that does not do the work. They may
# call the reference (kept as `_ours`), so that a zero of the right shape, dtype and container is tried too.
LAZY_FUNCTIONS = {
    "returns None": "return None",
    "returns its first argument": "return next(iter([*arguments, *options.values()]), None)",
    "returns zeros": "return _like(_ours(*arguments, **options), 0)",
    "returns NaN": "return _like(_ours(*arguments, **options), float('nan'))",
    "returns an empty value": "return _empty(_ours(*arguments, **options))",
    "raises": "raise ValueError('no')",
}
# Every call gets the argument that the first one was given.
IGNORING = """
import inspect as _inspect
DATA = (bool, int, float, str, bytes, list, tuple, dict, _torch.Tensor)
_first = {{}}
def {name}(*arguments, **options):
    bound = _inspect.signature(_ours).bind(*arguments, **options)
    bound.apply_defaults()
    given = bound.arguments["{parameter}"]
    bound.arguments["{parameter}"] = _first.setdefault("kept", given)
    {then}
    return _ours(*bound.args, **bound.kwargs)
"""
LAZY_RESULTS = {
    "does nothing": "None",
    "returns its first argument": "next(iter([*arguments, *options.values()]), None)",
    "returns zeros": "_like(_ours.{name}(self, *arguments, **options), 0)",
    "returns NaN": "_like(_ours.{name}(self, *arguments, **options), float('nan'))",
}
METHODS = (FunctionType, staticmethod, classmethod)
LAZY_PRELUDE = """
import torch as _torch
_ours = {name}
def _like(value, fill):
    if isinstance(value, _torch.Tensor):
        plain = value.detach()
        full = _torch.full_like(plain, fill if plain.is_floating_point() else 0)
        return full.requires_grad_(value.requires_grad and plain.is_floating_point())
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return type(value)(0 if isinstance(value, int) else fill)
    if isinstance(value, str | bytes):
        return type(value)()
    if isinstance(value, list | tuple):
        parts = [_like(part, fill) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {{key: _like(part, fill) for key, part in value.items()}}
    return None
def _empty(value):
    if isinstance(value, _torch.Tensor):
        return value.detach().new_empty(0)
    return type(value)() if isinstance(value, list | tuple | dict | str | bytes) else None
"""


@dataclass
class ExerciseAudit:
    """What was tried on one exercise and what came of it, as numbers, and the problems in words."""

    exercise: Exercise
    points: float = 0.0
    mistakes: int = 0
    killed: int = 0
    recognised: int = 0
    accepted: int = 0
    mutants: int = 0
    mutants_killed: int = 0
    excused: int = 0
    solution_points: float = 0.0
    stub_points: float = 0.0
    problems: list[str] = field(default_factory=list)
    killed_by: dict[str, set[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        e = self.exercise
        return {
            "name": e.name,
            "lesson": e.topic,
            "points": e.points,
            "cases": len(e.cases),
            "mistakes": self.mistakes,
            "killed": self.killed,
            "recognised": self.recognised,
            "alternatives": len(e.alternatives),
            "accepted": self.accepted,
            "mutants": self.mutants,
            "mutants_killed": self.mutants_killed,
            "excused": self.excused,
            "solution_points": self.solution_points,
            "stub_points": self.stub_points,
        }


@dataclass(frozen=True)
class AuditReport:
    """The audits of several exercises. `kill_rate`: the share of wrong answers, mistakes and mutants, that earn nothing
    they should not (an excused mutant does not count)."""

    exercises: tuple[ExerciseAudit, ...]
    seeds: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether every exercise is proven."""
        return bool(self.exercises) and all(not audit.problems for audit in self.exercises)

    @property
    def kill_rate(self) -> float:
        tried = sum(a.mistakes + a.mutants - a.excused for a in self.exercises)
        killed = sum(a.killed + a.mutants_killed for a in self.exercises)
        return killed / tried if tried else 1.0

    def to_json(self) -> dict[str, Any]:
        problems = [
            f"{audit.exercise.name}: {problem}" for audit in self.exercises for problem in audit.problems
        ]
        return {
            "kill_rate": self.kill_rate,
            "exercises": [audit.to_json() for audit in self.exercises],
            "problems": problems,
        }

    def text(self) -> str:
        """A table and, under it, every problem and which case kills which mistake."""
        lines = [
            f"{'exercise':32} {'cases':>5} {'mistakes':>9} {'named':>7} {'altern.':>8} {'mutants':>9} {'excused':>7}"
        ]
        for a in self.exercises:
            e = a.exercise
            lines.append(
                f"{e.name:32} {len(e.cases):>5} {a.killed:>4}/{a.mistakes:<4} "
                f"{a.recognised:>3}/{a.mistakes:<3} "
                f"{a.accepted:>3}/{len(e.alternatives):<4} {a.mutants_killed:>4}/{a.mutants:<4} {a.excused:>7}"
            )
        for a in self.exercises:
            lines += [f"  {a.exercise.name}: {problem}" for problem in a.problems]
        word = "proven" if self.complete else "NOT proven"
        lines.append(f"kill rate {self.kill_rate:.1%} over seeds {', '.join(map(str, self.seeds))}: {word}")
        return "\n".join(lines)

    def matrix(self) -> str:
        """Mistakes against the cases and costs that reject them."""
        lines = []
        for a in self.exercises:
            lines.append(a.exercise.name)
            lines += [f"  {name:32} {', '.join(sorted(by))}" for name, by in a.killed_by.items()]
        return "\n".join(lines)


def exercises_of(lessons: Sequence[str]) -> list[Exercise]:
    """Exercises of the lessons (topic, folder or exercise name); all without a name. KeyError if unknown."""
    found = [load(path) for path in exercise_paths().values()]
    if not lessons:
        return found
    chosen = []
    for wanted in lessons:
        topic = wanted[3:] if wanted[:2].isdigit() and wanted[2:3] == "_" else wanted
        matching = [e for e in found if topic in (e.topic, e.name)]
        if not matching:
            known = ", ".join(sorted({e.topic for e in found}))
            raise KeyError(f"no lesson or exercise is named {wanted!r}; lessons with exercises: {known}")
        chosen += [e for e in matching if e not in chosen]
    return chosen


def audit(
    lessons: Sequence[str] = (),
    *,
    mutants: int | None = None,
    seeds: int = MIN_SEEDS,
    progress: Callable[[str], None] | None = None,
    seed: int | None = None,
    jailed: bool = False,
) -> AuditReport:
    """Audit the exercises of the lessons.

    jailed: in the jail, as a class is judged; all answers are our own, and without it a worker starts sooner.

    `mutants`: how many of an exercise at most, None for all. It is the size of a seeded sample: as many of its mistakes
    are judged as well, on the first of the seeds alone; right and lazy answers always are all of them.
    """
    first = secrets.randbelow(1 << 31) if seed is None else seed
    numbers = tuple(first + index for index in range(max(seeds, MIN_SEEDS)))
    exercises = exercises_of(lessons)
    jobs = max(
        1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, len(exercises))
    )
    idle: queue.SimpleQueue[Engine] = queue.SimpleQueue()

    def one(exercise: Exercise) -> ExerciseAudit:
        engine = idle.get()
        if progress is not None:
            progress(exercise.name)
        try:
            return audit_exercise(engine, exercise, numbers, mutants, mutants)
        finally:
            idle.put(engine)

    with contextlib.ExitStack() as stack:
        # Left in reverse: engines that are closed first end whatever still runs when the audit is interrupted.
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        for zygote in [Zygote(in_jail=jailed) for _ in range(jobs)]:
            idle.put(stack.enter_context(Engine(preload=("torch._dynamo",), zygote=zygote)))
        return AuditReport(tuple(pool.map(one, exercises)), numbers)


def audit_exercise(
    engine: Engine,
    exercise: Exercise,
    seeds: Sequence[int],
    most_mutants: int | None,
    most_mistakes: int | None = None,
) -> ExerciseAudit:
    """Everything the audit demands of one exercise over the seeds; of mutants and mistakes at most so many, if given.

    Sampled mistakes are judged on the first seed alone.
    """
    found = ExerciseAudit(exercise)
    expected = {seed: engine.expected(exercise, seed) for seed in seeds}

    def verdict(answer: Answer, seed: int, naming: bool = True) -> Verdict:
        return judge(engine, exercise, answer, seed, expected[seed], naming=naming, racing=False)

    _audit_reference(engine, found, verdict, seeds)
    _audit_stub(found, verdict, seeds[0])
    if most_mistakes is None:
        # All of them in whole first: naming then finds every outcome known, and forks for none of its questions.
        for mistake in exercise.mistakes.values():
            for seed in seeds:
                ours = engine.ours(exercise, mistake.name)
                engine.run(exercise, ours, list(exercise.items.values()), seed, expected[seed])
        _audit_mistakes(engine, found, verdict, seeds, list(exercise.mistakes.values()))
    else:
        chosen = _sample(list(exercise.mistakes.values()), most_mistakes, seeds[0])
        _audit_mistakes(engine, found, verdict, seeds[:1], chosen)
    _audit_alternatives(engine, found, verdict, seeds)
    _audit_lazy(engine, found, seeds[0], expected[seeds[0]])
    _audit_mutants(engine, found, seeds, expected, most_mutants)
    return found


def _audit_reference(
    engine: Engine, found: ExerciseAudit, verdict: Callable[..., Verdict], seeds: Sequence[int]
) -> None:
    e = found.exercise
    found.problems += [
        f"no {what} is given"
        for what, given in (("mistake", e.mistakes), ("alternative", e.alternatives))
        if not given
    ]
    results = [(verdict(_replaced(e, ""), seed), seed) for seed in seeds]
    found.solution_points = min(result.points for result, _ in results)
    for result, seed in results:
        if result.points != e.points:
            found.problems.append(
                f"the reference earns {result.points} of {e.points} on seed {seed}: {result.reason}"
            )
    for item in e.cases:
        digests = {str(engine.expected(e, seed)[item.name].observed) for seed in seeds}
        if len(digests) == 1 and len(e.cases) == 1:
            found.problems.append(f"{item.name} gives the same on every seed and is the only case")


def _audit_stub(found: ExerciseAudit, verdict: Callable[..., Verdict], seed: int) -> None:
    e = found.exercise
    stub = source.stub(source.definition(e.source, e.name, e.path), e.path)
    result = verdict(
        Answer(e.name, (("imports", source.imports_of(e.source)), ("cell", stub)), own="cell"), seed
    )
    found.stub_points = result.points
    if result.verdict != "not attempted" or result.points:
        found.problems.append(
            f"the stub is {result.verdict!r} with {result.points} points; expected 'not attempted' with 0"
        )


def _sample(every: Sequence[Thing], most: int | None, seed: int) -> list[Thing]:
    """At most so many of them, drawn by the seed; all of them for None."""
    return list(every) if most is None or most >= len(every) else random.Random(seed).sample(every, most)


def _audit_mistakes(
    engine: Engine,
    found: ExerciseAudit,
    verdict: Callable[..., Verdict],
    seeds: Sequence[int],
    chosen: Sequence[Mistake],
) -> None:
    e = found.exercise
    found.mistakes = len(chosen)
    for mistake in chosen:
        results = [(verdict(engine.ours(e, mistake.name), seed), seed) for seed in seeds]
        alive = [seed for result, seed in results if all(r.agrees for r in result.results)]
        misnamed = [
            (result, seed) for result, seed in results if [m.name for m in result.mistakes] != [mistake.name]
        ]
        found.killed += not alive
        found.recognised += not misnamed
        found.killed_by[mistake.name] = {
            r.item.name for result, _ in results for r in result.results if not r.agrees
        }
        unsaid = sorted(found.killed_by[mistake.name] - (mistake.fails or found.killed_by[mistake.name]))
        if unsaid:
            found.problems.append(
                f"mistake {mistake.name} also fails {', '.join(unsaid)}: add to its `fails`"
            )
        unknown = sorted((mistake.fails or frozenset()) - set(e.items))
        if unknown:
            found.problems.append(
                f"mistake {mistake.name}: `fails` has {', '.join(unknown)}, no item of {e.name}"
            )
        if alive:
            found.problems.append(f"mistake {mistake.name} passes on seed {alive[0]}")
        elif misnamed:
            names = ", ".join(m.name for m in misnamed[0][0].mistakes) or "nothing"
            found.problems.append(f"mistake {mistake.name} is named {names} on seed {misnamed[0][1]}")


def _audit_alternatives(
    engine: Engine, found: ExerciseAudit, verdict: Callable[..., Verdict], seeds: Sequence[int]
) -> None:
    e = found.exercise
    for other in e.alternatives.values():
        # A cost it does not meet needs no explanation.
        results = [(verdict(engine.ours(e, other.name), seed, naming=False), seed) for seed in seeds]
        bad = [
            (result, seed)
            for result, seed in results
            if result.verdict != "right" or (other.meets_costs and result.points != e.points)
        ]
        found.accepted += not bad
        if bad:
            result, seed = bad[0]
            found.problems.append(
                f"alternative {other.name} is {result.verdict} on seed {seed}: {result.reason}"
            )


def _replaced(exercise: Exercise, text: str, label: str = "<changed>") -> Answer:
    """The exercise's file as an answer, with more source run after it."""
    parts = ((str(exercise.path), exercise.source), (label, text))
    return Answer(exercise.name, parts, own=label, trusted=True)


def lazy_answers(exercise: Exercise) -> Iterator[tuple[str, str]]:
    """(name, source) of answers that do not do the work."""
    prelude = LAZY_PRELUDE.format(name=exercise.name)
    if not isinstance(exercise.reference, type):
        for name, body in LAZY_FUNCTIONS.items():
            # These do the work and change what it returns: nothing, where an answer writes and returns None.
            if "_ours(" in body and not _returns(exercise, exercise.name):
                continue
            yield name, f"{prelude}\ndef {exercise.name}(*arguments, **options):\n    {body}\n"
        for parameter in parameters(exercise.reference):
            yield (
                f"ignores {parameter}",
                prelude + IGNORING.format(name=exercise.name, parameter=parameter, then=""),
            )
        return
    methods = {name: part for name, part in vars(exercise.reference).items() if isinstance(part, METHODS)}
    for base in ("_ours", "object"):
        body = "\n".join(f"    def {name}(self, *arguments, **options): return None" for name in methods)
        yield (
            f"methods do nothing ({base})",
            f"{prelude}\nclass {exercise.name}({base}):\n{body or '    pass'}\n",
        )
    for name in [name for name in methods if name != "__init__"]:
        for what, result in LAZY_RESULTS.items():
            if what != "does nothing" and not _returns(exercise, name):
                continue
            body = f"    def {name}(self, *arguments, **options): return {result.format(name=name)}\n"
            yield f"method {name} {what}", f"{prelude}\nclass {exercise.name}(_ours):\n{body}"


def _returns(exercise: Exercise, function: str) -> bool:
    """Whether the reference, or a method of it, returns anything: only then is another result another answer."""
    tree = source.parse(source.definition(exercise.source, exercise.name, exercise.path))
    return any(
        isinstance(part, ast.Return) and part.value is not None
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
        for part in ast.walk(node)
    )


def _audit_lazy(engine: Engine, found: ExerciseAudit, seed: int, expected: dict[str, Outcome]) -> None:
    e = found.exercise
    for name, text in lazy_answers(e):
        # One method that does nothing, or one argument taken for constant, may leave a case untouched; everything
        # else must pass no case at all.
        partly = name.startswith(("method ", "ignores "))
        result = judge(engine, e, _replaced(e, text), seed, expected, naming=False, racing=False)
        passed = [r.item.name for r in result.results if r.item.kind == "case" and r.agrees]
        if (
            partly
            and len(passed) == len(e.cases)
            and not (name.startswith("ignores ") and constant(engine, e, name, seed, expected))
        ):
            found.problems.append(f"lazy answer '{name}' passes every case")
        elif passed and not partly:
            found.problems.append(f"lazy answer '{name}' passes {', '.join(passed)}")
    taken = f"from llmcourse.lessons.{e.topic}.{e.name} import {e.name}\n"
    stolen = Answer(e.name, (("<changed>", taken),), own="<changed>")
    result = judge(engine, e, stolen, seed, expected, naming=False, racing=False)
    if result.points or result.verdict == "right":
        found.problems.append("the reference imported by name earns points")


def constant(engine: Engine, exercise: Exercise, name: str, seed: int, expected: dict[str, Outcome]) -> bool:
    """Whether the argument that the lazy answer "ignores x" drops has one value in all calls of a run."""
    # What the harness hands in, a link or a service, is another object at each call and one connection.
    refuse = (
        'if isinstance(given, DATA) and repr(given) != repr(_first["kept"]): raise ValueError("it varies")'
    )
    text = IGNORING.format(name=exercise.name, parameter=name.removeprefix("ignores "), then=refuse)
    answer = _replaced(exercise, LAZY_PRELUDE.format(name=exercise.name) + text)
    result = judge(engine, exercise, answer, seed, expected, naming=False, racing=False)
    return all(item.agrees for item in result.results if item.item.kind == "case")


def _audit_mutants(
    engine: Engine,
    found: ExerciseAudit,
    seeds: Sequence[int],
    expected: dict[int, dict[str, Outcome]],
    most: int | None,
) -> None:
    e = found.exercise
    every = mutants(source.definition(e.source, e.name, e.path))
    known = {mutant.name for mutant in every}
    found.problems += [f"excused mutant {name!r} does not exist" for name in e.excuses if name not in known]
    chosen = _sample(every, most, seeds[0])
    found.mutants = len(chosen)
    for mutant in chosen:
        dead = any(not survives(engine, e, mutant, seed, expected[seed]) for seed in seeds)
        if mutant.name in e.excuses:
            found.excused += 1
            if dead:
                found.problems.append(f"excused mutant {mutant.name!r} dies; drop the excuse")
        elif dead:
            found.mutants_killed += 1
        else:
            found.problems.append(f"mutant survives: {mutant.name!r}")


def survives(
    engine: Engine, exercise: Exercise, mutant: Mutant, seed: int, expected: dict[str, Outcome]
) -> bool:
    """Whether a mutant gets through every case and cost of a seed; the first failure is enough."""

    def agrees(item: Item, outcome: Outcome) -> bool:
        return compare(exercise, item, outcome, expected[item.name]).agrees

    items = list(exercise.items.values())
    # Without the reference of that name: a mutant that cannot even be defined must not be judged by it.
    text = f"del {exercise.name}\n{mutant.source}"
    outcomes = engine.run(exercise, _replaced(exercise, text), items, seed, expected, goes_on=agrees)
    return len(outcomes) == len(items) and all(agrees(item, outcomes[item.name]) for item in items)
