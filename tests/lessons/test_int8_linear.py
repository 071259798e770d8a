"""int8_linear against Python's integers, the float layer it stands for, and what it makes on the way."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.quantization.int8_linear import Layer, variant

exercise = find("int8_linear")
int8_linear = exercise.reference
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


@pytest.mark.parametrize("power", [-126, -120, 0, 120])
def test_codes_are_kept_down_to_a_scale_that_is_the_smallest_normal_number(power: int) -> None:
    x = torch.tensor([[-127.0, 3.0, 2.5, 100.0]]) * 2.0**power
    found = int8_linear(x, torch.eye(4, dtype=torch.int8), torch.ones(4))
    assert torch.equal(found, torch.tensor([[-127.0, 3.0, 2.0, 100.0]]) * 2.0**power)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_are_widened_before_anything_else(seed: int, dtype: torch.dtype) -> None:
    x, codes, scales, bias = some_layer(seed, 4, 6, 20)
    narrow = x.to(dtype)
    found = int8_linear(narrow, codes, scales, bias)
    assert found.dtype == torch.float32
    assert torch.equal(found, int8_linear(narrow.float(), codes, scales, bias))


def test_a_product_of_scales_that_is_subnormal_costs_no_bits() -> None:
    x = torch.tensor([[127.0, 126.0]]) * 2.0**-126
    y = int8_linear(x, torch.tensor([[127, 127]], dtype=torch.int8), torch.tensor([1e-3]))
    exact = 127 * (127 + 126) * Fraction(2) ** -126 * Fraction(torch.tensor(1e-3).item())
    assert abs(Fraction(y.item()) / exact - 1) <= 2 * EPS


def test_a_loud_token_whose_sum_times_its_scale_is_beyond_float32_gives_what_float32_holds() -> None:
    y = int8_linear(
        torch.tensor([[3e38, 1e38]]), torch.tensor([[127, -128]], dtype=torch.int8), torch.tensor([1e-3])
    )
    assert y.item() == pytest.approx((127 * 127 - 42 * 128) * 3e38 / 127 * 1e-3, rel=1e-5)


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
        (lambda x, w, s, b: (x[0], w, s, b), "do not fit codes"),
        (lambda x, w, s, b: (x[:, 0], w[:, :3], s, b), "do not fit codes"),
        (lambda x, w, s, b: (x, w, s[:, None], b), "do not fit codes"),
        (lambda x, w, s, b: (x, w, s[1:], b), "do not fit codes"),
        (lambda x, w, s, b: (x, w, s, b[:1]), "bias"),
        (lambda x, w, s, b: (x[:0], w, s, b), "expected values"),
        (lambda x, w, s, b: (x[:, :0], w[:, :0], s, b), "expected values"),
        (lambda x, w, s, b: (x, w[:0], s[:0], b[:0]), "expected values"),
        (lambda x, w, s, b: (x[0, 0], w, s, b), "do not fit codes"),
        (lambda x, w, s, b: (x, w[0], s, b), "do not fit codes"),
        (lambda x, w, s, b: (x, w[..., None], s, b), "do not fit codes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(cut, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_linear(*cut(*some_layer(0, 3, 4, 5)))


def floor_of(smallest: float) -> Callable[..., Tensor]:
    def scale(self: Layer, x: Tensor) -> Tensor:
        return (x.abs().amax(dim=1, keepdim=True) / 127).clamp_min(smallest)

    return variant(scale=scale)


def refusing(broken: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def refuse_values(self: Layer, x: Tensor) -> None:
        if bool(broken(x)):
            raise ValueError("NaN or Inf")

    return variant(refuse_values=refuse_values)


def integers_where(fits: Callable[[Tensor, Tensor], bool]) -> Callable[..., Tensor]:
    """A product of floats for all other shapes, and it is right: the sums are below 2^53."""

    def product(self: Layer, token_codes: Tensor, codes: Tensor) -> Tensor:
        if fits(token_codes, codes):
            return torch._int_mm(token_codes, codes.T)
        return (token_codes.double() @ codes.double().T).int()

    return variant(product=product)


def looking_at(size: Callable[[Tensor], int], *, of: str) -> Callable[..., Tensor]:
    """Looks at one number of the scales or of the bias, where the whole shape has to fit."""

    def refuse(self: Layer, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        given = {"scales": scales, "bias": bias}
        found = given[of]
        if found is not None and size(found) == len(codes):
            given[of] = torch.ones(len(codes))
        Layer.refuse(self, x, codes, given["scales"], given["bias"])

    return variant(refuse=refuse)


def batches_flattened(x: Tensor, *arguments: Any) -> Tensor:
    if x.dim() < 2:
        return variant()(x[None], *arguments)[0]
    return variant()(x.flatten(0, -2), *arguments).unflatten(0, x.shape[:-1])


def a_small_product_for_show(self: Layer, token_codes: Tensor, codes: Tensor) -> Tensor:
    torch._int_mm(token_codes[:1, :2], codes[:1, :2].T)
    return torch.stack([(codes.short() * token).sum(dim=1) for token in token_codes])


ATTACKS = {
    **{f"floor {smallest:g}": floor_of(smallest) for smallest in (1e-8, 1e-11, 1e-20, 1e-30, 1e-37, 2.3e-38)},
    "infinite sum": refusing(lambda x: x.sum().isinf()),
    "sum without a value": refusing(lambda x: x.sum().isnan()),
    "sum": refusing(lambda x: ~x.sum().isfinite()),
    "norm": refusing(lambda x: ~x.float().norm().isfinite()),
    "plus Inf alone": refusing(lambda x: (x.isnan() | (x == torch.inf)).any()),
    "minus Inf alone": refusing(lambda x: (x.isnan() | (x == -torch.inf)).any()),
    "Inf alone": refusing(lambda x: x.isinf().any()),
    "largest value": refusing(lambda x: ~x.amax().isfinite()),
    "first token": refusing(lambda x: ~x[0].isfinite().all()),
    "last token": refusing(lambda x: ~x[-1].isfinite().all()),
    "first input": refusing(lambda x: ~x[:, 0].isfinite().all()),
    "floats where K is no multiple of 8": integers_where(lambda x, codes: x.shape[1] % 8 == 0),
    "floats where K is odd": integers_where(lambda x, codes: x.shape[1] % 2 == 0),
    "floats where N is odd": integers_where(lambda x, codes: len(codes) % 2 == 0),
    "floats for an output": integers_where(lambda x, codes: len(codes) > 1),
    "floats for a token": integers_where(lambda x, codes: len(x) > 1),
    "floats for few tokens": integers_where(lambda x, codes: len(x) > 16),
    "floats for many tokens": integers_where(lambda x, codes: len(x) <= 16),
    "floats for very many tokens": integers_where(lambda x, codes: len(x) < 18),
    "floats for many inputs": integers_where(lambda x, codes: x.shape[1] < 1000),
    "a small product for show": variant(product=a_small_product_for_show),
    **{
        f"{name} of {of}": looking_at(size, of=of)
        for of in ("scales", "bias")
        for name, size in {"width": lambda t: t.shape[-1], "size": Tensor.numel, "length": len}.items()
    },
    "float16 as it is": variant(widened=lambda self, x: x if x.dtype == torch.float16 else x.float()),
    "bfloat16 as it is": variant(widened=lambda self, x: x if x.dtype == torch.bfloat16 else x.float()),
    "any number of dimensions": batches_flattened,
    "one output squeezed": lambda *given: variant()(*given).squeeze(1),
    "one token squeezed": lambda *given: variant()(*given).squeeze(0),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points < exercise.points


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason
