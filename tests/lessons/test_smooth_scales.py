"""smooth_scales against the paper's formula in float64, the network it must not change, and quantization after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcourse.exercise import find

smooth_scales = find("smooth_scales").reference
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


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_an_alpha_outside_of_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha .*; expected 0\.\.1"):
        smooth_scales(torch.ones(3), [torch.ones(2, 3)], torch.ones(3), alpha=alpha)


@pytest.mark.parametrize(
    ("norm_weight", "weights", "x_max", "message"),
    [
        (torch.ones(2), [torch.ones(2, 3)], torch.ones(3), "shapes"),
        (torch.ones(3), [torch.ones(2, 3), torch.ones(2, 1)], torch.ones(3), "shapes"),
        (torch.ones(3), [torch.ones(3)], torch.ones(3), "shapes"),
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
