"""affine_parameters against exact arithmetic, and against torch's observer where the conventions agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization.affine_parameters import Fitting, variant

found = find("affine_parameters")
affine_parameters = found.reference
KINDS = [(symmetric, signed) for symmetric in (False, True) for signed in (False, True)]


def drawn(seed: int) -> list[tuple[str, Tensor]]:
    """Tensors under several laws: white, one-sided, with a loud value, constant, very large and very small."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(40, 9, generator=generator)
    loud = white * 0.01
    loud[3, 4] = -7.0
    return [
        ("white", white),
        ("bfloat16", white.bfloat16()),
        ("positive", white.abs() + 3),
        ("negative", -white.abs() - 0.5),
        ("loud", loud),
        ("constant", torch.full((5,), 2.5)),
        ("one value", torch.tensor(-0.3)),
        ("zeros", torch.zeros(4, 4)),
        ("transposed", white.T),
        ("huge", white / white.abs().max() * 3.4e38),
        ("small", white * 1e-30),
        ("subnormal", white * 1e-40),
    ]


def codes_and_values(x: Tensor, bits: int, *, symmetric: bool, signed: bool) -> tuple[Tensor, Tensor, float]:
    """Codes, the values they stand for in float64, and the scale, of x quantized with the parameters."""
    scale, zero_point = affine_parameters(x, bits, symmetric=symmetric, signed=signed)
    assert (scale.shape, zero_point.shape) == ((), ())
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    lowest = -(2 ** (bits - 1)) if signed else 0
    assert lowest <= int(zero_point) <= lowest + 2**bits - 1
    codes = (x.double() / scale.double()).round() + zero_point
    codes = codes.clamp(lowest, lowest + 2**bits - 1)
    return codes, (codes - zero_point) * scale.double(), float(scale)


@pytest.mark.parametrize(("symmetric", "signed"), KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_no_value_is_further_than_half_a_step_from_its_code(
    bits: int, symmetric: bool, signed: bool, seed: int
) -> None:
    for name, x in drawn(seed):
        _, values, scale = codes_and_values(x, bits, symmetric=symmetric, signed=signed)
        # Rounding moves a value by half a step. Rounding the zero-point moves the codes' ends by at most half a step
        # against the tensor's, so a clamped value is no further off. The float32 scale is off by 2**-24 of itself,
        # over at most 2**bits steps.
        allowed = scale * (0.5 + 2**bits * 2.0**-23)
        assert float((values - x.double()).abs().max()) <= allowed, name


@pytest.mark.parametrize(("symmetric", "signed"), KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_comes_back_as_exactly_zero(bits: int, symmetric: bool, signed: bool, seed: int) -> None:
    for name, x in drawn(seed):
        scale, zero_point = affine_parameters(x, bits, symmetric=symmetric, signed=signed)
        code = round(0 / Fraction(float(scale))) + int(zero_point)
        assert (code - int(zero_point)) * Fraction(float(scale)) == 0, name
        assert math.isfinite(float(scale)) and float(scale) >= 2.0**-126, name


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_codes_are_as_many_on_either_side_and_the_largest_magnitude_has_the_last(
    bits: int, signed: bool, seed: int
) -> None:
    for name, x in drawn(seed):
        if name in ("zeros", "subnormal"):
            continue
        codes, _, _ = codes_and_values(x, bits, symmetric=True, signed=signed)
        middle = 0 if signed else 2 ** (bits - 1)
        assert float((codes - middle).abs().max()) == 2 ** (bits - 1) - 1, name


def test_a_range_of_255_steps_worked_by_hand() -> None:
    # -1 .. 1.55 in 255 steps of 0.01: zero is 100 steps above the first code.
    x = torch.tensor([0.2, -1.0, 1.55])
    scale, zero_point = affine_parameters(x, 8, symmetric=False, signed=False)
    assert float(scale) == pytest.approx(0.01, rel=1e-6) and int(zero_point) == 100
    assert int(affine_parameters(x, 8, symmetric=False, signed=True)[1]) == -28
    scale, zero_point = affine_parameters(x, 8, symmetric=True, signed=False)
    assert float(scale) == pytest.approx(1.55 / 127, rel=1e-6) and int(zero_point) == 128


@pytest.mark.parametrize("place", [0.5, 1.5, 2.5, 3.5])
def test_half_a_step_is_rounded_to_even(place: float) -> None:
    x = torch.tensor([-place, 7 - place]) * 0.125
    assert int(affine_parameters(x, 3, symmetric=False, signed=False)[1]) == int(torch.tensor(place).round())
    assert (
        int(affine_parameters(x, 3, symmetric=False, signed=True)[1]) == int(torch.tensor(place).round()) - 4
    )


@pytest.mark.parametrize("signed", [False, True])
def test_torch_s_observer_agrees_on_affine_parameters_of_8_bits(signed: bool, seed: int) -> None:
    observers = pytest.importorskip("torch.ao.quantization.observer")
    generator = torch.Generator().manual_seed(seed)
    for shift in (-5.0, -0.3, 0.0, 0.8, 4.0):
        x = torch.randn(30, 20, generator=generator) + shift
        dtype = torch.qint8 if signed else torch.quint8
        observer = observers.MinMaxObserver(dtype=dtype, qscheme=torch.per_tensor_affine)
        observer(x)
        observed_scale, observed_zero = observer.calculate_qparams()
        scale, zero_point = affine_parameters(x, 8, symmetric=False, signed=signed)
        assert float(scale) == pytest.approx(float(observed_scale), rel=1e-6)
        # The observer rounds low / scale, both in float32: next to a half it may come out on the other side.
        assert abs(int(zero_point) - int(observed_zero)) <= (
            abs((float(x.min().clamp(max=0)) / float(scale)) % 1 - 0.5) < 1e-3
        )


def test_where_torch_s_observer_differs_it_has_its_own_symmetric_scale_and_smallest_scale(seed: int) -> None:
    observers = pytest.importorskip("torch.ao.quantization.observer")
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    observer = observers.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_symmetric)
    observer(x)
    observed_scale, observed_zero = observer.calculate_qparams()
    scale, zero_point = affine_parameters(x, 8, symmetric=True, signed=False)
    assert int(zero_point) == int(observed_zero) == 128
    assert float(scale) * 127 == pytest.approx(float(observed_scale) * 127.5, rel=1e-6)

    observer = observers.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    observer(torch.zeros(3))
    assert float(observer.calculate_qparams()[0]) == 2.0**-23  # ours is 1


def test_a_range_that_float32_cannot_hold_has_a_finite_scale() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([-largest, largest])
    for bits in (2, 8):
        scale, _ = affine_parameters(x, bits, symmetric=False, signed=True)
        assert float(scale) == pytest.approx(2 * largest / (2**bits - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("x", "bits", "said"),
    [
        (torch.ones(3), 1, "bits is 1"),
        (torch.ones(3), 9, "bits is 9"),
        (torch.empty(0, 4), 8, r"shape \[0, 4\]"),
        (torch.tensor([1.0, math.nan]), 8, "nan"),
        (torch.tensor([1.0, math.inf]), 8, "inf"),
        (torch.tensor([1.0, -math.inf]), 8, "-inf"),
    ],
)
@pytest.mark.parametrize(("symmetric", "signed"), KINDS)
def test_bad_input_is_refused_with_what_came(
    x: Tensor, bits: int, said: str, symmetric: bool, signed: bool
) -> None:
    with pytest.raises(ValueError, match=said):
        affine_parameters(x, bits, symmetric=symmetric, signed=signed)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Any, seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


def refusing(is_bad: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """An answer that refuses by another test of x, and takes what is left for numbers."""

    def seen(self: Any, x: Tensor) -> tuple[float, float]:
        if bool(is_bad(x)):
            raise ValueError("values")
        return Fitting.seen(self, x.nan_to_num(0.0))

    return variant(seen=seen)


def usable(scale_of: Callable[[float], float]) -> Callable[..., Any]:
    return variant(usable=lambda self, scale, low, high: scale_of(scale) if scale >= 2.0**-126 else 1.0)


WRONG: dict[str, Callable[..., Any]] = {
    "NaN alone": refusing(lambda x: x.isnan().any()),
    "Inf alone": refusing(lambda x: x.isinf().any()),
    "plus Inf and NaN": refusing(lambda x: (x.isnan() | (x == math.inf)).any()),
    "minus Inf and NaN": refusing(lambda x: (x.isnan() | (x == -math.inf)).any()),
    "first value": refusing(lambda x: ~x.flatten()[0].isfinite()),
    "last value": refusing(lambda x: ~x.flatten()[-1].isfinite()),
    "squares": refusing(lambda x: ~x.float().square().sum().isfinite()),
    **{f"above {floor}": usable(lambda s, floor=floor: max(s, floor)) for floor in (1e-5, 1e-11, 1e-30)},
    **{f"1 below {floor}": usable(lambda s, floor=floor: s if s > floor else 1.0) for floor in (1e-8, 1e-30)},
    "below 1e30": usable(lambda s: min(s, 1e30)),
    "matrices and vectors": lambda x, *given, **kind: variant()(
        x if 0 < x.dim() < 3 else x[None][0:0], *given, **kind
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_wrong_somewhere_loses_points(name: str, seed: int) -> None:
    assert points_of(WRONG[name], seed) < found.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(found.reference, seed) == found.points


def test_what_torch_s_observer_computes_earns_nothing(seed: int) -> None:
    observers = pytest.importorskip("torch.ao.quantization.observer")

    def affine(x: Tensor, bits: int, *, symmetric: bool, signed: bool) -> tuple[Tensor, Tensor]:
        if symmetric:
            return Fitting().fit(x, bits, symmetric=symmetric, signed=signed)
        lowest = -(2 ** (bits - 1)) if signed else 0
        observer = observers.MinMaxObserver(
            dtype=torch.qint32, quant_min=lowest, quant_max=lowest + 2**bits - 1, eps=1e-45
        )
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        return scale.reshape(()), zero_point.int().reshape(())

    assert int(affine(torch.tensor([-1.0, 1.55]), 8, symmetric=False, signed=False)[1]) == 100
    assert points_of(affine, seed) == 0
