from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import DataError
from fewbit.measure.accuracy import (
    Accuracy,
    Comparison,
    Predictions,
    compare,
    images_to_detect,
    images_to_prove_drop,
    images_to_prove_error,
)
from fewbit.measure.intervals import paired_bound, wilson


def comparison(losses: int, gains: int, total: int, changes: int = 0) -> Comparison:
    return Comparison(
        total=total, losses=losses, gains=gains, label_changes=changes or losses + gains, losses5=1, gains5=2
    )


def test_accuracy_counts_and_interval() -> None:
    accuracy = Accuracy(top1_correct=8300, top5_correct=9700, total=10000)
    assert (accuracy.top1, accuracy.top5) == (0.83, 0.97)
    assert accuracy.interval() == wilson(8300, 10000)
    assert accuracy.interval(k=5, confidence=0.9) == wilson(9700, 10000, 0.9)
    assert accuracy.error_bound() == pytest.approx(1 - wilson(8300, 10000, sides=1).low)
    with pytest.raises(ValueError, match="k is 3: accuracy is counted for k = 1 and k = 5"):
        accuracy.interval(k=3)


def test_no_images_give_no_knowledge() -> None:
    nothing = Accuracy(top1_correct=0, top5_correct=0, total=0)
    assert (nothing.top1, nothing.interval().low, nothing.interval().high) == (0.0, 0.0, 1.0)
    empty = comparison(0, 0, 0)
    assert (empty.top1_drop, empty.interval().low, empty.interval().high, empty.bound()) == (
        0.0,
        -1.0,
        1.0,
        1.0,
    )


def test_versus_is_wider_than_pairing() -> None:
    first = Accuracy(top1_correct=8300, top5_correct=9000, total=10000)
    second = Accuracy(top1_correct=8250, top5_correct=9000, total=10000)
    apart = first.versus(second)
    together = comparison(150, 100, 10000).interval()
    assert apart.low < 0 < 0.005 < apart.high
    assert (apart.high - apart.low) > 3.3 * (together.high - together.low)


def test_predictions_from_logits() -> None:
    logits = np.array(
        [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1], [0, 9, 0, 0, 0, 0]], np.float32
    )
    found = Predictions.from_logits(logits, [5, 5, 0, 5])
    assert found.top1_right.tolist() == [True, False, True, False]
    assert found.top5_right.tolist() == [True, False, True, False]
    assert found.label.tolist() == [5, 0, 0, 1]
    assert found.accuracy() == Accuracy(top1_correct=2, top5_correct=2, total=4)


def test_ties_count_for_the_lower_class() -> None:
    logits = np.zeros((6, 6), np.float32)
    found = Predictions.from_logits(logits, np.arange(6))
    assert found.top1_right.tolist() == [True] + [False] * 5
    assert found.top5_right.tolist() == [True] * 5 + [False]


def test_a_row_that_is_not_a_number_is_wrong() -> None:
    logits = np.array([[np.nan, 1.0], [np.nan, np.nan], [np.inf, 0.0]])
    found = Predictions.from_logits(logits, [1, 0, 0])
    assert found.top1_right.tolist() == [False, False, True]
    assert found.top5_right.tolist() == [False, False, True]
    assert found.label.tolist() == [-1, -1, 0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 40))
def test_predictions_agree_with_sorting(seed: int, classes: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 4, (images, classes)).astype(np.float32)
    targets = rng.integers(0, classes, images)
    found = Predictions.from_logits(logits, targets)
    ranked = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(found.label, ranked[:, 0])
    assert np.array_equal(found.top1_right, ranked[:, 0] == targets)
    assert np.array_equal(found.top5_right, (ranked[:, :5] == targets[:, None]).any(axis=1))


def test_many_rows_are_judged_in_pieces() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((9001, 3)), rng.integers(0, 3, 9001)
    whole = Predictions.from_logits(logits, targets)
    parts = Predictions.concat(
        [Predictions.from_logits(logits[i : i + 1000], targets[i : i + 1000]) for i in range(0, 9001, 1000)]
    )
    assert np.array_equal(whole.label, parts.label)
    assert whole.accuracy() == parts.accuracy()
    assert len(whole[4000:5000]) == 1000
    assert np.array_equal(whole[np.array([3, 1])].label, whole.label[[3, 1]])
    assert len(Predictions.concat([])) == 0


def test_shapes_and_classes_that_do_not_fit_are_told() -> None:
    with pytest.raises(
        DataError, match=r"^logits \(2, 3\) and targets \(3,\) do not fit; give \(N, classes\) and \(N,\)$"
    ):
        Predictions.from_logits(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(
        DataError, match=r"^targets go from 0 to 3, the network has classes 0 to 2; check its card's"
    ):
        Predictions.from_logits(np.zeros((2, 3)), [0, 3])


def test_compare() -> None:
    rights = np.array([1, 1, 1, 0, 0, 0], bool)
    reference = Predictions(rights, np.ones(6, bool), np.array([0, 1, 2, 3, 4, 5]))
    other = Predictions(
        np.array([1, 0, 0, 1, 0, 0], bool), np.array([1, 1, 0, 1, 1, 1], bool), np.array([0, 9, 9, 7, 8, 5])
    )
    found = compare(reference, other)
    assert found == Comparison(total=6, losses=2, gains=1, label_changes=4, losses5=1, gains5=0)
    assert found.top1_drop == pytest.approx(1 / 6)
    assert found.top5_drop == pytest.approx(1 / 6)
    assert found.flips == pytest.approx(4 / 6)
    same = compare(reference, reference)
    assert (same.flips, same.top1_drop, same.p_value()) == (0.0, 0.0, 1.0)
    with pytest.raises(
        DataError, match=r"^predictions of 6 and of 2 images cannot be paired; run both on the same images$"
    ):
        compare(reference, other[:2])


def test_comparison_of_the_worked_example() -> None:
    found = comparison(150, 100, 10000)
    assert found.top1_drop == 0.005
    assert found.standard_error() == pytest.approx(0.00158035, abs=1e-8)
    assert found.interval().low == pytest.approx(0.0019025, abs=1e-7)
    assert found.interval().high == pytest.approx(0.0080975, abs=1e-7)
    assert found.bound() == pytest.approx(found.interval(confidence=0.9).high)
    assert found.p_value() == pytest.approx(0.0018833, abs=6e-8)
    assert found.p_value(mid_p=True) == pytest.approx(0.0015482, abs=6e-8)
    assert found.p_value(k=5) == 1.0
    assert found.drop(5) == -0.0001


@pytest.mark.parametrize(
    ("drop", "discordant", "images"),
    [
        (0.005, 0.02, 6276),
        (0.01, 0.02, 1567),
        (0.005, 0.05, 15695),
        (0.01, 0.05, 3922),
        (0.005, 0.01, 3137),
        (0.01, 0.01, 782),
    ],
)
def test_images_to_detect(drop: float, discordant: float, images: int) -> None:
    assert images_to_detect(drop, discordant) == images


def test_images_to_prove_an_error() -> None:
    count = images_to_prove_error(0.166, 0.17)
    assert count is not None
    assert wilson(0.166 * count, count, sides=1).high < 0.17
    assert wilson(0.166 * (count - 1), count - 1, sides=1).high >= 0.17
    assert images_to_prove_error(0.17, 0.17) is None
    assert images_to_prove_error(0.2, 0.17) is None


def test_images_to_prove_a_drop() -> None:
    # Far from the small-sample rule the closed form holds: n > z^2 (D - d^2) / (m - d)^2.
    count = images_to_prove_drop(0.005, 0.02, 0.01)
    assert count == pytest.approx(1.644854**2 * (0.02 - 0.005**2) / 0.005**2, abs=1)
    assert images_to_prove_drop(0.01, 0.02, 0.01) is None
    # Without any changed prediction: z^2 (1 - m) / m.
    assert images_to_prove_drop(0.0, 0.0, 0.01) == pytest.approx(1.644854**2 * 0.99 / 0.01, abs=1)
    found = comparison(20, 10, 2000)
    more = found.images_to_prove(0.01)
    assert more is not None and more > 1
    assert paired_bound(20 / 2000 * more, 10 / 2000 * more, more) < 0.01
    assert found.images_to_prove(0.004) is None
    assert comparison(0, 0, 0).images_to_prove(0.01) is None


def test_a_record_survives_json() -> None:
    accuracy, found = Accuracy(top1_correct=3, top5_correct=4, total=5), comparison(1, 2, 30)
    assert Accuracy.model_validate_json(accuracy.model_dump_json()) == accuracy
    assert Comparison.model_validate_json(found.model_dump_json()) == found
