"""map_tensor against safetensors' own reader, and against the system's own account of what was read."""

from __future__ import annotations

import io
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmcourse import agreement, exercise, judging, source
from llmcourse.counting import can_read_memory, memory_error_bytes, on_tmpfs
from llmcourse.engine import Answer, Engine
from llmcourse.lessons.parameter_loading import map_tensor as lesson
from llmcourse.lessons.parameter_loading.map_tensor import map_tensor


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A tensor of every dtype for each of some shapes, of random bytes."""
    draw = random.Random(seed)
    tensors = {}
    for dtype in lesson.DTYPES.values():
        for shape in ([], [0], [draw.randint(1, 9)], [2, 0, 3], [3, draw.randint(1, 999), 2]):
            size_bytes = torch.zeros(shape, dtype=torch.uint8).numel() * dtype.itemsize
            highest = 1 if dtype == torch.bool else 255
            raw = torch.tensor([draw.randint(0, highest) for _ in range(size_bytes)], dtype=torch.uint8)
            tensors[f"{draw.randint(0, 99)}.{dtype}.{shape}"] = raw.view(dtype).reshape(shape)
    return tensors


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bytes: NaN is compared as any other value."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.reshape(-1).view(torch.uint8), expected.clone().reshape(-1).view(torch.uint8))


def test_every_tensor_of_a_file_of_the_library_is_what_the_library_reads(tmp_path: Path, seed: int) -> None:
    tensors, path = some_tensors(seed), str(tmp_path / "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, saved in tensors.items():
            found = map_tensor(path, name)
            assert_same(found, saved)
            assert_same(found, file.get_tensor(name))


@pytest.mark.parametrize("before_bytes", [1, 2, 3, 4, 7, 4095, 4096, 65_537])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "I64", "I16", "F8_E5M2"])
def test_tensors_at_odd_places_have_the_library_s_values_and_lie_aligned(
    tmp_path: Path, seed: int, dtype: str, before_bytes: int
) -> None:
    path = str(tmp_path / "odd.safetensors")
    entries = [lesson.Entry("before", "U8", [before_bytes]), lesson.Entry("wanted", dtype, [3, 5])]
    lesson.write(path, exercise.Rng(seed), entries)
    found = map_tensor(path, "wanted")
    with safe_open(path, "pt") as file:
        assert_same(found, file.get_tensor("wanted"))
    assert found.data_ptr() % found.element_size() == 0
    assert found.untyped_storage().nbytes() == found.nbytes


@pytest.mark.parametrize("pad", [8, 9, 10, 15])
def test_a_header_that_is_not_padded_is_read_as_the_library_reads_it(
    tmp_path: Path, seed: int, pad: int
) -> None:
    path = str(tmp_path / "unpadded.safetensors")
    lesson.write(path, exercise.Rng(seed), [lesson.Entry("wanted", "F32", [7])], pad=pad)
    assert int.from_bytes(Path(path).read_bytes()[:8], "little") % 8 == pad % 8
    with safe_open(path, "pt") as file:
        assert_same(map_tensor(path, "wanted"), file.get_tensor("wanted"))


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = str(tmp_path / "model.safetensors")
    save_file({"weight": torch.arange(12.0).view(3, 4), "other": torch.ones(1000)}, path)
    return path


def test_what_is_written_to_a_result_reaches_neither_the_file_nor_another_result(saved: str) -> None:
    before, other = Path(saved).read_bytes(), map_tensor(saved, "weight")
    found = map_tensor(saved, "weight")
    found.mul_(2)
    assert torch.equal(found, torch.arange(0.0, 24.0, 2).view(3, 4))
    assert torch.equal(other, torch.arange(12.0).view(3, 4))
    assert torch.equal(map_tensor(saved, "weight"), other)
    assert Path(saved).read_bytes() == before


def test_a_result_outlives_its_file(saved: str) -> None:
    found = map_tensor(saved, "weight")
    save_file({"weight": torch.zeros(2)}, f"{saved}.new")
    os.replace(f"{saved}.new", saved)
    assert torch.equal(found, torch.arange(12.0).view(3, 4))
    assert torch.equal(map_tensor(saved, "weight"), torch.zeros(2))
    os.remove(saved)
    assert torch.equal(found, torch.arange(12.0).view(3, 4))


def test_torch_save_of_a_result_writes_the_tensor_and_not_the_file(saved: str) -> None:
    mapped, plain = io.BytesIO(), io.BytesIO()
    torch.save(map_tensor(saved, "weight"), mapped)
    torch.save(torch.arange(12.0).view(3, 4), plain)
    assert len(mapped.getvalue()) == len(plain.getvalue())


def test_a_result_takes_part_in_training_as_any_tensor_does(saved: str) -> None:
    weight = torch.nn.Parameter(map_tensor(saved, "weight"))
    (weight @ torch.ones(4)).sum().backward()
    torch.optim.SGD([weight], lr=1.0).step()
    assert torch.equal(weight.detach(), torch.arange(12.0).view(3, 4) - 1)


@pytest.mark.parametrize("name", ["weights", "weigh", "__metadata__"])
def test_a_name_that_no_tensor_has_is_refused_by_that_name(saved: str, name: str) -> None:
    with pytest.raises(KeyError, match=name):
        map_tensor(saved, name)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {}])
def test_a_file_may_have_metadata_or_none(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = str(tmp_path / "model.safetensors")
    save_file({"weight": torch.arange(3)}, path, metadata=metadata)
    assert torch.equal(map_tensor(path, "weight"), torch.arange(3))
    with pytest.raises(KeyError, match="__metadata__"):
        map_tensor(path, "__metadata__")


@pytest.mark.skipif(sys.platform != "linux", reason="holes and the limit on memory are those of Linux")
def test_a_tensor_of_a_file_larger_than_the_machine_s_memory_is_mapped(tmp_path: Path) -> None:
    # The file is a hole of 1 TiB but for its ends; a private map of all of it the kernel refuses as a rule.
    before_bytes, path = 1 << 40, tmp_path / "huge.safetensors"
    entries = [lesson.Entry("before", "U8", [before_bytes]), lesson.Entry("wanted", "I32", [4])]
    with open(path, "wb") as file:
        file.write(lesson.head(entries))
        file.seek(before_bytes, os.SEEK_CUR)
        file.write(torch.arange(4, dtype=torch.int32).numpy().tobytes())
    assert torch.equal(map_tensor(str(path), "wanted"), torch.arange(4, dtype=torch.int32))


class Watch(lesson.FileUse):
    """The counts as they are."""

    def named(self, found: tuple[int, int, int] | None) -> dict[str, tuple[float | None, float | None]]:
        assert found is not None
        return dict(zip(("read", "allocated", "mapped"), ((count, None) for count in found), strict=True))


def counted(act: Callable[[str], object], path: str) -> dict[str, float]:
    watch = Watch()
    watch.start(os.path.realpath(path))
    kept = act(path)
    watch.look()
    del kept
    return {name: count for name, (count, _) in watch.counts().items() if count is not None}


@pytest.mark.skipif(not can_read_memory(), reason="this system does not say what a process reads and maps")
def test_the_counters_see_a_file_that_is_read_and_one_that_is_mapped(tmp_path: Path) -> None:
    path, size_bytes = str(tmp_path / "raw"), 8 << 20
    Path(path).write_bytes(bytes(size_bytes))
    # The system's counters are off by memory_error_bytes; Python's own reads and pages are less than 1 MiB.
    error_bytes = memory_error_bytes() + (1 << 20)

    def read_into_memory(path: str) -> mmap.mmap:
        """Into memory that nobody had before: an allocator may hand out what it kept."""
        target = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with open(path, "rb", buffering=0) as file:
            assert file.readinto(target) == size_bytes
        return target

    read = counted(read_into_memory, path)
    assert (
        abs(read["read"] - size_bytes) <= error_bytes and abs(read["allocated"] - size_bytes) <= error_bytes
    )
    assert read["mapped"] == 0

    def mapped_and_touched(path: str) -> torch.Tensor:
        found = torch.from_file(path, shared=False, size=size_bytes, dtype=torch.uint8)
        assert not found.any()
        return found

    mapped_and_touched(path)  # what torch itself maps in of its libraries at its first operations
    mapped = counted(mapped_and_touched, path)
    assert mapped["mapped"] == size_bytes
    assert mapped["read"] <= error_bytes and mapped["allocated"] <= error_bytes


@pytest.mark.skipif(not can_read_memory(), reason="this system does not say what a process reads and maps")
def test_what_is_mapped_in_is_counted_though_no_sample_falls_on_it(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(lesson.FileUse, "_sample", lambda self: None)
    watch = lesson.Reach()
    lesson.sums_from_the_middle(map_tensor, exercise.Rng(seed), watch)
    ((mapped, at_most),) = watch.counts().values()
    assert mapped is not None and at_most is not None
    assert lesson.WANTED_BYTES <= mapped <= at_most


@pytest.mark.skipif(not can_read_memory(), reason="this system does not say what a process reads and maps")
@pytest.mark.parametrize("in_memory", [False, True])
def test_shared_memory_counts_as_a_copy_also_where_files_lie_in_it(tmp_path: Path, in_memory: bool) -> None:
    if in_memory and not on_tmpfs("/dev/shm"):
        pytest.skip("needs a folder in memory")
    size_bytes = 8 << 20
    error_bytes = memory_error_bytes() + (1 << 20)

    def mapped_and_copied(path: str) -> tuple[mmap.mmap, mmap.mmap]:
        target = mmap.mmap(-1, size_bytes)
        with open(path, "rb", buffering=0) as file:
            assert file.readinto(target) == size_bytes
            found = mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ)
        assert not any(found[:: mmap.PAGESIZE])
        return found, target

    with tempfile.TemporaryDirectory(dir="/dev/shm" if in_memory else tmp_path) as folder:
        path = f"{folder}/raw"
        Path(path).write_bytes(bytes(size_bytes))
        found = counted(mapped_and_copied, path)
    assert abs(found["allocated"] - size_bytes) <= error_bytes
    assert found["mapped"] == size_bytes


COPIES_AHEAD = """
import glob, json, mmap, os, tempfile, torch
from torch import Tensor
{reference}
honest, kept = map_tensor, {{}}

def map_tensor(path, name):
    for other in glob.glob(os.path.join(tempfile.gettempdir(), "*", "model.safetensors")):
        if other != path and os.path.getsize(other) > 16 << 20:
            kept[other] = honest(other, "wanted").clone()
    found = kept.pop(path) if path in kept else honest(path, name)
    return found.clone() if found.nbytes > 1 << 20 else found  # small ones have to be mapped
"""


@pytest.mark.skipif(not can_read_memory(), reason="this system does not say what a process reads and maps")
def test_the_large_file_cannot_be_copied_before_copies_are_counted(seed: int) -> None:
    found = exercise.of(map_tensor)
    text = COPIES_AHEAD.format(reference=source.definition(found.source, "map_tensor"))
    answer = Answer("map_tensor", (("cell", text),), own="cell")
    with Engine() as engine:
        verdict = judging.judge(engine, found, answer, seed, engine.expected(found, seed), naming=False)
    assert verdict.verdict == "right" and "peak anonymous bytes" in verdict.reason
    assert verdict.points == pytest.approx(found.points * 5 / 6)


def test_a_second_window_is_refused() -> None:
    watch = lesson.Copies()
    watch.start("/nowhere")
    if can_read_memory():
        with pytest.raises(RuntimeError, match="one window"):
            watch.start("/nowhere")
    watch.counts()


def test_what_cannot_be_counted_has_no_count_and_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson, "can_read_memory", lambda: False)
    for kind in (lesson.Copies, lesson.Reach):
        watch = kind()
        watch.start("/nowhere")
        watch.look()
        assert set(watch.counts().values()) == {(None, None)}


def test_memory_of_a_closed_map_is_recognised_without_touching_it(saved: str) -> None:
    # In a process of its own, which touching it would end.
    code = f"""
from llmcourse.lessons.parameter_loading import map_tensor as lesson
closed = lesson.map_closed({saved!r}, "weight")
print(lesson.is_mapped(closed), lesson.seen(closed), lesson.is_mapped(lesson.map_tensor({saved!r}, "weight")))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False memory that is no longer mapped True"


def test_memory_that_cannot_be_written_to_is_recognised_without_a_crash(saved: str) -> None:
    code = f"""
import warnings; warnings.simplefilter("ignore")
from llmcourse.lessons.parameter_loading import map_tensor as lesson
print(*[lesson.overwrite(make({saved!r}, "weight"), bytes(48)) for make in (lesson.read_only_map, lesson.map_tensor)])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]


def test_an_answer_that_hands_the_file_to_the_library_earns_nothing(seed: int) -> None:
    def with_safe_open(path: str, name: str) -> torch.Tensor:
        import safetensors

        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def with_load_file(path: str, name: str) -> torch.Tensor:
        import safetensors.torch

        return safetensors.torch.load_file(path)[name]

    def with_load(path: str, name: str) -> torch.Tensor:
        import safetensors.torch

        return safetensors.torch.load(Path(path).read_bytes())[name]

    found = exercise.of(map_tensor)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    for answer in (with_safe_open, with_load_file, with_load):
        verdict = judging.judge(runner, found, answer, seed, expected, naming=False)
        assert verdict.points == 0 and "switched off" in verdict.reason


class Uncounted:
    """Counts nothing."""

    def start(self, path: str) -> None:
        pass

    def look(self, address: int = 0, size_bytes: int = 0) -> None:
        pass


def test_what_stands_for_a_large_tensor_without_its_bytes_is_observed(seed: int) -> None:
    def large(path: str) -> bool:
        return os.path.getsize(path) > lesson.FILE_BYTES // 2

    def subclass(path: str, name: str) -> torch.Tensor:
        class Tensor(torch.Tensor):
            """A tensor that could answer to sum() in its own way."""

        found = map_tensor(path, name)
        return found.as_subclass(Tensor) if large(path) else found

    def nothing_in_it(path: str, name: str) -> torch.Tensor:
        found = map_tensor(path, name)
        return torch.empty(0, dtype=found.dtype) if large(path) else found

    def zeros(path: str, name: str) -> torch.Tensor:
        found = map_tensor(path, name)
        return torch.zeros_like(found) if large(path) else found

    def one_page(path: str, name: str) -> torch.Tensor:
        found = map_tensor(path, name)
        return found.reshape(-1)[:512].expand(found.numel() // 512, 512) if large(path) else found

    def observed(answer: Callable[[str, str], object]) -> object:
        return lesson.sums_from_the_middle(answer, exercise.Rng(seed), Uncounted())

    expected = observed(map_tensor)
    assert agreement.difference(observed(lesson.whole_map), expected) is None
    for answer in (subclass, nothing_in_it, zeros, one_page, lesson.later):
        assert agreement.difference(observed(answer), expected) is not None, answer


def test_a_view_that_repeats_a_value_is_not_written_over(saved: str) -> None:
    """Its memory is one value: as many bytes as it seems to have would be written over somebody else's."""

    def repeated(path: str, name: str) -> torch.Tensor:
        return torch.zeros(1).expand(map_tensor(path, name).shape)

    assert lesson.written_to(repeated, exercise.Rng(0))["written"] is False


def test_headers_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    entries = [lesson.Entry("a", "F32", [2]), lesson.Entry("b", "BOOL", [])]
    lesson.write(str(tmp_path / "ours"), exercise.Rng(1), entries)
    save_file(
        {"a": torch.zeros(2), "b": torch.zeros([], dtype=torch.bool)}, tmp_path / "theirs", {"format": "pt"}
    )
    headers = []
    for name in ("ours", "theirs"):
        raw = (tmp_path / name).read_bytes()
        headers.append(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))
    assert headers[0] == headers[1]
