"""Weights files: safetensors or a plain state dict, read without executing anything in them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbit.errors import NetworkError, first_line

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_NESTS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file.

    Args:
        path: `.safetensors`, or a state dict that `torch.save` wrote (`.pt`, `.pth`, `.bin`, `.ckpt`,
            `.tar`), which may lie under the key "state_dict", "model_state_dict", "model" or "net".

    Returns:
        Name -> tensor; floating-point ones as float32, a common prefix "module." taken off.

    Raises:
        NetworkError: The file is of another kind, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        state: Any = _read_safetensors(path)
    elif path.suffix in _PICKLED:
        state = _read_state_dict(path)
    else:
        raise NetworkError(
            f"{path}: is no kind of weights file that is read; give one that ends with "
            f".safetensors, or a state dict ({', '.join(_PICKLED)})"
        )
    state = _unwrap(state)
    if not isinstance(state, Mapping) or not state:
        raise NetworkError(
            f"{path}: holds {_what(state)}, not a state dict; save model.state_dict() with safetensors"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise NetworkError(
                f"{path}: key '{key}' holds {_what(value)}, not a tensor; save model.state_dict() alone"
            )
    return {_short(str(key), state): _as_float(path, str(key), value) for key, value in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except FileNotFoundError as reason:
        raise _missing(path) from reason
    except (safetensors.SafetensorError, OSError, ValueError) as reason:
        raise NetworkError(
            f"{path}: is cut short or damaged ({first_line(reason)}); copy or download it again"
        ) from reason


def _read_state_dict(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is told below, or is no harm
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as reason:
        raise _missing(path) from reason
    except Exception as reason:
        refused = _refused(str(reason), path)
        if refused:
            raise NetworkError(
                f"{path}: is a pickle that is not a plain state dict ({refused}); nothing in it was "
                "executed: save model.state_dict() with safetensors"
            ) from reason
        line = "not written by torch.save" if "weights_only" in str(reason) else first_line(reason)
        raise NetworkError(f"{path}: is cut short or damaged ({line}); copy or download it again") from reason


def _refused(text: str, path: Path) -> str:
    """Find in torch's message what it refused to build; nothing for a file that is only damaged."""
    found = re.search(r"nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", text)
    if found:
        return f"it asks for {found[1]}"
    if "TorchScript" in text:
        return "a TorchScript archive"
    with path.open("rb") as file:
        pickled = file.read(2) in (b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return "not written by torch.save" if pickled and "Unsupported operand" in text else ""


def _missing(path: Path) -> NetworkError:
    return NetworkError(f"{path}: there is no such weights file; correct [network] weights")


def _unwrap(state: Any) -> Any:
    while isinstance(state, Mapping) and not all(isinstance(v, Tensor) for v in state.values()):
        inner = next((state[key] for key in _NESTS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            return state
        state = inner
    return state


def _what(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict" if value else "an empty dict"
    return (
        f"{type(value).__name__} {value!r}"[:40]
        if isinstance(value, int | float | str)
        else (f"an object of type {type(value).__name__}")
    )


def _short(key: str, state: Mapping[Any, Any]) -> str:
    for prefix in _PREFIXES:
        if all(str(other).startswith(prefix) for other in state):
            key = key.removeprefix(prefix)
    return key


def _as_float(path: Path, key: str, value: Tensor) -> Tensor:
    if value.is_quantized or value.dtype in (torch.int8, torch.uint8):
        raise NetworkError(
            f"{path}: tensor '{key}' is stored as {value.dtype}: it is already quantized; "
            "give the float weights"
        )
    if value.dtype in _FLOATS:
        return value.float()
    if value.is_floating_point() or value.is_complex():
        raise NetworkError(
            f"{path}: tensor '{key}' is stored as {value.dtype}; give float16, bfloat16 or float32"
        )
    return value


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Copy weights into a model whose keys and shapes must be the same.

    Args:
        model: Takes the weights.
        weights: From `read_weights`.
        name: Of the network, for messages.
        path: Of the weights file, for messages.

    Raises:
        NetworkError: Keys are missing or not known to the model, or shapes differ.
    """
    state = model.state_dict()
    missing = [k for k in state if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in state]
    wrong = [k for k in weights if k in state and weights[k].shape != state[k].shape]
    faults = []
    if missing:
        faults.append(f"lacks {_some(missing)}")
    if unexpected:
        faults.append(f"has {_some(unexpected)} which the model does not know")
    if wrong:
        shapes = [f"{k} {tuple(weights[k].shape)} for {tuple(state[k].shape)}" for k in wrong]
        faults.append(f"has other shapes than the model: {_some(shapes)}")
    if faults:
        raise NetworkError(
            f"{path}: does not fit network '{name}': {'; '.join(faults)}; "
            "give the weights of this factory with these arguments"
        )
    model.load_state_dict(dict(weights), strict=False)


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more ({len(items)} in all)"


def check_finite(tensors: Iterable[tuple[str, Tensor]], place: str) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        tensors: (name, tensor) pairs.
        place: The file or network they are of.

    Raises:
        NetworkError: One is; the message names the tensor.
    """
    for key, value in tensors:
        if value.is_floating_point():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise NetworkError(
                    f"{place}: tensor '{key}' has {bad} values of {value.numel()} that are NaN or infinite; "
                    "give weights of a training that converged"
                )
