"""Fisher sensitivity: the mean square of the loss's gradient, in place of its second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch.nn import functional as F

from fewbit.net import Net
from fewbit.place.regions import Region
from fewbit.sensitivity.curvature import UNIT, curvature_losses, drawn_labels, own_weights
from fewbit.sensitivity.score import LabelledBatch, Question, Sensitivities, Tell, ask
from fewbit.spec import Frozen, QuantSpec


class Fisher(Frozen):
    """The mean squared gradient in a region's weights times the square of their rounding error.

    For labels y drawn from the network's own answers the second derivatives of the loss are, in the mean,
    the products of its first ones; so one gradient an image replaces the many products of `hessian`::

        Omega_i(k) = Tr F_i / n_i  ||Q_k(W_i) - W_i||^2
        Tr F_i = E sum (dL / dW_i)^2        L = -log softmax(z)_y,   y drawn from softmax(z)

    with n_i the number of weights W_i of layer i, summed over the region's layers. No label is needed. Its
    unit is half a nat, as that of `hessian`.

    Attributes:
        samples: Labels drawn for each image.
        ranges: Row of the registry's `ranges` that finds the ranges of weights.

    Source: J. Martens, New Insights and Perspectives on the Natural Gradient Method, 2014, arXiv 1412.1193;
        its place in the weighted error: Z. Dong et al., HAWQ-V2, 2019, arXiv 1911.03852.
    Differs: the trace takes the place of that of the Hessian; gradients are those of single images, for the
        square of their mean is another thing; regions in place of layers.

    Example:
        >>> Fisher().samples
        1
    """

    samples: int = Field(1, ge=1)
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
        question = ask("Fisher", net, batches, regions, widths)
        traces = self._traces(question, torch.Generator().manual_seed(seed), tell)
        forwards = 1 + 2 * self.samples if traces else 0
        return question.answer(UNIT, curvature_losses(question, self.ranges, traces), forwards)

    @torch.enable_grad()
    def _traces(self, question: Question, generator: torch.Generator, tell: Tell | None) -> dict[str, float]:
        """Return the mean over images of each layer's summed squared gradient."""
        weights = own_weights(question)
        sums = dict.fromkeys(weights, 0.0)
        done = 0
        for images, _ in question.batches if weights else ():
            for image in torch.split(images, 1):
                logits = question.finite(question.net(image))
                for draw in range(self.samples):
                    loss = F.cross_entropy(logits, drawn_labels(logits, generator))
                    more = draw + 1 < self.samples
                    gradients = torch.autograd.grad(
                        loss, list(weights.values()), retain_graph=more, materialize_grads=True
                    )
                    for name, gradient in zip(weights, gradients, strict=True):
                        sums[name] += float(gradient.double().square().sum())
                done += 1
                if tell is not None:
                    tell(done / question.images)
        return {name: total / (self.samples * question.images) for name, total in sums.items()}
