"""Cutting an exercise's file: definition, stub, imports, and what a worker may see of the cases."""

from __future__ import annotations

import ast
import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmcourse import source
from llmcourse.source import SourceError, case_source, definition, imports_of, stub

FILE = '''\
"""An exercise."""

from __future__ import annotations

import contextlib
import math, json as j
from dataclasses import dataclass
from functools import cache, partial

import torch
from llmcourse.exercise import case, exercise, judge_it, mistake

TABLE: dict[str, int] = {}
TABLE["a"] = 1
FIRST, (SECOND, *REST) = 1, (2, 3)
COUNT = 0
COUNT += FIRST
UNUSED = j.dumps([])


@exercise(points=1)
def target(x: torch.Tensor) -> torch.Tensor:
    """Doubles.

    ### not a marker
    """
    ### BEGIN SOLUTION
    def inner(y):
        ### a comment of the solution
        return y + y
    return inner(x)
    ### END SOLUTION


# A comment between.
@dataclass
class Point:
    size: int = SECOND

    def grown(self):
        return Point(self.size + COUNT)


@contextlib.contextmanager
def prepared(n=FIRST):
    yield Point(n)


@cache
def table():
    return TABLE


def judge(observed, expected):
    return secret_judge(observed)


def secret_judge(observed):
    return None


@case(target, judge=judge)
def first(answer, rng):
    """One."""
    with prepared() as point:
        twin = [math.pi for wrong in [1]]
        return answer(point.grown()), table(), twin


@case(target)
def second(answer, rng):
    other = lambda alternative_one: alternative_one
    return answer(other(1))


@mistake(target, "wrong")
def wrong(x):
    return x


def alternative_one(x):
    return REST
'''
HIDDEN = ["target", "wrong", "alternative_one"]


def names_in(text: str) -> set[str]:
    return {name for node in ast.parse(text).body for name in source.bound_names(node)}


# ---------------------------------------------------------------------------------------------- definition and stub


def test_a_definition_is_cut_without_decorators_and_with_its_comments_and_closing_marker():
    text = definition(FILE, "target")
    assert text.startswith("def target(") and text.endswith("    ### END SOLUTION")
    assert "### a comment of the solution" in text and "A comment between" not in text


def test_a_definition_at_the_end_of_the_file_keeps_its_closing_marker():
    text = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    assert definition(text, "f") == text
    assert definition(text + "\n\n\n", "f") == text


def test_a_marker_of_the_next_definition_is_not_taken():
    text = (
        "def f():\n    return 1\nasync def g():\n    ### BEGIN SOLUTION\n    return 2\n    ### END SOLUTION\n"
    )
    assert definition(text, "f") == "def f():\n    return 1"
    assert definition(text, "g").endswith(source.END)


def test_lines_are_counted_as_python_counts_them():
    text = "a = '\x0c \u2028 \x1c'\ndef f():\n    return 1\n"
    assert definition(text, "f") == "def f():\n    return 1"


@pytest.mark.parametrize("name", ["missing", "grown", "inner", "TABLE"])
def test_a_name_that_is_no_definition_at_the_top_is_an_error(name):
    with pytest.raises(SourceError, match=f"named {name} at the top level"):
        definition(FILE, name)


def test_a_stub_keeps_signature_and_docstring_and_nothing_of_the_solution():
    text = stub(definition(FILE, "target"))
    assert "### not a marker" in text and text.endswith("    raise NotImplementedError")
    assert "inner" not in text
    ast.parse(text)


METHODS = """\
class A:
    def f(self):
        ### BEGIN SOLUTION
        return 1
        ### END SOLUTION

    size = 3

    def g(self):
        ### BEGIN SOLUTION
        return 2
        ### END SOLUTION
        return 5"""


def test_every_method_is_cut_and_what_stands_between_is_kept():
    without = METHODS.replace("### BEGIN SOLUTION", "raise NotImplementedError").splitlines()
    cut = [
        line for line in without if "return 1" not in line and "return 2" not in line and "END" not in line
    ]
    assert stub(METHODS).splitlines() == cut


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def f():\n    return 1", "no solution is marked"),
        ("def f():\n    ### BEGIN SOLUTION\n    return 1", "without ### END SOLUTION"),
        ("def f():\n    return 1\n    ### END SOLUTION", ":3: ### END SOLUTION without"),
        ("### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION", ":2: ### BEGIN SOLUTION inside"),
    ],
    ids=["unmarked", "open", "closed only", "twice"],
)
def test_markers_that_do_not_fit_are_an_error_with_their_line(text, reason):
    with pytest.raises(SourceError, match=reason):
        stub(text, "file.py")


# ---------------------------------------------------------------------------------------------------- case source


def test_a_case_travels_with_what_it_reaches_and_nothing_else():
    text = case_source(FILE, ["first"], HIDDEN)
    assert names_in(text) == {
        *(
            "annotations",
            "contextlib",
            "math",
            "dataclass",
            "cache",
            "TABLE",
            "FIRST",
            "SECOND",
            "REST",
            "COUNT",
        ),
        *("Point", "prepared", "table", "first"),
    }
    for absent in (
        "judge",
        "secret_judge",
        "target",
        "wrong",
        "json",
        "partial",
        "UNUSED",
        "@case",
        "exercise",
    ):
        assert absent not in text.replace("for wrong in", "")


def test_what_a_case_reaches_runs_with_its_decorators_and_its_tables():
    space: dict = {}
    exec(case_source(FILE, ["first", "second"], HIDDEN), space)
    answered = space["first"](lambda point: point.size, None)
    assert answered == (2, {"a": 1}, [3.141592653589793])
    assert space["table"]() is space["table"]()
    assert space["second"](lambda value: value, None) == 1


@pytest.mark.parametrize(
    "body",
    [
        "return answer(wrong(1))",
        "return through(answer)",
        "return [f for f in (wrong,)]",
        "answer.other = target",
        "def nested():\n        return wrong\n    return nested()",
        "return (lambda x=wrong: x)()",
    ],
    ids=["called", "through another", "in a list", "assigned", "in a nested function", "as a default"],
)
def test_a_case_that_reaches_a_mistake_is_an_error(body):
    text = FILE + f"\n\ndef through(answer):\n    return wrong\n\n\ndef third(answer, rng):\n    {body}\n"
    with pytest.raises(SourceError, match="a case reaches (wrong|target) by name"):
        case_source(text, ["third"], HIDDEN, "file.py")


@pytest.mark.parametrize(
    "body",
    [
        "wrong = answer(1)\n    return wrong",
        "for wrong in [1]:\n        answer(wrong)",
        "with prepared() as wrong:\n        return answer(wrong)",
        "try:\n        answer(1)\n    except ValueError as wrong:\n        return str(wrong)",
        "def wrong():\n        return 1\n    return answer(wrong())",
        "return [answer(wrong) for wrong in [1]]",
        "from math import pi as wrong\n    return answer(wrong)",
    ],
    ids=["assigned", "loop", "with", "except", "function", "comprehension", "import"],
)
def test_a_cases_own_variable_may_be_called_like_a_mistake(body):
    text = FILE + f"\n\ndef third(answer, rng):\n    {body}\n"
    assert "def wrong(x)" not in case_source(text, ["third"], HIDDEN)


def test_a_reference_of_another_exercise_is_sent_without_its_decorator():
    text = case_source(FILE, ["target"], ["wrong", "alternative_one"])
    assert (
        "@exercise" not in text
        and "def target" in text
        and names_in(text) == {"annotations", "torch", "target"}
    )


def test_imports_are_kept_but_those_of_lessons():
    text = "import torch\nfrom llmcourse.lessons.a.b import c\nfrom llmcourse import wire\nx = 1\n"
    assert imports_of(text + "if x:\n    import json\n") == "import torch\nfrom llmcourse import wire"


class Dropped:
    """Garbage that runs Python when it is collected, which lets another thread go on."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        sum(range(3))


def test_threads_that_parse_at_once_get_their_trees():
    """Python 3.11 counts the depth of all trees under construction together, and raises SystemError."""
    text = ("def f(x):\n    return [" + "(" * 40 + "x" + ")" * 40 + "]\n") * 50

    def one(_):
        for _ in range(10):
            Dropped()
        return len(source.parse(text).body)

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50, 2, 2)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(one, range(40))) == {50}
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
