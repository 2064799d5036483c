"""How well each sensitivity foretells the measured drop of accuracy, and what it costs.

    python bench/sensitivity.py ../shared/networks/resnet20.toml --data ../shared/data/cifar10/train.tar \
        --images 128 --judge-images 1000 --bits 2,3,4

Every row of the registry's table `sensitivity` scores every region of the network at every width on the same
few images, the weights rounded to nearest with the ranges of `--ranges`. The drop of top-1 is then measured
on other images, one region at one width at a time, all else in float. The first table ranks the regions at
the first width, 1 costing most, beside their drop with its paired 95 % interval. The second has Spearman's
rank correlation of each row with the drop: over all regions and widths, with the 95 % interval of resampled
regions, and within each width, where the width itself explains nothing. Forwards are runs of the network over
the row's images. The row `drop` is the same measurement as the judge's, on the row's own few images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.sample import choose_balanced
from fewbit.load.capture import load
from fewbit.load.card import Card, read_card
from fewbit.measure.intervals import bootstrap, paired
from fewbit.place.regions import Region, regions_of
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import image_context, read_recipe, run_recipe
from fewbit.registry import find, rows
from fewbit.sensitivity.score import LabelledBatch, Sensitivities, Sensitivity
from fewbit.spec import QuantSpec

import torch  # isort: skip  # behind fewbit, which sets its threads to wait passively

Floats = NDArray[np.float64]
_BATCH = 32


def spearman(pairs: Floats) -> Floats:
    """Return the rank correlation of each draw (k, regions, widths, 2); 0 where one side never varies."""
    ranks: Floats = rankdata(pairs.reshape(len(pairs), -1, 2), axis=1)
    first, second = np.moveaxis(ranks - ranks.mean(1, keepdims=True), 2, 0)
    power = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    found: Floats = np.divide((first * second).sum(1), power, out=np.zeros(len(pairs)), where=power > 0)
    return found


def batches_of(card: Card, path: Path, count: int, seed: int, skip: int = 0) -> list[LabelledBatch]:
    """Return labelled images, chosen balanced over the classes, those after the first `skip` so chosen."""
    source = open_images(path, card.labels_path)
    chosen = choose_balanced(source.targets, skip + count, seed)[skip:]
    if not len(chosen):
        raise click.UsageError(f"{path}: has {len(source)} images, of which {skip} are taken; give others")
    with ImageSet(source, card.input, card.network.classes, indices=chosen) as images:
        labels = torch.from_numpy(images.targets).split(_BATCH)  # type: ignore[no-untyped-call]
        return [
            (torch.from_numpy(pixels.copy()), part)
            for pixels, part in zip(images.batches(_BATCH), labels, strict=True)
        ]


def row_of(name: str, ranges: str, activations: int, samples: int) -> Sensitivity:
    """Return a row with its hyperparameters, as far as it has them."""
    kind = find("sensitivity", name)
    given: dict[str, Any] = {"ranges": ranges}
    if activations:
        given |= {"activations": QuantSpec(bits=activations)}
    if name == "hessian":
        given |= {"samples": samples}
    made: Sensitivity = kind.from_data({key: given[key] for key in given if key in kind.model_fields})
    return made


def table_of(found: Sensitivities) -> Floats:
    """Return the losses (regions, widths)."""
    return np.array(list(found.losses.values()))


def summary(name: str, found: Sensitivities, judged: Sensitivities, seed: int) -> dict[str, Any]:
    """Return what a row cost and how it goes with the measured drop."""
    pairs = np.stack([table_of(found), table_of(judged)], axis=2)
    interval = bootstrap(pairs, spearman, seed=seed, draws=2000)
    return {
        "row": name,
        "unit": found.unit,
        "images": found.images,
        "forwards": found.forwards,
        "seconds": found.seconds,
        "spearman": float(spearman(pairs[None])[0]),
        "interval95": [interval.low, interval.high],
        "within_width": {
            str(width.bits): float(spearman(pairs[None, :, [place]])[0])
            for place, width in enumerate(found.widths)
        },
    }


def region_rows(answers: dict[str, Sensitivities], judged: Sensitivities) -> list[dict[str, Any]]:
    """Return the drop of each region at the first width, and its rank by each row, 1 costing most."""
    assert judged.counts is not None
    ranks = {name: rankdata(-table_of(found)[:, 0]) for name, found in answers.items()}
    rows_ = []
    for place, (name, counts) in enumerate(judged.counts.items()):
        first = counts[0]
        interval = paired(first.losses, first.gains, first.images)
        rows_.append(
            {
                "region": name,
                "drop": judged.losses[name][0],
                "interval95": [interval.low, interval.high],
                "ranks": {row: float(found[place]) for row, found in ranks.items()},
            }
        )
    return sorted(rows_, key=lambda row: -row["drop"])


def show(answer: dict[str, Any]) -> None:
    """Print both tables."""
    console, names = Console(width=120), [row["row"] for row in answer["rows"]]
    bits, judges = answer["bits"], answer["judge_images"]
    regions = Table("region", f"drop at {bits[0]} bits, points, 95 %", *names, title="Ranks of regions")
    for row in answer["regions"]:
        low, high = (100 * end for end in row["interval95"])
        cells = [f"{row['ranks'][name]:g}" for name in names]
        regions.add_row(row["region"], f"{100 * row['drop']:.1f} \\[{low:.1f}, {high:.1f}]", *cells)
    console.print(regions)
    title = f"Rank correlation with the drop on {judges} images, {len(answer['regions'])} regions"
    widths = (f"at {one} bits" for one in bits)
    table = Table("row", "Spearman, 95 %", *widths, "images", "forwards", "s", title=title)
    for row in answer["rows"]:
        low, high = row["interval95"]
        within = (f"{value:.3f}" for value in row["within_width"].values())
        cost = (str(row["images"]), f"{row['forwards']:.1f}", f"{row['seconds']:.1f}")
        table.add_row(row["row"], f"{row['spearman']:.3f} \\[{low:.3f}, {high:.3f}]", *within, *cost)
    console.print(table)


def own_images(card: Card) -> Path:
    """Return where the card's own images are."""
    if card.expected_data_path is None:
        raise click.UsageError(f"{card.network.name}: its card names no images; give --judge")
    return card.expected_data_path


@click.command()
@click.argument("card_path", metavar="CARD")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Images of the rows; else the judges' source.",
)
@click.option(
    "--judge", type=click.Path(exists=True, path_type=Path), help="Images that judge; else the card's."
)
@click.option("--images", default=128, show_default=True, help="How many the rows look at.")
@click.option("--judge-images", default=1000, show_default=True)
@click.option("--bits", default="2,3,4", show_default=True, help="Widths of weights.")
@click.option("--activations", default=0, show_default=True, help="Bits of what a region reads; 0: float.")
@click.option("--ranges", default="minmax", show_default=True, help="Row of `ranges` for weights.")
@click.option("--rows", "row_names", default="", help="Only these: kl,fisher,...")
@click.option("--samples", default=20, show_default=True, help="At most so many vectors of `hessian`.")
@click.option("--engine", type=click.Choice(list(TARGETS)), default="onnxruntime", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    card_path: str,
    data: Path | None,
    judge: Path | None,
    images: int,
    judge_images: int,
    bits: str,
    activations: int,
    ranges: str,
    row_names: str,
    samples: int,
    engine: str,
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """Rank the regions of CARD by each sensitivity and by their measured drop."""
    torch.set_num_threads(threads)
    card = read_card(card_path)
    judge = judge or own_images(card)
    shown = batches_of(card, data or judge, images, seed)
    judges = batches_of(card, judge, judge_images, seed, 0 if data else images)
    net, _ = run_recipe(read_recipe("float32"), load(card), image_context(None, engine))
    regions: tuple[Region, ...] = regions_of(net, target(engine))
    widths = [
        QuantSpec(bits=int(one), symmetric=True, signed=True, granularity="channel")
        for one in bits.split(",")
    ]
    names = row_names.split(",") if row_names else list(rows("sensitivity"))
    answers = {
        name: row_of(name, ranges, activations, samples).score(net, shown, regions, widths, seed)
        for name in names
    }
    judged = row_of("drop", ranges, activations, samples).score(net, judges, regions, widths, seed)
    answer = {
        "network": card.network.name,
        "bits": [width.bits for width in widths],
        "judge_images": judged.images,
        "judge_seconds": judged.seconds,
        "regions": region_rows(answers, judged),
        "rows": [summary(name, found, judged, seed) for name, found in answers.items()],
    }
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    else:
        show(answer)


if __name__ == "__main__":
    main()
