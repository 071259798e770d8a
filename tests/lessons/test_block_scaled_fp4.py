"""block_scaled_fp4 against exact fractions, transformers' reader of MXFP4, torch's own dtypes, and torchao."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import find
from llmcourse.lessons.quantization import block_scaled_fp4 as lesson
from tests.peers import peer

found = find("block_scaled_fp4")
block_scaled_fp4 = found.reference
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = {"mxfp4": 32, "nvfp4": 16}


def codes_of(packed: Tensor) -> Tensor:
    """[..., K/2] bytes -> [..., K] codes."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def values_of(codes: Tensor) -> Tensor:
    return torch.tensor([*GRID, *(-value for value in GRID)])[codes.int()]


def divisors_of(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """What torch's own one-byte dtypes read from the scales, float32."""
    if tensor_scale is None:
        return scales.view(torch.float8_e8m0fnu).float()
    return scales.view(torch.float8_e4m3fn).float() * tensor_scale


def read(packed: Tensor, scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    block = codes_of(packed).shape[-1] // scales.shape[-1]
    divisors = divisors_of(scales, tensor_scale).repeat_interleave(block, dim=-1)
    return values_of(codes_of(packed)) * divisors


def drawn(seed: int, rows: int, columns: int) -> Tensor:
    """Normal values, every 16 of them of a magnitude of their own, with an outlier channel."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(12 * torch.rand(rows, columns // 16, generator=generator) - 6)
    x = torch.randn(rows, columns, generator=generator) * magnitude.repeat_interleave(16, dim=1)
    x[:, 5] *= 50
    return x


def nearest_code(value: Fraction) -> int:
    """Code of an exact number: the nearest of the grid, of two the even one."""
    code = min(range(8), key=lambda code: (abs(Fraction(GRID[code]) - abs(value)), code % 2))
    return code + 8 * (value < 0)


def test_mxfp4_is_that_of_exact_arithmetic(seed: int) -> None:
    draw = random.Random(seed)
    x = drawn(seed, 3, 64)
    ties = [draw.choice((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.75)) for _ in range(31)]
    x[1, 32:] = torch.tensor([4.0, *ties]) * 2.0 ** draw.randint(-30, 30)
    packed, scales, tensor_scale = block_scaled_fp4(x, form="mxfp4")
    assert tensor_scale is None
    codes = codes_of(packed)
    for row in range(3):
        for start in (0, 32):
            block = [Fraction(value) for value in x[row, start : start + 32].tolist()]
            exponent = math.frexp(float(max(map(abs, block))))[1] - 1 - 2
            assert Fraction(2) ** (exponent + 2) <= max(map(abs, block)) < Fraction(2) ** (exponent + 3)
            assert scales[row, start // 32] == exponent + 127
            expected = [nearest_code(value / Fraction(2) ** exponent) for value in block]
            assert codes[row, start : start + 32].tolist() == expected


def test_nvfp4_is_within_a_float32_rounding_of_exact_arithmetic(seed: int) -> None:
    x = drawn(seed, 3, 64)
    packed, scales, tensor_scale = block_scaled_fp4(x, form="nvfp4")
    assert tensor_scale == x.abs().max() / 2688
    codes, divisors = codes_of(packed), divisors_of(scales, tensor_scale)
    for row in range(3):
        for place in range(64):
            if divisors[row, place // 16] == 0:
                assert codes[row, place] == 0
                continue
            ratio = Fraction(x[row, place].item()) / Fraction(divisors[row, place // 16].item())
            stored = Fraction(values_of(codes[row, place]).item())
            best = min(abs(Fraction(value) - min(abs(ratio), Fraction(6))) for value in GRID)
            # The quotient is rounded once, by at most 2^-24 of itself.
            assert abs(stored - max(min(ratio, Fraction(6)), Fraction(-6))) <= best + abs(ratio) / 2**23


def test_nvfp4_scales_are_nearest_in_e4m3(seed: int) -> None:
    x = drawn(seed, 8, 256)
    _, scales, tensor_scale = block_scaled_fp4(x, form="nvfp4")
    table = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).double()
    wanted = x.double().unflatten(-1, (-1, 16)).abs().amax(dim=-1) / 6 / tensor_scale.double()
    error = (scales.view(torch.float8_e4m3fn).double() - wanted).abs()
    best = (table - wanted[..., None]).abs().amin(dim=-1)
    # Two divisions in float32 before the rounding: at most 2^-23 of the scale.
    assert bool((error <= best + wanted / 2**23).all())


def test_mxfp4_reads_back_through_transformers(seed: int) -> None:
    peer("transformers")
    reader = importlib.import_module("transformers.integrations.mxfp4")._convert_moe_packed_tensors
    x = drawn(seed, 8, 128)
    packed, scales, _ = block_scaled_fp4(x, form="mxfp4")
    # It reads [experts, outputs, blocks, bytes] and gives [experts, inputs, outputs].
    found = reader(packed.reshape(1, 8, 4, 16), scales[None], dtype=torch.float32)
    assert torch.equal(found[0].T, read(packed, scales, None))


def test_mxfp4_equals_torchao(seed: int) -> None:
    peer("torchao")
    to_mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor").to_mx
    x = drawn(seed, 8, 128)
    x[2, :32] = 0.0
    # Zeros by either divisor: where the scale's byte is 0, torchao divides by 2^-126, not by the 2^-127 of the byte.
    x[3, :32] = x[3, :32].sign() * 1e-42
    x[4, 0] = -0.0
    theirs_scales, theirs = to_mx(x, torch.float4_e2m1fn_x2, 32)
    packed, scales, _ = block_scaled_fp4(x, form="mxfp4")
    assert torch.equal(scales, theirs_scales.view(torch.uint8).reshape(scales.shape))
    assert torch.equal(packed, theirs.view(torch.uint8).reshape(packed.shape))


def test_nvfp4_equals_torchao_where_no_scale_is_subnormal(seed: int) -> None:
    peer("torchao")
    nvfp4_quantize = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor").nvfp4_quantize
    # torchao keeps block scales at 2^-6 of the tensor's and above; ours go on to the subnormals, and to 0.
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))
    packed, scales, tensor_scale = block_scaled_fp4(x, form="nvfp4")
    theirs_scales, theirs = nvfp4_quantize(x, 16, tensor_scale)
    assert torch.equal(scales, theirs_scales.view(torch.uint8).reshape(scales.shape))
    assert torch.equal(packed, theirs.view(torch.uint8).reshape(packed.shape))


@pytest.mark.parametrize("form", BLOCK)
def test_every_value_of_the_grid_reads_back_as_it_was(form: str, seed: int) -> None:
    draw = random.Random(seed)
    grid = [*GRID, *(-value for value in GRID)]
    rows = [[6.0, *(draw.choice(grid) for _ in range(BLOCK[form] - 1))] for _ in range(4)]
    x = torch.tensor(rows) * 2.0 ** draw.randint(-20, 20)
    if form == "nvfp4":  # its tensor scale is a power of two only where the largest magnitude is 2688 of them
        x = x * 448
    found = read(*block_scaled_fp4(x, form=form))
    assert torch.equal(found, x) and torch.equal(found.signbit(), x.signbit())


@pytest.mark.parametrize(("form", "share"), [("mxfp4", 1 / 4), ("nvfp4", 1 / 6 + 1 / 64)])
def test_the_error_is_at_most_its_share_of_the_largest_of_the_block(
    form: str, share: float, seed: int
) -> None:
    # MXFP4: the largest is at least 4 divisors; up to 6 the grid is 2 apart, an error of at most 1 divisor or a
    # quarter. Beyond 6 it saturates: less than 2 divisors of at least 6, a quarter of what is at most 8. NVFP4: the
    # largest is 6 divisors but for the scale's rounding, by 1/16 of itself at most (its subnormals are left out).
    x = drawn(seed, 8, 256)
    x = x if form == "mxfp4" else torch.randn(8, 256, generator=torch.Generator().manual_seed(seed))
    error = (read(*block_scaled_fp4(x, form=form)) - x).abs().unflatten(-1, (-1, BLOCK[form])).amax(dim=-1)
    largest = x.abs().unflatten(-1, (-1, BLOCK[form])).amax(dim=-1)
    assert bool((error <= largest * share * (1 + 1e-6)).all())


def test_stored_bytes_are_four_and_a_quarter_and_four_and_a_half_bits_a_value() -> None:
    x = torch.randn(64, 128)
    for form, bits in (("mxfp4", 4.25), ("nvfp4", 4.5)):
        packed, scales, _ = block_scaled_fp4(x, form=form)
        assert 8 * (packed.nbytes + scales.nbytes) / x.numel() == bits


def test_a_tensor_of_zeros_and_a_block_of_zeros_stay_zeros() -> None:
    for form in BLOCK:
        x = torch.zeros(2, 64)
        packed, scales, tensor_scale = block_scaled_fp4(x, form=form)
        assert not packed.any() and not scales.any() and (tensor_scale is None or tensor_scale == 1)
        x[1] = 1.0
        assert torch.equal(read(*block_scaled_fp4(x, form=form)), x)


def test_bad_input_is_refused_with_what_came() -> None:
    for x, form, words in (
        (torch.ones(2, 32), "mxfp6", "form is 'mxfp6'"),
        (torch.ones(2, 48), "mxfp4", r"x is \[2, 48\]; expected blocks of 32"),
        (torch.ones(2, 24), "nvfp4", r"x is \[2, 24\]; expected blocks of 16"),
        (torch.ones(0, 32), "mxfp4", r"x is \[0, 32\]"),
        (torch.tensor(1.0), "nvfp4", r"x is \[\]"),
        (torch.full((1, 32), math.nan), "mxfp4", "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=words):
            block_scaled_fp4(x, form=form)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Any, seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


Step = Callable[..., Any]


def stepping(**steps: Any) -> Step:
    """An answer with some steps replaced."""
    return lambda x, *, form: lesson.written(x, form, **steps)


def refusing(is_bad: Callable[[Tensor], Any]) -> Step:
    def check(x: Tensor, form: str) -> None:
        lesson.check(torch.zeros_like(x), form)
        if bool(is_bad(x)):
            raise ValueError("not finite")

    return stepping(check=check)


def floored(floor: float) -> Step:
    """NVFP4 with a tensor scale of at least this."""
    return stepping(
        block_scale=lambda largest, scale: largest / 6 / scale.clamp(min=floor),
        nv_divisor=lambda scale, stored, wanted: scale.clamp(min=floor) * stored.float(),
    )


def shapes(allowed: Callable[[Tensor], bool]) -> Step:
    def answer(x: Tensor, *, form: str) -> Any:
        assert x.numel() == 0 or allowed(x)
        return stepping()(x, form=form)

    return answer


WRONG: dict[str, Step] = {
    "sum": refusing(lambda x: ~x.sum().isfinite()),
    "squares": refusing(lambda x: ~x.square().sum().isfinite()),
    "NaN alone": refusing(lambda x: x.isnan().any()),
    "Inf alone": refusing(lambda x: x.isinf().any()),
    "plus Inf and NaN": refusing(lambda x: (x.isnan() | (x == torch.inf)).any()),
    "minus Inf and NaN": refusing(lambda x: (x.isnan() | (x == -torch.inf)).any()),
    "first row": refusing(lambda x: ~x[0].isfinite().all()),
    "last row": refusing(lambda x: ~x[-1].isfinite().all()),
    "first block": refusing(lambda x: ~x[..., :16].isfinite().all()),
    **{f"tensor scale above {floor}": floored(floor) for floor in (1e-8, 1e-20, 1e-30)},
    "up to three dimensions": shapes(lambda x: x.dim() < 4),
    "several blocks": shapes(lambda x: x.shape[-1] > 16),
    "exponents up to 100": stepping(exponent=lambda largest: lesson.floor_exponent(largest).clamp(max=100)),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_wrong_somewhere_loses_points(name: str, seed: int) -> None:
    assert points_of(WRONG[name], seed) < found.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(stepping(), seed) == found.points
