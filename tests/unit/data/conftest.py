"""Small images and archives made on the spot."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from PIL import Image

from fewbit.load.card import InputSection


class MakeSection(Protocol):
    def __call__(self, **changes: Any) -> InputSection: ...


def _encode(seed: int, height: int = 8, width: int = 8, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format=form)
    return held.getvalue()


def _members(classes: Mapping[str, int]) -> dict[str, bytes]:
    """`classes[name]` images a class, every one different."""
    names = [f"{name}/{place:03d}.png" for name, count in classes.items() for place in range(count)]
    return {name: _encode(seed) for seed, name in enumerate(names)}


def _write(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a folder, tar (.tar, .tar.gz, .tar.xz) or zip, by the path's suffix."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in members.items():
                packed.writestr(name, data)
    elif ".tar" in path.suffixes:
        kind = path.suffix.removeprefix(".")
        with tarfile.open(path, f"w:{'' if kind == 'tar' else kind}") as tar:
            for name, data in members.items():
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    else:
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


@pytest.fixture(scope="session")
def encode() -> Any:
    return _encode


@pytest.fixture(scope="session")
def members() -> Any:
    return _members


@pytest.fixture(scope="session")
def write() -> Any:
    return _write


@pytest.fixture(scope="session")
def section() -> MakeSection:
    def make(**changes: Any) -> InputSection:
        size = changes.get("size", (3, 8, 8))
        facts = {"size": size, "mean": (0.5,) * size[0], "std": (0.25,) * size[0]}
        return InputSection(**(facts | changes))

    return make
