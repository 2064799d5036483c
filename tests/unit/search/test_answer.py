"""From measurements to the answer: who is confirmed first, and what is said where nobody is inside."""

from __future__ import annotations

import pytest

from fewbit.engines.session import EngineName, Setting
from fewbit.measure.accuracy import Accuracy, Comparison, Interval
from fewbit.measure.speed import Timing
from fewbit.search.answer import advice, finalists, holdout_advice, told_apart
from fewbit.search.budget import parse_budget
from fewbit.search.standing import Objective, Standing, Terms, measured
from fewbit.search.trial import Trial, TrialState

IMAGES = 2000


def _trial(
    recipe: str,
    errors: int,
    ratio: float,
    engine: EngineName = "openvino",
    network: str = "net",
    size: int = 1000,
    state: TrialState = "measured",
) -> Trial:
    lost = max(0, errors - 200)
    setting = Setting(engine=engine)
    return Trial(
        key=f"{network}-{engine}-{recipe}",
        network=network,
        recipe=recipe,
        recipe_toml="",
        rung="made",
        setting=setting,
        state=state,
        accuracy=Accuracy(top1_correct=IMAGES - errors, top5_correct=IMAGES - errors // 2, total=IMAGES),
        versus_float=Comparison(
            total=IMAGES, losses=lost, gains=0, label_changes=lost, losses5=lost, gains5=0
        ),
        timing=Timing(
            setting=setting,
            images_per_s=100 * ratio,
            interval=Interval(low=95 * ratio, high=105 * ratio),
            ms_per_batch_p50=10 / ratio,
            rounds=8,
            ratio=ratio,
            ratio_interval=Interval(low=0.95 * ratio, high=1.05 * ratio),
        ),
        bytes=size,
    )


def _view(
    *trials: Trial,
    budgets: tuple[str, ...] = ("top1-drop<=1%",),
    objective: Objective = "throughput",
    confidence: float = 0.5,
) -> Standing:
    terms = Terms(
        networks=tuple(dict.fromkeys(t.network for t in trials)),
        engines=("onnxruntime", "openvino"),
        budgets=tuple(parse_budget(b) for b in budgets),
        objective=objective,
        confidence=confidence,
    )
    return Standing(terms, trials)


def test_the_fastest_inside_first() -> None:
    view = _view(_trial("float32", 200, 1.0), _trial("int8", 260, 4.0), _trial("int8-mse", 205, 3.0))
    assert [t.recipe for t in finalists(view)] == ["int8-mse", "float32"]


def test_equal_speeds_are_told_apart_by_accuracy() -> None:
    view = _view(
        _trial("int8", 212, 3.02), _trial("int8-mse", 203, 3.0), _trial("int8-percentile", 208, 2.98)
    )
    assert [t.recipe for t in finalists(view)] == ["int8-mse", "int8-percentile", "int8"]


def test_of_one_network_the_fewest_changed_predictions_decide() -> None:
    lucky, near = _trial("int8", 200, 3.0), _trial("int8-mse", 202, 3.0)
    assert lucky.versus_float is not None
    flipped = lucky.versus_float.model_copy(update={"losses": 40, "gains": 40, "label_changes": 90})
    lucky = lucky.model_copy(update={"versus_float": flipped})
    assert [t.recipe for t in finalists(_view(lucky, near))] == ["int8-mse", "int8"]


def test_of_two_networks_the_budget_decides() -> None:
    first = _trial("int8", 220, 3.0, network="a")
    second = _trial("int8", 210, 3.0, network="b")
    view = _view(first, second, budgets=("top1-error<=20%",))
    assert [t.network for t in finalists(view)] == ["b", "a"]


def test_for_size_the_smallest_first() -> None:
    view = _view(
        _trial("int8", 205, 3.0, size=1100),
        _trial("int8-weights-only", 205, 0.8, size=1000),
        objective="size",
    )
    assert [t.recipe for t in finalists(view)] == ["int8-weights-only", "int8"]


def test_dropped_and_failed_are_no_finalists() -> None:
    view = _view(_trial("int8", 205, 3.0, state="dropped"), _trial("int8-mse", 205, 3.0, state="failed"))
    assert finalists(view) == []


def test_side_by_side_the_fastest_wins_unless_the_intervals_meet() -> None:
    fast, exact = _trial("int8", 212, 3.0), _trial("int8-mse", 201, 2.9)
    view = _view(fast, exact)
    assert told_apart([(fast, 3.0, 2.95), (exact, 2.9, 2.85)], view) is fast
    assert told_apart([(fast, 3.0, 2.85), (exact, 2.95, 2.8)], view) is exact
    assert told_apart([(fast, 3.0, 1.0), (exact, 2.0, 0.9)], view) is fast  # a wide interval excuses little


def test_advice_names_float32s_own_miss_and_what_would_meet() -> None:
    near = _trial("float32", 200, 1.0)
    view = _view(near, _trial("int8", 237, 3.5), budgets=("top1-error<=5%",))
    assert advice(view, near) == (
        "net in float32 itself misses top1-error<=5% by 5 points, "
        "top1-error<=10% would be met by net float32 on openvino (1.00x float32), "
        "top1-error<=11.9% would be met by net int8 on openvino (3.50x float32)"
    )


def test_advice_at_a_confidence_is_by_the_bound() -> None:
    near = _trial("float32", 200, 1.0)
    view = _view(near, budgets=("top1-error<=10%",), confidence=0.95)
    assert advice(view, near) == (
        "net in float32 itself misses top1-error<=10% at the confidence asked for, "
        "top1-error<=11.2% would be met by net float32 on openvino (1.00x float32)"
    )


def test_advice_on_size_and_latency() -> None:
    near = _trial("int8", 205, 4.0, size=1234567)
    view = _view(_trial("float32", 200, 1.0, size=4000000), near, budgets=("bytes<=1MB", "latency<=1ms"))
    text = advice(view, near)
    assert "bytes<=1234567 would be met by net int8 on openvino (4.00x float32)" in text
    assert "latency<=2.5ms would be met by net int8" in text
    assert "float32 itself" not in text


@pytest.mark.parametrize(
    ("budget", "limit"), [("top1>=95%", "top1>=90%"), ("top1-error<=5%", "top1-error<=10%")]
)
def test_the_limit_that_is_named_would_be_met(budget: str, limit: str) -> None:
    near = _trial("float32", 200, 1.0)
    view = _view(near, budgets=(budget,))
    assert f"{limit} would be met by net float32" in advice(view, near)
    check = parse_budget(limit).check(measured(near))
    assert check is not None and check.met


def test_missed_on_the_holdout_says_what_would_hold() -> None:
    trial = _trial("int8", 230, 3.0)
    text = holdout_advice(_view(trial), measured(trial), "net int8 on openvino")
    assert text == (
        "net int8 on openvino: top1-drop<=1% is missed on the holdout images; top1-drop<=1.5% would hold"
    )
