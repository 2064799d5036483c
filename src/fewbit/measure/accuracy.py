"""How often a network is right, how sure that is, and how it differs from another on the same images.

Accuracies and drops are fractions. Two networks that saw the same images are always compared in pairs: at
10,000 images and 83 % that is three to four times sharper than comparing two separate accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.errors import DataError
from fewbit.measure.intervals import (
    Interval,
    mcnemar,
    newcombe,
    paired,
    paired_bound,
    paired_error,
    wilson,
    z_value,
)
from fewbit.spec import Frozen

__all__ = [
    "Accuracy",
    "Comparison",
    "Interval",
    "Predictions",
    "TopK",
    "compare",
    "images_to_detect",
    "images_to_prove_drop",
    "images_to_prove_error",
]

TopK = Literal[1, 5]
_ROWS = 4096
_MOST_IMAGES = 10**9


class Accuracy(Frozen):
    """Counts of right answers.

    Attributes:
        top1_correct: Images whose most likely class is the label.
        top5_correct: Images whose label is among the five most likely classes.
        total: Images.
    """

    top1_correct: int
    top5_correct: int
    total: int

    @property
    def top1(self) -> float:
        """Share of images with the right class first."""
        return self.correct(1) / self.total if self.total else 0.0

    @property
    def top5(self) -> float:
        """Share of images with the right class among the first five."""
        return self.correct(5) / self.total if self.total else 0.0

    def correct(self, k: int = 1) -> int:
        """Return the count of right answers for k = 1 or 5."""
        return self.top1_correct if _is_first(k) else self.top5_correct

    def interval(self, k: int = 1, confidence: float = 0.95) -> Interval:
        """Return Wilson's two-sided interval of the accuracy on images like these.

        >>> round(Accuracy(top1_correct=38380, top5_correct=45000, total=50000).interval().low, 7)
        0.7638774
        """
        return wilson(self.correct(k), self.total, confidence)

    def error_bound(self, k: int = 1, confidence: float = 0.95) -> float:
        """Return the one-sided upper Wilson bound of the error (1 - accuracy)."""
        return wilson(self.total - self.correct(k), self.total, confidence, sides=1).high

    def versus(self, other: Accuracy, k: int = 1, confidence: float = 0.95) -> Interval:
        """Return the interval of (this accuracy - the other), as if of independent images (Newcombe).

        For networks measured on different images. On the same images use `compare`, which is far sharper.
        """
        return newcombe(self.correct(k), self.total, other.correct(k), other.total, confidence)


def _is_first(k: int) -> bool:
    if k not in (1, 5):
        raise ValueError(f"k is {k}: accuracy is counted for k = 1 and k = 5")
    return k == 1


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network said about images, in their order.

    Attributes:
        top1_right: bool (N,), the label is the most likely class.
        top5_right: bool (N,), the label is among the five most likely.
        label: int (N,), the class predicted; -1 where the logits are not numbers.
    """

    top1_right: NDArray[np.bool_]
    top5_right: NDArray[np.bool_]
    label: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, images: slice | NDArray[np.integer]) -> Predictions:
        """Return a part of the images."""
        return Predictions(self.top1_right[images], self.top5_right[images], self.label[images])

    @classmethod
    def from_logits(cls, logits: ArrayLike, targets: ArrayLike) -> Self:
        """Judge logits.

        Of equal logits the lower class counts as the more likely one, so the result does not hang on a sort.
        A row with a NaN is wrong.

        Args:
            logits: (N, classes).
            targets: The right classes, integers (N,).

        Raises:
            DataError: The shapes do not fit, or a target is not a class.
        """
        scores, right = np.asarray(logits), np.asarray(targets)
        if scores.ndim != 2 or right.shape != scores.shape[:1]:
            raise DataError(
                f"logits {scores.shape} and targets {right.shape} do not fit; give (N, classes) and (N,)"
            )
        if right.size and (right.min() < 0 or right.max() >= scores.shape[1]):
            raise DataError(
                f"targets go from {right.min()} to {right.max()}, the network has classes 0 to "
                f"{scores.shape[1] - 1}; check its card's classes and labels"
            )
        rank = np.empty(len(right), np.int64)
        label = np.empty(len(right), np.int64)
        for start in range(0, len(right), _ROWS):
            part = slice(start, start + _ROWS)
            rank[part], label[part] = _ranks(scores[part], right[part])
        return cls(rank < 1, rank < 5, label)

    @classmethod
    def concat(cls, parts: Sequence[Predictions]) -> Self:
        """Join parts in their order."""
        if not parts:
            return cls(np.zeros(0, np.bool_), np.zeros(0, np.bool_), np.zeros(0, np.int64))
        return cls(
            np.concatenate([p.top1_right for p in parts]),
            np.concatenate([p.top5_right for p in parts]),
            np.concatenate([p.label for p in parts]),
        )

    def right(self, k: int = 1) -> NDArray[np.bool_]:
        """Return which images are right for k = 1 or 5."""
        return self.top1_right if _is_first(k) else self.top5_right

    def accuracy(self) -> Accuracy:
        """Count."""
        return Accuracy(
            top1_correct=int(self.top1_right.sum()), top5_correct=int(self.top5_right.sum()), total=len(self)
        )


def _ranks(
    scores: NDArray[np.floating], right: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    own = np.take_along_axis(scores, right[:, None], axis=1)
    classes = np.arange(scores.shape[1])
    before = (scores > own) | ((scores == own) & (classes < right[:, None]))
    broken = np.isnan(scores).any(axis=1)
    rank = np.where(broken, scores.shape[1] + 5, before.sum(axis=1))
    return rank, np.where(broken, -1, scores.argmax(axis=1))


class Comparison(Frozen):
    """Two networks on the same images: the float one and another.

    Attributes:
        total: Images.
        losses: The float network's first class is right, the other's is wrong.
        gains: The other way round.
        label_changes: The class predicted differs (losses, gains, and images that both get wrong
            differently).
        losses5, gains5: Losses and gains of the five most likely classes.
    """

    total: int
    losses: int
    gains: int
    label_changes: int
    losses5: int
    gains5: int

    @property
    def top1_drop(self) -> float:
        """Accuracy lost: (losses - gains) / total; negative where the other network is better."""
        return self.drop(1)

    @property
    def top5_drop(self) -> float:
        """Top-5 accuracy lost."""
        return self.drop(5)

    @property
    def flips(self) -> float:
        """Share of images whose predicted class changed: it tells a change even where the drop is none."""
        return self.label_changes / self.total if self.total else 0.0

    def pairs(self, k: int = 1) -> tuple[int, int]:
        """Return (losses, gains) for k = 1 or 5."""
        return (self.losses, self.gains) if _is_first(k) else (self.losses5, self.gains5)

    def drop(self, k: int = 1) -> float:
        """Return (losses - gains) / total."""
        losses, gains = self.pairs(k)
        return (losses - gains) / self.total if self.total else 0.0

    def standard_error(self, k: int = 1) -> float:
        """Return the standard error of the drop."""
        return paired_error(*self.pairs(k), self.total) if self.total else 0.0

    def interval(self, k: int = 1, confidence: float = 0.95) -> Interval:
        """Return the two-sided interval of the drop on images like these.

        The paired normal interval; with fewer than 25 discordant pairs Tango's score interval, which has a
        width even where no prediction changed.

        Example:
            >>> seen = Comparison(total=10000, losses=150, gains=100, label_changes=400, losses5=0, gains5=0)
            >>> round(seen.interval().low, 7), round(seen.interval().high, 7)
            (0.0019026, 0.0080974)
        """
        if not self.total:
            return Interval(low=-1.0, high=1.0)
        return paired(*self.pairs(k), self.total, confidence)

    def bound(self, k: int = 1, confidence: float = 0.95) -> float:
        """Return the one-sided upper bound of the drop: a drop below m is proven where this is below m."""
        return paired_bound(*self.pairs(k), self.total, confidence) if self.total else 1.0

    def p_value(self, k: int = 1, mid_p: bool = False) -> float:
        """Return the exact two-sided McNemar p of "no drop"; a large one proves nothing, `bound` does."""
        return mcnemar(*self.pairs(k), mid_p=mid_p)

    def images_to_prove(self, limit: float, k: int = 1, confidence: float = 0.95) -> int | None:
        """Return how many images would prove a drop below `limit` if it stays what it is; none if outside."""
        if not self.total:
            return None
        losses, gains = self.pairs(k)
        return images_to_prove_drop(self.drop(k), (losses + gains) / self.total, limit, confidence)


def compare(reference: Predictions, other: Predictions) -> Comparison:
    """Compare two networks on the same images in the same order.

    Args:
        reference: The float network's.
        other: The quantized network's.

    Raises:
        DataError: They are not of the same number of images.
    """
    if len(reference) != len(other):
        raise DataError(
            f"predictions of {len(reference)} and of {len(other)} images cannot be paired; "
            "run both on the same images"
        )
    return Comparison(
        total=len(reference),
        losses=int((reference.top1_right & ~other.top1_right).sum()),
        gains=int((other.top1_right & ~reference.top1_right).sum()),
        label_changes=int((reference.label != other.label).sum()),
        losses5=int((reference.top5_right & ~other.top5_right).sum()),
        gains5=int((other.top5_right & ~reference.top5_right).sum()),
    )


def images_to_prove_error(error: float, limit: float, confidence: float = 0.95) -> int | None:
    """Images after which the one-sided Wilson bound of an error is below a limit; none if it is outside.

    Example:
        >>> images_to_prove_error(0.166, 0.17)
        23860
    """
    return _first_total(lambda n: wilson(error * n, n, confidence, sides=1).high < limit, error < limit)


def images_to_prove_drop(
    drop: float, discordant: float, limit: float, confidence: float = 0.95
) -> int | None:
    """Images after which the one-sided bound of a paired drop is below a limit; none where it is not inside.

    Args:
        drop: The true drop, a fraction.
        discordant: Share of images that one network gets right and the other wrong.
        limit: The drop allowed.
        confidence: Of the bound.

    Example:
        >>> images_to_prove_drop(0.0, 0.02, 0.01)
        649
    """
    losses, gains = (discordant + drop) / 2, (discordant - drop) / 2
    return _first_total(lambda n: paired_bound(losses * n, gains * n, n, confidence) < limit, drop < limit)


def _first_total(proven: Callable[[int], bool], inside: bool) -> int | None:
    """Return the least number of images for which `proven` holds, by doubling and bisection."""
    high = 1
    while inside and high < _MOST_IMAGES and not proven(high):
        high *= 2
    if not inside or high >= _MOST_IMAGES:
        return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proven(middle) else (middle, high)
    return high


def images_to_detect(drop: float, discordant: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """About how many images it takes that a paired test finds a true drop with probability `power`.

    ``n = ((z sqrt(D) + z_power sqrt(D - d^2)) / d)^2``, z two-sided at `confidence`.

    Example:
        >>> images_to_detect(0.005, 0.02)
        6276
    """
    z, z_power = z_value(confidence), z_value(power, sides=1)
    return math.floor(((z * math.sqrt(discordant) + z_power * math.sqrt(discordant - drop**2)) / drop) ** 2)
