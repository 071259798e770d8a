"""What grading one submission gave: plain data that goes from the judge to the gradebook, and to disk in between.

A record holds everything the gradebook, the autograded notebook, the feedback page and the CSV are made of, so that
each of them can be made again without judging anything again. Imports no torch and no nbgrader.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class GradedExercise:
    """One exercise of a submission.

    points, max_points: on the judge's scale; whoever writes the gradebook scales them to what the teacher's cell is
    worth. html, text: the report a learner sees. same_as: what the answer equals ("reference", "alternative NAME",
    "student NAME"), a flag and never a score; form: a digest of the answer's normal form, by which that is told, ""
    for an answer that is not written. needs_teacher: only a person can decide (a race that stayed inconclusive).
    """

    name: str
    points: float
    max_points: float
    verdict: str
    reason: str
    mistake: str | None = None
    html: str = ""
    text: str = ""
    extension: bool = False
    same_as: tuple[str, ...] = ()
    form: str = ""
    needs_teacher: bool = False


@dataclass(frozen=True)
class Graded:
    """One student's submission of one assignment.

    key: what it was judged from (content, exercises, seed), so that the same is never judged twice. answers: source
    of the exercise cells by name, and of manually graded cells by their id. helpers: (label, text) of the student's
    own cells of which something was carried, in order, with the name of the exercise whose cell comes next or "".
    refused: the whole outcome where nothing could be judged. submitted_at: ISO 8601 in UTC, or "".
    """

    student: str
    assignment: str
    key: str
    exercises: tuple[GradedExercise, ...] = ()
    answers: dict[str, str] = field(default_factory=dict)
    helpers: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    refused: str | None = None
    submitted_at: str = ""
    run: int = 0  # which of the assignment's runs: each has inputs of its own
    seconds: dict[str, float] = field(default_factory=dict)  # where the judge's time went

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Graded:
        """The record that `to_json` gave, lists become tuples again; TypeError for anything else."""
        exercises = tuple(
            GradedExercise(**{**one, "same_as": tuple(one["same_as"])}) for one in data["exercises"]
        )
        helpers = tuple((label, text, before) for label, text, before in data["helpers"])
        return Graded(**{**data, "exercises": exercises, "helpers": helpers, "notes": tuple(data["notes"])})
