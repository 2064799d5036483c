"""`fewbit inspect`: layers, ranges, noise, and what runs in integers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fewbit.cli.options import card_options, find_card, json_option, print_json, take_card_facts
from fewbit.cli.progress import step_progress

_IMAGES = 64


@click.command()
@click.argument("card", metavar="CARD")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Labelled images: adds ranges, noise and placement."
)
@click.option("--recipe", default="int8", show_default=True)
@click.option(
    "--engine", type=click.Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True)
@card_options
@json_option
def inspect(card: str, data: Path | None, recipe: str, engine: str, seed: int, **options: Any) -> int:
    """Show every layer; with images also its range, its noise and whether the engine runs it in integers."""
    from fewbit.load.capture import load
    from fewbit.sensitivity.sqnr import layer_records

    given = find_card(card, take_card_facts(options))
    net = load(given)
    placement = None
    with step_progress("inspect", options["as_json"]) as tell:
        if data is None:
            records = layer_records(net, net, ())
        else:
            records, placement = _quantized(given, net, data, recipe, engine, seed, tell)
    if options["as_json"]:
        print_json(
            {
                "network": given.network.name,
                "layers": [r.model_dump(mode="json") for r in records],
                "placement": None if placement is None else placement.model_dump(mode="json"),
            }
        )
        return 0
    _print(records, placement)
    return 0


def _quantized(
    given: Any, net: Any, data: Path, recipe: str, engine: Any, seed: int, tell: Any
) -> tuple[Any, Any]:
    import torch

    from fewbit.data.image_set import ImageSet
    from fewbit.data.images import open_images
    from fewbit.data.sample import choose_balanced
    from fewbit.engines.process import EngineProcess
    from fewbit.engines.session import Setting
    from fewbit.export.onnx_out import export_onnx
    from fewbit.place.targets import target
    from fewbit.recipe import image_context, read_recipe, run_recipe
    from fewbit.sensitivity.sqnr import layer_records

    source = open_images(data, given.labels_path, False, given.network.classes)
    chosen = choose_balanced(source.targets, min(_IMAGES, len(source)), seed)
    with ImageSet(source, given.input, given.network.classes, indices=chosen) as images:
        made, _ = run_recipe(read_recipe(recipe), net, image_context(images, engine, seed, tell))
        tell("noise", 0.5)
        records = layer_records(net, made, (torch.from_numpy(batch) for batch in images.batches(8)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inspected.onnx"
        export_onnx(made, path, target(engine))
        tell(f"placement on {engine}", 0.9)
        with EngineProcess(engine) as process:
            placement = process.open(path, Setting(engine=engine)).placement()
    return records, placement


def _print(records: Any, placement: Any) -> None:
    console = Console()
    table = Table("layer", "kind", "precision", "SQNR dB", "range", "weight channel max / min")
    for r in records:
        span = "" if r.low is None else f"{r.low:.3g} to {r.high:.3g}"
        ratio = "" if r.weight_range_ratio is None else f"{r.weight_range_ratio:.3g}"
        table.add_row(
            r.name, r.kind, r.precision, "" if r.sqnr_db is None else f"{r.sqnr_db:.1f}", span, ratio
        )
    console.print(table)
    if placement is None:
        return
    console.print(
        f"{placement.engine}: {placement.integer_operators} operators in integers, "
        f"{placement.float_operators} in float",
        highlight=False,
        markup=False,
    )
    for operator in placement.operators:
        if operator.precision != "int8" and operator.matrix:
            console.print(
                f"in float: {operator.name} ({operator.kind}) {operator.why}", highlight=False, markup=False
            )
