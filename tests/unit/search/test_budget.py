"""Budgets: what parses, what does not, and what it means to be inside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.engines.session import Setting
from fewbit.errors import BudgetError
from fewbit.measure.accuracy import Accuracy, Comparison, Interval
from fewbit.measure.speed import Timing
from fewbit.search.budget import Measured, parse_budget


def _accuracy(top1: int, top5: int, total: int) -> Accuracy:
    return Accuracy(top1_correct=top1, top5_correct=top5, total=total)


def _versus(losses: int, gains: int, total: int) -> Comparison:
    changes = losses + gains
    return Comparison(
        total=total, losses=losses, gains=gains, label_changes=changes, losses5=losses, gains5=gains
    )


def _timing(ms: float) -> Timing:
    return Timing(
        setting=Setting(),
        images_per_s=1000 / ms,
        interval=Interval(low=900 / ms, high=1100 / ms),
        ms_per_batch_p50=ms,
        rounds=5,
        ratio=None,
        ratio_interval=None,
    )


@pytest.mark.parametrize(
    ("text", "measure", "sign", "limit"),
    [
        ("top5-error<=17%", "top5-error", "<=", 0.17),
        ("top1-drop<=1%", "top1-drop", "<=", 0.01),
        ("top1-error<0.25", "top1-error", "<", 0.25),
        ("top1>=75%", "top1", ">=", 0.75),
        (" Top5-Drop ≤ 0.5 % ", "top5-drop", "<=", 0.005),
        ("top5>.9", "top5", ">", 0.9),
        ("bytes<=2MB", "bytes", "<=", 2e6),
        ("bytes<1.5MiB", "bytes", "<", 1.5 * 2**20),
        ("bytes<=4096", "bytes", "<=", 4096),
        ("latency<=5ms", "latency", "<=", 5.0),
        ("latency<=500us", "latency", "<=", 0.5),
        ("top1-drop<=0%", "top1-drop", "<=", 0.0),
        ("top1-error<=100%", "top1-error", "<=", 1.0),
    ],
)
def test_parses(text: str, measure: str, sign: str, limit: float) -> None:
    budget = parse_budget(text)
    assert (budget.text, budget.measure, budget.sign) == (text, measure, sign)
    assert budget.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fast",
            "budget 'fast': is not a measure, a sign and a number; give one like \"top5-error<=17%\" or ",
        ),
        ("", "budget '': is not a measure"),
        ("top5-error<=", "is not a measure, a sign and a number"),
        ("top5-error=17%", "is not a measure, a sign and a number"),
        ("top5-error<=-1%", "is not a measure, a sign and a number"),
        ("top5-error<=1e400%", "is not a measure, a sign and a number"),
        ("top5-eror<=17%", "no measure 'top5-eror' (did you mean 'top5-error'?); allowed are top1-error, "),
        ("top3-error<=17%", "budget 'top3-error<=17%': no measure 'top3-error'"),
        ("top1-drop>=1%", """smaller top1-drop is better; write "top1-drop<=1%\""""),
        ("top1<=75%", """larger top1 is better; write "top1>=75%\""""),
        ("top1-drop<=1", "1 is more than all images; write 1% or a share under 1"),
        ("top1-error<=17", "17 is more than all images; write 17% or a share under 1"),
        ("top1-error<=170%", "170 is more than all images"),
        ("top1-error<=17ms", "top1-error has unit 'ms'; allowed units are %, none"),
        ("latency<=5", "latency has no unit; allowed units are ms, us, s"),
        ("bytes<=2%", "bytes has unit '%'; allowed units are none, b, kb"),
        ("bytes<=0", "nothing is inside a limit of 0"),
    ],
)
def test_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BudgetError) as error:
        parse_budget(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_limit_itself_is_inside_le_and_outside_lt() -> None:
    measured = Measured(accuracy=_accuracy(80, 83, 100))
    assert parse_budget("top5-error<=17%").check(measured).met  # type: ignore[union-attr]
    assert not parse_budget("top5-error<17%").check(measured).met  # type: ignore[union-attr]
    assert parse_budget("top1>=80%").check(measured).met  # type: ignore[union-attr]
    assert not parse_budget("top1>80%").check(measured).met  # type: ignore[union-attr]


@pytest.mark.parametrize(("errors", "images"), [(150, 1000), (806, 5000), (1638, 10000), (8361, 50000)])
def test_proven_is_the_wilson_gate(errors: int, images: int) -> None:
    """The most errors that still prove top-5 error < 17 % at 95 %, as in specs 90, J.2."""
    budget = parse_budget("top5-error<17%")
    most = budget.check(Measured(accuracy=_accuracy(0, images - errors, images)), 0.95)
    over = budget.check(Measured(accuracy=_accuracy(0, images - errors - 1, images)), 0.95)
    assert most is not None and over is not None
    assert (most.met, most.proven, over.met, over.proven) == (True, True, False, False)


def test_confidence_moves_met_but_not_proven() -> None:
    measured = Measured(accuracy=_accuracy(500, 840, 1000))  # 16 % errors of 1000: inside, not proven
    budget = parse_budget("top5-error<=17%")
    met = [check.met for c in (0.5, 0.75, 0.95) if (check := budget.check(measured, c))]
    proven = [check.proven for c in (0.5, 0.75, 0.95) if (check := budget.check(measured, c))]
    assert met == [True, True, False]
    assert proven == [False, False, False]


def test_a_drop_is_paired_and_says_how_many_images_prove_it() -> None:
    budget = parse_budget("top1-drop<=1%")
    check = budget.check(Measured(versus_float=_versus(150, 100, 10000)))
    assert check is not None
    assert check.value == pytest.approx(0.005)
    assert (check.low, check.high) == (pytest.approx(0.0019025, abs=2e-4), pytest.approx(0.0080975, abs=2e-4))
    assert check.met and check.proven and check.images_to_prove is None
    few = budget.check(Measured(versus_float=_versus(15, 10, 1000)))
    assert few is not None and few.met and not few.proven
    assert few.images_to_prove == pytest.approx(2700, rel=0.05)  # (1.645 / 0.005)^2 x 0.025


def test_images_that_would_prove_it_do() -> None:
    budget = parse_budget("top5-error<=17%")
    check = budget.check(Measured(accuracy=_accuracy(0, 840, 1000)))
    assert check is not None and check.images_to_prove is not None
    images = round(check.images_to_prove * 1.05)
    later = budget.check(Measured(accuracy=_accuracy(0, round(images * 0.84), images)))
    assert later is not None and later.proven


def test_size_and_latency() -> None:
    measured = Measured(bytes=1_900_000, timing=_timing(4.0))
    size = parse_budget("bytes<=2MB").check(measured, 0.95)
    latency = parse_budget("latency<=3ms").check(measured, 0.95)
    assert size is not None and size.met and size.value == size.low == size.high == 1_900_000
    assert latency is not None and not latency.met and latency.images_to_prove is None
    assert parse_budget("latency<=3ms").excess(measured) == pytest.approx(1 / 3)


def test_a_latency_is_proven_by_the_interval_of_its_timing() -> None:
    budget = parse_budget("latency<=5ms")
    vague = _timing(4.9).model_copy(update={"ms_interval": Interval(low=4.0, high=6.0)})
    check = budget.check(Measured(timing=vague))
    assert check is not None and check.met and not check.proven and (check.low, check.high) == (4.0, 6.0)
    sharp = vague.model_copy(update={"ms_interval": Interval(low=4.8, high=4.95)})
    check = budget.check(Measured(timing=sharp))
    assert check is not None and check.proven
    sure = budget.check(Measured(timing=vague), 0.95)
    assert sure is not None and not sure.met


def test_what_is_proven_is_so_for_all_networks_looked_at() -> None:
    measured = Measured(versus_float=_versus(30, 28, 10_000))
    budget = parse_budget("top1-drop<=0.2%")
    alone, among = budget.check(measured, 0.95), budget.check(measured, 0.95, looks=16)
    assert alone is not None and alone.proven and alone.met
    assert among is not None and not among.proven and not among.met
    half = budget.check(measured, 0.5, looks=16)
    assert half is not None and half.met


def test_what_was_not_measured_has_no_check() -> None:
    for text in ("top1>=1%", "top1-drop<=1%", "bytes<=2MB", "latency<=3ms"):
        assert parse_budget(text).check(Measured()) is None
        assert parse_budget(text).excess(Measured()) == float("inf")
        assert not parse_budget(text).hopeless(Measured())


def test_hopeless_needs_more_than_noise() -> None:
    budget = parse_budget("top5-error<=10%")
    assert not budget.hopeless(Measured(accuracy=_accuracy(0, 85, 100)))
    assert budget.hopeless(Measured(accuracy=_accuracy(0, 850, 1000)))


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.5, 0.99), st.floats(0.001, 0.5))
def test_met_at_a_higher_confidence_implies_met_at_a_lower(
    losses: int, gains: int, confidence: float, limit: float
) -> None:
    budget = parse_budget(f"top1-drop<={limit:.6f}")
    measured = Measured(versus_float=_versus(losses, gains, 1000))
    sure, point = budget.check(measured, confidence), budget.check(measured, 0.5)
    assert sure is not None and point is not None
    assert point.met or not sure.met
    assert point.met == (budget.excess(measured) <= 1e-9)
