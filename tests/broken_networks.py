"""Small networks that are each broken in one way for a quantizer, and how they are when whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.doctor.diagnose import Images
from fewbit.doctor.sample import Sample
from fewbit.load.capture import capture
from fewbit.net import Net

SIZE = (3, 16, 16)
CLASSES = 4
CALIBRATION, JUDGING = 64, 192


@dataclass(frozen=True)
class Patient:
    """A network with labelled images of its own."""

    net: Net
    pixels: Tensor
    targets: np.ndarray

    def images(self) -> Images:
        whole = Sample.of_tensor(self.pixels, self.targets, batch=64)
        places = np.arange(len(self.targets))
        return Images(whole.subset(places[:CALIBRATION]), whole.subset(places[CALIBRATION:]))


def noise(seed: int = 0) -> Tensor:
    """Coarse blobs with noise, so that images differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    count = CALIBRATION + JUDGING
    coarse = torch.randn((count, 3, 4, 4), generator=generator)
    return F.interpolate(coarse, scale_factor=4.0) + 0.3 * torch.randn((count, *SIZE), generator=generator)


def sharpened(model: nn.Module, pixels: Tensor) -> nn.Module:
    """Scale and shift the logits so that each class is sure of about as many images."""
    with torch.no_grad():
        logits = model.eval()(pixels)
        head: nn.Linear = model.fc
        spread = logits.std(0) / 1.5
        head.weight /= spread[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) / spread)
    return model


def patient(model: nn.Module, pixels: Tensor) -> Patient:
    """Label images by what the network says of them."""
    with torch.no_grad():
        targets = model.eval()(pixels).argmax(1).numpy()
    return Patient(capture(model, type(model).__name__.lower(), SIZE, CLASSES), pixels, targets)


class Separable(nn.Module):
    """A stem, a depthwise and a pointwise convolution with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pw = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.dw(F.relu(self.stem(x))))
        return self.fc(F.relu(self.pw(x)).mean((2, 3)))


def spread_channels(broken: bool = True) -> Patient:
    """Depthwise filters from 1/1024 to 1; what reads them makes up for it, so the function is the same."""
    torch.manual_seed(0)
    model = sharpened(Separable(), noise())
    if broken:
        factors = 2.0 ** -torch.linspace(0, 10, 16)
        with torch.no_grad():
            model.dw.weight *= factors.reshape(-1, 1, 1, 1)
            model.dw.bias *= factors
            model.pw.weight /= factors.reshape(1, -1, 1, 1)
    return patient(model, noise())


class Spots(nn.Module):
    """Tells how bright the one bright pixel of an image is."""

    def __init__(self) -> None:
        super().__init__()
        self.find = nn.Conv2d(3, 8, 1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.find(x))
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))


def bright_spots() -> Patient:
    """One pixel in 2048 values says the class: 10, 20, 30 or 40 above all others."""
    generator = torch.Generator().manual_seed(0)
    count = CALIBRATION + JUDGING
    pixels = torch.randn((count, *SIZE), generator=generator)
    targets = torch.arange(count) % CLASSES
    levels = 10.0 * (1 + torch.arange(CLASSES))
    rows, columns = (torch.randint(0, 16, (count,), generator=generator) for _ in range(2))
    pixels[torch.arange(count), 0, rows, columns] = levels[targets] + 4
    torch.manual_seed(0)
    model = Spots()
    with torch.no_grad():
        model.find.weight[0], model.find.bias[0] = torch.tensor([1.0, 0, 0]).reshape(3, 1, 1), -4.0
        model.find.weight[1:, 0] = 0
        model.mix.weight.copy_(torch.eye(8).reshape(8, 8, 1, 1))
        model.mix.bias.zero_()
        sums = levels / 256
        model.fc.weight.zero_()
        model.fc.weight[:, 0] = 2 * sums * 1500
        model.fc.bias.copy_(-(sums**2) * 1500)
    return Patient(capture(model.eval(), "spots", SIZE, CLASSES), pixels, targets.numpy())


class Joined(nn.Module):
    """Two branches, joined and read together."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(3, 8, 3, padding=1)
        self.after = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((F.relu(self.wide(x)), F.relu(self.narrow(x))), 1)
        return self.fc(F.relu(self.after(x)).mean((2, 3)))


def joined_branches(ratio: float = 100.0) -> Patient:
    """One branch is `ratio` times as large as the other, and read by weights as much smaller."""
    torch.manual_seed(0)
    model = sharpened(Joined(), noise())
    with torch.no_grad():
        model.wide.weight *= ratio
        model.wide.bias *= ratio
        model.after.weight[:, :8] /= ratio
    return patient(model, noise())


class Stack(nn.Module):
    """Three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.fc(F.relu(self.third(x)).mean((2, 3)))


def biased_weights(broken: bool = True) -> Patient:
    """One weight a channel of a convolution is large; all others are 0.4 of its step, of one sign."""
    torch.manual_seed(0)
    model = Stack()
    with torch.no_grad():
        model.first.bias += 1.0  # its outputs are far above zero, so that shifts of the mean count
        if broken:
            signs = torch.sign(torch.randn(32, 1, 1, 1))
            model.second.weight.copy_(signs * 0.4 / 127 * torch.ones(32, 32, 3, 3))
            model.second.weight[torch.arange(32), torch.randperm(32), 1, 1] = 1.0
    return patient(sharpened(model, noise()), noise())


def rare_outliers() -> Patient:
    """A channel that nothing reads is a thousand times as large as the others at rare pixels."""
    torch.manual_seed(0)
    model = Stack()
    with torch.no_grad():
        model.second.weight[:, 0] = 0
        fired = model.first(noise())[:, 0]
        model.first.weight[0] *= 1000
        model.first.bias[0] = 1000 * (
            model.first.bias[0] - fired.flatten().kthvalue(fired.numel() - 40).values
        )
    return patient(sharpened(model, noise()), noise())
