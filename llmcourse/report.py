"""A verdict in words: text for a terminal, HTML for a notebook (JSON is `Verdict.to_json`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from llmcourse.judging import CostResult, ItemResult, Verdict

if TYPE_CHECKING:
    from llmcourse.checking import NotebookVerdict

AUTHORITY = {
    "worker": "counted beside the answer",
    "protocol": "counted by the harness",
    "outside": "measured from outside",
}
COLOURS = {"right": "#0072b2", "not attempted": "#888888"}
WRONG_COLOUR = "#d55e00"
MARK = {True: "✓", False: "✗"}


def short(value: object) -> str:
    """A value's repr, cut to a few words."""
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def number(value: float) -> str:
    """Points or counts without needless digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def headline(verdict: Verdict) -> str:
    return (
        f"{verdict.name}: {verdict.verdict}, {number(verdict.points)} of {number(verdict.max_points)} points"
    )


def case_line(result: ItemResult) -> str:
    """One case: its title and, where it failed, what was expected and found."""
    line = f"{MARK[result.agrees]} {result.item.title}"
    return line if result.agrees else f"{line}\n    {result.reason}"


def cost_line(cost: CostResult, where: str = "") -> str:
    """One cost beside its bound, and who counted it; `where` says in which item, if there are several."""
    counted = "not counted on this system" if cost.counted is None and cost.agrees else "not counted"
    found = number(cost.counted) if cost.counted is not None else counted
    bound = f", at most {number(cost.at_most)}" if cost.at_most is not None else ""
    told = f" · {where}" if where else ""
    return f"{MARK[cost.agrees]} {cost.name}: {found}{bound} ({AUTHORITY[cost.authority]}){told}"


def _where(result: ItemResult, verdict: Verdict) -> str:
    """The item a cost was counted in, where costs were counted in several."""
    return result.item.title if sum(bool(other.costs) for other in verdict.results) > 1 else ""


def race_line(verdict: Verdict) -> str:
    """The race in one line: how fast beside the baseline, what our own reached, what was asked, and the verdict."""
    race, result = verdict.exercise.race if verdict.exercise else None, verdict.race
    if race is None or result is None:
        return ""
    mark = {"passed": "✓", "failed": "✗"}.get(result.verdict, "·")
    found, ours = result.against_baseline, result.reference_gain
    if found is None or ours is None or result.bar is None:
        return f"{mark} race: {race.title} {result.reason}"
    return (
        f"{mark} race: {race.title} yours {found.middle:.2f}x the baseline [{found.low:.2f}, {found.high:.2f}], the "
        f"course's {ours.middle:.2f}x, asked for {result.bar:.2f}x, {result.rounds} rounds: {result.reason}"
    )


def roofline_gain(verdict: Verdict) -> float | None:
    """How many times as fast as the baseline a lap is that only reads its bytes at this machine's bandwidth."""
    race, result = verdict.exercise.race if verdict.exercise else None, verdict.race
    if race is None or result is None or not race.bytes_moved or not result.rounds:
        return None
    from statistics import median

    from llmcourse.machine import probe

    laps = zip(result.seconds["baseline"], result.seconds["no-op"], strict=True)
    baseline_s = median(lap - transfer for lap, transfer in laps)
    return baseline_s / (race.bytes_moved / probe().read_bytes_per_s_one_thread)


def found_when(verdict: Verdict) -> str:
    """What introduces a mistake; it does as the answer did, which is no proof that the answer does as it does."""
    return "You get this, for example, when:" if len(verdict.mistakes) == 1 else "Probably one of these:"


def _shown(verdict: Verdict) -> list[ItemResult]:
    return [] if verdict.verdict == "not attempted" else list(verdict.results)


def tried(calls: Sequence[str]) -> str:
    """The call a case made, or the first of those it made."""
    return f"tried: {calls[0]}" if len(calls) == 1 else f"called several times, first as: {calls[0]}"


def text(verdict: Verdict) -> str:
    """The report as plain text."""
    lines = [headline(verdict)]
    if verdict.verdict == "not attempted" or not verdict.results:
        lines.append(f"  {verdict.reason}")
    lines += [f"  {found_when(verdict)} {mistake.sentence}" for mistake in verdict.mistakes]
    for result in _shown(verdict):
        if result.item.kind == "case" or (not result.agrees and not result.costs):
            lines.append("  " + case_line(result).replace("\n", "\n  "))
            if not result.agrees and result.outcome.tried:
                lines.append(f"      {tried(result.outcome.tried)}")
        lines += [f"  {cost_line(cost, _where(result, verdict))}" for cost in result.costs]
    if verdict.race is not None:
        lines.append(f"  {race_line(verdict)}")
    lines += [f"  Note: {note}" for note in verdict.notes]
    if verdict.results and verdict.verdict == "wrong" and verdict.seed is not None:
        lines.append(f"  To repeat with the same inputs: check({verdict.name}, seed={verdict.seed})")
    return "\n".join(lines)


def without_inputs(verdict: Verdict) -> Verdict:
    """The verdict as a class may see it: no seed, no arguments, no message an answer could have written them into."""
    told = {result.reason: _reason_alone(result) for result in verdict.results if result.reason}
    results = tuple(
        replace(result, reason=told.get(result.reason or ""), outcome=replace(result.outcome, tried=()))
        for result in verdict.results
    )
    reason = verdict.reason
    for whole, part in told.items():
        reason = reason.replace(whole, part)
    return replace(verdict, results=results, reason=reason, seed=None)


def _reason_alone(result: ItemResult) -> str:
    error = result.outcome.error
    if error is None or error["kind"] != "raised" or result.reason is None:
        return result.reason or ""
    return result.reason.replace(f"{error['type']}: {error['message']}", str(error["type"]))


def notebook_text(verdict: NotebookVerdict) -> str:
    """The report of a whole notebook as plain text."""
    lines = [text(one) for one in verdict.exercises]
    lines += [f"Note: {note}" for note in verdict.notes]
    extra = f", and {number(verdict.extra_points)} extra" if verdict.extra_points else ""
    points = f"{number(verdict.points)} of {number(verdict.max_points)} points{extra}"
    lines.append(f"{verdict.notebook}: {points}, judged {verdict.level}")
    return "\n".join(lines)


STYLE = (
    "border-left:4px solid {colour};padding:.5em .9em;margin:.3em 0;max-width:52em;"
    "font-family:var(--jp-ui-font-family,sans-serif);font-size:13px;line-height:1.45"
)
MUTED = "color:var(--jp-ui-font-color2,#666)"
CODE = "font-family:var(--jp-code-font-family,monospace);font-size:12px;white-space:pre-wrap"


def html(verdict: Verdict) -> str:
    """The report for a notebook: readable in a light and a dark theme, nothing in it is a link or a script."""
    colour = COLOURS.get(verdict.verdict, WRONG_COLOUR)
    points = f"{number(verdict.points)} of {number(verdict.max_points)} points"
    style, word = STYLE.format(colour=colour), escape(verdict.verdict)
    name = f"<code>{escape(verdict.name)}</code>"
    parts = [
        f"<div class='llmcourse-report' data-verdict='{word}' style='{style}'>",
        f"<div><b style='color:{colour}'>{word}</b> · {name} · {points}</div>",
    ]
    if verdict.verdict == "not attempted" or not verdict.results:
        parts.append(f"<div>{escape(verdict.reason)}</div>")
    parts += [_mistake_html(found_when(verdict), mistake.sentence) for mistake in verdict.mistakes]
    parts += [_item_html(result, _where(result, verdict)) for result in _shown(verdict)]
    if verdict.race is not None:
        parts.append(f"<div>{escape(race_line(verdict))}</div>{_race_svg(verdict)}")
    parts += [f"<div style='{MUTED}'>Note: {escape(note)}</div>" for note in verdict.notes]
    if verdict.results and verdict.verdict == "wrong" and verdict.seed is not None:
        call = escape(f"check({verdict.name}, seed={verdict.seed})")
        parts.append(f"<div style='{MUTED}'>Same inputs again: <code>{call}</code></div>")
    return "\n".join([*parts, "</div>"])


def _mistake_html(words: str, sentence: str) -> str:
    style = "margin:.4em 0;padding:.4em .7em;background:var(--jp-layout-color2,#f3f3f3)"
    return f"<div class='llmcourse-mistake' style='{style}'>{words} <b>{escape(sentence)}</b></div>"


def _item_html(result: ItemResult, where: str) -> str:
    colour = COLOURS["right"] if result.agrees else WRONG_COLOUR
    mark = f"<span style='color:{colour};font-weight:bold'>{MARK[result.agrees]}</span>"
    lines = []
    if result.item.kind == "case" or (not result.agrees and not result.costs):
        lines.append(f"<div>{mark} {escape(result.item.title)}</div>")
    for cost in result.costs:
        lines.append(
            f"<div><span style='color:{COLOURS['right'] if cost.agrees else WRONG_COLOUR};font-weight:bold'>"
            f"{MARK[cost.agrees]}</span> {escape(cost_line(cost, where)[2:])}</div>"
        )
    if not result.agrees and not result.costs:
        told = f"\n{tried(result.outcome.tried)}" if result.outcome.tried else ""
        lines.append(f"<div style='{CODE};margin-left:1.3em'>{escape((result.reason or '') + told)}</div>")
    return "".join(lines)


ROW, LEFT, WIDE = 20, 90, 520  # pixels: height of a bar, room for its name, width of the longest


def _race_svg(verdict: Verdict) -> str:
    """Bars of how many times as fast as the baseline: answer with its interval, ours, the bar, the roofline."""
    result = verdict.race
    if result is None or result.against_baseline is None or result.reference_gain is None:
        return ""
    assert result.bar is not None
    limit = roofline_gain(verdict)
    answer, ours = result.against_baseline, result.reference_gain
    scale = WIDE / (1.05 * max(answer.high, ours.high, limit or 0.0, 1.0))
    rows = [
        ("baseline", 1.0, "#999999"),
        ("yours", answer.middle, "#0072b2"),
        ("ours", ours.middle, "#56b4e9"),
    ]
    parts = []
    for row, (name, value, colour) in enumerate(rows):
        top = row * ROW
        parts.append(f"<text x='0' y='{top + 14}'>{name} {value:.2f}x</text>")
        parts.append(
            f"<rect x='{LEFT}' y='{top + 4}' width='{scale * value:.1f}' height='{ROW - 8}' fill='{colour}'/>"
        )
    spread = f"M{LEFT + scale * answer.low:.1f} {ROW + 10}H{LEFT + scale * answer.high:.1f}"
    parts.append(f"<path d='{spread}' stroke='currentColor' stroke-width='2'/>")
    marks = [("asked", result.bar, "4 2"), *([("roofline", limit, "1 2")] if limit else [])]
    for row, (name, value, dashes) in enumerate(marks):
        x, bottom = LEFT + scale * value, len(rows) * ROW
        parts.append(f"<path d='M{x:.1f} 0V{bottom}' stroke='{WRONG_COLOUR}' stroke-dasharray='{dashes}'/>")
        parts.append(
            f"<text x='{x:.1f}' y='{bottom + 13 * (row + 1)}' text-anchor='middle'>{name} {value:.2f}x</text>"
        )
    height = len(rows) * ROW + 13 * len(marks) + 6
    return (
        f"<svg class='llmcourse-race' width='{LEFT + WIDE + 60}' height='{height}' fill='currentColor' "
        f"font-size='11' role='img' aria-label='race'>{''.join(parts)}</svg>"
    )


def hint_html(hint: str) -> str:
    """A hint for a notebook."""
    lines = "<br>".join(escape(line) for line in hint.splitlines())
    return f"<div style='{STYLE.format(colour='#e69f00')}'>{lines}</div>"
