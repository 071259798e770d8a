"""Lion against a closed form in exact fractions, a table by hand, and the sign of nothing."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import pytest
import torch

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.Lion import Written

exercise = find("Lion")
Lion = exercise.reference


def signs(gradients: list[Fraction], b1: Fraction, b2: Fraction) -> list[int]:
    """The sign of every step, each from all gradients so far: no average is carried along."""
    found = []
    for step, newest in enumerate(gradients):
        old = sum((b2 ** (step - 1 - i) * g for i, g in enumerate(gradients[:step])), Fraction(0))
        mixed = (1 - b1) * newest + b1 * (1 - b2) * old
        found.append((mixed > 0) - (mixed < 0))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [2.0**-27, 1.0, 2.0**10], ids=["quiet", "one", "loud"])
def test_every_step_is_what_fractions_give(seed: int, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Betas of 1/2 and 3/4 and small integers: 8 steps need some 20 bits, so zeros are zeros in float32 too.
    given = torch.randint(-3, 4, (8, 3, 5), generator=generator).to(dtype)
    given[:, 1, 2] = 0
    given[1, 0, 0], given[0, 0, 0] = -1, 4  # cancels half of the m of before, which is 1
    p = torch.nn.Parameter(torch.randn(3, 5, generator=generator).to(dtype))
    value = p.detach().double().clone()
    optimizer = Lion([p], lr=0.125, betas=(0.5, 0.75), weight_decay=0.5)
    columns = [[Fraction(int(g)) for g in column] for column in given.flatten(1).T.tolist()]
    expected = [signs(column, Fraction(1, 2), Fraction(3, 4)) for column in columns]
    for step, gradient in enumerate(given):
        p.grad = gradient * size
        optimizer.step()
        moved = torch.tensor([found[step] for found in expected], dtype=torch.float64).reshape(3, 5)
        value = value * (1 - 0.125 * 0.5) - 0.125 * moved
        assert torch.allclose(p.double(), value, rtol=0, atol=8 * 8 * torch.finfo(dtype).eps)
    assert expected[0][:2] == [1, 0]


def test_four_steps_are_those_of_the_table() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Lion([p], lr=1.0, betas=(0.5, 0.75))
    # g         8      -1     -2     0
    # b1 m + .. 4      0.5    -0.375 0.21875
    # m before  0      2      1.25   0.4375
    found = []
    for gradient in (8.0, -1.0, -2.0, 0.0):
        p.grad = torch.tensor([gradient])
        optimizer.step()
        found.append(p.item())
    assert found == [-1.0, -2.0, -1.0, -2.0]


def test_the_size_of_a_gradient_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(10, 4, 3, generator=generator)
    ends = []
    for size in (2.0**-40, 1.0, 2.0**20):
        p = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = Lion([p], lr=0.1)
        for gradient in gradients:
            p.grad = gradient * size
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])


def test_a_weight_without_any_gradient_only_decays() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, 2.0]))
    optimizer = Lion([p], lr=0.5, weight_decay=0.5)
    for _ in range(3):
        p.grad = torch.tensor([0.0, -1.0])
        optimizer.step()
    assert p[0].item() == 2 * 0.75**3
    assert p[1].item() == ((2 * 0.75 + 0.5) * 0.75 + 0.5) * 0.75 + 0.5


def test_groups_a_missing_gradient_and_a_resume_are_those_of_separate_optimizers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    given = [
        {"lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        {"lr": 0.02, "weight_decay": 0.5, "betas": (0.5, 0.8)},
        {"lr": 0.05, "weight_decay": 0.1, "betas": (0.7, 0.7)},
    ]
    together = [torch.nn.Parameter(value.clone()) for value in start]
    alone = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = Lion([{"params": [p], **options} for p, options in zip(together, given, strict=True)])
    apart = [Lion([p], **options) for p, options in zip(alone, given, strict=True)]
    for step in range(12):
        for p, q, one in zip(together, alone, apart, strict=True):
            missing = bool(torch.rand((), generator=generator) < 0.3)
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if missing else gradient
            q.grad = gradient
            if not missing:
                one.step()
        optimizer.step()
        if step == 5:
            written = io.BytesIO()
            torch.save(optimizer.state_dict(), written)
            written.seek(0)
            optimizer = Lion([{"params": [p]} for p in together], lr=1.0, weight_decay=0.9)
            optimizer.load_state_dict(torch.load(written, weights_only=True))
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)


def test_a_step_makes_one_tensor_and_keeps_one(seed: int) -> None:
    p = torch.nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)))
    p.grad = torch.ones(40, 30)
    optimizer = Lion([p], weight_decay=0.5)
    optimizer.step()
    with TensorWork() as work:
        optimizer.step()
    assert work.allocated_bytes == p.nbytes
    (state,) = optimizer.state_dict()["state"].values()
    assert sum(part.nbytes for part in state.values()) == p.nbytes


def test_memory_is_kept_and_shared(seed: int) -> None:
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    p = torch.nn.Parameter(whole.T[1:4])
    place, before = p.data_ptr(), p.detach().clone()
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.randn(3, 4).sign()
    for _ in range(3):
        optimizer.step()
    assert p.data_ptr() == place
    assert torch.equal(whole.T[1:4], p)
    assert torch.allclose(p, before - 1.5 * p.grad, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_gradient_stays_in_m_and_its_sign_in_every_step(sign: int) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lion([p], lr=1.0)
    for value in (sign * torch.inf, 1.0, -1.0):
        p.grad = torch.tensor([value, 1.0])
        optimizer.step()
    assert p.tolist() == [-3.0 * sign, -3.0]


def test_nan_stops_its_own_element_without_a_word() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = Lion([p], lr=1.0)
    for value in (torch.nan, 1.0, 1.0):
        p.grad = torch.ones(2, 3)
        p.grad[1, 1] = value
        optimizer.step()
    assert p.tolist() == [[-3.0, -3.0, -3.0], [-3.0, 0.0, -3.0]]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1e-3},
        {"lr": torch.nan},
        {"weight_decay": -0.1},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9, torch.nan)},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected at least 0"):
        Lion([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(2, 2).to_sparse(),
        *(torch.ones(2, 2, dtype=dtype) for dtype in (torch.complex64, torch.bfloat16, torch.float16)),
    ],
    ids=["sparse", "complex", "bfloat16", "float16"],
)
def test_gradients_of_other_kinds_are_refused(gradient: torch.Tensor) -> None:
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=gradient.dtype))
    p.grad = gradient
    with pytest.raises(ValueError, match="expected dense float32 or float64"):
        Lion([p]).step()


def test_no_parameters_and_a_state_of_other_groups_are_refused() -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        Lion([])
    for other in ([{"params": [p]}, {"params": [q]}], [p, torch.nn.Parameter(torch.ones(1)), q]):
        with pytest.raises(ValueError, match="parameter group"):
            Lion([p, q]).load_state_dict(Lion(other).state_dict())


def with_options(**fixed: Any) -> Any:
    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        Written.move(self, p, g, {**group, **fixed})

    return move


def beta_of_the_first_step(index: int) -> Any:
    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        betas = list(group["betas"])
        betas[index] = group.setdefault("first", betas[index])
        Written.move(self, p, g, {**group, "betas": betas})

    return move


def only_where(right: Any) -> Any:
    """Moves only the parameters for which `right` is true."""

    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        if right(self, p, g, group):
            Written.move(self, p, g, group)

    return move


def clipped(self: Written, p: Any, g: Any, group: Any) -> None:
    Written.move(self, p, g.clamp(-1, 1), group)


def first_steps(count: int) -> Any:
    """Right for a while, then the sign of the gradient."""

    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        state = self.state[p]
        state["t"] = state.get("t", 0) + 1
        state.setdefault("m", torch.zeros_like(p))
        Written.move(self, p, g, group if state["t"] <= count else {**group, "betas": (0.0, 0.9)})

    return move


def forgetful(kept: str) -> Any:
    """Takes everything but one option from a file."""

    def load_state_dict(self: Written, state_dict: Any) -> None:
        ours = [dict(group) for group in self.param_groups]
        torch.optim.Optimizer.load_state_dict(self, state_dict)
        for group, own in zip(self.param_groups, ours, strict=True):
            group[kept] = own[kept]

    return load_state_dict


def answer(**changed: Any) -> type[torch.optim.Optimizer]:
    return type("Answer", (Written,), changed)


ATTACKS = {
    "betas fixed": answer(move=with_options(betas=(0.9, 0.99))),
    "b1 of the first step": answer(move=beta_of_the_first_step(0)),
    "b2 of the first step": answer(move=beta_of_the_first_step(1)),
    "decay fixed": answer(move=with_options(weight_decay=0.1)),
    "no decay": answer(move=with_options(weight_decay=0.0)),
    "clipped": answer(move=clipped),
    "only where lr is not 0": answer(move=only_where(lambda self, p, g, group: group["lr"] > 0)),
    "only where g is not 0": answer(move=only_where(lambda self, p, g, group: bool(g.any()))),
    "not scalars": answer(move=only_where(lambda self, p, g, group: p.dim() > 0)),
    "not vectors": answer(move=only_where(lambda self, p, g, group: p.dim() != 1)),
    "not three dimensions": answer(move=only_where(lambda self, p, g, group: p.dim() < 3)),
    "first group": answer(move=only_where(lambda self, p, g, group: group is self.param_groups[0])),
    "contiguous": answer(move=only_where(lambda self, p, g, group: p.is_contiguous())),
    "one step": answer(move=first_steps(1)),
    "two steps": answer(move=first_steps(2)),
    "six steps": answer(move=first_steps(6)),
    "rate not resumed": answer(load_state_dict=forgetful("lr")),
    "betas not resumed": answer(load_state_dict=forgetful("betas")),
    "decay not resumed": answer(load_state_dict=forgetful("weight_decay")),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_earns_nothing(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points == 0


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, answer(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason


def signed(mixed: Any) -> Any:
    """The line of the formula as it is read, and m in place."""

    def direction(self: Written, state: Any, g: Any, b1: float, b2: float) -> Any:
        found = mixed(state["m"], g, b1)
        self.average(state["m"], g, b2)
        return found

    return answer(direction=direction)


@pytest.mark.parametrize(
    "dear",
    [
        signed(lambda m, g, b1: torch.sign(b1 * m + (1 - b1) * g)),
        signed(lambda m, g, b1: m.mul(b1).add(g, alpha=1 - b1).sign()),
        signed(lambda m, g, b1: m.lerp(g, 1 - b1).sign()),
    ],
    ids=["formula", "mul and add", "lerp"],
)
def test_right_values_in_too_many_tensors_are_told_so(dear: Any, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, dear, seed, expected)
    assert verdict.verdict == "right"
    assert verdict.points == 2.5
    assert [mistake.name for mistake in verdict.mistakes] == ["NewTensorForEachOperation"]
