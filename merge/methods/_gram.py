"""Lengths, angles and distances of tensors that are too large to hold, from one pass over them.

Slerp, the Karcher mean, the geometric median and their kin all give linear combinations of their inputs, whose
coefficients depend on the inputs' inner products alone. Those are summed up here, in float64 and in one order: by
halves, each half added to the other elementwise, and what is left of a run to that of the runs before. So sums are the
same on every machine.

Two fine-tunes of one base differ by an angle of perhaps 1e-4, which cannot be had from a cosine that was rounded: the
arc cosine of 1 - 5e-9 has lost half of its digits. So distances are those of differences, and angles come from the
three sides of a triangle (W. Kahan, "Miscalculating Area and Angles of a Needle-like Triangle", 2014).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.methods.base import Tensors
from merge.scratch import scratch

Array = NDArray[np.float64]
SPLIT = 1 << 14
"""Parts that the sum over a whole tensor is kept in, while it goes on."""


Per = Literal["tensor", "rows", "columns", "last"]
"""What makes up one vector; where a vector would be a single number, all of the tensor is one.

    tensor   all of the tensor
    rows     each entry of the first dimension: what one output of a layer is made of, a filter
    columns  each place of all the other dimensions: what one input of a layer does
    last     what the last dimension runs over: a row of a matrix, but a line of three pixels in a convolution's kernel
"""


@dataclass(frozen=True)
class Vectors:
    """How the numbers of a tensor fall into vectors: as a matrix of rows, whose rows or columns are the vectors."""

    count: int
    """How many vectors."""
    row: int
    """How long a row of the matrix is."""
    columns: bool = False
    """Whether the vectors are the matrix's columns."""

    @classmethod
    def of(cls, shape: tuple[int, ...], per: Per) -> "Vectors":
        """The vectors of a tensor of `shape`."""
        elements = math.prod(shape)
        row = math.prod(shape[-1:] if per == "last" else shape[1:])
        rows = elements // max(row, 1)
        if per == "tensor" or elements == 0 or (rows if per == "columns" else row) == 1:
            return cls(1, max(elements, 1))
        return cls(row, row, columns=True) if per == "columns" else cls(rows, row)

    def which(self, start: int, place: Tensor) -> None:
        """Write into `place`, of int64, the vector that each number from `start` on belongs to."""
        torch.arange(start, start + place.numel(), out=place)
        place.remainder_(self.row) if self.columns else place.floor_divide_(self.row)


@dataclass(frozen=True)
class Gram:
    """Inner products of N inputs, for each of G vectors that they consist of."""

    vectors: Vectors
    inputs: Array
    """`[N, N, G]`: of the inputs."""
    differences: Array
    """`[N, N, G]`: of the inputs less the first one; zero where the first one is involved."""

    @cached_property
    def norms(self) -> Array:
        """Lengths `[N, G]`."""
        return np.sqrt(np.einsum("iig->ig", self.inputs))

    def distance(self, i: int, j: int) -> Array:
        """Between inputs `i` and `j`, `[G]`."""
        inner = self.differences
        return np.sqrt(np.maximum(inner[i, i] - 2 * inner[i, j] + inner[j, j], 0))

    def cosine(self, i: int, j: int) -> Array:
        """Of the angle between inputs `i` and `j`, `[G]`; 0 where one of them is zero."""
        lengths = self.norms[i] * self.norms[j]
        return np.clip(np.divide(self.inputs[i, j], lengths, out=np.zeros_like(lengths), where=lengths > 0), -1, 1)

    def angle(self, i: int, j: int) -> Array:
        """Between inputs `i` and `j`, `[G]`, in [0, pi]; 0 where one of them is zero."""
        a, b, c = self.norms[i], self.norms[j], self.distance(i, j)
        cosine = self.cosine(i, j)
        close = c < np.maximum(a, b) / 2
        squares = np.maximum((c - (a - b)) * (c + (a - b)), 0)
        near = np.divide(squares, 2 * a * b, out=1 - cosine, where=close)  # 1 - cos, with all its digits
        return np.where((a > 0) & (b > 0), 2 * np.arctan2(np.sqrt(near), np.sqrt(1 + cosine)), 0)


def gram(tensors: Tensors, per: Per = "tensor") -> Gram:
    """The inner products of all inputs, in one pass."""
    count = tensors.inputs
    vectors = Vectors.of(tensors.shape, per)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    sums = {(kind, i, j): _Sum(vectors) for kind in range(2) for i, j in pairs if kind == 0 or i > 0}
    for start, run in tensors.chunks():
        with scratch(run[0], count + 1, torch.float64) as (products, *values):
            for value, tensor in zip(values, run, strict=True):
                value.copy_(tensor)
            for (kind, i, j), total in sums.items():
                if (kind, i, j) == (1, 1, 1):  # the inputs are done with
                    for value in values[1:]:
                        value.sub_(values[0])
                total.add(start, torch.mul(values[i], values[j], out=products))
    inner = np.zeros((2, count, count, vectors.count))
    for (kind, i, j), total in sums.items():
        inner[kind, i, j] = inner[kind, j, i] = total.value()
    return Gram(vectors, inner[0], inner[1])


class _Sum:
    """The sum over each vector, of numbers that come run by run."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self._sums: Tensor | None = None
        """One for each vector; of a single one, of parts of it."""

    def add(self, start: int, products: Tensor) -> None:
        """Count in `products`, numbers from `start` on, which are overwritten."""
        if self._sums is None:
            size = self.vectors.count if self.vectors.count > 1 else min(SPLIT, products.numel())
            self._sums = torch.zeros(size, dtype=torch.float64, device=products.device)
        if self.vectors.count == 1:
            left = _by_halves(products, SPLIT)
            self._sums[: left.numel()] += left
            return
        for row, column, block in _rows(start, products, self.vectors.row):
            if self.vectors.columns:
                self._sums[column : column + block.shape[1]] += _by_halves(block)[0]
            else:
                self._sums[row : row + block.shape[0]] += _by_halves(block.T)[0]

    def value(self) -> Array:
        """`[G]`."""
        if self._sums is None:
            return np.zeros(self.vectors.count)
        if self.vectors.count == 1:
            return np.array([_by_halves(self._sums).item()])
        return self._sums.cpu().numpy()


def _rows(start: int, run: Tensor, length: int) -> Iterator[tuple[int, int, Tensor]]:
    """A run of a matrix with rows of `length`, as blocks: whole rows, or a part of one; where each begins."""
    at = 0
    while at < run.numel():
        row, column = divmod(start + at, length)
        rows = (run.numel() - at) // length if column == 0 else 0
        stop = at + rows * length if rows else min(run.numel(), at + length - column)
        yield row, column, run[at:stop].view(max(rows, 1), -1)
        at = stop


def _by_halves(terms: Tensor, left: int = 1) -> Tensor:
    """Add up over the first dimension until `left` are left of it, or fewer; overwrites `terms`.

    The order depends on its length alone.
    """
    count = terms.shape[0]
    while count > left:
        half = (count + 1) // 2
        terms[: count - half] += terms[half:count]
        count = half
    return terms[:count]
