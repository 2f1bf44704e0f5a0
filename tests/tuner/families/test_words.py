"""New words in every family: they begin as words of the base, learn alone, and stock pipelines read their files."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import textual_inversion
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import tiny
from tuner.diffusion.batch import Batch
from tuner.diffusion.objective import Objective
from tuner.errors import DataError
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.methods.lora import Lora
from tuner.methods.textual_inversion import TextualInversion, Word
from tuner.optim.adamw import AdamW
from tuner.publish import embeddings
from tuner.publish.embeddings import file_of, write_bundle, write_words
from tuner.publish.provenance import Provenance
from tuner.publish.release import write_lora
from tuner.publish.verify import modules_of
from tuner.rng import Position
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.embeddings import keys, read_embedding
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[], Any]] = {
    "sd1": tiny.sd1,
    "sd2": tiny.sd2,
    "sdxl": tiny.sdxl,
    "sdxl refiner": tiny.refiner,
    "sd3.5": tiny.sd3,
    "flux": partial(tiny.flux, dev=False),
}
every_family = pytest.mark.parametrize("name", MAKERS)
T5 = {"sd3.5": ("text_encoder_3",), "flux": ("text_encoder_2",)}
CAPTION, PLAIN = "the <new> sat on <Other>.", "the red cat sat on 9."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def made(name: str) -> Path:
        place = tmp_path_factory.mktemp("words") / "base"
        MAKERS[name]().save_pretrained(place)
        return place

    return made


@pytest.fixture
def opened(folder) -> Callable[[str], Any]:
    short = {"t5_length": 32}
    return lambda name: BaseModel(base=str(folder(name)), **(short if name in T5 else {})).open(CPU)


def method(model: Any, **options: Any) -> TextualInversion:
    """Two words that begin as `PLAIN` has it, token by token."""
    count = max(len(model.word_ids(component, "red cat")) for component in model.word_tables)
    assert all(len(model.word_ids(component, "red cat")) == count for component in model.word_tables)
    tokens = {"<new>": Word(init="red cat", vectors=count), "<other>": Word(init="9")}
    return TextualInversion(tokens=tokens, **options)


def of_clip(name: str, told: Any) -> list[Tensor]:
    """What CLIP has made of a text, without T5's tokens."""
    tokens = told.tokens[:, :0] if name == "flux" else told.tokens[:, :77] if name in T5 else told.tokens
    return [tokens] if told.pooled is None else [tokens, told.pooled]


@every_family
@torch.no_grad()
def test_words_begin_as_the_words_in_their_place(name: str, opened):
    model, base = opened(name), opened(name)
    trainable = method(model).attach(model, seed=0)
    assert {*trainable.tables} == {*model.text_encoders} - {*T5.get(name, ())}
    told, expected, untaught = (
        of_clip(name, each.encode_text([text, ""])) for each, text in ((model, CAPTION), (base, PLAIN), (base, CAPTION))
    )
    for now, was, raw in zip(told, expected, untaught, strict=True):
        assert torch.equal(now, was)
        assert not now.numel() or not torch.equal(now, raw)
    assert torch.equal(model.encode_text([PLAIN]).tokens, base.encode_text([PLAIN]).tokens)  # T5's too


def batch(model: Any, caption: str) -> Batch:
    pixels = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = model.encode_images(pixels).mean
    return Batch(
        latents=latents,
        captions=(caption, caption),
        conditioning=None,
        weight=torch.ones(2),
        positions=[Position(0, 0, 0), Position(0, 0, 1)],
        frame=torch.tensor([[48.0, 80.0, 0.0, 0.0, 48.0, 80.0]]).expand(2, -1),
    )


def everything(model: Any) -> dict[int, Tensor]:
    return {id(p): p.detach().clone() for network in model.networks.values() for p in network.parameters()}


@every_family
def test_words_learn_on_fixed_noise_and_nothing_else_moves(name: str, opened):
    model = opened(name)
    trainable = method(model).attach(model, seed=0)
    learning = {id(p) for p in trainable.parameters().values()}
    before, of = everything(model), batch(model, CAPTION)
    times = torch.tensor([150.0, 190.0]).to(model.schedule.time_at(torch.zeros(1, dtype=torch.float64)).dtype)
    optimizer = AdamW(lr=3e-2, weight_decay=0.5).build(trainable.groups)
    losses = []
    for _ in range(6):
        loss = Objective().loss(model, of, times).weighted.mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] * (1 - 1e-5)
    after = everything(model)
    assert {key for key, p in after.items() if not torch.equal(p, before[key])} == learning


@pytest.mark.parametrize("name", ["sdxl", "sd3.5", "flux"])
@torch.no_grad()
def test_the_text_as_one_vector_is_of_its_end_in_old_configs_too(name: str, folder, opened, tmp_path: Path):
    """Old configs say that texts end with token 2, and transformers then takes the highest number for the end."""
    pipeline = MAKERS[name]()
    pipeline.save_pretrained(tmp_path / "old")
    for config in (tmp_path / "old").glob("text_encoder*/config.json"):
        table = json.loads(config.read_text())
        if "CLIP" in table["architectures"][0]:
            config.write_text(json.dumps({**table, "eos_token_id": 2}))
    told = []
    for place in (folder(name), tmp_path / "old"):
        model: Any = BaseModel(base=str(place), **({"t5_length": 32} if name in T5 else {})).open(CPU)
        method(model).attach(model, seed=0)
        told.append(model.encode_text([CAPTION]).pooled)
    assert torch.equal(*told)


def learned(model: Any, **options: Any) -> Any:
    """As after a training."""
    trainable = method(model, **options).attach(model, seed=0)
    for index, p in enumerate(trainable.parameters().values()):
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)) * p.abs().mean()
    for network in model.networks.values():
        network.eval()
    return trainable


def provenance(model: Any, trainable: Any) -> Provenance:
    return Provenance(
        name="cats", base="pocket", architecture=model.architecture, prediction="epsilon", resolution=64,
        method="textual_inversion", images=5, samples=80, updates=20, seed=1, trigger="<new>",
        tokens={token: file_of("cats", token) for token in trainable.rows},
    )  # fmt: skip


def networks(model: Any) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    parts = model.pipeline().components
    of = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name != "vae"}
    return of, {name: parts[name.replace("text_encoder", "tokenizer")] for name in model.word_tables}


def released(model: Any, trainable: Any, place: Path) -> Path:
    of, tokenizers = networks(model)
    words = trainable.words()
    files = write_words(place / "embeddings", words, provenance(model, trainable), networks=of, tokenizers=tokenizers)
    assert [file.name for file in files.files] == ["cats-new.safetensors", "cats-other.safetensors"]
    assert files.diffusers == ("diffusers" in str(files)) == (not model.architecture.startswith("stable-diffusion-3"))
    assert sorted(path.name for path in (place / "embeddings").iterdir()) == sorted(f.name for f in files.files)
    for file, word in zip(files.files, words.values(), strict=True):
        read = read_embedding(file, model.architecture)
        assert read.keys() == word.keys() and all(torch.equal(read[part], word[part]) for part in word)
    return place / "embeddings"


def stock(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = dict.fromkeys(part for part, kind in index.items() if kind == [None, None])
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl refiner", "flux"])
@torch.no_grad()
def test_a_stock_pipeline_with_the_files_is_told_what_the_model_was(name: str, folder, opened, tmp_path: Path):
    model = opened(name)
    place = released(model, learned(model), tmp_path)
    pipeline = stock(folder(name))
    for token, file in {"<new>": "cats-new.safetensors", "<other>": "cats-other.safetensors"}.items():
        names = keys(model.architecture)
        if [*names] == ["text_encoder"]:
            pipeline.load_textual_inversion(str(place / file), token=token, local_files_only=True)
            continue
        tensors = load_file(place / file)
        assert tensors.keys() == {*names.values()}
        for component, key in names.items():
            tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"))
            pipeline.load_textual_inversion(
                tensors[key], token=token, text_encoder=getattr(pipeline, component), tokenizer=tokenizer
            )
    expected = {name: part for name, part in model.guided(CAPTION, Sampling()).items() if name.endswith("embeds")}
    if name == "flux":
        got = pipeline.encode_prompt(CAPTION, None, max_sequence_length=32)[:2]
        expected = [expected["prompt_embeds"], expected["pooled_prompt_embeds"]]
    else:
        settings = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        got = [part for part in pipeline.encode_prompt(CAPTION, **settings) if part is not None]
        order = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        expected = [expected[key] for key in order if key in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    which, key = (1, "pooled_prompt_embeds") if name == "flux" else (0, "prompt_embeds")
    assert not torch.allclose(got[which], opened(name).guided(CAPTION, Sampling())[key])


@every_family
def test_a_words_file_has_the_fields_names_and_headers_of_its_family(name: str, opened, tmp_path: Path):
    model = opened(name)
    trainable = learned(model)
    place = released(model, trainable, tmp_path)
    expected = {
        "sd1": {"emb_params"},
        "sd2": {"emb_params"},
        "sdxl": {"clip_l", "clip_g"},
        "sdxl refiner": {"clip_g"},
        "sd3.5": {"clip_l", "clip_g"},
        "flux": {"clip_l"},
    }
    with safe_open(place / "cats-new.safetensors", "pt") as file:
        shapes, texts = {key: file.get_slice(key).get_shape() for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert shapes.keys() == expected[name]
    count = trainable.rows["<new>"].stop
    assert {shape[0] for shape in shapes.values()} == {count} and count > 1
    assert {len(shape) for shape in shapes.values()} == {2}
    assert texts["modelspec.architecture"] == f"{model.architecture}/textual-inversion"
    assert texts["modelspec.trigger_phrase"] == "<new>" and not any("network" in key for key in texts)


def test_a_bundle_is_the_lora_and_the_words(opened, tmp_path: Path):
    model = opened("sdxl")
    trainable = learned(model, adapter=Lora(rank=2))
    of, _ = networks(model)
    about = provenance(model, trainable)
    files = write_lora(tmp_path, Adapters(trainable.adapter.changes()).as_lora(), about, networks=of)
    bundle = write_bundle(files.kohya, trainable.words(), about)
    assert bundle.name == "cats-bundle.safetensors"
    lora, both = SafetensorsFile(files.kohya), SafetensorsFile(bundle)
    added = {f"bundle_emb.{token}.{key}" for token in ("<new>", "<other>") for key in ("clip_l", "clip_g")}
    assert both.metas.keys() == {*lora.metas, *added}
    assert all(torch.equal(both.read(key), lora.read(key)) for key in lora.metas)
    word = trainable.words()["<new>"]
    assert torch.equal(both.read("bundle_emb.<new>.clip_g"), word["text_encoder_2"])
    assert both.metadata["sshs_model_hash"] != lora.metadata["sshs_model_hash"]
    assert both.metadata["ss_network_dim"] == "2"
    with pytest.raises(DataError, match=r"4 new words, not layers: .*; give the LoRA's own file"):
        read_adapters(bundle, modules_of(of))


def test_one_tensor_in_a_bundle_has_the_name_that_all_readers_know(opened, tmp_path: Path):
    model = opened("sd1")
    trainable = learned(model)
    lora = tmp_path / "cats.safetensors"
    save_safetensors(lora, {"lora_unet_a.alpha": torch.ones(())}, {"ss_seed": "1"})
    both = load_file(write_bundle(lora, trainable.words(), provenance(model, trainable)))
    words = {"bundle_emb.<new>.string_to_param.*", "bundle_emb.<other>.string_to_param.*"}
    assert both.keys() == {"lora_unet_a.alpha", *words}


@pytest.mark.parametrize("spoiled", ["file", "pipeline"])
def test_what_is_read_back_otherwise_is_not_written(spoiled: str, opened, tmp_path: Path, monkeypatch):
    model = opened("sd1")
    trainable = learned(model)
    if spoiled == "file":
        monkeypatch.setattr(embeddings, "to_tensors", lambda word, _: {"emb_params": word["text_encoder"] + 1})
    else:
        patched = textual_inversion.TextualInversionLoaderMixin._retrieve_tokens_and_embeddings

        def other(tokens: Any, states: Any, tokenizer: Any) -> Any:
            tokens, vectors = patched(tokens, states, tokenizer)
            return tokens, [vector * 1.001 for vector in vectors]

        monkeypatch.setattr(
            textual_inversion.TextualInversionLoaderMixin, "_retrieve_tokens_and_embeddings", staticmethod(other)
        )
    of, tokenizers = networks(model)
    with pytest.raises(DataError, match="not written, please report it"):
        write_words(tmp_path / "e", trainable.words(), provenance(model, trainable), networks=of, tokenizers=tokenizers)
    assert list(tmp_path.iterdir()) == []


def test_another_familys_words_are_refused(opened, tmp_path: Path):
    model = opened("sdxl")
    place = released(model, learned(model), tmp_path)
    with pytest.raises(DataError, match=r"cats-new.safetensors: holds clip_g, expected emb_params; give an embedding"):
        read_embedding(place / "cats-new.safetensors", "stable-diffusion-v1")
