"""The networks of a study that compares several: one mark and one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from fewbit.report import words
from fewbit.report.plots import (
    AXIS,
    LOOK,
    WIDE,
    Figure,
    Key,
    add_budgets,
    colour_of,
    hover_of,
    plain,
    ticks_of,
)
from fewbit.report.summary import axis_k, is_float, top
from fewbit.report.tables import Cell, Column, Row, Table, size_of
from fewbit.search.budget import parse_budget
from fewbit.search.standing import measured
from fewbit.search.trial import LeftOut, NetworkCost, StudyRecord, Trial


class Member(NamedTuple):
    """One network of a family.

    Attributes:
        name: Its name.
        cost: Its multiplications and weights; none of a study that did not count them.
        before: Its fastest float32.
        best: The answer where it is of this network, else its best quantized trial: inside the budgets before
            outside, then by the objective; none where it was not quantized.
        inside: `best` is inside every budget on the search images.
        left_out: Engines that it was not quantized for.
    """

    name: str
    cost: NetworkCost | None
    before: Trial
    best: Trial | None
    inside: bool
    left_out: tuple[LeftOut, ...]


def members(study: StudyRecord) -> tuple[Member, ...]:
    """Return the networks whose float32 ran, the best first; none where only one competes."""
    names = list(dict.fromkeys(trial.network for trial in study.trials))
    found = [member for name in names if (member := _member(study, name)) is not None]
    found.sort(key=lambda m: (not m.inside, m.best is None, -_worth(study, m.best or m.before)))
    return tuple(found) if len(names) > 1 else ()


def families_table(study: StudyRecord) -> Table:
    """Make the table of the networks: what each costs, its float32, and what quantizing it brought."""
    k = axis_k(study)
    right: dict[str, Any] = {"css": "num", "kind": "number"}
    more: dict[str, Any] = {"first": "descending", **right}
    columns = (
        Column("Network"),
        Column("Came to"),
        Column("MACs", **right),
        Column("Weights", **right),
        Column(f"Float top-{k}", **more),
        Column("Float images/s", **more),
        Column("Best images/s", **more),
        Column("Gain", **more),
        Column(f"Top-{k}", **more),
        Column("Size", **right),
    )
    return Table(columns, tuple(_row(study, member, k) for member in members(study)))


def families_plot(study: StudyRecord) -> Figure | None:
    """Draw accuracy over speed with one mark a network, joined to that of its float32.

    A network that was not quantized has its float32 alone, with a dotted line over the speeds that it might
    have reached by the forecast.

    Returns:
        The figure, or none where fewer than two networks have both figures.
    """
    k = axis_k(study)
    shown = [m for m in members(study) if m.before.timing is not None and m.before.accuracy is not None]
    if len(shown) < 2:
        return None
    figure = go.Figure(layout=_layout(k, shown))
    legend = [_add_member(figure, study, member, k) for member in shown]
    add_budgets(figure, study)
    quantized = sum(m.best is not None for m in shown)
    label = (
        f"Top-{k} accuracy over images per second of {len(shown)} networks: float32 and the best of each, "
        f"{quantized} of them quantized. The table has every figure."
    )
    return Figure(figure.to_json(), label, tuple(legend))


def _member(study: StudyRecord, name: str) -> Member | None:
    trials = [t for t in study.trials if t.network == name and t.state == "measured"]
    floats = [t for t in trials if t.recipe == "float32"]
    if not floats:
        return None
    others = [t for t in trials if t not in floats and t.recipe != "float32-pixels" and t.accuracy]
    best = max(others, key=lambda t: (_inside(study, t), _worth(study, t)), default=None)
    key = study.answer.key if study.answer is not None else ""
    best = next((t for t in others if t.key == key), best)
    return Member(
        name=name,
        cost=next((cost for cost in study.networks if cost.network == name), None),
        before=max(floats, key=_rate),
        best=best,
        inside=_inside(study, best or max(floats, key=_rate)),
        left_out=tuple(one for one in study.left_out if one.network == name),
    )


def _inside(study: StudyRecord, trial: Trial) -> bool:
    checks = [parse_budget(text).check(measured(trial)) for text in study.budgets]
    return all(check is not None and check.met for check in checks)


def _worth(study: StudyRecord, trial: Trial) -> float:
    if study.objective == "size":
        return -float(trial.counted_bytes) if trial.bytes else float("-inf")
    return _rate(trial)


def _rate(trial: Trial) -> float:
    return trial.timing.images_per_s if trial.timing is not None else 0.0


def _row(study: StudyRecord, member: Member, k: Literal[1, 5]) -> Row:
    cost, before, best = member.cost, member.before, member.best
    gain = best.timing.ratio if best is not None and best.timing is not None else None
    answer = study.answer is not None and best is not None and best.key == study.answer.key
    quantized = (
        (
            _rate_cell(best),
            Cell(f"{gain:.2f}x", sort=str(gain)) if gain else Cell(),
            _accuracy_cell(best, k),
            size_of(best),
        )
        if best is not None
        else (Cell(),) * 4
    )
    return Row(
        cells=(
            Cell(member.name, sort=member.name),
            _came_to(member, answer),
            Cell(_count(cost.macs), _kinds(cost), str(cost.macs)) if cost else Cell(),
            Cell(_count(cost.weights), sort=str(cost.weights)) if cost else Cell(),
            _accuracy_cell(before, k),
            _rate_cell(before),
            *quantized,
        ),
        network=member.name,
        answer=answer,
    )


def _came_to(member: Member, answer: bool) -> Cell:
    if answer:
        return Cell("the answer", sort="0")
    inside = "inside the budget" if member.inside else "outside the budget"
    if member.best is None:
        how = ("left out", "2") if member.left_out else ("not tried", "3")
        return Cell(how[0], f"float32 is {inside}", how[1])
    return Cell(inside, sort="1")


def _rate_cell(trial: Trial) -> Cell:
    how = trial.setting.engine if trial.recipe == "float32" else f"{trial.recipe}, {trial.setting.engine}"
    return Cell(f"{_rate(trial):,.0f}", how, str(_rate(trial))) if trial.timing else Cell()


def _accuracy_cell(trial: Trial, k: Literal[1, 5]) -> Cell:
    if trial.accuracy is None:
        return Cell()
    level, ends = top(trial.accuracy, k), trial.accuracy.interval(k)
    return Cell(words.percent(level, 1), words.hundred(ends.low, ends.high), str(level))


def _count(value: int) -> str:
    """Write a count with three digits.

    >>> _count(999), _count(41_200_000), _count(1_810_000_000)
    ('999', '41.2 M', '1.81 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _kinds(cost: NetworkCost) -> str:
    kinds = (("dense", cost.dense_macs), ("1x1", cost.pointwise_macs), ("depthwise", cost.depthwise_macs))
    shares = [(f"{100 * count / max(cost.macs, 1):.0f}", name) for name, count in kinds]
    return ", ".join(f"{share} % {name}" for share, name in shares if share != "0")


def _add_member(figure: go.Figure, study: StudyRecord, member: Member, k: Literal[1, 5]) -> Key:
    """Draw one network: float32 hollow, the best filled, a line between; or what it might have reached."""
    colour = colour_of(study, member.name)
    points = [t for t in (member.before, member.best) if t is not None and t.timing and t.accuracy]
    reach = [one for one in member.left_out if one.reason == "speed" and one.low and one.high]
    if member.best is None and reach:
        assert member.before.accuracy is not None
        level = top(member.before.accuracy, k)
        figure.add_scatter(
            x=[min(one.low or 0.0 for one in reach), max(one.high or 0.0 for one in reach)],
            y=[level, level],
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=[_rate(t) for t in points],
        y=[top(t.accuracy, k) for t in points if t.accuracy],
        error_y=_bars(points, k, colour_of(study, member.name, soft=True)),
        mode="lines+markers+text",
        line={"color": colour, "width": 1.5},
        marker={
            "size": 11,
            "symbol": ["circle-open" if is_float(t) else "circle" for t in points],
            "color": colour,
            "line": {"width": 1.5, "color": [colour if is_float(t) else "var(--paper)" for t in points]},
        },
        text=["", *[plain(member.name)] * (len(points) - 1)] if len(points) > 1 else [plain(member.name)],
        textposition="top center",
        textfont={"color": colour, "size": 12},
        customdata=[t.key for t in points],
        cliponaxis=False,
        **hover_of(points),
    )
    return Key(len(figure.data) - 1, member.name, "circle", colour)


def _bars(points: Sequence[Trial], k: Literal[1, 5], colour: str) -> dict[str, object]:
    known = [(top(t.accuracy, k), t.accuracy.interval(k)) for t in points if t.accuracy]
    return {
        "type": "data",
        "array": [ends.high - level for level, ends in known],
        "arrayminus": [level - ends.low for level, ends in known],
        "color": colour,
        "thickness": 1.5,
        "width": 0,
    }


def _layout(k: Literal[1, 5], shown: Sequence[Member]) -> go.Layout:
    rates = [_rate(t) for m in shown for t in (m.before, m.best) if t is not None and t.timing is not None]
    reach = [one for m in shown if m.best is None for one in m.left_out if one.reason == "speed"]
    rates += [end for one in reach for end in (one.low, one.high) if end]
    title = {"text": "images per second", "standoff": 10, "font": {"size": 13}}
    horizontal: dict[str, object] = {**AXIS, "title": title, "tickformat": ","}
    if max(rates) / min(rates) > WIDE:
        ticks = ticks_of(min(rates), max(rates))
        horizontal |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.0f}" for tick in ticks]}
    vertical = {"text": f"top-{k} accuracy on search images", "standoff": 12, "font": {"size": 13}}
    return go.Layout(
        **LOOK,
        height=430,
        margin={"l": 60, "r": 24, "t": 24, "b": 52},
        hovermode="closest",
        xaxis=horizontal,
        yaxis={**AXIS, "title": vertical, "tickformat": ".1~%"},
        showlegend=False,
    )
