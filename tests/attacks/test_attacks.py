"""A class in which nearly everybody attacks the grader: what each earns, what is left, what becomes of neighbours."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook, SubmittedAssignment

from llmcourse.gradebook import Book
from llmcourse.grading import Course, Outcome, grade
from tests.attacks.attacks import FAST, FULL, HOSTILE, Attack, by_number
from tests.attacks.course import POINTS, WORTH, Place, build, notebook, teacher
from tests.jailed import needs_jail

pytestmark = [
    pytest.mark.attack,
    needs_jail,
]
SECRET = "CANARY-5e1f-what-no-student-may-read"
HONEST = ("00-honest", "13-zz-honest", "99-honest")  # sorted, so before, between and after
OURS = ("autograded", "feedback", ".llmcourse", "gradebook.db")


@dataclass(frozen=True)
class Class:
    """A class that was graded: where it lies, what came out, what lay there before."""

    place: Place
    outcome: Outcome
    before: dict[str, str]
    seconds: float


def digests(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """What every file, link and folder below holds, by path, without what grading itself writes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(name in parts for name in but):
            continue
        if path.is_symlink():
            found["/".join(parts)] = os.readlink(path)
        elif path.is_file():
            found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found["/".join(parts)] = str(path.stat().st_mode)
    return found


def hostile_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if HOSTILE in path.read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def hostile_files() -> list[str]:
    places = ["/", "/tmp", "/var/tmp", "/dev/shm", "/usr", "/etc", str(Path.home()), os.getcwd()]
    return [str(path) for place in places for path in Path(place).glob(f"*{HOSTILE}*")]


def canary(place: Place) -> None:
    """A gradebook that holds another assignment already, with a teacher's own score and comment."""
    address = f"sqlite:///{place.course / 'grading' / 'gradebook.db'}"
    with Book(address, ""):
        pass
    with Gradebook(address) as book:
        book.add_assignment("before")
        book.add_notebook("before", "before")
        book.add_grade_cell("one", "before", "before", max_score=5, cell_type="code")
        book.add_solution_cell("one", "before", "before")
        book.add_student("00-honest")
        book.add_submission("before", "00-honest")
        book.find_grade("one", "before", "before", "00-honest").manual_score = 4.5
        book.find_comment("one", "before", "before", "00-honest").manual_comment = "well done"
        book.db.commit()


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    """The class, graded once, also where xdist hands these tests to several processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    root, noted = shared / "attacked", shared / "attacked.json"
    with (shared / "attacked.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = Place(root, SECRET) if noted.exists() else attacked(root)
        if not noted.exists():
            noted.write_text(json.dumps(digests(root, OURS)))
        patch.setenv("LLMCOURSE_LESSONS", str(place.lessons))
        patch.setenv("LLMCOURSE_CANARY", SECRET)
        patch.setenv("HOME", str(place.home))
        began = time.monotonic()
        outcome = grade(
            Course(place.course), "A", workers=2
        )  # of a class that was graded it reads the records
        seconds = time.monotonic() - began
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield Class(place, outcome, json.loads(noted.read_text()), seconds)


def attacked(root: Path) -> Place:
    """The course before it is graded, everything handed in."""
    place = build(root, SECRET)
    (place.root / "secret.txt").write_text(SECRET)
    (place.course / "source" / "another.ipynb").write_text(json.dumps(notebook("A")))
    canary(place)
    for student in HONEST:
        place.hand_in(student, notebook("A"))
    for attack in FAST:
        made = attack.make(place, attack.student)
        if made is not None:
            place.hand_in(attack.student, made)
    return place


def told(graded: Class, attack: Attack) -> str:
    record = graded.outcome.records[attack.student]
    reasons = [f"{one.name}: {one.reason} {one.text}" for one in record.exercises]
    return "\n".join([record.refused or "", *record.notes, *reasons])


def page(graded: Class, student: str) -> str:
    path = graded.place.course / "grading" / "feedback" / student / "A" / "A.html"
    return path.read_text(encoding="utf-8")


def row(graded: Class, student: str) -> tuple[float, float, bool, dict[str, float | None]]:
    """Score, highest score, whether it waits for the teacher, and the automatic scores by cell."""
    with Gradebook(f"sqlite:///{graded.place.course / 'grading' / 'gradebook.db'}") as book:
        found: SubmittedAssignment = book.find_submission("A", student)
        scores = {grade.name: grade.auto_score for one in found.notebooks for grade in one.grades}
        return found.score, found.max_score, found.needs_manual_grade, scores


@pytest.mark.parametrize("attack", by_number(FAST), ids=lambda attack: attack.student)
def test_an_attack_earns_what_its_answers_are_worth_and_nothing_else(graded: Class, attack: Attack):
    said = told(graded, attack)
    assert "ESCAPED" not in said
    record = graded.outcome.records[attack.student]
    assert {one.name: one.points for one in record.exercises} == attack.earns, said
    assert attack.said in said and bool(record.refused) == attack.refused, said
    score, highest, waits, scores = row(graded, attack.student)
    assert (score, highest, waits) == (sum(attack.earns.values()), WORTH["A"], attack.refused)
    assert scores == {f"check_{name}": points for name, points in attack.earns.items()}


@pytest.mark.parametrize("attack", by_number(FAST), ids=lambda attack: attack.student)
def test_what_is_shown_of_an_attack_is_the_teachers_notebook_and_no_markup_of_its_own(
    graded: Class, attack: Attack
):
    path = graded.place.course / "grading" / "autograded" / attack.student / "A" / "A.ipynb"
    made = nbformat.read(path, as_version=4)
    nbformat.validate(made)
    ours = {
        cell.metadata.nbgrader.grade_id: cell for cell in teacher("A").cells if "nbgrader" in cell.metadata
    }
    theirs = {cell.metadata.nbgrader.grade_id: cell for cell in made.cells if "nbgrader" in cell.metadata}
    assert [*theirs] == [*ours]
    for name, cell in ours.items():
        assert theirs[name].metadata.nbgrader == cell.metadata.nbgrader
        if name.startswith("check_"):
            assert theirs[name].source == cell.source
            shown = theirs[name].outputs[0].data["text/plain"]
            assert float(shown) == attack.earns[name.removeprefix("check_")]
    html = page(graded, attack.student)
    assert len(html) < 3_000_000
    for markup in ("<script>alert", "<img src=x", "PREFILLED</script>", "\x1b", "\0"):
        assert markup not in html, markup


def test_honest_neighbours_keep_full_marks_and_everybody_has_a_record(graded: Class):
    assert graded.outcome.failed == {}
    assert {*graded.outcome.records} == {*HONEST, *(attack.student for attack in FAST)}
    for student in HONEST:
        assert row(graded, student)[:3] == (WORTH["A"], WORTH["A"], False)
        assert {one.reason for one in graded.outcome.records[student].exercises} == {"all cases agree"}
    assert sum(FULL.values()) == WORTH["A"] and {*FULL} < {*POINTS}


def test_nothing_of_an_attack_survives(graded: Class):
    assert hostile_processes() == []
    assert hostile_files() == []
    assert not list(graded.place.root.rglob(f"*{HOSTILE}*"))


def test_files_that_grading_does_not_write_are_what_they_were(graded: Class):
    assert digests(graded.place.root, OURS) == graded.before


def test_the_gradebook_keeps_what_it_held_and_holds_the_class_beside_it(graded: Class):
    with Gradebook(f"sqlite:///{graded.place.course / 'grading' / 'gradebook.db'}") as book:
        assert {one.name for one in book.assignments} == {"A", "before"}
        kept = book.find_submission("before", "00-honest")
        assert (kept.score, kept.notebooks[0].comments[0].manual_comment) == (4.5, "well done")
        assert {one.id for one in book.students} == {*graded.outcome.records}
        assert [one.student.id for one in book.find_assignment("before").submissions] == ["00-honest"]


def test_no_secret_is_in_anything_that_was_written(graded: Class):
    grading = graded.place.course / "grading"
    secret = (grading / ".llmcourse" / "secret").read_text()
    for kind in ("feedback", "autograded", ".llmcourse/A"):
        written = [path for path in (grading / kind).rglob("*") if path.is_file()]
        assert len(written) >= len(graded.outcome.records)
        for path in written:
            content = path.read_text(encoding="utf-8")
            assert SECRET not in content and secret not in content, path
