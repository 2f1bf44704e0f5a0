"""Every recipe in examples/merge is run, on checkpoints with Stable Diffusion 1's names and tiny shapes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import command

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "examples" / "merge").glob("*.toml"))
SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    **{
        f"model.diffusion_model.{place}.1.transformer_blocks.0.attn2.to_v.weight": (8, 768)
        for place in (*(f"input_blocks.{n}" for n in (1, 2, 4, 5, 7, 8)), "middle_block")
    },
    **{f"model.diffusion_model.output_blocks.{n}.0.in_layers.2.weight": (8, 8, 3, 3) for n in range(12)},
    "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (100, 16),
}


def checkpoint(path: Path) -> None:
    shapes = dict(SHAPES)
    if "inpainting" in path.stem:
        shapes["model.diffusion_model.input_blocks.0.0.weight"] = (8, 9, 3, 3)
    rng = torch.Generator().manual_seed(0)
    base = {name: torch.randn(SHAPES[name], generator=rng) for name in SHAPES}
    rng.manual_seed(sum(path.stem.encode()))
    changed = {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for name, tensor in base.items():
        if tensor.ndim == 4:
            changed[name][:, : tensor.shape[1]] += tensor
        else:
            changed[name] += tensor
    save_file({name: tensor.half() for name, tensor in changed.items()}, path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_an_example_merges_and_says_the_command_that_runs_it(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = command.read([str(recipe)])
    assert f"tuner merge {recipe.relative_to(ROOT).as_posix()}" in recipe.read_text("utf-8")
    for path in config.models.values():
        checkpoint(path)
    assert command.main([str(recipe), "--plan"]) == 0
    assert "output: " in capsys.readouterr().out
    assert command.main([str(recipe)]) == 0
    made = load_file(config.output)
    assert made.keys() == SHAPES.keys()
    first = load_file(next(iter(config.models.values())))
    assert any(not torch.equal(made[name].float(), first[name].float()) for name in SHAPES)
