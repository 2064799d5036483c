"""The range of a weight tensor, per tensor or per output channel, from the weights themselves."""

from __future__ import annotations

import torch

from fewbit import registry
from fewbit.errors import RecipeError
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
    if not -weight.dim() <= axis < weight.dim() or weight.numel() == 0:
        raise RecipeError(
            f"{name}: shape {tuple(weight.shape)} has no weights along axis {axis}; "
            "give the axis of the output channels"
        )
    chosen: RangeMethod = registry.find("ranges", method)() if isinstance(method, str) else method
    per_channel = spec.granularity == "channel"
    weight = weight.detach().to(torch.float32)
    extremes(weight, name)
    rows = weight.movedim(axis, 0).reshape(weight.shape[axis] if per_channel else 1, -1)
    signed = spec.model_copy(update={"signed": True}) if spec.symmetric else spec
    low, high = ((end + 0.0).tolist() for end in chosen.of_weights(rows, signed))  # + 0.0: no negative zeros
    if per_channel:
        return Range(low=tuple(low), high=tuple(high))
    return Range(low=low[0], high=high[0])
