"""The pictures that the two fine-tunes learn, and how well a model knows them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tuner.data.buckets import centre_crop
from tuner.data.images import to_pixels
from tuner.diffusion.batch import Batch
from tuner.diffusion.objective import Objective
from tuner.families.base import OpenedModel
from tuner.rng import Position

RED = np.array([1.0, 0.35, 0.3])
LEVELS = 8


def recoloured(source: Path, target: Path, colour: str) -> None:
    """Copy the pictures in `source`; with the colour `red`, what is light and has no colour of its own becomes red."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.png")):
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(np.float64)
        if colour == "red":
            grey = (pixels.max(2) - pixels.min(2) < 60) & (pixels.mean(2) > 120)
            pixels[grey] *= RED
        Image.fromarray(pixels.round().astype(np.uint8)).save(target / file.name)


@torch.no_grad()
def loss(model: OpenedModel, pictures: Path, prompt: str) -> float:
    """The mean loss on pictures at evenly spread times, with noise that is the same for every model."""
    files: Sequence[Path] = sorted(pictures.glob("*.png"))
    steps = model.schedule.steps
    times = torch.tensor([(2 * level + 1) * steps // (2 * LEVELS) for level in range(LEVELS)])
    total = 0.0
    for index, file in enumerate(files):
        picture = Image.open(file).convert("RGB")
        pixels = to_pixels(picture, centre_crop(picture.size, (model.resolution, model.resolution)), flip=False)
        latents = model.encode_images(pixels[None]).mean.expand(LEVELS, -1, -1, -1)
        positions = [Position(seed=0, epoch=level, sample=index) for level in range(LEVELS)]
        batch = Batch(
            latents=latents,
            captions=[prompt] * LEVELS,
            conditioning=None,
            weight=torch.ones(LEVELS),
            positions=positions,
        )
        total += Objective().loss(model, batch, times).plain.mean().item()
    return total / len(files)
