"""Every plot of the course, in one style.

Each function returns a matplotlib Figure whose title is its finding, with units on the axes, the machine
named where something was measured, and the same content as text in `figure.alt_text` (also in the PNG's
metadata and in the notebook's output). Nothing is shown by itself: return the figure from a cell.
While a notebook is graded (`inert()`) every function returns None at once and matplotlib stays unimported.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import statistics
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from llmcourse import machine as this_machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llmcourse.machine import Machine

Parameters = ParamSpec("Parameters")
Policy = Literal["lru", "pinned", "optimal"]
POLICIES: tuple[Policy, ...] = ("lru", "pinned", "optimal")

# After Okabe and Ito, Color Universal Design (2008); the light ones darkened, for text on white.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#007F5C", "#A4568C", "#B87700", "#3B8FC2"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
INK, MUTED, RULE, FILL = "#222222", "#666666", "#DDDDDD", "#A9B4BF"

SIZE_INCHES = (7.0, 4.0)
DOTS_PER_INCH = 144  # drawn finer than it is displayed, so that it stays sharp on a fine screen
DISPLAYED_PER_INCH = 96

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


# Under a table of figures while `inert()`: the code ran, and what it measured is too little to read.
GRADING_NOTE = (
    "(graded: measured on a fraction of the text and of the rounds; run it yourself to read figures)"
)


def inert() -> bool:
    """Whether nobody looks: nbgrader executes the notebook, or LLMCOURSE_GRADING=1."""
    return bool(os.environ.get("NBGRADER_EXECUTION")) or os.environ.get("LLMCOURSE_GRADING") == "1"


def joined_table(lines: Sequence[str]) -> str:
    """A table's lines as one text; while a notebook is graded with the note that it was measured in short."""
    return "\n".join([*lines, GRADING_NOTE] if inert() else lines)


def _picture(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure | None]:
    """Draw in the course's style, or not at all while grading."""

    @functools.wraps(draw)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure | None:
        if inert():
            return None
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    class CourseFigure(Figure):
        """A figure that shows itself as a PNG with its text alternative, whatever backend is in use."""

        alt_text = ""

        def savefig(self, fname: Any, **options: Any) -> None:
            if (options.get("format") or str(fname).rpartition(".")[2]) == "png":
                described = {"Description": self.alt_text, "Software": None}
                options["metadata"] = described | (options.get("metadata") or {})
            options.setdefault("dpi", DOTS_PER_INCH)
            super().savefig(fname, **options)

        def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
            drawn, file = io.BytesIO(), io.BytesIO()
            self.savefig(drawn, format="png")
            # Few colours: with a palette the notebook holds a third of the bytes, and no eye tells them apart.
            palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            text = PngInfo()
            text.add_itxt("Description", self.alt_text)
            palette.save(file, "png", optimize=True, pnginfo=text)
            width, height = (round(inches * DISPLAYED_PER_INCH) for inches in self.get_size_inches())
            data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": self.alt_text}
            return data, {"image/png": {"width": width, "height": height, "alt": self.alt_text}}

    return CourseFigure


def _axes(*, size_inches: tuple[float, float] = SIZE_INCHES) -> tuple[Any, Axes]:
    figure = _figure_class()(figsize=size_inches, dpi=DISPLAYED_PER_INCH, layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Axes, *, title: str, alt_text: str, device: str | None) -> Figure:
    # Over the whole width: beside long labels a title of the axes would run off the right edge.
    figure.suptitle(textwrap.fill(title, 68), x=0.012, ha="left")
    axes.tick_params(length=0)
    if device is not None:
        # On the canvas, so that the layout leaves room for it below the axis label.
        figure.supxlabel(f"Measured on {device}", x=0.012, ha="left", fontsize=8, color=MUTED)
        alt_text = f"{alt_text} Measured on {device}."
    figure.alt_text = f"{title}. {alt_text}"
    return figure


def _bars_down(axes: Axes, labels: Sequence[str]) -> None:
    """Horizontal bars read from the top, without lines along them."""
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 28) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _value_beside(axes: Axes, value: float, row: float, text: str) -> None:
    place = (value, row)
    _haloed(axes, text, place, xytext=(6, 0), va="center", fontsize=9)


def _haloed(axes: Axes, text: str, place: tuple[float, float], **options: Any) -> Any:
    """Text beside a place in the data, with a white rim that keeps it readable over lines."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=3, foreground="white")]
    return axes.annotate(text, place, textcoords="offset points", path_effects=rim, **options)


def _scaled(value: float, unit: str) -> str:
    """Three digits and the decimal prefix that fits: 141.1e9, "B" -> "141 GB"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def _seconds(value: float) -> str:
    if value >= 0.9995 or value == 0:
        return f"{_digits(value)} s"
    if value >= 0.9995e-3:
        return f"{_digits(value * 1e3)} ms"
    return f"{_digits(value * 1e6)} µs"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


# ---------------------------------------------------------------- roofline


@dataclass(frozen=True)
class Point:
    """Work on the roofline: its FLOPs a byte, and the FLOP/s it reached (None: the roof, a prediction)."""

    label: str
    flops_per_byte: float
    flops_per_s: float | None = None
    dtype: str = "float32"


@_picture
def roofline(
    machine: Machine, *, points: Iterable[Point] = (), device: str = "cpu", title: str | None = None
) -> Figure:
    """Attainable FLOP/s against FLOPs a byte for each dtype measured, both axes logarithmic.

    A full point was measured; a hollow one lies on the roof, where the machine's limits put it at best.
    Williams, Waterman and Patterson 2009.
    """
    points = list(points)
    rates = machine.device(device).flops_per_s
    ridges = {dtype: machine.ridge(dtype, device=device) for dtype in rates}
    low = min([0.1, *(point.flops_per_byte / 2 for point in points)])
    high = max([6 * max(ridges.values()), *(point.flops_per_byte * 4 for point in points)])
    figure, axes = _axes()
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("FLOPs a byte read")
    axes.set_ylabel("FLOP/s")
    _prefixed_ticks(axes)
    bandwidth = machine.device(device).read_bytes_per_s
    axes.plot([low, max(ridges.values())], [low * bandwidth, max(rates.values())], color=MUTED)
    for color, group in zip(SERIES, _close_rates(rates), strict=False):
        _draw_roof(axes, group, rates[group[0]], ridges[group[0]], high, color)
    labels = _draw_points(axes, machine, points, device)
    reached = [point.flops_per_s for point in points if point.flops_per_s is not None]
    if reached:  # room under the lowest point for its label
        axes.set_ylim(bottom=min(axes.get_ylim()[0], min(reached) / 4))
    title = title or _waits_for_memory(ridges)
    roofs = "; ".join(
        f"{dtype} {_scaled(rate, _operations([dtype]))}, ridge at {_digits(ridges[dtype])} FLOPs a byte"
        for dtype, rate in rates.items()
    )
    told = "".join(f" {point.label}: {_point_text(machine, point, device)}." for point in points)
    alt_text = f"Roofline of {device}: memory {_scaled(bandwidth, 'B/s')}; {roofs}.{told}"
    _finish(figure, axes, title=title, alt_text=alt_text, device=machine.describe())
    _label_slope(figure, axes, low, bandwidth)
    _separate(labels)
    return figure


def _waits_for_memory(ridges: Mapping[str, float]) -> str:
    dtype = "float32" if "float32" in ridges else next(iter(ridges))
    return f"Under {_digits(ridges[dtype])} FLOPs a byte, {dtype} work waits for memory"


def _operations(dtypes: Sequence[str]) -> str:
    return "OP/s" if "int8" in dtypes else "FLOP/s"


def _close_rates(rates: Mapping[str, float]) -> list[list[str]]:
    """Dtypes with rates closer than a factor of 1.6 share the lowest one's line: labels would collide."""
    groups: list[list[str]] = []
    for dtype in sorted(rates, key=lambda name: rates[name]):
        if groups and rates[dtype] < 1.6 * rates[groups[-1][0]] and "int8" not in (dtype, groups[-1][0]):
            groups[-1].append(dtype)
        else:
            groups.append([dtype])
    return groups


def _draw_roof(axes: Axes, group: Sequence[str], rate: float, ridge: float, high: float, color: str) -> None:
    axes.plot([ridge, high], [rate, rate], color=color)
    at_least = "≥ " if len(group) > 1 else ""
    text = f"{', '.join(group)}  {at_least}{_scaled(rate, _operations(group))}"
    # Outside the axes, where no point and no slope can be in its way.
    _haloed(axes, text, (high, rate), xytext=(5, 0), va="center", color=color, fontsize=9)


def _draw_points(axes: Axes, machine: Machine, points: Sequence[Point], device: str) -> list[Any]:
    """Draws the points and returns their labels."""
    low, high = axes.get_xlim()
    labels = []
    for point in sorted(points, key=lambda point: point.flops_per_byte):
        roof = machine.attainable_flops_per_s(point.dtype, point.flops_per_byte, device=device)
        reached = roof if point.flops_per_s is None else point.flops_per_s
        place = (point.flops_per_byte, reached)
        face = "white" if point.flops_per_s is None else INK
        axes.plot(*place, "o", markersize=7, markeredgecolor=INK, markerfacecolor=face)
        text = f"{point.label}\n{_scaled(reached, _operations([point.dtype]))}"
        left = point.flops_per_byte > low * (high / low) ** 0.7
        beside = {"xytext": (-8, -8), "ha": "right"} if left else {"xytext": (8, -8), "ha": "left"}
        labels.append(_haloed(axes, text, place, va="top", fontsize=9, **beside))
    return labels


def _separate(labels: Sequence[Any]) -> None:
    """Lowers each label until it covers none of those before it."""
    placed: list[Any] = []
    for label in labels:
        box = label.get_window_extent()
        while any(box.overlaps(other) for other in placed):
            x, y = label.get_position()
            label.set_position((x, y - 4))
            box = label.get_window_extent()
        placed.append(box)


def _point_text(machine: Machine, point: Point, device: str) -> str:
    roof = machine.attainable_flops_per_s(point.dtype, point.flops_per_byte, device=device)
    unit, where = _operations([point.dtype]), f"{_digits(point.flops_per_byte)} FLOPs a byte"
    if point.flops_per_s is None:
        return f"at most {_scaled(roof, unit)} at {where} in {point.dtype}"
    return f"{_scaled(point.flops_per_s, unit)}, {point.flops_per_s / roof:.0%} of the roof at {where}"


def _label_slope(figure: Any, axes: Axes, low: float, bandwidth: float) -> None:
    """The bandwidth, written along the line it is the slope of."""
    text = f"memory {_scaled(bandwidth, 'B/s')}"
    place = (1.5 * low, 1.5 * low * bandwidth)
    label = _haloed(axes, text, place, xytext=(-3, 5), color=MUTED, rotation_mode="anchor")
    # The angle on the canvas is known once everything has its place, which takes the layout two rounds.
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    (x, y), (further_x, further_y) = axes.transData.transform([place, (10 * place[0], 10 * place[1])])
    label.set_rotation(math.degrees(math.atan2(further_y - y, further_x - x)))


def _prefixed_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {prefix}"
    return f"{value:g}"


# ---------------------------------------------------------------- a learner's progress

TILES_A_ROW = 5
TILE_COLORS = {
    "solved": (BLUE, BLUE, "white"),
    "tried": ("white", VERMILION, INK),
    "": ("#EEF0F2", RULE, MUTED),
}


@dataclass(frozen=True)
class Tile:
    """One exercise as it stands, or one spoken question (with its best rating, "7 of 10", if it has one)."""

    name: str
    solved: bool = False
    attempts: int = 0
    best_time_s: float | None = None
    due: bool = False
    rating: str | None = None

    @property
    def facts(self) -> str:
        """What is written under the name, and in the text alternative after it."""
        if not self.attempts:
            return "not tried"
        found = [self.rating or ("solved" if self.solved else "not solved")]
        found.append("1 try" if self.attempts == 1 else f"{self.attempts} tries")
        if self.best_time_s is not None:
            minutes, seconds = divmod(int(self.best_time_s), 60)
            found.append(f"{minutes}:{seconds:02}")
        return ", ".join(found)


@_picture
def progress(lessons: Mapping[str, Sequence[Tile]]) -> Figure:
    """Every exercise as a tile: its name, whether it is solved, tries, best time; a mark where a revisit is due."""
    rows = [
        (lesson if start == 0 else "", tiles[start : start + TILES_A_ROW])
        for lesson, tiles in lessons.items()
        for start in range(0, len(tiles), TILES_A_ROW)
    ]
    figure, axes = _axes(size_inches=(8.4, 1.1 + 0.66 * max(1, len(rows))))
    for row, (_, tiles) in enumerate(rows):
        for column, tile in enumerate(tiles):
            _draw_tile(axes, column, row, tile)
    axes.set(xlim=(0, TILES_A_ROW), ylim=(max(1, len(rows)), 0))
    axes.set_xticks([])
    labels = [lesson.replace("_", " ", 1).replace("_", "\n", 1).replace("_", " ") for lesson, _ in rows]
    axes.set_yticks([row + 0.5 for row in range(len(rows))], labels)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel(
        "blue: solved   outlined: tried   grey: not tried   orange dot: revisit due", color=MUTED, fontsize=9
    )
    told = "; ".join(
        f"{lesson}: "
        + ", ".join(f"{tile.name} ({tile.facts}{', revisit due' if tile.due else ''})" for tile in tiles)
        for lesson, tiles in lessons.items()
    )
    every = [tile for tiles in lessons.values() for tile in tiles]
    return _finish(figure, axes, title=_standing(every), alt_text=told + ".", device=None)


def _draw_tile(axes: Axes, column: int, row: int, tile: Tile) -> None:
    from matplotlib.patches import Rectangle

    state = "solved" if tile.solved else "tried" if tile.attempts else ""
    face, edge, ink = TILE_COLORS[state]
    box = Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, facecolor=face, edgecolor=edge, linewidth=1.4)
    axes.add_patch(box)
    lines = textwrap.wrap(tile.name.replace("_", " "), 18)
    name = "\n".join(lines[:2]) + ("…" if len(lines) > 2 else "")
    axes.text(column + 0.08, row + 0.13, name, va="top", fontsize=8.5, color=ink, linespacing=1.1)
    axes.text(column + 0.08, row + 0.87, tile.facts, va="bottom", fontsize=7.5, color=ink)
    if tile.due:
        axes.plot(column + 0.9, row + 0.22, "o", markersize=8, color=ORANGE, markeredgecolor="white")


def _standing(tiles: Sequence[Tile]) -> str:
    exercises = [tile for tile in tiles if tile.rating is None and tile.name != "question"]
    solved, due = sum(tile.solved for tile in exercises), sum(tile.due for tile in tiles)
    found = f"{solved or 'None'} of {len(exercises)} exercises solved"
    if not due:
        return found if solved else f"{found} yet"
    return f"{found}; {due} {'revisit is' if due == 1 else 'revisits are'} due"


# ---------------------------------------------------------------- layers kept in memory


def layer_loads(*, n: int, k: int, tokens: int, policy: Policy) -> int:
    """How often a layer is read when each token visits all n layers in order and k of them fit in memory.

    "lru" evicts the layer unused for longest; "pinned" keeps the first k - 1 for good and lets the others
    pass through one place; "optimal" evicts the layer needed last (Belady 1966).

    >>> layer_loads(n=32, k=16, tokens=50, policy="lru")
    1600
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is a number of layers from 1 to {n}, not {k}")
    if tokens < 1:
        raise ValueError(f"tokens is at least 1, not {tokens}")
    kept: OrderedDict[int, None] = OrderedDict()  # the one used longest ago comes first
    loads = 0
    for step in range(n * tokens):
        layer = step % n
        if layer in kept:
            kept.move_to_end(layer)
            continue
        loads += 1
        if len(kept) == k:
            del kept[_evicted(kept, layer, n, k, policy)]
        kept[layer] = None
    return loads


def _evicted(kept: Iterable[int], layer: int, n: int, k: int, policy: Policy) -> int:
    if policy == "lru":
        return next(iter(kept))
    if policy == "pinned":
        return next(each for each in kept if each >= k - 1)
    if policy == "optimal":
        return max(kept, key=lambda each: (each - layer) % n)
    raise ValueError(f"policy is lru, pinned or optimal, not {policy!r}")


@_picture
def lru_hits(*, n: int = 32, tokens: int = 50, k: int | None = None) -> Figure:
    """Layers read a token against the number of layers that fit, for LRU, pinning and the optimum.

    Each token visits n layers in order; `k` marks one number of layers that fit. Computed, not measured.
    """
    reads = _reads_a_token(n, tokens)
    figure, axes = _axes()
    fits, half = range(1, n + 1), max(1, n // 2)
    axes.plot(fits, reads["lru"], color=VERMILION)
    axes.plot(fits, reads["pinned"], color=BLUE)
    axes.plot(fits, reads["optimal"], color=GREEN, linestyle=(0, (3, 2)))
    axes.set(xlim=(1, n * 1.02), ylim=(0, n * 1.12))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(f"layers that fit in memory, of {n}")
    axes.set_ylabel("layers read a token")
    title = f"An LRU cache never hits until all {n} layers fit"
    if k is not None:
        title = _mark(axes, reads, n, k)
    _label_line(axes, half, n, "LRU", VERMILION, above=True)
    _label_line(axes, half, reads["pinned"][half - 1], "all but one pinned", BLUE, above=True)
    _label_line(axes, half, reads["optimal"][half - 1], "optimal (Belady)", GREEN, above=False)
    told = k or half
    alt_text = (
        f"Layers read a token over {tokens} tokens against layers that fit. LRU stays at {n} until all "
        f"fit; with {told} pinning reads {reads['pinned'][told - 1]:.1f} and the optimum "
        f"{reads['optimal'][told - 1]:.1f}; with all {n} every policy reads {reads['lru'][-1]:.2f}."
    )
    return _finish(figure, axes, title=title, alt_text=alt_text, device=None)


@functools.cache
def _reads_a_token(n: int, tokens: int) -> dict[Policy, list[float]]:
    """Policy -> layers read a token with 1, 2, ... n layers that fit; kept, because a slider asks often."""
    return {
        policy: [layer_loads(n=n, k=k, tokens=tokens, policy=policy) / tokens for k in range(1, n + 1)]
        for policy in POLICIES
    }


def _label_line(axes: Axes, x: float, y: float, text: str, color: str, *, above: bool) -> None:
    beside = {"xytext": (8, 6), "ha": "left"} if above else {"xytext": (-8, -6), "ha": "right"}
    _haloed(axes, text, (x, y), va="bottom" if above else "top", color=color, fontweight="bold", **beside)


def _mark(axes: Axes, reads: Mapping[Policy, list[float]], n: int, k: int) -> str:
    """Marks k on every line; returns what is read there."""
    axes.axvline(k, color=MUTED, linewidth=1)
    lru, pinned, optimal = (reads[policy][k - 1] for policy in POLICIES)
    for value, color in ((lru, VERMILION), (pinned, BLUE), (optimal, GREEN)):
        axes.plot(k, value, "o", color=color, markersize=8, clip_on=False)
    return f"{k} of {n} fit: LRU reads {lru:.1f} a token, pinned {pinned:.1f}, optimal {optimal:.1f}"


# ---------------------------------------------------------------- comparisons


@_picture
def bars(
    seconds: Mapping[str, Sequence[float]],
    *,
    title: str | None = None,
    highlight: str | None = None,
    device: str | None = None,
    xlabel: str = "seconds (shorter is better)",
) -> Figure:
    """Contenders timed in one interleaved run: medians as bars, quartiles as whiskers, every run as a dot.

    seconds: contender -> its times. `device` defaults to this machine's name.
    """
    if not seconds or not all(len(times) for times in seconds.values()):
        raise ValueError(f"every contender needs at least one time, got {dict(seconds)}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 1.6 + 0.52 * len(seconds)))
    for row, (name, times) in enumerate(seconds.items()):
        axes.barh(row, medians[name], height=0.62, color=BLUE if name == highlight else FILL)
        low, high = _quartiles(times)
        axes.plot([low, high], [row, row], color=INK, linewidth=1.6)
        axes.plot(times, [row] * len(times), "o", color=INK, markersize=3.2, alpha=0.55)
        _value_beside(axes, max(times), row, _seconds(medians[name]))
    _bars_down(axes, list(seconds))
    axes.set_xlim(0, 1.14 * max(max(times) for times in seconds.values()))
    axes.set_xlabel(xlabel)
    alt_text = "Medians, with the middle half of the runs: " + "; ".join(
        f"{name} {_seconds(medians[name])} ({' to '.join(map(_seconds, _quartiles(times)))})"
        for name, times in seconds.items()
    )
    title = title or _fastest(medians)
    return _finish(
        figure, axes, title=title, alt_text=alt_text + ".", device=device or this_machine.describe()
    )


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def _fastest(medians: Mapping[str, float]) -> str:
    fastest, slowest = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    if len(medians) == 1 or medians[fastest] == 0:
        return f"{fastest} takes {_seconds(medians[fastest])}"
    return f"{fastest} is {_times(medians[slowest] / medians[fastest])} times faster than {slowest}"


# ---------------------------------------------------------------- checkpoints


def checkpoint_parts(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part of the model, from the tensor names of the Llama family; other names stay as they are.

    {"model.layers.0.mlp.up_proj.weight": 8, "lm_head.weight": 4} -> {"MLP": 8, "output head": 4}
    """
    kinds = (
        ("embed_tokens", "token embedding"),
        ("lm_head", "output head"),
        ("self_attn", "attention"),
        ("mlp", "MLP"),
        ("norm", "norms"),
    )
    parts: dict[str, int] = {}
    for name, size_bytes in sizes.items():
        part = next((part for key, part in kinds if key in name), name)
        parts[part] = parts.get(part, 0) + size_bytes
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


@_picture
def layer_sizes(sizes: Mapping[str, int], *, title: str | None = None) -> Figure:
    """Where the bytes of a checkpoint are. sizes: tensor name (or any part) -> bytes."""
    parts = checkpoint_parts(sizes)
    total_bytes = sum(parts.values())
    if total_bytes <= 0:
        raise ValueError(f"a checkpoint has at least one byte, got {dict(sizes)}")
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 1.5 + 0.48 * len(parts)))
    shares = {part: size_bytes / total_bytes for part, size_bytes in parts.items()}
    for row, (part, size_bytes) in enumerate(parts.items()):
        axes.barh(row, 100 * shares[part], height=0.62, color=BLUE if row == 0 else FILL)
        _value_beside(axes, 100 * shares[part], row, f"{_scaled(size_bytes, 'B')}  {_share(shares[part])}")
    _bars_down(axes, list(parts))
    axes.set_xlim(0, 100 * max(shares.values()) * 1.25)
    axes.set_xlabel(f"% of {_scaled(total_bytes, 'B')}")
    largest = next(iter(parts))
    title = title or f"{largest} holds {shares[largest]:.0%} of the {_scaled(total_bytes, 'B')}"
    alt_text = "Bytes by part: " + "; ".join(
        f"{part} {_scaled(size_bytes, 'B')} ({_share(shares[part])})" for part, size_bytes in parts.items()
    )
    return _finish(figure, axes, title=title, alt_text=alt_text + ".", device=None)


def _share(share: float) -> str:
    return "under 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


@_picture
def memory_over_time(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    limit_bytes: float | None = None,
    title: str | None = None,
    device: str | None = None,
) -> Figure:
    """Memory held while something runs. lines: name -> (seconds since the start, bytes) in order.

    `limit_bytes` draws what there is. `device` defaults to this machine's name.
    """
    if not lines or not all(len(line) for line in lines.values()):
        raise ValueError(f"every line needs at least one sample, got {dict(lines)}")
    peaks = {name: max(size_bytes for _, size_bytes in line) for name, line in lines.items()}
    factor, unit = (1e9, "GB") if max(peaks.values()) >= 1e9 else (1e6, "MB")
    figure, axes = _axes()
    for color, (name, line) in zip(SERIES, lines.items(), strict=False):
        times_s, sizes = zip(*line, strict=True)
        axes.plot(times_s, [size_bytes / factor for size_bytes in sizes], color=color, label=name)
        axes.fill_between(times_s, [size_bytes / factor for size_bytes in sizes], color=color, alpha=0.08)
    _label_peaks(axes, lines, factor)
    highest = max([*peaks.values(), limit_bytes or 0]) / factor
    if limit_bytes is not None:
        axes.axhline(limit_bytes / factor, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        text, place = f"limit {_scaled(limit_bytes, 'B')}", (1, limit_bytes / factor)
        _haloed(axes, text, place, xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.18 * highest)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel(f"memory held, {unit}")
    alt_text = "Peaks: " + "; ".join(f"{name} {_scaled(peak, 'B')}" for name, peak in peaks.items()) + "."
    title = title or _highest_peak(peaks)
    return _finish(figure, axes, title=title, alt_text=alt_text, device=device or this_machine.describe())


def _label_peaks(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], factor: float) -> None:
    """Each name at its line's peak; a legend where there are more than three, which would collide."""
    if len(lines) > 3:
        axes.legend(frameon=False)
        return
    last_s = max(line[-1][0] for line in lines.values())
    for color, (name, line) in zip(SERIES, lines.items(), strict=False):
        at_s, peak_bytes = max(line, key=lambda sample: sample[1])
        align = "right" if at_s > last_s / 2 else "left"
        text, place = f"{name}, {_scaled(peak_bytes, 'B')}", (at_s, peak_bytes / factor)
        _haloed(axes, text, place, xytext=(0, 5), ha=align, color=color, fontweight="bold")


def _highest_peak(peaks: Mapping[str, float]) -> str:
    highest, lowest = max(peaks, key=peaks.__getitem__), min(peaks, key=peaks.__getitem__)
    if peaks[highest] < 1.05 * peaks[lowest]:
        return f"Memory peaks at {_scaled(peaks[highest], 'B')}"
    if peaks[lowest] <= 0:
        return f"{highest} peaks at {_scaled(peaks[highest], 'B')}"
    return f"{highest} needs {_times(peaks[highest] / peaks[lowest])} times the memory of {lowest}"


# ---------------------------------------------------------------- loading, stage by stage


@dataclass(frozen=True)
class Stage:
    """One link that a checkpoint crosses: the bytes that cross it and its rate."""

    name: str
    size_bytes: float
    bytes_per_s: float

    @property
    def seconds(self) -> float:
        return self.size_bytes / self.bytes_per_s


def loading_stages(
    size_bytes: float,
    *,
    ranks: int,
    disk_bytes_per_s: float,
    to_device_bytes_per_s: float,
    network_bits_per_s: float | None = None,
    each_reads_everything: bool = False,
) -> tuple[Stage, ...]:
    """What crosses each link when one host with `ranks` devices loads a checkpoint.

    The disk, and the network where there is one, serve all ranks; each device has a link of its own and gets
    its slice. Caches and copies between ranks are left out, so the times are lower bounds.
    """
    if ranks < 1:
        raise ValueError(f"ranks is at least 1, not {ranks}")
    read_bytes = size_bytes * (ranks if each_reads_everything else 1)
    stages = [Stage("disk", read_bytes, disk_bytes_per_s)]
    if network_bits_per_s is not None:
        stages.append(Stage("network", read_bytes, network_bits_per_s / 8))
    stages.append(Stage("copy to device", size_bytes / ranks, to_device_bytes_per_s))
    return tuple(stages)


SPARSE_BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}


def sparse_sizes(density: float, bits: int) -> dict[str, float]:
    """Size of a sparse matrix beside the dense one, by format; the share `density` of its values is kept.

    bitmask: one bit a value and the kept ones; CSR: a 32-bit column beside each kept value (row pointers, scales and
    alignment left out); 2:4: half of the values and two bits for the place of each.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is a share between 0 and 1, not {density}")
    return {"bitmask": density + 1 / bits, "CSR": density * (bits + 32) / bits, "2:4": 0.5 + 1 / bits}


@_picture
def sparse_break_even() -> Figure:
    """Below which density a bitmask and CSR are smaller than the dense matrix, for 32 to 4 bits a value. Computed."""
    names = list(SPARSE_BITS)
    mask = [1 - 1 / bits for bits in SPARSE_BITS.values()]
    columns = [bits / (bits + 32) for bits in SPARSE_BITS.values()]
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 3.4))
    for row, (by_mask, by_column) in enumerate(zip(mask, columns, strict=True)):
        for offset, share, color in ((-0.19, by_mask, BLUE), (0.19, by_column, VERMILION)):
            axes.barh(row + offset, 100 * share, height=0.34, color=color)
            _value_beside(axes, 100 * share, row + offset, f"{100 * share:.3g} %")
    _bars_down(axes, names)
    axes.set_xlim(0, 118)
    axes.set_xlabel("smaller than dense while at most this share of the values is kept (%)")
    for place, name, color in ((0.62, "bitmask", BLUE), (0.78, "CSR, 32-bit columns", VERMILION)):
        axes.text(place, 1.02, name, transform=axes.transAxes, color=color, fontweight="bold")
    title = f"CSR saves nothing before {100 * (1 - columns[1]):.0f} % of float16 weights are zero"
    parts = [
        f"{name}: bitmask {100 * a:.3g} %, CSR {100 * b:.3g} %"
        for name, a, b in zip(names, mask, columns, strict=True)
    ]
    return _finish(
        figure, axes, title=title, alt_text=f"Break-even density. {'; '.join(parts)}.", device=None
    )


@_picture
def load_time(stages: Sequence[Stage], *, what: str = "Loading") -> Figure:
    """Time at each stage of a load, and in all: overlapped (the slowest) and one after another (the sum).

    Computed from bytes and rates, so a lower bound.
    """
    slowest = max(stages, key=lambda stage: stage.seconds)
    totals = {
        "overlapped": slowest.seconds,
        "one after another": sum(stage.seconds for stage in stages),
    }
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 1.6 + 0.5 * (len(stages) + 2)))
    for row, stage in enumerate(stages):
        axes.barh(row, stage.seconds, height=0.62, color=VERMILION if stage is slowest else BLUE)
        _value_beside(axes, stage.seconds, row, f"{_seconds(stage.seconds)}  {_crossing(stage)}")
    for row, seconds in enumerate(totals.values(), start=len(stages)):
        axes.barh(row, seconds, height=0.62, color=FILL)
        _value_beside(axes, seconds, row, _seconds(seconds))
    _bars_down(axes, [*(stage.name for stage in stages), *totals])
    axes.axhline(len(stages) - 0.5, color=MUTED, linewidth=0.8)
    axes.set_xlim(0, 1.6 * totals["one after another"])
    axes.set_xlabel("seconds, at least (bytes over rate)")
    title = f"{what} takes at least {_seconds(slowest.seconds)}, set by the {slowest.name}"
    alt_text = "; ".join(f"{stage.name} {_seconds(stage.seconds)}, {_crossing(stage)}" for stage in stages)
    alt_text = f"{alt_text}. One after another: {_seconds(totals['one after another'])}."
    return _finish(figure, axes, title=title, alt_text=alt_text, device=None)


def _crossing(stage: Stage) -> str:
    return f"{_scaled(stage.size_bytes, 'B')} at {_scaled(stage.bytes_per_s, 'B/s')}"
