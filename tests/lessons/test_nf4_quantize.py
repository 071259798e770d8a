"""nf4_quantize against the published table, a search over all levels, and the errors known for normal weights."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization import nf4_quantize as lesson
from tests.peers import peer

found = find("nf4_quantize")
nf4_quantize = found.reference

# Dettmers et al. 2023 (QLoRA), appendix E: the sixteen values of NF4.
PUBLISHED = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def codes_of(packed: Tensor, count: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten()[:count]


def maxima_of(stored: Tensor, scales: Tensor, offset: Tensor, group_size: int) -> Tensor:
    """The blocks' maxima as they are read back."""
    return stored * scales.repeat_interleave(group_size)[: len(stored)] + offset


def read(weight: Tensor, *, block_size: int = 64, group_size: int = 256) -> Tensor:
    """The weight after quantization, in its shape."""
    packed, *second = nf4_quantize(weight, block_size=block_size, group_size=group_size)
    maxima = maxima_of(*second, group_size).repeat_interleave(block_size)[: weight.numel()]
    return (torch.tensor(PUBLISHED)[codes_of(packed, weight.numel()).int()] * maxima).reshape(weight.shape)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codes_change_half_way_between_the_published_levels() -> None:
    middles = [(low + high) / 2 for low, high in zip(PUBLISHED, PUBLISHED[1:], strict=False)]
    # The table was printed from float32: quantiles that differ by some eps of 1.8 move a middle by less than 1e-6.
    for code, middle in enumerate(middles):
        packed, *_ = nf4_quantize(torch.tensor([middle - 1e-6, middle + 1e-6, 1.0]))
        assert codes_of(packed, 3).tolist() == [code, code + 1, 15]


def test_the_levels_are_the_quantiles_that_python_finds() -> None:
    q = statistics.NormalDist().inv_cdf
    p = (1 - 1 / 32 + 1 - 1 / 30) / 2  # 0.9677083: the mean of the outermost bins of 8 and of 7.5 a side
    assert p == pytest.approx(0.9677083, abs=1e-7)
    positive = [q(p + (0.5 - p) * step / 8) / q(p) for step in range(8)]
    negative = [-q(p + (0.5 - p) * step / 7) / q(p) for step in range(7)]
    assert sorted([*positive, 0.0, *negative]) == pytest.approx(PUBLISHED, abs=1e-6)


def test_codes_are_nearest_by_a_search_over_all_levels(seed: int) -> None:
    weight = normal(seed, 33, 50)
    packed, *_ = nf4_quantize(weight, block_size=16)
    blocks = torch.cat([weight.flatten(), torch.zeros(-weight.numel() % 16)]).double().reshape(-1, 16)
    ratio = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()[: weight.numel()]
    distance = (ratio[:, None] - torch.tensor(PUBLISHED, dtype=torch.float64)).abs()
    chosen = distance.gather(1, codes_of(packed, weight.numel()).long()[:, None])[:, 0]
    # Only where two levels are equally near, within the table's own rounding, may the choice differ.
    assert bool((chosen <= distance.amin(dim=1) + 1e-6).all())


def test_maxima_are_stored_within_half_a_step_of_their_group(seed: int) -> None:
    weight = normal(seed, 70, 64) * torch.linspace(0.2, 3.0, 70)[:, None]
    _, stored, scales, offset = nf4_quantize(weight, group_size=16)
    maxima = weight.abs().amax(dim=1)
    assert stored.dtype == torch.int8 and scales.shape == (5,)
    assert offset.item() == pytest.approx(maxima.mean().item(), rel=1e-6)
    error = (maxima_of(stored, scales, offset, 16) - maxima).abs()
    step = scales.repeat_interleave(16)[:70]
    # Half a step, and some eps of the maxima, which are below 32, for the float32 arithmetic.
    assert bool((error <= step / 2 + 1e-5).all())
    for part in stored.split(16):
        assert part.abs().max() == 127


def test_bits_a_weight_are_4_127_with_every_part_counted() -> None:
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    packed, stored, scales, offset = nf4_quantize(weight)
    parts = [8 * part.nbytes / weight.numel() for part in (packed, stored, scales)]
    assert parts == [4, 8 / 64, 32 / (64 * 256)] and sum(parts) == pytest.approx(4.12695, abs=1e-5)
    assert offset.nbytes == 4


def test_the_error_on_normal_weights_is_below_that_of_int4_and_above_asymmetric_int4(seed: int) -> None:
    # 2^20 values: the mean square error of a block has a spread of about a tenth of it, over 16,384 blocks 0.1 %.
    weight = normal(seed, 1024, 1024)
    nf4 = (read(weight) - weight).square().mean().item()
    assert nf4 == pytest.approx(0.00845, rel=0.015)

    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    symmetric = ((blocks / scale).round() * scale - blocks).square().mean().item()
    low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    step = (high - low) / 15
    asymmetric = (((blocks - low) / step).round() * step + low - blocks).square().mean().item()
    assert asymmetric < nf4 < symmetric


def test_the_second_level_costs_little_beside_the_first(seed: int) -> None:
    weight = normal(seed, 512, 512)
    packed, *_ = nf4_quantize(weight)
    exact = torch.tensor(PUBLISHED)[codes_of(packed, weight.numel()).int()].reshape(-1, 64)
    one_level = (exact * weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True)).reshape(weight.shape)
    error = [(found - weight).square().mean().item() for found in (one_level, read(weight))]
    # Maxima of normal blocks spread by some 1.5 about their mean: a step of 0.012, an error of 0.0034 of 2.4 in each,
    # squared 2e-6 of the values' squares, beside 0.008 from the codes.
    assert error[1] == pytest.approx(error[0], rel=0.01)


def test_codes_equal_torchao(seed: int) -> None:
    peer("torchao")
    to_nf4 = importlib.import_module("torchao.quantization").to_nf4
    weight = normal(seed, 256, 256)
    theirs = to_nf4(weight, 64, 256)
    packed, *_ = nf4_quantize(weight)
    # torchao packs the even index into the high half of the byte.
    high, low = theirs.quantized_data.flatten() >> 4, theirs.quantized_data.flatten() & 15
    differ = codes_of(packed, weight.numel()) != torch.stack([high, low], dim=-1).flatten()
    # They round on the way to the nearest level, which moves values that lie half way between two, and no others.
    maxima = weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(PUBLISHED)
    half_way = (levels[1:] + levels[:-1]) / 2
    odd = (weight.reshape(-1, 64) / maxima).flatten()[differ]
    assert bool(((odd[:, None] - half_way).abs().amin(dim=1) < 1e-4).all())
    assert differ.float().mean() < 1e-3


def test_zeros_and_equal_blocks_read_back_exactly() -> None:
    assert torch.equal(read(torch.zeros(3, 70)), torch.zeros(3, 70))
    weight = torch.tensor([0.75, -0.75, 0.0, 0.75]).repeat(64)
    assert torch.equal(read(weight, block_size=16), weight)
    mixed = torch.cat([torch.zeros(64), torch.ones(64)])
    packed, stored, *_ = nf4_quantize(mixed)
    assert codes_of(packed, 128).tolist() == [7] * 64 + [15] * 64
    assert stored.tolist() == [-127, 127]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match=r"weight is \[4, 8\]"):
        nf4_quantize(weight)


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is \[0, 8\]"):
        nf4_quantize(torch.zeros(0, 8))


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Any, seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


Step = Callable[..., Any]


def stepping(**steps: Any) -> Step:
    """An answer with some steps replaced."""
    return lambda weight, *, block_size=64, group_size=256: lesson.written(
        weight, block_size, group_size, **steps
    )


def refusing(is_bad: Callable[[Tensor], Any]) -> Step:
    def check(weight: Tensor) -> None:
        if weight.numel() == 0 or bool(is_bad(weight)):
            raise ValueError("weight")

    return stepping(check=check)


def floored_maxima(floor: float) -> Step:
    return stepping(over=lambda blocks, maxima: blocks / maxima.clamp_min(floor)[:, None])


def floored_groups(floor: float) -> Step:
    def of_the_maxima(maxima: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        stored, scales, offset = lesson.of_the_maxima(maxima, group_size)
        return stored, torch.where(scales < floor, 1.0, scales), offset

    return stepping(of_the_maxima=of_the_maxima)


def sizes(allowed: Callable[[int, int], bool]) -> Step:
    """An answer that works for some sizes of blocks and groups only."""

    def answer(weight: Tensor, *, block_size: int = 64, group_size: int = 256) -> Any:
        assert allowed(block_size, group_size)
        return stepping()(weight, block_size=block_size, group_size=group_size)

    return answer


WRONG: dict[str, Step] = {
    "sum": refusing(lambda w: ~w.sum().isfinite()),
    "squares": refusing(lambda w: ~w.square().sum().isfinite()),
    "NaN alone": refusing(lambda w: w.isnan().any()),
    "Inf alone": refusing(lambda w: w.isinf().any()),
    "plus Inf and NaN": refusing(lambda w: (w.isnan() | (w == torch.inf)).any()),
    "minus Inf and NaN": refusing(lambda w: (w.isnan() | (w == -torch.inf)).any()),
    "first block": refusing(lambda w: ~w.reshape(-1)[:64].isfinite().all()),
    "last block": refusing(lambda w: ~w.reshape(-1)[-64:].isfinite().all()),
    **{f"maxima above {floor}": floored_maxima(floor) for floor in (1e-5, 1e-11, 1e-30)},
    **{f"group scales above {floor}": floored_groups(floor) for floor in (1e-5, 1e-12, 1e-30)},
    "p with 4 digits": stepping(levels=lesson.levels_of(p=0.9677)),
    "even blocks": sizes(lambda block, group: block % 2 == 0 or block == 1),
    "blocks of several": sizes(lambda block, group: block > 1),
    "groups of several": sizes(lambda block, group: group > 1),
    "blocks up to 64": sizes(lambda block, group: block <= 64),
    "groups up to 256": sizes(lambda block, group: group <= 256),
}


def test_loud_weights_have_a_finite_offset() -> None:
    packed, stored, scales, offset = nf4_quantize(torch.full((8, 64), 1e38))
    assert (packed == 255).all()
    assert offset.item() == torch.tensor(1e38).item()
    assert not stored.any()
    assert scales.item() == 1


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_wrong_somewhere_loses_points(name: str, seed: int) -> None:
    assert points_of(WRONG[name], seed) < found.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(stepping(), seed) == found.points
