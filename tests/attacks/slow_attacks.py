"""Attacks that take long: what uses up a resource, and what is raced. Points as in `attacks`."""

from __future__ import annotations

import os
from typing import Any

from tests.attacks.attacks import (
    ALIVE,
    FULL,
    HEAD,
    NOTHING,
    RESULT,
    Attack,
    contained,
    laid_out,
    text_of,
    unit,
    wrong,
)
from tests.attacks.course import Place, notebook


def hanging_cells(place: Place, student: str) -> dict[str, Any]:
    made = notebook("A")
    cell = {"cell_type": "code", "source": "", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [
        {**cell, "id": f"x{i}", "source": f"class A{i}:\n    while True:\n        pass"} for i in range(1_000)
    ]
    made["cells"][2:2] = cells
    return made


def hundred_thousand_files(place: Place, student: str) -> None:
    folder = place.folder(student)
    for number in range(100_000):
        os.close(os.open(folder / f"{number}.ipynb", os.O_CREAT | os.O_WRONLY))
    (folder / "A.ipynb").write_text(text_of(notebook("A")))


def of_cells(number: int, slug: str, answers: dict[str, str], **earns: float) -> Attack:
    return Attack(number, slug, lambda *_: notebook("A", answers), FULL | earns)


RESOURCES = [
    wrong(1, "endless-loop", "while True:\n    pass", said="your answer was stopped"),
    wrong(
        1,
        "endless-loop-in-c",
        "re = __import__('re')\nre.match('(a+)+$', 'a' * 60 + 'b')",
        said="your answer was stopped",
    ),
    wrong(1, "sleeps", "time.sleep(10**6)", said="your answer was stopped"),
    wrong(
        1,
        "waits-for-a-lock",
        "one = threading.Lock()\none.acquire()\none.acquire()",
        said="your answer was stopped",
    ),
    wrong(
        1,
        "catches-everything",
        """
        while True:
            try:
                time.sleep(1)
            except BaseException:
                continue
        """,
        said="your answer was stopped",
    ),
    wrong(1, "endless-at-definition", "pass", top="while True:\n    pass", said="it ran for more than"),
    wrong(1, "waits-on-stdin", "input()\nsys.stdin.read()\nwhile True: time.sleep(1)", said="your answer"),
    wrong(1, "endless-generator", "return (i for i in iter(int, 1))", said="expected float32"),
    of_cells(
        1,
        "endless-everywhere",
        {
            "unit_rows": "def unit_rows(weight):\n    while True:\n        pass",
            "Ledger": "class Ledger:\n    def __init__(self, path):\n        while True:\n            pass",
            "first_above": "def first_above(reader, count, bound):\n    while True:\n        reader.read(0)",
        },
        **NOTHING,
    ),
    Attack(1, "a-thousand-cells-that-hang", hanging_cells, NOTHING, "hung or ended their process"),
    wrong(
        3,
        "fork-bomb",
        "renamed()\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        said="your answer",
    ),
    wrong(
        3,
        "fork-bomb-at-definition",
        "pass",
        top="renamed()\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        said="it",
    ),
    wrong(
        3,
        "fork-bomb-that-sleeps",
        "renamed()\nfor _ in range(10**5):\n    try:\n        if os.fork() == 0:\n            time.sleep(1000)\n"
        "    except OSError:\n        break",
    ),
    wrong(
        3,
        "thread-bomb",
        "renamed()\nmany = []\nwhile True:\n    many.append(threading.Thread(target=time.sleep, args=(1000,)))\n    many[-1].start()",
    ),
    wrong(
        3,
        "vfork-and-leave",
        "for _ in range(2000):\n    if os.fork() == 0:\n        renamed()\n        os.setsid()\n        os.fork()\n        time.sleep(100)",
    ),
    wrong(
        4, "memory-bomb", "kept = []\nwhile True:\n    kept.append(bytearray(1 << 26))", said="your answer"
    ),
    wrong(
        4,
        "memory-bomb-of-torch",
        "kept = []\nwhile True:\n    kept.append(torch.ones(1 << 24))",
        said="your answer",
    ),
    wrong(
        4,
        "memory-bomb-of-children",
        """
        renamed()
        for _ in range(64):
            if os.fork() == 0:
                kept = bytearray(1 << 27)
                for i in range(0, len(kept), 4096):
                    kept[i] = 1
                time.sleep(1000)
        time.sleep(1000)
        """,
        said="your answer",
    ),
    wrong(
        4,
        "memory-bomb-mapped",
        "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 1 << 26))\n    kept[-1].write(b'x' * (1 << 26))",
        said="your answer",
    ),
    wrong(
        4,
        "memory-bomb-at-definition",
        "pass",
        top="kept = [b'x' * (1 << 26) for _ in iter(int, 1)] if False else []\nwhile True:\n    kept.append(bytearray(b'x' * (1 << 26)))",
    ),
    wrong(
        5,
        "fills-the-disk",
        """
        with open('llmc-hostile', 'wb') as file:
            for number in range(1 << 20):
                os.posix_fallocate(file.fileno(), number << 24, 1 << 24)
        """,
        said="your answer raised OSError",
    ),
    wrong(
        5,
        "fills-with-files",
        "i = 0\nwhile True:\n    i += 1\n    open(f'llmc-hostile{i}', 'w').close()",
        said="your answer",
    ),
    contained(
        5,
        "sparse-file",
        "with open('llmc-hostile', 'wb') as file:\n    try:\n        file.truncate(1 << 50)\n        escaped('a file of a petabyte')\n    except OSError:\n        pass",
    ),
    contained(
        5,
        "fills-shared-memory",
        """
        import multiprocessing.shared_memory as shared
        for make in (lambda: shared.SharedMemory(create=True, size=1 << 30), lambda: os.memfd_create('llmc-hostile'),
                     lambda: ctypes.CDLL(None).shmget(0, 1 << 30, 0o1777) >= 0 or 1 / 0):
            try:
                escaped(make())
            except (OSError, ZeroDivisionError):
                pass
        """,
    ),
    contained(
        27, "daemons-that-hold-on", "for _ in range(40):\n    if os.fork() == 0:\n        alive()", top=ALIVE
    ),
    laid_out(24, "100000-files", hundred_thousand_files, "over 2,000 entries", earns=FULL, refused=False),
]

# --------------------------------------------------------------------------------------------------- what is raced

RACE_HEAD = (
    HEAD
    + """
SLOW = lambda kept, x: (kept @ x + kept @ x + kept @ x) / 3
"""
)


def raced(number: int, slug: str, body: str, *, top: str = "", said: str = "") -> Attack:
    """An answer that is right and slow, or wrong in laps alone: it keeps the points for the cases, not the race's."""
    text = (
        RACE_HEAD
        + top
        + "\ndef project(weight):\n    kept = weight.clone()\n    if len(kept) < 100:\n        return lambda x: kept @ x\n"
    )
    text += "\n".join("    " + line for line in body.strip("\n").split("\n")) + "\n    return run\n"
    return Attack(number, slug, lambda *_: notebook("R", {"project": text}), {"project": 3.0}, said)


def lapping(text: str) -> str:
    return "def run(x):\n" + "\n".join("    " + line for line in text.strip("\n").split("\n"))


HELPER = """
import mmap
K, N = kept.shape[1], len(kept)
shared = mmap.mmap(-1, 4 * (K + N))
given = torch.frombuffer(shared, dtype=torch.float32, count=K)
out = torch.frombuffer(shared, dtype=torch.float32, count=N, offset=4 * K)
to_helper, from_judge = os.pipe()[::-1], None
ask_r, ask_w = os.pipe()
done_r, done_w = os.pipe()
if START() == 0:
    renamed()
    os.sched_setaffinity(0, range(os.cpu_count()))
    while os.read(ask_r, 1):
        out.copy_(SLOW(kept, given))
        os.write(done_w, b'x')
def run(x):
    given.copy_(x)
    os.write(ask_w, b'x')
    os.read(done_r, 1)
    return out.clone()
"""

RACES = [
    raced(31, "slow", lapping("return SLOW(kept, x)"), said="below the stated share"),
    raced(
        8,
        "slow-with-patched-clocks",
        lapping("return SLOW(kept, x)"),
        said="below the stated share",
        top="""
time.perf_counter = time.monotonic = time.time = time.process_time = lambda: 0.0
time.clock_gettime = lambda *_: 0.0
torch.cuda.synchronize = lambda *_: None
""",
    ),
    raced(
        30,
        "kept-by-shape",
        "known = {}\n"
        + lapping("if x.shape not in known:\n    known[x.shape] = kept @ x\nreturn known[x.shape]"),
        said="expected",
    ),
    raced(
        30,
        "kept-by-pointer",
        "known = {}\n"
        + lapping(
            "if x.data_ptr() not in known:\n    known[x.data_ptr()] = SLOW(kept, x)\nreturn known[x.data_ptr()]"
        ),
    ),
    raced(
        30,
        "kept-by-first-values",
        "known = {}\n"
        + lapping(
            "key = tuple(x[:2].round().tolist())\nif key not in known:\n    known[key] = SLOW(kept, x)\nreturn known[key]"
        ),
        said="expected",
    ),
    raced(
        31,
        "guessed-inputs",
        """
from llmcourse.exercise import Rng
frame = sys._getframe()
while 'rng' not in frame.f_locals:
    frame = frame.f_back
guess = Rng(frame.f_locals['rng'].generator.initial_seed(), 0)
known = {float(one[0]): kept @ one for one in [guess.normal(2048) for _ in range(300)]}
def run(x):
    found = known.get(float(x[0]))
    return SLOW(kept, x) if found is None else found
""",
        said="below the stated share",
    ),
    raced(
        33,
        "filled-by-a-thread",
        lapping("""
out = torch.zeros(len(kept))
threading.Thread(target=lambda: out.copy_(SLOW(kept, x))).start()
return out
"""),
        said="expected",
    ),
    raced(
        33,
        "many-threads",
        """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(4)
def part(i, x):
    os.sched_setaffinity(0, range(os.cpu_count()))
    return SLOW(kept[i * 512:(i + 1) * 512], x)
def run(x):
    return torch.cat(list(pool.map(lambda i: part(i, x), range(4))))
""",
    ),
    raced(
        33,
        "hogs-between-laps",
        """
mine = [False]
def hog():
    os.sched_setaffinity(0, range(os.cpu_count()))
    while True:
        if not mine[0]:
            sum(range(1000))
        else:
            time.sleep(1e-4)
for _ in range(8):
    threading.Thread(target=hog, daemon=True).start()
def run(x):
    mine[0] = True
    found = SLOW(kept, x)
    mine[0] = False
    return found
""",
    ),
    raced(33, "done-by-a-helper", HELPER.replace("START", "os.fork"), said="PermissionError"),
    raced(33, "done-by-a-helper-of-c", HELPER.replace("START", "ctypes.CDLL(None).fork")),
    raced(
        33,
        "helper-at-definition",
        lapping("return SLOW(kept, x)"),
        top="if os.fork() == 0:\n    while True:\n        pass\n",
    ),
    raced(
        34,
        "right-while-it-warms-up",
        "laps = []\n"
        + lapping("laps.append(1)\nreturn kept @ x if len(laps) < 10 else torch.zeros(len(kept))"),
        said="expected",
    ),
    raced(
        34,
        "wrong-one-lap-in-ten",
        "laps = []\n"
        + lapping("laps.append(1)\nreturn kept @ x if len(laps) % 10 else torch.zeros(len(kept))"),
        said="expected",
    ),
    raced(
        34,
        "fast-every-other-lap",
        "laps = []\n" + lapping("laps.append(1)\nreturn kept @ x if len(laps) % 2 else SLOW(kept, x)"),
    ),
    raced(35, "input-changed", lapping("found = SLOW(kept, x)\nx.zero_()\nreturn found")),
    raced(
        36,
        "bfloat16",
        "narrow = kept.bfloat16()\n" + lapping("return (narrow @ x.bfloat16()).float()"),
        said="expected",
    ),
    raced(36, "half-of-the-columns", lapping("return 2 * (kept[:, ::2] @ x[::2])"), said="expected"),
    raced(37, "nothing-computed", lapping("return torch.zeros(len(kept))"), said="expected"),
    raced(37, "input-returned", lapping("return x"), said="expected"),
    raced(37, "promise-returned", lapping("return torch.zeros(1).expand(len(kept))"), said="expected"),
    raced(
        37,
        "forged-lap",
        """
connection = None
for name in os.listdir('/proc/self/fd'):
    try:
        connection = socket.socket(fileno=os.dup(int(name)))
    except OSError:
        continue
def run(x):
    wire.send(connection, {'done': True, 'error': None, 'seconds': 0.0, 'tried': [], 'changed': []}, {'observed': torch.zeros(len(kept))})
    return SLOW(kept, x)
""",
    ),
    raced(37, "lap-without-end", lapping("while True:\n    pass"), said="it ran for more than"),
    raced(2, "dies-in-a-lap", lapping("os._exit(0)"), said="exit status 0"),
    # It finds out that it is loaded for the race, and ends: its own loss, no fault of the grader's.
    raced(
        2,
        "dies-before-the-race",
        lapping("return SLOW(kept, x)"),
        said="exit status 9",
        top="""
def waiting():
    while not hasattr(sys.modules.get('llmcourse_case'), 'a_wide_projection'):
        time.sleep(0.001)
    os._exit(9)
threading.Thread(target=waiting, daemon=True).start()
""",
    ),
    Attack(
        29,
        "wrong-and-fast",
        lambda *_: notebook("R", {"project": "def project(weight):\n    return lambda x: x[:1]"}),
        {"project": 0.0},
    ),
]
SLOW = [*RESOURCES, *RACES]
assert RESULT and unit
