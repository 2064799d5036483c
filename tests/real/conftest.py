"""The real networks of ../shared, loaded, quantized and exported once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import load
from fewbit.load.card import Card, read_card
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import image_context, read_recipe, run_recipe

CALIBRATION = 32


@dataclass(frozen=True)
class Quantized:
    """A real network, quantized on real images and exported."""

    card: Card
    net: Net
    path: Path
    images: ImageSet


@pytest.fixture(scope="session")
def card_of(shared: Path) -> Callable[[str], Card]:
    """Return the card of a network by its name."""
    return cache(lambda name: read_card(shared / "networks" / f"{name}.toml"))


@pytest.fixture(scope="session")
def net_of(card_of: Callable[[str], Card]) -> Callable[[str], Net]:
    """Return a loaded network by its name."""
    return cache(lambda name: load(card_of(name)))


@pytest.fixture(scope="session")
def images_of(card_of: Callable[[str], Card]) -> Callable[[str, int], ImageSet]:
    """Return some images of a network's set, spread over the classes, never the ones that calibrate."""

    @cache
    def find(name: str, count: int) -> ImageSet:
        card = card_of(name)
        assert card.expected_data_path is not None
        source = open_images(card.expected_data_path, card.labels_path)
        chosen = np.linspace(0, len(source) - 1, count).astype(np.int64)
        return ImageSet(source, card.input, card.network.classes, indices=chosen)

    return find


@pytest.fixture(scope="session")
def quantized(
    net_of: Callable[[str], Net],
    card_of: Callable[[str], Card],
    images_of: Callable[[str, int], ImageSet],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Quantized]:
    """Return a network quantized by a recipe for an engine."""
    folder = tmp_path_factory.mktemp("real")

    @cache
    def find(name: str, engine: str, recipe: str = "int8") -> Quantized:
        images = images_of(name, CALIBRATION)
        made, _ = run_recipe(read_recipe(recipe), net_of(name), image_context(images, engine))
        path = folder / f"{name}-{recipe}-{engine}.onnx"
        export_onnx(made, path, target(engine) if recipe != "float32" else None)
        return Quantized(card_of(name), made, path, images)

    return find
