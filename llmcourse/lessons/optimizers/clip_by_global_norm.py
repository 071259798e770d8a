"""Clipping by the norm over all gradients: one number for the whole model, and one factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(
    points=2,
    minutes=8,
    mutates=True,
    forbid=(
        "torch.nn.utils.clip_grad_norm_",
        "torch.nn.utils.clip_grads_with_norm_",
        "torch.nn.utils.get_total_norm",
        "torch.nn.utils.clip_grad_value_",
        "torch.nn.utils.clip_grad.clip_grad_norm_",
        "torch.nn.utils.clip_grad._clip_grads_with_norm_",
        "torch.nn.utils.clip_grad._get_total_norm",
        "torch.nn.utils.clip_grad.clip_grad_value_",
    ),
    hints=(
        "The norm of all gradients laid end to end is the norm of their norms. Find it first, look at it, and touch a "
        "gradient only then.",
        "parameters may be a generator, which can be gone through only once. What is squared must be float64 already.",
    ),
)
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients, in place, so that their common norm is at most max_norm; returns
    the norm from before; about 12 lines.

    The norm is that of one long vector: the root of the sum of the squares of all elements
    of all gradients. Squares are taken and added up in float64, whatever the gradients'
    dtypes (bfloat16, float16, float32, float64, also mixed), so that the norm is right for
    gradients between 1e-30 and 1e30.

    A norm above max_norm: every gradient is multiplied by max_norm / norm (nothing is added
    to the norm) where it lies: p.grad stays the same tensor, of the same dtype, in the same
    memory; it may be a view of something larger. The factor is not rounded to that dtype,
    the products are (in bfloat16 that can move the new norm by 0.4 %). A norm up to
    max_norm: nothing is changed. max_norm may be infinite, to find the norm only.

    parameters: any iterable of tensors, such as model.parameters(); those whose .grad is
    None are skipped, and a gradient may be empty. Without any gradient the norm is 0.0. The
    norm returned is a Python float.

    ValueError, with every gradient left as it was: a max_norm that is not above 0 (0,
    negative, NaN), a gradient that is sparse or complex, and a norm that is not finite (NaN
    or Inf in a gradient, also where max_norm is infinite).

    For a sixth of the points: one gradient at a time. No tensor is made that has more bytes
    than the largest gradient has in float64.

    Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1.
    """
    ### BEGIN SOLUTION
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; expected a number above 0")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(g.layout != torch.strided or g.is_complex() for g in gradients):
        raise ValueError("a gradient is sparse or complex; expected dense, real ones")
    norm = math.hypot(*(torch.linalg.vector_norm(g, dtype=torch.float64).item() for g in gradients))
    if not math.isfinite(norm):
        raise ValueError(f"the gradients' norm is {norm}; expected no NaN or Inf: skip this step")
    if norm > max_norm:
        for g in gradients:
            g.mul_(max_norm / norm)
    return norm
    ### END SOLUTION


excuse(clip_by_global_norm, "norm > max_norm -> norm >= max_norm", "a norm of max_norm gives a factor of 1")


# ---------------------------------------------------------------------------------------------------------- cases

SHAPES = ((5, 7), (11,), (2, 3, 4), (), (1, 9))


def with_gradients(rng, scales=(1e-8, 1.0, 1e3, 30.0, 1e-3), dtype=torch.float64, shapes=SHAPES):
    """Parameters of several shapes with gradients of several scales."""
    found = []
    for shape, scale in zip(shapes, scales, strict=True):
        p = torch.nn.Parameter(rng.normal(*shape, dtype=dtype))
        # A factor keeps the sign of every element, and none is far below its tensor's scale.
        sign = rng.choice((-1, 1)) * (2 * rng.integers(0, 1, *shape) - 1)
        p.grad = (rng.uniform(0.5, 1.5, *shape, dtype=torch.float64) * sign * scale).to(dtype)
        found.append(p)
    return found


def gradients_of(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def norm_of(parameters):
    """The norm, to choose a max_norm by; no case reports it."""
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters if p.grad is not None))


@case(clip_by_global_norm)
def several_tensors(answer, rng):
    """Five tensors whose gradients are of scales between 1e-8 and 1e3, in float64 and in float32."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        scales = rng.shuffled((1e-8, 1.0, 1e3, 30.0, 1e-3))
        parameters = with_gradients(rng, scales, dtype)
        norm = answer(parameters, norm_of(parameters) * rng.integer(20, 70) / 100)
        found[str(dtype)] = {
            "norm": norm,
            "gradients": gradients_of(parameters),
            "parameters": [p.detach().clone() for p in parameters],
        }
    return found


@case(clip_by_global_norm)
def much_above_the_bound(answer, rng):
    """A bound far below the norm, one far below 1, and one above 1."""
    found = []
    for bound in (1e-3, 0.25, 3.0):
        parameters = with_gradients(rng, rng.shuffled((0.1, 4.0, 70.0, 2.0, 300.0)))
        found.append([answer(parameters, bound * rng.integer(1, 4)), *gradients_of(parameters)])
    return found


@case(clip_by_global_norm)
def within_the_bound(answer, rng):
    """Norms below the bound, far below it, and a bound that is infinite: nothing changes."""
    found = []
    for scale, factor in ((1.0, 1.1), (1e-3, 2000.0), (40.0, math.inf), (1e-9, 1e9)):
        parameters = with_gradients(rng, [scale * rng.integer(1, 3) for _ in SHAPES])
        found.append([answer(parameters, norm_of(parameters) * factor), *gradients_of(parameters)])
    zeros = with_gradients(rng, [0.0] * len(SHAPES))
    found.append([answer(zeros, rng.integer(1, 3) / 4), *gradients_of(zeros)])
    return found


@case(clip_by_global_norm)
def no_tensor_is_above_the_bound(answer, rng):
    """Each gradient's own norm is below the bound, and so is each element; all together are above it."""
    parameters = with_gradients(rng, [rng.integer(8, 12) / 10 / math.sqrt(math.prod(s)) for s in SHAPES])
    return [answer(parameters, rng.integer(170, 175) / 100), *gradients_of(parameters)]


@case(clip_by_global_norm)
def missing_gradients(answer, rng):
    """Parameters without a gradient at the start, in the middle and at the end; none at all; no parameters."""
    parameters = with_gradients(rng, (3.0, 20.0, 1.0, 0.5, 7.0))
    for index in rng.choice(((0, 2), (0, 3), (1, 4), (2, 4))):
        parameters[index].grad = None
    norm = answer(parameters, norm_of(parameters) / rng.integer(2, 5))
    bare = [torch.nn.Parameter(rng.normal(3)), torch.nn.Parameter(rng.normal(2, 3))]
    return {
        "norm": norm,
        "gradients": gradients_of(parameters),
        "no gradient": answer(bare, rng.uniform(0.1, 2).item()),
        "still none": gradients_of(bare),
        "no parameter": answer([], 1.0),
    }


@case(clip_by_global_norm)
def empty_gradients(answer, rng):
    """A gradient of shape [0, 3] among others, and one alone."""
    parameters = with_gradients(rng, (3.0, 20.0, 1.0), shapes=((4, 2), (0, 3), (5,)))
    norm = answer(parameters, norm_of(parameters) / rng.integer(2, 5))
    return [norm, *gradients_of(parameters), answer(parameters[1:2], 1.0)]


@case(clip_by_global_norm)
def given_by_a_generator(answer, rng):
    """The parameters of a module, which come from a generator that can be gone through once."""
    inputs, outputs = rng.integer(3, 5), rng.integer(6, 8)
    module = torch.nn.Sequential(torch.nn.Linear(inputs, outputs), torch.nn.Linear(outputs, 2, bias=False))
    for p in module.parameters():
        p.grad = rng.normal(*p.shape) * rng.integer(2, 40)
    norm = answer(module.parameters(), norm_of(module.parameters()) / rng.integer(2, 5))
    return [norm, *gradients_of(module.parameters())]


@case(clip_by_global_norm)
def where_they_lie(answer, rng):
    """Gradients that are parts of one buffer or transposed: the same tensors, and the buffer itself, are scaled."""
    columns = rng.integer(4, 6)
    buffer = rng.normal(3 * columns + 7, dtype=torch.float64)
    wide = rng.normal(columns, 3, dtype=torch.float64)
    parameters = [
        torch.nn.Parameter(torch.zeros(*shape, dtype=torch.float64))
        for shape in ((3, columns), (7,), wide.T.shape)
    ]
    parameters[0].grad = buffer[: 3 * columns].view(3, columns)
    parameters[1].grad = buffer[3 * columns :]
    parameters[2].grad = wide.T
    kept = [p.grad for p in parameters]
    places = [g.data_ptr() for g in kept]
    norm = answer(parameters, rng.uniform(0.3, 0.6).item())
    return {
        "norm": norm,
        "buffer": buffer,
        "transposed": wide,
        "gradients": gradients_of(parameters),
        "same tensors": [p.grad is g for p, g in zip(parameters, kept, strict=True)],
        "same memory": [p.grad.data_ptr() == place for p, place in zip(parameters, places, strict=True)],
    }


@case(clip_by_global_norm)
def narrow_floats(answer, rng):
    """bfloat16, float16, float32 in one call; thousands of small values; squares that overflow; a factor near 1e-8."""
    mixed = []
    for dtype, scale in ((torch.bfloat16, 3.0), (torch.float16, 40.0), (torch.float32, 9.0)):
        mixed += with_gradients(rng, (scale,) * 2, dtype, ((4, 5), (6,)))
    many = with_gradients(rng, (0.01, 0.02), torch.bfloat16, ((70, 50), (rng.integer(900, 999),)))
    loud = with_gradients(rng, (3e4, 2e3), torch.float16, ((6, 9), (5,)))
    far = with_gradients(rng, (3e4,), torch.float16, ((6, 9),))
    far += with_gradients(rng, (1e12,), torch.float32, ((3, 5),))
    return {
        "mixed": [answer(mixed, rng.integer(20, 60)), *gradients_of(mixed)],
        "many": [answer(many, rng.uniform(0.05, 0.2).item()), *gradients_of(many)],
        "loud": [answer(loud, rng.integer(200, 900)), *gradients_of(loud)],
        "far apart": [answer(far, rng.integer(3, 6) * 1e4), *gradients_of(far)],
    }


@case(clip_by_global_norm)
def very_large_and_very_small(answer, rng):
    """float32 gradients around 1e30, around 1e-30, and both in one call: no square of them fits float32."""
    found = []
    for scales, bound in (
        ((1e30, 3e28, 1e29, 2e30, 1e30), 1.0),
        ((1e-30, 3e-29, 1e-30, 1e-29, 3e-30), 1e-31),
        ((1e-30, 3e-29, 1e-30, 1e-29, 3e-30), 1e-20),
        ((1e-30, 1.0, 1e30, 1e-9, 1e15), 1e28),
    ):
        parameters = with_gradients(rng, rng.shuffled(scales), torch.float32)
        found.append([answer(parameters, bound * rng.integer(1, 5)), *gradients_of(parameters)])
    return found


@case(clip_by_global_norm)
def clipped_twice(answer, rng):
    """The same gradients again, with the same bound, then with half of it."""
    parameters, bound = with_gradients(rng), rng.integer(2, 9) / 4
    found = []
    for max_norm in (bound, bound * 1.001, bound / 2):
        found.append([answer(parameters, max_norm), *gradients_of(parameters)])
    return found


@case(clip_by_global_norm)
def broken_gradients(answer, rng):
    """NaN, Inf and -Inf in any of the tensors are refused, and no gradient is changed; beside them, a norm."""
    found = {}
    for value in (math.nan, math.inf, -math.inf):
        for index in (0, 2, len(SHAPES) - 1):
            parameters = with_gradients(rng)
            flat = parameters[index].grad.view(-1)
            flat[rng.integer(0, flat.numel() - 1)] = value
            refused = raised(answer, parameters, rng.choice((0.5, 1e9)))
            found[f"{value} in tensor {index}"] = [refused, *gradients_of(parameters)]
    parameters = with_gradients(rng)
    parameters[0].grad[0, :2] = torch.tensor([math.inf, -math.inf])
    found["Inf beside -Inf"] = [raised(answer, parameters, 1.0), *gradients_of(parameters)]
    parameters = with_gradients(rng)
    parameters[1].grad[rng.integer(0, 9)] = math.inf
    found["infinite bound"] = [raised(answer, parameters, math.inf), *gradients_of(parameters)]
    parameters = with_gradients(rng, (3e4, 1.0), torch.float16, ((3, 4), (5,)))
    parameters[0].grad.abs_()  # finite, and its sum is not
    found["finite"] = [answer(parameters, rng.integer(200, 900)), *gradients_of(parameters)]
    return found


@case(clip_by_global_norm)
def refused(answer, rng):
    """Sparse and complex gradients and bounds that are none are refused, and no gradient is changed."""
    found = {}
    for name, bound in {"0": 0.0, "negative": -rng.uniform(0.1, 9).item(), "NaN": math.nan}.items():
        parameters = with_gradients(rng)
        found[f"bound {name}"] = [raised(answer, parameters, bound), *gradients_of(parameters)]
    bare = [torch.nn.Parameter(rng.normal(3))]
    found["bound 0, no gradient"] = raised(answer, bare, 0.0)
    for place in (0, 3, 5):
        dense = with_gradients(rng)
        table = torch.nn.Parameter(rng.normal(6, 3))
        rows = torch.tensor([[1, 4]])
        table.grad = torch.sparse_coo_tensor(rows, rng.normal(2, 3), (6, 3), check_invariants=False)
        refused = raised(answer, [*dense[:place], table, *dense[place:]], 0.5)
        found[f"sparse at {place}"] = [refused, *gradients_of(dense), table.grad.to_dense()]
        turned = torch.nn.Parameter(torch.complex(rng.normal(4), rng.normal(4)))
        turned.grad = torch.complex(rng.normal(4), rng.normal(4))
        refused = raised(answer, [*dense[:place], turned, *dense[place:]], 0.5)
        found[f"complex at {place}"] = [refused, *gradients_of(dense), turned.grad.clone()]
    parameters = with_gradients(rng)
    return {"clipped": [answer(parameters, 0.5), *gradients_of(parameters)], **found}


@cost(clip_by_global_norm, share=1 / 6)
def one_gradient_at_a_time(answer, rng):
    """Nine gradients: the largest tensor that is made beside them, over the size of the largest of them in float64."""
    shapes = [(rng.integer(20, 25), 40) for _ in range(8)] + [(25, 40)]
    observed, largest = [], 0.0
    for dtype in (torch.float32, torch.bfloat16):
        parameters = with_gradients(rng, [1.0] * 9, dtype, shapes)
        with TensorWork() as work:
            observed.append(answer(parameters, rng.uniform(0.5, 2).item()))
        observed.append(gradients_of(parameters))
        largest = max(largest, work.largest_tensor_bytes / (8 * 1000))
    return {"observed": observed, "largest tensor made, in largest gradients": (largest, 1)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Clip:
    """A right answer in small steps; a mistake replaces one of them."""

    def refuse_bound(self, max_norm: float) -> None:
        if math.isnan(max_norm) or max_norm <= 0:
            raise ValueError("max_norm")

    def refuse_kinds(self, gradients: list[Tensor]) -> None:
        self.refuse_sparse(gradients)
        self.refuse_complex(gradients)

    def refuse_sparse(self, gradients):
        if any(g.is_sparse for g in gradients):
            raise ValueError("sparse")

    def refuse_complex(self, gradients):
        if any(torch.is_complex(g) for g in gradients):
            raise ValueError("complex")

    def refuse_norm(self, norm: float) -> None:
        if norm - norm != 0:
            raise ValueError("not finite")

    def found(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [p.grad for p in parameters if p.grad is not None]

    def squares(self, g: Tensor) -> float:
        return g.double().pow(2).sum().item()

    def norm(self, gradients: list[Tensor]) -> float:
        return math.sqrt(sum((self.squares(g) for g in gradients), 0.0))

    def factor(self, norm: float, max_norm: float) -> float:
        return max_norm / norm if norm > max_norm else 1.0

    def scale(self, g: Tensor, factor: float) -> None:
        if factor != 1:
            g.mul_(factor)

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> float:
        self.refuse_bound(max_norm)
        gradients = self.found(parameters)
        self.refuse_kinds(gradients)
        norm = self.norm(gradients)
        self.refuse_norm(norm)
        factor = self.factor(norm, max_norm)
        for g in gradients:
            self.scale(g, factor)
        return self.returned(norm, max_norm)

    def returned(self, norm: float, max_norm: float) -> float:
        return norm


def variant(**steps: Any) -> Callable[..., float]:
    """An answer with some steps replaced."""
    return type("Variant", (Clip,), steps)().clip


@mistake(
    clip_by_global_norm,
    "Clips every tensor by its own norm: that turns the direction of the step, which one common factor keeps.",
)
def each_by_its_own_norm(parameters, max_norm):
    parameters = list(parameters)
    norm = variant(scale=lambda self, g, factor: None)(parameters, max_norm)
    for g in Clip().found(parameters):
        own = math.sqrt(Clip().squares(g))
        Clip().scale(g, Clip().factor(own, max_norm))
    return norm


@mistake(
    clip_by_global_norm,
    "Cuts every element to -max_norm .. max_norm: clipping by value, which turns the step.",
)
def by_value(parameters, max_norm):
    parameters = list(parameters)
    norm = variant(scale=lambda self, g, factor: None)(parameters, max_norm)
    for g in Clip().found(parameters):
        g.clamp_(-max_norm, max_norm)
    return norm


@mistake(
    clip_by_global_norm, "Scales small gradients up to max_norm: that is normalising, and makes noise loud."
)
def scales_up(parameters, max_norm):
    def factor(self, norm, max_norm):
        return max_norm / norm if norm and max_norm < math.inf else 1.0

    return variant(factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Adds up the tensors' norms instead of their squares: the sum is larger than the norm of all.",
)
def sum_of_norms(parameters, max_norm):
    def norm(self, gradients):
        return sum((math.sqrt(self.squares(g)) for g in gradients), 0.0)

    return variant(norm=norm)(parameters, max_norm)


@mistake(clip_by_global_norm, "Takes the largest of the tensors' norms for the norm of all.")
def largest_of_the_norms(parameters, max_norm):
    def norm(self, gradients):
        norms = [math.sqrt(self.squares(g)) for g in gradients]
        return math.nan if any(map(math.isnan, norms)) else max(norms, default=0.0)

    return variant(norm=norm)(parameters, max_norm)


@mistake(clip_by_global_norm, "Takes the largest magnitude of an element for the norm.")
def largest_element(parameters, max_norm):
    def norm(self, gradients):
        Clip.refuse_norm(self, Clip.norm(self, gradients))
        return max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)

    return variant(norm=norm)(parameters, max_norm)


@mistake(clip_by_global_norm, "Takes max() of every gradient: an empty one has none, and torch raises.")
def largest_of_an_empty_one(parameters, max_norm):
    def norm(self, gradients):
        largest = max((g.abs().max().item() for g in gradients), default=0.0)
        if not 0 < largest < math.inf:
            return largest
        return largest * math.sqrt(sum((g.double() / largest).square().sum().item() for g in gradients))

    return variant(norm=norm)(parameters, max_norm)


@mistake(clip_by_global_norm, "Forgets the root: the sum of squares is compared with max_norm.")
def no_root(parameters, max_norm):
    return variant(norm=lambda self, gradients: Clip.norm(self, gradients) ** 2)(parameters, max_norm)


@mistake(
    clip_by_global_norm, "Takes the root of the mean square: the bound then grows with the size of the model."
)
def root_of_the_mean(parameters, max_norm):
    def norm(self, gradients):
        return Clip.norm(self, gradients) / math.sqrt(max(1, sum(g.numel() for g in gradients)))

    return variant(norm=norm)(parameters, max_norm)


@mistake(clip_by_global_norm, "Adds up magnitudes: the 1-norm, not the root of the sum of squares.")
def sum_of_magnitudes(parameters, max_norm):
    def norm(self, gradients):
        return sum((g.double().abs().sum().item() for g in gradients), 0.0)

    return variant(norm=norm)(parameters, max_norm)


@mistake(clip_by_global_norm, "Takes the norm of the parameters; it is the gradients that are clipped.")
def norm_of_the_parameters(parameters, max_norm):
    parameters = list(parameters)
    gradients = Clip().found(parameters)
    Clip().refuse_bound(max_norm)
    Clip().refuse_kinds(gradients)
    Clip().refuse_norm(Clip().norm(gradients))
    norm = Clip().norm([p.detach() for p in parameters if p.grad is not None])
    for g in gradients:
        Clip().scale(g, Clip().factor(norm, max_norm))
    return norm


@mistake(clip_by_global_norm, "Scales the parameters instead of their gradients.")
def scales_the_parameters(parameters, max_norm):
    parameters = list(parameters)
    norm = variant(scale=lambda self, g, factor: None)(parameters, max_norm)
    for p in parameters:
        if p.grad is not None:
            Clip().scale(p.data, Clip().factor(norm, max_norm))
    return norm


@mistake(
    clip_by_global_norm,
    "Looks only at weights of two or more dimensions: biases and norms are neither counted nor scaled.",
)
def matrices_only(parameters, max_norm):
    parameters = list(parameters)
    variant(scale=lambda self, g, factor: None)(parameters, max_norm)
    return variant()([p for p in parameters if p.dim() > 1], max_norm)


@mistake(clip_by_global_norm, "Only measures: the norm is right, and no gradient is scaled.")
def measures_only(parameters, max_norm):
    return variant(scale=lambda self, g, factor: None)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Divides by the norm and forgets max_norm: clipped gradients always have a norm of 1.",
)
def always_to_one(parameters, max_norm):
    return variant(factor=lambda self, norm, bound: 1 / norm if norm > bound else 1.0)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Adds 1e-6 to the norm it divides by and looks at the factor alone: tiny gradients are scaled within the bound.",
)
def with_an_epsilon(parameters, max_norm):
    def factor(self, norm, bound):
        return min(1.0, bound / (norm + 1e-6))

    return variant(factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Adds 1e-6 to the norm it divides by, as libraries do: gradients come out smaller than the bound, tiny ones far.",
)
def with_an_epsilon_above_the_bound(parameters, max_norm):
    def factor(self, norm, bound):
        return bound / (norm + 1e-6) if norm > bound else 1.0

    return variant(factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Makes the factor a tensor of the gradient's dtype: in float16 one below 3e-8 is 0, and the gradient is lost.",
)
def factor_in_their_own_dtype(parameters, max_norm):
    def scale(self, g, factor):
        g.mul_(torch.tensor(factor, dtype=torch.float64).to(g.dtype))

    return variant(scale=scale)(parameters, max_norm)


@mistake(clip_by_global_norm, "Takes the root of the factor: the norm stays above the bound.")
def root_of_the_factor(parameters, max_norm):
    def factor(self, norm, bound):
        return math.sqrt(Clip.factor(self, norm, bound))

    return variant(factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Puts new tensors into .grad: whoever holds the old one, or a buffer it is part of, sees nothing of it.",
)
def new_tensors(parameters, max_norm):
    parameters = list(parameters)
    norm = variant(scale=lambda self, g, factor: None)(parameters, max_norm)
    factor = Clip().factor(norm, max_norm)
    for p in parameters:
        if p.grad is not None and factor < 1:
            p.grad = p.grad * factor
    return norm


@mistake(
    clip_by_global_norm,
    "Scales a copy: of a transposed gradient contiguous() is a new tensor, and .grad stays what it was.",
)
def scales_a_copy_of_views(parameters, max_norm):
    def scale(self, g, factor):
        g.contiguous().mul_(factor)

    return variant(scale=scale)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Goes through parameters twice: the second time a generator is empty, and nothing is scaled.",
)
def goes_through_twice(parameters, max_norm):
    norm = variant(scale=lambda self, g, factor: None)(parameters, max_norm)
    for g in Clip().found(parameters):
        Clip().scale(g, Clip().factor(norm, max_norm))
    return norm


@mistake(clip_by_global_norm, "Expects a list: len() or an index of the parameters fails for a generator.")
def expects_a_list(parameters, max_norm):
    if not len(parameters):
        return 0.0
    return variant()(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Expects every parameter to have a gradient: a None among them ends in an AttributeError.",
)
def expects_all_gradients(parameters, max_norm):
    return variant(found=lambda self, parameters: [p.grad.view_as(p.grad) for p in parameters])(
        parameters, max_norm
    )


@mistake(
    clip_by_global_norm, "Stops at the first parameter without a gradient; those after it are not counted."
)
def stops_at_a_missing_one(parameters, max_norm):
    def found(self, parameters):
        gradients = []
        for p in parameters:
            if p.grad is None:
                break
            gradients.append(p.grad)
        return gradients

    return variant(found=found)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Gives gradients of zeros to parameters that have none: an optimizer then moves them.",
)
def zeros_for_missing_ones(parameters, max_norm):
    def found(self, parameters):
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in parameters]

    return variant(found=found)(parameters, max_norm)


@mistake(clip_by_global_norm, "Refuses a model without any gradient; its norm is 0.0.")
def refuses_no_gradient(parameters, max_norm):
    def found(self, parameters):
        gradients = Clip.found(self, parameters)
        if not gradients:
            raise ValueError("no gradient")
        return gradients

    return variant(found=found)(parameters, max_norm)


@mistake(clip_by_global_norm, "Divides by the norm without comparing first: gradients of zeros become NaN.")
def divides_by_zero(parameters, max_norm):
    def factor(self, norm, bound):
        return min(1.0, bound / norm) if norm else math.nan

    return variant(factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Takes the squares in float32: those of 1e30 are Inf and those of 1e-30 are 0.",
)
def squares_in_float32(parameters, max_norm):
    def squares(self, g):
        return g.float().square().sum().item()

    return variant(squares=squares)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Takes squares and their sum in the gradients' own dtype: in bfloat16 the sum has three digits, and in float16 the "
    "square of 300 is Inf.",
)
def squares_in_their_own_dtype(parameters, max_norm):
    return variant(squares=lambda self, g: g.square().sum().item())(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Adds up in float64 what was squared in the gradients' own dtype: the overflow has happened by then.",
)
def widened_too_late(parameters, max_norm):
    return variant(squares=lambda self, g: g.square().double().sum().item())(parameters, max_norm)


@mistake(
    clip_by_global_norm, "Returns the norm after clipping: what is worth logging is the one from before."
)
def norm_afterwards(parameters, max_norm):
    return variant(returned=lambda self, norm, bound: min(norm, bound))(parameters, max_norm)


@mistake(clip_by_global_norm, "Returns the factor, not the norm.")
def returns_the_factor(parameters, max_norm):
    return variant(returned=lambda self, norm, bound: self.factor(norm, bound))(parameters, max_norm)


@mistake(clip_by_global_norm, "Returns a tensor; the statement asks for a Python float.")
def returns_a_tensor(parameters, max_norm):
    return variant(returned=lambda self, norm, bound: torch.tensor(norm, dtype=torch.float64))(
        parameters, max_norm
    )


@mistake(
    clip_by_global_norm,
    "Does not look whether the norm is finite: one Inf turns all gradients into 0 and itself into NaN, unnoticed.",
)
def scales_by_infinity(parameters, max_norm):
    def factor(self, norm, bound):
        return bound / norm if norm != 0 and not norm <= bound else 1.0

    return variant(refuse_norm=lambda self, norm: None, factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Leaves broken gradients alone and returns their norm, NaN or Inf: a caller that does not look steps with them.",
)
def returns_what_is_not_finite(parameters, max_norm):
    def factor(self, norm, bound):
        return Clip.factor(self, norm, bound) if math.isfinite(norm) else 1.0

    return variant(refuse_norm=lambda self, norm: None, factor=factor)(parameters, max_norm)


@mistake(clip_by_global_norm, "Looks for NaN only: Inf passes, and max_norm / Inf is 0 for every gradient.")
def looks_for_nan_only(parameters, max_norm):
    def refuse_norm(self, norm):
        if math.isnan(norm):
            raise ValueError("NaN")

    def factor(self, norm, bound):
        return bound / norm if norm > bound else 1.0

    return variant(refuse_norm=refuse_norm, factor=factor)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Replaces NaN and Inf by 0 and clips the rest: a broken step is taken for a good one.",
)
def broken_values_replaced(parameters, max_norm):
    def found(self, parameters):
        gradients = Clip.found(self, parameters)
        for g in gradients:
            if not g.is_sparse and not g.is_complex():
                g.nan_to_num_(0.0, 0.0, 0.0)
        return gradients

    return variant(found=found)(parameters, max_norm)


@mistake(
    clip_by_global_norm, "Refuses broken gradients after scaling: they are changed by then, and 0 or NaN."
)
def refuses_too_late(parameters, max_norm):
    def factor(self, norm, bound):
        return bound / norm if norm != 0 and not norm <= bound else 1.0

    def returned(self, norm, bound):
        Clip.refuse_norm(self, norm)
        return norm

    return variant(refuse_norm=lambda self, norm: None, factor=factor, returned=returned)(
        parameters, max_norm
    )


@mistake(
    clip_by_global_norm,
    "Looks for NaN and Inf in the sum of a gradient: large values are finite, their sum is not.",
)
def finite_by_the_sum(parameters, max_norm):
    def refuse_kinds(self, gradients):
        Clip.refuse_kinds(self, gradients)
        if not all(g.sum().isfinite() for g in gradients):
            raise ValueError("not finite")

    return variant(refuse_kinds=refuse_kinds)(parameters, max_norm)


@mistake(clip_by_global_norm, "Does not refuse sparse gradients, and scales what it does not understand.")
def sparse_let_through(parameters, max_norm):
    def squares(self, g):
        return Clip.squares(self, g.to_dense())

    return variant(refuse_sparse=lambda self, gradients: None, squares=squares)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Does not refuse complex gradients: the square of 1j is -1, so the norm is that of another vector.",
)
def complex_let_through(parameters, max_norm):
    return variant(refuse_complex=lambda self, gradients: None)(parameters, max_norm)


@mistake(clip_by_global_norm, "Accepts a max_norm of 0 or below: gradients become 0, or change their sign.")
def any_bound(parameters, max_norm):
    def refuse_bound(self, max_norm):
        if math.isnan(max_norm):
            raise ValueError("max_norm")

    return variant(refuse_bound=refuse_bound)(parameters, max_norm)


@mistake(clip_by_global_norm, "Refuses an infinite max_norm, which is how one only measures.")
def infinite_bound_refused(parameters, max_norm):
    def refuse_bound(self, max_norm):
        if not 0 < max_norm < math.inf:
            raise ValueError("max_norm")

    return variant(refuse_bound=refuse_bound)(parameters, max_norm)


@mistake(
    clip_by_global_norm,
    "Lays all gradients end to end first: a copy of the whole model's gradients, only to find one number.",
)
def end_to_end(parameters, max_norm):
    def norm(self, gradients):
        if not gradients:
            return 0.0
        return torch.cat([g.double().flatten() for g in gradients]).norm().item()

    return variant(norm=norm)(parameters, max_norm)


@alternative(
    clip_by_global_norm, "Divides by norm / max_norm, and takes the norm of each gradient's own norm"
)
def norm_of_norms(parameters, max_norm):
    def norm(self, gradients):
        if not gradients:
            return 0.0
        return torch.stack([g.double().norm() for g in gradients]).norm().item()

    def factor(self, norm, bound):
        return norm / bound if norm > bound else 1.0

    return variant(norm=norm, factor=factor, scale=lambda self, g, by: g.div_(by) if by > 1 else None)(
        parameters, max_norm
    )


@alternative(clip_by_global_norm, "Takes the largest element out before squaring, and writes with copy_")
def largest_taken_out(parameters, max_norm):
    def norm(self, gradients):
        largest = max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)
        if not 0 < largest < math.inf:
            return largest if all(g.isfinite().all() for g in gradients) else math.nan
        return largest * math.sqrt(sum((g.double() / largest).square().sum().item() for g in gradients))

    return variant(norm=norm, scale=lambda self, g, by: g.copy_(g * by))(parameters, max_norm)


@alternative(
    clip_by_global_norm, "Multiplies all gradients in one call, by dtype, and adds up squares with fsum"
)
def all_in_one_call(parameters, max_norm):
    gradients = Clip().found(parameters)
    norm = variant(
        found=lambda self, parameters: gradients,
        norm=lambda self, gradients: math.sqrt(math.fsum(map(self.squares, gradients))),
        scale=lambda self, g, factor: None,
    )(parameters, max_norm)
    # A Python float would be rounded to float16 first.
    factor = torch.tensor(Clip().factor(norm, max_norm), dtype=torch.float64)
    for dtype in {g.dtype for g in gradients}:
        torch._foreach_mul_([g for g in gradients if g.dtype == dtype], factor)
    return norm


@alternative(
    clip_by_global_norm, "Works on one long float64 vector, and writes its parts back", meets_costs=False
)
def on_one_vector(parameters, max_norm):
    gradients = Clip().found(parameters)
    Clip().refuse_bound(max_norm)
    Clip().refuse_kinds(gradients)
    if not gradients:
        return 0.0
    flat = torch.cat([g.double().flatten() for g in gradients])
    norm = flat.square().sum().sqrt().item()
    Clip().refuse_norm(norm)
    if norm > max_norm:
        flat *= max_norm / norm
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view(g.shape))
    return norm
