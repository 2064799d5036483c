from __future__ import annotations

import pytest
import torch

from fewbit.doctor.diagnose import split
from fewbit.doctor.partial import Partial
from fewbit.errors import RecipeError
from fewbit.net import Net
from fewbit.recipe import read_recipe, run_recipe
from networks import NETWORKS, make_context, make_images, make_net

RECIPES = ["int8", "int8-per-tensor-equalized", "int8-dynamic", "int8-weights-only"]


def both(name: str, recipe: str, engine: str = "onnxruntime") -> tuple[Net, Net]:
    first, rest = split(read_recipe(recipe))
    prepared, _ = run_recipe(first, make_net(name), make_context(engine))
    return prepared, run_recipe(rest, prepared, make_context(engine))[0]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_off_is_the_float_network_and_all_on_the_quantized_one(
    name: str, recipe: str, engine: str
) -> None:
    prepared, made = both(name, recipe, engine)
    partial, images = Partial(prepared, made), make_images(3)
    values = partial.exact(images)
    with torch.no_grad():
        torch.testing.assert_close(partial.logits(values, {}), prepared(images), rtol=1e-4, atol=1e-5)
        on = partial.changed(values, partial.every_switch())
        assert torch.equal(partial.logits(values, on), made(images))


def test_a_layer_alone_is_as_if_all_others_were_left_in_float() -> None:
    prepared, made = both("residual", "int8")
    partial, images = Partial(prepared, made), make_images(3)
    values = partial.exact(images)
    conv = next(layer for layer in partial.layers if layer.name == "conv2")
    switches = partial.switches(conv)
    assert [str(node.target) for node in switches] == ["conv2", "quantizers.conv2"]
    changed = partial.changed(values, switches)
    with torch.no_grad():
        own = made.graph.get_submodule("conv2")(values[conv.node.args[0]])
        rounded = made.graph.get_submodule("quantizers.conv2")(own)
    assert torch.equal(changed[switches[-1]], rounded)
    assert not any(layer.node in changed for layer in partial.layers if layer.name in ("conv1", "relu"))


def test_a_fused_activation_completes_a_layer_and_moved_values_have_no_switch() -> None:
    prepared, made = both("branches", "int8")
    partial = Partial(prepared, made)
    names = {
        layer.name: [str(node.target) for node in partial.switches(layer)]
        for layer in partial.layers
        if "quantizers" not in layer.name
    }
    assert names["c"][0] == "c" and len(names["c"]) == 2  # its ReLU's quantizer
    assert len(names["relu_1"]) == 1
    assert names["max_pool2d"] == []  # its values are rounded already
    assert len(names["cat_1"]) == 3 and len(set(names["cat_1"])) == 1  # two inputs and the output share one


def test_switches_of_one_quantizer_are_told_apart() -> None:
    prepared, made = both("branches", "int8")
    partial, images = Partial(prepared, made), make_images(2)
    values = partial.exact(images)
    cat = next(layer for layer in partial.layers if layer.name == "cat_1")
    first, second = [node for node in partial.switches(cat) if node in cat.node.all_input_nodes]
    assert partial.changed(values, [first]).keys() != partial.changed(values, [second]).keys()


def test_a_correction_is_off_with_its_layer() -> None:
    prepared, made = both("depthwise", "int8-equalized")
    partial = Partial(prepared, made)
    values = partial.exact(make_images(2))
    node = next(layer.node for layer in partial.layers if layer.name == "dw")
    source = node.args[0]
    with torch.no_grad():
        expected = prepared.layer("dw").module(values[source])
    assert torch.equal(values[node], expected)
    assert not torch.equal(made.layer("dw").module.bias, prepared.layer("dw").module.bias)  # type: ignore[arg-type]


def test_networks_that_do_not_belong_together_are_told() -> None:
    _, made = both("residual", "int8")
    with pytest.raises(RecipeError, match="layer 'stem' is quantized but not in the float network; give the"):
        Partial(make_net("gated"), made)
