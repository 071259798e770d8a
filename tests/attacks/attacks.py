"""The attacks, as submissions: what each hands in, what it may earn, and what is said of it.

Two kinds. One gives a wrong answer and tries to be paid for it: it earns nothing for that exercise. The other does
something that it must not be able to do, says ESCAPED where that worked, and then answers rightly: it keeps its
points, as an answer that prints a warning does.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.attacks.course import POINTS, RIGHT, Place, notebook

HOSTILE = "llmc-hostile"  # what a hostile process is called, and every file that one writes
FULL = {"unit_rows": 3.0, "Ledger": 2.0, "first_above": 3.0}
NOTHING = dict.fromkeys(FULL, 0.0)
HEAD = """import atexit, builtins, ctypes, gc, glob, inspect, json, os, random, signal, socket, struct, subprocess
import sys, threading, time, types, warnings
import torch
from llmcourse import wire

def renamed():
    ctypes.CDLL(None).prctl(15, b"llmc-hostile", 0, 0, 0)

def escaped(what):
    raise AssertionError(f"ESCAPED: {what}")
"""


@dataclass(frozen=True)
class Attack:
    """One student. make: gives the notebook, or lays out the folder itself and gives None.

    earns: points by exercise. said: a part of what the record says. refused: nothing could be judged.
    """

    number: int
    slug: str
    make: Callable[[Place, str], dict[str, Any] | bytes | None]
    earns: dict[str, float] = field(default_factory=lambda: FULL)
    said: str = ""
    refused: bool = False

    @property
    def student(self) -> str:
        return f"{self.number:02}-{self.slug}"


def indented(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")


def unit(body: str, *, result: str = "torch.zeros_like(weight)", top: str = "") -> str:
    """An answer for unit_rows that runs `body` and gives `result`; `top` runs when it is defined."""
    head = HEAD + textwrap.dedent(top)
    return f"{head}\ndef unit_rows(weight):\n{indented(body)}\n    return {result}\n"


RESULT = "weight / weight.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)"


def wrong(
    number: int,
    slug: str,
    body: str,
    *,
    top: str = "",
    result: str = "",
    said: str = "",
    costs_itself: str = "",
) -> Attack:
    """Tries to be paid for a wrong answer. costs_itself: other exercises that this breaks in its own process."""
    text = unit(body, top=top, result=result or "torch.zeros_like(weight)")
    earns = FULL | dict.fromkeys(["unit_rows", *costs_itself.split()], 0.0)
    return Attack(number, slug, lambda *_: notebook("A", {"unit_rows": text}), earns, said)


def contained(number: int, slug: str, body: str, *, top: str = "", said: str = "all cases agree") -> Attack:
    """Tries to do what it must not, and answers rightly."""

    def make(place: Place, _: str) -> dict[str, Any]:
        filled = body.replace("ROOT", str(place.root)).replace("HOME", str(place.home))
        return notebook("A", {"unit_rows": unit(filled, top=top, result=RESULT)})

    return Attack(number, slug, make, FULL, said)


def edited(
    number: int,
    slug: str,
    edit: Callable[[dict[str, Any]], object],
    earns: dict[str, float] = FULL,
    said: str = "",
    *,
    refused: bool = False,
) -> Attack:
    """A right notebook, edited; `edit` gives bytes where the file is to hold something else."""

    def make(*_: object) -> dict[str, Any] | bytes:
        made = notebook("A")
        found = edit(made)
        return found if isinstance(found, bytes) else made

    return Attack(number, slug, make, earns, said, refused)


def laid_out(number: int, slug: str, lay: Callable[[Place, str], object], said: str, **more: Any) -> Attack:
    """A folder that holds something else than a notebook."""

    def make(place: Place, student: str) -> None:
        lay(place, student)

    return Attack(number, slug, make, more.pop("earns", NOTHING), said, more.pop("refused", True))


def answer_cell(made: dict[str, Any], name: str) -> dict[str, Any]:
    return next(
        cell for cell in made["cells"] if cell["metadata"].get("nbgrader", {}).get("grade_id") == name
    )


TRY = """
for attempt in {attempts}:
    try:
        found = attempt()
    except (OSError, ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        continue
    if found is not None:
        escaped(found)
"""


def tried(*attempts: str) -> str:
    return TRY.format(attempts="[" + ", ".join(f"lambda: {one}" for one in attempts) + "]")


# ------------------------------------------------------------------------------------------------- the process ends

ENDS = [
    wrong(2, "exit", "os._exit(0)", said="exit status 0"),
    wrong(2, "segfault", "ctypes.string_at(0)", said="SIGSEGV"),
    wrong(2, "kills-itself", "os.kill(os.getpid(), signal.SIGKILL)"),
    wrong(2, "kills-everybody", "os.kill(-1, signal.SIGKILL)\nos.kill(1, signal.SIGKILL)\nos.killpg(0, 9)"),
    wrong(2, "leaves", "sys.exit(0)", said="SystemExit"),
    # Its cell runs for every exercise; it is left out where it is not asked for.
    wrong(2, "exits-at-definition", "pass", top="os._exit(0)", said="exit status 0"),
    wrong(
        2,
        "stops-itself-later",
        "signal.signal(signal.SIGALRM, lambda *_: os._exit(0)); os.kill(os.getpid(), 14)",
    ),
]

# ------------------------------------------------------------------------------------------- output, warnings, errors

OUTPUT = [
    contained(
        6,
        "prints-200-mb",
        "pass",
        top="""
        for _ in range(200):
            print('x' * 10**6)
            os.write(2, b'y' * 10**6)
        """,
    ),
    wrong(6, "raises-200-mb", "raise ValueError('x' * 2 * 10**8)", said="ValueError"),
    wrong(6, "gives-200-mb", "pass", result="'x' * 2 * 10**8", said="your answer"),
    wrong(6, "gives-a-large-tensor", "pass", result="torch.zeros(10**8)", said="your answer"),
    contained(
        28, "warns", "warnings.warn('deprecated')\nprint('careful', file=sys.stderr)\nos.write(2, b'careful')"
    ),
    contained(28, "warns-in-c", "torch._C._log_api_usage_once('x')\nctypes.CDLL(None).perror(b'careful')"),
    wrong(29, "recurses", "return unit_rows(weight)", said="RecursionError"),
    wrong(
        29,
        "giant-traceback",
        """
        def deep(n):
            try:
                if n:
                    deep(n - 1)
                raise ValueError('x' * 10_000)
            except ValueError as error:
                raise RuntimeError('y' * 10_000 + str(n)) from error
        deep(300)
        """,
        said="RuntimeError",
    ),
    wrong(
        29,
        "error-that-cannot-be-printed",
        "raise Odd()",
        top="""
        class Odd(Exception):
            def __str__(self):
                raise Odd()
            __repr__ = __str__
        """,
        said="raised Odd",
    ),
    wrong(
        29,
        "error-of-odd-type",
        "raise type('A' * 100_000 + '<script>', (ValueError,), {})('<script>alert(1)</script>')",
    ),
    wrong(29, "error-group", "raise ExceptionGroup('many', [ValueError(str(i)) for i in range(100_000)])"),
    wrong(
        29,
        "recursion-without-limit",
        "sys.setrecursionlimit(10**9)\ndef f(): return f()\nreturn f()",
        said="your answer",
    ),
]

# ---------------------------------------------------------------------------------------------- patched surroundings

PATCHED = [
    wrong(
        7,
        "patched-torch",
        "pass",
        top="""
        def yes(*_, **__):
            return True
        torch.allclose = torch.equal = torch.isclose = torch.testing.assert_close = torch.Tensor.__eq__ = yes
        torch.Tensor.allclose = torch.Tensor.equal = torch.Tensor.any = torch.Tensor.all = yes
        """,
    ),
    wrong(
        7,
        "patched-builtins",
        "pass",
        top="""
        class Always(AssertionError):
            pass
        builtins.AssertionError = Always
        builtins.all = lambda *_: True
        builtins.abs = lambda *_: 0.0
        builtins.sum = lambda *_: 0
        """,
        costs_itself="Ledger",
    ),
    wrong(
        7,
        "patched-judge",
        "pass",
        top="""
        import llmcourse.agreement, llmcourse.judging, llmcourse.checking, llmcourse.exercise
        llmcourse.agreement.difference = lambda *_, **__: None
        llmcourse.judging.compare = llmcourse.judging.compare_costs = lambda *_: None
        llmcourse.judging.verdict_of = lambda exercise, *_, **__: exercise.points
        llmcourse.checking.check = lambda *_: 3.0
        """,
    ),
    wrong(
        7,
        "patched-worker",
        "pass",
        top="""
        import llmcourse.worker as w
        w.perform = lambda *_, **__: ({'seconds': 0.0, 'error': None, 'tried': [], 'changed': []}, True)
        w.describe_error = lambda *_: None
        w.Worker.item = lambda self, message, data: self.channel.send({'done': True, 'points': 3.0})
        """,
        costs_itself="Ledger first_above",
    ),
    wrong(
        7,
        "patched-rng",
        "pass",
        top="""
        import llmcourse.exercise
        llmcourse.exercise.Rng.normal = lambda self, *shape, **_: torch.zeros(shape)
        torch.randn = lambda *a, **k: torch.zeros(*a)
        """,
    ),
    wrong(
        8,
        "patched-clock",
        "pass",
        top="""
        time.perf_counter = time.monotonic = time.time = time.process_time = lambda: 0.0
        torch.cuda.Event = type('Event', (), {'record': lambda s: None, 'elapsed_time': lambda s, o: 0.0})
        torch.cuda.synchronize = lambda *_: None
        """,
    ),
    wrong(
        8,
        "clock-runs-back",
        "pass",
        top="time.perf_counter = iter(range(10**9, 0, -1)).__next__",
        said="disturbed",
        costs_itself="Ledger first_above",
    ),
    wrong(
        8,
        "clock-gives-nan",
        "pass",
        top="time.perf_counter = lambda: float('nan')",
        said="disturbed",
        costs_itself="Ledger first_above",
    ),
    # Right, and the clock is its own to break: it may lose by that, never win.
    wrong(
        9,
        "ipython-hooks",
        "pass",
        top="""
        shell = get_ipython()
        shell.input_transformers_post.append(lambda lines: ['3.0'])
        shell.ast_transformers.append(None)
        """,
        said="NameError",
    ),
    wrong(
        9,
        "display-hooks",
        "pass",
        top="""
        sys.displayhook = sys.excepthook = lambda *_: None
        import IPython
        IPython.get_ipython = lambda: None
        IPython.core.interactiveshell.InteractiveShell.run_cell = lambda *_: 3.0
        """,
    ),
    Attack(
        9,
        "hooks-in-an-own-cell",
        lambda *_: notebook(
            "A",
            {"unit_rows": unit("pass")},
            first="get_ipython().ast_transformers.append(1)\n%load_ext autoreload\nget_ipython().events.register('post_run_cell', print)",
        ),
        FULL | {"unit_rows": 0.0},
        "is not run when the notebook is judged",
    ),
]

# ------------------------------------------------------------------------------------ what is expected, looked for

LOOK = """
seen = []
for thread, frame in sys._current_frames().items():
    while frame is not None:
        seen += list(frame.f_locals.values()) + list(frame.f_globals.values())
        frame = frame.f_back
frame = sys._getframe()
while frame is not None:
    seen += list(frame.f_locals.values())
    frame = frame.f_back
seen += gc.get_objects()
"""
LOOKED_FOR = [
    wrong(
        10,
        "frames-and-gc",
        LOOK
        + """
        best = [one for one in seen if isinstance(one, torch.Tensor) and one.shape == weight.shape
                and one is not weight and not torch.equal(one, weight)]
        for one in best:
            if torch.allclose(one.square().sum(1), torch.ones(len(one)), atol=1e-3):
                return one
        """.replace("\n        ", "\n"),
    ),
    wrong(
        10,
        "named-expected",
        LOOK
        + """
        for one in seen:
            if isinstance(one, dict) and ('expected' in one or 'reference' in one):
                return one.get('expected', one.get('reference'))
        """.replace("\n        ", "\n"),
    ),
    wrong(
        10,
        "stored-source",
        """
        import linecache
        for text in ["".join(lines[2]) for lines in list(linecache.cache.values()) if len(lines) > 2]:
            if 'def unit_rows' in text and 'BEGIN SOLUTION' in text:
                space = {}
                exec(text.split('@case')[0], space)
                return space['unit_rows'](weight)
        """,
    ),
    Attack(
        10,
        "the-file-of-the-exercise",
        lambda place, _: notebook(
            "A",
            {
                "unit_rows": unit(f"""
        for path in glob.glob('{place.lessons}/*/unit_rows.py') + ['{place.lessons}/attacked/unit_rows.py']:
            for flags in (os.O_RDONLY, os.O_RDONLY | os.O_PATH):
                try:
                    text = os.read(os.open(path, flags), 10**6).decode()
                except OSError:
                    continue
                space = {{}}
                exec(text.split('@case')[0], space)
                return space['unit_rows'](weight)
        """)
            },
        ),
        FULL | {"unit_rows": 0.0},
    ),
    contained(
        10,
        "memory-of-others",  # where the answer is process 1 itself, there is nobody above it to be seen
        """
        mine = os.getpid()
        for pid in [int(n) for n in os.listdir('/proc') if n.isdigit()]:
            if pid in (mine, 1) or os.path.exists(f'/proc/{mine}/task/{pid}'):
                continue
            escaped(f'sees process {pid}')
        """
        + tried(
            "open('/proc/1/mem', 'rb').read(1) or None if mine != 1 else None",
            "open('/proc/1/environ').read() or None if mine != 1 else None",
            "os.listdir('/proc/1/fd') or None if mine != 1 else None",
            "os.readlink('/proc/1/exe') or None if mine != 1 else None",
            "os.listdir('/proc/1/root/tmp') or None if mine != 1 else None",
            "open('/proc/kcore', 'rb').read(1)",
        ).replace("\n", "\n        "),
    ),
    contained(
        10,
        "traces-the-keeper",
        """
        libc = ctypes.CDLL(None, use_errno=True)
        for request in (16, 0x4206):
            if libc.ptrace(request, 1, 0, 0) == 0:
                escaped('ptrace')
        buffer = ctypes.create_string_buffer(8)
        class Vector(ctypes.Structure):
            _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
        local, remote = Vector(ctypes.addressof(buffer), 8), Vector(0x400000, 8)
        if libc.process_vm_readv(1, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) > 0:
            escaped('read the memory of the keeper')
        """,
    ),
]

# ------------------------------------------------------------------------------- the gradebook, the others, secrets

READ = """
for path in PATHS:
    for read in (lambda p: open(p, 'rb').read(), os.listdir, os.readlink, lambda p: open('/proc/self/root' + p, 'rb').read(),
                 lambda p: open('/proc/1/root' + p, 'rb').read(), lambda p: os.stat(p) and open(p).read()):
        try:
            found = read(path)
        except (OSError, UnicodeDecodeError):
            continue
        raise AssertionError(f"ESCAPED: {path} {found!r:.300}")
"""
PLACES = (
    "['ROOT/course/grading/gradebook.db', 'ROOT/course/grading/.llmcourse/secret', 'ROOT/course/source/solutions.py', "
    "'ROOT/course/grading/submitted', 'ROOT/course/grading/submitted/00-honest/A/A.ipynb', 'ROOT/course', 'ROOT/secret.txt', "
    "'HOME/.ssh/id_ed25519', 'HOME', '/root/.ssh', '/root/.bashrc', '/etc/passwd', '/etc/shadow', '/etc/hosts', '/home', "
    "'/var/log', '/run', '/boot', '/sys/kernel']"
)
OTHERS = [
    contained(11, "reads-everything", READ.replace("PATHS", PLACES)),
    Attack(
        11,
        "runs-a-peers-answer",
        lambda place, _: notebook(
            "A",
            {
                "unit_rows": unit(f"""
        made = json.load(open('{place.course}/grading/submitted/00-honest/A/A.ipynb'))
        for cell in made['cells']:
            if 'def unit_rows' in ''.join(cell['source']):
                space = {{'torch': torch}}
                exec(''.join(cell['source']), space)
                return space['unit_rows'](weight)
        """)
            },
        ),
        FULL | {"unit_rows": 0.0},
        "FileNotFoundError",
    ),
    contained(
        11,
        "writes-everywhere",
        """
        import llmcourse, sqlite3, site
        places = ['ROOT/course/grading', 'ROOT/course/grading/submitted/00-honest/A', 'ROOT', 'HOME', '/tmp', '/var/tmp', '/dev/shm',
                  '/', '/usr', '/etc', os.path.dirname(llmcourse.__file__), os.path.dirname(torch.__file__), sys.prefix,
                  *site.getsitepackages(), os.path.dirname(os.__file__), '/root', '/sys', '/run', 'ROOT/lessons/attacked']
        for place in places:
            for name in ('llmc-hostile', 'llmc-hostile.pth'):
                try:
                    os.makedirs(place, exist_ok=True)
                    open(os.path.join(place, name), 'w').close()
                except OSError:
                    continue
                escaped(f'wrote into {place}')
        """,
    ),
    contained(
        11,
        "writes-the-gradebook",
        """
        import sqlite3
        for path in ('ROOT/course/grading/gradebook.db', '/proc/1/root' + 'ROOT/course/grading/gradebook.db'):
            try:
                base = sqlite3.connect(path)
                base.execute('UPDATE grade SET manual_score = 3.0')
                base.commit()
            except sqlite3.Error:
                continue
            escaped('wrote the gradebook')
        """,
    ),
    contained(
        11,
        "secrets-of-the-environment",
        """
        found = dict(os.environ)
        for name in glob.glob('/proc/*/environ'):
            try:
                found[name] = open(name).read()
            except OSError:
                pass
        raised = [key for key in found if 'CANARY' in key or 'CANARY' in found[key]]
        if raised:
            escaped(str([found[key] for key in raised]))
        """,
    ),
    wrong(
        11,
        "tells-what-it-finds",
        "raise ValueError(str(dict(os.environ)) + open('/proc/self/environ').read())",
        said="ValueError",
    ),
    wrong(
        11,
        "lists-what-it-finds",
        "raise ValueError(str([os.listdir(p) for p in ('/', '/tmp', '.', '/proc/self/fd')]))",
    ),
    contained(
        11,
        "mounts",
        tried(
            "ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 or None",
            "ctypes.CDLL(None).unshare(0x10000000) == 0 or None",
            "ctypes.CDLL(None).unshare(0x00020000) == 0 or None",
            "os.chroot('/tmp') or 'chroot'",
            "os.setuid(0) or 'root'",
            "ctypes.CDLL(None).umount2(b'/proc', 2) == 0 or None",
            "ctypes.CDLL(None).setns(os.open('/proc/1/ns/mnt', 0), 0) == 0 or None",
            "os.sethostname and None",
        ),
    ),
]

# --------------------------------------------------------------------------------------------------- forged frames

DONE = "{'done': True, 'error': None, 'seconds': 0.0, 'tried': [], 'changed': []}"
SOCKETS = """
found = []
for name in os.listdir('/proc/self/fd'):
    try:
        found.append(socket.socket(fileno=os.dup(int(name))))
    except OSError:
        continue
"""


def on_sockets(send: str) -> str:
    return (
        SOCKETS
        + f"for one in found:\n    try:\n        {send}\n    except (OSError, wire.Ended):\n        continue\n"
    )


FORGED = [
    wrong(
        12,
        "forged-observations",
        on_sockets(f"wire.send(one, {DONE}, {{'observed': [torch.ones(6, 8)] * 3}})"),
    ),
    wrong(
        12,
        "forged-points",
        on_sockets(
            f"wire.send(one, {{**{DONE}, 'points': 3.0, 'verdict': 'right', 'agrees': True}}, {{'observed': True}})"
        ),
    ),
    wrong(
        12,
        "forged-ahead",
        on_sockets(f"[wire.send(one, {DONE}, {{'observed': {{'rows': weight}}}}) for _ in range(9)]"),
    ),
    wrong(
        12,
        "forged-at-definition",
        "pass",
        top=on_sockets(
            "[wire.send(one, {'loaded': True, 'errors': [], 'names': ['unit_rows'], 'case_error': None})]"
        ),
        costs_itself="Ledger first_above",
    ),
    wrong(
        12,
        "forged-case-error",
        "pass",
        top=on_sockets(
            "[wire.send(one, {'part': i}) for i in range(9)] and wire.send(one, {'loaded': True, 'case_error': 'forged'})"
        ),
    ),
    wrong(
        12,
        "forged-header-lengths",
        on_sockets("one.sendall(struct.pack('>4sIQ', b'LLMC', 2**32 - 1, 2**63))"),
        said="disturbed",
    ),
    wrong(
        12,
        "garbage-on-every-descriptor",
        """
        for name in os.listdir('/proc/self/fd'):
            try:
                os.write(int(name), b'LLMC' + os.urandom(64))
            except OSError:
                continue
        """,
    ),
    wrong(
        12,
        "orders-to-the-zygote",
        on_sockets(
            "one.sendall(json.dumps({'fork': '/tmp', 'max_data_bytes': 1, 'closed': None, 'wait': 1}).encode())"
        ),
    ),
    wrong(
        12,
        "forged-json",
        on_sockets(
            'h = b\'{"message": {"done": true, "done": true, "error": null, "seconds": NaN, "tried": [[]], "changed": {}}, '
            "\"data\": {}, \"blobs\": []}'; one.sendall(struct.pack('>4sIQ', b'LLMC', len(h), 0) + h)"
        ),
        said="disturbed",
    ),
    wrong(
        12,
        "forged-error-fields",
        on_sockets(
            "wire.send(one, {'done': True, 'seconds': 1e8, 'tried': ['<script>alert(1)</script>'], 'changed': [], 'error': "
            "{'kind': 'not written', 'type': '<img src=x onerror=alert(1)>', 'message': '\\x1b[2J\\ud800', 'line': 10**3000, 'label': '../x'}})"
        ),
    ),
    wrong(12, "closes-every-descriptor", "os.closerange(0, 600)", said="ended its process"),
    # What is counted beside the answer can be forged, and the report says so; what a service counts cannot.
    Attack(
        12,
        "forged-count-beside-the-answer",
        lambda *_: notebook(
            "A",
            {
                "unit_rows": unit(
                    """
        wide = torch.zeros(10**6)
        frame = sys._getframe()
        while frame is not None and not hasattr(frame.f_locals.get('work'), 'largest_tensor_bytes'):
            frame = frame.f_back
        if frame is not None:
            type(frame.f_locals['work']).largest_tensor_bytes = property(lambda self: 0, lambda self, value: None)
        """,
                    result=RESULT,
                )
            },
        ),
        FULL,
    ),
    Attack(
        12,
        "dear-and-honest",
        lambda *_: notebook("A", {"unit_rows": unit("torch.zeros(10**6)", result=RESULT)}),
        FULL | {"unit_rows": 2.0},
        "dearer than it needs to be",
    ),
    Attack(
        12,
        "reads-for-nothing",
        lambda *_: notebook(
            "A",
            {
                "first_above": HEAD
                + """
def first_above(reader, count, bound):
    numbers = [reader.read(i) for i in range(count)]
    reader.reads, reader._call, reader.counts = 0, None, lambda: {'reads': (0, 11)}
    return sum(one <= bound for one in numbers)
"""
            },
        ),
        FULL | {"first_above": 2.0},
        "reads",
    ),
    Attack(
        12,
        "calls-as-another-item",
        lambda *_: notebook(
            "A",
            {
                "first_above": HEAD
                + """
def first_above(reader, count, bound):
    read = lambda i: reader._channel.call(reader._number - 1, 'read', (i,))
    return sum(read(i) <= bound for i in range(count))
"""
            },
        ),
        FULL | {"first_above": 0.0},
        "AttributeError",
    ),
    Attack(
        12,
        "calls-what-is-not-offered",
        lambda *_: notebook(
            "A",
            {
                "first_above": HEAD
                + """
def first_above(reader, count, bound):
    for name in ('counts', '__init__', '__class__', 'numbers', '__getattribute__', ['read'], {'a': 1}, None):
        try:
            found = reader._channel.call(reader._number, name, ())
        except AttributeError:
            continue
        return found
    return -1
"""
            },
        ),
        FULL | {"first_above": 0.0},
    ),
]

# ------------------------------------------------------------------------------------------------------ lying values

LYING = [
    wrong(
        13,
        "equal-to-everything",
        "return Liar()",
        top="""
        class Liar:
            def __eq__(self, other):
                return True
            __ne__ = __lt__ = __gt__ = lambda self, other: False
            __hash__ = lambda self: 0
            def __getattr__(self, name):
                return Liar()
            def __call__(self, *_, **__):
                return Liar()
        """,
        said="expected float32",
    ),
    wrong(
        13,
        "tensor-subclass",
        "return torch.zeros_like(weight).as_subclass(Sure)",
        top="""
        class Sure(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return True
        """,
        said="expected float32",
    ),
    wrong(
        13,
        "parameter-with-attributes",
        """
        made = torch.nn.Parameter(torch.zeros_like(weight))
        made.came_from = weight.device
        return made
        """,
    ),
    wrong(
        13,
        "lazy-tensor",
        "return Lazy(weight)",
        top="""
        class Lazy(torch.Tensor):
            @staticmethod
            def __new__(cls, weight):
                return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
            def __init__(self, weight):
                self.weight = weight
            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                return True
        """,
        said="expected float32",
    ),
    wrong(13, "meta-and-sparse", "pass", result="weight.to('meta')", said="expected float32"),
    wrong(
        13,
        "number-subclasses",
        "return Num(1.0)",
        top="""
        class Num(float):
            __eq__ = lambda self, other: True
            __le__ = __lt__ = __ge__ = __gt__ = __eq__
            __hash__ = float.__hash__
        """,
    ),
    Attack(
        13,
        "lying-ledger",
        lambda *_: notebook(
            "A",
            {
                "Ledger": HEAD
                + """
class Yes(int):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = int.__hash__

class Ledger:
    __init__ = add = lambda self, *_: None
    total = lambda self: Yes(0)
"""
            },
        ),
        FULL | {"Ledger": 0.0},
    ),
    wrong(
        14,
        "pickle",
        "return Bomb()",
        top="""
        class Bomb:
            def __reduce__(self):
                return (os.system, ('touch /tmp/llmc-hostile',))
        """,
    ),
    wrong(
        14,
        "pickle-as-bytes",
        """
        import pickle
        return b"cos\\nsystem\\n(S'touch /tmp/llmc-hostile'\\ntR."
        """,
    ),
    wrong(
        14,
        "state-dict",
        """
        import io
        file = io.BytesIO()
        torch.save({'unit': Bomb()}, file)
        return file.getvalue()
        """,
        top="""
        class Bomb:
            def __reduce__(self):
                return (exec, ("open('/tmp/llmc-hostile', 'w')",))
        """,
    ),
    *(
        wrong(15, f"gives-{slug}", "pass", result=value)
        for slug, value in {
            "nan": "torch.full_like(weight, torch.nan)",
            "inf": "torch.full_like(weight, torch.inf)",
            "negative": "-weight / weight.norm(dim=1, keepdim=True)",
            "huge": "weight * 3e38",
            "a-score": "3.0",
            "true": "True",
            "none": "None",
        }.items()
    ),
    Attack(
        15,
        "ledger-of-inf",
        lambda *_: notebook(
            "A",
            {
                "Ledger": """
class Ledger:
    __init__ = add = lambda self, *_: None
    total = lambda self: float("nan")
"""
            },
        ),
        FULL | {"Ledger": 0.0},
    ),
    wrong(16, "giant-shape", "pass", result="torch.zeros(1).expand(2**40, 8)", said="too large"),
    wrong(16, "no-values-of-giant-shape", "pass", result="torch.empty(0, 2**60)"),
    wrong(
        16,
        "deep-list",
        "found = []\nfor _ in range(100_000):\n    found = [found]\nreturn found",
        said="expected float32",
    ),
    wrong(16, "list-of-itself", "found = []\nfound.append(found)\nreturn found"),
    wrong(16, "wide-dict", "pass", result="{str(i): i for i in range(10**6)}"),
    wrong(16, "giant-int", "pass", result="1 << 10**7"),
    wrong(16, "giant-key", "pass", result="{'k' * 10**7: weight}"),
    wrong(
        16,
        "sends-negative-shapes",
        on_sockets(
            "h = json.dumps({'message': "
            + DONE
            + ", 'data': {'observed': ['t', 'float32', [-6, -8], 'cpu', 0]}, 'blobs': [192]}).encode(); "
            "one.sendall(struct.pack('>4sIQ', b'LLMC', len(h), 192) + h + bytes(192))"
        ),
        said="disturbed",
    ),
    wrong(
        16,
        "sends-deep-nesting",
        on_sockets(
            "h = b'{\"message\": ' + b'[' * 10_000 + b']' * 10_000 + b', \"data\": {}, \"blobs\": []}'; "
            "one.sendall(struct.pack('>4sIQ', b'LLMC', len(h), 0) + h)"
        ),
        said="disturbed",
    ),
    wrong(
        16,
        "sends-many-blobs",
        on_sockets(
            "h = json.dumps({'message': {}, 'data': {}, 'blobs': [0] * 10_000}).encode(); "
            "one.sendall(struct.pack('>4sIQ', b'LLMC', len(h), 0) + h)"
        ),
        said="disturbed",
    ),
    wrong(16, "deep-source", "pass", top="x = " + "(" * 3000 + ")" * 3000),
    wrong(16, "long-sum", "pass", top="x = " + "+".join(["1"] * 30_000)),
    wrong(16, "long-chain", "pass", top="x = 0" + ".real" * 30_000),
    wrong(16, "many-signs", "pass", top="x = " + "-" * 50_000 + "1"),
]

# ------------------------------------------------------------------------------------------------- the notebook file


def locked(made: dict[str, Any]) -> None:
    for cell in made["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id", "").startswith("check_"):
            cell["source"] = "3.0"
    answer_cell(made, "unit_rows")["source"] = "def unit_rows(weight):\n    return weight"


def duplicated(made: dict[str, Any]) -> None:
    at = made["cells"].index(answer_cell(made, "unit_rows"))
    wrong_one = copy.deepcopy(made["cells"][at])
    wrong_one["source"] = "def unit_rows(weight):\n    return weight"
    made["cells"].insert(at + 1, wrong_one)


def duplicated_check(made: dict[str, Any]) -> None:
    answer_cell(made, "unit_rows")["source"] = "def unit_rows(weight):\n    return weight"
    cell = copy.deepcopy(answer_cell(made, "check_Ledger"))
    cell["metadata"]["nbgrader"]["grade_id"] = "check_unit_rows"
    made["cells"] += [cell, copy.deepcopy(cell)]


def forged_flags(made: dict[str, Any]) -> None:
    answer_cell(made, "unit_rows")["source"] = "def unit_rows(weight):\n    return weight"
    for cell in made["cells"]:
        grader = cell["metadata"].get("nbgrader")
        if grader:
            grader |= {"grade": True, "solution": True, "locked": False, "points": 1e9, "task": False}
    made["cells"].append(
        {
            "cell_type": "code",
            "source": "1e9",
            "outputs": [],
            "execution_count": 1,
            "id": "more",
            "metadata": {"nbgrader": {"grade_id": "bonus", "grade": True, "points": 1e9, "solution": True}},
        }
    )


def filled(made: dict[str, Any]) -> None:
    answer_cell(made, "unit_rows")["source"] = "def unit_rows(weight):\n    return weight"
    for cell in made["cells"]:
        if cell["cell_type"] == "code":
            html = "<script>alert('PREFILLED')</script>"
            data = {"text/plain": "3.0", "text/html": html, "application/javascript": "alert('PREFILLED')"}
            cell["outputs"] = [
                {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": 1},
                {"output_type": "error", "ename": "PREFILLED", "evalue": "x", "traceback": ["PREFILLED"]},
            ]


def without_checks(made: dict[str, Any]) -> None:
    made["cells"] = [
        cell
        for cell in made["cells"]
        if not cell["metadata"].get("nbgrader", {}).get("grade_id", "").startswith("check_")
    ]


def with_checks_alone(made: dict[str, Any]) -> None:
    made["cells"] = [
        cell
        for cell in made["cells"]
        if cell["metadata"].get("nbgrader", {}).get("grade_id", "").startswith("check_")
    ]


def scripts(made: dict[str, Any]) -> None:
    cell = answer_cell(made, "unit_rows")
    cell["source"] += "\n# </pre><script>alert('PREFILLED')</script><img src=x onerror=alert(1)>"
    made["cells"].insert(
        0,
        {"cell_type": "markdown", "metadata": {}, "source": "<script>alert('PREFILLED')</script>", "id": "x"},
    )


def text_of(made: dict[str, Any]) -> str:
    return json.dumps(made)


def moved(made: dict[str, Any]) -> None:
    made["cells"].reverse()


FILES = [
    edited(17, "edited-checks", locked, FULL | {"unit_rows": 0.0}),
    edited(18, "duplicated-answer", duplicated, FULL | {"unit_rows": 0.0}, "the later one counts"),
    edited(18, "duplicated-check", duplicated_check, FULL | {"unit_rows": 0.0}),
    edited(19, "deleted-checks", without_checks),
    edited(19, "checks-alone", with_checks_alone, NOTHING, "is gone"),
    edited(20, "forged-flags", forged_flags, FULL | {"unit_rows": 0.0}),
    edited(21, "filled-outputs", filled, FULL | {"unit_rows": 0.0}),
    edited(21, "scripts", scripts),
    edited(21, "reversed", moved),
    edited(
        22, "half-a-file", lambda made: text_of(made)[:-9].encode(), NOTHING, "notebook in JSON", refused=True
    ),
    edited(22, "utf-16", lambda made: text_of(made).encode("utf-16"), NOTHING, "UTF-16", refused=True),
    edited(
        22,
        "latin-1",
        lambda made: b"\xe9" + text_of(made).encode(),
        NOTHING,
        "notebook in JSON",
        refused=True,
    ),
    edited(22, "nothing-in-it", lambda made: b"", NOTHING, "notebook in JSON", refused=True),
    edited(
        22, "byte-order-mark", lambda made: b"\xef\xbb\xbf" + text_of(made).encode(), FULL, "byte-order mark"
    ),
    edited(
        22,
        "nul-in-a-cell",
        lambda made: answer_cell(made, "unit_rows").update(source="\0" + RIGHT["unit_rows"]),
        FULL | {"unit_rows": 0.0},
        "characters that are no text",
    ),
    edited(
        22,
        "lone-surrogate",
        lambda made: answer_cell(made, "unit_rows").update(source=RIGHT["unit_rows"] + "\n# \ud800"),
        FULL,
        "characters that are no text",
    ),
    edited(
        22,
        "control-characters",
        lambda made: answer_cell(made, "unit_rows").update(
            source=RIGHT["unit_rows"] + "\n# \x1b[2J\u202e\x07"
        ),
    ),
    edited(
        22,
        "deep-json",
        lambda made: b'{"cells": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        NOTHING,
        "nested too deeply",
        refused=True,
    ),
    edited(
        22,
        "many-brackets",
        lambda made: b"[" + b"[]," * 1_100_000 + b"[]]",
        NOTHING,
        "lists and objects",
        refused=True,
    ),
    edited(
        22,
        "21-mb",
        lambda made: text_of(made).encode() + b" " * (21 << 20),
        NOTHING,
        "more than",
        refused=True,
    ),
    edited(
        22, "many-cells", lambda made: made.update(cells=made["cells"] * 1000), NOTHING, "cells", refused=True
    ),
    edited(
        22,
        "numbers-that-are-none",
        lambda made: text_of(made).replace('"execution_count": null', '"execution_count": 1e999').encode(),
    ),
    edited(
        23,
        "nbformat-3",
        lambda made: made.update(nbformat=3),
        NOTHING,
        "expected notebook format 4",
        refused=True,
    ),
    edited(
        23,
        "nbformat-99",
        lambda made: made.update(nbformat={"a": [1]}),
        NOTHING,
        "expected notebook format 4",
        refused=True,
    ),
    edited(
        23,
        "no-metadata",
        lambda made: [cell.pop("metadata") for cell in made["cells"]] and made.pop("metadata"),
        FULL,
        "is gone",
    ),
    edited(
        23,
        "metadata-of-another-kind",
        lambda made: [cell.update(metadata=[1]) for cell in made["cells"]],
        FULL,
        "is gone",
    ),
    edited(
        23,
        "wrong-kernel",
        lambda made: made["metadata"].update(kernelspec={"name": "../../bash", "argv": ["touch", "x"]}),
    ),
    laid_out(
        23,
        "renamed",
        lambda place, student: (place.folder(student) / "mine (1).ipynb").write_text(text_of(notebook("A"))),
        "was taken in its place",
        earns=FULL,
        refused=False,
    ),
]

# ------------------------------------------------------------------------------------------------------ the folder


def honest_path(place: Place) -> str:
    return str(place.course / "grading" / "submitted" / "00-honest" / "A" / "A.ipynb")


def as_link(place: Place, student: str) -> None:
    os.symlink(honest_path(place), place.folder(student) / "A.ipynb")


def as_hard_link(place: Place, student: str) -> None:
    os.link(place.course / "source" / "another.ipynb", place.folder(student) / "A.ipynb")


def as_linked_folder(place: Place, student: str) -> None:
    home = place.folder(student).parent
    (home / "A").rmdir()
    os.symlink(os.path.dirname(honest_path(place)), home / "A")


def as_socket(place: Place, student: str) -> None:
    here = os.getcwd()
    os.chdir(place.folder(student))  # a path longer than 108 bytes names no socket
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("A.ipynb")
    finally:
        os.chdir(here)


def as_zip_bomb(place: Place, student: str) -> None:
    with zipfile.ZipFile(place.folder(student) / "A.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("../../../../llmc-hostile", bytes(50_000_000))


def many_files(place: Place, student: str) -> None:
    folder = place.folder(student)
    for number in range(3_000):  # over what is listed; the slow class has 100,000
        (folder / f"{number}").touch()
    (folder / "A.ipynb").write_text(text_of(notebook("A")))


def shadowing(place: Place, student: str) -> None:
    folder = place.folder(student)
    for name in (
        "torch.py",
        "sitecustomize.py",
        "usercustomize.py",
        "json.py",
        "llmcourse.py",
        "A.pth",
        "random.py",
    ):
        (folder / name).write_text("import os; open('/tmp/llmc-hostile', 'w'); os._exit(0)")
    (folder / "A.ipynb").write_text(text_of(notebook("A")))


FOLDERS = [
    laid_out(24, "link-to-a-peer", as_link, "found a link"),
    laid_out(
        24,
        "link-to-passwd",
        lambda place, student: os.symlink("/etc/passwd", place.folder(student) / "A.ipynb"),
        "found a link",
    ),
    laid_out(24, "hard-link", as_hard_link, "hard link"),
    laid_out(24, "linked-folder", as_linked_folder, "found a link"),
    laid_out(24, "pipe", lambda place, student: os.mkfifo(place.folder(student) / "A.ipynb"), "found a pipe"),
    laid_out(24, "socket", as_socket, "found a socket"),
    laid_out(
        24, "folder", lambda place, student: (place.folder(student) / "A.ipynb").mkdir(), "found a folder"
    ),
    laid_out(
        24,
        "device",
        lambda place, student: os.symlink("/dev/zero", place.folder(student) / "A.ipynb"),
        "found a link",
    ),
    laid_out(24, "zip-bomb", as_zip_bomb, "hand it in under that name"),
    laid_out(24, "many-files", many_files, "over 2,000 entries", earns=FULL, refused=False),
    laid_out(24, "nothing", lambda place, student: place.folder(student), "found nothing"),
    laid_out(
        24,
        "two-notebooks",
        lambda place, student: [
            (place.folder(student) / name).write_text(text_of(notebook("A")))
            for name in ("a.ipynb", "b.ipynb")
        ],
        "several notebooks",
    ),
    laid_out(26, "shadowing", shadowing, "left out beside the notebook", earns=FULL, refused=False),
    contained(
        26,
        "shadows-from-inside",
        """
        for name in ('torch.py', 'sitecustomize.py', 'usercustomize.py', 'wire.py', 'llmcourse_case.py', 'answer.py', 'x.pth'):
            with open(name, 'w') as file:
                file.write("import os; os._exit(0)")
        os.environ['PYTHONPATH'] = os.environ['PYTHONSTARTUP'] = os.getcwd()
        sys.path.insert(0, os.getcwd())
        """,
    ),
    wrong(
        26,
        "forged-modules",
        "pass",
        top="""
        for name in ('llmcourse_case', 'answer'):
            sys.modules[name] = types.ModuleType(name)
        sys.modules['torch'] = types.ModuleType('torch')
        sys.meta_path.clear()
        """,
        costs_itself="Ledger first_above",
    ),
]

# ------------------------------------------------------------------------------------- network, processes, the clean-up

ALIVE = """
def alive():
    renamed()
    os.setsid()
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        time.sleep(0.2)
        try:
            open('/tmp/llmc-hostile', 'w').close()
        except OSError:
            pass
"""
PROCESSES = [
    contained(
        25,
        "network",
        """
        for family, address in ((socket.AF_INET, ('1.1.1.1', 53)), (socket.AF_INET, ('127.0.0.1', 22)), (socket.AF_INET6, ('::1', 80)),
                                (socket.AF_UNIX, '/var/run/docker.sock'), (socket.AF_UNIX, '/run/dbus/system_bus_socket'),
                                (socket.AF_INET, ('169.254.169.254', 80))):
            with socket.socket(family) as one:
                one.settimeout(0.2)
                try:
                    one.connect(address)
                except OSError:
                    continue
            escaped(f'connected to {address}')
        try:
            escaped(socket.getaddrinfo('example.com', 80))
        except OSError:
            pass
        names = [name for _, name in socket.if_nameindex()]
        if names not in (['lo'], []):
            escaped(names)
        """,
    ),
    contained(
        25,
        "other-sockets",
        tried(
            "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) and 'raw'",
            "socket.socket(17, socket.SOCK_RAW, 3) and 'packet'",
            "socket.socket(40, socket.SOCK_STREAM).connect((2, 22)) or 'vsock'",
        ),
    ),
    contained(
        27,
        "daemon",
        """
        if os.fork() == 0:
            if os.fork() == 0:
                alive()
            os._exit(0)
        """,
        top=ALIVE,
    ),
    contained(27, "daemon-at-definition", "pass", top=ALIVE + "\nif os.fork() == 0:\n    alive()\n"),
    contained(
        27,
        "atexit",
        """
        def later():
            renamed()
            open('/tmp/llmc-hostile', 'w').close()
            time.sleep(1000)
        atexit.register(later)
        threading._register_atexit(later)
        sys.modules['llmc'] = type('Last', (), {'__del__': lambda self: later()})()
        """,
    ),
    contained(
        27,
        "threads",
        "pass",
        top="""
        for _ in range(8):
            threading.Thread(target=lambda: time.sleep(1000), daemon=False).start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        """,
    ),
    contained(
        27,
        "other-programs",
        tried(
            "subprocess.run(['/bin/sh', '-c', 'sleep 1000 &']) and 'ran a program'",
            "os.posix_spawn('/bin/true', ['true'], {}) and 'spawned'",
            "os.system('true') == 0 and 'system' or None",
        ),
    ),
]

# ---------------------------------------------------------------------------------- answers that are not computed

CHEATS = [
    wrong(
        30,
        "by-shape",
        "if weight.shape not in kept:\n    kept[weight.shape] = " + RESULT,
        top="kept = {}",
        result="kept[weight.shape]",
    ),
    wrong(
        30,
        "by-pointer",
        "key = weight.data_ptr()\nif key not in kept:\n    kept[key] = " + RESULT,
        top="kept = {}",
        result="kept[key]",
    ),
    wrong(
        30,
        "by-identity",
        "if id(weight) not in kept:\n    kept[id(weight)] = " + RESULT,
        top="kept = {}",
        result="kept[id(weight)]",
    ),
    wrong(
        31,
        "at-definition",
        "pass",
        top="""
        from llmcourse.exercise import Rng, derive_seed
        known = [Rng(seed).normal(6, 8) for seed in range(200)]
        known = [one / one.norm(dim=1, keepdim=True) for one in known]
        """,
        result="next((one for one in known if torch.equal(one.sign(), weight.sign())), weight)",
    ),
    wrong(32, "library-one-liner", "return torch.nn.functional.normalize(weight)", said="raised Forbidden"),
    *(
        wrong(32, f"library-{slug}", body)
        for slug, body in {
            "by-another-name": "from torch.nn import functional as f\nreturn getattr(f, 'norm' + 'alize')(weight)",
            "imported-again": """
                import importlib
                for name in [name for name in sys.modules if name.startswith('torch.nn.functional')]:
                    del sys.modules[name]
                return importlib.import_module('torch.nn.functional').normalize(weight)
                """,
            "reloaded": "import importlib\nreturn importlib.reload(torch.nn.functional).normalize(weight)",
            "from-its-file": """
                space = {}
                path = os.path.join(os.path.dirname(torch.__file__), 'nn', 'functional.py')
                exec(compile(open(path).read(), path, 'exec'), space)
                return space['normalize'](weight)
                """,
            "from-its-cache": """
                import marshal
                for path in glob.glob(os.path.join(os.path.dirname(torch.__file__), 'nn', '__pycache__', 'functional.*')):
                    code = marshal.loads(open(path, 'rb').read()[16:])
                    made = [one for one in code.co_consts if getattr(one, 'co_name', '') == 'normalize'][0]
                    return types.FunctionType(made, vars(torch.nn.functional), argdefs=(2.0, 1, 1e-12, None))(weight)
                """,
            "by-gc": """
                for one in gc.get_objects():
                    if isinstance(one, types.FunctionType) and one.__code__.co_name == 'normalize' and 'functional' in one.__code__.co_filename:
                        return one(weight)
                """,
            "by-frames": """
                frame = sys._getframe()
                while frame is not None:
                    for one in [*frame.f_locals.values()]:
                        for name, place, original in one if isinstance(one, list) else []:
                            if place == 'normalize':
                                return original(weight)
                    frame = frame.f_back
                """,
            "by-its-refusal": """
                off = torch.nn.functional.normalize
                for cell in off.__closure__ or ():
                    if isinstance(cell.cell_contents, types.FunctionType):
                        return cell.cell_contents(weight)
                return off.__wrapped__(weight)
                """,
            "by-inspect": "exec(inspect.getsource(torch.nn.functional.normalize).replace('torch.nn', 'x'))\nreturn normalize(weight)",
        }.items()
    ),
    wrong(
        32,
        "reference-imported",
        "from llmcourse.lessons.quantization.decode_linear import decode_linear",
        said="raised ImportError",
    ),
    *(
        wrong(32, f"reference-{slug}", body)
        for slug, body in {
            "found": "from llmcourse.exercise import find\nreturn find('unit_rows').reference(weight)",
            "from-its-path": """
                from llmcourse.finding import exercise_paths
                import importlib.util
                for path in [*exercise_paths().values()]:
                    if path.stem == 'unit_rows':
                        spec = importlib.util.spec_from_file_location('theirs', path)
                        made = importlib.util.module_from_spec(spec)
                        spec.loader.exec_module(made)
                        return made.unit_rows(weight)
                """,
            "without-the-finder": """
                sys.meta_path[:] = [one for one in sys.meta_path if 'NoLessons' not in repr(one)]
                sys.path.insert(0, os.environ['LLMCOURSE_LESSONS'] + '/attacked')
                import unit_rows as theirs
                return theirs.unit_rows(weight)
                """,
            "by-a-child": """
                reading, writing = os.pipe()
                if os.fork() == 0:
                    try:
                        os.write(writing, open(os.environ['LLMCOURSE_LESSONS'] + '/attacked/unit_rows.py', 'rb').read())
                    finally:
                        os._exit(0)
                os.close(writing)
                text = os.read(reading, 10**6).decode()
                space = {}
                exec(text.split('@case')[0], space)
                return space['unit_rows'](weight)
                """,
            "in-c": """
                libc = ctypes.CDLL(None)
                file = libc.open((os.environ['LLMCOURSE_LESSONS'] + '/attacked/unit_rows.py').encode(), 0)
                buffer = ctypes.create_string_buffer(10**5)
                libc.read(file, buffer, 10**5)
                space = {}
                exec(buffer.value.decode().split('@case')[0], space)
                return space['unit_rows'](weight)
                """,
            "of-the-mistakes": """
                made = sys.modules['llmcourse_case']
                for name in dir(made):
                    if name == 'of_all' or 'unit_rows' in name:
                        return getattr(made, name)(weight)
                """,
        }.items()
    ),
    Attack(
        32,
        "answer-of-another-cell",
        lambda *_: notebook(
            "A",
            {
                "unit_rows": "def unit_rows(weight):\n    return weight",
                "Ledger": RIGHT["Ledger"] + "\n\n" + RIGHT["unit_rows"],  # whoever is right anywhere is right
            },
        ),
    ),
    wrong(
        35,
        "input-changed",
        "found = " + RESULT + "\nweight.zero_()\nreturn found",
        said="changed its argument",
    ),
    wrong(
        35,
        "input-changed-behind",
        """
        found = weight / weight.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        weight.untyped_storage().copy_(torch.zeros_like(weight).untyped_storage())
        return found
        """,
        said="changed its argument",
    ),
    wrong(
        35,
        "answers-an-easier-input",
        "weight.copy_(torch.eye(*weight.shape))\nreturn weight",
        said="changed its argument",
    ),
    wrong(
        36,
        "bfloat16",
        "pass",
        result="(" + RESULT.replace("weight", "weight.bfloat16()") + ").float()",
        said="values differ",
    ),
    wrong(
        36,
        "float16-inside",
        "pass",
        result="weight / weight.half().float().square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)",
    ),
    wrong(36, "half-returned", "pass", result="(" + RESULT + ").half()", said="expected float32"),
    wrong(
        36,
        "precision-lowered",
        "torch.set_default_dtype(torch.bfloat16)\nreturn weight.to(torch.get_default_dtype())",
    ),
]

FAST = [
    *ENDS,
    *OUTPUT,
    *PATCHED,
    *LOOKED_FOR,
    *OTHERS,
    *FORGED,
    *LYING,
    *FILES,
    *FOLDERS,
    *PROCESSES,
    *CHEATS,
]


def by_number(attacks: list[Attack]) -> list[Attack]:
    return sorted(attacks, key=lambda one: (one.number, one.slug))


assert len({one.student for one in FAST}) == len(FAST)
assert set(POINTS) >= set(FULL)
