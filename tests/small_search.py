"""A search that takes seconds: a tiny network, images that it labelled itself, and a process that runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    torch.manual_seed(width)
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
    """Return the network, its last layer scaled so that classes are spread and margins are narrow."""
    names: dict[str, Any] = {}
    exec(SOURCE, names)  # noqa: S102
    model: nn.Module = names["tiny"](width).eval()
    return model


def make_images(folder: Path, card: Card, images: int = 480, wrong: float = 0.1, seed: int = 0) -> Path:
    """Write images into class folders by what the network says of them, some of them put wrong."""
    from fewbit.load.capture import load

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (images, 4, 4, 3))
    noise = rng.integers(-60, 61, (images, SIDE, SIDE, 3))
    pixels = np.clip(coarse.repeat(4, 1).repeat(4, 2) + noise, 0, 255).astype(np.uint8)
    x = torch.from_numpy((pixels.astype(np.float32) / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = load(card)(x.contiguous())
    labels = (logits - logits.mean(0)).div(logits.std(0)).argmax(1).numpy()
    labels = np.where(rng.random(images) < wrong, rng.integers(0, CLASSES, images), labels)
    for name in range(CLASSES):
        (folder / f"c{name}").mkdir(parents=True, exist_ok=True)
    for place, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(picture).save(folder / f"c{label}" / f"{place:04d}.png")
    return folder


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
    """Run or go on with a search in this process, telling each finished trial; ended by `kill -9` in tests."""
    root = Path(folder)

    def tell(event: Event) -> None:
        if event.kind == "end" and event.trial is not None:
            print(event.trial.key, flush=True)

    cards = (read_card(root / "tiny.toml"),)
    more = {"out": Path(out), "objective": objective, "resume": True}
    run_study(options(root, cards, *json.loads(budgets), **more), tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
