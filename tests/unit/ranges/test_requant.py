"""One clipping factor by golden section or alternation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import RecipeError
from fewbit.ranges import find_weight_range
from fewbit.ranges.grid_search import SquaredError, best_factor
from fewbit.ranges.requant import REQuant
from fewbit.spec import QuantSpec

WORKED = np.array([0.02, -0.05, 0.11, -0.13, 0.17, -0.21, 0.26, -0.3, 0.33, 1.0])
GAUSS = np.random.RandomState(0).randn(4096)
REACH = float(np.abs(GAUSS).max())
SOLVERS = ["golden", "alternation"]


def symmetric(bits):
    return QuantSpec(bits=bits, symmetric=True, signed=True)


def error_of(x, low, high, spec):
    qmin, qmax = spec.code_range(unsigned=low >= 0)
    if spec.symmetric:
        scale, zero = high / qmax, 0
    else:
        scale = (high - low) / (qmax - qmin)
        zero = np.clip(np.rint(qmin - low / scale), qmin, qmax)
    return float((((np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero) * scale - x) ** 2).mean())


def from_histogram(x, spec, **hyperparameters):
    finder = REQuant(**hyperparameters).start("conv1")
    finder.observe(torch.as_tensor(np.asarray(x), dtype=torch.float32))
    found = finder.find(spec)
    return found.low, found.high


def from_weights(x, spec, **hyperparameters):
    found = find_weight_range(torch.as_tensor(np.asarray(x))[None], spec, 0, REQuant(**hyperparameters))
    return found.low, found.high


@pytest.mark.parametrize("refine", SOLVERS)
@pytest.mark.parametrize(("bits", "alpha", "error"), [(3, 0.91499, 0.0069050), (8, 0.99886, 5.2190e-6)])
def test_worked_vector(bits, alpha, error, refine):
    low, high = from_weights(WORKED, symmetric(bits), refine=refine)
    assert low == -high and high == pytest.approx(alpha, abs=5e-4)
    assert error_of(WORKED, low, high, symmetric(bits)) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("find", [from_histogram, from_weights])
@pytest.mark.parametrize("refine", SOLVERS)
@pytest.mark.parametrize(
    ("bits", "alpha", "error"),
    [
        (2, 0.3173, 0.181163),
        (3, 0.5018, 0.0456062),
        (4, 0.6295, 0.0126206),
        (6, 0.8801, 0.00104267),
        (8, 0.9867, 7.1038e-5),
    ],
)
def test_worked_gaussian(find, bits, alpha, error, refine):
    low, high = find(GAUSS, symmetric(bits), refine=refine)
    assert error_of(GAUSS, low, high, symmetric(bits)) == pytest.approx(
        error, rel=2e-4 if refine == "golden" else 3e-3
    )
    # Alternation ends in the nearest of several valleys; at 8 bits they are a hundredth apart.
    assert high / REACH == pytest.approx(alpha, abs=2e-3 if refine == "golden" else 0.012)


def test_golden_section_evaluates_once_a_narrowing():
    evaluated = []

    def score(factors):
        evaluated.append(len(factors))
        return np.abs(factors - 0.7)

    narrowings = math.ceil(math.log(1e-3 / 0.95) / math.log((5**0.5 - 1) / 2))  # from 0.95 wide to 0.001
    best, _ = best_factor(score, 1, 10, narrowings)
    assert evaluated == [10, *17 * [1]] and best[0] == pytest.approx(0.7, abs=1e-3)


def test_valleys_of_the_worked_gaussian():
    alphas = np.arange(1, 1001) / 1000
    valleys = {}
    for bits in (2, 3, 4, 6, 8):
        errors = [error_of(GAUSS, -a * REACH, a * REACH, symmetric(bits)) for a in alphas]
        inner = np.diff(np.sign(np.diff(errors)))
        valleys[bits] = int((inner > 0).sum())
    assert valleys == {2: 1, 3: 1, 4: 1, 6: 5, 8: 3}


def sample(shape, seed):
    x = np.random.default_rng(seed).standard_normal(2000)
    return {"relu": np.maximum(x, 0), "heavy": x**3, "shifted": x + 1.5}.get(shape, x).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["gauss", "relu", "heavy", "shifted"]),
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from(SOLVERS),
)
def test_never_worse_than_min_max(shape, seed, bits, mirrored, refine):
    x = sample(shape, seed)
    spec = symmetric(bits) if mirrored else QuantSpec(bits=bits)
    least, greatest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if mirrored and least < 0:
        least, greatest = -max(-least, greatest), max(-least, greatest)
    plain = error_of(x, least, greatest, spec)
    bin_ = max(-least, greatest) / 2048
    found = from_histogram(x, spec, refine=refine)
    assert error_of(x, *found, spec) <= plain + 2 * bin_ * np.sqrt(plain) + bin_**2
    if not mirrored or least < 0:
        assert error_of(x, *from_weights(x, spec, refine=refine), spec) <= plain * (1 + 1e-4)


@pytest.mark.parametrize("spec", [symmetric(4), QuantSpec(bits=4)], ids=["symmetric", "asymmetric"])
def test_alternation_ends_where_codes_and_step_agree(spec):
    x = sample("shifted" if not spec.symmetric else "gauss", 3).astype(np.float64)
    low, high = from_weights(x, spec, refine="alternation")
    scale = high / 7 if spec.symmetric else (high - low) / 15
    zero = 0 if spec.symmetric else np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, *spec.code_range()) - zero
    assert float(codes @ x) / float(codes @ codes) == pytest.approx(scale, rel=1e-5)


def test_alternation_never_makes_the_error_larger():
    x = sample("heavy", 1)
    for steps in (10, 40):
        grid = np.arange(1, steps + 1) / steps * np.abs(x).max()
        best = min(error_of(x, -a, a, symmetric(4)) for a in grid)
        for refine in SOLVERS:
            found = from_weights(x, symmetric(4), refine=refine, steps=steps)
            assert error_of(x, *found, symmetric(4)) <= best * (1 + 1e-6)


def test_both_ends_keep_their_ratio():
    x = sample("shifted", 5)
    for find in (from_histogram, from_weights):
        for refine in SOLVERS:
            low, high = find(x, QuantSpec(bits=3), refine=refine)
            assert high < x.max() and low / high == pytest.approx(float(x.min() / x.max()), rel=1e-5)


def test_best_step_of_a_histogram_is_that_of_its_values():
    finder = REQuant(bins=16384).start()
    x = sample("shifted", 6).astype(np.float64)
    finder.observe(torch.tensor(x))
    error = SquaredError(finder.histogram.density(), 15)
    low, high = -0.8, 3.9
    zero = np.rint(0.8 / ((high - low) / 15))
    codes = np.clip(np.rint(x / ((high - low) / 15)) + zero, 0, 15) - zero
    assert error.best_scale(low, high) == pytest.approx(float(codes @ x) / float(codes @ codes), rel=1e-3)


def test_channels_are_searched_each_by_itself():
    rows = torch.tensor(np.stack([sample(s, 7) for s in ("gauss", "heavy", "shifted")] + [np.zeros(2000)]))
    for spec in (symmetric(4), QuantSpec(bits=4, signed=True)):
        for refine in SOLVERS:
            method = REQuant(refine=refine)
            per_channel = spec.model_copy(update={"granularity": "channel"})
            together = find_weight_range(rows.float(), per_channel, 0, method)
            alone = [find_weight_range(row[None].float(), spec, 0, method) for row in rows]
            assert together.high == pytest.approx([r.high for r in alone], rel=1e-6)
            assert together.high[3] == together.low[3] == 0


def test_one_bit_symmetric_codes_are_refused():
    with pytest.raises(RecipeError, match=r"^requant: 1-bit symmetric signed codes hold nothing but 0; give"):
        from_histogram([-1.0, 1.0], symmetric(1))
