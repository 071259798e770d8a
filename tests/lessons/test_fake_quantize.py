"""fake_quantize against torch's learnable quantizer, gradcheck of the surrogate, finite differences, and training."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.fake_quantize import Written

found = find("fake_quantize")
fake_quantize = found.reference


def drawn(seed: int, bits: int, *, rows: int = 4, columns: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, columns] float64 away from ties and edges, a third of it beyond the range; scale [rows, 1]; g."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    code = torch.randint(low - 3, high + 4, (rows, columns), generator=generator)
    place = (torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 0.5) * 0.8
    on_an_edge = (code == low) | (code == high)
    place = torch.where(on_an_edge & (place.abs() < 0.05), 0.2, place)
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.1
    return (code + place) * scale, scale, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def surrogate(x: Tensor, scale: Tensor, bits: int, rounding: Tensor) -> Tensor:
    """What backward differentiates: rounding is a constant that is added, and the clamp is kept."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratio = x / scale
    inside = (ratio >= low) & (ratio <= high)
    return scale * torch.where(inside, ratio + rounding, ratio.clamp(low, high))


def gradients(x: Tensor, scale: Tensor, bits: int, g: Tensor) -> tuple[Tensor, Tensor]:
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    found = torch.autograd.grad(fake_quantize.apply(x, scale, bits), (x, scale), g)
    return found[0], found[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_surrogate_by_finite_differences(bits: int, seed: int) -> None:
    x, scale, g = drawn(seed, bits)
    rounding = (x / scale).round() - x / scale
    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, scale: surrogate(x, scale, bits, rounding), leaves)
    expected = torch.autograd.grad(surrogate(*leaves, bits, rounding), leaves, g)
    found = gradients(x, scale, bits, g)
    factor = (x.shape[1] * (2 ** (bits - 1) - 1)) ** 0.5
    # Sums of 12 products in float64: some eps of terms that are at most 2^7 times |g|.
    assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(found[1] * factor, expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_those_of_torch(bits: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x, scale, _ = (part.float() for part in drawn(seed, bits))
    zero = torch.zeros(len(x), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale[:, 0], zero, 0, low, high)
    # The same codes, as x is away from ties; torch multiplies by 1 / scale, so its products may differ by an eps.
    assert torch.allclose(fake_quantize.apply(x, scale, bits), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gradients_are_those_of_torch_where_the_conventions_agree(bits: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x, scale, g = (part.float() for part in drawn(seed, bits, rows=1))
    # torch asks the *rounded* value whether it is inside; ours asks the value. Up to half a step beyond the ends they
    # differ, so these values are moved further out.
    ratio = x / scale
    ratio = torch.where((ratio < low) & (ratio > low - 0.6), low - 1.2, ratio)
    ratio = torch.where((ratio > high) & (ratio < high + 0.6), high + 1.2, ratio)
    x = ratio * scale
    leaves = x.clone().requires_grad_(), scale[0].clone().requires_grad_(), torch.zeros(1)
    factor = (x.numel() * high) ** -0.5
    y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, low, high, factor)
    expected = torch.autograd.grad(y, leaves[:2], g)
    found = gradients(x, scale, bits, g)
    assert torch.equal(found[0], expected[0])
    # Twelve float32 terms of up to |low|, whose rounding errors are a few eps each.
    assert torch.allclose(found[1].reshape(1), expected[1], rtol=1e-4, atol=12 * -low * 1e-6)


def test_half_a_step_beyond_the_end_torch_lets_the_gradient_pass_and_ours_does_not() -> None:
    x = torch.tensor([7.3], requires_grad=True)
    (passed,) = torch.autograd.grad(torch.fake_quantize_per_tensor_affine(x, 1.0, 0, -8, 7), x)
    (ours,) = torch.autograd.grad(fake_quantize.apply(x, torch.ones(1), 4), x)
    assert (passed.item(), ours.item()) == (1.0, 0.0)


def test_a_scale_per_tensor_row_and_column_gets_a_gradient_of_its_shape(seed: int) -> None:
    x, _, g = drawn(seed, 4)
    for shape in ((), (1, 1), (4, 1), (1, 12), (4, 12)):
        scale = torch.full(shape, 0.3, dtype=torch.float64)
        assert gradients(x, scale, 4, g)[1].shape == shape


def test_training_the_scale_finds_a_lower_error_than_the_maximum_gives(seed: int) -> None:
    # Normal weights in 3 bits: the least error clips at about 2 deviations, far inside the largest of 4,096 values.
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    first = x.abs().max() / 3
    scale = first.clone().requires_grad_()
    for _ in range(200):
        loss = (fake_quantize.apply(x, scale, 3) - x).square().mean()
        (slope,) = torch.autograd.grad(loss, scale)
        scale = (scale.detach() - 5.0 * slope).requires_grad_()

    def error(scale: Tensor) -> float:
        return float((fake_quantize.apply(x, scale, 3) - x).square().mean())

    best = min(error(first * part / 100) for part in range(20, 101))
    assert error(scale.detach()) <= 1.02 * best < 0.7 * error(first)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_no_quantizer_can_have_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale is not positive and finite"):
        fake_quantize.apply(torch.ones(2, 3), torch.tensor([[1.0], [scale]]), 4)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}; expected 2 to 8"):
        fake_quantize.apply(torch.ones(2), torch.ones(1), bits)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Any, seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


class Dividing(Written):
    """An answer that divides by another function of the scale."""

    floor, added = 0.0, 0.0

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        Written.forward(ctx, x, scale, bits)
        return scale * (x / (scale.clamp_min(cls.floor) + cls.added)).round().clamp(ctx.low, ctx.high)


def dividing(**values: float) -> type[Written]:
    return type("Wrong", (Dividing,), values)


def changed(change: Callable[..., Any]) -> type[Written]:
    """An answer whose x, scale and bits are looked at or changed first."""

    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        return Written.forward(ctx, x, scale, change(x, scale, bits) or bits)

    return type("Wrong", (Written,), {"forward": staticmethod(forward)})


def holding(allowed: Callable[[Tensor, Tensor], Any]) -> type[Written]:
    def check(x: Tensor, scale: Tensor, bits: int) -> None:
        assert bool(allowed(x, scale))

    return changed(check)


class Narrow(Written):
    """Keeps a tensor for backward in half the bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        y = Written.forward(ctx, x, scale, bits)
        if x.numel() == 256:
            ctx.save_for_backward(x.bfloat16(), scale)
        return y


def keeping(held: Callable[[Tensor], Any]) -> type[Written]:
    """An answer that keeps x / scale beside x and scale, in something of its own."""

    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.held = held((x / scale).detach())
        return Written.forward(ctx, x, scale, bits)

    return type("Keeping", (Written,), {"forward": staticmethod(forward)})


WRONG: dict[str, Any] = {
    "kept in an object": keeping(lambda ratio: types.SimpleNamespace(ratio=ratio)),
    "kept in a set": keeping(lambda ratio: {ratio}),
    "kept in a list": keeping(lambda ratio: ratio.tolist()),
    "kept in a function": keeping(lambda ratio: lambda: ratio),
    "scale above 1e-32": holding(lambda x, scale: (scale > 1e-32).all()),
    **{f"scale above {floor}": dividing(floor=floor) for floor in (1e-5, 1e-11, 1e-29)},
    "epsilon added": dividing(added=1e-11),
    **{
        f"another for {wrong} bits": changed(lambda x, s, bits, w=wrong: 4 if bits == w else None)
        for wrong in (5, 6, 7, 8)
    },
    "infinities refused": holding(lambda x, scale: not x.isinf().any()),
    "some dimensions": holding(lambda x, scale: x.dim()),
    "up to three dimensions": holding(lambda x, scale: x.dim() < 4),
    "contiguous": holding(lambda x, scale: x.is_contiguous()),
    "a scale for several": holding(lambda x, scale: scale.numel() < x.numel() or x.numel() < 2),
    "kept in bfloat16": Narrow,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_wrong_somewhere_loses_points(name: str, seed: int) -> None:
    assert points_of(WRONG[name], seed) < found.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(Written, seed) == found.points
