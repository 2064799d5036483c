"""What every row of the registry's table `sensitivity` is asked, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fewbit.errors import DataError, NetworkError, RecipeError
from fewbit.net import Layer, Net
from fewbit.place.regions import Region
from fewbit.spec import Frozen, QuantSpec, Scheme

LabelledBatch = tuple[Tensor, Tensor | None]
"""Images (N, C, H, W) float32, preprocessed, and their classes int64 (N,), or none."""
Tell = Callable[[float], None]


class PairedCounts(Frozen):
    """How the first answers of two networks differ on the same labelled images.

    Attributes:
        images: How many there are.
        losses: Float is right, the other wrong.
        gains: Float is wrong, the other right.
    """

    images: int
    losses: int
    gains: int


class Sensitivities(Frozen):
    """What rounding each region of a network to each width costs, all else in float.

    Attributes:
        unit: Of the losses.
        widths: The grids of weights.
        losses: By region, one number a width: larger is worse, and a region in float costs 0.
        counts: What the losses were counted from, where they were counted.
        images: How many images were looked at.
        forwards: The cost, in runs of the whole network over all images: by multiplications where only a part
            of it ran; a gradient costs two more, a product with the Hessian six more.
        seconds: How long it took.
    """

    unit: str
    widths: tuple[QuantSpec, ...]
    losses: Mapping[str, tuple[float, ...]]
    counts: Mapping[str, tuple[PairedCounts, ...]] | None = None
    images: int
    forwards: float
    seconds: float


class Sensitivity(Protocol):
    """How sensitivities are found: frozen hyperparameters; a row of the registry's table `sensitivity`."""

    def score(
        self,
        net: Net,
        batches: Sequence[LabelledBatch],
        regions: Sequence[Region],
        widths: Sequence[QuantSpec],
        seed: int = 0,
        tell: Tell | None = None,
    ) -> Sensitivities:
        """Return what each region costs at each width.

        Args:
            net: In float, its BatchNorms folded; stays as it is.
            batches: Images with or without labels; the tensors of one batch are in memory at a time.
            regions: Each is rounded by itself: the weights of its convolutions and matrix products.
            widths: The grids of weights to try.
            seed: Of every random choice.
            tell: Told the fraction done.

        Raises:
            RecipeError: The network is quantized or not folded, a region names a layer that is not there, or
                a grid cannot be one of weights.
            DataError: No image came, or none with the labels that the method needs.
            NetworkError: The network's logits are not finite.
        """
        ...


@dataclass(frozen=True)
class Question:
    """What a row is asked, checked.

    Attributes:
        row: The class that is asked.
        net: A copy of the network, in evaluation mode.
        batches: Those that have images.
        regions: As given.
        widths: As given, with signed codes.
        matrices: The convolutions and matrix products of each region, by its name.
        began: When.
    """

    row: str
    net: Net
    batches: tuple[LabelledBatch, ...]
    regions: tuple[Region, ...]
    widths: tuple[QuantSpec, ...]
    matrices: Mapping[str, tuple[Layer, ...]]
    began: float = field(default_factory=time.perf_counter)

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(len(images) for images, _ in self.batches)

    @property
    def layers(self) -> dict[str, Layer]:
        """The convolutions and matrix products of all regions, by name."""
        return {layer.name: layer for layers in self.matrices.values() for layer in layers}

    def finite(self, logits: Tensor) -> Tensor:
        """Return the float network's logits; raises `NetworkError` where they are not all numbers."""
        if not bool(logits.isfinite().all()):
            bad = int((~logits.isfinite()).any(1).sum())
            raise NetworkError(
                f"{self.net.name}: the logits of {bad} of {len(logits)} images are not finite; "
                "check the network's weights and the card's scale, mean and std"
            )
        return logits

    def answer(
        self,
        unit: str,
        losses: ArrayLike,
        forwards: float,
        counts: Mapping[str, tuple[PairedCounts, ...]] | None = None,
    ) -> Sensitivities:
        """Return the answer from the losses (regions, widths)."""
        rows = np.asarray(losses, np.float64).tolist()
        found = {region.name: tuple(row) for region, row in zip(self.regions, rows, strict=True)}
        for name, row in found.items():
            if not np.isfinite(row).all():
                raise NetworkError(
                    f"{self.row} sensitivity: the losses of region '{name}' are {row}, not all finite; "
                    "check the network's weights and the card's scale, mean and std"
                )
        return Sensitivities(
            unit=unit,
            widths=self.widths,
            losses=found,
            counts=counts,
            images=self.images,
            forwards=forwards,
            seconds=time.perf_counter() - self.began,
        )


def ask(
    row: str,
    net: Net,
    batches: Sequence[LabelledBatch],
    regions: Sequence[Region],
    widths: Sequence[QuantSpec],
    needs_labels: bool = False,
) -> Question:
    """Check what a row is asked; raises as `Sensitivity.score` says."""
    if "placed" in net.facts:
        raise RecipeError(f"{net.name}: is quantized already; give the float network")
    shown = tuple((images, labels) for images, labels in batches if len(images))
    if not shown:
        raise DataError(f"{row} sensitivity: no image came; give at least one, or distil some")
    if "folded" not in net.facts:
        raise RecipeError(f"{net.name}: its BatchNorms are not folded; run the recipe 'float32' on it first")
    if not regions or not widths:
        raise RecipeError(
            f"{row} sensitivity: {len(regions)} regions and {len(widths)} widths; give one of each or more"
        )
    names = [region.name for region in regions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"{row} sensitivity: region '{twice[0]}' comes twice; give each region a name of its own"
        )
    _check_labels(row, net, shown, needs_labels)
    copy = net.clone().eval()
    known = {layer.name: layer for layer in copy.layers()}
    matrices = {
        region.name: _matrices(known.get(name) or copy.layer(name) for name in region.layers)
        for region in regions
    }
    grids = tuple(_grid_of(row, weights=spec) for spec in widths)
    return Question(row, copy, shown, tuple(regions), tuple(s.weights for s in grids), matrices)


def activation_grid(row: str, spec: QuantSpec) -> QuantSpec:
    """Return a grid of activations as a Scheme takes it; raises `RecipeError` where it does not."""
    return _grid_of(row, activations=spec).activations


def _grid_of(row: str, **specs: QuantSpec) -> Scheme:
    return Scheme.from_data(specs, f"{row} sensitivity")


def _matrices(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    return tuple(layer for layer in layers if isinstance(layer.module, nn.Conv2d | nn.Linear))


def _check_labels(row: str, net: Net, batches: Sequence[LabelledBatch], needed: bool) -> None:
    for index, (images, labels) in enumerate(batches):
        where = f"{row} sensitivity: batch {index + 1} of {len(batches)}"
        if images.dim() != 4 or tuple(images.shape[1:]) != net.input_size:
            raise DataError(
                f"{where} has images of shape {tuple(images.shape)}; give (N, C, H, W) with "
                f"(C, H, W) = {net.input_size}"
            )
        if labels is None:
            if needed:
                raise DataError(f"{where} has no labels; give labelled images, or choose a row without them")
            continue
        if labels.shape != images.shape[:1]:
            raise DataError(
                f"{where} has {len(images)} images and labels of shape {tuple(labels.shape)}; "
                "give one label an image"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= net.classes:
            raise DataError(
                f"{where} has labels from {int(labels.min())} to {int(labels.max())}, the network has "
                f"classes 0 to {net.classes - 1}; check its card's classes and labels"
            )
