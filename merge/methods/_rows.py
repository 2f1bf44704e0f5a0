"""Tensors by rows: what one output of a layer is made of, which is all dimensions but the first."""

from collections.abc import Iterator
from itertools import chain
from math import prod

from torch import Tensor

from merge.methods.base import GRID, Extent, Tensors
from merge.scratch import scratch

PIECE = 1 << 15
"""Numbers in rows that are looked at together, if a row has no more: what is done with them takes a hundred bytes for
each."""


def width(shape: tuple[int, ...]) -> int:
    """Numbers in a row of a tensor of `shape`; a vector, and what else would have rows of one number, is one row."""
    wide = prod(shape[1:])
    return wide if wide > 1 else prod(shape)


def by_rows(of: Extent) -> tuple[int, int]:
    """Bytes that `rows` is lent: a run and what was left over before; and how many numbers it gives at once."""
    wide = min(width(of.shape), of.elements)
    return of.inputs * of.size * min(of.run + wide, of.elements), min(max(PIECE, wide), of.elements)


def rows(tensors: Tensors) -> Iterator[tuple[int, list[Tensor]]]:
    """All inputs, some whole rows at a time: the index of the first row, and `[rows, width]` of each input.

    They are `PIECE` numbers of each input at most, or one row; the next rows overwrite them.
    """
    wide = width(tensors.shape)
    runs = (run for _, run in tensors.chunks())
    first = next(runs, None)
    if first is None:
        return
    with scratch(first[0], tensors.inputs, length=min(GRID + wide, tensors.elements)) as joined:
        row = held = 0
        for run in chain([first], runs):
            for values, into in zip(run, joined, strict=True):
                into[held : held + values.numel()] = values
            held += run[0].numel()
            count = held // wide
            for at in range(0, count, some := max(PIECE // wide, 1)):
                stop = min(at + some, count)
                yield row + at, [values[at * wide : stop * wide].view(-1, wide) for values in joined]
            row, left = row + count, held - count * wide
            if count and left:
                for values in joined:
                    values[:left] = values[count * wide : held]
            held = left
