"""Folders that peft saves, as LoRAs of a merge and of the recipes: what comes out is what peft merges."""

import json
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from merge import command
from merge.lora.network import Network
from recipes import combine, resize, translate
from tests.merge.test_run import tiny
from tests.tuner.weights.adapters.memory import drawn
from tuner.errors import ConfigError, DataError, UnsafeError
from tuner.weights.adapters.base import Difference
from tuner.weights.adapters.file import FORMS, SUFFIXES, read_adapters
from tuner.weights.adapters.peft_config import OTHER_BASES, OTHER_LAYERS
from tuner.weights.architecture import is_lora
from tuner.weights.checkpoint import open_store
from tuner.weights.convert import convert

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TO_V = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
CONV = "mid_block.resnets.0.conv1"
LAYERS = [TO_K, TO_V, CONV]
SINGLE = {
    TO_K: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    TO_V: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight",
    CONV: "model.diffusion_model.middle_block.0.in_layers.2.weight",
}
CONFIGS: dict[str, Any] = {
    "a plain LoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS),
    "ranks and alphas by layer": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=LAYERS, rank_pattern={"attn2.to_v": 2}, alpha_pattern={"conv1": 1}
    ),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=[TO_K, TO_V], use_cayley_neumann=False),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=LAYERS),
    "IA3": peft.IA3Config(target_modules=[TO_K, TO_V], feedforward_modules=[TO_V]),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("model") / "sd.safetensors", 1)


def network(checkpoint: Path) -> nn.Module:
    """The layers of the checkpoint's U-Net that are changed, by their names."""
    store, root = Network.open(checkpoint).store, nn.Module()
    for name in LAYERS:
        weight = store.read(f"unet.{name}.weight").float()
        out, inputs, *kernel = weight.shape
        layer = nn.Conv2d(inputs, out, kernel[0], padding=1) if kernel else nn.Linear(inputs, out, bias=False)
        layer.weight = nn.Parameter(weight)
        module: Any = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(last, layer)
    return root


def trained(checkpoint: Path, config: Any, folder: Path) -> dict[str, Tensor]:
    """Saves a trained adapter in `folder`; the weights that peft merges it into, by the names of the single file."""
    model: Any = peft.get_peft_model(cast("Any", network(checkpoint)), config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                one = any(word in name for word in ("magnitude", "ia3", "boft_s"))
                parameter.copy_(0.1 * drawn(*parameter.shape, seed=index) + one)
    model.save_pretrained(str(folder))
    merged = model.merge_and_unload().state_dict()
    return {single: merged[f"{name}.weight"] for name, single in SINGLE.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("given", ["style", "style/adapter_model.safetensors"])
def test_a_folder_of_pefts_is_baked_as_peft_merges_it(checkpoint, kind, given):
    expected = trained(checkpoint, CONFIGS[kind], Path("style"))
    assert command.main(["add", str(checkpoint), given, "to=out.safetensors"]) == 0
    before, out = load_file(checkpoint), load_file("out.safetensors")
    touched = {name for name, values in expected.items() if not torch.equal(values, before[name].float())}
    assert len(touched) == len(CONFIGS[kind].target_modules)
    for name, values in expected.items():
        torch.testing.assert_close(out[name].float(), values, rtol=2e-3, atol=2e-4)
    assert all(torch.equal(out[name], before[name]) for name in before if name not in touched)


def differences(path: Path, checkpoint: Path) -> dict[str, Tensor]:
    """What the LoRA at `path` adds to each tensor."""
    found: dict[str, Tensor] = {}
    for name, change in read_adapters(path, Network.open(checkpoint).modules).changes.items():
        assert isinstance(change, Difference)
        found[name] = change.dense()
    return found


def test_its_strength_is_a_weight_and_its_config_is_not_forgotten_by_resume_or_copies(checkpoint):
    expected = trained(checkpoint, CONFIGS["rslora"], Path("style"))
    assert command.main(["add", str(checkpoint), "style", "weight=0.5", "to=out.safetensors"]) == 0
    before, out = load_file(checkpoint), load_file("out.safetensors")
    for name, values in expected.items():
        half = (before[name].float() + values) / 2
        torch.testing.assert_close(out[name].float(), half, rtol=2e-3, atol=2e-4)
    Path("alone").mkdir()
    Path("style/adapter_model.safetensors").rename("alone/adapter_model.safetensors")
    assert command.main(["add", str(checkpoint), "alone", "to=other.safetensors"]) == 3


def test_the_recipes_read_it_too(checkpoint):
    trained(checkpoint, CONFIGS["ranks and alphas by layer"], Path("style"))
    own = differences(Path("style"), checkpoint)
    translate.main(translate.Config(lora=Path("style"), output=Path("k.safetensors"), dialect="kohya", base=checkpoint))
    resize.main(resize.Config(lora=Path("style"), output=Path("r.safetensors"), rank=4, base=checkpoint))
    combine.main(
        combine.Config(
            loras=(combine.Lora(file=Path("style"), weight=2.0), combine.Lora(file=Path("k.safetensors"), weight=-1.0)),
            output=Path("c.safetensors"),
            base=checkpoint,
            dtype="float32",
        )
    )
    for file in ("k", "r", "c"):
        again = differences(Path(f"{file}.safetensors"), checkpoint)
        assert again.keys() == own.keys()
        for name, values in own.items():
            torch.testing.assert_close(again[name], values, rtol=1e-4, atol=1e-5)


def test_what_is_read_is_not_written_over_and_another_file_beside_the_config_is_not_scaled_by_it(checkpoint):
    trained(checkpoint, CONFIGS["a plain LoRA"], Path("style"))
    with pytest.raises(ConfigError, match="is also an input"):
        translate.main(
            translate.Config(lora=Path("style"), output=Path("style/adapter_model.safetensors"), dialect="diffusers")
        )
    beside = Path("style/new.safetensors")  # in diffusers' names, without alpha, which is that of the rank
    translate.main(translate.Config(lora=Path("style"), output=beside, dialect="diffusers", base=checkpoint))
    was, now = (differences(path, checkpoint) for path in (Path("style"), beside))
    for name, values in was.items():
        torch.testing.assert_close(now[name], values, rtol=1e-5, atol=1e-6)


def test_a_place_in_the_users_home_is_known_to_be_an_input(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    trained(checkpoint, CONFIGS["a plain LoRA"], Path("style"))
    translate.main(
        translate.Config(lora=Path("~/style"), output=Path("k.safetensors"), dialect="diffusers", base=checkpoint)
    )
    before = Path("k.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is also an input"):
        resize.main(resize.Config(lora=Path("~/k.safetensors"), output=Path("k.safetensors"), rank=1))
    assert Path("k.safetensors").read_bytes() == before


@pytest.mark.parametrize("setting", [*OTHER_LAYERS, *OTHER_BASES])
def test_a_lora_that_means_something_else_is_refused_by_the_name_of_its_setting(checkpoint, setting, capsys):
    trained(checkpoint, CONFIGS["a plain LoRA"], Path("style"))
    config = Path("style/adapter_config.json")
    more = {"init_lora_weights": setting} if setting in OTHER_BASES else {setting: [1]}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    assert command.main(["add", str(checkpoint), "style", "to=out.safetensors"]) == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert f"adapter_config.json: {next(iter(more))}" in said and setting in said and "peft" in said
    assert not Path("out.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_peft_itself_changes_the_base_that_such_a_lora_is_for(checkpoint):
    """Else they would not have to be refused."""
    config = peft.LoraConfig(r=4, target_modules=[TO_K], init_lora_weights="pissa")
    model: Any = peft.get_peft_model(cast("Any", network(checkpoint)), config)
    held = model.get_submodule(f"base_model.model.{TO_K}.base_layer").state_dict()["weight"]
    assert not torch.allclose(held, network(checkpoint).state_dict()[f"{TO_K}.weight"], atol=1e-2)


def test_a_folder_without_its_weights_is_refused(checkpoint):
    Path("style").mkdir()
    Path("style/adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"style: no adapter_model.safetensors beside adapter_config.json"):
        open_store(Path("style"))
    Path("style/adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeError, match="a pickle"):
        open_store(Path("style"))


def test_a_folder_is_not_converted_as_its_config_would_be_lost(checkpoint):
    trained(checkpoint, CONFIGS["a plain LoRA"], Path("style"))
    with pytest.raises(DataError, match="use 'tuner translate"):
        convert(Path("style"), Path("style.safetensors"))


NAMES = {kind: [end for end, (owner, _) in SUFFIXES.items() if owner == kind] for kind in FORMS if kind}


@pytest.mark.parametrize("kind", NAMES)
def test_whatever_can_be_read_as_an_adapter_is_known_to_be_one(kind):
    """Else a merge would take the file for a checkpoint."""
    start = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"
    names = [
        f"{start}.processor.to_q{end}" if end.startswith("_lora.") else f"{start}.to_q{end}" for end in NAMES[kind]
    ]
    for parts in FORMS[kind]:
        ends = [name for name, end in zip(names, NAMES[kind], strict=True) if SUFFIXES[end][1] in parts]
        assert is_lora(ends), ends
