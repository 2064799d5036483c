"""KL sensitivity: how far the answers move when one layer's weights get few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fewbit.errors import DataError, RecipeError
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer
from fewbit.ranges.weights import find_weight_range
from fewbit.spec import QuantSpec


def kl_divergence(exact: Tensor, found: Tensor) -> Tensor:
    """Return KL(P || Q) of each image, P the softmax of the exact logits and Q of those found.

    ``sum over classes of P (log P - log Q)``, in float64.

    Args:
        exact: Logits (N, classes).
        found: Logits (N, classes).

    Example:
        >>> logits = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()
        >>> [round(float(value), 6) for value in kl_divergence(logits, logits.flip(1))]
        [0.549306, 0.0]
    """
    first, second = (torch.log_softmax(logits.detach().double(), 1) for logits in (exact, found))
    return (first.exp() * (first - second)).sum(1)


def kl_sensitivities(
    net: Net,
    batches: Iterable[Tensor],
    widths: Sequence[QuantSpec],
    method: str = "minmax",
    tell: Callable[[float], None] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Return the sensitivity of each convolution and matrix product at each width of its weights.

    With only layer i's weights rounded to k bits and all else in float::

        Omega_i(k) = 1/N sum over n of KL( softmax(z_n) || softmax(z_n with layer i at k bits) )

    Args:
        net: In float, its BatchNorms folded; stays as it is.
        batches: Images (N, C, H, W) float32, real or distilled.
        widths: The grids to try.
        method: Row of the registry's `ranges` that finds their ranges.
        tell: Told the fraction done.

    Returns:
        By layer in the order in which they run, one number a width.

    Raises:
        RecipeError: The network is quantized already.
        DataError: No image came.

    Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", 2020, arXiv 2001.00281,
    section 3.2.
    """
    if "placed" in net.facts:
        raise RecipeError(f"{net.name}: is quantized already; give the float network")
    net = net.clone().eval()
    shown = list(batches)
    images = sum(len(batch) for batch in shown)
    if not images:
        raise DataError("KL sensitivity: no image came; give at least one, or distil some")
    layers = [layer for layer in net.layers() if isinstance(layer.module, nn.Conv2d | nn.Linear)]
    found: dict[str, tuple[float, ...]] = {}
    with torch.no_grad():
        exact = [net(batch) for batch in shown]
        for done, layer in enumerate(layers):
            module, sums = layer.module, []
            assert isinstance(module, nn.Conv2d | nn.Linear)
            own = module.weight.data
            for spec in widths:
                module.weight.data = rounded(own, spec, method, layer.name)
                gaps = [kl_divergence(z, net(batch)).sum() for z, batch in zip(exact, shown, strict=True)]
                sums.append(float(torch.stack(gaps).sum()) / images)
            module.weight.data = own
            found[layer.name] = tuple(sums)
            if tell is not None:
                tell((done + 1) / len(layers))
    return found


def rounded(weight: Tensor, spec: QuantSpec, method: str, name: str) -> Tensor:
    """Return a weight rounded to a grid whose range a method finds."""
    quantizer = Quantizer(spec, name, weight=True)
    found = find_weight_range(weight, spec, 0, method, name)
    quantizer.set_range(found.low, found.high)
    values: Tensor = quantizer(weight)
    return values
