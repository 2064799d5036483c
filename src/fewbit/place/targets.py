"""Targets: what each engine accepts and runs fast.

What stands here was read off the optimised graphs of the engines, and the tests read it off again.
"""

from __future__ import annotations

from fewbit.errors import RecipeError, suggest
from fewbit.spec import Frozen

_OPENVINO_NORM_CHANNELS = 256
_SHARING = frozenset({"MaxPool", "Flatten", "Reshape", "Permute", "Slice", "Pad", "Frame", "Upsample", "Min"})


class Target(Frozen):
    """What an engine accepts and runs fast.

    Attributes:
        name: The engine's name.
        symmetric_activations: Activations take zero point 0: unsigned codes where a tensor is never
            negative, signed codes elsewhere. Else unsigned codes with a zero point everywhere.
        fuses: For each kind of producer, the activations that the engine computes inside its kernel, so
            that no quantizer may stand between them.
        integer_kinds: Kinds besides convolutions and matrix products that the engine runs in integers.
        sharing_kinds: Kinds that move or select values: their output shares the quantizer of their input.
        quantizes_output: A convolution runs in integers only with a quantizer behind it.
        fuses_residual: The engine adds a residual to a convolution's result in float, so no quantizer stands
            between a convolution and the sum that alone reads it.
        splits_silu: The engine runs SiLU in integers only as a sigmoid and a product.
        rounds_for_norms: What a BatchNorm reads behind a concatenation is worth rounding before it, for the
            engine normalizes each part alone and reads its codes faster than its values.
        slow_average_pools: An average over codes costs more than the products that a convolution saves
            behind it.
        split_norm_channels: A response normalization of power 3/4 and up to so many channels is faster in
            several operators, whose convolution sums over channels, than as LRN.
        exact_sums: Products of u8 and s8 are summed exactly. Else pairs of them go through 16 bits (x86
            without VNNI), and weights take 7 bits at most but in depthwise convolutions, so that they fit.
    """

    name: str
    symmetric_activations: bool
    fuses: dict[str, tuple[str, ...]]
    integer_kinds: frozenset[str]
    sharing_kinds: frozenset[str] = _SHARING
    quantizes_output: bool
    fuses_residual: bool
    splits_silu: bool
    rounds_for_norms: bool = False
    slow_average_pools: bool = False
    split_norm_channels: int = 0
    exact_sums: bool = True


TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        name="onnxruntime",
        symmetric_activations=False,
        fuses=dict.fromkeys(("Conv", "Linear", "Add"), ("Relu", "Clip")),
        integer_kinds=frozenset({"Add", "Mul", "Concat", "AvgPool", "GlobalAvgPool", "Sigmoid", "LeakyRelu"}),
        quantizes_output=True,
        fuses_residual=False,
        splits_silu=True,
        slow_average_pools=True,
        split_norm_channels=512,
    ),
    "openvino": Target(
        name="openvino",
        symmetric_activations=True,
        fuses=dict.fromkeys(
            ("Conv", "Linear", "Add", "BatchNorm", "Mul"),
            (
                "Relu",
                "Clip",
                "Silu",
                "HardSwish",
                "Sigmoid",
                "HardSigmoid",
                "LeakyRelu",
                "PRelu",
                "Gelu",
                "Elu",
            ),
        ),
        integer_kinds=frozenset({"Add", "Mul", "Concat", "AvgPool", "GlobalAvgPool"}),
        quantizes_output=False,
        fuses_residual=True,
        splits_silu=False,
        rounds_for_norms=True,
    ),
}


def target(name: str, exact_sums: bool = True, native_bf16: bool = False) -> Target:
    """Return a Target by its engine's name.

    Args:
        name: The engine's.
        exact_sums: See `Target`; a property of the processor, so it is not in the table.
        native_bf16: The processor multiplies in bf16. OpenVINO computes float operators in it there, and only
            there is its convolution fast enough for `split_norm_channels`.

    Raises:
        RecipeError: There is none.
    """
    if name not in TARGETS:
        raise RecipeError(f"target '{name}'{suggest(name, TARGETS)}: there are {', '.join(TARGETS)}")
    update: dict[str, object] = {"exact_sums": exact_sums}
    if name == "openvino" and native_bf16:
        update["split_norm_channels"] = _OPENVINO_NORM_CHANNELS
    return TARGETS[name].model_copy(update=update)
