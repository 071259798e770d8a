"""A class's folder as bytes: which students handed in an assignment, and the notebook of each.

    grading/submitted/STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb
                                         timestamp.txt       when it was handed in, by nbgrader's exchange
                                         submission_secret.txt       by which it hands feedback to its student

Students put into their folders what they like, and may change it at any time. So every step down is opened from the
folder above by its descriptor and never through a link, only plain files with one name are read, from the descriptor
that was looked at, and nothing is ever unpacked. What cannot be taken is refused in one line, for that student alone;
only a fault of the teacher's own machine is raised. Imports no torch and no nbgrader.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

from llmcourse import submission
from llmcourse.submission import one_line

MAX_STUDENTS, MAX_ENTRIES, MAX_NAME_BYTES, MAX_TIMESTAMP_BYTES = 200_000, 2_000, 200, 100
MAX_SECRET_BYTES = 200
SHOWN_NAMES = 5
SECRET = "submission_secret.txt"
IGNORED = ("timestamp.txt", SECRET, ".ipynb_checkpoints")  # nbgrader's and Jupyter's own
# What a student's own entries can lead to; any other error (a full table of files, a bad disk) is the machine's.
OF_THE_ENTRY = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM),
    *(errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG, errno.EOVERFLOW, errno.EINVAL),
    *(errno.EAGAIN, errno.ENOTCONN),  # a lease on the file, a mount that died
)
# As nbgrader's exchange writes it: "2026-11-30 12:00:00.123456 UTC", the zone as its settings name it.
TIMESTAMP = re.compile(
    r"(2[01]\d\d-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,6})?)(?: ?(?:([+-])(\d\d):?(\d\d)|([A-Za-z]{1,5})))?",
    re.ASCII,
)


class IntakeError(Exception):
    """A folder of the teacher's that cannot be read: one line that says what was expected, what came, what to do."""


class _Refused(Exception):
    """Why nothing of a student can be taken, in one line."""


@dataclass(frozen=True)
class Students:
    """Who handed in an assignment, sorted; and what lies beside their folders and was left out, a line a reason."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """One student's notebook as bytes, or why there is none.

    raw: at most submission.MAX_BYTES; None exactly where `refused` says why. submitted_at: ISO 8601 in UTC, or "".
    """

    student: str
    assignment: str
    raw: bytes | None
    refused: str | None
    notes: tuple[str, ...]
    submitted_at: str


def students(submitted: Path, assignment: str) -> Students:
    """Students who have an entry for an assignment, whatever it is: `take` says what can be done with it.

    IntakeError when the folder cannot be listed or the assignment's name is no plain name.
    """
    _check_assignment(assignment)
    names: list[str] = []
    left_out: dict[str, list[str]] = {}
    with _top_folder(submitted) as folder, os.scandir(folder) as entries:
        for count, entry in enumerate(entries, 1):
            if count > MAX_STUDENTS:
                raise IntakeError(
                    f"{submitted}: over {MAX_STUDENTS:,} entries; expected a folder for each student"
                )
            if why := _why_no_student(entry):
                left_out.setdefault(why, []).append(entry.name)
            elif _exists(f"{entry.name}/{assignment}", folder):
                names.append(entry.name)
    notes = [f"left out, since {why}: {_listed(found)}" for why, found in sorted(left_out.items())]
    return Students(tuple(sorted(names)), tuple(notes))


def take(submitted: Path, student: str, assignment: str) -> Taken:
    """Read one student's notebook, ASSIGNMENT.ipynb or the only notebook that lies there under another name.

    IntakeError for a fault of the teacher's machine only; what the student did comes back in `refused` or `notes`.
    """
    _check_assignment(assignment)
    notes: list[str] = []
    submitted_at = ""
    try:
        if why := _unusable(student):
            raise _Refused(f"{one_line(student)}: expected the name of a student's folder, but {why}")
        with (
            _top_folder(submitted) as top,
            _opened(student, top, stat.S_ISDIR) as home,
            _opened(assignment, home, stat.S_ISDIR) as folder,
        ):
            submitted_at = _submitted_at(folder, notes)
            raw = _read(_notebook_name(folder, assignment, notes), folder)
    except _Refused as refused:
        return Taken(student, assignment, None, str(refused), tuple(notes), submitted_at)
    return Taken(student, assignment, raw, None, tuple(notes), submitted_at)


def exchange_secret(submitted: Path, student: str, assignment: str) -> str:
    """What nbgrader's exchange names a student's feedback by; "" where there is none that can be read."""
    try:
        with (
            _top_folder(submitted) as top,
            _opened(student, top, stat.S_ISDIR) as home,
            _opened(assignment, home, stat.S_ISDIR) as folder,
        ):
            return _read(SECRET, folder, MAX_SECRET_BYTES).decode("utf-8", "replace")
    except _Refused:
        return ""


# ------------------------------------------------------------------------------------------------------------- names


def _unusable(name: str) -> str | None:
    """Why a name cannot be a student's or an assignment's; None where it can."""
    if not name or name.startswith("."):
        return "a name that is empty or starts with a dot is no student's"
    if "/" in name or "\\" in name:
        return "the name holds a path separator"
    if not name.isprintable():  # control characters, and bytes that are no UTF-8
        return "the name holds characters that cannot be printed"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"the name has over {MAX_NAME_BYTES} bytes"
    return None


def _check_assignment(assignment: str) -> None:
    if why := _unusable(assignment):
        raise IntakeError(f"{one_line(assignment)}: expected the name of an assignment's folder, but {why}")


def _why_no_student(entry: os.DirEntry[str]) -> str | None:
    if why := _unusable(entry.name):
        return why
    try:
        if entry.is_symlink():
            return "links are not followed"
        return None if entry.is_dir(follow_symlinks=False) else "expected a folder for each student"
    except OSError:  # gone since it was listed
        return "it cannot be looked at"


def _exists(path: str, folder: int) -> bool:
    """Whether there is anything of that name; what may not be looked at counts, so that `take` says so."""
    try:
        os.stat(path, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True


def _listed(names: Sequence[str]) -> str:
    """Names of unknown origin for a message: the first few, and how many more."""
    shown = ", ".join(one_line(name, 40) for name in sorted(names)[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return f"{shown} and {more:,} more" if more > 0 else shown


# ----------------------------------------------------------------------------------------------- folders and files


@contextmanager
def _top_folder(submitted: Path) -> Iterator[int]:
    """The teacher's own folder, which may be a link."""
    try:
        found = os.open(submitted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise IntakeError(
            f"{submitted}: expected the folder of what students handed in ({error.strerror}); "
            "run `nbgrader collect`, or put each notebook at STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb there"
        ) from error
    try:
        yield found
    finally:
        os.close(found)


@contextmanager
def _opened(name: str, folder: int, is_kind: object) -> Iterator[int]:
    """A folder or a plain file with one name, opened from the folder above; _Refused for anything else.

    is_kind: stat.S_ISDIR or stat.S_ISREG. It is looked at before it is opened, since opening a device can do something,
    and again after, since it may have been replaced; a pipe that comes between does not block.
    """
    wants_folder = is_kind is stat.S_ISDIR
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with _refusing(name):
        _refuse_other_kinds(name, os.stat(name, dir_fd=folder, follow_symlinks=False), wants_folder)
        found = os.open(name, flags | (os.O_DIRECTORY if wants_folder else 0), dir_fd=folder)
    try:
        with _refusing(name):
            _refuse_other_kinds(name, os.fstat(found), wants_folder)
        yield found
    finally:
        os.close(found)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn an OSError about a student's entry into a refusal, and one about the machine into IntakeError."""
    try:
        yield
    except OSError as error:
        line = f"{one_line(name)}: cannot be read ({error.strerror})"
        if error.errno in OF_THE_ENTRY:
            raise _Refused(line) from error
        raise IntakeError(
            f"{line}; this is a fault of the machine, not of the submission: try again"
        ) from error


KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _refuse_other_kinds(name: str, status: os.stat_result, wants_folder: bool) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != (stat.S_IFDIR if wants_folder else stat.S_IFREG):
        wanted = "a folder" if wants_folder else "a plain file"
        raise _Refused(f"{one_line(name)}: expected {wanted}, found {KINDS.get(kind, 'something else')}")
    if not wants_folder and status.st_nlink > 1:
        raise _Refused(
            f"{one_line(name)}: expected a file of its own, found a hard link to a file that has another name too; "
            "put a copy in its place"
        )


def _read(name: str, folder: int, limit: int | None = None) -> bytes:
    """The content of a plain file of at most `limit` bytes; _Refused for anything else."""
    limit = submission.MAX_BYTES if limit is None else limit
    with _opened(name, folder, stat.S_ISREG) as file, _refusing(name):
        before = os.fstat(file)
        pieces: list[bytes] = []
        left = limit + 1 if before.st_size <= limit else 0
        while left and (piece := os.read(file, min(left, 1 << 20))):
            pieces.append(piece)
            left -= len(piece)
        if not left:
            advice = "; clear the outputs and save it again" if name.lower().endswith(".ipynb") else ""
            raise _Refused(f"{one_line(name)}: more than {limit:,} bytes, which is all that is read{advice}")
        raw, after = b"".join(pieces), os.fstat(file)
        if not len(raw) == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            raise _Refused(f"{one_line(name)}: it changed while it was read; grade it again")
        return raw


def _notebook_name(folder: int, assignment: str, notes: list[str]) -> str:
    """The file to read of a student's folder; what else lies there goes to the notes. _Refused if it is not clear."""
    wanted = f"{assignment}.ipynb"
    entries: list[os.DirEntry[str]] = []
    with _refusing(assignment), os.scandir(folder) as found:
        for entry in found:
            if len(entries) == MAX_ENTRIES:
                notes.append(f"the folder holds over {MAX_ENTRIES:,} entries; all but {wanted} were left out")
                return wanted
            entries.append(entry)
    names = [entry.name for entry in entries if entry.name not in IGNORED]
    chosen = wanted
    if wanted not in names:
        with _refusing(assignment):
            others = [entry.name for entry in entries if _is_other_notebook(entry)]
        if len(others) != 1:
            what = "several notebooks" if others else "no notebook" if names else "nothing"
            listed = f": {_listed(others or names)}" if names else ""
            raise _Refused(f"expected {wanted}, found {what}{listed}; hand it in under that name")
        chosen = others[0]
        notes.append(
            f"expected {wanted}; {one_line(chosen)}, the only notebook there, was taken in its place"
        )
    if left := [name for name in names if name != chosen]:
        notes.append(f"left out beside the notebook: {_listed(left)}")
    return chosen


def _is_other_notebook(entry: os.DirEntry[str]) -> bool:
    named = entry.name.lower().endswith(".ipynb") and not entry.name.startswith(".")
    return named and entry.is_file(follow_symlinks=False)


# -------------------------------------------------------------------------------------------------------------- time


def _submitted_at(folder: int, notes: list[str]) -> str:
    """When it was handed in, by nbgrader's timestamp.txt: ISO 8601 in UTC; "" where there is none, or none of use."""
    try:
        os.stat("timestamp.txt", dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return ""
    except OSError:
        pass  # said by what follows
    try:
        text = _read("timestamp.txt", folder, MAX_TIMESTAMP_BYTES).decode("utf-8", "replace").strip()
    except _Refused as refused:
        notes.append(f"when it was handed in is not known: {refused}")
        return ""
    moment = utc(text)
    if not moment:
        notes.append(
            f"when it was handed in is not known: timestamp.txt holds `{one_line(text)}`, "
            "expected something like 2026-11-30 12:00:00.0 UTC"
        )
    return moment


def utc(text: str) -> str:
    """A moment as nbgrader's exchange writes it, in ISO 8601 and UTC; "" for anything else.

    Without a zone it is UTC, as for nbgrader.
    """
    found = TIMESTAMP.fullmatch(text)
    if found is None:
        return ""
    day, time, sign, hours, minutes, zone = found.groups()
    try:
        moment = datetime.strptime(f"{day} {time}", f"%Y-%m-%d %H:%M:%S{'.%f' if '.' in time else ''}")
        if sign:
            offset = timedelta(hours=int(hours), minutes=int(minutes)) * (-1 if sign == "-" else 1)
            return moment.replace(tzinfo=timezone(offset)).astimezone(UTC).isoformat()
        known = UTC if zone in (None, "UTC", "GMT", "Z") else ZoneInfo(zone)
        return moment.replace(tzinfo=known).astimezone(UTC).isoformat()
    except (ValueError, KeyError, OSError):  # no such day, no such zone: KeyError and OSError are ZoneInfo's
        return ""
