"""XLabs' names of a LoRA for Flux (`double_blocks.0.processor.qkv_lora1.down.weight`), as diffusers reads them."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from torch import Tensor

from tests.tuner.weights.adapters import networks
from tuner import cli
from tuner.errors import DataError
from tuner.weights.adapters.base import Difference
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Modules
from tuner.weights.writer import save_safetensors

WIDTH, RANK = 32, 3


def modules() -> Modules:
    return Modules.of_network(networks.metas("tiny flux"))


def file(prefix: str = "", single: bool = True) -> dict[str, Tensor]:
    """Of every layer that XLabs' processors have."""
    rng = torch.Generator().manual_seed(0)
    sizes = {f"double_blocks.{i}.processor.{part}": 3 if part[0] == "q" else 1
             for i in range(1) for part in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")}  # fmt: skip
    if single:
        sizes |= {"single_blocks.0.processor.qkv_lora": 3, "single_blocks.0.processor.proj_lora": 1}
    found: dict[str, Tensor] = {}
    for name, times in sizes.items():
        inputs = 5 * WIDTH if name.endswith("proj_lora") else WIDTH
        found[f"{prefix}{name}.down.weight"] = torch.randn(RANK, inputs, generator=rng)
        found[f"{prefix}{name}.up.weight"] = torch.randn(times * WIDTH, RANK, generator=rng)
    return found


def dense(adapters: Adapters) -> dict[str, Tensor]:
    return {name: cast(Difference, change).dense().float() for name, change in adapters.changes.items()}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("single", [True, False])
def test_every_layer_is_changed_as_diffusers_changes_it(prefix: str, single: bool, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", file(prefix, single))
    found = dense(read_adapters(tmp_path / "x.safetensors", modules()))
    converted: dict[str, Any] = vars(theirs)["_convert_xlabs_flux_lora_to_diffusers"](file(prefix, single))
    expected = {
        name.replace(".lora_A.", "."): converted[name.replace("_A.", "_B.")] @ factor
        for name, factor in converted.items()
        if ".lora_A." in name
    }
    assert found.keys() == expected.keys() and len(found) == (12 if single else 8)
    for name, difference in expected.items():
        assert torch.allclose(found[name], difference, atol=1e-5), name


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
def test_it_is_written_in_other_names_and_read_back(dialect: Any, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", file())
    given = read_adapters(tmp_path / "x.safetensors", modules())
    save_safetensors(tmp_path / "y.safetensors", to_tensors(given, dialect, modules()))
    back = dense(read_adapters(tmp_path / "y.safetensors", modules()))
    assert {name for name, difference in back.items() if difference.any()} == given.changes.keys()
    assert all(torch.allclose(back[name], difference, atol=1e-5) for name, difference in dense(given).items())


def test_inspect_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(tmp_path / "x.safetensors", file())
    assert cli.main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("x.safetensors: a LoRA for Flux\n") and "fault" not in out


@pytest.mark.parametrize("name", ["double_blocks.0.processor.qkv_lora", "single_blocks.0.processor.qkv_lora1"])
def test_a_stream_that_a_block_has_not_is_refused(name: str, tmp_path: Path) -> None:
    tensors = {f"{name}.down.weight": torch.ones(RANK, WIDTH), f"{name}.up.weight": torch.ones(3 * WIDTH, RANK)}
    save_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(DataError, match=name):
        read_adapters(tmp_path / "x.safetensors", modules())


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = file()
    tensors["single_blocks.0.processor.qkv_lora.up.weight"] = torch.ones(3 * WIDTH + 1, RANK)
    save_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(DataError, match="97 rows, and the layer has 96"):
        read_adapters(tmp_path / "x.safetensors", modules())
