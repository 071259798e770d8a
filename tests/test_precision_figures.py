"""Plots of lesson 03: their titles are findings, their numbers can be computed by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from llmcourse import precision_figures, sizing
from llmcourse.figures import inert

LLAMA = sizing.PUBLIC_CONFIGS["Llama-3.1-8B"]


@dataclass(frozen=True)
class Row:
    method: str
    bits: int
    bits_per_weight: float
    perplexity: float


ROWS = [
    Row("as trained", 16, 16, 10.0),
    Row("nearest", 4, 4.25, 10.4),
    Row("nearest", 2, 2.25, 900.0),
    Row("other", 3, 3.25, 10.6),
]


def test_rounding_of_codes_on_the_grid_is_exact() -> None:
    weight = torch.tensor([[7.0, -3.0, 0.0, 1.0], [0.5, 3.5, -0.5, 1.5]])
    found = precision_figures.rounded(weight, bits=4, group_size=4, clip=1.0)
    assert torch.equal(found.values, weight)
    assert (found.error, found.clipped, found.bits_per_weight) == (0.0, 0.0, 8.0)


def test_a_cut_range_clips_what_lies_beyond_it() -> None:
    weight = torch.tensor([[7.0, 1.0, 1.0, 1.0]])
    found = precision_figures.rounded(weight, bits=4, group_size=4, clip=0.5)
    assert found.values.tolist() == [[3.5, 1.0, 1.0, 1.0]]
    assert found.clipped == 0.25


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1, "group_size": 4, "clip": 1.0},
        {"bits": 9, "group_size": 4, "clip": 1.0},
        {"bits": 4, "group_size": 3, "clip": 1.0},
        {"bits": 4, "group_size": 4, "clip": 0.0},
        {"bits": 4, "group_size": 4, "clip": 1.1},
    ],
    ids=str,
)
def test_rounding_refuses_what_it_cannot_do(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        precision_figures.rounded(torch.ones(2, 4), **options)  # type: ignore[arg-type]


def test_the_title_names_the_fewest_true_bits_within_five_per_cent() -> None:
    figure = precision_figures.perplexity_by_bits(ROWS)
    assert figure is not None
    assert figure.alt_text.startswith("nearest stays within 5 % of the perplexity down to 4.25 bits")  # type: ignore[attr-defined]
    assert "2.25 bits 900" in figure.alt_text  # type: ignore[attr-defined]


def test_the_title_says_when_nothing_is_good_enough() -> None:
    figure = precision_figures.perplexity_by_bits([ROWS[0], ROWS[2]])
    assert figure is not None
    assert figure.alt_text.startswith("Nothing here stays within 5 %")  # type: ignore[attr-defined]


def test_activations_are_compared_at_the_fewest_bits() -> None:
    rows = [ROWS[0], Row("per tensor, plain", 4, 8, 30.0), Row("per token, smoothed", 4, 8, 15.0)]
    figure = precision_figures.perplexity_by_activation_bits(rows)
    assert figure is not None
    assert figure.alt_text.startswith("At 4 bits, per token, smoothed loses least: 1.50 times")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "draw", [precision_figures.perplexity_by_bits, precision_figures.perplexity_by_activation_bits]
)
def test_one_row_alone_is_no_comparison(draw) -> None:
    with pytest.raises(ValueError, match="at least one row more"):
        draw(ROWS[:1])


def test_decode_is_bound_by_bytes_at_batch_1_and_by_arithmetic_at_a_large_one() -> None:
    options = {
        "bits_per_weight": 16,
        "context_tokens": 0,
        "memory_bytes_per_s": 3.35e12,
        "flops_per_s": 989e12,
    }
    alone = precision_figures.serving_plan(LLAMA, batch=1, **options)
    assert alone.tokens_per_s == pytest.approx(3.35e12 / (2 * 8_030_261_248), rel=1e-9)
    many = precision_figures.serving_plan(LLAMA, batch=4096, **options)
    assert many.tokens_per_s == pytest.approx(many.compute_tokens_per_s, rel=1e-9)


def test_a_plan_that_does_not_fit_says_so() -> None:
    plan = precision_figures.serving_plan(
        LLAMA, bits_per_weight=16, memory_bytes_per_s=1e12, flops_per_s=1e14
    )
    figure = precision_figures.serving({"bfloat16": plan}, memory_gb=8)
    assert figure is not None
    assert figure.alt_text.startswith("0 of 1 fit into 8 GB")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong", [{"bits_per_weight": 0}, {"batch": 0}, {"context_tokens": -1}, {"cache_bits": 0}]
)
def test_an_impossible_plan_is_refused(wrong: dict[str, int]) -> None:
    options = {"bits_per_weight": 4.0, "memory_bytes_per_s": 1e12, "flops_per_s": 1e14, **wrong}
    with pytest.raises(ValueError, match="expected bits above 0"):
        precision_figures.serving_plan(LLAMA, **options)


def test_forms_are_drawn_by_their_different_values() -> None:
    figure = precision_figures.code_lines({"int2": [-1, 0, 1], "twice": [0, 0, 2]})
    assert figure is not None
    assert "int2 3, twice 2" in figure.alt_text  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="one of them not zero"):
        precision_figures.code_lines({"nothing": [0.0]})


def test_nothing_is_drawn_while_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_GRADING", "1")
    assert inert() and precision_figures.rounding(torch.ones(2, 64)) is None
