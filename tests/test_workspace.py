from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcourse import workspace
from llmcourse.workspace import WorkspaceError

LESSON = "01_parameter_loading"
WITH_PACKAGE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
TOUCHES_DISK = ("link", "unlink", "replace", "rename", "fsync")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with two lessons, the second in two languages, and no workspace yet."""
    root = tmp_path / "a clone"
    (root / "solutions").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(workspace, "PACKAGE", root / "llmcourse")
    monkeypatch.delenv("LLMCOURSE_WORKSPACE", raising=False)
    monkeypatch.chdir(root)
    publish(root, "00_start_here/00_start_here.ipynb", "start")
    publish(root, f"{LESSON}/{LESSON}.ipynb", "first version")
    publish(root, f"{LESSON}/{LESSON}.zh.ipynb", "第一版")
    return root


def publish(root: Path, name: str, text: str) -> None:
    path = root / "notebooks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def own(root: Path, addition: str = "") -> Path:
    return root / "work" / LESSON / f"{LESSON}{addition}.ipynb"


def visible(root: Path) -> set[str]:
    return {path.name for path in (root / "work" / LESSON).iterdir()}


def texts(root: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in (root / "work" / LESSON).iterdir()]


# ------------------------------------------------------------------------------------------------------- places


def test_the_workspace_is_the_clones_work_folder_wherever_the_command_is_run(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workspace.folder() == clone / "work"
    monkeypatch.chdir(tmp_path)
    assert workspace.folder() == clone / "work"


def test_a_variable_names_another_workspace(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOURSE_WORKSPACE", str(tmp_path / "mine"))
    workspace.prepare()
    assert (tmp_path / "mine" / LESSON / f"{LESSON}.ipynb").read_text() == "first version"
    assert not (clone / "work").exists()


def test_without_a_clone_the_packaged_lessons_are_copied_beside_the_learner(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clone / "pyproject.toml").unlink()
    packaged = clone / "llmcourse" / "notebooks" / LESSON
    packaged.mkdir(parents=True)
    (packaged / f"{LESSON}.ipynb").write_text("packaged")
    monkeypatch.chdir(tmp_path)
    workspace.prepare()
    assert (tmp_path / "work" / LESSON / f"{LESSON}.ipynb").read_text() == "packaged"
    assert workspace.folder(tmp_path / "work" / LESSON) == tmp_path / "work"


@pytest.mark.parametrize(
    ("cloned", "what_to_do"),
    [(True, "make notebooks"), (False, "clone the repository")],
    ids=["clone", "wheel"],
)
def test_missing_lessons_are_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloned: bool, what_to_do: str
) -> None:
    monkeypatch.setattr(workspace, "PACKAGE", tmp_path / "llmcourse")
    if cloned:
        (tmp_path / "solutions").mkdir()
        (tmp_path / "pyproject.toml").touch()
    with pytest.raises(WorkspaceError, match=what_to_do):
        workspace.prepare(tmp_path)


@pytest.mark.parametrize("given", ["01_parameter_loading", "parameter_loading", "01", "1"])
def test_a_lesson_is_found_by_name_topic_or_number(clone: Path, given: str) -> None:
    assert workspace.lesson_name(given) == LESSON


@pytest.mark.parametrize("given", ["02", "parameter", "", "../01_parameter_loading"])
def test_an_unknown_lesson_is_an_error_that_lists_the_lessons(clone: Path, given: str) -> None:
    with pytest.raises(WorkspaceError, match="00_start_here, 01_parameter_loading"):
        workspace.lesson_name(given)


# --------------------------------------------------------------------------------------------- copies and offers


def test_each_lesson_is_copied_once_and_never_overwritten(clone: Path) -> None:
    assert len(workspace.prepare().copied) == 3
    own(clone).write_text("my answer")
    assert workspace.prepare() == workspace.Prepared((), ())
    assert own(clone).read_text() == "my answer"


def test_a_newer_version_is_offered_once_beside_the_learners_own(clone: Path) -> None:
    workspace.prepare()
    own(clone).write_text("my answer")
    publish(clone, f"{LESSON}/{LESSON}.ipynb", "second version")
    assert workspace.prepare().offered == (own(clone, ".new"),)
    assert own(clone).read_text() == "my answer"
    assert own(clone, ".new").read_text() == "second version"
    own(clone, ".new").unlink()
    assert workspace.prepare().offered == (), "an offer that was thrown away must not come back"


def test_an_unedited_offer_gives_way_to_a_later_one(clone: Path) -> None:
    workspace.prepare()
    for version in ("second version", "third version"):
        publish(clone, f"{LESSON}/{LESSON}.ipynb", version)
        workspace.prepare()
    assert own(clone, ".new").read_text() == "third version"
    assert visible(clone) == {f"{LESSON}.ipynb", f"{LESSON}.new.ipynb", f"{LESSON}.zh.ipynb"}


def test_an_offer_the_learner_has_worked_in_is_kept(clone: Path) -> None:
    workspace.prepare()
    publish(clone, f"{LESSON}/{LESSON}.ipynb", "second version")
    workspace.prepare()
    own(clone, ".new").write_text("my answer in the second version")
    publish(clone, f"{LESSON}/{LESSON}.ipynb", "third version")
    assert workspace.prepare().offered == (own(clone, ".new-2"),)
    assert own(clone, ".new").read_text() == "my answer in the second version"
    assert own(clone, ".new-2").read_text() == "third version"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"], ids=repr)
def test_damaged_records_of_copies_cost_no_answer(clone: Path, damage: bytes) -> None:
    workspace.prepare()
    own(clone).write_text("my answer")
    (clone / "work" / ".copies.json").write_bytes(damage)
    assert workspace.prepare().offered == (own(clone, ".new"),)
    assert own(clone).read_text() == "my answer"


# --------------------------------------------------------------------------------------------------------- reset


def test_reset_keeps_a_dated_copy_and_lays_a_fresh_lesson(clone: Path) -> None:
    workspace.prepare()
    own(clone).write_text("my answer")
    (kept,) = workspace.reset("01")
    assert kept.read_text() == "my answer"
    assert own(clone).read_text() == "first version"
    assert own(clone, ".zh").read_text(encoding="utf-8") == "第一版"
    own(clone).write_text("my second answer")
    (kept_again,) = workspace.reset("01")
    assert {kept.read_text(), kept_again.read_text()} == {"my answer", "my second answer"}


def test_reset_of_an_untouched_lesson_leaves_no_copies(clone: Path) -> None:
    workspace.prepare()
    assert workspace.reset(LESSON) == []
    assert visible(clone) == {f"{LESSON}.ipynb", f"{LESSON}.zh.ipynb"}


def test_reset_before_the_first_lab_copies_the_lesson(clone: Path) -> None:
    assert workspace.reset(LESSON) == []
    assert own(clone).read_text() == "first version"


def test_reset_takes_the_newest_version_and_withdraws_its_unedited_offer(clone: Path) -> None:
    workspace.prepare()
    own(clone).write_text("my answer")
    publish(clone, f"{LESSON}/{LESSON}.ipynb", "second version")
    workspace.prepare()
    workspace.reset(LESSON)
    assert own(clone).read_text() == "second version"
    assert not own(clone, ".new").exists()
    assert workspace.prepare() == workspace.Prepared((), ())


def test_reset_keeps_an_offer_the_learner_has_worked_in(clone: Path) -> None:
    workspace.prepare()
    publish(clone, f"{LESSON}/{LESSON}.ipynb", "second version")
    workspace.prepare()
    own(clone, ".new").write_text("my answer")
    workspace.reset(LESSON)
    assert own(clone, ".new").read_text() == "my answer"


def test_a_name_that_is_taken_is_never_moved_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        workspace._move_to_free_place(tmp_path / "a", tmp_path / "b")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("a", "b")


def test_a_new_file_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "interviews" / "one.ipynb"
    workspace.create(path, b"first")
    with pytest.raises(FileExistsError):
        workspace.create(path, b"second")
    assert [(one.name, one.read_bytes()) for one in path.parent.iterdir()] == [("one.ipynb", b"first")]


@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken"])
def test_a_disk_without_hard_links_moves_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(workspace.os, "link", no_link)
    (tmp_path / "a").write_text("a")
    if taken:
        (tmp_path / "b").write_text("b")
        with pytest.raises(FileExistsError):
            workspace._move_to_free_place(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "b"
    else:
        workspace._move_to_free_place(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "a"


# -------------------------------------------------------------------------------------------------------- faults


class Fault:
    """Lets `steps` operations on the disk pass, then raises; `after` raises once the operation is done."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: BaseException, *, steps: int, after: bool
    ) -> None:
        self.left = steps
        self.error = error
        self.after = after
        self.struck = False
        for name in TOUCHES_DISK:
            monkeypatch.setattr(workspace.os, name, self.wrap(getattr(os, name)))

    def wrap(self, operation: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: object) -> None:
            strikes = self.left == 0 and not self.struck
            self.left -= 1
            if strikes and not self.after:
                self.struck = True
                raise self.error
            operation(*arguments)
            if strikes:
                self.struck = True
                raise self.error

        return wrapped


FAULTS = [
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), id="full"),
    pytest.param(OSError(errno.EROFS, "Read-only file system"), id="read-only"),
    pytest.param(KeyboardInterrupt(), id="Ctrl-C"),
]


def strike_at_each_step(
    error: BaseException,
    *,
    after: bool,
    arrange: Callable[[], None],
    act: Callable[[], object],
    hold: Callable[[], None],
) -> int:
    """Run `act` with a fault at its first, second, … step until one run meets none; returns how many met one."""
    for steps in range(100):
        arrange()
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, error, steps=steps, after=after)
            try:
                act()
            except (WorkspaceError, KeyboardInterrupt):
                assert fault.struck
        hold()
        if not fault.struck:
            return steps
    raise AssertionError("more than 100 steps")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", FAULTS)
def test_a_reset_struck_between_any_two_steps_loses_nothing(
    clone: Path, error: BaseException, after: bool
) -> None:
    numbers = itertools.count()
    typed: list[str] = []

    def arrange() -> None:
        workspace.prepare()
        if (
            own(clone).read_text() in typed
        ):  # an earlier reset was struck before it moved this one: typed over here
            typed.remove(own(clone).read_text())
        typed.append(f"answer {next(numbers)}")
        own(clone).write_text(typed[-1])

    def hold() -> None:
        assert set(typed) <= set(texts(clone))
        workspace.prepare()
        assert own(clone).read_text() in ("first version", typed[-1])
        assert not list(clone.rglob("*.partial"))

    steps = strike_at_each_step(
        error, after=after, arrange=arrange, act=lambda: workspace.reset(LESSON), hold=hold
    )
    assert steps >= 5, "flush, two moves of a link and a removal each"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", FAULTS)
def test_a_first_copy_struck_between_any_two_steps_is_finished_by_the_next(
    clone: Path, error: BaseException, after: bool
) -> None:
    def arrange() -> None:
        subprocess.run(["rm", "-rf", str(clone / "work")], check=True)

    def hold() -> None:
        if own(clone).exists():
            assert own(clone).read_text() == "first version", "half a notebook"
        workspace.prepare()
        assert own(clone).read_text() == "first version"
        assert visible(clone) == {f"{LESSON}.ipynb", f"{LESSON}.zh.ipynb"}

    steps = strike_at_each_step(error, after=after, arrange=arrange, act=workspace.prepare, hold=hold)
    assert steps >= 3 * 4, "three lessons: flush, link, removal, and the record's flush and move"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", FAULTS)
def test_an_offer_struck_between_any_two_steps_leaves_the_learners_own(
    clone: Path, error: BaseException, after: bool
) -> None:
    round_number = 0

    def arrange() -> None:
        nonlocal round_number
        round_number += 1
        workspace.prepare()
        own(clone).write_text("my answer")
        publish(clone, f"{LESSON}/{LESSON}.ipynb", f"version {round_number}")

    def hold() -> None:
        assert own(clone).read_text() == "my answer"
        workspace.prepare()
        assert f"version {round_number}" in texts(clone)

    strike_at_each_step(error, after=after, arrange=arrange, act=workspace.prepare, hold=hold)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", FAULTS)
def test_progress_struck_between_any_two_steps_keeps_every_earlier_entry(
    clone: Path, error: BaseException, after: bool
) -> None:
    workspace.prepare()
    workspace.record("earlier", "right", 3, 3, place=clone / "work")

    def act() -> None:
        note = workspace.record("now", "wrong", 0, 3, place=clone / "work")
        assert note is None or "Progress was not saved" in note

    def hold() -> None:
        entries, note = workspace.progress()
        assert note is None
        assert entries["earlier"].best_points == 3

    assert strike_at_each_step(error, after=after, arrange=lambda: None, act=act, hold=hold) >= 2


def test_a_disk_that_fills_up_while_writing_loses_nothing_and_says_so(clone: Path) -> None:
    publish(clone, f"{LESSON}/{LESSON}.ipynb", "x" * 100_000)
    workspace.prepare()
    own(clone).write_text("my answer")
    # A limit on the size of files stops the write half-way, as a full disk does; in a process of its own.
    program = f"""
        import resource
        from pathlib import Path
        from llmcourse import workspace
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        workspace.PACKAGE = Path({str(clone / "llmcourse")!r})
        try:
            workspace.reset("01")
        except workspace.WorkspaceError as error:
            print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=WITH_PACKAGE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in done.stdout
    assert own(clone).read_text() == "my answer"
    assert visible(clone) == {f"{LESSON}.ipynb", f"{LESSON}.zh.ipynb"}


def test_a_workspace_that_cannot_be_made_is_one_clear_line(clone: Path) -> None:
    (clone / "work").write_text("a file where the folder should be")
    with pytest.raises(WorkspaceError, match=r"expected to read and write .*work.*LLMCOURSE_WORKSPACE"):
        workspace.prepare()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write everywhere; the injected faults stand in",
)
def test_a_read_only_workspace_is_one_clear_line(clone: Path) -> None:
    workspace.prepare()
    (clone / "work").chmod(0o555)
    (clone / "work" / ".lock").chmod(0o444)
    assert "Progress was not saved" in (workspace.record("x", "right", 1, 1, place=clone / "work") or "")
    with pytest.raises(WorkspaceError, match="writable"):
        workspace.reset("01")


# ------------------------------------------------------------------------------------------------------ progress


def test_progress_keeps_the_best_points_and_the_first_solution(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare()
    times = iter(["09:00", "09:10", "09:20", "09:30"])
    monkeypatch.setattr(workspace, "_now", lambda: next(times))
    attempts = [("wrong", 0.0), ("right", 2.0), ("right", 3.0), ("crashed", 0.0)]
    for verdict, points in attempts:
        assert workspace.record("f", verdict, points, 3, lesson=LESSON, place=clone / "work") is None
    entries, note = workspace.progress()
    assert note is None
    assert entries["f"] == workspace.ExerciseProgress(
        attempts=4,
        best_points=3.0,
        max_points=3,
        last_verdict="crashed",
        first_tried="09:00",
        last_tried="09:30",
        first_solved="09:10",
        lesson=LESSON,
    )


@pytest.mark.parametrize("place", ["solutions", "notebooks", "."])
def test_work_outside_the_workspace_leaves_no_progress(
    clone: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    workspace.prepare()
    monkeypatch.chdir(clone / place)
    assert workspace.record("f", "right", 3, 3) is None
    assert workspace.progress() == ({}, None)


def test_a_check_in_a_notebook_is_recorded_from_its_folder(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare()
    monkeypatch.chdir(own(clone).parent)
    workspace.record("f", "right", 3, 3)
    assert workspace.progress()[0]["f"].attempts == 1


def entry_with(**changes: object) -> bytes:
    entry = {
        "attempts": 1,
        "best_points": 1.0,
        "max_points": 3.0,
        "last_verdict": "wrong",
        "first_tried": "",
        "last_tried": "",
        "first_solved": None,
        "lesson": None,
    }
    return json.dumps({"version": 1, "exercises": {"f": entry | changes}}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"version": 1, "exerc', id="truncated"),
        pytest.param(b"\xff\xfe\x00", id="not text"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'{"version": 0, "exercises": {}}', id="another version"),
        pytest.param(b'{"version": 1, "exercises": {"f": 3}}', id="not an entry"),
        pytest.param(entry_with(attempts="1"), id="a count as text"),
        pytest.param(entry_with(attempts=True), id="a truth value as count"),
        pytest.param(entry_with(best_points=float("nan")), id="NaN points"),
        pytest.param(entry_with(surplus=1), id="an unknown field"),
    ],
)
def test_a_damaged_progress_file_is_kept_under_a_dated_name(clone: Path, damage: bytes) -> None:
    workspace.prepare()
    path = clone / "work" / "progress.json"
    path.write_bytes(damage)
    entries, note = workspace.progress()
    assert entries == {} and note is not None and "is damaged" in note
    assert path.read_bytes() == damage, "looking changes nothing"
    note = workspace.record("f", "right", 3, 3, place=clone / "work")
    assert note is not None and "kept as progress.damaged-" in note
    (aside,) = (clone / "work").glob("progress.damaged-*.json")
    assert aside.read_bytes() == damage
    assert workspace.progress()[0]["f"].attempts == 1


def test_the_undamaged_entry_of_these_tests_is_accepted(clone: Path) -> None:
    workspace.prepare()
    (clone / "work" / "progress.json").write_bytes(entry_with())
    assert workspace.progress()[0]["f"].best_points == 1.0


def test_progress_of_a_later_program_is_left_alone(clone: Path) -> None:
    workspace.prepare()
    path = clone / "work" / "progress.json"
    path.write_text('{"version": 2, "exercises": {}}')
    with pytest.raises(WorkspaceError, match="git pull"):
        workspace.progress()
    assert "later llmcourse" in (workspace.record("f", "right", 3, 3, place=clone / "work") or "")
    assert path.read_text() == '{"version": 2, "exercises": {}}'


def test_two_processes_that_record_at_once_lose_no_entry(clone: Path) -> None:
    workspace.prepare()
    program = f"""
        import sys
        from pathlib import Path
        from llmcourse import workspace
        workspace.PACKAGE = Path({str(clone / "llmcourse")!r})
        workspace.LOCK_WAIT_S = 600
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(40):
            assert workspace.record("shared", "wrong", number, 40) is None
            assert workspace.record(f"own {{sys.argv[1]}} {{number}}", "right", 1, 1) is None
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with_pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "cwd": clone / "work" / LESSON,
    }
    both = [subprocess.Popen([*command, str(which)], env=WITH_PACKAGE, **with_pipes) for which in range(2)]  # type: ignore[call-overload]
    for process in both:
        process.stdout.readline()
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait() for process in both] == [0, 0]
    entries, _ = workspace.progress()
    assert len(entries) == 81
    assert entries["shared"].attempts == 80


def test_a_lock_that_is_not_given_back_is_a_note_and_an_error(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.prepare()
    monkeypatch.setattr(workspace, "LOCK_WAIT_S", 0.0)
    with workspace._locked(clone / "work"):
        assert "another process has held" in (
            workspace.record("f", "right", 3, 3, place=clone / "work") or ""
        )
        with pytest.raises(WorkspaceError, match="another process has held"):
            workspace.reset("01")
    assert workspace.record("f", "right", 3, 3, place=clone / "work") is None


def test_random_histories_never_lose_an_answer(clone: Path, seed: int) -> None:
    """Edits, releases, resets, labs and deletions in any order: whatever was typed lies in some file."""
    draw = random.Random(seed)
    typed: set[str] = set()
    workspace.prepare()
    for step in range(60):
        action = draw.choice(["type", "type in offer", "release", "reset", "lab", "forget"])
        if action == "type" and own(clone).exists():
            typed.discard(own(clone).read_text())
            own(clone).write_text(f"answer {step}")
            typed.add(f"answer {step}")
        elif action == "type in offer" and own(clone, ".new").exists():
            typed.discard(own(clone, ".new").read_text())
            own(clone, ".new").write_text(f"answer {step}")
            typed.add(f"answer {step}")
        elif action == "release":
            publish(clone, f"{LESSON}/{LESSON}.ipynb", f"version {step}")
        elif action == "reset":
            workspace.reset(LESSON)
        elif action == "lab":
            workspace.prepare()
        elif action == "forget":
            (clone / "work" / ".copies.json").unlink(missing_ok=True)
        assert typed <= set(texts(clone)), action
