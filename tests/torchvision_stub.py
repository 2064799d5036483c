"""Lets torchvision be imported beside a torch that its compiled operators do not fit.

`pip install --no-deps torchvision` brings a wheel whose compiled part wants a CUDA torch; its models are
plain Python. Importing it fails only where it registers shapes for two operators of that compiled part, so
those two are declared first. Nothing here computes anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def declare_operators() -> None:
    """Declare torchvision's operators where its own compiled part has not."""
    global _library
    if _library is None:
        try:
            importlib.import_module("torchvision")
        except (RuntimeError, ImportError):
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                _library.define(operator)


def need(package: str) -> None:
    """Skip the test where torchvision or timm is missing; on CI fail."""
    missing = [name for name in sorted({"torchvision", package}) if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"needs {' and '.join(missing)}: pip install --no-deps torchvision==0.28.* timm pyyaml"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    declare_operators()
    importlib.import_module(package)
