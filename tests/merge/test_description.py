"""`tuner inspect`: what checkpoints, LoRAs, merged files and folders are told to be."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge import command
from merge.description import describe, lines
from merge.provenance import find
from tests.merge.test_run import folder, kohya_lora, model, tiny
from tests.tuner.weights import original
from tests.tuner.weights.test_store import DAMAGED
from tuner import cli


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told(capsys) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert cli.main(["inspect", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def as_json(told: Callable[..., str], path: str) -> dict[str, Any]:
    return json.loads(told(path, "--json"))


def test_a_checkpoint_is_told_with_its_parts_and_blocks(told):
    tiny(Path("sd.safetensors"), 1)
    tensors = load_file("sd.safetensors")
    found = as_json(told, "sd.safetensors")
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    numbers = sum(tensor.numel() for tensor in floats.values())
    assert found["family"] == "sd1" and found["layout"] == "ldm" and found["purpose"] == "text-to-image"
    assert found["total"]["parameters"] == numbers and found["total"]["tensors"] == len(tensors)
    assert {name: amount["tensors"] for name, amount in found["dtypes"].items()} == {"float16": len(floats), "int64": 1}
    assert set(found["components"]) == {"unet", "vae", "text_encoder"}
    vae = sum(tensor.numel() for name, tensor in floats.items() if name.startswith("first_stage_model."))
    assert found["components"]["vae"]["parameters"] == vae == found["blocks"]["VAE"]["parameters"]
    assert sum(amount["parameters"] for amount in found["blocks"].values()) == numbers
    assert list(found["blocks"])[:2] == ["BASE", "IN00"] and len(found["blocks"]) == 27
    text = told("sd.safetensors")
    assert text.startswith("sd.safetensors: Stable Diffusion 1\n")
    assert f"{numbers:,} parameters" in text and f"{vae:,}" in text
    assert all(len(line) <= 120 for line in text.splitlines()) and len(text.splitlines()) < 25


@pytest.mark.parametrize(
    ("shapes", "title"),
    [
        (original.unet(width=8, context=6, channels=9), "Stable Diffusion 1 for inpainting"),
        (original.unet(width=8, context=6, channels=8), "Stable Diffusion 1 for editing"),
        ({**original.unet(width=8, context=6), "v_pred": (0,)}, "Stable Diffusion 1"),
        ({"nothing.known": (3,)}, "an unknown network"),
    ],
)
def test_purpose_and_prediction_are_told(told, shapes, title):
    model(Path("x.safetensors"), 1, shapes)
    assert told("x.safetensors").startswith(f"x.safetensors: {title}\n")
    assert as_json(told, "x.safetensors")["prediction"] == ("v" if "v_pred" in shapes else None)


def test_a_lora_is_told_with_its_ranks_and_alphas(told):
    kohya_lora(Path("style.safetensors"), rank=4, alpha=2.0)
    text = told("style.safetensors")
    assert text.startswith("style.safetensors: a LoRA for an unknown network\n")
    for fact in ("dialect  kohya", "layers   3: 2 of unet, 1 of text_encoder", "kinds    LoRA", "rank     4"):
        assert fact in text
    assert "alpha    2\n" in text and "fault" not in text
    found = as_json(told, "style.safetensors")["adapters"]
    assert found["components"] == {"unet": 2, "text_encoder": 1}
    assert found["ranks"] == {"4": 3} and found["alphas"] == {"2": 3} and found["faults"] == []


def test_a_loras_family_is_told_where_its_layers_give_it_away(told):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.ones(320, 2)}, "x.st")
    assert told("x.st").startswith("x.st: a LoRA for Stable Diffusion 1\n")


def test_a_lora_that_is_not_whole_is_told_with_its_fault(told):
    kohya_lora(Path("style.safetensors"))
    tensors = load_file("style.safetensors")
    del tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"]
    save_file(tensors, "style.safetensors")
    assert "fault: not whole, or of several kinds at once: 'lora_unet_mid_block_resnets_0_conv1'" in told(
        "style.safetensors"
    )


def test_pefts_folder_is_told_by_the_file_in_it(told):
    Path("lora").mkdir()
    name = "base_model.model.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8, 1, 1), f"{name}.lora_B.weight": torch.ones(8, 2, 1, 1)}
    save_file(tensors, "lora/adapter_model.safetensors")
    Path("lora/adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    found = as_json(told, "lora")["adapters"]
    assert found["alphas"] == {"8": 1} and found["ranks"] == {"2": 1} and found["dialect"] == "diffusers"


def test_what_the_header_says_is_told_in_short(told):
    tags = {"10_cat": {"cat": 40, "sitting": 12}, "1_more": {"cat": 2}}
    metadata = {
        "modelspec.title": "A \x1b[31mcat\n",
        "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 5000,
        "ss_network_dim": "4",
        "ss_learning_rate": "None",
        "ss_bucket_info": "x" * 5000,
        "ss_tag_frequency": json.dumps(tags),
    }
    kohya_lora(Path("style.safetensors"))
    save_file(load_file("style.safetensors"), "style.safetensors", metadata)
    text = told("style.safetensors")
    assert text.replace("\n", "").isprintable()
    assert "modelspec.title      A \N{REPLACEMENT CHARACTER}[31mcat\N{REPLACEMENT CHARACTER}\n" in text
    assert "ss_network_dim       4\n" in text and "ss_learning_rate" not in text
    assert "cat 42, sitting 12\n" in text and "1 more (all: --json)" in text
    assert all(len(line) < 150 for line in text.splitlines())
    assert as_json(told, "style.safetensors")["metadata"] == metadata


@pytest.mark.parametrize("tags", ["{", "[]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 10_000])
def test_tags_that_are_none_are_not_told(told, tags):
    kohya_lora(Path("style.safetensors"))
    save_file(load_file("style.safetensors"), "style.safetensors", {"ss_tag_frequency": tags})
    assert "ss_tag_frequency" not in told("style.safetensors")


def test_a_merged_file_is_told_with_its_ancestors(told, capsys):
    for seed, name in enumerate(("a", "b", "c")):
        model(Path(f"{name}.safetensors"), seed)
    assert command.main(("lerp", "a.safetensors", "b.safetensors", "t=0.3", "to=child.safetensors")) == 0
    assert command.main(("lerp", "child.safetensors", "c.safetensors", "t=0.1", "to=grandchild.safetensors")) == 0
    capsys.readouterr()
    tree = as_json(told, "grandchild.safetensors")["ancestors"]
    assert [source["name"] for source in tree["sources"]] == ["child", "c"]
    assert [source["name"] for source in tree["sources"][0]["sources"]] == ["a", "b"]
    assert "t=0.1" in tree["how"] and "t=0.3" in tree["sources"][0]["how"]
    text = told("grandchild.safetensors")
    root = tree["sources"][0]["root"][:16]
    assert f"    child  {root}  {tree['sources'][0]['how']}\n      a  " in text
    assert "merge.recipe" not in text


def family(depth: int) -> dict[str, str]:
    """A header whose ancestors are each made of the one before, twice."""
    recipe = {"steps": [{"method": {"type": "lerp", "t": 0.5}}]}
    twice = [[{"name": f"m{n}", "root": f"r{n}", "table": ""}] * 2 for n in range(depth + 1)]
    older = {f"r{n + 1}": {"recipe": recipe, "sources": twice[n]} for n in range(depth)}
    return {
        "merge.recipe": json.dumps(recipe),
        "merge.sources": json.dumps(twice[depth]),
        "merge.root": f"r{depth + 1}",
        "merge.ancestors": json.dumps(older),
    }


def test_a_family_is_told_once_however_often_it_married_into_itself(told):
    save_file({"w": torch.ones(1)}, "x.safetensors", family(30))
    assert told("x.safetensors").count("\n      m") < 40
    save_file({"w": torch.ones(1)}, "x.safetensors", family(2000))
    assert len(told("x.safetensors").splitlines()) < 300


@pytest.mark.parametrize(
    "texts",
    [
        {"merge.recipe": "[]"},
        {"merge.recipe": '{"steps": [1]}'},
        {"merge.recipe": '{"steps": [{"method": {}}]}'},
        {"merge.sources": "{}", "merge.recipe": "1"},
        {"merge.sources": "[1]"},
        {"merge.ancestors": "[]"},
        {"merge.ancestors": '{"r1": 1}'},
        {"merge.ancestors": "[" * 10_000},
    ],
)
def test_a_recipe_that_is_none_is_not_told(told, texts):
    assert find(family(1)) is not None
    save_file({"w": torch.ones(1)}, "x.safetensors", family(1) | texts)
    assert "made of" not in told("x.safetensors")


def test_a_folder_is_told_as_a_whole(told):
    folder(Path("one"), 1)
    found = as_json(told, "one")
    assert found["name"] == "one" and found["files"] == 4
    assert {name: amount["tensors"] for name, amount in found["components"].items()} == {
        "text_encoder": 1,
        "unet": 2,
        "vae": 2,
    }
    assert "in 4 files, 5 tensors" in told("one")
    assert as_json(told, "one/vae")["files"] == 2


def test_a_merged_folder_is_told_with_its_ancestors(told, capsys):
    folder(Path("one"), 1)
    folder(Path("two"), 2)
    assert command.main(("lerp", "one", "two", "t=0.25", "to=blend")) == 0
    capsys.readouterr()
    assert [source["name"] for source in as_json(told, "blend")["ancestors"]["sources"]] == ["one", "two"]


def test_weights_with_scales_are_told(told):
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.scale_weight": torch.tensor(2.0)}, "x.safetensors")
    assert "1 weights of 8 bits have a scale" in told("x.safetensors")


@pytest.mark.parametrize("fault", [*DAMAGED, "missing", "pickle", "no folder"])
def test_what_is_broken_is_refused_in_a_line(fault, capsys):
    path, code = Path("bad.safetensors"), 3
    match fault:
        case "missing":
            pass
        case "pickle":
            torch.save({"w": torch.ones(1)}, path)
            code = 4
        case "no folder":
            path = Path("bad")
            path.mkdir()
        case _:
            path.write_bytes(DAMAGED[fault][0])
    assert cli.main(["inspect", str(path)]) == code
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ") and path.name in said.err


def test_only_headers_are_read():
    shapes = original.unet() | original.vae() | original.clip("cond_stage_model.transformer.", 768, 12)
    header = {}
    at = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path = Path("sd15.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + at)  # a hole of two gigabytes
    start = time.process_time()
    found = describe(path)
    assert "\n".join(lines(found))
    assert time.process_time() - start < 1
    assert found.total.parameters > 1e9 and found.title == "Stable Diffusion 1"
    path.unlink()
