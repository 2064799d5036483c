"""The protocol of a Step: one method, a small frozen object whose fields are its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fewbit.errors import RecipeError
from fewbit.net import Net
from fewbit.place.targets import Target
from fewbit.spec import Frozen, Scheme


@dataclass(frozen=True)
class Context:
    """What a Step may use besides the Net.

    Attributes:
        scheme: Which values each tensor may take.
        target: What the engine accepts and runs fast.
        batches: Gives the calibration images anew: float32 (N, C, H, W), preprocessed.
        seed: Of every random choice.
        advance: Told the name of a step and the fraction done.
        scratch: A folder where a long step keeps what it has done, to go on there after a kill; none:
            nowhere.
            Whoever gives it takes it away in the end.
        memory_limit_bytes: Of what a step keeps of the network's tensors; beyond it goes to memory-mapped
            files.
    """

    scheme: Scheme
    target: Target
    batches: Callable[[], Iterator[Tensor]]
    seed: int = 0
    advance: Callable[[str, float], None] | None = None
    scratch: Path | None = None
    memory_limit_bytes: int = 2 << 30

    def tell(self, step: str, fraction: float) -> None:
        """Report progress, where somebody listens."""
        if self.advance is not None:
            self.advance(step, fraction)


class StepReport(Frozen):
    """What a Step did.

    Attributes:
        step: Its name in the registry.
        seconds: How long it took.
        changed: How many layers or tensors it changed.
        notes: What a reader should know, one line each.
    """

    step: str
    seconds: float = 0.0
    changed: int = 0
    notes: tuple[str, ...] = ()


class Step(Frozen):
    """One method. A subclass's fields are its hyperparameters; calling it changes the given Net.

    Attributes:
        needs: Facts that the Net must have.
        before: Facts that it must not have yet.
        gives: Facts that it has afterwards.
        makes_images: It puts images on the Net, which later steps take in place of real ones.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    makes_images: ClassVar[bool] = False

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Change the Net in place and say what was done."""
        raise RecipeError(f"{type(self).__name__}: is no method; use one that `fewbit methods` lists")

    def reads_images(self, scheme: Scheme) -> bool:
        """Tell whether it cannot do without calibration images; what needs a calibrated network seldom can.

        A recipe of which no step says so is shown none.
        """
        return "calibrated" in self.needs
