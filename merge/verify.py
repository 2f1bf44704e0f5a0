"""Working out a few places of a merged file again, in float64, to see how exact it is."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from merge.allocator import kept_memory
from merge.cut import Part, Settings, Shared
from merge.hashes import Hashes
from merge.methods.base import GRID
from merge.plan import Plan
from merge.read import Files
from merge.work import Worker
from tuner.weights.store import SafetensorsFile


@dataclass(frozen=True)
class LargestError:
    """The worst place that was found."""

    ulps: float
    """In units of the output's last place; correct rounding gives at most 0.5."""
    name: str
    runs: int
    """How many runs were worked out again."""


@kept_memory()
def largest_error(plan: Plan, path: Path, settings: Settings, runs: int) -> LargestError | None:
    """Compare `runs` random runs of the file with the same in float64; None when nothing was merged."""
    merged = [index for index, entry in enumerate(plan.entries) if entry.program.steps and entry.meta.bytes]
    if not merged or runs <= 0:
        return None
    files = Files(plan.sources)
    rng = random.Random(0)
    header = SafetensorsFile(path).header
    worst = LargestError(-1.0, "", 0)
    try:
        quiet = replace(settings, keep_non_finite=True)
        worker = Worker(Shared(plan, files, Hashes(plan, files), quiet), exact=True)
        for _ in range(runs):
            index = rng.choice(merged)
            entry = plan.entries[index]
            total = torch.Size(entry.meta.shape).numel()
            start = rng.randrange(0, total, GRID)
            stop = min(start + GRID, total)
            exact = worker.values([Part(index, start, stop)], hashing=False)
            size = entry.meta.dtype.itemsize
            data = bytearray((stop - start) * size)
            with path.open("rb") as file:
                file.seek(header.offsets[entry.called or entry.name] + start * size)
                file.readinto(data)
            error = ulps(torch.frombuffer(data, dtype=entry.meta.dtype), exact)
            if error > worst.ulps:
                worst = LargestError(error, entry.name, runs)
    finally:
        files.close()
    return worst


def ulps(found: Tensor, exact: Tensor) -> float:
    """The largest distance of `found`, of the output's dtype, from `exact` (float64), in units of its last place."""
    if found.numel() == 0:
        return 0.0
    info = torch.finfo(found.dtype)
    digits = round(-torch.log2(torch.tensor(info.eps)).item())
    smallest = torch.log2(torch.tensor(info.tiny, dtype=torch.float64)).item()
    exponent = torch.frexp(exact.abs()).exponent.double() - 1
    unit = torch.exp2(exponent.clamp(min=smallest) - digits)
    difference = (found.double() - exact).abs() / unit
    return difference.nan_to_num(nan=0.0).max().item()
