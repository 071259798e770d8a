"""Blockwise8bitState against a search over the whole table in float64, its error bounds, its bytes, and Adam itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import reachable_bytes
from llmcourse.exercise import Rng, find
from llmcourse.lessons.optimizers import Blockwise8bitState as lesson
from llmcourse.lessons.optimizers.Blockwise8bitState import LinearSecondMoment, Written

exercise = find("Blockwise8bitState")
Blockwise8bitState = exercise.reference
EPS = torch.finfo(torch.float32).eps


def entries(signed: bool) -> list[float]:
    """The table as the statement has it, by Python's floats."""
    if not signed:
        return [0.0] + [10 ** (-7 * (255 - k) / 254) for k in range(1, 256)]
    positive = [10 ** (-7 * (127 - k) / 126) for k in range(1, 128)]
    return [-value for value in reversed(positive)] + [0.0] + positive


def normal(seed: int, *shape: int) -> Tensor:
    """Normal values over many decades."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** (2 * torch.randn(shape, generator=generator))


def given(seed: int, signed: bool, *shape: int) -> Tensor:
    values = normal(seed, *shape)
    return values if signed else values.square()


def through(values: Tensor, signed: bool, block: int = 256) -> Tensor:
    return Blockwise8bitState(values, signed=signed, block_size=block).read()


def test_the_table_has_a_byte_of_entries_from_1e7_to_1() -> None:
    assert [len(entries(signed)) for signed in (True, False)] == [255, 256]
    for signed in (True, False):
        table = entries(signed)
        assert table == sorted(table) and table[-1] == 1.0 and 0.0 in table
        assert min(abs(value) for value in table if value) == pytest.approx(1e-7)
        assert lesson.table(signed).tolist() == pytest.approx(table, rel=1e-12)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(("shape", "block"), [((7, 9), 8), ((70,), 32), ((2, 3, 11), 7), ((1,), 4), ((), 3)])
def test_every_value_is_the_nearest_of_all_entries(
    shape: tuple[int, ...], block: int, signed: bool, seed: int
) -> None:
    values = given(seed, signed, *shape)
    table = torch.tensor(entries(signed), dtype=torch.float64)
    read = through(values, signed, block)
    assert (read.shape, read.dtype) == (values.shape, torch.float32)
    flat, found = values.reshape(-1).double(), read.reshape(-1).double()
    for start in range(0, len(flat), block):
        run, scale = flat[start : start + block], flat[start : start + block].abs().max()
        distance = (run[:, None] - table * scale).abs()
        if not signed:
            distance[run > 0, 0] = math.inf
        # The entries in float32 and two roundings: some eps of the value and of what it became.
        room = 20 * EPS * (run.abs() + found[start : start + block].abs())
        chosen = (run - found[start : start + block]).abs()
        assert bool((chosen <= distance.amin(dim=1) + room).all())
        nearest_entry = (found[start : start + block, None] - table * scale).abs().amin(dim=1)
        assert bool((nearest_entry <= room).all())


@pytest.mark.parametrize(("signed", "steps"), [(True, 126), (False, 254)], ids=["signed", "unsigned"])
def test_the_relative_error_is_bounded_over_seven_decades(signed: bool, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-7 * torch.rand(4000, generator=generator))
    values[::200] = 1.0
    ratio = 10 ** (7 / steps)
    bound = (ratio - 1) / (ratio + 1)  # at the middle of two entries, over itself
    error = (through(values, signed, 200) / values - 1).abs()
    assert error.max().item() <= bound + 1e-5
    assert error.max().item() > 0.9 * bound
    assert round(100 * bound, 1) == (6.4 if signed else 3.2)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_largest_of_a_block_and_zeros_are_exact(signed: bool, seed: int) -> None:
    values = given(seed, signed, 40, 10)
    values[values.abs() < 0.01] = 0
    read = through(values, signed, 16)
    assert bool((read[values == 0] == 0).all())
    flat, found = values.flatten(), read.flatten()
    for run, got in zip(flat.split(16), found.split(16), strict=True):
        place = run.abs().argmax()
        assert got[place] == run[place]


def test_a_second_moment_above_zero_stays_above_zero() -> None:
    values = torch.tensor([1.0, 1e-7, 1e-9, 1e-20, 1e-38, 0.0])
    read = through(values, signed=False)
    assert read.tolist() == pytest.approx([1.0, 1e-7, 1e-7, 1e-7, 1e-7, 0.0], rel=1e-5)
    assert through(torch.tensor([1e20, 1e-38]), signed=False)[1] > 0
    first = through(torch.tensor([1.0, 0.49e-7, -0.49e-7, 0.51e-7]), signed=True)
    assert first.tolist() == pytest.approx([1.0, 0.0, 0.0, 1e-7], rel=1e-5)


@pytest.mark.parametrize(("block", "share"), [(256, 0.2539), (64, 0.2656), (32, 0.28125), (2048, 0.2505)])
def test_bytes_are_a_byte_a_value_and_four_a_block(block: int, share: float) -> None:
    values = torch.ones(64, 2048)
    state = Blockwise8bitState(values, signed=False, block_size=block)
    assert state.nbytes / values.nbytes == pytest.approx(share, abs=5e-5)
    assert Fraction(state.nbytes, values.nbytes) == (1 + Fraction(4, block)) / 4
    assert state.nbytes <= reachable_bytes(state) <= state.nbytes + 4096
    assert (share <= 0.27) == (block != 32)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_a_short_last_block_takes_its_own_bytes_only(count: int) -> None:
    state = Blockwise8bitState(torch.ones(count), signed=True, block_size=32)
    assert state.nbytes == count + 4 * math.ceil(count / 32)
    assert torch.equal(state.read(), torch.ones(count))


def test_blocks_do_not_know_each_other(seed: int) -> None:
    values = given(seed, True, 6, 50)
    together = through(values, True, 20)
    alone = torch.cat([through(run, True) for run in values.flatten().split(20)])
    assert torch.equal(together.flatten(), alone)
    louder = values.clone()
    louder.view(-1)[:20] *= 1024
    assert torch.equal(through(louder, True, 20).flatten()[20:], alone[20:])
    assert torch.equal(through(louder, True, 20).flatten()[:20], alone[:20] * 1024)


def test_what_is_read_is_stored_again_without_change(seed: int) -> None:
    for signed in (True, False):
        once = through(given(seed, signed, 9, 30), signed, 25)
        assert torch.equal(through(once, signed, 25), once)


def test_strides_do_not_matter_and_grad_is_not_kept(seed: int) -> None:
    values = given(seed, True, 5, 12)
    expected = through(values, True, 8)
    assert torch.equal(through(values.T.contiguous().T, True, 8), expected)
    assert torch.equal(through(torch.stack([values, values], dim=-1)[..., 0], True, 8), expected)
    state = Blockwise8bitState(torch.nn.Parameter(values), signed=True, block_size=8)
    assert not state.read().requires_grad
    values.zero_()
    state.read().zero_()
    assert torch.equal(state.read(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-20])
def test_what_no_entry_stands_for_is_refused_and_changes_nothing(bad: float) -> None:
    state = Blockwise8bitState(torch.ones(3, 4), signed=False)
    broken = torch.full((3, 4), 2.0)
    broken[1, 2] = bad
    with pytest.raises(ValueError, match="NaN, infinity, or one below 0"):
        state.write(broken)
    assert torch.equal(state.read(), torch.ones(3, 4))


def test_other_shapes_and_block_sizes_are_refused() -> None:
    state = Blockwise8bitState(torch.ones(3, 4), signed=True)
    for other in (torch.ones(12), torch.ones(4, 3), torch.ones(1, 4), torch.ones(())):
        with pytest.raises(ValueError, match=r"expected \[3, 4\]"):
            state.write(other)
    with pytest.raises(ValueError, match="expected 1 or more"):
        Blockwise8bitState(torch.ones(3), signed=True, block_size=0)


def adam(state: Callable[..., Any], seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """(parameters with both moments in this state, the same with both in float32), on noisy quadratics."""
    generator = torch.Generator().manual_seed(seed)
    curvature = 10 ** (-3 * torch.rand(300, generator=generator))
    start = torch.randn(300, generator=generator)
    noise = torch.randn(steps, 300, generator=generator)
    results = []
    for make in (state, None):
        p, m, v = start.clone(), torch.zeros(300), torch.zeros(300)
        states = (
            [make(torch.zeros(300), signed=signed, block_size=64) for signed in (True, False)] if make else []
        )
        for t in range(1, steps + 1):
            gradient = curvature * (p + 0.1 * noise[t - 1])
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient.square()
            for held, value in zip(states, (m, v), strict=False):
                held.write(value)
            if states:
                m, v = (held.read() for held in states)
            p = p - 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        results.append(p)
    return results[0], results[1]


class LinearUnchecked(LinearSecondMoment):
    """Takes what has become infinite, so that its steps can be seen to the end."""

    def check(self, values: Tensor) -> None:
        pass


def test_adam_in_8_bits_goes_where_adam_goes_and_a_linear_second_moment_does_not(seed: int) -> None:
    ours, exact = adam(Blockwise8bitState, seed, 150)
    # Each step is off by at most 8 % (6.4 % of m, half of 3.2 % of v) where a moment is above 1e-7 of its block.
    # Parameters start about 1 away from 0; 8 % of the way there is the most that may be missing on average.
    assert (ours - exact).abs().mean().item() < 0.08
    assert ours.abs().mean().item() < 0.1
    linear, _ = adam(LinearUnchecked, seed, 150)
    # v below a 510th of its block is 0, and the step is 0.02 * m / 1e-8.
    assert not bool(linear.isfinite().all()) or linear.abs().max().item() > 100


def test_a_decay_of_less_than_half_an_entry_rounds_back() -> None:
    state = Blockwise8bitState(torch.full((100,), 2.0), signed=False)
    for decay, moves in ((0.95, True), (0.999, False)):
        state.write(torch.cat([torch.full((50,), 2.0), torch.full((50,), 1.0)]))
        before = state.read()
        decayed = before.clone()
        decayed[50:] *= decay  # the largest of the block is exact and would follow
        state.write(decayed)
        assert bool((state.read()[50:] < before[50:]).all()) == moves


# ------------------------------------------------------------------------------- answers that are wrong somewhere


class ClosureKeepsFloats(Written):
    def store(self, values: Tensor) -> None:
        super().store(values)
        kept = values.detach().clone()
        self.look = lambda: kept


class ReadIsRemembered(Written):
    def read(self) -> Tensor:
        self.last = super().read()
        return self.last.clone()


class WholeTensorForSmall(Written):
    """Keeps short states in float32, as libraries do for small tensors."""

    def store(self, values: Tensor) -> None:
        super().store(values)
        self.short = values.detach().clone() if values.numel() < 100 else None

    def read(self) -> Tensor:
        return super().read() if self.short is None else self.short.clone()


class LevelForHugeRatio(Written):
    def ratio(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return blocks * torch.where(scales == 0, 0.0, 1 / scales.clamp_min(1e-12))[:, None]


class SignFromTheFirstWrite(Written):
    """Decides signed or not by what it is given first."""

    def __init__(self, values: Tensor, *, signed: bool, block_size: int = 256) -> None:
        super().__init__(values, signed=bool((values < 0).any()), block_size=block_size)


class CodesOfFourDecades(Written):
    def nearest(self, ratio: Tensor, entries: Tensor) -> Tensor:
        return super().nearest(torch.where(ratio.abs() < 1e-4, 0.0, ratio), entries)


class StochasticEntry(Written):
    """Rounds by chance: right on average, and not the nearest."""

    def nearest(self, ratio: Tensor, entries: Tensor) -> Tensor:
        noise = 1 + 0.03 * torch.rand(ratio.shape)
        return super().nearest(ratio * noise, entries)


class LastAxisOnly(Written):
    """Makes blocks of what the last dimension holds, or of its divisor."""

    def __init__(self, values: Tensor, *, signed: bool, block_size: int = 256) -> None:
        width = values.shape[-1] if values.dim() and values.numel() else block_size
        super().__init__(
            values, signed=signed, block_size=math.gcd(width, max(block_size, 1)) if block_size > 0 else 0
        )


class AddsTheScaleTwice(Written):
    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + 2 * self.scales.nbytes


class TouchesValues(Written):
    def store(self, values: Tensor) -> None:
        super().store(values)
        values.detach().copy_(self.read())


ATTACKS = (
    *(ClosureKeepsFloats, ReadIsRemembered, WholeTensorForSmall, LevelForHugeRatio, SignFromTheFirstWrite),
    *(CodesOfFourDecades, StochasticEntry, LastAxisOnly, AddsTheScaleTwice, TouchesValues),
)


def points_of(answer: Any, seed: int) -> float:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    return judging.judge(runner, exercise, answer, seed, expected, naming=False).points


@pytest.mark.parametrize("answer", ATTACKS, ids=lambda answer: answer.__name__)
def test_an_answer_that_is_wrong_somewhere_loses_points(answer: Any, seed: int) -> None:
    assert points_of(answer, seed) < exercise.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(Written, seed) == exercise.points


def test_values_are_drawn_off_the_middles_and_close_to_them(seed: int) -> None:
    for signed in (True, False):
        ratio = lesson.over_the_table(Rng(seed), 3000, signed)
        table = torch.tensor(entries(signed), dtype=torch.float64)
        upper = torch.bucketize(ratio, table).clamp(1, len(table) - 1)
        gap = table[upper] - table[upper - 1]
        off = ((ratio - (table[upper] + table[upper - 1]) / 2) / gap).abs()
        assert off.min() > 0.002  # of the distance of two entries, which is at least 6 % of them
        assert (off < 0.004).double().mean() > 0.3
