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
        # os.scandir and not Path.glob: every verdict asks for this.
        with os.scandir(folder) as entries:
            topics = sorted(entry.name for entry in entries if entry.is_dir())
        for topic in topics:
            for file in sorted(os.listdir(folder / topic)):
                name, suffix = os.path.splitext(file)
                if suffix != ".py" or name.startswith("_"):
                    continue
                path = folder / topic / file
                if name in found:
                    raise ValueError(f"two exercises are named {name}: {found[name]} and {path}; rename one")
                found[name] = path
    return found
