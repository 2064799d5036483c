"""Several networks in one race: what each may reach in integers, who goes first, and who is not quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from fewbit.engines.session import EngineName
from fewbit.measure.host import Host
from fewbit.search.answer import describe
from fewbit.search.standing import Pair, Standing, measured
from fewbit.search.trial import LeftOut, NetworkCost, Trial
from fewbit.search.weight_widths import WIDTHS

GAIN_OF_PIXELS = 1.15
"""More than a file has been seen to gain by taking pixels: 1.02 to 1.11."""

_MATRIX_GAIN, _MATRIX_GAIN_AMX = 8.0, 16.0
_GAIN_OF_BYTES = 4.0
_SPREAD = 4.0
_RISE = 1.5
_LEAST = 1 / 8
_UNEVEN = 1.3
_LIKELY: dict[EngineName, float] = {"openvino": 0.43, "onnxruntime": 0.28}
_DRIFT = 1.1
_GAIN_OF_BATCHES = 2.0


class Forecast(NamedTuple):
    """What a network may reach in its quantized form, in images a second.

    Attributes:
        low: The least to expect.
        likely: What networks usually reach; it only orders them.
        high: More than it can reach; it decides.
    """

    low: float
    likely: float
    high: float


def most_matrix_gain(engine: EngineName, host: Host) -> float:
    """Return the most that integers may gain over float32 in matrix work, before anything was measured.

    Measured on a processor with AMX, over nine networks from MobileNetV3 to ResNet-50, best int8 of an
    engine against the fastest true float32: 0.7 to 3.3 on ONNX Runtime, 1.3 to 10.9 on OpenVINO, which has
    AMX kernels for convolutions. Half as much again is allowed where those run, and on processors whose
    kernels nobody measured; 8 elsewhere (VNNI sums four products where float multiplies one, and float
    reached 55 to 71 % of its peak, so 7.3).

    Example:
        >>> host = Host(cpu="x", machine="x86_64", isa=("avx2",), cores=2, memory_bytes=1, os="Linux")
        >>> most_matrix_gain("openvino", host)
        8.0
    """
    known = host.machine in ("x86_64", "amd64", "AMD64")
    amx = engine == "openvino" and "amx_int8" in host.isa
    return _MATRIX_GAIN if known and not amx else _MATRIX_GAIN_AMX


class Family:
    """The networks of a search, forecast from what was measured so far; a pure function of the standing.

    The gain of integers over float32 is bounded by Amdahl's law: the share of float32's time that matrix
    work takes gains at most ``G`` (`most_matrix_gain`), the rest at most 4, as its values take a quarter of
    the bytes:

        ``bound = 1 / (share / G + (1 - share) / 4)``

    The share is the network's rate of matrix multiplications in float32 over the best such rate among the
    networks of the search, times 1.3, at most 1: networks whose float32 was all matrix work reached 55 to
    71 % of the peak. How much of its bound a network reaches (its yield) differs at most 4-fold
    between networks on one engine (measured: 3), so once others were measured there, it yields at most 4
    times and at least a quarter of what the best of them did.

    Args:
        view: How the race stands; without `Terms.costs` nothing is forecast, and nothing is left out.
    """

    def __init__(self, view: Standing) -> None:
        self.view = view
        self._costs = {cost.network: cost for cost in view.terms.costs}
        self._gains = dict(view.terms.gains)

    # Who goes first

    def by_promise(self) -> list[Pair]:
        """Order pairs of network and engine, the float32 of whose network ran somewhere.

        Those whose float32 is inside the budgets first, then by the speed they are likely to reach (for size
        by their weights), or that of their float32 where nothing is forecast.
        """
        view = self.view

        def order(pair: Pair) -> tuple[bool, float, float]:
            excess = view.float_excess(pair.network)
            return excess > 0, max(excess, 0.0), -self._promise(pair)

        return sorted((p for p in view.pairs() if view.float_trial(p.network) is not None), key=order)

    def _promise(self, pair: Pair) -> float:
        cost = self._costs.get(pair.network)
        if cost is not None and self.view.terms.objective == "size":
            return -float(cost.weights)
        found = self.forecast(pair)
        if found is not None:
            return found.likely
        known = self.view.has(*pair, "float32")  # where not, that comes first, to order by
        return self.view.float_speed(pair) if known else math.inf

    # What a pair may reach

    def forecast(self, pair: Pair) -> Forecast | None:
        """Return what a network may reach on an engine, none where its float32 or its cost is not known."""
        rate, bound = self.view.float_rate(pair.network), self._bound(pair)
        if rate is None or bound is None:
            return None
        others = [y for n, y in self._yields.get(pair.engine, {}).items() if n != pair.network]
        best = max(others, default=None)
        low, high = _LEAST, 1.0
        likely = _LIKELY.get(pair.engine, _LIKELY["onnxruntime"])
        if best is not None:
            low, high = best / _SPREAD, max(min(1.0, _SPREAD * best), _RISE * best)
            likely = math.exp(sum(map(math.log, others)) / len(others))
        more = self._slack * self.view.silu_gain(pair)
        return Forecast(rate * bound * low, rate * bound * likely, rate * bound * high * more)

    @property
    def _slack(self) -> float:
        """What may come on top: drift between timings, pixels, larger batches inside a limit of latency."""
        terms = self.view.terms
        pixels = GAIN_OF_PIXELS if "uint8" in terms.inputs else 1.0
        limited = any(b.measure == "latency" for b in terms.budgets)
        return _DRIFT * pixels * (_GAIN_OF_BATCHES if limited else 1.0)

    def _bound(self, pair: Pair) -> float | None:
        """Return the most that the whole network may gain on an engine."""
        share, gain = self._shares.get(pair.network), self._gains.get(pair.engine)
        if share is None or gain is None:
            return None
        return 1 / (share / gain + (1 - share) / _GAIN_OF_BYTES)

    @cached_property
    def _shares(self) -> dict[str, float]:
        """The share of each network's float32 time that matrix work takes."""
        speeds = {
            name: cost.matrix_macs * rate
            for name, cost in self._costs.items()
            if (rate := self.view.float_rate(name)) is not None
        }
        best = max(speeds.values(), default=0.0)
        return {n: min(1.0, _UNEVEN * speed / best) for n, speed in speeds.items()} if best > 0 else {}

    @cached_property
    def _yields(self) -> dict[EngineName, dict[str, float]]:
        """What the int8 of each network measured so far reached of its bound, by engine."""
        found: dict[EngineName, dict[str, float]] = {}
        for pair in self.view.pairs():
            rate, bound = self.view.float_rate(pair.network), self._bound(pair)
            values = [v for t in self.view.int8_trials(pair) if (v := _speed(self.view, t)) > 0]
            if values and rate is not None and bound is not None:
                found.setdefault(pair.engine, {})[pair.network] = max(values) / (rate * bound)
        return found

    # Who is not quantized

    def left_out(self) -> tuple[LeftOut, ...]:
        """Return the pairs that were not quantized, since nothing they may reach can be the answer."""
        pairs = [p for p in self.view.pairs() if self.view.float_trial(p.network) is not None]
        new = [p for p in pairs if not self.view.int8_trials(p)]
        return tuple(found for p in new if (found := self.hopeless(p)) is not None)

    def hopeless(self, pair: Pair) -> LeftOut | None:
        """Say why quantizing a network for an engine cannot give the answer, none where it may.

        There must be a network inside every budget already: where there is none, the nearest is looked for.
        """
        best = self._best
        if best is None or Pair(best.network, best.setting.engine) == pair:
            return None
        if self.view.hopeless(pair.network):
            return self._inaccurate(pair)
        cost = self._costs.get(pair.network)
        if cost is not None and (found := self._too_large(pair, cost, best)) is not None:
            return found
        return None if self.view.terms.objective == "size" else self._too_slow(pair, best)

    def _inaccurate(self, pair: Pair) -> LeftOut:
        trial = self.view.float_trial(pair.network)
        assert trial is not None
        figures = measured(trial)
        missed = [b for b in self.view.terms.budgets if b.of_accuracy and b.hopeless(figures)]
        how = ", ".join(f"{b.text} by {100 * b.excess(figures):.2g} points" for b in missed)
        text = f"float32 itself misses {how}, beyond its 99 % interval"
        return LeftOut(network=pair.network, engine=pair.engine, reason="accuracy", text=_named(pair, text))

    def _too_large(self, pair: Pair, cost: NetworkCost, best: Trial) -> LeftOut | None:
        """Say why it is too large: a budget is of the file, a byte a weight; the objective packs weights."""
        limits = [(b.limit, b.text) for b in self.view.terms.budgets if b.measure == "bytes"]
        limit, name = min(limits, default=(math.inf, ""))
        if cost.weights >= limit:
            text = f"its weights alone take {cost.weights:,} bytes in 8 bits; {name}"
            return _too_many_bytes(pair, cost.weights, limit, text)
        bits, least = min(WIDTHS), math.ceil(cost.weights * min(WIDTHS) / 8)
        if self.view.terms.objective != "size" or least < best.counted_bytes:
            return None
        packed = " with weights packed" if best.packed_bytes else ""
        text = (
            f"its weights alone take {least:,} bytes packed in {bits} bits; "
            f"{describe(best)} has {best.counted_bytes:,}{packed}"
        )
        return _too_many_bytes(pair, least, best.counted_bytes, text)

    def _too_slow(self, pair: Pair, best: Trial) -> LeftOut | None:
        found, to_beat = self.forecast(pair), _least(self.view, best)
        if found is None or found.high >= to_beat:
            return None
        text = (
            f"it may reach {found.low:,.0f} to {found.high:,.0f} images/s, by its multiplications and "
            f"float32; {describe(best)} runs at {self.view.value(best):,.0f}, {to_beat:,.0f} at least"
        )
        return LeftOut(
            network=pair.network,
            engine=pair.engine,
            reason="speed",
            low=found.low,
            high=found.high,
            to_beat=to_beat,
            text=_named(pair, text),
        )

    @cached_property
    def _best(self) -> Trial | None:
        return self.view.best()


def new_ones(before: Sequence[LeftOut], now: Sequence[LeftOut]) -> list[LeftOut]:
    """Return the pairs left out now that were not before."""
    known = {(one.network, one.engine) for one in before}
    return [one for one in now if (one.network, one.engine) not in known]


def _speed(view: Standing, trial: Trial) -> float:
    """Return the images a second of a trial, whatever the objective; 0 where it was not timed."""
    timing, rate = trial.timing, view.float_rate(trial.network)
    return timing.ratio * rate if timing is not None and timing.ratio and rate is not None else 0.0


def _least(view: Standing, best: Trial) -> float:
    """Return the lower end of the best one's speed."""
    timing, value = best.timing, view.value(best)
    if timing is None or not timing.ratio or timing.ratio_interval is None:
        return value
    return value * min(1.0, timing.ratio_interval.low / timing.ratio)


def _too_many_bytes(pair: Pair, least: int, to_beat: float, text: str) -> LeftOut:
    return LeftOut(
        network=pair.network,
        engine=pair.engine,
        reason="bytes",
        low=least,
        high=least,
        to_beat=to_beat,
        text=_named(pair, text),
    )


def _named(pair: Pair, text: str) -> str:
    return f"{pair.network} on {pair.engine}: {text}"
