"""Layers on all ranks against the layer that was not cut, on real safetensors files; and what is asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

from llmcourse.exercise import Rng
from llmcourse.lessons.parameter_loading import load_rank_slice as lesson
from llmcourse.lessons.parameter_loading.load_rank_slice import Checkpoint, Layer, Load, load_rank_slice

Parts = list[tuple[int, int]]
EPS = torch.finfo(torch.float64).eps
HEADS, KEY_HEADS, SIZE, WIDTH = 8, 2, 4, 10
QKV: Parts = [(HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, SIZE)]


def opened(folder: Path, *files: dict[str, Tensor | None]) -> list[Any]:
    """The files as safetensors opens them, file i of rank i; a name without a tensor is left out."""
    handles = []
    for index, tensors in enumerate(files):
        path = folder / f"{len(list(folder.iterdir()))}-{index}.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        handles.append(safe_open(path, "pt"))
    return handles


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def integers(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """float64 tensors of small integers: their sums and products are exact in any order."""
    return {name: tensor.mul(8).round() for name, tensor in drawn(seed, **shapes).items()}


def resaved(
    folder: Path, files: list[Any], layers: dict[str, tuple[Parts, str, bool]], world: int
) -> list[Any]:
    """What `world` ranks load, saved again as a checkpoint for so many ranks."""
    return opened(
        folder,
        *(
            {
                name: load_rank_slice(files, name, parts, parallel, rank, world, padded)
                for name, (parts, parallel, padded) in layers.items()
            }
            for rank in range(world)
        ),
    )


# ------------------------------------------------------------------------------- outputs, put side by side or added


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_outputs_of_a_column_parallel_layer_stand_side_by_side(tmp_path, seed, world):
    held = integers(seed, weight=(12, 5), bias=(12,), x=(3, 5))
    files, parts = opened(tmp_path, held), [(12, 1)]
    outputs = []
    for rank in range(world):
        weight = load_rank_slice(files, "weight", parts, "column", rank, world)
        bias = load_rank_slice(files, "bias", parts, "column", rank, world)
        assert weight is not None and bias is not None
        outputs.append(held["x"] @ weight.T + bias)
    assert torch.equal(torch.cat(outputs, 1), held["x"] @ held["weight"].T + held["bias"])


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_outputs_of_a_row_parallel_layer_add_up_with_one_bias(tmp_path, seed, world):
    held = integers(seed, weight=(5, 12), bias=(5,), x=(3, 12))
    files, parts = opened(tmp_path, held), [(6, 2)]
    total = torch.zeros(3, 5, dtype=torch.float64)
    for rank, x in enumerate(held["x"].chunk(world, 1)):
        weight = load_rank_slice(files, "weight", parts, "row", rank, world)
        bias = load_rank_slice(files, "bias", parts, "row", rank, world)
        assert weight is not None and (bias is None) == (rank > 0)
        total += x @ weight.T + (0 if bias is None else bias)
    assert torch.equal(total, held["x"] @ held["weight"].T + held["bias"])


def attended(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One causal head: x [tokens, width], weights with their bias as last column [SIZE, width + 1]."""
    q, k, v = (x @ part[:, :-1].T + part[:, -1] for part in (query, key, value))
    later = torch.ones(len(x), len(x)).triu(1).bool()
    return (q @ k.T / SIZE**0.5).masked_fill(later, -torch.inf).softmax(1) @ v


def heads_of(x: Tensor, qkv: Tensor, heads: int, key_heads: int) -> Tensor:
    """All heads side by side, each with the key head of its group, from a fused weight with its bias."""
    rows = [heads * SIZE, key_heads * SIZE, key_heads * SIZE]
    queries, keys, values = (part.split(SIZE) for part in qkv.split(rows))
    group = heads // key_heads
    each = [attended(x, queries[h], keys[h // group], values[h // group]) for h in range(heads)]
    return torch.cat(each, 1)


@pytest.mark.parametrize("saved", [1, 2, 8])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_grouped_attention_of_all_ranks_adds_up_to_the_whole(tmp_path, seed, saved, world):
    rows = sum(units * size for units, size in QKV)
    held = drawn(seed, qkv=(rows, WIDTH), qkv_bias=(rows,), out=(WIDTH, HEADS * SIZE), x=(5, WIDTH))
    x, out = held.pop("x"), held["out"]
    layers: dict[str, tuple[Parts, str, bool]] = {
        "qkv": (QKV, "column", False),
        "qkv_bias": (QKV, "column", False),
        "out": ([(HEADS, SIZE)], "row", False),
    }
    files = resaved(tmp_path, opened(tmp_path, held), layers, saved)
    total = torch.zeros(5, WIDTH, dtype=torch.float64)
    for rank in range(world):
        weight, bias, columns = (
            load_rank_slice(files, name, parts, parallel, rank, world)
            for name, (parts, parallel, _) in layers.items()
        )
        assert weight is not None and bias is not None and columns is not None
        with_bias = torch.cat([weight, bias[:, None]], 1)
        total += heads_of(x, with_bias, HEADS // world, max(KEY_HEADS // world, 1)) @ columns.T
    whole = heads_of(x, torch.cat([held["qkv"], held["qkv_bias"][:, None]], 1), HEADS, KEY_HEADS)
    # Heads are computed alike on both sides; what differs is the order in which HEADS * SIZE products are added, and
    # each order is off by at most that many roundings of the sum of their magnitudes.
    allowed = 2 * HEADS * SIZE * EPS * (whole.abs() @ out.abs().T)
    assert bool(((total - whole @ out.T).abs() <= allowed).all())


@pytest.mark.parametrize("saved", [1, 3, 8])
@pytest.mark.parametrize("world", [1, 4, 7])
def test_a_gated_layer_with_a_remainder_adds_up_to_the_whole(tmp_path, seed, saved, world):
    wide = 10
    held = drawn(seed, gate_up=(2 * wide, WIDTH), down=(WIDTH, wide), x=(3, WIDTH))
    x = held.pop("x")
    layers: dict[str, tuple[Parts, str, bool]] = {
        "gate_up": ([(wide, 1)] * 2, "column", True),
        "down": ([(wide, 1)], "row", True),
    }
    files = resaved(tmp_path, opened(tmp_path, held), layers, saved)
    total = torch.zeros(3, WIDTH, dtype=torch.float64)
    magnitude = torch.zeros(3, WIDTH, dtype=torch.float64)
    for rank in range(world):
        gate_up, down = (
            load_rank_slice(files, name, parts, parallel, rank, world, padded)
            for name, (parts, parallel, padded) in layers.items()
        )
        assert gate_up is not None and down is not None
        assert len(gate_up) == 2 * -(-wide // world) and down.shape[1] == -(-wide // world)
        gate, up = gate_up.chunk(2)
        total += (silu(x @ gate.T) * (x @ up.T)) @ down.T
        magnitude += ((x.abs() @ gate.abs().T) * (x.abs() @ up.abs().T)) @ down.abs().T
    gate, up = held["gate_up"].chunk(2)
    # Of a product of three: WIDTH roundings in gate and in up, some 4 in silu (whose slope is at most 1.1), `wide` in
    # the sum; on either side.
    allowed = 2 * (2 * 1.1 * WIDTH + 4 + wide + world) * EPS * magnitude
    assert bool(((total - (silu(x @ gate.T) * (x @ up.T)) @ held["down"].T).abs() <= allowed).all())


@pytest.mark.parametrize(("words", "world"), [(5, 4), (12, 4), (11, 5), (2, 4)])
def test_words_with_padding_give_the_logits_and_embeddings_of_the_whole(tmp_path, seed, words, world):
    held = integers(seed, table=(words, 6), x=(3, 6))
    files = opened(tmp_path, held)
    shards = [
        load_rank_slice(files, "table", [(words, 1)], "column", rank, world, padded=True)
        for rank in range(world)
    ]
    table = torch.cat([shard for shard in shards if shard is not None])
    room = -(-words // world)
    assert [len(shard) for shard in shards if shard is not None] == [room] * world
    assert torch.equal((held["x"] @ table.T)[:, :words], held["x"] @ held["table"].T)
    assert torch.equal(table[words:], torch.zeros(room * world - words, 6, dtype=torch.float64))
    for word in range(words):  # the owner of a word, by division
        owner = shards[word // room]
        assert owner is not None and torch.equal(owner[word % room], held["table"][word])


# --------------------------------------------------------------------------------------------------- other ranks

LAYERS: dict[str, tuple[Parts, str, bool]] = {
    "qkv": (QKV, "column", False),
    "out": ([(HEADS, SIZE)], "row", False),
    "out_bias": ([(HEADS, SIZE)], "row", False),
    "gate_up": ([(24, 1)] * 2, "column", False),
    "words": ([(17, 1)], "column", True),
    "down": ([(19, 1)], "row", True),
}


@pytest.mark.parametrize(
    ("saved", "world"), [(4, 8), (8, 4), (8, 1), (2, 8), (4, 4)], ids=lambda count: str(count)
)
def test_a_checkpoint_for_other_ranks_gives_what_the_whole_gives(tmp_path, seed, saved, world):
    held = drawn(
        seed,
        qkv=(48, WIDTH),
        out=(WIDTH, HEADS * SIZE),
        out_bias=(WIDTH,),
        gate_up=(48, WIDTH),
        words=(17, WIDTH),
        down=(WIDTH, 19),
    )
    whole = opened(tmp_path, {name: tensor.to(torch.bfloat16) for name, tensor in held.items()})
    files = resaved(tmp_path, whole, LAYERS, saved)
    for name, (parts, parallel, padded) in LAYERS.items():
        for rank in range(world):
            given = load_rank_slice(files, name, parts, parallel, rank, world, padded)
            wanted = load_rank_slice(whole, name, parts, parallel, rank, world, padded)
            if wanted is None:
                assert given is None
            else:
                assert given is not None and given.dtype == torch.bfloat16
                assert torch.equal(given, wanted), (name, rank)


@pytest.mark.parametrize(("units", "saved", "world"), [(6, 2, 3), (6, 3, 2), (12, 4, 6), (30, 6, 5)])
def test_runs_that_begin_in_one_file_and_end_in_another(tmp_path, units, saved, world):
    whole = torch.arange(2 * units * 3).reshape(2 * units, 3)
    files = opened(tmp_path, *({"weight": part.clone()} for part in whole.chunk(saved)))
    for rank, wanted in enumerate(whole.chunk(world)):
        given = load_rank_slice(files, "weight", [(units, 2)], "column", rank, world)
        assert given is not None and torch.equal(given, wanted)


def test_padding_in_the_files_is_not_loaded(tmp_path):
    files = opened(
        tmp_path, {"weight": torch.tensor([[1.0], [2.0]])}, {"weight": torch.tensor([[3.0], [99.0]])}
    )
    given = load_rank_slice(files, "weight", [(3, 1)], "column", 0, 1, padded=True)
    assert given is not None and given.tolist() == [[1.0], [2.0], [3.0]]
    last = load_rank_slice(files, "weight", [(3, 1)], "column", 3, 4, padded=True)
    assert last is not None and last.tolist() == [[0.0]]


@pytest.mark.parametrize("saved", [1, 4])
def test_fused_inputs_of_other_sizes_add_up_to_the_whole(tmp_path, seed, saved):
    held = integers(seed, weight=(5, 25), x=(3, 25))
    parts: Parts = [(3, 5), (5, 2)]
    layers: dict[str, tuple[Parts, str, bool]] = {"weight": (parts, "row", True)}
    files = resaved(tmp_path, opened(tmp_path, {"weight": held["weight"]}), layers, saved)
    first, second = held["x"].split([15, 10], 1)
    x = torch.cat([first, torch.zeros(3, 5), second, torch.zeros(3, 2)], 1)  # 4 units of 5, and 6 of 2
    total = torch.zeros(3, 5, dtype=torch.float64)
    for rank in range(2):
        weight = load_rank_slice(files, "weight", parts, "row", rank, 2, padded=True)
        assert weight is not None
        mine = torch.cat([x[:, :20].chunk(2, 1)[rank], x[:, 20:].chunk(2, 1)[rank]], 1)
        total += mine @ weight.T
    assert torch.equal(total, held["x"] @ held["weight"].T)


def test_a_file_for_as_many_ranks_gives_zeros_for_its_padding(tmp_path):
    files = opened(
        tmp_path, {"weight": torch.tensor([[1.0], [2.0]])}, {"weight": torch.tensor([[3.0], [99.0]])}
    )
    given = load_rank_slice(files, "weight", [(3, 1)], "column", 1, 2, padded=True)
    assert given is not None and given.tolist() == [[3.0], [0.0]]


@pytest.mark.parametrize(
    ("parts", "parallel", "world"),
    [
        ([(6, 2)], "column", 4),
        ([(3, 4)], "column", 4),
        ([(12, 2), (3, 2), (3, 2)], "column", 4),
        ([(6, 2)], "row", 4),
        ([(2, 6)], "row", 4),
    ],
)
def test_what_can_be_neither_dealt_nor_copied_is_refused(tmp_path, parts, parallel, world):
    rows = sum(units * size for units, size in parts)
    files = opened(tmp_path, {"weight": torch.zeros((rows, 3) if parallel == "column" else (3, rows))})
    with pytest.raises(
        ValueError, match=f"units can be neither dealt nor copied to {world} {parallel} ranks"
    ):
        load_rank_slice(files, "weight", parts, parallel, 1, world)


# ---------------------------------------------------------------------------------------- memory, bytes and pages


def test_safetensors_slices_keep_the_whole_tensor_and_ours_do_not(tmp_path):
    files = opened(tmp_path, {"weight": torch.ones(8, 6)})
    stored = files[0].get_slice("weight")
    assert stored[2:4].untyped_storage().nbytes() == stored[:, 2:4].untyped_storage().nbytes() == 8 * 6 * 4
    for parallel in ("column", "row"):
        given = load_rank_slice(files, "weight", [(2, 1)] if parallel == "row" else [(4, 2)], parallel, 1, 2)
        assert given is not None and given.untyped_storage().nbytes() == given.nbytes


@pytest.mark.parametrize("world", [2, 4, 8])
def test_half_of_all_pages_hold_some_of_a_rank_s_columns(tmp_path, world):
    """Rows of 8 KiB: each value is the number of the 4 KiB page it would lie in as bfloat16."""
    page = torch.arange(64 * 4096).reshape(64, 4096) * 2 // 4096
    files = opened(tmp_path, {"weight": page})
    pages = int(page.max()) + 1
    for rank in range(world):
        columns = load_rank_slice(files, "weight", [(32, 128)], "row", rank, world)
        rows = load_rank_slice(files, "weight", [(64, 1)], "column", rank, world)
        assert columns is not None and columns.numel() * world == page.numel()
        assert rows is not None and len(rows.unique()) * world == pages
        assert len(columns.unique()) * 2 == pages


def counted(load: Load) -> dict[str, float | None]:
    checkpoint = Checkpoint(Rng(0), load)
    lesson.loaded(load_rank_slice, checkpoint)
    return {name: count for name, (count, _) in checkpoint.counts().items()}


def test_requests_of_a_rank_are_those_computed_by_hand():
    fused = Layer("qkv", torch.zeros(48, 8), QKV, "column")
    # Rank 5 of 8: one query head, one key head, one value head of 4 rows of 32 bytes.
    expected = {"bytes requested": 3 * 4 * 32, "requests": 3, "stretches of neighbouring bytes": 3}
    assert counted(Load(fused, 1, 8, [5])) == expected
    assert counted(Load(fused, 4, 8, [5])) == expected
    # Rank 1 of 2 from 4 files: the queries of two of them, and of its key head the first copy only.
    assert counted(Load(fused, 4, 2, [1])) == {
        "bytes requested": (4 + 1 + 1) * 4 * 32,
        "requests": 4,
        "stretches of neighbouring bytes": 4,
    }
    columns = Layer("out", torch.zeros(10, 32), [(HEADS, SIZE)], "row")
    assert counted(Load(columns, 1, 4, [2])) == {
        "bytes requested": 10 * 8 * 4,
        "requests": 1,
        "stretches of neighbouring bytes": 10,
    }


def test_padding_and_a_bias_of_another_rank_are_not_asked_for():
    words = Layer("words", torch.zeros(5, 8), [(5, 1)], "column", padded=True)
    assert counted(Load(words, 1, 4, [3]))["bytes requested"] == 0
    assert counted(Load(words, 2, 4, [2]))["bytes requested"] == 1 * 32
    bias = Layer("bias", torch.zeros(8), [(4, 1)], "row")
    assert counted(Load(bias, 2, 4, [1, 2, 3]))["bytes requested"] == 0
    assert counted(Load(bias, 2, 4, [0]))["bytes requested"] == 32


# ------------------------------------------------------------------------------------- what the cases stand on


def test_rows_of_a_rank_computed_by_hand():
    parts = [(4, 2), (2, 2)]
    assert lesson.places(parts, 1, 2, False) == [4, 5, 6, 7, 10, 11]
    assert lesson.places(parts, 2, 4, False) == [4, 5, 10, 11]
    assert lesson.places([(5, 1), (3, 1)], 1, 3, True) == [2, 3, 6]
    assert lesson.places([(5, 1), (3, 1)], 2, 3, True) == [4, -1, 7]


def test_files_of_the_cases_are_what_the_reference_gives_but_for_their_padding(seed):
    rng = Rng(seed)
    for make in (
        lesson.heads_for_other_ranks,
        lesson.columns_for_other_ranks,
        lesson.remainders_for_other_ranks,
    ):
        for load in make(rng).loads:
            parts, length = load["parts"], sum(units * size for units, size in load["parts"])
            if len(load["shapes"][0]) == 1 and load["parallel"] == "row":
                continue
            whole = rng.normal(length, 3) if load["parallel"] == "column" else rng.normal(3, length)
            one = Layer("weight", whole, parts, load["parallel"], load["padded"])
            file = lesson.File(
                "weight",
                list(whole.shape),
                whole.dtype,
                lambda begins, ends, whole=whole: whole[
                    tuple(slice(b, e) for b, e in zip(begins, ends, strict=True))
                ],
            )
            for rank in range(load["world"]):
                ours = load_rank_slice(
                    [file], "weight", parts, load["parallel"], rank, load["world"], load["padded"]
                )
                saved = lesson.saved_for(one, rank, load["world"], rng)
                assert ours is not None and saved is not None and ours.shape == saved.shape
                differs = ours != saved
                assert bool((ours[differs] == 0).all()) and (load["padded"] or not bool(differs.any()))


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 3), slice(None), slice(0, 0), slice(2, 99), slice(-2, None), (slice(1, 3),),
        (slice(None), slice(1, 2)), (slice(1, 3), slice(0, 2)), (slice(None), slice(2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_the_stand_in_gives_what_safetensors_gives(tmp_path, index):
    stored = torch.arange(12.0).reshape(4, 3).to(torch.bfloat16)
    handle = opened(tmp_path, {"weight": stored})[0]

    def read(begins: list[int], ends: list[int]) -> Tensor:
        return stored[tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))].clone()

    ours, theirs = lesson.File("weight", [4, 3], torch.bfloat16, read), handle
    assert ours.keys() == list(theirs.keys())
    assert ours.get_slice("weight").get_shape() == theirs.get_slice("weight").get_shape()
    given, wanted = ours.get_slice("weight")[index], theirs.get_slice("weight")[index]
    assert torch.equal(given, wanted) and given.dtype == wanted.dtype and given.stride() == wanted.stride()
    assert given.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
    assert torch.equal(ours.get_tensor("weight"), theirs.get_tensor("weight"))


def test_the_stand_in_refuses_what_is_not_a_slice_of_step_one():
    stored = lesson.File("weight", [4, 3], torch.float32, lambda begins, ends: torch.zeros(1)).get_slice(
        "weight"
    )
    for index in (1, [0, 1], (slice(None), 1), (slice(None),) * 3):
        with pytest.raises(TypeError, match="expected a slice for each of at most 2 axes"):
            stored[index]
    with pytest.raises(ValueError, match="expected slices of step 1"):
        stored[::2]


def test_a_file_without_the_tensor_says_so(seed):
    bias = Layer("bias", torch.zeros(8), [(4, 1)], "row")
    checkpoint = Checkpoint(Rng(seed), Load(bias, 2, 4))
    with pytest.raises(KeyError, match="file 1 has no such tensor"):
        checkpoint.read(0, 1, [0], [1])
    with pytest.raises(KeyError, match="bias"):
        lesson.File("bias", None, torch.float32, None).get_slice("bias")


@pytest.mark.parametrize(
    "make",
    [
        lesson.whole_layers, lesson.fused_layers, lesson.remainders, lesson.heads_for_other_ranks,
        lesson.columns_for_other_ranks, lesson.remainders_for_other_ranks, lesson.some_rows, lesson.some_columns,
    ],
)  # fmt: skip
def test_no_case_can_be_had_without_looking_at_all_parts_and_sizes(make, seed):
    loads = make(Rng(seed)).loads
    kinds = {(load["parallel"], load["padded"]) for load in loads if len(load["shapes"][0]) == 2}
    for parallel, padded in kinds:
        several = [
            load["parts"]
            for load in loads
            if (load["parallel"], load["padded"], len(load["parts"]) > 1) == (parallel, padded, True)
        ]
        if (make, parallel) != (lesson.whole_layers, "column"):
            assert several, (parallel, padded)
    everything = [part for load in loads for part in load["parts"]]
    assert any(size > 1 for _, size in everything)
    if make is not lesson.some_rows:
        assert any(len({size for _, size in load["parts"]}) > 1 for load in loads)


def test_an_answer_is_not_told_which_loads_are_to_be_refused(seed):
    checkpoint = lesson.not_to_be_cut(Rng(seed))
    shapes = {tuple(sorted(load)) for load in checkpoint.loads}
    assert len(shapes) == 1 and not any("refused" in name for name in shapes.pop())
    seen = checkpoint.observed(lesson.tried(lambda *arguments: torch.zeros(1), checkpoint))
    assert [found[0] for found in seen.values()] == ["nothing"] * 10
    assert [len(found) for found in seen.values()] == [2] * 4 + [1] * 6  # no value of what is to be refused
    right = checkpoint.observed(lesson.tried(load_rank_slice, checkpoint))
    assert [found[0] for found in right.values()] == ["nothing"] * 4 + ["ValueError"] * 6
