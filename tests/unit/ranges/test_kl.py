"""Thresholds of least relative entropy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import RecipeError
from fewbit.ranges import find_weight_range
from fewbit.ranges.kl import KL, relative_entropies
from fewbit.spec import QuantSpec

TOY = [40, 30, 20, 12, 8, 5, 3, 2, 1, 0, 0, 0, 0, 0, 0, 1]
SIGNED = QuantSpec(symmetric=True, signed=True)


def by_definition(counts, groups):
    """D(i), bin by bin."""
    h, found = np.asarray(counts, np.float64), []
    for i in range(groups, len(h) + 1):
        p, q = h[:i].copy(), np.zeros(i)
        p[-1] += h[i:].sum()
        for k in range(groups):
            part = slice(k * i // groups, (k + 1) * i // groups)
            full = h[part] > 0
            if full.any():
                q[part] = np.where(full, h[part].sum() / full.sum(), 0)
        if q.sum() == 0 or (q[p > 0] == 0).any():
            found.append(np.inf)
            continue
        p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
        found.append(float((p * np.log(p / q)).sum()))
    return found


def observe(x, **hyperparameters):
    finder = KL(**hyperparameters).start("conv1")
    finder.observe(torch.as_tensor(np.asarray(x), dtype=torch.float32))
    return finder


def test_worked_toy():
    worked = [0.0782185, 0.0280233, 0.0230844, 0.0194711, 0.0203862, 0.0187622, *6 * [np.inf], 0.0923843]
    found = relative_entropies(TOY, 4)
    assert found == pytest.approx(worked, abs=6e-8)
    assert int(np.argmin(found)) + 4 == 9


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 7, 1000]), min_size=8, max_size=60),
    st.integers(1, 8),
    st.integers(1, 9),
)
def test_equals_the_definition(counts, groups, last):
    assert relative_entropies([*counts, last], groups) == pytest.approx(
        by_definition([*counts, last], groups), abs=1e-11
    )


def test_equals_the_definition_across_blocks():
    counts = np.random.default_rng(0).poisson(300 * np.exp(-np.arange(700) / 100))
    counts[-1] = 1
    assert relative_entropies(counts, 128) == pytest.approx(by_definition(counts, 128), abs=1e-11)


def test_the_range_is_the_last_best_threshold():
    x = np.random.default_rng(1).standard_normal(50000).astype(np.float32)
    finder = observe(x, bins=1024)
    width = finder.histogram.width
    counts = np.bincount(np.trunc(np.abs(x) / width).astype(int)).astype(float)
    counts[0] = counts[1]
    divergences = np.array(by_definition(counts, 128))
    best = 128 + int(np.flatnonzero(divergences == divergences.min())[-1])
    found = finder.find(SIGNED)
    assert found.high == -found.low == pytest.approx(min((best + 0.5) * width, np.abs(x).max()))


def test_of_equal_thresholds_the_last_is_taken():
    # As many bins as groups up to the largest value: nothing is coarsened, so D(last) = 0, and only there.
    x = (np.arange(1, 2049) - 0.5) / 2048
    found = observe(np.repeat(x, 10), bins=1024).find(QuantSpec())
    assert found.high == pytest.approx(x.max(), rel=1e-3)


def test_outliers_are_clipped():
    x = np.random.default_rng(2).standard_normal(100000)
    x[:3] = 40
    found = observe(x).find(SIGNED)
    assert 3 < found.high < 10
    low, high = (observe(x).find(QuantSpec()).low, observe(x).find(QuantSpec()).high)
    assert high == found.high and low == pytest.approx(x.min())  # the threshold lies beyond the low end


def test_exact_zeros_do_not_matter():
    x = np.maximum(np.random.default_rng(3).standard_normal(200000), 0)
    many = np.concatenate([x, np.zeros(500000)])
    assert observe(x).find(QuantSpec()) == observe(many).find(QuantSpec())


def test_groups_of_what_is_never_negative():
    x = np.abs(np.random.default_rng(4).standard_normal(200000)) ** 1.5
    for bits in (4, 8):
        spec = QuantSpec(bits=bits)
        fewer = QuantSpec(bits=bits - 1)
        assert observe(x, unsigned_groups="half").find(spec) == observe(x).find(fewer)
        assert observe(x).find(spec).low == 0
        both = np.concatenate([x, -x])
        mirrored = observe(both).find(QuantSpec(bits=bits, symmetric=True, signed=True))
        assert mirrored.high == pytest.approx(observe(x).find(fewer).high, rel=1e-9)


def test_fewer_bits_clip_more():
    x = np.random.default_rng(5).laplace(size=200000)
    highs = [observe(x).find(QuantSpec(bits=b, symmetric=True, signed=True)).high for b in (3, 4, 6, 8)]
    assert highs == sorted(highs) and highs[0] < 0.7 * highs[-1]


def test_the_cut_into_batches_does_not_matter():
    x = torch.tensor(np.random.default_rng(6).standard_normal(3000), dtype=torch.float32)
    finder = KL(values_per_bin=0).start()
    for part in x.split(77):
        finder.observe(part)
    found = finder.find(SIGNED)
    assert found == observe(x, values_per_bin=0).find(SIGNED) and found.high < float(x.abs().max())


@pytest.mark.parametrize("x", [[1.0, -2.0], np.linspace(-1, 3, 100), np.full(50000, 1e-37)])
def test_too_few_values_or_bins_take_their_extremes(x):
    found = observe(x).find(QuantSpec())
    assert found.low == pytest.approx(min(0.0, min(x))) and found.high == pytest.approx(max(x))


def test_values_that_a_histogram_needs():
    x = np.random.default_rng(7).laplace(size=12000)
    x[0] = np.abs(x).max() * 1.01
    bins = len(observe(x).histogram.magnitudes().counts)
    enough, few = 12000 / bins - 0.01, 12000 / bins + 0.01
    assert observe(x, values_per_bin=enough).find(SIGNED).high < 0.95 * x[0]
    assert observe(x, values_per_bin=few).find(SIGNED).high == pytest.approx(x[0])
    zeros = np.concatenate([x, np.zeros(12000)])
    assert observe(zeros, values_per_bin=few).find(SIGNED).high == pytest.approx(x[0])


def test_weights_are_refused():
    text = (
        "^kl: finds ranges of activations only, for a weight tensor has too few values for its histogram; "
        "give weights another method, such as 'mse'$"
    )
    with pytest.raises(RecipeError, match=text):
        find_weight_range(torch.ones(3, 4), SIGNED, 0, "kl")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=80), st.integers(2, 8))
def test_few_values_when_asked_for_stay_within_their_extremes(values, bits):
    finder = observe(values, values_per_bin=0)
    reach, float32 = max(map(abs, values)), 1 + 1e-6
    found = finder.find(QuantSpec(bits=bits))
    assert -reach * float32 <= found.low <= 0 <= found.high <= reach * float32
    mirrored = finder.find(QuantSpec(bits=bits, symmetric=True, signed=True))
    assert mirrored.high <= reach * float32 and (mirrored.low == -mirrored.high or min(values) >= 0)
    assert (mirrored.high > 0) == (any(v < 0 for v in values) or max(values) > 0)
