"""`kill -9` in the middle of a reconstruction: it goes on at the unit it was on, and to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from small_search import make_card, make_images

RECIPE = """name = "learned"
[scheme.weights]
bits = 4
symmetric = true
signed = true
granularity = "channel"
[[steps]]
use = "canonical"
[[steps]]
use = "fold_bn"
[[steps]]
use = "place"
[[steps]]
use = "calibrate"
[[steps]]
use = "comq"
[[steps]]
use = "qdrop"
iterations = 120
group = 1
batch = 16
"""
UNITS = {"comq": 4, "qdrop": 4}


class Job(NamedTuple):
    """How a quantization is started."""

    folder: Path
    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    def units(self) -> dict[str, bytes]:
        """Return what the finished units' files hold, by step and file."""
        found = {}
        for path in sorted(self.partial.rglob("unit-*.safetensors")):
            found[f"{path.parent.name.partition('-')[0]}/{path.name}"] = path.read_bytes()
        return found

    def start(self) -> subprocess.Popen[str]:
        arguments = ["quantize", self.folder / "tiny.toml", "--recipe", self.folder / "learned.toml"]
        arguments += ["--data", self.folder / "images", "--out", self.out, "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "fewbit", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def finish(self) -> tuple[dict[str, str], str]:
        """Run to the end; return what each step said, and stderr."""
        with self.start() as process:
            out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        steps: list[dict[str, Any]] = json.loads(out)["steps"]
        return {step["step"]: "; ".join(step["notes"]) for step in steps}, err

    def kill_at(self, units: int, later_s: float) -> dict[str, bytes]:
        """Start, kill a moment after so many units are done; return what they left."""
        with self.start() as process:
            while len(self.units()) < units:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.005)
            time.sleep(later_s)
            assert process.poll() is None, "it had ended before it was killed"
            os.kill(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
        return self.units()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_card(root)
    make_images(root / "images", images=96)
    (root / "learned.toml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def calm(folder: Path) -> bytes:
    """The file of a run that nothing disturbed."""
    job = Job(folder, folder / "calm.onnx")
    notes, err = job.finish()
    assert "stopped" not in err and not any("stopped" in note for note in notes.values())
    assert not job.partial.exists()
    return job.out.read_bytes()


@pytest.mark.parametrize("kills", [(5,), (2, 6, 7)], ids=["one kill", "three kills"])
def test_it_goes_on_at_the_unit_that_it_was_on(
    folder: Path, calm: bytes, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    job = Job(folder, tmp_path / "net.onnx")
    rng = np.random.default_rng(len(kills))
    done: dict[str, bytes] = {}
    for units in kills:
        left = job.kill_at(units, float(rng.uniform(0, 0.1)))
        # What was there before the kill is there after it, untouched: it was not solved again.
        assert len(left) >= units and {name: left[name] for name in done} == done
        assert not job.out.exists()
        stray = {path.name for path in job.partial.rglob("*") if path.is_file()}
        assert all(name.startswith(("unit-", ".unit-")) for name in stray)
        done = left
    notes, err = job.finish()
    assert f"{job.partial}: a run was stopped; what it had done is taken up where it fits" in err
    for step, units in UNITS.items():
        before = sum(name.startswith(step) for name in done)
        assert (f"{before} of {units} units had been done when a run was stopped" in notes[step]) == (
            before > 0
        )
    assert job.out.read_bytes() == calm
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_another_seed_begins_anew(folder: Path, calm: bytes, tmp_path: Path) -> None:
    job = Job(folder, tmp_path / "net.onnx")
    job.kill_at(3, 0.0)
    other = job.folder / "other.toml"
    other.write_text((folder / "learned.toml").read_text().replace("iterations = 120", "iterations = 4"))
    command = [sys.executable, "-m", "fewbit", "quantize", str(folder / "tiny.toml"), "--seed", "1"]
    command += ["--recipe", str(other), "--data", str(folder / "images"), "--out", str(job.out), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    notes = [note for step in json.loads(said.stdout)["steps"] for note in step["notes"]]
    assert not any("stopped" in note for note in notes)
    assert job.out.read_bytes() != calm and not job.partial.exists()
