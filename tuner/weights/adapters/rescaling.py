"""(IA)³ (Liu et al. 2022, arXiv:2205.05638): every output, or every input, of a layer times a learned factor.

LyCORIS keeps what is added to 1, and leaves the bias alone. peft keeps the factor itself, and a factor of an output is
one of the bias too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner.weights.adapters.base import Slot, Transform


@dataclass(frozen=True)
class Rescaling(Transform):
    """W' = (offset + values) · W, for outputs or inputs."""

    values: Tensor
    """One for each output or input, in the file's shape."""
    of_inputs: bool
    offset: float
    """1 of LyCORIS', 0 of peft's."""
    slot: Slot = "weight"
    optional: bool = False

    @property
    def factors(self) -> Tensor:
        """What is multiplied by, `[out]` or `[in]`, float64."""
        return self.values.double().flatten() + self.offset

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's or bias', with 0 where any size will do."""
        return (0, self.values.numel()) if self.of_inputs else (self.values.numel(),)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether there is a factor for each output, or input, of a tensor of `shape`."""
        axis = 1 if self.of_inputs else 0
        return len(shape) > axis and shape[axis] == self.values.numel() and (len(shape) == 1) == (self.slot == "bias")

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype."""
        axis = 1 if self.of_inputs else 0
        sizes = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        return weight * self.factors.to(weight.dtype).reshape(sizes)
