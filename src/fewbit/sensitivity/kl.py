"""KL sensitivity: how far the answers move when one region is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fewbit.net import Net
from fewbit.place.regions import Region
from fewbit.sensitivity.one_region import OneRegion, Walk
from fewbit.sensitivity.score import LabelledBatch, Sensitivities, Tell, ask
from fewbit.spec import QuantSpec


class KL(OneRegion):
    """How far the distribution of the answers moves when one region is rounded.

    With only region i rounded to k bits and all else in float::

        Omega_i(k) = 1/N sum over n of KL( softmax(z_n) || softmax(z_n with region i at k bits) )

    in nats. No label is needed. A shift that all logits have in common costs nothing. Each run takes what
    lies before the region from the float network's.

    Attributes:
        ranges: Row of the registry's `ranges` that finds the ranges of weights.
        activations: The grid of what the region's convolutions and matrix products read; none leaves it in
            float.
        activation_ranges: Row of `ranges` for them, from the images given.

    Source: Z. Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, 2020, arXiv 2001.00281,
        section 3.2; J. Kong et al., A KL Lens on Quantization, 2026, arXiv 2604.13440.
    Differs: regions in place of layers; what they read is rounded too where a grid is given for it; any
        images, real or distilled.

    Example:
        >>> KL(activations=QuantSpec(bits=4)).activations.bits
        4
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
        """Return the mean divergence of each region at each width; see `Sensitivity.score`."""
        question = ask("KL", net, batches, regions, widths)
        walk, sums = Walk(question, self), np.zeros((len(regions), len(widths)))
        for logits in walk.run(tell):
            sums[logits.place] += float(kl_divergence(logits.exact, logits.found).sum())
        # A sum over classes may come out below the 0 that it is by a last digit.
        return question.answer("nats", np.maximum(sums, 0) / question.images, walk.forwards)


def kl_divergence(exact: Tensor, found: Tensor) -> Tensor:
    """Return KL(P || Q) of each image, P the softmax of the exact logits and Q of those found.

    ``sum over classes of P (log P - log Q)``, in float64.

    Args:
        exact: Logits (N, classes).
        found: Logits (N, classes).

    Example:
        >>> logits = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()
        >>> [round(float(value), 6) for value in kl_divergence(logits, logits.flip(1))]
        [0.549306, 0.0]
    """
    first, second = (torch.log_softmax(logits.detach().double(), 1) for logits in (exact, found))
    return (first.exp() * (first - second)).sum(1)


def kl_sensitivities(
    net: Net,
    batches: Iterable[Tensor],
    widths: Sequence[QuantSpec],
    method: str = "minmax",
    tell: Tell | None = None,
) -> dict[str, tuple[float, ...]]:
    """Return the sensitivity of each convolution and matrix product at each width of its weights.

    It is `KL` with each of them as a region of its own.

    Args:
        net: In float, its BatchNorms folded; stays as it is.
        batches: Images (N, C, H, W) float32, real or distilled.
        widths: The grids to try.
        method: Row of the registry's `ranges` that finds their ranges.
        tell: Told the fraction done.

    Returns:
        By layer in the order in which they run, one number a width.

    Raises:
        RecipeError: The network is quantized already or not folded.
        DataError: No image came.

    Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", 2020, arXiv 2001.00281,
    section 3.2.
    """
    names = [layer.name for layer in net.layers() if isinstance(layer.module, nn.Conv2d | nn.Linear)]
    regions = [Region(name, (name,)) for name in names]
    shown: list[LabelledBatch] = [(batch, None) for batch in batches]
    return dict(KL(ranges=method).score(net, shown, regions, widths, tell=tell).losses)
