"""What `speed.py` times: a file in an engine process of fewbit's, or a peer in a process of its own.

Each has a process to itself, so that one that crashes takes no other with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from fewbit.engines.process import EngineProcess, RemoteSession
from fewbit.engines.session import BlockTime, Setting
from fewbit.errors import EngineCrashed, EngineError, EngineHung

CHILD = Path(__file__).with_name("speed_child.py")
_OPEN_S, _ANSWER_S, _END_S = 600.0, 300.0, 5.0


class EngineTimed:
    """A file opened in an engine process of its own."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.setting = setting
        self._process = EngineProcess(setting.engine, timeout_s=_ANSWER_S)
        try:
            self.session: RemoteSession = self._process.open(path, setting)
        except EngineError:
            self._process.close()
            raise

    def time_block(self, seconds: float) -> BlockTime:
        """Run calls for about `seconds`, at least one a stream."""
        return self.session.time_block(seconds)

    def close(self) -> None:
        """End the process."""
        self._process.close()


class PeerTimed:
    """A peer in a process of its own (`speed_child.py`).

    Args:
        name: What to call it in errors.
        job: For the child: tool, batch, threads, size, and what the tool needs.

    Attributes:
        setting: Batch, threads and streams; its engine says nothing of a peer.

    Raises:
        EngineError: It cannot be opened.
        EngineCrashed: Its process died.
        EngineHung: It did not answer in time.
    """

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # inductor's own processes end with it
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            told = json.loads(self._answer("opening it", _OPEN_S))
            if "error" in told:
                raise EngineError(f"{name}: {told['error']}")
        except EngineError:
            self.close()
            raise
        self.setting = Setting(batch=job["batch"], threads=job["threads"], streams=told["streams"])

    def time_block(self, seconds: float) -> BlockTime:
        """Run calls for about `seconds`, at least one a stream."""
        assert self._child.stdin is not None
        if self._errors.closed:
            raise EngineCrashed(f"{self._name}: its process is gone")
        with contextlib.suppress(OSError):  # a process that is gone is told of by the answer
            self._child.stdin.write(f"{seconds}\n")
            self._child.stdin.flush()
        return BlockTime.model_validate_json(self._answer("timing it", seconds + _ANSWER_S))

    def close(self) -> None:
        """End the process and those that it started."""
        if self._errors.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        self._listener.join(_END_S)
        self._child.stdout.close()
        self._errors.close()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, doing: str, limit_s: float) -> str:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            raise EngineHung(f"{self._name}: no answer within {limit_s:g} s while {doing}") from None
        if line:
            return line
        code = self._child.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = f", last words: {' '.join(said[-1].split())[:200]}" if said else ""
        raise EngineCrashed(f"{self._name}: crashed while {doing} ({cause}{last})")
