from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit.improve.units import Unit, split_into_blocks, split_into_layers, whole_network
from fewbit.net import Net, name_of
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import Scheme
from networks import NETWORKS, make_context, make_images, make_net
from small_models import SIZE, Body, body, captured

STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"}, {"use": "calibrate"})
SPLITS: dict[str, Callable[[Net], list[Unit]]] = {
    "layers": split_into_layers,
    "blocks": split_into_blocks,
    "blocks of one": lambda net: split_into_blocks(net, 1),
    "blocks of three": lambda net: split_into_blocks(net, 3),
    "whole": whole_network,
}


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


def dense(layers: int) -> Body:
    """Every layer reads all before it, as in DenseNet."""

    def forward(self: Body, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return torch.cat(features, 1)

    return body(forward, layers=nn.ModuleList([conv(6 + 2 * i, 2) for i in range(layers)]))


def residual_with_downsampling() -> Body:
    def forward(self: Body, x: Tensor) -> Tensor:
        x = F.relu(x)
        x = F.relu(self.short(x) + self.two(F.relu(self.one(x))))
        return F.relu(x + self.four(F.relu(self.three(x))))

    parts = {"one": conv(6, 8, 2), "two": conv(8, 8), "short": conv(6, 8, 2, 1)}
    return body(forward, **parts, three=conv(8, 8), four=conv(8, 8))


def inverted_residuals() -> Body:
    def forward(self: Body, x: Tensor) -> Tensor:
        for up, each, down in zip(self.ups, self.eaches, self.downs, strict=True):
            x = x + down(F.relu6(each(F.relu6(up(x)))))
        return x

    return body(
        forward,
        ups=nn.ModuleList([conv(6, 12, 1, 1) for _ in range(2)]),
        eaches=nn.ModuleList([nn.Conv2d(12, 12, 3, padding=1, groups=12) for _ in range(2)]),
        downs=nn.ModuleList([conv(12, 6, 1, 1) for _ in range(2)]),
    )


def inception() -> Body:
    def forward(self: Body, x: Tensor) -> Tensor:
        x = F.relu(x)
        for a, b, c, d in zip(self.a, self.b, self.c, self.d, strict=True):
            pooled = d(F.max_pool2d(x, 3, 1, 1))
            x = torch.cat((F.relu(a(x)), F.relu(c(F.relu(b(x)))), F.relu(pooled)), 1)
        return x

    def many(kernel: int, inputs: int = 6) -> nn.ModuleList:
        return nn.ModuleList([conv(inputs, 2, 1, kernel) for _ in range(2)])

    return body(forward, a=many(1), b=many(1), c=many(3, 2), d=many(1))


def in_a_row(layers: int) -> Body:
    def forward(self: Body, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(F.relu(x))
        return x

    return body(forward, layers=nn.ModuleList([conv(6, 6) for _ in range(layers)]))


BODIES: dict[str, Callable[[], Body]] = {
    "dense": lambda: dense(4),
    "dense of many": lambda: dense(18),
    "downsampling": residual_with_downsampling,
    "inverted": inverted_residuals,
    "inception": inception,
    "row": lambda: in_a_row(7),
}


def placed(name: str, engine: str = "onnxruntime", mode: str = "static") -> Net:
    recipe = Recipe(name="test", scheme=Scheme.from_data({"mode": mode}), steps=STEPS)
    if name in NETWORKS:
        return run_recipe(recipe, make_net(name), make_context(engine))[0]
    images = torch.randn((4, *SIZE), generator=torch.Generator().manual_seed(1))
    return run_recipe(recipe, captured(BODIES[name]()), make_context(engine, images))[0]


def names(units: list[Unit]) -> list[list[str]]:
    return [[name_of(node) for node in unit.layers] for unit in units]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [*NETWORKS, *BODIES])
def test_units_hold_every_node_once_and_in_order(name: str, split: str) -> None:
    net = placed(name)
    units = SPLITS[split](net)
    every = [node for node in net.graph.graph.nodes if node.op == "call_module"]
    assert [node for unit in units for node in unit.nodes] == every
    assert all(unit.nodes for unit in units)
    matrices = [layer.node for layer in net.layers() if layer.kind in ("Conv", "Linear")]
    assert [node for unit in units for node in unit.layers] == matrices
    assert all(unit.layers for unit in units)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [*NETWORKS, *BODIES])
def test_units_run_one_after_the_other_give_what_the_network_gives(
    name: str, split: str, engine: str
) -> None:
    net = placed(name, engine)
    images = make_images(2) if name in NETWORKS else torch.randn((2, *SIZE))
    expected = net(images)
    known: dict[fx.Node, Tensor] = {n: images for n in net.graph.graph.nodes if n.op == "placeholder"}
    for unit in SPLITS[split](net):
        values = {node: known[node] for node in unit.inputs}
        for node in unit.nodes:
            module = net.graph.get_submodule(str(node.target))
            values[node] = module(*[values[source] for source in node.all_input_nodes])
        known |= {node: values[node] for node in unit.outputs}
    assert torch.equal(known[unit.outputs[-1]], expected)


@pytest.mark.parametrize("split", ["layers", "blocks", "blocks of one", "blocks of three"])
@pytest.mark.parametrize("name", [*NETWORKS, *BODIES])
def test_a_unit_begins_neither_with_an_activation_nor_with_its_quantizer(name: str, split: str) -> None:
    net = placed(name)
    for unit in SPLITS[split](net)[1:]:
        first = net.layer(name_of(unit.nodes[0]))
        assert not isinstance(first.module, Quantizer | DynamicQuantizer)
        assert first.kind not in ("Relu", "Clip", "HardSwish")


def test_blocks_of_the_small_networks() -> None:
    assert names(split_into_blocks(placed("residual"))) == [["stem"], ["conv1", "conv2"], ["fc"]]
    assert names(split_into_blocks(placed("depthwise"))) == [["stem"], ["dw", "pw"], ["fc"]]
    assert names(split_into_blocks(placed("branches"))) == [["a", "b"], ["c", "d"], ["fc"]]
    assert names(split_into_blocks(placed("gated"))) == [["a"], ["squeeze", "excite"], ["b"], ["fc"]]


def test_residual_blocks_with_their_downsampling() -> None:
    blocks = split_into_blocks(placed("downsampling"))
    found = [sorted(block) for block in names(blocks)]
    assert found == [["stem"], ["one", "short", "two"], ["four", "three"], ["head"]]
    assert all(len(block.inputs) == len(block.outputs) == 1 for block in blocks)


def test_inverted_residuals() -> None:
    found = names(split_into_blocks(placed("inverted")))
    blocks = [[f"ups.{i}", f"eaches.{i}", f"downs.{i}"] for i in (0, 1)]
    assert found == [["stem"], *blocks, ["head"]]


def test_inception_modules() -> None:
    blocks = split_into_blocks(placed("inception"))
    modules = [{f"{part}.{i}" for part in "abcd"} for i in (0, 1)]
    assert [set(block) for block in names(blocks)] == [{"stem"}, *modules, {"head"}]
    assert all(len(block.inputs) == len(block.outputs) == 1 for block in blocks)


def test_a_short_dense_block_is_one_unit_and_a_long_one_falls_into_its_layers() -> None:
    assert names(split_into_blocks(placed("dense")))[1] == [f"layers.{i}" for i in range(4)]
    found = names(split_into_blocks(placed("dense of many"), 1))
    assert found == [["stem"], *([f"layers.{i}"] for i in range(18)), ["head"]]


@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_layers_in_a_row_stand_together_and_the_ends_alone(group: int) -> None:
    found = names(split_into_blocks(placed("row"), group))
    assert found[0] == ["stem"] and found[-1] == ["head"]
    inner = [f"layers.{i}" for i in range(7)]
    assert found[1:-1] == [inner[i : i + group] for i in range(0, 7, group)]


def test_layers_are_units_with_what_follows_them() -> None:
    net = placed("residual")
    units = split_into_layers(net)
    assert names(units) == [["stem"], ["conv1"], ["conv2"], ["fc"]]
    after = [name_of(node) for node in units[2].nodes]
    assert after.index("conv2") < after.index("add") < after.index("relu_2")


def test_a_unit_is_named_after_its_ends() -> None:
    units = split_into_blocks(placed("residual"))
    assert [unit.name for unit in units] == ["stem", "conv1 to conv2", "fc"]


@pytest.mark.parametrize("mode", ["dynamic", "weights_only"])
def test_units_without_fixed_activation_grids(mode: str) -> None:
    net = placed("residual", mode=mode)
    assert names(split_into_blocks(net)) == [["stem"], ["conv1", "conv2"], ["fc"]]


def test_a_network_of_one_layer_is_one_unit() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    net, _ = run_recipe(
        Recipe(name="test", steps=STEPS), captured(model), make_context(images=torch.randn(4, *SIZE))
    )
    for split in SPLITS.values():
        assert len(split(net)) == 1


def test_layers_left_in_float_belong_to_a_unit_and_are_none_of_its_layers() -> None:
    scheme = Scheme.from_data({"rules": [{"match": "conv1", "keep_float": True}]})
    net, _ = run_recipe(Recipe(name="test", scheme=scheme, steps=STEPS), make_net("residual"), make_context())
    units = split_into_layers(net)
    assert names(units) == [["stem"], ["conv2"], ["fc"]]
    assert [n for u in units for n in u.nodes] == [n for n in net.graph.graph.nodes if n.op == "call_module"]
