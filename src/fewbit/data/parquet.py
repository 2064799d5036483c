"""Images in parquet: a column of encoded bytes (or Hugging Face's struct of bytes and path) and of labels."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fewbit.data.stores import BrokenImageError, Labels
from fewbit.errors import DataError

IMAGE_COLUMNS = ("image", "img", "bytes", "image_bytes")
LABEL_COLUMNS = ("label", "class", "fine_label", "target")
_ROWS = 64
_WINDOWS = 3
_SHARD = re.compile(r"-\d+-of-\d+$")


class ParquetStore:
    """The rows of one parquet file, or of all files of one split in a folder.

    A row group is streamed in windows of 64 rows, so memory is bounded whatever its size.

    Attributes:
        labels: int64 (N,) where the label column holds integers, else its words.
    """

    sequential = True

    def __init__(self, path: Path, files: list[Path]) -> None:
        """Read the labels and where the row groups start.

        Raises:
            DataError: A file is damaged, its columns are others, a label is missing or negative, or the
                folder holds several splits.
        """
        splits = sorted({_SHARD.sub("", file.stem) for file in files})
        if len(files) > 1 and len(splits) > 1:
            raise DataError(
                f"{path}: holds several sets ({', '.join(splits)}); give one file or a folder of one set"
            )
        self.folders: set[str] = set()
        self.names: list[str] = []
        self._groups: list[tuple[pq.ParquetFile, int, str]] = []
        self._starts: list[int] = []
        labels: list[Any] = []
        for file in files:
            try:
                labels.extend(self._list(file))
            except (pa.ArrowException, OSError) as reason:
                raise DataError(
                    f"{file}: the parquet file is damaged ({_line(reason)}); fetch it again"
                ) from reason
        self.labels: Labels | None = _as_labels(labels, path)
        self._lock = threading.Lock()
        self._windows: deque[tuple[int, Any]] = deque(maxlen=_WINDOWS)
        self._cursor: Iterator[Any] = iter(())
        self._group = -1
        self._next = 0

    def _list(self, path: Path) -> list[Any]:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        schema = file.schema_arrow
        image, label = (
            _find(schema, path, IMAGE_COLUMNS, "image"),
            _find(schema, path, LABEL_COLUMNS, "label"),
        )
        kind = schema.field(image).type
        leaf = f"{image}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else image
        inner = kind.field("bytes").type if leaf != image else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise DataError(
                f"{path}: column '{image}' is {kind}; allowed are binary (an encoded image), struct<bytes>"
            )
        values = pq.read_table(path, columns=[label]).column(label)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if not (
            pa.types.is_integer(values.type)
            or pa.types.is_string(values.type)
            or pa.types.is_large_string(values.type)
        ):
            raise DataError(
                f"{path}: column '{label}' is {values.type}; allowed are integers (the class index) or text"
            )
        start = len(self.names)
        for group in range(file.num_row_groups):
            self._groups.append((file, group, leaf))
            self._starts.append(start)
            start += file.metadata.row_group(group).num_rows
        self.names.extend(f"{path.name} row {row}" for row in range(len(values)))
        return list(values.to_pylist())

    def read(self, index: int) -> bytes:
        """Return the bytes in one row."""
        with self._lock:
            try:
                data = self._find_row(index)
            except (pa.ArrowException, OSError) as reason:
                raise BrokenImageError(f"{self.names[index]}: cannot be read ({_line(reason)})") from reason
        if data is None:
            raise BrokenImageError(f"{self.names[index]}: has no image bytes")
        return data

    def _find_row(self, index: int) -> bytes | None:
        for start, values in self._windows:
            if start <= index < start + len(values):
                return values[index - start].as_py()  # type: ignore[no-any-return]
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if group != self._group or index < self._next:
            file, place, leaf = self._groups[group]
            self._cursor = file.iter_batches(_ROWS, row_groups=[place], columns=[leaf], use_threads=False)
            self._group, self._next = group, self._starts[group]
        while True:
            values = next(self._cursor).column(0)
            if pa.types.is_struct(values.type):
                values = values.field("bytes")
            start, self._next = self._next, self._next + len(values)
            self._windows.append((start, values))
            if index < self._next:
                return values[index - start].as_py()  # type: ignore[no-any-return]


def _find(schema: Any, path: Path, names: tuple[str, ...], what: str) -> str:
    found = next((name for name in names if name in schema.names), None)
    if found is None:
        raise DataError(
            f"{path}: has no {what} column among {', '.join(schema.names)}; name it one of {', '.join(names)}"
        )
    return found


def _as_labels(labels: list[Any], path: Path) -> Labels:
    bad = next((row for row, label in enumerate(labels) if label is None), None)
    if bad is not None:
        raise DataError(f"{path}: row {bad} has no label; take the row out")
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"{path}: its files have labels of different types; give one set")
    if labels and isinstance(labels[0], str):
        return labels
    indexes = np.array(labels, np.int64)
    if len(indexes) and indexes.min() < 0:
        row = int(indexes.argmin())
        raise DataError(
            f"{path}: row {row} has label {indexes[row]}; allowed are class indexes from 0 (-1: not labelled)"
        )
    return indexes


def _line(reason: Exception) -> str:
    return str(reason).splitlines()[0] if str(reason) else type(reason).__name__
