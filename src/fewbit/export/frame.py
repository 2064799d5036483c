"""A border in a colour of its own for each channel, as strips joined to the four sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fewbit import ops
from fewbit.export.emit import Emitter, emits
from fewbit.net import Layer

_SIDES = (("top", "bottom"), ("left", "right"))


def frame(
    e: Emitter, layer: Layer, x: ir.Value, channels_last: bool = False, dtype: Any = np.float32
) -> ir.Value:
    """Add the nodes of an `ops.Frame`: two copies of the tensor, and no kernel that pads.

    Args:
        e: The graph.
        layer: Its module is an `ops.Frame`.
        x: (N, C, H, W), or (N, H, W, C).
        channels_last: The second.
        dtype: Of the values.
    """
    module, name = layer.module, layer.name
    assert isinstance(module, ops.Frame)
    channels, rows, columns = e.size_of_input(layer)[1:]
    top, left, bottom, right = module.pads
    values = module.values.numpy().reshape((1, 1, 1, -1) if channels_last else (1, -1, 1, 1))
    colour = e.constant(f"{name}.values", values, dtype)
    images = e.add("Shape", f"{name}.images", [x], start=0, end=1)

    def strip(side: str, size: Sequence[int]) -> ir.Value:
        shape = [*size, channels] if channels_last else [channels, *size]
        sizes = e.constant(f"{name}.{side}.size", shape, np.int64)
        whole = e.add("Concat", f"{name}.{side}.shape", [images, sizes], axis=0)
        return e.add("Expand", f"{name}.{side}", [colour, whole])

    strips = (
        {"top": (top, columns), "bottom": (bottom, columns)},
        {"left": (top + rows + bottom, left), "right": (top + rows + bottom, right)},
    )
    wanted = [[side for side in _SIDES[axis] if strips[axis][side][axis]] for axis in (0, 1)]
    last = max((axis for axis in (0, 1) if wanted[axis]), default=None)
    for axis in (0, 1):
        if wanted[axis]:
            made = {side: strip(side, strips[axis][side]) for side in wanted[axis]}
            before, after = (made.get(side) for side in _SIDES[axis])
            parts = [part for part in (before, x, after) if part is not None]
            place = axis + (1 if channels_last else 2)
            x = e.add("Concat", name if axis == last else f"{name}.rows", parts, axis=place)
    return x


@emits("Frame")
def _frame(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    return frame(e, layer, inputs[0])
