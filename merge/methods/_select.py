"""Order statistics of tensors that are too large to hold, exactly: the k-th number, and the k largest.

The bit patterns of floats >= 0 are ordered as the numbers are, so that everything is done with patterns, by two ways.

The short one: some thousands of numbers from all over the tensor are sorted, and say between which two the wanted one
should lie. One pass counts what is smaller, and keeps what lies between: a hundredth of the tensor or so. If the wanted
number is not among them, or they are too many, nothing is lost but the time.

The long one needs no luck. The leading 16 bits of every pattern are counted in one pass, which says how the wanted
number begins; the next pass counts the next 16 bits of the numbers that begin so, until all bits are known: after two
passes for float32, four for float64.

Little tensors are sorted, which is faster than either, and comes to the same.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import floor, inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.methods.base import GRID, Tensors

Chunks = Callable[[], Iterator[tuple[int, list[Tensor]]]]
"""A pass over tensors of equal length: like `Tensors.chunks`, but of numbers >= 0, none of them -0."""
Patterns = NDArray[Any]
"""Bit patterns of numbers >= 0, as signed integers."""

STEPS = {torch.float32: (31, 15, 0), torch.float64: (63, 47, 31, 15, 0)}
"""How many trailing bits of a pattern are unknown before and after each pass; there is no sign."""
PATTERNS = {torch.float32: torch.int32, torch.float64: torch.int64}
UNSIGNED = {np.dtype(np.int32): np.dtype(np.uint32), np.dtype(np.int64): np.dtype(np.uint64)}
SMALL = 1 << 12
"""Tensors of so many numbers are sorted."""
SAMPLED = 64
"""One number of so many is looked at beforehand, at most half of `GRID`."""
APART = 1 << 15
"""Numbers from one place that is looked at to the next, at least; there are `PLACES` of them at most."""
PLACES = 16, 1024
SIGMAS = 3.5
"""How far the sample's rank may be off: a miss costs as much as two passes more, and one in some thousands misses."""
FEW = 4
"""A number that occurs so often in a sample is kept with how often it occurs in a run."""
KEPT = 1 << 20
"""Numbers between the two that are kept at most."""


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
        ties = min(max(0, self.last + 1 - start), values.numel())
        if ties:
            below = torch.nextafter(*torch.tensor([self.threshold, -inf], dtype=values.dtype)).item()
            torch.ops.aten.hardshrink.out(values[:ties], below, out=kept[:ties])  # 0 from -below to below
        if ties < values.numel():
            torch.ops.aten.hardshrink.out(values[ties:], self.threshold, out=kept[ties:])
        return kept


ALL = Largest(-1.0, -1)
NONE = Largest(inf, -1)


@dataclass(frozen=True)
class Numbers:
    """Numbers >= 0, none of them -0, made of the inputs of a method."""

    tensors: Tensors
    of: Callable[[Sequence[Tensor]], list[Tensor]]
    """What is made of a run of the inputs; each number of those at its place alone."""

    def chunks(self, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        """A pass over them, from `start` on: see `Tensors.chunks`."""
        for at, run in self.tensors.chunks(start):
            yield at, self.of(run)

    def look(self, places: Sequence[int], length: int) -> list[Tensor] | None:
        """See `Tensors.look`."""
        seen = self.tensors.look(places, length)
        return None if seen is None else self.of(seen)


def magnitudes(tensors: Tensors) -> Numbers:
    """The absolute values of all inputs."""
    return Numbers(tensors, lambda run: [values.abs() for values in run])


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


def largest(numbers: Numbers, counts: Sequence[Collection[int]]) -> list[dict[int, Largest]]:
    """For each of `numbers` its largest ones, as many as each of its `counts` says."""
    elements = numbers.tensors.elements
    result = [{count: ALL if count >= elements else NONE for count in wanted} for wanted in counts]
    left = [{count for count in wanted if 0 < count < elements} for wanted in counts]
    for index, found in enumerate(_between(numbers, left)):
        result[index] |= found
        left[index] -= found.keys()
    for index, found in enumerate(_counted(numbers, left)):
        result[index] |= found
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


def _counted(numbers: Numbers, counts: Sequence[Collection[int]]) -> list[dict[int, Largest]]:
    """`largest`, the long way."""
    elements = numbers.tensors.elements
    found = places(numbers.chunks, elements, [{elements - count for count in wanted} for wanted in counts])
    result: list[dict[int, Largest]] = [{} for _ in counts]
    partial: dict[tuple[int, int], int] = {}  # how many of the equal ones, where not all of them
    for index, at in enumerate(found):
        for rank, place in at.items():
            ties = place.below + place.equal - rank
            result[index][elements - rank] = Largest(place.value, elements)
            if ties < place.equal:
                partial[index, elements - rank] = ties
    for start, run in numbers.chunks() if partial else ():
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


@dataclass
class _Bracket:
    """Two patterns between which that of some rank should lie, and what a pass finds there."""

    rank: int
    low: int
    high: int
    few: bool
    """Whether few different numbers are expected: they are kept with how often each occurs in a run."""
    below: int = 0
    """How many are smaller than all between."""
    kept: list[Patterns] = field(default_factory=list[Patterns])
    """For each run those between the two, less the lower one."""
    often: list[Patterns] = field(default_factory=list[Patterns])
    """For each run how often, where they are `few`."""
    held: int = 0

    def add(self, patterns: Patterns) -> None:
        """Look at a run."""
        above = patterns - patterns.dtype.type(self.low)
        self.below += int(np.count_nonzero(above < 0))
        inside = above.view(UNSIGNED[above.dtype]) <= UNSIGNED[above.dtype].type(self.high - self.low)
        if self.low == self.high:
            self.kept.append(above[:0] if not (often := np.count_nonzero(inside)) else np.zeros(1, above.dtype))
            self.often.append(np.full(len(self.kept[-1]), often))
        elif self.few:
            kept, often = np.unique(above[np.flatnonzero(inside)], return_counts=True)
            self.kept.append(kept)
            self.often.append(often)
        else:
            self.kept.append(above[np.flatnonzero(inside)])
        self.held += len(self.kept[-1])

    def find(self) -> tuple[int, int, list[int]] | None:
        """The pattern of the rank, how many are smaller, and how many are the same in each run; None: not here."""
        rank = self.rank - self.below
        kept = np.concatenate(self.kept)
        often = np.concatenate(self.often) if self.often else None
        if not 0 <= rank < (len(kept) if often is None else int(often.sum())):
            return None
        if often is None:
            found = np.partition(kept, rank)[rank]
            smaller = int(np.count_nonzero(kept < found))
            same = [int(np.count_nonzero(run == found)) for run in self.kept]
        else:
            order = np.argsort(kept, kind="stable")
            found = kept[order[np.searchsorted(often[order].cumsum(), rank, side="right")]]
            smaller = int(often[kept < found].sum())
            same = [int(count[run == found].sum()) for run, count in zip(self.kept, self.often, strict=True)]
        return self.low + int(found), self.below + smaller, same


def _between(numbers: Numbers, counts: Sequence[Collection[int]]) -> list[dict[int, Largest]]:
    """`largest`, the short way, of as many as it finds."""
    elements = numbers.tensors.elements
    result: list[dict[int, Largest]] = [{} for _ in counts]
    if not any(counts) or elements <= SMALL:
        return result
    pieces = min(max(elements // APART, PLACES[0]), PLACES[1])
    length = max(min(elements // SAMPLED, GRID // 2) // pieces, 1)
    seen = numbers.look(_spread(elements, pieces, length), length)
    if seen is None or seen[0].device.type != "cpu":
        return result
    kind = PATTERNS[seen[0].dtype]
    open_: dict[tuple[int, int], _Bracket] = {}
    for index, (wanted, sample) in enumerate(zip(counts, seen, strict=True)):
        for count in wanted:
            open_[index, count] = _bracket(sample.view(kind).numpy().reshape(pieces, -1), elements, elements - count)
    starts: list[int] = []
    for start, run in numbers.chunks():
        starts.append(start)
        for (index, count), bracket in list(open_.items()):
            bracket.add(run[index].view(kind).numpy())
            if bracket.held > KEPT:
                del open_[index, count]
        if not open_:
            break
    for (index, count), bracket in open_.items():
        found = bracket.find()
        if found is not None:
            pattern, below, same = found
            ties = below + sum(same) - bracket.rank
            last = elements
            if ties < sum(same):
                run = int(np.searchsorted(np.cumsum(same), ties))
                last = _index(numbers, index, starts[run], pattern, ties - sum(same[:run]))
            result[index][count] = Largest(_number(pattern, seen[0].dtype), last)
    return result


def _spread(elements: int, pieces: int, length: int) -> list[int]:
    """Where `pieces` places of `length` numbers begin: one in each part of the tensor, in step with nothing."""
    golden = (5**0.5 - 1) / 2
    part = elements / pieces
    return [int(part * number + (part - length) * (golden * number % 1)) for number in range(pieces)]


def _bracket(sample: Patterns, elements: int, rank: int) -> _Bracket:
    """Two numbers between which that of `rank` lies most likely; `sample` is `[pieces, length]`."""
    pieces, size = len(sample), sample.size
    share = rank / elements
    ranked = np.partition(sample, int(share * size), axis=None)
    middle = ranked[int(share * size)]
    below = np.mean(sample < middle, axis=1) + np.mean(sample == middle, axis=1) / 2
    off = SIGMAS * max(float(below.std()) / pieces**0.5, (share * (1 - share) / size) ** 0.5) + 2 / size
    first, last = max(floor((share - off) * size), -1), min(floor((share + off) * size) + 1, size)
    ranked.partition([max(first, 0), min(last, size - 1)])
    low = int(ranked[first]) if first >= 0 else 0
    high = int(ranked[last]) if last < size else np.iinfo(sample.dtype).max
    inside = np.sort(ranked[max(first, 0) : last + 1])
    different = 1 + int(np.count_nonzero(np.diff(inside)))
    return _Bracket(rank, low, high, few=FEW * different < len(inside))


def _index(numbers: Numbers, input: int, start: int, pattern: int, ties: int) -> int:
    """The index of the number that is the `ties`-th from `start` on to have `pattern`; it is in the first run."""
    _, values = next(numbers.chunks(start))
    patterns = values[input].view(PATTERNS[values[input].dtype]).numpy()
    return start + int(np.flatnonzero(patterns == pattern)[ties - 1])


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
