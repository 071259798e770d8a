"""The autograded notebook is the teacher's: only text of a student's gets in, and none of it acts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from nbgrader.utils import compute_checksum, determine_grade

from llmcourse.graded import Graded
from llmcourse.rebuilding import MAX_HELPER_CHARS, MAX_NOTES, MAX_SHOWN_CHARS, fenced, readable, rebuild
from tests.graded_samples import exercise, graded, teacher

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
HOSTILE = (
    "<script>alert(1)</script>",
    "</pre></code></div><script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](attachment:missing.png)",
    "```mermaid\n</pre><script>alert(1)</script>\n```",
    "~~~mermaid\n<img src=x onerror=alert(1)>\n~~~",
    "```\n<script>alert(1)</script>",
    "````````\n<script>alert(1)</script>\n````````",
    "$$<script>alert(1)</script>$$ \\begin{a}<script>\\end{a}",
    "\n\n<iframe src='https://example.org'></iframe>\n\n",
    "`</code><script>alert(1)</script>",
    "a`b`c`<img src=x onerror=alert(1)>",
    "<https://example.org> https://example.org",
)


def by_name(notebook: NotebookNode) -> dict[str, NotebookNode]:
    return {each.metadata.nbgrader.grade_id: each for each in notebook.cells if "nbgrader" in each.metadata}


class Tags(HTMLParser):
    """Names of the tags in a page and of their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.found |= {tag, *(f"@{name}" for name, _ in attrs)}


def test_the_teachers_cells_come_in_order_with_the_students_text_in_the_answer_cells_only() -> None:
    released, record = teacher(), graded(answers={**graded().answers, "check_scale": "0", "intro": "mine"})
    rebuilt = rebuild(released, record)
    assert [each.id for each in rebuilt.cells if not each.id.startswith("helper")] == [
        each.id for each in released.cells
    ]
    answers = {"scale": "def scale(x):\n    return x", "pack": "def pack(x):\n    return HELP"}
    expected = (
        {each.id: each.source for each in released.cells} | answers | {"essay": "```\nBytes first.\n```"}
    )
    assert {each.id: each.source for each in rebuilt.cells if each.id in expected} == expected


def test_a_helper_stands_before_the_answer_cell_it_belongs_to_and_the_rest_at_the_end() -> None:
    record = graded(
        helpers=(("cell 3", "HELP = 1", "pack"), ("cell 4", "MORE = 1", "pack"), ("cell 9", "LAST = 2", ""))
    )
    cells = rebuild(teacher(), record).cells
    ids = [each.id for each in cells]
    assert ids[ids.index("pack") - 2 : ids.index("pack")] == ["helper-1", "helper-2"]
    assert ids[-1] == "helper-3"
    assert cells[ids.index("helper-1")].source == "# cell 3 of the submission\nHELP = 1"
    assert all(
        each.cell_type == "code" and not each.metadata for each in cells if each.id.startswith("helper")
    )


@pytest.mark.parametrize("points", [0, 0.1, 1 / 3, 2, 3.999999, 6])
@pytest.mark.parametrize("worth", [0.3, 3, 7])
def test_nbgrader_reads_the_score_on_the_teachers_scale(points: float, worth: float) -> None:
    released = teacher()
    by_name(released)["check_scale"].metadata.nbgrader.points = worth
    check = by_name(rebuild(released, graded(exercises=(exercise("scale", points, 6),))))["check_scale"]
    score, highest = determine_grade(check)
    assert score == points / 6 * worth
    assert highest == worth and (score == worth) == (points == 6)


def test_a_report_is_shown_under_each_check_and_nothing_under_any_other_cell() -> None:
    released = teacher()
    for each in released.cells:
        if each.cell_type == "code":
            each.outputs = [nbformat.v4.new_output("stream", name="stderr", text="left over")]
    rebuilt = rebuild(released, graded())
    shown = {each.id: each.outputs for each in rebuilt.cells if each.get("outputs")}
    assert {*shown} == {"check_scale", "check_pack", "check_extra"}
    assert {name: outputs[0].data["text/plain"] for name, outputs in shown.items()} == {
        "check_scale": "2.0",
        "check_pack": "3.0",
        "check_extra": "2.0",
    }
    assert all("llmcourse-report" in outputs[0].data["text/html"] for outputs in shown.values())


def test_an_exercise_that_the_record_lacks_has_no_output_and_an_answer_that_it_lacks_stays_the_stub() -> None:
    released = teacher()
    cells = by_name(rebuild(released, graded(exercises=(exercise("pack"),), answers={})))
    assert cells["check_scale"].outputs == [] and cells["check_pack"].outputs != []
    for name in ("scale", "pack", "essay"):
        assert cells[name].source == by_name(released)[name].source
        assert compute_checksum(cells[name]) == cells[name].metadata.nbgrader.checksum


def test_an_answer_that_is_the_stub_is_known_as_one() -> None:
    stubs = {name: each.source for name, each in by_name(teacher()).items()}
    cells = by_name(rebuild(teacher(), graded(answers=stubs)))
    assert determine_grade(cells["essay"]) == (0, 2)
    assert determine_grade(by_name(rebuild(teacher(), graded()))["essay"]) == (None, 2)


def test_the_result_is_valid_deterministic_and_leaves_the_teachers_notebook_alone() -> None:
    released = teacher()
    before = nbformat.writes(released)
    texts = [nbformat.writes(rebuild(released, graded(notes=("a note",)))) for _ in range(2)]
    nbformat.validate(nbformat.reads(texts[0], as_version=4))
    assert texts[0] == texts[1]
    assert nbformat.writes(released) == before


def test_ids_stay_apart_from_the_teachers() -> None:
    released = teacher()
    released.cells[0].id = "helper-1"
    ids = [each.id for each in rebuild(released, graded()).cells]
    assert len(ids) == len({*ids})


def test_any_text_can_be_written_and_read_again() -> None:
    text = "x = 1\x00\x1b[31m\ud800\udfff\x7f\x9b\ufffe \u2028é✓😀\r\ny = 2\rz\tw"
    record = graded(
        answers={"scale": text, "essay": text},
        helpers=((text, text, "scale"),),
        notes=(text,),
        refused=text,
        exercises=(),
    )
    rebuilt = rebuild(teacher(), record)
    raw = nbformat.writes(rebuilt).encode("utf-8")
    json.loads(raw)
    again = nbformat.reads(raw.decode(), as_version=4)
    nbformat.validate(again)
    assert (
        by_name(again)["scale"].source
        == "x = 1\u2400\u241b[31m\ufffd\ufffd\u2421\ufffd\ufffd \u2028é✓😀\ny = 2\nz\tw"
    )


def test_a_report_is_written_whatever_it_quotes() -> None:
    quoting = replace(exercise("scale"), html="<div style='color:red'>\ud800\x00</div>")
    check = by_name(rebuild(teacher(), graded(exercises=(quoting,))))["check_scale"]
    assert check.outputs[0].data["text/html"] == "<div style='color:red'>\ufffd\u2400</div>"


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_student_wrote_acts_when_nbgrader_renders_it(text: str) -> None:
    record = graded(
        answers={"essay": text}, notes=(text, f"cell 3: `{text}` is not run"), refused=text, helpers=()
    )
    rebuilt = rebuild(teacher(), record)
    explanation, essay = rebuilt.cells[0], by_name(rebuilt)["essay"]
    assert Tags(markdown2html(essay.source)).found == {"pre", "code"}
    allowed = {"h3", "a", "div", "p", "b", "ul", "li", "code", "@id", "@class", "@href"}
    assert Tags(markdown2html(explanation.source)).found <= allowed
    assert markdown2html(explanation.source).count("<a ") == 1, "the heading's own link"


def test_a_written_answer_is_shown_as_it_was_typed_whatever_it_holds(seed: int) -> None:
    draw = random.Random(seed)
    pieces = [
        "`",
        "```",
        "~~~",
        "\n",
        "\n\n",
        "$",
        "$$",
        "<b>",
        "</pre>",
        "&lt;",
        "\\",
        "a",
        " ",
        "\t",
        "- ",
        "mermaid",
    ]
    for _ in range(300):
        text = readable("".join(draw.choices(pieces, k=12)) + "end")
        shown = markdown2html(fenced(text))
        assert shown.startswith("<pre><code>") and shown.count("<") == 4, text
        assert (
            unescape(shown.strip().removeprefix("<pre><code>").removesuffix("</code></pre>")) == text + "\n"
        )


def test_notes_and_a_refusal_are_told_at_the_top_with_code_as_code() -> None:
    record = graded(notes=("cell 3: `%pip install x` is not run", "a lone ` stays"), refused="not a notebook")
    first = rebuild(teacher(), record).cells[0]
    html = markdown2html(first.source)
    assert "<li>cell 3: <code>%pip install x</code> is not run</li>" in html
    assert "<li>a lone ` stays</li>" in html and "not a notebook" in html
    assert rebuild(teacher(), graded()).cells[0].id == "intro", "nothing to tell, no cell"


def test_a_very_long_answer_is_cut_and_says_so() -> None:
    source = by_name(rebuild(teacher(), graded(answers={"scale": "x" * (MAX_SHOWN_CHARS + 5)})))[
        "scale"
    ].source
    assert source.endswith("\n# 5 more characters are in the submitted file")


def test_more_cells_and_notes_than_anyone_reads_are_counted() -> None:
    own = tuple((f"cell {number}", "x" * (MAX_HELPER_CHARS // 3), "pack") for number in range(5))
    cells = rebuild(teacher(), graded(helpers=own, notes=("a note",) * (MAX_NOTES + 2))).cells
    assert [each.id for each in cells if each.id.startswith("helper")] == [
        f"helper-{n}" for n in (1, 2, 3, 4)
    ]
    assert "2 more cells of the student's own are in the submitted file" in cells[-1].source
    assert cells[0].source.count("a note") == MAX_NOTES and "<li>and 2 more</li>" in cells[0].source


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0[1-9]_*/*.ipynb")), ids=lambda path: path.stem)
def test_every_released_lesson_can_be_rebuilt(path: Path) -> None:
    released = nbformat.read(path, as_version=4)
    checks = [name for name in by_name(released) if name.startswith("check_")]
    names = [name.removeprefix("check_") for name in checks]
    record = Graded(
        "anna",
        "a",
        "k",
        exercises=tuple(exercise(name, 1, 2) for name in names),
        answers={name: f"{name} = 1" for name in names},
        notes=("a note",),
    )
    rebuilt = rebuild(released, record)
    nbformat.validate(rebuilt)
    cells = by_name(rebuilt)
    assert names
    for check, name in zip(checks, names, strict=True):
        assert cells[name].source == f"{name} = 1"
        grader = cells[check].metadata.nbgrader
        assert float(cells[check].outputs[0].data["text/plain"]) == (grader.points / 2 if grader.grade else 1)
