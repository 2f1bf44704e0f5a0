"""Working out a few places of a merged file again before it gets its name, to see that it holds what it should.

Twice: as it was done, which must give the very same bytes, and in float64, which tells how exact they are. Where every
number depends on its own place only, it must be as near to that as one rounding brings it, and what is lost in the
arithmetic before; other methods' errors are told and not judged.
"""

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge.cut import Part, Settings, Shared
from merge.methods.base import GRID
from merge.output import BLOCK
from merge.plan import Entry, Plan
from merge.read import Files
from merge.work import Page, Worker
from tuner.errors import DataError

Read = Callable[[int, int], bytes]
"""Values of the file: from an offset in them on, so many bytes."""
EXACT = 1 << 14
"""Numbers of a run that are worked out in float64."""
PIECE = 1 << 18
"""Bytes that are compared at once."""
LOST = 64
"""What the arithmetic may lose, in units of its own last place at the size of the inputs: it takes a few steps."""
SHARE = 0.01
"""Of a run's numbers, how many may be further off: where a sign decides, 0 and almost 0 are far from each other."""


@dataclass(frozen=True)
class LargestError:
    """The worst place that was found."""

    ulps: float
    """In units of the output's last place; correct rounding gives at most 0.5."""
    name: str
    runs: int
    """How many runs were worked out again."""


def largest_error(plan: Plan, read: Read, settings: Settings, runs: int) -> LargestError | None:
    """Compare `runs` random runs of the file's values with what they should be; None when nothing was merged.

    Raises:
        DataError: they are not that; the message names a tensor.
    """
    places = picked(plan, runs)
    if not places:
        return None
    files = Files(plan.sources)
    worst = LargestError(-1.0, "", 0)
    try:
        quiet = replace(settings, keep_non_finite=True)
        shared = Shared(plan, files, None, quiet)
        usual = Worker(shared)
        worker = Worker(shared, exact=True, memory=usual.memory)  # one after the other
        page = Page()
        for index, start in places:
            entry = plan.entries[index]
            total = torch.Size(entry.meta.shape).numel()
            stop = min(start + EXACT, total)
            size = entry.meta.dtype.itemsize
            _same_again(usual, page, read, (entry.offset + start * size) // BLOCK)
            exact = worker.values([Part(index, start, stop)], hashing=False)
            data = bytearray(read(entry.offset + start * size, (stop - start) * size))
            distance = ulps(torch.frombuffer(data, dtype=entry.meta.dtype), exact.cpu())
            if entry.program.elementwise and entry.channels is None:
                allowed = 1.0 if settings.rounding.stochastic else 0.5
                lost = _lost(plan, files, entry, start, stop, exact.cpu())
                _refuse(entry, distance, allowed + lost / _unit(exact.cpu(), entry.meta.dtype))
            largest = distance.max().item() if distance.numel() else 0.0
            if largest > worst.ulps:
                worst = LargestError(largest, entry.name, runs)
    finally:
        files.close()
    return worst


def picked(plan: Plan, runs: int) -> list[tuple[int, int]]:
    """The runs that are looked at: an entry that is merged, and where the run begins. The same every time."""
    merged = [index for index, entry in enumerate(plan.entries) if entry.program.steps and entry.meta.bytes]
    rng = random.Random(0)
    found: list[tuple[int, int]] = []
    for _ in range(runs if merged else 0):
        index = rng.choice(merged)
        found.append((index, rng.randrange(0, torch.Size(plan.entries[index].meta.shape).numel(), GRID)))
    return found


def _same_again(worker: Worker, page: Page, read: Read, block: int) -> None:
    """Work out a block once more, unless that means to look at whole tensors.

    Raises:
        DataError: it has other bytes than in the file.
    """
    shared = worker.shared
    entries = [shared.plan.entries[part.entry] for run in shared.runs(block) for part in run]
    if not all(entry.program.elementwise and entry.channels is None and not entry.scale_of for entry in entries):
        return
    made = worker.work(block, page)
    for start in range(0, len(made), PIECE):
        again = bytes(made[start : start + PIECE])
        there = read(block * BLOCK + start, len(again))
        if again == there:
            continue
        place = next(at for at, (one, two) in enumerate(zip(again, there, strict=True)) if one != two)
        place += block * BLOCK + start
        name = shared.plan.entries[bisect_right(shared.offsets, place) - 1].name
        raise DataError(
            f"{name}: worked out again it is not what was written; if its method gives the same every time, check "
            "memory and disk, and repeat the merge"
        )


def _lost(plan: Plan, files: Files, entry: Entry, start: int, stop: int, exact: Tensor) -> Tensor:
    """How far off the arithmetic before the rounding may be at each place, from the sizes of what goes into it."""
    largest = exact.abs()
    for leaf in entry.program.leaves:
        if leaf.source is None:
            continue
        place = files.place(leaf.source, entry.name)
        if place is None:
            values = files.computed(leaf.source, entry.name, start, stop)
        else:
            size = place.meta.dtype.itemsize
            data = bytearray((stop - start) * size)
            files.read_bytes(place, start * size, memoryview(data))
            values = torch.frombuffer(data, dtype=place.meta.dtype)
        largest = torch.maximum(largest, values.double().abs())
    work = torch.float64 if entry.meta.dtype.itemsize > 2 else torch.float32
    return largest * (LOST * torch.finfo(work).eps)


def _refuse(entry: Entry, distance: Tensor, allowed: Tensor) -> None:
    """Raise when too many numbers are further off than they may be."""
    wrong = distance > allowed
    share = wrong.double().mean().item() if wrong.numel() else 0.0
    if share > SHARE:
        methods = ", ".join(dict.fromkeys(type(step.method).__name__ for step in entry.program.steps))
        raise DataError(
            f"{entry.name}: {share:.0%} of the numbers are further off than rounding explains (up to "
            f"{distance[wrong].max().item():.3g} units of the last place): {methods} loses digits; say dtype = "
            "'float32', which has its arithmetic done in float64, or choose another method"
        )


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """How far `found`, of the output's dtype, is from `exact` (float64), in units of its last place."""
    return ((found.double() - exact).abs() / _unit(exact, found.dtype)).nan_to_num(nan=0.0)


def _unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit of the last place of `dtype` at each number."""
    info = torch.finfo(dtype)
    digits = round(-torch.log2(torch.tensor(info.eps)).item())
    smallest = torch.log2(torch.tensor(info.tiny, dtype=torch.float64)).item()
    exponent = torch.frexp(exact.abs()).exponent.double() - 1
    return torch.exp2(exponent.clamp(min=smallest) - digits)
