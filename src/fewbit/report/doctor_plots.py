"""The figures of a diagnosis: what each layer's rounding leaves and costs, and the calibration-set study."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from fewbit.doctor.records import CalibrationStudy, Diagnosis, LayerExam
from fewbit.report import words
from fewbit.report.plots import AXIS, LOOK, Figure, Key

_NAMED = 24
_LEAST_KL = 1e-7
_MOST_DB = 80.0


def noise_of_layers(diagnosis: Diagnosis) -> Figure | None:
    """Draw each layer's signal to noise, alone and with all before it, and its sensitivity below.

    Returns:
        The figure, or none where no layer is quantized.
    """
    layers = [layer for layer in diagnosis.layers if layer.sqnr_alone_db is not None]
    if not layers:
        return None
    places = list(range(len(layers)))
    figure = go.Figure(layout=_layout(layers))
    common = {"customdata": [layer.name for layer in layers], "hovertext": [_about(one) for one in layers]}
    figure.add_bar(
        x=places,
        y=[min(layer.sqnr_alone_db or 0.0, _MOST_DB) for layer in layers],
        marker={"color": "var(--accent)", "line": {"width": 0}},
        hoverinfo="text",
        **common,
    )
    figure.add_scatter(
        x=places,
        y=[None if layer.sqnr_db is None else min(layer.sqnr_db, _MOST_DB) for layer in layers],
        mode="lines+markers",
        line={"color": "var(--net-1)", "width": 1.5},
        marker={"size": 6, "color": "var(--net-1)"},
        hoverinfo="text",
        **common,
    )
    found = {name for finding in diagnosis.findings for name in (finding.layer, *finding.others)}
    for colour, marked in (("var(--net-0)", False), ("var(--net-4)", True)):
        figure.add_bar(
            x=places,
            y=[max(one.kl or 0.0, _LEAST_KL) if (one.name in found) is marked else None for one in layers],
            marker={"color": colour, "line": {"width": 0}},
            hoverinfo="text",
            yaxis="y2",
            **common,
        )
    legend = (
        Key(0, "SQNR alone", "square", "var(--accent)"),
        Key(1, "SQNR with all layers before it", "circle", "var(--net-1)"),
        Key(2, "sensitivity", "square", "var(--net-0)"),
        *([Key(3, "sensitivity, layer of a finding", "square", "var(--net-4)")] if found else []),
    )
    return Figure(figure.to_json(), _label(layers), legend)


def _layout(layers: list[LayerExam]) -> go.Layout:
    named = len(layers) <= _NAMED
    below = {
        **AXIS,
        "showgrid": False,
        "anchor": "y2",
        "tickmode": "array",
        "tickvals": list(range(len(layers))) if named else [],
        "ticktext": [_plain(layer.name) for layer in layers] if named else [],
        "tickangle": -55,
        "tickfont": {"size": 11},
        "range": [-0.7, len(layers) - 0.3],
    }
    title = {"standoff": 10, "font": {"size": 13}}
    return go.Layout(
        **LOOK,
        height=470 if named else 400,
        margin={"l": 60, "r": 12, "t": 8, "b": 16},
        hovermode="closest",
        bargap=0.25,
        barmode="overlay",
        xaxis=below,
        yaxis={**AXIS, "domain": [0.42, 1], "title": {"text": "SQNR, dB", **title}, "rangemode": "tozero"},
        yaxis2={
            **AXIS,
            "domain": [0, 0.34],
            "type": "log",
            "tickformat": "~e",
            "nticks": 4,
            "title": {"text": "KL, nats", **title},
        },
        showlegend=False,
    )


def _about(layer: LayerExam) -> str:
    lines = [f"{layer.kind}, {layer.precision}"]
    if layer.sqnr_alone_db is not None:
        lines.append(f"SQNR alone {layer.sqnr_alone_db:.1f} dB")
    if layer.sqnr_db is not None:
        lines.append(f"with all before it {layer.sqnr_db:.1f} dB")
    if layer.kl is not None:
        lines.append(
            f"alone it costs {layer.kl:.2g} nats and changes {words.percent(layer.flips or 0.0)} of labels"
        )
    return f"<b>{_plain(layer.name)}</b><br>" + "<br>".join(_plain(line) for line in lines)


def _label(layers: list[LayerExam]) -> str:
    worst = max(layers, key=lambda layer: layer.kl or 0.0)
    return (
        f"Bars of {words.several(len(layers), 'layer')}: signal to noise alone and accumulated, "
        f"and sensitivity. The most sensitive is {worst.name} with {worst.kl or 0.0:.2g} nats. "
        "The table has every figure."
    )


def study_of_calibration(study: CalibrationStudy) -> Figure:
    """Draw accuracy against the number of calibrating images: each seed, their mean and their spread."""
    counts, points = [point.images for point in study.points], study.points
    figure = go.Figure(layout=_study_layout(study))
    line: dict[str, object] = {"mode": "lines", "hoverinfo": "skip"}
    figure.add_scatter(
        x=[*counts, *reversed(counts)],
        y=[*(point.high for point in points), *(point.low for point in reversed(points))],
        fill="toself",
        fillcolor="var(--accent-wash)",
        line={"width": 0},
        **line,
    )
    mean = {"color": "var(--accent)", "width": 2}
    figure.add_scatter(x=counts, y=[point.mean for point in points], line=mean, **line)
    _add_seeds(figure, study)
    figure.add_scatter(
        x=[counts[0], counts[-1]],
        y=[study.float_accuracy.top1] * 2,
        line={"color": "var(--ink-2)", "width": 1.5, "dash": "dash"},
        **line,
    )
    legend = (
        Key(2, "a seed", "circle", "var(--accent)"),
        Key(1, "mean", "line", "var(--accent)"),
        Key(0, "worst to best", "square", "var(--accent-wash)"),
        Key(3, "float32", "line", "var(--ink-2)"),
    )
    label = (
        f"Top-1 accuracy against the number of calibrating images, from {counts[0]} to {counts[-1]}, "
        f"{words.several(len(study.seeds), 'seed')} each. The table below has every figure."
    )
    return Figure(figure.to_json(), label, legend)


def _study_layout(study: CalibrationStudy) -> go.Layout:
    counts, title = [point.images for point in study.points], {"standoff": 10, "font": {"size": 13}}
    return go.Layout(
        **LOOK,
        height=360,
        margin={"l": 60, "r": 12, "t": 8, "b": 52},
        hovermode="closest",
        xaxis={
            **AXIS,
            "type": "log",
            "tickvals": counts,
            "ticktext": [str(count) for count in counts],
            "title": {"text": "calibrating images", **title},
        },
        yaxis={
            **AXIS,
            "range": _ends(study),
            "tickformat": ".1~%",
            "title": {"text": "top-1 accuracy", **title},
        },
        showlegend=False,
    )


def _add_seeds(figure: go.Figure, study: CalibrationStudy) -> None:
    dots = [
        (point.images, seed, accuracy.top1, agreement)
        for point in study.points
        for seed, accuracy, agreement in zip(study.seeds, point.accuracies, point.agreements, strict=True)
    ]
    figure.add_scatter(
        x=[images for images, *_ in dots],
        y=[accuracy for *_, accuracy, _ in dots],
        mode="markers",
        marker={"size": 8, "color": "var(--accent)", "line": {"width": 1, "color": "var(--paper)"}},
        hovertext=[
            f"<b>{words.several(images, 'image')}</b>, seed {seed}<br>top-1 {words.percent(accuracy, 2)}"
            f"<br>float labels kept {words.percent(agreement, 2)}"
            for images, seed, accuracy, agreement in dots
        ],
        hoverinfo="text",
    )


def _ends(study: CalibrationStudy) -> tuple[float, float]:
    """Return the ends of the accuracy axis: never so near that noise fills the figure."""
    levels = [study.float_accuracy.top1, *(end for p in study.points for end in (p.low, p.high))]
    room = max(study.noise, 0.1 * (max(levels) - min(levels)))
    return min(levels) - room, max(levels) + room


def _plain(text: str) -> str:
    """Escape a text for plotly, which reads HTML tags and entities in its texts."""
    return html.escape(text, quote=False)
