"""Whatever `model.base` names is opened, or refused in a line that says what it is and what to do."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests import tiny
from tests.tuner.families.published import SD15_UNET
from tuner.errors import DataError, UnsafeError, UserError
from tuner.families.source import BaseModel, embedded

CPU = torch.device("cpu")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """The tiny base in a folder that may be changed."""
    return Path(shutil.copytree(base, tmp_path / "写真 a base"))


def refusal(base: Path | str, kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        BaseModel(base=str(base)).open(CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_opened_wherever_it_is(copy: Path, monkeypatch):
    model = BaseModel(base=str(copy)).open(CPU)
    assert (model.source, model.folder) == (str(copy), copy)
    monkeypatch.chdir(copy.parent)
    assert BaseModel(base=copy.name).open(CPU).folder == Path(copy.name)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert BaseModel(base=f"~/{copy.name}").open(CPU).folder == copy


PARTS = ["model_index.json", "unet", "unet/config.json", "text_encoder", "text_encoder/model.safetensors", "vae",
         "vae/config.json", "tokenizer", "tokenizer/tokenizer.json", "scheduler",
         "scheduler/scheduler_config.json"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_without_a_part_is_refused_and_the_part_named(part, copy: Path):
    missing = copy / part
    if missing.is_dir():
        shutil.rmtree(missing)
    else:
        missing.unlink()
    message = refusal(copy)
    assert str(copy) in message and part.split("/")[0] in message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0", "<html>404</html>"])
@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_config_is_named(part, content, copy: Path):
    (copy / part).write_text(content)
    assert part in refusal(copy)


@pytest.mark.parametrize("part", ["vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"])
def test_a_damaged_config_of_a_library_is_named_by_its_folder(part, copy: Path):
    (copy / part).write_text("{")
    assert part.split("/")[0] in refusal(copy)


OTHERS = {
    "9 input channels": ("StableDiffusionPipeline", {**SD15_UNET, "in_channels": 9}),
    "8 input channels": ("StableDiffusionPipeline", {**SD15_UNET, "in_channels": 8}),
    "KandinskyPipeline": ("KandinskyPipeline", None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_model_is_refused_by_its_name(name, tmp_path: Path):
    kind, unet = OTHERS[name]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    if unet is not None:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text(json.dumps(unet))
    message = refusal(tmp_path)
    assert name in message and "supported: " in message


@pytest.mark.parametrize("prediction", ["sample", "flow"])
def test_a_prediction_that_is_not_known_is_refused(prediction, copy: Path):
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', f'"{prediction}"'))
    assert "prediction_type" in refusal(copy) and prediction in refusal(copy)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_only_there_as_a_pickle_are_refused_and_not_opened(component, copy: Path, tmp_path: Path):
    class Canary:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "canary", "sung"))

    (file,) = (copy / component).glob("*.safetensors")
    file.unlink()
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"weight": Canary()}, copy / component / name)
    assert name in refusal(copy, UnsafeError)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_beside_the_safetensors_is_left_alone(copy: Path, tmp_path: Path):
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    assert BaseModel(base=str(copy)).open(CPU).folder == copy


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>", lambda b: b"\xff" * 99]
)
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_named(component, damage, copy: Path):
    (file,) = (copy / component).glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    assert f"{component}/{file.name}" in refusal(copy)


@pytest.mark.parametrize("name", ["pockets", "./missing", "~/missing", "/missing/base", "a/b/c", "/missing", ""])
def test_what_is_nowhere_and_can_be_no_hub_id_is_said_so(name, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert message.startswith("model.base: ") and repr(name) in message
    assert (
        str(embedded()) in message
        and "give one of them, a diffusers folder, a checkpoint's file, or a hub id" in message
    )


def test_a_hub_id_offline_is_a_quick_refusal(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    since = time.monotonic()
    message = refusal("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert time.monotonic() - since < 2
    assert message.startswith("model.base: 'stable-diffusion-v1-5/stable-diffusion-v1-5' is no folder here")
    assert "(offline)" in message and message.endswith("give a diffusers folder, or download it first")
    assert not any(tmp_path.rglob("*"))


def test_a_hub_id_that_was_downloaded_is_opened_without_the_hub(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, folder = "0" * 40, tmp_path / "models--somebody--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(base, folder / "snapshots" / commit)
    model = BaseModel(base="somebody/tiny").open(CPU)
    assert model.folder == folder / "snapshots" / commit and model.source == "somebody/tiny"


def test_of_a_hub_repository_only_what_is_opened_is_asked_for(base: Path, monkeypatch):
    """Published repositories hold the same weights six times over."""
    asked = {}

    def snapshot(name: str, **settings: object) -> str:
        asked.update(settings)
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    BaseModel(base="somebody/tiny", revision="v1").locate()
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors",
        "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "safety_checker/model.safetensors",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    ]  # fmt: skip
    wanted = filter_repo_objects(
        repository, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(wanted) == {
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
    }  # fmt: skip
    assert asked["revision"] == "v1"


def test_weights_in_several_files_are_opened(base: Path, tmp_path: Path):
    pipeline = tiny.sd1()
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    found = BaseModel(base=str(tmp_path / "sharded")).open(CPU).networks["unet"].state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in pipeline.unet.state_dict().items())
