"""Ranges of activations by what their rounding does to the logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, fx

from fewbit.improve.reconstruct import drawn_judges, gather_images, hold_assigned, in_float, without_gradients
from fewbit.improve.units import Unit, whole_network
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.ranges.calibrate import feeds_matrix
from fewbit.spec import Scheme
from fewbit.step import Context, Step, StepReport

_FACTORS = tuple(2.0 ** (k / 3) for k in range(-6, 4))
_JUDGE_EVERY = 4


class FitRanges(Step):
    """Narrow or widen the ranges of activations to where their rounding moves the logits least.

    An outlier costs a squared error as much as it is large, but may matter to nothing behind it. To first
    order, with errors of single values that do not depend on one another, rounding x to a grid of step S
    moves the logits z, less what all of them have in common, by::

        E || z(x_S) - z(x) ||^2  ~  E sum_i (v^T dz/dx_i)^2 (x_S - x)_i^2
        v_k = +1 or -1 at random, less their mean

    One backward pass through the float network gives the weights of that sum for all tensors at once. Each
    tensor has a factor of its step, from 1/4 to 2, that makes its own sum least; the code of 0 stays. Errors
    of strong clipping all have one sign, and the sum takes them for too little. So one image of four, drawn,
    judges: of all moves, the half that promises most, the half of that and so on, those are made that bring
    the judges' logits nearest to the float network's, or none.

    It belongs behind the step that chooses codes: before it, what is clipped pulls the means and regressions
    of that step. Tensors that no convolution or matrix product reads keep their range.

    Attributes:
        images: At most so many calibration images, the judges among them.
        batch: At most so many images at a time.
        values: At most so many values of the network's tensors at a time; large ones take fewer images.

    Source: the weighting: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction", 2021, arXiv 2102.05426, section 3.2; steps by what they do to the loss: Nahshan et al.,
    "Loss Aware Post-training Quantization", 2019, arXiv 1911.07190.
    Differs: the gradients are those of random sums of the logits, in place of those of the loss, so that no
    label is needed and an image of which the network is sure counts as well; each tensor by itself, in place
    of a joint search.

    Example:
        >>> FitRanges().images
        48
    """

    needs = frozenset({"calibrated"})

    images: int = Field(48, ge=4)
    batch: int = Field(8, ge=1)
    values: int = Field(1 << 26, ge=1)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Fit in place."""
        quantizers = _rounding(net)
        if not quantizers:
            return StepReport(step="fit_ranges")
        images = gather_images(context, self.images, "fit_ranges")
        judging = drawn_judges(len(images), _JUDGE_EVERY)
        learned, judges = images[~judging], images[judging]
        if not len(judges):
            note = f"left as they were: images came {len(images)}, it takes {_JUDGE_EVERY} or more"
            return StepReport(step="fit_ranges", notes=(note,))
        fit = _Fit(net, whole_network(net)[0], quantizers)
        generator = torch.Generator().manual_seed(context.seed)
        with without_gradients(net):
            batch = max(1, min(self.batch, self.values // fit.values_of(images[:1])))
            for start in range(0, len(learned), batch):
                fit.show(learned[start : start + batch], generator)
                context.tell("fit_ranges", min(1.0, (start + batch) / len(learned)))
            moves = fit.moves()
            taken = fit.take_best(moves, judges, batch)
        if moves and not taken:
            note = "left as they were, images that were not fitted came no nearer"
            return StepReport(step="fit_ranges", notes=(note,))
        return StepReport(step="fit_ranges", changed=taken, notes=hold_assigned(net))

    def reads_images(self, scheme: Scheme) -> bool:
        """Tell whether activations have fixed grids."""
        return scheme.mode == "static"


def _rounding(net: Net) -> dict[fx.Node, Quantizer]:
    """Return the quantizers to fit, by the nodes where they round values that are not on their grid yet."""
    calls: dict[Quantizer, list[fx.Node]] = {}
    for layer in net.layers():
        if isinstance(layer.module, Quantizer) and layer.module.scale.dim() == 0 and not layer.module.fixed:
            calls.setdefault(layer.module, []).append(layer.node)
    found: dict[fx.Node, Quantizer] = {}
    for quantizer, nodes in calls.items():
        if all(feeds_matrix(net, node) for node in nodes):
            found |= {node: quantizer for node in nodes if _brings_values(net, node, set(nodes))}
    return found


def _brings_values(net: Net, node: fx.Node, group: set[fx.Node]) -> bool:
    """Tell whether a tensor is more than moved or joined values that its quantizer has rounded already."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.op != "call_module":
        return True
    computed = isinstance(net.layer(str(source.target)).module, QuantConv2d | QuantLinear)
    return computed or not set(source.all_input_nodes) <= group


@dataclass
class _Sums:
    """Weighted squared errors of one quantizer, one a factor."""

    factors: Tensor
    errors: Tensor

    def best(self) -> tuple[float, float]:
        """Return what the best factor promises to gain, and the factor."""
        here = self.errors[self.factors == 1.0]
        return float(here - self.errors.min()), float(self.factors[int(self.errors.argmin())])


class _Fit:
    """Adds up what each factor of each step costs, and moves the steps.

    Args:
        net: Calibrated.
        unit: All of it.
        quantizers: By the nodes where they round; some stand for several nodes.
    """

    def __init__(self, net: Net, unit: Unit, quantizers: Mapping[fx.Node, Quantizer]) -> None:
        self.net, self.unit, self.quantizers = net, unit, quantizers
        self.sums = {quantizer: _sums_of(quantizer) for quantizer in quantizers.values()}

    def values_of(self, image: Tensor) -> int:
        """Return how many values the network computes for one image."""
        with torch.no_grad():
            return sum(value.numel() for _, value in self._values(image))

    def show(self, images: Tensor, generator: torch.Generator) -> None:
        """Add the errors of some images."""
        watched: dict[fx.Node, Tensor] = {}
        with in_float(self.net, self.unit), torch.enable_grad():
            logits = self._logits(images, watched)
            signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits.dtype) * 2 - 1
            found = torch.autograd.grad(
                (_apart(logits) * signs).sum(), list(watched.values()), allow_unused=True
            )
        for node, gradient in zip(list(watched), found, strict=True):
            x, quantizer = watched.pop(node).detach(), self.quantizers[node]
            if gradient is not None:
                _add(self.sums[quantizer], quantizer, x, gradient.square())

    def _values(
        self, images: Tensor, watched: dict[fx.Node, Tensor] | None = None
    ) -> Iterator[tuple[fx.Node, Tensor]]:
        """Run; yield each node's value. Keep, where asked to, what the quantizers read, with its gradient."""
        values: dict[fx.Node, Tensor] = {self.unit.inputs[0]: images}
        last = {source: node for node in self.unit.nodes for source in node.all_input_nodes}
        for node in self.unit.nodes:
            module = self.net.graph.get_submodule(str(node.target))
            found: Tensor = module(*[values[s] for s in node.args if isinstance(s, fx.Node)])
            if watched is not None and node in self.quantizers:
                found = found if found.requires_grad else found.detach().requires_grad_(True)
                watched[node] = found
            values[node] = found
            yield node, found
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source]

    def _logits(self, images: Tensor, watched: dict[fx.Node, Tensor] | None = None) -> Tensor:
        return next(value for node, value in self._values(images, watched) if node in self.unit.outputs)

    def moves(self) -> list[tuple[Quantizer, float]]:
        """Return the quantizers that another step serves better, with its factor, the most gain first."""
        found = [(*sums.best(), quantizer) for quantizer, sums in self.sums.items()]
        found.sort(key=lambda move: -move[0])
        return [(quantizer, factor) for gain, factor, quantizer in found if gain > 0]

    def take_best(self, moves: Sequence[tuple[Quantizer, float]], judges: Tensor, batch: int) -> int:
        """Make the moves, or the first so many of them, that bring the judges nearest; return how many."""
        parts = torch.split(judges, batch)
        with torch.no_grad(), in_float(self.net, self.unit):
            exact = [self._logits(part) for part in parts]
        best, nearest, count = 0, self._distance(parts, exact), len(moves)
        while count:
            with _moved(moves[:count]):
                distance = self._distance(parts, exact)
            if distance < nearest:
                best, nearest = count, distance
            count //= 2
        for quantizer, factor in moves[:best]:
            quantizer.scale = quantizer.scale * factor
        return best

    def _distance(self, images: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
        """Return the squared distance of the quantized network's logits from those of the float network."""
        with torch.no_grad():
            gaps = (self._logits(some) - wanted for some, wanted in zip(images, exact, strict=True))
            return sum(float(_apart(gap).square().sum()) for gap in gaps)


@contextmanager
def _moved(moves: Sequence[tuple[Quantizer, float]]) -> Iterator[None]:
    """Multiply steps for a while."""
    before = [quantizer.scale for quantizer, _ in moves]
    for quantizer, factor in moves:
        quantizer.scale = quantizer.scale * factor
    yield
    for (quantizer, _), scale in zip(moves, before, strict=True):
        quantizer.scale = scale


def _apart(logits: Tensor) -> Tensor:
    """Return logits less what all of an image's have in common, which changes no answer."""
    return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits


def _sums_of(quantizer: Quantizer) -> _Sums:
    factors: Sequence[float] = _FACTORS
    if quantizer.spec.power_of_two:
        factors = [factor for factor in _FACTORS if factor in (0.25, 0.5, 1.0, 2.0)]
    return _Sums(torch.tensor(factors), torch.zeros(len(factors), dtype=torch.float64))


def _add(sums: _Sums, quantizer: Quantizer, x: Tensor, weights: Tensor) -> None:
    low, high = quantizer.qmin - quantizer.zero_point, quantizer.qmax - quantizer.zero_point
    for index, factor in enumerate(sums.factors):
        step = quantizer.scale * factor
        error = (x * (1 / step)).round_().clamp_(low, high).mul_(step).sub_(x)
        sums.errors[index] += float(torch.dot(error.square_().reshape(-1), weights.reshape(-1)))
