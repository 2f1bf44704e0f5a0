"""U-Nets that are told a picture: inpainting, depth and editing, as the stock pipelines tell them, in training too."""

import importlib
import inspect
import json
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor

from tests import runs, tiny
from tests.tuner.families.stock import opened, pixels
from tuner.config.command_line import run as run_command
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.guides import Guides
from tuner.data.images import Pictures, load_picture, to_pixels
from tuner.data.order import Order
from tuner.data.sources.folder import PictureFolder
from tuner.data.stream import DataStream
from tuner.errors import ConfigError, DataError
from tuner.families.base import Sampling
from tuner.publish.full import write_full
from tuner.rng import generator_at
from tuner.training.metrics import read_metrics
from tuner.training.run import prepare
from tuner.training.watchers import quiet

KINDS: dict[str, tuple[Callable[..., Any], str, int]] = {
    "sd1 mask": (tiny.sd1, "StableDiffusionInpaintPipeline", 9),
    "sd2 mask": (tiny.sd2, "StableDiffusionInpaintPipeline", 9),
    "sdxl mask": (tiny.sdxl, "StableDiffusionXLInpaintPipeline", 9),
    "sd2 depth": (tiny.sd2, "StableDiffusionDepth2ImgPipeline", 5),
    "sd1 picture": (tiny.sd1, "StableDiffusionInstructPix2PixPipeline", 8),
    "sdxl picture": (tiny.sdxl, "StableDiffusionXLInstructPix2PixPipeline", 8),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a base of a kind, whose autoencoder leaves next to nothing to chance; not to be written into."""

    @cache
    def made(kind: str) -> Path:
        make, name, channels = KINDS[kind]
        plain = make(in_channels=channels)
        parts = {part: network for part, network in plain.components.items() if part != "image_encoder"}
        with torch.no_grad():  # the pipelines draw where training takes the mean
            plain.vae.quant_conv.weight[4:].zero_()
            plain.vae.quant_conv.bias[4:].fill_(-30)
        if "Depth" in name:
            parts = {part: parts[part] for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
            parts |= {"depth_estimator": None, "feature_extractor": None}
        elif "XL" in name:
            parts = {part: network for part, network in parts.items() if part != "feature_extractor"}
        else:
            parts["requires_safety_checker"] = False
        place = tmp_path_factory.mktemp("guided") / "base"
        getattr(diffusers, name)(**parts).save_pretrained(place)
        return place

    return made


def stock(folder: Path) -> Any:
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    absent: dict[str, Any] = {"safety_checker": None} if "XL" not in kind else {}
    if "Depth" in kind:
        absent = {"depth_estimator": None, "feature_extractor": None}
    pipeline = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def smooth(seed: int, size: tuple[int, int] = (72, 56)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def half(size: tuple[int, int] = (72, 56)) -> Image.Image:
    """A mask: what is right of the middle, and not where a cell of latents ends."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[5:, size[0] // 2 + 3 :] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    made = {"photo": smooth(0), "mask": half(), "depth": smooth(1).convert("L"), "before": smooth(2)}
    for name, picture in made.items():
        picture.save(place / f"{name}.png")
    return {name: place / f"{name}.png" for name in made}


def told(kind: str, files: dict[str, Path]) -> tuple[Sampling, dict[str, Any]]:
    """What previews are told, and the same for the stock pipeline."""
    settings: dict[str, Any] = {"width": 72, "height": 56, "steps": 3, "guidance": 4.0}
    common = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(3)}
    latents = {"latents": torch.randn(1, 4, 7, 9, generator=torch.Generator().manual_seed(3))}
    photo, before = (Image.open(files[name]).convert("RGB") for name in ("photo", "before"))
    if "mask" in kind:
        own = {"image": photo, "mask_image": Image.open(files["mask"]), "strength": 1.0, "width": 72, "height": 56}
        return Sampling(**settings, image=files["photo"], guide=files["mask"]), {**common, **latents, **own}
    if "depth" in kind:
        depth = torch.from_numpy(np.array(Image.open(files["depth"]))).float()[None]
        own = {"image": photo, "depth_map": depth, "strength": 0.7}
        return Sampling(**settings, image=files["photo"], guide=files["depth"], strength=0.7), {**common, **own}
    size = {"width": 72, "height": 56} if "xl" in kind else {}
    return Sampling(**settings, guide=files["before"]), {**common, **latents, **size, "image": before}


@every_kind
def test_a_base_trained_down_to_pure_noise_is_sampled_though_not_every_pipeline_rescales(kind, base, files):
    sampling, arguments = told(kind, files)
    if "mask" in kind:
        arguments["mask_image"].close()
    trained = opened(base(kind), prediction="v_prediction", zero_terminal_snr=True)
    (picture,) = trained.sample(["the red cat"], [3], sampling)
    assert pixels(picture).std() > 1
    taken = inspect.signature(type(trained.pipeline()).__call__).parameters  # some swallow what they do not take
    assert {*trained.guided("the red cat", sampling)} <= taken.keys()
    assert ("guidance_rescale" in trained.guided("the red cat", sampling)) == ("guidance_rescale" in taken)


@every_kind
@torch.no_grad()
def test_samples_are_those_of_the_stock_pipeline(kind, base, files):
    sampling, arguments = told(kind, files)
    (picture,) = opened(base(kind)).sample(["the red cat"], [3], sampling)
    expected = stock(base(kind))("the red cat", **arguments).images[0]
    assert picture.size == (72, 56)
    assert abs(pixels(picture) - pixels(expected)).max() <= 1
    assert pixels(picture).std() > 1


@every_kind
@torch.no_grad()
def test_training_tells_the_denoiser_what_the_stock_pipeline_tells_it(kind, base, files, tmp_path: Path):
    """A run's batch has beside its latents what the pipeline puts there for the same picture."""
    model, pipeline = opened(base(kind)), stock(base(kind))
    seen: list[Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda network, given: seen.append(given[0]))
    _, arguments = told(kind, files)
    pipeline("the red cat", **arguments)
    expected = seen[0][-2 if "picture" in kind else -1][4:]  # the last of an editing pipeline's is told nothing
    (batch,) = batches(model, tmp_path, files, kind, Pictures(resolution=64, bucket_step=8), count=1)
    assert batch.image is not None and batch.image.shape[1] == KINDS[kind][2] - 4
    assert torch.allclose(batch.image[0], expected, atol=1e-5)
    assert float(expected.std()) > 0.05


def batches(
    model: Any, place: Path, files: dict[str, Path], kind: str, pictures: Pictures, count: int, start: int = 0
) -> list[Any]:
    """What a run sees of one picture and its guide."""
    for name in ("pictures", "guides"):
        (place / name).mkdir(exist_ok=True)
    (place / "pictures" / "it.png").write_bytes(files["photo"].read_bytes())
    guide = files[{"mask": "mask", "depth": "depth", "picture": "before"}[kind.split()[1]]]
    (place / "guides" / "it.png").write_bytes(guide.read_bytes())
    drawn = pictures.guides != Guides() and "mask" in kind
    source = PictureFolder(path=place / "pictures", prompt="the red cat", guides=None if drawn else place / "guides")
    encoded = prepare(model, source.examples(), pictures, Cache(place / "cache"), Captions())
    assert encoded.sizes == [(72, 56)]
    encoded.fill_latents(model, encoded.missing_latents(), quiet)
    encoded.fill_texts(model, encoded.missing_texts(["the red cat"]), quiet)
    stream = DataStream(
        model=model, encoded=encoded, captions=Captions(), order=Order(buckets=((72, 56),), seed=0, batch_size=1),
        micro_batch=1, rank=0, world=1, device=torch.device("cpu"), learns_text=False,
    )  # fmt: skip
    return [batch.micro_batches[0] for batch in islice(stream(start), count)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1 mask", "sd2 depth", "sd1 picture"])
def test_a_guide_is_cut_and_mirrored_with_its_picture(kind, base, files, tmp_path: Path):
    model = opened(base(kind))
    shown = batches(model, tmp_path, files, kind, Pictures(resolution=64, bucket_step=8, flip=True), count=12)
    source = PictureFolder(path=tmp_path / "pictures", prompt="x", guides=tmp_path / "guides")
    encoded = prepare(model, source.examples(), Pictures(resolution=64, bucket_step=8), Cache(tmp_path), Captions())
    guide = load_picture(source.examples()[0].guide or Path(), "white")
    expected: dict[bool, Tensor] = {}
    for flip in (False, True):
        cut = to_pixels(guide, encoded.crops[0], flip)
        if "picture" not in kind:
            cut = (cut[:1] + 1) / 2
        if "mask" in kind:
            cut = torch.cat([cut, to_pixels(load_picture(files["photo"], "white"), encoded.crops[0], flip)])
        expected[flip] = model.encode_guide(cut[None])[0]
    found = [[flip for flip in expected if torch.allclose(each.image[0], expected[flip], atol=1e-4)] for each in shown]
    assert all(len(flips) == 1 for flips in found) and {flip for (flip,) in found} == {False, True}
    mirrored = [flip for (flip,) in found]
    assert mirrored == [
        bool(torch.allclose(each.latents, one.latents, atol=0.1))
        for each in shown
        for one in [shown[mirrored.index(True)]]
    ]


# Drawn masks


def test_a_drawn_mask_is_a_function_of_its_place():
    guides = Guides()
    first, again = (
        [guides.mask((72, 56), generator_at(0, "guide", epoch, 5)) for epoch in range(50)] for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({mask.numpy().tobytes() for mask in first}) > 30
    for mask in first:
        assert mask.shape == (1, 56, 72) and mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0}


def test_masks_are_drawn_as_often_as_said():
    def share(guides: Guides) -> tuple[float, float]:
        masks = [guides.mask((32, 32), generator_at(0, "guide", i)) for i in range(800)]
        return sum(bool(m.all()) for m in masks) / 800, sum(not bool(m.any()) for m in masks) / 800

    whole, nothing = share(Guides())
    assert whole == pytest.approx(0.25, abs=0.06) and nothing < 0.05
    whole, nothing = share(Guides(whole=0.1, nothing=0.5))
    assert whole == pytest.approx(0.1, abs=0.06) and nothing == pytest.approx(0.5, abs=0.08)
    assert share(Guides(whole=1.0)) == (1, 0) and share(Guides(whole=0.0, nothing=1.0)) == (0, 1)
    drawn = torch.stack([Guides(whole=0.0).mask((32, 32), generator_at(0, "guide", i)) for i in range(800)])
    assert 0.15 < float(drawn.mean()) < 0.6
    everywhere = drawn.mean(0)
    assert float(everywhere.min()) > 0.05  # no place is always left


@torch.no_grad()
def test_another_mask_is_drawn_at_each_showing_and_the_same_wherever_a_run_begins(base, files, tmp_path: Path):
    model = opened(base("sd1 mask"))
    pictures = Pictures(resolution=64, bucket_step=8, guides=Guides(whole=0.2))
    unbroken = batches(model, tmp_path, files, "sd1 mask", pictures, count=8)
    late = batches(model, tmp_path, files, "sd1 mask", pictures, count=4, start=4)
    assert len({batch.image.numpy().tobytes() for batch in unbroken}) > 4
    for one, other in zip(unbroken[4:], late, strict=True):
        assert torch.equal(one.image, other.image)


@torch.no_grad()
def test_the_picture_that_is_edited_is_left_out_as_often_as_said(base, files, tmp_path: Path):
    model = opened(base("sd1 picture"))
    pictures = Pictures(resolution=64, bucket_step=8, guides=Guides(dropout=0.3))
    shown = batches(model, tmp_path, files, "sd1 picture", pictures, count=100)
    assert 15 < sum(not bool(batch.image.any()) for batch in shown) < 45


# What does not fit is refused


def refusal(kind: str, base: Any, tmp_path: Path, guides: Path | None, **options: Any) -> str:
    (tmp_path / "p").mkdir(exist_ok=True)
    smooth(0).save(tmp_path / "p" / "it.png")
    examples = PictureFolder(path=tmp_path / "p", prompt="x", guides=guides).examples()
    model = opened(base(kind)) if kind in KINDS else opened(base)
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare(model, examples, Pictures(resolution=64, guides=Guides(**options)), Cache(tmp_path), Captions())
    return str(caught.value)


@pytest.mark.parametrize(("kind", "what"), [("sd2 depth", "depth map"), ("sd1 picture", "before the edit")])
def test_pictures_without_what_the_base_is_told_are_named(kind, what, base, tmp_path: Path):
    message = refusal(kind, base, tmp_path, None)
    assert "it.png: has no" in message and what in message and "`guides`" in message


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("plain") / "base"
    tiny.sd1().save_pretrained(place)
    return place


def test_options_and_files_that_a_base_is_not_told_are_refused(base, plain: Path, files, tmp_path: Path):
    guides = tmp_path / "guides"
    guides.mkdir()
    (guides / "it.png").write_bytes(files["mask"].read_bytes())
    assert "the base is told captions alone" in refusal("plain", plain, tmp_path, guides)
    assert "not one for inpainting" in refusal("plain", plain, tmp_path, None, whole=0.5)
    assert "does not edit" in refusal("sd1 mask", base, tmp_path, None, dropout=0.5)
    smooth(0, (40, 40)).save(guides / "it.png")
    with pytest.raises(DataError, match=r"it\.png: is not of its picture's size, 72 x 56"):
        PictureFolder(path=tmp_path / "p", prompt="x", guides=guides).examples()
    (guides / "it.png").rename(guides / "other.png")
    with pytest.raises(DataError, match=r"1 of 1 pictures have no guide, the first is it\.png"):
        PictureFolder(path=tmp_path / "p", prompt="x", guides=guides).examples()
    with pytest.raises(ValueError, match="at most 1"):
        Guides(whole=0.7, nothing=0.7)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("sd2 depth", {}, "needs a depth map"),
        ("sd1 picture", {}, "needs the picture that it edits"),
        ("sd1 picture", {"guide": "before", "image": "photo"}, r"sampling\.image: .* leave it out"),
        ("sd1 mask", {"strength": 0.5}, r"sampling\.strength: .* leave it out"),
    ],
)
def test_sampling_without_what_the_base_is_told_is_refused(kind, given, said, base, files):
    own: dict[str, Any] = {name: files[what] if isinstance(what, str) else what for name, what in given.items()}
    with pytest.raises(ConfigError, match=said):
        opened(base(kind)).sample(["x"], [0], Sampling(steps=1, **own))


@torch.no_grad()
def test_inpainting_without_a_picture_paints_all_of_one(base):
    model = opened(base("sd1 mask"))
    (picture,) = model.sample(["the red cat"], [0], Sampling(steps=2))
    whole = {"image": Image.new("RGB", (64, 64), (127, 127, 127)), "mask_image": Image.new("L", (64, 64), 255)}
    latents = model.noise(0, 64, 64)
    expected = stock(base("sd1 mask"))(
        "the red cat", **whole, latents=latents, num_inference_steps=2, guidance_scale=7.5, height=64, width=64
    ).images[0]
    assert abs(pixels(picture) - pixels(expected)).max() <= 1


# Whole runs


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_release_for_depth_has_the_bases_own_estimator(base, tmp_path: Path):
    """A stock pipeline that is given no depth map asks it for one."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    estimator = DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        )
    )  # fmt: skip
    parts = stock(base("sd2 depth")).components
    whole = diffusers.StableDiffusionDepth2ImgPipeline(
        **{
            **parts,
            "depth_estimator": estimator,
            "feature_extractor": DPTImageProcessor(size={"height": 32, "width": 32}),
        }
    )
    whole.save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    write_full(tmp_path / "model", model.pipeline(), tmp_path / "base" / "tokenizer", dtype=torch.float32)
    again = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    kept = again.depth_estimator.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in estimator.state_dict().items())
    assert again("x", image=smooth(0, (64, 64)), num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("kind", "recipe"), [("sd1 mask", "lora"), ("sdxl mask", "full"), ("sd2 depth", "full"), ("sd1 picture", "lora")]
)
def test_it_is_trained_resumed_and_released(kind, recipe, base, files, tmp_path: Path):
    runs.draw_pictures(tmp_path / "pictures")
    (tmp_path / "guides").mkdir()
    for file in (tmp_path / "pictures").glob("*.png"):
        with Image.open(file) as picture:
            smooth(int(file.stem), picture.size).save(tmp_path / "guides" / file.name)
    guides = "" if "mask" in kind else f",guides='{tmp_path / 'guides'}'"
    sampling, arguments = told(kind, files)
    said = {"image": sampling.image, "guide": sampling.guide}
    own = "".join(f",{name}='{path}'" for name, path in said.items() if path is not None)
    own += f",strength={sampling.strength}" if sampling.strength else ""
    preview = (
        "{type='previews',prompts=['the red cat'],every=999,seeds=[3],"
        f"sampling={{width=72,height=56,steps=3,guidance=4.0{own}}}}}"
    )
    module = importlib.import_module(f"recipes.{recipe}")

    def train(output: Path, *more: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = [
            f"run.output='{output}'", f"run.cache='{tmp_path / 'cache'}'", f"model.base='{base(kind)}'",
            f"data=[{{type='folder',path='{tmp_path / 'pictures'}'{guides}}}]", "pictures.flip=true",
            "run.precision='fp32'", "run.batch_size=4", "run.micro_batch=3", "run.checkpoint_every=8", "run.keep=9",
            f"optimizer={{type='adamw',lr={1e-2 if recipe == 'lora' else 1e-3}}}",
            f"observers=[{preview},{{type='validation',every=8,pictures=2,levels=2}},"
            "{type='forgetting',every=8,levels=2,prompts=['the dog']}]", *more,
        ]  # fmt: skip
        assert run_command(module.Config, module.main, argv) == 0
        AcceleratorState._reset_state(reset_partial_state=True)

    train(tmp_path / "whole", "run.updates=4")
    train(tmp_path / "parts", "run.updates=2")
    train(tmp_path / "parts", "run.updates=4")
    assert runs.digests(tmp_path / "whole") == runs.digests(tmp_path / "parts")
    whole, parts = (
        [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "forgetting"]
        for name in ("whole", "parts")
    )
    assert whole == parts and [row["samples_seen"] for row in whole] == [8, 16] and whole[-1]["distance"] > 0
    untrained = stock(base(kind))("the red cat", **arguments).images[0]
    _, arguments = told(kind, files)
    pipeline = stock(base(kind)) if recipe == "lora" else stock(tmp_path / "whole" / "model")
    if recipe == "lora":
        pipeline.load_lora_weights(tmp_path / "whole" / "lora", weight_name="model-diffusers.safetensors")
    drawn = pixels(pipeline("the red cat", **arguments).images[0])
    with Image.open(sorted((tmp_path / "whole").glob("samples/*/000.png"))[-1]) as last:
        shown = pixels(last)
    assert abs(drawn - shown).max() <= 3
    assert abs(shown - pixels(untrained)).max() > 5
