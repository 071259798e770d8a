"""Measures what the course promises and writes BENCHMARKS.md: `make bench`.

Times are compared only within a run: contenders take turns in random order, each ratio is the median of paired ratios
with a bootstrap interval. Absolute times are leads for the machine that the table names.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
COLD_ROUNDS = 5
ROUNDS = 31
RESAMPLES = 2_000
CHECKPOINT_BYTES = 500 << 20
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Row:
    """One line of the table: what was promised, what was measured, whether it holds (None: nothing was promised)."""

    what: str
    measured: str
    promised: str
    holds: bool | None


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of the paired ratios; low and high are a 95 % bootstrap interval of that median.

    >>> paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    (2.0, 2.0, 2.0)
    """
    ratios = [n / d for n, d in zip(numerators, denominators, strict=True)]
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


# ------------------------------------------------------------------------------------------------------- loading


# SmolLM2-135M's config.json (Allal et al. 2025), a public model; stored in float32 it has 538 MB in 272 tensors.
LOADED: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def write_checkpoint(folder: Path) -> int:
    """A sharded checkpoint of a public shape with random weights, and the same for torch.load; its bytes."""
    import torch

    from llmcourse.model import Decoder, ModelConfig, save_checkpoint

    torch.manual_seed(0)
    model = Decoder(ModelConfig(**LOADED))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size >= CHECKPOINT_BYTES, (
        f"the benchmark's checkpoint has {size} bytes; expected {CHECKPOINT_BYTES}"
    )
    save_checkpoint(model, folder, max_shard_bytes=160 << 20)
    torch.save(dict(model.named_parameters()), folder / "model.pt")
    return size


def loaders(folder: Path) -> dict[str, Callable[[], Any]]:
    """Each way to load the checkpoint: what it returns has the weights, touched by nobody yet."""
    import torch
    from safetensors.torch import load_file

    from llmcourse.model import Decoder, ModelConfig, load_checkpoint

    def copied() -> Any:
        model = load_checkpoint(folder)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def shards() -> dict[str, Any]:
        return {
            name: part
            for path in sorted(folder.glob("*.safetensors"))
            for name, part in load_file(path).items()
        }

    def assigned() -> Any:
        with torch.device("meta"):
            model = Decoder(ModelConfig.from_folder(folder))
        model.load_state_dict(shards(), assign=True, strict=False)
        model.tie_weights()
        model.model.rotary_emb.reset_buffers()
        return model

    ways: dict[str, Callable[[], Any]] = {
        "llmcourse load_checkpoint": lambda: load_checkpoint(folder),
        "llmcourse, copied": copied,
        "safetensors load_file, assigned to the same model": assigned,
        "safetensors load_file, a dict and no model": shards,
        "torch.load": lambda: torch.load(folder / "model.pt"),
        "torch.load(mmap=True)": lambda: torch.load(folder / "model.pt", mmap=True),
    }
    try:
        from transformers import LlamaForCausalLM, logging
    except ImportError:
        return ways
    logging.disable_progress_bar()
    ways["transformers from_pretrained"] = lambda: LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    return ways


def touch(loaded: Any) -> float:
    """Read every weight once; the sum keeps the reading from being dropped."""
    tensors = loaded.values() if isinstance(loaded, dict) else loaded.parameters()
    return sum(float(tensor.detach().sum()) for tensor in tensors)


def time_loaders(folder: Path, rounds: int, *, cold: bool = False) -> dict[str, list[float]]:
    """Seconds of load plus touch, per way, in rounds of random order, one thread.

    cold: with the files dropped from the page cache before each load; nothing where the system does not allow that.
    """
    import torch

    from llmcourse.machine import drop_from_page_cache

    torch.set_num_threads(1)
    ways = loaders(folder)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in random.sample(list(ways), k=len(ways)):
            if cold and not all(drop_from_page_cache(path) for path in folder.iterdir()):
                return {}
            began = time.perf_counter()
            loaded = ways[name]()
            touch(loaded)
            taken = time.perf_counter() - began
            del loaded
            gc.collect()
            if number:  # the first round warms caches and imports
                seconds[name].append(taken)
    return seconds


def peak_of(folder: Path, name: str) -> int:
    """Peak anonymous bytes of loading and touching one way, in this process."""
    from llmcourse.counting import PeakMemory, settle

    way = loaders(folder)[name]
    settle()
    memory = PeakMemory()
    memory.start()
    loaded = way()
    touch(loaded)
    memory.stop()
    peak = memory.counts()["peak anonymous bytes"][0]
    return -1 if peak is None else int(peak)


def loading_rows(rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = write_checkpoint(folder)
        gc.collect()
        seconds = time_loaders(folder, rounds)
        ours = seconds["llmcourse load_checkpoint"]
        bars = {
            "transformers from_pretrained": 1.5,
            "safetensors load_file, assigned to the same model": 0.95,
        }
        for name, taken in seconds.items():
            middle, low, high = paired_ratio(taken, ours)
            bar = bars.get(name)
            yield Row(
                f"load and touch {size / 1e6:.0f} MB: {name}",
                f"{median(taken) * 1e3:.0f} ms, {middle:.2f}× ours [{low:.2f}, {high:.2f}]",
                f"lower bound ≥ {bar}" if bar else "",
                low >= bar if bar else None,
            )
        yield from cold_rows(folder, size)
        for name, bound in (("llmcourse load_checkpoint", 0.05), ("llmcourse, copied", 1.05)):
            peak = int(_fresh(["--peak", name, "--folder", place]))
            measured = f"{peak / size:.3f} × the file" if peak >= 0 else "not measured on this system"
            holds = None if peak < 0 else peak <= bound * size
            yield Row(f"peak anonymous memory: {name}", measured, f"≤ {bound} × the file", holds)


def cold_rows(folder: Path, size: int) -> Iterator[Row]:
    """The same loads from the disk, and what `plan_load` says of it."""
    gc.collect()
    cold = time_loaders(folder, COLD_ROUNDS, cold=True)
    ours = cold.get("llmcourse load_checkpoint", [])
    for name, taken in cold.items():
        middle, low, high = paired_ratio(taken, ours)
        measured = f"{median(taken) * 1e3:.0f} ms, {middle:.2f}× ours [{low:.2f}, {high:.2f}]"
        yield Row(f"cold: load and touch {size / 1e6:.0f} MB: {name}", measured, "", None)
    yield from planned_rows(folder, size)


def planned_rows(folder: Path, size: int) -> Iterator[Row]:
    """What `plan_load` predicts from probed rates beside plain reads: of the shards from the disk, of warm weights."""
    import torch
    from safetensors.torch import load_file

    from llmcourse.exercise import find
    from llmcourse.machine import disk_read_bytes_per_s, drop_from_page_cache

    shards = sorted(folder.glob("*.safetensors"))

    def planned_s(bytes_per_s: float) -> float:
        rates = {
            "disk_gb_per_s": bytes_per_s / 1e9,
            "network_gbit_per_s": math.inf,
            "device_gb_per_s": math.inf,
        }
        return float(find("plan_load").reference(size // 2, 1, "slices", overlap=True, **rates)[0])

    def read_s() -> float:
        target, began = bytearray(8 << 20), time.perf_counter()
        for shard in shards:
            with open(shard, "rb", buffering=0) as file:
                while file.readinto(target):
                    pass
        return time.perf_counter() - began

    rates, cold = [], []
    for _ in range(COLD_ROUNDS):
        rate = disk_read_bytes_per_s(folder)
        if rate is None or not all(drop_from_page_cache(shard) for shard in shards):
            break
        rates.append(rate)
        cold.append(read_s())
    if rates:
        yield _planned("disk", [planned_s(rate) for rate in rates], cold)
    # Reading mapped pages that are warm: the rate of every other tensor plans them all. (One shard would not do: that
    # of the embedding is read faster than those of small tensors.) The first round enters the pages into the table.
    every = [tensor for shard in shards for tensor in load_file(shard).values()]
    torch.set_num_threads(1)

    def sum_s(tensors: Sequence[torch.Tensor]) -> float:
        began = time.perf_counter()
        for tensor in tensors:
            tensor.sum()
        return time.perf_counter() - began

    sample = every[::2]
    sample_bytes = sum(tensor.nbytes for tensor in sample)
    warm = [(sample_bytes / sum_s(sample), sum_s(every)) for _ in range(ROUNDS)][1:]
    yield _planned(
        "memory, one thread, from the rate of every other tensor",
        [planned_s(rate) for rate, _ in warm],
        [taken for _, taken in warm],
    )


def _planned(what: str, planned: Sequence[float], taken: Sequence[float]) -> Row:
    texts = [f"{1e3 * min(found):.0f} to {1e3 * max(found):.0f} ms" for found in (planned, taken)]
    within = min(taken) <= max(planned) and min(planned) <= max(taken)
    return Row(
        f"plan_load for the {what}",
        f"planned {texts[0]}, measured {texts[1]}",
        "spreads overlap",
        within,
    )


def _fresh(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "llmcourse.benchmarks", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout


# -------------------------------------------------------------------------------------------- starting and judging


def start_seconds(codes: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of fresh Python processes, in rounds of random order."""
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for number in range(rounds + 1):
        for name in random.sample(list(codes), k=len(codes)):
            began = time.perf_counter()
            subprocess.run([sys.executable, *codes[name]], check=True, capture_output=True, cwd=REPOSITORY)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def starting_rows(rounds: int) -> Iterator[Row]:
    notebook = next((REPOSITORY / "solutions").glob("01_*/01_parameter_loading.ipynb"), None)
    codes = {
        "torch": ["-c", "import torch"],
        "llmcourse": ["-c", "import torch, llmcourse"],
        "check": ["-c", "import torch; from llmcourse import check"],
        "help": ["-m", "llmcourse.cli", "--help"],
        "interview": ["-m", "llmcourse.cli", "interview", "01", "--new", "--json"],
    }
    if notebook is not None:
        codes["judge"] = ["-m", "llmcourse.cli", "check", str(notebook), "--json"]
    with tempfile.TemporaryDirectory() as workspace:
        os.environ["LLMCOURSE_WORKSPACE"] = workspace
        try:
            seconds = start_seconds(codes, rounds)
        finally:
            del os.environ["LLMCOURSE_WORKSPACE"]

    def beyond(name: str) -> float:
        return median(a - b for a, b in zip(seconds[name], seconds["torch"], strict=True))

    yield Row("import torch", f"{median(seconds['torch']):.2f} s", "", None)
    extra = beyond("llmcourse")
    yield Row("import llmcourse, beyond torch", f"{extra:.2f} s", "≤ 0.3 s", extra <= 0.3)
    yield Row("from llmcourse import check, beyond torch", f"{beyond('check'):.2f} s", "", None)
    taken = median(seconds["help"])
    yield Row("llmcourse --help", f"{taken:.2f} s", "≤ 0.5 s", taken <= 0.5)
    ready = median(seconds["interview"])
    yield Row("llmcourse interview 01, until its notebook is written", f"{ready:.2f} s", "≤ 5 s", ready <= 5)
    if notebook is not None:
        inside = items_seconds("parameter_loading")
        extra = beyond("judge") - inside
        measured = f"{extra:.2f} s (whole command {median(seconds['judge']):.2f} s, items {inside:.2f} s)"
        yield Row("llmcourse check of lesson 01, beyond items and torch", measured, "≤ 0.5 s", extra <= 0.5)


def items_seconds(topic: str) -> float:
    """Seconds that a right answer's items take, once as the learner's and once as the reference's."""
    from llmcourse.auditing import exercises_of
    from llmcourse.engine import Engine

    with Engine() as engine:
        return 2 * sum(
            outcome.seconds
            for exercise in exercises_of([topic])
            for outcome in engine.expected(exercise, 1).values()
        )


def check_seconds() -> list[float]:
    """Seconds of `check` in a notebook's process: every alternative and every mistake of every exercise, once."""
    from llmcourse.auditing import exercises_of
    from llmcourse.judging import InProcess, expectations, judge

    runner, seconds = InProcess(), []
    for exercise in exercises_of([]):
        for seed, name in enumerate([*exercise.alternatives, *exercise.mistakes]):
            began = time.perf_counter()
            judge(runner, exercise, runner.ours(exercise, name), seed, expectations(runner, exercise, seed))
            seconds.append(time.perf_counter() - began)
    return seconds


def checking_rows() -> Iterator[Row]:
    seconds = check_seconds()
    p95 = quantiles(seconds, n=20)[-1]
    measured = (
        f"p50 {median(seconds):.2f} s, p95 {p95:.2f} s, most {max(seconds):.2f} s of {len(seconds)} "
        "(every alternative and every mistake)"
    )
    yield Row("check of an exercise in a notebook", measured, "p95 ≤ 1 s", p95 <= 1.0)


def lesson_rows() -> Iterator[Row]:
    """Seconds to execute each lesson, all cells, in a fresh kernel."""
    import nbclient
    import nbformat

    for path in sorted((REPOSITORY / "solutions").glob("*/*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
            taken = time.perf_counter() - began
        yield Row(f"execute {path.stem}", f"{taken:.0f} s", "≤ 120 s", taken <= 120)


# --------------------------------------------------------------------------------------------------- quantization


def decode_rows() -> Iterator[Row]:
    """One token through a 4096 x 4096 layer at one thread: every stored form, in one interleaved run."""
    from llmcourse import kernels

    timings = kernels.decode_table(4096, entries=kernels.contenders(compiled=True), rounds=31, seconds=120)
    compiled = next(
        (row.speedup for row in timings if "torchao" in row.name and "compiled" in row.name), None
    )
    bars = {"int8 weights, bfloat16 activations": 2.0, "int4 weights, bfloat16 activations": 3.0}
    for row in timings:
        bar = bars.get(row.name)
        measured = (
            f"{1e3 * row.median_s:.2f} ms, {row.speedup:.2f}× float32 [{row.low:.2f}, {row.high:.2f}], "
            f"{row.bandwidth_share:.2f} of the bandwidth"
        )
        yield Row(
            f"decode 4096×4096: {row.name}",
            measured,
            f"≥ {bar}×" if bar else "",
            row.speedup >= bar if bar else None,
        )
    if compiled is not None:
        ours = max(row.speedup for row in timings if row.name in bars)
        int8 = next(row.speedup for row in timings if row.name == "int8 weights, bfloat16 activations")
        told = f"int8 {int8:.2f}×, torchao's compiled int8 {compiled:.2f}×, best of ours {ours:.2f}×"
        yield Row("decode: ours beside torchao compiled", told, "int8 ahead", int8 > compiled)


def quantization_rows() -> Iterator[Row]:
    """Output errors of GPTQ and AWQ over rounding to nearest, 64 × 64 at 4 bits, five seeds each."""
    import torch

    from llmcourse.exercise import find

    nearest, gptq, awq = (find(name).reference for name in ("quantize_groups", "gptq_quantize", "awq_scales"))

    def errors(rank: int, seed: int) -> tuple[float, float]:
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(64, 64, generator=draw)
        mixing = torch.eye(64) if rank == 64 else torch.randn(rank, 64, generator=draw)
        x = torch.randn(4096, rank, generator=draw) @ mixing

        def of(made: torch.Tensor) -> float:
            return float(((made.double() - weight.double()) @ x.double().T).square().sum())

        codes, scales = nearest(weight, bits=4, group_size=64)
        base = of(codes * scales)
        codes, scales = gptq(weight, x, bits=4, group_size=64)
        stretch, scaled_codes, scaled_scales = awq(weight, x, bits=4, group_size=64)
        return of(codes * scales) / base, of(scaled_codes * scaled_scales / stretch) / base

    for name, rank, promised in (("rank n/4", 16, "≤ 0.2"), ("white", 64, "within 2 % of 1")):
        found = [errors(rank, seed) for seed in range(5)]
        ours = [pair[0] for pair in found]
        holds = max(ours) <= 0.2 if rank == 16 else all(abs(one - 1) <= 0.02 for one in ours)
        measured = f"{median(ours):.3f} [{min(ours):.3f}, {max(ours):.3f}] of 5 seeds"
        yield Row(f"GPTQ's output error over round-to-nearest's, {name} inputs", measured, promised, holds)
        worst = max(pair[1] for pair in found)
        yield Row(
            f"AWQ's output error over round-to-nearest's, {name} inputs",
            f"at most {worst:.3f}",
            "≤ 1",
            worst <= 1,
        )
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    found_bits = find("fp8_round").reference(every).view(torch.int32)
    cast = every.to(torch.float8_e4m3fn).float()
    same = (found_bits == cast.view(torch.int32)) | cast.isnan() & every.isnan()
    count = int(same.sum())
    yield Row(
        "fp8_round beside torch's cast, all bfloat16 values",
        f"{count:,} of 65,536 bit-exact",
        "all",
        count == 1 << 16,
    )


def definition_rows() -> Iterator[Row]:
    """Errors of our stored forms over torchao's at equal bits: normal weights, 5 seeds; nothing without torchao."""
    if importlib.util.find_spec("torchao") is None:
        return
    import torch

    quantization = importlib.import_module("torchao.quantization")
    mxfp4 = importlib.import_module("torchao.prototype.mx_formats.mx_tensor").MXTensor
    nvfp4_quantize = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor").nvfp4_quantize
    quant_primitives, to_nf4 = quantization.quant_primitives, quantization.to_nf4

    from llmcourse.compression import fp4_values
    from llmcourse.exercise import find

    own = {
        name: find(name).reference
        for name in ("quantize_groups", "affine_parameters", "block_scaled_fp4", "nf4_quantize")
    }
    kinds = quant_primitives.MappingType

    def torchaos(x: torch.Tensor, kind: Any, block: tuple[int, int], low: int, high: int) -> torch.Tensor:
        scale, zero_point = quant_primitives.choose_qparams_affine(x, kind, block, torch.int8, low, high)
        stored = (block, scale, zero_point, torch.int8, low, high)
        codes = quant_primitives.quantize_affine(x, *stored)
        return quant_primitives.dequantize_affine(codes, *stored)

    def groups(bits: int, x: torch.Tensor) -> torch.Tensor:
        codes, scales = own["quantize_groups"](x, bits=bits, group_size=64)
        return codes * scales.repeat_interleave(64, dim=1)

    def affine(bits: int, x: torch.Tensor) -> torch.Tensor:
        scale, zero_point = own["affine_parameters"](x, bits, symmetric=False, signed=True)
        half = 1 << bits - 1
        return scale * ((x / scale + zero_point).round().clamp(-half, half - 1) - zero_point)

    def fp4(form: str, x: torch.Tensor) -> torch.Tensor:
        return fp4_values(*own["block_scaled_fp4"](x, form=form), form=form)

    def torchao_nvfp4(x: torch.Tensor) -> torch.Tensor:
        tensor_scale = own["block_scaled_fp4"](x, form="nvfp4")[2]
        scales, packed = nvfp4_quantize(x, 16, tensor_scale)
        return fp4_values(packed.view(torch.uint8), scales.view(torch.uint8), tensor_scale, form="nvfp4")

    def nf4(x: torch.Tensor) -> torch.Tensor:
        packed, maxima, scales, offset = own["nf4_quantize"](x)
        read = (maxima * scales.repeat_interleave(256)[: len(maxima)] + offset).repeat_interleave(64)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten().int()
        return (to_nf4(x, 64, 256).nf4[codes] * read).reshape(x.shape)

    pairs: list[tuple[str, Callable[..., Any], Callable[..., Any], bool]] = []
    for bits in (8, 4):
        top = (1 << bits - 1) - 1
        each, whole = (1, 64), (256, 1024)
        ours = functools.partial(groups, bits)
        for name, low, kind, promised in (
            (f"{-top} to {top}", -top, kinds.SYMMETRIC_NO_CLIPPING_ERR, True),
            (f"{-top - 1} to {top}", -top - 1, kinds.SYMMETRIC, False),
        ):
            theirs = functools.partial(torchaos, kind=kind, block=each, low=low, high=top)
            pairs.append(
                (f"symmetric {bits} bits in groups of 64, torchao's codes {name}", ours, theirs, promised)
            )
        theirs = functools.partial(torchaos, kind=kinds.ASYMMETRIC, block=whole, low=-top - 1, high=top)
        pairs.append((f"affine {bits} bits", functools.partial(affine, bits), theirs, True))
    pairs += [
        (
            "MXFP4",
            functools.partial(fp4, "mxfp4"),
            lambda x: mxfp4.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(),
            True,
        ),
        ("NVFP4", functools.partial(fp4, "nvfp4"), torchao_nvfp4, True),
        ("NF4, two levels of scales", nf4, lambda x: to_nf4(x, 64, 256).get_original_weight(), True),
    ]
    for name, mine, peer, promised in pairs:
        ratios = []
        for seed in range(5):
            x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(seed))
            ratios.append(float((mine(x) - x).norm() / (peer(x) - x).norm()))
        yield Row(
            f"error over torchao's: {name}",
            f"{median(ratios):.4f} [{min(ratios):.4f}, {max(ratios):.4f}] of 5 seeds",
            "≤ 1.01" if promised else "",
            max(ratios) <= 1.01 if promised else None,
        )


# ------------------------------------------------------------------------------------------------------- optimizers


def optimizer_rows(rounds: int) -> Iterator[Row]:
    """AdamW's step beside torch's, the 8-bit state in training, the chunked loss."""
    yield from adamw_rows(rounds)
    yield from eight_bit_rows()
    yield chunked_loss_row()


def adamw_rows(rounds: int) -> Iterator[Row]:
    """One AdamW step on the parameters of the zoo's models: ours, and torch's loop (its default), foreach and fused."""
    import torch

    from llmcourse import optimizing, zoo
    from llmcourse.exercise import find

    def torchs(**options: Any) -> Callable[[Any], list[Any]]:
        return lambda named: [torch.optim.AdamW([parameter for _, parameter in named], **options)]

    own = find("AdamW").reference
    entries = {
        "ours": lambda named: [own([parameter for _, parameter in named])],
        "torch, default": torchs(),
        "torch, loop": torchs(foreach=False),
        "torch, foreach": torchs(foreach=True),
        "torch, fused": torchs(fused=True),
    }
    for name in zoo.names():
        model = zoo.load(name)
        times = optimizing.step_times(entries, model=model, rounds=rounds, seconds=60)
        for entry in entries:
            ratio, low, high = paired_ratio(times["torch, default"], times[entry])
            bar, taken_ms = entry == "ours", 1e3 * median(times[entry])
            yield Row(
                f"AdamW step, {name}: {entry}",
                f"{taken_ms:.2f} ms, {ratio:.2f}× the speed of torch's default [{low:.2f}, {high:.2f}]",
                "≥ 0.9×" if bar else "",
                ratio >= 0.9 if bar else None,
            )


def eight_bit_rows() -> Iterator[Row]:
    """The student trained with float32 and with 8-bit moments, the recorded seeds again: bytes and held-out loss."""
    from llmcourse import optimizing

    entries = {entry.name: entry for entry in optimizing.contenders()}
    with optimizing.one_thread():
        wide, narrow = (
            [optimizing.train(entries[name], seed=seed) for seed in optimizing.SEEDS]
            for name in ("AdamW", "AdamW, 8-bit state")
        )
    share = narrow[0].state_bytes / wide[0].state_bytes
    yield Row("8-bit state, bytes", f"{share:.4f} of float32's", "≤ 0.27", share <= 0.27)
    losses, others = ([run.held_out for run in runs] for runs in (wide, narrow))
    middle = sum(others) / len(others)
    finite = all(math.isfinite(loss) for run in narrow for loss in run.losses)
    yield Row(
        f"8-bit state, held-out loss after {optimizing.STEPS} steps, {len(losses)} seeds",
        f"mean {middle:.3f}; float32 {min(losses):.3f} to {max(losses):.3f}",
        "inside the seeds' spread, all finite",
        finite and min(losses) <= middle <= max(losses),
    )


def chunked_loss_row() -> Row:
    """The chunked loss in float64: its largest tensor, and its gradients beside autograd's."""
    import torch

    from llmcourse.counting import TensorWork
    from llmcourse.exercise import find

    draw = torch.Generator().manual_seed(0)
    chunk, words, width = 64, 4096, 32
    hidden = torch.randn(1024, width, generator=draw, dtype=torch.float64).requires_grad_()
    head = torch.randn(words, width, generator=draw, dtype=torch.float64).requires_grad_()
    targets = torch.randint(words, (1024,), generator=draw)
    with TensorWork() as work:
        _, *found = find("cross_entropy_backward").reference(
            hidden.detach(), head.detach(), targets, chunk=chunk
        )
    torch.nn.functional.cross_entropy(hidden @ head.T, targets).backward()
    errors = [
        float((own - leaf.grad).norm() / leaf.grad.norm())
        for own, leaf in zip(found, (hidden, head), strict=True)
        if leaf.grad is not None
    ]
    most = work.largest_tensor_bytes / (chunk * words * 8)
    return Row(
        "chunked loss, float64",
        f"largest tensor {most:.2f} × chunk × vocabulary, gradients within {max(errors):.0e} of autograd's",
        "≤ 1; equal",
        most <= 1 and max(errors) < 1e-12,
    )


def race_rows(races: int) -> Iterator[Row]:
    """Real races of decode_linear: ours and an answer that dequantizes each time, beside busy neighbours."""
    from llmcourse.engine import Engine
    from llmcourse.exercise import find

    exercise = find("decode_linear")
    slow = next(name for name in exercise.alternatives if "every" in name or "dequant" in name)
    disturb = [sys.executable, "-c", "import numpy\nx = numpy.ones(8 << 20, numpy.float32)\nwhile 1: x.sum()"]
    for neighbours in (0, 1, 4):
        busy = [subprocess.Popen(disturb) for _ in range(neighbours)]
        try:
            for name, wrong in ((exercise.name, "failed"), (slow, "passed")):
                verdicts: dict[str, int] = {}
                for seed in range(max(1, races // 6)):
                    with Engine() as engine:
                        verdict = engine.race(exercise, engine.ours(exercise, name), seed).verdict
                    verdicts[verdict] = verdicts.get(verdict, 0) + 1
                told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
                yield Row(
                    f"races of {name}, {neighbours} busy neighbours",
                    told,
                    f"none {wrong}",
                    wrong not in verdicts,
                )
        finally:
            for process in busy:
                process.kill()
                process.wait()


def class_rows(submissions: int) -> Iterator[Row]:
    from llmcourse.grading_benchmarks import grading_rows

    yield from grading_rows(submissions)


def kill_rows(kills: int) -> Iterator[Row]:
    from llmcourse.grading_benchmarks import killed_rows

    yield from killed_rows(50 * kills, kills)


# --------------------------------------------------------------------------------------------------------- table


HEAD = ("| what | measured | promised | holds |", "|---|---|---|---|")
WORDS = {True: "yes", False: "**no**", None: ""}


def table(rows: Sequence[Row], rounds: int) -> str:
    """The Markdown file: machine, method, one line a row."""
    from llmcourse import machine

    lines = [
        "# Benchmarks",
        "",
        f"Measured by `make bench` on: {machine.describe()}. Loading: warm page cache, one thread, {rounds} rounds in "
        "random order, medians of paired ratios with a 95 % bootstrap interval. The rows of a part are of one run; "
        "`python -m llmcourse.benchmarks --only PART` measures a part again.",
        "",
        *HEAD,
    ]
    return "\n".join([*lines, *map(line, rows)]) + "\n"


def line(row: Row) -> str:
    return f"| {row.what} | {row.measured} | {row.promised} | {WORDS[row.holds]} |"


def replaced(text: str, rows: Sequence[Row]) -> str:
    """The file with these rows in the places of those of the same name, new ones at the end.

    >>> replaced("| a | 1 |  |  |\\n| b | 2 |  |  |\\n", [Row("b", "3", "≤ 4", True), Row("c", "5", "", None)])
    '| a | 1 |  |  |\\n| b | 3 | ≤ 4 | yes |\\n| c | 5 |  |  |\\n'
    """
    lines = text.splitlines()
    places = {found.split(" | ")[0].removeprefix("| "): number for number, found in enumerate(lines)}
    for row in rows:
        if row.what in places:
            lines[places[row.what]] = line(row)
        else:
            lines.append(line(row))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m llmcourse.benchmarks [--only PART]`; exit status 1 when something promised does not hold."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--races", type=int, default=300, help="real races, in all; about three seconds each")
    parser.add_argument("--submissions", type=int, default=300, help="of the mixed class that is graded")
    parser.add_argument(
        "--kills", type=int, default=20, help="of the grader, in a class of fifty times as many"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    # The functions and not their rows: a part is measured when its turn comes.
    parts: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
        "loading": lambda options: loading_rows(options.rounds),
        "starting": lambda options: starting_rows(5),
        "checking": lambda options: checking_rows(),
        "lessons": lambda options: lesson_rows(),
        "decode": lambda options: decode_rows(),
        "quantization": lambda options: quantization_rows(),
        "definitions": lambda options: definition_rows(),
        "optimizers": lambda options: optimizer_rows(options.rounds),
        "races": lambda options: race_rows(options.races),
        "grading": lambda options: class_rows(options.submissions),
        "kills": lambda options: kill_rows(options.kills),
    }
    parser.add_argument(
        "--only",
        choices=parts,
        action="append",
        help="measure a part again (it may be given several times), its rows replace those in BENCHMARKS.md",
    )
    options = parser.parse_args(arguments)
    os.environ.update(QUIET)
    # As an installation is: what Python compiled once is kept.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.peak:
        print(peak_of(options.folder, options.peak))
        return 0
    rows: list[Row] = []
    for name in options.only or parts:
        for row in parts[name](options):
            rows.append(row)
            print(f"{row.what}: {row.measured} {row.promised and '(' + row.promised + ')'}", flush=True)
    path = REPOSITORY / "BENCHMARKS.md"
    whole = replaced(path.read_text(encoding="utf-8"), rows) if options.only else table(rows, options.rounds)
    path.write_text(whole, encoding="utf-8")
    return 1 if any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
