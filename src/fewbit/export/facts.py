"""What an exported file says about itself; `fewbit.load.exported` reads it back."""

from __future__ import annotations

import json
from typing import Literal

from fewbit.data.image_set import ImageSet
from fewbit.data.images import read_labels
from fewbit.load.card import Card
from fewbit.net import Net
from fewbit.place.place import FITTING_BITS, is_depthwise
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.ranges.calibrate import input_quantizer
from fewbit.recipe import Recipe

Sums = Literal["exact", "saturating"]


def sums_of(net: Net, exact_sums: bool) -> Sums | None:
    """Return for which processors a network's file is: by how they add products of u8 and s8.

    Args:
        net: Quantized.
        exact_sums: Of the Target that it was placed for.

    Returns:
        None where every processor gives the same: no layer but depthwise ones multiplies codes by weights
        that have, or were kept from having, 8 bits.
    """
    bits = {
        layer.module.weight_quantizer.spec.bits
        for layer in net.layers()
        if isinstance(layer.module, QuantConv2d | QuantLinear)
        and not is_depthwise(layer.module)
        and input_quantizer(net, layer.node) is not None
    }
    if exact_sums:
        return "exact" if 8 in bits else None
    return "saturating" if FITTING_BITS in bits else None


def describe_export(
    card: Card, recipe: Recipe, engine: str, images: ImageSet | None, sums: Sums | None = None
) -> dict[str, str]:
    """Return the metadata to put into an exported file, so that it can be evaluated without its card.

    Args:
        card: Of the network.
        recipe: How it was made.
        engine: What it was made for.
        images: The calibration images, none where there are none; those that the recipe used are named, for
            they must not evaluate the file. Of their source only the name is kept, not the folder.
        sums: See `sums_of`.
    """
    labels = None if card.labels_path is None else read_labels(card.labels_path, card.network.classes)
    facts = {
        "network": card.network.name,
        "classes": card.network.classes,
        "input": card.input.model_dump(mode="json"),
        "labels": labels,
        "calibration_images": sorted(set(images.hashes)) if images is not None and recipe.uses_images else [],
    }
    if sums is not None:
        facts["sums"] = sums
    return {
        "card": json.dumps(facts, sort_keys=True, separators=(",", ":")),
        "recipe": recipe.to_toml(),
        "engine": engine if recipe.places else "",
    }
