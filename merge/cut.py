"""The output cut into pieces of work, and what the threads of one process that do it have in common."""

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from merge.hashes import Cells
from merge.memory import Budget, in_advance
from merge.methods.base import GRID
from merge.output import BLOCK
from merge.plan import Plan
from merge.read import Files
from merge.rounding import Rounding

AWAKE = 0.2
"""Seconds after which who waits for another looks whether it is to end."""


@dataclass(frozen=True)
class Part:
    """A run of one tensor's numbers."""

    entry: int
    start: int
    stop: int


@dataclass(frozen=True)
class Settings:
    """How to work; nothing here changes a bit of the output, but for `rounding` and `device`."""

    threads: int = 0
    """0: as many as there are cores, at most 8."""
    rounding: Rounding = field(default_factory=Rounding)
    device: str = "cpu"
    keep_non_finite: bool = False
    """Let NaN and infinity through, instead of refusing."""

    @property
    def workers(self) -> int:
        """How many threads, or processes where those can be made."""
        return self.threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 8)


class Shared:
    """What the threads have in common: the plan, cut up, and results that several blocks need."""

    def __init__(
        self, plan: Plan, files: Files, hashes: Cells | None, settings: Settings, done: Collection[int] = ()
    ) -> None:
        """Without `hashes` nothing is hashed; nothing is kept for the blocks that are `done`."""
        self.plan = plan
        self.mine: Collection[int] = set(range(-(-plan.value_bytes // BLOCK))) - set(done)
        """The blocks that are worked out here."""
        self.files = files
        self.hashes = hashes
        self.settings = settings
        self.offsets = [entry.offset for entry in plan.entries]
        self.joined = [index > 0 and self._joins(index) for index in range(len(plan.entries))]
        self.scales: dict[int, float] = {}
        """Of entries that are scaled, as far as they are known."""
        self._whole: dict[int, _Once] = {}
        self._begun: set[int] = set()
        """Entries that a thread is to find something out about, and has not yet."""
        self.budget = Budget.of(plan)
        self._taken: dict[int, int] = {}
        """What the blocks that are worked on take for entries that are new."""
        self._held: dict[int, int] = {}
        """What is held of entries for blocks to come."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def begin(self, blocks: range) -> None:
        """From now on only these are worked out here; nothing is kept for others."""
        self.mine = blocks
        self._whole.clear()
        self._held.clear()
        self._begun.clear()

    def _joins(self, index: int) -> bool:
        """Whether an entry can be worked on together with the one before it."""
        one, two = self.plan.entries[index - 1], self.plan.entries[index]
        if (
            one.program is not two.program
            or one.meta.dtype != two.meta.dtype
            or one.channels is not None
            or two.channels is not None
            or not two.program.elementwise
            or self.settings.rounding.stochastic
        ):
            return False
        for leaf in two.program.leaves:
            if leaf.source is None:
                continue
            a, b = self.files.place(leaf.source, one.name), self.files.place(leaf.source, two.name)
            if a is None or b is None or a.path != b.path or a.meta.dtype != b.meta.dtype:
                return False
            if a.offset + a.meta.bytes != b.offset:
                return False
        return True

    def runs(self, block: int) -> Iterator[list[Part]]:
        """The runs of a block: parts of tensors that are worked on together, at most `GRID` numbers."""
        begin, end = block * BLOCK, min((block + 1) * BLOCK, self.plan.value_bytes)
        run: list[Part] = []
        numbers = 0
        index = max(0, bisect_right(self.offsets, begin) - 1)
        while index < len(self.plan.entries) and self.offsets[index] < end:
            entry = self.plan.entries[index]
            size = entry.meta.dtype.itemsize
            start = max(0, begin - entry.offset) // size
            stop = min(entry.meta.bytes, end - entry.offset) // size
            while start < stop:
                cut = min(stop, (start // GRID + 1) * GRID)
                joined = bool(run) and start == 0 and run[-1].entry == index - 1 and self.joined[index]
                if run and (not joined or numbers + cut - start > GRID):
                    yield run
                    run, numbers = [], 0
                run.append(Part(index, start, cut))
                numbers += cut - start
                start = cut
            index += 1
        if run:
            yield run

    def take(self, pending: list[int], stopped: Callable[[], bool] = lambda: False) -> int | None:
        """Take a block out of those that are `pending`; None when there is none left, or work is to end.

        It is the first for which the thread has not to wait for what another one is finding out, and for which there is
        memory. Where there is none, this waits until a block is written or something is found out. With no block being
        worked on nothing is waited for, so some thread always works.
        """
        with self._changed:
            while pending and not stopped():
                for place, block in enumerate(pending):
                    entries = list(in_advance(self.plan, self.offsets, block))
                    new = [entry for entry in entries if entry not in self._whole]
                    more = self.budget.block(new)
                    used = sum(self._held.values()) + sum(self._taken.values())
                    if not self._taken or (self._begun.isdisjoint(entries) and used + more <= self.budget.limit):
                        self._begun |= set(new)
                        self._taken[block] = more
                        return pending.pop(place)
                self._changed.wait(AWAKE)
        return None

    def once(self, entry: int, compute: Callable[[], object]) -> object:
        """What `compute` gives for an entry, computed by the first thread that asks."""
        with self._lock:
            if entry not in self._whole:
                first = self.plan.entries[entry].offset // BLOCK
                last = (self.plan.entries[entry].offset + self.plan.entries[entry].meta.bytes - 1) // BLOCK
                self._whole[entry] = _Once({block for block in range(first, last + 1) if block in self.mine})
                if not self._whole[entry].blocks:  # nobody else will ask
                    del self._whole[entry]
            once = self._whole.get(entry)
        found = compute() if once is None else once.get(compute)
        with self._changed:
            if entry in self._begun:
                self._begun.discard(entry)
                self._changed.notify_all()
        return found

    def forget(self, block: int) -> None:
        """Drop what no later block needs, now that this one is written."""
        with self._changed:
            self._taken.pop(block, None)
            for entry, once in list(self._whole.items()):
                if block in once.blocks:
                    self._held[entry] = self.budget.held[entry]
                    once.blocks.discard(block)
                if not once.blocks:
                    del self._whole[entry]
                    self._held.pop(entry, None)
            self._changed.notify_all()


class _Once:
    def __init__(self, blocks: set[int]) -> None:
        self.blocks = blocks
        self._lock = threading.Lock()
        self._value: object = None

    def get(self, compute: Callable[[], object]) -> object:
        with self._lock:
            if self._value is None:
                self._value = compute()
            return self._value
