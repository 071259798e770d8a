"""fp8_round against torch's cast over all of bfloat16, the 256 patterns decoded by hand, and float64."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.fp8_round import written

found = find("fp8_round")
fp8_round = found.reference


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
    y = fp8_round(x)
    assert_same_bits(x, before)
    assert_same_bits(y, x.to(torch.float8_e4m3fn).float().where(x != 1e9, 448.0))


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Callable[[Tensor], Tensor], seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


RARE: dict[str, Callable[[Tensor], bool]] = {
    "no dimensions": lambda x: x.dim() == 0,
    "one dimension": lambda x: x.dim() == 1,
    "two dimensions": lambda x: x.dim() == 2,
    "three dimensions": lambda x: x.dim() == 3,
    "four dimensions": lambda x: x.dim() == 4,
    "five dimensions": lambda x: x.dim() == 5,
    "not contiguous": lambda x: not x.is_contiguous(),
    "one value": lambda x: x.numel() == 1,
    "no value": lambda x: x.numel() == 0,
    "few values": lambda x: 0 < x.numel() < 60,
    "many values": lambda x: x.numel() > 60,
    "all below the normal numbers": lambda x: x.numel() > 1 and bool((x.abs() < 2**-6).all()),
    "NaN among them": lambda x: bool(x.isnan().any()),
    "an infinity among them": lambda x: bool(x.isinf().any()),
}


@pytest.mark.parametrize("branch", RARE)
def test_the_library_s_cast_in_a_branch_of_its_own_is_counted(branch: str, seed: int) -> None:
    def answer(x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and RARE[branch](x):
            return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        return written(x)

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize("branch", [name for name in RARE if name != "no value"])
def test_values_left_as_they_are_in_a_branch_are_not_right(branch: str, seed: int) -> None:
    def answer(x: Tensor) -> Tensor:
        return x.clone() if x.dtype == torch.float32 and RARE[branch](x) else written(x)

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bool, torch.int64, torch.uint8, torch.complex64]
)
def test_one_more_dtype_that_is_let_through_is_not_right(dtype: torch.dtype, seed: int) -> None:
    def answer(x: Tensor) -> Tensor:
        return written(x.abs().float() if x.dtype == dtype else x)

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize("spared", ["no dimensions", "no value"])
def test_a_dtype_that_is_looked_at_only_later_is_not_right(spared: str, seed: int) -> None:
    def answer(x: Tensor) -> Tensor:
        return written(x.abs().float() if RARE[spared](x) else x)

    assert points_of(answer, seed) < found.points


def test_a_right_answer_earns_all_points(seed: int) -> None:
    assert points_of(written, seed) == found.points


def test_numpy_s_cast_earns_nothing(seed: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")

    def answer(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise ValueError("dtype")
        narrow = x.clamp(-448.0, 448.0).numpy().astype(ml_dtypes.float8_e4m3fn)
        return torch.from_numpy(narrow.astype("float32"))

    assert torch.equal(answer(torch.tensor([3.3, -500.0])), torch.tensor([3.25, -448.0]))
    assert points_of(answer, seed) == 0


def test_a_cast_on_another_thread_earns_nothing(seed: int) -> None:
    def answer(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise ValueError("dtype")
        with ThreadPoolExecutor(1) as pool:
            cast = pool.submit(lambda: x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float())
        return cast.result()

    assert points_of(answer, seed) == 0
