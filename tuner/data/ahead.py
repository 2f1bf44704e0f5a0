"""Work that others wait for, done ahead of them in threads: reading and decoding, which do not hold Python's lock."""

import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
K = TypeVar("K", bound=Hashable)


def workers() -> int:
    """How many threads are worth it: the cores that this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


def ahead(items: Iterable[T], work: Callable[[T], U], threads: int | None = None) -> Generator[Callable[[], U]]:
    """For each item, in order, what gives `work` of it, or raises what it raised; some are worked on beforehand.

    At most two items a thread are held, so memory does not grow with their number. To be used within `closing`, which
    ends the threads: an error that is kept would hold them.
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


class Latest(Generic[K, U]):
    """Work that several threads ask for at about the same time: done once, and the latest few results are kept."""

    def __init__(self, work: Callable[[K], U], keep: int) -> None:
        self._work, self._keep, self._lock = work, keep, Lock()
        self._results: dict[K, Future[U]] = {}

    def __call__(self, key: K) -> U:
        """The work's result for `key`, or what it raised."""
        with self._lock:
            found = self._results.get(key)
            result = self._results[key] = found or Future()
            while len(self._results) > self._keep:
                del self._results[next(iter(self._results))]  # who waits for it has it in hand
        if found is None:
            try:
                result.set_result(self._work(key))
            except BaseException as error:
                result.set_exception(error)
        return result.result()
