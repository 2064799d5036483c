"""Running images through a file and ending early."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.load.card import InputSection
from fewbit.measure.accuracy import Predictions
from fewbit.search.budget import parse_budget
from fewbit.search.evaluate import evaluate, races
from fewbit.spec import ImageInput

IMAGES = 1200


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Images whose brightness is their class, of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for label in range(6):
        (folder / f"c{label}").mkdir()
    for place in range(IMAGES):
        Image.new("RGB", (4, 4), (place % 6 * 40,) * 3).save(folder / f"c{place % 6}" / f"{place}.png")
    section = InputSection(size=(3, 4, 4), mean=(0, 0, 0), std=(1, 1, 1), scale=40.0)
    whole = ImageSet(open_images(folder), section, 6)
    return whole.subset(np.random.default_rng(0).permutation(IMAGES))


class Eye:
    """Reads the class off the brightness, and errs on a share of the images."""

    def __init__(self, wrong: float, seed: int = 0) -> None:
        self.wrong, self.rng, self.seen = wrong, np.random.default_rng(seed), 0

    takes: ImageInput = "float32"

    def logits(self, batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        found = []
        for batch in batches:
            label = batch.mean((1, 2, 3)).round().astype(int)
            label = np.where(self.rng.random(len(batch)) < self.wrong, (label + 1) % 6, label)
            found.append(np.eye(6, dtype=np.float32)[label])
            self.seen += len(batch)
        return np.concatenate(found)


def test_every_image_once_in_order(images: ImageSet) -> None:
    told: list[float] = []
    found, why = evaluate(Eye(0.0), images, 7, (), told.append)
    assert why == "" and len(found) == IMAGES
    np.testing.assert_array_equal(found.label, images.targets)
    assert told == sorted(told) and told[-1] == 1.0


def test_a_hopeless_one_ends_early(images: ImageSet) -> None:
    eye, reference = Eye(0.5), evaluate(Eye(0.0), images, 32)[0]
    found, why = evaluate(eye, images, 32, races([parse_budget("top1-drop<=1%")], reference, IMAGES))
    assert "top-1 drop 0." in why and "above 0.01" in why
    assert len(found) == eye.seen < IMAGES / 4
    np.testing.assert_array_equal(found.top1_right, found.label == images.targets[: len(found)])


@pytest.mark.parametrize("budget", ["top1-drop<=10%", "top1-error<=10%", "top1>=90%"])
def test_one_inside_runs_to_the_end(images: ImageSet, budget: str) -> None:
    reference = evaluate(Eye(0.0), images, 32)[0]
    found, why = evaluate(Eye(0.03), images, 32, races([parse_budget(budget)], reference, IMAGES))
    assert (len(found), why) == (IMAGES, "")


def test_past_half_it_runs_to_the_end(images: ImageSet) -> None:
    """Right on the first 700 images, wrong after: hopeless where little is left to save."""

    class Late(Eye):
        def logits(self, batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
            self.wrong = 0.0 if self.seen < 700 else 1.0
            return super().logits(batches)

    reference = evaluate(Eye(0.0), images, 32)[0]
    against = races([parse_budget("top1-drop<=1%")], reference, IMAGES)
    found, why = evaluate(Late(0.0), images, 32, against)
    assert (len(found), why) == (IMAGES, "")
    assert against[0].verdict == "hopeless"


def test_float32_is_never_raced() -> None:
    assert races([parse_budget("top1>=99%")], None, 100) == []


def test_size_and_latency_are_not_raced() -> None:
    reference = Predictions.from_logits(np.eye(6), np.arange(6))
    budgets = [parse_budget("bytes<=1MB"), parse_budget("latency<=1ms"), parse_budget("top5-error<=17%")]
    found = races(budgets, reference, 6)
    assert [(race.k, race.limit, race.total) for race in found] == [(5, 0.17, 6)]
