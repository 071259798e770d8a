"""What a pickle would import, told from its opcodes; nothing of it is run."""

from __future__ import annotations

import contextlib
import importlib
import io
import lzma
import pathlib
import pickle
import pickletools
import re
import string
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

from llmcourse.counting import PeakOfItem, memory_error_bytes
from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake

Pair = tuple[str, str]


@exercise(
    points=3,
    minutes=50,
    extension=True,
    forbid=(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "pickle._load",
        "pickle._loads",
        "pickle._Unpickler",
        "pickle._Unpickler.load",
        "_pickle.load",
        "_pickle.loads",
        "_pickle.Unpickler",
        "multiprocessing.reduction.ForkingPickler.loads",
        "torch.load",
        "torch.serialization.load",
        "torch.serialization.get_unsafe_globals_in_checkpoint",
        "torch._weights_only_unpickler.load",
        "torch._weights_only_unpickler.Unpickler",
        "torch.package._package_unpickler.PackageUnpickler",
    ),
    hints=(
        "A pickle is a program for a machine with a stack and a memo. Let the machine go through all of it with texts "
        "as themselves and everything else as a thing unknown; op.stack_before and op.stack_after say how many.",
        "MEMOIZE leaves the text where it is, and its place in the memo is len(memo); whatever takes a mark takes "
        "all above it; and the memo's texts, a copied one and old byte strings are texts, too.",
    ),
)
def pickle_imports(data: bytes) -> list[tuple[str, str]]:
    """What unpickling would import, without doing it: pairs (module, name), sorted,
    each once; about 45 lines.

    data is a pickle of protocol 0 to 5, or several one after the other up to the last
    byte, each with a stack and a memo of its own. If, and only if, it begins with
    b"PK\\x03\\x04", it is a zip archive as torch.save writes it; then every member
    whose name ends in .pkl holds pickles as above, no further archive, and where two
    have one name both count. No other member is read into memory (a sixth of the
    points).

    Pairs are what the file says, harmless ones too: a dotted name stays whole, Python
    2's modules keep their names. These opcodes import, and no others; what a call would
    import in its turn is not asked:

    - GLOBAL and INST have module and name in their argument, in ASCII and without
      spaces.
    - STACK_GLOBAL takes them from the stack: the two topmost values, module below name.
      Texts come from any opcode that makes one (STRING, BINSTRING, SHORT_BINSTRING do,
      since Python 3 decodes them), from the memo, from DUP.
    - EXT1, EXT2 and EXT4 have a number that only the process that loads can look up. It
      is the second half of the pair, as in ("extension registry", "17").

    ValueError, and nothing else, for what cannot be known or read: STACK_GLOBAL on
    anything but two texts, such as the result of a call; bytes that end before STOP;
    opcodes and arguments that are none; too few values on the stack for an opcode, no
    mark, a memo entry never made; bytes behind the last pickle (torch wrote such files
    before 1.6); an archive that cannot be opened, has no .pkl, or one that is damaged
    or encrypted. Imports found before that are no excuse: an unpickler would have made
    them, and this function has not seen all.

    How many values an opcode takes and leaves matters, not whether an unpickler could
    use them: a list as a dict's key, a call of None, a buffer that the file leaves to
    its reader are no errors here. All opcodes of pickletools.opcodes may occur.
    pickletools.genops may be used: it cuts bytes into opcodes and runs none. What
    unpickles is switched off.
    """
    ### BEGIN SOLUTION
    found: set[tuple[str, str]] = set()

    def follow(opcodes: Any) -> None:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for op, argument, _ in opcodes:
            pushed: list[Any] = list(op.stack_after)
            if op.name in ("GLOBAL", "INST"):
                module, name = argument.split(" ")
                found.add((module, name))
            elif op.name == "STACK_GLOBAL":
                module, name = stack[-2:]
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError("STACK_GLOBAL takes names that only a call would give")
                found.add((module, name))
            elif op.name.startswith("EXT"):
                found.add(("extension registry", str(argument)))
            elif op.name == "OBJ" and stack[-1] is pickletools.markobject:
                raise ValueError("OBJ finds no class above its mark")
            elif op.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
                pushed = stack[-1:]
            elif "PUT" in op.name:
                memo[argument] = stack[-1]
            elif "GET" in op.name:
                pushed = [memo[argument]]
            elif op.name == "DUP":
                pushed = stack[-1:] * 2
            elif "STRING" in op.name or "UNICODE" in op.name:
                pushed = [argument]

            taken = op.stack_before
            if pickletools.markobject in taken:
                taken = taken[: taken.index(pickletools.markobject)]
                while stack.pop() is not pickletools.markobject:
                    continue
            for _ in taken:
                stack.pop()
            stack += pushed

    parts = [data]
    try:
        if data.startswith(b"PK\x03\x04"):
            archive = zipfile.ZipFile(io.BytesIO(data))
            parts = [archive.read(each) for each in archive.infolist() if each.filename.endswith(".pkl")]
        if not parts:
            raise ValueError("the archive has no member that ends in .pkl")
        for part in parts:
            stream = io.BytesIO(part)
            follow(pickletools.genops(stream))
            while stream.tell() < len(part):
                follow(pickletools.genops(stream))
    except (IndexError, KeyError) as error:
        raise ValueError("an opcode finds too little on the stack or in the memo") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error) as error:
        raise ValueError(f"an archive that is damaged: {error}") from error
    except (OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"an archive that cannot be read: {error}") from error
    return sorted(found)
    ### END SOLUTION


# ------------------------------------------------------------------------------------------------- made by hand


def line(text: str) -> bytes:
    return text.encode() + b"\n"


def with_length(opcode: bytes, form: str, text: str) -> bytes:
    return opcode + struct.pack(form, len(text.encode())) + text.encode()


TEXTS: dict[str, Callable[[str], bytes]] = {
    "UNICODE": lambda text: pickle.UNICODE + line(text),
    "BINUNICODE": lambda text: with_length(pickle.BINUNICODE, "<I", text),
    "SHORT_BINUNICODE": lambda text: with_length(pickle.SHORT_BINUNICODE, "<B", text),
    "BINUNICODE8": lambda text: with_length(pickle.BINUNICODE8, "<Q", text),
    "STRING": lambda text: pickle.STRING + line(repr(text)),
    "BINSTRING": lambda text: with_length(pickle.BINSTRING, "<i", text),
    "SHORT_BINSTRING": lambda text: with_length(pickle.SHORT_BINSTRING, "<B", text),
}
text = TEXTS["SHORT_BINUNICODE"]
FROM_STACK = pickle.STACK_GLOBAL


def word(rng: Rng) -> str:
    """A name that nothing has."""
    return "m" + rng.bytes(3).hex()


def named(rng: Rng) -> bytes:
    """An opcode that imports something of a drawn name, in the oldest way or the newest."""
    module, name = f"{word(rng)}.{word(rng)}", word(rng)
    if rng.integer(0, 1):
        return pickle.GLOBAL + line(module) + line(name)
    return text(module) + text(name) + FROM_STACK


class Files:
    """Files in the judge's process, given out in a drawn order; their names stay there."""

    calls = ("all",)

    def __init__(self, rng: Rng) -> None:
        files = self.made(rng)
        self._names = rng.shuffled(files)
        self._files = [files[name] for name in self._names]

    def made(self, rng: Rng) -> dict[str, bytes]:
        """The files by name."""
        raise AssertionError("every kind of files makes its own")

    def all(self) -> list[bytes]:
        """The files."""
        return self._files

    def observed(self, observed: Any) -> Any:
        """The list of outcomes by the files' names, which never leave this process."""
        fits = isinstance(observed, list) and len(observed) == len(self._names)
        return dict(zip(self._names, observed, strict=True)) if fits else observed

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return {}


def outcome(answer, data):
    """What is returned, or the name of what is raised: "ValueError" for one of any kind."""
    try:
        return answer(data)
    except ValueError:
        return "ValueError"
    except NotImplementedError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is observed
        return type(error).__name__


def outcomes(answer, files):
    """What is returned or raised for each file, in their order."""
    return [outcome(answer, data) for data in files.all()]


# ---------------------------------------------------------------------------------------------------------- cases


def state_dict_pickle(protocol: int) -> bytes:
    """The data.pkl of a checkpoint: the state_dict of a layer with weights, running means and a counter."""
    buffer = io.BytesIO()
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), buffer, pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


class Real(Files):
    """What the pickle module itself writes, in all its protocols."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        import collections
        import datetime
        import fractions
        import math
        import types

        day = datetime.date(2000 + rng.integer(0, 20), 1, 2)
        one = [
            day,
            datetime.timedelta(days=rng.integer(1, 9)),
            fractions.Fraction(rng.integer(1, 9), 10),
            day,
        ]
        functions = rng.shuffled([struct.pack, struct.unpack, zlib.crc32, zlib.adler32, math.sin, math.cos])
        other = [
            collections.OrderedDict(a=rng.integer(0, 9)),
            datetime.date.max,
            pathlib.PurePosixPath("a"),
            *functions[:2],
        ]
        error = KeyError("os")
        error.state = types.SimpleNamespace(name="system", when=day)  # type: ignore[attr-defined]
        loop: list[Any] = [functions[2]]
        loop.append((loop, loop, error))
        numbers = [3, 1000, -70_000, 1 << 70, -(1 << 2390)]
        every = [
            one,
            other,
            {"datetime": one, "date": other},
            "os system",
            [1, "datetime", "date", b"x", 2.5, None],
            # Objects with state, and what holds itself.
            # Sets whose order is the same in every process, which the hash of a text is not.
            [string.Template("date"), error, loop[1], frozenset(numbers), frozenset(["date"]), {day}],
        ]
        # More things in the memo than a byte can number, and one of them twice.
        many = [
            [[] for _ in range(260)],
            functions[3],
            functions[3],
            bytearray(b"cos\nrm\n."),
            rng.bytes(300),
        ]
        made = {
            f"protocol {protocol}, object {index}": pickle.dumps([every[index], rng.integer(0, 99)], protocol)
            for protocol in range(6)
            for index in rng.shuffled(range(len(every)))
        }
        made |= {
            f"protocol {protocol}, much": pickle.dumps(many, protocol)
            for protocol in rng.choice([(2, 5), (3, 4)])
        }
        made["protocol 5, bytes"] = pickle.dumps(many[3:], 5)
        return made | {
            f"a state_dict, protocol {protocol}": state_dict_pickle(protocol) for protocol in (2, 4)
        }


@case(pickle_imports, service=Real)
def every_protocol(answer, rng, files):
    """What the pickle module writes in protocols 0 to 5: dates, objects with state, long numbers, a state_dict."""
    return outcomes(answer, files)


def text_line(opcode: bytes, value: object) -> bytes:
    return opcode + line(str(value))


def number(size_bytes: int, rng: Rng) -> bytes:
    """LONG1 or LONG4 with a number of so many bytes."""
    length = struct.pack("<B" if size_bytes < 256 else "<i", size_bytes)
    return (pickle.LONG1 if size_bytes < 256 else pickle.LONG4) + length + rng.bytes(size_bytes)


def values_of_every_opcode(rng: Rng) -> dict[str, bytes]:
    """What leaves one value on the stack, by the opcode that does."""
    x, y, looks = word(rng), word(rng), b"cos\nrm\n.R"
    tx, ty, mark, something = text(x), text(y), pickle.MARK, pickle.GLOBAL + line(word(rng)) + line(x)
    size4, size8, empty = struct.pack("<I", len(looks)), struct.pack("<Q", len(looks)), pickle.EMPTY_TUPLE
    place = rng.integer(2, 9)
    made = {name: making(x) for name, making in TEXTS.items()}
    made |= {f"a number of {size} bytes": number(size, rng) for size in (0, 1, 2, 9, 255, 300)}
    return made | {
        "INT": text_line(pickle.INT, rng.integer(-9, 9)),
        "INT of a bool": pickle.INT + b"01\n",
        "LONG": text_line(pickle.LONG, f"{rng.integer(1, 9) << 90}L"),
        "BININT": pickle.BININT + rng.bytes(4),
        "BININT1": pickle.BININT1 + b".",
        "BININT2": pickle.BININT2 + b"..",
        "NONE": pickle.NONE,
        "NEWTRUE": pickle.NEWTRUE,
        "NEWFALSE": pickle.NEWFALSE,
        "FLOAT": text_line(pickle.FLOAT, rng.integer(1, 9) / 8),
        "BINFLOAT": pickle.BINFLOAT + rng.bytes(8),
        "BINBYTES": pickle.BINBYTES + size4 + looks,
        "SHORT_BINBYTES": pickle.SHORT_BINBYTES + size4[:1] + looks,
        "BINBYTES8": pickle.BINBYTES8 + size8 + looks,
        "BYTEARRAY8": pickle.BYTEARRAY8 + size8 + looks,
        "NEXT_BUFFER": pickle.NEXT_BUFFER,
        "READONLY_BUFFER": pickle.BYTEARRAY8 + size8 + looks + pickle.READONLY_BUFFER,
        "EMPTY_LIST": pickle.EMPTY_LIST,
        "APPEND": pickle.EMPTY_LIST + tx + pickle.APPEND + ty + pickle.APPEND,
        "APPENDS": pickle.EMPTY_LIST + mark + tx + ty + pickle.APPENDS,
        "LIST": mark + tx + ty + pickle.LIST,
        "EMPTY_TUPLE": empty,
        "TUPLE": mark + tx + ty + tx + ty + pickle.TUPLE,
        "TUPLE1": tx + pickle.TUPLE1,
        "TUPLE2": tx + ty + pickle.TUPLE2,
        "TUPLE3": tx + ty + tx + pickle.TUPLE3,
        "EMPTY_DICT": pickle.EMPTY_DICT,
        "DICT": mark + tx + ty + pickle.DICT,
        "SETITEM": pickle.EMPTY_DICT + tx + ty + pickle.SETITEM,
        "SETITEMS": pickle.EMPTY_DICT + mark + tx + ty + ty + tx + pickle.SETITEMS,
        "EMPTY_SET": pickle.EMPTY_SET,
        "ADDITEMS": pickle.EMPTY_SET + mark + tx + ty + tx + pickle.ADDITEMS,
        "FROZENSET": mark + tx + ty + pickle.FROZENSET,
        "POP": tx + ty + pickle.POP,
        "POP_MARK": tx + mark + ty + tx + pickle.POP_MARK,
        "DUP": tx + pickle.DUP + pickle.TUPLE2,
        "PUT and GET": tx + text_line(pickle.PUT, place) + text_line(pickle.GET, place) + pickle.TUPLE2,
        "BINPUT and BINGET": tx + pickle.BINPUT + b"\2" + ty + pickle.BINGET + b"\2" + pickle.TUPLE3,
        "LONG_BINPUT and LONG_BINGET": tx
        + pickle.LONG_BINPUT
        + size4
        + pickle.LONG_BINGET
        + size4
        + pickle.TUPLE2,
        "MEMOIZE": tx + pickle.MEMOIZE,
        "EXT1": pickle.EXT1 + bytes([place]),
        "EXT2": pickle.EXT2 + bytes([place, 1]),
        "EXT4": pickle.EXT4 + bytes([place, 1, 1, 0]),
        "GLOBAL": something,
        "STACK_GLOBAL": tx + ty + FROM_STACK,
        "REDUCE": something + tx + pickle.TUPLE1 + pickle.REDUCE,
        "BUILD": something
        + empty
        + pickle.REDUCE
        + pickle.EMPTY_DICT
        + tx
        + ty
        + pickle.SETITEM
        + pickle.BUILD,
        "INST": mark + tx + ty + pickle.INST + line(x) + line(y),
        "OBJ": mark + something + tx + ty + pickle.OBJ,
        "NEWOBJ": something + tx + pickle.TUPLE1 + pickle.NEWOBJ,
        "NEWOBJ_EX": something + empty + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
        "PROTO": pickle.PROTO + b"\2" + tx,
        "FRAME": pickle.FRAME + struct.pack("<Q", len(ty)) + ty,
        "PERSID": text_line(pickle.PERSID, f"{x} {y}"),
        "BINPERSID": tx + pickle.BINPERSID,
    }


# What leaves one value by the numbers of values that opcodes take, though no unpickler gets through it.
UNUSABLE = {
    "a list as a key": pickle.EMPTY_DICT + pickle.EMPTY_LIST + pickle.NONE + pickle.SETITEM,
    "a list in a frozenset": pickle.MARK + pickle.EMPTY_LIST + pickle.FROZENSET,
    "a call of None": pickle.NONE + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "an instance of a number": pickle.BININT1 + b"7" + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
    "added to a number": pickle.BININT1 + b"7" + pickle.NONE + pickle.APPEND,
    "state of a number": pickle.BININT1
    + b"7"
    + pickle.MARK
    + text("a")
    + text("b")
    + pickle.DICT
    + pickle.BUILD,
}


class BetweenNames(Files):
    """A pickle for every opcode: what it makes is made above two names, kept below them, or dropped between them."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        made = {}
        for what, value in {**values_of_every_opcode(rng), **UNUSABLE}.items():
            m, n = text(word(rng)), text(word(rng))
            made[what] = rng.choice(
                [
                    m + n + value + pickle.POP + FROM_STACK + pickle.STOP,
                    m + value + pickle.POP + n + FROM_STACK + pickle.STOP,
                    value + m + n + FROM_STACK + pickle.TUPLE2 + pickle.STOP,
                ]
            )
        return made


@case(pickle_imports, service=BetweenNames)
def every_opcode(answer, rng, files):
    """STACK_GLOBAL near a value of every opcode; some values are such that an unpickler could not use them."""
    return outcomes(answer, files)


class OnTheStack(Files):
    """Names that come to STACK_GLOBAL from other places than the two opcodes before it."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        m, n, x, y = (word(rng) for _ in range(4))
        put, get, keep = pickle.BINPUT, pickle.BINGET, pickle.MEMOIZE
        pop, mark, end = pickle.POP, pickle.MARK, FROM_STACK + pickle.STOP
        both, spare = text(m) + text(n), text(x) + text(y)
        place = rng.integer(3, 200)
        p = bytes([place])
        long = struct.pack("<I", place + (rng.integer(1, 9) << 16))
        other = rng.choice(["BINUNICODE", "SHORT_BINUNICODE"])
        called = named(rng) + pickle.EMPTY_TUPLE + pickle.REDUCE
        made = {f"{op} and another": made(m) + TEXTS[other](n) + end for op, made in TEXTS.items()}
        made |= {f"another and {op}": TEXTS[other](m) + made(n) + end for op, made in TEXTS.items()}
        return made | {
            "a text more, dropped": both + text(x) + pop + end,
            "two more, dropped with their mark": both + mark + spare + pickle.POP_MARK + end,
            "two more, made a tuple and dropped": both + mark + spare + pickle.TUPLE + pop + end,
            "a mark, dropped": both + mark + pop + end,
            "marks inside marks": both
            + mark
            + text(x)
            + mark
            + text(y)
            + pickle.LIST
            + pickle.POP_MARK
            + end,
            "put into a dict": pickle.EMPTY_DICT + mark + spare + pickle.SETITEMS + pop + both + end,
            "between them a dict": text(m) + pickle.EMPTY_DICT + spare + pickle.SETITEM + pop + text(n) + end,
            "between them a list": text(m)
            + pickle.EMPTY_LIST
            + mark
            + spare
            + pickle.APPENDS
            + pop
            + text(n)
            + end,
            "between them a number": text(m) + pickle.BININT1 + p + pop + text(n) + end,
            "between them a call": text(m) + called + pop + text(n) + end,
            "memoised and dropped": text(m) + spare + keep + pop + pop + text(n) + end,
            "copied and dropped": text(m) + text(x) + pickle.DUP + pop + pop + text(n) + end,
            "arguments from a call": pickle.GLOBAL
            + line(x)
            + line(y)
            + called
            + pickle.REDUCE
            + pop
            + both
            + end,
            "keywords from a call": pickle.GLOBAL
            + line(x)
            + line(y)
            + called * 2
            + pickle.NEWOBJ_EX
            + pop
            + both
            + end,
            "added to what a call gives": called + mark + spare + pickle.ADDITEMS + pop + both + end,
            "copied": text(m) + pickle.DUP + end,
            "copied twice": text(x)
            + text(m)
            + pickle.DUP
            + pickle.DUP
            + FROM_STACK
            + pickle.TUPLE2
            + pickle.STOP,
            "name memoised first": text(n) + keep + pop + text(m) + keep + get + b"\0" + end,
            "both from the memo": spare
            + pop
            + pop
            + both
            + put
            + p
            + pop
            + keep
            + pop
            + get
            + b"\1"
            + get
            + p
            + end,
            "memo in text": text(m)
            + pickle.PUT
            + line(str(place))
            + pop
            + pickle.GET
            + line(str(place))
            + text(n)
            + end,
            "memo with long numbers": text(m)
            + pickle.LONG_BINPUT
            + long
            + pop
            + text(x)
            + put
            + p
            + pop
            + pickle.LONG_BINGET
            + long
            + text(n)
            + end,
            "a place in the memo used again": text(x)
            + put
            + p
            + pop
            + text(m)
            + put
            + p
            + pop
            + get
            + p
            + text(n)
            + end,
            "memoised twice": both + keep + keep + pop + pop + text(m) + get + b"\1" + end,
            "memoised after a place was put": text(x)
            + put
            + p
            + pop
            + text(m)
            + keep
            + pop
            + get
            + b"\1"
            + text(n)
            + end,
            "what was imported is kept": named(rng)
            + keep
            + both
            + keep
            + FROM_STACK
            + pickle.TUPLE2
            + pickle.STOP,
            "in a frame": pickle.PROTO + b"\4" + pickle.FRAME + struct.pack("<Q", len(both) + 2) + both + end,
            "not in ASCII": text(m + "\u00e9") + text(n) + end,
            "a dotted name": text(m) + text(f"{n}.{x}") + end,
            "a name with a space": text(m) + text(f"{n} {x}") + end,
        }


@case(pickle_imports, service=OnTheStack)
def names_from_the_stack(answer, rng, files):
    """STACK_GLOBAL with names of any text opcode, from the memo, copied, and with things made and dropped between."""
    return outcomes(answer, files)


class InTheirArguments(Files):
    """Opcodes that carry names or numbers themselves, and data that only looks like them."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        m, n, x = (word(rng) for _ in range(3))
        pair, stop = line(m) + line(n), pickle.STOP
        code = rng.integer(1, 255)
        known = rng.choice(
            ["collections\nOrderedDict\n", "builtins\nset\n", "torch\nFloatStorage\n"]
        ).encode()
        return {
            "GLOBAL": pickle.GLOBAL + pair + stop,
            "GLOBAL, called": pickle.GLOBAL
            + pair
            + pickle.MARK
            + text(x)
            + pickle.TUPLE
            + pickle.REDUCE
            + stop,
            "INST": pickle.MARK + text(x) + pickle.INST + pair + stop,
            "OBJ": pickle.MARK + pickle.GLOBAL + pair + text(x) + pickle.OBJ + stop,
            "INST above two texts": text(m)
            + text(n)
            + pickle.MARK
            + pickle.INST
            + line(x) * 2
            + pickle.POP
            + FROM_STACK
            + stop,
            "EXT1": pickle.EXT1 + bytes([code]) + stop,
            "EXT2": pickle.EXT2 + struct.pack("<H", 256 + code) + stop,
            "EXT4": pickle.EXT4 + struct.pack("<i", 70_000 + code) + stop,
            "a dotted name": pickle.GLOBAL + line(f"{m}.{n}") + line(f"{n}.{x}") + stop,
            "one of Python 2": pickle.GLOBAL + line("__builtin__") + line(n) + stop,
            "a harmless one": pickle.GLOBAL + known + stop,
            "one twice": pickle.GLOBAL + pair + text(m) + text(n) + FROM_STACK + pickle.TUPLE2 + stop,
            "not in order": pickle.GLOBAL
            + b"zz\n"
            + line(n)
            + pickle.GLOBAL
            + b"zz\nb\n"
            + pickle.GLOBAL
            + b"aa\nc\n"
            + pickle.TUPLE3
            + stop,
            "only a text": text(f"c{m}\n{n}\n") + stop,
            "only bytes": pickle.SHORT_BINBYTES + bytes([8]) + b"cos\nrm\n." + stop,
            "only an identifier from outside": pickle.PERSID + line(f"{m} {n}") + stop,
            "an identifier that begins like an archive": pickle.PERSID
            + b"K\5\6 "
            + line(m)
            + pickle.POP
            + pickle.GLOBAL
            + pair
            + stop,
            "an identifier from the stack": text(f"{m} {n}") + pickle.BINPERSID + stop,
            "nothing": pickle.NONE + stop,
        }


@case(pickle_imports, service=InTheirArguments)
def names_in_arguments(answer, rng, files):
    """GLOBAL, INST, OBJ and the extension registry, and data that only looks like an import."""
    return outcomes(answer, files)


class Several(Files):
    """Pickles one after the other."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        first, second, third = (named(rng) + pickle.STOP for _ in range(3))
        m, n = word(rng), word(rng)
        kept = text(m) + pickle.MEMOIZE + pickle.STOP
        packed = archive({"archive/data.pkl": third})
        inside = pickle.BINBYTES + struct.pack("<I", len(packed)) + packed
        return {
            "one": first,
            "two": first + second,
            "three": first + second + third,
            "the second imports alone": pickle.NONE + pickle.STOP + second,
            "nothing at all": b"",
            "a line break behind": first + b"\n",
            "a zero behind": first + second + b"\0",
            "weights behind": first + rng.bytes(3) + b"\xff" * 40,
            "the second one cut": first + second[:-1],
            "the second one uses the first one's memo": kept
            + pickle.BINGET
            + b"\0"
            + text(n)
            + FROM_STACK
            + pickle.STOP,
            "the second one counts its memo anew": kept
            + text(n)
            + pickle.MEMOIZE
            + pickle.BINGET
            + b"\0"
            + FROM_STACK
            + pickle.STOP,
            "the second one uses the first one's stack": text(m) * 3 + pickle.STOP + FROM_STACK + pickle.STOP,
            "an archive inside a pickle": first[:-1] + inside + pickle.POP + pickle.STOP,
            "an archive behind a pickle": first + packed,
        }


@case(pickle_imports, service=Several)
def one_after_the_other(answer, rng, files):
    """Several pickles in a row, and other bytes behind a pickle."""
    return outcomes(answer, files)


def archive(members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive. The member TWIN gets the name archive/data.pkl, which another may have."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    # In the bytes, since zipfile warns of a name that it writes twice; both names have as many.
    return buffer.getvalue().replace(TWIN, b"archive/data.pkl")


TWIN = b"twin/of/data.pkl"


def encrypted(packed: bytes) -> bytes:
    """The archive with its first member marked as encrypted, in the member's header and in the directory."""
    marked, directory = bytearray(packed), packed.index(b"PK\x01\x02")
    marked[6] |= 1
    marked[directory + 8] |= 1
    return bytes(marked)


class Containers(Files):
    """What torch.save writes, and archives like it."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        buffer = io.BytesIO()
        weights = {
            word(rng): rng.normal(2, 3),
            "half": rng.normal(2).half(),
            **torch.nn.BatchNorm1d(2).state_dict(),
        }
        torch.save(weights, buffer)
        inside, other, garbage = named(rng) + pickle.STOP, named(rng) + pickle.STOP, rng.bytes(20) + b"\xff"
        good = {"archive/data.pkl": inside, "archive/version": b"3\n", "archive/data/0": garbage}
        stored = archive(good)
        place = stored.index(inside) + rng.integer(3, len(inside) - 3)
        packed = archive(good, compression=zipfile.ZIP_DEFLATED)
        long_packed = archive(good, compression=zipfile.ZIP_LZMA)
        begins = 30 + len("archive/data.pkl")  # behind the first member's header
        return {
            "torch.save": buffer.getvalue(),
            "like it": stored,
            "compressed": packed,
            "two pickles": archive({**good, "archive/constants.pkl": other}),
            "a drawn name": archive({f"{word(rng)}/{word(rng)}.pkl": inside, "data/0": garbage}),
            "compressed with LZMA": long_packed,
            "compressed with LZMA, a byte changed": long_packed[: begins + 9]
            + b"\xff"
            + long_packed[begins + 10 :],
            "another name": archive({"model/weights.pkl": inside, "data/0": garbage}),
            "one name twice": archive({**good, TWIN.decode(): other}),
            "one name twice, the first harmless": archive({"archive/data.pkl": b"N.", TWIN.decode(): other}),
            "two pickles in one member": archive({"archive/data.pkl": inside + other}),
            "names that are only like it": archive(
                {**good, "archive/data.pkl.old": garbage, "archive/data.PKL": garbage}
            ),
            "no pickle": archive({"archive/version": b"3\n", "archive/data/0": garbage}),
            "a pickle that is none": archive({**good, "archive/data.pkl": inside[:-1]}),
            "a second pickle that is none": archive({**good, "archive/more.pkl": garbage}),
            "cut short": stored[: -rng.integer(8, 30)],
            "only its first bytes": stored[:4],
            "encrypted": encrypted(stored),
            "compressed, its first byte changed": packed[:begins] + b"\xff" + packed[begins + 1 :],
            "a byte changed": stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :],
        }


@case(pickle_imports, service=Containers)
def in_archives(answer, rng, files):
    """What torch.save writes, archives like it, and damaged ones."""
    return outcomes(answer, files)


class Malformed(Files):
    """Pickles that cannot be read, or whose imports cannot be known."""

    def made(self, rng: Rng) -> dict[str, bytes]:
        m, n, x = (word(rng) for _ in range(3))
        both, stop, seen = text(m) + text(n), pickle.STOP, named(rng)
        end = FROM_STACK + stop
        call = pickle.GLOBAL + b"builtins\nstr\n" + text(x) + pickle.TUPLE1 + pickle.REDUCE
        return {
            "intact": seen + stop,
            "no STOP": seen,
            "cut inside a text": seen + both[: -rng.integer(1, 5)],
            "cut inside a line": seen + pickle.GLOBAL + line(m) + n.encode(),
            "a length beyond the end": seen + pickle.BINUNICODE + struct.pack("<I", 1 << 30) + b"abc" + stop,
            "an opcode that is none": seen + b"\xff" + stop,
            "a number that is none": seen + pickle.INT + line(x) + stop,
            "a text that is not UTF-8": seen + pickle.SHORT_BINUNICODE + b"\2\xff\xff" + stop,
            "nothing to stop with": stop,
            "nothing to drop": seen + pickle.POP + pickle.POP + pickle.NONE + stop,
            "nothing to copy": pickle.DUP + stop,
            "nothing to memoise": pickle.MEMOIZE + seen + stop,
            "nothing to put": pickle.BINPUT + b"\0" + seen + stop,
            "one value for a pair": seen + pickle.TUPLE2 + stop,
            "no mark": seen + both + pickle.TUPLE + stop,
            "no list under the mark": pickle.MARK + seen + pickle.APPENDS + seen + stop,
            "an object without a class": seen + pickle.MARK + pickle.OBJ + pickle.TUPLE2 + stop,
            "a memo entry never made": seen + pickle.BINGET + bytes([rng.integer(0, 9)]) + stop,
            "names: one text": seen + pickle.POP + text(m) + end,
            "names: none": FROM_STACK + seen + stop,
            "names: module is None": pickle.NONE + text(n) + end,
            "names: name is None": text(m) + pickle.NONE + end,
            "names: bytes": text(m) + pickle.SHORT_BINBYTES + b"\1a" + end,
            "names: module from a call": call + text(n) + end,
            "names: name from a call": text(m) + call + end,
            "names: name from outside": text(m) + pickle.PERSID + line(n) + end,
            "names: a tuple of texts": text(m) + text(n) + text(x) + pickle.TUPLE1 + end,
            "names: from the memo, not texts": text(m)
            + pickle.NONE
            + pickle.MEMOIZE
            + pickle.POP
            + pickle.BINGET
            + b"\0"
            + end,
            "names: beyond a mark": both + pickle.MARK + end,
        }


@case(pickle_imports, service=Malformed)
def malformed(answer, rng, files):
    """Pickles that are cut short, malformed, or make names by a call, beside an intact one."""
    return outcomes(answer, files)


@case(pickle_imports)
def nothing_is_run(answer, rng):
    """A module that would notice its import, and a function of it that would notice a call."""
    name, function = f"canary_{rng.bytes(4).hex()}", "sing"
    source = f"import sys\ncalled = False\n\ndef {function}(*_):\n    sys.modules[__name__].called = True\n"
    call = pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.STOP
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, f"{name}.py").write_text(source)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            observed = [
                answer(pickle.GLOBAL + line(name) + line(function) + call),
                answer(text(name) + text(function) + FROM_STACK + call),
                answer(pickle.MARK + pickle.INST + line(name) + line(function) + pickle.STOP),
            ]
            module = sys.modules.pop(name, None)
        finally:
            sys.path.remove(folder)
    return {"imports": observed, "imported": module is not None, "called": getattr(module, "called", False)}


WEIGHT_BYTES = 32 << 20


def archive_of_weights(inside: bytes) -> bytes:
    """An archive whose pickle is `inside`, beside WEIGHT_BYTES of weights; made in little more than it takes itself."""
    part = bytes(1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(
            folder, "archive.zip"
        )  # a buffer that grows would be copied, and both copies counted
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", inside)
            with file.open("archive/data/0", "w") as weights:
                for _ in range(WEIGHT_BYTES // len(part)):
                    weights.write(part)
        return path.read_bytes()


@cost(pickle_imports, share=1 / 6, authority="outside", service=lambda rng: PeakOfItem())
def weights_are_left_alone(answer, rng, memory):
    """An archive of 32 MiB, nearly all of it weights: memory taken, the archive itself included."""
    data = archive_of_weights(named(rng) + pickle.STOP)
    observed = answer(data)
    # A quarter more than the archive, and what the system's counters are off by (up to another quarter).
    memory.bound(len(data) + len(data) // 4 + min(memory_error_bytes(), len(data) // 4))
    return {"observed": observed}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Reading:
    """A right reader in small steps; a mistake replaces one of them."""

    arguments: tuple[str, ...] = ("GLOBAL", "INST")
    texts: tuple[str, ...] = tuple(TEXTS)
    caught: tuple[type[Exception], ...] = (IndexError, KeyError)
    damaged: tuple[type[Exception], ...] = (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, RuntimeError),
    )

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.found: list[Pair] = []
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def is_archive(self) -> bool:
        return self.data.startswith(b"PK\x03\x04")

    def members(self, archive: zipfile.ZipFile) -> list[bytes]:
        return [archive.read(each) for each in archive.infolist() if each.filename.endswith(".pkl")]

    def parts(self) -> list[bytes]:
        if not self.is_archive():
            return [self.data]
        try:
            found = self.members(zipfile.ZipFile(io.BytesIO(self.data)))
        except self.damaged as error:
            raise ValueError("archive") from error
        if not found:
            raise ValueError("no pickle")
        return found

    def begin(self) -> None:
        self.stack, self.memo = [], {}

    def part(self, part: bytes) -> None:
        stream = io.BytesIO(part)
        while True:
            self.begin()
            self.one(stream)
            if stream.tell() == len(part):
                return

    def one(self, stream: io.BytesIO) -> None:
        for op, argument, _ in pickletools.genops(stream):
            self.step(op, argument)

    def step(self, op: Any, argument: Any) -> None:
        if op.name in self.arguments:
            self.add(*argument.split(" "))
        elif op.name == "STACK_GLOBAL":
            self.from_stack()
        elif op.name.startswith("EXT"):
            self.extension(argument)
        elif op.name == "OBJ":
            self.look_for_class()
        self.move(op, argument)

    def add(self, module: str, name: str) -> None:
        self.found.append((module, name))

    def from_stack(self) -> None:
        module, name = self.stack[-2:]
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("names")
        self.add(module, name)

    def look_for_class(self) -> None:
        if self.stack[-1] is pickletools.markobject:
            raise IndexError("no class")

    def extension(self, code: int) -> None:
        self.add("extension registry", str(code))

    def place(self) -> int:
        return len(self.memo)

    def copied(self) -> list[Any]:
        return self.stack[-1:] * 2

    def recalled(self, place: int) -> Any:
        return self.memo[place]

    def move(self, op: Any, argument: Any) -> None:
        pushed = list(op.stack_after)
        if op.name == "MEMOIZE":
            self.memo[self.place()] = self.stack[-1]
            pushed = self.stack[-1:]
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed = [self.recalled(argument)]
        elif op.name == "DUP":
            pushed = self.copied()
        elif op.name in self.texts:
            pushed = [argument]
        self.take(op)
        self.stack += pushed

    def take(self, op: Any) -> None:
        taken = op.stack_before
        if pickletools.markobject in taken:
            self.take_mark()
            taken = taken[: taken.index(pickletools.markobject)]
        if len(taken) > len(self.stack):
            raise IndexError("stack")
        del self.stack[len(self.stack) - len(taken) :]

    def take_mark(self) -> None:
        while self.stack.pop() is not pickletools.markobject:
            pass

    def result(self) -> list[Pair]:
        return sorted(set(self.found))

    def read(self) -> list[Pair]:
        try:
            for part in self.parts():
                self.part(part)
        except self.caught as error:
            raise ValueError("stack or memo") from error
        return self.result()


def variant(**steps: Any) -> type[Reading]:
    """A reader with some steps replaced."""
    return type("Variant", (Reading,), steps)


@mistake(
    pickle_imports,
    "Takes what begins with PK for an archive; so does a pickle with an identifier from outside.",
    fails=["names_in_arguments"],
)
def two_letters_of_an_archive(data):
    return variant(is_archive=lambda self: self.data.startswith(b"PK"))(data).read()


@mistake(
    pickle_imports,
    "Knows pickles in an archive by the names that torch gives them.",
    fails=["in_archives"],
)
def names_torch_gives(data):
    def members(self, archive):
        known = ("data.pkl", "constants.pkl", "weights.pkl", "more.pkl")
        return [archive.read(each) for each in archive.infolist() if each.filename.endswith(known)]

    return variant(members=members)(data).read()


@mistake(
    pickle_imports,
    "Lets OBJ make an object of no class: it takes all above the mark, were it nothing.",
    fails=["malformed"],
)
def object_of_no_class(data):
    return variant(look_for_class=lambda self: None)(data).read()


@mistake(
    pickle_imports,
    "Of damaged archives it knows those packed with zlib; LZMA has errors of its own.",
    fails=["in_archives"],
)
def errors_of_zlib_only(data):
    damaged = tuple(kind for kind in Reading.damaged if kind is not lzma.LZMAError)
    return variant(damaged=damaged)(data).read()


@mistake(pickle_imports, "Loads it and looks which modules are new: by then everything in it has been run.")
def loaded_in_a_try(data):
    before = set(sys.modules)
    with contextlib.suppress(Exception):
        pickle.loads(data)
    return [(module, "") for module in sorted(set(sys.modules) - before)]


@mistake(
    pickle_imports,
    "Asks torch.load(weights_only=True), which refuses a file or does not; it does not say what is in it.",
)
def weights_only(data):
    torch.load(io.BytesIO(data), weights_only=True)
    return []


@mistake(
    pickle_imports, "Searches the bytes for a pattern, and takes a text that looks like an import for one."
)
def pattern_searched(data):
    found = re.findall(rb"c([\w.]+)\n([\w.]+)\n", data)
    if not data.endswith(b".") and not data.startswith(b"PK"):
        raise ValueError("no STOP")
    return sorted({(module.decode(), name.decode()) for module, name in found})


@mistake(pickle_imports, "Knows GLOBAL, and not STACK_GLOBAL, which protocol 4 writes in its place.")
def stack_global_missed(data):
    return variant(from_stack=lambda self: None)(data).read()


@mistake(
    pickle_imports,
    "Takes the two texts written last for the names: those in the memo are missed.",
    fails=["every_opcode", "every_protocol", "names_from_the_stack", "one_after_the_other", "malformed"],
)
def memo_missed(data):
    class Last(Reading):
        def begin(self):
            super().begin()
            self.last = []

        def move(self, op, argument):
            super().move(op, argument)
            if op.name in self.texts:
                self.last.append(argument)

        def from_stack(self):
            self.add(*self.last[-2:])

    try:
        return Last(data).read()
    except TypeError:
        raise ValueError("names") from None


@mistake(
    pickle_imports,
    "Takes the two texts made or recalled last for the names, as if nothing ever left the stack.",
    fails=["every_opcode", "names_from_the_stack", "malformed"],
)
def last_two_texts(data):
    class Last(Reading):
        def begin(self):
            super().begin()
            self.last = []

        def move(self, op, argument):
            super().move(op, argument)
            if op.name in self.texts or (op.name.endswith("GET") and isinstance(self.stack[-1], str)):
                self.last.append(self.stack[-1])

        def from_stack(self):
            self.add(*self.last[-2:])

    try:
        return Last(data).read()
    except TypeError:
        raise ValueError("names") from None


@mistake(
    pickle_imports,
    "Misses INST, by which protocol 0 wrote instances.",
    fails=["every_opcode", "names_in_arguments", "nothing_is_run"],
)
def inst_missed(data):
    return variant(arguments=("GLOBAL",))(data).read()


@mistake(
    pickle_imports,
    "Misses the extension registry, which imports by number.",
    fails=["every_opcode", "names_in_arguments"],
)
def extensions_missed(data):
    return variant(extension=lambda self, code: None)(data).read()


@mistake(
    pickle_imports,
    "Reads the first of several pickles and stops at its STOP.",
    fails=["one_after_the_other", "in_archives"],
)
def first_pickle_only(data):
    def part(self, part):
        self.begin()
        self.one(io.BytesIO(part))

    return variant(part=part)(data).read()


@mistake(
    pickle_imports,
    "Takes what stands behind a pickle for the end when it cannot be read.",
    fails=["one_after_the_other"],
)
def rest_ignored(data):
    def part(self, part):
        stream = io.BytesIO(part)
        self.begin()
        self.one(stream)
        while stream.tell() < len(part):
            self.begin()
            try:
                self.one(stream)
            except (ValueError, IndexError, KeyError):
                return

    return variant(part=part)(data).read()


@mistake(
    pickle_imports,
    "The memo of one pickle is still there in the next.",
    fails=["one_after_the_other"],
)
def memo_kept(data):
    def begin(self):
        self.stack = []

    return variant(begin=begin)(data).read()


@mistake(
    pickle_imports,
    "What one pickle leaves on the stack is still there in the next.",
    fails=["one_after_the_other"],
)
def stack_kept(data):
    def begin(self):
        self.memo = {}

    return variant(begin=begin)(data).read()


@mistake(
    pickle_imports,
    "Does not open the archive that torch.save writes.",
    fails=["in_archives", "weights_are_left_alone"],
)
def archive_not_opened(data):
    return variant(is_archive=lambda self: False)(data).read()


@mistake(
    pickle_imports,
    "Asks zipfile.is_zipfile, which finds an archive anywhere in a file, also inside a pickle that is loaded as one.",
    fails=["one_after_the_other", "names_in_arguments"],
)
def archive_anywhere(data):
    return variant(is_archive=lambda self: zipfile.is_zipfile(io.BytesIO(self.data)))(data).read()


@mistake(
    pickle_imports,
    "Of an archive it reads data.pkl and no other pickle.",
    fails=["in_archives"],
)
def one_member_only(data):
    def members(self, archive):
        return [archive.read(each) for each in archive.infolist() if each.filename.endswith("data.pkl")]

    return variant(members=members)(data).read()


@mistake(
    pickle_imports,
    "Reads members by name, and of two with the same name the last one twice.",
    fails=["in_archives"],
)
def members_by_name(data):
    def members(self, archive):
        return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]

    return variant(members=members)(data).read()


@mistake(
    pickle_imports,
    "Takes every member of the archive for a pickle, weights too.",
    fails=["in_archives", "weights_are_left_alone"],
)
def every_member(data):
    def members(self, archive):
        return [archive.read(each) for each in archive.infolist()]

    return variant(members=members)(data).read()


@mistake(
    pickle_imports,
    "Unpacks all of the archive into memory, weights too, and then looks for the pickles.",
    fails=["weights_are_left_alone"],
)
def all_unpacked(data):
    def members(self, archive):
        unpacked = [(each.filename, archive.read(each)) for each in archive.infolist()]
        return [content for name, content in unpacked if name.endswith(".pkl")]

    return variant(members=members)(data).read()


@mistake(
    pickle_imports,
    "An archive without a pickle passes for one that imports nothing.",
    fails=["in_archives"],
)
def empty_archive_passes(data):
    def parts(self):
        if not self.is_archive():
            return [self.data]
        try:
            return self.members(zipfile.ZipFile(io.BytesIO(self.data)))
        except self.damaged as error:
            raise ValueError("archive") from error

    return variant(parts=parts)(data).read()


@mistake(
    pickle_imports,
    "A damaged archive ends in zipfile's own error, which is no ValueError.",
    fails=["in_archives"],
)
def archive_errors_escape(data):
    def parts(self):
        if not self.is_archive():
            return [self.data]
        found = self.members(zipfile.ZipFile(io.BytesIO(self.data)))
        if not found:
            raise ValueError("no pickle")
        return found

    return variant(parts=parts)(data).read()


@mistake(
    pickle_imports,
    "Expects zipfile's BadZipFile and nothing else of a damaged archive; zlib and a password have errors of their own.",
    fails=["in_archives"],
)
def bad_zip_file_alone(data):
    return variant(damaged=(zipfile.BadZipFile,))(data).read()


@mistake(
    pickle_imports,
    "An empty stack or memo ends in an IndexError or a KeyError.",
    fails=["one_after_the_other", "in_archives", "malformed"],
)
def stack_errors_escape(data):
    return variant(caught=())(data).read()


@mistake(
    pickle_imports,
    "Returns what was found when the bytes end or make no sense, as if that were all.",
    fails=["one_after_the_other", "in_archives", "malformed"],
)
def broken_pickles_pass(data):
    reading = Reading(data)
    try:
        return reading.read()
    except ValueError:
        return reading.result()


@mistake(
    pickle_imports,
    "Leaves out names that a call would give, and says nothing of it.",
    fails=["malformed"],
)
def unknown_names_left_out(data):
    def from_stack(self):
        names = self.stack[-2:]
        if len(names) == 2 and all(isinstance(name, str) for name in names):
            self.add(*names)

    return variant(from_stack=from_stack)(data).read()


@mistake(
    pickle_imports,
    "Does not ask whether the stack holds as much as an opcode takes.",
    fails=["malformed"],
)
def empty_stack_passes(data):
    def take(self, op):
        taken = op.stack_before
        if pickletools.markobject in taken:
            self.take_mark()
            taken = taken[: taken.index(pickletools.markobject)]
        del self.stack[max(len(self.stack) - len(taken), 0) :]

    return variant(take=take)(data).read()


@mistake(
    pickle_imports,
    "An opcode that takes everything down to the mark takes one value only.",
    fails=["every_opcode", "names_from_the_stack", "malformed"],
)
def marks_ignored(data):
    def take_mark(self):
        self.stack.pop()

    return variant(take_mark=take_mark)(data).read()


@mistake(
    pickle_imports,
    "An opcode that takes down to the mark and one value below it leaves that one, so that the stack grows.",
    fails=["every_opcode", "names_from_the_stack", "malformed"],
)
def below_the_mark_kept(data):
    def take(self, op):
        if pickletools.markobject in op.stack_before:
            self.take_mark()
        else:
            Reading.take(self, op)

    return variant(take=take)(data).read()


@mistake(
    pickle_imports,
    "The opcodes of Python 2's strings pass for bytes, but Python 3 makes texts of them.",
    fails=["names_from_the_stack"],
)
def old_strings_missed(data):
    return variant(texts=tuple(name for name in TEXTS if "UNICODE" in name))(data).read()


@mistake(
    pickle_imports,
    "MEMOIZE takes the place behind the highest one, not the number of places taken.",
    fails=["names_from_the_stack"],
)
def highest_place(data):
    return variant(place=lambda self: max(self.memo, default=-1) + 1)(data).read()


@mistake(
    pickle_imports,
    "MEMOIZE turns the text on the stack into something unknown.",
    fails=["every_protocol", "names_from_the_stack", "one_after_the_other"],
)
def memoised_unknown(data):
    def move(self, op, argument):
        Reading.move(self, op, argument)
        if op.name == "MEMOIZE":
            self.stack[-1] = None

    return variant(move=move)(data).read()


@mistake(
    pickle_imports,
    "A copy of a text on the stack is something unknown.",
    fails=["names_from_the_stack"],
)
def copies_unknown(data):
    return variant(copied=lambda self: [*self.stack[-1:], None])(data).read()


@mistake(
    pickle_imports,
    "The memo keeps what was put there first, though a place may be used again.",
    fails=["names_from_the_stack"],
)
def first_put_stays(data):
    class First(Reading):
        def move(self, op, argument):
            kept = dict(self.memo)
            super().move(op, argument)
            self.memo |= kept

    return First(data).read()


@mistake(
    pickle_imports,
    "Leaves out what it takes for harmless, so nobody sees what the file relies on.",
    fails=["every_protocol", "names_in_arguments", "in_archives"],
)
def harmless_left_out(data):
    harmless = {"collections", "builtins", "datetime", "torch", "torch._utils", "fractions", "_codecs"}
    return [pair for pair in Reading(data).read() if pair[0] not in harmless]


@mistake(
    pickle_imports,
    "Gives Python 2's modules their new names, which the file does not have.",
    fails=["every_protocol", "names_in_arguments"],
)
def modules_renamed(data):
    renamed = {"__builtin__": "builtins", "copy_reg": "copyreg"}
    return sorted({(renamed.get(module, module), name) for module, name in Reading(data).read()})


@mistake(
    pickle_imports,
    "Cuts a dotted name at its last dot and counts the front to the module.",
    fails=["names_from_the_stack", "names_in_arguments"],
)
def dotted_names_cut(data):
    cut = {f"{module}.{name}".rpartition(".")[::2] for module, name in Reading(data).read()}
    return sorted(cut)


@mistake(
    pickle_imports,
    "Lists an import as often as it occurs.",
    fails=["names_from_the_stack", "names_in_arguments"],
)
def listed_twice(data):
    return variant(result=lambda self: sorted(self.found))(data).read()


@mistake(
    pickle_imports,
    "Lists imports in the order of the file.",
    fails=[
        "every_opcode",
        "every_protocol",
        "names_from_the_stack",
        "names_in_arguments",
        "one_after_the_other",
        "in_archives",
    ],
)
def not_sorted(data):
    return variant(result=lambda self: list(dict.fromkeys(self.found)))(data).read()


@mistake(pickle_imports, "Gives only the modules.")
def modules_alone(data):
    return sorted({module for module, _ in Reading(data).read()})


@mistake(
    pickle_imports,
    "Imports each name to see whether it exists, and so runs the module after all.",
    fails=["nothing_is_run"],
)
def imported_to_check(data):
    found = Reading(data).read()
    for module, name in found:
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return found


@mistake(
    pickle_imports,
    "Takes an identifier of something outside for an import, since it has two words.",
    fails=["every_opcode", "one_after_the_other", "names_in_arguments", "malformed"],
)
def persistent_taken(data):
    return variant(arguments=("GLOBAL", "INST", "PERSID"))(data).read()


KNOWN_TO_FEW = (
    ("BUILD", "NEWOBJ", "NEWOBJ_EX", "OBJ"),
    ("EMPTY_SET", "ADDITEMS", "FROZENSET", "BYTEARRAY8", "BINBYTES8", "BINUNICODE8"),
    ("LONG", "LONG1", "LONG4", "INT", "FLOAT"),
    ("LONG_BINPUT", "LONG_BINGET", "PUT", "GET", "POP", "POP_MARK", "DUP"),
)


def without_opcodes(data, names):
    def step(self, op, argument):
        if op.name in names:
            raise ValueError(f"no rule for {op.name}")
        Reading.step(self, op, argument)

    return variant(step=step)(data).read()


@mistake(
    pickle_imports,
    "Has no rule for objects with state or without a call (BUILD, NEWOBJ, OBJ), and refuses the file.",
    fails=["every_protocol", "every_opcode", "names_in_arguments", "names_from_the_stack", "in_archives"],
)
def objects_refused(data):
    return without_opcodes(data, KNOWN_TO_FEW[0])


@mistake(
    pickle_imports,
    "Has no rule for sets, byte arrays and what is longer than 4 GiB, and refuses the file.",
    fails=["every_protocol", "every_opcode", "names_from_the_stack"],
)
def sets_refused(data):
    return without_opcodes(data, KNOWN_TO_FEW[1])


@mistake(
    pickle_imports,
    "Has no rule for some kinds of numbers, such as long ones, and refuses the file.",
    fails=["every_protocol", "every_opcode"],
)
def numbers_refused(data):
    return without_opcodes(data, KNOWN_TO_FEW[2])


@mistake(
    pickle_imports,
    "Has no rule for the old or long opcodes of the memo, or for what is dropped or copied, and refuses the file.",
    fails=[
        "names_in_arguments",
        "every_protocol",
        "every_opcode",
        "names_from_the_stack",
        "one_after_the_other",
        "malformed",
    ],
)
def memo_opcodes_refused(data):
    return without_opcodes(data, KNOWN_TO_FEW[3])


@mistake(
    pickle_imports,
    "Runs an unpickler with stand-ins that take anything: it imports nothing, and fails at a key that cannot be one.",
    fails=["every_opcode"],
)
def stand_ins_for_anything(data):
    return by_unpickler(data, Anything)


class Anything:
    """Takes whatever an unpickler does with it."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        return Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __setstate__(self, state):
        pass

    def __setitem__(self, *_):
        pass

    def __iter__(self):
        return iter(())


class StandIn:
    """Can be called and no more."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        return StandIn()


@mistake(
    pickle_imports,
    "Runs an unpickler with stand-ins for what it imports, and gives up where the file asks more of a stand-in.",
    fails=["every_protocol", "every_opcode", "names_from_the_stack", "in_archives"],
)
def stand_ins(data):
    return by_unpickler(data, StandIn)


def by_unpickler(data, kind):
    asked = []

    class Recorder(unpickler_in_python()):
        def find_class(self, module, name):
            asked.append((module, name))
            return kind

        def get_extension(self, code):
            asked.append(("extension registry", str(code)))
            self.append(kind())

        def persistent_load(self, pid):
            return kind()

        def load(self):
            """As `pickle._Unpickler.load`, which is switched off."""
            self._unframer = pickle._Unframer(self._file_read, self._file_readline)
            self.read, self.readline = self._unframer.read, self._unframer.readline
            self.readinto = self._unframer.readinto
            self.metastack, self.stack, self.proto = [], [], 0
            self.append = self.stack.append
            with contextlib.suppress(pickle._Stop):
                while True:
                    self.dispatch[self.read(1)[0]](self)

    def part(self, part):
        stream = io.BytesIO(part)
        while True:
            try:
                Recorder(stream, buffers=iter(lambda: bytearray(1), None)).load()
            except Exception as error:  # noqa: BLE001 - it fails in any way on odd bytes
                raise ValueError("unpickler") from error
            if stream.tell() == len(part):
                return

    return variant(part=part, result=lambda self: sorted(set(asked)))(data).read()


def unpickler_in_python() -> type:
    """What `pickle._Unpickler` is where it is not switched off."""
    return next(
        each
        for each in object.__subclasses__()
        if (each.__module__, each.__qualname__) == ("pickle", "_Unpickler")
    )


@alternative(pickle_imports, "A machine in small methods")
def in_steps(data):
    return Reading(data).read()


@alternative(pickle_imports, "A mark begins a stack of its own, as in the unpickler")
def stacks_below_stacks(data):
    class Nested(Reading):
        def begin(self):
            super().begin()
            self.below = []

        def move(self, op, argument):
            if op.name == "MARK":
                self.below.append(self.stack)
                self.stack = []
            elif op.name == "POP" and not self.stack:
                self.take_mark()
            else:
                super().move(op, argument)

        def take_mark(self):
            self.stack = self.below.pop()

    return Nested(data).read()


@alternative(pickle_imports, "Cuts a row of pickles behind each STOP")
def cut_behind_stop(data):
    def part(self, part):
        rest = part
        while rest is part or rest:
            self.begin()
            for op, argument, place in pickletools.genops(rest):  # noqa: B007 - where the last one was
                self.step(op, argument)
            rest = rest[place + 1 :]

    return variant(part=part)(data).read()
