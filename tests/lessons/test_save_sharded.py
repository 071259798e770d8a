"""save_sharded against the loaders of safetensors and transformers, and against crashes that are not simulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load_file, save
from torch import Tensor

from llmcourse import exercise, judging
from llmcourse.lessons.parameter_loading import save_sharded as lesson
from llmcourse.lessons.parameter_loading.save_sharded import INDEX, save_sharded
from tests.peers import peer

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def loaded(folder: Path) -> dict[str, Tensor]:
    """All names of a checkpoint, tied ones included, read with safetensors' own loader."""
    index = json.loads((folder / INDEX).read_text())
    found: dict[str, Tensor] = {}
    for shard in set(index["weight_map"].values()):
        part = load_file(folder / shard)
        assert part.keys() == {name for name, file in index["weight_map"].items() if file == shard}
        found |= part
    return found | {name: found[owner] for name, owner in index["metadata"]["tied"].items()}


def some_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(9, 8, generator=generator)
    return {
        "table": table,
        "tied": table,
        "turned": table.T,
        "cut": table[1::2, 2:5],
        "half": torch.randn(5, 7, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "none.too": torch.empty(0, 4),
        **{f"layers.{i}": torch.randn(40, generator=generator) for i in range(9)},
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_safetensors_loads_every_name_with_its_values(tmp_path: Path, seed: int) -> None:
    tensors = some_tensors(seed)
    shards = save_sharded(tensors, str(tmp_path), 1_000)
    assert equal(loaded(tmp_path), tensors)
    assert len(shards) > 2 and sorted(os.listdir(tmp_path)) == sorted([*shards, INDEX])


def test_a_shard_has_the_bytes_the_library_gives(tmp_path: Path, seed: int) -> None:
    for shard in save_sharded(some_tensors(seed), str(tmp_path), 1_000):
        raw = (tmp_path / shard).read_bytes()
        assert raw == save(load_file(tmp_path / shard), metadata={"format": "pt"})


@pytest.mark.parametrize("max_bytes", [400, 700, 1_000, 2_500, 100_000])
def test_files_keep_the_limit_unless_they_hold_one_tensor(tmp_path: Path, seed: int, max_bytes: int) -> None:
    for shard in save_sharded(some_tensors(seed), str(tmp_path), max_bytes):
        raw = (tmp_path / shard).read_bytes()
        assert len(raw) <= max_bytes or len(deserialize(raw)) == 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_the_checkpoint(tmp_path: Path, seed: int, tied: bool) -> None:
    transformers = peer("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    config.save_pretrained(tmp_path)
    assert len(save_sharded(model.state_dict(), str(tmp_path), 8_000)) > 2
    found, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        assert torch.equal(found.eval()(tokens).logits, model(tokens).logits)


def test_huggingface_hub_loads_the_checkpoint(tmp_path: Path, seed: int) -> None:
    hub = peer("huggingface_hub")
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(30, 30) for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    assert len(save_sharded(model.state_dict(), str(tmp_path), 5_000)) > 2
    other = torch.nn.Sequential(*[torch.nn.Linear(30, 30) for _ in range(4)])
    hub.load_torch_model(other, tmp_path, strict=True, safe=True)
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


# Forks a child for each operation, which ends there, nothing flushed and no handler run; says what is left each time.
CRASHES = """
import json, os, sys, torch
from llmcourse.lessons.parameter_loading.save_sharded import INDEX, save_sharded
from safetensors.torch import load_file

folder, operations = sys.argv[1], ["os.rename", "os.remove"]

def save_until(stop, value):
    seen = []
    def hook(event, arguments):
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if written or event in operations:
            seen.append(event)
            if len(seen) == stop:
                os._exit(9)
    sys.addaudithook(hook)
    save_sharded({f"layers.{i}": torch.full((60,), value) for i in range(5)}, folder, 700)
    os._exit(0)

def found():
    with open(os.path.join(folder, INDEX)) as file:
        shards = json.load(file)["weight_map"]
    return sorted({v for name, shard in shards.items() for v in load_file(os.path.join(folder, shard))[name].tolist()})

value, lines = 1.0, []
for stop in [0, *range(1, 99)]:
    before = found() if stop else []
    pid = os.fork()
    if pid == 0:
        save_until(stop, value)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines.append([stop, status, value, before, found()])
    value += 1
    if stop and status == 0:
        break
print(json.dumps(lines))
"""


def test_a_process_ended_before_any_operation_leaves_old_or_new(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CRASHES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, *ended, last = json.loads(done.stdout)
    assert first == [0, 0, 1.0, [], [1.0]] and last[1] == 0 and last[2:3] == last[4]
    # Three shards and the index are opened and renamed: 8 operations at least, and then the old shards are removed.
    assert len(ended) > 8 and {status for _, status, *_ in ended} == {9}
    replaced = [after == [value] for _, _, value, before, after in ended]
    assert all(after in (before, [value]) for _, _, value, before, after in ended)
    assert replaced == sorted(replaced) and any(replaced) and not all(replaced)
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("model-*.safetensors"))) == 3


def test_a_write_that_fails_at_any_byte_leaves_the_old_checkpoint(tmp_path: Path, seed: int) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes are POSIX's")
    tensors = some_tensors(seed)
    shards = save_sharded(tensors, str(tmp_path), 1_000)
    largest = max(os.path.getsize(tmp_path / name) for name in [*shards, INDEX])
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, largest, 37):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_sharded(other, str(tmp_path), 1_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert equal(loaded(tmp_path), tensors), limit
    save_sharded(other, str(tmp_path), 1_000)
    assert equal(loaded(tmp_path), other) and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------ the case's own judge


def test_the_judge_s_file_sizes_are_the_library_s(seed: int) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in some_tensors(seed).items()} | {
        "权重": torch.ones(3)
    }
    dtypes = {name: tensor["dtype"] for name, tensor in deserialize(save(tensors))}
    names = list(tensors)
    for count in range(1, len(names) + 1):
        part = {name: tensors[name] for name in names[:count]}
        assert lesson.file_bytes(part, dtypes) == len(save(part, metadata={"format": "pt"}))


def moments_of(*events: tuple[str, dict[str, tuple[int, int]]]) -> list[Any]:
    return [(event, [(name, *numbers) for name, numbers in names.items()]) for event, names in events]


def test_a_power_cut_loses_bytes_and_names_that_were_not_synced() -> None:
    a, b = {"a": (0, 0)}, {"a": (0, 0), "b.tmp": (1, 1)}
    renamed = {"a": (0, 0), "b": (1, 1)}
    events = [("change", a), ("change", b), ("synced 1", b), ("change", renamed)]
    states = list(lesson.crashes(moments_of(*events)))
    power = [state for who, state in states if who == "the power fails"]
    assert {"a": 0, "b.tmp": None} in power  # before its bytes were synced
    assert {"a": 0, "b": 1} in power and {"a": 0} in power  # the name may be lost, the bytes not
    assert {"a": 0, "b": None} not in power
    after = [*events, ("names synced", renamed), ("change", {"b": (1, 1)})]
    power = [state for who, state in lesson.crashes(moments_of(*after)) if who == "the power fails"]
    assert power[-1] == {"a": 0, "b": 1} and power[-2] == power[-1] and power[-3] == {"b": 1}


def test_a_power_cut_may_lose_one_name_and_keep_a_later_one() -> None:
    events = [
        ("change", {"i": (0, 0)}),
        ("change", {"i": (0, 0), "s": (1, 1)}),
        ("synced 1", {"i": (0, 0), "s": (1, 1)}),
    ]
    events += [("change", {"i": (2, 2), "s": (1, 1)}), ("synced 2", {"i": (2, 2), "s": (1, 1)})]
    events += [("change", {"i": (2, 2), "s": (1, 1), "x": (1, 1)})]
    power = [state for who, state in lesson.crashes(moments_of(*events)) if who == "the power fails"]
    assert {"i": 2, "x": 1} in power  # s is lost, what came after it is not


def test_the_recorder_sees_files_that_a_library_writes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    descriptor = os.open(tmp_path, os.O_RDONLY)
    with lesson.Recorder(str(tmp_path)) as recorder:
        save_file({"a": torch.ones(2)}, tmp_path / "b.tmp")
        os.fsync(descriptor)
        os.replace(tmp_path / "b.tmp", tmp_path / "b")
    os.close(descriptor)
    assert [(event, [name for name, _, _ in seen]) for event, seen in recorder.moments] == [
        ("change", []),
        ("names synced", ["b.tmp"]),
        ("change", ["b"]),
    ]
    assert os.fsync is not recorder._sync and lesson.RECORDERS == []


def test_saving_with_the_library_alone_earns_nothing(seed: int) -> None:
    hub = peer("huggingface_hub")

    def with_the_hub(tensors: dict[str, Tensor], folder: str, max_bytes: int) -> list[str]:
        copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        hub.save_torch_state_dict(copies, folder, max_shard_size=max_bytes)
        return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))

    found = exercise.of(save_sharded)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    verdict = judging.judge(runner, found, with_the_hub, seed, expected, naming=False)
    assert verdict.points == 0
    assert not any(result.agrees for result in verdict.results if result.item.kind == "case")
