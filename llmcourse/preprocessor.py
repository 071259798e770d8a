"""The jailed judge in nbgrader's own `nbgrader autograde`, which the button of formgrader runs too.

    c.Autograde.autograde_preprocessors = [
        "llmcourse.preprocessor.JudgeInJail",       # in the place of Execute
        ...,
        "llmcourse.preprocessor.SaveVerdicts",      # in the place of SaveAutoGrades
    ]

No notebook is executed. What was handed in is taken from `grading/submitted` as data and judged as `llmcourse grade`
judges it: same plan, same records, so whichever comes first does the work. The autograded notebook is the teacher's,
with the student's text in it; nothing else of the file that nbgrader copied is kept.

What this way does not protect from is what nbgrader does before: it follows links in a student's folder and copies all
that lies there, as you, and parses the notebook without a bound. A notebook that it cannot parse has no score, where
`llmcourse grade` gives 0 and says why. For a class that you do not know, `llmcourse grade` is the safe way.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.preprocessors import NbGraderPreprocessor, SaveAutoGrades
from traitlets import Bool

from llmcourse import grading, intake, rebuilding
from llmcourse.gradebook import automatic_scores, waiting
from llmcourse.grading import Course, GradingError

JUDGED = "llmcourse_waiting"  # in nbgrader's resources: cells that a teacher has to look at, once there is a verdict


class JudgeInJail(NbGraderPreprocessor):
    """Puts in the submission's place the notebook that its verdict makes; GradingError where there can be none."""

    insecure = Bool(False, help="Judge even where there is no jail for students' code.").tag(config=True)

    def preprocess(
        self, notebook: NotebookNode, resources: dict[str, Any]
    ) -> tuple[NotebookNode, dict[str, Any]]:
        about = resources["nbgrader"]
        course = self._course(about)
        try:
            with grading.opened(course, about["assignment"], insecure=self.insecure) as run:
                graded = run.one(about["student"])
                rebuilt = rebuilding.rebuild(run.notebook, graded)
                folder = course.output("autograded", graded.student, graded.assignment, "").parent
                run.leave_for_exchange(folder, graded)
        except (GradingError, intake.IntakeError) as error:
            self.log.error("%s", error)
            raise
        for note in run.outcome.notes:
            self.log.warning("%s", note)
        resources[JUDGED] = waiting(graded, rebuilt)
        earned = sum(exercise.points for exercise in graded.exercises if not exercise.extension)
        self.log.info("%s: %s", about["student"], graded.refused or f"{earned:g} points on the judge's scale")
        return rebuilt, resources

    def _course(self, about: dict[str, Any]) -> Course:
        """The course that nbgrader works in; GradingError where its folders or names are not those of this one."""
        folders = self.parent.parent.coursedir  # the exporter's converter knows it
        course = Course(Path(folders.root))
        place = folders.format_path(folders.submitted_directory, about["student"], about["assignment"])
        expected = course.submitted / about["student"] / about["assignment"]
        if os.path.abspath(course.root / place) != os.path.abspath(expected):
            raise GradingError(
                f"expected submissions in {expected}, found them in {place}; "
                "keep the folders as the course's nbgrader_config.py has them"
            )
        if about["notebook"] != about["assignment"]:
            raise GradingError(
                f"expected {about['assignment']}.ipynb, found {about['notebook']}.ipynb; "
                "an assignment is one notebook of the same name"
            )
        return course


class SaveVerdicts(SaveAutoGrades):
    """nbgrader's own step that saves scores, which also leaves to the teacher what a verdict leaves to them.

    nbgrader gives full marks to a check without an output. Here it waits for the teacher, and without a verdict
    nothing is saved at all.
    """

    def preprocess(
        self, notebook: NotebookNode, resources: dict[str, Any]
    ) -> tuple[NotebookNode, dict[str, Any]]:
        if JUDGED not in resources:
            raise GradingError(
                "expected a verdict to save, found none; put JudgeInJail before SaveVerdicts, and leave it enabled"
            )
        notebook, resources = super().preprocess(notebook, resources)
        unjudged = {name for name, score in automatic_scores(notebook).items() if score is None}
        about = resources["nbgrader"]
        with Gradebook(about["db_url"]) as gradebook:
            for name in sorted(unjudged | resources[JUDGED]):
                grade = gradebook.find_grade(name, about["notebook"], about["assignment"], about["student"])
                grade.needs_manual_grade = True
                if name in unjudged:
                    grade.auto_score = None
            gradebook.db.commit()
        return notebook, resources
