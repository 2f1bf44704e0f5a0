"""Ways to thin a difference out: most of its numbers become 0, the others are kept, and enlarged where it is said."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from merge.methods._numbers import part
from merge.methods._random import Uniform
from merge.methods._rows import by_rows, rows, width
from merge.methods._select import PATTERNS, largest, magnitudes, selecting
from merge.methods._totals import total
from merge.methods.base import Extent, Memory, Tensors
from merge.scratch import scratch

Sparsify = Callable[[int, Tensor, int, Tensor], object]
"""`sparsify(input, values, start, out)`: writes what is left of `values`, numbers of that input from `start` on."""

Rescale = Literal["inverse", "norm", "none"]
"""What is done to the numbers that are kept when others were dropped at random.

    inverse  divided by the probability with which they were kept: on average nothing changes. As in the papers, PEFT
    norm     multiplied by what makes the sum of absolute values what it was. As in mergekit
    none     left as they are
"""
Ranks = Literal["row", "tensor"]
"""Among which numbers one is ranked: its row's, as the authors' code does, or all of its tensor's."""

BINS = 1 << 16
"""Ranks in a tensor are those of the leading 16 bits of the magnitudes."""
STEPS = 254
"""Ranks in a row are rounded to so many steps; an even number, so that one is in the middle."""


def trim(tensors: Tensors, density: float) -> Sparsify:
    """The largest numbers by magnitude are kept, `density` of them, and at least one if it is not 0."""
    return middle(tensors, density, 0)


def middle(tensors: Tensors, density: float, gamma: float) -> Sparsify:
    """The `gamma` largest numbers are dropped, and the next largest kept, `density` of all.

    Where there are not so many left, fewer are dropped.
    """
    elements = tensors.elements
    kept = max(part(density, elements), min(1, elements)) if density > 0 else 0
    if kept == elements:
        return _everything
    dropped = min(part(gamma, elements), elements - kept)
    found = largest(magnitudes(tensors), [{dropped, dropped + kept}] * tensors.inputs)

    def sparsify(index: int, values: Tensor, start: int, out: Tensor) -> None:
        found[index][dropped + kept].keep(values, start, out)
        if dropped:
            with scratch(values) as (largest_ones,):
                found[index][dropped].keep(values, start, largest_ones)
                out.sub_(largest_ones)

    return sparsify


def drop(tensors: Tensors, density: float, seed: int, rescale: Rescale) -> Sparsify:
    """Each number is kept with the probability `density`."""
    if density >= 1:
        return _everything

    def probability(index: int, values: Tensor, start: int, out: Tensor) -> float:
        return density

    return _at_random(tensors, probability, seed, rescale)


def drop_by_rank(
    tensors: Tensors, density: float, epsilon: float, ranks: Ranks, seed: int, rescale: Rescale
) -> Sparsify:
    """Each number is kept with a probability from density - epsilon, for the smallest, to density + epsilon.

    It goes up in equal steps from rank to rank. Equal numbers share the mean of their ranks.
    """
    by_rank = _ranks_in_tensor(tensors) if ranks == "tensor" else _ranks_in_rows(tensors)

    def probability(index: int, values: Tensor, start: int, out: Tensor) -> Tensor:
        by_rank(index, values, start, out)
        return out.mul_(2 * epsilon).add_(density - epsilon).clamp_(0, 1)

    return _at_random(tensors, probability, seed, rescale)


def mean_ranks(values: Tensor) -> Tensor:
    """The ranks in each row of `[rows, width]`, from 0; equal numbers have the mean of theirs."""
    ordered, index = values.sort(dim=1)
    place = torch.arange(values.shape[1], device=values.device).expand_as(values)
    change = torch.ones_like(values, dtype=torch.bool)
    change[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(change, place, 0).cummax(1).values
    change = torch.cat([change[:, 1:], torch.ones_like(change[:, :1])], 1)
    last = torch.where(change, place, values.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(values, dtype=torch.float64).scatter_(1, index, (first + last).double() / 2)


def _everything(index: int, values: Tensor, start: int, out: Tensor) -> None:
    """Nothing is thinned out."""
    out.copy_(values)


def _at_random(
    tensors: Tensors, probability: Callable[[int, Tensor, int, Tensor], Tensor | float], seed: int, rescale: Rescale
) -> Sparsify:
    """Each number is kept with its `probability`: one for all, or written in float32 where `Sparsify` would write."""
    drawn = [Uniform(seed, tensors.name, index) for index in range(tensors.inputs)]

    def sparsify(index: int, values: Tensor, start: int, out: Tensor) -> None:
        bits = PATTERNS[values.dtype]
        with (
            scratch(values, 2, torch.float32) as (uniform, chances),
            scratch(values, dtype=bits) as (kept,),
            scratch(values, dtype=torch.bool) as (below,),
        ):
            chance = probability(index, values, start, chances)
            drawn[index].run(start, uniform)
            kept.copy_(torch.lt(uniform, chance, out=below))
            out.copy_(values)
            if rescale == "inverse":
                out.div_(chance)  # infinite only where nothing is kept
            out.view(bits).mul_(kept)  # patterns times 0 or 1: `torch.where` takes ten times as long

    if rescale != "norm":
        return sparsify
    before, after = [0.0] * tensors.inputs, [0.0] * tensors.inputs
    for start, run in tensors.chunks():
        with scratch(run[0]) as (left,):
            for index, values in enumerate(run):
                sparsify(index, values, start, left)
                after[index] += total(left.abs_())
                before[index] += total(torch.abs(values, out=left))
    factors = [old / new if new > 0 else 1.0 for old, new in zip(before, after, strict=True)]

    def rescaled(index: int, values: Tensor, start: int, out: Tensor) -> None:
        sparsify(index, values, start, out)
        out.mul_(factors[index])

    return rescaled


def _ranks_in_tensor(tensors: Tensors) -> Sparsify:
    """Ranks from 0 to 1, written in float32, among all numbers: told apart if they differ by 1 part in 256."""

    def bins(values: Tensor, memory: Tensor) -> Tensor:
        """The leading bits of the magnitudes; `memory` is float32."""
        found = memory.copy_(values).abs_().view(torch.int32)
        return torch.bitwise_right_shift(found, 15, out=found)

    counts = [torch.zeros(BINS, dtype=torch.int64) for _ in range(tensors.inputs)]
    for _, run in tensors.chunks():
        with scratch(run[0], dtype=torch.float32) as (memory,):
            for count, values in zip(counts, run, strict=True):
                count += torch.bincount(bins(values, memory), minlength=BINS).to(count.device)
    tables = [_unit(count.cumsum(0) - (count.double() + 1) / 2, tensors.elements).float() for count in counts]

    def ranks(index: int, values: Tensor, start: int, out: Tensor) -> None:
        with scratch(values, dtype=torch.float32) as (memory,):
            torch.index_select(tables[index].to(values.device), 0, bins(values, memory), out=out)

    return ranks


def _ranks_in_rows(tensors: Tensors) -> Sparsify:
    """Ranks from 0 to 1, written in float32, among the numbers of a row; they are held, one byte for each number."""
    held = [torch.empty(tensors.elements, dtype=torch.uint8) for _ in range(tensors.inputs)]
    wide = width(tensors.shape)
    for row, run in rows(tensors):
        for steps, values in zip(held, run, strict=True):
            ranked = steps[row * wide :][: values.numel()].view(-1, wide)
            ranked.copy_(_unit(mean_ranks(values.abs()), wide).mul_(STEPS).round_())

    def ranks(index: int, values: Tensor, start: int, out: Tensor) -> None:
        out.copy_(held[index][start : start + values.numel()]).div_(STEPS)

    return ranks


def trimming(of: Extent, density: float, gamma: float = 0) -> tuple[Memory, Memory]:
    """What `trim` takes, and then thinning out an input; with `gamma`, that of `middle`."""
    shares = [density] if gamma == 0 else [gamma, gamma + density]
    return selecting(of, of.inputs, shares), Memory(of.size * of.run if gamma else 0)


def dropping(of: Extent, rescale: Rescale, ranks: Ranks | None) -> tuple[Memory, Memory]:
    """What `drop` takes, and then thinning out an input; with `ranks`, that of `drop_by_rank`."""
    numbers = 4 + of.size + 1 + {None: 0, "row": 4, "tensor": 4 + 4}[ranks]
    thinning = Memory(numbers * of.run, 4 * of.run)  # `Uniform` draws from half as many numbers of 8 bytes
    lent = (of.size + max(numbers, 8)) * of.run if rescale == "norm" else 0
    if ranks == "tensor":
        return Memory(lent, (of.inputs * (8 + 4) + 3 * 8) * BINS), thinning
    if ranks == "row":
        joined, ranked = by_rows(of)
        held = of.inputs * of.elements
        return Memory(max(lent, joined), (44 + 4 * of.size) * ranked, held, held), thinning
    return Memory(lent), thinning


def _unit(ranks: Tensor, count: int) -> Tensor:
    """Ranks among `count` numbers brought to [0, 1]; that of one alone is in the middle."""
    return ranks / (count - 1) if count > 1 else torch.full_like(ranks, 0.5)
