"""DoRA (Liu et al. 2024, arXiv:2402.09353): W' = m · (W + ΔW) / ‖W + ΔW‖, a norm for each output or each input.

peft keeps one magnitude m for each output. LyCORIS and kohya can do either, and the shape of m tells which it is. The
norm is that of W + ΔW, as in the paper and in both of them; some programs that load such files divide by ‖W‖.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Difference, Slot, Transform


@dataclass(frozen=True)
class Decomposed(Transform):
    """magnitude · (W + inner) / ‖W + inner‖.

    Raises:
        DataError: a magnitude that has neither a number for each output nor one for each input.
    """

    inner: Difference
    magnitude: Tensor
    """`[out]`, `[out, 1, …]` or `[1, in, …]`."""
    slot: Slot = "weight"

    def __post_init__(self) -> None:
        size, shape = self.magnitude.numel(), tuple(self.magnitude.shape)
        per_output = bool(shape) and shape[0] == size == self.inner.shape[0]
        per_input = len(shape) > 1 and shape[1] == size and (self.inner.flattened or size == self.inner.shape[1])
        if not per_output and not per_input:
            raise DataError(f"a magnitude of shape {list(shape)} for a weight of {list(self.inner.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.inner.shape

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ΔW and the magnitude fit a weight of `shape`."""
        return self.inner.fits(shape) and self.magnitude.numel() == shape[0 if self.per_output else 1]

    @property
    def per_output(self) -> bool:
        """Whether there is a magnitude for each output, not for each input."""
        return self.magnitude.shape[0] == self.inner.shape[0] == self.magnitude.numel()

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        moved = weight.double() + self.inner.dense().reshape(weight.shape)
        axis = 0 if self.per_output else 1
        others = [dim for dim in range(weight.ndim) if dim != axis]
        norm = moved.square().sum(dim=others, keepdim=True).sqrt()
        magnitude = self.magnitude.double().reshape(norm.shape)
        return moved.mul_(magnitude / norm.clamp(min=1e-150)).to(weight.dtype)
