"""gptq_quantize against least squares, exact fractions, every code there is, and round-to-nearest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization import gptq_quantize as lesson

exercise = find("gptq_quantize")
gptq_quantize = exercise.reference


def dequantized(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """codes * scales in float64, [N, K]."""
    return codes.double() * scales.double()[:, torch.arange(codes.shape[1]) // group_size]


def nearest(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Round-to-nearest by a loop over rows and groups: the baseline, and what GPTQ is without correlation."""
    top = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for row in weight.double().tolist():
        groups = [row[begin : begin + group_size] for begin in range(0, len(row), group_size)]
        largest = torch.tensor([max(map(abs, group)) / top for group in groups], dtype=torch.float32)
        scales.append([scale or 1.0 for scale in largest.tolist()])
        codes.append(
            [round(w / scale) for group, scale in zip(groups, scales[-1], strict=True) for w in group]
        )
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scales, dtype=torch.float32)


def output_error(weight: Tensor, found: tuple[Tensor, Tensor], x: Tensor, group_size: int) -> float:
    """Sum of squares of what the output changes by, in float64."""
    change = dequantized(*found, group_size) - weight.double()
    return float((x.double() @ change.T).square().sum())


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- laws of inputs


def white(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tokens, channels, generator=generator)


def quarter_rank(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    return white(tokens, channels // 4, generator) @ white(channels // 4, channels, generator)


def autoregressive(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    """Neighbouring channels correlate at 0.9, those n apart at 0.9^n."""
    x = white(tokens, channels, generator)
    for channel in range(1, channels):
        x[:, channel] = 0.9 * x[:, channel - 1] + math.sqrt(1 - 0.9**2) * x[:, channel]
    return x


def with_outliers(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    """A quarter of the rank plus 10 % noise, and one channel in 32 is 20 times louder."""
    x = quarter_rank(tokens, channels, generator) / math.sqrt(channels // 4)
    x += 0.1 * white(tokens, channels, generator)
    x[:, torch.randperm(channels, generator=generator)[: channels // 32]] *= 20
    return x


Law = Callable[[int, int, torch.Generator], Tensor]


def relative_errors(law: Law, *, tokens: int = 4096, channels: int = 64, **options: Any) -> list[float]:
    """Output error over that of round-to-nearest for five seeds: 64 rows of white weights, 4 bits, a scale a row."""
    found = []
    for seed in range(5):
        generator = draw(seed)
        weight, x = white(64, channels, generator), law(tokens, channels, generator)
        answer = gptq_quantize(weight, x, bits=4, group_size=channels, **options)
        base = nearest(weight, bits=4, group_size=channels)
        found.append(output_error(weight, answer, x, channels) / output_error(weight, base, x, channels))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_white_inputs_leave_nothing_to_gain() -> None:
    # What there is to gain is the correlation that 4096 tokens of 64 independent channels happen to have.
    assert all(0.98 <= ratio <= 1.0 for ratio in relative_errors(white))


def test_a_fifth_of_the_error_is_left_at_a_quarter_of_the_rank() -> None:
    assert all(ratio <= 0.2 for ratio in relative_errors(quarter_rank))


def test_act_order_gains_with_outlier_channels_and_loses_without() -> None:
    plain, ordered = relative_errors(with_outliers), relative_errors(with_outliers, act_order=True)
    # Without the order it depends on where the loud channels lie: one that comes late finds few open columns.
    assert all(o < min(0.05, p) for o, p in zip(ordered, plain, strict=True)), (plain, ordered)
    assert mean(ordered) < mean(plain) / 3
    plain, ordered = relative_errors(autoregressive), relative_errors(autoregressive, act_order=True)
    assert all(0.15 < p < o < 0.35 for o, p in zip(ordered, plain, strict=True)), (plain, ordered)


def test_what_is_gained_on_white_inputs_is_lost_on_fresh_ones() -> None:
    generator = draw(0)
    weight, x, fresh = (white(rows, 64, generator) for rows in (256, 256, 4096))
    found = gptq_quantize(weight, x, bits=4, group_size=64)
    base = nearest(weight, bits=4, group_size=64)
    assert output_error(weight, found, x, 64) < 0.95 * output_error(weight, base, x, 64)
    assert output_error(weight, found, fresh, 64) > 1.05 * output_error(weight, base, fresh, 64)


# -------------------------------------------------------------------------------------------- the definition


def by_least_squares(
    weight: Tensor, x: Tensor, *, bits: int, group_size: int, damping: float = 0.01, act_order: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition without H: damping is K more tokens, and open columns are a least-squares fit (QR)."""
    original, top = weight.double(), 2 ** (bits - 1) - 1
    energy = x.double().square().sum(0)
    extra = torch.eye(len(energy), dtype=torch.float64) * (damping * energy.mean()).sqrt()
    tokens = torch.cat([x.double(), extra])
    open_columns = sorted(range(len(energy)), key=lambda c: -float(energy[c]) if act_order else c)
    closed: list[int] = []
    moved, codes = original.clone(), torch.zeros(weight.shape, dtype=torch.int8)
    scales: dict[int, Tensor] = {}
    while open_columns:
        column, *open_columns = open_columns
        group = column // group_size
        if group not in scales:
            source = (original if act_order else moved)[:, group * group_size : (group + 1) * group_size]
            scales[group] = (source.abs().amax(1) / top).float()
        values = moved[:, column] / scales[group].double()
        codes[:, column] = values.round().clamp(-top, top).to(torch.int8)
        moved[:, column] = codes[:, column] * scales[group].double()
        closed.append(column)
        if open_columns:
            output = tokens[:, closed] @ (original - moved)[:, closed].T
            fit = torch.linalg.lstsq(tokens[:, open_columns], output, driver="gelsy").solution
            moved[:, open_columns] = original[:, open_columns] + fit.T
    return codes, torch.stack([scales[group] for group in sorted(scales)], 1)


@pytest.mark.parametrize("law", [white, quarter_rank, autoregressive, with_outliers])
@pytest.mark.parametrize("act_order", [False, True])
def test_open_columns_stand_where_least_squares_puts_them(law: Law, act_order: bool, seed: int) -> None:
    generator = draw(seed)
    weight, x = white(6, 36, generator), law(100, 36, generator)
    options: dict[str, Any] = {"bits": 3, "group_size": 8, "act_order": act_order}
    found, expected = gptq_quantize(weight, x, **options), by_least_squares(weight, x, **options)
    # Both are float64: values differ by about 1e-13 of a step, so a code differs only where a tie is that near.
    assert torch.equal(found[0], expected[0])
    # Scales are float32 roundings of values that differ by 1e-13: by one rounding at most.
    torch.testing.assert_close(found[1], expected[1], rtol=2**-23, atol=0)


def test_without_correlation_it_is_round_to_nearest(seed: int) -> None:
    generator = draw(seed)
    for bits, group_size in ((2, 19), (3, 4), (4, 6), (8, 5)):
        weight = white(7, 19, generator)
        x = torch.diag(torch.rand(19, generator=generator) + 0.1)[torch.randperm(19, generator=generator)]
        expected = nearest(weight, bits=bits, group_size=group_size)
        for act_order in (False, True):
            codes, scales = gptq_quantize(weight, x, bits=bits, group_size=group_size, act_order=act_order)
            assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


def test_two_columns_worked_by_hand() -> None:
    # H = x.T @ x has 2 1 / 1 1 for the first two columns; the third, alone, sets the scale to 1 (2 bits: -1, 0, 1).
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # 0.4 becomes 0, an error of -0.4; the second moves by -(1/1) * -0.4 to 0.7 and becomes 1, where 0.3 alone gives 0.
    codes, scales = gptq_quantize(
        torch.tensor([[0.4, 0.3, 1.0]]), x, bits=2, group_size=3, damping=1e-9, act_order=False
    )
    assert (codes.tolist(), scales.tolist()) == ([[0, 1, 1]], [[1.0]])
    # d @ H @ d: 2 * 0.16 - 2 * 0.28 + 0.49 = 0.25, and 2 * 0.16 + 2 * 0.12 + 0.09 = 0.65 for round-to-nearest.
    weight = torch.tensor([[0.4, 0.3, 1.0]])
    assert output_error(weight, (codes, scales), x, 3) == pytest.approx(0.25, rel=1e-6)
    assert output_error(weight, nearest(weight, bits=2, group_size=3), x, 3) == pytest.approx(0.65, rel=1e-6)


def solved(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Exact solution by elimination; the matrix is positive definite, so no pivot is 0."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for pivot in range(len(rows)):
        rows[pivot] = [value / rows[pivot][pivot] for value in rows[pivot]]
        for other in range(len(rows)):
            if other != pivot:
                factor = rows[other][pivot]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[pivot], strict=True)]
    return [row[-1] for row in rows]


def test_four_columns_in_exact_fractions(seed: int) -> None:
    generator = draw(seed)
    tried = 0
    while tried < 20:
        x = torch.randint(-3, 4, (6, 4), generator=generator)
        weight = torch.randint(-63, 64, (4,), generator=generator)
        weight[torch.randint(0, 4, (1,), generator=generator)] = 64  # in units of 1/64: the scale is 1
        gram = (x.T @ x).tolist()
        amount = Fraction(sum(gram[i][i] for i in range(4)), 4) / 64  # damping 1/64
        h = [[gram[i][j] + (amount if i == j else 0) for j in range(4)] for i in range(4)]
        w = [Fraction(value, 64) for value in weight.tolist()]
        moved, codes, margin = list(w), [], Fraction(1)
        for column in range(4):
            margin = min(margin, abs(abs(moved[column] - math.floor(moved[column])) - Fraction(1, 2)))
            codes.append(max(-1, min(1, round(moved[column]))))
            errors = [codes[j] - w[j] for j in range(column + 1)]
            rest = range(column + 1, 4)
            pull = [sum((h[i][j] * errors[j] for j in range(column + 1)), Fraction(0)) for i in rest]
            for i, step in zip(rest, solved([[h[i][j] for j in rest] for i in rest], pull), strict=True):
                moved[i] = w[i] - step
        if not amount or margin < Fraction(1, 10**6):
            continue  # a tie (likely: all numbers here are small integers) is decided by rounding in float64
        tried += 1
        found, scales = gptq_quantize(
            weight[None] / 64, x.float(), bits=2, group_size=4, damping=1 / 64, act_order=False
        )
        assert (found.tolist(), scales.tolist()) == ([codes], [[1.0]])


def test_no_choice_of_codes_is_better_by_much_and_rounding_is_worse(seed: int) -> None:
    generator = draw(seed)
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)), dtype=torch.int8)
    best_sum = found_sum = nearest_sum = 0.0
    for _ in range(40):
        weight, x = white(1, 6, generator), autoregressive(50, 6, generator)
        found = gptq_quantize(weight, x, bits=2, group_size=6)
        errors = [output_error(weight, (codes[None], found[1]), x, 6) for codes in every]
        error = output_error(weight, found, x, 6)
        assert error >= min(errors) * (1 - 1e-9)
        best_sum, found_sum = best_sum + min(errors), found_sum + error
        nearest_sum += output_error(weight, nearest(weight, bits=2, group_size=6), x, 6)
    # A single layer may come out worse than rounding; forty do not.
    assert best_sum < found_sum < nearest_sum
    assert found_sum - best_sum < nearest_sum - found_sum


# ------------------------------------------------------------------------------------------------- what follows


def test_rows_do_not_know_of_each_other(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 21, generator), autoregressive(60, 21, generator)
    together = gptq_quantize(weight, x, bits=4, group_size=6)
    for row in range(8):
        alone = gptq_quantize(weight[row : row + 1], x, bits=4, group_size=6)
        assert torch.equal(together[0][row], alone[0][0])
        # A product may be summed in another order for one row than for eight: an eps of float64, a rounding of float32.
        torch.testing.assert_close(together[1][row], alone[1][0], rtol=2**-23, atol=0)


def test_units_do_not_matter(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 21, generator), autoregressive(60, 21, generator)
    codes, scales = gptq_quantize(weight, x, bits=3, group_size=6)
    # Powers of two are exact in every step, the roundings included.
    found = gptq_quantize(weight * 2**-6, x * 2**9, bits=3, group_size=6)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales * 2**-6)


def test_act_order_with_one_group_is_a_permutation_before_and_after(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 32, generator), with_outliers(90, 32, generator)
    order = torch.argsort(x.double().square().sum(0), descending=True)
    ordered = gptq_quantize(weight, x, bits=3, group_size=32, act_order=True)
    permuted = gptq_quantize(weight[:, order], x[:, order], bits=3, group_size=32)
    assert torch.equal(ordered[0][:, order], permuted[0]) and torch.equal(ordered[1], permuted[1])


def test_scales_of_act_order_are_those_of_the_original_groups(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 30, generator), autoregressive(90, 30, generator)
    expected = nearest(weight, bits=4, group_size=8)[1]
    assert torch.equal(gptq_quantize(weight, x, bits=4, group_size=8, act_order=True)[1], expected)
    moved = gptq_quantize(weight, x, bits=4, group_size=8)[1]
    assert torch.equal(moved[:, 0], expected[:, 0]) and not torch.equal(moved[:, 1:], expected[:, 1:])


def test_a_dead_channel_is_rounded_to_nearest_and_moves_nobody(seed: int) -> None:
    generator = draw(seed)
    weight, x = white(8, 20, generator), autoregressive(60, 20, generator)
    x[:, 7] = 0
    codes, scales = gptq_quantize(weight, x, bits=4, group_size=20)
    assert torch.equal(codes[:, 7], nearest(weight, bits=4, group_size=20)[0][:, 7])
    other = weight.clone()
    other[:, 7] *= 0.5
    again, _ = gptq_quantize(other, x, bits=4, group_size=20)
    rows = (scales[:, 0] == gptq_quantize(other, x, bits=4, group_size=20)[1][:, 0]).nonzero()[:, 0]
    live = [column for column in range(20) if column != 7]
    assert len(rows) and torch.equal(codes[rows][:, live], again[rows][:, live])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1)])
def test_zeros_and_the_smallest_layers_survive(shape: tuple[int, int]) -> None:
    for weight, x in (
        (torch.ones(shape), torch.zeros(3, shape[1])),
        (torch.zeros(shape), torch.ones(1, shape[1])),
    ):
        codes, scales = gptq_quantize(weight, x, bits=4, group_size=2)
        # Seven steps of float32(1/7) are 1 to a rounding of float32.
        torch.testing.assert_close(dequantized(codes, scales, 2).float(), weight, rtol=2**-22, atol=0)
        assert torch.isfinite(scales).all() and (scales > 0).all()


def test_neither_argument_is_changed() -> None:
    generator = draw(0)
    weight, x = white(4, 12, generator).double(), white(20, 12, generator).double()
    before = weight.clone(), x.clone()
    gptq_quantize(weight, x, bits=3, group_size=4, act_order=True)
    assert torch.equal(weight, before[0]) and torch.equal(x, before[1])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": math.nan}, "damping=nan"),
        ({"damping": math.inf}, "damping=inf"),
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
    gptq_quantize(**given)
    with pytest.raises(ValueError, match=match):
        gptq_quantize(**{**given, **changes})


def test_half_precision_is_widened_before_any_product() -> None:
    generator = draw(0)
    weight, x = white(4, 12, generator).half(), white(20, 12, generator).half()
    found = gptq_quantize(weight, x, bits=4, group_size=12)
    expected = gptq_quantize(weight.double(), x.double(), bits=4, group_size=12)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_parameter_gives_results_without_gradient() -> None:
    generator = draw(0)
    weight, x = white(4, 12, generator).double(), white(20, 12, generator).double().requires_grad_()
    found = gptq_quantize(torch.nn.Parameter(weight), x, bits=4, group_size=5)
    expected = gptq_quantize(weight, x.detach(), bits=4, group_size=5)
    assert not found[1].requires_grad
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# ---------------------------------------------------------------------------------------------- nearly right answers

Answer = Callable[..., tuple[Tensor, Tensor]]


def blocks_of(size: int, *, ordered_only: bool = False) -> Answer:
    """What a block leaves open does not reach the next."""

    def found(*arguments: Any, act_order: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
        def reach(self: Any, t: int, group_size: int, channels: int) -> slice:
            return slice(t + 1, channels if ordered_only and not act_order else t - t % size + size)

        return lesson.variant(reach=reach)(*arguments, act_order=act_order, **options)

    return found


def scale_at_least(least: float) -> Answer:
    def scale(self: Any, group: Tensor, top: int) -> Tensor:
        largest = group.abs().amax(1)
        return torch.where(largest > 0, largest / top, 1.0).float().clamp_min(least)

    return lesson.variant(scale=scale)


def damped(change: Callable[[float, float], float]) -> Answer:
    """change(damping, mean of the diagonal) is what is added to the diagonal."""

    def damp(self: Any, hessian: Tensor, damping: float) -> Tensor:
        amount = change(damping, float(hessian.diagonal().mean())) or 1.0
        return hessian + amount * torch.eye(len(hessian)).double()

    return lesson.variant(damp=damp)


def default_damping_where(condition: Callable[..., bool]) -> Answer:
    def found(weight: Tensor, x: Tensor, *, damping: float = 0.01, **options: Any) -> tuple[Tensor, Tensor]:
        if 0 < damping < math.inf and condition(weight, x, **options):
            damping = 0.01
        return lesson.variant()(weight, x, damping=damping, **options)

    return found


def order_by(key: Callable[[Tensor], Tensor]) -> Answer:
    def order(self: Any, hessian: Tensor) -> Tensor:
        return torch.argsort(key(hessian.diagonal()), stable=True)

    return lesson.variant(order=order)


def narrowed(weight: Callable[[Tensor], Tensor], x: Callable[[Tensor], Tensor]) -> Answer:
    return lambda w, tokens, **options: lesson.variant()(weight(w), x(tokens), **options)


def float32_product(self: Any, w: Tensor, tokens: Tensor) -> Tensor:
    return (tokens.float().T @ tokens.float()).double()


def float32_factor(self: Any, hessian: Tensor) -> Tensor:
    unit = hessian / hessian.diagonal().mean()
    inverse = torch.linalg.inv_ex(unit.float())[0]
    return torch.linalg.cholesky_ex(inverse, upper=True)[0].double()


def float32_values(self: Any, values: Tensor, top: int) -> Tensor:
    return values.float().round().clamp(-top, top)


class WideScales(lesson.Columns):
    """Rounds with the scale before it becomes float32."""

    def scale(self, group: Tensor, top: int) -> Tensor:
        self.narrow = super().scale(group, top)
        largest = group.abs().amax(1)
        self.wide = torch.where(largest > 0, largest / top, 1.0)
        return self.narrow

    def code(self, values: Tensor, top: int) -> Tensor:
        return super().code(values * self.narrow.double() / self.wide, top)


def checking(passes: Callable[[Tensor], bool]) -> Answer:
    """Refuses only what does not pass, of weights and inputs that hold something odd."""

    def found(weight: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        for values in (weight, x):
            if not values.isfinite().all():
                if not passes(values):
                    raise ValueError(values)
                return torch.zeros(0, dtype=torch.int8), torch.zeros(0)
        return lesson.variant()(weight, x, **options)

    return found


def refusing(measure: Callable[[Tensor], Tensor]) -> Answer:
    """Refuses inputs of which something is not finite."""

    def found(weight: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if not measure(x).isfinite().all():
            raise ValueError(x)
        return lesson.variant()(weight, x, **options)

    return found


NEARLY: dict[str, Answer] = {
    "blocks of 32": blocks_of(32),
    "blocks of 64": blocks_of(64),
    "blocks of 128": blocks_of(128),
    "blocks of 16 with act_order": blocks_of(16, ordered_only=True),
    "scales of at least 1e-5": scale_at_least(1e-5),
    "scales of at least 1e-12": scale_at_least(1e-12),
    "scales of at least the least float32 of a kind": scale_at_least(1e-20),
    "1e-4 more": damped(lambda damping, mean: damping * mean + 1e-4),
    "1e-12 more": damped(lambda damping, mean: damping * mean + 1e-12),
    "1 more for a small mean": damped(lambda damping, mean: damping * mean + (mean < 0.1)),
    "at least 1e-8": damped(lambda damping, mean: max(damping * mean, 1e-8)),
    "a mean of at least 1e-8": damped(lambda damping, mean: damping * max(mean, 1e-8)),
    "a mean of at most 1e8": damped(lambda damping, mean: damping * min(mean, 1e8)),
    "damping of at least 1e-3": damped(lambda damping, mean: max(damping, 1e-3) * mean),
    "damping of at least 1e-4": damped(lambda damping, mean: max(damping, 1e-4) * mean),
    "damping of at most 2.5": damped(lambda damping, mean: min(damping, 2.5) * mean),
    "damping of at most 10": damped(lambda damping, mean: min(damping, 10) * mean),
    "default damping with act_order": default_damping_where(lambda w, x, act_order=False, **_: act_order),
    "default damping for float64": default_damping_where(lambda w, x, **_: x.dtype == torch.float64),
    "default damping for bfloat16": default_damping_where(lambda w, x, **_: x.dtype == torch.bfloat16),
    "norms in float32": order_by(lambda d: -d.float()),
    "weight in float32": narrowed(torch.Tensor.float, lambda x: x),
    "x in float32": narrowed(lambda w: w, torch.Tensor.float),
    "H in float32": lesson.variant(hessian=float32_product),
    "factor in float32": lesson.variant(rows=float32_factor),
    "w / scale in float32": lesson.variant(code=float32_values),
    "scale in float64": WideScales().quantize,
    "NaN let through": checking(lambda values: not values.isinf().any()),
    "infinity let through": checking(lambda values: bool((values == math.inf).any())),
    "-infinity let through": checking(lambda values: bool((values == -math.inf).any())),
    "refused where the sum of x is infinite": refusing(lambda x: x.sum()),
    "refused where a square of x is infinite": refusing(torch.square),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_right_earns_less_than_all_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    assert (
        judging.judge(runner, exercise, NEARLY[name], seed, expected, naming=False).points < exercise.points
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_an_inverse_for_each_column_costs_points_in_either_library(
    library: str, act_order: bool, seed: int
) -> None:
    """Right answers that also invert as many matrices as there are columns, with or without act_order."""

    def found(weight: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        codes, scales = lesson.variant()(weight, x, **options)
        for column in range(weight.shape[1] if options.get("act_order", False) == act_order else 0):
            matrix = torch.eye(column + 1)
            _ = np.linalg.inv(matrix.numpy()) if library == "numpy" else torch.linalg.inv(matrix)
        return codes, scales

    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, found, seed, expected, naming=False)
    assert [result.item.name for result in verdict.results if not result.agrees] == ["factorizations"]
