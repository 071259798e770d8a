"""Adafactor: a second moment kept as the means of a matrix's rows and columns, and steps relative to the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmcourse.exercise import Rng, alternative, case, cost, excuse, exercise, mistake, raised
from llmcourse.stepping import (
    gradients_of,
    in_groups,
    in_shared_memory,
    one_after_another,
    read,
    scheduled,
    state_bytes,
    values,
    with_missing,
    write,
)


@exercise(
    points=4,
    minutes=25,
    extension=True,
    forbid=(
        "torch.optim.Adafactor",
        "torch.optim._adafactor.Adafactor",
        "torch.optim._adafactor.adafactor",
        "torch.optim._adafactor._single_tensor_adafactor",
        "torch.optim._adafactor._multi_tensor_adafactor",
    ),
    hints=(
        "Keep R with shape [..., rows, 1] and C with shape [..., 1, cols]: their product broadcasts to the matrix, for "
        "any number of dimensions before it. 1 - beta2 is 1 at t = 1, so how R, C and V start does not matter.",
        "RMS(p) is taken before the decay, over the whole tensor, and so is RMS(U). mean(R) is over the rows of each "
        "matrix, not over all matrices. t belongs to a parameter. The gradient is to stay as it is.",
    ),
)
class Adafactor(torch.optim.Optimizer):
    """Adam's second moment in rows + cols numbers instead of rows * cols, without a first
    moment; about 25 lines.

    params are parameters, or groups such as {"params": [...], "lr": 0.1}, whose own
    options come before those of the constructor; a group may be empty. Only parameters
    that have a gradient g move in step(), each p with the options its group has now (a
    scheduler may change them). With RMS(x) = sqrt(mean(x^2)) over a whole tensor, and
    (eps1, eps2) = eps, where eps1 None stands for torch.finfo(p.dtype).eps:

        t <- t + 1                                   t, R, C, V belong to p, start at 0
        beta2 = 1 - t^beta2_decay                    0 at t = 1, then nearer and nearer to 1
        alpha = max(eps2, RMS(p)) min(lr, 1 / sqrt(t))      lr is a part of p's size
        p <- p (1 - lr weight_decay)
        with two dimensions or more, for each matrix of the last two:
            R <- beta2 R + (1 - beta2) mean of g^2 over each row       [rows, 1]
            C <- beta2 C + (1 - beta2) mean of g^2 over each column    [1, cols]
            V = R C / max(mean(R), eps1)             V[i, j] from R[i] and C[j]
        with fewer dimensions:
            V <- beta2 V + (1 - beta2) g^2
        U = g / max(sqrt(V), eps1)
        p <- p - alpha U / max(1, RMS(U) / d)

    RMS(p) is that from before the decay. A tensor [a, b, rows, cols] holds a b matrices
    with R, C and mean(R) of their own, but one RMS(p) and one RMS(U). R, C and V have p's
    dtype. p is written in place, need not be contiguous and has at least one value; g
    stays what it is. With g None, nothing of p changes, and its t, R, C, V stay.

    Whatever a resume needs is in state_dict(), as tensors and numbers: a new process that
    loads it goes on as if nothing had happened. Any other new optimizer starts at 0.

    ValueError from the constructor: lr, an eps or weight_decay negative or NaN,
    beta2_decay above 0 or NaN, d below 1 or NaN; options inside a group are not checked.
    ValueError from step(), before anything has changed: a gradient that is sparse, that
    is neither float32 nor float64, or that holds NaN or infinity, which the means would
    spread over whole rows and columns.

    For a quarter of the points: state_dict()["state"] takes 4 (rows + cols) bytes for a
    float32 matrix, 4 for each value of a vector, and at most 16 more a parameter.

    Shazeer and Stern 2018 (arXiv 1804.04235), as torch.optim.Adafactor has it: means, not
    sums; lr in the place of the paper's 0.01; eps1 at V, not added to g^2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        ### BEGIN SOLUTION
        eps1, eps2 = eps
        sizes = (lr, eps2, weight_decay, 0.0 if eps1 is None else eps1)
        if not (all(size >= 0 for size in sizes) and beta2_decay <= 0 and d >= 1):
            raise ValueError(
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}: expected at least 0; "
                f"beta2_decay={beta2_decay}: at most 0; d={d}: at least 1"
            )
        options = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, options)
        ### END SOLUTION

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient."""
        ### BEGIN SOLUTION
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in moving:
            g = p.grad
            dense = g.layout == torch.strided and g.dtype in (torch.float32, torch.float64)
            if not dense or not g.isfinite().all():
                raise ValueError(
                    f"a gradient is {g.layout}, {g.dtype}, or not finite: expected dense float32 or float64 "
                    "without NaN and infinity; skip this step"
                )
        for p, group in moving:
            g, state, lr, (eps1, eps2) = p.grad, self.state[p], group["lr"], group["eps"]
            eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
            t = state["t"] = state.get("t", 0) + 1
            share = t ** group["beta2_decay"]
            alpha = max(eps2, p.square().mean().sqrt().item()) * min(lr, t**-0.5)
            p.mul_(1 - lr * group["weight_decay"])
            squares = g.square()
            if g.dim() < 2:
                v = state["V"] = torch.lerp(state.get("V", squares), squares, share)
            else:
                rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
                r = state["R"] = torch.lerp(state.get("R", rows), rows, share)
                c = state["C"] = torch.lerp(state.get("C", columns), columns, share)
                v = r * c / r.mean(-2, keepdim=True).clamp_min(eps1)
            u = g / v.sqrt().clamp_min(eps1)
            size = u.square().mean().sqrt().item()
            p.sub_(u, alpha=alpha / max(1.0, size / group["d"]))
        ### END SOLUTION


excuse(
    Adafactor, "0.0 -> 1.0 #2", "It stands for an eps1 of None, which is fine, as any size of at least 0 is."
)
excuse(
    Adafactor,
    "max(eps2, p.square().mean().sqrt().item()) -> max(p.square().mean().sqrt().item(), eps2)",
    "The larger of two, in another order.",
)
excuse(Adafactor, "min(lr, t ** (-0.5)) -> min(t ** (-0.5), lr)", "The smaller of two, in another order.")
excuse(
    Adafactor,
    "max(1.0, size / group['d']) -> max(size / group['d'], 1.0)",
    "The larger of two, in another order.",
)


# ---------------------------------------------------------------------------------------------------------- cases

SHAPES = ((3, 5), (2, 3, 4), (7,), (), (4, 2))
SIZES = (1e-8, 1.0, 1e3, 1e-3, 30.0)


def drawn(rng: Rng, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Any]:
    """Parameters of 2, 3, 1, 0 and 2 dimensions, of several magnitudes."""
    return [
        torch.nn.Parameter((rng.normal(*shape, dtype=dtype) + rng.choice((-1, 1))) * size)
        for shape, size in zip(shapes, (1.0, 0.01, 2.0, 0.5, 30.0), strict=False)
    ]


def give(
    parameters: list[Any], rng: Rng, *, size: float = 1.0, sizes: Any = SIZES, missing: Any = ()
) -> None:
    """New gradients, from 1e-8 to 1e3 times `size`, no two rows or columns alike; None for those in `missing`."""
    gradients_of(parameters, rng, sizes=sizes, size=size, missing=missing)


def options(rng: Rng) -> dict[str, Any]:
    """Options far from the defaults; eps1 so small that it never counts, and lr so large that 1 / sqrt(t) does."""
    return {
        "lr": rng.choice((0.4, 0.6)),
        "beta2_decay": rng.choice((-0.8, -0.6)),
        "eps": (1e-30, rng.choice((1e-3, 1e-2))),
        "d": rng.choice((1.0, 1.3)),
        "weight_decay": rng.choice((0.1, 0.2)),
    }


@case(Adafactor)
def several_tensors(answer, rng):
    """Five tensors with gradients from 1e-8 to 1e3, 8 steps, some ten times louder than those before."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    seen = []
    for step in range(8):
        give(parameters, rng, size=10.0 if step in (1, 4, 5) else 1.0)
        optimizer.step()
        if step in (0, 1, 2, 5, 7):
            seen.append(values(parameters))
    return seen


@case(Adafactor)
def defaults_in_float64(answer, rng):
    """Three tensors of one shape in float64, one that starts at 0, 8 steps with the options of the signature."""
    parameters = [torch.nn.Parameter(rng.normal(2, 3, dtype=torch.float64) * size) for size in (1, 0, 1)]
    optimizer = answer(parameters)
    for _ in range(8):
        give(parameters, rng, sizes=(1e-6, 1.0, 1e-2))
        optimizer.step()
    return values(parameters)


@case(Adafactor)
def quiet_gradients(answer, rng):
    """Gradients near the default eps1 of float32 and far below it, where it counts; float64 in the same group."""
    shapes = ((3, 4), (3, 4), (6,), (6,), (2, 5), (2, 2, 3))
    parameters = [torch.nn.Parameter(rng.normal(*shape)) for shape in shapes]
    parameters += [torch.nn.Parameter(rng.normal(3, 4, dtype=torch.float64))]
    optimizer = answer(parameters, lr=rng.choice((0.1, 0.2)))
    seen = []
    for _ in range(3):
        give(parameters, rng, sizes=(1e-8, 1e-4, 1e-5, 1e-7, 3e-4, 1e-5, 1e-8))
        optimizer.step()
        seen.append(values(parameters))
    return seen


@case(Adafactor)
def a_product_of_rows_and_columns(answer, rng):
    """Where |g| is a product of a row's and a column's number, nothing is lost: the step is alpha times the sign."""
    rows, columns = rng.uniform(0.1, 3, 4, 1), rng.uniform(0.1, 3, 1, 6)
    parameter = torch.nn.Parameter(rng.normal(4, 6))
    optimizer = answer([parameter], lr=rng.choice((0.1, 0.2)))
    seen = []
    for _ in range(3):
        parameter.grad = rows * columns * rng.normal(4, 6).sign()
        optimizer.step()
        seen.append(parameter.detach().clone())
    return seen


@case(Adafactor)
def loud_steps(answer, rng):
    """Gradients that grow tenfold at once, with thresholds of 1, 1.5 and 4."""
    seen = []
    for d in (1.0, 1.5, 4.0):
        parameters = drawn(rng, shapes=SHAPES[:3])
        optimizer = answer(parameters, lr=rng.choice((0.05, 0.1)), d=d)
        for size in (1.0, 1.0, 10.0, 1000.0):
            give(parameters, rng, size=size, sizes=(1.0, 0.1, 3.0))
            optimizer.step()
            seen.append(values(parameters))
    return seen


@case(Adafactor)
def weights_of_zero(answer, rng):
    """Weights of 0 and near 0, whose RMS is below eps2, beside large ones."""
    parameters = [torch.nn.Parameter(rng.normal(*shape) * size) for shape, size in WEIGHTS]
    optimizer = answer(
        parameters, lr=rng.choice((0.1, 0.2)), eps=(None, rng.choice((0.02, 0.05))), weight_decay=0.3
    )
    seen = []
    for _ in range(4):
        give(parameters, rng, sizes=(1.0,) * len(WEIGHTS))
        optimizer.step()
        seen.append(values(parameters))
    return seen


WEIGHTS = (((3, 4), 0.0), ((5,), 1e-5), ((2, 3), 0.04), ((3, 2, 2), 100.0))


@case(Adafactor)
def kernels(answer, rng):
    """Four dimensions, matrices of one row or column, and a first dimension of 1."""
    shapes = ((2, 3, 4, 5), (1, 6), (6, 1), (1, 3, 4))
    parameters = drawn(rng, shapes=shapes)
    optimizer = answer(parameters, lr=rng.choice((0.1, 0.2)))
    for _ in range(4):
        give(parameters, rng, sizes=(1.0, 0.1, 10.0, 1.0))
        with torch.no_grad():
            parameters[0].grad[0, 1] *= 100  # one matrix of the six is louder than the others
        optimizer.step()
    return values(parameters)


@case(Adafactor)
def groups_of_their_own(answer, rng):
    """Groups with options of their own: one without decay, one that is empty, one that comes later."""
    parameters = drawn(rng)
    return in_groups(
        answer,
        parameters,
        lambda joined: give(parameters, rng),
        first=[
            {"params": parameters[:1], "weight_decay": 0.0, "d": 2.0},
            {"params": []},
            {
                "params": parameters[1:3],
                "lr": 0.3,
                "beta2_decay": -0.3,
                "eps": (0.1, 0.2),
                "weight_decay": 0.5,
            },
        ],
        later={"params": parameters[3:], "eps": (0.01, 0.01)},
        lr=rng.choice((0.02, 0.04)),
        eps=(1e-30, 1e-3),
        weight_decay=rng.choice((0.1, 0.3)),
    )


@case(Adafactor)
def missing_gradients(answer, rng):
    """Parameters whose gradients are missing in some steps, and one that never has any."""
    parameters = drawn(rng)
    frozen = torch.nn.Parameter(rng.normal(4), requires_grad=False)
    optimizer = answer([frozen, *parameters], **options(rng))
    missing = ((1,), (0, 2), (1,), (), (1, 3, 4), (0, 1, 2, 3, 4), ())
    return with_missing(
        optimizer, [frozen, *parameters], lambda missing: give(parameters, rng, missing=missing), missing
    )


@case(Adafactor)
def gradients_of_zero(answer, rng):
    """Zeros at first, when only the decay moves anything, then a row of zeros; with both kinds of eps1."""
    seen = []
    for eps1 in (None, 1e-30):
        parameters = drawn(rng)
        optimizer = answer(parameters, lr=rng.choice((0.1, 0.2)), eps=(eps1, 1e-3), weight_decay=0.2)
        for size in (0.0, 0.0, 1.0, 0.0):
            give(parameters, rng, size=size)
            parameters[0].grad[1] = 0
            optimizer.step()
            seen.append(values(parameters))
    return seen


@case(Adafactor)
def schedule(answer, rng):
    """A learning rate that a scheduler changes, from 0 up and down again; then new options and loud gradients."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    change = {
        "beta2_decay": -0.3,
        "eps": (rng.choice((1e-3, 2e-3)), rng.choice((0.1, 0.2))),
        "d": rng.choice((3.0, 4.0)),
        "weight_decay": rng.choice((0.6, 0.9)),
    }
    factors = (0.0, 0.2, 1.0, 2.0, 0.3, 0.1, 1.0, 1.0)
    return scheduled(
        optimizer,
        parameters,
        lambda step: give(parameters, rng, size=10.0 if step > 4 else 1.0),
        change,
        factors=factors,
    )


@case(Adafactor)
def a_second_optimizer(answer, rng):
    """Two optimizers, one after the other, on the same parameters."""
    parameters, given = drawn(rng), options(rng)
    return one_after_another(
        answer, parameters, lambda missing: give(parameters, rng, missing=missing), (given, given)
    )


@case(Adafactor)
def shared_memory(answer, rng):
    """Parameters that are views of other tensors, transposed and cut; gradients that stay for three steps."""
    return in_shared_memory(answer, rng, transposed_first=True, **options(rng))


@case(Adafactor)
def before_the_pause(answer, rng):
    """Three steps, then everything is saved."""
    parameters = drawn(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.03}], **options(rng))
    for missing in ((2,), (0, 2), (2,)):
        give(parameters, rng, missing=missing)
        optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    return {"values": values(parameters), "saved": write(optimizer, parameters)}


@case(Adafactor, after=before_the_pause)
def resumed(answer, rng, saved):
    """Three more steps in a new process that has only what was saved."""
    parameters = drawn(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.5, weight_decay=0.9)
    read(saved, optimizer, parameters)
    for missing in ((1,), (), ()):
        give(parameters, rng, missing=missing)
        optimizer.step()
    return values(parameters)


@case(Adafactor)
def refused_options(answer, rng):
    """Options out of range, beside others at its edge."""
    parameters = drawn(rng)
    bad = rng.choice((-0.5, -1e-3))
    wrong = {
        **{f"lr {value}": {"lr": value} for value in (bad, torch.nan)},
        **{f"eps1 {value}": {"eps": (value, 1e-3)} for value in (bad, torch.nan)},
        **{f"eps2 {value}": {"eps": (None, value)} for value in (bad, torch.nan)},
        **{f"weight_decay {value}": {"weight_decay": value} for value in (bad, torch.nan)},
        **{f"beta2_decay {value}": {"beta2_decay": value} for value in (0.1, 0.8, torch.nan)},
        **{f"d {value}": {"d": value} for value in (0.0, 0.9, -1.0, torch.nan)},
    }
    edge = answer(parameters, lr=0.5, eps=(1e-30, 0.0), d=1.0, weight_decay=0.0, beta2_decay=0.0)
    for _ in range(3):
        give(parameters, rng)
        edge.step()
    seen = values(parameters)
    still = answer(parameters, lr=0.0)
    still.step()
    return {
        "refused": {name: raised(answer, parameters, **given) for name, given in wrong.items()},
        "beta2 of 0": seen,
        "lr of 0": values(parameters),
        "eps1 of 0": raised(answer, parameters, eps=(0.0, 1e-3)),
    }


@case(Adafactor)
def refused_gradients(answer, rng):
    """Gradients of other kinds and broken ones, last in line; nothing has changed then, and the next step is right."""
    seen = {}
    for name in ("sparse", "bfloat16", "NaN", "infinity", "minus infinity", "complex"):
        parameters = drawn(rng)[:4]
        last = rng.normal(3, 4)
        if name in ("bfloat16", "complex"):
            last = last.to({"bfloat16": torch.bfloat16, "complex": torch.complex64}[name])
        parameters.append(torch.nn.Parameter(last))
        optimizer = answer([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
        give(parameters, rng)
        if name == "sparse":
            parameters[4].grad = parameters[4].grad.to_sparse()
        elif name not in ("bfloat16", "complex"):
            place = (rng.integer(0, 2), rng.integer(0, 3))
            parameters[4].grad[place] = {"NaN": torch.nan, "infinity": torch.inf}.get(name, -torch.inf)
        refused = raised(optimizer.step)
        before = values(parameters)
        parameters[4].grad = None
        optimizer.step()
        seen[name] = {"raises": refused, "before": before, "after": values(parameters)}
    return seen


@cost(Adafactor, share=1 / 4)
def rows_and_columns(answer, rng):
    """Bytes of the state that is saved, for a matrix, a stack of matrices and a vector."""
    rows, columns = rng.integer(20, 40), rng.integer(50, 90)
    shapes = {"matrix": (rows, columns), "stack": (3, rows, columns), "vector": (columns,)}
    needed = {"matrix": rows + columns, "stack": 3 * (rows + columns), "vector": columns}
    counts = {}
    for name, shape in shapes.items():
        parameter = torch.nn.Parameter(rng.normal(*shape))
        optimizer = answer([parameter])
        for _ in range(2):
            parameter.grad = rng.normal(*shape)
            optimizer.step()
        state = optimizer.state_dict()["state"]
        counts[f"state, {name}, bytes"] = (state_bytes(state), 4 * needed[name] + 16)
    return counts


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Written(torch.optim.Optimizer):
    """A right answer in small steps; each wrong answer below changes one of them."""

    def __init__(self, params, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
        self.refuse_options(lr, beta2_decay, eps, d, weight_decay)
        super().__init__(
            params, {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        )

    def refuse_options(self, lr, beta2_decay, eps, d, weight_decay):
        sizes = [lr, eps[1], weight_decay] + [size for size in eps[:1] if size is not None]
        if not all(size >= 0 for size in sizes):
            raise ValueError("negative")
        if not (beta2_decay <= 0 and d >= 1):
            raise ValueError("beta2_decay or d")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.refuse(p.grad)
        self.move()

    def refuse(self, g):
        if g.is_sparse or g.dtype not in (torch.float32, torch.float64):
            raise ValueError("kind")
        self.refuse_values(g)

    def refuse_values(self, g):
        if not torch.isfinite(g).all():
            raise ValueError("NaN or infinity")

    def move(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, p.grad, group, self.state[p])

    def one(self, p, g, group, state):
        eps1, eps2 = self.eps(p, group)
        t = state["t"] = self.count(state)
        alpha = self.alpha(p, t, group["lr"], eps2)
        self.decay(p, group, alpha)
        v = self.second_moment(g, state, self.share(t, group["beta2_decay"]), eps1)
        self.subtract(p, self.clipped(self.update(g, v, eps1), group["d"]), alpha)

    def eps(self, p, group):
        eps1, eps2 = group["eps"]
        return (torch.finfo(p.dtype).eps if eps1 is None else eps1), eps2

    def count(self, state):
        return state.get("t", 0) + 1

    def share(self, t, beta2_decay):
        """1 - beta2."""
        return t**beta2_decay

    def relative(self, t, lr):
        return min(lr, 1 / t**0.5)

    def size(self, p, eps2):
        return max(eps2, self.rms(p))

    def rms(self, x):
        return x.norm().item() / x.numel() ** 0.5

    def alpha(self, p, t, lr, eps2):
        return self.size(p, eps2) * self.relative(t, lr)

    def decay(self, p, group, alpha):
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def squares(self, g, eps1):
        return g * g

    def is_factored(self, g):
        return g.dim() >= 2

    def second_moment(self, g, state, share, eps1):
        squares = self.squares(g, eps1)
        return (
            self.factored(squares, state, share, eps1)
            if self.is_factored(g)
            else self.full(squares, state, share)
        )

    def kept(self, state, name, new, share):
        old = state.get(name, torch.zeros_like(new))
        state[name] = old * (1 - share) + new * share
        return state[name]

    def full(self, squares, state, share):
        return self.kept(state, "V", squares, share)

    def factored(self, squares, state, share, eps1):
        r = self.kept(state, "R", squares.mean(dim=-1), share)
        c = self.kept(state, "C", squares.mean(dim=-2), share)
        return self.product(r.unsqueeze(-1), c.unsqueeze(-2), eps1)

    def product(self, r, c, eps1):
        return r / r.mean(dim=-2, keepdim=True).clamp(min=eps1) * c

    def update(self, g, v, eps1):
        return g / v.sqrt().clamp(min=eps1)

    def clipped(self, u, d):
        return u / max(1.0, self.rms(u) / d)

    def subtract(self, p, u, alpha):
        p.sub_(alpha * u)


# The second moment


@mistake(
    Adafactor,
    "Keeps a second moment for every element of a matrix, as Adam does: other numbers, and rows x cols bytes.",
)
class NotFactored(Written):
    def is_factored(self, g):
        return False


@mistake(
    Adafactor,
    "Keeps the whole V beside R and C, or in their place once they are multiplied: the memory that factoring was for.",
)
class KeepsTheProduct(Written):
    def second_moment(self, g, state, share, eps1):
        state["product"] = super().second_moment(g, state, share, eps1)
        return state["product"]


@mistake(
    Adafactor,
    "Factors a vector too, down to the one mean of its squares: all its elements share a second moment.",
)
class VectorsGetOneNumber(Written):
    def full(self, squares, state, share):
        return self.kept(state, "V", squares.mean(), share).expand_as(squares)


@mistake(
    Adafactor,
    "Factors a vector as a matrix of one row: the same product, but eps1 bounds its mean too, so quiet gradients "
    "come out otherwise.",
)
class VectorsAsRows(Written):
    def second_moment(self, g, state, share, eps1):
        if g.dim() != 1:
            return super().second_moment(g, state, share, eps1)
        return self.factored(self.squares(g, eps1)[None], state, share, eps1)[0]


@mistake(
    Adafactor,
    "Multiplies R and C without dividing by the mean of R: V has the unit of g^4, and the step depends on how loud "
    "the gradients are.",
)
class ProductNotDivided(Written):
    def product(self, r, c, eps1):
        return r * c


@mistake(Adafactor, "Divides the product by the sum of R, which belongs to sums of g^2, not to means.")
class DividedByTheSum(Written):
    def product(self, r, c, eps1):
        return r * c / r.sum(dim=-2, keepdim=True).clamp(min=eps1)


@mistake(
    Adafactor,
    "Keeps sums of g^2 and divides their product by the sum, as the paper does: the same V, but eps1 bounds a sum "
    "there, rows x cols times as large.",
)
class KeepsSums(Written):
    def factored(self, squares, state, share, eps1):
        r = self.kept(state, "R", squares.sum(dim=-1), share).unsqueeze(-1)
        c = self.kept(state, "C", squares.sum(dim=-2), share).unsqueeze(-2)
        return r / r.sum(dim=-2, keepdim=True).clamp(min=eps1) * c


@mistake(Adafactor, "Keeps sums of g^2 and divides their product by a mean.")
class SumsOverAMean(Written):
    def factored(self, squares, state, share, eps1):
        r = self.kept(state, "R", squares.sum(dim=-1), share)
        c = self.kept(state, "C", squares.sum(dim=-2), share)
        return self.product(r.unsqueeze(-1), c.unsqueeze(-2), eps1)


@mistake(
    Adafactor,
    "Divides R by one mean over all matrices of a tensor: a loud one changes the steps of the others.",
)
class OneMeanForAllMatrices(Written):
    def product(self, r, c, eps1):
        return r / r.mean().clamp(min=eps1) * c


@mistake(
    Adafactor,
    "Flattens a tensor of three or more dimensions to one matrix: R and C are then means over what the statement "
    "keeps apart.",
)
class FlattenedToOneMatrix(Written):
    def factored(self, squares, state, share, eps1):
        if squares.dim() == 2:
            return super().factored(squares, state, share, eps1)
        return super().factored(squares.flatten(1), state, share, eps1).view(squares.shape)


@mistake(Adafactor, "Factors over the first two dimensions; here they are the last two.")
class FirstTwoDimensions(Written):
    def factored(self, squares, state, share, eps1):
        first = squares.movedim((0, 1), (-2, -1))
        return super().factored(first, state, share, eps1).movedim((-2, -1), (0, 1))


@mistake(Adafactor, "Keeps whole tensors of three and more dimensions unfactored.")
class OnlyMatricesFactored(Written):
    def is_factored(self, g):
        return g.dim() == 2


@mistake(Adafactor, "Means of |g|, squared afterwards: smaller than means of g^2.")
class MeansOfMagnitudes(Written):
    def factored(self, squares, state, share, eps1):
        r = self.kept(state, "R", squares.sqrt().mean(dim=-1).square(), share)
        c = self.kept(state, "C", squares.sqrt().mean(dim=-2).square(), share)
        return self.product(r.unsqueeze(-1), c.unsqueeze(-2), eps1)


@mistake(
    Adafactor,
    "Adds R and C, or takes the larger, instead of multiplying: an element in a quiet column of a loud row then "
    "hardly moves.",
)
class MeanOfRowAndColumn(Written):
    def product(self, r, c, eps1):
        return (r + c) / 2


@mistake(Adafactor, "Divides by the second moment from before this gradient, which is 0 at the first step.")
class SecondMomentOfTheLastStep(Written):
    def kept(self, state, name, new, share):
        old = state.get(name, new)
        super().kept(state, name, new, share)
        return old


@mistake(Adafactor, "Takes Adam's constant beta2, 0.999, for the second moment that starts at 0.")
class ConstantBeta2(Written):
    def share(self, t, beta2_decay):
        return 1 - 0.999


@mistake(Adafactor, "Takes a constant beta2 of 0.999 with Adam's correction for the start at 0.")
class ConstantBeta2Corrected(Written):
    def share(self, t, beta2_decay):
        return (1 - 0.999) / (1 - 0.999**t)


@mistake(
    Adafactor,
    "Corrects the second moment for its start at 0, as Adam does: with beta2 = 0 at the first step there is nothing "
    "to correct, and later beta2^t is not what is missing.",
)
class CorrectedAsInAdam(Written):
    def one(self, p, g, group, state):
        self.correction = 1 - (1 - self.share(self.count(state), group["beta2_decay"])) ** self.count(state)
        super().one(p, g, group, state)

    def update(self, g, v, eps1):
        return super().update(g, v / self.correction, eps1)


@mistake(
    Adafactor,
    "Exchanges beta2 and 1 - beta2: old gradients count less and less, at the first step not at all.",
)
class Beta2Exchanged(Written):
    def share(self, t, beta2_decay):
        return 1 - t**beta2_decay


@mistake(Adafactor, "Counts steps from 0, or from 2 where the exponent is taken: the decay is one step off.")
class DecayOneStepAhead(Written):
    def share(self, t, beta2_decay):
        return (t + 1) ** beta2_decay


@mistake(Adafactor, "Writes -0.8 into the decay; beta2_decay is an option.")
class DecayWrittenIn(Written):
    def share(self, t, beta2_decay):
        return t**-0.8


# eps


@mistake(
    Adafactor,
    "Adds eps1 to g^2, as the paper does with its 1e-30: here it bounds the mean of R and the root of V from below.",
)
class EpsAddedToTheSquares(Written):
    def squares(self, g, eps1):
        return g * g + eps1

    def product(self, r, c, eps1):
        return super().product(r, c, 0.0)

    def update(self, g, v, eps1):
        return g / v.sqrt()


@mistake(Adafactor, "Bounds V by eps1 before the root: the root then has 3e-4 as its floor, not 1e-7.")
class EpsUnderTheRoot(Written):
    def update(self, g, v, eps1):
        return g / v.clamp(min=eps1).sqrt()


@mistake(Adafactor, "Adds eps1 to the root of V, as Adam does; here it is the larger of the two.")
class EpsAddedToTheRoot(Written):
    def update(self, g, v, eps1):
        return g / (v.sqrt() + eps1)


@mistake(
    Adafactor,
    "Bounds V by the square of eps1 before the root: for 1e-30 that is 0 in float32, and 0 / 0 where g is 0.",
)
class EpsSquared(Written):
    def update(self, g, v, eps1):
        return v.clamp(min=eps1 * eps1).rsqrt() * g


@mistake(Adafactor, "Adds eps1 to the mean of R, where it is the larger of the two.")
class EpsAddedToTheMean(Written):
    def product(self, r, c, eps1):
        return r * c / (r.mean(dim=-2, keepdim=True) + eps1)


@mistake(Adafactor, "Does not bound the mean of R from below.")
class MeanNotBounded(Written):
    def product(self, r, c, eps1):
        return super().product(r, c, 1e-38)


@mistake(Adafactor, "Does not bound the root of V from below: 0 / 0 where nothing has had a gradient yet.")
class RootNotBounded(Written):
    def update(self, g, v, eps1):
        return g / v.sqrt()


@mistake(Adafactor, "Takes 1e-30 for an eps1 of None.")
class NoneAsInThePaper(Written):
    def eps(self, p, group):
        eps1, eps2 = group["eps"]
        return (1e-30 if eps1 is None else eps1), eps2


@mistake(Adafactor, "Takes the eps of float32 for an eps1 of None, whatever dtype p has.")
class NoneOfFloat32(Written):
    def eps(self, p, group):
        return super().eps(torch.empty(0), group)


@mistake(Adafactor, "Takes eps1 for eps2 and the reverse.")
class EpsExchanged(Written):
    def eps(self, p, group):
        return super().eps(p, group)[::-1]


# The step


@mistake(
    Adafactor,
    "Takes lr as the size of the step, as in Adam: here it is a part of RMS(p), so large weights move more.",
)
class AbsoluteLearningRate(Written):
    def size(self, p, eps2):
        return 1.0


@mistake(Adafactor, "Leaves out eps2: weights that start at 0 have an RMS of 0 and never move.")
class SizeWithoutAFloor(Written):
    def size(self, p, eps2):
        return self.rms(p)


@mistake(Adafactor, "Adds eps2 to RMS(p); it is the larger of the two.")
class Eps2Added(Written):
    def size(self, p, eps2):
        return eps2 + self.rms(p)


@mistake(Adafactor, "Takes the norm of p for its RMS: a large matrix then moves more than a small one.")
class NormForSize(Written):
    def size(self, p, eps2):
        return max(eps2, p.norm().item())


@mistake(Adafactor, "Scales each element's step by its own magnitude, not by the RMS of its tensor.")
class SizeOfEachElement(Written):
    def subtract(self, p, u, alpha):
        p.sub_(alpha / self.rms(p) * p.abs() * u if self.rms(p) > 0 else alpha * u)


@mistake(Adafactor, "Takes RMS(p) after the decay.")
class SizeAfterTheDecay(Written):
    def one(self, p, g, group, state):
        p.mul_(1 - group["lr"] * group["weight_decay"])
        super().one(p, g, {**group, "weight_decay": 0.0}, state)


@mistake(Adafactor, "Decays p after the step, so this step's own update decays as well.")
class DecayAfterTheStep(Written):
    def one(self, p, g, group, state):
        super().one(p, g, {**group, "weight_decay": 0.0}, state)
        p.mul_(1 - group["lr"] * group["weight_decay"])


@mistake(Adafactor, "Never compares lr with 1 / sqrt(t).")
class StepsDoNotShrink(Written):
    def relative(self, t, lr):
        return lr


@mistake(
    Adafactor,
    "Divides lr by sqrt(t) at every step; 1 / sqrt(t) is a bound, which counts once it is below lr.",
)
class StepsAlwaysShrink(Written):
    def relative(self, t, lr):
        return lr / t**0.5


@mistake(Adafactor, "Adds the decay to the gradient, where the second moment divides it away.")
class Coupled(Written):
    def one(self, p, g, group, state):
        super().one(p, g + group["weight_decay"] * p, {**group, "weight_decay": 0.0}, state)


@mistake(Adafactor, "Decays by alpha weight_decay; here it is lr weight_decay, whatever RMS(p) and t are.")
class DecayByAlpha(Written):
    def decay(self, p, group, alpha):
        p.mul_(1 - alpha * group["weight_decay"])


@mistake(Adafactor, "Decays by weight_decay alone, also where the schedule has lr at 0.")
class DecayWithoutLearningRate(Written):
    def decay(self, p, group, alpha):
        p.mul_(1 - group["weight_decay"])


@mistake(Adafactor, "Never decays.")
class NoDecay(Written):
    def decay(self, p, group, alpha):
        pass


@mistake(
    Adafactor,
    "Keeps a mean of the updates as a first moment, which Adafactor drops: as many bytes as the weights again.",
)
class FirstMoment(Written):
    def one(self, p, g, group, state):
        self.now = state
        super().one(p, g, group, state)

    def clipped(self, u, d):
        return self.kept(self.now, "m", super().clipped(u, d), 0.1)


@mistake(Adafactor, "Adds the update to p.")
class Uphill(Written):
    def subtract(self, p, u, alpha):
        p.add_(alpha * u)


@mistake(
    Adafactor, "Takes the sign of the gradient for U, which is right at the first step of a vector only."
)
class Signs(Written):
    def update(self, g, v, eps1):
        return g.sign()


# Clipping


@mistake(Adafactor, "Leaves out the clipping: one loud gradient makes a step of ten times the size.")
class NotClipped(Written):
    def clipped(self, u, d):
        return u


@mistake(Adafactor, "Clips by the norm of U, not by its RMS: large matrices hardly move.")
class ClippedByNorm(Written):
    def clipped(self, u, d):
        return u / max(1.0, u.norm().item() / d)


@mistake(Adafactor, "Cuts each element of U at d: the direction changes, and an RMS below d is cut as well.")
class CutElementwise(Written):
    def clipped(self, u, d):
        return u.clamp(-d, d)


@mistake(Adafactor, "Divides by RMS(U) / d also where it is below 1: a quiet step is made loud.")
class AlwaysDivided(Written):
    def clipped(self, u, d):
        rms = self.rms(u)
        return u if rms == 0 else u * (d / rms)


@mistake(Adafactor, "Divides by RMS(U) where it is above d, which brings it to 1, not to d.")
class ClippedToOne(Written):
    def clipped(self, u, d):
        rms = self.rms(u)
        return u / rms if rms > d else u


@mistake(Adafactor, "Clips to 1 whatever d is.")
class ThresholdIgnored(Written):
    def clipped(self, u, d):
        return super().clipped(u, 1.0)


@mistake(Adafactor, "Clips the gradient's RMS, before the second moment: relative to nothing.")
class GradientClipped(Written):
    def one(self, p, g, group, state):
        super().one(p, Written.clipped(self, g, group["d"]), group, state)

    def clipped(self, u, d):
        return u


@mistake(Adafactor, "Clips each matrix of a tensor by an RMS of its own; RMS(U) is over the whole tensor.")
class ClippedMatrixByMatrix(Written):
    def clipped(self, u, d):
        if u.dim() < 3:
            return super().clipped(u, d)
        return u / (u.square().mean(dim=(-2, -1), keepdim=True).sqrt() / d).clamp(min=1)


# Groups, counts, state


@mistake(Adafactor, "One step count serves all parameters, also those that had no gradient.")
class OneCount(Written):
    def move(self):
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        super().move()

    def count(self, state):
        return self.param_groups[0]["count"]


@mistake(Adafactor, "A parameter without a gradient still decays.")
class DecaysWithoutGradient(Written):
    def move(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        super().move()


@mistake(Adafactor, "Takes a missing gradient for zeros: t goes on, the second moment fades, and p decays.")
class MissingAsZeros(Written):
    def step(self):
        absent = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        for p in absent:
            p.grad = torch.zeros_like(p)
        super().step()
        for p in absent:
            p.grad = None


@mistake(Adafactor, "Uses the options of the first group for all.")
class FirstGroupForAll(Written):
    def one(self, p, g, group, state):
        super().one(p, g, self.param_groups[0], state)


@mistake(Adafactor, "Reads lr once, so a scheduler changes nothing.")
class LearningRateReadOnce(Written):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.rates = {}

    def one(self, p, g, group, state):
        self.rates = getattr(self, "rates", {})
        super().one(p, g, {**group, "lr": self.rates.setdefault(p, group["lr"])}, state)


@mistake(
    Adafactor, "Keeps beta2_decay, eps and d as they are in the first step; the group may have others later."
)
class OptionsOfTheFirstStep(Written):
    def one(self, p, g, group, state):
        first = group.setdefault("first", {name: group[name] for name in ("beta2_decay", "eps", "d")})
        super().one(p, g, {**group, **first}, state)


@mistake(
    Adafactor,
    "Keeps the means in a dict of the class, by parameter: a new optimizer of the same parameters finds old ones.",
)
class MeansOfTheClass(Written):
    earlier: dict[Any, Any] = {}

    def one(self, p, g, group, state):
        if not state:
            state = self.state[p] = self.earlier.setdefault(p, {})
        super().one(p, g, group, state)


@mistake(
    Adafactor,
    "Keeps t, or everything, where state_dict() does not see it: a resume starts again at t = 1, where beta2 is 0.",
)
class ForgetsOnResume(Written):
    def one(self, p, g, group, state):
        self.hidden = getattr(self, "hidden", {})
        super().one(p, g, group, self.hidden.setdefault(p, {}))


@mistake(
    Adafactor,
    "Saves t but not R, C and V: after a resume they start at 0 with a beta2 that trusts what they hold.",
)
class MomentsForgotten(Written):
    def one(self, p, g, group, state):
        self.hidden = getattr(self, "hidden", {})
        self.now = self.hidden.setdefault(p, {})
        super().one(p, g, group, state)

    def kept(self, state, name, new, share):
        return super().kept(self.now, name, new, share)


@mistake(
    Adafactor, "Gives p new memory: whatever shares the old, a tied weight or a flat buffer, is left behind."
)
class NewMemory(Written):
    def subtract(self, p, u, alpha):
        p.data = p.data - alpha * u


@mistake(
    Adafactor, "Makes U in the memory of the gradient: whoever reads .grad afterwards reads something else."
)
class GradientOverwritten(Written):
    def update(self, g, v, eps1):
        return g.div_(v.sqrt().clamp(min=eps1))


# What is refused


@mistake(Adafactor, "Lets NaN and infinity into the means, which never lose them again.")
class BrokenGradients(Written):
    def refuse_values(self, g):
        pass


@mistake(Adafactor, "Looks for NaN alone: infinity over infinity is NaN in V.")
class InfiniteGradients(Written):
    def refuse_values(self, g):
        if g.isnan().any():
            raise ValueError("NaN")


@mistake(Adafactor, "Looks at a gradient when its turn comes: the parameters before it have moved already.")
class RefusedTooLate(Written):
    @torch.no_grad()
    def step(self):
        self.move()

    def one(self, p, g, group, state):
        self.refuse(g)
        super().one(p, g, group, state)


@mistake(Adafactor, "Leaves out a broken gradient silently and moves the others, so nobody hears of it.")
class BrokenLeftOut(Written):
    def refuse_values(self, g):
        pass

    def one(self, p, g, group, state):
        if g.isfinite().all():
            super().one(p, g, group, state)


@mistake(Adafactor, "Takes gradients of any dtype: in bfloat16 the means are off by up to 1/512.")
class AnyKind(Written):
    def refuse(self, g):
        if g.is_sparse:
            raise ValueError("sparse")
        self.refuse_values(g)


@mistake(Adafactor, "Does not look at its options.")
class OptionsNotLookedAt(Written):
    def refuse_options(self, *arguments):
        pass


@mistake(Adafactor, "Looks for values below 0 with <, which lets NaN through.")
class NanAmongTheOptions(Written):
    def refuse_options(self, lr, beta2_decay, eps, d, weight_decay):
        if (
            min(lr, *(e for e in eps if e is not None and e == e), weight_decay) < 0
            or beta2_decay > 0
            or d < 1
        ):
            raise ValueError("options")


@alternative(Adafactor, "Keeps R and C in place, and divides by the mean of C, which is that of R")
class MeanOfColumns(Written):
    def kept(self, state, name, new, share):
        return state.setdefault(name, torch.zeros_like(new)).lerp_(new, share)

    def product(self, r, c, eps1):
        return r * c / c.mean(dim=-1, keepdim=True).clamp(min=eps1)


@alternative(Adafactor, "Works in float64 and keeps what it keeps in p's dtype; counts with tensors")
class InFloat64(Written):
    def one(self, p, g, group, state):
        eps1, eps2 = self.eps(p, group)
        if "t" not in state:
            state["t"] = torch.zeros((), dtype=torch.float32)
        state["t"] += 1
        t = int(state["t"])
        wide = {name: value.double() for name, value in state.items() if name != "t"}
        exact = p.double()
        alpha = self.alpha(exact, t, group["lr"], eps2)
        self.decay(exact, group, alpha)
        v = self.second_moment(g.double(), wide, self.share(t, group["beta2_decay"]), eps1)
        self.subtract(exact, self.clipped(self.update(g.double(), v, eps1), group["d"]), alpha)
        state.update({name: value.to(p.dtype) for name, value in wide.items()})
        p.copy_(exact)


@alternative(
    Adafactor, "Takes the roots of R and C before they are multiplied, and sums products in reverse order"
)
class RootsFirst(Written):
    def rms(self, x):
        flat = x.flatten().flip(0)
        return (torch.dot(flat, flat).item() / max(1, x.numel())) ** 0.5

    def factored(self, squares, state, share, eps1):
        r = self.kept(state, "R", squares.flip(-1).sum(-1, keepdim=True) / squares.shape[-1], share)
        c = self.kept(state, "C", squares.flip(-2).sum(-2, keepdim=True) / squares.shape[-2], share)
        mean = (r.flip(-2).sum(-2, keepdim=True) / r.shape[-2]).clamp(min=eps1)
        return ((r / mean).sqrt() @ c.sqrt()).square()
