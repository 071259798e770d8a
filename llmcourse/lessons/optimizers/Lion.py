"""Lion: every weight moves by the same amount, and only the sign of an average says which way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised
from llmcourse.stepping import (
    drawn,
    in_groups,
    in_shared_memory,
    large,
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
    hints=(
        "Two averages of the gradient are in play, with two betas, but only one of them is kept. m.mul(b1) makes the "
        "one new tensor that the other needs: add_(g, alpha=...) and sign_() write over it.",
        "The sign is taken before m is updated, from the m of the step before. Nothing is corrected for its start at "
        "0: a sign does not need it.",
    ),
)
class Lion(torch.optim.Optimizer):
    """A step of the sign of an average, with decoupled decay; about 15 lines.

    params are parameters, or groups such as {"params": [...], "weight_decay": 0.0}, whose
    own options come before those of the constructor. A group may be empty, and
    add_param_group may add one later. Only parameters that have a gradient g move in
    step(), each p with the options its group has now (a scheduler may change them):

        p <- p (1 - lr weight_decay)
        p <- p - lr sign(b1 m + (1 - b1) g)      betas = (b1, b2); sign(0) = 0
        m <- b2 m + (1 - b2) g                   m belongs to p and starts at 0

    m has p's dtype. p is written in place: other tensors may share its memory, and it need
    not be contiguous. g stays what it is. With g None, nothing of p changes: no decay, and
    m stays. NaN in g is let through into m, and the sign of NaN is 0, as torch.sign has
    it: such an element only decays from then on, and the others do not notice.

    Whatever a resume needs is in state_dict(), as tensors and numbers: a new process that
    loads it goes on as if nothing had happened. Any other new optimizer starts at 0.

    ValueError from the constructor: lr or weight_decay negative or NaN, a beta outside
    [0, 1). ValueError from step(): a gradient that is sparse, or neither float32 nor
    float64 (bfloat16 weights need a float32 copy); parameters before it may have moved. An
    empty list of parameters and a state_dict of other groups are refused by
    torch.optim.Optimizer already; options inside a group are not checked.

    For a third of the points: state_dict()["state"] takes 4 bytes for each float32 value
    that ever had a gradient, and at most 16 bytes more a parameter. After the first, a
    step makes no tensor larger than the largest parameter, and in all at most the bytes of
    the parameters.

    Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        ### BEGIN SOLUTION
        b1, b2 = betas
        if not (lr >= 0 and weight_decay >= 0 and 0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError(
                f"lr={lr}, weight_decay={weight_decay}, betas={betas}; expected at least 0, betas below 1"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        ### END SOLUTION

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient; takes no closure."""
        ### BEGIN SOLUTION
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if g.layout != torch.strided or g.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"a gradient is {g.layout}, {g.dtype}; expected dense float32 or float64"
                    )
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                m = state["m"]
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(m.mul(b1).add_(g, alpha=1 - b1).sign_(), alpha=-lr)
                m.mul_(b2).add_(g, alpha=1 - b2)
        ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases

SIZES = (1e-35, 1e-3, 1.0, 1e3)


class Gradients:
    """Gradients whose interpolation with m stays away from 0, so that its sign is one and the same in any order."""

    def __init__(self, parameters, rng, betas, sizes=SIZES):
        self.parameters, self.rng, self.betas = parameters, rng, betas
        self.sizes = sizes
        self.averages = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]

    def give(self, *, missing=(), size=1.0):
        """New gradients for all parameters; None for those in `missing`."""
        for index, parameter in enumerate(self.parameters):
            gradient = self.apart(index, self.sizes[index] * size).to(parameter.dtype)
            parameter.grad = None if index in missing else gradient
            if index not in missing:
                b2 = self.betas[1]
                self.averages[index] = b2 * self.averages[index] + (1 - b2) * gradient.double()

    def apart(self, index, size):
        b1, average = self.betas[0], self.averages[index]
        gradient = self.rng.normal(*average.shape, dtype=torch.float64) * size
        mixed = b1 * average + (1 - b1) * gradient
        margin = 1e-2 * (1 - b1) * max(size, float(average.abs().max()))
        further = torch.copysign(torch.full_like(mixed, 2 * margin / (1 - b1)), mixed)
        return torch.where(mixed.abs() < margin, gradient + further, gradient)


def options(rng):
    return {
        "lr": rng.choice((0.02, 0.05)),
        "betas": rng.choice(((0.9, 0.95), (0.8, 0.97))),
        "weight_decay": rng.choice((0.2, 0.4)),
    }


@case(Lion)
def several_tensors(answer, rng):
    """Four tensors with gradients from 1e-35 to 1e3, 24 steps."""
    parameters, given = drawn(rng), options(rng)
    optimizer, gradients = answer(parameters, **given), Gradients(parameters, rng, given["betas"])
    seen = []
    for step in range(24):
        gradients.give()
        optimizer.step()
        if step in (0, 1, 7, 15, 23):
            seen.append(values(parameters))
    return seen


@case(Lion)
def defaults_in_float64(answer, rng):
    """Three tensors of one shape in float64, 20 steps with the options of the signature."""
    parameters = [torch.nn.Parameter(rng.normal(4, 6, dtype=torch.float64)) for _ in range(3)]
    optimizer, gradients = answer(parameters), Gradients(parameters, rng, (0.9, 0.99), (1e-8, 1.0, 1e-2))
    for _ in range(20):
        gradients.give()
        optimizer.step()
    return values(parameters)


@case(Lion)
def a_fine_line_in_float64(answer, rng):
    """Sums that float64 can tell from 0 and float32 cannot."""
    sign = rng.integers(0, 1, 4, 5).double() * 2 - 1
    parameter = torch.nn.Parameter(rng.normal(4, 5, dtype=torch.float64))
    optimizer = answer([parameter], lr=rng.choice((0.1, 0.2)), betas=(0.5, 0.75))
    # m is a quarter of the first gradient, so minus that gives a sum of 0; here it is 2^-30 beside it.
    for gradient in (torch.full_like(sign, 4.0), sign * 2.0**-30 - 1.0):
        parameter.grad = gradient
        optimizer.step()
    return values([parameter])


@case(Lion)
def groups_of_their_own(answer, rng):
    """Groups with options of their own: one without decay, one that is empty, one that comes later."""
    parameters = drawn(rng)
    gradients = [
        Gradients(parameters[:1], rng, (0.9, 0.99)),
        Gradients(parameters[1:3], rng, (0.5, 0.8)),
        Gradients(parameters[3:], rng, (0.7, 0.9)),
    ]

    def give(joined):
        for some in gradients if joined else gradients[:2]:
            some.give()

    return in_groups(
        answer,
        parameters,
        give,
        first=[
            {"params": parameters[:1], "weight_decay": 0.0},
            {"params": []},
            {"params": parameters[1:3], "lr": 0.1, "betas": (0.5, 0.8), "weight_decay": 0.5},
        ],
        later={"params": parameters[3:], "betas": (0.7, 0.9)},
        steps=12,
        lr=rng.choice((0.02, 0.04)),
        weight_decay=rng.choice((0.1, 0.3)),
    )


@case(Lion)
def missing_gradients(answer, rng):
    """Parameters whose gradients are missing in some steps, and one that never has any."""
    parameters, given = drawn(rng), options(rng)
    frozen = torch.nn.Parameter(rng.normal(4), requires_grad=False)
    optimizer = answer([frozen, *parameters], **given)
    gradients = Gradients(parameters, rng, given["betas"])
    missing = ((1,), (0, 2), (1,), (), (1, 3), (0, 1, 2, 3), (), (2,), (), ())
    return with_missing(optimizer, [frozen, *parameters], gradients.give, missing)


@case(Lion)
def gradients_of_zero(answer, rng):
    """Zeros at first, when only the decay moves anything; then noise; then zeros, while the sign of m goes on."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    seen = []
    for size in (0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0):
        for parameter, loudness in zip(parameters, SIZES, strict=True):
            # Each element keeps to one sign, or to 0, so that no sum comes near 0 unless it is 0.
            kept = parameter.detach().flatten()
            towards = kept.sign().masked_fill(torch.arange(len(kept)) % 3 == 1, 0.0).reshape(parameter.shape)
            parameter.grad = towards * rng.uniform(1, 2) * size * loudness
        optimizer.step()
        seen.append(values(parameters))
    return seen


@case(Lion)
def sums_of_zero(answer, rng):
    """A gradient that cancels m to the last bit: the sign is 0, and the sign after it is that of m."""
    parameter = torch.nn.Parameter(rng.normal(3, 4))
    optimizer = answer([parameter], lr=rng.choice((0.1, 0.2)), betas=(0.5, 0.75), weight_decay=0.5)
    sign = rng.integers(0, 1, 3, 4).float() * 2 - 1
    seen = []
    # m is 1 after the first, so 0.5 m - 0.5 is 0, and m is 0.5 then.
    for size in (4.0, -1.0, 0.0):
        parameter.grad = sign * size
        optimizer.step()
        seen.append(values([parameter]))
    return seen


@case(Lion)
def schedule(answer, rng):
    """A learning rate that a scheduler changes, from 0 up and down again; then other betas and another decay."""
    parameters, given = drawn(rng), options(rng)
    optimizer, gradients = answer(parameters, **given), Gradients(parameters, rng, given["betas"])
    change = {"betas": rng.choice(((0.5, 0.3), (0.4, 0.2))), "weight_decay": rng.choice((0.6, 0.9))}

    def give(step):
        if step == 5:
            gradients.betas = change["betas"]
        gradients.give(size={0: 100.0, 5: 10.0, 6: 3.0}.get(step, 1.0))

    return scheduled(optimizer, parameters, give, change)


@case(Lion)
def a_second_optimizer(answer, rng):
    """Two optimizers, one after the other, on the same parameters; the gradients of the first are louder."""
    parameters, given, seen = drawn(rng), options(rng), []
    for size in (100.0, 1.0):
        optimizer, gradients = answer(parameters, **given), Gradients(parameters, rng, given["betas"])
        for _ in range(2):
            gradients.give(size=size)
            optimizer.step()
            seen.append(values(parameters))
    return seen


@case(Lion)
def shared_memory(answer, rng):
    """Parameters that are views of other tensors, transposed and cut; gradients that stay for three steps."""
    return in_shared_memory(answer, rng, **options(rng))


@case(Lion)
def broken_gradients(answer, rng):
    """NaN in a few places of the second step."""
    parameters, given = drawn(rng), options(rng)
    optimizer, gradients = answer(parameters, **given), Gradients(parameters, rng, given["betas"])
    for step in range(5):
        gradients.give()
        if step == 1:
            parameters[0].grad[1, 2] = torch.nan
            parameters[1].grad[0, 1, 2] = torch.nan
            parameters[2].grad[rng.integer(0, 6)] = torch.nan
        optimizer.step()
    return values(parameters)


@case(Lion)
def before_the_pause(answer, rng):
    """Three steps, then everything is saved."""
    parameters, given = drawn(rng), options(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.03}], **given)
    gradients = Gradients(parameters, rng, given["betas"])
    for missing in ((2,), (0, 2), (2,)):
        gradients.give(missing=missing, size=100.0)
        optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    saved = write(optimizer, parameters, betas=given["betas"], averages=gradients.averages)
    return {"values": values(parameters), "saved": saved}


@case(Lion, after=before_the_pause)
def resumed(answer, rng, saved):
    """Six more steps in a new process that has only what was saved."""
    parameters = drawn(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.5, weight_decay=0.9)
    loaded = read(saved, optimizer, parameters)
    gradients = Gradients(parameters, rng, loaded["betas"])
    gradients.averages = loaded["averages"]
    seen = []
    # Loud at first: beside a much louder m every gradient would be too small for the betas to decide a sign.
    for missing, size in (((1,), 60.0), ((), 30.0), ((), 10.0), ((0,), 3.0), ((), 1.0), ((), 1.0)):
        gradients.give(missing=missing, size=size)
        optimizer.step()
        seen.append(values(parameters))
    return seen


@case(Lion)
def refused(answer, rng):
    """Options out of range and gradients of other kinds; beside them, options that lie at the edge of it."""
    parameters = drawn(rng)
    Gradients(parameters, rng, (0.0, 0.0)).give()
    bad = rng.choice((-0.5, -1e-3))
    arguments = {
        **{f"{name} {value}": {name: value} for name in ("lr", "weight_decay") for value in (bad, torch.nan)},
        **{f"b1 {value}": {"betas": (value, 0.9)} for value in (bad, 1.0, 1.5, torch.nan)},
        **{f"b2 {value}": {"betas": (0.9, value)} for value in (bad, 1.0, 1.5, torch.nan)},
    }
    two = answer([{"params": parameters[:2]}, {"params": parameters[2:]}])
    edge = answer(parameters, lr=rng.choice((0.1, 0.2)), betas=(0.0, 0.0), weight_decay=0.0)
    edge.step()
    return {
        "edge": values(parameters),
        "lr 0": raised(answer, parameters, lr=0.0),
        "no parameters": raised(answer, []),
        "other groups": raised(two.load_state_dict, edge.state_dict()),
        **{name: raised(answer, parameters, **given) for name, given in arguments.items()},
        **refused_gradients(answer, rng),
    }


@cost(Lion, share=1 / 6)
def state_of_one_average(answer, rng):
    """Bytes of the state after two steps; a parameter that never had a gradient needs none."""
    parameters = large(rng)
    optimizer = answer(parameters, lr=0.01)
    optimizer.step()
    optimizer.step()
    at_most = sum(parameter.nbytes + 16 for parameter in parameters[:3])
    return {
        "observed": values(parameters),
        "bytes of state": (state_bytes(optimizer.state_dict()["state"]), at_most),
    }


@cost(Lion, share=1 / 6)
def one_temporary(answer, rng):
    """What the third step allocates: at most a tensor for each parameter, a parameter at a time."""
    parameters = large(rng)
    optimizer = answer(parameters, lr=0.01)
    optimizer.step()
    optimizer.step()
    with TensorWork() as work:
        optimizer.step()
    scalars = 64 * len(parameters)  # a step size may be a tensor
    moved = [parameter.nbytes for parameter in parameters[:3]]
    return {
        "observed": values(parameters),
        "bytes of the largest tensor made": (work.largest_tensor_bytes, max(moved)),
        "bytes of all tensors made": (work.allocated_bytes, sum(moved) + scalars),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Written(torch.optim.Optimizer):
    """A right answer in small steps; a mistake replaces one of them."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        self.look_at(lr, betas, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def look_at(self, lr, betas, weight_decay):
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError("negative")
        self.look_at_betas(*betas)

    def look_at_betas(self, b1, b2):
        if not (0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError("betas")

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
        state, (b1, b2) = self.kept(p, group), group["betas"]
        if not state:
            state.update(m=torch.zeros_like(p))
        self.decay(p, group)
        p.sub_(self.direction(state, g, b1, b2), alpha=group["lr"])

    def kept(self, p, group):
        return self.state[p]

    def decay(self, p, group):
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def direction(self, state, g, b1, b2):
        found = self.signed(self.mixed(state["m"], g, b1))
        self.average(state["m"], g, b2)
        return found

    def mixed(self, m, g, b1):
        return m.mul(b1).add_(g, alpha=1 - b1)

    def signed(self, c):
        return c.sign_()

    def average(self, m, g, b2):
        m.mul_(b2).add_(g, alpha=1 - b2)


@mistake(
    Lion,
    "Updates m with b2 first and moves by the sign of m: b1, and the weight it gives to the new gradient, is lost.",
)
class SignOfTheAverage(Written):
    def direction(self, state, g, b1, b2):
        self.average(state["m"], g, b2)
        return state["m"].sign()


@mistake(Lion, "Updates m with b2 first and mixes with b1 afterwards, so the new gradient is counted twice.")
class AveragedBeforeMixing(Written):
    def direction(self, state, g, b1, b2):
        self.average(state["m"], g, b2)
        return self.signed(self.mixed(state["m"], g, b1))


@mistake(Lion, "b1 and b2 are exchanged: the sign is taken of the slow average, and the quick one is kept.")
class BetasSwapped(Written):
    def move(self, p, g, group):
        super().move(p, g, {**group, "betas": group["betas"][::-1]})


@mistake(Lion, "Keeps the mixture of b1 as the new m: one beta does both, and b2 does nothing.")
class MixtureKept(Written):
    def average(self, m, g, b2):
        m.copy_(self.kept_mixture)

    def mixed(self, m, g, b1):
        self.kept_mixture = super().mixed(m, g, b1)
        return self.kept_mixture.clone()


@mistake(Lion, "Moves by the sign of the gradient alone: one noisy batch decides, and m does nothing.")
class SignOfTheGradient(Written):
    def mixed(self, m, g, b1):
        return g.clone()


@mistake(Lion, "Moves by the sign of the old m alone: the new gradient comes a step late.")
class SignOfTheOldAverage(Written):
    def mixed(self, m, g, b1):
        return m.clone()


@mistake(Lion, "Moves by the average itself: without the sign it is momentum, and loud weights run away.")
class WithoutTheSign(Written):
    def signed(self, c):
        return c


@mistake(
    Lion, "Divides by |c| + 1e-8 in place of a sign: gradients as small as that no longer move by a whole lr."
)
class DividedByTheMagnitude(Written):
    def signed(self, c):
        return c / (c.abs() + 1e-8)


@mistake(
    Lion,
    "Multiplies by 1e30 and clamps to -1..1 in place of a sign: values below 1e-30 move by less than lr.",
)
class ScaledAndClamped(Written):
    def signed(self, c):
        return c.mul_(1e30).clamp_(-1, 1).nan_to_num_(0.0)


@mistake(
    Lion,
    "Takes the sign of 0 for 1: weights without any gradient drift away.",
    fails=("gradients_of_zero", "sums_of_zero", "one_temporary"),
)
class SignOfZeroIsOne(Written):
    def signed(self, c):
        return torch.where(c >= 0, 1.0, -1.0).to(c.dtype).masked_fill_(c.isnan(), 0.0)


@mistake(
    Lion,
    "Takes the sign of 0 for -1, as `c > 0` has it.",
    fails=("gradients_of_zero", "sums_of_zero", "one_temporary"),
)
class SignOfZeroIsMinusOne(Written):
    def signed(self, c):
        return torch.where(c > 0, 1.0, -1.0).to(c.dtype).masked_fill_(c.isnan(), 0.0)


@mistake(Lion, "Corrects m for its start at 0, as Adam does: that changes what m weighs beside g.")
class Corrected(Written):
    def direction(self, state, g, b1, b2):
        state["t"] = state.get("t", 0) + 1
        before = 1 - b2 ** (state["t"] - 1)
        found = self.signed(self.mixed(state["m"] / (before or 1.0), g, b1))
        self.average(state["m"], g, b2)
        return found


@mistake(Lion, "Adds the whole gradient to m, as SGD's momentum does: m then outweighs every new gradient.")
class SumOfGradients(Written):
    def average(self, m, g, b2):
        m.mul_(b2).add_(g)


@mistake(Lion, "Adds the whole gradient to the mixture: b1 m + g, where g should weigh 1 - b1.")
class WholeGradientInTheMixture(Written):
    def mixed(self, m, g, b1):
        return m.mul(b1).add_(g)


@mistake(Lion, "Averages the signs of the gradients: a loud gradient then counts no more than a quiet one.")
class AverageOfSigns(Written):
    def average(self, m, g, b2):
        super().average(m, g.sign(), b2)


@mistake(Lion, "Averages the signs of the steps, not the gradients.")
class AverageOfSteps(Written):
    def direction(self, state, g, b1, b2):
        found = self.signed(self.mixed(state["m"], g, b1))
        self.average(state["m"], found, b2)
        return found


@mistake(Lion, "Adds the decay to the gradient (L2): the sign takes its size away, and m remembers it.")
class L2InTheGradient(Written):
    def move(self, p, g, group):
        super().move(p, g + group["weight_decay"] * p, {**group, "weight_decay": 0.0})


@mistake(Lion, "Adds the decay inside the sign: it then turns steps around, or does nothing at all.")
class DecayInsideTheSign(Written):
    def move(self, p, g, group):
        self.pull = group["weight_decay"] * p
        super().move(p, g, {**group, "weight_decay": 0.0})

    def signed(self, c):
        return (c + self.pull).sign()


@mistake(Lion, "The decay is not multiplied by the learning rate.")
class DecayWithoutTheRate(Written):
    def decay(self, p, group):
        p.mul_(1 - group["weight_decay"])


@mistake(Lion, "Decays after the update, from the new value, so the step itself is decayed too.")
class DecayAfterTheUpdate(Written):
    def move(self, p, g, group):
        super().move(p, g, {**group, "weight_decay": 0.0})
        self.decay(p, group)


@mistake(
    Lion,
    "The constructor's decay is used for all groups, also for norms and biases whose group says 0.",
    fails=("groups_of_their_own", "schedule", "resumed"),
)
class DecayOfTheConstructor(Written):
    def decay(self, p, group):
        p.mul_(1 - group["lr"] * self.defaults["weight_decay"])


@mistake(
    Lion,
    "A decay of 0 is taken for one that was not given (`or`), so its group decays like the others.",
    fails=("groups_of_their_own",),
)
class ZeroTakenForNothing(Written):
    def decay(self, p, group):
        p.mul_(1 - group["lr"] * (group["weight_decay"] or self.defaults["weight_decay"]))


@mistake(
    Lion,
    "A parameter without a gradient still decays.",
    fails=("missing_gradients", "before_the_pause", "resumed"),
)
class DecaysWithoutGradient(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    self.decay(p, group)
        super().step()


@mistake(
    Lion,
    "A missing gradient counts as zeros: the parameter decays, and moves by a whole lr with the sign of m.",
)
class MissingIsZero(Written):
    def step(self):
        missing = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        super().step()
        for p in missing:
            p.grad = None


@mistake(
    Lion,
    "The first missing gradient ends the step (break), so the parameters after it do not move.",
    fails=("missing_gradients", "before_the_pause", "resumed"),
)
class StopsAtTheFirstMissing(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    break
                self.look_at_gradient(p.grad)
                self.move(p, p.grad, group)


@mistake(Lion, "Tensors of one shape share their average.", fails=("defaults_in_float64",))
class AverageByShape(Written):
    def kept(self, p, group):
        same = [
            q for g in self.param_groups for q in g["params"] if q.shape == p.shape and q.grad is not None
        ]
        return self.state[same[0]]


@mistake(
    Lion,
    "Keeps the averages in a dict of its own, by id(p): state_dict() does not hold them, and a resume starts at zero.",
    fails=("resumed",),
)
class ForgetsOnResume(Written):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.averages = {}

    def kept(self, p, group):
        return self.averages.setdefault(id(p), {})


@mistake(
    Lion,
    "Keeps the averages in a dict of the class, by parameter: a new optimizer of the same parameters finds old ones.",
    fails=("a_second_optimizer",),
)
class AveragesOfTheClass(Written):
    earlier: dict[Any, Any] = {}

    def kept(self, p, group):
        if not self.state[p]:
            self.state[p] = self.earlier.setdefault(p, {})
        return self.state[p]


@mistake(
    Lion,
    "Keeps the betas as they are in the first step; the group may have others later.",
    fails=("schedule",),
)
class BetasOfTheFirstStep(Written):
    def move(self, p, g, group):
        super().move(p, g, {**group, "betas": group.setdefault("first", group["betas"])})


@mistake(
    Lion,
    "The learning rate is read once, in the constructor, so a scheduler changes nothing.",
    fails=("schedule",),
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


@mistake(
    Lion,
    "The options of the first group are used for all groups.",
    fails=("groups_of_their_own", "before_the_pause", "resumed"),
)
class FirstGroupForAll(Written):
    def move(self, p, g, group):
        super().move(p, g, self.param_groups[0])


@mistake(Lion, "The constructor's options are used for all groups, whatever the groups say now.")
class ConstructorForAll(Written):
    def move(self, p, g, group):
        super().move(p, g, self.defaults)


@mistake(
    Lion,
    "Gives p.data a new tensor: whatever shares the old memory, a tied weight or a view, stays behind.",
    fails=("shared_memory", "one_temporary"),
)
class NewTensors(Written):
    def move(self, p, g, group):
        moved, state = p.detach().clone(), self.state[p]
        self.state[moved] = state
        super().move(moved, g, group)
        del self.state[moved]
        p.data = moved


@mistake(
    Lion,
    "Works on p.reshape(-1), which is a copy where p is not contiguous: the step is lost.",
    fails=("shared_memory",),
)
class Flattened(Written):
    def move(self, p, g, group):
        flat, state = p.reshape(-1), self.state[p]
        self.state[flat] = state
        super().move(flat, g.reshape(-1), group)
        del self.state[flat]


@mistake(
    Lion,
    "Scales the gradient in place, so a gradient that is looked at or used again is another one.",
    fails=("shared_memory",),
)
class GradientScaled(Written):
    def average(self, m, g, b2):
        m.mul_(b2).add_(g.mul_(1 - b2))


@mistake(
    Lion,
    "Clears the gradients after the step: that is what zero_grad() is for.",
    fails=("shared_memory", "state_of_one_average", "one_temporary"),
)
class GradientsCleared(Written):
    def step(self):
        super().step()
        self.zero_grad()


@mistake(
    Lion,
    "Makes the averages in the constructor: a group that is added later has none, and parameters that never get a "
    "gradient take memory.",
    fails=("groups_of_their_own", "state_of_one_average"),
)
class AveragesInTheConstructor(Written):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"m": torch.zeros_like(p)}

    def move(self, p, g, group):
        if not self.state[p]:
            raise KeyError("m")
        super().move(p, g, group)


@mistake(
    Lion, "Keeps the average in float32 whatever the parameter's dtype is.", fails=("a_fine_line_in_float64",)
)
class AverageInFloat32(Written):
    def mixed(self, m, g, b1):
        return super().mixed(m.float(), g.float(), b1).to(g.dtype)


@mistake(
    Lion,
    "Takes bfloat16 and float16 parameters: steps below half of their last bit are lost without a word.",
    fails=("refused",),
)
class NarrowTaken(Written):
    def look_at_gradient(self, g):
        if g.is_sparse or g.is_complex():
            raise ValueError("gradient")


@mistake(
    Lion,
    "Does not look at the gradients: sparse and complex ones go wrong somewhere inside, or silently.",
    fails=("refused",),
)
class AnyGradientTaken(Written):
    def look_at_gradient(self, g):
        pass


@mistake(
    Lion,
    "Lets a beta be 1: with b1 = 1 no gradient is seen, with b2 = 1 the average stays 0.",
    fails=("refused",),
)
class BetaOfOneTaken(Written):
    def look_at_betas(self, b1, b2):
        if not (0 <= b1 <= 1 and 0 <= b2 <= 1):
            raise ValueError("betas")


@mistake(
    Lion,
    "Compares with `lr < 0`, which NaN is not: an option of NaN is taken, and every weight becomes NaN.",
    fails=("refused",),
)
class NaNTaken(Written):
    def look_at(self, lr, betas, weight_decay):
        if lr < 0 or weight_decay < 0 or any(b < 0 or b >= 1 for b in betas):
            raise ValueError("range")


@mistake(Lion, "Refuses a learning rate of 0 too, with which every warm-up begins.", fails=("refused",))
class ZeroRefused(Written):
    def look_at(self, lr, betas, weight_decay):
        super().look_at(lr, betas, weight_decay)
        if lr == 0:
            raise ValueError("zero")


@mistake(Lion, "Does not look at its options.", fails=("refused",))
class OptionsNotLookedAt(Written):
    def look_at(self, lr, betas, weight_decay):
        pass


@mistake(
    Lion,
    "Replaces NaN by 0 before it reaches m: the run goes on, and nobody learns that a gradient broke.",
    fails=("broken_gradients", "one_temporary"),
)
class BrokenReplaced(Written):
    def move(self, p, g, group):
        super().move(p, g.nan_to_num(), group)


@mistake(
    Lion,
    "Leaves out tensors whose gradient holds NaN or Inf, without a word.",
    fails=("broken_gradients", "one_temporary"),
)
class BrokenLeftOut(Written):
    def move(self, p, g, group):
        if g.isfinite().all():
            super().move(p, g, group)


@mistake(
    Lion,
    "Keeps a second tensor a parameter, for the mixture or a second moment: Lion's point is to need one.",
    fails=("state_of_one_average",),
)
class TwoTensorsKept(Written):
    def mixed(self, m, g, b1):
        return torch.mul(m, b1, out=self.scratch).add_(g, alpha=1 - b1)

    def move(self, p, g, group):
        self.scratch = (
            self.state[p].setdefault("c", torch.empty_like(p)) if self.state[p] else torch.empty_like(p)
        )
        super().move(p, g, group)


@mistake(
    Lion,
    "Makes a new tensor for each operation: the mix can be made once, and sign_() written over it; m changes in place.",
    fails=("one_temporary",),
)
class NewTensorForEachOperation(Written):
    def move(self, p, g, group):
        state, (b1, b2) = self.state[p], group["betas"]
        m = state.get("m", torch.zeros_like(p))
        update = torch.sign(b1 * m + (1 - b1) * g) + group["weight_decay"] * p
        state["m"] = b2 * m + (1 - b2) * g
        p.copy_(p - group["lr"] * update)


@alternative(
    Lion, "Updates m in steps around the sign, so that no second tensor is needed but the sign itself"
)
class MovesTheAverageTwice(Written):
    def direction(self, state, g, b1, b2):
        m = state["m"]
        mixed = m.lerp(g, 1 - b1)
        m.add_(m, alpha=b2 - 1).add_(g, alpha=1 - b2)
        return mixed.sign_()


@alternative(Lion, "Calls torch's operations on lists of tensors, a group at a time")
class ListsOfTensors(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in moving]
            for p, g in zip(moving, gradients, strict=True):
                self.look_at_gradient(g)
                if not self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
            if moving:
                self.move_all(moving, gradients, [self.state[p]["m"] for p in moving], group)

    def move_all(self, moving, gradients, averages, group):
        b1, b2 = group["betas"]
        mixed = torch._foreach_mul(averages, b1)
        torch._foreach_add_(mixed, gradients, alpha=1 - b1)
        torch._foreach_sign_(mixed)
        torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(moving, mixed, alpha=-group["lr"])
        torch._foreach_lerp_(averages, gradients, 1 - b2)


@alternative(
    Lion,
    "Compares with 0 from both sides, in float64, and decays by the value from before",
    meets_costs=False,
)
class ComparedInFloat64(Written):
    def move(self, p, g, group):
        b1, b2 = group["betas"]
        m = self.state[p].get("m", torch.zeros_like(p)).double()
        mixed = b1 * m + (1 - b1) * g.double()
        self.state[p]["m"] = (m + (1 - b2) * (g.double() - m)).to(p.dtype)
        update = (mixed > 0).double() - (mixed < 0).double() + group["weight_decay"] * p.double()
        p.copy_(p.double() - group["lr"] * update)
