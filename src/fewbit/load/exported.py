"""What an exported file says about itself: its card and the images that calibrated it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from fewbit.errors import ModelFileError
from fewbit.load.card import Card, InputSection, NetworkSection
from fewbit.load.onnx_file import QUANTIZED, name_of
from fewbit.spec import Frozen, explain


class Exported(Frozen):
    """The facts in an exported file's metadata.

    Attributes:
        network: Name of the network.
        classes: Number of classes.
        input: From an image file to the network's input.
        labels: Folder name -> class index, none where the sorted folder names count.
        calibration_images: The images that calibrated it and so must not evaluate it; see `ImageSet.hashes`.
        sums: How the processors that it was made for sum products of u8 and s8; none for a float file, and
            for one of a version that did not say.
    """

    network: str
    classes: int
    input: InputSection
    labels: dict[str, int] | None
    calibration_images: frozenset[str]
    sums: Literal["exact", "saturating"] | None = None

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


def quantized_for(path: Path) -> str | None:
    """Say for which engine a file that can run as it is was quantized.

    Args:
        path: An .onnx file.

    Returns:
        The engine's name; empty where the file does not tell; none where the file is neither quantized nor
        written by fewbit, or cannot be read: whoever loads it says so.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return None
    known = {entry.key: entry.value for entry in model.metadata_props}
    quantized = any(node.op_type in QUANTIZED for node in model.graph.node)
    return known.get("fewbit.engine", "") if quantized or "fewbit.card" in known else None


def refuse_quantized(path: Path) -> None:
    """Refuse a file that is quantized already, where a float network is wanted.

    A file that is missing or cannot be read passes: whoever loads it says so.

    Raises:
        ModelFileError: It is; the message says by whom, as far as the file tells.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return
    found = next((node for node in model.graph.node if node.op_type in QUANTIZED), None)
    if found is None:
        return
    known = {entry.key: entry.value for entry in model.metadata_props}
    if "fewbit.card" not in known:
        raise ModelFileError(
            f"{path}: is quantized already (operator {found.op_type}, node '{name_of(found)}'); give the "
            "float32 file that it was made from; with --card, `fewbit eval` and `fewbit bench` run it "
            "as it is"
        )
    raise ModelFileError(
        f"{path}: is quantized already, by fewbit{_told(known)}; give the card or the float32 file that it "
        "was made from; `fewbit eval` and `fewbit bench` run it as it is"
    )


def _told(known: dict[str, str]) -> str:
    """Say with which recipe and for which engine, as far as the metadata tells."""
    try:
        recipe = tomllib.loads(known.get("fewbit.recipe", "")).get("name")
    except tomllib.TOMLDecodeError:
        recipe = None
    engine = known.get("fewbit.engine")
    return (f" with recipe '{recipe}'" if recipe else "") + (f" for {engine}" if engine else "")
