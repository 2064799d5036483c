"""The report's figures, made with plotly.

Colours are names of CSS variables, which the page fills in for its theme. Every text that comes from the
user is escaped, since plotly reads a subset of HTML in its texts.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import plotly.graph_objects as go

from fewbit.measure.accuracy import Interval
from fewbit.report import words
from fewbit.report.summary import (
    accuracy_budget,
    axis_k,
    float_accuracy,
    fronts,
    is_float,
    speed,
    top,
)
from fewbit.search.budget import parse_budget
from fewbit.search.trial import StudyRecord, Trial

COLOURS = 6
WIDE = 10  # From this ratio of the largest to the smallest on, an axis is logarithmic.
SYMBOLS = {"onnxruntime": "circle", "openvino": "square", "reference": "diamond"}
Against = Literal["speed", "bytes"]


class Key(NamedTuple):
    """An entry of a legend: the trace that it shows and hides, its name, its shape and colour."""

    trace: int
    name: str
    shape: str
    colour: str


class Figure(NamedTuple):
    """A figure and what it says to a reader who cannot see it.

    Attributes:
        json: For plotly.js.
        label: One or two sentences.
        legend: What its marks mean.
        near: The part of the accuracy axis around the budget, where that hides outliers; else none.
        hidden: Trials below that part.
    """

    json: str
    label: str
    legend: tuple[Key, ...] = ()
    near: tuple[float, float] | None = None
    hidden: int = 0


class _Axis(NamedTuple):
    title: str
    value: Callable[[Trial], float | None]
    interval: Callable[[Trial], Interval | None]
    write: Callable[[float], str]
    linear: dict[str, str]


def colour_of(study: StudyRecord, network: str, soft: bool = False) -> str:
    """Return the CSS variable of a network's colour; `soft` is for its error bars."""
    networks = list(dict.fromkeys(trial.network for trial in study.trials))
    return f"var(--net-{networks.index(network) % COLOURS}{'-soft' if soft else ''})"


def accuracy_against(study: StudyRecord, against: Against) -> Figure | None:
    """Draw the accuracy of every trial against its speed or its bytes.

    Error bars are 95 % intervals: of a drop budget the paired interval of the drop, laid at the trial's
    accuracy; otherwise the Wilson interval of the accuracy. The front joins the trials that no other beats.

    Returns:
        The figure, or none where no trial has both figures.
    """
    axis = _axis(study, against)
    shown = [t for t in study.trials if t.accuracy is not None and axis.value(t) is not None]
    if not shown:
        return None
    figure = go.Figure(layout=_layout(study, axis, shown))
    legend = [_add_front(figure, fronts(study)[against], axis, axis_k(study))]
    legend += _add_answer(figure, study, shown, axis)
    for (network, engine), group in _groups(shown):
        legend.append(_add_trials(figure, study, group, axis, network, engine))
    legend += _add_dropped(figure, study, shown, axis)
    add_budgets(figure, study)
    levels = [top(t.accuracy, axis_k(study)) for t in shown if t.accuracy]
    near, hidden = _near(levels, [level for _, level, _ in budget_lines(study)])
    if near is not None:
        figure.update_yaxes(range=near)
    return Figure(figure.to_json(), _label(study, shown, axis, against), tuple(legend), near, hidden)


def budget_lines(study: StudyRecord) -> list[tuple[str, float, str | None]]:
    """Return where the budgets lie on the accuracy axis: text, accuracy, and the network where it differs."""
    lines: list[tuple[str, float, str | None]] = []
    for budget in (parse_budget(text) for text in study.budgets):
        if budget.k != axis_k(study):
            continue
        if not budget.of_drop:
            lines.append((budget.text, budget.limit if budget.larger_is_better else 1 - budget.limit, None))
            continue
        for network in dict.fromkeys(trial.network for trial in study.trials):
            level = _float_level(study, network, budget.k)
            if level is not None:
                lines.append((budget.text, level - budget.limit, network))
    return lines


def histograms() -> Figure:
    """Draw the empty figure that the page fills with the chosen layer's weights and activations."""
    figure = go.Figure()
    for axis, colour in (("", "var(--net-0)"), ("2", "var(--accent)")):
        figure.add_bar(
            x=[0.0],
            y=[0],
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x:.4g}: %{y:,}<extra></extra>",
            xaxis=f"x{axis}",
            yaxis=f"y{axis}",
            showlegend=False,
        )
    log = {**AXIS, "type": "log", "tickformat": "~s", "dtick": 1, "rangemode": "tozero"}
    figure.update_layout(
        **LOOK,
        height=400,
        margin={"l": 44, "r": 8, "t": 28, "b": 36},
        bargap=0,
        grid={"rows": 2, "columns": 1, "pattern": "independent", "ygap": 0.42},
        xaxis=AXIS,
        xaxis2=AXIS,
        yaxis=log,
        yaxis2=log,
    )
    return Figure(figure.to_json(), "Histograms of the chosen layer: its weights and its output.")


def facts(trial: Trial) -> Iterator[str]:
    """Say all that is known of a trial, a line each."""
    yield f"{trial.network}: {words.recipe(trial.recipe, trial.keep_float)}"
    yield words.setting(trial.setting) + (
        "" if trial.setting.float_precision == "float32" else ", floats in bf16"
    )
    if trial.accuracy is not None:
        for k in (1, 5):
            ends = trial.accuracy.interval(k)
            level = words.percent(top(trial.accuracy, k), 2)
            yield f"top-{k} {level} {words.hundred(ends.low, ends.high)}"
        yield f"on {words.several(trial.accuracy.total, 'image')}"
    if trial.versus_float is not None:
        versus = trial.versus_float
        ends = versus.interval()
        drop, flips = words.points(versus.top1_drop, 2), words.percent(versus.flips, 2)
        yield f"top-1 drop {drop} {words.hundred(ends.low, ends.high, 2)}, {flips} flips"
    if trial.timing is not None:
        timing = trial.timing
        if timing.ratio is not None and timing.ratio_interval is not None:
            ratio = f"{timing.ratio:.2f}x {words.between(timing.ratio_interval)}"
            yield f"{ratio} the speed of the fastest float32"
        yield f"{timing.images_per_s:,.0f} images/s, {words.milliseconds(timing.ms_per_batch_p50)} a batch"
    if trial.bytes:
        packed = f", {words.size(trial.packed_bytes)} with weights packed" if trial.packed_bytes else ""
        yield words.size(trial.bytes) + packed
    if trial.placement is not None:
        placement = trial.placement
        yield f"{placement.integer_operators} operators in integers, {placement.float_operators} in float"
    if trial.state != "measured":
        yield f"{trial.state}: {trial.reason}"


AXIS = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--line)",
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 10},
}
LOOK = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "var(--sans)", "size": 13, "color": "var(--ink-2)"},
    "hoverlabel": {
        "bgcolor": "var(--card)",
        "bordercolor": "var(--line)",
        "font": {"color": "var(--ink)", "size": 13, "family": "var(--sans)"},
        "align": "left",
        "namelength": 0,
    },
}


def _layout(study: StudyRecord, axis: _Axis, shown: Sequence[Trial]) -> go.Layout:
    values = [value for trial in shown if (value := axis.value(trial)) is not None]
    horizontal: dict[str, object] = {
        **AXIS,
        "title": {"text": axis.title, "standoff": 10, "font": {"size": 13}},
    }
    if min(values) > 0 and max(values) / min(values) > WIDE:
        ticks = ticks_of(min(values), max(values))
        horizontal |= {"type": "log", "tickvals": ticks, "ticktext": [axis.write(tick) for tick in ticks]}
    else:
        horizontal |= axis.linear
    return go.Layout(
        **LOOK,
        height=430,
        margin={"l": 60, "r": 12, "t": 8, "b": 52},
        hovermode="closest",
        xaxis=horizontal,
        yaxis={
            **AXIS,
            "title": {
                "text": f"top-{axis_k(study)} accuracy on search images",
                "standoff": 12,
                "font": {"size": 13},
            },
            "tickformat": ".1~%",
        },
        showlegend=False,
    )


def _axis(study: StudyRecord, against: Against) -> _Axis:
    if against == "bytes":
        packed = any(trial.packed_bytes for trial in study.trials)
        return _Axis(
            f"bytes of the exported file{', weights under 8 bits packed' if packed else ''}",
            lambda trial: trial.counted_bytes or None,
            lambda trial: None,
            lambda value: words.size(round(value)),
            {"tickformat": "~s", "ticksuffix": "B"},
        )
    if len({trial.network for trial in study.trials}) > 1:
        return _Axis(
            "images per second",
            speed(study),
            lambda trial: trial.timing.interval if trial.timing else None,
            lambda value: f"{value:,.0f}",
            {"tickformat": ","},
        )
    return _Axis(
        "speed, times the fastest float32",
        speed(study),
        lambda trial: trial.timing.ratio_interval if trial.timing else None,
        lambda value: f"{value:g}x",
        {"ticksuffix": "x"},
    )


def ticks_of(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... where a logarithmic axis shows them.

    >>> ticks_of(0.3, 4)
    [0.2, 0.5, 1.0, 2.0, 5.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    return [tick for tick in every if 0.4 * low < tick < 2.5 * high]


def _groups(trials: Sequence[Trial]) -> Iterator[tuple[tuple[str, str], list[Trial]]]:
    measured = [trial for trial in trials if trial.state == "measured"]

    def key(trial: Trial) -> tuple[str, str]:
        return trial.network, trial.setting.engine

    for name, group in itertools.groupby(sorted(measured, key=key), key):
        yield name, list(group)


def _add_trials(
    figure: go.Figure, study: StudyRecord, trials: list[Trial], axis: _Axis, network: str, engine: str
) -> Key:
    k = axis_k(study)
    shape = SYMBOLS.get(engine, "triangle-up")
    colour, soft = colour_of(study, network), colour_of(study, network, soft=True)
    several = len({trial.network for trial in study.trials}) > 1
    figure.add_scatter(
        x=[axis.value(trial) for trial in trials],
        y=[top(trial.accuracy, k) for trial in trials if trial.accuracy],
        error_x=_bars([(axis.value(t), axis.interval(t)) for t in trials], soft),
        error_y=_bars([_level(t, study) for t in trials], soft),
        mode="markers",
        marker={
            "size": 10,
            "symbol": [f"{shape}{_fill(trial)}" for trial in trials],
            "color": colour,
            "line": {"width": 1.5, "color": ["var(--paper)" if not is_float(t) else colour for t in trials]},
        },
        customdata=[trial.key for trial in trials],
        **hover_of(trials),
    )
    name = f"{network}, {words.engine(engine)}" if several else words.engine(engine)
    return Key(len(figure.data) - 1, name, shape, colour)


def _add_dropped(figure: go.Figure, study: StudyRecord, shown: Sequence[Trial], axis: _Axis) -> list[Key]:
    dropped = [trial for trial in shown if trial.state != "measured"]
    if not dropped:
        return []
    figure.add_scatter(
        x=[axis.value(trial) for trial in dropped],
        y=[top(trial.accuracy, axis_k(study)) for trial in dropped if trial.accuracy],
        mode="markers",
        marker={
            "size": 8,
            "symbol": "x-thin",
            "line": {"width": 1.5, "color": [colour_of(study, trial.network) for trial in dropped]},
        },
        customdata=[trial.key for trial in dropped],
        **hover_of(dropped),
    )
    return [Key(len(figure.data) - 1, "dropped early", "cross", "var(--ink-2)")]


def _add_front(figure: go.Figure, trials: Sequence[Trial], axis: _Axis, k: int) -> Key:
    figure.add_scatter(
        x=[axis.value(trial) for trial in trials],
        y=[top(trial.accuracy, k) for trial in trials if trial.accuracy],
        mode="lines",
        line={"shape": "vh", "color": "var(--ink-3)", "width": 1.5},
        hoverinfo="skip",
    )
    return Key(len(figure.data) - 1, "Pareto front", "line", "var(--ink-3)")


def _add_answer(figure: go.Figure, study: StudyRecord, shown: Sequence[Trial], axis: _Axis) -> list[Key]:
    found = [trial for trial in shown if study.answer is not None and trial.key == study.answer.key]
    if study.answer is None or not found:
        return []
    figure.add_scatter(
        x=[axis.value(trial) for trial in found],
        y=[top(trial.accuracy, axis_k(study)) for trial in found if trial.accuracy],
        mode="markers",
        marker={"size": 24, "symbol": "circle-open", "color": "var(--accent)", "line": {"width": 2.5}},
        hoverinfo="skip",
    )
    name = "the answer" if study.answer.found else "the nearest"
    return [Key(len(figure.data) - 1, name, "ring", "var(--accent)")]


def add_budgets(figure: go.Figure, study: StudyRecord) -> None:
    """Draw the budgets on the accuracy axis as dashed lines with their texts."""
    several = len({trial.network for trial in study.trials}) > 1
    for text, level, network in budget_lines(study):
        name = f"{text} of {network}" if network and several else text
        colour = colour_of(study, network) if network and several else "var(--ink-2)"
        figure.add_shape(
            type="line",
            xref="paper",
            x0=0,
            x1=1,
            y0=level,
            y1=level,
            layer="above",
            line={"color": colour, "width": 1.5, "dash": "dash"},
        )
        figure.add_annotation(
            text=plain(name),
            xref="paper",
            x=0,
            xanchor="left",
            xshift=6,
            y=level,
            yanchor="top",
            showarrow=False,
            font={"size": 12, "color": colour},
        )


def _bars(points: Sequence[tuple[float | None, Interval | None]], colour: str) -> dict[str, object]:
    up = [0.0 if v is None or i is None else max(0.0, i.high - v) for v, i in points]
    down = [0.0 if v is None or i is None else max(0.0, v - i.low) for v, i in points]
    return {
        "type": "data",
        "array": up,
        "arrayminus": down,
        "color": colour,
        "thickness": 1.5,
        "width": 0,
        "visible": any(up) or any(down),
    }


def _level(trial: Trial, study: StudyRecord) -> tuple[float | None, Interval | None]:
    """Return the height of a trial and the interval to draw there."""
    if trial.accuracy is None:
        return None, None
    k = axis_k(study)
    level = top(trial.accuracy, k)
    budget = accuracy_budget(study)
    if budget is None or not budget.of_drop:
        return level, trial.accuracy.interval(k)
    if trial.versus_float is None:
        return level, None
    versus = trial.versus_float
    before, ends = level + versus.drop(k), versus.interval(k)
    return level, Interval(low=before - ends.high, high=before - ends.low)


def hover_of(trials: Sequence[Trial]) -> dict[str, object]:
    """Return what a mark of each trial shows when it is pointed at."""

    def text(trial: Trial) -> str:
        first, *rest = (plain(line) for line in facts(trial))
        return f"<b>{first}</b><br>" + "<br>".join(rest)

    return {"hovertext": [text(trial) for trial in trials], "hoverinfo": "text"}


def _fill(trial: Trial) -> str:
    return {"float32": "-open", "bf16": "-open-dot"}.get(trial.recipe.removesuffix("-pixels"), "")


def _near(levels: Sequence[float], lines: Sequence[float]) -> tuple[tuple[float, float] | None, int]:
    """Return the part of the accuracy axis near the budget, and how many trials lie below it."""
    best = max(levels)
    span = max(best - min([*lines, best]), 0.01)
    floor = best - 3 * span
    hidden = sum(level < floor for level in levels)
    if not hidden:
        return None, 0
    lowest = min(level for level in [*levels, *lines] if level >= floor)
    return (lowest - 0.35 * span, best + 0.6 * span), hidden


def _float_level(study: StudyRecord, network: str, k: int) -> float | None:
    """Return the float accuracy of a network from its trial on the most images."""
    known = [a for t in study.trials if t.network == network and (a := float_accuracy(t)) is not None]
    return top(max(known, key=lambda accuracy: accuracy.total), k) if known else None


def _label(study: StudyRecord, shown: Sequence[Trial], axis: _Axis, against: Against) -> str:
    ends = fronts(study)[against]
    trials = words.several(len(shown), "trial")
    text = f"Scatter plot of {trials}: top-{axis_k(study)} accuracy against {axis.title}."
    if not ends:
        return text
    accurate, other = (_named(trial) for trial in (ends[0], ends[-1]))
    best = "fastest" if against == "speed" else "smallest"
    front = f"On the front, the most accurate is {accurate}, the {best} {other}."
    return f"{text} {front} The table has every figure."


def _named(trial: Trial) -> str:
    recipe = words.recipe(trial.recipe, trial.keep_float)
    return f"{trial.network} in {recipe} on {words.setting(trial.setting)}"


def plain(text: str) -> str:
    """Escape a text for plotly, which reads HTML tags and entities in its texts."""
    return html.escape(text, quote=False)
