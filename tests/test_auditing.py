"""The audit finds what is wrong with an exercise: each of its problems is shown on one that was broken on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcourse.auditing import AuditReport, ExerciseAudit, audit_exercise, exercises_of
from llmcourse.engine import Engine
from llmcourse.exercise import load

SOUND = '''
import torch
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised

@exercise(points=2, minutes=5{options})
def {name}(x, limit):
    """Values beyond the limit are cut to it, with their sign."""
    ### BEGIN SOLUTION
    return x.clamp(-limit, limit)
    ### END SOLUTION

@case({name})
def some(answer, rng):
    """Some of each."""
    x, limit = rng.normal(40), rng.uniform(0.5, 1.0)
    return {{"y": answer(x, limit), "lower": answer(x[:3], limit / 2)}}

@mistake({name}, "Only the upper side is cut.")
def upper(x, limit):
    return torch.minimum(x, limit)

@mistake({name}, "Values beyond the limit become zero.")
def zeroed(x, limit):
    return torch.where(x.abs() > limit, 0.0, x)

@alternative({name}, "A minimum of a maximum")
def by_two(x, limit):
    return torch.minimum(torch.maximum(x, -limit), limit)
'''
SEEDS = (5, 6, 7)


@pytest.fixture(scope="module")
def engine():
    with Engine() as started:
        yield started


def written(folder: Path, name: str, *changes: tuple[str, str], more: str = "", options: str = ""):
    text = SOUND.format(name=name, options=options)
    for before, after in changes:
        assert before.format(name=name) in text
        text = text.replace(before.format(name=name), after.format(name=name))
    path = folder / "limits" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + more.format(name=name), encoding="utf-8")
    return load(path)


def problems(engine, exercise, most: int | None = 0) -> list[str]:
    return audit_exercise(engine, exercise, SEEDS, most).problems


def test_a_sample_of_mistakes_is_drawn_by_the_seed_and_counted(engine, tmp_path):
    exercise = written(tmp_path, "sampled")
    tried = set()
    for seed in range(6):
        found = audit_exercise(engine, exercise, [seed, seed + 1, seed + 2], 0, 1)
        assert (found.problems, found.mistakes, found.killed, found.recognised) == ([], 1, 1, 1)
        tried |= set(found.killed_by)
    assert tried == set(exercise.mistakes)


def test_a_sound_exercise_has_no_problem_and_its_numbers_say_so(engine, tmp_path):
    found = audit_exercise(engine, written(tmp_path, "cut_to_limit"), SEEDS, None)
    assert found.problems == []
    assert found.to_json() == {
        "name": "cut_to_limit",
        "lesson": "limits",
        "points": 2,
        "cases": 1,
        "mistakes": 2,
        "killed": 2,
        "recognised": 2,
        "alternatives": 1,
        "accepted": 1,
        "mutants": found.mutants,
        "mutants_killed": found.mutants,
        "excused": 0,
        "solution_points": 2,
        "stub_points": 0,
    }
    # The result dropped, the limits exchanged, a limit without its minus, no clamp at all.
    assert found.mutants == 4
    assert found.killed_by == {"upper": {"some"}, "zeroed": {"some"}}


def a_case(name: str, body: str) -> str:
    """One more case, with the exercise's name to be filled in."""
    return f"@case({{name}})\ndef {name}(answer, rng):\n    {body}\n"


RIGHT = "x.clamp(-limit, limit)"
UNTIED = """
@mistake({name}, "The lower side alone is kept.")
def again(x, limit):
    return torch.minimum(limit, x)
"""
DEARER = '''
@cost({name}, share=1/6)
def calls(answer, rng):
    """How often its input is looked at."""
    from llmcourse.counting import calls
    with calls(torch.Tensor, "clamp") as counted:
        answer(rng.normal(8), torch.tensor(1.0))
    return {{"clamps": counted.calls}}

@alternative({name}, "In a loop"{meets})
def looped(x, limit):
    return torch.stack([value.clamp(-limit, limit) for value in x])
'''
BROKEN = {
    "mistake_passes": (
        [("return torch.minimum(x, limit)", "return x.clamp(max=limit).clamp(min=-limit)")],
        "",
        "mistake upper passes on seed 5",
    ),
    "mistakes_tie": ([], UNTIED, "mistake upper is named upper, again on seed 5"),
    "fails_more_than_it_says": (
        [('cut.")', 'cut.", fails=["nothing"])')],
        a_case("nothing", "return answer(rng.normal(4), torch.tensor(0.0))"),
        "mistake upper also fails some: add to its `fails`",
    ),
    "fails_what_is_not_there": (
        [('cut.")', 'cut.", fails=["some", "nowhere"])')],
        "",
        "mistake upper: `fails` has nowhere, no item of fails_what_is_not_there",
    ),
    "alternative_rejected": (
        [("return torch.minimum(torch.maximum(x, -limit), limit)", "return x.clamp(-limit, limit).double()")],
        "",
        "alternative by_two is wrong on seed 5: Some of each. y: expected float32 [40], found float64 [40]",
    ),
    "alternative_dear": (
        [],
        DEARER.replace("{meets}", ""),
        "alternative looped is right on seed 5: right, but dearer",
    ),
    "nothing_to_prove_it_by": (
        [
            ('@mistake({name}, "Only the upper side is cut.")\n', ""),
            ('@mistake({name}, "Values beyond the limit become zero.")\n', ""),
            ('@alternative({name}, "A minimum of a maximum")\n', ""),
        ],
        "",
        "no mistake is given",
        "no alternative is given",
    ),
    "pays_the_lazy": (
        [],
        a_case("refusal", "return raised(answer, 'x', rng.integer(1, 2)) == 'x'")
        + a_case("inside", "return answer(rng.uniform(-1.0, 1.0, 4), torch.tensor(2.0))")
        + a_case("nothing", "return answer(rng.normal(4), torch.tensor(0.0))")
        + a_case("no_values", "return answer(rng.normal(0), rng.uniform(1.0, 2.0))")
        + a_case("bad", "return raised(answer, None, rng.integer(1, 2)) in ('AttributeError', 'ValueError')"),
        "lazy answer 'returns None' passes refusal",
        "lazy answer 'returns its first argument' passes refusal, inside, no_values",
        "lazy answer 'returns zeros' passes refusal, nothing",
        "lazy answer 'returns NaN' passes refusal, no_values",
        "lazy answer 'returns an empty value' passes refusal, no_values",
        "lazy answer 'raises' passes refusal, bad",
    ),
    "wrong_excuses": (
        [],
        "excuse({name}, '-limit -> limit', 'it dies')\nexcuse({name}, 'x -> y', 'no')\n",
        "excused mutant '-limit -> limit' dies; drop the excuse",
        "excused mutant 'x -> y' does not exist",
    ),
    "stub_does_something": (
        [
            (
                "    ### BEGIN SOLUTION\n",
                "    if x is None:\n        ### BEGIN SOLUTION\n        pass\n        ### END SOLUTION\n",
            ),
            (f"    return {RIGHT}\n    ### END SOLUTION", f"    return {RIGHT}"),
        ],
        "",
        "the stub is 'right' with 2.0 points; expected 'not attempted' with 0",
    ),
    "same_every_time": (
        [("rng.normal(40), rng.uniform(0.5, 1.0)", "torch.arange(-9.0, 9.0), torch.tensor(3.5)")],
        "",
        "some gives the same on every seed and is the only case",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_problem_is_found_on_an_exercise_that_has_it(engine, tmp_path, name):
    changes, more, *expected = BROKEN[name]
    found = problems(engine, written(tmp_path, name, *changes, more=more), None if "excuse" in name else 0)
    for problem in expected:
        assert any(line.startswith(problem) for line in found), found


def test_an_alternative_that_says_it_is_dear_is_accepted(engine, tmp_path):
    text = DEARER.replace("{meets}", ", meets_costs=False")
    found = problems(engine, written(tmp_path, "dear_and_honest", more=text))
    assert found == []


def test_a_mutant_that_no_case_kills_is_found_and_an_excuse_with_its_name_is_kept(engine, tmp_path):
    loose = [
        ("def {name}(x, limit):", "def {name}(x, limit, margin=0.0):"),
        (f"return {RIGHT}", f"return {RIGHT} + margin * 0.0"),
    ]
    survivor = f"{RIGHT} + margin * 0.0 -> {RIGHT} - margin * 0.0"
    found = problems(engine, written(tmp_path, "loose_end", *loose), None)
    assert f"mutant survives: {survivor!r}" in found
    excused = written(
        tmp_path, "excused_end", *loose, more=f"excuse({{name}}, {survivor!r}, 'plus and minus zero')\n"
    )
    audited = audit_exercise(engine, excused, SEEDS, None)
    assert audited.excused == 1 and f"mutant survives: {survivor!r}" not in audited.problems
    assert audited.mutants_killed < audited.mutants - 1  # the others of that loose end still live


def test_a_mutant_that_cannot_be_defined_is_dead(engine, tmp_path):
    """A default that divides by zero must not leave the reference in place to be judged instead."""
    changes = [
        ("def {name}(x, limit):", "def {name}(x, limit, part=1 / 1):"),
        (f"return {RIGHT}", f"return {RIGHT} * part"),
    ]
    found = problems(engine, written(tmp_path, "undefinable", *changes), None)
    assert not [line for line in found if "1 -> 0" in line]


CLASSES = '''
import torch
from llmcourse.exercise import alternative, case, exercise, mistake

@exercise(points=1, minutes=5)
class {name}:
    """Holds a number."""
    def __init__(self, n):
        ### BEGIN SOLUTION
        self.n = n
        ### END SOLUTION
    def twice(self):
        ### BEGIN SOLUTION
        return 2 * self.n
        ### END SOLUTION
    def grow(self, by):
        ### BEGIN SOLUTION
        self.n += by
        return self.n
        ### END SOLUTION

@case({name})
def doubles(answer, rng):
    held = answer(rng.integer(3, 9))
    {observed}

@mistake({name}, "Adds two.")
class AddsTwo:
    def __init__(self, n):
        self.n = n
    def twice(self):
        return self.n + 2
    def grow(self, by):
        self.n += by
        return self.n

@alternative({name}, "Adds itself")
class Adds(AddsTwo):
    def twice(self):
        return self.n + self.n
'''


def test_a_method_that_no_case_looks_at_is_found_by_a_lazy_one(engine, tmp_path):
    def audited(name, observed):
        path = tmp_path / "limits" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CLASSES.format(name=name, observed=observed))
        return problems(engine, load(path))

    found = audited("Unobserved", "held.grow(1); return held.twice()")
    assert "lazy answer 'method grow returns zeros' passes every case" in found
    assert "lazy answer 'method grow does nothing' passes every case" not in found
    assert audited("Observed", "return [held.grow(rng.integer(1, 4)), held.twice()]") == []


def test_an_answer_that_writes_and_returns_nothing_is_no_lazy_answer(engine, tmp_path):
    path = tmp_path / "limits" / "write_double.py"
    path.parent.mkdir()
    path.write_text(
        '''
import tempfile
from pathlib import Path
from llmcourse.exercise import alternative, case, exercise, mistake

@exercise(points=1, minutes=5)
def write_double(path, value):
    """Writes."""
    ### BEGIN SOLUTION
    path.write_text(str(2 * value))
    ### END SOLUTION

@case(write_double)
def written(answer, rng):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_text("")
        answer(path, rng.integer(3, 900))
        return path.read_bytes()

@mistake(write_double, "Squares.")
def squares(path, value):
    path.write_text(str(value * value))

@alternative(write_double, "Adds")
def adds(path, value):
    path.write_bytes(str(value + value).encode())
'''
    )
    assert problems(engine, load(path), None) == []


# ----------------------------------------------------------------------------------------------------- the report


def audited(exercise, **numbers) -> ExerciseAudit:
    found = ExerciseAudit(exercise)
    for name, value in numbers.items():
        setattr(found, name, value)
    return found


def test_the_kill_rate_counts_mistakes_and_mutants_and_leaves_out_what_is_excused(tmp_path):
    exercise = written(tmp_path, "rated")
    whole = audited(exercise, mistakes=2, killed=2, mutants=10, mutants_killed=9, excused=1)
    assert AuditReport((whole,), SEEDS).kill_rate == 1.0
    half = audited(
        exercise,
        mistakes=2,
        killed=1,
        mutants=10,
        mutants_killed=5,
        problems=["mistake upper passes"],
    )
    report = AuditReport((whole, half), SEEDS)
    assert report.kill_rate == (2 + 9 + 1 + 5) / (2 + 9 + 2 + 10)
    assert (
        not report.complete and AuditReport((whole,), SEEDS).complete and not AuditReport((), SEEDS).complete
    )
    assert "NOT proven" in report.text() and "rated: mistake upper passes" in report.text()
    assert "seeds 5, 6, 7: proven" in AuditReport((whole,), SEEDS).text()


def test_json_of_a_report_holds_numbers_beside_names(tmp_path):
    report = AuditReport((audited(written(tmp_path, "in_json")),), SEEDS).to_json()
    assert set(report) == {"kill_rate", "exercises", "problems"}
    for name, value in report["exercises"][0].items():
        assert isinstance(value, int | float) or name in ("name", "lesson")


def test_exercises_are_chosen_by_lesson_numbered_folder_or_name(tmp_path, monkeypatch):
    written(tmp_path, "chosen_one"), written(tmp_path, "chosen_two")
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path))
    assert [e.name for e in exercises_of(["limits"])] == ["chosen_one", "chosen_two"]
    assert [e.name for e in exercises_of(["03_limits", "chosen_one"])] == ["chosen_one", "chosen_two"]
    assert [e.name for e in exercises_of(["chosen_two"])] == ["chosen_two"]
    assert {"chosen_one", "chosen_two"} <= {e.name for e in exercises_of([])}
    with pytest.raises(
        KeyError, match="no lesson or exercise is named 'unlimited'; lessons with exercises: .*limits"
    ):
        exercises_of(["unlimited"])
