"""The Tracer: runs a model on images and notes each call that becomes a layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import NetworkError
from fewbit.load.leaves import is_leaf

_FACTS = {
    *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device", "layout"),
    *("is_cuda", "is_sparse", "is_quantized", "is_floating_point", "is_complex", "is_contiguous"),
    *("stride", "element_size", "requires_grad", "get_device"),
}
_FACT_FUNCTIONS = {torch.numel, torch.is_floating_point, torch.is_complex}
_NEW_TENSORS = {
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}


class Sized(fx.Proxy):
    """Stands for a tensor while tracing: its shape and type are known, its values must not be asked for."""

    value: Any

    def __getitem__(self, index: Any) -> Any:
        """Note the indexing."""
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __getattr__(self, k: str) -> Any:
        """Return a fact of the tensor as it is, anything else as a call to be traced."""
        if k in _FACTS:
            return getattr(self.value, k)
        if callable(getattr(Tensor, k)):
            return super().__getattr__(k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def __len__(self) -> int:
        """Return the length of the first axis, or of a list of tensors."""
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over a list of tensors."""
        return (self[index] for index in range(len(self.value)))


def _in_place(operation: Callable[..., Any]) -> Callable[[Sized, Any], Any]:
    def method(self: Sized, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _operation in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(Sized, f"__{_operation.__name__}__", _in_place(_operation))


class Root(nn.Module):
    """A model with one argument, whatever the signature of its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Run the model."""
        return self.model(images)


class Tracer(fx.Tracer):
    """Traces a model while it runs on images, so that Python may use the shapes.

    Attributes:
        results: Shape, or list of shapes, of what each traced call returned.
        owners: Path of the module whose forward made each call.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images
        self.results: dict[fx.Node, Any] = {}
        self.owners: dict[fx.Node, str] = {}
        self._path: list[str] = []
        self._running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is kept whole."""
        standard = type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return standard or is_leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Give parameters as they are: what is computed from them alone is no part of the graph."""
        return attr_val

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Stand for the value of a node."""
        return Sized(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note the call of a leaf, walk into any other module."""
        if self._running:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        self._path.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self._path.pop()

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Run a call, note it and what it returned.

        Returns:
            A stand-in where it returned tensors, else the result itself.

        Raises:
            NetworkError: The result depends on the values in a tensor.
        """
        value = self._run(kind, target, args, kwargs)
        if target is torch._assert or target in _FACT_FUNCTIONS or target in _NEW_TENSORS:
            return value
        if not _all_tensors(value):
            word = getattr(target, "__name__", target)
            raise NetworkError(f"it reads the values of a tensor by '{word}'")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        assert isinstance(proxy, Sized)
        proxy.value = value
        shapes = tuple(value.shape) if isinstance(value, Tensor) else [tuple(v.shape) for v in value]
        self.results[proxy.node] = shapes
        self.owners[proxy.node] = self._path[-1] if self._path else ""
        return proxy

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.images
        args, kwargs = _values(args), _values(kwargs)
        self._running = True
        try:
            if kind == "call_function":
                return target(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return self.root.get_submodule(target)(*args, **kwargs)
        finally:
            self._running = False


def _all_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor)


def _values(argument: Any) -> Any:
    if isinstance(argument, Sized):
        return argument.value
    if isinstance(argument, torch.Size):
        return argument
    if isinstance(argument, list | tuple):
        return type(argument)(_values(part) for part in argument)
    if isinstance(argument, dict):
        return {key: _values(part) for key, part in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_values(part) for part in (argument.start, argument.stop, argument.step)))
    return argument
