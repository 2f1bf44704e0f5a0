"""Merges of Stable Diffusion 3.5 and Flux: numbers for blocks, and components from elsewhere, in either layout."""

from pathlib import Path

import pytest
import torch

from merge import command
from merge.blocks import Blocks
from tests.tuner.weights import original
from tuner.weights.convert import convert
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

TEXT = "text_encoders."
CLIP = original.clip(f"{TEXT}clip_l.transformer.", 4, 2)
SD3 = original.mmdit(width=8, depth=3, head=4, normed=True, dual=2, positions=4, context=4, pooled=10)
FLUX = original.flux(width=8, double=2, single=3, head=4, channels=6, context=4, pooled=4, out=6)
MODELS = {
    "sd35-medium": SD3 | original.vae16(width=2) | CLIP | original.clip(f"{TEXT}clip_g.transformer.", 6, 3),
    "flux-dev": FLUX | original.vae16("vae.", 2) | CLIP,
}
CONFIG = """
output = "{out}.safetensors"
components = {{ vae = "b" }}

[models]
a = "{a}.safetensors"
b = "{b}.safetensors"

[[steps]]
name = "mixed"
inputs = ["a", "b"]
method = {{ type = "lerp", t = {{ default = 0.5, blocks = {blocks} }} }}
"""
NUMBERS = {
    "sd35-medium": {"D00": 0.0, "D02": 1.0, "IN": 0.25, "OUT": 0.0, "CLIP": 1.0},
    "flux-dev": {"D01": 0.0, "S00": 1.0, "S02": 0.25, "OUT": 0.0, "IN": 1.0},
}


def write(path: Path, shapes: original.Shapes, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    save_safetensors(path, {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()})


@pytest.mark.parametrize("model", MODELS)
def test_a_merge_with_numbers_for_blocks_is_the_same_in_both_layouts(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write(Path(f"{name}.safetensors"), MODELS[model], seed)
        convert(Path(f"{name}.safetensors"), Path(f"{name}-canonical.safetensors"), layout="diffusers")
    blocks = "{ " + ", ".join(f"{label} = {number}" for label, number in NUMBERS[model].items()) + " }"
    for end in ("", "-canonical"):
        Path(f"merge{end}.toml").write_text(CONFIG.format(out=f"out{end}", a=f"a{end}", b=f"b{end}", blocks=blocks))
        assert command.main([f"merge{end}.toml"]) == 0
    convert(Path("out.safetensors"), Path("converted.safetensors"), layout="diffusers")
    one, other = SafetensorsFile(Path("converted.safetensors")), SafetensorsFile(Path("out-canonical.safetensors"))
    assert one.metas.keys() == other.metas.keys()
    for name in one.metas:
        assert torch.equal(one.read(name), other.read(name)), name
    a, b, out = (SafetensorsFile(Path(f"{name}.safetensors")) for name in ("a", "b", "out"))
    labels = Blocks.of(a.metas)
    seen: set[float] = set()
    for name in a.metas:
        label = str(labels.block(name))
        share = 1.0 if label == "VAE" else NUMBERS[model].get(label, 0.5)
        seen.add(share)
        assert torch.allclose(out.read(name), torch.lerp(a.read(name), b.read(name), share), atol=1e-6), name
    assert seen == {0.0, 0.25, 0.5, 1.0}


def test_models_of_two_variants_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.safetensors"), SD3, 0)
    write(Path("b.safetensors"), original.mmdit(width=8, depth=3, head=4, positions=4, context=4, pooled=10), 1)
    assert command.main(["lerp", "a.safetensors", "b.safetensors", "t=0.5", "to=out.safetensors"]) == 3
    said = capsys.readouterr().err
    assert "one is Stable Diffusion 3.5 medium, the other Stable Diffusion 3 medium" in said
