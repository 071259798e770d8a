from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcourse.appraisal import appraise
from llmcourse.machine import Device
from llmcourse.model import Decoder, ModelConfig, load_checkpoint, save_checkpoint

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
)


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes: bool) -> Path:
    save_checkpoint(Decoder(replace(TINY, **changes)).to(dtype), folder / "model")
    return folder / "model"


def rewrite(folder: Path, name: str, value: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {each: tensor.clone() for each, tensor in load_file(path).items()} | {name: value}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "mlp_bias": True}, "llama"),
        ({"qkv_bias": True, "tie_word_embeddings": True}, "qwen2"),
        ({"qk_norm": True, "attention_bias": True}, "qwen3"),
    ],
    ids=str,
)
def test_the_costs_are_those_of_the_loaded_model(tmp_path, changes, family):
    found, model = appraise(saved(tmp_path, **changes)), load_checkpoint(tmp_path / "model")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (found.family, found.context_tokens) == (family, 96)
    assert found.parameters.total == parameters
    assert (found.stored_values, found.stored_bytes) == ({"float32": parameters}, 4 * parameters)
    assert found.serving[0].weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    cache = model.new_cache(batch_size=1, capacity_tokens=1)
    assert found.serving[0].cache_bytes_per_token == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize(
    ("dtype", "costed"),
    [
        (torch.float32, ["float32", "bfloat16", "int8", "int4"]),
        (torch.bfloat16, ["bfloat16", "float32", "int8", "int4"]),
        (torch.float16, ["float16", "float32", "bfloat16", "int8", "int4"]),
    ],
    ids=str,
)
def test_the_dtype_of_the_files_comes_first(tmp_path, dtype, costed):
    found = appraise(saved(tmp_path, dtype))
    assert [each.dtype for each in found.serving] == costed
    assert found.dtype == found.training.dtype == costed[0]
    cached = {each.dtype: each.cache_dtype for each in found.serving}
    assert cached == {name: name for name in costed} | {"int8": "bfloat16", "int4": "bfloat16"}


def test_mixed_files_are_costed_in_the_widest_of_their_dtypes(tmp_path):
    folder = saved(tmp_path, torch.bfloat16)
    rewrite(folder, "model.norm.weight", torch.ones(24))
    found = appraise(folder)
    assert found.stored_values == {"bfloat16": found.parameters.total - 24, "float32": 24}
    assert found.stored_bytes == 2 * (found.parameters.total - 24) + 4 * 24
    assert (found.dtype, found.serving[0].weight_bytes) == ("float32", 4 * found.parameters.total)


def test_a_tied_head_that_is_stored_twice_costs_its_memory_once(tmp_path):
    folder = saved(tmp_path, tie_word_embeddings=True)
    before = appraise(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, "lm_head.weight", embedding.clone())
    after = appraise(folder)
    assert after.stored_bytes - before.stored_bytes == embedding.nbytes
    assert (after.parameters, after.serving) == (before.parameters, before.serving)


def test_training_takes_sixteen_bytes_a_parameter(tmp_path):
    found = appraise(saved(tmp_path, torch.bfloat16))
    total, training = found.parameters.total, found.training
    # Rajbhandari et al. 2020, sec. 3.1: 2 and 2, then a float32 copy and Adam's two moments.
    assert (training.weight_bytes, training.gradient_bytes) == (2 * total, 2 * total)
    assert (training.master_weight_bytes, training.optimizer_state_bytes) == (4 * total, 8 * total)
    assert training.total_bytes == 16 * total


def test_what_fits_exactly_fits_and_a_byte_less_does_not(tmp_path):
    found = appraise(saved(tmp_path))

    def fit(memory_bytes: int):
        return found.fit(Device("cpu", "A processor", memory_bytes, 1e9, {"float32": 1e9}))

    weights, token = found.serving[0].weight_bytes, found.serving[0].cache_bytes_per_token
    rooms = [fit(memory).cache_tokens["float32"] for memory in (weights - 1, weights, weights + token)]
    assert rooms == [None, 0, 1]
    assert [fit(found.training.total_bytes + change).trains for change in (0, -1)] == [True, False]


def test_a_folder_that_cannot_be_loaded_is_not_appraised(tmp_path):
    folder = saved(tmp_path)
    rewrite(folder, "model.norm.weight", torch.ones(23))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[23\], config.json wants \[24\]"):
        appraise(folder)
