"""Optimizer moments in 8 bits: a code a value, a scale a block, and a table that covers seven decades."""

from __future__ import annotations

import gc
import tracemalloc

import torch
from torch import Tensor

from llmcourse.counting import LivingBytes, TensorWork, reachable_bytes
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(
    points=4,
    minutes=25,
    extension=True,
    hints=(
        "Store the number of a table entry, not a multiple of a step: over its block's largest magnitude a value lies "
        "in the table's range, and the nearest entry is a matter of the middles between neighbours.",
        "Three things go wrong at the ends: the last block is short and nothing may be stored for what it lacks; a "
        "block of zeros has no scale; and what is above 0 without a sign must not be taken for 0, however small.",
    ),
)
class Blockwise8bitState:
    """One tensor of optimizer state in a byte a value and a float32 a block; about 25 lines.

    values: float32 of any shape (none and empty too) and any strides; the largest magnitude
    of a block is 1e-30..1e30 or 0. They may require grad, what is read does not.
    Blocks are runs of block_size values in the order of their indices (the last one
    fastest), over the ends of rows; the last may be short. A block's scale is its largest
    magnitude, float32. A value is stored as the number, in a byte, of the table entry
    nearest to value / scale, by their difference (no value given lies half way between
    two). It reads back as entry * scale; in a block of zeros as 0.

    Table, signed (first moment, 255 entries):
        0 and +-10^(-7 (127 - k) / 126) for k = 1..127, from 1e-7 to 1.
    Table, unsigned (second moment, 256 entries):
        0 and 10^(-7 (255 - k) / 254) for k = 1..255, from 1e-7 to 1.
    In the unsigned table only 0 is stored as 0: any value above 0, however small, gets the
    nearest of the other entries. Adam divides by its root.

    read(): the stored values, float32, in their shape, a new tensor each time.
    write(values): stores other values of the same shape, with scales of their own. What
    the caller later does to values, or to what was read, changes nothing here.
    nbytes: bytes of codes and scales, n + 4 ceil(n / block_size) for n values.

    ValueError for NaN or infinity, for a value below 0 in the unsigned table, for another
    shape in write() and for a block_size below 1; after a write() that is refused the
    state is what it was.

    For a sixth of the points each: what write() leaves in memory, in this object or
    elsewhere, is nbytes of tensors, at most 4,096 bytes more for tables, and 16 KiB of
    Python objects; and no tensor made in write() or read() has more than 8 bytes a value,
    where values are many.

    Not handled: a change of less than half the way to the next entry is rounded back, so
    0.999 v is v again, and a moment falls only while new gradients disturb it. A log-spaced
    variant of block-wise 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861), whose
    own table differs.
    """

    def __init__(self, values: Tensor, *, signed: bool, block_size: int = 256) -> None:
        ### BEGIN SOLUTION
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; expected 1 or more")
        positive, zero = torch.logspace(-7, 0, 127 if signed else 255), torch.zeros(1)
        self.levels = torch.cat([-positive, zero, positive] if signed else [zero, positive]).sort().values
        self.shape, self.signed, self.block_size = values.shape, signed, block_size
        self.write(values)
        ### END SOLUTION

    def write(self, values: Tensor) -> None:
        ### BEGIN SOLUTION
        if values.shape != self.shape:
            raise ValueError(f"values have shape {list(values.shape)}; expected {list(self.shape)}")
        if not values.isfinite().all() or not self.signed and (values < 0).any():
            raise ValueError("values hold NaN, infinity, or one below 0 where the table has none")
        flat = values.detach().reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % self.block_size)).reshape(-1, self.block_size)
        self.scales = blocks.abs().amax(dim=1)
        ratio = (blocks / self.scales[:, None]).nan_to_num(0.0)  # 0 / 0 in a block of zeros
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(ratio.flatten()[: len(flat)], middles)
        # Above 0 means above entry 0, also where the ratio is too small for a float32.
        self.codes = codes.maximum(flat > 0).to(torch.uint8)
        ### END SOLUTION

    def read(self) -> Tensor:
        ### BEGIN SOLUTION
        scales = self.scales.repeat_interleave(self.block_size)[: len(self.codes)]
        return (self.levels[self.codes.int()] * scales).reshape(self.shape)
        ### END SOLUTION

    @property
    def nbytes(self) -> int:
        ### BEGIN SOLUTION
        return self.codes.nbytes + self.scales.nbytes
        ### END SOLUTION


excuse(
    Blockwise8bitState, "0.0 -> 1.0", "in a block of zeros every entry is multiplied by the scale, which is 0"
)


# ---------------------------------------------------------------------------------------------------------- cases


def table(signed):
    """The entries, float64, ascending."""
    positive = 10 ** (
        -7 * torch.arange(126 if signed else 254, -1, -1, dtype=torch.float64) / (126 if signed else 254)
    )
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([-positive.flip(0), zero, positive]) if signed else torch.cat([zero, positive])


def over_the_table(rng, count, signed):
    """Values over their scale [count], at every entry's distance: half of them close to a middle, none on one."""
    entries = table(signed)
    k = rng.integers(1, len(entries) - 2, count)
    part = rng.uniform(0, 0.9, count, dtype=torch.float64)
    part = torch.where(rng.uniform(0, 1, count) < 0.5, 0.994, part) / 2
    towards = k + 2 * rng.integers(0, 1, count) - 1
    found = entries[k] + part * (entries[towards] - entries[k])
    return torch.where((found == 0) & (k > 0), entries[k], found) if signed else found.clamp_min(entries[1])


def values_of(rng, shape, signed, block, scales=None):
    """Float32 values of this shape whose blocks hold each its largest magnitude, of scale 1/4..4 unless given."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    blocks = -(-count // block)
    scales = 2 ** rng.uniform(-2, 2, blocks, dtype=torch.float64) if scales is None else scales.double()
    scales = scales.float().double()
    ratio = over_the_table(rng, count, signed)
    for start in range(0, count, block):
        place = rng.integer(start, min(start + block, count) - 1)
        ratio[place] = rng.choice([-1.0, 1.0]) if signed else 1.0
    return (ratio * scales.repeat_interleave(block)[:count]).float().reshape(shape)


def seen(state):
    """What is read, as sign and logarithm: a relative error counts the same at 1e-7 as at 1."""
    read = state.read()
    return {"sign": read.sign(), "log": read.abs().log()}


@case(Blockwise8bitState)
def first_moment_over_seven_decades(answer, rng):
    """Signed values from 1e-7 to 1 of their block's largest, some close to where the nearest entry changes."""
    block = rng.choice([32, 48, 64])
    values = values_of(rng, (rng.integer(7, 11), block * 2), True, block)
    return {
        f"blocks of {block}": seen(answer(values, signed=True, block_size=block)),
        "default": seen(answer(values_of(rng, (3, 300), True, 256), signed=True)),
    }


@case(Blockwise8bitState)
def second_moment_over_seven_decades(answer, rng):
    """The same without sign."""
    block = rng.choice([32, 48, 64])
    values = values_of(rng, (rng.integer(7, 11), block * 2), False, block)
    return {
        f"blocks of {block}": seen(answer(values, signed=False, block_size=block)),
        "default": seen(answer(values_of(rng, (3, 300), False, 256), signed=False)),
    }


@case(Blockwise8bitState)
def zeros_and_what_is_next_to_them(answer, rng):
    """Zeros, values below and above half of the smallest entry, blocks of zeros among others, a state of zeros."""
    scale = 2.0 ** rng.integer(-4, 4)
    small = torch.tensor(rng.shuffled([0.0, 0.0, 0.3e-7, 0.45e-7, 0.55e-7, 0.8e-7, 1.2e-7, 1e-9])) * scale
    first = torch.cat(
        [torch.tensor([scale]), small, -small, torch.zeros(17), 2 * small[:3], torch.tensor([-3 * scale])]
    )
    far = torch.tensor([1e20, 1e-30, 0.0, 1e-24, 2e-14, 0.0, 1e10, 1e-38])
    return {
        "signed": seen(answer(first, signed=True, block_size=17)),
        "unsigned": seen(answer(first.abs(), signed=False, block_size=17)),
        "far apart": seen(answer(far, signed=False, block_size=8)),
        "nothing but zeros": [
            seen(answer(torch.zeros(3, 10), signed=s, block_size=8)) for s in (True, False)
        ],
    }


@case(Blockwise8bitState)
def blocks_rows_and_strides(answer, rng):
    """Blocks of scales from 1e-20 to 1e20 that end within rows, a short last one, sizes from 1 to more than all."""
    found = {}
    for name, shape, block in (
        ("vector", (rng.integer(50, 60),), 16),
        ("matrix", (rng.integer(5, 8), 13), 8),
        ("three dimensions", (2, 5, 7), 9),
        ("blocks of one", (3, 5), 1),
        ("one short block", (4, 5), 1000),
        ("no dimension", (), 4),
    ):
        for signed in (True, False):
            blocks = -(-int(torch.tensor(shape).prod()) // block) if shape else 1
            scales = 10.0 ** rng.uniform(-20, 20, blocks, dtype=torch.float64)
            values = values_of(rng, shape, signed, block, scales)
            found[f"{name}, {signed}"] = seen(answer(values, signed=signed, block_size=block))
    tall = values_of(rng, (6, 11), True, 5).T.contiguous().T
    wide = torch.stack([values_of(rng, (6, 11), False, 5), rng.normal(6, 11)], dim=-1).flatten(1)[:, ::2]
    found["transposed"] = seen(answer(tall, signed=True, block_size=5))
    found["every other"] = seen(answer(wide, signed=False, block_size=5))
    state = answer(torch.nn.Parameter(tall), signed=True)
    found["requires grad, of a Parameter"] = state.read().requires_grad
    state.write(torch.nn.Parameter(tall))
    found["requires grad, of a Parameter written"] = state.read().requires_grad
    return found


@case(Blockwise8bitState)
def written_again(answer, rng):
    """Larger values, then smaller ones are written; the caller goes on with its own tensors in place."""
    block = rng.choice([8, 16])
    shape = (rng.integer(4, 6), 15)
    found = {}
    for signed in (True, False):
        state = answer(values_of(rng, shape, signed, block), signed=signed, block_size=block)
        reads = []
        for factor in (1e6, 1e-9, 1.0):
            values = values_of(rng, shape, signed, block) * factor
            before = values.clone()
            state.write(values)
            first = seen(state)
            unchanged = torch.equal(values, before)
            values.mul_(0.25)
            state.read().zero_()
            reads += [first, seen(state), unchanged]
        found[str(signed)] = reads
    return found


def mostly_agrees(observed, expected):
    """Parameters after steps of Adam: equal but for rounding in 95 of 100 places, and no place far off.

    A right answer's last bit can turn a value that lies half way to the other entry; that touches its own place alone
    and happens to one value in 10,000 at most.
    """
    for name, right in expected.items():
        found = observed[name]
        if not bool(found.isfinite().all()):
            return "the parameters became NaN or infinite"
        error = (found.double() - right.double()).abs()
        if float((error > 1e-5).double().mean()) > 0.05:
            return "the parameters went another way"
        if float(error.max()) > 0.05:
            return "a parameter went far off"
    return None


@case(Blockwise8bitState, judge=mostly_agrees)
def steps_of_adam(answer, rng):
    """Adam with both moments in 8 bits, gradients from 1e-4 to 10 in one block, some of them always zero."""
    shape, block = (5, 30), rng.choice([32, 64])
    size = 10 ** rng.uniform(-4, 1, *shape)
    size[:, rng.shuffled(range(30))[:3]] = 0
    p = rng.normal(*shape)
    moments = [answer(torch.zeros(shape), signed=signed, block_size=block) for signed in (True, False)]
    seen = {}
    for t in range(1, 9):
        gradient = size * (rng.normal(*shape) + 1)
        moments[0].write(0.9 * moments[0].read() + 0.1 * gradient)
        moments[1].write(0.99 * moments[1].read() + 0.01 * gradient.square())
        m, v = moments[0].read() / (1 - 0.9**t), moments[1].read() / (1 - 0.99**t)
        p = p - 0.01 * m / (v.sqrt() + 1e-8)
        seen[str(t)] = p
    return seen


@case(Blockwise8bitState)
def bytes_said(answer, rng):
    """nbytes: 0.2539 of float32 at blocks of 256, 0.2656 at 64, 0.281 at 32; with short blocks; and of no values."""
    found = {}
    for count, block in ((4096, 256), (4096, 64), (4096, 32), (rng.integer(300, 500), 128), (1, 256), (7, 1)):
        signed = rng.choice([True, False])
        values = values_of(rng, (count,), signed, block)
        found[f"{count} in {block}"] = int(answer(values, signed=signed, block_size=block).nbytes)
    empty = answer(torch.zeros(0, 3), signed=rng.choice([True, False]))
    written = answer(torch.zeros(3, 0), signed=True, block_size=4)
    written.write(torch.zeros(3, 0))
    return {**found, "empty": [empty.read(), int(empty.nbytes), written.read()]}


BROKEN = [(value, place) for value in (torch.nan, torch.inf, -torch.inf) for place in (0, 20, -1)]


def with_value(values, value, place):
    values = values.clone()
    values.view(-1)[place] = value
    return values


@case(Blockwise8bitState)
def refused(answer, rng):
    """NaN, infinity, negative second moments, other shapes and sizes; a refused write changes nothing."""
    shape, found = (4, rng.integer(9, 12)), {}
    for signed in (True, False):
        values = values_of(rng, shape, signed, 8)
        other = values_of(rng, shape, signed, 8) * 3
        state = answer(values, signed=signed, block_size=8)
        bad = {f"{value} at {place}": with_value(other, value, place) for value, place in BROKEN}
        bad["both infinities"] = with_value(bad["inf at 0"], -torch.inf, 1)
        bad["flat"] = other.reshape(-1)
        bad["transposed"] = other.T
        bad["one row"] = other[:1]
        bad["a row more"] = torch.cat([other, other[:1]])
        if not signed:
            bad |= {
                f"-{v} at {place}": with_value(other, -v, place)
                for v in (1.0, 1e-12)
                for place in (0, 20, -1)
            }
        for name, values_ in bad.items():
            found[f"write {name}, {signed}"] = raised(state.write, values_)
        for name in ("nan at 20", "inf at -1", "both infinities"):
            found[f"new {name}, {signed}"] = raised(answer, bad[name], signed=signed)
        found[f"state, {signed}"] = seen(state)
        found[f"large and finite, {signed}"] = seen(answer(values * 1e30, signed=signed, block_size=8))
    sizes = {str(size): raised(answer, values, signed=False, block_size=size) for size in (0, -1, 1)}
    return {**found, "negative": raised(answer, -values, signed=False), "block sizes": sizes}


def written_once_and_read(answer, values, signed, block):
    """A state that was made, written and read."""
    state = answer(torch.zeros_like(values), signed=signed, block_size=block)
    state.write(values)
    return state, seen(state)


@cost(Blockwise8bitState, share=1 / 6)
def bytes_really_held(answer, rng):
    """What a write leaves in memory, in the object and elsewhere: codes, scales, tables, and Python objects."""
    observed, counts = [], {}
    for count, block in ((20_000, 256), (24_000 + rng.integer(1, 99), 24_000)):
        for signed in (True, False):
            values = values_of(rng, (count,), signed, block)
            state, read = written_once_and_read(answer, values, signed, block)
            observed.append(read)
            name = f"bytes held for {20_000 if block == 256 else 24_000} values and more, signed {signed}"
            counts[name] = (reachable_bytes(state), count + 4 * -(-count // block) + 4096)
    values = values_of(rng, (20_000,), True, 256)
    made = [answer(values, signed=True), answer(values, signed=True)]
    with LivingBytes() as living:
        made[0].write(values)
    counts["bytes of tensors that one write leaves anywhere"] = (
        living.size_bytes(values),
        20_000 + 4 * 79 + 4096,
    )
    gc.collect()
    tracemalloc.start()
    made[1].write(values)
    gc.collect()
    counts["bytes of Python objects that one write leaves anywhere"] = (
        tracemalloc.get_traced_memory()[0],
        16 * 1024,
    )
    tracemalloc.stop()
    return {"observed": observed, **counts}


@cost(Blockwise8bitState, share=1 / 6)
def largest_tensor_made(answer, rng):
    """Bytes of the largest tensor that write() and read() make, for each value."""
    observed, largest = [], 0.0
    for signed in (True, False):
        values = values_of(rng, (64, 128), signed, 64)
        with TensorWork() as work:
            _, read = written_once_and_read(answer, values, signed, 64)
        observed.append(read)
        largest = max(largest, work.largest_tensor_bytes / values.numel())
    return {"observed": observed, "bytes a value of the largest tensor": (largest, 8)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Written:
    """A right answer in steps; a wrong one replaces some of them."""

    def __init__(self, values, *, signed, block_size=256):
        if block_size < 1:
            raise ValueError("block_size")
        self.shape, self.signed, self.block_size = tuple(values.shape), signed, block_size
        self.count = values.numel()
        self.write(values)

    def write(self, values):
        self.check_shape(values)
        self.check(values)
        self.store(values)

    def check_shape(self, values):
        if tuple(values.shape) != self.shape:
            raise ValueError("shape")

    def check(self, values):
        self.check_finite(values)
        if not self.signed and values.numel() and values.min() < 0:
            raise ValueError("negative")

    def check_finite(self, values):
        if not torch.isfinite(values).all():
            raise ValueError("not finite")

    def flat(self, values):
        return values.detach().reshape(-1)

    def unflat(self, flat):
        return flat.reshape(self.shape)

    def blocks(self, flat):
        missing = -len(flat) % self.block_size
        return torch.cat([flat, flat.new_zeros(missing)]).view(-1, self.block_size)

    def scale(self, blocks):
        return blocks.abs().amax(dim=1)

    def ratio(self, blocks, scales):
        return blocks / torch.where(scales == 0, 1.0, scales)[:, None]

    def table(self):
        return table(self.signed)

    def nearest(self, ratio, entries):
        """Numbers of the entries, int."""
        return torch.bucketize(ratio, ((entries[1:] + entries[:-1]) / 2).float(), out_int32=True)

    def numbers(self, ratio, values):
        codes = self.nearest(ratio, self.table())
        return codes if self.signed else self.above_zero(codes, values)

    def above_zero(self, codes, values):
        return codes.masked_fill_((codes == 0) & (values > 0), 1)

    def store(self, values):
        flat = self.flat(values)
        blocks = self.blocks(flat)
        self.scales = self.scale(blocks)
        ratio = self.ratio(blocks, self.scales).view(-1)[: len(flat)]
        self.codes = self.numbers(ratio, flat).to(torch.uint8)

    def read(self):
        entries = self.table().float()
        scales = self.scales.repeat_interleave(self.block_size)[: self.count]
        return self.unflat(entries[self.codes.int()] * scales)

    @property
    def nbytes(self):
        return self.codes.nbytes + self.scales.nbytes


def linear(signed):
    """Evenly spaced entries."""
    return (
        torch.linspace(-1, 1, 255, dtype=torch.float64)
        if signed
        else torch.linspace(0, 1, 256, dtype=torch.float64)
    )


@mistake(
    Blockwise8bitState,
    "Spaces the second moment's codes evenly: what is below a 510th of its block becomes 0, and the step lr * m / eps.",
)
class LinearSecondMoment(Written):
    def table(self):
        return table(True) if self.signed else linear(False)

    def above_zero(self, codes, values):
        return codes


@mistake(
    Blockwise8bitState,
    "Spaces all codes evenly and lifts small second moments to the first of them, 1/255: those weights stand still.",
)
class LinearEverywhere(Written):
    def table(self):
        return linear(self.signed)


@mistake(
    Blockwise8bitState,
    "Spaces the first moment's codes evenly: training may not notice, but values below a 254th are 0.",
)
class LinearFirstMoment(Written):
    def table(self):
        return linear(True) if self.signed else table(False)


@mistake(
    Blockwise8bitState,
    "Uses the signed table for the second moment too: half of its codes are never used, the steps twice as wide.",
)
class SignedForBoth(Written):
    def table(self):
        return table(True)

    def above_zero(self, codes, values):
        return codes.masked_fill_((codes == 127) & (values > 0), 128)


@mistake(Blockwise8bitState, "Stores magnitudes in the unsigned table and loses the first moment's sign.")
class SignLost(Written):
    def table(self):
        return table(False)

    def numbers(self, ratio, values):
        return self.above_zero(self.nearest(ratio.abs(), self.table()), values.abs())


@mistake(
    Blockwise8bitState,
    "Makes one scale for the whole tensor: one loud block leaves the others the lowest codes.",
)
class OneScale(Written):
    def scale(self, blocks):
        return (
            super().scale(blocks).amax().expand(len(blocks)).clone() if len(blocks) else super().scale(blocks)
        )


@mistake(
    Blockwise8bitState,
    "Rounds the second moment down to the entry below: every step is too long, and small moments are 0.",
)
class SecondMomentRoundedDown(Written):
    def nearest(self, ratio, entries):
        if self.signed:
            return super().nearest(ratio, entries)
        return torch.bucketize(ratio, (entries * (1 - 1e-6)).float()[1:], right=True, out_int32=True)

    def above_zero(self, codes, values):
        return codes


@mistake(Blockwise8bitState, "Takes the entry at or below a value, not the nearest: all moments sink.")
class FloorOfTheCode(Written):
    def nearest(self, ratio, entries):
        low = entries - entries.abs() * 1e-6
        return torch.bucketize(ratio, low.float()[1:], right=True, out_int32=True)


@mistake(
    Blockwise8bitState,
    "Rounds the logarithm to the nearest: half way between two entries is then their geometric mean, which is lower.",
)
class NearestByLogarithm(Written):
    def nearest(self, ratio, entries):
        middles = (entries[1:] + entries[:-1]) / 2
        roots = (entries[1:] * entries[:-1]).clamp_min(0).sqrt() * entries[1:].sign()
        low = torch.where(entries[:-1] < 0, -(entries[1:] * entries[:-1]).clamp_min(0).sqrt(), roots)
        return torch.bucketize(ratio, torch.where(low == 0, middles, low).float(), out_int32=True)


@mistake(
    Blockwise8bitState,
    "Takes the root of their product for the middle of two entries: that lies too low, and beside 0 it is 0.",
)
class GeometricMiddles(Written):
    def nearest(self, ratio, entries):
        middles = (entries[1:] * entries[:-1]).abs().sqrt() * entries[1:].sign()
        return torch.bucketize(ratio, middles.float(), out_int32=True)


@mistake(
    Blockwise8bitState,
    "Lets small second moments become 0, as the nearest entry is: the next step divides by eps alone.",
)
class SecondMomentBecomesZero(Written):
    def above_zero(self, codes, values):
        return codes


@mistake(
    Blockwise8bitState,
    "Asks the ratio whether a second moment is above 0: one of 1e-30 beside 1e20 is 0 as a float32 ratio.",
)
class AboveZeroByTheRatio(Written):
    def numbers(self, ratio, values):
        codes = self.nearest(ratio, self.table())
        return codes if self.signed else self.above_zero(codes, ratio)


@mistake(
    Blockwise8bitState,
    "Lifts small first moments to the smallest entry as well: the sign of noise becomes a value.",
)
class FirstMomentNeverZero(Written):
    def numbers(self, ratio, values):
        codes = super().numbers(ratio, values)
        if not self.signed:
            return codes
        return torch.where((codes == 127) & (values != 0), 127 + values.sign().int(), codes)


@mistake(Blockwise8bitState, "Has no entry for 0: zeros come back as the smallest entry, in both tables.")
class NoZero(Written):
    def numbers(self, ratio, values):
        codes = super().numbers(ratio, values)
        zero = 127 if self.signed else 0
        return torch.where(codes == zero, zero + 1, codes)


@mistake(
    Blockwise8bitState,
    "Lifts second moments of exactly 0 too: weights that never had a gradient get a moment above 0.",
)
class NoSecondMomentIsZero(Written):
    def above_zero(self, codes, values):
        return codes.clamp_min(1)


@mistake(
    Blockwise8bitState,
    "Takes the smallest entry as 1e-8, eight decades for seven: every entry is another.",
)
class EightDecades(Written):
    def table(self):
        entries = table(self.signed)
        return entries.abs() ** (8 / 7) * entries.sign()


@mistake(
    Blockwise8bitState,
    "Gives the ends of the range a step too many: 127 steps over 7 decades for 126, 255 for 254.",
)
class OneStepTooMany(Written):
    def table(self):
        entries, steps = table(self.signed), 126 if self.signed else 254
        return entries.abs() ** (steps / (steps + 1)) * entries.sign()


@mistake(
    Blockwise8bitState,
    "Uses the dynamic table of bitsandbytes, decades with evenly spaced parts of their own: fine near 1, coarse below.",
)
class DynamicTable(Written):
    def table(self):
        parts = []
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if self.signed else 1)) + 1, dtype=torch.float64)
            parts.append(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
        positive = torch.cat([*parts, torch.ones(1, dtype=torch.float64)])
        zero = torch.zeros(1, dtype=torch.float64)
        return (
            torch.cat([-positive[:-1].flip(0), zero, positive])
            if self.signed
            else torch.cat([zero, positive])
        )

    def above_zero(self, codes, values):
        return codes


@mistake(
    Blockwise8bitState,
    "Keeps the float32 values beside their codes: 5 bytes a value, where there were 4.",
)
class FloatKeptBeside(Written):
    def store(self, values):
        super().store(values)
        self.values = values.detach().clone()


@mistake(
    Blockwise8bitState,
    "Keeps the values as a list of Python numbers: no tensor, and 32 bytes a value.",
    fails=("bytes_really_held",),
)
class KeptAsNumbers(Written):
    def store(self, values):
        super().store(values)
        self.numbers_kept = super().read().reshape(-1).tolist()
        self.codes_bytes = self.codes.nbytes + self.scales.nbytes
        del self.codes, self.scales

    def read(self):
        return self.unflat(torch.tensor(self.numbers_kept, dtype=torch.float32))

    @property
    def nbytes(self):
        return self.codes_bytes


@mistake(
    Blockwise8bitState,
    "Keeps the values in float32 in a dict beside the class: the bytes are not in the object, but in memory.",
    fails=("bytes_really_held",),
)
class KeptElsewhere(Written):
    elsewhere: dict[int, Tensor] = {}

    def store(self, values):
        super().store(values)
        KeptElsewhere.elsewhere[id(self)] = super().read()

    def read(self):
        return KeptElsewhere.elsewhere[id(self)].clone()


@mistake(
    Blockwise8bitState,
    "write() does not detach: what is read after a Parameter was written requires grad, and holds its graph.",
    fails=("blocks_rows_and_strides",),
)
class WritesWithGrad(Written):
    def __init__(self, values, *, signed, block_size=256):
        super().__init__(values.detach(), signed=signed, block_size=block_size)

    def flat(self, values):
        return values.reshape(-1)


@mistake(Blockwise8bitState, "Keeps the codes as the int32 that the search gives: no byte is saved.")
class CodesInInt32(Written):
    def store(self, values):
        super().store(values)
        self.codes = self.codes.int()

    @property
    def nbytes(self):
        return self.codes.numel() + self.scales.nbytes


@mistake(
    Blockwise8bitState,
    "Stores whole blocks: the codes of what the last one lacks are kept too.",
)
class PaddingStored(Written):
    def store(self, values):
        super().store(values)
        self.codes = torch.nn.functional.pad(self.codes, (0, -self.count % self.block_size))[: self.count]

    @property
    def nbytes(self):
        return self.count + self.scales.nbytes


@mistake(Blockwise8bitState, "Says in nbytes what the codes take and forgets the scales.")
class ScalesNotCounted(Written):
    @property
    def nbytes(self):
        return self.codes.nbytes


@mistake(
    Blockwise8bitState,
    "Stores the scales in bfloat16: the largest value of every block is off by up to a 512th, and all others with it.",
)
class ScalesInBfloat16(Written):
    def scale(self, blocks):
        return super().scale(blocks).bfloat16().float()


@mistake(
    Blockwise8bitState,
    "Holds the scales in float16: quiet blocks have scale 0, loud ones infinity.",
)
class ScalesInFloat16(Written):
    def scale(self, blocks):
        return super().scale(blocks).half().float()


@mistake(Blockwise8bitState, "Takes the largest value for the scale, not the largest magnitude.")
class LargestValue(Written):
    def scale(self, blocks):
        return blocks.amax(dim=1).clamp_min(0)


@mistake(
    Blockwise8bitState,
    "Takes the root mean square of a block for its scale: whatever is above it is clipped.",
)
class RmsScale(Written):
    def scale(self, blocks):
        return blocks.double().square().mean(dim=1).sqrt().float()


@mistake(
    Blockwise8bitState,
    "Adds 1e-8 to the scales against blocks of zeros: quiet blocks lose their codes.",
)
class EpsilonAdded(Written):
    def ratio(self, blocks, scales):
        return blocks / (scales + 1e-8)[:, None]


@mistake(Blockwise8bitState, "Divides 0 by 0 in a block of zeros, and NaN gets the last entry of the table.")
class ZeroByZero(Written):
    def ratio(self, blocks, scales):
        return blocks / scales[:, None]

    def read(self):
        entries, scales = self.table().float(), self.scales.repeat_interleave(self.block_size)[: self.count]
        return self.unflat(entries[self.codes.int()] * torch.where(scales == 0, 1.0, scales))


class ByRows(Written):
    """Blocks of the rows of a matrix that `unrolled` gives."""

    def rows(self, values):
        return (
            values.detach().reshape(-1, values.shape[-1]) if values.dim() else values.detach().reshape(1, 1)
        )

    def back(self, rows):
        return rows.reshape(self.shape)

    def store(self, values):
        rows = self.rows(values)
        self.parts = [
            [Written(run, signed=self.signed, block_size=self.block_size) for run in row[None]]
            for row in rows
        ]

    def read(self):
        if not self.count:
            return torch.zeros(self.shape)
        return self.back(torch.stack([part.read() for row in self.parts for part in row]))

    @property
    def nbytes(self):
        return self.count + 4 * -(-self.count // self.block_size)


@mistake(
    Blockwise8bitState,
    "Begins a new block with every row: a matrix whose rows blocks do not divide has other scales, and more of them.",
)
class BlocksEndWithRows(ByRows):
    pass


@mistake(
    Blockwise8bitState,
    "Runs blocks along the first dimension, down the columns: values that lie together have other scales.",
)
class BlocksDownColumns(Written):
    def flat(self, values):
        return values.detach().permute(*range(values.dim() - 1, -1, -1)).reshape(-1)

    def unflat(self, flat):
        return flat.reshape(self.shape[::-1]).permute(*range(len(self.shape) - 1, -1, -1))


@mistake(
    Blockwise8bitState,
    "Takes values in the order of memory: a transposed state is read in the wrong order of blocks.",
)
class OrderOfMemory(Written):
    def flat(self, values):
        values = values.detach()
        if values.is_contiguous() or not values.T.is_contiguous():
            return values.reshape(-1)
        self.turned = True
        return values.T.reshape(-1)

    def unflat(self, flat):
        if getattr(self, "turned", False):
            return flat.reshape(self.shape[::-1]).T
        return flat.reshape(self.shape)


@mistake(Blockwise8bitState, "Uses blocks of 256 whatever block_size says.")
class AlwaysTwoHundredFiftySix(Written):
    def __init__(self, values, *, signed, block_size=256):
        if block_size < 1:
            raise ValueError("block_size")
        super().__init__(values, signed=signed)


@mistake(Blockwise8bitState, "Drops the last, short block: its values read as 0.")
class LastBlockDropped(Written):
    def store(self, values):
        super().store(values)
        whole = self.count // self.block_size * self.block_size
        self.codes[whole:] = 127 if self.signed else 0


@mistake(Blockwise8bitState, "Counts the last, short block to the one before it: one scale for both.")
class LastBlockJoined(Written):
    def scale(self, blocks):
        scales = super().scale(blocks)
        if self.count % self.block_size and len(scales) > 1:
            scales[-2:] = scales[-2:].amax()
        return scales


@mistake(
    Blockwise8bitState,
    "Fills the last block with ones before its scale is taken: quiet values in it get the lowest codes.",
)
class FilledWithOnes(Written):
    def blocks(self, flat):
        missing = -len(flat) % self.block_size
        return torch.cat([flat, flat.new_ones(missing)]).view(-1, self.block_size)


@mistake(
    Blockwise8bitState,
    "Takes the scales once, from the first values: later ones that are larger are clipped, smaller ones vanish.",
)
class ScalesOfTheFirstValues(Written):
    def scale(self, blocks):
        self.first = getattr(self, "first", None)
        if self.first is None or not bool(self.first.any()):
            self.first = super().scale(blocks)
        return self.first

    def ratio(self, blocks, scales):
        return super().ratio(blocks, scales).clamp(-1, 1)


@mistake(
    Blockwise8bitState,
    "Lets scales grow and never shrink: after one loud step a block's codes are at the bottom for good.",
)
class ScalesOnlyGrow(Written):
    def scale(self, blocks):
        now = super().scale(blocks)
        self.largest = torch.maximum(getattr(self, "largest", now), now)
        return self.largest


@mistake(Blockwise8bitState, "Reads a flat tensor, without its shape.")
class ReadsFlat(Written):
    def unflat(self, flat):
        return flat


@mistake(Blockwise8bitState, "Reads in float64, and the optimizer's arithmetic is done in that.")
class ReadsFloat64(Written):
    def read(self):
        return super().read().double()


@mistake(Blockwise8bitState, "Turns NaN and infinity into numbers: a broken step is hidden in the moments.")
class Launders(Written):
    def check_finite(self, values):
        pass

    def store(self, values):
        super().store(values.nan_to_num(0.0, posinf=0.0, neginf=0.0))


@mistake(
    Blockwise8bitState, "Finds NaN and infinity by the sum: large values are finite and their sum is not."
)
class FiniteByTheSum(Written):
    def check_finite(self, values):
        if not values.square().sum().isfinite():
            raise ValueError("not finite")


@mistake(Blockwise8bitState, "Looks for NaN and lets infinity in, as the scale of its block.")
class InfinityLetIn(Written):
    def check_finite(self, values):
        if values.isnan().any():
            raise ValueError("NaN")


@mistake(Blockwise8bitState, "Sets negative second moments to 0 and says nothing.")
class NegativeClamped(Written):
    def check(self, values):
        self.check_finite(values)

    def store(self, values):
        super().store(values if self.signed else values.clamp_min(0))


@mistake(Blockwise8bitState, "Takes the magnitude of negative second moments and says nothing.")
class NegativeTurned(Written):
    def check(self, values):
        self.check_finite(values)

    def store(self, values):
        super().store(values if self.signed else values.abs())


@mistake(Blockwise8bitState, "Takes values of another shape as long as their number fits.")
class AnyShape(Written):
    def check_shape(self, values):
        if values.numel() != self.count:
            raise ValueError("number")


@mistake(Blockwise8bitState, "Takes values of any shape, and the state changes its own.")
class ShapeFollows(Written):
    def check_shape(self, values):
        self.shape, self.count = tuple(values.shape), values.numel()


@mistake(
    Blockwise8bitState,
    "Stores first and refuses then: a caller that skips the broken step goes on with broken moments.",
)
class StoresThenRefuses(Written):
    def write(self, values):
        self.check_shape(values)
        self.store(values.nan_to_num())
        self.check(values)


@mistake(Blockwise8bitState, "Takes a block_size of 0 or less as the whole tensor.")
class AnyBlockSize(Written):
    def __init__(self, values, *, signed, block_size=256):
        super().__init__(
            values, signed=signed, block_size=block_size if block_size > 0 else max(values.numel(), 1)
        )


@mistake(
    Blockwise8bitState,
    "Compares with all entries at once: a table of distances, a kilobyte and more for each value.",
    fails=("largest_tensor_made",),
)
class AllAtOnce(Written):
    def nearest(self, ratio, entries):
        return (ratio.double()[:, None] - entries).abs().argmin(dim=1).int()


@alternative(Blockwise8bitState, "Takes the code from the logarithm and looks at its two neighbours")
class FromTheLogarithm(Written):
    def nearest(self, ratio, entries):
        steps, zero = (126, 127) if self.signed else (254, 0)
        size = ratio.abs().clamp_min(1e-12)
        k = ((size.log10() / 7 + 1) * steps + 1).floor().clamp(0, steps).int()
        positive = torch.cat([torch.zeros(1), entries[zero + 1 :].float()])
        k += positive[k + 1] - size < size - positive[k]
        return zero + (k * ratio.sign().int() if self.signed else k)

    def above_zero(self, codes, values):
        return torch.where(values > 0, codes.clamp_min(1), 0)


@alternative(Blockwise8bitState, "Walks block by block, in float64, with int8 codes and a sign of their own")
class BlockByBlock(Written):
    entries = (table(False), table(True))

    def store(self, values):
        codes, scales = [], []
        for run in values.detach().double().flatten().split(self.block_size) if values.numel() else []:
            scale = run.abs().max()
            ratio = run / scale if scale > 0 else run
            found = self.nearest(ratio, self.entries[self.signed])
            codes.append(found - 127 if self.signed else self.above_zero(found, run))
            scales.append(scale.float())
        self.codes = (
            torch.cat(codes).to(torch.int8 if self.signed else torch.uint8)
            if codes
            else torch.zeros(0).byte()
        )
        self.scales = torch.stack(scales) if scales else torch.zeros(0)

    def read(self):
        numbers = self.codes.int() + (127 if self.signed else 0)
        values = self.entries[self.signed][numbers].float()
        for run, scale in zip(values.split(self.block_size), self.scales, strict=False):
            run.mul_(scale)
        return values.view(self.shape)
