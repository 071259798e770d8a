"""A linear layer for decoding: the weight is read once a token, so it is kept in 8 bits and read in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from llmcourse.counting import reachable_bytes
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, race, raised


@exercise(
    points=3,
    minutes=15,
    extension=True,
    forbid=("torch.quantize_per_tensor", "torch.quantize_per_channel"),
    hints=(
        "At one token every weight is read once and used once, so the time is that of reading it. Whatever writes a "
        "float matrix as large as the weight, at each call, reads and writes more than the codes saved.",
        "The kernel takes x in bfloat16, codes int8 [N, K], and scales [N] in bfloat16, and it wants the last "
        "dimension of x, and all of the codes, contiguous. With x in float32 it runs too, and takes ten times as long.",
    ),
)
def decode_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """y = x W^T with W in 8 bits, fast for a single token; about 10 lines.

    weight [N, K] float32 is quantized once, here, symmetrically: row n has the scale
    max|weight[n]| / 127, in float32, and the int8 codes weight[n] / scale, rounded to
    nearest, ties to even (torch.round). A row of zeros gives zeros; any other keeps its
    8 bits, loud or quiet, down to scales of 2^-126, the smallest normal float32.

    Returns run, and run(x), x [M, K] bfloat16 with M >= 1, returns y [M, N] bfloat16,
    where y[m, n] is scale[n] times the sum over k of codes[n, k] * x[m, k]. x is not
    quantized. The sum is in float32 or wider and is rounded to bfloat16 at the end; for
    the product, not for the codes, the scales may be rounded to bfloat16 too. Neither
    weight nor x need be contiguous. Both may require a gradient; y never does.

    The float weight is not kept: what its owner does to it after the call changes
    nothing, and several layers live side by side. ValueError from decode_linear when
    weight is not 2-D or empty, holds NaN or Inf, or when K is not a multiple of 16 (any
    N will do).

    torch.ops.aten._weight_int8pack_mm(x, codes, scales) multiplies codes as they are,
    with scales of the dtype of x. It does not look at K: for other widths it reads
    memory that is not the weight's. Nor does it look at where x begins: off a multiple
    of 32 bytes, which a view may be and a copy is not, it ends the process. No x in
    this exercise begins at such an address.

    For a sixth of the points: once weight is gone, the tensors that run keeps, whatever
    M it has met, have at most N * K + 4 * N bytes. For a quarter: run at M = 1 and 4096
    x 4096 is raced on one thread against a layer that keeps float32. Where the kernel
    above is r times as fast as that layer, run has to be r^0.75 times as fast at least
    (for r = 2.5 that is 2); quantizing is not timed.
    """
    ### BEGIN SOLUTION
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight {list(weight.shape)}; expected [N, K] with values in it")
    if weight.shape[1] % 16 != 0:
        raise ValueError(f"weight {list(weight.shape)}; expected a multiple of 16 inputs")
    weight = weight.detach()  # else the scales of a parameter keep it, through what autograd remembers
    scales = (weight.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    if not scales.isfinite().all():  # a maximum hands NaN and Inf on
        raise ValueError("weight holds NaN or Inf; no scale covers them")
    codes = (weight / scales[:, None]).round().to(torch.int8).contiguous()
    narrow = scales.bfloat16()

    def run(x: Tensor) -> Tensor:
        # A copy even of a contiguous view: the kernel ends the process where x is not at a multiple of 32 bytes.
        x = x.detach().clone(memory_format=torch.contiguous_format)
        return torch.ops.aten._weight_int8pack_mm(x, codes, narrow)

    return run
    ### END SOLUTION


excuse(
    decode_linear,
    "(weight.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny) -> weight.abs().amax(dim=1) / 127",
    "0 / 0 is NaN, and NaN cast to int8 is some integer on every machine: times the scale, 0, it is 0 again",
)


# ---------------------------------------------------------------------------------------------------------- cases


def a_layer(rng, outputs, inputs):
    """Normal rows [N, K] whose scales bfloat16 holds exactly, and no value near the middle of two codes.

    So that neither the dtype of the scales nor dividing against multiplying by 1/scale makes another code.
    """
    weight = rng.normal(outputs, inputs)
    scales = (weight.abs().amax(dim=1, keepdim=True) * 1.01 / 127).bfloat16().float()
    place = weight / scales
    weight = weight.masked_fill((place - place.floor() - 0.5).abs() < 1e-3, 0)
    loudest = torch.tensor([[rng.integer(0, inputs - 1)] for _ in range(outputs)])
    return weight.scatter(1, loudest, 127 * scales * rng.choice([1, -1]))


def tokens(rng, count, inputs):
    """x [M, K] in bfloat16."""
    return rng.normal(count, inputs, dtype=torch.bfloat16)


@case(decode_linear)
def one_token_and_several(answer, rng):
    """Normal weights, more outputs than inputs, fewer, and one; one token, several at once, and a long prompt."""
    wide, narrow = rng.integer(33, 40), rng.integer(5, 15)
    inputs, count = 16 * rng.integer(1, 2), rng.integer(3, 6)
    run, other = answer(a_layer(rng, wide, inputs)), answer(a_layer(rng, narrow, 3 * inputs))
    # One value has no others beside it, to whose size it is compared: its terms must not cancel.
    single = answer(a_layer(rng, 1, inputs).abs())
    return {
        "one": run(tokens(rng, 1, inputs)),
        "several": run(tokens(rng, count, inputs)),
        "twenty": run(tokens(rng, 20, inputs)),
        "a prompt": run(tokens(rng, rng.integer(130, 150), inputs)),
        "one, fewer outputs": other(tokens(rng, 1, 3 * inputs)),
        "several, fewer outputs": other(tokens(rng, count, 3 * inputs)),
        "one, one output": single(tokens(rng, 1, inputs).abs()),
        "several, one output": single(tokens(rng, count, inputs).abs()),
    }


@case(decode_linear)
def values_between_two_codes(answer, rng):
    """A loud weight in each row, which x does not use; the others lie within three steps, on ties and beside them."""
    inputs, outputs = 32, rng.integer(18, 24)
    steps = torch.tensor(
        [0.4, 0.498, 0.5, 0.502, 1.1, 1.499, 1.5, 1.501, 2.4, 2.498, 2.5, 2.501, 3.49, 3.5, 3.51, 0.0]
    )
    order = torch.tensor(rng.shuffled(range(inputs - 1)))
    values = torch.cat([steps, -steps[:-1]])[order] * rng.choice([1, -1])
    loud = 127.0 * (2 * rng.integers(0, 1, outputs, 1) - 1)
    weight = torch.cat([loud, values.expand(outputs, -1)], dim=1) * 2.0 ** rng.integers(-8, -2, outputs, 1)
    single = torch.eye(inputs, dtype=torch.bfloat16)[1:]
    run = answer(weight)
    return {
        **{f"{abs(value):g} steps": run(single[place : place + 1]) for place, value in enumerate(values)},
        "their differences": run(single[:-1] - single[1:]),
    }


@case(decode_linear)
def scales_that_bfloat16_does_not_hold(answer, rng):
    """Scales of 1.003 times a power of two; weights that their rounding to bfloat16 would move past a half."""
    inputs, outputs = 16, rng.integer(5, 9)
    steps = torch.tensor([127.0, *(step + 0.497 for step in range(1, inputs))])  # 1.5 / 1.003 is 1.4955
    signs = 1 - 2 * rng.integers(0, 1, outputs, inputs)
    run = answer(steps * signs * 1.003 * 2.0 ** rng.integers(-8, 2, outputs, 1))
    single = torch.eye(inputs, dtype=torch.bfloat16)
    return [run(single[place : place + 1]) for place in range(1, inputs)]


@case(decode_linear)
def loud_quiet_and_silent_rows(answer, rng):
    """A square weight with rows 2^123 times as loud, rows of a 2^118th and rows of zeros or next to them."""
    size = 32
    weight, x = a_layer(rng, size, size), tokens(rng, rng.integer(2, 4), size)
    order = torch.tensor(rng.shuffled(range(size)))
    weight[order[:4]] = weight[order[:4]].abs() * 2.0**123  # finite, and its sum is not
    weight[order[4:8]] *= 2.0**-118
    weight[order[8:10]] = 0
    weight[order[10]] *= 1e-44  # not zero, and its scale is
    run = answer(weight)
    y = run(x)
    return {
        "loud": run(x * 2.0**-8)[:, order[:4]],
        "quiet": y[:, order[4:8]],
        "silent": y[:, order[8:11]],
        "others": y[:, order[11:]],
        "one token": answer(weight)(x[:1])[:, order[11:]],
    }


@case(decode_linear)
def loud_channels_of_x(answer, rng):
    """Two channels of x are a thousand times as loud; their weights are zero, or cancel."""
    outputs, inputs, count = rng.integer(9, 15), 48, rng.integer(2, 4)
    weight, x = a_layer(rng, outputs, inputs), tokens(rng, count, inputs)
    first, second = rng.shuffled(range(inputs))[:2]
    x[:, first] = x[:, second] = 1000
    silent, cancelling = weight.clone(), weight.clone()
    silent[:, [first, second]] = 0
    cancelling[:, first] = weight.abs().amax(dim=1)
    cancelling[:, second] = -cancelling[:, first]
    return {"zero": answer(silent)(x), "cancel": answer(cancelling)(x)}


@case(decode_linear)
def long_sums(answer, rng):
    """Two thousand inputs of one sign: sums in a few bits stop growing, and sums in float16 overflow."""
    inputs, outputs = 2048, rng.integer(3, 5)
    scales = 2.0 ** rng.integers(-9, -5, outputs, 1)
    weight = rng.integers(60, 127, outputs, inputs) * scales
    weight[:, :1] = 127 * scales
    x = rng.uniform(1, 2, 2, inputs, dtype=torch.bfloat16)
    x[1, : inputs // 2] *= -1
    y = answer(weight)(x)
    return {"of one sign": y[:1], "half of them negative": y[1:]}


@case(decode_linear)
def weights_changed_after_the_call(answer, rng):
    """Two layers of one shape; their weights are overwritten before the first run and between two runs."""
    outputs, inputs = rng.integer(9, 15), 32
    weight, x = a_layer(rng, outputs, inputs), tokens(rng, 2, inputs)
    other = a_layer(rng, outputs, inputs)
    first, second = answer(weight), answer(other)
    weight.copy_(a_layer(rng, outputs, inputs))
    before = {"first": first(x), "second": second(x)}
    weight.copy_(a_layer(rng, outputs, inputs))
    other.mul_(-2)
    third = answer(other)
    return {**before, "first again": first(x), "second again": second(x), "third": third(x)}


# No x here begins off a multiple of 32 bytes: an answer that hands it on would end the learner's notebook.


@case(decode_linear)
def views_of_a_weight(answer, rng):
    """A weight that is transposed, cut out of something larger, or a parameter."""
    outputs, inputs = rng.integer(9, 15), 32
    weight, x = a_layer(rng, outputs, inputs), tokens(rng, rng.integer(3, 5), inputs)
    framed = torch.full((outputs + 2, inputs + 5), 9.0)
    framed[1:-1, 2:-3] = weight
    of_parameter = answer(torch.nn.Parameter(weight.clone()))(x)
    return {
        "parameter": of_parameter,
        "requires a gradient": of_parameter.requires_grad,
        "transposed": answer(weight.T.contiguous().T)(x),
        "cut": answer(framed[1:-1, 2:-3])(x),
    }


@case(decode_linear)
def views_of_tokens(answer, rng):
    """Tokens that are transposed, strided, or one token seen several times; tokens that require a gradient."""
    outputs, inputs, count = rng.integer(9, 15), 32, rng.integer(3, 5)
    run, x = answer(a_layer(rng, outputs, inputs)), tokens(rng, count, inputs)
    spread = torch.stack([x, -x], dim=2).flatten(1)
    traced = run(x.clone().requires_grad_())
    return {
        "x requires a gradient": traced.detach(),
        "and y does": traced.requires_grad,
        "transposed": run(x.T.contiguous().T),
        "strided": run(spread[:, ::2]),
        "one strided": run(spread[:1, ::2]),
        "expanded": run(x[:1].expand(count, -1)),
    }


BROKEN = [(value, place) for value in (torch.nan, torch.inf, -torch.inf) for place in (0, 100, -1)]


def broken(weight, value, place):
    """weight with one value replaced, at a place counted over all of it."""
    weight = weight.clone()
    weight.view(-1)[place] = value
    return weight


@case(decode_linear)
def refused_weights(answer, rng):
    """NaN, Inf, widths the kernel cannot read, tensors of nothing; beside them, layers that are right."""
    outputs = rng.integer(5, 15)
    weight, x = a_layer(rng, outputs, 48), tokens(rng, 2, 48)
    refused = {
        **{f"{value} at {place}": broken(weight, value, place) for value, place in BROKEN},
        "Inf beside -Inf": broken(broken(weight, torch.inf, 60), -torch.inf, 61),
        "8 inputs": weight[:, :8],
        "17 inputs": weight[:, :17],
        "40 inputs": weight[:, :40],
        "one dimension": weight[0],
        "three dimensions": weight[None],
        "no output": weight[:0],
        "no input": weight[:, :0],
    }
    return {
        "48 inputs": answer(weight)(x),
        "16 inputs": answer(weight[:, 16:32])(x[:, 16:32]),
        **{name: raised(answer, given) for name, given in refused.items()},
    }


class Storages(TorchDispatchMode):
    """Memory of all tensors that operations in a `with` block read or made; `kept_bytes` of it are still held."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, for a second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in (*args, result):
            if isinstance(value, Tensor):
                # A weak reference keeps the identity from being used again after the storage is freed.
                self._sizes[StorageWeakRef(value.untyped_storage())] = value.untyped_storage().nbytes()
        return result

    def kept_bytes(self) -> int:
        return sum(size for storage, size in self._sizes.items() if not storage.expired())


@cost(decode_linear, share=1 / 6)
def memory_of_a_layer(answer, rng):
    """The memory that a layer keeps after single tokens, and after several at once, when the float weight is gone."""
    outputs, inputs = 48, 64
    weight = a_layer(rng, outputs, inputs)
    with Storages() as storages:
        run = answer(weight)
        for _ in range(2):
            run(tokens(rng, 1, inputs))
        del weight
        kept_bytes = max(storages.kept_bytes(), reachable_bytes(run))
        for count in (2, 3, 20, 70, 1):
            run(tokens(rng, count, inputs))
        kept_later_bytes = max(storages.kept_bytes(), reachable_bytes(run))
    at_most = outputs * inputs + 4 * outputs
    return {
        "observed": run(tokens(rng, 1, inputs)),
        "kept, bytes": (kept_bytes, at_most),
        "kept after several tokens at once, bytes": (kept_later_bytes, at_most),
    }


# ----------------------------------------------------------------------------------------------------------- race

WIDTH, LAYERS, BLOCK_ROWS = 4096, 4, 256


def one_token(rng):
    """x [1, 4096] in bfloat16 with four loud channels, as activations have: in int8 it would lose the others."""
    x = rng.normal(1, WIDTH)
    x[:, rng.integers(0, WIDTH - 1, 4)] *= 30
    return x.bfloat16()


def float_linear(weight):
    """The layer in float32."""
    return lambda x: linear(x.float(), weight).bfloat16()


@race(
    decode_linear,
    inputs=one_token,
    baseline=float_linear,
    share=1 / 4,
    keeps=0.65,
    bytes_moved=WIDTH * WIDTH,
)
def a_token_of_a_large_layer(answer, rng):
    """A 4096 x 4096 layer, one token at a time, in turn on four copies of the layer, so that no cache holds it."""
    block = a_layer(rng, BLOCK_ROWS, WIDTH)
    runs = [answer(block.repeat(WIDTH // BLOCK_ROWS, 1)) for _ in range(LAYERS)]
    laps = 0

    def run(x):
        nonlocal laps
        laps += 1
        return runs[laps % LAYERS](x.clone())  # what came through a pipe may begin anywhere

    return run


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Quantizer:
    """A right answer in small steps; a mistake replaces one of them."""

    def __init__(self, weight: Tensor) -> None:
        self.refuse(weight)
        self.codes, self.scales = self.quantized(self.apart(weight))

    def refuse(self, weight: Tensor) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError("shape")
        self.refuse_width(weight)
        self.refuse_values(weight)

    def refuse_width(self, weight: Tensor) -> None:
        if weight.shape[1] % 16:
            raise ValueError("width")

    def refuse_values(self, weight: Tensor) -> None:
        if not torch.isfinite(weight).all():
            raise ValueError("NaN or Inf")

    def apart(self, weight: Tensor) -> Tensor:
        return weight.detach()

    def scale(self, weight: Tensor) -> Tensor:
        """[N, 1], or what broadcasts against weight."""
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def rounded(self, place: Tensor) -> Tensor:
        return torch.round(place)

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale(weight)
        return self.rounded(weight / scale).to(torch.int8).contiguous(), scale.flatten()

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self.scales.bfloat16())

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.detach())


def variant(**steps: Any) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """An answer with some steps replaced."""
    return type("Variant", (Quantizer,), steps)


@mistake(
    decode_linear,
    "Does not quantize: keeps the weight in float32 under another name, and reads four times the bytes.",
)
def float_kept(weight):
    Quantizer(weight)
    kept = weight.clone()
    return lambda x: linear(x.float(), kept).bfloat16()


@mistake(decode_linear, "Keeps the weight in bfloat16: half of the bytes, not a quarter.")
def bfloat16_kept(weight):
    Quantizer(weight)
    kept = weight.bfloat16()
    return lambda x: linear(x, kept)


@mistake(
    decode_linear,
    "Casts the weight to bfloat16 before it is quantized: what lay beside a tie lies on it, and rounds elsewhere.",
)
def quantized_from_bfloat16(weight):
    return Quantizer(weight.bfloat16().float())


@mistake(
    decode_linear,
    "Keeps the float weight beside the codes: the layer is fast, and takes five bytes a weight in memory, not one.",
)
def weight_kept_beside_the_codes(weight):
    run = Quantizer(weight)
    run.weight = weight.clone()
    return run


@mistake(
    decode_linear,
    "Keeps a float copy for several tokens at once, where a product of floats is faster: five bytes a weight from "
    "the first prompt on.",
)
def float_copy_for_several_tokens(weight):
    copies: list[Tensor] = []

    def product(self, x):
        if len(x) == 1:
            return Quantizer.product(self, x)
        if not copies:
            copies.append(self.codes.float() * self.scales[:, None])
        return linear(x.float(), copies[0]).bfloat16()

    return variant(product=product)(weight)


@mistake(
    decode_linear,
    "Leaves autograd on: with a parameter for a weight every result requires a gradient, and what is remembered "
    "for that holds a float matrix.",
)
def autograd_left_on(weight):
    return variant(apart=lambda self, weight: weight)(weight)


@mistake(
    decode_linear,
    "Leaves x in autograd: where it requires a gradient y does too, though the kernel has none to give.",
)
def gradient_of_x_left_on(weight):
    class Traced(Quantizer):
        def __call__(self, x):
            return self.product(x)

    return Traced(weight)


@mistake(
    decode_linear,
    "Quantizes at the first run: until then it holds on to a weight that is not its own, and that may have changed.",
)
def quantized_at_the_first_run(weight):
    Quantizer(weight)
    made: list[Quantizer] = []

    def run(x):
        if not made:
            made.append(Quantizer(weight))
        return made[0](x)

    return run


@mistake(
    decode_linear,
    "Quantizes anew in every run: it reads the float weight each time, which is what should not be read at all.",
)
def quantized_in_every_run(weight):
    Quantizer(weight)
    return lambda x: Quantizer(weight)(x)


LAST: list[Quantizer] = []


@mistake(decode_linear, "Keeps codes and scales in a global: the layer made last serves all layers.")
def layers_share_a_global(weight):
    LAST[:] = [Quantizer(weight)]
    return lambda x: LAST[0](x)


@mistake(
    decode_linear, "Divides the weight by its scales in place: its owner finds codes where weights were."
)
def weight_divided_in_place(weight):
    def quantized(self, weight):
        scale = self.scale(weight)
        return weight.div_(scale).round_().to(torch.int8).contiguous(), scale.flatten()

    return variant(quantized=quantized)(weight)


@mistake(decode_linear, "One scale for the whole weight: a loud row takes the bits of all others.")
def one_scale(weight):
    def scale(self, weight):
        return (weight.abs().amax() / 127).clamp_min(1e-38).expand(len(weight), 1)

    return variant(scale=scale)(weight)


@mistake(
    decode_linear,
    "A scale for each input, multiplied into x: a loud row takes the bits of quiet ones in every column.",
)
def a_scale_for_each_input(weight):
    Quantizer(weight)
    scale = (weight.abs().amax(dim=0) / 127).clamp_min(1e-38)
    codes, ones = (weight / scale).round().to(torch.int8).contiguous(), torch.ones(len(weight))
    return lambda x: torch.ops.aten._weight_int8pack_mm(
        (x * scale.bfloat16()).contiguous(), codes, ones.bfloat16()
    )


@mistake(
    decode_linear, "Multiplies x by the scales of the outputs: a square weight hides it, any other raises."
)
def scales_along_inputs(weight):
    def product(self, x):
        return linear(x.float() * self.scales, self.codes.float()).bfloat16()

    return variant(product=product)(weight)


@mistake(decode_linear, "Forgets the scales in the product: every row comes out equally loud.")
def scales_forgotten(weight):
    def product(self, x):
        ones = torch.ones_like(self.scales, dtype=torch.bfloat16)
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, ones)

    return variant(product=product)(weight)


@mistake(
    decode_linear, "Divides by 128, the number of negative codes: the largest weight gets code 128 and wraps."
)
def largest_weight_wraps(weight):
    def scale(self, weight):
        return (weight.abs().amax(dim=1, keepdim=True) / 128).clamp_min(1e-38)

    return variant(scale=scale)(weight)


@mistake(
    decode_linear,
    "Divides by 128 and clips at 127: the largest weight of each row comes out short, all others by another step.",
)
def largest_weight_clipped(weight):
    def scale(self, weight):
        return (weight.abs().amax(dim=1, keepdim=True) / 128).clamp_min(1e-38)

    return variant(scale=scale, rounded=lambda self, place: place.round().clamp(-128, 127))(weight)


@mistake(
    decode_linear,
    "Takes the largest value for the largest magnitude: rows whose loudest weight is negative are cut off.",
)
def largest_value_for_magnitude(weight):
    def scale(self, weight):
        return (weight.amax(dim=1, keepdim=True) / 127).clamp_min(1e-38)

    return variant(scale=scale, rounded=lambda self, place: place.round().clamp(-127, 127))(weight)


@mistake(decode_linear, "Quantizes to 4 bits: faster still, and another layer.")
def four_bits(weight):
    def scale(self, weight):
        return (weight.abs().amax(dim=1, keepdim=True) / 7).clamp_min(1e-38)

    return variant(scale=scale)(weight)


@mistake(decode_linear, "Casts to int8 without rounding: all weights shrink, by half a step on average.")
def truncated(weight):
    return variant(rounded=lambda self, place: place)(weight)


@mistake(decode_linear, "Adds a half and takes the floor: ties go up, not to even.")
def ties_rounded_up(weight):
    return variant(rounded=lambda self, place: (place + 0.5).floor())(weight)


@mistake(decode_linear, "Rounds half away from zero, as C's round does: ties do not go to even.")
def ties_rounded_away(weight):
    return variant(rounded=lambda self, place: place.sign() * (place.abs() + 0.5).floor())(weight)


@mistake(
    decode_linear,
    "Keeps the scale above 1e-5 against a division by 0: a quiet row has no codes left but 0.",
)
def scale_kept_from_zero(weight):
    def scale(self, weight):
        return (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-5)

    return variant(scale=scale)(weight)


@mistake(
    decode_linear,
    "Quantizes between minimum and maximum and forgets the zero-point: outputs are off by multiples of the sum of x.",
)
def zero_point_forgotten(weight):
    def quantized(self, weight):
        low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
        scale = ((high - low) / 255).clamp_min(1e-38)
        codes = ((weight - low) / scale - 128).round().clamp(-128, 127)
        return codes.to(torch.int8).contiguous(), scale.flatten()

    return variant(quantized=quantized)(weight)


@mistake(
    decode_linear,
    "Quantizes x as well, to use a product of integers: a loud channel takes the bits of all others.",
)
def activations_quantized(weight):
    def product(self, x):
        scale = x.float().abs().amax(dim=1, keepdim=True) / 127
        sums = torch._int_mm((x / scale).round().to(torch.int8), self.codes.T)
        return (sums * scale * self.scales).bfloat16()

    return variant(product=product)(weight)


@mistake(
    decode_linear,
    "Adds up in bfloat16, input by input: once the sum is 256 times what is added, it stands still.",
)
def added_up_in_bfloat16(weight):
    def product(self, x):
        total = torch.zeros(len(x), len(self.codes), dtype=torch.bfloat16)
        for term in (x[:, None] * self.codes).unbind(dim=2):
            total = total + term
        return (total * self.scales).bfloat16()

    return variant(product=product)(weight)


@mistake(decode_linear, "Serves the first token only: in a batch the others are lost.")
def first_token_only(weight):
    return variant(product=lambda self, x: Quantizer.product(self, x[:1]))(weight)


@mistake(decode_linear, "Returns float32, not the dtype of the activations.")
def result_in_float32(weight):
    return variant(product=lambda self, x: linear(x.float(), self.codes.float()) * self.scales)(weight)


@mistake(
    decode_linear, "Hands x to the kernel as it is: a view whose last dimension is not contiguous is refused."
)
def views_of_x_refused(weight):
    def product(self, x):
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales.bfloat16())

    return variant(product=product)(weight)


@mistake(
    decode_linear,
    "Keeps the codes in the layout of the weight: those of a transposed one are refused by the kernel.",
)
def layout_of_the_weight(weight):
    def quantized(self, weight):
        scale = self.scale(weight)
        return (weight / scale).round().to(torch.int8), scale.flatten()

    return variant(quantized=quantized)(weight)


@mistake(
    decode_linear,
    "Lets NaN and Inf through: int8 has neither, and an Inf makes the scale of its row infinite.",
)
def broken_values_let_through(weight):
    return variant(refuse_values=lambda self, weight: None)(weight)


@mistake(
    decode_linear,
    "Looks for NaN and Inf in the sum of the weight: large values are finite and their sum is not.",
)
def finite_by_the_sum(weight):
    def refuse_values(self, weight):
        if not weight.sum().isfinite():
            raise ValueError("NaN or Inf")

    return variant(refuse_values=refuse_values)(weight)


@mistake(
    decode_linear,
    "Does not look at K: for a width that is no multiple of 16 the kernel reads beyond the rows, without an error.",
)
def any_width_let_through(weight):
    return variant(refuse_width=lambda self, weight: None)(weight)


@mistake(
    decode_linear, "Asks for a multiple of 8 inputs: the kernel takes 16 at a time, and reads beyond 8 or 40."
)
def multiples_of_8_let_through(weight):
    def refuse_width(self, weight):
        if weight.shape[1] % 8:
            raise ValueError("width")

    return variant(refuse_width=refuse_width)(weight)


@alternative(decode_linear, "Two calls of the kernel, each on half of the rows")
def in_two_halves(weight):
    def product(self, x):
        x, half, scales = x.contiguous(), (len(self.codes) + 1) // 2, self.scales.bfloat16()
        parts = zip(self.codes.split(half), scales.split(half), strict=True)
        return torch.cat([torch._weight_int8pack_mm(x, codes, scale) for codes, scale in parts], dim=1)

    return variant(product=product)(weight)


@mistake(
    decode_linear,
    "Rounds the scales to bfloat16 before the codes are made: weights beside a half of a step get other codes.",
)
def scales_rounded_first(weight):
    def scale(self, weight):
        return Quantizer.scale(self, weight).bfloat16().float()

    return variant(scale=scale)(weight)


@alternative(decode_linear, "Multiplies with scales of 1 and scales the outputs afterwards")
def scaled_afterwards(weight):
    run = Quantizer(weight)
    ones, scales = torch.ones(len(weight), dtype=torch.bfloat16), run.scales.bfloat16()
    codes = run.codes
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.detach().contiguous(), codes, ones) * scales


@alternative(decode_linear, "Slow: turns the codes back into a float weight in every run")
def dequantized_in_every_run(weight):
    def product(self, x):
        return linear(x.float(), self.codes.float() * self.scales[:, None]).bfloat16()

    return variant(product=product)(weight)


@alternative(decode_linear, "Slow: turns the codes into bfloat16 in every run, which holds them exactly")
def codes_widened_in_every_run(weight):
    def product(self, x):
        return (linear(x, self.codes.bfloat16()) * self.scales).bfloat16()

    return variant(product=product)(weight)


@alternative(decode_linear, "Slow: the right kernel, with activations in float32")
def float32_into_the_kernel(weight):
    def product(self, x):
        return torch.ops.aten._weight_int8pack_mm(x.float().contiguous(), self.codes, self.scales).bfloat16()

    return variant(product=product)(weight)


@alternative(decode_linear, "Slow: a Python loop over the rows")
def row_by_row(weight):
    def product(self, x):
        x = x.float()
        return torch.stack([x @ row.float() for row in self.codes], dim=1).mul(self.scales).bfloat16()

    return variant(product=product)(weight)


@alternative(decode_linear, "Slow: keeps what the codes stand for, in float32", meets_costs=False)
def dequantized_once(weight):
    run = Quantizer(weight)
    kept = run.codes.float() * run.scales[:, None]
    return lambda x: linear(x.detach().float(), kept).bfloat16()


@alternative(decode_linear, "Slow: keeps what the codes stand for, in bfloat16", meets_costs=False)
def dequantized_once_to_bfloat16(weight):
    run = Quantizer(weight)
    kept = (run.codes.float() * run.scales[:, None]).bfloat16()
    return lambda x: linear(x.detach(), kept)
