from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.errors import OutputError
from fewbit.improve.activations import Activations
from fewbit.place.quantizer import Quantizer
from fewbit.spec import QuantSpec

ROOMY = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has mapped from /proc")


def quantizer_of(bits: int, symmetric: bool, low: float = -1.3, high: float = 2.1) -> Quantizer:
    quantizer = Quantizer(QuantSpec(bits=bits, symmetric=symmetric, signed=symmetric), "x")
    quantizer.set_range(low, high)
    return quantizer


def values_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(values: Tensor, limit: int, batch: int = 3, **more: Any) -> Activations:
    made = Activations(limit, more.pop("folder", None))
    for start in range(0, len(values), batch):
        made.put("x", values[start : start + batch], start, len(values), **more)
    return made


def mapped_files() -> list[str]:
    """Return the files of activations that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "activations-" in line]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([(7, 4, 3, 5), (7, 1, 2, 2), (7, 6, 1, 1), (7, 9), (7, 2, 5), (1, 3, 2, 2)]),
    st.sampled_from([0, ROOMY]),
    st.floats(0.0078125, 100, width=32),
)
def test_what_a_quantizer_gave_comes_back_bit_for_bit_from_a_byte_each(
    bits: int, symmetric: bool, shape: tuple[int, ...], limit: int, high: float
) -> None:
    quantizer = quantizer_of(bits, symmetric, -high / 3, high)
    values = quantizer(high * values_of(*shape))
    with kept(values, limit, quantizer=quantizer) as activations:
        found = activations.take("x", slice(0, len(values)))
        assert found.dtype == torch.float32 and torch.equal(found, values)
        assert activations.held_bytes == (values.numel() if limit else 0)


def test_unsigned_codes_of_a_symmetric_grid_come_back() -> None:
    quantizer = quantizer_of(8, True, 0.0, 3.0)
    values = quantizer(values_of(4, 3, 5, 5).relu())
    assert quantizer.unsigned and quantizer.qmax == 255
    with kept(values, ROOMY, quantizer=quantizer) as activations:
        assert torch.equal(activations.take("x", slice(0, 4)), values)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 7), (5, 2, 3)])
@pytest.mark.parametrize("limit", [0, ROOMY])
def test_floats_come_back_bit_for_bit_in_any_order(shape: tuple[int, ...], limit: int) -> None:
    values = values_of(*shape)
    with kept(values, limit, batch=2) as activations:
        which = torch.tensor([4, 0, 0, 3])
        assert torch.equal(activations.take("x", which), values[which])
        assert torch.equal(activations.take("x", slice(1, 3)), values[1:3])
        assert activations.held_bytes == (values.numel() * 4 if limit else 0)


def test_images_lie_with_their_channels_last() -> None:
    with kept(values_of(5, 3, 4, 6), ROOMY) as activations:
        for which in (torch.tensor([1, 4]), slice(0, 2)):
            assert activations.take("x", which).is_contiguous(memory_format=torch.channels_last)


def test_a_scale_per_channel_is_kept_in_float() -> None:
    quantizer = Quantizer(QuantSpec(symmetric=True, signed=True, granularity="channel"), "w", weight=True)
    quantizer.set_range((-1.0, -2.0), (1.0, 2.0))
    values = values_of(4, 2)
    with kept(values, ROOMY, quantizer=quantizer) as activations:
        assert torch.equal(activations.take("x", slice(0, 4)), values)


def test_what_is_dropped_gives_its_memory_back() -> None:
    values = values_of(4, 10)
    with Activations(values.nbytes) as activations:
        activations.put("a", values, 0, 4)
        assert "a" in activations and activations.held_bytes == values.nbytes
        activations.put("b", values + 1, 0, 4)  # no room beside the first
        assert activations.held_bytes == values.nbytes
        activations.drop("b")
        assert activations.held_bytes == values.nbytes
        activations.drop("a")
        activations.drop("never there")
        assert "a" not in activations and activations.held_bytes == 0
        activations.put("c", values, 0, 4)
        assert activations.held_bytes == values.nbytes
    assert activations.held_bytes == 0 and "c" not in activations


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, ROOMY])
def test_memory_stays_under_the_limit_whatever_comes(limit: int) -> None:
    with Activations(limit) as activations:
        wanted = {key: values_of(4, 5 * key + 1, 3, 3, seed=key) for key in range(8)}
        for key, values in wanted.items():
            activations.put(key, values, 0, 4)
            assert activations.held_bytes <= limit
            if key % 3 == 2:
                activations.drop(key - 1)
        for key in (0, 2, 3, 5, 6, 7):
            assert torch.equal(activations.take(key, slice(0, 4)), wanted[key])


@linux
def test_beyond_the_limit_values_lie_in_mapped_files_that_go_with_them(tmp_path: Path) -> None:
    values = values_of(4, 300)
    before = len(mapped_files())
    with Activations(0, tmp_path) as activations:
        activations.put("a", values, 0, 4)
        activations.put("b", values, 0, 4)
        lines = mapped_files()
        assert len(lines) == before + 2
        assert all(str(tmp_path) in line and line.endswith("(deleted)") for line in lines[-2:])
        assert list(tmp_path.iterdir()) == []  # nothing to leave behind, even for a process that is killed
        activations.drop("a")
        assert len(mapped_files()) == before + 1
        assert torch.equal(activations.take("b", slice(0, 4)), values)
    assert len(mapped_files()) == before


@linux
def test_the_files_go_on_an_error_too(tmp_path: Path) -> None:
    before = len(mapped_files())
    with pytest.raises(RuntimeError, match="stop"), Activations(0, tmp_path) as activations:
        activations.put("a", values_of(4, 300), 0, 4)
        raise RuntimeError("stop")
    assert len(mapped_files()) == before and list(tmp_path.iterdir()) == []


@linux
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Activations(10, tmp_path) as activations:
        with pytest.raises(OutputError) as said:
            activations.put("a", values_of(4, 300), 0, 4)
        assert str(said.value) == (
            f"{tmp_path}: no file of 4,800 bytes for activations can be made (No space left on device); "
            "make room there, or calibrate on fewer images"
        )
        assert "a" not in activations
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with (
        Activations(0, tmp_path / "none") as activations,
        pytest.raises(OutputError, match="no file of 16 bytes for activations can be made"),
    ):
        activations.put("a", values_of(2, 2), 0, 2)
