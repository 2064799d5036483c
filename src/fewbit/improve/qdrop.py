"""QDrop: block reconstruction with activations quantized at random."""

from __future__ import annotations

from pydantic import Field

from fewbit.improve.descend import Descent, descend
from fewbit.improve.reconstruct import Problem, reconstruct
from fewbit.improve.units import split_into_blocks
from fewbit.net import Net
from fewbit.step import Context, Step, StepReport


class QDrop(Step):
    """Learn rounding, steps and biases block by block, with activations dropped to float at random.

    As in BRECQ a block's output comes as near as can be to the float network's. While it is learned, each
    value of an activation is rounded with probability `share` and stays float otherwise, which makes the
    result flat around the quantized network; the block's inputs are mixed from the quantized and the float
    network in the same way. Rounding, steps (by the gradient of LSQ) and biases are learned together.

    Attributes:
        images: At most so many calibration images.
        iterations: Steps of Adam a block.
        batch: Images an iteration.
        values: At most so many values of tensors an iteration; large ones take fewer images, never under 4.
        share: Of the values that are rounded.
        group: Layers in a row that make a block where the network has none.
        lr_rounding: Learning rate of V.
        lr_step: Learning rate of the logarithm of activation steps.
        lr_bias: Learning rate of biases; 0 keeps them.
        regularization: Lambda.
        warm_up: Share of the iterations without the regulariser.
        beta_start: Its exponent at first.
        beta_end: Its exponent in the end.

    Source: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
    Quantization", 2022, arXiv 2203.05740; steps: Esser et al., "Learned Step Size Quantization", 2019,
    arXiv 1902.08153.
    Differs: a hundred times the learning rates, ten times lambda and a hundredth of the iterations;
    activations quantized at run time are always rounded; rounding keeps its rate,
    the others fall along a cosine; biases are learned too; the block's output is always rounded; masks are
    cut out of one row of random bits; large feature maps take fewer images an iteration.

    Example:
        >>> QDrop(share=1.0).share
        1.0
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"rounded", "corrected"})

    images: int = Field(1024, ge=1)
    iterations: int = Field(200, ge=1)
    batch: int = Field(32, ge=1)
    values: int = Field(1 << 20, ge=1)
    share: float = Field(0.5, ge=0, le=1)
    group: int = Field(2, ge=1)
    lr_rounding: float = Field(0.1, gt=0)
    lr_step: float = Field(0.01, ge=0)
    lr_bias: float = Field(0.003, ge=0)
    regularization: float = Field(0.1, ge=0)
    warm_up: float = Field(0.2, ge=0, lt=1)
    beta_start: float = Field(20.0, ge=1)
    beta_end: float = Field(2.0, ge=1)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Reconstruct in place."""
        how = Descent(
            iterations=self.iterations,
            batch=self.batch,
            values=self.values,
            activations="dropped",
            share=self.share,
            lr_rounding=self.lr_rounding,
            lr_step=self.lr_step,
            lr_bias=self.lr_bias,
            regularization=self.regularization,
            warm_up=self.warm_up,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
        )

        def solve(problem: Problem) -> str:
            return descend(problem, how)

        units = split_into_blocks(net, self.group)
        return reconstruct(self, "qdrop", net, context, units, self.images, solve)
