"""muon_update against torch.optim.Muon, singular value decompositions, rational numbers and float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.muon_update import Muon, variant

exercise = find("muon_update")
muon_update = exercise.reference
SHAPES = [(4, 9), (9, 4), (6, 6), (1, 7), (7, 1), (24, 40), (40, 24)]
A, B, C = Fraction("3.4445"), Fraction("-4.7750"), Fraction("2.0315")


def matrix(seed: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conditioned(seed: int, rows: int, cols: int) -> Tensor:
    """A float64 matrix whose singular values lie between 1 and 2."""
    left, _, right = torch.linalg.svd(matrix(seed, rows, cols, torch.float64), full_matrices=False)
    values = 1 + torch.rand(min(rows, cols), generator=torch.Generator().manual_seed(seed + 1)).double()
    return left * values @ right


def torchs(weight: Tensor, gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """What torch.optim.Muon subtracts at each step, with a learning rate of 1 and no decay."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, **options)
    seen = []
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        seen.append(before - parameter.detach())
    return seen


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_equal_torchs_when_its_steps_are_kept_from_bfloat16(
    seed: int, shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    gradients = [matrix(seed + i, *shape, dtype=torch.float64) * size for i, size in enumerate((1, 3, 0.3))]
    momentum = torch.zeros(shape, dtype=torch.float64)
    expected = torchs(momentum, gradients, momentum=0.9, nesterov=nesterov)
    for gradient, update in zip(gradients, expected, strict=True):
        found = muon_update(gradient, momentum, beta=0.9, nesterov=nesterov)
        # A direction near 0 grows 485 times in five steps, so do 2^-52 and the few products it went through.
        torch.testing.assert_close(found, update, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_are_near_torchs_in_bfloat16(seed: int, shape: tuple[int, int]) -> None:
    gradient = conditioned(seed, *shape).float()
    found = muon_update(gradient, torch.zeros(shape))
    expected = torchs(torch.zeros(shape), [gradient])[0]
    # Each of the five steps rounds about three times to 2^-9, and the next ones enlarge that by their slope, which is
    # about 2 on [0.1, 1]: 3 * 2^-9 * (1 + 2 + 4 + 8 + 16). The strict comparison is the one above.
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_torchs_momentum_is_the_mean_that_ours_is(seed: int) -> None:
    gradients = [matrix(seed + i, 4, 9) for i in range(3)]
    parameter = torch.nn.Parameter(torch.zeros(4, 9))
    optimizer = torch.optim.Muon([parameter], lr=1.0, momentum=0.9)
    momentum = torch.zeros(4, 9)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        muon_update(gradient, momentum, beta=0.9)
        torch.testing.assert_close(momentum, optimizer.state[parameter]["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_vectors_stay_and_values_lie_where_the_statement_says(
    seed: int, shape: tuple[int, int]
) -> None:
    for draw in range(20):
        gradient = matrix(seed + draw, *shape, dtype=torch.float64)
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        update = muon_update(gradient, torch.zeros_like(gradient)) / math.sqrt(max(1, shape[0] / shape[1]))
        found = left.T @ update @ right.T
        off_diagonal = found - torch.diag(found.diagonal())
        # Singular vectors of float64 are good to 2^-52 over the gap between two values, and grow 485 times.
        assert off_diagonal.abs().max() < 1e-9
        large = values >= 0.003 * values.norm()
        assert ((found.diagonal()[large] >= 0.68) & (found.diagonal()[large] <= 1.21)).all()
        assert (found.diagonal()[~large] < 1.21).all()


def test_every_value_from_0_003_to_1_ends_between_0_68_and_1_21() -> None:
    values = torch.logspace(math.log10(0.003), 0, 200_001, dtype=torch.float64)
    for _ in range(5):
        values = float(A) * values + float(B) * values**3 + float(C) * values**5
    assert 0.68 < values.min() < 0.69
    assert 1.20 < values.max() < 1.21
    assert "between 0.68 and 1.21" in (inspect.getdoc(muon_update) or "").replace("\n", " ")


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_a_row_ends_at_the_polynomial_of_1_in_rational_numbers(steps: int) -> None:
    value = Fraction(1)
    for _ in range(steps):
        value = (A * value + B * value**3 + C * value**5).limit_denominator(10**30)
    row = torch.tensor([[3.0, -4.0, 12.0]], dtype=torch.float64)
    found = muon_update(row, torch.zeros_like(row), steps=steps)
    torch.testing.assert_close(found, row / 13 * float(value), rtol=1e-13, atol=0)
    column = muon_update(row.T, torch.zeros_like(row.T), steps=steps)
    torch.testing.assert_close(column, row.T / 13 * float(value) * math.sqrt(3), rtol=1e-13, atol=0)


def test_diagonal_matrices_follow_the_polynomial_value_by_value() -> None:
    values = [Fraction(12), Fraction(4), Fraction(3), Fraction(0)]
    gradient = torch.diag(torch.tensor([float(value) for value in values], dtype=torch.float64))
    expected = []
    for value in values:
        x = value / 13
        for _ in range(3):
            x = A * x + B * x**3 + C * x**5
        expected.append(float(x))
    found = muon_update(gradient, torch.zeros_like(gradient), steps=3)
    torch.testing.assert_close(found, torch.diag(torch.tensor(expected, dtype=torch.float64)))


def test_momentum_is_written_by_hand() -> None:
    gradient, momentum = torch.tensor([[4.0, 8.0]]), torch.tensor([[1.0, 0.0]])
    ahead = muon_update(gradient, momentum, beta=0.75)
    assert momentum.tolist() == [[1.75, 2.0]]  # 0.75 * 1 + 0.25 * 4 and 0.25 * 8
    u = torch.tensor([[0.75 * 1.75 + 1.0, 0.75 * 2.0 + 2.0]])
    torch.testing.assert_close(ahead / ahead.norm(), u / u.norm())
    plain = muon_update(gradient, momentum, beta=0.75, nesterov=False)
    torch.testing.assert_close(plain / plain.norm(), momentum / momentum.norm())


def test_a_summed_momentum_gives_the_same_updates_from_the_start(seed: int) -> None:
    # A constant factor before u is divided away: what tells a sum from a mean is the buffer alone.
    mean, total = torch.zeros(4, 9, dtype=torch.float64), torch.zeros(4, 9, dtype=torch.float64)
    summed = exercise.mistakes["summed_momentum"].function
    for step in range(4):
        gradient = matrix(seed + step, 4, 9, torch.float64)
        torch.testing.assert_close(muon_update(gradient, mean), summed(gradient, total))
        torch.testing.assert_close(total, mean / 0.05)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_within_the_tolerance_of_float64(seed: int, shape: tuple[int, int]) -> None:
    from llmcourse.agreement import difference

    gradient = matrix(seed, *shape)
    found = muon_update(gradient, torch.zeros(shape))
    exact = muon_update(gradient.double(), torch.zeros(shape, dtype=torch.float64))
    assert difference(found, exact.float(), tol=8) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transpose_gives_the_transposed_update_but_for_the_factor(
    seed: int, shape: tuple[int, int]
) -> None:
    gradient = matrix(seed, *shape, dtype=torch.float64)
    rows, cols = shape
    one = muon_update(gradient, torch.zeros_like(gradient))
    other = muon_update(gradient.T, torch.zeros_like(gradient.T)).T
    torch.testing.assert_close(one * math.sqrt(max(1, cols / rows)), other * math.sqrt(max(1, rows / cols)))


@pytest.mark.parametrize("power", [-50, -30, 30, 50])
def test_a_power_of_two_changes_nothing(seed: int, power: int) -> None:
    gradient = matrix(seed, 4, 9)
    expected = muon_update(gradient, torch.zeros(4, 9))
    torch.testing.assert_close(muon_update(gradient * 2.0**power, torch.zeros(4, 9)), expected)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_zeros_give_zeros_of_their_own(shape: tuple[int, int], nesterov: bool) -> None:
    momentum = torch.zeros(shape)
    update = muon_update(torch.zeros(shape), momentum, nesterov=nesterov)
    assert torch.equal(update, torch.zeros(shape))
    update.add_(1)
    assert torch.equal(momentum, torch.zeros(shape))


@pytest.mark.parametrize(("rows", "cols"), [(12, 60), (60, 12), (20, 20)])
def test_fifteen_products_run_on_the_short_side(seed: int, rows: int, cols: int) -> None:
    short, long = sorted((rows, cols))
    gradient = matrix(seed, rows, cols)
    with TensorWork() as work:
        muon_update(gradient, torch.zeros(rows, cols))
    assert work.calls["aten.mm"] == 15
    assert work.flops == 5 * (4 * short**2 * long + 2 * short**3)
    assert work.largest_tensor_bytes == gradient.nbytes


@pytest.mark.parametrize(
    ("gradient", "momentum", "options", "message"),
    [
        (torch.ones(3), torch.ones(3), {}, "AdamW"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), {}, "AdamW"),
        (torch.ones(0, 4), torch.ones(0, 4), {}, "values in them"),
        (torch.ones(3, 4), torch.ones(4, 3), {}, "one shape"),
        (torch.ones(3, 4).to_sparse(), torch.ones(3, 4), {}, "dense"),
        (torch.ones(3, 4, dtype=torch.complex64), torch.ones(3, 4), {}, "float"),
        (torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 4), {}, "float"),
        (torch.full((3, 4), torch.nan), torch.ones(3, 4), {}, "NaN or infinity"),
        (torch.full((3, 4), torch.inf), torch.ones(3, 4), {}, "NaN or infinity"),
        (torch.ones(3, 4), torch.ones(3, 4), {"beta": 1.0}, "beta=1.0"),
        (torch.ones(3, 4), torch.ones(3, 4), {"beta": math.nan}, "beta=nan"),
        (torch.ones(3, 4), torch.ones(3, 4), {"steps": 0}, "steps=0"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    gradient: Tensor, momentum: Tensor, options: dict[str, Any], message: str
) -> None:
    before = momentum.clone()
    with pytest.raises(ValueError, match=message):
        muon_update(gradient, momentum, **options)
    assert torch.equal(momentum, before)


def test_a_typical_singular_value_diverges_and_the_whole_norm_does_not() -> None:
    gradient = torch.diag(torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    typical = exercise.mistakes["typical_singular_value"].function
    assert not typical(gradient, torch.zeros(6, 6)).isfinite().all()
    assert muon_update(gradient, torch.zeros(6, 6)).abs().max() < 1.21


def at_least(smallest: float) -> Callable[..., Tensor]:
    return variant(normalised=lambda self, u: u / self.norm(u).clamp_min(smallest))


def refusing(is_broken: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    def refuse_values(self: Muon, gradient: Tensor) -> None:
        if is_broken(gradient):
            raise ValueError("NaN or infinity")

    return variant(refuse_values=refuse_values)


def remembering_shapes(gradient: Tensor, momentum: Tensor, **options: Any) -> Tensor:
    """Keeps a buffer of its own for each shape, where the caller's is the one to use."""
    kept = BUFFERS.setdefault(tuple(gradient.shape), torch.zeros_like(momentum))
    update = variant()(gradient, kept.to(momentum.dtype), **options)
    momentum.copy_(kept)
    return update


BUFFERS: dict[tuple[int, ...], Tensor] = {}
ATTACKS: dict[str, Callable[..., Any]] = {
    **{f"norm at least {smallest:g}": at_least(smallest) for smallest in (1e-7, 1e-8, 1e-12, 1e-15)},
    "sum": refusing(lambda g: not g.sum().isfinite()),
    "norm of the gradient": refusing(lambda g: not g.norm().isfinite()),
    "largest": refusing(lambda g: g.amax().isinf() or g.isnan().any()),
    "first row": refusing(lambda g: not g[0].isfinite().all()),
    "momentum in place, gradient as momentum": lambda g, m, **options: variant()(g, m.copy_(g), **options),
    "returns u": variant(orthogonalised=lambda self, u, steps: self.normalised(u)),
    "returns the gradient": lambda g, m, **options: g.to(m.dtype),
    "buffers by shape": remembering_shapes,
    "QR": variant(orthogonalised=lambda self, u, steps: torch.linalg.qr(u.mT)[0].mT if u.any() else u),
    "rows of length 1": variant(
        orthogonalised=lambda self, u, steps: torch.nn.functional.normalize(u, dim=1)
    ),
    "constants of two digits": variant(coefficients=(3.44, -4.78, 2.03)),
    "factor from the first row": variant(factor=lambda self, rows, cols: math.sqrt(rows / cols)),
    "dense twice": variant(refuse_kind=lambda self, gradient: None),
    "beta of 1": variant(
        refuse_options=lambda self, beta, steps: Muon.refuse_options(self, min(beta, 0.9), steps)
    ),
    "beta below 0": variant(
        refuse_options=lambda self, beta, steps: Muon.refuse_options(self, max(beta, 0.5), steps)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    BUFFERS.clear()
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    assert verdict.points == 0


def test_the_answer_that_the_attacks_are_made_of_is_right(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, variant(), seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason
