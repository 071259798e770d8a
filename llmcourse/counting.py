"""Deterministic costs: FLOPs, bytes, calls, and the anonymous memory of a process.

Two kinds are kept apart. `TensorWork`, `calls` and `saved_bytes` watch the process they run in: they
see what torch dispatches on this thread, and miss numpy, files, other threads and whatever happens
inside one kernel. `PeakMemory` looks from outside, through the kernel, and misses nothing that stays
for about a millisecond; it works on Linux only.

    with TensorWork() as work:
        answer(weight)
    return {"largest tensor, bytes": (work.largest_tensor_bytes, weight.nbytes)}
"""

from __future__ import annotations

import array
import ctypes
import functools
import gc
import inspect
import mmap
import os
import sys
import tempfile
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SAMPLE_INTERVAL_S = 0.001
UNKNOWN_BYTES = 1 << 62  # of what could not be read though it was there: dearer than any bound


# ---------------------------------------------------------------- work of torch operations


def _matrix_vector_flops(matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector_flops(added: Tensor, matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _dot_flops(left: Tensor, right: Tensor, **_: Any) -> int:
    return 2 * left.numel()


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """QK^T and PV over all positions (a causal mask halves the need, not this count).

    query [batch, heads, queries, width], key and value [batch, key heads, keys, width]: every query
    head does the whole work whether or not it shares its keys, so the query's heads are the ones counted.
    """
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Scores again, then the gradients of query, key, value and probabilities: 5 products."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


# torch's registry has no formula for these, or one that refuses grouped-query attention.
_OWN_FORMULAS: dict[str, Callable[..., int]] = {
    "aten.mv": _matrix_vector_flops,
    "aten.addmv": _added_matrix_vector_flops,
    "aten.dot": _dot_flops,
    "aten.vdot": _dot_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
    "aten._scaled_dot_product_flash_attention": _attention_flops,
    "aten._scaled_dot_product_efficient_attention": _attention_flops,
    "aten._scaled_dot_product_cudnn_attention": _attention_flops,
}

# Operations that move, create, order, normalise or reduce: a few FLOPs an element, which the convention
# of FLOP counting leaves out. Whatever is neither here, nor tagged so by torch, nor counted, is reported.
_NOT_PRODUCTS = frozenset(
    """
    _assert_async _efficientzerotensor _embedding_bag _local_scalar_dense _log_softmax
    _log_softmax_backward_data _pin_memory _reshape_copy _safe_softmax _softmax _softmax_backward_data
    _to_copy _to_sparse _to_sparse_csr _unique2 _unsafe_view alias all amax amin aminmax any arange argmax
    argmin argsort as_strided bernoulli bincount bucketize cat clone constant_pad_nd copy count_nonzero
    cummax cummin cumprod cumsum detach diag_embed diagonal_scatter embedding embedding_dense_backward
    empty empty_like empty_strided equal exponential eye fill flip full full_like fused_dropout gather
    geometric histc index index_add index_copy index_fill index_put index_select isin item kthvalue lift
    lift_fresh linalg_vector_norm linspace logcumsumexp logspace logsumexp masked_scatter masked_select
    max mean median min mode multinomial nansum native_batch_norm native_batch_norm_backward
    native_dropout native_dropout_backward native_group_norm native_group_norm_backward native_layer_norm
    native_layer_norm_backward new_empty new_empty_strided new_full new_ones new_zeros nll_loss_backward
    nll_loss_forward nonzero norm normal one_hot ones ones_like pad permute polar prod put
    quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic rand rand_like randint
    randint_like randn randn_like random randperm record_stream repeat repeat_interleave resize
    resolve_conj resolve_neg roll scalar_tensor scatter scatter_add scatter_reduce searchsorted
    select_backward select_scatter set slice_backward slice_scatter sort split split_with_sizes stack std
    std_mean sum take topk tril tril_indices triu triu_indices uniform unique_consecutive unsafe_chunk
    unsafe_split unsafe_split_with_sizes var var_mean zero zeros zeros_like
    """.split()  # noqa: SIM905, a list of literals would take one line a word
)
_CHEAP_TAGS = frozenset({"pointwise", "reduction", "inplace_view"})


class TensorWork(TorchDispatchMode):
    """What torch operations do inside a `with` block, on this thread (backward passes included).

    flops                 multiplications and additions of matrix products, convolutions and attention, as
                          `torch.utils.flop_counter` counts them (2 a multiply-add), and of matrix-vector
                          products and dots; elementwise work is left out
    flops_by_op           the same for each operation
    uncounted             names of operations on large tensors whose work no formula gives (int8 and int4
                          kernels, sparse products, factorizations): with any, `flops` is a lower bound
    calls                 Counter of operation names, such as "aten.mm"
    allocated_bytes       sum of the storages that operations allocated; a view allocates nothing, a
                          storage freed again still counts
    largest_tensor_bytes  the largest of these storages, and `largest_tensor_op`, the operation that made it

    Tensors on the meta device allocate nothing. Memory that arrives from elsewhere (numpy, files,
    `torch.UntypedStorage`) is not seen; `PeakMemory` sees it. Inside the block RuntimeError for a
    thread that this one starts, and for switching this mode off: neither would be counted.
    """

    def __init__(self, *, large_elements: int = 1024) -> None:
        super().__init__()
        self.large_elements = large_elements
        self.flops_by_op: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.allocated_bytes = 0
        self.largest_tensor_bytes = 0
        self.largest_tensor_op = ""
        self._uncounted: set[str] = set()
        self._entered, self._leaving = 0, False
        self._ways_around = ExitStack()

    @property
    def flops(self) -> int:
        return sum(self.flops_by_op.values())

    @property
    def uncounted(self) -> tuple[str, ...]:
        return tuple(sorted(self._uncounted))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch imports its compiler, for 1.5 s, at the first operation that is counted.
        return False

    def __enter__(self) -> Self:
        if not self._entered:
            self._ways_around.enter_context(_no_way_around(self))
        self._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._leaving = True
        try:
            super().__exit__(*error)
        finally:
            self._leaving = False
            self._entered -= 1
            if not self._entered:
                self._ways_around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(_unwraps_itself(kind) for kind in types):
            return NotImplemented  # the subclass turns into plain operations, and those come back here
        if _formula(func) is None:
            with self:  # under inference_mode composite operations such as linear arrive whole
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        inputs = list(_tensors((args, kwargs)))
        before_bytes = _storage_bytes(inputs)
        if func is torch.ops.aten.lift_fresh.default and args[0].untyped_storage().resizable():
            before_bytes = {}  # torch.tensor(list) brings new storage as an input; numpy's cannot resize
        result = func(*args, **kwargs)
        name = str(func._overloadpacket)
        self.calls[name] += 1
        self._count_storages(name, before_bytes, _storage_bytes([*inputs, *_tensors(result)]))
        self._count_flops(func, name, args, kwargs, result)
        return result

    def _count_storages(self, name: str, before_bytes: dict[int, int], after_bytes: dict[int, int]) -> None:
        for storage, size_bytes in after_bytes.items():
            grown_bytes = size_bytes - before_bytes.get(storage, 0)
            if grown_bytes <= 0:
                continue
            self.allocated_bytes += grown_bytes
            if size_bytes > self.largest_tensor_bytes:
                self.largest_tensor_bytes, self.largest_tensor_op = size_bytes, name

    def _count_flops(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        formula = _formula(func)
        inputs = list(_tensors((args, kwargs)))
        strided = all(tensor.layout is torch.strided for tensor in inputs)
        if formula is not None and strided:
            try:
                self.flops_by_op[name] += formula(*args, **kwargs, out_val=result)
                return
            except AssertionError:  # torch's formulas assert the shapes they were written for
                pass
        elif formula is None and _is_cheap(func):
            return
        if any(tensor.numel() >= self.large_elements for tensor in [*inputs, *_tensors(result)]):
            self._uncounted.add(name)


@contextmanager
def _no_way_around(mode: TensorWork) -> Iterator[None]:
    """Until the end of the block, refuse what would hide operations of this thread from `mode`."""
    thread = threading.get_ident()
    pop, start = torch._C._pop_torch_dispatch_stack, threading.Thread.start

    def hidden(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operations are counted here: do not switch the counting off")

    def popped(*key: Any) -> Any:
        depth = torch._C._len_torch_dispatch_stack()
        ours = threading.get_ident() == thread and not mode._leaving
        if ours and depth and torch._C._get_dispatch_stack_at(depth - 1) is mode:
            hidden()
        return pop(*key)

    def started(self: threading.Thread) -> None:
        target = getattr(getattr(self, "_target", None), "__module__", None) or type(self).__module__
        if threading.get_ident() == thread and not str(target).startswith("llmcourse."):
            raise RuntimeError("operations are counted here, those of this thread: start no other")
        start(self)

    changes: list[tuple[Any, str, Any]] = [
        (torch.utils._python_dispatch, "_pop_torch_dispatch_stack", popped),
        (torch._C, "_pop_torch_dispatch_stack", popped),
        (torch._C, "_DisableTorchDispatch", hidden),
        (threading.Thread, "start", started),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, instead in changes:
            setattr(owner, name, instead)
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def _formula(func: Any) -> Callable[..., int] | None:
    packet = func._overloadpacket
    name = str(packet).removeprefix("aten.")
    if name.endswith("_"):  # in place: the work is that of the operation it names
        packet = getattr(torch.ops.aten, name[:-1], packet)
    return _OWN_FORMULAS.get(str(packet)) or flop_registry.get(packet)


def _is_cheap(func: Any) -> bool:
    if func.is_view or any(tag.name in _CHEAP_TAGS for tag in func.tags):
        return True
    name = func._overloadpacket.__name__
    return name.startswith(("_foreach_", "_fused_")) or name.rstrip("_") in _NOT_PRODUCTS


def _unwraps_itself(kind: type) -> bool:
    dispatch = getattr(kind, "__torch_dispatch__", None)
    return dispatch is not None and dispatch is not torch._C._disabled_torch_dispatch_impl


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Storage identity -> its bytes, each storage once; tensors must stay alive while this is used."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for part in _dense_parts(tensor):
            if part.layout is not torch.strided:  # an opaque layout (mkldnn) has no storage to ask
                sizes[id(part)] = part.numel() * part.element_size()
                continue
            storage = part.untyped_storage()
            if storage.device.type != "meta":
                sizes[storage._cdata] = storage.nbytes()
    return sizes


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


class LivingBytes(TorchDispatchMode):
    """Remembers the storages that operations return inside a `with` block; `size_bytes` counts those that still live,
    wherever they are held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in _tensors(result):
            self._made[StorageWeakRef(part.untyped_storage())] = part.untyped_storage().nbytes()
        return result

    def size_bytes(self, *aside: Tensor) -> int:
        """Bytes of the storages that live now, without those of `aside`."""
        gc.collect()
        left_out = {StorageWeakRef(tensor.untyped_storage()) for tensor in aside}
        return sum(size for made, size in self._made.items() if made not in left_out and not made.expired())


def reachable_bytes(*roots: Any) -> int:
    """Bytes of all tensors that can be reached from these objects and their gradients, each storage once.

    Bytes, arrays of numpy and numbers in lists, 8 bytes each, count too. What is global where a function was
    defined, what a class holds and what a module holds are left out.
    """
    seen: dict[int, Any] = {}
    tensors: list[Tensor] = []
    others_bytes = 0
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            tensors.append(thing)
            todo.append(thing.grad if thing.is_leaf else None)
        elif isinstance(thing, bytes | bytearray | memoryview | array.array) or hasattr(
            type(thing), "__array_interface__"
        ):
            others_bytes += memoryview(thing).nbytes
        elif isinstance(thing, list):
            others_bytes += 8 * sum(isinstance(part, int | float | complex) for part in thing)
        if isinstance(thing, types.FunctionType):
            todo += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
        else:
            todo += gc.get_referents(thing)
    return sum(_storage_bytes(tensors).values()) + others_bytes


# ---------------------------------------------------------------- saved for backward


class SavedBytes:
    """Bytes that autograd keeps for backward: each storage once, however many views of it are saved."""

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        self._ignored = {StorageWeakRef(tensor.untyped_storage()) for tensor in ignore}
        self._sizes: dict[StorageWeakRef, int] = {}

    @property
    def total_bytes(self) -> int:
        return sum(self._sizes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in _dense_parts(tensor):
            # A weak reference keeps the identity from being used again after the storage is freed.
            storage = part.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._ignored:
                self._sizes[reference] = storage.nbytes()
        return tensor


@contextmanager
def saved_bytes(*, ignore: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what autograd saves for backward inside the block.

    `ignore` takes the tensors that live anyway (parameters, inputs), so that what remains are activations.
    A view keeps its whole storage alive, so the whole storage counts.

        with saved_bytes(ignore=model.parameters()) as saved:
            loss = model(x)
        saved.total_bytes
    """
    saved = SavedBytes(ignore)
    with torch.autograd.graph.saved_tensors_hooks(saved._pack, lambda tensor: tensor):
        yield saved


# ---------------------------------------------------------------- calls


class Counted:
    """A callable that counts its calls, from any thread; other attributes are those of what it wraps."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self.calls += 1
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_function":  # not set yet while being copied: looking further would not end
            raise AttributeError(name)
        return getattr(self._function, name)


@contextmanager
def calls(owner: Any, name: str) -> Iterator[Counted]:
    """Count the calls of `owner.name`, a function of a module or a method, inside the block.

    Only calls that look the name up on `owner` are seen: `from torch import matmul` made a name of its own.
    Yields a `Counted`, whose `calls` is the number.
    """
    raw = inspect.getattr_static(owner, name, None)
    if raw is None:
        raise AttributeError(f"{owner!r} has no attribute {name!r} whose calls could be counted")
    own = name in getattr(owner, "__dict__", {})
    shared = inspect.isclass(owner) or inspect.ismodule(owner)
    target = raw.__func__ if shared and isinstance(raw, (staticmethod, classmethod)) else raw
    counted = Counted(target if shared else getattr(owner, name))

    @functools.wraps(counted._function)
    def counting(*args: Any, **kwargs: Any) -> Any:  # a function, so that it binds as a method does
        return counted(*args, **kwargs)

    kind = type(raw) if shared and isinstance(raw, (staticmethod, classmethod)) else None
    try:
        setattr(owner, name, kind(counting) if kind else counting)
    except TypeError as error:
        raise TypeError(f"{owner!r} does not let {name!r} be replaced: wrap it in Counted") from error
    try:
        yield counted
    finally:
        if own:
            setattr(owner, name, raw)
        else:
            delattr(owner, name)


# ---------------------------------------------------------------- memory, seen from outside


def can_read_memory() -> bool:
    """Whether this system says how much anonymous memory a process holds (Linux 4.5 or later)."""
    try:
        anonymous_bytes()
    except OSError:
        return False
    return True


def anonymous_bytes(pid: int | None = None) -> int:
    """Resident anonymous memory of a process in bytes: what it allocated, without the files it maps.

    Read from RssAnon of /proc/PID/status, within `memory_error_bytes()`. Call `settle()` in that process
    first, or memory freed but not returned is counted. OSError where the system has no such number;
    ProcessLookupError where the process does not exist.
    """
    return _kinds_of_memory(_status_of(os.getpid() if pid is None else pid))[0]


def _status_of(pid: int) -> str:
    if sys.platform != "linux":
        raise OSError(f"anonymous memory is read from /proc, which {sys.platform} does not have; use Linux")
    status = Path("/proc", str(pid), "status")
    try:
        return status.read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"{status} does not exist: no process {pid} runs here") from error


def _kinds_of_memory(status: str) -> tuple[int, int]:
    """(RssAnon, RssShmem) in bytes."""
    kinds = ("RssAnon:", "RssShmem:")
    found = {
        line.split()[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(kinds)
    }
    if len(found) != len(kinds):
        raise OSError("the status has no line RssAnon (a kernel before 4.5, or a process that has ended)")
    return found[kinds[0]], found[kinds[1]]


class MappedFiles:
    """The files at `path`, or beneath it, as far as a process has mapped them into memory; and what it allocated.

    path: as that process sees it, without links; the folder it lies in exists. Read from /proc/PID/maps and
    /proc/PID/pagemap, page by page: exact, and free of what the process maps besides, such as its libraries. A page
    that the process wrote to in a private map is its own memory and no longer the file's. `read_bytes` is what this
    object has read for its answers so far. The methods raise OSError where the system has no such numbers, or the
    process has ended.
    """

    def __init__(self, path: str, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._path = path.rstrip("/")
        # Of another process, whose mounts may be others.
        seen_from, folder = Path("/proc", str(self._pid), "root"), Path(self._path).parent
        self._place, self._identity = seen_from / self._path.lstrip("/"), ("", "")
        self._in_memory = on_tmpfs(folder, pid)
        self._devices = (
            {_device(os.stat(seen_from / folder.relative_to("/")).st_dev)} if self._in_memory else set()
        )
        self.read_bytes = 0

    def resident_bytes(self) -> int:
        """Bytes of these files that are in memory now; a page counts as often as it is mapped."""
        return self._pages_bytes()[0]

    def allocated_bytes(self, *, files_up_to: int | None = None) -> int:
        """Anonymous and shared memory of the process now, without these files, which are shared memory on a tmpfs.

        files_up_to: as much of them as is left out there; None for all of them.
        """
        status = _status_of(self._pid)
        self.read_bytes += len(status)
        anonymous, shared = _kinds_of_memory(status)
        of_files, of_others = self._pages_bytes()
        if not self._in_memory:
            return anonymous + max(shared, of_others)
        # Not RssShmem without the files' pages: between two readings files come and go.
        return anonymous + of_others + (0 if files_up_to is None else max(0, of_files - files_up_to))

    def bytes_elsewhere(self, address: int, size_bytes: int) -> int:
        """Of a range of the process's memory, the bytes on pages that are not these files': memory of its own."""
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        first, last = address // page_bytes, -(-(address + size_bytes) // page_bytes)
        elsewhere = last - first
        if not 0 < elsewhere <= _MAX_PAGES:
            return max(0, size_bytes)
        for line in self._maps():
            bounds, _, _, *file = line.split(None, 5)
            begin, end = (int(bound, 16) // page_bytes for bound in bounds.split("-"))
            begin, end = max(begin, first), min(end, last)
            if begin < end and self._is_ours(*file):
                flags = self._flags(begin, end)
                own = (flags & _PAGE_PRESENT != 0) & (flags & _PAGE_OF_A_FILE != _PAGE_OF_A_FILE)
                elsewhere -= end - begin - int(numpy.count_nonzero(own))
        return page_bytes * elsewhere

    def _is_ours(self, device: str, inode: str, name: str = "") -> bool:
        name = name.removesuffix(" (deleted)")
        return name == self._path or name.startswith(self._path + "/") or (device, inode) == self._identity

    def _maps(self) -> list[str]:
        """What the process has mapped; a file may have another name beside the one that is known."""
        with suppress(OSError):  # it is not there yet, or no more
            found = os.stat(self._place, follow_symlinks=False)
            self._identity = _device(found.st_dev), str(found.st_ino)
        return self._read("maps").decode(errors="replace").splitlines()

    def _read(self, name: str) -> bytes:
        content = Path("/proc", str(self._pid), name).read_bytes()
        self.read_bytes += len(content)
        return content

    def _flags(self, begin: int, end: int) -> Any:
        """Of the pages from `begin` to before `end`, what the kernel says of each."""
        with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as listed:
            listed.seek(_PAGE_ENTRY_BYTES * begin)
            entries = listed.read(_PAGE_ENTRY_BYTES * (end - begin))
        self.read_bytes += len(entries)
        return numpy.frombuffer(entries, "=u8") >> _PAGE_FLAGS_SHIFT

    def _pages_bytes(self) -> tuple[int, int]:
        """Bytes in memory now of (these files, other shared memory of the devices watched).

        Of the kernel's own shared memory all that is mapped counts: what is in it stays there though no page is entered
        for this process.
        """
        ours, others, unnamed_bytes = [], [], 0
        for line in self._maps():
            bounds, _, _, device, *file = line.split(None, 5)
            if self._is_ours(device, *file):
                ours.append(bounds)
            elif device == _device_of_shared_memory():
                unnamed_bytes += _size_bytes(bounds)
            elif device in self._devices:
                others.append(bounds)
        return self._in_memory_bytes(ours), unnamed_bytes + self._in_memory_bytes(others)

    def _in_memory_bytes(self, ranges: list[str]) -> int:
        page_bytes, pages = os.sysconf("SC_PAGE_SIZE"), 0
        for bounds in ranges:
            begin, end = (int(bound, 16) // page_bytes for bound in bounds.split("-"))
            if end - begin > _MAX_PAGES:  # looking through it would take all day
                pages += end - begin
                continue
            flags = self._flags(begin, end)
            pages += int(numpy.count_nonzero(flags & _PAGE_OF_A_FILE == _PAGE_OF_A_FILE))
        return page_bytes * pages


# Documentation/admin-guide/mm/pagemap.rst of Linux: 64 bits a page, bit 63 "present", bit 61 "of a file or shared".
_PAGE_ENTRY_BYTES, _PAGE_FLAGS_SHIFT, _PAGE_OF_A_FILE, _PAGE_PRESENT = 8, 61, 0b101, 0b100
_MAX_PAGES = 1 << 18  # 1 GiB of pages of 4 KiB, more than any case maps


def _size_bytes(bounds: str) -> int:
    begin, end = (int(bound, 16) for bound in bounds.split("-"))
    return end - begin


def _device(number: int) -> str:
    """As /proc/PID/maps writes it."""
    return f"{os.major(number):02x}:{os.minor(number):02x}"


@functools.cache
def _device_of_shared_memory() -> str:
    """The kernel's own tmpfs, where memory that is shared without a file lies: one for all processes."""
    with mmap.mmap(-1, mmap.PAGESIZE) as shared:
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        for line in Path("/proc/self/maps").read_text().splitlines():
            bounds, _, _, device, *_ = line.split()
            begin, end = (int(bound, 16) for bound in bounds.split("-"))
            if begin <= address < end:
                return device
    raise OSError("/proc/self/maps does not list the memory that this process has mapped")


def on_tmpfs(folder: str | Path, pid: int | None = None) -> bool:
    """Whether a folder's files lie in memory, as Linux's list of mounts says.

    pid: the process that sees them, and may have mounts of its own; None for this one.
    """
    mounts = Path("/proc") / ("self" if pid is None else str(pid)) / "mounts"
    if not mounts.exists():
        return False
    real = Path(folder).resolve() if pid is None else Path(folder)
    listed = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    holding = [(place, kind) for place, kind in listed if real.is_relative_to(place)]
    return max(holding, key=lambda mount: len(mount[0]), default=("/", ""))[1] == "tmpfs"


def memory_error_bytes() -> int:
    """Largest error of one reading of `anonymous_bytes`.

    Linux 6.2 and later keeps the counter in parts, one a processor, and adds a part to the total when it
    reaches a batch of max(32, 2 · processors) pages (lib/percpu_counter.c); a reading may miss the parts.
    """
    processors = os.cpu_count() or 1
    return processors * max(32, 2 * processors) * os.sysconf("SC_PAGE_SIZE")


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended, as Linux says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def settle() -> None:
    """Collect garbage and hand freed memory back to the system: do so before memory is read."""
    gc.collect()
    trim = getattr(_c_library(), "malloc_trim", None)  # glibc only; musl and macOS have none
    if trim is not None:
        trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class PeakMemory:
    """Peak of a process's anonymous memory above what it held at `start()`, in bytes.

    A thread of the process that owns this object samples the process `pid` about every millisecond, so the
    measured process cannot touch the samples; it says when to start and stop, and calls `settle()` before.
    Over several windows the largest peak and the smallest bound are kept, so another window cannot replace
    a bad one. `counts()` gives (None, None) where the system cannot measure, and before any `stop()`.
    """

    calls: ClassVar[tuple[str, ...]] = ("start", "stop")

    def __init__(self, pid: int | None = None) -> None:
        self.pid = os.getpid() if pid is None else pid
        self.folder: str | None = None  # where that process writes; None for this one's temporary folder
        self._peak_bytes: int | None = None
        self._at_most: int | None = None
        self._lowest_bytes = self._highest_bytes = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._running = False

    def start(self) -> None:
        if self._running:
            raise RuntimeError("PeakMemory.start() was called twice; call stop() before starting again")
        self._running = True
        if not can_read_memory():
            return
        self._lowest_bytes = self._highest_bytes = self._level_bytes()
        self._done.clear()
        self._thread = threading.Thread(target=self._sample, name="peak memory", daemon=True)
        self._thread.start()

    def stop(self, at_most: int | None = None) -> None:
        """End the window; `at_most` is the bound in bytes that the peak is to be compared with."""
        if not self._running:
            raise RuntimeError("PeakMemory.stop() was called without start(); call start() first")
        if at_most is not None and (type(at_most) is not int or at_most < 0):
            raise ValueError(f"at_most is a number of bytes, an int of at least 0, not {at_most!r}")
        if not self._end_window():
            return
        self._peak_bytes = max(self._peak_bytes or 0, self._highest_bytes - self._lowest_bytes)
        if at_most is not None:
            self._at_most = at_most if self._at_most is None else min(at_most, self._at_most)

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        self._end_window()  # one that an exception left open is not measured, and not sampled for ever
        if self._peak_bytes is None:
            return {"peak anonymous bytes": (None, None)}
        at_most = None if self._at_most is None else float(self._at_most)
        return {"peak anonymous bytes": (float(self._peak_bytes), at_most)}

    def _level_bytes(self) -> int:
        """What is sampled, now."""
        return anonymous_bytes(self.pid)

    def _end_window(self) -> bool:
        """Stop sampling; whether there was anything to stop."""
        thread, self._thread, self._running = self._thread, None, False
        if thread is None:
            return False
        self._done.set()
        thread.join()
        return True

    def _sample(self) -> None:
        finished = False
        while not finished:
            finished = self._done.wait(SAMPLE_INTERVAL_S)  # the last reading comes after stop was asked for
            try:
                now = self._level_bytes()
            except OSError:
                # A process that has ended: what was seen until then stands. One that cannot be read hides something.
                if is_running(self.pid):
                    self._highest_bytes = UNKNOWN_BYTES
                return
            except BaseException:
                self._highest_bytes = UNKNOWN_BYTES
                raise
            self._highest_bytes = max(self._highest_bytes, now)
            self._lowest_bytes = min(self._lowest_bytes, now)


class PeakOfItem(PeakMemory):
    """`PeakMemory` for a case: one window, opened before the item begins and closed after it has ended.

    Both are the judge's doing, so the measured process can neither open it late nor close it early; memory that
    it gives back inside the window (ballast taken before) counts as taken, and so does shared memory. Files that
    are mapped from a tmpfs are shared memory too: there what is in memory of the files where the process writes is
    left out, up to `mapped_bytes`, the size of those that an answer may map. What the case itself prepares is inside:
    it must stay below the bound.
    """

    calls: ClassVar[tuple[str, ...]] = ("bound",)

    def __init__(self, pid: int | None = None, *, mapped_bytes: int = 0) -> None:
        super().__init__(pid)
        self._files: MappedFiles | None = None
        self._bounds: list[int] = []
        self._mapped_bytes = mapped_bytes

    def begin(self) -> None:
        """Open the window: the judge's call, before the item is begun."""
        if self.pid == os.getpid():
            settle()
        if can_read_memory():
            folder = os.path.realpath(self.folder or tempfile.gettempdir())
            self._files = MappedFiles(folder, None if self.folder is None else self.pid)
        self.start()

    def bound(self, at_most: int) -> None:
        """Say the bound in bytes, once."""
        if self._bounds:
            raise RuntimeError("bound() was called twice; an item has one window and one bound")
        self._bounds.append(at_most)

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        if self._running and self._bounds:
            self.stop(self._bounds[0])
        return super().counts()

    def _level_bytes(self) -> int:
        assert self._files is not None, "begin() comes first"
        return self._files.allocated_bytes(files_up_to=self._mapped_bytes)
