"""The page of a diagnosis: findings first, then every layer; one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

import fewbit
from fewbit.doctor.records import CAUSES, CalibrationStudy, Diagnosis, Finding, LayerExam, Quality, Remedy
from fewbit.files import write_text
from fewbit.report import doctor_plots, marks, plots, tables, words
from fewbit.report.costs import cost_view


class Tried(NamedTuple):
    """A remedy as the page shows it."""

    action: str
    change: str
    gain: tuple[tuple[str, str, str], ...]
    images: str
    verdict: str
    helps: bool


class Card(NamedTuple):
    """A finding as the page shows it."""

    title: str
    layer: str
    others: tuple[str, ...]
    reason: str
    harm: str
    evidence: tuple[tuple[str, str], ...]
    remedies: tuple[Tried, ...]


def write_diagnosis(diagnosis: Diagnosis, path: Path, command: str = "") -> None:
    """Write the page of a diagnosis, in one step or not at all.

    Args:
        diagnosis: What the doctor found.
        path: The HTML file to write.
        command: How it was called.

    Raises:
        OutputError: The file cannot be written.
    """
    write_text(path, render_diagnosis(diagnosis, command))


def render_diagnosis(diagnosis: Diagnosis, command: str = "") -> str:
    """Return the page as one HTML document; every text of the diagnosis is escaped."""
    from fewbit.report.page import render_page

    word, verdict = verdict_of(diagnosis)
    study = diagnosis.study
    return render_page(
        "doctor.html",
        title=f"fewbit inspect: {diagnosis.network}",
        subtitle=f"{diagnosis.network} in {words.recipe(diagnosis.recipe)}",
        word=word,
        verdict=verdict,
        sentence=sentence_of(diagnosis),
        facts=_facts(diagnosis),
        cards=[_card(finding) for finding in diagnosis.findings],
        together=_tried(diagnosis.together) if diagnosis.together else None,
        repaired=diagnosis.repaired,
        notes=diagnosis.notes,
        checked=", ".join(CAUSES[cause] for cause in diagnosis.checked),
        noise=doctor_plots.noise_of_layers(diagnosis),
        layers=layers_table(diagnosis),
        placement=tables.placement_view(diagnosis.placement) if diagnosis.placement else None,
        cost=cost_view(diagnosis.cost) if diagnosis.cost else None,
        histograms=plots.histograms(),
        study=doctor_plots.study_of_calibration(study) if study else None,
        study_lead=_study_lead(study) if study else "",
        study_rows=_study_rows(study) if study else (),
        how=_how(diagnosis),
        command=command,
        version=fewbit.__version__,
    )


def verdict_of(diagnosis: Diagnosis) -> tuple[str, str]:
    """Return the verdict's class and its words."""
    if not diagnosis.findings:
        return "proven", "Nothing to mend"
    return "none", f"{words.several(len(diagnosis.findings), 'finding')}"


def sentence_of(diagnosis: Diagnosis) -> str:
    """Say the diagnosis in one or two sentences."""
    named = words.recipe(diagnosis.recipe)
    quality = diagnosis.quality
    kept = (
        f"{diagnosis.network} in {named} keeps {words.percent(quality.agreement or 0.0)} of its float labels"
    )
    if not diagnosis.findings:
        return f"{kept}; none of the causes looked for costs it accuracy."
    first = diagnosis.findings[0]
    more = f" and {words.several(len(first.others), 'more layer')}" if first.others else ""
    where = "the input" if first.layer == "input" else first.layer
    found = f"{kept}: {first.title} in {where}{more}."
    best = next((remedy for remedy in first.remedies if remedy.helps), None)
    return f"{found} {remedy_in_words(best)}" if best else f"{found} No remedy that was tried helps."


def remedy_in_words(remedy: Remedy) -> str:
    """Say a remedy and its gain in one sentence."""
    before, after = remedy.before.accuracy, remedy.after.accuracy
    action = remedy.action[0].upper() + remedy.action[1:]
    images = words.several(remedy.images, "image")
    top1 = f"top-1 {words.percent(before.top1)} to {words.percent(after.top1)}"
    if remedy.after.agreement is None or remedy.before.agreement is None:
        return f"{action}: {top1} on {images}."
    kept = f"{words.percent(remedy.before.agreement)} to {words.percent(remedy.after.agreement)}"
    return f"{action}: float labels kept {kept}, {top1} on {images}."


def _facts(diagnosis: Diagnosis) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    exact, quality = diagnosis.float_accuracy, diagnosis.quality
    images = words.several(diagnosis.images, "image")
    expected = (f"the card expects {words.percent(diagnosis.expected)}",) if diagnosis.expected else ()
    ends, own = exact.interval(), quality.accuracy.interval()
    found = [
        (
            "Float top-1",
            words.percent(exact.top1),
            (f"{words.hundred(ends.low, ends.high)} on {images}", *expected),
        ),
        ("Quantized top-1", words.percent(quality.accuracy.top1), (words.hundred(own.low, own.high),)),
        (
            "Float labels kept",
            words.percent(quality.agreement or 0.0),
            (f"divergence {words.figure(quality.kl or 0.0)} nats", f"logits {quality.sqnr_db or 0.0:.1f} dB"),
        ),
    ]
    if diagnosis.placement is not None:
        integers, floats = diagnosis.placement.integer_operators, diagnosis.placement.float_operators
        rest = f"{floats} in float on {words.engine(diagnosis.placement.engine)}"
        found.append(("Operators in integers", f"{integers} of {integers + floats}", (rest,)))
    return tuple(found)


def _card(finding: Finding) -> Card:
    harm = ""
    if finding.kl is not None:
        which = "these layers" if finding.others else "it"
        harm = f"Rounding {which} alone costs {words.figure(finding.kl)} nats."
    return Card(
        title=finding.title,
        layer=finding.layer,
        others=finding.others,
        reason=finding.reason[0].upper() + finding.reason[1:] + ".",
        harm=harm,
        evidence=tuple((fact.name, fact.text) for fact in finding.evidence),
        remedies=tuple(_tried(remedy) for remedy in finding.remedies),
    )


def _tried(remedy: Remedy) -> Tried:
    before, after = remedy.before, remedy.after
    gain = [("top-1", words.percent(before.accuracy.top1), words.percent(after.accuracy.top1))]
    if before.agreement is not None and after.agreement is not None:
        gain.append(("float labels kept", words.percent(before.agreement), words.percent(after.agreement)))
    if before.kl is not None and after.kl is not None:
        gain.append(("divergence, nats", words.figure(before.kl), words.figure(after.kl)))
    return Tried(
        action=remedy.action,
        change=remedy.change,
        gain=tuple(gain),
        images=words.several(remedy.images, "image"),
        verdict="helps" if remedy.helps else "does not help",
        helps=remedy.helps,
    )


def layers_table(diagnosis: Diagnosis) -> tables.Table:
    """Make the table of the layers, in the order of the network; the worst finding's layer is shown first."""
    right: dict[str, Any] = {"css": "num", "kind": "number"}
    columns = (
        tables.Column("Layer"),
        tables.Column("Runs in", "nowrap"),
        tables.Column("SQNR alone", kind="number"),
        tables.Column("With all", **right),
        tables.Column("Sensitivity", first="descending", **right),
        tables.Column("Weights", sorts=False),
        tables.Column("Output", sorts=False),
        tables.Column("Spread", first="descending", **right),
        tables.Column("Tail", first="descending", **right),
    )
    costly = max(diagnosis.layers, key=lambda layer: layer.kl or 0.0, default=None)
    shown = diagnosis.findings[0].layer if diagnosis.findings else costly.name if costly else ""
    rows = (
        tables.Row(_cells(layer), key=layer.name, data=_data(layer), answer=layer.name == shown)
        for layer in diagnosis.layers
    )
    return tables.Table(columns, tuple(rows))


def _cells(layer: LayerExam) -> tuple[tables.Cell, ...]:
    button = Markup('<button type="button" class="layer" aria-pressed="false">{}</button>').format(layer.name)
    css = " on" if layer.precision == "int8" else ""
    tag = Markup('<span class="tag{}">{}</span>').format(css, layer.precision)
    bits = tables.bits_of(layer)
    return (
        tables.Cell(mark=button, note=layer.kind, sort=layer.name),
        tables.Cell(mark=tag, note=bits, sort=f"{layer.precision} {bits}"),
        tables.Cell(mark=marks.sqnr_bar(layer.sqnr_alone_db), sort=_sort(layer.sqnr_alone_db)),
        tables.Cell("" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB", sort=_sort(layer.sqnr_db)),
        _number(layer.kl, "", f"{words.percent(layer.flips or 0.0)} flip"),
        tables.Cell(
            mark=marks.spark(layer.weights, "weights", ends=_ends(layer.weight_low, layer.weight_high))
        ),
        tables.Cell(mark=marks.spark(layer.activations, "output", ends=_ends(layer.low, layer.high))),
        _number(layer.weight_range_ratio, "x", _percent_of("shift", layer.shift)),
        _number(layer.tail_ratio, "x", f"kurtosis {words.figure(layer.kurtosis or 0.0)}"),
    )


def _percent_of(name: str, share: float | None) -> str:
    return "" if share is None else f"{name} {words.figure(100 * share)} %"


def _number(value: float | None, unit: str, note: str = "") -> tables.Cell:
    if value is None:
        return tables.Cell()
    return tables.Cell(f"{words.figure(value)}{unit}", note, str(value))


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _sort(value: float | None) -> str:
    return "" if value is None else str(value)


def _data(layer: LayerExam) -> str:
    return tables.layer_data(layer, _ends(layer.weight_low, layer.weight_high) or ())


def _study_lead(study: CalibrationStudy) -> str:
    images = words.several(study.images, "image")
    enough = words.several(study.enough(), "image")
    return (
        f"{words.recipe(study.recipe)}, calibrated on 1 to {study.points[-1].images} of {study.pool} "
        f"images, {words.several(len(study.seeds), 'choice')} of each number, judged on {images} that never "
        f"calibrate ({study.method}). From {enough} on, every choice stays within "
        f"{words.points(study.noise)} of the most images."
    )


def _study_rows(study: CalibrationStudy) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            str(point.images),
            words.percent(point.mean, 2),
            words.percent(point.low, 2),
            words.percent(point.high, 2),
            words.percent(sum(point.agreements) / len(point.agreements), 2),
        )
        for point in study.points
    )


def _how(diagnosis: Diagnosis) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    images = (
        ("Calibration", words.several(diagnosis.calibration_images, "image")),
        ("Judging", f"{words.several(diagnosis.images, 'image')} that do not calibrate"),
        ("Layers alone", f"{words.several(diagnosis.examined, 'image')} of those"),
        ("Seed", str(diagnosis.seed)),
    )
    found = [*(f"{v:.3g}" for v in diagnosis.input.mean)], [*(f"{v:.3g}" for v in diagnosis.input.std)]
    about = [("Mean", ", ".join(found[0])), ("Deviation", ", ".join(found[1]))]
    if diagnosis.input.norm_gap is not None:
        about.append(("First BatchNorm", f"{diagnosis.input.norm_gap:.3g} nats from its training"))
    made = (("Recipe", diagnosis.recipe), ("Made for", words.engine(diagnosis.engine)))
    return (("Images", images), ("Input of the network", tuple(about)), ("Network", made))


def quality_in_words(quality: Quality) -> str:
    """Say how a quantized network does."""
    text = f"top-1 {words.percent(quality.accuracy.top1)}"
    if quality.agreement is None:
        return text
    return (
        f"{text}, {words.percent(quality.agreement)} of the float labels kept, divergence "
        f"{words.figure(quality.kl or 0.0)} nats, logits {quality.sqnr_db or 0.0:.1f} dB"
    )
