"""Ranges of least squared error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import RecipeError
from fewbit.numerics import affine_parameters, symmetric_scale
from fewbit.ranges import find_weight_range
from fewbit.ranges.grid_search import SquaredError
from fewbit.ranges.mse import MSE
from fewbit.spec import QuantSpec

WORKED = np.array([0.02, -0.05, 0.11, -0.13, 0.17, -0.21, 0.26, -0.3, 0.33, 1.0])
GAUSS = np.random.RandomState(0).randn(4096)
WIDTHS = [2, 3, 4, 6, 8]


def symmetric(bits):
    return QuantSpec(bits=bits, symmetric=True, signed=True)


def error_of(x, low, high, spec):
    """The mean squared error of a grid, by its definition."""
    x = np.asarray(x, np.float64)
    unsigned = spec.symmetric and low >= 0
    qmin, qmax = spec.code_range(unsigned)
    if spec.symmetric:
        scale, zero = symmetric_scale(low, high, qmax, signed=not unsigned).astype(np.float64), 0
    else:
        scale, zero = affine_parameters(low, high, qmin, qmax)
    codes = np.clip(np.rint(x / float(scale)) + int(zero), qmin, qmax)
    return float((((codes - int(zero)) * float(scale) - x) ** 2).mean())


def from_histogram(x, spec, **hyperparameters):
    finder = MSE(**hyperparameters).start()
    finder.observe(torch.as_tensor(np.asarray(x), dtype=torch.float32))
    found = finder.find(spec)
    return found.low, found.high


def from_weights(x, spec, **hyperparameters):
    found = find_weight_range(torch.as_tensor(np.asarray(x))[None], spec, 0, MSE(**hyperparameters))
    return found.low, found.high


@pytest.mark.parametrize("find", [from_histogram, from_weights])
@pytest.mark.parametrize(
    ("bits", "ratio", "mse"), [(3, 0.915, 0.006905), (4, 1.0, 0.00122163), (8, 0.999, 5.22e-6)]
)
def test_worked_vector(find, bits, ratio, mse):
    low, high = find(WORKED, symmetric(bits))
    assert low == -high
    assert high == pytest.approx(ratio, abs=1e-3)
    assert error_of(WORKED, low, high, symmetric(bits)) == pytest.approx(mse, rel=1e-3)


def test_worked_vector_by_min_max():
    assert error_of(WORKED, -1, 1, symmetric(3)) == pytest.approx(0.0080289, rel=1e-5)
    assert error_of(WORKED, -1, 1, symmetric(8)) == pytest.approx(5.40e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("bits", "mse"), [(2, 0.824395), (3, 0.133693), (4, 0.0241422), (6, 0.00124953), (8, 7.6585e-5)]
)
def test_worked_gaussian_by_min_max(bits, mse):
    reach = float(np.abs(GAUSS).max())
    assert reach == pytest.approx(3.80166, abs=5e-6)
    assert error_of(GAUSS, -reach, reach, symmetric(bits)) == pytest.approx(mse, rel=1e-5)


@pytest.mark.parametrize("find", [from_histogram, from_weights])
@pytest.mark.parametrize(
    ("bits", "ratio", "mse"),
    [
        (2, 0.317, 0.181163),
        (3, 0.502, 0.0456062),
        (4, 0.630, 0.0126206),
        (6, 0.880, 0.00104267),
        (8, 0.987, 7.1038e-5),
    ],
)
def test_worked_gaussian(find, bits, ratio, mse):
    low, high = find(GAUSS, symmetric(bits))
    assert high / 3.80166 == pytest.approx(ratio, abs=2e-3)
    assert error_of(GAUSS, low, high, symmetric(bits)) == pytest.approx(mse, rel=2e-4)


shapes = st.sampled_from(["gauss", "relu", "silu", "heavy", "shifted", "small"])


def sample(shape, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(12 if shape == "small" else 3000) * rng.uniform(0.1, 5)
    made = {
        "relu": np.maximum(x, 0),
        "silu": x / (1 + np.exp(-x)),
        "heavy": x**3,
        "shifted": x + 1.5,
    }
    return made.get(shape, x).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10**6), bits=st.sampled_from(WIDTHS), mirrored=st.booleans())
def test_never_worse_than_min_max(shape, seed, bits, mirrored):
    x = sample(shape, seed)
    spec = symmetric(bits) if mirrored else QuantSpec(bits=bits)
    least, greatest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if mirrored and least < 0:
        least, greatest = -max(-least, greatest), max(-least, greatest)
    plain = error_of(x, least, greatest, spec)
    # A histogram knows values to within a bin.
    bin_ = max(-least, greatest) / 2048
    assert error_of(x, *from_histogram(x, spec), spec) <= plain + 2 * bin_ * np.sqrt(plain) + bin_**2
    if not mirrored or x.min() < 0:
        assert error_of(x, *from_weights(x, spec), spec) <= plain * (1 + 1e-4)


@pytest.mark.parametrize("shape", ["gauss", "relu", "silu", "heavy", "shifted"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_near_the_best_of_all_pairs_of_ends(shape, bits):
    x, spec = sample(shape, 5), QuantSpec(bits=bits)
    best = min(
        error_of(x, a * min(x.min(), 0), b * x.max(), spec)
        for a in np.linspace(0.05, 1, 20)
        for b in np.linspace(0.05, 1, 40)
    )
    for find in (from_histogram, from_weights):
        assert error_of(x, *find(x, spec), spec) <= 1.02 * best


@pytest.mark.parametrize("bits", WIDTHS)
def test_closed_form_equals_the_definition(bits):
    x = sample("shifted", 3)
    finder = MSE(bins=16384).start()
    finder.observe(torch.tensor(x))
    error = SquaredError(finder.histogram.density(), 2**bits - 1)
    low, high = np.array([-1.0, -2.0, -0.5]), np.array([2.0, 5.0, 9.0])
    by_hand = [error_of(x, a, b, QuantSpec(bits=bits)) for a, b in zip(low, high, strict=True)]
    assert error.of(low, high) / len(x) == pytest.approx(by_hand, rel=0.01)


def test_exact_zeros_have_no_error():
    x = np.concatenate([sample("relu", 1), np.zeros(10**5, np.float32)])
    for spec in (QuantSpec(bits=4), symmetric(4)):
        assert from_histogram(x, spec) == pytest.approx(from_histogram(x[x > 0], spec))


def test_unsigned_codes_for_what_is_never_negative():
    x = sample("relu", 2)
    assert from_histogram(x, symmetric(4)) == from_histogram(x, QuantSpec(bits=4))
    low, high = from_histogram(x, symmetric(4))
    assert low == 0 and high < x.max()


def test_the_cut_into_batches_does_not_matter():
    x = torch.tensor(sample("silu", 4))
    finder = MSE().start()
    for part in x.split(77):
        finder.observe(part)
    for spec in (QuantSpec(bits=4), symmetric(4)):
        assert (finder.find(spec).low, finder.find(spec).high) == from_histogram(x, spec)


@pytest.mark.parametrize("spec", [symmetric(4), QuantSpec(bits=4)])
def test_channels_are_searched_each_by_itself(spec):
    rows = torch.tensor(
        np.stack([sample(s, 7) for s in ("gauss", "heavy", "silu")] + [np.zeros(3000, np.float32)])
    )
    per_channel = spec.model_copy(update={"granularity": "channel"})
    together = find_weight_range(rows.reshape(4, 30, 10, 10), per_channel, 0, "mse")
    alone = [find_weight_range(row[None], spec, 0, "mse") for row in rows]
    assert together.high == pytest.approx([r.high for r in alone], rel=1e-6)
    assert together.low == pytest.approx([r.low for r in alone], rel=1e-6)
    assert together.high[3] == together.low[3] == 0


def test_many_rows_in_chunks():
    rows = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=3, symmetric=True, signed=True, granularity="channel")
    assert find_weight_range(rows, spec, 0, "mse").high[40:] == pytest.approx(
        find_weight_range(rows[40:], spec, 0, "mse").high
    )


def test_one_bit_symmetric_codes_are_refused():
    with pytest.raises(
        RecipeError, match=r"^mse: 1-bit symmetric signed codes hold nothing but 0; give 2 bits or more$"
    ):
        from_histogram([-1.0, 1.0], symmetric(1))
    assert from_histogram([0.0, 1.0], symmetric(1))[1] > 0  # unsigned: 0 and 1
