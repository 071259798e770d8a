"""Who judges a class's submissions: processes of this machine, or the workers of a dask.distributed scheduler.

A pool outlives what judges in it: when a process ends, what was in work is handed out again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from llmcourse import jail

ATTEMPTS = 3  # of a submission while a judging process ended, its own or another
CONNECT_S = 10


class PoolError(Exception):
    """Nobody is there to judge: one line that says what was expected, what came and what to do."""


class Cluster(Executor):
    """The workers of a dask.distributed scheduler. PoolError where there are none, or none with this package."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._workers = client.get_executor(pure=False, retries=ATTEMPTS)
        if not client.nthreads():
            address = client.scheduler.address
            raise PoolError(
                f"expected workers at {address}, found none; start one a core: dask worker {address} --nthreads 1"
            )

    @property
    def size(self) -> int:
        """Worker processes that there are now."""
        return len(self._client.nthreads()) or 1

    def refusal(self) -> str | None:
        """Why answers cannot be jailed on one of the workers; None where they can on all."""
        for worker, said in self._client.run(jail.refusal, on_error="return").items():
            if isinstance(said, BaseException):
                raise PoolError(
                    f"expected this package on the worker {worker}, found: {said}; install the same version there"
                )
            if said is not None:
                return f"{worker}: {said}"
        return None

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        from distributed import KilledWorker

        future: Future[Any] = Future()

        def ended(done: Future[Any]) -> None:
            error = ConnectionError("the scheduler is gone") if done.cancelled() else done.exception()
            if error is None:
                future.set_result(done.result())
            elif isinstance(error, KilledWorker | OSError):
                broken = BrokenExecutor(f"the workers that judged it have ended ({type(error).__name__})")
                broken.__cause__ = error
                future.set_exception(broken)
            else:
                future.set_exception(error)

        self._workers.submit(_alone, work, *arguments, **options).add_done_callback(ended)
        return future


_in_this_process = threading.Lock()


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do some work, one at a time in a process: a worker may have several threads, its engine has one."""
    with _in_this_process:
        return work(*arguments)


@contextlib.contextmanager
def executor_of(address: str | None) -> Iterator[Cluster | None]:
    """The workers of a dask.distributed scheduler, as an executor; None where there is no address."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise PoolError(
            "expected dask.distributed for --dask, found none; install it with: pip install 'llmcourse[dask]'"
        ) from error
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        said = str(error) or type(error).__name__
        raise PoolError(
            f"expected a dask scheduler at {address}, found none ({said}); start one with `dask scheduler`, "
            "and give the address that it prints"
        ) from error
    with client:
        yield Cluster(client)


class Pool:
    """Judging processes. When one ends, what was in work is handed out again."""

    def __init__(self, size: int, make: Callable[[], Executor]) -> None:
        self.size, self._make = size, make
        self._executor = make()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._start(future, work, arguments, 1)
        return future

    def _start(
        self, future: Future[Any], work: Callable[..., Any], arguments: tuple[Any, ...], attempt: int
    ) -> None:
        executor = self._executor
        try:
            inner = executor.submit(work, *arguments)
        except BrokenExecutor:
            self._renew(executor)
            inner = self._executor.submit(work, *arguments)

        def ended(done: Future[Any]) -> None:
            error = BrokenExecutor("given up unfinished") if done.cancelled() else done.exception()
            if isinstance(error, BrokenExecutor) and attempt < ATTEMPTS:
                self._renew(executor)
                self._start(future, work, arguments, attempt + 1)
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())

        inner.add_done_callback(ended)

    _renewing = threading.Lock()

    def _renew(self, broken: Executor) -> None:
        with self._renewing:
            if self._executor is broken:
                self._executor = self._make()

    def finished(self, waiting: Collection[Future[Any]]) -> set[Future[Any]]:
        """Those that have ended, once there is one."""
        return set(wait(waiting, return_when=FIRST_COMPLETED)[0])

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def opened_pool(given: Executor | None, workers: int | None) -> Iterator[Pool]:
    size = workers or (given.size if isinstance(given, Cluster) else _cores())
    pool = Pool(size, lambda: given) if given is not None else Pool(size, lambda: _processes(size))
    try:
        yield pool
    finally:
        if given is None:
            pool.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes(size: int) -> Executor:
    # Started anew and not forked: a fork of a process with threads, as torch's, deadlocks.
    return ProcessPoolExecutor(
        size, mp_context=get_context("spawn"), initializer=_follow, initargs=(os.getpid(),)
    )


def _follow(parent: int) -> None:
    """End this process when the one that writes has ended, however that came."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
