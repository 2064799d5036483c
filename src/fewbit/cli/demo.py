"""`fewbit demo`: the main job on the built-in networks and images."""

from __future__ import annotations

from pathlib import Path

import click

from fewbit.cli.options import json_option

BUDGET = "top1-drop<=1%"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("fewbit-demo"), show_default=True)
@click.option(
    "--images", type=click.IntRange(min=1000), default=4000, show_default=True, help="How many to make."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the demo in --out.")
@json_option
@click.pass_context
def demo(ctx: click.Context, out: Path, images: int, seed: int, resume: bool, as_json: bool) -> int:
    """Search the two built-in networks on made images, within one point of top-1."""
    from fewbit.cli.search import search
    from fewbit.data.demo import demo_cards, write_tar

    data = out / f"images-{images}.tar"
    if not data.exists():
        click.echo(f"making {images} images of 100 classes: {data}", err=True)
        write_tar(data, "test", images)
    arguments = [*(str(card) for card in demo_cards()), "--data", str(data), "--budget", BUDGET]
    arguments += ["--seed", str(seed), "--resume" if resume else "--out", str(out)]
    if as_json:
        arguments.append("--json")
    result = ctx.invoke(search.callback, **search.make_context("demo", arguments).params)  # type: ignore[arg-type]
    return int(result)
