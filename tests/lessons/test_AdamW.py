"""AdamW against torch's own in float64, exact fractions, and what decoupled decay is for."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import pytest
import torch

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.AdamW import Written

exercise = find("AdamW")
AdamW = exercise.reference
Peer = torch.optim.AdamW  # by name: a check that runs here switches torch.optim.AdamW off and on again
SHAPES = ((3, 5), (2, 3, 4), (7,), (), (0, 2))


def twins(generator: torch.Generator, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    ours = [torch.nn.Parameter(value.to(dtype)) for value in values]
    theirs = [torch.nn.Parameter(value.to(dtype).double()) for value in values]
    return ours, theirs


def give(
    generator: torch.Generator, ours: list[Any], theirs: list[Any], missing: tuple[int, ...] = ()
) -> None:
    for index, (mine, peer) in enumerate(zip(ours, theirs, strict=True)):
        size = 10 ** (torch.rand((), generator=generator) * 11 - 8)  # 1e-8 to 1e3
        gradient = (torch.randn(mine.shape, generator=generator) * size).to(mine.dtype)
        mine.grad = None if index in missing else gradient
        peer.grad = None if index in missing else gradient.double()


def assert_together(ours: list[Any], theirs: list[Any], steps: int) -> None:
    for mine, peer in zip(ours, theirs, strict=True):
        # A step rounds p twice, by half an eps of values below 8, and its update, of at most lr * 10, by a few eps.
        room = 8 * torch.finfo(mine.dtype).eps * steps
        assert (mine.double() - peer).abs().sum() <= room * max(1, mine.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_40_steps_are_those_of_torch_in_float64(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = twins(generator, dtype)

    def groups(parameters: list[Any]) -> list[dict[str, Any]]:
        return [
            {"params": parameters[:1], "weight_decay": 0.0, "eps": 1e-6},
            {"params": []},
            {"params": parameters[1:3], "lr": 0.03, "betas": (0.7, 0.95)},
            {"params": parameters[3:]},
        ]

    mine = AdamW(groups(ours), lr=0.01, weight_decay=0.3)
    peer = Peer(groups(theirs), lr=0.01, weight_decay=0.3)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(step, 5) / 5 - step / 80)
        for one in (mine, peer)
    ]
    for step in range(40):
        missing = tuple(i for i in range(len(ours)) if torch.rand((), generator=generator) < 0.3)
        give(generator, ours, theirs, missing)
        for optimizer, schedule in zip((mine, peer), schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step == 20:  # a resume, in the middle, through a file
            for optimizer, again in (
                (mine, AdamW(groups(ours), lr=1.0)),
                (peer, Peer(groups(theirs), lr=1.0)),
            ):
                written = io.BytesIO()
                torch.save(optimizer.state_dict(), written)
                written.seek(0)
                again.load_state_dict(torch.load(written, weights_only=True))
                optimizer.state, optimizer.param_groups = again.state, again.param_groups
    assert_together(ours, theirs, 40)


def test_two_steps_are_what_fractions_give() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = AdamW([p], lr=0.5, betas=(0.5, 0.75), eps=0.25, weight_decay=0.5)
    # Step 1: m = 1/2 g, v = 1/4 g^2, corrected g and g^2; with g = 3: 3/4 p - 1/2 * 3 / (3 + 1/4).
    p.grad = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    first = Fraction(3, 4) - Fraction(1, 2) * 3 / (3 + Fraction(1, 4))
    assert p.item() == pytest.approx(float(first), rel=1e-15)
    # Step 2 with g = 5: m = 3/4 + 5/2 = 13/4, v = 27/16 + 25/4 = 127/16; corrected by 3/4 and 7/16: 13/3 and 127/7.
    p.grad = torch.tensor([5.0], dtype=torch.float64)
    optimizer.step()
    second = float(first) * 3 / 4 - 0.5 * (13 / 3) / ((127 / 7) ** 0.5 + 0.25)
    assert p.item() == pytest.approx(second, rel=1e-14)


def test_the_first_step_is_the_rate_whatever_the_gradient(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.randn(4, 3, generator=generator) * 10 ** torch.linspace(-3, 3, 12).reshape(4, 3)
    AdamW([p], lr=0.5, eps=0.0).step()
    assert torch.allclose(p, -0.5 * p.grad.sign(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "ends"), [("AdamW", [0.990, 0.966]), ("L2", [0.808, 0.966])])
def test_l2_decays_a_quiet_weight_far_more_than_a_loud_one(kind: str, ends: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.1 if kind == "AdamW" else 0.0)
    for _ in range(200):
        p.grad = torch.randn(2, generator=generator) * torch.tensor([1e-3, 1.0])
        if kind == "L2":
            p.grad += 0.1 * p.detach()
        optimizer.step()
    assert p.tolist() == pytest.approx(ends, abs=5e-4)  # three digits, as the lesson gives them


def test_with_gradients_of_zero_only_the_decay_moves_anything(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(5, 2, generator=generator, dtype=torch.float64))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer = AdamW([p], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.step()
    assert torch.allclose(p, before * 0.95**3, rtol=1e-15)


def test_a_parameter_without_a_gradient_keeps_everything() -> None:
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p, q], lr=0.1, weight_decay=0.5)
    q.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [1.0] * 3
    assert list(optimizer.state_dict()["state"]) == [1]


def test_a_step_makes_one_tensor_and_keeps_two_where_torch_makes_two(seed: int) -> None:
    p = torch.nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)))
    p.grad = torch.ones(40, 30)
    made = []
    for optimizer in (AdamW([p]), Peer([p], foreach=False)):
        optimizer.step()
        with TensorWork() as work:
            optimizer.step()
        made.append(work.allocated_bytes)
        (state,) = optimizer.state_dict()["state"].values()
        kept = [part.nbytes for part in state.values() if isinstance(part, torch.Tensor)]
        assert 2 * p.nbytes <= sum(kept) <= 2 * p.nbytes + 16
    assert made == [p.nbytes, 2 * p.nbytes]


def test_memory_is_kept_and_shared(seed: int) -> None:
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    p = torch.nn.Parameter(whole.T[1:4])
    place, expected = p.data_ptr(), p.detach().double().clone().requires_grad_()
    optimizer, peer = AdamW([p], lr=0.1), Peer([expected], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn(3, 4)
        expected.grad = p.grad.double()
        optimizer.step()
        peer.step()
    assert p.data_ptr() == place
    assert torch.equal(whole.T[1:4], p)
    assert_together([p], [expected], 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_gradient_breaks_its_own_element_for_good(bad: float) -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = AdamW([p])
    for value in (bad, 1.0, 1.0):
        p.grad = torch.ones(2, 3)
        p.grad[1, 1] = value
        optimizer.step()
    assert p.isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1e-3},
        {"lr": torch.nan},
        {"eps": -1e-8},
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
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


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
        AdamW([p]).step()


def test_no_parameters_and_a_state_of_other_groups_are_refused() -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    for other in ([{"params": [p]}, {"params": [q]}], [p, torch.nn.Parameter(torch.ones(1)), q]):
        with pytest.raises(ValueError, match="parameter group"):
            AdamW([p, q]).load_state_dict(AdamW(other).state_dict())


def clipped(self: Written, p: Any, g: Any, group: Any) -> None:
    Written.move(self, p, g.clamp(-1, 1), group)


def with_options(**fixed: Any) -> Any:
    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        Written.move(self, p, g, {**group, **fixed})

    return move


def option_of_the_first_step(name: str) -> Any:
    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        Written.move(self, p, g, {**group, name: group.setdefault("first", group[name])})

    return move


def only_where(right: Any) -> Any:
    """Moves only the parameters for which `right` is true."""

    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        if right(self, p, g, group):
            Written.move(self, p, g, group)

    return move


def sign_from(first: int) -> Any:
    """Right for a while, then the sign of the gradient."""

    def quotient(self: Written, state: Any, g: Any, b1: float, b2: float, t: int, eps: float) -> Any:
        if t >= first:
            return g.sign(), torch.ones_like(g)
        return Written.quotient(self, state, g, b1, b2, t, eps)

    return quotient


def forgetful(kept: str) -> Any:
    """Takes everything but one option from a file."""

    def load_state_dict(self: Written, state_dict: Any) -> None:
        ours = [dict(group) for group in self.param_groups]
        torch.optim.Optimizer.load_state_dict(self, state_dict)
        for group, own in zip(self.param_groups, ours, strict=True):
            group[kept] = own[kept]

    return load_state_dict


def fused(operation: Any) -> Any:
    """The step of torch's own kernel."""

    def move(self: Written, p: Any, g: Any, group: Any) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update(t=torch.tensor(0.0), m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["t"] += 1
        given = {"lr": group["lr"], "beta1": b1, "beta2": b2, "eps": group["eps"]}
        given |= {"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False}
        operation([p], [g], [state["m"]], [state["v"]], [], [state["t"]], **given)

    return move


def answer(**changed: Any) -> type[torch.optim.Optimizer]:
    return type("Answer", (Written,), changed)


ATTACKS = {
    "eps fixed": answer(move=with_options(eps=1e-8)),
    "betas fixed": answer(move=with_options(betas=(0.9, 0.999))),
    "betas of the first step": answer(move=option_of_the_first_step("betas")),
    "eps of the first step": answer(move=option_of_the_first_step("eps")),
    "decay fixed": answer(move=with_options(weight_decay=0.01)),
    "no decay": answer(move=with_options(weight_decay=0.0)),
    "clipped": answer(move=clipped),
    "only where lr is not 0": answer(move=only_where(lambda self, p, g, group: group["lr"] > 0)),
    "only where g is not 0": answer(move=only_where(lambda self, p, g, group: bool(g.any()))),
    "not scalars": answer(move=only_where(lambda self, p, g, group: p.dim() > 0)),
    "not vectors": answer(move=only_where(lambda self, p, g, group: p.dim() != 1)),
    "not three dimensions": answer(move=only_where(lambda self, p, g, group: p.dim() < 3)),
    "first group": answer(move=only_where(lambda self, p, g, group: group is self.param_groups[0])),
    "contiguous": answer(move=only_where(lambda self, p, g, group: p.is_contiguous())),
    "one step": answer(quotient=sign_from(2)),
    "two steps": answer(quotient=sign_from(3)),
    "twelve steps": answer(quotient=sign_from(13)),
    "thirty steps": answer(quotient=sign_from(31)),
    "torch's operations": answer(move=fused(torch.ops.aten._fused_adamw_)),
    "torch's operation": answer(move=fused(torch.ops.aten._fused_adamw_.default)),
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
