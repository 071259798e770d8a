"""Ctrl-C that is held back while modules are imported."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from llmcourse import interrupts


@pytest.fixture(autouse=True)
def default(monkeypatch):
    """Python's own handler, whatever the tests were started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_the_block_and_is_raised_there():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        done.append("went on")
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_does_not_hide_it():
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        raise ImportError("half imported")


def test_without_ctrl_c_nothing_is_raised_and_the_handler_is_back():
    with interrupts.held():
        pass
    with pytest.raises(ZeroDivisionError), interrupts.held():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_ends_the_process():
    code = """
import signal
from llmcourse import interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
with interrupts.held():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_handler_of_somebody_else_and_other_threads_are_left_alone():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.held():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    found = []

    def held_here() -> None:
        with interrupts.held():
            found.append(signal.getsignal(signal.SIGINT))

    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=held_here)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
