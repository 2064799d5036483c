"""The engine process: opens files, runs batches, times blocks, profiles, until its standard input ends.

It imports neither torch nor anything above engines, so that it starts fast. Images come through memory shared
with the parent, everything else through the standard streams.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fewbit.engines.profile import Profiled
from fewbit.engines.session import BlockTime, Engine, Images, Session, Setting
from fewbit.engines.wire import SLOT_BYTES, SLOTS, receive, send
from fewbit.errors import EngineError, FewbitError
from fewbit.registry import find
from fewbit.spec import ImageInput

_PR_SET_PDEATHSIG = 1
Reply = tuple[dict[str, Any], bytes]


class Runs(Protocol):
    """What can be timed: a `Session`, or a peer of one."""

    def run(self, batch: Images) -> NDArray[np.float32]:
        """Return the logits of a batch."""
        ...


def serve(engine: str, shared: int | str, parent: int | None) -> None:
    """Answer the parent's requests until it closes the standard input, or is gone.

    Args:
        engine: Name of the engine's row in the registry.
        shared: Descriptor or path of the shared file of `SLOTS` times `SLOT_BYTES`.
        parent: The parent's process id where the kernel shall end this process together with it; the kernel
            means the thread that started this process, so the parent gives it only from its main thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent is not None:
        _die_with(parent)
    # Libraries print where they like: what they print goes to the error stream, the messages keep the pipe.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    with open(shared, "r+b") as file:  # noqa: PTH123  a descriptor or a path
        child = Child(engine, mmap.mmap(file.fileno(), SLOTS * SLOT_BYTES))
    while True:
        request = requests.get()
        message, payload = child.answer(request)
        send(replies, {**message, "id": request["id"]}, payload)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _listen(stream: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand on requests; end the process when the parent is gone, even in the middle of a run."""
    while (received := receive(stream)) is not None:
        requests.put(received[0])
    os._exit(0)


class Child:
    """The sessions of an engine process."""

    def __init__(self, engine: str, memory: mmap.mmap) -> None:
        self._name, self._memory = engine, memory
        self._engine: Engine | None = None
        self._sessions: dict[int, Session] = {}
        self._images: dict[int, Images] = {}
        self._files: dict[int, Path] = {}
        self._settings: dict[int, Setting] = {}

    def answer(self, request: dict[str, Any]) -> Reply:
        """Do what is asked; an error becomes part of the reply."""
        work: dict[str, Callable[[dict[str, Any]], Reply]] = {
            "load": self._load,
            "open": self._open,
            "run": self._run,
            "placement": self._placement,
            "time": self._time,
            "profile": self._profile,
            "close": self._close,
        }
        try:
            return work[request["do"]](request)
        except FewbitError as error:
            return {"error": type(error).__name__, "text": str(error)}, b""
        except Exception as error:  # noqa: BLE001  whatever an engine raises is the parent's to know
            file = self._files.get(request.get("session", -1), Path(request.get("path", "")))
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return {
                "error": "EngineError",
                "text": f"{file.name or 'engine'}: {self._name} failed ({said})",
            }, b""

    def _load(self, _: dict[str, Any]) -> Reply:
        if self._engine is None:
            try:
                self._engine = find("engines", self._name)()
            except ImportError as error:
                raise EngineError(
                    f"engine {self._name}: cannot be imported ({error}); install its package"
                ) from error
        return {}, b""

    def _open(self, request: dict[str, Any]) -> Reply:
        self._load(request)
        assert self._engine is not None
        session, path = request["session"], Path(request["path"])
        self._settings[session] = Setting.model_validate(request["setting"])
        self._sessions[session] = self._engine.open(path, self._settings[session])
        self._files[session] = path
        return {"takes": self._sessions[session].takes}, b""

    def _close(self, request: dict[str, Any]) -> Reply:
        for kept in (self._sessions, self._images, self._files, self._settings):
            kept.pop(request["session"], None)
        return {}, b""

    def _run(self, request: dict[str, Any]) -> Reply:
        shape = tuple(request["shape"])
        images: Images = np.frombuffer(
            self._memory, request["dtype"], int(np.prod(shape)), request["slot"] * SLOT_BYTES
        ).reshape(shape)
        logits = np.ascontiguousarray(self._sessions[request["session"]].run(images), np.float32)
        return {"shape": logits.shape}, logits.tobytes()

    def _placement(self, request: dict[str, Any]) -> Reply:
        placed = self._sessions[request["session"]].placement()
        return {}, placed.model_dump_json().encode()

    def _time(self, request: dict[str, Any]) -> Reply:
        session = request["session"]
        block = time_calls(
            self._sessions[session],
            self._images_of(session),
            self._settings[session].streams,
            request["seconds"],
        )
        return {}, block.model_dump_json().encode()

    def _profile(self, request: dict[str, Any]) -> Reply:
        session = request["session"]
        opened = self._sessions[session]
        if not isinstance(opened, Profiled):
            raise EngineError(
                f"{self._files[session].name}: {self._name} has no profiler; use onnxruntime or openvino"
            )
        taken = opened.profile(self._images_of(session), request["calls"])
        return {}, json.dumps([operator.model_dump() for operator in taken]).encode()

    def _images_of(self, session: int) -> Images:
        """Return one batch of random images that fits a file, the same each time."""
        if session not in self._images:
            from fewbit.engines.exported import image_size

            size = (self._settings[session].batch, *image_size(self._files[session]))
            self._images[session] = random_images(size, self._sessions[session].takes)
        return self._images[session]


def random_images(size: tuple[int, ...], takes: ImageInput) -> Images:
    """Return the same images each time, to time a session with."""
    rng = np.random.default_rng(0)
    if takes == "uint8":
        return rng.integers(0, 256, size, np.uint8)
    return rng.standard_normal(size, np.float32)


def time_calls(session: Runs, images: Images, streams: int, seconds: float) -> BlockTime:
    """Call a session for about `seconds` from `streams` threads, at least once each."""
    latencies: list[list[float]] = [[] for _ in range(streams)]
    failures: list[BaseException] = []

    def call(taken: list[float], end: float) -> None:
        now = time.perf_counter()
        while not taken or now < end:
            before = now
            session.run(images)
            now = time.perf_counter()
            taken.append((now - before) * 1e3)

    def call_in_thread(taken: list[float], end: float) -> None:
        try:
            call(taken, end)
        except Exception as error:  # noqa: BLE001  raised again by the thread that waits
            failures.append(error)

    gc.disable()
    start = time.perf_counter()
    threads = [
        threading.Thread(target=call_in_thread, args=(taken, start + seconds)) for taken in latencies[1:]
    ]
    try:
        for thread in threads:
            thread.start()
        call(latencies[0], start + seconds)
    finally:
        for thread in threads:
            thread.join()
        taken_s = time.perf_counter() - start
        gc.enable()
    if failures:
        raise failures[0]
    flat = [ms for taken in latencies for ms in taken]
    return BlockTime(images=len(flat) * len(images), seconds=taken_s, latencies_ms=tuple(flat))
