from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbit.load.capture import capture
from fewbit.recipe import read_recipe, run_recipe
from fewbit.sensitivity.one_region import Walk
from fewbit.sensitivity.records import LayerRecord
from fewbit.sensitivity.score import ask
from fewbit.sensitivity.sqnr import SQNR, Signal, histogram, layer_records, noise_power, range_ratio
from networks import NETWORKS, make_context, make_images, make_net, quantize
from scored import WIDTHS, folded, pictures, regions, tiny


def records(name: str, recipe: str = "int8", engine: str = "onnxruntime") -> dict[str, LayerRecord]:
    found = layer_records(make_net(name), quantize(name, recipe, engine), make_images(8).split(4))
    return {record.name: record for record in found}


class Scale(nn.Module):
    """One convolution of one channel and one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.conv.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


def test_hand_example() -> None:
    """y = (2, 4, -6, 8), y' = (2.1, 4.2, -6.3, 8.4): 10 log10(120 / 0.3) = 26.02 dB."""
    exact = capture(Scale(2.0).eval(), "exact", (1, 2, 2))
    rounded = capture(Scale(2.1).eval(), "rounded", (1, 2, 2))
    x = torch.tensor([1.0, 2, -3, 4]).reshape(1, 1, 2, 2)
    (conv, flatten) = layer_records(exact, rounded, [x])
    assert conv.sqnr_db == pytest.approx(10 * math.log10(120 / 0.3), abs=1e-3) == 26.021
    assert (conv.name, conv.kind, conv.precision) == ("conv", "Conv", "float32")
    assert flatten.sqnr_db == conv.sqnr_db
    assert conv.activations is not None
    assert (conv.activations.low, conv.activations.high) == (-6.0, 8.0)


def test_batches_add_up() -> None:
    exact, rounded = (capture(Scale(w).eval(), "net", (1, 2, 2)) for w in (2.0, 2.1))
    x = torch.randn((6, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    whole = layer_records(exact, rounded, [x])[0].sqnr_db
    assert layer_records(exact, rounded, x.split(1))[0].sqnr_db == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_network_against_itself_is_200_db(name: str) -> None:
    made, _ = run_recipe(read_recipe("float32"), make_net(name), make_context())
    found = layer_records(made, made, make_images(4).split(2))
    assert [record.sqnr_db for record in found] == [200.0] * len(found)
    captured = layer_records(make_net(name), made, make_images(4).split(2))
    assert all(record.sqnr_db is not None and record.sqnr_db > 90 for record in captured)


@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic", "int8-weights-only"])
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_in_a_sane_range_and_every_layer_has_a_record(name: str, recipe: str) -> None:
    found = records(name, recipe)
    layers = [layer.name for layer in quantize(name, recipe).layers() if "quantizers" not in layer.name]
    assert list(found) == layers
    measured = [record.sqnr_db for record in found.values() if record.sqnr_db is not None]
    assert len(measured) >= 0.8 * len(layers)
    assert all(15 < db < 90 for db in measured)


def test_fewer_bits_have_less() -> None:
    plain = read_recipe("int8")
    scheme = plain.scheme.from_data({"weights": {"bits": 4, "symmetric": True, "granularity": "channel"}})
    coarse = quantize("residual", plain.model_copy(update={"scheme": scheme}))
    fine = records("residual")
    for record in layer_records(make_net("residual"), coarse, make_images(8).split(4)):
        if record.kind in ("Conv", "Linear"):
            assert record.sqnr_db is not None and record.sqnr_db < fine[record.name].sqnr_db - 8  # type: ignore[operator]


def test_a_quantized_output_is_compared_behind_its_quantizer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 14), nn.Flatten())
    torch.manual_seed(0)
    net = capture(model.eval(), "net", (3, 16, 16))
    plain = read_recipe("int8")
    made, _ = run_recipe(
        plain.model_copy(update={"scheme": plain.scheme.from_data({"activations": {"bits": 3}})}),
        net,
        make_context(),
    )
    images = make_images(4)
    found = {record.name: record for record in layer_records(net, made, [images])}
    with torch.no_grad():
        exact = model[1](model[0](images))
        grids = made.graph.quantizers
        rounded = grids.get_submodule("_1")(model[1](made.graph.get_submodule("0")(grids.input_1(images))))  # type: ignore[operator, union-attr]
    noise = float((exact - rounded).double().square().sum())
    expected = 10 * math.log10(float(exact.double().square().sum()) / noise)
    assert found["1"].sqnr_db == pytest.approx(expected, abs=0.01)


def test_what_is_kept_of_a_layer() -> None:
    found = records("residual")
    conv, relu, add = found["conv1"], found["relu"], found["add"]
    assert (conv.precision, conv.weight_bits, conv.kind) == ("int8", 8, "Conv")
    assert (relu.precision, relu.activation_bits) == ("fused", 8)
    assert relu.low == 0.0 and relu.high is not None and relu.high > 1
    assert conv.weights is not None and sum(conv.weights.counts) == 16 * 16 * 9
    assert conv.weight_range_ratio is not None and conv.weight_range_ratio > 1
    assert add.weights is None and add.weight_bits is None
    assert add.activations is not None and sum(add.activations.counts) == 8 * 16 * 16 * 16


def test_precision_says_what_runs_in_integers() -> None:
    kept = quantize("residual", read_recipe("int8").with_float(["conv1"]))
    by_name = {r.name: r for r in layer_records(make_net("residual"), kept, make_images(4).split(4))}
    assert by_name["conv1"].precision == "float32" and by_name["conv1"].weight_bits is None
    assert by_name["conv2"].precision == "int8"
    assert {r.precision for r in records("residual", "int8-weights-only").values()} == {"float32"}
    assert records("residual", "int8-weights-only")["conv1"].weight_bits == 8
    assert records("residual", "int8-dynamic")["conv1"].precision == "int8"


def test_without_images_only_weights_are_known() -> None:
    found = layer_records(make_net("residual"), make_net("residual"), ())
    assert all(record.sqnr_db is None and record.activations is None for record in found)
    assert any(record.weights is not None for record in found)
    assert {record.precision for record in found} == {"float32"}


def test_both_networks_stay_as_they_are() -> None:
    float_net, net = make_net("depthwise").train(), quantize("depthwise")
    before = [{k: v.clone() for k, v in one.graph.state_dict().items()} for one in (float_net, net)]
    layer_records(float_net, net, make_images(4).split(2))
    for one, state in zip((float_net, net), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in one.graph.state_dict().items())
    assert float_net.graph.training


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200))
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    found = histogram(torch.tensor(values))
    assert sum(found.counts) == len(values)
    assert found.low == min(values) and found.high >= max(values)


def test_a_histogram_of_one_value_and_of_known_ones() -> None:
    assert sum(histogram(torch.zeros(7)).counts) == 7
    found = histogram(torch.tensor([0.0, 0.1, 64.0]))
    assert (found.low, found.high, found.counts[0], found.counts[-1]) == (0.0, 64.0, 2, 1)


@pytest.mark.parametrize("recipe", ["int8-equalized", "int8-per-tensor-equalized"])
def test_an_equalized_network_is_compared_with_itself_scaled(recipe: str) -> None:
    """Its outputs differ from the captured network's by the factor of each channel, which is no noise."""
    found = records("residual", recipe)
    assert all(record.sqnr_db is None or record.sqnr_db > 20 for record in found.values())
    first = read_recipe(recipe)
    place = next(i for i, step in enumerate(first.steps) if step["use"] == "place")
    prepared, _ = run_recipe(
        first.model_copy(update={"steps": first.steps[:place]}), make_net("residual"), make_context()
    )
    made = quantize("residual", recipe)
    given = {r.name: r.sqnr_db for r in layer_records(prepared, made, make_images(8).split(4))}
    assert given["conv1"] == pytest.approx(found["conv1"].sqnr_db, abs=1.5)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_sum_with_its_activation_runs_in_integers(engine: str) -> None:
    found = records("residual", engine=engine)
    assert (found["add"].precision, found["relu_2"].precision) == ("int8", "fused")


def test_range_ratio_leaves_dead_channels_out() -> None:
    weight = torch.tensor([[1.0, -4.0], [0.5, 0.25], [0.0, 0.0], [3e-6, -2e-6]])
    assert range_ratio(weight) == 8.0
    assert range_ratio(torch.zeros(3, 2)) == 1.0


def test_the_worked_share_of_noise() -> None:
    """z = (2, 1, -1), z' = (1.8, 1.3, -1.1): mean squared error 0.0466667, 16.3202 dB."""
    exact, found = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[1.8, 1.3, -1.1]])
    noise = noise_power(exact, found)
    assert noise / 3 == pytest.approx(0.0466667, rel=1e-5)
    assert -10 * math.log10(noise / 6) == pytest.approx(16.3202, rel=1e-5)


def test_a_region_costs_the_noise_in_the_logits_as_a_share_of_their_power() -> None:
    net, images = folded("residual"), make_images(6)
    found = SQNR().score(net, [(part, None) for part in images.split(4)], regions(net), WIDTHS)
    question = ask("SQNR", net, [(images, None)], regions(net), WIDTHS)
    for one in Walk(question, SQNR()).run():
        expected = float((one.exact - one.found).square().sum() / one.exact.square().sum())
        row = found.losses[question.regions[one.place[0]].name]
        assert row[one.place[1]] == pytest.approx(expected, rel=1e-4)
    assert found.unit == "noise / signal"


def test_logits_of_zero_have_a_share_all_the_same() -> None:
    net = tiny(nn.Flatten(), nn.Linear(9, 3))
    with torch.no_grad():
        net.layer("1").module.weight.zero_()  # type: ignore[operator,union-attr]
        net.layer("1").module.bias.zero_()  # type: ignore[operator,union-attr]
    found = SQNR().score(net, [(pictures(net, 2), None)], regions(net), WIDTHS)
    assert found.losses == {"1": (0.0, 0.0, 0.0)}


@pytest.mark.parametrize("recipe", ["int8", "int8-percentile", "int8-equalized"])
def test_what_an_earlier_call_saw_changes_nothing(recipe: str) -> None:
    exact, images = quantize("depthwise", "float32"), make_images(8).split(4)
    signals: dict[str, Signal] = {}
    layer_records(exact, quantize("depthwise", "int8"), images, signals)
    kept = {name: (signal, signal.power) for name, signal in signals.items()}
    alone = layer_records(exact, quantize("depthwise", recipe), images)
    assert layer_records(exact, quantize("depthwise", recipe), images, signals) == alone
    assert {name: (signal, signal.power) for name, signal in signals.items()} == kept and kept


def test_the_float_network_of_records_may_be_folded_already() -> None:
    images, made = make_images(8).split(4), quantize("residual", "int8")
    exact = quantize("residual", "float32")
    assert layer_records(exact, made, images) == layer_records(make_net("residual"), made, images)


@pytest.mark.parametrize("size", [1, 65535, 65536, 200_001])
def test_noise_by_pieces_is_the_noise_of_all(size: int) -> None:
    first, second = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    whole = float((first.double() - second.double()).square().sum())
    assert noise_power(first, second) == pytest.approx(whole, rel=1e-13)
