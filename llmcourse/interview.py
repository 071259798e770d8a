"""A timed interview from the lessons' questions and exercises: drawn, written as a blank notebook, reported.

`llmcourse interview 01 --minutes 20`, or `interview.take("01", minutes=20)` in a notebook, draws what is due for a
revisit, then what was practised least, as far as the minutes go, and writes `interviews/DATE_TOPIC.ipynb` into the
workspace: statements and stubs, no prose, no hints. Its cells call a `Session`:

    session = interview.start("DATE_TOPIC")     starts the clock, or goes on after a restart
    session.check(parameter_count)              judges an exercise and notes verdict, try and time
    %%answer parameter_loading                  the text under it is an answer: shows the first follow-up
    %%answer parameter_loading 1                the answer to that: the next, at last model answers and rubric
    session.rate("parameter_loading", 2, 1, 0)  the learner's own rating, line by line or as one sum
    session.report()                            the report; ends the interview when all is done or time is up

Each of them saves at once (`llmcourse.interview_record` describes the file), so a closed browser or a dead kernel
costs nothing: run the command or the start cell again. The clock is the computer's steady one. It does not run while
no kernel does, except for a break of up to BREAK_S; what passes after the last minute is said, never refused.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmcourse import interview_record, workspace
from llmcourse.interview_plan import answer_cell, asked_followups, draw, material, notebook, parts_of
from llmcourse.interview_record import Book, Part, Record, as_clock
from llmcourse.interview_source import Interview, interview_markdown
from llmcourse.interview_words import WORDS
from llmcourse.workspace import WorkspaceError

BREAK_S = 120.0  # of the time between two kernels, this much is on the clock
JUMP_S = 60.0  # the wall clock and the steady one may drift apart by this much before it is said
FOLDER = "interviews"
_live: dict[tuple[Path, str], Session] = {}


class Words(str):
    """A message: Markdown in a notebook, the same text elsewhere."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return str(self)


# ------------------------------------------------------------------------------------------------------- taking one


@dataclass(frozen=True)
class Taken:
    """An interview that is ready: its notebook, whether it was begun before, and what is to be said about it."""

    name: str
    path: Path
    record: Record
    resumed: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        parts = [
            {"kind": part.kind, "name": part.name, "lesson": part.lesson, "minutes": part.minutes}
            for part in self.record.parts
        ]
        return {
            "name": self.name,
            "notebook": str(self.path),
            "minutes": self.record.minutes,
            "seed": self.record.seed,
            "resumed": self.resumed,
            "parts": parts,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        word = "Going on with an unfinished interview" if self.resumed else "Ready"
        return "\n".join([*self.notes, f"{word}: {self.path}"])

    def _repr_html_(self) -> str:
        # Relative, since Jupyter serves nothing by its path on the disk.
        link = Path(os.path.relpath(self.path, Path.cwd())).as_posix()
        lines = [escape(note) for note in self.notes]
        return "<br>".join([*lines, f"<a href='{escape(quote(link))}'>{escape(self.path.name)}</a>"])


def take(
    lesson: str | None = None,
    *,
    mixed: bool = False,
    minutes: float = 20,
    zh: bool = False,
    seed: int | None = None,
    new: bool = False,
    place: Path | None = None,
) -> Taken:
    """Draw an interview on a lesson (its name, topic or number) or on all of them, and write its notebook.

    An unfinished one on the same is gone on with, unless `new`; seed: draw the same again from the same progress.
    WorkspaceError for an unknown lesson, minutes that are no number or too few, and a folder that cannot be written.
    """
    wanted = _Wanted(_minutes(minutes), "zh" if zh else "en", seed, mixed)
    if (lesson is None) != mixed:
        raise WorkspaceError(
            "expected a lesson, such as 01, or a mixed interview (mixed=True, --mixed), not both"
        )
    lessons = list(workspace.lesson_sources()) if lesson is None else [workspace.lesson_name(lesson)]
    workspace.prepare(place)
    entries, lost = workspace.progress(place)
    tries = {name: entry.attempts for name, entry in entries.items()}

    def find_or_make(book: Book, work: Path) -> Taken:
        name = None if new else _unfinished(book, lessons, wanted)
        resumed = name is not None
        if name is None:
            record, notes = _drawn(lessons, wanted, book, tries)
            name = _free_name(work, book, record)
            book.interviews[name] = record
        else:
            record = book.interviews[name]
            clock = _clock(record, "en") if record.begun else "not begun yet"
            notes = [
                f"An unfinished interview of {record.minutes:g} minutes ({clock}); another one: --new, new=True"
            ]
        path = work / FOLDER / f"{name}.ipynb"
        if not path.exists():  # one that was deleted is written anew; what was checked stands in the record
            workspace.create(path, notebook(name, record))
        return Taken(name, path, record, resumed, tuple(notes))

    taken, damaged = interview_record.change(find_or_make, place)
    return replace(taken, notes=(*(note for note in (lost, damaged) if note), *taken.notes))


@dataclass(frozen=True)
class _Wanted:
    minutes: float
    language: str
    seed: int | None
    mixed: bool


def _minutes(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
        raise WorkspaceError(f"minutes: expected a number above 0, such as 20; found {given!r}")
    return float(given)


def _unfinished(book: Book, lessons: list[str], wanted: _Wanted) -> str | None:
    """The latest that was begun, or that would be drawn now, and has not ended."""
    for name, record in sorted(book.interviews.items(), reverse=True):  # names begin with their date
        same = record.mixed == wanted.mixed and (wanted.mixed or record.lessons == lessons)
        alike = (record.minutes, record.language) == (wanted.minutes, wanted.language)
        if record.ended is None and same and (record.begun is not None or alike):
            return name
    return None


def _drawn(
    lessons: list[str], wanted: _Wanted, book: Book, tries: dict[str, int]
) -> tuple[Record, list[str]]:
    materials = [material(lesson) for lesson in lessons]
    everything = [part for one in materials for part in parts_of(one)]
    if not everything:
        raise WorkspaceError(f"{lessons[0]} has neither a question nor an exercise; choose another lesson")
    seed = secrets.randbelow(1 << 31) if wanted.seed is None else wanted.seed
    at = interview_record.now()
    parts = draw(materials, minutes=wanted.minutes, book=book, tries=tries, seed=seed, at=at)
    if not parts:
        least = min(part.minutes for part in everything)
        raise WorkspaceError(
            f"{wanted.minutes:g} minutes are too few: the shortest part takes {least:g}; give more"
        )
    notes = []
    if not wanted.mixed and materials[0].question is None:
        notes.append(f"{lessons[0]} has no question to speak about (no interview.toml): exercises only")
    total = sum(part.minutes for part in parts)
    if len(parts) == len(everything) and total < wanted.minutes:
        notes.append(f"Everything there is takes about {total:g} of the {wanted.minutes:g} minutes")
    drawn = sorted({part.lesson for part in parts}) if wanted.mixed else lessons
    made = at.isoformat(timespec="seconds")
    return Record(drawn, wanted.mixed, wanted.minutes, wanted.language, seed, made, parts), notes


def _free_name(work: Path, book: Book, record: Record) -> str:
    what = "mixed" if record.mixed else record.lessons[0][3:]
    name = f"{datetime.fromisoformat(record.made):%Y-%m-%d-%H%M%S}_{what}"
    for number in itertools.count(1):
        found = name if number == 1 else f"{name}-{number}"
        if found not in book.interviews and not (work / FOLDER / f"{found}.ipynb").exists():
            return found
    raise AssertionError("itertools.count ended")


# ------------------------------------------------------------------------------------------------------ the session


def _steady_s() -> float:
    return time.monotonic()


class Session:
    """One interview in one kernel; made by `start`. What it is told is saved at once."""

    def __init__(self, name: str, record: Record, place: Path) -> None:
        self.name = name
        self.record = record
        self._place = place
        self._steady_s, self._wall = _steady_s(), interview_record.now()
        self.unsaved = False

    def check(self, answer: Callable[..., Any]) -> Any:
        """Judge an exercise like `llmcourse.check`, and note verdict, try and time; its score."""
        from llmcourse import checking

        pressed_s = _steady_s()
        score = checking.check(answer)
        verdict = score.verdict

        def note(book: Book) -> None:
            part = self.record.part("exercise", verdict.name)
            self._spend(part, pressed_s)
            if part is not None and verdict.verdict != "not attempted":
                _tried(part, verdict.verdict, score, [mistake.sentence for mistake in verdict.mistakes])

        self._event(note)
        if self.record.part("exercise", verdict.name) is None:
            print(self._say("no_part", name=verdict.name))
        print(_clock(self.record, self.record.language))
        return score

    def answer(self, line: str, text: str) -> Words:
        """Note an answer to a question or follow-up, and show what comes next; `line`: topic, follow-up's number."""
        name, _, given = line.strip().partition(" ")
        part, question = self._question(name)
        if part is None or question is None:
            known = ", ".join(part.name for part in self.record.parts if part.kind == "spoken") or "–"
            return self._say("no_question", name=name, known=known)
        asked = asked_followups(part, question)
        step = int(given) if given.strip().isdecimal() else (-1 if given.strip() else 0)
        if not 0 <= step <= len(asked):
            return self._say("which_step", name=name, last=len(asked), found=given.strip())
        if text.strip() in ("", *(words["placeholder"] for words in WORDS.values())):
            return self._say("empty")
        if step > len(part.answers):
            return self._say("before", cell=answer_cell(part, len(part.answers)))

        def note(book: Book) -> None:
            found = self.record.part("spoken", name)
            self._spend(found, _steady_s())
            if found is not None:
                found.answers[step : step + 1] = [text.strip()]

        self._event(note)
        return self._next_question(part, question, asked, step)

    def _next_question(self, part: Part, question: Interview, asked: list[int], step: int) -> Words:
        language = self.record.language
        clock = _clock(self.record, language)
        if step < len(asked):
            following = question.followups[asked[step]].question.of(language)
            said = self._say("followup", step=step + 1, last=len(asked), question=following)
            return Words(f"{said}\n\n{clock}")
        shown = replace(question, followups=tuple(question.followups[index] for index in asked))
        cell = f'session.rate("{part.name}", ...)'
        return Words(
            "\n\n".join([self._say("model", cell=cell), *interview_markdown(shown, language=language), clock])
        )

    def rate(self, name: str, *points: object) -> Words:
        """Note the learner's own rating of a question: one sum, or one number for each line of the rubric."""
        part, question = self._question(name)
        if part is None or question is None:
            known = ", ".join(part.name for part in self.record.parts if part.kind == "spoken") or "–"
            return self._say("no_question", name=name, known=known)
        if len(part.answers) <= len(asked_followups(part, question)):
            return self._say("before", cell=answer_cell(part, len(part.answers)))
        at_most = [line.points for line in question.rubric]
        given = _ratings(points, at_most)
        if given is None:
            lines = ", ".join(f"0–{limit}" for limit in at_most)
            shape = f"{self._say('rate', total=sum(at_most))} ({lines})"
            return self._say("rate_how", shape=shape, found=", ".join(map(_shown, points)) or "–")
        by_line = zip(question.rubric, given, strict=True) if len(given) == len(at_most) else ()
        missed = [line.criterion.of(self.record.language) for line, value in by_line if value < line.points]

        def note(book: Book) -> None:
            found = self.record.part("spoken", name)
            self._spend(found, _steady_s())
            if found is not None:
                found.points, found.max_points = float(sum(given)), float(sum(at_most))
                found.verdict, found.mistakes = "rated", missed

        self._event(note)
        said = self._say("rated", name=name, points=sum(given), total=sum(at_most))
        return Words(f"{said} {_clock(self.record, self.record.language)}")

    def report(self, *, end: bool = False) -> Report:
        """The report. Ends the interview when everything is done, when the time is up, or when `end`."""

        def note(book: Book) -> None:
            self._spend(None, _steady_s())
            _end_if_due(book, self.record, end=end)

        before = self.record.ended
        book = self._event(note)
        if self.unsaved:  # nothing was scheduled on the disk either: left to the next report
            self.record.ended = before
        return Report(self.name, self.record, _revisits(self.record, book))

    def _question(self, name: str) -> tuple[Part | None, Interview | None]:
        """The part of a spoken question and what its lesson has for it now."""
        part = self.record.part("spoken", name)
        return part, None if part is None else material(part.lesson).question

    def _say(self, key: str, **values: object) -> Words:
        return Words(WORDS[self.record.language][key].format(**values))

    def _spend(self, part: Part | None, until_s: float) -> None:
        """Put the time since the last call on the clock, and on a part's; say it when the wall clock disagrees."""
        if self.record.ended is not None:
            return
        wall = interview_record.now()
        spent_s = max(0.0, until_s - self._steady_s)
        steady_s = _steady_s()
        jump_s = (wall - self._wall).total_seconds() - (steady_s - self._steady_s)
        if abs(jump_s) > JUMP_S:
            way = WORDS[self.record.language]["ahead" if jump_s > 0 else "back"]
            self.record.notes.append(self._say("jump", gap=as_clock(abs(jump_s)), way=way))
        self.record.elapsed_s += spent_s
        if part is not None:
            part.spent_s += spent_s
        self.record.seen = wall.isoformat(timespec="seconds")
        # What the judge took between the press of the button and now is not the learner's time.
        self._steady_s, self._wall = steady_s, wall

    def _event(self, note: Callable[[Book], None]) -> Book:
        """Apply `note` to what is on the disk and save it; where that is not possible, to what is in memory."""
        noted = Book()

        def apply(book: Book, work: Path) -> Book:
            nonlocal noted
            stored = book.interviews.get(self.name)
            if stored is not None and not self.unsaved:
                self.record = stored  # the command may have ended it meanwhile
            book.interviews[self.name] = self.record
            noted = book
            note(book)
            return book

        try:
            book, damaged = interview_record.change(apply, self._place)
        except WorkspaceError as error:
            self.unsaved = True
            if self.name not in noted.interviews:
                note(noted)
            print(self._say("saved_not", reason=str(error)))
            return noted
        self.unsaved = False
        if damaged:
            print(damaged)
        return book


def _ratings(points: Sequence[object], at_most: Sequence[int]) -> list[float] | None:
    """The points as numbers, one for each line of the rubric or one sum; None where they are neither."""
    limits = at_most if len(points) == len(at_most) else [sum(at_most)]
    given = [value for value in points if isinstance(value, int | float) and not isinstance(value, bool)]
    if not len(given) == len(points) == len(limits):
        return None
    fit = all(0 <= value <= limit for value, limit in zip(given, limits, strict=True))
    return [float(value) for value in given] if fit else None


def _shown(value: object) -> str:
    return "..." if value is ... else repr(value)[:40]


def _tried(part: Part, verdict: str, points: float, mistakes: Iterable[str]) -> None:
    part.tries += 1
    part.points = max(float(points), part.points or 0.0)
    if part.solved_s is None:
        part.verdict = verdict
        if verdict == "right":
            part.solved_s = part.spent_s
    part.mistakes += [sentence for sentence in mistakes if sentence not in part.mistakes]


def start(name: str, *, place: Path | None = None) -> Session:
    """Start the clock of an interview, or go on with it after a restart; prints where it stands.

    WorkspaceError when neither its record nor its notebook is there.
    """
    from llmcourse import checking  # noqa: F401 - seconds, which would otherwise pass on the clock

    work = workspace.folder(place)
    live = _live.get((work, name))

    def begin(book: Book, work: Path) -> Record:
        record = book.interviews.get(name) or (
            live.record if live is not None else _from_notebook(name, work)
        )
        book.interviews[name] = record
        if live is None:
            _go_on(record)
        return record

    record, damaged = interview_record.change(begin, place)
    session = live or Session(name, record, work)
    session.record = record
    _live[(work, name)] = session
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.register_magic_function(session.answer, "cell", "answer")
    print("\n".join([*([damaged] if damaged else []), *_standing(record)]))
    return session


def _go_on(record: Record) -> None:
    """Begin, or put a short break between two kernels on the clock."""
    at = interview_record.now()
    words = WORDS[record.language]
    if record.ended is not None:
        return
    if record.begun is None or record.seen is None:
        record.begun = at.isoformat(timespec="seconds")
    else:
        gap_s = (at - datetime.fromisoformat(record.seen)).total_seconds()
        counted_s = min(max(0.0, gap_s), BREAK_S)
        record.elapsed_s += counted_s
        if gap_s < 0:
            record.notes.append(words["backwards"].format(gap=as_clock(-gap_s)))
        elif gap_s > BREAK_S:
            record.notes.append(words["break"].format(gap=as_clock(gap_s), counted=as_clock(counted_s)))
    record.seen = at.isoformat(timespec="seconds")


def _from_notebook(name: str, work: Path) -> Record:
    """The plan that an interview's notebook carries, for a record that was deleted or damaged."""
    path = work / FOLDER / f"{name}.ipynb"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))["metadata"]["llmcourse"]["interview"]
        record = interview_record.parse_record(name, plan)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"expected the interview {name} in {work / interview_record.FILE} or its notebook {path}, found neither "
            "whole; begin another with `llmcourse interview`"
        ) from error
    record.notes.append(WORDS[record.language]["lost"])
    return record


def _clock(record: Record, language: str) -> str:
    gone, minutes = as_clock(record.elapsed_s), as_clock(60 * record.minutes)
    if record.left_s >= 0:
        return WORDS[language]["clock"].format(gone=gone, minutes=minutes)
    return WORDS[language]["over"].format(gone=gone, minutes=minutes, over=as_clock(-record.left_s))


def _standing(record: Record) -> list[str]:
    """Where an interview stands, and its parts, as lines."""
    words = WORDS[record.language]
    if record.ended is not None:
        return [words["ended"]]
    if record.elapsed_s == 0:
        until = interview_record.now() + timedelta(seconds=record.left_s)
        first = words["begun"].format(minutes=record.minutes, until=f"{until:%H:%M}", parts=len(record.parts))
    else:
        first = words["going_on"].format(clock=_clock(record, record.language))
    return [*record.notes, first, *(_line(part, record.language) for part in record.parts)]


# ------------------------------------------------------------------------------------------------------- the report


def _result(part: Part, words: dict[str, str]) -> str:
    if part.kind == "spoken" and part.verdict is None:
        return words["answered" if part.answers else "untouched"]
    if part.verdict is None:
        return words["untouched"]
    return words.get("rated_word" if part.verdict == "rated" else part.verdict, part.verdict)


def _line(part: Part, language: str) -> str:
    """One part: its name, result, points, tries and time."""
    words = WORDS[language]
    name = part.name if part.kind == "exercise" else words["spoken"].format(name=part.name)
    facts = [_result(part, words)]
    if part.points is not None:
        facts.append(words["points"].format(points=part.points, total=part.max_points))
    if part.tries:
        facts.append(words["one_try" if part.tries == 1 else "tries"].format(tries=part.tries))
    facts.append(words["of"].format(spent=as_clock(part.spent_s), minutes=part.minutes))
    return f"{name}: {', '.join(facts)}"


@dataclass(frozen=True)
class Report:
    """How an interview went; `revisits`: item -> day on which it comes back (ISO)."""

    name: str
    record: Record
    revisits: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        record = self.record
        parts = [
            {**asdict(part), "item": part.item, "revisit": self.revisits.get(part.item)}
            for part in record.parts
        ]
        return {
            "name": self.name,
            "finished": record.ended is not None,
            "begun": record.begun,
            "ended": record.ended,
            "minutes": record.minutes,
            "elapsed_s": round(record.elapsed_s, 1),
            "overtime_s": round(max(0.0, -record.left_s), 1),
            "notes": list(record.notes),
            "parts": parts,
        }

    def _lines(self) -> list[tuple[int, str]]:
        """(depth, text) of each line."""
        record, language = self.record, self.record.language
        words = WORDS[language]
        done = sum(part.done for part in record.parts)
        clock = _clock(record, language)
        lines = [
            (0, words["headline"].format(name=self.name, done=done, parts=len(record.parts), clock=clock))
        ]
        for part in record.parts:
            lines.append((1, _line(part, language)))
            lines += [(2, words["mistake"].format(sentence=sentence)) for sentence in part.mistakes]
            if (day := self.revisits.get(part.item)) is not None:
                lines.append((2, words["revisit"].format(day=day)))
        lines += [(0, note) for note in record.notes]
        if record.ended is None:
            lines.append((0, words["unfinished"]))
        elif not self.revisits:
            lines.append((0, words["nothing_due"]))
        return lines

    def __repr__(self) -> str:
        return "\n".join("  " * depth + text for depth, text in self._lines())

    def _repr_markdown_(self) -> str:
        lines = (text if depth == 0 else f"{'  ' * depth}- {text}" for depth, text in self._lines())
        (first, *rest) = lines
        return "\n".join([f"**{first}**", "", *rest])


def report(name: str | None = None, *, end: bool = False, place: Path | None = None) -> Report:
    """The report of an interview, the latest unless named; ends it as `Session.report` does.

    WorkspaceError when there is none, or it was not begun.
    """

    def find(book: Book, work: Path) -> Report:
        begun = [known for known, record in book.interviews.items() if record.begun is not None]
        found = name or max(begun, default=None)
        if found not in begun:
            wanted = "an interview that was begun" if name is None else f"an interview named {name!r}"
            raise WorkspaceError(
                f"expected {wanted}, found {', '.join(begun) or 'none'}; begin with `llmcourse interview 01` and run "
                "the notebook's first two cells"
            )
        _end_if_due(book, book.interviews[found], end=end)
        return Report(found, book.interviews[found], _revisits(book.interviews[found], book))

    return interview_record.change(find, place)[0]


def _end_if_due(book: Book, record: Record, *, end: bool) -> None:
    """End an interview that is over, once, and schedule the revisits of what was tried."""
    over = end or record.left_s <= 0 or all(part.done for part in record.parts)
    if record.ended is None and over:
        at = interview_record.now()
        record.ended = at.isoformat(timespec="seconds")
        for part in record.parts:
            interview_record.schedule(book, part, at)


def _revisits(record: Record, book: Book) -> dict[str, str]:
    if record.ended is None:
        return {}
    tried = [part.item for part in record.parts if interview_record.recall(part) is not None]
    return {
        item: f"{datetime.fromisoformat(book.revisits[item]['due']).astimezone():%Y-%m-%d}"
        for item in tried
        if item in book.revisits
    }
