"""The same number of directions for every layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from merge.lora.ranks.base import Layer, RankRule


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """As many as there are, where there are fewer."""

    rank: int
    """Directions of linear layers and of convolutions of kernel 1."""
    conv_rank: int | None = None
    """Directions of other convolutions, `rank` where left out; 0 leaves them out."""

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.conv_rank or 0) < 0:
            raise ValueError("ranks count from 0")
        if not self.rank and not self.conv_rank:
            raise ValueError("nothing is kept; choose a rank")

    @property
    def most(self) -> int:
        """The larger of the two."""
        return max(self.rank, self.conv_rank or 0)

    def choose(self, layers: Mapping[str, Layer], spent: int = 0) -> Mapping[str, int]:
        """The rank of its kind for each layer."""
        conv = self.rank if self.conv_rank is None else self.conv_rank
        return {name: min(layer.known, conv if layer.kernel else self.rank) for name, layer in layers.items()}


SPEC: type[RankRule] = Fixed
