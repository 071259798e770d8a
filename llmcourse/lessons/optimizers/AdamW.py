"""AdamW: a step from averages of the gradient and of its square, and a decay that goes around both."""

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
    points=4,
    minutes=12,
    forbid=(
        "torch.optim.AdamW",
        "torch.optim.Adam",
        "torch.optim.adamw.AdamW",
        "torch.optim.adamw.adamw",
        "torch.optim.adam.Adam",
        "torch.optim.adam.adam",
        "torch.optim.adam._single_tensor_adam",
        "torch.optim.adam._multi_tensor_adam",
        "torch.optim.adam._fused_adam",
        "torch._fused_adamw_",
        "torch._fused_adam_",
        *(
            f"torch.ops.aten.{name}"
            for name in ("_fused_adamw_", "_fused_adamw", "_fused_adam_", "_fused_adam")
        ),
    ),
    hints=(
        "Loop over self.param_groups, then over a group's params. self.state[p] is an empty dict at first, and "
        "state_dict() saves what you put there. In-place methods (lerp_, addcmul_, addcdiv_) make no new tensors.",
        "t belongs to a parameter, not to the optimizer. Read lr and the rest from the group in every step. eps is "
        "added to the root of the corrected v, and the decay uses the p from before the step.",
    ),
)
class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, over parameter groups; about 20 lines.

    params are parameters, or groups such as {"params": [...], "weight_decay": 0.0}, whose
    own options come before those of the constructor. A group may be empty, and
    add_param_group may add one later. Only parameters that have a gradient g move in
    step(), each p with the options its group has now (a scheduler may change them):

        t <- t + 1                        t, m, v belong to p and start at 0
        p <- p (1 - lr weight_decay)
        m <- b1 m + (1 - b1) g            betas = (b1, b2)
        v <- b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    m and v have p's dtype; b1^t and b2^t are Python floats, from the betas of now. p is
    written in place: other tensors may share its memory, and it need not be contiguous. g
    stays what it is. With g None, nothing of p changes: no decay, and t, m, v stay. NaN
    and Inf in g are let through: they make their own elements NaN, and no others.

    Whatever a resume needs is in state_dict(), as tensors and numbers: a new process that
    loads it goes on as if nothing had happened. Any other new optimizer starts at 0.

    ValueError from the constructor: lr, eps or weight_decay negative or NaN, a beta
    outside [0, 1). ValueError from step(): a gradient that is sparse, or neither float32
    nor float64 (bfloat16 weights need a float32 copy: most steps are smaller than their
    last bit); parameters before it may have moved. An empty list of parameters and a
    state_dict of other groups are refused by torch.optim.Optimizer already; options inside
    a group are not checked.

    For a third of the points: state_dict()["state"] takes 8 bytes for each float32 value
    that ever had a gradient, and at most 16 bytes more a parameter. After the first, a
    step makes no tensor larger than the largest parameter, and in all at most twice the
    bytes of the parameters.

    Loshchilov and Hutter 2019 (arXiv 1711.05101), with lr times the decay, as in torch.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        ### BEGIN SOLUTION
        b1, b2 = betas
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and 0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError(
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}; expected at least 0, betas below 1"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
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
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                t, m, v = state["t"], state["m"], state["v"]
                p.mul_(1 - lr * group["weight_decay"])
                m.lerp_(g, 1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                # Multiplied above and below by this, the quotient needs no pass over m or v for their corrections.
                root = (1 - b2**t) ** 0.5
                p.addcdiv_(m, v.sqrt().add_(group["eps"] * root), value=-lr * root / (1 - b1**t))
        ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases

SIZES = (1e-8, 1e-3, 1.0, 1e3)


def give(parameters, rng, *, size=1.0, missing=()):
    """New gradients, from 1e-8 to 1e3 times `size`; None for the parameters in `missing`."""
    gradients_of(parameters, rng, sizes=SIZES, size=size, missing=missing)


def options(rng):
    return {
        "lr": rng.choice((0.02, 0.05)),
        "betas": rng.choice(((0.9, 0.95), (0.8, 0.97))),
        "eps": rng.choice((1e-8, 2e-8)),
        "weight_decay": rng.choice((0.2, 0.4)),
    }


@case(AdamW)
def several_tensors(answer, rng):
    """Four tensors with gradients from 1e-8 to 1e3, 24 steps, loud ones first."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    seen = []
    for step in range(24):
        give(parameters, rng, size=10.0 if step < 4 else 1.0)
        optimizer.step()
        if step in (0, 1, 11, 23):
            seen.append(values(parameters))
    return seen


@case(AdamW)
def defaults_in_float64(answer, rng):
    """Three tensors of one shape in float64, 60 steps with the options of the signature."""
    parameters = [torch.nn.Parameter(rng.normal(2, 3, dtype=torch.float64)) for _ in range(3)]
    optimizer = answer(parameters)
    for _ in range(60):
        for parameter, size in zip(parameters, (1e-8, 1.0, 1e-2), strict=True):
            parameter.grad = rng.normal(2, 3, dtype=torch.float64) * size
        optimizer.step()
    return values(parameters)


@case(AdamW)
def groups_of_their_own(answer, rng):
    """Groups with options of their own: one without decay, one that is empty, one that comes later."""
    parameters = drawn(rng)
    return in_groups(
        answer,
        parameters,
        lambda joined: give(parameters, rng),
        first=[
            {"params": parameters[:1], "weight_decay": 0.0},
            {"params": []},
            {"params": parameters[1:3], "lr": 0.1, "betas": (0.5, 0.8), "eps": 0.3, "weight_decay": 0.5},
        ],
        later={"params": parameters[3:], "eps": 0.1},
        lr=rng.choice((0.02, 0.04)),
        weight_decay=rng.choice((0.1, 0.3)),
    )


@case(AdamW)
def missing_gradients(answer, rng):
    """Parameters whose gradients are missing in some steps, and one that never has any."""
    parameters = drawn(rng)
    frozen = torch.nn.Parameter(rng.normal(4), requires_grad=False)
    optimizer = answer([frozen, *parameters], **options(rng))
    missing = ((1,), (0, 2), (1,), (), (1, 3), (0, 1, 2, 3), ())
    return with_missing(
        optimizer, [frozen, *parameters], lambda missing: give(parameters, rng, missing=missing), missing
    )


@case(AdamW)
def gradients_of_zero(answer, rng):
    """Zeros at first, when only the decay moves anything; then noise; then zeros again, while m dies away."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    seen = []
    for size in (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0):
        give(parameters, rng, size=size)
        optimizer.step()
        seen.append(values(parameters))
    return seen


@case(AdamW)
def schedule(answer, rng):
    """A learning rate that a scheduler changes, from 0 up and down again; then other betas, eps and decay."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    change = {
        "betas": rng.choice(((0.6, 0.7), (0.5, 0.8))),
        "eps": rng.choice((0.01, 0.02)),
        "weight_decay": rng.choice((0.6, 0.9)),
    }
    return scheduled(optimizer, parameters, lambda step: give(parameters, rng), change)


@case(AdamW)
def a_second_optimizer(answer, rng):
    """Two optimizers, one after the other, on the same parameters."""
    parameters, given = drawn(rng), options(rng)
    return one_after_another(
        answer, parameters, lambda missing: give(parameters, rng, missing=missing), (given, given)
    )


@case(AdamW)
def shared_memory(answer, rng):
    """Parameters that are views of other tensors, transposed and cut; gradients that stay for three steps."""
    return in_shared_memory(answer, rng, **options(rng))


@case(AdamW)
def broken_gradients(answer, rng):
    """NaN and Inf in a few places of the second step."""
    parameters = drawn(rng)
    optimizer = answer(parameters, **options(rng))
    for step in range(4):
        give(parameters, rng)
        if step == 1:
            parameters[0].grad[1, 2] = torch.nan
            parameters[1].grad[0, 1, 2] = torch.inf
            parameters[2].grad[rng.integer(0, 6)] = -torch.inf
        optimizer.step()
    return values(parameters)


@case(AdamW)
def before_the_pause(answer, rng):
    """Three steps, then everything is saved."""
    parameters = drawn(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.03}], **options(rng))
    for missing in ((2,), (0, 2), (2,)):
        give(parameters, rng, missing=missing)
        optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    return {"values": values(parameters), "saved": write(optimizer, parameters)}


@case(AdamW, after=before_the_pause)
def resumed(answer, rng, saved):
    """Three more steps in a new process that has only what was saved."""
    parameters = drawn(rng)
    optimizer = answer([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.5, weight_decay=0.9)
    read(saved, optimizer, parameters)
    for missing in ((1,), (), ()):
        give(parameters, rng, missing=missing)
        optimizer.step()
    return values(parameters)


@case(AdamW)
def refused(answer, rng):
    """Options out of range and gradients of other kinds; beside them, options that lie at the edge of it."""
    parameters = drawn(rng)
    give(parameters, rng)
    bad = rng.choice((-0.5, -1e-3))
    arguments = {
        **{
            f"{name} {value}": {name: value}
            for name in ("lr", "eps", "weight_decay")
            for value in (bad, torch.nan)
        },
        **{f"b1 {value}": {"betas": (value, 0.9)} for value in (bad, 1.0, 1.5, torch.nan)},
        **{f"b2 {value}": {"betas": (0.9, value)} for value in (bad, 1.0, 1.5, torch.nan)},
    }
    two = answer([{"params": parameters[:2]}, {"params": parameters[2:]}])
    edge = answer(parameters, lr=rng.choice((0.1, 0.2)), betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    edge.step()
    return {
        "edge": values(parameters),
        "lr 0": raised(answer, parameters, lr=0.0),
        "no parameters": raised(answer, []),
        "other groups": raised(two.load_state_dict, edge.state_dict()),
        **{name: raised(answer, parameters, **given) for name, given in arguments.items()},
        **refused_gradients(answer, rng),
    }


@cost(AdamW, share=1 / 6)
def state_of_two_moments(answer, rng):
    """Bytes of the state after two steps; a parameter that never had a gradient needs none."""
    parameters = large(rng)
    optimizer = answer(parameters, lr=0.01)
    optimizer.step()
    optimizer.step()
    at_most = sum(2 * parameter.nbytes + 16 for parameter in parameters[:3])
    return {
        "observed": values(parameters),
        "bytes of state": (state_bytes(optimizer.state_dict()["state"]), at_most),
    }


@cost(AdamW, share=1 / 6)
def two_temporaries(answer, rng):
    """What the third step allocates: at most twice the parameters, as torch's loop does, a tensor at a time."""
    parameters = large(rng)
    optimizer = answer(parameters, lr=0.01)
    optimizer.step()
    optimizer.step()
    with TensorWork() as work:
        optimizer.step()
    scalars = 64 * len(parameters)  # a count or a step size may be a tensor
    moved = [parameter.nbytes for parameter in parameters[:3]]
    return {
        "observed": values(parameters),
        "bytes of the largest tensor made": (work.largest_tensor_bytes, max(moved)),
        "bytes of all tensors made": (work.allocated_bytes, 2 * sum(moved) + scalars),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Written(torch.optim.Optimizer):
    """A right answer in small steps; a mistake replaces one of them."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        self.look_at(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def look_at(self, lr, betas, eps, weight_decay):
        if not (
            min(lr, eps, weight_decay) >= 0 and all(number == number for number in (lr, eps, weight_decay))
        ):
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
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["t"] = t = self.count(state["t"], p, group)
        self.decay(p, group)
        self.average(state, g, b1, b2)
        numerator, denominator = self.quotient(state, g, b1, b2, t, group["eps"])
        p.addcdiv_(numerator, denominator, value=-group["lr"])

    def kept(self, p, group):
        return self.state[p]

    def count(self, t, p, group):
        return t + 1

    def decay(self, p, group):
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def average(self, state, g, b1, b2):
        state["m"].mul_(b1).add_(g, alpha=1 - b1)
        state["v"].mul_(b2).addcmul_(g, g, value=1 - b2)

    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] / (1 - b1**t), (state["v"] / (1 - b2**t)).sqrt_().add_(eps)


@mistake(
    AdamW,
    "Adds the decay to the gradient (L2): the root divides it away again, so loud weights hardly decay and quiet ones "
    "decay far too much.",
)
class L2InTheGradient(Written):
    def move(self, p, g, group):
        super().move(p, g + group["weight_decay"] * p, {**group, "weight_decay": 0.0})


@mistake(
    AdamW,
    "Divides the decay by the root as well: lr (m + weight_decay p) / root, where it belongs outside the quotient.",
)
class DecayInsideTheQuotient(Written):
    def move(self, p, g, group):
        self.pull = group["weight_decay"] * p
        super().move(p, g, {**group, "weight_decay": 0.0})

    def quotient(self, *arguments):
        numerator, denominator = super().quotient(*arguments)
        return numerator + self.pull, denominator


@mistake(AdamW, "The decay is not multiplied by the learning rate, so it is hundreds of times too strong.")
class DecayWithoutTheRate(Written):
    def decay(self, p, group):
        p.mul_(1 - group["weight_decay"])


@mistake(AdamW, "Decays after the update, from the new value, so the step itself is decayed too.")
class DecayAfterTheUpdate(Written):
    def move(self, p, g, group):
        super().move(p, g, {**group, "weight_decay": 0.0})
        p.mul_(1 - group["lr"] * group["weight_decay"])


@mistake(
    AdamW,
    "The decay uses the learning rate of the start, so a schedule does not reach it.",
    fails=("schedule", "resumed"),
)
class DecayOfTheFirstRate(Written):
    def __init__(self, params, lr=1e-3, **options):
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group["initial_rate"] = group["lr"]

    def add_param_group(self, group):
        super().add_param_group(group)
        self.param_groups[-1].setdefault("initial_rate", self.param_groups[-1]["lr"])

    def decay(self, p, group):
        p.mul_(1 - group["initial_rate"] * group["weight_decay"])


@mistake(
    AdamW,
    "The constructor's decay is used for all groups, also for norms and biases whose group says 0.",
    fails=("groups_of_their_own", "schedule", "resumed"),
)
class DecayOfTheConstructor(Written):
    def decay(self, p, group):
        p.mul_(1 - group["lr"] * self.defaults["weight_decay"])


@mistake(
    AdamW,
    "A decay of 0 is taken for one that was not given (`or`), so its group decays like the others.",
    fails=("groups_of_their_own",),
)
class ZeroTakenForNothing(Written):
    def decay(self, p, group):
        p.mul_(1 - group["lr"] * (group["weight_decay"] or self.defaults["weight_decay"]))


@mistake(AdamW, "A parameter without a gradient still decays.")
class DecaysWithoutGradient(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    self.decay(p, group)
        super().step()


@mistake(
    AdamW,
    "A missing gradient counts as zeros: the parameter decays, its averages fade, and old momentum keeps moving it.",
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
    AdamW,
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


@mistake(
    AdamW,
    "One step count serves all parameters of a group, so one that skipped steps gets the corrections of the others.",
    fails=("missing_gradients", "before_the_pause", "resumed"),
)
class OneCount(Written):
    def step(self):
        for group in self.param_groups:
            group["t"] = group.get("t", 0) + 1
        super().step()

    def count(self, t, p, group):
        return group["t"]


@mistake(AdamW, "Counts the step after it was used, from 1 up: the first correction is the one of t = 2.")
class CountsOneTooMany(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return super().quotient(state, g, b1, b2, t + 1, eps)


@mistake(AdamW, "Adds eps under the root, where the root of 1e-8 is 1e-4: quiet weights stand still.")
class EpsUnderTheRoot(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] / (1 - b1**t), (state["v"] / (1 - b2**t)).add_(eps).sqrt_()


@mistake(
    AdamW,
    "Folds the corrections into the step size and leaves eps as it is: it is then divided by sqrt(1 - b2^t) too, up "
    "to 30 times too large at the start.",
)
class EpsBesideTheUncorrectedRoot(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] * ((1 - b2**t) ** 0.5 / (1 - b1**t)), state["v"].sqrt().add_(eps)


@mistake(AdamW, "Takes the larger of root and eps instead of their sum.")
class EpsAsAFloor(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] / (1 - b1**t), (state["v"] / (1 - b2**t)).sqrt_().clamp_min_(eps)


@mistake(
    AdamW, "Corrects m alone: with v too small at the start, the first steps are up to 30 times too large."
)
class OnlyTheFirstCorrected(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] / (1 - b1**t), state["v"].sqrt().add_(eps)


@mistake(
    AdamW,
    "Corrects v alone: with m too small at the start, the first steps are a tenth of what they should be.",
)
class OnlyTheSecondCorrected(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"], (state["v"] / (1 - b2**t)).sqrt_().add_(eps)


@mistake(AdamW, "The averages start at zero and are not corrected for it.")
class Uncorrected(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"], state["v"].sqrt().add_(eps)


@mistake(AdamW, "Divides the root of v by 1 - b2^t: the correction of v belongs under the root.")
class CorrectionOutsideTheRoot(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] / (1 - b1**t), (state["v"].sqrt() / (1 - b2**t)).add_(eps)


@mistake(
    AdamW, "Writes the corrected averages back into the state, so they are corrected again in every step."
)
class CorrectionKept(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        state["m"].div_(1 - b1**t)
        state["v"].div_(1 - b2**t)
        return state["m"], state["v"].sqrt().add_(eps)


@mistake(
    AdamW,
    "Keeps the count as a float32 tensor and takes b2^t in float32: 1 - 0.999 is then wrong in its fifth digit.",
    fails=("defaults_in_float64",),
)
class CorrectionsInFloat32(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        one, two = (float(1 - torch.tensor(b) ** t) for b in (b1, b2))
        return state["m"] / one, (state["v"] / two).sqrt_().add_(eps)


@mistake(
    AdamW,
    "Lets the count end at 30, as if the averages were warm then: with b2 = 0.999 v needs thousands of steps.",
    fails=("defaults_in_float64",),
)
class CountEndsEarly(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return super().quotient(state, g, b1, b2, min(t, 30), eps)


@mistake(
    AdamW,
    "Multiplies the betas up, step by step: once a group has other betas, the product is not b1^t.",
    fails=("schedule", "state_of_two_moments"),
)
class RunningProducts(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        one, two = state["powers"] = [
            b * power for b, power in zip((b1, b2), state.get("powers", (1, 1)), strict=True)
        ]
        return state["m"] / (1 - one), (state["v"] / (1 - two)).sqrt_().add_(eps)


@mistake(AdamW, "Moves by the sign of the gradient: that is Adam's first step, and only its first.")
class SignOfTheGradient(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return g.sign(), torch.ones_like(g)


@mistake(
    AdamW, "Divides the gradient itself by the root: that is RMSprop, without an average of the gradient."
)
class WithoutFirstMoment(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return g, super().quotient(state, g, b1, b2, t, eps)[1]


@mistake(AdamW, "Moves by the average of the gradient alone: that is momentum, and loud weights run away.")
class WithoutSecondMoment(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return super().quotient(state, g, b1, b2, t, eps)[0], torch.ones_like(g)


@mistake(AdamW, "Divides by v + eps: the root is missing.")
class WithoutTheRoot(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        return state["m"] / (1 - b1**t), (state["v"] / (1 - b2**t)).add_(eps)


@mistake(AdamW, "b1 and b2 are exchanged.")
class BetasSwapped(Written):
    def move(self, p, g, group):
        super().move(p, g, {**group, "betas": group["betas"][::-1]})


@mistake(
    AdamW, "Adds the whole gradient to m, as SGD's momentum does: m is a sum then, ten times an average."
)
class SumOfGradients(Written):
    def average(self, state, g, b1, b2):
        super().average(state, g, b1, b2)
        state["m"].add_(g, alpha=b1)


@mistake(
    AdamW,
    "Squares the averaged gradient for v, where it is the average of squares: the noise is then missing.",
)
class SquareOfTheAverage(Written):
    def average(self, state, g, b1, b2):
        state["m"].lerp_(g, 1 - b1)
        state["v"].mul_(b2).add_(state["m"].square(), alpha=1 - b2)


@mistake(AdamW, "Divides by the largest v so far: that is AMSGrad.")
class LargestSoFar(Written):
    def average(self, state, g, b1, b2):
        super().average(state, g, b1, b2)
        state["largest"] = torch.maximum(state.get("largest", state["v"]), state["v"])

    def quotient(self, state, g, b1, b2, t, eps):
        return super().quotient({**state, "v": state["largest"]}, g, b1, b2, t, eps)


@mistake(AdamW, "Mixes the new gradient into m once more before the step: that is NAdam.")
class LooksAhead(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        numerator, denominator = super().quotient(state, g, b1, b2, t, eps)
        return b1 * numerator + (1 - b1) / (1 - b1**t) * g, denominator


@mistake(AdamW, "Moves with the averages of the step before, and takes the new gradient in afterwards.")
class AveragesAfterTheStep(Written):
    def average(self, state, g, b1, b2):
        state["next"] = {"m": state["m"].clone(), "v": state["v"].clone()}
        super().average(state["next"], g, b1, b2)

    def quotient(self, state, g, b1, b2, t, eps):
        found = super().quotient(state, g, b1, b2, t, eps)
        state.update(state.pop("next"))
        return found


@mistake(AdamW, "Tensors of one shape share their averages.", fails=("defaults_in_float64",))
class StateByShape(Written):
    def kept(self, p, group):
        same = [
            q for g in self.param_groups for q in g["params"] if q.shape == p.shape and q.grad is not None
        ]
        return self.state[same[0]]

    def count(self, t, p, group):
        return self.state[p].setdefault("own", 0) + 1

    def move(self, p, g, group):
        super().move(p, g, group)
        self.state[p]["own"] = self.state[p].get("own", 0) + 1


@mistake(
    AdamW,
    "Keeps the averages in a dict of its own, by id(p): state_dict() does not hold them, and a resume starts at zero.",
    fails=("resumed",),
)
class ForgetsOnResume(Written):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.moments = {}

    def kept(self, p, group):
        return self.moments.setdefault(id(p), {})


@mistake(
    AdamW,
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
    AdamW,
    "The count is not saved, so a resume corrects old averages as if they had just started.",
    fails=("resumed",),
)
class CountsAgainOnResume(Written):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["t"] = 0


@mistake(
    AdamW,
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
    AdamW,
    "Keeps betas and eps as they are in the first step; the group may have others later.",
    fails=("schedule",),
)
class OptionsOfTheFirstStep(Written):
    def move(self, p, g, group):
        first = group.setdefault("first", {name: group[name] for name in ("betas", "eps")})
        super().move(p, g, {**group, **first})


@mistake(
    AdamW,
    "The options of the first group are used for all groups.",
    fails=("groups_of_their_own", "before_the_pause", "resumed"),
)
class FirstGroupForAll(Written):
    def move(self, p, g, group):
        super().move(p, g, self.param_groups[0])


@mistake(AdamW, "The constructor's options are used for all groups, whatever the groups say now.")
class ConstructorForAll(Written):
    def move(self, p, g, group):
        super().move(p, g, self.defaults)


@mistake(
    AdamW,
    "Gives p.data a new tensor: whatever shares the old memory, a tied weight or a view, stays behind.",
    fails=("shared_memory", "two_temporaries"),
)
class NewTensors(Written):
    def move(self, p, g, group):
        moved = p.detach().clone()
        state = self.state[p]
        self.state[moved] = state
        super().move(moved, g, group)
        del self.state[moved]
        p.data = moved


@mistake(
    AdamW,
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
    AdamW,
    "Scales the gradient in place, so a gradient that is looked at or used again is another one.",
    fails=("shared_memory", "state_of_two_moments", "two_temporaries"),
)
class GradientScaled(Written):
    def average(self, state, g, b1, b2):
        g.mul_(1 - b1)
        state["m"].mul_(b1).add_(g)
        state["v"].mul_(b2).addcmul_(g, g, value=(1 - b2) / (1 - b1) ** 2)


@mistake(
    AdamW,
    "Clears the gradients after the step: that is what zero_grad() is for.",
    fails=("shared_memory", "state_of_two_moments", "two_temporaries"),
)
class GradientsCleared(Written):
    def step(self):
        super().step()
        self.zero_grad()


@mistake(
    AdamW,
    "Makes the averages in the constructor: a group that is added later has none, and parameters that never get a "
    "gradient take memory.",
    fails=("groups_of_their_own", "state_of_two_moments"),
)
class AveragesInTheConstructor(Written):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def move(self, p, g, group):
        if not self.state[p]:
            raise KeyError("m")
        super().move(p, g, group)


@mistake(AdamW, "Derives from torch's own AdamW, which is what you were asked to write.")
class LibrarysOwn(torch.optim.AdamW):
    pass


@mistake(
    AdamW, "Keeps the averages in float32 whatever the parameter's dtype is.", fails=("defaults_in_float64",)
)
class AveragesInFloat32(Written):
    def average(self, state, g, b1, b2):
        super().average(state, g, b1, b2)
        state.update(m=state["m"].float().to(g.dtype), v=state["v"].float().to(g.dtype))


@mistake(
    AdamW,
    "Takes bfloat16 and float16 parameters: steps below half of their last bit are lost without a word.",
    fails=("refused",),
)
class NarrowTaken(Written):
    def look_at_gradient(self, g):
        if g.is_sparse or g.is_complex():
            raise ValueError("gradient")


@mistake(
    AdamW,
    "Does not look at the gradients: sparse and complex ones go wrong somewhere inside, or silently.",
    fails=("refused",),
)
class AnyGradientTaken(Written):
    def look_at_gradient(self, g):
        pass


@mistake(
    AdamW,
    "Lets a beta be 1: the average never moves, and its correction divides by zero.",
    fails=("refused",),
)
class BetaOfOneTaken(Written):
    def look_at_betas(self, b1, b2):
        if not (0 <= b1 <= 1 and 0 <= b2 <= 1):
            raise ValueError("betas")


@mistake(
    AdamW,
    "Compares with `lr < 0`, which NaN is not: an option of NaN is taken, and every weight becomes NaN.",
    fails=("refused",),
)
class NaNTaken(Written):
    def look_at(self, lr, betas, eps, weight_decay):
        if lr < 0 or eps < 0 or weight_decay < 0 or any(b < 0 or b >= 1 for b in betas):
            raise ValueError("range")


@mistake(
    AdamW, "Refuses options of 0 too: a learning rate, eps or decay of 0 is allowed.", fails=("refused",)
)
class ZeroRefused(Written):
    def look_at(self, lr, betas, eps, weight_decay):
        super().look_at(lr, betas, eps, weight_decay)
        if 0 in (lr, eps):
            raise ValueError("zero")


@mistake(AdamW, "Does not look at its options.", fails=("refused",))
class OptionsNotLookedAt(Written):
    def look_at(self, lr, betas, eps, weight_decay):
        pass


@mistake(
    AdamW,
    "Replaces NaN and Inf by numbers: the run goes on, and nobody learns that a gradient broke.",
    fails=("broken_gradients", "two_temporaries"),
)
class BrokenReplaced(Written):
    def move(self, p, g, group):
        super().move(p, g.nan_to_num(), group)


@mistake(
    AdamW,
    "Leaves out tensors whose gradient holds NaN or Inf, without a word.",
    fails=("broken_gradients", "two_temporaries"),
)
class BrokenLeftOut(Written):
    def move(self, p, g, group):
        if g.isfinite().all():
            super().move(p, g, group)


@mistake(
    AdamW,
    "Keeps a third tensor a parameter, a scratch area for the quotient: 12 bytes where 8 are enough.",
    fails=("state_of_two_moments", "two_temporaries"),
)
class ScratchInTheState(Written):
    def quotient(self, state, g, b1, b2, t, eps):
        scratch = state.setdefault("scratch", torch.empty_like(g))
        torch.sqrt(state["v"] / (1 - b2**t), out=scratch)
        return state["m"] / (1 - b1**t), scratch.add_(eps)


@mistake(
    AdamW,
    "Writes each line of the formula as a new tensor: seven or more a parameter and step.",
    fails=("two_temporaries",),
)
class NewTensorForEachLine(Written):
    def move(self, p, g, group):
        state, (b1, b2) = self.state[p], group["betas"]
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
        decayed = p - group["lr"] * group["weight_decay"] * p
        p.copy_(decayed - group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


@mistake(AdamW, "Leaves vectors without decay on its own: which tensors decay is what the groups are for.")
class VectorsSpared(Written):
    def decay(self, p, group):
        if p.dim() > 1:
            super().decay(p, group)


@alternative(AdamW, "Decays last, by the value from before the step, and keeps the count as a float32 tensor")
class DecayOfTheOldValue(Written):
    def move(self, p, g, group):
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update(step=torch.tensor(0.0), m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["step"] += 1
        t = state["step"].item()
        state["m"].lerp_(g, 1 - b1)
        state["v"].add_(g.square().sub_(state["v"]), alpha=1 - b2)
        update = state["v"].sqrt().div_((1 - b2**t) ** 0.5).add_(group["eps"])
        torch.div(state["m"], update, out=update).div_(1 - b1**t).add_(p, alpha=group["weight_decay"])
        p.sub_(update, alpha=group["lr"])


@alternative(AdamW, "Calls torch's operations on lists of tensors, a group at a time")
class ListsOfTensors(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in moving]
            for p, g in zip(moving, gradients, strict=True):
                self.look_at_gradient(g)
                self.state[p] = self.state[p] or {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                self.state[p]["t"] += 1
            if moving:
                self.move_all(moving, gradients, [self.state[p] for p in moving], group)

    def move_all(self, moving, gradients, states, group):
        lr, (b1, b2) = group["lr"], group["betas"]
        m, v = [state["m"] for state in states], [state["v"] for state in states]
        torch._foreach_mul_(moving, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, gradients, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - b2)
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, [(1 - b2 ** state["t"]) ** 0.5 for state in states])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(moving, m, roots, [-lr / (1 - b1 ** state["t"]) for state in states])


@alternative(AdamW, "Keeps both averages in one tensor, and counts the steps of a parameter in a list")
class OneTensorForBoth(Written):
    def move(self, p, g, group):
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update(gone=[0], both=torch.zeros(2, *p.shape, dtype=p.dtype))
        state["gone"][0] += 1
        t, (m, v) = state["gone"][0], state["both"]
        self.average({"m": m, "v": v}, g, b1, b2)
        self.decay(p, group)
        p.sub_(
            self.quotient({"m": m, "v": v}, g, b1, b2, t, group["eps"])[1].reciprocal_().mul_(m),
            alpha=group["lr"] / (1 - b1**t),
        )

    def quotient(self, state, g, b1, b2, t, eps):
        return g, (state["v"] / (1 - b2**t)).sqrt_().add_(eps)


@alternative(AdamW, "Calculates each step in float64 and rounds once at its end", meets_costs=False)
class InFloat64(Written):
    def move(self, p, g, group):
        state, (b1, b2) = self.state[p], group["betas"]
        t = state["t"] = state.get("t", 0) + 1
        m = b1 * state.get("m", torch.zeros_like(p)).double() + (1 - b1) * g.double()
        v = b2 * state.get("v", torch.zeros_like(p)).double() + (1 - b2) * g.double().square()
        state.update(m=m.to(p.dtype), v=v.to(p.dtype))
        update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        p.copy_(p.double() - group["lr"] * (update + group["weight_decay"] * p.double()))


@alternative(
    AdamW, "Makes the averages when a parameter arrives, whether it gets a gradient or not", meets_costs=False
)
class AveragesOnArrival(Written):
    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            self.state[p].update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
