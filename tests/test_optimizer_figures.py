"""Figures of lesson 07: what they compute against closed forms, and what their titles and texts say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmcourse import optimizer_figures


@dataclass(frozen=True)
class Made:
    name: str
    losses: tuple[float, ...]
    held_out: float = 1.0


@dataclass(frozen=True)
class Seen:
    losses: Tensor
    target_variance: float = 1.0


def test_gradient_descent_follows_the_closed_form_on_both_ravines() -> None:
    for surface, tensor in {
        "along an axis": torch.diag(torch.tensor([25.0, 1.0], dtype=torch.float64)),
        "across both axes": torch.tensor([[13.0, -12.0], [-12.0, 13.0]], dtype=torch.float64),
    }.items():
        found = optimizer_figures.paths(surface=surface, rate=0.03, adam_rate=0.1, momentum=0.5, decay=0.2)
        contraction = torch.eye(2, dtype=torch.float64) - 0.03 * (
            tensor + 0.2 * torch.eye(2, dtype=torch.float64)
        )
        place = torch.tensor(optimizer_figures.START, dtype=torch.float64)
        for step in range(optimizer_figures.DESCENT_STEPS + 1):
            # Sixty products of a contraction: some eps of the largest value on the way.
            assert torch.allclose(found["SGD"].places[step], place, rtol=0, atol=1e-13)
            expected = (place @ tensor @ place / 2).item()
            assert math.isclose(found["SGD"].losses[step].item(), expected, rel_tol=1e-9, abs_tol=1e-15)
            place = contraction @ place


def test_momentum_of_zero_is_plain_descent_and_adams_first_step_is_the_rate() -> None:
    found = optimizer_figures.paths(
        surface="across both axes", rate=0.02, adam_rate=0.1, momentum=0.0, decay=0.0
    )
    assert torch.equal(found["SGD"].places, found["with momentum"].places)
    moved = found["AdamW"].places[1] - found["AdamW"].places[0]
    assert torch.allclose(moved.abs(), torch.full((2,), 0.1, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize(("rate", "diverges"), [(0.079, False), (0.081, True)])
def test_plain_descent_leaves_at_two_over_the_steepest_curvature(rate: float, diverges: bool) -> None:
    # 2 / 25 = 0.08; beyond it the steep coordinate grows by |1 - 25 rate| in each of 60 steps.
    found = optimizer_figures.paths(
        surface="along an axis", rate=rate, adam_rate=0.1, momentum=0.0, decay=0.0
    )["SGD"]
    assert (found.losses[-1] > found.losses[0]) == diverges


def test_an_unknown_surface_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="no surface is named 'bowl'; there are along an axis, across both axes"
    ):
        optimizer_figures.paths(surface="bowl", rate=0.1, adam_rate=0.1, momentum=0.0, decay=0.0)


def test_the_descent_says_where_each_path_ends() -> None:
    figure = optimizer_figures.descent(rate=0.2)
    assert figure is not None
    assert figure.alt_text.startswith("After 60 steps, SGD: diverged")
    assert "AdamW: loss" in figure.alt_text


def test_smoothing_is_the_mean_of_each_window() -> None:
    losses = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert optimizer_figures.smoothed(losses, 2) == [1.5, 3.0, 6.0, 12.0]
    assert optimizer_figures.smoothed(losses, 5) == [6.2]


def test_by_step_and_by_second_may_have_different_winners() -> None:
    slow = [Made("slow", tuple(4.0 - 0.03 * n for n in range(100)))] * 2
    fast = [Made("fast", tuple(4.0 - 0.02 * n for n in range(100)))] * 2
    by_step = optimizer_figures.loss_curves([*slow, *fast])
    by_second = optimizer_figures.loss_curves([*slow, *fast], step_seconds={"slow": 0.2, "fast": 0.1})
    assert by_step is not None and by_second is not None
    assert by_step.alt_text.startswith("After as many steps slow is ahead")
    assert by_second.alt_text.startswith("By the clock: fast is ahead after 10.0 seconds")


def test_the_small_networks_are_shown_beside_the_variance_of_their_targets() -> None:
    falling = torch.linspace(1.0, 0.1, 300, dtype=torch.float64).expand(2, -1)
    flat = torch.ones(2, 300, dtype=torch.float64)
    figure = optimizer_figures.learned({"flat": Seen(flat), "falling": Seen(falling)})
    assert figure is not None
    assert "Variance of the targets: 1. At the end: flat: 1.00; falling: 0.25." in figure.alt_text
    with pytest.raises(ValueError, match="at least 100 steps"):
        optimizer_figures.learned({"short": Seen(flat[:, :50])})


def test_memory_says_every_part_and_the_whole() -> None:
    plans = {"all": {"weights": 2e9, "moments": 8e9}, "less": {"weights": 2e9, "moments": 0.0}}
    figure = optimizer_figures.training_memory(plans, what="A model", memory_gb=8)
    assert figure is not None
    assert figure.alt_text.startswith("A model: 10.0 GB before a single activation")
    assert "all: weights 2.00 GB, moments 8.00 GB; less: weights 2.00 GB." in figure.alt_text


def test_a_stalled_weight_is_named_in_the_title() -> None:
    exact = [1.001, 1.002, 1.003]
    figure = optimizer_figures.stalls({"narrow": [1.0, 1.0, 1.0], "wide": exact}, exact=exact)
    assert figure is not None
    assert figure.alt_text.startswith("narrow: not one of 3 updates arrived")
    figure = optimizer_figures.stalls({"wide": exact}, exact=exact)
    assert figure is not None
    assert figure.alt_text.startswith("Every update arrived")


def test_rates_say_first_highest_and_last() -> None:
    figure = optimizer_figures.rates({"one": [0.5, 1.0, 0.1]}, title="A finding")
    assert figure is not None
    assert figure.alt_text == "A finding. one: first 0.5, highest 1, last 0.1."


@pytest.mark.parametrize(
    "draw",
    [
        lambda: optimizer_figures.loss_curves([]),
        lambda: optimizer_figures.stalls({}, exact=[1.0]),
        lambda: optimizer_figures.rates({}, title="nothing"),
        lambda: optimizer_figures.training_memory({}, what="nothing"),
        lambda: optimizer_figures.learned({}),
    ],
    ids=["curves", "stalls", "rates", "memory", "learned"],
)
def test_nothing_to_draw_is_refused(draw) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="expected"):
        draw()
