"""Seeds that differ between runs and are printed on failure, and the skip of `gpu` tests where there is none."""

from __future__ import annotations

import secrets
from collections.abc import Generator

import pytest

DRAWN_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="use this seed instead of a drawn one")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for each test; a failure prints it, and `--seed` repeats it."""
    given = request.config.getoption("--seed")
    drawn = secrets.randbits(32) if given is None else given
    request.node.stash[DRAWN_SEED] = drawn
    return drawn


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    drawn = item.stash.get(DRAWN_SEED, None)
    if drawn is not None and report.failed:
        report.sections.append(("seed", f"drawn seed {drawn}; repeat with --seed {drawn}"))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
