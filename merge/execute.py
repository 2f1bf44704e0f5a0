"""Carrying a plan out: one pass over the output, block by block, in memory that does not depend on the models' size.

The output's values are cut into blocks of `BLOCK` bytes. A worker takes the next block, works its tensors out in runs
of at most `GRID` numbers (small tensors that lie together and are treated alike are one run), and hands it to another
thread, which writes it at its place. Workers are processes that take many blocks at once (`merge.crew`), or threads of
this one. Nothing depends on which of them does what, or when: the bytes are the same for any number.

While bytes are at hand they are hashed and looked at: every number that is read or written must be finite. The output
is written under a temporary name and gets its header last, so that an unfinished file can never be loaded.
"""

import contextlib
import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch

from merge import crew
from merge.allocator import kept_memory
from merge.content import CELL, DIGEST
from merge.cut import AWAKE, Settings, Shared
from merge.hashes import Hashes
from merge.memory import Arena, Budget, cached, need
from merge.methods.base import GRID, Memory
from merge.output import BLOCK, WRITERS, Output
from merge.plan import Plan
from merge.read import Files
from merge.stopping import Stopped, Wish, noted
from merge.verify import picked
from merge.work import NotFinite, Page, Worker
from tuner.errors import ConfigError
from tuner.weights.writer import resource_error

PROGRAM = 3 << 19
"""Bytes that the first use of everything takes: measured."""
CHECKED = 1 << 20
"""Bytes for what is compared when some of the result is worked out again: measured."""
THREAD = 1 << 18
"""Bytes of a thread's own, for all that is small: measured."""
TENSOR = 1000
"""Bytes of what is known of a tensor of a source or of the output: measured."""
PROCESS = 15 << 19
"""Bytes of what a worker process shares with the others at first, and then has for itself: measured."""
KNOWN = 500
"""The same, for each tensor of a source or of the output: measured."""
JOURNAL = 6
"""Times the digests: as hexadecimal digits, as text, and as bytes to be written."""
ROUNDED = 44
"""Bytes for each number that is rounded at random: what `merge.rounding` makes of it on the way."""
SAVE_BYTES = 1 << 30
"""How much may be written before the journal is brought up to date."""


@dataclass(frozen=True)
class Result:
    """What was made."""

    root: str
    """The content hash of the output."""
    source_roots: tuple[str, ...]
    """That of what was read of each source."""
    resumed_bytes: int
    """How much of it an interrupted merge had already written."""


Metadata = Callable[[str, Sequence[str]], Mapping[str, str]]
"""The header's texts, from the output's and the sources' content hashes; as long for any hashes."""
Progress = Callable[[int], None]
"""Told the number of bytes written."""
Check = Callable[[Callable[[int, int], bytes]], None]
"""Looks at the values before the file gets its name, by what reads them: from an offset on, so many bytes."""


DEFAULTS = Settings()


def execute(
    plan: Plan,
    target: Path,
    metadata: Metadata,
    settings: Settings = DEFAULTS,
    *,
    resume: bool = False,
    progress: Progress = lambda done: None,
    check: Check = lambda read: None,
) -> Result:
    """Write the output of `plan` to `target`, whole or not at all.

    A merge that was killed leaves `target` as it was, and an unfinished file with a journal beside it; `resume` goes on
    from there, to the same bytes. SIGTERM and Ctrl-C end it in the same way, with a journal of all that is done.

    Raises:
        ConfigError: `target` is one of the inputs, or what there is to resume is another merge.
        DataError: a value that is not finite or too large for its dtype, or an input that changes meanwhile.
        ResourceError: the disk is full or cannot be written.
        LockedError: another process writes the same output.
        Stopped: a signal came.
    """
    place = Path(os.path.realpath(target))
    files = Files(plan.sources)
    try:
        for path in files.identities:
            if place.exists() and place.samefile(path):
                raise ConfigError(f"{target}: is also an input ({path}); choose another output")
        nothing = "0" * 64
        header = plan.header(metadata(nothing, [nothing] * len(plan.sources)))
        with noted() as wish:
            output = Output(plan.value_bytes, place, len(header), _key(plan, files, settings, header), resume)
            try:
                with one_thread_each(), kept_memory():
                    result = _run(plan, files, output, settings, progress, wish)
                    with ThreadPoolExecutor(2) as pool:
                        both = pool.submit(check, output.read), pool.submit(output.sync)
                        for one in both:
                            one.result()
                files.check_unchanged()
                final = plan.header(metadata(result.root, result.source_roots))
                assert len(final) == len(header), "hashes have one length"
                output.finish(final)
            except Exception as error:
                output.discard()
                if isinstance(error, OSError):
                    raise resource_error(target, error, plan.value_bytes) from error
                if isinstance(error, NotFinite):
                    raise error.whole(files.not_finite(error.source)) from error
                raise
            finally:
                output.close()
        return result
    finally:
        files.close()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch works in our threads, not in its own: sums have one order, and cores are not fought for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _key(plan: Plan, files: Files, settings: Settings, header: bytes) -> str:
    """Names what is being made, for the journal; `header` has no hashes yet."""
    text = hashlib.sha256()
    for path, identity in files.identities.items():
        text.update(f"{path} {identity}\n".encode())
    for source in plan.sources:
        text.update(f"{source.name}\n".encode())
    for entry in plan.entries:
        text.update(f"{entry}\n".encode())
    text.update(f"{settings.rounding} {settings.device} {BLOCK} {GRID}".encode())
    text.update(header)  # the recipe is in it
    return text.hexdigest()


def _run(plan: Plan, files: Files, output: Output, settings: Settings, progress: Progress, wish: Wish) -> Result:
    """Work out and write every block that is not there yet, or until a signal comes."""
    hashes = Hashes(plan, files)
    if output.done:
        hashes.restore(output.digests)
        _restore_edges(plan, output, hashes)
        progress(sum(_size(plan, block) for block in output.done))
    resumed = sum(_size(plan, block) for block in output.done)
    shared = Shared(plan, files, hashes, settings, output.done)
    scales = {entry.offset // BLOCK for entry in plan.entries if entry.scale_of is not None}
    # Scales come last, when they have been found on the way
    pending = sorted(set(range(output.blocks)) - output.done, key=lambda block: (block in scales, block))
    state = _State(plan, output, hashes)
    todo = crew.shifts(plan, pending, settings.workers) if crew.possible(settings) else []
    if len(todo) > 1:

        def finished(done: crew.Done) -> None:
            hashes.take_over(done.digests)
            state.finish(done.blocks)

        crew.work(shared, output, todo, finished, progress, wish)
    else:
        _threads(shared, output, pending, state, progress, wish)
    if wish.number is not None:
        state.save()
        raise Stopped(wish.number, "interrupted; what is done is kept, and the same command with --resume goes on")
    found, inputs = hashes.roots()
    return Result(found, inputs, resumed)


class _State:
    """How far it is, and the journal of that."""

    def __init__(self, plan: Plan, output: Output, hashes: Hashes) -> None:
        self.plan, self.output, self.hashes = plan, output, hashes
        self.finished = sorted(output.done)
        self.unsaved = 0
        self._lock, self._saving = threading.Lock(), threading.Lock()

    def finish(self, blocks: Sequence[int]) -> None:
        """These are written, and their digests known."""
        with self._lock:
            self.finished.extend(blocks)
            self.unsaved += sum(_size(self.plan, block) for block in blocks)
            due = self.unsaved >= SAVE_BYTES
        if due and self._saving.acquire(blocking=False):
            try:
                self.save()
            finally:
                self._saving.release()

    def save(self) -> None:
        """Bring the journal up to date."""
        with self._lock:
            done = sorted(self.finished)
            digests = self.hashes.dump()
            self.unsaved = 0
        self.output.save(done, digests)


def _threads(shared: Shared, output: Output, pending: list[int], state: _State, progress: Progress, wish: Wish) -> None:
    """Work out and write all `pending` blocks in this process, or until a signal comes."""
    failed = threading.Event()

    def write(block: int, page: Page, data: memoryview) -> None:
        try:
            if failed.is_set():
                return
            output.write(block, data)
            state.finish([block])
            progress(len(data))
        except BaseException:
            failed.set()
            raise
        finally:
            pages.put(page)

    def loop() -> None:
        worker = Worker(shared)
        try:
            while not failed.is_set() and wish.number is None:
                block = shared.take(pending, lambda: failed.is_set() or wish.number is not None)
                if block is None:
                    return
                page = pages.get()
                written.append(writers.submit(write, block, page, worker.work(block, page)))
                shared.forget(block)
        except BaseException:
            failed.set()
            raise

    pages: SimpleQueue[Page] = SimpleQueue()
    workers = shared.settings.workers
    for _ in range(min(output.blocks, workers + WRITERS)):
        pages.put(Page())
    written: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as writers, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(loop) for _ in range(workers)]
        try:
            while wait(futures, timeout=AWAKE).not_done:
                pass  # a signal that comes just before this thread falls asleep is only seen when it wakes up
        except BaseException:
            failed.set()
            raise
    for future in (*futures, *written):
        future.result()


def _pages(blocks: int, settings: Settings) -> int:
    """How many blocks are in memory: one that each thread works at, and those that are being written."""
    return min(blocks, settings.workers + WRITERS)


def _size(plan: Plan, block: int) -> int:
    return min((block + 1) * BLOCK, plan.value_bytes) - block * BLOCK


def _restore_edges(plan: Plan, output: Output, hashes: Hashes) -> None:
    """Hand in again what finished blocks have of cells that they share with unfinished ones."""
    offsets = [entry.offset for entry in plan.entries]
    shared: set[tuple[int, int]] = set()
    for edge in range(1, output.blocks):
        if ((edge - 1) in output.done) == (edge in output.done):
            continue
        index = bisect_right(offsets, edge * BLOCK) - 1
        inside = edge * BLOCK - offsets[index]
        if inside % CELL and inside < plan.entries[index].meta.bytes:
            shared.add((index, inside // CELL))
    for index, cell in sorted(shared):
        entry = plan.entries[index]
        first = entry.offset + cell * CELL
        last = min(first + CELL, entry.offset + entry.meta.bytes)
        for block in range(first // BLOCK, (last - 1) // BLOCK + 1):
            if block in output.done:
                start, stop = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
                data = memoryview(output.read(start, stop - start))
                hashes.written(entry.name, entry.meta, start - entry.offset, data)


def memory(plan: Plan, settings: Settings, verify: int = 0) -> int:
    """The most memory, in bytes, that carrying `plan` out takes beyond the loaded program.

    With `verify`, so many runs of numbers are worked out again in float64 when all is written.
    """
    rounding = ROUNDED * GRID if settings.rounding.stochastic else 0
    needs = [need(plan, entry) for entry in plan.entries]
    usual, exact = Arena.of(plan).used, Arena.of(plan, exact=True).used
    blocks = range(-(-plan.value_bytes // BLOCK))
    tensors = len(plan.entries) + sum(len(source.store.metas) for source in plan.sources)
    threads, pages, processes = min(len(blocks), settings.workers), _pages(len(blocks), settings), 0
    if crew.possible(settings) and (todo := crew.shifts(plan, blocks, settings.workers))[1:]:
        threads = processes = min(len(todo), settings.workers)
        pages = processes * (1 + WRITERS)
    merging = threads * (THREAD + usual + _runs(needs, rounding)) + processes * (PROCESS + KNOWN * tensors)
    merging += min(plan.value_bytes, BLOCK * pages) + Budget.of(plan).limit
    again = [plan.entries[index] for index, _ in picked(plan, verify)]
    needs = [need(plan, entry, exact=True) for entry in again]
    # Blocks are made once more where no tensor has to be looked at as a whole
    usual = usual + BLOCK if any(entry.program.elementwise for entry in again) else 0
    checking = max(usual, exact) + _runs(needs, 0) + max((one.whole for one in needs), default=0)
    digests = sum(entry.meta.bytes * (1 + len(entry.program.leaves)) for entry in plan.entries) // CELL * DIGEST
    always = PROGRAM + TENSOR * tensors + (1 + JOURNAL) * digests
    return always + max(merging + max(processes, 1) * cached(plan), CHECKED + THREAD + checking + cached(plan))


def _runs(needs: Sequence[Memory], rounding: int) -> int:
    """What a thread takes for runs: of what is lent to it the most stays, the rest it asks for when it needs it."""
    return max((one.lent for one in needs), default=0) + max((one.asked for one in needs), default=0) + rounding
