"""stream_layers against a model that is all in memory, and its loads against a search for the fewest."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from llmcourse import exercise, judging
from llmcourse.figures import layer_loads
from llmcourse.lessons.parameter_loading import stream_layers as lesson
from llmcourse.lessons.parameter_loading.stream_layers import Device, stream_layers


def a_device(layers: int, budget: int, tokens: int, width: int = 4) -> Device:
    return Device(torch.randn(layers, width, width), budget=budget, tokens=tokens)


def outputs_of_the_whole_model(weights: Tensor, x: Tensor, tokens: int) -> Tensor:
    """Every token's output with all layers in memory."""
    outputs = []
    for _ in range(tokens):
        for weight in weights:
            x = x + weight @ x
            x = x / x.norm()
        outputs.append(x)
    return torch.stack(outputs)


@functools.cache
def fewest_loads(layers: int, budget: int, tokens: int, *, ahead: int) -> int:
    """By breadth-first search over all contents of memory: while layer i runs, i .. i + ahead must be there."""
    runs = layers * tokens
    best = {frozenset[int](): 0}
    for run in range(runs):
        needed = frozenset((run + later) % layers for later in range(ahead + 1) if run + later < runs)
        found: dict[frozenset[int], int] = {}
        for held, loads in best.items():
            missing = len(needed - held)
            for kept in itertools.combinations(
                sorted(held - needed), min(len(held - needed), budget - len(needed))
            ):
                now = needed | frozenset(kept)
                found[now] = min(found.get(now, loads + missing), loads + missing)
        best = found
    return min(best.values())


SIZES = [(n, k, tokens) for n in (2, 3, 5, 6) for k in range(2, n + 2) for tokens in (1, 2, 4)]


@pytest.mark.parametrize(("layers", "budget", "tokens"), SIZES)
def test_outputs_are_those_of_the_whole_model_within_the_budget(layers, budget, tokens, seed):
    torch.manual_seed(seed)
    device = a_device(layers, budget, tokens)
    x = torch.randn(4)
    outputs = stream_layers(device, budget, tokens, x)
    # Bit for bit: the same operations on the same float32 numbers in the same order.
    assert torch.equal(outputs, outputs_of_the_whole_model(device._weights, x, tokens))
    assert device.most_resident <= budget and device.runs == layers * tokens
    assert device.waits == 1 and device.loaded_in_vain == 0


@pytest.mark.parametrize(("layers", "budget", "tokens"), SIZES)
def test_loads_are_the_fewest_that_any_order_of_prefetches_needs(layers, budget, tokens):
    device = a_device(layers, budget, tokens)
    stream_layers(device, budget, tokens, torch.randn(4))
    assert device.loads == fewest_loads(layers, budget, tokens, ahead=1) <= device.most_loads


@pytest.mark.parametrize(("layers", "budget", "tokens"), SIZES)
def test_without_prefetch_belady_is_the_fewest_as_the_lesson_s_figure_counts_it(layers, budget, tokens):
    device = a_device(layers, budget, tokens)
    lesson.fewest_loads(device, budget, tokens, torch.randn(4))
    found = fewest_loads(layers, budget, tokens, ahead=0)
    assert device.loads == found
    if budget <= layers:
        assert layer_loads(n=layers, k=budget, tokens=tokens, policy="optimal") == found


def test_loads_of_32_layers_with_room_for_16_over_50_tokens():
    loads, waits = {}, {}
    for answer in (
        lesson.least_recently_used,
        lesson.nothing_ahead,
        lesson.fewest_loads,
        lesson.pinned,
        stream_layers,
    ):
        device = a_device(32, 16, 50)
        answer(device, 16, 50, torch.randn(4))
        assert device.most_resident == 16
        loads[answer.__name__], waits[answer.__name__] = device.loads, device.waits
    assert loads == {
        "least_recently_used": 1600,
        "nothing_ahead": 865,  # 15 layers stay, 17 pass through one place: 32 + 49 * 17
        "fewest_loads": 835,
        "pinned": 914,  # 14 stay, 18 pass through two places: 32 + 49 * 18
        "stream_layers": 864,
    }
    assert {name for name, count in waits.items() if count > 1} == {"nothing_ahead", "fewest_loads"}
    assert device.most_loads == 914


@pytest.mark.parametrize("budget", [1, 0, -1])
def test_a_budget_below_two_is_refused_before_anything_is_loaded(budget):
    device = a_device(3, 2, 1)
    with pytest.raises(ValueError, match="at least 2"):
        stream_layers(device, budget, 1, torch.randn(4))
    assert device.loads == device.runs == 0


def test_the_device_refuses_what_cannot_be():
    device = a_device(3, 2, 1)
    x = torch.randn(4)
    with pytest.raises(IndexError, match="no layer 3"):
        device.load(3)
    with pytest.raises(RuntimeError, match="load it first"):
        device.run(0, x)
    with pytest.raises(RuntimeError, match="load it first"):
        device.release(0)
    device.load(0)
    with pytest.raises(ValueError, match="already"):
        device.load(0)
    with pytest.raises(TypeError, match=r"float32 tensor \[4\]"):
        device.run(0, x.double())


def test_the_device_counts_waits_places_and_loads_in_vain():
    device = a_device(4, 2, 1)
    x = torch.randn(4)
    device.load(0)
    x = device.run(0, x)  # waits: nothing ran since the load
    device.load(1)
    device.load(2)
    device.run(0, x)
    device.run(1, x)  # was on its way while layer 0 ran
    device.load(3)
    device.release(2)  # never ran
    assert (device.waits, device.most_resident, device.loads, device.releases) == (1, 4, 4, 1)
    assert device.loaded_in_vain == 2
    device.run(3, x)
    assert (device.waits, device.loaded_in_vain) == (2, 1)


def test_what_the_service_saw_replaces_what_the_case_says():
    device = a_device(4, 2, 1)
    device.load(0)
    said = device.observed({"outputs": 1, "loads": [0, 99], "runs": [4, 4]})
    assert said["loads"] == [1, device.most_loads] and said["runs"] == [0, 4]
    assert device.observed(None) is None


def test_an_lru_cache_earns_nothing_and_no_prefetch_two_thirds(seed):
    found = exercise.of(stream_layers)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    for answer, points in ((lesson.least_recently_used, 0), (lesson.nothing_ahead, 2), (lesson.just_run, 3)):
        assert judging.judge(runner, found, answer, seed, expected, naming=False).points == points
