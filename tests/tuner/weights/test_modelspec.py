import hashlib
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tuner.weights.layouts import kohya
from tuner.weights.lora import LoraWeights
from tuner.weights.modelspec import KEYS, ModelSpec, hashes, public
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

SPEC = ModelSpec(
    name="robot",
    title="A robot",
    architecture="stable-diffusion-v1",
    prediction="v",
    resolution=64,
    base="pocket",
    images=5,
    samples=800,
    updates=100,
    seed=3,
    learning_rate=1e-4,
    optimizer="adamw",
    trigger="sks robot",
    license="cc-by-4.0",
    date="2026-11-22",
    version="tuner 0.1.0",
)


def lora(size: int = 8, conv: bool = False) -> LoraWeights:
    ending = (3, 3) if conv else ()
    return LoraWeights(
        {
            "unet.m.lora_A.weight": torch.randn(4, size, *ending),
            "unet.m.lora_B.weight": torch.randn(size, 4, *(1 for _ in ending)),
        },
        {"unet.m": 2.0},
    )


def test_the_header_says_what_both_vocabularies_ask_for() -> None:
    texts = SPEC.texts(lora(), kohya.rename(lora()))
    must = "sai_model_spec", "architecture", "implementation", "title", "resolution"
    assert all(texts[f"modelspec.{key}"] for key in must)
    minimum = "v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args"
    assert all(f"ss_{key}" in texts for key in minimum)
    assert texts["modelspec.sai_model_spec"] == "1.0.1"
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert texts["modelspec.resolution"] == "64x64"
    assert texts["modelspec.trigger_phrase"] == "sks robot"
    assert texts["modelspec.date"] == "2026-11-22"
    assert texts["ss_network_dim"] == "4" and texts["ss_network_alpha"] == "2"
    assert texts["ss_network_args"] == "{}"
    assert SPEC.texts(lora(conv=True), {})["ss_network_args"] == '{"conv_dim": "4", "conv_alpha": "2"}'
    assert set(texts) <= KEYS


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_prediction_is_said(prediction) -> None:
    texts = replace(SPEC, prediction=prediction).texts(lora(), {})
    assert texts["modelspec.prediction_type"] == prediction
    assert texts["ss_model_prediction_type"] == {"epsilon": "epsilon", "v": "v_prediction"}[prediction]


@pytest.mark.parametrize("size", [8, 100_000])
def test_checksums_are_those_of_the_written_file(size: int, tmp_path: Path) -> None:
    tensors = kohya.rename(lora(size))
    texts = SPEC.texts(lora(size), tensors)
    path = tmp_path / "x.safetensors"
    save_safetensors(path, tensors, texts)
    data = path.read_bytes()
    values = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert texts["sshs_model_hash"] == values and texts["modelspec.hash_sha256"] == "0x" + values

    training = {key: value for key, value in texts.items() if key.startswith("ss_")}
    save_safetensors(path, tensors, training)
    window = hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert texts["sshs_legacy_hash"] == window
    assert (window == "e3b0c442") == (size == 8)  # of nothing, in a small file
    assert hashes(tensors, training) == (values, window)


def test_nothing_private_can_get_into_a_header(tmp_path: Path) -> None:
    """Every text that goes in is a field of `ModelSpec`, and these are few and known."""
    assert {field.name for field in fields(ModelSpec)} == {
        *("name", "title", "architecture", "prediction", "resolution", "base", "images", "samples", "updates", "seed"),
        *("learning_rate", "optimizer", "trigger", "license", "date", "version"),
    }
    path = tmp_path / "x.safetensors"
    tensors = kohya.rename(lora())
    save_safetensors(path, tensors, SPEC.texts(lora(), tensors))
    said = SafetensorsFile(path).metadata
    assert not [value for value in said.values() if re.search(r"(^|\s)/|[\\~]|\.(png|txt|jpg)", value)]
    assert public({**said, "ss_tag_frequency": "a caption", "ss_dataset_dirs": "/home/me"}) == said


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = replace(SPEC, title="t" * 2_000_000, trigger="x" * 2_000_000)
    assert sum(map(len, long.texts(lora(), {}).values())) < 10_000
