"""read_header against files that safetensors wrote, and against what safetensors accepts and refuses."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save

from llmcourse import exercise, judging
from llmcourse.lessons.parameter_loading import read_header as lesson
from llmcourse.lessons.parameter_loading.read_header import read_header

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


class BytesReader:
    """A file in memory that remembers what was asked of it."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.size_bytes = raw, len(raw)
        self.asked: list[tuple[int, int]] = []

    def read(self, offset: int, count: int) -> bytes:
        self.asked.append((offset, count))
        return self.raw[offset : offset + count]


def file_of(header: str | bytes, data: bytes, *, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def accepted(raw: bytes) -> bool:
    try:
        read_header(BytesReader(raw))
    except ValueError:
        return False
    return True


def accepted_by_the_library(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = random.Random(seed)
    shapes = [[], [0], [draw.randint(1, 9)], [2, draw.randint(1, 5), 3]]
    tensors = {}
    for name, dtype in DTYPES.items():
        for shape in shapes:
            raw = torch.zeros(shape, dtype=torch.uint8).numel() * dtype.itemsize
            data = torch.tensor([draw.randint(0, 1) for _ in range(raw)], dtype=torch.uint8)
            tensors[f"{draw.randint(0, 99)}.{name}.{len(shape)}.{shape[:1]}"] = data.view(dtype).reshape(
                shape
            )
    return tensors


def test_files_of_the_library_are_read_as_the_library_reads_them(seed: int) -> None:
    tensors = some_tensors(seed)
    raw = save(tensors, metadata={"format": "pt", "note": "x"})
    found = read_header(BytesReader(raw))
    assert found.keys() == tensors.keys()
    library = dict(safetensors.deserialize(raw))
    for name, (dtype, shape, start, end) in found.items():
        assert (DTYPES[dtype], shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert (dtype, list(shape)) == (library[name]["dtype"], library[name]["shape"])
        assert raw[start:end] == bytes(library[name]["data"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_takes_as_many_bytes_a_value(dtype: str) -> None:
    assert lesson.ITEM_BYTES[dtype] == DTYPES[dtype].itemsize
    entry = {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * DTYPES[dtype].itemsize]}
    raw = file_of(json.dumps({"a": entry}), bytes(entry["data_offsets"][1]))
    assert accepted(raw) and accepted_by_the_library(raw)
    assert not accepted(raw + b"\0") and not accepted_by_the_library(raw + b"\0")


def test_every_byte_of_a_header_changed_gives_the_library_s_verdict() -> None:
    tensors = {"a": torch.zeros(2, 2), "b": torch.zeros(3, dtype=torch.uint8), "c": torch.zeros(0)}
    raw = save(tensors, metadata={"format": "pt"})
    end = 8 + int.from_bytes(raw[:8], "little")
    verdicts = []
    for place in range(end):
        for new in (*b'{}[]",:0159 xU\\-.\n', 0, 0xC3, raw[place] ^ 1, raw[place] ^ 0x80):
            changed = raw[:place] + bytes([new]) + raw[place + 1 :]
            verdicts.append((accepted(changed), accepted_by_the_library(changed), changed))
    assert {(ours, theirs) for ours, theirs, _ in verdicts} >= {(True, True), (False, False)}
    assert [changed for ours, theirs, changed in verdicts if ours and not theirs] == []
    # Where the library accepts and we do not, one of the rules that only the format's text has was broken.
    for _, _, changed in [v for v in verdicts if v[1] and not v[0]]:
        text = changed[8 : 8 + int.from_bytes(changed[:8], "little")]
        names: list[list[str]] = []
        json.loads(
            text, object_pairs_hook=lambda pairs, names=names: names.append([n for n, _ in pairs]) or 0
        )
        framed = text[:1] == b"{" and text.rstrip(b" ")[-1:] == b"}"
        assert not framed or any(len(set(group)) < len(group) for group in names), text


def test_every_truncation_is_refused_as_the_library_refuses_it() -> None:
    raw = save({"a": torch.arange(5), "b": torch.zeros(3)})
    for size in range(len(raw)):
        assert not accepted(raw[:size]) and not accepted_by_the_library(raw[:size]), size


SAME_VERDICT = [
    (lesson.ScalarsAndNothing, {}),
    (lesson.EveryType, {}),
    (lesson.WrongLengths, {}),
    (lesson.WrongRanges, {}),
    (lesson.WrongEntries, {"metadata that is null"}),
    # The format's text forbids these; safetensors 0.8.0 accepts them.
    (
        lesson.WrongTexts,
        {
            "a space before the brace",
            "a line break before the brace",
            "a line break after the object",
            "a tab after the object",
            "a name twice",
            "a name twice, once escaped",
            "a key twice in the metadata",
        },
    ),
]


@pytest.mark.parametrize(
    ("files", "only_the_library_accepts"), SAME_VERDICT, ids=lambda part: getattr(part, "__name__", "")
)
def test_the_cases_files_are_judged_as_the_library_judges_them(
    files: type[lesson.Files], only_the_library_accepts: set[str], seed: int
) -> None:
    made = files(exercise.Rng(seed)).made(exercise.Rng(seed))
    differing = {name for name, raw in made.items() if accepted(raw) != accepted_by_the_library(raw)}
    assert differing == set(only_the_library_accepts)
    assert any(accepted(raw) for raw in made.values())


def test_only_the_length_and_the_header_are_read() -> None:
    raw = save({"a": torch.zeros(1000)})
    reader = BytesReader(raw)
    read_header(reader)
    assert reader.asked == [(0, 8), (8, int.from_bytes(raw[:8], "little"))]


@pytest.mark.parametrize("claim", [1 << 62, (1 << 64) - 1, 100])
def test_a_claim_beyond_the_file_is_refused_before_it_is_read(claim: int) -> None:
    reader = BytesReader(file_of("{}", b"", length=claim))
    with pytest.raises(ValueError, match="of a file of 10"):
        read_header(reader)
    assert reader.asked == [(0, 8)]


def test_which_file_is_which_never_leaves_the_judge(seed: int) -> None:
    files = lesson.WrongTexts(exercise.Rng(seed))
    assert files.calls == ("read",)
    assert len(files.read(0, 0, 4)) in (0, 4)
    made = files.made(exercise.Rng(seed))
    assert files.observed(list(range(len(made)))).keys() == made.keys()
    assert files.observed([1]) == [1]
    with pytest.raises(TypeError, match="two integers"):
        files.read(0, -1, 4)


def test_an_answer_that_hands_the_file_to_the_library_earns_nothing(seed: int) -> None:
    def with_the_library(reader: Any) -> dict[str, Any]:
        raw = reader.read(0, reader.size_bytes)
        try:
            safetensors.deserialize(raw)
        except safetensors.SafetensorError as error:
            raise ValueError from error
        data = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:data])
        header.pop("__metadata__", None)
        return {
            name: (e["dtype"], tuple(e["shape"]), data + e["data_offsets"][0], data + e["data_offsets"][1])
            for name, e in header.items()
        }

    found = exercise.of(read_header)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    verdict = judging.judge(runner, found, with_the_library, seed, expected, naming=False)
    assert verdict.points == 0 and "switched off" in verdict.reason
