"""How throughput varies with the quantization strategy under an error budget, on networks with real images.

    python bench/strategies.py ../shared/networks/mobilenet_v2.toml --peers PYTHON --studies studies
    python bench/strategies.py CARD --budget "top5-error<=17%" --budget "top1-drop<=1%" --recipes int8,float32

For each card: `fewbit search` runs once a budget; its study is kept in `--studies`, and not run again where
it is there; in the minutes that are the default it tries no mixes of int8 and float, which take eight. Then
stand side by side: the searches' answers; fewbit's shipped recipes on both engines; the
peers of `speed.py` that are files (not torch.compile), calibrated on the images that calibrated the searches.
Each but the answers runs at the fastest of `--batches` and of one stream of all threads or a stream a thread,
found by a survey.

Accuracy is what the engine that is timed computes from the file, on all of the card's images that calibrated
nothing: top-5 error with its Wilson interval, top-1 drop against float32 with its paired interval. What is
"proven" there is so for all strategies together (Bonferroni). The answers were chosen on a part of these
images, which therefore prove nothing of them; what the holdout images alone say of them stands in the last
table, as the search says it.

Speed: everyone takes turns for `--first-rounds` rounds in one sitting, which gives the first tables their
ratios to the network's fastest float32; where a network lies in memory makes it a few percent faster or
slower for as long as it is open, which these intervals do not contain. Then each answer sits several times
with both engines' float32 and the three fastest peers, opened anew for each sitting (`speed_turns.py`); the
last table's ratios are the medians over sittings, with 95 % intervals, and the best peer is the one that the
answer beats by least.

With `--rows` the rows of a card are kept in a file when it is done, and a second run with the same options
measures only the cards that are missing there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from fewbit.cli.options import COUNT, Numbers
from fewbit.data.image_set import ImageSet
from fewbit.errors import EngineError, FewbitError
from fewbit.files import write_text
from fewbit.load.card import Card, read_card
from fewbit.measure.accuracy import Predictions
from fewbit.measure.host import describe_host, usable_cores, versions
from fewbit.recipe import read_recipe
from fewbit.search.budget import parse_budget
from fewbit.search.study import read_study
from fewbit.search.trial import DataRecord, StudyRecord
from speed import read_rows
from speed_turns import Entrant, Pace, Standing, choose_fastest, hold_sittings, measure_all
from strategies_field import (
    FLOATS,
    RECIPES,
    Strategy,
    answer_of,
    open_bench,
    own_strategies,
    peer_strategies,
    predict,
    settings_of,
)
from strategies_table import Row, answer_row, strategy_row, tables_of

_FINALISTS = 3
_WIDTH = 300
_EXACT = "fewbit float32 on ONNX Runtime"
_SHAPING = ("budget", "minutes", "recipes", "batches", "sittings", "rounds", "first_rounds", "block", "seed")
Tell = Callable[[str], None]


class Searched(NamedTuple):
    """A search that is done: its budget, folder and record."""

    budget: str
    folder: Path
    study: StudyRecord


def search(
    card: Card, source: str, budget: str, data: DataRecord, options: dict[str, Any], tell: Tell
) -> Searched:
    """Return a search's study; it runs now where it is not in the folder of studies yet.

    Raises:
        click.ClickException: It failed, found no network that runs, or what is kept there is another search.
    """
    seed = options["seed"]
    out = options["studies"] / f"{card.network.name}-{slug(budget)}-{seed}"
    if not (out / "best" / "result.json").exists():
        tell(f"searching for {budget}")
        command = [sys.executable, "-m", "fewbit", "search", source, "--budget", budget, "--seed", str(seed)]
        command += ["--data", str(card.expected_data_path), "--minutes", str(options["minutes"])]
        command += ["--batch", ",".join(map(str, options["batches"]))]
        command += ["--resume" if (out / "study.db").exists() else "--out", str(out)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode not in (0, 3):
            raise click.ClickException(f"{out}: the search failed: {ended.stderr.strip()[-500:]}")
    study = read_study(out)
    if study.answer is None:
        raise click.ClickException(f"{out}: the search found no network that runs; see {out / 'report.html'}")
    host = describe_host()
    asked: dict[str, object] = {
        "budget": budget,
        "seed": seed,
        "images": data.images_digest,
        "minutes": options["minutes"],
    }
    asked |= {"processor": (host.cpu, host.isa, host.bf16), "versions": versions()}
    kept: dict[str, object] = {
        "budget": ", ".join(study.budgets),
        "seed": study.seed,
        "images": study.data.images_digest,
    }
    kept |= {"minutes": study.minutes, "versions": study.versions}
    kept |= {"processor": (study.host.cpu, study.host.isa, study.host.bf16)}
    for name, wanted in asked.items():
        if kept[name] != wanted:
            raise click.ClickException(
                f"{out}: is another search: its {name} is {kept[name]}, asked for is {wanted}; delete it or "
                "give another folder with --studies"
            )
    return Searched(budget, out, study)


def slug(budget: str) -> str:
    """Return a budget as the name of a folder.

    Example:
        >>> slug("top5-error<=17%"), slug("top1>=0.75")
        ('top5-error-le-17', 'top1-ge-0.75')
    """
    signs = {"<=": "-le-", ">=": "-ge-", "<": "-lt-", ">": "-gt-", " ": "", "%": ""}
    for sign, name in signs.items():
        budget = budget.replace(sign, name)
    return budget.lower()


def choose_ways(strategies: Sequence[Strategy], pace: Pace, tell: Tell) -> list[Standing]:
    """Return the fastest way of each strategy."""
    standings = []
    for strategy in strategies:
        tell(f"surveying {strategy.name}")
        if strategy.ways:
            standings.append(choose_fastest(strategy.ways, pace.survey_s, pace.seed))
        else:
            standings.append(Standing(_absent(strategy), failed=strategy.failed))
    return standings


def fastest_float(chosen: Sequence[Standing], pace: Pace) -> int | None:
    """Return the place of what is fastest in float32, those that compute in it taking turns."""
    floats = [p for p, one in enumerate(chosen) if one.entrant.form == "float32" and not one.failed]
    found = measure_all([chosen[place].entrant for place in floats], pace.first_rounds, None, pace)
    speeds = [one.timing.images_per_s if one.timing is not None else 0.0 for one in found]
    return max(zip(speeds, floats, strict=True), default=(0.0, None))[1]


def measure_network(chosen: list[Standing], pace: Pace, tell: Tell) -> list[Standing]:
    """Time every strategy at its fastest way in one sitting, against the fastest one in float32."""
    baseline = fastest_float(chosen, pace)
    alive = [place for place, standing in enumerate(chosen) if not standing.failed]
    base = alive.index(baseline) if baseline is not None else None
    tell(f"{len(alive)} strategies take turns")
    found = measure_all([chosen[place].entrant for place in alive], pace.first_rounds, base, pace)
    standings = list(chosen)
    for place, standing in zip(alive, found, strict=True):
        standings[place] = standing
    return standings


def opponents(standings: Sequence[Standing]) -> list[Entrant]:
    """Return whom an answer sits with: both engines' float32 as captured, and the fastest peers."""
    peers = [s for s in standings if not s.entrant.own and s.timing is not None]
    ranked = sorted(peers, key=lambda s: -s.timing.images_per_s if s.timing is not None else 0.0)
    floats = [s.entrant for s in peers if s.entrant.name in FLOATS]
    fast = [s.entrant for s in ranked[:_FINALISTS] if s.entrant.name not in FLOATS]
    return floats + fast


def judge(
    strategies: Sequence[Strategy], parts: Sequence[ImageSet], tell: Tell
) -> tuple[list[Predictions | None], Predictions]:
    """Return what every strategy predicts, none where it does not run; and what float32 does."""
    found: list[Predictions | None] = []
    for strategy in strategies:
        tell(f"accuracy of {strategy.name}")
        try:
            found.append(predict(strategy, parts) if strategy.path is not None else None)
        except EngineError as error:
            print(f"{strategy.name}: {error}", file=sys.stderr)
            found.append(None)
    names = [strategy.name for strategy in strategies]
    exact = next((f for name, f in zip(names, found, strict=True) if f and name.startswith(_EXACT)), None)
    if exact is None:
        raise click.ClickException(f"{_EXACT} does not run, and all accuracies are compared with it")
    return found, exact


def measure_card(source: str, options: dict[str, Any], pace: Pace, tell: Tell) -> list[Row]:
    """Search, build, judge and time all of one card; return its rows."""
    card, threads, seed = read_card(source), usable_cores(), pace.seed
    budgets, batches = options["budget"], options["batches"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench, data = open_bench(card, budgets[0], folder / "own", seed)
        searched = [search(card, source, budget, data, options, tell) for budget in budgets]
        answers = [answer_of(one.study, one.folder, f"answer to {one.budget}") for one in searched]
        tell("making files")
        recipes = ["float32", *(r for r in options["recipes"] if r != "float32")]
        own = own_strategies(bench, recipes, settings_of(batches, threads))
        (folder / "peers").mkdir()
        peers = peer_strategies(bench, source, folder / "peers", options["peers"], batches, threads, seed)
        strategies = [*answers, *own, *peers]
        found, exact = judge(strategies, (bench.images.search, bench.images.holdout), tell)
        standings = measure_network(choose_ways(strategies, pace, tell), pace, tell)
        rows = []
        for one, standing in zip(searched, standings, strict=False):
            tell(f"sittings of the answer to {one.budget}")
            sat = hold_sittings([standing.entrant, *opponents(standings)], 0, pace, tell)
            rows.append(answer_row(one.budget, one.study, sat, one.study.seconds))
    looks = len(strategies)
    for strategy, standing, predicted in zip(strategies, standings, found, strict=True):
        by_search = strategy in answers
        rows.append(strategy_row(strategy.name, standing, predicted, exact, budgets, looks, by_search))
    return rows


def check_inputs(cards: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse what would fail after the first card is measured, and split the names of recipes.

    Raises:
        click.UsageError: A card, a budget or a recipe cannot be used.
    """
    options["recipes"] = options["recipes"].split(",")
    try:
        for recipe in options["recipes"]:
            read_recipe(recipe)
        for budget in options["budget"]:
            if not parse_budget(budget).of_accuracy:
                raise click.UsageError(f"budget '{budget}': give one of accuracy, such as top5-error<=17%")
        for source in cards:
            if read_card(source).expected_data_path is None:
                raise click.UsageError(
                    f"{source}: its [expected] section names no data; add the images to use"
                )
    except FewbitError as error:
        raise click.UsageError(str(error)) from error


def _absent(strategy: Strategy) -> Entrant:
    def refuse() -> Any:
        raise EngineError(strategy.failed)

    return Entrant(strategy.name, "", strategy.form, strategy.name.startswith("fewbit"), refuse)


@click.command()
@click.argument("cards", nargs=-1, required=True, metavar="CARD...")
@click.option("--budget", multiple=True, default=("top5-error<=17%",), show_default=True)
@click.option("--studies", type=click.Path(path_type=Path), default="studies", show_default=True)
@click.option("--minutes", type=float, default=6.0, show_default=True, help="Of each search.")
@click.option("--recipes", default=",".join(RECIPES), help="Shipped recipes to stand beside the answers.")
@click.option("--batches", type=Numbers(int, 1), default="1,8,32", show_default=True)
@click.option("--sittings", type=COUNT, default=6, show_default=True, help="Of the answers.")
@click.option("--rounds", type=COUNT, default=4, show_default=True, help="Of each sitting, at least 3.")
@click.option("--first-rounds", type=COUNT, default=12, show_default=True, help="Of every strategy.")
@click.option("--block", type=float, default=0.2, show_default=True, help="Seconds of one block.")
@click.option("--peers", default=sys.executable, help="The Python that has nncf.")
@click.option("--rows", "rows_path", type=click.Path(path_type=Path), help="Keep every row in this file.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def main(cards: tuple[str, ...], rows_path: Path | None, as_json: bool, **options: Any) -> None:
    """Measure every strategy on each card and print the tables."""
    check_inputs(cards, options)
    pace = Pace.of_options(options)
    machine = {"processor": describe_host().cpu, "versions": versions()}
    asked = json.dumps({name: options[name] for name in _SHAPING} | machine)
    every = read_rows(rows_path)
    kept = [row for row in every if row["asked"] == asked]
    rows = list[Row]()
    for source in cards:
        found = [row for row in kept if row["source"] == source]
        if not found or len(found) < found[0]["of"]:  # the file was cut off

            def tell(doing: str, name: str = Path(source).stem) -> None:
                print(f"{name}: {doing}", file=sys.stderr, flush=True)

            try:
                found = measure_card(source, options, pace, tell)
            except FewbitError as error:
                raise click.UsageError(str(error)) from error
            common = {"network": read_card(source).network.name, "source": source, "asked": asked}
            found = [common | {"of": len(found)} | row for row in found]
            if rows_path is not None:
                every = [row for row in every if (row["source"], row["asked"]) != (source, asked)] + found
                write_text(rows_path, "".join(f"{json.dumps(row)}\n" for row in every))
        rows += found
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = Console(width=_WIDTH)
    for table in tables_of(rows):
        console.print(table)


if __name__ == "__main__":
    main()
