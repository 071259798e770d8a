"""What is remembered of interviews, in the workspace's `interviews.json`, and when to come back to what.

    version      1
    interviews   by name, which is its notebook's without the suffix:
        lessons     ["01_parameter_loading"]; of a mixed interview, those that parts were drawn from
        mixed       whether every lesson could be drawn
        minutes     what it may take
        language    "en" or "zh"
        seed        what it was drawn with
        made, begun, seen, ended     moments (ISO 8601 with offset) or null; seen: the clock was last read
        elapsed_s   on the clock so far
        notes       what was odd: a break, a clock that jumped
        parts       in the notebook's order; all have every field:
            kind        "exercise" or "spoken"
            name        the exercise's, or the topic of the lesson whose question is spoken about
            lesson, minutes, max_points
            spent_s     on the clock: what passed before a cell of this part was run and after the cell before it
            points      best so far, or the learner's own rating; null before
            verdict     of an exercise: its best; of a question: "rated"; null before
            mistakes    sentences: mistakes recognised, or lines of the rubric rated below full points
            tries, solved_s         of an exercise: checks, and spent_s at the first that was right (else null)
            followups, answers      of a question: which of the lesson's are asked, and what was written so far:
                                    first the answer to the question, then to each follow-up
    revisits     by item (an exercise's name, or "spoken/topic"): a card of the fsrs library, its `to_dict()`

A file of a later version is left alone. Anything else that this module would not write is kept under a dated name and
a new file is begun: a half-finished interview then goes on from the plan that its notebook carries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from llmcourse import workspace
from llmcourse.workspace import WorkspaceError

T = TypeVar("T")
VERSION = 1
FILE = "interviews.json"
NUMBER = (int, float)
HALF, MOST, NEARLY_ALL = 0.5, 0.7, 0.9  # shares of a rubric's points that make a recall Hard, Good, Easy

PART_KINDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "lesson": (str,),
    "minutes": NUMBER,
    "max_points": NUMBER,
    "spent_s": NUMBER,
    "points": (*NUMBER, type(None)),
    "verdict": (str, type(None)),
    "mistakes": (list,),
    "tries": (int,),
    "solved_s": (*NUMBER, type(None)),
    "followups": (list,),
    "answers": (list,),
}
RECORD_KINDS: dict[str, tuple[type, ...]] = {
    "lessons": (list,),
    "mixed": (bool,),
    "minutes": NUMBER,
    "language": (str,),
    "seed": (int,),
    "made": (str,),
    "begun": (str, type(None)),
    "seen": (str, type(None)),
    "ended": (str, type(None)),
    "elapsed_s": NUMBER,
    "notes": (list,),
    "parts": (list,),
}
CARD_KINDS: dict[str, tuple[type, ...]] = {
    "card_id": (int,),
    "state": (int,),
    "step": (int, type(None)),
    "stability": NUMBER,
    "difficulty": NUMBER,
    "due": (str,),
    "last_review": (str,),
}
MOMENTS = {"made", "begun", "seen", "ended", "due", "last_review"}


@dataclass
class Part:
    """One exercise or spoken question of an interview; the fields are explained above."""

    kind: str
    name: str
    lesson: str
    minutes: float
    max_points: float
    spent_s: float = 0.0
    points: float | None = None
    verdict: str | None = None
    mistakes: list[str] = field(default_factory=list)
    tries: int = 0
    solved_s: float | None = None
    followups: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    @property
    def item(self) -> str:
        """Its name among the revisits."""
        return self.name if self.kind == "exercise" else f"spoken/{self.name}"

    @property
    def done(self) -> bool:
        return self.verdict in ("right", "rated")


@dataclass
class Record:
    """One interview; the fields are explained above."""

    lessons: list[str]
    mixed: bool
    minutes: float
    language: str
    seed: int
    made: str
    parts: list[Part]
    begun: str | None = None
    seen: str | None = None
    ended: str | None = None
    elapsed_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        """Seconds left on the clock; negative in overtime."""
        return 60 * self.minutes - self.elapsed_s

    def part(self, kind: str, name: str) -> Part | None:
        return next((part for part in self.parts if (part.kind, part.name) == (kind, name)), None)


@dataclass
class Book:
    """The whole file."""

    interviews: dict[str, Record] = field(default_factory=dict)
    revisits: dict[str, dict[str, Any]] = field(default_factory=dict)


def now() -> datetime:
    """This moment, in the local zone; the one place where interviews read the wall clock."""
    return datetime.now().astimezone()


def as_clock(seconds: float) -> str:
    """Minutes and seconds: 7:30, or 1:02:03 from an hour on."""
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"


# ---------------------------------------------------------------------------------------------- reading and writing


def read(place: Path | None = None) -> tuple[Book, str | None]:
    """The file as it is, and a line for the learner when it is damaged; nothing is changed.

    WorkspaceError when it cannot be read or was written by a later version.
    """
    path = workspace.folder(place) / FILE
    try:
        return parse(path.read_bytes()), None
    except FileNotFoundError:
        return Book(), None
    except ValueError as error:
        return Book(), f"{path} is damaged ({error}); the next interview keeps it under a dated name"
    except OSError as error:
        raise WorkspaceError(f"expected to read {path}, found: {error.strerror or error}") from error


def change(alter: Callable[[Book, Path], T], place: Path | None = None) -> tuple[T, str | None]:
    """Let `alter(book, workspace)` change the file's content, with no other process between; its result, and a note.

    Nothing is written when `alter` raises. WorkspaceError when the file cannot be read or written.
    """
    with workspace.held(place) as work:
        path, note = work / FILE, None
        try:
            book = parse(path.read_bytes())
        except FileNotFoundError:
            book = Book()
        except ValueError as error:
            book = Book()
            aside = workspace.set_aside(path)
            note = f"The record of interviews was damaged ({error}); it is kept as {aside.name}, a new one was begun."
        result = alter(book, work)
        workspace.write_json(path, as_json(book))
    return result, note


def as_json(book: Book) -> dict[str, Any]:
    """What is written to disk."""
    interviews = {name: asdict(record) for name, record in book.interviews.items()}
    return {"version": VERSION, "interviews": interviews, "revisits": book.revisits}


def parse(text: bytes) -> Book:
    """ValueError for anything that `as_json` does not give; WorkspaceError for a later version's file."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    version = found.get("version")
    if type(version) is int and version > VERSION:
        raise WorkspaceError(
            f"{FILE} was written by a later llmcourse (version {version}, this one reads {VERSION}); "
            "update with `git pull`"
        )
    if version != VERSION or set(found) != {"version", "interviews", "revisits"}:
        raise ValueError(f"expected version {VERSION} with interviews and revisits")
    interviews = {name: parse_record(name, entry) for name, entry in _table(found, "interviews").items()}
    revisits = {name: _checked(name, entry, CARD_KINDS) for name, entry in _table(found, "revisits").items()}
    for name, card in revisits.items():
        if card["state"] not in (1, 2, 3) or min(card["stability"], card["difficulty"]) <= 0:
            raise ValueError(f"unexpected card for {name!r}")
    return Book(interviews, revisits)


def parse_record(name: str, entry: Any) -> Record:
    """One interview from JSON; ValueError for what `asdict` of a Record does not give."""
    values = _checked(name, entry, RECORD_KINDS)
    if values["language"] not in ("en", "zh") or values["minutes"] <= 0:
        raise ValueError(f"unexpected language or minutes for {name!r}")
    _each(name, values["lessons"], str)
    _each(name, values["notes"], str)
    parts = [Part(**_checked(name, part, PART_KINDS)) for part in values["parts"]]
    for part in parts:
        if part.kind not in ("exercise", "spoken"):
            raise ValueError(f"unexpected kind for {name!r}: {part.kind!r}")
        _each(name, part.mistakes, str)
        _each(name, part.followups, int)
        _each(name, part.answers, str)
    return Record(**{**values, "parts": parts})


def _table(found: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(found[key], dict):
        raise ValueError(f"expected an object as {key}")
    return dict(found[key])


def _checked(name: str, entry: Any, kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    if not isinstance(entry, dict) or set(entry) != set(kinds):
        raise ValueError(f"unexpected entry for {name!r}")
    for key, value in entry.items():
        good = isinstance(value, kinds[key]) and (not isinstance(value, bool) or bool in kinds[key])
        if good and isinstance(value, NUMBER):
            good = math.isfinite(value) and value >= 0
        if good and key in MOMENTS and value is not None:
            good = datetime.fromisoformat(value).tzinfo is not None
        if not good:
            raise ValueError(f"unexpected {key} for {name!r}: {value!r}"[:120])
    return dict(entry)


def _each(name: str, values: list[Any], kind: type) -> None:
    if not all(type(value) is kind for value in values):
        raise ValueError(f"unexpected list for {name!r}: {values!r}"[:120])


# --------------------------------------------------------------------------------------------------------- revisits


def recall(part: Part) -> int | None:
    """How well a part went, as fsrs rates a recall: 1 Again, 2 Hard, 3 Good, 4 Easy; None for one not tried.

    An exercise: Again unless right; Hard after more than one try or over its minutes; Easy within half of them.
    A question: by the share of the rubric's points that the learner gave.
    """
    if part.kind == "exercise":
        if part.tries == 0:
            return None
        if part.solved_s is None:
            return 1
        if part.tries > 1 or part.solved_s > 60 * part.minutes:
            return 2
        return 4 if part.solved_s <= 30 * part.minutes else 3
    if part.points is None:
        return None
    share = part.points / part.max_points if part.max_points else 0.0
    return 1 + sum(share >= level for level in (HALF, MOST, NEARLY_ALL))


def schedule(book: Book, part: Part, at: datetime) -> None:
    """Note in the book when a part that was tried comes back: in days, by the fsrs library's forgetting curve."""
    import fsrs

    grade = recall(part)
    if grade is None:
        return
    # Without the steps of minutes that flash cards begin with: an interview is not repeated on the same day.
    scheduler = fsrs.Scheduler(learning_steps=(), relearning_steps=(), enable_fuzzing=False)
    known = book.revisits.get(part.item)
    card = fsrs.Card.from_dict(known) if known is not None else fsrs.Card(card_id=0)  # type: ignore[arg-type]
    reviewed = at.astimezone(timezone.utc)  # noqa: UP017 - the object fsrs compares with
    if card.last_review is not None and card.last_review > reviewed:
        # That review was dated by a clock that ran ahead: what follows from the days since then is unknown.
        card = fsrs.Card(card_id=0)
    card, _ = scheduler.review_card(card, fsrs.Rating(grade), reviewed)
    book.revisits[part.item] = dict(card.to_dict())


def due_at(card: dict[str, Any], at: datetime) -> datetime:
    """When a card comes back; now, if the moment of its last review is yet to come (a clock ran ahead then)."""
    if datetime.fromisoformat(card["last_review"]) > at:
        return at
    return datetime.fromisoformat(card["due"])


def best_times_s(book: Book) -> dict[str, float]:
    """The shortest time in which each exercise was solved in an interview."""
    found: dict[str, float] = {}
    for record in book.interviews.values():
        for part in record.parts:
            if part.solved_s is not None:
                found[part.name] = min(part.solved_s, found.get(part.name, math.inf))
    return found
