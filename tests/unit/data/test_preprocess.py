from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewbit.data import preprocess
from fewbit.data.preprocess import decode, normalize
from fewbit.data.stores import BrokenImageError
from fewbit.errors import DataError


def save(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, format=form, **options)
    return held.getvalue()


def noise(height: int, width: int, *channels: int, seed: int = 0, kind: Any = np.uint8) -> Any:
    top = np.iinfo(kind).max
    return np.random.default_rng(seed).integers(0, top + 1, (height, width, *channels), kind)


def test_pixels_come_as_they_are(section: Any) -> None:
    pixels = noise(8, 8, 3)
    got = decode(save(Image.fromarray(pixels)), section())
    assert got.dtype == np.uint8 and got.flags.c_contiguous and (got == pixels).all()
    assert (decode(save(Image.fromarray(pixels)), section(channels="bgr")) == pixels[..., ::-1]).all()


def test_normalize_is_torchvisions_arithmetic_bit_for_bit(section: Any) -> None:
    facts = section(size=(3, 16, 256), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = np.arange(256, dtype=np.uint8).repeat(2 * 16 * 3).reshape(2, 256, 16, 3).transpose(0, 2, 1, 3)
    tensor = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 1) for part in (facts.mean, facts.std))
    want = tensor.sub(mean).div(std).numpy()
    got = normalize(pixels, facts)
    assert got.dtype == np.float32 and got.flags.c_contiguous and got.shape == (2, 3, 16, 256)
    assert (got == want).all()


@given(
    pixel=st.integers(0, 255), scale=st.floats(0.5, 1e3), mean=st.floats(-500, 500), std=st.floats(0.01, 500)
)
def test_normalize_formula(pixel: int, scale: float, mean: float, std: float, section: Any) -> None:
    facts = section(size=(1, 1, 1), scale=scale, mean=(mean,), std=(std,))
    got = normalize(np.full((1, 1, 1, 1), pixel, np.uint8), facts).item()
    assert got == pytest.approx(
        (pixel / scale - mean) / std, rel=1e-5, abs=1e-6 * (abs(mean) + 512 / scale) / std
    )


def test_mean_and_std_follow_the_networks_channels(section: Any) -> None:
    pixels = np.full((8, 8, 3), (10, 20, 30), np.uint8)
    facts = section(channels="bgr", scale=1.0, mean=(30.0, 20.0, 10.0), std=(1.0, 1.0, 1.0))
    assert (normalize(decode(save(Image.fromarray(pixels)), facts)[None], facts) == 0).all()


@pytest.mark.parametrize(
    ("came", "resize", "want"),
    [
        ((375, 500), 256, (256, 341)),
        ((500, 375), 256, (341, 256)),
        ((333, 500), 224, (224, 336)),
        ((100, 100), 37, (37, 37)),
        ((256, 400), 256, (256, 400)),
        ((20, 30), 40, (40, 60)),
        ((20, 30), [24, 25], (24, 25)),
    ],
)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resize(
    came: tuple[int, int], resize: Any, want: tuple[int, int], interpolation: str, section: Any
) -> None:
    pixels = noise(*came, 3)
    crop = None if isinstance(resize, int) else want
    facts = section(size=(3, *want), resize=resize, crop=crop, interpolation=interpolation)
    method = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(pixels).resize((want[1], want[0]), method))
    assert (decode(save(Image.fromarray(pixels), "BMP"), facts) == expected).all()


def test_resize_has_antialias(section: Any) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = decode(save(Image.fromarray(stripes)), section(resize=8, crop=8))
    assert small.min() > 100 and small.max() < 155


@pytest.mark.parametrize(
    ("came", "crop", "top", "left"),
    [
        ((256, 341), 224, 16, 58),
        ((256, 343), 224, 16, 60),
        ((9, 8), 8, 0, 0),
        ((11, 8), 8, 2, 0),
        ((225, 224), 224, 0, 0),
    ],
)
def test_centre_crop_rounds_as_torchvision(
    came: tuple[int, int], crop: int, top: int, left: int, section: Any
) -> None:
    pixels = noise(*came, 3)
    got = decode(save(Image.fromarray(pixels), "BMP"), section(size=(3, crop, crop), crop=crop))
    assert (got == pixels[top : top + crop, left : left + crop]).all()


def test_a_smaller_image_is_padded_with_zeros(section: Any) -> None:
    pixels = noise(5, 11, 3)
    got = decode(save(Image.fromarray(pixels)), section(crop=8))
    want = np.zeros((8, 8, 3), np.uint8)
    want[1:6] = pixels[:, 2:10]  # (11 - 8) / 2 = 1.5 rounds to the even 2; of 3 rows one above, two below
    assert (got == want).all()


def test_grayscale(section: Any) -> None:
    gray, colour = noise(8, 8), noise(8, 8, 3)
    facts = section(size=(1, 8, 8))
    assert (decode(save(Image.fromarray(gray)), facts)[..., 0] == gray).all()
    got = decode(save(Image.fromarray(colour)), facts)
    assert got.shape == (8, 8, 1)
    weighed = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(got[..., 0] - weighed).max() <= 1
    assert (decode(save(Image.fromarray(gray)), section()) == gray[..., None].repeat(3, 2)).all()


def test_other_pixel_formats_become_rgb(section: Any) -> None:
    pixels = noise(8, 8, 3)
    image = Image.fromarray(pixels)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(noise(8, 8, seed=1)))
    assert (decode(save(alpha), section()) == pixels).all(), "transparency is dropped"
    gray = Image.fromarray(pixels[..., 0])
    faint = gray.copy()
    faint.putalpha(Image.fromarray(noise(8, 8, seed=1)))
    assert (decode(save(faint), section()) == pixels[..., :1]).all()
    palette = image.quantize(16)
    plain = np.asarray(palette.convert("RGB"))
    assert (decode(save(palette), section()) == plain).all()
    assert (decode(save(palette, transparency=bytes(range(0, 160, 10))), section()) == plain).all()
    assert (decode(save(image.convert("CMYK"), "TIFF"), section()) == pixels).all()
    bits = image.convert("1")
    assert (decode(save(bits), section()) == np.asarray(bits.convert("L"))[..., None]).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_keeps_its_high_byte(form: str, section: Any) -> None:
    deep = noise(8, 8, kind=np.uint16)
    got = decode(save(Image.fromarray(deep), form), section(size=(1, 8, 8)))
    assert (got[..., 0] == deep >> 8).all()
    assert (decode(save(Image.fromarray(deep), form), section()) == (deep >> 8)[..., None]).all()


def test_jpeg_and_webp(section: Any) -> None:
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, 2)
    for form in ("JPEG", "WEBP"):
        data = save(Image.fromarray(smooth), form, quality=95)
        got = decode(data, section(size=(3, 64, 64)))
        assert (got == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
        assert np.abs(got.astype(int) - smooth).max() < 12


@pytest.mark.parametrize(
    ("size", "options", "came", "advice"),
    [
        (
            (6, 9),
            {},
            "6 x 9 (H x W) after no resize and no crop",
            "add resize = 8 and crop = 8 to [input] of the card",
        ),
        ((6, 9), {"resize": 8}, "8 x 12 (H x W) after resize 8", "add resize = 8 and crop = 8"),
        (
            (6, 9),
            {"size": (3, 8, 4)},
            "6 x 9 (H x W) after no resize",
            "8 x 4; add resize = [8, 4] to [input]",
        ),
    ],
)
def test_wrong_size(
    size: tuple[int, int], options: dict[str, Any], came: str, advice: str, section: Any
) -> None:
    with pytest.raises(DataError) as caught:
        decode(save(Image.fromarray(noise(*size, 3))), section(**options), "cat/1.png")
    assert not isinstance(caught.value, BrokenImageError), (
        "a wrong size stops the run: it is the card that is wrong"
    )
    assert str(caught.value).startswith(f"cat/1.png: is {came}") and advice in str(caught.value)


def broken(data: bytes, section: Any) -> str:
    with pytest.raises(BrokenImageError) as caught:
        decode(data, section(crop=8), "cat/1.jpg")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_images(section: Any) -> None:
    jpeg = save(Image.fromarray(noise(64, 64, 3)), "JPEG")
    png = save(Image.fromarray(noise(64, 64, 3)))
    assert broken(jpeg[: len(jpeg) // 2], section).startswith("cat/1.jpg: image file is truncated (")
    assert "truncated" in broken(png[: len(png) // 2], section)
    assert broken(b"", section) == "cat/1.jpg: is empty; known are JPEG, PNG, BMP, PPM, WEBP, TIFF"
    assert broken(b"GIF89a, not allowed", section).startswith(
        "cat/1.jpg: is not an image of a known format; known"
    )
    assert "floating point pixels" in broken(
        save(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), section
    )


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_decompression_bombs_are_broken_images(section: Any) -> None:
    assert "could be decompression bomb DOS attack" in broken(png_of_claimed_size(60000, 60000), section)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        message = broken(png_of_claimed_size(10000, 10000), section)
    assert message == "cat/1.jpg: has 10000 x 10000 pixels; 89478485 in all are allowed"
    assert Image.MAX_IMAGE_PIXELS == preprocess.MAX_PIXELS


@given(form=st.sampled_from(["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM"]), data=st.data())
def test_damaged_bytes_are_a_broken_image_or_pixels(form: str, data: st.DataObject, section: Any) -> None:
    whole = bytearray(save(Image.fromarray(noise(8, 8, 3)), form))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode(bytes(whole), section(crop=8)).shape == (8, 8, 3)
        except BrokenImageError as reason:
            assert str(reason).startswith("image: ")
