from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse import counting
from llmcourse.counting import Counted, PeakMemory, TensorWork, calls, saved_bytes

MIB = 2**20
reads_memory = pytest.mark.skipif(
    not counting.can_read_memory(), reason="anonymous memory is readable on Linux only; run this on Linux"
)


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("inference", [False, True], ids=["recorded", "inference_mode"])
def test_a_linear_layer_counts_two_flops_a_multiply_add(inference: bool) -> None:
    x, weight, bias = torch.randn(3, 5, 64), torch.randn(48, 64), torch.randn(48)
    with torch.inference_mode(inference), TensorWork() as work:
        F.linear(x, weight, bias)
    assert work.flops == 2 * 3 * 5 * 64 * 48
    assert work.uncounted == ()


def test_matrix_vector_products_and_dots_are_counted() -> None:
    matrix, vector = torch.randn(48, 64), torch.randn(64)
    with TensorWork() as work:
        matrix @ vector
        vector @ vector
    assert work.flops_by_op == {"aten.mv": 2 * 48 * 64, "aten.dot": 2 * 64}


def test_backward_of_a_product_counts_twice_its_forward() -> None:
    x, weight = (torch.randn(32, 32, requires_grad=True) for _ in range(2))
    with TensorWork() as work:
        (x @ weight).sum().backward()
    assert work.flops == 3 * 2 * 32**3


def test_grouped_query_attention_counts_every_query_head() -> None:
    query, key, value = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    with TensorWork() as work:
        F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    # QK^T and PV: each 2 FLOPs for a batch, head, query, key and channel
    assert work.flops == 2 * (2 * 2 * 8 * 5 * 7 * 16)
    assert work.uncounted == ()


def test_backward_of_fused_attention_counts_five_products() -> None:
    query, key, value = (torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(3))
    with TensorWork() as forward:
        attended = F.scaled_dot_product_attention(query, key, value)
    with TensorWork() as backward:
        attended.sum().backward()
    product = 2 * 2 * 32 * 32 * 16
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)
    assert backward.uncounted == ()


def _int8_kernel() -> None:
    codes = torch.ones(64, 64, dtype=torch.int8)
    torch.ops.aten._weight_int8pack_mm(torch.ones(4, 64), codes, torch.ones(64))


def _int8_product() -> None:
    codes = torch.ones(64, 64, dtype=torch.int8)
    torch._int_mm(codes, codes)


def _sparse_product() -> None:
    torch.eye(64).to_sparse() @ torch.ones(64, 64)


def _factorization() -> None:
    torch.linalg.cholesky(torch.eye(64))


@pytest.mark.parametrize(
    ("work_of", "name"),
    [
        (_int8_kernel, "aten._weight_int8pack_mm"),
        (_int8_product, "aten._int_mm"),
        (_sparse_product, "aten.mm"),
        (_factorization, "aten.linalg_cholesky_ex"),
    ],
    ids=["int8 kernel", "int8 product", "sparse product", "factorization"],
)
def test_work_that_no_formula_gives_is_named(work_of: Callable[[], None], name: str) -> None:
    with TensorWork() as work:
        work_of()
    assert name in work.uncounted
    assert work.flops == 0


def test_uncounted_work_on_small_tensors_is_not_mentioned() -> None:
    with TensorWork(large_elements=64 * 64 + 1) as work:
        _factorization()
    assert work.uncounted == ()


def test_a_shape_that_torch_cannot_count_is_named_and_does_not_stop_the_answer() -> None:
    def refuse(*_: object, **__: object) -> int:
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch, TensorWork() as work:
        patch.setitem(counting._OWN_FORMULAS, "aten.mm", refuse)
        product = torch.ones(64, 64) @ torch.ones(64, 64)
    assert torch.equal(product, torch.full((64, 64), 64.0))
    assert work.uncounted == ("aten.mm",)


def test_a_training_step_of_a_decoder_block_leaves_nothing_uncounted() -> None:
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.1)
    embedding, head = nn.Embedding(100, 64), nn.Linear(64, 100)
    parameters = [*block.parameters(), *embedding.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    tokens = torch.randint(0, 100, (2, 32))
    with TensorWork() as work:
        hidden = F.rms_norm(block(embedding(tokens)), (64,))
        F.cross_entropy(head(hidden).flatten(0, 1), tokens.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        head(hidden).softmax(-1).topk(5)
        torch.multinomial(head(hidden[0]).softmax(-1), 1)
    assert work.flops > 0
    assert work.uncounted == ()


class Doubled(Tensor):
    """A wrapper subclass that holds half of what it stands for, as quantized weights do."""

    half: Tensor

    @staticmethod
    def __new__(cls, half: Tensor) -> Doubled:
        wrapped = Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)
        wrapped.half = half
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [2 * item.half if isinstance(item, Doubled) else item for item in args]
        return func(*plain, **(kwargs or {}))


def test_what_a_tensor_subclass_does_inside_is_counted() -> None:
    weight, x = Doubled(torch.ones(64, 64)), torch.ones(4, 64)
    with TensorWork() as work:
        product = torch.mm(x, weight)
    assert torch.equal(product, torch.full((4, 64), 128.0))
    assert work.calls == {"aten.mul": 1, "aten.mm": 1}
    assert work.flops == 2 * 4 * 64 * 64
    assert work.allocated_bytes == 64 * 64 * 4 + 4 * 64 * 4


# ---------------------------------------------------------------- bytes


def test_views_allocate_nothing() -> None:
    x = torch.randn(64, 64)
    with TensorWork() as work:
        x.t()[3:, :2].unsqueeze(0).expand(5, -1, -1)
        x.view(4096).detach()
        torch.from_numpy(np.zeros(100))
    assert work.allocated_bytes == 0
    assert work.largest_tensor_bytes == 0


def test_allocations_are_summed_and_the_largest_is_named() -> None:
    x = torch.randn(100)
    with TensorWork() as work:
        doubled = x * 2  # 400 bytes
        torch.cat([doubled, x, x])  # 1,200 bytes
        x.to(torch.float64)  # 800 bytes
    assert work.allocated_bytes == 400 + 1200 + 800
    assert (work.largest_tensor_bytes, work.largest_tensor_op) == (1200, "aten.cat")


def test_work_in_place_allocates_nothing_and_growth_counts_as_growth() -> None:
    x, out = torch.randn(100), torch.empty(100)
    with TensorWork() as work:
        x.add_(1).clamp_(0)
        torch.mul(x, 2, out=out)
    assert work.allocated_bytes == 0
    with TensorWork() as work:
        x.resize_(150)
    assert work.allocated_bytes == 50 * 4


@pytest.mark.parametrize(
    ("make", "size_bytes"),
    [
        (lambda: torch.tensor([1.0, 2.0, 3.0]), 12),
        (lambda: torch.empty(10, dtype=torch.bfloat16), 20),
        (lambda: torch.empty(10**12, device="meta"), 0),
        (lambda: torch.ones(3, 3).to_sparse(), 36 + 9 * (4 + 2 * 8)),
    ],
    ids=["from a list", "bfloat16", "meta", "sparse"],
)
def test_what_is_made_counts_its_storage(make: Callable[[], Tensor], size_bytes: int) -> None:
    with TensorWork() as work:
        made = make()
    assert made is not None
    # to_sparse also makes masks and index grids on the way, so its own parts are a lower bound
    assert work.allocated_bytes >= size_bytes if made.is_sparse else work.allocated_bytes == size_bytes


def test_the_same_storage_freed_and_made_again_counts_again() -> None:
    x = torch.randn(1000)
    with TensorWork() as work:
        for _ in range(5):
            x + 1
    assert work.allocated_bytes == 5 * 4000
    assert work.calls["aten.add"] == 5


def test_saved_bytes_count_a_storage_once_and_leave_out_what_is_ignored() -> None:
    x, weight = torch.randn(8, 16), torch.randn(16, 16, requires_grad=True)
    with saved_bytes() as everything:
        hidden = x @ weight  # saves x
        hidden.exp() + hidden.square()  # saves the exponential and hidden
    assert everything.total_bytes == 3 * 8 * 16 * 4
    with saved_bytes(ignore=[x]) as activations:
        hidden = x @ weight
        hidden.square() + hidden.t().square().t()  # both save views of one storage
    assert activations.total_bytes == 8 * 16 * 4


def test_saved_bytes_are_not_confused_by_storages_freed_in_between() -> None:
    weight = torch.randn(1000, requires_grad=True)
    with saved_bytes() as saved:
        for _ in range(3):
            weight.exp().sum().backward()
    assert saved.total_bytes == 3 * 4000


def test_recomputing_saves_less() -> None:
    layers = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    x = torch.randn(8, 16, requires_grad=True)
    with saved_bytes(ignore=[x, *layers.parameters()]) as kept:
        layers(x)
    with saved_bytes(ignore=[x, *layers.parameters()]) as recomputed:
        torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)
    assert kept.total_bytes == 3 * 8 * 16 * 4  # the inputs of layers 2 to 4
    assert recomputed.total_bytes == 0


# ---------------------------------------------------------------- calls


def test_calls_of_a_module_function_are_counted_and_the_function_comes_back() -> None:
    original = F.relu
    with calls(F, "relu") as counted:
        assert torch.equal(F.relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
        F.relu(torch.zeros(1))
    assert counted.calls == 2
    assert F.relu is original


class Reader:
    def read(self, offset: int) -> tuple[Reader, int]:
        return self, offset

    @staticmethod
    def pages(count: int) -> int:
        return count

    @classmethod
    def opened(cls) -> type:
        return cls


def test_calls_of_methods_keep_their_binding() -> None:
    reader = Reader()
    with calls(Reader, "read") as read, calls(Reader, "pages") as pages, calls(Reader, "opened") as opened:
        assert reader.read(3) == (reader, 3)
        assert reader.pages(4) == 4
        assert Reader.opened() is Reader
    assert (read.calls, pages.calls, opened.calls) == (1, 1, 1)
    assert isinstance(vars(Reader)["pages"], staticmethod)


def test_calls_of_one_object_leave_the_others_alone() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with calls(one, "forward") as counted:
        one(torch.zeros(1, 2))
        other(torch.zeros(1, 2))
    assert counted.calls == 1
    assert "forward" not in vars(one)


def test_the_original_comes_back_after_an_error() -> None:
    original = Reader.read
    with pytest.raises(ZeroDivisionError), calls(Reader, "read"):
        raise ZeroDivisionError
    assert Reader.read is original


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(AttributeError, match="'rlu'"), calls(F, "rlu"):
        pass
    with pytest.raises(TypeError, match="wrap it in Counted"), calls(bytes, "decode"):
        pass


def test_a_counted_model_counts_and_still_has_its_attributes() -> None:
    model = Counted(nn.Linear(2, 3))
    model(torch.zeros(1, 2))
    assert model.calls == 1
    assert model.out_features == 3


# ---------------------------------------------------------------- memory from outside


@reads_memory
def test_anonymous_bytes_see_what_is_allocated_and_not_what_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 * MIB))
    # Two readings differ by at most two errors; besides the tensor, the interpreter itself allocates: 1 MiB.
    margin_bytes = 2 * counting.memory_error_bytes() + MIB
    counting.settle()
    start_bytes = counting.anonymous_bytes()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    counting.settle()
    assert counting.anonymous_bytes() - start_bytes == pytest.approx(held.nbytes, abs=margin_bytes)
    mapped = torch.from_file(str(file), size=64 * MIB, dtype=torch.uint8)
    assert int(mapped.sum()) == 0
    assert counting.anonymous_bytes() - start_bytes == pytest.approx(held.nbytes, abs=margin_bytes)
    del held
    counting.settle()
    assert counting.anonymous_bytes() - start_bytes == pytest.approx(0, abs=margin_bytes)


CHILD = """
import sys
import tempfile
for line in sys.stdin:
    held = bytearray(b"x") * int(line)
    print(len(held), flush=True)
    sys.stdin.readline()
    del held
    print("freed", flush=True)
"""


class Child:
    """A process that holds as many bytes as it is told, until it is told to free them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.pid, self._to, self._from = process.pid, process.stdin, process.stdout

    def hold(self, size_bytes: int) -> None:
        assert self._ask(str(size_bytes)) == str(size_bytes)

    def free(self) -> None:
        assert self._ask("") == "freed"

    def end(self) -> None:
        self._to.close()
        self._from.read()

    def _ask(self, line: str) -> str:
        self._to.write(line + "\n")
        self._to.flush()
        return self._from.readline().strip()


@pytest.fixture
def child() -> Iterator[Child]:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Child(process)


def _wait_until_sampled(peak: PeakMemory, size_bytes: int) -> None:
    deadline = time.monotonic() + 30
    while peak._highest_bytes - peak._lowest_bytes < size_bytes and time.monotonic() < deadline:
        threading.Event().wait(0.001)


@reads_memory
def test_peak_memory_of_another_process_is_seen_after_it_was_freed(child: Child) -> None:
    child.hold(1)
    child.free()
    # Two readings differ by at most two errors; besides the bytes, the child's interpreter allocates: 1 MiB.
    margin_bytes = 2 * counting.memory_error_bytes() + MIB
    peak = PeakMemory(child.pid)
    peak.start()
    child.hold(64 * MIB)
    _wait_until_sampled(peak, 64 * MIB - margin_bytes)
    child.free()
    assert counting.anonymous_bytes(child.pid) - peak._lowest_bytes <= margin_bytes
    peak.stop(80 * MIB)
    ((measured, at_most),) = peak.counts().values()
    assert measured == pytest.approx(64 * MIB, abs=margin_bytes)
    assert at_most == 80 * MIB


@reads_memory
def test_a_later_window_cannot_hide_an_earlier_peak(child: Child) -> None:
    peak = PeakMemory(child.pid)
    peak.start()
    child.hold(64 * MIB)
    peak.stop(MIB)
    first = peak.counts()
    child.free()
    peak.start()
    peak.stop(1000 * MIB)
    assert peak.counts() == first


@reads_memory
def test_a_process_that_ends_in_the_window_leaves_what_was_seen(child: Child) -> None:
    peak = PeakMemory(child.pid)
    peak.start()
    child.end()
    peak.stop()
    ((measured, at_most),) = peak.counts().values()
    assert measured >= 0
    assert at_most is None


@reads_memory
def test_a_process_that_does_not_exist_is_named() -> None:
    absent = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    with pytest.raises(ProcessLookupError, match=str(absent)):
        counting.anonymous_bytes(absent)


def test_peak_memory_refuses_calls_out_of_order_and_bounds_that_are_none() -> None:
    peak = PeakMemory()
    with pytest.raises(RuntimeError, match="without start"):
        peak.stop()
    peak.start()
    with pytest.raises(RuntimeError, match="twice"):
        peak.start()
    for bound in (-1, 1.5, True, "64"):
        with pytest.raises(ValueError, match="number of bytes"):
            peak.stop(bound)  # type: ignore[arg-type]
    peak.stop()
    assert PeakMemory.calls == ("start", "stop")


@reads_memory
def test_a_window_that_an_exception_left_open_is_not_sampled_for_ever() -> None:
    peak = PeakMemory()
    peak.start()
    sampler = peak._thread
    assert sampler is not None and sampler.is_alive()
    assert peak.counts() == {"peak anonymous bytes": (None, None)}
    assert not sampler.is_alive()


def test_where_the_system_cannot_measure_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "sys", SimpleNamespace(platform="darwin"))
    assert not counting.can_read_memory()
    with pytest.raises(OSError, match="darwin"):
        counting.anonymous_bytes()
    peak = PeakMemory()
    peak.start()
    peak.stop(MIB)
    assert peak.counts() == {"peak anonymous bytes": (None, None)}


def test_settle_works_where_the_c_library_cannot_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = []
    monkeypatch.setattr(counting, "_c_library", lambda: SimpleNamespace(malloc_trim=trimmed.append))
    counting.settle()
    assert trimmed == [0]
    monkeypatch.setattr(counting, "_c_library", SimpleNamespace)
    counting.settle()


@reads_memory
def test_one_window_of_an_item_stays_open_until_it_is_counted() -> None:
    peak = counting.PeakOfItem()
    peak.begin()
    peak.bound(MIB)
    held = bytearray(b"x") * (64 * MIB)  # after bound(), before counts(): still inside the window
    ((measured, at_most),) = peak.counts().values()
    assert measured is not None and measured >= len(held) - 2 * counting.memory_error_bytes()
    assert at_most == MIB


def test_a_case_says_its_bound_once_and_opens_no_window() -> None:
    peak = counting.PeakOfItem()
    assert counting.PeakOfItem.calls == ("bound",)
    peak.begin()
    peak.bound(MIB)
    with pytest.raises(RuntimeError, match="twice"):
        peak.bound(2 * MIB)
    peak.counts()


in_memory = pytest.mark.skipif(not counting.on_tmpfs("/dev/shm"), reason="needs a folder in memory")


@pytest.fixture
def in_shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder whose files are shared memory; it is the place where files are written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def touched(path: Path) -> mmap.mmap:
    """A private map of the file, every page of which is in memory."""
    with path.open("rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    assert not any(found[:: mmap.PAGESIZE])
    return found


@reads_memory
def test_pages_of_files_are_counted_one_by_one(tmp_path: Path) -> None:
    files, beside = counting.MappedFiles(f"{tmp_path}/kept/"), counting.MappedFiles(f"{tmp_path}/kep")
    (tmp_path / "kept").mkdir()
    for name in ("kept/large", "elsewhere"):
        (tmp_path / name).write_bytes(bytes(MIB))
    assert files.resident_bytes() == 0
    with touched(tmp_path / "kept" / "large") as held:
        with touched(tmp_path / "elsewhere"):
            assert files.resident_bytes() == MIB
        (tmp_path / "kept" / "large").unlink()
        held[: 2 * mmap.PAGESIZE] = b"x" * 2 * mmap.PAGESIZE  # these two are the process's own now
        assert files.resident_bytes() == MIB - 2 * mmap.PAGESIZE
        assert beside.resident_bytes() == 0
    assert files.resident_bytes() == 0


@reads_memory
def test_a_file_is_known_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    files = counting.MappedFiles(str(tmp_path / "file"))
    with touched(tmp_path / "other"):
        (tmp_path / "other").unlink()
        assert files.resident_bytes() == MIB


@reads_memory
def test_pages_that_were_not_touched_are_not_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "hole").open("w+b") as file:
        file.truncate(64 * MIB)
        with mmap.mmap(file.fileno(), 0) as held:
            held[0] = 1
            resident_bytes = counting.MappedFiles(str(tmp_path / "hole")).resident_bytes()
    assert mmap.PAGESIZE <= resident_bytes <= MIB  # the system maps some neighbours along


@reads_memory
def test_what_was_read_to_count_pages_is_known(tmp_path: Path) -> None:
    def through_read_calls() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    (tmp_path / "large").write_bytes(bytes(MIB))
    with touched(tmp_path / "large"):
        files = counting.MappedFiles(str(tmp_path))
        before = through_read_calls()
        files.resident_bytes(), files.allocated_bytes()
        taken = through_read_calls() - before
    assert 0 <= taken - files.read_bytes <= 4096  # io itself was read once in between


@reads_memory
def test_a_range_of_memory_is_the_files_or_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    files = counting.MappedFiles(str(tmp_path / "file"))

    def elsewhere(held: Any) -> int:
        array = np.frombuffer(held, dtype=np.uint8)
        return files.bytes_elsewhere(array.ctypes.data, array.nbytes)

    mapped = touched(tmp_path / "file")
    assert elsewhere(mapped) == 0 and elsewhere(memoryview(mapped)[5000:5001]) == 0
    mapped[0] = 1  # now one page is the process's own
    assert elsewhere(mapped) == mmap.PAGESIZE
    assert elsewhere(bytearray(MIB)) >= MIB
    assert files.bytes_elsewhere(0, 1 << 50) == 1 << 50


@reads_memory
@in_memory
def test_shared_memory_counts_though_no_page_of_it_is_entered(in_shm: Path) -> None:
    files = counting.MappedFiles(str(in_shm))
    before = files.allocated_bytes()
    with mmap.mmap(-1, 64 * MIB) as shared:
        shared[:: mmap.PAGESIZE] = b"x" * (64 * MIB // mmap.PAGESIZE)
        shared.madvise(mmap.MADV_DONTNEED)
        assert files.allocated_bytes() - before >= 64 * MIB - 2 * counting.memory_error_bytes()


@reads_memory
@in_memory
def test_an_endless_map_counts_and_is_not_looked_through(in_shm: Path) -> None:
    with (in_shm / "file").open("w+b") as file:
        file.truncate(1 << 40)
        with mmap.mmap(file.fileno(), 1 << 40):
            assert counting.MappedFiles(str(in_shm)).resident_bytes() == 1 << 40


@reads_memory
@pytest.mark.parametrize(
    ("fault", "counted"), [(PermissionError(), True), (MemoryError(), True), (ProcessLookupError(), False)]
)
def test_what_cannot_be_read_of_a_process_that_runs_is_dearer_than_any_bound(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException, counted: bool
) -> None:
    if not counted:
        monkeypatch.setattr(counting, "is_running", lambda pid: False)
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    peak, level, calls = PeakMemory(), PeakMemory._level_bytes, []

    def failing(self: PeakMemory) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise fault
        return level(self)

    monkeypatch.setattr(PeakMemory, "_level_bytes", failing)
    peak.start()
    peak.stop(MIB)
    ((measured, _),) = peak.counts().values()
    assert measured is not None and (measured > 1 << 60) == counted


@reads_memory
def test_a_process_runs_until_it_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert counting.is_running(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not counting.is_running(child.pid)  # it waits for us, and does nothing any more
    assert not counting.is_running(child.pid)


@reads_memory
def test_shared_memory_of_an_item_counts() -> None:
    peak = counting.PeakOfItem(mapped_bytes=24 * MIB)
    peak.begin()
    with mmap.mmap(-1, 64 * MIB) as shared:
        for _ in range(64):
            shared.write(b"x" * MIB)
        peak.bound(MIB)
        ((measured, _),) = peak.counts().values()
    assert measured is not None and measured >= 64 * MIB - 2 * counting.memory_error_bytes()


@reads_memory
@in_memory
@pytest.mark.parametrize(("mapped_mib", "shared_mib"), [(24, 0), (24, 16), (0, 16), (48, 0)])
def test_files_in_memory_are_left_out_as_far_as_they_may_be_mapped(
    in_shm: Path, mapped_mib: int, shared_mib: int
) -> None:
    (in_shm / "file").write_bytes(bytes(mapped_mib * MIB))
    peak = counting.PeakOfItem(mapped_bytes=24 * MIB)
    peak.begin()
    with contextlib.ExitStack() as stack:
        if mapped_mib:
            stack.enter_context(touched(in_shm / "file"))
        if shared_mib:
            shared = stack.enter_context(mmap.mmap(-1, shared_mib * MIB))
            shared[:: mmap.PAGESIZE] = b"x" * (shared_mib * MIB // mmap.PAGESIZE)
        peak.bound(MIB)
        ((measured, _),) = peak.counts().values()
    expected = (shared_mib + max(0, mapped_mib - 24)) * MIB
    assert measured == pytest.approx(expected, abs=2 * counting.memory_error_bytes() + MIB)


def test_the_longest_mount_point_tells_where_files_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounts = f"disk / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\ndisk {tmp_path}/kept ext4 rw 0 0\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *a, **k: mounts if str(path) == "/proc/self/mounts" else read(path, *a, **k),
    )
    monkeypatch.setattr(Path, "exists", lambda path: True)
    found = [counting.on_tmpfs(place) for place in (tmp_path / "a", tmp_path / "kept" / "b", tmp_path.parent)]
    assert found == [True, False, False]


@reads_memory
def test_memory_given_back_inside_the_window_was_held_in_it() -> None:
    ballast = bytearray(b"x") * (64 * MIB)
    peak = PeakMemory()
    peak.start()
    del ballast
    counting.settle()
    peak.stop()
    ((measured, _),) = peak.counts().values()
    assert measured is not None and measured >= 64 * MIB - 2 * counting.memory_error_bytes() - MIB


@pytest.mark.parametrize("name", ["addmm", "baddbmm", "addmv"])
def test_a_product_in_place_costs_what_the_same_product_costs(name: str) -> None:
    shapes = {
        "addmm": ((3, 5), (3, 7), (7, 5)),
        "baddbmm": ((2, 3, 5), (2, 3, 7), (2, 7, 5)),
        "addmv": ((3,), (3, 7), (7,)),
    }
    added, left, right = (torch.randn(shape) for shape in shapes[name])
    with TensorWork() as new:
        getattr(torch, name)(added, left, right)
    with TensorWork(large_elements=1) as in_place:
        getattr(added, f"{name}_")(left, right)
    assert in_place.flops == new.flops > 0
    assert in_place.uncounted == ()
    assert in_place.allocated_bytes == 0


def test_work_that_would_not_be_counted_is_refused() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.ones(4, 4)

    def switched_off() -> None:
        with _disable_current_modes():
            x @ x

    def below() -> None:
        with torch._C._DisableTorchDispatch():
            x @ x

    ways = {
        "switch the counting off": (switched_off, below),
        "start no other": (lambda: threading.Thread(target=x.sum).start(),),
    }
    for message, tries in ways.items():
        for way in tries:
            with TensorWork() as work, pytest.raises(RuntimeError, match=message):
                way()
            assert work.flops == 0
            way() if message != "start no other" else None  # outside the block all is as before
    with TensorWork() as work:
        with Passing():  # a mode of the answer's own comes and goes
            x @ x
        x @ x
    assert work.flops == 2 * 2 * 4**3


def test_living_bytes_are_those_that_somebody_holds() -> None:
    x = torch.ones(256)
    with counting.LivingBytes() as living:
        y, held = x + 1, [x * 2, (x * 3)[:1]]
        _ = x * 4 + 1
    assert living.size_bytes() == 1024 * 4  # y, the two in the list, and what the last line left in _
    assert living.size_bytes(y, _) == 1024 * 2
    held.clear()
    assert living.size_bytes(y, _) == 0
