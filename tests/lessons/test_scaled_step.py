"""scaled_step against torch's GradScaler on the CPU, a table made by hand, and answers that are wrong at an edge."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import Counted
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.scaled_step import Scaled, variant

exercise = find("scaled_step")
scaled_step = exercise.reference
SHAPES = ((3, 4), (5,), (2, 1, 3))


def training(seed: int, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[list[Tensor], Any]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    return parameters, kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}], lr=0.1)  # type: ignore[call-arg]


def give(
    parameters: list[Tensor], generator: torch.Generator, scale: float, bad: float | None = None
) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    if bad is not None:
        last = parameters[-1].grad
        assert last is not None
        last.view(-1)[2] = bad


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scale_and_parameters_follow_gradscaler(
    seed: int, kind: type[torch.optim.Optimizer], max_norm: float | None
) -> None:
    draw = random.Random(seed)
    ours, optimizer = training(seed, kind)
    theirs, other = training(seed, kind)
    state: dict[str, Any] = {"scale": 1024.0, "good_steps": 0}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.ones(()))  # makes its tensors
    generator, same = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for _ in range(30):
        bad = draw.choice([None, None, None, math.inf, math.nan, -math.inf])
        give(ours, generator, state["scale"], bad)
        give(theirs, same, scaler.get_scale(), bad)
        stepped = scaled_step(optimizer, state, max_norm=max_norm, growth_interval=3)
        assert stepped == (bad is None)
        scaler.unscale_(other)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        scaler.step(other)
        scaler.update()
        assert state["scale"] == scaler.get_scale()
        assert state["good_steps"] == scaler.state_dict()["_growth_tracker"]
        for p, q in zip(ours, theirs, strict=True):
            # torch adds 1e-6 to a norm of about 5; each of up to 30 steps may add an error of that size.
            torch.testing.assert_close(p, q, rtol=1e-4 if max_norm else 1e-5, atol=1e-5 if max_norm else 1e-6)


def test_defaults_are_those_of_gradscaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2.0, 0.5)
    assert scaler.get_growth_interval() == 2000
    assert "65536.0" in (scaled_step.__doc__ or "")
    assert scaler.get_scale() == 65536.0


# (good?, scale after, good steps after) with an interval of 3 from 1024, worked out on paper.
TABLE = [
    (True, 1024.0, 1),
    (True, 1024.0, 2),
    (True, 2048.0, 0),
    (True, 2048.0, 1),
    (True, 2048.0, 2),
    (False, 1024.0, 0),
    (True, 1024.0, 1),
    (False, 512.0, 0),
    (False, 256.0, 0),
    (True, 256.0, 1),
    (True, 256.0, 2),
    (True, 512.0, 0),
]


def test_the_table_made_by_hand_is_met(seed: int) -> None:
    parameters, optimizer = training(seed)
    state: dict[str, Any] = {"scale": 1024.0, "good_steps": 0, "name": "kept"}
    generator = torch.Generator().manual_seed(seed)
    for good, scale, steps in TABLE:
        give(parameters, generator, state["scale"], None if good else math.inf)
        assert scaled_step(optimizer, state, growth_interval=3) is good
        assert state == {"scale": scale, "good_steps": steps, "name": "kept"}
        assert type(state["scale"]) is float


def test_a_skipped_step_leaves_no_trace_but_in_the_state(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters, optimizer = training(seed)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    state: dict[str, Any] = {"scale": 4096.0, "good_steps": 7}
    give(parameters, generator, 4096.0)
    assert scaled_step(optimizer, state, scheduler=scheduler)
    before = [p.detach().clone() for p in parameters]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    give(parameters, generator, 4096.0, math.nan)
    assert not scaled_step(optimizer, state, scheduler=scheduler)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    for p, old in zip(parameters, moments, strict=True):
        assert all(torch.equal(optimizer.state[p][key], old[key]) for key in old)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert scheduler.last_epoch == 1


def test_the_schedule_moves_after_the_step(seed: int) -> None:
    parameters, optimizer = training(seed, torch.optim.SGD)
    before = parameters[0].detach().clone()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    give(parameters, torch.Generator().manual_seed(seed), 8.0)
    assert parameters[0].grad is not None
    true = parameters[0].grad.clone() / 8
    assert scaled_step(optimizer, {"scale": 8.0, "good_steps": 0}, scheduler=scheduler)
    torch.testing.assert_close(parameters[0].detach(), before - 0.1 * true)
    torch.testing.assert_close(parameters[0].grad, true)
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_real_overflow_of_float16_is_met_by_smaller_scales() -> None:
    """y = 300 x in float16, with a gradient of 1 / 64: scaled by 2^16 it is 307,200, above 65,504."""
    weight = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    state: dict[str, Any] = {"scale": 65536.0, "good_steps": 0}
    taken = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (weight.half() * 300) / 64
        (loss * state["scale"]).backward()
        taken.append(scaled_step(optimizer, state))
    # 2^16 and 2^15 and 2^14 give 307,200, 153,600 and 76,800; 2^13 gives 38,400.
    assert taken == [False, False, False, True, True]
    assert state == {"scale": 8192.0, "good_steps": 2}
    assert weight.item() == pytest.approx(1 - 2 * 300 / 64)


def test_finite_gradients_near_the_end_of_float32_are_used() -> None:
    weight = torch.zeros(4, requires_grad=True)
    weight.grad = torch.full((4,), 3e38)
    assert scaled_step(torch.optim.SGD([weight], lr=1.0), {"scale": 2.0**120, "good_steps": 0})
    torch.testing.assert_close(weight.detach(), torch.full((4,), -3e38 / 2.0**120))


@pytest.mark.parametrize("bad", [None, math.inf])
@pytest.mark.parametrize(
    ("scale", "interval"),
    [(0.0, 5), (-1.0, 5), (math.inf, 5), (math.nan, 5), (8.0, 0), (8.0, -1)],
)
def test_a_scale_or_interval_that_is_none_is_refused(
    seed: int, scale: float, interval: int, bad: float | None
) -> None:
    parameters, optimizer = training(seed)
    give(parameters, torch.Generator().manual_seed(seed), 8.0, bad)
    state: dict[str, Any] = {"scale": scale, "good_steps": 3}
    with pytest.raises(ValueError, match="expected above 0"):
        scaled_step(optimizer, state, growth_interval=interval)
    assert state["good_steps"] == 3
    assert not optimizer.state


@pytest.mark.parametrize("bad", [None, math.inf])
@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_is_none_is_refused_before_anything_changes(
    seed: int, bound: float, bad: float | None
) -> None:
    parameters, optimizer = training(seed)
    give(parameters, torch.Generator().manual_seed(seed), 8.0, bad)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    state: dict[str, Any] = {"scale": 8.0, "good_steps": 3}
    with pytest.raises(ValueError, match="expected a number above 0"):
        scaled_step(optimizer, state, max_norm=bound)
    assert state == {"scale": 8.0, "good_steps": 3}
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))  # type: ignore[arg-type]


def test_a_counter_above_the_interval_lets_the_scale_grow(seed: int) -> None:
    parameters, optimizer = training(seed)
    give(parameters, torch.Generator().manual_seed(seed), 8.0)
    state: dict[str, Any] = {"scale": 8.0, "good_steps": 9}
    assert scaled_step(optimizer, state, growth_interval=4)
    assert state == {"scale": 16.0, "good_steps": 0}


def test_no_gradient_at_all_is_refused(seed: int) -> None:
    _, optimizer = training(seed)
    scheduler = Counted(lambda: None)
    state: dict[str, Any] = {"scale": 8.0, "good_steps": 3}
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        scaled_step(optimizer, state, scheduler=scheduler)
    assert state == {"scale": 8.0, "good_steps": 3}


def preparing(change: Callable[[Tensor], Any]) -> Callable[..., bool]:
    """Changes every true gradient before the step."""

    def prepare(self: Scaled, parameters: list[Tensor], scale: float, max_norm: float | None) -> None:
        Scaled.prepare(self, parameters, scale, max_norm)
        for p in parameters:
            change(p.grad)  # type: ignore[arg-type]

    return variant(prepare=prepare)


def looking(is_broken: Callable[[Tensor], Any]) -> Callable[..., bool]:
    return variant(is_broken=lambda self, gradient: bool(is_broken(gradient)))


def keeping(key: str) -> Callable[..., bool]:
    """Right, but one entry of the state is put back."""

    def step(optimizer: Any, state: dict[str, Any], **options: Any) -> bool:
        before = state[key]
        stepped = variant()(optimizer, state, **options)
        state[key] = before
        return stepped

    return step


ATTACKS: dict[str, Callable[..., Any]] = {
    "does nothing, says True": lambda optimizer, state, **options: True,
    "plain step": lambda optimizer, state, **options: optimizer.step() or True,
    "signs": preparing(lambda g: g.sign_()),
    "zeros": preparing(lambda g: g.zero_()),
    "a last unscaling in bfloat16": preparing(lambda g: g.copy_(g.bfloat16())),
    "scale never changes": keeping("scale"),
    "counter never changes": keeping("good_steps"),
    "looks at the first element": looking(lambda g: not g.view(-1)[0].isfinite()),
    "looks at the largest element": looking(lambda g: not g.max().isfinite()),
    "looks at the mean": looking(lambda g: not g.mean().isfinite()),
    "looks at doubled values": looking(lambda g: not (g * 2).isfinite().all()),
    "looks for values from 1e30 on": looking(lambda g: not (g.abs() < 1e30).all()),
    "returns None": lambda *given, **options: variant()(*given, **options) and None,
    "returns 1": lambda *given, **options: int(variant()(*given, **options)),
    "scale from a table": variant(lower=lambda self, state: state.update(scale=32768.0, good_steps=0)),
    "schedule of one step": variant(
        skipped=lambda self, optimizer, scheduler, parameters: [
            group.update(lr=group["lr"] * 0.999) for group in optimizer.param_groups
        ]
    ),
    "an optimizer's own t": variant(
        skipped=lambda self, optimizer, scheduler, parameters: [
            entry["step"].add_(1) for entry in optimizer.state.values() if "step" in entry
        ]
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason
