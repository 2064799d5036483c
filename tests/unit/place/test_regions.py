from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.regions import Region, regions_of
from fewbit.place.targets import TARGETS
from fewbit.recipe import read_recipe, run_recipe
from networks import NETWORKS, make_context, make_net
from small_models import body, captured
from zoo import zoo

ENGINES = tuple(TARGETS)


def folded(net: Net) -> Net:
    return run_recipe(read_recipe("float32"), net, make_context())[0]


def cut(net: Net, engine: str = "onnxruntime") -> dict[str, tuple[str, ...]]:
    return {region.name: region.layers for region in regions_of(net, TARGETS[engine])}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_is_in_one_region_in_the_order_in_which_it_runs(name: str, engine: str) -> None:
    net = folded(make_net(name))
    order = [layer.name for layer in net.layers()]
    regions = regions_of(net, TARGETS[engine])
    assert sorted(name for region in regions for name in region.layers) == sorted(order)
    for region in regions:
        assert region.name in region.layers
        assert list(region.layers) == sorted(region.layers, key=order.index)
    names = [region.name for region in regions]
    assert names == sorted(names, key=order.index) and len(set(names)) == len(names)


@pytest.mark.parametrize("engine", ENGINES)
def test_activation_residual_sum_and_pool_go_with_the_layer_before(engine: str) -> None:
    assert cut(folded(make_net("residual")), engine) == {
        "stem": ("stem", "relu"),
        "conv1": ("conv1", "relu_1"),
        "conv2": ("conv2", "add", "relu_2", "mean", "mean_flatten"),
        "fc": ("fc",),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_squeeze_and_excite_stays_with_the_layer_that_it_gates(engine: str) -> None:
    found = cut(folded(make_net("gated")), engine)
    gate = ("adaptive_avg_pool2d", "squeeze", "relu", "excite", "sigmoid")
    assert found["a"] == ("a", "silu", *gate, "mul")
    assert list(found) == ["a", "b", "fc"]


def test_branches_end_where_the_last_of_them_runs() -> None:
    found = cut(folded(make_net("branches")))
    assert list(found) == ["a", "b", "c", "d", "fc"]
    assert found["a"] == ("a", "relu.0") and found["c"] == ("c", "relu_1")
    assert found["b"][:3] == ("b", "relu.1", "cat")
    assert found["d"] == ("d", "relu_2", "max_pool2d", "cat_1", "mean", "mean_flatten")


def test_a_sum_goes_with_the_convolution_whose_kernel_adds() -> None:
    model = body(
        lambda self, x: torch.relu(self.main(x) + self.short(x)),
        main=nn.Conv2d(6, 6, 3, padding=1),
        short=nn.Conv2d(6, 6, 1),
    )
    net = captured(model)
    names = {layer.kind: layer.name for layer in net.layers()}
    openvino, onnxruntime = (cut(net, engine) for engine in ("openvino", "onnxruntime"))
    assert names["Add"] in openvino["main"] and names["Relu"] in openvino["main"]
    assert openvino["short"] == ("short",)
    assert names["Add"] in onnxruntime["short"] and onnxruntime["main"] == ("main",)


def test_the_nine_gates_of_mobilenet_v3_are_no_regions() -> None:
    net = capture(zoo("mobilenet_v3_small"), "net", (3, 224, 224))
    matrices = [layer.name for layer in net.layers() if layer.kind in ("Conv", "Linear")]
    found = cut(net, "openvino")
    assert (len(matrices), len(found)) == (54, 36)
    assert set(matrices) - set(found) == {name for name in matrices if name.endswith((".fc1", ".fc2"))}
    assert "features.1.block.1.mul" in found["features.1.block.0.0"]


def test_a_gate_without_a_pool_is_no_squeeze_and_excite() -> None:
    model = body(lambda self, x: x * torch.sigmoid(self.gate(x)), gate=nn.Conv2d(6, 6, 1))
    found = cut(captured(model))
    assert list(found) == ["stem", "gate", "head"]
    assert "gate" not in found["stem"]


def test_a_product_of_a_pooled_tensor_and_another_branch_is_none_either() -> None:
    model = body(
        lambda self, x: self.main(x) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))),
        main=nn.Conv2d(6, 6, 1),
        gate=nn.Conv2d(6, 6, 1),
    )
    assert list(cut(captured(model))) == ["stem", "main", "gate", "head"]


def test_what_stands_before_all_layers_belongs_to_the_first_reader() -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten())
    found = cut(capture(model.eval(), "net", (3, 7, 7)))
    assert found == {"2": ("0", "1", "2", "3")}


def test_a_network_without_weights_is_one_region() -> None:
    net = capture(nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), "net", (3, 2, 2))
    assert regions_of(net, TARGETS["openvino"]) == (Region("0", ("0", "1")),)


def test_the_network_stays() -> None:
    net = folded(make_net("gated"))
    before = repr(net)
    regions_of(net, TARGETS["openvino"])
    assert repr(net) == before
