"""Which trial comes next: a ladder of rungs from cheap to dear, each a pure function of the trials so far.

A rung is one row of `RUNGS`: a name and a function from `Standing` to the next proposal or none. The ladder
asks the rungs in order and takes the first proposal. The same history gives the same proposal, so a search
that was killed goes on as if it had not been.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fewbit.engines.session import FloatPrecision
from fewbit.search.answer import finalists
from fewbit.search.family import GAIN_OF_PIXELS, Family
from fewbit.search.mixed_precision import WORTH, Mix
from fewbit.search.proposal import Aids, Proposal
from fewbit.search.standing import FAR, GAINS_OF_SILU, Pair, Standing
from fewbit.search.trial import Trial
from fewbit.search.weight_widths import Widths
from fewbit.spec import SiluForm

PLAIN = "int8"
BETTER_RANGES = ("int8-moving-average", "int8-percentile", "int8-mse")
CORRECTED = ("int8-equalized",)
RECONSTRUCTED = ("int8-reconstructed",)
WEIGHTS_ONLY = "int8-weights-only"


class Rung(NamedTuple):
    """One row of the ladder."""

    name: str
    propose: Callable[[Standing, Aids], Proposal | None]


class Ladder:
    """The searcher that climbs `RUNGS`.

    Args:
        standing: Makes the view of a history: see `fewbit.search.standing.Standing`.
        aids: What rungs may ask for beside it.
    """

    def __init__(self, standing: Callable[[Sequence[Trial]], Standing], aids: Aids) -> None:
        self._standing, self._aids = standing, aids

    def propose(self, history: Sequence[Trial]) -> Proposal | None:
        """Return the first proposal of the lowest rung that has one."""
        view = self._standing(history)
        for rung in RUNGS:
            proposal = rung.propose(view, self._aids)
            if proposal is not None:
                return proposal
        return None


def float32(view: Standing, _: Aids) -> Proposal | None:
    """Every network in float32 on one engine, the accuracy to keep; on others where it has a hope there."""
    unknown = (
        Pair(n, e)
        for e in view.terms.engines
        for n in view.terms.networks
        if view.float_trial(n) is None and not view.has(n, e, "float32")
    )
    pair = next(unknown, None) or _next_plain(view)
    if pair is None or view.has(*pair, "float32"):
        return None
    return Proposal(
        rung="float32", network=pair.network, engine=pair.engine, recipe="float32", base="float32"
    )


def bf16(view: Standing, _: Aids) -> Proposal | None:
    """The float file in bfloat16 where the host computes in it: no calibration, often no accuracy lost."""
    pair = _next_plain(view)
    if pair is None or not _lacks_bf16(view, pair):
        return None
    return Proposal(
        rung="bf16",
        network=pair.network,
        engine=pair.engine,
        recipe="bf16",
        base="float32",
        float_precision="bf16",
    )


def int8(view: Standing, _: Aids) -> Proposal | None:
    """Plain int8 on every engine that may give the answer; the most promising network first.

    Where bfloat16 was measured and holds the budgets, what stays in float is computed in it.
    """
    pair = _next_plain(view)
    return None if pair is None else _int8_proposal(view, "int8", pair, PLAIN)


def _next_plain(view: Standing) -> Pair | None:
    """Return the most promising pair that float32, bfloat16 or int8 were not tried on, if it has a hope.

    All three are tried on it before the next one, so that the bar is high when the less promising come.
    """
    family, always = Family(view), ("float32", PLAIN)
    new = (
        p
        for p in family.by_promise()
        if _lacks_bf16(view, p) or not all(view.has(*p, name) for name in always)
    )
    return next((p for p in new if family.hopeless(p) is None), None)


def _lacks_bf16(view: Standing, pair: Pair) -> bool:
    return pair.engine in view.terms.bf16_engines and not view.has(*pair, "bf16")


def ranges(view: Standing, _: Aids) -> Proposal | None:
    """Better range estimators: the same speed, so only while the budget is not held, or held within noise."""
    return _more_accurate(view, "ranges", BETTER_RANGES)


def corrected(view: Standing, _: Aids) -> Proposal | None:
    """Weights equalized across layers and biases corrected: the same speed again, some seconds dearer."""
    return _more_accurate(view, "corrected", CORRECTED)


def reconstructed(view: Standing, _: Aids) -> Proposal | None:
    """Codes chosen for the layer's output: the dearest step that needs no training, and the most accurate."""
    return _more_accurate(view, "reconstructed", RECONSTRUCTED)


def _more_accurate(view: Standing, rung: str, recipes: Sequence[str]) -> Proposal | None:
    """Recipes of equal speed, where int8 could be the answer and no trial has proven the budget yet."""
    for pair in _climbing(view):
        if any(view.proven(t) for t in view.int8_trials(pair)):
            continue
        for name in recipes:
            proposal = _int8_proposal(view, rung, pair, name)
            if not view.has(proposal.network, proposal.engine, proposal.recipe):
                return proposal
    return None


def weights_only(view: Standing, _: Aids) -> Proposal | None:
    """Weights in int8, arithmetic in float: as small as int8 and nearer to float, but slow; only for size."""
    if view.terms.objective != "size":
        return None
    return _first_new(
        view,
        (
            _int8_proposal(view, "weights-only", p, WEIGHTS_ONLY)
            for p in _climbing(view)
            if not any(view.meets(t) for t in view.int8_trials(p))
        ),
    )


def float_layers(view: Standing, aids: Aids) -> Proposal | None:
    """Leave in float the layers that cost most accuracy: 1, 2, 4, ... of them, then bisect back."""
    for pair in _climbing(view):
        base = view.most_accurate(pair)
        if base is None or any(view.meets(t) for t in view.int8_trials(pair) + view.mixed_trials(pair)):
            continue
        layers = aids.ranking(pair.network, pair.engine, base)
        count = _next_count(view, pair, base, len(layers))
        if count is not None:
            return Proposal(
                rung="float-layers",
                network=pair.network,
                engine=pair.engine,
                recipe=f"{base}-float{count}",
                base=base,
                float_precision=_precision_of(view, pair),
                keep_float=layers[:count],
            )
    return None


def _base_of(trial: Trial) -> str:
    """Return the shipped recipe that a trial's is made from, by its name."""
    name = re.sub(r"(-(float|mixed|widths)\d+|-gelu|-hard-swish)+$", "", trial.recipe)
    return "float32" if name == "bf16" else name


def mixed(view: Standing, aids: Aids) -> Proposal | None:
    """Regions in float that are faster so, or that mend what int8 loses at the least measured time."""
    if aids.mixing is None or view.terms.objective == "size":
        return None
    for pair in _mixable(view):
        base = view.most_accurate(pair)
        if base is None:
            continue
        inside = any(view.meets(t) for t in view.int8_trials(pair))
        precision = _precision_of(view, pair)
        mixes = aids.mixing(pair.network, pair.engine, base, precision)
        chosen = _next_mix(view, pair, base, mixes, inside)
        if chosen is not None:
            return Proposal(
                rung="mixed",
                network=pair.network,
                engine=pair.engine,
                recipe=_mixed_name(base, chosen),
                base=base,
                float_precision=precision,
                keep_float=mixes[chosen].keep_float,
            )
    return None


def _mixed_name(base: str, place: int) -> str:
    return f"{base}-mixed{place}"


def _mixable(view: Standing) -> list[Pair]:
    """Pairs whose int8 is the best there is, or could be if it lost less."""
    best, found = view.best(), _climbing(view)
    if best is not None:
        pair = Pair(best.network, best.setting.engine)
        if pair not in found and any(view.meets(t) for t in view.int8_trials(pair)):
            found.insert(0, pair)
    return found


def _next_mix(view: Standing, pair: Pair, base: str, mixes: Sequence[Mix], inside: bool) -> int | None:
    """Say which choice of a front to measure next, none where no other can matter.

    Where int8 holds the budget, only one that is faster by more than a prediction errs. Else the fastest that
    holds it is searched for by halving, since what a choice loses falls along the front.
    """
    if inside:
        new = mixes and mixes[0].keep_float and mixes[0].ratio < WORTH
        return 0 if new and not view.has(*pair, _mixed_name(base, 0)) else None
    low, high = -1, len(mixes)
    while high - low > 1:
        middle = (low + high) // 2
        trial = view.find(*pair, _mixed_name(base, middle))
        if trial is None and mixes[middle].keep_float:
            return middle
        low, high = (low, middle) if trial is not None and view.meets(trial) else (middle, high)
    return None


def _precision_of(view: Standing, pair: Pair) -> FloatPrecision:
    return "bf16" if view.bf16_holds(pair) else "float32"


def widths(view: Standing, aids: Aids) -> Proposal | None:
    """Fewer bits for weights that can do with fewer; engines read a byte each all the same, so only for size.

    Below the smallest int8 of a network that holds the budget: first with its own rounding, then with codes
    chosen for the layer's output, which costs more and goes further down.
    """
    if aids.widening is None or view.terms.objective != "size":
        return None
    for held in _held_in_int8(view):
        choices = [c for c in aids.widening(held.network) if min(c.bits.values()) < 8]
        proposal = _next_widths(view, held, choices)
        if proposal is not None:
            return proposal
    return None


def _held_in_int8(view: Standing) -> list[Trial]:
    """Return of each network the int8 trial that would be its answer had weights 8 bits or none."""
    before = Standing(view.terms, [t for t in view.trials if t.rung != "widths"], view.refuted)
    found: dict[str, Trial] = {}
    for trial in finalists(before):
        if trial.recipe.startswith(PLAIN):
            found.setdefault(trial.network, trial)
    return list(found.values())


def _next_widths(view: Standing, held: Trial, choices: Sequence[Widths]) -> Proposal | None:
    """Halve along a front for the fewest bytes inside the budget; what is too large bounds it as well."""
    pair, base = Pair(held.network, held.setting.engine), _base_of(held)
    kept = held.recipe.removeprefix(base)
    most = _most_bytes(view, held.network)
    count = _count_smaller(held, choices, most)
    again = () if base in (*RECONSTRUCTED, WEIGHTS_ONLY) else RECONSTRUCTED
    names = {r: [f"{r}{kept}-widths{place}" for place in range(count)] for r in (base, *again)}
    tried = {r: [view.find(*pair, name) for name in row] for r, row in names.items()}

    def bounds(trial: Trial) -> bool:  # roundings differ little in bytes: too large in one is so in all
        return view.meets(trial) or trial.counted_bytes >= most or _unseen(trial)

    high = min((p for row in tried.values() for p, t in enumerate(row) if t and bounds(t)), default=count)
    for rounding, row in tried.items():
        outside = (p for p, t in enumerate(row) if t and not view.meets(t) and not _unseen(t))
        low = max(outside, default=-1)
        if high - low > 1:
            middle = (low + high) // 2
            return Proposal(
                rung="widths",
                network=pair.network,
                engine=pair.engine,
                recipe=names[rounding][middle],
                base=rounding,
                float_precision=held.setting.float_precision,
                keep_float=held.keep_float,
                bits=tuple(choices[middle].bits.items()),
            )
    return None


def _unseen(trial: Trial) -> bool:
    """Say whether it was dropped before any image was run: by its size, so its accuracy is not known."""
    return trial.state == "dropped" and trial.accuracy is None


def _most_bytes(view: Standing, network: str) -> int:
    """Return the bytes that fewer bits have to beat: those of the best that has none of this network's."""
    own = {t.key for t in view.trials if t.rung == "widths" and t.network == network}
    return next(t for t in view.ranked() if t.key not in own).counted_bytes


def _count_smaller(held: Trial, choices: Sequence[Widths], most: int) -> int:
    """Say how many choices may give a file of fewer bytes, by what they spare of one in 8 bits."""
    if not choices:
        return 0
    # The smallest choice has one width for all, so its bytes tell how many weights there are.
    weights = choices[0].code_bytes * 8 / min(choices[0].bits.values())
    return sum(held.bytes - weights + choice.code_bytes < most for choice in choices)


def activations(view: Standing, _: Aids) -> Proposal | None:
    """SiLU as functions like it, on the fastest trial; where that misses, on the most accurate as fast.

    In int8 and in float apart: which of them is the faster one may change with the function.
    """
    inside: dict[tuple[Pair, bool], list[Trial]] = {}
    for trial in view.ranked():
        if trial.silu is None and trial.takes == "float32":
            pair = Pair(trial.network, trial.setting.engine)
            inside.setdefault((pair, trial.recipe.startswith("int8")), []).append(trial)
    for (pair, _integers), trials in inside.items():
        if view.silu_gain(pair) == 1.0:
            continue
        as_fast = [t for t in trials if view.value(t) > FAR * view.value(trials[0])]
        for trial in (trials[0], min(as_fast, key=view.excess)):
            proposal = _next_form(view, pair, trial)
            if proposal is not None:
                return proposal
            nearest = view.find(*pair, _silu_name(trial, next(iter(GAINS_OF_SILU))))
            if nearest is None or view.meets(nearest):
                break
    return None


def _next_form(view: Standing, pair: Pair, trial: Trial) -> Proposal | None:
    """The nearest function first, the next where that holds the budget; while one left may be the best."""
    best, left = view.best(), list(GAINS_OF_SILU)
    while best is not None and left:
        name = _silu_name(trial, left[0])
        tried = view.find(*pair, name)
        if tried is None:
            if view.value(trial) * max(GAINS_OF_SILU[form] for form in left) <= view.value(best):
                return None
            return _like(trial, "activations", name).model_copy(update={"silu": left[0]})
        if not view.meets(tried):
            return None
        left.pop(0)
    return None


def _silu_name(trial: Trial, form: SiluForm) -> str:
    return f"{trial.recipe}-{form.replace('_', '-')}"


def pixels(view: Standing, _: Aids) -> Proposal | None:
    """The best of each pair fed with pixels as they are, where that may make it the best of all."""
    if "uint8" not in view.terms.inputs or view.terms.objective == "size":
        return None
    seen, best = set[Pair](), view.best()
    for trial in finalists(view):
        pair = Pair(trial.network, trial.setting.engine)
        name = f"{trial.recipe}-pixels"
        if trial.takes == "uint8" or pair in seen or best is None:
            continue
        seen.add(pair)
        if view.value(trial) * GAIN_OF_PIXELS > view.value(best) and not view.has(*pair, name):
            return _like(trial, "pixels", name).model_copy(update={"takes": "uint8"})
    return None


def _like(trial: Trial, rung: str, name: str) -> Proposal:
    """Return what a trial was made of, under another name."""
    return Proposal(
        rung=rung,
        network=trial.network,
        engine=trial.setting.engine,
        recipe=name,
        base=_base_of(trial),
        float_precision=trial.setting.float_precision,
        keep_float=trial.keep_float,
        takes=trial.takes,
        silu=trial.silu,
    )


RUNGS: tuple[Rung, ...] = (
    Rung("float32", float32),
    Rung("bf16", bf16),
    Rung("int8", int8),
    Rung("ranges", ranges),
    Rung("corrected", corrected),
    Rung("reconstructed", reconstructed),
    Rung("weights-only", weights_only),
    Rung("mixed", mixed),
    Rung("float-layers", float_layers),
    Rung("widths", widths),
    Rung("activations", activations),
    Rung("pixels", pixels),
)


def _int8_proposal(view: Standing, rung: str, pair: Pair, name: str) -> Proposal:
    """Propose a recipe; what it leaves in float (response norms and the like) is in bf16 where that holds."""
    return Proposal(
        rung=rung,
        network=pair.network,
        engine=pair.engine,
        recipe=name,
        base=name,
        float_precision=_precision_of(view, pair),
    )


def _first_new(view: Standing, proposals: Iterator[Proposal]) -> Proposal | None:
    return next((p for p in proposals if not view.has(p.network, p.engine, p.recipe)), None)


def _climbing(view: Standing) -> list[Pair]:
    """Pairs worth a dearer rung: int8 is faster there than the best inside, and accuracy is what lacks."""
    worth = []
    for pair in view.pairs():
        speed = view.int8_value(pair)
        best = view.best(without=pair)
        if speed is None or view.hopeless(pair.network):
            continue
        hoped = speed * view.silu_gain(pair)
        if (best is None or hoped > view.value(best)) and not view.lacks_more_than_accuracy(pair):
            worth.append((speed, pair))
    return [pair for _, pair in sorted(worth, key=lambda item: -item[0])]


def _next_count(view: Standing, pair: Pair, base: str, layers: int) -> int | None:
    """How many layers to leave in float next: doubling until the budget holds, then bisecting back."""
    tried = {len(t.keep_float): t for t in view.float_layer_trials(pair, base)}
    inside = [count for count, t in tried.items() if view.meets(t)]
    if not inside:
        best = view.best(without=pair)
        count = 1
        while count in tried:
            last = tried[count]
            known = last.timing is not None or view.terms.objective == "size"
            slower = known and best is not None and view.value(last) <= view.value(best)
            if slower or last.state == "failed":
                return None
            count *= 2
        return count if count < layers else None
    top = min(inside)
    low = max((count for count in tried if count < top), default=0)
    return (low + top) // 2 if top - low > max(1, top // 8) else None
