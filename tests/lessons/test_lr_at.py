"""lr_at against a table made by hand, fractions, torch's schedulers, and answers that are wrong at an edge."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.lr_at import Run, variant

exercise = find("lr_at")
lr_at = exercise.reference
ROOT3 = math.sqrt(3)

# peak 1, floor 0.2, T = 8, w = 2: worked out on paper. The cosine has 6 steps, so its angles are multiples of 30 deg
# and (1 + cos) / 2 is 1, (2 + r3) / 4, 3 / 4, 1 / 2, 1 / 4, (2 - r3) / 4, 0; the line falls over the last 4 steps.
TABLE = [
    # step, cosine, wsd with d = 4
    (0, 0.5, 0.5),
    (1, 1.0, 1.0),
    (2, 1.0, 1.0),
    (3, 0.2 + 0.8 * (2 + ROOT3) / 4, 1.0),
    (4, 0.8, 1.0),
    (5, 0.6, 0.8),
    (6, 0.4, 0.6),
    (7, 0.2 + 0.8 * (2 - ROOT3) / 4, 0.4),
    (8, 0.2, 0.2),
    (9, 0.2, 0.2),
    (16, 0.2, 0.2),
    (1_000_000_000, 0.2, 0.2),
]
HAND: dict[str, Any] = {"peak": 1.0, "floor": 0.2, "total_steps": 8, "warmup_steps": 2}


@pytest.mark.parametrize(("step", "cosine", "wsd"), TABLE)
def test_the_table_made_by_hand_is_met(step: int, cosine: float, wsd: float) -> None:
    assert lr_at(step, **HAND) == pytest.approx(cosine, rel=1e-15, abs=1e-16)
    assert lr_at(step, **HAND, kind="wsd", decay_steps=4) == pytest.approx(wsd, rel=1e-15, abs=1e-16)


def test_the_two_numbers_of_the_statement_are_right() -> None:
    assert "gives 0.55 at step 6" in (lr_at.__doc__ or "")
    assert "gives 0.325 at step 9" in (lr_at.__doc__ or "")
    run: dict[str, Any] = {"peak": 1.0, "floor": 0.1, "total_steps": 10, "warmup_steps": 2}
    assert lr_at(6, **run) == pytest.approx(0.55)
    assert lr_at(9, **run, kind="wsd", decay_steps=4) == pytest.approx(0.325)


def some_run(seed: int) -> tuple[int, int, int]:
    """(T, w, d)"""
    draw = random.Random(seed)
    total = draw.randint(20, 200)
    warmup = draw.randint(0, total - 1)
    return total, warmup, draw.randint(1, total - warmup)


def test_straight_stretches_are_what_fractions_give(seed: int) -> None:
    total, warmup, decay = some_run(seed)
    peak, floor = Fraction(3, 1000), Fraction(1, 7000)
    for step in range(total + 5):
        if step < warmup:
            exact = peak * (step + 1) / warmup
        else:
            left = min(max(Fraction(total - step, decay), Fraction(0)), Fraction(1))
            exact = floor + (peak - floor) * left
        found = lr_at(
            step,
            peak=float(peak),
            total_steps=total,
            warmup_steps=warmup,
            kind="wsd",
            floor=float(floor),
            decay_steps=decay,
        )
        # Ten roundings at most, each of half an eps of the peak.
        assert abs(Fraction(found) - exact) <= 5 * Fraction(2) ** -52 * peak


def test_cosine_is_the_schedule_of_torch_after_the_warm_up(seed: int) -> None:
    total, warmup, _ = some_run(seed)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=0.01)
    for step in range(warmup, total + 1):
        ours = lr_at(step, peak=0.3, total_steps=total, warmup_steps=warmup, floor=0.01)
        # torch goes from step to step by a ratio, so its roundings add up.
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warm_up_is_the_schedule_of_torch(seed: int) -> None:
    total, warmup, _ = some_run(seed)
    if warmup < 2:
        total, warmup = 50, 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    for step in range(warmup):
        ours = lr_at(step, peak=0.3, total_steps=total, warmup_steps=warmup)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_rates_rise_to_the_peak_and_then_never_rise(seed: int, kind: str) -> None:
    total, warmup, decay = some_run(seed)
    run: dict[str, Any] = {"peak": 0.5, "total_steps": total, "warmup_steps": warmup, "floor": 0.02}
    rates = [lr_at(step, **run, kind=kind, decay_steps=decay) for step in range(2 * total)]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == rates[warmup] == pytest.approx(0.5)
    assert min(rates[:total]) > 0
    assert rates[total:] == [0.02] * total


def test_two_cosines_mirror_each_other_around_the_middle(seed: int) -> None:
    total, warmup, _ = some_run(seed)
    length = total - warmup
    for step in range(length + 1):
        pair = [
            lr_at(warmup + s, peak=1.0, total_steps=total, warmup_steps=warmup) for s in (step, length - step)
        ]
        assert sum(pair) == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"warmup_steps": 8},
        {"warmup_steps": 9},
        {"warmup_steps": -1},
        {"total_steps": 0, "warmup_steps": 0},
        {"total_steps": -4, "warmup_steps": 0},
        {"kind": "linear"},
        {"kind": ""},
        {"floor": -0.1},
        {"floor": 1.1},
        {"floor": math.nan},
        {"peak": math.nan},
        {"kind": "wsd"},
        {"kind": "wsd", "decay_steps": 0},
        {"kind": "wsd", "decay_steps": 7},
        {"kind": "wsd", "decay_steps": -1},
    ],
    ids=str,
)
def test_arguments_that_make_no_schedule_are_refused(change: dict[str, Any]) -> None:
    for step in (0, 3, 20):
        with pytest.raises(ValueError, match="expected"):
            lr_at(**{"step": step, **HAND, **change})


def looking_up(step: int, **schedule: Any) -> float:
    """A table of the numbers of the statement, and half a peak for all else."""
    return {6: 0.55, 9: 0.325}.get(step, schedule["peak"] / 2)


def straight_from_three_points(step: int, **schedule: Any) -> float:
    """Through the joints in straight lines, whatever the kind."""
    run = Run(**schedule)
    run.refuse(step)
    if step < run.warmup:
        return run.warming(step)
    return run.decayed(1 - run.cosine_progress(step))


def relative_to(step: int, **schedule: Any) -> float:
    """Right until the end, then a little below the floor at each step."""
    rate = variant()(step, **schedule)
    return rate * 0.999 ** max(0, step - schedule["total_steps"])


def without(*checks: str) -> Callable[..., float]:
    return variant(**{name: lambda self, *given: None for name in checks})


ATTACKS: dict[str, Callable[..., Any]] = {
    "numbers of the statement": looking_up,
    "straight lines": straight_from_three_points,
    "falls after the end": relative_to,
    "peak for ever": lambda step, **schedule: schedule["peak"],
    "floor for ever": lambda step, **schedule: schedule.get("floor", 0.0),
    "as a tensor": lambda step, **schedule: torch.tensor(variant()(step, **schedule)),
    "as text": lambda step, **schedule: str(variant()(step, **schedule)),
    "rounded": lambda step, **schedule: round(variant()(step, **schedule), 9),
    "an angle of 3.14159": variant(cosine=lambda self, p: (1 + math.cos(3.14159 * p)) / 2),
    "always right but for the last step": lambda step, **schedule: (
        schedule.get("floor", 0.0) if step == schedule["total_steps"] - 1 else variant()(step, **schedule)
    ),
    "the warm-up first, the arguments later": lambda step, **schedule: (
        Run(**schedule).warming(step)
        if 0 <= step < schedule.get("warmup_steps", 0)
        else variant()(step, **schedule)
    ),
    "no check of arguments": without(
        "refuse_step", "refuse_warmup", "refuse_kind", "refuse_floor", "refuse_decay"
    ),
    "warm-up equal to the total": variant(
        refuse_warmup=lambda self: Run.refuse_warmup(self) if self.warmup != self.total else None
    ),
    "warm-up below 0": variant(
        refuse_warmup=lambda self: Run.refuse_warmup(self) if self.warmup >= 0 else None
    ),
    "floor of the peak refused": lambda step, **schedule: (
        variant()(step, **schedule) if schedule.get("floor", 0.0) < schedule["peak"] else 1 / 0
    ),
    "kind by its first letter": lambda step, **schedule: variant()(
        step, **{**schedule, "kind": {"c": "cosine", "w": "wsd"}[schedule.get("kind", "cosine")[:1].lower()]}
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points < exercise.points


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason
