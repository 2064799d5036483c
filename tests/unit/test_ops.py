from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import ops

A = torch.randn((2, 3, 6, 5), generator=torch.Generator().manual_seed(0))
STEPS = torch.tensor([1.0, 2, 3])
ROWS = A.permute(0, 2, 3, 1)
B = torch.randn((2, 3, 6, 5), generator=torch.Generator().manual_seed(1))
CASES: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = [
    (ops.Add(), (A, B[:, :1]), A + B[:, :1]),
    (ops.Sub(), (A, B), A - B),
    (ops.Mul(), (A, B[:, :, :1, :1]), A * B[:, :, :1, :1]),
    (ops.Div(), (A, B), A / B),
    (ops.MatMul(), (A, B.transpose(2, 3)), A @ B.transpose(2, 3)),
    (ops.Affine(torch.tensor(2.0), torch.tensor(1.0)), (A,), 2 * A + 1),
    (ops.Affine(None, torch.ones(3, 1, 1)), (A,), A + 1),
    (ops.Affine(STEPS.reshape(3, 1, 1), None), (A,), A * STEPS[:, None, None]),
    (ops.Affine(None, None), (A,), A),
    (ops.Clip(-0.5, 0.25), (A,), A.clamp(-0.5, 0.25)),
    (ops.Clip(0, 6), (10 * A,), F.relu6(10 * A)),
    (ops.Clip(-float("inf"), 0.1), (A,), A.clamp(max=0.1)),
    (ops.Minimum(STEPS.reshape(3, 1, 1)), (A,), torch.minimum(A, STEPS[:, None, None])),
    (ops.Concat(1), (A, B, A), torch.cat((A, B, A), 1)),
    (ops.GlobalAvgPool(), (A,), F.adaptive_avg_pool2d(A, 1)),
    (ops.Mean((1, 3), True), (A,), A.mean((1, 3), keepdim=True)),
    (ops.Mean([2, 3], False), (A,), A.mean((2, 3))),
    (ops.Reshape((-1, 90)), (A,), A.flatten(1)),
    (ops.Permute((0, 2, 3, 1)), (A,), A.permute(0, 2, 3, 1)),
    (ops.Frame((1, 0, 2, 3), torch.full((3,), 1.5)), (A,), F.pad(A, (0, 3, 1, 2), value=1.5)),
    (ops.Pixels(-2 * STEPS, STEPS), (A,), (A + 2 * STEPS.reshape(-1, 1, 1)) * 85 / STEPS.reshape(-1, 1, 1)),
    (ops.Pad([(0, 0), (1, 0), (2, 3), (0, 4)], 1.5), (A,), F.pad(A, (0, 4, 2, 3, 1, 0), value=1.5)),
    (ops.Slice({3: (1, None, 2), 1: (0, 2, 1)}), (A,), A[:, 0:2, :, 1::2]),
    (ops.Upsample((2, 3)), (A,), F.interpolate(A, scale_factor=(2, 3), mode="nearest")),
    (
        ops.LayerNorm2d(nn.Parameter(STEPS), nn.Parameter(torch.ones(3)), 1e-6),
        (A,),
        F.layer_norm(ROWS, (3,), STEPS, torch.ones(3), 1e-6).permute(0, 3, 1, 2),
    ),
]


@pytest.mark.parametrize(
    ("op", "inputs", "expected"), CASES, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else ""
)
def test_each_op_computes_what_torch_does(
    op: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor
) -> None:
    with torch.no_grad():
        assert torch.equal(op(*inputs), expected) or torch.allclose(
            op(*inputs), expected, rtol=1e-6, atol=1e-6
        )
    assert ops.kind_of(op) is not None


def test_every_op_of_ours_has_a_case() -> None:
    ours = {
        value for value in vars(ops).values() if isinstance(value, type) and value.__module__ == ops.__name__
    }
    covered = {type(op) for op, _, _ in CASES}
    assert ours - covered == {ops.Conv2d, ops.DropPath, ops.LocalResponseNorm}


def test_kinds_follow_the_class_and_its_parents() -> None:
    class Own(nn.Conv2d):
        pass

    assert ops.kind_of(Own(1, 1, 1)) == "Conv"
    assert ops.kind_of(ops.Conv2d(nn.Conv2d(1, 1, 1), (0, 0, 0, 0))) == "Conv"
    assert ops.kind_of(nn.ReLU6()) is None  # captured as Clip(0, 6)
    assert ops.kind_of(nn.Bilinear(1, 1, 1)) is None


@given(
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_padding_of_each_side_is_padding_before_the_convolution(
    pads: tuple[int, int, int, int], kernel: tuple[int, int], stride: int, depthwise: bool, bias: bool
) -> None:
    conv = nn.Conv2d(3, 3, kernel, stride, groups=3 if depthwise else 1, bias=bias)
    top, left, bottom, right = pads
    padded = ops.Conv2d(conv, pads)
    with torch.no_grad():
        expected = conv(F.pad(A, (left, right, top, bottom)))
        assert torch.allclose(padded(A), expected, rtol=1e-5, atol=1e-6)
    assert ops.pads_of(padded) == pads
    assert padded.weight is conv.weight and padded.bias is conv.bias


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel", "dilation"), list(itertools.product([1, 2, 3, 4, (3, 2)], [1, 2])))
def test_padding_in_words_becomes_numbers(kernel: int | tuple[int, int], dilation: int) -> None:
    x = A.repeat(1, 1, 2, 2)
    for word in ("same", "valid"):
        conv = nn.Conv2d(3, 4, kernel, padding=word, dilation=dilation)
        with torch.no_grad():
            expected = conv(x)
            assert torch.equal(ops.convolve(x, conv.weight, conv.bias, conv), expected)
            assert torch.equal(ops.Conv2d(conv, ops.pads_of(conv))(x), expected)


def test_a_padded_convolution_shows_its_padding_and_keeps_its_mode() -> None:
    conv = nn.Conv2d(3, 4, 3).eval()
    padded = ops.Conv2d(conv, (0, 1, 2, 3))
    assert "pads=(0, 1, 2, 3)" in repr(padded) and not padded.training


def test_parameters_stay_parameters_and_constants_stay_constants() -> None:
    layer = ops.Affine(nn.Parameter(torch.ones(3, 1, 1)), torch.zeros(()))
    assert [name for name, _ in layer.named_parameters()] == ["scale"]
    assert [name for name, _ in layer.named_buffers()] == ["shift"]


def test_droppath_does_nothing_in_evaluation() -> None:
    assert ops.DropPath(0.9).eval()(A) is A
    assert ops.DropPath(0.0).train()(A) is A


@pytest.mark.parametrize("per_image", [True, False])
def test_droppath_drops_whole_images_and_keeps_the_mean(per_image: bool) -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 1, 1)
    found = [ops.DropPath(0.25, per_image).train()(x) for _ in range(1 if per_image else 200)]
    for y in found:
        assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))}
        assert torch.equal(y[:, 0], y[:, 1])
        if not per_image:
            assert len(y.unique()) == 1
    assert float(torch.stack(found).mean()) == pytest.approx(1.0, abs=0.15 if not per_image else 0.05)


def test_droppath_of_everything_is_zero() -> None:
    assert torch.equal(ops.DropPath(1.0).train()(A), torch.zeros_like(A))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_local_response_norm_is_torchs(size: int, beta: float, channels_last: bool) -> None:
    x = 3 * torch.randn(3, 7, 5, 4, generator=torch.Generator().manual_seed(size))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    norm = nn.LocalResponseNorm(size, 0.3, beta, 1.5)
    kept = x.clone()
    fast = ops.LocalResponseNorm(norm)
    found = fast(x)
    torch.testing.assert_close(found, norm(x), rtol=2e-6, atol=1e-7)
    assert torch.equal(x, kept) and found.stride() == x.stride()
    assert ops.kind_of(fast) == "LRN"


def test_local_response_norm_has_torchs_gradient() -> None:
    norm = nn.LocalResponseNorm(5, 0.3)
    x = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
    (found,) = torch.autograd.grad(ops.LocalResponseNorm(norm)(x).square().sum(), x)
    assert torch.equal(found, expected)
