"""The judge's hold on the process that workers are forked from. Imports no torch, so it can be started first of all.

While the zygote imports torch, the judge does: on two cores the second import costs nothing. The zygote lives in a
jail (`llmcourse.jail`) where the system has one; `level` says so, or why not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcourse import jail
from llmcourse.finding import folders

START_LIMIT_S = 120.0
# Collecting garbage while torch is imported takes 0.3 s and finds none.
START = "import gc; gc.disable(); from llmcourse.worker import main; main()"
START_IN_JAIL = f"from llmcourse.jail import prove; prove(); {START}"
IN_JAIL = "in a jail (bubblewrap)"
# What the import cells of lessons ask for, imported once in the zygote and not in each worker. No lesson, no answer.
MODULES = (
    "safetensors.numpy",
    "safetensors.torch",
    "llmcourse.checking",
    "llmcourse.counting",
    "llmcourse.figures",
    "llmcourse.machine",
    "llmcourse.model",
    "llmcourse.sizing",
    "llmcourse.widgets",
)


class HarnessFault(Exception):
    """The judge's own machinery or an exercise failed; never a learner's verdict."""


@dataclass(frozen=True)
class Forked:
    """A worker: its process id here, the one that the zygote knows it by, and the folder it lives in."""

    pid: int
    ticket: int
    folder: str


class Zygote:
    """A process that has torch imported and forks workers on request. A context manager; requests take turns.

    in_jail: True demands the jail (HarnessFault where there is none), False does without, None takes what there is.
    """

    def __init__(self, *, in_jail: bool | None = None) -> None:
        self._lock = threading.Lock()
        self._must_be_in_jail = in_jail is True
        self._why_none = "it was not asked for" if in_jail is False else jail.missing()
        self._ready = False
        if in_jail and self._why_none is not None:
            raise HarnessFault(f"no jail for answers: {self._why_none}")
        self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        root = str(Path(__file__).parents[1])
        if root != sysconfig.get_path("purelib"):  # a checkout that is not installed
            own["PYTHONPATH"] = root
        # -P: a learner's random.py in the current folder is not Python's.
        program = [sys.executable, "-P", "-c", START, str(theirs.fileno()), *MODULES]
        self._heard = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the zygote
        if self._why_none is None:
            program[3] = START_IN_JAIL
            program = jail.command(program, [str(folder) for folder in folders()])
            environment = jail.environment(own)
        else:
            path = os.pathsep.join(filter(None, [own.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, **own, **({"PYTHONPATH": path} if path else {})}
        self.process = subprocess.Popen(
            program,
            pass_fds=(theirs.fileno(),),
            env=environment,
            start_new_session=True,
            stderr=self._heard if self._why_none is None else None,
        )
        theirs.close()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the zygote, and with it every worker. Calling it again does nothing."""
        self._control.close()
        if not self._ready:  # it may be importing still, and has forked nobody
            self.process.kill()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._heard.close()

    @property
    def in_jail(self) -> bool:
        """Whether workers are in the jail; waits until that is known."""
        with self._lock:
            self._wait_until_ready()
            return self._why_none is None

    @property
    def level(self) -> str:
        """How answers are kept apart, in words for whoever reads a report; waits until it is known."""
        if self.in_jail:
            return IN_JAIL
        return f"without a jail: {self._why_none}"

    def _wait_until_ready(self) -> None:
        """Hear from the zygote once; without a jail, where none is demanded, when the system refuses one."""
        if self._ready:
            return
        said = self._received()
        if not said.startswith(b"ready") and self._why_none is None:
            self.process.wait()
            self._why_none = said.decode(errors="replace") or self._last_words() or "bubblewrap failed"
            if self._must_be_in_jail:
                raise HarnessFault(f"no jail for answers: {self._why_none}")
            self._control.close()
            self._heard.close()
            self._start()
            said = self._received()
        self._ready = said.startswith(b"ready")

    def _last_words(self) -> str:
        """The last line that came out of the jail's stderr."""
        self._heard.seek(0)
        lines = self._heard.read().decode(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def _received(self) -> bytes:
        self._control.settimeout(START_LIMIT_S)
        try:
            return self._control.recv(4096)
        except OSError:  # a timeout, or a connection that is gone
            return b""

    def _ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """The zygote's answer to a request; HarnessFault when it gives none."""
        with self._lock:
            raw = b""
            self._wait_until_ready()
            with contextlib.suppress(OSError):
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
                raw = self._received()
            if not raw:
                said = f": {heard}" if (heard := self._last_words()) else ""
                raise HarnessFault(f"the zygote gave no answer (exit status {self.process.poll()}){said}")
            answer: dict[str, Any] = json.loads(raw)
            return answer

    def preload(self, module: str) -> None:
        """Import a module that workers would otherwise import one by one."""
        self._ask({"import": module})

    def cpu_seconds(self) -> float:
        """What the zygote and every worker that has ended took of the processors until now."""
        return float(self._ask({"cpu": True})["seconds"])

    def fork(
        self,
        ours: socket.socket,
        theirs: socket.socket,
        folder: str,
        *,
        max_data_bytes: int,
        closed: Sequence[str] | None = None,
        forbid: Sequence[str] = (),
        alone: bool = False,
    ) -> Forked:
        """A new worker that serves the connection `theirs` and lives in `folder`, in the jail in one of its own.

        closed: files and folders that it may not read; None for one of our own. max_data_bytes: of each of its
        processes, and in the jail of all of them together. forbid: what it will switch off. alone: in the
        jail it starts no other process.
        """
        request = {
            "fork": folder,
            "max_data_bytes": max_data_bytes,
            "closed": closed,
            "forbid": list(forbid),
            "alone": alone,
        }
        if not self.in_jail:
            pid = int(self._ask(request, [theirs.fileno()])["pid"])
            return Forked(pid, pid, folder)
        jail.expect_hello(ours)
        ticket = int(self._ask(request, [theirs.fileno()])["pid"])
        theirs.close()  # or nobody would notice that the worker has gone
        try:
            return Forked(jail.hear_hello(ours, START_LIMIT_S), ticket, jail.FOLDER)
        except OSError as error:
            _, why = self._waited(ticket)
            raise HarnessFault(f"no worker came up in the jail: {why or error}") from error

    def end(self, forked: Forked) -> tuple[int, str]:
        """Kill a worker and all it started, and wait for it: (its wait status, what the zygote has to say of it)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(forked.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(forked.pid, signal.SIGKILL)
        return self._waited(forked.ticket)

    def _waited(self, ticket: int) -> tuple[int, str]:
        answer = self._ask({"wait": ticket})
        return int(answer["status"]), str(answer["why"])
