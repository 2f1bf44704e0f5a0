"""Worker processes: each takes a shift, some neighbouring blocks of the output, works them out and writes them.

Threads of Python wait for each other between any two operations, for almost as long as the operations take. So where a
process can be made by forking, each worker is one, which has the plan and the open files from the beginning. It hands
back digests, and nothing large. Elsewhere `merge.execute` uses threads.

Which worker does what changes no bit of the output.
"""

import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from queue import SimpleQueue

from merge.cut import AWAKE, Settings, Shared
from merge.hashes import Digests, ShiftHashes
from merge.memory import in_advance
from merge.output import BLOCK, WRITERS, Output
from merge.plan import Plan
from merge.stopping import Wish
from merge.work import Page, Worker
from tuner.errors import ResourceError

SHIFT = 64
"""Blocks of a shift at most."""
SHARES = 4
"""Each worker could take so many more of what is left: towards the end shifts become small, and all end together."""
AGAIN = 16
"""At most one part in so many of a shift is looked at by two workers, as it goes on in the next one."""
WAITING = 1
"""Shifts for each worker that wait for it, so that it need not wait for the next one."""
DIE_WITH_PARENT = 1
"""Linux's name for it, PR_SET_PDEATHSIG."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Done:
    """What came of a shift."""

    blocks: Sequence[int]
    """Those that are written."""
    digests: Digests
    scales: dict[int, float]


def possible(settings: Settings) -> bool:
    """Whether there can be worker processes: Linux alone forks safely, and a graphics card cannot be shared so."""
    if settings.workers == 1 or sys.platform != "linux" or settings.device != "cpu":
        return False
    try:
        multiprocessing.get_context("fork").Lock()
    except (OSError, ImportError):  # some containers have no /dev/shm, where processes wait for each other
        return False
    return True


def shifts(plan: Plan, pending: Sequence[int], workers: int) -> list[range]:
    """`pending` blocks as shifts, none of which begins within what has to be looked at as a whole and is large.

    A single one means that other processes would be of no use.
    """
    offsets = [entry.offset for entry in plan.entries]
    found: list[range] = []
    usual = 0
    for number, block in enumerate(pending):
        last = found[-1] if found else range(0)
        if last.stop != block or not last or (len(last) >= usual and _cheap(plan, offsets, last)):
            found.append(range(block, block + 1))
            usual = min(SHIFT, (len(pending) - number) // (SHARES * workers))
        else:
            found[-1] = range(last.start, block + 1)
    return found


def _cheap(plan: Plan, offsets: Sequence[int], shift: range) -> bool:
    """Whether a shift may end here: what goes on in the next block is looked at there again."""
    begin = shift.stop * BLOCK
    cut = next((index for index in in_advance(plan, offsets, shift.stop) if offsets[index] < begin), None)
    return cut is None or plan.entries[cut].meta.bytes <= len(shift) * BLOCK // AGAIN


def work(
    shared: Shared,
    output: Output,
    todo: list[range],
    finished: Callable[[Done], None],
    progress: Progress,
    wish: Wish,
) -> None:
    """Work out and write all shifts `todo`, or until a signal comes; `finished` is told of every one.

    Raises:
        ResourceError: a worker was killed.
    """
    plan, budget = shared.plan, shared.budget
    workers = min(len(todo), shared.settings.workers)
    said = mmap.mmap(-1, output.blocks + 1)  # shared: a byte for each block that is written, and one that says stop
    running: dict[Future[Done], int] = {}
    untold = {block for shift in todo for block in shift}
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, fork, _begin, (shared, output, said, os.getpid()))
    try:
        while todo or running:
            for shift in list(todo):
                need = max(budget.block(list(in_advance(plan, shared.offsets, block))) for block in shift)
                full = len(running) >= workers * (1 + WAITING)
                if full or (running and sum(running.values()) + need > budget.limit):
                    break
                with _frozen() if not running else contextlib.nullcontext():
                    running[pool.submit(_work, shift, dict(shared.scales))] = need
                todo.remove(shift)
            ended = wait(running, AWAKE, FIRST_COMPLETED).done
            for future in ended:
                done = future.result()
                del running[future]
                shared.scales.update(done.scales)
                finished(done)
            for block in sorted(block for block in untold if said[block]):
                untold.remove(block)
                progress(min((block + 1) * BLOCK, plan.value_bytes) - block * BLOCK)
            if wish.number is not None:
                said[-1] = 1
                todo.clear()
    except BrokenProcessPool as error:
        time.sleep(AWAKE)  # a signal to all processes ends the others first
        if wish.number is None:
            raise ResourceError(
                "a worker process was killed, perhaps by the system for want of memory; --plan tells how much the "
                "merge takes: say threads = 1, or make room"
            ) from error
    finally:
        said[-1] = 1
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _frozen():
    """What there is now is no matter for the garbage collector of processes that are forked meanwhile: it would write
    to all of it, and so copy it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Member:
    """What a worker process has."""

    def __init__(self, shared: Shared, output: Output, said: mmap.mmap) -> None:
        self.hashes = ShiftHashes(shared.plan)
        shared.hashes = self.hashes
        self.shared, self.output, self.said = shared, output, said
        self.worker = Worker(shared)
        self.writer = ThreadPoolExecutor(WRITERS)
        self.pages: SimpleQueue[Page] = SimpleQueue()
        for _ in range(1 + WRITERS):
            self.pages.put(Page())

    def work(self, shift: range, scales: dict[int, float]) -> Done:
        shared = self.shared
        shared.begin(shift)
        self.hashes.begin(shift)
        shared.scales.update(scales)
        written: list[tuple[int, Future[None]]] = []
        for block in shift:
            if self.said[-1]:
                break
            page = self.pages.get()
            written.append((block, self.writer.submit(self._write, block, page, self.worker.work(block, page))))
            shared.forget(block)
        for _, future in written:
            future.result()
        found = {index: scale for index, scale in shared.scales.items() if index not in scales}
        return Done([block for block, _ in written], self.hashes.found(), found)

    def _write(self, block: int, page: Page, data: memoryview) -> None:
        try:
            self.output.write(block, data)
            self.said[block] = 1
        finally:
            self.pages.put(page)


_member: Member | None = None


def _begin(shared: Shared, output: Output, said: mmap.mmap, parent: int) -> None:
    """The first that a worker process does; it is to end with its parent, however that ends."""
    global _member
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _member = Member(shared, output, said)


def _work(shift: range, scales: dict[int, float]) -> Done:
    assert _member is not None
    return _member.work(shift, scales)
