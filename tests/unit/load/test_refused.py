from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import NetworkError
from fewbit.load.capture import capture
from small_models import SIZE, body

REFUSED: list[tuple[str, Callable[..., Tensor], str]] = [
    (
        "a branch on values",
        lambda s, x: x if x.sum() > 0 else -x,
        "net: cannot be captured (symbolically traced .*must not depend on the values",
    ),
    (
        "item",
        lambda s, x: x * x.max().item(),
        "net: cannot be captured (it reads the values of a tensor by 'item'); its forward",
    ),
    ("float", lambda s, x: x * float(x.abs().max()), "net: cannot be captured ("),
    (
        "unknown operation",
        lambda s, x: x.cumsum(1),
        "net: layer 'cumsum': operation 'cumsum' is not supported; rewrite it with the operations listed",
    ),
    ("power", lambda s, x: x**2, "net: layer 'pow': operation 'pow' is not supported"),
    (
        "constant over tensor",
        lambda s, x: 1 / (x + 9),
        "net: layer 'truediv': a constant divided by a tensor is not supported",
    ),
    (
        "odd pool",
        lambda s, x: F.adaptive_avg_pool2d(x, 3),
        "net: layer 'adaptive_avg_pool2d': adaptive average pooling of 8x8 to 3x3 (not a whole",
    ),
    (
        "reflect",
        lambda s, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        "net: layer 'pad': padding mode 'reflect' is not supported",
    ),
    (
        "bilinear",
        lambda s, x: F.interpolate(x, size=16, mode="bilinear"),
        "net: layer 'interpolate': interpolation mode 'bilinear' of 8x8 to 16x16",
    ),
    ("always dropping", lambda s, x: F.dropout(x, 0.5, True), "net: layer 'dropout': dropout in evaluation"),
    (
        "batch statistics",
        lambda s, x: F.batch_norm(x, None, None, training=True),
        "net: layer 'batch_norm': BatchNorm with the statistics of the batch",
    ),
    (
        "half precision",
        lambda s, x: x.to(torch.float64).to(torch.float32),
        "net: layer 'to': a cast to torch.float64 is not supported",
    ),
    (
        "mean over images",
        lambda s, x: x - x.mean(0),
        "net: layer 'mean' returns (6, 8, 8) for 2 images and (6, 8, 8) for 3; one axis must grow",
    ),
    (
        "another image",
        lambda s, x: x + x[:1],
        "net: layer 'getitem' returns (1, 6, 8, 8) for 2 images and (1, 6, 8, 8) for 3",
    ),
    ("rolled images", lambda s, x: torch.cat((x[1:], x[:1])), "net: layer 'getitem' returns"),
    (
        "softmax over images",
        lambda s, x: x.softmax(0),
        "net: layer 'softmax': softmax over the batch is not supported",
    ),
    (
        "the number of images",
        lambda s, x: x * x.size(0),
        "net: the captured network differs from the model by",
    ),
    (
        "expanded",
        lambda s, x: x[:, :1].expand(-1, 6, -1, -1).relu(),
        "net: layer 'relu': expanding a tensor for anything but arithmetic is not supported",
    ),
    (
        "another way for more images",
        lambda s, x: x.relu() if len(x) > 2 else x,
        "net: cannot be captured (it does other things for 3 images than for 2)",
    ),
]


@pytest.mark.parametrize(("function", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_no_layer_stands_for_is_refused_by_name(function: Callable[..., Tensor], message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(NetworkError, match=pattern) as error:
        capture(body(function), "net", SIZE)
    assert "\n" not in str(error.value)


def test_module_that_no_layer_stands_for() -> None:
    model = body(lambda s, x: s.norm(x), norm=nn.GroupNorm(2, 6))
    with pytest.raises(
        NetworkError, match="net: layer 'norm': module GroupNorm is not supported; rewrite it"
    ):
        capture(model, "net", SIZE)


def test_batch_norm_without_running_statistics() -> None:
    model = body(lambda s, x: s.bn(x), bn=nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(NetworkError, match="layer 'bn': BatchNorm with the statistics of the batch"):
        capture(model, "net", SIZE)


def test_convolution_with_other_padding() -> None:
    model = body(lambda s, x: s.conv(x), conv=nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"))
    with pytest.raises(NetworkError, match="layer 'conv': padding mode 'circular' is not supported"):
        capture(model, "net", SIZE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            r"net: returns shape \(3, 4, 6, 6\) for 3 images; a classifier returns logits \(N, classes\)",
        ),
        (
            nn.Conv2d(4, 4, 3),
            r"net: refuses images of size \(3, 8, 8\) \(Given groups=1, .*\); set \[input\] size",
        ),
    ],
)
def test_model_that_is_no_classifier_of_these_images(model: nn.Module, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        capture(model, "net", SIZE)


def test_model_that_returns_a_tuple() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1), x

    with pytest.raises(NetworkError, match="net: returns a tuple for 3 images; a classifier returns logits"):
        capture(Model(), "net", SIZE)


def test_number_of_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(
        NetworkError, match=r"net: returns 5 classes, the card says 10; set \[network\] classes = 5"
    ):
        capture(model, "net", SIZE, classes=10)


def test_logits_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    nn.init.constant_(model[1].bias, float("inf"))
    with pytest.raises(
        NetworkError, match="net: its logits are not finite on a random image; check its weights"
    ):
        capture(model, "net", SIZE)


def test_half_precision_model_is_captured_in_float32() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).half()
    net = capture(model, "net", SIZE)
    assert net.layer("1").module.weight.dtype == torch.float32
    assert model[1].weight.dtype == torch.float16
