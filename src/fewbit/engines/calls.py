"""Many images as calls of one size, several of them at once."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fewbit.engines.session import Images, Setting
from fewbit.errors import EngineError
from fewbit.spec import ImageInput

Logits = NDArray[np.float32]
Slot = TypeVar("Slot")


class Calls(Generic[Slot]):
    """Splits images into calls and hands each to a free slot (an engine's session or request).

    Args:
        call: (slot, images of at most the setting's batch) -> logits (n, classes).
        slots: One a stream; a slot that may be used by several threads at once may be given several times.
        setting: Batch and streams.
        classes: The width of the logits, for no images.
        takes: The type of the file's input.
        name: The file's.
    """

    def __init__(
        self,
        call: Callable[[Slot, Images], Logits],
        slots: Sequence[Slot],
        setting: Setting,
        classes: int,
        takes: ImageInput = "float32",
        name: str = "the file",
    ) -> None:
        self._call, self._batch, self._classes = call, setting.batch, classes
        self._takes, self._name = takes, name
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._threads = ThreadPoolExecutor(len(slots)) if len(slots) > 1 else None

    def run(self, images: Images) -> Logits:
        """Return the logits (N, classes) of images in their order."""
        images = checked(images, self._takes, self._name)
        if not len(images):
            return np.zeros((0, self._classes), np.float32)
        pieces = [images[start : start + self._batch] for start in range(0, len(images), self._batch)]
        if len(pieces) == 1 or self._threads is None:
            found = [self._one(piece) for piece in pieces]
        else:
            found = list(self._threads.map(self._one, pieces))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _one(self, piece: Images) -> Logits:
        slot = self._free.get()
        try:
            return self._call(slot, piece)
        finally:
            self._free.put(slot)


def checked(images: Images, takes: ImageInput, name: str) -> Images:
    """Return images of the type that a file takes, in one piece.

    Args:
        images: The images.
        takes: The type of the file's input.
        name: The file's.

    Raises:
        EngineError: They are preprocessed images and the file takes pixels, or the other way round.
    """
    if takes == "uint8":
        if images.dtype != np.uint8:
            raise EngineError(
                f"{name}: takes uint8 pixels (N, H, W, C), not {images.dtype} {images.shape}; "
                "give the decoded image as it is, without preprocessing"
            )
        return np.ascontiguousarray(images)
    if images.dtype == np.uint8:
        raise EngineError(
            f"{name}: takes preprocessed float32 images (N, C, H, W), not uint8 {images.shape}; "
            "preprocess them as its card says, or make the file with --input uint8"
        )
    return np.ascontiguousarray(images, dtype=np.float32)
