"""Train the two demo networks on the built-in images and write their weights into the package.

    python scripts/train_demo.py residual
    python scripts/train_demo.py depthwise

First several epochs on gentle images (hardness 0), then one on fresh images of full hardness, each with one
cycle of SGD with momentum. The weights are written after each of the two stages. Products of the residual
network run in bfloat16, its weights stay float32. The same seed and threads on a host give the same weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbit.data.demo import demo_cards, make_images
from fewbit.demo.networks import demo_depthwise, demo_residual
from fewbit.files import write_atomically

FACTORIES = {"residual": demo_residual, "depthwise": demo_depthwise}
EPOCHS = {"residual": 6, "depthwise": 5}
BFLOAT16 = {"residual": True, "depthwise": False}  # depthwise training is bound by memory, not by products


def as_input(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 ``(N, 32, 32, 3)`` to float32 ``(N, 3, 32, 32)`` as the cards say: (pixel / 255 - 0.5) / 0.25."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
    return x.contiguous(memory_format=torch.channels_last)


def count_correct(model: nn.Module, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> int:
    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(labels), 500):
            scores = model(as_input(pixels[start : start + 500]))
            correct += int((scores.argmax(1).numpy() == labels[start : start + 500]).sum())
    return correct


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on the weights of convolutions and classifier, none on BatchNorm and biases."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def save(model: nn.Module, path: Path) -> None:
    with write_atomically(path) as beside:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, beside)


def train(
    model: nn.Module,
    images: tuple[NDArray[np.uint8], NDArray[np.int64]],
    epochs: int,
    lr: float,
    options: argparse.Namespace,
) -> None:
    pixels, labels = images
    targets = torch.from_numpy(labels)
    rng = np.random.default_rng(options.seed)
    steps = len(labels) // options.batch
    optimizer = torch.optim.SGD(decayed(model, options.weight_decay), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = rng.permutation(len(labels))
        total = 0.0
        for step in range(steps):
            chosen = order[step * options.batch : (step + 1) * options.batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16[options.network]):
                scores = model(as_input(pixels[chosen]))
            loss = loss_of(scores.float(), targets[torch.from_numpy(chosen)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        elapsed_s = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}, {elapsed_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=sorted(FACTORIES))
    parser.add_argument(
        "--images", type=int, default=50_000, help="gentle training images (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, help="gentle ones; default: 6 for residual, 5 for depthwise")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--gentle-weights", type=Path, help="skip the gentle epochs: what they ended with")
    parser.add_argument("--out", type=Path, help="safetensors file; default: the one in the package")
    options = parser.parse_args()
    options.epochs = options.epochs or EPOCHS[options.network]

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = FACTORIES[options.network]()
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    cards = dict(zip(("residual", "depthwise"), demo_cards(), strict=True))
    out: Path = options.out or cards[options.network].with_suffix(".safetensors")
    if options.gentle_weights:
        model.load_state_dict(load_file(options.gentle_weights))
    else:
        gentle = make_images("train", options.images, options.seed, hardness=0)
        train(model, gentle, options.epochs, options.lr, options)
        save(model, out)
    train(model, make_images("train", options.images // 2, options.seed + 1), 1, options.lr / 4, options)

    save(model, out)
    pixels, labels = make_images("test", 10_000)
    correct = count_correct(model, pixels, labels)
    print(f"{out.name}: top-1 {correct} of {len(labels)} test images, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
