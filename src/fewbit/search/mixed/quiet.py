"""What a library prints past Python, kept from the standard output."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Throw away what is printed to the standard output's file while the block runs, C's buffer included.

    HiGHS 1.12 prints a line that its authors left in whatever its options say, which would stand in the
    output of ``--json``. Only that file is meant: `sys.stdout` where it is another one stays as it is. Blocks
    may overlap in several threads.
    """
    _REDIRECTION.enter()
    try:
        yield
    finally:
        _REDIRECTION.leave()


class _Redirection:
    """Whether the standard output's file leads nowhere, and who wants that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.kept: int | None = None

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            try:
                self.kept = os.dup(1)
            except OSError:  # there is no standard output, so nothing to keep clean
                return
            _flush()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.kept is not None:
                _flush()
                os.dup2(self.kept, 1)
                os.close(self.kept)
                self.kept = None


_REDIRECTION = _Redirection()


def _flush() -> None:
    """Write out what C's buffers hold, where this system has one C library that says how."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
