import json
import zipfile
from pathlib import Path

import pytest
import torch

from tuner.errors import DataError, ResourceError, UnsafeError, UserError
from tuner.weights.checkpoint import open_store
from tuner.weights.folder import DiffusersFolder
from tuner.weights.store import SafetensorsFile, ShardedFile
from tuner.weights.writer import save_safetensors

W = {"w": torch.ones(2)}


def test_a_path_is_opened_by_what_is_there(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", W)
    save_safetensors(tmp_path / "X.SFT", W)
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    save_safetensors(tmp_path / "pipe" / "unet" / "model.safetensors", W)
    (tmp_path / "shards").mkdir()
    save_safetensors(tmp_path / "shards" / "one.safetensors", W)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "one.safetensors"}}))
    expected = {
        tmp_path / "x.safetensors": (SafetensorsFile, "w"),
        tmp_path / "X.SFT": (SafetensorsFile, "w"),
        tmp_path / "pipe": (DiffusersFolder, "unet.w"),
        tmp_path / "pipe" / "unet": (SafetensorsFile, "w"),
        tmp_path / "shards": (ShardedFile, "w"),
        index: (ShardedFile, "w"),
    }
    for path, (kind, name) in expected.items():
        store = open_store(path)
        assert isinstance(store, kind)
        assert torch.equal(store.read(name), W["w"])
        place = store.locate(name)
        assert place is not None and place.meta == store.metas[name]


def test_a_link_to_a_checkpoint_is_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    save_safetensors(tmp_path / "far" / "x.safetensors", W)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "far" / "x.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "unet").mkdir()
    save_safetensors(tmp_path / "far" / "unet" / "model.safetensors", W)
    assert open_store(tmp_path / "model.safetensors").metas
    assert open_store(tmp_path / "link").metas


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x.pth", "x.CKPT", "x.safetensors", "x"])
def test_a_pickle_is_refused_whatever_its_name_and_the_remedy_is_said(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(UnsafeError, match=rf"{name}: a pickle.*tuner convert"):
        open_store(tmp_path / name)


NO_CHECKPOINTS = {
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n", "git lfs pull"),
    "pointer.safetensors.index.json": (b"version https://git-lfs.github.com/spec/v1\noid 1\n", "git lfs pull"),
    "page.safetensors": (b"<!DOCTYPE html><html>\n<body>404</body></html>", "web page"),
    "model.gguf": (b"GGUF" + b"\x03" + b"\0" * 40, "GGUF"),
    "config.json": (b"{}", "no index of shards"),
    "notes.txt": (b"a text about something else", "not a safetensors file"),
    "empty.safetensors": (b"", "bytes long"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = NO_CHECKPOINTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_store(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ResourceError, match="cannot be read: Permission denied"):
        open_store(tmp_path)


def test_a_folder_without_a_model_names_the_file_that_could_be_meant(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a diffusers folder"):
        open_store(tmp_path)
    save_safetensors(tmp_path / "lora.safetensors", W)
    with pytest.raises(DataError, match=r"such as lora\.safetensors"):
        open_store(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_store(tmp_path / "nowhere")
