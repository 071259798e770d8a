"""parameter_count against published totals and against models that transformers builds without memory."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llmcourse import exercise, judging, sizing
from llmcourse.lessons.parameter_loading import parameter_count as lesson
from llmcourse.lessons.parameter_loading.parameter_count import parameter_count
from tests.peers import peer

# Published totals: the sizes that each repository reports for its safetensors files.
PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
}
# What the misconception gives for the published configuration, computed by hand from the difference it makes.
PUBLISHED_MISTAKES = {
    "as_many_key_value_heads": ("Llama-3.1-8B", 8_030_261_248 + 32 * 2 * 4096 * (4096 - 1024)),
    "tied_twice": ("Llama-3.2-1B", 1_235_814_400 + 128_256 * 2048),
    "head_dim_ignored": ("Qwen3-0.6B", 507_965_952),
    "qwen2_biases_forgotten": ("Qwen2.5-0.5B", 494_032_768 - 24 * (896 + 2 * 128)),
    "last_norm_forgotten": ("Llama-3.1-8B", 8_030_261_248 - 4096),
}


def published(name: str) -> dict[str, Any]:
    """The public configuration without the two keys that this course adds: they stand in no config.json."""
    config = sizing.PUBLIC_CONFIGS[name]
    return {key: value for key, value in config.items() if key not in ("qkv_bias", "qk_norm")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals_are_met(name: str) -> None:
    assert parameter_count(published(name)) == PUBLISHED[name]


def test_a_larger_vocabulary_gives_the_published_total_of_mistral_v03() -> None:
    assert parameter_count({**published("Mistral-7B-v0.1"), "vocab_size": 32_768}) == 7_248_023_552


@pytest.mark.parametrize("name", PUBLISHED_MISTAKES)
def test_a_mistake_gives_its_known_wrong_total(name: str) -> None:
    model, total = PUBLISHED_MISTAKES[name]
    assert getattr(lesson, name)(published(model)) == total != PUBLISHED[model]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_counts_equal_a_model_of_transformers_on_the_meta_device(family: str, seed: int) -> None:
    transformers = peer("transformers")
    draw = random.Random(seed)
    for tied in (False, True):
        key_value_heads, head_dim = draw.randint(1, 4), 2 * draw.randint(4, 12)
        heads = key_value_heads * draw.randint(1, 3)
        config = {
            "model_type": family,
            "vocab_size": draw.randint(50, 300),
            "hidden_size": heads * head_dim,
            "intermediate_size": draw.randint(20, 90),
            "num_hidden_layers": draw.randint(1, 3),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "tie_word_embeddings": tied,
        }
        # The two Qwens and Mistral have defaults of their own in transformers (128 wide, 32 or 8 heads): keys left out
        # for Llama only.
        if family == "llama" and draw.random() < 0.5:
            config["num_key_value_heads"] = None
        config["head_dim"] = head_dim + 2 * draw.randint(1, 5)
        if family in ("llama", "qwen3"):
            config["attention_bias"] = draw.random() < 0.5
        if family == "llama":
            config["mlp_bias"] = draw.random() < 0.5
        options = {key: value for key, value in config.items() if key != "model_type"}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(family, **options)
            )
        # parameters() yields a tied tensor once.
        assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters()), config


@pytest.mark.parametrize("name", sizing.PUBLIC_CONFIGS)
def test_the_course_s_own_formula_agrees(name: str) -> None:
    assert parameter_count(published(name)) == sizing.parameter_breakdown(sizing.PUBLIC_CONFIGS[name]).total


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'mixtral'"):
        parameter_count({**published("Llama-3.1-8B"), "model_type": "mixtral"})


def by_the_course(config: dict[str, Any]) -> int:
    family = config["model_type"]
    return sizing.parameter_breakdown(
        {**config, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    ).total


def by_the_course_s_bytes(config: dict[str, Any]) -> int:
    family = config["model_type"]
    flags = {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    return sizing.weight_bytes({**config, **flags}, "int8")


def by_the_library(config: dict[str, Any]) -> int:
    transformers = peer("transformers")
    options = {key: value for key, value in config.items() if key != "model_type" and value is not None}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **options)
        )
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("answer", [by_the_course, by_the_course_s_bytes, by_the_library])
def test_an_answer_taken_from_a_library_earns_nothing(answer: Any, seed: int) -> None:
    found = exercise.of(parameter_count)
    runner = judging.InProcess()
    verdict = judging.judge(
        runner, found, answer, seed, judging.expectations(runner, found, seed), naming=False
    )
    assert verdict.points == 0
    assert not any(result.agrees for result in verdict.results if result.item.kind == "case")
