"""Signed 4-bit codes out of their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.exercise import Rng, alternative, case, exercise, mistake, raised


@exercise(
    points=1,
    minutes=4,
    hints=(
        "A shift to the right of a signed byte repeats its sign bit; one of an unsigned byte does not.",
        "Move the low four bits up to where the sign bit is before you move them down again; then the two codes of a "
        "byte go side by side, not one half of the row behind the other.",
    ),
)
def unpack_int4(packed: Tensor, size: int) -> Tensor:
    """The signed 4-bit codes of bytes that hold two each; about 5 lines.

    packed [N, ceil(size / 2)] uint8, any strides -> codes [N, size] int8, values -8 ..
    7. Byte j of a row holds column 2j in its low four bits and column 2j + 1 in its
    high four, each in two's complement. Where size is odd the last byte's high bits
    hold nothing, whatever is in them.

    ValueError, with what came: packed that is not uint8, does not have two dimensions
    or has no bytes, and a size for which its rows have too few bytes or too many.
    """
    ### BEGIN SOLUTION
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.numel() == 0:
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; expected torch.uint8 [N, bytes]")
    if packed.shape[1] != -(-size // 2):
        raise ValueError(f"rows have {packed.shape[1]} bytes; {size} codes need {-(-size // 2)}")
    both = torch.stack((packed << 4, packed), dim=2).view(torch.int8) >> 4
    return both.flatten(1)[:, :size]
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def drawn(rng: Rng, rows: int, columns: int) -> Tensor:
    """Bytes of all kinds."""
    return rng.integers(0, 255, rows, columns, dtype=torch.uint8)


@case(unpack_int4)
def every_byte(answer, rng):
    """All 256 bytes, in any order."""
    mixed = torch.tensor(rng.shuffled(range(256)), dtype=torch.uint8)
    return {"one a row": answer(mixed.view(256, 1), 2), "in rows": answer(mixed.view(16, 16), 32)}


@case(unpack_int4)
def rows_and_columns(answer, rng):
    """Matrices that are not square, with an even number of codes a row."""
    shapes = [(1, 1), (2, 2), (rng.integer(3, 9), rng.integer(10, 19)), (rng.integer(20, 30), 3)]
    return [answer(drawn(rng, *shape), 2 * shape[1]) for shape in shapes]


@case(unpack_int4)
def odd_rows(answer, rng):
    """An odd number of codes a row; the last four bits are 0, or what happens to be there."""
    rows, columns = rng.integer(2, 9), rng.integer(2, 9)
    clean = drawn(rng, rows, columns)
    clean[:, -1] &= 15
    other = rng.integers(1, 15, rows, dtype=torch.uint8) << 4
    unclean = clean.clone()
    unclean[:, -1] |= other
    return {
        "zeros behind them": answer(clean, 2 * columns - 1),
        "anything behind them": answer(unclean, 2 * columns - 1),
        "one code a row": answer(unclean[:, -1:], 1),
    }


@case(unpack_int4)
def views(answer, rng):
    """A transposed matrix of bytes, and every other row and column of one."""
    rows, columns = rng.integer(3, 8), rng.integer(4, 9)
    return {
        "transposed": answer(drawn(rng, rows, columns).T, 2 * rows),
        "transposed square": answer(drawn(rng, 5, 5).T, 9),
        "every other": answer(drawn(rng, 2 * rows, 3 * columns)[::2, ::3], 2 * columns),
    }


@case(unpack_int4)
def refusals(answer, rng):
    """Other dtypes and dimensions, and sizes that do not fit, beside bytes as they should be."""
    rows, columns = rng.integer(2, 5), rng.integer(3, 6)
    packed, even = drawn(rng, rows, columns), 2 * columns
    found: dict[str, Any] = {"even": answer(packed, even), "odd": answer(packed, even - 1)}
    for size in [*range(-even - 1, even - 1), *range(even + 1, 2 * even + 2), rows * even]:
        found[f"{size - even} codes more"] = raised(answer, packed, size)
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for dtype in (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, *floats):
        found[str(dtype)] = [raised(answer, packed.to(dtype), size) for size in (even, even - 1)]
    # As many bytes along every dimension but the first, so that no size that is looked at gives it away.
    for shape in (
        (0, 2),
        (2, 0),
        (0, 0),
        (),
        (1,),
        (2,),
        (2, 2, 2),
        (1, 2, 2),
        (2, 2, 2, 2),
        (1, 1, 1, 2, 2),
    ):
        bytes_a_row = shape[-1] if shape else 1
        wrong = torch.ones(shape, dtype=torch.uint8)
        found[str(shape)] = [raised(answer, wrong, 2 * bytes_a_row - odd) for odd in (0, 1)]
    return found


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Unpacking:
    """A right answer in small steps; a mistake replaces one of them."""

    def check_packed(self, packed: Tensor) -> None:
        if packed.dtype is not torch.uint8:
            raise ValueError("dtype")

    def check_shape(self, packed: Tensor) -> None:
        if packed.ndim != 2 or 0 in packed.shape:
            raise ValueError("shape")

    def check_size(self, packed: Tensor, size: int) -> None:
        if size not in (2 * packed.shape[1] - 1, 2 * packed.shape[1]):
            raise ValueError("size")

    def low(self, packed: Tensor) -> Tensor:
        return packed & 15

    def high(self, packed: Tensor) -> Tensor:
        return packed >> 4

    def signed(self, nibble: Tensor) -> Tensor:
        return (nibble ^ 8).to(torch.int8) - 8

    def side_by_side(self, low: Tensor, high: Tensor) -> Tensor:
        codes = low.new_empty(len(low), 2 * low.shape[1])
        codes[:, 0::2], codes[:, 1::2] = low, high
        return codes

    def cut(self, codes: Tensor, size: int) -> Tensor:
        return codes[:, :size]

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        self.check_packed(packed)
        self.check_shape(packed)
        self.check_size(packed, size)
        low, high = self.signed(self.low(packed)), self.signed(self.high(packed))
        return self.cut(self.side_by_side(low, high), size)


def variant(**steps: Any) -> Callable[[Tensor, int], Tensor]:
    """An answer with some steps replaced."""
    return type("Variant", (Unpacking,), steps)().unpack


@mistake(unpack_int4, "Leaves the sign bit a value: codes 8 .. 15 stay positive.")
def sign_not_extended(packed, size):
    return variant(signed=lambda self, nibble: nibble.to(torch.int8))(packed, size)


@mistake(
    unpack_int4,
    "Extends the sign of the high four bits only, by shifting a signed byte; the low ones stay positive.",
)
def only_the_high_signed(packed, size):
    def high(self, packed):
        return packed.view(torch.int8) >> 4

    def low(self, packed):
        return (packed & 15).to(torch.int8)

    return variant(low=low, high=high, signed=lambda self, nibble: nibble)(packed, size)


@mistake(unpack_int4, "Subtracts 8 from every code, as for codes that were stored with an offset.")
def offset_of_eight(packed, size):
    return variant(signed=lambda self, nibble: nibble.to(torch.int8) - 8)(packed, size)


@mistake(unpack_int4, "Takes bit 3 for a minus before the other three bits: -1 becomes -7.")
def sign_and_magnitude(packed, size):
    def signed(self, nibble):
        magnitude = (nibble & 7).to(torch.int8)
        return torch.where(nibble >= 8, -magnitude, magnitude)

    return variant(signed=signed)(packed, size)


@mistake(unpack_int4, "Subtracts 15, not 16, from the codes above 7: every negative code is one too large.")
def off_by_one(packed, size):
    def signed(self, nibble):
        codes = nibble.to(torch.int8)
        return torch.where(codes > 7, codes - 15, codes)

    return variant(signed=signed)(packed, size)


@mistake(unpack_int4, "Takes 8 for a positive code: -8 never comes out.")
def eight_stays_positive(packed, size):
    def signed(self, nibble):
        codes = nibble.to(torch.int8)
        return torch.where(codes > 8, codes - 16, codes)

    return variant(signed=signed)(packed, size)


@mistake(unpack_int4, "Takes the high four bits for the even column.")
def nibbles_swapped(packed, size):
    steps = {"low": Unpacking.high, "high": Unpacking.low}
    return variant(**steps)(packed, size)


@mistake(unpack_int4, "Puts all low halves before all high ones: codes belong side by side, byte by byte.")
def halves_of_the_row(packed, size):
    def side_by_side(self, low, high):
        return torch.cat([low, high], 1)

    return variant(side_by_side=side_by_side)(packed, size)


@mistake(unpack_int4, "Stacks the halves before the columns, so that codes of different rows mix.")
def stacked_wrongly(packed, size):
    def side_by_side(self, low, high):
        return torch.stack([low, high]).reshape(len(low), -1)

    return variant(side_by_side=side_by_side)(packed, size)


@mistake(unpack_int4, "Keeps the padding of an odd row as a code.")
def padding_kept(packed, size):
    return variant(cut=lambda self, codes, size: codes)(packed, size)


@mistake(unpack_int4, "Cuts an odd row's first column off, not its last.")
def first_cut_off(packed, size):
    return variant(cut=lambda self, codes, size: codes[:, codes.shape[1] - size :])(packed, size)


@mistake(unpack_int4, "Drops the last byte of an odd row.")
def odd_byte_dropped(packed, size):
    return variant(cut=lambda self, codes, size: codes[:, : size // 2 * 2])(packed, size)


@mistake(unpack_int4, "Reads a transposed matrix in the order of its memory, as as_strided does.")
def strides_ignored(packed, size):
    if packed.dim() == 2:
        packed = packed.as_strided(packed.shape, (packed.shape[1], 1))
    return variant()(packed, size)


@mistake(unpack_int4, "Returns int32, four bytes for four bits.")
def wide_codes(packed, size):
    return variant()(packed, size).to(torch.int32)


@mistake(unpack_int4, "Returns fewer codes than asked for where there are too few bytes, as a slice does.")
def size_unchecked(packed, size):
    return variant(check_size=lambda self, packed, size: None)(packed, size)


@mistake(
    unpack_int4, "Refuses only where bytes are missing: codes of another matrix are cut short in silence."
)
def too_many_bytes_accepted(packed, size):
    def check_size(self, packed, size):
        if size > 2 * packed.shape[1]:
            raise ValueError("size")

    return variant(check_size=check_size)(packed, size)


@mistake(unpack_int4, "Refuses an odd number of codes.")
def odd_size_refused(packed, size):
    def check_size(self, packed, size):
        if size != 2 * packed.shape[1]:
            raise ValueError("size")

    return variant(check_size=check_size)(packed, size)


@mistake(unpack_int4, "Takes bytes of any dtype: int8 among them, and floats.")
def dtype_unchecked(packed, size):
    def check_packed(self, packed):
        pass

    def low(self, packed):
        return packed.to(torch.uint8) & 15

    def high(self, packed):
        return packed.to(torch.uint8) >> 4

    return variant(check_packed=check_packed, low=low, high=high)(packed, size)


@mistake(unpack_int4, "Takes bytes of any shape, also none.")
def shape_unchecked(packed, size):
    if packed.dim() == 2 and packed.numel():
        return variant()(packed, size)
    return torch.zeros(*packed.shape[:-1], size, dtype=torch.int8)


@alternative(unpack_int4, "Flips the sign bit and subtracts it, and writes both halves into their columns")
def by_flipping(packed, size):
    return Unpacking().unpack(packed, size)


@alternative(unpack_int4, "Looks both codes of a byte up in a table")
def by_table(packed, size):
    if (
        packed.dtype != torch.uint8
        or packed.dim() != 2
        or not packed.numel()
        or (size + 1) // 2 != packed.shape[1]
    ):
        raise ValueError("packed or size")
    code = [*range(8), *range(-8, 0)]
    table = torch.tensor([[code[byte % 16], code[byte // 16]] for byte in range(256)], dtype=torch.int8)
    return table[packed.long()].reshape(len(packed), -1)[:, :size]


@alternative(unpack_int4, "Divides in floats, by 16 and rounding down")
def by_division(packed, size):
    if (
        packed.dtype != torch.uint8
        or packed.dim() != 2
        or min(packed.shape) < 1
        or -(-size // 2) != packed.shape[1]
    ):
        raise ValueError("packed or size")
    high = (packed.float() / 16).floor()
    codes = torch.stack([packed.float() - 16 * high, high], 2).reshape(len(packed), -1)
    return (codes - 16 * (codes >= 8)).to(torch.int8)[:, :size]
