"""Training weights of 16 bits: the optimizer moves a float32 copy, and the model gets its rounding."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmcourse.counting import reachable_bytes
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised
from llmcourse.stepping import values


@exercise(
    points=3,
    minutes=10,
    extension=True,
    hints=(
        "Follow one weight of 1.0 through two updates of 0.001: where is the 1.002 kept, what does the model see, and "
        "what has to be in the file so that a new process goes on from 1.002 and not from 1.0?",
        "Nothing is exchanged, everything is copied: into the model's parameters, and at loading into the masters, "
        "which the optimizer holds too. A gradient that was there at the last step may be missing at this one.",
    ),
)
class MasterWeights:
    """Trains parameters of 16 bits by a float32 master copy, which the optimizer moves in
    their place; about 25 lines.

    parameters: any iterable (a generator too) of torch.nn.Parameter, bfloat16 or float16.
    make_optimizer: called once, with the list of all masters in the order of parameters,
    float32 tensors of their own with the parameters' values; returns a torch.optim
    Optimizer over them, whichever and with whatever groups. It is made once: the caller
    may hold it, change its learning rate or hang a scheduler on it.
    ValueError for no parameters, for the same object given twice and for any other dtype.

    step(): gives each master its parameter's gradient as float32, takes one step of the
    optimizer and writes the masters into the parameters, rounded as Tensor.to does (to
    nearest, ties to even). A parameter without gradient (None) leaves its master without
    one in that step, and need not be written; zeros, NaN and Inf are gradients like any
    other. The parameters stay the same objects in the same memory, and their gradients
    stay as they are: those of several backward passes add up there, in 16 bits, until
    zero_grad().

    zero_grad(): every parameter's gradient is None.

    state_dict(): all that a resume needs, in what torch.save writes and
    torch.load(weights_only=True) reads. It is saved before the next step.

    load_state_dict(state): in a new process, with a model of the same shapes and any
    values, and an optimizer of the same kind. Masters, optimizer (by its own
    load_state_dict) and the model's parameters are then as they were, and training goes on
    exactly as it would have. ValueError, with nothing changed, where the saved masters
    differ in number or in a shape from these.

    For a third of the points, counted in what this object and the parameters hold: after a
    step with AdamW 16 bytes a parameter (2 weight, 2 gradient, 4 master, 8 moments), after
    zero_grad() 14; the few bytes of the optimizer's step counts come on top.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        make_optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    ) -> None:
        ### BEGIN SOLUTION
        given = list(parameters)
        narrow = (torch.bfloat16, torch.float16)
        if not given or any(p.dtype not in narrow for p in given):
            raise ValueError(f"expected parameters in bfloat16 or float16, found {given}")
        self.masters = {p: p.detach().float() for p in given}
        if len(self.masters) < len(given):
            raise ValueError("a parameter is given twice; expected one master for each")
        self.optimizer = make_optimizer(list(self.masters.values()))
        ### END SOLUTION

    def step(self) -> None:
        ### BEGIN SOLUTION
        for p, master in self.masters.items():
            master.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        for p, master in self.masters.items():
            master.grad = None
            p.data.copy_(master)
        ### END SOLUTION

    def zero_grad(self) -> None:
        ### BEGIN SOLUTION
        for p in self.masters:
            p.grad = None
        ### END SOLUTION

    def state_dict(self) -> dict[str, Any]:
        ### BEGIN SOLUTION
        return {"masters": list(self.masters.values()), "optimizer": self.optimizer.state_dict()}
        ### END SOLUTION

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ### BEGIN SOLUTION
        saved = [value.shape for value in state["masters"]]
        if saved != [p.shape for p in self.masters]:
            raise ValueError(f"the saved masters have shapes {saved}, which are not these parameters'")
        self.optimizer.load_state_dict(state["optimizer"])
        for index, (p, master) in enumerate(self.masters.items()):
            master.copy_(state["masters"][index])
            p.data.copy_(master)
        ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases

SHAPES = ((3, 4), (7,), (2, 3, 5))


def parameters_of(rng, dtypes=(torch.bfloat16, torch.bfloat16, torch.float16), shapes=SHAPES):
    """One parameter of each shape, normal values."""
    return [torch.nn.Parameter(rng.normal(*s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]


def wrapped(answer, parameters, make):
    """(the answer around these parameters, the optimizers it had made)."""
    made = []

    def noted(masters):
        made.append(make(masters))
        return made[-1]

    return answer(parameters, noted), made


def masters_in(optimizer):
    """What the optimizer moves, as it is now."""
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def give_gradients(parameters, rng, missing=()):
    """Gradients of 1e-8, 1e3 and 1, none for the parameters in `missing`."""
    for index, (p, size) in enumerate(zip(parameters, (1e-8, 1e3, 1.0), strict=True)):
        gradient = (rng.normal(*p.shape) * size).to(p.dtype)
        p.grad = None if index in missing else gradient


class Plain(torch.optim.Optimizer):
    """p - lr g, and a note of every gradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.seen = []

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.seen.append([None if p.grad is None else p.grad.clone() for p in group["params"]])
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.to(p.dtype), alpha=group["lr"])


@case(MasterWeights)
def updates_below_half_a_step(answer, rng):
    """Weights of 1 and a hundred updates of 0.001, each less than half the distance of two bfloat16 numbers."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))]
    gradient = (2 * rng.integers(0, 1, 2, 3) - 1).to(torch.bfloat16)
    lr = rng.choice([0.001, 0.0009, 0.0011])
    training, made = wrapped(answer, iter(parameters), lambda masters: Plain(masters, lr))
    seen = []
    for step in range(120):
        parameters[0].grad = gradient.clone()
        training.step()
        if step % 39 == 0:
            seen.append(parameters[0].detach().clone())
    return {"weights": seen, "masters": masters_in(made[0])}


@case(MasterWeights)
def rounding_to_nearest(answer, rng):
    """Masters half way between two numbers of 16 bits, close to that and far from it: compared in bits."""
    found = {}
    for dtype, bits, lowest, highest in ((torch.bfloat16, 7, -40, 30), (torch.float16, 10, -9, 2)):
        whole = rng.integers(2**bits, 2 ** (bits + 1) - 4, 4, 6) * (2 * rng.integers(0, 1, 4, 6) - 1)
        power = 2.0 ** rng.integers(lowest, highest, 4, 6)
        p = torch.nn.Parameter((whole * power).to(dtype))
        moved = torch.tensor(rng.shuffled([32, 63, 64, 64, 65, 96, 192, 192, -32, -64, -64, -65] * 2)) / 128
        p.grad = (-8 * moved.reshape(4, 6) * power).to(dtype)
        training, made = wrapped(answer, [p], lambda masters: Plain(masters, 0.125))
        training.step()
        found[str(dtype)] = {"bits": p.detach().view(torch.int16), "masters": masters_in(made[0])}
    return found


@case(MasterWeights)
def adamw_with_groups_and_missing_gradients(answer, rng):
    """AdamW over two groups, gradients from 1e-8 to 1e3, some missing: they do not move, nor decay, nor count."""
    parameters = parameters_of(rng)
    lr = rng.choice([0.02, 0.03])

    def make(masters):
        groups = [
            {"params": masters[:1], "lr": 0.1, "weight_decay": 0.2},
            {"params": masters[1:], "betas": (0.5, 0.8)},
        ]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.3)

    training, made = wrapped(answer, iter(parameters), make)
    seen = []
    for missing in ((), (1,), (0, 2), (0,), ()):
        give_gradients(parameters, rng, missing)
        training.step()
        seen += [values(parameters), masters_in(made[0])]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    training.step()
    return {"each step": seen, "zeros as gradients": [values(parameters), masters_in(made[0])]}


@case(MasterWeights)
def what_the_optimizer_is_given(answer, rng):
    """One list of float32 masters in memory of their own, and float32 gradients: those of the model, in every step."""
    parameters = parameters_of(rng)
    calls = []

    def make(masters):
        calls.append(
            {
                "type": type(masters).__name__,
                "values": values(masters),
                "own memory": len({t.data_ptr() for t in [*masters, *parameters]}),
            }
        )
        return Plain(masters, rng.choice([0.1, 0.2]))

    training, made = wrapped(answer, iter(parameters), make)
    give_gradients(parameters, rng)
    training.step()
    training.step()
    give_gradients(parameters, rng, missing=(0,))
    parameters[1].grad[:3] = torch.tensor(rng.shuffled([torch.nan, torch.inf, -torch.inf]))
    training.step()
    return {"calls": calls, "gradients": made[0].seen, "values": values(parameters)}


@case(MasterWeights)
def in_the_model(answer, rng):
    """Parameters that are parts of one buffer, one of them transposed; backward passes add up until zero_grad."""
    flat = rng.normal(40, dtype=torch.bfloat16)
    parts = [flat[:12].view(3, 4), flat[12:17], flat[17:37].view(4, 5).T]
    parameters = [torch.nn.Parameter(part) for part in parts]
    training, _ = wrapped(answer, iter(parameters), lambda masters: Plain(masters, 0.3))
    seen = []
    for passes in (1, 2, 2):
        for _ in range(passes):
            sum((p * rng.normal(*p.shape, dtype=p.dtype)).sum() for p in parameters).backward()
        training.step()
        seen += [flat.clone(), [p.grad.clone() for p in parameters]]
        if passes == 2:
            training.zero_grad()
            seen.append([p.grad is None for p in parameters])
    training.step()
    return {
        "after each step": seen,
        "without gradients": flat.clone(),
        "require grad": [p.requires_grad and p.is_leaf for p in parameters],
    }


@case(MasterWeights)
def momentum_and_a_schedule(answer, rng):
    """SGD with Nesterov momentum and decay, whose learning rate a scheduler changes between steps."""
    parameters = parameters_of(rng, dtypes=(torch.float16, torch.bfloat16, torch.bfloat16))
    lr = rng.choice([0.1, 0.2])

    def make(masters):
        return torch.optim.SGD(masters, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.05)

    training, made = wrapped(answer, iter(parameters), make)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made[0], lambda step: 1 / (1 + step))
    for missing in ((0,), (0, 1), (1,), (2,)):
        training.zero_grad()
        for index, p in enumerate(parameters):
            if index not in missing:
                p.grad = rng.normal(*p.shape, dtype=p.dtype)
        training.step()
        scheduler.step()
    return {"values": values(parameters), "masters": masters_in(made[0])}


def adamw(masters):
    return torch.optim.AdamW(masters, lr=0.003, weight_decay=0.1)


@case(MasterWeights)
def before_the_pause(answer, rng):
    """Four steps with AdamW, each too small for most weights; then everything is saved."""
    parameters = parameters_of(rng)
    training, made = wrapped(answer, iter(parameters), adamw)
    for missing in ((), (2,), (), ()):
        give_gradients(parameters, rng, missing)
        training.step()
    made[0].param_groups[0]["lr"] = rng.choice([0.001, 0.002])
    written = io.BytesIO()
    torch.save(training.state_dict(), written)
    return {"values": values(parameters), "saved": written.getvalue()}


@case(MasterWeights, after=before_the_pause)
def resumed(answer, rng, saved):
    """A new process with other weights, which gets what was saved, and four steps more."""
    parameters = parameters_of(rng)
    training, made = wrapped(answer, iter(parameters), adamw)
    training.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
    seen = {"weights at once": values(parameters), "masters at once": masters_in(made[0])}
    for missing in ((1,), (), ()):
        give_gradients(parameters, rng, missing)
        training.step()
    seen["weights later"] = values(parameters)
    seen["masters later"] = masters_in(made[0])
    made[0].param_groups[0]["lr"] = 0.05
    give_gradients(parameters, rng)
    training.step()
    return {**seen, "another learning rate": values(parameters), "optimizers made": len(made)}


@case(MasterWeights)
def turned_back(answer, rng):
    """What was saved is loaded into the same object some steps later."""
    parameters = parameters_of(rng)
    training, made = wrapped(answer, iter(parameters), adamw)
    give_gradients(parameters, rng)
    training.step()
    written = io.BytesIO()
    torch.save(training.state_dict(), written)
    gradients = values([p.grad for p in parameters])
    for _ in range(2):
        give_gradients(parameters, rng)
        training.step()
    training.load_state_dict(torch.load(io.BytesIO(written.getvalue()), weights_only=True))
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    training.step()
    return {"weights": values(parameters), "masters": masters_in(made[0])}


def plain(masters):
    return Plain(masters, 0.125)


def fast_adamw(masters):
    return torch.optim.AdamW(masters, lr=0.5)


def saved_by(answer, rng, shapes):
    """The state of another training, with parameters of these shapes and a larger learning rate, after a step."""
    parameters = parameters_of(rng, dtypes=(torch.bfloat16,) * len(shapes), shapes=shapes)
    training, _ = wrapped(answer, iter(parameters), fast_adamw)
    for p in parameters:
        p.grad = torch.ones_like(p)
    training.step()
    return training.state_dict()


@case(MasterWeights)
def refused(answer, rng):
    """Parameters of other dtypes, none or the same twice; saved states that do not fit, after which all goes on."""
    parameters = parameters_of(rng)
    training, made = wrapped(answer, iter(parameters), adamw)
    give_gradients(parameters, rng)
    training.step()
    others = {
        "broadcast": ((3, 4), (1,), (2, 3, 5)),
        "last one differs": ((3, 4), (7,), (1, 3, 5)),
        "first one differs": ((1, 4), (7,), (2, 3, 5)),
        "flattened": ((3, 4), (7,), (30,)),
        "another order": ((7,), (3, 4), (2, 3, 5)),
        "one too few": SHAPES[:2],
        "one too many": (*SHAPES, (2,)),
    }
    states = {name: saved_by(answer, rng, shapes) for name, shapes in others.items()}
    found = {name: raised(training.load_state_dict, state) for name, state in states.items()}
    give_gradients(parameters, rng)
    found["a step after them"] = raised(training.step)
    twice = [*parameters, parameters[rng.integer(0, 2)]]
    flat = rng.normal(12, dtype=torch.bfloat16)
    one_place = [torch.nn.Parameter(part) for part in (flat, flat.view(3, 4), flat[:5])]
    empty = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((0,), (0,), (3, 0))]
    for dtype in (torch.float32, torch.float64, torch.complex64):
        wide = torch.nn.Parameter(rng.normal(2, 3).to(dtype))
        found[f"first in {dtype}"] = raised(answer, iter([wide, *parameters]), plain)
        found[f"last in {dtype}"] = raised(answer, iter([*parameters, wide]), plain)
    return {
        **found,
        "none": raised(answer, iter([]), lambda masters: None),
        "twice": raised(answer, iter(twice), plain),
        "equal values": raised(answer, [*parameters, torch.nn.Parameter(parameters[0].clone())], plain),
        "views that begin at one place": raised(answer, iter(one_place), plain),
        "empty ones": raised(answer, iter([*parameters, *empty]), plain),
        "values": values(parameters),
        "masters": masters_in(made[0]),
    }


@cost(MasterWeights, share=1 / 3)
def bytes_by_part(answer, rng):
    """What is held after steps with AdamW and with plain SGD, and after zero_grad."""
    shapes = ((rng.integer(60, 70), 48), (2000,), (4, 30, 9))
    observed, counts = [], {}
    for name, make, with_gradients in (
        ("AdamW", adamw, 2 + 2 + 4 + 8),
        ("SGD", plain, 2 + 2 + 4),
    ):
        parameters = parameters_of(rng, shapes=shapes)
        weights = sum(p.numel() for p in parameters)
        training, made = wrapped(answer, iter(parameters), make)
        counts[f"bytes a parameter at first, {name}"] = (
            reachable_bytes(training, parameters) / weights,
            2 + 4,
        )
        for _ in range(2):
            for p in parameters:
                p.grad = rng.integers(-8, 8, *p.shape).to(p.dtype)
            training.step()
        if name == "SGD":
            made[0].seen.clear()
        counts[f"bytes a parameter after a step, {name}"] = (
            reachable_bytes(training, parameters) / weights,
            with_gradients + 0.1,  # AdamW counts the steps of each tensor in 4 bytes
        )
        training.zero_grad()
        counts[f"bytes a parameter after zero_grad, {name}"] = (
            reachable_bytes(training, parameters) / weights,
            with_gradients - 2 + 0.1,
        )
        observed.append(values(parameters))
    return {"observed": observed, **counts}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Written:
    """A right answer in small steps; a wrong one changes some of them."""

    def __init__(self, parameters, make_optimizer):
        self.model = self.accepted(parameters)
        self.masters = [self.master(p) for p in self.model]
        self.optimizer = self.made(make_optimizer)

    def accepted(self, parameters):
        model = list(parameters)
        if not model or any(p.dtype not in (torch.bfloat16, torch.float16) for p in model):
            raise ValueError("dtypes")
        if len({id(p) for p in model}) != len(model):
            raise ValueError("twice")
        return model

    def master(self, p):
        return p.detach().to(torch.float32)

    def made(self, make_optimizer):
        return make_optimizer(self.masters)

    def pairs(self):
        return list(zip(self.model, self.masters, strict=True))

    def step(self):
        for p, master in self.pairs():
            self.hand_over(p, master)
        self.optimizer.step()
        for p, master in self.pairs():
            self.let_go(p, master)
            self.write_back(p, master)

    def hand_over(self, p, master):
        master.grad = None if p.grad is None else p.grad.to(torch.float32)

    def let_go(self, p, master):
        master.grad = None

    def write_back(self, p, master):
        with torch.no_grad():
            p.copy_(master)

    def zero_grad(self):
        for p in self.model:
            p.grad = None

    def state_dict(self):
        return {"masters": self.masters, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.fits(state)
        self.load(state)

    def fits(self, state):
        if [m.shape for m in state["masters"]] != [m.shape for m in self.masters]:
            raise ValueError("shapes")

    def load(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_masters(state["masters"])
        for p, master in self.pairs():
            self.write_back(p, master)

    def load_masters(self, saved):
        for master, value in zip(self.masters, saved, strict=True):
            master.copy_(value)


@mistake(
    MasterWeights,
    "The optimizer moves the 16-bit weights themselves: an update below half the distance of two numbers is lost, "
    "every time.",
)
class UpdatesInPlace(Written):
    def master(self, p):
        return p

    def hand_over(self, p, master):
        pass

    def let_go(self, p, master):
        pass

    def write_back(self, p, master):
        pass

    def load_masters(self, saved):
        with torch.no_grad():
            super().load_masters(saved)


@mistake(
    MasterWeights,
    "The master copy has the parameters' 16 bits: it loses the small updates just as they would.",
)
class MasterInSixteenBits(Written):
    def master(self, p):
        return p.detach().clone()

    def hand_over(self, p, master):
        master.grad = None if p.grad is None else p.grad.clone()


@mistake(
    MasterWeights,
    "The masters are made once and never written back: the model that computes stays as it was.",
)
class NeverWrittenBack(Written):
    def write_back(self, p, master):
        pass


@mistake(
    MasterWeights,
    "Writes the masters back before the optimizer moves them, so the model is one step behind.",
)
class OneStepBehind(Written):
    def step(self):
        for p, master in self.pairs():
            self.hand_over(p, master)
            self.write_back(p, master)
        self.optimizer.step()
        for p, master in self.pairs():
            self.let_go(p, master)


@mistake(
    MasterWeights,
    "Makes the masters anew from the 16-bit weights in every step: what was rounded off is gone before it adds up.",
)
class RemadeEveryStep(Written):
    def hand_over(self, p, master):
        master.copy_(p.detach())
        super().hand_over(p, master)


@mistake(
    MasterWeights,
    "Adds the model's gradient to what the master's gradient still holds: every step sees all gradients before.",
)
class AddsUpGradients(Written):
    def hand_over(self, p, master):
        if p.grad is not None:
            held = 0 if master.grad is None else master.grad
            master.grad = held + p.grad.float()

    def let_go(self, p, master):
        pass


@mistake(
    MasterWeights,
    "A missing gradient is taken for zeros: momentum and decay move a weight that was to be left alone.",
)
class MissingIsZero(Written):
    def hand_over(self, p, master):
        master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float()


@mistake(
    MasterWeights,
    "A gradient of zeros is taken for a missing one: decay and momentum stand still where they should not.",
)
class ZerosAreMissing(Written):
    def hand_over(self, p, master):
        super().hand_over(p, master)
        if master.grad is not None and not master.grad.any():
            master.grad = None


@mistake(
    MasterWeights,
    "Replaces NaN and Inf in gradients by numbers: what broke is not seen, and the weights take a wrong step.",
)
class Launders(Written):
    def hand_over(self, p, master):
        master.grad = None if p.grad is None else p.grad.float().nan_to_num()


@mistake(
    MasterWeights,
    "Hands gradients over where there are some and clears none: a parameter without one moves by its last one again.",
)
class LastGradientAgain(Written):
    def hand_over(self, p, master):
        if p.grad is not None:
            super().hand_over(p, master)

    def let_go(self, p, master):
        pass


@mistake(
    MasterWeights,
    "Keeps the float32 gradients after the step: 20 bytes a parameter with AdamW, where 16 would do.",
)
class KeepsWideGradients(Written):
    def let_go(self, p, master):
        pass


@mistake(
    MasterWeights,
    "Keeps one buffer a parameter for its float32 gradient, to spare an allocation, and clears it only in zero_grad.",
)
class ClearsWideGradientsLate(Written):
    def let_go(self, p, master):
        pass

    def zero_grad(self):
        for p, master in self.pairs():
            p.grad = master.grad = None


@mistake(
    MasterWeights,
    "Keeps a second float32 copy of the weights beside the masters: 4 bytes a parameter more, for nothing.",
)
class SecondCopy(Written):
    def __init__(self, parameters, make_optimizer):
        super().__init__(parameters, make_optimizer)
        self.before = [master.clone() for master in self.masters]


@mistake(
    MasterWeights,
    "Writes back by cutting off the low bits: every weight is pulled towards zero, by half a step on average.",
)
class CutOff(Written):
    def write_back(self, p, master):
        kept = -(1 << (16 if p.dtype == torch.bfloat16 else 13))
        p.data.copy_((master.view(torch.int32) & kept).view(torch.float32))


@mistake(MasterWeights, "Rounds by adding half a step and cutting off: ties go away from zero, not to even.")
class TiesAwayFromZero(Written):
    def write_back(self, p, master):
        low = 16 if p.dtype == torch.bfloat16 else 13
        bits = master.view(torch.int32) + (1 << (low - 1)) & -(1 << low)
        p.data.copy_(bits.view(torch.float32))


@mistake(MasterWeights, "Rounds to bfloat16 whatever the parameter is: float16 loses 3 of its 10 bits.")
class BfloatForAll(Written):
    def write_back(self, p, master):
        p.data.copy_(master.bfloat16())


@mistake(
    MasterWeights,
    "Gives a parameter new memory (p.data = ...) in place of new values: whatever shared the old memory, a flat "
    "buffer or a tied weight, is cut off.",
)
class NewMemory(Written):
    def write_back(self, p, master):
        p.data = master.to(p.dtype)


@mistake(
    MasterWeights,
    "Makes new parameters of the rounded masters and keeps those: the model still has the old ones and never changes.",
)
class NewParameters(Written):
    def step(self):
        super().step()
        self.model = [
            torch.nn.Parameter(m.to(p.dtype)) for p, m in zip(self.model, self.masters, strict=True)
        ]

    def write_back(self, p, master):
        pass


@mistake(
    MasterWeights, "Makes the model's parameters float32: all is exact, and the model computes in 32 bits."
)
class WideParameters(Written):
    def write_back(self, p, master):
        p.data = master


@mistake(
    MasterWeights,
    "Makes one optimizer for each parameter: groups by place, and whatever looks at all weights, no longer work.",
)
class OneOptimizerEach(Written):
    def made(self, make_optimizer):
        self.optimizers = [make_optimizer([master]) for master in self.masters]
        return self.optimizers[0]

    def step(self):
        for optimizer, (p, master) in zip(self.optimizers, self.pairs(), strict=True):
            self.hand_over(p, master)
            optimizer.step()
            self.write_back(p, master)
            self.let_go(p, master)

    def state_dict(self):
        return {"masters": self.masters, "optimizer": [o.state_dict() for o in self.optimizers]}

    def load(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
        self.load_masters(state["masters"])
        for p, master in self.pairs():
            self.write_back(p, master)


@mistake(
    MasterWeights,
    "Hands over all masters before it looks at the parameters' order: the last come first, groups get each other's "
    "options.",
)
class OtherOrder(Written):
    def made(self, make_optimizer):
        return make_optimizer(self.masters[::-1])


@mistake(MasterWeights, "Clears the parameters' gradients in step(), before zero_grad() was asked for.")
class ClearsInStep(Written):
    def step(self):
        super().step()
        self.zero_grad()


@mistake(
    MasterWeights, "zero_grad() clears the masters' gradients, and the model's go on adding up for ever."
)
class ClearsTheMasters(Written):
    def zero_grad(self):
        self.optimizer.zero_grad()


@mistake(
    MasterWeights, "zero_grad() fills gradients with zeros, and a weight without gradient then has one of 0."
)
class FillsWithZeros(Written):
    def zero_grad(self):
        for p in self.model:
            if p.grad is not None:
                p.grad = torch.zeros_like(p.grad)


@mistake(
    MasterWeights,
    "Saves the 16-bit weights and makes the masters from them: the part below their last bit is lost at every resume.",
)
class ResumesFromSixteenBits(Written):
    def state_dict(self):
        return {"masters": [p.detach() for p in self.model], "optimizer": self.optimizer.state_dict()}


@mistake(
    MasterWeights,
    "Saves what the optimizer's state_dict() holds, which is moments and options, and no masters.",
)
class MastersNotSaved(Written):
    def state_dict(self):
        return {"shapes": [list(m.shape) for m in self.masters], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        if state["shapes"] != [list(m.shape) for m in self.masters]:
            raise ValueError("shapes")
        self.optimizer.load_state_dict(state["optimizer"])
        for p, master in self.pairs():
            master.copy_(p.detach())


@mistake(
    MasterWeights,
    "Saves the optimizer's state_dict() alone and makes the masters from the model's 16 bits: the file has none.",
)
class NothingButTheOptimizer(Written):
    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.load({**state, "masters": [p.detach() for p in self.model]})


@mistake(MasterWeights, "Saves the masters alone: after a resume the moments start at zero again.")
class MomentsNotSaved(Written):
    def load(self, state):
        self.load_masters(state["masters"])
        for p, master in self.pairs():
            self.write_back(p, master)


@mistake(
    MasterWeights,
    "Puts the loaded masters in the place of its own: the optimizer still moves the old ones, and nothing follows.",
)
class LoadedMastersInstead(Written):
    def load_masters(self, saved):
        self.masters = [value.clone() for value in saved]


@mistake(
    MasterWeights,
    "Makes a new optimizer for the loaded masters: the caller's, with its scheduler, moves nothing any more.",
)
class NewOptimizerAtLoading(Written):
    def made(self, make_optimizer):
        self.make = make_optimizer
        return super().made(make_optimizer)

    def load(self, state):
        self.masters = [value.clone() for value in state["masters"]]
        self.optimizer = self.make(self.masters)
        self.optimizer.load_state_dict(state["optimizer"])
        for p, master in self.pairs():
            self.write_back(p, master)


@mistake(
    MasterWeights,
    "Loads masters and moments and leaves the model's parameters as they are until the next step.",
)
class ModelNotLoaded(Written):
    def load(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_masters(state["masters"])


@mistake(
    MasterWeights,
    "Walks through parameters to check them and again to copy them: a generator is empty by then.",
)
class WalksTwice(Written):
    def accepted(self, parameters):
        if any(p.dtype not in (torch.bfloat16, torch.float16) for p in parameters):
            raise ValueError("dtypes")
        return super().accepted(parameters)


@mistake(
    MasterWeights,
    "Loads saved masters of any shape that broadcasts: one number fills a whole tensor, and nothing complains.",
)
class Broadcasts(Written):
    def fits(self, state):
        if len(state["masters"]) != len(self.masters):
            raise ValueError("number")


@mistake(
    MasterWeights, "Compares numbers of values, not shapes: a state of other shapes is poured into these."
)
class CountsValues(Written):
    def fits(self, state):
        if [m.numel() for m in state["masters"]] != [m.numel() for m in self.masters]:
            raise ValueError("sizes")

    def load_masters(self, saved):
        super().load_masters([v.reshape(m.shape) for v, m in zip(saved, self.masters, strict=True)])


@mistake(
    MasterWeights,
    "Pairs the saved masters with its own as far as both go: one too few or too many is not noticed in time.",
)
class PairsAsFarAsTheyGo(Written):
    def fits(self, state):
        if any(a.shape != b.shape for a, b in zip(state["masters"], self.masters, strict=False)):
            raise ValueError("shapes")

    def load(self, state):
        for master, value in zip(self.masters, state["masters"], strict=False):
            master.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for p, master in self.pairs():
            self.write_back(p, master)


@mistake(
    MasterWeights,
    "Checks each saved master when its turn comes: by the time one is refused, those before it are changed.",
)
class ChangesThenRefuses(Written):
    def fits(self, state):
        if len(state["masters"]) != len(self.masters):
            raise ValueError("number")
        for master, value in zip(self.masters, state["masters"], strict=True):
            if value.shape != master.shape:
                raise ValueError("shapes")
            master.copy_(value)


@mistake(
    MasterWeights,
    "Loads the optimizer's state before it looks at the masters: after a refusal learning rate and moments are others.",
    fails=("refused",),
)
class OptimizerLoadedFirst(Written):
    def fits(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        super().fits(state)


@mistake(
    MasterWeights,
    "Tells parameters apart by their address: two empty ones, or two that begin at one place, are taken for one.",
    fails=("refused",),
)
class TwiceByAddress(Written):
    def accepted(self, parameters):
        model = super().accepted(parameters)
        if len({p.data_ptr() for p in model}) < len(model):
            raise ValueError("twice")
        return model


@mistake(
    MasterWeights, "Takes the same parameter twice and makes two masters of it, each with its own moments."
)
class TakesTwice(Written):
    def accepted(self, parameters):
        model = list(parameters)
        super().accepted(dict.fromkeys(model))
        return model


@mistake(
    MasterWeights,
    "Takes parameters of any dtype: a float32 one gets a copy for nothing, a float64 one loses bits.",
)
class TakesAnyDtype(Written):
    def accepted(self, parameters):
        model = list(parameters)
        if not model or len(set(model)) != len(model):
            raise ValueError("twice or none")
        return model


@mistake(MasterWeights, "Looks at the dtype of the first parameter only.")
class LooksAtTheFirst(Written):
    def accepted(self, parameters):
        model = list(parameters)
        if not model or len(set(model)) != len(model):
            raise ValueError("twice or none")
        super().accepted(model[:1])
        return model


@mistake(MasterWeights, "No parameters at all are taken, and nothing is ever trained.")
class TakesNone(Written):
    def accepted(self, parameters):
        model = list(parameters)
        return super().accepted(model) if model else model


@alternative(MasterWeights, "Keeps all masters in one flat buffer, and hands out views of it")
class FlatBuffer(Written):
    def __init__(self, parameters, make_optimizer):
        self.model = self.accepted(parameters)
        self.flat = torch.cat([p.detach().reshape(-1).float() for p in self.model])
        sizes = [p.numel() for p in self.model]
        self.masters = [
            part.view(p.shape) for part, p in zip(self.flat.split(sizes), self.model, strict=True)
        ]
        self.optimizer = make_optimizer(self.masters)

    def state_dict(self):
        return {
            "flat": self.flat.clone(),
            "shapes": [list(m.shape) for m in self.masters],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state):
        if state["shapes"] != [list(m.shape) for m in self.masters]:
            raise ValueError("shapes")
        self.optimizer.load_state_dict(state["optimizer"])
        self.flat.copy_(state["flat"])
        for p, master in self.pairs():
            self.write_back(p, master)


@alternative(
    MasterWeights, "Masters are Parameters, which write back only where there was a gradient, as bits"
)
class OnlyWhatMoved(Written):
    def master(self, p):
        return torch.nn.Parameter(p.detach().float().contiguous())

    def step(self):
        moved = [pair for pair in self.pairs() if pair[0].grad is not None]
        for p, master in moved:
            master.grad = torch.empty_like(master).copy_(p.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for p, master in moved:
            self.write_back(p, master)

    def write_back(self, p, master):
        if p.dtype == torch.bfloat16:  # to nearest, ties to even, by hand
            bits = master.detach().view(torch.int32)
            p.data.copy_((bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).view(torch.float32))
        else:
            p.data.copy_(master.detach())

    def load_masters(self, saved):
        with torch.no_grad():
            super().load_masters(saved)

    def state_dict(self):
        masters = {str(index): master.detach().clone() for index, master in enumerate(self.masters)}
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict({**state, "masters": list(state["masters"].values())})


@alternative(
    MasterWeights,
    "Saves the rounded weights and what was rounded off, and adds them at loading: exact, and 2 bytes more in the file",
)
class SavesTheRest(Written):
    def state_dict(self):
        weights = [p.detach() for p in self.model]
        rest = [master - w.float() for master, w in zip(self.masters, weights, strict=True)]
        return {"masters": weights, "rest": rest, "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        masters = [w.float() + r for w, r in zip(state["masters"], state["rest"], strict=True)]
        super().load({**state, "masters": masters})


@alternative(
    MasterWeights,
    "Holds float32 gradients in buffers that it made at the start: right and dearer",
    meets_costs=False,
)
class GradientBuffers(Written):
    def made(self, make_optimizer):
        self.buffers = [torch.zeros_like(master) for master in self.masters]
        return super().made(make_optimizer)

    def step(self):
        for (p, master), buffer in zip(self.pairs(), self.buffers, strict=True):
            master.grad = None if p.grad is None else buffer.copy_(p.grad)
        self.optimizer.step()
        for p, master in self.pairs():
            self.write_back(p, master)
