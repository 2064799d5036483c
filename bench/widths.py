"""Bit-widths of a network's weights: what every search finds inside the same bytes, measured on images.

    python bench/widths.py ../shared/networks/resnet20.toml --calibration ../shared/data/cifar10/train.tar

Each convolution and matrix product gets 2, 3, 4, 6 or 8 bits a weight (symmetric, a scale a channel, range of
least squared error); activations stay in float. The searches of the registry choose by the KL sensitivities
of the layers. "network" is the differentiable search by the loss of the mixed network itself, against the
float network's answers ("network KL") or the labels ("network CE"). "uniform" has the same width everywhere,
and its bytes are the limit. "predicted" is the sum of the sensitivities, "KL" what the network with all these
widths has on the images that are evaluated; the drop of top-1 is paired with float32 on the same images.
Seconds are those of the search alone; those of the sensitivities stand in the title.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.sample import choose_balanced
from fewbit.load.capture import load
from fewbit.load.card import Card, read_card
from fewbit.measure.accuracy import Predictions, compare
from fewbit.net import Net
from fewbit.ranges.weights import rounded
from fewbit.recipe import image_context, read_recipe, run_recipe
from fewbit.registry import find, rows
from fewbit.search.mixed.differentiable import Differentiable
from fewbit.search.mixed.problem import Assignment, evaluate
from fewbit.search.mixed.widths import width_problem
from fewbit.sensitivity.kl import kl_divergence, kl_sensitivities
from fewbit.spec import QuantSpec

WIDTHS = (2, 3, 4, 6, 8)
SPECS = {b: QuantSpec(bits=b, symmetric=True, signed=True, granularity="channel") for b in WIDTHS}
GRIDS: dict[str, QuantSpec | None] = {f"w{bits}": spec for bits, spec in SPECS.items()}
METHOD = "mse"
Row = dict[str, Any]
Search = Callable[[dict[str, float]], Assignment | None]


class Subject:
    """One float network with the images that it is searched and evaluated with."""

    def __init__(
        self, card: Card, calibration: Path, images: int, evaluated: int, batch: int, seed: int
    ) -> None:
        assert card.expected_data_path is not None
        self.net, _ = run_recipe(read_recipe("float32"), load(card), image_context(None, "onnxruntime"))
        shown = _choose(card, calibration, images, seed)
        images_of = [torch.from_numpy(pixels.copy()) for pixels in shown.batches(batch)]
        labels = torch.split(torch.from_numpy(np.asarray(shown.targets, np.int64)), batch)
        self.batches = list(zip(images_of, labels, strict=True))
        self.held = _choose(card, card.expected_data_path, evaluated, seed)
        self.seed, self.batch = seed, batch
        self.exact = self.logits(self.net)
        start = time.perf_counter()
        found = kl_sensitivities(self.net, images_of, list(SPECS.values()), METHOD)
        self.sensitivity_s = time.perf_counter() - start
        losses = {name: dict(zip(WIDTHS, row, strict=True)) for name, row in found.items()}
        self.problem = width_problem(losses, {name: _weight(self.net, name).numel() for name in losses})

    def logits(self, net: Net) -> Tensor:
        """Return the answers (N, classes) on the images that are evaluated."""
        with torch.no_grad():
            return torch.cat(
                [net(torch.from_numpy(pixels.copy())) for pixels in self.held.batches(self.batch)]
            )

    def measure(self, found: Assignment) -> Row:
        """Give the network the widths and evaluate it."""
        net = self.net.clone()
        for name, option in found.options.items():
            spec = GRIDS[option]
            assert spec is not None
            weight = _weight(net, name)
            weight.data = rounded(weight.data, spec, METHOD, name)
        logits = self.logits(net)
        exact, got = (Predictions.from_logits(z.numpy(), self.held.targets) for z in (self.exact, logits))
        versus = compare(exact, got)
        return {
            "bytes": found.costs["bytes"],
            "predicted": found.loss,
            "kl": float(kl_divergence(self.exact, logits).mean()),
            "top1": got.accuracy().top1,
            "drop": versus.drop(1),
            "drop_interval95": list(versus.interval(1, 0.95).model_dump().values()),
            "widths": "".join(option[1:] for option in found.options.values()),
        }


def _choose(card: Card, path: Path, images: int, seed: int) -> ImageSet:
    source = open_images(path, card.labels_path)
    chosen = choose_balanced(source.targets, min(images, len(source)), seed)
    return ImageSet(source, card.input, card.network.classes, indices=chosen)


def _weight(net: Net, name: str) -> Tensor:
    module = net.layer(name).module
    assert isinstance(module, nn.Conv2d | nn.Linear)
    return module.weight


def searches(subject: Subject, steps: int, only: Sequence[str]) -> dict[str, Search]:
    """Return what finds an assignment inside limits, by name."""
    found: dict[str, Search] = {
        name: partial(find("search", name)().search, subject.problem, seed=subject.seed)
        for name in rows("search")
    }
    learn = Differentiable(steps=steps).search_network
    for name, labelled in (("network KL", False), ("network CE", True)):
        batches = [(images, labels if labelled else None) for images, labels in subject.batches]
        given = (subject.net, batches, GRIDS, subject.problem)
        found[name] = partial(learn, *given, seed=subject.seed, method=METHOD)
    return {name: search for name, search in found.items() if not only or name in only}


def measure_limit(subject: Subject, bits: int, steps: int, only: Sequence[str]) -> list[Row]:
    """Return a row for the uniform width and for each search inside its bytes."""
    problem = subject.problem
    uniform = evaluate(problem, {region.name: f"w{bits}" for region in problem.regions})
    found = [{"limit": f"w{bits}", "row": "uniform", "seconds": 0.0, **subject.measure(uniform)}]
    for name, search in searches(subject, steps, only).items():
        start = time.perf_counter()
        answer = search({"bytes": uniform.costs["bytes"]})
        seconds = time.perf_counter() - start
        assert answer is not None
        found.append({"limit": f"w{bits}", "row": name, "seconds": seconds, **subject.measure(answer)})
    return found


def show(found: list[Row], title: str) -> None:
    """Print the table."""
    heads = ("limit", "search", "bytes", "s", "predicted", "KL", "top-1 %", "drop in points, 95 %", "widths")
    table = Table(*heads, title=title)
    for row in found:
        low, high = row["drop_interval95"]
        table.add_row(
            row["limit"],
            row["row"],
            f"{row['bytes']:,.0f}",
            f"{row['seconds']:.2f}",
            f"{row['predicted']:.4f}",
            f"{row['kl']:.4f}",
            f"{100 * row['top1']:.2f}",
            f"{100 * row['drop']:.2f} [{100 * low:.2f}, {100 * high:.2f}]",
            row["widths"],
        )
    Console(width=170).print(table)


@click.command()
@click.argument("card", type=click.Path(exists=True, path_type=Path))
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--calibration-images", default=256, show_default=True, help="Searched with.")
@click.option("--images", default=2000, show_default=True, help="Of the card's own, evaluated with.")
@click.option("--limits", default="3,4", show_default=True, help="Uniform widths whose bytes are limits.")
@click.option("--steps", default=300, show_default=True, help="Of the search by the network's loss.")
@click.option("--batch", default=64, show_default=True)
@click.option("--rows", "only", default="", help="Only these: greedy,network KL,...")
@click.option("--threads", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def main(card: Path, calibration: Path, limits: str, as_json: bool, **options: Any) -> None:
    """Measure the searches over bit-widths on one network."""
    torch.set_num_threads(options["threads"])
    counts = options["calibration_images"], options["images"], options["batch"], options["seed"]
    subject = Subject(read_card(card), calibration, *counts)
    only = [name for name in options["only"].split(",") if name]
    found = [
        row for bits in limits.split(",") for row in measure_limit(subject, int(bits), options["steps"], only)
    ]
    if as_json:
        click.echo(json.dumps({"sensitivity_s": subject.sensitivity_s, "rows": found}, indent=1))
    else:
        show(
            found,
            f"{subject.net.name}: {len(subject.held)} images; sensitivities {subject.sensitivity_s:.0f} s",
        )


if __name__ == "__main__":
    main()
