"""Training a decoder on the corpus: one loop that can be stopped, resumed, and told to finish.

The rate warms up, stays constant and falls linearly to zero over the last fifth of the steps (WSD: Hu et al. 2024,
MiniCPM). A constant rate commits to no end, so a run can be told at any time to begin its fall: by creating the
file `begin_decay` in its work folder. It begins by itself at four fifths of the budget, or when the held-out loss
stalls.

All state is in `work/state.pt`, written by rename. Batches follow from the seed and the step, and nothing else is
random once the weights are drawn, so a resumed run gives the weights that an uninterrupted one gives, bit for
bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse import text
from llmcourse.model import Decoder, ModelConfig

STATE_FILE = "state.pt"
BEGIN_DECAY_FILE = "begin_decay"
DECAY_PART = 5  # the rate falls over the last fifth; whole numbers, so that every count of steps is exact
_FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights a training gives, for one corpus; `tokens`, the budget, may be overridden.

    Rates are AdamW's, the decay of weights is for matrices only. A held-out loss that in `stall_evaluations`
    evaluations has not improved by `stall_margin_nats` begins the fall of the rate.
    """

    config: ModelConfig
    tokens: int
    seed: int = 0
    batch_size: int = 16
    context_tokens: int = 256
    learning_rate: float = 4e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    bfloat16_autocast: bool = True
    evaluate_every_steps: int = 200
    evaluation_windows: int = 128
    stall_evaluations: int = 10
    stall_margin_nats: float = 0.002

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.context_tokens


@dataclass
class Run:
    """Where a training stands; counted in steps, curves in (tokens seen, mean nats per token)."""

    total_steps: int
    decay_begins_step: int
    decay_reason: str = "budget"
    step: int = 0
    seconds: float = 0.0
    train_loss_sum: float = 0.0  # over the steps since the last evaluation
    train_loss_steps: int = 0
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    held_out_curve: list[tuple[int, float]] = field(default_factory=list)
    best_held_out: float = math.inf
    evaluations_since_best: int = 0
    threads: list[int] = field(default_factory=list)  # of every process that took part

    @property
    def decaying(self) -> bool:
        return self.step >= self.decay_begins_step


@dataclass(frozen=True)
class Progress:
    """What the loop reports after each step; `held_out` is None until there is an evaluation."""

    step: int
    total_steps: int
    tokens: int
    train_loss: float
    held_out: float | None
    evaluated: bool
    decaying: bool
    tokens_per_s: float


@dataclass(frozen=True)
class Trained:
    """A finished training: float32 weights on the CPU, and what is known of how they came about."""

    model: Decoder
    run: Run


class TrainingPaused(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state; the same call goes on from there."""

    def __init__(self, *, tokens: int, work: Path) -> None:
        super().__init__(f"paused after {tokens:,} tokens, saved in {work}")
        self.tokens = tokens
        self.work = work


def train(
    recipe: Recipe,
    work: str | Path,
    *,
    tokens: int | None = None,
    on_step: Callable[[Progress], None] | None = None,
    checkpoint_every_s: float = 60.0,
) -> Trained:
    """Train, or go on training, in the folder `work`; a finished run returns at once.

    `tokens` overrides the recipe's budget, also of a run that is resumed, until its rate begins to fall.
    Raises TrainingPaused on Ctrl-C; ValueError where the folder holds another training; BlockingIOError while
    another process trains there; FloatingPointError when the loss is no longer a number.
    """
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    with _only_process_in(work):
        return _train(recipe, work, tokens, on_step or (lambda progress: None), checkpoint_every_s)


def _train(
    recipe: Recipe,
    work: Path,
    tokens: int | None,
    on_step: Callable[[Progress], None],
    checkpoint_every_s: float,
) -> Trained:
    model, optimizer, run = _start_or_resume(recipe, work, tokens)
    drawn, held_out = _data(recipe)
    began = saved = time.monotonic()
    began_step, seconds_before = run.step, run.seconds
    with _stop_asked() as stop:
        for inputs, targets in islice(drawn, run.step, None):
            if run.step >= run.total_steps:
                break
            loss = _step(model, optimizer, recipe, run, inputs, targets)
            evaluated = run.step % recipe.evaluate_every_steps == 0 or run.step == run.total_steps
            if evaluated:
                _evaluate(model, recipe, run, held_out)
            began_decay = _begin_decay_if_asked(recipe, run, work)
            now = time.monotonic()
            run.seconds = seconds_before + now - began
            tokens_per_s = (run.step - began_step) * recipe.step_tokens / max(now - began, 1e-9)
            on_step(_progress(recipe, run, loss, evaluated, tokens_per_s))
            stopping = stop.is_set()  # asked once: a signal that comes while we save waits for the next step
            if stopping or began_decay or now - saved >= checkpoint_every_s:
                _save(work, model, optimizer, recipe, run)
                if began_decay:
                    (work / BEGIN_DECAY_FILE).unlink(missing_ok=True)
                saved = time.monotonic()
            if stopping:
                raise TrainingPaused(tokens=run.step * recipe.step_tokens, work=work)
        if run.step > began_step:
            _save(work, model, optimizer, recipe, run)
    return Trained(model.eval(), run)


def _data(recipe: Recipe) -> tuple[Iterator[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Batches to train on, without end, from the first; the windows to evaluate on."""
    context_tokens, vocab_size = recipe.context_tokens, recipe.config.vocab_size
    stream = text.corpus_tokens("train", vocab_size=vocab_size)
    held_out = text.corpus_tokens("held_out", vocab_size=vocab_size)
    return (
        text.batches(stream, batch_size=recipe.batch_size, context_tokens=context_tokens, seed=recipe.seed),
        fixed_windows(held_out, count=recipe.evaluation_windows, context_tokens=context_tokens),
    )


def _progress(recipe: Recipe, run: Run, loss: float, evaluated: bool, tokens_per_s: float) -> Progress:
    return Progress(
        step=run.step,
        total_steps=run.total_steps,
        tokens=run.step * recipe.step_tokens,
        train_loss=run.train_curve[-1][1] if evaluated else loss,
        held_out=run.held_out_curve[-1][1] if run.held_out_curve else None,
        evaluated=evaluated,
        decaying=run.decaying,
        tokens_per_s=tokens_per_s,
    )


# ----------------------------------------------------------------------------------------------------- a step


def _step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    run: Run,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """One update; counts it, and returns its loss in nats per token."""
    rate = recipe.learning_rate * rate_factor(run, warmup_steps=recipe.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16_autocast):
        logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss is {value} at step {run.step}; start again with a learning_rate below {recipe.learning_rate}"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
    optimizer.step()
    run.step += 1
    run.train_loss_sum += value
    run.train_loss_steps += 1
    return value


def rate_factor(run: Run, *, warmup_steps: int) -> float:
    """The share of the learning rate that the next step takes: rises to 1, stays, falls linearly to 0."""
    if not run.decaying:
        return min(1.0, (run.step + 1) / warmup_steps)
    reached = min(1.0, run.decay_begins_step / warmup_steps)
    return reached * (run.total_steps - run.step) / (run.total_steps - run.decay_begins_step)


def _new_optimizer(model: Decoder, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        fused=True,
    )


# -------------------------------------------------------------------------------------------------- evaluating


def fixed_windows(stream: Tensor, *, count: int, context_tokens: int) -> tuple[Tensor, Tensor]:
    """`count` windows spread evenly over a token stream: inputs and targets, each [count, context_tokens]."""
    last = len(stream) - context_tokens - 1
    if count < 1 or last < 0:
        raise ValueError(
            f"count {count} must be at least 1, and the stream longer than a context of {context_tokens}; "
            f"it has {len(stream)} tokens"
        )
    starts = torch.tensor([last * i // max(count - 1, 1) for i in range(count)])
    windows = stream[starts[:, None] + torch.arange(context_tokens + 1)]
    return windows[:, :-1], windows[:, 1:]


@torch.inference_mode()
def mean_loss(model: Decoder, windows: tuple[Tensor, Tensor], *, batch_size: int = 16) -> float:
    """Mean negative log likelihood of the targets, in nats per token, computed from float32 logits."""
    device = model.model.embed_tokens.weight.device
    total = 0.0
    for inputs, targets in zip(windows[0].split(batch_size), windows[1].split(batch_size), strict=True):
        logits = model(inputs.to(device)).float()  # [B, T, V]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device), reduction="sum").item()
    return total / windows[1].numel()


def _evaluate(model: Decoder, recipe: Recipe, run: Run, held_out: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16_autocast):
        loss = mean_loss(model, held_out)
    seen_tokens = run.step * recipe.step_tokens
    run.held_out_curve.append((seen_tokens, loss))
    run.train_curve.append((seen_tokens, run.train_loss_sum / run.train_loss_steps))
    run.train_loss_sum, run.train_loss_steps = 0.0, 0
    if loss < run.best_held_out - recipe.stall_margin_nats:
        run.best_held_out, run.evaluations_since_best = loss, 0
    else:
        run.evaluations_since_best += 1


# ------------------------------------------------------------------------------------------ the end of the rate


def _steps_of(tokens: int, recipe: Recipe) -> tuple[int, int]:
    """All steps of a budget, and the step at which the rate begins to fall."""
    total = tokens // recipe.step_tokens
    if total < DECAY_PART:
        raise ValueError(
            f"a budget of {tokens:,} tokens is {total} steps of {recipe.step_tokens:,}; "
            f"give at least {DECAY_PART} steps"
        )
    return total, total * (DECAY_PART - 1) // DECAY_PART


def _begin_decay_if_asked(recipe: Recipe, run: Run, work: Path) -> bool:
    """Let the rate fall from the next step on, if it is to; whether it just began by this."""
    stalled = run.evaluations_since_best >= recipe.stall_evaluations
    if run.decaying or not (stalled or (work / BEGIN_DECAY_FILE).exists()):
        return False
    run.decay_begins_step = run.step
    # Rounded up: a budget of that many steps then begins its fall at this very step.
    run.total_steps = -(-run.step * DECAY_PART // (DECAY_PART - 1))
    run.decay_reason = "held-out loss stalled" if stalled else "asked for"
    return True


# -------------------------------------------------------------------------------------------------------- state


def identity(recipe: Recipe) -> dict[str, Any]:
    """What must be equal for a training to be resumed: the recipe but for its budget, and the corpus."""
    settings = asdict(recipe)
    del settings["tokens"]
    configuration = settings.pop("config")
    return {"corpus fingerprint": text.fingerprint(), **configuration, **settings}


def _start_or_resume(
    recipe: Recipe, work: Path, tokens: int | None
) -> tuple[Decoder, torch.optim.Optimizer, Run]:
    saved = _load(work, recipe)
    # Initial weights come from torch's global generator, which is the caller's: lend it, and give it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Decoder(recipe.config)
    optimizer = _new_optimizer(model, recipe)
    if saved is None:
        (work / BEGIN_DECAY_FILE).unlink(missing_ok=True)  # meant for an earlier run
        run = Run(*_steps_of(recipe.tokens if tokens is None else tokens, recipe))
    else:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run = Run(**saved["run"])
        if tokens is not None:
            _change_budget(run, recipe, tokens)
    if torch.get_num_threads() not in run.threads:
        run.threads.append(torch.get_num_threads())
    return model.train(), optimizer, run


def _change_budget(run: Run, recipe: Recipe, tokens: int) -> None:
    total, begins = _steps_of(tokens, recipe)
    if total == run.total_steps:
        return
    seen_tokens = run.step * recipe.step_tokens
    if run.decaying or begins <= run.step:
        raise ValueError(
            f"the budget cannot become {tokens:,} tokens: after {seen_tokens:,} the rate "
            f"{'is falling already' if run.decaying else 'should have begun to fall'}; leave the budget out, and "
            f"create the file {BEGIN_DECAY_FILE} in the work folder to make a constant rate fall now"
        )
    run.total_steps, run.decay_begins_step = total, begins


def _save(work: Path, model: Decoder, optimizer: torch.optim.Optimizer, recipe: Recipe, run: Run) -> None:
    """Write the state by rename: a run that dies here leaves the state before."""
    unfinished = work / f".{STATE_FILE}.unfinished"
    state = {
        "format": _FORMAT,
        "identity": json.dumps(identity(recipe)),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "run": asdict(run),
    }
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(work / STATE_FILE)


def _load(work: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The state in `work`, None when there is none; refused when it is damaged or of another training."""
    path = work / STATE_FILE
    if not path.exists():
        return None
    try:
        if not zipfile.is_zipfile(path):  # torch would take it for a pickle of old, and fail in its own ways
            raise ValueError("it is cut, or no file that torch.save wrote")
        saved = torch.load(path, weights_only=True)
        if saved["format"] != _FORMAT:
            raise ValueError(f"its format is {saved['format']}, expected {_FORMAT}")
        was = json.loads(saved["identity"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the state of a training ({error}); remove the folder to start again"
        ) from None
    wanted = json.loads(json.dumps(identity(recipe)))
    changed = [
        f"{name} was {was.get(name)}, is {wanted.get(name)}"
        for name in dict.fromkeys([*wanted, *was])
        if was.get(name) != wanted.get(name)
    ]
    if changed:
        raise ValueError(
            f"{work} holds another training: {'; '.join(changed)}; name another work folder, or remove this one"
        )
    return saved


# ----------------------------------------------------------------------------------------- around the process


@contextmanager
def _only_process_in(work: Path) -> Iterator[None]:
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel, however the process ends
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is training in {work}; wait for it, or name another work folder"
            ) from None
        yield


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in two; a second one ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
