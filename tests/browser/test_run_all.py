"""Every lesson as its reader sees it: Run All of the worked notebook, every report green, every widget moves."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import ARTIFACTS, REPOSITORY, Lab

pytestmark = pytest.mark.browser

LESSONS = sorted((REPOSITORY / "solutions").glob("*/*.ipynb"))
LIMIT_MS = 300_000
PAGE_PIXELS = 6_000
BEGUN = """
() => document.querySelector('.jp-Dialog') || [...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')]
  .some(one => /\\[[\\d*]+\\]/.test(one.textContent))
"""
FINISHED = """
() => {
  const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
  return prompts.length > 0 && prompts.every(one => /\\[\\d+\\]/.test(one.textContent))
}
"""


def without_outputs(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return notebook


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_worked_lesson_runs_from_top_to_bottom(page: Any, lab: Lab, path: Path) -> None:
    place = lab.work / "worked" / path.name
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(without_outputs(path)), encoding="utf-8")
    shutil.rmtree(ARTIFACTS / path.stem, ignore_errors=True)
    # A workspace of its own: the notebooks of other tests stay out of this page.
    page.goto(f"{lab.address}/lab/workspaces/{path.stem}/tree/worked/{path.name}?token={lab.token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(timeout=LIMIT_MS)
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for(timeout=LIMIT_MS)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
    page.wait_for_function(BEGUN, timeout=LIMIT_MS)
    if page.locator(".jp-Dialog .jp-mod-accept").count():  # the lab asks where its session was not ready yet
        page.locator(".jp-Dialog .jp-mod-accept").click()
    page.wait_for_function(FINISHED, timeout=LIMIT_MS)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(timeout=LIMIT_MS)

    photograph(page, path.stem)
    move_every_widget(page, json.loads(path.read_text(encoding="utf-8")))
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    verdicts = [one.get_attribute("data-verdict") for one in page.locator(".llmcourse-report").all()]
    assert verdicts == re.findall(r"data-verdict='([^']+)'", path.read_text(encoding="utf-8"))


def move_every_widget(page: Any, notebook: dict[str, Any]) -> None:
    """The first slider of each cell that shows a widget, moved until its picture is another."""
    shown = [
        one for one in notebook["cells"] if re.search(r"^widgets\.", "".join(one["source"]), re.MULTILINE)
    ]
    cells = page.locator(".jp-Notebook .jp-CodeCell", has=page.locator(".noUi-handle"))
    assert cells.count() == len(shown)
    for place in range(len(shown)):
        target = cells.nth(place)
        picture = target.locator("img").first
        picture.wait_for()
        before = picture.get_attribute("src")
        target.locator(".noUi-handle").first.focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "([cell, before]) => { const i = cell.querySelector('img'); return i && i.src && i.src !== before }",
            arg=[target.element_handle(), before],
        )


def photograph(page: Any, name: str) -> None:
    """The whole notebook in pictures of PAGE_PIXELS each, in a folder of artifacts/."""
    folder = ARTIFACTS / name
    folder.mkdir(parents=True)
    before = page.viewport_size
    page.set_viewport_size({"width": before["width"], "height": PAGE_PIXELS})
    scroller = page.locator(".jp-WindowedPanel-outer").first
    height = scroller.evaluate("one => one.scrollHeight")
    shown = scroller.evaluate("one => one.clientHeight")
    for number, top in enumerate(range(0, height, shown)):
        scroller.evaluate("(one, top) => { one.scrollTop = top }", top)
        page.wait_for_timeout(300)  # milliseconds for the panel to draw
        page.screenshot(path=folder / f"{number:02}.png")
    page.set_viewport_size(before)
