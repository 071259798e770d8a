"""Services of cases: objects in the judge's process, whose calls are authority because they are counted there.

A service is built from the case's `Rng`. `calls` names the methods a case may call; arguments and results are plain
data; a builtin exception it raises is raised in the case. `counts()` gives `{name: (counted, at most or None)}`.
Optional are `attributes`, a dict that is readable on the case's side, `begin()`, called before the item is begun
(with `pid` set to the process that runs it, where a service has that), and `observed(data)`, which gives, of what
the case reported, the observations that count: what a service saw is not the worker's to report.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

from llmcourse import wire
from llmcourse.wire import Data

Counts = dict[str, tuple[float | None, float | None]]
# How long all ranks wait, with nothing sent or received meanwhile, before that is called a deadlock: an answer may
# receive in one thread while another prepares what to send.
DEADLOCK_S = 0.3


class Service(Protocol):
    """What the harness asks of a service."""

    calls: tuple[str, ...]

    def counts(self) -> Counts: ...


class Link:
    """Connects the ranks of one exercise: each has `rank`, `world_size`, `send(to, data)` and `receive(source)`.

    Messages between two ranks arrive in order; `receive` waits. When every rank waits for a message that nobody has
    sent, each gets a ConnectionError. Counts what every rank sent, in bytes of the values and in messages.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._changed = threading.Condition()
        self._queues: dict[tuple[int, int], deque[Data]] = {
            (source, to): deque() for source in range(world_size) for to in range(world_size)
        }
        self._waiting = [0] * world_size
        self._ended: set[int] = set()
        self._steps = 0
        self._deadlocked = False
        self._sent_bytes = [0] * world_size
        self._messages = [0] * world_size

    def view(self, rank: int) -> LinkView:
        """The link as one rank sees it."""
        return LinkView(self, rank)

    def send(self, source: int, to: int, data: Data) -> None:
        """Queue a copy of the data; ValueError for a rank that is none, TypeError for what is not plain data."""
        self._check(source, to, f"rank {source} sends to rank {to}")
        sent = wire.copied(data)
        if wire.holds_opaque(sent):
            raise TypeError(
                f"rank {source} sends {type(data).__name__}; expected tensors, bytes, text, numbers or lists of them"
            )
        with self._changed:
            self._sent_bytes[source] += wire.payload_bytes(sent)
            self._messages[source] += 1
            self._queues[source, to].append(sent)
            self._steps += 1
            self._changed.notify_all()

    def receive(self, to: int, source: int) -> Data:
        """The next message from source to `to`; ConnectionError when none can come."""
        self._check(to, source, f"rank {to} receives from rank {source}")
        found = self._queues[source, to]
        with self._changed:
            self._waiting[to] += 1
            try:
                while not found:
                    if self._deadlocked:
                        raise ConnectionError("every rank waits for a message that no rank has sent")
                    if source in self._ended:
                        raise ConnectionError(f"rank {to} waits for rank {source}, which has stopped")
                    before = self._steps
                    if not self._changed.wait(DEADLOCK_S) and self._all_wait() and self._steps == before:
                        self._deadlocked = True
                        self._changed.notify_all()
            finally:
                self._waiting[to] -= 1
            self._steps += 1
            return found.popleft()

    def _check(self, rank: int, other: int, what: str) -> None:
        if type(other) is not int or not 0 <= other < self.world_size or other == rank:
            raise ValueError(f"{what}; expected another rank of 0..{self.world_size - 1}")

    def _all_wait(self) -> bool:
        return all(self._waiting[rank] or rank in self._ended for rank in range(self.world_size))

    def rank_ended(self, rank: int) -> None:
        """Wake whoever waits for a rank that will send nothing more."""
        with self._changed:
            self._ended.add(rank)
            self._changed.notify_all()

    def counts(self) -> Counts:
        return {
            "bytes sent by the busiest rank": (max(self._sent_bytes), None),
            "messages sent by the busiest rank": (max(self._messages), None),
        }


class LinkView:
    """One rank's end of a `Link`; what a case of several ranks gets as its argument `link`."""

    calls = ("send", "receive")

    def __init__(self, link: Link, rank: int) -> None:
        self._link = link
        self.rank, self.world_size = rank, link.world_size
        self.attributes = {"rank": rank, "world_size": link.world_size}

    def send(self, to: int, data: Data) -> None:
        """Send plain data to another rank; does not wait for it to be received."""
        self._link.send(self.rank, to, data)

    def receive(self, source: int) -> Data:
        """Wait for the next message of another rank; ConnectionError when it has stopped."""
        return self._link.receive(self.rank, source)
