"""The zoo: three small decoders that ship with the course, trained on its corpus by `llmcourse train`.

The files are bfloat16; `training.json` beside them says how they came about. They know Python's own prose and
source, and nothing else: their losses mean something on this corpus only.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llmcourse import text
from llmcourse.model import Decoder, ModelConfig, load_checkpoint, save_checkpoint
from llmcourse.training import Progress, Recipe, Trained, fixed_windows, mean_loss
from llmcourse.training import train as run_training

Name = Literal["teacher", "student", "draft"]

CHECKPOINTS = Path(__file__).parent / "checkpoints"
RECORD_FILE = "training.json"
OWN_CHARACTERS = 400_000  # of the corpus, for a model with a tokenizer of its own: a hundred windows and more


def _config(
    *, hidden_size: int, layers: int, heads: int, key_value_heads: int, intermediate_size: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )


_TEACHER = _config(hidden_size=256, layers=4, heads=8, key_value_heads=4, intermediate_size=640)
_STUDENT = _config(hidden_size=192, layers=3, heads=6, key_value_heads=3, intermediate_size=512)
_DRAFT = _config(
    hidden_size=256, layers=1, heads=8, key_value_heads=4, intermediate_size=640
)  # shallow: fast

RECIPES: dict[Name, Recipe] = {
    "teacher": Recipe(_TEACHER, tokens=17_092_608),
    "student": Recipe(_STUDENT, tokens=16_760_832),
    "draft": Recipe(_DRAFT, tokens=17_543_168),
}


@dataclass(frozen=True)
class Record:
    """How a checkpoint came about. Losses are nats per token; curves are of (tokens seen, loss).

    `epochs` is tokens seen per token of the training split: windows are drawn with replacement, so it is an
    average. The held-out curve was taken during training (float32 weights, bfloat16 products where the recipe
    says so). The `final_…` losses are those of the bfloat16 file itself, computed in float32 over
    `held_out_windows()`, and over as many windows spread likewise over the training split. `bits_per_byte` is
    `final_held_out` over the bytes of the same tokens. `bigram_held_out` is the loss of `bigram` there.
    """

    corpus_fingerprint: str
    python: str
    torch: str
    machine: str
    threads: tuple[int, ...]  # of every process that took part
    recipe: dict[str, Any]
    parameters: int
    corpus_tokens: int
    tokens: int
    tokens_per_parameter: float
    epochs: float
    seconds: float
    steps: int
    decay_begins_step: int
    decay_reason: str
    train_curve: tuple[tuple[int, float], ...]
    held_out_curve: tuple[tuple[int, float], ...]
    final_train: float
    final_held_out: float
    bits_per_byte: float
    bigram_held_out: float


# ----------------------------------------------------------------------------------------------------- loading


def names() -> tuple[Name, ...]:
    """The zoo's models, largest first."""
    return get_args(Name)


def folder(name: Name) -> Path:
    """Where a model of the zoo lies: config.json, model.safetensors, training.json.

    Raises ValueError for a name that is not in the zoo.
    """
    if name not in names():
        raise ValueError(f"{name!r} is not in the zoo; it holds {', '.join(names())}")
    return CHECKPOINTS / name


def load(name: Name, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """A model of the zoo, ready to predict (evaluation mode)."""
    return load_checkpoint(folder(name), dtype=dtype, device=device).eval()


def model(
    default: Name = "teacher", *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The model that lessons try things on, in evaluation mode: one of the zoo's, or the learner's own.

    LLMCOURSE_MODEL, where it is set, names its checkpoint folder, of a family that `load_checkpoint` knows. Such a
    model has a vocabulary of its own: `tokens` gives the corpus in its tokens.

    Raises ValueError where the variable names no such folder.
    """
    named = os.environ.get("LLMCOURSE_MODEL")
    if not named:
        return load(default, dtype=dtype, device=device)
    try:
        return load_checkpoint(Path(named).expanduser(), dtype=dtype, device=device).eval()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"LLMCOURSE_MODEL is {named!r}, expected a checkpoint folder: {error}; name another, or unset the "
            f"variable for the course's own {default}"
        ) from error


@functools.cache
def tokens(split: text.Split) -> Tensor:
    """A split of the corpus in the tokens of what `model()` gives: one int64 stream.

    For a learner's own model by the tokenizer.json in its folder, and only the first OWN_CHARACTERS characters.
    Raises ValueError where there is no such file.
    """
    named = os.environ.get("LLMCOURSE_MODEL")
    if not named:
        return text.corpus_tokens(split)
    from tokenizers import Tokenizer

    file = Path(named).expanduser() / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"LLMCOURSE_MODEL is {named!r}, a folder without tokenizer.json; expected the tokenizer beside the "
            "model, or else its tokens cannot be known"
        )
    words = "\n\n".join(text.corpus(split))[:OWN_CHARACTERS]
    return torch.tensor(Tokenizer.from_file(str(file)).encode(words, add_special_tokens=False).ids)


def record(name: Name) -> Record:
    """How a model of the zoo was trained, and how well it predicts."""
    return read_record(folder(name))


def read_record(checkpoint: str | Path) -> Record:
    """The training record in a checkpoint folder that `train` wrote.

    Raises FileNotFoundError without one, ValueError when it is damaged.
    """
    path = Path(checkpoint) / RECORD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}; only a checkpoint that `llmcourse train` wrote has one")
    wanted = {field.name for field in fields(Record)}
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.keys() != wanted:
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{path} must hold {', '.join(sorted(wanted))}; it holds {found}")
    for name in ("train_curve", "held_out_curve"):
        raw[name] = tuple((tokens, loss) for tokens, loss in raw[name])
    return Record(**raw | {"threads": tuple(raw["threads"])})


# -------------------------------------------------------------------------------------------------- evaluating

EVALUATION_WINDOWS = 128
EVALUATION_CONTEXT_TOKENS = 256


@functools.cache
def held_out_windows(*, count: int = EVALUATION_WINDOWS, vocab_size: int = 1024) -> tuple[Tensor, Tensor]:
    """The fixed windows that losses of the zoo are stated for: inputs and targets, each [count, 256]."""
    stream = text.corpus_tokens("held_out", vocab_size=vocab_size)
    return fixed_windows(stream, count=count, context_tokens=EVALUATION_CONTEXT_TOKENS)


@functools.cache
def token_bytes(vocab_size: int = 1024) -> Tensor:
    """Bytes of text that each token stands for, int64 [vocab_size]; the end of a document stands for none."""
    made = text.tokenizer(vocab_size)
    spelled = [made.id_to_token(token) for token in range(vocab_size)]
    # Byte-level tokens are spelled with one character for each byte.
    return torch.tensor([0 if word == text.END_OF_DOCUMENT else len(word or "") for word in spelled])


def bits_per_byte(nats_per_token: float, targets: Tensor, *, vocab_size: int = 1024) -> float:
    """A mean loss over `targets` in bits per byte of text, which does not depend on the tokenizer."""
    size_bytes = int(token_bytes(vocab_size)[targets].sum())
    return nats_per_token * targets.numel() / math.log(2) / size_bytes


@functools.cache
def bigram(vocab_size: int = 1024) -> Tensor:
    """log P(next token | this token) from counts over the training split: float32 [this, next].

    Each row is smoothed by 100 tokens distributed as the (add-one) single-token counts. MacKay and Peto 1995.
    """
    stream = text.corpus_tokens("train", vocab_size=vocab_size)
    pairs = torch.bincount(stream[:-1] * vocab_size + stream[1:], minlength=vocab_size**2)
    counts = pairs.view(vocab_size, vocab_size).double()
    single = torch.bincount(stream, minlength=vocab_size).double() + 1
    smoothed = counts + 100 * single / single.sum()
    return (smoothed / smoothed.sum(dim=1, keepdim=True)).log().float()


def bigram_loss(windows: tuple[Tensor, Tensor], *, vocab_size: int = 1024) -> float:
    """Nats per token of the bigram table on the windows that a model is judged on."""
    inputs, targets = windows
    return -bigram(vocab_size)[inputs, targets].double().mean().item()


# ---------------------------------------------------------------------------------------------------- training


def train(
    name: Name,
    work: str | Path,
    into: str | Path | None = None,
    *,
    tokens: int | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Record:
    """Train a model of the zoo in the folder `work`, or go on there, and write it to `into` (`folder(name)`).

    Raises FileExistsError, before any training, when `into` holds something; otherwise as `training.train`.
    """
    into = folder(name) if into is None else Path(into)
    recipe = RECIPES[name]
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise FileExistsError(f"{into} exists already; name another folder, or move the old one away first")
    return write(run_training(recipe, work, tokens=tokens, on_step=on_step), recipe, into)


def write(trained: Trained, recipe: Recipe, into: Path) -> Record:
    """Write a finished training as a checkpoint in bfloat16, with its record; nothing is left half-written."""
    with _beside(into) as unfinished:
        save_checkpoint(copy.deepcopy(trained.model).to(torch.bfloat16), unfinished)
        made = _record(trained, recipe, load_checkpoint(unfinished, dtype=torch.float32).eval())
        (unfinished / RECORD_FILE).write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(into)
    return made


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder yet to be made next to `target`, so that a rename moves it there; removed if it still is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    holding = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        yield holding / target.name
    finally:
        shutil.rmtree(holding)


def _record(trained: Trained, recipe: Recipe, model: Decoder) -> Record:
    """The record of a training whose file, loaded again in float32, is `model`."""
    run, vocab_size = trained.run, recipe.config.vocab_size
    held_out = held_out_windows(vocab_size=vocab_size)
    stream = text.corpus_tokens("train", vocab_size=vocab_size)
    train_windows = fixed_windows(stream, count=EVALUATION_WINDOWS, context_tokens=EVALUATION_CONTEXT_TOKENS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = run.step * recipe.step_tokens
    final_held_out = mean_loss(model, held_out)
    return Record(
        corpus_fingerprint=text.fingerprint(),
        python=platform.python_version(),
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
        threads=tuple(run.threads),
        recipe=asdict(recipe) | {"tokens": run.total_steps * recipe.step_tokens},
        parameters=parameters,
        corpus_tokens=len(stream),
        tokens=tokens,
        tokens_per_parameter=tokens / parameters,
        epochs=tokens / len(stream),
        seconds=run.seconds,
        steps=run.step,
        decay_begins_step=run.decay_begins_step,
        decay_reason=run.decay_reason,
        train_curve=tuple(run.train_curve),
        held_out_curve=tuple(run.held_out_curve),
        final_train=mean_loss(model, train_windows),
        final_held_out=final_held_out,
        bits_per_byte=bits_per_byte(final_held_out, held_out[1], vocab_size=vocab_size),
        bigram_held_out=bigram_loss(held_out, vocab_size=vocab_size),
    )
