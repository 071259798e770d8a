"""NF4: 16 levels placed where normal weights are, and the scales of its blocks quantized once more."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised


@exercise(
    points=4,
    minutes=25,
    extension=True,
    hints=(
        "Build the 16 levels first and look at them: ascending, from -1 to 1, with an exact 0 that belongs to neither "
        "side. The nearest level is then a matter of the 15 middles between them.",
        "The blocks' maxima are all positive: an int8 with a sign wastes half of its codes on them until their mean is "
        "taken away, and the mean is that of all blocks, not of one group.",
    ),
)
def nf4_quantize(
    weight: Tensor, *, block_size: int = 64, group_size: int = 256
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight in NF4 with double quantization: (packed, maxima, group scales, offset);
    about 20 lines.

    weight float32 of any shape, strides and magnitude (subnormals aside), n values in
    the order of their indices (the last one fastest), not changed. It may require grad;
    the results do not. Blocks are runs of block_size values in that order, over the
    ends of rows; the last may be short.

    packed uint8 [ceil(n/2)]: a code 0..15 for each value, two a byte, the even index in
    the low half; where n is odd the half left over is 0. The code is that of the level
    nearest to the value over its block's maximum (the largest magnitude in it); no
    value given lies half way. In a block of zeros every code is that of level 0.

    Sixteen levels, ascending, code 0 the lowest: 7 negative, 0, 8 positive (Dettmers et
    al. 2023, QLoRA; as the authors' library has them). With q the inverse of the
    standard normal's distribution function (torch.special.ndtri) and p = 0.9677083 the
    positive ones are q at linspace(p, 1/2, 9) without its last place, the negative ones
    -q at linspace(p, 1/2, 8) without its last place; all over q(p).

    Double quantization: the blocks' maxima are stored as 8-bit integers. offset float32
    without dimensions is the mean of all maxima, whose sum may be beyond float32.
    Groups are runs of group_size blocks, the last may be short. group scales float32
    [groups]: the largest |maximum - offset| of the group over 127, and 1 where that is
    0. maxima int8 [blocks]: (maximum - offset) / group scale, to nearest, ties to even.
    Codes of values are found with the maxima before this rounding. (The library's 8-bit
    integers are not evenly spaced; these are.)

    ValueError for no values at all, and for NaN or infinity.

    At the default sizes that is 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight. No
    tensor on the way has more than 8 bytes for each value.
    """
    ### BEGIN SOLUTION
    if weight.numel() == 0 or not weight.isfinite().all():
        raise ValueError(f"weight is {list(weight.shape)} and must hold values, none of them NaN or infinite")
    positive = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values / positive[0]
    middles = (levels[1:] + levels[:-1]) / 2

    def runs(values: Tensor, size: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, -len(values) % size)).reshape(-1, size)

    blocks = runs(weight.detach().reshape(-1), block_size)
    maxima = blocks.abs().amax(dim=1)
    ratio = (blocks / maxima[:, None]).nan_to_num(0.0)  # 0 / 0 in a block of zeros
    codes = torch.bucketize(ratio, middles).to(torch.uint8).flatten()[: weight.numel()]
    low, high = runs(codes, 2).unbind(dim=1)

    offset = maxima.double().mean().float()
    groups = runs(maxima - offset, group_size)
    scales = groups.abs().amax(dim=1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    stored = (groups / scales[:, None]).round().to(torch.int8).flatten()[: len(maxima)]
    return low | high << 4, stored, scales, offset
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def quantiles(count: int, p: float = 0.9677083) -> Tensor:
    """`count` quantiles of the standard normal, float64, from that of p down to the last one above 0."""
    return torch.special.ndtri(torch.linspace(p, 0.5, count + 1, dtype=torch.float64)[:-1])


def levels_of(below: int = 7, above: int = 8, p: float = 0.9677083) -> Tensor:
    """`below` negative levels, 0 and `above` positive ones, float64, ascending."""
    zero = torch.zeros(1, dtype=torch.float64)
    found = torch.cat([-quantiles(below, p), zero, quantiles(above, p).flip(0)])
    return found / found.abs().max()


def ratios(rng, blocks, size):
    """Values over their block's maximum [blocks, size]: near the middles of levels and far from them, none on one."""
    levels = levels_of().float()
    code = rng.integers(0, 15, blocks, size)
    part = rng.uniform(-0.9, 0.9, blocks, size)
    part = torch.where(rng.uniform(0, 1, blocks, size) < 0.5, 0.9999 * part.sign(), part)
    towards = (code + part.sign().long()).clamp(0, 15)
    found = levels[code] + part.abs() / 2 * (levels[towards] - levels[code])
    found[torch.arange(blocks), rng.integers(0, size - 1, blocks)] = (
        2 * rng.integers(0, 1, blocks) - 1
    ).float()
    return found


def off_the_middles(ratio):
    """The same values, those within 1e-3 of half way between two levels moved onto the lower one."""
    levels = levels_of().float()
    middles = (levels[1:] + levels[:-1]) / 2
    place = torch.bucketize(ratio, middles - 1e-3)
    lower = torch.bucketize(ratio, middles + 1e-3)
    return torch.where(place == lower, ratio, levels[lower])


def maxima_of(rng, group_sizes):
    """Blocks' maxima whose mean is exact in any order of summation, each a quarter of a step from its code.

    Deviations add up to 0 within a group or, where two groups that follow one another are equally long, over both.
    """
    found = []
    sizes = list(group_sizes)
    while sizes:
        size = sizes.pop(0)
        step = 2.0 ** -rng.integer(8, 10)
        if sizes[:1] == [size]:
            sizes.pop(0)
            one = rng.integers(-126, 60, size) + rng.integers(-1, 1, size) / 4
            one[rng.integer(0, size - 1)] = -127.0
            groups = [one, -one]
        else:
            half = rng.integers(-126, 126, size // 2) + rng.integers(-1, 1, size // 2) / 4
            half[:1] = 127.0
            groups = [torch.cat([half, -half, torch.zeros(size % 2)])]
        found += [group[torch.randperm(size, generator=rng.generator)] * step for group in groups]
    return (torch.cat(found) + rng.integer(40, 60) / 64).float()


def planted(rng, rows, columns, group_sizes, block):
    """A weight [rows, columns] in whole blocks, with maxima of these groups."""
    maxima = maxima_of(rng, group_sizes)
    return (ratios(rng, len(maxima), block) * maxima[:, None]).reshape(rows, columns)


@case(nf4_quantize)
def levels_and_maxima(answer, rng):
    """A weight of 4 groups of blocks, some values close to where the nearest level changes."""
    return answer(planted(rng, 16, 96, [12, 12, 12, 12], 32), block_size=32, group_size=12)


@case(nf4_quantize)
def normal_weights(answer, rng):
    """Normal weights at the default sizes, with one outlier."""
    drawn = rng.normal(6, 64)
    drawn[2, rng.integer(0, 63)] *= 8
    ratio = off_the_middles(drawn / drawn.abs().amax(dim=1, keepdim=True))
    return answer((ratio * maxima_of(rng, [6])[:, None]).reshape(12, 32))


@case(nf4_quantize)
def more_than_256_blocks(answer, rng):
    """A weight of 260 blocks at the default sizes, two groups; and in one group of blocks of two."""
    return {
        "two groups": answer(planted(rng, 130, 128, [256, 4], 64)),
        "one group": answer(planted(rng, 130, 4, [260], 2), block_size=2, group_size=300),
    }


@case(nf4_quantize)
def short_ends(answer, rng):
    """Rows that blocks do not divide, short last blocks and groups, odd sizes, one value, sizes of one."""
    whole = planted(rng, 1, 23 * 16, [8, 8, 7], 16)[0]
    largest = int(whole[-16:].abs().argmax())
    whole[[-16, largest - 16]] = whole[
        [largest - 16, -16]
    ]  # the last maximum stays where the block is cut off
    return {
        "odd": answer(whole[: 7 * 51].reshape(7, 51), block_size=16, group_size=8),
        "even": answer(whole[:362].reshape(2, 181), block_size=16, group_size=8),
        "one": answer(whole[0].reshape(()), block_size=16, group_size=8),
        "blocks of 7": answer(planted(rng, 6, 7, [6], 7), block_size=7, group_size=3),
        "blocks of one": answer(whole[:6].reshape(2, 3), block_size=1, group_size=1),
        "blocks of 128": answer(planted(rng, 2, 256, [4], 128), block_size=128, group_size=4),
    }


@case(nf4_quantize)
def zeros_and_equal_blocks(answer, rng):
    """Blocks of zeros among others, maxima that are all equal or half way between codes, and a weight of zeros."""
    ratio = ratios(rng, 8, 16)
    maxima = torch.tensor([0, 254, 0, 127, 254, 127, 127, 127]) * 2.0**-10  # 127 on average
    equal = ratio * rng.integer(20, 60) / 64
    halves = torch.tensor(rng.shuffled([127.0, -127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5]))
    ties = ratio * (512 + halves)[:, None] * 2.0 ** -rng.integer(8, 12)
    return {
        "some": answer(ratio * maxima[:, None], block_size=16, group_size=4),
        "equal": answer(equal, block_size=16, group_size=4),
        "ties": answer(ties, block_size=16, group_size=8),
        "all": answer(torch.zeros(3, 10), block_size=8, group_size=2),
    }


@case(nf4_quantize)
def other_shapes_and_strides(answer, rng):
    """A transposed view, every other column, a vector, a batch, four dimensions; a Parameter; all magnitudes."""
    block = rng.choice([8, 16])
    weight = planted(rng, 12, 2 * block, [6, 6, 6, 6], block)
    wide = torch.stack([weight, rng.normal(12, 2 * block)], dim=-1).flatten(1)
    tall = weight.T.contiguous().T
    found = {"transposed": tall, "every other": wide[:, ::2], "vector": weight.reshape(-1)}
    found["batch"] = weight.reshape(2, 6, 2 * block)
    found["four dimensions"] = weight.reshape(2, 6, 2, block)
    found["Parameter"] = torch.nn.Parameter(weight)
    results = {name: answer(part, block_size=block, group_size=6) for name, part in found.items()}
    few = planted(rng, 16, 16, [16], 16).abs()  # and times 2^126 the sum of their maxima is beyond float32
    for power in (-110, 126):
        results[f"times 2^{power}"] = answer(few * 2.0**power, block_size=16, group_size=16)
    return {**results, "require grad": [part.requires_grad for part in results["Parameter"]]}


@case(nf4_quantize)
def refused(answer, rng):
    """No values, NaN and infinity, beside a weight that is as it should be."""
    weight = planted(rng, 4, 32, [4], 32)
    found = {"none": raised(answer, weight[:0])}
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 70, 127):
            bad = weight.clone()
            bad.view(-1)[place] = value
            found[f"{value} at {place}"] = raised(answer, bad)
    bad[0, :2] = torch.tensor([torch.inf, -torch.inf])
    found["both infinities"] = raised(answer, bad)
    return {"right": answer(weight, block_size=32, group_size=4), **found}


@cost(nf4_quantize, share=1 / 6)
def bytes_held(answer, rng):
    """Bytes of the results, and of the largest tensor on the way."""
    weight = planted(rng, 64, 128, [128], 64)
    with TensorWork() as work:
        result = answer(weight)
    stored = sum(part.untyped_storage().nbytes() for part in result)
    return {
        "stored bytes": stored,
        "largest tensor, bytes": (work.largest_tensor_bytes, 8 * weight.numel()),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


def padded(values, size):
    """Runs of `size`, the last filled with zeros."""
    return torch.cat([values, values.new_zeros(-len(values) % size)]).reshape(-1, size)


def nearest(ratio, levels):
    return torch.bucketize(ratio, ((levels[1:] + levels[:-1]) / 2).float())


def pairs(codes):
    codes = padded(codes.to(torch.uint8), 2)
    return codes[:, 0] + 16 * codes[:, 1]


def of_the_maxima(maxima, group_size):
    """(int8 maxima, group scales, offset)."""
    offset = maxima.double().mean().float()
    groups = padded(maxima - offset, group_size)
    scales = in_scales(groups)
    return in_int8(groups, scales)[: len(maxima)], scales, offset


def in_scales(groups, top=127):
    scales = groups.abs().amax(dim=1) / top
    return torch.where(scales == 0, 1.0, scales)


def in_int8(groups, scales):
    return (groups / scales[:, None]).round().to(torch.int8).reshape(-1)


def largest(blocks):
    return blocks.abs().amax(dim=1)


def over(blocks, maxima):
    return blocks / torch.where(maxima == 0, 1.0, maxima)[:, None]


def check(weight):
    if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
        raise ValueError("weight")


def written(
    weight,
    block_size,
    group_size,
    *,
    check=check,
    levels=None,
    flat=lambda weight: weight.reshape(-1),
    largest=largest,
    over=over,
    codes=nearest,
    pack=pairs,
    of_the_maxima=of_the_maxima,
):
    """A right answer in steps; a mistake replaces some of them."""
    check(weight)
    values = flat(weight.detach())
    blocks = padded(values, block_size)
    maxima = largest(blocks)
    found = codes(over(blocks, maxima), levels_of() if levels is None else levels)
    packed = pack(found.reshape(-1)[: len(values)])
    return packed, *of_the_maxima(maxima, group_size)


@mistake(nf4_quantize, "Takes 16 quantiles at equal distances, symmetric about 0: no level is exactly 0.")
def no_zero(weight, *, block_size=64, group_size=256):
    places = torch.arange(1, 17, dtype=torch.float64) / 17
    levels = torch.special.ndtri(places)
    return written(weight, block_size, group_size, levels=levels / levels.max())


@mistake(
    nf4_quantize,
    "Takes means of neighbouring quantiles, as the paper's equation 4 reads, without its infinite ends: no exact 0.",
)
def means_of_neighbours(weight, *, block_size=64, group_size=256):
    edges = torch.special.ndtri(torch.arange(1, 18, dtype=torch.float64) / 18)
    levels = (edges[1:] + edges[:-1]) / 2
    return written(weight, block_size, group_size, levels=levels / levels.max())


@mistake(
    nf4_quantize,
    "Has 8 negative levels and 7 positive ones, as two's complement has; NF4 is the other way round.",
)
def sides_swapped(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, levels=levels_of(below=8, above=7))


@mistake(
    nf4_quantize, "Begins at the quantile of 1 - 1/32 on both sides; p is the mean of 1 - 1/32 and 1 - 1/30."
)
def other_first_quantile(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, levels=levels_of(p=1 - 1 / 32))


@mistake(
    nf4_quantize, "Copies the levels with 4 digits: values between two of them get the code of the other."
)
def four_digits(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, levels=levels_of().mul(1e4).round() / 1e4)


@mistake(nf4_quantize, "Spaces the levels evenly: that is int4, and most codes go to values that are rare.")
def even_levels(weight, *, block_size=64, group_size=256):
    levels = torch.cat([torch.linspace(-1, 0, 8)[:-1], torch.linspace(0, 1, 9)])
    return written(weight, block_size, group_size, levels=levels)


@mistake(nf4_quantize, "Leaves the levels as quantiles, up to 1.85, while values are at most 1.")
def levels_unscaled(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, levels=levels_of() * quantiles(8)[0])


@mistake(nf4_quantize, "Takes the next lower level, not the nearest.")
def next_lower_level(weight, *, block_size=64, group_size=256):
    def codes(ratio, levels):
        return (torch.bucketize(ratio, levels.float(), right=True) - 1).clamp(min=0)

    return written(weight, block_size, group_size, codes=codes)


@mistake(
    nf4_quantize, "Divides by the block's standard deviation: the large values fall off the end of the table."
)
def over_deviation(weight, *, block_size=64, group_size=256):
    def over(blocks, maxima):
        deviation = blocks.std(dim=1, keepdim=True)
        return blocks / torch.where(deviation == 0, 1.0, deviation)

    return written(weight, block_size, group_size, over=over)


@mistake(nf4_quantize, "Takes the block's largest value, not its largest magnitude.")
def signed_maximum(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, largest=lambda blocks: blocks.amax(dim=1))


@mistake(nf4_quantize, "One maximum for the whole weight: one outlier takes the levels of all blocks.")
def one_maximum(weight, *, block_size=64, group_size=256):
    return written(
        weight, block_size, group_size, largest=lambda blocks: blocks.abs().amax().expand(len(blocks))
    )


@mistake(nf4_quantize, "Lets every row begin a block of its own; blocks run over the ends of rows.")
def blocks_of_rows(weight, *, block_size=64, group_size=256):
    check(weight)
    width = weight.shape[-1]
    filled = torch.nn.functional.pad(weight, (0, -width % block_size)).reshape(-1, block_size)
    maxima = largest(filled)
    codes = nearest(over(filled, maxima), levels_of()).reshape(*weight.shape[:-1], -1)[..., :width]
    return pairs(codes.reshape(-1)), *of_the_maxima(maxima, group_size)


@mistake(nf4_quantize, "Runs down the columns: outputs share a block, not inputs.")
def down_the_columns(weight, *, block_size=64, group_size=256):
    return written(
        weight,
        block_size,
        group_size,
        flat=lambda weight: weight.T.reshape(-1) if weight.dim() == 2 else weight.reshape(-1),
    )


@mistake(nf4_quantize, "Flattens with view, which a transposed weight refuses.")
def views_flat(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, flat=lambda weight: weight.view(-1))


@mistake(nf4_quantize, "Drops the last block where it is short.")
def drops_the_short_block(weight, *, block_size=64, group_size=256):
    def flat(weight):
        return weight.reshape(-1)[: max(weight.numel() // block_size, 1) * block_size]

    return written(weight, block_size, group_size, flat=flat)


@mistake(nf4_quantize, "Drops the last value where their number is odd.")
def drops_the_odd_value(weight, *, block_size=64, group_size=256):
    def pack(codes):
        return pairs(codes[: len(codes) // 2 * 2])

    return written(weight, block_size, group_size, pack=pack)


@mistake(nf4_quantize, "Leaves 7, the code of the zeros it padded with, in the half byte left over.")
def pads_with_seven(weight, *, block_size=64, group_size=256):
    def pack(codes):
        return pairs(torch.cat([codes, codes.new_full((len(codes) % 2,), 7)]))

    return written(weight, block_size, group_size, pack=pack)


@mistake(nf4_quantize, "Puts the even index into the high half of the byte, as bitsandbytes does.")
def halves_swapped(weight, *, block_size=64, group_size=256):
    def pack(codes):
        codes = padded(codes.to(torch.uint8), 2)
        return 16 * codes[:, 0] + codes[:, 1]

    return written(weight, block_size, group_size, pack=pack)


@mistake(nf4_quantize, "Writes codes as signed integers from -7 to 8; they are places in a table, 0 to 15.")
def signed_codes(weight, *, block_size=64, group_size=256):
    return written(weight, block_size, group_size, pack=lambda codes: pairs((codes - 7) % 16))


@mistake(nf4_quantize, "Divides a block of zeros by 0 and stores what NaN becomes.")
def zeros_over_zero(weight, *, block_size=64, group_size=256):
    def codes(ratio, levels):
        return torch.where(ratio.isnan(), 0, nearest(ratio.nan_to_num(0.0), levels))

    return written(
        weight, block_size, group_size, codes=codes, over=lambda blocks, maxima: blocks / maxima[:, None]
    )


@mistake(
    nf4_quantize,
    "Quantizes the maxima without taking their mean away: they are positive, half of int8 goes unused.",
)
def mean_not_subtracted(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        groups = padded(maxima, group_size)
        scales = in_scales(groups)
        return in_int8(groups, scales)[: len(maxima)], scales, torch.zeros(())

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(
    nf4_quantize, "Adds the maxima up in float32: the sum of loud ones is infinite, though their mean is not."
)
def mean_in_float32(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        offset = maxima.mean()
        groups = padded(maxima - offset, group_size)
        scales = in_scales(groups)
        return in_int8(groups, scales)[: len(maxima)], scales, offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(nf4_quantize, "Takes each group's own mean away, but one offset is all that is stored.")
def mean_of_the_group(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        parts = [of_the_maxima(part, len(part)) for part in maxima.split(group_size)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), maxima.mean()

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(nf4_quantize, "Lets the zeros that fill the last block or group count in the mean.")
def padding_in_the_mean(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        offset = padded(maxima, group_size).mean()
        groups = padded(maxima - offset, group_size)
        scales = in_scales(groups)
        return in_int8(groups, scales)[: len(maxima)], scales, offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(
    nf4_quantize,
    "Fills the last group before the mean is taken away: the filling becomes its largest magnitude.",
)
def pads_before_centring(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        offset = maxima.mean()
        groups = padded(maxima, group_size) - offset
        scales = in_scales(groups)
        return in_int8(groups, scales)[: len(maxima)], scales, offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(nf4_quantize, "One scale for the maxima of all groups.")
def one_group(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        found, scales, offset = of_the_maxima(maxima, len(maxima))
        return found, scales.expand(-(-len(maxima) // group_size)).clone(), offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(
    nf4_quantize,
    "Divides by 128, which int8 does not reach on the positive side: the largest maximum wraps around.",
)
def scale_over_128(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        offset = maxima.mean()
        groups = padded(maxima - offset, group_size)
        scales = in_scales(groups, top=128)
        codes = (groups / scales[:, None]).round().to(torch.int64)
        return ((codes + 128) % 256 - 128).to(torch.int8).reshape(-1)[: len(maxima)], scales, offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(nf4_quantize, "Converts the maxima to int8 without rounding: the fraction is cut off.")
def truncates_maxima(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        offset = maxima.mean()
        groups = padded(maxima - offset, group_size)
        scales = in_scales(groups)
        return (groups / scales[:, None]).to(torch.int8).reshape(-1)[: len(maxima)], scales, offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(nf4_quantize, "Stores a group scale of 0 where all maxima are equal: 0 / 0 in the division.")
def zero_group_scale(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        found, scales, offset = of_the_maxima(maxima, group_size)
        same = padded(maxima - offset, group_size).abs().amax(dim=1) == 0
        return found, torch.where(same, 0.0, scales), offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(nf4_quantize, "Keeps the maxima in float32: 4.5 bits a weight, which is then reported as 4.127.")
def single_level(weight, *, block_size=64, group_size=256):
    packed, _, scales, offset = written(weight, block_size, group_size)
    return packed, largest(padded(weight.reshape(-1), block_size)), scales, offset


@mistake(nf4_quantize, "Finds the codes with the maxima as they are read back, after the second rounding.")
def codes_by_rounded_maxima(weight, *, block_size=64, group_size=256):
    def over(blocks, maxima):
        stored, scales, offset = of_the_maxima(maxima, group_size)
        read = stored * scales.repeat_interleave(group_size)[: len(stored)] + offset
        return blocks / torch.where(read == 0, 1.0, read)[:, None]

    return written(weight, block_size, group_size, over=over)


@mistake(nf4_quantize, "Turns NaN and infinity into numbers.")
def launders_nan(weight, *, block_size=64, group_size=256):
    return written(weight.nan_to_num(0.0), block_size, group_size)


@mistake(nf4_quantize, "Finds NaN or infinity by the norm, whose squares are infinite for large weights too.")
def finite_by_the_norm(weight, *, block_size=64, group_size=256):
    def check(weight):
        if weight.numel() == 0 or not weight.norm().isfinite():
            raise ValueError("weight")

    return written(weight, block_size, group_size, check=check)


@mistake(
    nf4_quantize, "Divides by maximum + 1e-8 against blocks of zeros: small weights all get the code of 0."
)
def epsilon_added(weight, *, block_size=64, group_size=256):
    return written(
        weight, block_size, group_size, over=lambda blocks, maxima: blocks / (maxima + 1e-8)[:, None]
    )


@mistake(nf4_quantize, "Rounds the maxima's ties up, not to even.")
def ties_up(weight, *, block_size=64, group_size=256):
    def steps(maxima, group_size):
        offset = maxima.mean()
        groups = padded(maxima - offset, group_size)
        scales = in_scales(groups)
        codes = (groups / scales[:, None] + 0.5).floor()
        return codes.to(torch.int8).reshape(-1)[: len(maxima)], scales, offset

    return written(weight, block_size, group_size, of_the_maxima=steps)


@mistake(
    nf4_quantize, "Returns scales and an offset that require grad where the weight does, with its graph."
)
def graph_kept(weight, *, block_size=64, group_size=256):
    packed, stored, scales, offset = written(weight, block_size, group_size)
    return packed, stored, scales, offset + 0 * weight.reshape(-1)[0]


@mistake(nf4_quantize, "No values give empty results, and the mean of none: NaN.")
def empty_accepted(weight, *, block_size=64, group_size=256):
    if weight.numel() == 0:
        none = torch.zeros(0)
        return none.to(torch.uint8), none.to(torch.int8), none, none.mean()
    return written(weight, block_size, group_size)


@alternative(nf4_quantize, "Counts the middles below each value, one after the other")
def by_counting(weight, *, block_size=64, group_size=256):
    def codes(ratio, levels):
        found = torch.zeros_like(ratio, dtype=torch.uint8)
        for middle in ((levels[1:] + levels[:-1]) / 2).tolist():
            found += ratio > middle
        return found

    return written(weight, block_size, group_size, codes=codes)


@alternative(nf4_quantize, "Compares with all 16 levels at once; 16 times the memory", meets_costs=False)
def by_distance(weight, *, block_size=64, group_size=256):
    def codes(ratio, levels):
        return (ratio[..., None] - levels.float()).abs().argmin(dim=-1)

    return written(weight, block_size, group_size, codes=codes)


@alternative(nf4_quantize, "Copies the 16 levels from the authors' library, with all their digits")
def by_table(weight, *, block_size=64, group_size=256):
    negative = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    middle = [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    positive = [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    levels = torch.tensor([*negative, *middle, *positive, 0.7229568362236023, 1.0])
    return written(weight, block_size, group_size, levels=levels)


@alternative(nf4_quantize, "Walks block by block, and never pads one")
def block_by_block(weight, *, block_size=64, group_size=256):
    check(weight)
    levels = levels_of()
    parts = weight.detach().reshape(-1).split(block_size)
    maxima = torch.stack([part.abs().max() for part in parts])
    codes = [nearest(part / (top if top > 0 else 1), levels) for part, top in zip(parts, maxima, strict=True)]
    offset = maxima.double().mean().float()
    groups = (maxima - offset).split(group_size)
    scales = torch.stack([group.abs().max() / 127 for group in groups])
    scales[scales == 0] = 1.0
    stored = [(group / scale).round() for group, scale in zip(groups, scales, strict=True)]
    return pairs(torch.cat(codes)), torch.cat(stored).to(torch.int8), scales, offset
