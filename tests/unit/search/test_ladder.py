"""The ladder over made histories: which trial comes next, and when it stops."""

from __future__ import annotations

import pytest

from fewbit.search.ladder import BETTER_RANGES, CORRECTED, RECONSTRUCTED, Ladder
from fewbit.search.proposal import Aids, Proposal
from fewbit.search.standing import Standing
from fewbit.search.trial import Trial
from made_ladder import LAYERS, climb, names, terms, trial


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
