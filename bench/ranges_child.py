"""Find the range of one made-up tensor with one estimator, each time a line comes in; say how long it took.

Run by `ranges.py` in the environment that has the tool, so it imports nothing but the standard library, numpy
and the tool. Takes one JSON object as its argument. For each line on standard input it observes all batches
anew and prints {"observe_s", "find_s", "half_state_bytes", "last_state_bytes", "start_bytes", "peak_bytes",
"low", "high"}; the seconds are those of the processor. Making the numbers is not timed; one buffer holds
them, batch after batch, so that what a tool keeps is its own. First a small tensor goes through, so that
libraries are loaded before the start.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Batch = NDArray[np.float32]


class Tool(Protocol):
    """One estimator on one tensor."""

    def observe(self, batch: Batch) -> None:
        """Take in the values of one batch."""
        ...

    def find(self) -> tuple[float, float]:
        """Return the range."""
        ...

    def state_bytes(self) -> int:
        """Return the bytes of what it keeps between batches."""
        ...


def size_of(value: Any, seen: set[int]) -> int:
    """Return the bytes of an object and of all that it holds, arrays with their data."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, np.ndarray):
        return size if value.base is None else size + value.nbytes
    if isinstance(value, dict):
        return size + sum(size_of(key, seen) + size_of(item, seen) for key, item in value.items())
    if isinstance(value, list | tuple):
        return size + sum(size_of(item, seen) for item in value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return size + sum(size_of(getattr(value, name), seen) for name in slots if hasattr(value, name))


class Own:
    """A row of fewbit's registry."""

    def __init__(self, job: dict[str, Any], row: str) -> None:
        import torch

        from fewbit.registry import find
        from fewbit.spec import QuantSpec

        torch.set_num_threads(job["cores"])
        self.tensor = torch.from_numpy
        self.method = find("ranges", row)()
        self.spec = QuantSpec(bits=job["bits"])
        self.finder = self.method.start("x")

    def observe(self, batch: Batch) -> None:
        """Take in the values of one batch."""
        self.finder.observe(self.tensor(batch))

    def find(self) -> tuple[float, float]:
        """Return the range."""
        found = self.finder.find(self.spec)
        return float(found.low), float(found.high)

    def state_bytes(self) -> int:
        """Return the bytes of what it keeps between batches."""
        names = [name for name in type(self.finder).__slots__ if name not in ("method", "name")]
        return sum(size_of(getattr(self.finder, name), set()) for name in names)


class Collector:
    """ONNX Runtime's histogram, batch by batch: its calibrators put all batches in at once."""

    def __init__(self, _job: dict[str, Any], variant: str) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        method, _, bins = variant.partition("-")
        default = {"entropy": 128, "percentile": 2048, "distribution": 2048}[method]
        self.collector = HistogramCollector(method, False, int(bins or default), 128, 99.999, "same")

    def observe(self, batch: Batch) -> None:
        """Take in the values of one batch."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.collector.collect({"x": batch})

    def find(self) -> tuple[float, float]:
        """Return the range."""
        with contextlib.redirect_stdout(io.StringIO()):
            found = self.collector.compute_collection_result()["x"]
        return (float(found[0]), float(found[1])) if isinstance(found, tuple) else (0.0, float(found.highest))

    def state_bytes(self) -> int:
        """Return the bytes of what it keeps between batches."""
        return size_of(self.collector.histogram_dict, set())


class Calibrator:
    """ONNX Runtime's calibrator itself, on a file that does nothing but take the tensor in."""

    def __init__(self, job: dict[str, Any], variant: str) -> None:
        import onnx
        from onnxruntime.quantization import calibrate

        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, None])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2])
        node = onnx.helper.make_node("Shape", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "x", [x], [y])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "x.onnx"
        onnx.save(model, path)
        kind: Any = getattr(calibrate, f"{variant}Calibrater")

        class OneTensor(kind):  # type: ignore[misc]
            def select_tensors_to_calibrate(self, model: Any) -> tuple[set[str], dict[str, Any]]:
                return {"x"}, {"x": model.graph.input[0]}

        made = OneTensor(path, augmented_model_path=str(path.with_name("augmented.onnx")))
        made.augment_graph()
        made.create_inference_session()
        options = made.infer_session.get_session_options()
        options.intra_op_num_threads = job["cores"]
        session = type(made.infer_session)
        made.infer_session = session(made.augmented_model_path, options, providers=["CPUExecutionProvider"])
        self.calibrator, self.kept = made, 0

    def collect(self, batches: Iterator[Batch]) -> None:
        """Take in all batches."""

        class Reader:
            def get_next(self) -> dict[str, Batch] | None:
                batch = next(batches, None)
                return None if batch is None else {"x": batch}

        with contextlib.redirect_stdout(io.StringIO()):
            self.calibrator.collect_data(Reader())

    def observe(self, batch: Batch) -> None:
        """Refuse."""
        raise NotImplementedError("it takes all batches at once")

    def find(self) -> tuple[float, float]:
        """Return the range."""
        with contextlib.redirect_stdout(io.StringIO()):
            found = self.calibrator.compute_data()["x"]
        low, high = (float(np.ravel(end)[0]) for end in found.range_value)
        return low, high

    def state_bytes(self) -> int:
        """Return the bytes of what it keeps between batches."""
        return size_of(self.calibrator.intermediate_outputs, set())


TOOLS: dict[str, type[Own] | type[Collector] | type[Calibrator]] = {
    "fewbit": Own,
    "collector": Collector,
    "calibrator": Calibrator,
}


class Numbers:
    """Batches of values, made anew in one buffer; the time that takes is counted apart."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.seconds = job, 0.0
        self.buffer = np.empty((8, job["values"] // 8), np.float32)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self.job["seed"])
        for number in range(self.job["batches"]):
            begin = time.process_time()
            rng.standard_normal(out=self.buffer, dtype=np.float32)
            self.buffer *= 1 + number / 100  # the extremes grow, as they do from image to image
            if self.job["values_of"] == "relu":
                np.maximum(self.buffer, 0, out=self.buffer)
            self.seconds += time.process_time() - begin
            yield self.buffer


def memory(field: str) -> int:
    """Return VmRSS or VmHWM (its peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark runs on Linux")


def measure(job: dict[str, Any], numbers: Numbers) -> dict[str, float]:
    """Observe all batches and find the range."""
    kind, _, variant = job["tool"].partition(":")
    tool = TOOLS[kind](job, variant)
    states, numbers.seconds = [], 0.0
    begin = time.process_time()
    if isinstance(tool, Calibrator):

        def watched() -> Iterator[Batch]:
            for number, batch in enumerate(numbers):
                if number:
                    states.append(tool.state_bytes())
                yield batch

        tool.collect(watched())
        observe_s = time.process_time() - begin - numbers.seconds
    else:
        observe_s = 0.0
        for batch in numbers:
            begin = time.process_time()
            tool.observe(batch)
            observe_s += time.process_time() - begin
            states.append(tool.state_bytes())
    begin = time.process_time()
    low, high = tool.find()
    find_s = time.process_time() - begin
    return {
        "observe_s": observe_s,
        "find_s": find_s,
        "half_state_bytes": states[len(states) // 2 - 1],
        "last_state_bytes": states[-1],
        "low": low,
        "high": high,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    if job["tool"].startswith("fewbit"):
        importlib.import_module("fewbit")  # before torch: it settles how torch's threads wait
    small = job | {"values": 4096, "batches": 2}
    measure(small, Numbers(small))
    numbers = Numbers(job)
    next(iter(numbers))
    start = memory("VmRSS")
    for _ in sys.stdin:
        figures = measure(job, numbers)
        print(json.dumps(figures | {"start_bytes": start, "peak_bytes": memory("VmHWM")}), flush=True)


if __name__ == "__main__":
    main()
