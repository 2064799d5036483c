"""Decoded images, each decoded once: uint8 pixels in an unnamed temporary file.

The file is read and written by offset and never mapped, so it takes no memory of the process; having no name,
it is gone with the process, however that ends. What does not fit the cache is decoded again when asked for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewbit.background import working
from fewbit.data.images import ImageSource
from fewbit.data.preprocess import decode, normalize
from fewbit.data.stores import BrokenImageError
from fewbit.errors import DataError, OutputError
from fewbit.load.card import InputSection

Indices = NDArray[np.int64]

CHUNK_BYTES = 4 * 2**20
PENDING, CACHED, UNCACHED, BROKEN = range(4)


class SkippedImage(NamedTuple):
    """A broken image.

    Attributes:
        name: Its name in the source.
        why: One line.
    """

    name: str
    why: str


class DecodedImages:
    """Decodes images in chunks, in threads, when they are asked for.

    Attributes:
        rows: For each image asked for, its place in the cache, int64 (N,).
        sha256: Hash of each row's encoded bytes, uint8 (N, 32), once it is no longer pending.
        state: PENDING, CACHED, UNCACHED or BROKEN by row, uint8 (N,).
        chunk: Rows decoded in one job.
        pool: The threads.
    """

    def __init__(
        self, source: ImageSource, section: InputSection, indices: Indices, cache_bytes: int, threads: int
    ) -> None:
        self.source = source
        self.section = section
        self.threads = threads
        place = (
            np.argsort(source.positions[indices], kind="stable")
            if source.sequential
            else np.arange(len(indices))
        )
        self.rows = np.empty(len(indices), np.int64)
        self.rows[place] = np.arange(len(indices))
        self.index = indices[place]
        channels, height, width = section.size
        self._shape = (height, width, channels)
        self._row_bytes = height * width * channels
        self.chunk = max(1, min(CHUNK_BYTES // self._row_bytes, 256))
        self.state = np.zeros(len(indices), np.uint8)
        self.sha256 = np.zeros((len(indices), 32), np.uint8)
        self._why: dict[int, str] = {}
        self._futures: dict[int, Future[None]] = {}
        self._submitting = threading.Lock()
        self._reading = threading.Lock()
        self._file, room = _open_cache()
        self._capacity = min(cache_bytes, room) // self._row_bytes
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="fewbit-decode")
        self._release = weakref.finalize(self, _release, self._file, self.pool)

    def close(self) -> None:
        """Stop decoding and remove the cache."""
        self.pool.shutdown(cancel_futures=True)
        self._release()

    def submit(self, rows: Indices) -> None:
        """Start decoding what of these rows has not been started."""
        with self._submitting:
            for chunk in np.unique(rows // self.chunk).tolist():
                if chunk not in self._futures:
                    self._futures[chunk] = self.pool.submit(self._decode_chunk, chunk)

    def wait(self, rows: Indices) -> None:
        """Wait until these rows are decoded or found broken.

        Raises:
            DataError: One is of the wrong size, or broken in a strict run.
        """
        self.submit(rows)
        for chunk in np.unique(rows // self.chunk).tolist():
            self._futures[chunk].result()

    def skipped(self, rows: Indices) -> tuple[SkippedImage, ...]:
        """Return the broken ones among rows that are decoded."""
        broken = rows[self.state[rows] == BROKEN].tolist()
        return tuple(SkippedImage(self.source.names[self.index[row]], self._why[row]) for row in broken)

    def batch(self, rows: Indices) -> NDArray[np.float32]:
        """Return the network's input of whole rows that are decoded, float32 (n, C, H, W)."""
        return normalize(self.pixels(rows), self.section)

    def pixels(self, rows: Indices) -> NDArray[np.uint8]:
        """Return the pixels of whole rows that are decoded, uint8 (n, H, W, C)."""
        pixels = np.empty((len(rows), *self._shape), np.uint8)
        for place, row in enumerate(rows.tolist()):
            if self.state[row] == CACHED:
                os.preadv(self._file.fileno(), [pixels[place].data], row * self._row_bytes)
            else:
                index = self.index[row]
                pixels[place] = decode(self.source.read(index), self.section, self.source.names[index])
        return pixels

    def _decode_chunk(self, chunk: int) -> None:
        with working():
            self._decode_rows(chunk)

    def _decode_rows(self, chunk: int) -> None:
        rows = range(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.index)))
        if self.source.sequential:
            with self._reading:
                read = [self._read(row) for row in rows]
            for row, data in zip(rows, read, strict=True):
                self._decode_row(row, data)
        else:
            for row in rows:
                self._decode_row(row, self._read(row))

    def _read(self, row: int) -> bytes | BrokenImageError:
        try:
            return self.source.read(self.index[row])
        except BrokenImageError as reason:
            return reason

    def _decode_row(self, row: int, data: bytes | BrokenImageError) -> None:
        name = self.source.names[self.index[row]]
        try:
            if isinstance(data, BrokenImageError):
                raise data
            pixels = decode(data, self.section, name)
        except BrokenImageError as reason:
            if self.source.strict:
                raise DataError(
                    f"{self.source.path}: image {reason}; repair it or take it out, "
                    "or run without --strict to skip it"
                ) from reason
            self._why[row] = str(reason).removeprefix(f"{name}: ")
            self.state[row] = BROKEN
            return
        except DataError as reason:
            raise DataError(f"{self.source.path}: image {reason}") from reason
        self.sha256[row] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        self.state[row] = CACHED if self._keep(row, pixels) else UNCACHED

    def _keep(self, row: int, pixels: NDArray[np.uint8]) -> bool:
        """Write a row to the cache; a full disk only means that it is decoded again later."""
        if row >= self._capacity:
            return False
        try:
            return os.pwrite(self._file.fileno(), pixels.tobytes(), row * self._row_bytes) == self._row_bytes
        except OSError:
            return False


def _open_cache() -> tuple[IO[bytes], int]:
    """An unnamed temporary file, and how many bytes of the disk it may take: half of what is free."""
    try:
        return tempfile.TemporaryFile(prefix="fewbit-"), shutil.disk_usage(tempfile.gettempdir()).free // 2
    except OSError as reason:
        raise OutputError(
            f"image cache: no temporary file can be made ({reason.strerror or reason}); "
            "set TMPDIR to a folder that you may write to"
        ) from reason


def _release(file: IO[bytes], pool: ThreadPoolExecutor) -> None:
    """Runs when nobody can ask any more, perhaps in one of the pool's threads: it must not wait for them."""
    pool.shutdown(wait=False, cancel_futures=True)
    file.close()
