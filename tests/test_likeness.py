"""What counts as the same program, and what does not."""

from __future__ import annotations

import pytest

from llmcourse.likeness import form

ANSWER = """
import torch

def scale(weight: torch.Tensor, bits: int = 8) -> torch.Tensor:
    '''The statement.'''
    limit = 2 ** (bits - 1) - 1
    return weight.abs().amax(dim=1) / limit
"""


@pytest.mark.parametrize(
    "copied",
    [
        ANSWER.replace("limit", "q_max"),
        ANSWER.replace("weight", "w").replace("bits", "b"),
        ANSWER.replace(": torch.Tensor", "").replace(" -> torch.Tensor", ""),
        ANSWER.replace("    '''The statement.'''\n", "    # mine\n\n"),
        ANSWER.replace("    limit =", "    limit: int ="),
        ANSWER.replace("def scale", "@torch.no_grad()\ndef scale"),
        "def scale():\n    pass\n" + ANSWER,
    ],
    ids=["variable", "parameters", "annotations", "docstring", "annotated", "decorated", "earlier one"],
)
def test_a_copy_under_other_names_is_the_same(copied):
    assert form(copied, "scale") == form(ANSWER, "scale") != ""


@pytest.mark.parametrize(
    "other",
    [
        ANSWER.replace("- 1)", "- 2)"),
        ANSWER.replace("dim=1", "dim=0"),
        ANSWER.replace(".abs()", ""),
        ANSWER.replace("bits: int = 8", "bits: int = 4"),
        ANSWER.replace("/ limit", "/ bits"),
        ANSWER.replace("(dim=1)", "(axis=1)"),
    ],
)
def test_another_program_is_another(other):
    assert form(other, "scale") not in ("", form(ANSWER, "scale"))


@pytest.mark.parametrize(
    "nothing",
    [
        "",
        "scale = 3",
        "def other():\n    return 1",
        "def scale(weight):\n    '''The statement.'''\n    raise NotImplementedError",
        "class scale:\n    '''S.'''\n    def step(self):\n        raise NotImplementedError",
        "def scale(:",
        "def scale():\n    return \0",
        "(" * 5000,
    ],
)
def test_what_is_not_written_has_no_form(nothing):
    assert form(nothing, "scale") == ""


def test_a_class_is_known_by_its_methods_and_not_by_its_name_alone():
    text = "class Lion(Base):\n    def step(self, closure=None):\n        for p in self.ps:\n            p.sub_(1)"
    assert form(text, "Lion") == form(text.replace(" p ", " q ").replace("p.sub", "q.sub"), "Lion")
    assert form(text, "Lion") != form(text.replace("step", "leap"), "Lion")
