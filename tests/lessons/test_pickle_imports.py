"""pickle_imports against an Unpickler that records what it is asked to find, on real, built and random pickles."""

from __future__ import annotations

import collections
import datetime
import fractions
import importlib
import io
import itertools
import pickle
import pickletools
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcourse import exercise, judging, source
from llmcourse.counting import can_read_memory
from llmcourse.engine import Answer, Engine
from llmcourse.lessons.parameter_loading import pickle_imports as lesson
from llmcourse.lessons.parameter_loading.pickle_imports import pickle_imports


class Anything:
    """Stands for whatever a pickle imports, and takes whatever it does with that."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __setitem__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(())

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class Recorder(pickle._Unpickler):  # type: ignore[name-defined]  # in Python, so that it runs what we read
    """Records what it is asked to import, and imports nothing."""

    def __init__(self, stream: io.BytesIO, *, buffers: Any = None) -> None:
        super().__init__(stream, buffers=buffers)
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add((module, name))
        return Anything

    def get_extension(self, code: int) -> None:
        self.asked.add(("extension registry", str(code)))
        self.append(Anything())

    def persistent_load(self, pid: Any) -> Any:
        return Anything()


def recorded(data: bytes) -> tuple[list[tuple[str, str]], bool]:
    """What unpicklers ask for in a row of pickles, sorted, and whether they got to the end."""
    stream, asked = io.BytesIO(data), set[tuple[str, str]]()
    while True:
        unpickler = Recorder(stream, buffers=itertools.repeat(bytearray(b"outside")))
        try:
            unpickler.load()
        except Exception:  # noqa: BLE001 - unpicklers fail in any way on odd bytes
            return sorted(asked | unpickler.asked), False
        asked |= unpickler.asked
        if stream.tell() == len(data):
            return sorted(asked), True


def refused(data: bytes) -> bool:
    try:
        pickle_imports(data)
    except ValueError:
        return True
    return False


OBJECTS = {
    "date": datetime.date(2024, 2, 29),
    "dates sharing names": [datetime.date(2024, 1, day) for day in range(1, 9)] + [datetime.timedelta(3)],
    "fractions": {fractions.Fraction(1, 3): [fractions.Fraction(2, 3)]},
    "ordered": collections.OrderedDict(a=1, b=[collections.Counter("aab")]),
    "function": importlib.import_module,
    "nested name": collections.ChainMap.new_child,
    "exception": KeyError("a"),
    "set of tuples": {(1, "os"), (2, "system")},
    "long list": list(range(3000)) + ["os", "system"] * 600,
    "bytes": [b"cos\nsystem\n", bytearray(b"x" * 300)],
    "deep": [[[[{"a": ({"b": datetime.time(1)},)}]]]],
    "plain": [1, 2.5, None, True, 1 << 900, "ü", {"a": {1, 2}}, frozenset("ab")],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", OBJECTS)
def test_what_the_pickle_module_writes_is_read_as_an_unpickler_reads_it(name, protocol):
    for dumps in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]
        data = dumps(OBJECTS[name], protocol)
        asked, whole = recorded(data)
        assert whole and pickle_imports(data) == asked


def test_a_row_of_pickles_is_read_as_a_row_of_unpicklers_reads_it(seed):
    draw = random.Random(seed)
    data = b"".join(pickle.dumps(OBJECTS[draw.choice(list(OBJECTS))], draw.randrange(6)) for _ in range(5))
    assert pickle_imports(data) == recorded(data)[0]


@pytest.mark.parametrize(
    "files", [lesson.OnTheStack, lesson.InTheirArguments], ids=lambda kind: kind.__name__
)
def test_the_cases_pickles_are_read_as_an_unpickler_reads_them(files, seed):
    made = files(exercise.Rng(seed)).made(exercise.Rng(seed))
    for name, data in made.items():
        asked, whole = recorded(data)
        assert whole, name
        assert pickle_imports(data) == asked, name


@pytest.mark.parametrize("files", [lesson.Malformed, lesson.Several], ids=lambda kind: kind.__name__)
def test_what_the_cases_want_refused_an_unpickler_does_not_get_through_or_calls_for_its_names(files, seed):
    made = files(exercise.Rng(seed)).made(exercise.Rng(seed))
    outcomes = {name: (refused(data), recorded(data)) for name, data in made.items()}
    for name, (was_refused, (asked, whole)) in outcomes.items():
        if whole:
            assert not was_refused and pickle_imports(made[name]) == asked, name
        else:
            assert was_refused, name
    assert {was_refused for was_refused, _ in outcomes.values()} == {True, False}


def test_all_opcodes_are_tried_and_read_as_an_unpickler_reads_them(seed):
    made = lesson.BetweenNames(exercise.Rng(seed)).made(exercise.Rng(seed))
    occurring = {op.name for data in made.values() for op, _, _ in pickletools.genops(data)}
    assert occurring == {op.name for op in pickletools.opcodes}
    for name, data in made.items():
        asked, whole = recorded(data)
        assert whole == (name not in lesson.UNUSABLE), name
        assert not refused(data) and set(asked) <= set(pickle_imports(data)), name
        if whole:
            assert pickle_imports(data) == asked, name


def test_what_the_case_of_every_protocol_holds_is_what_the_pickle_module_writes_in_all_of_them(seed):
    made = lesson.Real(exercise.Rng(seed)).made(exercise.Rng(seed))
    for name, data in made.items():
        assert recorded(data) == (pickle_imports(data), True), name
    occurring = {op.name for data in made.values() for op, _, _ in pickletools.genops(data)}
    assert occurring >= {
        *("BUILD", "NEWOBJ", "FROZENSET", "EMPTY_SET", "LONG", "LONG1", "LONG4", "BINBYTES", "BYTEARRAY8"),
        *("MEMOIZE", "LONG_BINPUT", "LONG_BINGET", "PUT", "GET", "POP", "POP_MARK", "BINPERSID"),
    }


def random_program(draw: random.Random) -> bytes:
    """Opcodes in any order, of which many leave the stack as it should be."""
    opcodes = [
        *(made(word) for made in lesson.TEXTS.values() for word in "ab"),
        *(pickle.MEMOIZE, pickle.MEMOIZE, pickle.DUP, pickle.POP, pickle.MARK, pickle.POP_MARK, pickle.NONE),
        *(pickle.BINPUT + bytes([i]) for i in range(3)),
        *(pickle.BINGET + bytes([i]) for i in range(3)),
        *(pickle.TUPLE, pickle.TUPLE2, pickle.LIST, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT),
        *(
            pickle.APPEND,
            pickle.SETITEM,
            pickle.REDUCE,
            pickle.BINPERSID,
            pickle.STACK_GLOBAL,
            pickle.STACK_GLOBAL,
        ),
        *(
            pickle.GLOBAL + b"c\nd\n",
            pickle.INST + b"e\nf\n",
            pickle.EXT1 + b"\7",
            pickle.BINFLOAT + bytes(8),
        ),
    ]
    return b"".join(draw.choice(opcodes) for _ in range(draw.randrange(2, 14))) + pickle.STOP


def test_nothing_that_an_unpickler_would_import_is_missing_from_random_programs(seed):
    draw = random.Random(seed)
    whole_ones = 0
    for _ in range(4000):
        data = random_program(draw)
        asked, whole = recorded(data)
        if refused(data):
            # Only names that a call would give are refused although an unpickler goes on.
            assert not whole or pickle.STACK_GLOBAL in data, data
            continue
        assert set(asked) <= set(pickle_imports(data)), data
        if whole:
            whole_ones += bool(asked)
            assert pickle_imports(data) == asked, data
    assert whole_ones > 20


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_every_cut_and_every_changed_byte_is_refused_or_leaves_nothing_out(seed):
    draw = random.Random(seed)
    for protocol in range(6):
        data = pickle.dumps(OBJECTS["ordered"], protocol)
        for size in range(len(data)):
            assert refused(data[:size]), data[:size]
        for place in range(len(data)):
            changed = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
            if (
                changed.startswith(b"PK\x03\x04") or b"\\" in changed
            ):  # genops undoes escapes, an unpickler does not
                continue
            if not refused(changed):
                assert set(recorded(changed)[0]) <= set(pickle_imports(changed)), changed


def test_a_checkpoint_of_torch_is_read_and_nothing_of_it_is_imported(tmp_path, seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save({"model": model.state_dict(), "step": 3, "rate": fractions.Fraction(1, 3)}, tmp_path / "a.pt")
    found = pickle_imports((tmp_path / "a.pt").read_bytes())
    assert ("fractions", "Fraction") in found and ("torch._utils", "_rebuild_tensor_v2") in found
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "a.pt")
    assert unsafe == ["fractions.Fraction"]
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert found == recorded(archive.read("a/data.pkl"))[0]


def test_torch_takes_a_file_for_an_archive_by_its_first_bytes(tmp_path):
    packed = lesson.archive({"archive/data.pkl": b"cfractions\nFraction\n."})
    data = b"cdatetime\ndate\n" + pickle.BINBYTES + len(packed).to_bytes(4, "little") + packed + b"0."
    assert zipfile.is_zipfile(io.BytesIO(data))
    assert not torch.serialization._is_zipfile(io.BytesIO(data))
    assert pickle.loads(data) is datetime.date
    assert pickle_imports(data) == [("datetime", "date")]


@pytest.mark.filterwarnings(
    "ignore:invalid escape:DeprecationWarning"
)  # genops, on texts that random bytes begin
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_damage_to_an_archive_is_refused_or_does_not_matter(compression, seed):
    draw = random.Random(seed)
    data = lesson.archive(
        {"a/data.pkl": pickle.dumps(OBJECTS["ordered"]), "a/data/0": b"\0"}, compression=compression
    )
    found = pickle_imports(data)
    for size in range(len(data)):
        assert refused(data[:size])
    unharmed = 0
    for place in range(len(data)):
        changed = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
        if not refused(changed):
            unharmed += 1
            assert pickle_imports(changed) == found, place
    assert unharmed


def test_a_compression_that_damage_made_up_is_refused_as_damage():
    data = lesson.archive({"a/data.pkl": b"N."})
    directory = data.index(b"PK\x01\x02")
    # Of these zipfile knows bzip2 and LZMA, whose errors are others than zlib's.
    for method in (1, 12, 14, 99):
        changed = bytearray(data)
        changed[8] = changed[directory + 10] = method
        assert refused(bytes(changed)), method


def canary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A pickle that imports a module of the folder and calls a function which writes a file there."""
    (folder / "canary_of_a_test.py").write_text(
        f"import pathlib\ndef sing():\n    pathlib.Path({str(folder / 'sang')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(folder)
    return b"ccanary_of_a_test\nsing\n)R."


def test_a_canary_is_heard_by_whoever_loads_it_and_not_by_us(tmp_path, monkeypatch):
    data = canary(tmp_path, monkeypatch)
    before = set(sys.modules)
    assert pickle_imports(data) == [("canary_of_a_test", "sing")]
    assert set(sys.modules) == before and not (tmp_path / "sang").exists()
    assert lesson.imported_to_check(data) and "canary_of_a_test" in sys.modules
    del sys.modules["canary_of_a_test"]
    lesson.loaded_in_a_try(data)
    assert (tmp_path / "sang").exists()
    del sys.modules["canary_of_a_test"]


def test_an_unpickler_that_records_is_switched_off(seed):
    def recording(data: bytes) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        class Asked(pickle._Unpickler):  # type: ignore[name-defined, misc]
            def find_class(self, module: str, name: str) -> Any:
                asked.append((module, name))
                return Anything

        Asked(io.BytesIO(data)).load()
        return sorted(set(asked))

    found = exercise.of(pickle_imports)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    verdict = judging.judge(runner, found, recording, seed, expected, naming=False)
    assert verdict.points == 0 and "Forbidden" in verdict.reason


def test_an_archive_looked_into_before_does_not_make_the_next_one_cheaper(seed):
    """Whoever keeps what a first call found is counted on bytes that it has not met."""
    kept: dict[bytes, list[tuple[str, str]]] = {}

    def keeping(data: bytes) -> list[tuple[str, str]]:
        if data not in kept:
            kept[data] = lesson.all_unpacked(data)
        return kept[data]

    found = exercise.of(pickle_imports)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    verdict = judging.judge(runner, found, keeping, seed, expected, naming=False)
    assert [result.item.name for result in verdict.results if not result.agrees] == ["weights_are_left_alone"]


READS_THE_WEIGHTS = """
import io, lzma, mmap, pickletools, struct, tracemalloc, zipfile, zlib
from typing import Any
{reference}
honest, kept = pickle_imports, []

def pickle_imports(data):
    if len(data) > 1 << 20:
        archive = zipfile.ZipFile(io.BytesIO(data))
        weights = max(archive.infolist(), key=lambda each: each.file_size)
        {how}
        del kept[:]
    return honest(data)
"""
HOW_TO_READ_THEM = {
    "before tracing is asked": "kept.append(archive.read(weights)); kept.clear(); tracemalloc.clear_traces()",
    "while tracing is stopped": "tracemalloc.stop(); kept.append(archive.read(weights)); tracemalloc.start()",
    "into shared memory": "kept.append(mmap.mmap(-1, weights.file_size)); kept[0].write(archive.read(weights))",
}


@pytest.mark.skipif(not can_read_memory(), reason="this system does not say what a process allocates")
def test_an_answer_that_reads_the_weights_cannot_hide_it(seed):
    found = exercise.of(pickle_imports)
    reference = source.definition(found.source, found.name)
    with Engine() as engine:
        expected = engine.expected(found, seed)
        for what, how in {"not at all": "", **HOW_TO_READ_THEM}.items():
            text = READS_THE_WEIGHTS.format(reference=reference, how=how or "pass")
            answer = Answer(found.name, (("cell", text),), own="cell")
            verdict = judging.judge(engine, found, answer, seed, expected, naming=False)
            assert verdict.verdict == "right", (what, verdict.reason)
            assert (verdict.points == found.points) == (not how), (what, verdict.reason)


def test_the_archive_of_weights_is_made_within_its_bound(seed):
    found = exercise.of(pickle_imports)
    runner = judging.InProcess()
    outcome = runner.run(found, lambda data: [], [found.items["weights_are_left_alone"]], seed, None)
    for peak_bytes, at_most in outcome["weights_are_left_alone"].counts.values():
        assert peak_bytes is None or peak_bytes <= lesson.WEIGHT_BYTES * 1.15 < at_most


def test_the_python_unpickler_is_switched_off_wherever_it_is_found(seed):
    def by_its_class(data: bytes) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        class Asked(lesson.unpickler_in_python()):  # type: ignore[misc]
            def find_class(self, module: str, name: str) -> Any:
                asked.append((module, name))
                return Anything

        Asked(io.BytesIO(data)).load()
        return sorted(set(asked))

    found = exercise.of(pickle_imports)
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    verdict = judging.judge(runner, found, by_its_class, seed, expected, naming=False)
    assert verdict.points == 0 and "Forbidden" in verdict.reason


def test_which_file_is_which_never_leaves_the_judge(seed):
    files = lesson.Malformed(exercise.Rng(seed))
    assert files.calls == ("all",) and all(type(file) is bytes for file in files.all())
    made = files.made(exercise.Rng(seed))
    assert files.observed(list(range(len(made)))).keys() == made.keys()
    assert files.observed([1]) == [1]


def test_the_format_that_torch_wrote_before_1_6_is_refused_for_the_bytes_behind_its_pickles(tmp_path):
    state = {"weight": torch.ones(3), "rate": fractions.Fraction(1, 3)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    assert refused(data)
    behind = 8 + state["weight"].nbytes  # the number of values, and the values
    assert ("fractions", "Fraction") in pickle_imports(data[:-behind])
