"""Plots of lesson 03, in the course's style (`figures`): code grids, rounding, perplexity by bits, a serving plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmcourse import sizing
from llmcourse.figures import (
    BLUE,
    FILL,
    GREEN,
    INK,
    MUTED,
    SERIES,
    SIZE_INCHES,
    VERMILION,
    _axes,
    _bars_down,
    _digits,
    _finish,
    _picture,
    _scaled,
    _value_beside,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


class Measured(Protocol):
    """A row of `compression.compression_table` or `activation_table`."""

    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def bits_per_weight(self) -> float: ...
    @property
    def perplexity(self) -> float: ...


@_picture
def code_lines(forms: Mapping[str, Sequence[float]]) -> Figure:
    """What each stored form can say: its values, scaled so that the largest is 1, on one line each."""
    if not forms or not all(len(values) and max(map(abs, values)) > 0 for values in forms.values()):
        raise ValueError("every form needs values, one of them not zero")
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 1.3 + 0.55 * len(forms)))
    counts = {}
    for row, (name, values) in enumerate(forms.items()):
        largest = max(map(abs, values))
        places = sorted({value / largest for value in values})
        counts[name] = len(places)
        axes.plot(places, [row] * len(places), "|", color=SERIES[row % len(SERIES)], markersize=18, mew=1.8)
    _bars_down(axes, list(forms))
    axes.set_xlabel("value, as a share of the largest")
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return _finish(
        figure,
        axes,
        title="The same bits, spent near zero or evenly",
        alt_text=f"Different values of each form: {told}.",
        device=None,
    )


# --------------------------------------------------------------------------------------------------- rounding


@dataclass(frozen=True)
class Rounded:
    """What rounding in groups does to a weight [N, K]; `error` is relative to the weight's own size (Frobenius)."""

    values: Tensor
    scale: float
    error: float
    clipped: float
    bits_per_weight: float


def rounded(weight: Tensor, *, bits: int, group_size: int, clip: float) -> Rounded:
    """Symmetric round-to-nearest of a weight [N, K], its groups' ranges cut to `clip` times their largest value.

    Scales are counted with 16 bits. Raises ValueError unless group_size divides K, bits is 2..8 and 0 < clip <= 1.
    """
    from llmcourse.kernels import check_weight, expanded, symmetric_codes

    if not 2 <= bits <= 8 or not 0 < clip <= 1:
        raise ValueError(f"expected bits of 2 to 8 and a clip above 0, at most 1; got {bits} and {clip}")
    wide = check_weight(weight)
    codes, scales = symmetric_codes(wide, bits=bits, group_size=group_size, clip=clip)
    values = expanded(codes, scales).float()
    error = float((values - wide).norm() / wide.norm().clamp(min=1e-30))
    half_steps = scales.repeat_interleave(group_size, dim=1) * (2 ** (bits - 1) - 0.5)
    clipped = float((wide.abs() > half_steps).float().mean())
    return Rounded(values, float(scales.median()), error, clipped, bits + 16 / group_size)


@_picture
def rounding(weight: Tensor, *, bits: int = 4, group_size: int = 64, clip: float = 1.0) -> Figure:
    """The values of a layer, and what they become: a histogram of both, with the error and the true bits."""
    found = rounded(weight, bits=bits, group_size=group_size, clip=clip)
    figure, axes = _axes()
    reach = (
        float(weight.abs().float().quantile(0.9995))
        if weight.numel() <= 1 << 24
        else float(weight.abs().max())
    )
    steps = {"weights as trained": (weight, FILL, 121), "rounded": (found.values, BLUE, 121)}
    for name, (values, color, bins) in steps.items():
        kept = values.detach().float().flatten().clamp(-reach, reach).numpy()
        axes.hist(kept, bins=bins, range=(-reach, reach), color=color, alpha=0.7, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("value")
    axes.set_ylabel("weights")
    axes.legend(frameon=False, loc="upper right")
    told = f", {100 * found.clipped:.2g} % clipped" if found.clipped else ""
    return _finish(
        figure,
        axes,
        title=f"{found.bits_per_weight:g} bits a weight, error {100 * found.error:.1f} % of the layer{told}",
        alt_text=f"{bits} bits, groups of {group_size}, ranges cut to {clip:g} of the largest value; the median "
        f"scale is {found.scale:.2g}.",
        device=None,
    )


# ------------------------------------------------------------------------------------------------- perplexity


@_picture
def perplexity_by_bits(rows: Sequence[Measured], *, title: str | None = None, ceiling: float = 4.0) -> Figure:
    """Held-out perplexity against true bits a weight, a line for each method; the first row is the model as it is.

    ceiling: perplexities above this many times the model's own leave the picture at the top.
    """
    if len(rows) < 2:
        raise ValueError(f"expected the model as trained and at least one row more, got {len(rows)} rows")
    base, *rest = rows
    lines: dict[str, list[Measured]] = {}
    for row in rest:
        lines.setdefault(row.method, []).append(row)
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 4.6))
    top = ceiling * base.perplexity
    for number, (name, found) in enumerate(lines.items()):
        found.sort(key=lambda row: row.bits_per_weight)
        color = SERIES[number % len(SERIES)]
        shown = [(row.bits_per_weight, min(row.perplexity, top)) for row in found]
        style = "o-" if len(found) > 1 else "D"
        axes.plot(*zip(*shown, strict=True), style, color=color, label=name, markersize=5)
    axes.axhline(base.perplexity, color=MUTED, linewidth=1, linestyle="--")
    axes.set_ylim(0.97 * base.perplexity, 1.03 * top)
    axes.set_yscale("log")
    ticks = [base.perplexity * factor for factor in (1, 1.5, 2, 3, 4) if factor <= ceiling]
    axes.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("true bits a weight (codes and scales)")
    axes.set_ylabel("held-out perplexity")
    axes.legend(frameon=False, loc="upper right", title="at the top edge: worse than shown", title_fontsize=8)
    told = "; ".join(f"{row.method} {row.bits_per_weight:.2f} bits {_digits(row.perplexity)}" for row in rest)
    return _finish(
        figure,
        axes,
        title=title or _cheapest(base, rest),
        alt_text=f"As trained {_digits(base.perplexity)}; {told}.",
        device=None,
    )


def _cheapest(base: Measured, rest: Sequence[Measured]) -> str:
    """The fewest bits that cost at most 5 %, and with which method."""
    good = [row for row in rest if row.perplexity <= 1.05 * base.perplexity]
    if not good:
        return f"Nothing here stays within 5 % of the perplexity as trained, {_digits(base.perplexity)}"
    best = min(good, key=lambda row: (row.bits_per_weight, row.perplexity))
    return (
        f"{best.method} stays within 5 % of the perplexity down to {best.bits_per_weight:.2f} bits a weight"
    )


@_picture
def perplexity_by_activation_bits(
    rows: Sequence[Measured], *, title: str | None = None, ceiling: float = 4.0
) -> Figure:
    """Held-out perplexity against the bits of activations: per tensor and per token, plain and smoothed."""
    if len(rows) < 2:
        raise ValueError(f"expected the model as trained and at least one row more, got {len(rows)} rows")
    base, *rest = rows
    lines: dict[str, list[Measured]] = {}
    for row in rest:
        lines.setdefault(row.method, []).append(row)
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 4.4))
    top = ceiling * base.perplexity
    colors = {"tensor": VERMILION, "token": BLUE}
    for name, found in lines.items():
        color = next((color for word, color in colors.items() if word in name), GREEN)
        places = [row.bits for row in found]
        values = [min(row.perplexity, top) for row in found]
        axes.plot(places, values, "o-" if "plain" in name else "s--", color=color, label=name, markersize=5)
    axes.axhline(base.perplexity, color=MUTED, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    ticks = [base.perplexity * factor for factor in (1, 1.5, 2, 3, 4) if factor <= ceiling]
    axes.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(sorted({row.bits for row in rest}))
    axes.set_xlabel("bits of an activation")
    axes.set_ylabel("held-out perplexity")
    axes.legend(frameon=False, loc="upper right")
    told = "; ".join(f"{row.method} at {row.bits} bits {_digits(row.perplexity)}" for row in rest)
    fewest = min(row.bits for row in rest)
    worst = {row.method: row.perplexity / base.perplexity for row in rest if row.bits == fewest}
    best = min(worst, key=worst.__getitem__)
    return _finish(
        figure,
        axes,
        title=title or f"At {fewest} bits, {best} loses least: {_digits(worst[best])} times the perplexity",
        alt_text=f"As trained {_digits(base.perplexity)}; {told}.",
        device=None,
    )


# ----------------------------------------------------------------------------------------------- serving, planned


@dataclass(frozen=True)
class ServingPlan:
    """Bytes and rates of decoding from memory; `tokens_per_s` counts all sequences of a batch together."""

    weight_bytes: float
    cache_bytes: float
    tokens_per_s: float
    compute_tokens_per_s: float

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


def serving_plan(
    config: Mapping[str, Any],
    *,
    bits_per_weight: float,
    cache_bits: float = 16,
    batch: int = 1,
    context_tokens: int = 4096,
    memory_bytes_per_s: float,
    flops_per_s: float,
) -> ServingPlan:
    """What a decoder's weights and cache take, and how many tokens a second they allow at most.

    A step reads every weight once and every sequence's whole cache, and multiplies in 16 bits whatever the weights
    are stored in: the slower of the two bounds a step. Activations, fragmentation and overheads are left out.

    >>> plan = serving_plan(sizing.PUBLIC_CONFIGS["Llama-3.1-8B"], bits_per_weight=16, context_tokens=0,
    ...     memory_bytes_per_s=3.35e12, flops_per_s=989e12)
    >>> f"{plan.weight_bytes / 1e9:.2f} GB, {plan.tokens_per_s:.0f} tokens/s"
    '16.06 GB, 209 tokens/s'
    """
    if bits_per_weight <= 0 or cache_bits <= 0 or batch < 1 or context_tokens < 0:
        raise ValueError(
            f"expected bits above 0, a batch of 1 or more and no negative context; got {bits_per_weight}, "
            f"{cache_bits}, {batch} and {context_tokens}"
        )
    weights = sizing.parameter_breakdown(config).total * bits_per_weight / 8
    cache = sizing.kv_cache_bytes_per_token(config, "bfloat16") * cache_bits / 16 * batch * context_tokens
    flops = batch * sizing.flops_per_token(config, context_tokens=max(1, context_tokens))
    read_s, compute_s = (weights + cache) / memory_bytes_per_s, flops / flops_per_s
    return ServingPlan(weights, cache, batch / max(read_s, compute_s), batch / compute_s)


@_picture
def serving(plans: Mapping[str, ServingPlan], *, memory_gb: float, title: str | None = None) -> Figure:
    """Memory of weights and cache as bars, a row a plan, with the memory there is; tokens a second beside each."""
    if not plans:
        raise ValueError("no plans: pass a mapping from a name to what serving_plan gives")
    figure, axes = _axes(size_inches=(SIZE_INCHES[0], 1.7 + 0.55 * len(plans)))
    for row, plan in enumerate(plans.values()):
        weights, cache = plan.weight_bytes / 1e9, plan.cache_bytes / 1e9
        axes.barh(row, weights, height=0.6, color=BLUE)
        axes.barh(row, cache, left=weights, height=0.6, color=VERMILION)
        fits = "" if weights + cache <= memory_gb else "does not fit, "
        _value_beside(axes, weights + cache, row, f"{fits}at most {plan.tokens_per_s:,.0f} tokens/s")
    axes.axvline(memory_gb, color=INK, linewidth=1.2, linestyle="--")
    _bars_down(axes, list(plans))
    longest = max(memory_gb, *(plan.total_bytes / 1e9 for plan in plans.values()))
    axes.set_xlim(0, 1.8 * longest)
    axes.set_xlabel(f"GB: weights, then cache; dashed: the {memory_gb:g} GB there are")
    fitting = [name for name, plan in plans.items() if plan.total_bytes <= memory_gb * 1e9]
    best = max(plans, key=lambda name: plans[name].tokens_per_s)
    found = f"{len(fitting)} of {len(plans)} fit into {memory_gb:g} GB; {best} decodes fastest"
    told = "; ".join(
        f"{name} {_scaled(plan.weight_bytes, 'B')} and {_scaled(plan.cache_bytes, 'B')}, at most "
        f"{plan.tokens_per_s:,.0f} tokens/s"
        for name, plan in plans.items()
    )
    return _finish(figure, axes, title=title or found, alt_text=f"Weights and cache: {told}.", device=None)
