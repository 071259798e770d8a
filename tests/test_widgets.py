from __future__ import annotations

import html
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmcourse import figures, widgets

MODELS = {"Small": 10**9, "Large": 70 * 10**9}


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.delenv("LLMCOURSE_GRADING", raising=False)


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that the widgets show, in order."""
    shown: list[Any] = []
    image = widgets._image

    def watched_image(figure: Any) -> str:
        shown.append(figure)
        return image(figure)

    monkeypatch.setattr("llmcourse.widgets._image", watched_image)
    return shown


def _controls(widget: Any) -> Iterator[Any]:
    yield from widget.children[0].children


def _control(widget: Any, description: str) -> Any:
    (found,) = [control for control in _controls(widget) if control.description == description]
    return found


def _title(figure: Any) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_moving_the_slider_draws_the_figure_again_with_k_marked(displayed: list[Any]) -> None:
    widget = widgets.cached_layers(n=8)
    assert _title(displayed[-1]).startswith("4 of 8 fit: LRU reads 8.0 a token")
    _control(widget, "layers that fit").value = 8
    assert _title(displayed[-1]).startswith("8 of 8 fit: LRU reads 0.2 a token")
    assert len(displayed) == 2


def test_the_slider_stays_between_one_layer_and_all(displayed: list[Any]) -> None:
    slider = _control(widgets.cached_layers(n=8, k=3), "layers that fit")
    assert (slider.value, slider.min, slider.max) == (3, 1, 8)
    slider.value = 100
    assert slider.value == 8


def test_a_checkpoint_costs_bytes_over_rate_at_each_stage(displayed: list[Any]) -> None:
    widgets.checkpoint_cost(MODELS)
    # 1e9 bfloat16 parameters: 2 GB from one disk of 8 GB/s; an eighth of it over 32 GB/s a device
    assert _title(displayed[-1]) == "Small in bfloat16 takes at least 250 ms, set by the disk"
    assert "copy to device 7.81 ms, 250 MB at 32.0 GB/s" in displayed[-1].alt_text
    assert "network" not in displayed[-1].alt_text


@pytest.mark.parametrize(
    ("moves", "title"),
    [
        ({"model": "Large"}, "Large in bfloat16 takes at least 17.5 s, set by the disk"),
        ({"dtype": "int4"}, "Small in int4 takes at least 62.5 ms, set by the disk"),
        ({"dtype": "float32"}, "Small in float32 takes at least 500 ms, set by the disk"),
        (
            {"each rank reads": "the whole checkpoint"},
            "Small in bfloat16 takes at least 2.00 s, set by the disk",
        ),
        ({"disk": 64}, "Small in bfloat16 takes at least 31.2 ms, set by the disk"),
        (
            {"ranks": 1, "copy to device": 4},
            "Small in bfloat16 takes at least 500 ms, set by the copy to device",
        ),
        (
            {"over the network": True, "network": 25},
            "Small in bfloat16 takes at least 640 ms, set by the network",
        ),
    ],
    ids=["model", "dtype", "wider dtype", "reads", "disk", "ranks and copy", "network"],
)
def test_every_control_of_a_checkpoint_changes_the_figure(
    moves: dict[str, Any], title: str, displayed: list[Any]
) -> None:
    widget = widgets.checkpoint_cost(MODELS)
    for description, value in moves.items():
        _control(widget, description).value = value
    assert _title(displayed[-1]) == title
    assert len(displayed) == 1 + len(moves)


def test_a_checkpoint_without_models_is_refused() -> None:
    with pytest.raises(ValueError, match="pass a mapping from model name"):
        widgets.checkpoint_cost({})


def test_a_redrawn_figure_replaces_the_last_one_and_says_in_words_what_it_shows(displayed: list[Any]) -> None:
    widget = widgets.cached_layers(n=4)
    before = widget.children[-1].value
    _control(widget, "layers that fit").value = 1
    after = widget.children[-1].value
    assert before != after
    assert after.count("<img ") == 1
    assert f"alt='{html.escape(displayed[-1].alt_text, quote=True)}'" in after


def test_no_widget_holds_an_output_widget_which_hangs_clients_that_execute_notebooks() -> None:
    import ipywidgets

    for widget in (
        widgets.cached_layers(),
        widgets.checkpoint_cost(),
        widgets.serving_cost(),
        widgets.descent(),
    ):
        assert not any(isinstance(child, ipywidgets.Output) for child in widget.children)


@pytest.mark.parametrize(("name", "value"), [("NBGRADER_EXECUTION", "validate"), ("LLMCOURSE_GRADING", "1")])
def test_widgets_are_inert_while_grading(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert figures.inert()
    assert widgets.cached_layers() is None
    assert widgets.checkpoint_cost(MODELS) is None


def test_inert_widgets_import_neither_ipywidgets_nor_matplotlib() -> None:
    program = """
import os, sys
os.environ["LLMCOURSE_GRADING"] = "1"
from llmcourse import widgets
widgets.cached_layers()
widgets.checkpoint_cost({"a": 1})
print(sorted({"ipywidgets", "matplotlib", "IPython", "torch"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_checkpoint_of_a_public_model_in_many_files_says_how_large_each_is(displayed: list[Any]) -> None:
    widget = widgets.checkpoint_cost()
    _control(widget, "model").value = "Llama-3.1-70B"
    _control(widget, "files").value = 30
    # 70,553,706,496 parameters in bfloat16, as published: 141.1 GB, a thirtieth of it a file
    assert _title(displayed[-1]).startswith(
        "Llama-3.1-70B in bfloat16, 30 files of 4.7 GB, takes at least 17.6 s"
    )


def test_the_rounding_widget_offers_groups_that_divide_the_layer() -> None:
    widget = widgets.rounding(torch.randn(8, 96))
    assert list(_control(widget, "group size").options) == [16, 32]
    before = widget.children[-1].value
    _control(widget, "bits").value = 2
    assert widget.children[-1].value != before


def test_the_serving_widget_counts_a_quantized_cache() -> None:
    device = next(iter(widgets.SERVING_DEVICES))
    chosen = {"model": "Llama-3.1-8B", "device": device, "batch": 1, "context": 131_072}
    wide, narrow = (widgets._serving(**chosen, cache=bits).alt_text for bits in (16, 4))
    assert "17.2 GB" in wide and "4.29 GB" in narrow
    assert widgets.serving_cost() is not None
