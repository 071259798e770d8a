"""The feedback page is nbgrader's, nothing of a student's acts in it, and stock nbgrader goes on from what we wrote."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbgrader.api import Gradebook
from nbgrader.converters import GenerateFeedback
from nbgrader.coursedir import CourseDirectory
from nbgrader.plugins import CsvExportPlugin
from traitlets.config import Config

from llmcourse import feedback
from llmcourse.gradebook import Book, Standing
from llmcourse.graded import Graded
from llmcourse.rebuilding import rebuild
from tests.graded_samples import ASSIGNMENT, NOTEBOOK, exercise, graded, teacher
from tests.test_rebuilding import HOSTILE

STANDING = Standing(
    notebook=NOTEBOOK,
    scores={
        "check_scale": (2, 4),
        "check_pack": (3, 3),
        "essay": (1.5, 2),
        "program": (0, 1),
        "task": (0, 1),
    },
    comments={"scale": "Nearly *there*.", "pack": None, "program": "No response."},
    total=6.5,
    max_total=11,
    late_penalty=0,
)


class Page(HTMLParser):
    """The text of a page by what encloses it, and every way in which it could act."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.acts: list[str] = []
        self.words = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self._inside = tag
        self.acts += [name for name, _ in attrs if name.startswith("on")]
        self.acts += [
            value for name, value in attrs if name in ("src", "href") and "javascript:" in (value or "")
        ]
        if tag in ("iframe", "img", "object", "embed", "form", "base"):
            self.acts.append(tag)

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def page(record: Graded) -> str:
    return feedback.page(rebuild(teacher(), record), STANDING)


def test_the_page_shows_the_scores_the_comments_and_the_reports() -> None:
    words = Page(page(graded())).words
    assert "demo (Score: 6.5 / 11.0)" in words
    assert "Score: 2.0 / 4.0" in words and "Score: 1.5 / 2.0" in words
    assert "Late submission penalty" not in words
    html = page(graded())
    assert "Nearly <em>there</em>." in html and "No response." in html
    assert exercise("scale").html in html and exercise("extra").html in html, "with its inline style"
    late = feedback.page(rebuild(teacher(), graded()), replace(STANDING, late_penalty=2.0))
    assert "Late submission penalty (Score: -2.0)" in Page(late).words


def test_a_page_follows_from_its_arguments_alone_and_leaves_them_as_they_are() -> None:
    rebuilt = rebuild(teacher(), graded())
    before = copy.deepcopy(rebuilt)
    first = feedback.page(rebuilt, STANDING)
    other = page(graded("bert", answers={"scale": "def scale(x):\n    return 'another'"}))
    assert "another" in other and "another" not in first
    assert feedback.page(rebuilt, STANDING) == first
    assert rebuilt == before


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_student_wrote_acts_in_the_page(text: str) -> None:
    plain = Page(page(graded(notes=("a note",), refused="a reason")))
    answers = dict.fromkeys(("scale", "essay", "program"), text)
    found = Page(page(graded(answers=answers, notes=(text,), refused=text, helpers=((text, text, "pack"),))))
    assert (found.scripts, found.acts) == (plain.scripts, plain.acts)
    assert found.words.count("".join(text.split("\n")[-1].split("`")[0].split())[:8]) >= 1


def test_a_cell_too_long_to_be_remembered_is_still_rendered() -> None:
    long = "x = 1  # " + "long " * feedback.REMEMBERED_CHARS
    assert "long long" in page(graded(answers={"scale": long, "essay": long}))


# ------------------------------------------------------------------------------------- nbgrader goes on from there


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A course with two graded submissions, one late; and our pages of them."""
    root = tmp_path_factory.mktemp("course")
    pages = {}
    config = Config({"LateSubmissionPlugin": {"penalty_method": "zero"}})
    with Book(f"sqlite:///{root}/gradebook.db", "course", config=config) as book:
        book.register(ASSIGNMENT, NOTEBOOK, teacher())
        with Gradebook(f"sqlite:///{root}/gradebook.db", "course") as theirs:
            theirs.update_or_create_assignment(ASSIGNMENT, duedate="2026-03-02 00:00:00 UTC")
        for student, day in (("anna", "01"), ("late", "03")):
            record = graded(student, 3, notes=("a note",), submitted_at=f"2026-03-{day}T12:00:00+00:00")
            rebuilt = rebuild(teacher(), record)
            pages[student] = feedback.page(rebuilt, book.write(record, rebuilt))
            folder = root / "autograded" / student / ASSIGNMENT
            folder.mkdir(parents=True)
            (folder / f"{NOTEBOOK}.ipynb").write_text(nbformat.writes(rebuilt), encoding="utf-8")
    yield root, pages


def test_nbgrader_makes_the_same_feedback_page_of_what_we_wrote(
    course: tuple[Path, dict[str, str]],
) -> None:
    root, pages = course
    config = Config(
        {"CourseDirectory": {"root": str(root), "assignment_id": ASSIGNMENT, "course_id": "course"}}
    )
    GenerateFeedback(coursedir=CourseDirectory(config=config)).start()
    for student, ours in pages.items():
        theirs = root / "feedback" / student / ASSIGNMENT / f"{NOTEBOOK}.html"
        assert shown(ours) == shown(theirs.read_text(encoding="utf-8"))
    assert "demo (Score: 6.0 / 11.0)" in pages["anna"]
    assert "demo (Score: 0.0 / 11.0)" in pages["late"] and "(Score: -6.0)" in pages["late"]


def shown(html: str) -> str:
    """A page after nbconvert's last pass, which ours leaves out."""
    return str(BeautifulSoup(html, "html.parser"))


def test_nbgrader_exports_the_same_scores(course: tuple[Path, dict[str, str]]) -> None:
    root, _ = course
    plugin = CsvExportPlugin()
    plugin.to = str(root / "grades.csv")
    with Gradebook(f"sqlite:///{root}/gradebook.db", "course") as theirs:
        plugin.export(theirs)
    rows = csv.DictReader(io.StringIO((root / "grades.csv").read_text(encoding="utf-8")))
    found = {
        row["student_id"]: (row["raw_score"], row["late_submission_penalty"], row["score"]) for row in rows
    }
    assert found == {"anna": ("6.0", "0.0", "6.0"), "late": ("6.0", "6.0", "0.0")}
