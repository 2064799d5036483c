"""Unbalanced concat: inputs of very different ranges that share one grid."""

from __future__ import annotations

from torch import fx

from fewbit.doctor.case import Case, Suspicion, alone, worst_first
from fewbit.doctor.changes import Change, eight_bits, keep_float
from fewbit.doctor.records import Fact, LayerExam, SharedInput

_RATIO = 8.0
_POOR_DB = 25.0
_MATRIX = ("Conv", "Linear")


def suspect(case: Case) -> Suspicion | None:
    """Suspect a concatenation where one input's range is 8 times another's, which keeps less than 25 dB.

    Engines concatenate codes, so all inputs and the output have one scale; the smallest input then has few
    of its codes.
    """
    unbalanced = worst_first(layer for layer in case.layers if layer.inputs and _is_unbalanced(layer))
    if not unbalanced:
        return None
    worst = unbalanced[0]
    small, large = _ends(worst)
    evidence = (
        Fact(name=f"range of {large.name} over that of {small.name}", value=_ratio(worst), unit="x"),
        Fact(name=f"codes that {small.name} reaches", value=round(small.codes, 1)),
        Fact(name=f"SQNR of {small.name} on the shared grid", value=small.sqnr_db, unit="dB"),
        *alone(worst),
    )
    return Suspicion(
        cause="unbalanced_concat",
        layers=tuple(layer.name for layer in unbalanced),
        evidence=evidence,
        reason=f"all inputs share one scale, which {large.name} sets; {small.name} gets few codes",
        changes=_changes(case, [layer.name for layer in unbalanced]),
    )


def _changes(case: Case, concats: list[str]) -> tuple[Change, ...]:
    readers = list(dict.fromkeys(name for concat in concats for name in readers_of(case, concat)))
    if not readers:
        return ()
    narrow = any((case.layer(name).activation_bits or 8) < 8 for name in concats)
    return (*((eight_bits(readers),) if narrow else ()), keep_float(readers))


def readers_of(case: Case, concat: str) -> list[str]:
    """Return the convolutions and matrix products that read a concatenation, in the order of the network."""
    partial = case.exam.partial
    start = next(layer.node for layer in partial.layers if layer.name == concat)
    seen: set[fx.Node] = {start}
    todo, found = [start], set()
    while todo:
        for user in todo.pop().users:
            layer = partial.layer_of(user)
            if layer is None or user in seen:
                continue
            seen.add(user)
            if layer.kind in _MATRIX:
                found.add(layer.name)
            else:
                todo.append(user)
    return [layer.name for layer in partial.layers if layer.name in found]


def _reach(one: SharedInput) -> float:
    return max(abs(one.low), abs(one.high))


def _ends(layer: LayerExam) -> tuple[SharedInput, SharedInput]:
    """Return the inputs of the smallest and of the largest range."""
    inputs = sorted((one for one in layer.inputs if _reach(one) > 0), key=_reach)
    return (inputs[0], inputs[-1]) if inputs else (layer.inputs[0], layer.inputs[0])


def _ratio(layer: LayerExam) -> float:
    small, large = _ends(layer)
    return _reach(large) / _reach(small) if _reach(small) > 0 else 1.0


def _is_unbalanced(layer: LayerExam) -> bool:
    return _ratio(layer) >= _RATIO and _ends(layer)[0].sqnr_db < _POOR_DB
