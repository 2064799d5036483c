"""What the tests of the doctor share: the trained demo network with its images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fewbit.data.demo import demo_cards, make_images
from fewbit.data.preprocess import normalize
from fewbit.doctor.diagnose import Images
from fewbit.doctor.sample import Sample
from fewbit.load.capture import load
from fewbit.load.card import InputSection, read_card
from fewbit.net import Net


@dataclass(frozen=True)
class Demo:
    """A trained network, its pixels and labels."""

    net: Net
    section: InputSection
    pixels: np.ndarray
    targets: np.ndarray

    def images(self, section: InputSection | None = None, calibration: int = 48) -> Images:
        """Return its images as a section prepares them, some to calibrate and the others to judge."""
        chosen = section or self.section
        pixels = self.pixels[..., ::-1] if chosen.channels == "bgr" else self.pixels
        whole = Sample.of_tensor(torch.from_numpy(normalize(pixels, chosen)), self.targets)
        places = np.arange(len(self.targets))
        return Images(whole.subset(places[:calibration]), whole.subset(places[calibration:]))


@pytest.fixture(scope="session")
def demo() -> Demo:
    """The residual network on 112 images."""
    return trained(0)


@pytest.fixture(scope="session")
def demo_depthwise() -> Demo:
    """The depthwise network on 112 images."""
    return trained(1)


def trained(which: int) -> Demo:
    card = read_card(demo_cards()[which])
    pixels, targets = make_images("test", 112)
    order = np.random.default_rng(0).permutation(112)
    return Demo(load(card), card.input, pixels[order], targets[order])
