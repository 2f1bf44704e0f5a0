"""What Stable Diffusion 3 and Flux alone have: T5, packed latents, stored precision, quantized blocks."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import nn

from tests import tiny
from tuner.diffusion.batch import Batch
from tuner.diffusion.objective import Objective
from tuner.diffusion.timesteps.logit_normal import LogitNormal
from tuner.diffusion.timesteps.shifted import Shifted
from tuner.diffusion.timesteps.shifted_by_size import ShiftedBySize
from tuner.errors import ConfigError
from tuner.families._flow import FlowModel, _timesteps
from tuner.families.base import Sampling
from tuner.families.flux import FluxModel, pack, places, unpack
from tuner.families.sd3 import Sd3Model
from tuner.families.source import BaseModel
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.optim.adamw import AdamW
from tuner.rng import Position
from tuner.weights import published

CPU = torch.device("cpu")
MAKERS = {"sd3": tiny.sd3, "flux": tiny.flux}
both = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny bases; not to be written into."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MAKERS.items():
        make().save_pretrained(folder / name)
    tiny.flux(dev=False).save_pretrained(folder / "schnell")
    return {path.name: path for path in folder.iterdir()}


def opened(folder: Path, **settings: Any) -> Any:
    return BaseModel(base=str(folder), **{"t5_length": 32, **settings}).open(CPU)


@torch.no_grad()
def batch(model: Any) -> Batch:
    rng = torch.Generator().manual_seed(0)
    captions = ("the red cat", "a robot")
    return Batch(
        latents=model.encode_images(torch.rand(2, 3, 48, 80, generator=rng) * 2 - 1).mean,
        captions=captions,
        conditioning=model.encode_text(captions),
        weight=torch.ones(2),
        positions=[Position(0, 0, 0), Position(0, 0, 1)],
    )


def loss(model: Any, of: Batch) -> torch.Tensor:
    return Objective().loss(model, of, torch.tensor([100.0, 800.0])).weighted


# Latents


def test_packing_is_that_of_the_stock_pipeline_and_can_be_undone():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(pack(latents), 3, 5), latents)
    assert torch.equal(places(3, 5), FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32))


def test_a_picture_beyond_the_places_that_stable_diffusion_3_knows_is_refused(bases):
    model = opened(bases["sd3"])
    assert model.longest_side == 256
    with pytest.raises(ConfigError, match=r"272 x 64 pixels has a side longer than 256"):
        model.encode_images(torch.zeros(1, 3, 64, 272))
    with pytest.raises(ConfigError, match="longer than 256"):
        model.sample(["a cat"], [0], Sampling(width=64, height=272, steps=1))
    assert model.encode_images(torch.zeros(1, 3, 64, 256)).mean.shape == (1, 16, 8, 32)


# Texts


@both
@torch.no_grad()
def test_t5_gives_as_many_tokens_as_it_is_told(name: str, bases):
    for length in (7, 40):
        model = opened(bases[name], t5_length=length)
        tokens = model.encode_text(["the red cat " * 40, ""]).tokens
        assert tokens.shape == (2, length + (77 if name == "sd3" else 0), 96)
        assert model.max_tokens == length - 1 and model.count_tokens("the red cat") == 3
    assert opened(bases[name], t5_length=7).fingerprint(model.t5) != model.fingerprint(model.t5)
    usual = {"sd3": 256, "flux": 512}
    assert BaseModel(base=str(bases[name])).open(CPU).t5_length == usual[name]
    assert BaseModel(base=str(bases["schnell"])).open(CPU).t5_length == 256


@torch.no_grad()
def test_stable_diffusion_3_is_told_clip_first_and_then_t5_as_by_the_stock_pipeline(bases):
    """Its transformer would not notice another order."""
    captions = ["the red cat", ""]
    tokens, _, pooled, _ = tiny.sd3().encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=32
    )
    told = opened(bases["sd3"]).encode_text(captions)
    assert torch.allclose(told.tokens, tokens, atol=1e-6) and torch.allclose(told.pooled, pooled, atol=1e-6)


@both
@torch.no_grad()
def test_t5_never_drops_anything(name: str, bases):
    model = opened(bases[name])
    still = model.encode_text(["the red cat"]).tokens
    model.networks[model.t5].train()
    assert torch.equal(model.encode_text(["the red cat"]).tokens, still)
    assert model.networks[model.t5].config.dropout_rate == 0.1  # as it is published


@torch.no_grad()
def test_the_guidance_that_flux_is_told_changes_what_it_says(bases):
    plain = opened(bases["flux"])
    of = batch(plain)
    assert plain.guidance == 1 and torch.equal(loss(opened(bases["flux"], guidance=1.0), of), loss(plain, of))
    assert not torch.equal(loss(opened(bases["flux"], guidance=3.5), of), loss(plain, of))
    assert opened(bases["schnell"]).guidance is None


@torch.no_grad()
def test_pictures_have_the_familys_usual_guidance(bases):
    for name, usual in {"sd3": 7.0, "flux": 3.5}.items():
        model = opened(bases[name])
        left_out, said, other = (
            model.sample(["a cat"], [0], Sampling(width=32, height=32, steps=1, guidance=guidance))[0].tobytes()
            for guidance in (None, usual, 30.0)
        )
        assert left_out == said != other


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("schnell", {"guidance": 1.0}, r"model\.guidance: .* is told none"),
        ("flux", {"t5_length": 513}, r"model\.t5_length must lie between 2 and 512, got 513"),
        ("sd3", {"t5_length": 1}, r"model\.t5_length must lie"),
        ("sd3", {"guidance": 2.0}, r"model\.guidance: .* of the family sd3, without it"),
        ("sd3", {"attention": "math"}, r"model\.attention: Stable Diffusion 3 has no 'math'"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, settings: dict[str, Any], message: str, bases):
    with pytest.raises(ConfigError, match=message):
        opened(bases[name], **settings)


def test_flux_leads_away_from_nothing(bases):
    with pytest.raises(ConfigError, match="negative_prompt"):
        opened(bases["flux"]).sample(["a cat"], [0], Sampling(width=32, height=32, steps=1, negative_prompt="a dog"))


# Memory


@both
@torch.no_grad()
def test_a_base_opens_as_its_files_are_and_nothing_is_lost(name: str, bases, tmp_path: Path):
    pipeline = MAKERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    whole, half = opened(bases[name]), opened(tmp_path)
    assert half.networks["vae"].dtype == torch.float32
    for component in ("transformer", *half.text_encoders):
        (file,) = (tmp_path / component).glob("*.safetensors")
        network = half.networks[component]
        assert network.dtype == torch.bfloat16 and whole.networks[component].dtype == torch.float32
        state = network.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in load_file(file).items() if key in state)
    exact, cached = whole.encode_text(["the red cat"]), half.encode_text(["the red cat"])
    assert cached.tokens.dtype == cached.pooled.dtype == torch.bfloat16  # and so they are cached
    assert (cached.tokens.float() - exact.tokens).norm() < 0.01 * exact.tokens.norm()
    again = opened(tmp_path, precision="fp32")
    assert {network.dtype for network in again.networks.values()} == {torch.float32}
    assert again.fingerprint(again.t5) != half.fingerprint(half.t5)
    Lora().attach(half, seed=0)
    half.cast_frozen(torch.float32)
    assert half.dtype == torch.float32
    half.sample(["a cat"], [0], Sampling(width=32, height=32, steps=1))  # with text encoders in bfloat16


@both
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of torch, on normalization in autocast
@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.02), ("int8", 0.005)])
def test_a_lora_learns_beside_quantized_blocks(name: str, kind: str, bound: float, bases):
    pytest.importorskip("bitsandbytes")
    whole, model = opened(bases[name]), opened(bases[name], quantize=kind)
    of = batch(whole)
    with torch.no_grad():
        exact, quantized = loss(whole, of), loss(model, of)
    assert not torch.equal(quantized, exact) and torch.allclose(quantized, exact, rtol=bound)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as previews are made
        assert torch.allclose(loss(model, of), exact, rtol=2 * bound)
    assert torch.allclose(loss(model, of).detach(), quantized, rtol=1e-3)  # and that repacks nothing
    held = {n for n, p in model.networks["transformer"].named_parameters() if not p.is_floating_point()}
    assert held and all("transformer_blocks." in n and n.endswith(".weight") for n in held)
    with pytest.raises(ConfigError, match=r"model\.quantize"):
        Full().attach(model, seed=0)
    weights = whole.networks["transformer"].state_dict()
    layers = {n: layer for n, layer in model.networks["transformer"].named_modules() if hasattr(layer, "exact")}
    assert {f"{n}.weight" for n in layers} == held
    assert all(torch.equal(cast(Any, layer).exact(), weights[f"{n}.weight"]) for n, layer in layers.items())
    trainable = Lora(rank=4).attach(model, seed=0)
    model.cast_frozen(torch.float32)
    assert len(trainable.layers) == len(Lora(rank=4).attach(whole, seed=0).layers)
    optimizer = AdamW(lr=1e-2).build(trainable.groups)
    for _ in range(6):
        loss(model, of).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert loss(model, of).mean() < 0.97 * quantized.mean()
    assert {change.shape for change in trainable.changes().values()} == {(32, 32), (128, 32), (32, 128), (32, 160)} - (
        {(32, 160)} if name == "sd3" else set()
    )


def test_what_rests_is_on_the_device_for_the_time_of_a_call(bases, monkeypatch):
    model: FlowModel = opened(bases["flux"])
    model.device = torch.device("cuda")
    moves: list[tuple[str, str]] = []
    for name, network in model.networks.items():
        monkeypatch.setattr(network, "to", lambda device, name=name: moves.append((name, str(device))))
    with model.present("vae"):
        assert moves.pop() == ("vae", "cuda")
    assert not moves  # it stays
    model.rest("vae", "text_encoder")
    assert [moves.pop(0) for _ in range(2)] == [("vae", "cpu"), ("text_encoder", "cpu")]
    with model.present("vae", "transformer"):
        assert [moves.pop(0) for _ in range(2)] == [("vae", "cuda"), ("transformer", "cuda")]
    assert moves == [("vae", "cpu")]


# Released models, at their real sizes, on torch's meta device, which computes shapes only

RELEASED: dict[str, tuple[str, float, int, Any]] = {
    "sd3-medium": ("stable-diffusion-3-medium", 2.1, 285, Shifted()),
    "sd35-medium": ("stable-diffusion-3.5-medium", 2.5, 337, Shifted()),
    "sd35-large": ("stable-diffusion-3.5-large", 8.1, 453, Shifted()),
    "flux-dev": ("flux-1-dev", 11.9, 418, ShiftedBySize()),
    "flux-schnell": ("flux-1-schnell", 11.9, 418, LogitNormal()),
}
"""Architecture, billions of numbers in the transformer, layers that a LoRA learns by default, noise levels."""


def on_meta(variant: str) -> FlowModel:
    import diffusers
    import transformers

    configs = published.configs(variant)
    networks: dict[str, Any] = {}
    with torch.device("meta"):
        for part, kind in configs["model_index.json"].items():
            config = configs.get(f"{part}/config.json")
            if config is None:
                continue
            if kind[0] == "diffusers":
                networks[part] = getattr(diffusers, kind[1]).from_config(config)
            else:
                settings = transformers.T5Config if config["model_type"] == "t5" else transformers.CLIPTextConfig
                networks[part] = getattr(transformers, kind[1])(settings(**config))
    flux = variant.startswith("flux")
    t5 = "text_encoder_2" if flux else "text_encoder_3"
    encoders = tuple(sorted(name for name in networks if name.startswith("text_encoder")))
    common: dict[str, Any] = {
        "source": variant,
        "folder": Path(variant),
        "networks": networks,
        "tokenizers": {name: tiny.t5_tokenizer() if name == t5 else tiny.tokenizer() for name in encoders},
        "scheduler_config": configs["scheduler/scheduler_config.json"],
        "device": torch.device("meta"),
        "text_encoders": encoders,
        "t5_length": 256,
    }
    if not flux:
        return Sd3Model(**common)
    return FluxModel(**common, guidance=1.0 if variant == "flux-dev" else None)


@pytest.mark.parametrize("variant", RELEASED)
def test_released_models_are_what_is_known_of_them(variant: str):
    architecture, billions, layers, timesteps = RELEASED[variant]
    model = on_meta(variant)
    count = sum(tensor.numel() for tensor in model.networks["transformer"].state_dict().values())
    assert round(count / 1e9, 1) == billions
    assert (model.architecture, model.timesteps) == (architecture, timesteps)
    assert (model.resolution, model.resolution_step, model.latent_channels) == (1024, 16, 16)
    scale = (0.3611, 0.1159) if variant.startswith("flux") else (1.5305, 0.0609)
    assert (model.scaling, model.shift) == scale
    assert len(Lora()._choose(model, "transformer")) == layers
    latents = model.encode_images(torch.zeros(1, 3, 768, 1344)).mean
    conditioning = model.encode_text(["a red cat"])
    tokens = 256 if variant.startswith("flux") else 333
    pooled = 768 if variant.startswith("flux") else 2048
    assert latents.shape == (1, 16, 96, 168)
    assert conditioning.tokens.shape == (1, tokens, 4096) and conditioning.pooled.shape == (1, pooled)
    with torch.no_grad():
        assert model.denoise(latents, torch.zeros(1, device="meta"), conditioning).shape == latents.shape


def test_noise_levels_are_read_off_any_flow_scheduler():
    usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    assert _timesteps({"use_dynamic_shifting": True, "shift": 3.0, **usual}) == ShiftedBySize(base=0.5, max=1.15)
    other = {**usual, "base_image_seq_len": 1024, "max_image_seq_len": 2048, "base_shift": 1.0, "max_shift": 2.0}
    found = _timesteps({"use_dynamic_shifting": True, "shift": 3.0, **other})
    assert isinstance(found, ShiftedBySize)
    for tokens, mu in ((1024, 1.0), (2048, 2.0)):
        assert torch.tensor(found.shift((tokens // 8, 32))).log().item() == pytest.approx(mu)
    assert _timesteps({"use_dynamic_shifting": False, "shift": 2.0}) == Shifted(shift=2.0)
