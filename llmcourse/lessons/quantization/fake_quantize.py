"""Fake quantization for training: rounded forward, and a gradient for the weight and for the scale backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork, reachable_bytes, saved_bytes
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised

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
    points=4,
    minutes=20,
    extension=True,
    forbid=(
        *(f"torch.{name}" for name in LIBRARY),
        *(f"torch.ops.aten.{name}" for name in (*LIBRARY, *CACHEMASKS)),
    ),
    hints=(
        "Write y = scale * clamp(round(x / scale), low, high) and differentiate it as if round were not there, once "
        "by x and once by scale; where the clamp holds, y is low * scale or high * scale.",
        "The derivative by scale has two terms inside the range, and their difference is what rounding did. It is "
        "summed over every value the scale serves, whatever the scale's shape, and only then divided.",
    ),
)
class fake_quantize(torch.autograd.Function):
    """Values of x as a quantizer of `bits` bits would give them back, trainable in x
    and in the scale; about 20 lines.

    fake_quantize.apply(x, scale, bits): x float32 or float64 of any shape with values
    and any strides, scale of x's dtype and of a shape that broadcasts to x's with as
    many dimensions ([N, 1] beside [N, K]: one a row; [1, K]; [1, 1]; [N, K]) or without
    dimensions, of any magnitude; bits an int, 2 to 8.
    Result: scale * clamp(round(x / scale), low, high) with low = -2^(bits - 1) and high
    = 2^(bits - 1) - 1, rounding to nearest, ties to even; shape and dtype of x. NaN in
    x stays NaN, and an infinity is clamped.

    Backward, for a gradient g of the result: rounding counts as if it were not there
    (straight through), clamping counts. "Inside" is low <= x / scale <= high, before
    rounding. x gets g inside, 0 outside. scale gets, in its own shape, the sum of g * d
    over the values it serves, over sqrt(count * high), count being how many it serves;
    d is round(x / scale) - x / scale inside, and low or high outside (LSQ, Esser et al.
    2020, equation 3 and section 2.2, where the edges themselves count as outside). bits
    gets none. A gradient nobody asks for is not computed: backward returns None in its
    place.

    forward raises ValueError for bits out of range, and where a scale is not positive
    and finite (0, negative, NaN: a training step went too far). Changing x or scale in
    place between forward and backward is an error that torch notices. Between the two
    no more is kept than x and scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ### BEGIN SOLUTION
        if bits not in range(2, 9):
            raise ValueError(f"bits is {bits}; expected 2 to 8")
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(
                "a scale is not positive and finite; lower its learning rate, or train its logarithm"
            )
        ctx.save_for_backward(x, scale)
        ctx.low, ctx.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return scale * (x / scale).round().clamp(ctx.low, ctx.high)
        ### END SOLUTION

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        ### BEGIN SOLUTION
        x, scale = ctx.saved_tensors
        ratio = x / scale
        clamped = ratio.clamp(ctx.low, ctx.high)
        inside = ratio == clamped
        for_x = torch.where(inside, gradient, 0.0) if ctx.needs_input_grad[0] else None
        for_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, ratio.round() - ratio, clamped)
            count = x.numel() / scale.numel()
            for_scale = (gradient * slope).sum_to_size(scale.shape) / (count * ctx.high) ** 0.5
        return for_x, for_scale, None
        ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def ends(bits):
    """Lowest and highest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def drawn(rng, bits, rows=5, n=9, shape=None, dtype=torch.float32):
    """x [rows, n] off every tie and off the edges, a fifth of it beyond them; scale of this shape; g.

    Codes on both sides of each end occur, and so do values between an edge and half a step beyond it.
    """
    low, high = ends(bits)
    scale = rng.uniform(0.05, 2.0, *((rows, 1) if shape is None else shape), dtype=dtype)
    code = rng.integers(low, high, rows, n)
    code = torch.where(rng.uniform(0, 1, rows, n) < 0.2, low - rng.integers(1, 3, rows, n), code)
    code = torch.where(rng.uniform(0, 1, rows, n) < 0.2, high + rng.integers(1, 3, rows, n), code)
    place = rng.uniform(0.05, 0.4, rows, n) * (2 * rng.integers(0, 1, rows, n) - 1)
    code[0, :4] = torch.tensor([low, low, high, high])
    place[0, :4] = torch.tensor([-0.3, 0.3, 0.3, -0.3])
    g = rng.normal(rows, n, dtype=dtype)
    if (
        scale.numel() == 1
    ):  # one sum for all: none of its terms cancels another, or rounding would be all that is left
        ratio = code + place
        g = g.abs() * torch.where((ratio < low) | (ratio > high), ratio, -place).sign().to(dtype)
    return (code + place).to(dtype) * scale, scale, g


def trained(answer, x, scale, bits, g):
    """Result and gradients of x and scale."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = answer.apply(x, scale, bits)
    y.backward(g)
    return {"y": y, "x": x.grad, "scale": scale.grad}


@case(fake_quantize)
def scale_of_each_row(answer, rng):
    """A scale a row, at 3 to 8 bits."""
    found = {}
    for bits in (3, 5, 6, 7, 8):
        x, scale, g = drawn(rng, bits)
        found[str(bits)] = trained(answer, x, scale, bits, g)
    return found


@case(fake_quantize)
def other_shapes_of_scale(answer, rng):
    """One scale for all, one a column, one a value; x of no, one, three and four dimensions; x with other strides."""
    found = {}
    for shape in ((), (1, 1), (1, 9), (5, 9)):
        x, scale, g = drawn(rng, 4, shape=shape)
        found[str(shape)] = trained(answer, x, scale, 4, g)
    x, scale, g = drawn(rng, 4, rows=6, n=8, dtype=torch.float64)
    batch = x.reshape(2, 3, 8), scale.reshape(2, 3, 1), 4, g.reshape(2, 3, 8)
    x, scale, g = drawn(rng, 4, rows=6, n=8)
    found["transposed"] = trained(answer, x.T, scale.T, 4, g.T)
    one = drawn(rng, 4, shape=())
    found["no dimensions"] = trained(answer, one[0][0, 5], one[1], 4, one[2][0, 5])
    found["one dimension"] = trained(answer, one[0][0], one[1].reshape(1), 4, one[2][0])
    x, scale, g = (part.reshape(5, 3, 3, 1) for part in drawn(rng, 4, shape=(5, 9)))
    of_channels = scale[:1, :, :1].contiguous()
    found["four dimensions"] = trained(answer, x / scale * of_channels, of_channels, 4, g)
    return {**found, "batch": trained(answer, *batch)}


@case(fake_quantize)
def two_bits(answer, rng):
    """2 bits, the fewest: codes -2 to 1; float64 in, float64 out, also for the gradients."""
    x, scale, g = drawn(rng, 2, dtype=torch.float64)
    return trained(answer, x, scale, 2, g)


@case(fake_quantize)
def ties_and_edges(answer, rng):
    """Values exactly half way between two codes, on the last codes, and far outside; tiny and huge scales."""
    bits = rng.integer(3, 6)
    low, high = ends(bits)
    scale = torch.tensor([[0.5], [2.0], [0.25]])
    ratio = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, low, high, low - 0.5, high + 0.5, 1e6, -1e6, 0.0])
    found = {}
    for power in (-118, 0, 90):
        loud = scale * 2.0**power
        found[f"times 2^{power}"] = trained(answer, ratio * loud, loud, bits, rng.normal(3, 13))
    # Of three scales x / scale is the last code, x times the reciprocal of the scale is more.
    drawn_scales = rng.uniform(0.05, 2.0, 1000, 1)
    x = drawn_scales * high
    beside = (x / drawn_scales == high) & (x * drawn_scales.reciprocal() > high)
    scale = drawn_scales[beside][:3, None]
    x = torch.cat([x[beside][:3, None], 1.3 * scale], dim=1)
    found["last code"] = trained(answer, x, scale, bits, rng.uniform(1, 2, 3, 2))
    return found


@case(fake_quantize)
def infinities(answer, rng):
    """Infinities in x, and values that are infinite over their scale, forward and backward."""
    x, scale, g = drawn(rng, 4)
    x[1, 1:3], x[3, 4:6] = torch.tensor([torch.inf, -torch.inf]), torch.tensor([3e38, -3e38])
    scale[3] *= 1e-3
    return trained(answer, x, scale, 4, g)


@case(fake_quantize)
def only_one_is_asked_for(answer, rng):
    """What backward computes when only x, or only the scale, is trained."""
    x, scale, g = drawn(rng, 4)
    found = {}
    for name, asked in (("x", (True, False)), ("scale", (False, True))):
        mine = x.clone().requires_grad_(asked[0]), scale.clone().requires_grad_(asked[1])
        y = answer.apply(*mine, 4)
        # The node in the graph is the ctx itself; the engine would hide what nobody asked for.
        found[name] = [y, *answer.backward(y.grad_fn, g)]
    return found


@case(fake_quantize)
def changed_between(answer, rng):
    """x, or the scale, changed in place before backward runs."""
    x, scale, g = drawn(rng, 4)
    found = {}
    for which in (0, 1):
        leaves = [part.clone().requires_grad_() for part in (x, scale)]
        mine = [leaf * 1 for leaf in leaves]
        y = answer.apply(*mine, 4)
        mine[which].mul_(1.5)
        found[f"argument {which}"] = [y.detach(), raised(y.backward, g)]
    return found


@case(fake_quantize)
def refused(answer, rng):
    """Bits out of range, a scale that is 0, negative, NaN or infinite, beside NaN and infinities in x."""
    x, scale, g = drawn(rng, 4)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf), 1):
        x[row, rng.integer(0, 8)] = value
    found = {f"{bits} bits": raised(answer.apply, x, scale, bits) for bits in (-1, 0, 1, 9, 16)}
    for bad in (0.0, -0.1, torch.nan, torch.inf, -torch.inf):
        for row in (0, 2, 4):
            one_bad = scale.clone()
            one_bad[row] = bad
            found[f"scale {bad} in row {row}"] = raised(answer.apply, x, one_bad, 4)
    return {"NaN and infinities in x": answer.apply(x, scale, 4), **found}


@cost(fake_quantize, share=1 / 6)
def kept_for_backward(answer, rng):
    """Bytes that stay between forward and backward, and calls of what is switched off."""
    x, scale, g = drawn(rng, 4, rows=4, n=64)
    x.requires_grad_(), scale.requires_grad_()
    with TensorWork() as work, saved_bytes() as kept:
        y = answer.apply(x, scale, 4)
    kept_bytes = kept.total_bytes + reachable_bytes(y.grad_fn)
    y.backward(g)
    return {
        "observed": [x.grad, scale.grad],
        "bytes kept for backward": kept_bytes,
        "calls of torch's fake quantizers": (sum(n for name, n in work.calls.items() if "fake_q" in name), 0),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


def accepted(scale, bits):
    """Lowest and highest code, where bits and scale are as they should be."""
    if not 2 <= bits <= 8:
        raise ValueError("bits")
    if not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError("scale")
    return ends(bits)


class Written(torch.autograd.Function):
    """What the wrong and unusual answers share."""

    @staticmethod
    def forward(ctx, x, scale, bits):
        ctx.low, ctx.high = accepted(scale, bits)
        ctx.save_for_backward(x, scale)
        return scale * (x / scale).round().clamp(ctx.low, ctx.high)

    @staticmethod
    def backward(ctx, gradient):
        return asked(ctx, gradients(ctx, gradient))


def within(ctx, ratio):
    return (ratio >= ctx.low) & (ratio <= ctx.high)


def gradients(ctx, gradient, *, for_x=within, for_scale=within, slope=None, reduced=None, factor=None):
    """Both gradients; a mistake replaces a mask, the slope inside, the sum or the factor."""
    x, scale = ctx.saved_tensors
    ratio = x / scale
    inner = (lambda ratio: ratio.round() - ratio) if slope is None else slope
    parts = gradient * torch.where(
        for_scale(ctx, ratio), inner(ratio), ratio.round().clamp(ctx.low, ctx.high)
    )
    summed = parts.sum_to_size(scale.shape) if reduced is None else reduced(parts, scale)
    count = x.numel() // scale.numel()
    over = (count * ctx.high) ** 0.5 if factor is None else factor(count, ctx.high)
    return [gradient * for_x(ctx, ratio), summed / over]


def asked(ctx, found):
    parts = [part if needed else None for part, needed in zip(found, ctx.needs_input_grad, strict=False)]
    return (*parts, None)


def with_gradients(**steps):
    """The right forward, and a backward with some steps replaced."""

    def backward(ctx, gradient):
        return asked(ctx, gradients(ctx, gradient, **steps))

    return staticmethod(backward)


@mistake(fake_quantize, "Rounding is differentiated as it is: x gets zero everywhere and never learns.")
class TrueGradient(Written):
    backward = with_gradients(for_x=lambda ctx, ratio: ratio != ratio)


@mistake(fake_quantize, "The gradient of x passes outside the range too, where moving x changes nothing.")
class PassesOutside(Written):
    backward = with_gradients(for_x=lambda ctx, ratio: ratio == ratio)


@mistake(fake_quantize, "The last codes count as outside: weights that sit exactly on them are stuck.")
class EdgeOutside(Written):
    backward = with_gradients(for_x=lambda ctx, ratio: (ratio > ctx.low) & (ratio < ctx.high))


@mistake(
    fake_quantize, "Asks the rounded value whether it is inside: up to half a step beyond the edge passes."
)
class RoundedMask(Written):
    backward = with_gradients(for_x=lambda ctx, ratio: within(ctx, ratio.round()))


@mistake(fake_quantize, "Only the upper end is clipped in the gradient of x.")
class UpperEndOnly(Written):
    backward = with_gradients(for_x=lambda ctx, ratio: ratio <= ctx.high)


@mistake(
    fake_quantize, "Takes the range for symmetric in the gradient: -high, not low, is where x stops learning."
)
class SymmetricMask(Written):
    backward = with_gradients(for_x=lambda ctx, ratio: ratio.abs() <= ctx.high)


@mistake(fake_quantize, "Divides x's gradient by the scale, and never multiplies by it.")
class OverScale(Written):
    @staticmethod
    def backward(ctx, gradient):
        found = gradients(ctx, gradient)
        return asked(ctx, [found[0] / ctx.saved_tensors[1], found[1]])


@mistake(fake_quantize, "The scale's slope inside is the code alone: the term of x / scale is missing.")
class CodeAsSlope(Written):
    backward = with_gradients(slope=torch.round)


@mistake(fake_quantize, "The scale's slope inside has the other sign: x / scale - round(x / scale).")
class SlopeNegated(Written):
    backward = with_gradients(slope=lambda ratio: ratio - ratio.round())


@mistake(fake_quantize, "The scale learns from the values inside alone; those it clips would ask it to grow.")
class ScaleFromInside(Written):
    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return asked(ctx, [gradients(ctx, gradient)[0], gradients(ctx, gradient * within(ctx, x / scale))[1]])


@mistake(
    fake_quantize,
    "The scale has the slope x / scale - round(x / scale) outside as well, as if nothing were clipped.",
)
class NoClipForScale(Written):
    backward = with_gradients(for_scale=lambda ctx, ratio: ratio == ratio)


@mistake(fake_quantize, "The scale's gradient is summed over the last dimension, whatever the scale's shape.")
class SumsRows(Written):
    @staticmethod
    def backward(ctx, gradient):
        rows = gradients(ctx, gradient, reduced=lambda parts, scale: parts.sum(-1, keepdim=True))
        return asked(ctx, rows)


@mistake(
    fake_quantize,
    "The scale's gradient is the mean over the values it serves, not the sum over sqrt(count * high).",
)
class MeanForScale(Written):
    backward = with_gradients(factor=lambda count, high: count)


@mistake(
    fake_quantize,
    "The scale's gradient is not divided: a row of 4,096 in 4 bits takes steps sqrt(4096 * 7) = 169 times too long.",
)
class NoFactor(Written):
    backward = with_gradients(factor=lambda count, high: 1)


@mistake(fake_quantize, "Counts all values of x in the factor, not those that one scale serves.")
class CountsAll(Written):
    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0]
        return asked(ctx, gradients(ctx, gradient, factor=lambda count, high: (x.numel() * high) ** 0.5))


@mistake(fake_quantize, "Takes -low for high in the factor.")
class LowInFactor(Written):
    backward = with_gradients(factor=lambda count, high: (count * (high + 1)) ** 0.5)


@mistake(fake_quantize, "Detaches the wrong term: the result is x clamped, and nothing is rounded.")
class NotRounded(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        ctx.low, ctx.high = accepted(scale, bits)
        ctx.save_for_backward(x, scale)
        return scale * (x / scale).clamp(ctx.low, ctx.high)


@mistake(fake_quantize, "Returns the codes, not the values: the scale is never multiplied back.")
class ReturnsCodes(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        return Written.forward(ctx, x, scale, bits) / scale


@mistake(fake_quantize, "Clamps to -high: the code -2^(bits - 1) is never used, at 2 bits one of four.")
class SymmetricCodes(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        Written.forward(ctx, x, scale, bits)
        return scale * (x / scale).round().clamp(-ctx.high, ctx.high)


@mistake(fake_quantize, "Rounds ties away from zero.")
class TiesAway(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        Written.forward(ctx, x, scale, bits)
        ratio = x / scale
        return scale * torch.copysign((ratio.abs() + 0.5).floor(), ratio).clamp(ctx.low, ctx.high)


@mistake(
    fake_quantize, "A scale that fell to 0 or below is moved up without a word, and training goes on with it."
)
class ClampsScale(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        bad = ~((scale > 0) & (scale < torch.inf))
        return Written.forward(ctx, x, torch.where(bad, 1e-8, scale) if bad.any() else scale, bits)


@mistake(fake_quantize, "Any number of bits is accepted, 1 and 16 too.")
class AnyBits(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        return Written.forward(ctx, x, scale, min(max(bits, 2), 8))


@mistake(fake_quantize, "NaN in x becomes 0: a diverged weight looks healthy.")
class LaundersNan(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        return Written.forward(ctx, x, scale, bits).nan_to_num(nan=0.0)


@mistake(fake_quantize, "Every gradient is computed and returned, whether or not it is asked for.")
class ComputesAll(Written):
    @staticmethod
    def backward(ctx, gradient):
        return (*gradients(ctx, gradient), None)


@mistake(
    fake_quantize, "Tensors are kept as attributes of ctx, so torch cannot notice that they were changed."
)
class KeepsAttributes(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        ctx.low, ctx.high = accepted(scale, bits)
        ctx.kept = x, scale
        return scale * (x / scale).round().clamp(ctx.low, ctx.high)

    @staticmethod
    def backward(ctx, gradient):
        class Kept:
            saved_tensors, low, high = ctx.kept, ctx.low, ctx.high

        return asked(ctx, gradients(Kept, gradient))


@mistake(
    fake_quantize,
    "Keeps the mask and the ratio beside x and scale, although backward can compute them again.",
)
class KeepsIntermediates(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        ctx.low, ctx.high = accepted(scale, bits)
        ratio = x / scale
        ctx.save_for_backward(x, scale, ratio, within(ctx, ratio))
        return scale * ratio.round().clamp(ctx.low, ctx.high)

    @staticmethod
    def backward(ctx, gradient):
        class Kept:
            saved_tensors, low, high = ctx.saved_tensors[:2], ctx.low, ctx.high

        return asked(ctx, gradients(Kept, gradient))


@mistake(fake_quantize, "Keeps x / scale as an attribute of ctx beside the saved tensors.")
class KeepsRatio(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        y = Written.forward(ctx, x, scale, bits)
        ctx.ratio = x / scale
        return y


@mistake(
    fake_quantize, "Masks x / scale by a product: 0 times infinity is NaN, and one infinity spoils a scale."
)
class MaskedByProduct(Written):
    @staticmethod
    def backward(ctx, gradient):
        def reduced(parts, scale):
            ratio = ctx.saved_tensors[0] / scale
            slope = ratio.round().clamp(ctx.low, ctx.high) - within(ctx, ratio) * ratio
            return (gradient * slope).sum_to_size(scale.shape)

        return asked(ctx, gradients(ctx, gradient, reduced=reduced))


@mistake(
    fake_quantize,
    "Multiplies by the reciprocal of the scale, which is rounded twice: values on the last code fall outside.",
)
class ByReciprocal(Written):
    backward = with_gradients(
        for_x=lambda ctx, ratio: within(ctx, ctx.saved_tensors[0] * ctx.saved_tensors[1].reciprocal())
    )


@mistake(fake_quantize, "Divides by scale + 1e-8: where scales are small, all codes are too low.")
class EpsilonAdded(Written):
    @staticmethod
    def forward(ctx, x, scale, bits):
        Written.forward(ctx, x, scale, bits)
        return scale * (x / (scale + 1e-8)).round().clamp(ctx.low, ctx.high)


@alternative(fake_quantize, "Lets autograd differentiate a clamp and a straight-through sum, inside backward")
class ByAutograd(Written):
    @staticmethod
    def backward(ctx, gradient):
        saved = [
            part.detach().requires_grad_(needed)
            for part, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        with torch.no_grad():
            ratio = saved[0] / saved[1]
            inside = within(ctx, ratio)
        with torch.enable_grad():  # an infinity that a clamp cuts would have the gradient 0 * infinity
            finite = torch.where(inside, saved[0], 0.0) / saved[1]
            clipped = torch.where(inside, finite, ratio.clamp(ctx.low, ctx.high))
            y = saved[1] * (clipped + (clipped.round() - clipped).detach())
        found = iter(torch.autograd.grad(y, [part for part in saved if part.requires_grad], gradient))
        for_x, for_scale = (next(found) if part.requires_grad else None for part in saved)
        count = saved[0].numel() // saved[1].numel()
        return for_x, None if for_scale is None else for_scale / (count * ctx.high) ** 0.5, None


@alternative(fake_quantize, "Slopes by masked sums of the code and of x / scale, in setup_context style")
class WithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(x, scale, bits):
        low, high = accepted(scale, bits)
        return torch.clamp(torch.round(x / scale), min=low, max=high) * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, bits = inputs
        ctx.save_for_backward(x, scale)
        ctx.low, ctx.high = ends(bits)

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        ratio = x / scale
        inside = (ratio >= ctx.low) & (ratio <= ctx.high)
        code = torch.clamp(torch.round(ratio), ctx.low, ctx.high)
        parts = gradient * (code - ratio.masked_fill(~inside, 0.0))
        dims = [d for d in range(x.dim()) if scale.dim() == 0 or scale.shape[d] == 1]
        summed = parts.sum(dim=dims, keepdim=True).reshape(scale.shape) if dims else parts
        return asked(ctx, [gradient * inside, summed * (scale.numel() / x.numel() / ctx.high) ** 0.5])
