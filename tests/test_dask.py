"""A class judged by dask workers: the gradebook of the pool, also when a worker is killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

distributed = pytest.importorskip("distributed")

from llmcourse import grader, grading, jail, pools  # noqa: E402
from llmcourse.gradebook import dump  # noqa: E402
from llmcourse.graded import Graded  # noqa: E402
from llmcourse.grading import Course, GradingError, grade  # noqa: E402
from llmcourse.pools import Cluster, PoolError, executor_of  # noqa: E402
from llmcourse.zygote import HarnessFault  # noqa: E402
from tests.classes import ASSIGNMENT, RIGHT, STUB, WRONG, course  # noqa: E402
from tests.jailed import needs_jail  # noqa: E402

pytestmark = needs_jail
CLASS = {
    "ann": RIGHT,
    "bob": WRONG,
    "cyd": STUB,
    **{f"s{n}": f"{RIGHT}  # {n}" for n in range(5)},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes on this machine."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=50
    ) as made:
        yield made


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOURSE_LESSONS", str(tmp_path / "lessons"))
    return course(tmp_path, CLASS)


def gradebook(root: Path) -> dict[str, Any]:
    return dump(root / "grading" / "gradebook.db")


@pytest.mark.slow
def test_a_cluster_gives_the_gradebook_of_one_machine_also_when_a_worker_is_killed(
    root: Path, cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = tmp_path_factory.mktemp("alone") / "course"
    Course(root).secret()
    shutil.copytree(root, alone)
    with ThreadPoolExecutor(1) as here:
        grade(Course(alone), ASSIGNMENT, executor=here, workers=1)
        here.submit(grader.close).result()

    killed: list[int] = []

    def tell(progress: grading.Progress) -> None:
        if progress.done == 2 and not killed:
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    with executor_of(cluster.scheduler_address) as executor:
        assert executor is not None and executor.size == 2
        outcome = grade(Course(root), ASSIGNMENT, executor=executor, tell=tell)
    assert len(killed) == 1
    assert outcome.failed == {} and outcome.judged == len(outcome.records) == len(CLASS)
    assert gradebook(root) == gradebook(alone)


class Client:
    """A client of a cluster as a test needs it: workers that say something about the jail, and tasks that end so."""

    scheduler = type("Scheduler", (), {"address": "tcp://10.0.0.1:8786"})

    def __init__(self, said: Any = None, ends: Any = None, workers: int = 1) -> None:
        self.said, self.ends, self.workers = said, ends, workers

    def nthreads(self) -> dict[str, int]:
        return {f"tcp://10.0.0.{n}:4000": 1 for n in range(2, 2 + self.workers)}

    def run(self, work: Any, *, on_error: str) -> dict[str, Any]:
        assert work is jail.refusal and on_error == "return"
        return dict.fromkeys(self.nthreads(), self.said)

    def get_executor(self, **options: Any) -> Any:
        return self

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.ends == "cancelled":
            future.cancel()
            future.set_running_or_notify_cancel()
        elif isinstance(self.ends, Exception):
            future.set_exception(self.ends)
        else:
            future.set_result(self.ends(*arguments))
        return future


def test_an_address_where_nobody_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "CONNECT_S", 0.3)
    for address in ("tcp://127.0.0.1:1", "nonsense", "carrier-pigeon://a:1"):
        told = f"expected a dask scheduler at {address}, found none"
        with pytest.raises(PoolError, match=told), executor_of(address):
            raise AssertionError("unreachable")


def test_a_scheduler_without_workers_is_told_and_not_waited_for() -> None:
    with pytest.raises(PoolError, match="expected workers at tcp://10.0.0.1:8786, found none"):
        Cluster(Client(workers=0))


def test_without_the_package_on_a_worker_nothing_is_judged(root: Path) -> None:
    client = Client(said=ModuleNotFoundError("No module named 'llmcourse'"))
    with pytest.raises(PoolError, match="expected this package on the worker .*install the same version"):
        grade(Course(root), ASSIGNMENT, executor=Cluster(client))


def test_the_jail_is_demanded_of_the_workers_and_not_of_this_machine(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GradingError, match=r"found none \(tcp://10.0.0.2:4000: no bubblewrap\)"):
        grade(Course(root), ASSIGNMENT, executor=Cluster(Client(said="no bubblewrap")))
    monkeypatch.setattr(jail, "missing", lambda: "this is a laptop")
    outcome = grade(Course(root), ASSIGNMENT, executor=Cluster(Client(ends=HarnessFault("it broke"))))
    assert "jail" in outcome.level and outcome.failed == dict.fromkeys(CLASS, "it broke")


@pytest.mark.parametrize("ends", ["cancelled", OSError("lost")], ids=["scheduler-gone", "connection-lost"])
def test_what_a_lost_cluster_leaves_is_told_by_student_and_nothing_hangs(root: Path, ends: Any) -> None:
    outcome = grade(Course(root), ASSIGNMENT, executor=Cluster(Client(ends=ends)))
    assert set(outcome.failed) == set(CLASS) and outcome.records == {}
    assert all("the workers that judged it have ended" in said for said in outcome.failed.values())


def test_a_worker_with_other_exercises_gives_no_grade(root: Path) -> None:
    def ends(work: Any, plan: Any, taken: Any) -> Graded:
        return Graded(taken.student, plan.assignment, "a key of another version")

    outcome = grade(Course(root), ASSIGNMENT, executor=Cluster(Client(ends=ends)))
    assert set(outcome.failed) == set(CLASS)
    assert all("install the same version on every machine" in said for said in outcome.failed.values())


def test_a_worker_with_several_threads_judges_one_at_a_time() -> None:
    inside, most = [], []

    def work() -> None:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(pools._alone, work) for _ in range(8)]:
            future.result()
    assert most == [1] * 8
