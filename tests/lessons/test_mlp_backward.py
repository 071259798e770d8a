"""mlp_backward against gradcheck, autograd, finite differences and a block worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.mlp_backward import Block, Gradients, variant

exercise = find("mlp_backward")
mlp_backward = exercise.reference
NAMES = ("gain", "gate", "up", "down", "bias")
LEADING = [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (3, 0)]


def forward(x: Tensor, weights: dict[str, Tensor], eps: float) -> Tensor:
    """The block out of torch's own layers."""
    n = torch.nn.functional.rms_norm(x, x.shape[-1:], weights["gain"], eps)
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    h = silu(linear(n, weights["gate"])) * linear(n, weights["up"])
    return x + linear(h, weights["down"], weights["bias"])


def some_block(
    seed: int, leading: tuple[int, ...], width: int = 5, hidden: int = 8
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """x, weights and grad_y in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {
        "gain": (width,),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
        "bias": (width,),
    }
    weights = {name: normal(*shape) for name, shape in shapes.items()}
    return normal(*leading, width), weights, normal(*leading, width)


def by_autograd(x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, eps: float) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), *(weights[name].clone().requires_grad_() for name in NAMES)]
    y = forward(leaves[0], dict(zip(NAMES, leaves[1:], strict=True)), eps)
    return list(torch.autograd.grad(y, leaves, grad_y))


class ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, *parts)
        ctx.eps = eps
        return forward(x, dict(zip(NAMES, parts, strict=True)), eps)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parts = ctx.saved_tensors
        grad_x, found = mlp_backward(x, dict(zip(NAMES, parts, strict=True)), grad_y, eps=ctx.eps)
        return None, grad_x, *(found[name] for name in NAMES)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradcheck_finds_no_difference(seed: int, leading: tuple[int, ...]) -> None:
    x, weights, _ = some_block(seed, leading, width=3, hidden=4)
    leaves = [x, *(weights[name] for name in NAMES)]
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: ByHand.apply(0.1, *given), leaves)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_every_gradient_is_that_of_autograd(seed: int, leading: tuple[int, ...], eps: float) -> None:
    x, weights, grad_y = some_block(seed, leading)
    grad_x, found = mlp_backward(x, weights, grad_y, eps=eps)
    assert set(found) == set(weights)
    expected = by_autograd(x, weights, grad_y, eps)
    for one, other in zip([grad_x, *(found[name] for name in NAMES)], expected, strict=True):
        # Sums of at most 8 x 18 terms; a token of small RMS, where 1 / RMS is up to 1e3, costs some digits.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_step_along_a_direction_changes_the_loss_by_what_the_gradients_say(seed: int) -> None:
    x, weights, grad_y = some_block(seed, (2, 3))
    _, directions, step_x = some_block(seed + 1, (2, 3))
    grad_x, found = mlp_backward(x, weights, grad_y, eps=0.1)
    said = (grad_x * step_x).sum() + sum((found[name] * directions[name]).sum() for name in NAMES)

    def loss(size: float) -> Tensor:
        moved = {name: part + size * directions[name] for name, part in weights.items()}
        return (forward(x + size * step_x, moved, 0.1) * grad_y).sum()

    # Central difference: its error is size^2 times a third derivative, some hundreds here.
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(said, slope, rtol=1e-5, atol=1e-5)


def test_a_block_of_two_values_and_one_hidden_value_by_hand() -> None:
    """x = (3, 4), eps = 0: the mean square is 12.5. The gate is 0 on it, so silu(a) = 0 and its slope is 1/2."""
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    one = {
        "gain": [1.0, 2.0],
        "gate": [[8.0, -3.0]],  # 8 * 3 - 3 * 4 * 2 = 0
        "up": [[1.0, 0.5]],  # (3 + 4) / rms
        "down": [[1.0], [-1.0]],
        "bias": [0.0, 0.0],
    }
    weights = {name: torch.tensor(part, dtype=torch.float64) for name, part in one.items()}
    grad_x, found = mlp_backward(x, weights, torch.tensor([5.0, 2.0], dtype=torch.float64), eps=0.0)
    rms = math.sqrt(12.5)
    grad_a = (5 - 2) * (7 / rms) / 2
    grad_z = [grad_a * 8, grad_a * -3 * 2]  # along z it is 0: 8 * 3 - 6 * 4
    expected = {
        "gain": [grad_a * 8 * 3 / rms, grad_a * -3 * 4 / rms],
        "gate": [[grad_a * 3 / rms, grad_a * 8 / rms]],
        "up": [[0.0, 0.0]],
        "down": [[0.0], [0.0]],
        "bias": [5.0, 2.0],
    }
    for name, part in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(part, dtype=torch.float64), msg=name)
    torch.testing.assert_close(
        grad_x, torch.tensor([5 + grad_z[0] / rms, 2 + grad_z[1] / rms], dtype=torch.float64)
    )


def test_without_eps_the_norm_takes_away_what_lies_along_the_token(seed: int) -> None:
    """n does not change when x is scaled, so the gradient through the norm is orthogonal to x."""
    x, weights, grad_y = some_block(seed, (6,))
    grad_x, _ = mlp_backward(x, weights, grad_y, eps=0.0)
    along = ((grad_x - grad_y) * x).sum(-1) / (x.norm(dim=-1) * (grad_x - grad_y).norm(dim=-1))
    assert along.abs().max() < 1e-12


def test_gradients_are_linear_in_grad_y_and_weights_sum_over_tokens(seed: int) -> None:
    x, weights, grad_y = some_block(seed, (4, 3))
    grad_x, found = mlp_backward(x, weights, grad_y)
    tripled, tripled_weights = mlp_backward(x, weights, 3 * grad_y)
    torch.testing.assert_close(tripled, 3 * grad_x)
    parts = [mlp_backward(x[i], weights, grad_y[i]) for i in range(4)]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]), grad_x)
    for name in NAMES:
        torch.testing.assert_close(tripled_weights[name], 3 * found[name])
        torch.testing.assert_close(sum(part[1][name] for part in parts), found[name])


@pytest.mark.parametrize("size", [30.0, 300.0, 3000.0])
def test_gates_far_from_zero_give_finite_gradients(seed: int, size: float) -> None:
    x, weights, grad_y = some_block(seed, (5,))
    weights["gate"] *= size
    single = {name: part.float() for name, part in weights.items()}
    grad_x, found = mlp_backward(x.float(), single, grad_y.float())
    assert all(part.isfinite().all() for part in (grad_x, *found.values()))


def test_float32_is_near_float64_and_stays_float32(seed: int) -> None:
    x, weights, grad_y = some_block(seed, (3, 2))
    wide_x, wide = mlp_backward(x, weights, grad_y, eps=0.01)
    single = {name: part.float() for name, part in weights.items()}
    grad_x, found = mlp_backward(x.float(), single, grad_y.float(), eps=0.01)
    for one, other in zip((grad_x, *found.values()), (wide_x, *wide.values()), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_no_graph_is_built_and_nothing_is_changed(seed: int) -> None:
    x, weights, grad_y = some_block(seed, (2, 3))
    parameters = {name: torch.nn.Parameter(part.clone()) for name, part in weights.items()}
    leaf, g = x.clone().requires_grad_(), grad_y.clone()
    grad_x, found = mlp_backward(leaf, parameters, g)
    assert not any(part.requires_grad for part in (grad_x, *found.values()))
    assert leaf.grad is None and all(part.grad is None for part in parameters.values())
    assert torch.equal(leaf, x) and torch.equal(g, grad_y)
    assert all(torch.equal(parameters[name], weights[name]) for name in NAMES)
    with torch.inference_mode():
        again, _ = mlp_backward(x, weights, grad_y)
    assert torch.equal(again, grad_x)


def test_eight_products_run_and_the_backward_has_twice_those_of_the_forward(seed: int) -> None:
    x, weights, grad_y = some_block(seed, (3, 4), width=10, hidden=16)
    product = 2 * 12 * 10 * 16
    with TensorWork() as work:
        mlp_backward(x, weights, grad_y)
    assert work.flops == 8 * product
    assert work.largest_tensor_bytes == 8 * max(12 * 16, 10 * 16)
    with TensorWork() as alone:
        forward(x, weights, 1e-6)
    assert alone.flops == 3 * product
    with TensorWork() as both:
        by_autograd(x, weights, grad_y, 1e-6)
    assert both.flops == 9 * product


@pytest.mark.parametrize(
    "shape", [(5,), (3, 5), (1, 3, 5), (2, 1, 5), (2, 3, 1), (3, 2, 5), (6, 5), (1, 2, 3, 5), ()], ids=str
)
def test_a_gradient_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    x, weights, _ = some_block(0, (2, 3))
    with pytest.raises(ValueError, match="expected the shape of x"):
        mlp_backward(x, weights, torch.ones(shape, dtype=torch.float64))


def test_without_tokens_a_gradient_of_another_width_is_refused() -> None:
    x, weights, _ = some_block(0, (0,))
    with pytest.raises(ValueError, match="expected the shape of x"):
        mlp_backward(x, weights, torch.ones((0, 6), dtype=torch.float64))


# ------------------------------------------------------------------------------- answers that are wrong at an edge


def for_dimensions(*right: int) -> Callable[..., Gradients]:
    """Only for tensors with so many dimensions; flat ones for all others."""

    def answer(x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6) -> Gradients:
        if x.dim() not in right:
            raise RuntimeError("dimensions")
        return variant()(x, weights, grad_y, eps=eps)

    return answer


def single_precision(step: str) -> Callable[..., Gradients]:
    def narrow(self: Block, *given: Tensor) -> Tensor:
        found = getattr(Block, step)(self, *(part.float() for part in given))
        return found.to(given[0].dtype)

    return variant(**{step: narrow})


def spoiled(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Gradients]:
    def answer(x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6) -> Gradients:
        grad_x, found = variant()(x, weights, grad_y, eps=eps)
        if name == "x":
            return change(grad_x), found
        return grad_x, {**found, name: change(found[name])}

    return answer


def named_otherwise(x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6) -> Gradients:
    grad_x, found = variant()(x, weights, grad_y, eps=eps)
    return grad_x, {f"grad_{name}": part for name, part in found.items()}


def into_grad(x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6) -> Gradients:
    grad_x, found = variant()(x, weights, grad_y, eps=eps)
    for name, part in weights.items():
        if part.requires_grad:
            part.grad = found[name].clone()
    return grad_x, found


def by_the_engine(x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6) -> Gradients:
    """Autograd under a name of its own."""
    Block().refuse(x, grad_y)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(), *(weights[n].detach().requires_grad_() for n in NAMES)]
        y = forward(leaves[0], dict(zip(NAMES, leaves[1:], strict=True)), eps)
    run = torch.autograd.Variable._execution_engine.run_backward
    found = run((y,), (grad_y.contiguous(),), False, False, tuple(leaves), True, False)
    return found[0], dict(zip(NAMES, found[1:], strict=True))


ATTACKS: dict[str, Callable[..., Gradients]] = {
    "two dimensions": for_dimensions(1, 2, 4),
    "three dimensions": for_dimensions(1, 3, 4),
    "up to three dimensions": for_dimensions(1, 2, 3),
    "at least two dimensions": for_dimensions(2, 3, 4),
    "silu in float32": single_precision("silu"),
    "slope in float32": single_precision("slope"),
    "norm in float32": single_precision("through_norm"),
    **{
        f"{name} of zeros": spoiled(name, torch.zeros_like)
        for name in ("x", "gain", "gate", "up", "down", "bias")
    },
    **{
        f"{name} with a sign": spoiled(name, torch.neg)
        for name in ("x", "gain", "gate", "up", "down", "bias")
    },
    "bias [1, width]": spoiled("bias", lambda part: part[None]),
    "gain in float64": spoiled("gain", Tensor.double),
    "x flattened": spoiled("x", lambda part: part.reshape(-1, part.shape[-1])),
    "named otherwise": named_otherwise,
    "left in .grad": into_grad,
    "by autograd's engine": by_the_engine,
    "slope clamped": variant(slope=lambda self, a: Block.slope(self, a).clamp(0, 1)),
    "gate clamped": variant(slope=lambda self, a: Block.slope(self, a) * (a > -1)),
    "RMS clamped": variant(inverse_rms=lambda self, x, eps: Block.inverse_rms(self, x, eps).clamp_max(100)),
    "eps 1e-5": lambda x, w, g, *, eps=1e-5: variant()(x, w, g, eps=eps),
    "eps 0": lambda x, w, g, *, eps=0.0: variant()(x, w, g, eps=eps),
    "eps 1e-8": lambda x, w, g, *, eps=1e-8: variant()(x, w, g, eps=eps),
    "GELU's slope, nearly": variant(
        slope=lambda self, a: torch.special.ndtr(a) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points == 0


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason


@pytest.mark.parametrize("name", exercise.forbid)
def test_the_library_answers_that_are_switched_off_exist(name: str) -> None:
    place: Any = torch
    for part in name.split(".")[1:]:
        place = getattr(place, part)
    assert callable(place) or isinstance(place, torch._C._ImperativeEngine)
