"""Looking after the cache: what is in it, whether it is whole, and making room."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tuner.data.cache import CHECKSUM, Cache, checksum
from tuner.errors import DataError
from tuner.weights.single_file import BASES

PICTURES = "pictures"
"""The folder in a cache that holds what was unpacked of archives, a folder each."""
KINDS = {"mean": "latents", "tokens": "captions", "bits": "looks"}
"""By a tensor that an entry of the kind has."""
Progress = Callable[[Sequence[str], str], Iterable[str]]


@dataclass(frozen=True)
class Entry:
    """Something in the cache that can be removed by itself."""

    path: Path
    kind: str
    bytes: int
    used: float
    """When it was last asked for, in seconds since 1970."""


def entries(folder: Path) -> Iterator[Entry]:
    """All that the cache in `folder` holds.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; runs make it, or name the one given as run.cache")
    for path in sorted(folder.glob("??/*.safetensors")):
        stat = path.stat()
        yield Entry(path, _kind(path), stat.st_size, stat.st_mtime)
    for path in [*sorted((folder / PICTURES).glob("*/")), *sorted((folder / BASES).glob("*/"))]:
        stats = [file.stat() for file in path.rglob("*") if file.is_file()]
        kind = "unpacked pictures" if path.parent.name == PICTURES else "single files as folders"
        yield Entry(path, kind, sum(s.st_size for s in stats), max((s.st_mtime for s in stats), default=0))
    for path in sorted(folder.glob("??/*.tmp-*")):
        stat = path.stat()
        yield Entry(path, "left by runs that were killed", stat.st_size, stat.st_mtime)


def damaged(folder: Path, progress: Progress) -> list[Path]:
    """Entries whose bytes are not those that were written; every one is read."""
    every = {str(entry.path): entry for entry in entries(folder) if entry.path.suffix == ".safetensors"}
    return [every[name].path for name in progress(list(every), "reading entries") if not _whole(every[name].path)]


def prune(found: Iterable[Entry], limit: int) -> list[Entry]:
    """What has to go so that at most `limit` bytes stay: what was not asked for the longest, and all that is left over.

    Nothing is removed here.
    """
    every = sorted(found, key=lambda entry: entry.used, reverse=True)
    going: list[Entry] = []
    kept = 0
    for entry in every:
        if entry.kind.startswith("left") or kept + entry.bytes > limit:
            going.append(entry)
        else:
            kept += entry.bytes
    return going


def remove(entry: Entry) -> None:
    """Take an entry out of the cache."""
    if entry.path.is_dir():
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        entry.path.unlink(missing_ok=True)


def _kind(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return next((KINDS[name] for name in file.keys() if name in KINDS), "others")  # noqa: SIM118
    except (OSError, SafetensorError):
        return "damaged"


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(CHECKSUM)
        return said == checksum(Cache(path.parent.parent).read(path.stem))
    except (OSError, SafetensorError, DataError):
        return False
