"""The network card: all that is needed to run a network, as frozen data with a round trip to TOML.

The sections and keys, with paths relative to the card::

    [network]  name source arguments weights classes labels
    [input]    size resize crop interpolation channels scale mean std
    [expected] data images top1_correct top5_correct             (optional section)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from fewbit.errors import CardError
from fewbit.spec import Frozen

SourceKind = Literal["file", "package", "torchvision", "timm", "onnx"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Channels = Literal["rgb", "bgr", "gray"]

_FORMS = "'file.py:factory', 'package.module:factory', 'torchvision:name', 'timm:name' or 'model.onnx'"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        kind: "file" (a Python file), "package" (an importable module), "torchvision", "timm" or "onnx".
        path: The Python or ONNX file, absolute; none for the other kinds.
        module: The module that holds the factory; empty for the kinds with a path.
        factory: The function that builds the model, or its name in torchvision or timm; empty for ONNX.
    """

    kind: SourceKind
    path: Path | None = None
    module: str = ""
    factory: str = ""


def parse_source(text: str, folder: Path) -> Source:
    """Tell the forms of `source` apart.

    Args:
        text: 'file.py:factory', 'package.module:factory', 'torchvision:name', 'timm:name' or 'model.onnx'.
        folder: What a relative path starts from.

    Raises:
        CardError: It is none of them.

    Example:
        >>> parse_source("torchvision.models:resnet18", Path("cards"))
        Source(kind='package', path=None, module='torchvision.models', factory='resnet18')
    """
    if text.endswith(".onnx"):
        return Source("onnx", path=_absolute(folder, text))
    place, _, factory = text.rpartition(":")
    if place in ("torchvision", "timm") and factory:
        return Source("timm" if place == "timm" else "torchvision", module=place, factory=factory)
    if place.endswith(".py") and factory.isidentifier():
        return Source("file", path=_absolute(folder, place), factory=factory)
    dotted = all(part.isidentifier() for part in place.split("."))
    if dotted and all(part.isidentifier() for part in factory.split(".")):
        return Source("package", module=place, factory=factory)
    if text.endswith(".py"):
        raise CardError(f"source '{text}' names a file but no factory; write '{text}:NAME_OF_THE_FUNCTION'")
    raise CardError(f"source '{text}' is of no known form; give {_FORMS}")


class NetworkSection(Frozen):
    """`[network]`: the model, its weights and its classes.

    Attributes:
        name: What the network is called in reports.
        source: Where the model comes from, see `parse_source`.
        arguments: Keyword arguments of the factory.
        weights: Path of a safetensors file or a state dict; none for ONNX.
        classes: Number of classes, the width of the logits.
        labels: Path of a JSON file, folder name -> class index; without it the sorted folder names count.
    """

    name: str = Field(min_length=1, max_length=100)
    source: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    classes: int
    labels: str | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value.startswith(".") or any(sign in '/\\:*?"<>|' or not sign.isprintable() for sign in value):
            raise ValueError(
                f"'{value}' cannot be part of a file's name; use letters, digits, blanks, '-', '_' and '.'"
            )
        return value

    @field_validator("source")
    @classmethod
    def _check_source(cls, value: str) -> str:
        try:
            parse_source(value, Path())
        except CardError:
            hint = f"'{value}:NAME_OF_THE_FUNCTION'" if value.endswith(".py") else _FORMS
            raise PydanticCustomError("source", "write {forms}", {"forms": hint}) from None
        return value

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and str(info.data.get("source", "")).endswith(".onnx"):
            raise PydanticCustomError("arguments", "an ONNX file takes no arguments; remove them")
        return value

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and str(info.data.get("source", "")).endswith(".onnx"):
            raise PydanticCustomError("weights", "an ONNX file brings its own weights; remove this")
        return value

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: int) -> int:
        if value < 2:
            raise PydanticCustomError("classes", "a classifier has at least 2 classes; give their number")
        return value


class InputSection(Frozen):
    """`[input]`: from an image file to the network's input, in this order.

    Convert to 8 bits and to the channels, resize, crop, then ``(pixel / scale - mean) / std``.

    Attributes:
        size: (C, H, W) of the network's input; C is 3, or 1 for grayscale.
        resize: Shorter side in pixels, the ratio of the sides kept; or [H, W], the ratio not kept.
        crop: Side of the centre crop in pixels, or [H, W]; smaller images are padded with zeros.
        interpolation: Of the resize, always with antialias, as Pillow and torchvision do.
        channels: "rgb", "bgr", or "gray" where C is 1.
        scale: What the 0..255 pixels are divided by.
        mean, std: One a channel, in the order of the network's channels (for "bgr" blue first).
    """

    size: tuple[int, int, int]
    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = Field(None, validate_default=True)
    interpolation: Interpolation = "bilinear"
    channels: Channels = Field(default_factory=lambda data: _default_channels(data))
    scale: float = 255.0
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def height_width(self) -> tuple[int, int]:
        """(H, W) of the network's input."""
        return self.size[1:]

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """(H, W) of the crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @property
    def value_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(lowest, highest) value of each channel of an image: of the pixels 0 and 255."""
        norms = tuple(zip(self.mean, self.std, strict=True))
        low, high = (tuple((pixel / self.scale - m) / s for m, s in norms) for pixel in (0, 255))
        return low, high

    @field_validator("size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        whole = isinstance(value, list | tuple) and all(_is_whole(part) for part in value)
        if not whole or len(value) != 3:
            raise PydanticCustomError(
                "size", "give three whole numbers [C, H, W] (channels, height, width), such as [3, 224, 224]"
            )
        if min(value) < 1:
            raise PydanticCustomError("size", "each of channels, height and width must be at least 1")
        if value[0] not in (1, 3):
            raise PydanticCustomError("size", "the first number, the channels, must be 3 or 1 (grayscale)")
        return value

    @field_validator("resize", "crop", mode="before")
    @classmethod
    def _check_sides(cls, value: Any) -> Any:
        if value is None:
            return value
        sides = (value,) if _is_whole(value) else value
        right = isinstance(sides, list | tuple) and (len(sides) == 2 or sides == (value,))
        if not right or not all(_is_whole(side) and side >= 1 for side in sides):
            raise PydanticCustomError("sides", "give a positive number of pixels, or two of them, [H, W]")
        return value

    @field_validator("crop")
    @classmethod
    def _check_final_size(cls, value: int | tuple[int, int] | None, info: ValidationInfo) -> Any:
        size, resize = info.data.get("size"), info.data.get("resize")
        crop = (value, value) if isinstance(value, int) else value
        if size and crop and crop != tuple(size[1:]):
            raise PydanticCustomError(
                "crop",
                "gives {got}, but size asks for {want} (H x W); make them agree",
                {"got": f"{crop[0]} x {crop[1]}", "want": f"{size[1]} x {size[2]}"},
            )
        if size and crop is None and isinstance(resize, tuple) and resize != tuple(size[1:]):
            raise PydanticCustomError("crop", "resize does not give the height and width of size; add a crop")
        return value

    @field_validator("channels")
    @classmethod
    def _check_channels(cls, value: Channels, info: ValidationInfo) -> Channels:
        size = info.data.get("size")
        if size and (value == "gray") != (size[0] == 1):
            raise PydanticCustomError(
                "channels",
                "size has {count}; 'rgb' and 'bgr' go with 3 channels, 'gray' with 1",
                {"count": f"{size[0]} channel{'s' if size[0] > 1 else ''}"},
            )
        return value

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: float) -> float:
        if value <= 0:
            raise PydanticCustomError("scale", "must be above 0, such as 255.0 (pixels are divided by it)")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _check_length(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        size = info.data.get("size")
        if size and len(value) != size[0]:
            raise PydanticCustomError(
                "length",
                "has {got} where size has {want}; give one a channel",
                {"got": _count(len(value), "number"), "want": _count(size[0], "channel")},
            )
        if info.field_name == "std" and min(value, default=1.0) <= 0:
            raise PydanticCustomError("std", "each must be above 0 (pixels are divided by it)")
        return value


class ExpectedSection(Frozen):
    """`[expected]`: float32 accuracy on a known set; a mismatch is reported before anything else.

    Attributes:
        data: Path of the images.
        images: How many there are.
        top1_correct, top5_correct: How many of them are right.
    """

    data: str
    images: int = Field(ge=1)
    top1_correct: int = Field(ge=0)
    top5_correct: int

    @field_validator("top5_correct")
    @classmethod
    def _check_order(cls, value: int, info: ValidationInfo) -> int:
        low, high = info.data.get("top1_correct", 0), info.data.get("images", value)
        if not low <= value <= high:
            raise PydanticCustomError(
                "top5",
                "must lie between top1_correct ({low}) and images ({high})",
                {"low": low, "high": high},
            )
        return value


class Card(Frozen):
    """All that is needed to run a network, so that one argument names it.

    Attributes:
        network: The model, its weights and its classes.
        input: From an image file to the network's input.
        expected: Known float32 accuracy; none where not given.
    """

    network: NetworkSection
    input: InputSection
    expected: ExpectedSection | None = None
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from, absolute."""
        return self._folder

    @property
    def source(self) -> Source:
        """Where the model comes from."""
        return parse_source(self.network.source, self.folder)

    @property
    def weights_path(self) -> Path | None:
        """The weights file, absolute; none where the source brings its own."""
        return self._path(self.network.weights)

    @property
    def labels_path(self) -> Path | None:
        """The labels file, absolute; none where the sorted folder names count."""
        return self._path(self.network.labels)

    @property
    def expected_data_path(self) -> Path | None:
        """The images that `expected` speaks of, absolute."""
        return self._path(self.expected.data if self.expected else None)

    def placed_in(self, folder: Path) -> Self:
        """Return the card with `folder` as the start of its relative paths; their text stays as it is."""
        card = self.model_copy()
        card._folder = _absolute(Path(), str(folder))
        return card

    def moved_to(self, folder: Path) -> Self:
        """Return the card for writing into another folder: its paths are rewritten to name the same files."""
        start = _absolute(Path(), str(folder))

        def move(text: str | None) -> str | None:
            return (
                None
                if text is None
                else Path(os.path.relpath(_absolute(self.folder, text), start)).as_posix()
            )

        source, network = self.source, self.network
        if source.path is not None:
            factory = f":{source.factory}" if source.factory else ""
            network = network.model_copy(update={"source": f"{move(str(source.path))}{factory}"})
        network = network.model_copy(
            update={"weights": move(network.weights), "labels": move(network.labels)}
        )
        update: dict[str, Any] = {"network": network}
        if self.expected:
            update["expected"] = self.expected.model_copy(update={"data": move(self.expected.data)})
        return self.model_copy(update=update).placed_in(folder)

    def _path(self, text: str | None) -> Path | None:
        return None if text is None else _absolute(self.folder, text)


def read_card(path: Path | str) -> Card:
    """Read a card and check that the files it names are there.

    Args:
        path: A TOML file.

    Returns:
        The card; `card.folder` is where it lies, and its `..._path` properties are absolute.

    Raises:
        CardError: It is missing or unreadable, is not TOML, has unknown, missing or wrong keys, or names a
            source, weights or labels file that is missing.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as reason:
        raise CardError(f"{path}: there is no such card; give the path of a .toml card") from reason
    except UnicodeDecodeError as reason:
        raise CardError(f"{path}: is not a card: not UTF-8 text; give the path of a .toml card") from reason
    except OSError as reason:
        raise CardError(
            f"{path}: the card cannot be read ({reason.strerror or reason}); give the path of a .toml card"
        ) from reason
    card = Card.from_toml(text, str(path), CardError).placed_in(path.parent)
    _check_files(card, str(path), lambda key: f"key 'network.{key}'")
    return card


def card_from_options(
    source: str,
    *,
    classes: int | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float | None = None,
    resize: int | Sequence[int] | None = None,
    crop: int | Sequence[int] | None = None,
    interpolation: str | None = None,
    channels: str | None = None,
    weights: Path | str | None = None,
    labels: Path | str | None = None,
    arguments: Mapping[str, Any] | None = None,
    name: str | None = None,
    folder: Path | None = None,
) -> Card:
    """Make a card of facts given as options; what is None counts as not given.

    Args:
        source: 'model.onnx', 'file.py:factory', 'package.module:factory', 'torchvision:name' or 'timm:name'.
        classes: As in `NetworkSection`.
        size: As in `InputSection`, like the other keys of an image.
        mean: One number a channel.
        std: One number a channel.
        scale: Else 255.
        resize: Shorter side.
        crop: Centre crop.
        interpolation: Else bilinear.
        channels: Else rgb.
        weights: As in `NetworkSection`, like the other keys of a network.
        labels: Of a labels file.
        arguments: Of the factory.
        name: Else made from the source.
        folder: What relative paths start from; else the current folder.

    Raises:
        CardError: An option is missing or wrong, or names a file that is missing.

    Example:
        >>> card_from_options("timm:r18", classes=9, size=[1, 8, 8], mean=[0], std=[1]).network.name
        'r18'
    """
    folder = Path.cwd() if folder is None else Path(folder)
    parsed = _parsed(source, folder)
    network = {
        "name": name or parsed.factory or (parsed.path.stem if parsed.path else source),
        "source": source,
        "arguments": None if arguments is None else dict(arguments),
        "weights": None if weights is None else str(weights),
        "classes": classes,
        "labels": None if labels is None else str(labels),
    }
    image: dict[str, Any] = {"size": size, "resize": resize, "crop": crop, "interpolation": interpolation}
    image |= {"channels": channels, "scale": scale, "mean": mean, "std": std}
    data = {"network": _given(network), "input": _given(image)}
    card = _checked(data, source).placed_in(folder)
    _check_files(card, source, lambda key: "the network" if key == "source" else f"option --{key}")
    return card


def _parsed(source: str, folder: Path) -> Source:
    try:
        return parse_source(source, folder)
    except CardError as reason:
        why = f"'{source}': is neither a .toml card nor a source of a network; give {_FORMS}"
        raise CardError(why) from reason


def _checked(data: dict[str, Any], source: str) -> Card:
    """Build a card of options, and speak of options where one is wrong."""
    try:
        return Card.from_data(data, source, CardError)
    except CardError as reason:
        option = re.sub(r"key '(?:network|input)\.(\w+)[^']*'", r"option --\1", str(reason))
        raise CardError(
            option.replace("is missing; add it", "is missing; add it, or give a .toml card")
        ) from reason


def _given(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _check_files(card: Card, place: str, say: Callable[[str], str]) -> None:
    files = {"source": card.source.path, "weights": card.weights_path, "labels": card.labels_path}
    for key, path in files.items():
        if path is not None and not path.is_file():
            what = "a folder, not a file" if path.is_dir() else "missing"
            raise CardError(f"{place}: {say(key)} names {path}, which is {what}; correct the path")


def _absolute(folder: Path, text: str) -> Path:
    return Path(os.path.normpath(Path.cwd() / folder / text))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _default_channels(data: dict[str, Any]) -> Channels:
    return "gray" if data.get("size", (3,))[0] == 1 else "rgb"
