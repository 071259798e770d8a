from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from llmcourse import machine
from llmcourse.machine import Device, Machine

CPU = Device("cpu", "Example 9000", 16 * machine.GIB, 20e9, {"float32": 200e9, "bfloat16": 400e9})
GPU = Device("cuda:0", "Example GPU", 80 * machine.GIB, 2e12, {"bfloat16": 600e12}, copy_in_bytes_per_s=8e9)
EXAMPLE = Machine("Linux x86_64", "2.13.0", 4, 12e9, (CPU, GPU))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Replaces the measurement by an example; its length is how often it was asked for."""
    times: list[None] = []

    def measure() -> Machine:
        times.append(None)
        return EXAMPLE

    monkeypatch.setattr(machine, "measure", measure)
    return times


def test_measuring_gives_rates_of_every_dtype_and_leaves_the_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    found = machine.measure(seconds_per_rate=0.02, buffer_bytes=2**22)
    assert torch.get_num_threads() == threads
    assert found.devices[0].name == "cpu"
    assert {"float32", "bfloat16"} <= set(found.devices[0].flops_per_s) <= set(machine.CPU_DTYPES)
    rates = [found.read_bytes_per_s_one_thread, *found.devices[0].flops_per_s.values()]
    assert all(0 < rate < math.inf for rate in rates)
    assert found.cores == machine.usable_cores() <= (os.cpu_count() or 1)
    assert found.torch_version == torch.__version__


def test_a_float16_product_never_reaches_the_cpu() -> None:
    assert "float16" not in machine.CPU_DTYPES
    with pytest.raises(AssertionError, match="float16"):
        machine._product_rate("cpu", "float16", 0.01)


def test_a_dtype_without_a_kernel_is_absent_and_does_not_stop_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert machine._product_rate("cpu", "int8", 0.01) is None
    device = machine._measure_device("cpu", "Example", 2**40, 0.01, 2**20)
    assert "int8" not in device.flops_per_s
    assert "float32" in device.flops_per_s


def test_a_slow_dtype_is_measured_on_a_small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def slow(left: torch.Tensor, right: torch.Tensor) -> None:
        sizes.append(left.shape[0])

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(machine, "_shortest_s", lambda run, *_: run() or 60.0)
    assert machine._product_rate("cpu", "float32", 0.25) == 2 * 128**3 / 60
    assert sizes == [128]


def test_the_ridge_is_arithmetic_over_bandwidth() -> None:
    assert EXAMPLE.ridge("float32") == 10
    assert EXAMPLE.ridge(torch.bfloat16) == 20
    assert EXAMPLE.ridge("bfloat16", device="cuda:0") == 300
    assert EXAMPLE.attainable_flops_per_s("float32", 1) == 20e9
    assert EXAMPLE.attainable_flops_per_s("float32", 1000) == 200e9


def test_what_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no int8 rate was measured on cpu; measured: float32, bfloat16"):
        EXAMPLE.ridge(torch.int8)
    with pytest.raises(ValueError, match=r"no device 'mps' on this machine; it has cpu, cuda:0"):
        EXAMPLE.device("mps")


def test_a_machine_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        EXAMPLE.cores = 8  # type: ignore[misc]


def test_a_machine_is_described_in_one_line() -> None:
    assert EXAMPLE.describe() == "Example 9000, 4 cores, 16 GiB, Example GPU, torch 2.13.0"
    assert (
        replace(EXAMPLE, cores=1, devices=(CPU,)).describe() == "Example 9000, 1 core, 16 GiB, torch 2.13.0"
    )


def test_this_machine_is_described_without_importing_torch() -> None:
    program = (
        "import sys; from llmcourse.machine import describe; print(describe()); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    name, imported = run.stdout.splitlines()
    assert name == machine.describe()
    assert machine.cpu_model() in name
    assert torch.__version__ in name
    assert imported == "False"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Example 9000 @ 3 GHz\n", "Example 9000 @ 3 GHz"),
        ("processor\t: 0\nModel\t\t: Example Board 5\n", "Example Board 5"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", machine.platform.machine()),
    ],
    ids=["x86", "board", "nameless ARM"],
)
def test_the_processor_is_named_as_the_system_names_it(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert machine.cpu_model.__wrapped__() == name


def test_a_container_with_less_memory_counts_as_less(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "max\n")
    assert machine.memory_bytes() == installed
    monkeypatch.setattr(Path, "read_text", lambda path: f"{machine.GIB}\n")
    assert machine.memory_bytes() == machine.GIB


def test_the_probe_measures_once_and_again_when_asked(measured: list[None], cache: Path) -> None:
    assert machine.probe() == machine.probe() == EXAMPLE
    assert len(measured) == 1
    assert machine.probe(refresh=True) == EXAMPLE
    assert len(measured) == 2
    assert [path.name for path in cache.iterdir()] == [machine.cache_path().name]


def _without(name: str) -> str:
    data = machine.asdict(EXAMPLE)
    del data[name]
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\x01",
        _without("cores"),
        _without("devices"),
        json.dumps(machine.asdict(EXAMPLE) | {"devices": []}),
        json.dumps(machine.asdict(EXAMPLE) | {"devices": machine.asdict(EXAMPLE)["devices"][1:]}),
        json.dumps(machine.asdict(EXAMPLE) | {"cores": "4"}),
        json.dumps(machine.asdict(EXAMPLE) | {"cores": True}),
        json.dumps(machine.asdict(EXAMPLE) | {"system": None}),
        json.dumps(machine.asdict(EXAMPLE) | {"read_bytes_per_s_one_thread": 0}),
        json.dumps(machine.asdict(EXAMPLE) | {"read_bytes_per_s_one_thread": math.nan}),
        json.dumps(machine.asdict(EXAMPLE) | {"read_bytes_per_s_one_thread": math.inf}),
    ],
)
def test_a_damaged_cache_is_measured_anew(text: str, measured: list[None]) -> None:
    path = machine.cache_path()
    path.parent.mkdir()
    path.write_text(text)
    assert machine.probe() == EXAMPLE
    assert len(measured) == 1
    assert machine.probe() == EXAMPLE
    assert len(measured) == 1


def test_the_cache_knows_the_machine_and_the_torch_version(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {machine.cache_path()}
    changes = {
        "version": lambda package: "2.14.0",
        "cpu_model": lambda: "Another 9000",
        "usable_cores": lambda: 1000,
        "memory_bytes": lambda: 2**50,
        "_accelerators": lambda: [("cuda:0", "Example GPU", 2**36)],
    }
    for name, change in changes.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, name, change)
            paths.add(machine.cache_path())
    assert len(paths) == 1 + len(changes)


def test_a_folder_that_cannot_be_written_to_costs_a_warning_only(measured: list[None], cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="was not kept"):
        assert machine.probe() == EXAMPLE


def test_an_interrupted_write_leaves_the_old_file_and_no_part(
    measured: list[None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.probe()
    before = machine.cache_path().read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine.json, "dump", interrupt)
    with pytest.raises(KeyboardInterrupt):
        machine.probe(refresh=True)
    assert machine.cache_path().read_bytes() == before
    assert len(list(cache.iterdir())) == 1


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMCOURSE_CACHE")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert machine.cache_folder() == Path("/caches/llmcourse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert machine.cache_folder() == Path("/home/someone/.cache/llmcourse")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.cache_folder() == Path("/home/someone/Library/Caches/llmcourse")


def test_the_disk_is_read_whole_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = machine.disk_read_bytes_per_s(tmp_path, size_bytes=2**23)
    assert rate is None or 0 < rate < math.inf
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine, "_bypass_page_cache", lambda descriptor: False)
    assert machine.disk_read_bytes_per_s(tmp_path, size_bytes=2**23) is None


def test_a_file_dropped_from_the_page_cache_is_still_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 64)
    assert machine.drop_from_page_cache(file) is hasattr(os, "posix_fadvise")
    assert file.read_bytes() == bytes(range(256)) * 64
    monkeypatch.delattr(machine.os, "posix_fadvise", raising=False)
    assert machine.drop_from_page_cache(file) is False
    with pytest.raises(FileNotFoundError):
        monkeypatch.undo()
        machine.drop_from_page_cache(tmp_path / "absent")
