"""What a decoder weighs and costs, from its configuration alone: no model is built, and torch is not needed.

A configuration is a mapping with the keys of a Llama-family `config.json`. `num_key_value_heads` defaults to
`num_attention_heads`, `head_dim` to `hidden_size // num_attention_heads`, `tie_word_embeddings` to False.
Four optional flags, False when absent, name what the families add: `attention_bias` (q, k, v and o) and
`mlp_bias`, as Llama's config.json spells them; `qkv_bias` (Qwen2: q, k and v) and `qk_norm` (Qwen3: a norm
per head on queries and keys), which those families keep in their code instead of their config.json.

Not covered: mixtures of experts, latent attention, learned positions, LayerNorm, an MLP without a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BITS_PER_VALUE = {
    "float64": 64,
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8": 8,
    "int8": 8,
    "int4": 4,
}

# Bytes of state an optimizer keeps for one parameter, in float32 as PyTorch's own optimizers hold it.
OPTIMIZER_STATE_BYTES = {"sgd": 0, "momentum": 4, "adamw": 8}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a decoder by what they do; a tied head counts once, as the embedding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norms + self.head


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes that training holds for one parameter, activations left out."""

    weight: int
    gradient: int
    master_weight: int
    optimizer_state: int

    @property
    def total(self) -> int:
        return self.weight + self.gradient + self.master_weight + self.optimizer_state


@dataclass(frozen=True)
class _Shape:
    """The numbers every formula below needs, with the defaults of the family filled in."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    tied: bool


def parameter_breakdown(config: Mapping[str, Any]) -> ParameterCount:
    """Parameters of the decoder that `config` describes, by part.

    Norms are two a layer and one at the end, plus one each for queries and keys where `qk_norm` is set; a
    bias counts with its matrix. Raises ValueError for a missing or impossible value.

    >>> parameter_breakdown(PUBLIC_CONFIGS["Llama-3.2-1B"]).total
    1235814400
    """
    shape = _shape(config)
    query_width = shape.heads * shape.head_dim
    key_value_width = shape.key_value_heads * shape.head_dim

    attention = 2 * shape.hidden * query_width + 2 * shape.hidden * key_value_width  # q and o, k and v
    if config.get("attention_bias") or config.get("qkv_bias"):
        attention += query_width + 2 * key_value_width
    if config.get("attention_bias"):
        attention += shape.hidden

    mlp = 3 * shape.hidden * shape.intermediate  # gate, up, down
    if config.get("mlp_bias"):
        mlp += 2 * shape.intermediate + shape.hidden

    norms = 2 * shape.hidden + (2 * shape.head_dim if config.get("qk_norm") else 0)
    embedding = shape.vocab * shape.hidden
    return ParameterCount(
        embedding=embedding,
        attention=shape.layers * attention,
        mlp=shape.layers * mlp,
        norms=shape.layers * norms + shape.hidden,
        head=0 if shape.tied else embedding,
    )


def lora_parameters(config: Mapping[str, Any], *, rank: int, mlp: bool = True) -> int:
    """Parameters of low-rank adapters on every attention matrix and, unless `mlp` is False, on gate, up and down.

    An adapter of a matrix [out, in] has rank * (in + out). Hu et al. 2021, "LoRA", section 4.1.

    >>> lora_parameters(PUBLIC_CONFIGS["Llama-3.1-8B"], rank=16)
    41943040
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    shape = _shape(config)
    query_width, key_value_width = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    ends = 2 * (shape.hidden + query_width) + 2 * (shape.hidden + key_value_width)  # q and o, k and v
    if mlp:
        ends += 3 * (shape.hidden + shape.intermediate)
    return shape.layers * rank * ends


def size_bytes(count: int, dtype: str) -> int:
    """Bytes of `count` values in `dtype`, rounded up to whole bytes; scales of integer types not included.

    >>> size_bytes(3, "int4")
    2
    """
    return -(-count * _bits(dtype) // 8)


def weight_bytes(config: Mapping[str, Any], dtype: str = "bfloat16") -> int:
    """Bytes of all weights in `dtype`, tied ones once."""
    return size_bytes(parameter_breakdown(config).total, dtype)


def training_bytes_per_parameter(
    *, weight: str = "bfloat16", gradient: str | None = None, optimizer: str = "adamw"
) -> TrainingBytes:
    """Bytes that training keeps for each parameter: weight, gradient, float32 master copy, optimizer state.

    `gradient` defaults to the dtype of the weight. Weights narrower than float32 get a float32 master copy.
    Mixed-precision Adam: 2 + 2 + 4 + 8 = 16 (Rajbhandari et al. 2020, "ZeRO", sec. 3.1).

    >>> training_bytes_per_parameter().total
    16
    """
    if optimizer not in OPTIMIZER_STATE_BYTES:
        known = ", ".join(OPTIMIZER_STATE_BYTES)
        raise ValueError(f"optimizer {optimizer!r} is not known; known are {known}")
    return TrainingBytes(
        weight=size_bytes(1, weight),
        gradient=size_bytes(1, gradient or weight),
        master_weight=4 if _bits(weight) < 32 else 0,
        optimizer_state=OPTIMIZER_STATE_BYTES[optimizer],
    )


def kv_cache_bytes_per_token(config: Mapping[str, Any], dtype: str = "bfloat16") -> int:
    """Bytes that one token of one sequence adds to the cache: a key and a value per layer and KV head.

    >>> kv_cache_bytes_per_token(PUBLIC_CONFIGS["Llama-3.1-8B"])
    131072
    """
    shape = _shape(config)
    return size_bytes(2 * shape.layers * shape.key_value_heads * shape.head_dim, dtype)


def flops_per_token(config: Mapping[str, Any], *, context_tokens: int, training: bool = False) -> int:
    """Floating-point operations of the matrix products for one token that attends to `context_tokens` tokens.

    A multiply and an add are two operations. Every matrix is used once a token, the head included even where
    it is tied; the embedding is a look-up. Attention adds two products (scores, values) over the context, the
    token itself among them. Norms, rotary, softmax and activations are left out: of order hidden_size.
    `training` counts the backward pass as twice the forward pass, nothing recomputed.
    """
    if context_tokens < 1:
        raise ValueError(
            f"context_tokens must be at least 1 (a token attends to itself), got {context_tokens}"
        )
    shape = _shape(config)
    attention_weights = 2 * shape.hidden * (shape.heads + shape.key_value_heads) * shape.head_dim
    mlp_weights = 3 * shape.hidden * shape.intermediate
    matrices = shape.layers * (attention_weights + mlp_weights) + shape.vocab * shape.hidden
    products_with_context = 2 * shape.layers * shape.heads * shape.head_dim * context_tokens
    forward = 2 * (matrices + products_with_context)
    return 3 * forward if training else forward


def _bits(dtype: str) -> int:
    if dtype not in BITS_PER_VALUE:
        raise ValueError(f"dtype {dtype!r} is not known; known are {', '.join(BITS_PER_VALUE)}")
    return BITS_PER_VALUE[dtype]


def _shape(config: Mapping[str, Any]) -> _Shape:
    hidden = _positive(config, "hidden_size")
    heads = _positive(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"head_dim is not given and num_attention_heads {heads} does not divide hidden_size {hidden}"
        )
    key_value_heads = _positive(config, "num_key_value_heads", default=heads)
    if heads % key_value_heads:
        raise ValueError(
            f"num_key_value_heads {key_value_heads} does not divide num_attention_heads {heads}: "
            "each key-value head serves an equal group of query heads"
        )
    return _Shape(
        vocab=_positive(config, "vocab_size"),
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        layers=_positive(config, "num_hidden_layers"),
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=_positive(config, "head_dim", default=hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _positive(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"the configuration has no {key}; it has {', '.join(sorted(config)) or 'no keys'}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


# The config.json that each model's authors publish, cut to what sizes need; `qkv_bias` and `qk_norm` are from
# the families' model code. tests/test_sizing.py holds the totals to the published ones.
PUBLIC_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "max_position_embeddings": 131_072,
    },
    "Llama-3.1-70B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "max_position_embeddings": 131_072,
    },
    "Llama-3.1-405B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "max_position_embeddings": 131_072,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "qk_norm": False,
        "max_position_embeddings": 131_072,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
        "max_position_embeddings": 32_768,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "qkv_bias": True,
        "qk_norm": False,
        "max_position_embeddings": 32_768,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "qk_norm": True,
        "max_position_embeddings": 40_960,
    },
}
