"""The weighted average of any number of models, or their weighted sum."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._sums import add_up, factors, refuse_zero_sum, sole
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Elementwise):
    """sum_i w_i W_i / sum_i w_i: mergekit's `linear`, sd-mecha's `n_average`.

    Without weights it is the plain mean: a model soup (Wortsman et al. 2022, arXiv:2203.05482) of however many
    checkpoints. So is LAWA (Kaddour 2022, arXiv:2209.14981), of a run's last ones.

    Weights may be negative, and then extrapolate. An input of weight 0 is not looked at. Average checkpoints by
    weights that add up to 1, or the network's outputs scale with their sum: leave `normalize` on for them.
    """

    weights: tuple[Number, ...] = ()
    """One for each input, any numbers; none: 1 each."""
    normalize: bool = True
    """Whether the weights are divided by their sum, which must not be 0 (mergekit divides by it all the same). kohya's
    `merge_models` does not divide."""

    takes = (Space.EITHER,)
    repeats = True
    gives = Space.EITHER
    temporaries = 0

    def __post_init__(self) -> None:
        if self.normalize:
            refuse_zero_sum(self.weights)

    def unchanged(self) -> int | None:
        return sole(self.weights, normalize=self.normalize)

    def spreads(self) -> bool:
        return all(fixed(weight) != 0 for weight in self.weights)

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        add_up(inputs, factors(self.weights, len(inputs), normalize=self.normalize), out)


SPEC: type[Elementwise] = WeightedSum
