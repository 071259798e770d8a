"""The reference against a serial load of real files, and its ticks against a list schedule computed by hand."""

from __future__ import annotations

import heapq
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcourse.lessons.parameter_loading import load_parallel as lesson
from llmcourse.lessons.parameter_loading.load_parallel import Storage, load_parallel
from tests.peers import peer


def list_schedule(ticks: list[int], workers: int) -> int:
    """When the last job ends if each is begun in order by the worker that is free first."""
    free = [0] * workers
    heapq.heapify(free)
    for length in ticks:
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


def small_storage(ticks: list[int], workers: int, errors: dict[int, Exception] | None = None) -> Storage:
    held = {
        f"shard {index}.": {f"tensor {index}": torch.full((2,), float(index))} for index in range(len(ticks))
    }
    return Storage(held, ticks, workers, errors)


def test_a_list_schedule_computed_by_hand():
    assert list_schedule([10, 1, 1, 10, 1, 1], workers=3) == 11
    assert list_schedule([4, 2, 3], workers=1) == 9


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_ticks_are_those_of_the_list_schedule(seed, workers, monkeypatch):
    # The pool hands in its next read at once; a busy machine may take its time over that without failing this test.
    monkeypatch.setattr(lesson, "LATER", 10_000)
    draw = random.Random(seed)
    ticks = [draw.randint(1, 30) for _ in range(9)]
    storage = small_storage(ticks, workers)
    into: dict[str, torch.Tensor] = {}
    load_parallel(storage.read, storage.shards, workers, into)
    counts = storage.counts()
    counted, at_most = counts["ticks until the last read ended"]
    assert counted == list_schedule(ticks, workers)
    assert at_most is not None and counted <= at_most
    assert counts["reads at once"] == (workers, workers)
    assert storage.observed({})["reads of each"] == [1] * 9
    assert counts["shards never read"] == (0, 0)
    assert list(into) == [f"tensor {index}" for index in range(9)]


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_real_shards_come_out_as_a_serial_load_has_them(tmp_path, seed, workers):
    torch.manual_seed(seed)
    serial: dict[str, torch.Tensor] = {}
    for index in range(5):
        save_file(
            {f"block.{index}.{part}": torch.randn(3, 4) for part in "ab"}, tmp_path / f"{index}.safetensors"
        )
        serial |= load_file(tmp_path / f"{index}.safetensors")
    into: dict[str, torch.Tensor] = {"optimizer.step": torch.tensor(3)}
    shards = sorted(str(path) for path in tmp_path.iterdir())
    size_bytes = load_parallel(load_file, shards, workers, into)
    assert size_bytes == 5 * 2 * 12 * 4
    assert list(into) == ["optimizer.step", *serial]
    assert all(torch.equal(into[name], tensor) for name, tensor in serial.items())


def test_a_file_that_is_not_there_is_named_and_changes_nothing(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "first.safetensors")
    into = {"a": torch.zeros(2)}
    shards = [str(tmp_path / "first.safetensors"), str(tmp_path / "second.safetensors")]
    with pytest.raises(RuntimeError, match=r"second\.safetensors") as caught:
        load_parallel(load_file, shards, 2, into)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert into.keys() == {"a"} and torch.equal(into["a"], torch.zeros(2))


def test_a_name_in_two_shards_is_refused_whichever_is_read_first():
    for ticks in ([1, 9], [9, 1]):
        storage = Storage({"left": {"same": torch.ones(1)}, "right": {"same": torch.ones(1)}}, ticks, 2)
        into: dict[str, torch.Tensor] = {}
        with pytest.raises(ValueError, match="same is in left and in right"):
            load_parallel(storage.read, storage.shards, 2, into)
        assert not into


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_failing_shard_in_order_is_named_for_any_number_of_workers(workers):
    storage = small_storage([3, 30, 2, 2, *[2] * 20], workers, {1: OSError("slow"), 3: EOFError("quick")})
    with pytest.raises(RuntimeError, match=r"shard 1\. could not be read: slow"):
        load_parallel(storage.read, storage.shards, workers, {})
    begun, at_most = storage.counts()["reads begun after a failure"]
    assert begun is not None and at_most == workers and begun <= at_most


def test_the_storage_has_no_other_shards():
    with pytest.raises(FileNotFoundError, match="no shard is named 'other'"):
        small_storage([1], 1).read("other")


def test_shards_that_transformers_writes(tmp_path: Path, seed):
    transformers = peer("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    into: dict[str, torch.Tensor] = {}
    size_bytes = load_parallel(lambda shard: load_file(tmp_path / shard), shards, 3, into)
    assert size_bytes == index["metadata"]["total_size"]
    assert into.keys() == model.state_dict().keys()
    assert all(torch.equal(into[name], tensor) for name, tensor in model.state_dict().items())
