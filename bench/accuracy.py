"""Accuracy of recipes on networks: float figures against the cards, and each recipe's paired drop.

    python bench/accuracy.py ../shared/networks/*.toml --recipes int8,int8-per-tensor

Each network is evaluated on its card's own images, less those that calibrate. Every row is what an engine
computes from the exported file: correct images, Wilson interval, drop against float32 on the same images with
its paired interval, and the share of predictions that changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.sample import choose_balanced
from fewbit.engines.process import EngineProcess
from fewbit.engines.session import EngineName, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import load
from fewbit.load.card import Card, read_card
from fewbit.measure.accuracy import Predictions, compare
from fewbit.measure.host import usable_cores
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import image_context, read_recipe, run_recipe


def predict(path: Path, engine: EngineName, images: ImageSet) -> Predictions:
    """Return what an engine predicts from a file."""
    setting = Setting(engine=engine, batch=16, threads=usable_cores())
    with EngineProcess(engine) as process:
        logits = process.open(path, setting).logits(images.batches(16))
    return Predictions.from_logits(logits, images.targets)


def split(card: Card, calibration: int, seed: int) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return all images, those that calibrate and the rest."""
    assert card.expected_data_path is not None
    source = open_images(card.expected_data_path, card.labels_path)
    whole = ImageSet(source, card.input, card.network.classes)
    whole.decode()
    chosen = choose_balanced(whole.targets, min(calibration, len(whole) // 6), seed)
    rest: NDArray[np.int64] = np.setdiff1d(np.arange(len(whole)), chosen)
    return whole, whole.subset(chosen), whole.subset(rest)


def measure(card: Card, recipes: list[str], engines: list[EngineName], calibration: int, seed: int) -> Any:
    """Yield one row for float32 and one for each recipe and engine."""
    net: Net = load(card)
    whole, calibrating, rest = split(card, calibration, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.onnx"
        made, _ = run_recipe(read_recipe("float32"), net, image_context(None, engines[0]))
        export_onnx(made, path)
        exact = predict(path, engines[0], whole)
        found = exact.accuracy()
        expected = card.expected
        assert expected is not None
        counts = (found.top1_correct, found.top5_correct)
        equal = counts == (expected.top1_correct, expected.top5_correct)
        yield {
            "network": card.network.name,
            "recipe": "float32",
            "engine": engines[0],
            "images": found.total,
            "top1_correct": counts[0],
            "top5_correct": counts[1],
            "top1": found.top1,
            "top1_interval95": list(found.interval().model_dump().values()),
            "as_card_expects": equal,
        }
        kept = np.setdiff1d(np.arange(len(whole)), np.flatnonzero(np.isin(whole.names, calibrating.names)))
        for recipe in recipes:
            for engine in engines:
                begin = time.perf_counter()
                context = image_context(calibrating, engine, seed)
                made, _ = run_recipe(read_recipe(recipe), net, context)
                seconds = time.perf_counter() - begin
                path = Path(folder) / f"{recipe}-{engine}.onnx"
                export_onnx(made, path, target(engine))
                got = predict(path, engine, rest)
                versus = compare(exact[kept], got)
                yield {
                    "network": card.network.name,
                    "recipe": recipe,
                    "engine": engine,
                    "images": len(got),
                    "top1": got.accuracy().top1,
                    "top1_interval95": list(got.accuracy().interval().model_dump().values()),
                    "top1_drop": versus.top1_drop,
                    "drop_interval95": list(versus.interval().model_dump().values()),
                    "flips": versus.flips,
                    "seconds": seconds,
                }


@click.command()
@click.argument("cards", nargs=-1, required=True)
@click.option("--recipes", default="int8,int8-per-tensor", show_default=True)
@click.option("--engines", default="onnxruntime,openvino", show_default=True)
@click.option("--calibration-images", type=int, default=512, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    cards: tuple[str, ...], recipes: str, engines: str, calibration_images: int, seed: int, as_json: bool
) -> None:
    """Print the table."""
    rows = []
    names = [name for name in get_args(EngineName) if name in engines.split(",")]
    table = Table("network", "recipe", "engine", "images", "top-1 %, 95 %", "drop, points, 95 %", "changed %")
    for name in cards:
        for row in measure(read_card(name), recipes.split(","), names, calibration_images, seed):
            rows.append(row)
            table.add_row(*cells(row))
            print(" | ".join(cells(row)).replace("\\[", "["), file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=130).print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row's cells as text."""
    low, high = row["top1_interval95"]
    top1 = f"{row['top1']:.2%} \\[{low:.2%}, {high:.2%}]"
    drop, flips = "", ""
    if "top1_drop" in row:
        low, high = row["drop_interval95"]
        drop = f"{100 * row['top1_drop']:.2f} \\[{100 * low:.2f}, {100 * high:.2f}]"
        flips = f"{row['flips']:.2%}"
    else:
        verdict = "equal" if row["as_card_expects"] else "NOT EQUAL"
        drop = f"{row['top1_correct']} / {row['top5_correct']} right, card: {verdict}"
    return [row["network"], row["recipe"], row["engine"], str(row["images"]), top1, drop, flips]


if __name__ == "__main__":
    main()
