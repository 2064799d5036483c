"""A search that takes seconds: a tiny network, images that it labelled itself, and a process that runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fewbit.load.card import Card, read_card
from fewbit.search.budget import parse_budget
from fewbit.search.options import StudyOptions
from fewbit.search.study import run_study
from fewbit.search.watch import Event

SIDE = 16
CLASSES = 6

SOURCE = """
from torch import nn

def tiny(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 6),
    )
"""


def make_card(folder: Path, name: str = "tiny", width: int = 8) -> Card:
    """Write a network with random weights, its file and its card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.py").write_text(SOURCE)
    model = build(width)
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    card = folder / f"{name}.toml"
    card.write_text(
        f'[network]\nname = "{name}"\nsource = "tiny.py:tiny"\narguments = {{ width = {width} }}\n'
        f'weights = "{name}.safetensors"\nclasses = {CLASSES}\n\n'
        f"[input]\nsize = [3, {SIDE}, {SIDE}]\nmean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]\n"
    )
    return read_card(card)


def build(width: int) -> nn.Module:
    """Return the network with random weights; each class is its answer about as often."""
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    torch.manual_seed(width)
    model: nn.Sequential = names["tiny"](width).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(_input(_pixels(400, seed=99))))
        last = model[-1]
        assert isinstance(last, nn.Linear)
        last.weight /= logits.std(0)[:, None]
        last.bias.copy_((last.bias - logits.mean(0)) / logits.std(0))
    return model


def make_images(folder: Path, width: int = 8, images: int = 480, wrong: float = 0.1, seed: int = 0) -> Path:
    """Write images into class folders by what the network says of them, some of them put wrong."""
    pixels, rng = _pixels(images, seed), np.random.default_rng(seed)
    with torch.no_grad():
        labels = build(width)(torch.from_numpy(_input(pixels))).argmax(1).numpy()
    labels = np.where(rng.random(images) < wrong, rng.integers(0, CLASSES, images), labels)
    for name in range(CLASSES):
        (folder / f"c{name}").mkdir(parents=True, exist_ok=True)
    for place, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(picture).save(folder / f"c{label}" / f"{place:04d}.png")
    return folder


def _pixels(images: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (images, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    noise = rng.integers(-60, 61, (images, SIDE, SIDE, 3))
    pixels: NDArray[np.uint8] = np.clip(coarse + noise, 0, 255).astype(np.uint8)
    return pixels


def _input(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    scaled = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def options(folder: Path, cards: tuple[Card, ...], *budgets: str, **more: Any) -> StudyOptions:
    """Return the options of a search over `folder/images` into `folder/out`."""
    given: dict[str, Any] = {
        "data": folder / "images",
        "out": folder / "out",
        "budgets": tuple(parse_budget(text) for text in budgets),
        "batches": (1, 8),
        "threads": 2,
        "calibration_images": 48,
        "pace": 0.03,
    }
    return StudyOptions(cards=cards, **(given | more))


def main(folder: str, out: str, budgets: str, objective: str) -> None:
    """Run a search or go on with it, telling each finished trial; tests end it by `kill -9`."""
    root = Path(folder)

    def tell(event: Event) -> None:
        if event.kind == "end" and event.trial is not None:
            print(event.trial.key, flush=True)

    cards = (read_card(root / "tiny.toml"),)
    more = {"out": Path(out), "objective": objective, "resume": True}
    run_study(options(root, cards, *json.loads(budgets), **more), tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
