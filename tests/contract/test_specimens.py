"""Six awkward exercises that the contract must carry: each proven by the audit, and judged alike in both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcourse import auditing, services
from llmcourse.engine import Answer, Engine
from llmcourse.exercise import exercise_paths, find
from llmcourse.judging import InProcess, expectations, judge

# A wrong answer of each, which its report must name: among them one that fails by a count alone (GridRound), one
# found only after a resume (RowAdam), one that leaves no wrong number anywhere (replace_file), and a deadlock.
SPECIMENS = {
    "AdaptedLinear": "LeavesTheWeightBehind",
    "RowAdam": "ForgetsOnResume",
    "GridRound": "KeepsIntermediates",
    "sample_ranking": "shared_noise",
    "replace_file": "renamed_too_early",
    "mean_scatter": "receives_first",
}
SAMPLED_MUTANTS = 3


@pytest.fixture(scope="module")
def engine():
    with Engine(preload=("torch._dynamo",)) as started:
        yield started


@pytest.fixture(params=SPECIMENS)
def specimen(request, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(Path(__file__).parent))
    # No answer here receives in one thread while another computes, so a deadlock is plain at once.
    monkeypatch.setattr(services, "DEADLOCK_S", 0.02)
    return find(request.param)


def audited(engine, specimen, seed, mutants):
    found = auditing.audit_exercise(engine, specimen, range(seed, seed + auditing.MIN_SEEDS), mutants)
    assert found.problems == []
    e = specimen
    assert found.killed == found.recognised == len(e.mistakes) >= 7
    assert found.accepted == len(e.alternatives) >= 2
    assert found.solution_points == e.points and found.stub_points == 0
    return found


def test_every_specimen_of_the_folder_is_tested(monkeypatch):
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(Path(__file__).parent))
    here = [
        name for name, path in exercise_paths().items() if path.parent == Path(__file__).parent / "specimens"
    ]
    assert sorted(here) == sorted(SPECIMENS)


def test_the_audit_finds_nothing_wrong_over_three_fresh_seeds(engine, specimen, seed):
    found = audited(engine, specimen, seed, SAMPLED_MUTANTS)
    assert found.mutants == SAMPLED_MUTANTS == found.mutants_killed + found.excused


@pytest.mark.slow
def test_every_mechanical_mutant_dies_or_is_excused(engine, specimen, seed):
    found = audited(engine, specimen, seed, None)
    assert found.mutants_killed + found.excused == found.mutants > 10
    assert found.excused == len(specimen.excuses)


def as_a_learner(exercise, name):
    """Our answer as a notebook would hand it in: without the reference, untrusted, everything it needs in its cell."""
    text = exercise.source
    handed_in = f"{text}\n{exercise.name} = {name}\n"
    return Answer(exercise.name, (("cell", handed_in),), own="cell")


def test_the_reference_and_a_named_mistake_get_the_same_verdict_in_and_out_of_process(engine, specimen, seed):
    expected_outside = engine.expected(specimen, seed)
    inside = InProcess()
    expected_inside = expectations(inside, specimen, seed)
    for name in (specimen.name, SPECIMENS[specimen.name]):
        outside = judge(engine, specimen, as_a_learner(specimen, name), seed, expected_outside)
        here = judge(inside, specimen, inside.ours(specimen, name), seed, expected_inside)
        assert outside.to_json() == here.to_json()
        if name == specimen.name:
            assert (outside.verdict, outside.points) == ("right", specimen.points)
        else:
            assert [mistake.name for mistake in outside.mistakes] == [name]
            assert outside.points < specimen.points
