"""What a checkpoint folder is, what it costs and where it fits; no weight is read.

Memory is counted against all that a device has, as `machine` found it. Activations, the runtime itself and whatever
else runs there come on top; integer weights are counted without their scales.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from llmcourse.configuration import FAMILIES, ModelConfig, read_architecture
from llmcourse.machine import Device
from llmcourse.model import stored_weights
from llmcourse.sizing import (
    BITS_PER_VALUE,
    ParameterCount,
    kv_cache_bytes_per_token,
    parameter_breakdown,
    size_bytes,
    training_bytes_per_parameter,
)

OTHER_DTYPES = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Serving:
    """Cost of weights held in one dtype; their cache is of that dtype too, or bfloat16 beside integers."""

    dtype: str
    weight_bytes: int
    cache_dtype: str
    cache_bytes_per_token: int

    def cache_tokens_in(self, memory_bytes: int) -> int | None:
        """Tokens, of all sequences together, that memory has room for beside the weights; None: not even those."""
        left_bytes = memory_bytes - self.weight_bytes
        return None if left_bytes < 0 else left_bytes // self.cache_bytes_per_token


@dataclass(frozen=True)
class Training:
    """Bytes that training all weights with AdamW holds, activations left out, in the dtype of the files."""

    dtype: str
    weight_bytes: int
    gradient_bytes: int
    master_weight_bytes: int
    optimizer_state_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.master_weight_bytes + self.optimizer_state_bytes


@dataclass(frozen=True)
class Fit:
    """What of an appraised checkpoint one device holds; `cache_tokens` as `Serving.cache_tokens_in`, by dtype."""

    device: str
    model: str
    memory_bytes: int
    cache_tokens: dict[str, int | None]
    trains: bool


@dataclass(frozen=True)
class Appraisal:
    """A checkpoint, by its config.json and the headers of its files.

    stored_values   dtype -> values in the files; their parameters, where a tied head is not stored twice
    dtype           of the files; the widest, where they mix several
    context_tokens  what the model was trained for
    """

    folder: str
    architecture: str
    family: str
    parameters: ParameterCount
    files: tuple[str, ...]
    stored_values: dict[str, int]
    stored_bytes: int
    dtype: str
    context_tokens: int
    serving: tuple[Serving, ...]
    training: Training

    def fit(self, device: Device) -> Fit:
        """What of this the device holds."""
        rooms = {each.dtype: each.cache_tokens_in(device.memory_bytes) for each in self.serving}
        trains = self.training.total_bytes <= device.memory_bytes
        return Fit(device.name, device.model, device.memory_bytes, rooms, trains)


def appraise(folder: str | Path) -> Appraisal:
    """Appraise a checkpoint folder that `load_checkpoint` takes; raises as that does, for the same faults."""
    config, stored = ModelConfig.from_folder(folder), stored_weights(folder)
    architecture = read_architecture(folder)
    shape = asdict(config)
    parameters = parameter_breakdown(shape)
    values = {str(dtype).removeprefix("torch."): count for dtype, count in stored.values.items()}
    widest = max(values, key=lambda dtype: BITS_PER_VALUE[dtype])

    serving = []
    for dtype in dict.fromkeys((widest, *OTHER_DTYPES)):
        cache_dtype = "bfloat16" if dtype.startswith("int") else dtype
        cache_bytes = kv_cache_bytes_per_token(shape, cache_dtype)
        serving.append(Serving(dtype, size_bytes(parameters.total, dtype), cache_dtype, cache_bytes))
    each = training_bytes_per_parameter(weight=widest)
    parts = (each.weight, each.gradient, each.master_weight, each.optimizer_state)
    return Appraisal(
        folder=str(folder),
        architecture=architecture,
        family=FAMILIES[architecture].model_type,
        parameters=parameters,
        files=stored.files,
        stored_values=values,
        stored_bytes=stored.size_bytes,
        dtype=widest,
        context_tokens=config.max_position_embeddings,
        serving=tuple(serving),
        training=Training(widest, *(part * parameters.total for part in parts)),
    )
