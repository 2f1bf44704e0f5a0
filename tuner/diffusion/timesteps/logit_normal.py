"""Middle noise levels more often (Esser et al. 2024, arXiv:2403.03206, section 3.1)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tuner.diffusion.timesteps.base import Timesteps


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """ln(t / (1 - t)) is normally distributed: the ends of the schedule, which teach least, are drawn rarely."""

    mean: float = 0.0
    """Of the logit; positive is more noise."""
    std: float = 1.0
    """Of the logit; smaller is closer to the middle."""

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        normal = cast(Tensor, torch.special.ndtri(u))  # pyright: ignore[reportUnknownMemberType]
        return torch.sigmoid(self.mean + self.std * normal)


SPEC: type[Timesteps] = LogitNormal
