"""The reference against float64 sums of codes computed apart and torch's fake quantization; its race in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.exercise import Rng, find
from llmcourse.lessons.quantization.decode_linear import Quantizer, Storages, variant

lesson = find("decode_linear")
decode_linear = lesson.reference
# bfloat16 rounds by at most 1 part in 256: the scale and the output, each once; sums in float32 add next to nothing.
RELATIVE = 2.0**-7 + 2.0**-15


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, 1] in float64, of scales in float32; ties do not occur in what is drawn here."""
    scales = weight.abs().amax(dim=1, keepdim=True).div(127).double()
    return (weight.double() / scales).round().nan_to_num(), scales


def assert_close(y: Tensor, weight: Tensor, x: Tensor) -> None:
    codes, scales = codes_of(weight)
    expected = (x.double() @ codes.T) * scales.T
    # Sums in float32 of K terms, in any order: K/2 roundings of what the terms add up to without their signs.
    summed = (x.double().abs() @ codes.abs().T) * scales.T * x.shape[1] * 2.0**-24
    # Where a weight lies within 1e-5 of a tie, float32 and float64 may take codes that differ by one.
    place = weight.double() / scales
    near = ((place - place.floor() - 0.5).abs() < 1e-5).double()
    allowed = RELATIVE * expected.abs() + summed + (x.double().abs() @ near.T) * scales.T
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= allowed.nan_to_num()).all())


@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (3, 16), (7, 80), (33, 48), (64, 64), (130, 256)])
def test_sums_of_codes_in_float64(seed, tokens, outputs, inputs):
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs) * 10 ** torch.empty(outputs, 1).uniform_(-6, 4)
    weight[:, 0] *= 8
    x = torch.randn(tokens, inputs).bfloat16()
    assert_close(decode_linear(weight)(x), weight, x)


def test_codes_are_those_of_torch(seed):
    torch.manual_seed(seed)
    scales = 2.0 ** torch.randint(-8, 3, (12,))
    weight = torch.randint(-253, 254, (12, 32)) / 2 * scales[:, None]  # half of them ties
    weight[:, 0] = 127 * scales
    quantized = torch.fake_quantize_per_channel_affine(
        weight, scales, torch.zeros(12, dtype=torch.int32), axis=0, quant_min=-127, quant_max=127
    )
    expected = quantized.double()  # at most 8 bits in units of the scale: bfloat16 holds it
    assert torch.equal(decode_linear(weight)(torch.eye(32).bfloat16()).double(), expected.T)


def test_a_row_of_zeros_beside_others_gives_zeros():
    weight = torch.zeros(3, 16)
    weight[1] = 1.0
    y = decode_linear(weight)(torch.ones(2, 16).bfloat16())
    assert torch.equal(y, torch.tensor([[0.0, 16.0, 0.0]] * 2).bfloat16())


def test_the_weight_is_neither_changed_nor_kept(seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(8, 32), torch.randn(2, 32).bfloat16()
    kept = weight.clone()
    run = decode_linear(weight)
    first = run(x)
    assert torch.equal(weight, kept)
    weight.fill_(torch.nan)
    assert torch.equal(run(x), first)


@pytest.mark.parametrize("power", [-126, -120, 0, 120])
def test_codes_are_kept_down_to_a_scale_that_is_the_smallest_normal_number(power):
    weight = torch.zeros(2, 16)
    weight[1, :4] = torch.tensor([-127.0, 3.0, 2.5, 100.0]) * 2.0**power
    y = decode_linear(weight)(torch.eye(16).bfloat16()[:4])
    assert torch.equal(y[:, 1], (torch.tensor([-127.0, 3.0, 2.0, 100.0]) * 2.0**power).bfloat16())


def test_of_a_parameter_neither_gradients_nor_memory_remain(seed):
    torch.manual_seed(seed)
    weight, x = torch.nn.Parameter(torch.randn(24, 64)), torch.randn(1, 64).bfloat16()
    with Storages() as storages:
        run = decode_linear(weight)
        y = run(x)
        assert not y.requires_grad
        assert torch.equal(y, decode_linear(weight.detach())(x))
        del weight, y
    assert storages.kept_bytes() <= 24 * 64 + 4 * 24 + x.nbytes


@pytest.mark.parametrize("offset", [0, 1, 2, 5, 8, 15, 16])
def test_tokens_may_begin_at_any_byte_that_bfloat16_may(seed, offset):
    torch.manual_seed(seed)
    weight, x = torch.randn(8, 64), torch.randn(1, 64 + offset).bfloat16()
    view = x[:, offset:]
    assert view.is_contiguous()
    assert torch.equal(decode_linear(weight)(view), decode_linear(weight)(view.clone()))


@pytest.mark.parametrize("inputs", [1, 8, 15, 17, 24, 40, 4095])
def test_a_width_that_the_kernel_cannot_read_is_refused(inputs):
    with pytest.raises(ValueError, match="multiple of 16"):
        decode_linear(torch.ones(2, inputs))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_without_a_scale_are_refused(value):
    weight = torch.ones(4, 16)
    weight[2, 7] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        decode_linear(weight)


@pytest.mark.parametrize("shape", [(16,), (1, 2, 16), (0, 16), (16, 0), ()])
def test_shapes_that_are_no_weight_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[N, K\]"):
        decode_linear(torch.ones(shape))


def test_drawn_layers_hold_no_tie_and_scales_that_bfloat16_holds(seed):
    weight = lesson.items["one_token_and_several"].function.__globals__["a_layer"](Rng(seed), 40, 64)
    codes, scales = codes_of(weight)
    assert torch.equal(scales, scales.bfloat16().double())
    assert bool((codes.abs().amax(dim=1) == 127).all())
    place = weight.double() / scales
    assert float((place - place.floor() - 0.5).abs().min()) > 9e-4


def test_a_storage_is_kept_as_long_as_a_view_of_it():
    storages = lesson.items["memory_of_a_layer"].function.__globals__["Storages"]()
    with storages:
        whole = torch.ones(6, 4) * 2
        part = whole[:2, :1]
    assert storages.kept_bytes() == 96
    del whole
    assert storages.kept_bytes() == 96
    del part
    assert storages.kept_bytes() == 0


def test_the_race_takes_its_layers_in_turn_and_says_of_each_lap_what_that_layer_gives(monkeypatch, seed):
    race = lesson.race
    assert race is not None
    monkeypatch.setitem(race.function.__globals__, "WIDTH", 32)
    monkeypatch.setitem(race.function.__globals__, "BLOCK_ROWS", 8)
    made: list[Tensor] = []
    used: list[int] = []

    def layer(weight: Tensor):
        made.append(weight)
        number = len(made) - 1
        return lambda x: (used.append(number), race.baseline(weight)(x))[1]

    run, x = race.function(layer, Rng(seed)), race.inputs(Rng(seed))
    outputs = [run(x) for _ in range(8)]
    assert used[:4] == used[4:] and sorted(used[:4]) == [0, 1, 2, 3]
    assert len({weight.data_ptr() for weight in made}) == 4
    assert x.dtype == torch.bfloat16 and x.shape == (1, 32)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def floor_of(smallest: float) -> Callable[[Tensor], object]:
    def scale(self: Quantizer, weight: Tensor) -> Tensor:
        return (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(smallest)

    return variant(scale=scale)


def refusing(broken: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    def refuse_values(self: Quantizer, weight: Tensor) -> None:
        if bool(broken(weight)):
            raise ValueError("NaN or Inf")

    return variant(refuse_values=refuse_values)


def float_copy_from(fewest: int) -> Callable[[Tensor], object]:
    """A float copy of what the codes stand for is kept from the first run of so many tokens on."""

    def product(self: Quantizer, x: Tensor) -> Tensor:
        if len(x) < fewest:
            return Quantizer.product(self, x)
        if not hasattr(self, "copy"):
            self.copy = self.codes.float() * self.scales[:, None]
        return torch.nn.functional.linear(x.float(), self.copy).bfloat16()

    return variant(product=product)


def float_copy_in_numpy(weight: Tensor) -> Callable[[Tensor], Tensor]:
    run = Quantizer(weight)
    kept = (run.codes.float() * run.scales[:, None]).numpy().copy()

    def product(x: Tensor) -> Tensor:
        if len(x) == 1:
            return run(x)
        return torch.from_numpy(x.detach().float().numpy() @ kept.T).bfloat16()

    return product


def zeros_from(fewest: int) -> Callable[[Tensor], object]:
    def product(self: Quantizer, x: Tensor) -> Tensor:
        return Quantizer.product(self, x) if len(x) < fewest else x.new_zeros(len(x), len(self.codes))

    return variant(product=product)


ATTACKS = {
    "float copy in numpy": float_copy_in_numpy,
    "zeros from 20 tokens": zeros_from(20),
    "zeros from 33 tokens": zeros_from(33),
    "zeros from 129 tokens": zeros_from(129),
    **{f"floor {smallest:g}": floor_of(smallest) for smallest in (1e-8, 1e-11, 1e-20, 1e-30, 1e-36)},
    "infinite sum": refusing(lambda weight: weight.sum().isinf()),
    "sum without a value": refusing(lambda weight: weight.sum().isnan()),
    "norm": refusing(lambda weight: ~weight.norm().isfinite()),
    "NaN alone": refusing(lambda weight: weight.isnan().any()),
    "Inf alone": refusing(lambda weight: weight.isinf().any()),
    "plus Inf alone": refusing(lambda weight: (weight.isnan() | (weight == torch.inf)).any()),
    "minus Inf alone": refusing(lambda weight: (weight.isnan() | (weight == -torch.inf)).any()),
    "largest value": refusing(lambda weight: ~weight.amax().isfinite()),
    "first row": refusing(lambda weight: ~weight[0].isfinite().all()),
    "last row": refusing(lambda weight: ~weight[-1].isfinite().all()),
    "first input": refusing(lambda weight: ~weight[:, 0].isfinite().all()),
    "float copy from 2 tokens": float_copy_from(2),
    "float copy from 3 tokens": float_copy_from(3),
    "float copy from 16 tokens": float_copy_from(16),
    "one output squeezed": variant(product=lambda self, x: Quantizer.product(self, x).squeeze(1)),
    "one token squeezed": variant(product=lambda self, x: Quantizer.product(self, x).squeeze(0)),
}


@pytest.mark.parametrize("name", ["nothing", *ATTACKS])
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name, seed):
    runner = judging.InProcess()
    expected = judging.expectations(runner, lesson, seed)
    answer = ATTACKS.get(name, Quantizer)
    verdict = judging.judge(runner, lesson, answer, seed, expected, naming=False, racing=False)
    assert (verdict.points == lesson.points) == (name == "nothing"), verdict.reason
