"""Hessian sensitivity: the mean trace of the loss's second derivatives, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fewbit.net import Net
from fewbit.place.regions import Region
from fewbit.sensitivity.curvature import UNIT, curvature_losses, drawn_labels, own_weights
from fewbit.sensitivity.score import LabelledBatch, Question, Sensitivities, Tell, ask
from fewbit.spec import Frozen, QuantSpec

_RUNS = 1 + 2 + 6
_FEWEST = 10


class Hessian(Frozen):
    """The mean curvature of the loss in a region's weights times the square of their rounding error.

    With H_i the second derivatives of the float network's cross-entropy in the n_i weights W_i of layer i::

        Omega_i(k) = |Tr H_i| / n_i  ||Q_k(W_i) - W_i||^2        Tr H_i = E[ v^T H_i v ],   v_j = +1 or -1

    summed over the region's layers. It is twice the loss that a second-order expansion expects where the
    rounding errors have no preferred direction; so its unit is half a nat. H v is the gradient of
    ``(dL/dW) . v``; all layers are done at once with vectors of their own, for which the products between
    layers have the mean 0. Samples are drawn until one more moves the traces, taken together, by less than
    `tolerance`, but at least 10. A single layer's trace is much less sure than all together: with 15 vectors
    and 64 images, two seeds differ by a factor of 1.5 or more in 8 to 12 of ResNet-20's 20 layers; those of
    `fisher` with one label an image, which takes 3 runs of the network in place of 135, in 1 to 3.

    Attributes:
        samples: At most so many vectors.
        tolerance: ``sum_i |change of Tr H_i| / sum_i |Tr H_i|`` at which to stop.
        ranges: Row of the registry's `ranges` that finds the ranges of weights.

    Source: Z. Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, 2019,
        arXiv 1911.03852; M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.
    Differs: images without labels take those that the network itself would draw, by the seed, and the mean
        of H_i is then that of the Fisher matrix; each batch has vectors of its own, which averages more of
        them for the same work; a negative trace counts by its size, as the loss is then no minimum, not
        flat; regions in place of layers.

    Example:
        >>> Hessian(samples=50).tolerance
        0.001
    """

    samples: int = Field(200, ge=1)
    tolerance: float = Field(1e-3, ge=0)
    ranges: str = "minmax"

    def score(
        self,
        net: Net,
        batches: Sequence[LabelledBatch],
        regions: Sequence[Region],
        widths: Sequence[QuantSpec],
        seed: int = 0,
        tell: Tell | None = None,
    ) -> Sensitivities:
        """Return the weighted squared error of each region at each width; see `Sensitivity.score`."""
        question = ask("Hessian", net, batches, regions, widths)
        generator = torch.Generator().manual_seed(seed)
        traces, drawn = self._traces(question, generator, tell)
        named = dict(zip(question.layers, traces.tolist(), strict=True))
        return question.answer(UNIT, curvature_losses(question, self.ranges, named), drawn * _RUNS)

    def _traces(
        self, question: Question, generator: torch.Generator, tell: Tell | None
    ) -> tuple[Tensor, int]:
        """Return the trace of each layer's Hessian, float64, and how many samples were drawn."""
        weights = list(own_weights(question).values())
        if not weights:
            return torch.zeros(0, dtype=torch.float64), 0

        @torch.enable_grad()
        def draw() -> Tensor:
            total = torch.zeros(len(weights), dtype=torch.float64)
            for images, labels in question.batches:
                logits = question.finite(question.net(images))
                right = drawn_labels(logits, generator) if labels is None else labels.long()
                loss = F.cross_entropy(logits, right, reduction="sum") / question.images
                total += quadratic_forms(loss, weights, [signs_like(w, generator) for w in weights])
            return total

        return mean_of(draw, self.samples, self.tolerance, tell)


def signs_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return +1 or -1 at random, in a tensor's shape, type and place."""
    signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return signs.to(tensor)


def quadratic_forms(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Return ``v_i^T (H v)_i`` of each weight, float64, H being a loss's second derivatives in all of them.

    Args:
        loss: A number.
        weights: What it was computed from.
        vectors: v, one for each weight, in its shape.

    Example:
        >>> matrix = torch.tensor([[4.0, 1, 0], [1, 3, -1], [0, -1, 2]])
        >>> w = torch.zeros(3, requires_grad=True)
        >>> quadratic_forms(w @ matrix @ w / 2, [w], [torch.tensor([1.0, 1, -1])]).tolist()
        [13.0]
    """
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    curved = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not curved:
        return torch.zeros(len(weights), dtype=torch.float64)
    products = torch.autograd.grad(
        [g for g, _ in curved], weights, [v for _, v in curved], materialize_grads=True
    )
    forms = [(v.double() * p.double()).sum() for v, p in zip(vectors, products, strict=True)]
    return torch.stack(forms).cpu()


def mean_of(
    draw: Callable[[], Tensor], samples: int, tolerance: float, tell: Tell | None = None
) -> tuple[Tensor, int]:
    """Draw vectors until their mean stands still; return the mean and how many were drawn.

    Args:
        draw: Returns the next one, float64.
        samples: At most so many.
        tolerance: Stop once one more moves the mean by less than this share of its size (both as sums of
            absolute values), not before 10 are drawn.
        tell: Told the fraction done.
    """
    mean, drawn = draw(), 1
    while drawn < samples:
        drawn += 1
        change = (draw() - mean) / drawn
        mean = mean + change
        if tell is not None:
            tell(drawn / samples)
        if drawn >= _FEWEST and float(change.abs().sum()) < tolerance * float(mean.abs().sum()):
            break
    if tell is not None:
        tell(1.0)
    return mean, drawn
