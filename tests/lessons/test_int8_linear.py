"""int8_linear against Python's integers, the float layer it stands for, and what it makes on the way."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from llmcourse.counting import TensorWork
from llmcourse.exercise import find

int8_linear = find("int8_linear").reference
EPS = torch.finfo(torch.float32).eps


def some_layer(
    seed: int, tokens: int, outputs: int, inputs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator) * 10 ** torch.randn(tokens, 1, generator=generator)
    codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, generator=generator) + 0.01
    return x, codes, scales, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 1, 2), (3, 5, 7), (8, 8, 8), (17, 3, 64), (2, 40, 33)]
)
def test_every_output_is_what_integers_and_fractions_give(
    seed: int, tokens: int, outputs: int, inputs: int
) -> None:
    x, codes, scales, bias = some_layer(seed, tokens, outputs, inputs)
    y = int8_linear(x, codes, scales, bias)
    assert (y.dtype, y.shape) == (torch.float32, (tokens, outputs))
    for t in range(tokens):
        token_scale = max(abs(x[t])) / 127  # float32, as the contract has it
        token_codes = [
            round(value) for value in (x[t] / token_scale).tolist()
        ]  # Python rounds ties to even too
        assert max(map(abs, token_codes)) == 127
        for n in range(outputs):
            total = sum(a * b for a, b in zip(token_codes, codes[n].tolist(), strict=True))
            product = total * Fraction(token_scale.item()) * Fraction(scales[n].item())
            exact = product + Fraction(bias[n].item())
            # int32 to float32, two products and a sum: half an eps each, of the product or of the result.
            room = EPS * (3 * abs(product) + abs(exact)) / 2 * (1 + 10 * EPS)
            assert abs(Fraction(y[t, n].item()) - exact) <= room


def test_the_result_is_within_half_a_step_of_the_float_layer_for_every_input(seed: int) -> None:
    x, codes, scales, bias = some_layer(seed, 6, 9, 50)
    weight = codes.double() * scales.double()[:, None]
    floats = torch.nn.functional.linear(x.double(), weight, bias.double())
    half_a_step = x.double().abs().amax(dim=1, keepdim=True) / 127 / 2
    # |x - its code times the scale| is at most half a step, and some eps of the largest code for x / scale.
    room = half_a_step * weight.abs().sum(dim=1) * (1 + 2 * 127 * 4 * EPS) + 4 * EPS * floats.abs()
    error = (int8_linear(x, codes, scales, bias).double() - floats).abs()
    assert (error <= room).all()
    assert error.max() > 0


def test_sums_beyond_16_bits_and_beyond_the_integers_of_float32_are_kept() -> None:
    inputs = 4096
    sums = int8_linear(
        torch.full((1, inputs), 127.0), torch.full((2, inputs), 127, dtype=torch.int8), torch.ones(2)
    )
    assert sums.tolist() == [
        [127 * 127 * inputs] * 2
    ]  # 66,064,384 has 6 zero bits at its end: float32 holds it
    codes = torch.full((1, 1040), 127, dtype=torch.int8)
    codes[0, 0] = 126
    assert int8_linear(torch.full((1, 1040), 127.0), codes, torch.ones(1)).item() == 127 * (127 * 1040 - 1)


def test_int32_holds_as_many_products_as_the_statement_says() -> None:
    assert 132_104 * 127 * 128 < 2**31 <= 132_105 * 127 * 128
    assert "132,104" in (int8_linear.__doc__ or "")


def test_tokens_do_not_depend_on_what_they_are_batched_with(seed: int) -> None:
    x, codes, scales, bias = some_layer(seed, 7, 5, 12)
    together = int8_linear(x, codes, scales, bias)
    for t in range(len(x)):
        assert torch.equal(int8_linear(x[t : t + 1], codes, scales, bias)[0], together[t])


@pytest.mark.parametrize("loudness", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_a_power_of_two_in_the_loudness_comes_out_as_that_power(seed: int, loudness: float) -> None:
    x, codes, scales, _ = some_layer(seed, 4, 5, 12)
    power = 2.0 ** round(torch.tensor(loudness).log2().item())
    x = x / x.abs().amax(dim=1, keepdim=True)  # else 1e30 times a token of 1e6 sums up to infinity
    assert torch.equal(int8_linear(x * power, codes, scales), int8_linear(x, codes, scales) * power)


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-44])
def test_a_token_of_zeros_or_next_to_it_gives_the_bias(seed: int, zero: float) -> None:
    _, codes, scales, bias = some_layer(seed, 1, 5, 12)
    assert torch.equal(int8_linear(torch.full((3, 12), zero), codes, scales, bias), bias.expand(3, -1))


def test_one_product_runs_and_nothing_larger_than_the_codes_is_made(seed: int) -> None:
    x, codes, scales, bias = some_layer(seed, 4, 96, 64)
    with TensorWork() as work:
        int8_linear(x, codes, scales, bias)
    assert (work.calls["aten._int_mm"], work.flops) == (1, 0)
    assert work.largest_tensor_bytes <= codes.nbytes
    with TensorWork() as fake:
        torch.nn.functional.linear(x, codes.float() * scales[:, None], bias)
    assert fake.flops > 0
    assert fake.largest_tensor_bytes == 4 * codes.nbytes


def test_bfloat16_activations_are_widened_before_anything_else(seed: int) -> None:
    x, codes, scales, bias = some_layer(seed, 4, 6, 20)
    narrow = x.bfloat16()
    found = int8_linear(narrow, codes, scales, bias)
    assert found.dtype == torch.float32
    assert torch.equal(found, int8_linear(narrow.float(), codes, scales, bias))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_activations_are_refused(bad: float) -> None:
    x, codes, scales, _ = some_layer(0, 3, 4, 5)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        int8_linear(x, codes, scales)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda x, w, s, b: (x[:, 1:], w, s, b), "do not fit codes"),
        (lambda x, w, s, b: (x[None], w, s, b), "do not fit codes"),
        (lambda x, w, s, b: (x, w, s[:, None], b), "do not fit codes"),
        (lambda x, w, s, b: (x, w, s[1:], b), "do not fit codes"),
        (lambda x, w, s, b: (x, w, s, b[:1]), "bias"),
        (lambda x, w, s, b: (x[:0], w, s, b), "expected values"),
        (lambda x, w, s, b: (x[:, :0], w[:, :0], s, b), "expected values"),
        (lambda x, w, s, b: (x, w[:0], s[:0], b[:0]), "expected values"),
        (lambda x, w, s, b: (x, w[0], s, b), "values to unpack"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(cut, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_linear(*cut(*some_layer(0, 3, 4, 5)))
