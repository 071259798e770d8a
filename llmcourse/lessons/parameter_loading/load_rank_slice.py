"""What one tensor-parallel rank holds of a stored tensor, from a checkpoint saved whole or for other ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcourse.exercise import Rng, alternative, case, cost, exercise, mistake, raised


@exercise(
    points=4,
    minutes=40,
    extension=True,
    hints=(
        "One rule says which units of a part a rank has. Use it twice: for the rank that loads, and for each rank that "
        "the files were saved for. Where the two ranges meet, that file has something to give.",
        "In a file the second part begins after what that file holds of the first part, its copies and its padding "
        "included. And several files may hold the same unit: take each unit once.",
    ),
)
def load_rank_slice(
    files: Sequence[Any],
    name: str,
    parts: list[tuple[int, int]],
    parallel: str,
    rank: int,
    world: int,
    padded: bool = False,
) -> Tensor | None:
    """What rank `rank` of `world` holds of the weight or bias `name` under tensor
    parallelism; about 30 lines.

    A layer computes x @ weight.T + bias, its weight is [out, in]. parallel is "column"
    where each rank computes some of the outputs, which are then put side by side, and
    "row" where each rank gets some of the inputs, and the ranks' outputs are added. A
    table of words [words, width] is cut by words and counts as "column".

    parts says, in order, what the axis that is cut consists of: (units, size) for each
    tensor that is fused along it, `units` units of `size` neighbouring rows or columns.
    A unit is a head or a single row and is never cut. Queries, keys and values with 32
    and 8 heads: [(32, 128), (8, 128), (8, 128)]; a gate and what it gates: [(14336, 1),
    (14336, 1)]. A rank has its share of each part, in the order of the parts:

    - with padded=True ceil(units / world) units: the rank-th run of so many, with zeros
      for those that do not exist;
    - else, where world divides units, the rank-th run of units / world;
    - else, where world is a multiple of units and the layer "column", the one unit rank
      * units // world, so that several ranks hold copies (copied inputs would be added
      twice);
    - else nothing: ValueError.

    A bias [out] of a "column" layer is cut as the rows are. That of a "row" layer is
    not cut, and to be added once: rank 0 gets all of it, the others None.

    files: opened safetensors files; file i is what rank i of len(files) was given by
    these same rules, so a single one holds everything. Padding in them may be anything,
    not only zeros; the bias of a "row" layer is in file 0 alone. file.get_slice(name)
    has get_shape(), and gives values when it is indexed, by [rows] or [rows, columns]
    with slices of step 1: as a view that keeps the whole tensor in memory.

    Return a tensor of the stored dtype that keeps no memory but its own. Ask the files
    for no value that is not returned, for none twice, and at most once for each part
    and file. Asking for no values at all is free.
    """
    ### BEGIN SOLUTION
    axis = 0 if parallel == "column" else 1

    def held(units: int, rank: int, world: int) -> tuple[int, int]:
        """First unit of a rank, and how many it has room for."""
        if padded:
            room = -(-units // world)
            return rank * room, room
        if units % world and (world % units or axis == 1):
            raise ValueError(
                f"{name}: {units} units can be neither dealt nor copied to {world} {parallel} ranks"
            )
        return rank * units // world, units // world or 1

    first = files[0].get_slice(name)
    shape = list(first.get_shape())
    if axis == len(shape):
        return first[:] if rank == 0 else None

    pieces, start = [], 0  # start: where a part begins in every file
    for units, size in parts:
        at, room = held(units, rank, world)
        end = at + room
        for index, file in enumerate(files):
            file_at, file_room = held(units, index, len(files))
            stop = min(end, units, file_at + file_room)
            if at in range(file_at, stop):
                run = slice(start + (at - file_at) * size, start + (stop - file_at) * size)
                stored = file.get_slice(name)
                pieces.append(stored[run] if axis == 0 else stored[:, run])
                at = stop
        shape[axis] = (end - at) * size
        pieces.append(torch.zeros(shape, dtype=first[:0].dtype))
        start += file_room * size
    return torch.cat(pieces, axis)
    ### END SOLUTION


# ------------------------------------------------------------------------------------- a checkpoint that is counted


@dataclass(frozen=True)
class Layer:
    """A weight or a bias, whole, and how it is cut."""

    name: str
    whole: Tensor
    parts: list[tuple[int, int]]
    parallel: str
    padded: bool = False

    @property
    def axis(self) -> int:
        return 0 if self.parallel == "column" else 1


def places(parts: Sequence[tuple[int, int]], rank: int, world: int, padded: bool) -> list[int]:
    """Rows (columns) of the whole that a rank holds, in order; -1 where it has padding."""
    rows, begin = [], 0
    for units, size in parts:
        room = -(-units // world)
        first = rank * room if padded or units >= world else rank // (world // units)
        held = [unit if unit < units else -1 for unit in range(first, first + room)]
        rows += [begin + unit * size + row if unit >= 0 else -1 for unit in held for row in range(size)]
        begin += units * size
    return rows


def saved_for(layer: Layer, rank: int, world: int, rng: Rng) -> Tensor | None:
    """What the file of a rank holds: junk as padding; None where it has nothing of that name."""
    if layer.axis == layer.whole.dim():
        return layer.whole if rank == 0 else None
    rows = torch.tensor(places(layer.parts, rank, world, layer.padded))
    chosen = layer.whole.index_select(layer.axis, rows.clamp(min=0))
    padding = (rows < 0).reshape([-1 if axis == layer.axis else 1 for axis in range(chosen.dim())])
    return torch.where(padding, -rng.uniform(1, 9, *chosen.shape).to(chosen.dtype), chosen)


@dataclass(frozen=True)
class Load:
    """A layer saved for `saved` ranks that some ranks of `world` load, or whose load is to be refused."""

    layer: Layer
    saved: int
    world: int
    ranks: Sequence[int] | None = None
    refused: bool = False


class Checkpoint:
    """Files whose values are here, in the judge's process, and whose requests are counted here."""

    calls = ("read",)

    def __init__(self, rng: Rng, *loads: Load) -> None:
        self._files = [
            [saved_for(load.layer, rank, load.saved, rng) for rank in range(load.saved)] for load in loads
        ]
        self._refused = [load.refused for load in loads]  # not told: an answer could look it up
        self.loads = [self._told(load, files) for load, files in zip(loads, self._files, strict=True)]
        self.attributes = {"loads": self.loads}
        self._lock = threading.Lock()
        self._bytes = self._requests = self._stretches = 0

    def _told(self, load: Load, files: list[Tensor | None]) -> dict[str, Any]:
        """What the case's side knows of a load: all but the values."""
        layer = load.layer
        return {
            "name": layer.name,
            "parts": layer.parts,
            "parallel": layer.parallel,
            "padded": layer.padded,
            "world": load.world,
            "ranks": list(range(load.world) if load.ranks is None else load.ranks),
            "dtype": str(layer.whole.dtype).removeprefix("torch."),
            "shapes": [None if file is None else list(file.shape) for file in files],
        }

    def read(self, load: int, file: int, begins: list[int], ends: list[int]) -> Tensor:
        """The values between the bounds, one of each for each axis."""
        stored = self._files[load][file]
        if stored is None:
            raise KeyError(f"file {file} has no such tensor")
        found = stored[tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))].clone()
        with self._lock:
            self._bytes += found.nbytes
            self._requests += found.numel() > 0
            self._stretches += len(found) if found.dim() == 2 and found.shape[1] < stored.shape[1] else 1
        return found

    def observed(self, observed: Any) -> Any:
        """What the case saw; of loads that are to be refused, the kind of the exception without a value."""
        ranks = [
            refused for load, refused in zip(self.loads, self._refused, strict=True) for _ in load["ranks"]
        ]
        if not any(self._refused) or not isinstance(observed, dict) or len(observed) != len(ranks):
            return observed
        return {
            what: found[:1] if refused and isinstance(found, list) else found
            for (what, found), refused in zip(observed.items(), ranks, strict=True)
        }

    def counts(self) -> dict[str, tuple[float | None, float | None]]:
        return {
            "bytes requested": (self._bytes, None),
            "requests": (self._requests, None),
            "stretches of neighbouring bytes": (self._stretches, float("inf")),  # shown, not scored
        }


class File:
    """Stands for what `safetensors.safe_open` gives; `read(begins, ends)` fetches values."""

    def __init__(self, name, shape, dtype, read):
        self._tensors = {} if shape is None else {name: Slice(shape, dtype, read)}

    def keys(self):
        return list(self._tensors)

    def get_slice(self, name):
        return self._tensors[name]

    def get_tensor(self, name):
        return self._tensors[name][:]


class Slice:
    """A stored tensor, of which what is asked for comes as a view of memory as large as the tensor."""

    def __init__(self, shape, dtype, read):
        self._shape, self._dtype, self._read = shape, dtype, read

    def get_shape(self):
        return list(self._shape)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self._shape) or not all(isinstance(part, slice) for part in index):
            raise TypeError(f"expected a slice for each of at most {len(self._shape)} axes, found {index}")
        index += (slice(None),) * (len(self._shape) - len(index))
        bounds = [part.indices(length) for part, length in zip(index, self._shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError(f"expected slices of step 1, found {index}")
        begins, ends = [begin for begin, _, _ in bounds], [max(begin, end) for begin, end, _ in bounds]
        kept = torch.zeros(self._shape, dtype=self._dtype)
        view = kept[tuple(slice(*bound) for bound in zip(begins, ends, strict=True))]
        if view.numel():
            view.copy_(self._read(begins, ends))
        return view


def loaded(answer: Callable[..., Any], checkpoint: Any) -> dict[str, object]:
    """What the ranks of every load get, by a line that says what was asked for."""
    observed: dict[str, object] = {}
    for number, load in enumerate(checkpoint.loads):
        name, parts = load["name"], [(units, size) for units, size in load["parts"]]
        files = [
            File(name, shape, getattr(torch, load["dtype"]), reader(checkpoint, number, index))
            for index, shape in enumerate(load["shapes"])
        ]
        padded = {"padded": True} if load["padded"] else {}
        for rank in load["ranks"]:
            arguments = files, name, list(parts), load["parallel"], rank, load["world"]
            what = f"{name} {parts} saved for {len(files)}, rank {rank} of {load['world']}"
            observed[what] = answer(*arguments, **padded)
    return observed


def tried(answer: Callable[..., Tensor | None], checkpoint: Any) -> dict[str, object]:
    """Of every load which exception was raised, or "nothing", and what was given if nothing was."""

    def one(*arguments: Any, **options: Any) -> list[object]:
        given: list[object] = []
        return [raised(lambda: given.append(answer(*arguments, **options))), *given]

    return loaded(one, checkpoint)


def reader(checkpoint: Any, load: int, file: int) -> Callable[[list[int], list[int]], Tensor]:
    return lambda begins, ends: checkpoint.read(load, file, begins, ends)


# ---------------------------------------------------------------------------------------------- what is in the files


def layer(
    rng: Rng,
    name: str,
    parts: list[tuple[int, int]],
    parallel: str = "column",
    *,
    width: int | None = None,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """A weight, or without a width the bias of a column-parallel layer; its values say nothing of their place."""
    length = sum(units * size for units, size in parts)
    shape = [length] if width is None else [length, width] if parallel == "column" else [width, length]
    return Layer(name, rng.uniform(-100, 100, *shape).to(dtype), parts, parallel, padded)


def numbered(layer: Layer) -> Layer:
    """The layer with values that say, before the point, which row (column) they are in: for files that are whole."""
    count = layer.whole.shape[layer.axis]
    number = torch.arange(count).reshape(
        [-1 if axis == layer.axis else 1 for axis in range(layer.whole.dim())]
    )
    return replace(layer, whole=number + layer.whole.abs() / 128)


def of_heads(heads: int, key_heads: int, size: int) -> list[tuple[int, int]]:
    """Parts of fused queries, keys and values."""
    return [(heads, size), (key_heads, size), (key_heads, size)]


def whole_layers(rng: Rng) -> Checkpoint:
    world, size, width = rng.integer(2, 4), rng.integer(2, 3), rng.choice([5, 7])
    heads, wide = [(world * rng.integer(1, 2), size)], [(world * rng.integer(3, 4), 1), (world, 2)]
    square = sum(units * units_size for units, units_size in wide)
    layers = [
        numbered(layer(rng, "q_proj.weight", heads, width=width)),
        numbered(layer(rng, "q_proj.bias", heads)),
        numbered(layer(rng, "down_proj.weight", wide, "row", width=square)),
        Layer("down_proj.bias", rng.normal(square), wide, "row"),
    ]
    return Checkpoint(rng, *(Load(one, 1, world) for one in layers))


def fused_layers(rng: Rng) -> Checkpoint:
    world, width = rng.integer(2, 3), rng.choice([5, 7])
    key_heads = world * rng.integer(1, 2)
    heads = of_heads(key_heads * rng.integer(2, 3), key_heads, rng.integer(2, 3))
    gated = [(world * rng.integer(3, 4), 1)] * 2
    mixed = [(world, 3), *rng.shuffled([(world * 2, 2), (world * 3, 1)]), (world, 4)]
    layers = [
        numbered(layer(rng, "qkv_proj.weight", heads, width=width)),
        numbered(layer(rng, "in_proj.bias", mixed)),
        numbered(layer(rng, "gate_up_proj.weight", gated, width=width)),
    ]
    return Checkpoint(rng, *(Load(one, 1, world) for one in layers))


def few_key_heads(rng: Rng) -> Checkpoint:
    key_heads, copies = rng.choice([(2, 2), (2, 4), (3, 2)])
    world = key_heads * copies
    layers = [
        numbered(layer(rng, "qkv_proj.weight", of_heads(world, key_heads, 4), width=3)),
        numbered(layer(rng, "qkv_proj.bias", [(world, 2), (key_heads, 4), (key_heads, 3)])),
    ]
    return Checkpoint(rng, *(Load(one, 1, world) for one in layers))


def remainders(rng: Rng) -> Checkpoint:
    words, world = rng.choice([(5, 4), (11, 5), (13, 6)])
    gated = [(10, 1), (5, 2)]
    return Checkpoint(
        rng,
        Load(numbered(layer(rng, "lm_head.bias", [(2, 3)], padded=True)), 1, 4),
        Load(numbered(layer(rng, "embed_tokens.weight", [(words, 1)], width=3, padded=True)), 1, world),
        Load(numbered(layer(rng, "lm_head.bias", [(words, 1)], padded=True)), 1, world),
        Load(
            numbered(layer(rng, "gate_up_proj.weight", [(10, 1), (11, 1), (5, 2)], width=3, padded=True)),
            1,
            4,
        ),
        Load(
            numbered(layer(rng, "down_proj.weight", rng.shuffled(gated), "row", width=3, padded=True)), 1, 4
        ),
        Load(
            Layer("down_proj.bias", rng.normal(10), gated, "row", padded=True), 1, 4, [0, rng.integer(1, 3)]
        ),
    )


def not_to_be_cut(rng: Rng) -> Checkpoint:
    refused = [
        (layer(rng, "k_proj.weight", [(6, 2)], width=3), 4),
        (layer(rng, "k_proj.weight", [(3, 2)], width=3), 4),
        (layer(rng, "qkv_proj.weight", of_heads(12, 3, 2), width=3), 4),
        (layer(rng, "k_proj.bias", [(6, 2)]), 4),
        (layer(rng, "o_proj.weight", [(6, 2)], "row", width=3), 4),
        (layer(rng, "o_proj.weight", [(4, 1), (2, 2)], "row", width=3), 4),
    ]
    allowed = layer(rng, "o_proj.weight", [(4, 2)], "row", width=3)
    tried = [Load(one, 1, world, [rng.integer(0, world - 1)], refused=True) for one, world in refused]
    return Checkpoint(rng, Load(allowed, 1, 4), *tried)


def heads_for_other_ranks(rng: Rng) -> Checkpoint:
    few, many = of_heads(8, 2, 2), [(12, 2), (6, 3), (6, 1)]
    twins = layer(rng, "qkv_proj.weight", few, width=3)
    twins.whole[18:20] = twins.whole[16:18]  # two key heads of equal values, which are not copies of one
    return Checkpoint(
        rng,
        Load(layer(rng, "qkv_proj.weight", few, width=3), 4, 8),
        Load(layer(rng, "qkv_proj.weight", few, width=3), 8, 4),
        Load(twins, 8, 2),
        Load(layer(rng, "qkv_proj.bias", few), 4, 1),
        Load(layer(rng, "qkv_proj.bias", many), 2, 3),
        Load(layer(rng, "qkv_proj.weight", many, width=3), 3, 2),
        Load(layer(rng, "gate_up_proj.weight", [(12, 1)] * 2, width=3), *rng.choice([(4, 2), (2, 4)])),
    )


def columns_for_other_ranks(rng: Rng) -> Checkpoint:
    heads, wide = [(8, 2), (8, 1)], [(6, 3), (12, 1), (6, 1)]
    return Checkpoint(
        rng,
        Load(layer(rng, "o_proj.weight", heads, "row", width=3), 4, 8),
        Load(layer(rng, "o_proj.weight", heads, "row", width=3), 8, 4),
        Load(layer(rng, "down_proj.weight", wide, "row", width=5), *rng.choice([(2, 3), (3, 2)])),
        Load(layer(rng, "o_proj.weight", heads, "row", width=3), 4, 4, [rng.integer(0, 3)]),
        Load(Layer("down_proj.bias", rng.normal(5), wide, "row"), 3, 2),
    )


def remainders_for_other_ranks(rng: Rng) -> Checkpoint:
    words, wide = rng.integer(17, 19), rng.integer(17, 19)
    gated, fused = [(wide, 1), (wide - 8, 2)], [(wide, 1), (5, 2)]
    return Checkpoint(
        rng,
        Load(layer(rng, "embed_tokens.weight", [(words, 1)], width=3, padded=True), 8, 4),
        Load(layer(rng, "lm_head.bias", [(words, 2)], padded=True), 4, 8),
        Load(layer(rng, "gate_up_proj.weight", gated, width=3, padded=True), 8, 4, [0, 2, 3]),
        Load(layer(rng, "down_proj.weight", fused, "row", width=3, padded=True), 4, 8, [0, 2, 5, 7]),
        Load(layer(rng, "gate_up_proj.weight", [(5, 2), (7, 1)], width=3, padded=True), 4, 4, [2, 3]),
        Load(layer(rng, "lm_head.bias", [(6, 2)], padded=True), 4, 3),
        Load(layer(rng, "lm_head.bias", [(7, 2)], padded=True), 3, 1),
        Load(Layer("down_proj.bias", rng.normal(5), fused, "row", padded=True), 4, 8, [0, rng.integer(1, 7)]),
    )


def of_many_dtypes(rng: Rng) -> Checkpoint:
    dtypes = rng.shuffled([torch.bfloat16, torch.float16, torch.int8, torch.float64])
    return Checkpoint(
        rng,
        Load(layer(rng, "q_proj.weight", [(8, 2)], width=3, dtype=dtypes[0]), 1, 4),
        Load(layer(rng, "o_proj.weight", [(8, 2)], "row", width=3, dtype=dtypes[1]), 2, 4),
        Load(layer(rng, "embed_tokens.weight", [(9, 1)], width=3, padded=True, dtype=dtypes[2]), 1, 4),
        Load(layer(rng, "embed_tokens.weight", [(5, 1)], width=3, padded=True, dtype=dtypes[3]), 2, 4),
    )


def some_rows(rng: Rng) -> Checkpoint:
    heads = of_heads(16, 2, 4)
    return Checkpoint(
        rng,
        Load(layer(rng, "qkv_proj.weight", heads, width=16), 1, 8, [rng.integer(0, 7)]),
        Load(layer(rng, "qkv_proj.weight", heads, width=16), 4, 8, [rng.integer(0, 7)]),
        Load(layer(rng, "qkv_proj.weight", heads, width=16), 8, 4, [rng.integer(0, 3)]),
        Load(layer(rng, "embed_tokens.weight", [(37, 1), (21, 2)], width=16, padded=True), 8, 4, [0, 3]),
        Load(layer(rng, "embed_tokens.weight", [(13, 1)], width=16, padded=True), 3, 6, [4, 5]),
    )


def some_columns(rng: Rng) -> Checkpoint:
    heads = [(16, 4), (8, 3)]
    return Checkpoint(
        rng,
        Load(layer(rng, "o_proj.weight", heads, "row", width=24), 1, 8, [rng.integer(0, 7)]),
        Load(layer(rng, "o_proj.weight", heads, "row", width=24), 4, 8, [rng.integer(0, 7)]),
        Load(layer(rng, "o_proj.weight", heads, "row", width=24), 8, 4, [rng.integer(0, 3)]),
        Load(layer(rng, "down_proj.weight", [(13, 2), (5, 3)], "row", width=24, padded=True), 3, 4, [0, 3]),
        Load(Layer("o_proj.bias", rng.normal(24), heads, "row"), 4, 8, [0, rng.integer(1, 7)]),
    )


# ---------------------------------------------------------------------------------------------------------- cases


@case(load_rank_slice, service=whole_layers)
def rows_or_columns(answer, rng, checkpoint):
    """A column-parallel and a square, fused row-parallel layer with their biases, saved whole, on every rank."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=fused_layers)
def fused_parts(answer, rng, checkpoint):
    """Fused queries, keys and values with fewer key heads, a gate with what it gates, and four parts of other sizes."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=few_key_heads)
def more_ranks_than_key_heads(answer, rng, checkpoint):
    """Two or three key heads on two or four times as many ranks."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=remainders)
def padded_remainders(answer, rng, checkpoint):
    """Words, and rows of fused layers, that the ranks do not divide; a rank may have padding only."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=not_to_be_cut)
def refused(answer, rng, checkpoint):
    """A layer that can be cut; then heads that can be neither dealt to the ranks nor copied."""
    return tried(answer, checkpoint)


@case(load_rank_slice, service=heads_for_other_ranks)
def resharded_rows(answer, rng, checkpoint):
    """Fused layers saved for one number of ranks and loaded by another; in one, two key heads have equal values."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=columns_for_other_ranks)
def resharded_columns(answer, rng, checkpoint):
    """Fused row-parallel layers and a bias of theirs, saved for another number of ranks."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=remainders_for_other_ranks)
def resharded_remainders(answer, rng, checkpoint):
    """Padded layers saved for some ranks and loaded by fewer, by more, and by as many as they were saved for."""
    return loaded(answer, checkpoint)


@case(load_rank_slice, service=of_many_dtypes)
def memory_of_its_own(answer, rng, checkpoint):
    """Values, dtype, and the bytes that the tensor returned keeps in memory."""
    return {
        what: [found, found.untyped_storage().nbytes() if isinstance(found, Tensor) else 0]
        for what, found in loaded(answer, checkpoint).items()
    }


@cost(load_rank_slice, share=1 / 6, authority="protocol", service=some_rows)
def rows_requested(answer, rng, checkpoint):
    """What one rank asks for of fused heads and of padded words."""
    return {"observed": loaded(answer, checkpoint)}


@cost(load_rank_slice, share=1 / 6, authority="protocol", service=some_columns)
def columns_requested(answer, rng, checkpoint):
    """What one rank asks for of fused and padded row-parallel layers and a bias."""
    return {"observed": loaded(answer, checkpoint)}


# ------------------------------------------------------------------------------------------------------- mistakes


def refuse(parts, parallel, world, padded):
    """ValueError where a part can be neither dealt nor copied."""
    for units, _ in parts:
        if not padded and units % world and (world % units or parallel == "row"):
            raise ValueError(f"{units} units on {world} ranks")


def axis_of(parallel):
    return {"column": 0, "row": 1}[parallel]


def cut(stored, axis, begin, end):
    return stored[begin:end] if axis == 0 else stored[:, begin:end]


def put_together(files, name, axis, wanted, held):
    """The rows `wanted` (-1: zeros) in their order, from files that hold the rows held[0], held[1], ...

    Neighbours in a file are asked for together; rows that no file holds are left out.
    """
    found = {}
    for index, rows in enumerate(held):
        for place, row in enumerate(rows):
            found.setdefault(row, (index, place))
    runs = []  # file (-1: none), first, one after the last
    for row in wanted:
        index, place = found.get(row, (-2, 0)) if row >= 0 else (-1, 0)
        if runs and index >= 0 and runs[-1][0] == index and runs[-1][2] == place:
            runs[-1][2] += 1
        elif index >= -1:
            runs.append([index, place, place + 1])
    empty = cut(files[0].get_slice(name), axis, 0, 0)
    shape = list(empty.shape)
    shape[axis] = 1
    pieces = [
        cut(files[index].get_slice(name), axis, begin, end) if index >= 0 else empty.new_zeros(shape)
        for index, begin, end in runs
    ]
    return torch.cat([empty, *pieces], axis)


def load_by_places(files, name, parts, parallel, rank, world, padded=False, *, rule=places, saved_rule=None):
    """By the list of rows that a rank holds, `rule(parts, rank, world, padded)`; `saved_rule` where files differ."""
    refuse(parts, parallel, world, padded)
    axis, saved_rule = axis_of(parallel), saved_rule or rule
    first = files[0].get_slice(name)
    if axis == len(first.get_shape()):
        return first[:] if rank == 0 else None
    held = [saved_rule(parts, index, len(files), padded) for index in range(len(files))]
    return put_together(files, name, axis, rule(parts, rank, world, padded), held)


def each_part(parts, rows_of):
    """Rows of all parts, where rows_of(units, size) gives those of one, counted from its own first row."""
    rows, begin = [], 0
    for units, size in parts:
        rows += [begin + row if row >= 0 else -1 for row in rows_of(units, size)]
        begin += units * size
    return rows


def units_of(units, rank, world, padded):
    """First unit of a rank, and how many it has room for; a rest is rounded up."""
    if padded or units % world and (units > world or world % units):
        room = -(-units // world)
        return rank * room, room
    return rank * units // world, max(units // world, 1)


def load_by_runs(
    files,
    name,
    parts,
    parallel,
    rank,
    world,
    padded=False,
    *,
    zeros_dtype=None,
    joined=torch.cat,
    **otherwise,
):
    """Run by run, with what the mistakes do otherwise as options, also those of `runs_of`. It refuses nothing."""
    axis, first = axis_of(parallel), files[0].get_slice(name)
    if axis == len(first.get_shape()):
        return first[:] if rank == 0 else None
    pieces, shape = [cut(first, axis, 0, 0)], first.get_shape()
    for index, begin, end, is_new in runs_of(parts, len(files), rank, world, padded, **otherwise):
        if index == len(files):
            shape[axis] = end - begin
            pieces.append(torch.zeros(shape, dtype=zeros_dtype or pieces[0].dtype))
        else:
            piece = cut(files[index].get_slice(name), axis, begin, end)
            pieces += [piece] if is_new else []
    return joined(pieces, axis)


def runs_of(
    parts,
    saved,
    rank,
    world,
    padded,
    *,
    rule=units_of,
    from_file=lambda index: True,
    every_copy=False,
    trusts_padding=False,
    unit_by_unit=False,
    file_by_file=False,
):
    """(file, first row, one after the last, whether it is new) of a rank's runs, in order; file `saved` is padding."""
    runs, start = [], 0
    for units, size in parts:
        at, room = rule(units, rank, world, padded)
        end, begin = at + room, at
        for index in range(saved):
            file_at, file_room = rule(units, index, saved, padded)
            stop = min(end, file_at + file_room) if trusts_padding else min(end, units, file_at + file_room)
            lowest = max(begin, file_at) if every_copy else at
            if file_at <= lowest < stop and from_file(index):
                step = 1 if unit_by_unit else stop - lowest
                for unit in range(lowest, stop, step):
                    row = start + (unit - file_at) * size
                    runs.append((index, row, row + step * size, unit >= at))
                at = max(at, stop)
        missing = end - max(at, min(units, end))
        runs += [(saved, 0, missing * size, True)] if missing > 0 else []
        start += file_room * size
    return sorted(runs, key=lambda run: run[0]) if file_by_file else runs


@mistake(
    load_rank_slice,
    "A column-parallel layer is cut by the columns of the stored weight, a row-parallel one by rows.",
    fails=[
        "rows_or_columns",
        "fused_parts",
        "more_ranks_than_key_heads",
        "padded_remainders",
        "refused",
        "resharded_rows",
        "resharded_columns",
        "resharded_remainders",
        "memory_of_its_own",
        "rows_requested",
        "columns_requested",
    ],
)
def rows_for_columns(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    if len(files[0].get_slice(name).get_shape()) == 2:
        parallel = {"column": "row", "row": "column"}[parallel]
    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=places)


def equal_runs(parts, rank, world, padded):
    if len(parts) == 1:
        return places(parts, rank, world, padded)
    rows = sum(units * size for units, size in parts)
    return [
        row if row < rows else -1 for row in range(rank * -(-rows // world), (rank + 1) * -(-rows // world))
    ]


@mistake(
    load_rank_slice,
    "A fused weight is cut in equal runs, so one rank gets queries and another keys.",
    fails=[
        "rows_or_columns",
        "resharded_columns",
        "columns_requested",
        "fused_parts",
        "more_ranks_than_key_heads",
        "padded_remainders",
        "resharded_rows",
        "resharded_remainders",
        "rows_requested",
    ],
)
def fused_in_equal_runs(files, name, parts, parallel, rank, world, padded=False):
    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=equal_runs)


def equal_thirds(parts, rank, world, padded):
    if padded:
        return places(parts, rank, world, padded)
    rows = sum(units * size for units, size in parts) // len(parts)
    return each_part(
        [(rows, 1)] * len(parts), lambda units, _: range(rank * rows // world, (rank + 1) * rows // world)
    )


@mistake(
    load_rank_slice,
    "Queries, keys and values are taken for equally many rows.",
    fails=[
        "rows_or_columns",
        "resharded_columns",
        "columns_requested",
        "fused_parts",
        "more_ranks_than_key_heads",
        "resharded_rows",
        "rows_requested",
    ],
)
def as_many_keys_as_queries(files, name, parts, parallel, rank, world, padded=False):
    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=equal_thirds)


def heads_split(parts, rank, world, padded):
    def rows_of(units, size):
        if padded or units >= world:
            return places([(units, size)], rank, world, padded)
        return range(rank * units * size // world, (rank + 1) * units * size // world)

    return each_part(parts, rows_of)


@mistake(
    load_rank_slice,
    "With fewer key heads than ranks, heads are split among the ranks.",
    fails=["more_ranks_than_key_heads", "resharded_rows", "rows_requested"],
)
def key_heads_split(files, name, parts, parallel, rank, world, padded=False):
    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=heads_split)


def taking_turns(units, rank, world, padded):
    return units_of(units, rank, world, padded) if padded or units >= world else (rank % units, 1)


@mistake(
    load_rank_slice,
    "Copies of key heads go round the ranks in turn, away from the queries that need them.",
    fails=["more_ranks_than_key_heads", "resharded_rows", "rows_requested"],
)
def key_heads_in_turn(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)

    def rule(parts, rank, world, padded):
        def rows_of(units, size):
            first, room = taking_turns(units, rank, world, padded)
            return [row if row < units * size else -1 for row in range(first * size, (first + room) * size)]

        return each_part(parts, rows_of)

    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule)


@mistake(
    load_rank_slice,
    "With fewer key heads than ranks, every rank gets all of them.",
    fails=["more_ranks_than_key_heads", "resharded_rows", "rows_requested"],
)
def all_key_heads_everywhere(files, name, parts, parallel, rank, world, padded=False):
    def rule(parts, rank, world, padded):
        return each_part(
            parts,
            lambda units, size: (
                range(units * size)
                if units < world and not padded
                else places([(units, size)], rank, world, padded)
            ),
        )

    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule)


@mistake(
    load_rank_slice,
    "Fewer key heads than ranks are rounded down to none on each rank.",
    fails=["more_ranks_than_key_heads", "resharded_rows", "rows_requested"],
)
def no_key_heads(files, name, parts, parallel, rank, world, padded=False):
    def rule(parts, rank, world, padded):
        def rows_of(units, size):
            if units < world and not padded:
                return []
            return places([(units, size)], rank, world, padded)

        return each_part(parts, rows_of)

    refuse(parts, parallel, world, padded)
    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule, saved_rule=places)


@mistake(
    load_rank_slice,
    "Fewer key heads than ranks is refused, where heads can be copied.",
    fails=["more_ranks_than_key_heads", "resharded_rows", "rows_requested"],
)
def copies_refused(files, name, parts, parallel, rank, world, padded=False):
    if not padded and any(units < world for units, _ in parts):
        raise ValueError("fewer heads than ranks")
    return load_by_places(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Every rank of a row-parallel layer gets the bias, so the sum has it as often as there are ranks.",
    fails=[
        "padded_remainders",
        "resharded_remainders",
        "rows_or_columns",
        "resharded_columns",
        "columns_requested",
    ],
)
def bias_on_every_rank(files, name, parts, parallel, rank, world, padded=False):
    stored = files[0].get_slice(name)
    if axis_of(parallel) == len(stored.get_shape()):
        return stored[:]
    return load_by_places(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "The bias of a row-parallel layer is cut among the ranks, though each of them has all outputs.",
    fails=[
        "padded_remainders",
        "resharded_remainders",
        "rows_or_columns",
        "resharded_columns",
        "columns_requested",
    ],
)
def bias_cut_with_the_columns(files, name, parts, parallel, rank, world, padded=False):
    stored = files[0].get_slice(name)
    if axis_of(parallel) == len(stored.get_shape()):
        (rows,) = stored.get_shape()
        return stored[rank * rows // world : (rank + 1) * rows // world].clone()
    return load_by_places(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "The bias is read on every rank and dropped on all but the first.",
    fails=["columns_requested"],
)
def bias_read_everywhere(files, name, parts, parallel, rank, world, padded=False):
    stored = files[0].get_slice(name)
    if axis_of(parallel) == len(stored.get_shape()):
        bias = stored[:]
        return bias if rank == 0 else None
    return load_by_places(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "What is left when the ranks do not divide the words is dropped.",
    fails=[
        "columns_requested",
        "padded_remainders",
        "resharded_remainders",
        "memory_of_its_own",
        "rows_requested",
    ],
)
def remainder_dropped(files, name, parts, parallel, rank, world, padded=False):
    def rule(parts, rank, world, padded):
        if not padded:
            return places(parts, rank, world, padded)
        return each_part(
            parts,
            lambda units, size: range(rank * (units // world) * size, (rank + 1) * (units // world) * size),
        )

    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule, saved_rule=places)


@mistake(
    load_rank_slice,
    "The last ranks get fewer words, or none, and no padding.",
    fails=[
        "columns_requested",
        "padded_remainders",
        "resharded_remainders",
        "memory_of_its_own",
        "rows_requested",
    ],
)
def last_ranks_shorter(files, name, parts, parallel, rank, world, padded=False):
    def rule(*arguments):
        return [row for row in places(*arguments) if row >= 0]

    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule, saved_rule=places)


@mistake(
    load_rank_slice,
    "The remainder is spread: some ranks get one word more, and the others a row of padding.",
    fails=[
        "columns_requested",
        "padded_remainders",
        "resharded_remainders",
        "memory_of_its_own",
        "rows_requested",
    ],
)
def remainder_spread(files, name, parts, parallel, rank, world, padded=False):
    def rule(parts, rank, world, padded):
        def rows_of(units, size):
            rows = [
                unit * size + row
                for unit in range(rank * units // world, (rank + 1) * units // world)
                for row in range(size)
            ]
            return rows + [-1] * (-(-units // world) * size - len(rows))

        return each_part(parts, rows_of) if padded else places(parts, rank, world, padded)

    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule, saved_rule=places)


def few_words_copied(units, rank, world, padded):
    return units_of(units, rank, world, padded and world % units > 0)


@mistake(
    load_rank_slice,
    "Fewer words than ranks are copied like key heads, though padding was asked for.",
    fails=["padded_remainders"],
)
def words_copied(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded, rule=few_words_copied)


@mistake(
    load_rank_slice,
    "The padding of all parts is put at the end, where it belongs after each part.",
    fails=["rows_requested", "padded_remainders", "resharded_remainders"],
)
def padding_at_the_end(files, name, parts, parallel, rank, world, padded=False):
    def rule(*arguments):
        return sorted(places(*arguments), key=lambda row: row < 0)

    return load_by_places(files, name, parts, parallel, rank, world, padded, rule=rule)


@mistake(
    load_rank_slice,
    "Padding is made in the default dtype, and the stored rows are promoted to it.",
    fails=["memory_of_its_own"],
)
def padding_of_another_dtype(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    return load_by_runs(
        files, name, parts, parallel, rank, world, padded, zeros_dtype=torch.get_default_dtype()
    )


@mistake(
    load_rank_slice,
    "What a slice gives is returned as it is: a view that keeps the whole tensor in memory.",
    fails=["memory_of_its_own"],
)
def view_of_the_whole(files, name, parts, parallel, rank, world, padded=False):
    def joined(pieces, axis):
        filled = [piece for piece in pieces if piece.numel()]
        return filled[0] if len(filled) == 1 else torch.cat(pieces, axis)

    refuse(parts, parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded, joined=joined)


class InMemory:
    """A file of which all is read first; `rows_too=False`: only where columns are asked for."""

    def __init__(self, file, rows_too):
        self._file, self._rows_too = file, rows_too

    def get_slice(self, name):
        self._stored = self._file.get_slice(name)
        return self

    def get_shape(self):
        return self._stored.get_shape()

    def __getitem__(self, index):
        if self._rows_too or isinstance(index, tuple) and index[1] != slice(0, 0):
            return self._stored[:][index]
        return self._stored[index]


@mistake(
    load_rank_slice,
    "The whole tensor is read, and the rank's part is cut out of it in memory.",
    fails=["rows_requested", "columns_requested"],
)
def everything_read(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    files = [InMemory(file, rows_too=True) for file in files]
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Whole rows are read of a row-parallel weight, and its columns cut out of them in memory.",
    fails=["columns_requested"],
)
def whole_rows_read(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    files = [InMemory(file, rows_too=False) for file in files]
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Every head and every row is asked for by a request of its own.",
    fails=["rows_requested", "columns_requested"],
)
def one_request_for_each_unit(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded, unit_by_unit=True)


@mistake(
    load_rank_slice, "A head that several files hold is read from each of them.", fails=["rows_requested"]
)
def every_copy_read(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded, every_copy=True)


@mistake(
    load_rank_slice,
    "The first file is taken for the whole, however many there are.",
    fails=[
        "resharded_rows",
        "resharded_columns",
        "resharded_remainders",
        "memory_of_its_own",
        "rows_requested",
        "columns_requested",
    ],
)
def first_file_only(files, name, parts, parallel, rank, world, padded=False):
    return load_by_places(files[:1], name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "The files put one after the other are taken for the whole, though each has a run of every part.",
    fails=[
        "resharded_columns",
        "columns_requested",
        "resharded_rows",
        "resharded_remainders",
        "rows_requested",
    ],
)
def files_taken_in_a_row(files, name, parts, parallel, rank, world, padded=False):
    def saved_rule(parts, index, saved, padded):
        rows = len(places(parts, index, saved, padded))
        return range(index * rows, (index + 1) * rows)

    return load_by_places(
        files, name, parts, parallel, rank, world, padded, rule=places, saved_rule=saved_rule
    )


@mistake(
    load_rank_slice,
    "Copies of a key head in the files count as heads of their own.",
    fails=["resharded_rows", "rows_requested"],
)
def copies_taken_for_heads(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    if not padded:
        parts = [(max(units, len(files)), size) for units, size in parts]
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


class Gathered:
    """A file made of a tensor in memory."""

    def __init__(self, tensor):
        self._tensor = tensor

    def get_slice(self, name):
        return self

    def get_shape(self):
        return list(self._tensor.shape)

    def __getitem__(self, index):
        return self._tensor[index]


@mistake(
    load_rank_slice,
    "Neighbouring heads of equal values in the files are taken for copies of one.",
    fails=["resharded_rows", "rows_requested"],
)
def copies_told_by_value(files, name, parts, parallel, rank, world, padded=False):
    if padded or parallel == "row" or len(files) == 1:
        return load_by_places(files, name, parts, parallel, rank, world, padded)
    stored, kept, start = [file.get_slice(name)[:] for file in files], [], 0
    for units, size in parts:
        rows = units_of(units, 0, len(files), padded)[1] * size
        heads = [head for tensor in stored for head in tensor[start : start + rows].split(size)]
        kept += [
            head
            for head, before in zip(heads, [None, *heads[:-1]], strict=True)
            if before is None or not head.equal(before)
        ]
        start += rows
    return load_by_places([Gathered(torch.cat(kept))], name, parts, parallel, rank, world)


@mistake(
    load_rank_slice,
    "The padding in the files counts as words, so the words are dealt anew with it.",
    fails=["columns_requested", "resharded_remainders", "memory_of_its_own", "rows_requested"],
)
def padding_taken_for_words(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    if padded:
        parts = [(-(-units // len(files)) * len(files), size) for units, size in parts]
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "The padding in the files is taken for zeros and loaded.",
    fails=["columns_requested", "resharded_remainders", "memory_of_its_own", "rows_requested"],
)
def padding_trusted(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded, trusts_padding=True)


@mistake(
    load_rank_slice,
    "A rank looks into one file only, though its run may begin in one and end in another.",
    fails=[
        "resharded_rows",
        "resharded_columns",
        "resharded_remainders",
        "memory_of_its_own",
        "rows_requested",
        "columns_requested",
    ],
)
def one_file_for_each_rank(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    only = rank * len(files) // world
    return load_by_runs(
        files,
        name,
        parts,
        parallel,
        rank,
        world,
        padded,
        rule=units_of,
        from_file=lambda index: index == only,
    )


@mistake(
    load_rank_slice,
    "Pieces are put together file by file, so keys of one file come before queries of the next.",
    fails=[
        "resharded_columns",
        "columns_requested",
        "padded_remainders",
        "resharded_rows",
        "resharded_remainders",
        "rows_requested",
    ],
)
def file_after_file(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded, file_by_file=True)


@mistake(
    load_rank_slice,
    "Nothing is refused: heads that the ranks do not divide get padding or land on the wrong rank.",
    fails=["refused"],
)
def nothing_refused(files, name, parts, parallel, rank, world, padded=False):
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "The inputs of a row-parallel layer are copied like key heads, and added more than once.",
    fails=["refused"],
)
def columns_copied(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, "column", world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Only the first of the fused parts is looked at before the weight is cut.",
    fails=["refused"],
)
def first_part_looked_at(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts[:1], parallel, world, padded)
    return load_by_runs(files, name, parts, parallel, rank, world, padded)


EVERYWHERE_BUT_REFUSED = [
    "rows_or_columns",
    "fused_parts",
    "more_ranks_than_key_heads",
    "padded_remainders",
    "resharded_rows",
    "resharded_columns",
    "resharded_remainders",
    "rows_requested",
    "columns_requested",
]


def with_other_parts(parts_of):
    """An answer that takes `parts_of(parts, parallel, padded)` for the parts."""

    def answer(files, name, parts, parallel, rank, world, padded=False):
        refuse(parts, parallel, world, padded)
        return load_by_runs(files, name, parts_of(parts, parallel, padded), parallel, rank, world, padded)

    return answer


@mistake(
    load_rank_slice,
    "The size of the first part is taken for that of every part.",
    fails=EVERYWHERE_BUT_REFUSED,
)
def one_size_for_all(files, name, parts, parallel, rank, world, padded=False):
    other = with_other_parts(lambda parts, parallel, padded: [(units, parts[0][1]) for units, _ in parts])
    return other(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "What is padded is taken for single rows, whatever size its units have.",
    fails=["padded_remainders", "resharded_remainders", "rows_requested", "columns_requested"],
)
def padded_units_of_one_row(files, name, parts, parallel, rank, world, padded=False):
    other = with_other_parts(
        lambda parts, parallel, padded: [(units, 1 if padded else size) for units, size in parts]
    )
    return other(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Parts that are padded are taken for as many units as the first of them.",
    fails=["padded_remainders", "resharded_remainders", "rows_requested", "columns_requested"],
)
def padded_parts_alike(files, name, parts, parallel, rank, world, padded=False):
    other = with_other_parts(
        lambda parts, parallel, padded: [(parts[0][0] if padded else units, size) for units, size in parts]
    )
    return other(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Of a row-parallel layer only the first part is loaded, as if its inputs could not be fused.",
    fails=[
        "rows_or_columns",
        "padded_remainders",
        "resharded_columns",
        "resharded_remainders",
        "columns_requested",
    ],
)
def first_part_of_columns(files, name, parts, parallel, rank, world, padded=False):
    other = with_other_parts(lambda parts, parallel, padded: parts[:1] if parallel == "row" else parts)
    return other(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Columns are taken for one part: the fused inputs of a row-parallel layer are cut in equal runs.",
    fails=[
        "rows_or_columns",
        "padded_remainders",
        "resharded_columns",
        "resharded_remainders",
        "columns_requested",
    ],
)
def columns_in_equal_runs(files, name, parts, parallel, rank, world, padded=False):
    other = with_other_parts(
        lambda parts, parallel, padded: (
            [(sum(units * size for units, size in parts), 1)] if parallel == "row" else parts
        )
    )
    return other(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "As many ranks as files: the file is taken as it is, with what happens to be in its padding.",
    fails=["resharded_remainders"],
)
def own_file_as_it_is(files, name, parts, parallel, rank, world, padded=False):
    if len(files) == world and (parallel == "column" or rank == 0):
        return files[rank].get_slice(name)[:].clone()
    return load_by_places(files, name, parts, parallel, rank, world, padded)


@mistake(
    load_rank_slice,
    "Looks for the axis that is as long as the parts say, which of a square weight both are.",
    fails=["rows_or_columns"],
)
def axis_by_length(files, name, parts, parallel, rank, world, padded=False):
    shape = files[0].get_slice(name).get_shape()
    length = sum(units * size for units, size in parts)
    if len(files) == 1 and len(shape) == 2 and shape[0] == length:
        refuse(parts, parallel, world, padded)
        parallel = "column"
    return load_by_places(files, name, parts, parallel, rank, world, padded)


# --------------------------------------------------------------------------------------------------- alternatives


@alternative(load_rank_slice, "Lists every row that a rank holds, and finds each in the lists of the files")
def row_by_row(files, name, parts, parallel, rank, world, padded=False):
    return load_by_places(files, name, parts, parallel, rank, world, padded)


@alternative(
    load_rank_slice, "Makes a tensor of zeros first and copies runs to their places, last file first"
)
def filled_in_place(files, name, parts, parallel, rank, world, padded=False):
    refuse(parts, parallel, world, padded)
    axis, stored = axis_of(parallel), files[0].get_slice(name)
    shape = stored.get_shape()
    if axis == len(shape):
        return None if rank else files[0].get_tensor(name).clone()
    rooms = [units_of(units, rank, world, padded)[1] for units, _ in parts]
    shape[axis] = sum(room * size for room, (_, size) in zip(rooms, parts, strict=True))
    result = torch.zeros(shape, dtype=cut(stored, axis, 0, 0).dtype)
    begin = file_begin = 0
    for units, size in parts:
        first, room = units_of(units, rank, world, padded)
        left = set(range(first, min(first + room, units)))
        for index in reversed(range(len(files))):
            file_first, file_room = units_of(units, index, len(files), padded)
            here = sorted(left & set(range(file_first, file_first + file_room)))
            if here:
                left -= set(here)
                source, target = (here[0] - file_first) * size, (here[0] - first) * size
                run = cut(
                    files[index].get_slice(name),
                    axis,
                    file_begin + source,
                    file_begin + source + len(here) * size,
                )
                result.narrow(axis, begin + target, len(here) * size).copy_(run)
        begin += room * size
        file_begin += file_room * size
    return result
