"""pack_int4 against integers of Python, and through unpack_int4 and torch's int4 kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmcourse.exercise import find

pack_int4 = find("pack_int4").reference
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
