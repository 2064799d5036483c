"""Every method by name: one row each, loaded when asked for.

A row is ``name -> "module:Class"``. Other packages add rows through the entry point group
``fewbit.methods`` with names of the form ``kind.name``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from typing import Any, Literal, get_args

from fewbit.errors import RecipeError, suggest

Kind = Literal["steps", "ranges", "sensitivity", "search", "engines"]

ROWS: dict[Kind, dict[str, str]] = {
    "steps": {
        "canonical": "fewbit.prepare.canonical:Canonical",
        "zeroq": "fewbit.synth.zeroq:ZeroQ",
        "fold_bn": "fewbit.prepare.fold_bn:FoldBN",
        "fold_input": "fewbit.prepare.fold_input:FoldInput",
        "replace_silu": "fewbit.prepare.replace_silu:ReplaceSiLU",
        "equalize": "fewbit.prepare.equalize:Equalize",
        "absorb_bias": "fewbit.prepare.absorb_bias:AbsorbBias",
        "split_channels": "fewbit.improve.split_channels:SplitChannels",
        "place": "fewbit.place.place:Place",
        "calibrate": "fewbit.ranges.calibrate:Calibrate",
        "calibrate_norm": "fewbit.synth.calibrate_norm:CalibrateNorm",
        "fit_ranges": "fewbit.improve.fit_ranges:FitRanges",
        "correct_bias": "fewbit.improve.correct_bias:CorrectBias",
        "adaround": "fewbit.improve.adaround:AdaRound",
        "brecq": "fewbit.improve.brecq:BRECQ",
        "qdrop": "fewbit.improve.qdrop:QDrop",
        "comq": "fewbit.improve.comq:COMQ",
        "gptq": "fewbit.improve.gptq:GPTQ",
        "obq": "fewbit.improve.obq:OBQ",
        "tune_scales": "fewbit.improve.tune_scales:TuneScales",
    },
    "ranges": {
        "minmax": "fewbit.ranges.minmax:MinMax",
        "moving_average": "fewbit.ranges.moving_average:MovingAverage",
        "percentile": "fewbit.ranges.percentile:Percentile",
        "mse": "fewbit.ranges.mse:MSE",
        "sample_average": "fewbit.ranges.sample_average:SampleAverage",
        "mean_std": "fewbit.ranges.mean_std:MeanStd",
        "kl": "fewbit.ranges.kl:KL",
        "aciq": "fewbit.ranges.aciq:ACIQ",
        "lp_norm": "fewbit.ranges.lp_norm:LpNorm",
        "requant": "fewbit.ranges.requant:REQuant",
    },
    "sensitivity": {
        "sqnr": "fewbit.sensitivity.sqnr:SQNR",
        "kl": "fewbit.sensitivity.kl:KL",
        "hessian": "fewbit.sensitivity.hessian:Hessian",
        "fisher": "fewbit.sensitivity.fisher:Fisher",
        "drop": "fewbit.sensitivity.drop:Drop",
    },
    "search": {
        "integer_program": "fewbit.search.mixed.integer_program:IntegerProgram",
        "greedy": "fewbit.search.mixed.greedy:Greedy",
        "evolve": "fewbit.search.mixed.evolve:Evolve",
        "differentiable": "fewbit.search.mixed.differentiable:Differentiable",
    },
    "engines": {
        "onnxruntime": "fewbit.engines.onnxruntime:OnnxRuntime",
        "openvino": "fewbit.engines.openvino:OpenVino",
        "reference": "fewbit.engines.reference:Reference",
    },
}


@cache
def rows(kind: Kind) -> dict[str, str]:
    """Return the rows of a kind, those of other packages included."""
    found = dict(ROWS[kind])
    for point in importlib.metadata.entry_points(group="fewbit.methods"):
        row_kind, _, name = point.name.partition(".")
        if row_kind == kind and name not in found:
            found[name] = point.value
    return found


def find(kind: Kind, name: str) -> Any:
    """Return the class of a row.

    Raises:
        RecipeError: No row has this name, or that of another package cannot be imported.
    """
    known = rows(kind)
    if name not in known:
        near = suggest(name, known)
        raise RecipeError(f"{kind}: no '{name}'{near}; there are {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    if name in ROWS[kind]:
        return getattr(importlib.import_module(module), attribute)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as reason:
        raise RecipeError(
            f"{kind}: '{name}' comes from another package and cannot be imported ({reason}); "
            "correct or reinstall that package"
        ) from reason


def kinds() -> tuple[str, ...]:
    """Return the names of the kinds."""
    return get_args(Kind)
