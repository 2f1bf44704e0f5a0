"""The pseudo-Huber loss, constant or scheduled (Khrapov et al. 2024, arXiv:2403.16728)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tuner.diffusion.measures.base import Level, Measure


@dataclass(frozen=True, kw_only=True)
class Huber:
    """2δ (sqrt(d² + δ²) - δ): d² where d is far below δ, 2δ |d| far above, so outliers pull less.

    sd-scripts' `huber`; the paper divides by 2, which is as if the learning rate were half.
    """

    delta: float = 0.1
    """δ: at every noise level, or in a schedule at the highest."""
    schedule: Literal["constant", "exponential", "snr"] = "constant"
    """What δ is at other levels. It rises from `delta` at nothing but noise to 1 at no noise, `exponential`: as
    delta^(t / T), `snr`: as (1 - delta) / (1 + sigma / alpha)² + delta."""

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"delta must be positive, got {self.delta}")
        if self.schedule != "constant" and self.delta >= 1:
            raise ValueError(f"delta must be below 1 for the schedule {self.schedule!r}, got {self.delta}")

    def of(self, difference: Tensor, level: Level) -> Tensor:
        match self.schedule:
            case "constant":
                delta = torch.full_like(level.share, self.delta)
            case "exponential":
                delta = self.delta**level.share
            case "snr":
                delta = (1 - self.delta) / (1 + level.sigma / level.alpha) ** 2 + self.delta
        root = torch.sqrt(difference.square() + delta**2)
        return 2 * delta * difference.square() / (root + delta)  # = 2δ (root - δ), which would cancel for small d


SPEC: type[Measure] = Huber
