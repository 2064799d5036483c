"""The peers of `speed.py`: their files, and how a user of each would run them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration import PEERS, has, measure
from fewbit.engines.session import EngineName, FloatPrecision, Setting
from fewbit.errors import EngineError
from fewbit.measure.host import describe_host
from fewbit.recipe import Recipe
from speed_answers import Kind, make_file
from speed_networks import Network
from speed_process import EngineTimed, PeerTimed
from speed_turns import Entrant, Form, Opened

COMPILED = ("torch.compile float32", "torch.compile bf16")
HINTS = ("LATENCY", "THROUGHPUT")
_LIMIT_BYTES = 16 << 30
_BATCH = 8
_AS_CAPTURED = Recipe(name="captured", steps=())


class PeerFiles:
    """The files of the peers for one network, made when they are first asked for.

    Args:
        network: The network.
        folder: Where files are made.
        python: The Python that has nncf.
        cores: That quantizing may use.
        seed: Of every random choice.
    """

    def __init__(self, network: Network, folder: Path, python: str, cores: int, seed: int) -> None:
        self.network, self.folder, self.python, self.cores, self.seed = network, folder, python, cores, seed
        self._made: dict[str, Path | str] = {}

    def float32(self) -> Path:
        """Return the float file: the network as it was captured, none of fewbit's rewrites in it."""
        kind = Kind("float32", "onnxruntime")
        return make_file(self.network, kind, self.folder, self.seed, _AS_CAPTURED, "-captured")

    def onnxruntime(self) -> Path:
        """Return the file of ONNX Runtime's quantize_static.

        Raises:
            EngineError: It could not be made.
        """
        return self._make("onnxruntime:MinMax", sys.executable, "onnxruntime-int8.onnx")

    def nncf(self) -> Path:
        """Return the OpenVINO model that NNCF quantized.

        Raises:
            EngineError: There is no nncf, or it failed.
        """
        return self._make("nncf:openvino", self.python, "nncf-int8.xml")

    def _make(self, tool: str, python: str, name: str) -> Path:
        if tool not in self._made:
            self._made[tool] = self._quantize(tool, python, self.folder / name)
        made = self._made[tool]
        if isinstance(made, str):
            raise EngineError(f"{self.network.name}: {tool} made no file ({made})")
        return made

    def _quantize(self, tool: str, python: str, out: Path) -> Path | str:
        module = PEERS[tool]
        if not has(python, module):
            return f"{python} has no {module}; give one that has with --peers"
        images = self.folder / "images.f32"
        self.network.images.astype(np.float32).tofile(images)
        job = {
            "tool": tool,
            "float_file": str(self.float32()),
            "images_file": str(images),
            "images": len(self.network.images),
            "batch": _BATCH,
            "size": list(self.network.net.input_size),
            "cores": self.cores,
            "pre_process": True,
            "out": str(out),
            "limit_bytes": _LIMIT_BYTES,
        }
        figures = measure(python, job)
        return figures if isinstance(figures, str) else out


def peer_entrants(files: PeerFiles, batch: int, threads: int) -> list[Entrant]:
    """Return every peer in every setting that its users or fewbit would choose."""
    found = [*_in_engines(files, batch, threads), *_hinted(files, batch, threads)]
    for name in COMPILED:
        form: Form = "bf16" if name.endswith("bf16") else "float32"
        job = {
            "tool": "torch",
            "source": files.network.source,
            "seed": files.seed,
            "precision": form,
        }
        found.append(
            _in_child(name, f"{threads} thread{'s' if threads > 1 else ''}", form, job, files, batch, threads)
        )
    return found


def _in_engines(files: PeerFiles, batch: int, threads: int) -> list[Entrant]:
    """The same engines, threads and streams as fewbit's answer."""
    kinds: tuple[tuple[str, Form, EngineName, FloatPrecision, Callable[[], Path]], ...] = (
        ("onnxruntime float32", "float32", "onnxruntime", "float32", files.float32),
        ("onnxruntime int8", "int8", "onnxruntime", "float32", files.onnxruntime),
        ("openvino float32", "float32", "openvino", "float32", files.float32),
        ("openvino bf16", "bf16", "openvino", "bf16", files.float32),
    )
    found = []
    for name, form, engine, precision, path in kinds:
        for streams in sorted({1, threads}):
            setting = Setting(
                engine=engine, float_precision=precision, batch=batch, threads=threads, streams=streams
            )
            start = partial(_open_in_engine, path, setting)
            found.append(Entrant(name, _streams(streams), form, False, start))
    return found


def _open_in_engine(path: Callable[[], Path], setting: Setting) -> Opened:
    return EngineTimed(path(), setting)


def _hinted(files: PeerFiles, batch: int, threads: int) -> list[Entrant]:
    """NNCF's model with OpenVINO's hints and with fewbit's streams; the float model with the hints."""
    hints: list[tuple[str, dict[str, Any]]] = [(f"{hint.lower()} hint", {"hint": hint}) for hint in HINTS]
    streams = [(_streams(n), {"hint": "", "streams": n}) for n in sorted({1, threads})]
    native: Form = "bf16" if describe_host().bf16 else "float32"
    kinds: tuple[tuple[str, Form, Callable[[], Path], list[tuple[str, dict[str, Any]]]], ...] = (
        ("openvino as it comes", native, files.float32, hints),
        ("nncf int8", "int8", files.nncf, hints + streams),
    )
    return [
        _in_child(name, how, form, {"tool": "openvino"} | job, files, batch, threads, path)
        for name, form, path, ways in kinds
        for how, job in ways
    ]


def _in_child(
    name: str,
    how: str,
    form: Form,
    job: dict[str, Any],
    files: PeerFiles,
    batch: int,
    threads: int,
    path: Callable[[], Path] | None = None,
) -> Entrant:
    whole = job | {"batch": batch, "threads": threads, "size": list(files.network.net.input_size)}

    def start() -> Opened:
        return PeerTimed(name, whole if path is None else whole | {"path": str(path())})

    return Entrant(name, how, form, False, start)


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"
