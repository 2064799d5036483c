"""From what was measured to what is recommended: who is confirmed first, and what to say where nobody is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewbit.search.budget import Budget, Measured
from fewbit.search.standing import Standing, measured
from fewbit.search.trial import Trial

TIE = 0.03
"""Values this near in proportion are not told apart by a trial's short timing."""


def finalists(view: Standing) -> list[Trial]:
    """Order the trials inside the budgets for confirmation: the best first, equal ones by accuracy.

    Of trials within `TIE` of the best value, one that is proven goes before one that is not. Of one network,
    the one with the fewest changed predictions goes first then, which tells apart what accuracies cannot; of
    several, the one that is deepest inside the budgets of accuracy.
    """
    left, order = view.ranked(), list[Trial]()
    while left:
        top = view.value(left[0])
        equal = [t for t in left if view.value(t) >= top - TIE * abs(top)]
        order.append(_surest(view, equal))
        left.remove(order[-1])
    return order


def _surest(view: Standing, equal: Sequence[Trial]) -> Trial:
    """Return the trial that is surest to stay inside the budgets, of those that are equally good."""
    one_network = len({t.network for t in equal}) == 1

    def order(trial: Trial) -> tuple[bool, float, float, str]:
        versus = trial.versus_float
        excess = accuracy_excess(view, trial)
        near = versus.flips if one_network and versus is not None else excess
        return not view.proven(trial), near, excess, trial.key

    return min(equal, key=order)


def accuracy_excess(view: Standing, trial: Trial) -> float:
    """Say how far a trial is outside its worst budget of accuracy; negative inside."""
    return max((b.excess(measured(trial)) for b in view.terms.budgets if b.of_accuracy), default=0.0)


def advice(view: Standing, nearest: Trial) -> str:
    """Say in one line what would meet the budgets that the nearest trial misses.

    For each: by how much float32 itself misses it, the limit that the most accurate (smallest, quickest)
    network measured would meet, and the one that the fastest would.
    """
    texts = [_advice(view, b, nearest) for b in view.terms.budgets if not _meets(view, b, measured(nearest))]
    if texts:
        return "; ".join(texts)
    return "every budget is held on the search images, but not on the holdout images"


def holdout_advice(view: Standing, figures: Measured, name: str) -> str:
    """Say what would meet the budgets that a finalist holds on the search images, not on the holdout."""
    missed = [b for b in view.terms.budgets if not _meets(view, b, figures)]
    limits = [
        f"{b.text} is missed on the holdout images; {_limit(view, b, figures)} would hold" for b in missed
    ]
    return f"{name}: " + "; ".join(limits)


def describe(trial: Trial) -> str:
    """Name a trial in a sentence.

    "resnet20 int8-mse on openvino"
    """
    return f"{trial.network} {trial.recipe} on {trial.setting.engine}"


def _advice(view: Standing, budget: Budget, nearest: Trial) -> str:
    texts = []
    base = view.float_trial(nearest.network)
    if budget.of_accuracy and base is not None and not _meets(view, budget, measured(base)):
        points = 100 * budget.excess(measured(base))
        how = f"by {points:.2g} points" if points > 0 else "at the confidence asked for"
        texts.append(f"{base.network} in float32 itself misses {budget.text} {how}")
    known = [t for t in view.trials if t.state == "measured" and budget.value(measured(t)) is not None]
    first = min(known, key=lambda t: (budget.excess(measured(t)), -view.value(t), t.key), default=None)
    fast = max(known, key=lambda t: (view.value(t), t.key), default=None)
    said: list[Trial] = []
    for trial in (first, fast):
        if trial is not None and trial not in said:
            said.append(trial)
            texts.append(
                f"{_limit(view, budget, measured(trial))} would be met by {describe(trial)}{_speed(trial)}"
            )
    return ", ".join(texts) if texts else f"nothing was measured against {budget.text}"


def _speed(trial: Trial) -> str:
    ratio = trial.timing.ratio if trial.timing is not None else None
    return f" ({ratio:.2f}x float32)" if ratio else ""


def _meets(view: Standing, budget: Budget, figures: Measured) -> bool:
    check = budget.check(figures, view.terms.confidence)
    return check is not None and check.met


def _limit(view: Standing, budget: Budget, figures: Measured) -> str:
    """Write the budget with the tightest round limit that the figures would meet."""
    ends = budget.interval(figures, 2 * view.terms.confidence - 1)
    if budget.measure == "bytes":
        return f"bytes<={math.ceil(ends.high)}"
    if budget.measure == "latency":
        return f"latency<={math.ceil(ends.high * 100) / 100:g}ms"
    if budget.larger_is_better:
        return f"{budget.measure}>={math.floor(ends.low * 1000 + 1e-9) / 10:g}%"
    return f"{budget.measure}<={math.ceil(ends.high * 1000 - 1e-9) / 10:g}%"


def told_apart(timings: Sequence[tuple[Trial, float, float]], view: Standing) -> Trial:
    """Choose among confirmed finalists that were timed side by side.

    Args:
        timings: (trial, speed, lower end of the interval of its speed), all against one baseline.
        view: For what the budgets say of them.

    Returns:
        The fastest; of those that the intervals do not tell from it, the surest as in `finalists`.
    """
    fastest = max(timings, key=lambda item: item[1])
    return _surest(view, [t for t, speed, _ in timings if speed >= max(fastest[2], (1 - TIE) * fastest[1])])
