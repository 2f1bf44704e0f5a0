"""Latent diffusion told by a BERT-like encoder: its text, its files, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from merge import command
from tests import tiny
from tests.tuner.publish.test_write_lora import PROVENANCE
from tuner.errors import ConfigError
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.methods._adapter import AdapterTrainable
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.publish.full import write_full
from tuner.publish.release import write_lora
from tuner.weights.adapters.file import Adapters
from tuner.weights.architecture import identify
from tuner.weights.convert import convert
from tuner.weights.folder import DiffusersFolder
from tuner.weights.store import SafetensorsFile

CPU = torch.device("cpu")
TEXT = "cond_stage_model.transformer."
CAPTIONS = ["the red cat", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ldm") / "base"
    tiny.ldm().save_pretrained(place)
    return place


def opened(folder: Path, **options: Any) -> Any:
    return BaseModel(base=str(folder), **options).open(CPU)


def test_captions_are_told_as_its_stock_pipeline_tells_them(folder: Path):
    model, pipeline = opened(folder), tiny.ldm()
    ids = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model.encode_text(CAPTIONS).tokens, pipeline.bert(ids)[0])
    assert (model.max_tokens, model.count_tokens("the red cat"), model.words("red ca")) == (75, 3, ["red", "c", "##a"])


def test_nothing_is_dropped_while_it_learns_and_what_decides_nothing_does_not(folder: Path):
    model = opened(folder)
    trainable = Full(text_encoder=True).attach(model, 0)
    assert model.raw("bert").training
    assert torch.equal(model.encode_text(CAPTIONS).tokens, model.encode_text(CAPTIONS).tokens)
    names = trainable.parameters().keys()
    assert "bert.model.layers.0.fc1.weight" in names and not any("to_logits" in name for name in names)
    model.encode_text(CAPTIONS).tokens.sum().backward()
    assert all(p.grad is not None for name, p in trainable.parameters().items() if name.startswith("bert."))


def test_recomputed_activations_give_the_same_gradients(folder: Path):
    grads: list[torch.Tensor] = []
    for recomputed in (False, True):
        model = opened(folder, gradient_checkpointing=recomputed)
        Full(text_encoder=True).attach(model, 0)
        x_t = torch.ones(2, 4, 8, 8)
        model.denoise(x_t, torch.tensor([5, 500]), model.encode_text(CAPTIONS)).square().sum().backward()
        grads.append(model.raw("bert").model.layers[0].fc1.weight.grad)
    assert torch.allclose(*grads, rtol=1e-4) and grads[0].any()


def test_a_negative_prompt_is_refused(folder: Path):
    with pytest.raises(ConfigError, match=r"sampling.negative_prompt: .* leads away from an empty text alone"):
        opened(folder).sample(["a cat"], [0], Sampling(steps=1, negative_prompt="blurry"))


def test_a_lora_of_the_text_encoder_is_in_one_file_and_is_baked_in(folder: Path, tmp_path: Path):
    model = opened(folder)
    trainable = Lora(rank=2, text_encoder=True).attach(model, 0)
    assert isinstance(trainable, AdapterTrainable)
    rng = torch.Generator().manual_seed(0)
    for name, p in trainable.parameters().items():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=rng).mul(0.3).half().float()
        else:
            p.data = p.data.half().float()
    parts = model.pipeline().components
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name != "vqvae"}
    lora = Adapters(trainable.changes()).as_lora()
    assert lora is not None
    made = write_lora(tmp_path, lora, PROVENANCE, networks=networks)
    assert made.layers == len(trainable.layers) and "no other program reads" in str(made)
    assert any(name.startswith("lora_te_model_layers_0_self_attn_q_proj") for name in SafetensorsFile(made.kohya).metas)
    assert made.left_out and all(name.startswith("bert.") for name in made.left_out)
    baked = tmp_path / "baked"
    assert command.main(["add", str(folder), str(made.kohya), f"to={baked}"]) == 0
    with torch.no_grad():
        before, told, again = (m.encode_text(CAPTIONS).tokens for m in (opened(folder), model, opened(baked)))
    assert (told - before).abs().max() > 0.1
    assert (again - told).abs().max() < 1e-2


def test_a_folder_is_a_single_file_with_the_names_of_its_makers_and_back_bit_for_bit(folder: Path, tmp_path: Path):
    single = convert(folder, tmp_path / "single.safetensors", layout="ldm")
    metas = SafetensorsFile(single.target).metas
    known = identify(metas)
    assert (known.family, known.layout, known.components) == ("ldm", "ldm", ("text_encoder", "unet", "vae"))
    encoder = {name.removeprefix(TEXT) for name in metas if name.startswith(TEXT)}
    own = {
        *("0.0.weight", "0.0.bias", "0.1.to_q.weight", "0.1.to_k.weight", "0.1.to_v.weight", "0.1.to_out.weight"),
        *("0.1.to_out.bias", "1.0.weight", "1.0.bias", "1.1.net.0.0.weight", "1.1.net.0.0.bias"),
        *("1.1.net.2.weight", "1.1.net.2.bias"),
    }
    numbered = {f"{int(name[0]) + 2 * layer}{name[1:]}" for layer in range(2) for name in own}
    outside = {
        "token_emb.weight",
        "pos_emb.emb.weight",
        "norm.weight",
        "norm.bias",
        "to_logits.weight",
        "to_logits.bias",
    }
    assert encoder == {*outside, *(f"attn_layers.layers.{name}" for name in numbered)}
    network = SafetensorsFile(single.target)
    bert = load_file(folder / "bert" / "model.safetensors")
    assert torch.equal(network.read(f"{TEXT}attn_layers.layers.3.1.net.0.0.weight"), bert["model.layers.1.fc1.weight"])
    assert torch.equal(
        network.read(f"{TEXT}attn_layers.layers.2.0.bias"), bert["model.layers.1.self_attn_layer_norm.bias"]
    )
    for own, its in {"q": "q_proj", "k": "k_proj", "v": "v_proj"}.items():
        weight = bert[f"model.layers.1.self_attn.{its}.weight"]
        assert torch.equal(network.read(f"{TEXT}attn_layers.layers.2.1.to_{own}.weight"), weight)
    back = convert(single.target, tmp_path / "back", config=str(folder)).target
    for one, other in zip(*(DiffusersFolder(place).components.items() for place in (folder, back)), strict=True):
        assert one[0] == other[0] and one[1].metas == other[1].metas
        assert all(torch.equal(one[1].read(name), other[1].read(name)) for name in one[1].metas)
    assert opened(back).fingerprint("bert") == opened(folder).fingerprint("bert")


def test_a_release_opens_in_diffusers_and_has_the_words_that_older_versions_read(folder: Path, tmp_path: Path):
    made = write_full(tmp_path / "made", opened(folder).pipeline(), folder / "tokenizer", dtype=torch.float32)
    index = json.loads((made / "model_index.json").read_text())
    base = json.loads((folder / "model_index.json").read_text())
    assert {k: v for k, v in index.items() if k[0] != "_"} == {k: v for k, v in base.items() if k[0] != "_"}
    assert (made / "bert" / "model.safetensors").is_file()
    words = (made / "tokenizer" / "vocab.txt").read_text().split("\n")
    assert words[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]
    (made / "tokenizer" / "tokenizer.json").unlink()  # as in the released folder
    assert opened(made).words("the red cat") == ["the", "red", "cat"]
    assert isinstance(DiffusionPipeline.from_pretrained(made).bert, type(tiny.ldm().bert))
