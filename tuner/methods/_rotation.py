"""Layers whose outputs are turned by learned rotations, as LyCORIS keeps them in files.

peft turns inputs, which other programs cannot read; its convolutions add up the overlaps of what it turns, and without
a compiler for CUDA it leaves out all butterflies but one. So these layers are the project's own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tuner.errors import ConfigError
from tuner.methods._adapter import Adapter, Size, outputs, still
from tuner.weights.adapters.base import Parts
from tuner.weights.adapters.rotation import Butterfly, Rotation

UNBOUND = 1000.0
"""What files say as alpha, the bound of what a rotation may be: one that is never reached. By 0 LyCORIS and ComfyUI
set none, and versions of A1111 turn nothing."""


class Turned(nn.Module):
    """y = s ∘ R (W x) + b, where R is orthogonal and made of small blocks; it begins as W x + b, to the bit.

    A block is (I + Q)(I - Q)⁻¹ with Q = `oft_blocks` - `oft_blocks`ᵀ. With blocks `[number, size, size]` R is their
    transpose on a diagonal (OFT). With `[layers, number, size, size]` it is a product of such diagonals, each of blocks
    whose outputs lie twice as far apart as those of the one before (BOFT).
    """

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, shape: Sequence[int], rescale: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        learned = {"oft_blocks": torch.zeros(*shape, device=weight.device)}
        if rescale:
            ones = (1,) * (weight.ndim - 1)
            learned["rescale"] = torch.ones(outputs(base_layer), *ones, device=weight.device)
        self.default = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in learned.items()})
        """What learns; behind the base layer, since networks take the dtype of what comes first for their own."""
        orders: Tensor | None = None
        if len(shape) == 4:
            butterfly = Butterfly(learned["oft_blocks"])
            orders = torch.stack([butterfly.order(layer) for layer in range(shape[0])]).to(weight.device)
        self.orders: Tensor | None
        """`[layers, out]`: which outputs a layer's blocks take, in turn."""
        self.places: Tensor | None
        """`[layers, out]`: the inverse of each."""
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("places", None if orders is None else orders.argsort(1), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base layer's, which networks ask for to see its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        last = y if isinstance(self.base_layer, nn.Linear) else y.movedim(1, -1)
        bias = self.base_layer.bias
        own = (last if bias is None else last - bias).float()
        moved = self._turned(own)
        scaled = moved * self.default["rescale"].flatten() if "rescale" in self.default else moved
        added = (scaled - own).to(y.dtype)
        return y + (added if isinstance(self.base_layer, nn.Linear) else added.movedim(-1, 1))

    def _turned(self, y: Tensor) -> Tensor:
        """R times each of `y`, `[…, out]`; as itself and what is added, so that no rotation changes no bit."""
        blocks = self.default["oft_blocks"]
        skew = blocks - blocks.transpose(-1, -2)
        identity = torch.eye(skew.shape[-1], device=skew.device)
        added = 2 * torch.linalg.solve(identity - skew, skew)  # (I + Q)(I - Q)⁻¹ - I
        number, size = skew.shape[-3:-1]
        if self.orders is None or self.places is None:
            parts = y.unflatten(-1, (number, size))
            return y + torch.einsum("...ni,nij->...nj", parts, added).flatten(-2)
        for layer, order, places in zip(added, self.orders, self.places, strict=True):
            parts = y[..., order].unflatten(-1, (number, size))
            y = y + torch.einsum("...nj,nij->...ni", parts, layer).flatten(-2)[..., places]
        return y


@dataclass(frozen=True, kw_only=True)
class Turning(Adapter):
    """Options of an adapter that turns outputs."""

    choosing: ClassVar[tuple[str, ...]] = ("targets", "block_sizes")

    block_size: int = 32
    """How many outputs of a layer are turned together; where that does not divide their number, the largest below it
    that does. OFT's blocks are also not larger than there are blocks."""
    block_sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Block sizes of layers by regular expression; the last that is found counts, 0 leaves the layer out."""
    conv: bool = False
    """Whether convolutions larger than 1x1 learn too; else only if a pattern of `targets` or `block_sizes` is found in
    them."""
    rescale: bool = False
    """Whether each output has a learned factor as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        if any(size < 0 or size == 1 for size in self.block_sizes.values()):
            raise ValueError("block_sizes must be 0 (left out), or 2 or more")

    @property
    def convolutions(self) -> str | None:
        return "conv" if self.conv else None

    def patterns(self) -> dict[str, Sequence[str]]:
        return {"block_sizes": list(self.block_sizes), **super().patterns()}

    def size(self, name: str, layer: nn.Module, wanted: bool) -> Size | None:
        most = self.block_size
        for pattern, own in self.block_sizes.items():
            if re.search(pattern, name):
                wanted, most = own > 0, own
        if not wanted:
            return None
        count = outputs(layer)
        size = next((size for size in range(min(most, count), 1, -1) if self.divides(count, size)), None)
        if size is None:
            raise ConfigError(
                f"method.block_size: the {count} outputs of {name} make no blocks of 2 to {most}; leave it out "
                "(0 in block_sizes), or raise its block size"
            )
        return Size(size)

    def divides(self, outputs: int, size: int) -> bool:
        """Whether so many outputs can be turned in blocks of `size`."""
        return outputs % size == 0

    def shape(self, outputs: int, size: int) -> tuple[int, ...]:
        """Of the learned blocks of a layer."""
        return (outputs // size, size, size)

    def insert(self, network: nn.Module, sizes: Mapping[str, Size]) -> None:
        for name, size in sizes.items():
            base: Any = network.get_submodule(name)
            network.set_submodule(name, Turned(base, self.shape(outputs(base), size.rank), self.rescale))

    def change(self, layer: Turned) -> Rotation | Butterfly:
        parts = {name.removeprefix("oft_"): still(p) for name, p in layer.default.items()}
        return Rotation.read(Parts(parts, alpha=UNBOUND))
