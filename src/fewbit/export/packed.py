"""How many bytes a file would take were its narrow weights packed."""

from __future__ import annotations

from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, QuantLinear


def packed_bytes(net: Net, file_bytes: int) -> int:
    """Return what a file would take were the codes of weights under 8 bits packed at their widths.

    Engines read a byte a code, whatever its width. With n_i codes of b_i bits in layer i::

        packed = file - sum over layers with b_i < 8 of (n_i - ceil(n_i b_i / 8))

    Everything else (scales, biases, the graph) counts as it stands in the file.

    Args:
        net: Quantized, as it was exported.
        file_bytes: Size of its file.

    Returns:
        The bytes; 0 where no weight has less than 8 bits.

    Example:
        >>> from fewbit.load.capture import capture
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> packed_bytes(capture(model.eval(), "float", (3, 2, 2)), 1000)
        0
    """
    widths: dict[str, tuple[int, int]] = {}
    for layer in net.layers():
        if isinstance(layer.module, QuantConv2d | QuantLinear):
            bits = layer.module.weight_quantizer.spec.bits
            if bits < 8:
                widths[layer.name] = layer.module.weight.numel(), bits
    if not widths:
        return 0
    return file_bytes - sum(count - -(-count * bits // 8) for count, bits in widths.values())
