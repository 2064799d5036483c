"""Labelled images that can be read again and again, whole or in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.data.image_set import ImageSet

Indices = NDArray[np.int64]
Read = Callable[[Indices], Iterator[Tensor]]

_BATCH_VALUES = 8 * 3 * 224 * 224


class Sample:
    """Some images with their labels.

    Args:
        read: Gives the images at indexes, in that order: float32 (N, C, H, W), preprocessed.
        targets: Class index of every image that `read` knows, int64.
        indices: Which of them belong to the sample; else all.
    """

    def __init__(self, read: Read, targets: NDArray[np.int64], indices: Indices | None = None) -> None:
        self._read, self._targets = read, targets
        self.indices = np.arange(len(targets)) if indices is None else indices

    @classmethod
    def of_set(cls, images: ImageSet) -> Sample:
        """Return all images of a set; few at once of large ones."""
        channels, rows, columns = images.input_size
        batch = min(32, max(1, _BATCH_VALUES // (channels * rows * columns)))

        def read(indices: Indices) -> Iterator[Tensor]:
            for pixels in images.batches(batch, indices):
                yield torch.from_numpy(pixels)

        return cls(read, images.targets)

    @classmethod
    def of_tensor(cls, images: Tensor, targets: NDArray[np.int64], batch: int = 32) -> Sample:
        """Return images that are in memory, (N, C, H, W)."""
        return cls(lambda indices: iter(torch.split(images[torch.from_numpy(indices)], batch)), targets)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def targets(self) -> NDArray[np.int64]:
        """Class index of each image."""
        return self._targets[self.indices]

    def batches(self) -> Iterator[Tensor]:
        """Give the images anew."""
        return self._read(self.indices)

    def subset(self, places: Indices) -> Sample:
        """Return the images at some places of this sample, in that order."""
        return Sample(self._read, self._targets, self.indices[places])

    def first(self, count: int) -> Sample:
        """Return the first images, or all where there are fewer."""
        return self.subset(np.arange(min(count, len(self))))
