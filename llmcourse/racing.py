"""Whether an answer is as fast as it should be: paired laps, an interval, a verdict.

A race has four contenders: the *answer*, our *reference*, the *baseline* that both should beat, and a *no-op*,
which takes an input in and hands a result out and so measures the transfer alone. Each round runs all four in a
random order, each on an input that nobody has seen. The answer keeps the stated share of the reference's gain when

    margin = log(baseline / answer) - share * log(baseline / reference)

is above zero. It is taken in each round, so that what slows a whole round cancels, and averaged over the middle half
of the rounds: a quarter on either side may be anything, but an answer that is fast in half of its laps keeps nothing.

    result = race(contenders, share=0.8, fresh_input=draw, check=compare, random=Random())
    result.verdict, result.reason

Contenders share a core, each in a process of its own (`on_one_core`). On cores of their own, one of them may sit beside
a busy neighbour for hundreds of milliseconds; and two contenders in one process lose against one that has a process to
itself, because the scheduler prefers whoever slept. A busy machine lengthens long laps more than short ones, which
flatters whoever is compared with the baseline; so nobody passes while that pair's own interval is wide.

What a race cannot see: work that another process does for the answer, which is the jail's to forbid.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

Verdict = Literal["passed", "failed", "inconclusive", "shown"]

NAMES = ("baseline", "reference", "answer", "no-op")  # the last axis of every array of laps
BASELINE, REFERENCE, ANSWER, NO_OP = range(4)

NOISE_FILE = Path(__file__).with_name("race_noise.json")

# What is left of a lap after the transfer is at least this share of the lap: a no-op that was interrupted cannot
# make a contender's time vanish, and two laps that are both at the floor keep their ratio.
FLOOR = 0.1
CLEAR_OF_TRANSFER = (
    2.0  # a reference's lap takes at least twice the transfer's time, or there is nothing to race
)
SCORED_GAIN = 1.3  # below it the machine's kernels gain nothing worth a point
RESAMPLES = 2_000
LAGS = 8  # rounds over which neighbouring rounds are taken to resemble each other


@dataclass(frozen=True)
class Rules:
    """How long a race lasts and how sure its verdict is.

    looks          numbers of rounds after which the interval is read; the last one ends the race
    error          chance, over all looks together, that an interval misses on one side or the other
    warmup_rounds  rounds before the first that counts; their outputs are checked, their times dropped
    threads        threads that a contender may use: CPU time beyond them fails the answer
    """

    looks: tuple[int, ...] = (32, 64, 128, 256)
    error: float = 0.02
    warmup_rounds: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.looks or list(self.looks) != sorted(set(self.looks)) or self.looks[0] < 2 * LAGS:
            raise ValueError(f"looks must rise and start at {2 * LAGS} rounds or more, not {self.looks}")
        if not 0 < self.error < 1 or self.warmup_rounds < 0 or self.threads < 1:
            raise ValueError(
                f"expected 0 < error < 1, warmup_rounds >= 0 and threads >= 1, not {self.error}, "
                f"{self.warmup_rounds}, {self.threads}"
            )


@dataclass(frozen=True)
class Contender:
    """One runner of a race.

    name       "baseline", "reference", "answer" or "no-op"
    lap        takes an input, returns the output; a device is synchronised before it returns
    cpu_clock  CPU seconds used so far by all threads of the process that does the work; None where unknown
    """

    name: str
    lap: Callable[[Any], Any]
    cpu_clock: Callable[[], float] | None = None


class WrongOutput(RuntimeError):
    """The reference or the baseline returned something wrong: a fault of the exercise, never a verdict."""


@dataclass(frozen=True)
class Interval:
    """A ratio of times, and the interval that the verdict was read from."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class RaceResult:
    """How a race ended.

    against_baseline   baseline time / answer time: how many times as fast as the baseline the answer is
    against_reference  reference time / answer time
    reference_gain     baseline time / reference time; all three are None where no round was finished
    bar                the ratio to the baseline that was asked for, reference_gain ** share
    seconds            wall seconds of each counted lap, transfer included, by contender; same place, same round
    cpu_seconds        the same for CPU time, empty without CPU clocks
    """

    verdict: Verdict
    reason: str
    share: float
    rounds: int
    against_baseline: Interval | None
    against_reference: Interval | None
    reference_gain: Interval | None
    bar: float | None
    seconds: Mapping[str, tuple[float, ...]]
    cpu_seconds: Mapping[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---------------------------------------------------------------- the statistic


@dataclass(frozen=True)
class Intervals:
    """Estimates of many races at once, each [races], in logarithms."""

    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@functools.cache
def _resampling(rounds: int) -> NDArray[np.float32]:
    """Weights [RESAMPLES, rounds] that turn sorted values into the middle means of bootstrap samples.

    A bootstrap sample holds the i-th smallest value as often as it was drawn; what of that lies in the middle half
    is its weight. Neither depends on the values, so one table serves every race (fixed seed: same laps, same verdict).
    """
    drawn = np.random.default_rng(0).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)
    ends = np.clip(np.cumsum(drawn, axis=1), rounds / 4, 3 * rounds / 4)
    return (np.diff(ends, axis=1, prepend=rounds / 4) / (rounds / 2)).astype(np.float32)


def middle_mean(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the middle half of sorted values [..., rounds] -> [...].

    >>> float(middle_mean(np.array([-100.0, 1.0, 2.0, 500.0])))
    1.5
    """
    rounds = ordered.shape[-1]
    ends = np.clip(np.arange(rounds + 1), rounds / 4, 3 * rounds / 4)
    return ordered @ (np.diff(ends) / (rounds / 2))


def _widening(values: NDArray[np.float64], ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times wider than for independent rounds the interval is: 1 or more, [races].

    The square root of the long-run variance over the plain one, with Bartlett's weights (Newey and West 1987), of
    the values clipped to their quartiles: the influence that a round has on the middle mean. A variance from few
    rounds is too small by a share that grows with lags / rounds (Kiefer and Vogelsang 2005); its 1.5 was chosen by
    simulation, see the test of the error at the bar.
    """
    rounds = values.shape[1]
    quartile = rounds // 4
    influence = np.clip(values, ordered[:, quartile, None], ordered[:, rounds - 1 - quartile, None])
    influence = influence - influence.mean(axis=1, keepdims=True)
    variance = np.maximum((influence**2).mean(axis=1), 1e-30)
    total = np.ones(len(values))
    for lag in range(1, LAGS + 1):
        together = (influence[:, lag:] * influence[:, :-lag]).sum(axis=1) / rounds
        total += 2 * (1 - lag / (LAGS + 1)) * together / variance
    return np.sqrt(np.maximum(total, 1)) * (1 + 1.5 * LAGS / rounds)


def intervals(values: NDArray[np.float64], *, error: float) -> Intervals:
    """Bootstrap interval (Efron's percentiles, widened) of the middle mean of each row; values [races, rounds]."""
    ordered = np.sort(values, axis=1)
    middle = middle_mean(ordered)
    centred = (ordered - middle[:, None]).astype(np.float32)
    means = centred @ _resampling(values.shape[1]).T
    tail = int(error / 2 * RESAMPLES)
    means.partition((tail, RESAMPLES - 1 - tail), axis=1)
    widening = _widening(values, ordered)
    low, high = means[:, tail] * widening, means[:, RESAMPLES - 1 - tail] * widening
    return Intervals(middle, middle + np.minimum(low, 0), middle + np.maximum(high, 0))


def work_logs(laps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of what is left of each lap after its round's transfer: [races, rounds, 4] -> [races, rounds, 3]."""
    work = laps[..., :NO_OP]
    return np.log(np.maximum(work - laps[..., NO_OP, None], FLOOR * work))


@dataclass(frozen=True)
class Decisions:
    """What the rounds so far say of each race: an outcome of REASONS, or "more" where rounds must be added."""

    outcome: NDArray[np.str_]
    gain: Intervals
    to_baseline: Intervals
    to_reference: Intervals


# outcome -> verdict and what it means
REASONS: dict[str, tuple[Verdict, str]] = {
    "passed": ("passed", "the answer keeps the stated share of the reference's gain"),
    "slow": ("failed", "the answer is below the stated share of the reference's gain"),
    "unsure": (
        "failed",
        "the answer's own times are too uneven to show the stated share of the gain, on a machine that places the "
        "reference well",
    ),
    "wide": (
        "inconclusive",
        "this machine is too busy to place the reference against the baseline; run it again on a quiet one, the other "
        "points stay",
    ),
    "transfer": (
        "inconclusive",
        "the reference takes hardly longer than handing over its input and output; a larger input is needed",
    ),
    "shown": (
        "shown",
        f"the reference gains less than {SCORED_GAIN}x on this machine, so the race is not scored",
    ),
}


def decide(
    laps: NDArray[np.float64],
    cpu: NDArray[np.float64] | None = None,
    *,
    share: float,
    rules: Rules,
) -> Decisions:
    """Judge races by the rounds so far; laps and cpu in seconds, [races, rounds, 4] in the order of NAMES.

    With CPU times the margin must hold on both clocks: threads shorten the wall's time and not the CPU's, and a busy
    neighbour hides from CPU time alone that others did the work. Rounds beyond the last look count as the last look.
    """
    error = rules.error / len(rules.looks)
    final = laps.shape[1] >= rules.looks[-1]
    logs = work_logs(laps)
    baseline, reference, answer = (logs[..., place] for place in (BASELINE, REFERENCE, ANSWER))
    gain = intervals(baseline - reference, error=error)
    margins = [
        intervals(_margin(work_logs(times), share), error=error) for times in (laps, cpu) if times is not None
    ]
    low = functools.reduce(np.minimum, [margin.low for margin in margins])
    high = functools.reduce(np.minimum, [margin.high for margin in margins])
    clear = np.median(laps[..., REFERENCE] / laps[..., NO_OP], axis=1) >= CLEAR_OF_TRANSFER
    wide = gain.high - gain.low > (1 - share) * gain.middle
    bar = math.log(SCORED_GAIN)
    scored = gain.low >= bar
    if final:
        scored = gain.middle >= bar
    outcome = np.select(
        [
            ~clear,
            gain.high < bar,
            scored & (high < 0),
            scored & ~wide & (low > 0),
            np.full(len(laps), not final),
            ~scored,
            wide,
        ],
        ["transfer" if final else "more", "shown", "slow", "passed", "more", "shown", "wide"],
        "unsure",
    )
    return Decisions(
        outcome, gain, intervals(baseline - answer, error=error), intervals(reference - answer, error=error)
    )


def _margin(logs: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    baseline, reference, answer = (logs[..., place] for place in (BASELINE, REFERENCE, ANSWER))
    return (baseline - answer) - share * (baseline - reference)


def outcomes(
    laps: NDArray[np.float64],
    cpu: NDArray[np.float64] | None = None,
    *,
    share: float,
    rules: Rules,
) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Outcome and rounds of many races whose laps are already known, [races, at least rules.looks[-1], 4].

    The same decisions at the same looks as `race`, for simulations.
    """
    outcome = np.full(len(laps), "more", dtype="<U8")
    rounds = np.zeros(len(laps), dtype=np.int64)
    for look in rules.looks:
        (open_races,) = np.nonzero(outcome == "more")
        if not len(open_races):
            break
        seen = laps[open_races, :look]
        seen_cpu = None if cpu is None else cpu[open_races, :look]
        outcome[open_races] = decide(seen, seen_cpu, share=share, rules=rules).outcome
        rounds[open_races] = look
    return outcome, rounds


# ---------------------------------------------------------------- running one


@dataclass
class _Log:
    """What was measured of one contender."""

    seconds: list[float]
    cpu_seconds: list[float]
    idle_seconds: float = 0.0
    idle_cpu_seconds: float = 0.0
    left_at: float | None = None
    left_cpu_at: float = 0.0


def race(
    contenders: Sequence[Contender],
    *,
    share: float,
    fresh_input: Callable[[], Any],
    check: Callable[[str, Any, Any], str | None],
    random: Random,
    clock: Callable[[], float] = time.perf_counter,
    rules: Rules | None = None,
) -> RaceResult:
    """Race an answer against the reference and the baseline.

    share        of the reference's gain, in logarithms, that the answer must keep: 0.8 of a 4x gain is 3.03x
    fresh_input  draws an input for one lap, outside the window; never the same content twice
    check        (name, input, output) -> None, or why the output is wrong; outside the window, after every lap but
                 the no-op's. A wrong answer fails; a wrong reference or baseline raises WrongOutput.

    Whatever a lap raises goes to the caller. The caller bounds a lap's time, puts each contender into a process of
    its own, and calls this inside `on_one_core`.
    """
    rules = rules or Rules()
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, both excluded, not {share}")
    by_name = _by_name(contenders)
    logs = {name: _Log([], []) for name in NAMES}
    for number in range(rules.warmup_rounds + rules.looks[-1]):
        for name in random.sample(NAMES, k=len(NAMES)):
            x = fresh_input()
            output = _lap(by_name[name], x, logs[name], clock)
            wrong = check(name, x, output) if name != "no-op" else None
            if wrong is not None and name != "answer":
                raise WrongOutput(f"the {name} of this race is wrong: {wrong}; expected it to be right")
            if wrong is not None:
                return _result("failed", f"round {number + 1}: {wrong}", share, logs, None)
        if number < rules.warmup_rounds:
            for log in logs.values():
                log.seconds.clear()
                log.cpu_seconds.clear()
        rounds = number + 1 - rules.warmup_rounds
        if rounds in rules.looks:
            laps = _stack([logs[name].seconds for name in NAMES])
            cpu = _stack([logs[name].cpu_seconds for name in NAMES]) if logs["answer"].cpu_seconds else None
            decisions = decide(laps, cpu, share=share, rules=rules)
            unfair = _unfair(logs["answer"], rules)
            if unfair is not None:
                return _result("failed", unfair, share, logs, decisions)
            outcome = str(decisions.outcome[0])
            if outcome != "more":
                return _result(*REASONS[outcome], share, logs, decisions)
    raise AssertionError("the last look always decides")


def _by_name(contenders: Sequence[Contender]) -> dict[str, Contender]:
    names = sorted(contender.name for contender in contenders)
    if names != sorted(NAMES):
        raise ValueError(f"a race has one each of {', '.join(NAMES)}, not {', '.join(names) or 'nobody'}")
    if len({contender.cpu_clock is None for contender in contenders}) > 1:
        raise ValueError(
            "either every contender has a CPU clock or none has; give the missing ones, or drop all"
        )
    return {contender.name: contender for contender in contenders}


def _lap(contender: Contender, x: Any, log: _Log, clock: Callable[[], float]) -> Any:
    """Run one lap and note its time; the window opens before the input goes in and closes after the output is out."""
    cpu_clock = contender.cpu_clock
    cpu_began = cpu_clock() if cpu_clock else 0.0
    began = clock()
    output = contender.lap(x)
    ended = clock()
    cpu_ended = cpu_clock() if cpu_clock else 0.0
    if ended <= began:
        raise ValueError(
            f"the clock went from {began} to {ended} s in a lap of the {contender.name}; expected it to rise"
        )
    log.seconds.append(ended - began)
    if cpu_clock:
        # A clock that is too coarse to see a lap must not make a zero, whose logarithm has no end.
        log.cpu_seconds.append(max(cpu_ended - cpu_began, 1e-9))
    if log.left_at is not None:
        log.idle_seconds += began - log.left_at
        log.idle_cpu_seconds += cpu_began - log.left_cpu_at
    log.left_at, log.left_cpu_at = ended, cpu_ended
    return output


def _unfair(log: _Log, rules: Rules) -> str | None:
    """Why the answer's use of the CPU is none that was allowed; a tenth is left for the clocks' own grain."""
    used, wall = sum(log.cpu_seconds), sum(log.seconds)
    if used > 1.1 * rules.threads * wall:
        return (
            f"the answer used {used / wall:.1f} CPU seconds a second; expected at most {rules.threads}: run it on "
            f"{rules.threads} thread{'s' if rules.threads > 1 else ''}"
        )
    if log.idle_cpu_seconds > 0.1 * log.idle_seconds + 0.01:
        return (
            f"the answer used {log.idle_cpu_seconds:.3f} CPU seconds between its laps, while the others ran; "
            "expected it to be idle then: leave no thread running"
        )
    return None


def _stack(columns: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array(columns, dtype=np.float64).T[None]


def _result(
    verdict: Verdict, reason: str, share: float, logs: Mapping[str, _Log], decisions: Decisions | None
) -> RaceResult:
    against: list[Interval | None] = [None, None, None]
    if decisions is not None:
        found = (decisions.to_baseline, decisions.to_reference, decisions.gain)
        against = [Interval(*(math.exp(part[0]) for part in (x.middle, x.low, x.high))) for x in found]
    gain = against[2]
    return RaceResult(
        verdict=verdict,
        reason=reason,
        share=share,
        rounds=min(len(log.seconds) for log in logs.values()),
        against_baseline=against[0],
        against_reference=against[1],
        reference_gain=gain,
        bar=None if gain is None else gain.middle**share,
        seconds={name: tuple(log.seconds) for name, log in logs.items()},
        cpu_seconds={name: tuple(log.cpu_seconds) for name, log in logs.items() if log.cpu_seconds},
    )


@contextmanager
def on_one_core(process_ids: Sequence[int], *, random: Random) -> Iterator[int | None]:
    """Keep this process and those of the contenders on one core, the same for all; yields its number.

    Only one of them works at a time, so they lose nothing, and a neighbour slows all alike. Yields None and does
    nothing where the system does not pin (macOS). Threads that a process started before stay where they are.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = {pid: os.sched_getaffinity(pid) for pid in (0, *process_ids)}
    shared = set.intersection(*before.values())
    if not shared:
        raise ValueError(
            f"the processes {list(process_ids)} may run on no common core; expected at least one"
        )
    core = random.choice(sorted(shared))
    try:
        for pid in before:
            os.sched_setaffinity(pid, {core})
        yield core
    finally:
        for pid, cores in before.items():
            try:
                os.sched_setaffinity(pid, cores)
            except ProcessLookupError:
                continue  # a contender that has ended needs no core


# ---------------------------------------------------------------- noise, recorded and resampled

CONDITIONS = {"quiet": 0, "one busy neighbour": 1, "four busy neighbours": 4}
WIDTH = 4096
# Rows of a [4096, 4096] matrix that a lap multiplies with a vector, 0 for the transfer alone.
ROWS = {"baseline": 4096, "reference": 1024, "answer": 1024, "no-op": 0}
BLOCK = 32  # rounds resampled together: longer than what neighbouring rounds share


def read_noise(path: Path = NOISE_FILE) -> dict[str, NDArray[np.float64]]:
    """Recorded rounds, condition -> seconds [rounds, 4] in the order of NAMES."""
    stored = json.loads(path.read_text())
    return {
        name: np.array([series[each] for each in NAMES], dtype=np.float64).T * 1e-6
        for name, series in stored["microseconds"].items()
    }


def resample(
    noise: NDArray[np.float64], *, races: int, rounds: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Races drawn from recorded rounds, [recorded, 4] -> [races, rounds, 4], in blocks that begin anywhere."""
    begins = generator.integers(len(noise), size=(races, -(-rounds // BLOCK), 1))
    places = (begins + np.arange(BLOCK)) % len(noise)
    return noise[places.reshape(races, -1)[:, :rounds]]


def _serve(connection: Connection) -> None:
    """A contender for `record`: a vector in, a slice of a matrix times that vector out, weights not in the cache."""
    import torch

    torch.set_num_threads(1)
    weights = [torch.randn(WIDTH, WIDTH) for _ in range(4)]
    number = 0
    connection.send_bytes(b"ready")
    while order := connection.recv_bytes():
        rows = int.from_bytes(order[:8], "little")
        x = torch.frombuffer(bytearray(order[8:]), dtype=torch.float32)
        number += 1
        output = weights[number % len(weights)][:rows] @ x if rows else x
        connection.send_bytes(output.numpy().tobytes())


def _disturb() -> None:
    """A neighbour that takes a core and memory bandwidth until it is killed."""
    buffer = np.ones(8 << 20, dtype=np.float32)
    while True:
        buffer.sum()


def record(path: Path = NOISE_FILE, *, rounds: int = 1000) -> float:
    """Record the laps of four processes on one core, quiet and beside busy neighbours; about a minute, 1.5 GB.

    Returns the load average before. "quiet" is true only of a machine that does nothing else.
    """
    from llmcourse.machine import describe

    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe() for name in NAMES}
    processes = [context.Process(target=_serve, args=(pipes[name][1],), daemon=True) for name in NAMES]
    load = os.getloadavg()[0]
    for process in processes:
        process.start()
    ends = {name: pipe[0] for name, pipe in pipes.items()}
    for end in ends.values():
        end.recv_bytes()
    laps = {}
    for condition, neighbours in CONDITIONS.items():
        disturbers = [context.Process(target=_disturb, daemon=True) for _ in range(neighbours)]
        for process in disturbers:
            process.start()
        time.sleep(2)
        pids = [process.pid for process in processes if process.pid is not None]
        with on_one_core(pids, random=Random(0)):
            laps[condition] = _record_laps(ends, rounds)
        for process in disturbers:
            process.kill()
            process.join()
    for end in ends.values():
        end.send_bytes(b"")
    for process in processes:
        process.join()
    stored = {
        "command": "python -m llmcourse.racing record",
        "machine": describe(),
        "recorded": datetime.now(UTC).isoformat(timespec="minutes"),
        "load average before": round(load, 2),
        "rows of the matrix": ROWS,
        "microseconds": laps,
    }
    path.write_text(
        json.dumps(stored, separators=(",", ":")).replace('"microseconds"', '\n"microseconds"') + "\n"
    )
    return load


def _record_laps(ends: Mapping[str, Connection], rounds: int) -> dict[str, list[int]]:
    random, warmup = Random(0), 5
    laps: dict[str, list[int]] = {name: [] for name in NAMES}
    for number in range(rounds + warmup):
        for name in random.sample(NAMES, k=len(NAMES)):
            message = ROWS[name].to_bytes(8, "little") + np.float32(random.random()).tobytes() * WIDTH
            began = time.perf_counter()
            ends[name].send_bytes(message)
            ends[name].recv_bytes()
            taken = time.perf_counter() - began
            if number >= warmup:
                laps[name].append(round(taken * 1e6))
    return laps


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llmcourse.racing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("command", choices=["record"], help="record this machine's noise for the tests")
    parser.add_argument("--to", type=Path, default=NOISE_FILE, help="file to write")
    parser.add_argument("--rounds", type=int, default=1000, help="rounds for each condition")
    chosen = parser.parse_args(arguments)
    load = record(chosen.to, rounds=chosen.rounds)
    print(f"{chosen.to}: {chosen.to.stat().st_size} bytes; load average before: {load:.2f}")
    if load > 0.5:
        print("other work ran here, so what is labelled quiet was not: record again when the machine is idle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
