"""The preprocessing of images folded into the first layer, so that a file can take pixels as they are."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.errors import RecipeError
from fewbit.net import Net, add_layer, name_of
from fewbit.step import Context, Step, StepReport

_WHITE = 255


class FoldInput(Step):
    """Fold ``x = a p + b``, what preprocessing makes of a channel's pixel p, into the first convolution.

    With W the weights of the convolutions that read the image, computed in float64::

        W'[o, c] = a[c] W[o, c]        bias'[o] = bias[o] + sum over c and taps of b[c] W[o, c]

    so that they read pixels, whole numbers from 0 to 255 with scale 1 and zero point 0: the image is no
    longer rounded at all, and `fewbit quantize --input uint8` writes a file that takes uint8 pixels
    (N, H, W, C). (A dynamic recipe rounds them to a symmetric grid of each image, so to every other one.) A
    file that takes float32 images (N, C, H, W) begins with the way back, ``p = (x - b) / a``.

    Padding stands for x = 0, which is the pixel -b[c] / a[c], another one in each channel and none that an
    integer kernel can pad with. So it becomes a frame around the image in that colour, rounded to whole
    pixels: the only change to what the network computes, at most half a pixel, and only in the padding.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, arXiv 1712.05877, section 3.2.
    Differs: what is folded is the shift and scale of preprocessing, before the layer instead of behind it.
    """

    needs = frozenset({"canonical"})
    before = frozenset({"placed"})
    gives = frozenset({"pixels"})

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Fold in place.

        Raises:
            RecipeError: No card tells the preprocessing, another layer than a convolution reads the image, or
            padding stands for no pixel.
        """
        if "pixels" in net.facts:
            return StepReport(step="fold_input", notes=("the preprocessing is folded already",))
        if net.image_range is None:
            raise RecipeError(
                f"{net.name}: nothing tells scale, mean and std of its images, which fold_input folds into "
                "the first layer; give them in the card's [input]"
            )
        low, high = (torch.tensor(end, dtype=torch.float64) for end in net.image_range)
        image = net.image_node
        readers = _readers(net, image)
        with net.graph.graph.inserting_after(image):
            pixels = add_layer(net.graph, "pixels", ops.Pixels(low, high), image)
        a = (high - low) / _WHITE
        black = (-low / a).round()
        framed: dict[tuple[int, int, int, int], fx.Node] = {}
        for node, conv in readers:
            pads = _needed_pads(conv, net.input_size[1:])
            fold_affine(conv, a, low)
            if any(pads) and not bool(((black >= 0) & (black <= _WHITE)).all()):
                raise RecipeError(
                    f"{net.name}: the value 0, with which '{name_of(node)}' pads, is the pixel "
                    f"{black.tolist()} in each channel, and pixels go from 0 to {_WHITE}; use --input "
                    "float32, or leave the step fold_input out"
                )
            if any(pads) and pads not in framed:
                with net.graph.graph.inserting_after(pixels):
                    framed[pads] = add_layer(net.graph, "frame", ops.Frame(pads, black.float()), pixels)
            node.replace_input_with(image, framed.get(pads, pixels))
            _set(net, node, ops.Conv2d(conv, (0, 0, 0, 0)))
        net.refresh()
        off = float((black + low / a).abs().max())
        notes = (f"padding moved by up to {off:.2f} of a pixel",) if framed else ()
        return StepReport(step="fold_input", changed=len(readers), notes=notes)


def _readers(net: Net, image: fx.Node) -> list[tuple[fx.Node, nn.Conv2d]]:
    found: list[tuple[fx.Node, nn.Conv2d]] = []
    for node in image.users:
        module = net.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
            raise RecipeError(
                f"{net.name}: layer '{name_of(node)}' reads the image and is no convolution with zero "
                "padding, so the preprocessing cannot be folded; use --input float32, or leave the step "
                "fold_input out"
            )
        found.append((node, module))
    return found


def _set(net: Net, node: fx.Node, module: nn.Module) -> None:
    parent, _, leaf = str(node.target).rpartition(".")
    setattr(net.graph.get_submodule(parent), leaf, module)


def fold_affine(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let a convolution read p where it read ``scale p + shift``, in float64.

    Args:
        conv: Weight (O, I/g, kh, kw).
        scale: (I,) float64.
        shift: (I,) float64.
    """
    weight = conv.weight.detach().double()
    per_group = conv.in_channels // conv.groups
    groups = torch.arange(conv.out_channels) // (conv.out_channels // conv.groups)
    inputs = groups[:, None] * per_group + torch.arange(per_group)
    bias = torch.zeros(len(weight), dtype=torch.float64) if conv.bias is None else conv.bias.detach().double()
    bias = bias + (weight.sum((2, 3)) * shift[inputs]).sum(1)
    conv.weight = nn.Parameter((weight * scale[inputs][:, :, None, None]).to(conv.weight.dtype))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def _needed_pads(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the padding of each side that a window really reaches."""
    top, left, bottom, right = ops.pads_of(conv)
    reach = []
    for axis, (before, after) in enumerate(((top, bottom), (left, right))):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        stride, length = conv.stride[axis], size[axis] + before
        last = (length + after - span) // stride * stride + span
        reach.append(max(0, min(after, last - length)))
    return top, left, reach[0], reach[1]
