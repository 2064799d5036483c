"""Tuning what is not a code: scales, steps and biases, by the float network's logits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fewbit.improve.descend import Descent, descend
from fewbit.improve.reconstruct import Problem, reconstruct
from fewbit.improve.units import split_into_blocks, whole_network
from fewbit.net import Net
from fewbit.step import Context, Step, StepReport

_JUDGES = 5


class TuneScales(Step):
    """Keep every code and tune weight scales, activation steps and biases, by the float network's logits.

    Codes chosen layer by layer leave errors that add up along the network. The few real numbers beside the
    codes are enough to take much of that back, and too few to fit the calibration images by heart::

        min over scales, steps, biases   mean || logits~ - logits ||^2

    Steps learn by the gradient of LSQ; no label is needed. With `units = "block"` each block is tuned to its
    own float output instead. Every fifth image is not learned from: where these come no nearer to the float
    network, everything stays as it was.

    Attributes:
        images: At most so many calibration images.
        units: "network" or "block".
        iterations: Steps of Adam.
        batch: Images an iteration.
        values: At most so many values of tensors an iteration; large networks take fewer images, never
            under 4.
        group: Layers in a row that make a block where the network has none.
        lr_scale: Learning rate of the logarithm of weight scales; 0 keeps them.
        lr_step: Learning rate of the logarithm of activation steps; 0 keeps them.
        lr_bias: Learning rate of biases; 0 keeps them.

    Source: Finkelstein et al., "QFT: Post-training quantization via fast joint finetuning of all degrees of
    freedom", 2022, arXiv 2212.02634; steps: Esser et al., "Learned Step Size Quantization", 2019,
    arXiv 1902.08153.
    Differs: weights keep their codes, so that nothing but scales, steps and biases is tuned; the target is
    the logits; a hundred iterations.

    Example:
        >>> TuneScales().units
        'network'
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"corrected"})

    images: int = Field(1024, ge=1)
    units: Literal["network", "block"] = "network"
    iterations: int = Field(100, ge=1)
    batch: int = Field(32, ge=1)
    values: int = Field(1 << 26, ge=1)
    group: int = Field(2, ge=1)
    lr_scale: float = Field(0.001, ge=0)
    lr_step: float = Field(0.003, ge=0)
    lr_bias: float = Field(0.001, ge=0)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Tune in place."""
        how = Descent(
            iterations=self.iterations,
            batch=self.batch,
            values=self.values,
            rounding=False,
            judges=_JUDGES,
            lr_scale=self.lr_scale,
            lr_step=self.lr_step,
            lr_bias=self.lr_bias,
        )

        def solve(problem: Problem) -> str:
            return descend(problem, how)

        units = whole_network(net) if self.units == "network" else split_into_blocks(net, self.group)
        return reconstruct(self, "tune_scales", net, context, units, self.images, solve)
