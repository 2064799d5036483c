"""The rows of the ONNX table that move values without arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.load.builder import FUNCTIONS
from fewbit.load.onnx_graph import Constant, OnnxBuilder, Op, operator
from fewbit.load.shapes import cut, join, permute, pick, reshape

_FLOAT = 1
_BROADCASTING = {"Add", "Sub", "Mul", "Div", "Sum"}


@operator("Identity", "CastLike")
def _identity(b: OnnxBuilder, op: Op, x: fx.Node, *_: Any) -> fx.Node:
    return x


@operator("Dropout")
def _dropout(b: OnnxBuilder, op: Op, x: fx.Node, ratio: Any = None, training: Any = None) -> fx.Node:
    if training is not None and bool(b.array(training, "a training mode")):
        raise b.refuse("training mode")
    p = op.get("ratio", 0.5) if ratio is None else float(b.array(ratio, "a ratio"))
    return b.add(nn.Dropout(p), x)


@operator("Cast")
def _cast(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    if op.get("to") != _FLOAT:
        raise b.refuse("a cast of the images to another type than float32")
    return x


@operator("Reshape")
def _reshape(b: OnnxBuilder, op: Op, x: fx.Node, shape: Any) -> fx.Node:
    results = []
    for value, wanted in zip(b.runs[x], b.arrays(shape, "a shape"), strict=True):
        dims = [int(n) for n in wanted]
        if not op.get("allowzero", 0):
            dims = [value.shape[axis] if n == 0 else n for axis, n in enumerate(dims)]
        try:
            results.append(value.reshape(dims).shape)
        except RuntimeError as reason:
            raise b.fixed(f"cannot give {tuple(value.shape)} the shape {dims}") from reason
    return reshape(b, x, b.size_of(results))


@operator("Flatten")
def _flatten(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    axis = op.get("axis", 1)
    results = []
    for value in b.runs[x]:
        head = int(np.prod(value.shape[:axis])) if axis else 1
        results.append((head, value.numel() // head))
    return reshape(b, x, b.size_of(results))


@operator("Squeeze", "Unsqueeze")
def _squeeze(b: OnnxBuilder, op: Op, x: fx.Node, axes: Any = None) -> fx.Node:
    listed = op.get("axes") if axes is None else b.array(axes, "axes").tolist()
    results = []
    for value in b.runs[x]:
        dims = list(value.shape)
        if op.kind == "Squeeze":
            gone = (
                {axis % len(dims) for axis in listed} if listed else {i for i, n in enumerate(dims) if n == 1}
            )
            results.append(tuple(n for axis, n in enumerate(dims) if axis not in gone))
        else:
            rank = len(dims) + len(listed)
            new, rest = {axis % rank for axis in listed}, iter(dims)
            results.append(tuple(1 if axis in new else next(rest) for axis in range(rank)))
    return reshape(b, x, b.size_of(results))


@operator("Transpose")
def _transpose(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    order = list(op.get("perm", range(b.size(x).rank)[::-1]))
    before = b.root.get_submodule(str(x.target)) if x.op == "call_module" else None
    if isinstance(before, ops.Permute):  # two in a row are one, or none
        source = x.args[0]
        assert isinstance(source, fx.Node)
        back = [before.dims.index(axis) for axis in range(len(order))]
        b.runs.setdefault(source, tuple(value.permute(back) for value in b.runs[x]))
        return permute(b, source, [before.dims[axis] for axis in order])
    return permute(b, x, order)


@operator("Concat")
def _concat(b: OnnxBuilder, op: Op, *tensors: Any) -> fx.Node:
    rank = next(b.size(t).rank for t in tensors if isinstance(t, fx.Node))
    values = [b.tensor(t, "a constant") if isinstance(t, Constant) else t for t in tensors]
    return join(b, values, op.get("axis") % rank)


@operator("Slice")
def _slice(
    b: OnnxBuilder, op: Op, x: fx.Node, starts: Any, ends: Any, axes: Any = None, steps: Any = None
) -> fx.Node:
    first, stop = b.array(starts, "a start").tolist(), b.arrays(ends, "an end")
    listed = list(range(len(first))) if axes is None else b.array(axes, "axes").tolist()
    step = [1] * len(first) if steps is None else b.array(steps, "a step").tolist()
    dims = b.shape(x)
    ranges = {}
    for at, axis in enumerate(listed):
        axis %= len(dims)
        run = slice(first[at], int(stop[0][at]), step[at]).indices(dims[axis])
        if axis != b.size(x).batch and any(int(s[at]) != int(stop[0][at]) for s in stop):
            raise b.refuse("an end that depends on the number of images")
        ranges[axis] = run
    return cut(b, x, ranges)


@operator("Split")
def _split(b: OnnxBuilder, op: Op, x: fx.Node, lengths: Any = None) -> list[fx.Node]:
    axis = op.get("axis", 0) % b.size(x).rank
    total = b.shape(x)[axis]
    sizes = op.get("split") if lengths is None else b.array(lengths, "a length").tolist()
    if sizes is None:
        count = op.get("num_outputs", op.outputs)
        each = -(-total // count)
        sizes = [min(each, total - each * i) for i in range(count)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [cut(b, x, {axis: (starts[i], starts[i + 1], 1)}, f"{i}") for i in range(len(sizes))]


@operator("Gather")
def _gather(b: OnnxBuilder, op: Op, x: Any, indices: Any) -> fx.Node:
    if not isinstance(x, fx.Node):
        raise b.refuse("a table looked up by the images")
    axis = op.get("axis", 0) % b.size(x).rank
    index = b.array(indices, "an index")
    if axis == b.size(x).batch or index.ndim > 1:
        raise b.refuse("picking images, or an index of several axes")
    node = pick(b, x, axis, index.reshape(-1).tolist())
    if index.ndim == 1:
        return node
    size = b.size(node)
    dims = (*size.dims[:axis], *size.dims[axis + 1 :])
    return reshape(b, node, type(size)(dims, size.batch - (axis < size.batch)), "squeeze")


@operator("Pad")
def _pad(
    b: OnnxBuilder, op: Op, x: fx.Node, pads: Any = None, value: Any = None, axes: Any = None
) -> fx.Node:
    if op.get("mode", b"constant") != b"constant":
        raise b.refuse(f"padding mode '{op.get('mode').decode()}'")
    rank = b.size(x).rank
    amounts = b.array(pads, "an amount").tolist()
    listed = range(rank) if axes is None else [axis % rank for axis in b.array(axes, "axes").tolist()]
    pairs = [(0, 0)] * rank
    for at, axis in enumerate(listed):
        pairs[axis] = (amounts[at], amounts[at + len(amounts) // 2])
    fill = 0.0 if value is None else float(b.array(value, "a value").reshape(()))
    flat = [amount for pair in pairs[::-1] for amount in pair]
    if not any(flat):
        return x
    return FUNCTIONS[F.pad](b, x, flat, "constant", fill)  # type: ignore[no-any-return]


@operator("Expand")
def _expand(b: OnnxBuilder, op: Op, x: fx.Node, shape: Any) -> fx.Node:
    """Nothing where arithmetic broadcasts by itself; any other reader is refused."""
    wanted = [int(n) for n in b.arrays(shape, "a shape")[0]]
    same = np.broadcast_shapes(b.shape(x), wanted) == b.shape(x)
    if not same and not op.readers <= _BROADCASTING:
        raise b.refuse("expanding a tensor for anything but arithmetic")
    return x


@operator("Resize")
def _resize(
    b: OnnxBuilder, op: Op, x: fx.Node, roi: Any = None, scales: Any = None, sizes: Any = None
) -> fx.Node:
    dims = b.shape(x)
    if sizes is not None:
        factors = [float(n) / dims[axis] for axis, n in enumerate(b.arrays(sizes, "a size")[0])]
    else:
        factors = b.array(scales, "a scale").tolist()
    whole = [round(factor) for factor in factors]
    nearest = op.get("mode", b"nearest") == b"nearest"
    if (
        not nearest
        or len(dims) != 4
        or whole[:2] != [1, 1]
        or any(f != w for f, w in zip(factors, whole, strict=True))
    ):
        raise b.refuse(f"resizing by {factors} in mode '{op.get('mode', b'nearest').decode()}'")
    if whole[2:] == [1, 1]:
        return x
    return b.add(ops.Upsample((whole[2], whole[3])), x)
