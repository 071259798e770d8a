"""AWQ: columns that meet loud inputs are enlarged before a layer is rounded, by as much as its output likes best."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import Rng, alternative, case, cost, excuse, exercise, mistake, raised

Searched = tuple[Tensor, Tensor, Tensor]


@exercise(
    points=4,
    minutes=20,
    extension=True,
    hints=(
        "An enlarged column is rounded more finely for its size, and the others in its group more coarsely. How far "
        "to go is not calculated but tried: for each exponent quantize, undo the enlarging, and look at the output.",
        "The layer that runs computes with codes * scales / s. It is this that is compared with weight, after a "
        "product with x: the weights' own error is almost always least where s is 1.",
    ),
)
def awq_scales(
    weight: Tensor, x: Tensor, *, bits: int, group_size: int, steps: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """Find how much to enlarge each input's weights before rounding them, by the error
    of the output; about 25 lines.

    weight [N, K], x [T, K]: a layer [out, in] and the inputs it was calibrated with, of
    any float dtypes of 16 bits or more; both may require grad, but no result does. The
    layer that runs afterwards is (x / s) @ (codes * scales).T, and its output is to be
    near x @ weight.T.

    For each alpha = 0, 1/steps, 2/steps .. 1 let s = m^alpha, where m [K] is the mean
    of |x| over the tokens, a channel that is always zero counts as the quietest one
    that is not, and m is 1 if x is all zeros. s is divided by sqrt(largest s * smallest
    s) and made float32. weight * s is then quantized symmetrically in groups: a group
    is group_size neighbouring inputs of a row, the last may be shorter; its scale is
    its largest magnitude / (2^(bits-1) - 1) as float32, and 1 instead of 0; a code is
    the value over that float32 scale to the nearest integer, ties to even
    (torch.round).

    Of all alphas take the one with the least sum of squares of what the layer's outputs
    on x change by; the smallest such alpha on a tie. Calculate in float64, and round s
    and scales alone to float32. Returns (s float32 [K], codes int8 [N, K], scales
    float32 [N, ceil(K / group_size)]) of that alpha.

    Costs (a sixth of the points): the FLOPs of steps + 2 products of x with a matrix [K,
    N]. Elementwise products are not among these; so all tensors made for one alpha may
    together take no more memory than T / 2 float64 matrices [N, K]: do not make one for
    each token.

    ValueError for bits outside 2..8, group_size or steps below 1, a weight or x that is
    not a matrix, that is empty or holds NaN or infinity, or when their K differ.

    Lin et al. 2023 (arXiv 2306.00978), eq. 4-5.
    """
    ### BEGIN SOLUTION
    if not 2 <= bits <= 8 or group_size < 1 or steps < 1:
        raise ValueError(
            f"bits={bits}, group_size={group_size}, steps={steps}: expected 2..8, then at least 1"
        )
    if weight.dim() != 2 or x.shape[1:] != weight.shape[1:] or 0 in (*weight.shape, *x.shape):
        raise ValueError(
            f"weight {list(weight.shape)}, x {list(x.shape)}: expected [N, K] and [T, K], not empty"
        )
    if not (weight.isfinite().all() and x.isfinite().all()):
        raise ValueError("NaN or infinity in weight or x; expected finite values")
    w, tokens = weight.detach().double(), x.detach().double()
    loudness = tokens.abs().mean(0)
    live = loudness[loudness > 0]
    loudness = loudness.clamp(live.min()) if len(live) else torch.ones_like(loudness)

    least, top = math.inf, 2 ** (bits - 1) - 1
    for step in range(steps + 1):
        s = loudness ** (step / steps)
        s = (s / (s.max() * s.min()).sqrt()).float()
        groups = (w * s).split(group_size, 1)
        scales = torch.stack([group.abs().amax(1) for group in groups], 1).div(top).float()
        scales[scales == 0] = 1
        scale = scales.repeat_interleave(group_size, 1)[:, : len(s)]
        codes = (w * s / scale).round()
        error = (tokens @ (codes * scale / s - w).T).square().sum().item()
        if error < least:
            least, found = error, (s, codes.to(torch.int8), scales)
    return found
    ### END SOLUTION


excuse(
    awq_scales,
    "tokens.abs().mean(0) -> tokens.abs().sum(0)",
    "s is divided by the root of its ends' product, so that a factor common to all channels drops out.",
)
excuse(
    awq_scales,
    "(tokens @ (codes * scale / s - w).T).square().sum() -> (tokens @ (codes * scale / s - w).T).square().mean()",
    "Errors are only compared with each other, and all have the same number of terms.",
)


# ---------------------------------------------------------------------------------------------------------- cases


def loudness(rng: Rng, channels: int, loud: int) -> Tensor:
    """How loud each channel is: about 1, and 10 to 30 for some."""
    found = rng.uniform(0.4, 1.6, channels)
    for channel in rng.shuffled(range(channels))[:loud]:
        found[channel] *= rng.integer(10, 30)
    return found


@case(awq_scales)
def a_few_loud_channels(answer, rng):
    """A few inputs are ten to thirty times louder than the others; a scale a row, then groups."""
    rows, channels = rng.integer(9, 12), rng.integer(20, 24)
    weight, x = rng.normal(rows, channels), rng.normal(40, channels) * loudness(rng, channels, 2)
    return {
        "row": answer(weight, x, bits=3, group_size=channels, steps=8),
        "groups": answer(weight, x, bits=4, group_size=8),
    }


@case(awq_scales)
def correlated_inputs(answer, rng):
    """Inputs of which all follow a single one, so that errors add up or cancel; then some that are seldom loud."""
    channels = rng.integer(22, 26)
    found = {}
    for steps in (8, 9, 10, 11):
        # One row only: with many, what adds up in one and cancels in another evens out.
        x = rng.uniform(0.5, 2, 12, 1) * rng.normal(channels) * 2 ** rng.uniform(-3, 3, channels)
        found[f"{steps} steps"] = answer(rng.normal(1, channels), x, bits=3, group_size=8, steps=steps)
    x = rng.normal(30, channels) * loudness(rng, channels, 4)
    x[:27, ::5] *= 0.01
    return {**found, "row": answer(rng.normal(9, channels), x, bits=4, group_size=channels, steps=6)}


def planted(rng: Rng, steps: int, at: int, bits: int, *, quiet: float) -> tuple[Tensor, Tensor]:
    """A layer and its inputs for groups of 5, of which only alpha = at / steps leaves no error."""
    rows, groups, top = rng.integer(9, 12), 4, 2 ** (bits - 1) - 1
    loud = 2 ** rng.uniform(-3, 3, groups * 5, dtype=torch.float64)
    loud[:3] = loud.min() * quiet
    s = loud ** (at / steps)
    s = (s / (s.max() * s.min()).sqrt()).float()
    codes = rng.integers(-top, top, rows, groups, 5)
    codes[:, :, rng.integer(0, 4)] = top
    x = loud * (rng.integers(0, 1, 12, len(loud)) * 2 - 1)
    x[:, 1:3] = 0  # silent, and so as loud as the quietest
    return (codes * rng.uniform(0.5, 2, rows, groups, 1)).flatten(1) / s, x.float()


@case(awq_scales)
def all_the_way_or_not_at_all(answer, rng):
    """Weights that are small where inputs are loud, ones that are large there, and ones in between."""
    rows, channels = rng.integer(9, 12), rng.integer(18, 22)
    loud = 2 ** rng.uniform(-4, 4, channels)
    x, signs = rng.normal(40, channels) * loud, rng.uniform(0.8, 1, rows, channels)
    signs *= rng.integers(0, 1, rows, channels) * 2 - 1
    # Between 0 and 1 no multiple of 1/61 is one of anything coarser.
    between = planted(rng, 61, rng.integer(20, 50), 4, quiet=0.5)
    return {
        "against": answer(signs / loud**1.5, x, bits=6, group_size=channels, steps=9),
        "along": answer(signs * loud, x, bits=4, group_size=channels, steps=9),
        "between": answer(*between, bits=4, group_size=5, steps=61),
    }


def balanced(rng: Rng, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer, for 4 bits and groups of two, that alpha = 0 and 1 leave the same error but for `factor`; others more.

    Inputs of a group are as loud as 8 : 2, and s is 2^alpha, 2^-alpha. A group (1/4, 7) has its first weight rounded to
    0 before s^2 is 2, so an error of 8 * 1/4, and none where s^2 is 4. A group (7, 1) has none at 0, and 2 * 1 once its
    second weight is rounded to 0. One of the kinds is enlarged by the factor: the first, where that is above 1.
    """
    first, pairs = rng.integers(0, 1, 4, 3, 1), rng.integers(0, 1, 8, 3, 2) * 2 - 1
    kinds = torch.cat([first, 1 - first]).double()
    early = kinds * max(factor, 1.0) * torch.tensor([0.25, 7])
    late = (1 - kinds) / min(factor, 1.0) * torch.tensor([7.0, 1])
    x = torch.diag(torch.tensor([8.0, 2] * 3))
    return ((early + late) * pairs).flatten(1).to(dtype), x


@case(awq_scales)
def won_by_little(answer, rng):
    """The first alpha and the last are almost as good as each other, those between worse; few tokens are not 0."""
    # A prime number of steps: a coarser grid that begins at 0 does not reach 1.
    silent, steps = torch.zeros(2 * rng.integer(150, 170), 6), rng.choice([23, 29])
    options = {"bits": 4, "group_size": 2, "steps": steps}
    last, late = balanced(rng, 1 + 2**-12, torch.float32)
    first, also_late = balanced(rng, 1 / (1 + 2**-12), torch.float32)
    exact, early = balanced(rng, 1 + 2**-30, torch.float64)
    return {
        "last": answer(last, torch.cat([silent, late]), **options),
        "first": answer(first, torch.cat([silent, also_late]), **options),
        "in float64": answer(exact, torch.cat([early, silent]), **options),
    }


@case(awq_scales)
def zeros_and_units(answer, rng):
    """Channels that are silent or almost so, rows and groups of zeros, nothing but zeros, in units of any size."""
    rows, channels = rng.integer(9, 12), 20
    weight, x = rng.normal(rows, channels), rng.normal(40, channels) * loudness(rng, channels, 2)
    weight[1] = 0
    weight[2, 5:10] = 0
    x[:, rng.integer(0, 9)] = x[:, rng.integer(10, 19)] = 0
    found = {}
    for power in (-90, 0, 90):
        w, inputs = planted(rng, 7, rng.integer(3, 5), 3, quiet=2**-12)
        found[f"2^{power}"] = answer(w * 2.0**power, inputs * 2.0**power, bits=3, group_size=5, steps=7)
    return {
        **found,
        "dead": answer(weight, x, bits=3, group_size=5),
        "silent": answer(weight, torch.zeros_like(x), bits=4, group_size=6, steps=2),
        "no weights": answer(torch.zeros_like(weight), x, bits=4, group_size=6, steps=3),
    }


@case(awq_scales)
def the_fewest_and_the_most(answer, rng):
    """2 and 8 bits, one step, token, row, groups of one column and wider than the layer; ties; large numbers."""
    channels = rng.integer(11, 15)
    weight, x = rng.normal(8, channels), rng.normal(40, channels) * loudness(rng, channels, 2)
    # All inputs are equally loud, so s is 1; the largest weight is 7/8, so a scale is 1/8 and halves of it are ties.
    ties = rng.integers(-13, 13, 8, channels) / 16
    ties[:, 0] = 7 / 8
    large = 2.0**124 * ties.abs().clamp_min(0.25)
    # A scale is 1/7, which float32 rounds up by 4e-8; these are above a tie by a fortieth of that.
    beside = rng.integers(0, 2, 8, channels).mul(2).add(1.5).double() / 7 * (1 + 1e-9)
    beside[:, 0] = 1
    return {
        "2 bits": answer(weight, x, bits=2, group_size=channels + 3, steps=1),
        "8 bits": answer(weight[:1], x, bits=8, group_size=6, steps=5),
        "one token": answer(weight, x[:1], bits=3, group_size=channels, steps=3),
        "one column": answer(weight, x.sign(), bits=5, group_size=1, steps=1),
        "large": answer(large, torch.full((3, channels), 2.0**126), bits=4, group_size=channels, steps=1),
        "ties": answer(ties, torch.ones(1, channels), bits=4, group_size=channels, steps=1),
        "beside": answer(beside, torch.ones(1, channels), bits=4, group_size=channels, steps=1),
    }


@case(awq_scales)
def other_layouts(answer, rng):
    """A transposed weight and every other token of a buffer; bfloat16; float64, not to be changed; gradients."""
    rows, channels = rng.integer(9, 12), rng.integer(17, 20)
    weight = rng.normal(channels, rows).T
    x = rng.normal(80, channels) * loudness(rng, channels, 2)
    found = answer(
        torch.nn.Parameter(weight.clone()), x.clone().requires_grad_(), bits=3, group_size=7, steps=4
    )
    return {
        "parameter": found,
        "requires grad": [part.requires_grad for part in found if isinstance(part, Tensor)],
        "views": answer(weight, x[::2], bits=3, group_size=7, steps=8),
        "bfloat16": answer(weight.bfloat16(), x.bfloat16(), bits=4, group_size=channels, steps=8),
        "float64": answer(weight.double(), x.double(), bits=3, group_size=channels, steps=8),
    }


@case(awq_scales)
def refusals(answer, rng):
    """Arguments that make no sense, beside a layer that does."""
    channels = rng.integer(9, 12)
    weight, x = rng.normal(6, channels), rng.normal(30, channels) * loudness(rng, channels, 1)
    options = {"bits": rng.integer(3, 4), "group_size": rng.integer(3, 5)}
    tried: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
        "1 bit": (weight, x, {"bits": 1}),
        "9 bits": (weight, x, {"bits": 9}),
        "groups of none": (weight, x, {"group_size": 0}),
        "groups of less": (weight, x, {"group_size": -1}),
        "no steps": (weight, x, {"steps": 0}),
        "steps back": (weight, x, {"steps": -1}),
        "another K": (weight, x[:, 1:], {}),
        "vectors": (weight[0], x[0], {}),
        "x of three axes": (weight, x[None], {}),
        "weight of one axis": (weight[0], x, {}),
        "weight of three axes": (weight[None], x, {}),
        "no rows": (weight[:0], x, {}),
        "no tokens": (weight, x[:0], {}),
        "no columns": (weight[:, :0], x[:, :0], {}),
    }
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, rng.integer(1, 6 * channels - 2), -1):
            w, t = weight.clone(), x.clone()
            w.view(-1)[place] = t.view(-1)[place] = value
            tried |= {
                f"{value} in weight at {place}": (w, x, {}),
                f"{value} in x at {place}": (weight, t, {}),
            }
    found = {name: raised(answer, w, t, **{**options, **more}) for name, (w, t, more) in tried.items()}
    return {**found, "quantized": answer(weight, x, **options)}


@cost(awq_scales, share=1 / 6)
def products(answer, rng):
    """Multiplications and additions in matrix products, and the memory of all tensors that are made."""
    rows, channels, tokens, steps = 64, 64, 128, 6
    weight, x = rng.normal(rows, channels), rng.normal(tokens, channels) * loudness(rng, channels, 2)
    with TensorWork() as work:
        found = answer(weight, x, bits=4, group_size=8, steps=steps)
    return {
        "observed": found,
        "FLOPs": (work.flops, (steps + 2) * 2 * rows * channels * tokens),
        "allocated bytes": (work.allocated_bytes, (steps + 1) * tokens // 2 * 8 * rows * channels),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Search:
    """A right answer in small steps; a mistake replaces some of them."""

    def wide(self, given: Tensor) -> Tensor:
        return given.detach().double()

    def loudness(self, tokens: Tensor, w: Tensor) -> Tensor:
        return tokens.abs().mean(0)

    def dead(self, loudness: Tensor) -> Tensor:
        """The same with something for channels that are silent."""
        live = loudness[loudness > 0]
        return torch.where(loudness > 0, loudness, live.min() if len(live) else 1.0)

    def alphas(self, steps: int) -> list[float]:
        return [step / steps for step in range(steps + 1)]

    def enlarge(self, loudness: Tensor, alpha: float, w: Tensor) -> Tensor:
        s = loudness**alpha
        return s / (s.max() * s.min()).sqrt()

    def top(self, bits: int) -> int:
        return 2 ** (bits - 1) - 1

    def scaled(self, w: Tensor, s: Tensor) -> Tensor:
        return w * s

    def ranges(self, w: Tensor, scaled: Tensor, group_size: int) -> Tensor:
        """Largest magnitude of each group, [N, groups]."""
        short = -scaled.shape[1] % group_size
        return torch.nn.functional.pad(scaled.abs(), (0, short)).unflatten(1, (-1, group_size)).amax(2)

    def usable(self, scales: Tensor) -> Tensor:
        return torch.where(scales > 0, scales, 1.0)

    def stored(self, scales: Tensor) -> Tensor:
        return scales.float()

    def code(self, values: Tensor) -> Tensor:
        return values.round()

    def restored(self, quantized: Tensor, s: Tensor) -> Tensor:
        return quantized / s

    def error(self, tokens: Tensor, change: Tensor, w: Tensor) -> float:
        return float((tokens @ change.T).square().sum())

    def best(self, errors: list[float]) -> int:
        return errors.index(min(errors))

    def search(self, weight: Tensor, x: Tensor, *, bits: int, group_size: int, steps: int = 20) -> Searched:
        check(weight, x, bits, group_size, steps)
        w, tokens, at = self.wide(weight), self.wide(x), torch.arange(weight.shape[1]) // group_size
        loudness = self.dead(self.loudness(tokens, w))
        errors, tried = [], []
        for alpha in self.alphas(steps):
            s = self.enlarge(loudness, alpha, w).float()
            scaled = self.scaled(w, s.to(w.dtype))
            ranges = self.ranges(w, scaled, group_size)
            scales = self.stored(self.usable(ranges / self.top(bits)))
            wide = scales[:, at].to(w.dtype)
            codes = self.code(scaled / wide)
            errors.append(self.error(tokens, self.restored(codes * wide, s.to(w.dtype)) - w, w))
            tried.append((s, codes.to(torch.int8), scales.float()))
        return tried[self.best(errors)]


def check(weight: Tensor, x: Tensor, bits: int, group_size: int, steps: int) -> None:
    """ValueError for what the contract refuses."""
    if not 2 <= bits <= 8 or group_size < 1 or steps < 1:
        raise ValueError((bits, group_size, steps))
    if weight.dim() != 2 or x.shape[1:] != weight.shape[1:] or not weight.numel() or not x.numel():
        raise ValueError((weight.shape, x.shape))
    if not bool(weight.isfinite().all()) or not bool(x.isfinite().all()):
        raise ValueError("not finite")


def variant(**steps: Any) -> Callable[..., Searched]:
    """A right answer with some steps replaced."""
    return type("Variant", (Search,), steps)().search


@mistake(
    awq_scales,
    "Looks at the weights' error, not the output's: enlarging some columns coarsens the rest, so that not to enlarge "
    "almost always wins.",
)
def error_of_the_weights(*arguments, **options):
    return variant(error=lambda self, tokens, change, w: float(change.square().sum()))(*arguments, **options)


@mistake(
    awq_scales,
    "Weighs each column's error with its loudness instead of making the output: errors of correlated inputs add up or "
    "cancel there.",
)
def columns_by_themselves(*arguments, **options):
    def error(self, tokens, change, w):
        return float((change.square() * tokens.square().sum(0)).sum())

    return variant(error=error)(*arguments, **options)


@mistake(awq_scales, "Does not divide by s again before comparing, so that every s but 1 looks bad.")
def not_divided_back(*arguments, **options):
    return variant(restored=lambda self, quantized, s: quantized)(*arguments, **options)


@mistake(
    awq_scales,
    "Divides the weights by s: columns that meet loud inputs shrink and are rounded more coarsely.",
)
def divided_not_multiplied(*arguments, **options):
    return variant(scaled=lambda self, w, s: w / s, restored=lambda self, quantized, s: quantized * s)(
        *arguments, **options
    )


@mistake(
    awq_scales, "Leaves alpha = 0 out: where no enlarging helps, the result is worse than rounding alone."
)
def without_zero(*arguments, **options):
    return variant(alphas=lambda self, steps: [step / steps for step in range(1, steps + 1)])(
        *arguments, **options
    )


@mistake(awq_scales, "Leaves alpha = 1 out: range(steps) ends a step too early.")
def without_one(*arguments, **options):
    return variant(alphas=lambda self, steps: [step / steps for step in range(steps)])(*arguments, **options)


@mistake(awq_scales, "Always tries 20 steps.")
def always_twenty(*arguments, **options):
    return variant(alphas=lambda self, steps: [step / 20 for step in range(21)])(*arguments, **options)


@mistake(
    awq_scales,
    "Takes the largest |x| of a channel, as SmoothQuant does, so that one token decides its loudness.",
)
def largest_activation(*arguments, **options):
    return variant(loudness=lambda self, tokens, w: tokens.abs().amax(0))(*arguments, **options)


@mistake(awq_scales, "Takes the mean of x without its magnitude: a loud channel of both signs looks quiet.")
def signed_mean(*arguments, **options):
    return variant(loudness=lambda self, tokens, w: tokens.mean(0).abs())(*arguments, **options)


@mistake(awq_scales, "Takes the root of the mean square for the mean magnitude.")
def root_mean_square(*arguments, **options):
    return variant(loudness=lambda self, tokens, w: tokens.square().mean(0).sqrt())(*arguments, **options)


@mistake(
    awq_scales,
    "Finds the important columns by the size of their weights; it is the inputs that say which matter.",
)
def loudness_of_the_weights(*arguments, **options):
    return variant(loudness=lambda self, tokens, w: w.abs().amax(0))(*arguments, **options)


@mistake(
    awq_scales,
    "Divides by the weights' maximum to the power 1 - alpha: that is SmoothQuant's rule, not this one.",
)
def smoothquant_rule(*arguments, **options):
    def enlarge(self, loudness, alpha, w):
        s = loudness**alpha / w.abs().amax(0).clamp_min(1e-5) ** (1 - alpha)
        return s / (s.max() * s.min()).sqrt()

    return variant(enlarge=enlarge)(*arguments, **options)


@mistake(awq_scales, "Does not divide s by sqrt(largest * smallest).")
def not_normalised(*arguments, **options):
    return variant(enlarge=lambda self, loudness, alpha, w: loudness**alpha)(*arguments, **options)


@mistake(awq_scales, "Divides s by its largest entry alone.")
def normalised_by_the_largest(*arguments, **options):
    return variant(enlarge=lambda self, loudness, alpha, w: loudness**alpha / (loudness**alpha).max())(
        *arguments, **options
    )


@mistake(
    awq_scales, "Does nothing about silent channels: their s is 0, and the smallest s, a divisor, with it."
)
def dead_channels_forgotten(*arguments, **options):
    return variant(dead=lambda self, loudness: loudness)(*arguments, **options)


@mistake(
    awq_scales,
    "Lifts silent channels to a constant: whether it is small depends on the units of x.",
)
def dead_channels_at_a_constant(*arguments, **options):
    return variant(dead=lambda self, loudness: loudness.clamp_min(1e-4))(*arguments, **options)


@mistake(
    awq_scales, "Calculates in float32: the last digits decide, and squares of small outputs are 0 there."
)
def in_float32(*arguments, **options):
    return variant(wide=lambda self, given: given.detach().float())(*arguments, **options)


@mistake(awq_scales, "Holds all scales above 1e-5: groups of small weights become zeros.")
def scales_held_up(*arguments, **options):
    return variant(usable=lambda self, scales: torch.where(scales > 0, scales.clamp_min(1e-5), 1.0))(
        *arguments, **options
    )


@mistake(awq_scales, "Measures the error on the first 256 tokens only, to save time.")
def first_tokens_only(*arguments, **options):
    def error(self, tokens, change, w):
        return Search.error(self, tokens[:256], change, w)

    return variant(error=error)(*arguments, **options)


@mistake(awq_scales, "Finds codes with scales that float32 has not rounded yet: the layer has other scales.")
def scales_rounded_at_the_end(*arguments, **options):
    return variant(stored=lambda self, scales: scales)(*arguments, **options)


@mistake(awq_scales, "Looks at the last axis of weight alone: what has one axis or three is no layer.")
def axes_of_weight_unchecked(weight, x, **options):
    if x.dim() == 2 and weight.shape[-1] == x.shape[-1]:
        weight = weight.reshape(-1, weight.shape[-1])
    return variant()(weight, x, **options)


@mistake(
    awq_scales,
    "Stops once four alphas in a row were no better than the best: the error can rise and fall again.",
)
def stopped_early(*arguments, **options):
    def best(self, errors):
        found = 0
        for index, error in enumerate(errors):
            if error < errors[found]:
                found = index
            elif index - found == 4:
                break
        return found

    return variant(best=best)(*arguments, **options)


@mistake(
    awq_scales,
    "Multiplies x and the weights elementwise and adds up, with a tensor [T, N, K], where a matrix product does it.",
)
def product_by_broadcasting(*arguments, **options):
    def error(self, tokens, change, w):
        return float((tokens.unsqueeze(1) * change).sum(2).square().sum())

    return variant(error=error)(*arguments, **options)


@mistake(
    awq_scales,
    "Leaves weight and x in autograd: s and scales require grad, and keep all that they were made from.",
)
def gradient_kept(*arguments, **options):
    return variant(wide=lambda self, given: given.double())(*arguments, **options)


@mistake(
    awq_scales,
    "Takes the groups' scales from the weights as they were: enlarged columns get codes out of range.",
)
def scales_before_enlarging(*arguments, **options):
    class Before(Search):
        def ranges(self, w, scaled, group_size):
            return Search.ranges(self, w, w, group_size)

    return Before().search(*arguments, **options)


@mistake(awq_scales, "Gives a row one scale, whatever group_size says.")
def scale_of_the_row(*arguments, **options):
    def ranges(self, w, scaled, group_size):
        groups = -(-scaled.shape[1] // group_size)
        return scaled.abs().amax(1, keepdim=True).expand(-1, groups)

    return variant(ranges=ranges)(*arguments, **options)


@mistake(awq_scales, "Divides by 2^(bits-1), so that the largest weight has no code of its own.")
def scale_by_the_power(*arguments, bits, **options):
    def code(self, values):
        top = 2 ** (bits - 1)
        return values.round().clamp(-top, top - 1)

    return variant(top=lambda self, bits: 2 ** (bits - 1), code=code)(*arguments, bits=bits, **options)


@mistake(awq_scales, "Rounds ties away from zero.")
def ties_away(*arguments, **options):
    return variant(code=lambda self, values: (values.abs() + 0.5).floor() * values.sign())(
        *arguments, **options
    )


@mistake(awq_scales, "Keeps the last alpha that was no worse, so that of equal ones the largest wins.")
def largest_of_a_tie(*arguments, **options):
    def best(self, errors):
        return max(index for index, error in enumerate(errors) if error == min(errors))

    return variant(best=best)(*arguments, **options)


@mistake(
    awq_scales,
    "Finds the best s, and then quantizes weight without it.",
)
def quantized_without_s(weight, x, **options):
    s, _, _ = variant()(weight, x, **options)
    _, codes, scales = variant(alphas=lambda self, steps: [0.0])(weight, x, **options)
    return s, codes, scales


@mistake(awq_scales, "Returns 1 / s, what the inputs are multiplied by.")
def reciprocal(*arguments, **options):
    s, codes, scales = variant()(*arguments, **options)
    return 1 / s, codes, scales


@alternative(awq_scales, "Has no product with x in the search: the error through x.T @ x")
def by_second_moments(weight, x, **options):
    def error(self, tokens, change, w):
        if not self.moments:
            self.moments.append(tokens.T @ tokens)
        return float(((change @ self.moments[0]) * change).sum())

    return variant(moments=[], error=error)(weight, x, **options)


@alternative(awq_scales, "Makes both outputs and subtracts them, the original one once")
def both_outputs(*arguments, **options):
    def error(self, tokens, change, w):
        if not self.original:
            self.original.append(tokens @ w.T)
        return float(torch.nn.functional.mse_loss(tokens @ (w + change).T, self.original[0]))

    return variant(original=[], error=error)(*arguments, **options)


@alternative(awq_scales, "Makes the original output anew at each step", meets_costs=False)
def original_at_each_step(*arguments, **options):
    def error(self, tokens, change, w):
        return float((tokens @ (w + change).T - tokens @ w.T).square().mean())

    return variant(error=error)(*arguments, **options)


@alternative(awq_scales, "Powers through logarithms, halfway between their ends subtracted; groups in a loop")
def by_logarithms(*arguments, **options):
    def enlarge(self, loudness, alpha, w):
        logs = alpha * loudness.log()
        return (logs - (logs.max() + logs.min()) / 2).exp()

    def ranges(self, w, scaled, group_size):
        begins = range(0, scaled.shape[1], group_size)
        return torch.stack([scaled[:, begin : begin + group_size].abs().amax(1) for begin in begins], dim=1)

    return variant(enlarge=enlarge, ranges=ranges)(*arguments, **options)
