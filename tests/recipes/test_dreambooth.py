"""DreamBooth: class pictures are made once and kept apart, and the prior's weight enters the loss as it is said."""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import dreambooth
from tests import runs
from tuner.config.command_line import run as run_command
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.example import Example
from tuner.data.images import Pictures
from tuner.data.order import Order
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.stream import DataStream, expand
from tuner.diffusion.objective import Objective
from tuner.families.base import Sampling
from tuner.families.source import BaseModel
from tuner.training.run import Run, prepare

COUNT, WEIGHT = 5, 0.3


@pytest.fixture(autouse=True)
def no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    for index, size in enumerate([(64, 64), (80, 60), (64, 90)]):
        Image.new("RGB", size, ("red", "lime", "blue")[index]).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run(ground: runs.Ground, subject: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*changes: str, count: int = COUNT, output: str = "run") -> int:
        data = (
            f"data={{subject='{subject}',prompt='a sks cat',class_folder='{tmp_path / 'class'}',class_prompt='a cat',"
            f"class_count={count},prior_weight={WEIGHT}}}"
        )
        own = [a for a in ground.arguments(tmp_path / output) if not a.startswith("data")]
        settings = ("run.updates=1", "run.batch_size=6", "run.precision='fp32'", "method={type='lora',rank=2}")
        return run_command(
            dreambooth.Config, dreambooth.main, [*own, data, *settings, *changes], check=dreambooth.check
        )

    return run


def made(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("*.png"))}


def test_class_pictures_are_those_of_the_base_from_their_seeds_and_made_once(run, ground, tmp_path):
    assert run() == 0
    folder = tmp_path / "class"
    first = made(folder)
    assert list(first) == [f"class-{seed:05d}.png" for seed in range(COUNT)]
    model = BaseModel(base=str(ground.folder / "base")).open(torch.device("cpu"))
    for seed, name in enumerate(first):
        (expected,) = model.sample(["a cat"], [seed], Sampling())
        with Image.open(folder / name) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert len({content for _, content in first.values()}) == COUNT

    record = json.loads((folder / "generated.json").read_text())
    assert len(record.pop("contents")) == 64
    assert record == {"base": str(ground.folder / "base"), "prompt": "a cat", "pictures": list(first)}
    assert run(output="another") == 0 and made(folder) == first
    assert run(output="more", count=COUNT + 1) == 0
    assert {name: made(folder)[name] for name in first} == first and len(made(folder)) == COUNT + 1
    assert not list(folder.glob(".*"))


def test_an_interrupted_making_leaves_whole_pictures_and_goes_on(run, tmp_path, monkeypatch):
    from tuner.families.sd1 import Sd1Model

    sample, calls = Sd1Model.sample, []

    def dies(self: Sd1Model, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sd1Model, "sample", dies)
        assert run() == 130
    first = made(tmp_path / "class")
    assert len(first) == 2
    assert run() == 0
    now = made(tmp_path / "class")
    assert len(now) == COUNT and {name: now[name] for name in first} == first


@pytest.mark.parametrize(
    "change", ["data.class_prompt='a toy'", "model.base='{other}'"], ids=["another prompt", "another base"]
)
def test_pictures_made_from_something_else_are_refused(change, run, ground, tmp_path, capfd):
    assert run() == 0
    other = shutil.copytree(ground.folder / "base", tmp_path / "other")
    assert run(f"model.base='{other}'", output="moved") == 0  # it is the same base
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    before = made(tmp_path / "class")
    capfd.readouterr()
    for check in ((), ("--check",)):
        assert run(change.format(other=other), *check, output="another") == 3
    errors = [line for line in capfd.readouterr().err.split("\n") if line.startswith("error:")]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert ": was made " in errors[0] and "give another class_folder or remove it" in errors[0]
    assert made(tmp_path / "class") == before


def test_the_loss_is_the_mean_of_both_sides_weighted_by_the_prior(run, ground, subject, tmp_path):
    """Sum of w l over sum of w; a new LoRA changes nothing yet, so the base's own losses tell."""
    assert run() == 0
    (update,) = runs.updates(tmp_path / "run")

    model = BaseModel(base=str(ground.folder / "base")).open(torch.device("cpu"))
    source = Dreambooth(
        subject=subject, prompt="a sks cat", class_folder=tmp_path / "class", class_prompt="a cat", class_count=COUNT,
        prior_weight=WEIGHT,
    )  # fmt: skip
    examples = source.examples()
    encoded = prepare(model, examples, Pictures(), Cache(ground.folder / "cache"), Captions())
    assert not encoded.missing_latents()
    samples = expand([example.repeats for example in examples])
    order = Order(buckets=tuple(encoded.sizes[i] for i in samples), seed=0, batch_size=6)
    stream = DataStream(
        model=model, encoded=encoded, captions=Captions(), order=order, micro_batch=1, rank=0, world=1,
        device=torch.device("cpu"), learns_text=False,
    )  # fmt: skip
    (batch,) = islice(stream(0), 1)
    rows = []
    for micro in batch.micro_batches:
        with torch.no_grad():
            loss = float(Objective().loss(model, micro).weighted)
        side = examples[samples[micro.positions[0].sample]].source
        rows.append((WEIGHT if side == "class" else 1.0, loss))
    assert {weight for weight, _ in rows} == {1.0, WEIGHT} and len(rows) == 6
    weighted = sum(w * loss for w, loss in rows) / sum(w for w, _ in rows)
    assert update["loss"] == pytest.approx(weighted, rel=1e-5)
    assert update["loss"] != pytest.approx(sum(loss for _, loss in rows) / 6, rel=1e-3)


def test_an_epoch_shows_both_sides_about_alike_often(run, tmp_path, capfd):
    assert run("run.updates=1") == 0
    capfd.readouterr()
    assert run("--check", output="another") == 0
    out = capfd.readouterr().out
    assert "pictures: 8 of 8 used" in out
    assert "run: 6 samples, 1 updates of 6, 0.55 epochs" in out  # of 11: 3 subjects twice, and 5


def test_prior_prediction_makes_no_pictures_begins_without_loss_and_goes_on_as_if_unbroken(
    ground, subject, tmp_path, capfd
):
    data = f"data={{subject='{subject}',prompt='a sks cat',class_prompt='a cat',prior_prediction=true}}"

    def run(output: str, method: str, updates: int, *more: str) -> dict[str, Any]:
        own = [a for a in ground.arguments(tmp_path / output) if not a.startswith("data")]
        settings = (f"run.updates={updates}", "run.batch_size=6", "run.precision='fp32'", f"method={method}", *more)
        assert run_command(dreambooth.Config, dreambooth.main, [*own, data, *settings]) == 0
        return runs.digests(tmp_path / output)

    for name, method in {"lora": "{type='lora',rank=2}", "full": "{type='full',text_encoder=true}"}.items():
        unbroken = run(name, method, 3)
        run(f"{name} broken", method, 1)
        assert run(f"{name} broken", method, 3) == unbroken
        first, second, third = runs.updates(tmp_path / name)  # each of 3 subjects and the 3 as members of the class
        alone = run_command(
            dreambooth.Config,
            dreambooth.main,
            [
                *[a for a in ground.arguments(tmp_path / f"{name} alone") if not a.startswith("data")],
                *("run.updates=1", "run.batch_size=6", "run.precision='fp32'", f"method={method}"),
                data.replace("prior_prediction=true", "prior_prediction=true,prior_weight=1e-9"),
            ],
        )
        assert alone == 0
        assert first["loss"] == pytest.approx(runs.updates(tmp_path / f"{name} alone")[0]["loss"] / 2, rel=1e-4)
        assert second["loss"] != third["loss"]
    said = capfd.readouterr().out
    assert "prior prediction: what learns is also kept as it is now, which takes" in said
    assert not list(tmp_path.rglob("class-*.png"))


@pytest.mark.parametrize("prior_prediction", [False, True], ids=["class pictures", "subject's own"])
def test_only_pictures_of_the_subject_are_held_out(prior_prediction, run, subject, tmp_path, monkeypatch):
    places = sorted(int(hashlib.sha256(file.read_bytes()).hexdigest()[:13], 16) for file in subject.glob("*.png"))
    share = (places[0] + places[1]) / 2 / 16**13  # one of the three
    trained: list[list[Example]] = []
    encode = Run.encode

    def encoding(self: Run, model: Any, examples: list[Example], *arguments: Any, **more: Any) -> Any:
        trained.append(examples)
        return encode(self, model, examples, *arguments, **more)

    monkeypatch.setattr(Run, "encode", encoding)
    data = f"data={{subject='{subject}',prompt='a sks cat',class_prompt='a cat',prior_prediction=true}}"
    watched = f"observers=[{{type='validation',share={share},levels=2}}]"
    assert run(watched, *([data] if prior_prediction else [])) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = next(row for row in rows if row["kind"] == "validation")
    assert measured["pictures"] == 1 and list(measured["by_source"]) == ["subject"]
    (held_out,) = {*subject.glob("*.png")} - {e.image for e in trained[0] if e.source == "subject"}
    class_pictures = [e.image for e in trained[0] if e.source == "class"]
    assert len(class_pictures) == (2 if prior_prediction else COUNT) and held_out not in class_pictures
