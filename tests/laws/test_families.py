"""Laws of every family: an opened model computes what the stock pipeline's own pieces do, learns like every other, and
what it has learned is in stock pipelines what it was in training.
"""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from merge import command as merge
from tests import runs, tiny
from tuner.config.command_line import run as run_command
from tuner.data.images import upright_size
from tuner.diffusion.batch import Batch
from tuner.diffusion.model import TakesWords
from tuner.diffusion.objective import Objective
from tuner.errors import ConfigError
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.methods.base import Method
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.methods.textual_inversion import TextualInversion, Word
from tuner.optim.adamw import AdamW
from tuner.rng import Position

CPU = torch.device("cpu")
CAPTIONS = ("the red cat", "")
TIMES = torch.tensor([123.0, 900.0])
PROMPT = "a robot, blue"


@dataclass(frozen=True)
class Family:
    """A tiny base, and what its stock pipeline's pieces make of pictures."""

    make: Callable[[], Any]
    """The base as a stock pipeline."""
    plain: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    """The loss of pixels `[B, 3, H, W]` told `CAPTIONS`, with this noise and at these times, by a stock pipeline."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Of the model, beside its base."""
    call: tuple[tuple[str, Any], ...] = ()
    """What the stock pipeline is to be told to do as the model does."""
    refines: bool = False
    """Whether its pictures are made of others."""
    size: tuple[int, int] = (80, 48)
    """Of a picture that it can be asked for."""
    captions: tuple[str, str] = CAPTIONS
    prompt: str = PROMPT
    guidance: float = 3.0
    told: Literal["text", "class", "nothing"] = "text"
    """What it is told of pictures."""
    run: tuple[str, ...] = ("captions.dropout=0.3",)
    """What a run of it is told besides."""
    caption: str | None = None
    """Of every picture in a run, where files beside them do not say it."""


def sd(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    tokens = torch.cat([pipeline.encode_prompt(caption, CPU, 1, False)[0] for caption in CAPTIONS])
    return unet_loss(pipeline, pixels, noise, t, tokens)


def sdxl(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """An empty text as the negative prompt, which is what it is for."""
    texts = [pipeline.encode_prompt(caption) for caption in CAPTIONS]
    tokens, pooled = (
        torch.cat([text[i] if caption else text[i + 1] for caption, text in zip(CAPTIONS, texts, strict=True)])
        for i in (0, 2)
    )
    size, cut = (48, 80), (0, 0)
    if pipeline.config.get("requires_aesthetics_score"):
        ids, _ = pipeline._get_add_time_ids(size, cut, size, 6.0, 2.5, size, cut, size, torch.float32, 64)
    else:
        ids = pipeline._get_add_time_ids(size, cut, size, torch.float32, 64)
    added = {"text_embeds": pooled, "time_ids": ids.repeat(2, 1)}
    return unet_loss(pipeline, pixels, noise, t, tokens, added_cond_kwargs=added)


def unet_loss(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor, tokens: Tensor, **more: Any) -> Tensor:
    schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    x_0 = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    output = pipeline.unet(schedule.add_noise(x_0, noise, t.long()), t, tokens, **more).sample
    v = schedule.config["prediction_type"] == "v_prediction"
    return (output - (schedule.get_velocity(x_0, noise, t.long()) if v else noise)).square().mean((1, 2, 3))


def sd3(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        list(CAPTIONS), None, None, do_classifier_free_guidance=False, max_sequence_length=32
    )
    x_0 = (pipeline.vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
    sigma = (t / 1000)[:, None, None, None]
    output = pipeline.transformer((1 - sigma) * x_0 + sigma * noise, tokens, pooled, t).sample
    return (output - (noise - x_0)).square().mean((1, 2, 3))


def flux(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    tokens, pooled, text_ids = pipeline.encode_prompt(list(CAPTIONS), None, max_sequence_length=32)
    x_0 = (pipeline.vae.encode(pixels).latent_dist.mean - 0.1159) * 0.3611
    x_0, noise = (pipeline._pack_latents(part, *part.shape) for part in (x_0, noise))
    image_ids = pipeline._prepare_latent_image_ids(2, pixels.shape[2] // 16, pixels.shape[3] // 16, CPU, torch.float32)
    sigma = (t / 1000)[:, None, None]
    output = pipeline.transformer(
        hidden_states=(1 - sigma) * x_0 + sigma * noise,
        timestep=t / 1000,
        guidance=torch.ones(2) if pipeline.transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=text_ids,
        img_ids=image_ids,
    ).sample
    return (output - (noise - x_0)).square().mean((1, 2))


def ldm(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    ids = pipeline.tokenizer(list(CAPTIONS), padding="max_length", max_length=77, return_tensors="pt").input_ids
    if isinstance(pipeline.vqvae, AutoencoderKL):
        x_0 = pipeline.vqvae.encode(pixels).latent_dist.mean
    else:
        x_0 = pipeline.vqvae.encode(pixels).latents
    x_t = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(
        x_0 * pipeline.vqvae.config.scaling_factor, noise, t.long()
    )
    return (pipeline.unet(x_t, t, pipeline.bert(ids)[0]).sample - noise).square().mean((1, 2, 3))


def ddpm(pipeline: Any, pixels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Of pixels, or of a VQ autoencoder's latents; classes are 1, a dog, and 2, none."""
    if hasattr(pipeline, "vqvae"):
        pixels = pipeline.vqvae.encode(pixels).latents * pipeline.vqvae.config.scaling_factor
    labels = torch.tensor([1, 2]) if pipeline.unet.config.num_class_embeds else None
    x_t = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(pixels, noise, t.long())
    return (pipeline.unet(x_t, t, labels).sample - noise).square().mean((1, 2, 3))


CLASSES: tuple[tuple[str, Any], ...] = (("classes", ["cat", "dog"]), ("null_class", 2))
untold = partial(Family, size=(64, 64), prompt="", guidance=1.0, told="nothing", run=())
SHORT = (("t5_length", 32),)
CALL = (("max_sequence_length", 32),)
FAMILIES = {
    "sd1": Family(tiny.sd1, sd),
    "sd2 512": Family(partial(tiny.sd2, prediction="epsilon"), sd),
    "sd2 768": Family(tiny.sd2, sd),
    "sdxl": Family(tiny.sdxl, sdxl),
    "sdxl refiner": Family(tiny.refiner, sdxl, refines=True),
    "sd3": Family(partial(tiny.sd3, half=False), sd3, SHORT, CALL),
    "sd3.5": Family(tiny.sd3, sd3, SHORT, CALL),
    "sd3.5 without T5": Family(partial(tiny.sd3, t5=False), sd3, SHORT, CALL),
    "flux dev": Family(tiny.flux, flux, SHORT, CALL),
    "flux schnell": Family(partial(tiny.flux, dev=False), flux, SHORT, CALL),
    "ldm": Family(tiny.ldm, ldm),
    "ldm of a VQ autoencoder": Family(partial(tiny.ldm, vq=True), ldm),
    "ddpm": untold(tiny.ddpm, ddpm),
    "ddpm by DDIM": untold(partial(tiny.ddpm, ddim=True), ddpm),
    "ddpm of latents": untold(tiny.ldm_uncond, ddpm),
    "ddpm of classes": Family(
        partial(tiny.ddpm, num_class_embeds=3),
        ddpm,
        CLASSES,
        size=(64, 64),
        captions=("dog", ""),
        prompt="dog",
        told="class",
        caption="1",
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
trained_families = pytest.mark.parametrize(
    "name", ["sd2 768", "sdxl", "sd3.5", "flux dev", "ldm", "ddpm", "ddpm of latents", "ddpm of classes"]
)
"""Of those that differ in their sizes and options only, one."""
PIVOTAL = TextualInversion(tokens={"<new>": Word(vectors=2)}, adapter=Lora(rank=4))
"""New words alone are in tests/tuner/families/test_words.py: they need captions that hold them."""
every_method = pytest.mark.parametrize("method", [Full(), Lora(rank=4), PIVOTAL], ids=["full", "lora", "pivotal"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family's tiny base; not to be written into."""

    @cache
    def made(name: str) -> Path:
        place = tmp_path_factory.mktemp("families") / "base"
        FAMILIES[name].make().save_pretrained(place)
        return place

    return made


def stock(folder: Path) -> Any:
    """The stock pipeline over a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = dict.fromkeys(part for part, kind in index.items() if kind == [None, None])
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def opened(folder) -> Callable[[str], Any]:
    """A model of a family, each time anew."""
    return lambda name: base_of(name, folder(name)).open(CPU)


def base_of(name: str, folder: Path) -> BaseModel:
    """As a config says it."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in FAMILIES[name].settings}
    return BaseModel(base=str(folder), **settings)


def pictures() -> Tensor:
    return torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def batch(name: str, model: Any) -> Batch:
    captions = FAMILIES[name].captions
    return Batch(
        latents=model.encode_images(pictures()).mean,
        captions=captions,
        conditioning=model.encode_text(captions),
        weight=torch.ones(2),
        positions=[Position(0, 0, 0), Position(0, 0, 1)],
        frame=torch.tensor([[48.0, 80.0, 0.0, 0.0, 48.0, 80.0]]).expand(2, -1),
    )


def loss(model: Any, of: Batch) -> Tensor:
    return Objective().loss(model, of, times(model)).plain


def times(model: Any) -> Tensor:
    """`TIMES` as its schedule has times: of a flow they are real numbers."""
    return TIMES.to(model.schedule.time_at(torch.zeros(1, dtype=torch.float64)).dtype)


@every_family
@torch.no_grad()
def test_its_loss_is_what_the_stock_pipelines_pieces_give(name: str, folder, opened):
    model = opened(name)
    of = batch(name, model)
    noise = torch.stack([Objective().noise.draw(of.latents.shape[1:], at.generator("noise")) for at in of.positions])
    expected = FAMILIES[name].plain(stock(folder(name)), pictures(), noise, TIMES)
    assert torch.allclose(loss(model, of), expected, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-3)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.refines])
@torch.no_grad()
def test_its_samples_are_those_of_the_stock_pipeline(name: str, folder, opened):
    family, model = FAMILIES[name], opened(name)
    width, height = family.size
    sampling = Sampling(width=width, height=height, steps=3, guidance=family.guidance)
    made = model.sample([family.prompt], [3], sampling)[0]
    expected = drawn(name, stock(folder(name)), model.noise(3, width, height), family.size, 3)
    assert made.size == (width, height) and apart(made, expected) <= 1


@trained_families
@every_method
def test_attaching_changes_nothing_and_it_learns_on_fixed_noise(name: str, method: Method, opened):
    model = opened(name)
    of = batch(name, model)
    before = loss(model, of)
    if isinstance(method, TextualInversion) and not isinstance(model, TakesWords):
        with pytest.raises(ConfigError, match="take no new words"):
            method.attach(model, seed=0)
        return
    parameters = method.attach(model, seed=0)
    assert torch.allclose(loss(model, of), before, rtol=1e-6, atol=0)  # kernels add in any order
    optimizer = AdamW(lr=3e-3).build(parameters.groups)
    for _ in range(8):
        Objective().loss(model, of, times(model)).weighted.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model, of).mean() < 0.97 * before.mean()


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


# Whole runs


@dataclass(frozen=True)
class Ran:
    """A run's output, and what it left in the cache that is only its own."""

    output: Path
    cache: Path

    def cached(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.cache.rglob("*.safetensors")}

    def preview(self) -> Image.Image:
        """The last one."""
        return Image.open(sorted(self.output.glob("samples/*/000.png"))[-1])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Any:
    """A run of a recipe on a family's base, with the cache of another run or its own."""
    place = tmp_path_factory.mktemp("runs")
    runs.draw_pictures(place / "pictures")

    def ran(name: str, recipe: str, output: Path, *arguments: str, cache: Path | None = None) -> Ran:
        made = Ran(output, cache or output.with_suffix(".cache"))
        module = importlib.import_module(f"recipes.{recipe}")
        family = FAMILIES[name]
        settings = (f"model.{key}={value!r}" for key, value in family.settings)
        sampling = f"{{width=64,height=64,steps=3,guidance={family.guidance}}}"
        preview = f"{{type='previews',prompts=['{family.prompt}'],every=999,sampling={sampling}}}"
        told = "" if family.caption is None else f",prompt='{family.caption}'"
        data = f"data=[{{type='folder',path='{place / 'pictures'}'{told}}}]"
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = [
            f"run.output='{output}'", f"run.cache='{made.cache}'", f"model.base='{folder(name)}'", *settings,
            *([] if recipe == "dreambooth" else [data]), *family.run,
            "pictures.resolution=64", "run.precision='fp32'",
            "run.batch_size=4", "run.micro_batch=3", "run.updates=4", "pictures.flip=true",
            "optimizer={type='adamw',lr=1e-2}", f"observers=[{preview}]", *arguments,
        ]  # fmt: skip
        assert run_command(module.Config, module.main, argv) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        return made

    ran.pictures = place / "pictures"  # pyright: ignore[reportFunctionMemberAccess]
    return ran


@pytest.fixture(scope="module")
def lora(run, tmp_path_factory) -> Callable[[str], Ran]:
    """A family's finished run of LoRA."""
    place = tmp_path_factory.mktemp("lora")
    return cache(
        lambda name: run(name, "lora", place / name, "method={rank=4}", "run.checkpoint_every=8", "run.keep=9")
    )


@trained_families
def test_a_resumed_run_ends_alike_to_the_bit_and_encodes_nothing_again(name: str, lora, run, tmp_path: Path):
    whole = lora(name)
    cached = whole.cached()
    assert len(cached) > 2 * len(runs.SIZES)  # latents of both sides, and captions
    assert len(runs.places(whole.output)) == 2
    resumed = tmp_path / "resumed"
    shutil.copytree(whole.output / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints" / f"samples-{runs.places(whole.output)[-1]:010d}")
    again = run(name, "lora", resumed, "method={rank=4}", "run.checkpoint_every=8", "run.keep=9", cache=whole.cache)
    assert runs.digests(resumed) == runs.digests(whole.output)
    assert again.cached() == cached


@trained_families
@pytest.mark.parametrize("file", ["model-diffusers.safetensors", "model.safetensors"])
def test_a_stock_pipeline_with_the_lora_gives_the_trained_pictures(
    name: str, file: str, lora, folder, opened, tmp_path: Path
):
    if file == "model.safetensors" and not hasattr(stock(folder(name)), "unet"):
        return  # of transformers, diffusers reads kohya's names in the released sizes alone, or not at all
    ran, noise = lora(name), opened(name).noise(0, 64, 64)
    pipeline = stock(folder(name))
    base = drawn(name, pipeline, noise)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(ran.output / "lora", weight_name=file)
    else:  # those from before Stable Diffusion read none; then it is baked in
        baked = tmp_path / "baked"
        assert merge.main(["add", str(folder(name)), str(ran.output / "lora" / file), f"to={baked}"]) == 0
        pipeline = stock(baked)
    assert apart(base, ran.preview()) > 5
    assert apart(drawn(name, pipeline, noise), ran.preview()) <= 2


@pytest.mark.parametrize("name", ["sd2 768", "sdxl"])
def test_dreambooth_with_class_pictures_and_text_encoders_is_trained_and_published(
    name: str, run, folder, opened, tmp_path: Path
):
    data = (
        f"data={{subject='{run.pictures}',prompt='a robot',class_folder='{tmp_path / 'class'}',class_prompt='the cat',"
        "class_count=3}"
    )
    ran = run(name, "dreambooth", tmp_path / "run", data, "method={type='lora',rank=4,conv_rank=2,text_encoder=true}")
    assert {upright_size(file) for file in (tmp_path / "class").glob("*.png")} == {(64, 64)}
    noise, pipeline = opened(name).noise(0, 64, 64), stock(folder(name))
    base = drawn(name, pipeline, noise)
    publish = importlib.import_module("recipes.publish")
    target = f"target={{type='folder',path='{tmp_path / 'published'}'}}"
    assert run_command(publish.Config, publish.main, [f"release='{ran.output}'", target]) == 0
    learned = {name.split(".")[0] for name in load_file(tmp_path / "published" / "model-diffusers.safetensors")}
    assert learned == {part for part, network in pipeline.components.items() if part != "vae" and is_network(network)}
    for file in ("model-diffusers.safetensors", "model.safetensors"):
        pipeline.load_lora_weights(tmp_path / "published", weight_name=file, adapter_name="it")
        assert apart(base, ran.preview()) > 5
        assert apart(drawn(name, pipeline, noise), ran.preview()) <= 2
        pipeline.delete_adapters("it")


def is_network(part: Any) -> bool:
    return isinstance(part, torch.nn.Module)


def test_what_flux_was_told_while_it_learned_is_in_the_headers(lora):
    for file in (lora("flux dev").output / "lora").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            texts = opened.metadata()
        assert (texts["ss_guidance_scale"], texts["modelspec.architecture"]) == ("1", "flux-1-dev/lora")


@trained_families
def test_a_full_release_is_opened_by_us_and_by_the_stock_pipeline_as_it_was(name: str, run, tmp_path: Path):
    text = f"method={{text_encoder={str(FAMILIES[name].told == 'text').lower()}}}"
    ran = run(name, "full", tmp_path / "full", text, "optimizer={type='adamw',lr=1e-3}")
    made = ran.output / "model"
    model = base_of(name, made).open(CPU)
    family = FAMILIES[name]
    again = model.sample([family.prompt], [0], Sampling(width=64, height=64, steps=3, guidance=family.guidance))[0]
    theirs = drawn(name, stock(made), model.noise(0, 64, 64))
    assert apart(again, theirs) <= 1
    assert apart(theirs, ran.preview()) <= 3  # what is written has half precision


def drawn(name: str, pipeline: Any, noise: Tensor, size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    """As a preview; pipelines that take no text draw their noise from the seed."""
    family = FAMILIES[name]
    settings = {"num_inference_steps": 3, **dict(family.call)}
    with torch.no_grad():
        if family.told == "text":
            settings |= {"width": size[0], "height": size[1], "latents": noise, "guidance_scale": family.guidance}
            return pipeline(family.prompt, **settings).images[0]
        if family.told == "class":
            pipeline.unet = ToldDog(pipeline.unet, family.guidance)
        return pipeline(generator=torch.Generator().manual_seed(seed), **settings).images[0]


class ToldDog:
    """A U-Net that is told class 1, led away from class 2; diffusers' pipelines of this kind tell none."""

    def __init__(self, unet: Any, guidance: float) -> None:
        self.unet, self.guidance = unet, guidance
        self.config, self.dtype = unet.config, unet.dtype

    def __call__(self, x_t: Tensor, t: Tensor) -> Any:
        both = self.unet(torch.cat([x_t, x_t]), t, torch.tensor([1, 2])).sample
        return SimpleNamespace(sample=both[1:] + self.guidance * (both[:1] - both[1:]))
