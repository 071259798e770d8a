"""GPTQ: a layer is rounded column by column, and the columns still open make up for each error."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy.linalg
import torch
from torch import Tensor

from llmcourse.counting import TensorWork, calls
from llmcourse.exercise import Rng, alternative, case, cost, excuse, exercise, mistake, raised

Quantized = tuple[Tensor, Tensor]
NUMPYS = ("cholesky", "eig", "eigh", "inv", "lstsq", "pinv", "qr", "solve", "svd")


@exercise(
    points=5,
    minutes=30,
    extension=True,
    hints=(
        "When a column is closed, the best change of the open ones is a row of the inverse of the part of H that is "
        "still open. A Cholesky factor of the inverse of H holds these rows for all columns at once.",
        "inverse = U.T @ U with U upper triangular, and row j of U serves column j: the error divided by U[j, j], "
        "times what stands to the right of it. A group's scale comes from weights that have these changes in them.",
    ),
)
def gptq_quantize(
    weight: Tensor,
    x: Tensor,
    *,
    bits: int,
    group_size: int,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round a layer column by column so that its output x @ weight.T changes little;
    about 30 lines.

    weight [N, K], x [T, K]: the layer [out, in], which may be an nn.Parameter, and the
    inputs it was calibrated with, of any float dtypes and any magnitude that float32
    holds. Let D [N, K] be codes * scales - weight. H is x.T @ x with damping * mean(its
    diagonal) added to its diagonal; if x is all zeros, H is the identity matrix. What
    is to be small, for each row d of D, is d @ H @ d.

    Columns are closed one after the other, from first to last; with act_order=True from
    the largest diagonal entry of H to the smallest (the lower column first on a tie).
    Closing a column fixes its codes. All open columns then move to where d @ H @ d is
    least for what has been closed so far, as if they could keep any real value.

    A group is group_size neighbouring columns, the last may be shorter; each row has
    one scale a group: max|w| / (2^(bits-1) - 1) as float32, and 1 instead of 0. It is
    found when the first column of the group is about to be closed, from the group's
    weights as they have moved by then. With act_order=True, where a group's columns are
    closed at scattered times, groups are the same, and all scales are found before
    anything moves ("static groups"). A code is w / scale, with the float32 scale, to
    the nearest integer, ties to even (torch.round), then clamped to +-(2^(bits-1) - 1).

    Calculate in float64 throughout: in float32 a value near a tie may fall on its other
    side, and little damping leaves H too close to singular. Matrices are factorised,
    inverted or solved at most 8 times in all, not once a column, and no tensor is
    larger than [max(N, T, K), K] in float64: either costs points.

    Returns (codes int8 [N, K] in the columns' original order, scales float32 [N, ceil(K
    / group_size)]), without gradient. ValueError for bits outside 2..8, group_size
    below 1, damping that is not finite and above 0, a weight or x that is not a matrix,
    that is empty or holds NaN or infinity, or when their K differ.

    Frantar et al. 2022 (arXiv 2210.17323), eq. 2-4 and algorithm 1.
    """
    ### BEGIN SOLUTION
    if not 2 <= bits <= 8 or group_size < 1 or not 0 < damping < math.inf:
        raise ValueError(
            f"bits={bits}, group_size={group_size}, damping={damping}: expected 2..8, at least 1, above 0"
        )
    if weight.dim() != 2 or x.shape[1:] != weight.shape[1:] or 0 in (*weight.shape, *x.shape):
        raise ValueError(
            f"weight {list(weight.shape)}, x {list(x.shape)}: expected [N, K] and [T, K], not empty"
        )
    if not (weight.isfinite().all() and x.isfinite().all()):
        raise ValueError("NaN or infinity in weight or x; expected finite values")
    w, tokens = weight.detach().double().clone(), x.detach().double()
    channels, top = w.shape[1], 2 ** (bits - 1) - 1

    hessian = tokens.T @ tokens
    order = torch.arange(channels)
    if act_order:
        order = torch.argsort(-hessian.diagonal(), stable=True)
    hessian.diagonal().add_(damping * hessian.diagonal().mean().item() or 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)

    starts = range(0, channels, group_size)
    codes = torch.zeros(w.shape, dtype=torch.int8)
    scales = torch.zeros(len(w), len(starts))

    def find_scales(start: int) -> None:
        scales[:, start // group_size] = w[:, start : start + group_size].abs().amax(1) / top
        scales[scales == 0] = 1

    if act_order:
        for start in starts:
            find_scales(start)
    for step, column in enumerate(order.tolist()):
        if column in starts and not act_order:
            find_scales(column)
        scale = scales[:, column // group_size]
        code = (w[:, column] / scale).round().clamp(-top, top)
        codes[:, column] = code
        error = (w[:, column] - code * scale) / upper[step, step]
        w[:, order[step + 1 :]] -= torch.outer(error, upper[step, step + 1 :])
    return codes, scales
    ### END SOLUTION


excuse(gptq_quantize, "1 -> 0 #2", "A group_size of 0 is refused by range itself, with a ValueError.")
excuse(gptq_quantize, "1 -> 2 #5", "Where x is all zeros any H above 0 on its diagonal moves nothing.")


# ---------------------------------------------------------------------------------------------------------- cases


def spread(rng: Rng, channels: int, loud: int = 0) -> Tensor:
    """Loudness of each channel, no two alike; some are 20 to 40 times louder, and none of them comes first."""
    found = rng.uniform(0.5, 1.5, channels)
    for channel in rng.shuffled(range(channels // 2, channels))[:loud]:
        found[channel] *= rng.integer(20, 40)
    return found


def correlated(rng: Rng, tokens: int, channels: int) -> Tensor:
    """Activations of which each channel resembles its neighbours, and which are not centred: [tokens, channels]."""
    # The channels' factor first, so that its product with white values has a covariance that falls off as 0.9^|i - j|.
    apart = (torch.arange(channels)[:, None] - torch.arange(channels)).abs()
    factor = torch.linalg.cholesky(0.9 ** apart.double()).float()
    return rng.normal(tokens, channels) @ factor.T + rng.uniform(0.5, 1.5, channels)


def fading(rng: Rng, tokens: int, channels: int) -> Tensor:
    """Activations each direction of which is 0.6 times as loud as the one before: [tokens, channels]."""
    return rng.normal(tokens, channels) * 0.6 ** torch.arange(channels) @ rng.normal(channels, channels)


def with_one(rng: Rng, values: Tensor, value: float) -> Tensor:
    """A copy with one value replaced, anywhere."""
    found = values.clone()
    found[rng.integer(0, len(found) - 1), rng.integer(0, found.shape[1] - 1)] = value
    return found


def equally_loud(rng: Rng, tokens: int, channels: int) -> Tensor:
    """Signs, 1 or 2 times, of which columns resemble each other: the diagonal of H is exact, and holds 2 values."""
    signs = (rng.normal(tokens, channels) + rng.normal(tokens, 1)).sign()
    return signs * torch.tensor(rng.shuffled(i % 2 + 1.0 for i in range(channels)))


@case(gptq_quantize)
def independent_channels(answer, rng):
    """Each token excites one channel alone, so nothing is made up for; weights lie on ties or just beside."""
    rows, channels, bits = rng.integer(5, 7), rng.integer(13, 15), rng.integer(3, 5)
    top = 2 ** (bits - 1) - 1
    # A group's largest weight is top / 8, so that every scale is exactly 1/8 and halves of it are ties.
    weight = rng.integers(1 - 2 * top, 2 * top - 1, rows, channels) / 16
    weight[:, ::4] = top / 8
    x = torch.diag(spread(rng, channels, 2))[rng.shuffled(range(channels))]
    codes, scales = answer(weight, x, bits=bits, group_size=4)
    ordered = answer(weight, x, bits=bits, group_size=4, act_order=True)
    # Beside a tie by less than float32 can tell, towards the odd code, which a tie does not go to.
    odd = torch.where((weight * 8).floor() % 2 == 0, 1, -1) * (weight * 16 % 2 == 1)
    beside = answer(weight.double() + odd * 2.0**-32, x, bits=bits, group_size=4)
    # Ties of a scale that float32 rounds: 1 / top.
    ties = weight.double() * 8 * torch.tensor(1 / top)
    ties[:, ::4] = 1
    rounded = answer(ties, x, bits=bits, group_size=4)
    return {"codes": codes, "scales": scales, "act order": ordered, "beside": beside, "rounded": rounded}


@case(gptq_quantize)
def one_scale_a_row(answer, rng):
    """Inputs that are nearly of low rank with hardly any damping, then white ones; one scale serves a row."""
    rows, channels = rng.integer(28, 32), 4 * rng.integer(5, 7)
    weight = rng.normal(rows, channels)
    low, white = fading(rng, 60, channels), rng.normal(60, channels)
    return {
        "low rank": answer(weight, low, bits=3, group_size=channels, damping=3e-4),
        "white": answer(weight, white, bits=4, group_size=channels),
    }


@case(gptq_quantize)
def groups_with_a_remainder(answer, rng):
    """Correlated inputs that are not centred, of few channels and of many, and after 300 quiet tokens; in groups of 8,
    and some columns over.
    """
    rows, channels, many = rng.integer(10, 14), rng.integer(26, 30), rng.integer(140, 143)
    weight, x = rng.normal(rows, channels), correlated(rng, 80, channels)
    wide, few = rng.normal(4, many), correlated(rng, 20, many)
    late = torch.cat([0.01 * rng.normal(rng.integer(300, 340), channels), x])
    return {
        "little damping": answer(weight, x, bits=3, group_size=8, damping=1e-5),
        "much damping": answer(weight, x, bits=4, group_size=8, damping=rng.integer(20, 40)),
        "many channels": answer(wide, few, bits=3, group_size=8),
        "loud tokens last": answer(weight, late, bits=3, group_size=8),
    }


@case(gptq_quantize)
def loud_channels_first(answer, rng):
    """act_order with some loud channels among correlated ones, with channels of equal and of nearly equal norm."""
    rows, channels = rng.integer(10, 14), rng.integer(26, 30)
    weight, x = rng.normal(rows, channels), correlated(rng, 80, channels) * spread(rng, channels, 3)
    equal = equally_loud(rng, 40, channels)
    nearly = equal * (
        1 + torch.arange(channels).double() * 2.0**-30
    )  # among equals the last is now the loudest
    options = {"bits": 4, "group_size": channels, "act_order": True}
    return {
        "groups": answer(weight, x, bits=3, group_size=8, act_order=True),
        "damping": answer(weight, x, **options, damping=rng.integer(30, 40) / 100),
        "equal": answer(weight, equal, **options),
        "nearly equal": answer(weight, nearly, **options),
    }


@case(gptq_quantize)
def any_magnitude(answer, rng):
    """Weights and inputs times powers of two: float32 holds them, but not their squares, and some sums."""
    rows, channels = rng.integer(9, 12), rng.integer(17, 20)
    weight, x = rng.normal(rows, channels), correlated(rng, 60, channels)
    return {
        "small inputs": answer(weight, x * 2.0**-90, bits=3, group_size=7),
        "large inputs": answer(weight, x.abs() * 2.0**120, bits=4, group_size=7, act_order=True),
        "small weights": answer(weight * 2.0**-90, x, bits=4, group_size=7),
        "large weights": answer(weight * 2.0**120, x, bits=3, group_size=7, act_order=True),
    }


@case(gptq_quantize)
def dead_channels(answer, rng):
    """Channels that are zero in every token, rows and groups that are zero, and inputs that are all zeros."""
    rows, channels = rng.integer(9, 12), 20
    weight, x = rng.normal(rows, channels), correlated(rng, 50, channels)
    weight[1] = 0
    weight[2, 5:10] = 0
    weight[:, 0] *= 5
    x[:, rng.choice([2, 7])] = 0
    x[:, 0] = x[:, 11] = 0
    static = answer(weight, x, bits=4, group_size=5, act_order=True)
    silent = answer(weight, torch.zeros_like(x), bits=3, group_size=6)
    return {"dead": answer(weight, x, bits=4, group_size=5), "act order": static, "silent": silent}


@case(gptq_quantize)
def the_fewest_and_the_most(answer, rng):
    """2 and 8 bits, one token, one row, groups of one column and groups wider than the layer."""
    channels = rng.integer(11, 15)
    weight, x = rng.normal(8, channels), correlated(rng, 40, channels)
    one = rng.uniform(1, 2, 1, channels)
    return {
        "2 bits": answer(weight, x, bits=2, group_size=channels + 3),
        "8 bits": answer(weight[:1], x, bits=8, group_size=6, damping=1e-3),
        "one token": answer(weight, one, bits=3, group_size=channels, damping=2.5),
        "groups of one": answer(weight, x, bits=rng.integer(5, 7), group_size=1),
        "one column": answer(weight[:, :1], x[:, :1], bits=4, group_size=1, act_order=True),
    }


@case(gptq_quantize)
def other_layouts(answer, rng):
    """A parameter; a transposed weight and every other token of a buffer; bfloat16; float64, and all mixed."""
    rows, channels = rng.integer(9, 12), rng.integer(17, 20)
    weight, x = rng.normal(channels, rows).T, correlated(rng, 120, channels)
    codes, scales = answer(torch.nn.Parameter(weight), x.clone().requires_grad_(), bits=3, group_size=5)
    wide, narrow = weight.double(), weight.bfloat16()
    return {
        "parameter": [codes, scales, scales.requires_grad],
        "views": answer(weight, x[::2], bits=3, group_size=7),
        "bfloat16": answer(narrow, x.bfloat16(), bits=4, group_size=channels, damping=0.2),
        "float64": answer(wide, x.double(), bits=3, group_size=channels, damping=0.4),
        "mixed": answer(weight.half(), x.double(), bits=4, group_size=9, act_order=True),
    }


@case(gptq_quantize)
def refusals(answer, rng):
    """Arguments that make no sense, beside a layer that does."""
    channels = rng.integer(9, 12)
    weight, x = rng.normal(6, channels), correlated(rng, 30, channels)
    options = {"bits": rng.integer(2, 4), "group_size": rng.integer(3, 5)}
    odd = {"NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf}
    tried: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
        "1 bit": (weight, x, {"bits": 1}),
        "9 bits": (weight, x, {"bits": 9}),
        "groups of none": (weight, x, {"group_size": 0}),
        "groups of less": (weight, x, {"group_size": -1}),
        "no damping": (weight, x, {"damping": 0.0}),
        "damping below 0": (weight, x, {"damping": -0.01}),
        "infinite damping": (weight, x, {"damping": math.inf}),
        "damping NaN": (weight, x, {"damping": math.nan}),
        **{f"{name} in weight": (with_one(rng, weight, value), x, {}) for name, value in odd.items()},
        **{f"{name} in x": (weight, with_one(rng, x, value), {}) for name, value in odd.items()},
        "another K": (weight, x[:, 1:], {}),
        "vectors": (weight[0], x[0], {}),
        "x of three axes": (weight, x[None], {}),
        "weight of one axis": (weight[0], x, {}),
        "weight of three axes": (weight[None], x, {}),
        "no rows": (weight[:0], x, {}),
        "no tokens": (weight, x[:0], {}),
        "no columns": (weight[:, :0], x[:, :0], {}),
    }
    found = {name: raised(answer, w, t, **{**options, **more}) for name, (w, t, more) in tried.items()}
    return {**found, "quantized": answer(weight, x, **options)}


@cost(gptq_quantize, share=1 / 6)
def factorizations(answer, rng):
    """Factorizations, inverses and solutions of matrices, and the largest tensor; without act_order, then with."""
    rows, channels, tokens = 8, 12, 20
    weight, x = rng.normal(rows, channels), correlated(rng, tokens, channels)
    words, counted, largest_bytes = ("cholesky", "linalg", "inverse", "solve", "lu_", "geqrf"), 0, 0
    for act_order in (False, True):
        with ExitStack() as stack:
            numpys = [stack.enter_context(calls(numpy.linalg, name)) for name in NUMPYS]
            work = stack.enter_context(TensorWork())
            answer(weight, x, bits=4, group_size=4, act_order=act_order)
        torchs = [name for name in work.calls.elements() if any(word in name for word in words)]
        here = sum("norm" not in name for name in torchs) + sum(one.calls for one in numpys)
        counted, largest_bytes = max(counted, here), max(largest_bytes, work.largest_tensor_bytes)
    return {
        "factorizations": (counted, 8),
        "largest tensor, bytes": (largest_bytes, 8 * channels * tokens),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


def check(weight: Tensor, x: Tensor, bits: int, group_size: int, damping: float) -> None:
    """ValueError for what the contract refuses."""
    if not 2 <= bits <= 8 or group_size < 1 or not 0 < damping < math.inf:
        raise ValueError((bits, group_size, damping))
    if weight.dim() != 2 or x.shape[1:] != weight.shape[1:] or not weight.numel() or not x.numel():
        raise ValueError((weight.shape, x.shape))
    if not bool(weight.isfinite().all()) or not bool(x.isfinite().all()):
        raise ValueError("not finite")


class Columns:
    """A right answer in small steps, on columns in the order of closing; a mistake replaces some of them."""

    def plain(self, given: Tensor) -> Tensor:
        return given.detach()

    def hessian(self, w: Tensor, tokens: Tensor) -> Tensor:
        return tokens.T @ tokens

    def damp(self, hessian: Tensor, damping: float) -> Tensor:
        amount = damping * float(hessian.diagonal().mean()) or 1.0
        return hessian + amount * torch.eye(len(hessian), dtype=hessian.dtype)

    def order(self, hessian: Tensor) -> Tensor:
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)

    def rows(self, hessian: Tensor) -> Tensor:
        """What row t has on its diagonal and to the right of it serves step t."""
        return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)

    def top(self, bits: int) -> int:
        return 2 ** (bits - 1) - 1

    def scale(self, group: Tensor, top: int) -> Tensor:
        largest = group.abs().amax(1)
        return torch.where(largest > 0, largest / top, 1.0).float()

    def seen(self, moved: Tensor, original: Tensor, begin: int, group_size: int) -> Tensor:
        """The weights that the scale of the group which begins there is found from."""
        return moved[:, begin : begin + group_size]

    def code(self, values: Tensor, top: int) -> Tensor:
        return values.round().clamp(-top, top)

    def move(self, error: Tensor, rows: Tensor, t: int) -> Tensor:
        return torch.outer(error / rows[t, t], rows[t])

    def reach(self, t: int, group_size: int, channels: int) -> slice:
        """The columns that step t moves."""
        return slice(t + 1, channels)

    def last(self, codes: Tensor, moved: Tensor, scales: Tensor, top: int) -> Tensor:
        """The codes when all columns are closed, still in the order of closing."""
        return codes

    def undo(self, codes: Tensor, order: Tensor) -> Tensor:
        found = torch.zeros_like(codes)
        found[:, order] = codes
        return found

    def quantize(
        self,
        weight: Tensor,
        x: Tensor,
        *,
        bits: int,
        group_size: int,
        damping: float = 0.01,
        act_order: bool = False,
    ) -> Quantized:
        check(weight, x, bits, group_size, damping)
        original, top = self.plain(weight).double(), self.top(bits)
        channels = original.shape[1]
        hessian = self.hessian(original, self.plain(x).double())
        order = self.order(hessian) if act_order else torch.arange(channels)
        rows = self.rows(self.damp(hessian, damping)[order][:, order])
        moved, group = original[:, order], order // group_size
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        scales = torch.ones(len(weight), -(-channels // group_size))
        for begin in range(0, channels, group_size) if act_order else ():
            scales[:, begin // group_size] = self.scale(original[:, begin : begin + group_size], top)
        for t in range(channels):
            if not act_order and t % group_size == 0:
                scales[:, t // group_size] = self.scale(self.seen(moved, original, t, group_size), top)
            scale = scales[:, group[t]].double()
            codes[:, t] = self.code(moved[:, t] / scale, top).to(torch.int8)
            reach = self.reach(t, group_size, channels)
            moved[:, reach] -= self.move(moved[:, t] - codes[:, t] * scale, rows, t)[:, reach]
        return self.undo(self.last(codes, moved, scales[:, group].double(), top), order), scales


def variant(**steps: Any) -> Callable[..., Quantized]:
    """A right answer with some steps replaced."""
    return type("Variant", (Columns,), steps)().quantize


@mistake(gptq_quantize, "Rounds each weight to nearest: the open columns never hear of an error.")
def rounded_to_nearest(*arguments, **options):
    return variant(reach=lambda self, t, group_size, channels: slice(0))(*arguments, **options)


@mistake(
    gptq_quantize,
    "Takes every row from one inverse of all of H: a column that is closed must leave H before the next row is taken.",
)
def one_inverse_for_all(*arguments, **options):
    return variant(rows=lambda self, hessian: torch.linalg.inv(hessian))(*arguments, **options)


@mistake(gptq_quantize, "Takes the factor of H where that of its inverse belongs.")
def factor_of_h(*arguments, **options):
    return variant(rows=lambda self, hessian: torch.linalg.cholesky(hessian, upper=True))(
        *arguments, **options
    )


@mistake(
    gptq_quantize,
    "Inverts the factor of H instead of factoring the inverse: that is upper triangular too, but the inverse is its "
    "product in the other order, and its rows do not belong to the open columns.",
)
def wrong_triangle(*arguments, **options):
    def rows(self, hessian):
        return torch.linalg.inv(torch.linalg.cholesky(hessian)).T

    return variant(rows=rows)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Leaves the damping out: with fewer tokens than channels, or a dead channel, H has no inverse.",
)
def not_damped(*arguments, **options):
    return variant(damp=lambda self, hessian, damping: hessian)(*arguments, **options)


@mistake(
    gptq_quantize, "Adds damping as it is, not as a share of H's mean diagonal: it depends on the units of x."
)
def damping_not_relative(*arguments, **options):
    def damp(self, hessian, damping):
        return hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)

    return variant(damp=damp)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Sets the weights of channels that are silent in calibration to 0, as the published code does: should one of them "
    "speak later, its weights are gone.",
)
def dead_weights_zeroed(weight, x, **options):
    if weight.dim() == 2 and x.shape[1:] == weight.shape[1:] and x.any():
        weight = torch.where((x == 0).all(0), torch.zeros_like(weight), weight)
    return variant()(weight, x, **options)


@mistake(gptq_quantize, "Does not divide the error by the diagonal entry of its row.")
def not_divided(*arguments, **options):
    def move(self, error, rows, t):
        return torch.outer(error, rows[t])

    return variant(move=move)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Divides by the diagonal of the inverse, which is the square of what stands on the factor's.",
)
def divided_twice(*arguments, **options):
    def move(self, error, rows, t):
        return torch.outer(error / rows[t, t] ** 2, rows[t])

    return variant(move=move)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Adds the correction where it is to be subtracted: every error is doubled, not made up for.",
)
def sign_flipped(*arguments, **options):
    def move(self, error, rows, t):
        return -torch.outer(error / rows[t, t], rows[t])

    return variant(move=move)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Moves only the columns of its own group: what a block leaves open never reaches the blocks behind it.",
)
def within_the_group(*arguments, **options):
    def reach(self, t, group_size, channels):
        return slice(t + 1, t - t % group_size + group_size)

    return variant(reach=reach)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Works in blocks of 128 columns, and what a block leaves open never reaches the blocks behind it.",
)
def within_the_block(*arguments, **options):
    def reach(self, t, group_size, channels):
        return slice(t + 1, t - t % 128 + 128)

    return variant(reach=reach)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Finds the scales of all groups from the original weights: by the time a group is reached its weights have moved, "
    "and they are clipped or waste codes.",
)
def scales_of_the_original(*arguments, **options):
    def seen(self, moved, original, begin, group_size):
        return original[:, begin : begin + group_size]

    return variant(seen=seen)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Does not clamp: a weight that was moved beyond its group's maximum gets a code that the bits do not have.",
)
def not_clamped(*arguments, **options):
    return variant(code=lambda self, values, top: values.round())(*arguments, **options)


@mistake(gptq_quantize, "Divides by 2^(bits-1): the top code is never reached, and clipped where it is.")
def scale_by_the_power(*arguments, **options):
    def scale(self, group, top):
        largest = group.abs().amax(1)
        return torch.where(largest > 0, largest / (top + 1), 1.0).float()

    return variant(scale=scale)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Takes 1 for every scale below 1e-5, not only for 0: what small weights a group has are all rounded to 0.",
)
def small_scales_are_1(*arguments, **options):
    def scale(self, group, top):
        found = (group.abs().amax(1) / top).float()
        return torch.where(found < 1e-5, 1.0, found)

    return variant(scale=scale)(*arguments, **options)


@mistake(gptq_quantize, "Lets codes go down to -2^(bits-1), which has no counterpart above.")
def one_code_more_below(*arguments, **options):
    return variant(code=lambda self, values, top: values.round().clamp(-top - 1, top))(*arguments, **options)


@mistake(gptq_quantize, "Rounds ties away from zero.")
def ties_away(*arguments, **options):
    def code(self, values, top):
        return (values.abs() + 0.5).floor().clamp(max=top) * values.sign()

    return variant(code=code)(*arguments, **options)


@mistake(
    gptq_quantize, "Centres the inputs: a layer's error is made by all of x, and its mean is part of that."
)
def covariance(*arguments, **options):
    def hessian(self, w, tokens):
        return (tokens - tokens.mean(0)).T @ (tokens - tokens.mean(0))

    return variant(hessian=hessian)(*arguments, **options)


@mistake(
    gptq_quantize, "Makes H from the weights; it is the inputs that say which errors can make up for others."
)
def h_of_the_weights(*arguments, **options):
    return variant(hessian=lambda self, w, tokens: w.T @ w)(*arguments, **options)


@mistake(gptq_quantize, "Makes H from the first 256 tokens only, to save time.")
def first_tokens_only(*arguments, **options):
    def hessian(self, w, tokens):
        return tokens[:256].T @ tokens[:256]

    return variant(hessian=hessian)(*arguments, **options)


@mistake(gptq_quantize, "Looks at the last axis of weight alone: what has one axis or three is no layer.")
def axes_of_weight_unchecked(weight, x, **options):
    if x.dim() == 2 and weight.shape[-1] == x.shape[-1]:
        weight = weight.reshape(-1, weight.shape[-1])
    return variant()(weight, x, **options)


@mistake(
    gptq_quantize,
    "Keeps H in bfloat16: with 8 bits of mantissa its small eigenvalues, which the inverse is made of, are noise.",
)
def h_in_half_precision(*arguments, **options):
    def hessian(self, w, tokens):
        return (tokens.T @ tokens).bfloat16().double()

    return variant(hessian=hessian)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Calculates in float32: with little damping the inverse is noise, and the squares of large inputs overflow.",
)
def single_precision(weight, x, **options):
    check(weight, x, options["bits"], options["group_size"], options.get("damping", 0.01))

    def hessian(self, w, tokens):
        return (tokens.float().T @ tokens.float()).nan_to_num()

    def rows(self, hessian):
        inverse = torch.linalg.inv_ex(hessian.float())[0]
        return torch.linalg.cholesky_ex(inverse, upper=True)[0].double()

    return variant(hessian=hessian, rows=rows)(weight.float(), x.float(), **options)


@mistake(
    gptq_quantize,
    "Adds 1e-6 to H besides the damping, for safety: inputs that are small enough lose all they have in common.",
)
def damped_absolutely_too(*arguments, **options):
    def damp(self, hessian, damping):
        amount = damping * float(hessian.diagonal().mean()) + 1e-6
        return hessian + amount * torch.eye(len(hessian), dtype=hessian.dtype)

    return variant(damp=damp)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Follows the weight with a graph: a parameter's scales need a gradient, and keep every step of the way in memory.",
)
def with_a_graph(*arguments, **options):
    return variant(plain=lambda self, given: given)(*arguments, **options)


@mistake(gptq_quantize, "With act_order the codes stay in the order in which their columns were closed.")
def order_not_undone(*arguments, **options):
    return variant(undo=lambda self, codes, order: codes)(*arguments, **options)


@mistake(
    gptq_quantize,
    "Ignores act_order: a loud column that comes late finds few open columns that could make up for its error.",
)
def always_from_first_to_last(*arguments, act_order=False, **options):
    def order(self, hessian):
        return torch.arange(len(hessian))

    return variant(order=order)(*arguments, act_order=act_order, **options)


@mistake(gptq_quantize, "Closes the quietest column first.")
def quietest_first(*arguments, **options):
    return variant(order=lambda self, hessian: torch.argsort(hessian.diagonal()))(*arguments, **options)


@mistake(
    gptq_quantize,
    "Turns an ascending order around: of columns that are equally loud the last now comes first.",
)
def ties_turned_around(*arguments, **options):
    def order(self, hessian):
        return torch.argsort(hessian.diagonal(), stable=True).flip(0)

    return variant(order=order)(*arguments, **options)


@mistake(
    gptq_quantize,
    "With act_order makes groups of columns that are closed one after another: the codes of a group then lie "
    "scattered, and without the order nobody can tell which scale is whose.",
)
def groups_by_order(weight, x, *, act_order=False, **options):
    if not act_order:
        return variant()(weight, x, **options)
    order = torch.argsort(x.double().square().sum(0), descending=True, stable=True)
    codes, scales = variant()(weight[:, order], x[:, order], **options)
    return codes[:, torch.argsort(order)], scales


@mistake(
    gptq_quantize,
    "Moves closed columns too, and rounds all of them anew at the end: what had been made up for is lost again.",
)
def rounded_at_the_end(*arguments, **options):
    def last(self, codes, moved, scales, top):
        return self.code(moved / scales, top).to(torch.int8)

    return variant(
        rows=lambda self, hessian: torch.linalg.inv(hessian),
        reach=lambda self, t, group_size, channels: slice(None),
        last=last,
    )(*arguments, **options)


@alternative(
    gptq_quantize, "The paper's equation 3: one elimination step takes a closed column out of the inverse"
)
def eliminated(*arguments, **options):
    def rows(self, hessian):
        inverse, found = torch.linalg.inv(hessian), torch.zeros_like(hessian)
        for t in range(len(hessian)):
            found[t] = inverse[t]
            inverse = inverse - torch.outer(inverse[:, t], inverse[t]) / inverse[t, t]
        return found

    return variant(rows=rows)(*arguments, **options)


@alternative(
    gptq_quantize, "No inverse of H: the factor from the last column to the first, and its triangle inverted"
)
def factored_backwards(*arguments, **options):
    def rows(self, hessian):
        backwards = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
        return torch.linalg.solve_triangular(backwards, torch.eye(len(hessian)).double(), upper=True)

    return variant(rows=rows)(*arguments, **options)


@alternative(gptq_quantize, "Writes the factorization itself, and solves for the inverse triangle row by row")
def factored_by_hand(*arguments, **options):
    def rows(self, hessian):
        backwards, lower = hessian.flip(0, 1), torch.zeros_like(hessian)
        for j in range(len(hessian)):
            column = backwards[j:, j] - lower[j:, :j] @ lower[j, :j]
            lower[j:, j] = column / column[0].sqrt()
        found = torch.eye(len(hessian), dtype=hessian.dtype)
        for j in range(len(hessian)):
            found[j] = (found[j] - lower[j, :j] @ found[:j]) / lower[j, j]
        return found.flip(0, 1)

    return variant(rows=rows)(*arguments, **options)


@alternative(
    gptq_quantize,
    "The definition: each step solves anew for all open columns, from the errors of all closed ones",
    meets_costs=False,
)
def solved_at_each_step(weight, x, *, bits, group_size, damping=0.01, act_order=False):
    check(weight, x, bits, group_size, damping)
    plain, original, x = Columns(), weight.detach().double(), x.detach()
    hessian = plain.damp(x.double().T @ x.double(), damping)
    opened = plain.order(hessian).tolist() if act_order else list(range(weight.shape[1]))
    closed: list[int] = []
    top, moved, at = plain.top(bits), original.clone(), torch.arange(weight.shape[1]) // group_size
    scales = torch.ones(len(weight), int(at[-1]) + 1)
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    while opened:
        column = opened[0]
        for group in range(int(at[-1]) + 1):
            if not closed if act_order else group * group_size == column:
                scales[:, group] = plain.scale(moved[:, at == group], top)
        scale = scales[:, at[column]].double()
        codes[:, column] = plain.code(moved[:, column] / scale, top).to(torch.int8)
        moved[:, column] = codes[:, column] * scale
        closed.append(opened.pop(0))
        errors = (moved - original)[:, closed]
        within, between = hessian[opened][:, opened], hessian[opened][:, closed]
        moved[:, opened] = original[:, opened] - torch.linalg.solve(within, between @ errors.T).T
    return codes, scales


@alternative(
    gptq_quantize, "Algorithm 1 in lazy batches, and a scale is found with what its batch still owes"
)
def lazy_batches(weight, x, *, bits, group_size, damping=0.01, act_order=False):
    if act_order:
        return variant()(weight, x, bits=bits, group_size=group_size, damping=damping, act_order=True)
    check(weight, x, bits, group_size, damping)
    plain, w, x, batch = Columns(), weight.detach().double().clone(), x.detach(), 6
    upper, top = plain.rows(plain.damp(x.double().T @ x.double(), damping)), plain.top(bits)
    codes, scales = [], []
    for begin in range(0, w.shape[1], batch):
        errors = torch.zeros(len(w), batch, dtype=torch.float64)[:, : w.shape[1] - begin]
        for column in range(begin, begin + errors.shape[1]):
            owed = errors[:, : column - begin] @ upper[begin:column]
            if column % group_size == 0:
                group = slice(column, column + group_size)
                scales.append(plain.scale((w - owed)[:, group], top))
            value = w[:, column] - owed[:, column]
            codes.append(plain.code(value / scales[-1].double(), top))
            errors[:, column - begin] = (value - codes[-1] * scales[-1].double()) / upper[column, column]
        w -= errors @ upper[begin : begin + errors.shape[1]]
    return torch.stack(codes, 1).to(torch.int8), torch.stack(scales, 1)
