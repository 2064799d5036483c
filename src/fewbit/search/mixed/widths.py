"""Bit-widths of weights as a problem: what each layer loses at each width, against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fewbit.errors import RecipeError
from fewbit.search.mixed.problem import Option, Problem, Region, Tie


def width_problem(
    losses: Mapping[str, Mapping[int, float]], parameters: Mapping[str, int], ties: Sequence[Tie] = ()
) -> Problem:
    """Return the problem of giving each layer a width of its weights.

    ``bytes = sum_i parameters_i bits_i / 8``

    Args:
        losses: By layer the loss at each width in bits, as `fewbit.sensitivity` finds them.
        parameters: By layer the number of its weights.
        ties: Layers that must have the same width.

    Returns:
        Options are called "w2", "w4", ...; the cost is "bytes", scales left out.

    Raises:
        RecipeError: A layer has losses and no number of parameters, or no width.

    Example:
        >>> problem = width_problem({"conv": {4: 0.5, 8: 0.1}, "fc": {8: 0.0}}, {"conv": 100, "fc": 40})
        >>> [(option.name, option.loss, option.costs["bytes"]) for option in problem.regions[0].options]
        [('w4', 0.5, 50.0), ('w8', 0.1, 100.0)]
    """
    regions = []
    for layer, row in losses.items():
        if layer not in parameters:
            raise RecipeError(
                f"widths: layer '{layer}' has no number of parameters; give that of every layer"
            )
        costs = {bits: {"bytes": parameters[layer] * bits / 8} for bits in row}
        regions.append(
            Region(layer, tuple(Option(f"w{bits}", row[bits], costs[bits]) for bits in sorted(row)))
        )
    return Problem(tuple(regions), ties=tuple(ties))
