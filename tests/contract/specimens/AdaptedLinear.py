"""Specimen: a module whose parameters, buffers and checkpoint are part of the answer."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised


@exercise(
    points=3,
    minutes=15,
    hints=(
        "What is trained, and what only moves along?",
        "`alpha / rank` scales the product, not the input alone.",
    ),
)
class AdaptedLinear(torch.nn.Module):
    """A frozen linear layer with a trained product of two thin matrices beside it: x W^T + alpha/rank (x D^T) U^T.

    AdaptedLinear(weight, down, up, alpha): weight [out, in], down [rank, in], up [out, rank], all of one dtype;
    ValueError when the shapes of down and up do not fit weight and each other. The layer keeps copies.

    Parameters `down` and `up` are trained and are all that state_dict() holds; the frozen weight follows the
    module's dtype. `forward(x)` [..., in] -> [..., out] never forms a [out, in] matrix; `merged()` gives the weight
    [out, in] of one plain linear layer that does the same, without gradient history. About 12 lines.
    """

    def __init__(self, weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> None:
        ### BEGIN SOLUTION
        super().__init__()
        if (up.shape[0], up.shape[1], down.shape[1]) != (weight.shape[0], down.shape[0], weight.shape[1]):
            raise ValueError(
                f"weight {list(weight.shape)} does not fit up {list(up.shape)} @ down {list(down.shape)}"
            )
        self.register_buffer("weight", weight.clone(), persistent=False)
        self.down = torch.nn.Parameter(down.clone())
        self.up = torch.nn.Parameter(up.clone())
        self.scale = alpha / down.shape[0]
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return x @ self.weight.T + self.scale * (x @ self.down.T @ self.up.T)
        ### END SOLUTION

    def merged(self) -> Tensor:
        ### BEGIN SOLUTION
        return (self.weight + self.scale * (self.up @ self.down)).detach()
        ### END SOLUTION


def drawn(rng, rank=3, dtype=torch.float32):
    """weight [7, 5], down [rank, 5], up [7, rank], alpha."""
    alpha = rng.choice((4.0, 6.0, 16.0))
    return (
        rng.normal(7, 5, dtype=dtype),
        rng.normal(rank, 5, dtype=dtype),
        rng.normal(7, rank, dtype=dtype),
        alpha,
    )


@case(AdaptedLinear)
def output(answer, rng):
    """Its output for a batch of sequences, and the weight that does the same."""
    layer = answer(*drawn(rng, rank=rng.integer(2, 4)))
    first, again = layer.merged(), layer.merged()
    return {"y": layer(rng.normal(2, 3, 5)), "merged": first, "again": again, "history": again.requires_grad}


@case(AdaptedLinear)
def gradients(answer, rng):
    """Which parameters get a gradient, and what gradient."""
    layer = answer(*drawn(rng))
    x = rng.normal(4, 5).requires_grad_()
    (layer(x) * rng.normal(4, 7)).sum().backward()
    return {"x": x.grad, **{name: part.grad for name, part in layer.named_parameters()}}


@case(AdaptedLinear)
def one_step(answer, rng):
    """The matrices it was given after a training step of its own, and its output after they changed."""
    weight, down, up, alpha = drawn(rng)
    layer = answer(weight, down, up, alpha)
    x = rng.normal(4, 5)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    given = [weight.clone(), down.detach().clone(), up.detach().clone()]
    with torch.no_grad():
        weight.mul_(2), down.mul_(2), up.mul_(2)
    return {"given": given, "y": layer(x)}


@case(AdaptedLinear)
def checkpoint(answer, rng):
    """What its checkpoint holds, and that another layer loads it."""
    weight, down, up, alpha = drawn(rng)
    other = answer(weight, torch.zeros_like(down), torch.zeros_like(up), alpha)
    held = answer(weight, down, up, alpha).state_dict()
    told = other.load_state_dict(dict(held))
    return {"held": dict(held), "missing": list(told.missing_keys), "y": other(rng.normal(4, 5))}


@case(AdaptedLinear)
def double_precision(answer, rng):
    """The layer after .double(), on float64 input."""
    layer = answer(*drawn(rng)).double()
    return {"y": layer(rng.normal(4, 5, dtype=torch.float64)), "merged": layer.merged()}


@case(AdaptedLinear)
def shapes(answer, rng):
    """Matrices that do not fit are refused; those that fit are not."""
    weight, down, up, alpha = drawn(rng)
    return {
        "down too wide": raised(answer, weight, rng.normal(3, 6), up, alpha),
        "ranks differ": raised(answer, weight, rng.normal(2, 5), up, alpha),
        "up too tall": raised(answer, weight, down, rng.normal(8, 3), alpha),
        "y": answer(weight, down, up, alpha)(rng.normal(5)),
    }


@cost(AdaptedLinear, share=1 / 6)
def no_full_matrix(answer, rng):
    """The largest tensor made while one row goes through."""
    layer = answer(rng.normal(64, 48), rng.normal(2, 48), rng.normal(64, 2), 4.0)
    x = rng.normal(1, 48)
    with TensorWork() as work:
        layer(x)
    return {"largest tensor, bytes": work.largest_tensor_bytes}


class Written(torch.nn.Module):
    """What the wrong and unusual answers below share."""

    def __init__(self, weight, down, up, alpha):
        super().__init__()
        self.check(weight, down, up)
        self.keep(weight)
        self.down, self.up = torch.nn.Parameter(down.clone()), torch.nn.Parameter(up.clone())
        self.scale = alpha / down.shape[0]

    def check(self, weight, down, up):
        if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1] or up.shape[1] != down.shape[0]:
            raise ValueError("shapes do not fit")

    def keep(self, weight):
        self.register_buffer("weight", weight.clone(), persistent=False)

    def forward(self, x):
        return x @ self.weight.T + self.scale * (x @ self.down.T @ self.up.T)

    def merged(self):
        return (self.weight + self.scale * (self.up @ self.down)).detach()


@mistake(AdaptedLinear, "The product is not divided by the rank, so its size depends on the rank.")
class AlphaAlone(Written):
    def __init__(self, weight, down, up, alpha):
        super().__init__(weight, down, up, alpha)
        self.scale = alpha


@mistake(AdaptedLinear, "The frozen weight is a parameter, so it is trained and saved too.")
class TrainsTheWeight(Written):
    def keep(self, weight):
        self.weight = torch.nn.Parameter(weight.clone())


@mistake(AdaptedLinear, "The frozen weight is saved with every adapter.")
class SavesTheWeight(Written):
    def keep(self, weight):
        self.register_buffer("weight", weight.clone())


@mistake(AdaptedLinear, "The frozen weight is a plain attribute, so `.double()` and `.to()` leave it behind.")
class LeavesTheWeightBehind(Written):
    def keep(self, weight):
        self.weight = weight.clone()


@mistake(AdaptedLinear, "The layer trains the matrices it was given, not copies of them.")
class SharesWithTheCaller(Written):
    def __init__(self, weight, down, up, alpha):
        super().__init__(weight, down, up, alpha)
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)


@mistake(
    AdaptedLinear, "Merging adds the product to the layer's own weight, so the second merge adds it twice."
)
class MergesInPlace(Written):
    def merged(self):
        return self.weight.add_(self.scale * (self.up @ self.down).detach()).clone()


@mistake(AdaptedLinear, "The merged weight is formed on every call, so a thin product costs a full matrix.")
class MergesOnEveryCall(Written):
    def forward(self, x):
        return x @ (self.weight + self.scale * (self.up @ self.down)).T


@mistake(AdaptedLinear, "Matrices that do not fit are found out at the first input, not when they are given.")
class ChecksNothing(Written):
    def check(self, weight, down, up):
        pass


@alternative(AdaptedLinear, "Calls torch.nn.functional.linear and scales the thin intermediate")
class Functional(Written):
    def forward(self, x):
        thin = torch.nn.functional.linear(x, self.down) * self.scale
        return torch.nn.functional.linear(x, self.weight) + torch.nn.functional.linear(thin, self.up)

    def merged(self):
        with torch.no_grad():
            return torch.addmm(self.weight, self.up, self.down, alpha=self.scale)


@alternative(AdaptedLinear, "A child module holds the weight and is kept out of the checkpoint by a hook")
class WithHook(Written):
    def keep(self, weight):
        self.register_buffer("weight", weight.clone())
        self._register_load_state_dict_pre_hook(lambda state, *_: state.setdefault("weight", self.weight))
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.__delitem__("weight"))
