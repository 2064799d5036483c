"""Run one peer of `speed.py` in this process: a block of calls each time a number of seconds comes in.

Takes one JSON object as its argument and prints one JSON object a line: first {"streams"} when the peer is
ready, or {"error"}; then for every line on standard input a `fewbit.engines.session.BlockTime`. Blocks are
timed by the same function as those of fewbit's own engines. What libraries print goes to the error stream.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.engines.child import time_calls
from fewbit.measure.host import forbids_bf16

Images = NDArray[np.float32]
COMPILERS = ("c++", "g++", "clang++")


class OpenVinoPeer:
    """A file as a user of OpenVINO runs it: with a performance hint, or with streams; no precision is pinned.

    What is left to the engine (bf16 for float operators where it is native, cores of its threads) stays its
    own choice with a hint. Where it is told to take the processor for one without bf16, float operators are
    computed in float32, as they would be there.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino

        openvino.Type.f32.to_dtype()
        core = openvino.Core()
        model = core.read_model(job["path"])
        model.reshape([job["batch"], *job["size"]])
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["threads"]}
        if forbids_bf16():  # which it may choose where it is told to do without, and then refuses
            options["INFERENCE_PRECISION_HINT"] = "f32"
        if job["hint"]:
            options["PERFORMANCE_HINT"] = job["hint"]
        else:
            options |= {"NUM_STREAMS": job["streams"], "ENABLE_CPU_PINNING": False}
        compiled = core.compile_model(model, "CPU", options)
        self.streams = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.streams):
            self._free.put(compiled.create_infer_request())

    def run(self, batch: Images) -> Images:
        """Return the logits of one batch."""
        request = self._free.get()
        try:
            request.start_async([batch], share_inputs=True)
            request.wait()
            return np.array(request.get_output_tensor(0).data)
        finally:
            self._free.put(request)


class TorchPeer:
    """A model compiled by torch's inductor, as its documentation advises for a CPU.

    Weights are frozen into the program, in channels-last order; bf16 is autocast's.
    """

    streams = 1

    def __init__(self, job: dict[str, Any]) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
        if compiler is None or shutil.which(compiler) is None:
            raise RuntimeError(
                f"torch.compile needs a C++ compiler, there is none of {', '.join(COMPILERS)}; install g++"
            )
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
        import torch

        from speed_networks import model_of

        torch.set_num_threads(job["threads"])
        self._torch: Any = torch
        self._wide = job["precision"] == "float32"
        model = model_of(job["source"], job["seed"]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._compiled = torch.compile(model, dynamic=False)

    def run(self, batch: Images) -> Images:
        """Return the logits of one batch."""
        torch = self._torch
        narrow = nullcontext() if self._wide else torch.autocast("cpu", torch.bfloat16)
        with torch.inference_mode(), narrow:
            images = torch.from_numpy(batch).to(memory_format=torch.channels_last)
            logits: Images = self._compiled(images).float().numpy()  # type: ignore[no-untyped-call]
        return logits


PEERS: dict[str, Callable[[dict[str, Any]], OpenVinoPeer | TorchPeer]] = {
    "openvino": OpenVinoPeer,
    "torch": TorchPeer,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(text: str) -> None:
        replies.write(f"{text}\n")
        replies.flush()

    images = np.random.default_rng(0).standard_normal((job["batch"], *job["size"]), np.float32)
    try:
        peer = PEERS[job["tool"]](job)
        peer.run(images)
    except Exception as reason:  # noqa: BLE001  whatever a peer raises is the parent's to know
        tell(json.dumps({"error": f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"}))
        return
    tell(json.dumps({"streams": peer.streams}))
    for line in sys.stdin:
        tell(time_calls(peer, images, peer.streams, float(line)).model_dump_json())


if __name__ == "__main__":
    main()
