"""A whole difference: ΔW itself, as LyCORIS keeps it for norms, biases and layers that are cheaper so."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Difference, Slot


@dataclass(frozen=True)
class Full(Difference):
    """ΔW, number by number.

    Raises:
        DataError: a single number, which no layer has for a weight or bias.
    """

    values: Tensor
    slot: Slot = "weight"
    norm: bool = False
    """Whether the module is a norm, whose differences have names of their own in files."""

    def __post_init__(self) -> None:
        if not self.values.ndim or not self.values.numel():
            raise DataError(f"a difference of shape {list(self.values.shape)}, expected a weight's or a bias'")

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(self.values.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of what is added, float32."""
        return self.values[start:stop].to(torch.float32, copy=True).reshape(stop - start, self.columns)

    def dense(self) -> Tensor:
        """All that is added, float64."""
        return self.values.to(torch.float64, copy=True).reshape(self.shape[0], self.columns)

    def to(self, dtype: torch.dtype) -> "Full":
        """With values in `dtype`."""
        return Full(self.values.to(dtype), self.slot, self.norm)
