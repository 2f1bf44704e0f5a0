import json
from pathlib import Path

import pytest
import torch

from tuner.errors import DataError, UnsafeError
from tuner.weights.folder import DiffusersFolder
from tuner.weights.store import TensorMeta
from tuner.weights.writer import save_safetensors

VALUES = {
    "unet": {"conv_in.weight": torch.arange(4.0)},
    "vae": {"encoder.mid_block.attentions.0.to_q.weight": torch.arange(2.0)},
    "text_encoder": {"text_model.final_layer_norm.bias": torch.arange(3.0)},
}


def pipeline(folder: Path, name: str = "model", **changes: dict[str, torch.Tensor]) -> Path:
    """A folder in which every component has one file."""
    for component, tensors in {**VALUES, **changes}.items():
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text("{}")
        save_safetensors(folder / component / f"{name}.safetensors", tensors)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


def shard(folder: Path, name: str = "diffusion_pytorch_model", end: str = ".safetensors.index.json", fill: float = 1.0):
    """Two shards in `folder`, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {f"{letter}.weight": f"{name}-{letter}.safetensors" for letter in "ab"}
    for tensor, file in shards.items():
        save_safetensors(folder / file, {tensor: torch.full((2,), fill)})
    (folder / f"{name}{end}").write_text(json.dumps({"weight_map": shards}))


def test_every_component_is_read_by_canonical_names(tmp_path: Path) -> None:
    store = DiffusersFolder(pipeline(tmp_path))
    expected = {f"{folder}.{name}": tensor for folder, part in VALUES.items() for name, tensor in part.items()}
    assert store.metas == {name: TensorMeta(tuple(t.shape), t.dtype) for name, t in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(store.read(name), tensor)
        place = store.locate(name)
        assert place.path == tmp_path / name.partition(".")[0] / "model.safetensors"
        raw = place.path.read_bytes()
        assert len(raw) == place.file_bytes
        assert raw[place.offset : place.offset + place.meta.bytes] == tensor.numpy().tobytes()


def test_names_of_every_age_mean_the_same(tmp_path: Path) -> None:
    old = pipeline(tmp_path / "old", vae={"encoder.mid_block.attentions.0.query.weight": torch.ones(2)})
    flat = pipeline(tmp_path / "flat", text_encoder={"final_layer_norm.bias": torch.ones(3)})
    names = set(DiffusersFolder(pipeline(tmp_path / "new")).metas)
    assert set(DiffusersFolder(old).metas) == set(DiffusersFolder(flat).metas) == names
    both = {f"{prefix}final_layer_norm.bias": torch.ones(3) for prefix in ("", "text_model.")}
    with pytest.raises(DataError, match="are one tensor"):
        _ = DiffusersFolder(pipeline(tmp_path / "both", text_encoder=both)).metas


def test_shards_and_variants_are_found_by_how_they_are_called(tmp_path: Path) -> None:
    shard(tmp_path / "transformer")
    shard(tmp_path / "transformer", "diffusion_pytorch_model", ".safetensors.index.fp16.json", 2.0)
    shard(tmp_path / "text_encoder", "model.fp16", fill=2.0)
    assert DiffusersFolder(tmp_path, "fp16").read("transformer.a.weight").tolist() == [2, 2]
    assert DiffusersFolder(tmp_path, "fp16").read("text_encoder.b.weight").tolist() == [2, 2]
    plain = DiffusersFolder(tmp_path)
    assert plain.read("transformer.b.weight").tolist() == [2, 2]  # both indices name the same files
    assert plain.read("text_encoder.b.weight").tolist() == [2, 2]  # there is no other


def test_a_choice_among_variants_is_left_to_the_user(tmp_path: Path) -> None:
    for variant in ("fp16", "ema"):
        pipeline(tmp_path / "x", f"model.{variant}")
    with pytest.raises(DataError, match=r"several variants \(there are: ema, fp16\)"):
        _ = DiffusersFolder(tmp_path / "x").metas
    with pytest.raises(DataError, match="did you mean 'fp16'"):
        _ = DiffusersFolder(tmp_path / "x", "fp15").metas
    assert DiffusersFolder(tmp_path / "x", "ema").metas
    pipeline(tmp_path / "y")
    pipeline(tmp_path / "y", "diffusion_pytorch_model")
    with pytest.raises(DataError, match="remove one"):
        _ = DiffusersFolder(tmp_path / "y").metas


def test_what_is_no_component_is_not_opened(tmp_path: Path) -> None:
    pipeline(tmp_path)
    for place in ("safety_checker/pytorch_model.bin", "embeddings/style.pt", ".cache/x.bin", "unet/old.ckpt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"\x80\x02.")
    assert len(DiffusersFolder(tmp_path).metas) == 3


def test_a_component_without_usable_weights_is_refused(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "vae" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="is the download complete"):
        _ = DiffusersFolder(tmp_path).metas
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeError, match=r"diffusion_pytorch_model\.bin: a pickle"):
        _ = DiffusersFolder(tmp_path).metas


def test_a_file_that_is_a_link_to_elsewhere_is_unsafe(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    pipeline(tmp_path / "model")
    place = tmp_path / "model" / "unet" / "model.safetensors"
    place.unlink()
    place.symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UnsafeError, match="leads out of its model's folder"):
        _ = DiffusersFolder(tmp_path / "model").metas


def test_the_hubs_cache_of_links_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--owner--name" / "blobs"
    pipeline(snapshot)
    shard(snapshot / "transformer")
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../..") / "blobs" / str(number))
    store = DiffusersFolder(snapshot)
    assert len(store.metas) == 5
    assert torch.equal(store.read("unet.conv_in.weight"), torch.arange(4.0))
