"""Specimen: an autograd.Function with a straight-through gradient, a learned step and an argument without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.counting import saved_bytes
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised


@exercise(points=3, minutes=15, hints=("Inside the grid rounding moves x, but its gradient passes.",))
class GridRound(torch.autograd.Function):
    """Rounds x to multiples of a step of each row, with codes -top..top, so that x and the step can be trained.

    GridRound.apply(x, step, top): x [rows, n], step [rows, 1] > 0, top an int -> [rows, n], which is
    step * clamp(round(x / step)). For a gradient g [rows, n] of the result: x gets g where |x / step| <= top and 0
    elsewhere; step gets [rows, 1], the sum over the row of g times (round(x / step) - x / step) inside and times the
    code, -top or top, outside; top gets none. Results and gradients have the dtype of x. A gradient nobody asks for
    is not computed: backward returns None in its place. Changing x or step in place between forward and backward is
    an error that torch notices. Between the two no more is kept than x and step. About 10 lines.
    """

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, top: int) -> Tensor:
        ### BEGIN SOLUTION
        ctx.save_for_backward(x, step)
        ctx.top = top
        return step * (x / step).round().clamp(-top, top)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        ### BEGIN SOLUTION
        x, step = ctx.saved_tensors
        ratio = x / step
        inside = ratio.abs() <= ctx.top
        code = ratio.round().clamp(-ctx.top, ctx.top)
        for_x = gradient * inside if ctx.needs_input_grad[0] else None
        slope = torch.where(inside, code - ratio, code)
        for_step = (gradient * slope).sum(dim=1, keepdim=True) if ctx.needs_input_grad[1] else None
        return for_x, for_step, None
        ### END SOLUTION


def drawn(rng, top, rows=3, n=8, dtype=torch.float32):
    """x off every tie of rounding and off the edge of the grid, some of it outside; step [rows, 1]; g."""
    step = rng.uniform(0.5, 2.0, rows, 1, dtype=dtype)
    codes = rng.integers(-top - 3, top + 3, rows, n)
    # The middle of a code's interval, off by up to 0.4: at least 0.1 from where the code changes.
    x = (codes + rng.uniform(-0.4, 0.4, rows, n)).to(dtype) * step
    edge = (codes.abs() == top) & ((x / step).abs() > top)
    x = torch.where(edge, codes * step * (1 - 0.1 / top), x).to(dtype)
    return x, step, rng.normal(rows, n, dtype=dtype)


def trained(answer, x, step, top, g):
    """Result and gradients of x and step."""
    x, step = x.clone().requires_grad_(), step.clone().requires_grad_()
    y = answer.apply(x, step, top)
    y.backward(g)
    return {"y": y, "x": x.grad, "step": step.grad}


@case(GridRound)
def rows_of_their_own(answer, rng):
    """A step a row: the result, and the gradients of both."""
    top = rng.choice((3, 7))
    x, step, g = drawn(rng, top)
    return trained(answer, x, step, top, g)


@case(GridRound)
def edge_of_the_grid(answer, rng):
    """Values exactly on the last code are inside."""
    top, step = rng.integer(2, 6), torch.tensor([[0.5], [2.0]])
    x = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 2.0]]) * top * step
    return trained(answer, x, step, top, rng.normal(2, 3))


@case(GridRound)
def double_precision(answer, rng):
    """float64 in, float64 out, also for the gradients."""
    x, step, g = drawn(rng, 5, dtype=torch.float64)
    return trained(answer, x, step, 5, g)


@case(GridRound)
def only_one_is_asked_for(answer, rng):
    """What backward computes when only x, or only step, is trained."""
    x, step, g = drawn(rng, 4)
    found = {}
    for name, asked in (("x", (True, False)), ("step", (False, True))):
        mine = x.clone().requires_grad_(asked[0]), step.clone().requires_grad_(asked[1])
        y = answer.apply(*mine, 4)
        # The node in the graph is the ctx itself; the engine would hide what nobody asked for.
        found[name] = [y, *answer.backward(y.grad_fn, g)]
    return found


@case(GridRound)
def changed_between(answer, rng):
    """x, or step, changed in place before backward runs."""
    x, step, g = drawn(rng, 4)
    found = {}
    for which in (0, 1):
        leaves = [part.clone().requires_grad_() for part in (x, step)]
        mine = [leaf * 1 for leaf in leaves]
        y = answer.apply(*mine, 4)
        mine[which].mul_(1.5)
        found[f"argument {which}"] = [y.detach(), raised(y.backward, g)]
    return found


@cost(GridRound, share=1 / 6)
def kept_for_backward(answer, rng):
    """Bytes that stay between forward and backward."""
    x, step, _ = drawn(rng, 4, rows=4, n=64)
    x.requires_grad_(), step.requires_grad_()
    with saved_bytes() as kept:
        y = answer.apply(x, step, 4)
    return {"bytes kept for backward": kept.total_bytes, "result, bytes": (y.nbytes, float("inf"))}


class Written(torch.autograd.Function):
    """What the wrong and unusual answers share."""

    @staticmethod
    def forward(ctx, x, step, top):
        ctx.save_for_backward(x, step)
        ctx.top = top
        return step * (x / step).round().clamp(-top, top)


def gradients(ctx, gradient, x, step, inside=None):
    ratio = x / step
    inside = (ratio.abs() <= ctx.top) if inside is None else inside(ratio)
    code = ratio.round().clamp(-ctx.top, ctx.top)
    slope = torch.where(inside, code - ratio, code)
    return [gradient * inside, (gradient * slope).sum(dim=1, keepdim=True)]


def asked(ctx, found):
    return (
        *(part if needed else None for part, needed in zip(found, ctx.needs_input_grad, strict=False)),
        None,
    )


@mistake(GridRound, "The gradient of x passes outside the grid too, where moving x changes nothing.")
class PassesOutside(Written):
    @staticmethod
    def backward(ctx, gradient):
        found = gradients(ctx, gradient, *ctx.saved_tensors)
        return asked(ctx, [gradient.clone(), found[1]])


@mistake(GridRound, "Rounding is differentiated as it is, so x gets zero everywhere.")
class TrueGradient(Written):
    @staticmethod
    def backward(ctx, gradient):
        found = gradients(ctx, gradient, *ctx.saved_tensors)
        return asked(ctx, [torch.zeros_like(gradient), found[1]])


@mistake(GridRound, "Rounding is differentiated as it is, so step gets the code everywhere.")
class CodeAsSlope(Written):
    @staticmethod
    def backward(ctx, gradient):
        x, step = ctx.saved_tensors
        code = (x / step).round().clamp(-ctx.top, ctx.top)
        found = gradients(ctx, gradient, x, step)
        return asked(ctx, [found[0], (gradient * code).sum(dim=1, keepdim=True)])


@mistake(GridRound, "The gradient of step is summed over all rows, as if one step served them.")
class SumsOverRows(Written):
    @staticmethod
    def backward(ctx, gradient):
        found = gradients(ctx, gradient, *ctx.saved_tensors)
        return asked(ctx, [found[0], found[1].sum().expand_as(found[1]).clone()])


@mistake(GridRound, "The edge of the grid counts as outside.")
class EdgeOutside(Written):
    @staticmethod
    def backward(ctx, gradient):
        return asked(ctx, gradients(ctx, gradient, *ctx.saved_tensors, lambda ratio: ratio.abs() < ctx.top))


@mistake(GridRound, "Only the upper edge is clipped in the gradient.")
class UpperEdgeOnly(Written):
    @staticmethod
    def backward(ctx, gradient):
        return asked(ctx, gradients(ctx, gradient, *ctx.saved_tensors, lambda ratio: ratio <= ctx.top))


@mistake(GridRound, "Every gradient is computed and returned, whether or not it is asked for.")
class ComputesAll(Written):
    @staticmethod
    def backward(ctx, gradient):
        return (*gradients(ctx, gradient, *ctx.saved_tensors), None)


@mistake(GridRound, "Tensors are kept as attributes of ctx, so torch cannot notice that they were changed.")
class KeepsAttributes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, top):
        ctx.x, ctx.step, ctx.top = x, step, top
        return step * (x / step).round().clamp(-top, top)

    @staticmethod
    def backward(ctx, gradient):
        return asked(ctx, gradients(ctx, gradient, ctx.x, ctx.step))


@mistake(GridRound, "Intermediates are kept beside the inputs, although backward can compute them again.")
class KeepsIntermediates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, top):
        ratio = x / step
        inside = ratio.abs() <= top
        ctx.save_for_backward(x, step, ratio, inside)
        ctx.top = top
        return step * ratio.round().clamp(-top, top)

    @staticmethod
    def backward(ctx, gradient):
        return asked(ctx, gradients(ctx, gradient, *ctx.saved_tensors[:2]))


@alternative(GridRound, "Lets autograd differentiate a clamp and a straight-through sum, inside backward")
class ByAutograd(Written):
    @staticmethod
    def backward(ctx, gradient):
        saved = [
            part.detach().requires_grad_(needed)
            for part, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        with torch.enable_grad():
            clipped = (saved[0] / saved[1]).clamp(-ctx.top, ctx.top)
            y = saved[1] * (clipped + (clipped.round() - clipped).detach())
        wanted = [part for part in saved if part.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, gradient))
        return (*(next(found) if part.requires_grad else None for part in saved), None)


@alternative(GridRound, "Sums with a matrix product and masks by multiplication, in setup_context style")
class WithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(x, step, top):
        return torch.clamp(torch.round(x / step), min=-top, max=top) * step

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.top = inputs[2]

    @staticmethod
    def backward(ctx, gradient):
        x, step = ctx.saved_tensors
        inside = ((x <= ctx.top * step) & (x >= -ctx.top * step)).to(x.dtype)
        code = torch.clamp(torch.round(x / step), -ctx.top, ctx.top)
        slope = code - inside * (x / step)
        for_step = torch.bmm(gradient.unsqueeze(1), slope.unsqueeze(2)).squeeze(2)
        return asked(ctx, [gradient * inside, for_step])
