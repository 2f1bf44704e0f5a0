"""As many directions as are not much smaller than a layer's largest."""

from collections.abc import Mapping
from dataclasses import dataclass

from merge.lora.ranks.base import Layer, RankRule


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Those whose singular value is at least the largest divided by `ratio`."""

    ratio: float
    """1 keeps the largest alone; sd-scripts' `sv_ratio`."""
    most: int = 128
    """Directions of a layer at most."""

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise ValueError(f"ratio: {self.ratio:g} is less than 1")
        if self.most < 1:
            raise ValueError("most: at least 1")

    def choose(self, layers: Mapping[str, Layer], spent: int = 0) -> Mapping[str, int]:
        """The number of each layer."""
        counts = {name: int((layer.values * self.ratio >= layer.values[:1]).sum()) for name, layer in layers.items()}
        return {name: min(counts[name], layer.known, self.most) for name, layer in layers.items()}


SPEC: type[RankRule] = Ratio
