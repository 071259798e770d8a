from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest

from llmcourse.configuration import FAMILIES, Llama3Scaling, ModelConfig, read_architecture
from llmcourse.sizing import PUBLIC_CONFIGS
from tests.peers import peer

REPOSITORY = Path(__file__).parents[1]
TINY = ModelConfig(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rope_theta=500.0,
    max_position_embeddings=128,
)
SCALING = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a sound config.json of a Llama, for tests to change."""
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    return tmp_path


def edit_json(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def as_family(folder: Path, architecture: str, **changes: object) -> ModelConfig:
    """The configuration that the folder's file describes once it names that architecture."""
    model_type = FAMILIES[architecture].model_type
    edit_json(folder / "config.json", architectures=[architecture], model_type=model_type, **changes)
    return ModelConfig.from_folder(folder)


def test_a_configuration_is_frozen_and_fills_in_its_defaults():
    config = ModelConfig(
        vocab_size=9, hidden_size=12, intermediate_size=5, num_hidden_layers=1, num_attention_heads=3
    )
    assert (config.num_key_value_heads, config.head_dim) == (3, 4)
    with pytest.raises(FrozenInstanceError):
        config.head_dim = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": 40.0}, "hidden_size must be a positive integer, got 40.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number, got inf"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"qk_norm": 1}, "qk_norm must be true or false, got 1"),
        ({"qkv_bias": 0}, "qkv_bias must be true or false, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": 9}, "head_dim must be even"),
        ({"vocab_size": 2**40}, "a matrix of 43,980,465,111,040 weights"),
        ({"num_attention_heads": 2**62}, "a matrix of .* weights"),
        ({"hidden_size": 42, "head_dim": None}, "num_attention_heads 4 does not divide hidden_size 42"),
    ],
)
def test_impossible_configurations_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"factor": 0}, "rope_scaling.factor must be a positive number, got 0"),
        ({"low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
    ],
)
def test_impossible_scalings_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(SCALING, **change)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 7e3}},
        {"rope_theta": 7e3, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 7e3, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    ],
    ids=["version 5", "version 4", "version 4, first form"],
)
def test_every_spelling_of_rope_is_read(saved, spelling):
    edit_json(saved / "config.json", **{"rope_theta": "absent", "rope_scaling": "absent"} | spelling)
    config = ModelConfig.from_folder(saved)
    assert (config.rope_theta, config.rope_scaling) == (7e3, SCALING)


def test_absent_optional_keys_take_the_defaults_of_the_family(saved):
    optional = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings")
    edit_json(saved / "config.json", architectures="absent", **dict.fromkeys(optional, "absent"))
    config = ModelConfig.from_folder(saved)
    assert (config.num_key_value_heads, config.head_dim) == (4, 10)
    assert (config.rope_theta, config.rope_scaling, config.tie_word_embeddings) == (10_000.0, None, False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel' is not known; known are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
            "Qwen3ForCausalLM$",
        ),
        (
            {"architectures": "absent", "model_type": "gpt2"},
            "model_type 'gpt2' is not known; known are Llama",
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
            "'Qwen3MoeForCausalLM' is not known",
        ),
        ({"architectures": "absent", "model_type": ["qwen2"]}, r"model_type \['qwen2'\] is not known"),
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            "architecture Qwen2ForCausalLM and model_type 'llama' name two families",
        ),
        ({"architectures": [{}]}, "architecture {} is not known"),
        ({"architectures": 3}, "architectures must be a list of names, got 3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not known; known are default, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor, .* missing"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": -1}}, "rope_scaling.factor must be"),
        ({"rope_scaling": [8]}, "rope_scaling must be one set of values for all layers"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters must be one set"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not known"),
        ({"sliding_window": 127}, "config.json: sliding_window 127 is not supported, and in force .* of 128"),
        ({"sliding_window": "4k"}, "sliding_window must be a positive integer, got '4k'"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantized"),
        ({"hidden_size": "absent", "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_size": "40"}, "config.json: hidden_size must be a positive integer, got '40'"),
    ],
)
def test_a_config_file_that_we_would_misread_is_refused(saved, changes, complaint):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.from_folder(saved)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
    ids=["cut", "binary", "deep", "list"],
)
def test_a_config_file_that_is_no_json_object_is_refused(saved, text, complaint):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.from_folder(saved)


@pytest.mark.parametrize("read", [ModelConfig.from_folder, read_architecture], ids=["all", "architecture"])
def test_a_folder_without_config_is_refused(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"expected .*config.json"):
        read(tmp_path)


# -------------------------------------------------------------------------------------------------- the families


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_silent_file_means_is_what_transformers_takes(architecture):
    config_type = getattr(peer("transformers"), architecture.replace("ForCausalLM", "Config"))
    theirs, family = config_type(), FAMILIES[architecture]
    taken = {name: getattr(theirs, name) for name in family.silent}
    if family.model_type.startswith("qwen"):
        assert taken.pop("sliding_window") is None  # it is read only where use_sliding_window is on
        assert config_type(use_sliding_window=True).sliding_window == family.silent["sliding_window"]
    assert taken == {name: value for name, value in family.silent.items() if name in taken}
    # What families share is the default of ModelConfig itself.
    ours = replace(TINY, rope_theta=ModelConfig.rope_theta)
    for name in ("rms_norm_eps", "tie_word_embeddings"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta


@pytest.mark.parametrize("name", PUBLIC_CONFIGS)
def test_switches_of_public_models_follow_from_their_architecture(saved, name):
    published = PUBLIC_CONFIGS[name] | {"sliding_window": None}
    ours_alone = ("qkv_bias", "qk_norm")
    text = json.dumps({key: value for key, value in published.items() if key not in ours_alone})
    (saved / "config.json").write_text(text)
    found = asdict(ModelConfig.from_folder(saved))
    assert {key: bool(found[key]) for key in ours_alone} == {key: published[key] for key in ours_alone}
    assert found["head_dim"] == published["head_dim"]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_biases_are_read_only_where_the_family_has_them(saved, architecture):
    found = as_family(saved, architecture, attention_bias=True, mlp_bias=True, qk_norm=True, qkv_bias=True)
    switches = (found.attention_bias, found.mlp_bias, bool(found.qkv_bias), bool(found.qk_norm))
    assert (
        switches
        == {
            "LlamaForCausalLM": (True, True, False, False),
            "MistralForCausalLM": (False, False, False, False),
            "Qwen2ForCausalLM": (False, False, True, False),
            "Qwen3ForCausalLM": (True, False, False, True),
        }[architecture]
    )


@pytest.mark.parametrize(
    ("switches", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
        ({"qkv_bias": True}, "Qwen2ForCausalLM"),
        ({"qk_norm": True}, "Qwen3ForCausalLM"),
        ({"qk_norm": True, "attention_bias": True}, "Qwen3ForCausalLM"),
    ],
    ids=str,
)
def test_a_written_configuration_names_its_family_and_reads_back(tmp_path, switches, architecture):
    config = replace(TINY, rope_scaling=SCALING, **switches)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert read_architecture(tmp_path) == architecture
    assert ModelConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        ({"qkv_bias": True, "mlp_bias": True}, "no known family has mlp_bias and qkv_bias together"),
        ({"qk_norm": True, "qkv_bias": True}, "no known family has qkv_bias and qk_norm together"),
    ],
    ids=str,
)
def test_a_configuration_of_no_family_is_not_written(switches, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(TINY, **switches).to_json()


def test_a_switch_that_is_off_is_as_good_as_absent():
    """A training is recognised by its configuration: the two later switches must not make another of an old one."""
    off = replace(TINY, qkv_bias=False, qk_norm=False)
    assert off == TINY
    assert asdict(off)["qkv_bias"] is asdict(off)["qk_norm"] is None


def test_a_mistral_file_that_is_silent_has_a_window(saved):
    edit_json(saved / "config.json", max_position_embeddings="absent")
    with pytest.raises(ValueError, match="sliding_window 4096 .* in a context of 131072 tokens"):
        as_family(saved, "MistralForCausalLM")
    assert as_family(saved, "MistralForCausalLM", max_position_embeddings=4096)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"use_sliding_window": "no"}, "use_sliding_window must be true or false, got 'no'"),
        ({"max_window_layers": 1.5}, "max_window_layers must be a whole number of layers, got 1.5"),
        ({"max_window_layers": True}, "max_window_layers must be a whole number of layers, got True"),
        (
            {"layer_types": "full_attention"},
            "layer_types must be a list of full_attention and sliding_attention",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must be a list"),
        ({"layer_types": [{}]}, "layer_types must be a list"),
        (
            {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 0},
            "a positive integer, got 0",
        ),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "a positive integer, got None"),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8},
            "sliding_window 8 is not",
        ),
    ],
    ids=str,
)
def test_a_window_by_layers_that_we_would_misread_is_refused(saved, architecture, changes, complaint):
    with pytest.raises(ValueError, match=f"config.json: .*{complaint}"):
        as_family(saved, architecture, **changes)


def test_a_qwen_without_a_window_may_switch_it_on(saved):
    changes = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}
    assert as_family(saved, "Qwen2ForCausalLM", **changes).qkv_bias


def test_reading_a_configuration_needs_no_torch():
    program = "import sys; from llmcourse import configuration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
