"""Operators that move, select or map values, by ONNX type; codes stay codes where values are only moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from fewbit import numerics
from fewbit.engines.reference_graph import Array, Coded, Node, Value, floats
from fewbit.engines.reference_layers import Arguments, Operator, conv_geometry

TYPES: dict[int, type[np.generic]] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.BOOL: np.bool_,
}

Mover = Callable[[Node, Array, Sequence[Any]], Array | tuple[Array, ...]]


def moves(mover: Mover) -> Operator:
    """Make an operator of a function that only moves or selects values of its first input."""

    def operator(node: Node, arguments: Arguments) -> Value | tuple[Value, ...]:
        x, *rest = arguments
        if x is None:
            raise node.error("has no input")
        others = [None if value is None else floats(value) for value in rest]
        if not isinstance(x, Coded) or x.axis is not None:
            return mover(node, floats(x), others)
        found = mover(node, x.codes, others)
        return tuple(map(x.moved, found)) if isinstance(found, tuple) else x.moved(found)

    return operator


def maps(function: Callable[..., Array], **attributes: float) -> Operator:
    """Make an operator of a function of floats; `attributes` are its ONNX attributes with their defaults."""

    def operator(node: Node, arguments: Arguments) -> Array:
        values = [None if value is None else floats(value) for value in arguments]
        return function(*values, **{key: node.number(key, value) for key, value in attributes.items()})

    return operator


def pairs(on_floats: Callable[..., Array], on_integers: Callable[..., Array]) -> Operator:
    """Make an operator of two inputs: floats go one way, whole numbers (shapes, accumulators) the other."""

    def operator(_node: Node, arguments: Arguments) -> Array:
        x, y = (floats(value) for value in arguments if value is not None)
        if np.issubdtype(x.dtype, np.floating):
            return on_floats(x, y)
        return np.asarray(on_integers(x, y)).astype(np.result_type(x, y), copy=False)

    return operator


def rows(function: Callable[[Array], Array]) -> Operator:
    """Make an operator of a function of float64, rounded once."""
    return maps(lambda x: np.asarray(function(x.astype(np.float64))).astype(np.float32))


def compares(function: Callable[..., Array]) -> Operator:
    """Make an operator that compares or joins truths."""
    return maps(lambda *values: np.asarray(function(*values)))


def chained(function: Callable[[Array, Array], Array]) -> Operator:
    """Make an operator of any number of inputs that folds them from the left."""

    def operator(_node: Node, arguments: Arguments) -> Array:
        values = [floats(value) for value in arguments if value is not None]
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result

    return operator


def reduces(
    function: Callable[[Array, tuple[int, ...]], Array],
) -> Callable[[Node, Array, Sequence[Any]], Array]:
    """Make a reducing function: axes come as an attribute or, later, as an input."""

    def reduce(node: Node, x: Array, others: Sequence[Any]) -> Array:
        given = others[0].tolist() if others and others[0] is not None else node.integers("axes", [])
        if not given and node.integer("noop_with_empty_axes", 0):
            return x
        axes = tuple(sorted(axis % x.ndim for axis in given or range(x.ndim)))
        result = function(x, axes)
        return np.expand_dims(result, axes) if node.integer("keepdims", 1) else result

    return reduce


def on_floats(mover: Mover) -> Operator:
    """Make an operator of a function that computes new values from its first input."""

    def operator(node: Node, arguments: Arguments) -> Value | tuple[Value, ...]:
        x, *others = (None if value is None else floats(value) for value in arguments)
        assert x is not None
        return mover(node, x, others)

    return operator


def concat(node: Node, arguments: Arguments) -> Value:
    """Concat: of one grid a copy of codes, else of floats."""
    given = [value for value in arguments if value is not None]
    axis = node.integer("axis", 0)
    first = given[0]
    if isinstance(first, Coded) and all(isinstance(v, Coded) and first.same_grid(v) for v in given):
        return first.moved(np.concatenate([v.codes for v in given if isinstance(v, Coded)], axis))
    return np.concatenate([floats(value) for value in given], axis)


def transpose(node: Node, arguments: Arguments) -> Value:
    """Transpose; per channel parameters move along."""
    x = arguments[0]
    assert x is not None
    order = node.integers("perm", range((x.codes if isinstance(x, Coded) else x).ndim)[::-1])
    if not isinstance(x, Coded):
        return x.transpose(order)
    axis = None if x.axis is None else order.index(x.axis)
    return Coded(x.codes.transpose(order), x.scale, x.zero_point, axis)


def pad(node: Node, arguments: Arguments) -> Value:
    """Pad; zeros of a coded tensor are its zero point."""
    x, amounts, fill, axes = [*arguments, None, None][:4]
    assert x is not None and amounts is not None
    mode = node.text("mode", "constant")
    value = 0.0 if fill is None else floats(fill).reshape(()).item()
    coded = isinstance(x, Coded) and x.axis is None and (mode != "constant" or value == 0.0)
    values = x.codes if coded and isinstance(x, Coded) else floats(x)
    if coded and isinstance(x, Coded):
        value = int(x.zero_point)
    counts = floats(amounts).tolist()
    over = range(values.ndim) if axes is None else [axis % values.ndim for axis in floats(axes).tolist()]
    if min(counts, default=0) < 0 or mode not in ("constant", "reflect", "edge"):
        raise node.error(
            f"mode '{mode}' with amounts {counts} is not known; pad by constant, reflect or edge"
        )
    widths = [(0, 0)] * values.ndim
    for place, axis in enumerate(over):
        widths[axis] = (counts[place], counts[place + len(over)])
    if mode == "constant":
        result = np.pad(values, widths, constant_values=value)
    else:
        result = np.pad(values, widths, mode="reflect" if mode == "reflect" else "edge")
    return x.moved(result) if coded and isinstance(x, Coded) else result


def max_pool(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """MaxPool."""
    kernel = node.integers("kernel_shape", [])
    strides, pads, dilations = conv_geometry(node, x.shape, kernel)
    return numerics.max_pool(x, kernel, strides, pads, dilations, bool(node.integer("ceil_mode", 0)))


def average_pool(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """AveragePool."""
    kernel = node.integers("kernel_shape", [])
    strides, pads, dilations = conv_geometry(node, x.shape, kernel)
    ceil, count = bool(node.integer("ceil_mode", 0)), bool(node.integer("count_include_pad", 0))
    return numerics.average_pool(x, kernel, strides, pads, ceil, count, dilations)


def reshape(node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Reshape; 0 keeps a size."""
    sizes = others[0].tolist()
    if not node.integer("allowzero", 0):
        sizes = [x.shape[d] if size == 0 else size for d, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """Flatten to two axes."""
    axis = node.integer("axis", 1)
    front = x.shape[:axis] if axis >= 0 else x.shape[: x.ndim + axis]
    return x.reshape(int(np.prod(front)), -1)


def squeeze(_node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Squeeze axes of size 1."""
    return x.squeeze(tuple(others[0].tolist()) if others and others[0] is not None else None)


def unsqueeze(_node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Unsqueeze: put in axes of size 1."""
    return np.expand_dims(x, tuple(others[0].reshape(-1).tolist()))


def slice_(_node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Slice; ends reach as far as there is something."""
    starts, ends, axes, steps = ([] if v is None else v.tolist() for v in [*others, None, None][:4])
    at = [slice(None)] * x.ndim
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[place] if axes else place
        step, size = (steps[place] if steps else 1), x.shape[axis]
        start, end = (n + size if n < 0 else n for n in (start, end))
        if step > 0:
            at[axis] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:
            last = min(max(end, -1), size - 1)
            at[axis] = slice(min(max(start, 0), size - 1), None if last < 0 else last, step)
    return x[tuple(at)]


def split(node: Node, x: Array, others: Sequence[Any]) -> tuple[Array, ...]:
    """Split into given sizes, or into equal ones with a smaller last."""
    axis, count = node.integer("axis", 0), len(node.outputs)
    if others and others[0] is not None:
        sizes = others[0].tolist()
    else:
        each = -(-x.shape[axis] // count)
        sizes = [each] * (count - 1)
    return tuple(np.split(x, np.cumsum(sizes)[: count - 1], axis))


def gather(node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Gather along an axis."""
    return np.asarray(np.take(x, others[0], axis=node.integer("axis", 0)))


def expand(_node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Expand by broadcasting."""
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(others[0].tolist())))


def depth_to_space(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """DepthToSpace (pixel shuffle)."""
    n, c, h, w = x.shape
    size = node.integer("blocksize", 1)
    if node.text("mode", "DCR") == "DCR":
        parts = x.reshape(n, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // size**2, h * size, w * size)


def resize(node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Resize by nearest neighbours: a choice of rows and columns."""
    _roi, scales, sizes = [*others, None, None, None][:3]
    if (
        node.text("mode", "nearest") != "nearest"
        or node.text("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise node.error("only mode 'nearest' with policy 'stretch' is known")
    axes = node.integers("axes", range(x.ndim))
    for place, axis in enumerate(axes):
        size = x.shape[axis]
        if sizes is not None and sizes.size:
            out = int(sizes[place])
            factor = out / size
        else:
            factor = float(scales[place])
            out = int(np.floor(size * factor))
        if (out, factor) != (size, 1.0):
            x = np.take(x, _nearest(node, size, out, factor), axis)
    return x


def _nearest(node: Node, size: int, out: int, factor: float) -> NDArray[np.int64]:
    places = np.arange(out, dtype=np.float64)
    frame = node.text("coordinate_transformation_mode", "half_pixel")
    if frame == "asymmetric":
        source = places / factor
    elif frame == "align_corners":
        source = places * ((size - 1) / (out - 1)) if out > 1 else np.zeros(1)
    elif frame in ("half_pixel", "pytorch_half_pixel"):
        source = (places + 0.5) / factor - 0.5
        source = np.zeros(1) if frame == "pytorch_half_pixel" and out == 1 else source
    else:
        raise node.error(f"coordinate_transformation_mode '{frame}' is not known")
    rounding: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "round_prefer_floor": lambda s: np.ceil(s - 0.5),
        "round_prefer_ceil": lambda s: np.floor(s + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
    mode = node.text("nearest_mode", "round_prefer_floor")
    return np.clip(rounding[mode](source), 0, size - 1).astype(np.int64)


def shape(node: Node, arguments: Arguments) -> Array:
    """Shape, or a part of it."""
    x = arguments[0]
    sizes = (x.codes if isinstance(x, Coded) else np.asarray(x)).shape
    end = node.integer("end", len(sizes))
    return np.array(sizes[node.integer("start", 0) : end], np.int64)


def constant(node: Node, _arguments: Arguments) -> Array:
    """Constant, in any of its forms."""
    (key, value), *_ = node.attributes.items()
    kinds: dict[str, type[np.generic] | None] = {
        "value": None,
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if key not in kinds:
        raise node.error(f"attribute '{key}' is not known")
    return np.asarray(value, kinds[key])


def constant_of_shape(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """ConstantOfShape."""
    value = np.asarray(node.attributes.get("value", np.zeros(1, np.float32)))
    return np.full(x.tolist(), value.reshape(()), value.dtype)


def cast(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """Cast; floats go to whole numbers toward zero."""
    to = node.integer("to", 0)
    if to not in TYPES:
        known = ", ".join(t.__name__ for t in TYPES.values())
        raise node.error(f"casts to {onnx.TensorProto.DataType.Name(to)}; known are {known}")
    return x.astype(TYPES[to])


def clip(_node: Node, x: Array, others: Sequence[Any]) -> Array:
    """Clip; a missing bound is none. Codes stay codes."""
    low, high = [*others, None, None][:2]
    if np.issubdtype(x.dtype, np.integer):
        limits = np.iinfo(x.dtype)
        return x.clip(limits.min if low is None else low, limits.max if high is None else high)
    return numerics.clip(x, low, high)


def softmax(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """Softmax."""
    return numerics.softmax(x, node.integer("axis", -1))


def log_softmax(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """LogSoftmax."""
    return numerics.log_softmax(x, node.integer("axis", -1))


def passes(_node: Node, x: Array, others: Sequence[Any]) -> Array:
    """A pair of an int8 grid at which an engine clamps and does not round."""
    scale = others[0]
    return x.clip(-128 * scale, 127 * scale)


def gelu(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """Gelu."""
    return numerics.gelu(x, node.text("approximate", "none"))


def batch_normalization(node: Node, x: Array, others: Sequence[Any]) -> Array:
    """BatchNormalization, of running statistics only."""
    if node.integer("training_mode", 0):
        raise node.error("is in training mode; export the network in eval mode")
    scale, bias, mean, variance = others[:4]
    return numerics.batch_norm(x, scale, bias, mean, variance, node.number("epsilon", 1e-5))


def layer_normalization(node: Node, x: Array, others: Sequence[Any]) -> Array:
    """LayerNormalization."""
    scale, bias = [*others, None][:2]
    return numerics.layer_norm(x, scale, bias, node.integer("axis", -1), node.number("epsilon", 1e-5))


def lrn(node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """LRN: local response normalization across channels."""
    numbers = (node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0))
    return numerics.local_response_norm(x, node.integer("size", 1), *numbers)


def global_average(_node: Node, x: Array, _others: Sequence[Any]) -> Array:
    """GlobalAveragePool."""
    return numerics.mean(x, range(2, x.ndim))


def where(_node: Node, arguments: Arguments) -> Array:
    """Where."""
    condition, x, y = (floats(value) for value in arguments if value is not None)
    return np.where(condition, x, y)


def _divide_integers(x: Array, y: Array) -> Array:
    return np.asarray(np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)))


def _sum(x: Array, axes: tuple[int, ...]) -> Array:
    return np.asarray(x.sum(axis=axes, dtype=np.float64 if x.dtype == np.float32 else None)).astype(x.dtype)


OPERATORS: dict[str, Operator] = {
    # Values stay as they are.
    "Identity": moves(lambda _node, x, _others: x),
    "Dropout": moves(lambda _node, x, _others: x),
    "Passes": on_floats(passes),
    "Flatten": moves(flatten),
    "Reshape": moves(reshape),
    "Squeeze": moves(squeeze),
    "Unsqueeze": moves(unsqueeze),
    "Slice": moves(slice_),
    "Split": moves(split),
    "Gather": moves(gather),
    "Expand": moves(expand),
    "Tile": moves(lambda _node, x, others: np.tile(x, others[0].tolist())),
    "DepthToSpace": moves(depth_to_space),
    "Resize": moves(resize),
    "MaxPool": moves(max_pool),
    "GlobalMaxPool": moves(lambda _node, x, _others: x.max(axis=tuple(range(2, x.ndim)), keepdims=True)),
    "ReduceMax": moves(reduces(lambda x, axes: np.asarray(x.max(axis=axes)))),
    "ReduceMin": moves(reduces(lambda x, axes: np.asarray(x.min(axis=axes)))),
    "Transpose": transpose,
    "Concat": concat,
    "Pad": pad,
    # New values.
    "Add": pairs(numerics.add, np.add),
    "Sub": pairs(numerics.subtract, np.subtract),
    "Mul": pairs(numerics.multiply, np.multiply),
    "Div": pairs(numerics.divide, _divide_integers),
    "Sum": chained(numerics.add),
    "Max": chained(np.maximum),
    "Min": chained(np.minimum),
    "Pow": maps(lambda x, y: np.power(x.astype(np.float64), y.astype(np.float64)).astype(x.dtype)),
    "Relu": maps(numerics.relu),
    "Clip": on_floats(clip),
    "LeakyRelu": maps(numerics.leaky_relu, alpha=0.01),
    "PRelu": maps(numerics.prelu),
    "Elu": maps(numerics.elu, alpha=1.0),
    "Sigmoid": maps(numerics.sigmoid),
    "HardSigmoid": maps(numerics.hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": maps(numerics.hard_swish),
    "Tanh": maps(numerics.tanh),
    "Erf": maps(numerics.erf),
    "Gelu": on_floats(gelu),
    "Mish": maps(numerics.mish),
    "Softplus": maps(numerics.softplus),
    "Softmax": on_floats(softmax),
    "LogSoftmax": on_floats(log_softmax),
    "Exp": rows(np.exp),
    "Log": rows(np.log),
    "Sqrt": rows(np.sqrt),
    "Reciprocal": rows(np.reciprocal),
    "Abs": maps(np.abs),
    "Neg": maps(np.negative),
    "Round": maps(np.rint),
    "Floor": maps(np.floor),
    "Ceil": maps(np.ceil),
    "AveragePool": on_floats(average_pool),
    "GlobalAveragePool": on_floats(global_average),
    "ReduceMean": on_floats(reduces(lambda x, axes: numerics.mean(x, axes, keepdims=False))),
    "ReduceSum": on_floats(reduces(_sum)),
    "BatchNormalization": on_floats(batch_normalization),
    "LayerNormalization": on_floats(layer_normalization),
    "LRN": on_floats(lrn),
    "LRN by roots": on_floats(lrn),
    "Cast": on_floats(cast),
    # Shapes and truths.
    "Shape": shape,
    "Constant": constant,
    "ConstantOfShape": on_floats(constant_of_shape),
    "Where": where,
    "Equal": compares(np.equal),
    "Greater": compares(np.greater),
    "Less": compares(np.less),
    "Not": compares(np.logical_not),
}
