from __future__ import annotations

import math

import pytest
import torch

from fewbit.doctor.shifts import OutputShift


def test_worked_example() -> None:
    """Channel 0 is 0.3 too high everywhere, channel 1 is off by +-0.4: means 0.3 and 0."""
    exact = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    error = torch.tensor([[0.3, 0.4], [0.3, -0.4], [0.3, 0.4], [0.3, -0.4]])
    shift = OutputShift()
    for part in (slice(0, 1), slice(1, 4)):
        shift.add(exact[part], (exact + error)[part], -1)
    facts = shift.facts()
    assert facts["shift"] == pytest.approx(0.3 / math.sqrt(1 + 4), rel=1e-5)
    assert facts["shift_share"] == pytest.approx(0.09 / (0.09 + 0.16), rel=1e-5)


def test_channels_of_images_lie_on_axis_1() -> None:
    exact = torch.randn((3, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    moved = exact.clone()
    moved[:, 1] += 0.5
    shift = OutputShift()
    shift.add(exact, moved, 1)
    spread = exact.double().transpose(0, 1).flatten(1).var(1, correction=0).sum()
    assert shift.facts()["shift"] == pytest.approx(0.5 / math.sqrt(float(spread)), rel=1e-5)
    assert shift.facts()["shift_share"] == pytest.approx(1.0)


def test_no_error_is_no_shift() -> None:
    shift = OutputShift()
    shift.add(torch.ones(2, 3), torch.ones(2, 3), -1)
    assert shift.facts() == {"shift": 0.0, "shift_share": 0.0}
