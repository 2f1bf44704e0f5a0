"""`tuner merge` from the command line to the file: what users type, and what they are told."""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge import command, rebuild, run
from merge.symmetries import Permuted, Structure, symmetries
from tests.tuner.weights import original
from tuner.weights.checkpoint import open_store
from tuner.weights.layouts.ldm import from_diffusers, to_diffusers
from tuner.weights.store import SafetensorsFile
from tuner.weights.views import Assembled

SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
    "model.diffusion_model.middle_block.0.in_layers.2.weight": (8, 8, 3, 3),
    "model.diffusion_model.output_blocks.11.0.out_layers.3.bias": (8,),
    "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (100, 16),
}
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def model(path: Path, seed: int, shapes=SHAPES, scale: float = 1.0, **metadata: str) -> Path:
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: (scale * torch.randn(shape, generator=rng)).half() for name, shape in shapes.items()}
    save_file({**tensors, IDS: torch.arange(77)[None]}, path, metadata or None)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(Path("a.safetensors"), 1)
    model(Path("b.safetensors"), 2)
    model(Path("base.safetensors"), 3)


def merge(*words: str) -> int:
    return command.main(words)


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_one_line_merges_two_files(capsys):
    assert merge("lerp", "a.safetensors", "b.safetensors", "t=0.3", "to=out.safetensors") == 0
    a, b, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "out"))
    for name in SHAPES:
        assert torch.equal(out[name], torch.lerp(a[name].float(), b[name].float(), 0.3).half())
    assert torch.equal(out[IDS], a[IDS])
    said = capsys.readouterr().out
    assert re.search(r"out.safetensors: 8 tensors \(7 merged, 1 copied\).*largest error 0\.[0-5]\d* ulp", said)


def test_a_method_on_differences_takes_a_base():
    assert (
        merge("task_arithmetic", "a.safetensors", "b.safetensors", "base=base.safetensors", "to=out.safetensors") == 0
    )
    a, b, base, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "base", "out"))
    for name in SHAPES:
        expected = base[name].double() + (a[name].double() - base[name]) + (b[name].double() - base[name])
        assert torch.allclose(out[name].double(), expected, rtol=1e-3, atol=1e-3)


RECIPE = """
output = "out.safetensors"
dtype = "bfloat16"

[models]
a = "a.safetensors"
b = "b.safetensors"
base = "base.safetensors"

[[steps]]
name = "blend"
method = { type = "lerp", t = { default = 0.5, blocks = { M00 = 1.0 }, names = [["*attn2*", 0.0]] } }
inputs = ["a", "b"]

[[steps]]
name = "moved"
method = { type = "task_arithmetic" }
inputs = ["blend"]
base = "base"

[components]
vae = "b"
text_encoder = "none"
"""


def test_a_recipe_has_steps_numbers_by_block_and_components():
    Path("recipe.toml").write_text(RECIPE)
    assert merge("recipe.toml") == 0
    a, b, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "out"))
    assert all(name.split(".")[0] != "cond_stage_model" for name in out)
    name = "first_stage_model.encoder.conv_in.weight"
    assert torch.equal(out[name], b[name].bfloat16())
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    assert torch.allclose(out[name].float(), b[name].float(), atol=2e-2)
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert torch.allclose(out[name].float(), a[name].float(), atol=2e-2)


def test_the_plan_is_said_from_headers_and_nothing_is_written(capsys):
    Path("recipe.toml").write_text(RECIPE)
    assert merge("recipe.toml", "--plan") == 0
    said = capsys.readouterr().out
    assert "copied from b" in said
    assert "reads" in said and "memory" in said
    assert not Path("out.safetensors").exists()
    assert merge("recipe.toml", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["tensors"]) == 6


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["lerq", "a.safetensors", "b.safetensors", "to=o.safetensors"], 2, "no 'lerq' here; did you mean 'lerp'?"),
        (["lerp", "a.safetensors", "to=o.safetensors"], 2, "Lerp takes 2 inputs, got 1"),
        (["lerp", "a.safetensors", "b.safetensors"], 2, "to: missing"),
        (["lerp", "a.safetensors", "b.safetensors", "tt=1", "to=o.safetensors"], 2, "tt: unknown key"),
        (["lerp", "a.safetensors", "c.safetensors", "to=o.safetensors"], 3, "c.safetensors: no such file"),
        (["lerp", "a.safetensors", "b.safetensors", "to=o.ckpt"], 2, "ends in .safetensors"),
        (["lerp", "a.safetensors", "b.safetensors", "to=a.safetensors"], 2, "a.safetensors: is also an input"),
        (["ties", "a.safetensors", "b.safetensors", "to=o.safetensors"], 2, "say 'base'"),
        (["lerp", "a.safetensors", "b.safetensors", "to=x/o.safetensors"], 5, "x: no such folder"),
        (["lerp", "a.safetensors", "b.safetensors", "threads=-1", "to=o.safetensors"], 2, "threads: -1, expected 0"),
        (["lerp", "a.safetensors", "b.safetensors", "verify=-1", "to=o.safetensors"], 2, "verify: -1, expected 0"),
        (
            ["lerp", "a.safetensors", "b.safetensors", "device=gpu", "to=o.safetensors"],
            2,
            "device: 'gpu' cannot be used",
        ),
        (
            ["lerp", "a.safetensors", "b.safetensors", "device=cuda:99", "to=o.safetensors"],
            2,
            "device: 'cuda:99' cannot",
        ),
        (["rebuild", "a.safetensors", "--sources", "."], 3, "holds no recipe"),
        ([], 2, "give a recipe file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(capsys, words, code, said):
    before = digest("a.safetensors")
    assert merge(*words) == code
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert digest("a.safetensors") == before
    assert not Path("o.safetensors").exists()


def test_models_of_two_architectures_are_refused(capsys):
    other = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)}
    model(Path("two.safetensors"), 5, SHAPES | other)
    assert merge("lerp", "a.safetensors", "two.safetensors", "to=o.safetensors") == 3
    said = capsys.readouterr().err
    assert "a [8, 768], two [8, 1024]" in said and "not of one architecture" in said
    assert not Path("o.safetensors").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_models_that_do_not_fit_are_refused_naming_tensors(capsys, change):
    shapes = dict(SHAPES)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    if change == "missing":
        del shapes[name]
    elif change == "extra":
        shapes["model.diffusion_model.more.weight"] = (3,)
    else:
        shapes[name] = (8, 7, 3, 3)
    model(Path("odd.safetensors"), 5, shapes)
    assert merge("lerp", "a.safetensors", "odd.safetensors", "to=o.safetensors") == 3
    assert ("more.weight" if change == "extra" else name) in capsys.readouterr().err
    if change != "shape":
        assert merge("lerp", "a.safetensors", "odd.safetensors", "missing=take", "to=o.safetensors") == 0
        merged = load_file("o.safetensors")
        only = "a" if change == "missing" else "odd"
        kept = name if change == "missing" else "model.diffusion_model.more.weight"
        assert torch.equal(merged[kept], load_file(f"{only}.safetensors")[kept])


@pytest.mark.parametrize("lacking", ["a", "base"])
@pytest.mark.parametrize("method", ["task_arithmetic", "add_difference"])
def test_what_some_model_lacks_is_taken_also_where_differences_are_merged(method, lacking):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    model(Path(f"{lacking}.safetensors"), 1, {key: shape for key, shape in SHAPES.items() if key != name})
    base = ["base=base.safetensors"] if method == "task_arithmetic" else ["base.safetensors"]
    words = [method, "a.safetensors", "b.safetensors", *base, "to=o.safetensors"]
    assert merge(*words) == 3
    assert merge(*words, "missing=take") == 0
    assert set(load_file("o.safetensors")) == {*SHAPES, IDS}


@pytest.mark.parametrize("lost", ["all of it", "some of it"])
def test_a_component_is_not_taken_from_a_model_that_has_not_all_of_it(capsys, lost):
    more = "first_stage_model.encoder.conv_out.weight"
    model(Path("a.safetensors"), 1, {**SHAPES, more: (8, 3, 3, 3)})
    kept = {name: shape for name, shape in SHAPES.items() if lost == "some of it" or not name.startswith("first_stage")}
    model(Path("b.safetensors"), 2, kept)
    words = ["lerp", "a.safetensors", "a.safetensors", "models.b=b.safetensors", "components.vae=b", "to=o.safetensors"]
    assert merge(*words) == 3
    assert more in capsys.readouterr().err
    assert merge(*words, "missing=take") == 0
    assert torch.equal(load_file("o.safetensors")[more], load_file("a.safetensors")[more])


@pytest.mark.parametrize("floating", ["a", "b"])
def test_positions_that_one_model_has_as_floating_point_numbers_stay_positions(floating):
    tensors = load_file(f"{floating}.safetensors")
    save_file({**tensors, IDS: tensors[IDS].half()}, f"{floating}.safetensors")
    for t in (0.0, 0.5, 1.0):
        assert merge("lerp", "a.safetensors", "b.safetensors", f"t={t}", "to=o.safetensors", "--overwrite") == 0
        assert torch.equal(load_file("o.safetensors")[IDS], load_file("a.safetensors")[IDS])


def test_eps_and_v_are_not_mixed_unless_it_is_meant(capsys):
    model(Path("v.safetensors"), 5, {**SHAPES, "v_pred": (0,)})
    assert merge("lerp", "a.safetensors", "v.safetensors", "to=o.safetensors") == 3
    assert "v_pred" in capsys.readouterr().err
    assert merge("lerp", "a.safetensors", "v.safetensors", "mixed=true", "to=o.safetensors") == 0
    assert "v_pred" in load_file("o.safetensors")
    assert merge("rebuild", "o.safetensors", "--sources", ".", "--to", "again.safetensors") == 0
    assert digest("again.safetensors") == digest("o.safetensors")


def test_the_first_convolution_of_an_inpainting_model_is_merged_where_it_is_shared(capsys):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    model(Path("inpaint.safetensors"), 7, {**SHAPES, name: (8, 9, 3, 3)})
    assert merge("add_difference", "inpaint.safetensors", "a.safetensors", "base.safetensors", "to=o.safetensors") == 0
    assert (
        "has 9 input channels, as inpaint, which comes first: 4 are merged, the other 5 kept" in capsys.readouterr().err
    )
    out, inpaint, a, base = (load_file(f"{file}.safetensors")[name] for file in ("o", "inpaint", "a", "base"))
    assert torch.equal(out[:, 4:], inpaint[:, 4:])
    assert torch.equal(out[:, :4], (inpaint[:, :4].float() + (a.float() - base.float())).half())


def test_of_an_inpainting_and_an_editing_model_only_the_latents_channels_are_merged():
    name = "model.diffusion_model.input_blocks.0.0.weight"
    model(Path("inpaint.safetensors"), 7, {**SHAPES, name: (8, 9, 3, 3)})
    model(Path("edit.safetensors"), 8, {**SHAPES, name: (8, 8, 3, 3)})
    assert merge("lerp", "inpaint.safetensors", "edit.safetensors", "t=0.5", "to=o.safetensors") == 0
    out, inpaint, edit = (load_file(f"{file}.safetensors")[name] for file in ("o", "inpaint", "edit"))
    assert torch.equal(out[:, 4:], inpaint[:, 4:])
    assert torch.equal(out[:, :4], torch.lerp(inpaint[:, :4].float(), edit[:, :4].float(), 0.5).half())


def test_rebuild_finds_the_models_by_their_contents_and_gives_the_same_file(tmp_path, capsys):
    Path("recipe.toml").write_text(RECIPE)
    assert merge("recipe.toml") == 0
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for old, new in (("a", "b"), ("b", "z"), ("base", "a")):
        Path(f"{old}.safetensors").rename(moved / f"{new}.safetensors")
    assert merge("rebuild", "out.safetensors", "--sources", "elsewhere", "--to", "again.safetensors") == 0
    assert digest("again.safetensors") == digest("out.safetensors")
    model(moved / "z.safetensors", 99)
    assert merge("rebuild", "out.safetensors", "--sources", "elsewhere", "--to", "third.safetensors") == 3
    assert "b: none of" in capsys.readouterr().err
    assert not Path("third.safetensors").exists()


def test_a_header_tells_the_family_tree(capsys):
    assert merge("lerp", "a.safetensors", "b.safetensors", "t=0.3", "to=child.safetensors") == 0
    assert merge("lerp", "child.safetensors", "base.safetensors", "t=0.1", "to=grandchild.safetensors") == 0
    capsys.readouterr()
    assert merge("tree", "grandchild.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["grandchild.safetensors", "child", "a", "b", "base"]
    assert str(Path.cwd()) not in json.dumps(SafetensorsFile(Path("grandchild.safetensors")).metadata)


@pytest.mark.parametrize("made", ["file", "scaled file", "folder", "shards"])
@pytest.mark.parametrize("place", ["first", "second"])
def test_a_merged_model_is_known_for_one_wherever_it_stands(capsys, made, place):
    """Also where not all of it is read, as the positions of a second model are not."""
    parents, others = ["a.safetensors", "b.safetensors"], "base.safetensors"
    words = {"file": ["to=child.safetensors"], "shards": ["max_shard_size=4KB", "to=child"]}.get(made, [])
    child = {"file": "child.safetensors", "shards": "child/model.safetensors.index.json"}.get(made, "child")
    if made == "folder":
        parents, others = [str(folder(Path(name), seed)) for seed, name in enumerate(("one", "two"))], "one"
        words = ["to=child"]
    elif made == "scaled file":
        tiny(Path("sd.safetensors"), 1)
        parents, others, child = ["sd.safetensors"] * 2, "sd.safetensors", "child.safetensors"
        words = ["dtype=float8_e4m3fn_scaled", f"to={child}"]
    assert merge("lerp", *parents, "t=0.3", *words) == 0
    models = [child, others] if place == "first" else [others, child]
    assert merge("lerp", *models, "t=0.1", "dtype=float16", "to=last.safetensors") == 0
    capsys.readouterr()
    assert merge("tree", "last.safetensors") == 0
    last, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert last[2] == "lerp(curve=linear," and len(lines) == 4
    (known,) = [line for line in lines if line[0] == Path(child).stem.split(".")[0]]
    assert merge("tree", child) == 0
    itself = capsys.readouterr().out.splitlines()[0].split()
    assert known[1:] == itself[1:]


def test_models_that_predict_different_things_are_refused_whoever_says_so(capsys):
    for seed, name in enumerate(("eps", "v")):
        tiny(Path(f"{name}.safetensors"), seed)
    assert merge("lerp", "eps.safetensors", "v.safetensors", "to=o.safetensors", "--plan") == 0
    Path("v.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert merge("lerp", "eps.safetensors", "v.safetensors", "to=o.safetensors", "--plan") == 0  # one says nothing
    Path("eps.yaml").write_text("model:\n  params:\n    linear_start: 0.1\n")
    capsys.readouterr()
    assert merge("lerp", "eps.safetensors", "v.safetensors", "to=o.safetensors", "--plan") == 3
    assert "one predicts epsilon, the other v; say mixed = true" in capsys.readouterr().err
    assert merge("lerp", "eps.safetensors", "v.safetensors", "mixed=true", "to=o.safetensors", "--plan") == 0
    tiny(Path("mute.safetensors"), 3)
    assert merge("weighted_sum", *(f"{name}.safetensors" for name in ("mute", "eps", "v")), "to=o", "--plan") == 3


@pytest.mark.parametrize("key", ["prediction_type", "rescale_betas_zero_snr"])
def test_folders_say_in_their_schedulers_what_they_predict(capsys, base, key):
    said = {"prediction_type": '"v_prediction"', "rescale_betas_zero_snr": "true"}[key]
    for name, own in (("one", "{}"), ("two", f'{{"{key}": {said}}}')):
        shutil.copytree(base, name)
        Path(name, "scheduler/scheduler_config.json").write_text(own)
    assert merge("lerp", "one", "two", "to=blend") == 3
    assert "say mixed = true if it is meant" in capsys.readouterr().err
    assert merge("lerp", "two", "one", "mixed=true", "to=blend") == 0
    assert (
        Path("blend/scheduler/scheduler_config.json").read_text()
        == Path("two/scheduler/scheduler_config.json").read_text()
    )


def test_other_readers_read_the_file():
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=out.safetensors") == 0
    with safe_open("out.safetensors", "pt") as file:
        assert set(file.keys()) == {*SHAPES, IDS}
        assert file.metadata()["format"] == "pt"


BIG = {f"layers.{index}.weight": (512, 512) for index in range(60)}


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_merge_leaves_the_old_output_and_goes_on_to_the_same_bytes(attempt):
    """SIGKILL of the real process, at a random moment."""
    model(Path("x.safetensors"), 11, BIG)
    model(Path("y.safetensors"), 12, BIG)
    words = ["lerp", "x.safetensors", "y.safetensors", "to=out.safetensors", "threads=2"]
    assert merge(*words) == 0
    expected = digest("out.safetensors")
    Path("out.safetensors").write_bytes(b"before")
    slow = (
        "import time, sys; from merge import execute, output, cut; "
        "execute.SAVE_BYTES = 1 << 21; "
        "write = output.Output.write\n"
        "def slowly(self, block, data): time.sleep(0.4); write(self, block, data); print('w', flush=True)\n"
        "output.Output.write = slowly\n"
        "from merge.command import main; sys.exit(main(sys.argv[1:]))"
    )
    program = [sys.executable, "-c", slow, *words, "--overwrite"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(attempt).uniform(0, 1))
        process.send_signal(signal.SIGKILL)
    assert Path("out.safetensors").read_bytes() == b"before"
    assert merge(*words, "--resume") == 0
    assert digest("out.safetensors") == expected
    assert not list(Path().glob(".*"))


def test_a_recipe_is_the_same_whatever_does_not_matter(capsys):
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=one.safetensors", "threads=1") == 0
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=two.safetensors", "threads=4", "verify=0") == 0
    assert digest("one.safetensors") == digest("two.safetensors")


def test_custom_methods_come_from_a_users_file(tmp_path, monkeypatch):
    Path("my_methods.py").write_text(
        "from dataclasses import dataclass\n"
        "from merge.methods.base import Elementwise, Space\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Larger(Elementwise):\n"
        "    takes = (Space.WEIGHT, Space.WEIGHT)\n"
        "    gives = Space.WEIGHT\n"
        "    def merge(self, inputs, out):\n"
        "        import torch\n"
        "        torch.maximum(inputs[0], inputs[1], out=out)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert merge("my_methods:Larger", "a.safetensors", "b.safetensors", "to=out.safetensors") == 0
    a, b, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "out"))
    assert all(torch.equal(out[name], torch.maximum(a[name], b[name])) for name in SHAPES)


def test_a_config_survives_its_own_recipe(tmp_path):
    Path("recipe.toml").write_text(RECIPE)
    config = command.read(["recipe.toml"])
    again = rebuild.from_recipe(run.recipe(config, run.plan(config)), config.models, config.output)
    assert again.steps == config.steps and again.components == config.components and again.dtype == config.dtype


def tiny(path: Path, seed: int) -> Path:
    """A whole Stable Diffusion 1 in a single file, 32 channels wide."""
    network = original.unet(width=32, context=64) | original.vae(width=32)
    text = original.clip("cond_stage_model.transformer.", width=64, layers=2)
    return model(path, seed, network | text, scale=0.05)


def kohya_lora(path: Path, rank: int = 2, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """A LoRA on a linear layer and a convolution of the U-Net and a layer of the text encoder; the differences."""
    rng = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for spelling, name, shape in (
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            (32, 64),
        ),
        (
            "lora_unet_mid_block_resnets_0_conv1",
            "model.diffusion_model.middle_block.0.in_layers.2.weight",
            (128, 128, 3, 3),
        ),
        (
            "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
            "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
            (64, 64),
        ),
    ):
        down = torch.randn(rank, *shape[1:], generator=rng)
        up = torch.randn(shape[0], rank, *([1] * (len(shape) - 2)), generator=rng)
        tensors |= {f"{spelling}.lora_down.weight": down, f"{spelling}.lora_up.weight": up}
        tensors[f"{spelling}.alpha"] = torch.tensor(alpha)
        deltas[name] = (alpha / rank * up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)
    save_file(tensors, path)
    return deltas


def test_a_lora_is_baked_into_a_single_file(capsys):
    tiny(Path("sd.safetensors"), 1)
    deltas = kohya_lora(Path("style.safetensors"))
    assert merge("add", "sd.safetensors", "style.safetensors", "weight=0.8", "to=baked.safetensors") == 0
    before, after = load_file("sd.safetensors"), load_file("baked.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in deltas:
            expected = tensor.double() + 0.8 * deltas[name]
            assert torch.allclose(after[name].double(), expected, rtol=2**-11, atol=1e-6)
        else:
            assert torch.equal(after[name], tensor)
    assert f"{len(deltas)} merged" in capsys.readouterr().out


def test_a_lora_may_count_nothing_in_some_blocks():
    tiny(Path("sd.safetensors"), 1)
    deltas = kohya_lora(Path("style.safetensors"))
    words = ["add", "sd.safetensors", "style.safetensors", "weight.default=1.0", "weight.blocks.M00=0.0"]
    assert merge(*words, "to=baked.safetensors") == 0
    before, after = load_file("sd.safetensors"), load_file("baked.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in deltas if "middle_block" not in name} and len(changed) == 2


def test_a_lora_of_a_component_that_comes_from_elsewhere_is_told_apart_from_one_for_another_model(capsys):
    tiny(Path("sd.safetensors"), 1)
    kohya_lora(Path("style.safetensors"))
    words = ["add", "sd.safetensors", "style.safetensors", "components.text_encoder=none", "to=baked.safetensors"]
    assert merge(*words) == 3
    assert "left out or taken from elsewhere" in capsys.readouterr().err


def peft_lora(folder: Path) -> None:
    """A LoRA of one layer in a folder, as peft saves it."""
    layer = "base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    folder.mkdir()
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')


@pytest.mark.parametrize("names", ["a single file's", "a folder's"])
def test_a_lora_is_baked_into_a_unet_alone(names):
    whole = tiny(Path("sd.safetensors"), 1)
    prefix, kept = "model.diffusion_model.", load_file(whole)
    alone = {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}
    if names == "a folder's":
        file = SafetensorsFile(whole)
        view = Assembled(file, to_diffusers(file.metas).pieces)
        alone = {name.removeprefix("unet."): view.read(name) for name in view.metas if name.startswith("unet.")}
    save_file(alone, "unet.safetensors")
    deltas = kohya_lora(Path("style.safetensors"))
    style = load_file("style.safetensors")
    save_file({name: tensor for name, tensor in style.items() if "_te_" not in name}, "style.safetensors")
    assert merge("add", "unet.safetensors", "style.safetensors", "weight=0.8", "to=baked.safetensors") == 0
    baked = load_file("baked.safetensors")
    assert baked.keys() == alone.keys()
    changed = {name: baked[name].double() - alone[name] for name in alone if not torch.equal(baked[name], alone[name])}
    expected = [0.8 * delta for name, delta in deltas.items() if name.startswith(prefix)]
    assert len(changed) == len(expected) == 2
    for delta in expected:
        (found,) = (moved for moved in changed.values() if moved.shape == delta.shape)
        assert torch.allclose(found, delta, atol=2e-2)


def test_a_lora_is_rebuilt_with(tmp_path):
    tiny(Path("sd.safetensors"), 1)
    kohya_lora(Path("style.safetensors"))
    assert merge("add", "sd.safetensors", "style.safetensors", "to=baked.safetensors") == 0
    assert merge("rebuild", "baked.safetensors", "--sources", ".", "--to", "again.safetensors") == 0
    assert digest("again.safetensors") == digest("baked.safetensors")


def test_a_lora_of_another_model_is_refused(capsys):
    tiny(Path("sd.safetensors"), 1)
    kohya_lora(Path("style.safetensors"))
    tensors = load_file("style.safetensors")
    save_file({name.replace("mid_block", "middle"): value for name, value in tensors.items()}, "odd.safetensors")
    assert merge("add", "sd.safetensors", "odd.safetensors", "to=o.safetensors") == 3
    said = capsys.readouterr().err
    assert said.startswith("error: odd.safetensors: 1 of its modules are not in the network: 'lora_unet_middle_")
    assert "'tuner translate drop=…' leaves that out" in said


def test_a_network_that_is_not_known_has_no_parts_and_no_order(capsys):
    for name, seed in (("one", 1), ("two", 2)):
        model(Path(f"{name}.safetensors"), seed, {"layers.0.weight": (4, 4)})
        tensors = load_file(f"{name}.safetensors")
        save_file({"layers.0.weight": tensors["layers.0.weight"]}, f"{name}.safetensors")
    for words, said in (
        ("components.vae=two", "components.vae: the models have no such part; there are: none that is known"),
        ("align.two=one", "whose symmetries are known; merge without aligning"),
    ):
        assert merge("lerp", "one.safetensors", "two.safetensors", words, "to=o.safetensors") != 0
        assert said in capsys.readouterr().err


def test_a_lora_beside_models_that_are_put_in_order_is_refused(capsys):
    tiny(Path("sd.safetensors"), 1)
    tiny(Path("other.safetensors"), 2)
    kohya_lora(Path("style.safetensors"))
    words = ["sd.safetensors", "style.safetensors", "align.sd=other", "models.other=other.safetensors"]
    assert merge("add", *words, "to=o.safetensors") == 2
    assert "nothing says whose order of units style, a LoRA" in capsys.readouterr().err


def test_unrelated_models_are_warned_about(capsys):
    tiny(Path("one.safetensors"), 1)
    tiny(Path("two.safetensors"), 2)
    assert merge("lerp", "one.safetensors", "two.safetensors", "to=o.safetensors") == 0
    assert "note: one and two are not of one base" in capsys.readouterr().err


def folder(path: Path, seed: int) -> Path:
    """A diffusers folder of three components, one of them in shards."""
    rng = torch.Generator().manual_seed(seed)

    def weights(*names: str) -> dict[str, torch.Tensor]:
        return {name: torch.randn(40, 30, generator=rng).half() for name in names}

    for component, file, names in (
        ("unet", "diffusion_pytorch_model.safetensors", ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]),
        ("text_encoder", "model.safetensors", ["text_model.embeddings.token_embedding.weight"]),
    ):
        (path / component).mkdir(parents=True)
        (path / component / "config.json").write_text("{}")
        save_file(weights(*names), path / component / file)
    (path / "vae").mkdir()
    (path / "vae" / "config.json").write_text("{}")
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": f"decoder.{n}.weight" for n in (1, 2)}
    for file, name in shards.items():
        save_file(weights(name), path / "vae" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, name in shards.items()}}
    (path / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (path / "secret.pkl").write_bytes(b"x")
    return path


def test_folders_are_merged_into_a_folder(capsys):
    folder(Path("one"), 1)
    folder(Path("two"), 2)
    assert merge("lerp", "one", "two", "t=0.25", "to=blend") == 0
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, two, out = (load_file(Path(name) / file) for name in ("one", "two", "blend"))
        assert out.keys() == one.keys()
        assert all(
            torch.equal(out[name], torch.lerp(one[name].float(), two[name].float(), 0.25).half()) for name in out
        )
    assert load_file("blend/vae/diffusion_pytorch_model.safetensors").keys() == {"decoder.1.weight", "decoder.2.weight"}
    copied = {str(path.relative_to("blend")) for path in Path("blend").rglob("*") if path.suffix != ".safetensors"}
    assert {"model_index.json", "tokenizer/vocab.json", "unet/config.json"} <= copied
    assert not any("pkl" in name or "index.json" in name.replace("model_index.json", "") for name in copied)
    assert merge("rebuild", "blend", "--sources", ".", "--to", "again") == 0
    for file in Path("blend").rglob("*.safetensors"):
        assert digest(file) == digest(Path("again") / file.relative_to("blend"))


@pytest.mark.parametrize("first", ["folder", "file"])
def test_a_folder_and_a_single_file_are_merged_by_the_names_of_the_first(base, capsys, first):
    shutil.copytree(base, "one")
    shutil.copytree(base, "two")
    for path in Path("two").rglob("*.safetensors"):
        tensors = load_file(path)
        save_file(
            {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, path
        )
    for name in ("one", "two"):
        store = open_store(Path(name))
        view = Assembled(store, from_diffusers(store.metas).pieces)
        save_file({key: view.read(key) for key in view.metas}, f"{name}-file.safetensors")
    assert merge("lerp", "one", "two", "t=0.3", "to=expected") == 0
    expected = open_store(Path("expected"))
    if first == "folder":
        assert merge("lerp", "one", "two-file.safetensors", "t=0.3", "to=blend") == 0
        blend, view = open_store(Path("blend")), expected
    else:
        assert merge("lerp", "one-file.safetensors", "two", "t=0.3", "to=blend.safetensors") == 0
        blend = open_store(Path("blend.safetensors"))
        view = Assembled(expected, from_diffusers(expected.metas).pieces)
    assert set(blend.metas) == set(view.metas)
    assert all(torch.equal(blend.read(name), view.read(name)) for name in view.metas)
    made = "blend" if first == "folder" else "blend.safetensors"
    shutil.rmtree("expected")
    assert merge("rebuild", made, "--sources", ".") == 0


def test_a_single_file_with_the_names_of_a_folder_is_told_of(base, capsys):
    assert merge("lerp", str(base), str(base), "to=o.safetensors") == 0
    assert "gets the names of a diffusers folder" in capsys.readouterr().err
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=p.safetensors") == 0
    assert "names of" not in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["a", "b"])
def test_positions_that_one_model_has_not_saved_are_no_reason_to_refuse(lacking):
    file = f"{lacking}.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != IDS}, file)
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=out.safetensors") == 0
    assert torch.equal(load_file("out.safetensors")[IDS], torch.arange(77)[None])


def test_the_plan_of_a_folder_tells_its_files_and_whether_it_can_be_one(capsys):
    folder(Path("one"), 1)
    assert merge("lerp", "one", "one", "max_shard_size=3KB", "to=blend", "--plan") == 0
    told = capsys.readouterr().out
    assert "file blend/unet/diffusion_pytorch_model-00001-of-00002.safetensors: 1 tensors" in told
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=blend", "--plan") == 2
    assert "with max_shard_size; give a name that ends in .safetensors" in capsys.readouterr().err
    assert merge("lerp", "one", "one", "to=blend", "--json") == 0
    assert json.loads(capsys.readouterr().out)
    assert not Path("blend").exists()


def test_a_folder_is_not_written_where_it_cannot_be(capsys):
    folder(Path("one"), 1)
    folder(Path("two"), 2)
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for words, said in (
        (["lerp", "one", "two", "to=one"], "lies in an input"),
        (["lerp", "one", "two", "to=one/more"], "lies in an input"),
        (["lerp", "one", "two", "to=mine"], "is no model"),
        (["lerp", "a.safetensors", "b.safetensors", "to=mine2"], "ends in .safetensors"),
        (["lerp", "one", "two", "components.vae=none", "to=part"], "needs all its parts"),
    ):
        assert merge(*words) == 2, words
        assert said in capsys.readouterr().err
    assert Path("mine/letter.txt").read_text() == "dear"
    assert not list(Path().glob(".*"))


def test_a_model_whose_units_stand_in_another_order_is_put_in_order(capsys):
    """Git Re-Basin: shuffled and put in order, a model merged with itself is itself."""
    tiny(Path("one.safetensors"), 1)
    first = SafetensorsFile(Path("one.safetensors"))
    found = symmetries(first.metas, Structure.of(first.metas))
    rng = torch.Generator().manual_seed(0)
    unit = next(symmetry for symmetry in found if "mlp" in symmetry.name or "ff" in symmetry.name)
    orders = {unit.name: tuple(torch.randperm(unit.units, generator=rng) for _ in unit.roles)}
    shuffled = Permuted(first, (unit,), orders)
    save_file({name: shuffled.read(name).contiguous() for name in first.metas}, "two.safetensors")
    words = ["lerp", "one.safetensors", "two.safetensors", "t=0.5"]
    assert merge(*words, "align.two=one", "to=aligned.safetensors") == 0
    assert merge(*words, "to=apart.safetensors") == 0
    one, aligned, apart = (load_file(f"{name}.safetensors") for name in ("one", "aligned", "apart"))
    assert all(torch.equal(aligned[name], one[name]) for name in one)
    assert any(not torch.equal(apart[name], one[name]) for name in one)
    assert "two in the order of one: moved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("align", "said"),
    [
        (["align.b=a", "align.a=c"], "align.b: 'a' is itself put in another order"),
        (["align.b=a", "align.a=b"], "is itself put in another order"),
        (["align.b=c"], "align.b: 'c' goes nowhere"),
        (["align.c=a"], "align.c: 'c' goes nowhere"),
    ],
)
def test_an_order_that_no_merged_model_has_is_refused(capsys, align, said):
    """Of b in the order that a had before it was put in c's, nothing in the result is; and no header tells of c."""
    model(Path("c.safetensors"), 4)
    Path("recipe.toml").write_text(
        """
        output = "out.safetensors"
        models = { a = "a.safetensors", b = "b.safetensors", c = "c.safetensors" }
        steps = [{ name = "blend", method = { type = "lerp" }, inputs = ["a", "b"] }]
        """
    )
    assert merge("recipe.toml", *align) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shape", "read"),
    [
        ("cond_stage_model.model.logit_scale", (), False),
        ("conditioner.embedders.1.model.logit_scale", (), False),
        ("cond_stage_model.model.text_projection", (16, 16), False),
        ("conditioner.embedders.1.model.text_projection", (16, 16), True),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_no_pipeline_reads_may_be_lacking_as_it_is_in_every_folder(capsys, name, shape, read, first):
    shapes = {key: shape for key, shape in SHAPES.items() if not key.startswith("cond_stage_model")}
    model(Path("a.safetensors"), 1, {**shapes, name: shape})
    model(Path("b.safetensors"), 2, shapes)
    files = ["a.safetensors", "b.safetensors"] if first else ["b.safetensors", "a.safetensors"]
    assert merge("lerp", *files, "to=out.safetensors") == (3 if read else 0)
    if read:
        assert f"b: lacks {name}" in capsys.readouterr().err
    else:
        assert torch.equal(load_file("out.safetensors")[name], load_file("a.safetensors")[name])


IDLE = """
output = "out.safetensors"
models = { idle = "one", b = "half.safetensors", a = "whole.safetensors" }
steps = [
    { name = "lost", method = { type = "lerp" }, inputs = ["idle", "a"] },
    { name = "blend", method = { type = "lerp" }, inputs = ["a", "b"] },
]
"""


def test_models_and_steps_that_go_nowhere_are_told_of_and_decide_nothing(base, capsys):
    shutil.copytree(base, "one")
    folder = open_store(Path("one"))
    single = Assembled(folder, from_diffusers(folder.metas).pieces)
    tensors = {name: single.read(name).contiguous() for name in single.metas}
    save_file(tensors, "whole.safetensors")
    save_file({name: tensor / 2 for name, tensor in tensors.items()}, "half.safetensors")
    Path("recipe.toml").write_text(IDLE)
    assert merge("recipe.toml", "--plan") == 0
    assert "idle, lost: used nowhere; the result is blend" in capsys.readouterr().out
    assert merge("recipe.toml") == 0
    assert load_file("out.safetensors").keys() == load_file("whole.safetensors").keys()
    assert merge("rebuild", "out.safetensors", "--sources", ".", "--to", "again.safetensors") == 0
    assert digest("again.safetensors") == digest("out.safetensors")


AGAIN = ("lerp", "a.safetensors", "b.safetensors", "to=out.safetensors")


@pytest.mark.parametrize("there", ["another merge", "a model", "no model", "other models"])
def test_what_is_there_already_is_replaced_only_when_it_is_said(capsys, there):
    out = Path("out.safetensors")
    match there:
        case "another merge":
            assert merge(*AGAIN, "t=0.7") == 0
        case "a model":
            model(out, 9)
        case "no model":
            out.write_text("notes")
        case "other models":
            assert merge(*AGAIN) == 0
            model(Path("a.safetensors"), 1, {**SHAPES, "model.diffusion_model.more": (3,)})
            model(Path("b.safetensors"), 2, {**SHAPES, "model.diffusion_model.more": (3,)})
    before = out.read_bytes()
    capsys.readouterr()
    assert merge(*AGAIN) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: output: out.safetensors is there already, and was ")
    assert said.rstrip().endswith("; choose another name, or say --overwrite") and len(said.splitlines()) == 1
    assert merge(*AGAIN, "--plan") == 0
    assert "note: out.safetensors is there already" in capsys.readouterr().out
    assert out.read_bytes() == before and not list(Path().glob(".out*")), "nothing was touched"
    assert merge(*AGAIN, "--overwrite") == 0
    assert out.read_bytes() != before
    assert merge(*AGAIN, "t=0.9", "overwrite=true") == 0


def test_the_same_recipe_may_be_merged_again(capsys):
    assert merge(*AGAIN) == 0
    before = digest("out.safetensors")
    assert merge(*AGAIN, "threads=2", "verify=3") == 0
    assert digest("out.safetensors") == before
    assert merge(*AGAIN, "--plan") == 0
    assert "is there already" not in capsys.readouterr().out


def test_an_interrupted_merge_that_was_to_replace_a_file_goes_on_without_saying_so_again(monkeypatch):
    model(Path("out.safetensors"), 9)

    def stop(*given: object, **named: object) -> None:
        Path(".out.safetensors.part").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.execute, "execute", stop)
        with pytest.raises(KeyboardInterrupt):
            run.merge(command.read([*AGAIN, "overwrite=true"]))
    assert merge(*AGAIN, "--resume") == 0
    assert merge(*AGAIN) == 0, "it is the recipe's now"


def test_a_rebuilt_file_replaces_only_what_its_recipe_has_made(capsys):
    assert merge(*AGAIN) == 0
    words = ("rebuild", "out.safetensors", "--sources", ".", "--to", "again.safetensors")
    assert merge(*words) == merge(*words) == 0
    model(Path("again.safetensors"), 9)
    assert merge(*words) == 2
    assert "is there already" in capsys.readouterr().err
    assert merge(*words, "--overwrite") == 0
    assert digest("again.safetensors") == digest("out.safetensors")


def test_the_plan_says_whose_input_channels_the_output_has(capsys):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    model(Path("inpaint.safetensors"), 7, {**SHAPES, name: (8, 9, 3, 3)})
    assert merge("lerp", "inpaint.safetensors", "a.safetensors", "to=o.safetensors", "--plan") == 0
    assert "has 9 input channels, as inpaint, which comes first" in capsys.readouterr().out
    assert merge("lerp", "a.safetensors", "inpaint.safetensors", "to=o.safetensors", "--plan") == 0
    said = capsys.readouterr().out
    assert "has 4 input channels, as a, which comes first" in said
    assert "the other 5 of inpaint left out; name inpaint first to keep them" in said


def test_the_plan_says_of_which_family_each_model_is(capsys):
    tiny(Path("sd.safetensors"), 1)
    assert merge("lerp", "sd.safetensors", "sd.safetensors", "to=o.safetensors", "--plan") == 0
    assert re.search(r"sd: Stable Diffusion 1; \d+ tensors of weights, .*F16", capsys.readouterr().out)


def test_positions_that_go_nowhere_are_not_told_of(capsys):
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=o.safetensors", "--plan") == 0
    assert "used nowhere" not in capsys.readouterr().out, "b's positions are not used"
    assert merge("lerp", "a.safetensors", "b.safetensors", "components.vae=b", "to=o.safetensors", "--plan") == 0
    assert "1 tensors of a are used nowhere" in capsys.readouterr().out


def test_a_plan_of_many_steps_is_told_step_by_step(capsys):
    recipe = "output = 'o.safetensors'\n[models]\na = 'a.safetensors'\nb = 'b.safetensors'\n"
    for index, inputs in enumerate((["a", "b"], ["s0", "b"], ["a", "s1"], ["s2", "s0"])):
        recipe += f"[[steps]]\nname = 's{index}'\nmethod = {{ type = 'lerp', t = 0.3 }}\ninputs = {inputs}\n"
    Path("deep.toml").write_text(recipe)
    assert merge("deep.toml", "--plan") == 0
    said = capsys.readouterr().out
    assert "(1) = Lerp[t=0.3, curve=linear](a, b)\n        (2) = Lerp[t=0.3, curve=linear]((1), b)" in said
    assert "(4) = Lerp[t=0.3, curve=linear]((3), (1))" in said
    told = said[said.index("what is done:") : said.index("output:")]
    assert all(len(line) <= 120 for line in told.splitlines())
