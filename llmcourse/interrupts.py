"""Ctrl-C while modules are imported, where a library may swallow it and go on without what it was importing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """Keep Ctrl-C waiting until the block has ended, then raise KeyboardInterrupt; a second one ends the process.

    Does nothing where Ctrl-C is ignored or handled by somebody else, and in other threads than the main one.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main_thread:
        yield
        return
    waiting = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        waiting = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            raise KeyboardInterrupt
