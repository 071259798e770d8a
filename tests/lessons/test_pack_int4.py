"""pack_int4 against integers of Python, and through unpack_int4 and torch's int4 kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.pack_int4 import variant

found = find("pack_int4")
pack_int4 = found.reference
unpack_int4 = find("unpack_int4").reference


def drawn(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


def by_integers(codes: Tensor) -> list[list[int]]:
    """Bytes of each row: Python's integers as two's complement of 4 bits, written low half first."""
    rows = []
    for row in codes.tolist():
        bits = "".join(format(code % 16, "04b") for code in reversed([*row, *[0] * (len(row) % 2)]))
        rows.append(list(int(bits, 2).to_bytes(len(bits) // 8, "little")))
    return rows


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (5, 1), (4, 6), (5, 7), (3, 64)])
def test_bytes_are_those_of_one_long_integer_a_row(rows: int, columns: int, seed: int) -> None:
    codes = drawn(seed, rows, columns)
    packed = pack_int4(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, -(-columns // 2)))
    assert packed.tolist() == by_integers(codes)


def test_all_256_pairs_of_codes_have_a_byte_of_their_own_and_come_back() -> None:
    pairs = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8)
    packed = pack_int4(pairs)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(unpack_int4(packed, 2), pairs)


@pytest.mark.parametrize("columns", [1, 2, 9, 32])
def test_codes_survive_the_round_trip(columns: int, seed: int) -> None:
    codes = drawn(seed, 11, columns)
    assert torch.equal(unpack_int4(pack_int4(codes), columns), codes)
    assert torch.equal(unpack_int4(pack_int4(codes.T), 11), codes.T)


def test_the_result_holds_half_a_byte_a_code_and_no_more(seed: int) -> None:
    for codes in (drawn(seed, 6, 32), drawn(seed, 6, 31), drawn(seed, 32, 6).T):
        packed = pack_int4(codes)
        assert packed.untyped_storage().nbytes() == codes.shape[0] * -(-codes.shape[1] // 2)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.tensor([[8]], dtype=torch.int8), "from 8 to 8"),
        (torch.tensor([[0, -9]], dtype=torch.int8), "from -9 to 0"),
        (torch.zeros(2, 2), "torch.float32"),
        (torch.zeros(2, 2, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(4, dtype=torch.int8), r"\[4\]"),
        (torch.zeros(0, 4, dtype=torch.int8), r"\[0, 4\]"),
        (torch.zeros(4, 0, dtype=torch.int8), r"\[4, 0\]"),
    ],
)
def test_bad_codes_are_refused_with_what_came(codes: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack_int4(codes)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Callable[[Tensor], Tensor], seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


LOOKED_AT: dict[str, Callable[[Tensor], Tensor]] = {
    "first value": lambda codes: codes[:1, :1],
    "first row": lambda codes: codes[:1],
    "first column": lambda codes: codes[:, :1],
    "last row": lambda codes: codes[-1:],
    "last column": lambda codes: codes[:, -1:],
    "all rows but the last": lambda codes: codes[: max(1, len(codes) - 1)],
    "all rows but the first": lambda codes: codes[min(1, len(codes) - 1) :],
    "even columns": lambda codes: codes[:, ::2],
    "odd columns": lambda codes: codes[:, 1::2] if codes.shape[1] > 1 else codes,
    "pairs of columns": lambda codes: codes[:, : max(1, codes.shape[1] // 2 * 2)],
    "first 512 values": lambda codes: codes.flatten()[:512],
    "sum of all": lambda codes: codes.sum(dtype=torch.float32) / codes.numel(),
    "all of the storage": lambda codes: torch.tensor([*codes.untyped_storage()], dtype=torch.uint8).view(
        torch.int8
    ),
}


@pytest.mark.parametrize("where", LOOKED_AT)
def test_bad_codes_looked_for_in_other_places_are_not_right(where: str, seed: int) -> None:
    def check_values(self: Any, codes: Tensor) -> None:
        part = LOOKED_AT[where](codes)
        if part.min() < -8 or part.max() > 7:
            raise ValueError("values")

    assert points_of(variant(check_values=check_values), seed) < found.points


@pytest.mark.parametrize("bounds", [(-9, 7), (-8, 8), (-8, 15), (-8, 126), (-127, 7)])
def test_a_wider_range_of_codes_is_not_right(bounds: tuple[int, int], seed: int) -> None:
    def check_values(self: Any, codes: Tensor) -> None:
        if codes.min() < bounds[0] or codes.max() > bounds[1]:
            raise ValueError("values")

    assert points_of(variant(check_values=check_values), seed) < found.points


@pytest.mark.parametrize(
    "name", ["bool", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_one_more_dtype_that_is_let_through_is_not_right(name: str, seed: int) -> None:
    def answer(codes: Tensor) -> Tensor:
        return variant()(codes.to(torch.int8) if codes.dtype == getattr(torch, name) else codes)

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize("let_through", [0, 1, 3, 4, 5])
def test_other_dimensions_that_are_let_through_are_not_right(let_through: int, seed: int) -> None:
    def answer(codes: Tensor) -> Tensor:
        if codes.dim() != let_through or codes.numel() == 0:
            return variant()(codes)
        return variant()(codes.reshape(-1, codes.shape[-1] if codes.dim() else 1))

    assert points_of(answer, seed) < found.points


@pytest.mark.parametrize("parity", [0, 1])
def test_memory_that_is_kept_for_one_parity_of_the_width_costs_points(parity: int, seed: int) -> None:
    def view(codes: Tensor) -> Tensor:
        packed = variant()(codes)
        return packed.repeat(1, 2)[:, : packed.shape[1]] if codes.shape[1] % 2 == parity else packed

    def wide(codes: Tensor) -> Tensor:
        packed = variant()(codes)
        return packed.int().to(torch.uint8) if codes.shape[1] % 2 == parity else packed

    assert points_of(view, seed) < found.points
    assert points_of(wide, seed) < found.points


def test_a_right_answer_in_small_steps_earns_all_points(seed: int) -> None:
    assert points_of(variant(), seed) == found.points
