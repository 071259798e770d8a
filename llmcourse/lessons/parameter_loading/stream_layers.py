"""Run a model that is larger than memory: which layers stay, which pass through, and which is fetched next."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmcourse import agreement
from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake, raised


@exercise(
    points=3,
    minutes=15,
    extension=True,
    hints=(
        "Layers are visited in a circle: the layer that has just run is the one that is needed last of all. Ask, of "
        "every layer in memory, in how many runs it is needed, and never of the one that runs now.",
        "Make room before you load, not after; count with % at the end of a token; and ask whether there is a next run "
        "at all before you load for it.",
    ),
)
def stream_layers(device: Any, budget: int, tokens: int, x: Tensor) -> Tensor:
    """Run a model of which only `budget` layers fit into memory, token after token;
    about 15 lines.

    x [width] goes through layers 0 .. device.layers - 1. What the last layer gives is a
    token's output and, with nothing between, the input of the next token, which is
    therefore not known earlier. Each layer runs once a token. Returns the outputs of
    `tokens` (at least 1) tokens, [tokens, width], as if all layers were in memory.

    - device.load(layer) begins to copy a layer into memory and returns at once. The
      layer has a place there from this call until it is released; ValueError if it has
      one already, IndexError if there is no such layer.
    - device.run(layer, x) gives what the layer makes of x. RuntimeError if the layer
      has no place.
    - device.release(layer) frees the place. RuntimeError if there is none.

    Memory is empty at first; what is in it at the end may stay. The device counts and
    does not stop you:

    - At no moment do more than `budget` layers have a place, those that are still on
      their way included.
    - Where all layers fit, each is loaded once. Otherwise there are no more than
      device.layers + (tokens - 1) * (device.layers - budget + 2) loads.
    - Nothing is loaded in vain: whatever has been loaded runs before it is released,
      and before you return.
    - No run waits but the very first (a third of the points). Copying goes on while
      other layers run and takes as long as one run, so a run waits when no other run
      took place since its layer's load was called.

    ValueError for a budget below 2, before anything is loaded.
    """
    ### BEGIN SOLUTION
    if budget < 2:
        raise ValueError(f"budget {budget}; one layer runs while the next is loaded, so expected at least 2")
    device.load(0)
    resident, outputs, runs = {0}, [], tokens * device.layers
    for run in range(runs):
        layer, following = run % device.layers, (run + 1) % device.layers
        if following not in resident and run + 1 < runs:
            if len(resident) == budget:
                needed_last = max(resident, key=lambda each: (each - layer) % device.layers)
                device.release(needed_last)
                resident.remove(needed_last)
            device.load(following)
            resident.add(following)
        x = device.run(layer, x)
        if following == 0:
            outputs.append(x)
    return torch.stack(outputs)
    ### END SOLUTION


# ------------------------------------------------------------------------------------------------------ the device


class Device:
    """Layers in slow storage and a memory that holds some of them, on a clock of runs; counts all that is asked.

    weights [layers, width, width]: what layer i does to x is weights[i] @ x added to x, scaled to norm 1.
    """

    calls = ("load", "release", "run")

    def __init__(self, weights: Tensor, *, budget: int, tokens: int) -> None:
        self.layers, self.budget, self.tokens = len(weights), budget, tokens
        self.attributes = {"layers": self.layers, "asked": [budget, tokens], "width": weights.shape[-1]}
        self.asked, self.width = [budget, tokens], weights.shape[-1]
        self._weights = weights
        self._lock = threading.Lock()
        self._begun: dict[
            int, int
        ] = {}  # layer with a place -> how many runs there had been when it was loaded
        self._not_run: set[int] = set()
        self.loads = self.releases = self.runs = self.waits = self.most_resident = self._dropped_unused = 0

    def load(self, layer: int) -> None:
        """Give a layer a place and begin to copy it."""
        with self._lock:
            self._check(layer)
            if layer in self._begun:
                raise ValueError(f"layer {layer} has a place in memory already")
            self._begun[layer] = self.runs
            self._not_run.add(layer)
            self.loads += 1
            self.most_resident = max(self.most_resident, len(self._begun))

    def release(self, layer: int) -> None:
        """Take a layer's place away."""
        with self._lock:
            self._check_resident(layer)
            del self._begun[layer]
            self._dropped_unused += layer in self._not_run
            self._not_run.discard(layer)
            self.releases += 1

    def run(self, layer: int, x: Tensor) -> Tensor:
        """Output of a layer, [width] like its input."""
        with self._lock:
            self._check_resident(layer)
            if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.shape != (self.width,):
                raise TypeError(f"run({layer}, ...): expected a float32 tensor [{self.width}]")
            self.waits += self._begun[layer] == self.runs
            self.runs += 1
            self._not_run.discard(layer)
            y = x + self._weights[layer] @ x
            return y / y.norm()

    @property
    def loaded_in_vain(self) -> int:
        """Loads that no run has used."""
        return self._dropped_unused + len(self._not_run)

    @property
    def most_loads(self) -> int:
        """Loads that the exercise allows."""
        if self.budget >= self.layers:
            return self.layers
        return self.layers + (self.tokens - 1) * (self.layers - self.budget + 2)

    def observed(self, observed: Any) -> Any:
        """What the case saw beside what was seen here."""
        if not isinstance(observed, dict) or "observed" in observed:
            return observed
        return {
            **observed,
            "most layers resident": [self.most_resident, self.budget],
            "loads": [self.loads, self.most_loads],
            "loaded in vain": [self.loaded_in_vain, 0],
            "runs": [self.runs, self.tokens * self.layers],
        }

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return {
            "runs that wait": (self.waits, 1),
            "most layers resident": (self.most_resident, self.budget),
            "loads": (self.loads, self.most_loads),
            "loaded in vain": (self.loaded_in_vain, 0),
            "runs": (self.runs, self.tokens * self.layers),
        }

    def _check(self, layer: int) -> None:
        if type(layer) is not int or not 0 <= layer < self.layers:
            raise IndexError(f"no layer {layer!r}; expected one of 0..{self.layers - 1}")

    def _check_resident(self, layer: int) -> None:
        self._check(layer)
        if layer not in self._begun:
            raise RuntimeError(f"layer {layer} is not in memory; load it first")


def a_device(rng: Rng, layers: int, budget: int, tokens: int) -> Device:
    """A device with layers of width 4 that do not commute."""
    return Device(rng.normal(layers, 4, 4), budget=budget, tokens=tokens)


def half(rng: Rng) -> Device:
    """About half of the layers fit; enough layers and tokens that chance does not come near a good choice."""
    return a_device(rng, rng.integer(15, 17), rng.integer(7, 8), rng.integer(5, 6))


def two_places(rng: Rng) -> Device:
    """One layer runs, one is on its way, and there is room for no other."""
    return a_device(rng, rng.integer(3, 6), 2, rng.integer(2, 3))


def all_fit(rng: Rng) -> Device:
    """Every layer fits, perhaps with a place to spare."""
    layers = rng.integer(4, 6)
    return a_device(rng, layers, layers + rng.integer(0, 1), rng.integer(3, 4))


def all_but_one(rng: Rng) -> Device:
    """Every layer fits but one."""
    layers = rng.integer(6, 8)
    return a_device(rng, layers, layers - 1, rng.integer(4, 5))


def hardly_anything(rng: Rng) -> Device:
    """One token through one layer or two."""
    return a_device(rng, rng.integer(1, 2), 2, 1)


def longer(rng: Rng) -> Device:
    """About half of the layers fit; some more tokens."""
    return a_device(rng, rng.integer(8, 9), rng.integer(4, 5), 5)


# ---------------------------------------------------------------------------------------------------------- cases


def within_limits(observed: Any, expected: Any) -> str | None:
    """The same outputs; of everything counted no more than is allowed, and as many runs."""
    for key in expected:
        if key not in ("most layers resident", "loads", "loaded in vain", "runs"):
            reason = agreement.difference(observed[key], expected[key], path=key)
            if reason is not None:
                return reason
    for key in ("most layers resident", "loads", "loaded in vain"):
        if observed[key][0] > expected[key][1]:
            return f"{key}: at most {expected[key][1]}, found {observed[key][0]}"
    if observed["runs"][0] != expected["runs"][1]:
        return f"runs: expected {expected['runs'][1]}, found {observed['runs'][0]}"
    return None


def streamed(answer, rng, device):
    """The outputs for an input of the device's width."""
    return answer(device, *device.asked, rng.normal(device.width))


@case(stream_layers, service=half, judge=within_limits)
def half_of_it_fits(answer, rng, device):
    """About half of the layers fit into memory."""
    return {"outputs": streamed(answer, rng, device)}


@case(stream_layers, service=two_places, judge=within_limits)
def two_layers_fit(answer, rng, device):
    """Only two layers fit into memory: the one that runs and the next."""
    return {"outputs": streamed(answer, rng, device)}


@case(stream_layers, service=all_fit, judge=within_limits)
def everything_fits(answer, rng, device):
    """All layers fit into memory."""
    return {"outputs": streamed(answer, rng, device)}


@case(stream_layers, service=hardly_anything, judge=within_limits)
def one_token(answer, rng, device):
    """One token through a model of one or two layers."""
    return {"outputs": streamed(answer, rng, device)}


@case(stream_layers, service=all_but_one, judge=within_limits)
def one_too_many(answer, rng, device):
    """Budgets of 1 and 0, which are refused; then all layers but one fit into memory."""
    x = rng.normal(device.width)
    refused = [raised(answer, device, budget, 2, x) for budget in (1, 0)]
    return {"a budget of 1 and of 0": refused, "outputs": streamed(answer, rng, device)}


@cost(stream_layers, share=1 / 3, authority="protocol", service=longer)
def next_layer_is_fetched(answer, rng, device):
    """About half of the layers fit: no run but the first waits for its layer."""
    return {"observed": streamed(answer, rng, device)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives

Victim = Callable[[list[int], int], int]


def cached(
    device: Any,
    tokens: int,
    x: Tensor,
    *,
    room: int,
    victim: Victim,
    ahead: int = 1,
    in_vain: bool = False,
    wrap: bool = True,
    room_first: bool = True,
) -> Tensor:
    """A cache of `room` layers that fetches `ahead` layers ahead; `victim(resident, running)` makes room.

    resident: layers in memory, the one used longest ago first. in_vain: fetches after the last run as well;
    wrap=False: fetches nothing at the end of a token; room_first=False: releases after it has loaded.
    """
    resident: list[int] = []
    outputs: list[Tensor] = []
    last = device.layers - 1

    def fetch(layer: int, running: int) -> None:
        if layer in resident:
            return
        gone = victim(resident, running) if len(resident) >= room else None
        if gone is not None and room_first:
            device.release(gone)
        device.load(layer)
        if gone is not None:
            resident.remove(gone)
            if not room_first:
                device.release(gone)
        resident.append(layer)

    for run in range(tokens * device.layers):
        layer = run % device.layers
        fetch(layer, layer)
        resident.append(resident.pop(resident.index(layer)))
        for later in range(run + 1, run + 1 + ahead):
            if (in_vain or later < tokens * device.layers) and (wrap or layer != last):
                fetch(later % device.layers, layer)
        x = device.run(layer, x)
        if layer == last:
            outputs.append(x)
    return torch.stack(outputs)


def check(budget: int) -> None:
    if budget < 2:
        raise ValueError("at least 2")


def of_the(kept: Iterable[int]) -> Victim:
    """Any layer makes room but those kept and the one that runs; the one used longest ago first."""
    pinned = set(kept)
    return lambda resident, running: next(each for each in resident if each not in {*pinned, running})


def longest_ago(resident: list[int], running: int) -> int:
    return next(each for each in resident if each != running)


def needed_last(device: Any) -> Victim:
    """Belady's choice, among those that do not run."""
    return lambda resident, running: max(resident, key=lambda each: (each - running) % device.layers)


@mistake(
    stream_layers,
    "An LRU cache: in a circle, the layer used longest ago is the one that is needed soonest, so it never hits.",
    fails=["half_of_it_fits", "one_too_many", "next_layer_is_fetched"],
)
def least_recently_used(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=longest_ago)


@mistake(
    stream_layers,
    "Any layer makes room: chance hits now and then, and far less often than layers that stay.",
    fails=["half_of_it_fits", "one_too_many", "next_layer_is_fetched"],
)
def drawn_by_lot(device, budget, tokens, x):
    check(budget)
    lot = random.Random(0)

    def victim(resident, running):
        return lot.choice([each for each in resident if each != running])

    return cached(device, tokens, x, room=budget, victim=victim)


@mistake(
    stream_layers,
    "Everything that was loaded stays: the budget is not looked at.",
    fails=["half_of_it_fits", "two_layers_fit", "one_too_many", "next_layer_is_fetched"],
)
def nothing_released(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=device.layers, victim=longest_ago)


@mistake(
    stream_layers,
    "A layer is released once it has run, so that memory stays almost empty and every token loads everything again.",
    fails=["half_of_it_fits", "everything_fits", "one_too_many", "next_layer_is_fetched"],
)
def released_after_use(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=2, victim=longest_ago)


@mistake(
    stream_layers,
    "The memory is emptied after every token.",
    fails=["half_of_it_fits", "everything_fits", "one_too_many", "next_layer_is_fetched"],
)
def emptied_after_each_token(device, budget, tokens, x):
    check(budget)
    outputs = []
    for _ in range(tokens):
        fresh = Window(device)
        x = cached(fresh, 1, x, room=budget, victim=needed_last(device))[0]
        outputs.append(x)
        for layer in sorted(fresh.held):
            device.release(layer)
    return torch.stack(outputs)


class Window:
    """The device, and which layers were left in it."""

    def __init__(self, device):
        self.layers, self.run, self._device = device.layers, device.run, device
        self.held = set()

    def load(self, layer):
        self._device.load(layer)
        self.held.add(layer)

    def release(self, layer):
        self._device.release(layer)
        self.held.remove(layer)


@mistake(
    stream_layers,
    "All places but one are kept for layers that stay; the layer that runs and the one that comes need two.",
    fails=["half_of_it_fits", "two_layers_fit", "one_too_many", "next_layer_is_fetched"],
)
def a_place_too_few(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget + 1, victim=of_the(range(budget - 1)))


@mistake(
    stream_layers,
    "Loads the next layer first and makes room for it afterwards: for a moment there is one layer too many.",
    fails=["half_of_it_fits", "two_layers_fit", "one_too_many", "next_layer_is_fetched"],
)
def room_made_afterwards(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=needed_last(device), room_first=False)


@mistake(
    stream_layers,
    "Nothing is fetched ahead: a layer is loaded when its turn has come, and every load is waited for.",
    fails=["next_layer_is_fetched"],
)
def nothing_ahead(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=of_the(range(budget - 1)), ahead=0)


@mistake(
    stream_layers,
    "Nothing is fetched while a layer runs: a load is called for the layer that runs now, or after the run.",
    fails=["next_layer_is_fetched"],
)
def current_fetched(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=of_the(range(budget - 2)), ahead=0)


@mistake(
    stream_layers,
    "At the last layer nothing is fetched, as if the next token did not begin with layer 0.",
    fails=["next_layer_is_fetched"],
)
def wrap_forgotten(device, budget, tokens, x):
    check(budget)
    kept = range(device.layers - budget + 2, device.layers)
    return cached(device, tokens, x, room=budget, victim=of_the(kept), wrap=False)


@mistake(
    stream_layers,
    "After the last layer comes layer n, which does not exist: the end of a token is not counted with %.",
    fails=["half_of_it_fits", "two_layers_fit", "everything_fits", "one_too_many", "next_layer_is_fetched"],
)
def past_the_end(device, budget, tokens, x):
    check(budget)

    class Unwrapped:
        layers, run, release = device.layers, device.run, device.release

        def __init__(self):
            self.before = -1

        def load(self, layer):
            device.load(layer if layer or self.before < 0 else device.layers)
            self.before = layer

    return cached(Unwrapped(), tokens, x, room=2, victim=longest_ago)


@mistake(
    stream_layers,
    "At the very last layer it still fetches for a token that does not come.",
    fails=["half_of_it_fits", "two_layers_fit", "one_too_many", "next_layer_is_fetched"],
)
def fetched_in_vain(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=needed_last(device), in_vain=True)


@mistake(
    stream_layers,
    "Room is made by dropping the layer used last, which is the one that is about to run.",
    fails=["half_of_it_fits", "two_layers_fit", "one_too_many", "next_layer_is_fetched"],
)
def running_layer_dropped(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=lambda resident, running: running)


@mistake(
    stream_layers,
    "Every token starts from the first input, not from what the token before it gave.",
    fails=["half_of_it_fits", "two_layers_fit", "everything_fits", "one_too_many", "next_layer_is_fetched"],
)
def always_the_first_input(device, budget, tokens, x):
    check(budget)

    class Restarted:
        layers, load, release = device.layers, device.load, device.release

        def run(self, layer, given):
            return device.run(layer, given if layer else x)

    return cached(Restarted(), tokens, x, room=budget, victim=needed_last(device))


@mistake(
    stream_layers,
    "Each layer runs for all tokens before the next is loaded, which needs inputs that nobody has yet.",
    fails=["half_of_it_fits", "two_layers_fit", "everything_fits", "one_too_many", "next_layer_is_fetched"],
)
def all_tokens_at_each_layer(device, budget, tokens, x):
    check(budget)
    inputs = [x] * tokens
    device.load(0)
    for layer in range(device.layers):
        if layer + 1 < device.layers:
            device.load(layer + 1)
        inputs = [device.run(layer, each) for each in inputs]
        device.release(layer)
    return torch.stack(inputs)


@mistake(
    stream_layers,
    "Returns the last token's output alone.",
    fails=[
        "one_token",
        "half_of_it_fits",
        "two_layers_fit",
        "everything_fits",
        "one_too_many",
        "next_layer_is_fetched",
    ],
)
def last_output_only(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=needed_last(device))[-1]


@mistake(
    stream_layers,
    "Fetches two layers ahead, and pays for it with a place that a layer could keep.",
    fails=["half_of_it_fits", "next_layer_is_fetched"],
)
def two_ahead(device, budget, tokens, x):
    check(budget)
    ahead = min(2, budget - 1)
    kept = range(budget - 1 - ahead)
    if budget >= device.layers - 1:
        return cached(device, tokens, x, room=budget, victim=needed_last(device))
    return cached(
        device, tokens, x, room=budget, victim=lambda held, now: passing(held, now, kept, device), ahead=ahead
    )


def passing(resident: list[int], running: int, kept: Iterable[int], device: Any) -> int:
    """Of the layers that do not stay, the one needed last."""
    return max(set(resident) - set(kept), key=lambda each: (each - running) % device.layers)


@mistake(
    stream_layers,
    "The layers that pass through are loaded anew for each token, also where every layer fits.",
    fails=["one_token", "everything_fits"],
)
def passes_through_anyway(device, budget, tokens, x):
    check(budget)
    room = min(budget, device.layers - 1)
    return cached(device, tokens, x, room=room, victim=of_the(range(room - 2)))


@mistake(
    stream_layers,
    "A budget of one layer is not refused, though one layer runs while the next is on its way.",
    fails=["one_too_many"],
)
def budget_of_one(device, budget, tokens, x):
    return cached(device, tokens, x, room=budget, victim=needed_last(device))


@mistake(
    stream_layers,
    "Lets the layer before run once more for nothing, so that the next one has time to arrive.",
    fails=[
        "one_token",
        "half_of_it_fits",
        "two_layers_fit",
        "everything_fits",
        "one_too_many",
        "next_layer_is_fetched",
    ],
)
def runs_to_pass_the_time(device, budget, tokens, x):
    check(budget)
    kept, held, outputs = range(budget - 2), set(), []
    previous = device.layers - 1
    for _ in range(tokens):
        for layer in range(device.layers):
            if layer not in held:
                device.load(layer)
                held.add(layer)
                if previous in held:
                    device.run(previous, x)
            x = device.run(layer, x)
            if previous in held and previous not in {*kept, layer} and budget < device.layers:
                device.release(previous)
                held.remove(previous)
            previous = layer
        outputs.append(x)
    return torch.stack(outputs)


@alternative(stream_layers, "The first budget - 2 layers stay for good; the others pass through two places")
def pinned(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=of_the(range(budget - 2)))


@alternative(stream_layers, "The layers that stay are spread over the model")
def pinned_apart(device, budget, tokens, x):
    check(budget)
    kept = {each * device.layers // max(budget - 2, 1) for each in range(budget - 2)}
    return cached(device, tokens, x, room=budget, victim=of_the(kept))


@alternative(stream_layers, "The layer that ran just before makes room")
def just_run(device, budget, tokens, x):
    check(budget)
    return cached(
        device, tokens, x, room=budget, victim=lambda resident, running: (running - 1) % device.layers
    )


@alternative(stream_layers, "The layer of the highest number makes room, unless it runs")
def highest_number(device, budget, tokens, x):
    check(budget)
    return cached(
        device, tokens, x, room=budget, victim=lambda resident, running: max({*resident} - {running})
    )


@alternative(stream_layers, "A thread of its own calls load, one layer ahead")
def loaded_by_a_thread(device, budget, tokens, x):
    check(budget)

    class Threaded:
        layers, run, release = device.layers, device.run, device.release

        def load(self, layer):
            thread = threading.Thread(target=device.load, args=(layer,))
            thread.start()
            thread.join()

    return cached(Threaded(), tokens, x, room=budget, victim=needed_last(device))


@alternative(stream_layers, "Fewest loads of all, but nothing is fetched ahead", meets_costs=False)
def fewest_loads(device, budget, tokens, x):
    check(budget)
    return cached(device, tokens, x, room=budget, victim=needed_last(device), ahead=0)
