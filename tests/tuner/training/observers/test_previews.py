"""Previews: what a stock pipeline makes of the networks in training, as a grid that grows."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import runs
from tuner.config.command_line import run as run_command
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.training.observers.previews import LABEL, MARGIN, Previews, grid, wrapped

OBSERVER = "observers=[{type='previews',prompts=['the red cat','a robot'],seeds=[0,5],every=8,sampling={steps=2}}]"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> runs.Ground:
    return runs.make(tmp_path_factory.mktemp("ground"))


@pytest.fixture(autouse=True)
def no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)


def train(ground: runs.Ground, output: Path, *settings: str) -> None:
    module: Any = importlib.import_module("recipes.lora")
    common = ("run.batch_size=4", "run.precision='fp32'", "optimizer={type='adamw',lr=1e-2}")
    assert run_command(module.Config, module.main, ground.arguments(output, *common, *settings)) == 0


def contents(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in sorted(output.glob("samples/*/*.png"))}


def test_there_is_a_row_before_the_first_update_every_so_often_and_at_the_end(ground, tmp_path):
    train(ground, tmp_path, "run.updates=3", OBSERVER)
    found = contents(tmp_path)
    assert list(found) == [f"samples/samples-{at:010d}/{k:03d}.png" for at in (0, 8, 12) for k in range(4)]
    model = BaseModel(base=str(ground.folder / "base")).open(torch.device("cpu"))
    expected = model.sample(["the red cat"] * 2 + ["a robot"] * 2, [0, 5, 0, 5], Sampling(steps=2))
    for index, picture in enumerate(expected):
        with Image.open(tmp_path / "samples" / "samples-0000000000" / f"{index:03d}.png") as first:
            assert abs(np.asarray(first).astype(int) - np.asarray(picture).astype(int)).max() <= 1
    with Image.open(tmp_path / "samples" / "grid.png") as sheet:
        assert sheet.height == LABEL + MARGIN + 3 * (64 + MARGIN) and sheet.width > 4 * 64


def test_a_resumed_run_shows_what_the_unbroken_one_shows(ground, tmp_path):
    train(ground, tmp_path / "whole", "run.updates=4", OBSERVER, "run.ema=0.9")
    train(ground, tmp_path / "broken", "run.updates=3", OBSERVER, "run.ema=0.9")
    train(ground, tmp_path / "broken", "run.updates=4", OBSERVER, "run.ema=0.9")
    whole, broken = contents(tmp_path / "whole"), contents(tmp_path / "broken")
    assert {name: broken[name] for name in whole} == whole  # and one row more, from the first end


def test_rows_of_a_course_that_the_run_has_left_are_not_taken_for_its_own(ground, tmp_path):
    train(ground, tmp_path / "whole", "run.updates=3", OBSERVER)
    output = tmp_path / "anew"
    for at, count in ((0, 9), (12, 4), (20, 4)):  # of a run in the same folder that has left no checkpoint
        folder = output / "samples" / f"samples-{at:010d}"
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (64, 64), "red").save(folder / f"{index:03d}.png")
    train(ground, output, "run.updates=3", OBSERVER)
    assert contents(output) == contents(tmp_path / "whole")


def test_a_row_that_a_kill_after_the_checkpoint_left_out_is_made_up_for(ground, tmp_path):
    train(ground, tmp_path, "run.updates=2", OBSERVER)
    whole = contents(tmp_path)
    shutil.rmtree(tmp_path / "samples" / "samples-0000000008")
    train(ground, tmp_path, "run.updates=3", OBSERVER)
    assert {name: contents(tmp_path)[name] for name in whole} == whole


def test_watching_changes_nothing_of_what_is_learned(ground, tmp_path):
    settings = ("run.updates=3", "run.ema=0.9", "captions.dropout=0.3", "pictures.flip=true")
    train(ground, tmp_path / "watched", *settings, OBSERVER)
    train(ground, tmp_path / "alone", *settings)
    assert runs.digests(tmp_path / "watched") == runs.digests(tmp_path / "alone")


def test_a_grid_puts_each_picture_in_its_place():
    colours = [["red", "lime"], ["blue", "black"], ["yellow", "cyan"]]
    rows = [(str(10**r), [Image.new("RGB", (20, 10), c) for c in row]) for r, row in enumerate(colours)]
    sheet = grid(rows, ["a title that is far too long for a column", "short"])
    left, head = sheet.width - 2 * (20 + MARGIN), sheet.height - MARGIN - 3 * (10 + MARGIN)
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            centre = (left + c * (20 + MARGIN) + 10, head + MARGIN + r * (10 + MARGIN) + 5)
            assert sheet.getpixel(centre) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))


def test_a_title_is_shown_whole_in_lines_of_its_column():
    for text in ("a penguin on a green background", "short", "oneverylongwordthatfitsnowhere at all", ""):
        lines = wrapped(text, 10, len)
        assert all(len(line) <= 10 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrapped("a penguin on a green background", 10, len) == ["a penguin", "on a green", "background"]


@pytest.mark.parametrize("wrong", [{"prompts": ()}, {"prompts": ("a",), "seeds": ()}, {"prompts": ("a",), "every": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError):
        Previews(**wrong)
