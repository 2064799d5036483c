"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbit.errors import OutputError


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is renamed to `path`, on any error removed.

    Args:
        path: The file to write. Its folder is made when missing.

    Yields:
        The path to write to, in the same folder, with the same suffix.

    Raises:
        OutputError: The folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "give a folder you may write to with --out"
        ) from error
    beside = Path(name)
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        beside.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: writing failed ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step, or not at all.

    Args:
        path: The file to write.
        text: Its whole content.

    Raises:
        OutputError: It cannot be written.
    """
    with write_atomically(path) as beside:
        beside.write_text(text, encoding="utf-8")
