"""Where exercises are looked for, and what is refused there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmcourse import finding


def exercise(folder: Path, name: str) -> Path:
    path = folder / "numbers" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_exercises_of_the_course_and_of_another_folder_are_found_and_shared_code_is_none(
    tmp_path, monkeypatch
):
    own = exercise(tmp_path, "doubled_number")
    exercise(tmp_path, "_shared")
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path))
    found = finding.exercise_paths()
    assert found["doubled_number"] == own and found["read_header"].is_relative_to(finding.LESSONS)
    assert "_shared" not in found


def test_a_folder_that_is_none_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_LESSONS", os.pathsep.join([str(tmp_path), str(tmp_path / "gone")]))
    with pytest.raises(ValueError, match="gone, which is not a folder"):
        finding.exercise_paths()


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        exercise(folder, "tripled_number")
    monkeypatch.setenv("LLMCOURSE_LESSONS", os.pathsep.join(map(str, folders)))
    with pytest.raises(ValueError, match="two exercises are named tripled_number"):
        finding.exercise_paths()
