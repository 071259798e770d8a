"""Answers as source text, and a small exercise to judge them by: what tests of the engine and of the jail share."""

from __future__ import annotations

from pathlib import Path

from llmcourse.engine import Answer
from llmcourse.exercise import load
from llmcourse.judging import judge

LESSON = """
import os
import torch
from llmcourse.exercise import alternative, case, exercise, mistake

@exercise(points=2, minutes=5)
def add(x, y):
    '''The sum.'''
    ### BEGIN SOLUTION
    return x + y
    ### END SOLUTION

@case(add)
def vectors(answer, rng):
    '''Two vectors.'''
    x, y = rng.normal(4), rng.normal(4)
    return {"sum": answer(x, y)}

@case(add)
def settings(answer, rng):
    '''Two numbers, and what torch makes of a list.'''
    made = torch.tensor([0.5]) * 1
    return [made, made.requires_grad, answer(rng.integer(1, 9), 5), str(made.device)]

@mistake(add, "Subtracts.")
def subtracted(x, y):
    return x - y

@alternative(add, "The other way round")
def turned(x, y):
    return y + x
"""


def written(folder: Path, name: str, text: str):
    path = folder / "numbers" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return load(path)


SEED = 20_240
GOOD = "import torch\ndef add(x, y):\n    return x + y\n"


def verdict(engine, exercise, *parts, own="cell", name=None, seed=SEED):
    """The verdict on a learner's source: its last part is the exercise's cell unless parts are labelled."""
    labelled = tuple(part if isinstance(part, tuple) else ("cell", part) for part in parts)
    answer = Answer(name or exercise.name, labelled, own=own)
    return judge(engine, exercise, answer, seed, engine.expected(exercise, seed))


def body(text: str, head: str = "") -> str:
    """A cell whose function runs `text` before it gives the right sum."""
    lines = "\n".join("    " + line for line in text.splitlines())
    imports = "import os, sys, ctypes, signal, socket, struct, json, tempfile, torch"
    return f"{imports}\n{head}\ndef add(x, y):\n{lines}\n    return x + y\n"
