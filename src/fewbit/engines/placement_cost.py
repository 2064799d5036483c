"""What keeps operators out of integers or adds conversions, with its cost in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fewbit.engines.causes import parts_of, sum_by_cause
from fewbit.engines.profile import OperatorTime
from fewbit.engines.session import CONVERTING, Setting
from fewbit.spec import Frozen, ImageInput

if TYPE_CHECKING:
    from fewbit.engines.placement_why import Reason
    from fewbit.engines.run_graph import RunGraph

CALLS = 10

FindingKind = Literal[
    "input conversion",
    "float operator",
    "unfused operator",
    "legacy kernel",
    "reorder",
    "conversion",
    "bf16 border",
]
_WEIGHTS = "its weights are turned into floats in every call"
_ELEMENTWISE = frozenset(
    {
        *("Add", "Clip", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Mish", "Mul", "PRelu", "Relu", "Sigmoid"),
        *("Div", "HardSigmoid", "Max", "Min", "Sub", "Sum", "Tanh", "Softplus"),
    }
)
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_INTEGERS = frozenset({"int8", "uint8"})


class EngineOperator(Frozen):
    """One operator that an engine runs.

    Attributes:
        name: Its name in the engine's graph; empty where it has none.
        kind: The engine's operator type.
        kernel: Name of the kernel, where the engine tells.
        precision: What it runs in.
        ms: Milliseconds of one call.
    """

    name: str
    kind: str
    kernel: str = ""
    precision: str
    ms: float


class PlacementFinding(Frozen):
    """One thing that costs time beside the integer work, or instead of it.

    Attributes:
        kind: "input conversion" (before the first layer); "float operator" (with the conversions around it
            that are there for its sake); "unfused operator" (reads and writes codes, computes in float on its
            own); "legacy kernel" (in integers, by an old or a reference kernel); "reorder" (layout, moves);
            "conversion" (a quantizer or dequantizer that stands alone); "bf16 border" (between bf16 and
            integers).
        layers: Nodes of the file.
        file_kinds: Their operator types.
        operators: What the engine runs, in its order.
        why: What in the file or the engine makes it so.
        remedy: What one can do.
        on_purpose: The file asks for it: a layer that the recipe keeps in float, and its borders.
        ms: Milliseconds of one call.
        share: Of the whole call.
    """

    kind: FindingKind
    layers: tuple[str, ...]
    file_kinds: tuple[str, ...]
    operators: tuple[EngineOperator, ...]
    why: str
    remedy: str
    on_purpose: bool
    ms: float
    share: float


class PlacementCost(Frozen):
    """Where the time of one call of a file goes beside integer work on the engine's best kernels.

    Attributes:
        setting: How the file ran; one call at a time, with the threads of one stream.
        integers: The file asks for integers at all.
        ms: Milliseconds of one call, all operators.
        findings: The costliest first; what takes no time is left out.
        rest: Milliseconds of all other operators, by what these are for.
    """

    setting: Setting
    integers: bool
    ms: float
    findings: tuple[PlacementFinding, ...]
    rest: dict[str, float]

    @property
    def rest_ms(self) -> float:
        """Milliseconds of what is no finding; with the findings it makes up the whole."""
        return sum(self.rest.values())

    def accidental_ms(self) -> float:
        """Return the milliseconds of what the file does not ask for."""
        return sum(finding.ms for finding in self.findings if not finding.on_purpose)


class ProfiledFile(Protocol):
    """A file opened by an engine, such as `fewbit.engines.process.RemoteSession`."""

    path: Path
    setting: Setting
    takes: ImageInput

    def profile(self, calls: int = ...) -> tuple[OperatorTime, ...]:
        """Time each operator."""
        ...


def measure_placement(session: ProfiledFile, calls: int = CALLS) -> PlacementCost:
    """Profile an opened file and name what keeps operators out of integers.

    Args:
        session: The file.
        calls: Calls to take the mean over.

    Raises:
        EngineError: The engine has no profiler, or the file failed in it.
    """
    return find_costs(session.path, session.setting, session.profile(calls), session.takes)


def find_costs(
    path: Path, setting: Setting, operators: Sequence[OperatorTime], takes: ImageInput = "float32"
) -> PlacementCost:
    """Sort a profile into findings and the rest.

    Args:
        path: The exported file.
        setting: How it ran.
        operators: Its profile.
        takes: What it takes.
    """
    from fewbit.engines.exported import ExportedGraph  # onnx takes long to import
    from fewbit.engines.run_graph import RunGraph

    exported = ExportedGraph(path)
    graph = RunGraph(exported, operators)
    whole = sum(operator.ms for operator in operators)
    groups = _Sorting(graph, setting, takes).groups()
    findings = [_finding(group, graph, whole) for group in groups]
    taken = {place for group in groups for place in group.places}
    rest = [operator for place, operator in enumerate(operators) if place not in taken]
    return PlacementCost(
        setting=setting,
        integers=graph.asks_integers(),
        ms=whole,
        findings=tuple(sorted((f for f in findings if f.ms > 0), key=lambda finding: -finding.ms)),
        rest=sum_by_cause(rest, parts_of(exported)),
    )


@dataclass
class _Group:
    """Operators of one finding."""

    kind: FindingKind
    places: list[int]
    on_purpose: bool = False
    reason: Reason | None = None


class _Sorting:
    """Puts each operator of a profile into a finding or none."""

    def __init__(self, graph: RunGraph, setting: Setting, takes: ImageInput) -> None:
        self.graph, self.setting, self.takes = graph, setting, takes
        self.integers = graph.asks_integers()
        self.group: dict[int, _Group] = {}

    def groups(self) -> list[_Group]:
        """Return the findings' operators, with their reasons."""
        graph, count = self.graph, len(self.graph.operators)
        image = sorted(graph.converts_input())
        self._add("input conversion", image)
        left = [place for place in range(count) if place not in self.group]
        for place in left:
            if not graph.is_converting(place) and not graph.is_outside(place):
                self._judge_work(place)
        for place in left:
            if graph.is_outside(place):
                self._judge_constant(place)
            elif graph.is_converting(place):
                self._judge_conversion(place)
        found = list({id(group): group for group in self.group.values()}.values())
        for group in found:
            group.reason = self._reason(group)
        return found

    def _add(self, kind: FindingKind, places: Iterable[int], on_purpose: bool = False) -> None:
        group = _Group(kind, list(places), on_purpose)
        self.group.update(dict.fromkeys(group.places, group))

    def _join(self, place: int, group: _Group) -> None:
        group.places.append(place)
        self.group[place] = group

    def _judge_work(self, place: int) -> None:
        """Judge an operator that does more than convert."""
        operator = self.graph.operators[place]
        if not self.integers:
            return
        if operator.precision != "int8":
            chosen = self.graph.by_choice(place)
            before = [self.group[s] for s in self.graph.sources(place) if s in self.group]
            same = [g for g in before if g.kind == "float operator" and g.on_purpose == chosen]
            if same and not operator.matrix:
                self._join(place, same[0])
            else:
                self._add("float operator", [place], chosen)
        elif self._is_legacy(operator):
            self._add("legacy kernel", [place])
        elif self._is_unfused(place):
            self._add("unfused operator", [place])

    def _is_legacy(self, operator: OperatorTime) -> bool:
        kernel = operator.flow.kernel
        if self.setting.engine != "openvino" or not kernel:
            return False
        return kernel.startswith("ref") or (operator.matrix and not kernel.startswith("brg"))

    def _is_unfused(self, place: int) -> bool:
        """Say whether OpenVINO runs element-wise work on codes as an operator of its own, in float inside."""
        operator, nodes = self.graph.operators[place], self.graph.exported.nodes
        layers = self.graph.layers[place]
        plain = self.setting.engine == "openvino" and not operator.matrix and bool(layers)
        return plain and all(nodes[name].op_type in _ELEMENTWISE for name in layers)

    def _judge_constant(self, place: int) -> None:
        """Judge a dequantizer of constants: it belongs to what reads them."""
        reader = self.graph.reader_of_constant(place)
        if reader is not None and reader in self.group:
            self._join(place, self.group[reader])
        else:
            self._add("conversion", [place], on_purpose=not self.integers)

    def _judge_conversion(self, place: int) -> None:
        """Judge a conversion: of a float operator that the file does not ask for it is a part."""
        graph = self.graph
        ways = (True, False) if graph.operators[place].kind == "DequantizeLinear" else (False, True)
        near = [self.group[o] for way in ways for o in graph.beyond(place, way) if o in self.group]
        floats = [group for group in near if group.kind == "float operator"]
        accidents = [group for group in floats if not group.on_purpose]
        if accidents:
            self._join(place, accidents[0])
            return
        kind = self._kind_of_conversion(place)
        before = [self.group[s] for s in graph.sources(place) if s in self.group]
        same = [g for g in before if g.kind == kind and graph.is_converting(g.places[0])]
        if same:
            self._join(place, same[0])
        else:
            self._add(kind, [place], on_purpose=bool(floats))

    def _kind_of_conversion(self, place: int) -> FindingKind:
        operator = self.graph.operators[place]
        types = {operator.precision, operator.flow.makes}
        types |= {self.graph.operators[source].flow.makes for source in self.graph.sources(place)}
        if "bf16" in types and types & _INTEGERS:
            return "bf16 border"
        return "conversion" if operator.kind in _QUANTIZERS else "reorder"

    def _reason(self, group: _Group) -> Reason:
        from fewbit.engines import placement_why as why

        place, graph = group.places[0], self.graph
        if group.kind == "input conversion":
            return why.why_input(self.takes)
        if group.kind == "legacy kernel":
            return why.why_legacy(graph, place)
        if group.kind == "unfused operator":
            return why.why_unfused(graph, place)
        if graph.is_outside(place):
            return why.Reason(_WEIGHTS, "quantize activations too: --recipe int8")
        if group.kind != "float operator":
            return why.why_conversion(graph, sorted(group.places), group.on_purpose)
        if group.on_purpose:
            told = graph.operators[place].precision
            return why.Reason(
                f"the file keeps it in float; it runs in {told}", "leave as is: it was asked for"
            )
        return why.why_float(graph, _names(group, graph), self.setting.engine)


def _names(group: _Group, graph: RunGraph) -> tuple[str, ...]:
    """Return the nodes of the file that a finding is about: those that work, else those that convert.

    A conversion that the engine put in itself is called after what it is there for.
    """
    from fewbit.engines.placement_why import neighbour

    working = [place for place in group.places if graph.operators[place].kind not in CONVERTING]
    working = [place for place in working if not graph.is_outside(place)]
    found = (name for place in working or group.places for name in graph.names(place))
    if names := tuple(dict.fromkeys(found)):
        return names
    near = neighbour(graph, group.places[-1], True) or neighbour(graph, group.places[0], False)
    return (near,) if near else ()


def _finding(group: _Group, graph: RunGraph, whole: float) -> PlacementFinding:
    layers, reason = _names(group, graph), group.reason
    assert reason is not None
    operators = tuple(
        EngineOperator(name=o.name, kind=o.kind, kernel=o.flow.kernel, precision=o.precision, ms=o.ms)
        for o in (graph.operators[place] for place in sorted(group.places))
    )
    ms = sum(operator.ms for operator in operators)
    return PlacementFinding(
        kind=group.kind,
        layers=layers,
        file_kinds=tuple(graph.exported.nodes[name].op_type for name in layers),
        operators=operators,
        why=reason.why,
        remedy=reason.remedy,
        on_purpose=group.on_purpose,
        ms=ms,
        share=ms / whole if whole else 0.0,
    )
