"""The torch simulation of a quantized network in exact integers.

It follows the arithmetic that `fewbit.numerics` defines for an exported file, so its codes equal those of the
`reference` engine, which reads the file and not the Net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fewbit import numerics as nx
from fewbit import ops
from fewbit.errors import RecipeError
from fewbit.net import Net, name_of
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLayer, QuantLinear

_MOVES = (
    *("MaxPool", "Concat", "Flatten", "Reshape", "Permute", "Pad", "Frame", "Slice", "Upsample"),
    *("Identity", "Dropout", "DropPath", "Relu", "Clip", "Min"),
)


def simulate(net: Net, x: Tensor) -> Tensor:
    """Run a quantized network on codes.

    Args:
        net: Calibrated.
        x: Images (N, C, H, W) float32.

    Returns:
        Logits (N, classes) float32, equal bit for bit to those of the exported file's reference interpreter.

    Raises:
        RecipeError: A layer's kind has no defined arithmetic.
    """
    return simulate_recorded(net, x)[0]


def simulate_recorded(net: Net, x: Tensor) -> tuple[Tensor, dict[str, NDArray[np.int64]]]:
    """Run like `simulate` and return also the codes of every quantized tensor, by the layer it comes from."""
    walk = _Simulation(net)
    with torch.no_grad():
        logits: Tensor = walk.run(x)
    return logits, walk.codes


class _Simulation(fx.Interpreter):
    def __init__(self, net: Net) -> None:
        super().__init__(net.graph)
        self.extra_traceback = False  # an error stays one line
        self.codes: dict[str, NDArray[np.int64]] = {}
        self.layers = {layer.node: layer for layer in net.layers()}
        self.grids: dict[fx.Node, tuple[Quantizer | DynamicQuantizer, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module":
            return super().run_node(n)
        args = [self.env[a] for a in n.args if isinstance(a, fx.Node)]
        layer = self.layers[n]
        module = layer.module
        if isinstance(module, Quantizer):
            codes = module.codes(args[0])
            self.grids[n] = (module, codes)
            source = n.args[0]
            assert isinstance(source, fx.Node)
            self.codes[name_of(source)] = codes.numpy().astype(np.int64)
            scale, zero_point = module.grid(codes.dim())
            return (codes - zero_point) * scale
        if isinstance(module, DynamicQuantizer):
            scales = module.scales(args[0])
            self.grids[n] = (module, scales)
            return torch.round(args[0] / scales).clamp(-module.qmax, module.qmax)
        if isinstance(module, QuantConv2d | QuantLinear):
            source = n.args[0]
            assert isinstance(source, fx.Node)
            return _matrix(module, args[0], self.grids.get(source))
        if layer.kind in _MOVES:
            return module(*args)
        if layer.kind not in _DEFINED:
            raise RecipeError(
                f"layer '{layer.name}': kind {layer.kind} has no defined arithmetic to simulate"
            )
        values = _DEFINED[layer.kind](module, *[a.numpy() for a in args])
        return torch.from_numpy(np.ascontiguousarray(values))


def _matrix(module: QuantLayer, x: Tensor, grid: tuple[Quantizer | DynamicQuantizer, Any] | None) -> Tensor:
    """Compute one convolution or matrix product by the definition of `numerics`."""
    if grid is None:
        weight = module.weight_quantizer(module.weight)
        return torch.from_numpy(_float_matrix(module, x.numpy(), weight))
    quantizer, value = grid
    weights = module.weight_quantizer
    _, weight_zero = weights.grid(module.weight.dim())
    codes = weights.codes(module.weight) - weight_zero
    bias = None if module.bias is None else module.bias.detach().numpy()
    if isinstance(quantizer, DynamicQuantizer):
        sums = _exact(module, x, codes).numpy()
        own = nx.multiply(sums.astype(np.float32), value.numpy().reshape(-1, *[1] * (sums.ndim - 1)))
        result = nx.multiply(own, _column(weights.scale, module, sums.ndim))
        if bias is not None:
            result = nx.add(result, _column(module.bias, module, sums.ndim))
        return torch.from_numpy(result)
    _, zero_point = quantizer.grid(value.dim())
    sums = _exact(module, value - zero_point, codes).numpy()
    whole = None if bias is None else nx.quantize_bias(bias, quantizer.scale.numpy(), weights.scale.numpy())
    axis = 1 if isinstance(module, nn.Conv2d) else -1
    return torch.from_numpy(
        nx.rescale_accumulator(sums, quantizer.scale.numpy(), weights.scale.numpy(), whole, axis=axis)
    )


def _column(values: Any, module: QuantLayer, rank: int) -> NDArray[Any]:
    """Shape one value a channel to broadcast over (N, O, H, W), or over (..., O) of a matrix product."""
    array: NDArray[Any] = values.detach().numpy()
    behind = [1] * (rank - 2) if isinstance(module, nn.Conv2d) else []
    return array.reshape(-1, *behind) if array.ndim else array


def _exact(module: QuantLayer, x: Tensor, weight: Tensor) -> Tensor:
    """Sum products of whole numbers exactly: in float32 where partial sums stay below 2^24, else float64."""
    bound = float(weight.abs().flatten(1).sum(1).max()) * float(x.abs().max())
    dtype = torch.float32 if bound < 2**24 else torch.float64
    return _apply(module, x.to(dtype), weight.to(dtype)).double()


def _apply(module: QuantLayer, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return ops.convolve(x, weight, None, module)
    return nn.functional.linear(x, weight)


def _float_matrix(module: nn.Conv2d | nn.Linear, x: NDArray[Any], weight: Tensor) -> NDArray[Any]:
    """Compute in float64 and round once, in the order of sums that the reference takes."""
    bias = None if module.bias is None else module.bias.detach().numpy()
    values = weight.detach().numpy()
    if isinstance(module, nn.Linear):
        return nx.linear(x, values, bias)
    strides, dilations = list(module.stride), list(module.dilation)
    return nx.convolve_floats(x, values, bias, strides, ops.pads_of(module), dilations, module.groups)


def _conv_transpose(module: Any, x: NDArray[Any]) -> NDArray[Any]:
    wide = module.double()
    result: NDArray[Any] = wide(torch.from_numpy(x).double()).float().numpy()
    module.float()
    return result


def _average_pool(m: Any, x: NDArray[Any]) -> NDArray[Any]:
    kernel, strides, padding = (
        [v] * 2 if isinstance(v, int) else list(v)
        for v in (m.kernel_size, m.stride or m.kernel_size, m.padding)
    )
    return nx.average_pool(x, kernel, strides, padding * 2, bool(m.ceil_mode), bool(m.count_include_pad))


def _softplus(m: Any, x: NDArray[Any]) -> NDArray[Any]:
    if m.beta == 1:
        return nx.softplus(x)
    return nx.multiply(nx.softplus(nx.multiply(x, np.float32(m.beta))), np.float32(1 / m.beta))


def _batch_norm(m: Any, x: NDArray[Any]) -> NDArray[Any]:
    count = m.num_features
    gamma = np.ones(count) if m.weight is None else m.weight.detach().numpy()
    beta = np.zeros(count) if m.bias is None else m.bias.detach().numpy()
    return nx.batch_norm(x, gamma, beta, m.running_mean.numpy(), m.running_var.numpy(), m.eps)


def _affine(m: Any, x: NDArray[Any]) -> NDArray[Any]:
    if m.scale is not None:
        x = nx.multiply(x, m.scale.detach().numpy())
    return x if m.shift is None else nx.add(x, m.shift.detach().numpy())


def _layer_norm(m: Any, x: NDArray[Any]) -> NDArray[Any]:
    shape = tuple(m.normalized_shape)
    weight = np.ones(shape, np.float32) if m.weight is None else m.weight.detach().numpy()
    return nx.layer_norm(x, weight, None if m.bias is None else m.bias.detach().numpy(), -len(shape), m.eps)


def _layer_norm_2d(m: Any, x: NDArray[Any]) -> NDArray[Any]:
    rows = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    normal = nx.layer_norm(rows, m.weight.detach().numpy(), m.bias.detach().numpy(), -1, m.eps)
    return normal.transpose(0, 3, 1, 2)


_DEFINED: Mapping[str, Callable[..., NDArray[Any]]] = {
    "Conv": lambda m, x: _float_matrix(m, x, m.weight),
    "Linear": lambda m, x: _float_matrix(m, x, m.weight),
    "ConvTranspose": _conv_transpose,
    "MatMul": lambda m, a, b: (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32),
    "BatchNorm": _batch_norm,
    "LayerNorm": _layer_norm,
    "LayerNorm2d": _layer_norm_2d,
    "Add": lambda m, a, b: nx.add(a, b),
    "Sub": lambda m, a, b: nx.subtract(a, b),
    "Mul": lambda m, a, b: nx.multiply(a, b),
    "Div": lambda m, a, b: nx.divide(a, b),
    "Affine": _affine,
    "LeakyRelu": lambda m, x: nx.leaky_relu(x, m.negative_slope),
    "PRelu": lambda m, x: nx.prelu(x, m.weight.detach().numpy().reshape(-1, *[1] * (x.ndim - 2))),
    "Elu": lambda m, x: nx.elu(x, m.alpha),
    "Gelu": lambda m, x: nx.gelu(x, m.approximate),
    "Tanh": lambda m, x: nx.tanh(x),
    "Sigmoid": lambda m, x: nx.sigmoid(x),
    "HardSigmoid": lambda m, x: nx.hard_sigmoid(x, 1 / 6, 0.5),
    "Silu": lambda m, x: nx.silu(x),
    "HardSwish": lambda m, x: nx.hard_swish(x),
    "Mish": lambda m, x: nx.mish(x),
    "Softplus": _softplus,
    "Softmax": lambda m, x: nx.softmax(x, m.dim),
    "LogSoftmax": lambda m, x: nx.log_softmax(x, m.dim),
    "LRN": lambda m, x: nx.local_response_norm(x, m.size, m.alpha, m.beta, m.k),
    "AvgPool": _average_pool,
    "GlobalAvgPool": lambda m, x: nx.mean(x, (2, 3)),
    "Mean": lambda m, x: nx.mean(x, m.dims, m.keepdim),
}
