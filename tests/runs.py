"""Runs of the real recipes over a tiny base and a handful of pictures, in this process."""

import hashlib
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuner.config.command_line import run as run_command

SIZES = [(64, 64), (80, 60), (60, 80), (64, 64), (90, 60), (70, 70), (64, 90)]
"""Of the pictures: several buckets, none of which fills a batch of four evenly."""
COMMON = (
    "run.batch_size=4",
    "run.micro_batch=3",
    "run.precision='fp32'",
    "run.ema=0.95",
    "run.checkpoint_every=8",
    "pictures.flip=true",
    "captions.dropout=0.3",
    "objective={weighting={type='min_snr'},noise={type='offset'}}",
    "learning_rate={type='cosine',warmup=2}",
    "optimizer={type='adamw',lr=1e-3}",
)
"""Everything on that could disturb a run: chance, averages, a rate that changes, micro-batches and their tails."""
METHODS = {
    "lora": ("method={rank=4,conv_rank=2,text_encoder=true,text_encoder_lr=3e-4}",),
    "full": ("method={text_encoder=true}",),
}
"""Arguments by recipe."""


@dataclass(frozen=True)
class Ground:
    """A folder with a base, pictures and a cache, in which runs are made."""

    folder: Path

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def arguments(self, output: Path, *more: str) -> list[str]:
        """A whole config as arguments; later ones go over earlier ones."""
        return [
            f"run.output='{output}'",
            f"run.cache='{self.folder / 'cache'}'",
            f"model.base='{self.folder / 'base'}'",
            f"data=[{{type='folder',path='{self.pictures}'}}]",
            *more,
        ]

    def run(self, recipe: str, output: Path, *more: str) -> int:
        """A run in this process, with every nuisance on; its exit code."""
        module = importlib.import_module(f"recipes.{recipe}")
        arguments = self.arguments(output, *COMMON, *METHODS[recipe], *more)
        try:
            return run_command(module.Config, module.main, arguments, check=module.check)
        except SystemExit as end:
            return int(end.code or 0)


def make(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Ground:
    """The base and the pictures, the same ones for a seed."""
    from tests import tiny

    pipeline = tiny.sd1(seed)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    pipeline.save_pretrained(folder / "base")
    ground = Ground(folder)
    draw_pictures(ground.pictures, seed)
    return ground


def draw_pictures(folder: Path, seed: int = 0) -> None:
    """Pictures with captions, the same ones for a seed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index, (width, height) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"the red cat at {index}")


def places(output: Path) -> list[int]:
    """Where the checkpoints of a run are."""
    return sorted(int(path.name.removeprefix("samples-")) for path in (output / "checkpoints").glob("samples-*"))


def digests(output: Path, place: int | None = None) -> dict[str, Any]:
    """SHA-256 of weights, optimizer and average at a checkpoint, and what else decides how a run goes on."""
    folder = output / "checkpoints" / f"samples-{place or places(output)[-1]:010d}"
    state = json.loads((folder / "state.json").read_text())
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
    assert files.keys() >= {"trainable.safetensors", "optimizer.safetensors"}
    return {**files, **{key: state.get(key) for key in ("samples_seen", "optimizer", "ema_updates", "scaler")}}


def updates(output: Path) -> list[dict[str, Any]]:
    """What the metrics say of each update, but for the time that it took."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["kind"] == "update"]


def environment(**more: str) -> dict[str, str]:
    """For runs in processes of their own: this checkout's code, as many threads as here, no launcher's words."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PYTEST_"))}
    own = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return {**inherited, **own, "HF_HUB_OFFLINE": "1", **more}
