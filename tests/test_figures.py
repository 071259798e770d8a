from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llmcourse import figures, machine
from llmcourse.figures import Point, Tile, layer_loads, loading_stages
from llmcourse.machine import Device, Machine

CPU = Device(
    "cpu", "Example 9000", 16 * machine.GIB, 20e9, {"float32": 200e9, "bfloat16": 400e9, "int8": 8e11}
)
GPU = Device("cuda:0", "Example GPU", 80 * machine.GIB, 2e12, {"float16": 600e12, "bfloat16": 610e12}, 8e9)
EXAMPLE = Machine("Linux x86_64", "2.13.0", 4, 12e9, (CPU, GPU))
STAGES = loading_stages(
    141.1e9, ranks=8, disk_bytes_per_s=7e9, network_bits_per_s=100e9, to_device_bytes_per_s=25e9
)

PICTURES: dict[str, tuple[Callable[[], Any], str, str]] = {
    # name: (what draws it, its title, what its text alternative must tell)
    "roofline": (
        lambda: figures.roofline(
            EXAMPLE, points=[Point("decode", 0.5, 5e9), Point("prompt", 100), Point("batch", 90)]
        ),
        "Under 10.0 FLOPs a byte, float32 work waits for memory",
        "decode: 5.00 GFLOP/s, 50% of the roof at 0.50 FLOPs a byte. prompt: at most 200 GFLOP/s",
    ),
    "roofline of an accelerator": (
        lambda: figures.roofline(EXAMPLE, device="cuda:0"),
        "Under 300 FLOPs a byte, float16 work waits for memory",
        "memory 2.00 TB/s; float16 600 TFLOP/s",
    ),
    "lru": (
        lambda: figures.lru_hits(),
        "An LRU cache never hits until all 32 layers fit",
        "with 16 pinning reads 17.3 and the optimum 16.7; with all 32 every policy reads 0.64",
    ),
    "lru, marked": (
        lambda: figures.lru_hits(n=32, k=31),
        "31 of 32 fit: LRU reads 32.0 a token, pinned 2.6, optimal 1.6",
        "LRU stays at 32",
    ),
    "lru of one layer": (
        lambda: figures.lru_hits(n=1, tokens=1, k=1),
        "1 of 1 fit: LRU reads 1.0 a token, pinned 1.0, optimal 1.0",
        "every policy reads 1.00",
    ),
    "break-even of sparse formats": (
        lambda: figures.sparse_break_even(),
        "CSR saves nothing before 67 % of float16 weights are zero",
        "float32: bitmask 96.9 %, CSR 50 %; float16: bitmask 93.8 %, CSR 33.3 %; int8: bitmask 87.5 %, CSR 20 %",
    ),
    "bars": (
        lambda: figures.bars({"slow": [0.5, 0.52, 0.6], "fast": [0.1, 0.104, 0.2]}, highlight="fast"),
        "fast is 5.0 times faster than slow",
        "fast 104 ms (102 ms to 152 ms)",
    ),
    "one bar of one run": (
        lambda: figures.bars({"only": [2e-5]}, device="another machine"),
        "only takes 20.0 µs",
        "Measured on another machine.",
    ),
    "layer sizes": (
        lambda: figures.layer_sizes(
            {"model.layers.0.mlp.up_proj.weight": 6 * 10**9, "lm_head.weight": 4 * 10**9, "norm.weight": 8192}
        ),
        "MLP holds 60% of the 10.0 GB",
        "output head 4.00 GB (40.0%); norms 8.19 kB (under 0.1%)",
    ),
    "memory over time": (
        lambda: figures.memory_over_time(
            {"copied": [(0, 0), (1, 2e9), (2, 1e9)], "mapped": [(0, 0), (1, 1e7)]}, limit_bytes=1.1e9
        ),
        "copied needs 200 times the memory of mapped",
        "Peaks: copied 2.00 GB; mapped 10.0 MB",
    ),
    "many lines of memory": (
        lambda: figures.memory_over_time({name: [(0.0, 5e6)] for name in "abcd"}),
        "Memory peaks at 5.00 MB",
        "d 5.00 MB",
    ),
    "progress": (
        lambda: figures.progress(
            {
                "01_parameter_loading": [
                    Tile("load_without_double_memory", True, 3, 450.0, True),
                    Tile("load_parallel", attempts=1),
                    *[Tile(f"exercise_{number}") for number in range(4)],
                    Tile("question", attempts=2, rating="7 of 10", due=True),
                ],
                "02_inference": [Tile("decode", solved=True, attempts=12)],
            }
        ),
        "2 of 7 exercises solved; 2 revisits are due",
        "load_without_double_memory (solved, 3 tries, 7:30, revisit due), load_parallel (not solved, 1 try), "
        "exercise_0 (not tried)",
    ),
    "progress before anything was tried": (
        lambda: figures.progress({"01_parameter_loading": [Tile("read_header")]}),
        "None of 1 exercises solved yet",
        "read_header (not tried)",
    ),
    "load time": (
        lambda: figures.load_time(STAGES, what="Loading 141 GB"),
        "Loading 141 GB takes at least 20.2 s, set by the disk",
        "network 11.3 s, 141 GB at 12.5 GB/s; copy to device 706 ms, 17.6 GB at 25.0 GB/s. "
        "One after another: 32.2 s",
    ),
}


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.delenv("LLMCOURSE_GRADING", raising=False)


@pytest.mark.parametrize(("draw", "title", "told"), PICTURES.values(), ids=PICTURES.keys())
def test_a_picture_has_its_finding_as_title_and_tells_its_content_as_text(
    draw: Callable[[], Any], title: str, told: str
) -> None:
    figure = draw()
    assert figure.get_suptitle().replace("\n", " ") == title
    assert figure.alt_text.startswith(title + ". ")
    assert told in figure.alt_text
    (axes,) = figure.axes
    assert axes.get_xlabel()


@pytest.mark.parametrize(("draw", "title", "told"), PICTURES.values(), ids=PICTURES.keys())
def test_nothing_in_a_picture_runs_off_its_edge(draw: Callable[[], Any], title: str, told: str) -> None:
    figure = draw()
    figure.draw_without_rendering()
    inside = figure.bbox
    (axes,) = figure.axes
    for text in [figure._suptitle, figure._supxlabel, axes.xaxis.label, axes.yaxis.label, *axes.texts]:
        if text is not None and text.get_text():
            box = text.get_window_extent()
            assert box.x0 >= inside.x0 and box.x1 <= inside.x1, text.get_text()
            assert box.y0 >= inside.y0 and box.y1 <= inside.y1, text.get_text()


def test_what_was_measured_names_the_machine_and_what_was_computed_does_not() -> None:
    def footnote(figure: Any) -> str:
        return figure.get_supxlabel()

    assert footnote(figures.bars({"a": [1.0]})) == f"Measured on {machine.describe()}"
    assert footnote(figures.memory_over_time({"a": [(0, 1)]})) == f"Measured on {machine.describe()}"
    assert footnote(figures.roofline(EXAMPLE)) == f"Measured on {EXAMPLE.describe()}"
    assert footnote(figures.lru_hits(n=4)) == ""
    assert footnote(figures.load_time(STAGES)) == ""


def test_labels_of_points_side_by_side_do_not_cover_each_other() -> None:
    figure = figures.roofline(EXAMPLE, points=[Point(f"point {i}", 50 + i) for i in range(4)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("point")]
    assert len(boxes) == 4
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_saved_picture_carries_its_text() -> None:
    from PIL import Image

    figure = figures.lru_hits(n=4)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert Image.open(file).text == {"Description": figure.alt_text}
    assert len(file.getvalue()) < 2**20


def test_a_notebook_gets_one_picture_with_its_text_and_no_object_address() -> None:
    figure = figures.lru_hits(n=4)
    data, metadata = figure._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"}
    assert data["text/plain"] == metadata["image/png"]["alt"] == figure.alt_text
    assert (metadata["image/png"]["width"], metadata["image/png"]["height"]) == (672, 384)


def test_the_same_picture_is_the_same_bytes() -> None:
    first, second = (figures.lru_hits(n=4)._repr_mimebundle_()[0]["image/png"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("name", "value", "inert"),
    [
        ("NBGRADER_EXECUTION", "autograde", True),
        ("NBGRADER_EXECUTION", "", False),
        ("LLMCOURSE_GRADING", "1", True),
        ("LLMCOURSE_GRADING", "0", False),
    ],
)
def test_pictures_are_inert_while_grading(
    name: str, value: str, inert: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert figures.inert() is inert
    for draw, _, _ in PICTURES.values():
        assert (draw() is None) is inert


def test_inert_pictures_import_no_matplotlib_and_drawn_ones_no_pyplot() -> None:
    program = """
import os, sys
from llmcourse import figures
os.environ["LLMCOURSE_GRADING"] = "1"
figures.lru_hits()
print("matplotlib" in sys.modules)
del os.environ["LLMCOURSE_GRADING"]
figures.lru_hits(n=4)
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "False"]


def test_drawing_leaves_the_users_style_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.lru_hits(n=4)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("policy", "loads"), [("lru", 1600), ("pinned", 865), ("optimal", 835)], ids=["lru", "pinned", "optimal"]
)
def test_loads_on_the_cyclic_trace_are_the_known_ones(policy: figures.Policy, loads: int) -> None:
    assert layer_loads(n=32, k=16, tokens=50, policy=policy) == loads


def test_pinning_loads_as_the_formula_says() -> None:
    for n, k, tokens in [(32, 1, 3), (7, 4, 5), (8, 7, 9)]:
        assert layer_loads(n=n, k=k, tokens=tokens, policy="pinned") == (k - 1) + tokens * (n - k + 1)


def _fewest_loads(n: int, k: int, tokens: int) -> int:
    """By trying every eviction: the states reachable after each visit, with the fewest loads to each."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for step in range(n * tokens):
        layer, after = step % n, {}
        for kept, loads in states.items():
            if layer in kept:
                options = [(kept, loads)]
            elif len(kept) < k:
                options = [(kept | {layer}, loads + 1)]
            else:
                options = [(kept - {evicted} | {layer}, loads + 1) for evicted in kept]
            for option, total in options:
                after[option] = min(total, after.get(option, total))
        states = after
    return min(states.values())


@pytest.mark.parametrize(("n", "k"), [(3, 2), (5, 2), (5, 3), (6, 4), (4, 4), (4, 1)])
def test_the_optimum_is_what_trying_every_eviction_finds(n: int, k: int) -> None:
    assert layer_loads(n=n, k=k, tokens=4, policy="optimal") == _fewest_loads(n, k, 4)


@pytest.mark.parametrize("policy", figures.POLICIES)
def test_with_room_for_all_each_layer_is_read_once(policy: figures.Policy) -> None:
    assert layer_loads(n=5, k=5, tokens=7, policy=policy) == 5


def test_impossible_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="k is a number of layers from 1 to 4, not 5"):
        layer_loads(n=4, k=5, tokens=1, policy="lru")
    with pytest.raises(ValueError, match="not 0"):
        layer_loads(n=4, k=0, tokens=1, policy="lru")
    with pytest.raises(ValueError, match="tokens is at least 1"):
        layer_loads(n=4, k=2, tokens=0, policy="lru")
    with pytest.raises(ValueError, match="lru, pinned or optimal, not 'fifo'"):
        layer_loads(n=4, k=2, tokens=2, policy="fifo")  # type: ignore[arg-type]


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one time"):
        figures.bars({"a": [1.0], "b": []})
    with pytest.raises(ValueError, match="at least one sample"):
        figures.memory_over_time({})
    with pytest.raises(ValueError, match="at least one byte"):
        figures.layer_sizes({})
    with pytest.raises(ValueError, match="ranks is at least 1"):
        loading_stages(1, ranks=0, disk_bytes_per_s=1, to_device_bytes_per_s=1)


def test_loading_70_billion_parameters_takes_as_long_as_on_paper() -> None:
    disk, network, copy = STAGES
    # 141.1 GB over 7 GB/s; over 100 Gbit/s = 12.5 GB/s; an eighth of it over 25 GB/s
    assert disk.seconds == pytest.approx(20.157, abs=5e-4)
    assert network.seconds == pytest.approx(11.288)
    assert copy.seconds == pytest.approx(0.7055)
    disk, copy = loading_stages(
        141.1e9, ranks=8, disk_bytes_per_s=7e9, to_device_bytes_per_s=25e9, each_reads_everything=True
    )
    assert disk.seconds == pytest.approx(161.257, abs=5e-4)
    assert copy.seconds == pytest.approx(0.7055)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 B"),
        (999.4, "999 B"),
        (999.6, "1.00 kB"),
        (141.1e9, "141 GB"),
        (9.996e9, "10.0 GB"),
        (99.96e6, "100 MB"),
        (2**40, "1.10 TB"),
    ],
)
def test_sizes_are_written_with_three_digits_and_a_decimal_prefix(value: float, text: str) -> None:
    assert figures._scaled(value, "B") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (161.257, "161 s"),
        (1.0, "1.00 s"),
        (0.9999, "1.00 s"),
        (0.0123, "12.3 ms"),
        (2e-6, "2.00 µs"),
        (0, "0.00 s"),
    ],
)
def test_times_are_written_in_the_unit_that_fits(value: float, text: str) -> None:
    assert figures._seconds(value) == text


def test_tensors_are_counted_by_the_part_they_belong_to() -> None:
    sizes = {
        "model.embed_tokens.weight": 1,
        "model.layers.0.self_attn.q_norm.weight": 2,
        "model.layers.0.input_layernorm.weight": 4,
        "model.layers.0.mlp.gate_proj.weight": 8,
        "model.norm.weight": 16,
        "lm_head.weight": 32,
        "rotary": 64,
    }
    assert figures.checkpoint_parts(sizes) == {
        "rotary": 64,
        "output head": 32,
        "norms": 20,
        "MLP": 8,
        "attention": 2,
        "token embedding": 1,
    }


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_sparse_sizes_are_those_of_the_bytes_stored(bits: int) -> None:
    """Counted on a matrix whose values, mask bits and columns are laid out in full."""
    rows, columns, kept = 64, 128, 16
    values, dense = rows * kept * bits, rows * columns * bits
    stored = {
        "bitmask": values + rows * columns,
        "CSR": values + rows * kept * 32,
        "2:4": rows * columns // 2 * (bits + 2),
    }
    sizes = figures.sparse_sizes(kept / columns, bits)
    assert sizes == pytest.approx({name: stored[name] / dense for name in stored})


def test_a_density_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="density is a share between 0 and 1, not 1.5"):
        figures.sparse_sizes(1.5, 16)
