from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibrated import calibrated, same_bits, state_of
from fewbit.errors import OutputError
from fewbit.improve.checkpoint import Checkpoint
from fewbit.improve.units import Unit, split_into_blocks
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer


def block(net: Net) -> tuple[Unit, list[Quantizer]]:
    """Return the residual block and its quantizers."""
    unit = split_into_blocks(net)[1]
    found = [net.graph.get_submodule(str(node.target)) for node in unit.nodes]
    return unit, [module for module in found if isinstance(module, Quantizer)]


def solved() -> tuple[Net, Unit, list[Quantizer]]:
    """Return a network with a block that something was done to."""
    net = calibrated()
    unit, quantizers = block(net)
    generator = torch.Generator().manual_seed(4)
    for layer in unit.layers.values():
        shape = layer.weight.shape
        layer.weight_quantizer.assign(
            torch.randint(-3, 4, shape, generator=generator).float(), layer.weight_quantizer.scale * 1.1
        )
        assert layer.bias is not None
        layer.bias = torch.nn.Parameter(layer.bias.detach() + 0.5)
    for quantizer in quantizers:
        quantizer.scale = quantizer.scale * 0.9
    return net, unit, quantizers


def written(folder: Path) -> Path:
    (path,) = (folder / "test-key").glob("*.safetensors")
    return path


def test_a_unit_comes_back_bit_for_bit_with_its_note(tmp_path: Path) -> None:
    net, *unit = solved()
    Checkpoint(tmp_path, "test", "key").save(1, *unit, "3% leant neither way")
    other = calibrated()
    again = Checkpoint(tmp_path, "test", "key")
    assert not same_bits(state_of(net), state_of(other))
    assert again.restore(1, *block(other)) and again.restored == 1
    assert same_bits(state_of(net), state_of(other))
    assert again.note(1) == "3% leant neither way" and again.note(0) == ""


def test_nothing_is_there_for_another_unit_step_or_key(tmp_path: Path) -> None:
    _, *unit = solved()
    Checkpoint(tmp_path, "test", "key").save(1, *unit, "")
    other = calibrated()
    before = state_of(other)
    assert not Checkpoint(tmp_path, "test", "key").restore(2, *block(other))
    assert not Checkpoint(tmp_path, "test", "yek").restore(1, *block(other))
    assert not Checkpoint(tmp_path, "tset", "key").restore(1, *block(other))
    assert same_bits(before, state_of(other))


def test_without_a_folder_nothing_is_kept_but_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, *unit = solved()
    checkpoint = Checkpoint(None, "test", "key")
    checkpoint.save(1, *unit, "said")
    assert checkpoint.note(1) == "said" and not checkpoint.restore(1, *unit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_file_cut_short_is_not_used(tmp_path: Path, share: float) -> None:
    _, *unit = solved()
    Checkpoint(tmp_path, "test", "key").save(1, *unit, "")
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    other = calibrated()
    before = state_of(other)
    checkpoint = Checkpoint(tmp_path, "test", "key")
    assert not checkpoint.restore(1, *block(other)) and checkpoint.restored == 0
    assert same_bits(before, state_of(other))


def test_a_file_with_one_other_bit_is_not_used(tmp_path: Path) -> None:
    _, *unit = solved()
    Checkpoint(tmp_path, "test", "key").save(1, *unit, "")
    path = written(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[-7] ^= 4
    path.write_bytes(bytes(whole))
    assert not Checkpoint(tmp_path, "test", "key").restore(1, *block(calibrated()))


def test_a_unit_solved_again_takes_the_place_of_the_spoilt_file(tmp_path: Path) -> None:
    net, *unit = solved()
    checkpoint = Checkpoint(tmp_path, "test", "key")
    checkpoint.save(1, *unit, "")
    written(tmp_path).write_bytes(b"")
    checkpoint.save(1, *unit, "")
    other = calibrated()
    assert checkpoint.restore(1, *block(other)) and same_bits(state_of(net), state_of(other))


def test_weights_with_their_channels_last(tmp_path: Path) -> None:
    net, unit, quantizers = solved()
    for layer in unit.layers.values():
        quantizer = layer.weight_quantizer
        assert quantizer.assigned is not None
        quantizer.assigned = quantizer.assigned.contiguous(memory_format=torch.channels_last)
    Checkpoint(tmp_path, "test", "key").save(1, unit, quantizers, "")
    other = calibrated()
    assert Checkpoint(tmp_path, "test", "key").restore(1, *block(other))
    assert same_bits(state_of(net), state_of(other))


def test_a_place_that_cannot_hold_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as said:
        Checkpoint(tmp_path / "file", "test", "key")
    assert str(said.value) == (
        f"{tmp_path / 'file'}: no folder can be made there (Not a directory); "
        "give a place you may write to with --out"
    )
