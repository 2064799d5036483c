"""A card's source becomes a model with its weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fewbit.errors import NetworkError, first_line, suggest
from fewbit.load.card import Card, Source
from fewbit.load.weights import check_finite, put_weights, read_weights


def build_model(card: Card, seed: int = 0) -> nn.Module:
    """Build the model of a card and read its weights.

    Args:
        card: Its source is a Python file, a package, or a model of torchvision or timm.
        seed: Of the initial weights where the card names no weights file.

    Returns:
        The model, in evaluation mode, in float32.

    Raises:
        NetworkError: The factory is missing or fails, or the weights cannot be read or do not fit.
    """
    name, source = card.network.name, card.source
    folder = source.path.parent if source.path is not None else card.folder
    with _importable(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory = _factory(source)
        model = _call(factory, source, card.network.arguments)
    if card.weights_path is not None:
        put_weights(model, read_weights(card.weights_path), name, card.weights_path)
    check_finite(model.state_dict().items(), str(card.weights_path or f"network '{name}'"))
    return model.float().eval()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules beside the user's file be imported meanwhile, and forget them afterwards.

    Two cards of different folders may so each have their own `blocks.py`.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for key in set(sys.modules) - before:
            origin = getattr(sys.modules[key], "__file__", None)
            if origin and Path(origin).resolve().is_relative_to(folder.resolve()):
                del sys.modules[key]


def _factory(source: Source) -> Callable[..., Any]:
    if source.kind == "file":
        assert source.path is not None
        return _attribute(_run_file(source.path), source.factory, str(source.path))
    if source.kind == "torchvision":
        return _attribute(_package("torchvision.models", source), source.factory, "torchvision.models")
    if source.kind == "timm":
        timm = _package("timm", source)
        known = timm.list_models()
        if source.factory not in known:
            raise NetworkError(
                f"timm: has no model '{source.factory}'{suggest(source.factory, known)}; name one that it has"
            )
        return lambda **arguments: timm.create_model(source.factory, **arguments)
    return _attribute(_package(source.module, source), source.factory, source.module)


def _run_file(path: Path) -> ModuleType:
    """Import a Python file under a name of its own."""
    if not path.is_file():
        raise NetworkError(f"{path}: there is no such file; correct [network] source")
    name = f"fewbit_source_{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as reason:
        raise NetworkError(f"{path}: cannot be imported ({_describe(reason)}); correct the file") from reason
    return module


def _package(module: str, source: Source) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as reason:
        missing = str(reason.name)
        if source.kind in ("torchvision", "timm") and missing.partition(".")[0] == source.kind:
            raise NetworkError(
                f"source '{source.kind}:{source.factory}' needs the package {source.kind}, "
                f"which is not installed; pip install {source.kind}"
            ) from reason
        raise NetworkError(
            f"source '{module}:{source.factory}': there is no module '{missing}'; "
            "install it, or run where it can be imported"
        ) from reason
    except (Exception, SystemExit) as reason:
        raise NetworkError(
            f"module '{module}': cannot be imported ({_describe(reason)}); correct or reinstall it"
        ) from reason


def _attribute(module: ModuleType, factory: str, place: str) -> Callable[..., Any]:
    value: Any = module
    for part in factory.split("."):
        known = [key for key in vars(value) if not key.startswith("_")]
        if part not in known and not hasattr(value, part):
            raise NetworkError(
                f"{place}: has no factory '{part}'{suggest(part, known)}; correct [network] source"
            )
        value = getattr(value, part)
    if not callable(value):
        raise NetworkError(
            f"{place}: '{factory}' is a {type(value).__name__}, not a function that returns a model; "
            "correct [network] source"
        )
    return value  # type: ignore[no-any-return]


def _call(factory: Callable[..., Any], source: Source, arguments: dict[str, Any]) -> nn.Module:
    told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    call = f"{source.path or source.module}: {source.factory}({told})"
    try:
        model = factory(**arguments)
    except (Exception, SystemExit) as reason:
        raise NetworkError(
            f"{call} failed with {_describe(reason)}; correct [network] arguments or the factory"
        ) from reason
    if not isinstance(model, nn.Module):
        raise NetworkError(
            f"{call} returned an object of type {type(model).__name__}, not a torch.nn.Module; "
            "name a factory that returns the model"
        )
    return model


def _describe(reason: BaseException) -> str:
    name, line = type(reason).__name__, first_line(reason)
    return name if line == name else f"{name}: {line}"
