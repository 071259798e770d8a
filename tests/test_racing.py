from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcourse import racing
from llmcourse.racing import ANSWER, BASELINE, NAMES, NO_OP, REFERENCE, Contender, RaceResult, Rules

RULES = Rules()
SHARE = 0.8
GAINS = (1.6, 2.7)
CONDITIONS = tuple(racing.CONDITIONS)
HONEST_RACES, CHEATING_RACES = 900, 250  # in each of the six settings; see the count below


# ---------------------------------------------------------------- simulated races over recorded noise


@functools.cache
def recorded() -> dict[str, NDArray[np.float64]]:
    return racing.read_noise()


def undisturbed() -> NDArray[np.float64]:
    """Seconds of each contender's lap when nobody disturbs it: near the shortest of the quiet ones."""
    return np.percentile(recorded()["quiet"], 5, axis=0)


def slowed(laps: NDArray[np.float64], factor: Any) -> NDArray[np.float64]:
    """Laps whose work, all but the transfer, takes `factor` times as long, and meets `factor` times the disturbance."""
    transfer = np.minimum(undisturbed()[NO_OP], 0.98 * laps)
    return transfer + (laps - transfer) * factor


def draw(
    condition: str, gain: float, races: int, seed: int, *, slowness: Any = 1.0, rounds: int = RULES.looks[-1]
) -> NDArray[np.float64]:
    """Races whose reference gains `gain`, and whose answer takes `slowness` [races, rounds] of the reference's time."""
    generator = np.random.default_rng(seed)
    laps = racing.resample(recorded()[condition], races=races, rounds=rounds, generator=generator)
    alone = undisturbed() - undisturbed()[NO_OP]
    laps[..., BASELINE] = slowed(laps[..., BASELINE], gain * alone[REFERENCE] / alone[BASELINE])
    laps[..., ANSWER] = slowed(laps[..., ANSWER], slowness)
    return laps


def verdicts(laps: NDArray[np.float64], cpu: NDArray[np.float64] | None = None) -> Counter[str]:
    found, _ = racing.outcomes(laps, cpu, share=SHARE, rules=RULES)
    return Counter(racing.REASONS[outcome][0] for outcome in found.tolist())


@pytest.fixture
def seed() -> int:
    drawn = random.SystemRandom().randrange(2**32)
    print(f"seed {drawn}")  # pytest shows it where the test fails
    return drawn


settings = [
    pytest.param(condition, gain, id=f"{condition}, gain {gain}")
    for condition in CONDITIONS
    for gain in GAINS
]


def test_at_least_ten_thousand_races_are_simulated() -> None:
    assert len(settings) * (2 * HONEST_RACES + 2 * CHEATING_RACES) >= 10_000


@pytest.mark.parametrize(("condition", "gain"), settings)
def test_an_answer_as_fast_as_the_reference_rarely_fails(condition: str, gain: float, seed: int) -> None:
    found = verdicts(draw(condition, gain, HONEST_RACES, seed))
    # 1 % of 900 is 9; a true rate of 0.2 % exceeds it once in 50,000 runs
    # (Poisson, mean 1.8).
    assert found["failed"] <= 0.01 * HONEST_RACES, found


@pytest.mark.parametrize(("condition", "gain"), settings)
def test_an_answer_at_half_the_bar_never_passes(condition: str, gain: float, seed: int) -> None:
    kept = gain ** (
        SHARE / 2
    )  # half of the bar, in logarithms: nearer to it than half of the ratio at these gains
    found = verdicts(draw(condition, gain, HONEST_RACES, seed, slowness=gain / kept))
    assert found["passed"] == 0, found


def test_a_quiet_machine_decides() -> None:
    # Without this, a race that is always inconclusive would satisfy every other bound. Where it fails after a new
    # recording, the machine was not quiet: record again.
    found = verdicts(draw("quiet", 2.7, 300, 1))
    assert found["passed"] >= 0.95 * 300, found
    kept = 2.7 ** (SHARE / 2)
    found = verdicts(draw("quiet", 2.7, 300, 2, slowness=2.7 / kept))
    assert found["failed"] >= 0.95 * 300, found


@pytest.mark.parametrize(("condition", "gain"), settings)
def test_an_answer_that_is_fast_every_other_lap_gains_nothing(condition: str, gain: float, seed: int) -> None:
    slowness = np.where(np.arange(RULES.looks[-1]) % 2, 1.0, gain)
    found = verdicts(draw(condition, gain, CHEATING_RACES, seed, slowness=slowness))
    assert found["passed"] == 0, found


@pytest.mark.parametrize(("condition", "gain"), settings)
def test_threads_that_halve_the_wall_time_gain_nothing(condition: str, gain: float, seed: int) -> None:
    laps = draw(condition, gain, CHEATING_RACES, seed)  # the answer's laps are as short as the reference's
    # Its CPU time is the baseline's: the same work, split among threads. Neighbours take no CPU time of ours.
    cpu = draw("quiet", gain, CHEATING_RACES, seed + 1)
    cpu[..., ANSWER] = slowed(cpu[..., ANSWER], gain)
    assert verdicts(laps, cpu)["passed"] == 0
    assert verdicts(laps, draw("quiet", gain, CHEATING_RACES, seed + 1))["failed"] <= 0.02 * CHEATING_RACES


def test_a_lucky_median_does_not_carry_an_answer_that_is_slow_in_four_laps_of_ten(seed: int) -> None:
    generator = np.random.default_rng(seed)
    slowness = np.where(generator.random((300, RULES.looks[-1])) < 0.6, 1.0, 2.7)
    laps = draw("quiet", 2.7, 300, seed, slowness=slowness)
    logs = racing.work_logs(laps)
    margins = logs[..., BASELINE] - logs[..., ANSWER] - SHARE * (logs[..., BASELINE] - logs[..., REFERENCE])
    assert np.mean(np.median(margins, axis=1) > 0) > 0.5  # what a paired median would say
    assert verdicts(laps)["passed"] == 0


# ---------------------------------------------------------------- the interval


def test_the_interval_is_the_bootstrap_of_the_middle_mean() -> None:
    generator = np.random.default_rng(3)
    values = generator.standard_t(3, size=64)
    samples = np.sort(generator.choice(values, size=(20_000, 64)), axis=1)[:, 16:48].mean(axis=1)
    found = racing.intervals(values[None], error=0.1)
    assert found.middle[0] == pytest.approx(np.sort(values)[16:48].mean())
    widening = racing._widening(values[None], np.sort(values)[None])[0]
    # 2,000 draws place a 5 % quantile within 1.6 standard deviations of its rank's error: sqrt(.05*.95/2000) / .103
    # (the normal density there) = 0.047 standard deviations of the means; three times that is allowed.
    spread = samples.std()
    for bound, share in ((found.low[0], 0.05), (found.high[0], 0.95)):
        plain = found.middle[0] + (bound - found.middle[0]) / widening
        assert abs(plain - np.quantile(samples, share)) < 3 * 0.05 * spread


@pytest.mark.parametrize(
    "correlation", [0.0, 0.5], ids=["independent rounds", "rounds that follow each other"]
)
def test_all_looks_together_keep_the_error_at_the_bar(correlation: float, seed: int) -> None:
    # An answer exactly at the bar: whatever passes, passes wrongly. Rules.error / 2 is the chance on this side.
    races, rounds, gain = 1500, RULES.looks[-1], math.log(4)
    generator = np.random.default_rng(seed)
    shocks = generator.standard_t(4, size=(rounds, races, 3)) * 0.05
    for number in range(1, rounds):
        shocks[number] += correlation * shocks[number - 1]
    logs = shocks.transpose(1, 0, 2) + np.array([gain, 0.0, (1 - SHARE) * gain])
    laps = np.concatenate([np.exp(logs) * 1e-3, np.full((races, rounds, 1), 1e-9)], axis=2)
    passed = verdicts(laps)["passed"]
    # Nominal: error / 2 = 1 %; measured 0.4 %, and 3.3 % where each round repeats half of the last one's deviation, far
    # more than was recorded (0.1). Three standard deviations of the count are added.
    allowed = 0.01 if correlation == 0 else 0.04
    assert passed <= races * allowed + 3 * math.sqrt(races * allowed), passed


def test_rounds_that_follow_each_other_widen_the_interval() -> None:
    generator = np.random.default_rng(5)
    shocks = generator.normal(size=(200, 256))
    drifting = np.cumsum(shocks, axis=1) * 0.1
    for values, least, most in ((shocks, 1.0, 1.25), (drifting, 2.0, 3.15)):
        found = racing._widening(values, np.sort(values, axis=1))
        # White: 1 plus noise, cut at 1 below. A random walk: all correlations near 1, sqrt(1 + 2 * 4) = 3 at 8 lags;
        # both times 1 + 12 / 256.
        assert least <= found.mean() <= most


def test_an_interrupted_no_op_neither_ends_nor_decides_a_round() -> None:
    laps = np.array([[[4e-3, 1e-3, 1e-3, 5e-2]]])
    logs = racing.work_logs(laps)[0, 0]
    assert np.isfinite(logs).all()
    assert logs[BASELINE] - logs[REFERENCE] == pytest.approx(math.log(4))


# ---------------------------------------------------------------- whole races on an injected clock


@dataclass
class Course:
    """A clock that only laps move, and a buffer that every input reuses."""

    now: float = 0.0
    cpu: float = 0.0
    inputs: int = 0

    def __post_init__(self) -> None:
        self.buffer = np.zeros(4)

    def clock(self) -> float:
        return self.now

    def cpu_clock(self) -> float:
        return self.cpu

    def fresh_input(self) -> NDArray[np.float64]:
        self.inputs += 1
        self.buffer[:] = self.inputs
        return self.buffer

    def takes(self, seconds: Callable[[], float], *, threads: float = 1.0) -> Callable[[Any], Any]:
        def lap(x: NDArray[np.float64]) -> NDArray[np.float64]:
            taken = seconds()
            self.now += taken
            self.cpu += taken * threads
            return x * 2

        return lap


def check_double(name: str, x: NDArray[np.float64], output: NDArray[np.float64]) -> str | None:
    return None if np.array_equal(output, x * 2) else "expected twice the input"


def jitter(seconds: float, seed: int, spread: float = 0.02) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: seconds * math.exp(generator.gauss(0, spread))


def run(
    course: Course,
    answer: Callable[[Any], Any],
    *,
    gain: float = 4.0,
    spread: float = 0.02,
    transfer: float = 5e-5,
    clocks: Sequence[Callable[[], float] | None] = (None, None, None, None),
    check: Callable[[str, Any, Any], str | None] = check_double,
) -> RaceResult:
    laps = {
        "baseline": course.takes(jitter(gain * 1e-3 + transfer, 1, spread)),
        "reference": course.takes(jitter(1e-3 + transfer, 2, spread)),
        "answer": answer,
        "no-op": course.takes(jitter(transfer, 3)),
    }
    contenders = [Contender(name, laps[name], clock) for name, clock in zip(NAMES, clocks, strict=True)]
    return racing.race(
        contenders,
        share=SHARE,
        fresh_input=course.fresh_input,
        check=check,
        random=random.Random(0),
        clock=course.clock,
    )


def test_a_healthy_answer_passes_at_the_first_look_and_is_told_its_ratios() -> None:
    course = Course()
    result = run(course, course.takes(jitter(1.05e-3, 4)))
    assert (result.verdict, result.rounds) == ("passed", RULES.looks[0])
    assert result.against_baseline and result.against_reference and result.reference_gain and result.bar
    assert result.against_baseline.low < 4 < result.against_baseline.high
    assert result.against_reference.low < 1 < result.against_reference.high
    assert result.bar == pytest.approx(result.reference_gain.middle**SHARE)
    assert {len(laps) for laps in result.seconds.values()} == {result.rounds}
    assert course.inputs == 4 * (result.rounds + RULES.warmup_rounds)


def test_a_result_is_json() -> None:
    course = Course()
    result = run(course, course.takes(jitter(1.05e-3, 4)))
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["verdict"] == "passed"
    assert stored["seconds"]["answer"] == list(result.seconds["answer"])
    assert set(stored["against_baseline"]) == {"middle", "low", "high"}


def test_an_answer_below_the_bar_fails() -> None:
    course = Course()
    result = run(course, course.takes(jitter(2.05e-3, 4)))
    assert (result.verdict, result.reason) == racing.REASONS["slow"]


def test_an_answer_whose_own_times_are_too_uneven_fails_at_the_last_look() -> None:
    course = Course()
    result = run(course, course.takes(jitter(1.25e-3, 4, spread=1.5)))
    assert (result.verdict, result.reason) == racing.REASONS["unsure"]
    assert result.rounds == RULES.looks[-1]


def test_a_machine_that_cannot_place_the_reference_is_inconclusive() -> None:
    course = Course()
    result = run(course, course.takes(jitter(1.05e-3, 4, spread=2.0)), spread=2.0)
    assert (result.verdict, result.reason) == racing.REASONS["wide"]


def test_a_reference_that_gains_too_little_is_shown() -> None:
    course = Course()
    result = run(course, course.takes(jitter(1.05e-3, 4)), gain=1.2)
    assert (result.verdict, result.reason) == racing.REASONS["shown"]


def test_a_reference_that_takes_hardly_longer_than_the_transfer_is_inconclusive() -> None:
    course = Course()
    result = run(course, course.takes(jitter(3e-3, 4)), transfer=2e-3)
    assert (result.verdict, result.reason) == racing.REASONS["transfer"]


def test_a_wrong_output_ends_the_race() -> None:
    course = Course()
    fast = course.takes(lambda: 1e-6)
    result = run(course, lambda x: fast(x) + (course.inputs > 60))
    assert result.verdict == "failed"
    assert "expected twice the input" in result.reason
    assert result.rounds < RULES.looks[0]
    assert result.against_baseline is None


@pytest.mark.parametrize("name", ["reference", "baseline"])
def test_a_wrong_reference_is_no_verdict(name: str) -> None:
    course = Course()
    with pytest.raises(racing.WrongOutput, match=f"the {name} of this race is wrong: bad"):
        run(course, course.takes(lambda: 1e-3), check=lambda who, x, output: "bad" if who == name else None)


def test_a_race_and_a_simulation_of_its_laps_end_alike() -> None:
    """The laps of whole races, each from recorded noise on an injected clock, give `outcomes` the same verdicts."""
    verdict_of: Counter[str] = Counter()
    for condition in CONDITIONS:
        for slowness in (1.0, 1.5):
            laps = draw(condition, 2.7, 8, 7, slowness=slowness, rounds=RULES.looks[-1] + RULES.warmup_rounds)
            for one in laps:
                course = Course()
                steps = [iter(one[:, place].tolist()) for place in range(len(NAMES))]
                contenders = [
                    Contender(name, course.takes(functools.partial(next, step)))
                    for name, step in zip(NAMES, steps, strict=True)
                ]
                result = racing.race(
                    contenders,
                    share=SHARE,
                    fresh_input=course.fresh_input,
                    check=check_double,
                    random=random.Random(1),
                    clock=course.clock,
                )
                counted = one[None, RULES.warmup_rounds :]
                outcome, rounds = racing.outcomes(counted, share=SHARE, rules=RULES)
                assert (result.verdict, result.reason) == racing.REASONS[str(outcome[0])]
                assert result.rounds == rounds[0]
                verdict_of[result.verdict] += 1
    assert len(verdict_of) >= 2, verdict_of


# ---------------------------------------------------------------- answers that try


def cached(course: Course, key: Callable[[NDArray[np.float64]], Any]) -> Callable[[Any], Any]:
    """Fast where the key was seen before, four times as slow otherwise."""
    seen: dict[Any, Any] = {}
    slow, fast = course.takes(jitter(4.05e-3, 4)), course.takes(lambda: 1e-5)

    def lap(x: NDArray[np.float64]) -> Any:
        if key(x) in seen:
            fast(x)
            return seen[key(x)]
        return seen.setdefault(key(x), slow(x))

    return lap


def test_a_cache_by_content_never_hits() -> None:
    course = Course()
    result = run(course, cached(course, lambda x: x.tobytes()))
    assert (result.verdict, result.reason) == racing.REASONS["slow"]
    assert min(result.seconds["answer"]) > 3e-3


def test_a_cache_by_pointer_returns_an_old_output() -> None:
    course = Course()
    result = run(course, cached(course, lambda x: x.ctypes.data))
    assert result.verdict == "failed"
    assert result.reason == "round 2: expected twice the input"


def test_an_answer_that_is_fast_only_while_warming_up_fails() -> None:
    course = Course()
    laps = iter(range(10_000))
    result = run(course, course.takes(lambda: 1e-3 if next(laps) < RULES.warmup_rounds + 8 else 4e-3))
    assert result.verdict == "failed"


def test_an_answer_that_wakes_up_only_when_watched_is_always_watched() -> None:
    """It looks for laps without a clock or a check; there are none."""
    course = Course()
    watched = {"clock": 0, "check": 0}
    laps = 0

    def clock() -> float:
        watched["clock"] += 1
        return course.now

    def answer(x: Any) -> Any:
        nonlocal laps
        laps += 1
        # Every earlier lap of anyone was timed at both ends; this one was timed at its beginning.
        assert watched["clock"] % 2 == 1
        assert watched["check"] == laps - 1
        return course.takes(lambda: 1.05e-3)(x)

    def check(name: str, x: Any, output: Any) -> str | None:
        watched["check"] += name == "answer"
        return check_double(name, x, output)

    contenders = [
        Contender(name, answer if name == "answer" else course.takes(jitter(seconds, 9)))
        for name, seconds in zip(NAMES, (4.05e-3, 1.05e-3, 0.0, 5e-5), strict=True)
    ]
    result = racing.race(
        contenders,
        share=SHARE,
        fresh_input=course.fresh_input,
        check=check,
        random=random.Random(2),
        clock=clock,
    )
    assert result.verdict == "passed"
    assert laps == watched["check"] == result.rounds + RULES.warmup_rounds


def with_own_cpu_clock(threads: float, *, seconds: float = 1.05e-3) -> RaceResult:
    """A race whose answer lives in a process of its own: its CPU clock stands while the others run."""
    course, own = Course(), Course()
    own_lap = course.takes(jitter(seconds, 4))

    def answer(x: Any) -> Any:
        began = course.now
        output = own_lap(x)
        own.cpu += (course.now - began) * threads
        return output

    return run(course, answer, clocks=[course.cpu_clock, course.cpu_clock, own.cpu_clock, course.cpu_clock])


def test_threads_are_charged_on_the_cpu_clock() -> None:
    result = with_own_cpu_clock(4)
    assert result.verdict == "failed"
    assert result.reason == (
        "the answer used 4.0 CPU seconds a second; expected at most 1: run it on 1 thread"
    )


def test_one_thread_on_the_cpu_clock_passes() -> None:
    result = with_own_cpu_clock(1)
    assert result.verdict == "passed"
    assert set(result.cpu_seconds) == set(NAMES)


def test_a_thread_that_runs_between_the_laps_fails_the_answer() -> None:
    """It could work ahead, or slow the others down; its CPU clock goes on while they run."""
    course = Course()
    result = run(course, course.takes(jitter(1.05e-3, 4)), clocks=[course.cpu_clock] * 4)
    assert result.verdict == "failed"
    assert "CPU seconds between its laps" in result.reason


# ---------------------------------------------------------------- guards


@pytest.mark.parametrize(
    "wrong", [{"looks": ()}, {"looks": (64, 32)}, {"looks": (4, 8)}, {"error": 0.0}, {"threads": 0}], ids=str
)
def test_rules_that_cannot_be_followed_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="looks must rise|expected 0 < error"):
        Rules(**wrong)


def _enter(contenders: Sequence[Contender], **changed: Any) -> RaceResult:
    course = Course()
    chosen = {
        "share": SHARE,
        "fresh_input": course.fresh_input,
        "check": check_double,
        "random": random.Random(0),
        "clock": course.clock,
        **changed,
    }
    return racing.race(contenders, **chosen)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_that_no_race_can_decide_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        _enter([Contender(name, lambda x: x) for name in NAMES], share=share)


def test_a_race_without_a_no_op_is_refused() -> None:
    with pytest.raises(
        ValueError, match="one each of baseline, reference, answer, no-op, not answer, baseline"
    ):
        _enter([Contender(name, lambda x: x) for name in NAMES[:3]])


def test_a_cpu_clock_for_some_only_is_refused() -> None:
    contenders = [Contender(name, lambda x: x, (lambda: 0.0) if name == "answer" else None) for name in NAMES]
    with pytest.raises(ValueError, match="either every contender has a CPU clock or none"):
        _enter(contenders)


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(ValueError, match="expected it to rise"):
        _enter([Contender(name, lambda x: x * 2) for name in NAMES])


def test_importing_it_loads_no_torch_and_nothing_of_the_harness() -> None:
    code = (
        "import sys, llmcourse.racing\n"
        "print([name for name in sys.modules if name == 'torch' or name.startswith('llmcourse.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['llmcourse.racing']"


# ---------------------------------------------------------------- one core, and the recorder


@pytest.fixture
def other_process() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps processes on a core")
def test_contenders_share_one_core_and_get_theirs_back(other_process: int) -> None:
    before = os.sched_getaffinity(0), os.sched_getaffinity(other_process)
    with racing.on_one_core([other_process], random=random.Random(0)) as core:
        assert os.sched_getaffinity(0) == os.sched_getaffinity(other_process) == {core}
    assert (os.sched_getaffinity(0), os.sched_getaffinity(other_process)) == before


def test_where_nothing_pins_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with racing.on_one_core([1], random=random.Random(0)) as core:
        assert core is None


def test_the_recorded_noise_names_its_machine_and_is_small() -> None:
    assert racing.NOISE_FILE.stat().st_size <= 100_000
    stored = json.loads(racing.NOISE_FILE.read_text())
    assert stored["command"] == "python -m llmcourse.racing record"
    assert {"machine", "recorded", "load average before"} <= set(stored)
    assert tuple(stored["microseconds"]) == CONDITIONS
    for noise in recorded().values():
        assert noise.shape[1] == len(NAMES) and len(noise) >= RULES.looks[-1]
        assert (noise > 0).all()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_equal_contenders_on_one_core_took_equal_time(condition: str) -> None:
    # Both did the same work. Whole laps of nine recordings lay between 0.92 and 1.005, all but one above 0.98, made
    # beside eight other processes; a contender that the scheduler prefers is ahead by half and more.
    logs = racing.work_logs(recorded()[condition])
    ratio = math.exp(racing.middle_mean(np.sort(logs[:, REFERENCE] - logs[:, ANSWER])))
    assert 0.9 < ratio < 1.1


def test_resampled_blocks_keep_neighbouring_rounds_together() -> None:
    noise = np.arange(400.0).reshape(100, 4)
    drawn = racing.resample(noise, races=5, rounds=70, generator=np.random.default_rng(0))
    assert drawn.shape == (5, 70, 4)
    steps = np.diff(drawn[..., 0], axis=1) % 400
    ends = (np.arange(1, 70) % racing.BLOCK) == 0
    assert (steps[:, ~ends] == 4).all()
    assert (steps[:, ends] != 4).any()


def test_the_recorder_times_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "WIDTH", 8)
    received: list[int] = []

    class End:
        def send_bytes(self, message: bytes) -> None:
            received.append(int.from_bytes(message[:8], "little"))
            assert len(message) == 8 + 4 * 8

        def recv_bytes(self) -> bytes:
            return b""

    laps = racing._record_laps(dict.fromkeys(NAMES, End()), 3)  # type: ignore[arg-type]
    assert {name: len(series) for name, series in laps.items()} == dict.fromkeys(NAMES, 3)
    assert Counter(received) == Counter({0: 8, 4096: 8, 1024: 16})


def test_a_recorded_contender_multiplies_the_rows_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "WIDTH", 8)
    ours, theirs = multiprocessing.Pipe()
    x = np.arange(8, dtype=np.float32).tobytes()
    for rows in (0, 2):
        ours.send_bytes(rows.to_bytes(8, "little") + x)
    ours.send_bytes(b"")
    racing._serve(theirs)
    assert ours.recv_bytes() == b"ready"
    assert ours.recv_bytes() == x
    assert len(ours.recv_bytes()) == 2 * 4


def test_the_command_line_records_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(path: Path, *, rounds: int) -> float:
        path.write_text("x" * rounds)
        return 3.0

    monkeypatch.setattr(racing, "record", stand_in)
    assert racing.main(["record", "--to", str(tmp_path / "noise.json"), "--rounds", "7"]) == 0
    assert "7 bytes; load average before: 3.00\nother work ran here" in capsys.readouterr().out
