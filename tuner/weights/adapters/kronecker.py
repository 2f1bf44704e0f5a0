"""LoKr (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): ΔW = scale · w₁ ⊗ w₂, where either may be a product itself."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Difference, Parts, Product, Slot

Factor = Tensor | Product


@dataclass(frozen=True)
class Kronecker(Difference):
    """scale · first ⊗ second, where a convolution's kernel is in the second factor's columns."""

    first: Factor
    """`[a, c]`"""
    second: Factor
    """`[b, d]` or `[b, d, k, k]`"""
    scale: float
    slot: Slot = "weight"

    flattened = True

    @staticmethod
    def read(parts: Parts) -> "Kronecker":
        """From `w1` or `w1_a` and `w1_b`, and from `w2` or `w2_a` and `w2_b`, with a core `t2` perhaps.

        LyCORIS scales by alpha / rank only where a factor is a product. peft does always, by the rank of its config.
        """
        first, second = _factor(parts, "1"), _factor(parts, "2")
        ranks = [parts[f"w{number}_b"].shape[0] for number in "12" if f"w{number}_b" in parts.tensors]
        if ranks:
            return Kronecker(first, second, parts.scale(ranks[-1]))
        if parts.settings is None:
            return Kronecker(first, second, 1.0)
        rank = parts.settings.get("r")
        if type(rank) is not int or rank < 1:
            raise DataError("adapter_config.json: r: missing, expected the rank that alpha is divided by")
        return Kronecker(first, second, parts.scale(rank))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, or the matrix' where the kernel is in the second factor's columns."""
        (a, c, *_), (b, d, *kernel) = self.first.shape, self.second.shape
        return (a * b, c * d, *kernel)

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor]:
        return _matrix(self.first, torch.float32), _matrix(self.second, torch.float32)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of what is added, float32."""
        first, second = self._single
        index = torch.arange(start, stop)
        rows = first[index // len(second)][:, :, None] * second[index % len(second)][:, None, :]
        return rows.reshape(stop - start, self.columns).mul_(self.scale)

    def dense(self) -> Tensor:
        """All that is added, float64."""
        return self.scale * torch.kron(_matrix(self.first, torch.float64), _matrix(self.second, torch.float64))


def _factor(parts: Parts, number: str) -> Factor:
    whole, core = parts.get(f"w{number}"), parts.get(f"t{number}")
    if whole is not None:
        if whole.ndim not in (2, 4) or (number == "1" and whole.ndim != 2):
            raise DataError(f"w{number}: of shape {list(whole.shape)}, expected a matrix")
        return whole
    left, right = parts[f"w{number}_a"], parts[f"w{number}_b"]
    return Product(left, right) if core is None else Product(left.T, right, core)


def _matrix(factor: Factor, dtype: torch.dtype) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.to(dtype).flatten(1)
    left, right = factor.double()
    return (left @ right).to(dtype)
