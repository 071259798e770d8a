from __future__ import annotations

import gc
import json
import shutil
import stat
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from llmcourse import model as model_module
from llmcourse.model import (
    Decoder,
    Llama3Scaling,
    ModelConfig,
    inverse_frequencies,
    load_checkpoint,
    save_checkpoint,
    stored_weights,
)
from tests.peers import peer

# No two widths agree, so that a transposed or swapped matrix cannot fit: 4 heads of 12 make 48, not 40.
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
# Wavelengths at theta 500 run from 6 to 1,115 positions: with 32 original positions some pairs stay, some are
# slowed down in full and some are interpolated.
SCALING = Llama3Scaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
# The largest difference that the course allows itself against transformers, for logits of rms 1 or more: float32
# resolves 1.2e-7, and a hundred sums of about a hundred such terms stay two orders below it.
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A sound untied checkpoint in three shards, for tests to damage."""
    folder = tmp_path / "saved"
    save_checkpoint(Decoder(TINY), folder, max_shard_bytes=60_000)
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter, norms and biases too, values that matter: fresh norms are all 1, biases all 0."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)


def some_tokens(count: int = 80, *, batch_size: int = 2) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (batch_size, count))


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def edit_json(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


# ------------------------------------------------------------------------------------ against transformers


# Each family with what sets it apart. TINY's head_dim is no quotient of its sizes; Qwen2's is where it is absent.
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True}),
}
every_family = pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=list(FAMILIES))
SWITCHES = [{}, {"qkv_bias": True}, {"qk_norm": True}, {"qk_norm": True, "attention_bias": True}]


def save_with_transformers(
    folder: Path,
    family: str = "Llama",
    *,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    **changes: object,
):
    """Save a random model of transformers' own there, and give it back."""
    transformers = peer("transformers")
    settings = TINY.to_json() | changes
    del settings["architectures"], settings["model_type"]  # the class says them
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**settings)
    )
    randomize(theirs)
    theirs.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs.eval()


@torch.inference_mode()
def assert_same_logits(ours: Decoder, theirs, *, token_count: int = 80) -> None:
    """For the tokens fed at once, and fed in three parts through the cache."""
    tokens = some_tokens(token_count)
    expected = theirs(tokens).logits
    assert expected.square().mean().sqrt() > 1.0  # else the tolerance would let anything pass
    assert (ours(tokens) - expected).abs().max() <= LOGIT_TOLERANCE
    cache = ours.new_cache(batch_size=2, capacity_tokens=token_count)
    parts = [ours(part, cache=cache) for part in tokens.split([token_count - 20, 1, 19], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_logits_are_those_of_transformers(tmp_path, tied, max_shard_size, scaling):
    written = replace(TINY, tie_word_embeddings=tied, rope_scaling=scaling)
    theirs = save_with_transformers(tmp_path, max_shard_size=max_shard_size, **written.to_json())
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    ours = load_checkpoint(tmp_path)
    assert ours.config == written
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 0.1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_variants_have_the_logits_of_transformers(tmp_path, changes):
    theirs = save_with_transformers(tmp_path, **changes)
    assert_same_logits(load_checkpoint(tmp_path), theirs)


@every_family
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
def test_every_family_has_the_logits_of_transformers(tmp_path, family, changes, tied, max_shard_size):
    changes = changes | {"tie_word_embeddings": tied}
    theirs = save_with_transformers(tmp_path, family, max_shard_size=max_shard_size, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    ours = load_checkpoint(tmp_path)
    assert ours.config.head_dim == 12 != ours.config.hidden_size // ours.config.num_attention_heads
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_of_every_float_type_have_the_logits_of_transformers(tmp_path, family, dtype):
    """Computed in float32 on both sides, from the same rounded weights."""
    saved = save_with_transformers(tmp_path, family, dtype=dtype, sliding_window=None)
    theirs = type(saved).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert {parameter.dtype for parameter in load_checkpoint(tmp_path).parameters()} == {dtype}
    assert_same_logits(load_checkpoint(tmp_path, dtype=torch.float32), theirs)


def test_a_head_dimension_that_the_file_leaves_out_is_the_quotient(tmp_path):
    theirs = save_with_transformers(tmp_path, "Qwen2", head_dim=10)
    edit_json(tmp_path / "config.json", head_dim="absent")
    ours = load_checkpoint(tmp_path)
    assert ours.config.head_dim == 10
    assert_same_logits(ours, theirs)


WINDOW_WITHOUT_EFFECT = [
    ("Mistral", {"sliding_window": TINY.max_position_embeddings}),
    ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    ("Qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}),
    ("Qwen3", {"sliding_window": TINY.max_position_embeddings, "use_sliding_window": True}),
    (
        "Qwen3",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
        | {"layer_types": ["full_attention"] * 2},
    ),
]


@pytest.mark.parametrize(("family", "changes"), WINDOW_WITHOUT_EFFECT, ids=str)
def test_a_window_that_hides_nothing_is_read_and_changes_nothing(tmp_path, family, changes):
    theirs = save_with_transformers(tmp_path, family, **changes)
    # All of the context: a window of as many tokens still shows its last one the first.
    assert_same_logits(load_checkpoint(tmp_path), theirs, token_count=TINY.max_position_embeddings)


WINDOW_IN_FORCE = [
    ("Mistral", {"sliding_window": 16}),
    ("Qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    (
        "Qwen3",
        {"sliding_window": 16, "use_sliding_window": True}
        | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
]


@pytest.mark.parametrize(("family", "changes"), WINDOW_IN_FORCE, ids=str)
def test_a_window_in_force_is_refused_and_would_have_changed_the_logits(tmp_path, family, changes):
    theirs = save_with_transformers(tmp_path, family, **changes)
    window, context = changes["sliding_window"], TINY.max_position_embeddings
    with pytest.raises(
        ValueError, match=f"sliding_window {window} is not supported, and in force in a context"
    ):
        load_checkpoint(tmp_path)
    # What the message offers: with the shorter context it loads, and inputs of that length are right.
    edit_json(tmp_path / "config.json", max_position_embeddings=window)
    ours, tokens = load_checkpoint(tmp_path), some_tokens(context)
    with torch.inference_mode():
        difference = (ours(tokens) - theirs(tokens).logits).abs().amax(dim=(0, 2))  # by position
    assert difference[:window].max() <= LOGIT_TOLERANCE
    assert difference[window:].max() > 100 * LOGIT_TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [None, 60_000], ids=["single", "sharded"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_transformers_loads_what_we_save(tmp_path, tied, max_shard_bytes, switches):
    transformers = peer("transformers")
    ours = Decoder(replace(TINY, tie_word_embeddings=tied, rope_scaling=SCALING, **switches))
    randomize(ours)
    save_checkpoint(ours, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, theirs.eval())


# --------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("switches", [{"attention_bias": True, "mlp_bias": True}, *SWITCHES[1:]], ids=str)
def test_fresh_weights_have_the_documented_spread(switches):
    model = Decoder(replace(TINY, **switches))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            # The spread of n normal values varies by 1 / sqrt(2 n) of itself; 960 is the smallest n. 7 sigma.
            assert parameter.std().item() == pytest.approx(0.02, rel=7 / (2 * 960) ** 0.5), name


def test_a_bfloat16_norm_rounds_twice_only():
    norm = model_module.RMSNorm(64, eps=1e-6)
    x = torch.randn(300, 64).bfloat16()
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    norm.bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    # bfloat16 keeps 8 bits, so rounds by 2^-8 at most: once before the weight and once after it.
    assert ((norm(x).double() - expected).abs() <= 2.01 * 2**-8 * expected.abs()).all()


# ------------------------------------------------------------------------------------------ rotary, cache


def test_scaled_frequencies_stay_slow_down_or_lie_between():
    plain = inverse_frequencies(TINY)
    scaled = inverse_frequencies(replace(TINY, rope_scaling=SCALING))
    turns = 32 * plain / (2 * torch.pi)
    fast, slow = turns >= 4, turns <= 1
    between = ~fast & ~slow
    assert fast.any() and slow.any() and between.any()
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.equal(scaled[slow], plain[slow] / 8)
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_logits_depend_on_order_and_never_on_what_follows():
    model = Decoder(TINY)
    randomize(model)
    tokens = some_tokens(12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after, reversed_ = model(tokens), model(changed), model(tokens.flip(1))
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3
    assert (before[:, -1] - reversed_.flip(1)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [[1] * 20, [20], [7, 1, 1, 5, 1, 5], [1, 19]], ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_cached_decode_matches_full_forward(steps, switches):
    model = Decoder(replace(TINY, rope_scaling=SCALING, **switches)).double()
    randomize(model)
    tokens = some_tokens(20)
    cache = model.new_cache(batch_size=2, capacity_tokens=24)
    with torch.inference_mode():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
    assert cache.length_tokens == 20
    # float64 throughout: only the order of sums differs, at 2.2e-16 times logits of order 10.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-11)


def test_generate_appends_the_likeliest_token_each_time():
    model = Decoder(TINY)
    randomize(model)
    tokens = some_tokens(5)
    found = model.generate(tokens, new_tokens=6)
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((2, 5), "0 cached and 5 new tokens exceed capacity_tokens 4"),
        ((3, 1), "made for batch_size 2, got 3"),
        ((2,), r"tokens must be \[batch, tokens\], got shape \[2\]"),
    ],
)
@torch.no_grad()
def test_tokens_that_do_not_fit_are_refused(shape, complaint):
    model = Decoder(TINY)
    cache = model.new_cache(batch_size=2, capacity_tokens=4)
    with pytest.raises(ValueError, match=complaint):
        model(torch.zeros(shape, dtype=torch.long), cache=cache)
    assert cache.length_tokens == 0


def test_a_cache_is_refused_while_gradients_are_on():
    model = Decoder(TINY)
    with pytest.raises(ValueError, match="a cache is for decoding only"):
        model(some_tokens(1), cache=model.new_cache(batch_size=2, capacity_tokens=1))


def test_rotary_frequencies_survive_casts_and_empty_storage():
    expected = inverse_frequencies(TINY)
    cast = Decoder(TINY).to(torch.bfloat16)
    assert torch.equal(cast.model.rotary_emb.inv_freq, expected)
    with torch.device("meta"):
        emptied = Decoder(TINY)
    assert torch.equal(emptied.to_empty(device="cpu").model.rotary_emb.inv_freq, expected)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [None, 60_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, tied, max_shard_bytes, dtype, switches):
    model = Decoder(replace(TINY, tie_word_embeddings=tied, rope_scaling=SCALING, **switches)).to(dtype)
    randomize(model)
    save_checkpoint(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path / "saved")
    assert loaded.config == model.config
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    assert torch.equal(loaded.model.rotary_emb.inv_freq, inverse_frequencies(model.config))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_tied_head_is_saved_once_and_stays_tied_in_training(tmp_path):
    save_checkpoint(Decoder(replace(TINY, tie_word_embeddings=True)), tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    model = load_checkpoint(tmp_path / "saved")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.lm_head.weight.detach().clone()
    model(some_tokens(6)).square().mean().backward()
    optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, before)


def test_training_a_loaded_model_leaves_the_file_alone(saved):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    model = load_checkpoint(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon from /proc, which only Linux has")
def test_loading_takes_no_memory_beside_the_file(tmp_path):
    config = replace(TINY, hidden_size=512, intermediate_size=4096, num_hidden_layers=2)
    model = Decoder(config)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes > 48 * 2**20
    save_checkpoint(model, tmp_path / "saved", max_shard_bytes=2**24)
    del model
    gc.collect()
    before = anonymous_bytes()
    loaded = load_checkpoint(tmp_path / "saved")
    assert sum(parameter.nbytes for parameter in loaded.parameters()) == weight_bytes
    # Mapped, so near zero; the allocator and the modules themselves account for less than an eighth.
    assert anonymous_bytes() - before < weight_bytes / 8


def anonymous_bytes() -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_weights_are_converted_when_a_dtype_is_named(saved):
    model = load_checkpoint(saved, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be a floating-point type, got torch.int8"):
        load_checkpoint(saved, dtype=torch.int8)


@pytest.mark.gpu
def test_a_checkpoint_loads_onto_a_gpu(saved):
    tokens = some_tokens(9)
    with torch.no_grad():
        expected = load_checkpoint(saved, dtype=torch.float64)(tokens)
        found = load_checkpoint(saved, device="cuda", dtype=torch.float64)(tokens.cuda()).cpu()
    # Products and sums are float64; the angles' cosines are float32 on both, some units of 1.2e-7 apart.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def rewrite_shard(folder: Path, change, holding: str = "model.layers.0.input_layernorm.weight") -> str:
    """Let `change` edit in place the tensors of the shard that holds that one; the name of that shard."""
    (path,) = (folder / name for name in shard_names(folder) if holding in load_file(folder / name))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def edit_weight_map(folder: Path, **changes: object) -> None:
    path = folder / "model.safetensors.index.json"
    placed = json.loads(path.read_text())["weight_map"] | changes
    placed = {name: shard for name, shard in placed.items() if shard != "absent"}
    path.write_text(json.dumps({"weight_map": placed}))


EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"


def test_missing_and_unexpected_tensors_are_named_together(tmp_path):
    save_checkpoint(Decoder(TINY), tmp_path / "saved")
    rewrite_shard(tmp_path / "saved", lambda tensors: tensors.update({"model.surplus": tensors.pop(NORM)}))
    with pytest.raises(ValueError, match=f"missing {NORM}; unexpected model.surplus"):
        load_checkpoint(tmp_path / "saved")


BIAS = "model.layers.1.self_attn.v_proj.bias"
HEAD_NORM = "model.layers.0.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("switches", "architecture", "complaint"),
    [
        ({}, "Qwen2ForCausalLM", r"missing model\.layers\.0\.self_attn\.q_proj\.bias, .* and 1 more$"),
        ({}, "Qwen3ForCausalLM", f"missing .*{HEAD_NORM}"),
        ({"qkv_bias": True}, "LlamaForCausalLM", "unexpected .*self_attn.q_proj.bias"),
        ({"qk_norm": True}, "MistralForCausalLM", "unexpected .*self_attn.k_norm.weight"),
        (
            {"qkv_bias": True},
            "Qwen3ForCausalLM",
            "missing .*q_norm.weight.*; unexpected .*self_attn.q_proj.bias",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_weights_of_another_family_are_refused(tmp_path, switches, architecture, complaint):
    save_checkpoint(Decoder(replace(TINY, **switches)), tmp_path / "saved", max_shard_bytes=60_000)
    edit_json(
        tmp_path / "saved" / "config.json",
        architectures=[architecture],
        model_type="absent",
        sliding_window=None,
    )
    with pytest.raises(ValueError, match=complaint):
        load_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize(
    ("switches", "name", "wrong", "complaint"),
    [
        ({"qkv_bias": True}, BIAS, torch.ones(1), rf"{BIAS} has shape \[1\], config.json wants \[24\]"),
        (
            {"qk_norm": True},
            HEAD_NORM,
            torch.ones(48),
            rf"{HEAD_NORM} has shape \[48\], config.json wants \[12\]",
        ),
        ({"qkv_bias": True}, BIAS, None, f"places {BIAS} in shards that do not hold"),
        ({"qk_norm": True}, HEAD_NORM, None, f"places {HEAD_NORM} in shards that do not hold"),
    ],
    ids=["bias shape", "norm over all heads", "no bias", "no norm"],
)
def test_a_damaged_bias_or_head_norm_is_named(tmp_path, switches, name, wrong, complaint):
    folder = tmp_path / "saved"
    save_checkpoint(Decoder(replace(TINY, **switches)), folder, max_shard_bytes=60_000)
    rewrite_shard(
        folder,
        lambda tensors: tensors.update({name: wrong}) if wrong is not None else tensors.pop(name),
        name,
    )
    with pytest.raises(ValueError, match=complaint):
        load_checkpoint(folder)


@pytest.mark.parametrize(("switches", "name"), [({"qkv_bias": True}, BIAS), ({"qk_norm": True}, HEAD_NORM)])
def test_an_index_that_misplaces_a_bias_or_head_norm_is_refused(tmp_path, switches, name):
    folder = tmp_path / "saved"
    save_checkpoint(Decoder(replace(TINY, **switches)), folder, max_shard_bytes=60_000)
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    elsewhere = next(shard for shard in shard_names(folder) if shard != placed[name])
    edit_weight_map(folder, **{name: elsewhere})
    with pytest.raises(ValueError, match=f"holds {name}, which the index places in {elsewhere}"):
        load_checkpoint(folder)
    edit_weight_map(folder, **{name: "absent"})
    with pytest.raises(ValueError, match=f"holds {name}, which the index places in no file"):
        load_checkpoint(folder)
    edit_weight_map(folder, **{name: placed[name]})
    (folder / placed[name]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {placed[name]}, which is not in the folder"):
        load_checkpoint(folder)


def test_a_head_that_is_neither_stored_nor_tied_is_missing(tmp_path):
    save_checkpoint(Decoder(replace(TINY, tie_word_embeddings=True)), tmp_path / "saved")
    edit_json(tmp_path / "saved" / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load_checkpoint(tmp_path / "saved")


def test_long_lists_of_names_are_cut(tmp_path):
    save_checkpoint(Decoder(TINY), tmp_path / "saved")
    edit_json(tmp_path / "saved" / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"missing model\.layers\.2\S+(, \S+){4} and 4 more$"):
        load_checkpoint(tmp_path / "saved")


def test_more_layers_than_tensors_are_refused_before_anything_is_built(saved):
    edit_json(saved / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="num_hidden_layers 1000000000, but the files hold 21 tensors"):
        load_checkpoint(saved)


def test_a_wrong_shape_is_refused_even_where_it_would_broadcast(saved):
    rewrite_shard(saved, lambda tensors: tensors.update({NORM: torch.ones(1)}))
    with pytest.raises(ValueError, match=rf"{NORM} has shape \[1\], config.json wants \[40\]"):
        load_checkpoint(saved)


def test_integer_weights_are_refused(saved):
    rewrite_shard(saved, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{NORM} is stored as I8; expected one of F64, F32, BF16, F16"):
        load_checkpoint(saved)


def test_mixed_dtypes_are_refused_until_one_is_named(saved):
    rewrite_shard(saved, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.bfloat16)}))
    with pytest.raises(ValueError, match=f"mixes dtypes .*{NORM} as BF16"):
        load_checkpoint(saved)
    load_checkpoint(saved, dtype=torch.float32)


def test_frequencies_stored_by_old_converters_are_passed_over(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    shard = rewrite_shard(saved, lambda tensors: tensors.update({name: torch.zeros(6)}))
    edit_weight_map(saved, **{name: shard})
    assert torch.equal(load_checkpoint(saved).model.rotary_emb.inv_freq, inverse_frequencies(TINY))


def test_a_tied_head_stored_twice_must_agree(saved):
    edit_json(saved / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="stored with different values"):
        load_checkpoint(saved)


def test_a_tied_head_stored_twice_is_accepted_where_it_agrees(tmp_path):
    save_checkpoint(Decoder(replace(TINY, tie_word_embeddings=True)), tmp_path / "saved")
    rewrite_shard(
        tmp_path / "saved", lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()})
    )
    model = load_checkpoint(tmp_path / "saved")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "shard",
    [
        "../elsewhere.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        7,
        None,
    ],
    ids=repr,
)
def test_an_index_that_leaves_the_folder_is_refused(saved, shard):
    edit_weight_map(saved, **{EMBEDDING: shard})
    with pytest.raises(ValueError, match="expected the name of a file in the same folder"):
        load_checkpoint(saved)


@pytest.mark.parametrize("weight_map", [{}, [], None, "absent"], ids=repr)
def test_an_index_without_a_weight_map_is_refused(saved, weight_map):
    edit_json(saved / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match="must hold a weight_map"):
        load_checkpoint(saved)


def test_a_missing_shard_is_named(saved):
    gone = shard_names(saved)[1]
    (saved / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {gone}, which is not in the folder"):
        load_checkpoint(saved)


def test_a_tensor_placed_in_another_shard_is_refused(saved):
    edit_weight_map(saved, **{EMBEDDING: shard_names(saved)[1]})
    with pytest.raises(
        ValueError, match=f"holds {EMBEDDING}, which the index places in {shard_names(saved)[1]}"
    ):
        load_checkpoint(saved)


def test_a_tensor_that_the_index_forgets_is_refused(saved):
    edit_weight_map(saved, **{NORM: "absent"})
    with pytest.raises(ValueError, match=f"holds {NORM}, which the index places in no file"):
        load_checkpoint(saved)


def test_a_tensor_that_its_shard_lacks_is_refused(saved):
    rewrite_shard(saved, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ValueError, match=f"places {NORM} in shards that do not hold"):
        load_checkpoint(saved)


def test_a_folder_without_weights_is_refused(saved):
    for path in saved.glob("model*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or model.safetensors.index.json"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 20 + data[28:],
    ],
    ids=["empty", "no length", "no header", "one byte short", "one byte more", "huge header", "no UTF-8"],
)
def test_a_damaged_shard_is_named(saved, damage):
    path = saved / shard_names(saved)[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is not a sound safetensors file"):
        load_checkpoint(saved)


def test_what_files_hold_is_read_from_their_headers(saved):
    parameters = sum(parameter.numel() for parameter in load_checkpoint(saved).parameters())
    found = stored_weights(saved)
    assert found.files == tuple(shard_names(saved))
    assert (found.values, found.size_bytes) == ({torch.float32: parameters}, 4 * parameters)
    rewrite_shard(saved, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.bfloat16)}))
    found = stored_weights(saved)
    assert found.values == {torch.float32: parameters - 40, torch.bfloat16: 40}
    assert found.size_bytes == 4 * parameters - 2 * 40


def test_what_cannot_be_loaded_is_not_described_either(saved):
    (saved / shard_names(saved)[1]).unlink()
    with pytest.raises(FileNotFoundError, match="which is not in the folder"):
        stored_weights(saved)


@pytest.mark.parametrize("max_shard_bytes", [40_000, 60_000, 200_000])
def test_shards_keep_the_limit_and_the_index_says_the_size(tmp_path, max_shard_bytes):
    model = Decoder(TINY)
    save_checkpoint(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    sizes = [(tmp_path / "saved" / name).stat().st_size for name in shard_names(tmp_path / "saved")]
    assert max(sizes) <= max_shard_bytes
    assert (len(sizes) == 1) == (max_shard_bytes == 200_000)
    if len(sizes) > 1:
        index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())


def test_a_file_is_filled_to_the_limit_and_its_header_counts():
    state = Decoder(TINY).state_dict()

    def file_bytes(names: list[str]) -> int:
        return len(save({name: state[name] for name in names}, metadata={"format": "pt"}))

    for max_shard_bytes in range(20_000, 60_000, 97):
        shards = list(model_module._split(state, max_shard_bytes))
        assert sum(shards, []) == list(state)
        for shard, following in pairwise([*shards, []]):
            assert file_bytes(shard) <= max_shard_bytes
            # One tensor more would not have fitted, but for what is reckoned too high: 8 bytes of padding, and
            # the digits of each tensor's two offsets, 5 for the limit where the offset itself has 1 to 5.
            too_high = 8 + 8 * (len(shard) + 1)
            assert not following or file_bytes([*shard, following[0]]) > max_shard_bytes - too_high


def test_a_weight_that_is_not_contiguous_is_saved_as_it_reads(tmp_path):
    model = Decoder(TINY)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 97).t())
    save_checkpoint(model, tmp_path / "saved")
    assert torch.equal(load_checkpoint(tmp_path / "saved").lm_head.weight, model.lm_head.weight)


def test_a_tensor_larger_than_the_limit_gets_its_own_file(tmp_path):
    save_checkpoint(Decoder(TINY), tmp_path / "saved", max_shard_bytes=9_000)
    held = []
    for name in shard_names(tmp_path / "saved"):
        with safe_open(tmp_path / "saved" / name, framework="pt") as file:
            held.append(list(file.keys()))
    assert [EMBEDDING] in held and ["lm_head.weight"] in held
    assert all(held)
    load_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize("max_shard_bytes", [0, -1, 1.5])
def test_an_impossible_limit_is_refused(tmp_path, max_shard_bytes):
    with pytest.raises(ValueError, match="max_shard_bytes must be a positive integer"):
        save_checkpoint(Decoder(TINY), tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(saved):
    before = sorted(path.name for path in saved.iterdir())
    with pytest.raises(FileExistsError, match="exists already"):
        save_checkpoint(Decoder(TINY), saved)
    with pytest.raises(FileExistsError, match="exists already"):
        save_checkpoint(Decoder(TINY), saved / "config.json")
    assert sorted(path.name for path in saved.iterdir()) == before


def test_an_empty_folder_may_be_saved_into(tmp_path):
    save_checkpoint(Decoder(TINY), tmp_path)
    load_checkpoint(tmp_path)


@pytest.mark.parametrize("failing_write", [0, 1, 2])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, failing_write, failure):
    written = []

    def save_until_failure(tensors, path, metadata):
        if len(written) == failing_write:
            Path(path).write_bytes(b"half a fi")
            raise failure
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(model_module, "save_file", save_until_failure)
    with pytest.raises(type(failure)):
        save_checkpoint(Decoder(TINY), tmp_path / "saved", max_shard_bytes=60_000)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_as_readable_as_the_config(saved):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 1


def test_a_model_without_storage_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = Decoder(TINY)
    with pytest.raises(ValueError, match="nothing to save: .* are on the meta device"):
        save_checkpoint(model, tmp_path / "saved")


def test_a_loaded_model_outlives_its_folder(saved):
    tokens = some_tokens(4)
    model = load_checkpoint(saved)
    with torch.no_grad():
        before = model(tokens)
        shutil.rmtree(saved)
        assert torch.equal(model(tokens), before)


# ------------------------------------------------------------------------------------------------------ peers


def test_a_missing_peer_is_skipped_with_what_to_install(monkeypatch):
    monkeypatch.delenv("LLMCOURSE_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install nosuchpeer with: pip install no-such-peer"):
        peer("nosuchpeer", install="no-such-peer")


def test_a_missing_peer_fails_where_everything_is_required(monkeypatch):
    monkeypatch.setenv("LLMCOURSE_REQUIRE", "all")
    with pytest.raises(pytest.fail.Exception, match="install nosuchpeer with: pip install nosuchpeer"):
        peer("nosuchpeer")


def test_a_broken_peer_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "brokenpeer.py").write_text("import its_missing_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_missing_part"):
        peer("brokenpeer")
