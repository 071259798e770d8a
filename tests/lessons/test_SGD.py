"""SGD against torch's own in float64, a table by hand, and what a buffer of another kind would do."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.SGD import Written

exercise = find("SGD")
SGD = exercise.reference
Peer = torch.optim.SGD  # by name: a check that runs here switches torch.optim.SGD off and on again
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
        # Three roundings a step, each of at most half an eps of what p has reached on its way, below 1e5 here.
        room = 2 * torch.finfo(mine.dtype).eps * steps * (1 + peer.abs().max().item() if peer.numel() else 1)
        assert ((mine.double() - peer).abs() <= 10 * room).all()


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_30_steps_are_those_of_torch_in_float64(seed: int, dtype: torch.dtype, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = twins(generator, dtype)

    def groups(parameters: list[Any]) -> list[dict[str, Any]]:
        return [
            {"params": parameters[:1], "weight_decay": 0.0, "nesterov": not nesterov},
            {"params": []},
            {"params": parameters[1:3], "lr": 0.03, "momentum": 0.7},
            {"params": parameters[3:4], "momentum": 0.0, "nesterov": False},
            {"params": parameters[4:]},
        ]

    given = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    mine, peer = SGD(groups(ours), **given), Peer(groups(theirs), **given)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: min(step, 5) / 5 - step / 80)
        for one in (mine, peer)
    ]
    for step in range(30):
        missing = tuple(i for i in range(len(ours)) if torch.rand((), generator=generator) < 0.3)
        give(generator, ours, theirs, missing)
        for optimizer, schedule in zip((mine, peer), schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step == 15:  # a resume, in the middle, through a file
            for optimizer, again in ((mine, SGD(groups(ours), lr=1.0)), (peer, Peer(groups(theirs), lr=1.0))):
                written = io.BytesIO()
                torch.save(optimizer.state_dict(), written)
                written.seek(0)
                again.load_state_dict(torch.load(written, weights_only=True))
                optimizer.state, optimizer.param_groups = again.state, again.param_groups
    assert_together(ours, theirs, 30)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # p = 1, g = 2 three times, lr 1/4; b = 2, 3, 3.5 with momentum 1/2.
        ({}, [0.5, 0.0, -0.5]),
        ({"momentum": 0.5}, [0.5, -0.25, -1.125]),
        # g + b / 2 = 3, 3.5, 3.75
        ({"momentum": 0.5, "nesterov": True}, [0.25, -0.625, -1.5625]),
        # d = 2 + p: 3, then p = 1/4 and 2.25, then p = -5/16
        ({"weight_decay": 1.0}, [0.25, -0.3125, -0.734375]),
        # b = 3, 1.5 + 2.25 = 3.75, 1.875 + (2 - 0.6875) = 3.1875
        ({"weight_decay": 1.0, "momentum": 0.5}, [0.25, -0.6875, -1.484375]),
    ],
    ids=["plain", "momentum", "nesterov", "decay", "decay and momentum"],
)
def test_three_steps_are_those_of_the_table(options: dict[str, Any], expected: list[float]) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([p], lr=0.25, **options)
    found = []
    for _ in range(3):
        p.grad = torch.tensor([2.0])
        optimizer.step()
        found.append(p.item())
    assert found == expected  # all of them exact in binary


def test_a_lower_rate_applies_to_what_is_in_the_buffer_already() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.item() == -1.0  # with lr inside the buffer: -1.5


def test_a_parameter_without_a_gradient_keeps_everything() -> None:
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p, q], lr=0.1, momentum=0.9, weight_decay=0.5)
    q.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [1.0] * 3
    assert list(optimizer.state_dict()["state"]) == [1]


def test_without_momentum_there_is_no_state() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = SGD([p], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_a_step_makes_no_tensor(options: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.ones(40, 30))
    p.grad = torch.ones(40, 30)
    optimizer = SGD([p], lr=0.1, weight_decay=0.5, **options)
    optimizer.step()
    with TensorWork() as work:
        optimizer.step()
    assert work.allocated_bytes == 0
    peer = Peer([p], lr=0.1, weight_decay=0.5, **options)
    peer.step()
    with TensorWork() as work:
        peer.step()
    assert work.allocated_bytes >= p.nbytes


def test_memory_is_kept_and_shared(seed: int) -> None:
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    p = torch.nn.Parameter(whole.T[1:4])
    place, expected = p.data_ptr(), p.detach().double().clone().requires_grad_()
    optimizer, peer = SGD([p], lr=0.1, momentum=0.9), Peer([expected], lr=0.1, momentum=0.9)
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
    optimizer = SGD([p], momentum=0.9, weight_decay=0.1)
    for value in (bad, 1.0, 1.0):
        p.grad = torch.ones(2, 3)
        p.grad[1, 1] = value
        optimizer.step()
    assert (~p.isfinite()).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "expected at least 0"),
        ({"lr": torch.nan}, "expected at least 0"),
        ({"weight_decay": -0.1}, "expected at least 0"),
        ({"momentum": -0.1}, "momentum below 1"),
        ({"momentum": 1.0}, "momentum below 1"),
        ({"momentum": torch.nan}, "momentum below 1"),
        ({"nesterov": True}, "expected a momentum"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGD([torch.nn.Parameter(torch.ones(2))], **options)


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
        SGD([p]).step()


def test_no_parameters_and_a_state_of_other_groups_are_refused() -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        SGD([])
    for other in ([{"params": [p]}, {"params": [q]}], [p, torch.nn.Parameter(torch.ones(1)), q]):
        with pytest.raises(ValueError, match="parameter group"):
            SGD([p, q]).load_state_dict(SGD(other).state_dict())


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


def clipped(self: Written, p: Any, g: Any, group: Any) -> None:
    Written.move(self, p, g.clamp(-1, 1), group)


def empty_at(size: int) -> Any:
    """Empties the buffer after so many steps."""

    def kept(self: Written, p: Any, group: Any) -> Any:
        state = self.state[p]
        state["t"] = state.get("t", 0) + 1
        if state["t"] == size:
            state.pop("b", None)
        return state

    return kept


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
    "momentum fixed": answer(move=with_options(momentum=0.9)),
    "no momentum": answer(move=with_options(momentum=0.0)),
    "momentum of the first step": answer(move=option_of_the_first_step("momentum")),
    "nesterov of the first step": answer(move=option_of_the_first_step("nesterov")),
    "no decay": answer(move=with_options(weight_decay=0.0)),
    "never nesterov": answer(move=with_options(nesterov=False)),
    "always nesterov": answer(move=with_options(nesterov=True)),
    "clipped": answer(move=clipped),
    "only where lr is not 0": answer(move=only_where(lambda self, p, g, group: group["lr"] > 0)),
    "only where g is not 0": answer(move=only_where(lambda self, p, g, group: bool(g.any()))),
    "not scalars": answer(move=only_where(lambda self, p, g, group: p.dim() > 0)),
    "not vectors": answer(move=only_where(lambda self, p, g, group: p.dim() != 1)),
    "not three dimensions": answer(move=only_where(lambda self, p, g, group: p.dim() < 3)),
    "first group": answer(move=only_where(lambda self, p, g, group: group is self.param_groups[0])),
    "contiguous": answer(move=only_where(lambda self, p, g, group: p.is_contiguous())),
    "one step": answer(kept=empty_at(2)),
    "two steps": answer(kept=empty_at(3)),
    "twelve steps": answer(kept=empty_at(13)),
    "rate not resumed": answer(load_state_dict=forgetful("lr")),
    "momentum not resumed": answer(load_state_dict=forgetful("momentum")),
    "decay not resumed": answer(load_state_dict=forgetful("weight_decay")),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_earns_nothing(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points == 0


def test_the_answer_that_the_attacks_are_made_of_is_right_and_dear(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, answer(), seed, expected, naming=False)
    assert verdict.verdict == "right", verdict.reason
