"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fewbit.engines.calls import Calls
from fewbit.engines.profile import WARM_CALLS, Flow, OperatorTime, Taken, join_times
from fewbit.engines.session import CONVERTING, Images, PlacedOperator, Placement, Setting
from fewbit.errors import EngineError
from fewbit.spec import ImageInput

_ERRORS_ONLY = 3
_MATRIX = frozenset(
    {
        "Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "ConvTranspose", "Gemm",
        "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "TransposeMatMul", "QLinearMatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
    }
)  # fmt: skip
# Operators whose result has another type than their first input, beside QuantizeLinear and the like.
_MAKES_INT32 = frozenset({"ConvInteger", "MatMulInteger"})
_MAKES_FLOAT = frozenset({"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
_MAKES_INT64 = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
# ONNX element types by number.
_TYPES = {1: "float32", 2: "int8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bf16"}
_QGEMM_OUTPUT_SCALE = 7
_TIME = "_kernel_time"


class OnnxRuntime:
    """Opens files with ONNX Runtime's CPU provider, all graph optimizations on.

    Intra-operator threads are threads / streams, inter-operator ones 1. Threads do not spin: that would take
    the processor from the other candidate of an interleaved measurement (and cost speed on a busy machine).
    """

    def open(self, path: Path, setting: Setting) -> OnnxRuntimeSession:
        """Open an exported file.

        Raises:
            EngineError: ONNX Runtime refuses the file, the file's batch is fixed at another one, or bf16 is
                asked for.
        """
        return OnnxRuntimeSession(path, setting)


class OnnxRuntimeSession:
    """A file opened by ONNX Runtime."""

    def __init__(self, path: Path, setting: Setting) -> None:
        if setting.float_precision != "float32":
            raise EngineError(
                f"{path.name}: onnxruntime computes nothing in {setting.float_precision} on the CPU; "
                "use float32, or the openvino engine"
            )
        self.path, self.setting = path, setting
        ort.set_default_logger_severity(_ERRORS_ONLY)
        first = self._create()
        # A session has one pool of threads: streams of several threads need one session each.
        alone = setting.threads_per_stream == 1
        slots = [first] + [first if alone else self._create() for _ in range(setting.streams - 1)]
        self._input = first.get_inputs()[0].name
        self._output = first.get_outputs()[0].name
        fixed = first.get_inputs()[0].shape[0]
        if isinstance(fixed, int) and fixed != setting.batch:
            raise EngineError(
                f"{path.name}: its batch is fixed at {fixed}, the setting asks for {setting.batch}; "
                f"use --batch {fixed} or export it with a free batch axis"
            )
        self._fixed = fixed if isinstance(fixed, int) else 0
        self.takes: ImageInput = "uint8" if first.get_inputs()[0].type == "tensor(uint8)" else "float32"
        classes = first.get_outputs()[0].shape[-1]
        self._calls = Calls(
            self._call, slots, setting, classes if isinstance(classes, int) else 0, self.takes, path.name
        )

    def _create(self, optimized: Path | None = None, profile: Path | None = None) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = self.setting.threads_per_stream
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimized.stem}.bin"
            )
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class but Exception
            raise EngineError(f"{self.path.name}: onnxruntime refuses it ({_one_line(error)})") from error

    def run(self, batch: Images) -> NDArray[np.float32]:
        """Return the logits (N, classes) of images (N, C, H, W), or of pixels (N, H, W, C).

        Raises:
            EngineError: The images do not fit the network, or an operator failed.
        """
        return self._calls.run(batch)

    def _call(self, session: Any, images: Images) -> NDArray[np.float32]:
        count = len(images)
        if self._fixed > count:
            images = np.concatenate(
                [images, np.zeros((self._fixed - count, *images.shape[1:]), images.dtype)]
            )
        try:
            logits: NDArray[np.float32] = session.run([self._output], {self._input: images})[0]
        except Exception as error:  # its errors share no class but Exception
            raise EngineError(
                f"{self.path.name}: onnxruntime failed on images {images.shape} ({_one_line(error)})"
            ) from error
        return logits[:count]

    def placement(self) -> Placement:
        """Read the optimized graph, in which every node is what runs."""
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._create(optimized)
            return Placement(engine="onnxruntime", operators=self._placed(*_working(optimized)))

    def _placed(self, nodes: Sequence[Any], types: Sequence[tuple[str, str]]) -> tuple[PlacedOperator, ...]:
        from fewbit.engines.exported import ExportedGraph

        exported = ExportedGraph(self.path)
        owned = exported.owners([n.op_type for n in nodes], [(n.name, *n.output) for n in nodes])
        operators = []
        for node, layers, (precision, _) in zip(nodes, owned, types, strict=True):
            floats = precision != "int8" and node.op_type not in CONVERTING
            reasons = [exported.why_float(layer) for layer in layers] if floats else []
            operators.append(
                PlacedOperator(
                    name=node.name,
                    layers=layers,
                    kind=node.op_type,
                    precision=precision,
                    matrix=node.op_type in _MATRIX and not exported.all_norm(layers),
                    why=next((reason for reason in reasons if reason), ""),
                )
            )
        return tuple(operators)

    def profile(self, images: Images, calls: int) -> tuple[OperatorTime, ...]:
        """Time each node of the optimized graph with ONNX Runtime's own profiler, one call after the other.

        Raises:
            EngineError: The images do not fit the network, or an operator failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            session = self._create(optimized, Path(folder) / "profile")
            for _ in range(WARM_CALLS + calls):
                self._call(session, images)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            nodes, types = _working(optimized)
        placed = self._placed(nodes, types)
        taken = _taken(events, {o.name for o in placed if o.name}, calls)
        return join_times(placed, taken, _flows(nodes, types))


def _working(optimized: Path) -> tuple[list[Any], list[tuple[str, str]]]:
    """Return the nodes of an optimized graph, with what each runs in and the type that it makes."""
    import onnx

    graph = onnx.load(optimized, load_external_data=False).graph
    constants = {c.name for c in graph.initializer}
    # A dequantizer of weights is part of the operator that reads them.
    nodes = [n for n in graph.node if n.op_type != "DequantizeLinear" or n.input[0] not in constants]
    return nodes, list(_precisions(nodes, graph))


def _flows(nodes: Sequence[Any], types: Sequence[tuple[str, str]]) -> Iterator[Flow]:
    maker = {value: place for place, node in enumerate(nodes) for value in node.output}
    for node, (_, made) in zip(nodes, types, strict=True):
        yield Flow(sources=tuple(dict.fromkeys(maker[v] for v in node.input if v in maker)), makes=made)


def _taken(events: Sequence[Any], names: set[str], calls: int) -> Iterator[Taken]:
    """Yield the mean of each node over the last calls; a node without a name is called kind_index there."""
    spans: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_TIME):
            name = event["name"].removesuffix(_TIME)
            spans[name, event["args"]["op_name"]].append(event["dur"] / 1e3)
    for (name, kind), taken in spans.items():
        generated = name not in names and name.rpartition("_")[0] == kind
        # The placement leaves out only dequantizers of weights.
        yield Taken(
            name="" if generated else name, kind=kind, ms=sum(taken[-calls:]) / calls, precision="int8"
        )


def _precisions(nodes: Sequence[Any], graph: Any) -> Iterator[tuple[str, str]]:
    """Follow the types from the inputs through the graph: what each operator runs in, and what it makes.

    An operator runs in the type of its first input.
    """
    types = {value.name: _TYPES.get(value.type.tensor_type.elem_type, "float32") for value in graph.input}
    types |= {c.name: _TYPES.get(c.data_type, "float32") for c in graph.initializer}
    for node in nodes:
        read = next((types[value] for value in node.input if value in types), "float32")
        precision = "int8" if node.op_type == "DynamicQuantizeMatMul" else _data_type(node, types) or read
        made = _made_type(node, read)
        yield precision, made
        types.update(dict.fromkeys(node.output, made))


def _data_type(node: Any, types: dict[str, str]) -> str:
    """Return the type of the values of operators whose first input is a scale (QLinearConcat)."""
    return types.get(node.input[2], "int8") if node.op_type == "QLinearConcat" else ""


def _made_type(node: Any, read: str) -> str:
    kind = node.op_type
    if kind in _MAKES_FLOAT or (kind == "QGemm" and not _has_input(node, _QGEMM_OUTPUT_SCALE)):
        return "float32"
    if kind in _MAKES_INT32:
        return "int32"
    if kind in _MAKES_INT64:
        return "int64"
    if kind == "Cast":
        return next((_TYPES.get(a.i, "float32") for a in node.attribute if a.name == "to"), read)
    quantized = kind in ("QuantizeLinear", "DynamicQuantizeLinear") or kind.startswith("QLinear")
    return "int8" if quantized else read


def _has_input(node: Any, place: int) -> bool:
    return len(node.input) > place and bool(node.input[place])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
