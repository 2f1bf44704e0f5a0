"""What is remembered of files is never of other ones."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from tuner.data import hashes
from tuner.data.ahead import ahead
from tuner.data.hashes import file_hashes
from tuner.errors import DataError


def settled(file: Path, content: bytes, when: float = 1000.0) -> Path:
    file.write_bytes(content)
    os.utime(file, (when, when))
    return file


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files that are read."""
    seen: list[Path] = []
    plain = hashes.file_hash
    monkeypatch.setattr(hashes, "file_hash", lambda file: (seen.append(file), plain(file))[1])
    return seen


@pytest.fixture
def at_once(monkeypatch) -> None:
    """As if every file had changed long ago."""
    monkeypatch.setattr(hashes, "SETTLED", 0.0)


def test_a_file_is_read_once(tmp_path, read, at_once):
    files = [settled(tmp_path / f"写真 {i}.png", bytes([i])) for i in range(20)]
    expected = [hashlib.sha256(bytes([i])).hexdigest() for i in range(20)]
    assert file_hashes(files, tmp_path / "cache") == expected and len(read) == 20
    assert file_hashes(files[::-1], tmp_path / "cache") == expected[::-1] and len(read) == 20


@pytest.mark.parametrize("change", ["content", "time", "size", "another file"])
def test_a_file_that_changed_is_read_again(change, tmp_path, read, at_once):
    file = settled(tmp_path / "a", b"one")
    file_hashes([file], tmp_path / "cache")
    if change == "another file":
        settled(tmp_path / "b", b"two").replace(file)
    else:
        settled(file, b"three" if change == "size" else b"two", 2000.0 if change == "time" else 1000.0)
    assert file_hashes([file], tmp_path / "cache") == [hashlib.sha256(file.read_bytes()).hexdigest()]
    assert len(read) == 2


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path, read):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    for _ in range(2):
        file_hashes([file], tmp_path / "cache")
    assert len(read) == 2


def test_several_runs_may_ask_at_once(tmp_path, at_once):
    files = [settled(tmp_path / f"{i}", bytes([i])) for i in range(40)]
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(file_hashes(files, tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each == found[0] for each in found)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.png: cannot be read"):
        file_hashes([tmp_path / "gone.png"], tmp_path / "cache")


def test_work_ahead_keeps_the_order_raises_in_its_place_and_holds_little():
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        if item == 5:
            raise ValueError(item)
        return item * item

    results = ahead(range(50), work, threads=4)
    for item in range(50):
        give = next(results)
        assert len(begun) <= item + 10
        if item == 5:
            with pytest.raises(ValueError, match="5"):
                give()
        else:
            assert give() == item * item
    assert next(results, None) is None
