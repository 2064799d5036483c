"""What a reconstruction has done so far, on disk unit by unit, to go on there after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbit.errors import OutputError
from fewbit.files import write_atomically
from fewbit.improve.units import Unit
from fewbit.place.quantizer import Quantizer


class Checkpoint:
    """One file a unit with its codes, scales, biases and steps; none of it where there is no folder.

    A unit's file appears whole or not at all, and one that a disk has spoilt is not used. Files of another
    recipe, network, seed or other images have another key and are not looked at. The files stay until
    whoever gave the folder takes it away, so that a later step of the same recipe need not repeat this one.

    Args:
        folder: Where to keep the files; none: nowhere.
        name: Of the step.
        key: Names everything that the result depends on.

    Attributes:
        restored: How many units were taken from files.

    Raises:
        OutputError: The folder cannot be made.
    """

    def __init__(self, folder: Path | None, name: str, key: str) -> None:
        self._folder = None if folder is None else folder / f"{name}-{key}"
        self._notes: dict[int, str] = {}
        self.restored = 0
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: no folder can be made there ({error.strerror or error}); "
                "give a place you may write to with --out"
            ) from error

    def note(self, index: int) -> str:
        """Return what a unit's solution said."""
        return self._notes.get(index, "")

    def save(self, index: int, unit: Unit, quantizers: Sequence[Quantizer], note: str) -> None:
        """Write what a unit's solution set."""
        self._notes[index] = note
        if self._folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for place, layer in enumerate(unit.layers.values()):
            quantizer = layer.weight_quantizer
            tensors[f"{place}.scale"] = quantizer.scale
            if quantizer.assigned is not None:
                tensors[f"{place}.codes"] = quantizer.assigned.to(torch.int16)
            if layer.bias is not None:
                tensors[f"{place}.bias"] = layer.bias
        for place, quantizer in enumerate(quantizers):
            tensors[f"step.{place}"] = quantizer.scale
        tensors = {
            key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
        }
        with write_atomically(self._path(index)) as beside:
            save_file(tensors, beside, metadata={"note": note, "digest": _digest(tensors)})

    def restore(self, index: int, unit: Unit, quantizers: Sequence[Quantizer]) -> bool:
        """Set what an earlier run had found for a unit; tell whether there was any."""
        if self._folder is None or not self._path(index).is_file():
            return False
        try:
            with safe_open(self._path(index), framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
                said = opened.metadata() or {}
        except (OSError, SafetensorError):
            return False  # a disk's fault; the unit is solved again
        if said.get("digest") != _digest(tensors):
            return False
        for place, layer in enumerate(unit.layers.values()):
            quantizer = layer.weight_quantizer
            quantizer.scale = tensors[f"{place}.scale"]
            if f"{place}.codes" in tensors:
                quantizer.assign(tensors[f"{place}.codes"].float())
            if f"{place}.bias" in tensors:
                layer.bias = nn.Parameter(tensors[f"{place}.bias"], requires_grad=False)
        for place, quantizer in enumerate(quantizers):
            quantizer.scale = tensors[f"step.{place}"]
        self._notes[index] = said.get("note", "")
        self.restored += 1
        return True

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"unit-{index:04d}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    told = hashlib.sha256()
    for key in sorted(tensors):
        told.update(key.encode())
        told.update(tensors[key].numpy().tobytes())
    return told.hexdigest()
