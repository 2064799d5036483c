"""Accuracy of recipes on networks: float figures against the cards, and each recipe's paired drop.

    python bench/accuracy.py ../shared/networks/mobilenet_v1_025.toml --recipes int8,comq@w4a8
    python bench/accuracy.py ../shared/networks/resnet20.toml --calibration ../shared/data/cifar10/train.tar \
        --calibration-images 1024 --recipes nearest@w4a4,qdrop@w4a4 --peers PYTHON --rows rows.jsonl

Each network is evaluated on its card's own images, less those that calibrate where `--calibration` names no
others. Every row is what an engine computes from the exported file: correct images, Wilson interval, drop
against float32 on the same images with its paired interval, and the share of predictions that changed.
Each recipe runs in a process of its own (`calibration_child.py`), which says its seconds, processor seconds
and peak of resident memory. `METHOD@WIDTH` names a rung of the ladder at a width (see `ladder.py`).
`--peers` names the Python that has onnxruntime and nncf, whose int8 then stands beside it, calibrated on the
same images. With `--rows` every row is kept in a file as it comes, and a second run measures only what is
missing there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from calibration import PEERS, has, measure
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
from fewbit.recipe import Recipe, image_context, read_recipe, run_recipe
from ladder import recipe_of

Row = dict[str, Any]
_LIMIT_BYTES = 16 << 30
_BATCH = 32


def predict(path: Path, engine: EngineName, images: ImageSet) -> Predictions:
    """Return what an engine predicts from a file."""
    setting = Setting(engine=engine, batch=16, threads=usable_cores())
    with EngineProcess(engine) as process:
        logits = process.open(path, setting).logits(images.batches(16))
    return Predictions.from_logits(logits, images.targets)


class Arena:
    """One network with its images: those that are evaluated and those that calibrate.

    Args:
        card: Of the network.
        path: The card's file.
        calibration: Other images to calibrate with; none: some of the card's own, which are then not
            evaluated.
        images: How many calibrate, at most a sixth of the card's own.
        seed: Of their choice.
        folder: Where files are made.
    """

    def __init__(
        self, card: Card, path: str, calibration: Path | None, images: int, seed: int, folder: Path
    ) -> None:
        assert card.expected_data_path is not None
        self.card, self.path, self.folder, self.seed = card, path, folder, seed
        source = open_images(card.expected_data_path, card.labels_path)
        self.whole = ImageSet(source, card.input, card.network.classes)
        self.whole.decode()
        kept: NDArray[np.int64] = np.arange(len(self.whole))
        if calibration is None:
            chosen = choose_balanced(self.whole.targets, min(images, len(self.whole) // 6), seed)
            self.calibrating = self.whole.subset(chosen)
            kept = np.setdiff1d(kept, chosen)
        else:
            others = open_images(calibration, card.labels_path)
            chosen = choose_balanced(others.targets, min(images, len(others)), seed)
            self.calibrating = ImageSet(others, card.input, card.network.classes, indices=chosen)
        self.rest = self.whole.subset(kept)
        self.float_file, self.images_file = folder / "float32.onnx", folder / "images.f32"
        with self.images_file.open("wb") as file:
            for batch in self.calibrating.batches(_BATCH):
                batch.astype(np.float32).tofile(file)
        made, _ = run_recipe(read_recipe("float32"), load(card), image_context(None, "onnxruntime"))
        export_onnx(made, self.float_file)
        self.exact_whole = predict(self.float_file, "onnxruntime", self.whole)
        self.exact = self.exact_whole[kept]

    def float_row(self) -> Row:
        """Return the row of float32, with what the card expects."""
        found, expected = self.exact_whole.accuracy(), self.card.expected
        assert expected is not None
        counts = (found.top1_correct, found.top5_correct)
        return {
            "images": found.total,
            "top1_correct": counts[0],
            "top5_correct": counts[1],
            "top1": found.top1,
            "top1_interval95": list(found.interval().model_dump().values()),
            "as_card_expects": counts == (expected.top1_correct, expected.top5_correct),
        }

    def row(self, tool: str, engine: EngineName, python: str) -> Row:
        """Quantize with one tool in a process of its own, and evaluate its file on an engine."""
        suffix = ".xml" if tool == "nncf:openvino" else ".onnx"
        out = self.folder / f"quantized{suffix}"
        job = {
            "tool": tool,
            "card": self.path,
            "float_file": str(self.float_file),
            "images_file": str(self.images_file),
            "images": len(self.calibrating),
            "batch": _BATCH,
            "size": list(self.card.input.size),
            "target": engine,
            "cores": usable_cores(),
            "seed": self.seed,
            "out": str(out),
            "limit_bytes": _LIMIT_BYTES,
        }
        figures = measure(python, job)
        if isinstance(figures, str):
            return {"failed": figures}
        got = predict(out, engine, self.rest)
        versus = compare(self.exact, got)
        return {
            "images": len(got),
            "calibration_images": len(self.calibrating),
            "top1": got.accuracy().top1,
            "top1_interval95": list(got.accuracy().interval().model_dump().values()),
            "top1_drop": versus.top1_drop,
            "drop_interval95": list(versus.interval().model_dump().values()),
            "flips": versus.flips,
            "seconds": figures["seconds"],
            "cpu_s": figures["cpu_s"],
            "peak_mib": figures["peak_bytes"] / 2**20,
        }


Key = tuple[str, ...]


def key_of(row: Row) -> Key:
    """Return all that a row's figures depend on."""
    return tuple(
        str(row.get(name, "")) for name in ("network", "recipe", "digest", "engine", "images_of", "seed")
    )


def rows_of(
    card: Card,
    recipes: list[Recipe],
    engines: list[EngineName],
    peers: str | None,
    known: set[Key],
    arena: Arena,
) -> Iterator[Row]:
    """Yield one row for float32 and one for each tool and engine that is not known yet."""
    common = {"network": card.network.name, "images_of": arena.calibrating.digest, "seed": arena.seed}
    wanted: list[tuple[Row, str, EngineName, str]] = []
    for recipe in recipes:
        path = arena.folder / f"{recipe.digest()}.toml"
        path.write_text(recipe.to_toml(), encoding="utf-8")
        for engine in engines:
            row = {"recipe": recipe.name, "digest": recipe.digest(), "engine": engine}
            wanted.append((common | row, f"fewbit:{path}", engine, sys.executable))
    for tool, module in PEERS.items():
        if peers is not None and has(peers, module):
            engine = "openvino" if tool == "nncf:openvino" else "onnxruntime"
            wanted.append((common | {"recipe": tool, "engine": engine}, tool, engine, peers))
    exact = common | {"recipe": "float32", "engine": "onnxruntime"}
    if key_of(exact) not in known:
        yield exact | arena.float_row()
    for row, tool, engine, python in wanted:
        if key_of(row) not in known:
            yield row | arena.row(tool, engine, python)


@click.command()
@click.argument("cards", nargs=-1, required=True)
@click.option("--recipes", default="int8,int8-per-tensor", show_default=True)
@click.option("--engines", default="onnxruntime,openvino", show_default=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), help="Images to calibrate with.")
@click.option("--calibration-images", type=int, default=512, show_default=True)
@click.option("--peers", help="The Python that has onnxruntime and nncf.")
@click.option("--rows", "rows_path", type=click.Path(path_type=Path), help="Keep every row in this file.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    cards: tuple[str, ...],
    recipes: str,
    engines: str,
    calibration: Path | None,
    calibration_images: int,
    peers: str | None,
    rows_path: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Print the table."""
    rows: list[Row] = []
    if rows_path is not None and rows_path.exists():
        read = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in read if "failed" not in row]
    chosen = [recipe_of(text) for text in recipes.split(",") if text]
    names = [name for name in get_args(EngineName) if name in engines.split(",")]
    for name in cards:
        card = read_card(name)
        known = {key_of(row) for row in rows}
        with tempfile.TemporaryDirectory() as folder:
            arena = Arena(card, name, calibration, calibration_images, seed, Path(folder))
            for row in rows_of(card, chosen, names, peers, known, arena):
                rows.append(row)
                print(" | ".join(cells(row)).replace("\\[", "["), file=sys.stderr, flush=True)
                if rows_path is not None:
                    with rows_path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(
        "network",
        "recipe",
        "engine",
        "images",
        "top-1 %, 95 %",
        "drop, points, 95 %",
        "changed %",
        "s",
        "MiB",
    )
    for row in rows:
        table.add_row(*cells(row))
    Console(width=150).print(table)


def cells(row: Row) -> list[str]:
    """Return a row's cells as text."""
    start = [row["network"], row["recipe"], row["engine"]]
    if "failed" in row:
        return [*start, "", row["failed"], "", "", "", ""]
    low, high = row["top1_interval95"]
    top1 = f"{row['top1']:.2%} \\[{low:.2%}, {high:.2%}]"
    if "top1_drop" not in row:
        verdict = "equal" if row["as_card_expects"] else "NOT EQUAL"
        right = f"{row['top1_correct']} / {row['top5_correct']} right, card: {verdict}"
        return [*start, str(row["images"]), top1, right, "", "", ""]
    low, high = row["drop_interval95"]
    drop = f"{100 * row['top1_drop']:.2f} \\[{100 * low:.2f}, {100 * high:.2f}]"
    cost = [f"{row['seconds']:.1f}", f"{row['peak_mib']:.0f}"]
    return [*start, str(row["images"]), top1, drop, f"{row['flips']:.2%}", *cost]


if __name__ == "__main__":
    main()
