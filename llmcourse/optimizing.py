"""What optimizers do to a small model: loss per step, time per step, bytes of state, and why narrow weights stall.

The student of the zoo is trained anew by each optimizer: the same start, the same batches, the same schedule, a rate
of its own. Losses per step follow from the seed and are kept in `optimizer_runs.json`, which `record` writes; times
are never kept: `step_times` measures them on the machine that asks. Loss per second is the one over the other.

The optimizers are exercises of lesson 07. A learner passes their own; what is not given is the course's reference.

Not handled: more than one device; tuning beyond the rate (grids below), so a ranking is of these settings only.
"""

from __future__ import annotations

import functools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse import machine, sizing, text, zoo
from llmcourse.compression import reference
from llmcourse.figures import inert, joined_table
from llmcourse.model import Decoder
from llmcourse.training import fixed_windows, mean_loss

RUNS_FILE = Path(__file__).parent / "optimizer_runs.json"
STEPS, BATCH, CONTEXT_TOKENS = 300, 4, 128
WARMUP_STEPS, FLOOR = 20, 0.1  # of the peak
CLIP_NORM, WEIGHT_DECAY = 1.0, 0.1
HELD_OUT_WINDOWS = 64
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # no seed that is reported on chose a rate
BLOCK_SIZE = 256

Named = Sequence[tuple[str, nn.Parameter]]


# ------------------------------------------------------------------------------------------------- the contenders


@dataclass(frozen=True)
class Contender:
    """An optimizer as it enters: `build(named parameters, rate)` gives the optimizers that step together.

    rates: the grid its rate is chosen from, by the held-out loss of a seed that is not reported; one is taken as it is.
    """

    name: str
    build: Callable[..., list[torch.optim.Optimizer]]
    rates: tuple[float, ...]


def matrices_and_vectors(named: Named) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    matrices = [parameter for _, parameter in named if parameter.dim() >= 2]
    vectors = [parameter for _, parameter in named if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is meant for it: a matrix inside the model, neither embedding nor head."""
    return parameter.dim() == 2 and not any(part in name for part in ("embed_tokens", "lm_head"))


def contenders(own: Mapping[str, Callable[..., Any]] | None = None) -> list[Contender]:
    """Every optimizer of the lesson; `own` holds a learner's answers by the exercises' names."""
    answers = dict(own or {})

    def answer(name: str) -> Callable[..., Any]:
        return answers.get(name) or reference(name)

    def sgd(named: Named, rate: float) -> list[torch.optim.Optimizer]:
        return [answer("SGD")(matrices_and_vectors(named), lr=rate, momentum=0.9)]

    def adamw(named: Named, rate: float) -> list[torch.optim.Optimizer]:
        return [answer("AdamW")(matrices_and_vectors(named), lr=rate, betas=(0.9, 0.95))]

    def adamw_8bit(named: Named, rate: float) -> list[torch.optim.Optimizer]:
        state = answer("Blockwise8bitState")
        return [AdamW8bit(matrices_and_vectors(named), lr=rate, betas=(0.9, 0.95), state=state)]

    def lion(named: Named, rate: float) -> list[torch.optim.Optimizer]:
        return [answer("Lion")(matrices_and_vectors(named), lr=rate, betas=(0.9, 0.99))]

    def adafactor(named: Named, rate: float) -> list[torch.optim.Optimizer]:
        return [answer("Adafactor")(matrices_and_vectors(named), lr=rate)]

    def muon(named: Named, rate: float) -> list[torch.optim.Optimizer]:
        hidden = [parameter for name, parameter in named if is_hidden_matrix(name, parameter)]
        rest = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
        orthogonal = Muon(hidden, lr=rate, weight_decay=WEIGHT_DECAY, update=answer("muon_update"))
        return [orthogonal, *adamw(rest, ADAMW_BESIDE_MUON)]

    return [
        Contender("SGD, momentum", sgd, (0.01, 0.03, 0.1)),
        Contender("AdamW", adamw, (1e-3, 2e-3, 4e-3)),
        Contender("AdamW, 8-bit state", adamw_8bit, (2e-3,)),  # AdamW's own, to differ in one thing only
        Contender("Lion", lion, (6e-4, 1.2e-3, 2.4e-3)),
        Contender("Adafactor", adafactor, (0.02, 0.04, 0.08)),
        Contender("Muon and AdamW", muon, (0.005, 0.01, 0.02)),
    ]


ADAMW_BESIDE_MUON = 2e-3  # for embeddings and norms, which Muon is not for


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments lie in 8-bit codes between steps. Dettmers et al. 2022, section 2.

    state: `state(values, signed=, block_size=)` with `read()` and `write(values)`, as the exercise has it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        state: Callable[..., Any],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.make_state = state
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    zeros = torch.zeros_like(p, dtype=torch.float32)
                    state["m"] = self.make_state(zeros, signed=True, block_size=BLOCK_SIZE)
                    state["v"] = self.make_state(zeros, signed=False, block_size=BLOCK_SIZE)
                    state["t"] = 0
                state["t"] += 1
                m = state["m"].read().lerp_(p.grad, 1 - b1)
                v = state["v"].read().mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                state["m"].write(m)
                state["v"].write(v)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = v.div_(1 - b2 ** state["t"]).sqrt_().add_(group["eps"])
                p.addcdiv_(m, root, value=-group["lr"] / (1 - b1 ** state["t"]))


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: `update(gradient, momentum)` is the exercise's `muon_update`. Matrices only."""

    def __init__(
        self, params: Any, lr: float, *, update: Callable[..., Tensor], weight_decay: float = 0.0
    ) -> None:
        self.update = update
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(self.update(p.grad, self.state[p]["momentum"]), alpha=-group["lr"])


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors that optimizers keep between steps; each storage once."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for part in value.values():
                look(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                look(part)
        elif hasattr(value, "__dict__"):  # an answer's own storage, such as codes with their scales
            look(vars(value))

    for optimizer in optimizers:
        for state in optimizer.state.values():
            look(state)
    return sum(found.values())


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """One training of the student: its rate and seed, each step's loss in nats a token, and what was left at the end.

    held_out is over `HELD_OUT_WINDOWS` windows, computed in float32; infinite where a step was no longer a number.
    state_bytes are what the optimizer keeps, parameters counted once.
    """

    name: str
    rate: float
    seed: int
    losses: tuple[float, ...]
    held_out: float
    state_bytes: int
    parameters: int

    @property
    def state_bytes_per_parameter(self) -> float:
        return self.state_bytes / self.parameters


def schedule(step: int, *, steps: int = STEPS) -> float:
    """The share of the peak rate that a step takes: `lr_at`, warm-up and then a cosine down to a tenth."""
    return reference("lr_at")(
        step, peak=1.0, floor=FLOOR, warmup_steps=min(WARMUP_STEPS, steps // 2), total_steps=steps
    )


def started(seed: int) -> Decoder:
    """The student with fresh weights, the same for every optimizer of that seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(zoo.RECIPES["student"].config).train()


def batches(seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """What every optimizer of that seed reads: `steps` pairs of inputs and targets, each [BATCH, CONTEXT_TOKENS]."""
    stream = text.corpus_tokens("train")
    drawn = text.batches(stream, batch_size=BATCH, context_tokens=CONTEXT_TOKENS, seed=seed)
    return list(islice(drawn, steps))


def train(
    contender: Contender,
    *,
    seed: int,
    rate: float | None = None,
    steps: int = STEPS,
    stop_after: int | None = None,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> Run:
    """Train the student from `started(seed)`; the contender's recorded rate unless one is given.

    `stop_after` ends the run early, on the schedule of the whole. Gradients are clipped to a norm of 1 over all of
    them. Raises ValueError where no rate was recorded.
    """
    rate = recorded_rate(contender.name) if rate is None else rate
    model = started(seed)
    optimizers = contender.build(list(model.named_parameters()), rate)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses = []
    for step, batch in enumerate(batches(seed, steps)[:stop_after]):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, rate_of_group in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate_of_group * schedule(step, steps=steps)
            optimizer.step()
        model.zero_grad()
        on_step(step, losses[-1])
    finite = math.isfinite(losses[-1])
    return Run(
        name=contender.name,
        rate=rate,
        seed=seed,
        losses=tuple(losses),
        held_out=mean_loss(model.eval(), held_out_windows()) if finite else math.inf,
        state_bytes=state_bytes(optimizers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def loss_of(model: Decoder, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss in nats a token of inputs and targets, each [batch, tokens]."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


def held_out_windows() -> tuple[Tensor, Tensor]:
    """What the runs are judged on: inputs and targets, each [HELD_OUT_WINDOWS, CONTEXT_TOKENS]."""
    return fixed_windows(
        text.corpus_tokens("held_out"), count=HELD_OUT_WINDOWS, context_tokens=CONTEXT_TOKENS
    )


# ---------------------------------------------------------------------------------------------------------- times


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread inside the block: the clock of the calling thread then counts all of the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_times(
    entries: Mapping[str, Callable[[Named], Sequence[torch.optim.Optimizer]]],
    *,
    model: Decoder | None = None,
    rounds: int = 15,
    seconds: float = 20.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """CPU seconds of one optimizer step for each entry, in rounds of random order, on one thread.

    entries: name -> what builds its optimizers from named parameters. Every entry has parameters of its own, copies
    of the model's (the student, freshly started, unless given), and the gradients of one batch. Under the name
    "forward and backward" stands what comes before the step. Stops after `rounds`, or, five at least, after `seconds`.
    While a notebook is graded (`figures.inert()`) one round is all.
    """
    if inert():
        rounds = 1
    model = started(seed) if model is None else model
    batch = batches(seed, 1)[0]
    loss_of(model, batch).backward()
    steps: dict[str, Callable[[], object]] = {}
    for name, build in entries.items():
        named = [(each, _copied(parameter)) for each, parameter in model.named_parameters()]
        steps[name] = _all_steps(build(named))
    steps["forward and backward"] = lambda: loss_of(model, batch).backward()
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, end = random.Random(seed), time.perf_counter() + seconds
    with one_thread():
        for done in range(rounds + 1):
            if done > 5 and time.perf_counter() > end:
                break
            for name in order.sample(list(steps), len(steps)):
                began = time.thread_time()
                steps[name]()
                if done:  # the first round makes state and warms up
                    times[name].append(time.thread_time() - began)
    return times


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(parameter.detach().clone())
    assert parameter.grad is not None
    copy.grad = parameter.grad.clone()
    return copy


def _all_steps(optimizers: Sequence[torch.optim.Optimizer]) -> Callable[[], object]:
    return lambda: [optimizer.step() for optimizer in optimizers]


def entries_of(found: Sequence[Contender]) -> dict[str, Callable[[Named], Sequence[torch.optim.Optimizer]]]:
    """Contenders as `step_times` takes them, at their recorded rates."""
    return {one.name: functools.partial(one.build, rate=recorded_rate(one.name)) for one in found}


# ---------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Row:
    """One optimizer of a record: what it reached, what it keeps, and what it costs on this machine.

    held_out and spread: mean and standard deviation over seeds, nats a token. step_s is of the optimizer alone,
    training_step_s with the forward and backward pass before it; both CPU seconds on one thread.
    """

    name: str
    rate: float
    held_out: float
    spread: float
    state_bytes: float  # a parameter
    step_s: float
    training_step_s: float


def table(kept: Record, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row for each optimizer of the record that `times`, by `step_times`, has measured."""
    before_s = median(times["forward and backward"])
    rows = []
    for name in dict.fromkeys(run.name for run in kept.runs):
        if name not in times:
            continue
        runs, step_s = kept.of(name), median(times[name])
        losses = [run.held_out for run in runs]
        rows.append(
            Row(
                name=name,
                rate=runs[0].rate,
                held_out=mean(losses),
                spread=stdev(losses) if len(losses) > 1 else 0.0,
                state_bytes=runs[0].state_bytes_per_parameter,
                step_s=step_s,
                training_step_s=before_s + step_s,
            )
        )
    return rows


def table_text(rows: Sequence[Row]) -> str:
    """The table in plain text, one optimizer a line."""
    width = max((len(row.name) for row in rows), default=0)
    head = f"{'':{width}}    rate  held-out nats  state bytes  step ms  training step ms"
    lines = [
        f"{row.name:{width}}  {row.rate:6g}  {row.held_out:6.3f} ± {row.spread:.3f}  {row.state_bytes:11.3f}  "
        f"{1e3 * row.step_s:7.2f}  {1e3 * row.training_step_s:16.1f}"
        for row in rows
    ]
    return joined_table([head, *lines])


def memory_plans(config: Mapping[str, Any], *, lora_rank: int = 16) -> dict[str, dict[str, float]]:
    """Bytes that training a model keeps, by part, in bfloat16 and float32: {plan: {part: bytes}}.

    Activations, buffers and fragmentation are left out.
    """
    count = sizing.parameter_breakdown(config).total
    adapters = sizing.lora_parameters(config, rank=lora_rank)
    each = sizing.training_bytes_per_parameter()
    eight_bits = 1 + 4 / BLOCK_SIZE

    def plan(trained: int, frozen: int, moment_bytes: float) -> dict[str, float]:
        return {
            "weights": each.weight * (trained + frozen),
            "gradients": each.gradient * trained,
            "float32 copy": each.master_weight * trained,
            "first moment": moment_bytes * trained,
            "second moment": moment_bytes * trained,
        }

    return {
        "AdamW": plan(count, 0, each.optimizer_state / 2),
        "AdamW, 8-bit moments": plan(count, 0, eight_bits),
        f"LoRA, rank {lora_rank}, AdamW": plan(adapters, count, each.optimizer_state / 2),
    }


# -------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Record:
    """Every run that was kept, and what it was made with; `tuning` holds held-out losses by contender and rate."""

    corpus_fingerprint: str
    machine: str
    recorded: str
    settings: dict[str, Any]
    tuning: dict[str, dict[str, float]]
    runs: tuple[Run, ...]

    def of(self, name: str) -> list[Run]:
        """The runs of one contender, a seed each."""
        return [run for run in self.runs if run.name == name]


def settings() -> dict[str, Any]:
    """What a record is made with, beside the corpus and the code."""
    return {
        "model": asdict(zoo.RECIPES["student"].config),
        "steps": STEPS,
        "batch": BATCH,
        "context tokens": CONTEXT_TOKENS,
        "warm-up steps": WARMUP_STEPS,
        "floor": FLOOR,
        "clip norm": CLIP_NORM,
        "weight decay of matrices": WEIGHT_DECAY,
    }


def recorded(path: Path = RUNS_FILE) -> Record:
    """The runs that ship with the course.

    Raises FileNotFoundError without them, ValueError where the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path}; `python -m llmcourse.optimizing` makes it, in half an hour"
        )
    try:
        raw = json.loads(path.read_bytes())
        runs = tuple(Run(**one | {"losses": tuple(one["losses"])}) for one in raw.pop("runs"))
        return Record(**raw, runs=runs)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of optimizer runs: {error}; make it again") from None


def recorded_rate(name: str, path: Path = RUNS_FILE) -> float:
    """The rate a contender's runs were kept with. ValueError where it has none."""
    found = [run.rate for run in recorded(path).of(name)]
    if not found:
        raise ValueError(f"no run of {name!r} is recorded; pass a rate")
    return found[0]


def record(
    path: Path = RUNS_FILE, *, names: Sequence[str] = (), say: Callable[[str], object] = print
) -> Record | None:
    """Tune every contender's rate on a seed of its own, run it on the reported ones, and write the record by rename.

    On one thread; half an hour on a quiet machine. What is done is kept beside `path` until all of it is, so the same
    call goes on after a break; with `names` only these contenders are run, and None is given while some are missing.
    """
    kept = path.with_name(f".{path.name}.unfinished")
    identity = {"settings": settings(), "corpus": text.fingerprint()}
    done = json.loads(kept.read_text()) if kept.exists() else {}
    done = done if done.get("identity") == identity else {"identity": identity, "runs": {}}

    def run(entry: Contender, rate: float, seed: int) -> Run:
        key = f"{entry.name} {rate:g} {seed}"
        if key not in done["runs"]:
            done["runs"][key] = asdict(_rounded(train(entry, seed=seed, rate=rate)))
            _write(kept, done)
            say(f"{entry.name}, rate {rate:g}, seed {seed}: held-out {done['runs'][key]['held_out']:.3f}")
        found = done["runs"][key]
        return Run(**found | {"losses": tuple(found["losses"])})

    runs: list[Run] = []
    tuning: dict[str, dict[str, float]] = {}
    entries = contenders()
    with one_thread():
        for entry in (one for one in entries if not names or one.name in names):
            grid = entry.rates if len(entry.rates) > 1 else ()
            tried = {rate: run(entry, rate, TUNING_SEED).held_out for rate in grid}
            tuning[entry.name] = {f"{rate:g}": loss for rate, loss in tried.items()}
            best = min(entry.rates, key=lambda rate: tried.get(rate, 0.0))
            runs += [run(entry, best, seed) for seed in SEEDS]
    if len(tuning) < len(entries):
        return None
    made = Record(
        corpus_fingerprint=text.fingerprint(),
        machine=machine.describe(),
        recorded=time.strftime("%Y-%m-%d"),
        settings=settings(),
        tuning=tuning,
        runs=tuple(runs),
    )
    _write(path, asdict(made))
    kept.unlink()
    return made


def _write(path: Path, data: Any) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(json.dumps(data) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _rounded(run: Run) -> Run:
    return replace(
        run, losses=tuple(float(f"{loss:.5g}") for loss in run.losses), held_out=float(f"{run.held_out:.5g}")
    )


# ------------------------------------------------------------------------------------------------------- exhibits

TOY_INPUTS, TOY_HIDDEN, TOY_OUTPUTS, TOY_BATCH = 10, 20, 5, 32


@dataclass(frozen=True)
class Exhibit:
    """Mean squared errors of a small network, float64: [seeds, steps], and the variance of what it should predict."""

    losses: Tensor
    target_variance: float


def toy(*, activation: bool) -> nn.Sequential:
    """Two linear layers, with SiLU between them or with nothing."""
    between: list[nn.Module] = [nn.SiLU()] if activation else []
    return nn.Sequential(nn.Linear(TOY_INPUTS, TOY_HIDDEN), *between, nn.Linear(TOY_HIDDEN, TOY_OUTPUTS))


def curved(x: Tensor) -> Tensor:
    """Something true, and not affine: the products of neighbouring inputs, [n, TOY_OUTPUTS] of variance 1."""
    return x[:, 0::2] * x[:, 1::2]


def toy_losses(
    *,
    seeds: Iterable[int],
    steps: int,
    activation: bool,
    target: Callable[[Tensor], Tensor] | None = None,
    rate: float = 0.01,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> Exhibit:
    """Train the small network on fresh normal inputs each step; without a target it is fed fresh noise as well.

    The loss of a step is that before it, on inputs never seen before: nothing can be learned by heart.
    """
    losses = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = toy(activation=activation)
        chosen = optimizer(network.parameters(), lr=rate)
        own = []
        for _ in range(steps):
            x = torch.randn(TOY_BATCH, TOY_INPUTS, generator=generator)
            y = torch.randn(TOY_BATCH, TOY_OUTPUTS, generator=generator) if target is None else target(x)
            loss = F.mse_loss(network(x), y)
            own.append(loss.item())
            chosen.zero_grad()
            loss.backward()
            chosen.step()
        losses.append(own)
    return Exhibit(torch.tensor(losses, dtype=torch.float64), 1.0)


def added_up(
    add: Callable[[Tensor, float], Tensor], *, steps: int = 1000, size: float = 0.001
) -> list[float]:
    """One weight of 1.0 in bfloat16, and what it says after each of `steps` additions of `size`."""
    weight = torch.tensor([1.0], dtype=torch.bfloat16)
    seen = []
    for _ in range(steps):
        weight = add(weight, size)
        seen.append(weight.float().item())
    return seen


def compensated() -> Callable[[Tensor, float], Tensor]:
    """Kahan's sum: what an addition lost is kept in a second bfloat16 number and added the next time. Kahan 1965."""
    lost = torch.zeros(1, dtype=torch.bfloat16)

    def add(weight: Tensor, size: float) -> Tensor:
        nonlocal lost
        step = torch.tensor(size, dtype=torch.bfloat16) + lost
        total = weight + step
        lost = step - (total - weight)
        return total

    return add


def kept_weights(own: Mapping[str, Callable[..., Any]] | None = None) -> dict[str, list[float]]:
    """A weight of 1.0 and a thousand additions of 0.001, for each way to keep it in 16 bits: its value after each.

    `own` holds a learner's answers to `MasterWeights` and `stochastic_round`; the course's where they are missing.
    """
    answers = dict(own or {})
    stochastic_round = answers.get("stochastic_round") or reference("stochastic_round")
    master_weights = answers.get("MasterWeights") or reference("MasterWeights")
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    master = master_weights([weight], lambda masters: torch.optim.SGD(masters, lr=1.0))

    def by_master(_: Tensor, size: float) -> Tensor:
        weight.grad = torch.tensor([-size], dtype=torch.bfloat16)
        master.step()
        return weight.detach().clone()

    return {
        "bfloat16, in place": added_up(lambda weight, size: weight + size),
        "float32 master": added_up(by_master),
        "stochastic rounding": added_up(
            lambda weight, size: stochastic_round(weight.float() + size, generator)
        ),
        "Kahan's sum": added_up(compensated()),
    }


@torch.no_grad()
def moved_share(model: Decoder, rate: float, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """The share of a model's weights that one AdamW step at `rate` changes, where they are kept in `dtype`.

    Adam's first step is the rate, with the gradient's sign: what counts is the size of a weight beside it. Weights
    without a gradient (embeddings of tokens that the batch lacks) are left out.
    """
    with torch.enable_grad():
        loss_of(model, batches(0, 1)[0]).backward()
    moved = total = 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        kept = parameter.to(dtype)[parameter.grad != 0]
        after = (kept.float() - rate * parameter.grad[parameter.grad != 0].sign()).to(dtype)
        moved += int((after != kept).sum())
        total += kept.numel()
    model.zero_grad()
    return moved / total


def main(names: Sequence[str]) -> None:
    """Make the record again, or a part of it: `python -m llmcourse.optimizing [NAME ...]`."""
    known = [entry.name for entry in contenders()]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no optimizer is named {unknown[0]!r}; there are {', '.join(known)}")
    if record(names=names) is None:
        print("kept; the record is written once every optimizer has been run")


if __name__ == "__main__":
    main(sys.argv[1:])
