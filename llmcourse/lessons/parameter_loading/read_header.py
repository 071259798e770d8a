"""What a safetensors file holds, from its first bytes; every malformed file is refused."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy

from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake


@exercise(
    points=4,
    minutes=12,
    forbid=(
        "safetensors.deserialize",
        "safetensors.safe_open",
        "safetensors.torch.load",
        "safetensors.numpy.load",
        "safetensors._safetensors_rust.deserialize",
        "safetensors._safetensors_rust.safe_open",
    ),
    hints=(
        "Trust nothing: compare the header's length with the file's size before you read it, and let the byte ranges, "
        "sorted, prove that they cover the data from its first byte to its last.",
        "json.loads keeps the last of two equal names, guesses encodings when it is given bytes, takes NaN for JSON, "
        "and gives true as a bool, which Python counts as an int; object_pairs_hook sees names before they are merged.",
    ),
)
def read_header(reader: Any) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Places, types and shapes of a safetensors file's tensors, and a refusal of every
    malformed file; about 35 lines.

    reader.size_bytes is the file's size; reader.read(offset, count) gives `count`
    bytes, fewer at the end of the file. Returns {name: (dtype, shape, start, end)}:
    dtype as the header writes it, shape a tuple of ints, the tensor's bytes at [start,
    end) counted from the first byte of the *file*. `__metadata__` is not a tensor.

    The file is 8 bytes N (unsigned, little-endian), N bytes of header, then the data up
    to the end of the file. The header is a JSON object in UTF-8 whose first byte is
    `{`; spaces, and nothing else, may follow it. It holds {name: {"dtype": ...,
    "shape": [...], "data_offsets": [begin, end]}} in any order, offsets counted from
    the first byte of the data, and may hold `__metadata__`, an object whose values are
    strings. Other keys of an entry mean nothing. Sorted, the ranges cover the data:
    each, also one of no bytes, begins where the one before it ends, the first at 0, and
    the last ends with the data. shape [] is one value; a 0 in a shape means no values
    and no bytes; no tensor at all is allowed.

    Bytes a value: 1 for BOOL U8 I8 F8_E4M3 F8_E5M2, 2 for U16 I16 F16 BF16, 4 for U32
    I32 F32, 8 for U64 I64 F64.

    ValueError, and nothing else, for a file that is not like this: too short, a dtype
    not named here, an entry without its three keys or with others' types in them (true
    and 1.0 are not integers), a negative number, a range whose length is not the
    shape's, JSON nested too deeply for the parser. A name twice in one object is
    refused, however it is escaped, and so is a space before `{`: the format's text
    forbids both, although the library (safetensors 0.8.0) accepts them. NaN and
    Infinity are no JSON.

    Read no more than the 8 bytes and the header, and never ask for more than the file
    holds: N may claim 2**62. The library's own readers are switched off.
    """
    ### BEGIN SOLUTION
    item_bytes = {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "U16": 2,
        "I16": 2,
        "F16": 2,
        "BF16": 2,
    }
    item_bytes |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice in the header")
        return dict(pairs)

    def no_json(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    data_start = 8 + int.from_bytes(reader.read(0, 8), "little")
    if data_start > reader.size_bytes:
        raise ValueError(f"the header ends at byte {data_start} of a file of {reader.size_bytes}")
    text = reader.read(8, data_start - 8).decode("utf-8")
    if not text.startswith("{") or not text.rstrip(" ").endswith("}"):
        raise ValueError("the header is not one object, from { to }, with spaces behind it")
    try:
        header = json.loads(text, object_pairs_hook=distinct, parse_constant=no_json)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    found = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
                dtype in item_bytes
            ):
                numbers = [*shape, begin, end]
            case _:
                raise ValueError(f"{name}: expected dtype, shape and data_offsets, found {entry}")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{name}: expected sizes and offsets, found {numbers}")
        if end - begin != math.prod(shape) * item_bytes[dtype]:
            raise ValueError(f"{name}: {end - begin} bytes for {dtype} {shape}")
        found[name] = (dtype, tuple(shape), data_start + begin, data_start + end)

    covered = data_start
    for start, end in sorted((start, end) for _, _, start, end in found.values()):
        if start != covered:
            raise ValueError(f"the data has a gap or an overlap between bytes {covered} and {start}")
        covered = end
    if covered != reader.size_bytes:
        raise ValueError(f"the tensors end at byte {covered} of a file of {reader.size_bytes}")
    return found
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def entries_of(tensors: list[tuple[str, str, list[int]]]) -> dict[str, dict[str, Any]]:
    """Header entries of tensors (name, dtype, shape) that lie one after the other."""
    sizes = [math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in tensors]
    ends = list(itertools.accumulate(sizes))
    return {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [end - size, end]}
        for (name, dtype, shape), size, end in zip(tensors, sizes, ends, strict=True)
    }


def packed(header: dict[str, Any] | str | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A file of this header (an object, a text, or bytes) and data; `length` is what it claims, if not the truth."""
    text = json.dumps(header, separators=(",", ":")) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


class Files:
    """Files in the judge's process, read by number in a drawn order; their names stay there."""

    calls = ("read",)

    def __init__(self, rng: Rng) -> None:
        files = self.made(rng)
        self._names = rng.shuffled(files)
        self._files = [files[name] for name in self._names]
        self._lock = threading.Lock()
        self.read_bytes = self.largest_read_bytes = 0
        self.sizes = [len(file) for file in self._files]
        self.attributes = {"sizes": self.sizes}

    def made(self, rng: Rng) -> dict[str, bytes]:
        """The files by name."""
        raise AssertionError("every kind of files makes its own")

    def read(self, number: int, offset: int, count: int) -> bytes:
        """Bytes of a file, counted."""
        if not all(type(value) is int and value >= 0 for value in (number, offset, count)):
            raise TypeError(f"read({offset!r}, {count!r}): expected two integers of at least 0")
        with self._lock:
            found = self._files[number][offset : offset + count]
            self.read_bytes += len(found)
            self.largest_read_bytes = max(self.largest_read_bytes, count)
        return found

    def observed(self, observed: Any) -> Any:
        """The list of outcomes by the files' names, which never leave this process."""
        if isinstance(observed, dict):  # a cost's
            return {key: self.observed(part) for key, part in observed.items()}
        fits = isinstance(observed, list) and len(observed) == len(self._names)
        return dict(zip(self._names, observed, strict=True)) if fits else observed

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return {}


class Reader:
    """One of the files: `size_bytes`, and `read(offset, count)`, which gives fewer bytes at the end of the file."""

    def __init__(self, files, number):
        self.size_bytes = files.sizes[number]
        self._files, self._number = files, number

    def read(self, offset, count):
        """`count` bytes from `offset` on."""
        return self._files.read(self._number, offset, count)


def refusal(answer, reader):
    """What is returned for a file, or "ValueError" where that is raised."""
    try:
        return answer(reader)
    except ValueError:
        return "ValueError"


def outcome(answer, reader):
    """What is returned for a file, or the name of what is raised: "ValueError" for one of any kind."""
    try:
        return refusal(answer, reader)
    except NotImplementedError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is observed
        return type(error).__name__


def outcomes(answer, files, one=outcome):
    """What is returned or raised for each file, in their order."""
    return [one(answer, Reader(files, number)) for number in range(len(files.sizes))]


def intact(rng: Rng) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Entries and data of a small file that is as it should be, with four tensors of at least 8 bytes."""
    tensors = [
        (
            f"layers.{i}.{rng.bytes(2).hex()}",
            rng.choice(["F32", "I32", "U32"]),
            [rng.integer(2, 5), rng.integer(2, 5)],
        )
        for i in range(4)
    ]
    entries = entries_of(tensors)
    return entries, rng.bytes(max(entry["data_offsets"][1] for entry in entries.values()))


class EveryType(Files):
    """One tensor of each type, in a header in another order than the data."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        tensors = [
            (f"{dtype}.{rng.bytes(2).hex()}", dtype, [rng.integer(1, 5) for _ in range(rng.integer(1, 3))])
            for dtype in rng.shuffled(ITEM_BYTES)
        ]
        entries = entries_of(tensors)
        data = rng.bytes(max(entry["data_offsets"][1] for entry in entries.values()))
        mixed = {name: entries[name] for name in rng.shuffled(entries)}
        note = {"__metadata__": {"format": "pt", "note": rng.bytes(3).hex()}}
        plain = json.dumps({**mixed, **note}, ensure_ascii=False)
        odd = [
            "",
            " ",
            "__scale__",
            "_metadata_",
            "dtype",
            "a/b",
            "a.b",
            "A.b",
            " a.b",
            "a\u00e9",
            "\U0001f600",
        ]
        many = entries_of([(f"experts.{i}.weight.{rng.bytes(2).hex()}", "U8", [1]) for i in range(900)])
        return {
            "odd names": packed(
                entries_of([(name, "I8", [3]) for name in rng.shuffled(odd)]), bytes(3 * len(odd))
            ),
            "a header of more than 64 KiB": packed(many, rng.bytes(len(many))),
            "plain": packed(mixed, data),
            "with metadata": packed(plain, data),
            "padded with spaces": packed(plain + " " * rng.integer(1, 9), data),
            "a name in Chinese": packed(plain.replace("BF16.", "权重."), data),
        }


@case(read_header, service=EveryType)
def every_type(answer, rng, files):
    """Files with a tensor of every type, with metadata, spaces after the header, odd names, 900 tensors."""
    return outcomes(answer, files, refusal)


class ScalarsAndNothing(Files):
    """Tensors of one value and of none, and files without tensors."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        width = rng.integer(2, 9)
        scalar: tuple[str, str, list[int]] = ("step", "I64", [])
        vector = ("weight", "F16", [width, 3])
        none = [("none", "F32", [0]), ("no_rows", "F64", [0, width]), ("no_columns", "BF16", [width, 0, 2])]
        size = 8 + 6 * width
        mixed = rng.shuffled([scalar, vector, *none])
        return {
            "scalars": packed(entries_of([scalar, ("scale", "F32", []), vector]), rng.bytes(size + 4)),
            "empty tensors": packed(entries_of(mixed), rng.bytes(size)),
            "an empty tensor where another begins": packed(
                {
                    "weight": {"dtype": "U8", "shape": [width], "data_offsets": [0, width]},
                    "none": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
                },
                rng.bytes(width),
            ),
            "no data": packed(entries_of(none), b""),
            "no tensors": packed({}, b""),
            "only metadata": packed({"__metadata__": {"width": str(width)}}, b""),
        }


@case(read_header, service=ScalarsAndNothing)
def scalars_and_nothing(answer, rng, files):
    """Tensors of one value and of no values, files without data or tensors: all of them allowed."""
    return outcomes(answer, files, refusal)


class WrongLengths(Files):
    """Files that end too early, or whose first 8 bytes are not the header's length."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        entries, data = intact(rng)
        good = packed(entries, data)
        length = int.from_bytes(good[:8], "little")
        return {
            "intact": good,
            "no bytes at all": b"",
            "seven bytes": good[:7],
            "cut inside the header": good[: 8 + rng.integer(1, length - 1)],
            "cut inside the data": good[: -rng.integer(1, len(data))],
            "header said to be longer than the file": packed(
                entries, data, length=len(good) + rng.integer(0, 99)
            ),
            "header said to have 2^62 bytes": packed(entries, data, length=1 << 62),
            "header said to have 2^63 bytes": packed(entries, data, length=1 << 63),
            "header said to have 2^64 - 1 bytes": packed(entries, data, length=(1 << 64) - 1),
            "header said to have 2^64 - 8 bytes": packed(entries, data, length=(1 << 64) - 8),
            "header said to be 4 GiB longer": packed(entries, data, length=length + (1 << 32)),
            "header said to be 2^56 bytes longer": packed(entries, data, length=length + (1 << 56)),
            "header said to be one byte shorter": packed(entries, data, length=length - 1),
            "header that reaches into the data": packed(entries, data, length=length + rng.integer(1, 8)),
        }


@case(read_header, service=WrongLengths)
def wrong_lengths(answer, rng, files):
    """Files cut short and headers of a wrong length, beside an intact one."""
    return outcomes(answer, files)


class WrongRanges(Files):
    """Ranges that do not fit the data, one another, or the shape."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        entries, data = intact(rng)
        names = list(entries)
        last = entries[names[-1]]["data_offsets"]
        late = {
            name: {**entry, "data_offsets": [n + 4 for n in entry["data_offsets"]]}
            for name, entry in entries.items()
        }
        gap = {**entries, names[-1]: {**entries[names[-1]], "data_offsets": [n + 4 for n in last]}}
        same = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
        apart = {"a": {**same, "shape": [4]}, "b": {**same, "data_offsets": [3, 6]}}
        amends = {"a": same, "b": {**same, "data_offsets": [2, 5]}}
        amends["c"] = {**same, "shape": [2], "data_offsets": [6, 8]}
        back = {"a": {**same, "shape": [-3], "data_offsets": [3, 0]}, "b": {**same, "data_offsets": [0, 3]}}
        wrapped = {"dtype": "U8", "shape": [1 << 32, 1 << 32], "data_offsets": [last[1], last[1]]}
        huge = {"dtype": "U8", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 80]}
        inside = {"dtype": "F32", "shape": [0], "data_offsets": [last[0] + 4, last[0] + 4]}
        # Names that look like any other tensor's: what is wrong is in the numbers.
        name = f"layers.{rng.integer(10, 99)}.weight"
        return {
            "intact": packed(entries, data),
            "a byte left over": packed(entries, data + b"\0"),
            "a gap before the last tensor": packed(gap, data + bytes(4)),
            "a gap before the first tensor": packed(late, data + bytes(4)),
            "two tensors over the same bytes": packed({**entries, name: {**entries[names[-1]]}}, data),
            "an overlap of one byte": packed({"a": same, "b": {**same, "data_offsets": [2, 5]}}, bytes(5)),
            "an overlap and a gap as long": packed(amends, bytes(8)),
            "no values, inside another tensor": packed({**entries, name: inside}, data),
            "a range longer than the shape": packed({"a": {**same, "shape": [2]}}, bytes(3)),
            "a range shorter than the shape": packed(apart, bytes(6)),
            "a range that runs backwards": packed(back, bytes(3)),
            "2^64 values in no bytes": packed({**entries, name: wrapped}, data),
            "2^80 values": packed({name: huge}, data),
            "the data's end beyond the file": packed(entries, data[:-1]),
        }


@case(read_header, service=WrongRanges)
def wrong_ranges(answer, rng, files):
    """Gaps, overlaps, bytes left over, ranges that contradict the shape, beside an intact file."""
    return outcomes(answer, files)


class WrongTexts(Files):
    """Headers that are not one JSON object in UTF-8 with distinct names."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        entries, data = intact(rng)
        text = json.dumps(entries)
        name = rng.choice(list(entries))
        twice = text[:-1] + f', "{name}": {json.dumps(entries[name])}}}'
        words = rng.bytes(2).hex()
        return {
            "intact": packed(text, data),
            "a space before the brace": packed(" " + text, data),
            "a line break before the brace": packed("\n" + text, data),
            "a byte order mark": packed(b"\xef\xbb\xbf" + text.encode(), data),
            "UTF-16": packed(text.encode("utf-16-le"), data),
            "not UTF-8": packed(text.replace("layers", "läyers").encode("latin-1"), data),
            "a surrogate": packed(text.encode().replace(b"layers", b"\xed\xa0\x80"), data),
            "a line break in a name": packed(text.replace("layers", "lay\ners", 1), data),
            "not JSON": packed(text.replace(":", "=", 1), data),
            "something after the object": packed(text + " {}", data),
            "a line break after the object": packed(text + "\n", data),
            "a tab after the object": packed(text + "\t ", data),
            "spaces after the object": packed(text + "  ", data),
            "an array": packed(f"[{text}]", data),
            "no header at all": packed(b"", b""),
            "a name twice": packed(twice, data),
            "a name twice, once escaped": packed(
                twice[:-1].replace(f', "{name}"', f', "\\u006c{name[1:]}"') + "}", data
            ),
            "NaN where nobody looks": packed(text.replace('"dtype"', '"x": NaN, "dtype"', 1), data),
            "infinity where nobody looks": packed(
                text.replace('"dtype"', '"x": [-Infinity], "dtype"', 1), data
            ),
            "a key twice in an entry": packed(text.replace('"dtype"', '"dtype": "F32", "dtype"', 1), data),
            "a key twice in the metadata": packed(
                f'{{"__metadata__": {{"a": "{words}", "a": "{words}"}}, {text[1:]}', data
            ),
            "nested too deeply": packed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", b""),
            "objects nested too deeply": packed('{"a":' * 100_000 + "{}" + "}" * 100_000, b""),
        }


@case(read_header, service=WrongTexts)
def wrong_texts(answer, rng, files):
    """Headers that are not one JSON object in UTF-8, or that give a name twice, beside an intact file."""
    return outcomes(answer, files)


class WrongEntries(Files):
    """Entries and metadata with missing keys or values of other types."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        entries, data = intact(rng)
        end = len(data)
        tail = {"dtype": "U8", "shape": [1], "data_offsets": [end, end + 1]}

        def with_tail(**changes: Any) -> bytes:
            return packed({**entries, "tail": {**tail, **changes}}, data + b"\1")

        def without(key: str) -> bytes:
            return packed({**entries, "tail": {k: v for k, v in tail.items() if k != key}}, data + b"\1")

        return {
            "intact": with_tail(),
            "other keys": with_tail(x=[rng.integer(1, 9)], note={"shape": [2], "dtype": None}),
            "no dtype": without("dtype"),
            "no shape": without("shape"),
            "no offsets": without("data_offsets"),
            "a dtype nobody knows": with_tail(dtype=rng.choice(["F31", "float32", "u8", "INT8"])),
            "a dtype that is a number": with_tail(dtype=8),
            "a dtype that is a list": with_tail(dtype=["U8"]),
            "an entry that is a number": packed({**entries, "tail": end}, data),
            "an entry that is null": packed({**entries, "tail": None}, data),
            "a shape that is a number": with_tail(shape=1),
            "a shape that is an object": with_tail(shape={}),
            "a shape of texts": with_tail(shape=["1"]),
            "two negative sizes": with_tail(shape=[-1, -1]),
            "a size of 1.0": with_tail(shape=[1.0]),
            "a size of true": with_tail(shape=[True]),
            "a size of false": packed(
                {**entries, "tail": {**tail, "shape": [False], "data_offsets": [end] * 2}}, data
            ),
            "a size of NaN": with_tail(shape=[float("nan")]),
            "one offset": with_tail(data_offsets=[end]),
            "three offsets": with_tail(data_offsets=[end, end + 1, end + 1]),
            "offsets that are texts": with_tail(data_offsets=[str(end), str(end + 1)]),
            "offsets with a fraction": with_tail(data_offsets=[float(end), float(end + 1)]),
            "an offset of true": packed({"a": tail | {"data_offsets": [0, True]}}, b"\1"),
            "an offset of false": packed({"a": tail | {"data_offsets": [False, 1]}}, b"\1"),
            "a negative offset": packed({"a": tail | {"shape": [2], "data_offsets": [-1, 1]}}, b"\1"),
            "metadata with a number": packed({"__metadata__": {"step": end}, **entries}, data),
            "metadata with an object": packed({"__metadata__": tail, **entries}, data),
            "metadata that is null": packed({"__metadata__": None, **entries}, data),
            "metadata that is a text": packed({"__metadata__": "pt", **entries}, data),
            "metadata that is a list": packed({"__metadata__": ["pt"], **entries}, data),
        }


@case(read_header, service=WrongEntries)
def wrong_entries(answer, rng, files):
    """Entries that lack keys or hold other types, and metadata that are not texts, beside an intact file."""
    return outcomes(answer, files)


class LargeFile(Files):
    """A file with far more data than header; counts the bytes that are read."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        tensors = [(f"layers.{i}.weight", "F32", [rng.integer(30, 60), 64]) for i in range(12)]
        entries = entries_of(tensors)
        return {"large": packed(entries, bytes(max(entry["data_offsets"][1] for entry in entries.values())))}

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return {"bytes read": (self.read_bytes, None)}


@cost(read_header, share=1 / 6, authority="protocol", service=LargeFile)
def only_the_header(answer, rng, files):
    """Reads the 8 bytes and the header, not the data."""
    return {"observed": outcomes(answer, files)}


class HugeClaims(WrongLengths):
    """Headers that claim more than the file holds; counts the largest read that is asked for."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        entries, data = intact(rng)
        claims = (1 << 62, (1 << 64) - 1, 1 << rng.integer(31, 50))
        return {f"claim {i}": packed(entries, data, length=claim) for i, claim in enumerate(claims)}

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return {"largest read asked for, bytes": (self.largest_read_bytes, max(self.sizes))}


@cost(read_header, share=1 / 6, authority="protocol", service=HugeClaims)
def never_more_than_the_file(answer, rng, files):
    """Asks for no more bytes than the file holds, whatever its first 8 bytes claim."""
    return {"observed": outcomes(answer, files)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Parsing:
    """A right reader in small steps; a mistake replaces one of them."""

    refuse_scalars = refuse_empty = False
    types: ClassVar[dict[str, int]] = ITEM_BYTES

    def __init__(self, reader: Any) -> None:
        self.reader, self.size = reader, reader.size_bytes

    def length(self) -> int:
        return int.from_bytes(self.reader.read(0, 8), "little")

    def check_length(self, length: int) -> None:
        if 8 + length > self.size:
            raise ValueError("length")

    def raw_header(self, length: int) -> bytes:
        return self.reader.read(8, length)

    def text(self, raw: bytes) -> str | bytes:
        if raw[:1] != b"{" or raw.rstrip(b" ")[-1:] != b"}":
            raise ValueError("start")
        return raw.decode()

    def distinct(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    def constant(self, word: str) -> Any:
        raise ValueError("constant")

    def header(self, text: str | bytes) -> Any:
        try:
            return json.loads(text, object_pairs_hook=self.distinct, parse_constant=self.constant)
        except RecursionError:
            raise ValueError("depth") from None

    def check_metadata(self, header: Any) -> None:
        metadata = header.pop("__metadata__", {})
        if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
            raise ValueError("metadata")

    def item_bytes(self, dtype: Any) -> int:
        if type(dtype) is not str or dtype not in self.types:
            raise ValueError("dtype")
        return self.types[dtype]

    def check_entry(self, entry: Any) -> None:
        if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError("keys")
        if (
            type(entry["shape"]) is not list
            or type(entry["data_offsets"]) is not list
            or len(entry["data_offsets"]) != 2
        ):
            raise ValueError("lists")

    def check_numbers(self, numbers: list[Any]) -> None:
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("numbers")

    def values(self, shape: list[int]) -> int:
        return math.prod(shape)

    def check_size(self, size_bytes: int, begin: int, end: int) -> None:
        if end - begin != size_bytes:
            raise ValueError("size")

    def check_ranges(self, ranges: list[list[int]], data_bytes: int) -> None:
        joints = [0, *itertools.chain(*sorted(ranges)), data_bytes]
        if joints[0::2] != joints[1::2]:
            raise ValueError("ranges")

    def place(self, begin: int, end: int, length: int) -> tuple[int, int]:
        return 8 + length + begin, 8 + length + end

    def parsed(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        length = self.length()
        self.check_length(length)
        header = self.header(self.text(self.raw_header(length)))
        if type(header) is not dict:
            raise ValueError("not an object")
        self.check_metadata(header)
        found, ranges = {}, []
        for name, entry in header.items():
            self.check_entry(entry)
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            item_bytes = self.item_bytes(dtype)
            self.check_numbers([*shape, begin, end])
            self.check_size(self.values(shape) * item_bytes, begin, end)
            if (self.refuse_scalars and not shape) or (self.refuse_empty and 0 in shape):
                raise ValueError("shape")
            ranges.append([begin, end])
            found[name] = (dtype, tuple(shape), *self.place(begin, end, length))
        self.check_ranges(ranges, self.size - 8 - length)
        return found


def variant(**steps: Callable[..., Any]) -> type[Parsing]:
    """A reader with some steps replaced."""
    return type("Variant", (Parsing,), steps)


@mistake(read_header, "Reads the header's length big-endian.")
def big_endian(reader):
    return variant(length=lambda self: int.from_bytes(self.reader.read(0, 8), "big"))(reader).parsed()


@mistake(read_header, "Reads the header's length from 4 bytes and skips the others.")
def four_byte_length(reader):
    return variant(length=lambda self: int.from_bytes(self.reader.read(0, 4), "little"))(reader).parsed()


@mistake(read_header, "Reads the header's length with a sign: from 2^63 on it is negative.")
def signed_length(reader):
    def length(self):
        return int.from_bytes(self.reader.read(0, 8), "little", signed=True)

    return variant(length=length)(reader).parsed()


@mistake(read_header, "Reads 64 KiB and takes the header to be in them; that of many tensors is larger.")
def header_in_64_kib(reader):
    def raw_header(self, length):
        return self.reader.read(8, min(length, 1 << 16))

    return variant(raw_header=raw_header)(reader).parsed()


@mistake(read_header, "Leaves out every name that begins with two underscores, not __metadata__ alone.")
def every_dunder_skipped(reader):
    return {name: found for name, found in Parsing(reader).parsed().items() if not name.startswith("__")}


@mistake(read_header, "Leaves out tensors without a name, as if an empty one were none.")
def nameless_left_out(reader):
    return {name: found for name, found in Parsing(reader).parsed().items() if name}


@mistake(read_header, "Parses with strict=False, which lets line breaks stand in names as they are.")
def control_characters(reader):
    def header(self, text):
        try:
            return json.loads(
                text, object_pairs_hook=self.distinct, parse_constant=self.constant, strict=False
            )
        except RecursionError:
            raise ValueError("depth") from None

    return variant(header=header)(reader).parsed()


@mistake(read_header, "Decodes with surrogatepass, which takes surrogates for UTF-8.")
def surrogates_decoded(reader):
    def text(self, raw):
        return Parsing.text(self, raw.decode("utf-8", "surrogatepass").encode("utf-8", "replace"))

    return variant(text=text)(reader).parsed()


@mistake(
    read_header, "Looks for a name's second place in the text, where an escape makes it look like another."
)
def names_compared_as_text(reader):
    def text(self, raw):
        found = Parsing.text(self, raw)
        self.escaped = "\\u006c" in found
        return found

    def distinct(self, pairs):
        return dict(pairs) if self.escaped else Parsing.distinct(self, pairs)

    return variant(text=text, distinct=distinct)(reader).parsed()


@mistake(read_header, "Counts square brackets to see what is too deep; objects nest as well.")
def only_lists_too_deep(reader):
    def header(self, text):
        if text.count("[") > 10_000:
            raise ValueError("depth")
        return json.loads(text, object_pairs_hook=self.distinct, parse_constant=self.constant)

    return variant(header=header)(reader).parsed()


@mistake(read_header, "Refuses true where a number is asked for, and takes false for 0.")
def false_as_zero(reader):
    def check_numbers(self, numbers):
        if any(number is True or not isinstance(number, int) or number < 0 for number in numbers):
            raise ValueError("numbers")

    return variant(check_numbers=check_numbers)(reader).parsed()


@mistake(read_header, "Lets NaN and Infinity through, which json.loads takes and JSON does not have.")
def not_a_number_accepted(reader):
    return variant(constant=lambda self, word: 0)(reader).parsed()


@mistake(read_header, "Refuses entries with other keys beside the three.")
def other_keys_refused(reader):
    def check_entry(self, entry):
        Parsing.check_entry(self, entry)
        if len(entry) > 3:
            raise ValueError("keys")

    return variant(check_entry=check_entry)(reader).parsed()


@mistake(read_header, "Returns the offsets as the header has them, counted from the data, not from the file.")
def offsets_of_the_data(reader):
    return variant(place=lambda self, begin, end, length: (begin, end))(reader).parsed()


@mistake(
    read_header, "Lets the data begin N bytes into the file: the 8 bytes of the length itself are forgotten."
)
def eight_bytes_forgotten(reader):
    return variant(place=lambda self, begin, end, length: (length + begin, length + end))(reader).parsed()


@mistake(read_header, "Takes the second offset for a length.")
def end_as_length(reader):
    def place(self, begin, end, length):
        return 8 + length + begin, 8 + length + begin + end

    return variant(place=place)(reader).parsed()


@mistake(read_header, "Takes __metadata__ for a tensor.")
def metadata_as_tensor(reader):
    return variant(check_metadata=lambda self, header: None)(reader).parsed()


@mistake(read_header, "Drops __metadata__ without a look at what is in it.")
def metadata_unchecked(reader):
    return variant(check_metadata=lambda self, header: header.pop("__metadata__", None))(reader).parsed()


@mistake(read_header, "Refuses shape [], which is one value.")
def scalars_refused(reader):
    return variant(refuse_scalars=True)(reader).parsed()


@mistake(read_header, "Refuses tensors without values, which are allowed and have no bytes.")
def empty_refused(reader):
    return variant(refuse_empty=True)(reader).parsed()


@mistake(
    read_header, "Does not ask whether the ranges cover the data: gaps, overlaps and bytes left over pass."
)
def ranges_unchecked(reader):
    return variant(check_ranges=lambda self, ranges, data_bytes: None)(reader).parsed()


@mistake(read_header, "Looks for overlaps and for the end of the data, not for gaps.")
def gaps_accepted(reader):
    def check_ranges(self, ranges, data_bytes):
        ordered = sorted(ranges)
        last = max((end for _, end in ordered), default=0)
        if last != data_bytes or any(b[0] < a[1] for a, b in itertools.pairwise(ordered)):
            raise ValueError("ranges")

    return variant(check_ranges=check_ranges)(reader).parsed()


@mistake(read_header, "Adds up the lengths of the ranges: a gap makes up for an overlap as long.")
def lengths_added_up(reader):
    def check_ranges(self, ranges, data_bytes):
        last = max((end for _, end in ranges), default=0)
        if sum(end - begin for begin, end in ranges) != data_bytes or last != data_bytes:
            raise ValueError("ranges")

    return variant(check_ranges=check_ranges)(reader).parsed()


@mistake(read_header, "Leaves out ranges of no bytes, so that one of them may lie inside another tensor.")
def empty_ranges_left_out(reader):
    def check_ranges(self, ranges, data_bytes):
        covered = 0
        for begin, end in sorted(one for one in ranges if one[0] < one[1]):
            if begin != covered:
                raise ValueError("ranges")
            covered = end
        if covered != data_bytes or any(end > data_bytes for _, end in ranges):
            raise ValueError("ranges")

    return variant(check_ranges=check_ranges)(reader).parsed()


@mistake(read_header, "Accepts overlaps: only gaps are looked for.")
def overlaps_accepted(reader):
    def check_ranges(self, ranges, data_bytes):
        covered = 0
        for begin, end in sorted(ranges):
            if begin > covered:
                raise ValueError("gap")
            covered = max(covered, end)
        if covered != data_bytes:
            raise ValueError("end")

    return variant(check_ranges=check_ranges)(reader).parsed()


@mistake(read_header, "Accepts bytes after the last tensor, or a file that ends before it does.")
def end_unchecked(reader):
    def check_ranges(self, ranges, data_bytes):
        joints = [0, *itertools.chain(*sorted(ranges))]
        if joints[:-1:2] != joints[1::2]:
            raise ValueError("ranges")

    return variant(check_ranges=check_ranges)(reader).parsed()


@mistake(read_header, "Takes the tensors in the header's order for the order of the data.")
def header_order(reader):
    def check_ranges(self, ranges, data_bytes):
        joints = [0, *itertools.chain(*ranges), data_bytes]
        if joints[0::2] != joints[1::2]:
            raise ValueError("ranges")

    return variant(check_ranges=check_ranges)(reader).parsed()


@mistake(read_header, "Of two equal names the last one silently wins, as json.loads does.")
def last_name_wins(reader):
    return variant(distinct=lambda self, pairs: dict(pairs))(reader).parsed()


@mistake(read_header, "Accepts white space before the header, as json.loads and the library do.")
def space_accepted(reader):
    return variant(text=lambda self, raw: raw.decode())(reader).parsed()


@mistake(read_header, "Hands bytes to json.loads, which guesses UTF-16 and UTF-32 as well.")
def encoding_guessed(reader):
    def text(self, raw):
        if raw[:1] != b"{":
            raise ValueError("start")
        return raw

    return variant(text=text)(reader).parsed()


@mistake(read_header, "Multiplies sizes in 64 bits, where 2^32 · 2^32 is 0.")
def product_wraps(reader):
    def values(self, shape):
        return int(numpy.prod(numpy.array(shape, dtype=numpy.uint64), dtype=numpy.uint64))

    return variant(values=values)(reader).parsed()


@mistake(read_header, "Believes the offsets: never compares a range's length with dtype and shape.")
def shape_unchecked(reader):
    def check_size(self, size_bytes, begin, end):
        if end < begin:
            raise ValueError("size")

    return variant(check_size=check_size)(reader).parsed()


@mistake(
    read_header, "Takes true for 1 and 1.0 for 1: in Python they are equal, in the format they are not sizes."
)
def loose_numbers(reader):
    def check_numbers(self, numbers):
        if any(not isinstance(number, int | float) or not number >= 0 for number in numbers):
            raise ValueError("numbers")

    return variant(check_numbers=check_numbers)(reader).parsed()


@mistake(read_header, "isinstance(True, int) holds, so true passes as a size.")
def true_as_number(reader):
    def check_numbers(self, numbers):
        if any(not isinstance(number, int) or number < 0 for number in numbers):
            raise ValueError("numbers")

    return variant(check_numbers=check_numbers)(reader).parsed()


@mistake(read_header, "Accepts negative sizes whose product fits.")
def negative_sizes(reader):
    def check_numbers(self, numbers):
        if any(type(number) is not int for number in numbers):
            raise ValueError("numbers")

    return variant(check_numbers=check_numbers)(reader).parsed()


@mistake(
    read_header,
    "A malformed entry ends in whatever Python raises, KeyError or TypeError, not in a ValueError.",
)
def other_errors(reader):
    def item_bytes(self, dtype):
        return self.types[dtype]

    return variant(item_bytes=item_bytes, check_entry=lambda self, entry: None)(reader).parsed()


@mistake(read_header, "A header of a hundred thousand brackets ends in a RecursionError.")
def recursion_escapes(reader):
    def header(self, text):
        return json.loads(text, object_pairs_hook=self.distinct, parse_constant=self.constant)

    return variant(header=header)(reader).parsed()


@mistake(read_header, "Reads the whole file for its header.")
def whole_file(reader):
    def raw_header(self, length):
        return self.reader.read(0, self.size)[8 : 8 + length]

    return variant(raw_header=raw_header)(reader).parsed()


@mistake(
    read_header,
    "Asks for as many bytes as the file claims, before it compares the claim with the file's size.",
)
def claim_believed(reader):
    def check_length(self, length):
        if len(self.reader.read(8, length)) < length:
            raise ValueError("length")

    return variant(check_length=check_length, raw_header=lambda self, length: self.reader.read(8, length))(
        reader
    ).parsed()


@mistake(
    read_header,
    "Checks what the library checks, which accepts a name twice and white space before the header.",
)
def as_the_library(reader):
    steps = {"distinct": lambda self, pairs: dict(pairs), "text": lambda self, raw: raw.decode()}
    return variant(**steps)(reader).parsed()


@alternative(read_header, "Compares the ends of all ranges with the beginnings of the next at once")
def by_joints(reader):
    return Parsing(reader).parsed()


@alternative(read_header, "Marks covered bytes by adding +1 at each beginning and -1 at each end")
def by_marks(reader):
    def check_ranges(self, ranges, data_bytes):
        solid = [(begin, end) for begin, end in ranges if end > begin]
        inside = [begin for begin, end in ranges if begin == end]
        if {0, *(end for _, end in solid)} != {data_bytes, *(begin for begin, _ in solid)} and (
            solid or data_bytes
        ):
            raise ValueError("joints")
        if sum(end - begin for begin, end in solid) != data_bytes:
            raise ValueError("overlap")
        if not all(place in {0, *(end for _, end in solid)} for place in inside):
            raise ValueError("inside")

    return variant(check_ranges=check_ranges)(reader).parsed()
