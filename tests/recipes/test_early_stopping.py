"""A run that is far too long, and patience with held-out pictures that ends it near its best."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import runs
from tuner.config.command_line import run as run_command
from tuner.training.run import Run
from tuner.training.trainer import Trainer


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    folder = tmp_path / "held out"
    folder.mkdir()
    for index in range(3):
        values = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"the red cat at {index}")
    return folder


def test_patience_ends_an_over_long_run_near_its_best_and_publishes_that(ground, held_out, tmp_path, monkeypatch):
    """The rate rises until it undoes what was learned, so that few updates are too many."""
    published: list[dict[str, torch.Tensor]] = []

    def outcome(run: Run, trainer: Trainer, *_: Any, **__: Any) -> None:
        with trainer.final_weights():
            published.append({name: tensor.clone() for name, tensor in trainer.trainable.state().items()})

    monkeypatch.setattr("tuner.training.recipe.write_outcome", outcome)
    module: Any = importlib.import_module("recipes.full")

    def train(name: str, *options: str) -> list[dict[str, Any]]:
        watch = ["type='validation'", "every=8", "levels=2", f"data=[{{type='folder',path='{held_out}'}}]", *options]
        settings = [
            *("run.updates=20", "run.batch_size=4", "run.precision='fp32'", "run.checkpoint_every=8", "run.keep=99"),
            *("optimizer={type='adamw',lr=0.05}", "learning_rate={type='linear',warmup=20}"),
            f"observers=[{{{','.join(watch)}}}]",
        ]
        assert run_command(module.Config, module.main, ground.arguments(tmp_path / name, *settings)) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == "validation"]

    long, patient = train("long"), train("patient", "patience=3", "best=true")
    losses = [row["loss"] for row in long]
    best = losses.index(min(losses))
    assert 0 < best < len(long) - 4 and losses[-1] > 1.2 * losses[best]  # it is over-long
    assert [row["by_picture"] for row in patient] == [row["by_picture"] for row in long[: best + 4]]
    assert min(row["loss"] for row in patient) == losses[best]
    place = tmp_path / "long" / "checkpoints" / f"samples-{long[best]['samples_seen']:010d}"
    weights = load_file(place / "trainable.safetensors")
    assert published[1].keys() == weights.keys()
    assert all(torch.equal(published[1][name], tensor) for name, tensor in weights.items())
    assert runs.places(tmp_path / "patient")[-1] == long[best + 3]["samples_seen"] < 80
