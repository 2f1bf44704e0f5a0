"""What validation is worth on the embedded base: its spread beside that of random times, at equal cost."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from tuner.data.buckets import centre_crop
from tuner.data.images import load_picture, to_pixels
from tuner.data.sources.folder import PictureFolder
from tuner.diffusion.batch import Batch
from tuner.diffusion.objective import Objective
from tuner.families.source import EMBEDDED, BaseModel
from tuner.rng import Position
from tuner.training.observers import validation
from tuner.training.observers.validation import ValidationWatcher

ROOT = Path(__file__).parents[1]
PICTURES, LEVELS, DRAWS = 4, 8, 16


@torch.no_grad()
def test_fixed_levels_estimate_the_loss_at_least_five_times_as_closely_as_random_times(monkeypatch):
    assert (EMBEDDED / "pocket").is_dir()
    model = BaseModel(base="pocket").open(torch.device("cpu"))
    examples = PictureFolder(path=ROOT / "examples" / "demo" / "held-out").examples()[:PICTURES]
    captions = [example.caption for example in examples]
    pixels = [to_pixels(load_picture(e.image, "white"), centre_crop(e.size, (64, 64)), flip=False) for e in examples]
    latents = [model.encode_images(each[None]).mean[0] for each in pixels]
    texts = [model.encode_text([caption]) for caption in captions]
    frames = torch.zeros(PICTURES, 6)
    watcher = ValidationWatcher(
        scene=cast(Any, SimpleNamespace(accelerator=SimpleNamespace(process_index=0, num_processes=1), model=model)),
        kind="validation", every=1, levels=LEVELS, timesteps=model.timesteps, latents=latents, captions=captions,
        frames=frames, texts=texts, guides=lambda index: None, sources=["x"] * PICTURES, buckets=["x"] * PICTURES,
        measured="",
    )  # fmt: skip
    ours: list[float] = []
    random: list[float] = []
    for draw in range(DRAWS):
        monkeypatch.setattr(validation, "SEED", draw)  # another noise each time, at the same levels
        ours.append(float(watcher.losses().mean()))
        losses = [
            Objective()
            .loss(
                model,
                Batch(
                    latents=latents[i].expand(LEVELS, -1, -1, -1),
                    captions=[captions[i]] * LEVELS,
                    conditioning=texts[i].each(lambda part: part.expand(LEVELS, *part.shape[1:])),
                    weight=torch.ones(LEVELS),
                    positions=[Position(draw, level, i) for level in range(LEVELS)],
                ),
            )
            .plain.mean()
            for i in range(PICTURES)
        ]
        random.append(float(torch.stack(losses).mean()))
    spread = [float(torch.tensor(values).std()) for values in (ours, random)]
    print(f"standard deviation {spread[0]:.5f}, with random times {spread[1]:.5f}: {spread[1] / spread[0]:.1f} times")
    assert spread[1] >= 5 * spread[0]
