"""`tuner cache`: what it counts, finds damaged and removes."""

import os
from pathlib import Path

import pytest
import torch

from tuner.cli import main
from tuner.data.cache import Cache, address


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = Cache(tmp_path / "cache")
    for index in range(6):
        made.write(address(index=index), {"mean": torch.full((4, 8, 8), float(index)), "std": torch.ones(4, 8, 8)})
        os.utime(made.path(address(index=index)), (1000 + index, 1000 + index))
    made.write(address(caption="x"), {"tokens": torch.ones(77, 32)})
    return made


def there(cache: Cache) -> list[int]:
    return [index for index in range(6) if cache.path(address(index=index)).exists()]


def test_the_list_counts_entries_and_bytes_by_kind(cache, capsys):
    (cache.folder / "pictures" / "abc").mkdir(parents=True)
    (cache.folder / "pictures" / "abc" / "a.png").write_bytes(b"x" * 5000)
    assert main(["cache", "list", "--folder", str(cache.folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "captions 1 entries" in said and "latents 6 entries" in said and "unpacked pictures 1 entries" in said
    size = sum(file.stat().st_size for file in cache.folder.rglob("*") if file.is_file())
    assert f"{size / 1e9:.3f} GB in 8 entries" in said


def test_flipped_bits_are_found_and_removed_where_asked_for(cache, capsys):
    assert main(["cache", "verify", "--folder", str(cache.folder)]) == 0
    path = cache.path(address(index=3))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert main(["cache", "verify", "--folder", str(cache.folder)]) == 3
    assert f"damaged: {path}" in capsys.readouterr().out and path.exists()
    assert main(["cache", "verify", "--remove", "--folder", str(cache.folder)]) == 0
    assert there(cache) == [0, 1, 2, 4, 5]
    assert main(["cache", "verify", "--folder", str(cache.folder)]) == 0


def test_pruning_keeps_what_was_asked_for_last(cache):
    one = cache.path(address(index=0)).stat().st_size
    caption = cache.path(address(caption="x")).stat().st_size
    assert cache.has(address(index=1))  # a run that finds it marks it as used
    (cache.folder / "00").mkdir(exist_ok=True)
    (cache.folder / "00" / "0.tmp-1").write_bytes(b"left over")
    assert main(["cache", "prune", "--keep", f"{caption + 3 * one}B", "--folder", str(cache.folder)]) == 0
    assert there(cache) == [1, 4, 5] and not (cache.folder / "00" / "0.tmp-1").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune"], "--keep goes with prune"),
        (["list", "--keep", "1GB"], "--keep goes with prune"),
        (["prune", "--keep", "much"], "'much' is no size"),
        (["list", "--remove"], "--remove goes with verify"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message, cache, capsys):
    assert main(["cache", *arguments, "--folder", str(cache.folder)]) == 2
    assert message in capsys.readouterr().err
    assert there(cache) == [0, 1, 2, 3, 4, 5]


def test_a_folder_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["cache", "--folder", str(tmp_path / "none")]) == 3
    assert "no such folder" in capsys.readouterr().err
