"""How many bits the weights of each layer get: the front of bytes and loss, by integer programs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fewbit.errors import FewbitError
from fewbit.net import Net
from fewbit.place.regions import Region
from fewbit.search.mixed.front import front
from fewbit.search.mixed.widths import width_problem
from fewbit.sensitivity.kl import KL
from fewbit.sensitivity.score import Tell
from fewbit.spec import Frozen, Scheme

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_METHOD = "mse"
_POINTS = 48
_RUNS_OF_HALF = 0.5  # what lies before a rounded layer is taken from the float network's run


class Widths(Frozen):
    """One choice of widths.

    Attributes:
        bits: Width of the weights by name of a layer.
        code_bytes: Of all weights, packed at these widths; scales left out.
        loss: Sum of the sensitivities.
    """

    bits: Mapping[str, int]
    code_bytes: float
    loss: float


def choose_widths(
    net: Net,
    images: Sequence[Tensor],
    widths: Sequence[int] = WIDTHS,
    limit_s: float | None = None,
    tell: Tell | None = None,
) -> tuple[Widths, ...]:
    """Return the choices that no other one beats in bytes and in sensitivity, the smallest first.

    The loss of a layer at a width is the KL divergence of the answers when its weights alone are rounded to
    it, in the grid of the shipped recipes and ranges of least squared error. Integer programs give the least
    sum of losses at one limit of bytes after another::

        min  sum_i KL_i(b_i)    s.t.  sum_i parameters_i b_i / 8 <= limit,  b_i in `widths`

    Args:
        net: In float, its BatchNorms folded.
        images: Float32 (N, C, H, W), for the sensitivities.
        widths: Bits that a layer's weights may have.
        limit_s: Seconds that the sensitivities may take; none for as long as they take.
        tell: Told the fraction done.

    Raises:
        FewbitError: The sensitivities would take longer, judged by one run of the network.

    Source: Z. Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, 2021, arXiv 2011.10680 (the program);
    Y. Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, 2020, arXiv 2001.00281 (the losses).
    Differs: KL in place of the Hessian's trace; the whole front in place of one limit; activations keep their
    8 bits.
    """
    layers = {layer.name: layer.module for layer in net.layers()}
    sizes = {n: m.weight.numel() for n, m in layers.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    needed_s = _seconds(net, images) * (1 + _RUNS_OF_HALF * len(sizes) * len(widths))
    if limit_s is not None and needed_s > limit_s:
        raise FewbitError(
            f"the sensitivities of {len(sizes)} layers at {len(widths)} widths take about {needed_s:.0f} s "
            f"and {max(0.0, limit_s):.0f} s may be spent on them; give more --minutes"
        )
    grids = [Scheme().weights.model_copy(update={"bits": bits}) for bits in widths]
    shown = [(batch, None) for batch in images]
    scores = KL(ranges=_METHOD).score(net, shown, [Region(n, (n,)) for n in sizes], grids, tell=tell)
    losses = {name: dict(zip(widths, row, strict=True)) for name, row in scores.losses.items()}
    return tuple(
        Widths(
            bits={name: int(option[1:]) for name, option in point.options.items()},
            code_bytes=point.costs["bytes"],
            loss=point.loss,
        )
        for point in front(width_problem(losses, sizes), "bytes", points=_POINTS).points
    )


def _seconds(net: Net, images: Sequence[Tensor]) -> float:
    """Return about how long the network runs over all images."""
    start = time.perf_counter()
    with torch.no_grad():
        net(images[0])
    return (time.perf_counter() - start) * sum(map(len, images)) / len(images[0])
