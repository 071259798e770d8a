"""Weights as small integers with a scale for every run of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmcourse.counting import TensorWork
from llmcourse.exercise import Rng, alternative, case, cost, excuse, exercise, mistake, raised

QUANTIZERS = (
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "_fake_quantize_learnable_per_channel_affine",
    "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fused_moving_avg_obs_fake_quant",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_tensor_dynamic",
)


@exercise(
    points=3,
    minutes=8,
    forbid=(
        *(f"{place}.{name}" for place in ("torch", "torch.ops.aten") for name in QUANTIZERS),
        "torch.ops.aten.fake_quantize_per_channel_affine_cachemask",
        "torch.ops.aten.fake_quantize_per_tensor_affine_cachemask",
    ),
    hints=(
        "Give the groups a dimension of their own, [N, groups, group_size]: then every step is one operation on all of "
        "them. The inputs of a product are the columns of the weight.",
        "Zeros behind a short row change neither the largest magnitude nor the codes in front of them. Reshaping the "
        "whole matrix at once lets groups run over the ends of rows.",
    ),
)
def quantize_groups(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric integer codes of a weight, with a scale for each run of `group_size`
    inputs of a row; about 10 lines.

    weight [N, K] = [outputs, inputs]: float32, bfloat16 or float16, of any strides and
    any finite values; it may be an nn.Parameter, but no result requires grad. A row is
    divided into groups of group_size columns, from the first column on; the last group
    is short where group_size does not divide K, and the only one where group_size > K,
    which it may be by far.
    Returns (codes, scales): codes [N, K] int8, scales [N, groups] float32, groups =
    ceil(K / group_size).

    scale = largest magnitude of the group / (2**(bits - 1) - 1), and code = weight /
    scale, rounded to nearest, ties to even (torch.round), all in float32. So codes are
    within +-(2**(bits - 1) - 1). A scale below 2**-126, float32's smallest normal
    number, is replaced by 1: that of a group of zeros, for one.

    ValueError, with what came: bits outside 2..8, group_size below 1, a weight that
    does not have two dimensions or has no values, NaN or an infinity in it.

    Costs (a sixth of the points): at most 60 torch operations, however many rows and
    groups there are, none of which makes a tensor of more bytes than weight.float() has
    (where group_size divides K).
    """
    ### BEGIN SOLUTION
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 2 to 8")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; expected at least 1")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [outputs, inputs] with values")
    if not torch.isfinite(weight).all():
        raise ValueError("weight has NaN or infinities; expected finite values")
    inputs = weight.shape[1]
    group_size = min(group_size, inputs)
    padded = functional.pad(weight.detach().float(), (0, -inputs % group_size))
    groups = padded.unflatten(1, (-1, group_size))
    scales = groups.abs().amax(2) / (2 ** (bits - 1) - 1)
    scales[scales < 2**-126] = 1
    codes = (groups / scales.unsqueeze(2)).round().to(torch.int8)
    return codes.flatten(1)[:, :inputs], scales
    ### END SOLUTION


excuse(
    quantize_groups,
    "min(group_size, inputs) -> min(inputs, group_size)",
    "The smaller of two integers is the same in either order.",
)


# ---------------------------------------------------------------------------------------------------------- cases


MOST_OPERATIONS = 60


def settled(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The weight, moved so that no order of operations changes a code: at most 0.4 steps from one."""
    top, parts = 2 ** (bits - 1) - 1, []
    for part in weight.double().split(group_size, dim=1):
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
        codes = (part / scale).round()
        parts.append((codes + (part / scale - codes).clamp(-0.4, 0.4)) * scale)
    return torch.cat(parts, 1).float()


def drawn(rng: Rng, outputs: int, inputs: int) -> Tensor:
    """Weights whose columns differ in size, and rows and columns in pairs that resemble each other."""
    mixed = rng.normal(outputs, 3) @ rng.normal(3, inputs) + rng.normal(outputs, inputs)
    return 0.02 * mixed * 2.0 ** rng.integers(-2, 2, inputs)


@case(quantize_groups)
def groups_of_every_size(answer, rng):
    """Matrices that are not square, at 2 to 8 bits, in groups that divide the row."""
    found = {}
    for bits in range(2, 9):
        group_size, groups = rng.choice([2, 3, 4, 8]), rng.integer(2, 5)
        weight = settled(drawn(rng, rng.integer(3, 12), group_size * groups), bits, group_size)
        found[f"{bits} bits, groups of {group_size}"] = answer(weight, bits=bits, group_size=group_size)
    return found


@case(quantize_groups)
def short_last_group(answer, rng):
    """Groups that do not divide the row, longer ones than the row, groups of one; one row and one column."""
    bits, group_size, groups = rng.integer(3, 8), rng.integer(5, 9), rng.integer(2, 4)
    found = {}
    for short in (1, rng.integer(2, group_size - 2), group_size - 1):
        # As many rows as a group is long, so that all values together can be divided into groups.
        weight = settled(drawn(rng, group_size, group_size * groups + short), bits, group_size)
        found[f"{groups} groups of {group_size} and {short}"] = answer(
            weight, bits=bits, group_size=group_size
        )
    row = settled(drawn(rng, rng.integer(2, 5), group_size), bits, group_size)
    for name, shape in {"one column": (3, 1), "one row": (1, 2 * group_size + 1)}.items():
        found[name] = answer(settled(drawn(rng, *shape), bits, group_size), bits=bits, group_size=group_size)
    found["a group for each row"] = answer(row, bits=bits, group_size=group_size)
    found["a group longer than the row"] = answer(row, bits=bits, group_size=group_size + 1)
    found["a group far longer than memory"] = answer(row, bits=bits, group_size=10**15)
    return {**found, "groups of one": answer(row, bits=bits, group_size=1)}


@case(quantize_groups)
def loud_columns(answer, rng):
    """A few columns a hundred times as loud as the others, and a loud value in one group."""
    bits, group_size = rng.integer(3, 5), rng.integer(4, 8)
    weight = drawn(rng, rng.integer(6, 10), group_size * 4)
    weight[:, rng.integer(0, group_size - 1) + group_size * rng.integer(0, 3)] *= 100
    single = drawn(rng, 7, group_size * 3)
    single[rng.integer(0, 6), rng.integer(0, group_size * 3 - 1)] = -rng.integer(20, 40)
    return {
        "columns": answer(settled(weight, bits, group_size), bits=bits, group_size=group_size),
        "value": answer(settled(single, bits, group_size), bits=bits, group_size=group_size),
    }


@case(quantize_groups)
def zeros_and_one_sided_groups(answer, rng):
    """Groups of zeros, constant ones, ones all positive or all negative, and very small ones, in one matrix."""
    bits, group_size = rng.integer(2, 8), rng.integer(3, 6)
    weight = drawn(rng, 6, group_size * 3)
    weight[0, :group_size] = 0
    weight[1, group_size:] = 0
    weight[2, -group_size:] = rng.integer(10, 90) / 1000
    weight[3] = weight[3].abs() + 0.05
    weight[4] = -weight[4].abs() - 0.05
    weight[5] *= 2.0**-45
    weight = settled(weight, bits, group_size)
    edge_bits = rng.integer(3, 8)  # with 2, a scale is the largest magnitude itself
    smallest = 2.0**-126 * (2 ** (edge_bits - 1) - 1)
    edge = torch.zeros(4, group_size)
    edge[0, 0], edge[1, 1], edge[2, 2] = (smallest * share for share in (1, -0.8, 0.7))
    zeros = torch.zeros(rng.integer(1, 3), group_size + 1)
    return {
        "mixed": answer(weight, bits=bits, group_size=group_size),
        "smallest normal scale": answer(edge, bits=edge_bits, group_size=group_size),
        "zeros": answer(zeros, bits=bits, group_size=group_size),
    }


@case(quantize_groups)
def halfway_between_codes(answer, rng):
    """Weights exactly halfway between two codes."""
    found = {}
    for bits in (2, rng.integer(3, 7), 8):
        top, groups = 2 ** (bits - 1) - 1, rng.integer(1, 3)
        codes = rng.integers(-top, top - 1, 5, groups, 6) + 0.5
        codes[:, :, 0] = top * rng.choice([-1, 1])
        scales = 2.0 ** rng.integers(-9, 3, 5, groups, 1)
        found[f"{bits} bits"] = answer((codes * scales).flatten(1), bits=bits, group_size=6)
    return found


@case(quantize_groups)
def views_and_parameters(answer, rng):
    """A transposed weight, every other row and column of one, and an nn.Parameter."""
    bits, group_size, inputs = rng.integer(3, 8), rng.integer(4, 6), rng.integer(9, 14)
    weight = settled(drawn(rng, 8, inputs), bits, group_size)
    wide = rng.normal(16, 2 * inputs)
    wide[::2, ::2] = weight
    square = settled(drawn(rng, 3 * group_size, 3 * group_size), bits, group_size)
    found = answer(torch.nn.Parameter(weight.clone()), bits=bits, group_size=group_size)
    return {
        "transposed": answer(weight.T.contiguous().T, bits=bits, group_size=group_size),
        "transposed square": answer(square.T.contiguous().T, bits=bits, group_size=group_size),
        "every other row and column": answer(wide[::2, ::2], bits=bits, group_size=group_size),
        "parameter": found,
        "requires grad": [part.requires_grad for part in found if isinstance(part, Tensor)],
    }


@case(quantize_groups)
def dtypes_at_both_ends(answer, rng):
    """float32, bfloat16 and float16, each among its largest numbers and its smallest, at every distance from a half."""
    found = {}
    for dtype, longest, low, high in (
        (torch.float32, 2047, -120, 117),
        (torch.bfloat16, 255, -120, 120),
        (torch.float16, 2047, -24, 5),
    ):
        # All multiples of a unit, up to what the dtype holds. 254 and longest have no common divisor, so that no
        # multiple is within 1 / (2 * longest) = 2e-4 of a half; float32 rounds codes by 127 * 2**-23 = 2e-5.
        multiples = rng.uniform(0, 1, 2, longest).argsort(1) + 1
        signs = rng.integers(0, 1, 2, longest) * 2 - 1
        signs[0], signs[1, multiples[1].argmax()] = 1, -1  # the largest sum, and the largest range
        for end, power in (("smallest", low), ("largest", high)):
            weight = (multiples * signs * 2.0**power).to(dtype)
            found[f"{end} {dtype}"] = answer(weight, bits=8, group_size=longest)
    edge = torch.tensor([1, -1]) * torch.finfo(torch.float32).max
    return {**found, "very largest": answer(edge.unsqueeze(1), bits=rng.integer(2, 8), group_size=1)}


@case(quantize_groups)
def refusals(answer, rng):
    """Bits, group sizes and shapes that are not allowed, NaN and infinities anywhere, beside a weight in order."""
    bits, group_size = rng.integer(2, 8), rng.integer(2, 5)
    weight = settled(drawn(rng, 4, 2 * group_size + 1), bits, group_size)
    shapes = {"no rows": (0, 8), "no columns": (5, 0), "one dimension": (8,), "three dimensions": (2, 3, 8)}
    found: dict[str, Any] = {"as it should be": answer(weight, bits=bits, group_size=group_size)}
    for wrong in (-1, 0, 1, 9, 16):
        found[f"{wrong} bits"] = raised(answer, weight, bits=wrong, group_size=group_size)
    for wrong in (0, -group_size):
        found[f"groups of {wrong}"] = raised(answer, weight, bits=bits, group_size=wrong)
    for name, shape in shapes.items():
        found[name] = raised(answer, rng.normal(*shape), bits=bits, group_size=group_size)
    inputs = weight.shape[1]
    places = {"first": 0, "middle": rng.integer(1, 4 * inputs - 2), "last": 4 * inputs - 1}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (math.nan, math.inf, -math.inf):
            for name, place in places.items():
                broken = weight.to(dtype, copy=True)
                broken.view(-1)[place] = value
                found[f"{name} {value} {dtype}"] = raised(answer, broken, bits=bits, group_size=group_size)
    weight[0, 0], weight[-1, -1] = math.inf, -math.inf
    return {**found, "both infinities": raised(answer, weight, bits=bits, group_size=group_size)}


@cost(quantize_groups, share=1 / 6)
def all_groups_at_once(answer, rng):
    """A weight of 64 rows with 64 groups each, and one with a short group more: operations, the largest tensor."""
    weight, longer = (settled(drawn(rng, 64, inputs), 4, 4) for inputs in (256, 257))
    with TensorWork() as work:
        found = answer(weight, bits=4, group_size=4)
    with TensorWork() as with_a_short_group:
        found_with_a_short_group = answer(longer, bits=4, group_size=4)
    calls = work.calls + with_a_short_group.calls
    return {
        "observed": [found, found_with_a_short_group],
        "torch operations": (sum(work.calls.values()), MOST_OPERATIONS),
        "torch operations with a short group": (sum(with_a_short_group.calls.values()), MOST_OPERATIONS),
        "operations of torch's own quantizers": (
            sum(number for name, number in calls.items() if "quantize" in name),
            0,
        ),
        "largest tensor, bytes": (work.largest_tensor_bytes, weight.nbytes),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Grouping:
    """A right answer in small steps; a mistake replaces one of them."""

    def check_numbers(self, bits: int, group_size: int) -> None:
        if bits < 2 or bits > 8 or group_size <= 0:
            raise ValueError("bits or group size")

    def check_shape(self, weight: Tensor) -> None:
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError("shape")

    def check_values(self, weight: Tensor) -> None:
        if not math.isfinite(weight.float().abs().max().item()):
            raise ValueError("not finite")

    def wide(self, weight: Tensor) -> Tensor:
        return weight.detach().to(torch.float32)

    def grouped(self, weight: Tensor, size: int) -> Tensor:
        """[N, K] -> [N, groups, size]"""
        missing = -weight.shape[1] % size
        padded = torch.cat([weight, weight.new_zeros(weight.shape[0], missing)], 1) if missing else weight
        return padded.reshape(weight.shape[0], -1, size)

    def ungrouped(self, codes: Tensor, rows: int, inputs: int) -> Tensor:
        return codes.reshape(rows, -1)[:, :inputs]

    def scales(self, groups: Tensor, bits: int) -> Tensor:
        return torch.maximum(groups.amax(-1), -groups.amin(-1)) / (2 ** (bits - 1) - 1)

    def usable(self, scales: Tensor) -> Tensor:
        return torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0)

    def rounded(self, steps: Tensor) -> Tensor:
        return torch.round(steps)

    def limited(self, codes: Tensor, bits: int) -> Tensor:
        return codes

    def quantize(self, weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
        self.check_numbers(bits, group_size)
        self.check_shape(weight)
        self.check_values(weight)
        rows, inputs = weight.shape
        groups = self.grouped(self.wide(weight), min(inputs, group_size))
        scales = self.usable(self.scales(groups, bits))
        codes = self.limited(self.rounded(groups / scales[..., None]), bits)
        return self.ungrouped(codes, rows, inputs).to(torch.int8), scales


def variant(**steps: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """An answer with some steps replaced."""
    return type("Variant", (Grouping,), steps)().quantize


@mistake(
    quantize_groups,
    "Groups the outputs, not the inputs: every term of an output's sum then has a scale of its own.",
)
def groups_along_outputs(weight, *, bits, group_size):
    if weight.dim() != 2:
        raise ValueError("shape")
    codes, scales = variant()(weight.T, bits=bits, group_size=group_size)
    return codes.T, scales.T


@mistake(quantize_groups, "Has one scale a row, repeated for each group: one loud column quiets all others.")
def one_scale_a_row(weight, *, bits, group_size):
    def scales(self, groups, bits):
        return groups.abs().amax((1, 2)).unsqueeze(1).expand(-1, groups.shape[1]) / (2 ** (bits - 1) - 1)

    return variant(scales=scales)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Has one scale for all of the weight.")
def one_scale(weight, *, bits, group_size):
    def scales(self, groups, bits):
        return groups.abs().max().expand(groups.shape[:2]) / (2 ** (bits - 1) - 1)

    return variant(scales=scales)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Lets groups run on over the ends of rows, as reshape(-1, group_size) does, and pads the last one only.",
)
def groups_over_row_ends(weight, *, bits, group_size):
    def grouped(self, weight, size):
        flat = weight.reshape(-1)
        missing = -len(flat) % size
        padded = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
        return padded.reshape(1, -1, size)

    def ungrouped(self, codes, rows, inputs):
        return codes.reshape(-1)[: rows * inputs].reshape(rows, inputs)

    codes, scales = variant(grouped=grouped, ungrouped=ungrouped)(weight, bits=bits, group_size=group_size)
    return codes, scales.reshape(len(weight), -1) if scales.numel() % len(weight) == 0 else scales


@mistake(quantize_groups, "Leaves out what remains of a row behind the last whole group: those codes stay 0.")
def remainder_left_out(weight, *, bits, group_size):
    def grouped(self, weight, size):
        return weight[:, : weight.shape[1] // size * size].reshape(len(weight), -1, size)

    def ungrouped(self, codes, rows, inputs):
        whole = codes.reshape(rows, -1)
        missing = inputs - whole.shape[1]
        return torch.cat([whole, whole.new_zeros(rows, missing)], 1) if missing else whole

    return variant(grouped=grouped, ungrouped=ungrouped)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Pads a row to a whole group, also where the group is far longer than the row.")
def padded_to_any_length(weight, *, bits, group_size):
    def grouped(self, weight, size):
        longer = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size))
        return longer.reshape(weight.shape[0], -1, group_size)

    return variant(grouped=grouped)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Refuses a group size that does not divide the row.")
def remainder_refused(weight, *, bits, group_size):
    def grouped(self, weight, size):
        if weight.shape[1] % size:
            raise ValueError("remainder")
        return weight.reshape(len(weight), -1, size)

    return variant(grouped=grouped)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Makes the groups equally long, as chunk does: where a short one should remain, all end elsewhere.",
)
def groups_evened_out(weight, *, bits, group_size):
    def grouped(self, weight, size):
        groups = -(-weight.shape[1] // size)
        return Grouping.grouped(self, weight, -(-weight.shape[1] // groups))

    return variant(grouped=grouped)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Begins with the short group: the padding is in front of the row, not behind it.")
def short_group_first(weight, *, bits, group_size):
    def grouped(self, weight, size):
        return Grouping.grouped(self, weight.flip(1), size).flip(1, 2)

    def ungrouped(self, codes, rows, inputs):
        return codes.reshape(rows, -1)[:, -inputs:]

    return variant(grouped=grouped, ungrouped=ungrouped)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Takes group_size for the number of groups in a row.")
def size_for_number(weight, *, bits, group_size):
    def grouped(self, weight, size):
        return Grouping.grouped(self, weight, -(-weight.shape[1] // size))

    return variant(grouped=grouped)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Reads a transposed weight in the order of its memory, as as_strided does: other weights, and no error.",
)
def strides_ignored(weight, *, bits, group_size):
    def wide(self, weight):
        rows, inputs = weight.shape
        return weight.detach().as_strided((rows, inputs), (inputs, 1)).float()

    return variant(wide=wide)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Divides the largest magnitude by 2**(bits - 1), whose positive code does not exist, and clamps: the largest "
    "weights are cut.",
)
def one_code_too_many(weight, *, bits, group_size):
    def scales(self, groups, bits):
        return groups.abs().amax(2) / 2 ** (bits - 1)

    def limited(self, codes, bits):
        return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    return variant(scales=scales, limited=limited)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Divides by half of all steps, (2**bits - 1) / 2, so the largest magnitude falls between two codes.",
)
def half_of_all_steps(weight, *, bits, group_size):
    def scales(self, groups, bits):
        return 2 * groups.abs().amax(2) / (2**bits - 1)

    def limited(self, codes, bits):
        return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    return variant(scales=scales, limited=limited)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Gives the largest magnitude the code -2**(bits - 1) and lets the scale be negative, as some file formats do.",
)
def lowest_code_for_the_largest(weight, *, bits, group_size):
    def scales(self, groups, bits):
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        return -largest / 2 ** (bits - 1)

    def usable(self, scales):
        return torch.where(scales.abs() >= torch.finfo(torch.float32).tiny, scales, 1.0)

    def limited(self, codes, bits):
        return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    return variant(scales=scales, usable=usable, limited=limited)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Takes the largest weight, not the largest magnitude: loud negative ones wrap or are cut.",
)
def sign_kept(weight, *, bits, group_size):
    def scales(self, groups, bits):
        return groups.amax(2) / (2 ** (bits - 1) - 1)

    def limited(self, codes, bits):
        return codes.clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)

    return variant(scales=scales, limited=limited)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Takes the distance from the least to the largest weight, as for codes with a zero-point: the longer side is cut.",
)
def range_for_magnitude(weight, *, bits, group_size):
    def scales(self, groups, bits):
        return (groups.amax(2) - groups.amin(2)) / (2**bits - 1)

    def limited(self, codes, bits):
        return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    return variant(scales=scales, limited=limited)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups, "Cuts the fraction off, as .to(torch.int8) does: every weight shrinks by half a step."
)
def fraction_cut(weight, *, bits, group_size):
    # What is a whole step stays one: a quotient may be a little below it.
    return variant(rounded=lambda self, steps: (steps * (1 + 2**-20)).trunc())(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Rounds down: every weight moves by half a step to the negative side.")
def rounded_down(weight, *, bits, group_size):
    return variant(rounded=lambda self, steps: (steps + 2**-12).floor())(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Rounds halves up, as adding 0.5 does, where torch.round takes the even code.")
def halves_up(weight, *, bits, group_size):
    return variant(rounded=lambda self, steps: (steps + 0.5).floor())(
        weight, bits=bits, group_size=group_size
    )


@mistake(
    quantize_groups, "Rounds halves away from zero, as C's round does, where torch.round takes the even code."
)
def halves_away(weight, *, bits, group_size):
    return variant(rounded=lambda self, steps: (steps.abs() + 0.5).floor() * steps.sign())(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Divides a group of zeros by its scale of 0: NaN, which as an integer is anything.")
def zero_scale(weight, *, bits, group_size):
    return variant(usable=lambda self, scales: scales)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Replaces scales of exactly 0 only: below 2**-126 a scale loses its digits, and its inverse can be infinite.",
)
def only_zero_replaced(weight, *, bits, group_size):
    return variant(usable=lambda self, scales: torch.where(scales == 0, 1.0, scales))(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Adds 1e-8 to every scale against division by zero: small groups lose their codes.")
def epsilon_added(weight, *, bits, group_size):
    return variant(usable=lambda self, scales: scales + 1e-8)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Holds all scales above a small constant: groups of smaller weights become zeros.")
def scales_held_up(weight, *, bits, group_size):
    return variant(usable=lambda self, scales: scales.clamp_min(1e-5))(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Rounds the scales to float16, where the small ones lose their digits or become 0.")
def scales_in_float16(weight, *, bits, group_size):
    def usable(self, scales):
        return Grouping.usable(self, scales.half().float())

    return variant(usable=usable)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Divides in the weight's own dtype: in bfloat16 a scale has 8 bits, and weights fall to other codes.",
)
def in_the_weight_s_dtype(weight, *, bits, group_size):
    codes, scales = variant(wide=lambda self, weight: weight.detach())(
        weight, bits=bits, group_size=group_size
    )
    return codes, scales.float()


@mistake(
    quantize_groups,
    "Replaces scales below the smallest normal number of the weight's dtype: in float16 that is 6e-5, and weights "
    "of an ordinary size become zeros.",
)
def floor_of_the_weight_s_dtype(weight, *, bits, group_size):
    tiny = torch.finfo(weight.dtype).tiny
    return variant(usable=lambda self, scales: torch.where(scales < tiny, 1.0, scales))(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Leaves the codes floats.")
def codes_left_floats(weight, *, bits, group_size):
    codes, scales = variant()(weight, bits=bits, group_size=group_size)
    return codes.float(), scales


@mistake(
    quantize_groups,
    "Returns codes from 0 on, shifted by 2**(bits - 1) as they are stored, where signed ones belong.",
)
def codes_shifted(weight, *, bits, group_size):
    return variant(limited=lambda self, codes, bits: codes + 2 ** (bits - 1))(
        weight, bits=bits, group_size=group_size
    )


@mistake(quantize_groups, "Returns the weights that the codes stand for: nothing has become smaller.")
def dequantized(weight, *, bits, group_size):
    codes, scales = variant()(weight, bits=bits, group_size=group_size)
    return codes * scales.repeat_interleave(group_size, 1)[:, : codes.shape[1]], scales


@mistake(quantize_groups, "Divides the weight in place: the caller's model is destroyed.")
def in_place(weight, *, bits, group_size):
    codes, scales = variant()(weight, bits=bits, group_size=group_size)
    each = scales.repeat_interleave(group_size, 1)[:, : codes.shape[1]]
    weight.detach().div_(each.to(weight.dtype))
    return codes, scales


@mistake(
    quantize_groups, "Looks for NaN only: an infinity makes its group's scale infinite and its codes zeros."
)
def infinities_accepted(weight, *, bits, group_size):
    def check_values(self, weight):
        if weight.isnan().any():
            raise ValueError("NaN")

    return variant(check_values=check_values)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Looks for NaN and infinities in the sum of all weights: large finite ones overflow it and are refused.",
)
def finite_sum_demanded(weight, *, bits, group_size):
    def check_values(self, weight):
        if not weight.sum().isfinite():
            raise ValueError("not finite")

    return variant(check_values=check_values)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups,
    "Leaves an nn.Parameter in autograd: its scales require grad and keep the weight alive.",
)
def gradient_kept(weight, *, bits, group_size):
    return variant(wide=lambda self, weight: weight.float())(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Replaces NaN and infinities by finite numbers: a broken checkpoint looks healthy.")
def not_finite_laundered(weight, *, bits, group_size):
    return variant(check_values=lambda self, weight: None)(
        weight.nan_to_num(), bits=bits, group_size=group_size
    )


@mistake(
    quantize_groups, "Takes any number of bits: with 1 there is no step, and with 9 codes wrap in their byte."
)
def bits_unchecked(weight, *, bits, group_size):
    def check_numbers(self, bits, group_size):
        if group_size < 1:
            raise ValueError("group size")

    return variant(check_numbers=check_numbers)(weight, bits=bits, group_size=group_size)


@mistake(
    quantize_groups, "Takes any group size: 0 ends in a ZeroDivisionError, -1 is as good as K for a reshape."
)
def group_size_unchecked(weight, *, bits, group_size):
    def check_numbers(self, bits, group_size):
        if not 2 <= bits <= 8:
            raise ValueError("bits")

    return variant(check_numbers=check_numbers)(weight, bits=bits, group_size=group_size)


@mistake(quantize_groups, "Takes weights of any shape, also those without values.")
def shape_unchecked(weight, *, bits, group_size):
    if weight.numel() == 0:
        return weight.to(torch.int8), torch.ones(len(weight), -(-weight.shape[1] // group_size))
    codes, scales = variant()(weight.reshape(-1, weight.shape[-1]), bits=bits, group_size=group_size)
    return codes.reshape(weight.shape), scales.reshape(*weight.shape[:-1], -1)


@mistake(quantize_groups, "Loops over groups in Python: a layer of 4096 x 4096 has 131,072 groups of 128.")
def loop_over_groups(weight, *, bits, group_size):
    codes, scales = variant()(weight, bits=bits, group_size=group_size)
    for row in range(len(weight)):
        for group, part in enumerate(weight[row].float().split(group_size)):
            codes[row, group * group_size : (group + 1) * group_size] = (part / scales[row, group]).round()
    return codes, scales


@mistake(
    quantize_groups,
    "Loops over rows in Python where the last group is short: what pads all rows at once is a few operations.",
)
def loop_over_rows_with_a_short_group(weight, *, bits, group_size):
    codes, scales = variant()(weight, bits=bits, group_size=group_size)
    if weight.shape[1] % group_size:
        found = [variant()(row[None], bits=bits, group_size=group_size) for row in weight]
        codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales


@mistake(quantize_groups, "Works in float64, twice the memory of the weight in float32, for codes of a byte.")
def in_float64(weight, *, bits, group_size):
    codes, scales = variant(wide=lambda self, weight: weight.detach().double())(
        weight, bits=bits, group_size=group_size
    )
    return codes, scales.float()


@alternative(quantize_groups, "Reshapes, and takes the larger of both ends of a group")
def both_ends(weight, *, bits, group_size):
    return Grouping().quantize(weight, bits=bits, group_size=group_size)


@alternative(
    quantize_groups, "Goes through the groups one by one, rounding with Python's round", meets_costs=False
)
def one_by_one(weight, *, bits, group_size):
    if bits not in range(2, 9) or group_size < 1 or weight.dim() != 2:
        raise ValueError("numbers or shape")
    if not weight.numel() or not weight.isfinite().all():
        raise ValueError("values")
    top = 2 ** (bits - 1) - 1
    codes: list[list[int]] = []
    scales: list[list[float]] = []
    for row in weight.tolist():
        codes.append([])
        scales.append([])
        for start in range(0, len(row), group_size):
            part = row[start : start + group_size]
            scale = max(map(abs, part)) / top
            scales[-1].append(1.0 if scale < 2**-126 else scale)
            codes[-1] += [round(value / scales[-1][-1]) for value in part]
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scales, dtype=torch.float32)


@alternative(quantize_groups, "Finds the largest magnitudes by scattering columns into their groups")
def scattered(weight, *, bits, group_size):
    if not (2 <= bits <= 8 and group_size >= 1) or weight.dim() != 2 or not min(weight.shape):
        raise ValueError("numbers or shape")
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise ValueError("values")
    group = torch.arange(weight.shape[1]) // group_size
    top = 2 ** (bits - 1) - 1
    largest = torch.zeros(len(wide), int(group[-1]) + 1).index_reduce_(1, group, wide.abs(), "amax")
    scales = largest / top
    scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 1)
    return torch.div(wide, scales[:, group]).round_().clamp_(-top, top).to(torch.int8), scales
