"""Gradient descent with momentum: what goes into the buffer, what comes out of it, and where lr stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised
from llmcourse.stepping import (
    drawn,
    gradients_of,
    in_groups,
    in_shared_memory,
    large,
    one_after_another,
    read,
    refused_gradients,
    scheduled,
    state_bytes,
    values,
    with_missing,
    write,
)


@exercise(
    points=3,
    minutes=9,
    extension=True,
    forbid=(
        "torch.optim.SGD",
        "torch.optim.sgd.SGD",
        "torch.optim.sgd.sgd",
        "torch.optim.sgd._single_tensor_sgd",
        "torch.optim.sgd._multi_tensor_sgd",
        "torch.optim.sgd._fused_sgd",
        "torch._fused_sgd_",
        *(f"torch.ops.aten.{name}" for name in ("_fused_sgd_", "_fused_sgd")),
    ),
    hints=(
        "Loop over self.param_groups, then over a group's params. self.state[p] is an empty dict at first, and "
        "state_dict() saves what you put there. d need not exist as a tensor: its two parts can be added one by one.",
        "lr multiplies what leaves the buffer, never what goes in. d holds the p from before the step, also where p is "
        "changed in several operations.",
    ),
)
class SGD(torch.optim.Optimizer):
    """Gradient descent with momentum, Nesterov's too, over parameter groups; about 20 lines.

    params are parameters, or groups such as {"params": [...], "momentum": 0.5}, whose own
    options come before those of the constructor. A group may be empty, and add_param_group
    may add one later. Only parameters that have a gradient g move in step(), each p with
    the options its group has now (a scheduler may change them):

        d = g + weight_decay p            the decay is part of the gradient
        b <- momentum b + d               b belongs to p and starts at 0
        p <- p - lr b                     or, with nesterov, p <- p - lr (d + momentum b)

    This is torch.optim.SGD with dampening 0. In a step where momentum is 0, d is taken for
    b, and no b is made; one from before may stay or go. b has p's dtype. p is written in
    place: other tensors may share its memory, and it need not be contiguous. g stays what
    it is. With g None, nothing of p changes: no decay, no momentum, and b stays. NaN and
    Inf in g are let through: they break their own elements, and no others.

    Whatever a resume needs is in state_dict(), as tensors and numbers: a new process that
    loads it goes on as if nothing had happened. Any other new optimizer starts at 0.

    ValueError from the constructor: lr or weight_decay negative or NaN, momentum outside
    [0, 1), nesterov without momentum. ValueError from step(): a gradient that is sparse,
    or neither float32 nor float64 (bfloat16 weights need a float32 copy); parameters
    before it may have moved. An empty list of parameters and a state_dict of other groups
    are refused by torch.optim.Optimizer already; options inside a group are not checked.

    For a third of the points: state_dict()["state"] takes 4 bytes for each float32 value
    that ever had a gradient and momentum, and at most 16 bytes more for its parameter. A
    step makes no tensors, apart from the first that needs a b: even d is none.

    Sutskever et al. 2013 (ICML), section 2, has lr inside b: not the same once lr changes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        ### BEGIN SOLUTION
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1):
            raise ValueError(
                f"lr={lr}, weight_decay={weight_decay}, momentum={momentum}; expected at least 0, momentum below 1"
            )
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True with momentum=0; expected a momentum above 0")
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        )
        ### END SOLUTION

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient; takes no closure."""
        ### BEGIN SOLUTION
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if g.layout != torch.strided or g.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"a gradient is {g.layout}, {g.dtype}; expected dense float32 or float64"
                    )
                if momentum == 0:
                    p.mul_(1 - lr * decay).add_(g, alpha=-lr)
                    continue
                state = self.state[p]
                if not state:
                    state["b"] = torch.zeros_like(p)
                b = state["b"].mul_(momentum).add_(g).add_(p, alpha=decay)
                if group["nesterov"]:
                    p.mul_(1 - lr * decay).add_(g, alpha=-lr).add_(b, alpha=-lr * momentum)
                else:
                    p.add_(b, alpha=-lr)
        ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases

SIZES = (1.0, 1e-8, 1e3, 1e-3)


def give(parameters, rng, *, size=1.0, missing=()):
    """New gradients, from 1e-8 to 1e3 times `size`; None for the parameters in `missing`."""
    gradients_of(parameters, rng, sizes=SIZES, size=size, missing=missing)


def options(rng):
    return {
        "lr": rng.choice((0.02, 0.05)),
        "momentum": rng.choice((0.8, 0.9)),
        "weight_decay": rng.choice((0.2, 0.4)),
    }


def run(answer, rng, **given):
    """20 steps; the values after some of them."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **given)
    seen = []
    for step in range(20):
        give(parameters, rng)
        optimizer.step()
        if step in (0, 1, 7, 19):
            seen.append(values(parameters))
    return seen


@case(SGD)
def with_momentum(answer, rng):
    """Four tensors with gradients from 1e-8 to 1e3, 20 steps with momentum and decay."""
    return run(answer, rng, **options(rng))


@case(SGD)
def with_nesterov(answer, rng):
    """The same with Nesterov's momentum."""
    return run(answer, rng, **options(rng), nesterov=True)


@case(SGD)
def without_momentum(answer, rng):
    """The same without momentum."""
    return run(answer, rng, **{**options(rng), "momentum": 0.0})


@case(SGD)
def defaults_and_float64(answer, rng):
    """The options of the signature; then three tensors of one shape, with momentum, all in float64."""
    plain = [torch.nn.Parameter(rng.normal(2, 3, dtype=torch.float64)) for _ in range(2)]
    heavy = [torch.nn.Parameter(rng.normal(2, 3, dtype=torch.float64)) for _ in range(3)]
    optimizers = answer(plain), answer(heavy, momentum=rng.choice((0.8, 0.9)))
    for _ in range(12):
        for parameter, size in zip([*plain, *heavy], (1e-8, 1.0, 1e-8, 1.0, 1e-2), strict=True):
            parameter.grad = rng.normal(2, 3, dtype=torch.float64) * size
        for optimizer in optimizers:
            optimizer.step()
    return values([*plain, *heavy])


@case(SGD)
def groups_of_their_own(answer, rng):
    """Groups with options of their own: one without decay, one without momentum, an empty one, one that comes later."""
    parameters = drawn(rng)
    return in_groups(
        answer,
        parameters,
        lambda joined: give(parameters, rng),
        first=[
            {"params": parameters[:1], "weight_decay": 0.0, "nesterov": False},
            {"params": []},
            {"params": parameters[1:2], "lr": 0.1, "momentum": 0.5, "weight_decay": 0.5},
            {"params": parameters[2:3], "momentum": 0.0, "nesterov": False},
        ],
        later={"params": parameters[3:], "momentum": 0.7},
        lr=rng.choice((0.02, 0.04)),
        momentum=0.9,
        weight_decay=rng.choice((0.1, 0.3)),
        nesterov=True,
    )


@case(SGD)
def missing_gradients(answer, rng):
    """Parameters whose gradients are missing in some steps, and one that never has any."""
    parameters = drawn(rng)
    frozen = torch.nn.Parameter(rng.normal(4), requires_grad=False)
    optimizer = answer([frozen, *parameters], **options(rng))
    missing = ((1,), (0, 2), (1,), (), (1, 3), (0, 1, 2, 3), ())
    return with_missing(
        optimizer, [frozen, *parameters], lambda missing: give(parameters, rng, missing=missing), missing
    )


@case(SGD)
def gradients_of_zero(answer, rng):
    """Zeros at first, when the decay alone fills b; then noise; then zeros again, while b dies away."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    seen = []
    for size in (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0):
        give(parameters, rng, size=size)
        optimizer.step()
        seen.append(values(parameters))
    return seen


@case(SGD)
def schedule(answer, rng):
    """A learning rate that a scheduler changes, from 0 up and down again; then all other options, thrice."""
    seen, other = {}, {"momentum": 0.4, "weight_decay": rng.choice((0.6, 0.9))}
    for name, first, then in (
        ("nesterov on", {}, {"nesterov": True}),
        ("nesterov off", {"nesterov": True}, {"nesterov": False}),
        ("momentum on", {"momentum": 0.0}, {}),
    ):
        parameters = drawn(rng)
        optimizer = answer(parameters, **{**options(rng), **first})
        seen[name] = scheduled(
            optimizer, parameters, lambda step, moved=parameters: give(moved, rng), {**other, **then}
        )
    return seen


@case(SGD)
def a_second_optimizer(answer, rng):
    """Two optimizers, one after the other, on the same parameters."""
    parameters, given = drawn(rng), options(rng)
    return one_after_another(
        answer, parameters, lambda missing: give(parameters, rng, missing=missing), (given, given)
    )


@case(SGD)
def shared_memory(answer, rng):
    """Parameters that are views of other tensors, transposed and cut; gradients that stay for three steps."""
    return {
        f"nesterov {nesterov}": in_shared_memory(answer, rng, **options(rng), nesterov=nesterov)
        for nesterov in (False, True)
    }


@case(SGD)
def broken_gradients(answer, rng):
    """NaN and Inf in a few places of the second step: what is finite afterwards, and its values."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    for step in range(4):
        give(parameters, rng)
        if step == 1:
            parameters[0].grad[1, 2] = torch.nan
            parameters[1].grad[0, 1, 2] = torch.inf
            parameters[2].grad[rng.integer(0, 6)] = -torch.inf
        optimizer.step()
    return [[p.isfinite(), p.detach()[p.isfinite()]] for p in parameters]


@case(SGD)
def before_the_pause(answer, rng):
    """Three steps, then everything is saved."""
    parameters = drawn(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.03}], **options(rng))
    for missing in ((2,), (0, 2), (2,)):
        give(parameters, rng, missing=missing)
        optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    return {"values": values(parameters), "saved": write(optimizer, parameters)}


@case(SGD, after=before_the_pause)
def resumed(answer, rng, saved):
    """Three more steps in a new process that has only what was saved."""
    parameters = drawn(rng)
    optimizer = answer(
        [{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.5, momentum=0.3, weight_decay=0.9
    )
    read(saved, optimizer, parameters)
    for missing in ((1,), (), ()):
        give(parameters, rng, missing=missing)
        optimizer.step()
    return values(parameters)


@case(SGD)
def refused(answer, rng):
    """Options out of range and gradients of other kinds; beside them, options that lie at the edge of it."""
    parameters = drawn(rng)
    give(parameters, rng)
    bad = rng.choice((-0.5, -1e-3))
    arguments = {
        **{f"{name} {value}": {name: value} for name in ("lr", "weight_decay") for value in (bad, torch.nan)},
        **{f"momentum {value}": {"momentum": value} for value in (bad, 1.0, 1.5, torch.nan)},
        "nesterov alone": {"nesterov": True},
    }
    two = answer([{"params": parameters[:2]}, {"params": parameters[2:]}])
    edge = answer(parameters, lr=rng.choice((0.1, 0.2)), momentum=0.0, weight_decay=0.0)
    edge.step()
    return {
        "edge": values(parameters),
        "lr 0": raised(answer, parameters, lr=0.0, momentum=0.9, nesterov=True),
        "no parameters": raised(answer, []),
        "other groups": raised(two.load_state_dict, edge.state_dict()),
        **{name: raised(answer, parameters, **given) for name, given in arguments.items()},
        **refused_gradients(answer, rng),
    }


def three_kinds(answer, parameters):
    """An optimizer with Nesterov's momentum, with none and with the common one, after two steps."""
    groups = [
        {"params": parameters[:1], "nesterov": True},
        {"params": parameters[1:2], "momentum": 0.0},
        {"params": parameters[2:]},
    ]
    optimizer = answer(groups, lr=0.01, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    optimizer.step()
    return optimizer


@cost(SGD, share=1 / 6)
def state_of_one_buffer(answer, rng):
    """Bytes of the state after two steps; without momentum, or without a gradient, a parameter needs none."""
    parameters = large(rng)
    optimizer = three_kinds(answer, parameters)
    at_most = parameters[0].nbytes + parameters[2].nbytes + 2 * 16
    return {
        "observed": values(parameters),
        "bytes of state": (state_bytes(optimizer.state_dict()["state"]), at_most),
    }


@cost(SGD, share=1 / 6)
def no_new_tensors(answer, rng):
    """What the third step allocates: nothing."""
    parameters = large(rng)
    optimizer = three_kinds(answer, parameters)
    with TensorWork() as work:
        optimizer.step()
    scalars = 64 * len(parameters)  # a step size may be a tensor
    return {"observed": values(parameters), "bytes of all tensors made": (work.allocated_bytes, scalars)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Written(torch.optim.Optimizer):
    """A right answer in small steps; a mistake replaces one of them."""

    def __init__(self, params, lr=1e-3, momentum=0.0, weight_decay=0.0, nesterov=False):
        self.look_at(lr, momentum, weight_decay, nesterov)
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        )

    def look_at(self, lr, momentum, weight_decay, nesterov):
        if not (lr >= 0 and weight_decay >= 0 and momentum >= 0):
            raise ValueError("negative")
        if momentum >= 1 or (nesterov and momentum == 0):
            raise ValueError("momentum")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.look_at_gradient(p.grad)
                    self.move(p, p.grad, group)

    def look_at_gradient(self, g):
        if g.is_sparse or g.is_complex() or g.element_size() < 4:
            raise ValueError("gradient")

    def move(self, p, g, group):
        """Where d is a tensor of its own, as in torch's loop."""
        p.sub_(group["lr"] * self.direction(p, self.decayed(p, g, group), group))

    def decayed(self, p, g, group):
        return g + group["weight_decay"] * p

    def direction(self, p, d, group):
        momentum = group["momentum"]
        if momentum == 0:
            return d
        state = self.kept(p, group)
        before = state.get("b")
        b = state["b"] = d.clone() if before is None else self.next(before, d, momentum)
        return self.ahead(d, b, before, momentum) if group["nesterov"] else b

    def kept(self, p, group):
        return self.state[p]

    def next(self, b, d, momentum):
        return momentum * b + d

    def ahead(self, d, b, before, momentum):
        return d + momentum * b


class InPlace(Written):
    """Written so that it makes no tensors, for mistakes that would else be dear as well."""

    def move(self, p, g, group):
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        if momentum == 0:
            p.mul_(1 - lr * decay).sub_(g, alpha=lr)
            return
        state = self.kept(p, group)
        if not state:
            state["b"] = torch.zeros_like(p)
        b = state["b"].mul_(momentum).add_(p, alpha=decay).add_(g)
        if group["nesterov"]:
            p.mul_(1 - lr * decay).sub_(g, alpha=lr).sub_(b, alpha=lr * momentum)
        else:
            p.sub_(b, alpha=lr)


@mistake(
    SGD,
    "lr goes into the buffer with the gradient: as long as lr stays the same nothing differs, but then a schedule "
    "reaches only what is new.",
    fails=("schedule", "resumed", "no_new_tensors"),
)
class RateInTheBuffer(Written):
    def move(self, p, g, group):
        p.sub_(self.direction(p, group["lr"] * self.decayed(p, g, group), group))


@mistake(
    SGD, "Averages with 1 - momentum, as Adam's m does, from a buffer of 0: the steps are ten times smaller."
)
class AverageFromZero(Written):
    def direction(self, p, d, group):
        if group["momentum"]:
            self.kept(p, group).setdefault("b", torch.zeros_like(d))
        return super().direction(p, d, group)

    def next(self, b, d, momentum):
        return momentum * b + (1 - momentum) * d


@mistake(SGD, "Takes the first gradient whole and damps the later ones by 1 - momentum.")
class DampedAfterTheFirst(Written):
    def next(self, b, d, momentum):
        return momentum * b + (1 - momentum) * d


@mistake(
    SGD, "Averages with 1 - momentum and corrects for the start at 0, as Adam does: SGD's buffer is a sum."
)
class AverageCorrected(Written):
    def direction(self, p, d, group):
        momentum = group["momentum"]
        if momentum == 0:
            return d
        state = self.state[p]
        state["b"] = momentum * state.get("b", 0) + (1 - momentum) * d
        state["t"] = state.get("t", 0) + 1
        b = state["b"] / (1 - momentum ** state["t"])
        return d + momentum * b if group["nesterov"] else b


@mistake(SGD, "The first gradient does not enter the buffer, so momentum begins a step late.")
class BufferFromTheSecondStep(Written):
    def direction(self, p, d, group):
        state = self.kept(p, group)
        if group["momentum"] and not state:
            state["b"] = torch.zeros_like(d)
            return (1 + group["momentum"]) * d if group["nesterov"] else d
        return super().direction(p, d, group)


@mistake(SGD, "Moves by the buffer of the step before and takes the new gradient in afterwards.")
class BufferAfterTheStep(Written):
    def direction(self, p, d, group):
        before = self.kept(p, group).get("b", torch.zeros_like(d))
        found = super().direction(p, d, group)
        if group["momentum"] == 0:
            return found
        return d + group["momentum"] * before if group["nesterov"] else before


@mistake(
    SGD,
    "Nesterov's look-ahead is applied to the parameter: after the step it moves by lr momentum b once more.",
)
class LookAheadOfTheParameter(Written):
    def ahead(self, d, b, before, momentum):
        return b + momentum * b


@mistake(SGD, "Nesterov's step uses the buffer from before the new gradient, which is plain momentum again.")
class LookAheadWithTheOldBuffer(Written):
    def ahead(self, d, b, before, momentum):
        return b


@mistake(SGD, "Nesterov's step adds the buffer without multiplying it by momentum.")
class LookAheadOfTheWholeBuffer(Written):
    def ahead(self, d, b, before, momentum):
        return d + b


@mistake(SGD, "The look-ahead is kept as the buffer, so it is looked ahead from again in the next step.")
class LookAheadKept(Written):
    def direction(self, p, d, group):
        found = super().direction(p, d, group)
        if group["momentum"] and group["nesterov"]:
            self.kept(p, group)["b"] = found.clone()
        return found


@mistake(SGD, "Nesterov's step leaves the decay out of the new gradient: d holds it in both places.")
class LookAheadWithoutDecay(Written):
    def move(self, p, g, group):
        self.pull = group["weight_decay"] * p
        super().move(p, g, group)

    def ahead(self, d, b, before, momentum):
        return d - self.pull + momentum * b


@mistake(
    SGD,
    "Adds the decay after the momentum (decoupled decay): here it belongs to the gradient and gathers momentum too.",
)
class DecayAfterMomentum(Written):
    def move(self, p, g, group):
        p.sub_(group["lr"] * (self.direction(p, g, group) + group["weight_decay"] * p))


@mistake(SGD, "Decays the buffer instead of the parameter.")
class DecayOfTheBuffer(Written):
    def decayed(self, p, g, group):
        return g + group["weight_decay"] * self.state[p].get("b", torch.zeros_like(g))


@mistake(SGD, "Multiplies the decay by lr before it is added to the gradient, so by lr twice in all.")
class DecayTimesRate(Written):
    def decayed(self, p, g, group):
        return g + group["lr"] * group["weight_decay"] * p


@mistake(
    SGD, "Differentiates weight_decay |p|^2 and gets a 2: the convention is half of that, weight_decay p."
)
class DecayTwice(Written):
    def decayed(self, p, g, group):
        return g + 2 * group["weight_decay"] * p


@mistake(SGD, "Puts the decay of a weight that was already shrunk in this step into the buffer.")
class DecayOfTheMovedWeight(Written):
    def move(self, p, g, group):
        p.mul_(1 - group["lr"] * group["weight_decay"])
        direction = self.direction(p, self.decayed(p, g, group), group)
        p.sub_(group["lr"] * (direction - group["weight_decay"] * p))


@mistake(SGD, "Tensors of one shape share their buffer.", fails=("defaults_and_float64", "no_new_tensors"))
class BufferByShape(Written):
    def kept(self, p, group):
        same = [
            q for g in self.param_groups for q in g["params"] if q.shape == p.shape and q.grad is not None
        ]
        return self.state[same[0]]


@mistake(
    SGD,
    "The buffer is the first gradient itself, not a copy: adding to it changes p.grad as well.",
    fails=("shared_memory", "state_of_one_buffer", "no_new_tensors"),
)
class BufferIsTheGradient(InPlace):
    def move(self, p, g, group):
        if group["momentum"] == 0 or self.state[p]:
            super().move(p, g, group)
            return
        self.state[p]["b"] = g.add_(p, alpha=group["weight_decay"])
        p.sub_(g, alpha=group["lr"] * (1 + group["momentum"] * group["nesterov"]))


@mistake(
    SGD,
    "Adds the decay to the gradient in place, so a gradient that is looked at or used again is another one.",
    fails=("shared_memory", "state_of_one_buffer", "no_new_tensors"),
)
class GradientDecayed(Written):
    def decayed(self, p, g, group):
        return g.add_(p, alpha=group["weight_decay"])


@mistake(
    SGD,
    "Clears the gradients after the step: that is what zero_grad() is for.",
    fails=("shared_memory", "state_of_one_buffer", "no_new_tensors"),
)
class GradientsCleared(Written):
    def step(self):
        super().step()
        self.zero_grad()


@mistake(SGD, "A parameter without a gradient still decays.")
class DecaysWithoutGradient(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        super().step()


@mistake(
    SGD, "A missing gradient counts as zeros: the parameter decays, and its old momentum keeps moving it."
)
class MissingIsZero(Written):
    def step(self):
        missing = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        super().step()
        for p in missing:
            p.grad = None


@mistake(SGD, "The first missing gradient ends the step (break), so the parameters after it do not move.")
class StopsAtTheFirstMissing(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    break
                self.look_at_gradient(p.grad)
                self.move(p, p.grad, group)


@mistake(SGD, "A missing gradient empties the buffer, so momentum begins again.")
class MissingForgets(Written):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    self.state.pop(p, None)
        super().step()


@mistake(
    SGD,
    "Keeps the buffers in a dict of its own, by id(p): state_dict() does not hold them, and a resume starts at zero.",
    fails=("resumed", "no_new_tensors"),
)
class ForgetsOnResume(Written):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.buffers = {}

    def kept(self, p, group):
        return self.buffers.setdefault(id(p), {})


@mistake(
    SGD,
    "Keeps the buffers in a dict of the class, by parameter: a new optimizer of the same parameters finds old ones.",
    fails=("a_second_optimizer",),
)
class BuffersOfTheClass(InPlace):
    earlier: dict[Any, Any] = {}

    def kept(self, p, group):
        if not self.state[p]:
            self.state[p] = self.earlier.setdefault(p, {})
        return self.state[p]


@mistake(
    SGD,
    "Decides in the first step whether the sum is Nesterov's; the group may say something else later.",
    fails=("schedule",),
)
class NesterovOfTheFirstStep(InPlace):
    def move(self, p, g, group):
        super().move(p, g, {**group, "nesterov": group.setdefault("first", group["nesterov"])})


@mistake(
    SGD,
    "Decides in the first step whether there is momentum: where it is set later, nothing gathers.",
    fails=("schedule",),
)
class MomentumOfTheFirstStep(InPlace):
    def move(self, p, g, group):
        heavy = group.setdefault("heavy", group["momentum"] != 0)
        super().move(p, g, group if heavy else {**group, "momentum": 0.0})


@mistake(
    SGD,
    "The learning rate is read once, in the constructor, so a scheduler changes nothing.",
    fails=("schedule", "no_new_tensors"),
)
class RateReadOnce(Written):
    def add_param_group(self, group):
        super().add_param_group(group)
        self.rates = [group["lr"] for group in self.param_groups]

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.rates = [group["lr"] for group in self.param_groups]

    def move(self, p, g, group):
        place = next(i for i, other in enumerate(self.param_groups) if other is group)
        super().move(p, g, {**group, "lr": self.rates[place]})


@mistake(SGD, "The options of the first group are used for all groups.")
class FirstGroupForAll(Written):
    def move(self, p, g, group):
        super().move(p, g, self.param_groups[0])


@mistake(SGD, "The constructor's options are used for all groups, whatever the groups say now.")
class ConstructorForAll(Written):
    def move(self, p, g, group):
        super().move(p, g, self.defaults)


@mistake(
    SGD,
    "An option of 0 is taken for one that was not given (`or`), so its group does as the others do.",
    fails=("groups_of_their_own", "state_of_one_buffer", "no_new_tensors"),
)
class ZeroTakenForNothing(Written):
    def move(self, p, g, group):
        filled = {name: group[name] or self.defaults[name] for name in ("momentum", "weight_decay")}
        super().move(p, g, {**group, **filled})


@mistake(
    SGD,
    "Gives p.data a new tensor: whatever shares the old memory, a tied weight or a view, stays behind.",
    fails=("shared_memory", "no_new_tensors"),
)
class NewTensors(Written):
    def move(self, p, g, group):
        p.data = p - group["lr"] * self.direction(p, self.decayed(p, g, group), group)


@mistake(
    SGD,
    "Works on p.reshape(-1), which is a copy where p is not contiguous: the step is lost.",
    fails=("shared_memory", "no_new_tensors"),
)
class Flattened(Written):
    def move(self, p, g, group):
        direction = self.direction(p, self.decayed(p, g, group), group)
        p.reshape(-1).sub_(group["lr"] * direction.reshape(-1))


@mistake(
    SGD,
    "Makes the buffers in the constructor: a group that is added later has none, and parameters that never get a "
    "gradient take memory.",
    fails=("groups_of_their_own", "state_of_one_buffer", "no_new_tensors"),
)
class BuffersInTheConstructor(Written):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"b": torch.zeros_like(p)}

    def move(self, p, g, group):
        if not self.state[p]:
            raise KeyError("b")
        super().move(p, g, group)


@mistake(SGD, "Derives from torch's own SGD, which is what you were asked to write.")
class LibrarysOwn(torch.optim.SGD):
    pass


@mistake(
    SGD,
    "Keeps the buffer in float32 whatever the parameter's dtype is.",
    fails=("defaults_and_float64", "no_new_tensors"),
)
class BufferInFloat32(Written):
    def next(self, b, d, momentum):
        return (momentum * b + d).float().to(d.dtype)


@mistake(
    SGD,
    "Takes bfloat16 and float16 parameters: steps below half of their last bit are lost without a word.",
    fails=("refused", "no_new_tensors"),
)
class NarrowTaken(Written):
    def look_at_gradient(self, g):
        if g.is_sparse or g.is_complex():
            raise ValueError("gradient")


@mistake(
    SGD,
    "Does not look at the gradients: sparse and complex ones go wrong somewhere inside, or silently.",
    fails=("refused", "no_new_tensors"),
)
class AnyGradientTaken(Written):
    def look_at_gradient(self, g):
        pass


@mistake(
    SGD,
    "Takes a momentum of 1 or more: the buffer never forgets, and the steps grow without end.",
    fails=("refused", "no_new_tensors"),
)
class AnyMomentumTaken(Written):
    def look_at(self, lr, momentum, weight_decay, nesterov):
        if not (lr >= 0 and weight_decay >= 0 and momentum >= 0) or (nesterov and momentum == 0):
            raise ValueError("range")


@mistake(
    SGD,
    "Lets nesterov=True without momentum pass: it is plain gradient descent then, and nobody is told.",
    fails=("refused", "no_new_tensors"),
)
class NesterovAloneTaken(Written):
    def look_at(self, lr, momentum, weight_decay, nesterov):
        super().look_at(lr, momentum, weight_decay, False)


@mistake(
    SGD,
    "Compares with `lr < 0`, which NaN is not: an option of NaN is taken, and every weight becomes NaN.",
    fails=("refused", "no_new_tensors"),
)
class NaNTaken(Written):
    def look_at(self, lr, momentum, weight_decay, nesterov):
        if lr < 0 or weight_decay < 0 or momentum < 0 or momentum >= 1 or (nesterov and momentum == 0):
            raise ValueError("range")


@mistake(
    SGD,
    "Refuses a learning rate of 0 too, with which every warm-up begins.",
    fails=("refused", "no_new_tensors"),
)
class ZeroRefused(Written):
    def look_at(self, lr, momentum, weight_decay, nesterov):
        super().look_at(lr, momentum, weight_decay, nesterov)
        if lr == 0:
            raise ValueError("zero")


@mistake(SGD, "Does not look at its options.", fails=("refused", "no_new_tensors"))
class OptionsNotLookedAt(Written):
    def look_at(self, lr, momentum, weight_decay, nesterov):
        pass


@mistake(
    SGD,
    "Replaces NaN and Inf by numbers: the run goes on, and nobody learns that a gradient broke.",
    fails=("broken_gradients", "no_new_tensors"),
)
class BrokenReplaced(Written):
    def move(self, p, g, group):
        super().move(p, g.nan_to_num(), group)


@mistake(
    SGD,
    "Leaves out tensors whose gradient holds NaN or Inf, without a word.",
    fails=("broken_gradients", "no_new_tensors"),
)
class BrokenLeftOut(Written):
    def move(self, p, g, group):
        if g.isfinite().all():
            super().move(p, g, group)


@mistake(
    SGD,
    "Keeps a buffer also where momentum is 0: four bytes a parameter that nothing needs.",
    fails=("state_of_one_buffer", "no_new_tensors"),
)
class BufferWithoutMomentum(InPlace):
    def move(self, p, g, group):
        super().move(p, g, group)
        self.state[p].setdefault("b", torch.zeros_like(p))


@mistake(
    SGD,
    "Makes a tensor for g + weight_decay p in every step, where both parts can be added to the buffer.",
    fails=("no_new_tensors",),
)
class NewTensorForTheGradient(Written):
    pass


@mistake(
    SGD,
    "Adds the decay to the buffer without a new tensor, and then makes one for Nesterov's sum of g and buffer.",
    fails=("no_new_tensors",),
)
class NewTensorForTheSum(InPlace):
    def move(self, p, g, group):
        if not group["nesterov"]:
            super().move(p, g, group)
            return
        before = p.clone()
        super().move(p, g, {**group, "nesterov": False})
        ahead = self.state[p]["b"] * group["momentum"]
        p.copy_(before).sub_(ahead.add_(g).add_(before, alpha=group["weight_decay"]), alpha=group["lr"])


@alternative(SGD, "Keeps the buffer with its sign turned, and adds it")
class TurnedAround(Written):
    def move(self, p, g, group):
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        if momentum and not self.state[p]:
            self.state[p]["velocity"] = torch.zeros_like(p)
        velocity = self.state[p]["velocity"] if momentum else None
        if velocity is not None:
            velocity.sub_(g, alpha=1 / momentum).sub_(p, alpha=decay / momentum).mul_(momentum)
        if velocity is None or group["nesterov"]:
            p.sub_(p, alpha=lr * decay).sub_(g, alpha=lr)
        if velocity is not None:
            p.add_(velocity, alpha=lr * momentum if group["nesterov"] else lr)


@alternative(SGD, "Calls torch's operations on lists of tensors, a group at a time")
class ListsOfTensors(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in moving]
            for p, g in zip(moving, gradients, strict=True):
                self.look_at_gradient(g)
                if group["momentum"] and not self.state[p]:
                    self.state[p]["b"] = torch.zeros_like(p)
            if moving:
                self.move_all(moving, gradients, group)

    def move_all(self, moving, gradients, group):
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        buffers = [self.state[p]["b"] for p in moving] if momentum else []
        if momentum:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, moving, alpha=decay)
            torch._foreach_add_(buffers, gradients)
        if not momentum or group["nesterov"]:
            torch._foreach_mul_(moving, 1 - lr * decay)
            torch._foreach_add_(moving, gradients, alpha=-lr)
        if momentum:
            torch._foreach_add_(moving, buffers, alpha=-lr * (momentum if group["nesterov"] else 1))


@alternative(SGD, "Calculates each step in float64 and rounds once at its end", meets_costs=False)
class InFloat64(Written):
    def move(self, p, g, group):
        d = g.double() + group["weight_decay"] * p.double()
        direction = d
        if group["momentum"]:
            b = group["momentum"] * self.state[p].get("b", torch.zeros_like(p)).double() + d
            self.state[p]["b"] = b.to(p.dtype)
            direction = d + group["momentum"] * b if group["nesterov"] else b
        p.copy_(p.double() - group["lr"] * direction)
