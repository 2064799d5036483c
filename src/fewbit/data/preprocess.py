"""From encoded bytes to the network's input, as the card's `[input]` says, computed as torchvision does.

Pixels stay uint8 ``(H, W, C)`` until the last moment: `decode` makes them, `normalize` makes float32 batches.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fewbit.data.stores import BrokenImageError
from fewbit.errors import DataError
from fewbit.load.card import InputSection

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF")
MAX_PIXELS = 89_478_485

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode(data: bytes, section: InputSection, name: str = "image") -> NDArray[np.uint8]:
    """Decode one image, convert it to the channels, resize it and crop it.

    An image's rotation tag (EXIF) is not applied, as in torchvision's image folders.

    Args:
        data: Encoded bytes: JPEG, PNG, BMP, WebP, PPM or TIFF.
        section: The card's `[input]`.
        name: What to call it in an error.

    Returns:
        uint8 (H, W, C), contiguous, of the card's size, channels in the network's order.

    Raises:
        BrokenImageError: It cannot be decoded, or has more than 89,478,485 pixels.
        DataError: After resize and crop it is not of the card's size.
    """
    mode = "L" if section.channels == "gray" else "RGB"
    image = _resize(_open(data, name, mode), section)
    came = (image.height, image.width)
    if section.crop_size is not None:
        image = _centre_crop(image, *section.crop_size)
    if (image.height, image.width) != section.height_width:
        raise DataError(_wrong_size(name, came, section))
    pixels = np.asarray(image)
    if mode == "L":
        return pixels[..., None]
    return np.ascontiguousarray(pixels[..., ::-1]) if section.channels == "bgr" else pixels


def normalize(pixels: NDArray[np.uint8], section: InputSection) -> NDArray[np.float32]:
    """Return ``(pixel / scale - mean) / std``, each step in float32 as torchvision does.

    Args:
        pixels: uint8 (N, H, W, C).
        section: The card's `[input]`.

    Returns:
        float32 (N, C, H, W), contiguous.

    Example:
        >>> section = InputSection(size=(1, 1, 1), scale=255.0, mean=(0.5,), std=(0.5,))
        >>> normalize(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1), section).ravel().tolist()
        [-1.0, 1.0]
    """
    images, height, width, channels = pixels.shape
    batch = np.empty((images, channels, height, width), np.float32)
    shape = (1, channels, 1, 1)
    np.divide(pixels.transpose(0, 3, 1, 2), np.float32(section.scale), out=batch)
    batch -= np.array(section.mean, np.float32).reshape(shape)
    batch /= np.array(section.std, np.float32).reshape(shape)
    return batch


def _open(data: bytes, name: str, mode: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BrokenImageError(
                f"{name}: has {image.width} x {image.height} pixels; {MAX_PIXELS} in all are allowed"
            )
        image.load()
        return _convert(image, name, mode)
    except UnidentifiedImageError as reason:
        what = "not an image of a known format" if data else "empty"
        raise BrokenImageError(f"{name}: is {what}; known are {', '.join(FORMATS)}") from reason
    except (BrokenImageError, MemoryError):
        raise
    except Exception as reason:  # a decoder of foreign bytes may raise anything
        raise BrokenImageError(f"{name}: {str(reason) or type(reason).__name__}") from reason


def _convert(image: Image.Image, name: str, mode: str) -> Image.Image:
    """Bring any pixel format to 8 bits: 16-bit gray keeps its high byte, transparency is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BrokenImageError(f"{name}: has floating point pixels; give 8-bit or 16-bit images")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == mode:
        return image
    return image.convert("RGB").convert(mode) if image.mode not in ("1", "L", "LA") else image.convert(mode)


def _resize(image: Image.Image, section: InputSection) -> Image.Image:
    """Resize the shorter side, rounding the longer one down, or to exactly [H, W]."""
    if section.resize is None:
        return image
    if isinstance(section.resize, int):
        shorter, longer = sorted(image.size)
        if shorter == section.resize:
            return image
        other = int(section.resize * longer / shorter)
        size = (section.resize, other) if image.width <= image.height else (other, section.resize)
    else:
        size = (section.resize[1], section.resize[0])
    return image.resize(size, _FILTERS[section.interpolation])


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop around the centre; a smaller image is padded with zeros first, the odd pixel right and below."""
    across, down = max(width - image.width, 0), max(height - image.height, 0)
    if across or down:
        image = ImageOps.expand(
            image, (across // 2, down // 2, math.ceil(across / 2), math.ceil(down / 2)), fill=0
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _wrong_size(name: str, came: tuple[int, int], section: InputSection) -> str:
    height, width = section.height_width
    did: list[Any] = [
        f"{key} {value}" for key in ("resize", "crop") if (value := getattr(section, key)) is not None
    ]
    square = height == width
    add = f"resize = {height} and crop = {height}" if square else f"resize = [{height}, {width}]"
    return (
        f"{name}: is {came[0]} x {came[1]} (H x W) after {' and '.join(did) or 'no resize and no crop'}; the "
        f"network takes {height} x {width}; add {add} to [input] of the card, or give images of that size"
    )
