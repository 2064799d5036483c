from __future__ import annotations

import pytest
import torch

import broken_networks as broken
from fewbit.doctor.decibels import divergence, ratio_db
from fewbit.doctor.diagnose import split
from fewbit.doctor.exam import Exam
from fewbit.doctor.records import LayerExam
from fewbit.net import Net
from fewbit.recipe import read_recipe, run_recipe
from networks import make_context, make_images, make_net


def both(net: Net, recipe: str = "int8", images: torch.Tensor | None = None) -> tuple[Net, Net]:
    first, rest = split(read_recipe(recipe))
    prepared, _ = run_recipe(first, net, make_context(images=images))
    return prepared, run_recipe(rest, prepared, make_context(images=images))[0]


def by_name(exam: Exam) -> dict[str, LayerExam]:
    return {layer.name: layer for layer in exam.records()}


@pytest.mark.parametrize("name", ["residual", "depthwise", "branches", "gated"])
def test_alone_is_no_noisier_than_with_all_and_every_layer_is_there(name: str) -> None:
    prepared, made = both(make_net(name))
    found = Exam(prepared, made, make_images(8).split(3)).records()
    names = [layer.name for layer in made.layers() if "quantizers" not in layer.name]
    assert [layer.name for layer in found] == ["input", *names]
    for layer in found:
        if layer.kind == "Conv" and layer.sqnr_db is not None and layer.activation_bits is not None:
            assert layer.sqnr_alone_db is not None and layer.sqnr_alone_db >= layer.sqnr_db - 1
        if layer.weight_bits is not None:
            assert layer.weight_sqnr_db is not None and 30 < layer.weight_sqnr_db < 60
            assert layer.kl is not None and layer.kl >= 0


def test_the_sensitivity_of_a_layer_is_the_harm_of_it_alone() -> None:
    patient = broken.joined_branches()
    prepared, made = both(patient.net, images=patient.pixels[:32])
    exam = Exam(prepared, made, patient.pixels[64:96].split(10))
    found = by_name(exam)
    for name in ("cat", "after", "fc", "input"):
        assert exam.harm([name]) == pytest.approx(found[name].kl, abs=1e-9)
    with torch.no_grad():
        whole = divergence(prepared(patient.pixels[64:96]), made(patient.pixels[64:96])) / 32
    assert exam.whole() == pytest.approx(whole, rel=1e-5)
    assert exam.images == 32


def test_batches_add_up() -> None:
    prepared, made = both(make_net("residual"))
    images = make_images(8)
    whole, parts = (by_name(Exam(prepared, made, images.split(count))) for count in (8, 3))
    for name, layer in whole.items():
        for key in ("sqnr_alone_db", "kl", "kurtosis", "tail_ratio", "clip_share", "shift", "shift_share"):
            expected, got = getattr(layer, key), getattr(parts[name], key)
            assert (got is None) == (expected is None), (name, key)
            if expected is not None:
                assert got == pytest.approx(expected, rel=1e-3, abs=1e-6), (name, key)


def test_depthwise_layers_and_grids_are_told() -> None:
    prepared, made = both(make_net("depthwise"), "int8-per-tensor")
    found = by_name(Exam(prepared, made, [make_images(4)]))
    assert [name for name, layer in found.items() if layer.depthwise] == ["dw"]
    assert found["dw"].per_channel is False and found["dw"].weight_high == -found["dw"].weight_low  # type: ignore[operator]
    assert found["input"].kind == "Input" and found["input"].activations is not None


def test_inputs_that_share_a_grid() -> None:
    patient = broken.joined_branches(100.0)
    prepared, made = both(patient.net, images=patient.pixels[:32])
    wide, narrow = by_name(Exam(prepared, made, [patient.pixels[:32]]))["cat"].inputs
    assert wide.codes == pytest.approx(256, abs=1)
    assert narrow.codes == pytest.approx(1 + 255 * narrow.high / wide.high, rel=1e-3) and narrow.codes < 5
    assert wide.sqnr_db > 35 > 10 > narrow.sqnr_db


def test_an_equalized_network_is_compared_with_itself_scaled() -> None:
    """Against the network before equalization every output would differ by its channel's factor."""
    patient = broken.spread_channels()
    prepared, made = both(patient.net, "int8-per-tensor-equalized", patient.pixels[:32])
    found = by_name(Exam(prepared, made, [patient.pixels[:32]]))
    assert found["dw"].sqnr_db is not None and found["dw"].sqnr_db > 25


@pytest.mark.parametrize(("signal", "noise", "decibel"), [(1, 0, 200.0), (0, 1, -200.0), (1, 0.1, 10.0)])
def test_decibels(signal: float, noise: float, decibel: float) -> None:
    assert ratio_db(signal, noise) == pytest.approx(decibel)


def test_divergence_by_hand() -> None:
    """KL((0.5, 0.5) || (0.8, 0.2)) = 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2)."""
    exact, other = torch.zeros(2, 2), torch.log(torch.tensor([[0.8, 0.2], [0.5, 0.5]]))
    assert divergence(exact, other) == pytest.approx(0.2231435513, rel=1e-5)
