"""Running a file over the search images, and ending as soon as it cannot stay inside a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fewbit.clock import each_timed
from fewbit.data.image_set import ImageSet
from fewbit.engines.session import Images
from fewbit.measure.accuracy import Predictions
from fewbit.measure.race import Race
from fewbit.search.budget import Budget
from fewbit.spec import ImageInput

_RISK = 0.01
_LOOKS = 16


class Runner(Protocol):
    """What answers with logits: `fewbit.engines.process.RemoteSession` is one."""

    @property
    def takes(self) -> ImageInput:
        """What the file's input is."""
        ...

    def logits(self, batches: Iterable[Images]) -> NDArray[np.float32]:
        """Return logits (N, classes) of batches of images."""
        ...


def races(budgets: Sequence[Budget], reference: Predictions | None, images: int) -> list[Race]:
    """Return one race for each budget of accuracy.

    Args:
        budgets: What has to hold.
        reference: What float32 predicted on the same images in the same order; none for float32 itself,
            which is never dropped.
        images: How many there are.
    """
    if reference is None:
        return []
    found = []
    for budget in budgets:
        if budget.of_drop:
            found.append(Race.of_drop(budget.limit, reference, 5 if budget.k == 5 else 1, _RISK))
        elif budget.of_accuracy:
            limit = 1 - budget.limit if budget.larger_is_better else budget.limit
            found.append(Race.of_errors(limit, images, 5 if budget.k == 5 else 1, _RISK))
    return found


def batches_for(runner: Runner, images: ImageSet, batch: int) -> Iterator[Images]:
    """Return images in batches of the type that a file takes."""
    made: Iterator[Images] = images.pixels(batch) if runner.takes == "uint8" else images.batches(batch)
    return each_timed(made, "preprocess")


def evaluate(
    runner: Runner,
    images: ImageSet,
    batch: int,
    against: Sequence[Race] = (),
    advance: Callable[[float], None] | None = None,
) -> tuple[Predictions, str]:
    """Predict images in their order, until the end or until a race is hopeless.

    There are about 16 looks at the races; past half of the images a hopeless race is run to its end, since
    the full figure is worth more than what is left to save.

    Args:
        runner: The opened file.
        images: In random order (`fewbit.data.sample.split` shuffles), or an early end would mean nothing.
        batch: Images handed over at once.
        against: Races that every chunk is fed to.
        advance: Told the fraction done.

    Returns:
        The predictions of the images that were run, and why it ended early; empty where it did not.
    """
    targets, parts, done = images.targets, list[Predictions](), 0
    batches, at_once = batches_for(runner, images, batch), max(1, len(targets) // (_LOOKS * batch))
    while done < len(targets):
        logits = runner.logits(islice(batches, at_once))
        parts.append(Predictions.from_logits(logits, targets[done : done + len(logits)]))
        done += len(logits)
        if advance is not None:
            advance(done / len(targets))
        hopeless = [race.reason for race in against if race.feed(parts[-1]) == "hopeless"]
        if hopeless and 2 * done < len(targets):
            return Predictions.concat(parts), hopeless[0]
    return Predictions.concat(parts), ""
