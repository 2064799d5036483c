"""What a layer reads, summed into one matrix: enough for every method that solves a layer in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.improve.reconstruct import Problem, batches_of, in_float, reconstruct, run_nodes
from fewbit.improve.units import split_into_layers
from fewbit.net import Net, name_of
from fewbit.place.quantizer import QuantConv2d, QuantLayer
from fewbit.step import Context, Step, StepReport

_PER_INPUT, _FEWEST = 64, 8192
_RIDGES = (0.01, 0.1, 1.0, 10.0)
_JUDGE_EVERY = 4
_MOST_INPUTS, _CONSTANT = 5000, 1e-6


@dataclass(frozen=True)
class LayerProblem:
    """A layer as least squares: min over codes of sum_o (w_o - S q_o)^T G (w_o - S q_o).

    K is the number of inputs of one output (channels of its group x kernel), g the number of groups.

    Attributes:
        gram: G = X^T X over the positions seen, float64 (g, K, K).
        weight: What the rounded weight is compared with, float64 (g, O / g, K).
        scale: float64 (g, O / g, 1).
        low, high: Smallest and largest code, less the zero point.
        one_scale: All outputs have one scale.
        fixed_scale: Scales may not move.
    """

    gram: Tensor
    weight: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    one_scale: bool = False
    fixed_scale: bool = False

    def loss(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the squared error of each output (g, O / g)."""
        error = self.weight - (self.scale if scale is None else scale) * codes
        return ((error @ self.gram) * error).sum(2)


Solver = Callable[[LayerProblem], tuple[Tensor, Tensor]]


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return G with a share of its mean diagonal added to it, and 1 where an input is always 0."""
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    dead = diagonal == 0
    added = damping * diagonal.mean(-1, keepdim=True) + dead.to(gram.dtype)
    return gram + torch.diag_embed(added.expand_as(diagonal))


def shrunk(gram: Tensor, trust: float) -> Tensor:
    """Return G with what is off its diagonal taken for a share of what it is.

    n positions tell K (K + 1) / 2 products of inputs; where n is not far above K most of what they tell off
    the diagonal is chance, and codes that follow it fit the calibration images only. With a share of
    n / (n + K) a layer that has seen little is rounded to nearest, and one that has seen much by G.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004
    (shrinking; the share is our choice).

    Example:
        >>> shrunk(torch.tensor([[[2.0, 1.0], [1.0, 4.0]]]), 0.5).tolist()
        [[[2.0, 0.5], [0.5, 4.0]]]
    """
    return trust * gram + (1 - trust) * torch.diag_embed(torch.diagonal(gram, dim1=-2, dim2=-1))


def solve_layers(
    step: Step, name: str, net: Net, context: Context, images: int, asymmetric: bool, solver: Solver
) -> StepReport:
    """Give every layer the codes that a solver finds, layer by layer.

    The layer's inputs x~ are those of the quantized layers before it, the target is what it computes from
    the float network's inputs x. With covariances about the means (the bias takes what is left of the mean),
    ``G = cov(x~, x~)`` and the weight to round is ``W + W cov(x - x~, x~) (G + r)^-1``, with the ridge r that
    serves images best that were not regressed on. Layers with over 5,000 inputs an output, whose G would take
    hundreds of megabytes, keep their nearest codes.

    Args:
        step: Whose hyperparameters count.
        name: Its row.
        net: Changed in place.
        context: Of the step.
        images: At most so many calibration images.
        asymmetric: Compare with the float network's output; else with that of the float weight on x~.
        solver: Takes a layer's problem, returns codes less the zero point (g, O / g, K) and scales.
    """

    def solve(problem: Problem) -> str:
        for node, layer in problem.unit.layers.items():
            if layer.weight[0].numel() > _MOST_INPUTS:
                wide = f"{layer.weight[0].numel()} inputs an output, at most {_MOST_INPUTS} are solved"
                return f"{name_of(node)}: stays rounded to nearest ({wide})"
            if layer.weight_quantizer.spec.grid == "uniform":
                _solve(problem, node, layer, asymmetric, solver)
        return ""

    return reconstruct(step, name, net, context, split_into_layers(net), images, solve)


def _solve(problem: Problem, node: fx.Node, layer: QuantLayer, asymmetric: bool, solver: Solver) -> None:
    groups = layer.groups if isinstance(layer, QuantConv2d) else 1
    learned, judged = _read(problem, node, layer, groups)
    whole = learned + judged
    rows = layer.weight.detach().double().reshape(groups, layer.weight.shape[0] // groups, -1)
    wanted = rows + _correction(rows, learned, judged) if asymmetric else rows
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.grid(layer.weight.dim())
    shape = (groups, rows.shape[1], 1)
    scales = scale.detach().double().expand(layer.weight.shape[0], *scale.shape[1:]).reshape(shape)
    zeros = zero_point.double().expand(layer.weight.shape[0], *zero_point.shape[1:]).reshape(shape)
    gram = shrunk(whole.covariances()[0], whole.count / (whole.count + rows.shape[2]))
    ends = quantizer.qmin - zeros, quantizer.qmax - zeros
    rules = quantizer.scale.dim() == 0, quantizer.spec.power_of_two
    task = LayerProblem(gram, wanted, scales, *ends, *rules)
    codes, found = solver(task)
    kept = found.float().reshape(-1) if quantizer.scale.dim() else found.float().reshape(-1)[0]
    quantizer.assign((codes + zeros).reshape(layer.weight.shape), kept)
    rounded, (mean_rounded, mean_exact) = codes * found.float().double(), whole.sums / whole.count
    shift = (rows @ mean_exact.unsqueeze(2) - rounded @ mean_rounded.unsqueeze(2)).reshape(-1).float()
    # The means were those of the float network, so what an earlier step made of the bias is not added to.
    bias = shift if layer.float_bias is None else layer.float_bias + shift
    layer.bias = nn.Parameter(bias, requires_grad=False)


@dataclass(frozen=True)
class _Moments:
    """Sums over the positions seen of what a layer reads: x~ quantized, x in float.

    Attributes:
        own: Of x~ x~^T, float64 (g, K, K).
        cross: Of (x - x~) x~^T.
        sums: Of x~ and of x, (2, g, K).
        count: How many positions.
    """

    own: Tensor
    cross: Tensor
    sums: Tensor
    count: int

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.own + other.own, self.cross + other.cross, self.sums + other.sums, self.count + other.count
        )

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Return both sums about the means."""
        if not self.count:
            return self.own, self.cross
        rounded, exact = self.sums / self.count
        about = rounded.unsqueeze(1)
        own = self.own - self.count * rounded.unsqueeze(2) * about
        cross = self.cross - self.count * (exact - rounded).unsqueeze(2) * about
        # A constant input leaves the rounding of its sums, which may be negative and means nothing.
        raw, left = torch.diagonal(self.own, dim1=1, dim2=2), torch.diagonal(own, dim1=1, dim2=2)
        alive = (left > _CONSTANT * raw).to(own.dtype)
        own = own * alive.unsqueeze(1) * alive.unsqueeze(2)
        return own, cross * alive.unsqueeze(1)


def _moments_of(exact: Tensor, rounded: Tensor) -> _Moments:
    """Sum over (g, n, K)."""
    seen = rounded.transpose(1, 2)
    sums = torch.stack([rounded.double().sum(1), exact.double().sum(1)])
    cross = (exact - rounded).transpose(1, 2) @ rounded
    return _Moments((seen @ rounded).double(), cross.double(), sums, exact.shape[1])


def _correction(rows: Tensor, learned: _Moments, judged: _Moments) -> Tensor:
    """Return what to add to the weight so that it undoes, on x~, what rounding did to x.

    A ridge regression ``D = W cov(x - x~, x~) (cov(x~, x~) + r)^-1``. Of a few r, and of no correction at
    all, the one is taken that is best on images that were not regressed on.
    """
    own, cross = learned.covariances()
    own_judged, cross_judged = judged.covariances()
    wanted, best = rows @ cross_judged, (0.0, 0.0)
    for ridge in _RIDGES:
        found = _regressed(rows @ cross, own, ridge)
        gain = float((found @ own_judged * found).sum() - 2 * (found * wanted).sum())
        best = min(best, (gain, ridge))
    if best[0] == 0.0:
        return torch.zeros_like(rows)
    own, cross = (learned + judged).covariances()
    return _regressed(rows @ cross, own, best[1])


def _regressed(target: Tensor, own: Tensor, ridge: float) -> Tensor:
    solved: Tensor = torch.linalg.solve(damped(own, ridge), target.transpose(1, 2))
    return solved.transpose(1, 2)


def _read(problem: Problem, node: fx.Node, layer: QuantLayer, groups: int) -> tuple[_Moments, _Moments]:
    """Return the moments over most images, and over those kept to judge by."""
    inputs = layer.weight[0].numel()
    each = math.ceil(max(_FEWEST, _PER_INPUT * inputs) / problem.images)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    square = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    nothing = _Moments(square, square, torch.zeros(2, groups, inputs, dtype=torch.float64), 0)
    learned, judged, unit = nothing, nothing, problem.unit
    judging = problem.judges(_JUDGE_EVERY)
    for which in batches_of(unit, problem.rounded, problem.images):
        with in_float(problem.net, unit):
            exact = run_nodes(problem.net, unit, [source], problem.exact, which)[source]
        rounded = run_nodes(problem.net, unit, [source], problem.rounded, which)[source]
        judges = judging[which]
        for part in (~judges, judges):
            if bool(part.any()):
                found = _moments_of(*patches(layer, exact[part], rounded[part], each, problem.generator))
                learned, judged = (
                    (learned + found, judged) if part is not judges else (learned, judged + found)
                )
    return learned, judged


def patches(
    layer: QuantLayer, exact: Tensor, rounded: Tensor, each: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what a layer multiplies its weights with, (g, positions, K), of two inputs at equal positions.

    Args:
        layer: A convolution or matrix product.
        exact: (N, C, H, W), or (N, ..., I) of a matrix product.
        rounded: Of the same shape.
        each: How many positions of each image, at random; all where there are no more.
        generator: Draws them.
    """
    if not isinstance(layer, QuantConv2d):
        return exact.reshape(1, -1, exact.shape[-1]), rounded.reshape(1, -1, rounded.shape[-1])
    top, left, bottom, right = ops.pads_of(layer)
    places: tuple[Tensor, Tensor] | None = None
    found = []
    for x in (exact, rounded):
        wide = F.pad(x, (left, right, top, bottom))
        if places is None:
            places = _places(layer, wide, each, generator)
        # (N, C, P, kh, kw) -> (g, N P, C / g * kh * kw), the order of the weight's own axes
        cut = wide[:, :, places[0], places[1]]
        cut = cut.reshape(len(x), layer.groups, -1, *cut.shape[2:])
        found.append(cut.permute(1, 0, 3, 2, 4, 5).reshape(layer.groups, len(x) * cut.shape[3], -1))
    return found[0], found[1]


def _places(layer: QuantConv2d, wide: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows and columns (P, kh, kw) that P outputs at random places read of a padded input."""
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = [(w - span - 1) // s + 1 for w, span, s in zip(wide.shape[2:], spans, layer.stride, strict=True)]
    chosen = torch.randperm(sizes[0] * sizes[1], generator=generator)[:each].sort().values
    corners = chosen // sizes[1] * layer.stride[0], chosen % sizes[1] * layer.stride[1]
    offsets = [torch.arange(k) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    rows = corners[0].reshape(-1, 1, 1) + offsets[0].reshape(1, -1, 1)
    columns = corners[1].reshape(-1, 1, 1) + offsets[1].reshape(1, 1, -1)
    shape = (len(chosen), *layer.kernel_size)
    return rows.expand(shape), columns.expand(shape)
