from __future__ import annotations

import copy
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from llmcourse import interview_record, workspace
from llmcourse.interview_record import Book, Part, Record

AT = datetime(2026, 11, 23, 18, 0, tzinfo=timezone.utc)  # noqa: UP017
MOMENT = AT.isoformat()


def whole() -> dict[str, Any]:
    """A file with one interview of both kinds of parts and one revisit."""
    solved = Part(
        "exercise",
        "read_header",
        "01_a",
        12,
        4,
        spent_s=400,
        points=4,
        verdict="right",
        tries=1,
        solved_s=400,
    )
    spoken = Part("spoken", "a", "01_a", 5, 10, followups=[2], answers=["bytes"], mistakes=["a line"])
    record = Record(
        ["01_a"], False, 20, "en", 7, MOMENT, [solved, spoken], begun=MOMENT, seen=MOMENT, notes=["odd"]
    )
    book = Book({"one": record})
    interview_record.schedule(book, solved, AT)
    return json.loads(json.dumps(interview_record.as_json(book)))  # type: ignore[no-any-return]


def with_change(path: str, value: Any) -> bytes:
    """The file with one value replaced; path: keys and indices, separated by blanks."""
    found = copy.deepcopy(whole())
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split()]
    place: Any = found
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(found).encode()


def test_what_is_written_is_read_back_the_same() -> None:
    book = interview_record.parse(json.dumps(whole()).encode())
    assert interview_record.as_json(book) == whole()


DAMAGES = {
    "empty": b"",
    "truncated": json.dumps(whole()).encode()[:200],
    "not text": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "no version": b'{"interviews": {}, "revisits": {}}',
    "another version": b'{"version": 0, "interviews": {}, "revisits": {}}',
    "a truth value as version": b'{"version": true, "interviews": [], "revisits": {}}',
    "interviews as list": b'{"version": 1, "interviews": [], "revisits": {}}',
    "an unknown section": with_change("races", {}),
    "not an interview": with_change("interviews one", 3),
    "an unknown field": with_change("interviews one surplus", 1),
    "minutes of nothing": with_change("interviews one minutes", 0),
    "minutes as text": with_change("interviews one minutes", "20"),
    "another language": with_change("interviews one language", "fr"),
    "a date that is none": with_change("interviews one begun", "yesterday"),
    "a date without its offset": with_change("interviews one seen", "2026-11-23T18:00:00"),
    "negative time": with_change("interviews one elapsed_s", -1.0),
    "infinite time": with_change("interviews one elapsed_s", float("inf")),
    "notes that are no text": with_change("interviews one notes", [1]),
    "a part of another kind": with_change("interviews one parts 0 kind", "race"),
    "tries as truth value": with_change("interviews one parts 0 tries", True),
    "tries as fraction": with_change("interviews one parts 0 tries", 1.5),
    "a follow-up as text": with_change("interviews one parts 1 followups", ["2"]),
    "NaN points": with_change("interviews one parts 0 points", float("nan")),
    "a card that is none": with_change("revisits read_header", []),
    "a card of another state": with_change("revisits read_header state", 7),
    "a card without stability": with_change("revisits read_header stability", 0),
    "a card without its day": with_change("revisits read_header due", None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_anything_else_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    monkeypatch.setenv("LLMCOURSE_WORKSPACE", str(tmp_path))
    path = tmp_path / interview_record.FILE
    path.write_bytes(damage)
    book, note = interview_record.read()
    assert book == Book() and note is not None and "is damaged" in note
    assert path.read_bytes() == damage, "looking changes nothing"
    _, note = interview_record.change(lambda book, work: None)
    (aside,) = tmp_path.glob("interviews.damaged-*.json")
    assert aside.read_bytes() == damage and aside.name in (note or "")


def test_a_file_of_a_later_version_is_left_alone() -> None:
    with pytest.raises(workspace.WorkspaceError, match="version 2, this one reads 1"):
        interview_record.parse(with_change("version", 2))


def test_nothing_is_written_when_a_change_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_WORKSPACE", str(tmp_path))

    def broken(book: Book, work: Path) -> None:
        book.interviews["one"] = interview_record.parse(json.dumps(whole()).encode()).interviews["one"]
        raise workspace.WorkspaceError("no")

    with pytest.raises(workspace.WorkspaceError, match="no"):
        interview_record.change(broken)
    assert not (tmp_path / interview_record.FILE).exists()


# --------------------------------------------------------------------------------------------------------- revisits


def exercise(**changes: Any) -> Part:
    return Part("exercise", "read_header", "01_a", 12, 4, **changes)


@pytest.mark.parametrize(
    ("part", "grade"),
    [
        pytest.param(exercise(), None, id="not tried"),
        pytest.param(exercise(tries=3, verdict="wrong"), 1, id="never right"),
        pytest.param(exercise(tries=2, solved_s=60), 2, id="at the second try"),
        pytest.param(exercise(tries=1, solved_s=721), 2, id="over its minutes"),
        pytest.param(exercise(tries=1, solved_s=720), 3, id="within its minutes"),
        pytest.param(exercise(tries=1, solved_s=360), 4, id="within half of them"),
        pytest.param(Part("spoken", "a", "01_a", 5, 10, answers=["x"]), None, id="not rated"),
        pytest.param(Part("spoken", "a", "01_a", 5, 10, points=4.9), 1, id="below half"),
        pytest.param(Part("spoken", "a", "01_a", 5, 10, points=5), 2, id="half"),
        pytest.param(Part("spoken", "a", "01_a", 5, 10, points=7), 3, id="most"),
        pytest.param(Part("spoken", "a", "01_a", 5, 10, points=9), 4, id="nearly all"),
    ],
)
def test_how_well_a_part_went_is_graded(part: Part, grade: int | None) -> None:
    assert interview_record.recall(part) == grade


def test_what_went_well_comes_back_later_each_time_and_what_failed_the_next_day() -> None:
    book, at, days = Book(), AT, []
    for _ in range(3):
        interview_record.schedule(book, exercise(tries=1, solved_s=700), at)
        due = interview_record.due_at(book.revisits["read_header"], at)
        days.append((due - at).days)
        at = due
    assert days == sorted(set(days)) and days[0] >= 1
    interview_record.schedule(book, exercise(tries=1), at)
    assert (interview_record.due_at(book.revisits["read_header"], at) - at).days < days[0] + 2


def test_what_was_not_tried_is_not_scheduled() -> None:
    book = Book()
    interview_record.schedule(book, exercise(), AT)
    assert book.revisits == {}


def test_a_card_dated_by_a_clock_that_ran_ahead_is_due_now_and_begun_anew() -> None:
    book = Book()
    ahead = AT + timedelta(days=4000)
    interview_record.schedule(book, exercise(tries=1, solved_s=60), ahead)
    assert interview_record.due_at(book.revisits["read_header"], AT) == AT
    interview_record.schedule(book, exercise(tries=1, solved_s=60), AT)
    fresh = Book()
    interview_record.schedule(fresh, exercise(tries=1, solved_s=60), AT)
    assert book.revisits == fresh.revisits


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.9, "0:59"), (450, "7:30"), (3723, "1:02:03")]
)
def test_times_are_shown_in_minutes_and_from_an_hour_in_hours(seconds: float, shown: str) -> None:
    assert interview_record.as_clock(seconds) == shown
