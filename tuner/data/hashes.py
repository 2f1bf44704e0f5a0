"""SHA-256 of files, remembered by path, size and time of change: a data set is read whole once, not at each start.

What changed in the last seconds is read again each time: a file may be written twice within one tick of its clock.
"""

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tuner.errors import DataError, ResourceError

SETTLED = 5.0
"""Seconds since a file changed, from which on its time of change tells it from any later one."""
READERS = 4
"""Files that are read at once."""


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def file_hashes(files: Sequence[Path], folder: Path, read_only: bool = False) -> list[str]:
    """SHA-256 of each file's bytes; what is known of it is kept in `folder`, which `read_only` leaves as it is.

    Raises:
        DataError: a file cannot be read.
        ResourceError: the folder cannot be written.
    """
    if read_only:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(file_hash, files))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "hashes.sqlite", timeout=60)) as kept, kept:
            kept.execute("create table if not exists hashes (path text primary key, stamp text, hash text)")
            return _through(kept, files)
    except sqlite3.Error as error:
        raise ResourceError(
            f"run.cache: {folder / 'hashes.sqlite'}: {error}; remove it, or name another cache"
        ) from error
    except OSError as error:
        raise ResourceError(f"run.cache: {folder}: cannot be written ({error.strerror}); name another cache") from error


def _through(kept: sqlite3.Connection, files: Sequence[Path]) -> list[str]:
    stamps = {file: _stamp(file) for file in files}
    known: dict[Path, str] = {}
    for file, stamp in stamps.items():
        row = kept.execute("select stamp, hash from hashes where path = ?", (str(file.resolve()),)).fetchone()
        if row is not None and stamp is not None and row[0] == stamp:
            known[file] = row[1]
    missing = [file for file in stamps if file not in known]
    with ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(missing, pool.map(file_hash, missing), strict=True))
    kept.executemany("insert or replace into hashes values (?, ?, ?)", _rows(found, stamps))
    return [known.get(file) or found[file] for file in files]


def _rows(found: dict[Path, str], stamps: dict[Path, str | None]) -> Iterable[tuple[str, str, str]]:
    for file, digest in found.items():
        stamp = stamps[file]
        if stamp is not None and stamp == _stamp(file):  # nobody wrote while it was read
            yield str(file.resolve()), stamp, digest


def _stamp(file: Path) -> str | None:
    """What tells that a file is still the same; None where it cannot be told yet."""
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    if abs(time.time() - stat.st_mtime) < SETTLED or abs(time.time() - stat.st_ctime) < SETTLED:
        return None
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"
