"""High-bias absorption."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from fewbit import ops
from fewbit.net import Net, Normal
from fewbit.prepare.joints import Joint, MatrixLayer, by_input, find_joints, matrix_of, set_parameters
from fewbit.step import Context, Step, StepReport

_CARRIES = frozenset({"Relu", "MaxPool", "GlobalAvgPool", "Mean", "Flatten", "Reshape", "Upsample", "Slice"})
_NOTHING = frozenset({"Identity", "Dropout", "DropPath"})


class AbsorbBias(Step):
    """Move the part of a bias that a ReLU always lets pass into the next layer's bias: ranges get narrower.

    Of an output distributed as N(beta, gamma^2) in each channel, as its folded BatchNorm told::

        c = max(0, beta - 3 |gamma|)     b1' = b1 - c
        b2'_o = b2_o + sum over i, kh, kw of W2[o, i, kh, kw] c_i

    Values above c pass exactly: relu(x) = relu(x - c) + c. Those below, 0.135 % of a normal distribution,
    move.

    Attributes:
        deviations: How many standard deviations below the mean c lies.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    arXiv 1906.04721, section 4.1.3.
    Differs: what a zero-padded layer reads stays, for c is missing in its border; so does what a clip cuts.
    """

    needs = frozenset({"folded"})
    before = frozenset({"placed"})
    gives = frozenset({"absorbed"})

    deviations: float = Field(3.0, ge=0)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Absorb in place."""
        changed = 0
        for joint in find_joints(net):
            normal = net.statistics.get(joint.producer.name)
            if normal is None or not _carries(joint):
                continue
            surplus = surplus_of(normal, self.deviations)
            if bool((surplus > 0).any()):
                _absorb(joint, surplus)
                net.statistics[joint.producer.name] = Normal(normal.mean - surplus, normal.std)
                changed += 1
        return StepReport(step="absorb_bias", changed=changed)


def surplus_of(normal: Normal, deviations: float = 3.0) -> Tensor:
    """Return c = max(0, mean - deviations std) of each channel, which a ReLU lets pass nearly always.

    Example:
        >>> normal = Normal(torch.tensor([3.0, 0.5, 1.2]), torch.tensor([0.5, 0.4, 0.3]))
        >>> [round(c, 6) for c in surplus_of(normal).tolist()]
        [1.5, 0.0, 0.3]
    """
    return (normal.mean - deviations * normal.std).clamp(min=0)


def _carries(joint: Joint) -> bool:
    """Tell whether a constant behind the ReLU reaches every reader whole."""
    kinds = {layer.kind for layer in joint.between}
    pads = [ops.pads_of(r.module) for r in joint.readers if isinstance(r.module, nn.Conv2d)]
    return "Relu" in kinds and kinds <= _CARRIES | _NOTHING and not any(any(sides) for sides in pads)


def _absorb(joint: Joint, surplus: Tensor) -> None:
    producer = matrix_of(joint.producer)
    bias = _bias_of(producer)
    set_parameters(producer, producer.weight.detach(), bias - surplus)
    for reader in joint.readers:
        module = matrix_of(reader)
        bias = _bias_of(module)
        set_parameters(module, module.weight.detach(), bias + _moved(module, surplus))


def _moved(module: MatrixLayer, surplus: Tensor) -> Tensor:
    """Return what a layer makes of a constant in each input channel."""
    weight = by_input(module, module.weight.detach().double(), len(surplus)).sum(3)
    return (weight * surplus.reshape(weight.shape[0], 1, -1)).sum(2).reshape(-1)


def _bias_of(module: MatrixLayer) -> Tensor:
    if module.bias is None:
        return torch.zeros(module.weight.shape[0], dtype=torch.float64)
    return module.bias.detach().double()
