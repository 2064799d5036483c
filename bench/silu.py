"""What other functions in the place of SiLU cost in accuracy: a small network of EfficientNet's kind.

    python bench/silu.py ../shared/networks/resnet20.toml ../shared/data/cifar10

Trains inverted residuals with squeeze-and-excite and SiLU on a folder's training images (a few epochs; 3 take
about 8 minutes on two cores), then quantizes the network with SiLU as it is, as a scaled GELU and as
hard-swish (`fewbit.prepare.replace_silu`), and runs all of them on OpenVINO over every test image. A drop is
paired with float32 on the same images, its interval is of 95 %. The card tells how images are preprocessed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.engines.process import EngineProcess
from fewbit.engines.session import FloatPrecision, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.load.card import Card, read_card
from fewbit.measure.accuracy import Predictions, compare
from fewbit.place.targets import target
from fewbit.recipe import Context, read_recipe, run_recipe
from fewbit.spec import Scheme, SiluForm

Floats = NDArray[np.float32]
BLOCKS = ((24, 24, 2, 3, 3), (24, 40, 1, 4, 5), (40, 64, 2, 4, 3), (64, 64, 1, 4, 5), (64, 96, 1, 4, 3))
"""Channels in and out, stride, expansion, kernel."""
PRECISIONS: tuple[FloatPrecision, ...] = ("float32", "bf16")
FORMS: tuple[SiluForm | None, ...] = (None, "gelu", "hard_swish")
BATCH, CALIBRATES, MOST_MOVED = 128, 512, 3


class Block(nn.Module):
    """An inverted residual with squeeze-and-excite."""

    def __init__(self, before: int, after: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        wide, narrow = before * expansion, max(8, before // 4)
        self.expand = nn.Sequential(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide))
        depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide))
        self.squeeze, self.excite = nn.Conv2d(wide, narrow, 1), nn.Conv2d(narrow, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after))
        self.same = before == after and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H / stride, W / stride)."""
        wide = F.silu(self.depthwise(F.silu(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(wide, 1)))))
        y: Tensor = self.project(wide * gate)
        return x + y if self.same else y


class Small(nn.Module):
    """A stem, inverted residuals, a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        first, last = BLOCKS[0][0], BLOCKS[-1][1]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first))
        self.blocks = nn.Sequential(*(Block(*block) for block in BLOCKS))
        self.head = nn.Sequential(nn.Conv2d(last, 256, 1, bias=False), nn.BatchNorm2d(256))
        self.fc = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = F.silu(self.head(self.blocks(F.silu(self.stem(x)))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def decode(card: Card, path: Path) -> tuple[Floats, NDArray[np.int64]]:
    """Return preprocessed images (N, C, H, W) and their classes."""
    source = open_images(path, None)
    with ImageSet(source, card.input, card.network.classes) as images:
        return np.concatenate(list(images.batches(1000))), np.asarray(source.targets, np.int64)


def train(card: Card, images: Floats, classes: NDArray[np.int64], epochs: int, seed: int) -> nn.Module:
    """Train with SGD, one cycle of the learning rate, shifts and flips."""
    torch.manual_seed(seed)
    net = Small(card.network.classes)
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    each = len(images) // BATCH
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=epochs * each, pct_start=0.2)
    pool, truth = torch.from_numpy(images), torch.from_numpy(classes)
    for epoch in range(epochs):
        order = torch.randperm(len(pool))
        for place in track(range(each), f"epoch {epoch + 1} of {epochs}", console=Console(stderr=True)):
            chosen = order[place * BATCH : (place + 1) * BATCH]
            sgd.zero_grad()
            F.cross_entropy(net(_moved(pool[chosen])), truth[chosen]).backward()  # type: ignore[no-untyped-call]
            sgd.step()
            cycle.step()
    return net.eval()


def _moved(images: Tensor) -> Tensor:
    down, right = torch.randint(0, 2 * MOST_MOVED + 1, (2,)).tolist()
    height, width = images.shape[2:]
    images = F.pad(images, (MOST_MOVED,) * 4)[:, :, down : down + height, right : right + width]
    flipped = images.flip(3) if torch.rand(()) < 0.5 else images
    return flipped.contiguous(memory_format=torch.channels_last)


def logits_of(
    card: Card, model: nn.Module, calibration: Tensor, images: Floats, recipe: str, form: SiluForm | None,
    precision: FloatPrecision,
) -> Floats:  # fmt: skip
    """Quantize and run on OpenVINO."""
    chosen = read_recipe(recipe)
    chosen = chosen if form is None else chosen.with_silu(form)

    def batches() -> Iterator[Tensor]:
        return iter(torch.split(calibration, 32))

    aim = target("openvino")
    net = capture(model, "small", card.input.size, card.network.classes)
    net = run_recipe(chosen, net, Context(Scheme(), aim, batches, 0))[0]
    with tempfile.TemporaryDirectory() as folder, EngineProcess("openvino") as process:
        path = Path(folder) / "net.onnx"
        export_onnx(net, path, aim if chosen.places else None)
        setting = Setting(engine="openvino", batch=100, float_precision=precision)
        session = process.open(path, setting)
        return np.concatenate([session.run(part) for part in np.split(images, len(images) // 100)])


@click.command(help=__doc__)
@click.argument("card", type=click.Path(exists=True, dir_okay=False))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(card: str, data: Path, epochs: int, seed: int) -> None:
    """Train, quantize, compare."""
    begin, console, known = time.perf_counter(), Console(), read_card(card)
    images, classes = decode(known, data / "train.tar")
    tests, truth = decode(known, data / "test.tar")
    model = train(known, images, classes, epochs, seed)
    chosen = np.random.default_rng(seed).choice(len(images), CALIBRATES, replace=False)
    calibration = torch.from_numpy(images[chosen])
    table = Table("recipe", "SiLU as", "float operators in", "top-1 %", "drop in points [95 %]")
    reference: Predictions | None = None
    for recipe in ("float32", "int8", "int8-equalized"):
        for form in FORMS:
            for precision in PRECISIONS:
                logits = logits_of(known, model, calibration, tests, recipe, form, precision)
                found = Predictions.from_logits(logits, truth)
                reference = reference or found
                seen = compare(reference, found)
                ends = seen.interval()
                told = f"{100 * seen.drop():.2f} [{100 * ends.low:.2f}, {100 * ends.high:.2f}]"
                table.add_row(recipe, form or "SiLU", precision, f"{found.top1_right.mean():.2%}", told)
    console.print(table)
    console.print(f"{len(truth)} images, {epochs} epochs, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
