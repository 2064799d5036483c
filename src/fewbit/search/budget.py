"""What the user allows: one limit on accuracy, size or latency, read from text like ``top1-drop<=1%``."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from fewbit.errors import BudgetError, suggest
from fewbit.measure.accuracy import Accuracy, Comparison, Interval, images_to_prove_error
from fewbit.measure.speed import Timing
from fewbit.search.trial import BudgetCheck
from fewbit.spec import Frozen

Measure = Literal["top1-error", "top5-error", "top1-drop", "top5-drop", "top1", "top5", "bytes", "latency"]
Sign = Literal["<=", "<", ">=", ">"]

# Measure -> (unit, k of top-k or 0, a larger value is better).
MEASURES: dict[Measure, tuple[str, int, bool]] = {
    "top1-error": ("share", 1, False),
    "top5-error": ("share", 5, False),
    "top1-drop": ("drop", 1, False),
    "top5-drop": ("drop", 5, False),
    "top1": ("share", 1, True),
    "top5": ("share", 5, True),
    "bytes": ("bytes", 0, False),
    "latency": ("ms", 0, False),
}
_UNITS: dict[str, dict[str, float]] = {
    "share": {"%": 0.01, "": 1.0},
    "drop": {"%": 0.01, "": 1.0},
    "bytes": {"": 1, "b": 1, "kb": 1e3, "kib": 2**10, "mb": 1e6, "mib": 2**20, "gb": 1e9, "gib": 2**30},
    "ms": {"ms": 1.0, "us": 1e-3, "s": 1e3},
}
_TEXT = re.compile(r"\s*([a-z0-9-]+)\s*(<=|>=|<|>|≤|≥)\s*([0-9]*\.?[0-9]+)\s*(%|[a-z]*)\s*", re.IGNORECASE)
_EXAMPLE = 'give one like "top5-error<=17%" or "top1-drop<=1%"'
_PROOF = 0.95


class Measured(NamedTuple):
    """The figures that budgets look at; none where not measured."""

    accuracy: Accuracy | None = None
    versus_float: Comparison | None = None
    bytes: int | None = None
    timing: Timing | None = None


class Budget(Frozen):
    """One limit.

    Attributes:
        text: As the user wrote it.
        measure: What is limited. A drop is against the float32 network of the same card, on the same images.
        sign: Which side is inside.
        limit: A share (0.01 is one point), bytes or milliseconds of one call at the 50th percentile.

    Example:
        >>> parse_budget("top5-error <= 17 %")
        Budget(text='top5-error <= 17 %', measure='top5-error', sign='<=', limit=0.17)
    """

    text: str
    measure: Measure
    sign: Sign
    limit: float

    @property
    def of_accuracy(self) -> bool:
        """It limits accuracy, not size or latency."""
        return MEASURES[self.measure][1] > 0

    @property
    def k(self) -> int:
        """The k of top-k; 0 where it does not limit accuracy."""
        return MEASURES[self.measure][1]

    @property
    def of_drop(self) -> bool:
        """It limits the drop against float32."""
        return MEASURES[self.measure][0] == "drop"

    @property
    def larger_is_better(self) -> bool:
        """Inside is above the limit."""
        return MEASURES[self.measure][2]

    def holds(self, value: float) -> bool:
        """Say whether a value is inside the limit.

        Shares and drops are ratios of two integers, the limit a decimal number; they are compared to 1e-12
        so that 17 errors of 100 are inside "<=17%" and not inside "<17%".
        """
        near = abs(value - self.limit) <= 1e-12 * max(1.0, abs(self.limit))
        if near:
            return self.sign in ("<=", ">=")
        return value > self.limit if self.larger_is_better else value < self.limit

    def value(self, measured: Measured) -> float | None:
        """Return the figure that this budget limits, none where it was not measured."""
        if self.measure == "bytes":
            return None if measured.bytes is None else float(measured.bytes)
        if self.measure == "latency":
            return None if measured.timing is None else measured.timing.ms_per_batch_p50
        if self.of_drop:
            versus = measured.versus_float
            return None if versus is None else versus.drop(self.k)
        if measured.accuracy is None:
            return None
        right, total = measured.accuracy.correct(self.k), measured.accuracy.total
        return (right if self.larger_is_better else total - right) / total if total else None

    def interval(self, measured: Measured, confidence: float) -> Interval:
        """Return the two-sided interval of the figure; latency has that of its timing, size its value alone.

        Raises:
            ValueError: The figure was not measured.
        """
        value = self.value(measured)
        if value is None:
            raise ValueError(f"budget {self.text!r} looks at a figure that was not measured")
        if self.measure == "latency" and confidence > 0 and measured.timing is not None:
            return measured.timing.ms_interval or Interval(low=value, high=value)
        if not self.of_accuracy or confidence <= 0:
            return Interval(low=value, high=value)
        if self.of_drop:
            assert measured.versus_float is not None
            return measured.versus_float.interval(self.k, confidence)
        assert measured.accuracy is not None
        share = measured.accuracy.interval(self.k, confidence)
        if self.larger_is_better:
            return share
        return Interval(low=1.0 - share.high, high=1.0 - share.low)

    def check(self, measured: Measured, confidence: float = 0.5, looks: int = 1) -> BudgetCheck | None:
        """Hold the figures against the limit.

        Args:
            measured: The figures.
            confidence: How sure one must be that the limit holds for new images: 0.5 asks that the figure
                itself is inside, 0.95 that its one-sided 95 % bound is.
            looks: How many networks were held against these images; what is proven is so for all of them
                together (Bonferroni).

        Returns:
            The check, or none where the figure was not measured.
        """
        value = self.value(measured)
        if value is None:
            return None
        both = self.interval(measured, 0.95)
        proven = self.holds(value) and self._bound_holds(measured, 1 - (1 - _PROOF) / looks)
        if confidence > 0.5:
            confidence = 1 - (1 - confidence) / looks
        return BudgetCheck(
            budget=self.text,
            limit=self.limit,
            value=value,
            low=both.low,
            high=both.high,
            met=self.holds(value) and self._bound_holds(measured, confidence),
            proven=proven,
            images_to_prove=None if proven else self._images_to_prove(measured, value),
        )

    def excess(self, measured: Measured) -> float:
        """Say how far outside the limit the figure is; 0 or less inside, infinite where not measured.

        Shares and drops in points of the share, size and latency relative to the limit.
        """
        value = self.value(measured)
        if value is None:
            return float("inf")
        over = self.limit - value if self.larger_is_better else value - self.limit
        return over if self.of_accuracy else over / max(self.limit, 1e-9)

    def hopeless(self, measured: Measured, confidence: float = 0.99) -> bool:
        """Say whether even the favourable end of the interval is outside the limit."""
        if self.value(measured) is None:
            return False
        ends = self.interval(measured, confidence)
        return not self.holds(ends.high if self.larger_is_better else ends.low)

    def _bound_holds(self, measured: Measured, confidence: float) -> bool:
        ends = self.interval(measured, 2 * confidence - 1)
        return self.holds(ends.low if self.larger_is_better else ends.high)

    def _images_to_prove(self, measured: Measured, value: float) -> int | None:
        if self.of_drop and measured.versus_float is not None:
            return measured.versus_float.images_to_prove(self.limit, self.k, _PROOF)
        if not self.of_accuracy:
            return None
        turned = self.larger_is_better
        return images_to_prove_error(
            1 - value if turned else value, 1 - self.limit if turned else self.limit, _PROOF
        )


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Args:
        text: A measure, a sign and a number: "top5-error<=17%", "top1-drop<1%", "top1>=0.75",
            "bytes<=2MB", "latency<=5ms".

    Raises:
        BudgetError: It does not parse; says what came, what is allowed, and an example.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise BudgetError(f"budget '{text}': is not a measure, a sign and a number; {_EXAMPLE}")
    name, sign, number, unit = found.groups()
    measure, factor = _measure(text, name), unit.lower()
    sign = {"≤": "<=", "≥": ">="}.get(sign, sign)
    kind, _, larger = MEASURES[measure]
    if (sign[0] == ">") != larger:
        turned = f"{measure}{'>=' if larger else '<='}{number}{unit}"
        better = "larger" if larger else "smaller"
        raise BudgetError(f"budget '{text}': {better} {measure} is better; write \"{turned}\"")
    if factor not in _UNITS[kind]:
        allowed = ", ".join(u or "none" for u in _UNITS[kind])
        came = f"unit '{unit}'" if unit else "no unit"
        raise BudgetError(f"budget '{text}': {measure} has {came}; allowed units are {allowed}")
    limit = float(number) * _UNITS[kind][factor]
    if kind in ("share", "drop") and (limit > 1 or (limit == 1 and unit != "%")):
        raise BudgetError(
            f"budget '{text}': {number} is more than all images; write {number}% or a share under 1"
        )
    if kind in ("bytes", "ms") and limit <= 0:
        raise BudgetError(f"budget '{text}': nothing is inside a limit of 0; {_EXAMPLE}")
    return Budget(text=text, measure=measure, sign=sign, limit=limit)


def _measure(text: str, name: str) -> Measure:
    for measure in MEASURES:
        if measure == name.lower():
            return measure
    near = suggest(name.lower(), MEASURES)
    raise BudgetError(
        f"budget '{text}': no measure '{name}'{near}; allowed are {', '.join(MEASURES)}; {_EXAMPLE}"
    )
