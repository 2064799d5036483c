"""ZeroQ's distilled data: images that are made from nothing but BatchNorm statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from fewbit.errors import RecipeError
from fewbit.improve.expectation import image_moments
from fewbit.net import Layer, Net
from fewbit.step import Context, Step, StepReport

_SMALLEST = 1e-6
_AT_ONCE_VALUES = 8 * 3 * 224 * 224


class ZeroQ(Step):
    """Make images from BatchNorm statistics, for every later step to take in place of real ones.

    A BatchNorm keeps the mean mu and the deviation sigma, in each channel, of what it read in training.
    Images x are sought whose own statistics are the same at every BatchNorm l that reads a convolution, and
    at l = 0, the image::

        min over x of  sum over l of  || m_l(x) - mu_l ||^2 + || s_l(x) - sigma_l ||^2

    x starts as noise and is moved by Adam; the network stays as it is. No image and no label is needed.

    Attributes:
        images: How many.
        iterations: Of Adam.
        lr: Its rate at the start; it falls to 0 as half a cosine.
        statistics: "batch", m and s over all images and positions, which is what a BatchNorm keeps; or
            "sample", over the positions of each image, the distances averaged over the images.
        relative: Measure distances in deviations of the channel, so that no layer drowns the others.

    Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", 2020, arXiv 2001.00281,
    section 3.1.
    Differs: "batch" is ours, and so are relative distances (the paper's are absolute), a rate that falls
    from the start instead of on plateaus, images kept inside the range of real pixels where the card tells
    it, with the mean and deviation of photographs there (0.45 and 0.25 of the range, the 0 and 1 of the paper
    for the usual normalisation), and the best images seen instead of the last. Large images are made a few
    at a time, each lot with the statistics wanted.
    """

    before = frozenset({"folded", "placed"})
    gives = frozenset({"distilled"})
    makes_images = True

    images: int = Field(64, ge=1)
    iterations: int = Field(100, ge=1)
    lr: float = Field(0.5, gt=0)
    statistics: Literal["batch", "sample"] = "batch"
    relative: bool = True

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Put the images on the Net."""
        made = distill(net, self, context.seed, partial(context.tell, "zeroq"))
        net.images = made.images
        note = f"distance {made.first:.4g} -> {made.last:.4g} over {made.norms} BatchNorms and the image"
        return StepReport(step="zeroq", changed=len(made.images), notes=(note,))


@dataclass(frozen=True)
class Distilled:
    """Images and how near they are.

    Attributes:
        images: float32 (N, C, H, W).
        first: The distance of noise.
        last: The distance of these images.
        norms: How many BatchNorms were looked at.
    """

    images: Tensor
    first: float
    last: float
    norms: int


@dataclass(frozen=True)
class Wanted:
    """Statistics that a tensor should have, float32 (C,).

    Attributes:
        mean: Of each channel.
        std: Of each channel.
        unit: What distances are measured in.
    """

    mean: Tensor
    std: Tensor
    unit: Tensor


def mismatch(x: Tensor, wanted: Wanted, statistics: str = "batch") -> tuple[Tensor, Tensor]:
    """Return || m(x) - mean ||^2 and || s(x) - std ||^2 of a tensor (N, C, H, W), in units squared.

    Example:
        >>> x = torch.tensor([[1.0, 0, 2, 1], [-1, 3, -1, -5]]).reshape(1, 2, 2, 2)
        >>> wanted = Wanted(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0]), torch.ones(2))
        >>> [round(float(part), 5) for part in mismatch(x, wanted)]
        [0.25, 0.77208]
    """
    axes = (0, 2, 3) if statistics == "batch" else (2, 3)
    mean, std = x.mean(axes), torch.sqrt(x.var(axes, correction=0) + _SMALLEST)
    gaps = ((mean - wanted.mean) / wanted.unit, (std - wanted.std) / wanted.unit)
    first, second = (gap.square().sum(-1).mean() for gap in gaps)
    return first, second


def distill(
    net: Net, settings: ZeroQ, seed: int = 0, tell: Callable[[float], None] | None = None
) -> Distilled:
    """Return images made for a network; see `ZeroQ`.

    Args:
        net: Before its BatchNorms are folded; stays as it is.
        settings: The hyperparameters.
        seed: Of the noise; same seed, same images.
        tell: Told the fraction done.

    Raises:
        RecipeError: No BatchNorm with statistics reads a convolution, or the distance is not finite.
    """
    net = net.clone().eval()
    for parameter in net.graph.parameters():
        parameter.requires_grad_(False)
    norms = {layer.node: _wanted_by(layer.module, settings.relative) for layer in norms_of(net)}
    lots = _lots(settings.images, net.input_size)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, count in enumerate(lots):
        part = partial(_tell_part, tell, index, len(lots))
        found.append(_distill_lot(net, norms, settings, count, generator, part))
    share = [count / settings.images for count in lots]
    first, last = (
        sum(s * getattr(lot, name) for s, lot in zip(share, found, strict=True)) for name in ("first", "last")
    )
    return Distilled(torch.cat([lot.images for lot in found]), first, last, len(norms))


def norms_of(net: Net) -> list[Layer]:
    """Return the BatchNorms that read a convolution's output and know its statistics.

    Raises:
        RecipeError: There is none.
    """
    found = []
    for layer in net.layers():
        source = layer.node.args[0] if layer.node.args else None
        if not isinstance(layer.module, nn.BatchNorm2d) or not isinstance(source, fx.Node):
            continue
        reads = net.graph.get_submodule(str(source.target)) if source.op == "call_module" else None
        if isinstance(reads, nn.Conv2d | nn.ConvTranspose2d) and layer.module.running_mean is not None:
            found.append(layer)
    if not found:
        raise RecipeError(
            f"{net.name}: no BatchNorm reads a convolution, so nothing tells what its images are like; "
            "take a recipe that calibrates on images"
        )
    return found


def _tell_part(tell: Callable[[float], None] | None, part: int, parts: int, fraction: float) -> None:
    if tell is not None:
        tell((part + fraction) / parts)


def _lots(images: int, size: tuple[int, int, int]) -> list[int]:
    """Split a number of images into nearly equal lots that fit memory."""
    most = max(1, _AT_ONCE_VALUES // math.prod(size))
    lots = math.ceil(images / most)
    return [images // lots + (index < images % lots) for index in range(lots)]


def _wanted_by(norm: nn.Module, relative: bool) -> Wanted:
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.detach(), norm.running_var.detach()
    unit = torch.sqrt(variance + norm.eps) if relative else torch.ones_like(mean)
    return Wanted(mean, torch.sqrt(variance + _SMALLEST), unit)


def _image_wanted(net: Net, relative: bool) -> tuple[Wanted, tuple[Tensor, Tensor] | None]:
    """Return the statistics of photographs, and the ends between which pixels lie where they are known."""
    moments = image_moments(net)
    assert moments.variance is not None
    mean, std = moments.mean.float(), moments.variance.sqrt().float()
    wanted = Wanted(mean, std, std if relative else torch.ones_like(std))
    if net.image_range is None:
        return wanted, None
    low, high = (torch.tensor(end).reshape(-1, 1, 1) for end in net.image_range)
    return wanted, (low, high)


def _distill_lot(
    net: Net,
    norms: dict[fx.Node, Wanted],
    settings: ZeroQ,
    count: int,
    generator: torch.Generator,
    tell: Callable[[float], None],
) -> Distilled:
    own, ends = _image_wanted(net, settings.relative)
    noise = torch.randn((count, *net.input_size), generator=generator)
    x = _inside(noise * own.std.reshape(-1, 1, 1) + own.mean.reshape(-1, 1, 1), ends).requires_grad_(True)
    adam = torch.optim.Adam([x], lr=settings.lr)
    best, first, last = x.detach().clone(), math.inf, math.inf
    with torch.enable_grad(), _gaps(net, norms, settings.statistics) as gaps:
        for step in range(settings.iterations + 1):
            gaps.clear()
            net(x)
            total = torch.stack([*gaps, *mismatch(x, own, settings.statistics)]).sum()
            distance = float(total.detach())
            first = distance if step == 0 else first
            if distance < last:
                best, last = x.detach().clone(), distance
            if step == settings.iterations:
                break
            adam.param_groups[0]["lr"] = (
                settings.lr * (1 + math.cos(math.pi * step / settings.iterations)) / 2
            )
            adam.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                x.copy_(_inside(x, ends))
            tell((step + 1) / settings.iterations)
    if not math.isfinite(first) or not bool(best.isfinite().all()):
        raise RecipeError(
            f"{net.name}: the distance of its BatchNorm statistics is not finite ({first:g}); "
            "check the weights"
        )
    return Distilled(best, first, last, len(norms))


def _inside(x: Tensor, ends: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if ends is None else torch.minimum(torch.maximum(x, ends[0]), ends[1])


@contextmanager
def _gaps(net: Net, norms: dict[fx.Node, Wanted], statistics: str) -> Iterator[list[Tensor]]:
    """Keep the distances of each BatchNorm's input while the network runs."""
    found: list[Tensor] = []

    def keep(wanted: Wanted, module: Any, inputs: tuple[Tensor, ...]) -> None:
        found.extend(mismatch(inputs[0], wanted, statistics))

    handles = [
        net.graph.get_submodule(str(node.target)).register_forward_pre_hook(partial(keep, wanted))
        for node, wanted in norms.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
