"""fp8_round against torch's cast over all of bfloat16, the 256 patterns decoded by hand, and float64."""

from __future__ import annotations

import bisect
import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from llmcourse.exercise import find

fp8_round = find("fp8_round").reference


def decoded(pattern: int) -> float:
    """What a byte means in OCP's E4M3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    sign = -1.0 if pattern & 0x80 else 1.0
    exponent, mantissa = pattern >> 3 & 15, pattern & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


NUMBERS = [decoded(pattern) for pattern in range(127)]


def by_bisection(x: float) -> float:
    """The nearest of the numbers that are not negative, in exact arithmetic of float64; of two, the even pattern."""
    magnitude = min(abs(x), 448.0)
    above = bisect.bisect_left(NUMBERS, magnitude)
    near = [place for place in (above - 1, above) if 0 <= place < 127]
    place = min(near, key=lambda place: (abs(NUMBERS[place] - magnitude), place % 2))
    return math.copysign(NUMBERS[place], x)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal bits, all NaN counting as one."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(found[known].view(torch.int32), expected[known].view(torch.int32))


def every_bfloat16() -> Tensor:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    return patterns.view(torch.bfloat16).float()


def test_it_is_bit_exact_with_torch_over_all_of_bfloat16() -> None:
    x = every_bfloat16()
    assert len(x) == 1 << 16
    if torch.tensor(1e9).to(torch.float8_e4m3fn).isnan():
        # Older versions of torch overflow to NaN; what lies within the range is compared with them all the same.
        x = x[x.abs() <= 448]
    assert_same_bits(fp8_round(x), x.to(torch.float8_e4m3fn).float())


def test_the_table_is_that_of_torch() -> None:
    table = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert_same_bits(table, torch.tensor([decoded(pattern) for pattern in range(256)]))


def test_every_number_of_the_format_stays_as_it_is() -> None:
    table = torch.tensor([decoded(pattern) for pattern in range(256)])
    assert_same_bits(fp8_round(table), table)


def test_every_middle_and_its_neighbours_round_as_in_exact_arithmetic(seed: int) -> None:
    middles = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(NUMBERS)])
    ends = [torch.full_like(middles, end) for end in (0.0, math.inf)]
    near = torch.cat([middles, *(torch.nextafter(middles, end) for end in ends)])
    draw = random.Random(seed)
    others = torch.tensor([draw.choice((-1, 1)) * 2 ** draw.uniform(-14, 12) for _ in range(2000)])
    x = torch.cat([near, -near, others])
    assert_same_bits(fp8_round(x), torch.tensor([by_bisection(value) for value in x.tolist()]))


def test_rounding_a_value_twice_differs_from_rounding_it_once() -> None:
    # 1.0625 lies half way between 1 and 1.125; what is 2^-20 above it ends on 1.125, unless bfloat16 comes between.
    x = torch.tensor([1.0625 + 2**-20])
    assert fp8_round(x).item() == 1.125
    assert fp8_round(x.bfloat16().float()).item() == 1.0


@pytest.mark.parametrize("value", [448.0, 464.0, 480.0, 1e30, math.inf])
def test_what_lies_beyond_the_largest_number_saturates(value: float) -> None:
    assert fp8_round(torch.tensor([value, -value])).tolist() == [448.0, -448.0]


def test_relative_error_is_at_most_a_sixteenth_and_below_two_to_minus_six_absolute(seed: int) -> None:
    # Numbers of one exponent e are 2^(e - 3) apart: half of that over at least 2^e is 1/16. Subnormals are 2^-9 apart.
    draw = random.Random(seed)
    x = torch.tensor([2 ** draw.uniform(-16, 8.8) for _ in range(5000)]).clamp(max=448.0)
    error = (fp8_round(x) - x).abs()
    assert bool((error <= torch.where(x < 2**-6, 2.0**-10, x / 16)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        fp8_round(torch.ones(3, dtype=dtype))


def test_the_argument_stays_as_it_was_whatever_its_strides() -> None:
    x = torch.tensor([[1e9, -0.0, 0.3], [math.nan, 3.3, -7.7]]).T
    before = x.clone()
    found = fp8_round(x)
    assert_same_bits(x, before)
    assert_same_bits(found, x.to(torch.float8_e4m3fn).float().where(x != 1e9, 448.0))
