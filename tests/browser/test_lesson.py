"""A learner's way through lesson 01 in JupyterLab: a wrong answer, a right one, a widget."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from llmcourse import source
from llmcourse.exercise import find

from ..peers import peer
from .conftest import ARTIFACTS, Lab

pytestmark = pytest.mark.browser

LESSON = "01_parameter_loading/01_parameter_loading.ipynb"
EXERCISE, MISTAKE = "parameter_count", "head_dim_ignored"


def cell(page: Any, text: str) -> Any:
    """The first code cell whose text contains `text`."""
    return page.locator(".jp-Notebook .jp-CodeCell").filter(has_text=text).first


def run(page: Any, target: Any) -> None:
    """Run a cell and wait until its prompt carries a number again."""
    target.locator(".cm-content").click()
    page.wait_for_timeout(200)  # milliseconds for the editor to take the focus
    page.keyboard.press("Control+Enter")
    expect = peer("playwright.sync_api").expect
    expect(target.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]"), timeout=120_000)


def write(page: Any, target: Any, text: str) -> None:
    """Replace a cell's text as a learner would: select all, type."""
    target.locator(".cm-content").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(text)


def answers() -> tuple[str, str]:
    """(a wrong answer, the right answer) as a learner would type them."""
    right = source.definition(find(EXERCISE).source, EXERCISE)
    wrong = right.replace('config.get("head_dim") or ', "")
    assert wrong != right
    return wrong, right


@pytest.fixture(scope="module")
def lesson(page: Any, lab: Lab) -> Any:
    """Lesson 01, opened from the workspace, its imports run."""
    page.goto(lab.of(LESSON))
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    # Cells run only once the kernel has answered.
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(timeout=120_000)
    for imports in ("from llmcourse import check", "from llmcourse import counting"):
        run(page, cell(page, imports))
    return page


def test_a_wrong_answer_is_named_and_a_right_one_is_praised(lesson: Any) -> None:
    exercise_cell, check_cell = cell(lesson, f"def {EXERCISE}("), cell(lesson, f"check({EXERCISE})")
    wrong, right = answers()

    write(lesson, exercise_cell, wrong)
    run(lesson, cell(lesson, f"def {EXERCISE}("))
    run(lesson, check_cell)
    report = check_cell.locator(".llmcourse-report")
    report.wait_for()
    assert report.get_attribute("data-verdict") == "wrong"
    sentence = find(EXERCISE).mistakes[MISTAKE].sentence
    assert sentence in check_cell.locator(".llmcourse-mistake").inner_text()
    check_cell.scroll_into_view_if_needed()
    lesson.screenshot(path=ARTIFACTS / "wrong_answer.png")

    write(lesson, cell(lesson, f"def {EXERCISE}("), right)
    run(lesson, cell(lesson, f"def {EXERCISE}("))
    run(lesson, check_cell)
    check_cell.locator(".llmcourse-report[data-verdict='right']").wait_for()
    points = find(EXERCISE).points
    assert f"{points:g} of {points:g} points" in check_cell.locator(".llmcourse-report").inner_text()
    check_cell.scroll_into_view_if_needed()
    lesson.screenshot(path=ARTIFACTS / "right_answer.png")


def test_a_slider_redraws_its_plot(lesson: Any) -> None:
    target = cell(lesson, "widgets.cached_layers")
    run(lesson, target)
    picture = target.locator("img").first
    picture.wait_for()
    before = picture.get_attribute("src")
    target.locator(".noUi-handle").first.focus()
    for _ in range(4):
        lesson.keyboard.press("ArrowRight")
    lesson.wait_for_function(
        "([cell, before]) => { const i = cell.querySelector('img'); return i && i.src && i.src !== before }",
        arg=[target.element_handle(), before],
    )
    target.scroll_into_view_if_needed()
    lesson.screenshot(path=ARTIFACTS / "widget.png")


def test_the_learners_work_is_saved_in_the_workspace_and_counted_as_progress(lesson: Any, lab: Lab) -> None:
    lesson.keyboard.press("Escape")
    lesson.keyboard.press("Control+S")
    expect = peer("playwright.sync_api").expect
    expect(lesson.locator(".jp-mod-dirty")).to_have_count(0)
    saved = json.loads((lab.work / LESSON).read_text(encoding="utf-8"))
    assert answers()[1] in ["".join(cell["source"]) for cell in saved["cells"]]
    progress = json.loads((lab.work / "progress.json").read_text(encoding="utf-8"))
    assert progress["exercises"][EXERCISE]["attempts"] == 2
