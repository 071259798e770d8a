"""What this computer can do: cores, memory, bandwidth, FLOP/s by dtype, devices.

`probe()` measures once, in a few seconds, and remembers; `describe()` names the machine without
measuring. The figures are what a plain torch call reaches here and now, not a data sheet's: a busy
machine measures lower (`probe(refresh=True)` measures again).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB = 2**30
FORMAT = 2  # of the cached file: raise it when what is measured, or how, changes

# float16 is absent from the CPU's on purpose: one 2048-cubed product takes most of a minute there.
CPU_DTYPES = ("float32", "bfloat16", "int8")
ACCELERATOR_DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Device:
    """One processor with a memory of its own.

    name                 as torch spells it: "cpu", "cuda:0", "mps"
    read_bytes_per_s     reading 256 MiB (1 GiB off the CPU), more than most caches hold, all threads
    flops_per_s          dtype name -> rate of a square matrix product (int8: integer operations); a dtype
                         that has no such kernel here is absent
    copy_in_bytes_per_s  from ordinary (pageable) host memory; None for the CPU itself
    """

    name: str
    model: str
    memory_bytes: int
    read_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    copy_in_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Machine:
    """What was measured of this computer; `devices[0]` is the CPU."""

    system: str
    torch_version: str
    cores: int
    read_bytes_per_s_one_thread: float
    devices: tuple[Device, ...]

    def device(self, name: str = "cpu") -> Device:
        for device in self.devices:
            if device.name == name:
                return device
        names = ", ".join(device.name for device in self.devices)
        raise ValueError(f"no device {name!r} on this machine; it has {names}")

    def peak_flops_per_s(self, dtype: torch.dtype | str, *, device: str = "cpu") -> float:
        name = str(dtype).removeprefix("torch.")
        rates = self.device(device).flops_per_s
        if name not in rates:
            raise ValueError(f"no {name} rate was measured on {device}; measured: {', '.join(rates)}")
        return rates[name]

    def ridge(self, dtype: torch.dtype | str, *, device: str = "cpu") -> float:
        """FLOPs a byte at which the roofline turns: below it memory is the limit, above it arithmetic."""
        return self.peak_flops_per_s(dtype, device=device) / self.device(device).read_bytes_per_s

    def attainable_flops_per_s(
        self, dtype: torch.dtype | str, flops_per_byte: float, *, device: str = "cpu"
    ) -> float:
        """The roofline (Williams et al. 2009): the arithmetic rate, or intensity times bandwidth if lower."""
        memory_bound = flops_per_byte * self.device(device).read_bytes_per_s
        return min(self.peak_flops_per_s(dtype, device=device), memory_bound)

    def describe(self) -> str:
        """One line: processor, cores, memory, accelerators, torch."""
        cpu, *accelerators = self.devices
        return _one_line(
            cpu.model, self.cores, cpu.memory_bytes, self.torch_version, [each.model for each in accelerators]
        )


def describe() -> str:
    """One line that names this computer, without measuring it or importing torch."""
    return _one_line(cpu_model(), usable_cores(), memory_bytes(), version("torch"), [])


def _one_line(model: str, cores: int, size_bytes: int, torch_version: str, accelerators: list[str]) -> str:
    core_word = "core" if cores == 1 else "cores"
    parts = [model, f"{cores} {core_word}", f"{size_bytes / GIB:.0f} GiB", *accelerators]
    return ", ".join([*parts, f"torch {torch_version}"])


# ---------------------------------------------------------------- facts, read and not measured


@functools.cache
def cpu_model() -> str:
    """The processor's name, or its architecture where the system gives no name (many ARM systems)."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        return answer.stdout.strip() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.machine()


def usable_cores() -> int:
    """Cores this process may use, which in a container or under taskset are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit where that is lower."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [installed]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.access(path, os.R_OK):
            text = Path(path).read_text().strip()
            if text.isdigit():  # "max" where there is no limit
                limits.append(int(text))
    return min(limits)


# ---------------------------------------------------------------- measuring


def probe(refresh: bool = False) -> Machine:
    """What this computer can do: from the cache, or measured in a few seconds and cached.

    The cache is one JSON file for each machine and torch version, in `cache_folder()`. A damaged file is
    measured anew; a folder that cannot be written to is warned about.
    """
    path = cache_path()
    cached = None if refresh else _read(path)
    if cached is not None:
        return cached
    machine = measure()
    try:
        _write(path, machine)
    except OSError as error:
        warnings.warn(f"the measurement was not kept, so the next call measures again: {error}", stacklevel=2)
    return machine


def measure(*, seconds_per_rate: float = 0.25, buffer_bytes: int = 256 * 2**20) -> Machine:
    """Measure now. The buffer should exceed the processor's caches, or they are what is measured."""
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one_thread = _read_rate("cpu", buffer_bytes, seconds_per_rate)
        torch.set_num_threads(cores)
        devices = [_measure_device("cpu", cpu_model(), memory_bytes(), seconds_per_rate, buffer_bytes)]
        for name, model, size_bytes in _accelerators():
            devices.append(_measure_device(name, model, size_bytes, seconds_per_rate, 4 * buffer_bytes))
    finally:
        torch.set_num_threads(threads)
    system = f"{platform.system()} {platform.machine()}"
    return Machine(system, torch.__version__, cores, one_thread, tuple(devices))


def _accelerators() -> list[tuple[str, str, int]]:
    """(torch's name, model, memory in bytes) of each CUDA device, or of Apple's."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append((f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(("mps", f"{cpu_model()} GPU", torch.mps.recommended_max_memory()))
    return found


def _measure_device(
    name: str, model: str, size_bytes: int, seconds_per_rate: float, buffer_bytes: int
) -> Device:
    buffer_bytes = min(buffer_bytes, size_bytes // 32)
    rates = {}
    for dtype in CPU_DTYPES if name == "cpu" else ACCELERATOR_DTYPES:
        rate = _product_rate(name, dtype, seconds_per_rate)
        if rate is not None:
            rates[dtype] = rate
    read = _read_rate(name, buffer_bytes, seconds_per_rate)
    copy_in = None if name == "cpu" else _copy_in_rate(name, buffer_bytes, seconds_per_rate)
    return Device(name, model, size_bytes, read, rates, copy_in)


def _read_rate(device: str, buffer_bytes: int, seconds: float) -> float:
    """Bytes a second of the faster of two readers: a sum, and a matrix times a vector.

    On some processors one thread reads faster along many rows at once than along one: the sum alone would leave a
    decode step above "the bandwidth".
    """
    import torch

    columns = 1024
    matrix = torch.ones(max(1, buffer_bytes // (4 * columns)), columns, device=device)
    # One integer addition for eight bytes: no rate of arithmetic is in the way, not even on one thread.
    summed = matrix if device == "mps" else matrix.view(torch.int64)
    vector = torch.ones(columns, device=device)
    readers = (summed.sum, functools.partial(torch.mv, matrix, vector))
    return matrix.nbytes / min(_shortest_s(reader, device, seconds / 2) for reader in readers)


def _copy_in_rate(device: str, buffer_bytes: int, seconds: float) -> float:
    import torch

    source = torch.ones(buffer_bytes, dtype=torch.uint8)
    target = torch.empty_like(source, device=device)
    return buffer_bytes / _shortest_s(lambda: target.copy_(source), device, seconds)


def _product_rate(device: str, dtype: str, seconds: float) -> float | None:
    """Operations a second of an n x n product, 2 n^3 operations; None where torch has no such kernel.

    The best over sizes: n doubles until one product takes a tenth of the time given, so that a dtype
    without a fast kernel is measured on a small matrix instead of taking minutes.
    """
    import torch

    if device == "cpu" and dtype == "float16":
        raise AssertionError("a float16 product never reaches a CPU")
    best, size, shortest_s = 0.0, 128, 0.0
    while shortest_s < seconds / 10 and size <= 8192:
        left = torch.ones(size, size, device=device).to(getattr(torch, dtype))
        right = left.t()  # int8 kernels want the second factor by columns
        product = torch._int_mm if dtype == "int8" else torch.mm
        try:
            shortest_s = _shortest_s(functools.partial(product, left, right), device, seconds / 5)
        except (RuntimeError, NotImplementedError, TypeError):  # how torch says "not for this dtype here"
            return None
        best = max(best, 2 * size**3 / shortest_s)
        size *= 2
    return best


def _shortest_s(run: Callable[[], Any], device: str, seconds: float) -> float:
    """Shortest of the runs that fit into the time given, at least five, after one that warms up.

    The shortest, because whatever else runs here can only lengthen a run.
    """
    synchronize = _synchronize(device)
    run()
    synchronize()
    times_s: list[float] = []
    end = time.perf_counter() + seconds
    while len(times_s) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronize()
        times_s.append(time.perf_counter() - start)
    return min(times_s)


def _synchronize(device: str) -> Callable[[], object]:
    import torch

    if device.startswith("cuda"):
        return functools.partial(torch.cuda.synchronize, device)
    if device == "mps":
        return torch.mps.synchronize
    return lambda: None


def disk_read_bytes_per_s(folder: Path, *, size_bytes: int = 256 * 2**20) -> float | None:
    """Rate of reading a file in `folder` with the page cache emptied of it; None where that cannot be done.

    Writes `size_bytes` there and removes them again. A folder in memory (tmpfs) reads at memory speed, and
    a disk with a cache of its own may read from that.
    """
    block = os.urandom(8 * 2**20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(max(1, size_bytes // len(block))):
            file.write(block)
        os.fsync(file.fileno())
        if not _bypass_page_cache(file.fileno()):
            return None
        file.seek(0)
        target, read_bytes = bytearray(len(block)), 0
        start = time.perf_counter()
        while count := file.readinto(target):
            read_bytes += count
        return read_bytes / (time.perf_counter() - start)


def drop_from_page_cache(path: Path) -> bool:
    """Make the next read of a file come from its disk; False where this system does not let a user do that.

    The file is written out first. Pages that a process still maps stay where they are, and a file in memory (tmpfs)
    has nowhere else to be.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True


def _bypass_page_cache(descriptor: int) -> bool:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return True
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return True
    return False


# ---------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """LLMCOURSE_CACHE where it is set, else the user's cache folder of this system."""
    if chosen := os.environ.get("LLMCOURSE_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llmcourse"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcourse"


def cache_path() -> Path:
    """The file of this machine and torch: another processor, core count, device or version has another."""
    identity = [FORMAT, platform.system(), cpu_model(), usable_cores(), memory_bytes(), version("torch")]
    key = hashlib.sha256(json.dumps([*identity, _accelerators()]).encode()).hexdigest()[:16]
    return cache_folder() / f"machine-{key}.json"


def _write(path: Path, machine: Machine) -> None:
    """Beside the final name first, then renamed: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(machine), file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> Machine | None:
    """The cached measurement; None where there is none, or where the file is damaged."""
    try:
        return _from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_json(data: Any) -> Machine:
    devices = tuple(
        Device(
            name=_text(each["name"]),
            model=_text(each["model"]),
            memory_bytes=int(_positive(each["memory_bytes"])),
            read_bytes_per_s=_positive(each["read_bytes_per_s"]),
            flops_per_s={_text(name): _positive(rate) for name, rate in dict(each["flops_per_s"]).items()},
            copy_in_bytes_per_s=None
            if each["copy_in_bytes_per_s"] is None
            else _positive(each["copy_in_bytes_per_s"]),
        )
        for each in data["devices"]
    )
    if not devices or devices[0].name != "cpu":
        raise ValueError(f"the first device is the CPU, not {devices[:1]}")
    return Machine(
        system=_text(data["system"]),
        torch_version=_text(data["torch_version"]),
        cores=int(_positive(data["cores"])),
        read_bytes_per_s_one_thread=_positive(data["read_bytes_per_s_one_thread"]),
        devices=devices,
    )


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"a positive number is expected, not {value!r}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a string is expected, not {value!r}")
    return value
