"""The distance from the base on prompts that are not trained: 0 at first, more the more is overwritten."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tuner.config.command_line import run as run_command
from tuner.training.metrics import Metrics


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> runs.Ground:
    return runs.make(tmp_path_factory.mktemp("ground"))


@pytest.fixture(autouse=True)
def no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)


OBSERVER = "{type='forgetting',every=8,levels=2,prompts=['the dog','a tree']}"


def train(
    ground: runs.Ground, output: Path, *settings: str, code: int = 0, observer: str = OBSERVER
) -> list[dict[str, Any]]:
    module: Any = importlib.import_module("recipes.lora")
    common = ("run.batch_size=4", "run.precision='fp32'", f"observers=[{observer}]")
    assert run_command(module.Config, module.main, ground.arguments(output, *common, *settings)) == code
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "forgetting"]


def test_it_is_0_where_nothing_moves_and_grows_with_the_learning_rate(ground, tmp_path):
    found = [
        train(ground, tmp_path / name, "run.updates=5", f"optimizer={{type='adamw',lr={name}}}")
        for name in ("1e-12", "1e-4", "1e-2")
    ]
    assert [row["samples_seen"] for row in found[0]] == [8, 16, 20]
    still, little, much = (rows[-1]["distance"] for rows in found)
    assert 0 <= still < 1e-9 < little < much
    assert list(found[2][0]["by_prompt"]) == ["the dog", "a tree"]
    assert found[2][-1]["distance"] > found[2][0]["distance"]


@pytest.mark.parametrize("method", ["{rank=4}", "{rank=4,text_encoder=true}"], ids=["denoiser", "and text encoder"])
def test_a_run_that_goes_on_compares_with_the_same_base(method, ground, tmp_path):
    settings = (f"method={method}", "optimizer={type='adamw',lr=1e-2}")
    whole = train(ground, tmp_path / "whole", *settings, "run.updates=4")
    train(ground, tmp_path / "parts", *settings, "run.updates=2")
    parts = train(ground, tmp_path / "parts", *settings, "run.updates=4")
    assert parts == whole


def test_a_lost_record_of_the_base_is_an_error_and_not_a_distance_of_0(ground, tmp_path, capsys):
    train(ground, tmp_path, "run.updates=1")
    (tmp_path / "forgetting.safetensors").unlink()
    train(ground, tmp_path, "run.updates=3", code=8)
    assert "forgetting.safetensors: what the base said" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["['the dog','a house']", "['the dog']"])
def test_what_the_base_said_to_other_prompts_is_not_compared_with(other, ground, tmp_path, capsys):
    train(ground, tmp_path, "run.updates=1")
    observer = f"{{type='forgetting',every=8,levels=2,prompts={other}}}"
    train(ground, tmp_path, "run.updates=3", code=8, observer=observer)
    assert "other prompts, pictures or levels" in capsys.readouterr().err


@pytest.mark.parametrize("first", [True, False], ids=["asked first", "asked last"])
def test_the_end_is_measured_where_another_observer_ends_the_run(first, ground, tmp_path):
    data = f"data=[{{type='folder',path='{ground.pictures}'}}]"
    patient = f"{{type='validation',every=4,levels=1,pictures=1,patience=1,{data}}}"
    rare = "{type='forgetting',every=1000,levels=1,prompts=['the dog']}"
    both = f"{rare},{patient}" if first else f"{patient},{rare}"
    rows = train(ground, tmp_path, "run.updates=60", "optimizer={type='adamw',lr=0.5}", observer=both)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    end = max(row["samples_seen"] for row in metrics)
    assert 0 < end < 240 and [row["samples_seen"] for row in rows] == [end]


class Killed(BaseException):
    """No program's own end."""


@pytest.mark.parametrize("checkpoint_every", [4, 8, 12])
def test_a_kill_at_any_measurement_leaves_the_series_of_the_unbroken_run(
    checkpoint_every, ground, tmp_path, monkeypatch
):
    settings = ("run.updates=5", f"run.checkpoint_every={checkpoint_every}", "optimizer={type='adamw',lr=1e-2}")
    whole = train(ground, tmp_path / "whole", *settings)
    assert [row["samples_seen"] for row in whole] == [8, 16, 20]
    write = Metrics.write
    for lost in range(len(whole)):
        left = [lost]

        def killing(self: Metrics, kind: str, *place: Any, left: list[int] = left, **values: Any) -> None:
            left[0] -= kind == "forgetting"
            if left[0] < 0:
                raise Killed
            write(self, kind, *place, **values)

        output = tmp_path / f"{lost}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Metrics, "write", killing)
            train(ground, output, *settings)
        assert train(ground, output, *settings) == whole


def test_two_of_them_are_refused_since_they_would_write_one_file(ground, tmp_path, capsys):
    module: Any = importlib.import_module("recipes.lora")
    arguments = ground.arguments(tmp_path, "run.updates=1", f"observers=[{OBSERVER},{OBSERVER}]")
    assert run_command(module.Config, module.main, arguments) == 2
    assert "'forgetting' is there twice" in capsys.readouterr().err
