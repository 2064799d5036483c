from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit.errors import NetworkError
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.place import Place
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.prepare.canonical import Canonical
from fewbit.prepare.fold_bn import FoldBN
from fewbit.ranges import float_pass as module
from fewbit.ranges.float_pass import FloatPass, keep_freed_memory
from fewbit.spec import Scheme
from networks import NETWORKS, make_context, make_images, make_net

_PLAIN = (Quantizer, DynamicQuantizer)


class _Keeper:
    """Stands for a finder: keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def observe(self, x: Tensor) -> None:
        self.shown.append(x.clone())

    def find(self, spec: Any) -> Any:
        raise NotImplementedError


def placed(net: Net, mode: str = "static") -> Net:
    """Return a copy with quantizers that have no grid yet."""
    context = replace(make_context(), scheme=Scheme(mode=mode))
    net = net.clone().eval()
    for step in (Canonical(), FoldBN(), Place()):
        step(net, context)
    return net


def watched(net: Net) -> dict[fx.Node, _Keeper]:
    """Return one keeper for every quantizer."""
    return {layer.node: _Keeper() for layer in net.layers() if isinstance(layer.module, _PLAIN)}


def shown_by_torch(net: Net, images: Tensor) -> dict[fx.Node, Tensor]:
    """Return each quantizer's input with every quantizer off, as torch computes it layer by layer."""
    found: dict[fx.Node, Tensor] = {}

    class Walk(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
            if isinstance(layer, _PLAIN):
                found[n] = self.env[n.all_input_nodes[0]].clone()
                return found[n]
            weight = getattr(layer, "weight_quantizer", None)
            if weight is not None:
                weight.enabled = False
            value = super().run_node(n)
            if weight is not None:
                weight.enabled = True
            return value

    with torch.no_grad():
        Walk(net.graph).run(images.clone())
    return found


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_quantizer_is_shown_what_torch_computes(
    name: str, mode: str, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FUSES", fuses and module._FUSES)
    net, images = placed(make_net(name), mode), make_images(5)
    keepers = watched(net)
    assert keepers
    FloatPass(net, keepers).show(images)
    for node, expected in shown_by_torch(net, images).items():
        (found,) = keepers[node].shown
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Awkward(nn.Module):
    """Activations that must not overwrite what another layer still reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(4, 4, (3, 2), stride=2, padding="valid", groups=2, bias=False)
        self.norm = nn.LocalResponseNorm(3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.relu(x)  # a's output is read twice
        z = F.relu6(self.b(self.norm(y)) + x)
        z = F.hardtanh(self.c(F.pad(z, (1, 0, 0, 2))), -0.5, 0.25)
        return F.relu(self.fc(F.relu(z.mean((2, 3)))))


def test_a_tensor_with_two_readers_is_not_overwritten() -> None:
    torch.manual_seed(0)
    net = placed(capture(Awkward(), "awkward", (3, 12, 12)))
    images = make_images(3)[:, :, :12, :12]
    before = images.clone()
    keepers = watched(net)
    FloatPass(net, keepers).show(images)
    for node, expected in shown_by_torch(net, before).items():
        torch.testing.assert_close(keepers[node].shown[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, before)


def test_a_second_batch_of_another_size_reuses_the_arranged_weights() -> None:
    net = placed(make_net("depthwise"))
    keepers = watched(net)
    float_pass = FloatPass(net, keepers)
    images = make_images(7)
    float_pass.show(images[:4])
    float_pass.show(images[4:])
    for node, expected in shown_by_torch(net, images).items():
        torch.testing.assert_close(torch.cat(keepers[node].shown), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_of_a_batch() -> None:
    net = placed(make_net("residual"))
    float_pass = FloatPass(net, {})
    float_pass.show(make_images(2))
    read = {node for call in float_pass._program for node in call.inputs}
    made = {call.output for call in float_pass._program} - {None}
    freed = [node for call in float_pass._program for node in call.frees]
    assert len(freed) == len(set(freed)) and set(freed) == read | made


class _Libc:
    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            self.calls.append((name, arguments))
            return 1

        return call


def test_freed_memory_is_kept_inside_and_given_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = _Libc()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _name: libc)
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        assert ("mallopt", (-1, 2**31 - 1)) in libc.calls
        raise ZeroDivisionError
    assert libc.calls[-2:] == [("mallopt", (-1, 2**26)), ("malloc_trim", (0,))]


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_elsewhere_than_on_glibc_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda _name: object())
    with keep_freed_memory():
        pass


def test_what_is_not_finite_behind_a_fused_activation_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
    net = placed(capture(model, "huge", (3, 5, 5)))
    conv = net.layer("0").module
    with torch.no_grad():
        conv.weight.fill_(3e38)  # type: ignore[union-attr, operator]
    with pytest.raises(NetworkError, match="0: 36 of 36 values are not finite"):
        FloatPass(net, {}).show(torch.ones(1, 3, 5, 5))
