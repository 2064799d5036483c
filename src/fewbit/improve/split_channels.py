"""Outlier channel splitting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from fewbit import ops
from fewbit.net import Net, Normal
from fewbit.place.place import weight_specs
from fewbit.prepare.joints import (
    Joint,
    MatrixLayer,
    by_input,
    find_joints,
    matrix_of,
    set_parameters,
)
from fewbit.spec import QuantSpec
from fewbit.step import Context, Step, StepReport

_SMALLEST = 1e-30
_ORDER = 16


class SplitChannels(Step):
    """Split the input channels with the largest weights in two halves: the range shrinks, the function stays.

    A channel that is fed twice may share its weight, w = w1 + w2. On a grid of step S::

        w1 = (w - S / 2) / 2     w2 = (w + S / 2) / 2     [w1 / S] + [w2 / S] = [w / S]

    where [x] = floor(x + 1/2): both halves round to what the whole rounds to, and max |w| halves. The layer
    that makes the channel makes it twice, so nothing but convolutions and matrix products runs that ran
    before. One at a time, ceil(ratio C) of a tensor's C channels are split; a half may be split again.

    Attributes:
        ratio: How many more channels, as a fraction.

    Source: Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel
    Splitting", 2019, arXiv 1901.09504.
    Differs: the channel is made twice by the layer before instead of copied, so only tensors that one layer
    makes and only convolutions and matrix products read are split, none beside a grouped convolution. With a
    scale an output channel, or several readers, the channel is taken that is at or near the end of most
    ranges: the largest sum over the scales of (|w| / max |w|)^16.
    """

    needs = frozenset({"folded"})
    before = frozenset({"placed"})
    gives = frozenset({"split"})

    ratio: float = Field(0.02, ge=0, le=1)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Split in place."""
        specs = weight_specs(net, context.scheme, context.target)
        weights = _count(net)
        changed = 0
        for joint in find_joints(net):
            if _may_split(joint, specs):
                parts = [
                    _Part(reader.module, specs.get(reader.name), joint.channels) for reader in joint.readers
                ]
                changed += _split(net, joint, parts, math.ceil(self.ratio * joint.channels))
        more = _count(net) / max(1, weights) - 1
        note = f"{changed} channels split, {more:.1%} more weights"
        return StepReport(step="split_channels", changed=changed, notes=(note,))


def halves(weight: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the halves of a weight that round, floor(x + 1/2), to codes whose sum is the weight's code.

    Example:
        >>> one, other = halves(torch.tensor([3.0, -0.7]), 1.0)
        >>> torch.floor(one + 0.5).tolist(), torch.floor(other + 0.5).tolist()
        ([1.0, -1.0], [2.0, 0.0])
    """
    return (weight - step / 2) / 2, (weight + step / 2) / 2


class _Part:
    """The columns of a reader's weight, those that are split included.

    Args:
        module: Whose weight it is.
        spec: The grid it will get, none where it stays in float.
        channels: Input channels of the tensor that it reads.
    """

    def __init__(self, module: nn.Module, spec: QuantSpec | None, channels: int) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        self.module, self.spec = module, spec
        weight = module.weight.detach().double()
        self.columns = by_input(module, weight, channels)[0]  # (O, C, the rest)

    def sizes(self) -> Tensor:
        """Return max |w| of each row of a scale and each column (R, C)."""
        sizes = self.columns.abs().amax(2)
        one = self.spec is not None and self.spec.granularity == "tensor"
        return sizes.amax(0, keepdim=True) if one else sizes

    def split(self, splits: Sequence[int]) -> None:
        """Split columns one after another, on the grid that is finest for the result."""
        plain, depths = self.columns, [0] * self.columns.shape[1]
        for column in splits:
            plain = torch.cat((plain, plain[:, column : column + 1] / 2), 1)
            plain[:, column] /= 2
            depths[column] += 1
            depths.append(depths[column])
        step = self._step(plain, torch.tensor(depths))
        for column in splits:
            one, other = halves(self.columns[:, column], step)
            self.columns = torch.cat((self.columns, other.unsqueeze(1)), 1)
            self.columns[:, column] = one

    def _step(self, plain: Tensor, depths: Tensor) -> Tensor:
        """Return S (O, 1): a column that was split d times reaches S (1 - 2^-d) / 2 beyond its share."""
        if self.spec is None:
            return torch.zeros((len(plain), 1), dtype=torch.float64)
        qmin, qmax = self.spec.code_range()
        codes = (qmax - qmin) / 2 - (1 - 0.5**depths) / 2
        steps = (plain.abs().amax(2) / codes).amax(1, keepdim=True)
        return steps.amax(0, keepdim=True) if self.spec.granularity == "tensor" else steps

    def write(self) -> None:
        """Give the module its wider weight."""
        channels = self.columns.shape[1]
        if isinstance(self.module, nn.Conv2d):
            self.module.in_channels = channels
            shape = (len(self.columns), channels, *self.module.kernel_size)
        else:
            self.module.in_features = channels * self.columns.shape[2]
            shape = (len(self.columns), self.module.in_features)
        set_parameters(self.module, self.columns.reshape(shape), None)


def choose_splits(sizes: Sequence[Tensor], count: int) -> list[int]:
    """Return the columns to split, one after another; a split column's other half becomes the last one.

    The next one is at or near the end of most ranges; of one range it is the largest.

    Args:
        sizes: Of each reader max |w| of each row of one scale and each column, (R, C).
        count: Most splits.

    Example:
        >>> choose_splits([torch.tensor([[1.0, 8.0, 3.0]])], 3)
        [1, 1, 3]
    """
    rows = torch.cat(list(sizes)).double()
    found: list[int] = []
    for _ in range(count):
        relative = rows / rows.amax(1, keepdim=True).clamp(min=_SMALLEST)
        column = int((relative**_ORDER).sum(0).argmax())
        if not bool(rows[:, column].any()):
            break
        rows[:, column] /= 2
        rows = torch.cat((rows, rows[:, column : column + 1]), 1)
        found.append(column)
    return found


def _may_split(joint: Joint, specs: Mapping[str, QuantSpec]) -> bool:
    """Tell whether a joint's channels can be made twice, and some reader has a grid."""
    modules = [matrix_of(layer) for layer in (joint.producer, *joint.readers)]
    if any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules):
        return False
    between = [layer.module for layer in joint.between]
    if any(isinstance(module, nn.PReLU) and module.num_parameters > 1 for module in between):
        return False
    if any(isinstance(module, ops.Minimum) for module in between):
        return False
    return any(reader.name in specs for reader in joint.readers)


def _split(net: Net, joint: Joint, parts: Sequence[_Part], count: int) -> int:
    """Split a joint's channels and return how many were."""
    splits = choose_splits([part.sizes() for part in parts if part.spec is not None], count)
    if not splits:
        return 0
    copies = list(range(joint.channels))
    for column in splits:
        copies.append(copies[column])
    _repeat_outputs(matrix_of(joint.producer), torch.tensor(copies))
    for part in parts:
        part.split(splits)
        part.write()
    normal = net.statistics.get(joint.producer.name)
    if normal is not None:
        net.statistics[joint.producer.name] = Normal(normal.mean[copies], normal.std[copies])
    for layer in joint.between:
        module = layer.module
        if isinstance(module, ops.Reshape) and module.shape[1] != -1:
            module.shape = (-1, module.shape[1] // joint.channels * len(copies))
    return len(splits)


def _repeat_outputs(module: MatrixLayer, copies: Tensor) -> None:
    """Make output channels again: row r of the new weight is row copies[r] of the old one."""
    bias = None if module.bias is None else module.bias.detach()[copies]
    set_parameters(module, module.weight.detach()[copies], bias)
    if isinstance(module, nn.Conv2d):
        module.out_channels = len(copies)
    else:
        module.out_features = len(copies)


def _count(net: Net) -> int:
    return sum(
        layer.module.weight.numel()
        for layer in net.layers()
        if isinstance(layer.module, nn.Conv2d | nn.Linear)
    )
