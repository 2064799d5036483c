"""Calibrating without images: grids from BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from fewbit.errors import RecipeError
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.ranges.calibrate import hold_biases, method, set_weight_grid, watched_quantizers
from fewbit.step import Context, Step, StepReport
from fewbit.synth.spans import Span, spans_of


class CalibrateNorm(Step):
    """Give every quantizer its grid without an image: activations from what BatchNorms told.

    Channel c of a layer whose BatchNorm is folded, with shift beta_c and scale gamma_c, is about
    N(beta_c, gamma_c^2)::

        low = min over c of (beta_c - a |gamma_c|)     high = max over c of (beta_c + a |gamma_c|)

    These ends go through the network: a ReLU cuts them at 0, a clip caps them, pools keep them, a
    concatenation holds those of all its inputs.

    Attributes:
        deviations: a.
        image: How far an image reaches from 0, where no card tells the range of its values.
        weights: Row of the registry's `ranges` for weights.
        weight_options: Its hyperparameters.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    arXiv 1906.04721, section 5.
    Differs: the paper says nothing of sums. Nothing tells how much their terms depend on one another: the
    ends of a sum or of a layer without BatchNorm (the logits) are the geometric means of those of
    independent terms and those of terms that move together. The image spans what its normalisation makes of
    black and white.
    """

    needs = frozenset({"folded", "placed"})
    gives = frozenset({"calibrated"})

    deviations: float = Field(6.0, gt=0)
    image: float = Field(3.0, gt=0)
    weights: str = "minmax"
    weight_options: Mapping[str, Any] = Field(default_factory=dict)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Calibrate in place."""
        weight_method = method(self.weights, self.weight_options)
        watched = watched_quantizers(net)
        if watched and not _has_norms(net):
            raise RecipeError(
                f"{net.name}: no BatchNorm tells what its tensors are like; "
                "take a recipe that calibrates on images"
            )
        for layer in net.layers():
            if isinstance(layer.module, QuantConv2d | QuantLinear):
                set_weight_grid(layer.module, weight_method)
        spans = spans_of(net, self.deviations, self.image) if watched else {}
        shared: dict[Quantizer, list[Span]] = {}
        for node, quantizer in watched.items():
            shared.setdefault(quantizer, []).append(spans[node])
        for quantizer, found in shared.items():
            _take(net, quantizer, found)
        return StepReport(step="calibrate_norm", changed=len(shared), notes=hold_biases(net))


def _has_norms(net: Net) -> bool:
    return bool(net.statistics) or any(layer.kind == "BatchNorm" for layer in net.layers())


def _take(net: Net, quantizer: Quantizer, spans: list[Span]) -> None:
    low = min(0.0, *(float(span.low.min()) for span in spans))
    high = max(0.0, *(float(span.high.max()) for span in spans))
    if not abs(low) + abs(high) < float("inf"):
        raise RecipeError(
            f"{net.name}: without images nothing tells between which values '{quantizer.name}' lies; "
            "take a recipe that calibrates on images"
        )
    quantizer.set_range(low, high)
