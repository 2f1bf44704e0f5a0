"""The validation loss: on pictures, noise and times that never change, so that it falls only where the model learns."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import runs
from tuner.config.command_line import run as run_command
from tuner.diffusion.batch import Batch, Conditioning
from tuner.diffusion.objective import Objective
from tuner.diffusion.timesteps.shifted_by_size import ShiftedBySize
from tuner.diffusion.timesteps.uniform import Uniform
from tuner.families.source import BaseModel
from tuner.rng import Position
from tuner.training.observers.validation import SEED
from tuner.training.run import Run
from tuner.training.trainer import Trainer


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> runs.Ground:
    return runs.make(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held out")
    for index in range(3):
        values = np.random.default_rng(index + 50).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a thing never seen, {index}")
    return folder


@pytest.fixture(autouse=True)
def no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)


def train(ground: runs.Ground, output: Path, recipe: str, *settings: str) -> list[dict[str, Any]]:
    """A run's lines of metrics."""
    module: Any = importlib.import_module(f"recipes.{recipe}")
    common = ("run.batch_size=4", "run.precision='fp32'", "optimizer={type='adamw',lr=1e-3}")
    assert run_command(module.Config, module.main, ground.arguments(output, *common, *settings)) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "validation"]


def observer(folder: Path, every: int = 8, levels: int = 4) -> str:
    return f"observers=[{{type='validation',every={every},levels={levels},data=[{{type='folder',path='{folder}'}}]}}]"


@torch.no_grad()
def by_hand(ground: runs.Ground, folder: Path, levels: int) -> dict[str, float]:
    """The base's mean squared error at the middle of each part of the schedule."""
    model = BaseModel(base=str(ground.folder / "base")).open(torch.device("cpu"))
    found = {}
    for level in range(levels):
        t = int((level + 0.5) * 1000 / levels)
        losses = []
        for index, file in enumerate(sorted(folder.glob("*.png"))):
            with Image.open(file) as picture:
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
            batch = Batch(
                latents=model.encode_images(pixels).mean,
                captions=[],
                conditioning=Conditioning(tokens=model.encode_text([file.with_suffix(".txt").read_text()]).tokens),
                weight=torch.ones(1),
                positions=[Position(SEED, level, index)],
            )
            losses.append(float(Objective().loss(model, batch, torch.tensor([t])).plain))
        found[str(t)] = sum(losses) / len(losses)
    return found


@pytest.mark.parametrize("method", ["{rank=4}", "{rank=4,text_encoder=true}"], ids=["denoiser", "and text encoder"])
def test_it_begins_with_the_bases_loss_at_each_noise_level(method, ground, held_out, tmp_path):
    rows = measured(train(ground, tmp_path, "lora", f"method={method}", "run.updates=5", observer(held_out)))
    assert [row["samples_seen"] for row in rows] == [0, 8, 16, 20]  # before, every 8, at the end
    expected = by_hand(ground, held_out, 4)
    assert list(rows[0]["by_time"]) == ["125", "375", "625", "875"] and rows[0]["pictures"] == 3
    assert rows[0]["by_time"] == pytest.approx(expected, rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(sum(expected.values()) / 4, rel=1e-4)
    assert rows[-1]["loss"] != rows[0]["loss"]


def test_it_does_not_depend_on_what_else_the_run_does(ground, held_out, tmp_path):
    first = measured(train(ground, tmp_path / "1", "lora", "run.updates=1", observer(held_out)))[0]
    other = train(
        ground, tmp_path / "2", "lora", "run.updates=1", observer(held_out), "run.seed=9", "captions.dropout=1.0",
        "run.batch_size=2", "pictures={flip=true}", "objective={weighting={type='min_snr'},noise={type='offset'}}",
    )  # fmt: skip
    assert measured(other)[0]["by_time"] == first["by_time"]


def test_watching_changes_nothing_of_what_is_learned(ground, held_out, tmp_path):
    settings = ("run.updates=3", "run.ema=0.9", "captions.dropout=0.3", "pictures.flip=true")
    train(ground, tmp_path / "watched", "lora", *settings, observer(held_out, every=4))
    train(ground, tmp_path / "alone", "lora", *settings)
    watched, alone = (runs.digests(tmp_path / name) for name in ("watched", "alone"))
    assert watched == alone


def test_it_measures_the_average_where_there_is_one(ground, held_out, tmp_path):
    settings = (
        "run.updates=4",
        "optimizer={type='adamw',lr=1e-2}",
        "method={text_encoder=true}",
        observer(held_out, 99),
    )
    plain = measured(train(ground, tmp_path / "plain", "full", *settings))
    average = measured(train(ground, tmp_path / "average", "full", *settings, "run.ema=0.9999"))
    assert average[0]["loss"] == plain[0]["loss"] and average[-1]["loss"] != plain[-1]["loss"]


def test_a_text_encoder_that_learns_leaves_nothing_in_the_cache_that_others_would_take_for_the_bases(
    ground, held_out, tmp_path
):
    """A resumed run has other weights than the base when its validation begins."""
    shared, fresh = (f"run.cache='{tmp_path / name}'" for name in ("shared", "fresh"))
    learning = ("method={text_encoder=true}", "optimizer={type='adamw',lr=1e-2}", shared)
    train(ground, tmp_path / "first", "full", *learning, "run.updates=2")
    train(ground, tmp_path / "first", "full", *learning, "run.updates=3", observer(held_out))

    data = f"data=[{{type='folder',path='{held_out}'}}]"
    rows = [train(ground, tmp_path / n, "lora", "run.updates=2", data, c) for n, c in (("2", shared), ("3", fresh))]
    losses = [[row["loss"] for row in run if row["kind"] == "update"] for run in rows]
    assert losses[0] == losses[1]


def test_pictures_are_chosen_evenly_where_they_are_too_many(ground, tmp_path):
    rows = measured(train(ground, tmp_path, "lora", "run.updates=1", "observers=[{type='validation',pictures=3}]"))
    assert rows[0]["pictures"] == 3


def test_the_noise_levels_are_the_middles_of_equally_likely_parts_of_what_training_draws(ground, held_out, tmp_path):
    times = "objective={timesteps={type='uniform',start=0.4,end=0.8}}"
    rows = measured(train(ground, tmp_path, "lora", "run.updates=1", times, observer(held_out)))
    assert list(rows[0]["by_time"]) == ["450", "550", "650", "750"]


def test_levels_that_go_by_a_pictures_size_are_named_by_their_own_times(ground, held_out, tmp_path):
    times = "objective={timesteps={type='shifted_by_size',base=0.0,max=9.6,of={type='uniform'}}}"
    settings = ("run.updates=1", "pictures.resolution=128", times, observer(held_out, levels=2))
    rows = measured(train(ground, tmp_path, "lora", *settings))
    latents = (16, 16)
    shares = ShiftedBySize(base=0.0, max=9.6, of=Uniform()).quantile(torch.tensor([0.25, 0.75]).double(), latents)
    assert list(rows[0]["by_time"]) == [f"{int(share * 1000)}" for share in shares]


def test_a_measurement_that_a_kill_after_the_checkpoint_left_out_is_made_up_for(ground, held_out, tmp_path):
    whole = measured(train(ground, tmp_path / "whole", "lora", "run.updates=3", observer(held_out)))
    train(ground, tmp_path / "killed", "lora", "run.updates=2", observer(held_out))
    file = tmp_path / "killed" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "validation"
    file.write_text("".join(lines[:-1]))
    assert measured(train(ground, tmp_path / "killed", "lora", "run.updates=3", observer(held_out))) == whole


@pytest.mark.parametrize("other", ["levels", "pictures"])
def test_what_was_not_measured_before_is_compared_with_its_own_first_measurement(other, ground, held_out, tmp_path):
    output = tmp_path / "run"
    train(ground, output, "lora", "run.updates=2", observer(held_out))
    if other == "pictures":
        turned = tmp_path / "turned"
        turned.mkdir()
        for index in range(3):
            (turned / f"{index}.png").write_bytes((held_out / f"{2 - index}.png").read_bytes())
            (turned / f"{index}.txt").write_text("a thing")
        watched = observer(turned)
    else:
        watched = observer(held_out, levels=6)
    row = measured(train(ground, output, "lora", "run.updates=3", watched))
    assert [each["samples_seen"] for each in row] == [0, 8, 8, 12]
    first, last = (np.array(each["by_picture"]) for each in row[-2:])
    assert row[-1]["change"] == pytest.approx((last - first).mean(), abs=1e-12)
    assert row[-1]["change_since"] == 8 and row[-1]["best_at"] in (8, 12)


def test_means_margins_and_parts_are_those_of_the_single_pictures(ground, held_out, tmp_path):
    rows = measured(train(ground, tmp_path, "lora", "run.updates=4", observer(held_out)))
    first = np.array(rows[0]["by_picture"])
    for row in rows:
        losses = np.array(row["by_picture"])
        assert row["loss"] == pytest.approx(losses.mean())
        assert row["loss_95"] == pytest.approx(1.96 * losses.std(ddof=1) / 3**0.5, rel=1e-3)
        assert row["change"] == pytest.approx((losses - first).mean(), abs=1e-12)
        assert row["change_95"] == pytest.approx(1.96 * (losses - first).std(ddof=1) / 3**0.5, rel=1e-3, abs=1e-12)
        assert row["by_source"] == {"data": pytest.approx(row["loss"])}
        assert row["by_bucket"] == {"64x64": pytest.approx(row["loss"])}
        assert sum(row["by_time"].values()) / 4 == pytest.approx(row["loss"])


def kept(every: int, *more: str) -> str:
    return f"observers=[{{type='validation',every={every},levels=2,share=0.4{''.join(f',{each}' for each in more)}}}]"


def test_a_share_of_the_pictures_is_held_out_and_not_trained_on(ground, tmp_path, monkeypatch, capsys):
    trained: list[set[str]] = []
    encode = Run.encode

    def encoding(self: Run, model: Any, examples: Any, *arguments: Any, **more: Any) -> Any:
        trained.append({example.image.name for example in examples})
        return encode(self, model, examples, *arguments, **more)

    monkeypatch.setattr(Run, "encode", encoding)
    rows = measured(train(ground, tmp_path, "lora", "run.updates=1", kept(99)))
    everything = {file.name for file in ground.pictures.glob("*.png")}
    out = rows[0]["pictures"]
    assert len(trained[0]) == len(everything) - out and 0 < out < len(everything)
    assert f"{out} of {len(everything)} pictures are held out" in capsys.readouterr().out


def test_a_run_that_gets_no_better_ends_and_stays_ended(ground, held_out, tmp_path, capsys):
    data = f"data=[{{type='folder',path='{held_out}'}}]"
    patient = f"observers=[{{type='validation',every=4,levels=2,{data},patience=2}}]"
    settings = ("run.updates=40", "optimizer={type='adamw',lr=1.0}", "run.checkpoint_every=8", patient)
    rows = train(ground, tmp_path, "lora", *settings)
    losses = [row["loss"] for row in measured(rows)]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3 < 20  # two more after the best, and no third
    assert "ended at" in (said := capsys.readouterr().out) and f"best at {measured(rows)[-1]['best_at']}" in said
    again = train(ground, tmp_path, "lora", *settings)
    assert [row for row in again if row["kind"] == "update"] == [row for row in rows if row["kind"] == "update"]


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_the_weights_of_the_best_measurement_are_published(recipe, ground, held_out, tmp_path, monkeypatch):
    found: dict[str, Any] = {}

    def outcome(run: Run, trainer: Trainer, *_: Any, **__: Any) -> None:
        with trainer.final_weights():
            found["weights"] = {name: t.clone() for name, t in trainer.trainable.state().items()}
        found["latest"] = {name: t.clone() for name, t in trainer.trainable.state().items()}
        found["at"] = trainer.best_at

    monkeypatch.setattr("tuner.training.recipe.write_outcome", outcome)
    data = f"data=[{{type='folder',path='{held_out}'}}]"
    best = f"observers=[{{type='validation',every=4,levels=2,{data},best=true}}]"
    settings = ("run.updates=6", "optimizer={type='adamw',lr=0.02}", "run.checkpoint_every=4", "run.keep=9", best)
    rows = measured(train(ground, tmp_path, recipe, *settings))
    at = min(rows, key=lambda row: row["loss"])["samples_seen"]
    assert found["at"] == at == rows[-1]["best_at"]
    if at:
        saved = load_file(tmp_path / "checkpoints" / f"samples-{at:010d}" / "trainable.safetensors")
        assert all(torch.equal(found["weights"][name], saved[name]) for name in saved)
    assert (at == 24) == all(torch.equal(found["weights"][n], t) for n, t in found["latest"].items())


@pytest.mark.parametrize("option", ["patience=1", "best=true"])
def test_the_best_is_not_chosen_by_the_pictures_that_are_trained_on(option, ground, tmp_path, capsys):
    module: Any = importlib.import_module("recipes.lora")
    arguments = ground.arguments(tmp_path, "run.updates=1", f"observers=[{{type='validation',{option}}}]")
    assert run_command(module.Config, module.main, arguments) == 2
    assert "needs held-out pictures; give data, or share = 0.1" in capsys.readouterr().err


def test_two_validations_do_not_both_choose_what_is_published(ground, held_out, tmp_path, capsys):
    module: Any = importlib.import_module("recipes.lora")
    one = f"{{type='validation',best=true,data=[{{type='folder',path='{held_out}'}}]}}"
    arguments = ground.arguments(tmp_path, "run.updates=1", f"observers=[{one},{one}]")
    assert run_command(module.Config, module.main, arguments) == 2
    assert "two validations have `best`" in capsys.readouterr().err


def test_two_validations_go_by_names_of_their_own(ground, held_out, tmp_path, capsys):
    data = f"data=[{{type='folder',path='{held_out}'}}]"
    one, other = (f"{{type='validation',every=8,levels=2,{more}}}" for more in (data, f"name='seen',{data}"))
    again = f"{{type='validation',every=8,levels=2,name='seen',{data}}}"
    settings = ("run.updates=2", "run.checkpoint_every=4")
    rows = train(ground, tmp_path / "run", "lora", *settings, f"observers=[{one},{other}]")
    plain, named = ([row for row in rows if row["kind"] == kind] for kind in ("validation", "validation/seen"))
    assert [{**row, "kind": "validation"} for row in named] == plain and len(plain) == 2
    later = train(ground, tmp_path / "run", "lora", "run.updates=4", f"observers=[{one},{other}]")  # each knows its own
    assert [row["kind"] for row in later if "by_picture" in row and row["samples_seen"] == 16] == [
        "validation",
        "validation/seen",
    ]
    assert all(row["change_since"] == 0 for row in later if "by_picture" in row)
    module: Any = importlib.import_module("recipes.lora")
    for names in ((one, one), (other, again)):
        arguments = ground.arguments(tmp_path / "none", "run.updates=1", f"observers=[{','.join(names)}]")
        assert run_command(module.Config, module.main, arguments) == 2
        assert "two validations have one name" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_run_says_that_pictures_of_validation_are_trained_on(ground, held_out, tmp_path, capfd):
    settings = ("run.updates=1", "pictures.resolution=64")
    train(ground, tmp_path / "apart", "lora", *settings, observer(held_out, levels=1))
    assert "are trained on" not in capfd.readouterr().out
    shutil.copytree(ground.pictures, tmp_path / "pictures")
    for file in held_out.iterdir():
        shutil.copy(file, tmp_path / "pictures" / f"again {file.name}")
    data = f"data=[{{type='folder',path='{tmp_path / 'pictures'}'}}]"
    train(ground, tmp_path / "both", "lora", *settings, data, observer(held_out, levels=1))
    assert (
        f"validation: 3 of its 3 pictures are trained on, too, the first is {held_out / '0.png'}"
        in capfd.readouterr().out
    )
