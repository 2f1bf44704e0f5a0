"""A rule that says how many directions of each layer a LoRA keeps, from the layers' singular values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

from torch import Tensor

from tuner.plugins import Folder


@dataclass(frozen=True)
class Layer:
    """What is known of the change of one layer."""

    values: Tensor
    """Its largest singular values, descending; float64."""
    rest: float
    """The sum of the squares of all the others."""
    kernel: bool
    """Whether it is a convolution with a kernel larger than 1."""
    bytes_per_rank: int
    """What a direction takes up in the file."""
    bytes_once: int
    """What the layer takes up beside, when it is there at all."""

    @property
    def known(self) -> int:
        """How many directions there are to choose from; those without any size are not counted."""
        return int((self.values > self.values[:1] * 1e-12).sum()) if self.values.numel() else 0


class RankRule(Protocol):
    """How many directions are kept."""

    @property
    def most(self) -> int:
        """How many singular values of a layer it looks at, at most."""
        ...

    def choose(self, layers: Mapping[str, Layer], spent: int = 0) -> Mapping[str, int]:
        """The number for each layer, from 0 to `known`; `spent` bytes of the file are for other things than layers."""
        ...


AnyRankRule = Annotated[RankRule, Folder("merge.lora.ranks")]
Ranks = int | AnyRankRule
"""In a config: one number for all layers, or a rule."""
