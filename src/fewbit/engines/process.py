"""An engine in a process of its own: one that crashes or hangs costs one trial, and says so."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self, cast

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import TypeAdapter

from fewbit import errors
from fewbit.background import quiet
from fewbit.clock import phase
from fewbit.engines.calls import checked
from fewbit.engines.profile import OperatorTime
from fewbit.engines.session import BlockTime, Images, Placement, Setting
from fewbit.engines.wire import SLOT_BYTES, SLOTS, receive, send
from fewbit.errors import EngineCrashed, EngineError, EngineHung
from fewbit.spec import ImageInput

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fewbit.engines.child import serve; serve(*json.loads(sys.argv[2]))"
)
_END_S = 5.0
ENGINE_PHASES = frozenset({"compile", "evaluate", "time", "profile", "placement"})
"""Phases in which the program only waits for an engine at work."""
# Images of one request, where they fit: enough to keep streams busy, few enough to be answered soon.
_IMAGES = 64
# So many calls of a profile are given as long as any other request.
_PROFILED_CALLS = 20
_TIMES = TypeAdapter(tuple[OperatorTime, ...])


_living: weakref.WeakSet[_Child] = weakref.WeakSet()


def engines_cpu_s() -> float:
    """Return the processor seconds of all engine processes so far, those that ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = ended.ru_utime + ended.ru_stime
    for child in _living:
        if not child.gone:
            with contextlib.suppress(psutil.Error):
                used = child.seen.cpu_times()
                total += used.user + used.system
    return total


class EngineProcess:
    """A process that runs one engine; several files may be open in it.

    A process that died or was ended is replaced by the next `open`. To be used by one thread at a time.

    Args:
        engine: Name of the engine's row in the registry.
        timeout_s: Longest silence in answer to one request (for a block of time, beyond that time).

    Example::

        with EngineProcess("openvino") as process:
            session = process.open(Path("model.onnx"), Setting(engine="openvino", batch=8))
            logits = session.logits(batches)
    """

    def __init__(self, engine: str, timeout_s: float = 120.0) -> None:
        self.engine, self.timeout_s = engine, timeout_s
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process id, none where no process is alive."""
        return self._child.process.pid if self._child is not None and not self._child.gone else None

    def open(self, path: Path, setting: Setting) -> RemoteSession:
        """Open an exported file.

        Raises:
            EngineError: The engine refuses the file, or cannot be imported.
            EngineCrashed: The engine's process died of it.
            EngineHung: It did not answer in time; it was ended.
        """
        if setting.engine != self.engine:
            raise ValueError(f"a setting of {setting.engine} given to the process of {self.engine}")
        with phase("start engine"):
            child = self._start()
            child.settle(Path(path))
        path = Path(path).absolute()
        session = child.new_session()
        asked = {
            "do": "open",
            "session": session,
            "path": str(path),
            "setting": setting.model_dump(mode="json"),
        }
        with phase("compile"):
            message, _ = child.ask(asked, path, "opening it")
        return RemoteSession(child, session, path, setting, message["takes"])

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _start(self) -> _Child:
        if self._child is not None and self._child.gone:
            self.close()
        if self._child is None:
            self._child = _Child(self.engine, self.timeout_s)
        return self._child


class RemoteSession:
    """A file opened in an engine process.

    Every method raises `EngineCrashed` or `EngineHung` where the process died or fell silent.

    Attributes:
        path: The file.
        setting: How it runs.
        takes: What its input is: float32 images (N, C, H, W), or uint8 pixels (N, H, W, C).
    """

    def __init__(
        self, child: _Child, session: int, path: Path, setting: Setting, takes: ImageInput = "float32"
    ) -> None:
        self.path, self.setting, self.takes = path, setting, takes
        self._child, self._session = child, session

    def run(self, batch: Images) -> NDArray[np.float32]:
        """Return the logits (N, classes) of images of the type that the file takes, any N."""
        return self.logits([batch])

    @phase("evaluate")
    def logits(self, batches: Iterable[Images]) -> NDArray[np.float32]:
        """Return the logits of all images in order; the next batch is made while the process works.

        Args:
            batches: Images of the type that the file takes, of any and of differing n.

        Raises:
            EngineError: An image does not fit the memory shared with the process, or the network.
        """
        found: list[NDArray[np.float32]] = []
        waiting: deque[int] = deque()
        self._child.settle(self.path)
        for count, piece in enumerate(self._pieces(batches)):
            if len(waiting) == SLOTS:
                found.append(self._logits_of(waiting.popleft()))
            slot = count % SLOTS
            self._child.slot(slot, piece)[...] = piece
            asked = {
                "do": "run",
                "session": self._session,
                "slot": slot,
                "shape": piece.shape,
                "dtype": piece.dtype.name,
            }
            waiting.append(self._child.send(asked, self.path))
        while waiting:
            found.append(self._logits_of(waiting.popleft()))
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    @phase("placement")
    def placement(self) -> Placement:
        """Say which operators run in which precision."""
        asked = {"do": "placement", "session": self._session}
        return Placement.model_validate_json(self._child.ask(asked, self.path, "reading its placement")[1])

    @phase("time")
    def time_block(self, seconds: float) -> BlockTime:
        """Run calls on random images for about `seconds` in the process, at least one a stream."""
        asked = {"do": "time", "session": self._session, "seconds": seconds}
        with quiet():
            return BlockTime.model_validate_json(self._child.ask(asked, self.path, "timing it", seconds)[1])

    @phase("profile")
    def profile(self, calls: int = 20) -> tuple[OperatorTime, ...]:
        """Time each operator on random images, in the file opened once more with the engine's profiler on.

        Args:
            calls: Calls to take the mean over.

        Returns:
            Every operator that runs, see `fewbit.engines.profile`.

        Raises:
            EngineError: The engine has no profiler, or the file failed in it.
        """
        asked = {"do": "profile", "session": self._session, "calls": calls}
        more_s = self._child.timeout_s * calls / _PROFILED_CALLS
        with quiet():
            reply = self._child.ask(asked, self.path, "profiling it", more_s)[1]
        return _TIMES.validate_json(reply)

    def close(self) -> None:
        """Free the file; a process that is gone has freed it."""
        if not self._child.gone:
            self._child.ask({"do": "close", "session": self._session}, self.path, "closing it")

    def _logits_of(self, request: int) -> NDArray[np.float32]:
        message, payload = self._child.wait(request, self.path, "running it")
        return np.frombuffer(payload, np.float32).reshape(message["shape"])

    def _pieces(self, batches: Iterable[Images]) -> Iterator[Images]:
        """Cut batches so that they fit a slot, at multiples of what the engine runs at once."""
        for given in batches:
            batch = checked(given, self.takes, self.path.name)
            image_bytes = batch.itemsize * int(np.prod(batch.shape[1:]))
            fit = SLOT_BYTES // image_bytes
            if fit < 1:
                raise EngineError(
                    f"{self.path.name}: one image {batch.shape[1:]} is {image_bytes} bytes, "
                    f"an engine process takes up to {SLOT_BYTES}; use smaller images"
                )
            at_once = self.setting.batch * self.setting.streams
            wanted = at_once * -(-_IMAGES // at_once)
            step = min(wanted, fit - fit % at_once or fit)
            for start in range(0, max(1, len(batch)), step):
                yield batch[start : start + step]


class _Child:
    """One process, from its start to its end."""

    def __init__(self, engine: str, timeout_s: float) -> None:
        self.engine, self.timeout_s = engine, timeout_s
        self.fate = ""
        self._requests = self._sessions = 0
        self._unanswered: set[int] = set()
        self._replies: queue.SimpleQueue[tuple[dict[str, Any], bytes] | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by end()
        self._heard = 0
        self._shared, address, inherited = _shared_file()
        self._memory = mmap.mmap(self._shared.fileno(), SLOTS * SLOT_BYTES)
        # The kernel ends a child with the thread that started it; only the main thread surely lives on.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps([engine, address, parent])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=inherited,
            # Engines have threads of their own; numpy's would only wait for each other on a busy machine.
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
        )
        self.seen = psutil.Process(self.process.pid)
        _living.add(self)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        # The engine is imported while the parent does something else.
        self.send({"do": "load"}, None)

    @property
    def gone(self) -> bool:
        """The process died or was ended."""
        return bool(self.fate)

    def new_session(self) -> int:
        """Return a number for a file to be opened."""
        self._sessions += 1
        return self._sessions

    def slot(self, slot: int, images: Images) -> Images:
        """Return the shared memory for as many values of the same type."""
        kept: Images = np.frombuffer(self._memory, images.dtype, images.size, slot * SLOT_BYTES)
        return kept.reshape(images.shape)

    def ask(
        self, message: dict[str, Any], file: Path | None, doing: str, more_s: float = 0.0
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer."""
        return self.wait(self.send(message, file), file, doing, more_s)

    def send(self, message: dict[str, Any], file: Path | None) -> int:
        """Send a request; return its number.

        Raises:
            EngineCrashed: The process is gone.
        """
        if self.gone:
            raise EngineCrashed(f"{self._name(file)}: its process is gone: {self.fate}; open the file again")
        self._requests += 1
        self._heard = os.fstat(self._errors.fileno()).st_size
        assert self.process.stdin is not None
        try:
            send(cast(BinaryIO, self.process.stdin), {**message, "id": self._requests})
        except OSError:
            raise self._crashed(file, "waiting") from None
        self._unanswered.add(self._requests)
        return self._requests

    def wait(
        self, request: int, file: Path | None, doing: str, more_s: float = 0.0
    ) -> tuple[dict[str, Any], bytes]:
        """Wait for the answer to a request; answers that nobody waits for are dropped.

        Raises:
            FewbitError: What the process answered, of the class that it named.
            EngineCrashed: The process died.
            EngineHung: There was no answer in time; the process was ended.
        """
        while request in self._unanswered:
            message, payload = self._next(file, doing, self.timeout_s + more_s)
        if "error" in message:
            raise _error_class(message["error"])(message["text"])
        return message, payload

    def settle(self, file: Path | None) -> None:
        """Drop the answers that an error or an interrupt left behind, so that the slots are free."""
        while self._unanswered and not self.gone:
            self._next(file, "finishing what was asked before", self.timeout_s)

    def _next(self, file: Path | None, doing: str, limit_s: float) -> tuple[dict[str, Any], bytes]:
        try:
            reply = self._replies.get(timeout=limit_s)
        except queue.Empty:
            self.end(f"it did not answer within {limit_s:g} s")
            raise EngineHung(
                f"{self._name(file)}: {self.engine} did not answer within {limit_s:g} s while {doing}; "
                "its process was ended; use another engine, or allow more time"
            ) from None
        if reply is None:
            raise self._crashed(file, doing)
        self._unanswered.discard(reply[0]["id"])
        return reply

    def end(self, fate: str = "it was closed") -> None:
        """End the process and free what belongs to it."""
        self.fate = self.fate or fate
        assert self.process.stdin is not None and self.process.stdout is not None
        if fate != "it was closed":
            self.process.kill()
        with contextlib.suppress(OSError):  # the pipe broke with the process
            self.process.stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join()
        self.process.stdout.close()
        self._errors.close()
        self._shared.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        while (reply := receive(cast(BinaryIO, self.process.stdout))) is not None:
            self._replies.put(reply)
        self._replies.put(None)

    def _crashed(self, file: Path | None, doing: str) -> EngineCrashed:
        try:
            code = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        cause = _signal_name(-code) if code < 0 else f"exit code {code}"
        self._errors.seek(self._heard)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f", last words: {' '.join(said[-1].split())[:200]}" if said else ""
        self.end(f"it died of {cause}")
        return EngineCrashed(
            f"{self._name(file)}: {self.engine} crashed while {doing} ({cause}{last}); "
            "use another engine for this file"
        )

    def _name(self, file: Path | None) -> str:
        return f"engine {self.engine}" if file is None else file.name


def _shared_file() -> tuple[IO[bytes], int | str, tuple[int, ...]]:
    """Make the shared memory, which takes no room until used.

    Returns:
        The file, how the child opens it (descriptor or path), and the descriptors that it inherits.
    """
    if hasattr(os, "memfd_create"):
        memory = os.fdopen(os.memfd_create("fewbit-engine"), "r+b")
        memory.truncate(SLOTS * SLOT_BYTES)
        return memory, memory.fileno(), (memory.fileno(),)
    file = tempfile.NamedTemporaryFile(prefix="fewbit-engine-")  # noqa: SIM115  closed by end()
    file.truncate(SLOTS * SLOT_BYTES)
    return cast(IO[bytes], file), file.name, ()


def _error_class(name: str) -> type[errors.FewbitError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, errors.FewbitError) else EngineError


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name
