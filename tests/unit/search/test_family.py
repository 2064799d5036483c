"""Families: forecasts against what was measured elsewhere, and races that forecasts must not turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fewbit.engines.session import EngineName, Setting
from fewbit.measure.accuracy import Accuracy, Comparison, Interval
from fewbit.measure.host import Host
from fewbit.measure.speed import Timing
from fewbit.search.budget import parse_budget
from fewbit.search.family import GAIN_OF_PIXELS, Family, most_matrix_gain, new_ones
from fewbit.search.ladder import BETTER_RANGES, CORRECTED, PLAIN, RECONSTRUCTED, Ladder
from fewbit.search.proposal import Aids, Proposal, Widening
from fewbit.search.standing import Pair, Standing, Terms
from fewbit.search.trial import NetworkCost, Trial
from fewbit.search.weight_widths import WIDTHS, Widths

IMAGES, FLOAT_ERRORS = 4000, 400
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")
AMX: tuple[tuple[EngineName, float], ...] = (("onnxruntime", 8.0), ("openvino", 16.0))

# Network -> (multiplications in matrix work, float32 images/s on ONNX Runtime, the best int8 of ONNX Runtime
# and of OpenVINO, bfloat16 of OpenVINO), 224 x 224, batch 8, one thread of a Xeon with AMX.
MEASURED = {
    "resnet18": (1.81e9, 43.0, 128.0, 467.0, 262.0),
    "resnet50": (4.09e9, 18.0, 60.0, 178.0, 106.0),
    "mobilenet_v2": (0.28e9, 144.0, 299.0, 525.0, 413.0),
    "efficientnet_b0": (0.36e9, 74.5, 102.0, 146.0, 135.0),
    "shufflenet_v2": (0.14e9, 231.0, 409.0, 541.0, 505.0),
    "googlenet": (1.5e9, 50.0, 142.0, 494.0, 261.0),
    "densenet121": (2.83e9, 21.0, 31.0, 157.0, 107.0),
    "squeezenet": (0.35e9, 178.0, 377.0, 1050.0, 679.0),
    "mobilenet_v3": (0.05e9, 553.0, 440.0, 1110.0, 1167.0),
}


def cost(name: str, macs: float = 1e9, weights: int = 1000) -> NetworkCost:
    return NetworkCost(
        network=name, dense_macs=int(macs), pointwise_macs=0, depthwise_macs=0, weights=weights
    )


def terms(names: Sequence[str], *budgets: str, **more: Any) -> Terms:
    given: dict[str, Any] = {"engines": ENGINES, "gains": AMX, "costs": tuple(cost(n) for n in names)}
    parsed = tuple(parse_budget(b) for b in budgets)
    return Terms(networks=tuple(names), budgets=parsed, **(given | more))


def trial(
    network: str,
    engine: EngineName,
    recipe: str,
    speed: float,
    baseline: float,
    errors: int = FLOAT_ERRORS,
    size: int = 4000,
    **more: Any,
) -> Trial:
    setting = Setting(engine=engine, batch=8, threads=2)
    ratio, lost, right = speed / baseline, max(0, errors - FLOAT_ERRORS), IMAGES - errors
    fields: dict[str, Any] = {
        "key": f"{network}-{engine}-{recipe}",
        "network": network,
        "recipe": recipe,
        "recipe_toml": "",
        "rung": "made",
        "setting": setting,
        "state": "measured",
        "accuracy": Accuracy(top1_correct=right, top5_correct=right, total=IMAGES),
        "versus_float": Comparison(
            total=IMAGES, losses=lost, gains=0, label_changes=lost, losses5=lost, gains5=0
        ),
        "timing": Timing(
            setting=setting,
            images_per_s=speed,
            interval=Interval(low=0.98 * speed, high=1.02 * speed),
            ms_per_batch_p50=8000 / speed,
            rounds=5,
            ratio=ratio,
            ratio_interval=Interval(low=0.98 * ratio, high=1.02 * ratio),
        ),
        "bytes": size,
    }
    return Trial(**(fields | more))


# Forecasts


@pytest.mark.parametrize("seen", [0, 1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_measured_network_is_inside_its_forecast(engine: EngineName, seen: int) -> None:
    """Whatever was measured before: the first network, or any others."""
    names, rng = list(MEASURED), np.random.default_rng(0)
    asked = terms(names, "top1-drop<=1%", costs=tuple(cost(n, MEASURED[n][0]) for n in names))
    floats = [trial(n, "onnxruntime", "float32", MEASURED[n][1], MEASURED[n][1]) for n in names]
    for name in names:
        fast = MEASURED[name][2 if engine == "onnxruntime" else 3]
        most = max(fast, MEASURED[name][4]) if engine == "openvino" else fast
        for _ in range(12):
            others = rng.choice([n for n in names if n != name], seen, replace=False)
            known = [
                trial(n, engine, PLAIN, MEASURED[n][2 if engine == "onnxruntime" else 3], MEASURED[n][1])
                for n in others.tolist()
            ]
            found = Family(Standing(asked, floats + known)).forecast(Pair(name, engine))
            assert found is not None
            assert found.low <= fast and most <= found.high, (name, others, found)
            assert found.low <= found.likely <= found.high


def test_the_bound_by_hand() -> None:
    """`slow` multiplies at a tenth of the rate of `fast`: 13 % of its time is matrix work."""
    names = ("fast", "slow")
    asked = terms(names, "top1-drop<=1%")
    floats = [
        trial("fast", "openvino", "float32", 100.0, 100.0),
        trial("slow", "openvino", "float32", 10, 10),
    ]
    family = Family(Standing(asked, floats))
    fast, slow = (family.forecast(Pair(n, "openvino")) for n in names)
    assert fast is not None and slow is not None
    bound = 1 / (0.13 / 16 + 0.87 / 4)
    assert fast.high == pytest.approx(100 * 16 * 1.1) and fast.low == pytest.approx(100 * 16 / 8)
    assert slow.high == pytest.approx(10 * bound * 1.1) and slow.low == pytest.approx(10 * bound / 8)
    # The fast one gained 2 of 16: the slow one yields at most 4 times that, and at least a quarter.
    seen = Family(Standing(asked, [*floats, trial("fast", "openvino", PLAIN, 200.0, 100.0)]))
    known = seen.forecast(Pair("slow", "openvino"))
    assert known is not None
    assert known.high == pytest.approx(10 * bound * 4 / 8 * 1.1)
    assert known.low == pytest.approx(10 * bound / 8 / 4) and known.likely == pytest.approx(10 * bound / 8)
    # What was measured on one engine says nothing of another.
    other = Pair("slow", "onnxruntime")
    assert seen.forecast(other) == family.forecast(other)


def test_more_seen_than_the_prior_allows_raises_it() -> None:
    asked = terms(("a", "b"), "top1-drop<=1%")
    history = [trial(n, "openvino", "float32", 100.0, 100.0) for n in ("a", "b")]
    history.append(trial("a", "openvino", PLAIN, 3200.0, 100.0))
    found = Family(Standing(asked, history)).forecast(Pair("b", "openvino"))
    assert found is not None and found.high == pytest.approx(100 * 16 * 2 * 1.5 * 1.1)


def test_pixels_and_a_limit_of_latency_may_come_on_top() -> None:
    floats = [trial("a", "openvino", "float32", 100.0, 100.0)]

    def high(*budgets: str, **more: Any) -> float:
        found = Family(Standing(terms(("a",), *budgets, **more), floats)).forecast(Pair("a", "openvino"))
        assert found is not None
        return found.high

    plain = high("top1-drop<=1%")
    assert high("top1-drop<=1%", inputs=("float32", "uint8")) == pytest.approx(GAIN_OF_PIXELS * plain)
    assert high("top1-drop<=1%", "latency<=9000ms") == pytest.approx(2 * plain)


@pytest.mark.parametrize(
    ("engine", "machine", "isa", "gain"),
    [
        ("openvino", "x86_64", ("avx2", "amx_int8"), 16.0),
        ("onnxruntime", "x86_64", ("avx2", "amx_int8"), 8.0),
        ("openvino", "x86_64", ("avx512_vnni",), 8.0),
        ("onnxruntime", "arm64", ("neon", "i8mm"), 16.0),
    ],
)
def test_the_prior_is_the_hosts(engine: EngineName, machine: str, isa: tuple[str, ...], gain: float) -> None:
    host = Host(cpu="x", machine=machine, isa=isa, cores=2, memory_bytes=1, os="Linux")
    assert most_matrix_gain(engine, host) == gain


def test_nothing_is_forecast_before_float32_or_without_costs() -> None:
    pair = Pair("a", "openvino")
    assert Family(Standing(terms(("a",)), [])).forecast(pair) is None
    floats = [trial("a", "openvino", "float32", 100.0, 100.0)]
    assert Family(Standing(terms(("a",), costs=()), floats)).forecast(pair) is None
    assert Family(Standing(terms(("a",), gains=()), floats)).forecast(pair) is None


# Who is left out


def found_by(asked: Terms, history: Sequence[Trial]) -> dict[tuple[str, str], str]:
    return {(one.network, one.engine): one.text for one in Family(Standing(asked, history)).left_out()}


def test_too_slow_is_told_with_the_forecast_and_the_speed_to_beat() -> None:
    asked = terms(("quick", "large"), "top1-error<=20%", engines=("openvino",))
    history = [
        trial("quick", "openvino", "float32", 1000.0, 1000.0),
        trial("large", "openvino", "float32", 20.0, 20.0),
        trial("quick", "openvino", PLAIN, 3000.0, 1000.0),
    ]
    (one,) = Family(Standing(asked, history)).left_out()
    assert (one.network, one.engine, one.reason) == ("large", "openvino", "speed")
    assert one.to_beat == pytest.approx(0.98 * 3000)
    assert one.high is not None and one.high < one.to_beat
    assert one.text == (
        f"large on openvino: it may reach {one.low:,.0f} to {one.high:,.0f} images/s, by its multiplications "
        "and float32; quick int8 on openvino runs at 3,000, 2,940 at least"
    )
    # Without the quick one inside the budget there is nothing to beat, so nobody is left out.
    missed = [trial("quick", "openvino", r, 9e3, 9e3, errors=820) for r in ("float32", PLAIN)]
    assert found_by(asked, [*missed, history[1]]) == {}


def test_clearly_inaccurate_is_told_by_how_much() -> None:
    asked = terms(("good", "bad"), "top5-error<=17%", engines=("openvino",))
    history = [
        trial("good", "openvino", "float32", 100.0, 100.0),
        trial("bad", "openvino", "float32", 900.0, 900.0, errors=1200),
    ]
    assert found_by(asked, history) == {
        (
            "bad",
            "openvino",
        ): "bad on openvino: float32 itself misses top5-error<=17% by 13 points, beyond its 99 % interval"
    }


@pytest.mark.parametrize("objective", ["size", "throughput"])
def test_a_budget_of_bytes_is_of_the_file_which_has_a_byte_for_each_weight(objective: Any) -> None:
    costs = (cost("small", weights=1000), cost("large", weights=1100), cost("near", weights=1099))
    names, budgets = ("small", "large", "near"), ("bytes<=1100", "bytes<=9000")
    asked = terms(names, *budgets, engines=("openvino",), objective=objective, costs=costs)
    history = [trial(n, "openvino", "float32", 100.0, 100.0, size=8000) for n in names]
    history.append(trial("small", "openvino", PLAIN, 200.0, 100.0, size=1100))
    assert found_by(asked, history) == {
        ("large", "openvino"): "large on openvino: its weights alone take 1,100 bytes in 8 bits; bytes<=1100"
    }


@pytest.mark.parametrize(
    ("name", "size", "packed", "left_out"),
    [
        (PLAIN, 110_000, 0, {"huge": "440,000"}),
        ("int8-widths3", 112_000, 60_000, {"huge": "440,000", "larger": "60,000"}),
    ],
)
def test_for_size_weights_count_as_packed_in_two_bits(
    name: str, size: int, packed: int, left_out: dict[str, str]
) -> None:
    """`large` needs but 65,000 bytes at 4 bits: eight would have left it out from the first int8 on."""
    weights = {"small": 100_000, "large": 130_000, "larger": 240_000, "near": 239_996, "huge": 440_000 * 4}
    names = tuple(weights)
    costs = tuple(cost(n, weights=count) for n, count in weights.items())
    asked = terms(names, "top1-drop<=1%", engines=("openvino",), objective="size", costs=costs)
    history = [trial(n, "openvino", "float32", 100.0, 100.0, size=4 * weights[n]) for n in names]
    history.append(trial("small", "openvino", PLAIN, 200.0, 100.0, size=110_000))
    if packed:
        more: dict[str, Any] = {"rung": "widths", "packed_bytes": packed}
        history.append(trial("small", "openvino", name, 200.0, 100.0, size=size, **more))
    end = "60,000 with weights packed" if packed else "110,000"
    assert found_by(asked, history) == {
        (n, "openvino"): f"{n} on openvino: its weights alone take {least} bytes packed in 2 bits; "
        f"small {name} on openvino has {end}"
        for n, least in left_out.items()
    }
    out = {one.network: one for one in Family(Standing(asked, history)).left_out()}
    huge = out["huge"]
    assert (huge.reason, huge.low, huge.high, huge.to_beat) == ("bytes", 440_000, 440_000, packed or size)


def test_for_size_a_larger_network_with_fewer_bits_wins() -> None:
    """`small` holds the budget in 8 bits only, `large` in 4: 75,000 bytes against 110,000."""
    weights = {"small": 100_000, "large": 130_000}
    costs = tuple(cost(n, weights=count) for n, count in weights.items())
    asked = terms(tuple(weights), "top1-drop<=1%", engines=("onnxruntime",), objective="size", costs=costs)

    def widening(network: str) -> tuple[Widths, ...]:
        return tuple(
            Widths(bits={"conv0": bits}, code_bytes=weights[network] * bits / 8, loss=1 / bits)
            for bits in WIDTHS
        )

    def measure(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p.network, p.engine, p.recipe, 100.0, 100.0, size=4 * weights[p.network])
        bits = dict(p.bits).get("conv0", 8)
        packed = 10_000 + weights[p.network] * bits // 8 if bits < 8 else 0
        errors = FLOAT_ERRORS if bits >= (8 if p.network == "small" else 4) else 900
        more: dict[str, Any] = {"rung": p.rung, "packed_bytes": packed}
        size = 10_000 + weights[p.network]
        return trial(p.network, p.engine, p.recipe, 300.0, 100.0, errors, size=size, **more)

    best = Standing(asked, _climb(asked, measure, widening)).best()
    assert best is not None and (best.network, best.counted_bytes) == ("large", 75_000)


def test_the_best_itself_and_what_was_quantized_are_never_left_out() -> None:
    asked = terms(("a", "b"), "top1-error<=20%", engines=("openvino",))
    history = [
        trial("a", "openvino", "float32", 5000.0, 5000.0),
        trial("b", "openvino", "float32", 1.0, 1.0),
        trial("b", "openvino", PLAIN, 2.0, 1.0),
    ]
    assert found_by(asked, history) == {}


def test_only_new_ones_are_told() -> None:
    asked = terms(("good", "bad"), "top5-error<=17%")
    history = [
        trial("good", "openvino", "float32", 100.0, 100.0),
        trial("bad", "openvino", "float32", 900.0, 900.0, errors=1200),
    ]
    both = Family(Standing(asked, history)).left_out()
    assert [one.engine for one in both] == list(ENGINES)
    assert new_ones(both[:1], both) == [both[1]] and new_ones(both, both) == []


# Races

RECIPES = (PLAIN, *BETTER_RANGES, *CORRECTED, *RECONSTRUCTED)


class Race:
    """A made family: true gains anywhere inside the prior, and the measurements that a search would see."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        count = int(rng.integers(2, 7))
        self.names = tuple(f"net{i}" for i in range(count))
        macs = np.exp(rng.uniform(np.log(2e7), np.log(4e9), count))
        self.rates = dict(zip(self.names, 1e11 * rng.uniform(0.15, 1, count) / macs, strict=True))
        self.costs = tuple(cost(n, m) for n, m in zip(self.names, macs, strict=True))
        speeds = {c.network: c.matrix_macs * self.rates[c.network] for c in self.costs}
        shares = {n: min(1.0, 1.3 * s / max(speeds.values())) for n, s in speeds.items()}
        self.gains: dict[Pair, dict[str, float]] = {}
        self.errors: dict[tuple[str, str], int] = {}
        fastest = ENGINES[int(rng.integers(2))]
        for engine, most in AMX:
            host = rng.uniform(0.2, 1)
            for name in self.names:
                bound = 1 / (shares[name] / most + (1 - shares[name]) / 4)
                int8 = bound * host * rng.uniform(0.25, 1)
                self.gains[Pair(name, engine)] = {
                    "float32": 1.0 if engine == fastest else rng.uniform(0.4, 1),
                    "bf16": bound * rng.uniform(0.1, 1),
                    "int8": int8,
                    "pixels": rng.uniform(0.98, GAIN_OF_PIXELS),
                }
        for name in self.names:
            floats = int(rng.choice([300, 580, 1200], p=[0.6, 0.2, 0.2]))
            self.errors[name, "float32"] = floats
            for recipe in ("bf16", *RECIPES):
                self.errors[name, recipe] = floats + int(rng.choice([0, 30, 90, 600]))

    def measure(self, proposal: Proposal) -> Trial:
        pair = Pair(proposal.network, proposal.engine)
        recipe, gains = proposal.recipe.removesuffix("-pixels"), self.gains[pair]
        gain = gains["int8" if recipe in RECIPES or proposal.keep_float else recipe]
        if proposal.takes == "uint8":
            gain *= gains["pixels"]
        if proposal.keep_float:
            gain *= 0.9 ** len(proposal.keep_float)
        rate = self.rates[pair.network]
        errors = 2400 if proposal.keep_float else self.errors[pair.network, recipe]
        more = {"keep_float": proposal.keep_float, "takes": proposal.takes}
        return trial(*pair, proposal.recipe, gain * rate, rate, errors, **more)

    def all(self) -> list[Trial]:
        """Measure everything that a search may: no race, no forecast."""
        names = ("float32", "bf16", *RECIPES)
        plain = [
            Proposal(rung="x", network=n, engine=e, recipe=r, base=r)
            for n, e in self.gains
            for r in names
            if r != "bf16" or e == "openvino"
        ]
        pixels = [p.model_copy(update={"recipe": f"{p.recipe}-pixels", "takes": "uint8"}) for p in plain]
        return [self.measure(p) for p in (*plain, *pixels)]

    def climb(self, asked: Terms) -> list[Trial]:
        ladder = Ladder(lambda trials: Standing(asked, trials), Aids(lambda *_: ("conv0", "conv1")))
        history: list[Trial] = []
        while (proposal := ladder.propose(history)) is not None:
            assert ladder.propose(tuple(history)) == proposal  # a killed search goes on the same way
            history.append(self.measure(proposal))
        return history

    def terms(self, budget: str) -> Terms:
        return terms(
            self.names, budget, costs=self.costs, bf16_engines=("openvino",), inputs=("float32", "uint8")
        )


@pytest.mark.parametrize("budget", ["top5-error<=14%", "top1-drop<=1%"])
def test_the_winner_is_never_left_out(budget: str) -> None:
    """Simulated families: the answer is that of measuring everything, with fewer networks quantized."""
    quantized = left = 0
    for seed in range(40):
        race = Race(seed)
        asked = race.terms(budget)
        history = race.climb(asked)
        view, exhaustive = Standing(asked, history), Standing(asked, race.all())
        best, wanted = view.best(), exhaustive.best()
        assert (best is None) == (wanted is None)
        if best is not None and wanted is not None:
            assert view.value(best) == pytest.approx(exhaustive.value(wanted), rel=1e-9), seed
        out = Family(view).left_out()
        assert all(not view.has(one.network, one.engine, PLAIN) for one in out)
        left += len(out)
        quantized += len({(t.network, t.setting.engine) for t in history if t.recipe.startswith("int8")})
    assert left > 0.3 * quantized


def test_the_network_that_promises_most_goes_first_on_its_best_engine() -> None:
    names = ("slow", "quick", "outside")
    asked = terms(names, "top1-error<=14%")
    rates = {"slow": 20.0, "quick": 300.0, "outside": 900.0}

    def measure(p: Proposal) -> Trial:
        gain = 1.0 if p.recipe == "float32" else 4.0 if p.engine == "openvino" else 2.0
        errors = 590 if p.network == "outside" else FLOAT_ERRORS  # 14.75 %: outside, not beyond noise
        return trial(p.network, p.engine, p.recipe, gain * rates[p.network], rates[p.network], errors)

    history = _climb(asked, measure)
    ran = [(t.network, t.setting.engine) for t in history if t.recipe == PLAIN]
    assert ran[0] == ("quick", "openvino")
    assert ("slow", "onnxruntime") not in ran and ("slow", "openvino") not in ran
    assert ("outside", "openvino") in ran[1:]


def test_a_network_clearly_outside_runs_in_float32_on_one_engine_only() -> None:
    asked = terms(("bad", "good"), "top1-error<=14%")

    def measure(p: Proposal) -> Trial:
        errors = 1200 if p.network == "bad" else FLOAT_ERRORS
        return trial(p.network, p.engine, p.recipe, 100.0 if p.recipe == "float32" else 300.0, 100.0, errors)

    history = _climb(asked, measure)
    ran = [(t.network, t.setting.engine) for t in history if t.recipe == "float32"]
    assert ran == [("bad", "onnxruntime"), ("good", "onnxruntime"), ("good", "openvino")]
    out = Family(Standing(asked, history)).left_out()
    assert {(one.network, one.engine) for one in out} == {("bad", engine) for engine in ENGINES}


def test_what_the_holdout_images_refuse_brings_the_others_back() -> None:
    asked = terms(("quick", "large"), "top1-error<=20%", engines=("openvino",))
    history = [
        trial("quick", "openvino", "float32", 1000.0, 1000.0),
        trial("large", "openvino", "float32", 20.0, 20.0),
        trial("quick", "openvino", PLAIN, 3000.0, 1000.0),
    ]
    refuted = {t.key for t in history if t.network == "quick"}
    assert Family(Standing(asked, history)).hopeless(Pair("large", "openvino")) is not None
    assert Family(Standing(asked, history, refuted)).hopeless(Pair("large", "openvino")) is None


def _climb(
    asked: Terms, measure: Callable[[Proposal], Trial], widening: Widening | None = None
) -> list[Trial]:
    ladder = Ladder(lambda trials: Standing(asked, trials), Aids(lambda *_: ("conv0",), None, widening))
    history: list[Trial] = []
    while (proposal := ladder.propose(history)) is not None:
        history.append(measure(proposal))
    return history
