from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.doctor.judge import Judge, helps, versus
from fewbit.doctor.records import Quality
from fewbit.doctor.sample import Sample
from fewbit.measure.accuracy import Accuracy, Comparison

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
TARGETS = np.array([0, 1, 1, 1])


def sample() -> Sample:
    return Sample.of_tensor(torch.arange(4.0).reshape(4, 1, 1, 1), TARGETS, batch=3)


def look_up(table: torch.Tensor):
    return lambda batch: table[batch.flatten().long()]


def test_quality_by_hand() -> None:
    judge = Judge(look_up(LOGITS), sample())
    assert judge.exact.quality.accuracy == Accuracy(top1_correct=3, top5_correct=4, total=4)
    assert (judge.exact.quality.agreement, judge.exact.quality.kl, judge.exact.quality.sqnr_db) == (
        1.0,
        0.0,
        200.0,
    )
    other = LOGITS.clone()
    other[2] = torch.tensor([0.0, 2.0])
    found = judge.judge(look_up(other)).quality
    assert found.accuracy.top1 == 1.0 and found.agreement == 0.75
    p = 1 / (1 + np.exp(-2.0))
    assert found.kl == pytest.approx((2 * p - 1) * 2.0 / 4, rel=1e-5)
    assert found.sqnr_db == pytest.approx(10 * np.log10(16 / 8), rel=1e-5)


def test_verdicts_are_paired() -> None:
    judge = Judge(look_up(LOGITS), sample())
    other = judge.judge(look_up(-LOGITS))
    assert versus(judge.exact, other) == Comparison(
        total=4, losses=3, gains=1, label_changes=4, losses5=0, gains5=0
    )


def quality(kl: float) -> Quality:
    seen = Accuracy(top1_correct=50, top5_correct=90, total=100)
    return Quality(accuracy=seen, agreement=0.9, kl=kl, sqnr_db=10.0)


@pytest.mark.parametrize(
    ("after", "losses", "helpful"), [(0.89, 0, True), (0.91, 0, False), (0.5, 5, True), (0.5, 40, False)]
)
def test_a_remedy_helps_where_harm_falls_and_accuracy_does_not(
    after: float, losses: int, helpful: bool
) -> None:
    seen = Comparison(total=100, losses=losses, gains=3, label_changes=50, losses5=0, gains5=0)
    assert helps(quality(1.0), quality(after), seen) is helpful


def test_the_float_networks_quality_has_no_harm_to_compare() -> None:
    seen = Comparison(total=100, losses=0, gains=0, label_changes=0, losses5=0, gains5=0)
    assert not helps(quality(1.0).of_float(), quality(0.1).of_float(), seen)


def test_samples_are_read_again_in_their_order() -> None:
    some = sample().subset(np.array([3, 1, 0])).first(2)
    assert len(some) == 2 and some.targets.tolist() == [1, 1]
    for _ in range(2):
        assert torch.cat(list(some.batches())).flatten().tolist() == [3.0, 1.0]
