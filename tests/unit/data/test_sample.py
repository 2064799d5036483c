from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewbit.data.sample import Split, choose_balanced, split
from fewbit.errors import DataError

labels = st.lists(st.integers(0, 12), min_size=3, max_size=120).map(lambda found: np.array(found, np.int64))
seeds = st.integers(0, 2**32)


def counts(targets: NDArray[np.int64], chosen: NDArray[np.int64]) -> dict[int, int]:
    return {int(name): int((targets[chosen] == name).sum()) for name in np.unique(targets)}


@given(targets=labels, count=st.integers(0, 150), seed=seeds)
def test_a_choice_is_balanced(targets: NDArray[np.int64], count: int, seed: int) -> None:
    chosen = choose_balanced(targets, count, seed)
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == len(chosen) == min(count, len(targets))
    took, has = counts(targets, chosen), counts(targets, np.arange(len(targets)))
    most = max(took.values())
    assert all(took[name] >= most - 1 or took[name] == has[name] for name in took)


@given(targets=labels, seed=seeds)
def test_a_choice_is_seeded_and_grows(targets: NDArray[np.int64], seed: int) -> None:
    every = choose_balanced(targets, len(targets), seed)
    for count in (1, len(targets) // 2):
        assert (choose_balanced(targets, count, seed) == every[:count]).all()


def test_other_seeds_choose_others() -> None:
    targets = np.repeat(np.arange(10), 100)
    chosen = [set(choose_balanced(targets, 50, seed).tolist()) for seed in range(3)]
    assert len(chosen[0] & chosen[1]) < 15 and len(chosen[1] & chosen[2]) < 15
    first = [choose_balanced(targets, 1, seed).item() for seed in range(200)]
    assert len({one // 100 for one in first}) == 10, "any class may be first"
    assert len(set(first)) > 150, "any image may be first"


def test_one_image_a_class() -> None:
    targets = np.random.default_rng(0).permutation(1000)[:600]
    parts = split(targets, calibration=200, holdout_fraction=0.25, seed=1)
    assert [len(part) for part in (parts.calibration, parts.search, parts.holdout)] == [200, 300, 100]
    assert len(set(targets[parts.calibration].tolist())) == 200


@given(targets=labels, calibration=st.integers(0, 60), share=st.floats(0, 0.9), seed=seeds)
def test_a_split_is_complete_and_disjoint(
    targets: NDArray[np.int64], calibration: int, share: float, seed: int
) -> None:
    left = len(targets) - calibration
    held = max(round(share * left), 1) if share > 0 else 0
    if left - held < 1:
        with pytest.raises(DataError, match="too few"):
            split(targets, calibration, share, seed)
        return
    parts = split(targets, calibration, share, seed)
    together = np.concatenate([parts.calibration, parts.search, parts.holdout])
    assert sorted(together.tolist()) == list(range(len(targets)))
    assert (len(parts.calibration), len(parts.holdout)) == (calibration, held)
    again = split(targets, calibration, share, seed)
    assert all((getattr(parts, name) == getattr(again, name)).all() for name in Split.__dataclass_fields__)


@given(seed=seeds, sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8), share=st.floats(0.05, 0.6))
def test_the_holdout_is_stratified(seed: int, sizes: list[int], share: float) -> None:
    targets = np.repeat(np.arange(len(sizes)), sizes)
    held = counts(targets, split(targets, 0, share, seed).holdout)
    total = sum(held.values())
    for name, size in enumerate(sizes):
        assert abs(held[name] - size * total / len(targets)) <= 1.0 + 1e-9


def test_search_and_holdout_are_shuffled_once() -> None:
    targets = np.repeat(np.arange(10), 1000)
    parts = split(targets, calibration=0, holdout_fraction=0.2, seed=0)
    for part in (parts.search, parts.holdout):
        head = np.bincount(targets[part[: len(part) // 10]], minlength=10)
        assert head.min() > 0, "the first images are of every class, whatever the order of the set"
    assert counts(targets, parts.holdout) == dict.fromkeys(range(10), 200)
    other = split(targets, calibration=0, holdout_fraction=0.2, seed=1)
    assert not np.array_equal(parts.search, other.search)


@pytest.mark.parametrize(
    ("images", "calibration", "share", "message"),
    [
        (
            600,
            600,
            0.2,
            "600 images are too few: 600 to calibrate and 1 to hold out leave none to search with; give more",
        ),
        (0, 0, 0.2, "0 images are too few"),
        (10, 8, 0.99, "10 images are too few: 8 to calibrate and 2 to hold out"),
        (10, 0, 1.0, "holdout fraction is 1.0; give a share from 0 up to, not including, 1"),
        (10, -1, 0.2, "-1 calibration images asked for; give 0 or more"),
    ],
)
def test_splits_that_cannot_be(images: int, calibration: int, share: float, message: str) -> None:
    with pytest.raises(DataError) as caught:
        split(np.zeros(images, np.int64), calibration, share, 0)
    assert message in str(caught.value)
