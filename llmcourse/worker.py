"""The process an answer runs in when it is judged for marks, and the zygote it is forked from.

The judge starts one zygote, which imports torch, computes nothing and holds no
lesson. For each submission it forks a worker, which gets a socket to the judge, runs the source text it is sent and
answers items with observations. A worker never learns what is expected. The parent must not have run torch
operations: forking a warm thread pool deadlocks the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.abc
import inspect
import json
import linecache
import marshal
import os
import queue
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from llmcourse import jail, wall, wire
from llmcourse.exercise import Rng

ANSWER_MODULE, CASE_MODULE = "answer", "llmcourse_case"
MAX_FILE_BYTES, MAX_OPEN_FILES = 2 << 30, 512
MAX_MESSAGE_CHARS = 500
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class whose attributes may be set
SET_CHILD_SUBREAPER = 36  # of prctl(2)
# A configuration of some dozen values is shown whole: it may be all that an answer was given.
MAX_NOTED_CALLS, MAX_NOTED_CHARS, MAX_SHOWN_CHARS = 2, 560, 450
REQUEST_BYTES = 1 << 16
# What copying observations may raise: no memory for a view that is larger than what it shows, or a text of 20 MB.
UNSENDABLE = (RuntimeError, MemoryError, wire.ProtocolError)


# -------------------------------------------------------------------------------------- running one item, anywhere


class Forbidden(RuntimeError):
    """An answer called the library function its exercise asks to write."""


@contextlib.contextmanager
def switched_off(names: Sequence[str]) -> Iterator[None]:
    """Replace library answers (dotted names) by ones that raise Forbidden, until the end of the block."""
    places = _places(tuple(names), len(sys.modules))
    kept = [(owner, name, _raw(owner, name)) for owner, name, _ in places]
    try:
        for place in places:
            setattr(*place)
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def switch_off(names: Sequence[str]) -> None:
    """Replace library answers for good: no frame and no object holds the originals for this."""
    places = _prepared.pop(tuple(names), None) or _places.__wrapped__(tuple(names), 0)
    while places:
        setattr(*places.pop())


# Of a zygote: where what is forbidden stands, looked up once and not in every worker.
_prepared: dict[tuple[str, ...], list[tuple[Any, str, Any]]] = {}


def prepare(names: Sequence[str]) -> None:
    """Look up what workers that are forked from now on will switch off, unless a library would be imported for it."""
    if tuple(names) not in _prepared and all(_is_imported(name.rpartition(".")[0]) for name in names):
        with contextlib.suppress(AttributeError):  # the worker says so of an unknown name
            _prepared[tuple(names)] = _places.__wrapped__(tuple(names), 0)


@functools.lru_cache(maxsize=64)
def _places(names: tuple[str, ...], _modules: int) -> list[tuple[Any, str, Any]]:
    """Where what is named is found, and the refusal to put there: under its name, under every other name that a module
    of its library has for it, and in a class's own methods, since a class is also found among its base's subclasses.
    Where methods of a class are named as well, those alone are off.
    """
    if not names:  # looking through thousands of modules would take 3 ms
        return []
    # All of them are imported before any is replaced, or a module first imported here would keep another's refusal.
    owners = [_resolve(dotted.rpartition(".")[0]) for dotted in names]
    refusals: dict[int, tuple[Any, Any]] = {}
    places: list[tuple[Any, str, Any]] = []
    for dotted, owner in zip(names, owners, strict=True):
        name = dotted.rpartition(".")[2]
        original = getattr(owner, name)
        if isinstance(original, torch._ops.OpOverloadPacket):
            # Torch holds on to its packets of operations and takes their overloads: what they call is replaced.
            overloads = (getattr(original, overload) for overload in original.overloads())
            refusal = _refuser(dotted, original)
            places += [(part, "_op", refusal) for part in (original, *overloads)]
            continue
        known = refusals.setdefault(id(original), (original, _refuser(dotted, original)))
        places.append((owner, name, known[1]))
    libraries = {dotted.partition(".")[0] for dotted in names} - {"llmcourse"}
    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] in libraries]:
        for name, value in vars(module).items():
            if id(value) in refusals and refusals[id(value)][0] is value:
                places.append((module, name, refusals[id(value)][1]))
    by_method = {id(owner) for owner in owners}
    for original, refusal in list(refusals.values()):
        if isinstance(original, type) and original.__flags__ & HEAP_TYPE and id(original) not in by_method:
            refuse = vars(refusal)["__init__"]
            for name, value in vars(original).items():
                if isinstance(value, types.FunctionType):
                    places.append((original, name, refuse))
                elif isinstance(value, staticmethod | classmethod):
                    places.append((original, name, staticmethod(refuse)))
    return places


def _raw(owner: Any, name: str) -> Any:
    """What stands there, methods unbound as a class holds them."""
    return vars(owner)[name] if isinstance(owner, type) and name in vars(owner) else getattr(owner, name)


def _resolve(dotted: str) -> Any:
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        # Not by attribute alone: torch.optim deletes the names of its modules.
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:index]))
    return found


def _is_imported(dotted: str) -> bool:
    """Whether `_resolve` would import nothing."""
    parts = dotted.split(".")
    found: Any = sys.modules.get(parts[0])
    for index, part in enumerate(parts[1:], 2):
        found = getattr(found, part, None) or sys.modules.get(".".join(parts[:index]))
    return found is not None


def _refuser(dotted: str, original: Any) -> Any:
    message = f"{dotted} is what this exercise asks you to write; it is switched off here"

    def refuse(*_: object, **__: object) -> Any:
        raise Forbidden(message)

    if isinstance(original, type):
        return type(original.__name__, (), {"__init__": refuse})
    functools.update_wrapper(refuse, original, updated=())  # its attributes would lead to the original
    del refuse.__wrapped__  # type: ignore[attr-defined]  # which is the original
    return refuse


def reset(seed: int) -> None:
    """Put back what an answer may have set: threads, torch's defaults and modes, random generators."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    if torch.are_deterministic_algorithms_enabled():  # setting it imports the compiler, for a second
        torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def summary(value: object) -> str:
    """An argument in a few words, without copying it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        # The length first, and scalars only: printing tensors costs more than most answers.
        if len(value) > 16 or not all(isinstance(part, int | float | str | None) for part in parts):
            return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, torch.optim.Optimizer):
        count = len(value.param_groups)
        return f"{type(value).__name__} of {count} group{'s' if count != 1 else ''}"
    text = " ".join(repr(value).split())
    if " object at 0x" in text:
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def checksum(value: object) -> object:
    """A checksum of an argument's bytes, nested containers included; None for what is not data."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            return None
        raw = wire.bytes_of(value).numpy()
        return (str(value.dtype), tuple(value.shape), zlib.crc32(raw))  # type: ignore[arg-type]
    if isinstance(value, numpy.ndarray):
        return (value.dtype.str, value.shape, zlib.crc32(numpy.ascontiguousarray(value).tobytes()))
    if isinstance(value, bytes | bytearray):
        return zlib.crc32(value)
    if isinstance(value, dict):
        return [(key, checksum(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [checksum(part) for part in value]
    if isinstance(value, float):
        return value.hex()  # NaN is not equal to itself
    return value if isinstance(value, int | str | None) else None


class Watched:
    """Calls an answer; notes what it was called with and which arguments it changed."""

    def __init__(self, answer: Callable[..., Any], *, mutates: bool) -> None:
        self.tried: list[str] = []
        self.raised: tuple[int, str] | None = None  # the error's id: its traceback would keep tensors alive
        self.changed: list[str] = []
        self._answer, self._mutates = answer, mutates
        functools.update_wrapper(self, answer)
        self._names = parameters(answer)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        names = [
            *self._names[: len(arguments)],
            *(f"argument {i + 1}" for i in range(len(self._names), len(arguments))),
        ]
        given = {**dict(zip(names, arguments, strict=True)), **options}
        if len(self.tried) < MAX_NOTED_CALLS:
            self.tried.append(self._told(given))
        try:
            return self._called(arguments, options, given)
        except BaseException as error:
            self.raised = id(error), self._told(given)
            raise

    def _told(self, given: dict[str, Any]) -> str:
        shown = ", ".join(f"{name}={summary(value)}" for name, value in given.items())
        return f"{getattr(self._answer, '__name__', 'answer')}({shown})"[:MAX_NOTED_CHARS]

    def _called(self, arguments: tuple[Any, ...], options: dict[str, Any], given: dict[str, Any]) -> Any:
        if self._mutates:
            return self._answer(*arguments, **options)
        before = {name: checksum(value) for name, value in given.items()}
        result = self._answer(*arguments, **options)
        after = {name: checksum(value) for name, value in given.items()}
        self.changed += [name for name in given if after[name] != before[name] and name not in self.changed]
        return result


def watched(answer: Any, *, mutates: bool) -> Any:
    """The answer, wrapped if it is a function; classes reach the case as they are."""
    return answer if isinstance(answer, type) or not callable(answer) else Watched(answer, mutates=mutates)


def describe_error(error: BaseException, labels: Sequence[str]) -> dict[str, Any]:
    """Type, message and place (label and line of the learner's own source) of an exception."""
    line, label = None, None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in labels:
            line, label = frame.lineno, frame.filename
    if isinstance(error, SyntaxError) and error.filename in labels:
        line, label = error.lineno, error.filename
    # torch raises NotImplementedError too, with a message, where an operation lacks a dtype or a device.
    kind = "not written" if isinstance(error, NotImplementedError) and not error.args else "raised"
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)
    except Exception as unprintable:  # noqa: BLE001 - whatever an answer raises is its outcome
        message = f"(its message cannot be printed: {type(unprintable).__name__})"
    name = type(error).__name__
    message = wire.printable(message[:MAX_MESSAGE_CHARS])
    return {"kind": kind, "type": name, "message": message, "label": label, "line": line}


def perform(
    function: Callable[..., Any],
    answer: Any,
    rng: Rng,
    *,
    extra: Sequence[Any] = (),
    mutates: bool = False,
    labels: Sequence[str] = (),
) -> tuple[dict[str, Any], object]:
    """Run one case or cost: (what happened, observations). Used by a worker and by `check` in a notebook alike."""
    seen = watched(answer, mutates=mutates)
    began = time.perf_counter()
    observed, error, raised = None, None, None
    try:
        observed = function(seen, rng, *extra)
    except (Exception, SystemExit) as caught:  # noqa: BLE001 - whatever an answer raises is its outcome
        error, raised = describe_error(caught, labels), id(caught)
        if isinstance(caught, TypeError):
            error["signature"] = parameters(answer)
    seconds = time.perf_counter() - began
    tried, changed = getattr(seen, "tried", []), getattr(seen, "changed", [])
    if isinstance(answer, type):
        tried, changed = [], []
    elif getattr(seen, "raised", None) and raised == seen.raised[0]:
        tried = [seen.raised[1]]  # the call that failed, not the first one
    return {"seconds": seconds, "error": error, "tried": tried, "changed": changed}, observed


def parameters(answer: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters, or of a class's `__init__`."""
    try:
        return list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):
        return []


# ------------------------------------------------------------------------------------------------------- a worker


class NoLessons(importlib.abc.MetaPathFinder):
    """Keeps the course's own answers out of a process that runs a learner's."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "llmcourse.lessons" or fullname.startswith("llmcourse.lessons."):
            raise ImportError(
                "llmcourse.lessons holds the course's own answers; an answer that is judged cannot import it"
            )


class Channel:
    """The worker's end of the connection: one thread reads, any thread may call the judge."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[tuple[dict[str, Any], dict[str, Any]]]] = {}
        self._next = 0
        self.inbox: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message, data = wire.receive(self._connection, max_bytes=1 << 40)
                if "reply" in message:
                    self._waiting.pop(message["reply"]).put((message, data))
                else:
                    self.inbox.put((message, data))
        except (wire.Ended, OSError):
            os._exit(0)

    def send(self, message: dict[str, Any], data: dict[str, object] | None = None) -> None:
        with self._sending:
            wire.send(self._connection, message, data)

    def call(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the service of the item `number` and wait; a builtin exception it raises is raised here."""
        answer: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Any]]] = queue.SimpleQueue()
        with self._sending:
            self._next += 1
            self._waiting[self._next] = answer
            call = {"call": self._next, "number": number, "method": method}
            wire.send(self._connection, call, {"arguments": arguments})
        message, data = answer.get()
        if "raises" in message:
            raise getattr(__import__("builtins"), message["raises"])(message["message"])
        return data["result"]


class Remote:
    """Stands for a service in the judge's process: its calls go there and are counted there."""

    def __init__(
        self, channel: Channel, number: int, methods: Sequence[str], attributes: dict[str, Any]
    ) -> None:
        self._channel, self._number = channel, number
        for method in methods:
            setattr(self, method, functools.partial(self._call, method))
        for name, value in attributes.items():
            setattr(self, name, value)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._channel.call(self._number, method, arguments)


class Worker:
    """Runs the source it is sent and answers items, until the judge closes the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.channel = Channel(connection)
        self.answer = types.ModuleType(ANSWER_MODULE)
        self.cases = types.ModuleType(CASE_MODULE)
        sys.modules[ANSWER_MODULE] = self.answer
        self.labels: list[str] = []

    def serve(self) -> None:
        while True:
            message, data = self.channel.inbox.get()
            if message["do"] == "load":
                self.load(message)
            elif message["do"] == "cases":
                self.take_up(message)
            elif message["do"] == "item":
                self.item(message, data)
            elif message["do"] == "line up":
                self.line_up(message, data)
            else:
                self.lap(data)

    def load(self, message: dict[str, Any]) -> None:
        if not message["trusted"]:
            sys.meta_path.insert(0, NoLessons())
        try:
            switch_off(message["forbid"])
        except (ImportError, AttributeError) as unknown:
            fault = f"forbid={message['forbid']}: {unknown}"
            self.channel.send({"loaded": True, "errors": [], "case_error": fault, "names": []})
            return
        if not message["trusted"]:
            sys.addaudithook(wall.refusing(message["closed"]))
        reset(message["seed"])
        errors: list[dict[str, Any]] = []
        for index, (label, text) in enumerate(message["parts"]):
            self.channel.send({"part": index})
            self.labels.append(label)
            error = self.run(label, text, self.answer)
            if error is not None:
                errors.append(error)
        names = [name for name in vars(self.answer) if not name.startswith("__") and self._own(name)]
        self.channel.send({"loaded": True, "errors": errors, "case_error": None, "names": names[:50]})

    def take_up(self, message: dict[str, Any]) -> None:
        """Load the cases of an exercise; nothing of an earlier one's is left in their module."""
        self.cases = sys.modules[CASE_MODULE] = types.ModuleType(CASE_MODULE)
        reset(message["seed"])
        case_error = self.run(
            wall.CASES, message["cases"], self.cases, marshal.loads(bytes.fromhex(message["code"]))
        )
        for name in message["uses"]:
            setattr(self.cases, name, getattr(self.answer, name, None))
        self.channel.send({"loaded": True, "case_error": case_error})

    def _own(self, name: str) -> bool:
        value = getattr(self.answer, name)
        return callable(value) and getattr(value, "__module__", None) == ANSWER_MODULE

    def run(
        self, label: str, text: str, module: types.ModuleType, code: types.CodeType | None = None
    ) -> dict[str, Any] | None:
        linecache.cache[label] = (len(text), None, text.splitlines(keepends=True), label)
        try:
            exec(code or compile(text, label, "exec", dont_inherit=True), vars(module))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an answer raises is its outcome
            described = describe_error(error, [label])
            # Text that cannot even be compiled has no line of its own in the traceback.
            return {**described, "label": described["label"] or label}
        return None

    def item(self, message: dict[str, Any], data: dict[str, Any]) -> None:
        name = message["answer"]
        if not hasattr(self.answer, name):
            self.channel.send(
                {"done": True, "error": {"kind": "missing"}, "seconds": 0.0, "tried": [], "changed": []}
            )
            return
        reset(message["answer_seed"])
        rng = Rng(message["seed"], message["answer_seed"])
        extra: list[Any] = [data["saved"]] if "saved" in data else []
        if message["methods"] is not None:
            extra.append(Remote(self.channel, message["number"], message["methods"], message["attributes"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            happened, observed = perform(
                getattr(self.cases, message["item"]),
                getattr(self.answer, name),
                rng,
                extra=extra,
                mutates=message["mutates"],
                labels=self.labels,
            )
        try:
            self.channel.send({"done": True, **happened}, {"observed": observed})
        except UNSENDABLE as error:
            happened["error"] = describe_error(error, self.labels)
            self.channel.send({"done": True, **happened})

    def line_up(self, message: dict[str, Any], data: dict[str, Any]) -> None:
        """Set up a race: what laps run from now on. The no-op hands out the baseline's first output each time."""
        reset(message["answer_seed"])
        contender = getattr(self.cases if message["is_ours"] else self.answer, message["answer"], None)
        error: dict[str, Any] | None = None
        try:
            run = getattr(self.cases, message["race"])(
                contender, Rng(message["seed"], message["answer_seed"])
            )
            if message["is_no_op"]:
                held = run(data["x"])
                run = lambda x: held  # noqa: E731 - as short as a lap can be
            self.lapping = run
        except (Exception, SystemExit) as caught:  # noqa: BLE001 - whatever an answer raises is its outcome
            error = describe_error(caught, self.labels)
        self.channel.send({"done": True, "error": error, "seconds": 0.0, "tried": [], "changed": []})

    def lap(self, data: dict[str, Any]) -> None:
        error: dict[str, Any] | None = None
        try:
            output = self.lapping(data["x"])
        except (Exception, SystemExit) as caught:  # noqa: BLE001 - whatever an answer raises is its outcome
            output, error = None, describe_error(caught, self.labels)
        reply: dict[str, Any] = {"done": True, "error": error, "seconds": 0.0, "tried": [], "changed": []}
        try:
            self.channel.send(reply, {"observed": output})
        except UNSENDABLE as unsendable:
            self.channel.send({**reply, "error": describe_error(unsendable, self.labels)})


def become_worker(
    connection: socket.socket, folder: str, max_data_bytes: int, closed: Sequence[str] | None, in_jail: bool
) -> None:
    """Set limits, move into the worker's own folder, silence output and serve; never returns."""
    os.setsid()
    if in_jail:
        jail.say_hello(connection)
        folder = jail.FOLDER
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    os.chdir(folder)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # what an import may have asked for in the zygote
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_DATA, max_data_bytes))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)
    if closed is not None and not in_jail:  # the jail has covered them
        wall.close_files(closed)
    Worker(connection).serve()


# ------------------------------------------------------------------------------------------------------ the zygote


def serve_zygote(control: socket.socket, in_jail: bool) -> None:
    """Fork a worker per request and report how workers ended, until the judge goes; then end them all."""
    children: dict[int, int | None] = {}
    watch = jail.Watch()
    try:
        while _served(control, children, in_jail, watch):
            # Without a jail no worker is watched for what it started; its own memory has a limit.
            while in_jail and children and not select.select([control], [], [], jail.WATCH_S)[0]:
                watch.look()
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL) if in_jail else os.killpg(pid, signal.SIGKILL)
        if not in_jail:
            end_orphans(set())


def _served(
    control: socket.socket, children: dict[int, int | None], in_jail: bool, watch: jail.Watch
) -> bool:
    """Serve one request; False when the judge has gone. children: workers, and in the jail the pipe of each."""
    raw, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 1)
    if not raw:
        return False
    request = json.loads(raw)
    if "fork" in request:
        prepare(request["forbid"])
        # What is frozen no collection looks at, so that workers do not copy the pages of everything torch made.
        gc.freeze()
        pid, children[pid] = _forked(request, descriptors[0], control, in_jail)
        watch.begin(pid, request["max_data_bytes"])
        os.close(descriptors[0])
        control.sendall(json.dumps({"pid": pid}).encode())
    elif "import" in request:
        importlib.import_module(request["import"])
        _prepared.clear()  # it may have another name for what is forbidden
        control.sendall(b"{}")
    elif "cpu" in request:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds = sum(one.ru_utime + one.ru_stime for one in used)
        control.sendall(json.dumps({"seconds": seconds}).encode())
    else:
        pid = request["wait"]
        pipe = children.pop(pid)
        if pipe is not None:
            status, why = jail.ending(pid, pipe)
            why = "memory" if watch.end(pid) else why
        else:
            status, why = os.waitpid(pid, 0)[1], ""
            end_orphans(set(children))
        control.sendall(json.dumps({"status": status, "why": why}).encode())
    return True


def _forked(
    request: dict[str, Any], connection: int, control: socket.socket, in_jail: bool
) -> tuple[int, int | None]:
    """Fork a worker; its process id, and in the jail the pipe that says why it failed."""
    closed = request["closed"]

    def work() -> None:
        control.close()
        become_worker(
            socket.socket(fileno=connection), request["fork"], request["max_data_bytes"], closed, in_jail
        )

    if in_jail:
        return jail.fork_into(work, closed=closed or (), alone=request["alone"])
    pid = os.fork()
    if pid == 0:
        # A worker that ends in any way must not run the zygote's own exit.
        try:
            work()
        finally:
            os._exit(3)
    return pid, None


def adopt_orphans() -> None:
    """Become the parent of whatever a worker leaves behind, where the system has that (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans(children: set[int]) -> None:
    """Kill what ended workers started and left behind: every child of ours that we did not fork."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    while listed.exists():
        left = {int(pid) for pid in listed.read_text().split()} - children
        if not left:
            return
        for pid in left:  # one that ends may leave another
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main() -> None:
    """Entry point of the zygote, with a socket's number and the modules to import beforehand as arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    in_jail = os.path.isdir(jail.FOLDER)
    if not in_jail:
        adopt_orphans()
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    reset(0)  # the first takes 10 ms, which would be each worker's
    gc.freeze()
    gc.enable()
    # The judge may have ended, or ended this process, before it was ready.
    with contextlib.suppress(ConnectionError):
        control.sendall(b"ready")
        serve_zygote(control, in_jail)
    os._exit(0)  # taking torch down in order takes 0.2 s, and nobody waits for anything else of it
