"""What values each tensor may take: frozen data with a round trip to TOML and JSON, no tensors inside."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError, to_jsonable_python

from fewbit.errors import InputError, RecipeError, suggest

Granularity = Literal["tensor", "channel"]
Mode = Literal["static", "dynamic", "weights_only"]
ImageInput = Literal["float32", "uint8"]
"""What a file takes: preprocessed float32 images (N, C, H, W), or uint8 pixels (N, H, W, C)."""
SiluForm = Literal["gelu", "hard_swish"]
"""What takes the place of SiLU; see `fewbit.prepare.replace_silu`."""
PASSES = "fewbit.passes"
"""Metadata of the nodes of a file that round nothing in the engine that it is for."""

_LONGEST = 80


class Frozen(BaseModel):
    """Frozen data: unknown keys are refused, equal content has an equal digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """Return 12 hexadecimal digits that name the content."""
        text = json.dumps(_plain(self.model_dump()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_toml(self) -> str:
        """Return the content as TOML; keys whose value is None are left out."""
        return tomli_w.dumps(_plain(self.model_dump(exclude_none=True)))

    @classmethod
    def from_toml(cls, text: str, name: str = "text", error: type[InputError] = RecipeError) -> Self:
        """Read the content back.

        Args:
            text: TOML.
            name: What to call it in an error.
            error: The class of error to raise.

        Raises:
            InputError: It does not parse, or has unknown or wrong keys (of class `error`).
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as reason:
            raise error(f"{name}: is not TOML ({reason}); correct that line") from reason
        return cls.from_data(data, name, error)

    @classmethod
    def from_data(cls, data: object, name: str = "data", error: type[InputError] = RecipeError) -> Self:
        """Check plain data and build from it; raises like `from_toml`."""
        if not isinstance(data, Mapping | cls):
            raise error(f"{name}: is no table of keys but a {type(data).__name__}; give keys and values")
        try:
            return cls.model_validate(data)
        except ValidationError as reason:
            raise error(f"{name}: {explain(reason, cls)}") from reason


def _plain(value: Any) -> Any:
    """Return what JSON and TOML can hold; a set, which has no order of its own, as a sorted list."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return sorted(value) if isinstance(value, set | frozenset) else to_jsonable_python(value)


def explain(reason: ValidationError, model: type[BaseModel]) -> str:
    """Say the first fault of a validation in one line: the key, what came, what is allowed.

    An unknown key goes first: a key that is missing is often the same one, misspelt.
    """
    faults = reason.errors(include_url=False)
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1])
        near = suggest(str(first["loc"][-1]), known)
        return f"unknown key '{place}'{near}; known here: {', '.join(sorted(known)) or 'none'}"
    if first["type"] == "missing":
        return f"key '{place}' is missing; add it"
    came = "not given" if first["input"] is None else repr(first["input"])
    if len(came) > _LONGEST:
        came = f"{came[:_LONGEST]}..."
    return f"key '{place}' is {came}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in place:
        if isinstance(part, int) or not hasattr(current, "model_fields") or part not in current.model_fields:
            continue
        annotation = current.model_fields[part].annotation
        inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        current = inner[0] if inner else current
    return list(current.model_fields)


class QuantSpec(Frozen):
    """The grid of one tensor.

    Attributes:
        bits: Width of a code, 2 to 8 for the uniform grid.
        symmetric: Zero point fixed: 0 for signed codes; 0 for unsigned codes too.
        signed: Signed codes. In a Scheme weights always are, and so are symmetric activations: a tensor
            that is never negative (after ReLU) takes unsigned codes all the same, which doubles its
            resolution.
        granularity: One scale a tensor, or one an output channel (weights only).
        grid: Set of values. "uniform": whole multiples of the scale. "power": ``sign(q) |q|^(1/p)`` times the
            scale, p of each layer or channel found with it; for weights in mode "weights_only", as integer
            arithmetic wants uniform values.
        power_of_two: Scales are powers of two, so that requantizing is a shift. A range takes the smallest
            such scale that covers it; methods that search for the least error compare the ranges with the
            scales that they will have.

    Weights that are not symmetric run in integers on ONNX Runtime; OpenVINO computes them in float.
    """

    bits: int = Field(8, ge=1, le=8)
    symmetric: bool = False
    signed: bool = False
    granularity: Granularity = "tensor"
    grid: Literal["uniform", "power"] = "uniform"
    power_of_two: bool = False

    def code_range(self, unsigned: bool = False) -> tuple[int, int]:
        """Return (qmin, qmax). Symmetric signed codes are restricted: never -2^(b-1).

        >>> QuantSpec(bits=8, symmetric=True, signed=True).code_range()
        (-127, 127)
        >>> QuantSpec(bits=4).code_range()
        (0, 15)
        """
        if not self.signed or unsigned:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return (-top if self.symmetric else -top - 1), top


def _check_bits(spec: QuantSpec) -> None:
    if spec.bits < 2:
        raise PydanticCustomError("bits", "the uniform grid has 2 to 8 bits; give bits = 2 or more")


def _of_weights(spec: QuantSpec) -> QuantSpec:
    """Return the spec with signed codes, which weights always have."""
    _check_bits(spec)
    if spec.grid == "power" and (not spec.symmetric or spec.power_of_two):
        raise PydanticCustomError(
            "grid",
            "the power grid is symmetric and its scales are no powers of two; give symmetric = true and "
            "power_of_two = false",
        )
    return spec if spec.signed else spec.model_copy(update={"signed": True})


def _of_activations(spec: QuantSpec) -> QuantSpec:
    """Return the spec with signed codes where it is symmetric: the zero point 0 would cut all below 0 off."""
    _check_bits(spec)
    if spec.granularity == "channel":
        raise PydanticCustomError(
            "granularity", 'activations have one scale a tensor; give granularity = "tensor"'
        )
    if spec.grid != "uniform":
        raise PydanticCustomError("grid", 'activations are on the uniform grid; give grid = "uniform"')
    return spec.model_copy(update={"signed": True}) if spec.symmetric and not spec.signed else spec


class Rule(Frozen):
    """An exception to a Scheme for the layers that it matches.

    Attributes:
        match: A layer's name; where no layer has it, a glob over names ("layer1.*"), "first" / "last"
            (the first or last convolution or matrix product), or "input" (the image).
        keep_float: Leave these layers in float.
        weights: The grid of their weights, where it differs.
        activations: The grid of their outputs, where it differs.
        inputs: The grid of what they read, where it differs; convolutions and matrix products only. It goes
            before the grid that the layer which makes the tensor asks for.
    """

    match: str
    keep_float: bool = False
    weights: QuantSpec | None = None
    activations: QuantSpec | None = None
    inputs: QuantSpec | None = None

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, spec: QuantSpec | None) -> QuantSpec | None:
        return None if spec is None else _of_weights(spec)

    @field_validator("activations", "inputs")
    @classmethod
    def _check_activations(cls, spec: QuantSpec | None) -> QuantSpec | None:
        return None if spec is None else _of_activations(spec)


class Scheme(Frozen):
    """Which values each tensor of a network may take.

    Attributes:
        mode: "static" (activation grids fixed by calibration), "dynamic" (taken from each sample at run
            time, never over the batch), or "weights_only" (arithmetic stays in float).
        weights: The grid of weights.
        activations: The grid of activations; the Target may narrow it to what its engine runs fast.
        rules: Exceptions; the first that matches a layer holds.
    """

    mode: Mode = "static"
    weights: QuantSpec = QuantSpec(bits=8, symmetric=True, signed=True, granularity="channel")
    activations: QuantSpec = QuantSpec(bits=8)
    rules: tuple[Rule, ...] = ()

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, spec: QuantSpec) -> QuantSpec:
        return _of_weights(spec)

    @field_validator("activations")
    @classmethod
    def _check_activations(cls, spec: QuantSpec) -> QuantSpec:
        return _of_activations(spec)
