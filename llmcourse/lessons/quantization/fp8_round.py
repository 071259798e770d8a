"""FP8 E4M3 by hand: every float32 value to the nearest of the 253 numbers that one byte can hold."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import Rng, alternative, case, exercise, mistake, raised

# Comes with other libraries; where it is not installed there is nothing to switch off.
CASTS = ("ml_dtypes.float8_e4m3fn",) if importlib.util.find_spec("ml_dtypes") else ()


@exercise(
    points=3,
    minutes=12,
    extension=True,
    forbid=CASTS,
    hints=(
        "Between two powers of two the numbers of the format are equally far apart. Find that distance for each value "
        "of x, and the rest is a division, a round and a product, all of them exact.",
        "The distance stops shrinking below 2^-6, and the clamp at 448 comes before anything is divided: infinity "
        "over infinity is NaN.",
    ),
)
def fp8_round(x: Tensor) -> Tensor:
    """Each value of x rounded to the nearest number of FP8 E4M3 ("e4m3fn"), still held
    as float32; about 7 lines.

    x float32 of any number of dimensions (none too), any size (empty too) and any
    strides -> float32 of x's shape. x is not changed.

    The byte has a sign, 4 bits of exponent with bias 7 and 3 bits of mantissa. It has
    no infinity: the highest exponent holds numbers as the others do, but for its last
    pattern, which is NaN. So the largest number is 1.75 * 2^8 = 448. Below 2^-6 lie the
    subnormals, the multiples of 2^-9.

    Rounding is to nearest, ties to even: to the number whose last bit of mantissa is 0.
    Saturating: what lies beyond 448, infinity too, becomes 448 with the sign of x. NaN
    stays NaN. Zeros have the sign of x: -0.0 stays -0.0, and a negative value that
    rounds to zero gives -0.0. Results are compared bit by bit.

    ValueError for any dtype but float32: a value that was rounded before may end
    elsewhere.

    No tensor of a float8 dtype may be made on the way; operations that take or make one
    are counted.
    """
    ### BEGIN SOLUTION
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}; expected torch.float32, and a value rounded only once")
    magnitude = x.abs().clamp(max=448.0)
    exponent = torch.frexp(magnitude).exponent - 1  # magnitude is in [2^exponent, 2^(exponent + 1))
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    return torch.copysign((magnitude / step).round() * step, x)
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


class Float8Seen(TensorWork):
    """Counts the operations on this thread that take or make a tensor of a float8 dtype."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        parts = [*args, *(result if isinstance(result, tuple | list) else [result])]
        dtypes = [part.dtype for part in parts if isinstance(part, torch.Tensor)]
        self.operations += any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in dtypes)
        return result


def rounded(answer, x):
    """What came of x, beside it."""
    with Float8Seen() as seen:
        y = answer(x)
    return {"x": x, "y": y, "float8": seen.operations}


def each_exactly(observed, expected):
    """None, or the first part that differs: what `rounded` gave, or a refusal."""
    for name, right in expected.items():
        found = observed[name]
        if isinstance(right, str):
            reason = None if found == right else f"expected {right}, found {found}"
        else:
            reason = exactly(found, right)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def exactly(observed, expected):
    """None, or the first value whose bits differ; NaN is one value whatever its bits."""
    if observed["float8"]:
        return (
            f"made or took tensors of a float8 dtype in {observed['float8']} operations; round without them"
        )
    x, y, right = (part.reshape(-1) for part in (expected["x"], observed["y"], expected["y"]))
    bits = [torch.where(part.isnan(), torch.nan, part).view(torch.int32) for part in (y, right)]
    wrong = (bits[0] != bits[1]).nonzero().reshape(-1).tolist()
    if not wrong:
        return None
    first = wrong[0]
    shown = [f"{part[first].item():.9g}" for part in (x, right, y)]
    count = f"{len(wrong):,} of {x.numel():,} values differ"
    return f"{count}; first x = {shown[0]}: expected {shown[1]}, found {shown[2]}"


def numbers() -> Tensor:
    """The 127 numbers of the format that are not negative, float32, in order."""
    subnormal = [mantissa * 2.0**-9 for mantissa in range(8)]
    normal = [(8 + mantissa) * 2.0 ** (exponent - 3) for exponent in range(-6, 9) for mantissa in range(8)]
    return torch.tensor([*subnormal, *normal][:127])


def signed(rng: Rng, magnitude: Tensor) -> Tensor:
    """Each value with a sign of its own, in another order."""
    sign = rng.integers(0, 1, magnitude.numel()) * 2 - 1
    order = torch.randperm(magnitude.numel(), generator=rng.generator)
    return torch.copysign(magnitude.reshape(-1)[order], sign.float())


@case(fp8_round, judge=exactly)
def all_the_exponents(answer, rng):
    """Values of every exponent from 2^-6 to 2^8, of both signs, [8, 64]."""
    magnitude = torch.ldexp(rng.uniform(1, 1.75, 512), rng.integers(-6, 8, 512, dtype=torch.int32))
    return rounded(answer, signed(rng, magnitude).reshape(8, 64))


@case(fp8_round, judge=exactly)
def ties_and_their_neighbours(answer, rng):
    """Values half way between two numbers, and the float32 values next to these."""
    middle = (numbers()[1:] + numbers()[:-1]) / 2
    near = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, torch.inf)]
    return rounded(answer, signed(rng, torch.cat([middle, *near])))


@case(fp8_round, judge=exactly)
def subnormals(answer, rng):
    """Values below 2^-6, down to ones that round to zero."""
    tiny = rng.choice([1e-10, 1e-38, 1e-42])
    magnitude = torch.cat([rng.uniform(0, 2**-6, 300), rng.uniform(0, 2**-9, 100), rng.uniform(0, tiny, 20)])
    return rounded(answer, signed(rng, magnitude))


@case(fp8_round, judge=exactly)
def beyond_the_largest(answer, rng):
    """Values around 448 and far above it, both infinities and NaN, among ordinary ones."""
    special = torch.tensor([448.0, 464.0, 480.0, 512.0, torch.inf, torch.nan])
    large = torch.cat([rng.uniform(416, 560, 60), rng.uniform(560, 1e6, 30), rng.uniform(1e30, 3e38, 10)])
    return rounded(answer, signed(rng, torch.cat([special.repeat(4), large, rng.uniform(0.1, 400, 36)])))


@case(fp8_round, judge=exactly)
def every_bfloat16(answer, rng):
    """All 65,536 values of bfloat16, as float32, in a drawn order."""
    order = torch.randperm(1 << 16, generator=rng.generator)
    x = (order - (1 << 15)).to(torch.int16).view(torch.bfloat16).float()
    return rounded(answer, x.reshape(256, 256))


@case(fp8_round, judge=each_exactly)
def other_shapes_and_strides(answer, rng):
    """None to five dimensions, without values too, and views: transposed, permuted, cut out, expanded."""
    x = 3 * rng.normal(rng.integer(3, 9), 2 * rng.integer(5, 9))
    cube, least = 3 * rng.normal(rng.integer(2, 3), rng.integer(2, 4), rng.integer(3, 5)), 2.0**-9
    found = {"transposed": x.T, "every other": x[:, ::2], "expanded": x[:1].expand(3, -1)}
    found["three dimensions"], found["three dimensions, permuted"] = cube, cube.permute(2, 0, 1)
    found["four dimensions"], found["five dimensions"] = cube[:, None], cube[:, :, None, None]
    ties = torch.tensor([1.0625, -1.1875, least / 2, -1.5 * least, torch.nan, torch.inf, -torch.inf, -0.0])
    for place, one in enumerate([*ties, x[0, 0], x[1, 1]]):
        found[f"no dimensions, {place}"] = one
    for empty in (x[:0, 0], x[:, :0], cube[:0], cube[:, :0]):
        found[f"empty {list(empty.shape)}"] = empty
    return {name: rounded(answer, part) for name, part in found.items()}


@case(fp8_round, judge=each_exactly)
def other_dtypes(answer, rng):
    """What comes as any other dtype, without dimensions and without values too, beside float32."""
    x = 10 * rng.normal(5, 7)
    dtypes = [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.bool]
    dtypes += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
    found = {"float32": rounded(answer, x)}
    for dtype in dtypes:
        for part in (x, x[0, 0], x[:0]):
            found[f"{dtype} {list(part.shape)}"] = raised(answer, part.to(dtype))
    return found


# ------------------------------------------------------------------------------------------- mistakes, alternatives


def written(x, *, mantissa=3, least=-6, top=448.0, to_integer=torch.round):
    """A right answer with its numbers as arguments."""
    if x.dtype != torch.float32:
        raise ValueError("dtype")
    magnitude = x.abs().clamp(max=top)
    exponent = (torch.frexp(magnitude)[1] - 1).clamp(min=least)
    step = torch.ldexp(torch.ones(()), exponent - mantissa)
    return torch.copysign(to_integer(magnitude / step) * step, x)


@mistake(
    fp8_round, "Takes 240 for the largest number: the highest exponent is given away, as IEEE formats do."
)
def ieee_maximum(x):
    return written(x, top=240.0)


@mistake(fp8_round, "Takes 480 for the largest number: its pattern is the one that means NaN.")
def nan_pattern_as_number(x):
    return written(x, top=480.0)


@mistake(
    fp8_round, "Rounds ties up in magnitude (adds a half and truncates), which is a bias away from zero."
)
def ties_away(x):
    return written(x, to_integer=lambda ratio: (ratio + 0.5).floor())


@mistake(fp8_round, "Cuts the mantissa off instead of rounding it: every value moves towards zero.")
def truncates(x):
    return written(x, to_integer=torch.floor)


@mistake(
    fp8_round, "Flushes subnormals to zero: what lies below 2^-6 = 0.0156 is lost, down to 2^-9 = 0.00195."
)
def flushes_subnormals(x):
    y = written(x)
    return torch.where(y.abs() < 2**-6, torch.copysign(torch.zeros(()), x), y)


@mistake(
    fp8_round, "Gives values below 2^-6 three bits of mantissa too, as if there were more exponents below."
)
def no_subnormals(x):
    return written(x, least=-120)


@mistake(
    fp8_round, "Overflow becomes NaN, as torch's own cast did in older versions; one outlier spoils a layer."
)
def overflow_to_nan(x):
    return torch.where(x.abs() > 464, torch.nan, written(x))


@mistake(fp8_round, "Overflow becomes infinity, which E4M3 does not have.")
def overflow_to_infinity(x):
    return torch.where(x.abs() > 464, torch.copysign(torch.tensor(torch.inf), x), written(x))


@mistake(fp8_round, "Finite values saturate, but infinity ends as infinity over infinity, which is NaN.")
def infinity_to_nan(x):
    return torch.where(x.isinf(), torch.nan, written(x))


@mistake(fp8_round, "Clamps at 448 and forgets -448.")
def clamps_one_side(x):
    return torch.where(x < 0, written(x, top=torch.finfo(torch.float32).max), written(x))


@mistake(fp8_round, "NaN becomes 0: the format has a NaN, and a model that diverged must not look healthy.")
def nan_to_zero(x):
    return written(x).nan_to_num(nan=0.0)


@mistake(fp8_round, "NaN becomes 448: a minimum that ignores NaN hides it among the saturated values.")
def nan_to_largest(x):
    return torch.where(x.isnan(), torch.copysign(torch.tensor(448.0), x), written(x))


@mistake(fp8_round, "-0.0 becomes 0.0: the sign is taken from x < 0, which does not hold for -0.0.")
def sign_by_comparison(x):
    y = written(x).abs()
    return torch.where(x < 0, -y, y)


@mistake(fp8_round, "Small negative values become 0.0 instead of -0.0, and so does -0.0.")
def zeros_without_sign(x):
    return written(x) + 0.0


@mistake(fp8_round, "Takes 8 for the bias of the exponent: the numbers end at 224 and begin at 2^-10.")
def bias_8(x):
    return written(x, least=-7, top=224.0)


@mistake(fp8_round, "Rounds to E5M2: 2 bits of mantissa, numbers up to 57,344.")
def e5m2(x):
    return written(x, mantissa=2, least=-14, top=57344.0)


@mistake(fp8_round, "Rounds to bfloat16 first: what that moves onto a tie is then rounded to the wrong side.")
def rounds_twice(x):
    y = written(x)
    return torch.where(x.isfinite(), written(x.bfloat16().float()), y)


@mistake(
    fp8_round, "Takes one distance, that of the largest value, for the whole tensor: integers, not floats."
)
def one_distance(x):
    y = written(x)
    finite = x.abs().clamp(max=448.0).nan_to_num(nan=0.0)
    largest = finite.amax() if x.numel() else torch.ones(())
    step = torch.ldexp(torch.ones(()), torch.frexp(largest)[1] - 4)
    return torch.where(x.isnan(), y, torch.copysign((finite / step).round() * step, x))


@mistake(fp8_round, "Calls the library's cast.")
def library_cast(x):
    if x.dtype != torch.float32:
        raise ValueError("dtype")
    return x.to(torch.float8_e4m3fn).float()


@mistake(fp8_round, "Accepts any dtype and converts it, so float64 is rounded twice without a word.")
def any_dtype(x):
    return written(x.float())


@mistake(fp8_round, "Clamps x itself in place; the caller's tensor is changed.")
def clamps_in_place(x):
    y = written(x)
    if x.is_floating_point():
        x.clamp_(-448.0, 448.0)
    return y


@mistake(fp8_round, "Flattens with view, which a transposed tensor refuses.")
def views_flat(x):
    return written(x).view(-1).view(x.shape) if x.view(-1).numel() else written(x)


@alternative(fp8_round, "Rounds the bits of the float32 as integers, and subnormals by adding 2^14")
def by_bits(x):
    if x.dtype != torch.float32:
        raise ValueError("dtype")
    bits = x.abs().view(torch.int32)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) & ~0xFFFFF).view(torch.float32)
    small = (x.abs() + 2.0**14) - 2.0**14  # float32 values next to 2^14 are 2^-9 apart
    y = torch.where(x.abs() < 2**-6, small, normal).clamp(max=448.0)
    return torch.where(x.isnan(), x, torch.copysign(y, x))


@alternative(
    fp8_round, "Looks the value up among the middles of 127 numbers; a tie's middle is moved to its odd side"
)
def by_table(x):
    if x.dtype != torch.float32:
        raise ValueError("dtype")
    table = numbers()
    middle = (table[1:] + table[:-1]) / 2
    middle[1::2] = torch.nextafter(middle[1::2], torch.zeros(()))
    y = table[torch.bucketize(x.abs().contiguous(), middle)]
    return torch.where(x.isnan(), x, torch.copysign(y, x))


@alternative(fp8_round, "Takes the exponent from log2, whose errors next to a power of two do no harm")
def by_logarithm(x):
    if x.dtype != torch.float32:
        raise ValueError("dtype")
    y = x.clamp(-448.0, 448.0)
    step = torch.exp2(y.abs().clamp(min=2**-6).log2().floor() - 3)
    return torch.copysign(torch.round(y / step) * step, x)


@alternative(fp8_round, "Tries all 253 numbers and takes the nearest, of two equally near the even one")
def by_distance(x):
    if x.dtype != torch.float32:
        raise ValueError("dtype")
    table = numbers().double()
    order = torch.tensor(
        [*range(0, 127, 2), *range(1, 127, 2)]
    )  # argmin takes the first of equals: even ones
    flat = x.abs().clamp(max=448.0).double().reshape(-1)
    parts = [(part[:, None] - table[order]).abs().argmin(dim=1) for part in flat.split(4096)]
    y = table[order[torch.cat(parts)]].float().reshape(x.shape)
    return torch.where(x.isnan(), x, torch.copysign(y, x))
