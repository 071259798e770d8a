"""The learning rate of a step: warm-up, then a cosine, or a plateau and a straight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.exercise import alternative, case, excuse, exercise, mistake, raised


@exercise(
    points=2,
    minutes=6,
    extension=True,
    forbid=(
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.optim.lr_scheduler.LinearLR",
        "torch.optim.lr_scheduler.SequentialLR",
    ),
    hints=(
        "Three stretches, told apart by the step alone: warm-up, what lies between, the end and all beyond it. In the "
        "last two, say how far the decay has come, from 0 to 1, and turn that into a rate in one place.",
        "Try the joints by hand: steps 0, w - 1, w, T - 1 and T. Progress is counted from the step at which the decay "
        "starts, and divided by how many steps it lasts, not by all steps.",
    ),
)
def lr_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    kind: str = "cosine",
    floor: float = 0.0,
    decay_steps: int = 0,
) -> float:
    """Learning rate of one optimizer step, from its number alone; about 15 lines.

    Steps are counted from 0. Write w = warmup_steps, T = total_steps, d = decay_steps.

        step < w       warm-up: peak * (step + 1) / w, whatever the floor is. So step 0
                       has peak / w, not 0, and step w - 1 has peak. w = 0: no warm-up.
        w <= step < T  floor + (peak - floor) * shape(p), with a progress p in 0 .. 1:
            "cosine"   p = (step - w) / (T - w), shape(p) = (1 + cos(pi p)) / 2
            "wsd"      warm-up, stable, decay: p = 0 up to step T - d, then
                       p = (step - (T - d)) / d, shape(p) = 1 - p
        T <= step      floor, forever

    So step w still has peak, and step T is the first at the floor: of the T steps of a
    run, none has a rate of 0. Two numbers for peak 1, floor 0.1, T = 10 and w = 2:
    "cosine" gives 0.55 at step 6, "wsd" with d = 4 gives 0.325 at step 9.

    A pure function: the same step gives the same rate, in any order of calls, so that a
    run resumed at step 7,000 needs nothing but that number. Python floats throughout.

    ValueError for a negative step, w outside 0 .. T - 1, a kind other than "cosine" and
    "wsd", a floor outside 0 .. peak, a floor or peak of NaN, and d outside 1 .. T - w where
    kind is "wsd" ("cosine" does not look at d).
    """
    ### BEGIN SOLUTION
    if kind not in ("cosine", "wsd"):
        raise ValueError(f'kind is {kind!r}; expected "cosine" or "wsd"')
    if step < 0 or not 0 <= warmup_steps < total_steps:
        raise ValueError(f"step {step}, warmup_steps {warmup_steps}; expected 0.. and 0..{total_steps - 1}")
    if not 0 <= floor <= peak:
        raise ValueError(f"floor {floor}; expected between 0 and the peak, {peak}")
    length = total_steps - warmup_steps
    if kind == "wsd":
        if not 1 <= decay_steps <= length:
            raise ValueError(f"decay_steps {decay_steps}; expected 1..{length}")
        length = decay_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(max(step - (total_steps - length), 0) / length, 1.0)
    shape = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return floor + (peak - floor) * shape
    ### END SOLUTION


excuse(lr_at, "0 -> -1 #2", "a wsd without decay_steps is refused, whether that counts as 0 or as -1")
excuse(
    lr_at,
    "min(max(step - (total_steps - length), 0) / length, 1.0) -> "
    "min(1.0, max(step - (total_steps - length), 0) / length)",
    "the smaller of two numbers is the same in either order",
)
excuse(
    lr_at,
    "max(step - (total_steps - length), 0) -> max(0, step - (total_steps - length))",
    "the larger of two numbers is the same in either order",
)


# ---------------------------------------------------------------------------------------------------------- cases


def rates(answer, steps, **schedule):
    """The rates of the steps as one float64 tensor; as they came where one of them is no float."""
    found = [answer(step, **schedule) for step in steps]
    if not all(isinstance(rate, float) for rate in found):
        return found
    return torch.tensor(found, dtype=torch.float64)


def schedule_of(rng, kind):
    """A schedule in which no two stretches are equally long and the first warm-up steps lie above the floor."""
    warmup = rng.integer(3, 6)
    decay = warmup + rng.integer(2, 5)
    return {
        "peak": rng.integer(20, 90) / 1e4,
        "total_steps": warmup + decay + rng.integer(7, 12) + warmup,
        "warmup_steps": warmup,
        "kind": kind,
        "floor": rng.integer(1, 9) / 1e4,
        "decay_steps": decay if kind == "wsd" else 0,
    }


@case(lr_at)
def every_step_of_a_cosine(answer, rng):
    """Every step of a short run, in order, and the three after its end."""
    schedule = schedule_of(rng, "cosine")
    return rates(answer, range(schedule["total_steps"] + 3), **schedule)


@case(lr_at)
def every_step_of_a_plateau(answer, rng):
    """Every step of warm-up, stable, decay, in order, and the three after its end."""
    schedule = schedule_of(rng, "wsd")
    return rates(answer, range(schedule["total_steps"] + 3), **schedule)


@case(lr_at)
def without_a_warm_up(answer, rng):
    """No warm-up, and one of a single step, for both kinds."""
    found = {}
    for warmup in (0, 1):
        for kind in ("cosine", "wsd"):
            schedule = {**schedule_of(rng, kind), "warmup_steps": warmup}
            found[f"{kind}, warm-up of {warmup}"] = rates(
                answer, range(schedule["total_steps"] + 2), **schedule
            )
    return found


@case(lr_at)
def defaults(answer, rng):
    """No kind, floor, warm-up or decay is given: a cosine from the first step down to 0."""
    peak, total = rng.uniform(0.001, 0.1).item(), rng.integer(8, 14)
    return rates(answer, range(total + 2), peak=peak, total_steps=total)


@case(lr_at)
def two_runs_out_of_order(answer, rng):
    """Steps in random order, some of them twice, asked for two runs by turns."""
    one, other = schedule_of(rng, "cosine"), schedule_of(rng, "wsd")
    steps = rng.shuffled([*range(one["total_steps"]), *range(3, 9), *range(3)])
    return [[rates(answer, [step], **one), rates(answer, [step], **other)] for step in steps]


@case(lr_at)
def floor_above_the_first_steps(answer, rng):
    """The floor is higher than the first steps of the warm-up; then the floor is the peak."""
    found = {}
    for kind in ("cosine", "wsd"):
        high = {**schedule_of(rng, kind), "peak": 0.01, "floor": rng.integer(50, 90) / 1e4}
        found[f"{kind}, high"] = rates(answer, range(high["total_steps"] + 2), **high)
        level = {**high, "floor": high["peak"]}
        found[f"{kind}, level"] = rates(answer, range(level["total_steps"] + 2), **level)
    return found


@case(lr_at)
def stretches_of_one_step(answer, rng):
    """A decay of one step, one that takes all steps after the warm-up, and a warm-up of all steps but one."""
    plateau, cosine = schedule_of(rng, "wsd"), schedule_of(rng, "cosine")
    total, warmup = plateau["total_steps"], plateau["warmup_steps"]
    steps = range(total + 2)
    return {
        "decay of one step": rates(answer, steps, **{**plateau, "decay_steps": 1}),
        "decay of all steps": rates(answer, steps, **{**plateau, "decay_steps": total - warmup}),
        "cosine of one step": rates(
            answer, range(25), **{**cosine, "total_steps": 21, "warmup_steps": 20, "decay_steps": 500}
        ),
        "plateau of one step": rates(
            answer, steps, **{**plateau, "warmup_steps": total - 1, "decay_steps": 1}
        ),
    }


@case(lr_at)
def a_long_run(answer, rng):
    """Steps of a run of many millions, far into it and far beyond its end."""
    total = rng.integer(40_000_000, 60_000_000)
    found = {}
    for kind in ("cosine", "wsd"):
        schedule = {**schedule_of(rng, kind), "total_steps": total, "warmup_steps": rng.integer(2000, 9000)}
        schedule["decay_steps"] = total // 3
        steps = [rng.integer(low, low + total // 12) for low in range(0, total, total // 10)]
        found[kind] = rates(
            answer, [*steps, *(total * k + rng.integer(5, 500) for k in (1, 2, 7))], **schedule
        )
    return found


@case(lr_at)
def refused(answer, rng):
    """Arguments that make no schedule are refused; beside them, those that just do."""
    cosine, plateau = schedule_of(rng, "cosine"), schedule_of(rng, "wsd")
    total, warmup = plateau["total_steps"], plateau["warmup_steps"]
    step = rng.integer(warmup, warmup + 1)
    wrong = {
        "step -1": (-1, plateau),
        "far below 0": (-rng.integer(20, 90), cosine),
        "-1 and no warm-up": (-1, {**cosine, "warmup_steps": 0}),
        "warm-up of all steps": (step, {**cosine, "warmup_steps": cosine["total_steps"]}),
        "warm-up of more": (0, {**cosine, "warmup_steps": cosine["total_steps"] + rng.integer(1, 5)}),
        "warm-up of -1": (step, {**cosine, "warmup_steps": -1}),
        "warm-up of all steps of wsd": (step, {**plateau, "warmup_steps": total}),
        "no step": (0, {**cosine, "total_steps": 0, "warmup_steps": 0}),
        "kind linear": (step, {**plateau, "kind": "linear"}),
        "kind of none in the warm-up": (0, {**cosine, "kind": ""}),
        "kind in capitals": (step, {**cosine, "kind": "Cosine"}),
        "kind beyond the end": (total, {**plateau, "kind": "constant"}),
        "floor below 0": (step, {**cosine, "floor": -1e-5}),
        "floor above the peak": (0, {**cosine, "floor": cosine["peak"] * 1.01}),
        "floor of NaN": (step, {**plateau, "floor": math.nan}),
        "peak of NaN": (step, {**cosine, "peak": math.nan}),
        "peak of NaN in the warm-up": (0, {**plateau, "peak": math.nan, "floor": 0.0}),
        "peak below 0": (step, {**cosine, "peak": -1e-3, "floor": 0.0}),
        "decay of 0": (total, {**plateau, "decay_steps": 0}),
        "decay of 0 in the warm-up": (0, {**plateau, "decay_steps": 0}),
        "decay of -1": (step, {**plateau, "decay_steps": -1}),
        "decay into the warm-up": (step, {**plateau, "decay_steps": total - warmup + 1}),
    }
    return {
        "rates": rates(answer, range(3, total), **plateau),
        "cosine": rates(answer, [step, total], **{**cosine, "decay_steps": -5}),
        "peak of 0": raised(answer, step, **{**cosine, "peak": 0.0, "floor": 0.0}),
        "decay not given": raised(
            answer, warmup, peak=1.0, total_steps=total, warmup_steps=warmup, kind="wsd"
        ),
        **{name: raised(answer, step, **schedule) for name, (step, schedule) in wrong.items()},
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Run:
    """A right answer in small steps; a mistake replaces one of them."""

    def __init__(self, peak, total_steps, warmup_steps=0, kind="cosine", floor=0.0, decay_steps=0):
        self.peak, self.total, self.warmup = peak, total_steps, warmup_steps
        self.kind, self.floor, self.decay = kind, floor, decay_steps

    def refuse(self, step: int) -> None:
        self.refuse_step(step)
        self.refuse_warmup()
        self.refuse_kind()
        self.refuse_floor()
        self.refuse_decay()

    def refuse_step(self, step):
        if step < 0:
            raise ValueError("step")

    def refuse_warmup(self):
        if self.warmup < 0 or self.warmup >= self.total:
            raise ValueError("warmup_steps")

    def refuse_kind(self):
        if self.kind != "cosine" and self.kind != "wsd":
            raise ValueError("kind")

    def refuse_floor(self):
        if not (self.floor >= 0 and self.floor <= self.peak):
            raise ValueError("floor")

    def refuse_decay(self):
        if self.kind == "wsd" and not 0 < self.decay <= self.total - self.warmup:
            raise ValueError("decay_steps")

    def warming(self, step: int) -> float:
        return self.peak * (step + 1) / self.warmup

    def cosine_progress(self, step: int) -> float:
        return min(1.0, (step - self.warmup) / (self.total - self.warmup))

    def decay_start(self) -> int:
        return self.total - self.decay

    def decay_progress(self, step: int) -> float:
        return min(1.0, max(0.0, (step - self.decay_start()) / self.decay))

    def cosine(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    def straight(self, progress: float) -> float:
        return 1.0 - progress

    def shape(self, step: int) -> float:
        if self.kind == "cosine":
            return self.cosine(self.cosine_progress(step))
        return self.straight(self.decay_progress(step))

    def decayed(self, shape: float) -> float:
        return self.floor + (self.peak - self.floor) * shape

    def rate(self, step: int) -> float:
        self.refuse(step)
        if step < self.warmup:
            return self.warming(step)
        return self.decayed(self.shape(step))


def variant(**steps: Any) -> Callable[..., float]:
    """An answer with some steps replaced."""
    kind = type("Variant", (Run,), steps)
    return lambda step, **schedule: kind(**schedule).rate(step)


@mistake(
    lr_at,
    "Warms up with step / w: the first step has a rate of 0, and one step of the run is spent on nothing.",
)
def first_step_of_nothing(step, **schedule):
    return variant(warming=lambda self, step: self.peak * step / self.warmup)(step, **schedule)


@mistake(lr_at, "Warms up with (step + 1) / (w + 1): the last step of the warm-up is not at the peak yet.")
def one_step_too_slow(step, **schedule):
    return variant(warming=lambda self, step: self.peak * (step + 1) / (self.warmup + 1))(step, **schedule)


@mistake(
    lr_at,
    "Warms up to the end of the whole run, with (step + 1) / T: where the warm-up ends, the rate jumps to the peak.",
)
def warms_up_over_the_total(step, **schedule):
    return variant(warming=lambda self, step: self.peak * (step + 1) / self.total)(step, **schedule)


@mistake(lr_at, "Warms up from the floor instead of from 0; the floor is where the decay ends.")
def warms_up_from_the_floor(step, **schedule):
    def warming(self, step):
        return self.floor + (self.peak - self.floor) * (step + 1) / self.warmup

    return variant(warming=warming)(step, **schedule)


@mistake(lr_at, "Holds the floor in the warm-up too, as max(rate, floor); the warm-up starts below it.")
def warm_up_held_at_the_floor(step, **schedule):
    return max(variant()(step, **schedule), schedule.get("floor", 0.0))


@mistake(lr_at, "Leaves out the warm-up: the first steps have the peak, with moments that know nothing yet.")
def no_warm_up(step, **schedule):
    return variant(warming=lambda self, step: self.peak)(step, **schedule)


@mistake(lr_at, "Warms up along half a cosine; the statement has a straight line.")
def warms_up_along_a_cosine(step, **schedule):
    def warming(self, step):
        return self.peak * (1 - math.cos(math.pi * (step + 1) / self.warmup)) / 2

    return variant(warming=warming)(step, **schedule)


@mistake(
    lr_at,
    "Multiplies the warm-up by the decay, both counted from step 0: the peak is never reached.",
)
def warm_up_times_decay(step, **schedule):
    class Product(Run):
        def rate(self, step):
            self.refuse(step)
            warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
            over = Run(self.peak, self.total, 0, self.kind, self.floor, self.decay)
            if self.kind == "wsd":
                over.decay = self.total
            return over.decayed(over.shape(step)) * warm

    return Product(**schedule).rate(step)


@mistake(lr_at, "Counts steps from 1: every rate comes one step late.")
def counted_from_one(step, **schedule):
    variant()(step, **schedule)
    return variant()(max(step - 1, 0), **schedule)


@mistake(
    lr_at,
    "Runs the cosine over all T steps, those of the warm-up included: at the joint the rate falls off the peak.",
)
def cosine_over_the_total(step, **schedule):
    return variant(cosine_progress=lambda self, step: min(1.0, step / self.total))(step, **schedule)


@mistake(
    lr_at,
    "Counts the cosine from the end of the warm-up but divides by T: it never reaches the floor, and then jumps to it.",
)
def floor_never_reached(step, **schedule):
    def cosine_progress(self, step):
        return (step - self.warmup) / self.total if step < self.total else 1.0

    return variant(cosine_progress=cosine_progress)(step, **schedule)


@mistake(
    lr_at,
    "Divides by T - w but counts from step 0: the cosine is w steps ahead and reaches the floor before the end.",
)
def cosine_ahead_by_the_warm_up(step, **schedule):
    def cosine_progress(self, step):
        return min(1.0, step / (self.total - self.warmup))

    return variant(cosine_progress=cosine_progress)(step, **schedule)


@mistake(
    lr_at,
    "Lets the cosine reach the floor at step T - 1, one step early: with a floor of 0 the last step does nothing.",
)
def cosine_ends_one_step_early(step, **schedule):
    def cosine_progress(self, step):
        return min(1.0, (step - self.warmup) / max(self.total - 1 - self.warmup, 1))

    return variant(cosine_progress=cosine_progress)(step, **schedule)


@mistake(
    lr_at,
    "Divides the cosine by T - w - 1: the floor comes one step early, and a cosine of one step divides by 0.",
)
def cosine_in_fewer_steps(step, **schedule):
    def cosine_progress(self, step):
        return (step - self.warmup) / (self.total - self.warmup - 1) if step < self.total else 1.0

    return variant(cosine_progress=cosine_progress)(step, **schedule)


@mistake(lr_at, "Starts the cosine one step early: step w has already left the peak.")
def cosine_starts_one_step_early(step, **schedule):
    def cosine_progress(self, step):
        return min(1.0, (step + 1 - self.warmup) / (self.total - self.warmup))

    return variant(cosine_progress=cosine_progress)(step, **schedule)


@mistake(
    lr_at,
    "Does not hold the cosine's progress at 1: after the end of the run the rate climbs back to the peak.",
)
def cosine_rises_again(step, **schedule):
    def cosine_progress(self, step):
        return (step - self.warmup) / (self.total - self.warmup)

    return variant(cosine_progress=cosine_progress)(step, **schedule)


@mistake(
    lr_at, "Restarts after the end: the step is taken modulo T, and a run that goes on is warmed up anew."
)
def restarts(step, **schedule):
    variant()(step, **schedule)
    return variant()(step % schedule["total_steps"], **schedule)


@mistake(lr_at, "Returns 0 after the end instead of the floor.")
def nothing_after_the_end(step, **schedule):
    rate = variant()(step, **schedule)
    return rate if step < schedule["total_steps"] else 0.0


@mistake(lr_at, "Refuses steps after the end; a run that goes on stays at the floor.")
def refuses_after_the_end(step, **schedule):
    if step >= schedule["total_steps"]:
        raise ValueError("the run is over")
    return variant()(step, **schedule)


@mistake(lr_at, "Decays to 0: the floor is ignored.")
def floor_ignored(step, **schedule):
    return variant(decayed=lambda self, shape: self.peak * shape)(step, **schedule)


@mistake(
    lr_at,
    "Adds the floor on top of a full decay: the rate starts at peak + floor, above the peak.",
)
def floor_on_top(step, **schedule):
    return variant(decayed=lambda self, shape: self.floor + self.peak * shape)(step, **schedule)


@mistake(
    lr_at,
    "Decays towards 0 and cuts off at the floor, max(floor, rate): the floor is reached long before the end.",
)
def cut_off_at_the_floor(step, **schedule):
    return variant(decayed=lambda self, shape: max(self.floor, self.peak * shape))(step, **schedule)


@mistake(lr_at, "Takes the floor for a fraction of the peak; it is a learning rate itself.")
def floor_as_a_fraction(step, **schedule):
    def decayed(self, shape):
        return self.peak * (self.floor + (1 - self.floor) * shape)

    return variant(decayed=decayed)(step, **schedule)


@mistake(lr_at, "Returns a multiplier of the peak, as LambdaLR wants it, not the rate.")
def a_multiplier(step, **schedule):
    rate = variant()(step, **schedule)
    return rate / schedule["peak"] if schedule["peak"] else rate


@mistake(lr_at, "Gives the cosine degrees, 180 p; math.cos takes radians.")
def degrees(step, **schedule):
    return variant(cosine=lambda self, progress: (1 + math.cos(180 * progress)) / 2)(step, **schedule)


@mistake(lr_at, "Takes a quarter of the wave, cos(pi p / 2): flat at the peak and steep at the end.")
def a_quarter_of_the_wave(step, **schedule):
    def cosine(self, progress):
        return max(0.0, math.cos(math.pi / 2 * progress))

    return variant(cosine=cosine)(step, **schedule)


@mistake(
    lr_at, "Takes the whole wave, cos(2 pi p): down to the floor in the middle, and up again at the end."
)
def the_whole_wave(step, **schedule):
    def cosine(self, progress):
        return (1 + math.cos(2 * math.pi * progress)) / 2

    return variant(cosine=cosine)(step, **schedule)


@mistake(lr_at, "Takes the cosine itself, without (1 + cos) / 2: the rate goes below the floor, and below 0.")
def negative_half(step, **schedule):
    return variant(cosine=lambda self, progress: math.cos(math.pi * progress))(step, **schedule)


@mistake(lr_at, "Turns the cosine round, (1 - cos) / 2: the rate rises from the floor to the peak.")
def upside_down(step, **schedule):
    return variant(cosine=lambda self, progress: (1 - math.cos(math.pi * progress)) / 2)(step, **schedule)


@mistake(lr_at, "Decays along a straight line where the kind is cosine.")
def straight_for_both(step, **schedule):
    return variant(cosine=lambda self, progress: 1 - progress)(step, **schedule)


@mistake(lr_at, "Decays along a cosine where the kind is wsd; its decay is a straight line.")
def cosine_for_both(step, **schedule):
    return variant(straight=lambda self, progress: (1 + math.cos(math.pi * progress)) / 2)(step, **schedule)


@mistake(
    lr_at,
    "Decays as 1 - sqrt(p) where the kind is wsd; some runs do, but here the line is straight.",
)
def one_minus_the_root(step, **schedule):
    return variant(straight=lambda self, progress: 1 - math.sqrt(progress))(step, **schedule)


@mistake(
    lr_at, "Decays by a constant factor from peak to floor where the kind is wsd, not along a straight line."
)
def by_a_constant_factor(step, **schedule):
    class Factor(Run):
        def rate(self, step):
            self.refuse(step)
            if self.kind == "cosine" or step < self.warmup or not self.floor:
                return super().rate(step)
            return self.peak * (self.floor / self.peak) ** self.decay_progress(step)

    return Factor(**schedule).rate(step)


@mistake(lr_at, "Has no plateau where the kind is wsd: the line falls from the end of the warm-up on.")
def no_plateau(step, **schedule):
    def decay_progress(self, step):
        return min(1.0, (step - self.warmup) / (self.total - self.warmup))

    return variant(decay_progress=decay_progress)(step, **schedule)


@mistake(
    lr_at,
    "Puts the decay of wsd first: it starts right after the warm-up, lasts d steps, and the rest is at the floor.",
)
def decay_comes_first(step, **schedule):
    return variant(decay_start=lambda self: self.warmup)(step, **schedule)


@mistake(
    lr_at,
    "Starts the decay of wsd at step T: the d steps are added to the run instead of being its last ones.",
)
def decay_after_the_end(step, **schedule):
    return variant(decay_start=lambda self: self.total)(step, **schedule)


@mistake(
    lr_at,
    "Takes T - w - d, the length of the plateau, for the step at which it ends: the decay is w steps early.",
)
def plateau_counted_from_zero(step, **schedule):
    return variant(decay_start=lambda self: self.total - self.warmup - self.decay)(step, **schedule)


@mistake(lr_at, "Starts the decay of wsd one step early, so that the floor is reached at step T - 1.")
def decay_one_step_early(step, **schedule):
    return variant(decay_start=lambda self: self.total - self.decay - 1)(step, **schedule)


@mistake(
    lr_at,
    "Divides the decay of wsd by d - 1, so that step T - 1 has the floor: with a floor of 0 it does nothing.",
)
def decay_in_fewer_steps(step, **schedule):
    def decay_progress(self, step):
        return min(1.0, max(0.0, (step - self.decay_start()) / max(self.decay - 1, 1)))

    return variant(decay_progress=decay_progress)(step, **schedule)


@mistake(
    lr_at,
    "Divides the decay of wsd by d - 1: the floor comes one step early, and a decay of one step divides by 0.",
)
def decay_in_fewer_steps_or_none(step, **schedule):
    def decay_progress(self, step):
        if not self.decay_start() <= step < self.total:
            return float(step >= self.total)
        return (step - self.decay_start()) / (self.decay - 1)

    return variant(decay_progress=decay_progress)(step, **schedule)


@mistake(
    lr_at, "Does not hold the line of wsd at its end: the rate goes on falling, below the floor and below 0."
)
def below_the_floor(step, **schedule):
    def decay_progress(self, step):
        return max(0.0, (step - self.decay_start()) / self.decay)

    return variant(decay_progress=decay_progress)(step, **schedule)


@mistake(
    lr_at, "Never decays where the kind is wsd: the plateau goes on until the end and jumps to the floor."
)
def plateau_to_the_end(step, **schedule):
    def decay_progress(self, step):
        return 0.0 if step < self.total else 1.0

    return variant(decay_progress=decay_progress)(step, **schedule)


@mistake(
    lr_at,
    "Changes the rate in ten stairs, as once an epoch; it is a new one at every step.",
)
def in_stairs(step, **schedule):
    def cosine_progress(self, step):
        return math.floor(10 * Run.cosine_progress(self, step)) / 10

    def decay_progress(self, step):
        return math.floor(10 * Run.decay_progress(self, step)) / 10

    return variant(cosine_progress=cosine_progress, decay_progress=decay_progress)(step, **schedule)


COUNTED = {"calls": 0}


@mistake(
    lr_at,
    "Counts its calls instead of reading the step: a resumed run, or a second look at a step, gets another rate.",
)
def counts_its_calls(step, **schedule):
    rate = variant()(step, **schedule)
    COUNTED["calls"] = 0 if step == 0 else COUNTED["calls"] + 1
    return rate if COUNTED["calls"] == step else variant()(COUNTED["calls"], **schedule)


KEPT: dict[int, float] = {}


@mistake(
    lr_at,
    "Keeps the rates it has found by step alone: a second run with another schedule gets those of the first.",
)
def kept_by_step(step, **schedule):
    rate = variant()(step, **schedule)
    if step == 0 or step - 1 not in KEPT and step not in KEPT:
        KEPT.clear()
    return KEPT.setdefault(step, rate)


@mistake(
    lr_at,
    "Calculates in float32: beyond 16,777,216 steps it cannot tell one step from the next.",
)
def in_float32(step, **schedule):
    class Narrow(Run):
        def cosine_progress(self, step):
            done = torch.tensor(step).float() - self.warmup
            return (done / (self.total - self.warmup)).clamp(max=1).item()

        def decay_progress(self, step):
            done = torch.tensor(step).float() - self.decay_start()
            return (done / self.decay).clamp(0, 1).item()

    return Narrow(**schedule).rate(step)


@mistake(lr_at, "Takes w = 0 for a warm-up of one step: the decay starts one step late.")
def at_least_one_step_of_warm_up(step, **schedule):
    if schedule.get("warmup_steps") or schedule["total_steps"] < 2:
        return variant()(step, **schedule)
    return variant()(step, **{**schedule, "warmup_steps": 1})


@mistake(lr_at, "Divides by w without looking: a schedule without a warm-up ends in ZeroDivisionError.")
def needs_a_warm_up(step, **schedule):
    rate = variant()(step, **schedule)
    warm = (step + 1) / schedule.get("warmup_steps", 0)
    return schedule["peak"] * warm if warm < 1 else rate


@mistake(lr_at, "Takes every kind but cosine for wsd: a misspelt schedule trains with another one.")
def any_other_kind_is_wsd(step, **schedule):
    return variant(refuse_kind=lambda self: None)(step, **schedule)


@mistake(
    lr_at, "Looks at the kind only where it is needed: a misspelt one is found after the warm-up, or never."
)
def kind_looked_at_late(step, **schedule):
    class Late(Run):
        def refuse_kind(self):
            pass

        def shape(self, step):
            Run.refuse_kind(self)
            return super().shape(step)

    return Late(**schedule).rate(step)


@mistake(lr_at, "Takes a negative step for one of the warm-up, with a rate of 0 or below.")
def negative_steps(step, **schedule):
    return variant(refuse_step=lambda self, step: None)(step, **schedule)


@mistake(lr_at, "Lets the warm-up take all steps of the run, or more: the decay has none left.")
def warm_up_of_everything(step, **schedule):
    class Everything(Run):
        def refuse_warmup(self):
            if self.warmup < 0:
                raise ValueError("warmup_steps")

        def shape(self, step):
            return super().shape(step) if self.warmup < self.total else 0.0

    return Everything(**schedule).rate(step)


@mistake(lr_at, "Lets a floor be negative or above the peak: the rate changes its sign, or rises.")
def any_floor(step, **schedule):
    return variant(refuse_floor=lambda self: None)(step, **schedule)


@mistake(
    lr_at,
    "Asks whether the floor is below 0 or above the peak, and a NaN is neither: a peak of NaN is taken for one.",
)
def peak_of_nan(step, **schedule):
    def refuse_floor(self):
        if self.floor < 0 or self.floor > self.peak or math.isnan(self.floor):
            raise ValueError("floor")

    return variant(refuse_floor=refuse_floor)(step, **schedule)


@mistake(
    lr_at, "Does not look at decay_steps: a decay of 0 steps divides by 0, a long one starts in the warm-up."
)
def any_decay(step, **schedule):
    return variant(refuse_decay=lambda self: None)(step, **schedule)


@mistake(lr_at, "Refuses decay_steps that do not fit where the kind is cosine, which does not look at them.")
def decay_of_a_cosine_refused(step, **schedule):
    def refuse_decay(self):
        if not 0 <= self.decay <= self.total - self.warmup or (self.kind == "wsd" and not self.decay):
            raise ValueError("decay_steps")

    return variant(refuse_decay=refuse_decay)(step, **schedule)


@alternative(lr_at, "Squares the cosine of half the angle, and mixes peak and floor")
def squared_cosine(step, **schedule):
    return variant(
        cosine=lambda self, progress: math.cos(math.pi * progress / 2) ** 2,
        decayed=lambda self, shape: self.peak * shape + self.floor * (1 - shape),
    )(step, **schedule)


@alternative(lr_at, "Interpolates wsd from its corners, and takes the sine of the second half of a wave")
def from_corners(step, **schedule):
    class Corners(Run):
        def rate(self, step):
            self.refuse(step)
            if step >= self.total:
                return self.floor
            if self.kind == "wsd":
                left = (self.total - step) / self.decay
                return min(self.warming(step) if self.warmup else math.inf, self.peak, self.line(left))
            return super().rate(step)

        def line(self, left):
            return self.peak if left >= 1 else self.floor * (1 - left) + self.peak * left

        def cosine(self, progress):
            return (1 - math.sin(math.pi * (progress - 0.5))) / 2

    return Corners(**schedule).rate(step)


@alternative(lr_at, "Makes the whole table as a tensor in float64 where that is short, and looks the step up")
def from_a_table(step, **schedule):
    run = Run(**schedule)
    run.refuse(step)
    if run.total > 1000 or step >= run.total:
        return run.rate(step)
    steps = torch.arange(run.total, dtype=torch.float64)
    if run.kind == "cosine":
        shape = (1 + torch.cos(torch.pi * (steps - run.warmup) / (run.total - run.warmup))) * 0.5
    else:
        shape = ((run.total - steps) / run.decay).clamp(max=1)
    table: Tensor = torch.lerp(torch.full_like(shape, run.floor), torch.full_like(shape, run.peak), shape)
    table[: run.warmup] = torch.arange(1, run.warmup + 1, dtype=torch.float64) / max(run.warmup, 1) * run.peak
    return table[step].item()
