"""Where to clip a layer's input before it is quantized, so that the layer's output changes least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import Rng, alternative, case, cost, excuse, exercise, mistake, raised

LIBRARY = (
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
    "fused_moving_avg_obs_fake_quant",
    "_fused_moving_avg_obs_fq_helper",
)
CACHEMASKS = (
    "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask",
)


@exercise(
    points=3,
    minutes=12,
    extension=True,
    forbid=(
        *(f"torch.{name}" for name in LIBRARY),
        *(f"torch.ops.aten.{name}" for name in (*LIBRARY, *CACHEMASKS)),
    ),
    hints=(
        "A lower clip rounds all values more finely and cuts a few; how much a cut value matters is not in the value "
        "but in the column of the weight that it meets. Try every candidate on all tokens, and look behind the layer.",
        "The candidates need the largest magnitude of all batches before the first of them can be tried, and the "
        "layer is linear: the change of the output is one product, of the change of the input.",
    ),
)
def calibrate_clip(batches: Sequence[Tensor], weight: Tensor, *, bits: int, steps: int) -> Tensor:
    """The clip for a layer's quantized input that changes the layer's output least;
    about 15 lines.

    The layer's output is x @ weight.T, weight [N, K]. batches hold calibration inputs
    [tokens, K], with different numbers of tokens; every token counts alike. All are of
    any floating dtype of at most 32 bits, any strides, and any magnitude at which
    float32 holds the output: calculate in float32, squares and their sum in float64.
    They may require grad; the result does not.

    With a clip c, top = 2**(bits - 1) - 1 and scale = c / top, an input x becomes code
    * scale, where code = x / scale, rounded to nearest, ties to even, and clamped to
    -top .. top. The weight stays as it is. A clip's error is the sum, over all tokens
    of all batches and all outputs, of the squared change of the output.

    Candidates are largest * i / steps for i = 1 .. steps, in float32, where largest is
    the largest magnitude in all batches. Returns the candidate with the least error,
    the largest of equally good ones: 0-dim, float32.

    ValueError, with what came: bits outside 2..8, steps below 1, no batches, a weight
    or a batch that is not [_, K] with one K and values, NaN or an infinity in one of
    them, inputs that are all 0.

    Cost (a sixth of the points): at most steps + 1 matrix products of the size of x @
    weight.T for each batch. Elementwise products are not among these; so all tensors
    made for a candidate may together take no more memory than T / 2 float32 matrices
    [N, K], T being the number of all tokens.
    """
    ### BEGIN SOLUTION
    if not 2 <= bits <= 8 or steps < 1:
        raise ValueError(f"bits is {bits} and steps {steps}; expected bits 2 to 8 and at least one step")
    for given in (weight, *batches):
        if given.dim() != 2 or given.numel() == 0 or given.shape[1] != weight.shape[1]:
            raise ValueError(
                f"found {list(given.shape)} beside a weight of {list(weight.shape)}; expected [_, K]"
            )
        if not torch.isfinite(given).all():
            raise ValueError("NaN or infinities in the weight or a batch; expected finite values")
    largest = max((batch.abs().max().item() for batch in batches), default=0)
    if largest == 0:
        raise ValueError(f"{len(batches)} batches and no input but 0; expected some to calibrate on")
    top, matrix = 2 ** (bits - 1) - 1, weight.float().T
    clips = torch.tensor([largest * i / steps for i in range(steps, 0, -1)])
    errors = torch.zeros(steps, dtype=torch.float64)
    for batch in batches:
        x = batch.float()
        for index, scale in enumerate(clips / top):
            change = (x / scale).round().clamp(-top, top) * scale - x
            errors[index] += (change @ matrix).double().square().sum().item()
    return clips[errors.argmin()]
    ### END SOLUTION


excuse(
    calibrate_clip,
    "max((batch.abs().max().item() for batch in batches), default=0) -> "
    "max((batch.abs().max().item() for batch in batches))",
    "The largest of nothing is a ValueError of Python's; ours says what was expected.",
)


# ---------------------------------------------------------------------------------------------------------- cases


MARGIN = 1.01


def is_clear(batches: Sequence[Tensor], weight: Tensor, bits: int, steps: int) -> bool:
    """Whether one candidate is better than any other by so much that no order of operations changes the choice."""
    top = 2 ** (bits - 1) - 1
    x = torch.cat([batch.double() for batch in batches])
    scales = x.abs().max() * torch.arange(1, steps + 1).double() / steps / top
    codes = (x / scales.view(-1, 1, 1)).round().clamp(-top, top)
    change = codes * scales.view(-1, 1, 1) - x
    errors = (change @ weight.double().T).square().sum((1, 2)).sort().values
    return bool(errors[1] > MARGIN * errors[0])


def clear(
    draw: Callable[[], tuple[list[Tensor], Tensor]], bits: int, steps: int
) -> tuple[list[Tensor], Tensor]:
    """Drawn batches and a weight for which one candidate is clearly best."""
    for _ in range(30):
        batches, weight = draw()
        if is_clear(batches, weight, bits, steps):
            break
    return batches, weight


def tailed(rng: Rng, *shape: int) -> Tensor:
    """Values most of which are small and a few are large."""
    values = rng.normal(*shape)
    return values * values.abs() ** 1.5


@case(calibrate_clip)
def long_tails(answer, rng):
    """Inputs with long tails, at 2, 3, 4 and 8 bits, and a layer that is not square."""
    found = {}
    for bits in (2, 3, 4, 8):
        steps, inputs, outputs = rng.integer(9, 14), rng.integer(6, 9), rng.integer(10, 16)

        def draw(inputs=inputs, outputs=outputs):
            return [tailed(rng, rng.integer(20, 40), inputs) for _ in range(2)], rng.normal(outputs, inputs)

        batches, weight = clear(draw, bits, steps)
        found[f"{bits} bits"] = answer(batches, weight, bits=bits, steps=steps)
    return found


@case(calibrate_clip)
def loud_channels(answer, rng):
    """A channel of the input that is far louder than the others: one that the layer needs, and one it ignores."""
    found = {}
    for name, factor in (("needed", 3.0), ("ignored", 0.0)):
        bits, steps, inputs, channel = 4, rng.integer(10, 14), 12, rng.integer(0, 11)

        def draw(factor=factor, inputs=inputs, channel=channel):
            weight, x = rng.normal(rng.integer(5, 9), inputs), rng.normal(50, inputs)
            weight[:, channel] *= factor
            x[:, channel] = rng.choice([-1, 1]) * rng.uniform(14, 20, 50) * (rng.uniform(0, 1, 50) < 0.3)
            return [x], weight

        batches, weight = clear(draw, bits, steps)
        found[name] = answer(batches, weight, bits=bits, steps=steps)
    return found


@case(calibrate_clip)
def unequal_batches(answer, rng):
    """Many quiet tokens and one loud one, batches that become louder, that become quieter, and that end loudly."""
    bits, steps = 3, rng.integer(10, 14)

    def lone():
        quiet, loud = rng.normal(rng.integer(80, 120), 8), 0.1 * rng.normal(1, 8)
        loud[0, rng.integer(0, 7)] = -rng.integer(11, 13)
        return rng.shuffled([quiet, loud]), rng.normal(11, 8)

    def growing():
        return [4.0**i * rng.normal(rng.integer(20, 30), 8) for i in range(3)], rng.normal(11, 8)

    def late():
        return [torch.cat([0.05 * rng.normal(260, 8), rng.normal(60, 8)])], rng.normal(11, 8)

    lone_batches, lone_weight = clear(lone, bits, steps)
    batches, weight = clear(growing, bits, steps)
    late_batches, late_weight = clear(late, bits, steps)
    return {
        "one loud token": answer(lone_batches, lone_weight, bits=bits, steps=steps),
        "louder and louder": answer(batches, weight, bits=bits, steps=steps),
        "quieter and quieter": answer(batches[::-1], weight, bits=bits, steps=steps),
        "loud tokens last": answer(late_batches, late_weight, bits=bits, steps=steps),
    }


@case(calibrate_clip)
def exact_clips(answer, rng):
    """Inputs that codes hold exactly at one clip, some half way between codes, beside a channel the layer ignores."""
    bits, steps = rng.integer(3, 6), rng.choice([101, 127, 151])
    top, place = 2 ** (bits - 1) - 1, rng.integer(20, 60)
    # Codes of these are exact where the scale is place: the clip is top * place, that is largest * place / steps.
    x, weight = rng.integers(-top, top, 40, 6).float() * place, rng.normal(7, 6)
    x[:, 0], weight[:, 0] = rng.choice([-1, 1]) * top * steps, 0
    # At clip 3 of 6 the ties 1/2 and 3/2 become 0 and 2, and their changes cancel in the output.
    odd = torch.tensor([[0.5, 1.5]] * 40 + [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]) * rng.choice([-1, 1])
    ties = torch.cat([odd, torch.full((43, 1), 6.0)], 1) * 2.0 ** rng.integer(-3, 3)
    equal = torch.tensor([[1.0, 1.0, 0.0]]) * rng.uniform(1, 2, 5, 1)
    return {
        "many candidates": answer([x], weight, bits=bits, steps=steps),
        "ties": answer([ties], equal, bits=3, steps=6),
    }


@case(calibrate_clip)
def any_magnitude(answer, rng):
    """The same inputs and weight, times powers of two: quiet inputs, loud inputs, a loud weight."""
    bits, steps = 3, rng.integer(9, 14)

    def draw():
        x = rng.normal(70, 8).abs()
        return list((x / x.max()).split([40, 30])), rng.uniform(0.1, 2, 40, 8)

    batches, weight = clear(draw, bits, steps)
    found = {}
    for name, loud, louder in (("quiet", -100, 0), ("loud", 123, -100), ("loud weight", -2, 122)):
        given = [batch * 2.0**loud for batch in batches]
        found[name] = answer(given, weight * 2.0**louder, bits=bits, steps=steps)
    return found


@case(calibrate_clip)
def nothing_to_choose(answer, rng):
    """A weight of zeros, one candidate, inputs that codes hold exactly, and a single value."""
    x, weight = tailed(rng, 20, 6), rng.normal(9, 6)
    bits = rng.integer(2, 8)
    exact = rng.integers(-1, 1, 30, 6).float() * 2.0 ** rng.integer(-3, 3)
    return {
        "zeros": answer([x, 0.5 * x], 0 * weight, bits=bits, steps=rng.integer(5, 20)),
        "one candidate": answer([x], weight, bits=bits, steps=1),
        "exact": answer([exact], weight, bits=bits, steps=rng.integer(4, 9)),
        "one value": answer([x[:1, :1]], weight[:1, :1], bits=bits, steps=rng.integer(4, 9)),
    }


@case(calibrate_clip)
def views_and_dtypes(answer, rng):
    """Transposed and narrow inputs and weights; such as require grad."""

    bits, steps = 4, rng.integer(9, 12)

    def draw():
        batches = [tailed(rng, 30, 8).bfloat16(), tailed(rng, 20, 8).half(), tailed(rng, 8, 25).T]
        return batches, rng.normal(8, 8).bfloat16().T

    batches, weight = clear(draw, bits, steps)
    # With 8 bits, clip 12 of 24 is 127 and holds a prime exactly; of the clips above it, bfloat16 arithmetic takes
    # some for exact.
    value = torch.tensor([[254.0, rng.choice([101.0, 103.0, 107.0, 109.0, 113.0])]]) * 2.0 ** rng.integer(
        -9, 9
    )
    narrow = (value * rng.choice([-1, 1])).repeat(5, 1).bfloat16().requires_grad_()
    ignoring = torch.tensor([[0.0, 1.0], [0.0, -2.0]]).bfloat16().requires_grad_()
    clip = answer([narrow], ignoring, bits=8, steps=24)
    return {
        "mixed": answer(batches, weight, bits=bits, steps=steps),
        "bfloat16": clip,
        "requires grad": getattr(clip, "requires_grad", None),
    }


@case(calibrate_clip)
def refusals(answer, rng):
    """Bits, steps, shapes and values that are not allowed, beside inputs as they should be."""
    bits, steps = 3, rng.integer(8, 12)
    batches, weight = clear(lambda: ([tailed(rng, 20, 5), tailed(rng, 30, 5)], rng.normal(7, 5)), bits, steps)
    found: dict[str, Any] = {"as it should be": answer(batches, weight, bits=bits, steps=steps)}
    for wrong in (0, 1, 9, 16):
        found[f"{wrong} bits"] = raised(answer, batches, weight, bits=wrong, steps=steps)
    for wrong in (0, -3):
        found[f"{wrong} steps"] = raised(answer, batches, weight, bits=bits, steps=wrong)
    for name, values in (
        ("NaN", [math.nan]),
        ("inf", [math.inf]),
        ("-inf", [-math.inf]),
        ("both", [math.inf, -math.inf]),
    ):
        for which, where in ((0, 0), (0, -2), (1, 0), (1, -2), (2, 0), (2, -2)):
            broken = [*batches, weight]
            broken[which] = broken[which].clone()
            broken[which].view(-1)[where:][: len(values)] = torch.tensor(values)
            found[f"{name} in {which} at {where}"] = raised(
                answer, broken[:2], broken[2], bits=bits, steps=steps
            )
    lists = {
        "no batches": [],
        "no tokens": [batches[0], torch.ones(0, 5)],
        "all zeros": [torch.zeros(3, 5), torch.zeros(2, 5)],
        "too narrow": [batches[0], torch.ones(3, 4)],
        "one value wide": [torch.ones(3, 1), batches[0]],
        "three dimensions": [torch.ones(2, 3, 5)],
        "one dimension": [torch.ones(5)],
    }
    for name, wrong_batches in lists.items():
        found[name] = raised(answer, wrong_batches, weight, bits=bits, steps=steps)
    for name, wrong_weight in (("flat", weight[0]), ("empty", weight[:0]), ("deep", weight[None])):
        found[f"{name} weight"] = raised(answer, batches, wrong_weight, bits=bits, steps=steps)
    return found


@cost(calibrate_clip, share=1 / 6)
def one_product_each(answer, rng):
    """Two batches and four candidates: multiplications and additions in matrix products, and the memory of all tensors
    that are made.
    """
    steps, inputs, outputs = 4, 48, 64
    batches, weight = clear(
        lambda: ([tailed(rng, 30, inputs), tailed(rng, 20, inputs)], rng.normal(outputs, inputs)), 4, steps
    )
    with TensorWork() as work:
        found = answer(batches, weight, bits=4, steps=steps)
    return {
        "observed": found,
        "FLOPs": (work.flops, (steps + 1) * 2 * 50 * inputs * outputs),
        "calls of torch's fake quantizers": (sum(n for name, n in work.calls.items() if "fake_q" in name), 0),
        "allocated bytes": (work.allocated_bytes, steps * 50 // 2 * 4 * inputs * outputs),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Calibration:
    """A right answer in small steps; a mistake replaces one of them."""

    def check_numbers(self, bits: int, steps: int) -> None:
        if bits not in range(2, 9) or steps <= 0:
            raise ValueError("numbers")

    def check_shapes(self, batches: Sequence[Tensor], weight: Tensor) -> None:
        shapes = [tensor.shape for tensor in (weight, *batches)]
        if len(shapes) == 1 or any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise ValueError("shapes")
        if len({shape[1] for shape in shapes}) > 1:
            raise ValueError("widths")

    def check_values(self, batches: Sequence[Tensor], weight: Tensor) -> None:
        if not all(math.isfinite(tensor.float().abs().max()) for tensor in (weight, *batches)):
            raise ValueError("not finite")

    def check_largest(self, largest: float) -> None:
        if largest <= 0:
            raise ValueError("zeros")

    def used(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return [batch.float() for batch in batches]

    def largest(self, batches: list[Tensor]) -> float:
        return max(max(batch.max().item(), -batch.min().item()) for batch in batches)

    def top(self, bits: int) -> int:
        return (1 << bits - 1) - 1

    def rounded(self, steps: Tensor) -> Tensor:
        return steps.round()

    def clamped(self, codes: Tensor, top: int) -> Tensor:
        return codes.clamp(-top, top)

    def change(self, x: Tensor, clip: float, bits: int) -> Tensor:
        scale = clip / self.top(bits)
        return x - scale * self.clamped(self.rounded(x / scale), self.top(bits))

    def behind(self, x: Tensor, change: Tensor, weight: Tensor) -> Tensor:
        return change @ weight.T

    def error(self, change: Tensor, x: Tensor, clip: float) -> float:
        return float(change.double().square().sum())

    def total(self, errors: list[float], batches: list[Tensor]) -> float:
        return sum(errors)

    def is_better(self, error: float, best: float) -> bool:
        return error < best

    def result(self, clip: float, bits: int) -> Any:
        return torch.tensor(clip)

    def calibrate(self, batches: Sequence[Tensor], weight: Tensor, *, bits: int, steps: int) -> Any:
        self.check_numbers(bits, steps)
        self.check_shapes(batches, weight)
        self.check_values(batches, weight)
        used, wide = self.used(batches), weight.float()
        largest = self.largest(used)
        self.check_largest(largest)
        best, best_clip = math.inf, largest
        for i in range(steps, 0, -1):
            clip, errors = largest * i / steps, []
            for x in used:
                change = self.behind(x, self.change(x, clip, bits), wide)
                errors.append(self.error(change, x, clip))
            total = self.total(errors, used)
            if self.is_better(total, best):
                best, best_clip = total, clip
        return self.result(best_clip, bits)


def variant(**steps: Any) -> Callable[..., Any]:
    """An answer with some steps replaced."""
    return type("Variant", (Calibration,), steps)().calibrate


@mistake(calibrate_clip, "Never clips: one loud value makes the steps of all others coarse.")
def largest_magnitude(batches, weight, *, bits, steps):
    def is_better(self, error, best):
        return math.isinf(best)

    return variant(is_better=is_better)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip, "Clips at a percentile of the magnitudes, which knows neither the bits nor the layer."
)
def percentile(batches, weight, *, bits, steps):
    variant()(batches, weight, bits=bits, steps=steps)
    values = torch.cat([batch.float() for batch in batches]).abs().flatten().sort().values
    return values[int(0.99 * (len(values) - 1))]


@mistake(calibrate_clip, "Clips at a percentile of the signed values: loud negative ones do not count.")
def percentile_of_signed_values(batches, weight, *, bits, steps):
    variant()(batches, weight, bits=bits, steps=steps)
    values = torch.cat([batch.float() for batch in batches]).flatten().sort().values
    return values[int(0.999 * (len(values) - 1))]


@mistake(
    calibrate_clip,
    "Minimises the error of the input: it cuts a channel that the layer weighs heavily, and spares one it ignores.",
)
def error_of_the_input(batches, weight, *, bits, steps):
    return variant(behind=lambda self, x, change, weight: change)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Calibrates on the first batch only.")
def first_batch_only(batches, weight, *, bits, steps):
    return variant(used=lambda self, batches: [batches[0].float()])(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Calibrates on the first 256 tokens of each batch only, to save time.")
def first_tokens_only(batches, weight, *, bits, steps):
    return variant(used=lambda self, batches: [batch.float()[:256] for batch in batches])(
        batches, weight, bits=bits, steps=steps
    )


@mistake(
    calibrate_clip, "Calibrates on the last batch only: each batch overwrites what the one before has found."
)
def last_batch_only(batches, weight, *, bits, steps):
    return variant(used=lambda self, batches: [batches[-1].float()])(batches, weight, bits=bits, steps=steps)


def each_alone(batches, weight, bits, steps):
    """The clips of the batches, each calibrated by itself; batches of zeros left out."""
    variant()(batches, weight, bits=bits, steps=steps)
    return torch.stack(
        [variant()([batch], weight, bits=bits, steps=steps) for batch in batches if batch.any()]
    )


@mistake(calibrate_clip, "Calibrates each batch by itself and takes the mean of their clips.")
def mean_of_clips(batches, weight, *, bits, steps):
    return each_alone(batches, weight, bits, steps).mean()


@mistake(calibrate_clip, "Calibrates each batch by itself and takes the largest of their clips.")
def largest_of_clips(batches, weight, *, bits, steps):
    return each_alone(batches, weight, bits, steps).max()


@mistake(
    calibrate_clip,
    "Averages the means of batches: the one token of a short batch counts as much as a hundred.",
)
def mean_of_means(batches, weight, *, bits, steps):
    def total(self, errors, batches):
        return sum(error / len(batch) for error, batch in zip(errors, batches, strict=True))

    return variant(total=total)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip, "Takes the candidates from the first batch's magnitudes, before it has seen the others."
)
def candidates_of_the_first_batch(batches, weight, *, bits, steps):
    def largest(self, batches):
        return batches[0].abs().max().item() or 1.0

    variant()(batches, weight, bits=bits, steps=steps)
    return variant(largest=largest)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip,
    "Counts the error of rounding only, not of cutting, or does not clamp codes at all: the smallest clip wins.",
)
def cut_values_left_out(batches, weight, *, bits, steps):
    def change(self, x, clip, bits):
        return Calibration.change(self, x, clip, bits) * (x.abs() <= clip)

    return variant(change=change)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Divides the clip by 2**(bits - 1), one more than the top code.")
def one_code_too_many(batches, weight, *, bits, steps):
    def change(self, x, clip, bits):
        scale = clip / 2 ** (bits - 1)
        return x - scale * (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    return variant(change=change)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Takes 2**bits - 1 steps on either side of zero: twice as many codes as there are.")
def twice_the_codes(batches, weight, *, bits, steps):
    return variant(top=lambda self, bits: 2**bits - 1)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Cuts fractions off where codes are rounded.")
def fraction_cut(batches, weight, *, bits, steps):
    return variant(rounded=lambda self, codes: codes.trunc())(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Adds magnitudes of changes, not squares: a few large ones weigh too little.")
def magnitudes_added(batches, weight, *, bits, steps):
    def error(self, change, x, clip):
        return float(change.abs().sum())

    return variant(error=error)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Looks at the largest change of an output, not at all of them.")
def largest_change(batches, weight, *, bits, steps):
    def error(self, change, x, clip):
        return float(change.abs().max())

    def total(self, errors, batches):
        return max(errors)

    return variant(error=error, total=total)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Adds up the changes before it squares: those of opposite signs cancel.")
def changes_cancel(batches, weight, *, bits, steps):
    def error(self, change, x, clip):
        return float(change.sum())

    def total(self, errors, batches):
        return sum(errors) ** 2

    return variant(error=error, total=total)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Divides a clip's error by the clip, so that coarse steps look good.")
def error_relative_to_the_clip(batches, weight, *, bits, steps):
    def error(self, change, x, clip):
        return float(change.double().square().sum()) / clip**2

    return variant(error=error)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Of equally good clips it takes the smallest.")
def smallest_of_equals(batches, weight, *, bits, steps):
    return variant(is_better=lambda self, error, best: error <= best)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Returns the scale, not the clip.")
def scale_returned(batches, weight, *, bits, steps):
    return variant(result=lambda self, clip, bits: torch.tensor(clip / self.top(bits)))(
        batches, weight, bits=bits, steps=steps
    )


@mistake(calibrate_clip, "Returns a Python number, not a tensor.")
def number_returned(batches, weight, *, bits, steps):
    return variant(result=lambda self, clip, bits: clip)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Calibrates on nothing: without batches, or with zeros, it makes up a clip of 1.")
def clip_made_up(batches, weight, *, bits, steps):
    def check_shapes(self, batches, weight):
        if batches:
            Calibration.check_shapes(self, batches, weight)

    def largest(self, batches):
        return (Calibration.largest(self, batches) if batches else 0.0) or 1.0

    return variant(check_shapes=check_shapes, largest=largest)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip, "Takes NaN and infinities as they come: no error is less than NaN, so nothing is clipped."
)
def values_unchecked(batches, weight, *, bits, steps):
    return variant(check_values=lambda self, batches, weight: None)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Takes any number of bits and steps.")
def numbers_unchecked(batches, weight, *, bits, steps):
    return variant(check_numbers=lambda self, bits, steps: None)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Finds NaN or an infinity by a sum of squares, which refuses loud inputs too.")
def finite_by_squares(batches, weight, *, bits, steps):
    def check_values(self, batches, weight):
        if not all(tensor.float().square().sum().isfinite() for tensor in (weight, *batches)):
            raise ValueError("not finite")

    return variant(check_values=check_values)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip, "Adds squares in float32: of loud outputs infinity, of quiet ones 0, for all candidates."
)
def squares_in_float32(batches, weight, *, bits, steps):
    def error(self, change, x, clip):
        return float(change.square().sum())

    return variant(error=error)(batches, weight, bits=bits, steps=steps)


@mistake(calibrate_clip, "Holds the scale above 1e-8: for quiet inputs all candidates are the same.")
def scale_held_above_a_floor(batches, weight, *, bits, steps):
    def change(self, x, clip, bits):
        return Calibration.change(self, x, max(clip, 1e-8 * self.top(bits)), bits)

    return variant(change=change)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip, "Calculates codes in the inputs' dtype: bfloat16 has no room for 8 bits and a fraction."
)
def codes_in_bfloat16(batches, weight, *, bits, steps):
    def change(self, x, clip, bits):
        found = Calibration.change(self, x, clip, bits)
        return found.float()

    def behind(self, x, change, weight):
        return change @ weight.float().T

    return variant(used=lambda self, batches: list(batches), change=change, behind=behind)(
        batches, weight, bits=bits, steps=steps
    )


@mistake(calibrate_clip, "Rounds ties up, not to the even code.")
def ties_up(batches, weight, *, bits, steps):
    return variant(rounded=lambda self, codes: (codes + 0.5).floor())(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip, "Returns a clip with the graph of its inputs, which is kept alive with all candidates."
)
def graph_kept(batches, weight, *, bits, steps):
    clip = variant()(batches, weight, bits=bits, steps=steps)
    return clip + 0 * sum(batch.float().abs().max() for batch in batches)


@mistake(
    calibrate_clip,
    "Leaves shapes that do not fit to the product, whose error is a RuntimeError or none at all.",
)
def shapes_unchecked(batches, weight, *, bits, steps):
    def check_shapes(self, batches, weight):
        if not batches:
            raise ValueError("no batches")

    return variant(check_shapes=check_shapes)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip,
    "Calculates both outputs for each candidate, although the exact one never changes: twice the work.",
)
def both_outputs_each_time(batches, weight, *, bits, steps):
    def behind(self, x, change, weight):
        return (x - change) @ weight.T - x @ weight.T

    return variant(behind=behind)(batches, weight, bits=bits, steps=steps)


@mistake(
    calibrate_clip,
    "Multiplies x and the weight elementwise and adds up, with a tensor [T, N, K], where a matrix product does it.",
)
def product_by_broadcasting(batches, weight, *, bits, steps):
    def behind(self, x, change, weight):
        return (change.unsqueeze(1) * weight).sum(2)

    return variant(behind=behind)(batches, weight, bits=bits, steps=steps)


@alternative(calibrate_clip, "Tries the candidates from the largest on, all batches each, and keeps the best")
def candidate_by_candidate(batches, weight, *, bits, steps):
    return Calibration().calibrate(batches, weight, bits=bits, steps=steps)


@alternative(
    calibrate_clip, "Never sees an output: the squared change is a quadratic form of weight.T @ weight"
)
def by_the_gram_matrix(batches, weight, *, bits, steps):
    gram = weight.double().T @ weight.double() if weight.dim() == 2 else None

    def error(self, change, x, clip):
        return float(((change.double() @ gram) * change).sum())

    return variant(behind=lambda self, x, change, weight: change, error=error)(
        batches, weight, bits=bits, steps=steps
    )


@alternative(calibrate_clip, "All tokens and all candidates at once")
def all_at_once(batches, weight, *, bits, steps):
    if not (2 <= bits <= 8 and steps >= 1 and batches) or weight.dim() != 2:
        raise ValueError("numbers or batches")
    if any(b.dim() != 2 or b.shape[1] != weight.shape[1] or not len(b) for b in batches) or not len(weight):
        raise ValueError("shapes")
    x, top = torch.cat([batch.detach().float() for batch in batches]), 2 ** (bits - 1) - 1
    if not (x.isfinite().all() and weight.isfinite().all()) or not x.any():
        raise ValueError("values")
    clips = (x.abs().amax().double() * torch.arange(1, steps + 1) / steps).float()
    scales = (clips / top).view(-1, 1, 1)
    changes = torch.clamp(torch.round(x / scales), -top, top) * scales - x
    errors = (changes @ weight.detach().float().T).double().square().flatten(1).sum(1)
    return clips[errors == errors.min()].max()
