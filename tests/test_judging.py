"""From outcomes to a verdict: comparison, costs, points, the word for them, and which mistake is named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmcourse import judging, wire
from llmcourse.exercise import alternative, case, cost, exercise, mistake, of
from llmcourse.judging import (
    CostResult,
    HarnessFault,
    InProcess,
    Item,
    ItemResult,
    Outcome,
    compare,
    costs_of,
    expectations,
    judge,
    own_garbage,
    verdict_of,
)


def made(function, **options):
    exercise(points=6, minutes=1, **options)(function)
    return function


def verdict(reference, answer, seed=11, **options):
    runner = InProcess()
    found = of(reference)
    return judge(runner, found, answer, seed, expectations(runner, found, seed), **options)


@pytest.fixture
def scaled():
    """An exercise with two cases, two costs and three mistakes: scaled(x, by) -> x * by."""

    def scaled(x, by):
        """Scales."""
        return x * by

    made(scaled)

    @case(scaled)
    def numbers(answer, rng):
        """A vector."""
        return {"y": answer(rng.normal(4), rng.integer(2, 5))}

    @case(scaled)
    def one(answer, rng):
        """By one."""
        return [answer(rng.normal(3), 1), answer(rng.normal(3), -rng.integer(2, 3))]

    @cost(scaled, share=1 / 6)
    def calls(answer, rng):
        """Calls."""
        counted = CountingTensor(1.0)
        answer(counted, 2.0)
        return {"multiplications": counted.uses}

    @cost(scaled, share=1 / 12, authority="outside")
    def bound(answer, rng):
        """Bounded."""
        counted = CountingTensor(1.0)
        answer(counted, 2.0)
        return {"again": (counted.uses, 5)}

    @mistake(scaled, "Adds.")
    def added(x, by):
        return x + by

    @mistake(scaled, "Ignores the factor.")
    def ignored(x, by):
        return x * 1

    @mistake(scaled, "Multiplies by adding up.")
    def summed(x, by):
        result = x * 0
        for _ in range(abs(int(by))):
            result = result + x * math.copysign(1, by)
        return result

    return scaled


class CountingTensor:
    """A number that counts how often it is multiplied."""

    def __init__(self, value):
        self.value, self.uses = value, 0

    def __mul__(self, other):
        self.uses += 1
        return self

    def __add__(self, other):
        return self


# ------------------------------------------------------------------------------------------------- points and words


def test_a_right_answer_earns_all_points(scaled):
    found = verdict(scaled, lambda x, by: by * x if isinstance(x, torch.Tensor) else x * by)
    assert (found.verdict, found.points, found.max_points, found.reason) == ("right", 6, 6, "all cases agree")
    assert [result.agrees for result in found.results] == [True] * 4 and not found.mistakes


def test_a_dear_answer_loses_the_share_of_each_cost_it_misses(scaled):
    once_too_often = verdict(scaled, lambda x, by: (x * 1) * by)
    assert (once_too_often.verdict, once_too_often.points) == ("right", 5)
    assert (
        once_too_often.reason == "right, but dearer than it needs to be: multiplications: at most 1, found 2"
    )
    far_too_often = verdict(scaled, lambda x, by: x * 1 * 1 * 1 * 1 * 1 * by)
    assert far_too_often.points == 4.5


def test_costs_earn_nothing_when_a_case_is_wrong(scaled):
    found = verdict(scaled, lambda x, by: x)
    assert (found.verdict, found.points) == ("wrong", 0)
    assert [result.agrees for result in found.results] == [False, False, True, True]


def stub(x, by):
    raise NotImplementedError


def test_an_answer_that_is_not_written_is_not_attempted_and_names_no_mistake(scaled):
    found = verdict(scaled, stub)
    assert (found.verdict, found.points, found.mistakes) == ("not attempted", 0, ())
    assert {result.reason for result in found.results} == {"not written yet"}


def test_an_answer_that_is_written_for_some_cases_is_wrong(scaled):
    found = verdict(scaled, lambda x, by: x * by if isinstance(by, float) else stub(x, by))
    assert (found.verdict, found.points) == ("wrong", 0)


KINDS = ["raised", "not written", "missing", "died", "protocol", "timed out", "interrupted", "not run"]


def result(name, kind=None, *, item_kind="case", share=0.0, agrees=False):
    error = None if kind is None else {"kind": kind, "type": "ValueError", "message": "it said"}
    item = Item(name, item_kind, lambda: None, share=share)
    return ItemResult(item, Outcome(error=error), agrees, None if agrees else "a reason")


@pytest.mark.parametrize(
    ("kinds", "complete", "word"),
    [
        (["missing", "missing"], True, "not attempted"),
        (["not written", "not run"], True, "not attempted"),
        (["not written", "raised"], True, "wrong"),
        (["raised", "raised"], True, "wrong"),
        (["died"], False, "crashed"),
        (["protocol"], False, "crashed"),
        (["raised", "timed out"], False, "timed out"),
        (["interrupted"], False, "wrong"),
        ([None], False, "wrong"),
        ([None, None], True, "right"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_word_follows_from_the_kinds_of_errors(scaled, kinds, complete, word):
    results = [result(f"case {i}", kind, agrees=kind is None) for i, kind in enumerate(kinds)]
    found = verdict_of(of(scaled), results, [], 0, complete=complete)
    assert found.verdict == word and word in judging.VERDICTS
    assert found.points == (6 if word == "right" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error_has_a_reason_in_words(scaled, kind):
    error = {"kind": kind, "type": "ValueError", "message": "it said", "line": 3}
    reason = judging.error_reason(of(scaled), Outcome(error=error))
    assert reason and "{" not in reason


def test_a_wrong_number_of_parameters_is_told_with_both_signatures(scaled):
    reason = verdict(scaled, lambda x: x).results[0].reason
    assert reason.startswith("your answer raised TypeError: ")
    assert reason.endswith("; expected parameters (x, by), found (x)")
    other_names = verdict(scaled, lambda weight, scale: weight + "a").results[0].reason
    assert "expected parameters" not in other_names


def test_json_holds_what_the_issue_promises(scaled):
    report = verdict(scaled, lambda x, by: x + by).to_json()
    assert set(report) == {
        "name",
        "points",
        "max_points",
        "verdict",
        "reason",
        "mistake",
        "cases",
        "costs",
        "race",
        "notes",
    }
    assert report["race"] is None
    assert report["mistake"] == "Adds."
    assert [set(part) for part in report["cases"]] == [{"name", "agrees", "reason"}] * 2
    assert {"name", "counted", "at_most", "authority", "agrees"} <= set(report["costs"][0])


# ------------------------------------------------------------------------------------------------------ comparison


def compared(item, observed, expected, **outcome):
    def nothing():
        return None

    found = of(made(nothing))
    return compare(found, item, Outcome(observed=observed, **outcome), Outcome(observed=expected))


def plain(**options):
    return Item("item", "case", lambda: None, **options)


def test_a_changed_argument_fails_a_case_whose_observations_agree():
    found = compared(plain(), 1, 1, changed=("weight", "bias"))
    assert (
        not found.agrees
        and found.reason == "your answer changed its argument `weight` and `bias`; work on a copy"
    )


def test_what_is_saved_for_a_later_phase_is_never_compared():
    assert compared(plain(), {"a": 1, "saved": 5}, {"a": 1, "saved": [6]}).agrees
    assert not compared(plain(), {"a": 1, "saved": 5}, {"a": 2, "saved": 5}).agrees
    chosen = plain(judge=lambda observed, expected: None if "saved" not in observed else "seen")
    assert compared(chosen, {"saved": 5}, {"saved": 5}).agrees


def test_tol_reaches_the_comparison():
    ones = torch.ones(3)
    assert not compared(plain(), ones * 1.0001, ones).agrees
    assert compared(plain(tol=100.0, because="test"), ones * 1.0001, ones).agrees


def test_an_own_judge_decides_and_its_reason_is_the_complaint():
    item = plain(judge=lambda observed, expected: None if observed["x"] > 0 else "not above zero")
    assert compared(item, {"x": 5}, {"x": 1}).agrees
    found = compared(item, {"x": -5}, {"x": 1})
    assert (found.agrees, found.reason, found.complaint) == (False, "not above zero", "not above zero")


@pytest.mark.parametrize("observed", [None, {"y": 1}, {"x": 1.0}, {"x": 1, "y": 2}, [1]], ids=str)
def test_an_own_judge_never_sees_another_structure(observed):
    def fails(observed, expected):
        raise AssertionError("called")

    found = compared(plain(judge=fails), observed, {"x": 1})
    assert not found.agrees and found.reason and found.complaint is None


def test_free_shapes_let_an_own_judge_see_other_sizes_but_no_other_dtype():
    item = plain(judge=lambda observed, expected: None, free_shapes=True)
    assert compared(item, torch.ones(9), torch.ones(2)).agrees
    assert not compared(item, torch.ones(9).int(), torch.ones(2)).agrees
    assert not compared(replace(item, free_shapes=False), torch.ones(9), torch.ones(2)).agrees


def test_a_judge_that_trips_over_the_answer_fails_it_and_one_that_trips_over_the_reference_is_our_fault():
    item = plain(judge=lambda observed, expected: None if 1 / observed["x"] else None)
    found = compared(item, {"x": 0}, {"x": 1})
    assert not found.agrees and "cannot be judged" in found.reason
    with pytest.raises(HarnessFault, match="fails on the reference's own"):
        compared(item, {"x": 0}, {"x": 0})


# ------------------------------------------------------------------------------------------------------------ costs


def dear(**options):
    return Item("item", "cost", lambda: None, share=0.1, **options)


@pytest.mark.parametrize(
    ("observed", "expected", "agrees"),
    [
        ({"n": 5}, {"n": 5}, True),
        ({"n": 6}, {"n": 5}, False),
        ({"n": (6, 100)}, {"n": 5}, False),
        ({"n": (6, 0)}, {"n": (5, 7)}, True),
        ({"n": (8, 9)}, {"n": (5, 7)}, False),
        ({}, {"n": 5}, False),
        ({"n": None}, {"n": 5}, False),
        ({"n": "few"}, {"n": 5}, False),
        ({"n": math.nan}, {"n": 5}, False),
        ({"n": 10**400}, {"n": 5}, False),
        (None, {"n": 5}, False),
        ([1], {"n": 5}, False),
        ({"n": None}, {"n": None}, True),
        ({"n": 10**6, "m": 1}, {"n": (5, math.inf), "m": 1}, True),
        ({"n": 5, "made up": 1}, {"n": 5}, True),
    ],
    ids=str,
)
def test_a_count_is_held_to_the_bound_of_our_own_run(observed, expected, agrees):
    assert compared(dear(), observed, expected).agrees is agrees


def test_a_count_is_shown_beside_its_bound_and_kind():
    found = compared(dear(authority="protocol"), {"reads": 8, "free": 3}, {"reads": 2, "free": (0, math.inf)})
    assert found.reason == "reads: at most 2, found 8"
    assert found.costs == (
        CostResult("reads", 8, 2, "protocol", False),
        CostResult("free", 3, None, "protocol", True),
    )
    assert (
        compared(dear(), {}, {"reads": 2}).reason == "reads: at most 2, found nothing that could be counted"
    )


def test_counts_of_a_service_stand_beside_and_above_those_of_the_item():
    outcome = Outcome(observed={"a": 1, "b": (0, 9)}, counts={"b": (4, None), "c": (5, 6)})
    assert costs_of(dear(), outcome) == {"a": (1, None), "b": (4, 9), "c": (5, 6)}


def test_of_several_ranks_the_dearest_counts_whatever_its_number():
    outcome = Outcome(observed={"rank 0": {"n": 7}, "rank 1": {"n": 3, "m": 1}})
    assert costs_of(dear(), outcome) == {"n": (7, None), "m": (1, None)}
    assert costs_of(dear(), Outcome(observed={"rank of the matrix": 3})) == {"rank of the matrix": (3, None)}


def test_an_answer_that_gives_something_else_while_it_is_counted_is_not_cheap():
    ours = {"n": 5, "observed": torch.ones(2)}
    assert compared(dear(), {"n": 4, "observed": torch.ones(2)}, ours).agrees
    found = compared(dear(), {"n": 0, "observed": None}, ours)
    assert not found.agrees and "float32 [2]" in found.reason and [c.name for c in found.costs] == ["n"]
    assert not compared(dear(), {"n": 0}, ours).agrees


def test_what_a_service_saw_replaces_what_the_case_reported():
    class Witness:
        calls = ("see",)

        def __init__(self, rng):
            self.seen = []

        def see(self, value):
            self.seen.append(value)

        def observed(self, data):
            return {"told": data, "seen": self.seen}

        def counts(self):
            return {}

    def shows(value, witness):
        witness.see(value)
        return value

    made(shows)
    case(shows, service=Witness)(
        named_function("some", lambda answer, rng, witness: answer(rng.integer(1, 9), witness))
    )
    assert verdict(shows, shows).verdict == "right"
    assert verdict(shows, lambda value, witness: value).reason.startswith("some seen: expected [")


# ----------------------------------------------------------------------------------------------------- recognition


def named(found):
    return [one.name for one in found.mistakes]


@pytest.mark.parametrize("name", ["added", "ignored", "summed"])
def test_every_mistake_is_named_for_itself(scaled, name):
    assert named(verdict(scaled, of(scaled).mistakes[name].function)) == [name]


def test_the_same_numbers_by_another_route_are_recognised(scaled):
    assert named(verdict(scaled, lambda x, by: by + x if isinstance(x, torch.Tensor) else x)) == ["added"]


def test_a_wrong_answer_of_no_known_kind_is_not_named(scaled):
    assert named(verdict(scaled, lambda x, by: x * by * 3)) == []


def test_a_mistake_must_explain_every_failure(scaled):
    assert named(verdict(scaled, lambda x, by: x + by if len(x) == 4 else x * 7)) == []


def test_naming_can_be_left_out(scaled):
    assert named(verdict(scaled, lambda x, by: x + by, naming=False)) == []


def signs(observed, expected):
    return None if observed["x"] == expected["x"] else "the number is another"


@pytest.fixture
def numbered():
    """Two cases with an own judge; answers are ints, and a mistake gives other ints."""

    def numbered(n):
        return n

    made(numbered)

    @case(numbered, judge=signs)
    def first(answer, rng):
        return {"x": answer(1)}

    @case(numbered, judge=signs)
    def second(answer, rng):
        return {"x": answer(2)}

    return numbered


def test_the_same_data_beats_the_same_complaint(numbered):
    mistake(numbered, "Other numbers.")(named_function("other", lambda n: n + 50))
    mistake(numbered, "These numbers.")(named_function("these", lambda n: n + 7))
    assert named(verdict(numbered, lambda n: n + 7)) == ["these"]
    assert named(verdict(numbered, lambda n: n + 9)) == ["other", "these"]


def named_function(name, function):
    function.__name__ = name
    return function


def test_among_equals_the_mistake_with_fewest_other_failures_is_named(numbered):
    mistake(numbered, "Fails both.")(named_function("both", lambda n: n + 7))
    mistake(numbered, "Fails the first alone.")(named_function("alone", lambda n: n + 7 if n == 1 else n))
    assert named(verdict(numbered, lambda n: n + 7 if n == 1 else n)) == ["alone"]
    assert named(verdict(numbered, lambda n: n + 7)) == ["both"]


def test_ties_are_all_listed(numbered):
    for name in ("one", "two"):
        mistake(numbered, name)(named_function(name, lambda n: n + 7))
    found = verdict(numbered, lambda n: n + 7)
    assert named(found) == ["one", "two"] and found.to_json()["mistake"] == "one / two"


def test_the_same_exception_is_the_same_complaint_and_another_is_not(numbered):
    def refuses(n):
        raise ValueError("no")

    mistake(numbered, "Refuses.")(refuses)
    assert named(verdict(numbered, lambda n: int("x"))) == ["refuses"]
    assert named(verdict(numbered, lambda n: [][1])) == []


def test_a_mistake_that_only_costs_is_named_by_its_count(scaled):
    found = verdict(scaled, of(scaled).mistakes["summed"].function)
    assert (found.verdict, found.points, named(found)) == ("right", 5, ["summed"])
    # Dear in the same item, by another count: the same complaint.
    assert named(verdict(scaled, lambda x, by: (x * 1 * 1) * by)) == ["summed"]


@pytest.mark.parametrize("fails", [None, ["first", "dear"]])
def test_right_values_that_cost_too_much_are_no_wrong_values_fault(numbered, fails):
    @cost(numbered, share=0.25)
    def dear(answer, rng):
        return {"calls": (answer.calls, 1)}

    def dearly(n):
        return n

    def also_wrong(n):
        return n + 7 if n == 1 else n

    dearly.calls = also_wrong.calls = 2
    numbered.calls = 1
    mistake(numbered, "Wrong, and as dear.", fails=fails)(also_wrong)
    found = verdict(numbered, dearly)
    assert (found.verdict, named(found)) == ("right", [])
    assert named(verdict(numbered, also_wrong)) == ["also_wrong"]


class Noting(InProcess):
    """Notes which mistake is run on which items."""

    def __init__(self):
        self.runs = []

    def run(self, exercise, answer, items, seed, expected):
        if expected is not None:
            self.runs.append((answer.__name__, [item.name for item in items]))
        return super().run(exercise, answer, items, seed, expected)


def test_a_mistake_that_says_what_it_fails_is_run_on_nothing_else(numbered):
    mistake(numbered, "Fails the first.", fails=["first"])(
        named_function("alone", lambda n: n + 7 if n == 1 else n)
    )
    mistake(numbered, "Fails both.", fails=["first", "second"])(named_function("both", lambda n: n + 7))
    mistake(numbered, "Fails the second.", fails=["second"])(
        named_function("later", lambda n: n + 7 if n == 2 else n)
    )
    runner, found = Noting(), of(numbered)
    answer = named_function("mine", lambda n: n + 7 if n == 1 else n)
    result = judge(runner, found, answer, 11, expectations(runner, found, 11))
    # `both` would fail more than the answer did, and `later` does not fail what it failed.
    assert named(result) == ["alone"]
    assert runner.runs == [("mine", ["first", "second"]), ("alone", ["first"])]


def test_a_failed_case_is_explained_also_where_a_cost_besides_is_not(scaled):
    """What the answer costs on top does not hide which wrong answer it is."""

    def dear(x, by):
        return x + by if isinstance(x, torch.Tensor) else x * 1 * 1 * by

    assert named(verdict(scaled, dear)) == ["added"]


# --------------------------------------------------------------------------------------------------- in a notebook


class Counter:
    calls = ("tick",)

    def __init__(self, rng):
        self.first, self.ticks = rng.integer(0, 1000), 0

    def tick(self):
        self.ticks += 1
        return self.first + self.ticks

    def counts(self):
        return {"ticks": (self.ticks, 2)}


def test_phases_share_their_inputs_and_services_are_counted():
    def counted(value, counter=None):
        return value if counter is None else counter.tick()

    made(counted)

    @case(counted)
    def before(answer, rng):
        return {"x": rng.integer(0, 10**9), "saved": [answer(1)]}

    @case(counted, after=before)
    def later(answer, rng, saved):
        return {"x": rng.integer(0, 10**9), "found": saved}

    @cost(counted, share=0.1, authority="protocol", service=Counter)
    def ticks(answer, rng, counter):
        answer(0, counter)

    outcomes = expectations(InProcess(), of(counted), 5)
    assert outcomes["before"].observed["x"] == outcomes["later"].observed["x"]
    assert outcomes["later"].observed["found"] == [1] and outcomes["ticks"].counts == {"ticks": (1, 2)}
    assert (
        verdict(counted, lambda v, c=None: v if c is None else c.tick() + c.tick() - c.ticks + 1).points == 6
    )
    found = verdict(counted, lambda v, c=None: v if c is None else [c.tick() for _ in range(3)][0])
    assert found.reason == "right, but dearer than it needs to be: ticks: at most 2, found 3"
    stopped = verdict(counted, lambda value, counter=None: value if counter else 1 / 0)
    assert [r.outcome.kind for r in stopped.results] == ["raised", "not run", "observed"]


def test_the_answers_own_randomness_is_another_stream_than_the_references():
    def drawn(generator):
        return torch.rand(4, generator=generator)

    made(drawn)
    case(drawn)(named_function("some", lambda answer, rng: [rng.normal(2), answer(rng.spawn())]))
    found = verdict(drawn, drawn)
    assert found.verdict == "wrong" and found.results[0].reason.startswith("[1]: ")


def test_an_interrupt_ends_the_run_with_a_verdict_on_what_was_seen(scaled):
    def interrupted(x, by):
        raise KeyboardInterrupt

    found = verdict(scaled, interrupted, naming=False)
    assert (found.verdict, found.points, len(found.results)) == ("wrong", 0, 1)
    assert "interrupted while this case ran" in found.results[0].reason


def test_library_answers_are_off_while_an_answer_runs_and_back_afterwards():
    def softmax(x):
        return x.exp() / x.exp().sum()

    made(softmax, forbid=("torch.softmax",))
    case(softmax)(named_function("some", lambda answer, rng: answer(rng.normal(3))))
    found = verdict(softmax, lambda x: torch.softmax(x, dim=0))
    assert (
        found.verdict == "wrong" and "torch.softmax is what this exercise asks you to write" in found.reason
    )
    assert torch.softmax(torch.zeros(2), dim=0).tolist() == [0.5, 0.5]


def test_observations_that_cannot_be_copied_are_the_answers_error(scaled, monkeypatch):
    runner, found = InProcess(), of(scaled)
    expected = expectations(runner, found, 1)

    def no_memory(data):
        raise MemoryError("too large")

    monkeypatch.setattr(wire, "copied", no_memory)
    outcome = runner.run(found, scaled, found.cases[:1], 1, expected)["numbers"]
    assert outcome.error["type"] == "MemoryError"


def test_a_reference_that_fails_or_changes_its_arguments_is_a_fault_of_ours():
    def broken(x):
        return x.add_(1)

    made(broken)
    case(broken)(named_function("some", lambda answer, rng: answer(rng.normal(3))))
    with pytest.raises(HarnessFault, match="broken.some: the reference itself failed: changed"):
        expectations(InProcess(), of(broken), 1)

    def raising(x):
        raise ValueError("no")

    made(raising)
    case(raising)(named_function("some", lambda answer, rng: answer(rng.normal(3))))
    with pytest.raises(HarnessFault, match="ValueError"):
        expectations(InProcess(), of(raising), 1)


def test_alternatives_run_like_any_answer(scaled):
    alternative(scaled, "The other way round")(named_function("turned", lambda x, by: x * by))
    runner = InProcess()
    assert verdict(scaled, runner.ours(of(scaled), "turned")).points == 6
    assert runner.ours(of(scaled), "scaled") is scaled


def test_garbage_made_by_an_answer_is_collected_and_what_was_there_is_left_alone():
    """Looking through a notebook's own objects takes longer than an answer; they are the notebook's to collect."""
    import gc
    import weakref

    class Node:
        def __init__(self):
            self.itself = self

    gc.unfreeze()  # a command that an earlier test ran in this process may have frozen its own
    gc.disable()
    before = weakref.ref(Node())
    with own_garbage():
        inside = weakref.ref(Node())
        gc.collect()
        assert inside() is None and before() is not None and gc.get_freeze_count()
        left = weakref.ref(Node())
    assert left() is None and before() is not None and not gc.get_freeze_count()
    gc.enable()
    gc.collect()
    assert before() is None


def test_objects_that_a_program_froze_itself_stay_frozen():
    import gc

    gc.freeze()
    try:
        with own_garbage():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
