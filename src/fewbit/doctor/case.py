"""A case: a quantized network with what was measured of it, and what a rule may suspect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fewbit.doctor.changes import Change
from fewbit.doctor.exam import Exam
from fewbit.doctor.records import Cause, Fact, LayerExam
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """What the rules look at.

    Attributes:
        recipe: That made it.
        exam: Of its layers.
        layers: What the exam measured, in the order in which they run.
    """

    recipe: Recipe
    exam: Exam
    layers: tuple[LayerExam, ...]

    def layer(self, name: str) -> LayerExam:
        """Return a layer by its name."""
        return next(layer for layer in self.layers if layer.name == name)


@dataclass(frozen=True)
class Suspicion:
    """What a rule suspects, before any remedy is tried.

    Attributes:
        cause: Its name.
        layers: Where it shows, the worst first.
        evidence: The numbers at the worst.
        reason: What they mean.
        changes: Remedies to try.
    """

    cause: Cause
    layers: tuple[str, ...]
    evidence: tuple[Fact, ...]
    reason: str
    changes: tuple[Change, ...]


Rule = Callable[[Case], Suspicion | None]


def worst_first(layers: Iterable[LayerExam]) -> list[LayerExam]:
    """Return layers by falling sensitivity."""
    return sorted(layers, key=lambda layer: -(layer.kl or 0.0))


def alone(layer: LayerExam) -> tuple[Fact, ...]:
    """Return what every finding tells of its worst layer."""
    found = []
    if layer.sqnr_alone_db is not None:
        found.append(Fact(name="SQNR of its result, alone", value=layer.sqnr_alone_db, unit="dB"))
    if layer.flips is not None:
        found.append(Fact(name="labels changed, alone", value=100 * layer.flips, unit="%"))
    return tuple(found)
