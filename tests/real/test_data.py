"""Cards and images of ../shared: counts, labels, digests, and pixels."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.sample import choose_balanced, split
from fewbit.load.card import Card, read_card

CARDS = (
    "fdmobilenet_025",
    "googlenet",
    "mobilenet_v1_025",
    "mobilenet_v2",
    "resnet20",
    "resnet56",
    "squeezenet_v11",
)
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize("name", CARDS)
def test_every_real_card(name: str, shared: Path) -> None:
    card = read_card(shared / "networks" / f"{name}.toml")
    assert card.network.name == name and card.source.kind == "file"
    assert card.source.path is not None and card.source.path.parent == shared / "networks"
    assert card.weights_path is not None and card.weights_path.is_file()
    assert (
        card.expected is not None
        and card.expected_data_path is not None
        and card.expected_data_path.is_file()
    )
    assert Card.from_toml(card.to_toml()).placed_in(card.folder) == card
    source = open_images(card.expected_data_path, card.labels_path, classes=card.network.classes)
    assert len(source) == card.expected.images


def test_no_real_card_is_left_out(shared: Path) -> None:
    assert tuple(sorted(path.stem for path in (shared / "networks").glob("*.toml"))) == CARDS


@pytest.mark.parametrize(("name", "each"), [("test", 1000), ("train", 5000)])
def test_cifar_classes(name: str, each: int, shared: Path) -> None:
    source = open_images(shared / "data" / "cifar10" / f"{name}.tar", classes=10)
    assert source.folders == CIFAR and np.bincount(source.targets).tolist() == [each] * 10
    assert source.names == sorted(source.names)


def test_cifar_is_decoded_whole(shared: Path) -> None:
    card = read_card(shared / "networks" / "resnet20.toml")
    path = shared / "data" / "cifar10" / "test.tar"
    with ImageSet(open_images(path), card.input, 10) as images:
        batches = list(images.batches(256))
        assert len(images) == 10000 and images.skipped == ()
        assert images.digest == "583241089f78", "the same on every host"
    pixels = np.concatenate(batches)
    with tarfile.open(path) as tar:
        for place in (0, 4321, 9999):
            member = tar.extractfile(images.names[place])
            assert member is not None
            image = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB"), np.float64)
            want = (image / 255.0 - card.input.mean) / card.input.std
            assert np.abs(pixels[place].transpose(1, 2, 0) - want).max() < 1e-6
    assert np.abs(pixels.mean((0, 2, 3))).max() < 0.2 and np.abs(pixels.std((0, 2, 3)) - 1.1).max() < 0.2


def test_imagenet_labels_and_crop(shared: Path) -> None:
    card = read_card(shared / "networks" / "squeezenet_v11.toml")
    assert card.labels_path is not None
    known = json.loads(card.labels_path.read_text())
    source = open_images(shared / "data" / "imagenet" / "images.tar", card.labels_path, classes=1000)
    assert [known[name.split("/")[0]] for name in source.names] == source.targets.tolist()
    assert len(set(source.targets.tolist())) == len(source) == 600
    chosen = choose_balanced(source.targets, 40, seed=0)
    with ImageSet(source, card.input, 1000, indices=chosen) as images:
        batch = next(images.batches(40))
        assert batch.shape == (40, 3, 224, 224) and images.digest == "85610858586e"
        assert images.targets.tolist() == source.targets[chosen].tolist()
        image = np.asarray(Image.open(io.BytesIO(source.read(int(chosen[7])))).convert("RGB"), np.float32)
        want = (image[16:240, 16:240] - np.array(card.input.mean, np.float32)).transpose(2, 0, 1)
        assert (batch[7] == want).all()


def test_imagenet_splits_by_class(shared: Path) -> None:
    source = open_images(
        shared / "data" / "imagenet" / "images.tar",
        shared / "data" / "imagenet" / "labels.json",
        classes=1000,
    )
    parts = split(source.targets, calibration=100, holdout_fraction=0.2, seed=0)
    assert [len(part) for part in (parts.calibration, parts.search, parts.holdout)] == [100, 400, 100]
    together = np.concatenate([parts.calibration, parts.search, parts.holdout])
    assert sorted(together.tolist()) == list(range(600))
