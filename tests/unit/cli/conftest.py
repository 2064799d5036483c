"""A tiny network with its card and images, made once for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_search
from command import Fewbit, command
from fewbit.cli.main import main


@pytest.fixture
def fewbit(capsys: pytest.CaptureFixture[str]) -> Fewbit:
    """Run the command in this process."""
    return command(capsys)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml, other.toml, tiny.safetensors and images/."""
    folder = tmp_path_factory.mktemp("job")
    small_search.make_card(folder)
    small_search.make_card(folder, "other", 12)
    small_search.make_images(folder / "images", images=150)
    return folder


@pytest.fixture(scope="session")
def exported(job: Path) -> Path:
    """The tiny network in int8, calibrated with 48 of the images."""
    path = job / "int8.onnx"
    files = ["--data", str(job / "images"), "--out", str(path)]
    code = main(["quantize", str(job / "tiny.toml"), *files, "--calibration-images", "48"])
    assert code == 0
    return path
