"""Agreement: equal where it must be equal, room for another summation order and for nothing more, reasons in words."""

from __future__ import annotations

import math

import pytest
import torch

from llmcourse import wire
from llmcourse.agreement import ROOM_NARROW, describe, difference, structure
from llmcourse.wire import Opaque

WIDE = [torch.float64, torch.float32]
NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        ("a", "a"),
        (b"a", b"a"),
        (math.nan, math.nan),
        (-math.inf, -math.inf),
        ([1, (2.5, {"a": None})], [1, (2.5, {"a": None})]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([math.nan, math.inf, 1.0])),
        (torch.empty(0, 3), torch.empty(0, 3)),
    ],
    ids=str,
)
def test_the_same_data_agrees(observed, expected):
    assert difference(observed, expected) is None


@pytest.mark.parametrize(
    ("observed", "expected", "reason"),
    [
        (1, True, "expected True, found 1"),
        (3.0, 3, "expected 3, found 3.0"),
        (3, 3.0, "expected 3.0, found 3"),
        (None, 1, "expected 1, found None"),
        ([1, 2], (1, 2), "expected (1, 2), found [1, 2]"),
        ([1], [1, 2], "expected [1, 2], found [1]"),
        ("ab", "ac", "expected 'ac', found 'ab'"),
        (10_000, 20_000, "expected 20,000, found 10,000"),
        (b"ab", b"abc", "expected 3 bytes, found 2"),
        (b"ab", b"aa", "bytes differ, first at 1: expected 0x61, found 0x62"),
        ({"a": 1}, {"b": 1}, "missing b; not expected a"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "a[1].b: expected 3, found 2"),
        (math.nan, 1.0, "expected 1, found nan"),
        (math.inf, -math.inf, "expected -inf, found inf"),
        (1.0, math.nan, "expected nan, found 1"),
        (Opaque("numpy.ndarray"), torch.ones(2), "expected float32 [2], found numpy.ndarray"),
        (torch.ones(2), [1, 1], "expected [1, 1], found float32 [2]"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "expected float64 [2], found float32 [2]"),
        (torch.ones(2, 1), torch.ones(1, 2), "expected float32 [1, 2], found float32 [2, 1]"),
        (torch.tensor(1.5), torch.tensor(2.5), "expected 2.5, found 1.5"),
        (
            torch.tensor([1, 5]),
            torch.tensor([1, 2]),
            "1 of 2 values differ; first at [1]: expected 2, found 5",
        ),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:40],
)
def test_a_difference_names_the_place_what_was_expected_and_what_was_found(observed, expected, reason):
    assert difference(observed, expected) == reason


def test_values_that_look_alike_are_shown_with_all_their_digits():
    reason = difference(1.0 + 1e-13, 1.0)
    assert reason is not None and "1.0000000000000999" in reason
    reason = difference(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert reason is not None and "1.000000000001" in reason


def test_a_tensor_from_another_device_differs_and_the_device_is_named():
    elsewhere = wire.decode(["t", "uint8", [1], "cuda", 0], [b"\1"])
    reason = difference(elsewhere, torch.ones(1, dtype=torch.uint8))
    assert reason == "expected uint8 [1], found uint8 [1] on cuda"


@pytest.mark.parametrize(
    "dtype", [d for d in wire.DTYPES.values() if not d.is_floating_point and not d.is_complex]
)
def test_integers_of_every_dtype_are_compared_exactly(dtype):
    ones = torch.ones(3).to(dtype)
    other = torch.tensor([1, 0, 1]).to(dtype)
    assert difference(ones, ones.clone()) is None
    assert "first at [1]" in (difference(other, ones) or "")


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW, torch.complex64, torch.complex128], ids=str)
def test_floats_of_every_dtype_agree_with_themselves_and_not_with_their_double(dtype):
    values = torch.tensor([1.0, -3.0, 0.5]).to(dtype)
    assert difference(values, values.clone()) is None
    assert difference(
        (values.to(torch.complex128) * 2).to(dtype) if dtype.is_complex else (values.double() * 2).to(dtype),
        values,
    )


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_another_order_of_summation_agrees_and_a_relative_error_of_one_in_a_thousand_does_not(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(50, 400, generator=generator, dtype=dtype)
    # Sums of n terms in any order lie within (n - 1) eps sum|terms| of each other, typically sqrt(n) eps: 20 of the 64.
    forward, backward = terms.cumsum(dim=1)[:, -1], terms.flip(1).cumsum(dim=1)[:, -1]
    assert difference(backward, forward) is None
    assert difference(forward * 1.001, forward) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_have_room_for_two_roundings_and_not_for_more(dtype):
    ones = torch.ones(4, dtype=dtype)
    eps = torch.finfo(dtype).eps
    # |e| + rms = 2, so the bound is 2 * 2 * eps: four steps above 1.
    assert difference(ones + ROOM_NARROW * 2 * eps, ones) is None
    assert difference(ones + (ROOM_NARROW * 2 + 1) * eps, ones) is not None


def test_tol_scales_the_room():
    eps = torch.finfo(torch.float32).eps
    ones = torch.ones(4)
    assert difference(ones + 200 * eps, ones) is not None
    assert difference(ones + 200 * eps, ones, tol=2.0) is None
    assert difference({"a": [ones + 200 * eps]}, {"a": [ones]}, tol=2.0) is None
    assert difference(1.0 + 1e-13, 1.0) is not None
    assert difference(1.0 + 1e-13, 1.0, tol=10.0) is None


def test_room_comes_from_finite_values_alone_and_does_not_overflow():
    expected = torch.tensor([math.inf, 1.0], dtype=torch.float64)
    assert difference(torch.tensor([math.inf, 2.0], dtype=torch.float64), expected) is not None
    huge = torch.tensor([1e200, 1e200], dtype=torch.float64)
    assert difference(huge * 1.01, huge) is not None
    assert difference(huge.clone(), huge) is None
    zeros = torch.zeros(2, dtype=torch.float64)
    assert difference(zeros + 1e-300, zeros) is not None


def test_values_that_are_not_finite_where_the_answer_is_are_counted():
    reason = difference(torch.tensor([math.nan, 1.0, math.inf]), torch.ones(3))
    assert (
        reason
        == "2 of 3 values differ; first at [0]: expected 1, found nan; 2 are NaN or infinite where the answer is finite"
    )


def test_structure_holds_types_keys_dtypes_and_shapes_and_no_values():
    data = {"a": [torch.ones(2), 1], "b": (None, "x")}
    other = {"a": [torch.zeros(2), 5], "b": (None, "y")}
    assert structure(data) == structure(other)
    for changed in (
        {"a": [torch.ones(3), 1], "b": (None, "x")},
        {"a": [torch.ones(2).double(), 1], "b": (None, "x")},
        {"a": [torch.ones(2)], "b": (None, "x")},
        {"a": [torch.ones(2), 1.0], "b": (None, "x")},
        {"a": [torch.ones(2), 1], "b": [None, "x"]},
        {"a": [torch.ones(2), 1]},
    ):
        assert structure(changed) != structure(data)
    assert structure({"a": torch.ones(2)}, shapes=False) == structure({"a": torch.ones(5)}, shapes=False)
    assert structure({"a": torch.ones(2)}, shapes=False) != structure({"a": torch.ones(2, 1)}, shapes=False)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (torch.ones(2, 3), "float32 [2, 3]"),
        (torch.tensor(1.5), "float32 scalar 1.5"),
        (torch.tensor(True), "bool scalar True"),
        (Opaque("a \x1b[2J kind"), "a \\x1b[2J kind"),
        ([1, "a"], "[1, 'a']"),
        ([torch.ones(1)] * 3, "a list of 3"),
        (tuple(range(1000)), "a tuple of 1000"),
        ({}, "an empty dict"),
        ({"b": 1, "a": 2}, "a dict with keys a, b"),
        ({"\ud800": 1}, "a dict with keys \\ud800"),
        (b"abc", "3 bytes"),
        (0.1, "0.1"),
        (2.0, "2.0"),
        (True, "True"),
        (10**50, "an int of 167 bits"),
        ([10**4000], "a list of 1"),
        ("x" * 200, "'" + "x" * 78 + "…"),
    ],
    ids=lambda value: (
        value[:24].encode("ascii", "backslashreplace").decode() if isinstance(value, str) else ""
    ),
)
def test_values_are_described_in_a_few_printable_words(data, shown):
    assert describe(data) == shown


def test_the_largest_integer_the_wire_carries_can_be_described():
    largest = wire.copied(2 ** (4 * (wire.MAX_INT_DIGITS - 2)) - 1)
    assert not isinstance(largest, Opaque)
    assert "bits" in describe(largest) and describe([largest]) == "a list of 1"
    assert difference([largest], [largest - 1]) is not None


@pytest.mark.parametrize(
    ("observed", "expected", "told"),
    [
        ("nothing", "ValueError", "nan: expected ValueError, and the call returned"),
        ("TypeError", "ValueError", "nan: expected ValueError, and the call raised TypeError"),
        ("ValueError", "nothing", "nan: expected a result, and the call raised ValueError"),
        ("other", "nothing", "nan: expected 'nothing', found 'other'"),
        ("print", "ValueError", "nan: expected 'ValueError', found 'print'"),
    ],
)
def test_what_a_call_should_have_raised_is_said_in_words(observed: str, expected: str, told: str) -> None:
    assert difference({"nan": observed}, {"nan": expected}) == told


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
def test_a_tensor_of_any_dtype_agrees_with_itself_and_its_copy(dtype: torch.dtype) -> None:
    raw = torch.arange(128, dtype=torch.uint8)
    held = (raw % 2 if dtype == torch.bool else raw).view(dtype)
    for expected in (held, held.reshape(2, -1).t()):
        for observed in (expected, expected.clone()):
            assert difference(observed, expected) is None
    assert difference(raw.flip(0).view(dtype) if dtype != torch.bool else ~held, held) is not None
