"""Every widget of the course: controls above a figure that is drawn again when one of them moves.

They need a running kernel, so a lesson shows the static figure beside each. While a notebook is graded
(`figures.inert()`) every function returns None at once and ipywidgets stays unimported.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmcourse import figures, optimizer_figures, precision_figures, sizing

if TYPE_CHECKING:
    from ipywidgets import VBox
    from torch import Tensor

BYTES_PER_PARAMETER: Mapping[str, float] = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}
SHARDS = [1, 2, 4, 8, 16, 30, 64, 191]
READS = {"its own slice": False, "the whole checkpoint": True}


def cached_layers(n: int = 32, *, tokens: int = 50, k: int | None = None) -> VBox | None:
    """A slider for k, the layers that fit in memory, of n; the LRU figure is drawn again with k marked."""
    if figures.inert():
        return None
    import ipywidgets

    slider = ipywidgets.IntSlider(
        value=max(1, n // 2) if k is None else k, min=1, max=n, description="layers that fit"
    )
    return _redrawn(lambda k: figures.lru_hits(n=n, tokens=tokens, k=k), {"k": slider})


def checkpoint_cost(parameters: Mapping[str, int] | None = None, *, ranks: int = 8) -> VBox | None:
    """How long a checkpoint takes to load, stage by stage, for a model, a dtype, shards, ranks and link speeds.

    parameters: model name -> its number of parameters; the public configurations of `sizing` unless given (see
    `figures.loading_stages` for what is left out; scales of the integer formats are left out too).
    """
    if figures.inert():
        return None
    if parameters is None:
        parameters = {
            name: sizing.parameter_breakdown(config).total for name, config in sizing.PUBLIC_CONFIGS.items()
        }
    if not parameters:
        raise ValueError("no models: pass a mapping from model name to its number of parameters")
    import ipywidgets

    def speed(value: float, unit: str) -> Any:
        options = [value / 8, value / 4, value / 2, value, value * 2, value * 4, value * 8]
        labelled = [(f"{option:g} {unit}", option) for option in options]
        return ipywidgets.SelectionSlider(options=labelled, value=value, description="")

    controls = {
        "model": ipywidgets.Dropdown(options=list(parameters), description="model"),
        "dtype": ipywidgets.Dropdown(
            options=list(BYTES_PER_PARAMETER), value="bfloat16", description="dtype"
        ),
        "shards": ipywidgets.SelectionSlider(options=SHARDS, value=1, description="files"),
        "ranks": ipywidgets.SelectionSlider(
            options=sorted({1, 2, 4, 8, 16, 32, 64, ranks}), value=ranks, description="ranks"
        ),
        "reads": ipywidgets.Dropdown(options=list(READS), description="each rank reads"),
        "disk_gb_per_s": speed(8, "GB/s"),
        "network_gbit_per_s": speed(200, "Gbit/s"),
        "to_device_gb_per_s": speed(32, "GB/s"),
        "remote": ipywidgets.Checkbox(value=False, description="over the network", indent=False),
    }
    controls["disk_gb_per_s"].description = "disk"
    controls["network_gbit_per_s"].description = "network"
    controls["to_device_gb_per_s"].description = "copy to device"
    return _redrawn(lambda **chosen: _load_time(parameters, **chosen), controls)


def _load_time(
    parameters: Mapping[str, int],
    *,
    model: str,
    dtype: str,
    shards: int,
    ranks: int,
    reads: str,
    disk_gb_per_s: float,
    network_gbit_per_s: float,
    to_device_gb_per_s: float,
    remote: bool,
) -> Any:
    size_bytes = parameters[model] * BYTES_PER_PARAMETER[dtype]
    stages = figures.loading_stages(
        size_bytes,
        ranks=ranks,
        disk_bytes_per_s=disk_gb_per_s * 1e9,
        to_device_bytes_per_s=to_device_gb_per_s * 1e9,
        network_bits_per_s=network_gbit_per_s * 1e9 if remote else None,
        each_reads_everything=READS[reads],
    )
    files = f", {shards} files of {size_bytes / shards / 1e9:.3g} GB," if shards > 1 else ""
    return figures.load_time(stages, what=f"{model} in {dtype}{files}")


def rounding(weight: Tensor) -> VBox | None:
    """Bits, group size and clipping of a layer's weight [N, K], above the histogram of what it becomes."""
    if figures.inert():
        return None
    import ipywidgets

    sizes = [size for size in (16, 32, 64, 128, 256) if weight.shape[1] % size == 0] or [weight.shape[1]]
    controls = {
        "bits": ipywidgets.IntSlider(value=4, min=2, max=8, description="bits"),
        "group_size": ipywidgets.SelectionSlider(
            options=sizes, value=sizes[len(sizes) // 2], description="group size"
        ),
        "clip": ipywidgets.FloatSlider(
            value=1.0, min=0.3, max=1.0, step=0.05, description="range kept", continuous_update=False
        ),
    }
    return _redrawn(lambda **chosen: precision_figures.rounding(weight, **chosen), controls)


# Of data sheets: NVIDIA H100 SXM and RTX 4090 (dense bfloat16), Apple M2 Max (float16, GPU); memory in GB.
SERVING_DEVICES: Mapping[str, tuple[float, float, float]] = {
    "H100 SXM: 80 GB, 3.35 TB/s": (80, 3.35e12, 989e12),
    "RTX 4090: 24 GB, 1.01 TB/s": (24, 1.008e12, 165e12),
    "M2 Max: 64 GB, 0.4 TB/s": (64, 0.4e12, 27e12),
}
STORED_BITS: Mapping[str, float] = {
    "bfloat16": 16,
    "int8, a scale a row": 8,
    "int4, groups of 128": 4 + 16 / 128,
    "MXFP4": 4.25,
}


def serving_cost() -> VBox | None:
    """Memory and tokens a second of a public configuration in several stored forms, by batch, context and device."""
    if figures.inert():
        return None
    import ipywidgets

    controls = {
        "model": ipywidgets.Dropdown(options=list(sizing.PUBLIC_CONFIGS), description="model"),
        "device": ipywidgets.Dropdown(options=list(SERVING_DEVICES), description="device"),
        "batch": ipywidgets.SelectionSlider(options=[1, 2, 4, 8, 16, 32, 64, 128, 256], description="batch"),
        "context": ipywidgets.SelectionSlider(
            options=[1024, 2048, 4096, 8192, 32768, 131072], value=4096, description="context"
        ),
        "cache": ipywidgets.Dropdown(options=[16, 8, 4], description="cache bits"),
    }
    return _redrawn(_serving, controls)


def _serving(*, model: str, device: str, batch: int, context: int, cache: int) -> Any:
    memory_gb, bytes_per_s, flops_per_s = SERVING_DEVICES[device]
    plans = {
        name: precision_figures.serving_plan(
            sizing.PUBLIC_CONFIGS[model],
            bits_per_weight=bits,
            cache_bits=cache,
            batch=batch,
            context_tokens=context,
            memory_bytes_per_s=bytes_per_s,
            flops_per_s=flops_per_s,
        )
        for name, bits in STORED_BITS.items()
    }
    return precision_figures.serving(plans, memory_gb=memory_gb)


def descent() -> VBox | None:
    """Paths of SGD, momentum and AdamW over a ravine, by surface, learning rates, momentum and weight decay."""
    if figures.inert():
        return None
    import ipywidgets

    def rates(value: float) -> Any:
        options = [(f"{rate:g}", rate) for rate in (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4)]
        return ipywidgets.SelectionSlider(options=options, value=value)

    controls = {
        "surface": ipywidgets.Dropdown(options=list(optimizer_figures.SURFACES), description="ravine"),
        "rate": rates(0.03),
        "adam_rate": rates(0.2),
        "momentum": ipywidgets.FloatSlider(
            value=0.9, min=0.0, max=0.99, step=0.01, description="momentum", continuous_update=False
        ),
        "decay": ipywidgets.FloatSlider(
            value=0.0, min=0.0, max=2.0, step=0.1, description="weight decay", continuous_update=False
        ),
    }
    controls["rate"].description = "rate, SGD"
    controls["adam_rate"].description = "rate, AdamW"
    return _redrawn(optimizer_figures.descent, controls)


def _redrawn(draw: Callable[..., Any], controls: Mapping[str, Any]) -> VBox:
    """The controls in rows of two above the figure that `draw` makes of their values.

    The figure is the value of an HTML widget. An Output widget would send messages of its own while its cell runs, and
    a client that executes notebooks (nbclient) then misses the cell's reply now and then and waits until it times out.
    """
    import ipywidgets

    shown = ipywidgets.HTML()

    def redraw(_: Any = None) -> None:
        shown.value = _image(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.style.description_width = "110px"
        control.layout.width = "350px"
        control.observe(redraw, names="value")
    redraw()
    box = ipywidgets.Layout(flex_flow="row wrap")
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values()), layout=box), shown])


def _image(figure: Any) -> str:
    data, metadata = figure._repr_mimebundle_()
    size = metadata["image/png"]
    return (
        f"<img src='data:image/png;base64,{data['image/png']}' width='{size['width']}' height='{size['height']}' "
        f"alt='{html.escape(size['alt'], quote=True)}'>"
    )
