import json
import struct
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.errors import DataError, UnsafeError, UserError
from tuner.weights.store import DTYPES, SafetensorsFile, ShardedFile, TensorMeta, check_model_folder, read_location
from tuner.weights.writer import save_safetensors


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(
    begin: int = 0, end: int = 8, dtype: object = "F32", shape: object = (2,), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


DATA = b"\0" * 8
TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
DAMAGED = {
    "empty": (b"", "bytes long"),
    "a length and nothing else": (struct.pack("<Q", 2), "bytes long"),
    "zero length": (raw({"w": entry()}, DATA, length=0), "does not start"),
    "length past the end": (raw({"w": entry()}, DATA, length=10_000), "ends inside its header"),
    "enormous length": (raw({"w": entry()}, DATA, length=1 << 62), "at most"),
    "length above the cap": (raw({"w": entry()}, DATA, length=90_000_000), "at most"),
    "no JSON": (raw(b'{"w":', DATA), "no valid JSON"),
    "no UTF-8": (raw(b'{"\xff":1}', DATA), "no valid JSON"),
    "a list": (raw(b"[]", DATA), "does not start"),
    "deep nesting": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "no valid JSON"),
    "NaN": (raw(b'{"w":NaN}', DATA), "NaN is no JSON"),
    "a name twice": (raw(TWICE, DATA), "'w' is given twice"),
    "an entry that is no table": (raw({"w": 1}, DATA), "'w'"),
    "no offsets": (raw({"w": {"dtype": "F32", "shape": [2]}}, DATA), "'w'"),
    "an unknown field": (raw({"w": entry(other=1)}, DATA), "'w'"),
    "an unknown dtype": (raw({"w": entry(dtype="F12")}, DATA), "'w': unknown dtype 'F12'"),
    "a dtype that is no text": (raw({"w": entry(dtype=[1])}, DATA), "'w': unknown dtype"),
    "a negative size": (raw({"w": entry(shape=[-2])}, DATA), "'w'"),
    "a size that is a fraction": (raw({"w": entry(shape=[2.0])}, DATA), "'w'"),
    "a size that is a truth": (raw({"w": entry(end=4, shape=[True])}, DATA[:4]), "'w'"),
    "sizes that overflow": (raw({"w": entry(shape=[1 << 62, 1 << 62])}, DATA), "'w'"),
    "a size that no machine has": (raw({"w": entry(end=0, shape=[0, 1 << 64])}), "'w'"),
    "offsets backwards": (raw({"w": entry(8, 0)}, DATA), "'w'"),
    "three offsets": (raw({"w": {**entry(), "data_offsets": [0, 4, 8]}}, DATA), "'w'"),
    "a shape that does not fill it": (raw({"w": entry(shape=[3])}, DATA), "'w': F32 of shape"),
    "a gap": (raw({"w": entry(), "x": entry(12, 20)}, b"\0" * 20), "'x': leaves a gap of 4"),
    "a gap at the start": (raw({"w": entry(8, 16)}, b"\0" * 16), "'w': leaves a gap"),
    "an overlap": (raw({"w": entry(), "x": entry(4, 12)}, b"\0" * 12), "'x': overlaps"),
    "one byte short": (raw({"w": entry()}, DATA[:7]), "'w': "),
    "a quarter short": (raw({"w": entry(), "x": entry(8, 16)}, b"\0" * 12), "'x': "),
    "one byte more": (raw({"w": entry()}, DATA + b"\0"), "bytes long, expected"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}, "w": entry()}, DATA), "__metadata__"),
    "metadata that is no table": (raw({"__metadata__": [], "w": entry()}, DATA), "__metadata__"),
    "an escape in a name": (raw({"w\x1b[31m": entry()}, DATA), r"\\x1b"),
    "a line end in a name": (raw({"w\nerror": entry()}, DATA), "control characters"),
    "half a surrogate in a name": (
        raw(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", DATA),
        "control characters",
    ),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>\n<body>404</body></html>", "web page"),
    "a GGUF file": (b"GGUF" + b"\x03" + b"\0" * 40, "GGUF"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_refused_by_name_at_once(fault: str, tmp_path: Path) -> None:
    content, message = DAMAGED[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(DataError, match=message) as caught:
        _ = SafetensorsFile(path).metas
    assert "model.safetensors" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert time.perf_counter() - start < 1


def test_a_pickle_is_refused_as_unsafe_and_not_opened(tmp_path: Path) -> None:
    zipped, plain, legacy = (tmp_path / name for name in ("zip.safetensors", "plain.safetensors", "legacy.safetensors"))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")
    plain.write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01K\x01s." + b"\0" * 50)
    torch.save({"w": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    for path in (zipped, plain, legacy):
        with pytest.raises(UnsafeError, match="pickle"):
            _ = SafetensorsFile(path).metas


@pytest.mark.parametrize("length", [0x3C, 0x280 + 0x00, 0x0480, 0x133C, 0x100280])
def test_a_header_whose_length_looks_like_another_format_is_read(length: int, tmp_path: Path) -> None:
    text = json.dumps({"w": entry()}, separators=(",", ":")).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(text.ljust(length), DATA))
    assert SafetensorsFile(path).metas == {"w": TensorMeta((2,), torch.float32)}


def test_what_others_write_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        name: torch.randn(3, 2).to(dtype) if dtype != torch.bool else torch.tensor([True, False])
        for name, dtype in DTYPES.items()
    }
    tensors |= {"a scalar": torch.tensor(1.5), "nothing": torch.zeros(0, 4), "日本語": torch.ones(1)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"key": "värde"})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert set(file.metas) == set(tensors)
    assert file.metadata == {"key": "värde"}
    for name, tensor in tensors.items():
        assert file.metas[name] == TensorMeta(tuple(tensor.shape), tensor.dtype)
        got = file.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"w": torch.ones(4)})
    file = SafetensorsFile(path)
    assert torch.equal(file.read("w"), torch.ones(4))
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"\0", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="changed its size"):
            file.read("w")
    path.write_bytes(whole)
    place = replace(file.locate("w"), offset=len(whole) - 4)  # as if it shrank between the look and the reading
    with pytest.raises(DataError, match="'w': 4 of 16 bytes could be read"):
        read_location(place, "w")
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        file.read("w")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        _ = SafetensorsFile(tmp_path / "none.safetensors").metas
    with pytest.raises(DataError, match="a folder"):
        _ = SafetensorsFile(tmp_path).metas


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=4)), max_size=3),
    cut=st.integers(-20, 5),
)
def test_any_damage_is_refused_or_read_as_the_reference_does(
    changes: list[tuple[int, bytes]], cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}, {"key": "text"})
    content = bytearray(path.read_bytes())
    for place, bits in changes:
        content[place : place + len(bits)] = bits
    path.write_bytes(content[:cut] if cut < 0 else content + b"0" * cut)
    try:
        ours = {name: SafetensorsFile(path).read(name) for name in SafetensorsFile(path).metas}
    except UserError:
        return
    theirs = safetensors.torch.load_file(path)
    assert {name: (t.dtype, t.shape, bytes_of(t)) for name, t in ours.items()} == {
        name: (t.dtype, t.shape, bytes_of(t)) for name, t in theirs.items()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def sharded(folder: Path, weight_map: dict[str, str], **shards: list[str]) -> ShardedFile:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, names in shards.items():
        save_safetensors(folder / f"{shard}.safetensors", {name: torch.full((2,), 1.0) for name in names})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return ShardedFile(index)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    store = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=["a"], two=["b"])
    assert set(store.metas) == {"a", "b"}
    assert torch.equal(store.read("b"), torch.ones(2))


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"]
)
def test_an_index_that_points_elsewhere_is_unsafe(place: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    with pytest.raises(UnsafeError, match="no plain file name"):
        _ = sharded(tmp_path / "model", {"a": place}).metas


def test_a_shard_that_is_a_link_out_of_its_folder_is_unsafe(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    store = sharded(tmp_path / "model", {"a": "one.safetensors"})
    for target in (tmp_path / "secret.safetensors", Path("../secret.safetensors")):
        (tmp_path / "model" / "one.safetensors").symlink_to(target)
        with pytest.raises(UnsafeError, match="leads out of its model's folder"):
            _ = store.metas
        (tmp_path / "model" / "one.safetensors").unlink()
    save_safetensors(tmp_path / "model" / "real.safetensors", {"a": torch.ones(1)})
    (tmp_path / "model" / "one.safetensors").symlink_to("real.safetensors")
    assert store.read("a").item() == 1


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid 1\n", b"<!DOCTYPE html>", b"x"])
def test_a_shard_or_index_that_is_something_else_is_named(content: bytes, tmp_path: Path) -> None:
    store = sharded(tmp_path, {"a": "one.safetensors"})
    (tmp_path / "one.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"one\.safetensors: "):
        _ = store.metas
    store.index.write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: "):
        _ = ShardedFile(store.index).metas


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"weight_map":[]}',
        '{"weight_map":{"a":1}}',
        '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}',
    ],
)
def test_an_index_that_is_no_table_of_files_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json: "):
        _ = ShardedFile(tmp_path / "model.safetensors.index.json").metas


def test_shards_that_do_not_agree_with_their_index_are_refused(tmp_path: Path) -> None:
    faults = {
        "is missing": sharded(tmp_path / "1", {"a": "gone.safetensors"}),
        "is in both": sharded(
            tmp_path / "2", {"a": "one.safetensors", "b": "two.safetensors"}, one=["a"], two=["a", "b"]
        ),
        "does not say": sharded(tmp_path / "3", {"a": "one.safetensors"}, one=["a", "b"]),
        "is not in": sharded(tmp_path / "4", {"a": "one.safetensors", "b": "one.safetensors"}, one=["a"]),
    }
    for message, store in faults.items():
        with pytest.raises(DataError, match=message):
            _ = store.metas


def test_a_model_folder_is_looked_through(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_safetensors(tmp_path / "unet" / "model.safetensors", {"a": torch.ones(1)})
    (tmp_path / "unet" / "model.bin").write_bytes(b"the same as a pickle, which nobody will read")
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "safety_checker" / "model.bin").write_bytes(b"of no concern, as it is never opened")
    check_model_folder(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeError, match=r"model\.bin"):
        check_model_folder(tmp_path)
    (tmp_path / "vae" / "model.bin").unlink()
    sharded(tmp_path / "text_encoder", {"a": "../unet/model.safetensors"})
    with pytest.raises(UserError, match="no plain file name"):
        check_model_folder(tmp_path)
