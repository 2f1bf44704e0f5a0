import hashlib
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner.weights.adapters.base import Change
from tuner.weights.adapters.file import Adapters
from tuner.weights.adapters.header import Header
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.lora import LoraWeights
from tuner.weights.modelspec import KEYS, MAX_THUMBNAIL, ModelSpec, hashes, public
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


def lora(size: int = 8, conv: bool = False) -> Adapters:
    ending = (3, 3) if conv else ()
    weights = LoraWeights(
        {
            "unet.m.lora_A.weight": torch.randn(4, size, *ending),
            "unet.m.lora_B.weight": torch.randn(size, 4, *(1 for _ in ending)),
        },
        {"unet.m": 2.0},
    )
    return Adapters.of_lora(weights)


def changes(size: int = 8, conv: bool = False) -> list[Change]:
    return list(lora(size, conv).changes.values())


def file(size: int = 8) -> dict[str, Tensor]:
    return to_tensors(lora(size), "kohya")


def test_the_header_says_what_both_vocabularies_ask_for() -> None:
    texts = SPEC.texts(changes(), file(), "kohya")
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
    assert SPEC.texts(changes(conv=True), {}, "kohya")["ss_network_args"] == '{"conv_dim": "4", "conv_alpha": "2"}'
    assert set(texts) <= KEYS


BASES = {
    ("stable-diffusion-v1", "epsilon"): ("False", "sd_v1", "networks.lora"),
    ("stable-diffusion-v1", "v"): ("False", "sd_v1_v", "networks.lora"),
    ("stable-diffusion-v2-512", "epsilon"): ("True", "sd_v2", "networks.lora"),
    ("stable-diffusion-v2-768-v", "v"): ("True", "sd_v2_v", "networks.lora"),
    ("stable-diffusion-xl-v1-base", "v"): ("False", "sdxl_base_v1-0", "networks.lora"),
    ("stable-diffusion-3-medium", "flow"): ("False", "3-medium", "networks.lora_sd3"),
    ("stable-diffusion-3.5-large", "flow"): ("False", "3-5-large", "networks.lora_sd3"),
    ("stable-diffusion-3-5-medium", "flow"): ("False", "3-5-medium", "networks.lora_sd3"),
    ("stable-diffusion-3", "flow"): ("False", "sd3", "networks.lora_sd3"),
    ("flux-1-dev", "flow"): ("False", "flux1", "networks.lora_flux"),
}


@pytest.mark.parametrize(("architecture", "prediction"), BASES)
def test_the_base_is_called_as_sd_scripts_calls_it(architecture, prediction) -> None:
    spec = replace(SPEC, architecture=architecture, prediction=prediction)
    texts = spec.texts(changes(), {}, "kohya")
    keys = "ss_v2", "ss_base_model_version", "ss_network_module"
    assert tuple(texts[key] for key in keys) == BASES[architecture, prediction]
    assert texts["modelspec.architecture"] == f"{architecture}/lora"
    words = {"v": "v_prediction", "flow": "raw", "epsilon": "epsilon"}
    assert texts["ss_model_prediction_type"] == words[prediction]
    assert texts.get("modelspec.prediction_type") == (None if prediction == "flow" else prediction)
    single = architecture.startswith(("stable-diffusion-xl", "stable-diffusion-3", "flux"))
    assert texts["modelspec.implementation"].startswith("https://github.com/") == single
    assert spec.texts(changes(), {}, "diffusers")["modelspec.implementation"] == "diffusers"


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_prediction_is_said(prediction) -> None:
    texts = replace(SPEC, prediction=prediction).texts(changes(), {}, "kohya")
    assert texts["modelspec.prediction_type"] == prediction
    assert texts["ss_model_prediction_type"] == {"epsilon": "epsilon", "v": "v_prediction"}[prediction]


@pytest.mark.parametrize("size", [8, 100_000])
def test_checksums_are_those_of_the_written_file(size: int, tmp_path: Path) -> None:
    tensors = file(size)
    texts = SPEC.texts(changes(size), tensors, "kohya")
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
        *("learning_rate", "optimizer", "trigger", "license", "date", "version", "guidance"),
        *("description", "author", "tags", "usage_hint", "thumbnail", "negative"),  # said when it is published
        *("zero_terminal_snr", "settings"),  # numbers, switches and kinds
    }
    path = tmp_path / "x.safetensors"
    tensors = file()
    save_safetensors(path, tensors, SPEC.texts(changes(), tensors, "kohya"))
    said = SafetensorsFile(path).metadata
    assert not [value for value in said.values() if re.search(r"(^|\s)/|[\\~]|\.(png|txt|jpg)", value)]
    assert public({**said, "ss_tag_frequency": "a caption", "ss_dataset_dirs": "/home/me"}) == said


WHOLE = replace(
    SPEC,
    architecture="stable-diffusion-v1",
    description="Robots of tin.",
    author="Ada",
    tags=("robot", "tin toy"),
    usage_hint="best at 0.8",
    thumbnail="data:image/jpeg;base64,AAAA",
    negative=True,
    zero_terminal_snr=True,
    settings={
        "model.clip_skip": 1,
        "objective.timesteps.start": 0.25,
        "objective.timesteps.end": 1.0,
        "objective.noise.type": "offset",
        "objective.noise.strength": 0.05,
        "objective.weighting.type": "min_snr",
        "objective.weighting.gamma": 5.0,
        "learning_rate.type": "cosine",
        "run.batch_size": 4,
        "captions.dropout": 0.1,
    },
)


def test_every_word_of_modelspec_that_fits_is_said() -> None:
    """All that its version 1.0.1 has for pictures, but what controls, merges and whole networks' dtypes would say."""
    words = [
        *("sai_model_spec", "architecture", "implementation", "title", "resolution", "description", "author", "date"),
        *("hash_sha256", "implementation_version", "license", "usage_hint", "thumbnail", "tags", "trigger_phrase"),
        *("prediction_type", "timestep_range", "encoder_layer", "is_negative_embedding"),
    ]
    texts = WHOLE.texts(None, file(), "kohya")
    assert {key for key in texts if key.startswith("modelspec.")} == {f"modelspec.{word}" for word in words}
    assert texts["modelspec.tags"] == "robot, tin toy" and texts["modelspec.timestep_range"] == "250,1000"
    assert texts["modelspec.encoder_layer"] == "2" and texts["modelspec.is_negative_embedding"] == "true"
    assert "modelspec.is_negative_embedding" not in WHOLE.texts(changes(), file(), "kohya")
    network = WHOLE.of_network("0f")
    assert network["modelspec.architecture"] == "stable-diffusion-v1" and network["modelspec.hash_sha256"] == "0x0f"
    assert {key for key in network if key.startswith("modelspec.")} == {f"modelspec.{word}" for word in words[:-1]}
    assert set(texts) <= KEYS and set(network) <= KEYS


def test_settings_are_said_in_the_words_that_other_programs_show() -> None:
    texts = WHOLE.texts(changes(), file(), "kohya")
    said = {
        "zero_terminal_snr": "True", "clip_skip": "2", "noise_offset": "0.05", "min_snr_gamma": "5.0",
        "lr_scheduler": "cosine", "total_batch_size": "4", "caption_dropout_rate": "0.1",
    }  # fmt: skip
    assert said.items() <= {key.removeprefix("ss_"): text for key, text in texts.items()}.items()
    plain = SPEC.texts(changes(), file(), "kohya")
    assert plain["ss_zero_terminal_snr"] == "False"
    assert not [key for key in said if key != "zero_terminal_snr" and f"ss_{key}" in plain]


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("stable-diffusion-v1", "1"), ("stable-diffusion-v2-768-v", "2"), ("stable-diffusion-xl-v1-base", "2"),
     ("stable-diffusion-3-medium", None), ("flux-1-dev", None)],
)  # fmt: skip
def test_the_layer_of_the_text_encoder_is_counted_from_the_last(architecture: str, layer: str | None) -> None:
    spec = replace(SPEC, architecture=architecture)
    assert spec.texts(changes(), file(), "kohya").get("modelspec.encoder_layer") == layer


def test_a_thumbnail_is_whole_or_not_there() -> None:
    url = "data:image/jpeg;base64,"
    fits = replace(SPEC, thumbnail=url + "A" * (MAX_THUMBNAIL - len(url)))
    assert fits.texts(changes(), file(), "kohya")["modelspec.thumbnail"] == fits.thumbnail
    header = Header(name="x", sources=[fits.texts(changes(), file(), "kohya")])
    assert header.texts(changes(), file())["modelspec.thumbnail"] == fits.thumbnail
    large = replace(SPEC, thumbnail=f"{fits.thumbnail}A")
    assert "modelspec.thumbnail" not in large.texts(changes(), file(), "kohya")


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = replace(SPEC, title="t" * 2_000_000, trigger="x" * 2_000_000)
    assert sum(map(len, long.texts(changes(), {}, "kohya").values())) < 10_000
