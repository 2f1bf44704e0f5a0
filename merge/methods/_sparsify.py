"""Ways to thin a difference out: most of its numbers become 0, the others are kept, and enlarged where it is said."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from merge.methods._numbers import part
from merge.methods._random import Uniform
from merge.methods._rows import rows, width
from merge.methods._select import largest, magnitudes
from merge.methods._totals import total
from merge.methods.base import Tensors

Sparsify = Callable[[int, Tensor, int], Tensor]
"""`sparsify(input, values, start)`: what is left of `values`, which are numbers of that input from `start` on.

They are not changed; where everything is left, they are what is returned.
"""

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

    def sparsify(index: int, values: Tensor, start: int) -> Tensor:
        kept_ones = found[index][dropped + kept].keep(values, start)
        if dropped:
            kept_ones -= found[index][dropped].keep(values, start)
        return kept_ones

    return sparsify


def drop(tensors: Tensors, density: float, seed: int, rescale: Rescale) -> Sparsify:
    """Each number is kept with the probability `density`."""
    if density >= 1:
        return _everything

    def probability(index: int, values: Tensor, start: int) -> float:
        return density

    return _at_random(tensors, probability, seed, rescale)


def drop_by_rank(
    tensors: Tensors, density: float, epsilon: float, ranks: Ranks, seed: int, rescale: Rescale
) -> Sparsify:
    """Each number is kept with a probability from density - epsilon, for the smallest, to density + epsilon.

    It goes up in equal steps from rank to rank. Equal numbers share the mean of their ranks.
    """
    by_rank = _ranks_in_tensor(tensors) if ranks == "tensor" else _ranks_in_rows(tensors)

    def probability(index: int, values: Tensor, start: int) -> Tensor:
        return by_rank(index, values, start).mul_(2 * epsilon).add_(density - epsilon).clamp_(0, 1)

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


def _everything(index: int, values: Tensor, start: int) -> Tensor:
    """Nothing is thinned out."""
    return values


def _at_random(
    tensors: Tensors, probability: Callable[[int, Tensor, int], Tensor | float], seed: int, rescale: Rescale
) -> Sparsify:
    """Each number is kept with its `probability`, which is asked for as `Sparsify` is."""
    drawn = [Uniform(seed, tensors.name, index) for index in range(tensors.inputs)]

    def sparsify(index: int, values: Tensor, start: int) -> Tensor:
        chance = probability(index, values, start)
        kept = drawn[index].run(start, values.numel()).to(values.device) < chance
        if rescale == "inverse":
            values = values / chance  # infinite only where nothing is kept
        return torch.where(kept, values, 0)

    if rescale != "norm":
        return sparsify
    before, after = [0.0] * tensors.inputs, [0.0] * tensors.inputs
    for start, run in tensors.chunks():
        for index, values in enumerate(run):
            before[index] += total(values.abs())
            after[index] += total(sparsify(index, values, start).abs())
    factors = [old / new if new > 0 else 1.0 for old, new in zip(before, after, strict=True)]
    return lambda index, values, start: sparsify(index, values, start).mul_(factors[index])


def _ranks_in_tensor(tensors: Tensors) -> Callable[[int, Tensor, int], Tensor]:
    """Ranks from 0 to 1 in float32, among all numbers of an input: told apart if they differ by 1 part in 256."""

    def bins(values: Tensor) -> Tensor:
        return values.abs().float().view(torch.int32) >> 15

    counts = [torch.zeros(BINS, dtype=torch.int64) for _ in range(tensors.inputs)]
    for _, run in tensors.chunks():
        for count, values in zip(counts, run, strict=True):
            count += torch.bincount(bins(values), minlength=BINS).to(count.device)
    tables = [_unit(count.cumsum(0) - (count.double() + 1) / 2, tensors.elements).float() for count in counts]
    return lambda index, values, start: tables[index].to(values.device)[bins(values)]


def _ranks_in_rows(tensors: Tensors) -> Callable[[int, Tensor, int], Tensor]:
    """Ranks from 0 to 1 in float32, among the numbers of a row; they are held, one byte for each number."""
    held = [torch.empty(tensors.elements, dtype=torch.uint8) for _ in range(tensors.inputs)]
    wide = width(tensors.shape)
    for row, run in rows(tensors):
        for steps, values in zip(held, run, strict=True):
            found = _unit(mean_ranks(values.abs()), wide).mul_(STEPS).round_()
            steps[row * wide :][: values.numel()] = found.reshape(-1).to(steps)
    return lambda index, values, start: held[index][start:][: values.numel()].to(values.device).float() / STEPS


def _unit(ranks: Tensor, count: int) -> Tensor:
    """Ranks among `count` numbers brought to [0, 1]; that of one alone is in the middle."""
    return ranks / (count - 1) if count > 1 else torch.full_like(ranks, 0.5)
