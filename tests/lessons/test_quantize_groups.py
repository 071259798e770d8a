"""quantize_groups against a loop in exact fractions, against torch's own rounding, and against known bits a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llmcourse import exercise, judging
from llmcourse.lessons.quantization import quantize_groups as lesson
from llmcourse.lessons.quantization.quantize_groups import quantize_groups

Answer = Callable[..., tuple[Tensor, Tensor]]


def by_fractions(
    weight: Tensor, bits: int, group_size: int
) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """(weight over scale, scale) of every value and every group, exactly; scale 1 for a group of zeros."""
    top = 2 ** (bits - 1) - 1
    steps: list[list[Fraction]] = []
    scales: list[list[Fraction]] = []
    for row in weight.tolist():
        steps.append([])
        scales.append([])
        for start in range(0, len(row), group_size):
            part = [Fraction(value) for value in row[start : start + group_size]]
            scale = max(abs(value) for value in part) / top or Fraction(1)
            scales[-1].append(scale)
            steps[-1] += [value / scale for value in part]
    return steps, scales


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(3, 12, 4), (5, 11, 4), (4, 6, 9), (2, 7, 1), (1, 1, 3)]
)
def test_codes_and_scales_are_those_of_exact_arithmetic(
    bits: int, rows: int, columns: int, group_size: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, : group_size // 2] = 0
    codes, scales = quantize_groups(weight, bits=bits, group_size=group_size)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert codes.shape == (rows, columns) and scales.shape == (rows, -(-columns // group_size))
    steps, exact = by_fractions(weight, bits, group_size)
    for row in range(rows):
        for group, scale in enumerate(exact[row]):
            assert float(scales[row, group]) == pytest.approx(float(scale), rel=2**-23)
        for column, step in enumerate(steps[row]):
            # Scale and quotient are rounded once each, by 2**-24 of themselves; codes are below 2**7.
            assert abs(int(codes[row, column]) - step) <= Fraction(1, 2) + Fraction(2) ** (7 - 23)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_weight_is_further_than_half_a_step_from_its_code_and_no_code_is_beyond_the_top(
    bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 40, generator=generator) * torch.rand(40, generator=generator) ** 4
    weight[:, 7] *= 100
    codes, scales = quantize_groups(weight, bits=bits, group_size=16)
    top = 2 ** (bits - 1) - 1
    assert int(codes.min()) >= -top and int(codes.max()) <= top
    each = scales.double().repeat_interleave(16, 1)[:, :40]
    # As above, in units of the scale.
    assert bool(((codes * each - weight).abs() <= each * (0.5 + 2.0 ** (7 - 23))).all())
    # Every group has a weight at its top code, or it would waste codes.
    longest = torch.nn.functional.pad(codes.abs(), (0, 8)).reshape(16, 3, 16).amax(2)
    assert bool((longest == top).all())


def test_a_group_for_each_row_gives_the_values_of_torch_s_fake_quantization(seed: int) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_groups(weight, bits=8, group_size=8)
    zeros = torch.zeros(6, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, scales[:, 0], zeros, 0, -127, 127)
    apart = (theirs / scales).round().int() - codes
    # Theirs multiplies by the inverse: a quotient next to a half may fall on the other side.
    near_a_half = ((weight / scales).frac().abs() - 0.5).abs() < 1e-4
    assert bool(((apart == 0) | ((apart.abs() == 1) & near_a_half)).all())


def test_a_view_gives_what_its_copy_gives(seed: int) -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
    for view in (weight.T, weight[::2, 1::3], weight[:1].expand(3, -1), weight.flip(1)):
        found = quantize_groups(view, bits=4, group_size=4)
        expected = quantize_groups(view.clone(memory_format=torch.contiguous_format), bits=4, group_size=4)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("group_size", "bits_per_weight"), [(128, 4.125), (64, 4.25), (32, 4.5)])
def test_float16_scales_would_add_sixteen_bits_a_group(group_size: int, bits_per_weight: float) -> None:
    codes, scales = quantize_groups(torch.ones(8, 256), bits=4, group_size=group_size)
    assert (4 * codes.numel() + 16 * scales.numel()) / codes.numel() == bits_per_weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_those_of_the_same_values_in_float32(dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(9, 21, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = quantize_groups(weight, bits=8, group_size=8)
    expected = quantize_groups(weight.float(), bits=8, group_size=8)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_groups_of_zeros_and_below_the_smallest_normal_scale_get_scale_1() -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = 7 * 2.0**-126
    weight[2, 2] = -6 * 2.0**-126
    codes, scales = quantize_groups(weight, bits=4, group_size=4)
    assert scales.flatten().tolist() == [1.0, 2.0**-126, 1.0]
    assert codes.tolist() == [[0] * 4, [0, 0, 7, 0], [0] * 4]


@pytest.mark.parametrize(
    ("weight", "bits", "group_size", "said"),
    [
        (torch.ones(2, 4), 1, 4, "bits is 1"),
        (torch.ones(2, 4), 9, 4, "bits is 9"),
        (torch.ones(2, 4), 4, 0, "group_size is 0"),
        (torch.ones(2, 4), 4, -4, "group_size is -4"),
        (torch.ones(4), 4, 4, r"shape \[4\]"),
        (torch.ones(2, 3, 4), 4, 4, r"shape \[2, 3, 4\]"),
        (torch.ones(0, 4), 4, 4, r"shape \[0, 4\]"),
        (torch.ones(2, 0), 4, 4, r"shape \[2, 0\]"),
        (torch.tensor([[1.0, math.nan]]), 4, 2, "NaN or infinities"),
        (torch.tensor([[1.0, -math.inf]]), 4, 2, "NaN or infinities"),
    ],
)
def test_bad_input_is_refused_with_what_came(weight: Tensor, bits: int, group_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quantize_groups(weight, bits=bits, group_size=group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_parameter_gives_what_its_values_give_and_nothing_that_requires_grad(
    dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = quantize_groups(torch.nn.Parameter(weight), bits=4, group_size=4)
    expected = quantize_groups(weight, bits=4, group_size=4)
    assert not any(part.requires_grad for part in found)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_of_a_dtype_are_finite_weights(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    codes, scales = quantize_groups(torch.tensor([[largest, -largest]], dtype=dtype), bits=2, group_size=2)
    assert codes.tolist() == [[1, -1]] and scales.tolist() == [[largest]]


def holding(finite: Callable[[Tensor], object]) -> Answer:
    """The small steps with another look at NaN and infinities."""

    def check_values(self: object, weight: Tensor) -> None:
        if not finite(weight):
            raise ValueError("not finite")

    return lesson.variant(check_values=check_values)


def floored(usable: Callable[[Tensor], Tensor]) -> Answer:
    """The small steps with another scale for small groups."""
    return lesson.variant(usable=lambda self, scales: usable(scales))


def divided_in(narrow: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """Scales in float32, and codes from (weight, scale of each) in something narrower."""

    def answer(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
        codes, scales = lesson.variant()(weight, bits=bits, group_size=group_size)
        each = scales.repeat_interleave(min(group_size, weight.shape[1]), 1)[:, : weight.shape[1]]
        return narrow(weight.detach(), each).round().clamp(-127, 127).to(torch.int8), scales

    return answer


def without(lost: Callable[[Tensor], bool]) -> Answer:
    """Zeros for the weights that are of this kind."""

    def answer(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
        codes, scales = lesson.variant()(weight, bits=bits, group_size=group_size)
        return (codes * 0, scales) if lost(weight) else (codes, scales)

    return answer


def through(dtype: torch.dtype, of: torch.dtype) -> Answer:
    """Weights of one dtype rounded to another."""
    return lesson.variant(
        wide=lambda self, weight: (weight.to(dtype) if weight.dtype is of else weight).detach().float()
    )


WRONG: dict[str, Answer] = {
    "codes in the weight's dtype": divided_in(lambda weight, each: weight / each.to(weight.dtype)),
    "quotients in the weight's dtype": divided_in(lambda weight, each: (weight / each).to(weight.dtype)),
    "quotients to a tenth first": divided_in(lambda weight, each: (weight / each * 10).round() / 10),
    "quotients to a hundredth first": divided_in(lambda weight, each: (weight / each * 100).round() / 100),
    "float16 through bfloat16": through(torch.bfloat16, torch.float16),
    "bfloat16 through float16": through(torch.float16, torch.bfloat16),
    "float32 through bfloat16": through(torch.bfloat16, torch.float32),
    "sum in float32": holding(lambda weight: weight.float().sum().isfinite()),
    "mean": holding(lambda weight: weight.mean().isfinite()),
    "sum of squares": holding(lambda weight: weight.float().square().sum().isfinite()),
    "norm": holding(lambda weight: weight.norm().isfinite()),
    "range": holding(lambda weight: (weight.max() - weight.min()).isfinite()),
    "an infinite sum": holding(lambda weight: not weight.isnan().any() and not weight.sum().isinf()),
    "the largest number refused": holding(
        lambda weight: (weight.abs() < torch.finfo(weight.dtype).max).all()
    ),
    "a limit": holding(lambda weight: (weight.float().abs() < 1e30).all()),
    "in float16": holding(lambda weight: weight.half().isfinite().all()),
    "not below": holding(lambda weight: not weight.isnan().any() and weight.max() < math.inf),
    "not above": holding(lambda weight: not weight.isnan().any() and weight.min() > -math.inf),
    "not in the first": holding(lambda weight: weight.flatten()[1:].isfinite().all()),
    "not in the last": holding(lambda weight: weight.flatten()[:-1].isfinite().all()),
    "the ends only": holding(lambda weight: weight.flatten()[[0, -1]].isfinite().all()),
    "all scales at least 1e-12": floored(lambda scales: scales.clamp_min(1e-12)),
    "all scales at least 1e-30": floored(lambda scales: scales.clamp_min(1e-30)),
    "all scales at least 2**-126": floored(lambda scales: scales.clamp_min(2**-126)),
    "1 for 2**-126": floored(lambda scales: torch.where(scales <= 2**-126, 1.0, scales)),
    "1 for large scales": floored(
        lambda scales: torch.where((scales < 2**-126) | (scales > 1e4), 1.0, scales)
    ),
    "one column": without(lambda weight: weight.shape[1] == 1),
    "one row": without(lambda weight: weight.shape[0] == 1),
    "a parameter": without(lambda weight: weight.requires_grad),
}


@pytest.mark.parametrize("name", WRONG)
def test_answers_that_are_wrong_at_an_end_do_not_earn_all_points(name: str, seed: int) -> None:
    found, runner = exercise.of(quantize_groups), judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    assert judging.judge(runner, found, WRONG[name], seed, expected, naming=False).points < found.points


def codes_of(quantized: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """Codes as another function gives them, from groups as rows and their scales."""

    def limited(self: lesson.Grouping, steps: Tensor, bits: int) -> Tensor:
        rows = steps.flatten(0, 1)
        return quantized(rows, torch.ones(len(rows))).view(steps.shape)

    return lesson.variant(limited=limited, rounded=lambda self, steps: steps)


LIBRARY: dict[str, Answer] = {
    "quantize_per_channel": codes_of(
        lambda rows, ones: torch.quantize_per_channel(rows, ones, ones.long() * 0, 0, torch.qint8).int_repr()
    ),
    "fake_quantize": codes_of(
        lambda rows, ones: torch.fake_quantize_per_channel_affine(rows, ones, ones.int() * 0, 0, -128, 127)
    ),
    "fake_quantize of aten": codes_of(
        lambda rows, ones: torch.ops.aten.fake_quantize_per_channel_affine_cachemask(
            rows, ones, ones.int() * 0, 0, -128, 127
        )[0]
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", LIBRARY)
def test_what_the_library_quantizes_earns_nothing(name: str, seed: int) -> None:
    found, runner = exercise.of(quantize_groups), judging.InProcess()
    weight = torch.tensor([[1.0, -2.5, 3.0]])
    assert torch.equal(
        LIBRARY[name](weight, bits=3, group_size=3)[0], quantize_groups(weight, bits=3, group_size=3)[0]
    )
    expected = judging.expectations(runner, found, seed)
    assert judging.judge(runner, found, LIBRARY[name], seed, expected, naming=False).points == 0
