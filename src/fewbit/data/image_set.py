"""Preprocessed labelled images, decoded once: what calibration and evaluation iterate over."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fewbit.background import working
from fewbit.data.decoded import BROKEN, DecodedImages, Indices, SkippedImage
from fewbit.data.images import ImageSource
from fewbit.errors import DataError
from fewbit.load.card import InputSection

CACHE_BYTES = 8 * 2**30
Batch = TypeVar("Batch")


class ImageSet:
    """The images of a source that can be decoded, with their labels, in the source's order.

    Decoding starts when images are first asked for, runs ahead in threads while the caller works on a batch,
    and happens once. Which images are broken is known when all are decoded: `len`, `targets`, `names`,
    `skipped`, `digest`, `subset` and batches of chosen indices wait for that; `batches()` over all does not.

    Args:
        source: Where the images come from.
        section: The card's `[input]`.
        classes: The network's number of classes, to check the labels against.
        indices: Which images of the source; else all. Choose by `source.targets` to decode only those.
        cache_bytes: Largest size of the decoded pixels kept in a temporary file (never in memory); what is
            over is decoded again in each pass.
        threads: Threads that decode.

    Raises:
        DataError: The labels do not fit the classes.

    Example:
        >>> source = open_images("test.tar", card.labels_path)                         # doctest: +SKIP
        >>> with ImageSet(source, card.input, card.network.classes) as images:         # doctest: +SKIP
        ...     logits = np.concatenate([session.run(batch) for batch in images.batches(32)])
        ...     right = (logits.argmax(1) == images.targets).sum()
    """

    def __init__(
        self,
        source: ImageSource,
        section: InputSection,
        classes: int,
        *,
        indices: Indices | None = None,
        cache_bytes: int = CACHE_BYTES,
        threads: int = 2,
    ) -> None:
        source.check_classes(classes)
        every = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
        self.source = source
        self.classes = classes
        self._decoded = DecodedImages(source, section, every, cache_bytes, threads)
        self._asked = self._decoded.rows
        self._usable: Indices | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self._decoded.section.size

    def __len__(self) -> int:
        return len(self._rows())

    @property
    def targets(self) -> NDArray[np.int64]:
        """Class index of each image, int64 (N,)."""
        return self.source.targets[self._decoded.index[self._rows()]]

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each image."""
        return tuple(self.source.names[index] for index in self._decoded.index[self._rows()].tolist())

    @property
    def skipped(self) -> tuple[SkippedImage, ...]:
        """The broken images that were left out."""
        self._rows()
        return self._decoded.skipped(self._asked)

    @property
    def hashes(self) -> tuple[str, ...]:
        """12 hexadecimal digits that name the bytes of each image."""
        return tuple(row.tobytes().hex()[:12] for row in self._decoded.sha256[self._rows()])

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that name the images' bytes, labels and order, and the preprocessing."""
        rows = self._rows()
        total = hashlib.sha256(self._decoded.section.digest().encode())
        total.update(self._decoded.sha256[rows].tobytes())
        total.update(self.targets.astype("<i8").tobytes())
        return total.hexdigest()[:12]

    def begin(self) -> None:
        """Start decoding all images, while the caller does something else."""
        self._decoded.submit(self._asked)

    def decode(self, advance: Callable[[float], None] | None = None) -> None:
        """Decode all images now.

        Args:
            advance: Called with the fraction done, rising to 1.0.

        Raises:
            DataError: An image is of the wrong size, or broken in a strict run, or none can be decoded.
        """
        if self._usable is not None:
            return
        done = 0
        for rows in self._chunks():
            done += len(rows)
            if advance is not None:
                advance(done / len(self._asked))
        usable = self._asked[self._decoded.state[self._asked] != BROKEN]
        if not len(usable):
            broken = self._decoded.skipped(self._asked)
            first = f"; the first, {broken[0].name}: {broken[0].why}" if broken else ""
            raise DataError(
                f"{self.source.path}: none of {len(self._asked)} images can be decoded{first}; give others"
            )
        self._usable = usable

    def batches(self, batch: int, indices: Indices | None = None) -> Iterator[NDArray[np.float32]]:
        """Iterate over the network's input, the next batch being prepared while the caller has one.

        Args:
            batch: Images in a batch; the last may have fewer.
            indices: Which images, in this order; else all.

        Yields:
            float32 (n, C, H, W).

        Raises:
            DataError: As `decode`.
        """
        return self._prepared(self._decoded.batch, batch, indices)

    def pixels(self, batch: int, indices: Indices | None = None) -> Iterator[NDArray[np.uint8]]:
        """Iterate like `batches` over the pixels themselves, uint8 (n, H, W, C)."""
        return self._prepared(self._decoded.pixels, batch, indices)

    def _prepared(
        self, make: Callable[[Indices], Batch], batch: int, indices: Indices | None
    ) -> Iterator[Batch]:
        if batch < 1:
            raise DataError(f"batch is {batch}; give 1 or more images")
        waiting: deque[Future[Batch]] = deque()
        for rows in _regroup(self._runs(indices), batch):
            wait(waiting)  # one batch with the caller and one in the making, never more: they are large
            waiting.append(self._decoded.pool.submit(_work, make, rows))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def subset(self, indices: Indices) -> ImageSet:
        """Return the images at `indices`, in that order; what is decoded is shared.

        Args:
            indices: Indexes into this set, int64.
        """
        other = object.__new__(ImageSet)
        other.source, other.classes, other._decoded = self.source, self.classes, self._decoded
        other._asked = other._usable = self._rows()[np.asarray(indices, np.int64)]
        return other

    def close(self) -> None:
        """Remove the cache; the set and its subsets can no longer be read."""
        self._decoded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows(self) -> Indices:
        self.decode()
        assert self._usable is not None
        return self._usable

    def _runs(self, indices: Indices | None) -> Iterator[Indices]:
        if indices is not None:
            yield self._rows()[np.asarray(indices, np.int64)]
        elif self._usable is not None:
            yield self._usable
        else:
            for rows in self._chunks():
                yield rows[self._decoded.state[rows] != BROKEN]

    def _chunks(self) -> Iterator[Indices]:
        """All rows in order, decoded or found broken; decoding runs ahead."""
        step = self._decoded.chunk
        rising = (np.diff(self._asked) > 0).all()
        ahead = step * (2 * self._decoded.threads + 1) if rising else len(self._asked)  # then in one pass
        for start in range(0, len(self._asked), step):
            rows = self._asked[start : start + step]
            self._decoded.submit(self._asked[start : start + ahead])
            self._decoded.wait(rows)
            yield rows


def _work(make: Callable[[Indices], Batch], rows: Indices) -> Batch:
    with working():
        return make(rows)


def _regroup(chunks: Iterator[Indices], batch: int) -> Iterator[Indices]:
    """Cut any run of rows into batches."""
    held = np.empty(0, np.int64)
    for rows in chunks:
        held = np.concatenate([held, rows])
        while len(held) >= batch:
            yield held[:batch]
            held = held[batch:]
    if len(held):
        yield held
