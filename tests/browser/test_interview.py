"""One interview in JupyterLab from start to report, with a kernel that dies on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from llmcourse import interview_plan, interview_record
from llmcourse.exercise import find
from llmcourse.interview_record import Book

from .conftest import ARTIFACTS, REPOSITORY, Lab
from .test_lesson import EXERCISE, MISTAKE, answers, run, write

pytestmark = pytest.mark.browser

LESSON, TOPIC, MINUTES = "01_parameter_loading", "parameter_loading", 13


def seed_that_draws(*items: str) -> int:
    """A seed with which a fresh workspace gives exactly these parts."""
    offered, at = [interview_plan.material(LESSON)], interview_record.now()
    for seed in range(1000):
        parts = interview_plan.draw(offered, minutes=MINUTES, book=Book(), tries={}, seed=seed, at=at)
        if {part.item for part in parts} == set(items):
            return seed
    pytest.fail(f"no seed draws {items} in {MINUTES} minutes")


@pytest.fixture(scope="module")
def taken(lab: Lab) -> Iterator[dict[str, Any]]:
    """What `llmcourse interview` says of the notebook that it has written, of a spoken question and one exercise."""
    seed = seed_that_draws(f"spoken/{TOPIC}", EXERCISE)
    forget_progress(lab)  # the draw would follow from what the modules before have tried
    arguments = ["interview", "01", "--minutes", str(MINUTES), "--seed", str(seed), "--json"]
    environment = os.environ | {"LLMCOURSE_WORKSPACE": str(lab.work)}
    command = [sys.executable, "-m", "llmcourse.cli", *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield dict(json.loads(done.stdout))
    forget_progress(lab)


def forget_progress(lab: Lab) -> None:
    for name in ("progress.json", "interviews.json"):
        (lab.work / name).unlink(missing_ok=True)


def cell(page: Any, text: str) -> Any:
    """The first code cell in whose source, not in whose output, `text` is."""
    return (
        page.locator(".jp-Notebook .jp-CodeCell").filter(has=page.locator(".cm-content", has_text=text)).first
    )


def output(page: Any, text: str, wanted: str) -> str:
    """What the cell shows once it shows `wanted`."""
    shown = cell(page, text).locator(".jp-OutputArea").filter(has_text=wanted)
    shown.wait_for()
    return str(shown.inner_text())


def end_kernels(lab: Lab) -> None:
    def ask(path: str, method: str = "GET") -> bytes:
        headers = {"Authorization": f"token {lab.token}"}
        request = urllib.request.Request(f"{lab.address}/api/{path}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    for session in json.loads(ask("sessions")):
        ask(f"sessions/{session['id']}", "DELETE")


def open_interview(page: Any, lab: Lab, taken: dict[str, Any]) -> None:
    # A layout of its own: the next module's page would else restore this notebook beside its lesson.
    page.goto(
        lab.of(f"interviews/{taken['name']}.ipynb").replace("/lab/tree/", "/lab/workspaces/interview/tree/")
    )
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    # The indicator in the notebook is idle before there is a kernel; a cell run then would ask for one.
    page.locator(".jp-StatusBar-TextItem").filter(has_text="(ipykernel) | Idle").wait_for(timeout=120_000)
    run(page, page.locator(".jp-Notebook .jp-CodeCell").first)
    run(page, cell(page, "interview.start("))


def say(page: Any, first_line: str, text: str) -> None:
    write(page, cell(page, first_line), f"{first_line}\n{text}")
    run(page, cell(page, first_line))


def test_an_interview_from_start_to_report(page: Any, lab: Lab, taken: dict[str, Any]) -> None:
    wrong, right = answers()
    open_interview(page, lab, taken)
    assert "13 minutes, from now until " in output(page, "interview.start(", "2 parts.")
    page.screenshot(path=ARTIFACTS / "interview_started.png")

    say(
        page,
        f"%%answer {TOPIC}",
        'The bound first: 70.55e9 weights × 2 bytes over "7 GB/s",\nit\'s 20 seconds.',
    )
    assert "Follow-up 1 of 1." in output(page, f"%%answer {TOPIC}", "Follow-up")
    assert "In five minutes" not in page.locator(".jp-Notebook").inner_text()

    write(page, cell(page, f"def {EXERCISE}("), wrong)
    run(page, cell(page, f"def {EXERCISE}("))
    run(page, cell(page, f"session.check({EXERCISE})"))
    cell(page, f"session.check({EXERCISE})").locator(".llmcourse-report[data-verdict='wrong']").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+S")
    page.locator(".jp-mod-dirty").first.wait_for(state="detached")

    end_kernels(lab)
    open_interview(page, lab, taken)
    standing = output(page, "interview.start(", "Going on")
    assert f"{EXERCISE}: wrong" in standing and f"question on {TOPIC}: answered, not rated" in standing

    write(page, cell(page, f"def {EXERCISE}("), right)
    run(page, cell(page, f"def {EXERCISE}("))
    run(page, cell(page, f"session.check({EXERCISE})"))
    cell(page, f"session.check({EXERCISE})").locator(".llmcourse-report[data-verdict='right']").wait_for()

    say(page, f"%%answer {TOPIC} 1", "I do not know; I would measure it.")
    assert "In five minutes" in output(page, f"%%answer {TOPIC} 1", "How would you rate that?")
    cell(page, f"%%answer {TOPIC} 1").scroll_into_view_if_needed()
    page.screenshot(path=ARTIFACTS / "interview_model_answers.png")

    write(page, cell(page, "session.rate("), f'session.rate("{TOPIC}", 2, 1, 0, 0, 0, 0)')
    run(page, cell(page, "session.rate("))
    assert "3 of 10 points" in output(page, "session.rate(", "by your own rating")

    run(page, cell(page, "session.report()"))
    report = output(page, "session.report()", "2 of 2 parts done")
    assert f"{EXERCISE}: right, " in report and "2 tries" in report and "revisit on" in report
    assert find(EXERCISE).mistakes[MISTAKE].sentence in report
    cell(page, "session.report()").scroll_into_view_if_needed()
    page.screenshot(path=ARTIFACTS / "interview_report.png")

    found = json.loads((lab.work / "interviews.json").read_text(encoding="utf-8"))
    assert found["interviews"][taken["name"]]["ended"] is not None
    assert set(found["revisits"]) == {f"spoken/{TOPIC}", EXERCISE}
