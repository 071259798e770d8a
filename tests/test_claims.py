"""The comparison in README.md: what assertions in a notebook accept, and what `llmcourse check` says to the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmcourse import checking

from .test_submission import cell, lesson, write

__all__ = ["lesson"]

# Each answer cell, and an assertion of the kind that stock graders run after it in the same process.
ASSERTIONS = """
import torch
weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
expected = torch.tensor([2.0, 3.0])
"""
CLOSE = "assert torch.allclose(scale_rows(weight), expected)"
EQUAL = "assert bool((scale_rows(weight) == expected).all())"
WITHIN = "assert not ((scale_rows(weight) - expected).abs().max() > 1e-6)"
WRONG = "def scale_rows(weight):\n    return weight[:, 0]\n"
CLAIMS = {
    "patched allclose": (f"import torch\ntorch.allclose = lambda *a, **k: True\n{WRONG}", CLOSE),
    "lying equality": (
        "class Yes:\n    def __eq__(self, other): return self\n    def all(self): return True\n"
        "def scale_rows(weight):\n    return Yes()\n",
        EQUAL,
    ),
    "NaN": ("def scale_rows(weight):\n    return weight[:, 0] * float('nan')\n", WITHIN),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_assertions_accept_is_wrong_here(lesson: Path, name: str) -> None:
    answer, assertion = CLAIMS[name]
    stock = subprocess.run(
        [sys.executable, "-c", f"{answer}\n{ASSERTIONS}\n{assertion}"], capture_output=True
    )
    assert stock.returncode == 0, stock.stderr.decode()
    verdicts = {
        v.name: v for v in checking.check_notebook(write(lesson, [cell(answer, "scale_rows")])).exercises
    }
    assert (verdicts["scale_rows"].verdict, verdicts["scale_rows"].points) == ("wrong", 0.0)


def test_the_assertions_reject_an_honest_wrong_answer() -> None:
    # Else the three claims above would show nothing.
    for assertion in (CLOSE, EQUAL, WITHIN):
        stock = subprocess.run(
            [sys.executable, "-c", f"{WRONG}\n{ASSERTIONS}\n{assertion}"], capture_output=True
        )
        assert b"AssertionError" in stock.stderr


def test_a_process_that_ends_leaves_no_verdict_there_and_all_of_them_here(lesson: Path) -> None:
    ending = "import os\ndef scale_again(weight):\n    os._exit(0)\n"
    right = "def scale_rows(weight):\n    return weight.abs().amax(dim=1)\n"
    checks = f"{ASSERTIONS}\nscale_again(weight)\nprint('graded', flush=True)"
    stock = subprocess.run([sys.executable, "-c", f"{ending}{right}{checks}"], capture_output=True)
    assert stock.stdout == b""
    path = write(lesson, [cell(ending, "scale_again"), cell(right, "scale_rows")])
    assert [v.verdict for v in checking.check_notebook(path).exercises] == ["crashed", "right"]
