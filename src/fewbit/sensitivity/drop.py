"""The measured sensitivity: how many images more are wrong when one region is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewbit.net import Net
from fewbit.place.regions import Region
from fewbit.sensitivity.one_region import OneRegion, Walk
from fewbit.sensitivity.score import LabelledBatch, PairedCounts, Sensitivities, Tell, ask
from fewbit.spec import QuantSpec


class Drop(OneRegion):
    """How many images more are wrong when one region is rounded.

    With only region i rounded to k bits, b images that the float network has right become wrong (losses) and
    c become right (gains)::

        Omega_i(k) = (b - c) / N

    a share of the images, below 0 where more are gained. The counts b and c are in the answer: few images
    tell small drops from none only with an interval of paired counts. Labels are needed.

    Attributes:
        ranges: Row of the registry's `ranges` that finds the ranges of weights.
        activations: The grid of what the region's convolutions and matrix products read; none leaves it in
            float.
        activation_ranges: Row of `ranges` for them, from the images given.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    Differs: counts only; the interval is the caller's (`fewbit.measure.intervals.paired`).

    Example:
        >>> Drop().ranges
        'minmax'
    """

    def score(
        self,
        net: Net,
        batches: Sequence[LabelledBatch],
        regions: Sequence[Region],
        widths: Sequence[QuantSpec],
        seed: int = 0,
        tell: Tell | None = None,
    ) -> Sensitivities:
        """Return the drop of each region at each width, with its counts; see `Sensitivity.score`."""
        question = ask("Drop", net, batches, regions, widths, needs_labels=True)
        walk = Walk(question, self)
        losses, gains = (np.zeros((len(regions), len(widths)), np.int64) for _ in range(2))
        for logits in walk.run(tell):
            assert logits.labels is not None
            before, after = (is_right(z, logits.labels) for z in (logits.exact, logits.found))
            losses[logits.place] += int((before & ~after).sum())
            gains[logits.place] += int((after & ~before).sum())
        counts = {
            region.name: _counts(question.images, losses[index], gains[index])
            for index, region in enumerate(regions)
        }
        return question.answer("drop of top-1", (losses - gains) / question.images, walk.forwards, counts)


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether the label of each image has the largest logit, bool (N,).

    Of equal logits that of the lower class counts as the larger; logits that are no numbers are wrong.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, float("nan")]])
    >>> is_right(logits, torch.tensor([0, 1, 1])).tolist()
    [True, False, False]
    """
    largest = logits == logits.amax(1, keepdim=True)
    first = largest & (largest.cumsum(1) == 1)
    return first.gather(1, labels.long().unsqueeze(1)).squeeze(1)


def _counts(images: int, losses: NDArray[np.int64], gains: NDArray[np.int64]) -> tuple[PairedCounts, ...]:
    pairs = zip(losses.tolist(), gains.tolist(), strict=True)
    return tuple(PairedCounts(images=images, losses=lost, gains=gained) for lost, gained in pairs)
