"""Quantize one network with one tool in this process, and say how long it took and how much memory.

Run by `calibration.py` in a fresh process for each measurement, in the environment that has the tool, so it
imports nothing but the standard library, numpy and the tool. Takes one JSON object as its argument and
prints one: {"import_s", "seconds", "cpu_s", "start_bytes", "peak_bytes", "file_bytes"}.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = NDArray[np.float32]
Quantize = Callable[[], None]


def batch_at(job: dict[str, Any], index: int) -> Batch:
    """Read one batch of images from their file; a memory map would count its pages as ours."""
    size = math.prod(job["size"])
    first = index * job["batch"]
    count = min(job["batch"], job["images"] - first)
    with Path(job["images_file"]).open("rb") as file:
        file.seek(4 * size * first)
        return np.fromfile(file, np.float32, count * size).reshape(count, *job["size"])


def batches(job: dict[str, Any]) -> Iterator[Batch]:
    """Read all batches, one after the other."""
    return (batch_at(job, index) for index in range(-(-job["images"] // job["batch"])))


def onnxruntime(job: dict[str, Any], method: str) -> Quantize:
    """ONNX Runtime's quantize_static in the setting that its x86 kernels run in integers."""
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = batches(job)

        def get_next(self) -> dict[str, Batch] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"input": batch}

    def quantize() -> None:
        float_file = job["float_file"]
        if job.get("pre_process"):  # what its documentation asks for first
            from onnxruntime.quantization.shape_inference import quant_pre_process

            float_file = str(Path(job["out"]).with_suffix(".float.onnx"))
            quant_pre_process(job["float_file"], float_file)
        ort.quantize_static(
            float_file,
            job["out"],
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=getattr(ort.CalibrationMethod, method),
            extra_options={"CalibPercentile": 99.99} if method == "Percentile" else {},
        )

    return quantize


def nncf(job: dict[str, Any], form: str) -> Quantize:
    """NNCF's quantize on an ONNX or an OpenVINO model; all images, not its default of 300 batches."""
    import nncf as peer

    count = -(-job["images"] // job["batch"])

    def quantize_onnx() -> None:
        import onnx

        data = peer.Dataset(range(count), lambda index: {"input": batch_at(job, index)})
        onnx.save(peer.quantize(onnx.load(job["float_file"]), data, subset_size=count), job["out"])

    def quantize_openvino() -> None:
        import openvino

        data = peer.Dataset(range(count), lambda index: batch_at(job, index))
        model = openvino.Core().read_model(job["float_file"])
        openvino.save_model(peer.quantize(model, data, subset_size=count), job["out"], compress_to_fp16=False)

    return quantize_onnx if form == "onnx" else quantize_openvino


def fewbit(job: dict[str, Any], recipe_name: str) -> Quantize:
    """Run fewbit's recipe from the card to the exported file."""
    importlib.import_module("fewbit")  # before torch: it settles how torch's threads wait
    import torch

    from fewbit.export.onnx_out import export_onnx
    from fewbit.load.capture import load
    from fewbit.load.card import read_card
    from fewbit.place.targets import target
    from fewbit.recipe import Context, read_recipe, run_recipe

    def quantize() -> None:
        recipe, engine = read_recipe(recipe_name), target(job["target"])
        context = Context(
            scheme=recipe.scheme,
            target=engine,
            batches=lambda: (torch.from_numpy(batch) for batch in batches(job)),
            seed=job.get("seed", 0),
        )
        net, _ = run_recipe(recipe, load(read_card(job["card"])), context)
        export_onnx(net, Path(job["out"]), engine)

    return quantize


TOOLS: dict[str, Callable[[dict[str, Any], str], Quantize]] = {
    "onnxruntime": onnxruntime,
    "nncf": nncf,
    "fewbit": fewbit,
}


def memory(field: str) -> int:
    """Return VmRSS or VmHWM (its peak) of this process in bytes.

    Not getrusage: its peak begins at that of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark runs on Linux")


def main() -> None:
    job = json.loads(sys.argv[1])
    tool, _, variant = job["tool"].partition(":")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    begin = time.perf_counter()
    quantize = TOOLS[tool](job, variant)
    start = memory("VmRSS")
    imported, cpu = time.perf_counter(), time.process_time()
    quantize()
    seconds, cpu_s = time.perf_counter() - imported, time.process_time() - cpu
    out = Path(job["out"])
    figures = {
        "import_s": imported - begin,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "start_bytes": start,
        "peak_bytes": memory("VmHWM"),
        "file_bytes": sum(file.stat().st_size for file in out.parent.glob(f"{out.stem}.*")),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
