"""A checkpoint in shards with an index, which a crash at any moment leaves whole: the old one or the new one."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file
from torch import Tensor

from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake

INDEX = "model.safetensors.index.json"


@exercise(
    points=4,
    minutes=35,
    extension=True,
    hints=(
        "A reader trusts the index, so replacing the index is the moment the new checkpoint begins: before it, nothing "
        "that the old index names may change; after it, nothing that the new one names may be missing.",
        "Shards named 00001-of-00003 overwrite those of the last save. And a rename may reach the disk before the "
        "bytes it names: sync the file first, then rename, then sync the folder.",
    ),
)
def save_sharded(tensors: dict[str, Tensor], folder: str, max_bytes: int) -> list[str]:
    """Save tensors as safetensors shards with an index, so that a crash leaves the old
    checkpoint or the new one; about 50 lines.

    N shards: model-00001-of-0000N.safetensors, or with a tag of yours (a-z, 0-9),
    model-TAG-00001-of-0000N.safetensors; a shard holds the bytes of
    safetensors.torch.save(part, metadata={"format": "pt"}). Then the index, the file
    model.safetensors.index.json: {"metadata": {"total_size": ..., "tied": {...}},
    "weight_map": {name: shard}}. Returns the shards' names in their order. tensors has
    one tensor or more.

    Shards. A file has at most max_bytes, header included; only a tensor too large for
    that gets a larger file, alone. Pack as you like, into no more shards than this
    makes: names in sorted order, each into the first shard whose file stays within 0.9
    · max_bytes. The tenth lets you estimate headers (8 bytes, then JSON without spaces,
    padded to a multiple of 8). total_size is the bytes of all tensors saved, without
    headers. The order of the dict does not matter: saved into an empty folder, the same
    tensors give the same files, byte for byte.

    Memory. Tensors with the same data_ptr(), dtype, shape and stride, and at least one
    value, are tied: saved once, under the name that sorts first; "tied" maps each other
    name to that one, and weight_map leaves the others out. Equal values alone tie
    nothing. Every other view, contiguous or not, is saved with its own values and no
    others.

    Crash. The folder exists, and may hold a checkpoint (complete, or of a save that was
    interrupted) and other files. A reader opens the index, then the shards it names,
    nothing else. Whenever the process or the machine stops, it must find the old
    checkpoint complete (or no index, if there was none) or the new one complete.
    os.replace is atomic. Bytes written are safe from a power cut once os.fsync (called
    by that name) was called on the file; names created, replaced or removed once it was
    called on the folder (a descriptor of os.open(folder, os.O_RDONLY)); until then any
    of them may be lost, in any order.

    Names that end in .tmp are yours to use, for files in the folder itself. At the end
    no other file model-*.safetensors or *.tmp is left in it, all other files are as
    they were, and every descriptor you opened is closed.
    """
    ### BEGIN SOLUTION
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owner: dict[Any, str] = {}
    for name, tensor in sorted(tensors.items()):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in owner:
            tied[name] = owner[place]
        else:
            owner[place] = name
            kept[name] = tensor

    def most_bytes(names: list[str]) -> int:
        """Upper bound of a file's size: the longest type name, the largest offsets, spaces in the header."""
        data = sum(kept[name].nbytes for name in names)
        widest = {"dtype": "F8_E4M3", "data_offsets": [data, data]}
        entries = {name: {**widest, "shape": [*kept[name].shape]} for name in names}
        return len(save({})) + len(json.dumps({"__metadata__": {"format": "pt"}, **entries})) + data

    shards: list[list[str]] = []
    for name in kept:
        shard = next((shard for shard in shards if most_bytes([*shard, name]) <= max_bytes), None)
        if shard is None:
            shards.append([name])
        else:
            shard.append(name)

    def write(name: str, raw: bytes) -> None:
        path = os.path.join(folder, name)
        with open(path + ".tmp", "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)

    def sync_names() -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        part = {name: kept[name].clone(memory_format=torch.contiguous_format) for name in shard}
        raw = save(part, metadata={"format": "pt"})
        tag = hashlib.sha256(raw).hexdigest()  # other bytes, other name: nothing that an index names changes
        file_name = f"model-{tag}-{number:05}-of-{len(shards):05}.safetensors"
        write(file_name, raw)
        weight_map.update(dict.fromkeys(shard, file_name))
    sync_names()
    total_size = sum(tensor.nbytes for tensor in kept.values())
    index = {"metadata": {"total_size": total_size, "tied": tied}, "weight_map": weight_map}
    write("model.safetensors.index.json", json.dumps(index).encode())
    sync_names()

    files = list(dict.fromkeys(weight_map.values()))
    for name in os.listdir(folder):
        if name.endswith(".tmp") or (fnmatch.fnmatch(name, "model-*.safetensors") and name not in files):
            os.remove(os.path.join(folder, name))
    return files
    ### END SOLUTION


# ------------------------------------------------------------------------------------- what a case sees of a folder


RECORDERS: list[Any] = []
LISTENING: list[bool] = []
CHANGES = ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate")


def heard(event, arguments):
    """Audit hook: hand an event to whoever records. A hook cannot be taken out again; without recorders it does
    nothing."""
    if event in CHANGES:
        for recorder in RECORDERS:
            recorder.heard(event, arguments)


class Recorder:
    """A folder before each change of a name in it, at each os.fsync and at the end, from inside the process that
    changes it.

    moments: [event, [(name, file, content), ...]]: event is "change", "names synced" or "synced FILE"; files and
    contents are numbers in the order in which they were first seen. contents: [bytes]. os.fsync does nothing else here.
    """

    def __init__(self, folder):
        self.folder = folder
        self.moments, self.contents, self.sizes = [], [], {}
        self.synced = {}
        self._files, self._open, self._busy = {}, [], False

    def __enter__(self):
        if not LISTENING:
            LISTENING.append(True)
            sys.addaudithook(heard)
        self._note("change")
        self._fsync, os.fsync = os.fsync, self._sync
        RECORDERS.append(self)
        return self

    def __exit__(self, *error):
        RECORDERS.remove(self)
        os.fsync = self._fsync
        self._note("change")
        self.left_open = sum(
            self._still_open(descriptor, status) for descriptor, status in self.synced.items()
        )
        for descriptor in self._open:
            os.close(descriptor)

    def _still_open(self, descriptor, status):
        try:
            return os.path.samestat(os.fstat(descriptor), status)
        except OSError:
            return False

    def heard(self, event, arguments):
        reads = event == "open" and not (arguments[2] or 0) & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        )
        if not self._busy and not reads:
            self._note("change")
            if event == "open" and (arguments[2] or 0) & os.O_TRUNC:
                self._note("change", emptied=self._inode(arguments[0]))

    def _inode(self, path):
        """Number of the file that is about to be emptied, 0 where there is none of that name."""
        try:
            return os.stat(path).st_ino
        except OSError:
            return 0

    def _sync(self, file):
        descriptor = file if isinstance(file, int) else file.fileno()
        status = self.synced[descriptor] = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._note("names synced" if os.path.samestat(status, os.stat(self.folder)) else "change")
        else:
            self._note("change")  # what is new in the folder gets its number first
            if status.st_ino in self._files:
                self._note(f"synced {self._files[status.st_ino]}")

    def _note(self, event, emptied=0):
        self._busy = True
        seen = []
        for name in sorted(os.listdir(self.folder)):
            try:
                descriptor = os.open(os.path.join(self.folder, name), os.O_RDONLY)
            except FileNotFoundError:  # another thread of the answer was quicker
                continue
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            with open(descriptor, "rb", closefd=False) as file:
                raw = file.read()
            inode = os.fstat(descriptor).st_ino
            raw = b"" if inode == emptied else raw
            if inode in self._files:
                os.close(descriptor)
            else:
                self._open.append(descriptor)  # held, so that the number is not given to another file
            number = self._files.setdefault(inode, len(self._files))
            if raw not in self.contents:
                self.contents.append(raw)
            self.sizes[number] = max(self.sizes.get(number, 0), len(raw))
            seen.append((name, number, self.contents.index(raw)))
        if not self.moments or event != "change" or seen != self.moments[-1][1]:
            self.moments.append((event, seen))
        self._busy = False


def recorded(answer, folder, tensors, max_bytes, tied=None, others=()):
    """One save with every moment of it, and what a judge needs of its inputs.

    That is [(name, values)], [(name, the name it is tied to)] and [(name, bytes)] of files that are not the
    checkpoint's.
    """
    with Recorder(folder) as recorder:
        returned = answer(tensors, folder, max_bytes)
    values = [(name, tensor.clone(memory_format=torch.contiguous_format)) for name, tensor in tensors.items()]
    inputs = {
        "tensors": values,
        "tied": list((tied or {}).items()),
        "others": list(others),
        "max_bytes": max_bytes,
    }
    return {"moments": recorder.moments, "contents": recorder.contents, "returned": returned, **inputs}


def saved(answer, folder, tensors, max_bytes, tied=None, others=()):
    """One save: the folder after it as [(name, bytes)], and what a judge needs of its inputs."""
    seen = recorded(answer, folder, tensors, max_bytes, tied, others)
    moments, contents = seen.pop("moments"), seen.pop("contents")
    return {"files": [(name, contents[content]) for name, _, content in moments[-1][1]], **seen}


# -------------------------------------------------------------------------------------------------------- the judges


def read_checkpoint(files: dict[str, bytes]) -> dict[str, Any] | None:
    """What a reader that trusts the index finds: {name: (dtype, shape, bytes)}; None where it finds no checkpoint."""
    try:
        index = json.loads(files[INDEX])
        shards = {shard: dict(deserialize(files[shard])) for shard in set(index["weight_map"].values())}
        found = {name: shards[shard][name] for name, shard in index["weight_map"].items()}
        tied = {name: found[owner] for name, owner in index["metadata"]["tied"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError):
        return None
    return {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in {**found, **tied}.items()}


def file_bytes(tensors: dict[str, Tensor], dtypes: dict[str, str]) -> int:
    """Size of the library's file of these tensors: the widest types first, names in order, header a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + (len(text) + 7) // 8 * 8 + end


def first_fit(tensors: dict[str, Tensor], dtypes: dict[str, str], max_bytes: float) -> int:
    """Shards that first-fit makes of the tensors in sorted order."""
    shards: list[dict[str, Tensor]] = []
    for name in sorted(tensors):
        for shard in shards:
            if file_bytes({**shard, name: tensors[name]}, dtypes) <= max_bytes:
                shard[name] = tensors[name]
                break
        else:
            shards.append({name: tensors[name]})
    return len(shards)


def index_problem(index: Any, tensors: dict[str, Tensor], tied: dict[str, str]) -> str | None:
    """What is wrong with an index, of tensors that are the same in `tied`."""
    shaped = isinstance(index, dict) and isinstance(index.get("metadata"), dict)
    if (
        not shaped
        or not isinstance(index.get("weight_map"), dict)
        or not isinstance(index["metadata"].get("tied"), dict)
    ):
        return "the index is not {'metadata': {'total_size', 'tied'}, 'weight_map'}"
    saved = index["weight_map"].keys()
    if saved & tied.keys():
        return "the weight_map names tied tensors more than once"
    if saved != tensors.keys() - tied.keys():
        return "the weight_map leaves tensors out, or names some that were not given"
    if index["metadata"]["tied"] != tied:
        return "'tied' does not map each tied name to the one that sorts first"
    if index["metadata"].get("total_size") != sum(tensors[name].nbytes for name in saved):
        return "total_size is not the bytes of the tensors saved"
    return None


def shard_problem(
    index: Any, shards: dict[str, bytes], tensors: dict[str, Tensor], max_bytes: int
) -> str | None:
    """What is wrong with the shards that an index names."""
    numbers = [re.fullmatch(r"model(-[a-z0-9]+)?-(\d{5})-of-(\d{5})\.safetensors", name) for name in shards]
    count = len(shards)
    if sorted((int(n[2]), int(n[3])) for n in numbers if n) != [(i + 1, count) for i in range(count)]:
        return "the shards are not named model-00001-of-0000N.safetensors and so on, with or without a tag"
    wanted = dict(deserialize(save(tensors)))
    for name, raw in shards.items():
        try:
            held = dict(deserialize(raw))
        except SafetensorError:
            return "a shard is not a safetensors file"
        if held.keys() != {tensor for tensor, shard in index["weight_map"].items() if shard == name}:
            return "a shard holds other tensors than the weight_map says"
        if any(held[tensor] != wanted[tensor] for tensor in held):
            return "a tensor was saved with other values, another shape or another dtype"
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        if header.get("__metadata__") != {"format": "pt"}:
            return "a shard's metadata is not {'format': 'pt'}"
        if len(raw) > max_bytes and len(held) > 1:
            return "a file is larger than max_bytes though it holds more than one tensor"
    kept = {name: tensors[name] for name in index["weight_map"]}
    fewest = first_fit(kept, {name: tensor["dtype"] for name, tensor in wanted.items()}, 0.9 * max_bytes)
    return "there are more shards than first-fit makes" if count > fewest else None


def checkpoint_problem(files: dict[str, bytes], returned: Any, expected: Any) -> str | None:
    """What is wrong with a folder after a save; `expected` is what the case says of its inputs."""
    tensors, tied, others = dict(expected["tensors"]), dict(expected["tied"]), dict(expected["others"])
    if any(files.get(name) != raw for name, raw in others.items()):
        return "a file that is none of the checkpoint's was changed or removed"
    try:
        index = json.loads(files[INDEX])
    except (KeyError, ValueError):
        return f"there is no {INDEX}, or it is not JSON"
    problem = index_problem(index, tensors, tied)
    if problem is not None:
        return problem
    if not set(index["weight_map"].values()) <= files.keys():
        return "the weight_map names a file that is not there"
    shards = {name: files[name] for name in sorted(set(index["weight_map"].values()))}
    if files.keys() != {INDEX, *shards, *others}:
        return "files of an earlier or interrupted save, or temporary ones, are left in the folder"
    problem = shard_problem(index, shards, tensors, expected["max_bytes"])
    if problem is None and returned != sorted(
        shards, key=lambda name: name[-len("00001-of-00001.safetensors") :]
    ):
        return "what is returned is not the list of the shards' names in their order"
    return problem


Moment = tuple[str, list[tuple[str, int, int]]]


def crashes(moments: list[Moment]) -> Iterator[tuple[str, dict[str, int | None]]]:
    """(who stops, {name: content}) of every state a crash may leave; content None where bytes may be missing.

    When the process stops, the folder is as it was. When the power fails, every file has the bytes it had when it was
    synced, if they have not changed since, and of the changes of names since the last sync any may be missing:
    tried here are none missing, each one alone, and all.
    """
    begin = moments[0][1]
    safe_names, now = ({name: file for name, file, _ in begin} for _ in range(2))
    safe_contents, contents = ({file: content for _, file, content in begin} for _ in range(2))
    pending: list[dict[str, int | None]] = []
    for event, seen in moments:
        names = {name: file for name, file, _ in seen}
        contents.update((file, content) for _, file, content in seen)
        changed = {n: names.get(n) for n in sorted({**now, **names}) if now.get(n) != names.get(n)}
        # A name each: what nobody saw happen at once (renames outside Python) need not reach the disk at once.
        pending, now = pending + [{n: file} for n, file in changed.items()], names
        yield "the process stops", {name: contents[file] for name, file in names.items()}
        whole = {
            file: content if safe_contents.get(file) == content else None
            for file, content in contents.items()
        }
        for missing in [set[int](), *({i} for i in range(len(pending))), set(range(len(pending)))]:
            left: dict[str, int | None] = dict(safe_names)
            for number, change in enumerate(pending):
                left.update({} if number in missing else change)
            yield "the power fails", {name: whole[file] for name, file in left.items() if file is not None}
        if event == "names synced":
            safe_names, pending = names, []
        elif event != "change":
            file = int(event.removeprefix("synced "))
            safe_contents[file] = contents[file]


def crash_problem(moments: list[Moment], contents: list[bytes]) -> str | None:
    """What a reader finds after a crash that is neither the old checkpoint nor the new one."""
    known: dict[tuple[tuple[str, int | None], ...], Any] = {}

    def found(state: dict[str, int | None]) -> Any:
        key = tuple(sorted((n, c) for n, c in state.items() if not n.endswith(".tmp")))
        if key not in known:
            files = {name: b"" if content is None else contents[content] for name, content in key}
            known[key] = read_checkpoint(files) if INDEX in files else "no index"
        return known[key]

    old, new = (found({name: content for name, _, content in seen}) for _, seen in (moments[0], moments[-1]))
    for who, state in crashes(moments):
        if found(state) is None or found(state) not in (old, new):
            return f"if {who} midway, a reader finds neither the old checkpoint nor the new one"
    return None


def judge_files(observed: Any, expected: Any) -> str | None:
    """Judge of a case that observes one folder."""
    return checkpoint_problem(dict(observed["files"]), observed["returned"], expected)


def judge_orders(observed: Any, expected: Any) -> str | None:
    """Judge of a case that saves the same tensors twice."""
    if observed["files"] != observed["files again"] or observed["returned"] != observed["returned again"]:
        return "another order of the dict gives other files"
    return judge_files(observed, expected)


def judge_crash(observed: Any, expected: Any) -> str | None:
    """Judge of a case that recorded a save."""
    moments, contents = observed["moments"], observed["contents"]
    problem = crash_problem(moments, contents)
    files = {name: contents[content] for name, _, content in moments[-1][1]}
    return problem or checkpoint_problem(files, observed["returned"], expected)


def folder_at(recorded: Any, moment: int) -> dict[str, bytes]:
    """The files of one moment of a record."""
    return {name: recorded["contents"][content] for name, _, content in recorded["moments"][moment][1]}


def judge_saved_again(observed: Any, expected: Any) -> str | None:
    """Judge of a case that saves again over what crashes may leave."""
    for which, wanted in expected.items():
        if not observed[which]["again"]:
            return f"{which}: nothing was seen of the save"
        for files, returned in observed[which]["again"]:
            problem = checkpoint_problem(dict(files), returned, wanted)
            if problem is not None:
                return f"{which}, over what a crash left: {problem}"
    return None


def judge_crashes(observed: Any, expected: Any) -> str | None:
    """Judge of a case that recorded several saves."""
    end = None
    for name, wanted in expected.items():
        # A record may be of any length, and its first moment is the folder that the save was given.
        if len(observed[name]["moments"]) > 10 * len(wanted["moments"]):
            return "the save is in more steps than can be judged"
        begin = folder_at(wanted, 0) if end is None or name.startswith("over") else end
        if folder_at(observed[name], 0) != begin:
            return "what was recorded does not begin with the folder as it was"
        end = folder_at(observed[name], -1)
        problem = judge_crash(observed[name], wanted)
        if problem is not None:
            return f"{name}: {problem}"
    return None


# ---------------------------------------------------------------------------------------------------------- cases


def layers(rng, count, low=200, high=400):
    """Tensors of `count` names, low..high values each, in an order that is not sorted."""
    names = [f"model.layers.{i}.{part}.weight" for i in range(count // 2 + 1) for part in ("up", "down")][
        :count
    ]
    return {name: rng.normal(rng.integer(low, high)) for name in rng.shuffled(names)}


@case(save_sharded, judge=judge_files, free_shapes=True)
def ties_and_views(answer, rng):
    """Tied tensors, views, scalars and empty tensors of many types, beside files of other programs."""
    rows, columns = rng.integer(5, 9), rng.integer(4, 7)
    table, fused, raw = (
        rng.normal(rows, columns),
        rng.normal(rows, 3 * columns),
        rng.integers(0, 9, 16, dtype=torch.uint8),
    )
    tied_names = sorted(f"{rng.bytes(2).hex()}.{name}.weight" for name in ("head", "embed", "other"))
    ones = {name: torch.ones(columns) for name in ("norm.a", "norm.b")}
    tensors = {
        **dict.fromkeys(tied_names, table),
        tied_names[2]: table.view(rows, columns),
        "embed.first_rows": table[: rows // 2],
        "embed.transposed": table.T,
        "embed.flat": table.view(-1),
        **dict.fromkeys(("scale.a", "scale.b"), rng.normal(1)),
        "part.a": fused[1:, ::3],
        "part.b": fused[1:, ::3],
        "square": fused[:4, :4],
        "square.transposed": fused[:4, :4].T,
        "q": fused[:, :columns],
        "every_other": fused[::2, 1::2],
        "expanded": rng.normal(1, 3).expand(rng.integer(2, 5), 3),
        **ones,
        "empty.a": torch.empty(0, columns),
        "empty.b": torch.empty(0, columns),
        "step": rng.integers(1, 9),
        "half": rng.normal(3, 5, dtype=torch.bfloat16).T,
        "codes": raw,
        "codes.signed": raw.view(torch.int8),
        "mask": rng.normal(7) > 0,
        "eighth": rng.normal(6).to(torch.float8_e4m3fn),
    }
    tensors = {name: tensors[name] for name in rng.shuffled(tensors)}
    tied = {**dict.fromkeys(tied_names[1:], tied_names[0]), "scale.b": "scale.a", "part.b": "part.a"}
    max_bytes = rng.integer(6_000, 9_000)
    with tempfile.TemporaryDirectory() as folder:
        others = [
            ("config.json", b"{}"),
            ("model.py", rng.bytes(9)),
            ("notes.txt", b""),
            ("ema.safetensors", rng.bytes(9)),
        ]
        for name, content in others:
            Path(folder, name).write_bytes(content)
        return saved(answer, folder, tensors, max_bytes, tied, others)


@case(save_sharded, judge=judge_files, free_shapes=True)
def filled_to_the_limit(answer, rng):
    """Tensors that just do not fit together, one too large for any file, and many that are smaller than their names."""
    max_bytes = 4 * rng.integer(6_000, 8_000)
    half, third = max_bytes // 8, max_bytes // 14  # float32 values in a half and in 2/7 of a file
    sizes = {
        "a.first": half,
        "b.second": half - rng.integer(2, 12),
        "c.too_large": rng.integer(5 * half // 2, 3 * half),
        "d.third": third,
        "e.fourth": third,
        **{f"f.scale_of_a_layer_with_a_long_name.{i:02}": 1 for i in range(rng.integer(5, 9))},
    }
    tensors = {name: rng.normal(sizes[name]) for name in rng.shuffled(sizes)}
    with tempfile.TemporaryDirectory() as folder:
        return saved(answer, folder, tensors, max_bytes)


@case(save_sharded, judge=judge_files, free_shapes=True)
def names_longer_than_tensors(answer, rng):
    """Many tensors of one value, whose names take most of a file."""
    names = [f"{i:02}.scale_of_{'a_layer_with_a_long_name_' * 4}" for i in range(rng.integer(40, 50))]
    tensors = {name: rng.normal(1) for name in rng.shuffled(names)}
    with tempfile.TemporaryDirectory() as folder:
        return saved(answer, folder, tensors, rng.integer(3_000, 4_000))


@case(save_sharded, judge=judge_orders, free_shapes=True)
def order_of_the_dict(answer, rng):
    """The same tensors in two orders, into two empty folders."""
    tensors = layers(rng, 7)
    max_bytes = rng.integer(3_500, 4_500)
    observed = {}
    for again in ("", " again"):
        tensors = dict(reversed(tensors.items()))
        with tempfile.TemporaryDirectory() as folder:
            observed |= {
                key + again: value for key, value in saved(answer, folder, tensors, max_bytes).items()
            }
    return observed


@case(save_sharded, judge=judge_crashes, free_shapes=True)
def over_an_old_checkpoint(answer, rng):
    """A crash at any moment of a first save, of one that replaces it, of the same again, of values swapped."""
    tensors = layers(rng, 6)
    max_bytes = rng.integer(3_500, 4_500)
    trained = {name: tensor + rng.normal(tensor.numel()) for name, tensor in tensors.items()}
    # Two values of a tensor change places, at its end (but not in the first one), then at its beginning.
    at_the_end = {n: torch.cat([t[:-2], t[-2:].flip(0)]) for n, t in trained.items() if n != min(trained)}
    at_the_end = {**trained, **at_the_end}
    at_the_beginning = {n: torch.cat([t[:2].flip(0), t[2:]]) for n, t in at_the_end.items()}
    with tempfile.TemporaryDirectory() as folder:
        return {
            "first": recorded(answer, folder, tensors, max_bytes),
            "second": recorded(answer, folder, trained, max_bytes),
            "same again": recorded(answer, folder, trained, max_bytes),
            "values at the end": recorded(answer, folder, at_the_end, max_bytes),
            "values at the beginning": recorded(answer, folder, at_the_beginning, max_bytes),
        }


@case(save_sharded, judge=judge_crashes, free_shapes=True)
def with_another_limit(answer, rng):
    """A crash while tensors are dealt out otherwise to as many files as before, and while all but the first change."""
    unit = rng.integer(90, 110)
    sizes = {"a.first": 15 * unit, "b.second": 10 * unit, "c.third": 4 * unit}
    tensors = {name: rng.normal(sizes[name]) for name in rng.shuffled(sizes)}
    alone = {name: rng.normal(15 * unit) for name in rng.shuffled(["d.frozen", "e.trained", "f.trained"])}
    trained = {n: t if n == "d.frozen" else t + rng.normal(15 * unit) for n, t in alone.items()}
    with tempfile.TemporaryDirectory() as folder:
        return {
            "first": recorded(answer, folder, tensors, 4 * 28 * unit),
            "second": recorded(answer, folder, tensors, 4 * 22 * unit),
            "a file each": recorded(answer, folder, alone, 4 * 16 * unit),
            "all but the first": recorded(answer, folder, trained, 4 * 16 * unit),
        }


def left_by(record):
    """The folders that crashes of a recorded save may leave, each once; of a file without its bytes nothing is left."""
    found = {}
    for _, state in crashes(record["moments"]):
        found.setdefault(tuple(sorted(state.items(), key=str)), state)
    chosen = list(found.values())
    return [
        {n: b"" if content is None else record["contents"][content] for n, content in state.items()}
        for state in chosen[:: len(chosen) // 16 + 1]
    ]


@case(save_sharded, judge=judge_saved_again, free_shapes=True)
def after_a_crash(answer, rng):
    """A first save, and one over it, are stopped at any moment; then the same is saved again, or something else."""
    first, max_bytes = layers(rng, 4, low=20, high=30), rng.integer(550, 600)
    second, third = ({n: rng.normal(t.numel()) for n, t in first.items()} for _ in range(2))
    observed = {}
    with tempfile.TemporaryDirectory() as folder:
        for tensors in (first, second):
            record = recorded(answer, folder, tensors, max_bytes)
            inputs = {key: record[key] for key in ("tied", "others", "max_bytes")}
            which = "first" if tensors is first else "second"
            for what, following in ((which, tensors), (f"{which}, then another", third)):
                again = []
                for left in left_by(record):
                    with tempfile.TemporaryDirectory() as other:
                        for name, content in left.items():
                            Path(other, name).write_bytes(content)
                        seen = saved(answer, other, following, max_bytes)
                        again.append([seen["files"], seen["returned"]])
                observed[what] = {"again": again, "tensors": list(following.items()), **inputs}
    return observed


@case(save_sharded, judge=judge_crashes, free_shapes=True)
def over_another_program_s(answer, rng):
    """A crash at any moment of a save over another program's shards and an interrupted save's leftovers."""
    max_bytes = rng.integer(3_500, 4_500)
    observed = {}
    for old_count, new in (("4", layers(rng, 5)), ("1", layers(rng, 6))):
        with tempfile.TemporaryDirectory() as outer:
            folder = f"{outer}/run[{old_count}], *.safetensors"  # a name, and no pattern
            os.mkdir(folder)
            weight_map = {}
            for number in range(1, int(old_count) + 1):
                shard = f"model-{number:05}-of-{int(old_count):05}.safetensors"
                save_file({f"old.{number}": rng.normal(9)}, Path(folder, shard), metadata={"format": "pt"})
                weight_map[f"old.{number}"] = shard
            index = {"metadata": {"total_size": 36 * int(old_count), "tied": {}}, "weight_map": weight_map}
            Path(folder, INDEX).write_text(json.dumps(index))
            others = [("tokenizer.json", rng.bytes(5)), ("model.safetensors.md", b"")]
            leftovers = [
                ("model-left-00001-of-00009.safetensors", b"\0" * 9),
                (f"{INDEX}.tmp", b"{"),
                ("x.tmp", b""),
            ]
            for name, content in (*others, *leftovers):
                Path(folder, name).write_bytes(content)
            observed[f"over {old_count}"] = recorded(answer, folder, new, max_bytes, others=others)
    return observed


@cost(save_sharded, share=1 / 6)
def bytes_written(answer, rng):
    """Writes every tensor once, and closes what it opens."""
    tensors = layers(rng, 6, low=15_000, high=20_000)
    payload = sum(tensor.nbytes for tensor in tensors.values())
    with tempfile.TemporaryDirectory() as folder, Recorder(folder) as recorder:
        answer(tensors, folder, payload // 3)
    written = {"bytes written": (sum(recorder.sizes.values()), payload * 101 // 100)}
    return {**written, "synced descriptors left open": (recorder.left_open, 0)}


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Saving:
    """A right save in small steps; a mistake replaces one of them."""

    metadata: dict[str, str] | None = {"format": "pt"}  # noqa: RUF012, never changed

    def __init__(self, tensors: dict[str, Tensor], folder: str, max_bytes: int) -> None:
        self.tensors, self.folder, self.max_bytes = tensors, folder, max_bytes
        self.kept: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def identity(self, name: str) -> Any:
        tensor = self.tensors[name]
        if not tensor.numel():
            return name
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()

    def find_ties(self) -> None:
        owner: dict[Any, str] = {}
        for name in self.names():
            first = owner.setdefault(self.identity(name), name)
            if first == name:
                self.kept[name] = self.tensors[name]
            else:
                self.tied[name] = first

    def values(self, name: str) -> Tensor:
        return self.kept[name].contiguous().clone()

    def raw(self, shard: list[str]) -> bytes:
        return save({name: self.values(name) for name in shard}, metadata=self.metadata)

    def fits(self, shard: list[str]) -> bool:
        return len(self.raw(shard)) <= self.max_bytes

    def shards(self) -> list[list[str]]:
        found: list[list[str]] = []
        for name in self.kept:
            for shard in found:
                if self.fits([*shard, name]):
                    shard.append(name)
                    break
            else:
                found.append([name])
        return found

    def tag(self, raw: bytes) -> str:
        return "-" + hashlib.sha256(raw).hexdigest()[:12]

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def sync(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def sync_names(self) -> None:
        self.sync(self.folder)

    def put(self, name: str, raw: bytes) -> None:
        Path(self.path(name + ".tmp")).write_bytes(raw)
        self.sync(self.path(name + ".tmp"))
        os.replace(self.path(name + ".tmp"), self.path(name))

    def total_size(self, files: dict[str, bytes]) -> int:
        return sum(tensor.nbytes for tensor in self.kept.values())

    def surplus(self, files: dict[str, bytes]) -> list[str]:
        mine = [
            n
            for n in os.listdir(self.folder)
            if n.endswith(".tmp") or fnmatch.fnmatch(n, "model-*.safetensors")
        ]
        return [name for name in mine if name not in files]

    def remove(self, names: list[str]) -> None:
        for name in names:
            os.remove(self.path(name))

    def commit(self, files: dict[str, bytes], index: bytes) -> None:
        for name, raw in files.items():
            self.put(name, raw)
        self.sync_names()
        self.put(INDEX, index)
        self.sync_names()
        self.remove(self.surplus(files))

    def run(self) -> list[str]:
        self.find_ties()
        files, weight_map, shards = {}, {}, self.shards()
        for number, shard in enumerate(shards, 1):
            raw = self.raw(shard)
            name = f"model{self.tag(raw)}-{number:05}-of-{len(shards):05}.safetensors"
            files[name] = raw
            weight_map.update(dict.fromkeys(shard, name))
        index = {
            "metadata": {"total_size": self.total_size(files), "tied": self.tied},
            "weight_map": weight_map,
        }
        self.commit(files, json.dumps(index).encode())
        return list(files)


def variant(**steps: Any) -> type[Saving]:
    """A save with some steps replaced."""
    return type("Variant", (Saving,), steps)


@mistake(
    save_sharded,
    "Shards are named 00001-of-00003 as in the last save, so they overwrite it one after the other.",
    fails=["over_an_old_checkpoint", "with_another_limit"],
)
def names_reused(tensors, folder, max_bytes):
    return variant(tag=lambda self, raw: "")(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The tag is made of names and shapes; trained on, the model has the same ones.",
    fails=["over_an_old_checkpoint", "with_another_limit"],
)
def tag_of_names(tensors, folder, max_bytes):
    def tag(self, raw):
        return (
            "-"
            + hashlib.sha256(repr(sorted((n, t.shape) for n, t in self.kept.items())).encode()).hexdigest()[
                :12
            ]
        )

    return variant(tag=tag)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The tag is made of the first tensor; where it is frozen, the other files change under their old names.",
    fails=["over_an_old_checkpoint", "with_another_limit"],
)
def tag_of_the_first_tensor(tensors, folder, max_bytes):
    def tag(self, raw):
        first = save({"": self.values(next(iter(self.kept)))})
        return "-" + hashlib.sha256(first).hexdigest()[:12]

    return variant(tag=tag)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The tag is made of a file's first kilobyte, which is hardly more than its header.",
    fails=["over_an_old_checkpoint"],
)
def tag_of_the_beginning(tensors, folder, max_bytes):
    def tag(self, raw):
        return "-" + hashlib.sha256(raw[:1024]).hexdigest()[:12]

    return variant(tag=tag)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The tag is made of a sum of the values, which stays when two of them change places.",
    fails=["over_an_old_checkpoint"],
)
def tag_of_a_sum(tensors, folder, max_bytes):
    def tag(self, raw):
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        return f"-{len(raw)}x{sum(data)}"

    return variant(tag=tag)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The tag is made of the first file; where what is in that is frozen, the others change under their old names.",
    fails=["with_another_limit"],
)
def tag_of_the_first_file(tensors, folder, max_bytes):
    first: list[bytes] = []

    def tag(self, raw):
        first.append(raw)
        return "-" + hashlib.sha256(first[0]).hexdigest()[:12]

    return variant(tag=tag)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "One tag is made of all the tensors; with another limit other ones lie in the file of that name.",
    fails=["with_another_limit"],
)
def tag_of_the_whole(tensors, folder, max_bytes):
    def tag(self, raw):
        whole = save({name: self.values(name) for name in self.kept})
        return "-" + hashlib.sha256(whole).hexdigest()[:12]

    return variant(tag=tag)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Shards are written under their final names, which is safe only where no index names them yet.",
    fails=["over_an_old_checkpoint", "with_another_limit"],
)
def shards_in_place(tensors, folder, max_bytes):
    def put(self, name, raw):
        if name == INDEX:
            return Saving.put(self, name, raw)
        Path(self.path(name)).write_bytes(raw)
        return self.sync(self.path(name))

    return variant(put=put)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Shards that are there already are trusted, though a crash may have left a name without its bytes.",
    fails=["after_a_crash"],
)
def names_trusted(tensors, folder, max_bytes):
    def put(self, name, raw):
        if name == INDEX:
            return Saving.put(self, name, raw)
        if not os.path.exists(self.path(name)):
            Path(self.path(name)).write_bytes(raw)
        return self.sync(self.path(name))

    return variant(put=put)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Nothing more is done where the index is the same as before, so what an interrupted save left stays.",
    fails=["after_a_crash"],
)
def done_with_the_index(tensors, folder, max_bytes):
    def commit(self, files, index):
        path = Path(self.path(INDEX))
        if not path.exists() or path.read_bytes() != index:
            Saving.commit(self, files, index)

    return variant(commit=commit)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Clears up only where an index was there before: a first save that was interrupted leaves its files for ever.",
    fails=["after_a_crash"],
)
def cleared_up_after_an_index(tensors, folder, max_bytes):
    there = os.path.exists(os.path.join(folder, INDEX))

    def surplus(self, files):
        return Saving.surplus(self, files) if there else []

    return variant(surplus=surplus)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Looks for old files with a pattern that has the folder's name in it, brackets, stars and all.",
    fails=["over_another_program_s"],
)
def folder_as_a_pattern(tensors, folder, max_bytes):
    def surplus(self, files):
        patterns = (os.path.join(self.folder, end) for end in ("*.tmp", "model-*.safetensors"))
        found = [os.path.basename(path) for pattern in patterns for path in glob.glob(pattern)]
        return [name for name in found if name not in files]

    return variant(surplus=surplus)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Takes 120 bytes of header for every tensor, however long its name is.",
    fails=["names_longer_than_tensors"],
)
def header_guessed(tensors, folder, max_bytes):
    def fits(self, shard):
        return 60 + sum(self.kept[name].nbytes + 120 for name in shard) <= self.max_bytes

    return variant(fits=fits)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Fills files to 91 % and hopes that the header fits into the rest.",
    fails=["names_longer_than_tensors", "after_a_crash"],
)
def a_share_for_the_header(tensors, folder, max_bytes):
    def fits(self, shard):
        return sum(self.kept[name].nbytes for name in shard) <= 0.91 * self.max_bytes

    return variant(fits=fits)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Tensors of one value are never taken for tied.",
    fails=["ties_and_views"],
)
def one_value_not_tied(tensors, folder, max_bytes):
    def identity(self, name):
        return name if self.tensors[name].numel() < 2 else Saving.identity(self, name)

    return variant(identity=identity)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Only contiguous tensors are taken for tied.",
    fails=["ties_and_views"],
)
def views_not_tied(tensors, folder, max_bytes):
    def identity(self, name):
        return Saving.identity(self, name) if self.tensors[name].is_contiguous() else name

    return variant(identity=identity)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The index is replaced before the shards it names are there.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def index_first(tensors, folder, max_bytes):
    def commit(self, files, index):
        self.put(INDEX, index)
        self.sync_names()
        for name, raw in files.items():
            self.put(name, raw)
        self.sync_names()
        self.remove(self.surplus(files))

    return variant(commit=commit)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The old checkpoint is removed before the new one is there.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def old_removed_first(tensors, folder, max_bytes):
    def commit(self, files, index):
        self.remove([*self.surplus({}), *([INDEX] if os.path.exists(self.path(INDEX)) else [])])
        Saving.commit(self, files, index)

    return variant(commit=commit)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The old shards are removed before the index is replaced.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def old_shards_removed_early(tensors, folder, max_bytes):
    def commit(self, files, index):
        for name, raw in files.items():
            self.put(name, raw)
        self.sync_names()
        self.remove(self.surplus(files))
        self.put(INDEX, index)
        self.sync_names()

    return variant(commit=commit)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Files are written under their final names; a crash leaves half of the index.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def written_in_place(tensors, folder, max_bytes):
    def put(self, name, raw):
        Path(self.path(name)).write_bytes(raw)
        self.sync(self.path(name))

    return variant(put=put)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Renames a file whose bytes were never synced: after a power cut the name may be there without them.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def bytes_not_synced(tensors, folder, max_bytes):
    def put(self, name, raw):
        Path(self.path(name + ".tmp")).write_bytes(raw)
        os.replace(self.path(name + ".tmp"), self.path(name))

    return variant(put=put)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Syncs a file before Python's buffer was flushed into it: nothing is on the disk yet.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def synced_before_the_flush(tensors, folder, max_bytes):
    def put(self, name, raw):
        with open(self.path(name + ".tmp"), "wb", buffering=len(raw) + 1) as file:
            file.write(raw)
            os.fsync(file.fileno())
        os.replace(self.path(name + ".tmp"), self.path(name))

    return variant(put=put)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The folder is never synced: after a power cut the index may be new and a shard's name not there.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def names_not_synced(tensors, folder, max_bytes):
    return variant(sync_names=lambda self: None)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The folder is synced once, at the end, when the order of the renames is already lost.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "with_another_limit"],
)
def names_synced_once(tensors, folder, max_bytes):
    def commit(self, files, index):
        for name, raw in (*files.items(), (INDEX, index)):
            self.put(name, raw)
        self.sync_names()
        self.remove(self.surplus(files))

    return variant(commit=commit)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Old shards and what interrupted saves left are never removed.",
    fails=["over_an_old_checkpoint", "over_another_program_s", "after_a_crash", "with_another_limit"],
)
def nothing_removed(tensors, folder, max_bytes):
    return variant(remove=lambda self, names: None)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Only the old index's shards are removed; what interrupted saves left stays for ever.",
    fails=["over_another_program_s", "after_a_crash"],
)
def leftovers_stay(tensors, folder, max_bytes):
    path = os.path.join(folder, INDEX)
    old = set(json.loads(Path(path).read_text())["weight_map"].values()) if os.path.exists(path) else set()
    return variant(surplus=lambda self, files: sorted(old - files.keys()))(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Everything else in the folder is removed, the tokenizer too.",
    fails=["ties_and_views", "over_another_program_s"],
)
def folder_emptied(tensors, folder, max_bytes):
    def surplus(self, files):
        return [name for name in os.listdir(self.folder) if name not in files and name != INDEX]

    return variant(surplus=surplus)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "total_size counts values, not bytes.",
    fails=[
        "ties_and_views",
        "filled_to_the_limit",
        "order_of_the_dict",
        "over_an_old_checkpoint",
        "over_another_program_s",
        "after_a_crash",
        "names_longer_than_tensors",
        "with_another_limit",
    ],
)
def total_in_values(tensors, folder, max_bytes):
    def total_size(self, files):
        return sum(tensor.numel() for tensor in self.kept.values())

    return variant(total_size=total_size)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "total_size counts the files, headers and all.",
    fails=[
        "ties_and_views",
        "filled_to_the_limit",
        "order_of_the_dict",
        "over_an_old_checkpoint",
        "over_another_program_s",
        "after_a_crash",
        "names_longer_than_tensors",
        "with_another_limit",
    ],
)
def total_of_files(tensors, folder, max_bytes):
    return variant(total_size=lambda self, files: sum(map(len, files.values())))(
        tensors, folder, max_bytes
    ).run()


@mistake(save_sharded, "total_size counts tied tensors once a name.", fails=["ties_and_views"])
def total_with_ties(tensors, folder, max_bytes):
    def total_size(self, files):
        return sum(tensor.nbytes for tensor in self.tensors.values())

    return variant(total_size=total_size)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Only the data is held to the limit; the header puts the file over it.",
    fails=[
        "filled_to_the_limit",
        "order_of_the_dict",
        "over_an_old_checkpoint",
        "over_another_program_s",
        "after_a_crash",
        "names_longer_than_tensors",
    ],
)
def header_forgotten(tensors, folder, max_bytes):
    def fits(self, shard):
        return sum(self.kept[name].nbytes for name in shard) <= self.max_bytes

    return variant(fits=fits)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Only the last shard is tried, so room in the others is lost.",
    fails=["filled_to_the_limit"],
)
def only_the_last_shard(tensors, folder, max_bytes):
    def shards(self):
        found = [[]]
        for name in self.kept:
            if found[-1] and not self.fits([*found[-1], name]):
                found.append([])
            found[-1].append(name)
        return found

    return variant(shards=shards)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Every tensor gets a file of its own.",
    fails=[
        "ties_and_views",
        "filled_to_the_limit",
        "order_of_the_dict",
        "over_an_old_checkpoint",
        "over_another_program_s",
        "after_a_crash",
        "names_longer_than_tensors",
        "with_another_limit",
    ],
)
def a_file_each(tensors, folder, max_bytes):
    return variant(shards=lambda self: [[name] for name in self.kept])(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Shards are filled in the order of the dict.",
    fails=["filled_to_the_limit", "order_of_the_dict"],
)
def order_of_insertion(tensors, folder, max_bytes):
    def shards(self):
        self.kept = {name: self.kept[name] for name in self.tensors if name in self.kept}
        return Saving.shards(self)

    return variant(shards=shards)(tensors, folder, max_bytes).run()


@mistake(save_sharded, "Tied tensors are saved once a name.", fails=["ties_and_views"])
def ties_saved_twice(tensors, folder, max_bytes):
    return variant(identity=lambda self, name: name)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Tensors that begin at the same address are taken for tied, whatever their shape.",
    fails=["ties_and_views"],
)
def ties_by_address(tensors, folder, max_bytes):
    def identity(self, name):
        return self.tensors[name].data_ptr() or name

    return variant(identity=identity)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The strides are not compared: a square view and its transpose are taken for tied.",
    fails=["ties_and_views"],
)
def ties_without_strides(tensors, folder, max_bytes):
    def identity(self, name):
        return Saving.identity(self, name)[:3] if self.tensors[name].numel() else name

    return variant(identity=identity)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded, "Empty tensors, whose addresses are all 0, are taken for tied.", fails=["ties_and_views"]
)
def empty_tied(tensors, folder, max_bytes):
    def identity(self, name):
        tensor = self.tensors[name]
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()

    return variant(identity=identity)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Tensors of equal values are taken for tied: two norms that are still all ones become one.",
    fails=["ties_and_views"],
)
def ties_by_value(tensors, folder, max_bytes):
    def identity(self, name):
        tensor = self.tensors[name]
        return (
            (tensor.dtype, tuple(tensor.shape), save({"": self.values_of(tensor)}))
            if tensor.numel()
            else name
        )

    def values_of(self, tensor):
        return tensor.contiguous().clone()

    return variant(identity=identity, values_of=values_of)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Saves bytes in the order of memory, not of the view: a transposed tensor comes back scrambled.",
    fails=["ties_and_views"],
)
def order_of_memory(tensors, folder, max_bytes):
    def values(self, name):
        tensor = self.kept[name]
        start = tensor.storage_offset()
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return torch.cat([flat, flat])[start : start + tensor.numel()].clone().reshape(tensor.shape)

    def with_values(self, name):
        tensor = self.kept[name]
        whole = (
            tensor.is_contiguous()
            or tensor.element_size() * tensor.numel() > tensor.untyped_storage().nbytes()
        )
        return Saving.values(self, name) if whole else values(self, name)

    return variant(values=with_values)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "The metadata {'format': 'pt'} is left out; loaders ask for it.",
    fails=[
        "ties_and_views",
        "filled_to_the_limit",
        "order_of_the_dict",
        "over_an_old_checkpoint",
        "over_another_program_s",
        "after_a_crash",
        "names_longer_than_tensors",
        "with_another_limit",
    ],
)
def format_left_out(tensors, folder, max_bytes):
    return variant(metadata=None)(tensors, folder, max_bytes).run()


@mistake(
    save_sharded,
    "Writes a trial file for every tensor to learn how large the shard has become.",
    fails=["bytes_written"],
)
def trial_files(tensors, folder, max_bytes):
    def fits(self, shard):
        path = self.path(f"{len(shard)}.{hashlib.sha256(repr(shard).encode()).hexdigest()[:8]}.tmp")
        Path(path).write_bytes(self.raw(shard))
        size = os.path.getsize(path)
        os.rename(path, path.replace(".tmp", ".x.tmp"))
        return size <= self.max_bytes

    return variant(fits=fits)(tensors, folder, max_bytes).run()


@alternative(save_sharded, "Measures shards by serializing them, and writes with write_bytes")
def by_trial(tensors, folder, max_bytes):
    return Saving(tensors, folder, max_bytes).run()


@alternative(save_sharded, "Numbers the saves: the tag is the first number that no file in the folder has")
def by_generation(tensors, folder, max_bytes):
    present = "".join(os.listdir(folder))
    generation = next(number for number in range(1, 1000) if f"model-g{number}-" not in present)
    return variant(tag=lambda self, raw: f"-g{generation}")(tensors, folder, max_bytes).run()


@alternative(save_sharded, "Writes every shard before it renames any")
def all_shards_first(tensors, folder, max_bytes):
    def commit(self, files, index):
        for name, raw in files.items():
            Path(self.path(name + ".tmp")).write_bytes(raw)
            self.sync(self.path(name + ".tmp"))
        for name in files:
            os.rename(self.path(name + ".tmp"), self.path(name))
        self.sync_names()
        self.put(INDEX, index)
        self.sync_names()
        self.remove(self.surplus(files))

    return variant(commit=commit)(tensors, folder, max_bytes).run()


excuse(
    save_sharded,
    "most_bytes([*shard, name]) <= max_bytes -> most_bytes([*shard, name]) < max_bytes",
    "most_bytes is an upper bound: the file it would keep out is just below max_bytes, far above nine tenths of it",
)
