"""calibrate_clip against a dense search in float64 that quantizes value by value, and against its own trap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.calibrate_clip import Calibration, variant

found = find("calibrate_clip")
calibrate_clip = found.reference


def drawn(seed: int, tokens: int = 60, inputs: int = 8, outputs: int = 12) -> tuple[list[Tensor], Tensor]:
    """Three batches of unequal length whose values have long tails, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    x = x * x.abs()
    return list(x.split([tokens // 2, tokens // 3, tokens - tokens // 2 - tokens // 3])), torch.randn(
        outputs, inputs, generator=generator
    )


def output_error(batches: list[Tensor], weight: Tensor, clip: float, bits: int) -> float:
    """Squared change of the output in float64; each code is the nearest of all allowed ones, found by trying them."""
    top = 2 ** (bits - 1) - 1
    levels = torch.arange(-top, top + 1, dtype=torch.float64) * clip / top
    x = torch.cat([batch.double() for batch in batches])
    nearest = levels[(x.unsqueeze(2) - levels).abs().argmin(2)]
    return float((nearest @ weight.double().T - x @ weight.double().T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_no_candidate_has_less_error_in_float64(bits: int, steps: int, seed: int) -> None:
    batches, weight = drawn(seed)
    clip = calibrate_clip(batches, weight, bits=bits, steps=steps)
    assert (clip.shape, clip.dtype) == ((), torch.float32)
    largest = float(torch.cat(batches).abs().max())
    errors = [output_error(batches, weight, largest * i / steps, bits) for i in range(1, steps + 1)]
    place = float(clip) / largest * steps
    assert place == pytest.approx(round(place), rel=1e-6)
    # Sums of 720 squares in float32 are off by at most 720 * 2**-24 of themselves; a value next to a half may round to
    # the other side, which changes its own error hardly but its product with others': 1 % of the sum is ample.
    assert errors[round(place) - 1] <= min(errors) * 1.01


def test_a_dense_search_is_hardly_better_than_forty_candidates(seed: int) -> None:
    batches, weight = drawn(seed)
    clip = calibrate_clip(batches, weight, bits=4, steps=40)
    largest = float(torch.cat(batches).abs().max())
    dense = {
        clip: output_error(batches, weight, clip, 4) for clip in (largest * i / 800 for i in range(20, 801))
    }
    best = min(dense, key=lambda clip: dense[clip])
    # The candidate above the best clip is at most largest / 40 larger. It cuts no value more, and the squares of what
    # is rounded off grow as the square of the step, on average: hence a margin of a quarter.
    assert (
        output_error(batches, weight, float(clip), 4) <= dense[best] * (1 + largest / 40 / best) ** 2 * 1.25
    )


def test_with_long_tails_it_clips_and_is_better_than_not_clipping(seed: int) -> None:
    batches, weight = drawn(seed)
    clip = float(calibrate_clip(batches, weight, bits=3, steps=40))
    largest = float(torch.cat(batches).abs().max())
    assert clip < largest
    assert output_error(batches, weight, clip, 3) < output_error(batches, weight, largest, 3)


def test_batches_are_worth_their_tokens(seed: int) -> None:
    batches, weight = drawn(seed)
    together = calibrate_clip([torch.cat(batches)], weight, bits=4, steps=9)
    assert float(calibrate_clip(batches[::-1], weight, bits=4, steps=9)) == pytest.approx(float(together))


def test_the_least_error_of_the_input_is_the_trap_for_a_channel_that_the_layer_needs(seed: int) -> None:
    # A constructed channel: loud in a few tokens, and the layer weighs it ten times as much as the others.
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(400, 32, generator=generator), torch.randn(16, 32, generator=generator)
    x[:, 5] = 0
    x[:8, 5] = 25.0
    weight[:, 5] = 10.0
    chosen = float(calibrate_clip([x], weight, bits=4, steps=40))
    by_input = float(calibrate_clip([x], torch.eye(32), bits=4, steps=40))
    assert by_input < 0.7 * 25 < 0.9 * 25 <= chosen
    assert output_error([x], weight, chosen, 4) < 0.5 * output_error([x], weight, by_input, 4)


def test_equally_good_clips_give_the_largest(seed: int) -> None:
    batches, weight = drawn(seed)
    clip = float(calibrate_clip(batches, 0 * weight, bits=4, steps=10))
    # largest * 10 / 10 is rounded twice, each time by at most 2**-24 of itself.
    assert clip == pytest.approx(float(torch.cat(batches).abs().max()), rel=2.0**-23)


@pytest.mark.parametrize(
    ("batches", "weight", "bits", "steps", "said"),
    [
        ([torch.ones(2, 3)], torch.ones(4, 3), 1, 5, "bits is 1"),
        ([torch.ones(2, 3)], torch.ones(4, 3), 9, 5, "bits is 9"),
        ([torch.ones(2, 3)], torch.ones(4, 3), 4, 0, "steps 0"),
        ([], torch.ones(4, 3), 4, 5, "0 batches"),
        ([torch.zeros(2, 3)], torch.ones(4, 3), 4, 5, "no input but 0"),
        ([torch.ones(2, 4)], torch.ones(4, 3), 4, 5, r"\[2, 4\] beside a weight of \[4, 3\]"),
        ([torch.ones(0, 3)], torch.ones(4, 3), 4, 5, r"\[0, 3\]"),
        ([torch.ones(3)], torch.ones(4, 3), 4, 5, r"\[3\]"),
        ([torch.ones(2, 3)], torch.ones(3), 4, 5, r"\[3\]"),
        ([torch.full((2, 3), math.nan)], torch.ones(4, 3), 4, 5, "NaN or infinities"),
        ([torch.ones(2, 3)], torch.full((4, 3), math.inf), 4, 5, "NaN or infinities"),
    ],
)
def test_bad_input_is_refused_with_what_came(
    batches: list[Tensor], weight: Tensor, bits: int, steps: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        calibrate_clip(batches, weight, bits=bits, steps=steps)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Any, seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


Step = Callable[..., Any]


def refusing(is_bad: Callable[[Tensor], Any]) -> Step:
    """An answer that refuses by another test of each tensor."""

    def check_values(self: Any, batches: list[Tensor], weight: Tensor) -> None:
        if any(bool(is_bad(tensor)) for tensor in (weight, *batches)):
            raise ValueError("values")

    return variant(check_values=check_values)


def scaled_by(scale_of: Callable[[float], float]) -> Step:
    """An answer whose scale is another function of the right one."""

    def change(self: Any, x: Tensor, clip: float, bits: int) -> Tensor:
        return Calibration.change(self, x, scale_of(clip / self.top(bits)) * self.top(bits), bits)

    return variant(change=change)


def fewer_steps(most: int) -> Step:
    return lambda batches, weight, *, bits, steps: variant()(
        batches, weight, bits=bits, steps=min(steps, most)
    )


WRONG: dict[str, Step] = {
    "sum": refusing(lambda x: ~x.float().sum().isfinite()),
    "squares": refusing(lambda x: ~x.float().square().sum().isfinite()),
    "NaN alone": refusing(lambda x: x.isnan().any()),
    "Inf alone": refusing(lambda x: x.isinf().any()),
    "plus Inf and NaN": refusing(lambda x: (x.isnan() | (x == math.inf)).any()),
    "minus Inf and NaN": refusing(lambda x: (x.isnan() | (x == -math.inf)).any()),
    "first row": refusing(lambda x: ~x[0].isfinite().all()),
    "last row": refusing(lambda x: ~x[-1].isfinite().all()),
    **{
        f"scale above {floor}": scaled_by(lambda s, floor=floor: max(s, floor))
        for floor in (1e-5, 1e-11, 1e-30)
    },
    "epsilon added": scaled_by(lambda s: s + 1e-8),
    "scale below 1e6": scaled_by(lambda s: min(s, 1e6)),
    "zero below 1e-8": variant(
        check_largest=lambda self, x: Calibration.check_largest(self, x if x > 1e-8 else 0)
    ),
    "better by 1e-9": variant(is_better=lambda self, error, best: error < best - 1e-9),
    **{f"at most {most} steps": fewer_steps(most) for most in (14, 20, 100)},
    "ties away": variant(rounded=lambda self, codes: codes.sign() * (codes.abs() + 0.5).floor()),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_wrong_somewhere_loses_points(name: str, seed: int) -> None:
    assert points_of(WRONG[name], seed) < found.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(variant(), seed) == found.points
