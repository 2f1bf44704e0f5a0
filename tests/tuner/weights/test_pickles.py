import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tuner.errors import DataError, UnsafeError, UserError
from tuner.weights.opcodes import MAX_INSTRUCTIONS
from tuner.weights.pickles import PickledFile
from tuner.weights.store import DTYPES, read_location

W = torch.arange(24.0).reshape(4, 6)


def tensors() -> dict[str, Tensor]:
    """Every dtype, and every way in which numbers can lie in a storage."""
    whole = {str(dtype): W.clamp(0, 1).to(dtype) for dtype in DTYPES.values()}
    return whole | {
        "a view": W[1:3],
        "its columns": W[:, 2:4],
        "transposed": W.t(),
        "every other": W[::2, ::3],
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "a row of one": W[2:3].t().contiguous().t(),
        "channels last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "a parameter": nn.Parameter(W.half()),
        "a frozen parameter": nn.Parameter(W.bfloat16(), requires_grad=False),
    }


def same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape or not ours.is_contiguous():
        return False
    raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return torch.equal(*raw)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_bit_for_bit(protocol: int, tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "x.ckpt", pickle_protocol=protocol)
    file = PickledFile(tmp_path / "x.ckpt")
    assert set(file.metas) == set(tensors()) and file.dropped == 0
    located = 0
    for name, theirs in tensors().items():
        assert same(file.read(name), theirs), name
        assert (file.metas[name].shape, file.metas[name].dtype) == (tuple(theirs.shape), theirs.dtype)
        if place := file.locate(name):
            assert same(read_location(place, name), theirs)
            located += 1
    assert located == len(tensors()) - 4
    with pytest.raises(KeyError):
        file.read("none")


def test_a_state_dict_of_a_module_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(module.state_dict(), tmp_path / "x.pth")  # with the versions of its layers as an attribute
    file = PickledFile(tmp_path / "x.pth")
    assert all(same(file.read(name), tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_what_a_trainer_adds_is_dropped_and_counted(wrapper: str, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "rates": [1.0, None, True, (1, 2, 3, 4), {"a", "b"}],
        "args": __import__("argparse").Namespace(seed=1),
        "where": Path("x"),
        "mean": __import__("numpy").float64(0.5),
        7: "a key that is no text",
        "optimizer": optimizer.state_dict(),
        wrapper: OrderedDict({"w": W, "version": 2, "names": ["a"]}),
    }
    torch.save(content, tmp_path / "x.ckpt")
    file = PickledFile(tmp_path / "x.ckpt")
    assert list(file.metas) == ["w"] and torch.equal(file.read("w"), W)
    assert file.dropped == 7 + 2


def test_objects_of_a_trainer_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("pytorch_lightning"), types.ModuleType("pytorch_lightning.callbacks")
    callback = type("Callback", (), {"__module__": module.__name__, "__init__": lambda self: self.__dict__.update(a=1)})
    module.Callback = callback  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"callbacks": {callback: callback()}, "state_dict": {"w": W}}, tmp_path / "x.ckpt")
    assert torch.equal(PickledFile(tmp_path / "x.ckpt").read("w"), W)


class Runs:
    """Runs `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


HOSTILE = {
    "a command": (lambda place: Runs(os.system, f"touch {place}"), "posix.system"),
    "an evaluation": (lambda place: Runs(eval, f"open({str(place)!r}, 'w')"), r"(__builtin__|builtins)\.eval"),
    "a process": (lambda place: Runs(subprocess.Popen, ["touch", str(place)]), r"(commands|subprocess)\.Popen"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_would_run_something_is_refused_by_its_name(
    kind: str, nested: bool, protocol: int, tmp_path: Path
) -> None:
    make, message = HOSTILE[kind]
    canary = tmp_path / "canary"
    content = {"state_dict": {"w": W, "x": make(canary)}} if nested else {"a": make(canary), "state_dict": {"w": W}}
    torch.save(content, tmp_path / "x.ckpt", pickle_protocol=protocol)
    with pytest.raises(UnsafeError, match=rf"x\.ckpt: would call .*{message}.*nothing was run"):
        _ = PickledFile(tmp_path / "x.ckpt").metas
    assert not canary.exists()


def test_a_pickle_without_an_archive_is_not_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"w": W}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in range(6):
        (tmp_path / f"{protocol}.ckpt").write_bytes(pickle.dumps(Runs(os.system, f"touch {canary}"), protocol))
    for path in tmp_path.glob("*.*"):
        with pytest.raises(UnsafeError, match="it is not opened"):
            _ = PickledFile(path).metas
    assert not canary.exists()


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> PickledFile:
    """An archive like torch's around the pickle `data`."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/version", "3\n")
        for key, content in (storages or {}).items():
            file.writestr(f"x/data/{key}", content)
    return PickledFile(path)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(
    shape: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,), offset: int = 0, elements: int = 2, key: str = "0"
) -> bytes:
    """The instructions that build one float32 tensor."""
    sizes = [b"(" + b"".join(map(number, items)) + b"t" for items in (shape, stride)]
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(elements) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes[0] + sizes[1] + b"\x89NtR"


def table(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


EIGHT = {"0": b"\0" * 8}


def test_the_instructions_of_these_tests_are_torchs(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.pt", table(w=tensor()), EIGHT)
    assert torch.equal(file.read("w"), torch.zeros(2))
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["w"], torch.zeros(2))


DAMAGED = {
    "past the end of its numbers": (table(w=tensor(shape=(3,))), EIGHT),
    "starts past the end": (table(w=tensor(offset=1)), EIGHT),
    "strides past the end": (table(w=tensor(stride=(1 << 40,))), EIGHT),
    "offset past the end": (table(w=tensor(shape=(1,), offset=1 << 62)), EIGHT),
    "a negative offset": (table(w=tensor(offset=-1)), EIGHT),
    "a negative stride": (table(w=tensor(stride=(-1,))), EIGHT),
    "a negative size": (table(w=tensor(shape=(-2,))), EIGHT),
    "one number repeated a trillion times": (table(w=tensor(shape=(1 << 40,), stride=(0,))), EIGHT),
    "a size that no machine has": (table(w=tensor(shape=(0, 1 << 63), stride=(1, 1))), EIGHT),
    "sizes and strides of other lengths": (table(w=tensor(shape=(2, 1))), EIGHT),
    "numbers missing": (table(w=tensor()), {}),
    "fewer numbers": (table(w=tensor()), {"0": b"\0" * 7}),
    "more numbers": (table(w=tensor()), {"0": b"\0" * 9}),
    "another place": (table(w=tensor(key="../0")), {"0": b"\0" * 8}),
    "a line end in a name": (table(**{"w\nerror": tensor()}), EIGHT),
    "no tensors": (table(a=b"N"), {}),
    "no table": (b"\x80\x02N.", {}),
    "something unknown in the table": (table(w=tensor(), x=b"ctorch\nGenerator\n)R"), EIGHT),
    "a storage of an unknown kind": (table(w=tensor().replace(b"FloatStorage", b"QInt8Storage")), EIGHT),
    "no storage": (table(w=b"NQ"), {}),
    "an empty stack": (b"\x80\x02R.", {}),
    "no mark": (b"\x80\x02t.", {}),
    "an unknown memory": (b"\x80\x02h\x05.", {}),
    "a memory far away": (b"\x80\x02Nr\xff\xff\xff\xff.", {}),
    "an extension": (b"\x80\x02\x82\x01.", {}),
    "an instance of old": (b"\x80\x02(ios\nsystem\n.", {}),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fa.", {}),
    "no end": (b"\x80\x02N", {}),
    "half an entry": (b"\x80\x02}(NNNu.", {}),
    "entries of a number": (b"\x80\x02K\x01(NNu.", {}),
    "items of a number": (b"\x80\x02K\x01Na.", {}),
    "nothing": (b"", {}),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_or_hostile_structure_is_refused_at_once(fault: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "x.pt", *DAMAGED[fault])
    start = time.process_time()
    with pytest.raises(DataError, match=r"x\.pt: ") as caught:
        _ = file.metas
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert time.process_time() - start < 1


def test_tensors_that_share_numbers_without_end_are_refused(tmp_path: Path) -> None:
    storages = {"0": b"\0" * 40_000}
    shared = tensor(shape=(10_000,), elements=10_000)
    assert len(archive(tmp_path / "2.pt", table(a=shared, b=shared), storages).metas) == 2
    many = table(**{f"w{index}": shared for index in range(100)})
    with pytest.raises(DataError, match="times as large as the file"):
        _ = archive(tmp_path / "100.pt", many, storages).metas


BOMBS = {
    "a million empty tables": lambda: b"\x80\x02" + b"}" * 15_000_000 + b".",
    "a long structure": lambda: b"\x80\x02" + text("x" * 17_000_000) + b".",
    "a number of many digits": lambda: b"\x80\x02\x8b" + struct.pack("<i", 12_000_000) + b"\x7f" * 12_000_000 + b".",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_little_memory_and_time(bomb: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "x.pt", BOMBS[bomb]())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match=r"do not use it|damaged|expected a checkpoint"):
        _ = file.metas
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000  # KiB
    assert MAX_INSTRUCTIONS < 15_000_000


def test_a_compressed_archive_is_refused_unopened(tmp_path: Path) -> None:
    storages = {"0": b"\0" * 200_000_000}
    data = table(w=tensor(shape=(50_000_000,), elements=50_000_000))
    file = archive(tmp_path / "x.pt", data, storages, compression=zipfile.ZIP_DEFLATED)
    del storages
    assert (tmp_path / "x.pt").stat().st_size < 1_000_000
    with pytest.raises(DataError, match=r"'x/data.pkl': compressed"):
        _ = file.metas
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as other:
        other.writestr("x/data.pkl", data)
        other.writestr("x/data/0", b"\0" * 200_000_000, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"'x/data/0': compressed"):
        _ = PickledFile(tmp_path / "y.pt").metas


def test_other_archives_are_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("notes.txt", "a text")
    with pytest.raises(DataError, match="not one of torch's"):
        _ = PickledFile(tmp_path / "x.zip").metas
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as file:
        for name in ("x/data.pkl", "x/constants.pkl"):
            file.writestr(name, table(w=tensor()))
    with pytest.raises(DataError, match="TorchScript"):
        _ = PickledFile(tmp_path / "script.pt").metas
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("x/data.pkl", table(w=tensor()))
        file.writestr("x/byteorder", "big")
    with pytest.raises(DataError, match="big-endian"):
        _ = PickledFile(tmp_path / "big.pt").metas


def test_an_archive_with_a_long_list_of_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        for index in range(200):
            file.writestr(f"{index}" + "x" * 30_000, b"")
    with pytest.raises(DataError, match="a list of files of"):
        _ = PickledFile(tmp_path / "x.pt").metas


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.arange(3.0), "b": W[:, 1].half()}, "epoch": 1}, buffer)
    return buffer.getvalue()


SAVED = saved()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SAVED)), st.binary(min_size=1, max_size=4)), max_size=3),
    cut=st.integers(-40, 5),
)
def test_any_damage_is_refused_or_read_as_torch_does(
    changes: list[tuple[int, bytes]], cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    content = bytearray(SAVED)
    for place, bits in changes:
        content[place : place + len(bits)] = bits
    path.write_bytes(content[:cut] if cut < 0 else content + b"0" * cut)
    try:
        file = PickledFile(path)
        ours = {name: file.read(name) for name in file.metas}
    except UserError:
        return
    try:
        theirs = torch.load(path, weights_only=True)["state_dict"]
    except Exception:  # torch looks at more of the file than its tensors
        return
    assert all(same(tensor, theirs[name]) for name, tensor in ours.items())
