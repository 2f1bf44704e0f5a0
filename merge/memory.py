"""How much memory a merge takes, worked out from its plan alone.

Everything large has its place in advance: each thread has one piece for its runs, of a size that the plan says, and the
methods say what they need besides. What depends on a tensor's size is taken out of one budget, which is what the block
with the largest tensors needs: threads that would exceed it together work on other blocks, or wait.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from merge.content import CELL
from merge.methods.base import GRID, Extent, Memory
from merge.output import BLOCK
from merge.plan import Entry, Plan, Program
from merge.read import Ranged
from tuner.weights.store import TensorMeta, TensorStore

COMPUTED = 16
"""Bytes for each number of a run that is computed, in float32, as a LoRA's product is: the last block of rows, one or
two more, and those joined."""
COPIES = 3
"""Of a tensor that is computed as a whole: the one before, the pieces of this one, and those joined."""


@dataclass(frozen=True)
class Arena:
    """What a thread has for the whole of a merge, in one piece, for one run: what is read, and its numbers.

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
        return sum(self.raw) + self.slots

    @property
    def used(self) -> int:
        """What is used of it: hardly ever does a hashed cell go on beyond a run."""
        return self.bytes - CELL * len(self.raw)


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


@dataclass(frozen=True)
class Budget:
    """What the entries of a plan take beyond runs, as far as it depends on their size."""

    whole: Sequence[int]
    """For each entry: what looking at it takes at once."""
    held: Sequence[int]
    """For each entry: what of that stays until it is written."""
    limit: int
    """What the block that takes the most takes."""

    @classmethod
    def of(cls, plan: Plan) -> "Budget":
        """That of a plan."""
        needs = [need(plan, entry) for entry in plan.entries]
        found = cls([one.whole for one in needs], [one.held for one in needs], 0)
        offsets = [entry.offset for entry in plan.entries]
        blocks = range(-(-plan.value_bytes // BLOCK))
        scaled = {index for index, entry in enumerate(plan.entries) if entry.scale_of is not None}
        # Scales are known by the time that they are written; found again, they wait until they have the memory alone
        found_first = ([one for one in in_advance(plan, offsets, block) if one not in scaled] for block in blocks)
        most = max((found.block(entries) for entries in found_first), default=0)
        return replace(found, limit=most)

    def block(self, entries: Sequence[int]) -> int:
        """What a block with `entries` takes at once: one after the other, each with what is held of those before."""
        most = held = 0
        for entry in entries:
            most = max(most, held + self.whole[entry])
            held += self.held[entry]
        return most


def need(plan: Plan, entry: Entry, *, exact: bool = False) -> Memory:
    """What an entry takes beside the arena; with `exact`, when all arithmetic is float64."""
    size = work_dtype(entry, exact=exact).itemsize
    grid = GRID // 2 if exact else GRID
    elements = torch.Size(entry.meta.shape).numel()
    program = entry.program
    if entry.scale_of is not None:  # found again when an interrupted merge is gone on with
        return replace(need(plan, plan.entries[plan.numbers[entry.scale_of]], exact=exact), held=0)
    if entry.channels is not None:  # all inputs, what they share, and what each step gives
        tensors = 2 * len(program.leaves) + len(program.steps) + 1
        return Memory(whole=tensors * size * elements, held=size * elements)
    lent = asked = whole = held = 0
    for step in program.steps:
        taken = step.method.memory(Extent(entry.meta.shape, len(step.inputs), size, grid))
        lent, asked = max(lent, taken.lent), max(asked, taken.asked)
        whole = max(whole, held + taken.whole)
        held += taken.held
    if any(isinstance(store, Ranged) for store, _ in _computed(plan, entry)):
        asked += COMPUTED * min(elements, grid)
    return Memory(lent, asked, whole, held)


def cached(plan: Plan) -> int:
    """What tensors take that have to be computed as a whole before a run of them can be read: one at a time."""
    found = [
        meta.bytes for entry in plan.entries for store, meta in _computed(plan, entry) if not isinstance(store, Ranged)
    ]
    return COPIES * max(found, default=0)


def _computed(plan: Plan, entry: Entry) -> Iterator[tuple[TensorStore, TensorMeta]]:
    """The sources of an entry in whose files it does not lie as it is, and what it is there."""
    for leaf in entry.program.leaves:
        if leaf.source is not None:
            store = plan.sources[leaf.source].store
            if store.locate(entry.name) is None:
                yield store, store.metas[entry.name]


def in_advance(plan: Plan, offsets: Sequence[int], block: int) -> Iterator[int]:
    """The entries of a block that need more than a look at a run; `offsets` are those of all entries."""
    index = max(0, bisect_right(offsets, block * BLOCK) - 1)
    while index < len(plan.entries) and offsets[index] < (block + 1) * BLOCK:
        entry = plan.entries[index]
        known = entry.channels is None and entry.program.elementwise and entry.scale_of is None
        if entry.meta.bytes and not known:
            yield index
        index += 1
