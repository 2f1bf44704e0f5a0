"""diffusers and nothing else, to compare opened models with."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor

from tuner.diffusion.batch import Batch
from tuner.families.source import BaseModel
from tuner.rng import Position

CPU = torch.device("cpu")
FRAMES = [[1023, 1365, 7, 13, 64, 72], [600, 800, 0, 0, 64, 72]]
"""Of the pictures of `fixed_batch`; bfloat16 has neither 1023 nor 1365."""


def opened(folder: Path, **settings: Any) -> Any:
    """The folder as this project opens it."""
    return BaseModel(base=str(folder), **settings).open(CPU)


def stock(folder: Path) -> Any:
    """The pipeline that the folder says it is, in float32, sampled by DDIM."""
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    safe = {"safety_checker": None} if kind.__name__.startswith("StableDiffusionP") else {}
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32, **safe)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fixed_batch(**more: Any) -> tuple[Batch, Tensor, Tensor]:
    """Two examples, the noise that they get, and times."""
    positions = [Position(0, 0, 0), Position(0, 0, 1)]
    batch = Batch(
        latents=torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0)),
        captions=["the red cat", "a robot"],
        conditioning=None,
        weight=torch.ones(2),
        positions=positions,
        frame=torch.tensor(FRAMES, dtype=torch.float32),
        **more,
    )
    noise = torch.stack([torch.randn(4, 8, 9, generator=at.generator("noise")) for at in positions])
    return batch, noise, torch.tensor([10, 700])


def pixels(picture: Image.Image) -> np.ndarray:
    """0 to 255, signed."""
    return np.asarray(picture.convert("RGB")).astype(int)
