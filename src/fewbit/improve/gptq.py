"""GPTQ for convolutions: weights rounded column by column, the rest makes up for each error."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fewbit.improve.gram import LayerProblem, damped, solve_layers
from fewbit.net import Net
from fewbit.step import Context, Step, StepReport

_COLUMNS = 128


class GPTQ(Step):
    """Round one input's weights after the other, and let the weights left make up for the error.

    With ``H = 2 X^T X + damping`` and U the upper Cholesky factor of its inverse, for each column i of the
    order::

        e = (w_i - Q(w_i)) / U_ii,      w_j <- w_j - e U_ij   for all j > i

    A convolution's columns are its unfolded patches; each group has its own H.

    Attributes:
        images: At most so many calibration images.
        damping: Added to the diagonal of H, as a share of its mean.
        order: "activations" (columns of the largest H_ii first) or "given".
        asymmetric: Compare with the float network's output; else with the float weight's on the same inputs.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, arXiv 2210.17323.
    Differs: X reads from the quantized layers before and the target is the float network's output; the bias
    takes up the mean error, so H is taken about the mean.

    Example:
        >>> GPTQ().damping
        0.01
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"rounded", "corrected"})

    images: int = Field(1024, ge=1)
    damping: float = Field(0.01, gt=0)
    order: str = Field("activations", pattern="^(activations|given)$")
    asymmetric: bool = True

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Round in place."""

        def solver(problem: LayerProblem) -> tuple[Tensor, Tensor]:
            return round_columns(problem, self.damping, self.order == "activations"), problem.scale

        return solve_layers(self, "gptq", net, context, self.images, self.asymmetric, solver)


def round_columns(problem: LayerProblem, damping: float, by_activation: bool) -> Tensor:
    """Return codes less the zero point (g, O / g, K)."""
    hessian = damped(2 * problem.gram, damping)
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
    order = torch.arange(diagonal.shape[1]).expand_as(diagonal)
    if by_activation:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    codes = torch.empty_like(problem.weight)
    for group, places in enumerate(order):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[group][places][:, places]))
        upper = torch.linalg.cholesky(inverse, upper=True)
        left = problem.weight[group][:, places].clone()
        limits = problem.scale[group], problem.low[group], problem.high[group]
        codes[group][:, places] = _round(left, upper, *limits)
    return codes


def _round(left: Tensor, upper: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    codes = torch.empty_like(left)
    for begin in range(0, left.shape[1], _COLUMNS):
        end = min(begin + _COLUMNS, left.shape[1])
        errors = torch.empty_like(left[:, begin:end])
        for i in range(begin, end):
            column = left[:, i : i + 1]
            codes[:, i : i + 1] = torch.maximum(torch.minimum(torch.round(column / scale), high), low)
            error = (column - codes[:, i : i + 1] * scale) / upper[i, i]
            left[:, i:end] -= error * upper[i, i:end]
            errors[:, i - begin : i - begin + 1] = error
        left[:, end:] -= errors @ upper[begin:end, end:]
    return codes
