"""Figures and names in the words that a reader expects: percent, points, bytes, times, recipes, settings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fewbit.engines.session import Setting
from fewbit.measure.accuracy import Interval
from fewbit.search.budget import Measure, parse_budget
from fewbit.search.trial import BudgetCheck

ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "reference": "the reference interpreter"}
FLOAT_RECIPES = ("float32", "bf16")
RECIPES = {
    "int8": "int8 (min-max ranges)",
    "int8-moving-average": "int8 (moving-average ranges)",
    "int8-percentile": "int8 (percentile ranges)",
    "int8-mse": "int8 (MSE ranges)",
    "int8-per-tensor": "int8 (per tensor)",
    "int8-equalized": "int8 (equalized, biases corrected)",
    "int8-per-tensor-equalized": "int8 (per tensor, equalized, biases corrected)",
    "int8-symmetric": "int8 (symmetric)",
    "int8-weights-only": "int8 weights only",
    "int8-dynamic": "int8 (dynamic ranges)",
}
SILU_FORMS = {"-gelu": "SiLU as scaled GELU", "-hard-swish": "SiLU as hard-swish"}
PHASES = {
    "time": "timing files on an engine",
    "evaluate": "running images on an engine",
    "compile": "opening files on an engine",
    "profile": "profiling operators on an engine",
    "placement": "asking an engine what runs how",
    "start engine": "starting engines",
    "preprocess": "waiting for images",
    "decode": "decoding images",
    "load": "loading networks",
    "export": "writing files",
    "layers": "comparing layers with float32",
    "rank": "ordering layers by what they cost",
    "sensitivities": "sensitivities of regions",
}
MEASURES: dict[Measure, str] = {
    "top1-error": "top-1 error",
    "top5-error": "top-5 error",
    "top1-drop": "top-1 drop",
    "top5-drop": "top-5 drop",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "bytes": "size",
    "latency": "latency",
}


def measure(budget: str) -> str:
    """Return what a budget limits, in words.

    >>> measure("top5-error<=17%"), measure("bytes<=2MB")
    ('top-5 error', 'size')
    """
    return MEASURES[parse_budget(budget).measure]


def number(value: float, decimals: int) -> str:
    """Write a number; a zero has no sign.

    >>> number(-0.04, 1)
    '0.0'
    """
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def percent(fraction: float, decimals: int = 1) -> str:
    """Write a fraction as a percentage.

    >>> percent(0.8134)
    '81.3 %'
    """
    return f"{number(100 * fraction, decimals)} %"


def points(fraction: float, decimals: int = 1) -> str:
    """Write a difference of fractions in percentage points.

    >>> points(0.0021), points(0.01, 2)
    ('0.2 points', '1.00 points')
    """
    return f"{number(100 * fraction, decimals)} points"


def hundred(low: float, high: float, decimals: int = 1) -> str:
    """Write an interval of fractions, times 100.

    >>> hundred(-0.001, 0.005)
    '[-0.1, 0.5]'
    """
    return f"[{number(100 * low, decimals)}, {number(100 * high, decimals)}]"


def between(interval: Interval, decimals: int = 2) -> str:
    """Write an interval of plain numbers.

    >>> between(Interval(low=2.334, high=2.48))
    '[2.33, 2.48]'
    """
    return f"[{interval.low:,.{decimals}f}, {interval.high:,.{decimals}f}]"


def size(count: int) -> str:
    """Write a number of bytes with three digits.

    >>> size(312), size(76_412), size(1_234_567), size(12_345_678)
    ('312 B', '76.4 kB', '1.23 MB', '12.3 MB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Write a time in at most two units.

    >>> duration(4.23), duration(252), duration(7384)
    ('4.2 s', '4 min 12 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def several(count: int, one: str, many: str = "") -> str:
    """Write a count with its noun.

    >>> several(1, "image"), several(3000, "image")
    ('1 image', '3,000 images')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def engine(name: str) -> str:
    """Return an engine's own name."""
    return ENGINES.get(name, name)


def phase(name: str) -> str:
    """Return what a search does in a phase; the steps of recipes have their own names.

    >>> phase("evaluate"), phase("fold_bn")
    ('running images on an engine', 'fold_bn')
    """
    return PHASES.get(name, name)


def recipe(name: str, keep_float: Sequence[str] = ()) -> str:
    """Return a recipe in words; a name that is not shipped stays as it is.

    Args:
        name: The recipe's name.
        keep_float: Layers that it leaves in float.

    >>> recipe("int8-percentile"), recipe("my-own"), recipe("int8-float1", ["conv1"])
    ('int8 (percentile ranges)', 'my-own', 'int8 (min-max ranges, 1 layer in float)')
    >>> recipe("int8-pixels")
    'int8 (min-max ranges, uint8 pixels in)'
    >>> recipe("int8-mse-float1-widths7", ["conv1"])
    'int8 (MSE ranges, 1 layer in float, weights of several widths)'
    >>> recipe("int8-gelu-pixels")
    'int8 (min-max ranges, SiLU as scaled GELU, uint8 pixels in)'
    """
    plain = name.removesuffix("-pixels")
    kept, form = plain, ""
    for mark, said in SILU_FORMS.items():
        if plain.endswith(mark):
            kept, form = plain.removesuffix(mark), said
    wide = re.sub(r"-widths\d+$", "", kept)
    base = re.sub(r"-(float|mixed)\d+$", "", wide) if keep_float else wide
    text = RECIPES.get(base, base)
    more = [f"{several(len(keep_float), 'layer')} in float"] if keep_float else []
    more += ["weights of several widths"] if wide != kept else []
    more += [form] if form else []
    more += ["uint8 pixels in"] if plain != name else []
    if not more:
        return text
    said = ", ".join(more)
    return f"{text[:-1]}, {said})" if text.endswith(")") else f"{text} ({said})"


def setting(how: Setting) -> str:
    """Return how a file was run, in words.

    >>> setting(Setting(engine="openvino", batch=8, threads=2))
    'OpenVINO, batch 8, 2 threads'
    """
    streams = f", {how.streams} streams" if how.streams > 1 else ""
    return f"{engine(how.engine)}, batch {how.batch}, {several(how.threads, 'thread')}{streams}"


def measured(check: BudgetCheck) -> tuple[str, str]:
    """Return a budget's measured value with its unit, and its interval; empty where it has none.

    >>> measured(BudgetCheck(budget="top1-drop<=1%", limit=0.01, value=0.002, low=-0.001, high=0.005,
    ...     met=True, proven=True))
    ('0.2 points', '[-0.1, 0.5]')
    """
    budget = parse_budget(check.budget)
    if budget.measure == "bytes":
        return size(round(check.value)), ""
    if budget.measure == "latency":
        return milliseconds(check.value), ""
    decimals = 1 if abs(check.limit) >= 0.005 else 2
    write = points if budget.of_drop else percent
    return write(check.value, decimals), hundred(check.low, check.high, decimals)


def milliseconds(value: float) -> str:
    """Write a time in milliseconds with three digits.

    >>> milliseconds(0.81649), milliseconds(1234.6)
    ('0.816 ms', '1,235 ms')
    """
    return f"{figure(value)} ms"


def figure(value: float) -> str:
    """Write a number with three digits, or all those before the point.

    >>> figure(0.81649), figure(24107.2)
    ('0.816', '24,107')
    """
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
