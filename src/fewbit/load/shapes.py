"""The rows of the table that move values without arithmetic: reshape, permute, slice, split, join, pad."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.load.builder import Builder, Size, converts

Range = tuple[int, int, int]
_MOST_RUNS = 16


# --------------------------------------------------------------------------------- the layers they use


def reshape(b: Builder, x: fx.Node, size: Size, suffix: str = "") -> fx.Node:
    """Give a tensor another shape; nothing where it has it already."""
    before = b.size(x)
    if before == size:
        return x
    if size.rank == 2 and (before.batch, size.batch) == (0, 0) and size.dims[0] == before.dims[0]:
        return b.add(nn.Flatten(1), x, suffix=suffix, size=size)
    return b.add(ops.Reshape(size.free), x, suffix=suffix, size=size)


def permute(b: Builder, x: fx.Node, order: Sequence[int], suffix: str = "") -> fx.Node:
    """Put the axes in another order."""
    before = b.size(x)
    if list(order) == list(range(before.rank)):
        return x
    size = Size(tuple(before.dims[axis] for axis in order), list(order).index(before.batch))
    return b.add(ops.Permute(order), x, suffix=suffix, size=size)


def cut(b: Builder, x: fx.Node, ranges: dict[int, Range], suffix: str = "") -> fx.Node:
    """Take a strided part, start:stop:step with 0 <= start <= stop, along some axes."""
    before = b.size(x)
    ranges = {axis: part for axis, part in ranges.items() if part != (0, before.dims[axis], 1)}
    if not ranges:
        return x
    if before.batch in ranges:
        raise b.refuse("taking a part of the batch")
    if any(step < 1 for _, _, step in ranges.values()):
        raise b.refuse("a negative step")
    dims = [len(range(*ranges[axis])) if axis in ranges else n for axis, n in enumerate(before.dims)]
    return b.add(ops.Slice(dict(ranges)), x, suffix=suffix, size=Size(tuple(dims), before.batch))


def pick(b: Builder, x: fx.Node, axis: int, indices: Sequence[int]) -> fx.Node:
    """Take entries of one axis in any order, as a concatenation of strided parts."""
    count = b.shape(x)[axis]
    runs = _runs([index % count for index in indices])
    if len(runs) > _MOST_RUNS:
        raise b.refuse(f"picking {len(indices)} entries in an order without pattern")
    dims = b.shape(x)
    parts = [cut(b, x, {axis: run}, suffix=f"run{i}" if len(runs) > 1 else "") for i, run in enumerate(runs)]
    if len(parts) == 1:
        return parts[0]
    size = Size((*dims[:axis], len(indices), *dims[axis + 1 :]), b.size(x).batch)
    return b.add(ops.Concat(axis), *parts, size=size)


def _runs(indices: list[int]) -> list[Range]:
    """Split a list into ranges with a constant positive step.

    >>> _runs([0, 1, 2, 6, 8, 10, 4])
    [(0, 3, 1), (6, 11, 2), (4, 5, 1)]
    """
    runs: list[Range] = []
    at = 0
    while at < len(indices):
        end, step = at + 1, 1
        if end < len(indices) and indices[end] > indices[at]:
            step = indices[end] - indices[at]
            while end < len(indices) and indices[end] - indices[end - 1] == step:
                end += 1
        runs.append((indices[at], indices[end - 1] + 1, step))
        at = end
    return runs


def join(b: Builder, tensors: Sequence[Any], axis: int) -> fx.Node:
    """Concatenate; constants of one value at either end become padding."""
    inner = [i for i, t in enumerate(tensors) if isinstance(t, fx.Node)]
    nodes: list[fx.Node] = [tensors[i] for i in inner]
    before, after = tensors[: inner[0]], tensors[inner[-1] + 1 :]
    if inner != list(range(inner[0], inner[-1] + 1)):
        raise b.refuse("a constant between the tensors of a concatenation")
    ends = [end for end in (*before, *after) if end.shape[axis]]
    values = {float(value) for end in ends for value in (end.min(), end.max())}
    if len(values) > 1 or b.size(nodes[0]).batch == axis:
        raise b.refuse("concatenating a constant, or along the batch")
    joined = nodes[0]
    size = b.size(nodes[0])
    if len(nodes) > 1:
        dims = list(size.dims)
        dims[axis] = sum(b.shape(node)[axis] for node in nodes)
        joined = b.add(
            ops.Concat(axis),
            *nodes,
            suffix="" if not ends else "join",
            size=Size(tuple(dims), size.batch),
        )
    if not ends:
        return joined
    pads = [(0, 0)] * size.rank
    pads[axis] = (sum(t.shape[axis] for t in before), sum(t.shape[axis] for t in after))
    return b.add(ops.Pad(pads, values.pop()), joined)


# -------------------------------------------------------------------------------------- the table rows


@converts(torch.cat, torch.concat, torch.concatenate)
def _cat(b: Builder, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> fx.Node:
    return join(b, tensors, (dim if axis is None else axis) % b.result.rank)


@converts(torch.stack)
def _stack(b: Builder, tensors: Sequence[Any], dim: int = 0) -> fx.Node:
    axis = dim % b.result.rank
    if axis == b.result.batch or not all(isinstance(t, fx.Node) for t in tensors):
        raise b.refuse("stacking along the batch, or a constant")
    dims = b.result.dims
    one = Size((*dims[:axis], 1, *dims[axis + 1 :]), b.result.batch)
    return join(b, [reshape(b, t, one, f"part{i}") for i, t in enumerate(tensors)], axis)


@converts(F.pad)
def _pad(
    b: Builder, input: fx.Node, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> fx.Node:
    if mode != "constant":
        raise b.refuse(f"padding mode '{mode}'")
    pairs = [(int(pad[i]), int(pad[i + 1])) for i in range(0, len(pad), 2)][::-1]
    pairs = [(0, 0)] * (b.size(input).rank - len(pairs)) + pairs
    dims = b.shape(input)
    ranges = {
        axis: (max(0, -before), n - max(0, -after), 1)
        for axis, ((before, after), n) in enumerate(zip(pairs, dims, strict=True))
    }
    cropped = cut(b, input, ranges, "crop")
    pairs = [(max(0, before), max(0, after)) for before, after in pairs]
    if not any(amount for both in pairs for amount in both):
        return cropped
    return b.add(ops.Pad(pairs, value or 0.0), cropped)


@converts(F.interpolate)
def _interpolate(
    b: Builder, input: fx.Node, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **_: Any
) -> fx.Node:
    (rows, columns), (height, width) = b.shape(input)[2:], b.result.dims[2:]
    if (rows, columns) == (height, width):
        return input
    if mode not in ("nearest", "nearest-exact") or height % rows or width % columns:
        raise b.refuse(f"interpolation mode '{mode}' of {rows}x{columns} to {height}x{width}")
    return b.add(ops.Upsample((height // rows, width // columns)), input)


@converts(torch.mean, "mean")
def _mean(b: Builder, input: fx.Node, dim: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    return mean(b, input, _axes(b, input, dim), keepdim)


def _axes(b: Builder, x: fx.Node, dim: Any) -> list[int]:
    """Return reduced axes; the batch is none of them, or the result would have no batch axis."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    return sorted(b.axis(x, d) for d in dims)


def mean(b: Builder, x: fx.Node, axes: list[int], keepdim: bool, suffix: str = "") -> fx.Node:
    """Add the mean over some axes."""
    size = b.size(x)
    if size.rank == 4 and size.batch == 0 and axes == [2, 3]:
        node = b.add(ops.GlobalAvgPool(), x, suffix=suffix, size=Size((*size.dims[:2], 1, 1)))
        return node if keepdim else reshape(b, node, Size(size.dims[:2]), f"{suffix}_flatten".strip("_"))
    return b.add(ops.Mean(axes, keepdim), x, suffix=suffix)


@converts(torch.sum, "sum")
def _sum(b: Builder, input: fx.Node, dim: Any = None, keepdim: bool = False, **_: Any) -> fx.Node:
    axes = _axes(b, input, dim)
    count = prod(b.shape(input)[axis] for axis in axes)
    node = mean(b, input, axes, keepdim, "mean")
    return b.add(ops.Affine(torch.tensor(float(count)), None), node)


@converts(torch.amax, "amax")
def _amax(b: Builder, input: fx.Node, dim: Any = None, keepdim: bool = False) -> fx.Node:
    size = b.size(input)
    if size.rank != 4 or _axes(b, input, dim) != [2, 3]:
        raise b.refuse("a maximum over other axes than H and W")
    pooled = b.add(nn.MaxPool2d(size.dims[2:], size.dims[2:]), input, size=Size((*size.dims[:2], 1, 1)))
    return pooled if keepdim else reshape(b, pooled, b.result, "flatten")


@converts(
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as"),
)
def _reshape(b: Builder, input: fx.Node, *_: Any, **__: Any) -> fx.Node:
    return reshape(b, input, b.result)


@converts(torch.permute, "permute")
def _permute(b: Builder, input: fx.Node, *dims: Any) -> fx.Node:
    flat = dims[0] if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
    return permute(b, input, [b.axis(input, d) for d in flat])


@converts(torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")
def _transpose(b: Builder, input: fx.Node, dim0: int, dim1: int) -> fx.Node:
    order = list(range(b.size(input).rank))
    first, second = b.axis(input, dim0), b.axis(input, dim1)
    order[first], order[second] = order[second], order[first]
    return permute(b, input, order)


@converts(torch.channel_shuffle, F.channel_shuffle)
def _channel_shuffle(b: Builder, input: fx.Node, groups: int) -> fx.Node:
    images, channels, rows, columns = b.shape(input)
    split = Size((images, groups, channels // groups, rows, columns))
    y = permute(b, reshape(b, input, split, "split"), (0, 2, 1, 3, 4), "swap")
    return reshape(b, y, b.result, "join")


@converts(torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split")
def _split(b: Builder, input: fx.Node, *_: Any, **__: Any) -> list[fx.Node]:
    parts: list[fx.Node] = []
    before, start = b.shape(input), 0
    sizes = [part.dims for part in b.result]
    axes = [axis for axis in range(len(before)) if any(dims[axis] != before[axis] for dims in sizes)]
    axis = axes[0] if axes else 0
    for index, dims in enumerate(sizes):
        stop = start + dims[axis]
        parts.append(cut(b, input, {axis: (start, stop, 1)} if axes else {}, f"{index}"))
        start = stop
    return parts


@converts(torch.unbind, "unbind")
def _unbind(b: Builder, input: fx.Node, dim: int = 0) -> list[fx.Node]:
    axis = b.axis(input, dim)
    return [
        reshape(b, cut(b, input, {axis: (i, i + 1, 1)}, f"{i}"), size, f"{i}_squeeze")
        for i, size in enumerate(b.result)
    ]


@converts("expand", "expand_as", torch.broadcast_to, "broadcast_to", broadcasts=True)
def _expand(b: Builder, input: fx.Node, *_: Any, **__: Any) -> fx.Node:
    """Nothing yet: arithmetic broadcasts by itself; any other reader is refused."""
    return input


@converts(torch.index_select, "index_select")
def _index_select(b: Builder, input: fx.Node, dim: int, index: Any) -> fx.Node:
    return pick(b, input, b.axis(input, dim), index.tolist())


@converts(operator.getitem)
def _getitem(b: Builder, input: Any, index: Any) -> Any:
    if isinstance(input, list):
        return input[index]
    shape = b.shape(input)
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        missing = len(shape) - sum(part is not None for part in parts) + 1
        parts[at : at + 1] = [slice(None)] * missing
    ranges: dict[int, Range] = {}
    axis = 0
    for part in parts:
        if part is None:
            continue
        if isinstance(part, slice):
            ranges[axis] = part.indices(shape[axis])
        elif isinstance(part, int):
            ranges[axis] = (part % shape[axis], part % shape[axis] + 1, 1)
        elif isinstance(part, list | Tensor) and len(parts) - parts.count(slice(None)) == 1:
            listed = (
                part.nonzero().flatten() if isinstance(part, Tensor) and part.dtype == torch.bool else part
            )
            return pick(b, input, axis, [int(i) for i in listed])
        else:
            raise b.refuse("indexing by a tensor")
        axis += 1
    return reshape(b, cut(b, input, ranges), b.result, "reshape")
