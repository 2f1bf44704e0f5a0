"""How the C library keeps memory between uses.

glibc gives pieces of memory back to the system when they are freed, or keeps them for the next use, by their size. Kept
ones of many sizes lie so that the next often fits none of them: a thread that works in runs then holds up to ten times
what it uses, differently each time. So within a merge all but small pieces go back at once. What is needed in every run
comes from `merge.scratch`, for which no page is asked twice; nothing large is left for the C library to keep.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator

KEPT = 64 << 10
"""Bytes of the largest pieces that are kept."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names for the two numbers, from <malloc.h>."""
DEFAULT = 128 << 10
"""What they are otherwise; by themselves they grow with what is used."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep only small pieces meanwhile, and give them back in the end; nothing happens where there is no glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, KEPT)
    libc.mallopt(TRIM_THRESHOLD, 1 << 30)
    libc.malloc_trim(0)
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
