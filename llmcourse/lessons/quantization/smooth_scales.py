"""Moves the range of a norm's loud channels into the weights behind it, so that activations quantize better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.exercise import alternative, case, exercise, mistake, raised


@exercise(
    points=2,
    minutes=10,
    hints=(
        "What the norm gives is divided by s, channel by channel, so every weight that reads it must be multiplied by "
        "s, channel by channel; and a norm's last step is a multiplication by its weight.",
        "W is [outputs, inputs], and the norm's channels are its inputs. All weights behind the norm share one s, so "
        "max|W| is taken over all of them. A channel that is 0 throughout must not become 0 / 0.",
    ),
)
def smooth_scales(
    norm_weight: Tensor, weights: list[Tensor], x_max: Tensor, *, alpha: float
) -> tuple[Tensor, list[Tensor]]:
    """Divide an RMSNorm's output by s and fold s into what reads it; about 12 lines.

    norm_weight [K] is what the norm multiplies by last; weights are the [N_i, K] of all
    linear layers that read the norm's output (q, k, v; or gate, up), and nothing else
    reads it; x_max [K] is max|X_j| of each channel j of that output, as it is now, over
    the calibration tokens. Each is float32, bfloat16 or float16; none is changed.

    s_j = x_max_j^alpha / max|W_j|^(1 - alpha), where max|W_j| is the largest magnitude
    among all weights on input j. s_j is 1 where x_max_j or max|W_j| is 0, whatever
    alpha; nothing else bounds it, at any magnitude that float32 holds, subnormals aside.

    Returns the new norm weight [K] and a list of the new weights, in the order given,
    all float32 and without gradients, even those of an nn.Parameter: what the layers
    give is what they gave before, up to rounding, and nothing is left to be done when
    the model runs.

    ValueError when alpha is not within 0..1, when weights is an empty list or a tensor
    holds nothing, when a shape is not the one above, when a value is NaN or Inf, and
    when x_max has one below 0.

    Xiao et al. 2023 (SmoothQuant), section 4, equations 3 and 4.
    """
    ### BEGIN SOLUTION
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}; expected 0..1")
    norm_weight, x_max, *weights = (part.detach().float() for part in (norm_weight, x_max, *weights))
    channels = x_max.numel()
    shapes = [tuple(part.shape) for part in (norm_weight, x_max, *weights)]
    if channels == 0 or shapes[:2] != [(channels,), (channels,)]:
        raise ValueError(f"shapes {shapes[:2]}; expected [K] and [K]")
    if not weights or any(shape[1:] != (channels,) or shape[0] == 0 for shape in shapes[2:]):
        raise ValueError(f"weights {shapes[2:]}; expected [N, {channels}], at least one, with outputs")
    if not all(part.isfinite().all() for part in (norm_weight, x_max, *weights)) or x_max.min() < 0:
        raise ValueError("NaN, Inf, or a maximal magnitude below 0; calibrate again")
    w_max = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    scales = x_max**alpha / w_max ** (1 - alpha)
    scales[(x_max == 0) | (w_max == 0)] = 1
    return norm_weight / scales, [weight * scales for weight in weights]
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def behind_one_norm(rng, channels, outputs):
    """Norm weight [K], a weight [N, K] for each of outputs, and x_max [K]; every channel with a loudness of its own."""
    norm_weight = rng.uniform(0.5, 2, channels) * (1 - 2 * rng.integers(0, 1, channels))
    weights = [
        rng.normal(each, channels) * 10 ** rng.uniform(-0.7, 0.7, channels) * rng.uniform(0.3, 3)
        for each in outputs
    ]
    return norm_weight, weights, 10 ** rng.uniform(-1, 1, channels)


def observed(found):
    """The new norm weight and the new weights, and which of them need gradients."""
    norm_weight, weights = found
    gradients = [part.requires_grad for part in (norm_weight, *weights)]
    return {"norm weight": norm_weight, "weights": weights, "need gradients": gradients}


@case(smooth_scales)
def queries_keys_values(answer, rng):
    """Three weights of different height behind one norm, then five, alpha between 0.3 and 0.75; one of one value."""
    channels, alpha = rng.integer(18, 24), rng.choice([0.3, 0.4, 0.65, 0.75])
    outputs = [rng.integer(24, 30), rng.integer(6, 9), rng.integer(10, 14)]
    three = observed(answer(*behind_one_norm(rng, channels, outputs), alpha=alpha))
    five = observed(answer(*behind_one_norm(rng, channels, [3, 4, 2, 5, 3]), alpha=alpha))
    return {
        "three": three,
        "five": five,
        "one value": observed(answer(*behind_one_norm(rng, 1, [1]), alpha=alpha)),
    }


@case(smooth_scales)
def outlier_channels(answer, rng):
    """Square weights, two channels of activations 60 times as loud, another that only one weight hears loudly."""
    size = rng.integer(14, 20)
    norm_weight, weights, x_max = behind_one_norm(rng, size, [size, size])
    loud = rng.shuffled(range(size))[:3]
    x_max[loud[:2]] *= 60
    weights[rng.integer(0, 1)][rng.integer(0, size - 1), loud[2]] = -rng.uniform(30, 40)
    return observed(answer(norm_weight, weights, x_max, alpha=0.5))


def of_any_magnitude(rng):
    """Exponents of two for x_max and for W, [K] each: one of them, or both against each other, far from 0."""
    far = [sign * size for size in (14, 24, 40, 70, 110) for sign in (-1, 1)]
    pairs = [(0, 0), *(pair for size in far for pair in ((size, 0), (0, size), (size, -size)))]
    return torch.tensor(rng.shuffled(pairs)).T


@case(smooth_scales)
def any_magnitude(answer, rng):
    """alpha 0, 1 and a half with a single weight, magnitudes of 1e-37 to 1e37 and sums that float32 does not hold."""
    of_x, of_w = of_any_magnitude(rng)
    channels, outputs = len(of_x), rng.integer(15, 20)
    norm_weight, (weight,), x_max = behind_one_norm(rng, channels, [outputs])
    found = {}
    for alpha in (0, 0.5, 1):
        norm, (moved,) = answer(norm_weight, [weight.ldexp(of_w)], x_max.ldexp(of_x), alpha=alpha)
        of_s = alpha * of_x - (1 - alpha) * of_w
        # Brought back to ordinary sizes, so that no channel hides behind a louder one.
        found[f"alpha {alpha}, times powers of two"] = [norm.ldexp(of_s), moved.ldexp(-of_s - of_w)]
    for power in (-80, 80):  # of x_max and of W alike: their product is 0 or infinite in float32
        alpha = rng.choice([0.25, 0.75])
        of_s = int(power * (2 * alpha - 1))
        norm, (moved,) = answer(norm_weight, [weight * 2.0**power], x_max * 2.0**power, alpha=alpha)
        found[f"both times 2^{power}, alpha {alpha}"] = [norm * 2.0**of_s, moved * 2.0 ** (-of_s - power)]
    for power in (-122, 122):  # s itself lies where few numbers are left
        given = (
            norm_weight * 2.0 ** (power // 8),
            [weight * 2.0 ** (-power // 4)],
            x_max.clamp(1, 8) * 2.0**power,
        )
        found[f"x_max times 2^{power}"] = observed(answer(*given, alpha=1))
    vast = [
        rng.uniform(2.0**124, 2.0**125, *shape) for shape in ((channels,), (outputs, channels), (channels,))
    ]
    found["vast weights"] = observed(answer(vast[0], [vast[1]], rng.uniform(0.5, 1, channels), alpha=1))
    found["vast x_max"] = observed(answer(norm_weight, [weight], vast[2], alpha=0))
    return found


@case(smooth_scales)
def silent_channels(answer, rng):
    """Channels that were never active, channels no weight reads, both, and one that only the first weight reads."""
    channels = rng.integer(12, 16)
    norm_weight, weights, x_max = behind_one_norm(rng, channels, [rng.integer(5, 8), rng.integer(9, 12)])
    silent, unread, both, once = rng.shuffled(range(channels))[:4]
    x_max[[silent, both]] = 0
    for weight in weights:
        weight[:, [unread, both]] = 0
    weights[1][:, once] = 0
    return {
        str(alpha): observed(answer(norm_weight, weights, x_max, alpha=alpha))
        for alpha in (0, rng.choice([0.4, 0.7]), 1)
    }


@case(smooth_scales)
def narrow_parameters_and_views(answer, rng):
    """nn.Parameters, in float32 and narrower, all or one of them; then weights that are views."""
    channels = rng.integer(10, 14)
    norm_weight, weights, x_max = behind_one_norm(rng, channels, [rng.integer(15, 20), rng.integer(5, 8)])
    x_max[rng.shuffled(range(channels))[:3]] = 3e4
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        norm, first, last = (nn.Parameter(part.to(dtype)) for part in (norm_weight, *weights))
        arguments = {
            "all": (norm, [first, last], x_max.to(dtype)),
            "the norm's": (norm, weights, x_max),
            "the first weight": (norm_weight, [first, weights[1]], x_max),
            "the last weight": (norm_weight, [weights[0], last], x_max),
            "x_max": (norm_weight, weights, x_max.to(dtype)),
        }
        for name, given in arguments.items():
            found[f"{dtype}, {name}"] = observed(answer(*given, alpha=0.6))
    views = [weights[0].T.contiguous().T[::2], weights[1].repeat_interleave(2, dim=1)[:, ::2]]
    return {**found, "views": observed(answer(norm_weight, views, x_max, alpha=0.4))}


def other_shapes(part):
    """What a vector or a matrix may be taken for: fewer and more dimensions, one channel, a transpose, nothing."""
    lead = [part[None], part[None, None], part[:, None], part[..., :1], part.flatten()[0]]
    return lead + ([part[:, None, None]] if part.dim() == 1 else [part[0], part.T, part[:0]])


@case(smooth_scales)
def refused_inputs(answer, rng):
    """alpha, shapes, NaN, Inf, negative maxima and empty things, in each argument; beside them, what is right."""
    channels = rng.integer(10, 14)
    outputs = [rng.integer(15, 20), rng.integer(5, 8), rng.integer(22, 25)]
    norm_weight, weights, x_max = behind_one_norm(rng, channels, outputs)
    parts = dict(
        zip(
            ("norm weight", "x_max", "weights[0]", "weights[1]", "weights[2]"),
            (norm_weight, x_max, *weights),
            strict=True,
        )
    )
    found = observed(answer(norm_weight, weights, x_max, alpha=0.5))

    def with_another(name, part):
        norm_weight, x_max, *weights = {**parts, name: part}.values()
        return raised(answer, norm_weight, weights, x_max, alpha=0.5)

    def with_one_value(name, value, place):
        part = parts[name].clone()
        part.view(-1)[place] = value
        return with_another(name, part)

    for dtype in (torch.bfloat16, torch.float16):
        narrow = {name: part.to(dtype) for name, part in parts.items()}
        for name, part in narrow.items():
            for value in (math.nan, math.inf, -math.inf):
                broken = part.clone()
                broken.view(-1)[part.numel() // 2] = value
                first, last, *others = {**narrow, name: broken}.values()
                found[f"{value} in {name}, {dtype}"] = raised(answer, first, others, last, alpha=0.5)
    for name, part in parts.items():
        bad = [math.nan, math.inf, -math.inf, *([-1.0, -1e-30] if name == "x_max" else [])]
        for value in bad:
            places = {"first": 0, "middle": part.numel() // 2, "last": -1}
            for where, place in places.items():
                found[f"{value} as {where} of {name}"] = with_one_value(name, value, place)
        for other in other_shapes(part):
            found[f"{name} of {other.dim()} dimensions, {other.numel()} values"] = with_another(name, other)
    found["no weight"] = raised(answer, norm_weight, [], x_max, alpha=0.5)
    none = norm_weight[:0], [part[:, :0] for part in weights], x_max[:0]
    found["no channel"] = raised(answer, *none, alpha=0.5)
    for alpha in (-0.01, -1e-9, 1.01, 1 + 1e-9, math.nan, math.inf, -math.inf):
        found[f"alpha {alpha}"] = raised(answer, norm_weight, weights, x_max, alpha=alpha)
    return found


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Smoothing:
    """A right answer in small steps; a mistake replaces one of them."""

    def refuse(self, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor, alpha: float) -> None:
        self.refuse_alpha(alpha)
        self.refuse_shapes(norm_weight, weights, x_max)
        self.refuse_values(norm_weight, weights, x_max)

    def refuse_alpha(self, alpha: float) -> None:
        if not (alpha >= 0 and alpha <= 1):
            raise ValueError("alpha")

    def refuse_shapes(self, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        fits = norm_weight.dim() == 1 and norm_weight.shape == x_max.shape and len(weights) > 0
        if not fits or any(part.dim() != 2 or part.shape[1:] != x_max.shape for part in weights):
            raise ValueError("shapes")
        if any(part.numel() == 0 for part in weights):
            raise ValueError("empty")

    def refuse_values(self, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor) -> None:
        if any(not torch.isfinite(part).all() for part in (norm_weight, x_max, *weights)):
            raise ValueError("NaN or Inf")
        if (x_max < 0).any():
            raise ValueError("negative")

    def widened(self, part: Tensor) -> Tensor:
        return part.detach().float()

    def largest(self, weights: list[Tensor]) -> Tensor:
        """[K]"""
        return torch.stack([self.of_each(part) for part in weights]).amax(dim=0)

    def of_each(self, weight: Tensor) -> Tensor:
        return weight.abs().amax(dim=0)

    def ranges(self, x_max: Tensor, norm_weight: Tensor) -> Tensor:
        return x_max

    def divided(self, x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
        return x_max**alpha / w_max ** (1 - alpha)

    def guarded(self, scales: Tensor, x_max: Tensor, w_max: Tensor) -> Tensor:
        return torch.where((x_max > 0) & (w_max > 0), scales, torch.ones_like(scales))

    def folded(
        self, norm_weight: Tensor, weights: list[Tensor], scales: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return norm_weight / scales, [part * scales for part in weights]

    def smooth(
        self, norm_weight: Tensor, weights: list[Tensor], x_max: Tensor, *, alpha: float
    ) -> tuple[Tensor, list[Tensor]]:
        self.refuse(norm_weight, weights, x_max, alpha)
        norm_weight, x_max = self.widened(norm_weight), self.widened(x_max)
        weights = [self.widened(part) for part in weights]
        w_max, x_max = self.largest(weights), self.ranges(x_max, norm_weight)
        scales = self.guarded(self.divided(x_max, w_max, alpha), x_max, w_max)
        return self.folded(norm_weight, weights, scales)


def variant(**steps: Any) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """An answer with some steps replaced."""
    return type("Variant", (Smoothing,), steps)().smooth


@mistake(
    smooth_scales,
    "Scales the outputs of W, its rows, not its inputs: a square weight hides it.",
)
def rows_scaled(*arguments, **options):
    def folded(self, norm_weight, weights, scales):
        return norm_weight / scales, [part * scales[:, None] for part in weights]

    return variant(folded=folded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Multiplies the norm and divides the weights: the outliers that were to shrink grow.",
)
def the_wrong_way_round(*arguments, **options):
    def folded(self, norm_weight, weights, scales):
        return norm_weight * scales, [part / scales for part in weights]

    return variant(folded=folded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Scales the weights and leaves the norm: that is right only if activations are divided when the model runs, an "
    "operation for every token.",
)
def norm_left_alone(*arguments, **options):
    def folded(self, norm_weight, weights, scales):
        return norm_weight.clone(), [part * scales for part in weights]

    return variant(folded=folded)(*arguments, **options)


@mistake(smooth_scales, "Divides the norm and leaves the weights: the model computes something else.")
def weights_left_alone(*arguments, **options):
    def folded(self, norm_weight, weights, scales):
        return norm_weight / scales, [part.clone() for part in weights]

    return variant(folded=folded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Folds s into the first weight only: the others read the same norm and now get activations that are too small.",
)
def only_the_first_weight(*arguments, **options):
    def folded(self, norm_weight, weights, scales):
        return norm_weight / scales, [weights[0] * scales, *(part.clone() for part in weights[1:])]

    return variant(folded=folded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Gives every weight an s of its own, though they share a norm that can be divided by one only.",
)
def a_scale_for_each_weight(norm_weight, weights, x_max, *, alpha):
    Smoothing().refuse(norm_weight, weights, x_max, alpha)
    each = [variant()(norm_weight, [part], x_max, alpha=alpha) for part in weights]
    return each[-1][0], [found[1][0] for found in each]


@mistake(
    smooth_scales,
    "Folds one weight after the other, each with its own s, into the norm: the first ones no longer match it.",
)
def one_after_the_other(norm_weight, weights, x_max, *, alpha):
    Smoothing().refuse(norm_weight, weights, x_max, alpha)
    found = []
    for part in weights:
        norm_weight, (part,) = variant()(norm_weight, [part], x_max, alpha=alpha)
        found.append(part)
    return norm_weight, found


@mistake(smooth_scales, "Takes max|W| from the first weight alone.")
def range_of_the_first_weight(*arguments, **options):
    return variant(largest=lambda self, weights: self.of_each(weights[0]))(*arguments, **options)


@mistake(smooth_scales, "Takes the mean of the weights' maxima for the largest among them.")
def mean_over_weights(*arguments, **options):
    def largest(self, weights):
        return torch.stack([self.of_each(part) for part in weights]).mean(dim=0)

    return variant(largest=largest)(*arguments, **options)


@mistake(smooth_scales, "Takes one maximum for the whole of W, not one for each input.")
def one_maximum_for_the_weight(*arguments, **options):
    def of_each(self, weight):
        return torch.where(weight.abs().amax(dim=0) > 0, weight.abs().amax(), 0)

    return variant(of_each=of_each)(*arguments, **options)


@mistake(smooth_scales, "Takes the largest value of W for its largest magnitude.")
def signed_maximum(*arguments, **options):
    def of_each(self, weight):
        return weight.amax(dim=0)

    return variant(of_each=of_each)(*arguments, **options)


@mistake(smooth_scales, "Takes the mean of |W|, as AWQ does of activations, for its maximum.")
def mean_magnitude(*arguments, **options):
    return variant(of_each=lambda self, weight: weight.abs().mean(dim=0))(*arguments, **options)


@mistake(smooth_scales, "Exchanges the exponents: alpha on the weights, 1 - alpha on the activations.")
def exponents_exchanged(*arguments, **options):
    def divided(self, x_max, w_max, alpha):
        return x_max ** (1 - alpha) / w_max**alpha

    return variant(divided=divided)(*arguments, **options)


@mistake(smooth_scales, "Gives both ranges the exponent alpha.")
def one_exponent(*arguments, **options):
    return variant(divided=lambda self, x_max, w_max, alpha: (x_max / w_max) ** alpha)(*arguments, **options)


@mistake(
    smooth_scales, "Multiplies by the weights' range: an input with loud weights gets louder weights still."
)
def multiplied_by_the_range(*arguments, **options):
    return variant(divided=lambda self, x_max, w_max, alpha: x_max**alpha * w_max ** (1 - alpha))(
        *arguments, **options
    )


@mistake(
    smooth_scales,
    "Looks at the activations alone, as if weights had no range: s is x_max^alpha.",
)
def weights_not_looked_at(*arguments, **options):
    return variant(divided=lambda self, x_max, w_max, alpha: x_max**alpha)(*arguments, **options)


@mistake(smooth_scales, "Uses alpha = 0.5, the paper's default, whatever is asked for.")
def alpha_of_the_paper(*arguments, **options):
    return variant(divided=lambda self, x_max, w_max, alpha: (x_max / w_max).sqrt())(*arguments, **options)


@mistake(
    smooth_scales,
    "Multiplies x_max by the norm's weight once more: it was measured on the norm's output, where it is in already.",
)
def norm_counted_twice(*arguments, **options):
    return variant(ranges=lambda self, x_max, norm_weight: x_max * norm_weight.abs())(*arguments, **options)


@mistake(
    smooth_scales,
    "Does not look for channels of zeros: s is 0 or infinite there, and the folded norm or weight Inf or NaN.",
)
def silent_channels_not_guarded(*arguments, **options):
    return variant(guarded=lambda self, scales, x_max, w_max: scales)(*arguments, **options)


@mistake(smooth_scales, "Guards channels without activations, not inputs that no weight reads.")
def only_activations_guarded(*arguments, **options):
    def guarded(self, scales, x_max, w_max):
        return torch.where(x_max > 0, scales, torch.ones_like(scales))

    return variant(guarded=guarded)(*arguments, **options)


@mistake(smooth_scales, "Guards inputs that no weight reads, not channels without activations.")
def only_weights_guarded(*arguments, **options):
    def guarded(self, scales, x_max, w_max):
        return torch.where(w_max > 0, scales, torch.ones_like(scales))

    return variant(guarded=guarded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Sets s to 1 only where it came out as 0, Inf or NaN: with alpha 0 or 1 a silent channel gives neither.",
)
def guarded_afterwards(*arguments, **options):
    def guarded(self, scales, x_max, w_max):
        return torch.where((scales > 0) & torch.isfinite(scales), scales, torch.ones_like(scales))

    return variant(guarded=guarded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Keeps ranges and s above 1e-5 against zeros, as published code does: a silent channel's norm weight grows by "
    "100,000, and quiet channels are not scaled as they should be.",
)
def kept_above_a_hundred_thousandth(*arguments, **options):
    def divided(self, x_max, w_max, alpha):
        return (x_max**alpha / w_max.clamp_min(1e-5) ** (1 - alpha)).clamp_min(1e-5)

    return variant(divided=divided, guarded=lambda self, scales, x_max, w_max: scales)(*arguments, **options)


@mistake(smooth_scales, "Lets s only shrink activations: channels with s below 1 stay as they are.")
def never_below_one(*arguments, **options):
    def guarded(self, scales, x_max, w_max):
        return torch.where((x_max > 0) & (w_max > 0), scales, torch.ones_like(scales)).clamp_min(1)

    return variant(guarded=guarded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Normalises s so that its extremes balance, as AWQ does: the function stays the same, the s is another.",
)
def normalised(*arguments, **options):
    def guarded(self, scales, x_max, w_max):
        scales = torch.where((x_max > 0) & (w_max > 0), scales, torch.ones_like(scales))
        return scales / (scales.amax() * scales.amin()).sqrt()

    return variant(guarded=guarded)(*arguments, **options)


@mistake(smooth_scales, "Computes in bfloat16 where the weights are, and returns bfloat16.")
def in_the_weights_dtype(*arguments, **options):
    return variant(widened=lambda self, part: part.detach())(*arguments, **options)


@mistake(smooth_scales, "Gives the norm's weight back in the dtype in which it came, rounded once more.")
def norm_in_its_own_dtype(norm_weight, weights, x_max, *, alpha):
    new_norm, new_weights = variant()(norm_weight, weights, x_max, alpha=alpha)
    return new_norm.to(norm_weight.dtype), new_weights


@mistake(
    smooth_scales,
    "Computes on nn.Parameters as they are: autograd records it, and the new weights keep the old ones in memory.",
)
def gradients_recorded(*arguments, **options):
    return variant(widened=lambda self, part: part.float())(*arguments, **options)


@mistake(smooth_scales, "Scales the caller's tensors in place: a second call smooths what is smooth already.")
def in_place(*arguments, **options):
    def folded(self, norm_weight, weights, scales):
        norm_weight /= scales
        for part in weights:
            part *= scales
        return norm_weight, weights

    return variant(folded=folded)(*arguments, **options)


@mistake(
    smooth_scales,
    "Lets NaN, Inf and negative maxima through, and folds them into every weight behind the norm.",
)
def broken_values_let_through(*arguments, **options):
    return variant(refuse_values=lambda self, *arguments: None)(*arguments, **options)


@mistake(smooth_scales, "Looks for NaN only: Inf goes into every weight behind the norm.")
def only_nan_looked_for(*arguments, **options):
    def refuse_values(self, norm_weight, weights, x_max):
        if any(part.isnan().any() for part in (norm_weight, x_max, *weights)) or (x_max < 0).any():
            raise ValueError("NaN or negative")

    return variant(refuse_values=refuse_values)(*arguments, **options)


@mistake(smooth_scales, "Looks for NaN and Inf in float32 only: float16 overflows at 65,504, far sooner.")
def narrow_values_unchecked(norm_weight, weights, x_max, *, alpha):
    def refuse_values(self, *parts):
        if norm_weight.dtype == torch.float32:
            Smoothing.refuse_values(self, *parts)
        elif (x_max < 0).any():
            raise ValueError("negative")

    return variant(refuse_values=refuse_values)(norm_weight, weights, x_max, alpha=alpha)


@mistake(
    smooth_scales,
    "Looks for zeros in the product of both ranges: that of two small ones is 0 in float32, and their s becomes 1.",
)
def zeros_of_the_product(*arguments, **options):
    def guarded(self, scales, x_max, w_max):
        return torch.where(x_max * w_max == 0, 1.0, scales)

    return variant(guarded=guarded)(*arguments, **options)


@mistake(smooth_scales, "Does not look at shapes: a tensor of one channel is broadcast to all of them.")
def shapes_not_looked_at(*arguments, **options):
    return variant(refuse_shapes=lambda self, *arguments: None)(*arguments, **options)


@mistake(
    smooth_scales, "Takes any alpha: above 1 or below 0 one of the two ranges grows beyond what either had."
)
def any_alpha(*arguments, **options):
    return variant(refuse_alpha=lambda self, alpha: None)(*arguments, **options)


@alternative(smooth_scales, "Goes through the channels one by one, in Python's floats")
def channel_by_channel(norm_weight, weights, x_max, *, alpha):
    Smoothing().refuse(norm_weight, weights, x_max, alpha)
    scales = []
    for channel, x_range in enumerate(x_max.tolist()):
        w_range = max(abs(value) for part in weights for value in part[:, channel].tolist())
        scales.append(x_range**alpha * w_range ** (alpha - 1) if x_range > 0 and w_range > 0 else 1.0)
    s = torch.tensor(scales)
    return norm_weight.detach().float() / s, [part.detach().float() * s for part in weights]


@alternative(smooth_scales, "Computes s through logarithms, and folds by a product with a diagonal matrix")
def through_logarithms(*arguments, **options):
    def divided(self, x_max, w_max, alpha):
        return (alpha * x_max.double().log() - (1 - alpha) * w_max.double().log()).exp().float()

    def folded(self, norm_weight, weights, scales):
        return norm_weight * scales.reciprocal(), [part @ scales.diag() for part in weights]

    return variant(divided=divided, folded=folded)(*arguments, **options)


@alternative(smooth_scales, "Puts all weights on top of each other, and splits the result again")
def stacked(*arguments, **options):
    def largest(self, weights):
        return torch.linalg.vector_norm(torch.cat(weights), torch.inf, dim=0)

    def folded(self, norm_weight, weights, scales):
        return norm_weight / scales, list(
            (torch.cat(weights) * scales).split([len(part) for part in weights])
        )

    return variant(largest=largest, folded=folded)(*arguments, **options)
