"""How the race stands: pure questions about the trials measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from fewbit.engines.session import EngineName
from fewbit.measure.speed import Timing
from fewbit.place.targets import target
from fewbit.search.budget import Budget, Measured
from fewbit.search.trial import BudgetCheck, NetworkCost, Trial
from fewbit.spec import Frozen, ImageInput, SiluForm

Objective = Literal["throughput", "latency", "size"]


FAR = 0.75
"""A trial at less than this share of a proven one's speed is not worth its accuracy measurement."""

GAINS_OF_SILU: Mapping[SiluForm, float] = {"gelu": 1.4, "hard_swish": 2.2}
"""More than a file has been seen to gain where SiLU is replaced, the nearest function first."""
_HOPE = 8 / 7


class Pair(NamedTuple):
    """A network on an engine."""

    network: str
    engine: EngineName


class Terms(Frozen):
    """What a search is about.

    Attributes:
        networks: Names of the cards, in the order given.
        engines: Which engines may run the answer.
        budgets: All of them have to hold.
        objective: What is best among those inside: most images a second, least time of one image, or
            fewest bytes.
        confidence: See `Budget.check`.
        bf16_engines: Engines that compute in bfloat16 natively on this host.
        inputs: What the answer may take.
        costs: What the networks cost by their shapes; without them nothing is forecast.
        gains: For each engine, the most that its integers may gain over float32 in matrix work here.
    """

    networks: tuple[str, ...]
    engines: tuple[EngineName, ...]
    budgets: tuple[Budget, ...]
    objective: Objective = "throughput"
    confidence: float = 0.5
    bf16_engines: tuple[EngineName, ...] = ()
    inputs: tuple[ImageInput, ...] = ("float32",)
    costs: tuple[NetworkCost, ...] = ()
    gains: tuple[tuple[EngineName, float], ...] = ()


def measured(trial: Trial) -> Measured:
    """Return the figures of a trial that budgets look at."""
    return Measured(trial.accuracy, trial.versus_float, trial.bytes or None, trial.timing)


class Standing:
    """A view of the trials under the terms of a search.

    Speeds are compared as ratios to the float32 baseline of the same network, which was timed side by side
    with each trial, times one speed of that baseline: the machine's drift between trials cancels.

    Args:
        terms: What the search is about.
        trials: What was measured, in that order.
        refuted: Keys of trials that the holdout images refused; they meet no budget.
    """

    def __init__(self, terms: Terms, trials: Sequence[Trial], refuted: Collection[str] = ()) -> None:
        self.terms, self.refuted = terms, frozenset(refuted)
        self.trials = [
            t
            for t in trials
            if t.network in terms.networks and t.setting.engine in terms.engines and t.takes in terms.inputs
        ]

    def pairs(self) -> list[Pair]:
        """Every network on every engine, in the order given."""
        return [Pair(n, e) for n in self.terms.networks for e in self.terms.engines]

    def find(self, network: str, engine: EngineName, recipe: str) -> Trial | None:
        """Return a trial, none where it was not run."""
        key = (network, engine, recipe)
        return next((t for t in self.trials if (t.network, t.setting.engine, t.recipe) == key), None)

    def has(self, network: str, engine: EngineName, recipe: str) -> bool:
        """Say whether a trial was run."""
        return self.find(network, engine, recipe) is not None

    # Budgets

    def checks(self, trial: Trial) -> tuple[BudgetCheck, ...]:
        """Return the checks of the budgets whose figure was measured."""
        found = (b.check(measured(trial), self.terms.confidence) for b in self.terms.budgets)
        return tuple(c for c in found if c is not None)

    def meets(self, trial: Trial) -> bool:
        """Say whether a trial was measured to its end and is inside every budget."""
        if trial.key in self.refuted:
            return False
        checks = self.checks(trial)
        return (
            trial.state == "measured"
            and len(checks) == len(self.terms.budgets)
            and all(c.met for c in checks)
        )

    def proven(self, trial: Trial) -> bool:
        """Say whether it is inside every budget with a one-sided 95 % bound."""
        return self.meets(trial) and all(c.proven for c in self.checks(trial))

    def excess(self, trial: Trial) -> float:
        """Say how far it is outside its worst budget; see `Budget.excess`."""
        return max((b.excess(measured(trial)) for b in self.terms.budgets), default=0.0)

    # Speed or size

    def value(self, trial: Trial) -> float:
        """Return what the objective asks for, larger is better; minus infinity where not measured."""
        if self.terms.objective == "size":
            return -float(trial.counted_bytes) if trial.bytes else float("-inf")
        if trial.timing is None:
            return float("-inf")
        ratio = trial.timing.ratio
        return ratio * self._float_rates[trial.network] if ratio else trial.timing.images_per_s

    def float_rate(self, network: str) -> float | None:
        """Return the images a second of a network's float32 baseline, none where it was not timed."""
        return self._float_rates.get(network)

    @cached_property
    def _float_rates(self) -> dict[str, float]:
        """Images a second of each network's float32 baseline: the median of what each trial saw of it."""
        seen: dict[str, list[float]] = {}
        for trial in self.trials:
            if trial.timing is not None and trial.timing.ratio:
                seen.setdefault(trial.network, []).append(trial.timing.images_per_s / trial.timing.ratio)
        return {network: statistics.median(rates) for network, rates in seen.items()}

    def silu_gain(self, pair: Pair) -> float:
        """Return the most that a file may gain on an engine where SiLU is replaced, 1 where none can be."""
        replaceable = any(cost.silus for cost in self.terms.costs if cost.network == pair.network)
        if not replaceable or self.terms.objective == "size" or target(pair.engine).splits_silu:
            return 1.0
        return max(GAINS_OF_SILU.values())

    def too_slow(self, network: str, timing: Timing) -> Trial | None:
        """Return a proven trial that is far faster, beyond both intervals; none where there is none."""
        best, interval = next((t for t in self.ranked() if self.proven(t)), None), timing.ratio_interval
        if self.terms.objective == "size" or best is None or interval is None:
            return None
        assert best.timing is not None
        other = best.timing.ratio_interval
        if other is None or network not in self._float_rates:
            return None
        speed, faster = self._float_rates[network], self._float_rates[best.network]
        hoped = interval.high * self.silu_gain(Pair(network, timing.setting.engine))
        return best if hoped * speed < FAR * other.low * faster else None

    def ranked(self) -> list[Trial]:
        """Trials inside every budget, the best first."""
        return list(self._ranked)

    @cached_property
    def _ranked(self) -> tuple[Trial, ...]:
        inside = [t for t in self.trials if self.meets(t)]
        return tuple(sorted(inside, key=lambda t: (-self.value(t), self.excess(t), t.key)))

    def best(self, without: Pair | None = None) -> Trial | None:
        """Return the best trial inside every budget, the int8 trials of one pair left out."""
        others = (t for t in self.ranked() if not (t.recipe.startswith("int8") and _pair(t) == without))
        return next(others, None)

    def nearest(self) -> Trial | None:
        """Return the trial that is least outside the budgets, whole measurements before ended races."""
        known = [t for t in self.trials if t.accuracy is not None and t.state != "failed"]
        return min(
            known,
            key=lambda t: (t.state != "measured", self.excess(t), -self.value(t), t.key),
            default=None,
        )

    # Float32

    def float_trial(self, network: str) -> Trial | None:
        """Return the first float32 trial of a network that was measured, in time: what drops are against."""
        floats = (t for t in self.trials if t.network == network and t.recipe == "float32")
        return next((t for t in floats if t.state == "measured"), None)

    def float_excess(self, network: str) -> float:
        """Say how far a network's float32 is outside the budgets of accuracy."""
        trial = self.float_trial(network)
        if trial is None:
            return float("inf")
        return max((b.excess(measured(trial)) for b in self.terms.budgets if b.of_accuracy), default=0.0)

    def float_speed(self, pair: Pair) -> float:
        """Return the value of the pair's float32 trial, minus infinity where there is none."""
        trial = self.find(pair.network, pair.engine, "float32")
        return float("-inf") if trial is None else self.value(trial)

    def hopeless(self, network: str) -> bool:
        """Say whether even the float32 network is outside a budget by more than its 99 % interval."""
        trial = self.float_trial(network)
        if trial is None:
            return True
        return any(b.of_accuracy and b.hopeless(measured(trial)) for b in self.terms.budgets)

    def bf16_holds(self, pair: Pair) -> bool:
        """Say whether bfloat16 was measured there and is inside the budgets of accuracy."""
        trial = self.find(pair.network, pair.engine, "bf16")
        if trial is None or trial.state != "measured":
            return False
        return all(b.excess(measured(trial)) <= 0 for b in self.terms.budgets if b.of_accuracy)

    # Int8

    def int8_trials(self, pair: Pair) -> list[Trial]:
        """Trials of a pair with every layer in int8."""
        return [t for t in self.trials if _pair(t) == pair and _is_int8(t) and not t.keep_float]

    def float_layer_trials(self, pair: Pair, base: str) -> list[Trial]:
        """Trials of a pair with some layers of a recipe left in float."""
        return [
            t
            for t in self.trials
            if _pair(t) == pair
            and t.keep_float
            and t.takes == "float32"
            and t.rung != "widths"
            and t.silu is None
            and t.recipe.startswith(f"{base}-float")
        ]

    def mixed_trials(self, pair: Pair) -> list[Trial]:
        """Trials of a pair with the regions in float that an integer program chose."""
        return [t for t in self.trials if _pair(t) == pair and t.rung == "mixed"]

    def int8_value(self, pair: Pair) -> float | None:
        """Return what int8 may reach on a pair, whatever its accuracy; none where it does not run.

        A speed counts by the upper end of its interval, at most a seventh above what was measured: a rung is
        not given up for a busy moment of the machine.
        """
        values = [v for t in self.int8_trials(pair) if (v := self._hoped(t)) > float("-inf")]
        return max(values, default=None)

    def _hoped(self, trial: Trial) -> float:
        value, timing = self.value(trial), trial.timing
        if self.terms.objective == "size" or timing is None or not timing.ratio or not timing.ratio_interval:
            return value
        return value * min(timing.ratio_interval.high / timing.ratio, _HOPE)

    def most_accurate(self, pair: Pair) -> str | None:
        """Return the int8 recipe that is least outside the budgets of accuracy on a pair."""
        known = [t for t in self.int8_trials(pair) if t.accuracy is not None]
        limits = [b for b in self.terms.budgets if b.of_accuracy]
        best = min(
            known, key=lambda t: max((b.excess(measured(t)) for b in limits), default=0.0), default=None
        )
        return None if best is None else best.recipe

    def lacks_more_than_accuracy(self, pair: Pair) -> bool:
        """Say whether int8 misses a budget of size or latency there, which no better rounding can mend."""
        limits = [b for b in self.terms.budgets if not b.of_accuracy]
        return any(all(b.excess(measured(t)) > 0 for t in self.int8_trials(pair)) for b in limits)


def _pair(trial: Trial) -> Pair:
    return Pair(trial.network, trial.setting.engine)


def _is_int8(trial: Trial) -> bool:
    plain = trial.takes == "float32" and trial.rung != "widths" and trial.silu is None
    return plain and trial.recipe.startswith("int8")
