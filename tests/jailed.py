"""The mark of tests that judge in the jail: skipped where there is none, and a failure where nothing may be skipped."""

from __future__ import annotations

import os

import pytest

from llmcourse import jail

needs_jail = pytest.mark.skipif(
    jail.missing() is not None and not os.environ.get("LLMCOURSE_REQUIRE"),
    reason=f"no jail: {jail.missing()}",
)
