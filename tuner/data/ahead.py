"""Work that others wait for, done ahead of them in threads: reading and decoding, which do not hold Python's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def workers() -> int:
    """How many threads are worth it: the cores that this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def ahead(items: Iterable[T], work: Callable[[T], U], threads: int | None = None) -> Iterator[Callable[[], U]]:
    """For each item, in order, what gives `work` of it, or raises what it raised; some are worked on beforehand.

    At most two items a thread are held, so memory does not grow with their number.
    """
    count = threads or workers()
    with ThreadPoolExecutor(count, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[U]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result
            while waiting:
                yield waiting.popleft().result
        finally:
            for future in waiting:
                future.cancel()
