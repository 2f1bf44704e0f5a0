"""LoRAs among the models of a merge, as far as they depend on the weights that they are added to."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import command, run
from merge.folder import key_of
from tests.merge.test_run import kohya_lora, tiny


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def dora(path: Path) -> dict[str, torch.Tensor]:
    """`kohya_lora` with magnitudes for the linear layer of the U-Net; the differences inside."""
    deltas = kohya_lora(path)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({**load_file(path), f"{layer}.dora_scale": torch.full((32, 1), 0.5)}, path)
    return deltas


def recipe(*steps: str, output: str = "o.safetensors") -> str:
    """A recipe file with these steps on two checkpoints and a DoRA, `first`, `other` and `style`."""
    models = "".join(f'{name} = "{name}.safetensors"\n' for name in ("first", "other", "style"))
    text = [f"[[steps]]\nname = 's{number}'\n{step}\n" for number, step in enumerate(steps)]
    Path("recipe.toml").write_text(f'output = "{output}"\n[models]\n{models}{"".join(text)}')
    return "recipe.toml"


ADD = 'method = { type = "add" }\ninputs = '


def test_a_dora_goes_by_the_weights_of_the_model_that_it_is_added_to(capsys):
    for seed, name in enumerate(("first", "other")):
        tiny(Path(f"{name}.safetensors"), seed)
    delta = dora(Path("style.safetensors"))[TO_K]
    weight = load_file("other.safetensors")[TO_K].double()
    expected = 0.5 * (weight + delta) / (weight + delta).norm(dim=1, keepdim=True)
    assert command.main([recipe(ADD + '["other", "style"]')]) == 0
    assert torch.allclose(load_file("o.safetensors")[TO_K].double(), expected, atol=1e-3)
    assert command.main([recipe(ADD + '["other", "style"]', ADD + '["s0", "style"]', output="twice.safetensors")]) == 0
    assert torch.allclose(load_file("twice.safetensors")[TO_K].double(), 2 * expected - weight, atol=2e-3)
    blend = 'method = { type = "lerp" }\ninputs = ["first", "other"]'
    capsys.readouterr()
    for steps in (
        (blend, ADD + '["s0", "style"]'),
        (ADD + '["first", "style"]', ADD + '["other", "style"]'),
        ('method = { type = "ties" }\ninputs = ["other"]\nbase = "first"', ADD + '["s0", "style"]'),
    ):
        last = f'method = {{ type = "lerp" }}\ninputs = ["s0", "s{len(steps) - 1}"]'
        assert command.main([recipe(*steps, last)]) == 2
        assert "'style' depends on the weights that it is added to" in capsys.readouterr().err


def test_a_merge_is_not_gone_on_with_when_a_loras_config_has_changed():
    """A LoRA of peft's is as strong as its config says, whose place is beside the tensors."""
    tiny(Path("first.safetensors"), 0)
    layer = "base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    Path("style").mkdir()
    save_file(factors, "style/adapter_model.safetensors")
    keys: list[str] = []
    for alpha in (2, 4):
        Path("style/adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {alpha}}}')
        plan = run.plan(
            command.read(["add", "first.safetensors", "style/adapter_model.safetensors", "to=o.safetensors"])
        )
        keys.append(key_of({}, plan))
    assert keys[0] != keys[1]
