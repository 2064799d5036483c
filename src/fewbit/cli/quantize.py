"""`fewbit quantize`: one recipe, one file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from fewbit.cli.options import card_options, find_card, json_option, print_json, take_card_facts
from fewbit.cli.progress import step_progress
from fewbit.engines.session import EngineName
from fewbit.spec import ImageInput


@click.command()
@click.argument("card", metavar="CARD")
@click.option("--recipe", default="int8", show_default=True, help="A shipped recipe, or a .toml file.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled images: folder, tar or zip of class/name.jpg, or parquet. Some recipes need none.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .onnx file to write.")
@click.option(
    "--engine", type=click.Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Other images to calibrate with.")
@click.option("--calibration-images", type=int, default=512, show_default=True)
@click.option(
    "--input",
    "takes",
    type=click.Choice(["float32", "uint8"]),
    help="What the file takes: preprocessed images (N, C, H, W), or the pixels themselves (N, H, W, C). "
    "Else float32, or uint8 where the recipe has the step fold_input.",
)
@click.option(
    "--sums",
    type=click.Choice(["auto", "exact", "saturating"]),
    default="auto",
    show_default=True,
    help="How the processor adds products of u8 and s8: exactly (VNNI, AMX, Arm), or in 16 bits, where "
    "weights then take 7 bits; auto asks this one.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--strict", is_flag=True, help="A broken image stops the run.")
@card_options
@json_option
def quantize(card: str, recipe: str, data: Path | None, out: Path, engine: EngineName, **options: Any) -> int:
    """Quantize a network by a recipe and write the file that an engine runs."""
    from fewbit.export.facts import describe_export, sums_of
    from fewbit.export.onnx_out import export_onnx
    from fewbit.load.capture import load
    from fewbit.measure.host import describe_host, sums_exactly
    from fewbit.place.targets import target
    from fewbit.recipe import image_context, read_recipe, run_recipe

    given = find_card(card, take_card_facts(options))
    chosen, sums = read_recipe(recipe), options.pop("sums")
    exact = sums_exactly(engine) if sums == "auto" else sums == "exact"
    aim = target(engine, exact, describe_host().bf16)
    takes: ImageInput = options.pop("takes") or chosen.takes
    if takes == "uint8":
        chosen = chosen.with_pixels()
    source = options.pop("calibration") or data
    if chosen.uses_images and source is None:
        raise click.UsageError(
            f"Missing option '--data'. Recipe '{chosen.name}' calibrates on images; "
            "one that needs none is 'int8-dfq'"
        )
    net = load(given)
    images = None
    if chosen.uses_images and source is not None:
        images = _calibration_images(given, source, **{k: v for k, v in options.items() if k != "as_json"})
    progress = step_progress(given.network.name, options["as_json"])
    with images or nullcontext(), _partial(out) as scratch, progress as tell:
        context = image_context(images, engine, options["seed"], tell, scratch, exact)
        made, reports = run_recipe(chosen, net, context)
        made_for = sums_of(made, exact)
        facts = describe_export(given, chosen, engine, images, made_for)
        export_onnx(made, out, aim if chosen.places else None, facts, takes)
    answer = {
        "network": given.network.name,
        "recipe": chosen.name,
        "digest": chosen.digest(),
        "out": str(out),
        "bytes": out.stat().st_size,
        "calibration_images": 0 if images is None else len(images.names),
        "steps": [report.model_dump(mode="json") for report in reports],
    }
    if options["as_json"]:
        print_json(answer)
        return 0
    for report in reports:
        click.echo(
            f"{report.step:<14} {report.seconds:6.2f} s  {report.changed} changed  {'; '.join(report.notes)}"
        )
    if made_for == "saturating":
        click.echo("weights have 7 bits at most, for processors that add products of u8 and s8 in 16 bits")
    if images is not None:
        click.echo(f"calibrated on {len(images.names)} images; evaluate it on others")
    click.echo(f"{out}: {answer['bytes']:,} bytes, for {engine}")
    return 0


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """Give the folder beside a file where long steps keep what they have done until the file is there."""
    folder = out.with_name(f"{out.name}.partial")
    if folder.is_dir():
        click.echo(f"{folder}: a run was stopped; what it had done is taken up where it fits", err=True)
    try:
        yield folder
    except BaseException:
        if any(path.is_file() for path in folder.rglob("*")):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _calibration_images(card: Any, source: Path, calibration_images: int, seed: int, strict: bool) -> Any:
    from fewbit.data.image_set import ImageSet
    from fewbit.data.images import open_images
    from fewbit.data.sample import choose_balanced
    from fewbit.errors import InputError

    if calibration_images < 1:
        raise InputError(f"--calibration-images is {calibration_images}; give 1 or more")
    opened = open_images(source, card.labels_path, strict, card.network.classes)
    chosen = choose_balanced(opened.targets, min(calibration_images, len(opened)), seed)
    return ImageSet(opened, card.input, card.network.classes, indices=chosen)
