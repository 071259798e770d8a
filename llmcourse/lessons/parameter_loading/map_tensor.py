"""One tensor of a large safetensors file, mapped from the file: the rest of it is never read."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import math
import mmap
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from llmcourse.counting import (
    SAMPLE_INTERVAL_S,
    UNKNOWN_BYTES,
    MappedFiles,
    can_read_memory,
    is_running,
    memory_error_bytes,
    settle,
)
from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake, raised


@exercise(
    points=3,
    minutes=20,
    extension=True,
    forbid=(
        "safetensors.deserialize",
        "safetensors.safe_open",
        "safetensors._safetensors_rust.deserialize",
        "safetensors._safetensors_rust.safe_open",
        "safetensors.torch.deserialize",
        "safetensors.torch.safe_open",
        "safetensors.torch.load",
        "safetensors.torch.load_file",
        "safetensors.torch.load_model",
        "safetensors.numpy.deserialize",
        "safetensors.numpy.safe_open",
        "safetensors.numpy.load",
        "safetensors.numpy.load_file",
    ),
    hints=(
        "mmap.mmap with ACCESS_COPY maps a part of a file privately: nothing is read until a page is touched. "
        "torch.frombuffer makes a tensor of a map without a copy and keeps it. Slicing a map copies; never close it.",
        "A map begins at a multiple of mmap.ALLOCATIONGRANULARITY, so the tensor begins a little way into it. Take "
        "bytes first, then .view(dtype): numpy has no bfloat16. No bytes at all can be neither mapped nor viewed.",
    ),
)
def map_tensor(path: str, name: str) -> Tensor:
    """One tensor of a safetensors file by its name, mapped from the file instead of
    read; about 20 lines.

    The file is 8 bytes N (unsigned, little-endian), N bytes of JSON {name: {"dtype":
    ..., "shape": [...], "data_offsets": [begin, end]}} with or without `__metadata__`,
    then the data, from whose first byte offsets are counted. It is intact: what
    read_header refuses does not occur. The dtypes are F64 F32 F16 BF16 I64 I32 I16 I8
    U8 BOOL (torch.float64 ... torch.bool), F8_E4M3 (torch.float8_e4m3fn) and F8_E5M2
    (torch.float8_e5m2). Shape [] is one value; a 0 in a shape means no values and no
    bytes.

    Returns a contiguous, plain CPU tensor of this dtype and shape. Its storage holds
    its own bytes and no others, for torch.save writes whole storages. Its data_ptr() is
    a multiple of its item size; where the file's bytes do not lie so, for instance
    behind a tensor of 3 bytes, and only there, it is a copy. Large or small, every other
    tensor is mapped. No descriptor stays open once the tensor is gone.

    The map is private: the tensor can be written to, and that changes neither the file
    nor what other calls return. The file may be replaced (os.replace) or deleted
    meanwhile: tensors keep their values, later calls see the new file. Not handled: a
    file that is written to in place, which a private map may or may not show, or cut
    short, which ends the process.

    KeyError when the file has no tensor of that name, with the name in its message;
    `__metadata__` is no tensor.

    Costs are counted on a tensor of 8 MiB in a file of 32 MiB, all its values read (on
    Linux; elsewhere nothing is counted): at most 1 MiB through read calls and 2 MiB of
    memory beside the file's pages; and at most 10 MiB of the file's pages read or
    touched: to map more costs nothing. The library's own readers are switched off.
    """
    ### BEGIN SOLUTION
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
    dtypes |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
    dtypes |= {"I8": torch.int8, "U8": torch.uint8}

    with open(path, "rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(data_start - 8))
        header.pop("__metadata__", None)
        entry = header[name]
        dtype, shape = dtypes[entry["dtype"]], entry["shape"]
        start, end = (data_start + offset for offset in entry["data_offsets"])
        if start == end:
            return torch.empty(shape, dtype=dtype)
        lead = start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(file.fileno(), end - start + lead, access=mmap.ACCESS_COPY, offset=start - lead)

    raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=lead)
    if start % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry:
    """A tensor to be written: its name, dtype as the header writes it, shape, and how many bytes that makes."""

    def __init__(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        self.name, self.dtype, self.shape = name, dtype, list(shape)
        self.size_bytes = math.prod(shape) * DTYPES[dtype].itemsize

    def drawn(self, rng: Rng) -> bytes:
        """Bytes of random values; any byte but 0 and 1 would be no BOOL."""
        raw = rng.bytes(self.size_bytes)
        return bytes(byte & 1 for byte in raw) if self.dtype == "BOOL" else raw


def head(
    entries: Sequence[Entry],
    *,
    pad: int = 8,
    mixed: Rng | None = None,
    first: str | None = None,
    metadata: bool = True,
    compact: bool = False,
) -> bytes:
    """Length and header of a file whose tensors lie one after the other; the data begins `pad % 8` bytes off.

    With `mixed` the tensors, and `__metadata__` among them, stand in a drawn order, the one named `first` before all.
    """
    begin, found = 0, {}
    for entry in entries:
        end = begin + entry.size_bytes
        found[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    told = {"__metadata__": {"format": "pt"}, **found} if metadata else found
    names = mixed.shuffled(told) if mixed else list(told)
    names.sort(key=lambda name: name != first)
    ordered = {name: told[name] for name in names}
    text = json.dumps(ordered, ensure_ascii=compact, separators=(",", ":") if compact else None).encode()
    text += b" " * ((pad - len(text)) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: str,
    rng: Rng,
    entries: Sequence[Entry],
    *,
    pad: int = 8,
    first: str | None = None,
    metadata: bool = True,
    compact: bool = False,
) -> None:
    """Write a file of random values, its header in another order than its data, `first` before all others."""
    data = b"".join(entry.drawn(rng) for entry in entries)
    Path(path).write_bytes(
        head(entries, pad=pad, mixed=rng, first=first, metadata=metadata, compact=compact) + data
    )


def is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor's memory exists: touching memory of a map that was closed would end the process."""
    lead = tensor.data_ptr() % mmap.PAGESIZE
    first, size = ctypes.c_void_p(tensor.data_ptr() - lead), ctypes.c_size_t(tensor.nbytes + lead)
    return tensor.numel() == 0 or ctypes.CDLL(None).msync(first, size, MS_ASYNC) == 0


MS_ASYNC = 1  # on Linux and on macOS


def seen(result: Any, values: Callable[[Tensor], Any] | None = None) -> Any:
    """What is observed of a result: dtype, shape, its bytes or what `values` makes of them, how they lie in memory."""
    if not isinstance(result, Tensor):
        return result
    if not is_mapped(result):
        return "memory that is no longer mapped"
    return {
        "type": "Tensor" if type(result) is Tensor else f"a subclass, {type(result).__name__}",
        "device": result.device.type,
        "dtype": str(result.dtype),
        "shape": list(result.shape),
        "values": values(result) if values else result.detach().contiguous().reshape(-1).view(torch.uint8),
        "contiguous": result.is_contiguous(),
        "bytes beyond a multiple of the item size": result.data_ptr() % result.element_size(),
        "bytes of the storage": result.untyped_storage().nbytes(),
    }


@contextlib.contextmanager
def new_path():
    """A path in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"{folder}/model.safetensors"


def shape_of(rng: Rng) -> list[int]:
    return [rng.integer(2, 6) for _ in range(rng.integer(1, 3))]


@case(map_tensor)
def every_dtype(answer, rng):
    """A tensor of every dtype, behind one that fills more than a page."""
    entries = [Entry("first", "F64", [rng.integer(9_000, 12_000)])]
    entries += [Entry(f"{dtype}.权重", dtype, [2, *shape_of(rng), 4]) for dtype in rng.shuffled(DTYPES)]
    with new_path() as path:
        write(path, rng, entries, metadata=False)
        return {entry.name: seen(answer(path, entry.name)) for entry in rng.shuffled(entries[1:])}


@case(map_tensor)
def odd_places(answer, rng):
    """Tensors that begin where their dtype does not fit, behind tensors of some bytes or an unpadded header."""
    entries = []
    for dtype in rng.shuffled(["F64", "F32", "BF16", "I16", "F8_E4M3"]):
        entries.append(Entry(f"before {dtype}", "U8", [2 * rng.integer(20_000, 30_000) + 1]))
        entries.append(Entry(dtype, dtype, [8, rng.integer(2, 5)]))
    found = {}
    for pad in (8, 8 + rng.choice([1, 3, 5, 7])):
        with new_path() as path:
            write(path, rng, entries, pad=pad)
            found |= {f"{e.name}, {pad - 8}": seen(answer(path, e.name)) for e in entries if e.name in DTYPES}
    return found


@case(map_tensor)
def scalars_and_nothing(answer, rng):
    """Tensors of one value and of none, and a file without data."""
    width = rng.integer(2, 9)
    none = [
        Entry("none", "F32", [0]),
        Entry("no rows", "F64", [0, width]),
        Entry("no columns", "I8", [width, 0]),
    ]
    scalars = [Entry("scale", "BF16", []), Entry("step", "I64", []), Entry("one", "F32", [1, 1])]
    found = {}
    for entries in (rng.shuffled([*none, *scalars]), none):
        with new_path() as path:
            write(path, rng, entries, metadata=entries is none)
            found |= {f"{entry.name} of {len(entries)}": seen(answer(path, entry.name)) for entry in entries}
    return found


def found_or_refused(answer: Callable[..., Tensor], path: str, name: str) -> Any:
    """What is seen of the tensor; or the name of what is raised, and whether the tensor's name is in its message."""
    try:
        return seen(answer(path, name))
    except (LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        return [type(error).__name__, name in str(error)]


@case(map_tensor)
def unknown_names(answer, rng):
    """Names that no tensor has, and the one that stands first in the header, with and without `__metadata__`."""
    entries = [Entry(f"layers.{i}.{rng.bytes(2).hex()}", "F32", shape_of(rng)) for i in range(3)]
    found = {}
    for metadata in (True, False):
        with new_path() as path:
            name = rng.choice(entries).name
            write(path, rng, entries, first=name, metadata=metadata)
            wrong = {"longer": f"{name}.weight", "shorter": name[:-1], "metadata": "__metadata__"}
            asked = {"known": name, **wrong}
            found[f"metadata: {metadata}"] = {
                what: found_or_refused(answer, path, one) for what, one in asked.items()
            }
    return found


def overwrite(tensor: Tensor, data: bytes) -> bool:
    """Put bytes into the tensor's memory; False where it cannot be written to.

    A system call puts them there: where a plain store would end the process, it fails.
    """
    source, sink = os.pipe()
    try:
        os.write(sink, data)
        os.close(sink)
        library = ctypes.CDLL(None, use_errno=True)
        return library.read(source, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(len(data))) == len(
            data
        )
    finally:
        os.close(source)


@case(map_tensor)
def written_to(answer, rng):
    """A tensor is written to; then the file, an earlier and a later result of the same name are looked at."""
    entries = [Entry(name, "I32", [rng.integer(10, 20), 3]) for name in ("before", "wanted", "after")]
    with new_path() as path:
        write(path, rng, entries)
        earlier, tensor = answer(path, "wanted"), answer(path, "wanted")
        size_bytes = entries[1].size_bytes
        fits = isinstance(tensor, Tensor) and tensor.is_contiguous() and tensor.nbytes == size_bytes
        done = fits and overwrite(tensor, rng.bytes(size_bytes))
        return {
            "written": done,
            "tensor": seen(tensor),
            "earlier": seen(earlier),
            "later": seen(answer(path, "wanted")),
            "file": Path(path).read_bytes(),
        }


@case(map_tensor)
def replaced_and_deleted(answer, rng):
    """The file is replaced by another one, which is then deleted; tensors of both are in use."""
    entries = [Entry("other", "U8", [8 * rng.integer(1, 9)]), Entry("wanted", "F32", shape_of(rng))]
    with new_path() as path:
        write(path, rng, entries)
        old = answer(path, "wanted")
        write(f"{path}.new", rng, [entries[1], entries[0]])
        os.replace(f"{path}.new", path)
        new = answer(path, "wanted")
        os.remove(path)
        return {"old": seen(old), "new": seen(new)}


def lies_in(tensor: Any, path: str) -> bool | None:
    """Whether a tensor's memory is a map of the file, as Linux lists maps; None where there is no such list."""
    listed = Path("/proc/self/maps")
    if not listed.exists() or not isinstance(tensor, Tensor):
        return None
    inode = os.stat(path).st_ino
    for line in listed.read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, end = (int(bound, 16) for bound in fields[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return int(fields[4]) == inode
    return False


@case(map_tensor)
def mapped_wherever_it_fits(answer, rng):
    """Tensors of every dtype, at places that fit and at some that do not: which are mapped (on Linux)."""
    entries = [Entry("first", "U8", [8 * rng.integer(1, 99)])]
    for dtype in rng.shuffled(DTYPES):
        entries.append(Entry(dtype, dtype, [8, rng.integer(1, 5)]))
    entries += [Entry("one", "I64", []), Entry("large", "F32", [2, 4 * rng.integer(2_000, 3_000)])]
    entries += [Entry("half", "BF16", [2]), Entry("behind half", "F32", [2, 2]), Entry("odd", "I8", [3])]
    entries += [
        Entry("behind odd", "F16", [6, 1, 1]),
        Entry("bytes", "U8", [2, 5]),
        Entry("last", "F64", [1]),
    ]
    found = {}
    with new_path() as path:
        write(path, rng, entries)
        for entry in entries:
            tensor = answer(path, entry.name)
            found[entry.name] = [lies_in(tensor, path), seen(tensor)]
    return found


@case(map_tensor)
def many_tensors(answer, rng):
    """A header of more than 512 KiB, as compact as it can be, with names that are escaped in it."""
    entries = [Entry(f"layers.{i}.\u6743\u91cd.{rng.bytes(2).hex()}", "I16", [2, 1]) for i in range(6_000)]
    with new_path() as path:
        write(path, rng, entries, compact=True)
        return [seen(answer(path, rng.choice(entries).name)) for _ in range(2)]


@case(map_tensor)
def nothing_stays_open(answer, rng):
    """A few tensors are asked for and dropped: the descriptors that are open before and afterwards (on Linux)."""
    entries = [Entry("wanted", "I32", [rng.integer(2, 9), 4]), Entry("none", "F32", [0])]
    listed = Path("/proc/self/fd")
    with new_path() as path:
        write(path, rng, entries)
        answer(path, "wanted")
        gc.collect()
        before = len(list(listed.iterdir())) if listed.exists() else 0
        found = [seen(answer(path, name), torch.clone) for name in ("wanted", "none", "wanted")]
        refused = raised(answer, path, "unknown")
        gc.collect()
        after = len(list(listed.iterdir())) if listed.exists() else 0
    return {"found": found, "unknown": refused, "descriptors left open": after - before}


# ---------------------------------------------------------------------------------------------------------- costs

WANTED_BYTES, FILE_BYTES = 8 << 20, 32 << 20
READ_BOUND_BYTES = 1 << 20


class FileUse:
    """What a process reads, maps of one file and allocates from `start()` until its item ends, seen from outside.

    In bytes. Read calls are the growth of rchar in /proc/PID/io; the file's pages in memory are counted one by one,
    for RssFile grows by a library's as well, and also falls when the system is short of memory. Allocated is RssAnon
    with RssShmem, without the file where it lies on a tmpfs. Sampled about every millisecond. Nothing is counted where
    the system has no such numbers.
    """

    calls: ClassVar[tuple[str, ...]] = ("start", "look")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.folder: str | None = None  # where that process writes, if it is another
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = False
        self._lock = threading.Lock()
        self._file: MappedFiles | None = None
        self._lowest_bytes = self._highest_bytes = self._file_bytes = self._elsewhere_bytes = 0
        self._own_read_bytes = self._read_before = 0

    def start(self, path: str) -> None:
        """Watch from now on; path: of the file as the process sees it, without links. It need not exist yet."""
        if self._started:
            raise RuntimeError("start() was called twice; an item has one window")
        self._started = True
        if not can_read_memory() or self._rchar() is None:
            return
        self._file = MappedFiles(path, None if self.folder is None else self.pid)
        self._own_read_bytes = 0
        self._read_before = self._rchar() or 0
        self._lowest_bytes = self._highest_bytes = self._file.allocated_bytes()
        self._thread = threading.Thread(target=self._sample, name="file use", daemon=True)
        self._thread.start()

    def _rchar(self) -> int | None:
        try:
            text = Path("/proc", str(self.pid), "io").read_text()
        except OSError:  # no such file in this kernel, or not for this user
            return None
        self._own_read_bytes += len(text)
        return int(text.split()[1])

    def look(self, address: int = 0, size_bytes: int = 0) -> None:
        """Read the levels now; and how much of the memory from `address` on, where a result lies, is not the file's."""
        if self._thread is not None:
            with self._lock:
                assert self._file is not None
                self._elsewhere_bytes = max(
                    self._elsewhere_bytes, self._file.bytes_elsewhere(address, size_bytes)
                )
                self._file_bytes = max(self._file_bytes, self._file.resident_bytes())
                allocated = self._file.allocated_bytes()
                self._lowest_bytes = min(self._lowest_bytes, allocated)
                self._highest_bytes = max(self._highest_bytes, allocated)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_INTERVAL_S):
            try:
                self.look()
            except OSError:
                if is_running(self.pid):  # it hides something
                    self._highest_bytes = self._file_bytes = UNKNOWN_BYTES
                return
            except BaseException:
                self._highest_bytes = self._file_bytes = UNKNOWN_BYTES
                raise

    def end(self) -> tuple[int, int, int] | None:
        """(bytes through read calls, peak allocated, peak of the file mapped in); None where not counted."""
        if self._thread is None or self._file is None:
            return None
        self._done.set()
        self._thread.join()
        after = self._rchar()
        if after is None:
            return None
        # In a notebook the process reads its own counters, and that is counted as well.
        own = self._own_read_bytes + self._file.read_bytes if self.pid == os.getpid() else 0
        read = max(0, after - self._read_before - own)
        # Memory that the process had before, and copied into, has not grown.
        allocated = max(self._highest_bytes - self._lowest_bytes, self._elsewhere_bytes)
        return read, allocated, self._file_bytes

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return self.named(self.end())

    def named(self, found: tuple[int, int, int] | None) -> dict[str, tuple[float | None, float | None]]:
        """The counts of one cost with their bounds."""
        raise AssertionError("every cost names its own")


def room_bytes() -> int:
    """A quarter of the tensor, and what the system's counters are off by (up to another quarter)."""
    return WANTED_BYTES // 4 + min(memory_error_bytes(), WANTED_BYTES // 4)


class Copies(FileUse):
    """Bytes that were copied out of the file: by read calls, or from a map into memory."""

    def named(self, found: tuple[int, int, int] | None) -> dict[str, tuple[float | None, float | None]]:
        names = "bytes through read calls", "peak anonymous bytes"
        if found is None:
            return dict.fromkeys(names, (None, None))
        return {names[0]: (found[0], READ_BOUND_BYTES), names[1]: (found[1], room_bytes())}


class Reach(FileUse):
    """Bytes of the file that were read or mapped in."""

    def named(self, found: tuple[int, int, int] | None) -> dict[str, tuple[float | None, float | None]]:
        name = "bytes of the file read or mapped in"
        return {name: (None, None) if found is None else (found[0] + found[2], WANTED_BYTES + room_bytes())}


def sums(tensor: Tensor) -> Any:
    """The sum of every row and of every column of an I64 matrix; nothing else is made as large as the matrix."""
    if tensor.dim() != 2 or tensor.dtype != torch.int64:
        return "no matrix of I64"
    return [tensor.sum(0), tensor.sum(1)]


def sums_from_the_middle(answer, rng, watch):
    """What sums() gives of a tensor of 8 MiB in the middle of a file of 32 MiB, whose other parts are holes."""
    rest = FILE_BYTES - WANTED_BYTES
    before = 8 * rng.integer(rest // 32, rest // 16)
    rows = 1 << rng.integer(8, 12)
    entries = [
        Entry("before", "U8", [before]),
        Entry("wanted", "I64", [rows, WANTED_BYTES // 8 // rows]),
        Entry("after", "U8", [rest - before]),
    ]
    # As many different values as there are, though drawn as two vectors: their product wraps around.
    across, down = (rng.integers(1, 1 << 62, WANTED_BYTES >> 13) for _ in range(2))
    metadata = bool(rng.integer(0, 1))
    with new_path() as small:
        # What is imported, or mapped in of the libraries, by the first call is not counted.
        write(small, rng, [Entry("wanted", "I64", [64, 256])])
        seen(answer(small, "wanted"), sums)
        settle()
        with new_path() as path:
            # Before the file exists, so that nothing can have read it earlier: it is written in small parts.
            watch.start(os.path.realpath(path))
            start = len(head(entries, metadata=metadata)) + before
            with open(path, "wb") as file:
                file.write(head(entries, metadata=metadata))
                file.seek(start)
                for part in down.split(16):
                    file.write((part[:, None] * across).numpy())
                file.truncate(start - before + FILE_BYTES)
            result = answer(path, "wanted")
            observed = seen(result, sums)
            # While the result is there, and with it what it mapped in.
            watch.look(result.data_ptr(), result.nbytes) if isinstance(result, Tensor) else watch.look()
    return observed


@cost(map_tensor, share=1 / 6, authority="outside", service=lambda rng: Copies())
def nothing_copied(answer, rng, watch):
    """A tensor of 8 MiB is mapped, and all its values are read: what was copied out of the file."""
    return {"observed": sums_from_the_middle(answer, rng, watch)}


@cost(map_tensor, share=1 / 6, authority="outside", service=lambda rng: Reach())
def the_rest_left_alone(answer, rng, watch):
    """A tensor of 8 MiB is mapped, and all its values are read: how much of the file of 32 MiB was touched."""
    return {"observed": sums_from_the_middle(answer, rng, watch)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Mapping:
    """A right answer in small steps; a mistake replaces one of them."""

    types: ClassVar[dict[str, torch.dtype]] = DTYPES

    def header(self, file: Any) -> tuple[dict[str, Any], int]:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        return json.loads(file.read(data_start - 8)), data_start

    def entry(self, header: dict[str, Any], name: str) -> dict[str, Any]:
        if name == "__metadata__":
            raise KeyError(name)
        return header[name]

    def place(self, begin: int, end: int, data_start: int) -> tuple[int, int]:
        return data_start + begin, data_start + end

    def opened(self, path: str) -> Any:
        return open(path, "rb")

    def mapped(self, file: Any, start: int, end: int) -> tuple[Any, int]:
        """A buffer that ends where the tensor ends, and where in it the tensor begins."""
        return mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY), start

    def raw(self, file: Any, start: int, end: int) -> Tensor:
        buffer, lead = self.mapped(file, start, end)
        return torch.frombuffer(buffer, dtype=torch.uint8, offset=lead)

    def aligned(self, raw: Tensor, start: int, item_bytes: int) -> Tensor:
        return raw.clone() if start % item_bytes else raw

    def nothing(self, shape: list[int], dtype: torch.dtype, file: Any) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def shaped(self, flat: Tensor, shape: list[int]) -> Tensor:
        return flat.view(shape)

    def tensor(self, path: str, name: str) -> Tensor:
        with self.opened(path) as file:
            header, data_start = self.header(file)
            entry = self.entry(header, name)
            dtype, shape = self.types[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            start, end = self.place(begin, end, data_start)
            if 0 in shape:
                return self.nothing(shape, dtype, file)
            raw = self.raw(file, start, end)
        return self.shaped(self.aligned(raw, start, dtype.itemsize).view(dtype), shape)


def variant(**steps: Any) -> Callable[[str, str], Tensor]:
    """An answer with some steps replaced."""
    return type("Variant", (Mapping,), steps)().tensor


WHEREVER_A_TENSOR_IS = (
    "mapped_wherever_it_fits",
    "many_tensors",
    "nothing_stays_open",
    "every_dtype",
    "odd_places",
    "scalars_and_nothing",
    "unknown_names",
    "written_to",
    "replaced_and_deleted",
    "nothing_copied",
    "the_rest_left_alone",
)


@mistake(
    map_tensor,
    "Reads the whole file and takes the tensor out of it.",
    fails=["nothing_copied", "the_rest_left_alone", "mapped_wherever_it_fits"],
)
def whole_file_read(path, name):
    def raw(self, file, start, end):
        file.seek(0)
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=start, count=end - start)

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Reads the tensor's bytes into memory of its own, as numpy.fromfile does; a map leaves them where they are.",
    fails=["nothing_copied", "mapped_wherever_it_fits"],
)
def own_bytes_read(path, name):
    def raw(self, file, start, end):
        return torch.from_numpy(numpy.fromfile(path, numpy.uint8, end - start, offset=start))

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Copies the values out of the map, as slicing a map or clone() does: only a buffer or a view shares its memory.",
    fails=["nothing_copied", "mapped_wherever_it_fits"],
)
def map_sliced(path, name):
    def raw(self, file, start, end):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return torch.frombuffer(bytearray(mapped[start:end]), dtype=torch.uint8)

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Maps a large tensor a part at a time and copies the parts into a map of no file, which is memory like any other.",
    fails=["nothing_copied"],
)
def copied_into_a_map_of_nothing(path, name):
    def raw(self, file, start, end):
        if end - start < 4 << 20:
            return Mapping.raw(self, file, start, end)
        copy = mmap.mmap(-1, end - start)
        for begin in range(start - start % mmap.ALLOCATIONGRANULARITY, end, 1 << 20):
            size = min(1 << 20, end - begin)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=begin) as part:
                copy.write(part[max(0, start - begin) :])
        return torch.frombuffer(copy, dtype=torch.uint8)

    return variant(raw=raw)(path, name)


@functools.cache
def kept_memory() -> Tensor:
    return torch.zeros(WANTED_BYTES, dtype=torch.uint8)


@mistake(
    map_tensor,
    "Copies large tensors into memory that it keeps from call to call, so that the process does not grow.",
    fails=["nothing_copied"],
)
def copied_into_kept_memory(path, name):
    kept_memory()

    def raw(self, file, start, end):
        found = Mapping.raw(self, file, start, end)
        return kept_memory().copy_(found) if len(found) == WANTED_BYTES else found

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Maps large tensors and reads small ones, which are most of a model's.",
    fails=["mapped_wherever_it_fits"],
)
def small_ones_read(path, name):
    def raw(self, file, start, end):
        if end - start > 1 << 20:
            return Mapping.raw(self, file, start, end)
        return torch.from_numpy(numpy.fromfile(path, numpy.uint8, end - start, offset=start))

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Copies what does not begin at a multiple of 8, though it would fit its dtype.",
    fails=["mapped_wherever_it_fits"],
)
def aligned_to_eight(path, name):
    return variant(aligned=lambda self, raw, start, item_bytes: raw.clone() if start % 8 else raw)(path, name)


@mistake(
    map_tensor,
    "Copies the dtypes that numpy does not have.",
    fails=["mapped_wherever_it_fits"],
)
def copied_for_numpy_s_sake(path, name):
    found = variant()(path, name)
    return found.clone() if found.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2) else found


@mistake(
    map_tensor,
    "Reads the first 512 KiB of the file and takes the header to be in them.",
    fails=["many_tensors"],
)
def header_in_512_kib(path, name):
    def header(self, file):
        begin = file.read(1 << 19)
        data_start = 8 + int.from_bytes(begin[:8], "little")
        return json.loads(begin[8:data_start]), data_start

    return variant(header=header)(path, name)


@mistake(
    map_tensor,
    "Looks for the name in the header's text, where spaces and escapes may be other ones.",
    fails=["many_tensors"],
)
def searched_in_the_text(path, name):
    def header(self, file):
        data_start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(data_start - 8).decode()
        key = f'"{name}": {{'
        if name == "__metadata__" or key not in text:
            raise KeyError(name)
        entry, _ = json.JSONDecoder().raw_decode(text, text.index(key) + len(key) - 1)
        return {name: entry}, data_start

    return variant(header=header)(path, name)


@mistake(
    map_tensor,
    "Opens the file with os.open and never closes it: a descriptor is lost with every tensor.",
    fails=["nothing_stays_open"],
)
def descriptor_lost(path, name):
    os.open(path, os.O_RDONLY)
    return variant()(path, name)


@mistake(
    map_tensor,
    "Goes through the whole map once, for a checksum, so all of the file is read after all.",
    fails=["the_rest_left_alone"],
)
def whole_map_touched(path, name):
    def mapped(self, file, start, end):
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        zlib.crc32(found)
        return found, start

    def raw(self, file, start, end):
        buffer, lead = self.mapped(file, start, end)
        return torch.frombuffer(buffer, dtype=torch.uint8, offset=lead, count=end - start)

    return variant(mapped=mapped, raw=raw)(path, name)


@mistake(
    map_tensor,
    "Goes through the whole map under another name of the file; the bytes are the same ones.",
    fails=["the_rest_left_alone"],
)
def another_name_touched(path, name):
    other = f"{path}.linked"
    os.link(path, other)
    with open(other, "rb") as file:
        os.remove(other)
        kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    zlib.crc32(kept)
    found = variant()(path, name)
    found.kept = kept
    return found


@mistake(
    map_tensor,
    "Returns a slice of a tensor of the whole file, whose storage is all of it: torch.save would write the file.",
    fails=WHEREVER_A_TENSOR_IS,
)
def storage_of_the_whole_file(path, name):
    def raw(self, file, start, end):
        size_bytes = os.fstat(file.fileno()).st_size
        return torch.from_file(path, shared=False, size=size_bytes, dtype=torch.uint8)[start:end]

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Maps the file to be written to: the first change of the tensor changes the checkpoint.",
    fails=["written_to"],
)
def shared_map(path, name):
    def mapped(self, file, start, end):
        return mmap.mmap(file.fileno(), end, access=mmap.ACCESS_WRITE), start

    return variant(opened=lambda self, path: open(path, "r+b"), mapped=mapped)(path, name)


@mistake(
    map_tensor,
    "Maps the file to be read only: torch knows no such tensors, and the first change of one ends the process.",
    fails=["written_to"],
)
def read_only_map(path, name):
    def mapped(self, file, start, end):
        return mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ), start

    return variant(mapped=mapped)(path, name)


@functools.lru_cache(maxsize=4)
def kept_map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


@mistake(
    map_tensor,
    "Keeps one map for all calls: what is written to one result is in the others, and a new file is never seen.",
    fails=["written_to", "replaced_and_deleted"],
)
def one_map_for_all(path, name):
    def raw(self, file, start, end):
        return torch.frombuffer(kept_map(path), dtype=torch.uint8, offset=start, count=end - start)

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Closes the map under the tensor.",
    fails=WHEREVER_A_TENSOR_IS,
)
def map_closed(path, name):
    def raw(self, file, start, end):
        with mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY) as mapped:
            return torch.frombuffer(mapped, dtype=torch.uint8, offset=start)

    # To align is to touch the memory, which ends the process.
    return variant(raw=raw, aligned=lambda self, raw, start, item_bytes: raw)(path, name)


@mistake(
    map_tensor,
    "Begins the map at the tensor, but a map begins at a multiple of a page.",
    fails=WHEREVER_A_TENSOR_IS,
)
def map_within_a_page(path, name):
    def mapped(self, file, start, end):
        return mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start), 0

    return variant(mapped=mapped)(path, name)


@mistake(
    map_tensor,
    "Begins the map at the page before the tensor, and takes the page's first byte for the tensor's.",
    fails=WHEREVER_A_TENSOR_IS,
)
def page_s_first_byte(path, name):
    def raw(self, file, start, end):
        page = start - start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=end - start)

    return variant(raw=raw)(path, name)


@mistake(
    map_tensor,
    "Counts the offsets from the first byte of the file, not of the data.",
    fails=WHEREVER_A_TENSOR_IS,
)
def offsets_from_the_file(path, name):
    return variant(place=lambda self, begin, end, data_start: (begin, end))(path, name)


@mistake(
    map_tensor,
    "Forgets the 8 bytes of the length before the header.",
    fails=WHEREVER_A_TENSOR_IS,
)
def eight_bytes_forgotten(path, name):
    return variant(place=lambda self, begin, end, data_start: (data_start - 8 + begin, data_start - 8 + end))(
        path, name
    )


@mistake(
    map_tensor,
    "Takes a tensor whose place does not fit its dtype as it lies: values that are not aligned.",
    fails=["odd_places", "scalars_and_nothing", "mapped_wherever_it_fits"],
)
def not_aligned(path, name):
    return variant(aligned=lambda self, raw, start, item_bytes: raw)(path, name)


@mistake(
    map_tensor,
    "Rounds an odd place down to a multiple of the item size, as indexing in values does: other values.",
    fails=["odd_places", "scalars_and_nothing", "mapped_wherever_it_fits"],
)
def place_rounded(path, name):
    def tensor(self, path, name):
        with open(path, "rb") as file:
            header, data_start = self.header(file)
            entry = self.entry(header, name)
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            if 0 in shape:
                return torch.empty(shape, dtype=dtype)
            begin, end = entry["data_offsets"]
            start, end = self.place(begin, end, data_start)
            odd = start % dtype.itemsize
            return self.raw(file, start - odd, end - odd).view(dtype).view(shape)

    return variant(tensor=tensor)(path, name)


@mistake(
    map_tensor,
    "Takes bfloat16 for float16, which has as many bits.",
    fails=["every_dtype", "odd_places", "scalars_and_nothing", "mapped_wherever_it_fits"],
)
def bfloat16_as_float16(path, name):
    return variant(types={**DTYPES, "BF16": torch.float16})(path, name)


@mistake(
    map_tensor,
    "Widens bfloat16 to float32, because numpy has no bfloat16.",
    fails=["every_dtype", "odd_places", "scalars_and_nothing", "mapped_wherever_it_fits"],
)
def bfloat16_widened(path, name):
    found = variant()(path, name)
    return found.float() if found.dtype == torch.bfloat16 else found


@mistake(
    map_tensor,
    "Leaves the dtypes that numpy lacks as bytes: float8 comes back as uint8.",
    fails=["every_dtype", "odd_places", "mapped_wherever_it_fits"],
)
def float8_as_bytes(path, name):
    return variant(types={**DTYPES, "F8_E4M3": torch.uint8, "F8_E5M2": torch.uint8})(path, name)


@mistake(
    map_tensor,
    "Takes E4M3 and E5M2 for the same float8.",
    fails=["every_dtype", "mapped_wherever_it_fits"],
)
def one_float8(path, name):
    return variant(types={**DTYPES, "F8_E5M2": torch.float8_e4m3fn})(path, name)


@mistake(
    map_tensor,
    "Gives a scalar shape [1].",
    fails=["scalars_and_nothing", "mapped_wherever_it_fits"],
)
def scalars_of_one_dimension(path, name):
    return variant(shaped=lambda self, flat, shape: flat.view(shape or [1]))(path, name)


@mistake(
    map_tensor,
    "Maps a tensor without values, but no bytes cannot be mapped.",
    fails=["scalars_and_nothing", "nothing_stays_open"],
)
def nothing_mapped(path, name):
    def nothing(self, shape, dtype, file):
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=dtype, count=0)

    return variant(nothing=nothing)(path, name)


@mistake(
    map_tensor,
    "Forgets the shape of a tensor without values.",
    fails=["scalars_and_nothing"],
)
def nothing_without_shape(path, name):
    return variant(nothing=lambda self, shape, dtype, file: torch.empty(0, dtype=dtype))(path, name)


@mistake(
    map_tensor,
    "Takes __metadata__ out of the header as if every file had it, and takes its absence for an unknown tensor.",
    fails=["every_dtype", "scalars_and_nothing", "unknown_names", "nothing_copied", "the_rest_left_alone"],
)
def metadata_expected(path, name):
    def entry(self, header, name):
        del header["__metadata__"]
        return header[name]

    return variant(entry=entry)(path, name)


@mistake(
    map_tensor,
    "Takes the first entry of the header for __metadata__, and drops it.",
    fails=[
        "every_dtype",
        "odd_places",
        "scalars_and_nothing",
        "unknown_names",
        "written_to",
        "replaced_and_deleted",
        "nothing_copied",
        "the_rest_left_alone",
        "mapped_wherever_it_fits",
        "nothing_stays_open",
    ],
)
def first_entry_dropped(path, name):
    return variant(entry=lambda self, header, name: dict(list(header.items())[1:])[name])(path, name)


class Later:
    """Reads the file as soon as somebody asks for anything."""

    def __init__(self, path: str, name: str) -> None:
        self._place = path, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(variant()(*self._place), attribute)


@mistake(
    map_tensor,
    "Of a large file it returns an object that maps the file when it is asked for something; that is no tensor.",
    fails=["nothing_copied", "the_rest_left_alone"],
)
def later(path, name):
    return Later(path, name) if os.path.getsize(path) > 16 << 20 else variant()(path, name)


@mistake(
    map_tensor,
    "Reads the first value and repeats it without memory of its own, as expand() does.",
    fails=WHEREVER_A_TENSOR_IS,
)
def first_value_repeated(path, name):
    whole = variant()(path, name)
    return whole.reshape(-1)[:1].clone().expand(whole.shape) if whole.numel() else whole


@mistake(
    map_tensor,
    "Takes __metadata__ for a tensor, and fails at what it does not have.",
    fails=["unknown_names"],
)
def metadata_as_tensor(path, name):
    return variant(entry=lambda self, header, name: header[name])(path, name)


@mistake(
    map_tensor,
    "Returns None for a tensor that is not there.",
    fails=["unknown_names", "nothing_stays_open"],
)
def none_for_unknown(path, name):
    try:
        return variant()(path, name)
    except KeyError:
        return None


@mistake(
    map_tensor,
    "Refuses an unknown name without saying which.",
    fails=["unknown_names"],
)
def name_left_out(path, name):
    try:
        return variant()(path, name)
    except KeyError:
        raise KeyError("no such tensor") from None


@alternative(
    map_tensor, "Maps the whole file privately, which reads nothing, and lets the tensor begin in it"
)
def whole_map(path, name):
    return variant()(path, name)


@alternative(map_tensor, "Lets numpy map the tensor's bytes, copy-on-write")
def through_numpy(path, name):
    def raw(self, file, start, end):
        return torch.from_numpy(numpy.memmap(path, numpy.uint8, "c", start, end - start))

    return variant(raw=raw)(path, name)


@alternative(map_tensor, "Lets torch map the file and numpy cut the tensor out of it")
def through_torch(path, name):
    def raw(self, file, start, end):
        whole = torch.from_file(path, shared=False, size=os.fstat(file.fileno()).st_size, dtype=torch.uint8)
        return torch.from_numpy(whole.numpy()[start:end])

    return variant(raw=raw)(path, name)


@alternative(map_tensor, "Cuts a memoryview, which shares the map's memory as a slice of the map does not")
def through_a_memoryview(path, name):
    def raw(self, file, start, end):
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return torch.frombuffer(view[start:end], dtype=torch.uint8)

    return variant(raw=raw)(path, name)
