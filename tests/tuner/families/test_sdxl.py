"""An opened Stable Diffusion XL, base or refiner, is what a stock pipeline over the same folder is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor

from tests import tiny
from tests.tuner.families.stock import FRAMES, fixed_batch, opened, pixels, stock
from tuner.diffusion.batch import Conditioning
from tuner.diffusion.objective import Objective
from tuner.diffusion.timesteps.uniform import Uniform
from tuner.errors import ConfigError, DataError
from tuner.families.base import Sampling
from tuner.methods.full import Full
from tuner.methods.lora import Lora

CAPTIONS = ["the red cat", "", "a cat, red " * 40]


@pytest.fixture(scope="module", params=["base", "refiner"])
def base(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("sdxl") / request.param
    {"base": tiny.sdxl, "refiner": tiny.refiner}[request.param]().save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "xl"
    tiny.sdxl().save_pretrained(folder)
    return folder


def test_what_it_is_comes_of_its_configs(base):
    which, folder = base
    model = opened(folder)
    assert model.architecture == f"stable-diffusion-xl-v1-{which}"
    assert (model.resolution, model.resolution_step, model.max_tokens, model.scaling) == (64, 8, 75, 0.13025)
    assert (
        list(model.text_encoders) == {"base": ["text_encoder", "text_encoder_2"], "refiner": ["text_encoder_2"]}[which]
    )
    assert model.timesteps == {"base": Uniform(), "refiner": Uniform(end=0.2)}[which]
    assert {p.dtype for network in model.networks.values() for p in network.parameters()} == {torch.float32}


@torch.no_grad()
def test_texts_are_encoded_as_by_the_stock_pipeline(base):
    """An empty one as the base's pipeline takes an empty negative prompt: as zeros; the refiner's encodes it."""
    which, folder = base
    pipeline = stock(folder)
    found = opened(folder).encode_text(CAPTIONS)
    assert found.pooled is not None
    for index, text in enumerate(CAPTIONS):
        tokens, negative, pooled, negative_pooled = pipeline.encode_prompt(text, device="cpu")
        if not text:
            tokens, pooled = negative, negative_pooled
            assert bool(tokens.any()) == bool(pooled.any()) == (which == "refiner")
        assert torch.allclose(found.tokens[index], tokens[0], atol=1e-6)
        assert torch.allclose(found.pooled[index], pooled[0], atol=1e-6)
    assert not torch.allclose(found.tokens[0], found.tokens[1], atol=1e-2)


def told(pipeline: Any, frame: list[int]) -> Tensor:
    """The numbers that the stock pipeline tells its network of a picture that was cut so."""
    height, width, top, left, target_height, target_width = frame
    arguments: tuple[Any, ...] = ((height, width), (top, left), (target_height, target_width))
    if pipeline.unet.config.projection_class_embeddings_input_dim == 64 + 5 * 8:
        unused = ((height, width), (top, left), (target_height, target_width))
        return pipeline._get_add_time_ids(*arguments, 6.0, 2.5, *unused, torch.float32, 64)[0]
    return pipeline._get_add_time_ids(*arguments, torch.float32, 64)


@torch.no_grad()
def test_the_loss_is_that_of_the_stock_pipelines_own_pieces(base):
    which, folder = base
    batch, noise, t = fixed_batch()
    loss = Objective().loss(opened(folder), batch, t)
    pipeline = stock(folder)
    texts = [pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=False) for text in batch.captions]
    ids = torch.cat([told(pipeline, frame) for frame in FRAMES])
    assert ids.shape == (2, {"base": 6, "refiner": 5}[which])
    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    x_t = schedule.add_noise(batch.latents, noise, t)
    output = pipeline.unet(
        x_t,
        t,
        torch.cat([text[0] for text in texts]),
        added_cond_kwargs={"text_embeds": torch.cat([text[2] for text in texts]), "time_ids": ids},
    ).sample
    expected = (output - noise).square().mean((1, 2, 3))
    assert torch.allclose(loss.plain, expected, rtol=1e-5, atol=0)
    assert float(expected.min()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("negative", ["a dog", ""])
def test_the_bases_samples_are_those_of_the_stock_pipeline_from_the_same_latents(negative, xl: Path):
    sampling = Sampling(width=72, height=56, steps=3, guidance=4.0, negative_prompt=negative)
    (picture,) = opened(xl).sample(["the red cat"], [3], sampling)
    latents = torch.randn(1, 4, 7, 9, generator=torch.Generator().manual_seed(3))
    said = {"negative_prompt": negative} if negative else {}  # none is zeros
    expected = stock(xl)(
        "the red cat", width=72, height=56, num_inference_steps=3, guidance_scale=4.0, latents=latents, **said
    ).images[0]
    assert abs(pixels(picture) - pixels(expected)).max() <= 1


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(values).resize((90, 70), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@torch.no_grad()
def test_the_refiners_samples_are_those_of_the_stock_pipeline_of_the_same_picture(tmp_path: Path, photo: Path):
    tiny.refiner().save_pretrained(tmp_path / "refiner")
    model = opened(tmp_path / "refiner")
    sampling = Sampling(width=72, height=56, steps=10, guidance=4.0, image=photo, strength=0.4)
    (picture,) = model.sample(["the red cat"], [3], sampling)
    with Image.open(photo) as given:
        scaled = given.resize((72, 56), Image.Resampling.LANCZOS)
    expected = stock(tmp_path / "refiner")(
        "the red cat", image=scaled, num_inference_steps=10, guidance_scale=4.0, strength=0.4,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert abs(pixels(picture) - pixels(expected)).max() <= 1
    with pytest.raises(ConfigError, match=r"sampling\.image: .* refines pictures; give one"):
        model.sample(["the red cat"], [3], Sampling(steps=1))
    with pytest.raises(DataError, match=r"sampling\.image: .*missing.png"):
        model.sample(["the red cat"], [3], Sampling(steps=1, image=tmp_path / "missing.png"))


@pytest.mark.parametrize("option", ["image", "guide", "strength"])
def test_what_a_base_is_not_told_is_refused(option, xl: Path, photo: Path):
    given: dict[str, Any] = {option: 0.5 if option == "strength" else photo}
    sampling = Sampling(steps=1, **given)
    with pytest.raises(ConfigError, match=rf"sampling\.{option}: .* is told a prompt and nothing else"):
        opened(xl).sample(["the red cat"], [3], sampling)


def test_what_is_kept_of_texts_is_not_taken_for_that_of_a_base_that_encodes_empty_ones(xl: Path, tmp_path: Path):
    pipeline = tiny.sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path / "other")
    one, other = opened(xl), opened(tmp_path / "other")
    assert one.fingerprint("unet") == other.fingerprint("unet")
    for name in one.text_encoders:
        assert one.fingerprint(name) != other.fingerprint(name)
    with torch.no_grad():
        assert other.encode_text([""]).tokens.any() and not one.encode_text([""]).tokens.any()


# How the picture was cut


def test_the_numbers_of_the_cut_arrive_in_float32_though_the_denoiser_computes_in_half(base):
    """bfloat16 has neither 1023 nor 1365."""
    which, folder = base
    model = opened(folder)
    model.networks["unet"].requires_grad_(False)
    model.cast_frozen(torch.bfloat16)
    seen: dict[str, Any] = {}

    def listen(network: Any, arguments: Any, options: Any) -> None:
        seen.update(options["added_cond_kwargs"])

    model.networks["unet"].register_forward_pre_hook(listen, with_kwargs=True)
    embedded: list[Tensor] = []
    model.networks["unet"].add_time_proj.register_forward_hook(lambda *call: embedded.append(call[2]))
    batch, _, t = fixed_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        Objective().loss(model, batch, t)
    assert model.dtype == torch.bfloat16 and seen["text_embeds"].dtype == torch.bfloat16
    expected = [[*frame[:4], 6] if which == "refiner" else frame for frame in FRAMES]
    assert seen["time_ids"].dtype == torch.float32 and seen["time_ids"].tolist() == expected
    assert torch.equal(embedded[0], model.networks["unet"].add_time_proj(torch.tensor(expected).flatten()))


@torch.no_grad()
@pytest.mark.parametrize("place", range(6))
def test_every_number_of_the_cut_changes_the_output(place, xl: Path):
    model = opened(xl)
    text = model.encode_text(["the red cat"])
    x_t, t = torch.ones(1, 4, 8, 8), torch.tensor([500])
    frame = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    other = frame.clone()
    other[0, place] += 50
    outputs = [model.denoise(x_t, t, Conditioning(**text.text(), frame=each)) for each in (frame, other)]
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-4


# Precision


def overflowing(folder: Path) -> Any:
    """A model whose autoencoder has values beyond float16's largest in it, as Stable Diffusion XL's has."""
    model = opened(folder)
    for half in (model.networks["vae"].encoder, model.networks["vae"].decoder):
        half.conv_in.weight.mul_(3e5)
    return model


@torch.no_grad()
def test_an_autoencoder_beyond_half_precision_encodes_and_decodes_within_autocast(xl: Path):
    exact, model = overflowing(xl), overflowing(xl)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    Lora(rank=2).attach(model, 0)
    model.cast_frozen(torch.float16)
    with torch.autocast("cpu", torch.float16):
        broken = model.networks["vae"].encode(picture).latent_dist.mean
        assert not torch.isfinite(broken).all()  # as it would be
        assert torch.equal(model.encode_images(picture).mean, exact.encode_images(picture).mean)
        shown = pixels(model.sample(["the red cat"], [0], Sampling(steps=2))[0])  # as previews do
    expected = pixels(exact.sample(["the red cat"], [0], Sampling(steps=2))[0])
    assert expected.std() > 1 and abs(shown - expected).mean() < 3
    assert {p.dtype for p in model.networks["vae"].parameters()} == {torch.float32}
    assert "decode" not in vars(model.networks["vae"])


@pytest.mark.parametrize("method", [Full(text_encoder=True), Lora(rank=2, text_encoder=True)])
def test_an_autoencoder_stays_in_float32_whatever_learns(method, xl: Path):
    model = opened(xl)
    method.attach(model, 0)
    model.cast_frozen(torch.bfloat16)
    dtypes = {name: {p.dtype for p in net.parameters() if not p.requires_grad} for name, net in model.networks.items()}
    assert dtypes["vae"] == {torch.float32}
    assert all(dtypes[name] <= {torch.float32} for name in ("text_encoder", "text_encoder_2"))


# What learns


@pytest.mark.parametrize("method", [Full(text_encoder=True), Lora(rank=2, conv_rank=1, text_encoder=True)])
def test_all_that_learns_has_an_effect_in_both_text_encoders_too(method, xl: Path):
    """The first one's last layer has none: the one before it is taken. Several processes would wait for it."""
    model = opened(xl)
    trainable = method.attach(model, 0)
    if isinstance(method, Lora):
        with torch.no_grad():
            for p in trainable.parameters().values():
                p.add_(0.01)
    batch, _, t = fixed_batch()
    Objective().loss(model, batch, t).weighted.sum().backward()
    gradients = {name: p.grad for name, p in trainable.parameters().items()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    moved = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    for component in ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model."):
        own = {name for name in gradients if name.startswith(component)}
        assert len(own & moved) > 0.9 * len(own), component
    layers = {
        name.split(".layers.")[1][0] for name in gradients if name.startswith("text_encoder.") and ".layers." in name
    }
    assert layers == {"0"}
    assert any(name.startswith("text_encoder_2.text_model.encoder.layers.2.") for name in gradients)
    frozen = [p for name, p in model.networks["text_encoder"].named_parameters() if "layers.1." in name]
    assert frozen and not any(p.requires_grad for p in frozen)
