import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from fewbit import numerics

calm = settings(deadline=None, max_examples=50)
X = np.concatenate([np.random.default_rng(0).normal(0, 4, 2000), [0.0, -0.0, 90.0, -90.0, 1000.0, -1000.0]])
X = X.astype(np.float32)
SIXTH = float(np.float32(1 / 6))


def wide(function, x=X):
    """Torch's own function in float64, rounded once."""
    return function(torch.from_numpy(x).double()).float().numpy()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (numerics.relu, torch.relu),
        (numerics.sigmoid, torch.sigmoid),
        (lambda x: numerics.hard_sigmoid(x, 1 / 6, 0.5), lambda x: (x * SIXTH + 0.5).clamp(0, 1)),
        (numerics.hard_swish, lambda x: x * (x * SIXTH + 0.5).clamp(0, 1)),
        (numerics.silu, F.silu),
        (numerics.mish, F.mish),
        (numerics.softplus, lambda x: F.softplus(x, threshold=40)),
        (numerics.tanh, torch.tanh),
        (numerics.erf, torch.erf),
        (numerics.gelu, F.gelu),
        (lambda x: numerics.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: numerics.leaky_relu(x, 0.1), lambda x: F.leaky_relu(x, 0.1)),
        (lambda x: numerics.prelu(x, np.float32(0.25)), lambda x: F.leaky_relu(x, 0.25)),
        (numerics.elu, F.elu),
        (lambda x: numerics.clip(x, 0, 6), F.relu6),
        (lambda x: numerics.clip(x, high=2), lambda x: x.clamp(max=2)),
        (lambda x: numerics.softmax(x.reshape(2, -1)).ravel(), lambda x: x.reshape(2, -1).softmax(1).ravel()),
        (
            lambda x: numerics.log_softmax(x.reshape(2, -1), 0).ravel(),
            lambda x: x.reshape(2, -1).log_softmax(0).ravel(),
        ),
    ],
)
def test_agrees_with_torch_in_float64(ours, theirs):
    got = ours(X)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wide(theirs), rtol=3e-7, atol=1e-15)


def test_silu_rounds_the_sigmoid_as_a_file_does():
    assert (numerics.silu(X) == numerics.multiply(X, numerics.sigmoid(X))).all()


def test_pairs_round_once():
    x, y = X[:1000], X[1000:2000]
    assert (numerics.add(x, y) == x + y).all()
    assert (numerics.subtract(x, y) == x - y).all()
    assert (numerics.multiply(x, y) == x * y).all()
    assert (numerics.divide(x, y) == x / y).all()


@calm
@given(st.integers(0, 2**32 - 1))
def test_rescale_is_the_definition(seed):
    rng = np.random.default_rng(seed)
    sums = rng.integers(-(2**30), 2**30, (2, 3, 2)).astype(np.float64)
    sx, sw = np.float32(rng.uniform(1e-4, 1)), rng.uniform(1e-4, 1, 3).astype(np.float32)
    codes, bias = rng.integers(-(2**20), 2**20, 3).astype(np.int32), rng.normal(size=3).astype(np.float32)
    got = numerics.rescale_accumulator(sums, sx, sw, codes, bias)
    for n, o, p in np.ndindex(2, 3, 2):
        expected = (float(sums[n, o, p]) + int(codes[o])) * (float(sx) * float(sw[o])) + float(bias[o])
        assert got[n, o, p] == np.float32(expected)


def test_rescale_per_sample_and_per_tensor():
    sums = np.array([[1, 2], [3, 4]], np.float32)
    assert numerics.rescale_accumulator(sums, [1.0, 0.5], [1.0, 2.0]).tolist() == [[1, 4], [1.5, 4]]
    assert numerics.rescale_accumulator(sums, 2.0, 0.5).tolist() == sums.tolist()
    assert numerics.rescale_accumulator(sums.T, 1.0, [1.0, 2.0], axis=0).tolist() == [[1, 3], [4, 8]]


def test_linear():
    rng = np.random.default_rng(2)
    x, w, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 7), (3, 7), (3,)))
    exact = x.astype(float) @ w.T.astype(float) + b
    np.testing.assert_allclose(numerics.linear(x, w, b), exact, rtol=1e-6)
    np.testing.assert_allclose(numerics.linear(x, w, b, 2.0, 0.5), 2 * (exact - b) + 0.5 * b, rtol=1e-6)
    np.testing.assert_allclose(numerics.linear(x[None], w), (exact - b)[None], rtol=1e-5)
    alone = np.concatenate([numerics.linear(x[n : n + 1], w, b) for n in range(5)])
    assert (numerics.linear(x, w, b) == alone).all()


def test_means():
    x = np.random.default_rng(3).normal(size=(4, 5, 6, 7)).astype(np.float32)
    np.testing.assert_allclose(
        numerics.mean(x, (2, 3)), x.mean((2, 3), dtype=float, keepdims=True), rtol=3e-7
    )
    assert numerics.mean(x, (-1, 1), keepdims=False).shape == (4, 6)
    assert (numerics.mean(x, (2, 3))[1] == numerics.mean(x[1:2], (2, 3))[0]).all()
    assert (numerics.mean(np.asfortranarray(x), (2, 3)) == numerics.mean(x, (2, 3))).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_local_response_norm(size):
    x = np.random.default_rng(4).normal(0, 20, (2, 6, 3, 3)).astype(np.float32)
    got = numerics.local_response_norm(x, size, 0.02, 0.75, 1.5)
    expected = np.empty(x.shape)
    for c in range(6):
        # ONNX: floor((size - 1) / 2) channels before, ceil((size - 1) / 2) after.
        window = x[:, max(0, c - (size - 1) // 2) : c + math.ceil((size - 1) / 2) + 1].astype(float)
        expected[:, c] = x[:, c] / (1.5 + 0.02 / size * (window**2).sum(1)) ** 0.75
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    if size % 2:
        theirs = wide(lambda t: F.local_response_norm(t, size, 0.02, 0.75, 1.5), x)
        np.testing.assert_allclose(got, theirs, rtol=1e-6)


def test_normalizations():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    gamma, beta, mean = (rng.normal(size=4).astype(np.float32) for _ in range(3))
    variance = rng.uniform(0.1, 2, 4).astype(np.float32)
    theirs = F.batch_norm(*(torch.from_numpy(v).double() for v in (x, mean, variance, gamma, beta)), eps=1e-3)
    np.testing.assert_allclose(
        numerics.batch_norm(x, gamma, beta, mean, variance, 1e-3), theirs.numpy(), rtol=1e-6, atol=1e-7
    )
    gamma, beta = rng.normal(size=(2, 5, 6)).astype(np.float32)
    wide_x, wide_gamma, wide_beta = (torch.from_numpy(v).double() for v in (x, gamma, beta))
    theirs = F.layer_norm(wide_x, (5, 6), wide_gamma, wide_beta)
    np.testing.assert_allclose(
        numerics.layer_norm(x, gamma, beta, axis=2), theirs.numpy(), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        numerics.layer_norm(x, np.ones(6, np.float32)),
        F.layer_norm(torch.from_numpy(x).double(), (6,)).numpy(),
        rtol=1e-6,
        atol=1e-6,
    )


@calm
@given(arrays(np.float32, (3, 4, 2, 2), elements=st.floats(-50, 50, width=32)))
def test_no_sample_depends_on_another(x):
    for function in (
        numerics.sigmoid,
        lambda v: numerics.softmax(v, 1),
        lambda v: numerics.local_response_norm(v, 3),
        lambda v: numerics.mean(v, (2, 3)),
        lambda v: numerics.layer_norm(v, np.ones(2, np.float32)),
    ):
        assert (function(x)[1] == function(x[1:2])[0]).all()


def test_attributes_are_float32():
    x = np.array([0.7], np.float32)
    assert numerics.leaky_relu(-x, 0.1) == np.float32(-float(np.float32(0.1)) * float(x[0]))
