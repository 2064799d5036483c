"""`fewbit eval`: accuracy on an engine, with its interval."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from fewbit.cli.options import (
    COUNT,
    card_options,
    data_option,
    default_threads,
    find_card,
    json_option,
    print_json,
    take_card_facts,
)
from fewbit.cli.progress import Tell, step_progress

ENGINES = ("onnxruntime", "openvino", "reference")


@click.command("eval")
@click.argument("subject", metavar="FILE|CARD")
@data_option
@click.option("--engine", type=click.Choice(ENGINES), default="onnxruntime", show_default=True)
@click.option("--against", metavar="FILE|CARD", help="Compare with this on the same images.")
@click.option("--card", "beside", help="The card of files that fewbit did not write.")
@click.option("--batch", type=COUNT, default=32, show_default=True)
@click.option("--threads", type=int, help="All cores where not given.")
@click.option("--strict", is_flag=True, help="A broken image stops the run.")
@card_options
@json_option
def evaluate(subject: str, data: Path, engine: str, against: str | None, **options: Any) -> int:
    """Measure accuracy with its interval; images that calibrated a file do not evaluate it."""
    from fewbit.measure.accuracy import compare

    facts = take_card_facts(options)
    card = find_card(options["beside"], {}) if options["beside"] else None
    with tempfile.TemporaryDirectory() as folder, step_progress("eval", options["as_json"]) as tell:
        names = [subject] if against is None else [subject, against]
        found, skipped, left_out = _predict(names, facts, Path(folder), card, data, engine, options, tell)
    accuracy = found[0].accuracy()
    answer: dict[str, Any] = {"accuracy": accuracy_json(accuracy), "engine": engine}
    answer |= {"skipped": skipped, "calibration_images_left_out": left_out}
    if against is not None:
        versus = compare(found[1], found[0])
        interval = versus.interval()
        answer["versus"] = {
            "top1_drop": versus.top1_drop,
            "interval95": [interval.low, interval.high],
            "top5_drop": versus.top5_drop,
            "flips": versus.flips,
            "p_value": versus.p_value(),
        }
    if options["as_json"]:
        print_json(answer)
    else:
        _print(answer, subject, against)
    return 0


def _predict(
    names: list[str],
    facts: dict[str, Any],
    folder: Path,
    card: Any,
    data: Path,
    engine: Any,
    options: dict[str, Any],
    tell: Tell,
) -> tuple[list[Any], int, int]:
    """Run every subject on the images that calibrated none of them."""
    from fewbit.cli.subjects import find_subjects, open_sets, tell_of_sums
    from fewbit.engines.process import EngineProcess
    from fewbit.engines.session import Setting
    from fewbit.measure.accuracy import Predictions
    from fewbit.search.evaluate import batches_for

    setting = Setting(
        engine=engine,
        batch=options["batch"],
        threads=default_threads(options["threads"]),
    )
    subjects = find_subjects(names, facts, folder, card)
    tell_of_sums(subjects, (engine,))
    sets, left_out, skipped = open_sets(subjects, data, options["strict"])
    found = []
    for one, images in zip(subjects, sets, strict=True):
        with images, EngineProcess(engine) as process:
            session = process.open(one.path, setting)
            tell(f"{one.name} on {engine}", 0.0)
            logits = session.logits(batches_for(session, images, setting.batch))
            found.append(Predictions.from_logits(logits, images.targets))
            skipped = max(skipped, len(images.skipped))
    return found, skipped, left_out


def accuracy_json(accuracy: Any) -> dict[str, Any]:
    """Return an accuracy as plain data with its intervals."""
    top1, top5 = accuracy.interval(1), accuracy.interval(5)
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "top1_correct": accuracy.top1_correct,
        "top5_correct": accuracy.top5_correct,
        "images": accuracy.total,
        "interval95": [top1.low, top1.high],
        "top5_interval95": [top5.low, top5.high],
    }


def _print(answer: dict[str, Any], subject: str, against: str | None) -> None:
    a = answer["accuracy"]
    low, high = a["interval95"]
    click.echo(
        f"{subject} on {answer['engine']}: top-1 {a['top1']:.2%} [{low:.2%}, {high:.2%}], "
        f"top-5 {a['top5']:.2%}, {a['top1_correct']} / {a['top5_correct']} of {a['images']} images right"
    )
    if answer["skipped"] or answer["calibration_images_left_out"]:
        click.echo(
            f"{answer['skipped']} broken images skipped, "
            f"{answer['calibration_images_left_out']} left out because they calibrated the file"
        )
    if "versus" in answer:
        v = answer["versus"]
        low, high = v["interval95"]
        click.echo(
            f"against {against}: top-1 drop {100 * v['top1_drop']:.2f} points [{100 * low:.2f}, "
            f"{100 * high:.2f}], "
            f"{v['flips']:.2%} of the predictions changed, p = {v['p_value']:.3g} (exact McNemar)"
        )
