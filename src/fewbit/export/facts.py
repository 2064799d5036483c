"""What an exported file says about itself; `fewbit.load.exported` reads it back."""

from __future__ import annotations

import json

from fewbit.data.image_set import ImageSet
from fewbit.data.images import read_labels
from fewbit.load.card import Card
from fewbit.recipe import Recipe


def describe_export(
    card: Card, recipe: Recipe, engine: str, images: ImageSet | None, exact_sums: bool = True
) -> dict[str, str]:
    """Return the metadata to put into an exported file, so that it can be evaluated without its card.

    Args:
        card: Of the network.
        recipe: How it was made.
        engine: What it was made for.
        images: The calibration images, none where there are none; those that the recipe used are named, for
            they must not evaluate the file. Of their source only the name is kept, not the folder.
        exact_sums: Whether the processors that it is made for sum products of u8 and s8 exactly.
    """
    labels = None if card.labels_path is None else read_labels(card.labels_path, card.network.classes)
    facts = {
        "network": card.network.name,
        "classes": card.network.classes,
        "input": card.input.model_dump(mode="json"),
        "labels": labels,
        "calibration_images": sorted(set(images.hashes)) if images is not None and recipe.uses_images else [],
    }
    if recipe.places:
        facts["sums"] = "exact" if exact_sums else "saturating"
    return {
        "card": json.dumps(facts, sort_keys=True, separators=(",", ":")),
        "recipe": recipe.to_toml(),
        "engine": engine if recipe.places else "",
    }
