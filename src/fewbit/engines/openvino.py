"""OpenVINO on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewbit.engines.calls import Calls
from fewbit.engines.profile import WARM_CALLS, Flow, OperatorTime, Taken, join_times
from fewbit.engines.session import Images, PlacedOperator, Placement, Setting
from fewbit.errors import EngineError
from fewbit.spec import ImageInput

_HINTS = {"float32": "f32", "bf16": "bf16"}
_FLOATS = {hint: precision for precision, hint in _HINTS.items()}
_PRECISIONS = {"f32": "float32", "f16": "float16", "i8": "int8", "u8": "int8", "i32": "int32", "i64": "int64"}
# What an operator makes is told apart by sign too: kernels are chosen by it.
_MADE = {"u8": "uint8", "i8": "int8"}
_MATRIX = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
_NOT_WORK = frozenset({"Const", "Input", "Output", "Parameter", "Result"})


@cache
def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports the import to a server if it is found."""
    blocked = "openvino_telemetry" not in sys.modules
    if blocked:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if blocked:
            del sys.modules["openvino_telemetry"]
    return openvino


@cache
def _core() -> Any:
    openvino = _openvino()
    # Two threads that make the first type conversion of a process at once wait for each other for ever
    # (seen with 2026.4: 14 of 20 processes hung); made once before, it is there for all.
    openvino.Type.f32.to_dtype()
    return openvino.Core()


class OpenVino:
    """Opens files with OpenVINO's CPU plugin.

    The precision of float operators is pinned, activations are never quantized by the engine itself, threads
    are not pinned to cores (others use the machine too), and the batch is static, which is faster; a last
    smaller batch is filled with zeros and cut.
    """

    def open(self, path: Path, setting: Setting) -> OpenVinoSession:
        """Open an exported file.

        Raises:
            EngineError: OpenVINO refuses the file, or the host has no bf16 and it is asked for.
        """
        return OpenVinoSession(path, setting)


class OpenVinoSession:
    """A file compiled by OpenVINO."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        if setting.float_precision == "bf16" and "BF16" not in _core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise EngineError(f"{path.name}: this processor has no native bf16; use float32")
        self._compiled = self._compile(self._options())
        requests = [self._compiled.create_infer_request() for _ in range(setting.streams)]
        self._shape = tuple(self._compiled.inputs[0].get_shape())
        pixels = self._compiled.inputs[0].get_element_type() == _openvino().Type.u8
        self.takes: ImageInput = "uint8" if pixels else "float32"
        classes = self._compiled.outputs[0].get_shape()[-1]
        self._calls = Calls(self._call, requests, setting, classes, self.takes, path.name)

    def _compile(self, options: dict[str, object]) -> Any:
        core = _core()
        try:
            model = core.read_model(str(self.path))
            shape = model.inputs[0].get_partial_shape()
            shape[0] = self.setting.batch
            model.reshape({model.inputs[0]: shape})
            return core.compile_model(model, "CPU", options)
        except Exception as error:  # OpenVINO raises RuntimeError and others
            raise EngineError(f"{self.path.name}: openvino refuses it ({_one_line(error)})") from error

    def _options(self) -> dict[str, object]:
        return {
            "INFERENCE_PRECISION_HINT": _HINTS[self.setting.float_precision],
            "INFERENCE_NUM_THREADS": self.setting.threads_per_stream * self.setting.streams,
            "NUM_STREAMS": self.setting.streams,
            "ENABLE_CPU_PINNING": False,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }

    def run(self, batch: Images) -> NDArray[np.float32]:
        """Return the logits (N, classes) of images (N, C, H, W), or of pixels (N, H, W, C).

        Raises:
            EngineError: The images do not fit the network, or an operator failed.
        """
        return self._calls.run(batch)

    def _call(self, request: Any, images: Images) -> NDArray[np.float32]:
        count = len(images)
        if images.shape[1:] != self._shape[1:]:
            raise EngineError(
                f"{self.path.name}: openvino got images {images.shape[1:]}, "
                f"the network takes {self._shape[1:]}"
            )
        if count < self._shape[0]:
            images = np.concatenate(
                [images, np.zeros((self._shape[0] - count, *self._shape[1:]), images.dtype)]
            )
        try:
            request.start_async([images], share_inputs=True)
            request.wait()
            logits: NDArray[np.float32] = np.array(request.get_output_tensor(0).data[:count])
        except Exception as error:  # OpenVINO raises RuntimeError and others
            raise EngineError(f"{self.path.name}: openvino failed ({_one_line(error)})") from error
        return logits

    def placement(self) -> Placement:
        """Read the graph that runs: kernels and precisions as OpenVINO reports them."""
        return Placement(engine="openvino", operators=self._placed(_working(self._compiled)))

    def _placed(self, nodes: Sequence[_Node]) -> tuple[PlacedOperator, ...]:
        from fewbit.engines.exported import ExportedGraph

        exported = ExportedGraph(self.path)
        names = [[n for n in node.told["originalLayersNames"].split(",") if n] for node in nodes]
        owned = exported.owners([node.told["layerType"] for node in nodes], names)
        return tuple(
            _operator(node.name, node.told, layers, exported, tokens)
            for node, layers, tokens in zip(nodes, owned, names, strict=True)
        )

    def profile(self, images: Images, calls: int) -> tuple[OperatorTime, ...]:
        """Time each operator with OpenVINO's own performance counters, one call after the other.

        Raises:
            EngineError: The images do not fit the network, or an operator failed.
        """
        alone = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": self.setting.threads_per_stream}
        compiled = self._compile(self._options() | alone | {"PERF_COUNT": True})
        request = compiled.create_infer_request()
        told = []
        for count in (WARM_CALLS, calls):
            for _ in range(count):
                self._call(request, images)
            told.append(request.profiling_info)
        nodes = _working(compiled)
        return join_times(self._placed(nodes), _taken(told[0], told[1], calls), _flows(nodes))


class _Node(NamedTuple):
    """A node of the graph that runs: its name, what OpenVINO tells of it, the names of what it reads."""

    name: str
    told: dict[str, str]
    makers: list[str]


def _working(compiled: Any) -> list[_Node]:
    """Return the nodes that run in each call, in their order."""
    nodes, constant = list[_Node](), set[str]()
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {key: value.value for key, value in node.rt_info.items()}
        makers = [value.get_node().get_friendly_name() for value in node.input_values()]
        # What depends on constants alone runs once, when the file is opened.
        if told["layerType"] == "Const" or (makers and constant.issuperset(makers)):
            constant.add(node.get_friendly_name())
        elif told["layerType"] not in _NOT_WORK:
            nodes.append(_Node(node.get_friendly_name(), told, makers))
    return nodes


def _flows(nodes: Sequence[_Node]) -> Iterator[Flow]:
    places = {node.name: place for place, node in enumerate(nodes)}
    for node in nodes:
        made = node.told["outputPrecisions"].split(",")[0]
        yield Flow(
            sources=tuple(dict.fromkeys(places[name] for name in node.makers if name in places)),
            makes=_MADE.get(made) or _PRECISIONS.get(made, made),
            layout=node.told["outputLayouts"].split(",")[0],
            kernel=node.told["primitiveType"],
        )


def _taken(warm: Sequence[Any], whole: Sequence[Any], calls: int) -> Iterator[Taken]:
    """Yield the mean of the later calls: the counters are means since the file was opened, in whole us."""
    before = {counter.node_name: counter.real_time.total_seconds() for counter in warm}
    for counter in whole:
        total_s = (WARM_CALLS + calls) * counter.real_time.total_seconds()
        later_s = (total_s - WARM_CALLS * before[counter.node_name]) / calls
        yield Taken(name=counter.node_name, kind=counter.node_type, ms=max(0.0, 1e3 * later_s))


def _operator(
    name: str, told: dict[str, str], layers: tuple[str, ...], exported: Any, tokens: list[str]
) -> PlacedOperator:
    kind, matrix = told["layerType"], told["layerType"] in _MATRIX and not exported.all_norm(layers)
    precision = _PRECISIONS.get(told["runtimePrecision"], told["runtimePrecision"])
    if not layers and not matrix:
        kind = exported.only_quantizes(tokens) or kind
    why = told["primitiveType"]
    ran = _FLOATS.get(why.rpartition("_")[2])
    if matrix and precision == "int8" and ran is not None:
        precision = ran  # its input was codes; a zero point that it cannot take made them floats
    if matrix and precision != "int8":
        reasons = [reason for reason in map(exported.why_float, layers) if reason]
        why = f"{why}: {reasons[0]}" if reasons else why
    return PlacedOperator(name=name, layers=layers, kind=kind, precision=precision, matrix=matrix, why=why)


def _one_line(error: Exception) -> str:
    """Drop the places in OpenVINO's sources."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    told = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    return " ".join(told or str(error).split())[:300]
