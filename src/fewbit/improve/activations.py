"""The tensors of a network over all calibration images, in memory or, beyond a limit, in mapped files."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fewbit.errors import OutputError
from fewbit.place.quantizer import Quantizer


@dataclass
class _Kept:
    values: Tensor
    grid: tuple[Tensor, Tensor] | None
    mapped: bool
    shared: bool = False


class Activations:
    """Holds one tensor a key, written once in batches and read in any order.

    What comes out of a quantizer of 8 bits or less is kept as its codes, one byte a value, and read back bit
    for bit. Images stand with their channels last, which torch's kernels read fastest.

    Args:
        limit_bytes: What does not fit under it goes to memory-mapped files.
        folder: Where such files are made; none: where the system keeps temporary files. They have no name
            there, so that nothing is left behind even by a process that is killed.

    Example:
        >>> with Activations(1 << 20) as kept:
        ...     kept.put("x", torch.ones(2, 3, 4, 4), 0, 2)
        ...     kept.take("x", torch.tensor([1])).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(self, limit_bytes: int, folder: Path | None = None) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._folder = folder
        self._kept: dict[Hashable, _Kept] = {}

    def __enter__(self) -> Activations:
        """Open it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back, the files too."""
        for key in list(self._kept):
            self.drop(key)

    def __contains__(self, key: Hashable) -> bool:
        """Tell whether there is a tensor of this key."""
        return key in self._kept

    def put(
        self, key: Hashable, values: Tensor, start: int, images: int, quantizer: Quantizer | None = None
    ) -> None:
        """Write a batch.

        Args:
            key: Of the tensor.
            values: (n, ...) float32.
            start: Place of the batch's first image.
            images: Of the whole tensor.
            quantizer: Whose values these are, to keep codes; one scale for the tensor.

        Raises:
            OutputError: The disk has no room for a file.
        """
        rows = values.permute(0, 2, 3, 1) if values.dim() == 4 else values
        if key not in self._kept:
            self._kept[key] = self._room((images, *rows.shape[1:]), quantizer)
        kept = self._kept[key]
        if kept.grid is not None:
            scale, offset = kept.grid
            rows = torch.round(rows / scale) + offset
        kept.values[start : start + len(rows)] = rows.to(kept.values.dtype)

    def take(self, key: Hashable, which: Tensor | slice) -> Tensor:
        """Return images of a tensor, float32."""
        kept = self._kept[key]
        rows = kept.values[which]
        if kept.grid is not None:
            scale, offset = kept.grid
            rows = (rows.float() - offset) * scale
        return rows.permute(0, 3, 1, 2) if rows.dim() == 4 else rows

    def share(self, key: Hashable, other: Activations) -> None:
        """Read a tensor that another one holds too."""
        self._kept[key] = replace(other._kept[key], shared=True)

    def drop(self, key: Hashable) -> None:
        """Forget a tensor, where there is one."""
        kept = self._kept.pop(key, None)
        if kept is not None and not kept.mapped and not kept.shared:
            self.held_bytes -= kept.values.nbytes

    def _room(self, shape: tuple[int, ...], quantizer: Quantizer | None) -> _Kept:
        grid, dtype = None, torch.float32
        if quantizer is not None and quantizer.scale.dim() == 0:
            # Codes count from qmin, so that signed ones fit a byte without a sign.
            grid = quantizer.scale.clone(), quantizer.zero_point - quantizer.qmin
            dtype = torch.uint8
        needed = math.prod(shape) * dtype.itemsize
        if self.held_bytes + needed <= self.limit_bytes:
            self.held_bytes += needed
            return _Kept(torch.empty(shape, dtype=dtype), grid, False)
        return _Kept(_mapped(shape, dtype, self._folder), grid, True)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return a tensor in a file of its own that lives as long as the tensor."""
    needed = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(prefix="activations-", suffix=".bin", dir=folder) as file:
            if sys.platform == "linux":
                # A full disk is an error here; later, behind a mapped page, it would end the process.
                os.posix_fallocate(file.fileno(), 0, needed)
            values = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise OutputError(
            f"{where}: no file of {needed:,} bytes for activations can be made ({error.strerror or error}); "
            "make room there, or calibrate on fewer images"
        ) from error
    return values.reshape(shape)
