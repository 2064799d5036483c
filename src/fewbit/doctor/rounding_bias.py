"""Biased rounding: the weight's rounding errors add up to a shift of the output's mean."""

from __future__ import annotations

from fewbit.doctor.case import Case, Suspicion, alone, worst_first
from fewbit.doctor.changes import correct_bias, uses
from fewbit.doctor.records import Fact

_SHARE = 0.5
_SHIFT = 0.01


def suspect(case: Case) -> Suspicion | None:
    """Suspect layers where half or more of the error that rounding a weight brings is a shift of the mean.

    With eps = Q(W) - W the mean of an output shifts by eps E[x], which is not small where x is behind a
    ReLU: it counts where it is a hundredth of the output's standard deviation or more. A bias takes it back.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    arXiv 1906.04721, section 3; Finkelstein et al., "Fighting Quantization Bias With Bias", 2019,
    arXiv 1906.03193.
    """
    if uses(case.recipe, "correct_bias"):
        return None
    biased = worst_first(
        layer
        for layer in case.layers
        if (layer.shift_share or 0.0) >= _SHARE and (layer.shift or 0.0) >= _SHIFT
    )
    if not biased:
        return None
    worst = biased[0]
    evidence = (
        Fact(
            name="mean shift of its output, of its standard deviation",
            value=100 * (worst.shift or 0.0),
            unit="%",
        ),
        Fact(
            name="share of the weight's noise that is this shift",
            value=100 * (worst.shift_share or 0.0),
            unit="%",
        ),
        *alone(worst),
    )
    return Suspicion(
        cause="biased_rounding",
        layers=tuple(layer.name for layer in biased),
        evidence=evidence,
        reason="the errors of its rounded weights do not cancel but move the mean of its output",
        changes=(correct_bias(),),
    )
