import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tuner.errors import DivergedError, ResourceError
from tuner.weights import writer
from tuner.weights.store import DTYPES, SafetensorsFile
from tuner.weights.writer import atomic_write_bytes, atomic_write_text, chunks, save_safetensors, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(3, 2).abs().to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "a view": torch.randn(4, 6).t()[1:3],
        "learnt": torch.randn(2, requires_grad=True),
    }


def test_what_is_written_is_read_by_the_reference_reader(tmp_path: Path) -> None:
    tensors = tensors_of_every_kind()
    save_safetensors(tmp_path / "x.safetensors", tensors, {"b": "2", "a": "värde"})
    for read in (safetensors.torch.load_file(tmp_path / "x.safetensors"),):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert torch.equal(read[name].double(), tensor.double())
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"a": "värde", "b": "2"}
    assert all(file.header.offsets[name] % file.metas[name].dtype.itemsize == 0 for name in tensors)
    assert b"".join(chunks(tensors, {"b": "2", "a": "värde"})) == (tmp_path / "x.safetensors").read_bytes()


def test_the_bytes_do_not_depend_on_the_order_given(tmp_path: Path) -> None:
    tensors = tensors_of_every_kind()
    save_safetensors(tmp_path / "1", tensors, {"b": "2", "a": "1"})
    save_safetensors(tmp_path / "2", dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_the_old_file_stays(dtype: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    bad = torch.tensor([1.0, value]).to(DTYPES[dtype])
    with pytest.raises(DivergedError, match=r"x\.safetensors: bad: "):
        save_safetensors(path, {"a": torch.ones(3, dtype=torch.float64), "bad": bad})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "x", "text\r\n")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "x").read_bytes() == b"text\r\n"


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "x")
    atomic_write_bytes(tmp_path / "link", b"1")
    atomic_write_bytes(tmp_path / "link", b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "x").read_bytes() == b"2"
    assert names(tmp_path / "elsewhere") == ["x"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "x", tmp_path / "none" / "x", tmp_path / "folder"):
        with pytest.raises(ResourceError, match=place.name):
            atomic_write_bytes(place, b"1")
    assert names(tmp_path) == ["file", "folder"]


def in_a_child(code: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_both_sizes_and_nothing_is_lost(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"x: disk is full: needed 3 bytes, \d+ bytes are free; free some space"):
        atomic_write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_file_that_the_system_allows_no_room_is_said_with_the_limit_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    code = (
        "from pathlib import Path; from tuner.errors import ResourceError; from tuner.weights.writer import *\n"
        "try: atomic_write_bytes(Path('x'), b'0' * 500_000)\n"
        "except ResourceError as error: print(error)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = in_a_child(code, tmp_path, preexec_fn=limit)
    assert "x: larger than a file may be here: needed 500000 bytes, and 'ulimit -f' allows" in done.stdout, done
    assert "100000; raise that limit" in done.stdout
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_kill_leaves_the_old_file_and_the_next_write_clears_up(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    code = (
        "import os, signal; from pathlib import Path; from tuner.weights.writer import whole_file\n"
        "with whole_file(Path('x')) as file:\n"
        "    file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert in_a_child(code, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_text() == "old"
    assert len(names(tmp_path)) == 2
    atomic_write_text(tmp_path / "x", "new")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "new"


def filled(folder: Path, text: str) -> None:
    with whole_folder(folder) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "x").write_text(text)


def killed_at(step: int, place: Path) -> None:
    """A process that replaces a folder, and is killed before the given one of its steps."""
    process = os.fork()
    if process:
        os.waitpid(process, 0)
        return
    left = step

    def count(event: str, arguments: object) -> None:
        nonlocal left
        if event in ("ctypes.dlopen", "os.rename", "shutil.rmtree"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        with whole_folder(place) as aside:
            (aside / "sub").mkdir()
            (aside / "sub" / "x").write_text("new")
            sys.addaudithook(count)
    finally:
        os._exit(0)


@pytest.mark.parametrize("exchange", ["names are exchanged", "names cannot be exchanged"])
@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(
    step: int, exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged, the next start puts back what is gone."""
    if "cannot" in exchange:
        monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
    there = tmp_path / "model" / "sub" / "x"
    filled(tmp_path / "model", "old")
    killed_at(step, tmp_path / "model")
    if "cannot" not in exchange:
        assert there.read_text() == ("old" if step == 0 else "new")
    writer.clear_up(tmp_path / "model")
    assert there.read_text() in ("old", "new")
    assert names(tmp_path) == ["model"]
    filled(tmp_path / "model", "newer")
    assert there.read_text() == "newer"
    assert names(tmp_path) == ["model"]


def test_what_is_left_of_another_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
    filled(tmp_path / "model-2", "old")
    killed_at(1, tmp_path / "model-2")
    left = names(tmp_path)
    filled(tmp_path / "model", "new")
    assert names(tmp_path) == sorted([*left, "model"])
    writer.clear_up(tmp_path / "model-2")
    assert (tmp_path / "model-2" / "sub" / "x").read_text() == "old"


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    class Breaks(dict[str, torch.Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.reads += name == "b"
            if self.reads > 1:  # the first is for the order; the header has been written by now
                raise KeyboardInterrupt
            return super().__getitem__(name)

    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path / "x", Breaks(a=torch.ones(2), b=torch.ones(2)))
    assert names(tmp_path) == []


def test_too_much_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="shorten"):
        save_safetensors(tmp_path / "x", {"w": torch.ones(1)}, {"tags": json.dumps(["tag"] * 500_000)})
