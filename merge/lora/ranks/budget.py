"""As many directions as a file of a given size has room for, where they matter most."""

from collections.abc import Mapping
from dataclasses import dataclass

from merge.lora.ranks.base import Layer, RankRule


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The directions of all layers, best first, by how much of the change they hold for each byte that they take up.

    For layers of one size those are the largest singular values of all, as water finds its level. A layer of which
    nothing is kept is left out of the file.
    """

    megabytes: float
    """The size of the whole file at most, in millions of bytes."""
    most: int = 128
    """Directions of a layer at most; many more cost time, and are seldom chosen."""

    def __post_init__(self) -> None:
        if not self.megabytes > 0:
            raise ValueError(f"megabytes: {self.megabytes:g} is not more than 0")
        if self.most < 1:
            raise ValueError("most: at least 1")

    def choose(self, layers: Mapping[str, Layer], spent: int = 0) -> Mapping[str, int]:
        """The number of each layer."""
        offers = [
            (-(value**2) / layer.bytes_per_rank, name, index)
            for name, layer in layers.items()
            for index, value in enumerate(layer.values[: min(layer.known, self.most)].tolist())
        ]
        ranks = dict.fromkeys(layers, 0)
        left = self.megabytes * 1e6 - spent
        for _, name, index in sorted(offers):
            layer = layers[name]
            cost = layer.bytes_per_rank + (layer.bytes_once if index == 0 else 0)
            if index == ranks[name] and cost <= left:  # in order: a layer that had no room for one gets none after it
                ranks[name] += 1
                left -= cost
        return ranks


SPEC: type[RankRule] = Budget
