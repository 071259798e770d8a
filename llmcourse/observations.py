"""What the course's own answers gave on one seed, stored beside an exercise whose package holds no answers.

`record` runs reference and mistakes, `to_bytes` and `from_bytes` are the file, and `Stored` is the runner that `check`
uses where such files lie beside an exercise (see `llmcourse.kit`). It runs the learner's answer as ever and takes
the outcomes of ours from the file of one seed.

A file `scale_rows.SEED.observations` is `MAGIC`, the SHA-256 of the packed payload, the length of the payload (8
bytes, big-endian) and the payload, packed by zlib. The payload is the length of its header (4 bytes), the header (UTF-8
JSON) and blobs. Values are written as `llmcourse.wire` writes them: exact types, bounded, nothing pickled. Equal
outcomes and equal blobs are there once; a mistake has outcomes only where it fails, for elsewhere it gives what the
reference gives. Left out is what no comparison reads: seconds, the text of errors, what one phase saved for the next.

Whoever holds the file can read the expected values of its seed out of it. That earns nothing in a grader, which has
a secret seed and the answers themselves.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcourse import wire
from llmcourse.exercise import Exercise, Item
from llmcourse.judging import InProcess, Outcome, compare, expectations, with_earlier_phases, without_saved
from llmcourse.racing import RaceResult
from llmcourse.wire import Data
from llmcourse.zygote import HarnessFault

SUFFIX = ".observations"
MAGIC = b"LLMOBS1\n"
PREFIX = struct.Struct(">8s32sQ")
HEADER = struct.Struct(">I")
MAX_FILE_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 512 << 20
ERROR_PARTS = ("kind", "type")  # all that a comparison reads of an error


class DamagedObservations(HarnessFault):
    """A file of observations that cannot be used: which, why, and what to do."""


@dataclass(frozen=True)
class Observations:
    """Outcomes of one exercise's own answers on one seed: {item: outcome} of the reference, and of each mistake those
    on which it fails."""

    exercise: str
    seed: int
    expected: Mapping[str, Outcome]
    mistakes: Mapping[str, Mapping[str, Outcome]]


def place(exercise: Exercise, seed: int) -> Path:
    """Where the observations of an exercise lie: beside its file."""
    return exercise.path.with_name(f"{exercise.name}.{seed}{SUFFIX}")


# ------------------------------------------------------------------------------------------------------- recording


def record(exercise: Exercise, seed: int) -> Observations:
    """Run the reference and every mistake, in this process; HarnessFault when the reference does not get through."""
    runner = InProcess()
    ours = expectations(runner, exercise, seed)
    return Observations(
        exercise.name,
        seed,
        {name: _told(outcome) for name, outcome in ours.items()},
        {name: _failures(runner, exercise, name, seed, ours) for name in exercise.mistakes},
    )


def _failures(
    runner: InProcess, exercise: Exercise, name: str, seed: int, expected: Mapping[str, Outcome]
) -> dict[str, Outcome]:
    """What a mistake gave on the items that it fails."""
    fails = exercise.mistakes[name].fails
    tried = [item for item in exercise.items.values() if fails is None or item.name in fails]
    items = with_earlier_phases(exercise, tried)
    outcomes = runner.run(exercise, runner.ours(exercise, name), items, seed, expected)
    return {
        item.name: _told(outcomes[item.name])
        for item in tried
        if item.name in outcomes
        and not compare(exercise, item, outcomes[item.name], expected[item.name]).agrees
    }


def _told(outcome: Outcome) -> Outcome:
    """The part of an outcome that comparisons read; an error's text may name folders of this machine."""
    error = None
    if outcome.error is not None:
        error = {part: str(outcome.error[part]) for part in ERROR_PARTS if part in outcome.error}
    return Outcome(
        without_saved(outcome.observed), error, changed=outcome.changed, counts=dict(outcome.counts)
    )


# -------------------------------------------------------------------------------------------------------- the file


@dataclass
class _Table:
    """Outcomes and blobs of a file, each there once."""

    outcomes: list[list[Any]] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)
    _known_blobs: dict[bytes, int] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> int:
        """The outcome's number in the table."""
        encoder = wire.Encoder()
        body: Data = {
            "observed": outcome.observed,
            "error": None if outcome.error is None else dict(outcome.error),
            "changed": list(outcome.changed),
            "counts": dict(outcome.counts),
        }
        entry = [encoder.encode(body), [self._blob(raw) for raw in encoder.blobs]]
        key = json.dumps(entry)
        if key not in self._known:
            self._known[key] = len(self.outcomes)
            self.outcomes.append(entry)
        return self._known[key]

    def _blob(self, raw: bytes) -> int:
        if raw not in self._known_blobs:
            self._known_blobs[raw] = len(self.blobs)
            self.blobs.append(raw)
        return self._known_blobs[raw]


def to_bytes(observations: Observations) -> bytes:
    """The file; the same observations give the same bytes."""
    table = _Table()

    def numbers(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
        return {name: table.add(outcome) for name, outcome in outcomes.items()}

    body = {
        "exercise": observations.exercise,
        "seed": observations.seed,
        "expected": numbers(observations.expected),
        "mistakes": {name: numbers(theirs) for name, theirs in observations.mistakes.items()},
        "outcomes": table.outcomes,
        "blobs": [len(raw) for raw in table.blobs],
    }
    header = json.dumps(body, separators=(",", ":")).encode()
    payload = b"".join([HEADER.pack(len(header)), header, *table.blobs])
    packed = zlib.compress(payload, 9)
    if len(packed) > MAX_FILE_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"{observations.exercise}: {len(payload):,} bytes of observations; at most {MAX_PAYLOAD_BYTES:,} are "
            "stored: let its cases observe less"
        )
    return PREFIX.pack(MAGIC, hashlib.sha256(packed).digest(), len(payload)) + packed


def from_bytes(raw: bytes, path: Path | str) -> Observations:
    """The observations of a file; DamagedObservations, which names `path`, for anything that `to_bytes` did not
    write."""
    try:
        return _parsed(_payload(raw))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        zlib.error,
        struct.error,
    ) as error:
        reason = str(error) if type(error) is ValueError else "it holds something else"
    except wire.ProtocolError as error:
        reason = str(error)
    raise DamagedObservations(
        f"{path}: expected the observations of an exercise, found a damaged file ({reason}); unpack the kit again"
    )


def _payload(raw: bytes) -> bytes:
    if len(raw) > MAX_FILE_BYTES + PREFIX.size:
        raise ValueError(f"{len(raw):,} bytes, at most {MAX_FILE_BYTES:,} were expected")
    if len(raw) < PREFIX.size:
        raise ValueError("it ends too early")
    magic, digest, length = PREFIX.unpack_from(raw)
    packed = raw[PREFIX.size :]
    if magic != MAGIC:
        raise ValueError("it does not begin as one")
    if hashlib.sha256(packed).digest() != digest:
        raise ValueError("its content has changed")
    if length > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{length:,} bytes unpacked, at most {MAX_PAYLOAD_BYTES:,} were expected")
    payload = zlib.decompressobj().decompress(packed, length + 1)
    if len(payload) != length:
        raise ValueError("its length is another")
    return payload


def _parsed(payload: bytes) -> Observations:
    (header_bytes,) = HEADER.unpack_from(payload)
    start = HEADER.size + header_bytes
    header = json.loads(payload[HEADER.size : start])
    blobs = []
    for length in header["blobs"]:
        blobs.append(payload[start : start + _whole(length)])
        start += length
    if start != len(payload):
        raise ValueError("its blobs have other lengths")
    outcomes = [_outcome(node, [blobs[_whole(index)] for index in used]) for node, used in header["outcomes"]]

    def named(numbers: dict[str, int]) -> dict[str, Outcome]:
        return {name: outcomes[_whole(number)] for name, number in numbers.items()}

    return Observations(
        str(header["exercise"]),
        _whole(header["seed"]),
        named(header["expected"]),
        {name: named(theirs) for name, theirs in header["mistakes"].items()},
    )


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("a number that is not a whole one")
    return number


def _outcome(node: Any, blobs: Sequence[bytes]) -> Outcome:
    body: Any = wire.decode(node, list(blobs))
    error, counts = body["error"], body["counts"]
    if error is not None and not isinstance(error["kind"], str):
        raise ValueError("an error of no kind")
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in counts.values()):
        raise ValueError("counts that are no pairs")
    return Outcome(body["observed"], error, changed=tuple(body["changed"]), counts=counts)


# ------------------------------------------------------------------------------------------------------ the runner


@dataclass(frozen=True)
class StoredAnswer:
    """Stands for an answer of ours that is not here: its outcomes are stored."""

    name: str


class Stored(InProcess):
    """Runs the learner's answer in this process, and gives stored outcomes for reference and mistakes."""

    def __init__(self, observations: Observations) -> None:
        self.observations = observations

    def ours(self, exercise: Exercise, name: str) -> StoredAnswer:
        return StoredAnswer(name)

    def run(
        self,
        exercise: Exercise,
        answer: Any,
        items: Sequence[Item],
        seed: int,
        expected: Mapping[str, Outcome] | None,
    ) -> dict[str, Outcome]:
        if not isinstance(answer, StoredAnswer):
            assert seed == self.observations.seed, "the inputs would be others than those that are stored"
            return super().run(exercise, answer, items, seed, expected)
        theirs: Mapping[str, Outcome] = {}
        if answer.name != exercise.name:
            theirs = self.observations.mistakes[answer.name]
        return {item.name: theirs.get(item.name, self.observations.expected[item.name]) for item in items}

    def race(self, exercise: Exercise, answer: Any, seed: int) -> RaceResult:
        """Not raced: there is nothing to race against."""
        assert exercise.race is not None
        reason = (
            "is not raced here, since the course's own answer is not in this kit; the teacher's grader races it for "
            f"{exercise.race.share:.0%} of these points"
        )
        return RaceResult("shown", reason, exercise.race.share, 0, None, None, None, None, {}, {})


def seeds(exercise: Exercise) -> list[int]:
    """The seeds whose observations lie beside an exercise's file."""
    found = exercise.path.parent.glob(f"{exercise.name}.*{SUFFIX}")
    parts = [path.name.removesuffix(SUFFIX).rpartition(".")[2] for path in found]
    return sorted(int(part) for part in parts if part.isdecimal())


def stored(exercise: Exercise, wanted: int) -> Stored:
    """The runner for the seed `wanted` where it is stored, else for one that is, all of them equally often.

    DamagedObservations in one line where the file does not fit the exercise.
    """
    known = seeds(exercise)
    path = place(exercise, wanted if wanted in known else known[wanted % len(known)])
    found = from_bytes(path.read_bytes(), path)
    fits = set(found.expected) == set(exercise.items) and set(found.mistakes) == set(exercise.mistakes)
    if found.exercise != exercise.name or not fits or path != place(exercise, found.seed):
        raise DamagedObservations(
            f"{path}: expected the observations of this version of {exercise.name}, found others; unpack the kit again"
        )
    return Stored(found)
