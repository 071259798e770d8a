"""stochastic_round against exact fractions: neighbours, frequencies, independence, and answers that look alike."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.optimizers import stochastic_round as lesson

exercise = find("stochastic_round")
stochastic_round = exercise.reference
LARGEST = Fraction(torch.finfo(torch.bfloat16).max)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(x: float) -> tuple[Fraction, Fraction]:
    """The numbers of bfloat16 at or below and at or above x: multiples of a power of two, by its definition."""
    exponent = max(math.frexp(x)[1] - 8, -133) if x else -133  # 8 bits of significand; the subnormals' step
    step = Fraction(2) ** exponent
    return math.floor(Fraction(x) / step) * step, math.ceil(Fraction(x) / step) * step


def within(count: int, draws: int, p: Fraction) -> bool:
    """Hoeffding: a right answer's count is further off with a probability below 1e-9."""
    return abs(count - draws * float(p)) <= math.sqrt(draws * math.log(2e9) / 2)


@pytest.mark.parametrize(
    "x",
    [1.001, -1.001, 1.0039, 0.99999, -2.0000002, 3.14159, -1e-30, 1e30, 1e-38, -3e-40, 1e-45, 5e-42, 3.38e38],
)
def test_each_neighbour_is_as_frequent_as_the_way_to_the_other_is_long(x: float, seed: int) -> None:
    value = torch.tensor(x)
    low, high = neighbours(value.item())
    found = stochastic_round(value.expand(20_000), generator(seed)).double()
    assert found.dtype == torch.float64
    up, down = int((found == float(high)).sum()), int((found == float(low)).sum())
    assert up + down == 20_000
    assert within(up, 20_000, (Fraction(value.item()) - low) / (high - low))


def test_the_mean_of_many_different_values_is_kept(seed: int) -> None:
    x = torch.rand(200_000, generator=generator(seed)) + 1
    found = stochastic_round(x, generator(seed + 1)).double()
    # Errors are independent, within one step of 2^-7 and of mean 0. Hoeffding at 1e-9.
    room = 2**-7 * math.sqrt(200_000 * math.log(2e9) / 2)
    assert abs((found - x.double()).sum().item()) <= room
    cut = (x.view(torch.int32) & -65536).view(torch.float32).double()
    assert abs((cut - x.double()).sum().item()) > 10 * room


def test_every_number_of_bfloat16_stays_bit_by_bit(seed: int) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    found = stochastic_round(every.float(), generator(seed))
    nan = every.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int16), every[~nan].view(torch.int16))


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_largest_number_is_that_number_and_never_infinity(sign: int, seed: int) -> None:
    high = torch.linspace(3.3896e38, 3.4028e38, 3000) * sign
    assert bool((stochastic_round(high, generator(seed)).double() == sign * float(LARGEST)).all())
    infinite = torch.tensor([sign * math.inf]).expand(3000)
    assert bool((stochastic_round(infinite, generator(seed)).float() == infinite).all())


def test_draws_come_from_the_generator_alone(seed: int) -> None:
    x = torch.randn(50, 7, generator=generator(seed))
    one = generator(seed)
    first, second = stochastic_round(x, one), stochastic_round(x, one)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    again = stochastic_round(x, generator(seed))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_neighbours_rows_and_calls_are_independent(seed: int) -> None:
    x = torch.full((300, 300), 1 + 2**-8)  # half way
    one = generator(seed)
    up = [(stochastic_round(x, one) > 1).double() * 2 - 1 for _ in range(2)]
    for left, right in (
        (up[0][:, 1:], up[0][:, :-1]),
        (up[0][1:], up[0][:-1]),
        (up[0], up[1]),
        (up[0][:, 150:], up[0][:, :150]),
        (up[0], up[0].T.triu(1)),
    ):
        products = (left * right).flatten()
        # Products of independent signs are independent signs but for the overlaps, which are pairwise uncorrelated:
        # the sum's spread is the root of their number, and 7 of these are enough.
        assert abs(products.sum().item()) <= 7 * math.sqrt(len(products))


def test_a_weight_of_bfloat16_walks_as_far_as_one_of_float32(seed: int) -> None:
    weights = torch.ones(400, dtype=torch.bfloat16)
    one = generator(seed)
    for _ in range(200):
        weights = stochastic_round(weights.float() + 0.001, one)
    # 200 steps of 0.001 each on average, of variance at most 2^-7 * 0.001 each; mean of 400 walks, 7 spreads of it.
    assert weights.double().mean().item() == pytest.approx(1.2, abs=7 * math.sqrt(200 * 2**-7 * 0.001 / 400))
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(200):
        nearest += 0.001
    assert nearest.item() == 1.0


def test_shapes_strides_and_grad(seed: int) -> None:
    wide = torch.randn(6, 10, generator=generator(seed), requires_grad=True)
    for x in (wide, wide.T, wide[1:, ::3], wide[0, 0], wide[:0], wide[None, :, None]):
        found = stochastic_round(x, generator(seed))
        assert (found.shape, found.dtype, found.requires_grad) == (x.shape, torch.bfloat16, False)
        assert bool(((found.float() - x).abs() <= x.abs() * 2**-7).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        stochastic_round(torch.ones(3).to(dtype), generator(0))


def test_the_law_s_judge_lets_right_answers_pass(seed: int) -> None:
    """Stated at 1e-6 a case: 40 draws of each case do not fail."""
    runner = judging.InProcess()
    for index in range(3):
        expected = judging.expectations(runner, exercise, seed + index)
        for answer in [a.function for a in exercise.alternatives.values()]:
            verdict = judging.judge(runner, exercise, answer, seed + index, expected, naming=False)
            assert verdict.points == exercise.points, verdict.reason


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def without_fixed_column(x: Tensor, one: torch.Generator) -> Tensor:
    """Draws for all but the first value, which is rounded to nearest."""
    y = lesson.written(x, one)
    if x.dim() and x.numel():
        y.view(-1)[0] = x.reshape(-1)[0].bfloat16()
        y[..., 0] = x[..., 0].bfloat16()
    return y


def antithetic(x: Tensor, one: torch.Generator) -> Tensor:
    """Every second value gets the noise of the one before, mirrored."""

    def noise(x: Tensor, one: torch.Generator) -> Tensor:
        half = lesson.noise_for(x.new_empty((x.numel() + 1) // 2), one)
        return torch.stack([half, 65535 - half], dim=1).flatten()[: x.numel()].view(x.shape)

    return lesson.written(x, one, noise=noise)


def antithetic_rows(x: Tensor, one: torch.Generator) -> Tensor:
    def noise(x: Tensor, one: torch.Generator) -> Tensor:
        drawn = lesson.noise_for(x, one)
        if x.dim() == 2:
            rows = x.shape[0] // 2 * 2
            drawn[1:rows:2] = 65535 - drawn[0:rows:2]
        return drawn

    return lesson.written(x, one, noise=noise)


def ten_bits(x: Tensor, one: torch.Generator) -> Tensor:
    return lesson.written(x, one, noise=lambda x, one: lesson.noise_for(x, one) & 0xFE00)


def hashed(x: Tensor, one: torch.Generator) -> Tensor:
    """Noise from the value's own bits: looks random over many values, and each value always goes the same way."""
    bits = x.contiguous().view(torch.int32).long()
    return lesson.written(x, one, noise=lambda x, one: ((bits * 40503 >> 7) & 0xFFFF).int())


def float16_way(x: Tensor, one: torch.Generator) -> Tensor:
    """Right for float16's range only."""
    small = x.detach().abs() < 2**-14
    return torch.where(small, x.detach().bfloat16(), lesson.written(x, one))


def normal_only(x: Tensor, one: torch.Generator) -> Tensor:
    """Rounds subnormals to nearest."""
    small = x.detach().abs() < 2**-126
    return torch.where(small, x.detach().bfloat16(), lesson.written(x, one))


def contiguous_only(x: Tensor, one: torch.Generator) -> Tensor:
    """Reads a view's memory as it lies."""
    return lesson.written(x.detach().as_strided(x.shape, torch.empty(x.shape).stride()), one)


ATTACKS = {
    "a value without chance": without_fixed_column,
    "mirrored pairs": antithetic,
    "mirrored rows": antithetic_rows,
    "seven bits": ten_bits,
    "noise from the bits": hashed,
    "small values to nearest": float16_way,
    "subnormals to nearest": normal_only,
    "memory as it lies": contiguous_only,
    "a result that is cast alone": lambda x, one: x.bfloat16(),
    "zeros": lambda x, one: torch.zeros_like(x, dtype=torch.bfloat16),
    "x": lambda x, one: x,
}


def points_of(answer: Any, seed: int) -> float:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    return judging.judge(runner, exercise, answer, seed, expected, naming=False).points


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_somewhere_earns_nothing(name: str, seed: int) -> None:
    assert points_of(ATTACKS[name], seed) == 0


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(lesson.written, seed) == exercise.points
