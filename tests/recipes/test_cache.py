"""What a run leaves in the cache."""

from pathlib import Path

import pytest
from safetensors import safe_open

from tests import runs
from tuner.training.metrics import read_metrics


def entries(cache: Path) -> list[set[str]]:
    """What each entry holds."""
    found: list[set[str]] = []
    for file in cache.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as entry:
            found.append(set(entry.keys()))
    return found


@pytest.mark.parametrize("recipe", runs.METHODS)
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
def test_captions_are_kept_only_where_the_text_encoder_does_not_learn(
    recipe, learns, ground, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
    cache = f"run.cache='{tmp_path / 'cache'}'"
    method = f"method={{text_encoder={str(learns).lower()}}}"
    assert ground.run(recipe, tmp_path / "run", "run.updates=1", cache, method) == 0
    found = entries(tmp_path / "cache")
    texts = [entry for entry in found if entry == {"tokens"}]
    pictures = [entry for entry in found if entry == {"mean", "std"}]
    assert len(pictures) == 2 * len(runs.SIZES) and len(texts) + len(pictures) == len(found)
    assert len(texts) == (0 if learns else len(runs.SIZES) + 1)  # and the empty one
    assert ("encoding captions" in capfd.readouterr().err) == (not learns)


def test_observers_that_measure_see_pictures_plain_however_they_are_varied(ground, tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
    observers = "observers=[{type='validation',every=100},{type='forgetting',every=100,prompts=['a cat']}]"
    varied = ("pictures.crop='random'", "pictures.augment={rotation=20.0,hue=90.0}", "pictures.flip=false")
    found = []
    for name, more in (("plain", ()), ("varied", varied)):
        output = tmp_path / name
        assert ground.run("lora", output, "run.updates=1", f"run.cache='{output}/cache'", observers, *more) == 0
        rows = [row for row in read_metrics(output / "metrics.jsonl") if row["kind"] in ("validation", "forgetting")]
        found.append([{**row, "seconds": None} for row in rows if row["samples_seen"] == 0])
        pictures = sum(entry == {"mean", "std"} for entry in entries(output / "cache"))
        assert pictures == (4 * len(runs.SIZES) + len(runs.SIZES) if more else 2 * len(runs.SIZES))
    assert found[0] == found[1] and len(found[0]) > 0
