"""Work that is done once for all who ask; of work ahead, see test_hashes.py."""

import threading
import time

import pytest

from tuner.data.ahead import Latest, ahead


def test_what_many_threads_ask_for_is_worked_out_once_and_the_latest_are_kept():
    done: list[int] = []

    def work(key: int) -> int:
        done.append(key)
        time.sleep(0.002)
        return -key

    latest = Latest(work, keep=4)
    results = [result() for result in ahead([i // 6 for i in range(60)], latest, threads=8)]
    assert results == [-(i // 6) for i in range(60)] and sorted(done) == list(range(10))
    latest(9), latest(0)
    assert sorted(done) == [0, *range(10)]  # the last was kept, the first was not


def test_what_it_raises_comes_to_all_who_asked():
    started = threading.Event()

    def work(key: str) -> None:
        started.wait(0.02)
        raise ValueError(key)

    latest = Latest(work, keep=2)
    for result in ahead(["bad"] * 5, latest, threads=5):
        with pytest.raises(ValueError, match="bad"):
            result()
