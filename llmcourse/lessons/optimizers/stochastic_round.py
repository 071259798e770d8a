"""Rounding to bfloat16 up or down by chance, so that on average nothing is lost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmcourse.exercise import alternative, case, excuse, exercise, mistake, raised

ROWS = 16_384
FALSE_FAIL = 1e-6  # a right answer fails one case that is judged by its law with at most this probability


@exercise(
    points=2,
    minutes=12,
    extension=True,
    hints=(
        "A bfloat16 is the upper half of a float32. What the lower half holds, as an integer, is how far x is on its "
        "way from one neighbour to the next, and what is added there may carry.",
        "Look at what has no neighbour on one side: adding to the bits of NaN, or of the last values before infinity, "
        "makes other numbers of them. And no two values may share a draw.",
    ),
)
def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """x as bfloat16, each value rounded to one of its two neighbours by chance, so that its
    expectation is x; about 7 lines.

    x float32 of any shape (none and empty too), any strides, not changed; it may require
    grad, the result does not. Returns bfloat16 of the same shape.

    A value that bfloat16 holds stays what it is. Any other lies between two neighbouring
    numbers of bfloat16, low and high: the result is high with probability
    (x - low) / (high - low), else low. So it is for negative values, and down to the
    smallest: bfloat16 has subnormals, multiples of 2^-133. Zeros have the sign of x.

    A finite x beyond the largest finite number of bfloat16 (3.3895e38) becomes that
    number, with the sign of x; Inf and -Inf stay; NaN stays NaN.

    All chance comes from generator, a CPU generator as x is on the CPU: from the same
    state come the same draws, and a next call goes on from where it is; torch's global
    generator stays as it is. The draws of all values are independent. Probabilities are
    right to within 2^-15.

    ValueError for any dtype but float32. Used to train 16-bit weights without a float32
    copy: an update of a tenth of the distance to the next number is taken every tenth time.
    """
    ### BEGIN SOLUTION
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}; expected torch.float32")
    x = x.detach()
    noise = torch.randint(65536, x.shape, generator=generator, dtype=torch.int32)
    rounded = (x.view(torch.int32) + noise & -65536).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    return torch.where(x.isfinite(), rounded.clamp(-largest, largest), x).bfloat16()
    ### END SOLUTION


excuse(stochastic_round, "65536 -> 65535", "changes probabilities by 2^-16, and the statement leaves 2^-15")


# ---------------------------------------------------------------------------------------------------------- cases


def allowed(variance, tests, false_fail=FALSE_FAIL):
    """How far a count may lie from its mean: Bernstein's inequality, solved for false_fail / tests on both sides."""
    log = math.log(2 * tests / false_fail)
    return log / 3 + math.sqrt((log / 3) ** 2 + 2 * log * variance)


def neighbours(x):
    """(bits of the neighbour towards 0, of the one away from it, the part of the way x has gone): int16, float64."""
    bits = x.view(torch.int32)
    towards = bits & -65536
    away = torch.where(bits == towards, towards, towards + 65536)
    near, far = towards.view(torch.float32).double(), away.view(torch.float32).double()
    gone = ((x.double() - near) / (far - near)).nan_to_num(0.0)
    return (towards >> 16).to(torch.int16), (away >> 16).to(torch.int16), gone


def fits(moved, probability, tests):
    """Whether each column of moved [rows, k], 0 or 1, has as many ones as this probability [k] allows."""
    mean = len(moved) * probability
    off = (moved.sum(dim=0) - mean).abs().tolist()
    room = [allowed(variance, tests) for variance in (mean * (1 - probability)).tolist()]
    return all(o <= r for o, r in zip(off, room, strict=True))


def other_law(moved, x, p, tests):
    """What the frequencies are instead, where that is one of the usual things."""
    laws = {
        "all values go towards zero": torch.zeros_like(p),
        "all values go away from zero": torch.ones_like(p),
        "each value goes to the nearer neighbour, always": (p > 0.5).double(),
        "both neighbours are equally frequent": torch.full_like(p, 0.5),
        "each neighbour is as frequent as the other one should be": 1 - p,
        "negative values go to each neighbour as often as they should to the other": torch.where(
            x < 0, 1 - p, p
        ),
        "values go on only from the half of their way, twice as often for each part": (2 * p - 1).clamp_min(
            0
        ),
        "values go on too often, by half of what is left": (1 + p) / 2,
    }
    for name, law in laws.items():
        if fits(moved, law, tests):
            return name
    return "a value is not rounded as often as it should be"


def judged_by_law(observed, expected):
    """Neighbours alone; how often which; neighbouring values, rows and calls independent. FALSE_FAIL in all."""
    x = expected["x"]
    towards, away, p = neighbours(x)
    if bool(((observed["draws"] != towards) & (observed["draws"] != away)).any()):
        return "a value became a number that is not its neighbour"
    if not torch.equal(observed["draws"], observed["again"]):
        return "the same state of the generator gave other draws"
    first = (observed["draws"] == away).double()
    following = (observed["next"] == away).double()
    tests = 7 * len(p)
    if bool((first == first[:1]).all()) and not fits(first, (p > 0.5).double(), tests) and first.any():
        return "all rows go the same way"
    if not fits(first, p, tests):
        return other_law(first, x, p, tests)
    if not fits(first[:, 1:] * first[:, :-1], p[1:] * p[:-1], tests):
        return "values beside each other depend on one another"
    if not fits(first[::2] * first[1::2], p * p, tests):
        return "values below each other depend on one another"
    for parts in (2, 4, 8):
        pairs = first.view(parts // 2, 2, -1, len(p))
        if not fits((pairs[:, 0] * pairs[:, 1]).flatten(0, 1), p * p, tests):
            return f"one part of the values depends on another, of {parts} parts one after the other"
    if torch.equal(observed["next"], observed["draws"]):
        return "another state of the generator gave the same draws"
    if not observed["moved on"]:
        return "the generator stays where it was"
    if observed["global generator moved"]:
        return "torch's global generator was seeded or drawn from"
    return None if fits(first * following, p * p, tests) else "the draws of two calls depend on one another"


def repeated(answer, x, rows, generator):
    """What is judged by its law: rows of the same values, drawn twice from one state, and once from a later one."""
    torch.rand(rows.shape[1], generator=generator)  # not a fresh one, whose seed would say its state
    state, others = generator.get_state(), torch.get_rng_state()
    draws = answer(rows, generator)
    moved_on = not torch.equal(generator.get_state(), state)
    torch.rand(1, generator=generator)
    following = answer(rows, generator)
    again = answer(rows, generator.set_state(state))
    return {
        "x": x,
        "draws": bits(draws),
        "again": bits(again),
        "next": bits(following),
        "moved on": moved_on,
        "global generator moved": not torch.equal(torch.get_rng_state(), others),
    }


def bits(y):
    """The bits of a bfloat16 result; of anything else what it is."""
    if isinstance(y, torch.Tensor) and y.dtype == torch.bfloat16:
        return y.detach().contiguous().view(torch.int16)
    return str(getattr(y, "dtype", y))


def between(rng, parts):
    """Values that have gone these parts of the way from one number of bfloat16 to the next, both signs."""
    parts = torch.tensor(rng.shuffled(parts), dtype=torch.float64)
    whole = rng.integers(128, 254, len(parts))
    signs = torch.tensor(rng.shuffled([1, -1] * len(parts)))[: len(parts)]
    powers = 2.0 ** rng.integers(-20, 12, len(parts))
    return (signs * (whole + (parts * 65536).round() / 65536) * powers).float()


@case(stochastic_round, judge=judged_by_law)
def values_of_both_signs(answer, rng):
    """Values that have gone from a 400th of their way to 9 tenths, each in 16,384 rows."""
    x = between(rng, [1 / 400, rng.uniform(0.05, 0.15).item(), 0.25, 0.5, 0.75, 0.9, 1 / 2, 0.3])
    return repeated(answer, x, x.repeat(ROWS, 1), rng.spawn())


@case(stochastic_round, judge=judged_by_law)
def close_to_exact(answer, rng):
    """Values a 300th of the way from a number, or before one, of both signs; rows that share their memory."""
    part = rng.uniform(1 / 330, 1 / 280).item()
    x = between(rng, [part, 1 - part, part, 1 - part])
    return repeated(answer, x, x.expand(ROWS, -1), rng.spawn())


@case(stochastic_round, judge=judged_by_law)
def around_powers_of_two(answer, rng):
    """Values just above and just below powers of two, where the distance between numbers doubles."""
    part = rng.uniform(0.2, 0.4).item()
    above = torch.tensor([1 + part * 2**-7, 1 + (1 - part) * 2**-7], dtype=torch.float64)
    below = torch.tensor([1 - part * 2**-8, 1 - (1 - part) * 2**-8], dtype=torch.float64)
    powers = 2.0 ** rng.integers(-30, 30, 8) * torch.tensor(rng.shuffled([1, -1] * 4))
    x = (torch.cat([above, below, above, below]) * powers).float()
    return repeated(answer, x, x.repeat(ROWS // 2, 1), rng.spawn())


@case(stochastic_round, judge=judged_by_law)
def smallest_and_largest(answer, rng):
    """Subnormals of both formats, values between 0 and the first of them, and values before the largest number."""
    tops = [0x0000, 0x0001, rng.integer(2, 0x7E), 0x007F, 0x0080, 0x7F7E, 0x7F00]
    low = rng.integers(0x3000, 0xD000, len(tops), dtype=torch.int32)
    x = (torch.tensor(tops, dtype=torch.int32) << 16 | low).view(torch.float32)
    x = x * torch.tensor(rng.shuffled([1, -1] * 4))[: len(tops)]
    return repeated(answer, x, x.repeat(ROWS // 4, 1), rng.spawn())


RARE = 1e-9  # a right answer fails the case below with at most this probability


def as_often(observed, expected):
    """Bernstein's inequality at RARE for all rows together, beside the 2^-15 that the statement leaves."""
    count, parts = expected["values in a row"], expected["part of the way"].tolist()
    if any(observed["neither neighbour"]):
        return "a value became a number that is not its neighbour"
    for p, moved in zip(parts, observed["moved on"], strict=True):
        mean = count * p
        if abs(moved - mean) > allowed(mean * (1 - p), len(parts), RARE) + count * 2**-15:
            often = "often" if moved > mean else "rarely"
            return f"values that have gone a {round(1 / p)}th of their way go on too {often}"
    return None


@case(stochastic_round, judge=as_often)
def a_little_of_the_way(answer, rng):
    """Half a million equal values each that have gone a 512th, a 1024th and a 4096th of their way."""
    x, count = between(rng, [1 / 512, 1 / 1024, 1 / 4096]), 2**19
    towards, away, part = neighbours(x)
    found = bits(answer(x[:, None].expand(-1, count), rng.spawn()))
    moved = (found == away[:, None]).sum(dim=1)
    return {
        "part of the way": part,
        "values in a row": count,
        "moved on": moved.tolist(),
        "neither neighbour": (count - moved - (found == towards[:, None]).sum(dim=1)).tolist(),
    }


def pair_by_pair(observed, expected):
    """Bernstein's inequality for every pair of values: both move on in a quarter of the calls."""
    moved = observed["moved on"].double()
    calls, count = moved.shape
    together = (moved.T @ moved)[torch.ones(count, count).triu(1).bool()]
    room = allowed(calls * 3 / 16, len(together))
    return (
        None
        if bool(((together - calls / 4).abs() <= room).all())
        else "values of a call depend on one another"
    )


@case(stochastic_round, judge=pair_by_pair)
def every_pair_of_a_call(answer, rng):
    """48 values half way, in 512 calls: no two of them go together, or apart, more often than chance has it."""
    x, generator = between(rng, [1 / 2] * 48), rng.spawn()
    _, away, _ = neighbours(x)
    return {"moved on": torch.stack([bits(answer(x, generator)) == away for _ in range(512)])}


def bit_by_bit(observed, expected):
    """The numbers of bfloat16 that lie in int16 tensors equal, -0.0 and 0.0 apart; all else equal."""
    for name, right in expected.items():
        found = observed[name]
        if not isinstance(right, torch.Tensor):
            if found != right:
                return f"{name}: expected {right}, found {found}"
        elif not torch.equal(found, right):
            wrong = found != right
            if right.dtype == torch.bool:
                return f"{name}: not all do"
            found, right = (part[wrong].view(torch.bfloat16) for part in (found, right))
            largest = right.float().argmax()
            return f"{name}: expected {right[largest]:.6g}, found {found[largest]:.6g}"
    return None


@case(stochastic_round, judge=bit_by_bit)
def exact_values_stay(answer, rng):
    """Every finite number of bfloat16, both zeros and both infinities; and a million exact values in one call."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    row = rng.integers(-(2**7), 2**7, 2**10).float() * 2.0 ** rng.integer(-100, 100)
    moved = bits(answer(row.expand(2**10, -1), rng.spawn())) != row.bfloat16().view(torch.int16)
    return {
        "every number": bits(answer(every.float(), rng.spawn())),
        "of a million moved": int(moved.count_nonzero()),
    }


@case(stochastic_round, judge=bit_by_bit)
def beyond_the_largest(answer, rng):
    """Values between the largest bfloat16 and the largest float32, infinities, and NaN of several bits."""
    high = (rng.integers(0x7F7F0001, 0x7F7FFFFF, 40, dtype=torch.int32)).view(torch.float32)
    high = torch.cat([high, torch.tensor([torch.finfo(torch.float32).max])])
    signs = (2 * rng.integers(0, 1, 41) - 1).float()
    others = torch.tensor([torch.inf, 0.0, -torch.inf, -0.0])
    nan = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7FFF8000, -1, -0x7FFFFF, -0x3FFFF0]).to(
        torch.int32
    )
    nan = nan.view(torch.float32).repeat(30)
    return {
        "finite, beyond the largest of bfloat16": bits(answer(high * signs, rng.spawn())),
        "Inf, -Inf, 0 and -0": bits(answer(others.repeat(20), rng.spawn())),
        "NaN stays NaN": answer(nan, rng.spawn()).isnan(),
    }


def in_shape(observed, expected):
    """Every result one of its value's neighbours, in the shape of x; refusals and flags equal."""
    for name, x in expected["x"].items():
        towards, away, _ = neighbours(x)
        found = observed["y"][name]
        if found.shape != x.shape:
            return f"{name}: the result has another shape than x"
        if bool(((found != towards) & (found != away)).any()):
            return f"{name}: a value became a number that is not its neighbour"
    if observed["requires grad"] != expected["requires grad"]:
        return "the result requires grad"
    wrong = [name for name, kind in expected["raised"].items() if observed["raised"][name] != kind]
    return f"{wrong[0]}: not refused with ValueError" if wrong else None


@case(stochastic_round, judge=in_shape, free_shapes=True)
def shapes_strides_and_refusals(answer, rng):
    """No dimension, none of length, three, views of every kind, a Parameter; other dtypes are refused."""
    wide = rng.normal(rng.integer(6, 9), 2 * rng.integer(5, 8))
    x = {
        "one value": rng.normal(),
        "empty": rng.normal(0, 3),
        "vector": rng.normal(rng.integer(3, 9)),
        "three dimensions": rng.normal(2, 3, 5),
        "transposed": wide.T,
        "every other": wide[1:, ::2],
    }
    parameter = torch.nn.Parameter(rng.normal(4, 3))
    refused = {
        f"{dtype}": raised(answer, wide.to(dtype), rng.spawn())
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32)
    }
    return {
        "x": {name: part.contiguous() for name, part in x.items()},
        "y": {name: bits(answer(part, rng.spawn())) for name, part in x.items()},
        "requires grad": answer(parameter, rng.spawn()).requires_grad,
        "raised": refused,
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


JOINT = ("values_of_both_signs", "close_to_exact", "around_powers_of_two", "smallest_and_largest")
LAW = (*JOINT, "a_little_of_the_way", "every_pair_of_a_call")


def refuse(x):
    if x.dtype != torch.float32:
        raise ValueError("dtype")


LARGEST = torch.finfo(torch.bfloat16).max


def noise_for(x, generator):
    return torch.randint(0, 1 << 16, tuple(x.shape), generator=generator, dtype=torch.int32)


def add_and_cut(x, noise):
    return (x.contiguous().view(torch.int32) + noise & ~0xFFFF).view(torch.float32)


def kept(x, rounded):
    """What has no neighbour on one side."""
    rounded = rounded.clamp(min=-LARGEST, max=LARGEST)
    return torch.where(torch.isfinite(x), rounded, x)


def written(x, generator, *, refuse=refuse, noise=noise_for, rounded=add_and_cut, kept=kept):
    """A right answer in steps; a wrong one replaces some."""
    refuse(x)
    x = x.detach()
    return kept(x, rounded(x, noise(x, generator))).to(torch.bfloat16)


def toward_zero(x):
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)


def step_of(x):
    """Distance of the two neighbours, float64."""
    towards = x.contiguous().view(torch.int32) & ~0xFFFF
    return ((towards + 65536).view(torch.float32).double() - towards.view(torch.float32).double()).abs()


@mistake(stochastic_round, "Rounds to nearest: an update below half a step is lost every time.", fails=LAW)
def to_nearest(x, generator):
    return written(x, generator, rounded=lambda x, noise: x.bfloat16().float())


@mistake(stochastic_round, "Cuts off the lower half: every value moves towards zero.", fails=LAW)
def cut_off(x, generator):
    return written(x, generator, noise=lambda x, generator: 0)


@mistake(stochastic_round, "Rounds up or down with equal chances, however near one of the two is.", fails=LAW)
def a_coin(x, generator):
    def noise(x, generator):
        inexact = x.contiguous().view(torch.int32) & 0xFFFF
        coin = torch.randint(0, 2, tuple(x.shape), generator=generator, dtype=torch.int32)
        return torch.where(inexact == 0, 0, coin * 65536)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Takes the chance of the one neighbour for that of the other: the nearer is rarer.",
    fails=LAW,
)
def chances_swapped(x, generator):
    def rounded(x, noise):
        low = x.contiguous().view(torch.int32) & 0xFFFF
        up = (noise >= low) & (low > 0)
        return add_and_cut(x, torch.where(up, 65536, 0).int() - low)

    return written(x, generator, rounded=rounded)


@mistake(
    stochastic_round,
    "Measures the way by magnitude and then rounds towards plus infinity: negative values get the wrong chances.",
    fails=LAW,
)
def up_is_up(x, generator):
    def rounded(x, noise):
        low = x.contiguous().view(torch.int32) & 0xFFFF
        high = noise < low
        away = torch.where(x < 0, ~high & (low > 0), high)
        return add_and_cut(x, torch.where(away, 65536, 0).int() - low)

    return written(x, generator, rounded=rounded)


@mistake(
    stochastic_round,
    "Draws the noise for magnitudes and adds it with its sign lost: negatives become positive.",
)
def sign_lost(x, generator):
    return written(x, generator, rounded=lambda x, noise: add_and_cut(x.abs(), noise))


@mistake(
    stochastic_round,
    "Draws 8 bits of noise: a value that has gone less than a 256th of its way never goes on, and bias stays.",
    fails=LAW,
)
def eight_bits(x, generator):
    return written(x, generator, noise=lambda x, generator: noise_for(x, generator) & 0xFF00)


@mistake(
    stochastic_round,
    "Draws 15 bits of noise, as if one were a sign: only the farther half ever rounds up.",
    fails=LAW,
)
def fifteen_bits(x, generator):
    return written(x, generator, noise=lambda x, generator: noise_for(x, generator) >> 1)


@mistake(stochastic_round, "Draws 17 bits of noise: every value moves away from zero half of the time.")
def seventeen_bits(x, generator):
    def noise(x, generator):
        return torch.randint(0, 1 << 17, tuple(x.shape), generator=generator, dtype=torch.int32)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws from 0 to 65536, both included: a value that is exact moves, once in 65,537 times.",
)
def one_too_many(x, generator):
    def noise(x, generator):
        return torch.randint(0, 65537, tuple(x.shape), generator=generator, dtype=torch.int32)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws the uniform noise in bfloat16, of which there are too few: small parts go on too often.",
    fails=LAW,
)
def noise_in_bfloat16(x, generator):
    def noise(x, generator):
        drawn = torch.rand(tuple(x.shape), generator=generator, dtype=torch.bfloat16)
        return (65536 * (1 - drawn.float())).int() - 1

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws normal noise of a step's width and rounds to nearest: values move beyond their neighbours.",
)
def normal_noise(x, generator):
    def rounded(x, noise):
        drawn = torch.randn(tuple(x.shape), generator=generator)
        return (x + drawn * step_of(x).float()).bfloat16().float()

    return written(x, generator, noise=lambda x, generator: None, rounded=rounded)


@mistake(
    stochastic_round,
    "Adds uniform noise of half a step and rounds to nearest: right but above a power of two, where the steps below "
    "are half as wide.",
)
def uniform_noise_then_nearest(x, generator):
    def rounded(x, noise):
        drawn = torch.rand(tuple(x.shape), generator=generator, dtype=torch.float64) - 0.5
        y = (x.double() + drawn * step_of(x)).float().bfloat16().float()
        return torch.where(x == toward_zero(x), x, y)

    return written(x, generator, noise=lambda x, generator: None, rounded=rounded)


@mistake(
    stochastic_round,
    "Takes 2^-7 of the value for the distance of its neighbours: that distance belongs to the power of two below.",
    fails=LAW,
)
def relative_steps(x, generator):
    def rounded(x, noise):
        near = toward_zero(x).double()
        part = (x.double() - near).abs() / (x.double().abs() * 2**-7)
        drawn = torch.rand(tuple(x.shape), generator=generator, dtype=torch.float64)
        return add_and_cut(toward_zero(x), torch.where(drawn < part, 65536, 0).int())

    return written(x, generator, noise=lambda x, generator: None, rounded=rounded)


@mistake(stochastic_round, "Draws once for the whole tensor: all values go up or down together.", fails=LAW)
def one_draw_for_all(x, generator):
    return written(x, generator, noise=lambda x, generator: noise_for(x.new_empty(()), generator))


@mistake(stochastic_round, "Draws once for each row: values beside each other share their noise.", fails=LAW)
def one_draw_a_row(x, generator):
    def noise(x, generator):
        return noise_for(x[..., :1] if x.dim() else x, generator)

    return written(x, generator, noise=noise)


@mistake(stochastic_round, "Draws once for a row of values and uses it for all rows.", fails=LAW)
def one_draw_a_column(x, generator):
    def noise(x, generator):
        return noise_for(x[:1] if x.dim() > 1 else x, generator)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Splits one draw of 32 bits among two values, and gives both the same half of it.",
    fails=LAW,
)
def pairs_share(x, generator):
    def noise(x, generator):
        half = noise_for(x.new_empty((x.numel() + 1) // 2), generator)
        return half.repeat_interleave(2)[: x.numel()].view(x.shape)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws 8 bits of noise and adds half a step of them: what has gone less than a 512th of its way never goes on.",
    fails=LAW,
)
def eight_centred_bits(x, generator):
    return written(x, generator, noise=lambda x, generator: (noise_for(x, generator) & 0xFF00) + 128)


def in_parts(x, drawn):
    """The noise of x, of parts that are drawn together."""
    return torch.cat(drawn)[: x.numel()].view(x.shape)


@mistake(
    stochastic_round,
    "Draws for the first half of the values, and the second half gets the same draws.",
    fails=LAW,
)
def halves_share(x, generator):
    def noise(x, generator):
        return in_parts(x, [noise_for(x.new_empty((x.numel() + 1) // 2), generator)] * 2)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws for a part of the values and uses these draws again for the others, at whatever places.",
    fails=("every_pair_of_a_call",),
)
def thirds_share(x, generator):
    def noise(x, generator):
        return in_parts(x, [noise_for(x.new_empty(-(-x.numel() // 3)), generator)] * 3)

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws for the first half of the values and mirrors it for the second half, so that one goes up where the other "
    "goes down.",
    fails=LAW,
)
def halves_mirrored(x, generator):
    def noise(x, generator):
        half = noise_for(x.new_empty((x.numel() + 1) // 2), generator)
        return in_parts(x, [half, 65535 - half])

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Draws for an eighth of the values and shifts these draws by eighths for the rest: even, and not independent.",
    fails=LAW,
)
def eighths_shifted(x, generator):
    def noise(x, generator):
        eighth = noise_for(x.new_empty(-(-x.numel() // 8)), generator)
        return in_parts(x, [eighth + 8192 * part & 65535 for part in range(8)])

    return written(x, generator, noise=noise)


@mistake(
    stochastic_round,
    "Seeds torch's global generator from this one and draws there: dropout and data order change with it.",
    fails=JOINT,
)
def seeds_the_global_one(x, generator):
    torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
    return written(x, None)


@mistake(stochastic_round, "Leaves the generator aside, so no run can be repeated.", fails=LAW)
def global_randomness(x, generator):
    return written(x, None)


@mistake(
    stochastic_round,
    "Seeds anew in every call: the same noise in every step, and errors add up instead of cancelling.",
    fails=LAW,
)
def seeded_anew(x, generator):
    return written(x, torch.Generator().manual_seed(generator.initial_seed()))


@mistake(
    stochastic_round,
    "Draws from a copy of the generator, which stays where it was: every call has the same noise.",
    fails=LAW,
)
def generator_not_moved(x, generator):
    return written(x, torch.Generator().set_state(generator.get_state()))


@mistake(
    stochastic_round,
    "A finite value beyond the largest of bfloat16 becomes infinite: a weight is lost for good.",
)
def becomes_infinite(x, generator):
    return written(x, generator, kept=lambda x, rounded: torch.where(x.isfinite(), rounded, x))


@mistake(
    stochastic_round,
    "A finite negative value beyond the largest becomes -Inf: only the positive side is looked after.",
    fails=("beyond_the_largest",),
)
def becomes_minus_infinite(x, generator):
    def kept(x, rounded):
        return torch.where(x.isfinite(), rounded.clamp(max=LARGEST), x)

    return written(x, generator, kept=kept)


@mistake(
    stochastic_round, "Inf becomes the largest finite number too, so that an overflow is not seen any more."
)
def infinity_clamped(x, generator):
    def kept(x, rounded):
        return torch.where(x.isnan(), x, rounded.clamp(-LARGEST, LARGEST))

    return written(x, generator, kept=kept)


@mistake(
    stochastic_round,
    "Clamps and leaves it at that: Inf becomes the largest finite number, and NaN an ordinary one where it carries.",
)
def clamped_alone(x, generator):
    return written(x, generator, kept=lambda x, rounded: rounded.clamp(-LARGEST, LARGEST))


@mistake(
    stochastic_round,
    "Adds noise to the bits of NaN as to any others: some carry into the sign and come out as 0, some as infinity.",
)
def nan_by_its_bits(x, generator):
    def kept(x, rounded):
        return torch.where(x.isinf(), x, rounded.nan_to_num().clamp(-LARGEST, LARGEST))

    return written(x, generator, kept=kept)


@mistake(stochastic_round, "Flushes subnormals to zero.")
def subnormals_flushed(x, generator):
    def kept_without(x, rounded):
        y = kept(x, rounded)
        return torch.where(y.abs() < torch.finfo(torch.bfloat16).tiny, 0 * x.sign().nan_to_num(), y)

    return written(x, generator, kept=kept_without)


@mistake(stochastic_round, "Negative zero comes out as zero.")
def zero_without_sign(x, generator):
    def kept_without(x, rounded):
        return kept(x, rounded) + 0.0

    return written(x, generator, kept=kept_without)


@mistake(
    stochastic_round,
    "Adds the noise in place, through a view of x: the float32 values of the caller are changed.",
)
def in_place(x, generator):
    refuse(x)
    if not x.is_contiguous():
        return written(x, generator)
    x = x.detach()
    finite = x.isfinite()
    before = x.clone()
    x.view(torch.int32).add_(noise_for(x, generator)).bitwise_and_(-65536)
    return torch.where(finite, x.clamp(-LARGEST, LARGEST), before).bfloat16()


@mistake(stochastic_round, "Gives float32 back, with the rounded values in it: nothing is saved.")
def in_float32(x, generator):
    return written(x, generator).float()


@mistake(
    stochastic_round,
    "Takes any dtype and casts it first: float16 and integers, rounded before, come through.",
)
def any_dtype(x, generator):
    return written(x.float(), generator)


@mistake(stochastic_round, "Gives a result that requires grad where x does.")
def grad_kept(x, generator):
    y = written(x, generator)
    return y + 0 * x.bfloat16() if x.requires_grad else y


@alternative(
    stochastic_round, "Compares the part of the way with a uniform draw, in float64, and picks a neighbour"
)
def compared(x, generator):
    refuse(x)
    x = x.detach()
    near = toward_zero(x)
    part = (x.double() - near.double()).abs() / step_of(x)
    drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    far = add_and_cut(near, torch.full(x.shape, 65536, dtype=torch.int32))
    return kept(x, torch.where(drawn < part, far, near)).bfloat16()


@alternative(stochastic_round, "Adds the noise in 64 bits and value by value, last value first")
def in_64_bits(x, generator):
    refuse(x)
    given = x.detach().contiguous().view(torch.int32).reshape(-1).long().flip(0)
    noise = torch.randint(0, 65536, (len(given),), generator=generator)
    top = given - (given % 65536) + torch.where(given % 65536 + noise >= 65536, 65536, 0)
    wrapped = (top + 2**31) % 2**32 - 2**31
    rounded = wrapped.flip(0).int().view(torch.float32).view(x.shape)
    return kept(x.detach(), rounded).bfloat16()


@alternative(
    stochastic_round, "Subtracts the noise from the next number's bits: rounds down as often as needed"
)
def from_above(x, generator):
    def rounded(x, noise):
        return (x.contiguous().view(torch.int32) + 65535 - noise & -65536).view(torch.float32)

    return written(x, generator, rounded=rounded)
