"""A diagnosis as text: findings on top, then the table of layers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fewbit.cli.costs import print_cost, print_placement
from fewbit.doctor.records import Diagnosis, Finding, LayerExam, Remedy
from fewbit.report import words
from fewbit.report.doctor import quality_in_words, remedy_in_words

if TYPE_CHECKING:
    from fewbit.doctor.records import CalibrationStudy
    from fewbit.sensitivity.records import LayerRecord

_NAMED = 4
_WIDTH = 160


def print_diagnosis(found: Diagnosis) -> None:
    """Print what the doctor found."""
    console = make_console()
    for line in _lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    print_layers(found.layers, console)
    if found.placement is not None:
        print_placement(found.placement, console)
    if found.cost is not None:
        print_cost(found.cost, console)
    if found.study is not None:
        _print_study(found.study, console)


def _lines(found: Diagnosis) -> Iterable[str]:
    ends = found.float_accuracy.interval()
    level = f"{words.percent(found.float_accuracy.top1)} {words.hundred(ends.low, ends.high)}"
    expected = "" if found.expected is None else f", the card expects {words.percent(found.expected)}"
    images = words.several(found.images, "image")
    yield escape(f"{found.network}, float: top-1 {level} on {images}{expected}")
    calibrated = f"calibrated on {words.several(found.calibration_images, 'other image')}"
    yield escape(f"{found.network} in {found.recipe}, {calibrated}: {quality_in_words(found.quality)}")
    yield ""
    if not found.findings:
        yield "Nothing to mend: no cause that was looked for costs accuracy."
    for number, finding in enumerate(found.findings, 1):
        yield from _finding(number, finding)
    if found.together is not None:
        yield escape(f"All remedies together. {remedy_in_words(found.together)}")
    for note in found.notes:
        yield escape(note)
    yield ""


def _finding(number: int, finding: Finding) -> Iterable[str]:
    where = [finding.layer, *finding.others[: _NAMED - 1]]
    more = f" and {len(finding.others) + 1 - len(where)} more" if len(finding.others) >= _NAMED else ""
    yield f"[bold]{number}. {finding.title}[/bold] in {escape(', '.join(where))}{more}"
    yield escape(f"   {finding.reason}")
    facts = "; ".join(f"{fact.name} {fact.text}" for fact in finding.evidence)
    yield escape(f"   measured: {facts}")
    for remedy in finding.remedies:
        yield escape(f"   {_says(remedy)} {remedy_in_words(remedy)}")
    if not finding.remedies:
        yield "   no remedy that fewbit has fits"


def _says(remedy: Remedy) -> str:
    return "helps:" if remedy.helps else "tried, does not help:"


def make_console() -> Console:
    """Return a console as wide as the terminal; into a file or pipe, as wide as the table."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def print_layers(records: Sequence[LayerRecord], console: Console | None = None) -> None:
    """Print the table of layers, with what was measured of each alone where it was.

    Spread is the largest over the smallest channel maximum of a weight.
    """
    console = console or make_console()
    examined = any(isinstance(record, LayerExam) for record in records)
    table = Table(Column("layer", no_wrap=True), "kind", "precision", box=SIMPLE_HEAD)
    for title in ("alone, dB", "SQNR, dB", "KL, nats", "tail") if examined else ():
        table.add_column(title, justify="right")
    table.add_column("range")
    table.add_column("spread", justify="right")
    for record in records:
        cells = [escape(record.name), record.kind, record.precision]
        if isinstance(record, LayerExam):
            cells += [
                _number(record.sqnr_alone_db, ".1f"),
                _number(record.sqnr_db, ".1f"),
                _number(record.kl, ".4f"),
                _number(record.tail_ratio, ".3g"),
            ]
        span = "" if record.low is None else f"{record.low:.3g} to {record.high:.3g}"
        table.add_row(*cells, span, _number(record.weight_range_ratio, ".3g"))
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _print_study(study: CalibrationStudy, console: Console) -> None:
    table = Table("calibrating images", "mean top-1", "worst", "best", "float labels kept")
    for point in study.points:
        kept = sum(point.agreements) / len(point.agreements)
        shares = (point.mean, point.low, point.high, kept)
        table.add_row(str(point.images), *(words.percent(share) for share in shares))
    console.print(table)
    console.print(
        f"{words.several(len(study.seeds), 'seed')}, judged on {words.several(study.images, 'image')} "
        f"({study.method}); float32 {words.percent(study.float_accuracy.top1)}. "
        f"From {words.several(study.enough(), 'image')} on, every seed is within "
        f"{words.points(study.noise)} of the most.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
