"""The judge: how a network does on a sample, beside the float network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.doctor.decibels import divergence, ratio_db
from fewbit.doctor.records import Quality
from fewbit.doctor.sample import Sample
from fewbit.errors import DataError
from fewbit.measure.accuracy import Comparison, Predictions, compare

Network = Callable[[Tensor], Tensor]

_HARM_FALLS = 0.9
_CONFIDENCE = 0.95


class Verdict:
    """What a network said about the sample: its quality, and image by image.

    Attributes:
        quality: Beside the float network.
        predictions: In the images' order.
    """

    def __init__(self, quality: Quality, predictions: Predictions) -> None:
        self.quality, self.predictions = quality, predictions


class Judge:
    """Judges networks on one sample; the float network's logits are computed once.

    Args:
        exact: The float network.
        sample: Images that calibrate nothing.

    Raises:
        DataError: There is no image.

    Attributes:
        sample: The same.
        exact: What the float network said.
    """

    def __init__(self, exact: Network, sample: Sample) -> None:
        if not len(sample):
            raise DataError("doctor: no image is left to judge with; give at least two")
        self.sample = sample
        self._logits = run(exact, sample)
        self.exact = self.judge_logits(self._logits)

    def judge(self, network: Network) -> Verdict:
        """Run a network on the sample."""
        return self.judge_logits(run(network, self.sample))

    def judge_logits(self, logits: Tensor) -> Verdict:
        """Judge logits (N, classes) of the sample's images."""
        predictions = Predictions.from_logits(logits.numpy(), self.sample.targets)
        labels: NDArray[np.int64] = self._logits.argmax(1).numpy()
        signal, noise = self._logits.double(), (logits - self._logits).double()
        quality = Quality(
            accuracy=predictions.accuracy(),
            agreement=float((predictions.label == labels).mean()),
            kl=max(0.0, divergence(self._logits, logits) / len(logits)),
            sqnr_db=ratio_db(float(signal.square().sum()), float(noise.square().sum())),
        )
        return Verdict(quality, predictions)


def run(network: Network, sample: Sample) -> Tensor:
    """Return the logits (N, classes) of a sample."""
    with torch.no_grad():
        return torch.cat([network(batch) for batch in sample.batches()])


def helps(before: Quality, after: Quality, versus: Comparison) -> bool:
    """Tell whether a remedy helps.

    It does where the divergence from the float network falls by a tenth or more and the accuracy is not
    proven to fall.

    Args:
        before: Without it.
        after: With it.
        versus: Right answers with it against without it.
    """
    if before.kl is None or after.kl is None:
        return False
    return after.kl <= _HARM_FALLS * before.kl and versus.interval(confidence=_CONFIDENCE).low <= 0


def versus(before: Verdict, after: Verdict) -> Comparison:
    """Compare two verdicts on the same images; a negative drop is a gain."""
    return compare(before.predictions, after.predictions)
