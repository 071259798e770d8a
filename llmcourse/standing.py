"""Where a learner stands: checks and interviews joined, as a list for `llmcourse progress` and as a picture.

from llmcourse import standing
standing.dashboard()                 in a notebook of the workspace
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse import interview_record, workspace
from llmcourse.interview_record import Book, Part, as_clock

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Standing", "as_clock", "dashboard", "standings"]


@dataclass(frozen=True)
class Standing:
    """One exercise, or one spoken question (`spoken/topic`, its points the learner's own); moments are ISO 8601.

    attempts: checks, or interviews in which it was answered; best_time_s: the shortest in an interview until it was
    solved; due: when a revisit is, if one was scheduled; is_due: whether that has come.
    """

    name: str
    kind: str
    attempts: int
    best_points: float
    max_points: float
    last_verdict: str
    first_tried: str
    last_tried: str
    first_solved: str | None = None
    lesson: str | None = None
    best_time_s: float | None = None
    due: str | None = None
    is_due: bool = False

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "name"}


def standings(place: Path | None = None) -> tuple[list[Standing], list[str]]:
    """Everything tried so far, by lesson and then in the order of first tries; and a line for each damaged file.

    What the progress file has lost is taken from the interviews. WorkspaceError when a file cannot be read.
    """
    entries, lost = workspace.progress(place)
    book, damaged = interview_record.read(place)
    found = {name: Standing(name, "exercise", **asdict(entry)) for name, entry in entries.items()}
    for item, tried in _tried(book).items():
        if item not in found:
            found[item] = _from_interviews(item, tried)
    best_s = interview_record.best_times_s(book)
    at = interview_record.now()
    joined = []
    for name, one in found.items():
        card = book.revisits.get(name)
        due = None if card is None else interview_record.due_at(card, at)
        values = {**asdict(one), "best_time_s": best_s.get(name)}
        if due is not None:
            values |= {"due": due.isoformat(timespec="seconds"), "is_due": due <= at}
        joined.append(Standing(**values))
    joined.sort(key=lambda one: (one.lesson or "", one.first_tried))
    return joined, [note for note in (lost, damaged) if note]


def _tried(book: Book) -> dict[str, list[tuple[str, Part]]]:
    """By item: (when the interview was begun, the part) of each interview that tried it, the oldest first."""
    found: dict[str, list[tuple[str, Part]]] = {}
    for _, record in sorted(book.interviews.items()):
        for part in record.parts:
            if part.tries or part.answers:
                found.setdefault(part.item, []).append((record.begun or record.made, part))
    return found


def _from_interviews(item: str, tried: list[tuple[str, Part]]) -> Standing:
    parts = [part for _, part in tried]
    last = parts[-1]
    return Standing(
        name=item,
        kind=last.kind,
        attempts=sum(part.tries for part in parts) if last.kind == "exercise" else len(parts),
        best_points=max(part.points or 0.0 for part in parts),
        max_points=last.max_points,
        last_verdict=last.verdict or "not rated",
        first_tried=tried[0][0],
        last_tried=tried[-1][0],
        first_solved=next((when for when, part in tried if part.verdict == "right"), None),
        lesson=last.lesson[3:],
    )


def dashboard(place: Path | None = None) -> Figure | None:
    """A picture of every lesson's exercises: solved, tries, best time, revisits that are due.

    As for `workspace.record`, only a place inside the workspace (the current directory unless given) has progress:
    built anywhere else, the picture shows that nothing was tried.
    """
    from llmcourse import figures, interview_plan

    here = (place or Path.cwd()).resolve()
    work = workspace.folder(here)
    inside = work.is_dir() and here.is_relative_to(work)
    known = {one.name: one for one in standings(here)[0]} if inside else {}
    lessons: dict[str, list[figures.Tile]] = {}
    for lesson in workspace.lesson_sources():
        exercises = [(each.name, each.name) for each in interview_plan.material(lesson).exercises]
        spoken = f"spoken/{lesson[3:]}"
        items = [*exercises, *([("question", spoken)] if spoken in known else [])]
        if items:
            lessons[lesson] = [_tile(name, known.get(item)) for name, item in items]
    return figures.progress(lessons)


def _tile(name: str, one: Standing | None) -> Any:
    from llmcourse.figures import Tile

    if one is None:
        return Tile(name)
    if one.kind == "spoken":
        rating = f"{one.best_points:g} of {one.max_points:g}" if one.last_verdict == "rated" else None
        return Tile(name, attempts=one.attempts, rating=rating, due=one.is_due)
    solved = one.first_solved is not None
    return Tile(name, solved=solved, attempts=one.attempts, best_time_s=one.best_time_s, due=one.is_due)
