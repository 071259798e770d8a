"""What of a class's folder is read, and that nothing a student can put there is followed, waited for or raised."""

from __future__ import annotations

import os
import socket
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcourse import intake, submission
from llmcourse.intake import IntakeError, Taken

SECRET = b"the teacher's own file"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """ada's folder for the assignment `demo`, empty; beside the submissions lies a file of the teacher's."""
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "submitted" / "ada" / "demo"
    folder.mkdir(parents=True)
    return folder


def take(home: Path, student: str = "ada") -> Taken:
    return intake.take(home.parents[1], student, "demo")


def test_a_notebook_is_taken_as_it_is_with_its_moment(home: Path) -> None:
    (home / "demo.ipynb").write_bytes(b"\xff any bytes")
    (home / "timestamp.txt").write_text("2026-11-30 12:00:00.123456 UTC")
    (home / ".ipynb_checkpoints").mkdir()
    assert take(home) == Taken("ada", "demo", b"\xff any bytes", None, (), "2026-11-30T12:00:00.123456+00:00")


def link_to_a_file(path: Path) -> None:
    path.symlink_to(path.parents[3] / "secret")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def hard_link(path: Path) -> None:
    os.link(path.parents[3] / "secret", path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.bind(path.name)
    finally:
        os.chdir(here)


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(submission.MAX_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (link_to_a_file, "expected a plain file, found a link"),
        (link_to_nothing, "found a link"),
        (link_to_itself, "found a link"),
        (link_to_a_device, "found a link"),
        (hard_link, "found a hard link"),
        (os.mkfifo, "found a pipe"),
        (bound_socket, "found a socket"),
        (Path.mkdir, "found a folder"),
        (too_large, "more than 20,971,520 bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_plain_file_of_its_own_is_refused_in_one_line(
    home: Path, make: Callable[[Path], None], expected: str
) -> None:
    make(home / "demo.ipynb")
    found = take(home)
    assert found.raw is None
    assert found.refused is not None and found.refused.startswith("demo.ipynb: ")
    assert expected in found.refused
    assert "\n" not in found.refused
    assert str(home) not in found.refused, "a report shows the teacher's folders"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a device")
def test_a_device_is_not_opened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        os.mknod(home / "demo.ipynb", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this machine makes no devices")
    real = os.open

    def guarded(name: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        assert name != "demo.ipynb", "it is opened"
        return real(name, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", guarded)
    assert "found a device" in str(take(home).refused)


@pytest.mark.parametrize("level", ["student", "assignment"])
def test_a_folder_that_is_a_link_is_not_followed(home: Path, level: str) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")
    other = home.parents[1] / "bob"
    if level == "student":
        other.symlink_to(home.parent)
    else:
        other.mkdir()
        (other / "demo").symlink_to(home)
    found = take(home, "bob")
    assert found.raw is None and "expected a folder, found a link" in str(found.refused)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../ada", "/etc", "a/b", "a\\b", "a\0b", "a\nb", "\udcff", "x" * 201]
)
def test_a_name_that_is_no_plain_name_is_never_opened(home: Path, name: str) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")
    found = take(home, name)
    assert found.raw is None
    assert found.refused is not None and found.refused.isprintable()
    with pytest.raises(IntakeError, match="expected the name of an assignment's folder"):
        intake.take(home.parents[1], "ada", name)
    with pytest.raises(IntakeError, match="expected the name of an assignment's folder"):
        intake.students(home.parents[1], name)


@pytest.mark.parametrize(
    "replacement", [os.mkfifo, link_to_a_file, Path.mkdir], ids=["pipe", "link", "folder"]
)
def test_a_file_replaced_after_it_was_looked_at_is_neither_followed_nor_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, replacement: Callable[[Path], None]
) -> None:
    path = home / "demo.ipynb"
    path.write_bytes(b"{}")
    real = os.open

    def replaced_before(name: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if name == "demo.ipynb":
            path.unlink()
            replacement(path)
        return real(name, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", replaced_before)
    found: list[Taken] = []
    reader = threading.Thread(target=lambda: found.append(take(home)), daemon=True)
    reader.start()
    reader.join(20)
    assert found, "taking it blocks"
    assert found[0].raw is None and found[0].refused


def test_a_file_that_vanishes_after_the_listing_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "other.ipynb"
    path.write_bytes(b"{}")
    real = intake._notebook_name

    def vanishing(folder: int, assignment: str, notes: list[str]) -> str:
        name = real(folder, assignment, notes)
        path.unlink()
        return name

    monkeypatch.setattr(intake, "_notebook_name", vanishing)
    assert "No such file" in str(take(home).refused)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("grows", "it changed while it was read"),
        ("grows for ever", "more than 5,000 bytes"),
        ("is written over", "it changed while it was read"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, change: str, expected: str
) -> None:
    path = home / "demo.ipynb"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(0, 0))
    monkeypatch.setattr(submission, "MAX_BYTES", 5_000)
    real, reads = os.read, []

    def changed_meanwhile(file: int, size: int) -> bytes:
        piece = real(file, min(size, 100))
        reads.append(len(piece))
        assert sum(reads) <= 5_001, "it is read for ever"
        if change == "is written over":
            path.write_bytes(b"9876543210")
        elif change == "grows for ever" or len(reads) == 1:
            with path.open("ab") as more:
                more.write(b"x" * 100)
            os.utime(path, ns=(0, 0))  # as the student may
        return piece

    monkeypatch.setattr(os, "read", changed_meanwhile)
    found = take(home)
    assert found.raw is None and expected in str(found.refused)


def test_a_file_of_exactly_the_limit_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "MAX_BYTES", 10)
    (home / "demo.ipynb").write_bytes(b"0123456789")
    assert take(home).raw == b"0123456789"
    (home / "demo.ipynb").write_bytes(b"0123456789a")
    assert take(home).raw is None


def test_the_only_notebook_is_taken_under_another_name_and_noted(home: Path) -> None:
    (home / "demo (1).ipynb").write_bytes(b"{}")
    (home / "linked.ipynb").symlink_to("demo (1).ipynb")
    (home / ".hidden.ipynb").write_bytes(b"no")
    found = take(home)
    assert found.raw == b"{}"
    assert "demo (1).ipynb, the only notebook there, was taken in its place" in found.notes[0]
    assert found.notes[1] == "left out beside the notebook: .hidden.ipynb, linked.ipynb"


def test_several_notebooks_under_other_names_are_refused_and_named(home: Path) -> None:
    for name in ("one.ipynb", "two\x1b.ipynb"):
        (home / name).write_bytes(b"{}")
    refused = str(take(home).refused)
    assert "expected demo.ipynb, found several notebooks: one.ipynb, two\\x1b.ipynb" in refused


def test_a_link_in_the_notebooks_place_is_not_made_up_for_by_another_notebook(home: Path) -> None:
    (home / "demo.ipynb").symlink_to("/etc/passwd")
    (home / "other.ipynb").write_bytes(b"{}")
    assert take(home).raw is None


def test_an_empty_folder_a_file_in_its_place_and_no_folder_are_refused(home: Path) -> None:
    assert "found nothing" in str(take(home).refused)
    (home / "answers.txt").write_text("")
    assert "found no notebook: answers.txt" in str(take(home).refused)
    assert "No such file" in str(take(home, "nobody").refused)
    (home.parents[1] / "bob").mkdir()
    (home.parents[1] / "bob" / "demo").write_text("")
    assert "expected a folder, found a file" in str(take(home, "bob").refused)


def test_an_archive_and_other_files_are_left_out_unopened(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")
    with zipfile.ZipFile(home / "work.zip", "w") as archive:
        archive.writestr("demo.ipynb", "{}")
    for number in range(7):
        (home / f"file{number}").write_text("")
    real, opened = os.open, []

    def recorded(name: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        opened.append(str(name))
        assert flags & os.O_CLOEXEC
        return real(name, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", recorded)
    found = take(home)
    assert found.raw == b"{}"
    assert found.notes == ("left out beside the notebook: file0, file1, file2, file3, file4 and 3 more",)
    assert opened[1:] == ["ada", "demo", "demo.ipynb"]


def test_a_folder_of_very_many_files_is_not_listed_to_its_end(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MAX_ENTRIES", 20)
    for number in range(30):
        (home / f"{number}.ipynb").write_bytes(b"")
    found = take(home)
    assert found.raw is None and "demo.ipynb" in str(found.refused)
    assert found.notes == ("the folder holds over 20 entries; all but demo.ipynb were left out",)
    (home / "demo.ipynb").write_bytes(b"{}")
    assert take(home).raw == b"{}"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-30 12:00:00.123456 UTC", "2026-11-30T12:00:00.123456+00:00"),
        ("2026-11-30 12:00:00 UTC", "2026-11-30T12:00:00+00:00"),
        ("2026-11-30 12:00:00", "2026-11-30T12:00:00+00:00"),
        ("2026-11-30 12:00:00.5 +0530", "2026-11-30T06:30:00.500000+00:00"),
        ("2026-11-30 12:00:00 -08:00", "2026-11-30T20:00:00+00:00"),
        ("2026-11-30T12:00:00Z", "2026-11-30T12:00:00+00:00"),
        ("2026-02-30 12:00:00 UTC", ""),
        ("2026-11-30 25:00:00 UTC", ""),
        ("2026-11-30 12:00:00 +9900", ""),
        ("2026-11-30 12:00:00 XYZ", ""),
        ("2026-11-30 12:00:00 Asia", ""),
        ("2026-11-30 12:0٠:00 UTC", ""),
        ("0001-01-01 00:00:00 +0900", ""),
        ("tomorrow", ""),
        ("", ""),
    ],
)
def test_a_moment_is_read_strictly(text: str, moment: str) -> None:
    assert intake.utc(text) == moment


def test_a_moment_agrees_with_nbgraders_own_reading() -> None:
    parse_utc = pytest.importorskip("nbgrader.utils").parse_utc
    # Not of a numeric zone: nbgrader 0.9 takes +0530 for 530 seconds.
    for text in ("2026-11-30 12:00:00.123456 UTC", "2026-11-30 12:00:00", "2026-07-01 12:00:00.5 EST"):
        assert intake.utc(text) == f"{parse_utc(text).isoformat()}+00:00"


@pytest.mark.parametrize(
    "make",
    [
        link_to_a_file,
        hard_link,
        os.mkfifo,
        Path.mkdir,
        lambda path: path.write_text(f"{'2026-11-30 12:00:00 UTC':101}"),
    ],
    ids=["link", "hard link", "pipe", "folder", "long"],
)
def test_a_moment_that_cannot_be_read_is_a_note_and_the_notebook_is_taken(
    home: Path, make: Callable[[Path], None]
) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")
    make(home / "timestamp.txt")
    found = take(home)
    assert found.raw == b"{}" and found.submitted_at == ""
    assert len(found.notes) == 1 and "when it was handed in is not known: timestamp.txt" in found.notes[0]


def test_a_forged_moment_is_shown_in_print(home: Path) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")
    (home / "timestamp.txt").write_bytes(b"\x1b[2J\xff\n\n2026")
    (note,) = take(home).notes
    assert note.isprintable() and "\\x1b[2J" in note


def test_a_folder_without_permission_is_refused_for_that_student(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def closed(name: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if name == "demo":  # root, as whom the tests may run, could open any folder
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", closed)
    assert take(home).refused == "demo: cannot be read (Permission denied)"


def test_a_fault_of_the_machine_is_raised_and_no_students_outcome(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")

    def full(file: int, size: int) -> bytes:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "read", full)
    with pytest.raises(IntakeError, match=r"demo.ipynb: cannot be read \(Too many open files\)"):
        take(home)


def test_every_descriptor_is_closed_again(home: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    os.mkfifo(home / "demo.ipynb")
    before = count()
    for _ in range(3):
        take(home)
        intake.students(home.parents[1], "demo")
    assert count() == before


def test_students_are_those_with_an_entry_and_what_else_lies_there_is_noted(home: Path) -> None:
    top = home.parents[1]
    for name in ("zoë", "张伟", "bob"):
        (top / name / "demo").mkdir(parents=True)
    (top / "eve").mkdir()
    (top / "eve" / "demo").symlink_to("/etc")
    (top / "absent" / "other").mkdir(parents=True)
    (top / "linked").symlink_to("ada")
    for name in (".cache", "two\nlines", "x" * 201, os.fsdecode(b"\xff")):
        (top / name / "demo").mkdir(parents=True)
    (top / "class.zip").write_bytes(b"")
    found = intake.students(top, "demo")
    assert found.names == ("ada", "bob", "eve", "zoë", "张伟")
    assert "left out, since links are not followed: linked" in found.notes
    assert "left out, since expected a folder for each student: class.zip" in found.notes
    assert any(".cache" in note for note in found.notes)
    assert any("two\\nlines" in note and "\\udcff" in note for note in found.notes)
    assert any("over 200 bytes: xxx" in note for note in found.notes)
    assert all(note.isprintable() for note in found.notes)
    assert take(home, "eve").raw is None, "the others are graded, and eve learns why not"


def test_a_class_without_a_folder_or_of_too_many_entries_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = home.parents[1]
    with pytest.raises(IntakeError, match="expected the folder of what students handed in"):
        intake.students(top / "none", "demo")
    with pytest.raises(IntakeError, match="expected the folder of what students handed in"):
        intake.take(top / "none", "ada", "demo")
    (top / "bob").mkdir()
    monkeypatch.setattr(intake, "MAX_STUDENTS", 1)
    with pytest.raises(IntakeError, match="over 1 entries"):
        intake.students(top, "demo")


def test_the_teachers_own_folder_may_be_a_link(home: Path, tmp_path: Path) -> None:
    (home / "demo.ipynb").write_bytes(b"{}")
    (tmp_path / "elsewhere").symlink_to(home.parents[1])
    assert intake.students(tmp_path / "elsewhere", "demo").names == ("ada",)
    assert intake.take(tmp_path / "elsewhere", "ada", "demo").raw == b"{}"
