"""The report's tables: what each cell says and what it is sorted by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from fewbit.engines.session import CONVERTING, PlacedOperator, Placement
from fewbit.measure.accuracy import Interval
from fewbit.measure.speed import Surveyed
from fewbit.report import marks, words
from fewbit.report.summary import axis_k, check_verdict, fronts, top
from fewbit.search.budget import parse_budget
from fewbit.search.trial import LayerRecord, StudyRecord, Trial

BINS = 96


class Column(NamedTuple):
    """A column: its title, how it is set, whether it sorts and which way first."""

    title: str
    css: str = ""
    kind: Literal["text", "number"] = "text"
    first: Literal["ascending", "descending"] = "ascending"
    sorts: bool = True


class Cell(NamedTuple):
    """What a cell shows: a text or a drawing, a note below it, and the value that it sorts by."""

    text: str = ""
    note: str = ""
    sort: str = ""
    mark: Markup = Markup("")


class Row(NamedTuple):
    """A row of the trials' or the layers' table."""

    cells: tuple[Cell, ...]
    key: str = ""
    network: str = ""
    engine: str = ""
    front: bool = False
    answer: bool = False
    data: str = ""


class Table(NamedTuple):
    """Columns and rows."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class BudgetRow(NamedTuple):
    """One budget and what it was measured on."""

    budget: str
    measured_on: str
    value: str
    interval: str
    mark: Markup
    verdict: str


class Group(NamedTuple):
    """Operators of one kind of precision."""

    title: str
    operators: tuple[PlacedOperator, ...]
    open: bool


class Tried(NamedTuple):
    """One setting of a survey."""

    setting: str
    rate: str
    batch: str
    reason: str


class PlacementView(NamedTuple):
    """An engine's operators, those in float first."""

    title: str
    groups: tuple[Group, ...]


def trials_table(study: StudyRecord) -> Table:
    """Make the table of all measured trials, the answer first, then by speed."""
    k = axis_k(study)
    on_front = {trial.key for trials in fronts(study).values() for trial in trials}
    key = study.answer.key if study.answer else ""
    measured = [trial for trial in study.trials if trial.state == "measured"]
    measured.sort(key=lambda t: (t.key != key, -(t.timing.images_per_s if t.timing else 0.0)))
    right: dict[str, Any] = {"css": "num", "kind": "number"}
    columns = (
        Column("Network"),
        Column("Recipe", "wide"),
        Column("Engine", "nowrap"),
        Column("Batch", "num wrap", "number"),
        Column("Speed", first="descending", **right),
        Column("Images/s", first="descending", **right),
        Column(f"Top-{k}", first="descending", **right),
        Column(f"Top-{k} drop", **right),
        Column("Flips", **right),
        Column("Size", **right),
        Column("In integers", first="descending", **right),
        Column("Found by", "nowrap"),
    )
    rows = tuple(
        Row(
            cells=_trial_cells(trial, k),
            key=trial.key,
            network=trial.network,
            engine=trial.setting.engine,
            front=trial.key in on_front,
            answer=trial.key == key,
        )
        for trial in measured
    )
    return Table(columns, rows)


def layers_table(layers: Sequence[LayerRecord]) -> Table:
    """Make the table of one trial's layers, in the order of the network."""
    right: dict[str, Any] = {"css": "num", "kind": "number"}
    columns = (
        Column("Layer"),
        Column("Runs in", "nowrap"),
        Column("SQNR", kind="number"),
        Column("Output range", **right),
        Column("Weights", sorts=False),
        Column("Output", sorts=False),
        Column("Spread", first="descending", **right),
    )
    return Table(columns, tuple(Row(_layer_cells(layer), data=layer_data(layer)) for layer in layers))


def budget_rows(study: StudyRecord) -> tuple[BudgetRow, ...]:
    """Make the rows that hold each budget against the search and the holdout images."""
    answer = study.answer
    if answer is None:
        return ()
    trial = next((t for t in study.trials if t.key == answer.key), None)
    search = trial.accuracy.total if trial and trial.accuracy else study.data.search
    confirmation = answer.confirmation
    rows: list[BudgetRow] = []
    for text in study.budgets:
        budget = parse_budget(text)
        sources = [
            (confirmation.checks, f"{confirmation.accuracy.total:,} holdout images"),
            (answer.checks, f"{search:,} search images"),
        ]
        if not budget.of_accuracy:
            sources = [(confirmation.checks, "the file" if budget.measure == "bytes" else "this host")]
        pairs = [(check, on) for checks, on in sources for check in checks if check.budget == text]
        edges = marks.whisker_range([check for check, _ in pairs]) if pairs else (0.0, 1.0)
        for check, on in pairs:
            value, interval = words.measured(check)
            mark = marks.whisker(check, *edges)
            rows.append(BudgetRow(text, on, value, interval, mark, check_verdict(check)))
    return tuple(rows)


def placement_view(placement: Placement) -> PlacementView:
    """Sort an engine's operators into those in float, those in integers and those that only convert."""
    converting = tuple(o for o in placement.operators if o.kind in CONVERTING)
    working = [o for o in placement.operators if o.kind not in CONVERTING]
    floats = tuple(o for o in working if o.precision != "int8")
    integers = tuple(o for o in working if o.precision == "int8")
    groups = (
        Group(f"In float: {len(floats)}", floats, open=0 < len(floats) <= 12),
        Group(f"In integers: {len(integers)}", integers, open=False),
        Group(f"Conversions and copies: {len(converting)}", converting, open=False),
    )
    engine = words.engine(placement.engine)
    title = f"{len(integers)} of {words.several(len(working), 'operator')} run in integers on {engine}"
    return PlacementView(title, tuple(group for group in groups if group.operators))


def survey_rows(survey: Sequence[Surveyed]) -> tuple[Tried, ...]:
    """Make the rows of the settings that were tried, in the survey's order."""
    return tuple(
        Tried(
            setting=words.setting(tried.setting),
            rate=f"{tried.images_per_s:,.0f}" if tried.images_per_s else "",
            batch=words.milliseconds(tried.ms_per_batch) if tried.ms_per_batch else "",
            reason=tried.reason,
        )
        for tried in survey
    )


def _trial_cells(trial: Trial, k: Literal[1, 5]) -> tuple[Cell, ...]:
    how, timing, accuracy = trial.setting, trial.timing, trial.accuracy
    floats = "" if how.float_precision == "float32" else "floats in bf16"
    streams = f", {how.streams} streams" if how.streams > 1 else ""
    return (
        Cell(trial.network, sort=trial.network),
        Cell(words.recipe(trial.recipe, trial.keep_float), floats, trial.recipe),
        Cell(words.engine(how.engine), sort=how.engine),
        Cell(str(how.batch), f"{words.several(how.threads, 'thread')}{streams}", str(how.batch)),
        _ratio(timing.ratio, timing.ratio_interval) if timing else Cell(),
        Cell(
            f"{timing.images_per_s:,.0f}",
            f"{words.milliseconds(timing.ms_per_batch_p50)} a batch",
            str(timing.images_per_s),
        )
        if timing
        else Cell(),
        _share(top(accuracy, k), accuracy.interval(k)) if accuracy else Cell(),
        *_drop_cells(trial, k),
        size_of(trial),
        _integers(trial.placement),
        Cell(trial.rung, words.duration(trial.seconds), trial.rung),
    )


def size_of(trial: Trial) -> Cell:
    """Show the size of a trial's file, sorted by what the objective counts: weights under 8 bits packed."""
    if not trial.bytes:
        return Cell()
    packed = f"{words.size(trial.packed_bytes)} with weights packed" if trial.packed_bytes else ""
    return Cell(words.size(trial.bytes), packed, str(trial.counted_bytes))


def _drop_cells(trial: Trial, k: Literal[1, 5]) -> tuple[Cell, Cell]:
    versus = trial.versus_float
    if versus is None:
        return Cell(), Cell()
    drop, ends = versus.drop(k), versus.interval(k)
    text = words.number(100 * drop, 2)
    return (
        Cell(text, words.hundred(ends.low, ends.high, 2), str(drop)),
        Cell(words.percent(versus.flips, 2), sort=str(versus.flips)),
    )


def _ratio(value: float | None, interval: Interval | None) -> Cell:
    if value is None:
        return Cell()
    return Cell(f"{value:.2f}x", words.between(interval) if interval else "", str(value))


def _share(value: float, interval: Interval) -> Cell:
    return Cell(words.percent(value, 2), words.hundred(interval.low, interval.high), str(value))


def _integers(placement: Placement | None) -> Cell:
    if placement is None:
        return Cell()
    whole = placement.integer_operators + placement.float_operators
    share = placement.integer_operators / whole if whole else 0.0
    return Cell(f"{placement.integer_operators} of {whole}", sort=str(share))


def _layer_cells(layer: LayerRecord) -> tuple[Cell, ...]:
    ranged = layer.low is not None and layer.high is not None
    ratio = layer.weight_range_ratio
    button = Markup('<button type="button" class="layer" aria-pressed="false">{}</button>').format(layer.name)
    tag = Markup('<span class="tag{}">{}</span>').format(
        " on" if layer.precision == "int8" else "", layer.precision
    )
    return (
        Cell(mark=button, note=layer.kind, sort=layer.name),
        Cell(mark=tag, note=bits_of(layer), sort=f"{layer.precision} {bits_of(layer)}"),
        Cell(mark=marks.sqnr_bar(layer.sqnr_db), sort="" if layer.sqnr_db is None else str(layer.sqnr_db)),
        Cell(f"[{layer.low:.4g}, {layer.high:.4g}]", sort=str(_span(layer))) if ranged else Cell(),
        Cell(mark=marks.spark(layer.weights, "weights")),
        Cell(mark=marks.spark(layer.activations, "output")),
        Cell(f"{words.figure(ratio)}x", sort=str(ratio)) if ratio is not None else Cell(),
    )


def bits_of(layer: LayerRecord) -> str:
    """Say how wide a layer's weights and output are."""
    bits = (("weights", layer.weight_bits), ("output", layer.activation_bits))
    known = [f"{count}-bit {what}" for what, count in bits if count is not None]
    if layer.weight_bits == layer.activation_bits and len(known) == 2:
        return f"{layer.weight_bits} bits"
    return ", ".join(known)


def _span(layer: LayerRecord) -> float:
    return (layer.high or 0.0) - (layer.low or 0.0)


def layer_data(layer: LayerRecord, weight_ends: Sequence[float] = ()) -> str:
    """Return what the page draws of a chosen row: its histograms and the ends of its grids, as JSON.

    Args:
        layer: Its record.
        weight_ends: Lowest and highest value of its weight's grid, where known.
    """
    data: dict[str, Any] = {}
    for name, histogram in (("weights", layer.weights), ("activations", layer.activations)):
        if histogram is not None and histogram.counts:
            counts, step = marks.merge(histogram.counts, BINS)
            width = (histogram.high - histogram.low) / len(histogram.counts) * step
            data[name] = {"low": histogram.low, "width": width, "counts": counts}
    if layer.low is not None and layer.high is not None:
        data["ends"] = [layer.low, layer.high]
    if weight_ends:
        data["weight_ends"] = list(weight_ends)
    return json.dumps(data, separators=(",", ":"))
