"""What models that are told a picture are told while they learn, where no file says it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.data.example import Size

MOST = 4
"""Shapes that a drawn mask has at most."""


@dataclass(frozen=True, kw_only=True)
class Guides:
    """How often models that are told a picture are told what; for each showing its own."""

    whole: float = 0.25
    """Inpainting: how often the whole picture is to be painted; otherwise a few rectangles and ellipses of it are."""
    nothing: float = 0.0
    """Inpainting: how often nothing of it is."""
    dropout: float = 0.0
    """Editing: how often the picture that is edited is left out, so that guidance can lead by it (0.05 is usual)."""

    def __post_init__(self) -> None:
        for name in ("whole", "nothing", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.whole + self.nothing > 1:
            raise ValueError(f"whole + nothing must be at most 1, got {self.whole + self.nothing}")

    def mask(self, size: Size, rng: torch.Generator) -> Tensor:
        """`[1, H, W]` float32, 1 where a picture of `size` is to be painted and 0 where it is left."""
        width, height = size
        chance = float(torch.rand((), generator=rng))
        if chance < self.whole:
            return torch.ones(1, height, width)
        mask = torch.zeros(1, height, width)
        if chance < self.whole + self.nothing:
            return mask
        across = ((torch.arange(width) + 0.5) / width)[None, :]
        down = ((torch.arange(height) + 0.5) / height)[:, None]
        for _ in range(int(torch.randint(1, MOST + 1, (), generator=rng))):
            x, y, a, b, round_ = torch.rand(5, generator=rng).tolist()
            wide, high = (across - x) / (0.05 + 0.35 * a), (down - y) / (0.05 + 0.35 * b)
            inside = wide**2 + high**2 <= 1 if round_ < 0.5 else (wide.abs() <= 1) & (high.abs() <= 1)
            mask[0][inside] = 1
        return mask

    def keeps(self, rng: torch.Generator) -> bool:
        """Whether the picture that is edited is told."""
        return float(torch.rand((), generator=rng)) >= self.dropout
