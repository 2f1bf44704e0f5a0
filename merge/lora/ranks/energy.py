"""As many directions as hold a share of each layer's change."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from merge.lora.ranks.base import Layer, RankRule


@dataclass(frozen=True, kw_only=True)
class Energy:
    """The fewest whose squared singular values sum up to `share` of all; the error is then at most √(1 - share).

    A share of the Frobenius norm, such as sd-scripts' `sv_fro`, is the square root of this: its 0.9 is 0.81 here.
    """

    share: float = 0.9
    """From 0 to 1."""
    most: int = 128
    """Directions of a layer at most, whatever they hold."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: {self.share:g} is not between 0 and 1")
        if self.most < 1:
            raise ValueError("most: at least 1")

    def choose(self, layers: Mapping[str, Layer], spent: int = 0) -> Mapping[str, int]:
        """The number of each layer."""
        return {name: self._rank(layer) for name, layer in layers.items()}

    def _rank(self, layer: Layer) -> int:
        held = layer.values.square().cumsum(0)
        total = layer.rest + (held[-1].item() if held.numel() else 0.0)
        enough = int(torch.searchsorted(held, self.share * total * (1 - 1e-12))) + 1
        return min(enough, layer.known, self.most)


SPEC: type[RankRule] = Energy
