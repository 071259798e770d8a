"""Where a race is run: four lanes, in workers or in this process, and the verdict of `llmcourse.racing` on them.

judging (a right answer) -> runner.race -> lanes -> run_race -> racing.race -> RaceResult
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

from llmcourse import agreement, racing
from llmcourse.exercise import Exercise, Rng, derive_seed
from llmcourse.racing import Contender, RaceResult, Rules
from llmcourse.zygote import HarnessFault

# Enough for a real gain in about two seconds; the last look only where the machine is busy.
RULES = Rules(looks=(24, 48, 96, 192))


class Stumbled(Exception):
    """A contender raised, died or ran too long in a lap: says what, in words for the learner; `name` says who."""

    name = ""


@dataclass(frozen=True)
class Lane:
    """One contender's place: `line_up(seeds, x)` sets it up, `lap(x)` gives its output; `pid` is None in this process.

    Both raise Stumbled for whatever becomes of the contender.
    """

    line_up: Callable[[tuple[int, int], Any], None]
    lap: Callable[[Any], Any]
    pid: int | None


def cpu_clock(pid: int | None) -> Callable[[], float] | None:
    """Reads the CPU seconds that all threads of a process have used, from outside; None where Linux is not."""
    if pid is None or sys.platform != "linux":
        return None
    number = ~pid << 3 | 2  # clock_getcpuclockid(3): a process's clock, as the kernel numbers them
    return lambda: time.clock_gettime(number)


def run_race(exercise: Exercise, lanes: Mapping[str, Lane], seed: int) -> RaceResult:
    """Line the contenders up, race them, check the answer's outputs against our own run in this process."""
    race = exercise.race
    assert race is not None
    seeds = derive_seed(seed, exercise.name, race.name), derive_seed(seed, "race", exercise.name)
    # Of its own: the contenders know the seed of the setup.
    drawn = Rng(derive_seed(seed, exercise.name, race.name, "inputs"), 0)
    for name, lane in lanes.items():
        try:
            lane.line_up(seeds, race.inputs(drawn))
        except Stumbled as error:
            return fallen(exercise, name, f"while it was set up: {error}", race.keeps)
    ours = race.function(exercise.reference, Rng(*seeds))

    def check(name: str, x: Any, output: Any) -> str | None:
        if name != "answer":
            return None
        expected = ours(x)
        if race.judge is not None:
            return race.judge(output, expected)
        return agreement.difference(output, expected, tol=race.tol)

    pids = {name: lane.pid for name, lane in lanes.items() if lane.pid is not None}
    contenders = [
        Contender(name, functools.partial(_named_lap, name, lane), cpu_clock(lane.pid))
        for name, lane in lanes.items()
    ]
    chance = Random(derive_seed(seed, "order"))
    with racing.on_one_core(list(pids.values()), random=chance) if pids else nullcontext():
        try:
            return racing.race(
                contenders,
                share=race.keeps,
                fresh_input=lambda: race.inputs(drawn),
                check=check,
                random=chance,
                rules=RULES,
            )
        except Stumbled as error:
            return fallen(exercise, error.name, f"in a lap: {error}", race.keeps)


def _named_lap(name: str, lane: Lane, x: Any) -> Any:
    try:
        return lane.lap(x)
    except Stumbled as error:
        error.name = name
        raise


def fallen(exercise: Exercise, name: str, why: str, share: float) -> RaceResult:
    """The result of an answer that stumbled; HarnessFault where it was one of ours."""
    if name != "answer":
        raise HarnessFault(f"{exercise.name}: the {name} of its race failed {why}")
    return RaceResult("failed", why, share, 0, None, None, None, None, {}, {})


def in_process(exercise: Exercise, answer: Any, seed: int) -> RaceResult:
    """The same race with all contenders in this process: open to whatever the answer does, and not pinned."""
    race = exercise.race
    assert race is not None
    runs: dict[str, Callable[[Any], Any]] = {}

    def lane(name: str, runner: Any) -> Lane:
        def line_up(seeds: tuple[int, int], x: Any) -> None:
            run = race.function(runner, Rng(*seeds))
            held = run(x) if name == "no-op" else None  # our own run, which checks, runs nothing here either
            runs[name] = (lambda x: held) if name == "no-op" else run

        return Lane(lambda seeds, x: _caught(line_up, seeds, x), lambda x: _caught(runs[name], x), None)

    contenders = {
        "baseline": race.baseline,
        "reference": exercise.reference,
        "answer": answer,
        "no-op": race.baseline,
    }
    return run_race(exercise, {name: lane(name, runner) for name, runner in contenders.items()}, seed)


def _caught(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever an answer raises is its outcome
        raise Stumbled(f"{type(error).__name__}: {error}") from error
