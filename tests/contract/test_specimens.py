"""Six awkward exercises that the contract must carry: each proven by the audit, and judged alike in both ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmcourse import services
from llmcourse.auditing import AuditReport, ExerciseAudit, audit, audit_exercise
from llmcourse.engine import Answer, Engine
from llmcourse.exercise import Exercise, find
from llmcourse.finding import exercise_paths
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
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def specimens_folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCOURSE_LESSONS", str(HERE))
        # No answer here receives in one thread while another computes, so a deadlock is plain at once.
        patch.setattr(services, "DEADLOCK_S", 0.02)
        yield


@pytest.fixture(params=SPECIMENS)
def specimen(request: pytest.FixtureRequest) -> Exercise:
    return find(request.param)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(preload=("torch._dynamo",)) as started:
        yield started


@pytest.fixture(scope="module")
def whole() -> AuditReport:
    """The audit of all six over fresh seeds, with every mutant."""
    return audit(["specimens"])


def assert_proven(found: ExerciseAudit, seeds: Sequence[int]) -> None:
    specimen = found.exercise
    assert found.problems == [], f"seeds {seeds}"
    assert found.killed == found.recognised == len(specimen.mistakes) >= 7
    assert found.accepted == len(specimen.alternatives) >= 2
    assert found.solution_points == specimen.points and found.stub_points == 0


def test_every_specimen_of_the_folder_is_tested():
    here = [name for name, path in exercise_paths().items() if path.parent == HERE / "specimens"]
    assert sorted(here) == sorted(SPECIMENS)


def test_the_audit_finds_nothing_wrong_over_three_fresh_seeds(engine, specimen, seed):
    seeds = range(seed, seed + 3)
    found = audit_exercise(engine, specimen, seeds, SAMPLED_MUTANTS)
    assert_proven(found, seeds)
    assert found.mutants == SAMPLED_MUTANTS == found.mutants_killed + found.excused


@pytest.mark.slow
def test_every_mechanical_mutant_dies_or_is_excused(whole, specimen):
    found = next(one for one in whole.exercises if one.exercise is specimen)
    assert_proven(found, whole.seeds)
    assert found.mutants_killed + found.excused == found.mutants > 10
    assert found.excused == len(specimen.excuses)


def as_a_learner(exercise: Exercise, name: str) -> Answer:
    """Our answer as a notebook would hand it in: untrusted, everything it needs in its cell."""
    handed_in = f"{exercise.source}\n{exercise.name} = {name}\n"
    return Answer(exercise.name, (("cell", handed_in),), own="cell")


def test_the_reference_and_a_named_mistake_get_the_same_verdict_in_and_out_of_process(engine, specimen, seed):
    inside = InProcess()
    outside_expected, inside_expected = engine.expected(specimen, seed), expectations(inside, specimen, seed)
    for name in (specimen.name, SPECIMENS[specimen.name]):
        outside = judge(engine, specimen, as_a_learner(specimen, name), seed, outside_expected)
        here = judge(inside, specimen, inside.ours(specimen, name), seed, inside_expected)
        assert outside.to_json() == here.to_json()
        if name == specimen.name:
            assert (outside.verdict, outside.points) == ("right", specimen.points)
        else:
            assert [mistake.name for mistake in outside.mistakes] == [name]
            assert outside.points < specimen.points
