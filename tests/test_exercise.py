"""Exercises: what the decorators register and refuse, how files are found, and the inputs of a case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmcourse import exercise as contract
from llmcourse.exercise import (
    Rng,
    alternative,
    case,
    cost,
    derive_seed,
    excuse,
    exercise,
    mistake,
    of,
    raised,
)

FOUND = """
from llmcourse.exercise import case, exercise
@exercise(points=2, minutes=5)
def {name}(x):
    '''Doubles x.

    More about it.'''
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION
@case({name})
def some(answer, rng):
    '''A number.'''
    return answer(rng.integer(1, 9))
"""


@pytest.fixture
def double():
    @exercise(points=3, minutes=5, hints=("add",), forbid=("torch.add",), mutates=True, extension=True)
    def double(x):
        """Twice x.

        x: a number.
        """
        return x + x

    return double


# -------------------------------------------------------------------------------------------------- registration


def test_decorators_return_what_they_were_given_and_register_it(double):
    def a_case(answer, rng):
        """One number.

        And more.
        """
        return answer(rng.integer(1, 9))

    def dear(answer, rng):
        return {"calls": (1, 2)}

    def squared(x):
        return x * x

    def shifted(x):
        return x << 1

    assert case(double, tol=2.0, because="for the test")(a_case) is a_case
    assert cost(double, share=0.25, authority="outside")(dear) is dear
    assert mistake(double, "Squares.")(squared) is squared
    assert alternative(double, "Shifts", meets_costs=False)(shifted) is shifted
    excuse(double, "x + x -> x - x", "never")
    found = of(double)
    assert double(2) == 4 and found.reference is double
    assert (found.points, found.minutes, found.extension, found.mutates, found.ranks) == (3, 5, True, True, 1)
    assert (found.hints, found.forbid, found.statement) == (("add",), ("torch.add",), "Twice x.")
    assert found.path == Path(__file__) and found.topic == "tests" and "def test_decorators" in found.source
    assert [item.name for item in found.cases] == ["a_case"] and [item.name for item in found.costs] == [
        "dear"
    ]
    assert found.items["a_case"].title == "One number." and found.items["dear"].title == "dear"
    assert found.items["dear"].share == 0.25 and found.items["dear"].authority == "outside"
    assert found.mistakes["squared"].sentence == "Squares." and not found.alternatives["shifted"].meets_costs
    assert found.excuses == {"x + x -> x - x": "never"}


def test_a_class_registers_like_a_function_and_its_subclasses_are_not_the_reference():
    @exercise(points=1, minutes=1)
    class Holder:
        """Holds."""

    assert of(Holder).path == Path(__file__)
    with pytest.raises(TypeError, match="decorated with @exercise"):
        of(type("Other", (Holder,), {}))


@pytest.mark.parametrize("thing", [len, 3, None, "name"], ids=repr)
def test_what_is_no_reference_is_refused(thing):
    with pytest.raises(TypeError, match="expected a reference"):
        of(thing)


def named(name):
    def function(answer, rng):
        return None

    function.__name__ = name
    return function


@pytest.mark.parametrize(
    "first", [case, lambda r: cost(r, share=0.1), lambda r: mistake(r, "."), lambda r: alternative(r, ".")]
)
@pytest.mark.parametrize(
    "second", [case, lambda r: cost(r, share=0.1), lambda r: mistake(r, "."), lambda r: alternative(r, ".")]
)
def test_two_definitions_of_one_name_are_refused(double, first, second):
    first(double)(named("same"))
    with pytest.raises(ValueError, match="two definitions are named 'same'"):
        second(double)(named("same"))


def test_a_case_of_the_references_own_name_is_refused(double):
    with pytest.raises(ValueError, match="'double'"):
        case(double)(named("double"))


@pytest.mark.parametrize(
    ("register", "reason"),
    [
        (lambda r: case(r, tol=2.0), "needs because"),
        (lambda r: cost(r, share=0.34), "at most 1/3 together"),
        (lambda r: cost(r, share=0.0), "above 0"),
        (lambda r: cost(r, share=-0.1), "above 0"),
        (lambda r: cost(r, share=0.1, authority="me"), "authority 'me'"),
        (lambda r: case(r, after=named("unknown")), "not a case above it"),
    ],
    ids=["tol", "shares", "no share", "negative share", "authority", "after"],
)
def test_items_that_break_a_rule_are_refused(double, register, reason):
    with pytest.raises(ValueError, match=reason):
        register(double)(named("item"))
    assert not of(double).items


def test_shares_of_several_costs_are_added(double):
    cost(double, share=1 / 6)(named("one"))
    cost(double, share=1 / 6)(named("two"))
    with pytest.raises(ValueError, match="at most 1/3"):
        cost(double, share=0.01)(named("three"))


def test_a_phase_comes_after_a_case_and_not_after_a_cost(double):
    dear = cost(double, share=0.1)(named("dear"))
    with pytest.raises(ValueError, match="not a case above it"):
        case(double, after=dear)(named("later"))
    first = case(double)(named("first"))
    case(double, after=first)(named("second"))
    assert of(double).items["second"].after == "first"


def test_exercises_of_several_ranks_take_neither_phases_nor_services():
    @exercise(points=1, minutes=1, ranks=2)
    def together(x, link):
        """Together."""

    first = case(together)(named("first"))
    for register in (case(together, after=first), case(together, service=object)):
        with pytest.raises(ValueError, match="2 ranks takes neither"):
            register(named("second"))


# -------------------------------------------------------------------------------------------------- finding files


def lesson(folder: Path, name: str, text: str | None = None) -> Path:
    path = folder / "numbers" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FOUND.format(name=name) if text is None else text, encoding="utf-8")
    return path


def test_an_exercise_is_found_in_a_folder_outside_the_package(tmp_path, monkeypatch):
    lesson(tmp_path, "doubled_number")
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path))
    found = contract.find("doubled_number")
    assert found.reference(4) == 8 and found.topic == "numbers" and found.statement == "Doubles x."
    assert contract.find("doubled_number") is found


def test_an_unknown_name_is_answered_with_the_nearest_ones(tmp_path, monkeypatch):
    lesson(tmp_path, "halved_number")
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path))
    with pytest.raises(KeyError, match="did you mean halved_number"):
        contract.find("halfed_number")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "found none"),
        ("def wrong_file(x): ...", "found none"),
        ("wrong_file = 3", "found none"),
        (FOUND.format(name="another_name"), "found none"),
        (FOUND.format(name="wrong_file").partition("@case")[0], "no @case"),
    ],
    ids=["empty", "undecorated", "a number", "another name", "no case"],
)
def test_a_file_that_defines_no_exercise_of_its_name_is_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        contract.load(lesson(tmp_path, "wrong_file", text))


def test_a_file_that_fails_leaves_no_half_made_module(tmp_path):
    path = lesson(tmp_path, "failing_file", "import torch\nraise RuntimeError('on purpose')")
    with pytest.raises(RuntimeError, match="on purpose"):
        contract.load(path)
    assert not [name for name in sys.modules if "failing_file" in name]


# ---------------------------------------------------------------------------------------------------------- inputs


def drawn(rng: Rng) -> list:
    return [
        rng.normal(2, 3),
        rng.uniform(1.0, 2.0, 4),
        rng.integers(-3, 3, 5),
        rng.integer(1, 100),
        rng.choice("abcdef"),
        rng.shuffled(range(8)),
        rng.bytes(6),
    ]


def test_one_seed_gives_the_same_inputs_whatever_the_answers_seed(seed):
    first, second = drawn(Rng(seed, 1)), drawn(Rng(seed, 2))
    assert str(first) == str(second)
    assert str(first) != str(drawn(Rng(seed + 1, 1)))


def test_the_answers_own_randomness_depends_on_its_seed_alone_and_each_spawn_is_another_stream(seed):
    def spawned(seed, answer_seed):
        rng = Rng(seed, answer_seed)
        return [torch.rand(3, generator=rng.spawn()).tolist() for _ in range(2)]

    assert spawned(seed, 5) == spawned(seed + 1, 5)
    assert spawned(seed, 5) != spawned(seed, 6)
    first, second = spawned(seed, 5)
    assert first != second


def test_spawning_does_not_move_the_stream_of_inputs(seed):
    plain, spawning = Rng(seed), Rng(seed)
    spawning.spawn()
    assert str(drawn(plain)) == str(drawn(spawning))


def test_inputs_keep_their_bounds_shapes_and_dtypes(seed):
    rng = Rng(seed)
    assert rng.normal(2, 3, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert rng.normal(2, dtype=torch.float64).dtype == torch.float64 and rng.normal().shape == ()
    uniform = rng.uniform(-2.0, -1.0, 1000)
    assert uniform.dtype == torch.float32 and uniform.min() >= -2 and uniform.max() <= -1
    assert rng.uniform(0.0, 1.0).shape == ()
    integers = rng.integers(-1, 1, 300, dtype=torch.int8)
    # Each of three values is missed by 300 draws with probability (2/3)^300 < 1e-52.
    assert integers.dtype == torch.int8 and set(integers.tolist()) == {-1, 0, 1}
    assert {rng.integer(1, 2) for _ in range(200)} == {1, 2}
    assert sorted(rng.shuffled("abc")) == ["a", "b", "c"]
    assert len(rng.bytes(9)) == 9 and rng.bytes(0) == b""


def test_normal_values_in_float32_do_not_depend_on_the_default_dtype(seed):
    expected = Rng(seed).normal(3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Rng(seed).normal(3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_derived_seeds_are_the_same_in_every_process():
    code = "from llmcourse.exercise import derive_seed; print(derive_seed(1, 'a', 'b'))"
    root = str(Path(contract.__file__).parents[1])
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(other.stdout) == derive_seed(1, "a", "b") < 2**63
    assert derive_seed(1, "ab") != derive_seed(1, "a", "b") != derive_seed("1a", "b")


class Custom(KeyError):
    pass


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ValueError("x"), "ValueError"),
        (Custom("x"), "KeyError"),
        (NotImplementedError("no such dtype"), "NotImplementedError"),
        (torch.OutOfMemoryError("x"), "RuntimeError"),
        (None, "nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_raised_names_the_builtin_base_of_what_was_raised(error, name):
    def call(*, option):
        if error is not None:
            raise error

    assert raised(call, option=1) == name


def test_an_answer_that_is_not_written_yet_is_no_refusal():
    def stub():
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        raised(stub)
