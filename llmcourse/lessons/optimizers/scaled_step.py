"""A step with scaled gradients: float16's small numbers are kept, its overflows are noticed, and the scale adapts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.exercise import alternative, case, exercise, mistake, raised
from llmcourse.lessons.optimizers.clip_by_global_norm import clip_by_global_norm


@exercise(
    points=3,
    minutes=10,
    extension=True,
    mutates=True,
    uses=(clip_by_global_norm,),
    forbid=(
        "torch.amp.GradScaler",
        "torch.amp.grad_scaler.GradScaler",
        "torch.cuda.amp.GradScaler",
        "torch.cpu.amp.GradScaler",
        "torch.cpu.amp.grad_scaler.GradScaler",
        "torch.cuda.amp.grad_scaler.GradScaler",
        "torch.ops.aten._amp_foreach_non_finite_check_and_unscale_",
        "torch.ops.aten._amp_update_scale_",
        "torch._amp_foreach_non_finite_check_and_unscale_",
        "torch._amp_update_scale_",
        "torch.nn.utils.clip_grad_norm_",
        "torch.nn.utils.clip_grad.clip_grad_norm_",
    ),
    hints=(
        "Two ways through: either everything happens (unscale, clip, step, schedule, count), or only the scale and the "
        "counter change. Find out which before anything is touched.",
        "A step with gradients of 0 is a step: momentum, weight decay and Adam's t move. The sum of finite numbers may "
        "be infinite.",
    ),
)
def scaled_step(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    scheduler: Any = None,
    max_norm: float | None = None,
    growth_interval: int = 2000,
) -> bool:
    """One optimizer step with gradients state["scale"] times too large; about 20 lines.

    In float16, gradients below 3e-8 become 0. So the loss was multiplied by a scale before
    backward(), and the optimizer's parameters (float32 or float64, in one or more groups)
    now have .grad in their own dtype, scale times too large; Inf or NaN where float16
    overflowed on the way. The .grad of some may be None: they are left as they are.

    state is a plain dict, {"scale": 65536.0, "good_steps": 0} when training starts; it is
    changed in place, and "scale" stays a Python float.

    All gradients are finite, in all groups:
        every gradient is divided by the scale, once; .grad holds true gradients then
        with a max_norm: they are clipped with clip_by_global_norm, over all groups together
        optimizer.step(), and after it scheduler.step() where there is a scheduler
        good_steps grows by 1; when it is growth_interval or more (a resumed run may have a
        shorter interval), the scale is doubled and good_steps is 0 again
        returns True

    Any element of any gradient is Inf or NaN: the step is skipped.
        neither optimizer.step() nor scheduler.step() is called: parameters, momentum, step
        counters and the learning rate stay as they were (what .grad holds does not matter)
        the scale is halved, good_steps is 0: only good steps in a row count
        returns False

    The scale has no bound here but that float32 holds it, 1 / scale and the true gradients.
    Zeroing gradients is the caller's.

    ValueError, before anything changes, also where the step would be skipped: no parameter
    has a gradient, a scale that is not finite and above 0, a growth_interval below 1, a
    max_norm that is not above 0 (0, negative, NaN).

    Micikevicius et al. 2018 (arXiv 1710.03740), sec. 3.2.
    """
    ### BEGIN SOLUTION
    if not 0 < state["scale"] < math.inf or growth_interval < 1:
        raise ValueError(
            f"scale {state['scale']}, growth_interval {growth_interval}; expected above 0, and 1.."
        )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm {max_norm}; expected a number above 0, or None")
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        raise ValueError("no parameter has a gradient; expected a backward() before the step")
    if not all(p.grad.isfinite().all() for p in parameters):
        state["scale"] *= 0.5
        state["good_steps"] = 0
        return False
    for p in parameters:
        p.grad.div_(state["scale"])
    if max_norm is not None:
        clip_by_global_norm(parameters, max_norm)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    state["good_steps"] += 1
    if state["good_steps"] >= growth_interval:
        state["scale"] *= 2.0
        state["good_steps"] = 0
    return True
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases

SHAPES = ((4, 7), (9,), (2, 3, 4), (1, 5))
SCALES = (2.0**16, 2.0**11, 2.0**20, 3000.0)


class Training:
    """Parameters in two groups, an optimizer, a schedule that changes the rate at every step, and a scale."""

    def __init__(self, rng, kind="adam", scale=None, good_steps=0, dtype=torch.float32, scheduled=True):
        self.rng, self.dtype = rng, dtype
        self.parameters = [torch.nn.Parameter(rng.normal(*shape, dtype=dtype)) for shape in SHAPES]
        groups = [
            {"params": self.parameters[:2], "weight_decay": 0.2},
            {"params": self.parameters[2:], "lr": rng.integer(3, 9) / 100},
        ]
        rate = rng.integer(3, 9) / 50
        if kind == "adam":
            self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=0.01)
        self.scheduler = None
        if scheduled:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.7**step)
        self.state = {"scale": scale or rng.choice(SCALES), "good_steps": good_steps}

    def backward(self, sizes=(1e-3, 1.0, 1e-8, 20.0), missing=()):
        """Gradients of several sizes, none smaller than a tenth of its tensor's, times the scale."""
        for index, (p, size) in enumerate(zip(self.parameters, sizes, strict=True)):
            sign = 2 * self.rng.integers(0, 1, *p.shape) - 1
            true = self.rng.uniform(0.2, 2, *p.shape, dtype=torch.float64) * sign * size
            p.grad = None if index in missing else (true * self.state["scale"]).to(self.dtype)

    def spoil(self, value, index=None):
        """One element of one gradient is not finite."""
        flat = self.parameters[self.rng.integer(0, 3) if index is None else index].grad.view(-1)
        flat[self.rng.integer(0, flat.numel() - 1)] = value

    def step(self, answer, **options):
        return answer(self.optimizer, self.state, scheduler=self.scheduler, **options)

    def seen(self, stepped, gradients=False):
        """What a call came to; gradients only after a step."""
        found = {
            "stepped": stepped,
            "state": dict(self.state),
            "rates": [float(group["lr"]) for group in self.optimizer.param_groups],
            "parameters": [p.detach().clone() for p in self.parameters],
        }
        if gradients:
            found["gradients"] = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        return found


@case(scaled_step)
def good_steps(answer, rng):
    """Two steps with gradients that are all finite, of plain descent with momentum and of AdamW."""
    found = []
    for kind in ("sgd", "adam"):
        training = Training(rng, kind)
        for _ in range(2):
            training.backward()
            found.append(training.seen(training.step(answer), gradients=True))
    return found


@case(scaled_step)
def overflows(answer, rng):
    """A good step, one with Inf, -Inf or NaN in one element of one tensor, and a good one again."""
    found = []
    for indices, kind in (((0, 1), "adam"), ((2, 3), "sgd")):
        index, value = rng.choice(indices), rng.choice((math.inf, math.nan))
        training = Training(rng, kind, good_steps=rng.integer(1, 5))
        training.backward()
        found.append(training.seen(training.step(answer)))
        training.backward()
        training.spoil(value, index)
        found.append(training.seen(training.step(answer)))
        training.backward()
        found.append(training.seen(training.step(answer), gradients=True))
    return found


@case(scaled_step)
def nan_inf_and_both_infinities(answer, rng):
    """Each kind of broken number by itself, Inf beside -Inf, all broken at once, and twice in a row."""
    found = []
    training = Training(rng, "adam", scale=2.0 ** rng.integer(14, 18), good_steps=rng.integer(1, 9))
    for values in rng.shuffled([(math.inf,), (-math.inf,), (math.nan,), (math.inf, -math.inf)]):
        training.backward()
        place, start = rng.integer(0, 3), rng.integer(0, 3)
        training.parameters[place].grad.view(-1)[start : start + len(values)] = torch.tensor(values)
        found.append(training.seen(training.step(answer)))
    training.backward()
    for p in training.parameters:
        p.grad.fill_(math.nan)
    found.append(training.seen(training.step(answer)))
    training.backward()
    found.append(training.seen(training.step(answer), gradients=True))
    return found


@case(scaled_step)
def the_scale_over_many_steps(answer, rng):
    """A growth interval of three over many steps: overflows after one, two and three good ones, and in a row."""
    training = Training(rng, "sgd", scale=2.0 ** rng.integer(9, 16), scheduled=False)
    found = []
    for word in ("ggg", "g", "b", "gg", "b", "ggg", "bb", "ggggggg", "b"):
        for letter in word:
            training.backward()
            if letter == "b":
                training.spoil(rng.choice((math.inf, math.nan)))
            stepped = training.step(answer, growth_interval=3)
            found.append([stepped, dict(training.state)])
    return {"steps": found, "end": training.seen(None)}


@case(scaled_step)
def a_shorter_interval(answer, rng):
    """good_steps is at growth_interval or above it already, as in a run that goes on with a shorter one."""
    found = []
    for good, interval in ((rng.integer(6, 7), 5), (rng.choice((9, 10)), 4), (3, 3)):
        training = Training(rng, "sgd", good_steps=good)
        for _ in range(2):
            training.backward()
            found.append(training.seen(training.step(answer, growth_interval=interval)))
    return found


@case(scaled_step)
def two_thousand_steps(answer, rng):
    """The growth interval that is not given is 2000: the scale around there; an interval of 1 doubles it each time."""
    found = []
    for good in (1997, 998):
        training = Training(rng, "sgd", good_steps=good)
        for _ in range(4):
            training.backward()
            found.append(training.seen(training.step(answer)))
    training = Training(rng, "sgd")
    for _ in range(3):
        training.backward()
        found.append(training.seen(training.step(answer, growth_interval=1)))
    return found


@case(scaled_step)
def scales_far_out(answer, rng):
    """Scales below 1, one that overflows brought there, and scales above 2^24: there is no bound."""
    found = []
    for scale in (1.0, 2.0**-3, 2.0**26):
        training = Training(rng, "sgd", scale=scale * rng.choice((1.0, 1.5)))
        for letter in "gbgb":
            training.backward()
            if letter == "b":
                training.spoil(math.inf)
            found.append(training.seen(training.step(answer, growth_interval=1), gradients=letter == "g"))
    return found


@case(scaled_step)
def clipped_when_unscaled(answer, rng):
    """A bound that true gradients are above, one that they are below, and an overflow with a bound."""
    found = []
    for bound in (0.3, 1e6):
        training = Training(rng, "sgd", dtype=torch.float64)
        training.backward()
        found.append(training.seen(training.step(answer, max_norm=bound * rng.integer(1, 2)), gradients=True))
    training = Training(rng, "adam")
    training.backward()
    found.append(training.seen(training.step(answer, max_norm=0.5)))
    training.backward()
    training.spoil(rng.choice((math.inf, math.nan)))
    found.append(training.seen(training.step(answer, max_norm=0.5)))
    training.backward()
    found.append(training.seen(training.step(answer, max_norm=0.5), gradients=True))
    return found


@case(scaled_step)
def large_and_finite(answer, rng):
    """Scaled gradients in the upper half of float32, and near its end: their squares are infinite, or their sum too."""
    found = []
    for kind in ("sgd", "adam"):
        training = Training(rng, kind, scale=2.0 ** rng.integer(76, 80))
        training.backward((1.0, 20.0, 0.1, 2.0))
        found.append(training.seen(training.step(answer), gradients=True))
        training.state["scale"] = 2.0 ** rng.integer(100, 110)
        training.backward((1e-3, 1.0, 20.0, 1e-6))
        for p in training.parameters[:2]:
            p.grad.uniform_(1.5e38, 3e38, generator=rng.generator)
        found.append(training.seen(training.step(answer), gradients=True))
    return found


@case(scaled_step)
def quiet_gradients(answer, rng):
    """True gradients far below what float16 holds: they are what the scale was for."""
    training = Training(rng, "sgd", scale=2.0**16)
    found = []
    for sizes in ((1e-9, 1e-8, 1e-7, 1e-10), (1e-12, 1e-9, 1e-11, 1e-8)):
        training.backward(sizes)
        found.append(training.seen(training.step(answer), gradients=True))
    return found


@case(scaled_step)
def missing_gradients(answer, rng):
    """Some parameters have no gradient, in good steps and in one that overflows; then none has, which is refused."""
    training = Training(rng)
    found = []
    for missing in ((1,), (0, 3), (2, 3), ()):
        training.backward(missing=missing)
        if missing == (0, 3):
            training.spoil(math.inf, 2)
        found.append(training.seen(training.step(answer), gradients=missing != (0, 3)))
    training.backward(missing=range(4))
    refused = raised(training.step, answer)
    found.append([refused, training.seen(None, gradients=True)])
    return found


@case(scaled_step)
def refused(answer, rng):
    """Scales, intervals and bounds that are none are refused, in good and in bad steps, and nothing changes."""
    found = {}
    training = Training(rng)
    for name, scale, interval, bound in (
        ("scale 0", 0.0, 5, None),
        ("scale below 0", -(2.0**16), 5, None),
        ("infinite scale", math.inf, 5, None),
        ("scale NaN", math.nan, 5, None),
        ("interval 0", 2.0**16, 0, None),
        ("interval -3", 2.0**16, -3, None),
        ("max_norm 0", 2.0**16, 5, 0.0),
        ("max_norm -1", 2.0**16, 5, -1.0),
        ("max_norm NaN", 2.0**16, 5, math.nan),
    ):
        for bad in (False, True):
            training.state["scale"] = 2.0**16
            training.backward()
            if bad:
                training.spoil(math.nan)
            training.state["scale"] = scale
            refused = raised(training.step, answer, growth_interval=interval, max_norm=bound)
            found[f"{name}, {bad}"] = [refused, training.seen(None, gradients=True)]
    training = Training(rng)
    training.backward()
    return {"a step": training.seen(training.step(answer), gradients=True), **found}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Scaled:
    """A right answer in small steps; a mistake replaces one of them."""

    def refuse(self, state: dict[str, Any], growth_interval: int) -> None:
        scale = state["scale"]
        if math.isnan(scale) or scale <= 0 or scale == math.inf:
            raise ValueError("scale")
        if growth_interval < 1:
            raise ValueError("growth_interval")

    def refuse_bound(self, max_norm: float | None) -> None:
        if max_norm is not None and (max_norm <= 0 or math.isnan(max_norm)):
            raise ValueError("max_norm")

    def parameters(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def refuse_nothing(self, parameters: list[Tensor]) -> None:
        if not parameters:
            raise ValueError("no gradient")

    def broken(self, parameters: list[Tensor]) -> bool:
        return any(self.is_broken(p.grad) for p in parameters)  # type: ignore[arg-type]

    def is_broken(self, gradient: Tensor) -> bool:
        return not bool(torch.isfinite(gradient).all())

    def unscale(self, gradient: Tensor, scale: float) -> None:
        gradient.mul_(1 / scale)

    def prepare(self, parameters: list[Tensor], scale: float, max_norm: float | None) -> None:
        for p in parameters:
            self.unscale(p.grad, scale)  # type: ignore[arg-type]
        self.clip(parameters, max_norm)

    def clip(self, parameters: list[Tensor], max_norm: float | None) -> None:
        if max_norm is not None:
            clip_by_global_norm(parameters, max_norm)

    def advance(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    def skipped(self, optimizer: torch.optim.Optimizer, scheduler: Any, parameters: list[Tensor]) -> None:
        pass

    def lower(self, state: dict[str, Any]) -> None:
        state.update(scale=state["scale"] / 2, good_steps=0)

    def count(self, state: dict[str, Any], growth_interval: int) -> None:
        state["good_steps"] += 1
        if not state["good_steps"] < growth_interval:
            state.update(scale=state["scale"] * 2, good_steps=0)

    def returned(self, stepped: bool) -> Any:
        return stepped

    def step(self, optimizer, state, *, scheduler=None, max_norm=None, growth_interval=2000):
        self.refuse(state, growth_interval)
        self.refuse_bound(max_norm)
        parameters = self.parameters(optimizer)
        self.refuse_nothing(parameters)
        if self.broken(parameters):
            self.skipped(optimizer, scheduler, parameters)
            self.lower(state)
            return self.returned(False)
        self.prepare(parameters, state["scale"], max_norm)
        self.advance(optimizer, scheduler)
        self.count(state, growth_interval)
        return self.returned(True)


def variant(**steps: Any) -> Callable[..., bool]:
    """An answer with some steps replaced."""
    return type("Variant", (Scaled,), steps)().step


@mistake(
    scaled_step,
    "Lowers the scale and steps all the same: one Inf in a gradient makes NaN of the weights.",
)
def steps_all_the_same(*arguments, **options):
    def skipped(self, optimizer, scheduler, parameters):
        self.advance(optimizer, scheduler)

    return variant(skipped=skipped)(*arguments, **options)


@mistake(scaled_step, "Never looks for Inf or NaN: every gradient is unscaled and used.")
def never_looks(*arguments, **options):
    return variant(broken=lambda self, parameters: False)(*arguments, **options)


@mistake(
    scaled_step,
    "Sets broken gradients to 0 and steps: momentum, weight decay and Adam's t move without a gradient.",
)
def steps_with_zeros(*arguments, **options):
    def skipped(self, optimizer, scheduler, parameters):
        for p in parameters:
            p.grad.zero_()
        optimizer.step()

    return variant(skipped=skipped)(*arguments, **options)


@mistake(
    scaled_step, "Replaces Inf and NaN by 0 and goes on as if nothing had happened; the scale never falls."
)
def broken_values_replaced(*arguments, **options):
    def broken(self, parameters):
        for p in parameters:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        return False

    return variant(broken=broken)(*arguments, **options)


@mistake(
    scaled_step,
    "Skips only the parameters whose own gradient is broken; the others take a step of an overflowed backward.",
)
def skips_some_parameters(*arguments, **options):
    def skipped(self, optimizer, scheduler, parameters):
        kept = {}
        for p in parameters:
            if self.is_broken(p.grad):
                kept[p], p.grad = p.grad, None
            else:
                self.unscale(p.grad, arguments[1]["scale"])
        self.advance(optimizer, scheduler)
        for p, gradient in kept.items():
            p.grad = gradient

    return variant(skipped=skipped)(*arguments, **options)


@mistake(
    scaled_step, "Advances the schedule in a skipped step too: the learning rate runs ahead of the optimizer."
)
def schedule_runs_ahead(*arguments, **options):
    def skipped(self, optimizer, scheduler, parameters):
        if scheduler is not None:
            scheduler.step()

    return variant(skipped=skipped)(*arguments, **options)


@mistake(scaled_step, "Never advances the schedule.")
def schedule_stands_still(*arguments, **options):
    return variant(advance=lambda self, optimizer, scheduler: optimizer.step())(*arguments, **options)


@mistake(scaled_step, "Advances the schedule before the step: every step has the rate of the next one.")
def schedule_first(*arguments, **options):
    def advance(self, optimizer, scheduler):
        if scheduler is not None:
            scheduler.step()
        optimizer.step()

    return variant(advance=advance)(*arguments, **options)


@mistake(scaled_step, "Skips the step and keeps the scale: the same overflow comes again and again.")
def scale_never_falls(*arguments, **options):
    return variant(lower=lambda self, state: state.update(good_steps=0))(*arguments, **options)


@mistake(
    scaled_step,
    "Does not reset the counter in a skipped step: good steps need not be in a row, and it grows too soon.",
)
def counter_survives_an_overflow(*arguments, **options):
    return variant(lower=lambda self, state: state.update(scale=state["scale"] / 2))(*arguments, **options)


@mistake(scaled_step, "Takes one off the counter in a skipped step instead of resetting it.")
def counter_falls_by_one(*arguments, **options):
    def lower(self, state):
        state.update(scale=state["scale"] / 2, good_steps=max(0, state["good_steps"] - 1))

    return variant(lower=lower)(*arguments, **options)


@mistake(scaled_step, "Does not reset the counter when the scale grows: it then grows at every step.")
def counter_survives_growth(*arguments, **options):
    def count(self, state, growth_interval):
        state["good_steps"] += 1
        if state["good_steps"] >= growth_interval:
            state["scale"] *= 2

    return variant(count=count)(*arguments, **options)


@mistake(scaled_step, "Counts skipped steps as good ones.")
def counts_every_step(*arguments, **options):
    def lower(self, state):
        state.update(scale=state["scale"] / 2, good_steps=state["good_steps"] + 1)

    return variant(lower=lower)(*arguments, **options)


@mistake(scaled_step, "Grows one step late: only when good_steps is above growth_interval.")
def grows_one_step_late(*arguments, **options):
    def count(self, state, growth_interval):
        Scaled.count(self, state, growth_interval + 1)

    return variant(count=count)(*arguments, **options)


@mistake(
    scaled_step, "Grows one step early: the step that is being taken is counted before it is compared, twice."
)
def grows_one_step_early(*arguments, **options):
    def count(self, state, growth_interval):
        Scaled.count(self, state, max(1, growth_interval - 1))

    return variant(count=count)(*arguments, **options)


@mistake(
    scaled_step,
    "Grows only where good_steps is growth_interval exactly: once it is above, the scale never grows again.",
)
def grows_at_the_interval_only(*arguments, **options):
    def count(self, state, growth_interval):
        state["good_steps"] += 1
        if state["good_steps"] == growth_interval:
            state.update(scale=state["scale"] * 2, good_steps=0)

    return variant(count=count)(*arguments, **options)


@mistake(
    scaled_step,
    "Takes good_steps modulo growth_interval: where it is above, the scale grows some steps late.",
)
def counts_modulo_the_interval(*arguments, **options):
    def count(self, state, growth_interval):
        state["good_steps"] = (state["good_steps"] + 1) % growth_interval
        if state["good_steps"] == 0:
            state["scale"] *= 2

    return variant(count=count)(*arguments, **options)


@mistake(scaled_step, "Never lets the scale grow: after a few overflows it is too small for good.")
def scale_never_grows(*arguments, **options):
    def count(self, state, growth_interval):
        state["good_steps"] = (state["good_steps"] + 1) % growth_interval

    return variant(count=count)(*arguments, **options)


@mistake(scaled_step, "Doubles the scale after every good step.")
def grows_at_every_step(*arguments, **options):
    return variant(
        count=lambda self, state, growth_interval: Scaled.count(self, state, state["good_steps"] + 1)
    )(*arguments, **options)


@mistake(scaled_step, "Turns the factors round: doubles after an overflow, halves after good steps.")
def factors_turned_round(*arguments, **options):
    def lower(self, state):
        state.update(scale=state["scale"] * 2, good_steps=0)

    def count(self, state, growth_interval):
        before = state["scale"]
        Scaled.count(self, state, growth_interval)
        if state["scale"] != before:
            state["scale"] = before / 2

    return variant(lower=lower, count=count)(*arguments, **options)


@mistake(
    scaled_step, "Never lets the scale fall below 1; gradients that overflow even then are never seen again."
)
def scale_of_at_least_one(*arguments, **options):
    def lower(self, state):
        state.update(scale=max(1.0, state["scale"] / 2), good_steps=0)

    return variant(lower=lower)(*arguments, **options)


@mistake(scaled_step, "Never lets the scale grow beyond 65536, where it started.")
def scale_of_at_most_the_first(*arguments, **options):
    def count(self, state, growth_interval):
        before = state["scale"]
        Scaled.count(self, state, growth_interval)
        state["scale"] = max(before, min(65536.0, state["scale"]))

    return variant(count=count)(*arguments, **options)


@mistake(scaled_step, "Keeps the scale as an int: below 1 it becomes 0.")
def scale_as_an_int(*arguments, **options):
    return variant(lower=lambda self, state: state.update(scale=int(state["scale"]) // 2, good_steps=0))(
        *arguments, **options
    )


@mistake(
    scaled_step,
    "Writes the new scale into a copy of state: the caller scales the next loss with the old one.",
)
def another_state(optimizer, state, **options):
    return variant()(optimizer, dict(state), **options)


@mistake(scaled_step, "Does not unscale: a learning rate 65,536 times too large. Adam nearly hides it.")
def never_unscaled(*arguments, **options):
    return variant(unscale=lambda self, gradient, scale: None)(*arguments, **options)


@mistake(
    scaled_step, "Unscales twice, before clipping and before the step: gradients are 65,536 times too small."
)
def unscaled_twice(*arguments, **options):
    def unscale(self, gradient, scale):
        gradient.div_(scale).div_(scale)

    return variant(unscale=unscale)(*arguments, **options)


@mistake(scaled_step, "Multiplies gradients by the scale once more instead of dividing by it.")
def scaled_twice(*arguments, **options):
    return variant(unscale=lambda self, gradient, scale: gradient.mul_(scale))(*arguments, **options)


@mistake(
    scaled_step,
    "Unscales in float16: small gradients become 0 again, and all of the scaling was for nothing.",
)
def unscaled_in_float16(*arguments, **options):
    def unscale(self, gradient, scale):
        gradient.copy_((gradient / scale).half())

    return variant(unscale=unscale)(*arguments, **options)


@mistake(
    scaled_step,
    "Updates the scale before it unscales: where the scale grows, gradients are divided by the new one.",
)
def divides_by_the_new_scale(*arguments, **options):
    class New(Scaled):
        def step(self, optimizer, state, *, scheduler=None, max_norm=None, growth_interval=2000):
            self.refuse(state, growth_interval)
            self.refuse_bound(max_norm)
            parameters = self.parameters(optimizer)
            self.refuse_nothing(parameters)
            if self.broken(parameters):
                self.lower(state)
                return False
            self.count(state, growth_interval)
            self.prepare(parameters, state["scale"], max_norm)
            self.advance(optimizer, scheduler)
            return True

    return New().step(*arguments, **options)


@mistake(scaled_step, "Divides by 65536, whatever the scale is by now.")
def divides_by_the_first_scale(*arguments, **options):
    return variant(unscale=lambda self, gradient, scale: gradient.div_(65536.0))(*arguments, **options)


@mistake(scaled_step, "Puts unscaled copies into a list and steps with what .grad still holds.")
def unscales_a_copy(*arguments, **options):
    def prepare(self, parameters, scale, max_norm):
        if max_norm is None:
            return
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = p.grad / scale
        self.clip(parameters, max_norm)
        for p, gradient in zip(parameters, kept, strict=True):
            factor = p.grad.abs().max() / (gradient.abs().max() / scale)
            p.grad = gradient * factor

    return variant(prepare=prepare)(*arguments, **options)


@mistake(
    scaled_step,
    "Clips before unscaling: scaled gradients are always above the bound, and what is left is divided once more.",
)
def clipped_before_unscaling(*arguments, **options):
    def prepare(self, parameters, scale, max_norm):
        self.clip(parameters, max_norm)
        for p in parameters:
            self.unscale(p.grad, scale)

    return variant(prepare=prepare)(*arguments, **options)


@mistake(scaled_step, "Does not clip: max_norm is not used.")
def not_clipped(*arguments, **options):
    return variant(clip=lambda self, parameters, max_norm: None)(*arguments, **options)


@mistake(scaled_step, "Clips every parameter by its own norm, not all of them together.")
def each_clipped_alone(*arguments, **options):
    def clip(self, parameters, max_norm):
        for p in parameters:
            Scaled.clip(self, [p], max_norm)

    return variant(clip=clip)(*arguments, **options)


@mistake(scaled_step, "Clips to a norm of 1 where no max_norm is given.")
def always_clipped(*arguments, **options):
    def clip(self, parameters, max_norm):
        clip_by_global_norm(parameters, 1.0 if max_norm is None else max_norm)

    return variant(clip=clip)(*arguments, **options)


@mistake(scaled_step, "Looks for NaN only; float16 overflows to Inf.")
def looks_for_nan_only(*arguments, **options):
    return variant(is_broken=lambda self, gradient: bool(gradient.isnan().any()))(*arguments, **options)


@mistake(scaled_step, "Looks for Inf only: Inf - Inf and 0 times Inf are NaN.")
def looks_for_inf_only(*arguments, **options):
    return variant(is_broken=lambda self, gradient: bool(gradient.isinf().any()))(*arguments, **options)


@mistake(scaled_step, "Compares with +Inf and NaN, and lets -Inf through.")
def minus_infinity_let_through(*arguments, **options):
    def is_broken(self, gradient):
        return bool((gradient.isnan() | (gradient == math.inf)).any())

    return variant(is_broken=is_broken)(*arguments, **options)


@mistake(scaled_step, "Skips only if every element is broken: all() where any() is meant.")
def skips_if_all_are_broken(*arguments, **options):
    return variant(is_broken=lambda self, gradient: not bool(gradient.isfinite().any()))(
        *arguments, **options
    )


@mistake(scaled_step, "Looks at the first parameter group only.")
def looks_at_the_first_group(*arguments, **options):
    first = arguments[0].param_groups[0]["params"]

    def broken(self, parameters):
        return any(self.is_broken(p.grad) for p in parameters if any(p is q for q in first))

    return variant(broken=broken)(*arguments, **options)


@mistake(
    scaled_step,
    "Unscales, clips and looks only at the first parameter group; the step then uses the others as they are.",
)
def first_group_only(*arguments, **options):
    def parameters(self, optimizer):
        return [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]

    def refuse_nothing(self, parameters):
        Scaled.refuse_nothing(self, Scaled.parameters(self, arguments[0]))

    return variant(parameters=parameters, refuse_nothing=refuse_nothing)(*arguments, **options)


@mistake(
    scaled_step,
    "Adds all elements up and looks whether the sum is finite: large gradients are finite, and their sum is not.",
)
def finite_by_the_sum(*arguments, **options):
    return variant(is_broken=lambda self, gradient: not bool(gradient.sum().isfinite()))(
        *arguments, **options
    )


@mistake(
    scaled_step,
    "Looks whether the norm is finite, in float32: squares of large gradients are Inf, and a good step is skipped.",
)
def finite_by_the_norm(*arguments, **options):
    def is_broken(self, gradient):
        return not bool(gradient.square().sum().sqrt().isfinite())

    return variant(is_broken=is_broken)(*arguments, **options)


@mistake(
    scaled_step,
    "Takes gradients above 65504 for overflows: they are float32 by now, and scaled ones may be large.",
)
def bound_of_float16(*arguments, **options):
    def is_broken(self, gradient):
        return not bool((gradient.abs() <= 65504).all())

    return variant(is_broken=is_broken)(*arguments, **options)


@mistake(scaled_step, "Expects every parameter to have a gradient.")
def expects_all_gradients(*arguments, **options):
    def parameters(self, optimizer):
        found = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.grad is None for p in found):
            raise AttributeError("a gradient is missing")
        return found

    return variant(parameters=parameters)(*arguments, **options)


@mistake(
    scaled_step, "Counts a step without any gradient as a good one, though no backward() came before it."
)
def good_without_gradients(*arguments, **options):
    return variant(refuse_nothing=lambda self, parameters: None)(*arguments, **options)


@mistake(scaled_step, "Does not look at the scale: divides by 0, NaN or Inf, and every gradient is lost.")
def any_scale(*arguments, **options):
    def refuse(self, state, growth_interval):
        if growth_interval < 1:
            raise ValueError("growth_interval")

    def unscale(self, gradient, scale):
        gradient.div_(scale)

    return variant(refuse=refuse, unscale=unscale)(*arguments, **options)


@mistake(scaled_step, "Accepts a growth_interval of 0 or below: the scale then never grows, or always.")
def any_interval(*arguments, **options):
    def refuse(self, state, growth_interval):
        Scaled.refuse(self, state, 1)

    return variant(refuse=refuse)(*arguments, **options)


@mistake(scaled_step, "Takes a max_norm of 0 for none, as `if max_norm` does.")
def bound_of_zero_is_none(optimizer, state, *, max_norm=None, **options):
    return variant()(optimizer, state, max_norm=max_norm or None, **options)


@mistake(
    scaled_step,
    "Leaves max_norm to clip_by_global_norm, which refuses it when gradients are divided already, and in a skipped "
    "step never.",
)
def bound_refused_late(*arguments, **options):
    return variant(refuse_bound=lambda self, max_norm: None)(*arguments, **options)


@mistake(scaled_step, "Grows after 1000 good steps where no interval is given.")
def interval_of_1000(optimizer, state, *, growth_interval=1000, **options):
    return variant()(optimizer, state, growth_interval=growth_interval, **options)


@mistake(scaled_step, "Returns whether the step was skipped, the other way round.")
def returns_skipped(*arguments, **options):
    return variant(returned=lambda self, stepped: not stepped)(*arguments, **options)


@mistake(scaled_step, "Returns the scale instead of whether there was a step.")
def returns_the_scale(*arguments, **options):
    variant()(*arguments, **options)
    return arguments[1]["scale"]


@mistake(
    scaled_step, "Drops the gradients after the step: zeroing is the caller's, who may want to look at them."
)
def drops_the_gradients(*arguments, **options):
    def advance(self, optimizer, scheduler):
        Scaled.advance(self, optimizer, scheduler)
        optimizer.zero_grad()

    return variant(advance=advance)(*arguments, **options)


@alternative(
    scaled_step,
    "Unscales first, looks at the largest magnitudes then, and drops the gradients of a skipped step",
)
def unscales_first(optimizer, state, **options):
    def broken(self, parameters):
        scale, found = state["scale"], False
        for p in parameters:
            p.grad.div_(scale)
            found = found or not p.grad.abs().max().item() < math.inf
        return found

    def skipped(self, optimizer, scheduler, parameters):
        optimizer.zero_grad()

    return variant(broken=broken, unscale=lambda self, gradient, scale: None, skipped=skipped)(
        optimizer, state, **options
    )


@alternative(scaled_step, "Multiplies a gradient by 0 to see what is left, and unscales in float64")
def times_zero(*arguments, **options):
    def is_broken(self, gradient):
        return bool((gradient * 0 != 0).any())

    def unscale(self, gradient, scale):
        gradient.copy_(gradient.double() / scale)

    return variant(is_broken=is_broken, unscale=unscale)(*arguments, **options)


@alternative(scaled_step, "Puts a new, unscaled tensor into .grad, and counts the steps that are left")
def new_tensors(*arguments, **options):
    def prepare(self, parameters, scale, max_norm):
        for p in parameters:
            p.grad = p.grad / scale
        self.clip(parameters, max_norm)

    def count(self, state, growth_interval):
        left = max(0, growth_interval - state["good_steps"] - 1)
        state["good_steps"] = growth_interval - left if left else 0
        state["scale"] *= 1.0 if left else 2.0

    return variant(prepare=prepare, count=count)(*arguments, **options)
