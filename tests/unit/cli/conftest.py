"""A tiny network with its card and images, made once for all tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import small_search
from fewbit.cli.main import main


@dataclass(frozen=True)
class Said:
    """What a run of the command left."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """The JSON on stdout, which holds nothing else."""
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line on stderr."""
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err.rstrip("\n")


Fewbit = Callable[..., Said]


@pytest.fixture
def fewbit(capsys: pytest.CaptureFixture[str]) -> Fewbit:
    """Run the command in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


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
