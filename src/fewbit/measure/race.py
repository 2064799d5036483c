"""Stop evaluating a network as soon as it cannot stay inside an error budget.

Images come in one random order (`race_order`); after every chunk the race says "continue" or "hopeless". Two
rules:

1. Curtailment, exact: even if every image to come went as well as it can, the limit is passed.
2. A test that may be looked at after every image: the chance that a network which stays inside the limit on
   all images is ever called hopeless is at most `risk`.

Source: I. Waudby-Smith, A. Ramdas, "Confidence sequences for sampling without replacement", 2020, arXiv
    2006.04347,
and "Estimating means of bounded random variables by betting", 2020, arXiv 2010.09686.
Differs: the bet is a mixture over a fixed grid of fractions instead of one that adapts, and one-sided.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from fewbit.measure.accuracy import Predictions, TopK

Verdict = Literal["continue", "hopeless"]

# Shares of the largest bet that cannot go broke; few, so that the mixture costs little (ln 12 = 2.5 nats).
_BETS = np.geomspace(0.005, 0.9, 12)
_NEAR = 1e-12


def race_order(total: int, seed: int) -> NDArray[np.int64]:
    """Return the one random order of the images; a sorted order would make every early look a lie."""
    return np.random.default_rng(seed).permutation(total).astype(np.int64)


class Race:
    """One budget against one network, image by image.

    The loss of an image is 1 where the network is wrong (an error budget), or float right minus network
    right, which is -1, 0 or 1 (a drop budget). Inside the limit means: the mean loss over all images is at
    most `limit`.

    With S the losses of the images seen, the mean of those to come would be ``L = (N limit - S) / (N - t)``
    if the network were just inside; wealth grows by ``1 + bet (loss - L)`` an image, and a network inside the
    limit reaches 1 / risk with probability at most `risk` (Ville's inequality).

    Example:
        >>> wrong = Predictions(*(np.zeros(64, bool),) * 2, np.zeros(64, int))
        >>> Race.of_errors(limit=0.25, total=1000).feed(wrong)
        'hopeless'
    """

    def __init__(
        self,
        limit: float,
        k: TopK,
        lowest: NDArray[np.int64],
        reference: NDArray[np.bool_] | None,
        risk: float,
    ) -> None:
        """See `of_errors` and `of_drop`."""
        self.limit, self.k, self.risk = limit, k, risk
        self.total = len(lowest)
        self.seen = 0
        self.loss = 0
        self.verdict: Verdict = "continue"
        self.reason = ""
        self._reference = reference
        self._floor = 0 if reference is None else -1
        # best_rest[t]: the least that images t, t + 1, ... can add.
        self._best_rest = np.append(np.cumsum(lowest[::-1])[::-1], 0)
        self._log_wealth = np.zeros(len(_BETS))

    @classmethod
    def of_errors(cls, limit: float, total: int, k: TopK = 1, risk: float = 0.01) -> Self:
        """Race against "the top-k error over `total` images is at most `limit`"."""
        return cls(limit, k, np.zeros(total, np.int64), None, risk)

    @classmethod
    def of_drop(cls, limit: float, reference: Predictions, k: TopK = 1, risk: float = 0.01) -> Self:
        """Race against "the top-k drop against `reference` is at most `limit`".

        Args:
            limit: The drop allowed, a fraction.
            reference: The float network's predictions of all images, in the race's order. Only images that it
                gets wrong can be gained.
            k: 1 or 5.
            risk: Chance that a network inside the limit is called hopeless.
        """
        right = reference.right(k)
        return cls(limit, k, np.where(right, 0, -1), right, risk)

    def feed(self, chunk: Predictions) -> Verdict:
        """Take the predictions of the next images.

        Raises:
            ValueError: There are more images than the race has.
        """
        end = self.seen + len(chunk)
        if end > self.total:
            raise ValueError(f"{end} images fed to a race over {self.total}")
        right = chunk.right(self.k)
        before = (
            np.ones(len(chunk), np.bool_) if self._reference is None else self._reference[self.seen : end]
        )
        losses = before.astype(np.int64) - right
        sums = self.loss + np.cumsum(losses)
        if self.verdict == "continue" and len(chunk):
            self._judge(losses, sums)
        self.seen, self.loss = end, int(sums[-1]) if len(chunk) else self.loss
        return self.verdict

    def _judge(self, losses: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
        end = self.seen + len(losses)
        allowed = self.limit * self.total
        certain = sums + self._best_rest[self.seen + 1 : end + 1] > allowed + _NEAR * self.total
        # What the images to come would average if the network were just inside, before each image.
        to_come = self.total - np.arange(self.seen, end)
        mean = np.maximum((allowed - (sums - losses)) / to_come, self._floor + _NEAR)
        bets = _BETS[:, None] / (mean - self._floor)
        wealth = self._log_wealth[:, None] + np.cumsum(np.log1p(bets * (losses - mean)), axis=1)
        self._log_wealth = wealth[:, -1]
        top = wealth.max(axis=0)
        evidence = top + np.log(np.exp(wealth - top).mean(axis=0))
        for which, because in (
            (certain, "surely"),
            (evidence >= -math.log(self.risk), f"at {1 - self.risk:.3g} confidence"),
        ):
            if which.any():
                first = int(which.argmax())
                at = self.seen + first + 1
                what = "error" if self._reference is None else "drop"
                self.verdict = "hopeless"
                self.reason = (
                    f"top-{self.k} {what} {sums[first] / at:.4f} after {at} of {self.total} images: "
                    f"{because} above {self.limit:g}"
                )
                return
