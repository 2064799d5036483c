"""The norm that rounding takes from a channel's weights, given back by its scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbit.place.quantizer import QuantLayer

_FARTHEST = 2.0


def norm_gains(weight: Tensor, rounded: Tensor) -> Tensor:
    """Return xi_c = ||W_c - mean W_c|| / ||Q_c - mean Q_c|| of each output channel, 1 where either is 0.

    Example:
        >>> w = torch.tensor([[0.9, -0.35, 0.12, -0.6, 0.28, 0.05]])
        >>> q = torch.tensor([[0.9, -0.3, 0.0, -0.6, 0.3, 0.0]])
        >>> round(float(norm_gains(w, q)), 6)
        1.00974
    """
    wanted, found = (_spread(values) for values in (weight, rounded))
    both = (wanted > 0) & (found > 0)
    return torch.where(both, wanted / torch.where(both, found, 1.0), 1.0)


def _spread(weight: Tensor) -> Tensor:
    rows = weight.detach().double().flatten(1)
    return (rows - rows.mean(1, keepdim=True)).square().sum(1).sqrt()


def restore_norm(layer: QuantLayer) -> bool:
    """Multiply the scale of each channel by its gain; its codes stay, so the weights go with the scale.

    Args:
        layer: It has a weight grid.

    Returns:
        Whether it has a scale a channel that may take any value; one scale for the tensor stays as it is,
        and so do powers of two and the scales of power grids.
    """
    quantizer = layer.weight_quantizer
    fixed = quantizer.spec.power_of_two or quantizer.spec.grid != "uniform"
    if quantizer.scale.dim() == 0 or fixed:
        return False
    with torch.no_grad():
        codes = quantizer.codes(layer.weight)
        gains = norm_gains(layer.weight, quantizer(layer.weight)).clamp(1 / _FARTHEST, _FARTHEST)
        before = quantizer.scale.double()
        quantizer.scale = (before * gains).float()
        factors = (quantizer.scale.double() / before).reshape(-1, *[1] * (layer.weight.dim() - 1))
        weight = (layer.weight.double() * factors).to(layer.weight.dtype)
        scale, zero_point = quantizer.grid(weight.dim())
        moved = quantizer.codes(weight) != codes  # a weight half way between two codes may round elsewhere
        layer.weight = nn.Parameter(torch.where(moved, (codes - zero_point) * scale, weight))
    return True
