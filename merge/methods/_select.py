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

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.allocator import private
from merge.methods.base import GRID, Extent, Memory, Tensors
from merge.scratch import scratch

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
APART = 1 << 16
"""Numbers from one place that is looked at to the next, at least; there are `PLACES` of them at most."""
PLACES = 16, 1024
SIGMAS = 3.5
"""How far the sample's rank may be off: a miss costs as much as two passes more, and one in some thousands misses."""
FEW = 4
"""A number that occurs so often in a sample is kept with how often it occurs in a run."""
WIDEST = 2.0
"""How far beside what the sample's size explains: how much memory is taken then depends little on the numbers."""
KEPT = 1 << 20
"""Numbers between the two that are kept at most."""
ROOM = 1.25
"""How many there is room for, beside as many as the sample says."""
SHORT = 1 << 15
"""Numbers in a run at least: where few are different, there is room for twice those of the sample in each."""


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

    def keep(self, values: Tensor, start: int, kept: Tensor) -> None:
        """Write `values`, the numbers from index `start` on, with 0 where their magnitudes are not among them."""
        ties = min(max(0, self.last + 1 - start), values.numel())
        if ties:
            below = torch.nextafter(*torch.tensor([self.threshold, -inf], dtype=values.dtype)).item()
            torch.ops.aten.hardshrink.out(values[:ties], below, out=kept[:ties])  # 0 from -below to below
        if ties < values.numel():
            torch.ops.aten.hardshrink.out(values[ties:], self.threshold, out=kept[ties:])


def selecting(of: Extent, numbers: int, shares: Sequence[float]) -> Memory:
    """What `largest` takes for some `shares` of each of `numbers` tensors, if the short way is enough."""
    size = max(min(of.elements // SAMPLED, GRID // 2), 1)
    off = [_error(share, size) for share in shares]
    kept = [min(2 * of.elements * each, of.elements, KEPT) * of.size for each in off]  # by each `_Bracket`
    found = int(min(2 * WIDEST * max(off, default=0), 1) * of.run)  # of one run, with where they stand
    lent = ((numbers + 1) * of.size + 1) * of.run + numbers * sum(kept)
    return Memory(int(lent), max((of.size + 2) * size, (of.size + 8) * found))


def _error(share: float, size: int) -> float:
    """How far the share below a number may be off that a sample of `size` says to be above `share` of all."""
    return SIGMAS * (max(share * (1 - share), 0) / size) ** 0.5 + 2 / size


def counting(of: Extent) -> int:
    """What `quantiles` asks for, of three of them: counts, and the numbers of a run that begin alike."""
    tables, bits = (3, 15) if of.size == 4 else (6, 16)  # neighbours seldom differ in 16 bits, mostly in 32
    return (tables + 2) * (8 << bits) + (of.size + 1) * of.run


ALL = Largest(-1.0, -1)
NONE = Largest(inf, -1)


@dataclass(frozen=True)
class Numbers:
    """Numbers >= 0, none of them -0, made of the inputs of a method."""

    tensors: Tensors
    count: int
    """How many tensors of them."""
    make: Callable[[Sequence[Tensor], list[Tensor]], object]
    """Makes them of a run of the inputs, each of those at its place alone, and writes them into the second."""

    def chunks(self, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        """A pass over them, from `start` on: see `Tensors.chunks`."""
        for at, run in self.tensors.chunks(start):
            with scratch(run[0], self.count) as made:
                self.make(run, made)
                yield at, made

    @contextlib.contextmanager
    def look(self, places: Sequence[int], length: int) -> Iterator[list[Tensor] | None]:
        """See `Tensors.look`."""
        seen = self.tensors.look(places, length)
        if seen is None:
            yield None
            return
        with scratch(seen[0], self.count) as made:
            self.make(seen, made)
            yield made


def magnitudes(tensors: Tensors) -> Numbers:
    """The absolute values of all inputs."""

    def make(run: Sequence[Tensor], made: list[Tensor]) -> None:
        for values, out in zip(run, made, strict=True):
            torch.abs(values, out=out)

    return Numbers(tensors, tensors.inputs, make)


def places(chunks: Chunks, elements: int, ranks: Sequence[Collection[int]]) -> list[dict[int, Place]]:
    """For each tensor of `elements` numbers those at its `ranks`: 0 is the smallest's."""
    if not any(ranks):
        return [{} for _ in ranks]
    for _, run in chunks():
        dtype, device = run[0].dtype, run[0].device
        if run[0].numel() == elements <= SMALL:
            return [_sorted(values, wanted) for values, wanted in zip(run, ranks, strict=True)]
        break
    else:
        raise AssertionError("of no numbers none has a rank")
    kind = PATTERNS[dtype]
    known: list[dict[int, tuple[int, int, int]]] = [dict.fromkeys(wanted, (0, 0, 0)) for wanted in ranks]
    for level, (before, after) in enumerate(pairwise(STEPS[dtype])):
        size = 1 << (before - after)
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        counts = [{head: zeros.clone() for head, _, _ in found.values()} for found in known]
        for _, run in chunks():
            for values, tables in zip(run, counts, strict=True):
                patterns = values.view(kind)
                for head, table in tables.items():
                    inside = patterns if level == 0 else _beginning(patterns, before, head)
                    with scratch(inside) as (digits,):
                        torch.bitwise_right_shift(inside, after, out=digits).bitwise_and_(size - 1)
                        table += torch.bincount(digits, minlength=size)
        known = [_longer(found, tables, before - after) for found, tables in zip(known, counts, strict=True)]
        counts.clear()  # before the next ones are made
    return [
        {rank: Place(_number(head, dtype), below, equal) for rank, (head, below, equal) in found.items()}
        for found in known
    ]


def _longer(
    known: dict[int, tuple[int, int, int]], counts: dict[int, Tensor], bits: int
) -> dict[int, tuple[int, int, int]]:
    """For each rank what its pattern begins with, how many are below and how many begin so; with `bits` more of them.

    `counts` says of each beginning how often it goes on in which way, and is overwritten.
    """
    upto = {head: table.cumsum_(0) for head, table in counts.items()}
    found: dict[int, tuple[int, int, int]] = {}
    for rank, (head, below, _) in known.items():
        digit = int(torch.searchsorted(upto[head], rank - below, right=True))
        less = int(upto[head][digit - 1]) if digit else 0
        found[rank] = ((head << bits) | digit, below + less, int(upto[head][digit]) - less)
    return found


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


class _Bracket:
    """Two patterns between which that of some rank should lie, and what a pass finds there."""

    def __init__(self, rank: int, low: int, high: int, dtype: np.dtype[Any], most: int, *, few: bool) -> None:
        """At most `most` numbers are kept; where `few` different ones are expected, with how often each is in a run."""
        self.rank, self.low, self.high = rank, low, high
        self.below = 0
        """How many are smaller than all between."""
        self.most = most
        self.kept: Patterns = np.empty(0, dtype)
        """Memory for `most` of those between the two, less the lower one, run by run."""
        self.often = np.frombuffer(private(max(most, 1) * 4), np.int32) if few else None
        self.ends = [0]
        """Where those of each run end."""

    def add(self, patterns: Patterns, above: Patterns, inside: NDArray[np.bool_]) -> bool:
        """Look at a run; `above` and `inside` are memory. Says whether there is room for what is found."""
        np.subtract(patterns, patterns.dtype.type(self.low), out=above)
        np.less(above, 0, out=inside)
        self.below += int(np.count_nonzero(inside))
        unsigned = UNSIGNED[above.dtype]
        np.less_equal(above.view(unsigned), unsigned.type(self.high - self.low), out=inside)
        often: Patterns | int = 1
        if self.low == self.high:
            often = int(np.count_nonzero(inside))
            found = np.zeros(min(often, 1), above.dtype)
        else:
            found = above[np.flatnonzero(inside)]
            if self.often is not None:
                found, often = np.unique(found, return_counts=True)
        here = slice(self.ends[-1], self.ends[-1] + len(found))
        if here.stop > len(self.kept):
            return False
        self.kept[here] = found
        if self.often is not None:
            self.often[here] = often
        self.ends.append(here.stop)
        return True

    def find(self) -> tuple[int, int, list[int]] | None:
        """The pattern of the rank, how many are smaller, and how many are the same in each run; None: not here."""
        rank, kept = self.rank - self.below, self.kept[: self.ends[-1]]
        if self.often is None:
            if not 0 <= rank < len(kept):
                return None
            with scratch(torch.from_numpy(kept)) as (copy,):
                ordered = copy.copy_(torch.from_numpy(kept)).numpy()
                ordered.partition(rank)
                found = int(ordered[rank])
            same, smaller = kept == found, int(np.count_nonzero(kept < found))
        else:
            often = self.often[: len(kept)]
            if not 0 <= rank < often.sum(dtype=np.int64):
                return None
            order = np.argsort(kept, kind="stable")
            at = np.searchsorted(often[order].cumsum(dtype=np.int64), rank, side="right")
            found = int(kept[order[at]])
            same, smaller = np.where(kept == found, often, 0), int(often[kept < found].sum(dtype=np.int64))
        each = [int(same[begin:end].sum(dtype=np.int64)) for begin, end in pairwise(self.ends)]
        return self.low + found, self.below + smaller, each


def _between(numbers: Numbers, counts: Sequence[Collection[int]]) -> list[dict[int, Largest]]:
    """`largest`, the short way, of as many as it finds."""
    elements = numbers.tensors.elements
    result: list[dict[int, Largest]] = [{} for _ in counts]
    if not any(counts) or elements <= SMALL:
        return result
    pieces = min(max(elements // APART, PLACES[0]), PLACES[1])
    length = max(min(elements // SAMPLED, GRID // 2) // pieces, 1)
    open_: dict[tuple[int, int], _Bracket] = {}
    with numbers.look(_spread(elements, pieces, length), length) as seen:
        if seen is None or seen[0].device.type != "cpu":
            return result
        dtype = seen[0].dtype
        nothing = torch.empty(0, dtype=PATTERNS[dtype])
        for index, (wanted, sample) in enumerate(zip(counts, seen, strict=True)):
            for count in wanted:
                patterns = _patterns(sample).reshape(pieces, length)
                open_[index, count] = _bracket(patterns, elements, elements - count)
    with contextlib.ExitStack() as lent:
        for bracket in open_.values():
            kept = lent.enter_context(scratch(nothing, length=bracket.most))[0]
            bracket.kept = kept.numpy()
        starts: list[int] = []
        for start, run in numbers.chunks():
            starts.append(start)
            with scratch(run[0]) as (above,), scratch(run[0], dtype=torch.bool) as (inside,):
                for (index, count), bracket in list(open_.items()):
                    if not bracket.add(_patterns(run[index]), _patterns(above), inside.numpy()):
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
                result[index][count] = Largest(_number(pattern, dtype), last)
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
    off = SIGMAS * float(below.std()) / pieces**0.5 + 2 / size
    off = min(max(off, _error(share, size)), WIDEST * _error(share, size))
    first, last = max(floor((share - off) * size), -1), min(floor((share + off) * size) + 1, size)
    ranked.partition([max(first, 0), min(last, size - 1)])
    low = int(ranked[first]) if first >= 0 else 0
    high = int(ranked[last]) if last < size else np.iinfo(sample.dtype).max
    inside = np.sort(ranked[(ranked >= low) & (ranked <= high)])  # with all that are equal to either
    different = 1 + int(np.count_nonzero(np.diff(inside)))
    few = different == 1 or FEW * different < len(inside)
    between = 2 * different * -(-elements // SHORT) if few else int(ROOM * len(inside) / size * elements)
    room = between + SMALL
    return _Bracket(rank, low, high, sample.dtype, min(room, elements, KEPT), few=few)


def _index(numbers: Numbers, input: int, start: int, pattern: int, ties: int) -> int:
    """The index of the number that is the `ties`-th from `start` on to have `pattern`; it is in the first run."""
    for _, run in numbers.chunks(start):
        return start + int(np.flatnonzero(_patterns(run[input]) == pattern)[ties - 1])
    raise AssertionError("there is such a run")


def _patterns(values: Tensor) -> Patterns:
    return values.view(PATTERNS[values.dtype]).numpy()


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
