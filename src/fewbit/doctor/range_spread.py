"""Range spread: one scale for a weight whose channels have very different ranges."""

from __future__ import annotations

from fewbit.doctor.case import Case, Suspicion, alone, worst_first
from fewbit.doctor.changes import equalize, scale_a_channel, uses
from fewbit.doctor.records import Fact

_WEAK_SHARE = 0.1


def suspect(case: Case) -> Suspicion | None:
    """Suspect weights with one scale a tensor where a tenth or more of the channels lose half of their bits.

    A depthwise convolution folds a BatchNorm of its own into each filter of a few weights, so its channels
    spread the most; the cause has its name where the worst layer is one.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    arXiv 1906.04721, section 3 (the spread of depthwise layers).
    """
    spread = worst_first(
        layer
        for layer in case.layers
        if layer.per_channel is False and (layer.weak_channels or 0.0) >= _WEAK_SHARE
    )
    if not spread:
        return None
    worst = spread[0]
    evidence = (
        Fact(name="largest over smallest channel range", value=worst.weight_range_ratio or 1.0, unit="x"),
        Fact(
            name="channels that keep fewer than half of the bits",
            value=100 * (worst.weak_channels or 0.0),
            unit="%",
        ),
        Fact(name="SQNR of its weight", value=worst.weight_sqnr_db or 0.0, unit="dB"),
        *alone(worst),
    )
    return Suspicion(
        cause="depthwise_range_spread" if worst.depthwise else "range_spread",
        layers=tuple(layer.name for layer in spread),
        evidence=evidence,
        reason="one scale for the whole weight is set by its largest channel; the small ones get few codes",
        changes=(
            scale_a_channel(),
            equalize(caps=True, correct=not uses(case.recipe, "correct_bias")),
        ),
    )
