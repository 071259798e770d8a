"""Two 4-bit codes to a byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmcourse.counting import TensorWork
from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake, raised


@exercise(
    points=2,
    minutes=5,
    hints=(
        "The low four bits of a code's byte are the code in four bits already, sign and all; what is above them has to "
        "go before two codes can share a byte.",
        "A uint8 view of the codes costs nothing, and & 15, << 4 and | stay in bytes. What you return must not be a "
        "part of something larger, or the larger thing stays in memory.",
    ),
)
def pack_int4(codes: Tensor) -> Tensor:
    """Signed 4-bit codes, two to a byte; about 8 lines.

    codes [N, K] int8 with values -8 .. 7, any strides -> uint8 [N, ceil(K / 2)]. A code
    is stored in 4 bits, two's complement. Byte j of a row holds column 2j in its low
    four bits and column 2j + 1 in its high four. A row of odd length ends with a byte
    whose high bits are 0; no byte holds codes of two rows.

    ValueError, with what came: codes that are not int8, do not have two dimensions,
    have no values, or have one outside -8 .. 7.

    Costs (a sixth of the points): the result's memory (its storage) is exactly N *
    ceil(K / 2) bytes, and no tensor made on the way is larger than two such results.
    """
    ### BEGIN SOLUTION
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(
            f"codes are {codes.dtype} {list(codes.shape)}; expected torch.int8 [N, K] with values"
        )
    least, largest = codes.aminmax()
    if least < -8 or largest > 7:
        raise ValueError(f"codes go from {least} to {largest}; 4 bits hold -8 to 7")
    even = functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8)
    return even[:, ::2] & 15 | even[:, 1::2] << 4
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def drawn(rng: Rng, rows: int, columns: int) -> Tensor:
    """Codes of all 16 values, where there is room for them."""
    codes = rng.integers(-8, 7, rows * columns, dtype=torch.int8)
    sixteen = torch.tensor(rng.shuffled(range(-8, 8)), dtype=torch.int8)
    codes[:16] = sixteen[: rows * columns]
    return codes.view(rows, columns)


@case(pack_int4)
def every_byte(answer, rng):
    """All 256 pairs of codes."""
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    mixed = pairs[torch.tensor(rng.shuffled(range(256)))]
    return {"one pair a row": answer(mixed), "in rows": answer(mixed.reshape(16, 32))}


@case(pack_int4)
def rows_and_columns(answer, rng):
    """Matrices that are not square, with even rows."""
    shapes = [(1, 2), (2, 2), (rng.integer(3, 9), 2 * rng.integer(1, 9)), (rng.integer(20, 30), 8)]
    return [answer(drawn(rng, *shape)) for shape in shapes]


@case(pack_int4)
def odd_rows(answer, rng):
    """Rows of odd length, in even and odd number, and of a single code."""
    odd = 2 * rng.integer(1, 8) + 1
    shapes = [(4, odd), (5, odd), (1, odd), (rng.integer(2, 9), 1), (1, 1)]
    return [answer(drawn(rng, *shape)) for shape in shapes]


@case(pack_int4)
def views(answer, rng):
    """A transposed matrix, and every other row and column of one."""
    rows, columns = rng.integer(3, 8), rng.integer(5, 11)
    codes = drawn(rng, rows, columns)
    wide = drawn(rng, 3 * rows, 2 * columns)
    return {
        "transposed": answer(codes.T),
        "transposed square": answer(drawn(rng, 6, 6).T),
        "every other": answer(wide[::3, 1::2]),
        "one row, repeated": answer(codes[:1].expand(4, -1)),
        "among other numbers": answer(surrounded(codes)),
    }


def surrounded(codes):
    """The codes as a view of something larger, whose other values are none."""
    around = torch.full((3 * codes.shape[0], 3 * codes.shape[1]), 100, dtype=torch.int8)
    view = around[1::3, 1::3]
    view.copy_(codes)
    return view


@case(pack_int4)
def refusals(answer, rng):
    """One code that 4 bits do not hold, wherever it is; other dtypes and dimensions; beside codes as they should be."""
    rows, found = rng.integer(20, 30), {}
    for columns in (32, 33):
        codes = drawn(rng, rows, columns)
        found[f"{columns} columns"] = answer(codes)
        places = {"first": 0, "within": rng.integer(1, codes.numel() - 2), "last": codes.numel() - 1}
        places |= {"first row's last": columns - 1, "last row's first": codes.numel() - columns}
        for where, place in places.items():
            for value in (-128, -9, 8, 15, 127):
                wrong = codes.clone()
                wrong.view(-1)[place] = value
                found[f"{columns} columns, {value} as the {where}"] = raised(answer, wrong)
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, *floats):
        found[str(dtype)] = raised(answer, codes.clamp_min(0).to(dtype))
    for shape in ((0, 4), (3, 0), (0, 0), (), (8,), (2, 2, 4), (2, 3, 2, 4), (1, 1, 1, 1, 2)):
        found[str(shape)] = raised(answer, torch.zeros(shape, dtype=torch.int8))
    return found


@cost(pack_int4, share=1 / 6)
def half_a_byte_each(answer, rng):
    """Codes of 32 x 64, 32 x 63 and transposed: the memory of the result, and the largest tensor made."""
    given = {
        "64 columns": drawn(rng, 32, 64),
        "63 columns": drawn(rng, 32, 63),
        "transposed": drawn(rng, 64, 32).T,
    }
    observed, counted = {}, {}
    for name, codes in given.items():
        with TensorWork() as work:
            packed = observed[name] = answer(codes)
        result_bytes = codes.shape[0] * -(-codes.shape[1] // 2)
        counted[f"memory of the result, bytes, {name}"] = packed.untyped_storage().nbytes(), result_bytes
        counted[f"largest tensor, bytes, {name}"] = work.largest_tensor_bytes, 2 * result_bytes
    return {"observed": observed, **counted}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Packing:
    """A right answer in small steps; a mistake replaces one of them."""

    def check_kind(self, codes: Tensor) -> None:
        if codes.dtype is not torch.int8:
            raise ValueError("dtype")

    def check_shape(self, codes: Tensor) -> None:
        if codes.ndim != 2 or not all(codes.shape):
            raise ValueError("shape")

    def check_values(self, codes: Tensor) -> None:
        if ((codes + 8) & -16).any():
            raise ValueError("values")

    def even(self, codes: Tensor) -> Tensor:
        if codes.shape[1] % 2:
            return torch.cat([codes, codes.new_zeros(len(codes), 1)], 1)
        return codes

    def nibbles(self, codes: Tensor) -> Tensor:
        return codes.to(torch.uint8) % 16

    def pairs(self, nibbles: Tensor) -> tuple[Tensor, Tensor]:
        low, high = nibbles.reshape(len(nibbles), -1, 2).unbind(2)
        return low, high

    def joined(self, low: Tensor, high: Tensor) -> Tensor:
        return low + 16 * high

    def pack(self, codes: Tensor) -> Tensor:
        self.check_kind(codes)
        self.check_shape(codes)
        self.check_values(codes)
        return self.joined(*self.pairs(self.nibbles(self.even(codes))))


def variant(**steps: Any) -> Callable[[Tensor], Tensor]:
    """An answer with some steps replaced."""
    return type("Variant", (Packing,), steps)().pack


@mistake(pack_int4, "Puts the even column into the high four bits.")
def nibbles_swapped(codes):
    return variant(joined=lambda self, low, high: low << 4 | high)(codes)


@mistake(
    pack_int4, "Joins the bytes of negative codes unmasked: their ones above bit 3 run over the neighbour."
)
def sign_not_masked(codes):
    def joined(self, low, high):
        return low | high << 4

    return variant(nibbles=lambda self, codes: codes.to(torch.uint8), joined=joined)(codes)


@mistake(pack_int4, "Stores code + 8, the codes 0 .. 15 of formats with an offset, not two's complement.")
def offset_by_eight(codes):
    return variant(nibbles=lambda self, codes: (codes + 8).to(torch.uint8))(codes)


@mistake(
    pack_int4,
    "Stores code + 8, as formats with an offset do, and 0 behind an odd row, which stands for -8 there.",
)
def offset_and_padding(codes):
    def even(self, codes):
        codes = (codes + 8).to(torch.uint8)
        return torch.cat([codes, codes.new_zeros(len(codes), 1)], 1) if codes.shape[1] % 2 else codes

    return variant(even=even, nibbles=lambda self, codes: codes)(codes)


@mistake(pack_int4, "Stores the sign in bit 3 and the magnitude below it: -8 becomes 0.")
def sign_and_magnitude(codes):
    def nibbles(self, codes):
        return (codes.abs() & 7 | (codes < 0) * 8).to(torch.uint8)

    return variant(nibbles=nibbles)(codes)


@mistake(pack_int4, "Drops the last code of an odd row.")
def last_code_dropped(codes):
    return variant(even=lambda self, codes: codes[:, : codes.shape[1] // 2 * 2])(codes)


@mistake(pack_int4, "Repeats the last code of an odd row in the four bits that should be 0.")
def last_code_repeated(codes):
    def even(self, codes):
        return torch.cat([codes, codes[:, -1:]], 1) if codes.shape[1] % 2 else codes

    return variant(even=even)(codes)


@mistake(pack_int4, "Pads an odd row in front: every code sits in the other half of its byte.")
def padded_in_front(codes):
    def even(self, codes):
        return torch.cat([codes.new_zeros(len(codes), 1), codes], 1) if codes.shape[1] % 2 else codes

    return variant(even=even)(codes)


@mistake(
    pack_int4,
    "Packs all codes as one run: behind an odd row the next one begins in the middle of a byte.",
)
def rows_run_together(codes):
    rows, columns = codes.shape if codes.dim() == 2 else (1, 1)

    def even(self, codes):
        flat = codes.reshape(1, -1)
        return torch.cat([flat, flat.new_zeros(1, flat.shape[1] % 2)], 1)

    packed = variant(even=even)(codes)
    width = -(-columns // 2)
    if packed.numel() < rows * width:
        packed = torch.cat([packed, packed.new_zeros(1, rows * width - packed.numel())], 1)
    return packed.reshape(rows, width)


@mistake(pack_int4, "Pairs a column with the one half a row further on, not with its neighbour.")
def halves_of_the_row(codes):
    def pairs(self, nibbles):
        return nibbles.chunk(2, dim=1)

    return variant(pairs=pairs)(codes)


@mistake(pack_int4, "Pairs rows, not columns: each byte holds codes of two outputs.")
def rows_paired(codes):
    packed = variant()(codes.T if codes.dim() == 2 else codes)
    return packed.T.contiguous()


@mistake(
    pack_int4,
    "Reads a transposed matrix in the order of its memory, as as_strided does: other codes, no error.",
)
def strides_ignored(codes):
    if codes.dim() == 2 and codes.stride(0):
        codes = codes.as_strided(codes.shape, (codes.shape[1], 1))
    return variant()(codes)


@mistake(pack_int4, "Joins two codes in an int8, so the bytes come out signed.")
def signed_bytes(codes):
    return variant()(codes).view(torch.int8)


@mistake(pack_int4, "Packs eight codes into an int32, as some kernels want them, not two into a byte.")
def words_of_eight(codes):
    packed = variant()(codes)
    missing = -packed.shape[1] % 4
    return torch.cat([packed, packed.new_zeros(len(packed), missing)], 1).view(torch.int32)


@mistake(
    pack_int4,
    "Takes the low four bits of whatever comes, or clamps it: 8 is stored as -8 or as 7, without a word.",
)
def values_unchecked(codes):
    return variant(check_values=lambda self, codes: None)(codes)


@mistake(pack_int4, "Takes 8 .. 15 as well, as if codes might be unsigned: they come back negative.")
def unsigned_accepted(codes):
    def check_values(self, codes):
        if codes.min() < -8 or codes.max() > 15:
            raise ValueError("values")

    return variant(check_values=check_values)(codes)


@mistake(pack_int4, "Refuses -8, the code that has no positive counterpart.")
def lowest_code_refused(codes):
    def check_values(self, codes):
        if codes.min() < -7 or codes.max() > 7:
            raise ValueError("values")

    return variant(check_values=check_values)(codes)


@mistake(pack_int4, "Takes codes of any dtype: a float weight that was never quantized is packed too.")
def dtype_unchecked(codes):
    return variant(
        check_kind=lambda self, codes: None, even=lambda self, c: Packing.even(self, c.to(torch.int8))
    )(codes)


@mistake(pack_int4, "Takes codes of any shape, also none.")
def shape_unchecked(codes):
    if codes.dim() == 2 and codes.numel():
        return variant()(codes)
    width = -(-codes.shape[-1] // 2)
    return torch.zeros(*codes.shape[:-1], width, dtype=torch.uint8)


@mistake(
    pack_int4,
    "Joins the codes in place and returns every other byte: a view, and the memory of all of them stays.",
)
def view_of_all_bytes(codes):
    packed = variant()(codes)
    kept = packed.new_zeros(len(packed), 2 * packed.shape[1])
    kept[:, ::2] = packed
    return kept[:, ::2]


@mistake(pack_int4, "Widens the codes to int32 to shift them: four bytes for half of one.")
def widened(codes):
    def joined(self, low, high):
        return (low.int() | high.int() << 4).to(torch.uint8)

    def nibbles(self, codes):
        return codes.int() & 15

    return variant(nibbles=nibbles, joined=joined)(codes)


@alternative(pack_int4, "Adds 16 times the second of each pair, modulo 16")
def by_arithmetic(codes):
    return Packing().pack(codes)


@alternative(
    pack_int4, "Looks the sum of both codes' places up in a table of all 256 bytes", meets_costs=False
)
def by_table(codes):
    if (
        codes.dtype != torch.int8
        or codes.dim() != 2
        or not codes.numel()
        or int((codes ^ (codes >> 7)).max()) > 7
    ):
        raise ValueError("codes")
    table = torch.tensor([[low % 16 + high % 16 * 16 for high in range(-8, 8)] for low in range(-8, 8)])
    index = functional.pad(codes.long() + 8, (0, codes.shape[1] % 2), value=8)
    return table[index[:, 0::2], index[:, 1::2]].to(torch.uint8)


@alternative(pack_int4, "Multiplies the odd columns by 16, which drops their upper bits, in int8")
def by_overflow(codes):
    if (
        codes.dtype != torch.int8
        or codes.dim() != 2
        or codes.numel() < 1
        or codes.min() < -8
        or codes.max() > 7
    ):
        raise ValueError("codes")
    packed = codes[:, ::2] & 15
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] * 16
    return packed.contiguous().view(torch.uint8)
