"""Walking through a network unit by unit, with the float network's tensors beside the quantized one's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit.errors import DataError
from fewbit.improve.activations import Activations
from fewbit.improve.checkpoint import Checkpoint
from fewbit.improve.units import Unit
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.ranges.calibrate import hold_biases
from fewbit.step import Context, Step, StepReport
from fewbit.version import __version__

_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Problem:
    """One unit to be learned, all units before it being quantized already.

    Attributes:
        net: The network.
        unit: The unit.
        exact: What the float network has at the unit's inputs and outputs, by node.
        rounded: What the quantized network has at the unit's inputs.
        images: How many images there are.
        generator: Of every random choice; its seed depends on the recipe's and on the unit alone.
        tell: Told the share done.
    """

    net: Net
    unit: Unit
    exact: Activations
    rounded: Activations
    images: int
    generator: torch.Generator
    tell: Callable[[float], None]

    def quantizers(self) -> list[Quantizer]:
        """Return the unit's quantizers of activations that have one scale, each once."""
        found = (self.net.graph.get_submodule(str(node.target)) for node in self.unit.nodes)
        return [q for q in dict.fromkeys(found) if isinstance(q, Quantizer) and q.scale.dim() == 0]

    def second_generator(self) -> torch.Generator:
        """Return one more generator, so that what it draws leaves the choice of images as it is."""
        return torch.Generator().manual_seed(self.generator.initial_seed() + (1 << 40))

    def judges(self, every: int) -> Tensor:
        """Return which images, one in so many, are kept to judge by: a mask (images,), none where it is 0."""
        return drawn_judges(self.images, every)

    def own_quantizers(self) -> list[Quantizer]:
        """Return those whose steps may move: all the values that they round are computed in this unit.

        Tensors that share a quantizer and lie in units before this one were rounded with its step already.
        """
        calls: dict[str, set[fx.Node]] = {}
        for node in self.net.graph.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), set()).add(node)
        nodes, own = set(self.unit.nodes), []
        for quantizer in self.quantizers():
            if quantizer.fixed:
                continue
            shared = next(c for t, c in calls.items() if self.net.graph.get_submodule(t) is quantizer)
            # What moves or joins values that it has rounded brings none of its own.
            first = {node for node in shared if not shared & set(_source(node).all_input_nodes)}
            if first <= nodes:
                own.append(quantizer)
        return own

    def held(self, behind: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the tensors that nodes behind the unit read and that are known before they run."""
        later = set(behind)
        read = (source for node in behind for source in node.all_input_nodes if source not in later)
        return list(dict.fromkeys(read))


Solve = Callable[[Problem], str]


def reconstruct(
    step: Step, name: str, net: Net, context: Context, units: Sequence[Unit], images: int, solve: Solve
) -> StepReport:
    """Solve one unit after the other, each on what the quantized units before it really give it.

    The tensors between units stay in memory up to the context's limit and in mapped files beyond. Where the
    context has a place for it, each unit's result is written there, and a run that was killed goes on at the
    unit that it was on, with the same bits in the end.

    Args:
        step: Whose hyperparameters count.
        name: Its row in the registry.
        net: Changed in place.
        context: Of the step.
        units: All of them, in order.
        images: At most so many calibration images are used.
        solve: Sets codes, steps and biases of one unit, and says what a reader should know.

    Raises:
        DataError: No image came.
    """
    given = gather_images(context, images, name)
    checkpoint = Checkpoint(context.scratch, name, _key(step, net, given, context))
    notes, last = [], _last_readers(units)
    costs = [_cost(unit) for unit in units]
    done = 0.0
    with ExitStack() as stack:
        stack.enter_context(without_gradients(net))
        exact = stack.enter_context(Activations(context.memory_limit_bytes // 2, context.scratch))
        rounded = stack.enter_context(Activations(context.memory_limit_bytes // 2, context.scratch))
        image = net.image_node
        count = len(given)
        exact.put(image, given, 0, count)
        rounded.share(image, exact)
        del given
        for index, unit in enumerate(units):
            with in_float(net, unit):
                run_unit(net, unit, exact, count)

            def tell(share: float, cost: float = costs[index], before: float = done) -> None:
                context.tell(name, (before + share * cost) / sum(costs))

            generator = torch.Generator().manual_seed(context.seed * 1_000_003 + index)
            problem = Problem(net, unit, exact, rounded, count, generator, tell)
            if not checkpoint.restore(index, unit, problem.own_quantizers()):
                tell(0.0)
                note = solve(problem)
                checkpoint.save(index, unit, problem.own_quantizers(), note)
            notes.append(checkpoint.note(index))
            done += costs[index]
            run_unit(net, unit, rounded, count)
            for node in [n for n, reader in last.items() if reader == index]:
                exact.drop(node)
                rounded.drop(node)
    if checkpoint.restored:
        notes.insert(0, f"{checkpoint.restored} of {len(units)} units had been done when a run was stopped")
    notes += hold_assigned(net)
    return StepReport(
        step=name, changed=sum(len(unit.layers) for unit in units), notes=tuple(n for n in notes if n)
    )


def drawn_judges(images: int, every: int) -> Tensor:
    """Return a mask (images,) of one image in so many, none where it is 0.

    They are drawn, for calibration images come in the order of their classes.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(every))
    chosen = torch.zeros(images, dtype=torch.bool)
    chosen[order[: images // every if every else 0]] = True
    return chosen


@contextmanager
def without_gradients(net: Net) -> Iterator[None]:
    """Ask for no gradient of the network's own parameters for a while."""
    fixed = {name for name, parameter in net.graph.named_parameters() if not parameter.requires_grad}
    try:
        for parameter in net.graph.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in net.graph.named_parameters():
            parameter.requires_grad_(name not in fixed)


def hold_assigned(net: Net) -> tuple[str, ...]:
    """Widen weight grids where a bias does not fit int32 any more, the codes with them."""
    matrices = [m for m in net.graph.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    modules = [m for m in matrices if m.weight_quantizer.assigned is not None]
    before = [module.weight_quantizer.grid(module.weight.dim()) for module in modules]
    notes = hold_biases(net)
    for module, (scale, zero_point) in zip(modules, before, strict=True):
        quantizer = module.weight_quantizer
        wider, _ = quantizer.grid(module.weight.dim())
        if quantizer.assigned is not None and not torch.equal(scale, wider):
            quantizer.assign((quantizer.assigned - zero_point) * (scale / wider) + zero_point)
    return notes


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def run_unit(net: Net, unit: Unit, kept: Activations, images: int) -> None:
    """Compute a unit's outputs from its inputs for all images, and keep them."""
    codes = {node: _kept_as_codes(net, node) for node in unit.outputs}
    for start, values in unit_batches(net, unit, kept, images):
        for node in unit.outputs:
            kept.put(node, values[node], start, images, codes[node])


def unit_batches(
    net: Net, unit: Unit, kept: Activations, images: int
) -> Iterator[tuple[int, dict[fx.Node, Tensor]]]:
    """Run a unit batch by batch; yield the place of the first image and the values of its outputs."""
    for which in batches_of(unit, kept, images):
        yield which.start, run_nodes(net, unit, unit.outputs, kept, which)


def batches_of(unit: Unit, kept: Activations, images: int) -> Iterator[slice]:
    """Yield which images go through a unit at a time, so that its tensors stay small."""
    size = max(1, min(256, _VALUES_AT_ONCE // max(_width(kept, node) for node in unit.inputs)))
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))


def run_nodes(
    net: Net, unit: Unit, wanted: Collection[fx.Node], kept: Activations, which: slice
) -> dict[fx.Node, Tensor]:
    """Run a unit on some images as far as it must; return the values of the nodes that are wanted.

    What nobody reads any more is dropped on the way.
    """
    last = {source: node for node in unit.nodes for source in node.all_input_nodes}
    missing = set(wanted)
    with torch.no_grad():
        values = {node: kept.take(node, which) for node in unit.inputs}
        missing -= values.keys()
        for node in unit.nodes:
            if not missing:
                break
            module = net.graph.get_submodule(str(node.target))
            values[node] = module(*[values[s] for s in node.args if isinstance(s, fx.Node)])
            missing.discard(node)
            for source in node.all_input_nodes:
                if last[source] is node and source not in wanted:
                    del values[source]
    return {node: values[node] for node in wanted}


def _width(kept: Activations, node: fx.Node) -> int:
    return kept.take(node, slice(0, 1)).numel()


def _kept_as_codes(net: Net, node: fx.Node) -> Quantizer | None:
    module = net.graph.get_submodule(str(node.target))
    return module if isinstance(module, Quantizer) and module.enabled and module.scale.dim() == 0 else None


def gather_images(context: Context, images: int, name: str) -> Tensor:
    """Return the first so many calibration images.

    Raises:
        DataError: No image came.
    """
    parts: list[Tensor] = []
    for batch in context.batches():
        parts.append(batch[: images - sum(len(part) for part in parts)])
        if sum(len(part) for part in parts) >= images:
            break
    if not sum(len(part) for part in parts):
        raise DataError(f"{name}: no image came; give at least one with --data or --calibration")
    return torch.cat(parts)


def _key(step: Step, net: Net, images: Tensor, context: Context) -> str:
    """Return a name for everything that the result depends on."""
    digests = f"{step.digest()} {context.scheme.digest()} {context.target.digest()} {context.seed}"
    told = hashlib.sha256(f"{digests} {__version__} {torch.__version__} {net.graph}".encode())
    told.update(f"{torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}".encode())
    for key, value in sorted(net.graph.state_dict().items()):
        told.update(key.encode() + value.detach().contiguous().cpu().numpy().tobytes())
    for image in images:
        told.update(image.contiguous().numpy().tobytes())
    return told.hexdigest()[:16]


def _last_readers(units: Sequence[Unit]) -> dict[fx.Node, int]:
    """Return the index of the last unit that reads each tensor between units."""
    last = {node: index for index, unit in enumerate(units) for node in unit.outputs}
    last |= {node: index for index, unit in enumerate(units) for node in unit.inputs}
    return last


def _cost(unit: Unit) -> float:
    """Return a guess of how long a unit takes, for the progress."""
    return float(sum(layer.weight.numel() ** 0.5 for layer in unit.layers.values())) or 1.0


@contextmanager
def in_float(net: Net, unit: Unit) -> Iterator[None]:
    """Switch the quantizers of one unit off for a while."""
    modules = [net.graph.get_submodule(str(node.target)) for node in unit.nodes]
    found: list[nn.Module] = [m for m in modules if isinstance(m, Quantizer | DynamicQuantizer)]
    found += [m.weight_quantizer for m in modules if isinstance(m, QuantConv2d | QuantLinear)]
    on = [quantizer for quantizer in dict.fromkeys(found) if quantizer.enabled]
    for quantizer in on:
        quantizer.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for quantizer in on:
            quantizer.enabled = True  # type: ignore[assignment]
