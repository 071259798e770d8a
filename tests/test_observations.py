"""What our own answers gave, stored: the file gives back what it was given, and a damaged one says so in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmcourse import exercise, judging, observations
from llmcourse.exercise import Exercise
from llmcourse.judging import Outcome
from llmcourse.observations import DamagedObservations, Observations, Stored

SEED = 11
TEXT = '''from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.exercise import case, cost, exercise, mistake, race


@exercise(points=4, minutes=5, mutates=True)
def scale_stored(weight: Tensor) -> Tensor:
    """Largest magnitude of each row of weight [out, in]: [out], same dtype."""
    ### BEGIN SOLUTION
    return weight.abs().amax(dim=1)
    ### END SOLUTION


@case(scale_stored)
def one_loud_row(answer, rng):
    """A loud row must not touch its neighbours."""
    weight = rng.normal(4, 6)
    weight[rng.integer(0, 3)] *= 100
    return {"scale": answer(weight), "saved": weight}


@case(scale_stored)
def refusal(answer, rng):
    """Rows of integers."""
    return {"scale": answer(rng.integers(-9, 9, 3, 4))}


@cost(scale_stored, share=1 / 4)
def calls(answer, rng):
    """How often it is called."""
    answer(rng.normal(2, 2))
    return {"calls": (1, 2)}


def drawn(rng):
    return rng.normal(4, 4)


@mistake(scale_stored, "One scale serves every row.")
def per_tensor(weight):
    return weight.abs().max().expand(weight.shape[0])


@mistake(scale_stored, "Integers are refused in the folder /tmp/of/ours.", fails=["refusal"])
def no_integers(weight):
    if not weight.is_floating_point():
        raise TypeError(f"{__file__} takes no integers")
    return weight.abs().amax(dim=1)


@race(scale_stored, inputs=drawn, baseline=per_tensor, share=1 / 4)
def raced(answer, rng):
    """One row after the other."""
    return answer
'''


@pytest.fixture
def scale_stored(tmp_path: Path) -> Iterator[Exercise]:
    path = tmp_path / "demo" / "scale_stored.py"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    yield exercise.load(path)
    exercise.load.cache_clear()


def lay(one: Exercise, seed: int = SEED) -> Path:
    """Record an exercise on a seed and lay the file beside it."""
    path = observations.place(one, seed)
    path.write_bytes(observations.to_bytes(observations.record(one, seed)))
    return path


# ------------------------------------------------------------------------------------------------------- the file


VALUES = {
    "nothing": None,
    "numbers": [True, -3, 1 << 90, 0.1, float("inf")],
    "text": ("é", b"\0\1"),
    "tensors": {"half": torch.arange(6).reshape(2, 3).to(torch.bfloat16), "empty": torch.empty(0, 2)},
}


def test_outcomes_come_back_as_they_were() -> None:
    outcomes = {
        "observed": Outcome(VALUES, counts={"bytes": (3.0, None), "shown": (None, float("inf"))}),
        "raised": Outcome(error={"kind": "raised", "type": "ValueError"}),
        "changed": Outcome(1, changed=("weight", "bias")),
    }
    given = Observations("one", 5, outcomes, {"wrong": {"raised": outcomes["raised"]}, "same": {}})
    found = observations.from_bytes(observations.to_bytes(given), "x")
    assert (found.exercise, found.seed) == ("one", 5)
    assert found.expected["raised"] == outcomes["raised"] == found.mistakes["wrong"]["raised"]
    assert found.expected["changed"] == outcomes["changed"] and found.mistakes["same"] == {}
    assert found.expected["observed"].counts == outcomes["observed"].counts
    seen = found.expected["observed"].observed
    assert isinstance(seen, dict) and list(seen) == list(VALUES)
    assert (seen["numbers"], seen["text"]) == (VALUES["numbers"], VALUES["text"])
    for name, tensor in VALUES["tensors"].items():  # type: ignore[union-attr, attr-defined, index]
        back = seen["tensors"][name]
        assert back.dtype == tensor.dtype and torch.equal(back, tensor) and back.shape == tensor.shape


def test_equal_outcomes_and_equal_tensors_are_stored_once() -> None:
    loud = torch.randn(50_000)
    twice = {
        "a": Outcome({"x": loud}),
        "b": Outcome({"x": loud.clone(), "other": 1}),
        "c": Outcome({"x": loud}),
    }
    given = Observations("one", 5, twice, {"wrong": {"a": Outcome({"x": loud.clone()})}})
    assert len(observations.to_bytes(given)) < 1.2 * loud.nbytes


def test_a_mistake_is_stored_only_where_it_fails_and_no_error_text_is(scale_stored: Exercise) -> None:
    found = observations.record(scale_stored, SEED)
    assert set(found.expected) == {"one_loud_row", "refusal", "calls"}
    assert {name: set(theirs) for name, theirs in found.mistakes.items()} == {
        "per_tensor": {"one_loud_row", "refusal"},
        "no_integers": {"refusal"},
    }
    assert found.mistakes["no_integers"]["refusal"].error == {"kind": "raised", "type": "TypeError"}
    kept = found.expected["one_loud_row"].observed
    assert isinstance(kept, dict) and set(kept) == {"scale"}, "what a phase saves is never compared"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(scale_stored: Exercise) -> None:
    first, again, other = (
        observations.to_bytes(observations.record(scale_stored, seed)) for seed in (SEED, SEED, SEED + 1)
    )
    assert first == again != other


def signed(payload: bytes, length: int | None = None) -> bytes:
    """A file whose checksum fits its payload."""
    packed = zlib.compress(payload)
    size = len(payload) if length is None else length
    return observations.PREFIX.pack(observations.MAGIC, hashlib.sha256(packed).digest(), size) + packed


def with_header(blobs: bytes = b"", **changes: object) -> bytes:
    header = {"exercise": "x", "seed": 1, "expected": {"a": 0}, "mistakes": {}, "blobs": []}
    node = ["d", [["observed", ["n"]], ["error", ["n"]], ["changed", ["l", []]], ["counts", ["d", []]]]]
    text = json.dumps(header | {"outcomes": [[node, []]]} | changes).encode()
    return signed(observations.HEADER.pack(len(text)) + text + blobs)


def test_the_smallest_file_is_read() -> None:
    assert observations.from_bytes(with_header(), "x").expected == {"a": Outcome()}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"LLMOBS1\n",
        b"x" * 200,
        signed(b""),
        signed(b"abc", length=1 << 50),
        signed(b"\0\0\0\4null"),
        signed(b"\0\0\0\4null", length=9),
        signed(b"\x7f\xff\xff\xff{}"),
        with_header(b"one byte more"),
        with_header(blobs=b"", seed="1"),
        with_header(expected={"a": 1}),
        with_header(expected={"a": -1}),
        with_header(expected=[0]),
        with_header(outcomes=[[["n"], []]]),
        with_header(outcomes=[[["d", [["observed", ["y", 0]]]], [7]]]),
        with_header(outcomes=[[["?", "x"], []]]),
        with_header(outcomes=0),
    ],
    ids=lambda raw: f"{len(raw)} bytes",
)
def test_a_damaged_file_says_so_in_one_line(raw: bytes) -> None:
    with pytest.raises(DamagedObservations, match=r"^here/x: expected .* unpack the kit again$") as told:
        observations.from_bytes(raw, "here/x")
    assert "\n" not in str(told.value)


def test_any_changed_byte_is_noticed(scale_stored: Exercise) -> None:
    raw = observations.to_bytes(observations.record(scale_stored, SEED))
    for place in range(0, len(raw), 97):
        with pytest.raises(DamagedObservations):
            observations.from_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :], "x")


# ------------------------------------------------------------------------------------------------------ the runner


def test_without_stored_observations_nothing_changes(scale_stored: Exercise) -> None:
    runner, seed = judging.runner_for(scale_stored, 77)
    assert type(runner) is judging.InProcess and seed == 77 and judging.holds_answers(scale_stored)


def test_a_stored_seed_is_used_and_another_number_takes_one_of_them(scale_stored: Exercise) -> None:
    for seed in (3, 8):
        lay(scale_stored, seed)
    assert not judging.holds_answers(scale_stored)
    assert [judging.runner_for(scale_stored, wanted)[1] for wanted in (3, 8, 10, 11)] == [3, 8, 3, 8]


def judged(one: Exercise, name: str) -> judging.Verdict:
    """The verdict on an answer of the file itself, by what is stored."""
    runner, seed = judging.runner_for(one, SEED)
    assert isinstance(runner, Stored)
    answer = judging.InProcess().ours(one, name)
    return judging.judge(runner, one, answer, seed, judging.expectations(runner, one, seed))


def test_the_reference_is_right_and_each_mistake_is_named_by_what_is_stored(scale_stored: Exercise) -> None:
    lay(scale_stored)
    assert judged(scale_stored, "scale_stored").points == 4
    for name, mistake in scale_stored.mistakes.items():
        verdict = judged(scale_stored, name)
        assert (verdict.verdict, verdict.points) == ("wrong", 0)
        assert verdict.mistakes == (mistake,)


def test_no_answer_of_ours_runs(scale_stored: Exercise, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(scale_stored)
    answer, ran = scale_stored.reference, []
    monkeypatch.setattr(scale_stored, "reference", lambda weight: ran.append(1))
    for name, mistake in scale_stored.mistakes.items():
        monkeypatch.setitem(
            scale_stored.mistakes, name, judging.replace(mistake, function=lambda weight: ran.append(1))
        )
    runner, seed = judging.runner_for(scale_stored, SEED)
    expected = judging.expectations(runner, scale_stored, seed)
    assert judging.judge(runner, scale_stored, answer, seed, expected).verdict == "right"
    assert judging.judge(runner, scale_stored, lambda weight: weight, seed, expected).verdict == "wrong"
    assert ran == []


def test_a_race_is_shown_as_not_run_and_takes_no_points(scale_stored: Exercise) -> None:
    lay(scale_stored)
    verdict = judged(scale_stored, "scale_stored")
    assert verdict.race is not None and verdict.race.verdict == "shown" and verdict.points == 4
    from llmcourse import report

    assert "not raced here" in report.text(verdict) and "25%" in report.text(verdict)


@pytest.mark.parametrize("change", ["another exercise", "another seed", "another version"])
def test_observations_that_do_not_fit_are_refused(scale_stored: Exercise, change: str) -> None:
    path = lay(scale_stored)
    found = observations.from_bytes(path.read_bytes(), path)
    if change == "another exercise":
        path.write_bytes(observations.to_bytes(judging.replace(found, exercise="other")))
    elif change == "another seed":
        shutil.copy(path, observations.place(scale_stored, SEED + 1))
        path.unlink()
    else:
        path.write_bytes(observations.to_bytes(judging.replace(found, expected={"refusal": Outcome()})))
    with pytest.raises(DamagedObservations, match="unpack the kit again"):
        judging.runner_for(scale_stored, SEED)
