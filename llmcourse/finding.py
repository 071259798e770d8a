"""Where exercises lie: the course's own folder and those of LLMCOURSE_LESSONS. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

LESSONS = Path(__file__).parent / "lessons"


def folders() -> list[Path]:
    """Folders that hold `topic/exercise.py`: the course's own, then those of LLMCOURSE_LESSONS."""
    extra = [Path(part) for part in os.environ.get("LLMCOURSE_LESSONS", "").split(os.pathsep) if part]
    for folder in extra:
        if not folder.is_dir():
            raise ValueError(
                f"LLMCOURSE_LESSONS names {folder}, which is not a folder; expected topic/exercise.py in it"
            )
    return [LESSONS, *extra]


def exercise_paths() -> dict[str, Path]:
    """Every exercise's name and file; ValueError when two files have one name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*/*.py")):
            if path.stem.startswith("_"):
                continue
            if path.stem in found:
                raise ValueError(
                    f"two exercises are named {path.stem}: {found[path.stem]} and {path}; rename one"
                )
            found[path.stem] = path
    return found
