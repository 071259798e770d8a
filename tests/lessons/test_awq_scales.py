"""awq_scales against a search in plain loops, round-to-nearest, and what must not change its answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import exercise, judging
from llmcourse.lessons.quantization import awq_scales as lesson
from llmcourse.lessons.quantization.awq_scales import awq_scales

Found = tuple[Tensor, Tensor, Tensor]
Answer = Callable[..., Found]


def dequantized(found: Found, group_size: int) -> Tensor:
    """What stands in for weight: codes * scales / s in float64, [N, K]."""
    s, codes, scales = found
    return codes.double() * scales.double()[:, torch.arange(codes.shape[1]) // group_size] / s.double()


def output_error(weight: Tensor, found: Found, x: Tensor, group_size: int) -> float:
    """Sum of squares of what the output changes by, in float64."""
    return float((x.double() @ (dequantized(found, group_size) - weight.double()).T).square().sum())


def rounded_row(row: list[float], *, bits: int, group_size: int) -> tuple[list[int], list[float]]:
    """Codes and float32 scales of one row."""
    top = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for begin in range(0, len(row), group_size):
        group = row[begin : begin + group_size]
        scale = float(torch.tensor(max(map(abs, group)) / top, dtype=torch.float32)) or 1.0
        codes += [round(value / scale) for value in group]
        scales.append(scale)
    return codes, scales


def rounded(weight: Tensor, *, bits: int, group_size: int) -> Found:
    """Round-to-nearest, as the answer for s = 1."""
    rows = [rounded_row(row, bits=bits, group_size=group_size) for row in weight.double().tolist()]
    codes = torch.tensor([row[0] for row in rows], dtype=torch.int8)
    return torch.ones(weight.shape[1]), codes, torch.tensor([row[1] for row in rows])


def searched(weight: Tensor, x: Tensor, *, bits: int, group_size: int, steps: int) -> tuple[Found, float]:
    """The search, a number at a time, and what of its least error the next best alpha has more."""
    loudness = [sum(map(abs, channel)) / len(x) for channel in x.T.double().tolist()]
    quietest = min(value for value in loudness if value)
    loudness = [value or quietest for value in loudness]
    tried: list[tuple[float, Found]] = []
    for step in range(steps + 1):
        powers = [math.pow(value, step / steps) for value in loudness]
        middle = math.sqrt(max(powers) * min(powers))
        s = torch.tensor([power / middle for power in powers], dtype=torch.float32)
        larger = [[w * f for w, f in zip(row, s.tolist(), strict=True)] for row in weight.double().tolist()]
        rows = [rounded_row(row, bits=bits, group_size=group_size) for row in larger]
        found = (s, torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows]))
        tried.append((output_error(weight, found, x, group_size), found))
    errors = sorted(error for error, _ in tried)
    best = next(found for error, found in tried if error == errors[0])
    return (best[0], best[1].to(torch.int8), best[2]), errors[1] / errors[0] - 1


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def with_outliers(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    """White, but one channel in 32 (one at least) is 20 times louder."""
    x = white(tokens, channels, generator)
    x[:, torch.randperm(channels, generator=generator)[: max(channels // 32, 1)]] *= 20
    return x


def one_sided(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    """Positive, of low rank, and of a loudness that varies 100-fold."""
    mixed = white(tokens, 3, generator).abs() @ white(3, channels, generator).abs()
    return mixed * 10 ** (2 * torch.rand(channels, generator=generator))


LAWS = [white, with_outliers, one_sided]


def relative_errors(law: Any, *, bits: int = 4, group_size: int = 64, tokens: int = 1024) -> list[float]:
    """Output error over that of round-to-nearest for five seeds: 64 rows of 64 white weights."""
    found = []
    for seed in range(5):
        generator = draw(seed)
        weight, x = white(64, 64, generator), law(tokens, 64, generator)
        error = output_error(weight, awq_scales(weight, x, bits=bits, group_size=group_size), x, group_size)
        base = rounded(weight, bits=bits, group_size=group_size)
        found.append(error / output_error(weight, base, x, group_size))
    return found


@pytest.mark.parametrize("law", LAWS)
def test_it_is_what_a_search_a_number_at_a_time_finds(law: Any, seed: int) -> None:
    generator = draw(seed)
    weight, x = white(5, 17, generator), law(23, 17, generator)
    x[:, 4] = 0
    for bits, group_size, steps in ((2, 17, 4), (3, 6, 7), (4, 5, 20)):
        options = {"bits": bits, "group_size": group_size, "steps": steps}
        expected, margin = searched(weight, x, **options)
        if margin < 1e-9:
            continue  # two alphas are as good as each other; which one wins is decided by the order of summation
        found = awq_scales(weight, x, **options)
        # Both work in float64, so that only a value within 1e-13 of a tie, or of half a float32, can differ.
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], rtol=2**-23, atol=0)
        torch.testing.assert_close(found[2], expected[2], rtol=2**-22, atol=0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_never_worse_than_round_to_nearest(law: Any, bits: int, seed: int) -> None:
    generator = draw(seed)
    for group_size in (7, 16, 40):
        weight, x = white(9, 40, generator), law(60, 40, generator)
        error = output_error(weight, awq_scales(weight, x, bits=bits, group_size=group_size), x, group_size)
        base = output_error(weight, rounded(weight, bits=bits, group_size=group_size), x, group_size)
        assert error <= base * (1 + 1e-9)  # summed in another order


def test_outlier_channels_lose_most_of_their_error_and_white_ones_little() -> None:
    assert all(ratio < 0.5 for ratio in relative_errors(with_outliers))
    assert all(0.9 < ratio <= 1 + 1e-9 for ratio in relative_errors(white))


def test_a_finer_grid_that_holds_the_coarser_one_is_no_worse(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 32, generator), with_outliers(60, 32, generator)
    errors = [
        output_error(weight, awq_scales(weight, x, bits=3, group_size=8, steps=steps), x, 8)
        for steps in (1, 2, 4, 8, 16)
    ]
    assert all(finer <= coarser * (1 + 1e-9) for coarser, finer in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("loud", [1.0, 0.125])
def test_equally_loud_inputs_leave_round_to_nearest(loud: float, seed: int) -> None:
    generator = draw(seed)
    weight, x = white(6, 19, generator), white(30, 19, generator).sign() * loud
    s, codes, scales = awq_scales(weight, x, bits=4, group_size=6)
    expected = rounded(weight, bits=4, group_size=6)
    assert torch.equal(codes, expected[1]) and torch.equal(scales, expected[2])
    assert torch.equal(s, torch.ones(19))


def test_s_grows_with_loudness_and_its_ends_multiply_to_one(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 32, generator), one_sided(60, 32, generator)
    s, _, _ = awq_scales(weight, x, bits=3, group_size=32)
    order = torch.argsort(x.abs().double().mean(0))
    assert bool((s[order].diff() >= 0).all())
    # Each end is rounded to float32.
    assert float(s.double().max() * s.double().min()) == pytest.approx(1, rel=2**-23)


def test_units_do_not_matter(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 21, generator), one_sided(40, 21, generator)
    s, codes, scales = awq_scales(weight, x, bits=3, group_size=6)
    # A power of two in the weights is exact; one in x goes through a power and a root: a rounding of float64.
    found = awq_scales(weight * 2**-6, x * 2**10, bits=3, group_size=6)
    assert torch.equal(found[1], codes)
    torch.testing.assert_close(found[0], s, rtol=2**-23, atol=0)
    torch.testing.assert_close(found[2], scales * 2**-6, rtol=2**-22, atol=0)


def test_a_silent_channel_counts_as_the_quietest(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 20, generator), with_outliers(40, 20, generator)
    x[:, 7] = 0
    s, _, _ = awq_scales(weight, x, bits=3, group_size=20)
    assert float(s[7]) == float(s.min())
    silent = awq_scales(weight, torch.zeros_like(x), bits=3, group_size=5)
    assert all(torch.equal(a, b) for a, b in zip(silent, rounded(weight, bits=3, group_size=5), strict=True))


def test_zero_weights_keep_scale_one_and_are_not_enlarged() -> None:
    s, codes, scales = awq_scales(torch.zeros(3, 7), with_outliers(9, 7, draw(0)), bits=4, group_size=3)
    assert torch.equal(s, torch.ones(7)) and torch.equal(scales, torch.ones(3, 3)) and not codes.any()


def test_neither_argument_is_changed() -> None:
    generator = draw(0)
    weight, x = white(4, 12, generator).double(), with_outliers(20, 12, generator).double()
    before = weight.clone(), x.clone()
    awq_scales(weight, x, bits=3, group_size=4)
    assert torch.equal(weight, before[0]) and torch.equal(x, before[1])


def test_half_precision_is_widened_before_any_product() -> None:
    generator = draw(0)
    weight, x = white(4, 12, generator).half(), with_outliers(20, 12, generator).half()
    found = awq_scales(weight, x, bits=4, group_size=12)
    expected = awq_scales(weight.double(), x.double(), bits=4, group_size=12)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"steps": 0}, "steps=0"),
        ({"weight": torch.ones(6)}, r"weight \[6\]"),
        ({"x": torch.ones(4, 5)}, r"x \[4, 5\]"),
        ({"x": torch.ones(2, 4, 6)}, r"x \[2, 4, 6\]"),
        ({"x": torch.ones(0, 6)}, "not empty"),
        ({"weight": torch.ones(0, 6)}, "not empty"),
        ({"weight": torch.full((3, 6), math.nan)}, "NaN or infinity"),
        ({"x": torch.full((3, 6), math.inf)}, "NaN or infinity"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"weight": torch.ones(3, 6), "x": torch.ones(4, 6), "bits": 4, "group_size": 3}
    awq_scales(**given)
    with pytest.raises(ValueError, match=match):
        awq_scales(**{**given, **changes})


@pytest.mark.parametrize("power", [-100, 100])
def test_magnitudes_whose_squares_float32_does_not_hold_change_the_scales_only(power: int, seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 21, generator), one_sided(40, 21, generator)
    _, codes, scales = awq_scales(weight, x, bits=3, group_size=6)
    found = awq_scales(weight * 2.0**power, x * 2.0**power, bits=3, group_size=6)
    assert torch.equal(found[1], codes)
    # As above: s goes through a power and a root.
    torch.testing.assert_close(found[2], scales * 2.0**power, rtol=2**-22, atol=0)


def test_no_result_requires_grad(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(4, 12, generator), with_outliers(20, 12, generator)
    expected = awq_scales(weight, x, bits=3, group_size=4)
    found = awq_scales(torch.nn.Parameter(weight), x.requires_grad_(), bits=3, group_size=4)
    assert not any(part.requires_grad for part in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def varied(step: str, replaced: Callable[..., Any]) -> Answer:
    """The small steps, one of them replaced by a function of what it is given."""
    return lesson.variant(**{step: lambda self, *given: replaced(*given)})


def filled(loudness: Tensor, live: Tensor) -> Tensor:
    """The loudness, and that of the quietest live channel for those that are not."""
    return torch.where(live, loudness, loudness[live].min() if bool(live.any()) else 1.0)


def within(chosen: Callable[[Tensor], Tensor]) -> Answer:
    """The error on some of the tokens only."""
    return varied("error", lambda tokens, change, w: float((chosen(tokens) @ change.T).square().sum()))


def picked(pick: Callable[[list[float]], int]) -> Answer:
    """Another choice among the errors."""
    return varied("best", pick)


def better_by(share: float) -> Callable[[list[float]], int]:
    """The last alpha that was better than the best so far by more than a share of it; below 0, almost as good."""

    def pick(errors: list[float]) -> int:
        found = 0
        for index, error in enumerate(errors):
            if error < errors[found] * (1 - share):
                found = index
        return found

    return pick


def patient(alphas: int) -> Callable[[list[float]], int]:
    """The best of the errors before so many in a row were no better."""

    def pick(errors: list[float]) -> int:
        found = 0
        for index, error in enumerate(errors):
            if error < errors[found]:
                found = index
            elif index - found == alphas:
                break
        return found

    return pick


def coarse_first(errors: list[float]) -> int:
    """The best of every fourth, and then of its neighbours."""
    found = min(range(0, len(errors), 4), key=errors.__getitem__)
    return min(range(max(found - 3, 0), min(found + 4, len(errors))), key=errors.__getitem__)


def at_most(most: int) -> Answer:
    """No more steps than so many."""
    return varied("alphas", lambda steps: [step / min(steps, most) for step in range(min(steps, most) + 1)])


def finite(check: Callable[[Tensor], object]) -> Answer:
    """Another look at NaN and infinities; those that it misses are replaced."""

    def answer(weight: Tensor, x: Tensor, **options: Any) -> Found:
        if not weight.numel() or not x.numel() or not check(weight) or not check(x):
            raise ValueError("not finite")
        return lesson.variant()(weight.nan_to_num(), x.nan_to_num(), **options)

    return answer


WRONG: dict[str, Answer] = {
    "loudness at least 1e-4": varied("dead", lambda m: filled(m, m > 0).clamp_min(1e-4)),
    "loudness at least 1e-4 of the largest": varied(
        "dead", lambda m: filled(m, m > 0).clamp_min(m.max() * 1e-4)
    ),
    "loudness at least 1e-12": varied("dead", lambda m: filled(m, m > 0).clamp_min(1e-12)),
    "live above 1e-4": varied("dead", lambda m: filled(m, m > 1e-4)),
    "live above 1e-12": varied("dead", lambda m: filled(m, m > 1e-12)),
    "loudness of the first 40 tokens": varied("loudness", lambda tokens, w: tokens[:40].abs().mean(0)),
    "scales at least 1e-5": varied("usable", lambda scales: scales.clamp_min(1e-5)),
    "scales at least 1e-12, or 1": varied("usable", lambda scales: torch.where(scales < 1e-12, 1.0, scales)),
    "errors in float32": picked(lambda errors: int(torch.tensor(errors, dtype=torch.float32).argmin())),
    "weights in float32": varied("wide", lambda given: given.detach().float().double()),
    "better by a thousandth": picked(better_by(1e-3)),
    "better by a millionth": picked(better_by(1e-6)),
    "worse by less than a thousandth": picked(better_by(-1e-3)),
    "patience of 2": picked(patient(2)),
    "patience of 10": picked(patient(10)),
    "every fourth first": picked(coarse_first),
    "20 steps at most": at_most(20),
    "50 steps at most": at_most(50),
    "the first 64 tokens": within(lambda tokens: tokens[:64]),
    "the first 256 tokens": within(lambda tokens: tokens[:256]),
    "the last 64 tokens": within(lambda tokens: tokens[-64:]),
    "every other token": within(lambda tokens: tokens[::2]),
    "every other token, from the second": within(
        lambda tokens: tokens[1:][::2] if len(tokens) > 1 else tokens
    ),
    "finite sum": finite(lambda given: given.sum().isfinite()),
    "not in the first": finite(lambda given: given.flatten()[1:].isfinite().all()),
    "not in the last": finite(lambda given: given.flatten()[:-1].isfinite().all()),
    "not below": finite(lambda given: not given.isnan().any() and given.max() < math.inf),
    "a row at a time": varied(
        "error",
        lambda tokens, change, w: sum(float((tokens * row).sum(1).square().sum()) for row in change),
    ),
    "a token at a time": varied(
        "error",
        lambda tokens, change, w: sum(float((token * change).sum(1).square().sum()) for token in tokens),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_answers_that_are_wrong_in_part_do_not_earn_all_points(name: str, seed: int) -> None:
    found, runner = exercise.of(awq_scales), judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    assert judging.judge(runner, found, WRONG[name], seed, expected, naming=False).points < found.points
