"""(IA)³ (Liu et al. 2022, arXiv:2205.05638): every output, or every input, of a layer times a learned factor."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner.weights.adapters.base import Slot, Transform


@dataclass(frozen=True)
class Rescaling(Transform):
    """W' = factors · W, for outputs or inputs."""

    factors: Tensor
    """`[out]` or `[in]`."""
    of_inputs: bool
    slot: Slot = "weight"
    optional: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's or bias', with 0 where any size will do."""
        return (0, len(self.factors)) if self.of_inputs else (len(self.factors),)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether there is a factor for each output, or input, of a tensor of `shape`."""
        axis = 1 if self.of_inputs else 0
        return len(shape) > axis and shape[axis] == len(self.factors) and (len(shape) == 1) == (self.slot == "bias")

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype."""
        axis = 1 if self.of_inputs else 0
        sizes = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        return weight * self.factors.to(weight.dtype).reshape(sizes)
