"""Specimen: an optimizer over several tensors and groups, with missing gradients, schedules and a resume."""

from __future__ import annotations

import io

import torch

from llmcourse.exercise import alternative, case, exercise, mistake, raised


@exercise(
    points=4,
    minutes=20,
    forbid=("torch.optim.AdamW", "torch.optim.Adam", "torch.optim.adamw.adamw", "torch.optim.adam.adam"),
)
class RowAdam(torch.optim.Optimizer):
    """Adam with decoupled decay that keeps one second moment a row: m and a mean of squares over the last dimension.

    RowAdam(params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0); params may be groups, each with its own options.
    ValueError when lr is negative. For each parameter p with a gradient g, at its own step t = 1, 2, ...:

        p <- p (1 - lr weight_decay)
        m <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) mean(g^2 over the last dimension, kept)
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    A parameter without a gradient is left as it is, and its t does not advance. Whatever a resume needs is in
    state_dict(). `step()` takes no closure. About 14 lines.
    """

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0) -> None:
        ### BEGIN SOLUTION
        if lr < 0:
            raise ValueError(f"expected lr >= 0, found {lr}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        ### END SOLUTION

    def step(self) -> None:
        ### BEGIN SOLUTION
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state, (b1, b2) = self.state[p], group["betas"]
                    t = state["t"] = state.get("t", 0) + 1
                    power = p.grad.square().mean(dim=-1, keepdim=True)
                    m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * p.grad
                    v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * power
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    root = (v / (1 - b2**t)).sqrt() + group["eps"]
                    p.sub_(group["lr"] * (m / (1 - b1**t)) / root)
        ### END SOLUTION


def started(answer, rng, **options):
    """(parameters of three shapes and scales, an optimizer over all of them)."""
    parameters = [torch.nn.Parameter(rng.normal(*shape)) for shape in ((3, 4), (2, 2, 5), (6,))]
    return parameters, answer(parameters, lr=rng.choice((0.05, 0.1)), **options)


def give_gradients(parameters, rng, missing=()):
    """Gradients of scales far apart, the first as small as eps, none for the parameters in `missing`."""
    for index, (parameter, size) in enumerate(zip(parameters, (1e-8, 1.0, 30.0), strict=True)):
        gradient = rng.normal(*parameter.shape) * size
        parameter.grad = None if index in missing else gradient


def values(parameters):
    return [parameter.detach().clone() for parameter in parameters]


@case(RowAdam)
def several_tensors(answer, rng):
    """Three tensors of several scales, four steps."""
    parameters, optimizer = started(answer, rng, weight_decay=rng.choice((0.1, 0.2)))
    seen = []
    for _ in range(4):
        give_gradients(parameters, rng)
        optimizer.step()
        seen.append(values(parameters))
    return seen


@case(RowAdam)
def groups(answer, rng):
    """Two groups with options of their own."""
    parameters, _ = started(answer, rng)
    optimizer = answer(
        [
            {"params": parameters[:1], "lr": 0.2, "weight_decay": 0.3, "betas": (0.5, 0.8)},
            {"params": parameters[1:], "eps": 0.1},
        ],
        lr=rng.choice((0.01, 0.02)),
    )
    for _ in range(3):
        give_gradients(parameters, rng)
        optimizer.step()
    return values(parameters)


@case(RowAdam)
def missing_gradients(answer, rng):
    """A parameter whose gradient is missing in some steps."""
    parameters, optimizer = started(answer, rng, weight_decay=0.2)
    for missing in ((1,), (0, 2), (1,), ()):
        give_gradients(parameters, rng, missing)
        optimizer.step()
    return values(parameters)


@case(RowAdam)
def schedule(answer, rng):
    """A learning rate that a scheduler changes between steps; one that is negative is refused."""
    parameters, optimizer = started(answer, rng)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for _ in range(3):
        give_gradients(parameters, rng)
        optimizer.step()
        scheduler.step()
    refused = raised(answer, parameters, lr=-rng.choice((0.1, 0.2)))
    return {"values": values(parameters), "refused": refused, "zero": raised(answer, parameters, lr=0.0)}


@case(RowAdam)
def before_the_pause(answer, rng):
    """Three steps, then everything is saved."""
    parameters, optimizer = started(answer, rng, weight_decay=0.1)
    for missing in ((), (2,), ()):
        give_gradients(parameters, rng, missing)
        optimizer.step()
    written = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "parameters": values(parameters)}, written)
    return {"values": values(parameters), "saved": written.getvalue()}


@case(RowAdam, after=before_the_pause)
def resumed(answer, rng, saved):
    """Three more steps in a new process that has only what was saved."""
    parameters, _ = started(answer, rng)
    optimizer = answer(parameters, lr=0.5)
    loaded = torch.load(io.BytesIO(saved), weights_only=True)
    optimizer.load_state_dict(loaded["optimizer"])
    with torch.no_grad():
        for parameter, value in zip(parameters, loaded["parameters"], strict=True):
            parameter.copy_(value)
    for missing in ((1,), (), ()):
        give_gradients(parameters, rng, missing)
        optimizer.step()
    return values(parameters)


class Written(torch.optim.Optimizer):
    """What the wrong answers below share; each changes one method."""

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0):
        if lr < 0:
            raise ValueError("negative")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, p.grad, group, self.state[p])

    def one(self, p, g, group, state):
        b1, b2 = group["betas"]
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(g[..., :1]))
        state["t"] = t = self.count(state)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        state["m"].lerp_(g, 1 - b1)
        state["v"].mul_(b2).add_(self.power(g), alpha=1 - b2)
        p.sub_(group["lr"] * self.direction(state, b1, b2, t, group["eps"]))

    def count(self, state):
        return state["t"] + 1

    def power(self, g):
        return g.square().mean(-1, keepdim=True)

    def direction(self, state, b1, b2, t, eps):
        return state["m"] / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + eps)


@mistake(RowAdam, "The decay is added to the gradient, so the second moment divides it away.")
class Coupled(Written):
    def one(self, p, g, group, state):
        g = g + group["weight_decay"] * p
        super().one(p, g, {**group, "weight_decay": 0.0}, state)


@mistake(RowAdam, "The moments start at zero and are not corrected for it.")
class Uncorrected(Written):
    def direction(self, state, b1, b2, t, eps):
        return state["m"] / (state["v"].sqrt() + eps)


@mistake(RowAdam, "eps is added under the root.")
class EpsUnderTheRoot(Written):
    def direction(self, state, b1, b2, t, eps):
        return state["m"] / (1 - b1**t) / (state["v"] / (1 - b2**t) + eps).sqrt()


@mistake(RowAdam, "One second moment serves the whole tensor.")
class OneMomentATensor(Written):
    def power(self, g):
        return g.square().mean().expand_as(g[..., :1])


@mistake(RowAdam, "Every element keeps its own second moment, as in plain Adam.")
class PlainAdam(Written):
    def one(self, p, g, group, state):
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        super().one(p, g, group, state)

    def power(self, g):
        return g.square()


@mistake(RowAdam, "One step count serves all parameters, also those that had no gradient.")
class OneCount(Written):
    def step(self):
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        super().step()

    def count(self, state):
        return self.param_groups[0]["count"]


@mistake(RowAdam, "A parameter without a gradient still decays.")
class DecaysWithoutGradient(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        super().step()


@mistake(RowAdam, "The options of the first group are used for all.")
class FirstGroupForAll(Written):
    def one(self, p, g, group, state):
        super().one(p, g, self.param_groups[0], state)


@mistake(RowAdam, "The learning rate is read once, so a scheduler changes nothing.")
class LearningRateReadOnce(Written):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr, **options)
        self.rates = [group["lr"] for group in self.param_groups]

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.rates = [group["lr"] for group in self.param_groups]

    def one(self, p, g, group, state):
        place = next(i for i, other in enumerate(self.param_groups) if other is group)
        super().one(p, g, {**group, "lr": self.rates[place]}, state)


@mistake(
    RowAdam,
    "The moments live in attributes that state_dict() does not hold, so a resume starts them at zero.",
)
class ForgetsOnResume(Written):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr, **options)
        self.moments = {}

    def one(self, p, g, group, state):
        super().one(p, g, group, self.moments.setdefault(p, {}))


@mistake(
    RowAdam, "The step count is not saved, so a resume corrects the moments as if they had just started."
)
class CountsAgainOnResume(Written):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["t"] = 0


@alternative(RowAdam, "Accumulates in place and folds both corrections into one step size")
class Folded(Written):
    def direction(self, state, b1, b2, t, eps):
        root = (1 - b2**t) ** 0.5
        return state["m"] * (root / (1 - b1**t)) / (state["v"].sqrt() + eps * root)


@alternative(RowAdam, "Sums squares and divides, keeps the count as a tensor, and steps with addcdiv")
class CountsWithTensors(Written):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "t" not in state:
                    state["t"] = torch.tensor(0, dtype=torch.int64)
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p.sum(-1))
                state["t"] += 1
                t = int(state["t"])
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])
                state["m"] += (p.grad - state["m"]) * (1 - b1)
                state["v"] += ((p.grad * p.grad).sum(-1) / p.shape[-1] - state["v"]) * (1 - b2)
                root = (state["v"] / (1 - b2**t)).sqrt().unsqueeze(-1).expand_as(p) + group["eps"]
                p.addcdiv_(state["m"], root, value=-group["lr"] / (1 - b1**t))
