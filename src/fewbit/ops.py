"""The layers that a captured network is made of.

Every layer of a Net is one module with one output: a `torch.nn` module where torch has one, else one of
these. Each class has a `kind`, the word that placing, export and reports use for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Add(nn.Module):
    """Sum of two tensors, broadcast."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return a + b


class Sub(nn.Module):
    """Difference of two tensors, broadcast."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a - b."""
        return a - b


class Mul(nn.Module):
    """Product of two tensors, broadcast."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a * b."""
        return a * b


class Div(nn.Module):
    """Quotient of two tensors, broadcast."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a / b."""
        return a / b


class MatMul(nn.Module):
    """Matrix product of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b."""
        return a @ b


class Affine(nn.Module):
    """x * scale + shift with constants that broadcast over (N, C, H, W).

    Args:
        scale: Factor, any shape that broadcasts.
        shift: Term, any shape that broadcasts. A parameter stays one (layer scale).
    """

    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.scale: Tensor | None
        self.shift: Tensor | None
        for name, value in (("scale", scale), ("shift", shift)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Return x * scale + shift."""
        if self.scale is not None:
            x = x * self.scale
        return x if self.shift is None else x + self.shift


class Pixels(Affine):
    """The pixels 0 ... 255 of an image that preprocessing shifted and scaled, x * scale + shift.

    They are whole numbers but for float32's rounding. A file whose input is the pixels themselves begins
    behind this layer.

    Args:
        low: What preprocessing makes of the pixel 0 in each channel.
        high: What it makes of 255.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        step = (high.double() - low.double()) / 255
        super().__init__(*((v.float().reshape(-1, 1, 1)) for v in (1 / step, -low.double() / step)))


class Frame(nn.Module):
    """A border around (N, C, H, W) with a value of its own for each channel.

    Args:
        pads: How wide it is: (top, left, bottom, right).
        values: (C,).
    """

    values: Tensor

    def __init__(self, pads: tuple[int, int, int, int], values: Tensor) -> None:
        super().__init__()
        self.pads = pads
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor with its border."""
        top, left, bottom, right = self.pads
        rows, columns = x.shape[2:]
        size = (len(x), x.shape[1], top + rows + bottom, left + columns + right)
        framed = self.values.to(x.dtype).reshape(1, -1, 1, 1).expand(size).clone()
        framed[:, :, top : top + rows, left : left + columns] = x
        return framed

    def extra_repr(self) -> str:
        """Show the width of each side."""
        return f"pads={self.pads}"


class Clip(nn.Module):
    """Values clamped to [low, high]; ReLU6 is Clip(0, 6)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = float(low), float(high)

    def forward(self, x: Tensor) -> Tensor:
        """Return min(max(x, low), high)."""
        return x.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """Show the limits."""
        return f"{self.low:g}, {self.high:g}"


class Minimum(nn.Module):
    """Values no larger than the limit of their channel, min(x, limits).

    Args:
        limits: Shaped to broadcast: (C, 1, 1) behind a convolution, (C,) behind a matrix product.
    """

    limits: Tensor

    def __init__(self, limits: Tensor) -> None:
        super().__init__()
        self.register_buffer("limits", limits)

    def forward(self, x: Tensor) -> Tensor:
        """Return min(x, limits)."""
        return torch.minimum(x, self.limits)


class Concat(nn.Module):
    """Tensors joined along one axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the joined tensor."""
        return torch.cat(tensors, self.dim)


class GlobalAvgPool(nn.Module):
    """Mean over H and W: (N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over the last two axes, kept as size 1."""
        return x.mean((2, 3), keepdim=True)


class Mean(nn.Module):
    """Mean over any axes."""

    def __init__(self, dims: Sequence[int], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        return x.mean(self.dims, keepdim=self.keepdim)


class Reshape(nn.Module):
    """Fixed shape behind the batch axis, which stays -1."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return x in the new shape."""
        return x.reshape(self.shape)


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its axes in the new order."""
        return x.permute(self.dims)


class Pad(nn.Module):
    """Constant padding.

    Args:
        pads: (before, after) for each axis, batch first.
        value: What to fill with.
    """

    def __init__(self, pads: Sequence[tuple[int, int]], value: float = 0.0) -> None:
        super().__init__()
        self.pads, self.value = tuple((int(a), int(b)) for a, b in pads), float(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded tensor."""
        flat = [amount for pair in reversed(self.pads) for amount in pair]
        return F.pad(x, flat, value=self.value)


class Slice(nn.Module):
    """A strided part along some axes: x[..., start:stop:step, ...]; no stop means to the end."""

    def __init__(self, ranges: dict[int, tuple[int, int | None, int]]) -> None:
        super().__init__()
        self.ranges = dict(sorted(ranges.items()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the part."""
        index = [slice(None)] * x.dim()
        for axis, (start, stop, step) in self.ranges.items():
            index[axis] = slice(start, stop, step)
        return x[tuple(index)]


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by whole factors."""

    def __init__(self, factor: tuple[int, int]) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return each pixel repeated."""
        return x.repeat_interleave(self.factor[0], 2).repeat_interleave(self.factor[1], 3)


class DropPath(nn.Module):
    """Stochastic depth: in training drops the branch of whole images; nothing in evaluation.

    Args:
        p: Probability of dropping.
        per_image: Decide for each image; else once for the whole batch.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv 1603.09382.
    """

    def __init__(self, p: float, per_image: bool = True) -> None:
        super().__init__()
        self.p, self.per_image = p, per_image

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or in training x / (1 - p) for the images that are kept."""
        if not self.training or self.p == 0.0:
            return x
        images = x.shape[0] if self.per_image else 1
        keep = x.new_empty((images, *[1] * (x.dim() - 1))).bernoulli_(1.0 - self.p)
        if self.p < 1.0:
            keep.div_(1.0 - self.p)
        return x * keep


class LayerNorm2d(nn.Module):
    """Normalisation over the channels of every pixel of (N, C, H, W), as ConvNeXt does."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """Convolution with its own padding on each side, pads = (top, left, bottom, right).

    It takes over the parameters of the convolution that it is made from.
    """

    def __init__(self, conv: nn.Conv2d, pads: tuple[int, int, int, int]) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            0,
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias, self.pads = conv.weight, conv.bias, pads
        self.training = conv.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W)."""
        return convolve(x, self.weight, self.bias, self)

    def extra_repr(self) -> str:
        """Show the sizes and the padding of each side."""
        return f"{super().extra_repr()}, pads={self.pads}"  # type: ignore[no-untyped-call]


def pads_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the padding of each side: (top, left, bottom, right)."""
    if isinstance(conv, Conv2d):
        return conv.pads
    if isinstance(conv.padding, str):
        total = [
            d * (k - 1) if conv.padding == "same" else 0
            for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2
    rows, columns = conv.padding
    return int(rows), int(columns), int(rows), int(columns)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, like: nn.Conv2d) -> Tensor:
    """Convolve with another weight and bias but the geometry of `like`."""
    top, left, bottom, right = pads_of(like)
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    return F.conv2d(x, weight, bias, like.stride, (top, left), like.dilation, like.groups)


class LocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalization, several times as fast as torch's and equal but for rounding.

    ``y[c] = x[c] (k + alpha / size * sum of x[j]^2 over the size channels j around c)^-beta``

    Args:
        norm: The layer whose numbers it takes.
    """

    def __init__(self, norm: nn.LocalResponseNorm) -> None:
        super().__init__(int(norm.size), norm.alpha, norm.beta, norm.k)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized (N, C, ...)."""
        if torch.is_grad_enabled() and input.requires_grad:
            return super().forward(input)
        output = torch.empty_like(input)
        for index in range(len(input)):  # one image fits the processor's cache
            self._normalize(input[index : index + 1], output[index : index + 1])
        return output

    def _normalize(self, x: Tensor, y: Tensor) -> None:
        squares, factor = x.square(), self.alpha / self.size
        base = squares.mul(factor).add_(self.k)
        below, above = self.size // 2, (self.size - 1) // 2
        for shift in range(1, min(below, x.shape[1] - 1) + 1):
            base[:, shift:].add_(squares[:, :-shift], alpha=factor)
            if shift <= above:
                base[:, :-shift].add_(squares[:, shift:], alpha=factor)
        if self.beta == 0.75:
            root = base.rsqrt_()
            torch.mul(torch.sqrt(root, out=squares).mul_(root), x, out=y)
        else:
            torch.mul(base.pow_(-self.beta), x, out=y)


KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "Conv",
    nn.ConvTranspose2d: "ConvTranspose",
    nn.Linear: "Linear",
    MatMul: "MatMul",
    nn.BatchNorm2d: "BatchNorm",
    nn.BatchNorm1d: "BatchNorm",
    nn.LayerNorm: "LayerNorm",
    LayerNorm2d: "LayerNorm2d",
    nn.ReLU: "Relu",
    Clip: "Clip",
    Minimum: "Min",
    nn.LeakyReLU: "LeakyRelu",
    nn.PReLU: "PRelu",
    nn.ELU: "Elu",
    nn.GELU: "Gelu",
    nn.Tanh: "Tanh",
    nn.Sigmoid: "Sigmoid",
    nn.Hardsigmoid: "HardSigmoid",
    nn.SiLU: "Silu",
    nn.Hardswish: "HardSwish",
    nn.Mish: "Mish",
    nn.Softplus: "Softplus",
    nn.Softmax: "Softmax",
    nn.LogSoftmax: "LogSoftmax",
    nn.LocalResponseNorm: "LRN",
    nn.MaxPool2d: "MaxPool",
    nn.AvgPool2d: "AvgPool",
    GlobalAvgPool: "GlobalAvgPool",
    Mean: "Mean",
    Add: "Add",
    Sub: "Sub",
    Mul: "Mul",
    Div: "Div",
    Affine: "Affine",
    Concat: "Concat",
    nn.Flatten: "Flatten",
    Reshape: "Reshape",
    Permute: "Permute",
    Pad: "Pad",
    Frame: "Frame",
    Slice: "Slice",
    Upsample: "Upsample",
    nn.Dropout: "Dropout",
    nn.Dropout2d: "Dropout",
    nn.AlphaDropout: "Dropout",
    nn.FeatureAlphaDropout: "Dropout",
    DropPath: "DropPath",
    nn.Identity: "Identity",
}


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a layer, or none where it is not one of a captured network."""
    for ancestor in type(module).__mro__:
        if ancestor in KINDS:
            return KINDS[ancestor]
    return None
