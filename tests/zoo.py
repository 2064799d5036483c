"""Eight classic networks with random weights, defined by torchvision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from torchvision_stub import need

SIZE = (3, 224, 224)
CLASSES = 1000
NETWORKS = (
    "resnet18",
    "mobilenet_v2",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "mobilenet_v3_small",
    "googlenet",
    "densenet121",
    "vgg16",
)
TIMM = ("resnet18", "efficientnet_b0", "mobilenetv3_small_100", "convnext_atto", "tf_efficientnet_lite0")


def zoo(name: str, seed: int = 0) -> nn.Module:
    """Build a network of NETWORKS as trained ones look: BatchNorm statistics other than 0 and 1.

    Args:
        name: One of NETWORKS.
        seed: Of weights and statistics.

    Returns:
        The model for images (N, 3, 224, 224), in evaluation mode; the test is skipped without torchvision.
    """
    need("torchvision")
    from torchvision import models

    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return _build(lambda: getattr(models, name)(**arguments), seed)


def timm_zoo(name: str, seed: int = 0) -> nn.Module:
    """Build a model of timm in the same way."""
    need("timm")
    import timm

    return _build(lambda: timm.create_model(name), seed)


def _build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.6, 1.4)
                nn.init.normal_(module.bias, 0.0, 0.1)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.6, 1.4)
    return model.eval()
