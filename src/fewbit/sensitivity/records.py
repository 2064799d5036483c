"""What is kept of each layer of a quantized network: frozen data, no torch."""

from __future__ import annotations

from fewbit.spec import Frozen


class Histogram(Frozen):
    """Counts of values between `low` and `high` in equal bins."""

    low: float
    high: float
    counts: tuple[int, ...]


class LayerRecord(Frozen):
    """One layer of a quantized network.

    Attributes:
        name: The layer's name in the Net.
        kind: Its operator ("Conv", "Linear", "Add").
        precision: What it runs in: "int8", "float32", "bf16", or "fused" into the layer before it.
        weight_bits: Width of its weights, none where float.
        activation_bits: Width of its output, none where float.
        sqnr_db: Signal to quantization noise of its output against the float network, in dB.
        low: Lowest value of its output's grid; none where the output is not quantized.
        high: Highest value of its output's grid.
        weight_range_ratio: Largest over smallest channel maximum of its weights.
        weights: Histogram of its weights.
        activations: Histogram of its output.
    """

    name: str
    kind: str
    precision: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    sqnr_db: float | None = None
    low: float | None = None
    high: float | None = None
    weight_range_ratio: float | None = None
    weights: Histogram | None = None
    activations: Histogram | None = None
