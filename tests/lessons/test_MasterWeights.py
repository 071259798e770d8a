"""MasterWeights against loops over float32 copies, exact fractions, an uninterrupted run, and answers that cheat."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import reachable_bytes
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.MasterWeights import Written

exercise = find("MasterWeights")
MasterWeights = exercise.reference
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def grouped(masters: list[Tensor]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": masters[:1], "lr": 0.01}, {"params": masters[1:]}]
    return torch.optim.AdamW(groups, lr=0.001)


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.03),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.002, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.002, momentum=0.5),
    "groups": grouped,
}
SHAPES = ((3, 5), (4,), (2, 2, 3))


def normal(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def some(generator: torch.Generator, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(generator, shape, dtype)) for shape in SHAPES]


def give(parameters: list[torch.nn.Parameter], generator: torch.Generator, missing: int | None) -> None:
    for index, p in enumerate(parameters):
        p.grad = None if index == missing else normal(generator, tuple(p.shape), p.dtype)


def same(left: list[Any], right: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_twenty_steps_are_those_of_a_float32_loop(name: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = some(generator, dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in parameters]
    by_hand = OPTIMIZERS[name](wide)  # type: ignore[arg-type]
    training = MasterWeights(iter(parameters), OPTIMIZERS[name])
    for step in range(20):
        give(parameters, generator, missing=step % 5)  # 3 and 4: none
        for p, w in zip(parameters, wide, strict=True):
            w.grad = None if p.grad is None else p.grad.float()
        by_hand.step()
        training.step()
        assert same(parameters, [w.to(dtype) for w in wide])
    masters = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert same(masters, wide)


def test_a_thousand_updates_of_a_thousandth_move_a_weight_from_1_to_2() -> None:
    alone = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        alone += 0.001
    assert alone.item() == 1.0  # half the distance to the next number is 2^-8 = 0.0039

    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    weight.grad = -torch.ones_like(weight)
    training = MasterWeights([weight], lambda p: torch.optim.SGD(p, lr=0.001))
    for _ in range(1000):
        training.step()
    # A thousand float32 sums below 2, each within 2^-24 of relative error: 1e-4 in all, and 2^-7 from the rounding.
    assert weight.item() == pytest.approx(2.0, abs=2**-7)
    [master] = training.masters.values()
    assert master.item() == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
def test_weights_are_the_nearest_numbers_of_16_bits_by_exact_fractions(
    dtype: torch.dtype, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.zeros(200, dtype=dtype))
    training = MasterWeights([weight], lambda p: torch.optim.SGD(p, lr=1.0))
    [master] = training.masters.values()
    values = torch.randn(200, generator=generator)
    values[:50] = (
        torch.randint(2**bits, 2 ** (bits + 1), (50,), generator=generator) / 2**bits
    )  # half are ties
    master.copy_(values)
    training.step()
    for value, found in zip(master.tolist(), weight.tolist(), strict=True):
        exact = Fraction(value)
        exponent = math.frexp(value)[1] - bits  # numbers of this size are multiples of 2^exponent
        step = Fraction(2) ** exponent
        assert Fraction(found) == round(exact / step) * step  # Python's round: nearest, ties to even


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pause", [1, 3])
def test_a_resume_from_a_file_continues_bit_by_bit(name: str, pause: int, seed: int) -> None:
    def run(steps: range, training: Any, parameters: list[torch.nn.Parameter]) -> None:
        for step in steps:
            give(parameters, torch.Generator().manual_seed(seed + step), missing=step % 4)
            training.step()

    parameters = some(torch.Generator().manual_seed(seed), torch.bfloat16)
    training = MasterWeights(parameters, OPTIMIZERS[name])
    run(range(pause), training, parameters)
    written = io.BytesIO()
    torch.save(training.state_dict(), written)
    at_the_pause = [p.detach().clone() for p in parameters]
    run(range(pause, 8), training, parameters)

    others = some(torch.Generator().manual_seed(seed + 99), torch.bfloat16)
    resumed = MasterWeights(others, OPTIMIZERS[name])
    resumed.load_state_dict(torch.load(io.BytesIO(written.getvalue()), weights_only=True))
    assert same(others, at_the_pause)
    run(range(pause, 8), resumed, others)
    assert same(others, parameters)
    assert same(list(resumed.masters.values()), list(training.masters.values()))


def test_masters_made_from_the_weights_again_differ_after_a_resume(seed: int) -> None:
    parameters = some(torch.Generator().manual_seed(seed), torch.bfloat16)
    training = MasterWeights(parameters, OPTIMIZERS["AdamW"])
    give(parameters, torch.Generator().manual_seed(seed), missing=None)
    training.step()
    again = MasterWeights(parameters, OPTIMIZERS["AdamW"])
    assert not same(list(again.masters.values()), list(training.masters.values()))


def test_16_bytes_a_parameter_with_adamw_by_part() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, 8, dtype=torch.bfloat16))
    training = MasterWeights([weight], OPTIMIZERS["AdamW"])
    weight.grad = torch.ones_like(weight)
    training.step()
    [state] = training.optimizer.state.values()
    [master] = training.masters.values()
    assert (weight.nbytes, weight.grad.nbytes, master.nbytes) == (16_000, 16_000, 32_000)
    assert master.grad is None
    assert (state["exp_avg"].nbytes, state["exp_avg_sq"].nbytes) == (32_000, 32_000)
    assert reachable_bytes(training) == 16 * 8000 + state["step"].nbytes
    training.zero_grad()
    assert reachable_bytes(training) == 14 * 8000 + state["step"].nbytes


def test_what_is_held_in_a_closure_a_slot_or_a_list_is_counted() -> None:
    hidden = torch.zeros(100)

    class Slotted:
        __slots__ = ("inside",)

    slotted = Slotted()
    slotted.inside = [{"a": (torch.zeros(7),)}]  # type: ignore[attr-defined]
    assert reachable_bytes(lambda: hidden) == 400
    assert reachable_bytes(slotted) == 28
    assert (
        reachable_bytes([1, 2.0, "a"], {"b": b"four"}, bytearray(5), torch.zeros(3).numpy())
        == 16 + 4 + 5 + 12
    )
    assert reachable_bytes(hidden, hidden[3:], torch) == 400


def test_a_model_learns_what_its_16_bit_weights_alone_cannot(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator).bfloat16()
    target = torch.full((8, 1), 1.4, dtype=torch.bfloat16)

    def error(update: str) -> float:
        weight = torch.nn.Parameter(torch.ones(8, 1, dtype=torch.bfloat16))
        sgd: Make = lambda p: torch.optim.SGD(p, lr=0.002)  # noqa: E731
        trainer = MasterWeights([weight], sgd) if update == "masters" else sgd([weight])
        for _ in range(1500):
            trainer.zero_grad()
            (x @ (weight - target)).float().square().mean().mul(0.5).backward()
            trainer.step()
        return float((weight - target).detach().float().abs().max())

    # The gradient is about the error itself: 0.4, so the first update is 0.0008, and 0.0039 is needed to move.
    assert error("masters") < 0.2
    assert error("in place") > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    narrow = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected parameters in bfloat16 or float16"):
        MasterWeights([narrow, torch.nn.Parameter(torch.ones(3, dtype=dtype))], OPTIMIZERS["SGD"])


def test_none_and_twice_the_same_are_refused() -> None:
    narrow = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected parameters"):
        MasterWeights([], OPTIMIZERS["SGD"])
    with pytest.raises(ValueError, match="given twice"):
        MasterWeights([narrow, narrow], OPTIMIZERS["SGD"])


@pytest.mark.parametrize("shapes", [((1, 5), (4,), (2, 2, 3)), SHAPES[:2], (*SHAPES, (1,)), SHAPES[::-1]])
def test_a_state_that_does_not_fit_changes_nothing(shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = some(generator, torch.bfloat16)
    training = MasterWeights(parameters, OPTIMIZERS["AdamW"])
    before = [t.clone() for t in [*parameters, *training.masters.values()]]
    other = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    with pytest.raises(ValueError, match="not these parameters'"):
        training.load_state_dict(MasterWeights(other, OPTIMIZERS["AdamW"]).state_dict())
    assert same([*parameters, *training.masters.values()], before)
    assert not training.optimizer.state


# ------------------------------------------------------------------------------- answers that are wrong somewhere


class OwnOptimizer(Written):
    """Ignores the optimizer it is given, and does SGD of its own."""

    def step(self) -> None:
        for p, master in self.pairs():
            if p.grad is not None:
                master -= self.optimizer.param_groups[0]["lr"] * p.grad.float()
            self.write_back(p, master)


class FirstParameterOnly(Written):
    def write_back(self, p: Any, master: Tensor) -> None:
        if p is self.model[0]:
            super().write_back(p, master)


class SavesAList(Written):
    """What weights_only=True does not read."""

    def state_dict(self) -> Any:
        return {"masters": self.masters, "optimizer": self.optimizer.state_dict(), "make": torch.optim.SGD}


class AddsNoise(Written):
    def write_back(self, p: Any, master: Tensor) -> None:
        bits = master.detach().view(torch.int32) + torch.randint(0, 1 << 16, master.shape, dtype=torch.int32)
        p.data.copy_((bits & -(1 << 16)).view(torch.float32))


class WritesBackTwice(Written):
    """Rounds to float16 first, and then to bfloat16."""

    def write_back(self, p: Any, master: Tensor) -> None:
        p.data.copy_(master.half())


class SquashesGradients(Written):
    """float16 has no 1e-8."""

    def hand_over(self, p: Any, master: Tensor) -> None:
        master.grad = None if p.grad is None else p.grad.half().float()


class ReadsOptionsOnce(Written):
    """Freezes the learning rate that the optimizer started with."""

    def step(self) -> None:
        self.rates = getattr(self, "rates", [group["lr"] for group in self.optimizer.param_groups])
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        super().step()


class KeepsTheMastersInAnAttributeOfTheParameter(Written):
    def write_back(self, p: Any, master: Tensor) -> None:
        super().write_back(p, master)
        p.wide = master.clone()


class HidesACopyInAClosure(Written):
    def made(self, make_optimizer: Make) -> Any:
        kept = [master.clone() for master in self.masters]
        self.look = lambda: kept
        return super().made(make_optimizer)


class CountsStepsOfItsOwn(Written):
    """Skips every second step, as one micro-batch of two."""

    count = 0

    def step(self) -> None:
        self.count += 1
        if self.count % 2:
            super().step()


class LoadsOnlyOnce(Written):
    loaded = False

    def load(self, state: Any) -> None:
        if self.loaded or self.optimizer.state:
            return
        super().load(state)


ATTACKS = (
    *(OwnOptimizer, FirstParameterOnly, SavesAList, AddsNoise, WritesBackTwice, SquashesGradients),
    *(ReadsOptionsOnce, KeepsTheMastersInAnAttributeOfTheParameter, HidesACopyInAClosure),
    *(CountsStepsOfItsOwn, LoadsOnlyOnce),
)


def points_of(answer: Any, seed: int) -> float:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    return judging.judge(runner, exercise, answer, seed, expected, naming=False).points


@pytest.mark.parametrize("answer", ATTACKS, ids=lambda answer: answer.__name__)
def test_an_answer_that_is_wrong_somewhere_loses_points(answer: Any, seed: int) -> None:
    assert points_of(answer, seed) < exercise.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(Written, seed) == exercise.points
