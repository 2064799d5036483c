"""Options that several subcommands share, and what they become."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fewbit.errors import CardError, InputError
from fewbit.load.card import Card, card_from_options, read_card

F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """Numbers with commas between them: "1,8,32".

    Args:
        kind: Whole numbers or any.
        least: The smallest allowed.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], least: int | None = None) -> None:
        self.kind, self.least = kind, least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            word = "whole numbers" if self.kind is int else "numbers"
            self.fail(f"'{value}' are not {word} with commas between them, like 1,8,32", param, ctx)
        if self.least is not None and min(numbers) < self.least:
            self.fail(f"'{value}' has {min(numbers)}; each must be {self.least} or more", param, ctx)
        return numbers


COUNT = click.IntRange(min=1)

_CARD_OPTIONS = (
    click.option("--name", help="What to call the network."),
    click.option("--weights", type=click.Path(path_type=Path), help="Safetensors file or plain state dict."),
    click.option("--classes", type=int, help="Number of classes."),
    click.option("--labels", type=click.Path(path_type=Path), help="JSON: folder name -> class index."),
    click.option("--size", type=Numbers(int), help="Channels, height, width of the input: 3,224,224."),
    click.option("--resize", type=int, help="Shorter side in pixels before the crop."),
    click.option("--crop", type=int, help="Side of the centre crop in pixels."),
    click.option("--interpolation", help="nearest, bilinear, bicubic or lanczos."),
    click.option("--channels", help="rgb, bgr or gray."),
    click.option("--scale", type=float, help="Pixels are divided by this before mean and std."),
    click.option("--mean", type=Numbers(float), help="One a channel."),
    click.option("--std", type=Numbers(float), help="One a channel."),
)
_CARD_NAMES = ("name", "weights", "classes", "labels", "size", "resize", "crop", "interpolation", "channels")
CARD_KEYS = (*_CARD_NAMES, "scale", "mean", "std")


def card_options(command: F) -> F:
    """Add the facts of a card as options, for a network that is given without one."""
    for option in reversed(_CARD_OPTIONS):
        command = option(command)
    return command


def data_option(command: F) -> F:
    """Add `--data`."""
    return click.option(
        "--data",
        required=True,
        type=click.Path(path_type=Path),
        help="Labelled images: folder, tar or zip of class/name.jpg, or parquet.",
    )(command)


def json_option(command: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON on stdout.")(
        command
    )


def take_card_facts(options: dict[str, Any]) -> dict[str, Any]:
    """Take the card's facts out of a command's options."""
    return {key: options.pop(key) for key in CARD_KEYS}


def find_card(source: str, facts: dict[str, Any]) -> Card:
    """Return the card that an argument names, or make one from the options.

    Raises:
        CardError: The card or an option is wrong, or options come beside a card.
        ModelFileError: The source is a file that is quantized already.
    """
    given = {key: value for key, value in facts.items() if value is not None}
    if source.endswith(".toml"):
        if given:
            raise CardError(
                f"{source}: is a card, so --{next(iter(given))} has no place beside it; "
                "write the fact into the card"
            )
        return read_card(source)
    if source.endswith(".onnx"):
        from fewbit.load.exported import refuse_quantized  # onnx takes long to import

        refuse_quantized(Path(source))
    return card_from_options(source, **given)


def default_threads(threads: int | None) -> int:
    """Return the number of threads, all usable cores where none is given."""
    from fewbit.measure.host import usable_cores

    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}; give 1 or more")
    return threads or usable_cores()


def print_json(answer: Any) -> None:
    """Print one JSON document on stdout."""
    json.dump(answer, sys.stdout, indent=2)
    print()
