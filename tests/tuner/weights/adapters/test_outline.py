"""What a header tells of adapters is what reading the file gives."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tuner.weights.adapters.memory import FILES, K_CONV, K_LINEAR, LINEAR, NETWORK, drawn
from tests.tuner.weights.adapters.test_writing import LORAS, MODULES, read
from tuner.errors import DataError
from tuner.weights.adapters.file import read_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.outline import outline
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Dialect, Modules
from tuner.weights.writer import save_safetensors

WORDS = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "whole difference",
    "norm": "difference of a norm",
    "dora": "DoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "(IA)³",
    "glora": "GLoRA",
    "set": "whole weight",
}


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_safetensors(folder / "x.safetensors", tensors)
    return folder / "x.safetensors"


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    found = outline(saved(tmp_path, FILES[kind]))
    word = next((word for start, word in WORDS.items() if kind.startswith(start)), "LoRA")
    assert found.kinds == {word: 1} and found.layers == 1 and not found.faults
    assert found.dialect == "kohya"
    assert found.components == {"text_encoder" if K_LINEAR in next(iter(FILES[kind])) else "unet": 1}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("kind", LORAS)
def test_ranks_and_alphas_are_those_of_the_file_in_any_dialect(kind: str, dialect: Dialect, tmp_path: Path) -> None:
    if kind == "locon with a middle" and dialect == "diffusers":
        return  # has no word for it
    path = saved(tmp_path, to_tensors(read(kind), dialect, MODULES))
    found = outline(path)
    (change,) = read_adapters(path, MODULES).changes.values()
    assert isinstance(change, LowRank)
    assert found.dialect == dialect
    assert found.ranks == {change.rank: 1}
    said = [change.rank if text == "that of the rank" else float(text) for text in found.alphas]
    assert said == [pytest.approx(change.scale * change.rank)]


@pytest.mark.parametrize("kind", FILES)
def test_faults_are_told_where_names_tell_of_them_and_only_there(kind: str, tmp_path: Path) -> None:
    for lost in FILES[kind]:
        rest = {name: tensor for name, tensor in FILES[kind].items() if name != lost}
        if not rest:
            continue
        path = saved(tmp_path, rest)
        try:
            read_adapters(path, Modules(NETWORK))
        except DataError as error:  # sizes that do not fit each other are found by reading
            assert outline(path).faults or "lacks" not in str(error), lost
        else:
            assert not outline(path).faults, lost


def test_only_single_numbers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {**FILES["lora"], **FILES["locon"], f"{K_CONV}.alpha": torch.tensor(4.0)}
    path = saved(tmp_path, both)
    from tuner.weights import store

    opened = store.read_location

    def small(location: store.Location, name: str) -> Tensor:
        assert location.meta.bytes <= 8
        return opened(location, name)

    monkeypatch.setattr(store, "read_location", small)
    found = outline(path)
    assert found.alphas == {"1.5": 1, "4": 1} and found.ranks == {3: 2}


def test_what_belongs_to_nothing_is_told(tmp_path: Path) -> None:
    found = outline(saved(tmp_path, {**FILES["lora"], "who.knows": drawn(3), "lora_unet_x.alpha": drawn(2)}))
    assert any("'who.knows'" in fault for fault in found.faults)
    assert any("'lora_unet_x'" in fault for fault in found.faults)


def test_pefts_file_without_its_config_is_told(tmp_path: Path) -> None:
    name = f"base_model.model.{LINEAR.removeprefix('text_encoder.')}"
    path = saved(tmp_path, {f"{name}.lora_A.weight": drawn(3, 8), f"{name}.lora_B.weight": drawn(16, 3)})
    assert any("adapter_config.json" in fault for fault in outline(path).faults)
    path.with_name("adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    found = outline(path)
    assert found.alphas == {"6": 1} and found.ranks == {3: 1} and not found.faults
    path.with_name("adapter_config.json").write_text("{")
    assert any("no valid JSON" in fault for fault in outline(path).faults)
