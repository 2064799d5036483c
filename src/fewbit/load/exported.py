"""What an exported file says about itself: its card and the images that calibrated it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from fewbit.errors import ModelFileError
from fewbit.load.card import Card, InputSection, NetworkSection
from fewbit.spec import Frozen, explain


class Exported(Frozen):
    """The facts in an exported file's metadata.

    Attributes:
        network: Name of the network.
        classes: Number of classes.
        input: From an image file to the network's input.
        labels: Folder name -> class index, none where the sorted folder names count.
        calibration_images: The images that calibrated it and so must not evaluate it; see `ImageSet.hashes`.
    """

    network: str
    classes: int
    input: InputSection
    labels: dict[str, int] | None
    calibration_images: frozenset[str]

    def card(self, path: Path) -> Card:
        """Return the card of the file itself."""
        section = NetworkSection(name=self.network, source=path.name, classes=self.classes)
        return Card(network=section, input=self.input).placed_in(path.parent)


def read_exported(path: Path) -> Exported | None:
    """Read the facts of an exported file; none where fewbit did not write it.

    Raises:
        ModelFileError: The file is missing or damaged.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as reason:
        raise ModelFileError(
            f"{path}: there is no such file; give an exported .onnx file or a card"
        ) from reason
    except (DecodeError, OSError, ValueError) as reason:
        raise ModelFileError(f"{path}: is damaged or no ONNX file; export it again") from reason
    text = next((p.value for p in model.metadata_props if p.key == "fewbit.card"), None)
    if text is None:
        return None
    try:
        return Exported.model_validate(json.loads(text))
    except ValueError as reason:
        why = explain(reason, Exported) if isinstance(reason, ValidationError) else str(reason)
        raise ModelFileError(
            f"{path}: its fewbit metadata is damaged or of another version of fewbit ({why}); export it again"
        ) from reason
