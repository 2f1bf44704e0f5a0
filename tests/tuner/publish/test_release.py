import base64
import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tuner.errors import ConfigError, DataError, UnsafeError
from tuner.publish.provenance import (
    LOCAL,
    Picture,
    Provenance,
    public_base,
    public_settings,
    read_provenance,
    versions,
    write_provenance,
)  # fmt: skip
from tuner.publish.release import build, release_files
from tuner.publish.targets.folder import LocalFolder
from tuner.weights.modelspec import MAX_THUMBNAIL
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

PROVENANCE = Provenance(
    name="robot",
    base="pocket",
    prediction="v",
    resolution=64,
    method="lora",
    images=5,
    samples=800,
    updates=100,
    seed=3,
    settings={"method.rank": 8, "optimizer.lr": 1e-4, "run.flip": True, "method.type": "lora"},
    versions={"torch": "2.13.0"},
    pictures=(Picture(file="samples/0.png", prompt="a robot"),),
    grid="samples/grid.png",
)
CANARY = "/home/canary/secret"


def make_run(folder: Path) -> Path:
    """A finished run's output folder, with much in it that is nobody's business."""
    for name in ("lora", "samples", "checkpoints", "logs"):
        (folder / name).mkdir(parents=True)
    for ending in (".safetensors", "-diffusers.safetensors"):
        metadata = {"modelspec.title": "old", "ss_network_dim": "4", "ss_dataset_dirs": CANARY, "lr": CANARY}
        save_safetensors(folder / "lora" / f"robot{ending}", {"w": torch.ones(3)}, metadata)
    text = PngInfo()
    text.add_text("parameters", CANARY)
    for name in ("0", "grid"):
        Image.new("RGB", (8, 8), (200, 30, 40)).save(folder / "samples" / f"{name}.png", pnginfo=text)
    for name in (".env", "config.toml", "optimizer.bin", "logs/run.log", "checkpoints/x.pkl", "lora/notes.txt"):
        (folder / name).write_text(CANARY)
    write_provenance(folder, PROVENANCE)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


RELEASED = [
    "README.md", "images/0.png", "images/grid.png", "robot-diffusers.safetensors", "robot.safetensors", "settings.toml",
]  # fmt: skip


def test_nothing_is_released_but_what_is_meant_to_be(run: Path) -> None:
    files = build(run, run / "release", read_provenance(run))
    assert [path.as_posix() for path in files] == RELEASED
    for path in (run / "release").rglob("*"):
        assert path.is_dir() or b"canary" not in path.read_bytes()


def test_the_released_files_hold_the_runs_values(run: Path) -> None:
    build(run, run / "release", replace(PROVENANCE, title="A robot", license="mit", trigger="sks"))
    file = SafetensorsFile(run / "release" / "robot.safetensors")
    assert torch.equal(file.read("w"), torch.ones(3))
    assert file.metadata == {
        "modelspec.title": "A robot",
        "modelspec.license": "mit",
        "modelspec.trigger_phrase": "sks",
        "modelspec.thumbnail": file.metadata["modelspec.thumbnail"],
        "ss_network_dim": "4",
    }
    assert Image.open(run / "release" / "images" / "0.png").getpixel((0, 0)) == (200, 30, 40)
    settings = (run / "release" / "settings.toml").read_text()
    assert settings == 'method.rank = 8\noptimizer.lr = 0.0001\nrun.flip = true\nmethod.type = "lora"\n'
    assert "images/0.png" in (run / "release" / "README.md").read_text()


def test_a_release_is_made_again_in_place_of_the_old_one(run: Path) -> None:
    build(run, run / "release", PROVENANCE)
    (run / "release" / "old.txt").write_text("")
    build(run, run / "release", PROVENANCE)
    assert not (run / "release" / "old.txt").exists()
    assert not [path for path in run.iterdir() if path.name.startswith((".tmp", ".old"))]


def test_only_listed_files_of_a_release_folder_are_sent(run: Path, tmp_path: Path) -> None:
    build(run, run / "release", PROVENANCE)
    for name in (".env", "optimizer.bin", "a.pkl", "logs.txt", ".hidden.safetensors", "images/.x.png", "images/x.jpg"):
        (run / "release" / name).write_text(CANARY)
    (run / "release" / "deep" / "images").mkdir(parents=True)
    (run / "release" / "deep" / "images" / "x.png").write_text(CANARY)
    (run / "release" / "deep" / "x.safetensors").write_text(CANARY)
    assert [path.as_posix() for path in release_files(run / "release")] == RELEASED
    assert LocalFolder(path=tmp_path / "out").publish(run / "release") == str(tmp_path / "out")
    sent = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert sent == set(RELEASED)


def test_links_are_refused_wherever_they_are(run: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text(CANARY)
    build(run, run / "release", PROVENANCE)
    (run / "release" / "images" / "1.png").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UnsafeError, match=r"1\.png"):
        release_files(run / "release")
    (run / "samples" / "0.png").unlink()
    (run / "samples" / "0.png").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UnsafeError, match=r"0\.png"):
        build(run, run / "release", PROVENANCE)
    os.rename(run / "lora", tmp_path / "lora")  # noqa: PTH104
    (run / "lora").symlink_to(tmp_path / "lora")
    with pytest.raises(UnsafeError, match="lora"):
        build(run, run / "release", PROVENANCE, thumbnail=False)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "samples/../../secret.png"])
def test_a_picture_outside_of_the_run_is_refused(name: str, run: Path) -> None:
    Image.new("RGB", (2, 2)).save(run.parent / "secret.png")
    with pytest.raises(UnsafeError, match="outside"):
        build(run, run / "release", replace(PROVENANCE, grid=name))
    assert not (run / "release").exists()


def test_what_is_no_picture_or_no_weights_is_named(run: Path) -> None:
    (run / "samples" / "0.png").write_text("<html>")
    with pytest.raises(DataError, match=r"0\.png"):
        build(run, run / "release", PROVENANCE)
    (run / "lora" / "robot.safetensors").unlink()
    with pytest.raises(DataError, match=r"robot\.safetensors"):
        build(run, run / "release", PROVENANCE, thumbnail=False)
    with pytest.raises(DataError, match=r"README\.md"):
        release_files(run)


def in_this_order(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file as another program may have written it: with the values in an order of its own."""
    header: dict[str, object] = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        kind = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_full_fine_tune_is_released_as_its_folder(run: Path) -> None:
    model = run / "model"
    for name in (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "model_index.json",
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    values = {"b": torch.ones(4).half(), "a": torch.arange(5.0), "none": torch.zeros(0)}
    weights.write_bytes(in_this_order(values, {"format": "pt", "secret": CANARY}))
    (model / "unet" / "notes.txt").write_text(CANARY)
    files = build(run, run / "release", replace(PROVENANCE, method="full", pictures=(), grid=None))
    assert [path.as_posix() for path in files] == [
        "README.md", "model_index.json", "settings.toml", "tokenizer/merges.txt", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    given, made = SafetensorsFile(weights), SafetensorsFile(run / "release" / "unet" / weights.name)
    assert made.metas == given.metas and all(torch.equal(made.read(name), values[name]) for name in values)
    data = weights.read_bytes()[given.header.data_start :]
    assert made.metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert made.metadata["modelspec.architecture"] == "stable-diffusion-v1" and "secret" not in made.metadata


def test_the_thumbnail_is_a_small_picture_whatever_the_sample_is(run: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (900, 1400, 3), dtype=np.uint8))
    noise.save(run / "samples" / "0.png")
    build(run, run / "release", PROVENANCE)
    url = SafetensorsFile(run / "release" / "robot.safetensors").metadata["modelspec.thumbnail"]
    assert url.startswith("data:image/jpeg;base64,") and len(url) <= MAX_THUMBNAIL
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (picture.format, picture.size) == ("JPEG", (256, 165)) and not picture.getexif()
    build(run, run / "release", PROVENANCE, thumbnail=False)
    assert "modelspec.thumbnail" not in SafetensorsFile(run / "release" / "robot.safetensors").metadata


def test_provenance_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_provenance(tmp_path, PROVENANCE)
    assert read_provenance(tmp_path) == PROVENANCE
    full = replace(
        PROVENANCE, title="t", learning_rate=1e-4, optimizer="adamw", trigger="x", license="mit", date="2026-11-22",
        description="d", author="a", tags=("t", "u"), usage_hint="h", zero_terminal_snr=True,
    )  # fmt: skip
    write_provenance(tmp_path, full)
    assert read_provenance(tmp_path) == full


def test_what_is_no_provenance_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"release\.json"):
        read_provenance(tmp_path)
    write_provenance(tmp_path, PROVENANCE)
    good = json.loads((tmp_path / "release.json").read_text())
    for bad in ([], {}, good | {"seed": "3"}, good | {"other": 1}, {k: v for k, v in good.items() if k != "base"}):
        (tmp_path / "release.json").write_text(json.dumps(bad))
        with pytest.raises(DataError, match=r"release\.json"):
            read_provenance(tmp_path)
    (tmp_path / "release.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        read_provenance(tmp_path)
    for name in ("../x", "a/b", "", ".hidden", "a b", "ü"):
        with pytest.raises(ConfigError, match="name"):
            replace(PROVENANCE, name=name)


def test_a_base_on_this_machine_has_no_public_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "client").mkdir(parents=True)
    assert public_base("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert public_base("pocket") == "pocket"
    for local in (tmp_path, "models/client", "./models/x", "/data/x", "~/x", "a/b/c", "C:\\x", "https://x/y", "../x/y"):
        assert public_base(local) == LOCAL


def test_public_settings_hold_no_text_but_names_of_parts() -> None:
    config = {
        "run": {"output": "/home/me/out", "seed": 3, "name": "client-x"},
        "method": {"type": "lora", "rank": 8, "targets": ["/secret"], "ranks": {"secret.*": 4}},
        "data": [{"type": "folder", "path": "/home/me", "prompt": "a caption"}],
        "optimizer": {"type": "/home/me/my.py", "lr": 1e-4},
        "precision": "bf16",
        "flip": True,
    }
    assert public_settings(config) == {
        "run.seed": 3, "method.type": "lora", "method.rank": 8, "optimizer.lr": 1e-4, "precision": "bf16", "flip": True,
    }  # fmt: skip


def test_versions_are_those_that_are_installed() -> None:
    assert versions()["torch"] == torch.__version__.partition("+")[0] or versions()["torch"] == torch.__version__
