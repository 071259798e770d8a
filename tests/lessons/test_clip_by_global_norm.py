"""clip_by_global_norm against torch's own, fractions, and answers that are wrong at an edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.clip_by_global_norm import Clip, variant

exercise = find("clip_by_global_norm")
clip_by_global_norm = exercise.reference
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def parameters_of(seed: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in ((3, 5), (7,), (2, 3, 4), ()):
        p = torch.zeros(shape, dtype=dtype, requires_grad=True)
        p.grad = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        found.append(p)
    return found


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def exact_square(parameters: Iterable[Tensor]) -> Fraction:
    """Sum of squares, without any rounding."""
    values = [value for g in gradients(parameters) for value in g.double().flatten().tolist()]
    return sum((Fraction(value) ** 2 for value in values), Fraction(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_norm_is_the_root_of_what_fractions_add_up_to(seed: int, dtype: torch.dtype, scale: float) -> None:
    parameters = parameters_of(seed, dtype, scale)
    exact = exact_square(parameters)
    norm = clip_by_global_norm(parameters, math.inf)
    assert type(norm) is float
    # A square, some 50 additions and a root, each half an eps of float64.
    assert abs(Fraction(norm) ** 2 / exact - 1) <= 60 * Fraction(2) ** -52


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_magnitudes_whose_squares_do_not_fit_float32_keep_their_norm(seed: int, scale: float) -> None:
    parameters = parameters_of(seed, torch.float32, scale)
    exact = exact_square(parameters)
    before = gradients(parameters)
    bound = scale / 100
    norm = clip_by_global_norm(parameters, bound)
    assert norm == pytest.approx(math.sqrt(exact), rel=1e-13)
    for g, old in zip(gradients(parameters), before, strict=True):
        torch.testing.assert_close(g.double(), old.double() * bound / norm, rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize("bound", [0.3, 2.0, 1e6])
def test_float64_gradients_are_those_of_torch(seed: int, bound: float) -> None:
    ours, theirs = parameters_of(seed, torch.float64, 1e3), parameters_of(seed, torch.float64, 1e3)
    norm = clip_by_global_norm(ours, bound)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, bound).item(), rel=1e-14)
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        # torch divides by the norm plus 1e-6, and the norm is above 1000.
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_afterwards_is_the_bound_or_what_it_was(seed: int, dtype: torch.dtype) -> None:
    parameters = parameters_of(seed, dtype, 3.0)
    norm = math.sqrt(exact_square(parameters))
    clip_by_global_norm(parameters, norm / 7)
    # Each element is rounded once; float16 may lose more where it becomes subnormal, below 6e-5 of a norm above 1.
    room = 2 * torch.finfo(dtype).eps + 1e-4 * (dtype == torch.float16) + 64 * 2**-52
    assert math.sqrt(exact_square(parameters)) == pytest.approx(norm / 7, rel=room)
    before = gradients(parameters)
    clip_by_global_norm(parameters, norm)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(parameters), strict=True))


def test_direction_is_kept(seed: int) -> None:
    parameters = parameters_of(seed, torch.float64)
    before = torch.cat([g.flatten() for g in gradients(parameters)])
    clip_by_global_norm(parameters, 0.01)
    after = torch.cat([g.flatten() for g in gradients(parameters)])
    assert torch.cosine_similarity(before, after, dim=0).item() == pytest.approx(1, abs=1e-14)


def test_sums_of_many_narrow_values_do_not_stop_growing() -> None:
    p = torch.zeros(100_000, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.full_like(p, 0.5)
    assert clip_by_global_norm([p], math.inf) == pytest.approx(math.sqrt(25_000), rel=1e-14)


def test_a_generator_and_a_model_without_gradients_are_accepted() -> None:
    module = torch.nn.Linear(3, 2)
    assert clip_by_global_norm(module.parameters(), 1.0) == 0.0
    assert all(p.grad is None for p in module.parameters())
    module(torch.ones(3)).sum().backward()
    # Both rows of the weight and the bias have gradients of 1: 8 of them.
    assert clip_by_global_norm((p for p in module.parameters()), 1.0) == pytest.approx(math.sqrt(8))
    assert module.bias.grad is not None
    assert module.bias.grad.tolist() == pytest.approx([1 / math.sqrt(8)] * 2)
    assert clip_by_global_norm([], 1.0) == 0.0


def test_scaling_happens_in_the_memory_where_the_gradient_is() -> None:
    buffer = torch.arange(12.0)
    p = torch.zeros(3, 2, requires_grad=True)
    p.grad = buffer[3:9].view(2, 3).T
    kept = p.grad
    norm = clip_by_global_norm([p], 1.0)
    assert p.grad is kept
    assert norm == pytest.approx(math.sqrt(sum(k * k for k in range(3, 9))))
    torch.testing.assert_close(buffer[3:9], torch.arange(3.0, 9.0) / norm)
    assert buffer[:3].tolist() + buffer[9:].tolist() == [0.0, 1.0, 2.0, 9.0, 10.0, 11.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [1e-3, 1e9, math.inf])
def test_a_norm_that_is_not_finite_is_refused_and_nothing_changes(
    seed: int, bad: float, bound: float
) -> None:
    parameters = parameters_of(seed, torch.float32)
    assert parameters[2].grad is not None
    parameters[2].grad[1, 2, 3] = bad
    before = gradients(parameters)
    with pytest.raises(ValueError, match="expected no NaN or Inf"):
        clip_by_global_norm(parameters, bound)
    for g, old in zip(gradients(parameters), before, strict=True):
        torch.testing.assert_close(g, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bound", [0.0, -0.0, -1.0, math.nan, -math.inf])
def test_a_bound_that_is_not_above_zero_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        clip_by_global_norm(parameters_of(0, torch.float32), bound)


def test_an_empty_gradient_adds_nothing() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    empty.grad = torch.zeros(0, 3)
    assert clip_by_global_norm([empty], 1.0) == 0.0
    parameters = parameters_of(0, torch.float64)
    norm = clip_by_global_norm([empty, *parameters], math.inf)
    assert norm == pytest.approx(clip_by_global_norm(parameters, math.inf), rel=1e-15)


def test_the_factor_is_not_rounded_to_float16() -> None:
    narrow = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    narrow.grad = torch.full((4,), 6e4, dtype=torch.float16)
    large = torch.zeros(1, requires_grad=True)
    large.grad = torch.tensor([3e12])
    clip_by_global_norm([narrow, large], 6e4)
    torch.testing.assert_close(narrow.grad, torch.full((4,), 1.2e-3, dtype=torch.float16))


def test_sparse_and_complex_gradients_are_refused_before_anything_changes() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 4])).sum().backward()
    turned = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    turned.grad = torch.full_like(turned, 2j).detach()
    for other in (table.weight, turned):
        parameters = parameters_of(0, torch.float32)
        before = gradients(parameters)
        with pytest.raises(ValueError, match="sparse or complex"):
            clip_by_global_norm([*parameters, other], 0.1)
        assert all(torch.equal(a, b) for a, b in zip(before, gradients(parameters), strict=True))


def test_no_tensor_made_is_larger_than_the_largest_gradient_in_float64(seed: int) -> None:
    parameters = parameters_of(seed, torch.float32)
    with TensorWork() as work:
        clip_by_global_norm(parameters, 0.1)
    assert work.largest_tensor_bytes <= 8 * 24
    with TensorWork() as together:
        torch.cat([g.flatten().double() for g in gradients(parameters)])
    assert together.largest_tensor_bytes > 8 * 24


def through(change: Callable[[Tensor, float], Any]) -> Callable[..., float]:
    """Measures as it should, then changes each parameter's gradient in some way."""

    def clip(parameters: Iterable[Tensor], max_norm: float) -> float:
        kept = list(parameters)
        norm = variant(scale=lambda self, g, factor: None)(kept, max_norm)
        for p in kept:
            if p.grad is not None and norm > max_norm:
                change(p, max_norm / norm)
        return norm

    return clip


def other_memory(p: Tensor, factor: float) -> None:
    assert p.grad is not None
    p.grad.data = p.grad.data * factor


def own_dtype_factor(p: Tensor, factor: float) -> None:
    assert p.grad is not None
    p.grad.mul_(torch.tensor(factor, dtype=torch.float16))


def only(which: Callable[[Tensor], bool]) -> Callable[..., float]:
    def scale(self: Clip, g: Tensor, factor: float) -> None:
        if which(g) and factor != 1:
            g.mul_(factor)

    return variant(scale=scale)


def norms(norm: Callable[[Clip, list[Tensor]], float]) -> Callable[..., float]:
    return variant(norm=norm)


def refusing(broken: Callable[[list[Tensor]], bool]) -> Callable[..., float]:
    """Looks at gradients in another way, and takes their norm as it comes."""

    def refuse_kinds(self: Clip, given: list[Tensor]) -> None:
        Clip.refuse_kinds(self, given)
        if broken(given):
            raise ValueError("not finite")

    return variant(refuse_kinds=refuse_kinds, refuse_norm=lambda self, norm: None)


ATTACKS: dict[str, Callable[..., Any]] = {
    "other memory": through(other_memory),
    "a factor in float16": through(own_dtype_factor),
    "contiguous gradients only": only(lambda g: g.is_contiguous()),
    "no scalars": only(lambda g: g.dim() > 0),
    "loud gradients only": only(lambda g: g.abs().max().item() > 1e-6),
    "sign": through(lambda p, factor: p.grad.sign_().mul_(factor) if p.grad is not None else None),
    "does nothing": lambda parameters, max_norm: max_norm,
    "norm of the first": norms(lambda self, gs: math.sqrt(self.squares(gs[0])) if gs else 0.0),
    "norm in float32 at the end": norms(lambda self, gs: torch.tensor(Clip.norm(self, gs)).item()),
    "norms added up in float32": norms(
        lambda self, gs: torch.stack([g.float().norm() for g in gs]).norm().item() if gs else 0.0
    ),
    "a floor under the norm": norms(lambda self, gs: max(Clip.norm(self, gs), 1e-12)),
    "first gradient looked at": refusing(lambda gs: bool(gs) and not gs[0].isfinite().all()),
    "last gradient looked at": refusing(lambda gs: bool(gs) and not gs[-1].isfinite().all()),
    "largest value looked at": refusing(lambda gs: any(not g.max().isfinite() for g in gs)),
    "bound of 0": variant(
        refuse_bound=lambda self, bound: None if bound == 0 else Clip.refuse_bound(self, bound)
    ),
    "bound of NaN": variant(
        refuse_bound=lambda self, bound: None if bound != bound else Clip.refuse_bound(self, bound)
    ),
    "sparse refused late": variant(
        refuse_sparse=lambda self, gs: None,
        squares=lambda self, g: Clip.squares(self, g.to_dense() if g.is_sparse else g),
        scale=lambda self, g, factor: [Clip.refuse_kinds(self, [g]), Clip.scale(self, g, factor)],
    ),
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
