import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tuner.data.cache import Cache, address, default_folder
from tuner.errors import ResourceError

KEY = address(what="a picture")


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"mean": torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)), "std": torch.ones(4, 8, 8)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_read_is_what_was_written(dtype, tmp_path: Path):
    cache = Cache(tmp_path / "in a folder" / "写真")
    tensors = {name: tensor.to(dtype) for name, tensor in values().items()}
    assert not cache.has(KEY)
    cache.write(KEY, tensors)
    assert cache.has(KEY) and same(cache.read(KEY), tensors)
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [f"{KEY}.safetensors"]


def test_an_address_tells_every_input_apart():
    addresses = {
        address(**inputs)
        for inputs in (
            {"picture": "a", "flip": True},
            {"picture": "a", "flip": False},
            {"picture": "b", "flip": True},
            {"picture": "a"},
            {"picture": "a", "flip": None},
            {"picture": "a", "flip": "True"},
            {"pictures": "a", "flip": True},
            {"picture": "a", "flip": True, "bucket": (8, 16)},
            {"picture": "a", "flip": True, "bucket": (16, 8)},
        )
    }
    assert len(addresses) == 9
    assert address(a=1, b=2) == address(b=2, a=1)


@pytest.mark.parametrize("torn", ["nothing", "half", "a byte short", "a byte more", "zeros", "no tensors", "text"])
def test_a_torn_entry_counts_as_absent_and_is_replaced(torn, tmp_path: Path):
    cache = Cache(tmp_path)
    cache.write(KEY, values())
    path = cache.path(KEY)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "nothing": b"",
            "half": whole[: len(whole) // 2],
            "a byte short": whole[:-1],
            "a byte more": whole + b"\0",
            "zeros": bytes(len(whole)),
            "no tensors": (2).to_bytes(8, "little") + b"{}",
            "text": b"<html>",
        }[torn]
    )
    assert not cache.has(KEY)
    cache.write(KEY, values())
    assert cache.has(KEY) and path.read_bytes() == whole


def test_a_folder_in_an_entrys_place_counts_as_absent(tmp_path: Path):
    Cache(tmp_path).path(KEY).mkdir(parents=True)
    assert not Cache(tmp_path).has(KEY)


WRITER = """
import sys, torch
from pathlib import Path
from tuner.data.cache import Cache
cache, key = Cache(Path(sys.argv[1])), sys.argv[2]
tensors = {"mean": torch.full((64, 64, 16), 3.0)}
print("ready", flush=True)
sys.stdin.readline()
for _ in range(300):
    cache.write(key, tensors)
"""


def test_two_processes_may_write_the_same_entry_while_a_third_reads_it(tmp_path: Path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    cache, reads = Cache(tmp_path), 0
    while any(writer.poll() is None for writer in writers):
        if cache.has(KEY):
            reads += 1
            assert torch.equal(cache.read(KEY)["mean"], torch.full((64, 64, 16), 3.0))
    for writer in writers:
        assert writer.communicate()[0] == "" and writer.returncode == 0
    assert reads > 10
    assert [path.name for path in cache.path(KEY).parent.iterdir()] == [f"{KEY}.safetensors"]


def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(tmp_path: Path):
    cache = Cache(tmp_path)
    cache.write(KEY, values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for key in (KEY, address(what="another")):
            with pytest.raises(ResourceError, match=r"larger than a file may be here: needed \d+ bytes, and"):
                cache.write(key, values(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(cache.read(KEY), values())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.safetensors"]


def test_a_cache_that_is_no_folder_is_named(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ResourceError, match=r"run.cache: .*: cannot be written: Not a directory; choose another"):
        Cache(tmp_path / "cache").write(KEY, values())


def test_the_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("TUNER_CACHE", "/somewhere/else")
    assert default_folder() == Path("/somewhere/else")
    monkeypatch.delenv("TUNER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/tuner")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "tuner"
