from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.engines.process import EngineProcess
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.prepare.canonical import Canonical
from fewbit.prepare.fold_bn import FoldBN
from fewbit.prepare.replace_silu import GELU_SCALE, ReplaceSiLU
from fewbit.recipe import read_recipe, run_recipe
from fewbit.search.cost import count_silus
from fewbit.sensitivity.sqnr import layer_records
from fewbit.spec import SiluForm
from networks import CLASSES, SIZE, make_context, make_images, make_net

FORMS: tuple[SiluForm, ...] = ("gelu", "hard_swish")
FARTHEST = {"gelu": 0.0247, "hard_swish": 0.1423}
X = torch.linspace(-20, 20, 400_001, dtype=torch.float64)


class Swishing(nn.Module):
    """A SiLU behind a convolution with a BatchNorm, one by hand, one behind a sum, one of a shared tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16, 16))
        self.bn, self.fc = nn.BatchNorm2d(16), nn.Linear(16, CLASSES)
        self.bn.running_mean.uniform_(-0.3, 0.3)
        self.bn.running_var.uniform_(0.3, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.a(x)))
        y = self.b(x)
        x = F.silu(x + y * torch.sigmoid(y))
        y = self.c(x)
        x = self.d(x + y + F.silu(y))
        return self.fc(x.mean((2, 3)))


def swishing() -> Net:
    torch.manual_seed(0)
    return capture(Swishing().eval(), "swishing", SIZE, CLASSES)


def replaced(form: SiluForm) -> tuple[Net, Net]:
    """Return the network with its BatchNorm folded, and the one with its SiLU replaced."""
    net = swishing()
    for step in (Canonical(), FoldBN()):
        step(net, make_context())
    other = net.clone()
    report = ReplaceSiLU(form=form)(other, make_context())
    assert report.changed == 2
    assert report.notes == ("left as they are: silu_1, silu_2",)
    return net, other


@pytest.mark.parametrize("form", FORMS)
def test_the_functions_differ_by_what_the_docstring_says(form: SiluForm) -> None:
    other = GELU_SCALE * F.gelu(X / GELU_SCALE) if form == "gelu" else F.hardswish(X)
    assert float((other - F.silu(X)).abs().max()) == pytest.approx(FARTHEST[form], abs=1e-4)
    told = {"gelu": 0.025, "hard_swish": 0.143}[form]
    assert told - 0.001 < FARTHEST[form] < told
    assert f"|difference| <= {told}\n" in (ReplaceSiLU.__doc__ or "")


def test_the_scale_of_gelu_is_that_of_the_least_greatest_difference() -> None:
    def farthest(scale: float) -> float:
        return float((scale * F.gelu(X / scale) - F.silu(X)).abs().max())

    best = farthest(GELU_SCALE)
    assert best < farthest(GELU_SCALE - 0.002) and best < farthest(GELU_SCALE + 0.002)
    assert best < 0.75 * farthest(1.702)  # what GELU is known to be near to by its slope


@pytest.mark.parametrize("form", FORMS)
def test_the_network_computes_the_other_function(form: SiluForm) -> None:
    net, other = replaced(form)
    images = make_images()
    with torch.no_grad():
        seen = net.graph(images), other.graph(images)
    kinds = [layer.kind for layer in other.layers()]
    assert kinds.count("Silu") == 2
    assert kinds.count("Gelu" if form == "gelu" else "HardSwish") == 2
    far = float((seen[0] - seen[1]).abs().max())
    assert 1e-5 < far < 2 * FARTHEST[form]


def test_gelu_reads_a_convolution_divided_by_its_scale_and_so_is_what_its_batchnorm_said() -> None:
    net, other = replaced("gelu")
    before, after = (n.graph.get_submodule("a") for n in (net, other))
    torch.testing.assert_close(after.weight * GELU_SCALE, before.weight)
    torch.testing.assert_close(after.bias * GELU_SCALE, before.bias)
    torch.testing.assert_close(other.statistics["a"].std * GELU_SCALE, net.statistics["a"].std)
    torch.testing.assert_close(other.statistics["a"].mean * GELU_SCALE, net.statistics["a"].mean)


def test_a_convolution_that_runs_twice_is_divided_for_the_silu_only() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(F.silu(self.a(x)))
            return self.fc(F.silu(self.b(x)).mean((2, 3)))

    net = capture(Twice().eval(), "twice", SIZE, CLASSES)
    Canonical()(net, make_context())
    images = make_images()
    with torch.no_grad():
        before = net.graph(images)
        assert ReplaceSiLU()(net, make_context()).changed
        assert float((net.graph(images) - before).abs().max()) < 2 * FARTHEST["gelu"]


def test_tied_weights_are_divided_in_one_layer_only() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.b.weight, self.fc = self.a.weight, nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((F.silu(self.a(x)) + F.relu(self.b(x))).mean((2, 3)))

    net = capture(Tied().eval(), "tied", SIZE, CLASSES)
    Canonical()(net, make_context())
    before = net.graph.get_submodule("b").weight.detach().clone()
    assert ReplaceSiLU()(net, make_context()).changed == 1
    assert torch.equal(net.graph.get_submodule("b").weight, before)
    torch.testing.assert_close(net.graph.get_submodule("a").weight * GELU_SCALE, before)


def test_layers_are_compared_with_the_network_of_the_new_function() -> None:
    float_net, net = (
        swishing(),
        run_recipe(read_recipe("int8").with_silu("gelu"), swishing(), make_context())[0],
    )
    records = {record.name: record for record in layer_records(float_net, net, [make_images()])}
    assert records["a"].sqnr_db is not None and records["a"].sqnr_db > 25  # not a convolution divided by c


def test_only_silus_that_can_be_replaced_are_counted() -> None:
    assert count_silus(swishing()) == 2
    net = swishing()
    Canonical()(net, make_context())
    assert count_silus(net) == 2
    assert [layer.kind for layer in net.layers()].count("Silu") == 4  # it stays as it is
    assert count_silus(make_net("residual")) == 0
    assert count_silus(make_net("gated")) == 1  # not its hard-swish, nor its gate of another tensor


@pytest.mark.parametrize("form", FORMS)
def test_openvino_computes_it_inside_the_convolution(form: SiluForm, tmp_path: Path) -> None:
    recipe = read_recipe("int8").with_silu(form)
    assert recipe.name == f"int8-{form.replace('_', '-')}"
    net = run_recipe(recipe, swishing(), make_context("openvino"))[0]
    path = tmp_path / "net.onnx"
    export_onnx(net, path, target("openvino"))
    nodes = {node.output[0]: node for node in onnx.load(path).graph.node}
    kind = "Gelu" if form == "gelu" else "HardSwish"
    assert sum(node.op_type == kind for node in nodes.values()) == 2
    images = make_images(16).numpy()
    with EngineProcess("openvino") as process:
        session = process.open(path, Setting(engine="openvino", batch=16))
        logits = session.run(images)
        alone = [o for o in session.placement().operators if o.kind in ("Subgraph", "Eltwise")]
    assert not [o for o in alone if any(n in o.name.lower() for n in ("gelu", "swish", "scaled"))], alone
    with EngineProcess("reference") as process:
        exact = process.open(path, Setting(engine="reference", batch=16)).run(images)
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_a_network_without_silu_is_left_alone() -> None:
    net = make_net("residual")
    Canonical()(net, make_context())
    before = [layer.kind for layer in net.layers()]
    assert ReplaceSiLU()(net, make_context()).changed == 0
    assert [layer.kind for layer in net.layers()] == before
