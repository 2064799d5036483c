"""Sensitivities by curvature: the mean trace of a layer's second derivatives times its rounding error."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewbit.place.quantizer import QuantLayer
from fewbit.sensitivity.one_region import rounded_layer
from fewbit.sensitivity.score import Question

# A loss to second order is half the curvature times the square of the change; the half is left out.
UNIT = "half nats"


def own_weights(question: Question) -> dict[str, nn.Parameter]:
    """Give each convolution and matrix product of the copy a weight of its own, and gradients to these alone.

    Layers that shared a weight (one module called twice) are rounded one by one, so their curvatures are
    those of one call each.
    """
    for parameter in question.net.graph.parameters():
        parameter.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, layer in question.layers.items():
        assert isinstance(layer.module, nn.Conv2d | nn.Linear)
        layer.module.weight = found[name] = nn.Parameter(layer.module.weight.detach().clone())
    return found


def drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a class for each image drawn from the network's own answer, int64 (N,)."""
    shares = logits.detach().double().softmax(1)
    return torch.multinomial(shares.cpu(), 1, generator=generator).squeeze(1).to(logits.device)


def curvature_losses(question: Question, ranges: str, traces: Mapping[str, float]) -> NDArray[np.float64]:
    """Return ``|Tr_i| / n_i ||Q_k(W_i) - W_i||^2``, summed over each region's layers: (regions, widths).

    Args:
        question: Its regions and widths.
        ranges: Row of the registry's `ranges` for weights.
        traces: The trace over each layer's n_i weights.
    """
    losses = np.zeros((len(question.regions), len(question.widths)))
    for row, region in zip(losses, question.regions, strict=True):
        for layer in question.matrices[region.name]:
            for width, spec in enumerate(question.widths):
                module = rounded_layer(layer, spec, ranges)
                row[width] += abs(traces[layer.name]) / module.weight.numel() * rounding_error(module)
    return losses


def rounding_error(module: QuantLayer) -> float:
    """Return ``||Q(W) - W||^2`` of a layer, in float64."""
    with torch.no_grad():
        error = module.weight_quantizer(module.weight).double() - module.weight.double()
    return float(error.square().sum())
