from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.measure.intervals import paired
from fewbit.sensitivity.drop import Drop, is_right
from fewbit.sensitivity.one_region import Walk
from fewbit.sensitivity.score import ask
from scored import WIDTHS, answers, pictures, regions, tiny


def test_losses_and_gains_are_counted_in_pairs() -> None:
    net = tiny(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    images = pictures(net, 60)
    labels = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(3))
    labels[:30] = answers(net, images[:30])
    batches = [(images[:25], labels[:25]), (images[25:], labels[25:])]
    found = Drop().score(net, batches, regions(net), WIDTHS)
    assert found.counts is not None and found.unit == "drop of top-1" and found.images == 60
    question = ask("Drop", net, [(images, labels)], regions(net), WIDTHS)
    gains = losses = 0
    for one in Walk(question, Drop()).run():
        name = question.regions[one.place[0]].name
        before, after = one.exact.argmax(1) == labels, one.found.argmax(1) == labels
        counts = found.counts[name][one.place[1]]
        assert (counts.losses, counts.gains) == (int((before & ~after).sum()), int((~before & after).sum()))
        assert counts.images == 60
        assert found.losses[name][one.place[1]] == (counts.losses - counts.gains) / 60
        gains, losses = gains + counts.gains, losses + counts.losses
        assert found.losses[name][one.place[1]] in paired(counts.losses, counts.gains, counts.images)
    assert losses > gains > 0


@pytest.mark.parametrize(
    ("logits", "label", "right"),
    [
        ([1.0, 2.0, 0.0], 1, True),
        ([2.0, 2.0, 0.0], 0, True),
        ([2.0, 2.0, 0.0], 1, False),
        ([0.0, float("nan"), 1.0], 2, False),
        ([float("nan")] * 3, 0, False),
        ([float("inf"), 0.0, 0.0], 0, True),
    ],
)
def test_which_answer_is_right(logits: list[float], label: int, right: bool) -> None:
    row: Tensor = torch.tensor([logits])
    assert bool(is_right(row, torch.tensor([label]))) is right
