"""An opened Stable Diffusion 1 is what a stock pipeline over the same folder is."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tuner.diffusion.batch import Conditioning
from tuner.errors import DataError
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.methods.full import Full
from tuner.methods.lora import Lora

CPU = torch.device("cpu")
CAPTIONS = ["the red cat", "", "a cat, red " * 40]


def opened(folder: Path, **settings: Any) -> Any:
    return BaseModel(base=str(folder), **settings).open(CPU)


def stock(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """The tiny base in a folder that may be changed."""
    return Path(shutil.copytree(base, tmp_path / "a base"))


def test_everything_is_opened_in_float32_for_evaluation_and_without_a_word(base: Path, capfd):
    opened(base)  # what libraries say once, at their import, is said now
    capfd.readouterr()
    model = opened(base)
    for network in model.networks.values():
        assert not network.training
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert capfd.readouterr() == ("", "")
    assert (model.resolution, model.resolution_step, model.max_tokens) == (64, 8, 75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_in_half_precision_is_opened_in_float32(dtype, tmp_path: Path):
    """transformers would keep the file's dtype, and diffusers would not."""
    pipeline = tiny.sd1().to(dtype)
    pipeline.save_pretrained(tmp_path / "half")
    model = opened(tmp_path / "half")
    for name, network in model.networks.items():
        stored = getattr(pipeline, name).state_dict()
        for key, tensor in network.state_dict().items():
            assert tensor.dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype)
            assert torch.equal(tensor, stored[key].to(tensor.dtype))


@torch.no_grad()
def test_texts_are_encoded_as_by_the_stock_pipeline(base: Path):
    expected = torch.cat([stock(base).encode_prompt(text, CPU, 1, False)[0] for text in CAPTIONS])
    tokens = opened(base).encode_text(CAPTIONS).tokens
    assert tokens.shape == (3, 77, 32)
    assert torch.allclose(tokens, expected, atol=1e-6)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)


@torch.no_grad()
def test_pictures_are_encoded_as_by_the_autoencoder_and_scaled(base: Path):
    pixels = torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = stock(base).vae
    posterior = vae.encode(pixels).latent_dist
    found = opened(base).encode_images(pixels)
    assert torch.equal(found.mean, posterior.mean * vae.config.scaling_factor)
    assert torch.equal(found.std, posterior.std * vae.config.scaling_factor)
    assert found.mean.shape == (2, 4, 8, 9)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_are_those_of_the_stock_pipeline_from_the_same_latents(prediction, copy: Path):
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', f'"{prediction}"'))
    sampling = Sampling(width=72, height=56, steps=3, guidance=4.0, negative_prompt="a dog")
    model = opened(copy)
    assert model.prediction_type == prediction
    model.networks["unet"].train()
    pictures = model.sample(["the red cat", "a robot"], [3, 4], sampling)
    assert model.networks["unet"].training and not model.networks["vae"].training
    for prompt, seed, picture in zip(["the red cat", "a robot"], [3, 4], pictures, strict=True):
        latents = torch.randn(1, 4, 7, 9, generator=torch.Generator().manual_seed(seed))
        expected = stock(copy)(
            prompt,
            width=72,
            height=56,
            num_inference_steps=3,
            guidance_scale=4.0,
            negative_prompt="a dog",
            latents=latents,
        ).images[0]
        assert picture.size == (72, 56)
        assert abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    alone = model.sample(["a robot"], [4], sampling)
    assert np.array_equal(np.asarray(alone[0]), np.asarray(pictures[1]))


@torch.no_grad()
def test_sampling_draws_nothing_from_the_global_generator(base: Path):
    before = torch.random.get_rng_state()
    opened(base).sample(["a cat"], [0], Sampling(steps=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tokens_are_counted_without_start_and_end_and_without_a_word(base: Path, capfd):
    model = opened(base)
    capfd.readouterr()
    model.encode_text(["cut here " * 100])  # leaves a truncation behind in the tokenizer
    assert [model.count_tokens(text) for text in ("", "the", "the cat", "cat " * 200)] == [0, 1, 2, 200]
    assert capfd.readouterr() == ("", "")


@torch.no_grad()
def test_a_tokenizer_that_knows_no_length_is_cut_where_the_encoder_ends(copy: Path):
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"model_max_length": 77', '"model_max_length": 1000000'))
    model = opened(copy)
    assert model.max_tokens == 75 and model.encode_text(CAPTIONS).tokens.shape == (3, 77, 32)


# Files of other versions


@torch.no_grad()
@pytest.mark.parametrize("layout", ["flat", "legacy", "legacy with position ids"])
def test_text_encoders_of_every_library_version_open_with_their_weights(layout, copy: Path):
    """Since transformers 5.6 keys lack `text_model.`; readers of the other kind go on with random weights."""
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    expected = opened(copy).encode_text(CAPTIONS).tokens
    if layout != "flat":
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    if "position" in layout:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file, {"format": "pt"})
    model = opened(copy)
    assert torch.equal(model.encode_text(CAPTIONS).tokens, expected)
    learns = Full(text_encoder=True).attach(model, 0).parameters()
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight" in learns


@pytest.mark.parametrize("files", ["both kinds", "vocab.json and merges.txt", "tokenizer.json"])
def test_tokenizers_of_every_library_version_give_the_same_tokens(files, copy: Path):
    """Published bases have no tokenizer.json, folders written by transformers 5 nothing else."""
    folder = copy / "tokenizer"
    texts = ["The RED cat, at 2 hot.", "ｶﾞ ×", ""]
    expected = [tiny.tokenizer()(text).input_ids for text in texts]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    if files != "tokenizer.json":
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    if files == "vocab.json and merges.txt":
        (folder / "tokenizer.json").unlink()
    assert [opened(copy).tokenizers["text_encoder"](text).input_ids for text in texts] == expected


@torch.no_grad()
def test_autoencoders_with_the_first_names_of_attention_open_with_their_weights(copy: Path):
    """Those of Stable Diffusion 1 as published have them."""
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = opened(copy).encode_images(pixels).mean
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(opened(copy).encode_images(pixels).mean, expected)


WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def lose_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for index, (name, tensor) in enumerate(sorted(tensors.items())) if index != 5}


def rename_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def reshape_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = sorted(tensors)[5]
    return {**tensors, name: torch.zeros([size + 1 for size in tensors[name].shape])}


def attach_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `save_pretrained` writes a network that has a LoRA attached."""
    return {name.replace(".to_q.", ".to_q.base_layer.").replace(".q_proj.", ".q_proj.base_layer."): t
            for name, t in tensors.items()}  # fmt: skip


@pytest.mark.parametrize("damage", [lose_one, rename_all, reshape_one, attach_lora], ids=lambda f: f.__name__)
@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_that_a_folder_lacks_are_an_error_and_not_random(component, damage, copy: Path):
    file = copy / component / WEIGHTS[component]
    save_file(damage(load_file(file)), file, {"format": "pt"})
    with pytest.raises(DataError, match=rf"{component}: "):
        opened(copy)


# What learns


def loss(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    conditioning = model.encode_text(["the red cat", "a robot"])
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    output = model.denoise(x_t, torch.tensor([10, 700]), conditioning)
    return (output.float() - torch.randn(2, 4, 8, 8, generator=generator)).square().mean()


METHODS = {
    "full": Full(text_encoder=True),
    "lora": Lora(rank=2, conv_rank=2, text_encoder=True),
    "lora of the text encoder alone": Lora(rank=2, targets=("text_encoder.*_proj",), text_encoder=True),
}


def gradients(
    folder: Path, method: Full | Lora, dtype: torch.dtype | None = None, **settings: Any
) -> dict[str, Tensor]:
    model = opened(folder, **settings)
    trainable = method.attach(model, seed=0)
    if dtype is not None:
        model.cast_frozen(dtype)
    with torch.no_grad():
        for index, p in enumerate(trainable.parameters().values()):
            if not p.any():  # LoRA's B, which is zero at first and hides A's gradient
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(index))
    loss(model).backward()
    found = {name: p.grad for name, p in trainable.parameters().items()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_gradient(method, base: Path):
    plain = gradients(base, METHODS[method])
    checkpointed = gradients(base, METHODS[method], gradient_checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, atol=1e-7, rtol=1e-5), name
    assert sum(float(gradient.norm()) for gradient in plain.values()) > 0


@pytest.mark.parametrize("part", ["the whole", "the text encoder"])
def test_gradient_checkpointing_keeps_fewer_activations(part, base: Path):
    def saved(checkpointing: bool) -> int:
        model = opened(base, gradient_checkpointing=checkpointing)
        Full(text_encoder=True).attach(model, 0)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss(model) if part == "the whole" else model.encode_text(["the red cat"])
        return sum(kept)

    assert saved(True) < 0.5 * saved(False)


def test_attention_in_plain_products_is_torchs_fused_one(base: Path):
    math, fused = (gradients(base, METHODS["full"], attention=kind) for kind in ("math", "torch"))
    with torch.no_grad():
        outputs = [loss(opened(base, attention=kind)) for kind in ("math", "torch")]
    assert float(outputs[0]) == pytest.approx(float(outputs[1]), rel=1e-5)
    for name in math:
        assert torch.allclose(math[name], fused[name], atol=1e-5), name
    processors = {type(p).__name__ for p in opened(base, attention="torch").networks["unet"].attn_processors.values()}
    assert processors == {"AttnProcessor2_0"}
    assert {type(p).__name__ for p in opened(base).networks["unet"].attn_processors.values()} == {"AttnProcessor"}


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_in_bfloat16_train_what_float32_ones_do(method, base: Path):
    exact = gradients(base, METHODS[method])
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(base, METHODS[method], torch.bfloat16)
    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    flat = [torch.cat([found[name].flatten() for name in exact]) for found in (exact, half)]
    assert float(torch.cosine_similarity(flat[0], flat[1], dim=0)) > 0.99


def test_only_the_denoiser_is_cast(base: Path):
    model = opened(base)
    Lora(rank=2, text_encoder=True).attach(model, 0)
    model.cast_frozen(torch.bfloat16)
    dtypes = {
        name: {p.dtype for p in network.parameters() if not p.requires_grad} for name, network in model.networks.items()
    }
    assert dtypes == {"unet": {torch.bfloat16}, "text_encoder": {torch.float32}, "vae": {torch.float32}}


@torch.no_grad()
def test_samples_of_a_cast_model_are_nearly_the_exact_ones(base: Path):
    exact = opened(base).sample(["the red cat"], [0], Sampling(steps=3))[0]
    model = opened(base)
    Lora(rank=2).attach(model, 0)
    model.cast_frozen(torch.bfloat16)
    cast = model.sample(["the red cat"], [0], Sampling(steps=3))[0]
    with torch.autocast("cpu", torch.bfloat16):  # as previews do
        again = model.sample(["the red cat"], [0], Sampling(steps=3))[0]
    for picture in (cast, again):
        assert abs(np.asarray(picture).astype(int) - np.asarray(exact).astype(int)).mean() < 3


# Fingerprints


def test_a_fingerprint_depends_on_content_and_not_on_place(base: Path, copy: Path):
    here, there = opened(base), opened(copy)
    here.encode_text(["leaves its padding behind in the tokenizer"])
    for component in here.networks:
        assert here.fingerprint(component) == there.fingerprint(component)
    assert len({here.fingerprint(component) for component in here.networks}) == 3


def test_a_fingerprint_is_the_same_for_a_network_in_training(base: Path):
    model = opened(base, gradient_checkpointing=True)
    before = {component: model.fingerprint(component) for component in model.networks}
    Full(text_encoder=True).attach(model, 0)
    assert {component: model.fingerprint(component) for component in model.networks} == before


def test_the_conditioning_may_be_of_any_dtype(base: Path):
    model = opened(base)
    with torch.no_grad():
        tokens = model.encode_text(["a cat"]).tokens
        x_t, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
        exact = model.denoise(x_t, t, Conditioning(tokens=tokens))
        assert torch.allclose(model.denoise(x_t.half(), t, Conditioning(tokens=tokens.half())), exact, atol=1e-2)
