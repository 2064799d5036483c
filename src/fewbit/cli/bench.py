"""`fewbit bench`: speed of several files, interleaved."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fewbit.cli.options import (
    COUNT,
    Numbers,
    card_options,
    default_threads,
    find_card,
    json_option,
    print_json,
    take_card_facts,
)
from fewbit.cli.progress import step_progress
from fewbit.cli.search import parse_engines


@click.command()
@click.argument("subjects", nargs=-1, required=True, metavar="FILE|CARD...")
@click.option(
    "--engine", "engines", default="onnxruntime", show_default=True, help="One or more, with commas."
)
@click.option("--batch", "batches", type=Numbers(int, 1), default="1", show_default=True)
@click.option("--threads", type=int, help="All cores where not given.")
@click.option("--streams", type=COUNT, default=1, show_default=True, help="Calls in flight at the same time.")
@click.option(
    "--float-precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True
)
@click.option("--rounds", type=COUNT, default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--card", "beside", help="The card of files that fewbit did not write.")
@card_options
@json_option
def bench(subjects: tuple[str, ...], engines: str, batches: tuple[int, ...], **options: Any) -> int:
    """Measure images per second, interleaved round by round; ratios are to the first row."""
    facts = take_card_facts(options)
    names = parse_engines(engines, "--engine")
    card = find_card(options["beside"], {}) if options["beside"] else None
    with tempfile.TemporaryDirectory() as folder, step_progress("bench", options["as_json"]) as tell:
        rows = _measure(subjects, names, batches, facts, card, Path(folder), options, tell)
    if options["as_json"]:
        print_json([{"subject": name, **timing.model_dump(mode="json")} for name, timing in rows])
        return 0
    table = Table("subject", "engine", "batch", "threads", "images/s, 95 %", "ratio, 95 %")
    for name, timing in rows:
        setting = timing.setting
        table.add_row(
            escape(name),
            setting.engine,
            str(setting.batch),
            f"{setting.threads} in {setting.streams}",
            _with_interval(timing.images_per_s, timing.interval, ",.0f"),
            "" if timing.ratio is None else _with_interval(timing.ratio, timing.ratio_interval, ".2f"),
        )
    Console().print(table)
    return 0


def _with_interval(value: float, interval: Any, form: str) -> str:
    """Return "value [low, high]", with the bracket escaped for rich."""
    return f"{value:{form}} \\[{interval.low:{form}}, {interval.high:{form}}]"


def _measure(
    subjects: tuple[str, ...],
    engines: tuple[Any, ...],
    batches: tuple[int, ...],
    facts: dict[str, Any],
    card: Any,
    folder: Path,
    options: dict[str, Any],
    tell: Any,
) -> list[tuple[str, Any]]:
    from fewbit.cli.subjects import find_subjects, tell_of_sums
    from fewbit.engines.process import EngineProcess
    from fewbit.engines.session import Setting
    from fewbit.measure.speed import measure_interleaved

    threads = default_threads(options["threads"])
    found = find_subjects(subjects, facts, folder, card)
    tell_of_sums(found, engines)
    names, sessions = [], []
    with ExitStack() as stack:
        processes = {engine: stack.enter_context(EngineProcess(engine)) for engine in engines}
        for subject, engine, batch in itertools.product(found, engines, batches):
            setting = Setting(
                engine=engine,
                float_precision=options["float_precision"],
                batch=batch,
                threads=threads,
                streams=options["streams"],
            )
            tell(f"opening {subject.name} on {engine}", 0.0)
            sessions.append(processes[engine].open(subject.path, setting))
            names.append(subject.name)
        tell(f"{options['rounds']} rounds", 0.5)
        timings = measure_interleaved(
            sessions, rounds=options["rounds"], seed=options["seed"], against=names[0]
        )
    return list(zip(names, timings, strict=True))
