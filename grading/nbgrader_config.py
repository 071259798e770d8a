"""nbgrader's settings for this course. nbgrader finds them by itself in the folder it is started from:

    cd grading && nbgrader generate_assignment 01_parameter_loading --force

From elsewhere name them, without the suffix: `nbgrader … --NbGrader.config_file=grading/nbgrader_config` (the shorter
`--config` does nothing in nbgrader 0.9). `make notebooks` reads the same file, with a root of its own and no gradebook,
so what a teacher generates here is byte for byte what the repository holds.
"""

import os
import shutil
import sys
from pathlib import Path

from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    IgnorePattern,
    LimitOutput,
    NbGraderPreprocessor,
)

c = get_config()  # noqa: F821 (nbgrader puts it here)
ROOT = Path(__file__).resolve().parents[1]

# nbgrader starts `alembic` by its bare name, which a virtual environment that was not activated does not have.
if shutil.which("alembic") is None:
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )


class DropBuildRecord(NbGraderPreprocessor):
    """Leave out of a student's notebook what the instructor's was executed from: it changes with every edit of ours."""

    def preprocess(self, nb, resources):
        nb.metadata.pop("llmcourse", None)
        return nb, resources


c.CourseDirectory.course_id = "llmcourse"
c.CourseDirectory.root = str(ROOT)

# solutions/NN_topic -> notebooks/NN_topic -> grading/submitted/STUDENT/NN_topic -> grading/autograded, grading/feedback
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "notebooks"
for step in ("source_with_tests", "submitted", "autograded", "feedback", "solution"):
    setattr(c.CourseDirectory, f"{step}_directory", f"grading/{step}")

# The gradebook belongs to the teacher: neither the build nor a test opens it.
c.CourseDirectory.db_url = f"sqlite:///{ROOT / 'grading' / 'gradebook.db'}"

# nbgrader copies every file beside a notebook to the students unless it is named here.
c.CourseDirectory.ignore = [
    ".ipynb_checkpoints",
    "__pycache__",
    "*.pyc",
    ".*",
    "*.md",
    "*.toml",
]

# What stands where the solution was. An exercise that still raises it is "not attempted", and earns 0.
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.GenerateAssignment.preprocessors.append(DropBuildRecord)

# No submission is executed: `nbgrader autograde`, and formgrader's button, ask the jailed judge of `llmcourse grade`.
# What it does not protect from, as nbgrader does it before: see llmcourse/preprocessor.py.
c.Autograde.autograde_preprocessors = [
    "llmcourse.preprocessor.JudgeInJail",  # by name, so that reading this file does not need the package
    IgnorePattern,
    ClearMetadataPreprocessor,
    LimitOutput,
    "llmcourse.preprocessor.SaveVerdicts",
    AssignLatePenalties,
    CheckCellMetadata,
]

# Where a teacher goes back to nbgrader's own Execute: a lesson's longest cell on a slow laptop.
c.Execute.timeout = 600

# A deleted check cell would leave its score empty and wait for a person; put back, it is graded like any other.
c.OverwriteCells.add_missing_cells = True
