"""OBQ: the Optimal Brain Quantizer, exact order for each output."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fewbit.improve.gptq import round_columns
from fewbit.improve.gram import LayerProblem, damped, solve_layers
from fewbit.net import Net
from fewbit.step import Context, Step, StepReport

_VALUES_AT_ONCE = 1 << 24


class OBQ(Step):
    """Round the weight that hurts least first, and let the weights left make up for it, output by output.

    With ``H = 2 X^T X + damping`` over the weights that are left::

        j = argmin (Q(w_j) - w_j)^2 / (H^-1)_jj
        e = (w_j - Q(w_j)) / (H^-1)_jj,     w <- w - e H^-1[:, j]
        H^-1 <- H^-1 - H^-1[:, j] H^-1[j, :] / (H^-1)_jj

    A weight that has left the grid, its error beyond half a step, goes before all others.

    Attributes:
        images: At most so many calibration images.
        damping: Added to the diagonal of H, as a share of its mean.
        most_inputs: Layers with more inputs an output are rounded in one order for all outputs, as GPTQ does.
        asymmetric: Compare with the float network's output; else with the float weight's on the same inputs.

    Source: Frantar and Alistarh, "Optimal Brain Compression: A Framework for Accurate Post-Training
    Quantization and Pruning", 2022, arXiv 2208.11580.
    Differs: X reads from the quantized layers before and the target is the float network's output; the bias
    takes up the mean error, so H is taken about the mean; layers with many inputs fall back to GPTQ's order,
    since the exact one costs their number cubed for each output.

    Example:
        >>> OBQ().most_inputs
        600
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"rounded", "corrected"})

    images: int = Field(1024, ge=1)
    damping: float = Field(0.01, gt=0)
    most_inputs: int = Field(600, ge=1)
    asymmetric: bool = True

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Round in place."""

        def solver(problem: LayerProblem) -> tuple[Tensor, Tensor]:
            if problem.weight.shape[2] > self.most_inputs:
                return round_columns(problem, self.damping, True), problem.scale
            return round_greedily(problem, self.damping), problem.scale

        return solve_layers(self, "obq", net, context, self.images, self.asymmetric, solver)


def round_greedily(problem: LayerProblem, damping: float) -> Tensor:
    """Return codes less the zero point (g, O / g, K)."""
    inverse = torch.linalg.inv(damped(2 * problem.gram, damping))
    outputs, inputs = problem.weight.shape[1:]
    codes = torch.empty_like(problem.weight)
    at_once = max(1, _VALUES_AT_ONCE // inputs**2)
    for group in range(len(codes)):
        for start in range(0, outputs, at_once):
            rows = slice(start, min(start + at_once, outputs))
            limits = (part[group, rows, 0] for part in (problem.scale, problem.low, problem.high))
            codes[group, rows] = _round_rows(problem.weight[group, rows], inverse[group], *limits)
    return codes


def _round_rows(weight: Tensor, inverse: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    left, inverses = weight.clone(), inverse.repeat(outputs, 1, 1)
    codes = torch.zeros_like(weight)
    open_ = torch.ones_like(weight, dtype=torch.bool)
    every = torch.arange(outputs)
    for _ in range(inputs):
        nearest = torch.round(left / scale.unsqueeze(1))
        nearest = torch.maximum(torch.minimum(nearest, high.unsqueeze(1)), low.unsqueeze(1))
        errors = left - nearest * scale.unsqueeze(1)
        diagonal = torch.diagonal(inverses, dim1=1, dim2=2)
        scores = torch.where(open_, errors.square() / diagonal.clamp(min=1e-300), torch.inf)
        outside = open_ & (errors.abs() > scale.unsqueeze(1) * (0.5 + 1e-9))
        scores = torch.where(outside, -errors.abs(), scores)
        j = scores.argmin(1)
        codes[every, j] = nearest[every, j]
        column = inverses[every, :, j]
        pivot = diagonal[every, j].clamp(min=1e-300).unsqueeze(1)
        left = left - errors[every, j].unsqueeze(1) / pivot * column
        inverses -= (column / pivot).unsqueeze(2) * column.unsqueeze(1)
        open_[every, j] = False
    return codes
