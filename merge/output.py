"""The file that is being made: unfinished under another name, whole under its own."""

import contextlib
import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge.journal import Journal, unsaved
from merge.plan import ALIGNMENT
from tuner.errors import ConfigError, LockedError, ResourceError
from tuner.weights.writer import resource_error, sync_folder

BLOCK = 4 << 20
"""Bytes of the output that are worked out and written at once."""
WRITERS = 2
"""Threads of each process that wait for the disk meanwhile; one alone does not keep it busy."""
ENDING = 1.0
"""Seconds that the workers of a merge that was killed may take to end."""
DIRECT_BYTES = 256 << 20
"""Outputs from this size on bypass the page cache: they would push the inputs out of it."""


class Output:
    """The unfinished file, its journal, and which blocks are in it."""

    def __init__(self, value_bytes: int, place: Path, header_bytes: int, key: str, resume: bool) -> None:
        self.place = place
        self.part, self.journal = unfinished(place)
        self.header_bytes = header_bytes
        self.key = key
        self.blocks = -(-value_bytes // BLOCK)
        self.done: set[int] = set()
        self.digests: Mapping[str, str] = {}
        self.closed = False
        self.direct: int | None = None
        if not place.parent.is_dir():
            raise ResourceError(f"{place.parent}: no such folder; make it, or choose another output")
        if place.is_dir():
            raise ResourceError(f"{place}: a folder of that name exists; choose another output")
        saved = Journal.load(self.journal) if resume and self.part.is_file() else None
        if resume and saved is not None and saved.key != key:
            raise ConfigError(f"{self.journal}: is of another merge, or an input has changed; merge without --resume")
        try:
            self.file = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise resource_error(place, error, value_bytes) from error
        try:
            lock(self.file, place)
            if saved is None or os.fstat(self.file).st_size != header_bytes + value_bytes:
                os.ftruncate(self.file, 0)
                self._remove_journal()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self.file, 0, header_bytes + value_bytes)
                else:
                    os.ftruncate(self.file, header_bytes + value_bytes)
            else:
                self.done = set(saved.done)
                self.digests = saved.digests
            if value_bytes >= DIRECT_BYTES and hasattr(os, "O_DIRECT"):
                with contextlib.suppress(OSError):  # not every file system takes direct writes
                    self.direct = os.open(self.part, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            self.discard()
            self.close()
            raise resource_error(place, error, value_bytes) from error
        except LockedError:
            self.close()
            raise

    def write(self, block: int, data: memoryview) -> None:
        """Put a block at its place; `data` begins at a page of memory."""
        offset = self.header_bytes + block * BLOCK
        if self.direct is not None and len(data) % ALIGNMENT == 0:
            try:
                _write_all(self.direct, data, offset)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system wants another alignment
                    raise
        _write_all(self.file, data, offset)

    def read(self, offset: int, size: int) -> bytes:
        """Values that have been written, from `offset` in the values on."""
        return os.pread(self.file, size, self.header_bytes + offset)

    def sync(self) -> None:
        """Bring everything written to the disk."""
        os.fsync(self.file)

    def save(self, done: Sequence[int], digests: Mapping[str, str]) -> None:
        """Bring everything written to the disk, then say so in the journal."""
        self.sync()
        Journal(self.key, done, digests).save(self.journal)

    def finish(self, header: bytes) -> None:
        """Write the header, bring all to the disk, and give the file its name."""
        _write_all(self.file, memoryview(header), 0)
        os.fsync(self.file)
        self.part.replace(self.place)
        self._remove_journal()
        sync_folder(self.place.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        self.part.unlink(missing_ok=True)
        self._remove_journal()

    def _remove_journal(self) -> None:
        self.journal.unlink(missing_ok=True)
        unsaved(self.journal).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file."""
        if not self.closed:
            self.closed = True
            os.close(self.file)
            if self.direct is not None:
                os.close(self.direct)


def unfinished(place: Path) -> tuple[Path, Path]:
    """Where the file at `place` is written until it is whole, and where its journal lies."""
    return place.with_name(f".{place.name}.part"), place.with_name(f".{place.name}.journal")


def lock(descriptor: int, place: Path) -> None:
    """Keep other processes out of an open file or folder, until it is closed; `place` is what it is to become.

    Raises:
        LockedError: another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return
    end = time.monotonic() + ENDING
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                say = f"{place}: another process is writing it; wait for that, or choose another output"
                raise LockedError(say) from error
        time.sleep(ENDING / 20)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
