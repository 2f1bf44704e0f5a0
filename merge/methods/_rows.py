"""Tensors by rows: what one output of a layer is made of, which is all dimensions but the first."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from merge.methods.base import Extent, Tensors


def width(shape: tuple[int, ...]) -> int:
    """Numbers in a row of a tensor of `shape`; a vector, and what else would have rows of one number, is one row."""
    wide = prod(shape[1:])
    return wide if wide > 1 else prod(shape)


def by_rows(of: Extent) -> int:
    """Bytes that `rows` takes: pieces of runs, what they are joined to, and what is left over of that."""
    return of.inputs * of.size * (2 * of.run + min(width(of.shape), of.elements))


def rows(tensors: Tensors) -> Iterator[tuple[int, list[Tensor]]]:
    """All inputs, some whole rows at a time: the index of the first row, and `[rows, width]` of each input.

    About `GRID` numbers of each input are held, or one row if that is more.
    """
    wide = width(tensors.shape)
    pieces: list[list[Tensor]] = [[] for _ in range(tensors.inputs)]
    row = held = 0
    for _, run in tensors.chunks():
        for kept, values in zip(pieces, run, strict=True):
            kept.append(values.clone())
        held += run[0].numel()
        count = held // wide
        if count:
            joined = [torch.cat(kept) for kept in pieces]
            yield row, [values[: count * wide].view(count, wide) for values in joined]
            pieces = [[values[count * wide :].clone()] for values in joined]
            row, held = row + count, held - count * wide
