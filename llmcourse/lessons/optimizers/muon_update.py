"""Muon's update of one matrix: momentum, then a few matrix products that make all its directions about equally long."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(
    points=3,
    minutes=18,
    extension=True,
    mutates=True,
    forbid=(
        "torch.optim.Muon",
        "torch.optim._muon.Muon",
        "torch.optim._muon.muon",
        "torch.optim._muon._zeropower_via_newtonschulz",
    ),
    hints=(
        "With u = U S V^T, a step puts a polynomial of each singular value in the place of S and leaves U and V as "
        "they are. Dividing by the norm first brings S into [0, 1], where the polynomial was chosen to work.",
        "Write the momentum with operations that end in _, and nothing else. Only a tall u is transposed, and the "
        "result transposed back before the factor. A norm of 0 is the one to look at before dividing.",
    ),
)
def muon_update(
    gradient: Tensor,
    momentum: Tensor,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
) -> Tensor:
    """What Muon subtracts, times the learning rate, from a weight matrix; about 15 lines.

    gradient [rows, cols] of any float dtype of 16 bits or more, momentum [rows, cols]
    float32 or float64. In the dtype of momentum, which the returned update has too:

        momentum <- beta * momentum + (1 - beta) * gradient                      in place
        u = beta * momentum + (1 - beta) * gradient    with the momentum just written
        u = momentum                                   instead, with nesterov=False
        X = u / ||u||_F                                Frobenius: root of the sum of squares
        X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X     with A = X X^T, `steps` times
        update = X * sqrt(max(1, rows / cols))

    With more rows than cols, the steps are taken on the transpose and X is transposed back
    after them: the numbers are the same, and A is [cols, cols] instead of [rows, rows].

    A gradient of magnitude 1e-15 (1e-25 with a float64 momentum) gives the same update as
    one of magnitude 1 or 1e15: no eps is added. A u of zeros gives zeros. The update is a
    new tensor; gradient stays as it is, and neither tensor need be contiguous.

    ValueError, with momentum as it was: gradient is not a matrix, is empty, is sparse,
    is not of a real float dtype, holds NaN or infinity, or has another shape than
    momentum; beta is not in [0, 1); steps is below 1.

    For a quarter of the points: the matrix products take at most the FLOPs of the steps
    as written (three products each, on the short side), and no tensor has more than
    twice the bytes of the update.

    Five steps keep the singular vectors of u. A singular value of at least 0.003 ||u||_F
    ends between 0.68 and 1.21, a smaller one lower: the update is near U V^T, not equal.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon, and torch.optim.Muon, which
    takes the steps in bfloat16 and clamps the norm at 1e-7. The factor is Jordan's;
    Moonlight (Liu et al. 2025, arXiv 2502.16982) has 0.2 * sqrt(max(rows, cols)) instead,
    to match the size of AdamW's steps.
    """
    ### BEGIN SOLUTION
    real = gradient.is_floating_point() and gradient.layout == torch.strided
    if not real or gradient.dim() != 2 or gradient.numel() == 0 or gradient.shape != momentum.shape:
        raise ValueError(
            f"gradient {gradient.dtype} {list(gradient.shape)}, momentum {list(momentum.shape)}: expected two "
            "dense float matrices of one shape, with values in them; give vectors and embeddings to AdamW"
        )
    if not gradient.isfinite().all():
        raise ValueError("gradient holds NaN or infinity; skip this step")
    if not 0 <= beta < 1 or steps < 1:
        raise ValueError(f"beta={beta}, steps={steps}: expected 0 <= beta < 1 and at least 1 step")
    rows, cols = gradient.shape
    gradient = gradient.to(momentum.dtype)
    momentum.mul_(beta).add_(gradient, alpha=1 - beta)
    u = beta * momentum + (1 - beta) * gradient if nesterov else momentum
    norm = torch.linalg.vector_norm(u)
    x = u / norm if norm > 0 else torch.zeros_like(u)
    if rows > cols:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if rows > cols:
        x = x.T
    return x * math.sqrt(max(1, rows / cols))
    ### END SOLUTION


excuse(
    muon_update,
    "not real or gradient.dim() != 2 or gradient.numel() == 0 or (gradient.shape != momentum.shape) -> "
    "not real or gradient.numel() == 0 or gradient.shape != momentum.shape",
    "Unpacking rows and cols refuses other dimensions with a ValueError too, in words that help nobody.",
)
excuse(muon_update, "rows > cols -> rows >= cols", "A square matrix gives the same numbers from either side.")
excuse(
    muon_update, "rows > cols -> rows >= cols #2", "A square matrix gives the same numbers from either side."
)
excuse(muon_update, "max(1, rows / cols) -> max(rows / cols, 1)", "The larger of two, in another order.")


# ---------------------------------------------------------------------------------------------------------- cases

# A direction that starts near 0 grows by 3.4445 a step, about 500 times in five, and so does its rounding error.
GROWS = "rounding errors of directions near 0 grow with them, by 3.4445 a step"


def direction(answer: Any, gradient: Tensor, momentum: Tensor | None = None, **options: Any) -> list[Tensor]:
    """[update, the momentum after it]; a momentum of zeros, unless one is given."""
    momentum = torch.zeros(gradient.shape) if momentum is None else momentum
    return [answer(gradient, momentum, **options), momentum]


@case(muon_update, tol=8, because=GROWS)
def wide_and_tall(answer, rng):
    """Matrices of several shapes, a row and a column among them, with a momentum of zeros."""
    wide, tall = rng.integer(9, 20), rng.integer(9, 20)
    shapes = ((6, wide), (tall, 5), (1, wide), (tall, 1), (3, 40), (40, 3))
    return [direction(answer, rng.normal(*shape)) for shape in shapes]


@case(muon_update, tol=8, because=GROWS)
def several_steps_of_training(answer, rng):
    """Four gradients one after the other, with the momentum that the last call left."""
    beta, shape = rng.choice((0.9, 0.8, 0.97)), rng.choice(((5, 9), (9, 5)))
    momentum = rng.normal(*shape)
    return [
        [each.clone() for each in direction(answer, rng.normal(*shape) * size, momentum, beta=beta)]
        for size in (1.0, 3.0, 0.3, 1.0)
    ]


@case(muon_update, tol=8, because=GROWS)
def without_nesterov(answer, rng):
    """nesterov=False: the momentum itself is made equally long."""
    momentum = rng.normal(4, 11)
    beta = rng.choice((0.9, 0.95, 0.7))
    return [
        [
            each.clone()
            for each in direction(answer, rng.normal(4, 11), momentum, beta=beta, nesterov=nesterov)
        ]
        for nesterov in (False, False, True)
    ]


@case(muon_update, tol=8, because=GROWS)
def no_momentum(answer, rng):
    """beta=0: the gradient alone counts."""
    shape = (rng.integer(4, 7), 12)
    return [
        direction(answer, rng.normal(*shape), rng.normal(*shape) * 5, beta=0.0, nesterov=nesterov)
        for nesterov in (True, False)
    ]


@case(muon_update, tol=100, because=GROWS)
def known_spectrum(answer, rng):
    """In float64, a matrix whose singular values fall from 1 to 0.0003."""
    values = torch.logspace(0, -3.5, 8, dtype=torch.float64) * rng.uniform(0.8, 1.2, 8, dtype=torch.float64)
    left, _ = torch.linalg.qr(rng.normal(8, 8, dtype=torch.float64))
    right, _ = torch.linalg.qr(rng.normal(13, 8, dtype=torch.float64))
    gradient = left * values @ right.T
    momentum = torch.zeros(8, 13, dtype=torch.float64)
    return direction(answer, gradient, momentum) + direction(answer, gradient.T, momentum.T.clone())


@case(muon_update, tol=100, because=GROWS)
def numbers_of_steps(answer, rng):
    """One step, two, four, three or seven, nine, in float64."""
    gradient = rng.normal(5, 8, dtype=torch.float64)
    return [
        direction(answer, gradient, torch.zeros(5, 8, dtype=torch.float64), steps=steps)
        for steps in (1, 2, 4, rng.choice((3, 7)), 9)
    ]


@case(muon_update, tol=8, because=GROWS)
def every_magnitude(answer, rng):
    """Gradients of magnitudes 1e-15 to 1e15, and of 1e-25 in float64, give the same kind of update."""
    sizes = (1e-15, 1e-8, 1e-5, 1e3, 1e15)
    seen = {
        f"{size:g}": direction(answer, rng.normal(*rng.choice(((4, 9), (9, 4)))) * size) for size in sizes
    }
    quiet = rng.normal(4, 9, dtype=torch.float64) * 1e-25
    return {**seen, "1e-25 in float64": direction(answer, quiet, torch.zeros_like(quiet))}


@case(muon_update, tol=8, because=GROWS)
def zero_gradients(answer, rng):
    """A gradient of zeros gives zeros with a momentum of zeros, and the momentum's direction otherwise."""
    shape = rng.choice(((3, 7), (7, 3)))
    zeros, momentum = torch.zeros(shape), rng.normal(*shape)
    seen = []
    for options in ({}, {"nesterov": False}):
        still = torch.zeros(shape)
        update = answer(zeros, still, **options)
        seen.append([update.clone(), still.clone()])
        update.add_(1)  # the update is the caller's: it is not a view of the momentum
        seen.append(
            [still, zeros.clone(), *(x.clone() for x in direction(answer, zeros, momentum, **options))]
        )
    return seen


@case(muon_update, tol=8, because=GROWS)
def other_dtypes(answer, rng):
    """bfloat16, float64 and float16 gradients with a momentum in float32; a float16 sum would overflow."""
    shape = (5, rng.integer(8, 14))
    momentum = rng.normal(*shape)
    gradients = [rng.normal(*shape, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)]
    gradients.append(rng.uniform(2e4, 6e4, *shape, dtype=torch.float16))
    return [[each.clone() for each in direction(answer, gradient, momentum)] for gradient in gradients]


@case(muon_update, tol=8, because=GROWS)
def parts_of_larger_tensors(answer, rng):
    """Gradient and momentum are views, transposed or with gaps; what lies around them stays."""
    cols = rng.integer(8, 12)
    gradients, buffer = rng.normal(cols, 9), rng.normal(6, 2 * cols)
    before = gradients.clone()
    updates = [answer(gradients[:, :4].T, buffer[1:5, ::2]), answer(gradients[:, 2:6], buffer[1:5, ::2].T)]
    return {"updates": updates, "buffer": buffer, "gradient changed": not torch.equal(gradients, before)}


@case(muon_update, tol=8, because=GROWS)
def refusals(answer, rng):
    """What is refused, and that the momentum is as it was; what lies next to it is not refused."""
    momentum = rng.normal(4, 6)
    before = momentum.clone()

    def broken(value: float) -> Tensor:
        gradient = rng.normal(4, 6)
        gradient[rng.integer(0, 3), rng.integer(0, 5)] = value
        return gradient

    fine = rng.normal(4, 6)
    flat, stacked, empty = torch.zeros(6), torch.zeros(2, 4, 6), torch.zeros(0, 6)
    found = {
        "vector": raised(answer, flat, flat.clone()),
        "stack": raised(answer, stacked + 1, stacked.clone()),
        "empty": raised(answer, empty, empty.clone()),
        "no columns": raised(answer, empty.T, empty.T.clone()),
        "transposed": raised(answer, fine.T, momentum),
        "one row": raised(answer, fine[:1], momentum),
        "a vector for a matrix": raised(answer, fine[0], momentum),
        "sparse": raised(answer, fine.to_sparse(), momentum),
        "sparse, in rows": raised(answer, fine.to_sparse_csr(), momentum),
        "complex": raised(answer, fine.to(torch.complex64), momentum),
        "integers": raised(answer, fine.mul(9).int(), momentum),
        "NaN": raised(answer, broken(math.nan), momentum),
        "infinity": raised(answer, broken(math.inf), momentum),
        "minus infinity": raised(answer, broken(-math.inf), momentum),
        "beta 1": raised(answer, fine, momentum, beta=1.0),
        "beta below 0": raised(answer, fine, momentum, beta=-0.1),
        "beta above 1": raised(answer, fine, momentum, beta=1.5),
        "beta NaN": raised(answer, fine, momentum, beta=math.nan),
        "no steps": raised(answer, fine, momentum, steps=0),
        "steps below 0": raised(answer, fine, momentum, steps=-1),
        "momentum changed": not torch.equal(momentum, before),
    }
    return {"refused": found, "fine": direction(answer, fine, momentum)}


@cost(muon_update, share=1 / 4)
def three_products_on_the_short_side(answer, rng):
    """FLOPs of matrix products, and the largest tensor, for a wide, a tall and a square matrix."""
    long, short, steps = rng.integer(36, 60), rng.integer(10, 14), rng.choice((4, 5))
    counts = {}
    for name, shape in (("wide", (short, long)), ("tall", (long, short)), ("square", (24, 24))):
        gradient, momentum = rng.normal(*shape), rng.normal(*shape)
        with TensorWork(large_elements=64) as work:
            answer(gradient, momentum, steps=steps)
        less, more = sorted(shape)
        # X X^T and (...) X take 2 less^2 more each, A A takes 2 less^3.
        counts[f"FLOPs, {name}"] = (work.flops, steps * (4 * less**2 * more + 2 * less**3))
        counts[f"largest tensor, {name}, bytes"] = (work.largest_tensor_bytes, 2 * gradient.nbytes)
        counts[f"operations without a count, {name}"] = (len(work.uncounted), 0)
    return counts


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Muon:
    """A right answer in small steps; a mistake replaces one of them."""

    coefficients = (3.4445, -4.7750, 2.0315)

    def refuse(self, gradient: Tensor, momentum: Tensor) -> None:
        if gradient.ndim != 2 or gradient.shape != momentum.shape or 0 in gradient.shape:
            raise ValueError("shape")
        self.refuse_kind(gradient)
        self.refuse_values(gradient)

    def refuse_kind(self, gradient: Tensor) -> None:
        if gradient.layout != torch.strided or gradient.is_complex() or not gradient.is_floating_point():
            raise ValueError("kind")

    def refuse_values(self, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise ValueError("NaN or infinity")

    def refuse_options(self, beta: float, steps: int) -> None:
        if not 0 <= beta < 1 or steps < 1:
            raise ValueError("options")

    def accumulated(self, gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
        return momentum.lerp_(gradient, 1 - beta)

    def looked_ahead(self, gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
        return torch.lerp(gradient, momentum, beta)

    def blended(self, gradient: Tensor, momentum: Tensor, beta: float, nesterov: bool) -> Tensor:
        momentum = self.accumulated(gradient, momentum, beta)
        return self.looked_ahead(gradient, momentum, beta) if nesterov else momentum

    def norm(self, u: Tensor) -> Tensor:
        return u.square().sum().sqrt()

    def normalised(self, u: Tensor) -> Tensor:
        norm = self.norm(u)
        return torch.where(norm == 0, torch.zeros_like(u), u / norm)

    def is_turned(self, u: Tensor) -> bool:
        return u.shape[0] > u.shape[1]

    def step(self, x: Tensor) -> Tensor:
        a, b, c = self.coefficients
        gram = x @ x.mT
        return a * x + (b * gram + c * (gram @ gram)) @ x

    def iterated(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.step(x)
        return x

    def orthogonalised(self, u: Tensor, steps: int) -> Tensor:
        x = self.normalised(u)
        return self.iterated(x.mT, steps).mT if self.is_turned(u) else self.iterated(x, steps)

    def factor(self, rows: int, cols: int) -> float:
        return max(1, rows / cols) ** 0.5

    def update(self, gradient, momentum, *, beta=0.95, nesterov=True, steps=5):
        self.refuse(gradient, momentum)
        self.refuse_options(beta, steps)
        u = self.blended(gradient.to(momentum.dtype), momentum, beta, nesterov)
        return self.orthogonalised(u, steps) * self.factor(*u.shape)


def variant(**parts: Any) -> Callable[..., Tensor]:
    """An answer with some parts replaced."""
    return type("Variant", (Muon,), parts)().update


# Momentum


@mistake(
    muon_update,
    "Adds the whole gradient to the buffer, momentum <- beta momentum + gradient, as SGD does: here the buffer is a "
    "mean, with 1 - beta before the gradient.",
)
def summed_momentum(*arguments, **options):
    return variant(
        accumulated=lambda self, gradient, momentum, beta: momentum.mul_(beta).add_(gradient),
        looked_ahead=lambda self, gradient, momentum, beta: gradient + beta * momentum,
    )(*arguments, **options)


@mistake(
    muon_update,
    "Looks ahead with gradient + beta momentum, which belongs to a buffer that sums: beside a mean the gradient then "
    "counts 1 / (1 - beta) times too much.",
)
def nesterov_of_a_sum(*arguments, **options):
    return variant(looked_ahead=lambda self, gradient, momentum, beta: gradient + beta * momentum)(
        *arguments, **options
    )


@mistake(
    muon_update,
    "Leaves out Nesterov's look-ahead, or looks ahead with the momentum of the last step, which gives the momentum of "
    "this one: the gradient is to be mixed in twice.",
)
def never_nesterov(*arguments, **options):
    return variant(looked_ahead=lambda self, gradient, momentum, beta: momentum)(*arguments, **options)


@mistake(muon_update, "Looks ahead even with nesterov=False.")
def always_nesterov(*arguments, nesterov=True, **options):
    return variant()(*arguments, nesterov=True, **options)


@mistake(muon_update, "Exchanges beta and 1 - beta: the buffer forgets at once what it should keep.")
def beta_exchanged(*arguments, **options):
    return variant(accumulated=lambda self, gradient, momentum, beta: momentum.lerp_(gradient, beta))(
        *arguments, **options
    )


@mistake(
    muon_update,
    "Makes a new momentum and leaves the caller's as it was, so the next step starts from nothing again.",
)
def momentum_not_written(gradient, momentum, **options):
    return variant()(gradient, momentum.clone(), **options)


@mistake(
    muon_update,
    "Makes the gradient equally long first and keeps a mean of that: every gradient then counts the same, and the "
    "mean is not equally long.",
)
def momentum_afterwards(gradient, momentum, *, beta=0.95, nesterov=True, steps=5):
    muon = Muon()
    muon.refuse(gradient, momentum)
    muon.refuse_options(beta, steps)
    equal = muon.orthogonalised(gradient.to(momentum.dtype), steps)
    return muon.blended(equal, momentum, beta, nesterov) * muon.factor(*gradient.shape)


@mistake(
    muon_update,
    "Writes the look-ahead into the gradient (lerp_): whoever reads .grad afterwards, to log its norm or to "
    "accumulate, reads something else.",
)
def gradient_overwritten(*arguments, **options):
    return variant(looked_ahead=lambda self, gradient, momentum, beta: gradient.lerp_(momentum, beta))(
        *arguments, **options
    )


@mistake(
    muon_update, "Rounds the momentum to the gradient's dtype: a mean of 20 bfloat16 values needs more bits."
)
def momentum_in_the_gradients_dtype(gradient, momentum, **options):
    Muon().refuse(gradient, momentum)
    narrow = momentum.to(gradient.dtype)
    update = variant()(gradient, narrow, **options)
    momentum.copy_(narrow)
    return update.to(momentum.dtype)


# Norm


@mistake(
    muon_update, "Leaves out the division by the norm: what is larger than 1 diverges, what is small stays."
)
def not_normalised(*arguments, **options):
    return variant(normalised=lambda self, u: u)(*arguments, **options)


@mistake(
    muon_update,
    "Divides by the largest magnitude: singular values up to sqrt(rows cols) remain, and the steps blow them up.",
)
def largest_magnitude(*arguments, **options):
    return variant(norm=lambda self, u: u.abs().max())(*arguments, **options)


@mistake(
    muon_update,
    "Divides by the Frobenius norm over the root of the rank, as if all singular values were alike: the largest is "
    "above 1, where the polynomial grows without bound.",
)
def typical_singular_value(*arguments, **options):
    return variant(norm=lambda self, u: Muon.norm(self, u) / min(u.shape) ** 0.5)(*arguments, **options)


@mistake(
    muon_update,
    "Divides by the largest singular value: it converges too, but the values come out elsewhere, and finding it "
    "costs a decomposition.",
)
def largest_singular_value(*arguments, **options):
    return variant(norm=lambda self, u: torch.linalg.matrix_norm(u, 2))(*arguments, **options)


@mistake(muon_update, "Divides each row by its own norm: that turns the singular vectors.")
def row_norms(*arguments, **options):
    def norm(self, u):
        return u.square().sum(dim=1, keepdim=True).sqrt()

    return variant(norm=norm)(*arguments, **options)


@mistake(
    muon_update,
    "Adds 1e-7 to the norm against a division by 0: a gradient as small as that is hardly normalised, and five steps "
    "do not make up for it.",
)
def eps_beside_the_norm(*arguments, **options):
    return variant(normalised=lambda self, u: u / (self.norm(u) + 1e-7))(*arguments, **options)


@mistake(
    muon_update,
    "Clamps the norm at 1e-17 against a division by 0: in float64 there are gradients below that.",
    fails=("every_magnitude",),
)
def norm_clamped(*arguments, **options):
    return variant(normalised=lambda self, u: u / self.norm(u).clamp_min(1e-17))(*arguments, **options)


@mistake(muon_update, "Divides by a norm of 0 where nothing has had a gradient yet: NaN in every weight.")
def zero_divided_by_zero(*arguments, **options):
    return variant(normalised=lambda self, u: u / self.norm(u))(*arguments, **options)


@mistake(muon_update, "Divides by the norm before every step, not once: the values shrink again each time.")
def normalised_every_step(*arguments, **options):
    def iterated(self, x, steps):
        for _ in range(steps):
            x = self.step(self.normalised(x))
        return x

    return variant(iterated=iterated)(*arguments, **options)


# Steps


@mistake(muon_update, "Stops after seven steps, whatever `steps` says.", fails=("numbers_of_steps",))
def at_most_seven(*arguments, steps=5, **options):
    return variant()(*arguments, steps=min(steps, 7), **options)


@mistake(
    muon_update,
    "Takes the cubic step, 1.5 X - 0.5 A X: a small singular value grows by 1.5 a step where this one grows it by "
    "3.4445, so five steps leave most of them small.",
)
def cubic(*arguments, **options):
    return variant(coefficients=(1.5, -0.5, 0.0))(*arguments, **options)


@mistake(
    muon_update,
    "Takes the coefficients of the quintic that converges to 1, 15/8, -10/8 and 3/8: it grows small values by 1.875 "
    "a step only.",
)
def convergent_quintic(*arguments, **options):
    return variant(coefficients=(1.875, -1.25, 0.375))(*arguments, **options)


@mistake(muon_update, "Loses the minus of the coefficient of A: everything grows, and the values overflow.")
def minus_lost(*arguments, **options):
    return variant(coefficients=(3.4445, 4.7750, 2.0315))(*arguments, **options)


@mistake(muon_update, "Multiplies A by the coefficient of A A and the reverse.")
def coefficients_exchanged(*arguments, **options):
    return variant(coefficients=(3.4445, 2.0315, -4.7750))(*arguments, **options)


@mistake(muon_update, "Squares A element by element: A A is a product of matrices.")
def squared_elements(*arguments, **options):
    def step(self, x):
        a, b, c = self.coefficients
        gram = x @ x.mT
        return a * x + (b * gram + c * gram * gram) @ x

    return variant(step=step)(*arguments, **options)


@mistake(muon_update, "Computes A once, before the steps: it belongs to the X of each step.")
def gram_of_the_start(*arguments, **options):
    def iterated(self, x, steps):
        a, b, c = self.coefficients
        gram = x @ x.mT
        for _ in range(steps):
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x

    return variant(iterated=iterated)(*arguments, **options)


@mistake(muon_update, "Takes one step too few.")
def one_step_too_few(*arguments, **options):
    return variant(iterated=lambda self, x, steps: Muon.iterated(self, x, steps - 1))(*arguments, **options)


@mistake(muon_update, "Always takes five steps.")
def always_five(*arguments, **options):
    return variant(iterated=lambda self, x, steps: Muon.iterated(self, x, 5))(*arguments, **options)


@mistake(
    muon_update,
    "Takes U V^T from a singular value decomposition: all values are exactly 1, which is another update, and on an "
    "accelerator it takes far longer than fifteen products.",
)
def exact_polar_factor(*arguments, **options):
    def orthogonalised(self, u, steps):
        left, values, right = torch.linalg.svd(u, full_matrices=False)
        return left * (values > 0) @ right

    return variant(orthogonalised=orthogonalised)(*arguments, **options)


@mistake(
    muon_update,
    "Takes the steps in bfloat16, as torch.optim.Muon does for speed on an accelerator: 8 bits of the update are "
    "left; here it is float32.",
)
def in_bfloat16(*arguments, **options):
    def iterated(self, x, steps):
        return Muon.iterated(self, x.bfloat16(), steps).to(x.dtype)

    return variant(iterated=iterated)(*arguments, **options)


@mistake(muon_update, "Takes the steps in float32 where the momentum is float64.")
def in_float32(*arguments, **options):
    def iterated(self, x, steps):
        return Muon.iterated(self, x.float(), steps).to(x.dtype)

    return variant(iterated=iterated)(*arguments, **options)


@mistake(
    muon_update,
    "Takes the sign of each element: all elements equally large, not all directions; that is Lion or Signum.",
)
def signs(*arguments, **options):
    return variant(orthogonalised=lambda self, u, steps: u.sign())(*arguments, **options)


@mistake(
    muon_update,
    "Never transposes a tall matrix: the numbers are right, but A has rows x rows values, and three products of it "
    "cost (rows / cols)^2 times as much.",
)
def never_turned(*arguments, **options):
    return variant(is_turned=lambda self, u: False)(*arguments, **options)


@mistake(
    muon_update,
    "Transposes the wide matrices and not the tall ones: the numbers are right, and every product is the larger.",
)
def wide_ones_turned(*arguments, **options):
    return variant(is_turned=lambda self, u: u.shape[0] < u.shape[1])(*arguments, **options)


@mistake(
    muon_update,
    "Multiplies A by X first and A by that again: the numbers are right, but where (b A + c A A) X has one product "
    "on the long side after A A on the short one, this has two on the long side.",
)
def long_products(*arguments, **options):
    def step(self, x):
        a, b, c = self.coefficients
        gram = x @ x.mT
        once = gram @ x
        return a * x + b * once + c * (gram @ once)

    return variant(step=step)(*arguments, **options)


@mistake(muon_update, "Forgets to transpose a tall matrix back.")
def not_turned_back(*arguments, **options):
    def orthogonalised(self, u, steps):
        x = self.normalised(u)
        return self.iterated(x.mT if self.is_turned(u) else x, steps)

    return variant(orthogonalised=orthogonalised)(*arguments, **options)


# Factor


@mistake(
    muon_update,
    "Takes the factor that matches AdamW's steps, 0.2 sqrt(max(rows, cols)): a learning rate found for one factor is "
    "wrong for the other.",
)
def moonlight_factor(*arguments, **options):
    return variant(factor=lambda self, rows, cols: 0.2 * max(rows, cols) ** 0.5)(*arguments, **options)


@mistake(
    muon_update, "Exchanges rows and columns in the factor: a wide matrix is enlarged, a tall one is not."
)
def factor_inverted(*arguments, **options):
    return variant(factor=lambda self, rows, cols: max(1, cols / rows) ** 0.5)(*arguments, **options)


@mistake(muon_update, "Leaves out max(1, ...): wide matrices get a factor below 1.")
def factor_without_a_floor(*arguments, **options):
    return variant(factor=lambda self, rows, cols: (rows / cols) ** 0.5)(*arguments, **options)


@mistake(muon_update, "Leaves out the root of the factor.")
def factor_without_a_root(*arguments, **options):
    return variant(factor=lambda self, rows, cols: max(1, rows / cols))(*arguments, **options)


@mistake(
    muon_update,
    "Takes the longer side over the shorter one for the factor, or looks at the shape after the matrix was "
    "transposed: wide matrices are enlarged too.",
)
def factor_of_both(*arguments, **options):
    return variant(factor=lambda self, rows, cols: (max(rows, cols) / min(rows, cols)) ** 0.5)(
        *arguments, **options
    )


@mistake(
    muon_update,
    "Leaves out the factor, or multiplies u by it before it is divided by its norm, which takes it away again.",
)
def no_factor(*arguments, **options):
    return variant(factor=lambda self, rows, cols: 1.0)(*arguments, **options)


@mistake(
    muon_update,
    "Returns the update with a minus, as if it were to be added: the caller subtracts it already.",
)
def negated(*arguments, **options):
    return -variant()(*arguments, **options)


# What goes in and out


@mistake(muon_update, "Returns the gradient's dtype: the bits that the steps worked out are thrown away.")
def gradients_dtype(gradient, momentum, **options):
    return variant()(gradient, momentum, **options).to(gradient.dtype)


@mistake(
    muon_update,
    "Returns the momentum itself where it is zero: what the caller does to the update is done to the momentum.",
)
def momentum_returned(*arguments, **options):
    def orthogonalised(self, u, steps):
        return Muon.orthogonalised(self, u, steps) if u.any() else u

    def update(self, gradient, momentum, *, beta=0.95, nesterov=True, steps=5):
        self.refuse(gradient, momentum)
        self.refuse_options(beta, steps)
        u = self.blended(gradient.to(momentum.dtype), momentum, beta, nesterov)
        update = self.orthogonalised(u, steps)
        return update.mul_(self.factor(*u.shape))

    return variant(orthogonalised=orthogonalised, update=update)(*arguments, **options)


@mistake(
    muon_update,
    "Takes vectors too, as matrices of one row: Muon is for the hidden matrices; norms and biases go to AdamW.",
)
def vectors_too(gradient, momentum, **options):
    if gradient.dim() == 1 and gradient.shape == momentum.shape:
        return variant()(gradient[None], momentum[None], **options)[0]
    return variant()(gradient, momentum, **options)


@mistake(
    muon_update,
    "Takes stacks of matrices too, and divides all of them by one norm.",
)
def stacks_too(*arguments, **options):
    def refuse(self, gradient, momentum):
        if gradient.ndim < 2 or gradient.shape != momentum.shape or 0 in gradient.shape:
            raise ValueError("shape")
        self.refuse_kind(gradient)
        self.refuse_values(gradient)

    def update(self, gradient, momentum, *, beta=0.95, nesterov=True, steps=5):
        self.refuse(gradient, momentum)
        self.refuse_options(beta, steps)
        u = self.blended(gradient.to(momentum.dtype), momentum, beta, nesterov)
        return self.orthogonalised(u, steps) * self.factor(*u.shape[-2:])

    def is_turned(self, u):
        return u.shape[-2] > u.shape[-1]

    return variant(refuse=refuse, update=update, is_turned=is_turned)(*arguments, **options)


@mistake(muon_update, "Lets NaN and infinity into the momentum, which never loses them again.")
def broken_values_let_through(*arguments, **options):
    return variant(refuse_values=lambda self, gradient: None)(*arguments, **options)


@mistake(muon_update, "Looks for NaN alone: infinity divided by an infinite norm is NaN as well.")
def infinities_let_through(*arguments, **options):
    def refuse_values(self, gradient):
        if gradient.isnan().any():
            raise ValueError("NaN")

    return variant(refuse_values=refuse_values)(*arguments, **options)


@mistake(
    muon_update, "Writes the momentum before it looks for NaN and infinity: refused, and broken already."
)
def refused_too_late(*arguments, **options):
    def refuse_values(self, gradient):
        pass

    def normalised(self, u):
        if not u.isfinite().all():
            raise ValueError("NaN or infinity")
        return Muon.normalised(self, u)

    return variant(refuse_values=refuse_values, normalised=normalised)(*arguments, **options)


@mistake(muon_update, "Does not look at beta and steps: with beta = 1 no gradient ever arrives.")
def options_not_looked_at(*arguments, **options):
    return variant(refuse_options=lambda self, beta, steps: None)(*arguments, **options)


@mistake(
    muon_update, "Asks whether beta is below 0 or at least 1: NaN is neither, and the momentum becomes NaN."
)
def beta_of_nan(*arguments, **options):
    def refuse_options(self, beta, steps):
        if beta < 0 or beta >= 1 or steps < 1:
            raise ValueError("options")

    return variant(refuse_options=refuse_options)(*arguments, **options)


@mistake(muon_update, "Asks is_sparse, which is False for a matrix in CSR form.", fails=("refusals",))
def rows_let_through(*arguments, **options):
    def refuse_kind(self, gradient):
        if gradient.is_sparse or gradient.is_complex() or not gradient.is_floating_point():
            raise ValueError("kind")

    return variant(refuse_kind=refuse_kind)(*arguments, **options)


@mistake(
    muon_update, "Does not look at shapes: one row is broadcast to a whole matrix, and nothing complains."
)
def shapes_not_looked_at(*arguments, **options):
    def refuse(self, gradient, momentum):
        if momentum.dim() != 2 or 0 in gradient.shape:
            raise ValueError("shape")
        self.refuse_kind(gradient)
        self.refuse_values(gradient)

    return variant(refuse=refuse)(*arguments, **options)


@mistake(
    muon_update,
    "Does not look at what kind of tensor it is given: integers and complex values are cast to floats.",
)
def kinds_not_looked_at(*arguments, **options):
    def refuse_kind(self, gradient):
        if gradient.is_sparse:
            raise ValueError("sparse")

    return variant(refuse_kind=refuse_kind)(*arguments, **options)


@alternative(muon_update, "Sums products with einsum, from a momentum kept up by differences")
def with_einsum(*arguments, **options):
    def accumulated(self, gradient, momentum, beta):
        momentum += (gradient - momentum) * (1 - beta)
        return momentum

    def step(self, x):
        a, b, c = self.coefficients
        gram = torch.einsum("ik,jk->ij", x, x)
        inner = torch.einsum("ij,jk->ik", gram, gram) * c + gram * b
        return torch.einsum("ij,jk->ik", inner, x) + x * a

    return variant(accumulated=accumulated, step=step)(*arguments, **options)


@alternative(
    muon_update, "Multiplies columns in reverse order, and takes the constants into the products with addmm"
)
def reversed_columns(*arguments, **options):
    def step(self, x):
        a, b, c = self.coefficients
        turned = x.flip(1)
        gram = turned @ turned.T
        inner = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        return torch.addmm(turned, inner, turned, beta=a).flip(1)

    return variant(step=step)(*arguments, **options)


@alternative(
    muon_update, "Turns every matrix that is wide into a tall one and takes A = X^T X, on the short side too"
)
def tall_grams(*arguments, **options):
    def step(self, x):
        a, b, c = self.coefficients
        gram = x.T @ x
        return a * x + x @ (b * gram + c * gram @ gram)

    return variant(step=step, is_turned=lambda self, u: u.shape[0] < u.shape[1])(*arguments, **options)


@alternative(muon_update, "Takes the steps in float64 and divides by the largest magnitude before the norm")
def in_float64(*arguments, **options):
    def orthogonalised(self, u, steps):
        largest = u.abs().max()
        if largest == 0:
            return torch.zeros_like(u)
        return Muon.orthogonalised(self, u.double() / largest, steps).to(u.dtype)

    return variant(orthogonalised=orthogonalised)(*arguments, **options)


@alternative(
    muon_update, "Decomposes u and puts the polynomial of each singular value in its place", meets_costs=False
)
def polynomial_of_singular_values(*arguments, **options):
    def orthogonalised(self, u, steps):
        a, b, c = self.coefficients
        left, values, right = torch.linalg.svd(self.normalised(u.double()), full_matrices=False)
        for _ in range(steps):
            values = values * (a + values**2 * (b + c * values**2))
        return (left * values @ right).to(u.dtype)

    return variant(orthogonalised=orthogonalised)(*arguments, **options)
