"""Services of cases: objects in the judge's process, whose calls are authority because they are counted there.

A service is built from the case's `Rng`. `calls` names the methods a case may call; arguments and results are plain
data; a builtin exception it raises is raised in the case. `counts()` gives `{name: (counted, at most or None)}`; an
optional `attributes` dict is readable on the case's side; `stop()` is called when a process that uses it ended.
"""

from __future__ import annotations

import queue
from typing import Any, Protocol

from llmcourse import wire
from llmcourse.wire import Data

Counts = dict[str, tuple[float | None, float | None]]


class Service(Protocol):
    """What the harness asks of a service."""

    calls: tuple[str, ...]

    def counts(self) -> Counts: ...


class Link:
    """Connects the ranks of one exercise: each has `rank`, `world_size`, `send(to, data)` and `receive(source)`.

    Messages between two ranks arrive in order; `receive` waits. Counts what every rank sent, in bytes of tensors
    and blobs, and in messages.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._queues: dict[tuple[int, int], queue.SimpleQueue[Any]] = {
            (source, to): queue.SimpleQueue() for source in range(world_size) for to in range(world_size)
        }
        self._sent_bytes = [0] * world_size
        self._messages = [0] * world_size

    def view(self, rank: int) -> LinkView:
        """The link as one rank sees it."""
        return LinkView(self, rank)

    def send(self, source: int, to: int, data: Data) -> None:
        if not 0 <= to < self.world_size or to == source:
            raise ValueError(
                f"rank {source} sends to rank {to}; expected another rank of 0..{self.world_size - 1}"
            )
        encoder = wire.Encoder()
        encoder.encode(data)
        self._sent_bytes[source] += sum(map(len, encoder.blobs))
        self._messages[source] += 1
        self._queues[source, to].put(wire.copied(data))

    def receive(self, to: int, source: int) -> Data:
        if not 0 <= source < self.world_size or to == source:
            raise ValueError(
                f"rank {to} receives from rank {source}; expected another rank of 0..{self.world_size - 1}"
            )
        found = self._queues[source, to].get()
        if found is self:
            raise ConnectionError(f"rank {to} waits for rank {source}, which has stopped")
        return found

    def rank_ended(self, rank: int) -> None:
        """Wake whoever waits for a rank that will send nothing more."""
        for to in range(self.world_size):
            self._queues[rank, to].put(self)

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
