"""MXFP4 and NVFP4: 4-bit floating point with a scale of one byte for each block of neighbours."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised


@exercise(
    points=4,
    minutes=25,
    extension=True,
    forbid=("ml_dtypes.float4_e2m1fn",) if find_spec("ml_dtypes") else (),  # comes with onnx
    hints=(
        "Codes 0 to 7 are in the order of their values, so a code is a place on the grid: two for each power of two "
        "that was passed, and the rounded rest. Saturate before you round.",
        "log2 in float32 is a whole number just below a power of two as well; frexp is exact, but its mantissa begins "
        "at a half, and of 0 it has the exponent 0. NVFP4 divides by the scale that is stored, after its rounding.",
    ),
)
def block_scaled_fp4(x: Tensor, *, form: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in 4 bits a value and a scale for each block: as MXFP4 or as NVFP4; about 20
    lines.

    x [..., K] float32 -> (packed uint8 [..., K/2], scales uint8 [..., K/block], tensor
    scale). Blocks are runs of 32 (form="mxfp4") or 16 ("nvfp4") values along the last
    dimension. x may have any strides and is not changed; it may require grad, the
    results do not.

    A value is stored as the code of x / divisor. Codes 0 to 7 mean 0, 0.5, 1, 1.5, 2,
    3, 4, 6 (E2M1); 8 more is the sign. To nearest, ties to the even code; what lies
    beyond 6 becomes 6. The sign is kept, also of what becomes 0: -0.0 and small
    negative values have code 8. The code of an even index is in the low half of its
    byte.

    "mxfp4" (OCP MX 1.0): divisor = 2^e with e = floor(log2(largest magnitude in the
    block)) - 2, exactly, and at least -127. The scale byte is e + 127. A block of zeros
    has byte 0. The tensor scale is None: there is none.

    "nvfp4": the tensor scale is float32 without dimensions, the largest magnitude in x
    over 448 * 6, and 1 where that is 0 (no x given has a subnormal one). A block's
    scale is its largest magnitude / 6 / tensor scale, rounded to E4M3 (to nearest, ties
    to even); the byte is its pattern, as of torch.float8_e4m3fn, which may be used.
    divisor = tensor scale * scale as stored. In a block whose divisor is 0 every code
    is 0. All in float32.

    ValueError: for another form, for no values at all, for a K that blocks do not
    divide (zeros behind it would have to be stored somewhere), for NaN or infinity.

    Results hold 17 bytes for 32 values, or 9 for 16 and 4 for the tensor; no tensor on
    the way has more than 8 bytes for each value of x.
    """
    ### BEGIN SOLUTION
    if form not in ("mxfp4", "nvfp4"):
        raise ValueError(f"form is {form!r}; expected mxfp4 or nvfp4")
    block = 32 if form == "mxfp4" else 16
    if x.numel() == 0 or x.dim() == 0 or x.shape[-1] % block:
        raise ValueError(f"x is {list(x.shape)}; expected blocks of {block} along its last dimension")
    if not x.isfinite().all():
        raise ValueError("x holds NaN or infinity, which E2M1 has no code for")
    blocks = x.detach().unflatten(-1, (-1, block))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    tensor_scale = None
    if form == "mxfp4":
        exponent = torch.frexp(largest.clamp(min=2**-125)).exponent - 1 - 2
        scales = (exponent + 127).to(torch.uint8)
        ratio = torch.ldexp(blocks, -exponent)
    else:
        tensor_scale = largest.amax() / (448 * 6)
        tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1.0)
        scale = (largest / 6 / tensor_scale).to(torch.float8_e4m3fn)
        scales = scale.view(torch.uint8)
        divisor = tensor_scale * scale.float()
        ratio = torch.where(divisor > 0, blocks / divisor, 0.0)
    magnitude = ratio.abs().clamp(max=6.0)
    octave = (torch.frexp(magnitude).exponent - 1).clamp(min=0)
    steps = torch.ldexp(magnitude, 1 - octave).round()
    code = (2 * octave + steps + 8 * torch.signbit(ratio)).to(torch.uint8).flatten(-2)
    return code[..., ::2] | code[..., 1::2] << 4, scales.squeeze(-1), tensor_scale
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FORMS = {"mxfp4": 32, "nvfp4": 16}


def channels(rng, rows, count, block):
    """Blocks of normal values [rows, count * block], every block of its own magnitude."""
    magnitude = torch.exp2(rng.uniform(-6, 6, rows, count, 1))
    return (rng.normal(rows, count, block) * magnitude).flatten(1)


def with_even_scale(rng, x):
    """x scaled so that NVFP4's tensor scale is a power of two: the order of the divisions makes no difference."""
    x = x / x.abs().amax() * 2000
    x[0, 0] = rng.choice([-2688.0, 2688.0])
    return x * 2.0 ** rng.integer(-12, 3)


@case(block_scaled_fp4)
def mx_blocks(answer, rng):
    """MXFP4 of blocks of different magnitudes, with a loud value in some."""
    x = channels(rng, rng.integer(3, 5), 4, 32)
    x[1, rng.integer(0, 31)] *= 100
    return answer(x, form="mxfp4")


@case(block_scaled_fp4)
def mx_ties(answer, rng):
    """MXFP4 of values half way between two codes, next to these, and beyond 6 times the scale."""
    middle = torch.tensor(MIDDLES)
    near = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, torch.inf)]
    values = torch.cat(
        [middle, *near, torch.tensor([6.0, 6.5, 7.0, 7.75, 0.0, 1.0, 2.0, 3.0, 0.1, 4.0, 4.5])]
    )
    rows = []
    for _ in range(4):
        order = torch.randperm(32, generator=rng.generator)
        rows.append(values[order] * 2.0 ** rng.integer(-20, 20) * (2 * rng.integers(0, 1, 32) - 1))
    return answer(torch.stack(rows), form="mxfp4")


@case(block_scaled_fp4)
def mx_near_powers_of_two(answer, rng):
    """MXFP4 of blocks whose largest magnitude is a power of two, or the value just below or above one."""
    power = 2.0 ** rng.integers(-10, 10, 3, 1)
    exact = power.float()
    largest = torch.cat([exact, exact.nextafter(torch.zeros(())), exact.nextafter(torch.tensor(torch.inf))])
    x = rng.uniform(-0.9, 0.9, 9, 32) * largest
    x[:, rng.integer(0, 31)] = (largest * rng.choice([-1.0, 1.0]))[:, 0]
    return answer(x, form="mxfp4")


@case(block_scaled_fp4)
def mx_ends_of_the_range(answer, rng):
    """MXFP4 of zeros of both signs, of the smallest and the largest values of float32, and of ordinary ones."""
    x = rng.normal(8, 32)
    x[0] = torch.copysign(torch.zeros(32), x[0])
    scales = [1e-42, 2.0**-126, 2.0**-124, 2.0**-122, 1e37]
    for row, scale in enumerate(scales, 1):
        x[row] = x[row].clamp(-3, 3) / x[row].abs().amax() * 1.5 * scale
    x[6, 1:] = torch.copysign(torch.full((31,), 1e-30), x[6, 1:])
    return answer(x, form="mxfp4")


@case(block_scaled_fp4)
def nv_blocks(answer, rng):
    """NVFP4 of blocks of different magnitudes."""
    return answer(with_even_scale(rng, channels(rng, rng.integer(3, 5), 8, 16)), form="nvfp4")


@case(block_scaled_fp4)
def nv_any_scale(answer, rng):
    """NVFP4 of a small matrix of normal values, which requires grad; very small; very large and positive."""
    x = rng.normal(2, 96)
    loud = x.abs() * 2.0**124
    found = answer((x * rng.uniform(0.01, 3)).requires_grad_(), form="nvfp4")
    return {
        "normal": found,
        "require grad": [part.requires_grad for part in found],
        "small": answer(x * 2.0**-108, form="nvfp4"),
        **{f"large, {form}": answer(loud, form=form) for form in FORMS},
    }


@case(block_scaled_fp4)
def nv_quiet_blocks(answer, rng):
    """NVFP4 of blocks far below the loudest, of one whose scale is a subnormal, of zeros; and of zeros alone."""
    x = with_even_scale(rng, rng.normal(1, 96))
    quiet = torch.tensor([1.0, 1e-3, 2e-5, 4e-6, 1e-7, 0.0])
    x = (x.reshape(6, 16) / x.reshape(6, 16).abs().amax(dim=1, keepdim=True)) * quiet[:, None] * 2688
    zeros = torch.copysign(torch.zeros(2, 32), rng.normal(2, 32))
    return {"quiet": answer(x.reshape(2, 48), form="nvfp4"), "zeros": answer(zeros, form="nvfp4")}


@case(block_scaled_fp4)
def other_shapes_and_strides(answer, rng):
    """A vector, one block, a batch, four dimensions, a transposed view, every other column, in both forms."""
    x = with_even_scale(rng, channels(rng, 64, 4, 16))
    views = {"vector": x[0], "batch": x.reshape(4, 2, 8, 64), "transposed": x.T, "every other": x[:8, ::2]}
    views |= {"four dimensions": x[:8].reshape(2, 2, 2, 64), "blocks of one": x[:8, :32].reshape(2, 4, 32)}
    found = {f"{name}, {form}": answer(view, form=form) for name, view in views.items() for form in FORMS}
    return found | {f"one block, {form}": answer(x[0, :block], form=form) for form, block in FORMS.items()}


@case(block_scaled_fp4)
def refused(answer, rng):
    """Other forms, remainders, no values, NaN and infinity, beside a matrix that is as it should be."""
    x = rng.normal(4, 32)
    broken = {}
    for value in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        for place in (0, 50, 77, 126):
            bad = x.clone()
            bad.view(-1)[place : place + len(value)] = torch.tensor(value)
            broken[f"{value} at {place}"] = bad
    found = {"right": answer(x, form="mxfp4")}
    for form, block in FORMS.items():
        narrow = rng.normal(2, block + block // 2)
        for name, part in {
            **broken,
            "remainder": narrow,
            "none": x[:0],
            "no K": x[:, :0],
            "one": x[0, 0],
        }.items():
            found[f"{name}, {form}"] = raised(answer, part, form=form)
    return found | {"other form": raised(answer, x, form=rng.choice(["mxfp8", "fp4", "MXFP4", ""]))}


@cost(block_scaled_fp4, share=1 / 6)
def bytes_held(answer, rng):
    """Bytes of the results, and of the largest tensor on the way."""
    x = rng.normal(16, 256)
    found = {}
    for form in FORMS:
        with TensorWork() as work:
            result = answer(x, form=form)
        stored = sum(part.untyped_storage().nbytes() for part in result if part is not None)
        found[f"{form}, stored bytes"] = stored
        found[f"{form}, largest tensor, bytes"] = (work.largest_tensor_bytes, 8 * x.numel())
    return found


# ------------------------------------------------------------------------------------------- mistakes, alternatives


def nearest(ratio):
    """Codes of ratio, whose signs are kept, int64: by the middles between neighbours, each moved off its even side."""
    middle = torch.tensor(MIDDLES)
    middle[1::2] = middle[1::2].nextafter(torch.zeros(()))
    return torch.bucketize(ratio.abs(), middle) + 8 * torch.signbit(ratio)


def pairs(codes):
    """Two codes a byte, the even index in the low half."""
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def check(x, form):
    if form not in FORMS or x.dim() == 0 or x.numel() == 0 or x.shape[-1] % FORMS[form]:
        raise ValueError("form or shape")
    if not bool(x.isfinite().all()):
        raise ValueError("not finite")


def floor_exponent(largest):
    return torch.frexp(largest.double().clamp(min=2.0**-140))[1] - 3


def to_e4m3(scale):
    return scale.to(torch.float8_e4m3fn)


def written(
    x,
    form,
    *,
    check=check,
    codes=nearest,
    pack=pairs,
    exponent=floor_exponent,
    least=-127,
    stored_byte=lambda e: (e + 127).to(torch.uint8),
    amax=lambda blocks: blocks.abs().amax(dim=-1, keepdim=True),
    tensor_range=448 * 6,
    when_zero=1.0,
    block_scale=lambda largest, tensor_scale: largest / 6 / tensor_scale,
    rounded_scale=to_e4m3,
    nv_divisor=lambda tensor_scale, stored, wanted: tensor_scale * stored.float(),
    nv_ratio=lambda blocks, divisor: torch.where(divisor > 0, blocks / divisor, 0.0),
):
    """A right answer in steps; a mistake replaces some of them."""
    check(x, form)
    x = x.detach()
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // FORMS[form], FORMS[form])
    largest = amax(blocks)
    if form == "mxfp4":
        e = exponent(largest)
        e = e if least is None else e.clamp(min=least)
        packed = pack(codes(torch.ldexp(blocks.double(), -e).float()).flatten(-2))
        return packed, stored_byte(e).squeeze(-1), None
    tensor_scale = largest.amax() / tensor_range
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, when_zero)
    wanted = block_scale(largest, tensor_scale)
    stored = rounded_scale(wanted)
    ratio = nv_ratio(blocks, nv_divisor(tensor_scale, stored, wanted))
    return pack(codes(ratio).flatten(-2)), stored.view(torch.uint8).squeeze(-1), tensor_scale


@mistake(block_scaled_fp4, "Without saturation: what rounds beyond 6 gets code 8, which reads as -0.")
def six_overflows(x, *, form):
    def codes(ratio):
        over = ratio.abs() >= 7
        return torch.where(over, 8 + 8 * torch.signbit(ratio), nearest(ratio)) & 15

    return written(x, form, codes=codes)


@mistake(block_scaled_fp4, "Rounds ties away from zero: 2.5 becomes 3 and 5 becomes 6, always outwards.")
def ties_away(x, *, form):
    def codes(ratio):
        return torch.bucketize(ratio.abs(), torch.tensor(MIDDLES), right=True) + 8 * torch.signbit(ratio)

    return written(x, form, codes=codes)


@mistake(block_scaled_fp4, "Takes the next lower code instead of the nearest.")
def truncates(x, *, form):
    def codes(ratio):
        grid = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        return torch.bucketize(ratio.abs(), grid, right=True) + 8 * torch.signbit(ratio)

    return written(x, form, codes=codes)


@mistake(block_scaled_fp4, "Leaves 0.5, the only subnormal of E2M1, out.")
def no_subnormal(x, *, form):
    def codes(ratio):
        code = nearest(ratio)
        return torch.where(ratio.abs() < 1, 2 * (ratio.abs() > 0.5) + 8 * torch.signbit(ratio), code)

    return written(x, form, codes=codes)


@mistake(block_scaled_fp4, "Stores integers from -7 to 7: the codes are taken for evenly spaced values.")
def integers_for_codes(x, *, form):
    def codes(ratio):
        return ratio.abs().round().clamp(max=7).to(torch.int64) + 8 * torch.signbit(ratio)

    return written(x, form, codes=codes)


@mistake(block_scaled_fp4, "Writes negative values in two's complement; E2M1 has a sign bit.")
def twos_complement(x, *, form):
    def codes(ratio):
        code = nearest(ratio)
        return torch.where(code >= 8, 16 - (code - 8), code) & 15

    return written(x, form, codes=codes)


@mistake(block_scaled_fp4, "Loses the sign of what becomes 0: -0.0 and small negatives get code 0.")
def zero_without_sign(x, *, form):
    return written(x, form, codes=lambda ratio: nearest(ratio) * (nearest(ratio) != 8))


@mistake(block_scaled_fp4, "Puts the even index into the high half of the byte.")
def halves_swapped(x, *, form):
    def pack(codes):
        codes = codes.to(torch.uint8)
        return (codes[..., ::2] << 4) | codes[..., 1::2]

    return written(x, form, pack=pack)


@mistake(block_scaled_fp4, "Packs the first half of the row with its second half, not neighbours.")
def halves_of_the_row(x, *, form):
    def pack(codes):
        low, high = codes.to(torch.uint8).chunk(2, dim=-1)
        return low | (high << 4)

    return written(x, form, pack=pack)


@mistake(
    block_scaled_fp4,
    "Forgets that E2M1 reaches 2^2: with e = floor(log2(max)) the codes of 3, 4 and 6 go unused.",
)
def exponent_of_the_format_forgotten(x, *, form):
    return written(x, form, exponent=lambda largest: floor_exponent(largest) + 2)


@mistake(
    block_scaled_fp4, "Rounds log2(max / 6) up, so that nothing saturates; OCP's rule rounds log2(max) down."
)
def rounds_up_for_six(x, *, form):
    def exponent(largest):
        return (largest.double().clamp(min=2.0**-140) / 6).log2().ceil().to(torch.int32)

    return written(x, form, exponent=exponent)


@mistake(
    block_scaled_fp4,
    "Rounds log2(max) to the nearest: where that is up, the whole block is stored twice as coarsely.",
)
def nearest_power_of_two(x, *, form):
    def exponent(largest):
        return largest.double().clamp(min=2.0**-140).log2().round().to(torch.int32) - 2

    return written(x, form, exponent=exponent)


@mistake(
    block_scaled_fp4,
    "Takes log2 in float32, which rounds up to a whole number just below a power of two: a scale twice too large.",
)
def rounded_logarithm(x, *, form):
    def exponent(largest):
        return largest.clamp(min=2.0**-126).log2().floor().to(torch.int32) - 2

    return written(x, form, exponent=exponent)


@mistake(block_scaled_fp4, "One scale for the whole row: an outlier anywhere silences all of it.")
def scale_of_the_row(x, *, form):
    def amax(blocks):
        return blocks.abs().amax(dim=(-2, -1), keepdim=True).expand(*blocks.shape[:-1], 1)

    return written(x, form, amax=amax)


@mistake(block_scaled_fp4, "Takes the largest value, not the largest magnitude: negative blocks saturate.")
def signed_maximum(x, *, form):
    def amax(blocks):
        return blocks.amax(dim=-1, keepdim=True).clamp(min=0.0)

    return written(x, form, amax=amax)


@mistake(block_scaled_fp4, "Stores e as a signed byte, without adding 127.")
def exponent_without_bias(x, *, form):
    return written(x, form, stored_byte=lambda e: e.to(torch.int8).view(torch.uint8))


@mistake(
    block_scaled_fp4, "Adds 128 to the exponent, the middle of a byte: every value reads as twice itself."
)
def bias_128(x, *, form):
    return written(x, form, stored_byte=lambda e: (e + 128).to(torch.uint8))


@mistake(
    block_scaled_fp4,
    "Lets exponents below -127 wrap around: the byte of a tiny block means a huge scale, or NaN.",
)
def exponent_wraps(x, *, form):
    return written(x, form, least=None, stored_byte=lambda e: ((e + 127) % 256).to(torch.uint8))


@mistake(
    block_scaled_fp4, "Gives a block of zeros the scale 1; the format's rule, and other readers, have byte 0."
)
def zeros_with_scale_1(x, *, form):
    def exponent(largest):
        return torch.where(largest > 0, floor_exponent(largest), 0)

    return written(x, form, exponent=exponent)


@mistake(block_scaled_fp4, "Stores the scales as float16: 2 bytes a block, and MXFP4's range is lost.")
def scales_in_float16(x, *, form):
    packed, scales, tensor_scale = written(x, form)
    if form == "mxfp4":
        return packed, torch.exp2(scales.float() - 127).half(), None
    return packed, scales.view(torch.float8_e4m3fn).half(), tensor_scale


@mistake(block_scaled_fp4, "Keeps one code a byte: 8 bits for every value.")
def codes_unpacked(x, *, form):
    return written(x, form, pack=lambda codes: codes.to(torch.uint8))


@mistake(
    block_scaled_fp4,
    "NVFP4's codes are made with the scale before its rounding; a reader has the rounded one.",
)
def divides_by_the_unrounded_scale(x, *, form):
    return written(
        x, form, nv_divisor=lambda tensor_scale, stored, wanted: tensor_scale * wanted * (stored.float() > 0)
    )


@mistake(block_scaled_fp4, "NVFP4 with a power of two for the block's scale, as if it were MXFP4's.")
def nv_power_of_two(x, *, form):
    def rounded_scale(scale):
        power = torch.exp2(torch.frexp(scale.double().clamp(min=2.0**-60))[1].double() - 1)
        return (power * (scale > 0)).to(torch.float8_e4m3fn)

    return written(x, form, rounded_scale=rounded_scale)


@mistake(block_scaled_fp4, "NVFP4 without the tensor's scale: small tensors fall among E4M3's subnormals.")
def nv_without_tensor_scale(x, *, form):
    steps = {
        "block_scale": lambda largest, tensor_scale: largest / 6,
        "nv_divisor": lambda tensor_scale, stored, wanted: stored.float(),
    }
    packed, scales, tensor_scale = written(x, form, **steps)
    return packed, scales, None if tensor_scale is None else torch.ones(())


@mistake(block_scaled_fp4, "NVFP4's tensor scale is max / 448: the blocks' scales then reach 75 only.")
def nv_range_448(x, *, form):
    return written(x, form, tensor_range=448.0)


@mistake(
    block_scaled_fp4,
    "NVFP4's tensor scale is max / 6: the blocks' scales are at most 1, half of E4M3 unused.",
)
def nv_range_6(x, *, form):
    return written(x, form, tensor_range=6.0)


@mistake(block_scaled_fp4, "NVFP4's tensor of zeros gets the scale 0, and 0 / 0 follows.")
def nv_zero_tensor_scale(x, *, form):
    def block_scale(largest, tensor_scale):
        return (largest / 6 / tensor_scale).nan_to_num(nan=0.0)

    return written(x, form, when_zero=0.0, block_scale=block_scale)


@mistake(block_scaled_fp4, "NVFP4's quiet blocks are divided by 0, and every value of theirs becomes 6.")
def nv_divides_by_zero(x, *, form):
    return written(
        x, form, nv_ratio=lambda blocks, divisor: (blocks / divisor).nan_to_num(nan=0.0, posinf=9, neginf=-9)
    )


@mistake(
    block_scaled_fp4, "NVFP4's scales are kept at 2^-6 and above: E4M3's subnormals, down to 2^-9, go unused."
)
def nv_normal_scales_only(x, *, form):
    return written(x, form, rounded_scale=lambda scale: to_e4m3(scale.clamp(min=2**-6)))


@mistake(
    block_scaled_fp4,
    "NVFP4's tensor scale is held above 1e-12: small tensors fall to E4M3's subnormals and 0.",
)
def nv_scale_above_a_floor(x, *, form):
    held = {
        "block_scale": lambda largest, tensor_scale: largest / 6 / tensor_scale.clamp(min=1e-12),
        "nv_divisor": lambda tensor_scale, stored, wanted: tensor_scale.clamp(min=1e-12) * stored.float(),
    }
    packed, scales, tensor_scale = written(x, form, **held)
    return packed, scales, tensor_scale if tensor_scale is None else tensor_scale.clamp(min=1e-12)


@mistake(block_scaled_fp4, "Returns a tensor scale that requires grad where x does, with its graph.")
def graph_kept(x, *, form):
    packed, scales, tensor_scale = written(x, form)
    return packed, scales, tensor_scale if tensor_scale is None else tensor_scale + 0 * x.reshape(-1)[0]


@mistake(block_scaled_fp4, "Finds NaN and infinity by the sum, which large finite values make infinite too.")
def finite_by_the_sum(x, *, form):
    if not x.sum().isfinite():
        raise ValueError("not finite")
    return written(x, form)


@mistake(block_scaled_fp4, "Blocks of 32 in both forms.")
def always_32(x, *, form):
    check(x, form)
    if form == "mxfp4":
        return written(x, form)
    if x.shape[-1] % 32:
        raise ValueError("remainder")
    found = written(
        x,
        form,
        amax=lambda blocks: (
            blocks.abs().unflatten(-2, (-1, 2)).amax(dim=(-2, -1)).repeat_interleave(2, -1)[..., None]
        ),
    )
    return found[0], found[1][..., ::2].contiguous(), found[2]


@mistake(block_scaled_fp4, "NaN and infinity are stored as if they were numbers.")
def anything_finite(x, *, form):
    def shape_only(x, form):
        if form not in FORMS or x.dim() == 0 or x.numel() == 0 or x.shape[-1] % FORMS[form]:
            raise ValueError("form or shape")

    return written(
        x if form not in FORMS or x.isfinite().all() else x.nan_to_num(0.0), form, check=shape_only
    )


@mistake(block_scaled_fp4, "Drops the values behind the last whole block.")
def drops_the_remainder(x, *, form):
    if form in FORMS and x.dim() and x.shape[-1] > FORMS[form]:
        x = x[..., : x.shape[-1] // FORMS[form] * FORMS[form]]
    return written(x, form)


@mistake(block_scaled_fp4, "Any other form is taken for NVFP4.")
def other_forms_accepted(x, *, form):
    return written(x, form if form == "mxfp4" else "nvfp4")


@mistake(block_scaled_fp4, "Takes x for a matrix: vectors and batches raise.")
def matrices_only(x, *, form):
    check(x, form)
    rows, _ = x.shape
    return written(x, form)


@alternative(block_scaled_fp4, "Looks codes up among the middles of the grid, exponents in float64")
def by_middles(x, *, form):
    return written(x, form)


@alternative(
    block_scaled_fp4, "Compares with every value of the grid; many times the memory", meets_costs=False
)
def by_distance(x, *, form):
    def codes(ratio):
        grid = torch.tensor(
            [0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0], dtype=torch.float64
        )  # argmin takes the first
        code = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        distance = (ratio.abs().double()[..., None] - grid).abs()
        return code[distance.argmin(dim=-1)] + 8 * torch.signbit(ratio)

    return written(x, form, codes=codes)


@alternative(block_scaled_fp4, "Reads exponents and rounds mantissas in the bits of the float32")
def by_bits(x, *, form):
    def codes(ratio):
        magnitude = ratio.abs().clamp(max=6.0)
        bits = magnitude.view(torch.int32)
        normal = (bits + 0x1FFFFF + (bits >> 22 & 1) >> 22) - 252
        return torch.where(
            magnitude < 1, (2 * magnitude).round().to(torch.int32), normal
        ) + 8 * torch.signbit(ratio)

    def exponent(largest):
        return (largest.contiguous().view(torch.int32) >> 23) - 127 - 2

    return written(x, form, codes=codes, exponent=exponent)
