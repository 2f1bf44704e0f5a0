"""Order statistics of tensors that are too large to hold, exactly: the k-th number, and the k largest.

The bit patterns of floats >= 0 are ordered as the numbers are. So the leading 16 bits of every pattern are counted in
one pass, which says how the wanted number begins; the next pass counts the next 16 bits of the numbers that begin so,
until all bits are known: after two passes for float32, four for float64. Nothing is sorted, and only counts are held.
Little tensors are sorted, which is faster than going through the counts, and comes to the same.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, inf

import numpy as np
import torch
from torch import Tensor

from merge.methods.base import Tensors

Chunks = Callable[[], Iterator[tuple[int, list[Tensor]]]]
"""A pass over tensors of equal length: like `Tensors.chunks`, but of numbers >= 0, none of them -0."""

STEPS = {torch.float32: (31, 15, 0), torch.float64: (63, 47, 31, 15, 0)}
"""How many trailing bits of a pattern are unknown before and after each pass; there is no sign."""
PATTERNS = {torch.float32: torch.int32, torch.float64: torch.int64}
SMALL = 1 << 12
"""Tensors of so many numbers are sorted."""


@dataclass(frozen=True)
class Place:
    """The number at some rank."""

    value: float
    below: int
    """How many numbers are smaller."""
    equal: int
    """How many are the same, itself included."""


@dataclass(frozen=True)
class Largest:
    """The largest numbers of a tensor, so many of them; of equal ones those that come first."""

    threshold: float
    """Greater ones are among them, smaller ones are not."""
    last: int
    """Equal ones are among them up to this index."""

    def mask(self, values: Tensor, start: int) -> Tensor:
        """Which of `values`, the numbers from index `start` on, are among them."""
        mask = torch.empty_like(values, dtype=torch.bool)
        ties = max(0, self.last + 1 - start)
        torch.ge(values[:ties], self.threshold, out=mask[:ties])
        torch.gt(values[ties:], self.threshold, out=mask[ties:])
        return mask

    def keep(self, values: Tensor, start: int) -> Tensor:
        """`values`, the numbers from index `start` on, with 0 for those whose magnitudes are not among them."""
        kept = torch.empty_like(values)
        ties = max(0, self.last + 1 - start)
        below = torch.nextafter(*torch.tensor([self.threshold, -inf], dtype=values.dtype)).item()
        for part, bound in ((slice(None, ties), below), (slice(ties, None), self.threshold)):
            torch.ops.aten.hardshrink.out(values[part], bound, out=kept[part])  # 0 from -bound to bound
        return kept


ALL = Largest(-1.0, -1)
NONE = Largest(inf, -1)


def magnitudes(tensors: Tensors) -> Chunks:
    """Passes over the absolute values of all inputs."""

    def chunks() -> Iterator[tuple[int, list[Tensor]]]:
        for start, run in tensors.chunks():
            yield start, [values.abs() for values in run]

    return chunks


def places(chunks: Chunks, elements: int, ranks: Sequence[Collection[int]]) -> list[dict[int, Place]]:
    """For each tensor of `elements` numbers those at its `ranks`: 0 is the smallest's."""
    if not any(ranks):
        return [{} for _ in ranks]
    _, run = next(chunks())
    if run[0].numel() == elements <= SMALL:
        return [_sorted(values, wanted) for values, wanted in zip(run, ranks, strict=True)]
    sample = run[0]
    kind = PATTERNS[sample.dtype]
    known: list[dict[int, tuple[int, int, int]]] = [dict.fromkeys(wanted, (0, 0, 0)) for wanted in ranks]
    for level, (before, after) in enumerate(pairwise(STEPS[sample.dtype])):
        size = 1 << (before - after)
        zeros = torch.zeros(size, dtype=torch.int64, device=sample.device)
        counts = [{head: zeros.clone() for head, _, _ in found.values()} for found in known]
        for _, run in chunks():
            for values, tables in zip(run, counts, strict=True):
                patterns = values.view(kind)
                for head, table in tables.items():
                    inside = patterns if level == 0 else _beginning(patterns, before, head)
                    table += torch.bincount((inside >> after) & (size - 1), minlength=size)
        for found, tables in zip(known, counts, strict=True):
            upto = {head: table.cumsum(0) for head, table in tables.items()}
            for rank, (head, below, _) in found.items():
                digit = int(torch.searchsorted(upto[head], rank - below, right=True))
                equal = int(tables[head][digit])
                found[rank] = ((head << (before - after)) | digit, below + int(upto[head][digit]) - equal, equal)
    return [
        {rank: Place(_number(head, sample.dtype), below, equal) for rank, (head, below, equal) in found.items()}
        for found in known
    ]


def largest(chunks: Chunks, elements: int, counts: Sequence[Collection[int]]) -> list[dict[int, Largest]]:
    """For each tensor of `elements` numbers its largest ones, as many as each of its `counts` says."""
    ranks = [{elements - count for count in wanted if 0 < count < elements} for wanted in counts]
    found = places(chunks, elements, ranks)
    result = [{count: ALL if count >= elements else NONE for count in wanted} for wanted in counts]
    partial: dict[tuple[int, int], int] = {}  # how many of the equal ones, where not all of them
    for index, at in enumerate(found):
        for rank, place in at.items():
            ties = place.below + place.equal - rank
            result[index][elements - rank] = Largest(place.value, elements)
            if ties < place.equal:
                partial[index, elements - rank] = ties
    for start, run in chunks() if partial else ():
        for (index, count), ties in list(partial.items()):
            same = np.flatnonzero(run[index].cpu().numpy() == result[index][count].threshold)
            if len(same) < ties:
                partial[index, count] -= len(same)
            else:
                result[index][count] = Largest(result[index][count].threshold, start + int(same[ties - 1]))
                del partial[index, count]
        if not partial:
            break
    return result


def quantiles(chunks: Chunks, elements: int, fractions: Sequence[float]) -> list[float]:
    """The numbers below which these fractions of a tensor lie, interpolated between neighbours as `torch.quantile`."""
    positions = [fraction * (elements - 1) for fraction in fractions]
    lower = [floor(position) for position in positions]
    found = places(chunks, elements, [{rank for low in lower for rank in (low, min(low + 1, elements - 1))}])[0]
    return [
        found[low].value + (position - low) * (found[min(low + 1, elements - 1)].value - found[low].value)
        for position, low in zip(positions, lower, strict=True)
    ]


def _beginning(patterns: Tensor, bits: int, head: int) -> Tensor:
    """Those of `patterns` that are `head` without their last `bits` bits."""
    if patterns.device.type == "cpu":  # numpy picks out a few of many several times as fast
        numbers = patterns.numpy()
        return torch.from_numpy(numbers[numbers >> bits == head])
    return patterns[patterns >> bits == head]


def _sorted(values: Tensor, ranks: Collection[int]) -> dict[int, Place]:
    """`places`, of a tensor that is held."""
    ordered = values.sort().values
    found: dict[int, Place] = {}
    for rank in ranks:
        below = int(torch.searchsorted(ordered, ordered[rank]))
        equal = int(torch.searchsorted(ordered, ordered[rank], right=True)) - below
        found[rank] = Place(ordered[rank].item(), below, equal)
    return found


def _number(pattern: int, dtype: torch.dtype) -> float:
    return torch.tensor(pattern, dtype=PATTERNS[dtype]).view(dtype).item()
