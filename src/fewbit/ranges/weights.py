"""The range of a weight tensor, per tensor or per output channel, from the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit import registry
from fewbit.errors import RecipeError
from fewbit.place.quantizer import Quantizer
from fewbit.ranges.range_finder import Range, RangeMethod, extremes
from fewbit.spec import QuantSpec


def find_weight_range(
    weight: torch.Tensor,
    spec: QuantSpec,
    axis: int = 0,
    method: str | RangeMethod = "minmax",
    name: str = "weight",
) -> Range:
    """Return the range of a weight tensor.

    Args:
        weight: Weights of any shape; not changed.
        spec: Their grid; its `granularity` says whether one range a tensor or one an output channel. Codes of
            a symmetric grid are signed whatever the sign of the weights.
        axis: The output channels' axis: 0 of a convolution or matrix, 1 of a transposed convolution.
        method: A row of the registry's `ranges`, or its class with hyperparameters.
        name: What errors call the tensor.

    Returns:
        Numbers per tensor, tuples of one number a channel per channel. A channel of zeros has ends 0.

    Raises:
        NetworkError: A weight is not finite.
        RecipeError: The method is unknown or for activations only, or the tensor has no such axis or no
            weight.

    >>> find_weight_range(torch.tensor([[0.5, -1.0], [2.0, 0.0]]), QuantSpec(granularity="channel"))
    Range(low=(-1.0, 0.0), high=(0.5, 2.0))
    """
    rows = weight_rows(weight, spec, axis, name)
    chosen: RangeMethod = registry.find("ranges", method)() if isinstance(method, str) else method
    signed = spec.model_copy(update={"signed": True}) if spec.symmetric else spec
    low, high = ((end + 0.0).tolist() for end in chosen.of_weights(rows, signed))  # + 0.0: no negative zeros
    if spec.granularity == "channel":
        return Range(low=tuple(low), high=tuple(high))
    return Range(low=low[0], high=high[0])


def weight_rows(weight: torch.Tensor, spec: QuantSpec, axis: int = 0, name: str = "weight") -> torch.Tensor:
    """Return a weight tensor as float32 rows (R, K), one row for each grid of the spec.

    Arguments and errors are those of `find_weight_range`.

    >>> weight_rows(torch.zeros(2, 3, 1, 1), QuantSpec(granularity="channel")).shape
    torch.Size([2, 3])
    """
    if not -weight.dim() <= axis < weight.dim() or weight.numel() == 0:
        raise RecipeError(
            f"{name}: shape {tuple(weight.shape)} has no weights along axis {axis}; "
            "give the axis of the output channels"
        )
    weight = weight.detach().to(torch.float32)
    extremes(weight, name)
    return weight.movedim(axis, 0).reshape(weight.shape[axis] if spec.granularity == "channel" else 1, -1)


def rounded(weight: Tensor, spec: QuantSpec, method: RangeMethod | str, name: str) -> Tensor:
    """Return a weight rounded to a grid whose range a method finds."""
    quantizer = Quantizer(spec, name, weight=True)
    found = find_weight_range(weight, spec, 0, method, name)
    quantizer.set_range(found.low, found.high)
    values: Tensor = quantizer(weight)
    return values
