"""What an adapter does to one tensor: it adds something to it, or makes something else of it.

A tensor `[out, in, …]` is looked at as a matrix `[out, in · …]`: a convolution's kernel is part of its columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tuner.errors import DataError

Slot = Literal["weight", "bias"]
"""Which tensor of a module is changed."""

BLOCK = 1 << 16
"""Numbers in a block of rows, about."""


class Change(ABC):
    """What is done to one tensor."""

    slot: Slot = "weight"
    flattened: ClassVar[bool] = False
    """Whether `shape` is that of the matrix, with a convolution's kernel in its columns."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the tensors that it can be done to, see `fits`."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it can be done to a tensor of `shape`.

        Ones at the end do not count: a linear layer and a convolution of kernel 1 have the same weights.
        """
        if self.flattened:
            return len(shape) > 1 and shape[0] == self.shape[0] and prod(shape[1:]) == prod(self.shape[1:])
        return trimmed(shape) == trimmed(self.shape)


class Difference(Change):
    """Something that is added, whatever the weight is: a matrix that need not be formed at once."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows from `start` to `stop` of what is added, float32, `[stop - start, columns]`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All that is added, float64, as a matrix `[out, columns]`."""

    @property
    def columns(self) -> int:
        """How long a row is."""
        return prod(self.shape[1:])

    @property
    def block(self) -> int:
        """How many rows are computed together.

        A product's last digits may depend on the sizes of its factors. Rows that are always computed in the same
        blocks, from multiples of `block` on, always have the same bits.
        """
        return max(1, BLOCK // self.columns)


class Transform(Change):
    """Something that depends on the weight: W' = f(W)."""

    optional: bool = False
    """Whether it is left out where the network has no such tensor: not every layer has a bias."""

    @abstractmethod
    def effect(self, weight: Tensor) -> Tensor:
        """W' for a weight of a shape that fits, in the weight's dtype, which is float32 or float64."""


@dataclass(frozen=True)
class Product:
    """left · right, or left · core · right, which holds its factors as they were given.

    Raises:
        DataError: the factors do not fit together.
    """

    left: Tensor
    """`[out, rank]`"""
    right: Tensor
    """`[rank, in]` or, for a convolution, `[rank, in, k, k]`; with a core, `[rank, in]`."""
    core: Tensor | None = None
    """`[rank, rank, k, k]`, of a Tucker decomposition: Σ_pq left_op core_pqkl right_qi."""

    def __post_init__(self) -> None:
        inner = self.right.shape[0]
        fits = self.left.ndim == 2 and self.right.ndim in (2, 4)
        if self.core is not None:
            fits = fits and self.core.ndim == 4 and self.right.ndim == 2 and self.core.shape[1] == inner
            inner = self.core.shape[0]
        if not fits or self.left.shape[1] != inner or 0 in (*self.left.shape, *self.right.shape):
            shapes = [list(part.shape) for part in (self.left, self.core, self.right) if part is not None]
            raise DataError(f"factors of shapes {' and '.join(map(str, shapes))} are not of one rank")

    @property
    def rank(self) -> int:
        """How many directions the product has at most."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product."""
        kernel = self.right.shape[2:] if self.core is None else self.core.shape[2:]
        return (self.left.shape[0], self.right.shape[1], *kernel)

    @cached_property
    def single(self) -> tuple[Tensor, Tensor]:
        """The two matrices that are multiplied, in float32."""
        return self._matrices(torch.float32)

    def double(self) -> tuple[Tensor, Tensor]:
        """The two matrices that are multiplied, in float64."""
        return self._matrices(torch.float64)

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right = self.left.to(dtype), self.right.to(dtype)
        if self.core is not None:
            right = torch.einsum("pqkl,qi->pikl", self.core.to(dtype), right)
        return left, right.flatten(1)


def trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` without the ones at its end, but for its first two sizes."""
    sizes = list(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


@dataclass(frozen=True)
class Parts:
    """The tensors that a file has for one module, by what they are, and how their product is to be scaled."""

    tensors: Mapping[str, Tensor]
    alpha: float | None
    """None: the file does not say any."""
    settings: Mapping[str, object] | None = None
    """What peft's config says of the adapter; None when there is no config."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor that is `name`; None when there is none."""
        return self.tensors.get(name)

    def scale(self, rank: int) -> float:
        """What a product of `rank` is multiplied by: alpha / rank, or 1 when no alpha is said."""
        if self.alpha is None:
            return 1.0
        if self.settings is not None and self.settings.get("use_rslora") is True:
            return self.alpha / rank**0.5
        return self.alpha / rank
