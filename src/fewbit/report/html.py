"""The report of a study: one HTML file that needs nothing else and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import fewbit
from fewbit.files import write_text
from fewbit.measure.host import Host
from fewbit.report import plots, tables, words
from fewbit.report.costs import cost_view
from fewbit.report.families import families_plot, families_table
from fewbit.report.page import render_page
from fewbit.report.summary import (
    accuracy_budget,
    answer_trial,
    axis_k,
    float_bytes,
    sentence,
    sentence_parts,
    top,
    verdict,
)
from fewbit.search.trial import StudyRecord, Trial


class Fact(NamedTuple):
    """A figure of the answer set large, with what it is to be read against."""

    name: str
    value: str
    lines: tuple[str, ...]


class Panel(NamedTuple):
    """The layers and the placement of one trial."""

    name: str
    title: str
    answer: bool
    layers: tables.Table
    placement: tables.PlacementView | None
    survey: tuple[tables.Tried, ...]


class Listing(NamedTuple):
    """Names and values under a title."""

    title: str
    rows: tuple[tuple[str, str], ...]


def write_report(study: StudyRecord, path: Path) -> None:
    """Write the report of a study, in one step or not at all.

    Args:
        study: What a search recorded.
        path: The HTML file to write.

    Raises:
        OutputError: The file cannot be written.
    """
    write_text(path, render(study))


def render(study: StudyRecord) -> str:
    """Return the report as one HTML document; every text of the study is escaped."""
    word, text = verdict(study)
    speed, size = plots.accuracy_against(study, "speed"), plots.accuracy_against(study, "bytes")
    networks = sorted({trial.network for trial in study.trials})
    return render_page(
        "page.html",
        title=f"fewbit: {', '.join(networks)}",
        subtitle=f"search for {_objective(study)} in {', '.join(networks)}" if networks else "",
        verdict=word,
        verdict_text=text,
        sentence=sentence(study),
        parts=sentence_parts(study),
        facts=_facts(study),
        budgets=tables.budget_rows(study),
        notes=study.notes,
        counted=_counted(study),
        speed=speed,
        speed_caption=_caption(study),
        bytes=size,
        families=families_table(study),
        families_plot=families_plot(study),
        left_out=[one.text for one in study.left_out],
        trials=tables.trials_table(study),
        networks=networks,
        engines=[(name, words.engine(name)) for name in sorted({t.setting.engine for t in study.trials})],
        panels=_panels(study),
        histograms=plots.histograms(),
        cost=cost_view(study.answer.cost) if study.answer is not None and study.answer.cost else None,
        ended=_ended(study),
        command=study.command,
        how=_how(study),
        version=study.versions.get("fewbit", fewbit.__version__),
    )


def _objective(study: StudyRecord) -> str:
    if study.objective == "size":
        return "the smallest network"
    return "the lowest latency" if study.objective == "latency" else "the fastest network"


def _facts(study: StudyRecord) -> tuple[Fact, ...]:
    answer = study.answer
    if answer is None:
        return ()
    trial = answer_trial(study)
    facts = [_speed_fact(study), _accuracy_fact(study)]
    before = float_bytes(study, trial.network)
    against = (f"float32: {words.size(before)}, {before / trial.bytes:.1f}x as much",) if before else ()
    facts.append(Fact("Size of the file", words.size(trial.bytes), against))
    if trial.packed_bytes:
        facts.append(_packed_fact(trial, before))
    if trial.placement is not None:
        integers, floats = trial.placement.integer_operators, trial.placement.float_operators
        rest = f"{floats} in float; their reasons are below" if floats else "none in float"
        facts.append(Fact("Operators in integers", f"{integers} of {integers + floats}", (rest,)))
    return tuple(facts)


def _packed_fact(trial: Trial, before: int | None) -> Fact:
    why = "counted with the codes of weights under 8 bits packed; in the file they take a byte each"
    against = (
        (f"float32: {words.size(before)}, {before / trial.packed_bytes:.1f}x as much",) if before else ()
    )
    return Fact("Size with weights packed", words.size(trial.packed_bytes), (*against, why))


def _speed_fact(study: StudyRecord) -> Fact:
    answer = study.answer
    assert answer is not None
    timing = answer.timing
    rate = f"{timing.images_per_s:,.0f} images/s, {words.milliseconds(timing.ms_per_batch_p50)} a batch"
    against = f"against float32 on {words.setting(answer.float_setting)}"
    if timing.ratio is None:
        return Fact("Speed", f"{timing.images_per_s:,.0f}", ("images/s", against))
    ends = f"{words.between(timing.ratio_interval)} at 95 %" if timing.ratio_interval else ""
    lines = [ends, rate, against]
    if answer.overall is not None and answer.overall.ratio is not None:
        lines.append(f"{answer.overall.ratio:.2f}x against {answer.overall.against}")
    return Fact("Speed", f"{timing.ratio:.2f}x", tuple(lines))


def _accuracy_fact(study: StudyRecord) -> Fact:
    answer, k = study.answer, axis_k(study)
    assert answer is not None
    confirmation = answer.confirmation
    ends = confirmation.accuracy.interval(k)
    images = words.several(confirmation.accuracy.total, "holdout image")
    return Fact(
        f"Top-{k} accuracy",
        words.percent(top(confirmation.accuracy, k)),
        (
            f"{words.hundred(ends.low, ends.high)} on {images}",
            f"float32: {words.percent(top(confirmation.float_accuracy, k))}",
            f"{words.percent(confirmation.versus_float.flips)} of the labels changed",
            *([f"{confirmation.looks} finalists were held against them"] if confirmation.looks > 1 else []),
        ),
    )


def _counted(study: StudyRecord) -> str:
    states = [trial.state for trial in study.trials]
    kinds = [f"{states.count('measured')} measured"]
    if dropped := states.count("dropped"):
        kinds.append(f"{dropped} dropped early")
    if failed := states.count("failed"):
        kinds.append(f"{failed} failed")
    networks = words.several(len({trial.network for trial in study.trials}), "network")
    trials = words.several(len(states), "trial")
    return f"{trials} of {networks} in {words.duration(study.seconds)}: {', '.join(kinds)}."


def _caption(study: StudyRecord) -> str:
    recipes = {trial.recipe for trial in study.trials}
    hollow = " Hollow marks are float32" if "float32" in recipes else ""
    dotted = ", with a dot bf16" if "bf16" in recipes else ""
    budget = accuracy_budget(study)
    bars = (
        "the 95 % interval of the drop against float32, paired image by image"
        if budget is not None and budget.of_drop
        else "95 % intervals"
    )
    limit = f" The dashed line is the budget {budget.text}." if budget else ""
    return f"{hollow}{dotted}. Bars are {bars}.{limit}".removeprefix(".").strip()


def _panels(study: StudyRecord) -> list[Panel]:
    """Make one panel for each distinct pair of layers and placement, the answer's first."""
    key = study.answer.key if study.answer else ""
    panels: dict[tuple[Any, ...], Panel] = {}
    ordered = sorted(study.trials, key=lambda trial: trial.key != key)
    for trial in ordered:
        content = (trial.layers, trial.placement, trial.network, trial.recipe, trial.keep_float, trial.survey)
        if (trial.layers or trial.placement) and content not in panels:
            panels[content] = _panel(trial, str(len(panels)), trial.key == key)
    return list(panels.values())


def _panel(trial: Trial, name: str, answer: bool) -> Panel:
    named = words.recipe(trial.recipe, trial.keep_float)
    title = f"{trial.network}, {named}, {words.engine(trial.setting.engine)}"
    return Panel(
        name=name,
        title=f"{title} (the answer)" if answer else title,
        answer=answer,
        layers=tables.layers_table(trial.layers),
        placement=tables.placement_view(trial.placement) if trial.placement else None,
        survey=tables.survey_rows(trial.survey),
    )


def _ended(study: StudyRecord) -> list[dict[str, str]]:
    return [
        {
            "network": trial.network,
            "recipe": words.recipe(trial.recipe, trial.keep_float),
            "setting": words.setting(trial.setting),
            "state": trial.state,
            "reason": trial.reason,
        }
        for trial in study.trials
        if trial.state != "measured"
    ]


def _how(study: StudyRecord) -> list[Listing]:
    data = study.data
    skipped = data.skipped
    named = f" ({', '.join(skipped.names)}{', ...' if skipped.count > len(skipped.names) else ''})"
    images = [
        ("Source", data.source),
        ("Calibration", words.several(data.calibration, "image")),
        ("Search", words.several(data.search, "image")),
        ("Holdout", words.several(data.holdout, "image")),
        ("Classes", f"{data.classes:,}"),
        ("Digest", data.images_digest),
        ("Skipped", f"{skipped.count:,}{named if skipped.names else ''}"),
    ]
    search = [
        ("Budgets", ", ".join(study.budgets) or "none"),
        ("Objective", study.objective),
        ("Seed", str(study.seed)),
        ("Time", words.duration(study.seconds)),
        ("Time allowed", "no limit" if study.minutes is None else f"{study.minutes:g} min"),
    ]
    return [
        Listing("Images", tuple(images)),
        Listing("Search", tuple(search)),
        *([Listing("Where the time went", _time(study))] if study.phases else []),
        Listing("Host", _host(study.host)),
        Listing("Versions", tuple(sorted(study.versions.items()))),
    ]


def _time(study: StudyRecord) -> tuple[tuple[str, str], ...]:
    """Say where the search's own time went; what has less than a hundredth goes together."""
    spent: dict[str, float] = {}
    for one in study.phases:
        name = words.phase(one.phase)
        spent[name] = spent.get(name, 0.0) + one.seconds
    total = sum(spent.values())
    large = sorted((n for n, s in spent.items() if s >= total / 100), key=lambda n: -spent[n])
    rest = total - sum(spent[name] for name in large)
    return (
        ("Engines at work", words.percent(study.engine_share)),
        *((name, words.duration(spent[name])) for name in large),
        ("All else", words.duration(rest)),
    )


def _host(host: Host) -> tuple[tuple[str, str], ...]:
    load = "not told" if host.load_average is None else f"{host.load_average:g} over the last minute"
    return (
        ("Processor", host.cpu),
        ("Architecture", host.machine),
        ("Instructions", ", ".join(host.isa) or "none that matter here"),
        ("Cores", str(host.cores)),
        ("Memory", words.size(host.memory_bytes)),
        ("System", host.os),
        ("Load before", load),
        ("Clock mode", host.governor or "not told"),
        ("Native bf16", "yes" if host.bf16 else "no"),
        ("u8 x s8 sums", "can overflow 16 bits" if host.saturates_u8s8 else "exact"),
    )
