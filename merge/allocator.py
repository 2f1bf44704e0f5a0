"""How the C library keeps memory between uses.

glibc gives large pieces of memory back to the system as soon as they are free, and asks for them again a moment later.
Each page of them is then filled with zeros, and counted in at its first use, again and again: in a merge that costs as
much time as the arithmetic. So within a merge pieces up to `KEPT` bytes stay with their thread until it is over. Larger
ones, whole tensors, still come from the system and go back to it at once.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator

KEPT = 4 << 20
"""Bytes: a run of numbers in float64 has half as many."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names for the two numbers, from <malloc.h>."""
DEFAULT = 128 << 10
"""What they are otherwise; by themselves they grow with what is used."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory meanwhile, and give it back in the end; nothing happens where there is no glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, KEPT)
    libc.mallopt(TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, DEFAULT)
        libc.mallopt(TRIM_THRESHOLD, DEFAULT)
        libc.malloc_trim(0)


def private(size: int) -> mmap.mmap:
    """Memory that begins at a page, for this process alone; pages that are never used take none."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
