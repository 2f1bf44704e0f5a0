"""What a run leaves behind gives, in a stock pipeline, the pictures of the model that was trained."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests import runs
from tuner.config.command_line import run as run_command
from tuner.training.checkpoint import Checkpoints
from tuner.weights.adapters.file import read_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.modules import Modules
from tuner.weights.lora import LoraWeights

PROMPTS, SEEDS = ("the red cat", "a robot, blue"), (1, 2)
PREVIEWS = (
    "observers=[{type='previews',prompts=['the red cat','a robot, blue'],seeds=[1,2],sampling={steps=4},every=99}]"
)
LORA = "method={rank=4,alpha=2,conv_rank=2,conv_alpha=3,text_encoder=true,ranks={'attn1.to_k$'=1},alphas={'to_v$'=0.5}}"
COMMON = ("run.batch_size=4", "captions.dropout=0.2", "pictures.flip=true", PREVIEWS)
KINDS = {
    "lora": ("lora", LORA, "optimizer={type='adamw',lr=2e-2}", "run.updates=8"),
    "lora with an average": ("lora", LORA, "optimizer={type='adamw',lr=2e-2}", "run.updates=8", "run.ema=0.9"),
    "full": ("full", "method={text_encoder=true}", "optimizer={type='adamw',lr=1e-3}", "run.updates=5"),
    "full with an average": (
        "full",
        "method={text_encoder=true}",
        "optimizer={type='adamw',lr=1e-3}",
        "run.updates=5",
        "run.ema=0.9",
    ),
}


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def stock(folder: Path) -> StableDiffusionPipeline:
    """diffusers and nothing else."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: StableDiffusionPipeline) -> list[np.ndarray]:
    """The pictures that previews show, prompt by prompt and seed by seed."""
    return [
        pixels(pipeline(prompt, num_inference_steps=4, latents=noise(seed)).images[0])
        for prompt in PROMPTS
        for seed in SEEDS
    ]


def noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def previews(output: Path, at: int) -> list[np.ndarray]:
    files = sorted((output / "samples" / f"samples-{at:010d}").glob("*.png"))
    assert len(files) == 4
    return [pixels(Image.open(file)) for file in files]


def largest(one: list[np.ndarray], other: list[np.ndarray]) -> int:
    return max(int(abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def trained(ground: runs.Ground, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The output of a run of each kind."""
    made: dict[str, Path] = {}

    def train(kind: str, *more: str) -> Path:
        name = " ".join((kind, *more))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("trained") / "run"
            recipe, *settings = KINDS[kind]
            module = importlib.import_module(f"recipes.{recipe}")
            arguments = ground.arguments(
                made[name], *COMMON, "run.precision='fp32'", *settings, "run.name='cat'", *more
            )
            assert run_command(module.Config, module.main, arguments) == 0
        return made[name]

    return train


@pytest.fixture(scope="module")
def untrained(ground: runs.Ground) -> list[np.ndarray]:
    return drawn(stock(ground.folder / "base"))


@pytest.mark.parametrize("kind", ["lora", "lora with an average"])
@pytest.mark.parametrize("file", ["cat-diffusers.safetensors", "cat.safetensors"])
def test_a_lora_gives_the_trained_models_pictures(kind, file, trained, ground, untrained):
    output = trained(kind)
    pipeline = stock(ground.folder / "base")
    pipeline.load_lora_weights(output / "lora", weight_name=file)
    pictures = drawn(pipeline)
    expected = previews(output, at=32)
    assert largest(pictures, expected) <= 2
    assert largest(untrained, expected) > 20
    assert largest(previews(output, at=0), untrained) <= 1  # before the first update it is the base


def weights_of(output: Path, part: str) -> dict[str, Tensor]:
    checkpoint, _ = Checkpoints(folder=output / "checkpoints", keep=2).newest()
    assert checkpoint is not None
    return checkpoint.tensors(part)


def read(file: Path, layers: dict[str, Any]) -> dict[str, LowRank]:
    changes = read_adapters(file, Modules(tuple(layers))).changes
    return {name.removesuffix(".weight"): change for name, change in changes.items() if isinstance(change, LowRank)}


@pytest.mark.parametrize("kind", ["lora", "lora with an average"])
def test_both_files_hold_the_updates_that_were_learned(kind, trained, ground):
    output = trained(kind)
    learned = weights_of(output, "ema" if "average" in kind else "trainable")
    scales = {
        name: 0.5 if name.endswith("to_v") else alpha
        for name in {name.rsplit(".lora_", 1)[0] for name in learned}
        for alpha in [
            1.0 if name.endswith("attn1.to_k") else 3.0 if learned[f"{name}.lora_A.weight"].shape[2:] == (3, 3) else 2.0
        ]
    }
    lora = LoraWeights(learned, scales)
    pipeline = stock(ground.folder / "base")
    layers = {
        f"{prefix}{name}": layer
        for prefix, network in (("unet.", pipeline.unet), ("text_encoder.text_model.", pipeline.text_encoder))
        for name, layer in network.named_modules()
    }
    for file in ("cat.safetensors", "cat-diffusers.safetensors"):
        found = read(output / "lora" / file, layers)
        assert set(found) == set(scales)
        for module in scales:
            expected = lora.delta(module).flatten(1)
            assert float((found[module].dense() - expected).norm() / expected.norm()) < 1e-3, module
    kinds = {name.split(".")[0] for name in scales}
    assert kinds == {"unet", "text_encoder"} and any(learned[f"{n}.lora_A.weight"].ndim == 4 for n in scales)


def test_with_an_average_the_files_hold_it_and_not_the_last_weights(trained):
    output = trained("lora with an average")
    average, last = weights_of(output, "ema"), weights_of(output, "trainable")
    name = next(name for name in average if name.endswith("attn1.to_q.lora_B.weight"))
    written = load_file(output / "lora" / "cat-diffusers.safetensors")[name] / (2 / 4)  # alpha / rank is folded in
    assert torch.allclose(written, average[name].half().to(written), rtol=1e-2, atol=1e-6)
    assert not torch.allclose(written, last[name].to(written), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "full with an average"])
def test_a_full_fine_tunes_folder_gives_the_trained_models_pictures(kind, trained, untrained):
    output = trained(kind)
    expected = previews(output, at=20)
    assert largest(drawn(stock(output / "model")), expected) <= 2
    assert largest(untrained, expected) > 20
    learned = weights_of(output, "ema" if "average" in kind else "trainable")
    found = load_file(output / "model" / "text_encoder" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, learned[f"text_encoder.{name}"].half())
    unet = load_file(output / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, learned[f"unet.{name}"].half()) for name, tensor in unet.items())


@pytest.fixture
def another_precision():
    """A process has one; a test's is not the next one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_a_run_does_not_train_is_released_as_the_base_has_it(trained, ground, another_precision):
    """Also where the run itself computes in half precision."""
    output = trained("full", "run.precision='bf16'", "method={text_encoder=false}", "observers=[]")
    for component in ("text_encoder", "vae"):
        (file,) = (ground.folder / "base" / component).glob("*.safetensors")
        was = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
        found = load_file(output / "model" / component / file.name)
        assert {name.removeprefix("text_model.") for name in found} == was.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, was[name.removeprefix("text_model.")].half()), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_it_made_and_from_what(kind, trained):
    output = trained(kind)
    release = json.loads((output / "release.json").read_text())
    assert release["name"] == "cat" and release["images"] == len(runs.SIZES)
    assert release["samples"] == 4 * release["updates"] and release["base"] == "unknown/local"
    assert [picture["prompt"] for picture in release["pictures"]] == [p for p in PROMPTS for _ in SEEDS]
    for picture in release["pictures"]:
        assert (output / picture["file"]).is_file()
    assert (output / release["grid"]).is_file()
    assert "/" not in json.dumps(release["settings"]).replace("samples/", "")  # no path of this machine
