"""Tails: a range that cuts values off which matter, or one that outliers stretch."""

from __future__ import annotations

from fewbit.doctor.case import Case, Suspicion, alone, worst_first
from fewbit.doctor.changes import take_ranges
from fewbit.doctor.records import Fact, LayerExam

_CLIP_SHARE = 0.5
_GAIN_DB = 3.0
_TAIL_RATIO = 2.0
_FAR_RATIO = 8.0


def suspect_clipped(case: Case) -> Suspicion | None:
    """Suspect ranges of activations whose noise comes mostly from clipped values.

    That is where half or more of the noise lies beyond the grid's ends and min-max ranges would leave at
    most half of the noise.
    """
    cut = worst_first(
        layer
        for layer in case.layers
        if (layer.clip_share or 0.0) >= _CLIP_SHARE and (layer.minmax_gain_db or 0.0) >= _GAIN_DB
    )
    if not cut:
        return None
    worst = cut[0]
    evidence = (
        Fact(name="values beyond the grid's ends", value=100 * (worst.clipped or 0.0), unit="%"),
        Fact(name="share of the noise that is theirs", value=100 * (worst.clip_share or 0.0), unit="%"),
        Fact(name="min-max ranges would give", value=worst.minmax_gain_db or 0.0, unit="dB"),
        *_tail(worst),
        *alone(worst),
    )
    return Suspicion(
        cause="clipped_tail",
        layers=tuple(layer.name for layer in cut),
        evidence=evidence,
        reason="its range leaves out large values that carry much of the signal",
        changes=(take_ranges("minmax"), take_ranges("mse")),
    )


def suspect_clipped_weights(case: Case) -> Suspicion | None:
    """Suspect ranges of weights in the same way."""
    cut = worst_first(
        layer
        for layer in case.layers
        if (layer.weight_clip_share or 0.0) >= _CLIP_SHARE
        and (layer.weight_minmax_gain_db or 0.0) >= _GAIN_DB
    )
    if not cut:
        return None
    worst = cut[0]
    evidence = (
        Fact(
            name="share of the weight's noise beyond the grid's ends",
            value=100 * (worst.weight_clip_share or 0.0),
            unit="%",
        ),
        Fact(name="min-max ranges would give", value=worst.weight_minmax_gain_db or 0.0, unit="dB"),
        Fact(name="SQNR of its weight", value=worst.weight_sqnr_db or 0.0, unit="dB"),
        *alone(worst),
    )
    return Suspicion(
        cause="clipped_tail",
        layers=tuple(layer.name for layer in cut),
        evidence=evidence,
        reason="the range of its weight leaves out large weights",
        changes=(take_ranges("minmax", "weights"), take_ranges("mse", "weights")),
    )


def suspect_outliers(case: Case) -> Suspicion | None:
    """Suspect ranges that a few outliers stretch.

    That is where the range of least error would leave at most half of the noise, or where the largest value
    is 8 times the one that 99.9 % stay below: such outliers can hold so much of the squared error that the
    range of least error keeps them, at the cost of all others.
    """
    stretched = worst_first(
        layer for layer in case.layers if (layer.clip_share or 0.0) < _CLIP_SHARE and _is_stretched(layer)
    )
    if not stretched:
        return None
    worst = stretched[0]
    evidence = (
        *_tail(worst),
        Fact(name="least-error ranges would give", value=worst.mse_gain_db or 0.0, unit="dB"),
        *alone(worst),
    )
    return Suspicion(
        cause="outlier_tail",
        layers=tuple(layer.name for layer in stretched),
        evidence=evidence,
        reason="a few outliers set its range, so that all other values share few codes",
        changes=(take_ranges("mse"), take_ranges("percentile")),
    )


def _is_stretched(layer: LayerExam) -> bool:
    ratio = layer.tail_ratio or 1.0
    gains = (layer.mse_gain_db or 0.0) >= _GAIN_DB
    return ratio >= _FAR_RATIO or (gains and ratio >= _TAIL_RATIO)


def _tail(layer: LayerExam) -> tuple[Fact, ...]:
    return (
        Fact(name="largest value over the 99.9 % one", value=layer.tail_ratio or 1.0, unit="x"),
        Fact(name="kurtosis", value=layer.kurtosis or 0.0),
    )
