"""GLoRA (Chavan et al. 2023, arXiv:2306.07967), as LyCORIS keeps it: W' = W + scale · (W A + B), both of low rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Parts, Product, Slot, Transform, trimmed


@dataclass(frozen=True)
class Generalized(Transform):
    """W + scale · (W inside + added)."""

    inside: Product
    """A, `[in, in]`."""
    added: Product
    """B, of the weight's shape."""
    scale: float
    slot: Slot = "weight"

    @staticmethod
    def read(parts: Parts) -> "Generalized":
        """From `a1` `[in, rank]`, `a2` `[rank, in]`, `b1` `[out, rank]`, `b2` `[rank, in(, k, k)]`, perhaps with `bm`.

        Files of LyCORIS before 2.0 have them the other way round: A = a2 a1 and B = b2 b1.
        """
        a1, a2 = parts["a1"].flatten(1), parts["a2"].flatten(1)
        b1, b2, core = parts["b1"], parts["b2"], parts.get("bm")
        new = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
        old = a1.shape[0] == a2.shape[1] == b1.shape[0] == b2.shape[1]
        if new and old and a1.shape[0] == a1.shape[1]:
            raise DataError("its rank is that of the weight, so that two versions' files look alike; it is not read")
        if not new and not old:
            raise DataError(f"factors of {[list(part.shape) for part in (a1, a2, b1, b2)]} are not of one rank")
        if old and (not new or a1.shape[0] < a1.shape[1]):
            a1, a2, b1, b2 = a2, a1, b2, b1
        inside, added = Product(a1, a2), Product(b1.flatten(1), b2 if core is None else b2.flatten(1), core)
        return Generalized(inside, added, parts.scale(inside.rank))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.added.shape

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether both parts fit a weight of `shape`."""
        return len(shape) > 1 and trimmed(shape) == trimmed(self.shape) and shape[1] == self.inside.shape[0]

    def effect(self, weight: Tensor) -> Tensor:
        """W' in the weight's dtype; computed in float64."""
        left, right = self.inside.double()
        own = torch.einsum("oi...,ir,rj->oj...", weight.double(), left, right)
        first, last = self.added.double()
        return (weight.double() + self.scale * (own + (first @ last).reshape(weight.shape))).to(weight.dtype)
