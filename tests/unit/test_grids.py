import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fewbit import grids, numerics
from fewbit.errors import RecipeError
from fewbit.spec import QuantSpec

specs = st.builds(QuantSpec, bits=st.integers(2, 8), symmetric=st.booleans(), signed=st.booleans())


@pytest.mark.parametrize(
    ("spec", "unsigned", "expected"),
    [
        (QuantSpec(bits=2), False, [0, 1, 2, 3]),
        (QuantSpec(bits=2, signed=True), False, [-2, -1, 0, 1]),
        (QuantSpec(bits=2, signed=True, symmetric=True), False, [-1, 0, 1]),
        (QuantSpec(bits=2, signed=True, symmetric=True), True, [0, 1, 2, 3]),
    ],
)
def test_uniform_values(spec, unsigned, expected):
    assert grids.uniform(spec, unsigned).tolist() == expected


@given(specs, arrays(np.float32, 50, elements=st.floats(-500, 500, width=32)), st.floats(2**-6, 10, width=32))
@settings(deadline=None, max_examples=60)
def test_uniform_equals_the_arithmetic(spec, x, scale):
    qmin, qmax = spec.code_range()
    zero_point = 0 if spec.symmetric else (qmin + qmax) // 2
    codes = grids.encode(x, spec, scale, zero_point)
    assert (codes == numerics.quantize(x, scale, zero_point, qmin, qmax)).all()
    values = grids.decode(codes, spec, scale, zero_point)
    assert (values == numerics.dequantize(codes, scale, zero_point)).all()
    assert (grids.encode(values, spec, scale, zero_point) == codes).all()
    assert set(values.tolist()) <= set(
        grids.grid_values(spec, np.float32(scale), zero_point).astype(np.float32).tolist()
    )


def test_ties_go_to_even_codes():
    spec = QuantSpec(bits=4, signed=True, symmetric=True)
    assert grids.encode([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], spec, 1.0).tolist() == [-2, -2, 0, 0, 2, 2]


def test_per_channel():
    spec = QuantSpec(bits=3, signed=True, symmetric=True, granularity="channel")
    x, scale = np.array([[0.3, -0.3], [3.0, 1.0]]), np.array([[0.1], [1.0]])
    codes = grids.encode(x, spec, scale)
    assert codes.tolist() == [[3, -3], [3, 1]]
    np.testing.assert_allclose(grids.decode(codes, spec, scale), x, rtol=1e-6)
    assert grids.grid_values(spec, [0.1, 1.0]).shape == (2, 7)


def test_a_new_grid_is_one_function(monkeypatch):
    # Powers of two: codes -3..3 of 3 bits stand for -1, -1/2, -1/4, 0, 1/4, 1/2, 1.
    monkeypatch.setitem(
        grids.GRIDS, "uniform", lambda spec, unsigned: np.array([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    )
    spec = QuantSpec(bits=3, signed=True, symmetric=True)
    codes = grids.encode([-0.7, 0.1, 0.2, 0.9, 5.0], spec, 1.0)
    assert codes.tolist() == [-2, 0, 1, 3, 3]
    assert grids.decode(codes, spec, 2.0).tolist() == [-1.0, 0.0, 0.5, 2.0, 2.0]


def test_unknown_grid():
    assert grids.find_grid("uniform") is grids.uniform
    with pytest.raises(
        RecipeError, match=r"^grid: no 'uniforn' \(did you mean 'uniform'\?\); there are uniform$"
    ):
        grids.find_grid("uniforn")


def test_codes_outside_the_range():
    message = "^codes: reach from 0 to 16, outside 0 to 15; quantize them first$"
    with pytest.raises(RecipeError, match=message):
        grids.decode(np.array([0, 16]), QuantSpec(bits=4), 1.0)
