from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import NetworkError, RecipeError
from fewbit.load.capture import capture
from small_models import SIZE, Body, body, captured, kinds


def inplace_twice(self: Any, x: Tensor) -> Tensor:
    y = x.relu_()
    y += 1
    return x * 2 + y


def shuffle(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def megvii_shuffle(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.reshape(n * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
    return x[0] - x[1]


def squeeze_excite(self: Any, x: Tensor) -> Tensor:
    n, c, _, _ = x.size()
    gate = torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c))).view(n, c, 1, 1)
    return x * gate.expand_as(x)


def same_padding(self: Any, x: Tensor) -> Tensor:
    rows = max((-(-x.shape[2] // 2) - 1) * 2 + 3 - x.shape[2], 0)
    return F.pad(x, [rows // 2, rows - rows // 2] * 2)


def option_a(self: Any, x: Tensor) -> Tensor:
    part = x[:, :, ::2, ::2]
    return torch.cat((part, torch.zeros(part.size(0), 2, part.size(2), part.size(3))), 1)


FORMS: list[tuple[str, Body, list[str]]] = [
    ("functional relu", body(lambda s, x: F.relu(x, inplace=True)), ["Relu", "Flatten"]),
    ("relu6", body(lambda s, x: F.relu6(x)), ["Clip", "Flatten"]),
    ("relu6 module", body(lambda s, x: s.act(x), act=nn.ReLU6(inplace=True)), ["Clip", "Flatten"]),
    ("hardtanh", body(lambda s, x: F.hardtanh(x, -0.5, 2.0)), ["Clip", "Flatten"]),
    ("clamp", body(lambda s, x: x.clamp(min=-0.25, max=0.5)), ["Clip", "Flatten"]),
    ("clamp at 0", body(lambda s, x: torch.clamp(x, min=0)), ["Relu", "Flatten"]),
    ("clamp_min", body(lambda s, x: x.clamp_min(0.1)), ["Clip", "Flatten"]),
    ("clamp_max", body(lambda s, x: torch.clamp_max(x, 0.1)), ["Clip", "Flatten"]),
    ("leaky relu", body(lambda s, x: F.leaky_relu(x, 0.2)), ["LeakyRelu", "Flatten"]),
    ("prelu", body(lambda s, x: F.prelu(x, s.w), w=nn.Parameter(torch.rand(6))), ["PRelu", "Flatten"]),
    ("prelu module", body(lambda s, x: s.act(x), act=nn.PReLU(6)), ["PRelu", "Flatten"]),
    ("elu", body(lambda s, x: F.elu(x, 0.7)), ["Elu", "Flatten"]),
    ("gelu", body(lambda s, x: F.gelu(x, approximate="tanh")), ["Gelu", "Flatten"]),
    ("softplus", body(lambda s, x: F.softplus(x)), ["Softplus", "Flatten"]),
    ("mish", body(lambda s, x: F.mish(x)), ["Mish", "Flatten"]),
    ("tanh", body(lambda s, x: torch.tanh(x)), ["Tanh", "Flatten"]),
    ("silu", body(lambda s, x: F.silu(x)), ["Silu", "Flatten"]),
    ("hard-swish", body(lambda s, x: F.hardswish(x)), ["HardSwish", "Flatten"]),
    ("hard-sigmoid", body(lambda s, x: F.hardsigmoid(x)), ["HardSigmoid", "Flatten"]),
    ("x sigmoid(x)", body(lambda s, x: x.sigmoid() * x), ["Sigmoid", "Mul", "Flatten"]),
    ("relu6(x + 3) / 6", body(lambda s, x: F.relu6(x + 3) / 6), ["Affine", "Clip", "Affine", "Flatten"]),
    ("softmax", body(lambda s, x: x.softmax(1)), ["Softmax", "Flatten"]),
    ("log_softmax", body(lambda s, x: F.log_softmax(x, 1)), ["LogSoftmax", "Flatten"]),
    ("1 - x", body(lambda s, x: 1 - x), ["Affine", "Flatten"]),
    ("-x", body(lambda s, x: -x), ["Affine", "Flatten"]),
    ("x - x", body(lambda s, x: x - x.relu()), ["Relu", "Sub", "Flatten"]),
    ("x / y", body(lambda s, x: x / (x.sigmoid() + 1)), ["Sigmoid", "Affine", "Div", "Flatten"]),
    ("x + 0", body(lambda s, x: 0 + x), ["Flatten"]),
    ("x + x", body(lambda s, x: x + x), ["Add", "Flatten"]),
    (
        "a parameter times x",
        body(lambda s, x: s.g * x, g=nn.Parameter(torch.rand(6, 1, 1))),
        ["Affine", "Flatten"],
    ),
    (
        "a view of a parameter times x",
        body(lambda s, x: x.mul(s.g.view(1, -1, 1, 1)), g=nn.Parameter(torch.rand(6))),
        ["Affine", "Flatten"],
    ),
    ("mean of H and W", body(lambda s, x: x.mean([2, 3])), ["GlobalAvgPool", "Flatten"]),
    ("two means", body(lambda s, x: x.mean(3).mean(2)), ["Mean", "Mean"]),
    ("sum of H and W", body(lambda s, x: x.sum((2, 3))), ["GlobalAvgPool", "Flatten", "Affine"]),
    ("amax", body(lambda s, x: x.amax((2, 3))), ["MaxPool", "Flatten"]),
    ("pool to 1", body(lambda s, x: F.adaptive_avg_pool2d(x, 1)), ["GlobalAvgPool", "Flatten"]),
    ("pool to 4", body(lambda s, x: s.pool(x), pool=nn.AdaptiveAvgPool2d((4, 2))), ["AvgPool", "Flatten"]),
    ("pool to the same", body(lambda s, x: F.adaptive_avg_pool2d(x, (None, 8))), ["Flatten"]),
    ("pool to 16", body(lambda s, x: F.adaptive_avg_pool2d(x, 16)), ["Upsample", "Flatten"]),
    ("adaptive maximum", body(lambda s, x: F.adaptive_max_pool2d(x, 2)), ["MaxPool", "Flatten"]),
    ("average of all", body(lambda s, x: F.avg_pool2d(x, x.size()[2:])), ["GlobalAvgPool", "Flatten"]),
    (
        "average",
        body(lambda s, x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False)),
        ["AvgPool", "Flatten"],
    ),
    ("maximum", body(lambda s, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)), ["MaxPool", "Flatten"]),
    ("maximum of torch", body(lambda s, x: torch.max_pool2d(x, 3, 2, 1, 1, True)), ["MaxPool", "Flatten"]),
    ("local response", body(lambda s, x: F.local_response_norm(x, 3, 1e-2, 0.7, 2.0)), ["LRN", "Flatten"]),
    ("channel shuffle", body(shuffle), ["Reshape", "Permute", "Reshape", "Flatten"]),
    (
        "nn.ChannelShuffle",
        body(lambda s, x: s.mix(x), mix=nn.ChannelShuffle(3)),
        ["Reshape", "Permute", "Reshape", "Flatten"],
    ),
    (
        "shuffle through the batch axis",
        body(megvii_shuffle),
        ["Reshape", "Permute", "Reshape", "Slice", "Reshape", "Slice", "Reshape", "Sub", "Flatten"],
    ),
    ("chunk", body(lambda s, x: x.chunk(2, dim=1)[1]), ["Slice", "Flatten"]),
    (
        "split",
        body(lambda s, x: torch.cat(torch.split(x, [1, 5], 1)[::-1], 1)),
        ["Slice", "Slice", "Concat", "Flatten"],
    ),
    ("unbind", body(lambda s, x: x.unbind(1)[2]), ["Slice", "Reshape", "Flatten"]),
    (
        "stack",
        body(lambda s, x: torch.stack((x, x.relu()), 2)),
        ["Relu", "Reshape", "Reshape", "Concat", "Flatten"],
    ),
    ("slices", body(lambda s, x: x[..., 1::2, :-1]), ["Slice", "Flatten"]),
    ("one channel", body(lambda s, x: x[:, -1]), ["Slice", "Reshape", "Flatten"]),
    (
        "new axes",
        body(lambda s, x: x[:, :, 0, 0][..., None, None]),
        ["Slice", "Flatten", "Reshape", "Flatten"],
    ),
    (
        "channels by index",
        body(lambda s, x: x[:, [2, 1, 0]]),
        ["Slice", "Slice", "Slice", "Concat", "Flatten"],
    ),
    ("flatten twice", body(lambda s, x: x.flatten(2).mean(2)), ["Reshape", "Mean"]),
    ("pad", body(lambda s, x: F.pad(x, (0, 1, 0, 1))), ["Pad", "Flatten"]),
    ("negative pad", body(lambda s, x: F.pad(x, (-1, 2, 0, 0), value=1.0)), ["Slice", "Pad", "Flatten"]),
    ("pad computed from the shape", body(same_padding), ["Pad", "Flatten"]),
    ("zeros joined", body(option_a), ["Slice", "Pad", "Flatten"]),
    ("zeros_like joined", body(lambda s, x: torch.cat((x, torch.zeros_like(x)), 1)), ["Pad", "Flatten"]),
    ("interpolate", body(lambda s, x: F.interpolate(x, scale_factor=2)), ["Upsample", "Flatten"]),
    (
        "squeeze and excite",
        body(squeeze_excite, fc=nn.Linear(6, 6)),
        ["GlobalAvgPool", "Flatten", "Linear", "Sigmoid", "Reshape", "Mul", "Flatten"],
    ),
    ("matmul", body(lambda s, x: x @ x.transpose(2, 3)), ["Permute", "MatMul", "Flatten"]),
    (
        "matmul with a weight",
        body(lambda s, x: x @ s.w, w=nn.Parameter(torch.rand(8, 3))),
        ["Linear", "Flatten"],
    ),
    (
        "functional conv",
        body(lambda s, x: F.conv2d(x, s.w, padding="same", groups=2), w=nn.Parameter(torch.rand(4, 3, 3, 3))),
        ["Conv", "Flatten"],
    ),
    (
        "conv 'same'",
        body(lambda s, x: s.conv(x), conv=nn.Conv2d(6, 4, 3, padding="same")),
        ["Conv", "Flatten"],
    ),
    (
        "layer norm of channels",
        body(lambda s, x: s.norm(x.permute(0, 2, 3, 1)), norm=nn.LayerNorm(6)),
        ["Permute", "LayerNorm", "Flatten"],
    ),
    (
        "a loop over the shape",
        body(lambda s, x: sum(x[:, i] for i in range(x.size(1)))),
        ["Slice", "Reshape"] * 6 + ["Add"] * 5 + ["Flatten"],
    ),
    (
        "casts and copies",
        body(lambda s, x: x.float().to(torch.float32).clone().detach().contiguous()),
        ["Flatten"],
    ),
    ("identity", body(lambda s, x: s.nothing(x), nothing=nn.Identity()), ["Flatten"]),
]


@pytest.mark.parametrize(("model", "expected"), [f[1:] for f in FORMS], ids=[f[0] for f in FORMS])
def test_each_form_becomes_its_layers(model: Body, expected: list[str]) -> None:
    net = captured(model)
    assert sorted(kinds(net)) == sorted(expected)


def test_change_in_place_reaches_a_later_reader() -> None:
    net = captured(body(inplace_twice))
    assert kinds(net).count("Relu") == 1


def test_iadd_reaches_a_later_reader_but_not_a_copy() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        before, copy = x, x.clone()
        x += 2
        return before * copy

    captured(body(function))


def test_inplace_module_on_a_shared_tensor() -> None:
    captured(body(lambda s, x: s.act(x) + x, act=nn.ReLU(inplace=True)))


def test_a_view_changed_in_place_is_refused() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        x[:, :3].relu_()
        return x

    with pytest.raises(
        NetworkError, match=r"net: the captured network differs from the model by .* change a view"
    ):
        capture(body(function), "net", SIZE)


def test_one_relu_module_used_twice_is_two_layers() -> None:
    net = captured(body(lambda s, x: s.act(s.act(x) - 0.1), act=nn.ReLU()))
    assert [layer.name for layer in net.layers()] == ["stem", "act", "sub", "act_1", "flatten", "head"]
    assert net.layer("act").module is not net.layer("act_1").module


def test_one_convolution_used_twice_shares_its_weight() -> None:
    net = captured(body(lambda s, x: s.conv(s.conv(x)), conv=nn.Conv2d(6, 6, 1)))
    first, second = net.layer("conv").module, net.layer("conv_1").module
    assert first is not second
    assert first.weight is second.weight


def test_layers_keep_the_names_of_the_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(F.relu(x)))

    net = captured(body(lambda s, x: s.blocks(x), blocks=nn.Sequential(Block(), Block())))
    names = [layer.name for layer in net.layers()]
    assert names[1:4] == ["blocks.0.relu_1", "blocks.0.conv", "blocks.0.relu"]
    assert net.edges()[2] == ("blocks.0.relu_1", "blocks.0.conv")


def test_own_linear_module_is_one_layer_of_its_name() -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    net = captured(body(lambda s, x: s.mine(x.mean((2, 3))), mine=Mine(6, 4)))
    assert net.layer("mine").kind == "Linear"
    assert set(net.graph.state_dict()) >= {"mine.weight", "mine.bias"}


def test_standardized_weight_is_computed_once() -> None:
    class Standard(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias)

    net = captured(body(lambda s, x: s.conv(x), conv=Standard(6, 4, 1)))
    assert kinds(net) == ["Conv", "Flatten"]


def test_parametrized_weight_becomes_plain() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1))
    net = captured(body(lambda s, x: s.conv(x), conv=conv))
    assert {"conv.weight", "conv.bias"} < set(net.graph.state_dict())
    assert type(net.layer("conv").module) is nn.Conv2d


def test_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    model.scaled = model[1].weight * 2
    with pytest.raises(NetworkError, match=r"net: cannot be copied \(Only Tensors created explicitly"):
        capture(model, "net", SIZE)


def test_view_of_a_parameter_stays_trainable() -> None:
    net = captured(body(lambda s, x: x * s.gamma.reshape(1, -1, 1, 1), gamma=nn.Parameter(torch.rand(6))))
    assert "mul.scale" in dict(net.graph.named_parameters())


def test_shape_asserts_and_static_branches_are_followed() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        assert x.shape[1] == 6 and x.dim() == 4 and x.dtype == torch.float32
        torch._assert(x.shape[1] == 6, "channels")
        return x.relu() if x.shape[2] % 2 == 0 else x

    assert kinds(captured(body(function))) == ["Relu", "Flatten"]


def test_extra_arguments_of_forward_keep_their_defaults() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor, features: bool = False, **options: int) -> Tensor:
            return x.flatten(1) if features else self.fc(x.flatten(1))

    assert [layer.kind for layer in captured(Model()).layers()] == ["Flatten", "Linear"]


# ------------------------------------------------------------------------------------------- training


class Trained(nn.Module):
    """BatchNorm, dropout of each form, a stride and a shared BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False, momentum=0.3)
        self.drop, self.drop2 = nn.Dropout(0.3), nn.Dropout2d(0.4)
        self.alpha = nn.AlphaDropout(0.2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = x + self.drop2(self.bn2(self.conv2(x)))
        x = F.dropout2d(self.bn1(x), 0.1, training=self.training)
        x = self.alpha(F.dropout(x.mean((2, 3)), p=0.2, training=self.training))
        return self.fc(self.drop(x))


def test_training_equals_the_models() -> None:
    torch.manual_seed(0)
    model = Trained()
    net = captured(model)
    assert net.facts == frozenset()
    images = torch.randn(4, 3, 8, 8)
    for step in range(2):
        results = []
        for network in (model.train(), net.train().graph):
            torch.manual_seed(step)
            loss = network(images).square().sum()
            network.zero_grad()
            loss.backward()
            results.append(loss.detach())
        assert torch.equal(results[0], results[1])
    expected = model.state_dict()
    assert int(expected["bn1.num_batches_tracked"]) == 4
    for key, value in net.graph.state_dict().items():
        assert torch.equal(value, expected[key.replace("bn1_1", "bn1")]), key
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key, parameter in net.graph.named_parameters():
        assert torch.equal(parameter.grad, gradients[key]), key


def test_capturing_leaves_the_model_as_it_was() -> None:
    model = Trained().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    net = capture(model, "net", SIZE)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    net.layer("fc").module.weight.data.zero_()
    assert torch.equal(model.fc.weight, before["fc.weight"])


def test_another_way_in_training_is_a_fact() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return x.relu() if self.training else x

    net = captured(body(function))
    assert net.facts == {"eval_only"}
    with pytest.raises(RecipeError, match="net: its forward goes another way in training"):
        net.train()


def test_frozen_batch_norm_is_a_fact() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    assert captured(body(lambda s, x: s.bn(x), bn=Frozen(6))).facts == {"eval_only"}


def test_auxiliary_heads_of_training_are_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux = nn.Linear(192, 5), nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Any:
            x = x.flatten(1)
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    net = captured(Model())
    assert net.facts == {"eval_only"}
    assert [layer.name for layer in net.layers()] == ["flatten", "fc"]
