"""fewbit: a trained CNN, labelled images and an error budget in; the fastest network inside the budget out.

The names below are imported when they are first used, so that `import fewbit` is fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from fewbit.version import __version__ as __version__

# OpenMP's threads spin at barriers: on cores that others use too, torch then takes ten times as long. Without
# any spinning each barrier waits for a thread to be woken; a moment of it costs neither.
# Read when torch is loaded, so it is said before; what the user has set stands.
if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

if TYPE_CHECKING:
    from fewbit.data.image_set import ImageSet as ImageSet
    from fewbit.data.images import open_images as open_images
    from fewbit.engines.process import EngineProcess as EngineProcess
    from fewbit.engines.session import Setting as Setting
    from fewbit.errors import FewbitError as FewbitError
    from fewbit.export.facts import describe_export as describe_export
    from fewbit.export.onnx_out import export_onnx as export_onnx
    from fewbit.load.capture import capture as capture
    from fewbit.load.capture import load as load_network  # noqa: F401
    from fewbit.load.card import Card as Card
    from fewbit.load.card import read_card as read_card
    from fewbit.measure.accuracy import Predictions as Predictions
    from fewbit.measure.accuracy import compare as compare
    from fewbit.measure.speed import measure_interleaved as measure_interleaved
    from fewbit.net import Net as Net
    from fewbit.place.targets import target as target
    from fewbit.recipe import Recipe as Recipe
    from fewbit.recipe import image_context as image_context
    from fewbit.recipe import read_recipe as read_recipe
    from fewbit.recipe import run_recipe as run_recipe
    from fewbit.search.budget import parse_budget as parse_budget
    from fewbit.search.options import StudyOptions as StudyOptions
    from fewbit.search.study import run_study as run_study
    from fewbit.spec import QuantSpec as QuantSpec
    from fewbit.spec import Rule as Rule
    from fewbit.spec import Scheme as Scheme

_WHERE = {
    "Card": "load.card",
    "EngineProcess": "engines.process",
    "FewbitError": "errors",
    "ImageSet": "data.image_set",
    "Net": "net",
    "Predictions": "measure.accuracy",
    "QuantSpec": "spec",
    "Recipe": "recipe",
    "Rule": "spec",
    "Scheme": "spec",
    "Setting": "engines.session",
    "StudyOptions": "search.options",
    "capture": "load.capture",
    "compare": "measure.accuracy",
    "describe_export": "export.facts",
    "export_onnx": "export.onnx_out",
    "image_context": "recipe",
    "load_network": "load.capture:load",
    "measure_interleaved": "measure.speed",
    "open_images": "data.images",
    "parse_budget": "search.budget",
    "read_card": "load.card",
    "read_recipe": "recipe",
    "run_recipe": "recipe",
    "run_study": "search.study",
    "target": "place.targets",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fewbit' has no attribute '{name}'; it has {', '.join(__all__)}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(f"fewbit.{module}"), attribute or name)
    globals()[name] = value
    return value
