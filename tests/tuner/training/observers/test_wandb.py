"""wandb hears every line of the metrics; offline it needs no account and no network."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tuner.config.command_line import run as run_command

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> runs.Ground:
    return runs.make(tmp_path_factory.mktemp("ground"))


@pytest.fixture(autouse=True)
def nothing_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
    for name, value in {
        "WANDB_API_KEY": "",
        "WANDB_SILENT": "true",
        "HOME": str(tmp_path),
        "NETRC": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)


def train(ground: runs.Ground, output: Path, mode: str) -> int:
    module: Any = importlib.import_module("recipes.lora")
    observers = (
        f"observers=[{{type='validation',levels=2,every=4}},{{type='wandb',project='p',name='n',mode='{mode}'}},"
        "{type='previews',prompts=['a cat'],sampling={steps=1}}]"
    )
    common = ("run.batch_size=4", "run.precision='fp32'", "run.updates=2", observers)
    return run_command(module.Config, module.main, ground.arguments(output, *common))


def test_offline_it_hears_what_the_metrics_say(ground, tmp_path, monkeypatch):
    heard: list[dict[str, Any]] = []
    init = wandb.init

    def listen(**settings: Any) -> Any:
        session = init(**settings)
        log = session.log
        monkeypatch.setattr(session, "log", lambda values: (heard.append(values), log(values)))
        return session

    monkeypatch.setattr(wandb, "init", listen)
    assert train(ground, tmp_path / "run", "offline") == 0
    updates = [values for values in heard if "update/loss" in values]
    expected = runs.updates(tmp_path / "run")
    assert [(v["samples_seen"], v["update/loss"], v["update/lr"]) for v in updates] == [
        (row["samples_seen"], row["loss"], row["lr"]) for row in expected
    ]
    assert [v["samples_seen"] for v in heard if "validation/loss" in v] == [0, 4, 8]
    assert "previews" in heard[-1] and heard[-1]["samples_seen"] == 8
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_online_without_an_account_is_a_line_that_says_what_to_do(ground, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")  # seconds, where no server answers
    assert train(ground, tmp_path / "run", "online") == 2
    (error,) = [line for line in capfd.readouterr().err.split("\n") if line.startswith("error:")]
    assert "observers: wandb cannot start" in error and "mode = 'offline'" in error
