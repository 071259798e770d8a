from __future__ import annotations

import subprocess
import sys

import pytest

from llmcourse import sizing
from llmcourse.sizing import PUBLIC_CONFIGS
from tests.peers import peer

# Published totals: the sizes that each model's repository reports for its safetensors files.
PUBLISHED_TOTALS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
}

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


def test_every_public_configuration_has_a_published_total():
    assert set(PUBLIC_CONFIGS) == set(PUBLISHED_TOTALS)


@pytest.mark.parametrize("name", PUBLISHED_TOTALS)
def test_totals_are_the_published_ones(name):
    assert sizing.parameter_breakdown(PUBLIC_CONFIGS[name]).total == PUBLISHED_TOTALS[name]


def parameters_by_part(model) -> dict[str, int]:
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name, parameter in model.named_parameters():  # a tied tensor is yielded once, under its first name
        if "norm" in name:
            part = "norms"
        elif "self_attn" in name:
            part = "attention"
        elif "mlp" in name:
            part = "mlp"
        else:
            part = "head" if "lm_head" in name else "embedding"
        parts[part] += parameter.numel()
    return parts


def transformers_model_on_meta(config: dict):
    transformers = peer("transformers")
    import torch

    families = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_type, model_type = families[config["model_type"]]
    ours_alone = {"model_type", "qkv_bias", "qk_norm"}
    with torch.device("meta"):
        return model_type(config_type(**{k: v for k, v in config.items() if k not in ours_alone}))


@pytest.mark.parametrize("name", PUBLIC_CONFIGS)
def test_each_part_is_what_transformers_builds(name):
    model = transformers_model_on_meta(PUBLIC_CONFIGS[name])
    count = sizing.parameter_breakdown(PUBLIC_CONFIGS[name])
    assert vars(count) == parameters_by_part(model)


@pytest.mark.parametrize(
    "biases", [{"attention_bias": True}, {"mlp_bias": True}], ids=lambda b: next(iter(b))
)
def test_llama_biases_are_counted_as_transformers_builds_them(biases):
    config = TINY | {"model_type": "llama"} | biases
    assert vars(sizing.parameter_breakdown(config)) == parameters_by_part(transformers_model_on_meta(config))


def test_absent_keys_take_the_defaults_of_the_family():
    spelled_out = TINY | {"num_key_value_heads": 6, "head_dim": 4}
    absent = {
        key: TINY[key]
        for key in TINY
        if key not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    }
    null = TINY | {"num_key_value_heads": None, "head_dim": None}
    assert sizing.parameter_breakdown(absent) == sizing.parameter_breakdown(spelled_out)
    assert sizing.parameter_breakdown(null) == sizing.parameter_breakdown(spelled_out)


def test_a_tied_head_counts_once():
    untied = sizing.parameter_breakdown(TINY)
    tied = sizing.parameter_breakdown(TINY | {"tie_word_embeddings": True})
    assert (untied.head, tied.head) == (61 * 24, 0)
    assert untied.total - tied.total == 61 * 24


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"vocab_size": "61"}, "vocab_size must be a positive integer, got '61'"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide num_attention_heads 6"),
        ({"hidden_size": 25, "head_dim": None}, "num_attention_heads 6 does not divide hidden_size 25"),
    ],
)
def test_impossible_configurations_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        sizing.parameter_breakdown(TINY | change)


@pytest.mark.parametrize(
    ("count", "dtype", "size_bytes"),
    [(5, "float64", 40), (5, "float32", 20), (5, "bfloat16", 10), (5, "float16", 10), (5, "float8", 5)]
    + [(5, "int8", 5), (5, "int4", 3), (4, "int4", 2), (0, "int4", 0)],
)
def test_bytes_by_dtype(count, dtype, size_bytes):
    assert sizing.size_bytes(count, dtype) == size_bytes


def test_weight_bytes_are_the_total_times_the_width():
    assert sizing.weight_bytes(PUBLIC_CONFIGS["Llama-3.1-70B"]) == 2 * 70_553_706_496
    assert sizing.weight_bytes(PUBLIC_CONFIGS["Llama-3.2-1B"], "int4") == 1_235_814_400 // 2


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="dtype 'float12' is not known; known are float64, float32"):
        sizing.size_bytes(1, "float12")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, (2, 2, 4, 8)),
        ({"weight": "float32"}, (4, 4, 0, 8)),
        ({"gradient": "float32"}, (2, 4, 4, 8)),
        ({"weight": "float32", "optimizer": "momentum"}, (4, 4, 0, 4)),
        ({"weight": "float32", "optimizer": "sgd"}, (4, 4, 0, 0)),
    ],
    ids=str,
)
def test_training_bytes_by_part(options, parts):
    found = sizing.training_bytes_per_parameter(**options)
    assert (found.weight, found.gradient, found.master_weight, found.optimizer_state) == parts
    assert found.total == sum(parts)


@pytest.mark.parametrize("optimizer", sizing.OPTIMIZER_STATE_BYTES)
def test_optimizer_state_is_what_torch_keeps(optimizer):
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.ones(1000)
    built = {
        "sgd": lambda: torch.optim.SGD([parameter], lr=0.1),
        "momentum": lambda: torch.optim.SGD([parameter], lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW([parameter], lr=0.1),
    }[optimizer]()
    built.step()
    kept = [value for value in built.state[parameter].values() if isinstance(value, torch.Tensor)]
    state_bytes = sum(
        value.nbytes for value in kept if value.shape == parameter.shape
    )  # leaves out the step count
    assert state_bytes == 1000 * sizing.OPTIMIZER_STATE_BYTES[optimizer]


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="optimizer 'rmsprop' is not known; known are sgd, momentum, adamw"):
        sizing.training_bytes_per_parameter(optimizer="rmsprop")


@pytest.mark.parametrize(("mlp", "count"), [(False, 13_631_488), (True, 41_943_040)])
def test_lora_parameters_of_llama_8b_by_every_matrix(mlp, count):
    width, key_value_width, hidden = 4096, 1024, 14_336  # of the published shapes
    matrices = [(width, width), (width, width), (key_value_width, width), (key_value_width, width)]
    matrices += [(hidden, width), (hidden, width), (width, hidden)] if mlp else []
    by_hand = 32 * sum(16 * out + 16 * inputs for out, inputs in matrices)
    assert sizing.lora_parameters(PUBLIC_CONFIGS["Llama-3.1-8B"], rank=16, mlp=mlp) == by_hand == count


def test_a_rank_below_1_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        sizing.lora_parameters(PUBLIC_CONFIGS["Llama-3.1-8B"], rank=0)


def test_kv_cache_bytes_of_public_models():
    # 2 x layers x KV heads x head_dim x 2 bytes, worked out by hand from the published shapes.
    assert sizing.kv_cache_bytes_per_token(PUBLIC_CONFIGS["Llama-3.1-8B"]) == 131_072
    assert sizing.kv_cache_bytes_per_token(PUBLIC_CONFIGS["Llama-3.1-70B"]) == 327_680
    assert sizing.kv_cache_bytes_per_token(PUBLIC_CONFIGS["Qwen3-0.6B"], "int8") == 57_344


def test_kv_cache_bytes_are_those_the_model_allocates():
    from llmcourse.model import Decoder, ModelConfig

    cache = Decoder(ModelConfig(**TINY)).new_cache(batch_size=1, capacity_tokens=5)
    assert cache.keys.nbytes + cache.values.nbytes == 5 * sizing.kv_cache_bytes_per_token(TINY, "float32")


def flops_that_torch_counts(config: dict, *, context_tokens: int, training: bool = False) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from llmcourse.model import Decoder, ModelConfig

    model = Decoder(ModelConfig(**config))
    cache = None
    token = torch.zeros(1, 1, dtype=torch.long)
    if not training:
        cache = model.new_cache(batch_size=1, capacity_tokens=context_tokens)
        cache.length_tokens = context_tokens - 1
    # The counter knows the plain products of the MATH backend; it has no entry for the CPU's fused attention.
    with (
        torch.set_grad_enabled(training),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        logits = model(token, cache=cache)
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("context_tokens", [1, 9])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_forward_flops_are_those_torch_counts(context_tokens, tied):
    config = TINY | {"tie_word_embeddings": tied}
    counted = flops_that_torch_counts(config, context_tokens=context_tokens)
    assert sizing.flops_per_token(config, context_tokens=context_tokens) == counted


def test_training_flops_are_those_torch_counts():
    counted = flops_that_torch_counts(TINY, context_tokens=1, training=True)
    assert sizing.flops_per_token(TINY, context_tokens=1, training=True) == counted


def test_a_token_without_context_is_refused():
    with pytest.raises(ValueError, match="context_tokens must be at least 1"):
        sizing.flops_per_token(TINY, context_tokens=0)


def test_sizing_imports_no_torch():
    program = "import sys, llmcourse.sizing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
