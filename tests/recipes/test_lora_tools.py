"""extract, resize, combine and translate from the command line, on small networks with the names of real ones."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.adapted import lora_source
from merge.lora.delta import LoraDelta
from merge.lora.network import Network
from tests.tuner.weights import original
from tuner import cli
from tuner.config.loader import load
from tuner.weights.adapters.file import read_adapters
from tuner.weights.store import SafetensorsFile


def shapes(family: str) -> original.Shapes:
    """Of a single file with the family's topology, a few numbers wide."""
    vae = original.vae(width=2, latent=2)
    if family == "sd1":
        return original.unet(width=4, context=6) | vae | original.clip("cond_stage_model.transformer.", 4, 2)
    text = "text_encoders."
    texts = original.clip(f"{text}clip_l.transformer.", 4, 2) | original.t5(f"{text}t5xxl.transformer.", 4, 1, 1, 8)
    if family == "flux":
        small = original.flux(width=8, double=2, single=2, head=4, channels=4, context=4, pooled=4, out=4)
        return small | original.vae("vae.", 2, 2) | texts
    if family == "sd3":
        small = original.mmdit(
            width=8, depth=3, head=4, normed=True, dual=1, positions=4, channels=2, context=4, pooled=4
        )
        return small | vae | texts | original.clip(f"{text}clip_g.transformer.", 6, 2)
    unet = original.unet("model.diffusion_model.", 4, (1, 2, 4), (0, 2, 3), 3, 6, conv=False, sizes=5)
    embedders = "conditioner.embedders."
    return (
        unet
        | vae
        | original.clip(f"{embedders}0.transformer.", 4, 2)
        | original.open_clip(f"{embedders}1.model.", 6, 2)
    )


def checkpoint(path: Path, family: str, tuned: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes(family).items()}
    if tuned:
        tensors = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    return tensors


@pytest.fixture(params=["sd1", "sdxl"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with `base.safetensors` and `tuned.safetensors`."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        checkpoint(Path(f"{name}.safetensors"), request.param, name == "tuned")
    return request.param


def run(*words: str) -> None:
    assert cli.main(list(words)) == 0


BOTH, TO = ("extract", "base=base.safetensors"), "output=o.safetensors"
EXTRACT = (*BOTH, "tuned=tuned.safetensors", "dtype=float32")


def differences(file: str, base: str = "base.safetensors") -> Mapping[str, Tensor]:
    network = Network.open(Path(base))
    delta = LoraDelta(read_adapters(Path(file), network.modules), network.store)
    return {name: delta.read(name) for name in delta.metas}


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    names = set(one) | set(other)
    error = sum((one.get(name, 0) - other.get(name, 0)).square().sum().item() for name in names)  # pyright: ignore
    return (error / sum(tensor.square().sum().item() for tensor in one.values())) ** 0.5


def header(file: str) -> Mapping[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_all_that_a_fine_tune_changed_is_in_a_lora_of_full_rank(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*EXTRACT, "output=full.safetensors", "rank=1000", "--check")
    assert not Path("full.safetensors").exists() and "would tell of" in capsys.readouterr().out
    run(*EXTRACT, "output=full.safetensors", "rank=1000")
    said = capsys.readouterr().out
    old, new = (Network.open(Path(f"{name}.safetensors")).store for name in ("base", "tuned"))
    expected = {
        name: new.read(name) - old.read(name)
        for name in old.metas
        if not name.startswith("vae.") and "_embedding.weight" not in name
    }
    assert apart(expected, differences("full.safetensors")) < 1e-5
    assert "the kohya dialect has no word for it" in said and "an embedding" in said and "read back" in said
    tensors = load_file("full.safetensors")
    if place == "sd1":
        assert "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight" in tensors
        assert "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b" in tensors
    else:
        assert "lora_unet_input_blocks_4_1_proj_in.lora_down.weight" in tensors
        assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.diff_b" in tensors
        assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors
    texts = header("full.safetensors")
    assert texts["modelspec.merged_from"] == "tuned, base" and texts["modelspec.title"] == "full"
    assert texts["ss_base_model_version"] == {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}[place]
    assert texts["ss_network_module"] == "lycoris.kohya" and "/" not in texts["modelspec.merged_from"]


def test_a_lora_is_extracted_resized_combined_and_translated(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*EXTRACT, "output=four.safetensors", "rank=4", "vectors=false")
    run("resize", "lora=four.safetensors", "output=two.safetensors", "rank=2")
    run(*EXTRACT, "output=straight.safetensors", "rank=2", "vectors=false")
    assert apart(differences("straight.safetensors"), differences("two.safetensors")) < 0.05
    assert header("two.safetensors")["ss_network_dim"] == "2" and header("four.safetensors")["ss_network_dim"] == "4"
    assert header("two.safetensors")["modelspec.merged_from"] == "four"

    loras = 'loras=[{ file = "four.safetensors" }, { file = "two.safetensors", weight = -1.0 }]'
    run("combine", loras, "output=rest.safetensors", "dtype=float32")
    four, two, rest = (differences(f"{name}.safetensors") for name in ("four", "two", "rest"))
    assert apart({name: four[name] - two.get(name, 0) for name in four}, rest) < 1e-4  # of numbers that nearly cancel

    capsys.readouterr()
    run("translate", "lora=four.safetensors", "output=there.safetensors", "dialect=diffusers", "base=base.safetensors")
    assert all(name.startswith(("unet.", "text_encoder")) for name in load_file("there.safetensors"))
    run("translate", "lora=there.safetensors", "output=comfy.safetensors", "dialect=comfy", "base=base.safetensors")
    assert all(name.startswith(("diffusion_model.", "text_encoders.clip_")) for name in load_file("comfy.safetensors"))
    run("translate", "lora=comfy.safetensors", "output=back.safetensors", "dialect=kohya", "base=base.safetensors")
    assert set(load_file("back.safetensors")) == set(load_file("four.safetensors"))
    for name in ("there", "comfy", "back"):
        assert apart(four, differences(f"{name}.safetensors")) < 1e-6
    assert "ss_base_model_version" in header("back.safetensors")


FUSED = {"flux": "lora_unet_double_blocks_0_img_attn_qkv", "sd3": "lora_unet_joint_blocks_0_x_block_attn2_qkv"}
WHOLE = {"flux": "single_blocks.1.linear1", "sd3": "joint_blocks.2.context_block.attn.qkv"}


@pytest.mark.parametrize("place", ["flux", "sd3"], indirect=True)
def test_a_transformers_lora_is_extracted_translated_and_baked(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*EXTRACT, "output=full.safetensors", "rank=1000")
    assert f"{FUSED[place]}.lora_down.weight" in load_file("full.safetensors")
    assert header("full.safetensors")["ss_base_model_version"] == {"flux": "flux1", "sd3": "sd3"}[place]
    old, tuned = (load_file(f"{name}.safetensors") for name in ("base", "tuned"))
    source = lora_source("lora", Path("full.safetensors"), SafetensorsFile(Path("base.safetensors")))
    names = set(source.store.metas)
    final = "model.diffusion_model.final_layer.adaLN_modulation.1"
    assert {f"model.diffusion_model.{WHOLE[place]}.weight", f"{final}.weight", f"{final}.bias"} <= names
    assert {
        f"model.diffusion_model.{WHOLE[place]}.bias",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
    } <= names
    for name in names:
        assert torch.allclose(old[name] + source.store.read(name), tuned[name], atol=1e-5), name

    run(*EXTRACT, "output=four.safetensors", "rank=4", "vectors=false")
    there = (
        "translate",
        "lora=four.safetensors",
        "output=there.safetensors",
        "dialect=diffusers",
        "base=base.safetensors",
    )
    assert cli.main(list(there)) == 3 and "no LoRA of a T5; leave it out" in capsys.readouterr().err
    t5 = {"flux": "text_encoder_2", "sd3": "text_encoder_3"}[place]
    assert cli.main([*there, 'drop=["nothing*"]']) == 2 and "fits no tensor" in capsys.readouterr().err
    assert cli.main([*there, 'drop=["*"]']) == 2 and "nothing is left" in capsys.readouterr().err
    run(*there, f'drop=["{t5}.*"]')
    assert "left out: 7 tensors" in capsys.readouterr().out
    assert all(name.startswith(("transformer.", "text_encoder")) for name in load_file("there.safetensors"))
    four = {name: tensor for name, tensor in differences("four.safetensors").items() if not name.startswith(t5)}
    run("translate", "lora=there.safetensors", "output=comfy.safetensors", "dialect=comfy", "base=base.safetensors")
    assert f"diffusion_model.{WHOLE[place]}.lora_up.weight" in load_file("comfy.safetensors")
    run("translate", "lora=comfy.safetensors", "output=back.safetensors", "dialect=kohya", "base=base.safetensors")
    for name in ("there", "comfy", "back"):
        assert apart(four, differences(f"{name}.safetensors")) < 1e-6
    back, first = load_file("back.safetensors"), load_file("four.safetensors")
    assert set(back) == {name for name in first if not name.startswith("lora_te3_")}

    run("resize", "lora=four.safetensors", "output=two.safetensors", "rank=2", "base=base.safetensors")
    assert load_file("two.safetensors")[f"{FUSED[place]}.lora_down.weight"].shape[0] == 6
    budget = ("resize", "lora=four.safetensors", TO, "rank.type=budget", "rank.megabytes=1", "base=base.safetensors")
    assert cli.main(list(budget)) == 2 and "a budget cannot be kept" in capsys.readouterr().err


def test_a_method_combines_what_differs_in_names_where_the_base_is_given(place: str) -> None:
    run(*EXTRACT, "output=one.safetensors", "rank=3", "vectors=false")
    run("translate", "lora=one.safetensors", "output=two.safetensors", "dialect=diffusers", "base=base.safetensors")
    words = (
        "combine",
        'loras=[{ file = "one.safetensors", weight = 0.5 }, { file = "two.safetensors", weight = 0.5 }]',
        "output=three.safetensors",
        "dtype=float32",
    )
    assert cli.main(list(words)) == 3
    run(*words, "base=base.safetensors")
    assert apart(differences("one.safetensors"), differences("three.safetensors")) < 1e-5
    ties = ("base=base.safetensors", "method.type=ties", "method.density=1.0")
    assert cli.main([*words, *ties]) == 2  # no rank
    run(*words, *ties, "rank.type=energy", "rank.share=1.0")
    half = {name: 0.5 * tensor for name, tensor in differences("one.safetensors").items()}  # the mean of two halves
    assert apart(half, differences("three.safetensors")) < 1e-4


ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "loras").glob("*.toml"))


@pytest.mark.parametrize("place", ["sd1"], indirect=True)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_makes_the_file_that_it_promises(place: str, example: Path) -> None:
    if example.stem == "extract":
        Path("base.safetensors").rename("sd15.safetensors")
        Path("tuned.safetensors").rename("style.safetensors")
    else:
        shutil.copy("base.safetensors", "sd15.safetensors")
        for number, name in enumerate(("style", "subject", "large")):
            run(*EXTRACT, f"output={name}.safetensors", f"rank={number + 2}", "vectors=false")
    run(example.stem, str(example), "--check")
    config = load(cli.recipe_module(example.stem).Config, example)
    assert not config.output.exists()
    run(example.stem, str(example))
    assert differences(str(config.output), "sd15.safetensors")


@pytest.mark.parametrize("place", ["sd1"], indirect=True)
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((*BOTH, "tuned=nothing.safetensors", TO), 3, "no such file"),
        ((*BOTH, "tuned=base.safetensors", TO), 3, "are equal"),
        ((*BOTH, "tuned=tuned.safetensors", "output=base.safetensors"), 2, "also an input"),
        ((*BOTH, "tuned=tuned.safetensors", "output=no/o.safetensors"), 2, "does not exist"),
        ((*EXTRACT, TO, "rank.type=budget", "rank.megabytes=1", "dialect=diffusers"), 2, "a budget has no use"),
        ((*EXTRACT, TO, "rank=0"), 2, "at least 1"),
        ((*EXTRACT, TO, "rank.type=energy", "rank.share=2"), 2, "rank: share: 2 is not between 0 and 1"),
        (("resize", "lora=base.safetensors", TO, "rank=2"), 3, "no part of an adapter"),
        (("translate", "lora=tuned.safetensors", TO, "dialect=kohya"), 3, "no part of an adapter"),
        (("combine", "loras=[]", TO), 2, "0 for 0 LoRAs"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(
    place: str, words: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(words)) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("o.safetensors").exists()
    name = "first_stage_model.quant_conv.bias"
    assert torch.equal(load_file("base.safetensors")[name], checkpoint(Path("again"), "sd1", False)[name])
