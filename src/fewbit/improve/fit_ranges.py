"""Ranges of activations by what their rounding does to the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, fx

from fewbit.improve.reconstruct import gather_images, in_float, without_gradients
from fewbit.improve.units import Unit, whole_network
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer
from fewbit.ranges.calibrate import feeds_matrix, hold_biases, watched_quantizers
from fewbit.spec import Scheme
from fewbit.step import Context, Step, StepReport

_FACTORS = tuple(2.0 ** (k / 3) for k in range(-10, 4))
_JUDGE_EVERY = 4


class FitRanges(Step):
    """Narrow or widen the range of each activation to where its rounding moves the logits least.

    An outlier costs a squared error as much as it is large, but may matter to nothing behind it. To first
    order, with errors of single values that do not depend on one another, rounding x to a grid of step S
    moves the logits z by::

        E || z(x_S) - z(x) ||^2  ~  E sum_i (v^T dz/dx_i)^2 (x_S - x)_i^2,    v_k = +1 or -1 at random

    One backward pass through the float network gives the weights of that sum for all tensors at once. Each
    tensor takes the factor of its step, from 0.1 to 2, that makes its own sum least; the code of 0 stays.
    Of every four images one judges: where its logits come no nearer to the float network's, all ranges stay.

    Attributes:
        images: At most so many calibration images, the judges among them.
        batch: Images at a time.

    Source: the weighting: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction", 2021, arXiv 2102.05426, equation 10; steps by what they do to the loss: Nahshan et al.,
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

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Fit in place."""
        quantizers = {
            node: quantizer
            for node, quantizer in watched_quantizers(net).items()
            if quantizer.scale.dim() == 0 and feeds_matrix(net, node)
        }
        if not quantizers:
            return StepReport(step="fit_ranges")
        images = gather_images(context, self.images, "fit_ranges")
        judging = torch.arange(len(images)) % _JUDGE_EVERY == _JUDGE_EVERY - 1
        fit = _Fit(net, whole_network(net)[0], quantizers)
        generator = torch.Generator().manual_seed(context.seed)
        learned, judges = images[~judging], images[judging]
        before = {quantizer: quantizer.scale.clone() for quantizer in quantizers.values()}
        with without_gradients(net):
            for start in range(0, len(learned), self.batch):
                fit.show(learned[start : start + self.batch], generator)
                context.tell("fit_ranges", min(1.0, (start + self.batch) / len(learned)))
            distance = fit.distance(judges, self.batch)
            moved = fit.take_best()
            worse = len(judges) and not fit.distance(judges, self.batch) < distance
        if worse:
            for quantizer, scale in before.items():
                quantizer.scale = scale
            note = "left as they were, images that were not fitted came no nearer"
            return StepReport(step="fit_ranges", notes=(note,))
        return StepReport(step="fit_ranges", changed=moved, notes=hold_biases(net))

    def reads_images(self, scheme: Scheme) -> bool:
        """Tell whether activations have fixed grids."""
        return scheme.mode == "static"


@dataclass
class _Sums:
    """Weighted squared errors of one quantizer, one a factor."""

    factors: Tensor
    errors: Tensor


class _Fit:
    """Adds up what each factor of each step costs.

    Args:
        net: Calibrated.
        unit: All of it.
        quantizers: Those that hold all values of their group, by node; some stand for several nodes.
    """

    def __init__(self, net: Net, unit: Unit, quantizers: Mapping[fx.Node, Quantizer]) -> None:
        self.net, self.unit, self.quantizers = net, unit, quantizers
        self.sums = {quantizer: _sums_of(quantizer) for quantizer in quantizers.values()}

    def show(self, images: Tensor, generator: torch.Generator) -> None:
        """Add the errors of some images."""
        watched: dict[fx.Node, Tensor] = {}
        with in_float(self.net, self.unit), torch.enable_grad():
            logits = self._run(images, watched)
            signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits.dtype) * 2 - 1
            # What all logits have in common changes no answer.
            signs = signs - signs.mean(-1, keepdim=True)
            nodes = list(watched)
            found = torch.autograd.grad(
                (logits * signs).sum(), [watched[n] for n in nodes], allow_unused=True
            )
        for node, gradient in zip(nodes, found, strict=True):
            if gradient is not None:
                quantizer = self.quantizers[node]
                _add(self.sums[quantizer], quantizer, watched[node].detach(), gradient.square())

    def _run(self, images: Tensor, watched: dict[fx.Node, Tensor] | None = None) -> Tensor:
        """Return the logits; keep, where asked to, what the quantizers read, with its gradient."""
        values: dict[fx.Node, Tensor] = {self.unit.inputs[0]: images}
        last = {source: node for node in self.unit.nodes for source in node.all_input_nodes}
        for node in self.unit.nodes:
            module = self.net.graph.get_submodule(str(node.target))
            found: Tensor = module(*[values[s] for s in node.args if isinstance(s, fx.Node)])
            if watched is not None and node in self.quantizers:
                found = found if found.requires_grad else found.detach().requires_grad_(True)
                watched[node] = found
            values[node] = found
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source]
        return values[self.unit.outputs[0]]

    def distance(self, images: Tensor, batch: int) -> float:
        """Return the squared distance of the quantized network's logits from those of the float network."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(images), batch):
                some = images[start : start + batch]
                rounded = self._run(some)
                with in_float(self.net, self.unit):
                    total += float((self._run(some) - rounded).square().sum())
        return total

    def take_best(self) -> int:
        """Give every quantizer its best step; return how many are another one now."""
        moved = 0
        for quantizer, sums in self.sums.items():
            best = float(sums.factors[int(sums.errors.argmin())])
            if float(sums.errors.min()) < float(sums.errors[sums.factors == 1.0]):
                quantizer.scale = quantizer.scale * best
                moved += 1
        return moved


def _sums_of(quantizer: Quantizer) -> _Sums:
    factors: Sequence[float] = _FACTORS
    if quantizer.spec.power_of_two:
        factors = [factor for factor in _FACTORS if factor in (0.125, 0.25, 0.5, 1.0, 2.0)]
    return _Sums(torch.tensor(factors), torch.zeros(len(factors), dtype=torch.float64))


def _add(sums: _Sums, quantizer: Quantizer, x: Tensor, weights: Tensor) -> None:
    low, high = quantizer.qmin - quantizer.zero_point, quantizer.qmax - quantizer.zero_point
    for index, factor in enumerate(sums.factors):
        step = quantizer.scale * factor
        error = (x * (1 / step)).round_().clamp_(low, high).mul_(step).sub_(x)
        sums.errors[index] += float(torch.dot(error.square_().reshape(-1), weights.reshape(-1)))
