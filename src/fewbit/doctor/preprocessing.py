"""Wrong preprocessing: the float network itself does worse than it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fewbit.data.preprocess import normalize
from fewbit.doctor.judge import Judge, Verdict, versus
from fewbit.doctor.records import Fact, Finding, InputFacts, Remedy
from fewbit.doctor.sample import Sample
from fewbit.load.card import InputSection
from fewbit.measure.intervals import wilson
from fewbit.net import Net

_FEW = 64
_SURE = 0.001
_FAR = 0.02
_NEAR = 0.05
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CAFFE = (103.939, 116.779, 123.68)
_LEAST_VARIANCE = 1e-6
_MOST_GAP = 1e3


@dataclass(frozen=True)
class Alternative:
    """Another way to prepare the images.

    Attributes:
        action: What to change, in words.
        section: The card's `[input]` with it.
    """

    action: str
    section: InputSection


def alternatives(
    section: InputSection, pixels: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
) -> list[Alternative]:
    """Return the usual ways to prepare images, but for the one that the card has.

    Args:
        section: The card's.
        pixels: Mean and standard deviation of each channel of the images, in 0..255.
    """
    channels = section.size[0]
    gray = channels == 1
    zero, one, half = ((value,) * channels for value in (0.0, 1.0, 0.5))
    mean, std = (tuple(round(float(v) / 255, 4) for v in part) for part in pixels)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("scale = 1: mean and std are of 0..255 pixels", {"scale": 1.0}),
        ("scale = 255: mean and std are of 0..1 pixels", {"scale": 255.0}),
        ("0..1 pixels: mean 0, std 1, scale 255", {"scale": 255.0, "mean": zero, "std": one}),
        ("0..255 pixels: mean 0, std 1, scale 1", {"scale": 1.0, "mean": zero, "std": one}),
        ("-1..1 pixels: mean 0.5, std 0.5, scale 255", {"scale": 255.0, "mean": half, "std": half}),
        ("the images' own mean and std, scale 255", {"scale": 255.0, "mean": mean, "std": std}),
    ]
    if not gray:
        kinds += [
            (
                "ImageNet's mean and std, scale 255",
                {"scale": 255.0, "mean": _IMAGENET[0], "std": _IMAGENET[1]},
            ),
            (
                "Caffe's: bgr, its mean, std 1, scale 1",
                {"channels": "bgr", "scale": 1.0, "mean": _CAFFE, "std": one},
            ),
            _swapped(section),
        ]
    found: list[Alternative] = []
    for action, changes in kinds:
        if min(changes.get("std", (1.0,))) > 0:
            other = section.model_copy(update=changes)
            if other != section and other not in [known.section for known in found]:
                found.append(Alternative(action, other))
    return found


def _swapped(section: InputSection) -> tuple[str, dict[str, Any]]:
    other = "rgb" if section.channels == "bgr" else "bgr"
    changes = {"channels": other, "mean": section.mean[::-1], "std": section.std[::-1]}
    return f'channels = "{other}", each with its own mean and std', changes


def pixels_of(batch: Tensor, section: InputSection) -> np.ndarray[Any, Any]:
    """Return the pixels that a batch was made of, uint8 (N, H, W, C), channels in the section's order."""
    shape = (1, -1, 1, 1)
    mean = np.array(section.mean, np.float64).reshape(shape)
    std = np.array(section.std, np.float64).reshape(shape)
    values = (batch.numpy().astype(np.float64) * std + mean) * section.scale
    return np.clip(np.rint(values), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def prepare(sample: Sample, section: InputSection, other: InputSection) -> Iterator[Tensor]:
    """Give a sample's images as another section prepares them."""
    for batch in sample.batches():
        pixels = pixels_of(batch, section)
        if section.channels != other.channels:
            pixels = pixels[..., ::-1]
        yield torch.from_numpy(normalize(pixels, other))


def look_at_input(net: Net, sample: Sample) -> InputFacts:
    """Measure a network's input, and what its first BatchNorm is fed against what it was trained with.

    Args:
        net: As captured, its BatchNorms not folded.
        sample: Images as the card prepares them.
    """
    norm = _first_norm(net)
    images, fed = _Channels(), _Channels()
    handle = None
    if norm is not None:
        handle = net.graph.get_submodule(norm).register_forward_pre_hook(lambda _, given: fed.add(given[0]))
    with torch.no_grad():
        for batch in sample.batches():
            images.add(batch)
            if handle is not None:
                net(batch)
    if handle is not None:
        handle.remove()
    mean, variance = images.moments()
    return InputFacts(
        mean=tuple(mean.tolist()),
        std=tuple(variance.sqrt().tolist()),
        norm=norm or "",
        norm_gap=None if norm is None else _gap(net.graph.get_submodule(norm), *fed.moments()),
    )


class _Channels:
    """Mean and variance of each channel of (N, C, ...)."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        rows = x.detach().double().transpose(0, 1).flatten(1)
        self._count += rows.shape[1]
        self._sum = self._sum + rows.sum(1)
        self._square = self._square + rows.square().sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self._count
        return mean, (self._square / self._count - mean.square()).clamp(min=0)


def _first_norm(net: Net) -> str | None:
    """Return the BatchNorm behind the first convolution or matrix product, if it has one."""
    for layer in net.layers():
        if isinstance(layer.module, nn.BatchNorm1d | nn.BatchNorm2d):
            return layer.name if layer.module.running_mean is not None else None
        if layer.kind in ("Conv", "Linear"):
            after = [user for user in layer.node.users if isinstance(user, fx.Node)]
            known = {other.node: other for other in net.layers()}
            fed = [known[user] for user in after if user in known]
            if not any(isinstance(one.module, nn.BatchNorm1d | nn.BatchNorm2d) for one in fed):
                return None
    return None


def _gap(norm: nn.Module, mean: Tensor, variance: Tensor) -> float:
    """Return the median over channels of KL(N(seen) || N(trained)), in nats; at most 1000."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    trained = norm.running_var.double().clamp(min=_LEAST_VARIANCE)
    seen = variance.clamp(min=_LEAST_VARIANCE)
    far = (mean - norm.running_mean.double()).square()
    gap = ((seen + far) / trained - 1 - (seen / trained).log()) / 2
    return min(_MOST_GAP, float(gap.median()))


@dataclass(frozen=True)
class Expectation:
    """What the float network's accuracy is held against.

    Attributes:
        classes: Number of classes: guessing is right for one in so many.
        share: What the card says, or none.
    """

    classes: int
    share: float | None = None

    def doubts(self, judge: Judge) -> str:
        """Say what is wrong with the float accuracy, or nothing."""
        seen = judge.exact.quality.accuracy
        ends = wilson(seen.top1_correct, seen.total, 1 - _SURE)
        if self.share is not None and ends.high < self.share - _FAR:
            return f"the card expects {self.share:.1%} of the float network, which gets {seen.top1:.1%}"
        if ends.low <= 1 / self.classes:
            return f"the float network gets {seen.top1:.1%}, no better than a guess among {self.classes}"
        return ""

    def agrees(self, judge: Judge) -> bool:
        """Tell whether the card expects about what is seen."""
        seen = judge.exact.quality.accuracy
        return self.share is not None and self.share in wilson(seen.top1_correct, seen.total)


def check_preprocessing(
    network: Callable[[Tensor], Tensor],
    section: InputSection,
    judge: Judge,
    expectation: Expectation,
    facts: InputFacts,
    advance: Callable[[str, float], None],
) -> Finding | None:
    """Look for a wrong preprocessing, and for the one that raises the float accuracy.

    The usual alternatives run on a few images; the best one runs on all of them. It is named where it gains
    with p < 0.001 in McNemar's exact test. Without one that gains, a float accuracy that is proven to be far
    below the card's, or no better than a guess, is told all the same.

    Args:
        network: The float network.
        section: The card's.
        judge: Has judged it on images as the card prepares them.
        expectation: What its accuracy is held against.
        facts: Of its input.
        advance: Told the name of what is tried and the fraction done.

    Returns:
        The finding; none where all is well.
    """
    doubts = expectation.doubts(judge)
    if not doubts and expectation.agrees(judge):
        return None
    remedy = _best(network, section, judge, advance)
    if not remedy.helps and not doubts:
        return None
    seen = judge.exact.quality.accuracy
    evidence = [Fact(name="float top-1", value=100 * seen.top1, unit="%")]
    if expectation.share is not None:
        evidence.append(Fact(name="the card expects", value=100 * expectation.share, unit="%"))
    evidence.append(Fact(name="a guess gets", value=100 / expectation.classes, unit="%"))
    for name, values in (("mean", facts.mean), ("std", facts.std)):
        evidence.append(Fact(name=f"{name} of the input, all channels", value=sum(values) / len(values)))
    if facts.norm_gap is not None:
        evidence.append(
            Fact(name=f"{facts.norm} is this far from its training", value=facts.norm_gap, unit="nats")
        )
    reason = doubts or "another preprocessing is right more often"
    if not remedy.helps:
        reason += "; no usual preprocessing mends it: check weights, labels and resize"
    return Finding(
        cause="wrong_preprocessing",
        layer="input",
        evidence=tuple(evidence),
        reason=reason,
        remedies=(remedy,),
    )


def _best(
    network: Callable[[Tensor], Tensor],
    section: InputSection,
    judge: Judge,
    advance: Callable[[str, float], None],
) -> Remedy:
    """Return the best alternative, judged on all images; of about equal ones the first, which is simplest."""
    few = judge.sample.first(_FEW)
    base = sum(judge.exact.predictions.top1_right[: len(few)].tolist())

    def right(other: InputSection) -> int:
        logits = _run(network, few, section, other)
        return int((logits.argmax(1).numpy() == few.targets).sum())

    known = alternatives(section, _pixel_moments(few, section))
    scores: list[int] = []
    for place, one in enumerate(known):
        advance(f"preprocessing: {one.action}", place / (len(known) + 2))
        scores.append(right(one.section))
    best = max(scores)
    chosen = known[next(i for i, score in enumerate(scores) if score >= best - _NEAR * len(few))]
    if best > base and section.size[0] == 3:
        action, changes = _swapped(chosen.section)
        other = chosen.section.model_copy(update=changes)
        if other != section and right(other) > best:
            chosen = Alternative(f"{chosen.action}; {action}", other)
    after = judge.judge_logits(_run(network, judge.sample, section, chosen.section))
    return _remedy(chosen, judge.exact, after)


def _remedy(one: Alternative, before: Verdict, after: Verdict) -> Remedy:
    seen = versus(before, after)
    gains = seen.gains > seen.losses and seen.p_value() < _SURE
    return Remedy(
        action=one.action,
        change=section_toml(one.section),
        before=before.quality.of_float(),
        after=after.quality.of_float(),
        versus=seen,
        helps=gains,
    )


def section_toml(section: InputSection) -> str:
    """Write what the alternatives differ in as lines of a card's `[input]`."""
    lines = [
        f'channels = "{section.channels}"',
        f"scale = {section.scale}",
        f"mean = {list(section.mean)}",
        f"std = {list(section.std)}",
    ]
    return "\n".join(["[input]", *lines])


def _run(
    network: Callable[[Tensor], Tensor], sample: Sample, section: InputSection, other: InputSection
) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(batch) for batch in prepare(sample, section, other)])


def _pixel_moments(
    sample: Sample, section: InputSection
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    channels = _Channels()
    for batch in sample.batches():
        channels.add(torch.from_numpy(pixels_of(batch, section).transpose(0, 3, 1, 2).copy()))
    mean, variance = channels.moments()
    return mean.numpy(), variance.sqrt().numpy()
