"""An .onnx file becomes a Net, checked against ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.errors import ModelFileError, first_line
from fewbit.load import onnx_moves, onnx_ops  # noqa: F401  (their rows enter the table)
from fewbit.load.card import Card
from fewbit.load.onnx_file import input_dims, inputs_of, opset_of, read_onnx, to_array
from fewbit.load.onnx_graph import FixedBatch, Graph
from fewbit.net import Net

_GAP = 1e-4
_TO_CHANNELS_FIRST = [0, 3, 1, 2]


def load_onnx(card: Card) -> Net:
    """Read the .onnx file of a card as a Net.

    Every layer is named after its ONNX node. A file whose batch axis is fixed becomes a Net for any number
    of images; one that takes (N, H, W, C) becomes a Net of (N, C, H, W). The Net's output is compared with
    ONNX Runtime's on random images.

    Args:
        card: Its source is the file.

    Returns:
        The Net, in evaluation mode, its weights as parameters.

    Raises:
        ModelFileError: The file is damaged, quantized, has an operator that is not supported, does not fit
            the card's input size or classes, or the Net's output differs from ONNX Runtime's.
    """
    path = card.source.path
    assert path is not None
    model = read_onnx(path)
    check_weights(model, path)
    channels_last = _channels_last(model.graph, card.input.size, path)
    graph, own = _read(model, path, card.input.size, channels_last)
    merge_affines(graph)
    net = _net(graph, card)
    check_against_runtime(net, model, path, own, channels_last)
    return net


def _read(
    model: onnx.ModelProto, path: Path, size: tuple[int, int, int], channels_last: bool
) -> tuple[fx.GraphModule, int | None]:
    """Return the graph, and the number of images that the file takes, none for any."""
    own = input_dims(model.graph)[0]
    if own is not None:
        return _build(model, path, size, (own,), channels_last), own
    try:
        return _build(model, path, size, (2, 3), channels_last), None
    except FixedBatch as reason:
        try:
            return _build(model, path, size, (1,), channels_last), 1
        except ModelFileError:
            raise reason from None


def _build(
    model: onnx.ModelProto,
    path: Path,
    size: tuple[int, int, int],
    batches: tuple[int, ...],
    channels_last: bool,
) -> fx.GraphModule:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand((batch, *size), generator=generator) for batch in batches]
    with torch.no_grad():
        return Graph(path, opset_of(model), batches).build(model.graph, images, channels_last)


def _net(graph: fx.GraphModule, card: Card) -> Net:
    with torch.no_grad():
        classes = int(graph(torch.zeros(1, *card.input.size)).shape[1])
    if classes != card.network.classes:
        raise ModelFileError(
            f"{card.source.path}: returns {classes} classes, the card says {card.network.classes}; "
            f"set [network] classes = {classes}"
        )
    return Net(graph, card.network.name, card.input.size, classes).eval()


def check_weights(model: onnx.ModelProto, path: Path) -> None:
    """Check that no weight is NaN or infinite; single numbers may be, as limits.

    Raises:
        ModelFileError: One is; the message names the tensor.
    """
    for tensor in model.graph.initializer:
        array = to_array(tensor, path)
        if array.dtype == np.float32 and array.size > 1 and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise ModelFileError(
                f"{path}: tensor '{tensor.name}' has {bad} values of {array.size} that are NaN or infinite; "
                "export a network whose training converged"
            )


def _channels_last(graph: onnx.GraphProto, size: tuple[int, int, int], path: Path) -> bool:
    """Tell whether the file wants (N, H, W, C); check that it takes the card's input size."""
    name = inputs_of(graph)[0].name
    readers = [node for node in graph.node if name in node.input and node.op_type != "Shape"]
    turned = bool(readers) and all(
        node.op_type == "Transpose" and any(list(a.ints) == _TO_CHANNELS_FIRST for a in node.attribute)
        for node in readers
    )
    sides = input_dims(graph)[1:]
    channels, rows, columns = size
    fits = {
        last: all(s in (None, w) for s, w in zip(sides, wanted, strict=True))
        for last, wanted in ((False, size), (True, (rows, columns, channels)))
    }
    for last in (turned, not turned):
        if fits[last]:
            return last
    shown = ", ".join("any" if side is None else str(side) for side in sides)
    raise ModelFileError(
        f"{path}: input '{name}' takes images of size ({shown}), the card says {size}; "
        "set [input] size to what the file takes"
    )


def merge_affines(graph: fx.GraphModule) -> None:
    """Merge a factor and a term for each output channel into the layer with weights before them."""
    for node in list(graph.graph.nodes):
        affine = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if not isinstance(affine, ops.Affine) or not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        layer = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        parts = [_per_channel(value, layer) for value in (affine.scale, affine.shift)]
        if any(
            given is not None and part is None
            for given, part in zip((affine.scale, affine.shift), parts, strict=True)
        ):
            continue
        scale, shift = parts
        bias = layer.bias.detach() if layer.bias is not None else torch.zeros(layer.weight.shape[0])
        if scale is not None:
            layer.weight = nn.Parameter(
                layer.weight.detach() * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
            )
            bias = bias * scale
        if shift is not None or layer.bias is not None:
            layer.bias = nn.Parameter(bias if shift is None else bias + shift)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _per_channel(value: Tensor | None, layer: nn.Conv2d | nn.Linear) -> Tensor | None:
    """Return a constant as one number for each output channel, none where it is not of that form."""
    if value is None:
        return None
    channels = layer.weight.shape[0]
    if value.numel() == 1:
        return value.detach().reshape(1).expand(channels)
    axis = -3 if isinstance(layer, nn.Conv2d) else -1
    along = value.dim() >= -axis and value.shape[axis] == channels == value.numel()
    return value.detach().reshape(-1) if along else None


def check_against_runtime(
    net: Net, model: onnx.ModelProto, path: Path, own: int | None, channels_last: bool
) -> None:
    """Compare the Net's output with ONNX Runtime's on random images.

    Args:
        net: In evaluation mode.
        model: The file's content.
        path: The file.
        own: The number of images that the file takes; none for any.
        channels_last: The file wants (N, H, W, C).

    Raises:
        ModelFileError: ONNX Runtime refuses the file, or the outputs differ.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    batch = own or 3
    count = 2 * batch if batch < 3 else batch
    images = torch.rand((count, *net.input_size), generator=torch.Generator().manual_seed(1))
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        fed = (images.permute(0, 2, 3, 1) if channels_last else images).contiguous().numpy()
        outputs = [session.run(None, {name: fed[at : at + batch]})[0] for at in range(0, count, batch)]
    except Exception as reason:  # onnxruntime's error classes have no common ancestor of their own
        line = re.sub(
            r"^\[ONNXRuntimeError\] : \d+ : \w+ : (/\S+:\d+ .*\) (?=[A-Z]))?", "", first_line(reason)
        )
        raise ModelFileError(f"{path}: ONNX Runtime refuses it ({line}); export it again") from reason
    wanted = np.concatenate(outputs).reshape(count, -1)
    with torch.no_grad():
        got = net(images).numpy()
    gap = float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-6))
    if not gap <= _GAP:
        raise ModelFileError(
            f"{path}: read as a network, its output differs from ONNX Runtime's by {gap:.1e} of the "
            "largest logit; report the file to fewbit's issue tracker"
        )
