"""Runs answers in workers: starts the zygote, forks a worker per answer, speaks the wire protocol, keeps time.

    with Engine() as engine:
        expected = engine.expected(exercise, seed)
        verdict = judge(engine, exercise, answer, seed, expected)

The judge never forks. Whatever an answer does ends as an `Outcome`; a fault of the machinery is a `HarnessFault`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import marshal
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcourse import racing, source, wire
from llmcourse.counting import is_running
from llmcourse.exercise import Exercise, Item, Race, derive_seed
from llmcourse.finding import LESSONS, folders
from llmcourse.judging import (
    Outcome,
    answer_seed,
    expectations,
    item_seed,
    limit_s,
    outcome_of,
    saved_by,
    seen_by,
    service_for,
    together,
    with_earlier_phases,
)
from llmcourse.racing import RaceResult
from llmcourse.services import Link
from llmcourse.track import Lane, Stumbled, cpu_clock, fallen, run_race
from llmcourse.wall import CASES, ENGINE_FOLDER
from llmcourse.zygote import Forked, HarnessFault, Zygote

LOAD_LIMIT_S, REFERENCE_LIMIT_S = 10.0, 60.0
IDLE_THREADS = 2  # of a worker: one runs the answer, one reads what it is sent
CHEAP_S = 0.01  # an item that costs less than another worker would
LINE_UP_LIMIT_S, LAP_LIMIT_S = 30.0, 5.0
MAX_TRUSTED_BYTES = 1 << 31
MAX_LAP_BYTES = 1 << 24
MAX_DATA_BYTES = 6 << 30
ROOM_BYTES = (
    128 << 20
)  # the largest cases write files of 32 MiB, in two workers at once; an answer may keep copies
SLACK_BYTES, SLACK_FACTOR = 1 << 16, 4
MAX_CALLS = 256
ERROR_KINDS = ("raised", "not written", "missing")
MAX_TEXTS, MAX_TEXT_CHARS = 64, 600
MAX_FOUND_NAMES = 12
MAX_LEFT_OUT = 20  # parts of one notebook that hang, at the whole limit each


@dataclass(frozen=True)
class Answer:
    """Source text of an answer: parts are (label, text), run in order in one module; `name` is what is judged.

    own: label of the part that should define it (another part that hangs or kills is left out); trusted: the
    course's own answer, which may import lessons.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    own: str | None = None
    trusted: bool = False


@dataclass(frozen=True)
class Loaded:
    """How loading an answer ended: `stopped` is the index of the part that hung or killed the worker."""

    names: tuple[str, ...] = ()
    errors: tuple[Mapping[str, Any], ...] = ()
    stopped: int | None = None
    why: str = ""


class WorkerProcess:
    """The judge's end of one worker."""

    def __init__(
        self, engine: Engine, exercise: Exercise, answer: Answer, seed: int, *, alone: bool = False
    ) -> None:
        self._engine, self._exercise, self._answer, self._seed = engine, exercise, answer, seed
        self._sending = threading.Lock()
        self._calls = threading.Semaphore(MAX_CALLS)
        self._items = 0
        self._loaded: Loaded | None = None
        # A call may wait for another, as `receive` for `send`: as many threads as calls may be under way.
        self._servers = ThreadPoolExecutor(max_workers=MAX_CALLS)
        self.folder = tempfile.mkdtemp(prefix="llmcourse-", dir=engine.folder)
        self._connection, theirs = socket.socketpair()
        closed = None if answer.trusted else [*course_places(exercise), *engine.closed]
        self.forked: Forked | None = engine.zygote.fork(
            self._connection,
            theirs,
            self.folder,
            max_data_bytes=MAX_DATA_BYTES,
            closed=closed,
            forbid=exercise.forbid,
            alone=alone,
        )
        self.pid, self.lives_in = self.forked.pid, self.forked.folder
        theirs.close()

    def load(self, cases: str) -> Loaded:
        """Run the answer's source, once, and load the cases of the exercise; wait until both are done."""
        if self._loaded is None:
            loaded = self._load_parts()
            if loaded.stopped is not None:
                return loaded
            self._loaded = loaded
        return self._load_cases(cases, self._loaded)

    def turn_to(self, exercise: Exercise, answer: Answer) -> None:
        """Judge another exercise of the same source from now on, which forbids the same; its cases are to be loaded."""
        self._exercise, self._answer = exercise, answer

    def _load_parts(self) -> Loaded:
        last = -1
        deadline = time.monotonic() + (REFERENCE_LIMIT_S if self._answer.trusted else LOAD_LIMIT_S)
        try:
            wire.send(
                self._connection,
                {
                    "do": "load",
                    "parts": self._answer.parts,
                    "trusted": self._answer.trusted,
                    "forbid": self._exercise.forbid,
                    # Importing the library again would bring back what is switched off.
                    "closed": [
                        *course_places(self._exercise),
                        *files_of(owners_of(self._exercise.forbid)),
                        *self._engine.closed,
                    ],
                    # Not the seed itself: every input of a class could be computed from it.
                    "seed": derive_seed(self._seed, "load"),
                },
                deadline=deadline,
            )
            while True:
                message, _ = wire.receive(self._connection, max_bytes=1 << 20, deadline=deadline)
                if type(message.get("part")) is int and message["part"] == last + 1:
                    last += 1
                elif message.get("loaded") is True:
                    break
                else:
                    raise wire.ProtocolError("neither progress nor the end of loading")
        except TimeoutError:
            return Loaded(stopped=last, why=f"it ran for more than {LOAD_LIMIT_S:.0f} s")
        except (wire.Ended, wire.ProtocolError) as error:
            return Loaded(stopped=last, why=self.ending(error))
        if message.get("case_error") is not None:
            return self._stopped_after_all(f"the cases cannot be loaded: {message['case_error']}")
        try:
            errors = tuple(one for one in map(clean_error, listed(message.get("errors"))) if one is not None)
            return Loaded(names=texts(message.get("names")), errors=errors)
        except wire.ProtocolError as error:
            return self._stopped_after_all(self.ending(error))

    def _load_cases(self, cases: str, loaded: Loaded) -> Loaded:
        message = {
            "do": "cases",
            "cases": cases,
            # As text: what an answer has done to Python by now may have spoilt how bytes are received.
            "code": compiled(cases),
            "uses": self._exercise.uses,
            "seed": derive_seed(self._seed, "load"),
        }
        deadline = time.monotonic() + (REFERENCE_LIMIT_S if self._answer.trusted else LOAD_LIMIT_S)
        try:
            wire.send(self._connection, message, deadline=deadline)
            reply, _ = wire.receive(self._connection, max_bytes=1 << 20, deadline=deadline)
        except TimeoutError:
            return self._stopped_after_all(f"it ran for more than {LOAD_LIMIT_S:.0f} s")
        except (wire.Ended, wire.ProtocolError) as error:
            return self._stopped_after_all(self.ending(error))
        if reply.get("loaded") is not True:
            return self._stopped_after_all("neither progress nor the end of loading")
        if reply.get("case_error") is not None:
            return self._stopped_after_all(f"the cases cannot be loaded: {reply['case_error']}")
        return loaded

    def _stopped_after_all(self, why: str) -> Loaded:
        """Behind the last part, of which none is to blame."""
        return Loaded(stopped=len(self._answer.parts), why=why)

    def run(
        self, item: Item, seeds: tuple[int, int], limit: float, max_bytes: int, service: Any, saved: Any
    ) -> Outcome:
        """Run one item; serve the calls it makes meanwhile."""
        self._items += 1
        message = {
            "do": "item",
            "item": item.name,
            "number": self._items,
            "answer": self._answer.name,
            "seed": seeds[0],
            "answer_seed": seeds[1],
            "mutates": self._exercise.mutates,
            "methods": list(service.calls) if service is not None else None,
            "attributes": getattr(service, "attributes", {}),
        }
        deadline = time.monotonic() + limit
        before_s = self._cpu_s()
        try:
            handed_on = {"saved": saved[1]} if saved[0] else None
            wire.send(self._connection, message, handed_on, deadline=deadline)
            while True:
                reply, data = wire.receive(self._connection, max_bytes=max_bytes, deadline=deadline)
                if "call" in reply:
                    if not self._calls.acquire(blocking=False):
                        raise wire.ProtocolError(f"more than {MAX_CALLS} calls at once")
                    # A thread that an earlier item left behind may still call; this item's service does not hear it.
                    current = reply.get("number") == self._items
                    self._servers.submit(self._serve, service if current else None, reply, data)
                    continue
                outcome = outcome_of(self._checked(reply), data.get("observed"), {})
                return replace(outcome, cpu_seconds=max(0.0, self._cpu_s() - before_s))
        except TimeoutError:
            return _failed("timed out", f"it ran for more than {limit:.1f} s", limit)
        except wire.ProtocolError as error:
            return _failed("protocol", str(error))
        except wire.Ended as error:
            return _failed("died", self.ending(error))

    def _cpu_s(self) -> float:
        """CPU seconds of the worker until now; 0 where the system does not say, or it has ended."""
        with contextlib.suppress(OSError):
            return clock() if (clock := cpu_clock(self.pid)) is not None else 0.0
        return 0.0

    def line_up(self, race: Race, contender: str, seeds: tuple[int, int], x: Any) -> None:
        """Set up this worker as a contender of a race: "answer", "reference", "baseline" or "no-op"."""
        ours = contender in ("baseline", "no-op")
        message = {
            "do": "line up",
            "race": race.name,
            "answer": race.baseline.__name__ if ours else self._answer.name,
            "is_ours": ours,
            "is_no_op": contender == "no-op",
            "seed": seeds[0],
            "answer_seed": seeds[1],
        }
        self._exchange(message, {"x": x}, LINE_UP_LIMIT_S)

    def lap(self, x: Any) -> Any:
        """Output of one lap of the race that this worker was lined up for; Stumbled when it gives none."""
        return self._exchange({"do": "lap"}, {"x": x}, LAP_LIMIT_S)

    def _exchange(self, message: dict[str, Any], data: dict[str, object], limit: float) -> Any:
        """Send one message, read the data of its reply; a contender of a race calls no service."""
        deadline = time.monotonic() + limit
        try:
            wire.send(self._connection, message, data, deadline=deadline)
            reply, received = wire.receive(self._connection, max_bytes=MAX_LAP_BYTES, deadline=deadline)
            error = self._checked(reply)["error"]
        except TimeoutError:
            raise Stumbled(f"it ran for more than {limit:.0f} s") from None
        except (wire.ProtocolError, wire.Ended) as problem:
            raise Stumbled(self.ending(problem)) from None
        if error is not None:
            raise Stumbled(f"{error.get('type', error['kind'])}: {error.get('message', '')}")
        return received.get("observed")

    def _checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        """What an answer's side says happened, nothing in it but what the protocol allows."""
        seconds = reply.get("seconds")
        timed = isinstance(seconds, int | float) and 0 <= seconds < 1e9
        if reply.get("done") is not True or not timed:
            raise wire.ProtocolError("not the end of an item")
        tried, changed = texts(reply.get("tried")), texts(reply.get("changed"))
        return {
            "seconds": seconds,
            "error": clean_error(reply.get("error")),
            "tried": tried,
            "changed": changed,
        }

    def _serve(self, service: Any, message: dict[str, Any], data: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"reply": message["call"]}
        result: dict[str, object] | None = None
        arguments = data.get("arguments")
        if service is None or message.get("method") not in service.calls or not isinstance(arguments, tuple):
            reply |= {
                "raises": "AttributeError",
                "message": f"this case offers no call {message.get('method')!r}",
            }
        else:
            try:
                result = {"result": getattr(service, message["method"])(*arguments)}
            except Exception as error:  # noqa: BLE001 - a service's refusal belongs to its caller
                base = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
                reply |= {"raises": base, "message": str(error)}
        # The worker may have been ended meanwhile; then nobody waits for this reply.
        with self._sending, contextlib.suppress(wire.Ended):
            wire.send(self._connection, reply, result)
        self._calls.release()

    def ending(self, error: Exception) -> str:
        status, why = self._ended()
        if isinstance(error, wire.ProtocolError):
            return str(error)
        if why == "memory":
            return f"it held more than {MAX_DATA_BYTES >> 30} GiB of memory"
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
            return signal.Signals(os.WTERMSIG(status)).name
        if os.WIFEXITED(status):
            return f"exit status {os.WEXITSTATUS(status)}"
        return "it was killed, or its connection closed"

    def _ended(self) -> tuple[int, str]:
        """End the worker, once: (its wait status, what the zygote has to say of it)."""
        forked, self.forked = self.forked, None
        return self._engine.zygote.end(forked) if forked is not None else (0, "")

    def is_idle(self) -> bool:
        """Whether it has its own two threads and nothing else that runs, as far as this system (Linux) says."""
        try:
            tasks = [*Path(f"/proc/{self.pid}/task").iterdir()]
            return len(tasks) == IDLE_THREADS and not any((task / "children").read_text() for task in tasks)
        except OSError:
            return False

    def close(self) -> None:
        """End the worker and everything it started; remove its folder."""
        try:
            self._ended()
        finally:
            self._servers.shutdown(wait=False, cancel_futures=True)
            self._connection.close()
            shutil.rmtree(self.folder, ignore_errors=True)


@functools.lru_cache(maxsize=256)
def compiled(cases: str) -> str:
    """Our own source as a worker runs it, in hex: compiled once for all workers, which are of this same Python."""
    return marshal.dumps(compile(cases, CASES, "exec", dont_inherit=True)).hex()


def listed(value: object) -> list[Any]:
    """The value if it is a list of moderate length; ProtocolError otherwise."""
    if type(value) is not list or len(value) > MAX_TEXTS:
        raise wire.ProtocolError("expected a short list")
    return value


def texts(value: object) -> tuple[str, ...]:
    """A short list of texts, made printable; ProtocolError for anything else."""
    if not all(type(text) is str for text in listed(value)):
        raise wire.ProtocolError("expected a list of texts")
    return tuple(wire.printable(text[:MAX_TEXT_CHARS]) for text in value)  # type: ignore[attr-defined]


def clean_error(error: Any) -> dict[str, Any] | None:
    """An error an answer's side reports, with the fields of its kind and no others; ProtocolError if it is not one."""
    if error is None:
        return None
    if type(error) is not dict or error.get("kind") not in ERROR_KINDS:
        raise wire.ProtocolError("an error of no known kind")
    cleaned: dict[str, Any] = {"kind": error["kind"]}
    for field in ("type", "message", "label"):
        if type(error.get(field)) is str:
            cleaned[field] = wire.printable(error[field][:MAX_TEXT_CHARS])
    if error["kind"] != "missing" and not {"type", "message"} <= set(cleaned):
        raise wire.ProtocolError("an error without type or message")
    if type(error.get("line")) is int:
        cleaned["line"] = error["line"]
    if error.get("signature") is not None:
        cleaned["signature"] = list(texts(error["signature"]))
    return cleaned


def check_room(folder: str) -> None:
    """HarnessFault where too little is free for the files that cases write: an answer would be blamed for that."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < ROOM_BYTES:
        raise HarnessFault(
            f"{folder} has {free_bytes >> 20:,} MiB free and the files of the cases need {ROOM_BYTES >> 20} MiB; free "
            "some, or set TMPDIR to a folder that has them"
        )


def _failed(kind: str, message: str, seconds: float = 0.0) -> Outcome:
    return Outcome(error={"kind": kind, "message": message}, seconds=seconds)


def course_places(exercise: Exercise) -> list[str]:
    """Where answers lie: the lessons, their texts, and our own modules of which a function is switched off."""
    repository = LESSONS.parents[1]
    ours = [name for name in owners_of(exercise.forbid) if name.startswith("llmcourse.")]
    return [
        *map(os.path.abspath, folders()),  # in the jail nothing is relative to the judge's folder
        *(str(repository / name) for name in ("solutions", ".git")),
        *files_of(ours),
    ]


def owners_of(forbid: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in forbid})


def files_of(modules: Sequence[str]) -> Iterator[str]:
    """Source and cache of modules; of one that does not exist the worker says so."""
    for name in modules:
        with contextlib.suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin is not None:
                yield from (spec.origin, importlib.util.cache_from_source(spec.origin))


def is_counted(exercise: Exercise) -> bool:
    """Whether it has costs that are counted of its process from outside."""
    return any(item.authority == "outside" for item in exercise.items.values())


class Company:
    """Workers of one notebook that may judge its next exercise as well, which spares loading the notebook again.

    Only for what gives the same alone: an exercise that is not right in company has to be judged once more.
    """

    def __init__(self, exercises: Sequence[Exercise]) -> None:
        self._to_come = Counter(exercise.forbid for exercise in exercises)
        self._counted = {exercise.forbid for exercise in exercises if is_counted(exercise)}
        self._waiting: dict[tuple[Any, ...], WorkerProcess] = {}
        self.was_there = False

    def take(self, key: tuple[Any, ...]) -> WorkerProcess | None:
        """A worker that has judged another exercise of this key; `was_there` says whether there was one."""
        found = self._waiting.pop(key, None)
        self.was_there = found is not None
        return found

    def leave(self, key: tuple[Any, ...], exercise: Exercise, worker: WorkerProcess) -> None:
        """The worker waits for an exercise to come, or is ended: if there is none, or if something still runs in it."""
        if self._to_come[exercise.forbid] > 0 and worker.is_idle():
            self._waiting[key] = worker
        else:
            worker.close()

    def is_counted(self, exercise: Exercise) -> bool:
        """Whether an exercise that it may share a worker with has costs that are counted from outside."""
        return exercise.forbid in self._counted

    def begin(self, exercise: Exercise) -> None:
        """It is this exercise's turn."""
        self._to_come[exercise.forbid] -= 1
        self.was_there = False

    def close(self) -> None:
        """End all that wait."""
        while self._waiting:
            self._waiting.popitem()[1].close()


class Engine:
    """Runs answers in workers forked from a zygote, its own unless given one. A context manager for one thread.

    closed: folders that answers may not read beside the course's own, such as one where references write. `left_out`
    says, of each part of an answer that was left out because it hung or killed its worker, why.
    """

    def __init__(
        self, *, preload: Sequence[str] = (), zygote: Zygote | None = None, closed: Sequence[str] = ()
    ) -> None:
        check_room(tempfile.gettempdir())
        self.folder = tempfile.mkdtemp(prefix=ENGINE_FOLDER)
        self.closed = tuple(closed)
        self.left_out: dict[str, str] = {}
        self._expected: dict[tuple[str, int], dict[str, Outcome]] = {}
        self._sizes_bytes: dict[tuple[str, str, int], int] = {}
        self._ours: dict[tuple[str, int, str], dict[str, Outcome]] = {}
        self.zygote = Zygote() if zygote is None else zygote
        for module in preload:
            self.zygote.preload(module)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the zygote, with it every worker, and remove the folder."""
        self.zygote.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ the runner's side

    def ours(self, exercise: Exercise, name: str) -> Answer:
        return Answer(name, ((str(exercise.path), exercise.source),), own=str(exercise.path), trusted=True)

    def expected(self, exercise: Exercise, seed: int) -> dict[str, Outcome]:
        """The reference's outcomes, computed once a seed."""
        key = (exercise.name, seed)
        if key not in self._expected:
            self._expected[key] = expectations(self, exercise, seed)
        return self._expected[key]

    def size_bytes(self, exercise: Exercise, item: Item, seed: int, expected: Outcome) -> int:
        """What the reference observed of an item takes on the wire, computed once a seed."""
        key = (exercise.name, item.name, seed)
        if key not in self._sizes_bytes:
            self._sizes_bytes[key] = wire.size_bytes(expected.observed)
        return self._sizes_bytes[key]

    def run(
        self,
        exercise: Exercise,
        answer: Any,
        items: Sequence[Item],
        seed: int,
        expected: Mapping[str, Outcome] | None,
        *,
        goes_on: Callable[[Item, Outcome], bool] = lambda item, outcome: True,
        company: Company | None = None,
    ) -> dict[str, Outcome]:
        """Outcomes of the items, as far as the answer gets; `goes_on` may end the run after any of them.

        company: in a worker that has judged other exercises of the same notebook, where there is one.
        """
        # The course's own wrong answers give the same for every learner of a seed.
        ours = answer.trusted and expected is not None and len(answer.parts) == 1
        known = self._ours.setdefault((exercise.name, seed, answer.name), {}) if ours else {}
        wanted = {item.name for item in items}
        if ours and expected is not None:  # what costs less than another worker is run along
            wanted |= {name for name, outcome in expected.items() if outcome.seconds < CHEAP_S}
            wanted = {
                item.name for item in with_earlier_phases(exercise, [exercise.items[n] for n in wanted])
            }
        missing = [item for item in exercise.items.values() if item.name in wanted - set(known)]
        if missing:
            known |= Run(self, exercise, answer, seed, expected, company).outcomes(missing, known, goes_on)
        return {item.name: known[item.name] for item in items if item.name in known}

    def race(self, exercise: Exercise, answer: Any, seed: int) -> RaceResult:
        """Race a right answer against our own, each contender in a worker of its own on one core."""
        assert exercise.race is not None
        hidden = [exercise.name, *exercise.mistakes, *exercise.alternatives]
        roots = [exercise.race.name, exercise.race.baseline.__name__]
        cases = source.case_source(exercise.source, roots, hidden, exercise.path)
        reference = self.ours(exercise, exercise.name)
        workers: dict[str, WorkerProcess] = {}
        try:
            for name in racing.NAMES:
                runs = answer if name == "answer" else reference
                # What another process did for it would be on no clock, and could slow down the others.
                workers[name] = WorkerProcess(self, exercise, runs, seed, alone=True)
                loaded = workers[name].load(cases)
                if loaded.stopped is not None:
                    return fallen(
                        exercise, name, f"while it was loaded again: {loaded.why}", exercise.race.keeps
                    )
            lanes = {
                name: Lane(functools.partial(worker.line_up, exercise.race, name), worker.lap, worker.pid)
                for name, worker in workers.items()
            }
            return run_race(exercise, lanes, seed)
        finally:
            for worker in workers.values():
                worker.close()


class Run:
    """One answer's items, each in a worker that is forked anew after a phase, a crash or a part that was left out."""

    def __init__(
        self,
        engine: Engine,
        exercise: Exercise,
        answer: Answer,
        seed: int,
        expected: Mapping[str, Outcome] | None,
        company: Company | None = None,
    ) -> None:
        self._engine, self._exercise, self._answer = engine, exercise, answer
        takes_several = exercise.ranks > 1 or any(item.after for item in exercise.items.values())
        self._company = None if takes_several else company
        self._seed, self._expected = seed, expected
        self._loaded = Loaded()
        self._workers: list[WorkerProcess] = []
        hidden = [exercise.name, *exercise.mistakes, *exercise.alternatives]
        self._cases = source.case_source(exercise.source, list(exercise.items), hidden, exercise.path)

    def outcomes(
        self, items: Sequence[Item], earlier: Mapping[str, Outcome], goes_on: Callable[[Item, Outcome], bool]
    ) -> dict[str, Outcome]:
        found: dict[str, Outcome] = dict(earlier)
        try:
            for item in items:
                saved = saved_by(item, found) if item.after else (False, None)
                if item.after and not saved[0]:
                    found[item.name] = _failed("not run", f"{item.after} saved nothing")
                    continue
                if item.after:
                    self._close()
                found[item.name] = self._one(item, saved)
                if item.after:
                    self._close()
                if found[item.name].kind in ("died", "timed out", "protocol"):
                    self._close()
                    break
                if not goes_on(item, found[item.name]):
                    break
            if self._company is not None and self._workers:
                self._company.leave(self._key, self._exercise, self._workers.pop())
        finally:
            self._close()
        return {name: outcome for name, outcome in found.items() if name not in earlier}

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers = []

    @property
    def _key(self) -> tuple[Any, ...]:
        """What two exercises must have in common to be judged in one worker."""
        return self._answer.parts, self._answer.trusted, self._exercise.forbid, self._seed

    def _one(self, item: Item, saved: tuple[bool, Any]) -> Outcome:
        if not self._workers:
            problem = self._start()
            if problem is not None:
                return problem
        expected = None if self._expected is None else self._expected[item.name]
        limit = REFERENCE_LIMIT_S if expected is None else limit_s(expected)
        max_bytes = MAX_TRUSTED_BYTES
        if not self._answer.trusted and expected is not None:
            max_bytes = SLACK_BYTES + SLACK_FACTOR * (
                self._engine.size_bytes(self._exercise, item, self._seed, expected)
                + self._service_bytes(item)
            )
        seeds = (
            item_seed(self._exercise, item, self._seed),
            answer_seed(self._exercise, item, self._seed, self._expected),
        )
        if self._exercise.ranks > 1:
            return self._ranks(item, seeds, limit, max_bytes)
        worker, before_s = self._workers[0], time.process_time()
        try:
            service = service_for(self._exercise, item, self._seed, worker.pid, worker.lives_in)
        except OSError as error:  # there is no such process to watch any more
            if is_running(worker.pid):
                raise
            return _failed("died", f"before this case: {worker.ending(error)}")
        outcome = seen_by(service, worker.run(item, seeds, limit, max_bytes, service, saved))
        return self._explained(replace(outcome, served_cpu_seconds=time.process_time() - before_s))

    def _service_bytes(self, item: Item) -> int:
        """Room for what a case may send to its service in one call."""
        return (1 << 24) if item.service is not None or self._exercise.ranks > 1 else 0

    def _ranks(self, item: Item, seeds: tuple[int, int], limit: float, max_bytes: int) -> Outcome:
        link = Link(self._exercise.ranks)
        found: list[Outcome] = [Outcome()] * self._exercise.ranks
        faults: list[HarnessFault] = []

        def one(rank: int) -> None:
            try:
                worker = self._workers[rank]
                found[rank] = worker.run(item, seeds, limit, max_bytes, link.view(rank), (False, None))
            except HarnessFault as fault:
                faults.append(fault)
            finally:
                link.rank_ended(rank)

        threads = [
            threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self._exercise.ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        return self._explained(together(found, link))

    def _start(self) -> Outcome | None:
        """Fork and load workers, a rank each; a part that stops loading is left out unless it is the answer's own."""
        while True:
            if not self._answer.trusted and len(self._engine.left_out) >= MAX_LEFT_OUT:
                return _failed(
                    "timed out", f"{MAX_LEFT_OUT} cells of this notebook hung or ended their process"
                )
            if self._company is not None and (kept := self._company.take(self._key)) is not None:
                kept.turn_to(self._exercise, self._answer)
                self._workers.append(kept)
            for _ in range(self._exercise.ranks - len(self._workers)):
                # What is counted of a process from outside, another one must not do for it.
                self._workers.append(
                    WorkerProcess(
                        self._engine,
                        self._exercise,
                        self._answer,
                        self._seed,
                        alone=is_counted(self._exercise)
                        or (self._company is not None and self._company.is_counted(self._exercise)),
                    )
                )
            loaded = [worker.load(self._cases) for worker in self._workers]
            self._loaded = next((one for one in loaded if one.stopped is not None), loaded[0])
            if self._loaded.stopped is None:
                return None
            self._close()
            index = self._loaded.stopped
            label = self._answer.parts[index][0] if 0 <= index < len(self._answer.parts) else None
            if self._answer.trusted:
                raise HarnessFault(
                    f"{self._exercise.name}: an answer could not be loaded: {self._loaded.why}"
                )
            if label is None:
                return _failed("died", f"before its cases could run: {self._loaded.why}")
            self._engine.left_out[label] = self._loaded.why
            if label == self._answer.own:
                hung = "ran for more" in self._loaded.why
                return _failed("timed out" if hung else "died", f"while {label} ran: {self._loaded.why}")
            parts = tuple(part for part in self._answer.parts if part[0] != label)
            self._answer = Answer(self._answer.name, parts, self._answer.own, self._answer.trusted)

    def _explained(self, outcome: Outcome) -> Outcome:
        """Say why a name is missing: what its cell raised, or which names were found."""
        if outcome.kind != "missing":
            return outcome
        own = [error for error in self._loaded.errors if error.get("label") == self._answer.own]
        if own and own[0]["kind"] == "raised":
            return Outcome(error={**own[0], "kind": "raised"})
        wanted = self._answer.name
        # The nearest first: the name that was meant may stand behind many helpers.
        nearest = sorted(self._loaded.names, key=lambda name: -SequenceMatcher(None, name, wanted).ratio())
        names = ", ".join(nearest[:MAX_FOUND_NAMES]) or "no function or class"
        return Outcome(error={"kind": "missing", "message": f"; found {names}"})
