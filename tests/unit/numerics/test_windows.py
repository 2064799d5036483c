import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewbit import numerics
from fewbit.numerics import windows

calm = settings(deadline=None, max_examples=60)


def slow_convolution(x, zero_point, w, strides, pads, dilations, groups):
    """Sums of Python integers, one by one."""
    n_, _, *sizes = x.shape
    o_, inner, *kernel = w.shape
    dims = range(len(kernel))
    out = [
        (sizes[d] + pads[d] + pads[len(kernel) + d] - (kernel[d] - 1) * dilations[d] - 1) // strides[d] + 1
        for d in dims
    ]
    result = np.zeros((n_, o_, *out), dtype=object)
    for n, o in itertools.product(range(n_), range(o_)):
        group = o // (o_ // groups)
        for place in itertools.product(*map(range, out)):
            total = 0
            for c in range(inner):
                for tap in itertools.product(*map(range, kernel)):
                    at = [place[d] * strides[d] + tap[d] * dilations[d] - pads[d] for d in dims]
                    inside = all(0 <= at[d] < sizes[d] for d in dims)
                    code = int(x[(n, group * inner + c, *at)]) if inside else zero_point
                    total += (code - zero_point) * int(w[(o, c, *tap)])
            result[(n, o, *place)] = total
    return result


@calm
@given(st.integers(0, 2**32 - 1))
def test_convolution_of_codes_equals_slow_sums(seed):
    rng = np.random.default_rng(seed)
    dims = int(rng.integers(1, 3))
    groups, inner, multiple = (int(n) for n in rng.integers(1, 4, 3))
    kernel = rng.integers(1, 4, dims)
    strides, dilations = rng.integers(1, 3, dims), rng.integers(1, 3, dims)
    pads = rng.integers(0, 3, 2 * dims).tolist()
    sizes = rng.integers(5, 8, dims)
    x = rng.integers(0, 256, (2, groups * inner, *sizes)).astype(np.uint8)
    w = rng.integers(-127, 128, (groups * multiple, inner, *kernel)).astype(np.int8)
    zero_point = int(rng.integers(0, 256))
    arguments = (strides.tolist(), pads, dilations.tolist(), groups)
    got = numerics.convolve_codes(x, zero_point, w, *arguments)
    assert (got == slow_convolution(x, zero_point, w, *arguments)).all()


def test_large_sums_are_exact():
    # 2^24 is passed: float32 would lose the last bits.
    x, w = np.full((1, 600, 3, 3), 255, np.uint8), np.full((1, 600, 3, 3), 127, np.int8)
    w[0, 0, 0, 0] = 126
    got = numerics.convolve_codes(x, 0, w, [1, 1], [0] * 4, [1, 1])
    assert got[0, 0, 0, 0] == 600 * 9 * 255 * 127 - 255 > 2**24
    assert numerics.exact_float(2**24 - 1) is np.float32 and numerics.exact_float(2**24) is np.float64


@pytest.mark.parametrize("groups", [1, 2])
def test_unrolling_in_parts_changes_nothing(monkeypatch, groups):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 4, 11, 7)), rng.normal(size=(6, 4 // groups, 3, 3))
    arguments = ([2, 1], [1, 0, 2, 1], [1, 2], groups)
    whole = numerics.convolve(x, w, *arguments)
    monkeypatch.setattr(windows, "UNROLLED", 150)
    np.testing.assert_allclose(numerics.convolve(x, w, *arguments), whole, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_floats(groups):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 4, 8, 9)).astype(np.float32)
    w, b = rng.normal(size=(8, 4 // groups, 3, 2)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    got = numerics.convolve_floats(x, w, b, [2, 1], [1, 1, 1, 1], [1, 2], groups)
    tensors = [torch.from_numpy(v).double() for v in (x, w, b)]
    theirs = F.conv2d(*tensors, stride=(2, 1), padding=1, dilation=(1, 2), groups=groups)
    np.testing.assert_allclose(got, theirs.numpy(), rtol=1e-6, atol=1e-6)
    assert got.dtype == np.float32
    assert (numerics.convolve_floats(x[1:2], w, b, [2, 1], [1] * 4, [1, 2], groups)[0] == got[1]).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("stride", "dilation", "padding", "extra"), [(1, 1, 0, 0), (2, 1, 1, 1), (3, 2, 2, 1)]
)
def test_transposed(groups, stride, dilation, padding, extra):
    rng = np.random.default_rng(2)
    x = rng.integers(-128, 128, (2, 4, 5, 6)).astype(np.float64)
    w = rng.integers(-127, 128, (4, 3, 3, 2)).astype(np.float64)
    got = numerics.convolve_transposed(x, w, [stride] * 2, [padding] * 4, [dilation] * 2, groups, [extra] * 2)
    theirs = F.conv_transpose2d(
        torch.from_numpy(x),
        torch.from_numpy(w),
        stride=stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        dilation=dilation,
    )
    assert (got == theirs.numpy()).all()


POOLS = [
    # size, kernel, stride, padding, ceil_mode
    ((6, 7), (3, 3), (2, 2), 0, True),
    ((6, 7), (3, 3), (2, 2), 1, True),
    ((5, 5), (2, 2), (2, 2), 1, True),
    ((5, 4), (2, 3), (1, 2), 1, False),
    ((112, 112), (3, 3), (2, 2), 0, True),
    ((4, 4), (3, 3), (3, 3), 1, True),  # a third window would start in the padding: left out
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil"), POOLS)
def test_max_pool(size, kernel, stride, padding, ceil):
    x = np.random.default_rng(3).integers(-128, 128, (2, 3, *size)).astype(np.int8)
    got = numerics.max_pool(x, kernel, stride, [padding] * 4, ceil_mode=ceil)
    theirs = F.max_pool2d(
        torch.from_numpy(x.astype(np.float32)), kernel, stride, padding, ceil_mode=ceil
    ).numpy()
    assert got.dtype == np.int8 and (got == theirs).all()
    assert (
        numerics.max_pool(x.astype(np.float32), kernel, stride, [padding] * 4, ceil_mode=ceil) == theirs
    ).all()


def test_max_pool_of_negative_codes_never_takes_padding():
    x = np.full((1, 1, 3, 3), -5, np.int8)
    assert (numerics.max_pool(x, [3, 3], [1, 1], [1] * 4) == -5).all()


def test_max_pool_dilated():
    x = np.random.default_rng(4).normal(size=(1, 2, 9, 9)).astype(np.float32)
    theirs = F.max_pool2d(torch.from_numpy(x), 3, 2, 1, dilation=2).numpy()
    assert (numerics.max_pool(x, [3, 3], [2, 2], [1] * 4, [2, 2]) == theirs).all()


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil"), POOLS)
def test_average_pool(size, kernel, stride, padding, ceil, count_include_pad):
    x = np.random.default_rng(5).normal(size=(2, 3, *size)).astype(np.float32)
    got = numerics.average_pool(x, kernel, stride, [padding] * 4, ceil, count_include_pad)
    theirs = F.avg_pool2d(
        torch.from_numpy(x).double(), kernel, stride, padding, ceil, count_include_pad
    ).numpy()
    np.testing.assert_allclose(got, theirs, rtol=1e-6, atol=1e-7)


def test_average_pool_of_codes():
    x = np.array([[[[10, 11], [12, 14]], [[-10, -11], [-12, -13]]]], np.int8)
    assert numerics.average_pool_codes(x, [2, 2], [2, 2], [0] * 4).ravel().tolist() == [12, -12]
    # Padding is not counted: a corner has one code of its own.
    assert numerics.average_pool_codes(x[:, :1], [2, 2], [2, 2], [1] * 4).ravel().tolist() == [10, 11, 12, 14]


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_axes(dims):
    x = np.random.default_rng(6).normal(size=(2, 3, *[6] * dims)).astype(np.float32)
    pools = {1: (F.max_pool1d, F.avg_pool1d), 3: (F.max_pool3d, F.avg_pool3d)}[dims]
    t = torch.from_numpy(x)
    assert (numerics.max_pool(x, [2] * dims, [2] * dims, [0] * 2 * dims) == pools[0](t, 2).numpy()).all()
    got = numerics.average_pool(x, [2] * dims, [2] * dims, [0] * 2 * dims)
    np.testing.assert_allclose(got, pools[1](t, 2).numpy(), rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_told():
    x = np.zeros((1, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"input \(1, 3, 4, 4\) does not fit weight \(2, 4, 3, 3\) with 1 groups"
    ):
        numerics.convolve(x, np.zeros((2, 4, 3, 3)), [1, 1], [0] * 4, [1, 1])
    with pytest.raises(ValueError, match=r"a window of \(5, 5\) does not fit an input of \(4, 4\)"):
        numerics.convolve(x, np.zeros((2, 3, 5, 5)), [1, 1], [0] * 4, [1, 1])
    with pytest.raises(ValueError, match="does not fit weight"):
        numerics.convolve_transposed(x, np.zeros((2, 3, 5, 5)), [1, 1], [0] * 4, [1, 1])
