"""The independent witness: interprets an exported file in numpy, layers of codes in exact integers.

It shares no code with the engines it is compared with, nor with the exporter: only the definition of the
arithmetic (`fewbit.numerics`). Where it and an engine differ, `run_recorded` tells at which tensor that
begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.engines import reference_rounding as rounding
from fewbit.engines.calls import checked
from fewbit.engines.reference_fusion import fuse
from fewbit.engines.reference_graph import Coded, Graph, Node, Value, floats, read_graph
from fewbit.engines.reference_layers import IN_INTEGERS, LAYERS, Arguments
from fewbit.engines.reference_ops import OPERATORS
from fewbit.engines.session import Images, PlacedOperator, Placement, Setting
from fewbit.errors import EngineError, InputError, suggest

TABLE = {**LAYERS, **OPERATORS, **rounding.OPERATORS}
QUANTIZERS = {"QuantizeLinear", "DynamicQuantizeLinear", *rounding.QUANTIZERS}


class Reference:
    """Opens exported files to interpret them; its speed means nothing."""

    def open(self, path: Path, setting: Setting) -> ReferenceSession:
        """Open an exported file.

        Args:
            path: An .onnx file of opset 13 to 23.
            setting: Only `float_precision`, which must be float32, and `rounding` matter.

        Raises:
            EngineError: It cannot be read, or has an operator that is not known here.
        """
        if setting.float_precision != "float32":
            raise EngineError(
                f"{path}: the reference interpreter computes in float32, not {setting.float_precision}; "
                "set the float precision to float32"
            )
        graph = read_graph(Path(path), passes=setting.rounding != "onnxruntime")
        return ReferenceSession(fuse(graph, setting.rounding))


class ReferenceSession:
    """An opened file."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self.takes = graph, graph.takes
        self._constants: dict[str, Value] = dict(graph.constants)
        self._nodes: list[Node] = []
        self._placed: tuple[PlacedOperator, ...] | None = None
        for node in graph.nodes:
            if node.kind not in TABLE:
                raise EngineError(
                    f"{graph.name}: operator {node.kind} of node '{node.name}' is not known to the reference "
                    f"interpreter{suggest(node.kind, TABLE)}; run this file on another engine"
                )
            # What depends on constants alone is computed once.
            if all(name in self._constants for name in node.inputs if name):
                self._constants.update(_outputs(node, _apply(node, _arguments(node, self._constants))))
            else:
                self._nodes.append(node)
        self._last_use = {
            name: index for index, node in enumerate(self._nodes) for name in node.inputs if name
        }

    def run(self, batch: Images) -> NDArray[np.float32]:
        """Return logits ``(N, classes)`` of images ``(N, C, H, W)``, or of pixels ``(N, H, W, C)``, of any N.

        Raises:
            EngineError: The images do not fit the file, or an operator fails.
        """
        return self._interpret(batch, {}, {})

    def run_recorded(
        self, batch: Images, forced: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run, and return the codes of every quantized activation and the logits.

        Args:
            batch: Images ``(N, C, H, W)``.
            forced: Codes by value name, those of an engine: the run goes on with them after it has recorded
                its own, so that each tensor is compared by itself. Without it one code that differs near a
                tie changes many behind it, and in a deep network most.

        Returns:
            By ONNX value name: what each QuantizeLinear (or DynamicQuantizeLinear) put out, in the type of
            the file, and the file's output as float32.

        Raises:
            EngineError: As `run`.
        """
        record: dict[str, NDArray[Any]] = {}
        logits = self._interpret(batch, record, forced or {})
        record.setdefault(self._graph.output, logits)
        return record

    def placement(self) -> Placement:
        """Say which operators ran in integers; runs one image of zeros where nothing has run yet.

        Raises:
            EngineError: Nothing has run, and the file leaves the image size open.
        """
        if self._placed is None:
            sizes = self._graph.input_shape[1:]
            if None in sizes:
                raise EngineError(
                    f"{self._graph.name}: leaves its input size open {sizes}; run a batch first"
                )
            self._interpret(np.zeros((1, *(size or 0 for size in sizes)), self.takes), {}, {})
        return Placement(engine="reference", operators=self._placed or ())

    def _interpret(
        self, batch: Images, record: dict[str, NDArray[Any]], forced: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        self._check(batch)
        values = {self._graph.input: checked(batch, self.takes, self._graph.name)} | self._constants
        kept = {self._graph.output, *self._constants}
        placed: list[PlacedOperator] = []
        # Overflow and the like give infinities as in any engine; a NaN is refused where it meets a
        # QuantizeLinear.
        with np.errstate(all="ignore"):
            for index, node in enumerate(self._nodes):
                arguments = _arguments(node, values)
                found = _outputs(node, _apply(node, arguments))
                values.update(found)
                if node.kind in QUANTIZERS:
                    codes = record[node.outputs[0]] = floats(found[node.outputs[0]])
                    values[node.outputs[0]] = forced.get(node.outputs[0], codes)
                placed.extend(_place(node, arguments, found))
                for name in node.inputs:
                    if self._last_use.get(name) == index and name not in kept:
                        values.pop(name, None)
        self._placed = tuple(placed)
        if self._graph.output not in values:
            raise EngineError(
                f"{self._graph.name}: no node makes its output '{self._graph.output}'; export it again"
            )
        return np.asarray(floats(values[self._graph.output]), np.float32)

    def _check(self, batch: Images) -> None:
        wanted = self._graph.input_shape
        fits = batch.ndim == len(wanted) and all(
            size is None or size == given for size, given in zip(wanted[1:], batch.shape[1:], strict=True)
        )
        if not fits or len(batch) == 0:
            shown = ", ".join("N" if d == 0 or size is None else str(size) for d, size in enumerate(wanted))
            raise EngineError(
                f"{self._graph.name}: input '{self._graph.input}' takes ({shown}), not {batch.shape}; "
                "resize the images to it"
            )


def _arguments(node: Node, values: dict[str, Value]) -> Arguments:
    missing = [name for name in node.inputs if name and name not in values]
    if missing:
        raise node.error(f"its input '{missing[0]}' does not exist; export the file again")
    return [values[name] if name else None for name in node.inputs]


def _apply(node: Node, arguments: Arguments) -> Value | tuple[Value, ...]:
    try:
        return TABLE[node.kind](node, arguments)
    except (InputError, ValueError, IndexError, TypeError, AttributeError) as reason:
        raise node.error(reason) from reason


def _outputs(node: Node, found: Value | tuple[Value, ...]) -> dict[str, Value]:
    results = found if isinstance(found, tuple) else (found,)
    wanted = [name for name in node.outputs if name]
    if len(wanted) > len(results):
        raise node.error(f"only its first output is known here, not '{wanted[len(results)]}'")
    return {name: value for name, value in zip(node.outputs, results, strict=False) if name}


def _place(node: Node, arguments: Arguments, found: dict[str, Value]) -> Iterator[PlacedOperator]:
    """Say what a node just ran in; arithmetic on shapes is left out."""
    matrix = node.kind in IN_INTEGERS or node.kind in rounding.MATRIX
    if matrix:
        integers = node.kind in rounding.MATRIX or IN_INTEGERS[node.kind](node, arguments)
    elif any(not isinstance(v, Coded) and v.dtype in (np.int64, np.bool_) for v in found.values()):
        return
    else:
        integers = any(isinstance(v, Coded) or v.dtype in (np.int8, np.uint8) for v in found.values())
    yield PlacedOperator(
        name=node.name,
        layers=(node.name,),
        kind=node.kind,
        precision="int8" if integers else "float32",
        matrix=matrix,
        why="" if integers or not matrix else "an input has no codes, or a scale that does not factor out",
    )
