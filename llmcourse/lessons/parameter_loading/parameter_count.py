"""How many parameters a decoder has, from its config.json alone."""

from __future__ import annotations

import tracemalloc
from typing import Any

import torch

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised


@exercise(
    points=3,
    minutes=8,
    forbid=("llmcourse.sizing.parameter_breakdown", "torch.nn.Module.__init__"),
    hints=(
        "List the matrices of one layer with their two sizes: q, k, v, o, gate, up, down. Then norms and biases, then "
        "what stands outside the layers.",
        "q has num_attention_heads * head_dim outputs, which need not be hidden_size; k and v have "
        "num_key_value_heads * head_dim.",
    ),
)
def parameter_count(config: dict[str, Any]) -> int:
    """Number of parameters of a decoder, from its configuration alone; about 15 lines.

    A decoder is an embedding [vocab_size, hidden_size], num_hidden_layers layers, a
    norm and a head [vocab_size, hidden_size] without a bias. A layer is grouped-query
    attention (q, k, v, o), a gated MLP (gate and up to intermediate_size, down from it)
    and two norms. A norm is RMSNorm: hidden_size weights, no bias. Positions are rotary
    and have no parameters. Every attention head is head_dim wide, in q, k and v alike;
    o takes all query heads together.

    config holds model_type, vocab_size, hidden_size, intermediate_size,
    num_hidden_layers, num_attention_heads and keys that do not matter here. These may
    be missing, or None, which means the same:

        num_key_value_heads  then num_attention_heads
        head_dim             then hidden_size // num_attention_heads
        tie_word_embeddings  then False; True: the head is the embedding, one tensor, counted once
        attention_bias       then False; True: a bias each for q, k, v, o (llama, qwen3)
        mlp_bias             then False; True: a bias each for gate, up, down (llama)

    What a family has beyond that stands in its code, not in its config.json: qwen2 has
    biases on q, k and v, never on o; qwen3 has two more norms a layer, one for queries
    and one for keys, of head_dim weights that all heads share; mistral and qwen2 read
    neither of the two bias keys, qwen3 attention_bias alone. ValueError for a
    model_type other than llama, mistral, qwen2, qwen3.

    Nothing is built to be counted: torch.nn.Module is switched off, and tensors cost
    points.
    """
    ### BEGIN SOLUTION
    family, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type is {family!r}; expected llama, mistral, qwen2 or qwen3")
    head_dim = config.get("head_dim") or hidden // heads
    queries = heads * head_dim
    keys = (config.get("num_key_value_heads") or heads) * head_dim

    attention = hidden * (queries + keys + keys + queries)  # q, k, v, o
    mlp = hidden * config["intermediate_size"] * 3  # gate, up, down
    norms = hidden + hidden
    if family == "qwen2":
        attention += queries + keys + keys
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        attention += queries + keys + keys + hidden
    if family == "llama" and config.get("mlp_bias"):
        mlp += config["intermediate_size"] * 2 + hidden
    if family == "qwen3":
        norms += head_dim + head_dim

    layers = config["num_hidden_layers"] * (attention + mlp + norms)
    embedding = config["vocab_size"] * hidden
    head = 0 if config.get("tie_word_embeddings") else embedding
    return embedding + layers + hidden + head
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def configuration(rng, family, **changes):
    """A random configuration: no two sizes are equal, and 12 h^2 or h // heads would not do."""
    key_value_heads, group, head_dim = rng.integer(2, 5), rng.integer(2, 4), 8 * rng.integer(2, 8)
    heads = key_value_heads * group
    hidden = heads * head_dim
    found = {
        "model_type": family,
        "vocab_size": rng.integer(1_000, 4_000),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + rng.integer(3, 400),
        "num_hidden_layers": rng.integer(2, 40),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": False,
        "max_position_embeddings": rng.integer(2_000, 9_000),
        "rope_theta": 10_000.0,
        "torch_dtype": "bfloat16",
        **changes,
    }
    return {key: found[key] for key in rng.shuffled(found)}


@case(parameter_count)
def fewer_key_value_heads(answer, rng):
    """A Llama whose query heads share keys and values."""
    return {"count": answer(configuration(rng, "llama"))}


@case(parameter_count)
def tied_with_biases(answer, rng):
    """A Qwen2 with tied embeddings, and biases that its config.json does not mention."""
    return {"count": answer(configuration(rng, "qwen2", tie_word_embeddings=True))}


@case(parameter_count)
def heads_wider_than_hidden(answer, rng):
    """A Qwen3 whose heads together are wider than hidden_size, and with norms on queries and keys."""
    config = configuration(rng, "qwen3")
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"] + 8 * rng.integer(1, 5)
    return {"count": answer(config), "with biases": answer({**config, "attention_bias": True})}


@case(parameter_count)
def keys_missing_or_null(answer, rng):
    """A Llama whose config.json leaves keys out, or has null in them."""
    config = configuration(rng, "llama", head_dim=None)
    missing = {
        key: value
        for key, value in config.items()
        if key not in ("num_key_value_heads", "tie_word_embeddings")
    }
    null = {**config, "num_key_value_heads": None, "tie_word_embeddings": None, "mlp_bias": None}
    return {"missing": answer(missing), "null": answer(null)}


@case(parameter_count)
def biases_asked_for(answer, rng):
    """A Llama with attention_bias, with mlp_bias, with both, and with both of them False."""
    config = configuration(rng, "llama", head_dim=8 * rng.integer(9, 12))
    return {
        "attention": answer({**config, "attention_bias": True}),
        "mlp": answer({**config, "mlp_bias": True}),
        "both": answer({**config, "attention_bias": True, "mlp_bias": True}),
        "neither": answer({**config, "attention_bias": False, "mlp_bias": False}),
    }


@case(parameter_count)
def biases_not_read(answer, rng):
    """A Mistral and the two Qwens with bias keys that their code does not read."""
    mistral, qwen2, qwen3 = (configuration(rng, family) for family in ("mistral", "qwen2", "qwen3"))
    both, neither = ({"attention_bias": value, "mlp_bias": value} for value in (True, False))
    return {
        "mistral": answer({**mistral, **both}),
        "qwen2": answer({**qwen2, **both}),
        "qwen2 told to have none": answer({**qwen2, **neither}),
        "qwen3": answer({**qwen3, **both}),
    }


@case(parameter_count)
def the_same_keys_in_every_family(answer, rng):
    """Each family with tied embeddings, with keys left out, and with heads of another width."""
    observed = {}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        config = configuration(rng, family)
        observed[f"{family}, tied"] = answer({**config, "tie_word_embeddings": True})
        left_out = ("num_key_value_heads", "tie_word_embeddings")
        observed[f"{family}, left out"] = answer({k: v for k, v in config.items() if k not in left_out})
        width = config["hidden_size"] // config["num_attention_heads"]
        for what, head_dim in (("narrower", width - 2 * rng.integer(1, 4)), ("wider", 2 * width)):
            observed[f"{family}, {what} heads"] = answer({**config, "head_dim": head_dim})
    return observed


@case(parameter_count)
def hundreds_of_billions(answer, rng):
    """A Llama as large as the largest: 32 bits do not hold the number of its parameters."""
    sizes = {"hidden_size": 16_384, "num_attention_heads": 128, "num_key_value_heads": 8}
    layers = {"num_hidden_layers": rng.integer(110, 130), "intermediate_size": 53_248 - rng.integer(1, 999)}
    return {"count": answer({**configuration(rng, "llama", **sizes, **layers), "vocab_size": 128_256})}


@case(parameter_count)
def other_families(answer, rng):
    """Families that are built otherwise, some of a name that begins alike, are refused, beside one that is not."""
    config = configuration(rng, rng.choice(["llama", "mistral"]))
    known = rng.choice(["mixtral", "gpt2", "deepseek_v3", "mamba", "opt"])
    alike = rng.choice(["llama4_text", "mistral3", "mistral4", "qwen3_next", "qwen2_vl", "qwen2_5_vl"])
    others = {"known": known, "moe": rng.choice(["qwen2_moe", "qwen3_moe"]), "alike": alike}
    others["new"] = f"model_{rng.bytes(3).hex()}"
    refused = {what: raised(answer, {**config, "model_type": other}) for what, other in others.items()}
    return {"count": answer(config), **refused}


@cost(parameter_count, share=1 / 3)
def nothing_built(answer, rng):
    """Counts without allocating what it counts."""
    config = configuration(rng, "llama")
    answer(configuration(rng, "llama"))  # whatever an answer imports on its first call is not counted
    tracemalloc.start()
    with TensorWork() as work:
        count = answer(config)
    python_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "observed": count,
        "bytes of tensors": (work.allocated_bytes, 0),
        "bytes of Python and numpy": (python_bytes, 65_536),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


def counted(
    config,
    *,
    norms=2,
    matrices=3,
    last_norm=True,
    square_o=False,
    per_head_norms=True,
    biases=True,
    shared_norm=True,
    default_key_value_heads=None,
):
    """The count with one thing left out or added; what every mistake below is made of."""
    hidden, intermediate, heads = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
    )
    family = config["model_type"]
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type {family}")
    head_dim = config.get("head_dim") or hidden // heads
    key_value_heads = config.get("num_key_value_heads") or default_key_value_heads or heads
    queries, keys = heads * head_dim, key_value_heads * head_dim
    layer = (
        hidden * (queries + 2 * keys + (hidden if square_o else queries)) + matrices * hidden * intermediate
    )
    layer += norms * hidden
    if family == "qwen2" and biases:
        layer += queries + 2 * keys
    if family in ("llama", "qwen3") and config.get("attention_bias"):
        layer += queries + 2 * keys + hidden
    if family == "llama" and config.get("mlp_bias"):
        layer += 2 * intermediate + hidden
    if family == "qwen3" and per_head_norms:
        layer += 2 * head_dim if shared_norm else queries + keys
    heads_and_embedding = (1 if config.get("tie_word_embeddings") else 2) * config["vocab_size"] * hidden
    return heads_and_embedding + config["num_hidden_layers"] * layer + (hidden if last_norm else 0)


@mistake(
    parameter_count,
    "Counts 12 · layers · hidden² and the embedding: the rule for GPT, not for a gated, grouped decoder.",
)
def rule_of_thumb(config):
    counted(config)
    return (
        12 * config["num_hidden_layers"] * config["hidden_size"] ** 2
        + config["vocab_size"] * config["hidden_size"]
    )


@mistake(parameter_count, "Every query head gets keys and values of its own.")
def as_many_key_value_heads(config):
    return counted({**config, "num_key_value_heads": None})


@mistake(parameter_count, "The tied head is counted a second time.")
def tied_twice(config):
    return counted({**config, "tie_word_embeddings": False})


@mistake(parameter_count, "The head is taken for tied, whatever the configuration says.")
def always_tied(config):
    return counted({**config, "tie_word_embeddings": True})


@mistake(parameter_count, "Takes an absent tie_word_embeddings for True.")
def tied_by_default(config):
    return counted({"tie_word_embeddings": True, **config})


@mistake(parameter_count, "Heads are hidden_size / num_attention_heads wide, though head_dim says otherwise.")
def head_dim_ignored(config):
    return counted({**config, "head_dim": None})


@mistake(parameter_count, "The output projection is taken for square, hidden_size by hidden_size.")
def square_output(config):
    return counted(config, square_o=True)


@mistake(
    parameter_count, "Qwen2's biases on q, k and v are forgotten: its config.json does not mention them."
)
def qwen2_biases_forgotten(config):
    return counted(config, biases=False)


@mistake(parameter_count, "Qwen2 gets a bias on the output projection too.")
def bias_on_output(config):
    extra = config["num_hidden_layers"] * config["hidden_size"] if config["model_type"] == "qwen2" else 0
    return counted(config) + extra


@mistake(parameter_count, "The MLP is given two matrices; a gated one has three.")
def two_matrices(config):
    return counted(config, matrices=2)


@mistake(parameter_count, "The norm after the last layer is forgotten.")
def last_norm_forgotten(config):
    return counted(config, last_norm=False)


@mistake(parameter_count, "Counts one norm a layer; attention and MLP have one each.")
def one_norm(config):
    return counted(config, norms=1)


@mistake(parameter_count, "Qwen3's norms on queries and keys are forgotten.")
def head_norms_forgotten(config):
    return counted(config, per_head_norms=False)


@mistake(
    parameter_count,
    "Qwen3's query and key norms are taken to span all heads; they have head_dim weights, shared by all.",
)
def head_norms_per_head(config):
    return counted(config, shared_norm=False)


@mistake(parameter_count, "Adds a table of positions; rotary positions have no parameters.")
def learned_positions(config):
    return counted(config) + config["max_position_embeddings"] * config["hidden_size"]


@mistake(parameter_count, "Reads attention_bias in every family.")
def bias_key_in_every_family(config):
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_attention_heads"] + 2 * (
        config.get("num_key_value_heads") or config["num_attention_heads"]
    )
    unread = config["model_type"] in ("mistral", "qwen2") and config.get("attention_bias")
    return counted(config) + (
        config["num_hidden_layers"] * (heads * head_dim + config["hidden_size"]) if unread else 0
    )


@mistake(parameter_count, "Every projection has a bias, as torch.nn.Linear has by default.")
def biases_by_default(config):
    return counted({**config, "attention_bias": True, "mlp_bias": True})


@mistake(parameter_count, "Uses null as a number: a key may be there with None in it.")
def null_as_a_number(config):
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    if head_dim * config.get("num_key_value_heads", heads) < 1:
        raise ValueError("no heads")
    return counted(config)


@mistake(parameter_count, "Requires keys that a config.json may leave out.")
def keys_required(config):
    return counted({**config, "num_key_value_heads": config["num_key_value_heads"]})


@mistake(parameter_count, "Counts any decoder as if it were a Llama.")
def any_family(config):
    known = config["model_type"] in ("llama", "mistral", "qwen2", "qwen3")
    return counted(config if known else {**config, "model_type": "llama"})


@mistake(
    parameter_count, "Refuses the families it has heard of, and counts every other as if it were a Llama."
)
def some_families_refused(config):
    refused = ("mixtral", "gpt2", "deepseek_v3", "mamba", "opt", "qwen2_moe", "qwen3_moe", "gemma", "phi")
    if config["model_type"] in refused:
        raise ValueError("model_type")
    return any_family(config)


@mistake(parameter_count, "Goes by how a family's name begins: qwen2_moe is taken for qwen2.")
def families_by_prefix(config):
    known = ("llama", "mistral", "qwen2", "qwen3")
    family = next((name for name in known if config["model_type"].startswith(name)), "")
    return counted({**config, "model_type": family})


@mistake(
    parameter_count, "Reads head_dim for Llama and Qwen3 only; Mistral-Nemo's is not hidden / heads either."
)
def head_dim_of_some_families(config):
    return counted(config if config["model_type"] in ("llama", "qwen3") else {**config, "head_dim": None})


@mistake(parameter_count, "Only Qwens are taken to be tied; a Llama of 1 B is as well.")
def tied_in_some_families(config):
    tied = config["model_type"].startswith("qwen") and config.get("tie_word_embeddings")
    return counted({**config, "tie_word_embeddings": tied})


@mistake(
    parameter_count, "Takes num_key_value_heads, where it is left out, from the library's defaults: 8 or 32."
)
def defaults_of_the_library(config):
    default = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(config["model_type"])
    return counted(config, default_key_value_heads=default)


@mistake(parameter_count, "Looks at mlp_bias only where there is no attention_bias.")
def one_kind_of_bias(config):
    return counted({**config, "mlp_bias": config.get("mlp_bias") and not config.get("attention_bias")})


@mistake(parameter_count, "Takes a bias key that is there for True, whatever it says.")
def bias_keys_that_are_there(config):
    there = {key: True for key in ("attention_bias", "mlp_bias") if config.get(key) is not None}
    return counted({**config, **there})


@mistake(parameter_count, "Counts in 32 bits, which overflow at two billions.")
def thirty_two_bits(config):
    return (counted(config) + (1 << 31)) % (1 << 32) - (1 << 31)


@mistake(parameter_count, "Allocates a tensor as large as each matrix to ask for its size.")
def allocates(config):
    return counted(config) + 0 * torch.empty(config["vocab_size"], config["hidden_size"]).numel()


@mistake(parameter_count, "Builds a model only to count it.")
def builds_a_model(config):
    counted(config)
    head = torch.nn.Linear(config["hidden_size"], config["vocab_size"], bias=False, device="meta")
    return counted(config) - head.weight.numel()


@alternative(parameter_count, "Lists every shape by name and sums the products")
def by_shapes(config):
    family = config["model_type"]
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"unknown model_type {family}")
    given = {key: value for key, value in config.items() if value is not None}
    hidden, width, heads = given["hidden_size"], given["intermediate_size"], given["num_attention_heads"]
    head_dim = given.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, given.get("num_key_value_heads", heads) * head_dim
    attention_bias = {"qwen2": "qkv", "mistral": ""}.get(
        family, "qkvo" if given.get("attention_bias") else ""
    )
    mlp_bias = family == "llama" and given.get("mlp_bias", False)
    total = hidden
    for _ in range(given["num_hidden_layers"]):
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        total += sum(
            outputs * (inputs + (name in attention_bias)) for name, (outputs, inputs) in shapes.items()
        )
        for outputs, inputs in ((width, hidden), (width, hidden), (hidden, width)):
            total += outputs * (inputs + mlp_bias)
        total += 2 * hidden + (2 * head_dim if family == "qwen3" else 0)
    copies = 2 - given.get("tie_word_embeddings", False)
    return total + copies * given["vocab_size"] * hidden


@alternative(parameter_count, "Asks tensors on the meta device, which hold no memory, for their sizes")
def by_meta_tensors(config):
    extra = torch.empty(config["vocab_size"], config["hidden_size"], device="meta").numel()
    tied = bool(config.get("tie_word_embeddings"))
    return counted({**config, "tie_word_embeddings": True}) + (0 if tied else extra)
