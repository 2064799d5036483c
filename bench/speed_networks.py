"""The networks of `speed.py`: torchvision's with random weights, and cards."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.sample import choose_balanced
from fewbit.load.capture import capture, load
from fewbit.load.card import Card, read_card
from fewbit.load.model import build_model
from fewbit.net import Net
from fewbit.search.cost import count_cost

ZOO = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "googlenet",
    "squeezenet1_1",
    "densenet121",
    "vgg16",
)
SIZE = (3, 224, 224)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RANGE = (
    tuple(-m / s for m, s in zip(_MEAN, _STD, strict=True)),
    tuple((1 - m) / s for m, s in zip(_MEAN, _STD, strict=True)),
)
_ARGUMENTS = {"googlenet": {"aux_logits": False, "init_weights": False}}
_SETTLING = 2
_OPERATORS = ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor")
_library: torch.library.Library | None = None


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        name: As the tables call it.
        source: A name of `ZOO` or a card's path: `model_of` makes the same model of it in another process.
        net: Captured, float.
        images: (N, C, H, W), preprocessed; those that calibrate.
    """

    name: str
    source: str
    net: Net
    images: NDArray[np.float32]

    @cached_property
    def macs(self) -> int:
        """Multiplications of one image in convolutions and matrix products."""
        return count_cost(self.net).macs


def open_network(source: str, seed: int, images: int) -> Network:
    """Build and capture a network, and take its calibration images.

    Args:
        source: A name of `ZOO`, or a card's path; a card's images are its own where it names a set.
        seed: Of random weights, random images and the choice of real ones.
        images: How many calibrate.
    """
    if source in ZOO:
        net = capture(model_of(source, seed), source, SIZE)
        net.image_range = _RANGE
        return Network(source, source, net, _random(images, SIZE, seed).numpy())
    card = read_card(source)
    return Network(card.network.name, source, load(card, seed), _images_of(card, images, seed))


def model_of(source: str, seed: int) -> nn.Module:
    """Build the model of a network, in evaluation mode; same seed, same weights."""
    if source not in ZOO:
        card = read_card(source)
        return load(card, seed).graph if card.source.kind == "onnx" else build_model(card, seed)
    models = import_torchvision().models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(models, source)(**_ARGUMENTS.get(source, {}))
    return settle_norms(model, [_random(4, SIZE, seed + 1 + i) for i in range(_SETTLING)])


def settle_norms(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Set the statistics of every BatchNorm to those of some images, so that no activation explodes."""
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the plain mean over batches
    if norms:
        with torch.no_grad():
            for images in batches:
                model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def import_torchvision() -> ModuleType:
    """Import torchvision, beside a torch too that its compiled operators do not fit.

    A wheel from PyPI wants a CUDA torch for two operators of its compiled part; the models are plain Python,
    so the two are declared, as nothing here calls them.

    Raises:
        click.UsageError: It is not installed.
    """
    global _library
    try:
        try:
            return importlib.import_module("torchvision")
        except (RuntimeError, ImportError) as reason:
            if isinstance(reason, ModuleNotFoundError) and reason.name == "torchvision":
                raise
            if _library is None:
                _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
                for operator in _OPERATORS:
                    _library.define(operator)  # type: ignore[no-untyped-call]
            return importlib.import_module("torchvision")
    except ModuleNotFoundError as reason:
        raise click.UsageError(
            f"the networks {', '.join(ZOO)} are torchvision's, which cannot be imported ({reason}); "
            "pip install --no-deps 'torchvision==0.28.*', or name cards"
        ) from reason


def _random(count: int, size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn((count, *size), generator=torch.Generator().manual_seed(seed))


def _images_of(card: Card, count: int, seed: int) -> NDArray[np.float32]:
    if card.expected_data_path is None or not card.expected_data_path.exists():
        return _random(count, card.input.size, seed).numpy()
    source = open_images(card.expected_data_path, card.labels_path)
    chosen = choose_balanced(source.targets, min(count, len(source)), seed)
    with ImageSet(source, card.input, card.network.classes, indices=chosen) as images:
        return np.concatenate([batch.astype(np.float32) for batch in images.batches(8)])
