import hashlib
from pathlib import Path

import torch
from safetensors import safe_open

from tests.tuner.weights.adapters.memory import FILES, NETWORK, Memory
from tuner.weights.adapters.file import parse_adapters
from tuner.weights.adapters.header import Header
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Modules
from tuner.weights.modelspec import KEYS
from tuner.weights.writer import save_safetensors

MODULES = Modules(NETWORK)
ONE = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "128",
    "ss_seed": "1",
    "ss_tag_frequency": "my private captions",
    "modelspec.title": "one",
    "modelspec.trigger_phrase": "sks robot",
    "sshs_model_hash": "0" * 64,
    "note": "/home/me/private",
}
OTHER = {**ONE, "ss_seed": "2", "modelspec.title": "other"}


def texts(*kinds: str, **facts) -> dict[str, str]:
    file = {name: tensor for kind in kinds for name, tensor in FILES[kind].items()}
    adapters = parse_adapters(Memory(file), MODULES)
    return Header(name="made", **facts).texts(adapters.changes.values(), to_tensors(adapters, "kohya", MODULES))


def test_what_the_sources_agree_on_and_what_is_still_true_is_kept() -> None:
    found = texts("lora", sources=[ONE, OTHER], made_of=["one", "other"])
    assert found["ss_base_model_version"] == "sd_v1" and found["modelspec.trigger_phrase"] == "sks robot"
    assert "ss_seed" not in found and texts("lora", sources=[ONE])["ss_seed"] == "1"
    assert found["modelspec.title"] == found["ss_output_name"] == "made"
    assert found["modelspec.merged_from"] == "one, other"


def test_nothing_private_is_handed_on() -> None:
    found = texts("lora", sources=[ONE])
    assert set(found) <= KEYS and not any("private" in text for text in found.values())


def test_ranks_and_alphas_are_those_of_the_file() -> None:
    one = texts("lora", sources=[ONE])
    assert (one["ss_network_dim"], one["ss_network_alpha"], one["ss_network_module"]) == ("3", "1.5", "networks.lora")
    assert one["ss_network_args"] == "{}"
    conv = texts("lora", "locon")
    assert conv["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "1.5"}'
    assert texts("lora", "locon of one point", "norm")["ss_network_module"] == "lycoris.kohya"
    mixed = texts("lora without alpha", "locon of one point")
    assert (mixed["ss_network_dim"], mixed["ss_network_alpha"]) == ("3", "Dynamic")


def test_checksums_are_of_the_file_that_is_written(tmp_path: Path) -> None:
    adapters = parse_adapters(Memory(FILES["locon"]), MODULES)
    tensors = to_tensors(adapters, "kohya", MODULES, torch.float16)
    path = tmp_path / "a.safetensors"
    save_safetensors(path, tensors, Header(name="a", family="sd1").texts(adapters.changes.values(), tensors))
    data = path.read_bytes()
    values = data[8 + int.from_bytes(data[:8], "little") :]
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert found["sshs_model_hash"] == hashlib.sha256(values).hexdigest()
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
