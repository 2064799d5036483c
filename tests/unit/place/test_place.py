from __future__ import annotations

import pytest

from fewbit.errors import RecipeError
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.recipe import read_recipe, run_recipe
from fewbit.spec import QuantSpec, Rule, Scheme
from networks import make_context, make_net, quantize


def quantized_after(net: Net) -> dict[str, str]:
    """Return, for each quantized tensor, the name of its quantizer."""
    return {layer.inputs[0]: layer.name for layer in net.layers() if isinstance(layer.module, Quantizer)}


def test_onnxruntime_gets_a_quantizer_behind_each_kernel_and_none_inside() -> None:
    after = quantized_after(quantize("residual", engine="onnxruntime"))
    assert set(after) == {"input", "relu", "relu_1", "conv2", "relu_2", "mean"} | {
        name for name in after if "flatten" in name
    }
    assert "add" not in after  # the ReLU behind the sum is its kernel's


def test_openvino_adds_the_residual_inside_the_convolution() -> None:
    after = quantized_after(quantize("residual", engine="openvino"))
    assert "conv2" not in after
    assert {"input", "relu", "relu_1", "relu_2", "mean"} <= set(after)


def test_openvino_codes_are_unsigned_behind_relu_and_signed_elsewhere() -> None:
    net = quantize("residual", engine="openvino")
    by_tensor = {
        layer.inputs[0]: layer.module for layer in net.layers() if isinstance(layer.module, Quantizer)
    }
    assert (by_tensor["relu"].qmin, by_tensor["relu"].qmax, by_tensor["relu"].unsigned) == (0, 255, True)
    assert (by_tensor["input"].qmin, by_tensor["input"].qmax, by_tensor["input"].unsigned) == (
        -128,
        127,
        False,
    )
    assert all(float(q.zero_point) == 0 for q in by_tensor.values())


def test_onnxruntime_codes_are_unsigned_everywhere_with_zero_point_0_behind_relu() -> None:
    net = quantize("residual", engine="onnxruntime")
    by_tensor = {
        layer.inputs[0]: layer.module for layer in net.layers() if isinstance(layer.module, Quantizer)
    }
    assert all(q.unsigned for q in by_tensor.values())
    assert float(by_tensor["relu"].zero_point) == 0
    assert float(by_tensor["input"].zero_point) > 0


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_concatenation_and_pools_share_one_quantizer(engine: str) -> None:
    after = quantized_after(quantize("branches", engine=engine))
    joined = [name for name in after if name.startswith("cat")]
    assert len(joined) == 2
    assert after["relu.0"] == after["relu.1"] == after["cat"]
    assert after["relu_1"] == after["max_pool2d"] == after["cat_1"] == after["relu_2"]
    assert after["cat"] != after["cat_1"]


def test_relu6_never_gets_a_range_over_6() -> None:
    net = quantize("depthwise", engine="onnxruntime")
    clips = [layer.name for layer in net.layers() if layer.kind == "Clip"]
    by_tensor = {
        layer.inputs[0]: layer.module for layer in net.layers() if isinstance(layer.module, Quantizer)
    }
    assert clips and all(by_tensor[name].range()[1] <= 6.0001 for name in clips)


def test_rules_keep_layers_float_by_name_glob_first_and_last() -> None:
    recipe = read_recipe("int8").with_float(["conv*", "last"])
    net, reports = run_recipe(recipe, make_net("residual"), make_context())
    kinds = {layer.name: type(layer.module) for layer in net.layers()}
    assert kinds["stem"] is QuantConv2d
    assert QuantConv2d not in (kinds["conv1"], kinds["conv2"])
    assert kinds["fc"] is not QuantLinear
    assert "left in float: conv1, conv2, fc" in reports[2].notes


def test_a_rule_gives_a_layer_its_own_widths() -> None:
    scheme = read_recipe("int8").scheme.model_copy(
        update={"rules": (Rule(match="first", weights=QuantSpec(bits=4, symmetric=True, signed=True)),)}
    )
    net, _ = run_recipe(
        read_recipe("int8").model_copy(update={"scheme": scheme}), make_net("residual"), make_context()
    )
    assert net.layer("stem").module.weight_quantizer.spec.bits == 4
    assert net.layer("conv1").module.weight_quantizer.spec.bits == 8


def test_a_rule_that_matches_nothing_is_told() -> None:
    recipe = read_recipe("int8").with_float(["conv9"])
    with pytest.raises(
        RecipeError, match=r"rule 'conv9' \(did you mean 'conv\d'\?\): no layer of residual matches"
    ):
        run_recipe(recipe, make_net("residual"), make_context())


def test_everything_in_float_places_no_quantizer_at_all() -> None:
    net, _ = run_recipe(read_recipe("int8").with_float(["*"]), make_net("residual"), make_context())
    assert not any(isinstance(layer.module, Quantizer) for layer in net.layers())


def test_weights_only_places_no_activation_quantizer() -> None:
    net = quantize("residual", "int8-weights-only")
    assert not any(isinstance(layer.module, Quantizer | DynamicQuantizer) for layer in net.layers())
    assert isinstance(net.layer("conv1").module, QuantConv2d)


def test_dynamic_reads_each_tensor_through_one_quantizer() -> None:
    net = quantize("branches", "int8-dynamic")
    dynamic = [layer.inputs[0] for layer in net.layers() if isinstance(layer.module, DynamicQuantizer)]
    assert len(dynamic) == len(set(dynamic)) >= 3


# What a layer reads


def with_rules(
    name: str, *rules: Rule, engine: str = "onnxruntime", mode: str = "static", bits: int = 4
) -> Net:
    scheme = Scheme.from_data({"mode": mode, "activations": {"bits": bits}})
    scheme = scheme.model_copy(update={"rules": rules})
    recipe = read_recipe("int8").model_copy(update={"scheme": scheme})
    return run_recipe(recipe, make_net(name), make_context(engine))[0]


def bits_of(net: Net) -> dict[str, int]:
    """Return the bits of each quantized tensor."""
    return {
        layer.inputs[0]: layer.module.spec.bits
        for layer in net.layers()
        if isinstance(layer.module, Quantizer | DynamicQuantizer)
    }


EIGHT, SIX = QuantSpec(bits=8), QuantSpec(bits=6)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_rule_gives_what_a_layer_reads_its_own_width(engine: str) -> None:
    found = bits_of(with_rules("residual", Rule(match="last", inputs=EIGHT), engine=engine))
    assert {name for name, bits in found.items() if bits == 8} == {"mean", "mean_flatten"}
    assert {bits for name, bits in found.items() if not name.startswith("mean")} == {4}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_image_has_a_rule_of_its_own(engine: str) -> None:
    found = bits_of(with_rules("residual", Rule(match="input", activations=EIGHT), engine=engine))
    assert {name for name, bits in found.items() if bits == 8} == {"input"}


def test_the_first_layer_says_what_the_image_is_rounded_to() -> None:
    found = bits_of(with_rules("residual", Rule(match="first", inputs=SIX)))
    assert {name for name, bits in found.items() if bits == 6} == {"input"}
    both = (Rule(match="input", activations=EIGHT), Rule(match="first", inputs=SIX))
    assert bits_of(with_rules("residual", *both))["input"] == 6  # who reads it goes before who makes it


def test_the_finest_of_several_readers_counts() -> None:
    rules = (Rule(match="a", inputs=SIX), Rule(match="b", inputs=QuantSpec(bits=5)))
    for order in (rules, rules[::-1]):
        assert bits_of(with_rules("branches", *order))["input"] == 6


def test_tensors_that_share_a_quantizer_are_asked_for_together() -> None:
    found = bits_of(with_rules("branches", Rule(match="c", inputs=EIGHT)))
    joined = {name for name, bits in found.items() if bits == 8}
    assert {"relu.0", "relu.1", "cat"} <= joined and "input" not in joined and "cat_1" not in joined


def test_a_layer_in_float_asks_for_nothing() -> None:
    rule = Rule(match="conv1", keep_float=True, inputs=EIGHT)
    assert set(bits_of(with_rules("residual", rule)).values()) == {4}


def test_the_target_narrows_what_a_reader_asks_for() -> None:
    net = with_rules("residual", Rule(match="first", inputs=EIGHT), engine="openvino")
    (first,) = (layer.module for layer in net.layers() if layer.inputs == ("input",))
    assert isinstance(first, Quantizer) and first.spec.symmetric and first.spec.signed
    assert float(first.zero_point) == 0


def test_run_time_grids_heed_what_a_layer_reads_too() -> None:
    found = bits_of(with_rules("branches", Rule(match="b", inputs=SIX), mode="dynamic", bits=8))
    assert found["input"] == 6 and sorted(found.values())[1:] == [8, 8]


def test_a_layer_that_is_called_input_does_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"rule 'inputs'.*no layer of residual matches"):
        with_rules("residual", Rule(match="inputs", activations=EIGHT))
