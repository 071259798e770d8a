"""A learner's copies of the lessons, and their progress.

    work/                                      git-ignored; LLMCOURSE_WORKSPACE names another place
      01_parameter_loading/
        01_parameter_loading.ipynb             the learner's own: copied once, never overwritten
        01_parameter_loading.new.ipynb         a newer version of the lesson, offered beside it
        01_parameter_loading.2026-11-23-181500.ipynb    what `reset` put aside
      interviews/                              notebooks of interviews, each written once, never overwritten
      progress.json                            attempts, best points and times of each exercise
      interviews.json                          interviews, and when to come back to what (llmcourse.interview_record)
      .copies.json                             which version of each lesson was copied and offered
      .lock

Every file is written beside its place, flushed, then moved there whole; nothing that exists is moved over, except
the JSON files and an offer nobody has edited. So an interruption, a full disk or a second process can leave a
`.partial` file behind (removed by the next `prepare`), never a lost or half-written one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: there a second process is not kept out
    fcntl = None  # type: ignore[assignment]

PACKAGE = Path(__file__).resolve().parent
VERSION = 1
LOCK_WAIT_S = 5.0
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class WorkspaceError(Exception):
    """What was expected of the workspace, what was found, and what to do, in one line."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: the learner's notebooks it copied, and the newer versions it laid beside them."""

    copied: tuple[Path, ...]
    offered: tuple[Path, ...]


@dataclass(frozen=True)
class ExerciseProgress:
    """One exercise: counts, points and moments (ISO 8601, local time with its offset)."""

    attempts: int
    best_points: float
    max_points: float
    last_verdict: str
    first_tried: str
    last_tried: str
    first_solved: str | None = None
    lesson: str | None = None


FIELD_KINDS: dict[str, tuple[type, ...]] = {
    "attempts": (int,),
    "best_points": (int, float),
    "max_points": (int, float),
    "last_verdict": (str,),
    "first_tried": (str,),
    "last_tried": (str,),
    "first_solved": (str, type(None)),
    "lesson": (str, type(None)),
}


# ---------------------------------------------------------------------------------------------------- places


def repository() -> Path | None:
    """Root of the clone this package runs from, or None when it was installed without one."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "solutions").is_dir() else None


def folder(place: Path | None = None) -> Path:
    """The workspace: LLMCOURSE_WORKSPACE, else one that holds `place`, else `work` in the clone or in `place`.

    place: the current directory unless given.
    """
    named = os.environ.get("LLMCOURSE_WORKSPACE")
    if named:
        return Path(named).expanduser().resolve()
    here = (place or Path.cwd()).resolve()
    for parent in (here, *here.parents):
        if (parent / ".copies.json").is_file():
            return parent
    return (repository() or here) / "work"


def lesson_sources() -> dict[str, list[Path]]:
    """Student notebooks of each lesson: {"01_parameter_loading": [paths]}, sorted; from the clone or the package.

    WorkspaceError where there are none.
    """
    root = repository()
    notebooks = root / "notebooks" if root is not None else PACKAGE / "notebooks"
    found: dict[str, list[Path]] = {}
    for path in sorted(notebooks.glob("[0-9][0-9]_*/*.ipynb")):
        found.setdefault(path.parent.name, []).append(path)
    if not found:
        what_to_do = (
            "run `make notebooks`" if root is not None else "clone the repository and run `make lab` there"
        )
        raise WorkspaceError(f"expected lessons in {notebooks}, found none; {what_to_do}")
    return found


def lesson_name(given: str) -> str:
    """Full name of a lesson given as `01`, `1`, `parameter_loading` or `01_parameter_loading`; else WorkspaceError."""
    names = list(lesson_sources())
    wanted = given.zfill(2) if given.isdigit() else given
    for name in names:
        number, topic = name.split("_", 1)
        if wanted in (name, number, topic):
            return name
    raise WorkspaceError(f"no lesson is named {given!r}; expected one of {', '.join(names)}")


# ------------------------------------------------------------------------------ copying, offering, resetting


def prepare(place: Path | None = None) -> Prepared:
    """Copy each lesson that the workspace lacks, and offer each newer version beside the learner's own.

    WorkspaceError when the workspace cannot be written.
    """
    sources = lesson_sources()
    work = folder(place)
    copied: list[Path] = []
    offered: list[Path] = []
    with _told_in_one_line(work), _locked(work):
        _remove_partial_files(work)
        copies = _read_copies(work)
        for source in (path for paths in sources.values() for path in paths):
            own = work / source.parent.name / source.name
            if not own.exists():
                _copy_first_time(source, own, work, copies)
                copied.append(own)
            elif (offer := _offer(source, own, work, copies)) is not None:
                offered.append(offer)
    return Prepared(tuple(copied), tuple(offered))


def reset(lesson: str, place: Path | None = None) -> list[Path]:
    """Put the learner's notebooks of a lesson aside under dated names and lay fresh ones in their place.

    Returns the dated copies; a notebook that equals the lesson stays and gets none. At each moment what the learner
    wrote is whole under one of the two names. WorkspaceError for an unknown lesson or when nothing could be written.
    """
    name = lesson_name(lesson)
    sources = lesson_sources()[name]
    work = folder(place)
    kept: list[Path] = []
    with _told_in_one_line(work), _locked(work):
        _remove_partial_files(work)
        copies = _read_copies(work)
        for source in sources:
            own = work / name / source.name
            if not own.exists():
                _copy_first_time(source, own, work, copies)
            elif own.read_bytes() != source.read_bytes():
                kept.append(_exchange(source, own))
            _remember(work, copies, own, "copied", source)
            _withdraw_offer(own, work, copies)
    return kept


def _copy_first_time(source: Path, own: Path, work: Path, copies: dict[str, dict[str, str]]) -> None:
    own.parent.mkdir(parents=True, exist_ok=True)
    # Remembered first: had the copy come first, an interruption between the two would leave a notebook of an
    # unknown version. A remembered copy that is missing is simply made by the next run.
    _remember(work, copies, own, "copied", source)
    _move_to_free_place(_write_beside(own, source.read_bytes()), own)


def _offer(source: Path, own: Path, work: Path, copies: dict[str, dict[str, str]]) -> Path | None:
    known = copies.get(_key(work, own), {})
    digest = _digest(source)
    if digest in (known.get("copied"), known.get("offered")):
        return None
    if _digest(own) == digest:
        _remember(work, copies, own, "copied", source)
        return None
    offer = own.with_suffix(".new.ipynb")
    partial = _write_beside(offer, source.read_bytes())
    if offer.exists() and _digest(offer) == known.get("offered"):
        os.replace(partial, offer)
    else:
        offer = _free_name(own, ".new")
        _move_to_free_place(partial, offer)
    _remember(work, copies, own, "offered", source)
    return offer


def _exchange(source: Path, own: Path) -> Path:
    fresh = _write_beside(own, source.read_bytes())
    kept = _free_name(own, f".{datetime.now():%Y-%m-%d-%H%M%S}")
    _move_to_free_place(own, kept)
    try:
        _move_to_free_place(fresh, own)
    except OSError:
        if not own.exists():  # else an editor has saved there meanwhile, and both files are the learner's
            _move_to_free_place(kept, own)
        raise
    return kept


def _withdraw_offer(own: Path, work: Path, copies: dict[str, dict[str, str]]) -> None:
    """Remove the offer of a newer version if nobody edited it: the reset notebook is that version or a later one."""
    offer = own.with_suffix(".new.ipynb")
    if offer.exists() and _digest(offer) == copies.get(_key(work, own), {}).get("offered"):
        offer.unlink()


def _key(work: Path, own: Path) -> str:
    return own.relative_to(work).as_posix()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_copies(work: Path) -> dict[str, dict[str, str]]:
    """Versions copied and offered. A damaged file counts as none known: then newer versions are offered again."""
    try:
        found = json.loads((work / ".copies.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        return {}
    return found


def _remember(work: Path, copies: dict[str, dict[str, str]], own: Path, what: str, source: Path) -> None:
    digest = _digest(source)
    entry = copies.setdefault(_key(work, own), {})
    if entry.get(what) != digest:
        entry[what] = digest
        write_json(work / ".copies.json", copies)


# -------------------------------------------------------------------------------------------------- progress


def record(
    exercise: str,
    verdict: str,
    points: float,
    max_points: float,
    *,
    lesson: str | None = None,
    place: Path | None = None,
) -> str | None:
    """Note one attempt at an exercise, and return a line for the learner when that was not possible, else None.

    Only work done inside the workspace counts: `place` (the current directory unless given) must lie in it, so that
    building, testing and grading the same notebooks elsewhere leave no trace. An exercise is solved when its verdict
    is "right". Never raises for a workspace that is read-only, full, locked or damaged.
    """
    try:
        here = (place or Path.cwd()).resolve()
        work = folder(here)
        if not work.is_dir() or not here.is_relative_to(work):
            return None
        with _locked(work):
            entries, note = _read_progress(work, put_aside=True)
            entries[exercise] = _with_attempt(entries.get(exercise), verdict, points, max_points, lesson)
            _write_progress(work, entries)
        return note
    except (OSError, WorkspaceError) as error:
        return f"Progress was not saved: {_reason(error)}."


def progress(place: Path | None = None) -> tuple[dict[str, ExerciseProgress], str | None]:
    """Every exercise tried so far, and a line for the learner when the file was damaged or newer than this program.

    WorkspaceError when it cannot be read.
    """
    work = folder(place)
    if not (work / "progress.json").exists():
        return {}, None
    with _told_in_one_line(work):
        entries, note = _read_progress(work, put_aside=False)
    return entries, note


def _with_attempt(
    before: ExerciseProgress | None, verdict: str, points: float, max_points: float, lesson: str | None
) -> ExerciseProgress:
    now = _now()
    solved_now = now if verdict == "right" else None
    if before is None:
        return ExerciseProgress(1, points, max_points, verdict, now, now, solved_now, lesson)
    return ExerciseProgress(
        attempts=before.attempts + 1,
        best_points=max(before.best_points, points),
        max_points=max_points,
        last_verdict=verdict,
        first_tried=before.first_tried,
        last_tried=now,
        first_solved=before.first_solved or solved_now,
        lesson=lesson or before.lesson,
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _read_progress(work: Path, *, put_aside: bool) -> tuple[dict[str, ExerciseProgress], str | None]:
    """Entries and a note. A damaged file counts as empty; with put_aside it is first renamed to a dated name."""
    path = work / "progress.json"
    try:
        return _parse_progress(path.read_bytes()), None
    except FileNotFoundError:
        return {}, None
    except ValueError as error:
        if not put_aside:
            return (
                {},
                f"{path} is damaged ({error}); the next check keeps it under a dated name and starts anew",
            )
        aside = set_aside(path)
        return (
            {},
            f"The progress file was damaged ({error}); it is kept as {aside.name}, and a new one was started.",
        )


def _parse_progress(text: bytes) -> dict[str, ExerciseProgress]:
    """ValueError for anything that `_write_progress` does not write; WorkspaceError for a later version's file."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict) or not isinstance(found.get("exercises"), dict):
        raise ValueError("expected an object with 'exercises'")
    if found.get("version") != VERSION:
        if isinstance(found.get("version"), int) and found["version"] > VERSION:
            raise WorkspaceError(
                f"progress.json was written by a later llmcourse (version {found['version']}, this one reads "
                f"{VERSION}); update with `git pull`"
            )
        raise ValueError(f"expected version {VERSION}, found {found.get('version')!r}")
    return {name: _parse_entry(name, entry) for name, entry in found["exercises"].items()}


def _parse_entry(name: str, entry: Any) -> ExerciseProgress:
    if not isinstance(entry, dict) or set(entry) != set(FIELD_KINDS):
        raise ValueError(f"unexpected entry for {name!r}")
    for key, value in entry.items():
        good = isinstance(value, FIELD_KINDS[key]) and not isinstance(value, bool)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"unexpected {key} for {name!r}: {value!r}")
    return ExerciseProgress(**entry)


def _write_progress(work: Path, entries: dict[str, ExerciseProgress]) -> None:
    exercises = {name: asdict(entry) for name, entry in sorted(entries.items())}
    write_json(work / "progress.json", {"version": VERSION, "exercises": exercises})


# -------------------------------------------------------------------------------- files, whole or not at all


def write(path: Path, content: bytes) -> None:
    """Put a file that is ours, not the learner's (a figure, say), into the workspace, over an earlier one."""
    with _told_in_one_line(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(_write_beside(path, content), path)


def create(path: Path, content: bytes) -> None:
    """Write a new file whole; FileExistsError where one of that name is, which stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _write_beside(path, content)
    try:
        _move_to_free_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to a dated name, where nothing will touch it again; returns that name."""
    aside = _free_name(path, f".damaged-{datetime.now():%Y-%m-%d-%H%M%S}")
    _move_to_free_place(path, aside)
    return aside


@contextlib.contextmanager
def held(place: Path | None = None) -> Iterator[Path]:
    """The workspace, kept from every other process meanwhile; WorkspaceError when it cannot be read or written."""
    work = folder(place)
    with _told_in_one_line(work), _locked(work):
        yield work


def write_json(path: Path, content: object) -> None:
    """Put a JSON file of ours into the workspace, whole, over an earlier one; ValueError for NaN and infinity."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    os.replace(_write_beside(path, text.encode()), path)


def _write_beside(path: Path, content: bytes) -> Path:
    """Write and flush `content` to a `.partial` file in the folder of `path`; the caller moves it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return partial


def _move_to_free_place(source: Path, target: Path) -> None:
    """Rename, but FileExistsError where `target` exists: a hard link, unlike a rename, never replaces a file."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, "already exists", str(target)) from error
        os.rename(source, target)
    else:
        os.unlink(source)


def _free_name(path: Path, addition: str) -> Path:
    """`name.addition.ipynb`, or with -2, -3, … where that exists."""
    for count in range(1, 10_000):
        number = "" if count == 1 else f"-{count}"
        found = path.with_name(f"{path.stem}{addition}{number}{path.suffix}")
        if not found.exists():
            return found
    raise WorkspaceError(
        f"10,000 copies of {path.name} lie in {path.parent}; remove the ones no longer needed"
    )


def _remove_partial_files(work: Path) -> None:
    for path in (*work.glob(".*.partial"), *work.glob("*/.*.partial")):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the workspace's lock; WorkspaceError when another process keeps it for LOCK_WAIT_S seconds."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("ab") as file:
        if fcntl is not None:
            _wait_for_lock(file.fileno(), work)
        yield  # closing the file releases the lock


def _wait_for_lock(descriptor: int, work: Path) -> None:
    give_up_at_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= give_up_at_s:
                raise WorkspaceError(
                    f"another process has held {work / '.lock'} for {LOCK_WAIT_S:g} s; end it, then try again"
                ) from error
            time.sleep(0.01)
        except OSError as error:
            if error.errno in (errno.ENOLCK, *NO_HARD_LINKS):
                return  # a network folder without locks: better unlocked than unusable
            raise


@contextlib.contextmanager
def _told_in_one_line(work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkspaceError(f"expected to read and write {work}, found: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    what_to_do = {
        errno.ENOSPC: "; free some disk space, then try again",
        errno.EDQUOT: "; free some disk space, then try again",
    }.get(error.errno or 0, "; make the folder writable or set LLMCOURSE_WORKSPACE to one that is")
    return f"{error.strerror or error}{where}{what_to_do}"
