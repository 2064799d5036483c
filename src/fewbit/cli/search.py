"""`fewbit search` and `fewbit report`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fewbit.cli.main import NOTHING_FOUND
from fewbit.cli.options import (
    Numbers,
    card_options,
    data_option,
    find_card,
    json_option,
    print_json,
    take_card_facts,
)
from fewbit.cli.progress import search_progress
from fewbit.errors import InputError, suggest
from fewbit.spec import ImageInput

ENGINES = ("onnxruntime", "openvino")


def parse_engines(text: str, option: str = "--engines") -> tuple[Any, ...]:
    """Return engine names from "onnxruntime,openvino".

    Args:
        text: What came.
        option: Where it came from.

    Raises:
        InputError: One is unknown, or there is none.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in ENGINES:
            raise InputError(
                f"{option} names '{name}'{suggest(name, ENGINES)}; allowed are {', '.join(ENGINES)}"
            )
    if not names:
        raise InputError(f"{option} is empty; give one or more of {', '.join(ENGINES)}")
    return names


@click.command()
@click.argument("cards", nargs=-1, required=True, metavar="CARD...")
@data_option
@click.option(
    "--budget", "budgets", multiple=True, required=True, help='"top1-drop<=1%"; all of several hold.'
)
@click.option("--objective", type=click.Choice(["throughput", "latency", "size"]), default="throughput")
@click.option("--engines", default=",".join(ENGINES), show_default=True, help="Which may run the answer.")
@click.option("--batch", "batches", type=Numbers(int, 1), default="1,8,32", show_default=True)
@click.option("--threads", type=int, help="Of a run; all cores where not given.")
@click.option(
    "--input",
    "takes",
    type=click.Choice(["any", "float32"]),
    default="any",
    show_default=True,
    help="What the answer may take: preprocessed images only, or uint8 pixels (N, H, W, C) too.",
)
@click.option(
    "--minutes",
    type=float,
    help="End after so long with the best found; with fewer than 8, no mixes of int8 and float are tried.",
)
@click.option("--trials", type=int, help="End after so many trials with the best found.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--confidence", type=float, default=0.5, show_default=True, help="0.95: the budget must be proven."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Other images to calibrate with.")
@click.option("--calibration-images", type=int, default=512, show_default=True)
@click.option("--strict", is_flag=True, help="A broken image stops the run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("fewbit-study"), show_default=True)
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the study there.")
@card_options
@json_option
def search(cards: tuple[str, ...], **options: Any) -> int:
    """Find the fastest network inside the budget.

    Leaves report.html, best/ (the file to ship, its recipe, result.json) and pareto.json in --out. Exits
    with 0 when a network inside the budget was found, 3 when none was (the nearest is kept), 2 when the
    input cannot be used.
    """
    from fewbit.report.summary import result_json, sentence
    from fewbit.search.budget import parse_budget
    from fewbit.search.options import StudyOptions
    from fewbit.search.study import run_study

    facts = take_card_facts(options)
    as_json = options.pop("as_json")
    budgets = tuple(parse_budget(text) for text in options.pop("budgets"))
    resume = options.pop("resume")
    _check_resume(resume, options["out"])
    both: tuple[ImageInput, ...] = ("float32", "uint8")
    inputs = both if options.pop("takes") == "any" else both[:1]
    given = StudyOptions(
        cards=tuple(find_card(card, facts) for card in cards),
        budgets=budgets,
        engines=parse_engines(options.pop("engines")),
        out=resume or options.pop("out"),
        resume=resume is not None,
        inputs=inputs,
        command=shlex.join(["fewbit", *sys.argv[1:]]),
        **{key: value for key, value in options.items() if key != "out"},
    )
    with search_progress(quiet=as_json and not sys.stderr.isatty()) as watch:
        study = run_study(given, watch)
    write_outputs(study, given.out)
    if as_json:
        print_json(result_json(study))
    else:
        click.echo(sentence(study))
        for one in study.left_out:
            click.echo(f"not quantized: {one.text}")
        click.echo(f"report: {given.out / 'report.html'}")
        if study.answer is not None:
            click.echo(f"file:   {given.out / 'best' / 'model.onnx'}")
    return 0 if study.answer is not None and study.answer.found else NOTHING_FOUND


def _check_resume(resume: Path | None, out: Path) -> None:
    """Refuse another folder beside --resume; tell where there is nothing to go on with."""
    from click.core import ParameterSource

    given = click.get_current_context().get_parameter_source("out") == ParameterSource.COMMANDLINE
    if resume is not None and given and resume != out:
        raise InputError(f"--resume {resume} writes into that folder, so --out {out} has no place beside it")
    if resume is not None and not (resume / "study.db").exists():
        click.echo(f"fewbit: {resume}: has no study to go on with; a new one begins there", err=True)


def write_outputs(study: Any, folder: Path) -> None:
    """Write what a person and a script read: report.html, best/result.json and pareto.json, each in one step.

    Raises:
        OutputError: The folder cannot be written.
    """
    from fewbit.files import write_text
    from fewbit.report.html import write_report
    from fewbit.report.summary import pareto_json, result_json

    if study.answer is not None:
        write_text(folder / "best" / "result.json", json.dumps(result_json(study), indent=2) + "\n")
    write_text(folder / "pareto.json", json.dumps(pareto_json(study), indent=2) + "\n")
    write_report(study, folder / "report.html")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@json_option
def report(folder: Path, as_json: bool) -> int:
    """Write DIR/report.html again from the journal of a search."""
    from fewbit.report.summary import result_json, sentence
    from fewbit.search.study import read_study

    study = read_study(folder)
    write_outputs(study, folder)
    if as_json:
        print_json(result_json(study))
    else:
        click.echo(sentence(study))
        click.echo(f"report: {folder / 'report.html'}")
    return 0
