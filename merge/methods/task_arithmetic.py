"""Task arithmetic: what models have learned since a common base, added up (Ilharco et al. 2022, arXiv:2212.04089)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._sums import add_up, factors, refuse_zero_sum, sole
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Elementwise):
    """scale * sum_i w_i d_i, where the differences d_i are those of the models from their base.

    A negative weight takes away what a model has learned. Many models of weight 1 overshoot: the paper finds scales
    of 0.3 to 0.5 for eight tasks by trying them out. (mergekit adds up in the dtype of the files, and takes 1 for a sum
    of weights that is nearly 0.)
    """

    weights: tuple[Number, ...] = ()
    """One for each difference, any numbers; none: 1 each."""
    scale: Number = 1.0
    """Times the sum: the paper's and mergekit's lambda; any number."""
    normalize: bool = False
    """Whether the weights are divided by their sum, which must not be 0: `scale` times the average difference."""

    takes = (Space.DELTA,)
    repeats = True
    gives = Space.DELTA
    temporaries = 0

    def __post_init__(self) -> None:
        if self.normalize:
            refuse_zero_sum(self.weights)

    def unchanged(self) -> int | None:
        return sole(self.weights, normalize=self.normalize) if fixed(self.scale) == 1 else None

    def spreads(self) -> bool:
        return all(fixed(number) != 0 for number in (*self.weights, self.scale))

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        scale = fixed(self.scale)
        add_up(inputs, [scale * w for w in factors(self.weights, len(inputs), normalize=self.normalize)], out)


SPEC: type[Elementwise] = TaskArithmetic
