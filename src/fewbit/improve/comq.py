"""COMQ: coordinate descent on codes and scales, without gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from fewbit.improve.gram import LayerProblem, solve_layers
from fewbit.net import Net
from fewbit.step import Context, Step, StepReport

_BLOCK = 64


class COMQ(Step):
    """Minimise each layer's output error one weight at a time, and over its scale.

    One coordinate of ``|| X w - S X q ||^2`` is a parabola, so its best code is known::

        q_j <- clamp(round( q_j + (G (w - S q))_j / (S G_jj) ), qmin, qmax),      G = X^T X
        S   <- <X q, X w> / || X q ||^2                       once a sweep, kept only if the error falls

    Codes start unrounded, so that the first sweep rounds one weight after the other, in the order of
    falling ||x_j|| |w_j|, and each later one makes up for those before.

    Attributes:
        images: At most so many calibration images.
        sweeps: How often each weight is visited.
        learn_scale: Move the scale too, where it need be no power of two.
        asymmetric: Compare with the float network's output; else with the float weight's on the same inputs.

    Source: Zhang et al., "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization", 2024,
    arXiv 2403.07134.
    Differs: X reads from the quantized layers before and the target is the float network's output; the bias
    takes up the mean error, so G is taken about the mean; the scale starts where `calibrate` put it; all
    outputs of a group take one order, by the mean of |w_j|, so that they are solved together.

    Example:
        >>> COMQ().sweeps
        4
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"rounded", "corrected"})

    images: int = Field(1024, ge=1)
    sweeps: int = Field(4, ge=1)
    learn_scale: bool = True
    asymmetric: bool = True

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Round in place."""

        def solver(problem: LayerProblem) -> tuple[Tensor, Tensor]:
            return coordinate_descent(problem, self.sweeps, self.learn_scale)

        return solve_layers(self, "comq", net, context, self.images, self.asymmetric, solver)


def coordinate_descent(problem: LayerProblem, sweeps: int, learn_scale: bool) -> tuple[Tensor, Tensor]:
    """Return codes less the zero point (g, O / g, K) and scales (g, O / g, 1).

    Where all outputs have one scale it is moved for all together.
    """
    diagonal = torch.diagonal(problem.gram, dim1=1, dim2=2)
    order = (diagonal.sqrt() * problem.weight.abs().mean(1)).argsort(dim=1, descending=True, stable=True)
    ordered = _in_order(problem, order)
    scale = problem.scale.clone()
    codes = torch.maximum(torch.minimum(ordered.weight / scale, problem.high), problem.low)
    for _ in range(sweeps):
        codes = _sweep(ordered, codes, scale)
        if learn_scale and not problem.fixed_scale:
            scale = _better_scale(ordered, codes, scale)
    back = order.argsort(dim=1).unsqueeze(1).expand_as(codes)
    return codes.gather(2, back), scale


def _in_order(problem: LayerProblem, order: Tensor) -> LayerProblem:
    """Return the same problem with its inputs in another order, one a group."""
    count = order.shape[1]
    rows = problem.gram.gather(1, order.unsqueeze(2).expand(-1, -1, count))
    gram = rows.gather(2, order.unsqueeze(1).expand(-1, count, -1))
    return replace(
        problem, gram=gram, weight=problem.weight.gather(2, order.unsqueeze(1).expand_as(problem.weight))
    )


def _sweep(problem: LayerProblem, codes: Tensor, scale: Tensor) -> Tensor:
    """Visit every weight once, all outputs together; a block of inputs tells the rest in one product."""
    codes = codes.clone()
    left = (problem.weight - scale * codes) @ problem.gram
    step, low, high = scale.squeeze(2), problem.low.squeeze(2), problem.high.squeeze(2)
    for begin in range(0, codes.shape[2], _BLOCK):
        block = slice(begin, min(begin + _BLOCK, codes.shape[2]))
        gram = problem.gram[:, block, block]
        pull, moved = left[:, :, block].clone(), torch.zeros_like(left[:, :, block])
        for i in range(gram.shape[1]):
            own, now = gram[:, i, i].unsqueeze(1), codes[:, :, begin + i]
            # An input that is always 0 says nothing: its weight goes to the nearest code.
            best = torch.where(own > 0, now + pull[:, :, i] / (step * own.clamp(min=1e-300)), now)
            best = torch.maximum(torch.minimum(best.round_(), high), low)
            moved[:, :, i] = (best - now) * step
            pull -= moved[:, :, i].unsqueeze(2) * gram[:, i].unsqueeze(1)
            codes[:, :, begin + i] = best
        left -= moved @ problem.gram[:, block]
    return codes


def _better_scale(problem: LayerProblem, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the scale that fits the codes best, where it is better and positive."""
    through = codes @ problem.gram
    top, bottom = (through * problem.weight).sum(2), (through * codes).sum(2)
    before, axes = problem.loss(codes, scale), (0, 1)
    if problem.one_scale and top.numel() > 1:
        top, bottom = top.sum(axes, keepdim=True), bottom.sum(axes, keepdim=True)
    fitted = torch.where(bottom > 0, top / bottom.clamp(min=1e-300), scale.squeeze(2)).expand_as(before)
    after = problem.loss(codes, fitted.unsqueeze(2))
    if problem.one_scale and before.numel() > 1:
        before, after = before.sum().expand_as(before), after.sum().expand_as(after)
    return torch.where((after < before) & (fitted > 0), fitted, scale.squeeze(2)).unsqueeze(2)
