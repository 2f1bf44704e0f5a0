"""Files that are not what their name says, or not whole: what is said of them by `tuner inspect`, and as a base."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tuner.weights import pipelines
from tuner import cli
from tuner.errors import DataError, UserError
from tuner.families.detect import detect
from tuner.families.source import BaseModel
from tuner.weights import published
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import open_files
from tuner.weights.convert import convert, lacking
from tuner.weights.layouts.ldm import from_diffusers
from tuner.weights.store import SafetensorsFile, TensorMeta
from tuner.weights.writer import file_header, save_safetensors

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
LORA = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of small single files."""
    place = tmp_path_factory.mktemp("singles")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for variant in ("sd1", "sdxl"):
        pipelines.write(variant, place / variant)
        convert(place / variant, place / f"{variant}.safetensors", layout="ldm")
        store = SafetensorsFile(place / f"{variant}.safetensors")
        found[variant] = {name: store.read(name) for name in store.metas}
    return found


Tensors = dict[str, torch.Tensor]


def part(tensors: Tensors, start: str, new: str = "") -> Tensors:
    return {new + name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def halves(one: Tensors, two: Tensors) -> Tensors:
    """Every other tensor of one, and of what the other has beside."""
    more = [name for name in two if name not in one]
    return {name: one[name] for name in list(one)[::2]} | {name: two[name] for name in more[::2]}


WHOLE_FILES: dict[str, tuple[Callable[[Tensors, Tensors], Tensors], str]] = {
    "half one family, half another": (halves, "a part of a network, or an unknown one"),
    "two networks": (
        lambda one, two: part(one, UNET, UNET) | part(two, UNET, "unet."),
        "a mixture of Stable Diffusion 1 and Stable Diffusion XL",
    ),
    "another's text encoders": (
        lambda one, two: {n: t for n, t in one.items() if not n.startswith(TEXT)} | part(two, "cond", "cond")
        | {n: t for n, t in two.items() if n.startswith("conditioner.")},
        "a mixture of Stable Diffusion 1 and text encoders of Stable Diffusion XL",
    ),
    "half a network": (
        lambda one, _: {n: t for n, t in one.items() if n.startswith(f"{UNET}output_blocks.")},
        "a part of a network, or an unknown one",
    ),
    "an autoencoder": (lambda one, _: part(one, VAE), "an autoencoder alone"),
    "an autoencoder with its prefix": (lambda one, _: part(one, VAE, VAE), "an autoencoder alone"),
    "a text encoder": (lambda one, _: part(one, TEXT), "a CLIP text encoder alone"),
    "a text encoder with its prefix": (lambda one, _: part(one, TEXT, TEXT), "text encoders alone"),
    "averages": (
        lambda one, _: {f"model_ema.{n[6:].replace('.', '')}": t for n, t in one.items() if n.startswith(UNET)},
        "averages of a training (model_ema.…) without its weights",
    ),
    "a LoRA": (
        lambda *_: {f"{LORA}.lora_down.weight": torch.zeros(4, 768), f"{LORA}.lora_up.weight": torch.zeros(320, 4)},
        "a LoRA for Stable Diffusion 1",
    ),
    "a LoRA of another family": (
        lambda *_: {f"{LORA}.lora_down.weight": torch.zeros(4, 2048), f"{LORA}.lora_up.weight": torch.zeros(640, 4)},
        "a LoRA for Stable Diffusion XL",
    ),
    "a textual inversion": (lambda *_: {"emb_params": torch.zeros(2, 768)}, "a textual inversion"),
    "no tensors": (lambda *_: {}, "an unknown network"),
}  # fmt: skip
"""Whole safetensors files that are no base model, and what is said of them."""


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_a_file_that_is_no_model_is_said_to_be_what_it_is(kind: str, singles, tmp_path: Path, capsys) -> None:
    make, said = WHOLE_FILES[kind]
    file = tmp_path / "model.safetensors"
    save_safetensors(file, make(singles["sd1"], singles["sdxl"]))
    assert cli.main(["inspect", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"model.safetensors: {said}")
    with pytest.raises(DataError) as caught:
        BaseModel(base=str(file)).locate(download=False)
    assert str(caught.value).startswith(f"model.base: {file}: {said}") and "no base model; give " in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "a text": (lambda _: b"hello, this is a text that somebody has renamed\n" * 40, 3, "not a safetensors file; check"),
    "a short text": (lambda _: b"hi", 3, "only 2 bytes long"),
    "nothing": (lambda _: b"", 3, "only 0 bytes long"),
    "zeros": (lambda _: bytes(5000), 3, "so it is no safetensors file"),
    "JSON": (lambda _: json.dumps({"weight_map": {}}).encode() * 9, 3, "no"),
    "half a header": (lambda data: data[:9000], 3, "ends inside its header (9000 bytes); download it again"),
    "half a body": (lambda data: data[: len(data) // 2], 3, "the file is damaged or still being written, download it"),
    "a byte less": (lambda data: data[:-1], 3, "bytes long, expected"),
    "a byte more": (lambda data: data + b"x", 3, "bytes long, expected"),
    "a picture": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, 3, "not a safetensors file"),
    "a web page": (lambda _: b"<!doctype html><html>Sign in</html>", 3, "a web page"),
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", 3, "a git-lfs pointer"),
    "a pickle": (lambda _: pickle.dumps({"weight": [1.0]}), 4, "use the model's .safetensors file, or make one with"),
    "noise": (lambda _: bytes((i * i * 7919 + 131 * i) % 251 for i in range(9000)), 3, "not a safetensors file"),
}
"""What a `.safetensors` may hold instead, the exit code, and what is said."""


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(kind: str, singles, tmp_path: Path, capsys) -> None:
    damage, code, said = DAMAGED[kind]
    file = tmp_path / "model.safetensors"
    save_safetensors(file, singles["sd1"])
    file.write_bytes(damage(file.read_bytes()))
    assert cli.main(["inspect", str(file)]) == code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith(f"error: {file}: ") and said in line
    with pytest.raises(UserError) as caught:
        BaseModel(base=str(file)).locate(download=False)
    assert caught.value.exit_code == code and f"{file}" in str(caught.value) and "\n" not in str(caught.value)


def test_what_torch_saved_is_refused_by_inspect_and_its_name_does_not_matter(tmp_path: Path, capsys) -> None:
    for name in ("model.ckpt", "model.safetensors"):
        torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / name)
        assert cli.main(["inspect", str(tmp_path / name)]) == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}: a pickle" in line
        source, target = line.partition("'tuner convert ")[2].strip("'").split()
        assert source == name != target


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "empty": ({}, "the folder is empty"),
    "of files": ({"a.safetensors": "", "b.txt": ""}, "no diffusers folder; give a file in it, such as a.safetensors"),
    "of a LoRA": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "holds a LoRA and no model"),
    "of a LoRA of diffusers": ({"pytorch_lora_weights.safetensors": ""}, "holds a LoRA and no model"),
    "of a network": ({"config.json": '{"_class_name": "ControlNetModel"}'}, "holds ControlNetModel alone"),
    "of something": ({"notes.txt": ""}, "is the download complete?"),
    "of another index": (
        {
            "model_index.json": '{"_class_name": "StableDiffusionPipeline"}',
            "unet/config.json": '{"in_channels": 4, "addition_embed_type": "text_time"}',
        },
        "its index says StableDiffusionPipeline, but its U-Net is of Stable Diffusion XL",
    ),
    "of another network": (
        {
            "model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}',
            "unet/config.json": '{"in_channels": 4}',
        },
        "its index says StableDiffusionXLPipeline, but its U-Net is of another than Stable Diffusion XL",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_model_is_said_to_be_what_it_is(kind: str, tmp_path: Path) -> None:
    files, said = FOLDERS[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"^{tmp_path}: ") as caught:
        detect(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def full_size(tmp_path: Path) -> Callable[[str, Callable[[str], bool]], Path]:
    """A single file of a released model with its own sizes, of zeros that take no place on the disk."""

    def make(variant: str, keep: Callable[[str], bool] = lambda _: True) -> Path:
        metas = {name: TensorMeta(tuple(s), torch.float16) for name, s in published.tensors(variant).items()}

        class Described:
            def __init__(self) -> None:
                self.metas = metas

        single = from_diffusers(metas).of(Described()).metas  # pyright: ignore[reportArgumentType]
        kept = {name: meta for name, meta in single.items() if keep(name)}
        file = tmp_path / f"{variant}.safetensors"
        file.write_bytes(file_header(kept, {}))
        os.truncate(file, file.stat().st_size + sum(meta.bytes for meta in kept.values()))
        return file

    return make


@pytest.mark.parametrize("variant", published.variants())
def test_a_file_of_full_size_is_known_from_its_header(variant: str, full_size) -> None:
    file = full_size(variant)
    family = "sdxl-refiner" if variant == "sdxl-refiner" else variant.partition("-")[0].replace("sd35", "sd3")
    store = open_files(file)
    assert identify(store.metas).family == family and lacking(store) is None


@pytest.mark.parametrize("variant", ["sd1", "sd2", "sdxl", "sd35-medium", "flux-dev"])
def test_what_a_file_of_full_size_lacks_is_shown(variant: str, full_size, capsys) -> None:
    gone = ("first_stage_model.decoder.mid.block_1.conv1.bias", "vae.decoder.mid.block_1.conv1.bias")
    file = full_size(variant, lambda name: name not in gone)
    assert cli.main(["inspect", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  lacks "))
    assert "1 of " in line and line.endswith("such as vae.decoder.mid_block.resnets.0.conv1.bias")
