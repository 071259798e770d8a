"""unpack_int4 against Python's integers, and against what torch's own int4 kernel multiplies with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.unpack_int4 import variant

found = find("unpack_int4")
unpack_int4 = found.reference
pack_int4 = find("pack_int4").reference


def drawn(seed: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 33])
def test_codes_are_the_digits_of_a_row_read_as_one_integer(size: int, seed: int) -> None:
    packed = drawn(seed, 5, -(-size // 2))
    codes = unpack_int4(packed, size)
    assert (codes.dtype, codes.shape) == (torch.int8, (5, size))
    for row, unpacked in zip(packed.tolist(), codes.tolist(), strict=True):
        number = int.from_bytes(bytes(row), "little")
        digits = [number >> 4 * place & 15 for place in range(size)]
        assert unpacked == [digit - 16 if digit > 7 else digit for digit in digits]


def test_every_byte_comes_back_from_its_codes() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(pack_int4(unpack_int4(every, 32)), every)


@pytest.mark.parametrize("group_size", [32, 64])
def test_torch_s_int4_kernel_multiplies_with_these_codes(group_size: int, seed: int) -> None:
    # Its weights are (code + 8 - 8) * scale + zero: with the identity as x, scale 1 and zero 0 the product is the
    # codes, which bfloat16 holds exactly. How the kernel lays the nibbles out is its own matter.
    packed = drawn(seed, 64, 64)
    codes = unpack_int4(packed, 128)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 2)
    assert theirs.numel() == packed.numel()
    scale_and_zero = (
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(128 // group_size, 64, 2).contiguous()
    )
    identity = torch.eye(128, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, theirs, group_size, scale_and_zero)
    assert torch.equal(product.T.to(torch.int8), codes)


def test_a_view_gives_what_its_copy_gives(seed: int) -> None:
    packed = drawn(seed, 6, 10)
    for view in (packed.T, packed[::2, ::3], packed.flip(1)):
        size = 2 * view.shape[1] - 1
        assert torch.equal(unpack_int4(view, size), unpack_int4(view.clone().contiguous(), size))


@pytest.mark.parametrize(
    ("packed", "size", "said"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), 7, "3 bytes; 7 codes need 4"),
        (torch.zeros(2, 3, dtype=torch.uint8), 4, "3 bytes; 4 codes need 2"),
        (torch.zeros(2, 3, dtype=torch.uint8), 0, "3 bytes; 0 codes need 0"),
        (torch.zeros(2, 3, dtype=torch.uint8), -6, "3 bytes; -6 codes need -3"),
        (torch.zeros(2, 3, dtype=torch.int8), 6, "torch.int8"),
        (torch.zeros(3, dtype=torch.uint8), 6, r"\[3\]"),
        (torch.zeros(0, 3, dtype=torch.uint8), 6, r"\[0, 3\]"),
        (torch.zeros(2, 0, dtype=torch.uint8), 0, r"\[2, 0\]"),
    ],
)
def test_bad_input_is_refused_with_what_came(packed: Tensor, size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack_int4(packed, size)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Callable[[Tensor, int], Tensor], seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


@pytest.mark.parametrize(
    "name", ["bool", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_one_more_dtype_that_is_let_through_is_not_right(name: str, seed: int) -> None:
    def answer(packed: Tensor, size: int) -> Tensor:
        return variant()(packed.to(torch.uint8) if packed.dtype == getattr(torch, name) else packed, size)

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize("let_through", [0, 1, 3, 4, 5])
def test_other_dimensions_that_are_let_through_are_not_right(let_through: int, seed: int) -> None:
    def answer(packed: Tensor, size: int) -> Tensor:
        if packed.dim() != let_through or packed.numel() == 0:
            return variant()(packed, size)
        return variant()(packed.reshape(-1, packed.shape[-1] if packed.dim() else 1), size)

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_one_kind_of_nothing_that_is_let_through_is_not_right(shape: tuple[int, int], seed: int) -> None:
    def answer(packed: Tensor, size: int) -> Tensor:
        if packed.shape == shape and packed.dtype == torch.uint8:
            return torch.zeros(len(packed), max(0, size), dtype=torch.int8)
        return variant()(packed, size)

    assert points_of(answer, seed) < found.points


FITTING: dict[str, Callable[[int, int], bool]] = {
    "bytes missing": lambda size, room: size <= room,
    "bytes left over": lambda size, room: size >= room - 1,
    "one code too many": lambda size, room: size in (room - 1, room, room + 1),
    "two codes too few": lambda size, room: size in (room - 2, room - 1, room),
    "none": lambda size, room: size in (0, room - 1, room),
    "as many as there are bytes": lambda size, room: size in (room // 2, room - 1, room),
    "magnitudes": lambda size, room: abs(size) in (room - 1, room),
    "multiples": lambda size, room: size > 0 and size % room in (0, room - 1),
}


@pytest.mark.parametrize("kind", FITTING)
def test_a_size_that_is_looked_at_less_closely_is_not_right(kind: str, seed: int) -> None:
    def check_size(self: Any, packed: Tensor, size: int) -> None:
        if not FITTING[kind](size, 2 * packed.shape[1]):
            raise ValueError("size")

    def cut(self: Any, codes: Tensor, size: int) -> Tensor:
        return codes[:, : abs(size)]

    assert points_of(variant(check_size=check_size, cut=cut), seed) < found.points


def test_an_answer_that_refuses_what_lies_behind_an_odd_row_is_not_right(seed: int) -> None:
    def answer(packed: Tensor, size: int) -> Tensor:
        if size % 2 and packed.dim() == 2 and packed.dtype == torch.uint8 and (packed[:, -1:] >> 4).any():
            raise ValueError("bits behind the last code")
        return variant()(packed, size)

    assert points_of(answer, seed) < found.points


def test_a_right_answer_in_small_steps_earns_all_points(seed: int) -> None:
    assert points_of(variant(), seed) == found.points
