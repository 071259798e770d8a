"""Plots of lesson 07, in the course's style (`figures`): paths downhill, losses by step and second, bytes, stalls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmcourse.figures import (
    INK,
    MUTED,
    SERIES,
    SIZE_INCHES,
    _axes,
    _bars_down,
    _digits,
    _finish,
    _picture,
    _scaled,
    _value_beside,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

# ----------------------------------------------------------------------------------------------- paths downhill

DESCENT_STEPS = 60
RAVINE = 25.0  # how much steeper the ravine is across than along


def ravine(place: Tensor) -> Tensor:
    """Half of 25 u^2 + v^2, u across and v along the diagonal: places [..., 2] -> losses [...]."""
    across, along = (
        (place[..., 0] - place[..., 1]) / math.sqrt(2),
        (place[..., 0] + place[..., 1]) / math.sqrt(2),
    )
    return (RAVINE * across**2 + along**2) / 2


def aligned(place: Tensor) -> Tensor:
    """The same ravine along the second axis, where a rate for each coordinate can undo it: [..., 2] -> [...]."""
    return (RAVINE * place[..., 0] ** 2 + place[..., 1] ** 2) / 2


SURFACES: Mapping[str, Callable[[Tensor], Tensor]] = {"along an axis": aligned, "across both axes": ravine}
START = (-1.6, 2.4)


@dataclass(frozen=True)
class Path:
    """Where an optimizer went: places [steps + 1, 2], and the loss at each."""

    places: Tensor
    losses: Tensor

    @property
    def diverged(self) -> bool:
        return not bool(self.losses[-1] < 10 * self.losses[0])


def paths(
    *, surface: str, rate: float, adam_rate: float, momentum: float, decay: float, steps: int = DESCENT_STEPS
) -> dict[str, Path]:
    """SGD, SGD with momentum and AdamW from the same place of a surface, as torch has them.

    momentum is also AdamW's beta1; decay is each one's own: in the gradient for SGD, decoupled for AdamW. Raises
    ValueError for a surface that is not in `SURFACES`.
    """
    import torch

    if surface not in SURFACES:
        raise ValueError(f"no surface is named {surface!r}; there are {', '.join(SURFACES)}")
    makers = {
        "SGD": lambda p: torch.optim.SGD(p, lr=rate, weight_decay=decay),
        "with momentum": lambda p: torch.optim.SGD(p, lr=rate, momentum=momentum, weight_decay=decay),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=adam_rate, betas=(momentum, 0.999), weight_decay=decay),
    }
    found = {}
    for name, make in makers.items():
        place = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
        optimizer = make([place])
        places = [place.detach().clone()]
        for _ in range(steps):
            optimizer.zero_grad()
            SURFACES[surface](place).backward()
            optimizer.step()
            places.append(place.detach().clone())
        walked = torch.stack(places)
        found[name] = Path(walked, SURFACES[surface](walked))
    return found


@_picture
def descent(
    *,
    surface: str = "along an axis",
    rate: float = 0.03,
    adam_rate: float = 0.2,
    momentum: float = 0.9,
    decay: float = 0.0,
) -> Figure:
    """Paths of SGD, momentum and AdamW over a ravine 25 times as steep across as along."""
    import torch

    found = paths(surface=surface, rate=rate, adam_rate=adam_rate, momentum=momentum, decay=decay)
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 3.4))
    side_x, side_y = torch.linspace(-3.4, 3.4, 121), torch.linspace(-2.2, 3.0, 101)
    grid = torch.stack(torch.meshgrid(side_x, side_y, indexing="xy"), dim=-1)
    levels = [0.1 * 2.2**i for i in range(9)]
    heights = SURFACES[surface](grid).numpy()
    axes.contour(side_x.numpy(), side_y.numpy(), heights, levels=levels, colors="#C9CED4", linewidths=0.9)
    axes.set(xlim=(-3.4, 3.4), ylim=(-2.2, 3.0), xlabel="first weight", ylabel="second weight")
    axes.grid(visible=False)
    for color, (name, path) in zip(SERIES, found.items(), strict=False):
        shown = path.places.clamp(-1e3, 1e3)
        axes.plot(shown[:, 0], shown[:, 1], "o-", color=color, markersize=2.6, linewidth=1.4, label=name)
    axes.plot(*START, "o", color=INK, markersize=6)
    axes.plot(0, 0, "x", color=INK, markersize=9, mew=2)
    axes.legend(frameon=False, loc="upper right", title=f"{DESCENT_STEPS} steps")
    told = {
        name: "diverged" if path.diverged else f"loss {_small(path.losses[-1].item())}"
        for name, path in found.items()
    }
    start = next(iter(found.values())).losses[0].item()
    text = "; ".join(f"{name}: {what}" for name, what in told.items())
    return _finish(
        figure,
        axes,
        title=f"After {DESCENT_STEPS} steps, {text}",
        alt_text=f"A ravine {surface}, {RAVINE:g} times as steep across as along, from a loss of {_digits(start)}; "
        f"learning rate {rate:g} (AdamW {adam_rate:g}), momentum {momentum:g}, decay {decay:g}. "
        f"After {DESCENT_STEPS} steps: {text}.",
        device=None,
    )


def _small(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


# ------------------------------------------------------------------------------------------------ the small network


class Losses(Protocol):
    """What `optimizing.toy_losses` gives."""

    @property
    def losses(self) -> Tensor: ...
    @property
    def target_variance(self) -> float: ...


@_picture
def learned(exhibits: Mapping[str, Losses], *, window: int = 100, title: str | None = None) -> Figure:
    """Losses of small networks by step, averaged over seeds and over `window` steps, beside the targets' variance."""
    if not exhibits or any(one.losses.shape[1] < window for one in exhibits.values()):
        raise ValueError(f"expected losses of at least {window} steps, from one exhibit or more")
    figure, axes = _axes()
    ends: list[tuple[float, float, str, str]] = []
    for color, (name, exhibit) in zip(SERIES, exhibits.items(), strict=False):
        smooth = exhibit.losses.mean(dim=0).unfold(0, window, 1).mean(dim=1)
        places = range(window, window + len(smooth))
        axes.plot(places, smooth, color=color)
        ends.append((smooth[-1].item(), 0.0, name, color))
    variance = next(iter(exhibits.values())).target_variance
    axes.axhline(variance, color=MUTED, linewidth=1, linestyle="--")
    axes.set(yscale="log", xlabel="steps", ylabel=f"mean squared error, over {window} steps")
    _label_ends(axes, ends)
    told = "; ".join(f"{name}: {_digits(end)}" for end, _, name, _ in ends)
    return _finish(
        figure,
        axes,
        title=title or "The dashed line is what answering 0 costs; two linear layers stay there",
        alt_text=f"Variance of the targets: {variance:g}. At the end: {told}.",
        device=None,
    )


# -------------------------------------------------------------------------------------------------- by step, second


class Trained(Protocol):
    """A run of `optimizing.train`."""

    @property
    def name(self) -> str: ...
    @property
    def losses(self) -> tuple[float, ...]: ...
    @property
    def held_out(self) -> float: ...


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Mean of each loss and the `window` - 1 before it, from the first full window on."""
    total, found = sum(losses[:window]), []
    for last in range(window, len(losses) + 1):
        found.append(total / window)
        if last < len(losses):
            total += losses[last] - losses[last - window]
    return found


@_picture
def loss_curves(
    runs: Sequence[Trained],
    *,
    step_seconds: Mapping[str, float] | None = None,
    window: int = 25,
    device: str | None = None,
    title: str | None = None,
) -> Figure:
    """Training loss by step, or by second where seconds a step are given; a band from lowest to highest seed."""
    named: dict[str, list[Trained]] = {}
    for run in runs:
        named.setdefault(run.name, []).append(run)
    if not named:
        raise ValueError("no runs to draw; expected at least one")
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 4.4))
    ends = []
    for color, (name, of_seeds) in zip(SERIES, named.items(), strict=False):
        curves = [smoothed(run.losses, window) for run in of_seeds]
        middle = [sum(at) / len(at) for at in zip(*curves, strict=True)]
        scale = 1.0 if step_seconds is None else step_seconds[name]
        places = [scale * (window + i) for i in range(len(middle))]
        axes.plot(places, middle, color=color, linewidth=1.8)
        axes.fill_between(
            places, [min(at) for at in zip(*curves, strict=True)], [max(at) for at in zip(*curves, strict=True)],
            color=color, alpha=0.18, linewidth=0,
        )  # fmt: skip
        ends.append((middle[-1], places[-1], name, color))
    axes.set_xlabel("steps" if step_seconds is None else "seconds, forward, backward and step")
    axes.set_ylabel(f"training loss, nats a token, over {window} steps")
    _label_ends(axes, ends)
    best = min(ends)[2]
    by = "step" if step_seconds is None else "second"
    told = "; ".join(f"{name} {end:.2f}" for end, _, name, _ in sorted(ends))
    return _finish(
        figure,
        axes,
        title=title or f"After as many steps {best} is ahead; bands are seeds"
        if by == "step"
        else title or f"By the clock: {_ahead_in_time(ends, named, step_seconds or {}, window)}",
        alt_text=f"Training loss by {by}, at the end: {told}.",
        device=device,
    )


def _ahead_in_time(
    ends: Sequence[tuple[float, float, str, str]],
    named: Mapping[str, Sequence[Trained]],
    step_seconds: Mapping[str, float],
    window: int,
) -> str:
    """Who has the lowest loss when the first of them is done."""
    end_s = min(place for _, place, _, _ in ends)
    at_end = {}
    for name, of_seeds in named.items():
        steps = min(int(end_s / step_seconds[name]), len(of_seeds[0].losses))
        curves = [smoothed(run.losses[:steps], window) for run in of_seeds]
        at_end[name] = sum(curve[-1] for curve in curves) / len(curves)
    best = min(at_end, key=lambda name: at_end[name])
    return f"{best} is ahead after {_digits(end_s)} seconds"


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each line's name right of the axes, at the height of its end; names that would collide are moved upwards."""
    height = math.log if axes.get_yscale() == "log" else float
    low, high = map(height, axes.get_ylim())
    last = -math.inf
    for end, _, name, color in sorted(ends):
        last = max((height(end) - low) / (high - low), last + 0.055)
        axes.text(1.01, last, name, color=color, fontsize=9, va="center", transform=axes.transAxes)


@_picture
def rates(schedules: Mapping[str, Sequence[float]], *, title: str) -> Figure:
    """The learning rate of every step, a line for each schedule."""
    if not schedules:
        raise ValueError("no schedule to draw; expected at least one")
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 3.0))
    ends = []
    for color, (name, values) in zip(SERIES, schedules.items(), strict=False):
        axes.plot(range(len(values)), values, color=color)
        ends.append((values[-1], 0.0, name, color))
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    _label_ends(axes, ends)
    told = "; ".join(
        f"{name}: first {values[0]:.3g}, highest {max(values):.3g}, last {values[-1]:.3g}"
        for name, values in schedules.items()
    )
    return _finish(figure, axes, title=title, alt_text=f"{told}.", device=None)


# ------------------------------------------------------------------------------------------------------------ bytes


@_picture
def training_memory(
    plans: Mapping[str, Mapping[str, float]], *, what: str, memory_gb: float | None = None
) -> Figure:
    """Bytes that training keeps, by part, for each plan: {plan: {part: bytes}}; activations left out."""
    if not plans:
        raise ValueError("no plan to draw; expected at least one")
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 1.6 + 0.5 * len(plans)))
    parts = list(dict.fromkeys(part for plan in plans.values() for part in plan))
    for row, plan in enumerate(plans.values()):
        left = 0.0
        for color, part in zip(SERIES, parts, strict=False):
            width = plan.get(part, 0.0) / 1e9
            axes.barh(row, width, left=left, color=color, height=0.62, label=part if row == 0 else None)
            left += width
        _value_beside(axes, left, row, _scaled(left * 1e9, "B"))
    _bars_down(axes, list(plans))
    axes.set_xlabel("GB, without activations")
    axes.margins(x=0.12)
    if memory_gb is not None:
        axes.axvline(memory_gb, color=MUTED, linewidth=1, linestyle="--")
    handles = [_patch(color, part) for color, part in zip(SERIES, parts, strict=False)]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right", ncols=1)
    totals = {name: sum(plan.values()) for name, plan in plans.items()}
    told = "; ".join(
        f"{name}: " + ", ".join(f"{part} {_scaled(size, 'B')}" for part, size in plan.items() if size)
        for name, plan in plans.items()
    )
    first = next(iter(totals.values()))
    return _finish(
        figure,
        axes,
        title=f"{what}: {_scaled(first, 'B')} before a single activation, most of it the optimizer's",
        alt_text=f"{told}.",
        device=None,
    )


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


# ------------------------------------------------------------------------------------------------------------ stalls


@_picture
def stalls(curves: Mapping[str, Sequence[float]], *, exact: Sequence[float]) -> Figure:
    """What a weight says after each of many small additions, for each way to keep it, beside the exact sum."""
    if not curves:
        raise ValueError("no curve to draw; expected at least one")
    figure, axes = _axes()
    axes.plot(range(1, len(exact) + 1), exact, color=INK, linewidth=1, linestyle="--", label="exact")
    ends = []
    for color, (name, values) in zip(SERIES, curves.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1.8, label=name)
        ends.append(f"{name} {values[-1]:.3f}")
    axes.set(xlabel="updates", ylabel="the weight")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    stuck = [name for name, values in curves.items() if values[-1] == values[0]]
    title = (
        f"{' and '.join(stuck)}: not one of {len(exact):,} updates arrived"
        if stuck
        else "Every update arrived"
    )
    return _finish(
        figure, axes, title=title, alt_text=f"Exact {exact[-1]:.3f}; {', '.join(ends)}.", device=None
    )
