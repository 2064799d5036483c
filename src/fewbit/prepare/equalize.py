"""Cross-layer equalization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.net import Layer, Net, Normal, add_layer
from fewbit.prepare.joints import (
    Joint,
    double_weights,
    find_joints,
    input_ranges,
    matrix_of,
    output_ranges,
    scale_inputs,
    scale_outputs,
    set_parameters,
)
from fewbit.spec import Scheme
from fewbit.step import Context, Step, StepReport

_FARTHEST = 1e3
_DEVIATIONS = 6.0
_TINY = 1e-30


class Equalize(Step):
    """Give each channel the same weight range in the layer that makes it and the ones that read it.

    A tensor between two layers may take a factor in each channel, for f(s x) = s f(x) where f is a ReLU::

        W1'[i] = W1[i] / s_i     b1'_i = b1_i / s_i     W2'[:, i] = W2[:, i] s_i
        s_i = sqrt(r1_i / r2_i)     r1_i = max |W1[i]|     r2_i = max |W2[:, i]|

    Both ranges become sqrt(r1_i r2_i). Joints are visited in order until no factor moves. A depthwise
    convolution stands in two joints, which gives the three ranges of its triple their geometric mean.

    A clip to [0, K] passes no factor and stays as it is: a channel that reaches K on the calibration images
    keeps its scale, another is scaled only so far that it stays below K, and no image seen changes. With
    caps a channel that reaches K may shrink too, for a minimum with K / s_i behind the clip then cuts it
    where it was cut before. Where no images are shown the reach is mean + 6 std of the folded BatchNorm;
    without that too, such joints stay.

    Attributes:
        sweeps: Most visits to each joint.
        tolerance: The largest |log s| that counts as no change.
        headroom: Of a channel below a clip, as a fraction of its reach: room for images not seen.
        caps: Shrink channels that reach a clip too. One scale for all weights of a tensor needs it; engines
            compute the minimum in float, so with a scale a channel it costs time for nothing.
        keep_ranges: No channel comes to reach further, mean + 6 std, than the farthest of its tensor did,
            where a BatchNorm told it: one with small weights and a large bias would else widen the range of
            all. The middle factor is 1 then, unless a clip sets the scale.
        images: See on the images how far channels below a clip reach.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    arXiv 1906.04721, section 4.1.
    Differs: ReLU6 stays, capped per channel or not, where the paper replaces it by ReLU (which leaves
    MobileNet v1 0.25 10 % top-1 of 58 %); ranges of activations are kept, where the paper leaves them to
    absorption, which padded readers forbid; beside channels that keep their scale, factors are relative to
    their ranges, s_i^2 = (r1_i / r2_i) / (max r1_kept / max r2_kept); a tensor that several layers read is
    scaled, r2_i being the largest of their ranges; factors stay within 1e-3 and 1e3; a channel with
    r1_i = 0 or r2_i = 0 stays.
    """

    needs = frozenset({"folded"})
    before = frozenset({"placed"})
    gives = frozenset({"equalized"})

    sweeps: int = Field(40, ge=1)
    tolerance: float = Field(1e-3, gt=0)
    headroom: float = Field(1.0, ge=0)
    caps: bool = False
    keep_ranges: bool = True
    images: bool = True

    def reads_images(self, scheme: Scheme) -> bool:
        """Tell whether it takes the reach of channels below a clip from images."""
        return self.images

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Equalize in place."""
        found = find_joints(net)
        reaches = _reaches(net, found, context.batches() if self.images else ())
        joints = [
            _Scaled(joint, reaches, self.headroom, self.caps) for joint in found if _is_known(joint, reaches)
        ]
        if self.keep_ranges:
            for scaled in joints:
                scaled.keep_range(net.statistics.get(scaled.joint.producer.name))
        weights = double_weights([layer for scaled in joints for layer in scaled.layers])
        for _ in range(self.sweeps):
            moved = [scaled.equalize(weights) for scaled in joints]
            if max(moved, default=0.0) < self.tolerance:
                break
        _write(net, joints, weights)
        left = [joint.producer.name for joint in found if not _is_known(joint, reaches)]
        notes = (
            (f"clipped outputs left as they are, their reach is not known: {', '.join(left)}",)
            if left
            else ()
        )
        return StepReport(step="equalize", changed=sum(scaled.changed for scaled in joints), notes=notes)


def factors_of(r1: Tensor, r2: Tensor, kept: Tensor) -> Tensor:
    """Return the factors that a joint divides its producer's outputs by.

    Args:
        r1: Weight range of each output channel of the producer.
        r2: Weight range of each input channel of the readers.
        kept: Channels whose factor is 1; the others' are relative to them.

    Example:
        >>> r1, r2 = torch.tensor([2.0, 0.1, 4.0]), torch.tensor([0.5, 8.0, 0.2])
        >>> [round(s, 6) for s in factors_of(r1, r2, torch.zeros(3, dtype=torch.bool)).tolist()]
        [2.0, 0.111803, 4.472136]
    """
    dead = (r1 == 0) | (r2 == 0)
    ratio = torch.where(dead, 1.0, r1) / torch.where(dead, 1.0, r2)
    anchors = kept & ~dead
    if bool(anchors.any()):
        ratio = ratio * (r2[anchors].max() / r1[anchors].max())
    return torch.where(dead | kept, 1.0, ratio.sqrt())


@dataclass(frozen=True)
class _Reach:
    """How far the input of a clip to [0, high] goes in each channel, at scale 1."""

    high: float
    largest: Tensor


class _Scaled:
    """A joint, its factors so far and how far they may go."""

    def __init__(self, joint: Joint, reaches: Mapping[fx.Node, _Reach], headroom: float, caps: bool) -> None:
        self.joint = joint
        self.capped: dict[fx.Node, Tensor] = {}
        self.kept = torch.zeros(joint.channels, dtype=torch.bool)
        self.relative = False
        self.factors = torch.ones(joint.channels, dtype=torch.float64)
        self.least = torch.full_like(self.factors, 1 / _FARTHEST)
        for clip in joint.clips:
            reach = reaches[clip.node]
            part = reach.largest.clamp(min=0) * (1 + headroom) / reach.high
            if caps and clip.inputs == (joint.producer.name,):
                self.capped[clip.node] = part > 1
            else:
                self.kept |= part > 1
            self.least = torch.maximum(self.least, part.clamp(max=1))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose weights it scales."""
        return self.joint.producer, *self.joint.readers

    @property
    def changed(self) -> bool:
        """Some factor is not 1."""
        return bool((self.factors != 1).any())

    def keep_range(self, normal: Normal | None) -> None:
        """Let no channel come to reach further than the farthest one does, where a BatchNorm told how far."""
        if normal is None:
            return
        cut = any(layer.kind in ("Relu", "Clip") for layer in self.joint.between)
        reach = (normal.mean if cut else normal.mean.abs()) + _DEVIATIONS * normal.std
        part = reach.clamp(min=0) / reach.max().clamp(min=_TINY)
        self.least = torch.maximum(self.least, part)
        self.relative = not self.joint.clips

    def equalize(self, weights: dict[fx.Node, Tensor]) -> float:
        """Scale the weights once and return the largest |log s|."""
        producer, channels = self.joint.producer.node, self.joint.channels
        r1 = output_ranges(weights[producer])
        r2 = torch.stack(
            [input_ranges(matrix_of(reader), weights[reader.node], channels) for reader in self.joint.readers]
        ).amax(0)
        wanted = self.factors * factors_of(r1, r2, self.kept)
        if self.relative:  # a factor that all channels share changes no range but by itself
            wanted = wanted / wanted.median()
        wanted = torch.where(self.kept, 1.0, wanted.clamp(max=_FARTHEST).maximum(self.least))
        step = wanted / self.factors
        weights[producer] = scale_outputs(weights[producer], 1 / step)
        for reader in self.joint.readers:
            weights[reader.node] = scale_inputs(matrix_of(reader), weights[reader.node], step)
        self.factors = wanted
        return float(step.log().abs().max())


def _reaches(net: Net, joints: Sequence[Joint], batches: Iterable[Tensor]) -> dict[fx.Node, _Reach]:
    """Return the reach of the clips in joints, from the images or else from the folded statistics."""
    clips = {clip.node: (clip, joint) for joint in joints for clip in joint.clips}
    if not clips:
        return {}
    largest: dict[fx.Node, Tensor] = {}
    handles = [
        clip.module.register_forward_pre_hook(partial(_see, largest, node))
        for node, (clip, _) in clips.items()
    ]
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for handle in handles:
        handle.remove()
    found = {}
    for node, (clip, joint) in clips.items():
        assert isinstance(clip.module, ops.Clip)
        normal = net.statistics.get(joint.producer.name)
        if node in largest:
            found[node] = _Reach(clip.module.high, _by_channel(largest[node], joint.channels))
        elif normal is not None:
            found[node] = _Reach(clip.module.high, normal.mean + _DEVIATIONS * normal.std)
    return found


def _see(largest: dict[fx.Node, Tensor], node: fx.Node, module: Any, inputs: tuple[Tensor, ...]) -> None:
    seen = inputs[0].detach().transpose(0, 1 if inputs[0].dim() == 4 else -1).flatten(1).amax(1).double()
    largest[node] = torch.maximum(largest[node], seen) if node in largest else seen


def _by_channel(largest: Tensor, channels: int) -> Tensor:
    """Return the largest of each channel's n values, where they were flattened."""
    return largest.reshape(channels, -1).amax(1)


def _is_known(joint: Joint, reaches: Mapping[fx.Node, _Reach]) -> bool:
    return all(clip.node in reaches for clip in joint.clips)


def _write(net: Net, joints: Sequence[_Scaled], weights: Mapping[fx.Node, Tensor]) -> None:
    """Give the layers their weights, biases and statistics."""
    biases: dict[fx.Node, Tensor] = {}
    for scaled in joints:
        producer = scaled.joint.producer
        bias = matrix_of(producer).bias
        if bias is not None:
            biases[producer.node] = bias.detach().double() / scaled.factors
        normal = net.statistics.get(producer.name)
        for clip in scaled.joint.clips:
            _cap(net, clip, scaled)
        if normal is not None:
            net.statistics[producer.name] = Normal(normal.mean / scaled.factors, normal.std / scaled.factors)
    for layer in {layer.node: layer for scaled in joints for layer in scaled.layers}.values():
        set_parameters(matrix_of(layer), weights[layer.node], biases.get(layer.node))
    net.refresh()


def _cap(net: Net, clip: Layer, scaled: _Scaled) -> None:
    """Put a minimum behind a clip where a channel that reaches it shrank."""
    module = clip.module
    assert isinstance(module, ops.Clip)
    cut = scaled.capped.get(clip.node, torch.zeros_like(scaled.kept)) & (scaled.factors > 1)
    if not bool(cut.any()):
        return
    limits = torch.where(cut, module.high / scaled.factors, module.high).float()
    behind = (1, 1) if isinstance(scaled.joint.producer.module, nn.Conv2d) else ()
    users = list(clip.node.users)
    with net.graph.graph.inserting_after(clip.node):
        minimum = ops.Minimum(limits.reshape(-1, *behind))
        capped = add_layer(net.graph, f"{clip.name}.minimum", minimum, clip.node)
    for user in users:
        user.replace_input_with(clip.node, capped)
