"""LoRALinear against the dense layer it stands for in float64, sums written out, and published parameter counts."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.LoRALinear import Steps
from llmcourse.sizing import PUBLIC_CONFIGS, lora_parameters

exercise = find("LoRALinear")
LoRALinear = exercise.reference
SHAPES = [(7, 12, 3, True), (12, 7, 2, False), (5, 9, 5, True), (6, 4, 1, False)]


def some_layer(
    seed: int, inputs: int, outputs: int, rank: int, bias: bool, *, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Linear]:
    """A layer with random A and B, and its base."""
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias, dtype=dtype)
    layer = LoRALinear(base, rank, 2.5)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer, base


def dense(layer: nn.Module, base: nn.Linear, alpha_over_rank: float) -> Tensor:
    """W + (alpha / rank) B A in float64, entry by entry, without a matrix product."""
    weight = base.weight.detach().double().clone()
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            weight[o, i] += alpha_over_rank * sum(b[o, k] * a[k, i] for k in range(len(a)))
    return weight


@pytest.mark.parametrize(("inputs", "outputs", "rank", "bias"), SHAPES)
def test_output_and_gradients_are_those_of_the_dense_layer(
    seed: int, inputs: int, outputs: int, rank: int, bias: bool
) -> None:
    layer, base = some_layer(seed, inputs, outputs, rank, bias)
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, outputs, dtype=torch.float64)
    y = layer(x)
    y.backward(g)
    weight = dense(layer, base, 2.5 / rank)
    expected = torch.einsum("oi,...i->...o", weight, x.detach()) + (base.bias.detach() if bias else 0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, torch.einsum("oi,...o->...i", weight, g))
    # dL/dW of a dense layer, which the chain rule carries on to A and B.
    of_weight = torch.einsum("...o,...i->oi", g, x.detach()) * 2.5 / rank
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.detach().T @ of_weight)
    torch.testing.assert_close(layer.lora_B.grad, of_weight @ layer.lora_A.detach().T)
    assert base.weight.grad is None
    assert base.bias is None or base.bias.grad is None


def test_four_numbers_by_hand() -> None:
    base = nn.Linear(2, 2)
    layer = LoRALinear(base, 1, 3)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        base.bias.copy_(torch.tensor([0.5, 0.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
    # A x = 10 + 40 = 50; 3 B A x = (150, -150); base(x) = (10.5, 20).
    assert layer(torch.tensor([10.0, 20.0])).tolist() == [160.5, -130.0]
    layer.merge()
    assert base.weight.tolist() == [[4.0, 6.0], [-3.0, -5.0]]
    assert layer(torch.tensor([10.0, 20.0])).tolist() == [160.5, -130.0]
    layer.unmerge()
    assert base.weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_gives_what_its_base_gives_bit_for_bit(seed: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(seed)
    base = nn.Linear(11, 6, bias, dtype=dtype)
    x = torch.randn(4, 11, dtype=dtype)
    plain = base(x).clone()
    layer = LoRALinear(base, 3, 16, 0.5)
    assert torch.equal(layer(x), plain)
    assert layer(x).dtype == dtype
    assert layer.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.base is base


@pytest.mark.parametrize("inputs", [64, 100, 1000])
def test_a_is_as_loud_as_one_over_the_root_of_in(seed: int, inputs: int) -> None:
    torch.manual_seed(seed)
    drawn = LoRALinear(nn.Linear(inputs, 60), 60, 1).lora_A.detach()
    # The spread of n draws is known to 1 / sqrt(2 n); six of those.
    assert abs(drawn.std() * inputs**0.5 - 1) < 6 / (2 * drawn.numel()) ** 0.5
    assert abs(drawn.mean() * inputs**0.5) < 6 / drawn.numel() ** 0.5


@pytest.mark.parametrize(("inputs", "outputs", "rank", "bias"), SHAPES)
def test_merging_is_exact_up_to_rounding_and_happens_once(
    seed: int, inputs: int, outputs: int, rank: int, bias: bool
) -> None:
    layer, base = some_layer(seed, inputs, outputs, rank, bias)
    before, merged = base.weight.clone(), dense(layer, base, 2.5 / rank)
    x = torch.randn(4, inputs, dtype=torch.float64)
    y = layer(x)
    for _ in range(3):
        layer.merge()
        torch.testing.assert_close(base.weight.detach(), merged)
        torch.testing.assert_close(layer(x), y)
        assert not base.weight.requires_grad
        assert not layer(x).requires_grad
    for _ in range(3):
        layer.unmerge()
        torch.testing.assert_close(base.weight, before)
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_unmerging_a_narrow_weight_restores_it_to_the_last_bits(
    seed: int, dtype: torch.dtype, bits: int
) -> None:
    layer, base = some_layer(seed, 30, 40, 4, False, dtype=dtype)
    before = base.weight.double()
    layer.merge()
    merged = base.weight.double()
    layer.unmerge()
    # Two sums, each rounded by at most half a step: 2^-bits of the largest value of its binade; float32 adds little.
    room = (merged.abs() + before.abs()) * 2.0**-bits * 1.01 + 2.0**-23
    assert ((base.weight.double() - before).abs() <= room).all()


def test_merging_into_bfloat16_loses_an_update_below_half_a_step() -> None:
    base = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base, 1, 1.0)
    with torch.no_grad():
        base.weight.fill_(1.0)
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(2**-10)  # half a step above 1 is 2^-8
    layer.merge()
    assert (base.weight == 1).all()


def test_only_a_and_b_are_trained(seed: int) -> None:
    layer, _ = some_layer(seed, 7, 12, 3, True)
    trained = {name: part.shape for name, part in layer.named_parameters() if part.requires_grad}
    assert trained == {"lora_A": (3, 7), "lora_B": (12, 3)}
    optimizer = torch.optim.AdamW([part for part in layer.parameters() if part.requires_grad], foreach=False)
    layer(torch.randn(2, 7, dtype=torch.float64)).sum().backward()
    optimizer.step()
    held = sum(part.nbytes for state in optimizer.state.values() for part in state.values() if part.dim() > 0)
    assert held == 2 * 8 * 3 * (7 + 12)


LLAMA = PUBLIC_CONFIGS["Llama-3.1-8B"]


def llama_projections() -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linear layers of a block."""
    hidden, mlp = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    keys = LLAMA["num_key_value_heads"] * (hidden // LLAMA["num_attention_heads"])
    return {
        "q": (hidden, hidden),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (hidden, hidden),
        "gate": (hidden, mlp),
        "up": (hidden, mlp),
        "down": (mlp, hidden),
    }


@pytest.mark.parametrize(("which", "expected"), [("qkvo", 13_631_488), ("all seven", 41_943_040)])
def test_trained_parameters_of_llama_8b_at_rank_16(which: str, expected: int) -> None:
    chosen = [
        shape
        for name, shape in llama_projections().items()
        if which == "all seven" or name in ("q", "k", "v", "o")
    ]
    assert LLAMA["num_hidden_layers"] * sum(16 * (i + o) for i, o in chosen) == expected
    assert lora_parameters(LLAMA, rank=16, mlp=which == "all seven") == expected
    layers = [LoRALinear(nn.Linear(i, o, bias=False, device="meta"), 16, 32) for i, o in chosen]
    counted = sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)
    assert LLAMA["num_hidden_layers"] * counted == expected
    assert {p.device.type for layer in layers for p in layer.parameters()} == {"meta"}


def test_work_is_what_the_statement_says(seed: int) -> None:
    layer, base = some_layer(seed, 80, 96, 4, True, dtype=torch.float32)
    x = torch.randn(5, 80, requires_grad=True)
    with TensorWork() as work:
        layer(x).sum().backward()
    assert work.flops == 4 * 5 * 80 * 96 + 6 * 5 * 4 * (80 + 96)
    assert work.largest_tensor_bytes < base.weight.nbytes
    layer.merge()
    with TensorWork() as merged:
        layer(x)
    assert merged.flops == 2 * 5 * 80 * 96


def test_dropout_keeps_its_mean_and_drops_every_input_by_itself(seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.Linear(6, 6, bias=False)
    layer = LoRALinear(base, 6, 6.0, 0.3)
    with torch.no_grad():
        base.weight.zero_()
        layer.lora_A.copy_(torch.eye(6))
        layer.lora_B.copy_(torch.eye(6))
    rows = 20_000
    y = layer(torch.ones(rows, 6)).detach().double()
    zero = y == 0
    torch.testing.assert_close(y[~zero], torch.full_like(y[~zero], 1 / 0.7), rtol=1e-6, atol=0)
    # Binomial: six standard deviations, for each input and for each pair of inputs.
    assert ((zero.double().mean(dim=0) - 0.3).abs() < 6 * (0.3 * 0.7 / rows) ** 0.5).all()
    both = (zero.double().T @ zero.double() / rows)[~torch.eye(6, dtype=torch.bool)]
    assert ((both - 0.09).abs() < 6 * (0.09 * 0.91 / rows) ** 0.5).all()
    layer.eval()
    assert torch.equal(layer(torch.ones(2, 6)), torch.ones(2, 6))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("was_merged", [False, True])
def test_a_checkpoint_carries_whether_it_is_merged(seed: int, merged: bool, was_merged: bool) -> None:
    layer, base = some_layer(seed, 7, 12, 3, True)
    other, other_base = some_layer(seed + 1, 7, 12, 3, True)
    x, before = torch.randn(4, 7, dtype=torch.float64), base.weight.clone()
    if merged:
        layer.merge()
    if was_merged:
        other.merge()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    other.unmerge()
    torch.testing.assert_close(other_base.weight, before)
    assert {"base.weight", "base.bias", "lora_A", "lora_B"} <= set(layer.state_dict())


def test_a_deep_copy_is_a_layer_of_its_own(seed: int) -> None:
    layer, base = some_layer(seed, 7, 12, 3, True)
    before = base.weight.clone()
    copy.deepcopy(layer).merge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize(
    ("rank", "dropout", "message"),
    [(0, 0.0, "rank 0"), (-3, 0.0, "rank -3"), (6, 0.0, "rank 6"), (2, 1.0, "dropout"), (2, -0.1, "dropout")],
)
def test_ranks_and_rates_out_of_range_are_refused(rank: int, dropout: float, message: str) -> None:
    for base in (nn.Linear(5, 8), nn.Linear(8, 5)):
        with pytest.raises(ValueError, match=message):
            LoRALinear(base, rank, 1.0, dropout)
        assert LoRALinear(base, 5, 1.0)


def test_a_rational_example_is_exact() -> None:
    layer, base = some_layer(0, 3, 2, 2, False)
    values = [Fraction(n, 8) for n in range(-6, 6)]
    with torch.no_grad():
        base.weight.copy_(torch.tensor([float(v) for v in values[:6]]).view(2, 3))
        layer.lora_A.copy_(torch.tensor([float(v) for v in values[4:10]]).view(2, 3))
        layer.lora_B.copy_(torch.tensor([float(v) for v in values[6:10]]).view(2, 2))
    x = [Fraction(3), Fraction(-1, 2), Fraction(5, 4)]
    w, a, b = [values[:3], values[3:6]], [values[4:7], values[7:10]], [values[6:8], values[8:10]]
    thin = [sum(p * q for p, q in zip(row, x, strict=True)) for row in a]
    exact = [
        sum(p * q for p, q in zip(w[o], x, strict=True))
        + Fraction(5, 4) * sum(p * q for p, q in zip(b[o], thin, strict=True))  # 2.5 / 2
        for o in range(2)
    ]
    found = layer(torch.tensor([float(v) for v in x], dtype=torch.float64)).tolist()
    assert found == [float(v) for v in exact]


# ----------------------------------------------------------------------------------------------------- attacks


class DenseInBatches(Steps):
    def update(self, x: Tensor) -> Tensor:
        if x.dim() < 3:
            return super().update(x)
        return nn.functional.linear(self.thin(x), self.product())


class KeepsTheProduct(Steps):
    """unmerge() takes off the product that merge() kept, and nothing where another process merged."""

    added: Tensor | float = 0.0

    def merge(self) -> None:
        if not self.is_merged:
            self.added = self.product().data.to(self.base.weight.dtype)
        super().merge()

    def unmerge(self) -> None:
        if self.is_merged:
            self.base.weight.data -= self.added
        self.is_merged.fill_(0)


class MergedByClass(Steps):
    """One flag for all layers."""

    shared = torch.zeros((), dtype=torch.uint8)

    def flag(self) -> None:
        self.shared.fill_(0)
        self.register_buffer("is_merged", self.shared)


class ProductOfTheFirstCall(Steps):
    """Caches (alpha / rank) B A."""

    cached: Tensor | None = None

    def update(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.product()
        return nn.functional.linear(self.thin(x), self.cached)


class NoBatches(Steps):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1]))


class MergedWithoutBias(Steps):
    def merged(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight)


class DropsAfterMerge(Steps):
    def merged(self, x: Tensor) -> Tensor:
        return self.base(self.drop(x))


class DropsTheOutput(Steps):
    def update(self, x: Tensor) -> Tensor:
        return self.drop(x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T * self.scale)


class TrainedScale(Steps):
    def make(self, rank: int, base: nn.Linear) -> None:
        super().make(rank, base)
        self.scale = nn.Parameter(torch.tensor(float(self.scale)))


class SavesOnlyAAndB(Steps):
    def state_dict(self, *arguments, **options):
        return {k: v for k, v in super().state_dict(*arguments, **options).items() if "base" not in k}


class DetachedB(Steps):
    def update(self, x: Tensor) -> Tensor:
        return self.thin(x) @ self.lora_A.T @ self.lora_B.detach().T * self.scale


class HalfAlwaysBfloat16(Steps):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.bfloat16() if y.dtype == torch.float16 else y


ATTACKS = {
    attack.__name__: attack
    for attack in (
        *(DenseInBatches, KeepsTheProduct, MergedByClass, ProductOfTheFirstCall, NoBatches),
        *(MergedWithoutBias, DropsAfterMerge, DropsTheOutput, TrainedScale, SavesOnlyAAndB, DetachedB),
        *(HalfAlwaysBfloat16, nn.Linear),
    )
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
    verdict = judging.judge(runner, exercise, Steps, seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason
