"""A Llama-style decoder in one file: layers, cache, checkpoints; `configuration` holds its shape.

Llama, Mistral, Qwen2 and Qwen3 are this one decoder with a few switches. Modules and parameters carry the names
that those have in Hugging Face checkpoints, so a checkpoint loads by name, and ours load in transformers. Read
top to bottom.

Shapes: B sequences, T tokens fed now, S tokens attended to (cached ones and the T), C hidden size, H query
heads, K key-value heads, D head dimension, V vocabulary.

Not handled: padding masks, sliding windows, mixtures of experts, quantized checkpoints, rotary scaling of any
kind but Llama 3's, pickled weights (`pytorch_model.bin`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmcourse.configuration import Llama3Scaling as Llama3Scaling
from llmcourse.configuration import ModelConfig as ModelConfig
from llmcourse.configuration import read_json, require_positive

# ----------------------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    """torch's, which is not initialised when it is made: the decoder does that once, and a loaded one never."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """torch's, not initialised when it is made, as `Linear`."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. Zhang and Sennrich 2019."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        # Squares of a half type lose too much: normalise in float32 at least, and round before the weight, as
        # the family does. float64 stays float64.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians that each pair of a head turns per position: float32 [D/2] on the CPU, rope_theta^(-2i/D).

    Llama 3 scaling: pairs that turn little over the original context turn `factor` times slower, fast ones stay
    as they are, those between are interpolated. Su et al. 2021, eq. 15; Llama 3.1 model code.
    """
    # float32 on the CPU, as the family computes them, whatever the model's dtype and device: at position
    # 100,000 another rounding is another angle.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over that context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)  # 0: slowed down in full, 1: as it was
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the angles that queries and keys are turned by."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", None, persistent=False)
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Compute the frequencies anew, in float32, on torch's default device unless given: no file holds them."""
        self.inv_freq = inverse_frequencies(self.config).to(device or torch.get_default_device())

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        # `.to(torch.bfloat16)` would round the angles (by radians, far into the text) and `.to_empty()` lose them:
        # of whatever is done to the module, the frequencies follow the device only.
        super()._apply(fn, recurse)
        self.reset_buffers(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] -> cosines and sines, each [T, D]; the halves of a head share their angles."""
        angles = positions.to(torch.float32)[:, None] * self.inv_freq  # [T, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [T, D]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x [..., T, D] by its angle; cosines and sines are [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class KeyValueCache:
    """Keys and values of the tokens seen so far, in room that is taken once.

    keys, values [layers, B, K, capacity, D]; the first `length_tokens` of the capacity are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        capacity_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch_size,
            config.num_key_value_heads,
            capacity_tokens,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length_tokens = 0

    @property
    def capacity_tokens(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values [B, K, T, D] behind the old; return all of them, [B, K, S, D].

        `length_tokens` moves once the step is done: every layer of a step writes to the same positions.
        """
        start, end = self.length_tokens, self.length_tokens + keys.shape[2]
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal attention in which H / K query heads share each key-value head. Ainslie et al. 2023."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_width, key_value_width = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        qkv_bias = bool(config.attention_bias or config.qkv_bias)
        self.q_proj = Linear(config.hidden_size, query_width, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.o_proj = Linear(query_width, config.hidden_size, bias=config.attention_bias)
        # Over the D values of a head, with one weight for all heads. Yang et al. 2025 (Qwen3), sec. 2.
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, cache: KeyValueCache | None) -> Tensor:
        batch, new, _ = x.shape  # [B, T, C]
        queries = self.q_proj(x).view(batch, new, self.heads, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        # Keys and values, [B, K, T, D], keep their own number of heads: that is what the cache saves.
        keys = self.k_proj(x).view(batch, new, self.key_value_heads, self.head_dim).transpose(1, 2)
        values = self.v_proj(x).view(batch, new, self.key_value_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries, cosines, sines), rotate(keys, cosines, sines)
        if cache is not None:
            keys, values = cache.write(self.layer, keys, values)  # [B, K, S, D]

        seen = keys.shape[2]
        # `is_causal` lines the mask up with the first key, which is right only when nothing is cached.
        mask = None
        if 1 < new < seen:
            mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=1 < new == seen,
            enable_gqa=self.heads != self.key_value_heads,
        )  # [B, H, T, D]
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, new, self.heads * self.head_dim))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Shazeer 2020, SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer=layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosines, sines, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Tokens to hidden states: everything but the head. The checkpoints' `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer=i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        start = 0 if cache is None else cache.length_tokens
        x = self.embed_tokens(tokens)  # [B, T, C]
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        cosines, sines = self.rotary_emb(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cosines, sines, cache)
        if cache is not None:
            cache.length_tokens += tokens.shape[1]
        return self.norm(x)


class Decoder(nn.Module):
    """A Llama-style language model: tokens [B, T] -> logits [B, T, V] of the token that follows each.

    Fresh weights are normal with standard deviation 0.02, biases zero, drawn from torch's global generator.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.lm_head.weight.is_meta:
            self.apply(_initialize)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding itself where the configuration ties them: one tensor, two names."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self, *, batch_size: int, capacity_tokens: int) -> KeyValueCache:
        """An empty cache in this model's dtype and on its device."""
        weight = self.model.embed_tokens.weight
        return KeyValueCache(
            self.config,
            batch_size=batch_size,
            capacity_tokens=capacity_tokens,
            dtype=weight.dtype,
            device=weight.device,
        )

    def forward(self, tokens: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]; with a cache, for tokens that follow those it holds.

        Raises ValueError when the tokens are not [B, T] or do not fit the cache, or a cache meets gradients.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [batch, tokens], got shape {list(tokens.shape)}")
        if cache is not None:
            _check_cache(cache, tokens)
        return self.lm_head(self.model(tokens, cache))

    @torch.inference_mode()
    def generate(self, tokens: Tensor, *, new_tokens: int) -> Tensor:
        """Append the likeliest token `new_tokens` times: tokens [B, T] -> [B, T + new_tokens]."""
        cache = self.new_cache(batch_size=tokens.shape[0], capacity_tokens=tokens.shape[1] + new_tokens)
        fed = tokens
        for _ in range(new_tokens):
            fed = self(fed, cache=cache)[:, -1:].argmax(-1)  # [B, 1]
            tokens = torch.cat((tokens, fed), dim=1)
        return tokens


def _initialize(module: nn.Module) -> None:
    # On the meta device there is nothing to draw, and torch's stand-ins for it cost more than mapping 600 MB.
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_cache(cache: KeyValueCache, tokens: Tensor) -> None:
    if torch.is_grad_enabled():
        raise ValueError("a cache is for decoding only; call the model under torch.inference_mode()")
    batch_size, new = tokens.shape
    if batch_size != cache.keys.shape[1]:
        raise ValueError(
            f"the cache was made for batch_size {cache.keys.shape[1]}, got {batch_size} sequences"
        )
    if cache.length_tokens + new > cache.capacity_tokens:
        raise ValueError(
            f"{cache.length_tokens} cached and {new} new tokens exceed capacity_tokens "
            f"{cache.capacity_tokens}; make a larger cache"
        )


# ------------------------------------------------------------------------------------------------ checkpoints

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LOADABLE = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_checkpoint(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """Load the folder of a known family: config.json and one safetensors file, or shards and their index.

    The model is built without storage (meta device) and the file's tensors become its parameters, so nothing
    is held twice; on a CPU, in the file's dtype, they stay mapped, and only what is written to is copied.
    `dtype` None keeps the file's. Every name, shape and dtype is checked before the first weight is read.

    Raises FileNotFoundError for a missing file, ValueError for everything else that is wrong, naming it.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    state = {}
    with ExitStack() as opened:
        sources, model = _open_checked(folder, config, opened, device)
        if dtype is None:
            _refuse_mixed_dtypes(sources, folder)
        for name, (_, file) in sources.items():
            tensor = file.get_tensor(name)
            state[name] = tensor if dtype is None else tensor.to(dtype)

    if config.tie_word_embeddings:
        embedding = state["model.embed_tokens.weight"]
        if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], embedding):
            raise ValueError(
                f"{folder}: config.json ties lm_head.weight to model.embed_tokens.weight, but the two are stored "
                "with different values; set tie_word_embeddings to false if the head is its own"
            )
        state["lm_head.weight"] = embedding
    _assign(model, state)
    model.tie_weights()  # assigning made two parameters of the one
    model.model.rotary_emb.reset_buffers(device)
    return model


def _assign(model: Decoder, state: Mapping[str, Tensor]) -> None:
    """Make the tensors the model's parameters. `load_state_dict` would check once more what was checked before."""
    for prefix, module in model.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            tensor = state[f"{prefix}.{name}"]
            module.register_parameter(name, nn.Parameter(tensor))


@dataclass(frozen=True)
class StoredWeights:
    """What the safetensors files of a checkpoint hold: their names, and values stored in each dtype."""

    files: tuple[str, ...]
    values: Mapping[torch.dtype, int]

    @property
    def size_bytes(self) -> int:
        return sum(count * dtype.itemsize for dtype, count in self.values.items())


def stored_weights(folder: str | Path) -> StoredWeights:
    """What a checkpoint's files hold, from their headers: no weight is read. Checks and raises as loading does."""
    folder = Path(folder)
    values: dict[torch.dtype, int] = {}
    with ExitStack() as opened:
        sources, _ = _open_checked(folder, ModelConfig.from_folder(folder), opened, "cpu")
        for name, (_, file) in sources.items():
            header = file.get_slice(name)
            dtype = _LOADABLE[header.get_dtype()]
            values[dtype] = values.get(dtype, 0) + math.prod(header.get_shape())
    return StoredWeights(tuple(sorted({path.name for path, _ in sources.values()})), values)


def _open_checked(
    folder: Path, config: ModelConfig, opened: ExitStack, device: torch.device | str
) -> tuple[dict[str, tuple[Path, Any]], Decoder]:
    """Open a checkpoint's files, and build the model without storage that they are found to fit."""
    sources = _open_shards(folder, opened, device)
    if config.num_hidden_layers > len(sources):  # else a hostile number would keep us building for days
        raise ValueError(
            f"{folder}: config.json says num_hidden_layers {config.num_hidden_layers}, but the files hold "
            f"{len(sources)} tensors"
        )
    with torch.device("meta"):
        model = Decoder(config)
    _check_against_model(sources, model, folder)
    return sources, model


def _open_shards(folder: Path, opened: ExitStack, device: torch.device | str) -> dict[str, tuple[Path, Any]]:
    """Open every file of the checkpoint: {tensor name: (path, open file)}. A single file precedes an index."""
    if (folder / SINGLE_FILE).is_file():
        placed, names = None, [SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        placed = _read_weight_map(folder / INDEX_FILE)
        names = sorted(set(placed.values()))
    else:
        raise FileNotFoundError(f"expected {SINGLE_FILE} or {INDEX_FILE} in {folder}")

    sources: dict[str, tuple[Path, Any]] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise FileNotFoundError(f"{folder / INDEX_FILE} names {path.name}, which is not in the folder")
        try:
            file = opened.enter_context(safe_open(path, framework="pt", device=str(device)))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a sound safetensors file: {error}") from None
        for name in file.keys():  # noqa: SIM118  not a mapping: it has no iterator
            if placed is not None and placed.get(name) != path.name:
                raise ValueError(
                    f"{path} holds {name}, which the index places in {placed.get(name, 'no file')}"
                )
            sources[name] = (path, file)
    absent = [name for name in placed or () if name not in sources]
    if absent:
        raise ValueError(f"{folder / INDEX_FILE} places {_listed(absent)} in shards that do not hold them")
    # Old converters stored the rotary frequencies; they follow from config.json and are computed here.
    return {name: source for name, source in sources.items() if not name.endswith(".rotary_emb.inv_freq")}


def _read_weight_map(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{path} must hold a weight_map from tensor names to shard files, got {placed!r}")
    for name, shard in placed.items():
        # A plain name: nothing that an index says may make us open a file elsewhere.
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in "/\\\0"):
            raise ValueError(
                f"{path} places {name} in {shard!r}; expected the name of a file in the same folder"
            )
    return placed


def _check_against_model(sources: Mapping[str, tuple[Path, Any]], model: Decoder, folder: Path) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings and "lm_head.weight" not in sources:
        del wanted["lm_head.weight"]
    missing = [name for name in wanted if name not in sources]
    unexpected = [name for name in sources if name not in wanted]
    if missing or unexpected:
        complaints = [f"missing {_listed(missing)}"] * bool(missing)
        complaints += [f"unexpected {_listed(unexpected)}"] * bool(unexpected)
        raise ValueError(
            f"{folder} does not hold the tensors that its config.json describes: {'; '.join(complaints)}"
        )

    for name, (path, file) in sources.items():
        header = file.get_slice(name)
        if list(header.get_shape()) != wanted[name]:
            raise ValueError(
                f"{path}: {name} has shape {list(header.get_shape())}, config.json wants {wanted[name]}"
            )
        if header.get_dtype() not in _LOADABLE:
            raise ValueError(
                f"{path}: {name} is stored as {header.get_dtype()}; expected one of {', '.join(_LOADABLE)}"
            )


def _refuse_mixed_dtypes(sources: Mapping[str, tuple[Path, Any]], folder: Path) -> None:
    dtypes: dict[str, str] = {}  # a dtype, and the first tensor stored in it
    for name, (_, file) in sources.items():
        dtypes.setdefault(file.get_slice(name).get_dtype(), name)
    if len(dtypes) > 1:
        stored = ", ".join(f"{name} as {kind}" for kind, name in dtypes.items())
        raise ValueError(
            f"{folder} mixes dtypes ({stored}); say which to load all in, as in dtype=torch.float32"
        )


def _listed(names: list[str], *, most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def save_checkpoint(model: Decoder, folder: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Write config.json and safetensors that `load_checkpoint` and transformers read.

    With `max_shard_bytes`, files of at most that size, header included, and an index; a tensor that is larger
    by itself gets its own file. A tied head is written once, as the embedding. All is written beside `folder`
    and takes its name at the end, so an interrupted save leaves nothing under that name.

    Raises FileExistsError when `folder` holds anything: choose another name, or move the old one away.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) or folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"{folder} exists already; save under a new name, or move the old one away first"
        )
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    on_meta = [name for name, tensor in state.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"nothing to save: {_listed(on_meta)} are on the meta device, without values")
    shards = list(_split(state, max_shard_bytes))

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    unfinished.mkdir()
    try:
        _write_checkpoint(unfinished, model.config, state, shards)
        unfinished.replace(folder)
    except BaseException:  # an interrupt too: whatever it is, it goes on, and our litter does not stay
        shutil.rmtree(unfinished)
        raise


def _write_checkpoint(
    folder: Path, config: ModelConfig, state: dict[str, Tensor], shards: list[list[str]]
) -> None:
    settings = folder / "config.json"
    settings.write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")
    count = len(shards)
    files = (
        [SINGLE_FILE]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    for file, names in zip(files, shards, strict=True):
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers asks for this entry
        shutil.copymode(
            settings, folder / file
        )  # safetensors leaves 0600, which a teacher's class cannot read
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(state: Mapping[str, Tensor], max_shard_bytes: int | None) -> Iterator[list[str]]:
    """Names for each file, in order; a new file starts when the next tensor would pass the limit."""
    if max_shard_bytes is None:
        yield list(state)
        return
    require_positive("max_shard_bytes", max_shard_bytes)
    # 8 bytes of length, the metadata, up to 8 of padding; then, for each tensor, what the header says of it.
    empty_bytes = 8 + len('{"__metadata__":{"format":"pt"}}') + 8
    shard: list[str] = []
    used_bytes = empty_bytes
    for name, tensor in state.items():
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [max_shard_bytes] * 2}
        added_bytes = tensor.nbytes + len(json.dumps({name: entry}, separators=(",", ":")))
        if shard and used_bytes + added_bytes > max_shard_bytes:
            yield shard
            shard, used_bytes = [], empty_bytes
        shard.append(name)
        used_bytes += added_bytes
    yield shard
