"""The shape of a decoder, and how the families' `config.json` files say it.

Known are Llama, Mistral, Qwen2 and Qwen3: one architecture with a few switches, some of which stand in a family's
code and not in its file. What a file asks for and the decoder does not do is refused here, because running it would
give wrong logits without a complaint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

KNOWN_ROPE_TYPES = ("default", "llama3")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "qk_norm")
_LARGEST_MATRIX = 2**40  # 500 times the embedding of Llama-3.1-405B; beyond lie slips and overflow


@dataclass(frozen=True)
class Family:
    """What the model code of an architecture decides: `fixed` whatever its config.json says, `silent` where that
    says nothing."""

    model_type: str
    fixed: Mapping[str, bool]
    silent: Mapping[str, int | bool]


# The defaults are those of each family's configuration class in transformers; tests/test_configuration.py compares.
_QWEN_SILENT = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", fixed={"qkv_bias": False, "qk_norm": False}, silent={}),
    "MistralForCausalLM": Family(
        "mistral",
        fixed={"qkv_bias": False, "qk_norm": False, "attention_bias": False, "mlp_bias": False},
        silent={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        fixed={"qkv_bias": True, "qk_norm": False, "attention_bias": False, "mlp_bias": False},
        silent=_QWEN_SILENT,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        fixed={"qkv_bias": False, "qk_norm": True, "mlp_bias": False},
        silent=_QWEN_SILENT | {"head_dim": 128},
    ),
}


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches its rotary positions beyond the context it was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in fields(self):
            require_positive(f"rope_scaling.{field.name}", getattr(self, field.name), whole=False)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, in the words of a Llama `config.json`, and two switches that other families add.

    Left out, `num_key_value_heads` is as many as query heads, and `head_dim` is hidden_size / heads.
    `max_position_embeddings` is what the model was trained for; longer inputs run and are not refused.
    `attention_bias` puts biases on q, k, v and o; `qkv_bias` (Qwen2) on q, k and v; `qk_norm` (Qwen3) normalises
    each head's queries and keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled in on construction, never None after
    head_dim: int = None  # type: ignore[assignment]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    qkv_bias: bool | None = None
    qk_norm: bool | None = None

    def __post_init__(self) -> None:
        for name in _REQUIRED:
            require_positive(name, getattr(self, name))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"head_dim is not given and num_attention_heads {self.num_attention_heads} "
                    f"does not divide hidden_size {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            require_positive(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            require_positive(name, getattr(self, name), whole=False)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            _require_switch(name, getattr(self, name))
        for name in ("qkv_bias", "qk_norm"):
            if getattr(self, name) is not None:
                _require_switch(name, getattr(self, name))
                # Off is kept as None: the state of a training that began before these two existed lacks them,
                # and is recognised by its configuration.
                object.__setattr__(self, name, getattr(self, name) or None)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}: each key-value head serves an equal group of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary turns pairs of values), got {self.head_dim}")
        widest = max(self.vocab_size, self.intermediate_size, self.num_attention_heads * self.head_dim)
        if widest * self.hidden_size > _LARGEST_MATRIX:
            raise ValueError(
                f"this describes a matrix of {widest * self.hidden_size:,} weights; check the sizes"
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder/config.json` as transformers writes it, of version 5 (`rope_parameters`) or older.

        Raises FileNotFoundError without the file; ValueError when it is not JSON, lacks a key, or asks for
        something this decoder does not do: then running it would give wrong logits without a complaint.
        """
        path = Path(folder) / "config.json"
        raw = read_json(path)
        family = FAMILIES[_architecture(raw, path)]
        _refuse_unsupported(raw, path)
        missing = [name for name in _REQUIRED if raw.get(name) is None]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; a decoder needs {', '.join(_REQUIRED)}")
        raw = {**family.silent, **raw}
        given = {field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None}
        given |= {**_read_rope(raw, path), **family.fixed}
        try:
            config = cls(**given)
            _refuse_sliding_window(raw, config, by_layer="max_window_layers" in family.silent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return config

    def to_json(self) -> dict[str, Any]:
        """The configuration as a `config.json` that this module and transformers (old and new) read.

        It names the first family that has these switches: Mistral's are Llama's. Raises ValueError where no
        family has them.
        """
        switches = {name: bool(getattr(self, name)) for name in _SWITCHES}
        matching = [name for name, family in FAMILIES.items() if family.fixed.items() <= switches.items()]
        if not matching:
            on = " and ".join(name for name in _SWITCHES if switches[name])
            raise ValueError(f"no known family has {on} together, so no config.json can say it")
        architecture = matching[0]
        model_type = FAMILIES[architecture].model_type
        raw: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
        }
        raw |= asdict(self)
        del raw["qkv_bias"], raw["qk_norm"]  # the architecture says them
        if self.rope_scaling is not None:
            raw["rope_scaling"] = {"rope_type": "llama3"} | asdict(self.rope_scaling)
        return raw


def read_architecture(folder: str | Path) -> str:
    """The known architecture that `folder/config.json` names, as in "Qwen2ForCausalLM"; errors as `from_folder`."""
    path = Path(folder) / "config.json"
    return _architecture(read_json(path), path)


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    known = ", ".join(FAMILIES)
    by_type = {family.model_type: architecture for architecture, family in FAMILIES.items()}
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if not architectures:
        if model_type not in list(by_type):
            raise ValueError(f"{path}: model_type {model_type!r} is not known; known are {known}")
        return by_type[model_type]
    if not isinstance(architectures, list):
        raise ValueError(f"{path}: architectures must be a list of names, got {architectures!r}")
    named = architectures[0]
    if named not in list(FAMILIES):
        raise ValueError(f"{path}: architecture {named!r} is not known; known are {known}")
    if model_type is not None and model_type != FAMILIES[named].model_type:
        raise ValueError(
            f"{path}: architecture {named} and model_type {model_type!r} name two families; keep the right one"
        )
    return named


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {raw['hidden_act']!r} is not known; known is silu")
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"{path}: the checkpoint is quantized; give one stored in float32, bfloat16 or float16"
        )


def _refuse_sliding_window(raw: Mapping[str, Any], config: ModelConfig, *, by_layer: bool) -> None:
    """Raise ValueError where a window would hide tokens of the model's context from later ones.

    A window as long as the context is read and never applied: it would change inputs that are longer than that.

    `by_layer`: the family switches its window on, and for the layers from `max_window_layers` on, or for those
    that `layer_types` lists; in other families it is every layer's.
    """
    window: Any = raw.get("sliding_window")
    if not (_some_layer_slides(raw, config) if by_layer else window is not None):
        return
    require_positive("sliding_window", window)
    context = config.max_position_embeddings
    if window < context:
        raise ValueError(
            f"sliding_window {window} is not supported, and in force in a context of {context} tokens: every token "
            f"here attends to all before it. For inputs of at most {window} tokens, to which it makes no "
            f"difference, set max_position_embeddings to {window}"
        )


def _some_layer_slides(raw: Mapping[str, Any], config: ModelConfig) -> bool:
    kinds, switch, first = raw.get("layer_types"), raw["use_sliding_window"], raw["max_window_layers"]
    _require_switch("use_sliding_window", switch)
    if kinds is not None:
        if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types must be a list of full_attention and sliding_attention, got {kinds!r}"
            )
        return "sliding_attention" in kinds
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"max_window_layers must be a whole number of layers, got {first!r}")
    return switch and raw.get("sliding_window") is not None and first < config.num_hidden_layers


def _read_rope(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either spelling: version 5 puts both into `rope_parameters`."""
    rope: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        part = raw.get(key) or {}
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise ValueError(f"{path}: {key} must be one set of values for all layers, got {part!r}")
        rope |= part
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KNOWN_ROPE_TYPES:
        raise ValueError(f"{path}: rope type {kind!r} is not known; known are {', '.join(KNOWN_ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor must be 1: rotary turns all of a head here")

    theta = rope["rope_theta"]
    found: dict[str, Any] = (
        {"rope_scaling": None} if theta is None else {"rope_theta": theta, "rope_scaling": None}
    )
    if kind == "llama3":
        names = [field.name for field in fields(Llama3Scaling)]
        missing = [name for name in names if rope.get(name) is None]
        if missing:
            raise ValueError(
                f"{path}: rope type 'llama3' needs {', '.join(names)}; {', '.join(missing)} missing"
            )
        try:
            found["rope_scaling"] = Llama3Scaling(**{name: rope[name] for name in names})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def require_positive(name: str, value: Any, *, whole: bool = True) -> None:
    """Raise ValueError unless `value` is a positive integer, or with `whole` off a positive number."""
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right_type or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive {'integer' if whole else 'number'}, got {value!r}")


def _require_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; FileNotFoundError without it, ValueError when it is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"expected {path}; a checkpoint folder holds config.json and .safetensors files"
        )
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested beyond reason
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw
