"""smooth_scales against the paper's formula in float64, the network it must not change, and quantization after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.smooth_scales import Smoothing, variant

found = find("smooth_scales")
smooth_scales = found.reference
EPS = torch.finfo(torch.float32).eps


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def behind_a_norm(seed: int, channels: int, outputs: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Norm weight [K], weights [N, K], and hidden states [T, K] before the norm."""
    weights = [draw(seed + 1 + index, each, channels) for index, each in enumerate(outputs)]
    return 1 + draw(seed, channels) / 4, weights, draw(seed + 99, 50, channels)


def normed(x: Tensor, norm_weight: Tensor) -> Tensor:
    """RMSNorm in float64."""
    x = x.double()
    return x / x.square().mean(dim=-1, keepdim=True).sqrt() * norm_weight.double()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("outputs", [(7,), (16, 5, 5), (11, 11)])
def test_scales_are_those_of_the_paper_in_float64(seed: int, alpha: float, outputs: tuple[int, ...]) -> None:
    norm_weight, weights, x = behind_a_norm(seed, 11, outputs)
    x_max = normed(x, norm_weight).abs().amax(dim=0).float()
    new_norm, new_weights = smooth_scales(norm_weight, weights, x_max, alpha=alpha)
    for j in range(11):
        w_max = max(float(weight[:, j].abs().max()) for weight in weights)
        s = float(x_max[j]) ** alpha / w_max ** (1 - alpha)
        # Two powers of a few units in the last place, a quotient, and the product or quotient that folds.
        assert new_norm[j].item() == pytest.approx(float(norm_weight[j]) / s, rel=16 * EPS)
        for new, old in zip(new_weights, weights, strict=True):
            torch.testing.assert_close(new[:, j].double(), old[:, j].double() * s, rtol=16 * EPS, atol=0)


def test_the_layers_give_bit_for_bit_what_they_gave_where_the_scales_are_powers_of_two(seed: int) -> None:
    norm_weight, weights, x = behind_a_norm(seed, 16, (16, 6))
    exponents = torch.arange(16) % 4
    for weight in weights:
        weight[0] = 0
        weight.clamp_(-0.99, 0.99)
    weights[1][0] = 1  # the largest in every channel
    x_max = 4.0**exponents
    new_norm, new_weights = smooth_scales(norm_weight, weights, x_max, alpha=0.5)
    assert torch.equal(new_norm * 2.0**exponents, norm_weight)
    for new, old in zip(new_weights, weights, strict=True):
        assert torch.equal(normed(x, new_norm) @ new.double().T, normed(x, norm_weight) @ old.double().T)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_layers_give_what_they_gave_up_to_float32(seed: int, alpha: float) -> None:
    norm_weight, weights, x = behind_a_norm(seed, 24, (24, 8, 8))
    x[:, 3] *= 60
    before = normed(x, norm_weight)
    new_norm, new_weights = smooth_scales(norm_weight, weights, before.abs().amax(dim=0).float(), alpha=alpha)
    after = normed(x, new_norm)
    for new, old in zip(new_weights, weights, strict=True):
        # Folding rounds the norm's weight once and W once, half an eps each, whatever s is.
        room = 1.01 * EPS * (before.abs() @ old.double().abs().T)
        assert ((after @ new.double().T - before @ old.double().T).abs() <= room).all()


def test_with_alpha_a_half_activations_and_weights_get_equal_ranges(seed: int) -> None:
    # The reason the paper gives for a half: max|X_j| / s_j and max|W_j| s_j are both sqrt(max|X_j| max|W_j|).
    norm_weight, weights, x = behind_a_norm(seed, 12, (9, 5))
    x_max = normed(x, norm_weight).abs().amax(dim=0)
    new_norm, new_weights = smooth_scales(norm_weight, weights, x_max.float(), alpha=0.5)
    x_range = normed(x, new_norm).abs().amax(dim=0)
    w_range = torch.cat(new_weights).double().abs().amax(dim=0)
    torch.testing.assert_close(x_range, w_range, rtol=32 * EPS, atol=0)


def test_smoothing_lowers_the_error_of_int8_where_channels_are_loud(seed: int) -> None:
    # A constructed law of inputs: four of 64 channels 60 times as loud, weights white. int8 with one scale each.
    norm_weight, weights, x = behind_a_norm(seed, 64, (64,))
    norm_weight[:4] *= 60

    def error(norm_weight: Tensor, weight: Tensor) -> float:
        activations = normed(x, norm_weight)
        steps = activations.abs().max() / 127, weight.double().abs().max() / 127
        rounded = (activations / steps[0]).round() * steps[0], (weight.double() / steps[1]).round() * steps[1]
        return float((rounded[0] @ rounded[1].T - exact).square().mean())

    exact = normed(x, norm_weight) @ weights[0].double().T
    x_max = normed(x, norm_weight).abs().amax(dim=0).float()
    new_norm, new_weights = smooth_scales(norm_weight, weights, x_max, alpha=0.5)
    assert error(new_norm, new_weights[0]) < error(norm_weight, weights[0]) / 2


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_channel_without_activations_or_readers_stays_as_it_is(alpha: float) -> None:
    norm_weight, weights, _ = behind_a_norm(0, 6, (5, 4))
    x_max = torch.arange(6.0)
    for weight in weights:
        weight[:, 5] = 0
    new_norm, new_weights = smooth_scales(norm_weight, weights, x_max, alpha=alpha)
    for channel in (0, 5):
        assert new_norm[channel] == norm_weight[channel]
        for new, old in zip(new_weights, weights, strict=True):
            assert torch.equal(new[:, channel], old[:, channel])
    assert new_norm.isfinite().all()


def test_nothing_given_is_changed_and_all_that_is_returned_is_float32() -> None:
    norm_weight, weights, _ = behind_a_norm(0, 6, (5, 4))
    narrow = norm_weight.bfloat16(), [weight.bfloat16() for weight in weights], torch.ones(6)
    kept = narrow[0].clone(), [weight.clone() for weight in narrow[1]]
    new_norm, new_weights = smooth_scales(*narrow, alpha=0.3)
    assert {part.dtype for part in (new_norm, *new_weights)} == {torch.float32}
    assert torch.equal(narrow[0], kept[0])
    assert all(torch.equal(a, b) for a, b in zip(narrow[1], kept[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_of_any_float_dtype_give_float32_without_gradients(dtype: torch.dtype) -> None:
    norm_weight, weights, _ = behind_a_norm(0, 6, (5, 4))
    parameters = nn.Parameter(norm_weight.to(dtype)), [nn.Parameter(weight.to(dtype)) for weight in weights]
    new_norm, new_weights = smooth_scales(*parameters, torch.ones(6, dtype=dtype), alpha=0.3)
    for part in (new_norm, *new_weights):
        assert part.dtype == torch.float32 and not part.requires_grad


@pytest.mark.parametrize("x_exponent", [-100, -40, 0, 40, 100])
@pytest.mark.parametrize("w_exponent", [-100, -40, 0, 40, 100])
def test_scales_move_with_powers_of_two_without_a_floor_or_a_limit(
    seed: int, x_exponent: int, w_exponent: int
) -> None:
    norm_weight, weights, x = behind_a_norm(seed, 11, (7, 5))
    x_max = x.abs().amax(dim=0)
    near_norm, near_weights = smooth_scales(norm_weight, weights, x_max, alpha=0.5)
    far_weights = [weight * 2.0**w_exponent for weight in weights]
    new_norm, new_weights = smooth_scales(norm_weight, far_weights, x_max * 2.0**x_exponent, alpha=0.5)
    # Square roots of even powers of two are exact; pow itself may err by a few units in the last place.
    close = {"rtol": 16 * EPS, "atol": 0.0}
    torch.testing.assert_close(new_norm * 2.0 ** ((x_exponent - w_exponent) // 2), near_norm, **close)
    for new, near in zip(new_weights, near_weights, strict=True):
        torch.testing.assert_close(new * 2.0 ** (-(x_exponent + w_exponent) // 2), near, **close)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_an_alpha_outside_of_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha .*; expected 0\.\.1"):
        smooth_scales(torch.ones(3), [torch.ones(2, 3)], torch.ones(3), alpha=alpha)


@pytest.mark.parametrize(
    ("norm_weight", "weights", "x_max", "message"),
    [
        (torch.ones(2), [torch.ones(2, 3)], torch.ones(3), "shapes"),
        (torch.ones(()), [torch.ones(2, 3)], torch.ones(()), "shapes"),
        (torch.ones(3), [torch.ones(2, 3), torch.ones(2, 1)], torch.ones(3), "with outputs"),
        (torch.ones(3), [torch.ones(3)], torch.ones(3), "with outputs"),
        (torch.ones(3), [torch.ones(()), torch.ones(2, 3)], torch.ones(3), "with outputs"),
        (torch.ones(3), [torch.ones(2, 3), torch.ones(1, 2, 3)], torch.ones(3), "with outputs"),
        (torch.ones(3, 1), [torch.ones(2, 3)], torch.ones(3), "shapes"),
        (torch.ones(0), [torch.ones(2, 0)], torch.ones(0), "shapes"),
        (torch.ones(3), [], torch.ones(3), "at least one"),
        (torch.ones(3), [torch.ones(0, 3)], torch.ones(3), "with outputs"),
        (torch.tensor([1, torch.nan, 1]), [torch.ones(2, 3)], torch.ones(3), "calibrate again"),
        (torch.ones(3), [torch.ones(2, 3), torch.full((1, 3), torch.inf)], torch.ones(3), "calibrate again"),
        (torch.ones(3), [torch.ones(2, 3)], torch.tensor([1, 1, torch.inf]), "calibrate again"),
        (torch.ones(3), [torch.ones(2, 3)], torch.tensor([1.0, 1, -1]), "calibrate again"),
    ],
)
def test_what_does_not_fit_or_is_broken_is_refused(
    norm_weight: Tensor, weights: list[Tensor], x_max: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        smooth_scales(norm_weight, weights, x_max, alpha=0.5)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def bounded(quantity: str, **limits: float) -> Callable[..., Any]:
    """Right, but that x_max, w_max or s is clamped."""

    def divided(self: Any, x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
        held = {"x_max": x_max, "w_max": w_max}
        if quantity in held:
            held[quantity] = held[quantity].clamp(**limits)
        scales = held["x_max"] ** alpha / held["w_max"] ** (1 - alpha)
        return scales.clamp(**limits) if quantity == "s" else scales

    return variant(divided=divided)


@pytest.mark.parametrize("quantity", ["x_max", "w_max", "s"])
@pytest.mark.parametrize(
    "limits",
    [{"min": floor} for floor in (1e-2, 1e-5, 1e-8, 1e-12, 1e-30)]
    + [{"max": limit} for limit in (1e2, 1e3, 1e5, 1e12, 1e30)],
)
def test_a_floor_or_a_limit_on_a_range_or_on_s_is_not_right(
    quantity: str, limits: dict[str, float], seed: int
) -> None:
    assert points_of(bounded(quantity, **limits), seed) < found.points


@pytest.mark.parametrize("quantity", ["x_max", "w_max"])
@pytest.mark.parametrize("threshold", [1e-2, 1e-5, 1e-8, 1e-12, 1e-30])
def test_a_quiet_channel_taken_for_a_dead_one_is_not_right(
    quantity: str, threshold: float, seed: int
) -> None:
    def guarded(self: Any, scales: Tensor, x_max: Tensor, w_max: Tensor) -> Tensor:
        dead = {"x_max": x_max, "w_max": w_max}[quantity] < threshold
        return torch.where((x_max == 0) | (w_max == 0) | dead, 1.0, scales)

    assert points_of(variant(guarded=guarded), seed) < found.points


@pytest.mark.parametrize("floor", [1e-2, 1e-5, 1e-8])
def test_a_floor_relative_to_the_loudest_channel_is_not_right(floor: float, seed: int) -> None:
    def divided(self: Any, x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
        return x_max**alpha / torch.maximum(w_max, floor * w_max.amax()) ** (1 - alpha)

    assert points_of(variant(divided=divided), seed) < found.points


BY_VALUE = {
    "NaN only": lambda part: bool(part.isnan().any()),
    "Inf only": lambda part: bool(part.isinf().any()),
    "+Inf only": lambda part: bool((part.isnan() | (part == math.inf)).any()),
    "-Inf only": lambda part: bool((part.isnan() | (part == -math.inf)).any()),
    "the sum": lambda part: not bool(part.sum().isfinite()),
    "the first value": lambda part: not bool(part.flatten()[0].isfinite()),
    "all but the last value": lambda part: not bool(part.flatten()[:-1].isfinite().all()),
    "the ends": lambda part: not bool(part.flatten()[[0, -1]].isfinite().all()),
    "all of them": lambda part: not bool(part.isfinite().any()),
}


@pytest.mark.parametrize("kind", BY_VALUE)
def test_a_narrower_look_for_broken_values_is_not_right(kind: str, seed: int) -> None:
    def refuse_values(self: Any, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        if any(BY_VALUE[kind](part.detach()) for part in (norm_weight, x_max, *weights)) or (x_max < 0).any():
            raise ValueError("broken")

    assert points_of(variant(refuse_values=refuse_values), seed) < found.points


@pytest.mark.parametrize("step", ["shapes", "values"])
@pytest.mark.parametrize("spared", range(5))
def test_one_argument_that_is_not_looked_at_is_not_right(step: str, spared: int, seed: int) -> None:
    def looked_at(norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> list[Tensor]:
        parts = [norm_weight, x_max, *weights]
        return parts[:spared] + parts[spared + 1 :]

    def refuse_shapes(self: Any, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        if not weights or any(part.numel() == 0 for part in looked_at(norm_weight, weights, x_max)):
            raise ValueError("empty")
        vectors = [part for index, part in enumerate((norm_weight, x_max)) if index != spared]
        matrices = [part for index, part in enumerate(weights, start=2) if index != spared]
        channels = vectors[0].numel()
        if any(part.shape != (channels,) for part in vectors) or any(
            part.dim() != 2 or part.shape[1] != channels for part in matrices
        ):
            raise ValueError("shapes")

    def refuse_values(self: Any, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        if any(not part.isfinite().all() for part in looked_at(norm_weight, weights, x_max)):
            raise ValueError("broken")
        if (x_max < 0).any():
            raise ValueError("negative")

    steps = {"shapes": {"refuse_shapes": refuse_shapes}, "values": {"refuse_values": refuse_values}}
    assert points_of(variant(**steps[step]), seed) < found.points


@pytest.mark.parametrize("let_through", [0, 1, 3, 4])
def test_weights_of_other_dimensions_let_through_are_not_right(let_through: int, seed: int) -> None:
    def refuse_shapes(self: Any, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        if (
            norm_weight.dim() != 1
            or norm_weight.shape != x_max.shape
            or not norm_weight.numel()
            or not weights
        ):
            raise ValueError("vectors")
        for part in weights:
            channels = part.shape[-1:] if part.dim() else norm_weight.shape
            if part.dim() not in (2, let_through) or channels != x_max.shape or not part.numel():
                raise ValueError("weights")

    def of_each(self: Any, weight: Tensor) -> Tensor:
        return (
            weight.abs().expand(1, -1).amax(dim=0)
            if weight.dim() < 2
            else weight.abs().flatten(0, -2).amax(dim=0)
        )

    assert points_of(variant(refuse_shapes=refuse_shapes, of_each=of_each), seed) < found.points


def test_a_slightly_negative_alpha_let_through_is_not_right(seed: int) -> None:
    def refuse_alpha(self: Any, alpha: float) -> None:
        if not -0.05 <= alpha <= 1:
            raise ValueError("alpha")

    assert points_of(variant(refuse_alpha=refuse_alpha), seed) < found.points


@pytest.mark.parametrize("alpha", [-1e-9, 1 + 1e-9])
def test_an_alpha_just_outside_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        found.reference(torch.ones(2), [torch.ones(3, 2)], torch.ones(2), alpha=alpha)


def test_two_small_ranges_are_not_taken_for_zeros() -> None:
    tiny = torch.full((1,), 1e-25)
    norm, _ = found.reference(torch.ones(1), [tiny[None]], tiny, alpha=0.3)
    assert norm.item() == pytest.approx(1e-10, rel=1e-4)


@pytest.mark.parametrize("smallest, largest", [(1e-36, torch.inf), (0.0, 1e36)])
def test_a_bound_of_s_is_not_right(smallest: float, largest: float, seed: int) -> None:
    def guarded(self: Any, scales: Tensor, x_max: Tensor, w_max: Tensor) -> Tensor:
        return Smoothing.guarded(self, scales.clamp(smallest, largest), x_max, w_max)

    assert points_of(variant(guarded=guarded), seed) < found.points


def test_weights_from_the_fourth_on_left_alone_are_not_right(seed: int) -> None:
    def folded(
        self: Any, norm_weight: Tensor, weights: list[Tensor], scales: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return norm_weight / scales, [
            part * scales if place < 3 else part.clone() for place, part in enumerate(weights)
        ]

    assert points_of(variant(folded=folded), seed) < found.points


def test_small_negative_maxima_let_through_are_not_right(seed: int) -> None:
    def refuse_values(self: Any, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        if (
            any(not part.isfinite().all() for part in (norm_weight, x_max, *weights))
            or (x_max < -1e-12).any()
        ):
            raise ValueError("broken")

    assert points_of(variant(refuse_values=refuse_values), seed) < found.points


def test_a_right_answer_in_small_steps_earns_all_points(seed: int) -> None:
    assert points_of(variant(), seed) == found.points


def points_of(answer: Callable[..., Any], seed: int) -> float:
    """What an answer earns without a race."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points
