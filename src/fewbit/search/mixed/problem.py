"""The choice of a precision for each region of a network: what may be chosen, and what it loses and costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fewbit.errors import RecipeError, suggest

LOSS = "loss"
"""What the predicted loss is called beside the costs, in limits and as an objective."""
_NEAR = 1e-12


@dataclass(frozen=True)
class Option:
    """One precision of one region.

    Attributes:
        name: "int8", "w4", ...
        loss: What it adds to the predicted loss of the network; losses of regions are summed.
        costs: What it costs by the name of the cost, the unit in the name: "ms", "bytes", "gbops".
    """

    name: str
    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Region:
    """What has one precision: a layer, or what an engine fuses.

    Attributes:
        name: Its name.
        options: What it may have, in order of precision: neighbours in this order are one level apart.
    """

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Boundary:
    """What two regions, one reading the other, cost by the pair of their precisions: dequantizing, a reorder.

    Attributes:
        first: Name of a region.
        second: Name of another.
        costs: By (option of the first, option of the second) costs by name; pairs left out cost nothing.
    """

    first: str
    second: str
    costs: Mapping[tuple[str, str], Mapping[str, float]]


@dataclass(frozen=True)
class Tie:
    """Regions that must have the option of the same name.

    Attributes:
        regions: Their names, two or more.
    """

    regions: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """Give each region one of its options.

    Attributes:
        regions: What to choose for.
        boundaries: What pairs of regions cost beside.
        ties: Regions that must have the same option; ties that share a region are one.
        fixed: The option of regions that are decided.
        base_costs: What the network costs whatever is chosen.

    Raises:
        RecipeError: A name is not known or stands twice, a number is not finite, options differ in which
            costs they have, or tied regions have no option in common.

    Example:
        >>> first = Region("conv", (Option("int8", 0.2, {"ms": 1.0}), Option("float32", 0.0, {"ms": 3.0})))
        >>> second = Region("fc", (Option("int8", 0.5, {"ms": 0.5}), Option("float32", 0.0, {"ms": 1.0})))
        >>> reorder = {("int8", "float32"): {"ms": 0.25}, ("float32", "int8"): {"ms": 0.25}}
        >>> problem = Problem((first, second), (Boundary("conv", "fc", reorder),), base_costs={"ms": 0.1})
        >>> evaluate(problem, {"conv": "int8", "fc": "float32"})
        Assignment(options={'conv': 'int8', 'fc': 'float32'}, loss=0.2, costs={'ms': 2.35})
    """

    regions: tuple[Region, ...]
    boundaries: tuple[Boundary, ...] = ()
    ties: tuple[Tie, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    base_costs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_regions(self.regions)
        _check_costs("base costs", self.base_costs, self.costs)
        for boundary in self.boundaries:
            self._check_boundary(boundary)
        for tie in self.ties:
            who = f"tie of {', '.join(tie.regions) or 'nothing'}"
            if len(set(tie.regions)) < 2:
                raise RecipeError(f"{who}: ties no two regions; give two or more")
            for name in tie.regions:
                self._check_region(name, who)
        for name, option in self.fixed.items():
            self._check_region(name, f"fixed '{name}'")
            self._check_option(name, option, f"fixed '{name}'")
        for group in self.groups:
            if not self.options_of(group):
                raise RecipeError(
                    f"tied regions {', '.join(group)}: no option is open to all of them "
                    f"({'; '.join(f'{name}: {self._open(name)}' for name in group)}); give them one in common"
                )

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs."""
        return tuple(self.regions[0].options[0].costs)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all that is summed: the loss, then the costs."""
        return LOSS, *self.costs

    @cached_property
    def by_name(self) -> Mapping[str, Region]:
        """The regions by their names."""
        return {region.name: region for region in self.regions}

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The regions that are decided together, in order of the first of each."""
        group_of = {region.name: {region.name} for region in self.regions}
        for tie in self.ties:
            merged = set[str]().union(*(group_of[name] for name in tie.regions))
            group_of |= dict.fromkeys(merged, merged)
        order = {region.name: place for place, region in enumerate(self.regions)}
        return tuple(dict.fromkeys(tuple(sorted(group_of[name], key=order.__getitem__)) for name in order))

    def options_of(self, group: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the options that all regions of a group may have, in order of precision."""
        allowed = [
            {
                option.name
                for option in self.by_name[name].options
                if self.fixed.get(name, option.name) == option.name
            }
            for name in group
        ]
        return tuple(
            o.name for o in self.by_name[group[0]].options if all(o.name in names for names in allowed)
        )

    def check_limits(self, limits: Mapping[str, float], objective: str = LOSS) -> None:
        """Check that limits and objective are of what the problem has.

        Raises:
            RecipeError: A name is not known, or a limit is not a number.
        """
        for name, limit in limits.items():
            if name not in self.columns:
                raise RecipeError(f"limits: {_no_cost(name, self.columns)}")
            if math.isnan(limit) or limit == -math.inf:
                raise RecipeError(f"limits: that of '{name}' is {limit}; give a number, or inf for no limit")
        if objective not in self.columns:
            raise RecipeError(f"objective: {_no_cost(objective, self.columns)}")

    def _open(self, name: str) -> str:
        return self.fixed.get(name) or ", ".join(option.name for option in self.by_name[name].options)

    def _check_boundary(self, boundary: Boundary) -> None:
        who = f"boundary {boundary.first} - {boundary.second}"
        if boundary.first == boundary.second:
            raise RecipeError(f"{who}: lies between a region and itself; give two regions")
        for name in (boundary.first, boundary.second):
            self._check_region(name, who)
        for pair, costs in boundary.costs.items():
            for name, option in zip((boundary.first, boundary.second), pair, strict=True):
                self._check_option(name, option, who)
            _check_costs(f"{who}, {' - '.join(pair)}", costs, self.costs)

    def _check_region(self, name: str, who: str) -> None:
        if name not in self.by_name:
            known = list(self.by_name)
            raise RecipeError(
                f"{who}: there is no region '{name}'{suggest(name, known)}; give one of the problem's"
            )

    def _check_option(self, name: str, option: str, who: str) -> None:
        known = [one.name for one in self.by_name[name].options]
        if option not in known:
            raise RecipeError(
                f"{who}: region '{name}' has no option '{option}'{suggest(option, known)}; "
                f"it has {', '.join(known)}"
            )


@dataclass(frozen=True)
class Assignment:
    """An option for each region.

    Attributes:
        options: By region.
        loss: Predicted loss.
        costs: By name of the cost.
    """

    options: Mapping[str, str]
    loss: float
    costs: Mapping[str, float]

    def value(self, column: str) -> float:
        """Return the loss, or a cost by its name."""
        return self.loss if column == LOSS else self.costs[column]

    def within(self, limits: Mapping[str, float]) -> bool:
        """Say whether no limit is exceeded, compared to 1e-12."""
        return all(self.value(name) <= limit + _NEAR * max(1.0, abs(limit)) for name, limit in limits.items())


def evaluate(problem: Problem, options: Mapping[str, str]) -> Assignment:
    """Return what options lose and cost, each sum rounded once.

    ``loss = sum_i loss_i(x_i)``, ``cost = base + sum_i cost_i(x_i) + sum_(i,j) cost_ij(x_i, x_j)``

    Args:
        problem: What may be chosen.
        options: By region.

    Raises:
        RecipeError: A region has no option or one that is not its own, is not known, does not have the
            option it is fixed to or that of the regions it is tied to.
    """
    _check_options(problem, options)
    chosen = {
        region.name: next(one for one in region.options if one.name == options[region.name])
        for region in problem.regions
    }
    terms: list[Mapping[str, float]] = [problem.base_costs]
    terms += [option.costs for option in chosen.values()]
    terms += [b.costs.get((options[b.first], options[b.second]), {}) for b in problem.boundaries]
    return Assignment(
        options={name: option.name for name, option in chosen.items()},
        loss=math.fsum(option.loss for option in chosen.values()),
        costs={name: math.fsum(term.get(name, 0.0) for term in terms) for name in problem.costs},
    )


def _check_options(problem: Problem, options: Mapping[str, str]) -> None:
    for name in options:
        problem._check_region(name, "assignment")
    for region in problem.regions:
        if region.name not in options:
            raise RecipeError(
                f"assignment: region '{region.name}' has no option; give one of {problem._open(region.name)}"
            )
        problem._check_option(region.name, options[region.name], "assignment")
    for name, option in problem.fixed.items():
        if options[name] != option:
            raise RecipeError(
                f"assignment: region '{name}' has {options[name]} and is fixed to {option}; give that"
            )
    for group in problem.groups:
        if len({options[name] for name in group}) > 1:
            which = ", ".join(f"{name} {options[name]}" for name in group)
            raise RecipeError(f"assignment: tied regions have {which}; give them the same option")


def _check_regions(regions: Sequence[Region]) -> None:
    if not regions:
        raise RecipeError("problem: has no region; give at least one")
    _check_once((region.name for region in regions), "problem: region")
    for region in regions:
        if not region.options:
            raise RecipeError(f"region '{region.name}': has no option; give at least one")
        _check_once((option.name for option in region.options), f"region '{region.name}': option")
    known = tuple(regions[0].options[0].costs)
    if LOSS in known:
        raise RecipeError(f"problem: a cost is called '{LOSS}', as the loss is; give it another name")
    for region in regions:
        for option in region.options:
            who = f"region '{region.name}', option '{option.name}'"
            if set(option.costs) != set(known):
                has, others = ", ".join(option.costs) or "none", ", ".join(known) or "none"
                raise RecipeError(
                    f"{who}: has the costs {has} and the first option {others}; give all the same"
                )
            _check_costs(who, {LOSS: option.loss, **option.costs}, (LOSS, *known))


def _check_once(names: Iterable[str], who: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RecipeError(f"{who} '{name}' stands there twice; give each once")
        seen.add(name)


def _check_costs(who: str, costs: Mapping[str, float], known: Sequence[str]) -> None:
    for name, value in costs.items():
        if name not in known:
            raise RecipeError(f"{who}: {_no_cost(name, known)}")
        if not math.isfinite(value):
            raise RecipeError(f"{who}: {name} is {value}; give a finite number")


def _no_cost(name: str, known: Sequence[str]) -> str:
    return f"there is no '{name}'{suggest(name, known)}; there are {', '.join(known) or 'no costs'}"
