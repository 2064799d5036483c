"""The ladder over made histories: which trial comes next, and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from fewbit.engines.session import EngineName, Setting
from fewbit.measure.accuracy import Accuracy, Comparison, Interval
from fewbit.measure.speed import Timing
from fewbit.search.budget import parse_budget
from fewbit.search.ladder import BETTER_RANGES, CORRECTED, RECONSTRUCTED, Ladder, pixels
from fewbit.search.mixed_precision import Mix
from fewbit.search.proposal import Aids, Proposal
from fewbit.search.standing import Objective, Standing, Terms
from fewbit.search.trial import NetworkCost, Trial, TrialState
from fewbit.search.weight_widths import Widths

IMAGES = 4000
FLOAT_ERRORS = 600  # 15 %
LAYERS = tuple(f"conv{i}" for i in range(16))


def trial(
    proposal: Proposal,
    errors: int,
    speed: float,
    state: TrialState = "measured",
    size: int = 1000,
    images: int = IMAGES,
    packed: int = 0,
) -> Trial:
    """A trial whose float32 has 15 % errors and whose every surplus error is a loss."""
    lost = max(0, errors - FLOAT_ERRORS * images // IMAGES)
    setting = Setting(engine=proposal.engine, float_precision=proposal.float_precision, batch=8, threads=2)
    timing = Timing(
        setting=setting,
        images_per_s=speed,
        interval=Interval(low=speed * 0.98, high=speed * 1.02),
        ms_per_batch_p50=8000 / speed,
        rounds=5,
        ratio=speed / 100,
        ratio_interval=Interval(low=speed / 102, high=speed / 98),
        against="float32",
    )
    right = images - errors
    return Trial(
        key=f"{proposal.network}-{proposal.engine}-{proposal.recipe}",
        network=proposal.network,
        recipe=proposal.recipe,
        recipe_toml="",
        rung=proposal.rung,
        setting=setting,
        state=state,
        reason="" if state == "measured" else "made",
        accuracy=None
        if state == "failed"
        else Accuracy(top1_correct=right, top5_correct=right, total=images),
        versus_float=None
        if state == "failed"
        else Comparison(total=images, losses=lost, gains=0, label_changes=lost, losses5=lost, gains5=0),
        timing=None if state == "failed" else timing,
        bytes=size,
        packed_bytes=packed,
        keep_float=proposal.keep_float,
        takes=proposal.takes,
        silu=proposal.silu,
    )


Answers = Callable[[Proposal], Trial]


def climb(
    terms: Terms,
    answer: Answers,
    most: int = 60,
    mixes: Sequence[Mix] | None = None,
    choices: Mapping[str, Sequence[Widths]] | None = None,
) -> list[Trial]:
    """Run the ladder to its end against made measurements."""
    history: list[Trial] = []
    aids = Aids(
        lambda *_: LAYERS,
        None if mixes is None else lambda *_: tuple(mixes),
        None if choices is None else lambda network: tuple(choices.get(network, ())),
    )
    ladder = Ladder(lambda trials: Standing(terms, trials), aids)
    while (proposal := ladder.propose(history)) is not None:
        again = ladder.propose(tuple(history))
        assert again == proposal
        history.append(answer(proposal))
        assert len(history) <= most
    keys = [t.key for t in history]
    assert len(set(keys)) == len(keys)
    return history


def terms(
    *budgets: str,
    networks: tuple[str, ...] = ("net",),
    engines: tuple[EngineName, ...] = ("onnxruntime", "openvino"),
    objective: Objective = "throughput",
    bf16: tuple[EngineName, ...] = (),
) -> Terms:
    return Terms(
        networks=networks,
        engines=engines,
        budgets=tuple(parse_budget(b) for b in budgets),
        objective=objective,
        bf16_engines=bf16,
    )


def names(history: list[Trial]) -> list[tuple[str, str]]:
    return [(t.setting.engine, t.recipe) for t in history]


def test_float32_first_then_int8_then_stops_when_the_budget_is_proven() -> None:
    def answer(p: Proposal) -> Trial:
        fast = {"float32": 100.0, "int8": 300.0}[p.recipe] * (2 if p.engine == "openvino" else 1)
        return trial(p, 602, fast)

    history = climb(terms("top1-drop<=1%"), answer)
    assert names(history) == [
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("openvino", "int8"),  # the engine that was faster in float32 first
        ("onnxruntime", "int8"),
    ]


def test_bf16_is_tried_only_where_the_host_computes_in_it() -> None:
    def answer(p: Proposal) -> Trial:
        return trial(p, 600, 200.0 if p.recipe == "int8" else 100.0)

    with_bf16 = climb(terms("top1-drop<=1%", bf16=("openvino",)), answer)
    assert ("openvino", "bf16") in names(with_bf16)
    assert ("onnxruntime", "bf16") not in names(with_bf16)
    assert next(t for t in with_bf16 if t.recipe == "bf16").setting.float_precision == "bf16"


def test_better_ranges_only_while_the_budget_is_not_held() -> None:
    def answer(p: Proposal) -> Trial:
        errors = {"float32": 600, "int8": 700, "int8-moving-average": 690, "int8-percentile": 601}
        return trial(p, errors.get(p.recipe, 680), 100.0 if p.recipe == "float32" else 300.0)

    history = climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer)
    assert [r for _, r in names(history)] == ["float32", "int8", "int8-moving-average", "int8-percentile"]


def test_held_within_noise_tries_the_rungs_of_equal_speed_too_cheap_ones_first() -> None:
    def answer(p: Proposal) -> Trial:
        return trial(
            p, {"float32": 600, "int8": 638}.get(p.recipe, 637), 100.0 if p.recipe == "float32" else 300.0
        )

    history = climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer)
    rungs = [*BETTER_RANGES, *CORRECTED, *RECONSTRUCTED]
    assert [r for _, r in names(history)] == ["float32", "int8", *rungs]


def test_a_dear_rung_is_not_climbed_once_a_cheaper_one_has_proven_the_budget() -> None:
    def answer(p: Proposal) -> Trial:
        errors = {"float32": 600, "int8-equalized": 601}
        return trial(p, errors.get(p.recipe, 700), 100.0 if p.recipe == "float32" else 300.0)

    tried = [r for _, r in names(climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer))]
    assert tried[-1] == "int8-equalized" and "int8-reconstructed" not in tried


def test_no_layer_is_left_in_float_before_every_rung_of_full_speed_was_tried() -> None:
    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0)
        return trial(p, 601 if p.keep_float else 800, 300.0)

    tried = [r for _, r in names(climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer))]
    first = next(i for i, r in enumerate(tried) if "-float" in r)
    assert set(tried[1:first]) == {"int8", *BETTER_RANGES, *CORRECTED, *RECONSTRUCTED}


def test_a_slower_engine_is_not_climbed_once_the_faster_one_is_inside() -> None:
    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0)
        return trial(p, 601, 400.0) if p.engine == "openvino" else trial(p, 800, 300.0)

    history = climb(terms("top1-drop<=1%"), answer)
    assert ("onnxruntime", "int8") in names(history)
    assert not any(e == "onnxruntime" and r.startswith("int8-") for e, r in names(history))


def test_a_faster_engine_is_climbed_although_the_slower_one_is_inside() -> None:
    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0)
        if p.engine == "onnxruntime":
            return trial(p, 601, 150.0)
        return trial(p, 601 if p.recipe == "int8-mse" else 800, 400.0)

    history = climb(terms("top1-drop<=1%"), answer)
    assert names(history)[-1] == ("openvino", "int8-mse")


def test_layers_left_in_float_double_until_inside_then_bisect_back() -> None:
    def answer(p: Proposal) -> Trial:
        kept = len(p.keep_float)
        if p.recipe == "float32":
            return trial(p, 600, 100.0)
        return trial(p, 601 if kept >= 6 else 800, 300.0 - 10 * kept)

    history = climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer)
    counts = [len(t.keep_float) for t in history if t.keep_float]
    assert counts == [1, 2, 4, 8, 6, 5]
    assert next(t for t in history if len(t.keep_float) == 4).keep_float == LAYERS[:4]


def test_layers_left_in_float_stop_where_they_are_slower_than_what_is_inside() -> None:
    def answer(p: Proposal) -> Trial:
        kept = len(p.keep_float)
        if p.recipe == "float32":
            return trial(p, 600, 250.0)
        return trial(p, 800, 300.0 - 20 * kept)

    history = climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer)
    assert [len(t.keep_float) for t in history if t.keep_float] == [1, 2, 4]


def test_layers_left_in_float_go_on_past_a_race_that_ended_early() -> None:
    def answer(p: Proposal) -> Trial:
        kept = len(p.keep_float)
        if p.recipe == "float32":
            return trial(p, 600, 100.0)
        made = trial(p, 601 if kept >= 2 else 800, 300.0, state="dropped" if kept == 1 else "measured")
        return made.model_copy(update={"timing": None}) if kept == 1 else made

    history = climb(terms("top1-drop<=1%", engines=("onnxruntime",)), answer)
    assert [len(t.keep_float) for t in history if t.keep_float] == [1, 2]


def test_a_slow_moment_does_not_give_a_faster_engine_up() -> None:
    """Its ratio's interval reaches past what is inside already."""

    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0)
        if p.engine == "onnxruntime":
            return trial(p, 601, 300.0)
        return trial(p, 800 if p.recipe == "int8" else 601, 295.0 if p.recipe == "int8" else 320.0)

    history = climb(terms("top1-drop<=1%"), answer)
    assert ("openvino", "int8-moving-average") in names(history)


@pytest.mark.parametrize("errors", [600, 700])
def test_float_layers_are_not_in_bf16_where_that_misses_the_budget(errors: int) -> None:
    def answer(p: Proposal) -> Trial:
        if p.recipe in ("float32", "bf16"):
            return trial(p, errors if p.recipe == "bf16" else 600, 100.0)
        return trial(p, 601 if p.keep_float else 800, 300.0)

    history = climb(terms("top1-drop<=1%", engines=("openvino",), bf16=("openvino",)), answer)
    assert history[-1].setting.float_precision == ("bf16" if errors == 600 else "float32")


@pytest.mark.parametrize(("errors", "wanted"), [(600, "bf16"), (900, "float32")])
def test_what_int8_leaves_in_float_runs_in_bf16_where_that_holds(errors: int, wanted: str) -> None:
    def answer(p: Proposal) -> Trial:
        return trial(p, errors if p.recipe == "bf16" else 600, 100.0)

    history = climb(terms("top1-drop<=1%", bf16=("openvino",)), answer)
    precisions = {(t.setting.engine, t.setting.float_precision) for t in history if t.recipe == "int8"}
    assert precisions == {("onnxruntime", "float32"), ("openvino", wanted)}


def test_float_layers_run_in_bf16_where_native() -> None:
    def answer(p: Proposal) -> Trial:
        if p.recipe in ("float32", "bf16"):
            return trial(p, 600, 100.0)
        return trial(p, 601 if p.keep_float else 800, 300.0)

    history = climb(terms("top1-drop<=1%", engines=("openvino",), bf16=("openvino",)), answer)
    assert history[-1].keep_float == LAYERS[:1]
    assert history[-1].setting.float_precision == "bf16"


def test_a_crash_on_one_engine_costs_only_that_trial() -> None:
    def answer(p: Proposal) -> Trial:
        if p.engine == "openvino" and p.recipe != "float32":
            return trial(p, 0, 1.0, state="failed")
        return trial(p, 601, 100.0 if p.recipe == "float32" else 300.0)

    history = climb(terms("top1-drop<=1%"), answer)
    assert names(history).count(("openvino", "int8")) == 1
    assert not any(e == "openvino" and r.startswith("int8-") for e, r in names(history))
    best = Standing(terms("top1-drop<=1%"), history).best()
    assert best is not None and names([best]) == [("onnxruntime", "int8")]


def test_nothing_runs_and_the_ladder_ends() -> None:
    history = climb(terms("top1-drop<=1%"), lambda p: trial(p, 0, 1.0, state="failed"))
    assert names(history) == [("onnxruntime", "float32"), ("openvino", "float32")]
    assert Standing(terms("top1-drop<=1%"), history).nearest() is None


def test_a_budget_that_float32_misses_clearly_gets_plain_int8_and_no_more() -> None:
    def answer(p: Proposal) -> Trial:
        return trial(p, 600 if p.recipe == "float32" else 610, 100.0 if p.recipe == "float32" else 300.0)

    asked = terms("top5-error<=5%", engines=("onnxruntime",))
    history = climb(asked, answer)
    assert [r for _, r in names(history)] == ["float32", "int8"]
    nearest = Standing(asked, history).nearest()
    assert nearest is not None and nearest.recipe == "float32"


def test_several_networks_the_promising_one_first_the_hopeless_one_never() -> None:
    small, large = "small", "large"

    def answer(p: Proposal) -> Trial:
        errors, speed = (1200, 500.0) if p.network == small else (600, 100.0)
        return trial(p, errors, speed if p.recipe == "float32" else 3 * speed)

    history = climb(terms("top5-error<=17%", networks=(small, large), engines=("onnxruntime",)), answer)
    assert [(t.network, t.recipe) for t in history] == [
        (small, "float32"),
        (large, "float32"),
        (large, "int8"),  # float32 of the small one is far outside, the large one is inside: it ends there
    ]


def test_several_networks_inside_the_fastest_first() -> None:
    def answer(p: Proposal) -> Trial:
        speed = {"a": 100.0, "b": 300.0}[p.network]
        return trial(p, 600, speed if p.recipe == "float32" else 3 * speed)

    history = climb(terms("top5-error<=17%", networks=("a", "b"), engines=("onnxruntime",)), answer)
    assert [t.network for t in history] == ["a", "b", "b", "a"]


@pytest.mark.parametrize("limit", ["bytes<=100", "latency<=1ms"])
def test_better_rounding_is_not_tried_for_what_it_cannot_mend(limit: str) -> None:
    def answer(p: Proposal) -> Trial:
        return trial(p, 600 if p.recipe == "float32" else 800, 100.0 if p.recipe == "float32" else 300.0)

    history = climb(terms("top1-drop<=1%", limit, engines=("onnxruntime",)), answer)
    assert [r for _, r in names(history)] == ["float32", "int8"]


def test_for_size_weights_only_is_a_rung() -> None:
    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0, size=4000)
        near = p.recipe == "int8-weights-only"
        return trial(p, 601 if near else 800, 90.0 if near else 300.0, size=1010 if near else 1050)

    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective="size")
    history = climb(asked, answer)
    best = Standing(asked, history).best()
    assert best is not None and best.recipe == "int8-weights-only"
    assert not any(t.keep_float for t in history)


def test_what_the_holdout_images_refused_is_climbed_past() -> None:
    asked = terms("top1-drop<=1%", engines=("onnxruntime",))
    float32 = Proposal(rung="float32", network="net", engine="onnxruntime", recipe="float32", base="float32")
    plain = Proposal(rung="int8", network="net", engine="onnxruntime", recipe="int8", base="int8")
    history = [trial(float32, 600, 100.0), trial(plain, 601, 300.0)]
    aids = Aids(lambda *_: LAYERS)
    refused = Ladder(lambda trials: Standing(asked, trials, {history[1].key}), aids)
    proposal = refused.propose(history)
    assert proposal is not None and proposal.recipe == BETTER_RANGES[0]
    assert Ladder(lambda trials: Standing(asked, trials), aids).propose(history) is None


def test_a_slow_minute_of_the_machine_does_not_turn_the_order() -> None:
    """The second trial was timed while everything ran at half speed: its ratio to the baseline still wins."""
    asked = terms("top1-drop<=1%")
    first = trial(
        Proposal(rung="int8", network="net", engine="onnxruntime", recipe="int8", base="int8"), 600, 300.0
    )
    second = trial(
        Proposal(rung="int8", network="net", engine="openvino", recipe="int8", base="int8"), 600, 400.0
    )
    assert second.timing is not None
    slow = second.model_copy(
        update={"timing": second.timing.model_copy(update={"images_per_s": 200.0})}  # ratio stays 4
    )
    best = Standing(asked, [first, slow]).best()
    assert best is not None and best.setting.engine == "openvino"


def test_a_race_that_ended_early_is_never_the_answer() -> None:
    asked = terms("top1-drop<=1%", engines=("onnxruntime",))
    plain = Proposal(rung="int8", network="net", engine="onnxruntime", recipe="int8", base="int8")
    dropped = trial(plain, 15, 900.0, state="dropped", images=100)
    view = Standing(asked, [dropped])
    assert view.best() is None
    assert view.nearest() == dropped


# Pixels


def with_pixels(
    speeds: dict[str, float], budget: str = "top1-drop<=2%", objective: Objective = "throughput"
) -> list[Trial]:
    """Climb where a file that takes pixels is a tenth faster."""
    names: tuple[EngineName, ...] = ("onnxruntime", "openvino")
    terms = Terms(
        networks=("net",),
        engines=names,
        budgets=(parse_budget(budget),),
        objective=objective,
        inputs=("float32", "uint8"),
    )

    def answer(proposal: Proposal) -> Trial:
        if proposal.base == "float32":
            return trial(proposal, FLOAT_ERRORS, 100)
        return trial(proposal, 610, speeds[proposal.engine] * (1.1 if proposal.takes == "uint8" else 1.0))

    return climb(terms, answer)


def test_the_best_is_tried_with_pixels_at_the_end() -> None:
    history = with_pixels({"onnxruntime": 200.0, "openvino": 500.0})
    found = [(t.recipe, t.setting.engine, t.takes) for t in history if t.rung == "pixels"]
    assert found == [("int8-pixels", "openvino", "uint8")] and history[-1].rung == "pixels"


def test_another_engine_that_pixels_may_lift_above_the_best_is_tried_too() -> None:
    history = with_pixels({"onnxruntime": 480.0, "openvino": 500.0})
    assert [t.setting.engine for t in history if t.rung == "pixels"] == ["openvino", "onnxruntime"]


def test_pixels_are_not_tried_for_bytes_nor_where_nothing_is_inside() -> None:
    speeds = {"onnxruntime": 200.0, "openvino": 500.0}
    assert not [t for t in with_pixels(speeds, objective="size") if t.rung == "pixels"]
    assert not [t for t in with_pixels(speeds, "top1-error<=10%") if t.rung == "pixels"]


def test_nothing_is_built_on_a_trial_that_takes_pixels() -> None:
    proposal = Proposal(
        rung="pixels", network="net", engine="openvino", recipe="int8-pixels", base="int8", takes="uint8"
    )
    budgets, inputs = (parse_budget("top1-drop<=2%"),), ("float32", "uint8")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=inputs)
    view = Standing(terms, [trial(proposal, 610, 500.0)])
    pair = view.pairs()[0]
    assert view.int8_trials(pair) == [] and view.most_accurate(pair) is None


# Activations

WITH_SILU = NetworkCost(
    network="net", dense_macs=10**8, pointwise_macs=10**8, depthwise_macs=0, weights=10**6, silus=49
)


def with_silu(
    errors: Mapping[str, int],
    engines: tuple[EngineName, ...] = ("openvino",),
    objective: Objective = "throughput",
    cost: NetworkCost = WITH_SILU,
    gelu: float = 1.2,
) -> list[Trial]:
    """Climb where a scaled GELU is faster than SiLU and hard-swish much faster."""
    budget = (parse_budget("top1-drop<=1%"),)
    terms = Terms(
        networks=("net",), engines=engines, budgets=budget, objective=objective, costs=(cost,),
        inputs=("float32", "uint8"),
    )  # fmt: skip

    def answer(proposal: Proposal) -> Trial:
        if proposal.base == "float32" and proposal.silu is None:
            return trial(proposal, FLOAT_ERRORS, 100)
        gains = {None: 1.0, "gelu": gelu, "hard_swish": 1.8}
        speed = 300 * gains[proposal.silu] * (1.05 if proposal.takes == "uint8" else 1.0)
        return trial(proposal, errors.get(proposal.recipe.removesuffix("-pixels"), FLOAT_ERRORS), speed)

    return climb(terms, answer)


def test_silu_is_replaced_by_the_nearest_first_and_then_by_the_fastest() -> None:
    history = with_silu({})
    tried = [(t.rung, t.recipe, t.silu) for t in history[-3:]]
    assert tried == [
        ("activations", "int8-gelu", "gelu"),
        ("activations", "int8-hard-swish", "hard_swish"),
        ("pixels", "int8-hard-swish-pixels", "hard_swish"),
    ]


def test_a_farther_function_is_not_tried_where_the_nearer_is_outside() -> None:
    history = with_silu({"int8-gelu": 700})
    assert [t.recipe for t in history if t.silu] == ["int8-gelu"]
    assert history[-1].recipe == "int8-pixels"


def test_where_only_the_nearest_function_holds_it_is_the_one_with_pixels() -> None:
    history = with_silu({"int8-hard-swish": 700})
    assert [t.recipe for t in history[-3:]] == ["int8-gelu", "int8-hard-swish", "int8-gelu-pixels"]
    assert history[-1].silu == "gelu"


def test_hard_swish_is_hoped_for_where_the_nearest_alone_could_not_win() -> None:
    def answer(proposal: Proposal) -> Trial:
        if proposal.network == "plain":
            return trial(proposal, FLOAT_ERRORS, 100 if proposal.base == "float32" else 330)
        gains = {None: 1.0, "gelu": 1.2, "hard_swish": 1.8}
        return trial(
            proposal, FLOAT_ERRORS, (100 if proposal.base == "float32" else 200) * gains[proposal.silu]
        )

    budget = (parse_budget("top1-drop<=1%"),)
    both = Terms(networks=("plain", "net"), engines=("openvino",), budgets=budget, costs=(WITH_SILU,))
    history = climb(both, answer)
    assert [t.recipe for t in history if t.silu] == ["int8-gelu", "int8-hard-swish"]
    assert {t.network for t in history if t.silu} == {"net"}


def test_plain_int8_is_not_given_up_for_what_a_replaced_silu_may_still_gain() -> None:
    fast = Proposal(rung="int8", network="plain", engine="openvino", recipe="int8", base="int8")
    slow = fast.model_copy(update={"network": "net"})
    trials = [trial(fast, FLOAT_ERRORS, 400), trial(slow, FLOAT_ERRORS, 200)]
    budgets = (parse_budget("top1-drop<=1%"),)
    given: dict[str, Any] = {"networks": ("plain", "net"), "engines": ("openvino",), "budgets": budgets}
    timing = trials[1].timing
    assert timing is not None
    assert Standing(Terms(**given), trials).too_slow("net", timing) is not None
    assert Standing(Terms(**given, costs=(WITH_SILU,)), trials).too_slow("net", timing) is None


def test_float_and_integers_are_tried_apart() -> None:
    budget = (parse_budget("top1-drop<=1%"),)
    one = Terms(
        networks=("net",),
        engines=("openvino",),
        budgets=budget,
        costs=(WITH_SILU,),
        bf16_engines=("openvino",),
    )

    def answer(proposal: Proposal) -> Trial:
        speeds = {"float32": 100, "bf16": 300, "bf16-gelu": 330, "int8": 280, "int8-gelu": 380}
        outside = "hard-swish" in proposal.recipe
        return trial(proposal, 700 if outside else FLOAT_ERRORS, speeds.get(proposal.recipe, 400))

    tried = [t.recipe for t in climb(one, answer) if t.silu]
    assert tried == ["bf16-gelu", "bf16-hard-swish", "int8-gelu", "int8-hard-swish"]


def test_where_the_fastest_misses_with_gelu_the_most_accurate_is_tried() -> None:
    budget = (parse_budget("top1-drop<=1%"),)
    one = Terms(networks=("net",), engines=("openvino",), budgets=budget, costs=(WITH_SILU,))
    errors = {"int8": 636, "int8-gelu": 680, "int8-mse": 615, "int8-mse-gelu": 620}

    def answer(proposal: Proposal) -> Trial:
        speed = 100 if proposal.base == "float32" else 360 if proposal.silu else 300
        speed += 5 * (proposal.recipe == "int8")
        return trial(proposal, errors.get(proposal.recipe, 600 if proposal.base == "float32" else 650), speed)

    history = climb(one, answer)
    forms = [t.recipe for t in history if t.silu]
    assert forms[:2] == ["int8-gelu", "int8-mse-gelu"]


@pytest.mark.parametrize(
    "more",
    [
        {"engines": ("onnxruntime",)},  # it runs SiLU as a sigmoid and a product, both in integers
        {"objective": "size"},
        {"cost": WITH_SILU.model_copy(update={"silus": 0})},
    ],
    ids=lambda more: next(iter(more)),
)
def test_silu_stays_where_nothing_is_to_be_gained(more: dict[str, Any]) -> None:
    assert not [t for t in with_silu({}, **more) if t.silu]


def test_nothing_else_is_built_on_a_trial_without_its_silu() -> None:
    proposal = Proposal(
        rung="activations", network="net", engine="openvino", recipe="int8-gelu", base="int8", silu="gelu"
    )
    budgets = (parse_budget("top1-drop<=2%"),)
    view = Standing(
        Terms(networks=("net",), engines=("openvino",), budgets=budgets), [trial(proposal, 610, 5.0)]
    )
    assert view.int8_trials(view.pairs()[0]) == []


# Mixed precision


def mixes_of(*ratios: float) -> tuple[Mix, ...]:
    """Return a front of one region more in float from choice to choice, with their predicted times."""
    return tuple(
        Mix(
            regions=LAYERS[: place + 1],
            keep_float=LAYERS[: place + 1],
            ms=10 * ratio,
            loss=1.0 / (place + 1),
            ratio=ratio,
        )
        for place, ratio in enumerate(ratios)
    )


def with_mixes(
    mixes: Sequence[Mix] | None,
    needed: int,
    budget: str = "top1-drop<=1%",
    objective: Objective = "throughput",
) -> list[Trial]:
    """Climb where int8 loses 3 points, and `needed` regions in float and more lose none."""
    budget = parse_budget("top1-drop<=1%")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=(budget,), objective=objective)

    def answer(proposal: Proposal) -> Trial:
        if proposal.base == "float32":
            return trial(proposal, FLOAT_ERRORS, 100)
        lossless = len(proposal.keep_float) >= needed
        return trial(proposal, FLOAT_ERRORS if lossless else 720, 500 - 10 * len(proposal.keep_float))

    return climb(terms, answer, mixes=mixes)


def test_the_fastest_mix_that_holds_is_found_by_halving() -> None:
    history = with_mixes(mixes_of(*(1.0 + 0.05 * place for place in range(12))), needed=5)
    tried = [len(t.keep_float) for t in history if t.rung == "mixed"]
    assert min(count for count in tried if count >= 5) == 5 and 4 in tried and len(tried) <= 4
    assert not [t for t in history if t.rung == "float-layers"]


def test_a_mix_that_is_faster_is_tried_where_int8_holds() -> None:
    history = with_mixes(mixes_of(0.85, 0.9, 1.0), needed=0)
    assert [t.recipe for t in history if t.rung == "mixed"] == ["int8-mixed0"]
    assert [t.keep_float for t in history if t.rung == "mixed"] == [LAYERS[:1]]


def test_a_mix_that_is_hardly_faster_is_not_worth_a_trial() -> None:
    assert not [t for t in with_mixes(mixes_of(0.98, 1.0), needed=0) if t.rung == "mixed"]


def test_without_mixes_layers_are_left_in_float_by_rank() -> None:
    for none in (None, ()):
        history = with_mixes(none, needed=4)
        assert not [t for t in history if t.rung == "mixed"]
        assert [t for t in history if t.rung == "float-layers"]


def test_where_no_mix_holds_each_is_tried_but_once() -> None:
    history = with_mixes(mixes_of(1.0, 1.1, 1.2), needed=99)
    tried = [t.recipe for t in history if t.rung == "mixed"]
    assert len(set(tried)) == len(tried) and any(name.endswith("-mixed2") for name in tried)


def test_bytes_are_no_matter_of_regions() -> None:
    assert not [t for t in with_mixes(mixes_of(0.8), 0, objective="size") if t.rung == "mixed"]


def test_what_the_answer_may_not_take_does_not_count() -> None:
    proposal = Proposal(
        rung="pixels", network="net", engine="openvino", recipe="int8-pixels", base="int8", takes="uint8"
    )
    budgets = (parse_budget("top1-drop<=2%"),)
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=("float32",))
    view = Standing(terms, [trial(proposal, 600, 500.0)])
    assert view.best() is None and view.trials == []


def test_a_twin_with_pixels_does_not_stop_the_climb_of_its_own_pair() -> None:
    budgets, inputs = (parse_budget("top1-drop<=1%"),), ("float32", "uint8")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=inputs)
    common = {"network": "net", "engine": "openvino", "base": "int8"}
    float32 = Proposal(rung="float32", network="net", engine="openvino", recipe="float32", base="float32")
    plain = Proposal(rung="int8", recipe="int8", **common)  # type: ignore[arg-type]
    twin = Proposal(rung="pixels", recipe="int8-pixels", takes="uint8", **common)  # type: ignore[arg-type]
    history = [trial(float32, 600, 100.0), trial(plain, 660, 300.0), trial(twin, 638, 320.0)]
    aids = Aids(lambda *_: LAYERS)
    proposal = Ladder(lambda trials: Standing(terms, trials), aids).propose(history)
    assert proposal is not None and proposal.recipe == BETTER_RANGES[0]


@pytest.mark.parametrize(
    ("recipe", "base"),
    [("int8", "int8"), ("int8-mse-float4", "int8-mse"), ("int8-mixed0", "int8"), ("bf16", "float32")],
)
def test_the_recipe_behind_a_trial_is_read_off_its_name(recipe: str, base: str) -> None:
    """As a journal written before there were pixels has nothing else."""
    budgets, inputs = (parse_budget("top1-drop<=1%"),), ("float32", "uint8")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=inputs)
    best = Proposal(rung="int8", network="net", engine="openvino", recipe=recipe, base=base)
    proposal = pixels(Standing(terms, [trial(best, 600, 500.0)]), Aids(lambda *_: LAYERS))
    assert proposal is not None and (proposal.recipe, proposal.base) == (f"{recipe}-pixels", base)


CHOICES = tuple(  # of 800 weights
    Widths(bits={"conv1": bits}, code_bytes=100.0 * bits, loss=1.0 / bits) for bits in range(2, 9)
)


def by_width(
    needed: dict[str, int], objective: Objective = "size", int8_holds: bool = True, most: int = 40
) -> list[Trial]:
    """Climb for size where a rounding holds the budget from a place of the front on."""

    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0, size=4000)
        if not p.bits:
            return trial(p, 600 if int8_holds or len(p.keep_float) > 2 else 900, 300.0, size=1000)
        place = int(p.recipe.rpartition("widths")[2])
        assert dict(p.bits) == CHOICES[place].bits
        holds = place >= needed[p.base]
        return trial(p, 600 if holds else 900, 300.0, size=1010, packed=410 + 100 * place)

    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective=objective)
    return climb(asked, answer, most, choices={"net": CHOICES})


def test_fewer_bits_are_halved_for_first_rounded_then_reconstructed() -> None:
    history = by_width({"int8": 4, "int8-reconstructed": 2})
    tried = [t.recipe for t in history if t.rung == "widths"]
    assert tried == [
        *("int8-widths2", "int8-widths4", "int8-widths3"),  # of 6 places with less than 8 bits
        *("int8-reconstructed-widths1", "int8-reconstructed-widths2"),
    ]
    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective="size")
    best = Standing(asked, history).best()
    assert best is not None and best.recipe == "int8-reconstructed-widths2" and best.counted_bytes == 610


def test_fewer_bits_only_for_size_and_only_below_what_holds() -> None:
    for history in (
        by_width({"int8": 0, "int8-reconstructed": 0}, objective="throughput"),
        by_width({"int8": 0, "int8-reconstructed": 0}, objective="latency"),
    ):
        assert not [t for t in history if t.rung == "widths"]


def test_layers_that_had_to_stay_in_float_stay_so_with_fewer_bits_elsewhere() -> None:
    history = by_width(
        dict.fromkeys(("int8", *BETTER_RANGES, *CORRECTED, *RECONSTRUCTED), 3), int8_holds=False
    )
    narrow = [t for t in history if t.rung == "widths"]
    assert narrow and all(t.keep_float == LAYERS[:3] for t in narrow)
    assert all("-float3-widths" in t.recipe for t in narrow)
    assert [len(t.keep_float) for t in history if t.rung == "float-layers"] == [1, 2, 4, 3]


def test_what_the_holdout_images_refused_is_stepped_over_once() -> None:
    history = by_width({"int8": 4, "int8-reconstructed": 2})
    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective="size")
    refused = {t.key for t in history if t.recipe == "int8-reconstructed-widths2"}
    ladder = Ladder(
        lambda trials: Standing(asked, trials, refused),
        Aids(lambda *_: LAYERS, None, lambda *_: CHOICES),
    )
    following = ladder.propose(history)
    assert following is not None and following.recipe == "int8-reconstructed-widths3"


def test_a_smaller_network_leaves_no_room_for_fewer_bits_of_a_larger_one() -> None:
    choices = {
        "small": [Widths(bits={"conv1": 4}, code_bytes=50.0, loss=1.0)],
        "large": [Widths(bits={"conv1": 4}, code_bytes=500.0, loss=1.0)],
    }

    def answer(p: Proposal) -> Trial:
        small = p.network == "small"
        size = (400 if small else 4000) // (1 if p.recipe == "float32" else 4)
        packed = 0 if not p.bits else 90 if small else 550
        return trial(p, 600, 100.0, size=size, packed=packed)

    asked = terms("top1-drop<=1%", networks=("large", "small"), engines=("onnxruntime",), objective="size")
    history = climb(asked, answer, choices=choices)
    assert not [t for t in history if t.rung == "widths" and t.network == "large"]


def widths_beside(held_by: Mapping[str, int], more: int = 0, drops: bool = True) -> tuple[list[str], Trial]:
    """Climb for size with `small` of 30,000 bytes in int8 and `b` of 65,000, 56,000 of them weights.

    The codes of b take 14,000 bytes at place 0 and 800 more at each next one, beside 9,000 of other bytes and
    `more` that only its files of fewer bits have. It holds the budget from the given places on; a file
    that is larger than a proven one may be dropped before an image is run.
    """
    choices = [
        Widths(bits={"conv1": 2, "fc": min(7, 2 + place)}, code_bytes=14_000.0 + 800 * place, loss=1.0)
        for place in range(26)
    ]

    def answer(p: Proposal) -> Trial:
        int8 = 30_000 if p.network == "small" else 65_000
        if not p.bits:
            return trial(p, 600, 100.0, size=int8 * (4 if p.recipe == "float32" else 1))
        place = int(p.recipe.rpartition("widths")[2])
        packed = 23_000 + more + 800 * place
        errors = 600 if place >= held_by[p.base] else 900
        found = trial(p, errors, 100.0, size=int8 + more, packed=packed)
        unseen = {"state": "dropped", "accuracy": None, "versus_float": None}
        return found.model_copy(update=unseen) if drops and packed >= 30_000 else found

    asked = terms("top1-drop<=1%", networks=("b", "small"), engines=("onnxruntime",), objective="size")
    history = climb(asked, answer, choices={"b": choices})
    best = Standing(asked, history).best()
    assert best is not None
    return [t.recipe for t in history if t.rung == "widths"], best


@pytest.mark.parametrize("drops", [True, False])
def test_choices_that_are_too_large_with_the_rest_of_the_file_are_no_choices(drops: bool) -> None:
    tried, best = widths_beside({"int8": 5, "int8-reconstructed": 5}, drops=drops)
    assert tried == [
        *("int8-widths4", "int8-widths6", "int8-widths5"),  # of 9 with less than 30,000 bytes
        *("int8-reconstructed-widths2", "int8-reconstructed-widths3", "int8-reconstructed-widths4"),
    ]
    assert (best.network, best.recipe, best.counted_bytes) == ("b", "int8-widths5", 27_000)


def test_what_came_out_too_large_turns_to_smaller_choices() -> None:
    """Files of fewer bits have 4,000 bytes more than int8 lets expect: only places 0 to 3 are small enough.

    Where one was run on images all the same and is outside, the smaller ones are so too.
    """
    tried, best = widths_beside({"int8": 3, "int8-reconstructed": 2}, more=4000)
    assert tried == [
        *("int8-widths4", "int8-widths1", "int8-widths2", "int8-widths3"),
        *("int8-reconstructed-widths1", "int8-reconstructed-widths2"),
    ]
    assert (best.network, best.recipe, best.counted_bytes) == ("b", "int8-reconstructed-widths2", 28_600)
    tried, best = widths_beside({"int8": 9, "int8-reconstructed": 9}, more=9000)
    assert tried == ["int8-widths4", "int8-widths1", "int8-widths0"] and best.recipe == "int8"
    tried, best = widths_beside({"int8": 9, "int8-reconstructed": 9}, more=9000, drops=False)
    assert tried == ["int8-widths4", "int8-reconstructed-widths1"] and best.network == "small"
