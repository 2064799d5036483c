"""Small drawings inside tables, as SVG in the page: an interval against its limit, a histogram, a bar."""

from __future__ import annotations

import math

from markupsafe import Markup

from fewbit.report import words
from fewbit.search.budget import parse_budget
from fewbit.search.trial import BudgetCheck, Histogram

SQNR_FULL_DB = 60.0
KEYS = {
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<rect x="3.5" y="3.5" width="9" height="9"/>',
    "diamond": '<path d="M8 2 14 8 8 14 2 8Z"/>',
    "triangle-up": '<path d="M8 2.5 14 13H2Z"/>',
    "ring": '<circle class="hollow" cx="8" cy="8" r="6"/>',
    "cross": '<path class="hollow" d="M4 4 12 12M12 4 4 12"/>',
    "line": '<path class="hollow" d="M0 8H16"/>',
}


def key(shape: str, colour: str) -> Markup:
    """Draw the mark of a legend's entry; `colour` is a CSS colour."""
    drawn = Markup(KEYS[shape])
    start = Markup('<svg class="key" style="color: {}" width="16" height="16" aria-hidden="true">')
    return start.format(colour) + drawn + Markup("</svg>")


def whisker(check: BudgetCheck, low: float, high: float, width: int = 260, height: int = 30) -> Markup:
    """Draw a measured value with its interval, its limit dashed, the side inside the limit tinted.

    Args:
        check: The budget and what was measured.
        low: The value at the left edge.
        high: The value at the right edge.
        width: In pixels.
        height: In pixels.
    """

    def at(value: float) -> float:
        return round(width * (value - low) / (high - low), 1)

    budget = parse_budget(check.budget)
    limit, middle = at(check.limit), height / 2
    start, length = (limit, width - limit) if budget.larger_is_better else (0.0, limit)
    value, interval = words.measured(check)
    return Markup(
        '<svg class="mark" role="img" width="{w}" height="{h}" viewBox="0 0 {w} {h}" aria-label="{label}">'
        '<rect class="inside" x="{start}" y="3" width="{length}" height="{inner}" rx="2"/>'
        '<line class="base" x1="0" x2="{w}" y1="{m}" y2="{m}"/>'
        '<line class="limit" x1="{limit}" x2="{limit}" y1="0" y2="{h}"/>'
        '<line class="whisker" x1="{a}" x2="{b}" y1="{m}" y2="{m}"/>'
        '<circle class="dot" cx="{v}" cy="{m}" r="4.5"/></svg>'
    ).format(
        w=width,
        h=height,
        m=middle,
        label=f"{value} {interval}, budget {check.budget}",
        start=start,
        length=round(length, 1),
        inner=height - 6,
        limit=limit,
        a=at(check.low),
        b=at(check.high),
        v=at(check.value),
    )


def whisker_range(checks: list[BudgetCheck]) -> tuple[float, float]:
    """Return the edges that hold every interval and limit of one budget, with some room."""
    ends = [end for check in checks for end in (check.low, check.high, check.value, check.limit)]
    room = 0.12 * (max(ends) - min(ends)) or max(abs(ends[0]), 1e-6) * 0.5
    return min(ends) - room, max(ends) + room


def spark(
    histogram: Histogram | None,
    css: str,
    width: int = 72,
    height: int = 22,
    ends: tuple[float, float] | None = None,
) -> Markup:
    """Draw a histogram in a table's cell; heights are logarithmic, so that tails show.

    Args:
        histogram: What to draw; none draws nothing.
        css: Class of its area.
        width: In pixels.
        height: In pixels.
        ends: Of the grid, marked where they lie within the histogram.
    """
    if histogram is None or not any(histogram.counts):
        return Markup("")
    counts, _ = merge(histogram.counts, width // 2)
    step, full = width / len(counts), math.log1p(max(counts))
    path = f"M0 {height}"
    for index, count in enumerate(counts):
        top = round(height * (1 - math.log1p(count) / full), 1)
        path += f"V{top:g}H{round((index + 1) * step, 1):g}"
    return Markup(
        '<svg class="mark" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">'
        '<path class="area {css}" d="{path}V{h}Z"/>{ends}</svg>'
    ).format(
        w=width,
        h=height,
        css=css,
        path=path,
        label=f"histogram from {histogram.low:.3g} to {histogram.high:.3g}{_said(ends)}",
        ends=_end_marks(histogram, ends or (), width, height),
    )


def _said(ends: tuple[float, float] | None) -> str:
    return f", grid from {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""


def _end_marks(histogram: Histogram, ends: tuple[float, ...], width: int, height: int) -> Markup:
    """Draw a line at each end of a grid, at the edge where it lies outside."""
    span = histogram.high - histogram.low
    places = [min(max((end - histogram.low) / span, 0.0), 1.0) for end in ends]
    line = Markup('<line class="end" x1="{x}" x2="{x}" y1="0" y2="{h}"/>')
    return Markup("").join(line.format(x=round(width * place, 1), h=height) for place in places)


def merge(counts: tuple[int, ...], most: int) -> tuple[list[int], int]:
    """Add up neighbouring bins until there are at most `most`; also tell how many make one.

    >>> merge((1, 2, 3, 4, 5), 3)
    ([3, 7, 5], 2)
    """
    step = max(1, math.ceil(len(counts) / most))
    return [sum(counts[start : start + step]) for start in range(0, len(counts), step)], step


def sqnr_bar(decibel: float | None) -> Markup:
    """Draw a signal to noise ratio as a bar that is full at 60 dB."""
    if decibel is None:
        return Markup("")
    share = min(max(decibel / SQNR_FULL_DB, 0.0), 1.0)
    return Markup('<div class="sqnr"><span>{} dB</span><i><b style="width:{}%"></b></i></div>').format(
        words.number(decibel, 1), round(100 * share)
    )
