"""The scale and the zero-point that map a tensor's range onto integer codes, with zero exactly on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import Rng, alternative, case, cost, excuse, exercise, mistake, raised

PARAMETER_FINDERS = ("_choose_qparams_per_tensor", "choose_qparams_optimized", "quantize_per_tensor_dynamic")


@exercise(
    points=3,
    minutes=8,
    forbid=(
        "torch.ao.quantization.observer.UniformQuantizationObserverBase",
        "torch.ao.quantization.utils.determine_qparams",
        *(f"{place}.{name}" for place in ("torch", "torch.ops.aten") for name in PARAMETER_FINDERS),
    ),
    hints=(
        "All you need of x are its two ends. Padding, masks and ReLU put exact zeros into tensors, so 0 has to be "
        "inside the range that is mapped, also where no value of x is near it.",
        "bits codes have 2**bits - 1 steps between them. The least and the largest value of a tensor carry its NaN and "
        "its infinities, so there is no need to look for those in a copy; and the difference of two float32 numbers "
        "can be infinite where both are not.",
    ),
)
def affine_parameters(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point that map the values of x onto integer codes of `bits` bits;
    about 12 lines.

    A code q stands for scale * (q - zero_point). Codes are lowest .. lowest + 2**bits -
    1, where lowest is -2**(bits - 1) for signed codes and 0 for unsigned ones. x has
    any shape, strides and floating dtype of at most 32 bits, and may require grad.
    Returns (scale, zero_point) for all of x: 0-dim tensors, float32 and int32, neither
    of which requires grad.

    symmetric=False: low = min(0, least value of x) and high = max(0, largest value of
    x), so that 0 is in the range. The distance from low to high is divided into the
    2**bits - 1 steps from the first code to the last: that is the scale; zero_point =
    lowest - low / scale, rounded to nearest, ties to even (torch.round).

    symmetric=True: the largest magnitude of x becomes code zero_point + 2**(bits - 1) -
    1, its negative the code as far on the other side, so the lowest code is not used.
    zero_point is the middle code, lowest + 2**(bits - 1).

    A scale below 2**-126, float32's smallest normal number, is replaced by 1: that of a
    tensor of zeros, for one. Every finite x has a finite scale.

    ValueError, with what came: bits outside 2..8, x without values, x with NaN or an
    infinity.

    Costs (a sixth of the points): x may be large. Allocate no tensor with more bytes
    than x has values; x.isfinite() and x.abs() write one as large as x.
    """
    ### BEGIN SOLUTION
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 2 to 8")
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}; expected at least one value")
    low, high = (end.item() for end in torch.aminmax(x))
    if not all(math.isfinite(end) for end in (low, high)):
        raise ValueError(f"x goes from {low} to {high}; expected finite values")
    lowest, half = -(2 ** (bits - 1)) if signed else 0, 2 ** (bits - 1)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / (half - 1) if symmetric else (high - low) / (2**bits - 1)
    if scale < 2**-126:
        scale = 1.0
    zero_point = lowest + half if symmetric else round(lowest - low / scale)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32)
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


KINDS = [(symmetric, signed) for symmetric in (False, True) for signed in (False, True)]


def settled(place: float) -> float:
    """A number of steps whose rounding no order of operations changes: at most 0.4 from an integer."""
    return round(place) + min(max(place - round(place), -0.4), 0.4)


def between(rng: Rng, low: float, high: float, *shape: int) -> Tensor:
    """Values in the middle four fifths of low .. high, and both ends among them; at least three values."""
    width = high - low
    values = rng.uniform(low + 0.1 * width, high - 0.1 * width, math.prod(shape))
    places = rng.shuffled(range(math.prod(shape)))
    values[places[0]], values[places[1]] = low, high
    return values.view(shape)


def over_zero(rng: Rng, bits: int, *shape: int) -> Tensor:
    """Values on both sides of zero, far more on one of them."""
    steps = 2**bits - 1
    share = rng.integer(8, 30) / 100
    place = settled(steps * (share if rng.integer(0, 1) else 1 - share))
    step = 2.0 ** rng.integer(-6, 4) * rng.integer(60, 100) / 77
    return between(rng, -step * place, step * (steps - place), *shape)


def every_kind(answer, x, bits):
    """The parameters of all four kinds of codes."""
    return {
        f"{bits} bits, {symmetric=}, {signed=}": answer(x, bits, symmetric=symmetric, signed=signed)
        for symmetric, signed in KINDS
    }


@case(affine_parameters)
def on_both_sides_of_zero(answer, rng):
    """Values on both sides of zero, at 2 to 8 bits, of 1 to 4 dimensions, signed and unsigned, symmetric and not."""
    found: dict[str, Any] = {}
    for bits in range(2, 9):
        shape = [rng.integer(2, 4) for _ in range(1 + bits % 4)] if bits % 4 else [rng.integer(3, 9)]
        found |= every_kind(answer, over_zero(rng, bits, *shape), bits)
    return found


@case(affine_parameters)
def on_one_side_of_zero(answer, rng):
    """All values positive, all negative, and not one of them near zero."""
    bits, near, far = rng.integer(3, 8), rng.integer(20, 40) / 10, rng.integer(50, 90) / 10
    values = between(rng, near, far, rng.integer(4, 30))
    return {
        "positive": every_kind(answer, values, bits),
        "negative": every_kind(answer, -values, bits),
        "from zero on": every_kind(answer, between(rng, 0.0, far, 12), bits),
        "up to zero": every_kind(answer, between(rng, -far, 0.0, 12), bits),
    }


@case(affine_parameters)
def constants_and_zeros(answer, rng):
    """One value, a constant, and zeros, beside a tensor of several values."""
    bits, value = rng.integer(2, 8), rng.integer(3, 900) / 7
    return {
        "one value": every_kind(answer, torch.tensor([value]), bits),
        "no dimensions": every_kind(answer, torch.tensor(-value), bits),
        "constant": every_kind(answer, torch.full((3, 5), value), bits),
        "negative constant": every_kind(answer, torch.full((4,), -value), bits),
        "zeros": every_kind(answer, torch.zeros(rng.integer(1, 9), 2), bits),
        "several values": every_kind(answer, over_zero(rng, bits, 10), bits),
    }


@case(affine_parameters)
def halfway_between_codes(answer, rng):
    """Ranges whose zero-point lies exactly halfway between two codes."""
    found: dict[str, Any] = {}
    for bits in (2, 3, rng.integer(4, 7), 8):
        steps, step = 2**bits - 1, 2.0 ** rng.integer(-5, 5)
        for odd in (0, 1):
            place = 2 * rng.integer(0, (steps - 1) // 2 - odd) + odd + 0.5
            x = between(rng, -step * place, step * (steps - place), rng.integer(3, 20))
            found |= {f"{name}, {odd}": given for name, given in every_kind(answer, x, bits).items()}
    return found


@case(affine_parameters)
def one_loud_value(answer, rng):
    """Hundreds of quiet values and one loud one; a view with other strides, which requires grad; narrow dtypes."""
    quiet, loud = 0.02 * rng.normal(40, 30), settled(rng.integer(30, 80) / 10)
    quiet[rng.integer(0, 39), rng.integer(0, 29)] = loud * (1 if rng.integer(0, 1) else -1)
    low, high = sorted((0.04 * rng.integer(1, 3), quiet.abs().max().item()))
    wide = rng.normal(9, 8) + 50
    wide[::2, 1::3] = between(rng, -low, high, 5, 3)
    exact = rng.choice([(-5.25, 9.75), (-3.75, 11.25), (-9.75, 5.25)])  # ends that every dtype holds
    narrow = between(rng, *(2.0 ** rng.integer(-3, 3) * end for end in exact), 24)
    small = between(rng, *(2.0**-17 * end for end in exact), 24)  # about 1e-4
    view = wide[::2, 1::3].T.requires_grad_()
    scales = [scale for scale, _ in every_kind(answer, view, rng.integer(4, 8)).values()]
    return {
        "loud": [answer(quiet, 8, symmetric=True, signed=signed) for signed in (True, False)],
        "view": scales,
        "require grad": [scale.requires_grad for scale in scales],
        "bfloat16": every_kind(answer, narrow.bfloat16(), 8),
        "float16": every_kind(answer, narrow.half(), 8),
        "small float16": every_kind(answer, small.half(), 8),
    }


@case(affine_parameters)
def huge_and_tiny(answer, rng):
    """Ranges wider than the largest float32 number, and scales at its smallest normal one."""
    bits = rng.integer(2, 8)
    steps, tiny = 2**bits - 1, 2.0**-126
    place = settled(steps * rng.integer(42, 58) / 100)
    step = 5.1e38 / steps
    at, below = torch.ones(1), torch.ones(1) * rng.integer(60, 90) / 100
    return {
        "huge": every_kind(answer, between(rng, -step * place / 4, step * (steps - place) / 4, 9) * 4, bits),
        "huge and positive": every_kind(answer, rng.uniform(1e38, 3e38, 9), bits),
        "smallest normal": answer(at * tiny * steps, bits, symmetric=False, signed=False),
        "smallest normal, symmetric": answer(
            at * tiny * (2 ** (bits - 1) - 1), bits, symmetric=True, signed=True
        ),
        "below": answer(-below * tiny * steps, bits, symmetric=False, signed=True),
        "below, symmetric": answer(-below * tiny * (2 ** (bits - 1) - 1), bits, symmetric=True, signed=False),
        "small": every_kind(answer, over_zero(rng, bits, 8) * 2.0**-60, bits),
    }


@case(affine_parameters)
def refusals(answer, rng):
    """Bits out of range, no values, NaN and infinities, beside x as it should be."""
    bits = rng.integer(2, 8)
    x = over_zero(rng, bits, 3, 7)
    bad = {"both infinities": x.clone()}
    bad["both infinities"][1, 2:4] = torch.tensor([math.inf, -math.inf])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (math.nan, math.inf, -math.inf):
            for place in (0, 10, 20):
                broken = x.to(dtype, copy=True)
                broken.view(-1)[place] = value
                bad[f"{value} at {place}, {dtype}"] = broken
    shape = rng.choice([(0,), (0, 4), (3, 0)])
    found = {"as it should be": every_kind(answer, x, bits)}
    for symmetric, signed in KINDS:
        kind: dict[str, Any] = {"symmetric": symmetric, "signed": signed}
        found[f"refused, {symmetric=}, {signed=}"] = {
            **{f"{wrong} bits": raised(answer, x, wrong, **kind) for wrong in (-1, 0, 1, 9, 16)},
            **{name: raised(answer, values, bits, **kind) for name, values in bad.items()},
            "no values": raised(answer, torch.empty(shape), bits, **kind),
        }
    return found


@cost(affine_parameters, share=1 / 6)
def no_copy_of_x(answer, rng):
    """Large tensors in float32, bfloat16 and float16: the largest tensor that is allocated."""
    x = between(rng, -5.25, 9.75, 32, 64)
    several = [x, x.bfloat16(), x.half()]
    with TensorWork() as work:
        found = [every_kind(answer, given, 8) for given in several]
    return {"observed": found, "largest tensor, bytes": (work.largest_tensor_bytes, x.numel())}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Fitting:
    """A right answer in small steps; a mistake replaces one of them."""

    smallest = 2.0**-126
    scale_dtype, zero_dtype = torch.float32, torch.int32

    def check_bits(self, bits: int) -> None:
        if bits < 2 or bits > 8:
            raise ValueError(f"{bits} bits")

    def check_values(self, x: Tensor) -> None:
        if not x.numel():
            raise ValueError("no values")

    def seen(self, x: Tensor) -> tuple[float, float]:
        return float(x.min()), float(x.max())

    def check_ends(self, low: float, high: float) -> None:
        if math.isnan(low) or math.isinf(low) or math.isinf(high):
            raise ValueError("not finite")

    def extended(self, low: float, high: float) -> tuple[float, float]:
        return min(low, 0.0), max(high, 0.0)

    def lowest(self, bits: int, signed: bool) -> int:
        return -(1 << bits - 1) if signed else 0

    def affine_scale(self, low: float, high: float, bits: int) -> float:
        return (high - low) / ((1 << bits) - 1)

    def symmetric_scale(self, low: float, high: float, bits: int) -> float:
        return max(abs(low), abs(high)) / ((1 << bits - 1) - 1)

    def usable(self, scale: float, low: float, high: float) -> float:
        return scale if scale >= self.smallest else 1.0

    def affine_zero(self, low: float, high: float, scale: float, lowest: int, bits: int) -> float:
        return round(lowest - low / scale)

    def symmetric_zero(self, lowest: int, bits: int) -> int:
        return lowest + (1 << bits - 1)

    def fit(self, x: Tensor, bits: int, *, symmetric: bool, signed: bool) -> tuple[Tensor, Tensor]:
        self.check_bits(bits)
        self.check_values(x)
        low, high = self.seen(x)
        self.check_ends(low, high)
        lowest = self.lowest(bits, signed)
        if symmetric:
            scale = self.usable(self.symmetric_scale(low, high, bits), low, high)
            zero: float = self.symmetric_zero(lowest, bits)
        else:
            low, high = self.extended(low, high)
            scale = self.usable(self.affine_scale(low, high, bits), low, high)
            zero = self.affine_zero(low, high, scale, lowest, bits)
        return torch.tensor(scale, dtype=self.scale_dtype), torch.tensor(zero, dtype=self.zero_dtype)


def variant(**steps: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """An answer with some steps replaced."""
    return type("Variant", (Fitting,), steps)().fit


@mistake(
    affine_parameters,
    "Maps the range of x as it is: where all values are on one side, the zero-point leaves the codes.",
)
def range_without_zero(x, bits, **kind):
    return variant(extended=lambda self, low, high: (low, high))(x, bits, **kind)


@mistake(
    affine_parameters,
    "Maps the range of x as it is and clamps the zero-point to the codes: values on one side of zero move by a "
    "constant.",
)
def zero_point_clamped_only(x, bits, **kind):
    def affine_zero(self, low, high, scale, lowest, bits):
        return min(max(round(lowest - low / scale), lowest), lowest + 2**bits - 1)

    return variant(extended=lambda self, low, high: (low, high), affine_zero=affine_zero)(x, bits, **kind)


@mistake(affine_parameters, "Leaves the zero-point a float, unrounded: zero falls between two codes.")
def zero_point_not_rounded(x, bits, **kind):
    def affine_zero(self, low, high, scale, lowest, bits):
        return lowest - low / scale

    return variant(affine_zero=affine_zero, zero_dtype=torch.float32)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Cuts the fraction of the zero-point off, as int() does: the codes are up to a whole step off at one end.",
)
def zero_point_cut(x, bits, **kind):
    def affine_zero(self, low, high, scale, lowest, bits):
        return int(lowest - low / scale)

    return variant(affine_zero=affine_zero)(x, bits, **kind)


@mistake(affine_parameters, "Rounds halves up, as adding 0.5 does, where torch.round takes the even one.")
def halves_up(x, bits, **kind):
    def affine_zero(self, low, high, scale, lowest, bits):
        return math.floor(lowest - low / scale + 0.5)

    return variant(affine_zero=affine_zero)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Divides the range by 2**bits, the number of codes; the steps between them are one fewer, so the top is cut off.",
)
def codes_for_steps(x, bits, **kind):
    return variant(affine_scale=lambda self, low, high, bits: (high - low) / 2**bits)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Divides the largest magnitude by 2**(bits - 1), a code that only the negative side has: the positive end is cut.",
)
def symmetric_by_128(x, bits, **kind):
    def symmetric_scale(self, low, high, bits):
        return max(abs(low), abs(high)) / 2 ** (bits - 1)

    return variant(symmetric_scale=symmetric_scale)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Divides twice the largest magnitude by all steps, as torch's observers do: code 127.5 would be needed.",
)
def symmetric_by_127_and_a_half(x, bits, **kind):
    def symmetric_scale(self, low, high, bits):
        return 2 * max(abs(low), abs(high)) / (2**bits - 1)

    return variant(symmetric_scale=symmetric_scale)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Takes half the distance from end to end for the largest magnitude: unless both ends are equally far from zero, "
    "the longer side is cut off.",
)
def symmetric_by_the_range(x, bits, **kind):
    def symmetric_scale(self, low, high, bits):
        return (high - low) / (2**bits - 2)

    return variant(symmetric_scale=symmetric_scale)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Takes the largest value, not the largest magnitude: loud negative values are cut off.",
)
def sign_kept(x, bits, **kind):
    def symmetric_scale(self, low, high, bits):
        return high / (2 ** (bits - 1) - 1)

    return variant(symmetric_scale=symmetric_scale)(x, bits, **kind)


@mistake(affine_parameters, "Divides by a scale of 0 where all values are 0: NaN.")
def zero_scale(x, bits, **kind):
    def affine_zero(self, low, high, scale, lowest, bits):
        return 0 if scale == 0 else round(lowest - low / scale)

    return variant(usable=lambda self, scale, low, high: scale, affine_zero=affine_zero)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Replaces a scale of exactly 0 only: below 2**-126 a scale loses its digits, and its inverse can be infinite.",
)
def only_zero_replaced(x, bits, **kind):
    return variant(usable=lambda self, scale, low, high: scale or 1.0)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Holds every scale above 2**-23, as torch's observers do: small tensors are rounded to zero.",
)
def scale_held_above_epsilon(x, bits, **kind):
    return variant(usable=lambda self, scale, low, high: max(scale, 2.0**-23))(x, bits, **kind)


@mistake(
    affine_parameters,
    "Adds 1e-8 to the scale against division by zero, so no scale is right and zeros get one of 1e-8.",
)
def epsilon_added(x, bits, **kind):
    return variant(usable=lambda self, scale, low, high: scale + 1e-8)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Gives every constant tensor scale 1, as if it were zeros: its value is rounded to an integer or cut off.",
)
def constants_get_one(x, bits, **kind):
    if x.numel() and x.min() == x.max():
        x = torch.zeros_like(x)
    return variant()(x, bits, **kind)


@mistake(
    affine_parameters, "Forgets that signed codes begin at -2**(bits - 1): the zero-point is that of 0 .."
)
def unsigned_always(x, bits, **kind):
    return variant(lowest=lambda self, bits, signed: 0)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Gives symmetric codes zero-point 0 even where they are unsigned: no negative value has a code.",
)
def symmetric_zero_always(x, bits, **kind):
    return variant(symmetric_zero=lambda self, lowest, bits: 0)(x, bits, **kind)


@mistake(affine_parameters, "Puts the zero-point on the wrong side: lowest + low / scale.")
def zero_point_mirrored(x, bits, **kind):
    def affine_zero(self, low, high, scale, lowest, bits):
        return round(lowest + low / scale)

    return variant(affine_zero=affine_zero)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Subtracts in float32, where the distance between two large numbers is infinite.",
)
def range_overflows(x, bits, **kind):
    def affine_scale(self, low, high, bits):
        return float(torch.tensor(high) - torch.tensor(low)) / (2**bits - 1)

    return variant(affine_scale=affine_scale)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Cuts off the outermost thousandth of the values as outliers, which is calibration's decision to make.",
)
def outliers_cut(x, bits, **kind):
    def seen(self, x):
        flat = x.float().flatten()
        return float(flat.quantile(0.001)), float(flat.quantile(0.999))

    def check_ends(self, low, high):
        if not math.isfinite(low + high):
            raise ValueError("not finite")

    return variant(seen=seen, check_ends=check_ends)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Passes over NaN and infinities with nan_to_num: a broken tensor gets parameters that look healthy.",
)
def not_finite_laundered(x, bits, **kind):
    def seen(self, x):
        clean = x.float().nan_to_num(nan=0.0)
        return float(clean.min()), float(clean.max())

    return variant(seen=seen)(x, bits, **kind)


@mistake(affine_parameters, "Refuses NaN but not infinities, whose scale is infinite.")
def infinities_accepted(x, bits, **kind):
    def check_ends(self, low, high):
        if math.isnan(low):
            raise ValueError("not finite")

    def affine_zero(self, low, high, scale, lowest, bits):
        return 0 if math.isinf(scale) else round(lowest - low / scale)

    return variant(check_ends=check_ends, affine_zero=affine_zero)(x, bits, **kind)


@mistake(
    affine_parameters, "Finds NaN or infinities by the sum, which large finite values make infinite too."
)
def finite_by_the_sum(x, bits, **kind):
    if x.numel() and not x.sum(dtype=torch.float32).isfinite():
        raise ValueError("not finite")
    return variant()(x, bits, **kind)


@mistake(
    affine_parameters,
    "Looks for NaN and infinities in float32 only: float16 overflows at 65,504, far sooner.",
)
def narrow_values_unchecked(x, bits, **kind):
    def check_ends(self, low, high):
        if x.dtype == torch.float32:
            Fitting.check_ends(self, low, high)

    return variant(check_ends=check_ends)(x, bits, **kind)


@mistake(affine_parameters, "Returns a scale that requires grad where x does, and keeps its graph.")
def graph_kept(x, bits, **kind):
    scale, zero_point = variant()(x, bits, **kind)
    return scale + 0 * x.min(), zero_point


@mistake(
    affine_parameters,
    "Takes any number of bits: with 1 there is no symmetric step, with 9 no byte holds a code.",
)
def bits_unchecked(x, bits, **kind):
    return variant(check_bits=lambda self, bits: None)(x, bits, **kind)


@mistake(affine_parameters, "Leaves the refusal of an empty tensor to torch, whose error is no ValueError.")
def empty_left_to_torch(x, bits, **kind):
    return variant(check_values=lambda self, x: None)(x, bits, **kind)


@mistake(affine_parameters, "Returns the scale in the dtype of x: 8 bits of it, where x is bfloat16.")
def scale_as_narrow_as_x(x, bits, **kind):
    return variant(scale_dtype=x.dtype)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Computes the scale in the dtype of x: rounded to 11 or 8 bits, it no longer reaches both ends.",
)
def scale_rounded_to_the_dtype_of_x(x, bits, **kind):
    def usable(self, scale, low, high):
        return Fitting.usable(self, torch.tensor(scale).to(x.dtype).item(), low, high)

    return variant(usable=usable)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Replaces scales below the smallest normal number of x's dtype: in float16 that is 6e-5, and values of an "
    "ordinary size become zeros.",
)
def floor_of_the_dtype_of_x(x, bits, **kind):
    return variant(smallest=torch.finfo(x.dtype).tiny)(x, bits, **kind)


@mistake(
    affine_parameters,
    "Makes a tensor as large as x on the way, a float32 copy or the magnitudes that isfinite and abs write: its two "
    "ends already carry NaN and infinity.",
)
def made_contiguous_float32(x, bits, **kind):
    return variant()(x.detach().float().contiguous(), bits, **kind)


@mistake(
    affine_parameters,
    "Takes a copy of x in float64 to find its ends: eight bytes a value, written and read again.",
)
def copies_made(x, bits, **kind):
    def seen(self, x):
        wide = x.double()
        return float(wide.min()), float(wide.max())

    return variant(seen=seen)(x, bits, **kind)


@alternative(affine_parameters, "Reads the ends in two passes and works in Python's floats")
def two_passes(x, bits, *, symmetric, signed):
    return Fitting().fit(x, bits, symmetric=symmetric, signed=signed)


@alternative(affine_parameters, "Sorts x in float64 and calculates in fractions", meets_costs=False)
def in_fractions(x, bits, *, symmetric, signed):
    if not (2 <= bits <= 8) or x.shape.numel() == 0 or not torch.isfinite(x).all():
        raise ValueError("bits, shape or values")
    ordered = x.double().flatten().sort().values
    low, high = Fraction(min(ordered[0].item(), 0.0)), Fraction(max(ordered[-1].item(), 0.0))
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else range(2**bits)
    middle = len(codes) // 2
    scale = Fraction(max(-low, high), middle - 1) if symmetric else Fraction(high - low, len(codes) - 1)
    scale = Fraction(1) if scale < Fraction(2) ** -126 else scale
    zero_point = codes[middle] if symmetric else round(codes[0] - low / scale)
    return torch.tensor(float(scale)), torch.tensor(zero_point, dtype=torch.int32)


for mutant in (
    "min(low, 0.0) -> min(0.0, low)",
    "max(high, 0.0) -> max(0.0, high)",
    "max(-low, high) -> max(high, -low)",
):
    excuse(
        affine_parameters, mutant, "The smaller or larger of two finite numbers is the same in either order."
    )
excuse(
    affine_parameters,
    "torch.tensor(scale, dtype=torch.float32) -> torch.tensor(scale)",
    "float32 is the default dtype wherever an answer is judged.",
)
