"""Sensitive layers: a few layers that cost most of the accuracy, with no better name for why."""

from __future__ import annotations

from fewbit.doctor.case import Case, Suspicion, alone, worst_first
from fewbit.doctor.changes import eight_bits, keep_float
from fewbit.doctor.records import Fact, LayerExam

_MOST_OF_HARM = 0.6
_FEW = 0.25


def suspect(case: Case) -> Suspicion | None:
    """Suspect the fewest layers that hold 60 % of all layers' sensitivities, a quarter of them at most."""
    heavy = worst_first(layer for layer in case.layers if _counts(layer))
    total = sum(layer.kl or 0.0 for layer in heavy)
    chosen: list[LayerExam] = []
    for layer in heavy[: max(1, round(_FEW * len(heavy)))]:
        if sum(one.kl or 0.0 for one in chosen) >= _MOST_OF_HARM * total:
            break
        chosen.append(layer)
    if not chosen or total <= 0:
        return None
    worst, names = chosen[0], [layer.name for layer in chosen]
    evidence = (
        Fact(
            name=f"share of all sensitivity in {len(chosen)} of {len(heavy)} layers",
            value=100 * sum(one.kl or 0.0 for one in chosen) / total,
            unit="%",
        ),
        Fact(name="SQNR of its weight", value=worst.weight_sqnr_db or 0.0, unit="dB"),
        *alone(worst),
    )
    narrow = any(min(layer.weight_bits or 8, layer.activation_bits or 8) < 8 for layer in case.layers)
    kept = [name for name in names if name != "input"]
    return Suspicion(
        cause="sensitive_layers",
        layers=tuple(names),
        evidence=evidence,
        reason="the network's answer hangs on these layers more than on all others together",
        changes=(*((eight_bits(names),) if narrow else ()), *((keep_float(kept),) if kept else ())),
    )


def _counts(layer: LayerExam) -> bool:
    """Tell whether a remedy is known for a layer: one with a rounded weight, or the image below 8 bits."""
    return layer.per_channel is not None or (layer.kind == "Input" and (layer.activation_bits or 8) < 8)
