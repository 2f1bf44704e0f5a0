"""A run that was broken off ends as the unbroken one does, to the last bit."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tuner.diffusion.objective import Objective
from tuner.training.trainer import Trainer

UPDATES = 11
PER_EPOCH = len(runs.SIZES)
RECIPES = pytest.mark.parametrize("recipe", runs.METHODS)


@pytest.fixture(scope="module", autouse=True)
def no_outcome():
    """What is written after training is proven elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def unbroken(ground, tmp_path_factory) -> Any:
    """The output of each recipe's unbroken run."""
    made: dict[str, Path] = {}

    def run(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("unbroken") / recipe
            assert ground.run(recipe, made[recipe], f"run.updates={UPDATES}") == 0
        return made[recipe]

    return run


class Killed(BaseException):
    """Stands for a kill: nothing catches it, nothing is saved."""


@pytest.fixture
def interrupt(monkeypatch) -> Any:
    """`interrupt(n, share, how)`: in update `n`, after that share of its micro-batches, the run is killed or asked."""
    plan: dict[str, Any] = {}
    at: dict[str, int] = {}
    train_step, loss = Trainer.train_step, Objective.loss

    def step(self: Trainer, batch: Any) -> Any:
        at.update(update=self.update + 1, micro=0, of=len(batch.micro_batches))
        return train_step(self, batch)

    def watched(self: Objective, *arguments: Any) -> Any:
        if at["update"] == plan.get("update") and at["micro"] == int(plan["share"] * at["of"]):
            happened.append((at["update"], at["micro"], at["of"]))
            if plan["how"] == "kill":
                raise Killed
            os.kill(os.getpid(), plan["how"])
        at["micro"] += 1
        return loss(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(Objective, "loss", watched)
    happened: list[tuple[int, int, int]] = []

    def begin(update: int | None, share: float = 0.0, how: Any = None) -> list[tuple[int, int, int]]:
        plan.update(update=update, share=share, how=how)
        return happened

    return begin


def same(output: Path, expected: Path) -> None:
    assert runs.digests(output) == runs.digests(expected)
    assert runs.updates(output) == runs.updates(expected)  # every loss, norm and rate, to all digits
    assert [row["update"] for row in runs.updates(output)] == list(range(1, UPDATES + 1))


def test_the_unbroken_run_has_all_that_could_go_wrong(unbroken):
    """What the tests below are worth hangs on it."""
    assert PER_EPOCH % 4 and UPDATES * 4 > 5 * PER_EPOCH  # epochs end inside updates
    for recipe in runs.METHODS:
        state = runs.digests(unbroken(recipe))
        assert state["samples_seen"] == UPDATES * 4 and state["ema_updates"] == UPDATES
        assert "ema.safetensors" in state
        rows = runs.updates(unbroken(recipe))
        assert len({row["lr"] for row in rows}) == len({row["loss"] for row in rows}) == UPDATES


@RECIPES
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_micro_batches_ends_as_the_unbroken_one(
    recipe, seed, ground, unbroken, interrupt, tmp_path
):
    chance = random.Random(f"{recipe} {seed}")
    saved: list[int] = []
    for first, last in ((3, 4), (5, 8), (9, 11)):  # a checkpoint comes every other update
        happened = interrupt(chance.randint(first, last), chance.uniform(0.5, 0.99), "kill")
        with pytest.raises(Killed):
            ground.run(recipe, tmp_path, f"run.updates={UPDATES}")
        saved.append(runs.places(tmp_path)[-1])
    assert len(happened) == 3 and saved == sorted(set(saved)) and saved[0] >= 8, "the test makes no progress"
    assert all(0 < micro < of for _, micro, of in happened), "a kill came between updates"
    interrupt(None)
    assert ground.run(recipe, tmp_path, f"run.updates={UPDATES}") == 0
    same(tmp_path, unbroken(recipe))


@pytest.mark.parametrize(
    ("recipe", "number", "code", "update"),
    [
        pytest.param("lora", signal.SIGTERM, 143, 7, id="SIGTERM in the last update of an epoch, LoRA"),
        pytest.param("full", signal.SIGINT, 130, 3, id="Ctrl-C between checkpoints, full"),
    ],
)
def test_a_run_that_was_asked_to_stop_ends_as_the_unbroken_one(
    recipe, number, code, update, ground, unbroken, interrupt, tmp_path, capfd
):
    assert 7 * 4 % PER_EPOCH == 0
    happened = interrupt(update, 0.5, number)
    assert ground.run(recipe, tmp_path, f"run.updates={UPDATES}") == code
    assert happened[0][1] > 0 and runs.places(tmp_path)[-1] == update * 4  # the update at hand was finished and saved
    assert f"stopped at {update * 4} of 44 samples" in capfd.readouterr().out
    assert ground.run(recipe, tmp_path, f"run.updates={UPDATES}") == 0
    same(tmp_path, unbroken(recipe))
    assert f"going on from {tmp_path / 'checkpoints' / f'samples-{update * 4:010d}'}" in capfd.readouterr().out


def test_variants_go_on_where_they_left_off(ground, interrupt, tmp_path):
    """Cut anywhere, changed, in every area: all by the sample's position."""
    varied = ("pictures.crop='random'", "pictures.resolution=[32,64]", "pictures.areas='each'", "pictures.variants=3",
              "pictures.augment={brightness=0.3,hue=90.0,rotation=15.0}", "run.updates=6")  # fmt: skip
    interrupt(None)
    assert ground.run("lora", tmp_path / "unbroken", *varied) == 0
    interrupt(4, 0.5, "kill")
    with pytest.raises(Killed):
        ground.run("lora", tmp_path / "broken", *varied)
    assert runs.places(tmp_path / "broken") == [8]
    interrupt(None)
    assert ground.run("lora", tmp_path / "broken", *varied) == 0
    assert runs.digests(tmp_path / "broken") == runs.digests(tmp_path / "unbroken")
    assert runs.updates(tmp_path / "broken") == runs.updates(tmp_path / "unbroken")
