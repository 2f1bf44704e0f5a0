"""How much memory a merge takes, worked out from its plan alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from merge.content import CELL
from merge.methods.base import GRID
from merge.output import BLOCK
from merge.plan import Entry, Plan, Program


@dataclass(frozen=True)
class Arena:
    """What a thread has for the whole of a merge, in one piece: for a block of the output, and for one run.

    The parts stand one after the other, each at a multiple of `CELL` bytes.
    """

    grid: int
    """Numbers in a run at most."""
    raw: tuple[int, ...]
    """Bytes of each leaf as they are read."""
    slots: int
    """Bytes of the numbers of all leaves and steps."""

    @classmethod
    def of(cls, plan: Plan, *, exact: bool = False) -> "Arena":
        """What a plan needs; with `exact`, all arithmetic is float64, of runs half as long."""
        grid = GRID // 2 if exact else GRID
        raw: list[int] = []
        slots = 0
        for program, dtype, entries in kinds(plan, exact=exact):
            slots = max(slots, (len(program.leaves) + len(program.steps)) * grid * dtype.itemsize)
            for index, leaf in enumerate(program.leaves):
                raw += [0] * (index + 1 - len(raw))
                if leaf.source is not None:
                    metas = plan.sources[leaf.source].store.metas
                    size = max(metas[entry.name].dtype.itemsize for entry in entries)
                    raw[index] = max(raw[index], grid * size + CELL)
        return cls(grid, tuple(_whole_cells(size) for size in raw), slots)

    @property
    def bytes(self) -> int:
        """All of it."""
        return BLOCK + sum(self.raw) + self.slots


def _whole_cells(size: int) -> int:
    return -(-size // CELL) * CELL


def kinds(plan: Plan, *, exact: bool = False) -> Iterator[tuple[Program, torch.dtype, list[Entry]]]:
    """Entries by what is done to them, and the dtype of the arithmetic."""
    found: dict[tuple[Program, torch.dtype], list[Entry]] = {}
    for entry in plan.entries:
        found.setdefault((entry.program, work_dtype(entry, exact=exact)), []).append(entry)
    for (program, dtype), entries in found.items():
        yield program, dtype, entries


def work_dtype(entry: Entry, *, exact: bool = False) -> torch.dtype:
    """What the arithmetic for an entry is done in."""
    return torch.float64 if exact or entry.meta.dtype.itemsize > 2 else torch.float32
