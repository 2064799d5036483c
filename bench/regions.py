"""How well the time of a network is predicted from the precision of its regions.

    python bench/regions.py ../shared/networks/resnet20.toml --engine openvino --float-precision bf16
    python bench/regions.py --float-precision bf16

Without arguments the networks are the ten of `speed.py`, with random weights.

The prediction is guessed with the engine's profiler and fitted to `--fit` random assignments of precisions
(region by region, integers or float), each timed in turns with the network all in integers, and profiled.
Then `--test` other random assignments are predicted and timed `--repeats` times, each time in a process of
its own; the median counts. Shown: the median of |predicted / measured - 1| of guess and fit and the rank
correlation of fit and measurement; and the same of the first two measurements.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import fewbit
from fewbit.engines.session import EngineName, FloatPrecision
from fewbit.measure.host import sums_exactly
from fewbit.measure.region_latency import fit_region_latency
from fewbit.search.region_probe import RegionProbe
from speed_networks import ZOO, open_network


def measure(
    net: fewbit.Net, setting: fewbit.Setting, fit: int, test: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Fit and test one network."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        exact = sums_exactly(setting.engine)
        probe = RegionProbe(net, setting, Path(folder), seed=seed, exact_sums=exact)
        guess, seen, new = probe.guess(), probe.draw(fit, seed), probe.draw(test, seed + 1)
        fitted = fit_region_latency(guess, seen, *probe.measure(seen, guess.base_ms))
        seconds = time.perf_counter() - begin
        taken = np.array([probe.time(new, guess.base_ms) for _ in range(repeats)])
    times, (first, again) = np.median(taken, 0), taken[:2]
    off = {name: model.predict(new) / times - 1 for name, model in (("guess", guess), ("fit", fitted))}
    rank = spearmanr(fitted.predict(new), times)
    return {
        "network": net.name,
        "setting": setting.model_dump(mode="json"),
        "regions": len(probe.regions),
        "fitted_to": fit,
        "tested_on": test,
        "repeats": repeats,
        "guess_error": float(np.median(np.abs(off["guess"]))),
        "error": float(np.median(np.abs(off["fit"]))),
        "rank_correlation": float(rank.statistic),
        "repeat_error": float(np.median(np.abs(again / first - 1))),
        "repeat_rank_correlation": float(spearmanr(again, first).statistic),
        "ms": [float(times.min()), float(times.max())],
        "seconds": seconds,
    }


@click.command(help=__doc__)
@click.argument("networks", nargs=-1, metavar="[NETWORK|CARD]...")
@click.option("--engine", default="openvino", show_default=True)
@click.option("--float-precision", default="float32", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--fit", default=30, show_default=True)
@click.option("--test", default=30, show_default=True)
@click.option("--repeats", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(networks: tuple[str, ...], as_json: bool, **options: Any) -> None:
    setting = fewbit.Setting(
        engine=cast(EngineName, options["engine"]),
        float_precision=cast(FloatPrecision, options["float_precision"]),
        batch=options["batch"],
        threads=options["threads"],
    )
    count = {name: options[name] for name in ("fit", "test", "repeats", "seed")}
    found = []
    for source in networks or ZOO:
        found.append(measure(open_network(source, options["seed"], images=1).net, setting, **count))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("network", "regions", "error of guess", "of fit", "of a repeat", "rank", "of a repeat", "s")
    for row in found:
        errors = [f"{row[key]:.1%}" for key in ("guess_error", "error", "repeat_error")]
        ranks = [f"{row[key]:.2f}" for key in ("rank_correlation", "repeat_rank_correlation")]
        table.add_row(row["network"], str(row["regions"]), *errors, *ranks, f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
