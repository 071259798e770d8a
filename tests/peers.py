"""Optional libraries that ours are compared with: present, or skipped with what to install."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def peer(name: str, *, install: str | None = None) -> ModuleType:
    """The module `name`, or a skip that says what to install; under LLMCOURSE_REQUIRE=all, a failure.

    `install` is the name pip knows where it differs from the module's. A peer that is installed but fails
    while it is imported raises its own error: that is a broken environment, not a missing library.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
    message = f"needs {name}; install {name} with: pip install {install or name}"
    if os.environ.get("LLMCOURSE_REQUIRE") == "all":
        pytest.fail(message)
    pytest.skip(message)
