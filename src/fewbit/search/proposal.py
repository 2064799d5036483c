"""What a searcher proposes, and what it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from fewbit.engines.session import EngineName, FloatPrecision
from fewbit.search.mixed_precision import Mix
from fewbit.search.trial import Trial
from fewbit.search.weight_widths import Widths
from fewbit.spec import Frozen, ImageInput, SiluForm


class Proposal(Frozen):
    """What to measure next.

    Attributes:
        rung: The step of the ladder that proposes it.
        network: Name of the card.
        engine: Which engine runs it.
        recipe: Its name in the study; no (network, engine, recipe) is proposed twice.
        base: The shipped recipe that it is made from.
        float_precision: What float operators are computed in.
        keep_float: Layers left in float.
        takes: What the file takes.
        bits: Widths of weights by layer, where they are not the recipe's.
        silu: What takes the place of SiLU; none where it stays.
    """

    rung: str
    network: str
    engine: EngineName
    recipe: str
    base: str
    float_precision: FloatPrecision = "float32"
    keep_float: tuple[str, ...] = ()
    takes: ImageInput = "float32"
    bits: tuple[tuple[str, int], ...] = ()
    silu: SiluForm | None = None


class Searcher(Protocol):
    """Proposes trials from what was measured."""

    def propose(self, history: Sequence[Trial]) -> Proposal | None:
        """Return the next trial to measure, none where there is nothing left worth it."""
        ...


Ranking = Callable[[str, EngineName, str], tuple[str, ...]]
"""(network, engine, recipe) -> its layers, the one whose rounding costs most first."""


Mixing = Callable[[str, EngineName, str, FloatPrecision], tuple[Mix, ...]]
"""(network, engine, recipe, float precision) -> regions to leave in float, the fastest choice first."""


Widening = Callable[[str], tuple[Widths, ...]]
"""network -> widths of its weights, the smallest choice first."""


class Aids(NamedTuple):
    """What rungs ask for beside the standing; each takes a while, so only where it is needed.

    Attributes:
        ranking: In which order to leave layers in float.
        mixing: Which regions to leave in float; none where there is no time for it.
        widening: Which widths to give the weights.
    """

    ranking: Ranking
    mixing: Mixing | None = None
    widening: Widening | None = None
