"""AdaRound: learned rounding, layer by layer."""

from __future__ import annotations

from pydantic import Field

from fewbit.improve.descend import Descent, descend
from fewbit.improve.reconstruct import Problem, reconstruct
from fewbit.improve.units import split_into_layers
from fewbit.net import Net
from fewbit.step import Context, Step, StepReport


class AdaRound(Step):
    """Learn for each weight whether it is rounded up or down, layer by layer.

    A layer's rounding is relaxed to a value between down and up, and learned so that the layer's output,
    read from the quantized layers before it, comes nearest to the float network's::

        W~ = S clamp(floor(W / S) + h(V), qmin, qmax)
        min_V  || f(W x) - f(W~ x~) ||^2 + lambda sum (1 - |2 h(V) - 1|^beta)

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1); beta falls from beta_start to beta_end, so that the regulariser
    leaves no weight in between. f is the activation behind the layer, and the sum and quantizer behind that.

    Attributes:
        images: At most so many calibration images.
        iterations: Steps of Adam a layer.
        batch: Images an iteration.
        values: At most so many values of tensors an iteration; large ones take fewer images, never under 4.
        lr_rounding: Learning rate of V.
        regularization: Lambda.
        warm_up: Share of the iterations without the regulariser.
        beta_start: Its exponent at first.
        beta_end: Its exponent in the end.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    arXiv 2004.10568.
    Differs: a hundred times the learning rate, ten times lambda and a fiftieth of the iterations; large
    feature maps take fewer images an iteration.

    Example:
        >>> AdaRound(iterations=500).iterations
        500
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"rounded"})

    images: int = Field(1024, ge=1)
    iterations: int = Field(200, ge=1)
    batch: int = Field(32, ge=1)
    values: int = Field(1 << 20, ge=1)
    lr_rounding: float = Field(0.1, gt=0)
    regularization: float = Field(0.1, ge=0)
    warm_up: float = Field(0.2, ge=0, lt=1)
    beta_start: float = Field(20.0, ge=1)
    beta_end: float = Field(2.0, ge=1)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Round in place."""
        how = Descent(
            iterations=self.iterations,
            batch=self.batch,
            values=self.values,
            lr_rounding=self.lr_rounding,
            regularization=self.regularization,
            warm_up=self.warm_up,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
        )

        def solve(problem: Problem) -> str:
            return descend(problem, how)

        return reconstruct(self, "adaround", net, context, split_into_layers(net), self.images, solve)
