"""What rungs of the ladder may ask for, worked out when it is first asked for and kept in the journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pydantic import TypeAdapter

from fewbit.clock import phase
from fewbit.engines.session import EngineName, FloatPrecision
from fewbit.errors import FewbitError
from fewbit.search.journal import Journal
from fewbit.search.ladder import PLAIN
from fewbit.search.mixed_precision import Mix
from fewbit.search.proposal import Aids
from fewbit.search.standing import Standing
from fewbit.search.trials import Trials
from fewbit.search.weight_widths import Widths

_MINUTES_TO_MIX = 8.0
_LEAST_MS_TO_MIX = 2.0  # of a batch: below, the times of its regions are lost in noise
_MIXES = TypeAdapter(tuple[Mix, ...])
_WIDTHS = TypeAdapter(tuple[Widths, ...])
_SHARE_FOR_WIDTHS = 0.4


class Run(NamedTuple):
    """What the run of a search tells, and is told.

    Attributes:
        standing: How the race stands.
        goes_on: There is time, and a trial, left.
        left_s: Seconds left; none where nothing limits them.
        tell: Told what is going on and the fraction done.
        note: Told what a reader of the report should know.
    """

    standing: Callable[[], Standing]
    goes_on: Callable[[], bool]
    left_s: Callable[[], float | None]
    tell: Callable[[str, float], None]
    note: Callable[[str], None]


class KeptAids:
    """Makes the `Aids` of a ladder; a search that goes on reads what an earlier run worked out.

    Args:
        trials: Whose networks and engines it asks.
        journal: Where answers are kept.
        run: The run of the search.
        minutes: That the search may take in all; none for as long as it takes.
    """

    def __init__(self, trials: Trials, journal: Journal, run: Run, minutes: float | None) -> None:
        self.trials, self.journal, self.run, self.minutes = trials, journal, run, minutes
        self._refused = set[str]()  # not in the journal: a later run may have more time

    def aids(self) -> Aids:
        """Return what there is time for."""
        mixes = self.minutes is None or self.minutes >= _MINUTES_TO_MIX
        return Aids(self._ranking, self._mixing if mixes else None, self._widening)

    @phase("ranking")
    def _ranking(self, network: str, engine: EngineName, base: str) -> tuple[str, ...]:
        name = f"ranking {network} {engine} {base}"
        kept = self.journal.decision(name)
        if kept is None:
            if not self.run.goes_on():  # what takes long is for a trial that will not come
                return ()
            self.run.tell(f"{network}: which layers cost most", 0.0)
            kept = "\n".join(self.trials.benches[network].ranking(engine, base))
            self.journal.decide(name, kept)
        return tuple(kept.split("\n"))

    @phase("regions")
    def _mixing(
        self, network: str, engine: EngineName, base: str, float_precision: FloatPrecision
    ) -> tuple[Mix, ...]:
        name = f"mixes {network} {engine} {base} {float_precision}"
        kept = self.journal.decision(name)
        if kept is None:
            trial = self.run.standing().find(network, engine, PLAIN)
            if trial is None or trial.timing is None or trial.timing.ms_per_batch_p50 < _LEAST_MS_TO_MIX:
                return ()
            if not self.run.goes_on():
                return ()
            alone = {"threads": trial.setting.threads_per_stream, "streams": 1}
            setting = trial.setting.model_copy(update=alone | {"float_precision": float_precision})

            def tell(done: float) -> None:
                self.run.tell(f"{network} on {engine}: times of regions", done)

            tell(0.0)
            self.trials.sessions.free()
            try:
                mixes = self.trials.benches[network].mixes(setting, tell)
            except FewbitError as reason:
                mixes = ()
                self.run.note(f"{network} on {engine}: mixed precision was not tried ({reason})")
            kept = _MIXES.dump_json(mixes).decode()
            self.journal.decide(name, kept)
        return _MIXES.validate_json(kept)

    def _widening(self, network: str) -> tuple[Widths, ...]:
        kept = self.journal.decision(name := f"widths {network}")
        if kept is None:
            if network in self._refused or not self.run.goes_on():
                return ()
            left = self.run.left_s()

            def tell(done: float) -> None:
                self.run.tell(f"{network}: what each width of weights costs", done)

            try:
                limit_s = None if left is None else _SHARE_FOR_WIDTHS * left
                found = self.trials.benches[network].widths(limit_s, tell)
            except FewbitError as reason:
                self._refused.add(network)
                self.run.note(f"{network}: weights under 8 bits were not tried ({reason})")
                return ()
            kept = _WIDTHS.dump_json(found).decode()
            self.journal.decide(name, kept)
        return _WIDTHS.validate_json(kept)
