"""Models without text: what they are told, what they refuse, and the released ones at their real sizes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from safetensors.torch import load_file, save_file

from merge import command
from tests import tiny
from tests.tuner.publish.test_write_lora import PROVENANCE
from tuner.data.buckets import Buckets
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.images import Pictures
from tuner.data.sources.base import every_example
from tuner.data.sources.folder import PictureFolder
from tuner.data.sources.table import Table
from tuner.errors import ConfigError, DataError, UserError
from tuner.families.base import Sampling
from tuner.families.ddpm import DdpmModel, Pixels
from tuner.families.source import BaseModel
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.publish.full import write_full
from tuner.publish.release import build
from tuner.training.run import prepare
from tuner.weights.architecture import identify
from tuner.weights.convert import convert
from tuner.weights.folder import DiffusersFolder
from tuner.weights.layouts.diffusers import VAE_ATTENTION
from tuner.weights.store import TensorMeta

CPU = torch.device("cpu")
RELEASED = Path(__file__).parents[3] / "tuner" / "families" / "configs" / "earlier"
CLASSES = {"classes": ("cat", "dog"), "null_class": 2}
MAKES: dict[str, Callable[[], Any]] = {
    "pixels": tiny.ddpm,
    "latents": tiny.ldm_uncond,
    "classes": lambda: tiny.ddpm(num_class_embeds=3),
    "times": lambda: tiny.ddpm(class_embed_type="timestep"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def made(name: str) -> Path:
        place = tmp_path_factory.mktemp("textless") / name
        MAKES[name]().save_pretrained(place)
        return place

    return made


def opened(folder: Path, **options: Any) -> Any:
    return BaseModel(base=str(folder), **options).open(CPU)


# What it is told


def test_a_caption_is_a_class_by_number_or_name_and_an_empty_one_the_class_of_nothing(folder):
    model = opened(folder("classes"), **CLASSES)
    labels = model.encode_text(["0", "dog", " cat ", "", "2"]).labels
    assert labels.tolist() == [0, 1, 0, 2, 2] and labels.dtype == torch.int64
    assert (model.count_tokens("dog"), model.count_tokens(""), model.max_tokens) == (1, 0, 1)
    assert model.encode_text(["0", "1"]).tokens.shape == (2, 0, 0)


@pytest.mark.parametrize(
    ("caption", "options", "said"),
    [
        ("3", {}, "has classes 0 ... 2"),
        ("-1", {}, "no class of .*: neither a number nor named in model.classes"),
        ("dgo", CLASSES, r"neither a number nor a name in model.classes; did you mean 'dog'"),
        ("", {}, "has no class of nothing .*write the class's number or name"),
    ],
)
def test_a_caption_that_is_no_class_is_an_error_that_says_what_is_one(caption, options, said, folder):
    model = opened(folder("classes"), **options)
    for call in (lambda: model.encode_text([caption]), lambda: model.count_tokens(caption)):
        with pytest.raises(DataError, match=said):
            call()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pixels", {"classes": ("cat",)}, "model.classes: .* is told no classes"),
        ("pixels", {"null_class": 0}, "model.null_class: .* is told no classes"),
        ("classes", {"classes": ("a", "b", "c", "d")}, "4 names, and .* has 3 classes"),
        ("classes", {"classes": ("a", "a")}, "must differ"),
        ("classes", {"classes": ("7",)}, "'7' would be a class's number"),
        ("classes", {"null_class": 3}, r"must lie in 0 ... 2, got 3"),
        ("pixels", {"clip_skip": 1}, "of the family ddpm, without it"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, said, folder):
    with pytest.raises(ConfigError, match=said):
        opened(folder(name), **options)


def test_classes_that_are_embedded_as_times_have_no_end(folder):
    model = opened(folder("times"), classes=("small", "large"))
    conditioning = model.encode_text(["1", "large", "900"])
    x_t = torch.zeros(3, 3, 16, 16)
    given = model.denoise(x_t, torch.tensor([5, 5, 5]), conditioning)
    assert torch.equal(given[0], given[1]) and not torch.allclose(given[0], given[2])


def test_a_class_changes_the_picture_and_guidance_leads_to_it(folder):
    model = opened(folder("classes"), **CLASSES)
    model.raw("unet").class_embedding.weight.data *= 20

    def made(prompt: str, guidance: float) -> np.ndarray:
        return np.asarray(model.sample([prompt], [0], Sampling(steps=2, guidance=guidance))[0]).astype(int)

    assert abs(made("cat", 1) - made("dog", 1)).max() > 2
    assert abs(made("dog", 1) - made("dog", 3)).max() > 2
    assert np.array_equal(made("2", 3), made("2", 1))  # away from itself is nowhere


@pytest.mark.parametrize(
    ("name", "prompt", "asked", "said"),
    [
        ("pixels", "(a cat:1.2)", {}, r"prompt '\(a cat:1.2\)': .* is told nothing; give an empty one"),
        ("pixels", "", {"guidance": 7.5}, "sampling.guidance: .* is told nothing to lead away from"),
        ("latents", "", {"guidance": 2.0}, "sampling.guidance: .* is told nothing to lead away from"),
        ("classes", "1", {"guidance": 2.0}, "sampling.guidance: .* has no class of nothing"),
        ("pixels", "", {"negative_prompt": "blurry"}, "sampling.negative_prompt: .* is told no text"),
        ("pixels", "", {"width": 128}, "makes pictures of 64 x 64 alone, and 128 x 64"),
        ("pixels", "", {"image": Path("a.png")}, "sampling.image: .* begins with noise"),
    ],
)
def test_what_would_do_nothing_for_a_picture_is_refused(name, prompt, asked, said, folder):
    with pytest.raises(ConfigError, match=said):
        opened(folder(name)).sample([prompt], [0], Sampling(steps=1, **asked))


@pytest.mark.parametrize("method", [Full(text_encoder=True), Lora(text_encoder=True)])
def test_a_text_encoder_that_is_not_there_does_not_learn(method, folder):
    with pytest.raises(ConfigError, match=r"method.text_encoder: the base has no text encoder"):
        method.attach(opened(folder("pixels")), 0)


# Data


def test_a_folder_needs_no_captions_and_those_that_are_there_are_not_read(folder, tmp_path: Path):
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe no utf-8")
    rows = "".join(json.dumps({"file_name": f"{i}.png"}) + "\n" for i in range(2))
    (tmp_path / "metadata.jsonl").write_text(rows)
    for source in (PictureFolder(path=tmp_path), Table(path=tmp_path / "metadata.jsonl")):
        with pytest.raises(UserError):
            source.examples()
        assert [example.caption for example in every_example([source], captioned=False)] == ["", ""]


def test_what_is_done_with_captions_is_refused_where_there_are_none(folder, tmp_path: Path):
    model = opened(folder("pixels"))
    with pytest.raises(ConfigError, match=r"captions: .* is told nothing; leave `captions` out"):
        prepare(model, [], Pictures(), Cache(tmp_path), Captions(dropout=0.1))


def test_other_names_of_classes_are_other_entries_of_the_cache(folder, tmp_path: Path):
    def address(**options: Any) -> str:
        model = opened(folder("classes"), **options)
        return prepare(model, [], Pictures(), Cache(tmp_path), Captions()).text_address("dog")

    one, other, more = (address(classes=names) for names in (("cat", "dog"), ("dog", "cat"), ("cat", "dog", "bird")))
    assert len({one, other, more, address(**CLASSES)}) == 4
    assert one == address(classes=("cat", "dog"))


# Its files


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_their_own_latents(channels: int):
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = Pixels(channels).encode(pixels).latents
    grey = np.asarray(Image.fromarray(((pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).convert("L"))
    back = Pixels(channels).decode(latents).sample
    assert latents.shape == (2, channels, 8, 8) and back.shape == pixels.shape
    if channels == 3:
        assert torch.equal(back, pixels)
    else:
        assert abs((latents[0, 0] + 1) * 127.5 - torch.tensor(grey)).max() < 1.5


def test_a_model_of_grey_pictures_is_trained_on_grey_and_makes_grey(tmp_path: Path):
    tiny.ddpm(in_channels=1, out_channels=1).save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert model.encode_images(torch.rand(1, 3, 16, 16)).mean.shape == (1, 1, 16, 16)
    assert model.decode_latents(torch.rand(1, 1, 16, 16)).shape == (1, 3, 16, 16)
    assert model.sample([""], [0], Sampling(steps=1))[0].size == (64, 64)


def test_latents_of_a_vq_autoencoder_are_not_quantized_and_have_no_spread(folder):
    model = opened(folder("latents"))
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        found = model.encode_images(pixels)
        vae = model.raw("vae")
        assert torch.equal(found.mean, vae.quant_conv(vae.encoder(pixels)))
        assert not found.std.any()
        assert torch.allclose(model.decode_latents(found.mean), vae(pixels).sample)


def test_a_vq_autoencoder_whose_config_says_no_scale_has_none_and_a_release_says_so(folder, tmp_path: Path):
    shutil.copytree(folder("latents"), tmp_path / "old")
    file = tmp_path / "old" / "vqvae" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("scaling_factor") == 1
    file.write_text(json.dumps(config))
    assert DiffusionPipeline.from_pretrained(tmp_path / "old").vqvae.config.scaling_factor == 0.18215
    model = opened(tmp_path / "old")
    assert model.scaling == 1
    same = opened(folder("latents"))
    for made in (model, same):
        assert made.scaling == 1 and made.raw("vae").config.scaling_factor == 1
    one, other = (np.asarray(made.sample([""], [0], Sampling(steps=2))[0]) for made in (model, same))
    assert np.array_equal(one, other)


def test_a_folder_from_the_first_days_lies_flat_and_has_older_names(folder, tmp_path: Path):
    """As `google/ddpm-cifar10-32` does."""
    flat = tmp_path / "flat"
    flat.mkdir()
    base = folder("pixels")
    shutil.copy(base / "model_index.json", flat)
    shutil.copy(base / "scheduler" / "scheduler_config.json", flat)
    shutil.copy(base / "unet" / "config.json", flat)
    older = {new: old for old, new in VAE_ATTENTION.items()}
    tensors = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")

    def named(name: str) -> str:
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.") if ".attentions." in name else name
        return name

    renamed = {named(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, flat / "diffusion_pytorch_model.safetensors")
    model = opened(flat)
    assert model.fingerprint("unet") == opened(base).fingerprint("unet")
    older_folder = tmp_path / "older"
    shutil.copytree(base, older_folder)
    save_file(renamed, older_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert DiffusersFolder(older_folder).metas == DiffusersFolder(base).metas


@pytest.mark.parametrize(
    ("unet", "said"),
    [
        ({"sample_size": [64, 32]}, "sample_size: .*expected the side of square pictures"),
        ({"class_embed_type": "identity"}, "class_embed_type: 'identity', supported"),
        ({"out_channels": 6}, "gives 6 channels for 3, such as a variance"),
        ({"in_channels": 4, "out_channels": 4}, "in_channels: 4, and pixels have 3, or 1 of grey"),
    ],
)
def test_a_network_of_another_kind_is_refused(unet: dict[str, Any], said: str, tmp_path: Path):
    tiny.ddpm(**unet).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


def test_nothing_is_dropped_while_it_learns(tmp_path: Path):
    tiny.ddpm(dropout=0.5).save_pretrained(tmp_path)
    model = opened(tmp_path)
    Full().attach(model, 0)
    x_t, t, told = torch.randn(1, 3, 16, 16), torch.tensor([5]), model.encode_text([""])
    assert torch.equal(model.denoise(x_t, t, told), model.denoise(x_t, t, told))


def test_recomputed_activations_and_plain_attention_give_the_same_gradients(folder):
    options: list[dict[str, Any]] = [{"attention": "torch"}, {"attention": "math"}, {"gradient_checkpointing": True}]
    grads: list[torch.Tensor] = []
    for option in options:
        model = opened(folder("pixels"), **option)
        Full().attach(model, 0)
        x_t = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        model.denoise(x_t, torch.tensor([5]), model.encode_text([""])).square().sum().backward()
        grads.append(model.raw("unet").conv_in.weight.grad)
        kinds = {type(part.processor).__name__ for part in model.raw("unet").modules() if hasattr(part, "processor")}
        assert kinds == {"AttnProcessor2_0" if option == {"attention": "torch"} else "AttnProcessor"}
    assert all(torch.allclose(grads[0], other, rtol=1e-3, atol=1e-5) for other in grads[1:]) and grads[0].any()


@pytest.mark.parametrize("name", ["pixels", "latents", "classes"])
def test_a_published_fine_tune_is_opened_by_its_stock_pipeline_and_its_card_says_what_it_is(
    name: str, folder, tmp_path: Path
):
    model = opened(folder(name))
    write_full(tmp_path / "run" / "model", model.pipeline(), folder(name) / "tokenizer")
    provenance = replace(PROVENANCE, architecture=model.architecture, method="full", pictures=(), grid=None)
    build(tmp_path / "run", tmp_path / "published", provenance)
    made = DiffusionPipeline.from_pretrained(tmp_path / "published")
    assert type(made).__name__ == model.kind and type(made.scheduler) is type(model.pipeline().scheduler)
    card = (tmp_path / "published" / "README.md").read_text()
    assert "pipeline_tag: unconditional-image-generation" in card and "- stable-diffusion" not in card
    assert ("image = pipeline().images[0]" in card) == (name != "classes")
    assert ("class_labels" in card) == (name == "classes")
    assert opened(tmp_path / "published").resolution == 64


# What is in a file, and merging


@pytest.mark.parametrize("name", [*MAKES, "ldm"])
def test_a_file_is_known_by_its_names_and_shapes(name: str, folder, tmp_path: Path):
    if name == "ldm":
        tiny.ldm().save_pretrained(tmp_path)
    known = identify(DiffusersFolder(tmp_path if name == "ldm" else folder(name)).metas)
    assert (known.family, known.layout) == ("ldm" if name == "ldm" else "ddpm", "diffusers")
    parts = {"ldm": ("bert", "unet", "vqvae"), "latents": ("unet", "vqvae")}
    assert known.components == parts.get(name, ("unet",))


def test_blocks_and_the_autoencoder_of_two_models_are_merged_by_their_own_numbers(folder, tmp_path: Path):
    other, out = tmp_path / "other", tmp_path / "out"
    tiny.ldm_uncond(seed=1).save_pretrained(other)
    config = tmp_path / "merge.toml"
    config.write_text(
        f"output = '{out}'\ndtype = 'float32'\n[models]\na = '{folder('latents')}'\nb = '{other}'\n"
        "[[steps]]\nname = 'made'\ninputs = ['a', 'b']\n"
        "method = { type = 'lerp', t = { default = 0.0, blocks = { M00 = 1.0, OUT00 = 0.5, VAE = 1.0 } } }\n"
    )
    assert command.main([str(config)]) == 0
    a, b, made = (DiffusersFolder(place) for place in (folder("latents"), other, out))
    assert made.metas.keys() == a.metas.keys()
    share = {"unet.mid_block.": 1.0, "unet.up_blocks.0.resnets.0.": 0.5, "vqvae.": 1.0}
    seen: set[float] = set()
    for name in a.metas:
        t = next((t for start, t in share.items() if name.startswith(start)), None)
        if t is None and name.startswith("unet.up_blocks.0.attentions.0."):
            t = 0.5
        seen.add(t or 0.0)
        assert torch.allclose(made.read(name), torch.lerp(a.read(name), b.read(name), t or 0.0), atol=1e-6), name
    assert seen == {0.0, 0.5, 1.0}
    assert DiffusionPipeline.from_pretrained(out)(num_inference_steps=1).images[0].size == (64, 64)


def test_there_is_no_single_file_of_it_and_a_network_alone_becomes_a_folder(folder, tmp_path: Path):
    with pytest.raises(DataError, match="a U-Net without text: programs have it in folders alone"):
        convert(folder("pixels"), tmp_path / "a.safetensors", layout="ldm")
    alone = folder("pixels") / "unet" / "diffusion_pytorch_model.safetensors"
    made = convert(alone, tmp_path / "made", config=str(folder("pixels"))).target
    assert opened(made).fingerprint("unet") == opened(folder("pixels")).fingerprint("unet")
    half = convert(folder("latents"), tmp_path / "half", dtype="float16").target
    assert {meta.dtype for meta in DiffusersFolder(half).metas.values()} == {torch.float16}
    assert opened(half).resolution == 64


# The released ones


def built(place: Path) -> Any:
    config = json.loads((place / "config.json").read_text())
    kinds: dict[str, Any] = {
        kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, VQModel, AutoencoderKL)
    }
    with torch.device("meta"):
        if place.name == "bert":
            return LDMBertModel(LDMBertConfig(**config))
        return kinds[config["_class_name"]].from_config(config)


PARAMETERS = {
    "ddpm-cifar10-32": {"unet": 35_746_307},
    "ddpm-cat-256": {"unet": 113_673_219},
    "ldm-celebahq-256": {"unet": 274_056_163, "vqvae": 55_322_782},
    "ldm-text2im-large-256": {"unet": 872_300_484, "bert": 581_994_042, "vqvae": 83_653_863},
}
"""Ho et al. 2020, appendix B: 35.7 and 114 million; Rombach et al. 2022, table 15: 274 million for CelebA-HQ, and 1.45
billion for the text-to-image model with its encoder."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_released_models_have_as_many_parameters_as_their_papers_say(name: str):
    networks = {place.parent.name: built(place.parent) for place in (RELEASED / name).glob("*/config.json")}
    assert {part: sum(p.numel() for p in n.parameters()) for part, n in networks.items()} == PARAMETERS[name]
    metas = {
        f"{part}.{own}": TensorMeta(tuple(tensor.shape), tensor.dtype)
        for part, network in networks.items()
        for own, tensor in network.state_dict().items()
    }
    assert identify(metas).family == ("ldm" if "bert" in networks else "ddpm")
    alone = {own.removeprefix("unet."): meta for own, meta in metas.items() if own.startswith("unet.")}
    assert identify(alone).family == ("ldm" if "bert" in networks else "ddpm")


@pytest.mark.parametrize(
    ("name", "resolution", "step", "latents"),
    [("ddpm-cifar10-32", 32, 8, (3, 32, 32)), ("ldm-celebahq-256", 256, 32, (3, 64, 64))],
)
def test_shapes_of_the_released_models_go_through(name: str, resolution: int, step: int, latents: tuple[int, ...]):
    place = RELEASED / name
    vae = built(place / "vqvae") if (place / "vqvae").is_dir() else Pixels(3)
    model = DdpmModel(
        source=name,
        folder=place,
        kind=json.loads((place / "model_index.json").read_text())["_class_name"],
        networks={"unet": built(place / "unet"), "vae": vae},
        tokenizers={},
        scheduler_config=json.loads((place / "scheduler" / "scheduler_config.json").read_text()),
        device=torch.device("meta"),
    )
    assert (model.resolution, model.resolution_step) == (resolution, step)
    assert Buckets(resolution=resolution, step=step).sizes
    x_0 = model.encode_images(torch.zeros(1, 3, resolution, resolution, device="meta")).mean
    assert x_0.shape == (1, *latents)
    t = torch.zeros(1, dtype=torch.long, device="meta")
    assert model.denoise(x_0, t, model.encode_text([""])).shape == x_0.shape
    start, end = (1e-4, 0.02) if "ddpm" in name else (0.0015, 0.0195)
    alpha, _ = model.schedule.alpha_sigma(torch.tensor([0, 999]))
    first = 1 - torch.tensor(start)
    betas = torch.linspace(start, end, 1000, dtype=torch.float64)
    if "ldm" in name:
        betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(alpha[0] ** 2, first) and torch.allclose((alpha[1] ** 2).double(), (1 - betas).prod())
