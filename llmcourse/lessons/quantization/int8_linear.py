"""A linear layer that multiplies integers: int8 activations, a scale a token, times int8 weights, a scale an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised

QUANTIZERS = (
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_tensor_dynamic",
)


@exercise(
    points=3,
    minutes=12,
    forbid=(
        *(f"{place}.{name}" for place in ("torch", "torch.ops.aten") for name in QUANTIZERS),
        "torch.ops.aten.fake_quantize_per_channel_affine_cachemask",
        "torch.ops.aten.fake_quantize_per_tensor_affine_cachemask",
    ),
    hints=(
        "y[t, n] is a sum over k. Write x as code times scale and W as code times scale, and pull out of the sum what "
        "does not depend on k: that is why activations get a scale a token, and weights a scale an output.",
        "A token's scale comes from its largest magnitude, not its largest value, and may be 0. torch._int_mm wants "
        "int8 [T, K] and [K, N]; codes are [N, K].",
    ),
)
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a product of integers; about 12 lines.

    x [T, K] float32, bfloat16 or float16; codes [N, K] int8 (-128..127) with scales [N]
    float32: W[n, k] is scales[n] * codes[n, k]; bias [N] float32 or None. Returns y
    [T, N], always float32. K is at least 2 and no tensor need be contiguous.

    Each token t, a row of x taken as float32, is quantized by itself, symmetrically, to
    int8: its scale is max|x[t]| / 127, its codes are x[t] / scale, rounded to nearest,
    ties to even (torch.round). A token of zeros gives the bias alone; any other keeps
    its 8 bits, loud or quiet, down to scales of 2^-126, the smallest normal float32.
    The products are added up in int32, which holds 132,104 of them, and only the sums
    meet the scales. The bias stays what it is.

    ValueError when x or codes is empty, when x holds NaN or Inf, and when a shape is
    not as above (one token is [1, K]).

    For a third of the points: whatever T, K and N are, one call of torch._int_mm, which
    multiplies int8 [T, K] by int8 [K, N] into int32, is the only matrix product; and
    where codes has far more bytes than x and y, no tensor that is made has more.
    """
    ### BEGIN SOLUTION
    if x.dim() != 2 or codes.dim() != 2 or x.shape[1] != codes.shape[1] or scales.shape != codes.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)}, scales {list(scales.shape)} do not fit codes {list(codes.shape)}"
        )
    if bias is not None and bias.shape != scales.shape:
        raise ValueError(f"bias {list(bias.shape)}; expected {list(scales.shape)}")
    if x.numel() == 0 or codes.numel() == 0:
        raise ValueError(f"x {list(x.shape)} and codes {list(codes.shape)}; expected values in both")
    x = x.float()
    if not x.isfinite().all():
        raise ValueError("x holds NaN or Inf; no scale covers them")
    token_scales = (x.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    token_codes = (x / token_scales).round().to(torch.int8)
    # Of K = 1 torch 2.13 makes garbage on a CPU: it takes the strides of [1, N] for those of a transposed matrix.
    sums = torch._int_mm(token_codes, codes.T)
    y = sums * scales * token_scales  # one scale after the other: their product may be too small for float32
    return y if bias is None else y + bias
    ### END SOLUTION


excuse(
    int8_linear,
    "(x.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny) -> "
    "x.abs().amax(dim=1, keepdim=True) / 127",
    "0 / 0 is NaN, and NaN cast to int8 is some integer on every machine: times the scale, 0, it is 0 again",
)


# ---------------------------------------------------------------------------------------------------------- cases


def away_from_ties(x):
    """x [T, K] with 0 for what lies near the middle of two codes, where dividing and multiplying by 1/scale differ."""
    place = x.double() / x.double().abs().amax(dim=1, keepdim=True) * 127
    return x.masked_fill(((place - place.floor()) - 0.5).abs() < 1e-3, 0)


def a_weight(rng, outputs, inputs):
    """Codes [N, K] over all of int8, with a row for each end of it, and scales [N] that differ up to a hundredfold."""
    codes = rng.integers(-128, 127, outputs, inputs, dtype=torch.int8)
    return codes, 10 ** rng.uniform(-3, -1, outputs)


@case(int8_linear)
def white_tokens(answer, rng):
    """Normal values, without a bias and with one; a single token, a single output, two inputs and an odd number."""
    tokens, outputs, inputs = rng.integer(3, 6), rng.integer(7, 12), 2 * rng.integer(10, 16)
    x, bias = away_from_ties(rng.normal(tokens, inputs)), rng.normal(outputs)
    codes, scales = a_weight(rng, outputs, inputs)
    return {
        "without a bias": answer(x, codes, scales),
        "with a bias": answer(x, codes, scales, bias),
        "one token": answer(x[:1], codes, scales, bias),
        "one output": answer(x, codes[:1], scales[:1], bias[:1]),
        "one number": answer(x[:1], codes[:1], scales[:1]),
        "two inputs": answer(away_from_ties(x[:, :2]), codes[:, :2], scales, bias),
        "odd inputs": answer(away_from_ties(x[:, 1:]), codes[:, 1:], scales, bias),
    }


@case(int8_linear)
def as_many_tokens_as_channels(answer, rng):
    """A square weight, as many tokens as that, and two input channels that are 50 times as loud."""
    size = rng.integer(12, 16)
    x = rng.normal(size, size)
    x[:, rng.shuffled(range(size))[:2]] *= 50
    codes, scales = a_weight(rng, size, size)
    return {"y": answer(away_from_ties(x), codes, scales, rng.normal(size))}


@case(int8_linear)
def loud_quiet_and_silent(answer, rng):
    """Tokens 2^100 times as loud, tokens of a 2^100th, and tokens of zeros."""
    tokens, outputs, inputs = rng.integer(3, 5), rng.integer(6, 9), rng.integer(17, 24)
    x, bias = away_from_ties(rng.normal(tokens, inputs)), rng.normal(outputs)
    codes, scales = a_weight(rng, outputs, inputs)
    loudness = torch.tensor([2.0**100, 2.0**-100, 0.0]).repeat_interleave(tokens)[:, None]
    y = answer(torch.cat([x, x, x]) * loudness, codes, scales)
    return {
        "loud": y[:tokens],
        "quiet": y[tokens : 2 * tokens],
        "silent": y[2 * tokens :],
        "quiet with a bias": answer(x * 1e-2, codes, scales, bias * 1e-3),
        "silent with a bias": answer(x * 0, codes, scales, bias),
    }


@case(int8_linear)
def values_between_two_codes(answer, rng):
    """Scales that are powers of two, from 2^-126 to 2^120, so that halves are halves; the weight shows the codes."""
    inputs = rng.integer(14, 18)
    x = rng.integers(-126, 125, 6, inputs) + rng.choice([0.5, -0.5])
    x[:, 0] = torch.tensor([127.0, -127.0, 127.0, -127.0, -127.0, 127.0])
    x[4:] = x[4:].abs()  # finite, and its sum is not
    powers = torch.cat([rng.integers(-6, 6, 4, 1), torch.tensor([[-126], [120]])])
    x = (x * 2.0**powers).float()
    y = answer(x, torch.eye(inputs, dtype=torch.int8), torch.ones(inputs))
    # Two scales whose product is subnormal, and sums that make up for it.
    quiet = answer(x[4:5], torch.eye(inputs, dtype=torch.int8) * 127, torch.full((inputs,), 1e-3))
    return {"around 1": y[:4], "2^-126": y[4], "2^120": y[5], "2^-126, weights of a thousandth": quiet}


@case(int8_linear)
def many_inputs_of_one_sign(answer, rng):
    """Two thousand inputs, all of one sign in a token, and codes of one sign: the sums are as large as they can be."""
    inputs, outputs = rng.integer(1900, 2100), rng.integer(5, 7)
    x = away_from_ties(rng.uniform(0.5, 1, 3, inputs))
    x = x * torch.tensor([[1.0], [-1.0], [3.0]])
    codes = rng.integers(90, 127, outputs, inputs, dtype=torch.int8)
    codes[0] = -128
    return {"y": answer(x, codes, rng.uniform(1e-3, 1e-2, outputs))}


@case(int8_linear)
def narrow_floats_and_views(answer, rng):
    """Activations in bfloat16 and float16; then x and codes that are transposed or cut out of something larger."""
    tokens, outputs, inputs = rng.integer(3, 5), rng.integer(6, 9), rng.integer(18, 30)
    x = away_from_ties(rng.normal(tokens, inputs, dtype=torch.bfloat16))
    half = away_from_ties(
        (rng.normal(tokens, inputs) * 2.0**-12).half()
    )  # float16 holds such scales in 7 bits
    codes, scales = a_weight(rng, outputs, inputs)
    transposed = away_from_ties(rng.normal(inputs, tokens).T)
    return {
        "bfloat16": answer(x, codes, scales, rng.normal(outputs)),
        "float16": answer(half, codes, scales),
        "x transposed": answer(transposed, codes, scales),
        "codes cut": answer(transposed[:, 3:-2], codes[:, 3:-2], scales),
        "codes transposed": answer(transposed, codes.T.contiguous().T, scales),
    }


BROKEN = [(value, place) for value in (torch.nan, torch.inf, -torch.inf) for place in (0, 20, -1)]


def broken(x, value, place):
    """x with one value replaced, at a place counted over all of x."""
    x = x.clone()
    x.view(-1)[place] = value
    return x


@case(int8_linear)
def refused_inputs(answer, rng):
    """NaN, Inf, shapes that do not fit and tensors of nothing are refused; beside them, a layer that is right."""
    tokens, outputs, inputs = rng.integer(3, 5), rng.integer(6, 9), rng.integer(18, 30)
    x, bias = away_from_ties(rng.normal(tokens, inputs)), rng.normal(outputs)
    codes, scales = a_weight(rng, outputs, inputs)
    both = x.clone()
    both[1, :2] = torch.tensor([torch.inf, -torch.inf])
    arguments = {
        **{f"{value} at {place}": (broken(x, value, place), codes, scales) for value, place in BROKEN},
        "Inf beside -Inf": (both, codes, scales),
        **{
            f"{value} in {dtype}": (broken(x.to(dtype), value, 20), codes, scales)
            for value, place in BROKEN
            for dtype in (torch.bfloat16, torch.float16)
        },
        "x one number": (x[0, 0], codes, scales),
        "x one token": (x[0], codes, scales),
        "x too narrow": (x[:, 1:], codes, scales),
        "x in batches": (x[None], codes, scales),
        "codes one output": (x, codes[0], scales),
        "codes one number": (x, codes[0, 0], scales),
        "codes in batches": (x[:, :outputs], codes[None], scales[:1]),
        "codes in columns": (x, codes[..., None], scales),
        "scales a column": (x, codes, scales[:, None]),
        "scales a row": (x, codes, scales[None]),
        "one scale": (x, codes, scales[:1]),
        "bias too short": (x, codes, scales, bias[:1]),
        "bias a row": (x, codes, scales, bias[None]),
        "bias a column": (x, codes, scales, bias[:, None]),
        "no token": (x[:0], codes, scales),
        "no input": (x[:, :0], codes[:, :0], scales),
        "no output": (x, codes[:0], scales[:0]),
    }
    return {
        "y": answer(x, codes, scales, bias),
        **{name: raised(answer, *given) for name, given in arguments.items()},
    }


# Tokens, outputs, inputs; codes have far more bytes than x and y in all but the last.
LAYERS = [(4, 96, 64), (17, 160, 144), (3, 61, 51), (1, 40, 30), (2, 16, 2048), (34, 144, 288), (6, 1, 2)]


class Products(TensorWork):
    """Counts the products of two numbers in all calls of torch._int_mm as well."""

    integer_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._int_mm.default:
            self.integer_products += args[0].numel() * args[1].shape[1]
        return super().__torch_dispatch__(func, types, args, kwargs)


@cost(int8_linear, share=1 / 3)
def one_product_of_integers(answer, rng):
    """The matrix products of layers with larger weights, and the largest tensor that is made on the way."""
    observed, calls_off, short, other_flops, largest = [], 0, 0, 0, 0.0
    for tokens, outputs, inputs in LAYERS:
        x, bias = away_from_ties(rng.normal(tokens, inputs)), rng.normal(outputs)
        codes, scales = a_weight(rng, outputs, inputs)
        with Products() as work:
            observed.append(answer(x, codes, scales, bias))
        calls_off += work.calls["aten._int_mm"] != 1
        short += max(0, tokens * outputs * inputs - work.integer_products)
        other_flops += work.flops
        if outputs > 1:  # else x has more bytes than codes
            largest = max(largest, work.largest_tensor_bytes / codes.nbytes)
    return {
        "observed": observed,
        f"layers, of {len(LAYERS)}, without exactly one call of torch._int_mm": (int(calls_off), 0),
        "products of two numbers that torch._int_mm did not make": (short, 0),
        "operations in other matrix products": (other_flops, 0),
        "largest tensor made, in sizes of codes": (largest, 1),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Layer:
    """A right answer in small steps; a mistake replaces one of them."""

    def refuse(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        if x.dim() != 2 or codes.dim() != 2:
            raise ValueError("dimensions")
        outputs, inputs = codes.shape
        fits = x.shape[1] == inputs and scales.shape == (outputs,)
        if not fits or (bias is not None and bias.shape != (outputs,)):
            raise ValueError("shapes")
        if 0 in (*x.shape, *codes.shape):
            raise ValueError("empty")
        self.refuse_values(x)

    def refuse_values(self, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise ValueError("NaN or Inf")

    def widened(self, x: Tensor) -> Tensor:
        return x.float()

    def scale(self, x: Tensor) -> Tensor:
        """[T, 1], or what broadcasts against x."""
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.round(x / scale).to(torch.int8)

    def product(self, token_codes: Tensor, codes: Tensor) -> Tensor:
        return torch._int_mm(token_codes, codes.T)

    def scaled(self, sums: Tensor, token_scales: Tensor, scales: Tensor) -> Tensor:
        return sums.float() * token_scales * scales

    def biased(self, y: Tensor, bias: Tensor | None, token_scales: Tensor) -> Tensor:
        return y if bias is None else y + bias

    def forward(self, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
        self.refuse(x, codes, scales, bias)
        x = self.widened(x)
        token_scales = self.scale(x)
        sums = self.product(self.quantized(x, token_scales), codes)
        return self.biased(self.scaled(sums, token_scales, scales), bias, token_scales)


def variant(**steps: Any) -> Callable[..., Tensor]:
    """An answer with some steps replaced."""
    return type("Variant", (Layer,), steps)().forward


@mistake(
    int8_linear,
    "Fake quantization: widens both codes, to floats or to int32, and multiplies those. The numbers agree, but no int8 "
    "product runs, and W is written again at four times its bytes in every call: slower than a float layer.",
)
def widened_first(x, codes, scales, bias=None):
    layer = Layer()
    layer.refuse(x, codes, scales, bias)
    x = x.float()
    scale = layer.scale(x)
    weight = codes.float() * scales[:, None]
    return torch.nn.functional.linear(layer.quantized(x, scale).float() * scale, weight, bias)


@mistake(
    int8_linear,
    "Multiplies token by token: every token reads the whole weight again.",
)
def a_product_for_each_token(*arguments, **options):
    def product(self, token_codes, codes):
        return torch.cat([torch._int_mm(token[None], codes.T) for token in token_codes])

    return variant(product=product)(*arguments, **options)


@mistake(
    int8_linear,
    "Quantizes the weight only and multiplies floats: that is weight-only quantization, another method.",
)
def activations_left_alone(x, codes, scales, bias=None):
    Layer().refuse(x, codes, scales, bias)
    y = x.float() @ codes.float().T * scales
    return y if bias is None else y + bias


@mistake(
    int8_linear,
    "Adds up in int8, the dtype of the codes, as a product of two int8 tensors does: 127 times 127 already wraps.",
)
def added_up_in_int8(*arguments, **options):
    def product(self, token_codes, codes):
        return torch._int_mm(token_codes, codes.T).to(torch.int8)

    return variant(product=product)(*arguments, **options)


@mistake(
    int8_linear,
    "Adds up in int16: three products of 127 by 127 are more than 32,767, and the sum wraps.",
)
def added_up_in_int16(*arguments, **options):
    def product(self, token_codes, codes):
        return torch._int_mm(token_codes, codes.T).to(torch.int16)

    return variant(product=product)(*arguments, **options)


@mistake(
    int8_linear,
    "Adds up in float16, which misses integers from 2,049 on and has none above 65,504.",
)
def added_up_in_float16(*arguments, **options):
    def product(self, token_codes, codes):
        return torch._int_mm(token_codes, codes.T).half()

    return variant(product=product)(*arguments, **options)


@mistake(
    int8_linear,
    "One scale for all tokens: one loud token takes the bits from all others, and a token's result depends on what "
    "it is batched with.",
)
def one_scale_for_all_tokens(*arguments, **options):
    def scale(self, x):
        return (x.abs().amax() / 127).clamp_min(1e-38).expand(len(x), 1)

    return variant(scale=scale)(*arguments, **options)


@mistake(
    int8_linear,
    "A scale for each input channel of x: it depends on the summed index and cannot be taken out of the sum; their "
    "mean is no substitute.",
)
def a_scale_for_each_input(*arguments, **options):
    def scale(self, x):
        return (x.abs().amax(dim=0, keepdim=True) / 127).clamp_min(1e-38)

    def scaled(self, sums, token_scales, scales):
        return sums.float() * token_scales.mean() * scales

    return variant(scale=scale, scaled=scaled)(*arguments, **options)


@mistake(
    int8_linear,
    "Applies the scales of W along the tokens: with as many tokens as outputs nothing complains.",
)
def scales_along_tokens(*arguments, **options):
    def scaled(self, sums, token_scales, scales):
        return sums.float() * token_scales * scales[:, None]

    return variant(scaled=scaled)(*arguments, **options)


@mistake(
    int8_linear,
    "Multiplies x by the scales of W before it is quantized, as if they belonged to the inputs: a square weight "
    "hides it.",
)
def scales_along_inputs(*arguments, **options):
    def forward(self, x, codes, scales, bias=None):
        self.refuse(x, codes, scales, bias)
        x = x.float() * scales
        token_scales = self.scale(x)
        sums = self.product(self.quantized(x, token_scales), codes)
        return self.biased(sums.float() * token_scales, bias, token_scales)

    return variant(forward=forward)(*arguments, **options)


@mistake(int8_linear, "Forgets the scales of the tokens in the result: every token comes out equally loud.")
def token_scales_forgotten(*arguments, **options):
    return variant(scaled=lambda self, sums, token_scales, scales: sums.float() * scales)(
        *arguments, **options
    )


@mistake(
    int8_linear,
    "Takes codes from all of -128..127, with max|x| / 128: the largest value gets code 128, which int8 wraps to -128.",
)
def largest_value_wraps(*arguments, **options):
    def scale(self, x):
        return (x.abs().amax(dim=1, keepdim=True) / 128).clamp_min(1e-38)

    return variant(scale=scale)(*arguments, **options)


@mistake(
    int8_linear,
    "Divides max|x| by 128 and clips: the largest value of a token, the one that matters most, comes out 1/128 short.",
)
def largest_value_clipped(*arguments, **options):
    def scale(self, x):
        return (x.abs().amax(dim=1, keepdim=True) / 128).clamp_min(1e-38)

    def quantized(self, x, scale):
        return (x / scale).round().clamp(-128, 127).to(torch.int8)

    return variant(scale=scale, quantized=quantized)(*arguments, **options)


@mistake(
    int8_linear,
    "Takes the largest value for the largest magnitude: a token whose largest magnitude is negative overflows.",
)
def largest_value_for_magnitude(*arguments, **options):
    def scale(self, x):
        scale = x.amax(dim=1, keepdim=True) / 127
        return torch.where(scale == 0, 1.0, scale)

    def quantized(self, x, scale):
        return (x / scale).round().clamp(-127, 127).to(torch.int8)

    return variant(scale=scale, quantized=quantized)(*arguments, **options)


@mistake(
    int8_linear, "Casts to int8 without rounding: everything moves towards 0, by half a step on average."
)
def truncated(*arguments, **options):
    return variant(quantized=lambda self, x, scale: (x / scale).to(torch.int8))(*arguments, **options)


@mistake(int8_linear, "Adds a half and takes the floor: ties go up, not to even, and add a bias.")
def ties_rounded_up(*arguments, **options):
    return variant(quantized=lambda self, x, scale: (x / scale + 0.5).floor().to(torch.int8))(
        *arguments, **options
    )


@mistake(
    int8_linear,
    "Keeps the scale above 1e-5 against a division by 0: a quiet token has no codes left but 0.",
)
def scale_kept_from_zero(*arguments, **options):
    def scale(self, x):
        return (x.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-5)

    return variant(scale=scale)(*arguments, **options)


@mistake(
    int8_linear,
    "Adds 1e-8 to every scale against a division by 0: the codes of a quiet token shrink to a few.",
)
def scale_shifted(*arguments, **options):
    def scale(self, x):
        return x.abs().amax(dim=1, keepdim=True) / 127 + 1e-8

    return variant(scale=scale)(*arguments, **options)


@mistake(
    int8_linear,
    "Quantizes a token between its minimum and maximum and forgets the zero-point in the product: every output is "
    "off by the zero-point times the sum of its weights.",
)
def zero_point_forgotten(*arguments, **options):
    def scale(self, x):
        low, high = x.amin(dim=1, keepdim=True).clamp_max(0), x.amax(dim=1, keepdim=True).clamp_min(0)
        return ((high - low) / 255).clamp_min(1e-38)

    def quantized(self, x, scale):
        zero_point = (-128 - x.amin(dim=1, keepdim=True).clamp_max(0) / scale).round()
        return (x / scale + zero_point).round().clamp(-128, 127).to(torch.int8)

    return variant(scale=scale, quantized=quantized)(*arguments, **options)


@mistake(int8_linear, "Adds the bias to the integer sums, in units of the token's scale alone.")
def bias_among_the_sums(*arguments, **options):
    def forward(self, x, codes, scales, bias=None):
        self.refuse(x, codes, scales, bias)
        x = self.widened(x)
        token_scales = self.scale(x)
        sums = self.product(self.quantized(x, token_scales), codes)
        if bias is not None:
            sums = sums + (bias / token_scales).round().int()
        return self.scaled(sums, token_scales, scales)

    return variant(forward=forward)(*arguments, **options)


@mistake(
    int8_linear, "Rounds the bias to a multiple of the scales, as a bias in int32 is: a loud token loses it."
)
def bias_rounded(*arguments, **options):
    def forward(self, x, codes, scales, bias=None):
        self.refuse(x, codes, scales, bias)
        x = self.widened(x)
        token_scales = self.scale(x)
        sums = self.product(self.quantized(x, token_scales), codes).double()
        if bias is not None:
            sums = sums + (bias / (token_scales * scales).double()).round()
        return (sums * (token_scales * scales)).float()

    return variant(forward=forward)(*arguments, **options)


@mistake(int8_linear, "Forgets the bias.")
def bias_forgotten(*arguments, **options):
    return variant(biased=lambda self, y, bias, token_scales: y)(*arguments, **options)


@mistake(int8_linear, "Returns the dtype of x: bfloat16 throws away 16 of the bits that the sums had.")
def dtype_of_x(x, *arguments, **options):
    return variant()(x, *arguments, **options).to(x.dtype)


@mistake(
    int8_linear, "Computes scale and codes in the dtype of x: in bfloat16 a scale is off by up to 1/512."
)
def scale_in_bfloat16(*arguments, **options):
    return variant(widened=lambda self, x: x)(*arguments, **options)


@mistake(
    int8_linear,
    "Lets NaN and Inf through, or replaces them: int8 has neither, so they come out as numbers and nobody notices.",
)
def broken_values_let_through(*arguments, **options):
    return variant(refuse_values=lambda self, x: None)(*arguments, **options)


@mistake(
    int8_linear,
    "Looks for NaN alone: Inf makes the scale of its token infinite, and every code of it 0 or garbage.",
)
def infinities_let_through(*arguments, **options):
    def refuse_values(self, x):
        if x.isnan().any():
            raise ValueError("NaN")

    return variant(refuse_values=refuse_values)(*arguments, **options)


@mistake(
    int8_linear,
    "Looks for NaN and Inf in float32 only: float16 overflows at 65,504, far sooner.",
)
def narrow_values_unchecked(x, *arguments, **options):
    def refuse_values(self, _):
        if x.dtype == torch.float32:
            Layer.refuse_values(self, x)

    return variant(refuse_values=refuse_values)(x, *arguments, **options)


@mistake(
    int8_linear,
    "Multiplies both scales first: their product can be below 2^-126, where float32 loses bits, though y is not.",
)
def scales_multiplied_first(*arguments, **options):
    return variant(scaled=lambda self, sums, token_scales, scales: sums.float() * (token_scales * scales))(
        *arguments, **options
    )


@mistake(
    int8_linear,
    "Looks at two dimensions of the codes: what has a third or none ends in an error of torch's, no ValueError.",
)
def dimensions_of_codes_not_looked_at(x, codes, scales, bias=None):
    outputs, inputs = codes.shape[0], codes.shape[1]
    if x.dim() != 2 or x.shape[1] != inputs or scales.shape != (outputs,):
        raise ValueError("shapes")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError("bias")
    return variant(refuse=lambda self, *given: Layer.refuse(self, *given) if codes.dim() == 2 else None)(
        x, codes, scales, bias
    )


@mistake(
    int8_linear,
    "Looks for NaN and Inf in the sum of x: large values are finite and their sum is not, so right inputs are refused.",
)
def finite_by_the_sum(*arguments, **options):
    def refuse_values(self, x):
        if not x.float().sum().isfinite():
            raise ValueError("NaN or Inf")

    return variant(refuse_values=refuse_values)(*arguments, **options)


@mistake(
    int8_linear,
    "Does not look at shapes: one scale or one bias value serves all outputs by broadcasting, and nothing complains.",
)
def shapes_not_looked_at(*arguments, **options):
    def refuse(self, x, codes, scales, bias):
        if 0 in (*x.shape, *codes.shape):
            raise ValueError("empty")
        self.refuse_values(x)

    return variant(refuse=refuse)(*arguments, **options)


@alternative(
    int8_linear, "Turns the weight around once more, to multiply codes by tokens, and transposes the result"
)
def weight_first(*arguments, **options):
    return variant(product=lambda self, token_codes, codes: torch._int_mm(codes, token_codes.T).T)(
        *arguments, **options
    )


@alternative(
    int8_linear, "Multiplies by 127 / max|x|, and scales the sums by the product of both scales in float64"
)
def multiplied_by_the_inverse(*arguments, **options):
    def quantized(self, x, scale):
        largest = x.abs().amax(dim=1, keepdim=True)
        inverse = torch.where(largest == 0, 0.0, 127 / largest)
        return (x * inverse).round().clamp(-127, 127).to(torch.int8)

    def scaled(self, sums, token_scales, scales):
        return (sums.double() * token_scales.double() * scales).float()

    return variant(quantized=quantized, scaled=scaled)(*arguments, **options)


@alternative(int8_linear, "Copies the codes into the order of the product first, in int8")
def contiguous_codes(*arguments, **options):
    return variant(product=lambda self, token_codes, codes: torch._int_mm(token_codes, codes.T.contiguous()))(
        *arguments, **options
    )


@alternative(int8_linear, "Adds up in 64 bits, token by token", meets_costs=False)
def in_64_bits(*arguments, **options):
    def product(self, token_codes, codes):
        return torch.stack([(codes.long() * token).sum(dim=1) for token in token_codes])

    return variant(product=product)(*arguments, **options)


@alternative(int8_linear, "Multiplies in int32, for which the whole weight is widened", meets_costs=False)
def in_32_bits(*arguments, **options):
    return variant(product=lambda self, token_codes, codes: token_codes.int() @ codes.int().T)(
        *arguments, **options
    )
