"""A graded course on how the parameters of large language models are stored, loaded, trained and served.

A notebook needs two names: `check(answer)` judges an answer, `hint(answer)` unfolds one hint at a time. Both
are looked up on first use, so that importing this package loads neither torch nor the judge.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from llmcourse.checking import check, hint

__version__ = "0.1.0"
__all__ = ["check", "hint", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("check", "hint"):
        from llmcourse import checking

        return getattr(checking, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
