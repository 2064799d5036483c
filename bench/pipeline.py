"""What a uint8 input is worth: from decoded images to classes, with preprocessing and without.

    python bench/pipeline.py ../shared/networks/mobilenet_v2.toml --data ../shared/data/imagenet/images.tar

Each way gets the same decoded pixels, uint8 (N, H, W, C). "float32" makes the network's input of them in
numpy, (pixel / scale - mean) / std, float32 (N, C, H, W), and runs the file that takes it; "uint8" hands
them to the file that takes pixels. "engine alone" leaves the preprocessing out of the first. All take turns
in every round on one stream, and ratios are taken within a round: the median with its 95 % interval. The two
files of one recipe have to agree on every logit of the images (those of a recipe in integers in every bit),
and the bench ends where they do not; how far the plain recipe, whose image is rounded to a grid of its own,
is from them is shown as the share of images whose class is another ("moved").
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import fewbit
from fewbit.data.preprocess import normalize
from fewbit.data.sample import choose_balanced
from fewbit.engines.session import BlockTime, EngineName, Session
from fewbit.load.capture import load
from fewbit.measure.host import sums_exactly
from fewbit.measure.speed import Timing
from fewbit.registry import find

WAYS = ("float32", "engine alone", "uint8")


class Way:
    """One way from pixels to classes; `fewbit.measure.speed.Timed`."""

    def __init__(
        self,
        session: Session,
        setting: fewbit.Setting,
        pixels: NDArray[np.uint8],
        prepare: Callable[[NDArray[np.uint8]], NDArray[Any]],
    ) -> None:
        self.session, self.setting, self.pixels, self.prepare = session, setting, pixels, prepare

    def time_block(self, seconds: float) -> BlockTime:
        """Run calls for about `seconds`, at least one."""
        taken, start = list[float](), time.perf_counter()
        now = start
        while not taken or now < start + seconds:
            before = now
            self.session.run(self.prepare(self.pixels)).argmax(1)
            now = time.perf_counter()
            taken.append((now - before) * 1e3)
        images = len(taken) * len(self.pixels)
        return BlockTime(images=images, seconds=now - start, latencies_ms=tuple(taken))


def build(
    card: fewbit.Card, engine: EngineName, images: fewbit.ImageSet, recipe: str, folder: Path
) -> list[Path]:
    """Return the plain file, and the two of the recipe with the preprocessing folded in."""
    exact = sums_exactly(engine)
    net, aim = load(card), fewbit.target(engine, exact)
    chosen = fewbit.read_recipe(recipe)
    context = fewbit.image_context(images, engine, exact_sums=exact)
    paths = [folder / f"{card.network.name}-{engine}-{name}.onnx" for name in ("plain", *WAYS[::2])]
    plain = fewbit.run_recipe(chosen, net, context)[0]
    folded = fewbit.run_recipe(chosen.with_pixels(), net, context)[0]
    aimed = aim if chosen.places else None
    fewbit.export_onnx(plain, paths[0], aimed)
    fewbit.export_onnx(folded, paths[1], aimed)
    fewbit.export_onnx(folded, paths[2], aimed, image="uint8")
    return paths


def measure(
    paths: list[Path],
    card: fewbit.Card,
    pixels: NDArray[np.uint8],
    setting: fewbit.Setting,
    rounds: int,
    integers: bool = True,
) -> tuple[list[Timing], float]:
    """Time the three ways side by side; return also the share of classes that the plain file moves."""
    engine = find("engines", setting.engine)()
    plain, floats, whole = (engine.open(path, setting) for path in paths)
    ready = normalize(pixels, card.input)
    expected = floats.run(ready)
    gap = float(np.abs(whole.run(pixels) - expected).max() / np.ptp(expected))
    if gap > (0.0 if integers else 1e-5):
        raise click.ClickException(f"{paths[2].name}: its logits are not those of {paths[1].name}; report it")
    moved = float((plain.run(ready).argmax(1) != expected.argmax(1)).mean())
    some = pixels[: setting.batch]
    ways = [
        Way(plain, setting, some, lambda given: normalize(given, card.input)),
        Way(plain, setting, some, lambda _: ready[: setting.batch]),
        Way(whole, setting, some, lambda given: given),
    ]
    return fewbit.measure_interleaved(ways, rounds=rounds, against=WAYS[0]), moved


@click.command(help=__doc__)
@click.argument("cards", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--recipe", default="int8", show_default=True)
@click.option("--engines", default="openvino,onnxruntime", show_default=True)
@click.option("--batches", default="1,8", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--images", default=64, show_default=True, help="To calibrate with, and to compare logits on.")
@click.option("--json", "as_json", is_flag=True)
def main(cards: tuple[Path, ...], data: Path, as_json: bool, **options: Any) -> None:
    found = [row for path in cards for row in _rows(fewbit.read_card(path), data, options)]
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("network", "engine", "batch", "way", "images/s, 95 %", "ratio, 95 %", "moved")
    for row in found:
        timing = Timing.model_validate(row["timing"])
        setting = timing.setting
        cells = row["network"], setting.engine, str(setting.batch), row["way"], *_cells(timing)
        table.add_row(*cells, f"{row['moved']:.1%} of {row['images']}")
    Console(width=130).print(table)


def _rows(card: fewbit.Card, data: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    source = fewbit.open_images(data, card.labels_path)
    chosen = choose_balanced(source.targets, min(options["images"], len(source)), 0)
    images = fewbit.ImageSet(source, card.input, card.network.classes, indices=chosen)
    scheme = fewbit.read_recipe(options["recipe"])
    integers = scheme.places and scheme.scheme.mode == "static"
    with images, tempfile.TemporaryDirectory() as folder:
        pixels = np.concatenate(list(images.pixels(64)))
        for engine in cast(list[EngineName], options["engines"].split(",")):
            files = build(card, engine, images, options["recipe"], Path(folder))
            for batch in map(int, options["batches"].split(",")):
                setting = fewbit.Setting(engine=engine, batch=batch, threads=options["threads"])
                timings, moved = measure(files, card, pixels, setting, options["rounds"], integers)
                for way, timing in zip(WAYS, timings, strict=True):
                    about = {"network": card.network.name, "way": way, "moved": moved, "images": len(pixels)}
                    yield about | {"timing": timing.model_dump(mode="json")}


def _cells(timing: Timing) -> tuple[str, str]:
    assert timing.ratio is not None and timing.ratio_interval is not None
    rate, ratio = timing.interval, timing.ratio_interval
    return (
        f"{timing.images_per_s:,.0f} \\[{rate.low:,.0f}, {rate.high:,.0f}]",
        f"{timing.ratio:.2f} \\[{ratio.low:.2f}, {ratio.high:.2f}]",
    )


if __name__ == "__main__":
    main()
