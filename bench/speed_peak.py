"""The integer peak of this machine: the fastest of some large int8 convolutions on one thread, in OpenVINO.

    python bench/speed_peak.py

Each file is a chain of equal convolutions in 8 bits; the time of each is that of OpenVINO's own profile. The
peak of several threads is taken as that many times the peak of one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fewbit.engines.process import EngineProcess
from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.load.capture import capture
from fewbit.search.cost import count_cost
from speed_answers import Kind, make_file
from speed_networks import Network

# (channels, side of the image, side of the kernel)
SHAPES = ((256, 28, 1), (512, 28, 1), (1024, 14, 1), (128, 28, 3), (256, 28, 3), (512, 14, 3))
_LENGTH = 4


def measure_peak(shape: tuple[int, int, int], batch: int, calls: int, length: int = _LENGTH) -> float:
    """Return the giga-operations a second of the fastest convolution in a chain of equal ones.

    A multiplication and an addition are two operations.

    Raises:
        EngineError: OpenVINO runs none of them in integers, or fails.
    """
    channels, side, kernel = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(length)]
    chain = [module for convolution in convolutions for module in (convolution, nn.ReLU())]
    model = nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = capture(model, "chain", (channels, side, side))
    images = np.random.default_rng(0).standard_normal((2, channels, side, side)).astype(np.float32)
    macs = count_cost(net).macs * batch / length
    with tempfile.TemporaryDirectory() as folder, EngineProcess("openvino") as process:
        path = make_file(Network("chain", "chain", net, images), Kind("int8", "openvino"), Path(folder), 0)
        session = process.open(path, Setting(engine="openvino", batch=batch))
        taken = [o.ms for o in session.profile(calls) if o.matrix and o.precision == "int8"]
    if not taken:
        raise EngineError("openvino: it runs no large int8 convolution in integers here; there is no peak")
    return 2 * macs / (min(taken) * 1e-3) / 1e9


def find_peak(batch: int = 1, calls: int = 20) -> float:
    """Return the giga-operations a second of the fastest of `SHAPES` on one thread."""
    return max(measure_peak(shape, batch, calls) for shape in SHAPES)


@click.command()
@click.option("--batch", default=1, show_default=True, help="Images in one call.")
@click.option("--calls", default=20, show_default=True, help="Calls that the mean is taken over.")
def main(batch: int, calls: int) -> None:
    """Print the speed of large int8 convolutions on one thread."""
    table = Table("channels", "image", "kernel", "int8 GOP/s, one thread")
    for channels, side, kernel in SHAPES:
        speed = measure_peak((channels, side, kernel), batch, calls)
        table.add_row(str(channels), f"{side}x{side}", f"{kernel}x{kernel}", f"{speed:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
