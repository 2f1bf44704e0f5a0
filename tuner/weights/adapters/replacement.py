"""A whole weight instead of the network's own: ComfyUI's `set_weight`."""

from dataclasses import dataclass

from torch import Tensor

from tuner.weights.adapters.base import Slot, Transform


@dataclass(frozen=True)
class Replacement(Transform):
    """W' = values, whatever W is."""

    values: Tensor
    slot: Slot = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.values.shape)

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype."""
        return self.values.to(weight.dtype, copy=True).reshape(weight.shape)
