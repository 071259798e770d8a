"""Where races are run: what becomes of an answer that stumbles, and of points. How fast anything is, is not asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmcourse import judging, report, track
from llmcourse.engine import Answer, Engine
from llmcourse.exercise import Exercise, load
from llmcourse.judging import InProcess, Verdict, raced
from llmcourse.racing import Interval, RaceResult, Rules
from llmcourse.zygote import HarnessFault

LESSON = """
import torch
from llmcourse.exercise import case, exercise, mistake, race

@exercise(points=4, minutes=5)
def total(values):
    '''Their sum.'''
    ### BEGIN SOLUTION
    def run(x):
        return (values * x).sum()
    return run
    ### END SOLUTION

@case(total)
def weighted(answer, rng):
    '''A weighted sum.'''
    return answer(rng.integers(0, 9, 5))(3)

def one(rng):
    return rng.integer(1, 9)

def by_hand(values):
    def run(x):
        return torch.tensor(sum(int(value) * x for value in values))
    return run

@race(total, inputs=one, baseline=by_hand, share=1 / 4)
def many_values(answer, rng):
    '''A sum of 20,000 values.'''
    return answer(rng.integers(0, 9, 20_000))
"""
GOOD = "def total(values):\n    return lambda x: (values * x).sum()"


@pytest.fixture(scope="module")
def total(tmp_path_factory: pytest.TempPathFactory) -> Exercise:
    path: Path = tmp_path_factory.mktemp("lesson") / "numbers" / "total.py"
    path.parent.mkdir()
    path.write_text(LESSON, encoding="utf-8")
    return load(path)


@pytest.fixture(scope="module")
def engine():
    with Engine() as started:
        yield started


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "RULES", Rules(looks=(16,)))


def answer(text: str) -> Answer:
    return Answer("total", (("cell", text),), own="cell")


def test_a_right_answer_is_raced_in_workers_and_in_this_process(total, engine):
    for runner, contender in ((engine, answer(GOOD)), (InProcess(), total.reference)):
        result = runner.race(total, contender, 1)
        assert result.rounds == 16
        assert {len(laps) for laps in result.seconds.values()} == {16}
        assert result.against_baseline is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def total(values):\n    return lambda x: (values * x).sum() + (x > 5)", "expected"),
        ("def total(values):\n    return lambda x: 1 / 0", "ZeroDivisionError"),
        ("def total(values):\n    return 3", "'int' object is not callable"),
        ("import os\ndef total(values):\n    return lambda x: os._exit(0)", "exit status 0"),
        (f"import os\nos._exit(3)\n{GOOD}", "while it was loaded again: exit status 3"),
        (
            "def total(values):\n    if len(values) > 5:\n        raise ValueError('large')",
            "ValueError: large",
        ),
    ],
    ids=["wrong", "raises", "no run", "dies", "dies when it is loaded again", "set-up raises"],
)
def test_an_answer_that_stumbles_fails_its_race(total, engine, text, reason):
    result = engine.race(total, answer(text), 1)
    assert result.verdict == "failed"
    assert reason in result.reason


def test_a_lap_has_an_end(total, engine, monkeypatch):
    monkeypatch.setattr("llmcourse.engine.LAP_LIMIT_S", 0.2)
    text = "def total(values):\n    def run(x):\n        while True:\n            pass\n    return run"
    result = engine.race(total, answer(text), 1)
    assert (result.verdict, "ran for more" in result.reason) == ("failed", True)


def test_a_baseline_that_fails_is_our_fault(total, engine):
    broken = replace(total, race=replace(total.race, baseline=len))
    with pytest.raises(HarnessFault, match="baseline"):
        engine.race(broken, answer(GOOD), 1)


def test_the_contenders_do_not_know_the_inputs(total, engine):
    """What the setup could compute from its own seed would be an answer that knows every lap beforehand."""
    text = (
        "import sys\nfrom llmcourse.exercise import Rng\n"
        "def total(values):\n"
        "    frame = sys._getframe(1)\n"
        "    while 'rng' not in frame.f_locals:\n"
        "        frame = frame.f_back\n"
        "    guess = Rng(frame.f_locals['rng'].generator.initial_seed(), 0)\n"
        "    first = [guess.integer(1, 9) for _ in range(400)]\n"
        "    seen = []\n"
        "    def run(x):\n"
        "        seen.append(x)\n"
        "        if len(seen) == 19 and any(first[i:i + 19] == seen for i in range(300)):\n"
        "            raise ValueError('known')\n"
        "        return (values * x).sum()\n"
        "    return run"
    )
    assert "known" not in engine.race(total, answer(text), 1).reason


# --------------------------------------------------------------------------------------------------------- points


def ended(verdict: str) -> RaceResult:
    pair = Interval(2.0, 1.9, 2.1)
    laps = {"baseline": (4e-3,), "reference": (2e-3,), "answer": (2e-3,), "no-op": (1e-4,)}
    return RaceResult(verdict, "for a reason", 0.75, 1, pair, pair, pair, 1.7, laps, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "word", "points"),
    [
        ("passed", "right", 4),
        ("shown", "right", 4),
        ("failed", "right", 3),
        ("inconclusive", "inconclusive", 3),
    ],
)
def test_a_race_takes_its_share_and_nothing_else(total, verdict, word, points):
    right = Verdict(total, "total", 4, 4, "right", "all cases agree")
    found = raced(right, total.race, ended(verdict))
    assert (found.verdict, found.points) == (word, points)
    assert found.to_json()["race"]["verdict"] == verdict


def test_only_a_right_answer_is_raced(total, monkeypatch):
    monkeypatch.setattr(InProcess, "race", lambda *_: pytest.fail("raced"))
    runner = InProcess()
    expected = judging.expectations(runner, total, 1)

    def wrong(values):
        return lambda x: values.sum()

    assert judging.judge(runner, total, wrong, 1, expected).race is None
    assert judging.judge(runner, total, total.reference, 1, expected, racing=False).race is None


def test_the_report_draws_the_race(total):
    right = raced(Verdict(total, "total", 4, 4, "right", "all cases agree"), total.race, ended("failed"))
    assert "yours 2.00x the baseline [1.90, 2.10], the course's 2.00x, asked for 1.70x" in report.text(right)
    assert report.html(right).count("<rect") == 3
    fallen = replace(ended("failed"), against_baseline=None, reference_gain=None, bar=None)
    assert "for a reason" in report.html(replace(right, race=fallen))
