"""What every engine offers: open a file, run batches, say which operators ran in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fewbit.spec import Frozen, ImageInput

EngineName = Literal["onnxruntime", "openvino", "reference"]
FloatPrecision = Literal["float32", "bf16"]
Rounding = Literal["exact", "onnxruntime", "openvino", "openvino_amx"]

# Operators that only convert, move or relabel values: neither integer nor float work.
CONVERTING = frozenset(
    {
        "Cast", "Convert", "DequantizeLinear", "DynamicQuantizeLinear", "Flatten", "Identity",
        "QuantizeLinear", "Reorder", "ReorderInput", "ReorderOutput", "Reshape", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip


class Setting(Frozen):
    """How a file is run.

    Attributes:
        engine: Which engine.
        float_precision: What the engine computes float operators in; float32 is pinned, never left to the
            engine (OpenVINO takes bf16 by itself on some hosts).
        batch: Images in one call.
        threads: Threads of the whole run.
        streams: Calls in flight at the same time; each has threads / streams threads.
        rounding: How the reference engine rounds: as the arithmetic is defined, or as an engine does
            ("openvino_amx": as OpenVINO on a processor with AMX, see `fewbit.measure.host.rounding_of`); the
            engines themselves do not read it.
    """

    engine: EngineName = "onnxruntime"
    float_precision: FloatPrecision = "float32"
    batch: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    streams: int = Field(1, ge=1)
    rounding: Rounding = "exact"

    @property
    def threads_per_stream(self) -> int:
        """Threads of one call."""
        return max(1, self.threads // self.streams)


class PlacedOperator(Frozen):
    """One operator of the graph that an engine really executes.

    Attributes:
        name: Its name in the engine's graph.
        layers: Names of the exported nodes it stands for, where the engine tells.
        kind: The engine's operator type ("QLinearConv", "Convolution").
        precision: What it runs in: "int8", "float32", "bf16", ...
        matrix: It is a convolution or a matrix product.
        why: The kernel's name, or why it stayed in float, where known.
    """

    name: str
    layers: tuple[str, ...] = ()
    kind: str
    precision: str
    matrix: bool = False
    why: str = ""


class Placement(Frozen):
    """All operators of an opened file, in the order of the engine's graph."""

    engine: str
    operators: tuple[PlacedOperator, ...]

    @property
    def integer_operators(self) -> int:
        """Operators that run in integers (quantize and dequantize left out)."""
        return sum(o.precision == "int8" for o in self.operators if o.kind not in CONVERTING)

    @property
    def float_operators(self) -> int:
        """Operators that run in float (quantize, dequantize and copies left out)."""
        return sum(o.precision != "int8" for o in self.operators if o.kind not in CONVERTING)

    def float_matrix_operators(self) -> tuple[PlacedOperator, ...]:
        """Convolutions and matrix products that run in float: what an int8 file must not have."""
        return tuple(o for o in self.operators if o.matrix and o.precision != "int8")

    def by_layer(self) -> dict[str, PlacedOperator]:
        """Return the operator that each exported node became part of, as far as the engine tells."""
        return {layer: o for o in self.operators for layer in o.layers}


class BlockTime(Frozen):
    """One block of calls, timed.

    Attributes:
        images: How many went through.
        seconds: From the first call's start to the last one's end.
        latencies_ms: Time of each call.
    """

    images: int
    seconds: float
    latencies_ms: tuple[float, ...]

    @property
    def images_per_s(self) -> float:
        """Throughput of the block."""
        return self.images / self.seconds


Images = NDArray[Any]  # float32 (N, C, H, W), or uint8 (N, H, W, C)


class Session(Protocol):
    """An opened file.

    Attributes:
        takes: What its input is: float32 images (N, C, H, W), or uint8 pixels (N, H, W, C).
    """

    takes: ImageInput

    def run(self, batch: Images) -> NDArray[np.float32]:
        """Return logits (N, classes) of images, for any N.

        More images than the setting's batch go through in calls of that size, `streams` of them at once. It
        may be called from as many threads at once as the setting has streams.
        """
        ...

    def placement(self) -> Placement:
        """Say which operators run in which precision."""
        ...


class Engine(Protocol):
    """Opens files."""

    def open(self, path: Path, setting: Setting) -> Session:
        """Open an exported file.

        Raises:
            EngineError: The engine refuses the file.
        """
        ...
