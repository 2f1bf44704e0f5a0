"""Exponential moving average of the learned weights (Polyak and Juditsky 1992)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Ema:
    """A float32 average of tensors, updated once an optimizer update.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten (as in
    TensorFlow's `ExponentialMovingAverage`).
    """

    decay: float
    average: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    updates: int = 0

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Move the average towards `state`; the first call takes it over."""
        if not self.average:
            self.average = {name: tensor.detach().float().clone() for name, tensor in state.items()}
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        latest = [state[name].detach().float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), latest, 1 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
