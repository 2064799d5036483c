"""Work beside the main thread, and moments without any, in which files are timed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_changed = threading.Condition()
_working = _quiet = 0


@contextmanager
def working() -> Iterator[None]:
    """Do a piece of work in a thread of its own; it begins once nobody asks for quiet."""
    global _working
    with _changed:
        _changed.wait_for(lambda: not _quiet)
        _working += 1
    try:
        yield
    finally:
        with _changed:
            _working -= 1
            _changed.notify_all()


@contextmanager
def quiet() -> Iterator[None]:
    """Wait for the end of all work, and let none begin inside; never wait for such work there.

    Example:
        >>> with quiet():
        ...     busy()
        0
    """
    global _quiet
    with _changed:
        _quiet += 1
    try:  # from here on, for an interrupt while it waits must let others work again
        with _changed:
            _changed.wait_for(lambda: not _working)
        yield
    finally:
        with _changed:
            _quiet -= 1
            _changed.notify_all()


def busy() -> int:
    """Return how many pieces of work are being done."""
    return _working
