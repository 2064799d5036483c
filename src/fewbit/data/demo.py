"""The built-in labelled images: 100 classes of 3 x 32 x 32, drawn by code from a seed.

A class is a pair (one of ten outlines, one of ten textures) with a colour that only hints at it. Place, size,
turn, outline, texture, colour, light, clutter, a covering bar and noise vary inside a class, and neighbouring
classes overlap, so no network reaches 100 %.

Only ``+ - * / sqrt``, comparisons and a table of rounded sines touch the pixels, each exact under IEEE 754:
the same (split, seed) gives the same bytes on every host, whatever vector instructions it has.
"""

from __future__ import annotations

import io
import tarfile
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewbit.errors import DataError
from fewbit.files import write_atomically

Split = Literal["train", "test"]
Plane = NDArray[np.float32]

CLASSES = 100
SIDE = 32

_SPLITS: tuple[Split, ...] = ("train", "test")
_STEPS = 4096
_SINE: Plane = (np.round(np.sin(np.arange(_STEPS) * (2 * np.pi / _STEPS)) * 16384) / 16384).astype(np.float32)

# Outline: radius(angle) = 1 + sum_k a_k cos(k angle), k = 1..6, and the radius of a hole in the middle.
_OUTLINES: Plane = np.array(
    [
        (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00),  # disc
        (0.00, 0.28, 0.00, 0.00, 0.00, 0.00, 0.00),  # oval
        (0.00, 0.00, 0.22, 0.00, 0.00, 0.00, 0.00),  # triangle
        (0.00, 0.00, 0.00, 0.18, 0.00, 0.00, 0.00),  # square
        (0.00, 0.00, 0.00, 0.00, 0.26, 0.00, 0.00),  # star of five
        (0.00, 0.48, 0.00, 0.10, 0.00, 0.00, 0.00),  # peanut
        (0.00, 0.00, 0.42, 0.00, 0.00, 0.08, 0.00),  # trefoil
        (0.00, 0.00, 0.00, 0.40, 0.00, 0.00, 0.00),  # cross
        (0.30, 0.00, 0.22, 0.00, 0.00, 0.00, 0.00),  # drop
        (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.50),  # ring
    ],
    dtype=np.float32,
)
# Texture: stripes a pixel, their turn, share of rings, share of stripes across the first (a checkerboard).
_TEXTURES: Plane = np.array(
    [
        (0.11, 0.000, 0.0, 0.0),
        (0.11, 0.125, 0.0, 0.0),
        (0.11, 0.250, 0.0, 0.0),
        (0.11, 0.375, 0.0, 0.0),
        (0.19, 0.000, 0.0, 0.0),
        (0.19, 0.167, 0.0, 0.0),
        (0.19, 0.333, 0.0, 0.0),
        (0.13, 0.000, 1.0, 0.0),
        (0.10, 0.000, 0.0, 1.0),
        (0.10, 0.125, 0.0, 1.0),
    ],
    dtype=np.float32,
)


def make_images(
    split: Split, images: int, seed: int = 0, hardness: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw labelled images.

    Image ``i`` has label ``i % 100`` and depends on ``(split, seed, i)`` alone: few are a prefix of many.

    Args:
        split: ``"train"`` or ``"test"``; the two share no random numbers.
        images: How many; the classes' counts differ by at most one.
        seed: Any integer >= 0.
        hardness: 0..1; at 0 noise, contrast and the spread inside a class are gentle, as training starts.

    Returns:
        Pixels, uint8 ``(images, 32, 32, 3)`` in RGB, and labels, int64 ``(images,)`` in 0..99.

    Raises:
        DataError: An unknown split, fewer than one image, a negative seed or a hardness outside 0..1.

    Example:
        >>> pixels, labels = make_images("test", 200)
        >>> pixels.shape, labels[:3].tolist()
        ((200, 32, 32, 3), [0, 1, 2])
    """
    if split not in _SPLITS:
        raise DataError(f"demo images: split is {split!r}; allowed are 'train' and 'test'")
    if images < 1:
        raise DataError(f"demo images: {images} images asked for; ask for at least 1")
    if seed < 0:
        raise DataError(f"demo images: seed is {seed}; give an integer >= 0")
    if not 0 <= hardness <= 1:
        raise DataError(f"demo images: hardness is {hardness}; give a number in 0..1")
    pixels = np.empty((images, SIDE, SIDE, 3), np.uint8)
    for start in range(0, images, CLASSES):
        rng = np.random.default_rng([_SPLITS.index(split), seed, start // CLASSES])
        end = min(start + CLASSES, images)
        pixels[start:end] = _draw(_Draws(rng, hardness))[: end - start]
    return pixels, np.arange(images, dtype=np.int64) % CLASSES


def write_tar(path: Path, split: Split, images: int, seed: int = 0) -> None:
    """Write :func:`make_images` as a tar of lossless PNG files, ``class_000/00000.png`` and so on.

    Names are in sorted order and times are fixed, so the same arguments give the same bytes. The tar is
    written beside ``path`` and renamed when whole.

    Raises:
        DataError: As :func:`make_images`.
    """
    pixels, labels = make_images(split, images, seed)
    with write_atomically(path) as beside, tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in np.argsort(labels, kind="stable"):
            png = io.BytesIO()
            Image.fromarray(pixels[index]).save(png, format="PNG", compress_level=1)
            member = tarfile.TarInfo(f"class_{labels[index]:03d}/{index:05d}.png")
            member.size = png.tell()
            png.seek(0)
            tar.addfile(member, png)


def demo_cards() -> tuple[Path, Path]:
    """Paths of the two cards that ship in the package: the residual network's and the depthwise network's."""
    folder = Path(str(resources.files("fewbit.demo")))
    return folder / "demo_residual.toml", folder / "demo_depthwise.toml"


def _sine(turns: Plane) -> Plane:
    """``sin(2 pi turns)`` to about 1/650, by table."""
    return _SINE.take((turns * np.float32(_STEPS)).astype(np.int32) & (_STEPS - 1))


def _cosine(turns: Plane) -> Plane:
    return _sine(turns + np.float32(0.25))


class _Draws:
    """Random numbers for the 100 images of one block, each ``(100, 1, 1)``, in the order of asking."""

    def __init__(self, rng: np.random.Generator, hardness: float) -> None:
        self._rng = rng
        self._hardness = hardness

    def hard(self, gentle: float, full: float) -> float:
        """A limit that moves from gentle to full with the hardness."""
        return gentle + (full - gentle) * self._hardness

    def between(self, low: float, high: float) -> Plane:
        """Uniform in [low, high)."""
        return self._rng.random((CLASSES, 1, 1), np.float32) * np.float32(high - low) + np.float32(low)

    def around(self, width: float) -> Plane:
        """Triangular in (-width, width): mostly near 0."""
        return self.between(-width / 2, width / 2) + self.between(-width / 2, width / 2)

    def colour(self, hue: Plane, saturation: Plane, light: Plane) -> Plane:
        """RGB ``(100, 3, 1, 1)`` of a hue in turns."""
        thirds = np.array([0, 1 / 3, 2 / 3], np.float32).reshape(1, 3, 1, 1)
        return light[:, None] + saturation[:, None] * _cosine(hue[:, None] - thirds)

    def grain(self) -> Plane:
        """Uniform in [-1, 1) at each pixel and channel."""
        return self._rng.random((CLASSES, 3, SIDE, SIDE), np.float32) * np.float32(2) - np.float32(1)


_Y: Plane = (np.arange(SIDE, dtype=np.float32) - np.float32(SIDE / 2 - 0.5)).reshape(1, SIDE, 1)
_X: Plane = _Y.reshape(1, 1, SIDE)


def _draw(draws: _Draws) -> NDArray[np.uint8]:
    """One image of each class, uint8 ``(100, 32, 32, 3)``."""
    label = np.arange(CLASSES)
    outline = _OUTLINES[label // 10].T.reshape(7, CLASSES, 1, 1)
    texture = _TEXTURES[label % 10].T.reshape(4, CLASSES, 1, 1)

    scene = _background(draws)
    mask, u, v, r = _outline(draws, outline)
    first, second = _colours(draws, label)
    share = (_texture(draws, texture, u, v, r) * np.float32(0.5) + np.float32(0.5))[:, None]
    scene += mask[:, None] * (second + share * (first - second) - scene)
    for _ in range(2):
        _speck(draws, scene)
    _bar(draws, scene)
    scene = (scene - np.float32(0.5)) * draws.between(0.6, 1.2)[:, None] + np.float32(0.5)
    noise = draws.hard(0.14, 0.19)
    scene += draws.around(0.12)[:, None] + draws.between(0.02, noise)[:, None] * draws.grain()
    np.clip(scene, 0, 1, out=scene)
    return np.ascontiguousarray(
        (scene * np.float32(255) + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1)
    )


def _background(draws: _Draws) -> Plane:
    """A slope of light and broad faint stripes of any direction, ``(100, 3, 32, 32)``."""
    turn, pitch = draws.between(0, 1), draws.between(0.03, 0.16)
    waves = _sine((_cosine(turn) * _X + _sine(turn) * _Y) * pitch + draws.between(0, 1))
    slope = draws.around(0.012) * _X + draws.around(0.012) * _Y
    base = draws.colour(draws.between(0, 1), draws.between(0.02, 0.2), draws.between(0.25, 0.75))
    light = draws.hard(0.12, 0.17)
    ink = draws.colour(draws.between(0, 1), draws.between(0, light / 2), draws.between(-light, light))
    return base + ink * waves[:, None] + slope[:, None]


def _outline(draws: _Draws, outline: Plane) -> tuple[Plane, Plane, Plane, Plane]:
    """The object's cover (0..1), own coordinates u, v and radius r in pixels, each ``(100, 32, 32)``."""
    turn, scale = draws.around(0.09), draws.between(draws.hard(0.82, 0.76), 1.2)
    x, y = _X - draws.around(5), _Y - draws.around(5)
    cosine, sine = _cosine(turn) / scale, _sine(turn) / scale
    u, v = cosine * x + sine * y, cosine * y - sine * x
    r = np.sqrt(u * u + v * v) + np.float32(1e-3)
    one = u / r
    wobble = draws.hard(0.06, 0.076)
    before: Plane = np.ones_like(one)
    wave = one
    edge: Plane = np.ones_like(one)
    for k in range(6):
        edge += (outline[k] + draws.around(wobble)) * wave
        before, wave = wave, np.float32(2) * one * wave - before
    size = np.float32(11)
    mask = np.clip((edge * size - r) * scale + np.float32(0.5), 0, 1)
    mask *= np.clip((r - (outline[6] + draws.around(0.05)) * size) * scale + np.float32(0.5), 0, 1)
    return mask, u, v, r


def _texture(draws: _Draws, texture: Plane, u: Plane, v: Plane, r: Plane) -> Plane:
    """Stripes, rings or a checkerboard in the object's coordinates, in -1..1, ``(100, 32, 32)``."""
    pitch, turn, rings, across = texture
    pitch = pitch * (np.float32(1) + draws.around(draws.hard(0.2, 0.23)))
    turn = turn + draws.around(draws.hard(0.05, 0.056))
    cosine, sine = _cosine(turn), _sine(turn)
    along = (cosine * u + sine * v) * (np.float32(1) - rings) + r * rings
    waves = _sine(along * pitch + draws.between(0, 1))
    other = _sine((cosine * v - sine * u) * pitch + draws.between(0, 1))
    woven: Plane = waves * (np.float32(1) - across + across * other)
    return woven


def _colours(draws: _Draws, label: NDArray[np.int64]) -> tuple[Plane, Plane]:
    """The object's two colours, ``(100, 3, 1, 1)`` each; the hue only hints at the class."""
    tenths = ((label // 10 * 3 + label % 10 * 7) % 10).astype(np.float32).reshape(CLASSES, 1, 1)
    hue = tenths / np.float32(10) + draws.around(draws.hard(0.2, 0.26))
    light = draws.between(0.4, 0.6)
    contrast = draws.between(draws.hard(0.12, 0.08), draws.hard(0.32, 0.28))
    first = draws.colour(hue, draws.between(0.1, 0.35), light + contrast)
    second = draws.colour(hue + draws.between(0.1, 0.5), draws.between(0.1, 0.35), light - contrast)
    return first, second


def _speck(draws: _Draws, scene: Plane) -> None:
    """Put a small disc of any colour anywhere."""
    x, y = _X - draws.between(-16, 16), _Y - draws.between(-16, 16)
    cover = np.clip(draws.between(0.5, 3.5) - np.sqrt(x * x + y * y) + np.float32(0.5), 0, 1)
    colour = draws.colour(draws.between(0, 1), draws.between(0.05, 0.4), draws.between(0.2, 0.8))
    scene += cover[:, None] * (colour - scene)


def _bar(draws: _Draws, scene: Plane) -> None:
    """Cover a band across the image, in about half of the images."""
    turn = draws.between(0, 1)
    away = np.abs(_cosine(turn) * _X + _sine(turn) * _Y - draws.between(-12, 12))
    half = draws.hard(2, 2.6)
    cover = np.clip(draws.between(-half, half) - away + np.float32(0.5), 0, 1)
    colour = draws.colour(draws.between(0, 1), draws.between(0.05, 0.3), draws.between(0.2, 0.8))
    scene += cover[:, None] * (colour - scene)
