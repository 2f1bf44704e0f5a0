"""What the objective is given."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner.rng import Position


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a denoiser is told besides the noisy latents and the time."""

    tokens: Tensor
    """`[B, L, D]`: the text, one vector a token."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B examples of one bucket, so of one size."""

    latents: Tensor
    """`[B, C, h, w]` float32, scaled as the denoiser takes them."""
    captions: Sequence[str]
    """B final captions, after templates and dropout."""
    conditioning: Conditioning | None
    """The captions encoded; None where a text encoder learns, so that the objective encodes them with gradient."""
    weight: Tensor
    """`[B]` float32: 1 for a plain example, the prior weight for a class picture of DreamBooth."""
    positions: Sequence[Position]
    """B places in the run; the objective draws noise and times from them."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """What one update sees: this process's part of it, and what all parts add up to."""

    micro_batches: Sequence[Batch]
    """This process's share, one forward and backward each; never empty."""
    samples: int
    """How many examples all processes together see."""
    weight: float
    """The sum of their weights over all processes; the update's loss is the weighted mean."""
