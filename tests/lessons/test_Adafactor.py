"""Adafactor against torch.optim.Adafactor, plain Python numbers, and cases whose result is known beforehand."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from llmcourse import judging
from llmcourse.agreement import difference
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.Adafactor import Written, state_bytes

exercise = find("Adafactor")
Adafactor: Any = exercise.reference
SHAPES = [(3, 5), (5, 3), (2, 3, 4), (2, 1, 3, 2), (7,), (), (1, 6), (6, 1)]


def drawn(seed: int, dtype: torch.dtype, shapes: Any = SHAPES) -> tuple[list[Parameter], torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=dtype) * 10.0 ** (i % 3 - 1))
        for i, shape in enumerate(shapes)
    ], generator


def same(optimizer: Any, *, options: dict[str, Any], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Eight steps with gradients of scales from 1e-8 to 1e3, some missing, and another lr from the fifth on."""
    parameters, generator = drawn(seed, dtype)
    given = optimizer([{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.3}], **options)
    for step in range(8):
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            size = 10.0 ** ((index * 5) % 12 - 8) * (20 if step == 3 else 1)
            parameter.grad = None if (step + index) % 4 == 1 else gradient * size
        if step == 4:
            given.param_groups[0]["lr"] = 0.7
        given.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.5, "weight_decay": 0.1},
        {"lr": 0.05, "eps": (1e-15, 0.3), "d": 1.5},
        {"lr": 0.05, "eps": (1e-2, 1e-3), "beta2_decay": -0.3},
        {"beta2_decay": 0.0, "d": 3.0},
        {"lr": 0.0, "weight_decay": 0.5},
    ],
    ids=str,
)
def test_weights_equal_torchs(seed: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    expected = same(torch.optim.Adafactor, options=options, seed=seed, dtype=dtype)
    assert difference(same(Adafactor, options=options, seed=seed, dtype=dtype), expected) is None


def by_hand(
    weight: list[list[float]], gradients: list[list[list[float]]], lr: float, d: float, decay: float
) -> list[list[float]]:
    """A matrix in Python numbers, from the formulas of the statement, with an eps1 of 0."""
    rows, cols = len(weight), len(weight[0])
    places = [(i, j) for i in range(rows) for j in range(cols)]
    r, c = [0.0] * rows, [0.0] * cols
    for t, g in enumerate(gradients, start=1):
        beta2 = 1 - t**-0.8
        rms = math.sqrt(math.fsum(weight[i][j] ** 2 for i, j in places) / len(places))
        alpha = max(1e-3, rms) * min(lr, 1 / math.sqrt(t))
        for i in range(rows):
            r[i] = beta2 * r[i] + (1 - beta2) * math.fsum(g[i][j] ** 2 for j in range(cols)) / cols
        for j in range(cols):
            c[j] = beta2 * c[j] + (1 - beta2) * math.fsum(g[i][j] ** 2 for i in range(rows)) / rows
        mean = math.fsum(r) / rows
        u = {(i, j): g[i][j] / math.sqrt(r[i] * c[j] / mean) for i, j in places}
        size = math.sqrt(math.fsum(value**2 for value in u.values()) / len(u))
        for i, j in places:
            weight[i][j] -= lr * decay * weight[i][j] + alpha * u[i, j] / max(1, size / d)
    return weight


def test_weights_equal_python_numbers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    gradients = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    gradients[3] *= 50
    expected = by_hand(weight.tolist(), gradients.tolist(), lr=0.5, d=1.25, decay=0.1)
    parameter = Parameter(weight.clone())
    optimizer = Adafactor([parameter], lr=0.5, eps=(1e-30, 1e-3), d=1.25, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    assert difference(parameter.detach(), torch.tensor(expected, dtype=torch.float64)) is None


def test_a_square_that_is_a_product_loses_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.rand(4, 1, generator=generator) + 0.1, torch.rand(1, 6, generator=generator) + 0.1
    signs = torch.randn(4, 6, generator=generator).sign()
    parameter = Parameter(torch.full((4, 6), 2.0))
    optimizer = Adafactor([parameter], lr=0.25)
    parameter.grad = rows * columns * signs
    optimizer.step()
    # V = g^2, so U is the sign, its RMS is 1, and the step is 0.25 of the RMS of the weights, 2.
    torch.testing.assert_close(parameter.detach(), 2 - 0.5 * signs)
    whole = Parameter(torch.full((4, 6), 2.0))
    unfactored = exercise.mistakes["NotFactored"].function([whole], lr=0.25)
    whole.grad = parameter.grad.clone()
    unfactored.step()
    torch.testing.assert_close(whole.detach(), parameter.detach())


def test_the_four_numbers_of_the_smallest_example() -> None:
    # g^2 = [[1, 4], [4, 1]]: rows and columns have a mean of 2.5 each, so V is 2.5 everywhere and U is g / sqrt(2.5).
    parameter = Parameter(torch.ones(2, 2))
    parameter.grad = torch.tensor([[1.0, 2.0], [2.0, -1.0]])
    Adafactor([parameter], lr=0.1).step()
    expected = 1 - 0.1 * torch.tensor([[1.0, 2.0], [2.0, -1.0]]) / math.sqrt(2.5)
    torch.testing.assert_close(parameter.detach(), expected)


def test_a_louder_gradient_gives_the_same_weights(seed: int) -> None:
    results = []
    for size in (2.0**-30, 1.0, 2.0**20):
        parameters, generator = drawn(seed, torch.float64)
        optimizer = Adafactor(parameters, eps=(1e-60, 1e-3))
        for _ in range(3):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = gradient * size
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert difference(results[0], results[1]) is None
    assert difference(results[2], results[1]) is None


def test_no_step_is_larger_than_its_share_of_the_weights(seed: int) -> None:
    parameters, generator = drawn(seed, torch.float64)
    optimizer = Adafactor(parameters, lr=0.1)
    for step in range(6):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 9**step
        optimizer.step()
        for old, parameter in zip(before, parameters, strict=True):
            moved, size = (old - parameter.detach()).square().mean().sqrt(), old.square().mean().sqrt()
            assert moved <= 0.1 * max(size, torch.tensor(1e-3)) * (1 + 1e-12)


@pytest.mark.parametrize("eps1", [None, 1e-30])
def test_zeros_move_nothing(eps1: float | None) -> None:
    parameters = [Parameter(torch.ones(3, 4)), Parameter(torch.ones(5)), Parameter(torch.ones(2, 2, 2))]
    optimizer = Adafactor(parameters, eps=(eps1, 1e-3))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter.detach(), torch.ones_like(parameter)) for parameter in parameters)


@pytest.mark.parametrize(
    ("shape", "numbers"), [((64, 32), 96), ((3, 8, 10), 54), ((2, 3, 4, 5), 54), ((50,), 50), ((), 1)]
)
def test_the_state_is_rows_and_columns(shape: tuple[int, ...], numbers: int) -> None:
    parameter = Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    optimizer = Adafactor([parameter])
    optimizer.step()
    assert state_bytes(optimizer.state_dict()["state"]) == 4 * numbers + 8


def test_bytes_are_counted_by_storage() -> None:
    assert state_bytes({0: {"t": 3, "v": torch.zeros(10, 10)[:, 0]}}) == 8 + 400
    assert state_bytes([torch.zeros(3), (torch.zeros(2, dtype=torch.float64),)]) == 12 + 16


def test_a_resume_goes_on_bit_by_bit(seed: int) -> None:
    def steps(parameters: list[Parameter], optimizer: Any, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(seed + number)
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if (index + number) % 3 == 0:
                    parameter.grad = None
            optimizer.step()

    through, _ = drawn(seed, torch.float32)
    optimizer = Adafactor(through, lr=0.5)
    steps(through, optimizer, range(3))
    written = io.BytesIO()
    torch.save((optimizer.state_dict(), [parameter.detach() for parameter in through]), written)
    steps(through, optimizer, range(3, 7))

    written.seek(0)
    state, weights = torch.load(written, weights_only=True)
    resumed = [Parameter(weight) for weight in weights]
    other = Adafactor(resumed)
    other.load_state_dict(state)
    steps(resumed, other, range(3, 7))
    for one, two in zip(through, resumed, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1e-9},
        {"lr": math.nan},
        {"eps": (-1e-9, 1e-3)},
        {"eps": (None, -1e-9)},
        {"eps": (math.nan, 1e-3)},
        {"weight_decay": -0.1},
        {"beta2_decay": 0.1},
        {"beta2_decay": math.nan},
        {"d": 0.99},
        {"d": math.nan},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        Adafactor([Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_stops_the_step_before_anything_moves(bad: float) -> None:
    parameters = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4))]
    optimizer = Adafactor(parameters)
    parameters[0].grad, parameters[1].grad = torch.ones(2, 3), torch.tensor([1.0, bad, 1.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(parameter.detach(), torch.ones_like(parameter)) for parameter in parameters)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_gradients_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    parameter = Parameter(torch.ones(2, 3, dtype=dtype))
    parameter.grad = torch.ones(2, 3, dtype=dtype)
    with pytest.raises(ValueError, match="expected dense float32 or float64"):
        Adafactor([parameter]).step()


def test_sparse_gradients_are_refused() -> None:
    parameter = Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        Adafactor([parameter]).step()


def test_what_torchs_base_class_refuses() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Adafactor([])
    two = Adafactor([Parameter(torch.ones(2)), Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="doesn't match the size"):
        Adafactor([Parameter(torch.ones(2))]).load_state_dict(two.state_dict())


# What may pass as Adafactor at a glance.


class TorchsWay(Written):
    """The options at their defaults whatever is given."""

    def __init__(self, params, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
        super().__init__(params, lr, beta2_decay, eps, 1.0, weight_decay)


class OfTheFirstStep(Written):
    """One option as it was in the first step."""

    option: str

    def one(self, p, g, group, state):
        first = group.setdefault("first", group[self.option])
        super().one(p, g, {**group, self.option: first}, state)


class DecayOfTheFirstStep(OfTheFirstStep):
    option = "beta2_decay"


class EpsOfTheFirstStep(OfTheFirstStep):
    option = "eps"


class ThresholdOfTheFirstStep(OfTheFirstStep):
    option = "d"


class FirstStepForever(Written):
    def count(self, state):
        return 1


class NoState(Written):
    def kept(self, state, name, new, share):
        return new


class KeyedByShape(Written):
    def one(self, p, g, group, state):
        self.shapes = getattr(self, "shapes", {})
        state["t"] = 0
        super().one(p, g, group, self.shapes.setdefault(tuple(p.shape), state))


class RowsOnly(Written):
    def product(self, r, c, eps1):
        return r.expand(*r.shape[:-1], c.shape[-1])


class ColumnsOnly(Written):
    def product(self, r, c, eps1):
        return c.expand(*c.shape[:-2], r.shape[-2], c.shape[-1])


class SquareRootDecay(Written):
    def relative(self, t, lr):
        return min(lr, 1 / t)


class AcrossAllTensors(Written):
    """One RMS of the weights for all."""

    def size(self, p, eps2):
        weights = torch.cat([q.flatten().double() for group in self.param_groups for q in group["params"]])
        return max(eps2, weights.square().mean().sqrt().item())


class NormOverRows(Written):
    def rms(self, x):
        return x.norm().item() / max(1, len(x) if x.dim() else 1) ** 0.5


class ReadsNothing(Written):
    def load_state_dict(self, state_dict):
        pass


class Chatty(Written):
    """Half the state twice."""

    def one(self, p, g, group, state):
        super().one(p, g, group, state)
        if "R" in state:
            state["copy"] = state["R"].clone()


class StateOfFloat64(Written):
    def kept(self, state, name, new, share):
        old = state.get(name, torch.zeros_like(new)).double()
        state[name] = old * (1 - share) + new.double() * share
        return state[name].to(new.dtype)


ATTACKS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        TorchsWay,
        DecayOfTheFirstStep,
        EpsOfTheFirstStep,
        ThresholdOfTheFirstStep,
        FirstStepForever,
        NoState,
        KeyedByShape,
        RowsOnly,
        ColumnsOnly,
        SquareRootDecay,
        AcrossAllTensors,
        NormOverRows,
        ReadsNothing,
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.Adafactor,
    )
}
DEAR = {kind.__name__: kind for kind in (Chatty, StateOfFloat64)}


def points(answer: Callable[..., Any], seed: int) -> float:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    return judging.judge(runner, exercise, answer, seed, expected, naming=False).points


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_only_looks_right_earns_nothing(name: str, seed: int) -> None:
    assert points(ATTACKS[name], seed) == 0


@pytest.mark.parametrize("name", DEAR)
def test_a_right_answer_with_more_state_loses_the_points_for_it(name: str, seed: int) -> None:
    assert points(DEAR[name], seed) == 0.75 * exercise.points


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    assert points(Written, seed) == exercise.points
