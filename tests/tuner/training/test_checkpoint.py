"""A checkpoint is whole or not there, and none that counts is ever lost."""

import itertools
import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import CheckpointError, DivergedError, ResourceError
from tuner.training.checkpoint import Checkpoints, flatten, unflatten


def save(saves: Checkpoints, place: int, value: float | None = None) -> Path:
    """A save of `place` that says so in every file."""
    value = place if value is None else value
    tensors = {"trainable": {"w": torch.full((64,), value)}, "optimizer": {"m": torch.full((3,), value)}}
    return saves.save(place, tensors, {"samples_seen": place, "value": value})


def newest(saves: Checkpoints) -> float:
    """The value of the newest whole save, the same in all its files."""
    found, _ = saves.newest()
    assert found is not None
    value = found.facts()["value"]
    assert (found.tensors("trainable")["w"] == value).all() and (found.tensors("optimizer")["m"] == value).all()
    return value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """The process is gone: whatever it would still do to the disk is not done."""


OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


@pytest.fixture
def kill_at(monkeypatch) -> Any:
    """`kill_at(n)`: before the n-th operation on the disk the process dies, and so none after it is done either."""
    state = {"left": -1}
    one_by_one = threading.Lock()  # files are written side by side

    def watched(operation: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with one_by_one:
                if state["left"] == 0:
                    raise Killed
                state["left"] -= 1
                return operation(*arguments, **named)

        return call

    def watched_file(*arguments: Any) -> Any:
        file = fdopen(*arguments)
        file.write = watched(file.write)
        return file

    fdopen = os.fdopen
    monkeypatch.setattr(os, "fdopen", watched_file)
    for name in OPERATIONS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))

    def begin(count: int) -> None:
        state["left"] = count

    return begin


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    ("there", "place", "value", "allowed"),
    [
        ([8], 16, 16, {8, 16}),  # the next save
        ([8, 16], 24, 24, {16, 24}),
        ([8, 16], 16, 17, {8, 16, 17}),  # the same place again, after going back
        ([16], 16, 17, {16, 17}),  # the same, and nothing else is there
    ],
)
def test_a_kill_at_any_point_of_a_save_leaves_the_older_or_the_newer_one_whole(
    keep, there, place, value, allowed, kill_at, tmp_path
):
    found: list[float] = []
    for point in itertools.count():
        saves = Checkpoints(folder=tmp_path / str(point), keep=keep)
        kill_at(-1)
        for older in there:
            save(saves, older)
        kill_at(point)
        try:
            save(saves, place, value)
        except Killed:
            kill_at(-1)
            found.append(newest(saves))
            assert save(saves, 32).name in names(saves.folder)  # and the next run's save works and tidies up
            assert newest(saves) == 32
            assert not [name for name in names(saves.folder) if name.startswith(".tmp") or name.endswith("~")]
            assert len(names(saves.folder)) <= keep
        else:
            kill_at(-1)
            break
    assert len(found) >= 20 and set(found) <= allowed  # a test that kills nothing proves nothing
    assert found[0] == max(there) and found[-1] == value  # and the newer one counts before the save is finished
    assert newest(saves) == value


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep, tmp_path):
    saves = Checkpoints(folder=tmp_path / "checkpoints", keep=keep)
    for place in range(8, 48, 8):
        save(saves, place)
        assert newest(saves) == place
    assert names(saves.folder) == [f"samples-{place:010d}" for place in range(8, 48, 8)][-keep:]


def test_strays_neither_count_nor_crash(tmp_path):
    saves = Checkpoints(folder=tmp_path, keep=1)
    for stray in ("samples-7abc", "samples-99999999999", "checkpoint-old", "samples-"):
        (tmp_path / stray).mkdir()
    (tmp_path / "samples-0000000099").write_text("a file")
    assert saves.newest() == (None, [])
    save(saves, 8)
    save(saves, 16)
    assert newest(saves) == 16
    assert len(names(tmp_path)) == 6, "a stray was removed, or an old save was not"


def truncated(folder: Path) -> None:
    file = folder / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flipped(folder: Path) -> None:
    """One bit of a weight: the size is right, the content is not."""
    file = folder / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def traversing(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.copy(folder / "state.json", folder.parent.parent / "outside.json")
    manifest["../../outside.json"] = manifest["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "truncated": truncated,
    "one bit": flipped,
    "emptied": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "a file gone": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "state gone": lambda folder: (folder / "state.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest garbage": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest of nothing": lambda folder: (folder / "manifest.json").write_text("{}"),
    "manifest of numbers": lambda folder: (folder / "manifest.json").write_text('{"state.json": 3}'),
    "manifest that leads out": traversing,
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a folder for a file": lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_whole_is_skipped_with_a_line_and_refused_by_name(damage, tmp_path):
    saves = Checkpoints(folder=tmp_path / "checkpoints", keep=3)
    save(saves, 8)
    torn = save(saves, 16)
    damage(torn)
    found, skipped = saves.newest()
    assert found is not None and found.samples_seen == 8 and newest(saves) == 8
    assert len(skipped) == 1 and str(torn) in skipped[0] and "\n" not in skipped[0]
    assert "remove" in skipped[0]
    with pytest.raises(CheckpointError, match="samples-0000000016"):
        Checkpoints.open(torn)


def test_what_came_to_lie_on_the_disk_otherwise_than_it_was_meant_is_noticed(tmp_path, monkeypatch):
    """Nothing is read back while saving: the hashes are of what was to be written."""
    saves = Checkpoints(folder=tmp_path, keep=3)
    save(saves, 8)
    fdopen = os.fdopen

    def forgetful(*arguments: Any) -> Any:
        file = fdopen(*arguments)
        write = file.write
        file.write = lambda chunk: write(bytes(len(chunk)) if len(chunk) == 512 else chunk)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", forgetful)
        save(saves, 16)
    found, skipped = saves.newest()
    assert found is not None and found.samples_seen == 8
    assert len(skipped) == 1 and "trainable.safetensors: not what was saved" in skipped[0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/checkpoints/samples-0000000008: cannot be written: .*; choose"):
        save(Checkpoints(folder=tmp_path / "file" / "checkpoints"), 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_single_value_that_is_not_finite_is_found(value, dtype, tmp_path):
    weights = torch.zeros(3, 5, dtype=dtype)
    weights[1, 2] = value
    empty = torch.zeros(0, dtype=dtype)
    with pytest.raises(DivergedError, match=r"samples-0000000008/optimizer\.safetensors: m: holds NaN or infinity"):
        Checkpoints(folder=tmp_path).save(8, {"optimizer": {"empty": empty, "m": weights}}, {"samples_seen": 8})
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", [truncated, DAMAGES["no manifest"], DAMAGES["an empty folder"]])
def test_what_is_not_whole_takes_no_other_saves_place(damage, tmp_path):
    saves = Checkpoints(folder=tmp_path, keep=2)
    save(saves, 8)
    damage(save(saves, 16))
    save(saves, 24)
    assert names(tmp_path) == ["samples-0000000008", "samples-0000000024"]
    (tmp_path / "samples-9999999999").mkdir()  # a torn one that seems to be the newest
    save(saves, 32)
    assert names(tmp_path) == ["samples-0000000024", "samples-0000000032"] and newest(saves) == 32


def test_a_run_that_went_back_leaves_its_abandoned_future_behind(tmp_path):
    saves = Checkpoints(folder=tmp_path, keep=2)
    for place in (8, 16, 24):
        save(saves, place)
    save(saves, 20, value=-1.0)  # gone on from 16
    assert newest(saves) == -1.0 and names(tmp_path) == ["samples-0000000016", "samples-0000000020"]


def test_nothing_is_left_of_a_save_with_a_value_that_is_not_finite(tmp_path):
    saves = Checkpoints(folder=tmp_path)
    save(saves, 8)
    with pytest.raises(DivergedError, match="w: holds NaN or infinity"):
        save(saves, 16, value=float("nan"))
    assert names(tmp_path) == ["samples-0000000008"] and newest(saves) == 8


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """`full_disk(n)`: no file can grow past n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_save_and_nothing_else(tmp_path, full_disk):
    saves = Checkpoints(folder=tmp_path, keep=1)
    save(saves, 8)
    full_disk(300)
    with pytest.raises(
        ResourceError, match=r"larger than a file may be here: needed \d+ bytes, and .* allows this process 300"
    ):
        save(saves, 16)
    full_disk(resource.RLIM_INFINITY)
    assert names(tmp_path) == ["samples-0000000008"] and newest(saves) == 8
    save(saves, 16)
    assert newest(saves) == 16


def test_a_checkpoint_holds_nothing_that_can_be_executed(tmp_path):
    folder = save(Checkpoints(folder=tmp_path), 8)
    assert names(folder) == ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]
    assert not any(file.stat().st_mode & 0o111 for file in folder.iterdir())


def tensors() -> st.SearchStrategy[torch.Tensor]:
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
    shape = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(
        lambda dtype, shape: torch.arange(27)[: int(torch.tensor(shape).prod())].reshape(shape).to(dtype), dtypes, shape
    )


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
keys = st.integers(0, 3) | st.sampled_from(["0", "1", "a", "a.b", "", "tensor", "items", "list", "tuple", "a#1"])
nests = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def equal(left: Any, right: Any) -> bool:
    """Equal in every value, type, dtype and order of keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


@given(nests)
@settings(deadline=None)
def test_unflatten_is_the_inverse_of_flatten_through_json(nest):
    text, found = flatten(nest)
    assert equal(unflatten(json.loads(json.dumps(text)), found), nest)


def test_unflatten_is_the_inverse_of_flatten_through_a_file(tmp_path):
    nest = {
        1: torch.tensor([1.5]),
        "1": torch.tensor([2.5]),
        "groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "step": torch.tensor(3.0)}],
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    }
    text, found = flatten(nest)
    folder = Checkpoints(folder=tmp_path).save(8, {"x": found}, {"samples_seen": 8, "x": text})
    saved = Checkpoints.open(folder)
    assert equal(unflatten(saved.facts()["x"], saved.tensors("x")), nest)


def test_what_json_cannot_say_is_not_saved_in_another_way():
    with pytest.raises(TypeError, match=r"state\.hook: a function cannot be saved"):
        flatten({"state": {"hook": lambda: None}})
