"""The judge's hold on the process that workers are forked from. Imports no torch, so it can be started first of all.

While the zygote imports torch, the judge does: on two cores the second import costs nothing.
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
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

START_LIMIT_S = 120.0
# Collecting garbage while torch is imported takes 0.3 s and finds none.
START = "import gc; gc.disable(); from llmcourse.worker import main; main()"
# What the import cells of lessons ask for, imported once in the zygote and not in each worker. No lesson, no answer.
MODULES = (
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


class Zygote:
    """A process that has torch imported and forks workers on request. A context manager; requests take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        root = str(Path(__file__).parents[1])
        if root != sysconfig.get_path("purelib"):  # a checkout that is not installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            # -P: a learner's random.py in the current folder is not Python's.
            [sys.executable, "-P", "-c", START, str(theirs.fileno()), *MODULES],
            pass_fds=(theirs.fileno(),),
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self._ready = False

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

    def _ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """The zygote's answer to a request; HarnessFault when it gives none."""
        with self._lock:
            self._control.settimeout(START_LIMIT_S)
            try:
                if not self._ready:
                    self._ready = self._control.recv(4096) == b"ready"
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
                raw = self._control.recv(4096)
            except OSError:  # a timeout, or a connection that is gone
                raw = b""
            if not raw:
                raise HarnessFault(f"the zygote gave no answer (exit status {self.process.poll()})")
            answer: dict[str, Any] = json.loads(raw)
            return answer

    def preload(self, module: str) -> None:
        """Import a module that workers would otherwise import one by one."""
        self._ask({"import": module})

    def fork(
        self,
        connection: socket.socket,
        folder: str,
        *,
        max_data_bytes: int,
        closed: Sequence[str] | None = None,
    ) -> int:
        """A new worker that serves `connection` and lives in `folder`; its process id.

        closed: files and folders that it may not read; None for one of our own.
        """
        request = {"fork": folder, "max_data_bytes": max_data_bytes, "closed": closed}
        return int(self._ask(request, [connection.fileno()])["pid"])

    def end(self, pid: int) -> int:
        """Kill a worker's process group and wait for it; its wait status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return int(self._ask({"wait": pid})["status"])
