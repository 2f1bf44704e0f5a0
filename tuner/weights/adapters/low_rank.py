"""LoRA (Hu et al. 2021, arXiv:2106.09685): ΔW = scale · up · down, with scale = alpha / rank.

For convolutions in LyCORIS' form: `down` has the kernel and `up` is of kernel 1 (LoCon), or a third convolution in
between has the kernel (`mid`, a Tucker decomposition).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Difference, Parts, Product, Slot


@dataclass(frozen=True)
class LowRank(Difference):
    """scale · up · down."""

    product: Product
    scale: float
    slot: Slot = "weight"

    @staticmethod
    def read(parts: Parts) -> "LowRank":
        """From `up` `[out, rank(, 1, 1)]`, `down` `[rank, in(, k, k)]` and perhaps `mid` `[rank, rank, k, k]`."""
        up, down, mid = parts["up"], parts["down"], parts.get("mid")
        if up.ndim not in (2, 4) or down.ndim != up.ndim or any(size != 1 for size in up.shape[2:]):
            raise DataError(f"up {list(up.shape)} and down {list(down.shape)} are not of one rank")
        if mid is not None:
            if any(size != 1 for size in down.shape[2:]):
                raise DataError(f"down {list(down.shape)} and mid {list(mid.shape)} both have a kernel")
            down = down.flatten(1)
        product = Product(up.flatten(1), down, mid)
        return LowRank(product, parts.scale(product.rank))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.product.shape

    @property
    def rank(self) -> int:
        """How many directions are changed."""
        return self.product.rank

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of what is added, float32."""
        left, right = self.product.single
        return (left[start:stop] @ right).mul_(self.scale)

    def dense(self) -> Tensor:
        """All that is added, float64."""
        left, right = self.factors()
        return left @ right

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices in float64 whose product is what is added; the scale is in the left one."""
        left, right = self.product.double()
        return self.scale * left, right

    def to(self, dtype: torch.dtype) -> "LowRank":
        """With factors in `dtype`."""
        old = self.product
        core = None if old.core is None else old.core.to(dtype)
        return LowRank(Product(old.left.to(dtype), old.right.to(dtype), core), self.scale, self.slot)
