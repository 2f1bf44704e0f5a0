"""`--check` says what a run would do, and does nothing."""

import hashlib
import importlib
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import runs, tiny
from tuner.config.command_line import run as run_command
from tuner.config.loader import load
from tuner.weights.convert import convert


def tree(*folders: Path) -> dict[str, str]:
    """Every file and folder, by its content and date."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path)] = f"{content} {path.stat().st_mtime_ns}"
    return found


@pytest.fixture
def check(ground: runs.Ground, tmp_path: Path, monkeypatch, capfd) -> Any:
    """Runs `--check`: its exit code, what it prints and what it says of errors. Nothing may be written or connected."""

    def connect(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    def run(recipe: str, *arguments: str) -> tuple[int, str, str]:
        module = importlib.import_module(f"recipes.{recipe}")
        (tmp_path / "home").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "home")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setattr(socket.socket, "connect", connect)
        before = tree(ground.folder, tmp_path)
        capfd.readouterr()
        code = run_command(module.Config, module.main, [*arguments, "--check"], check=module.check)
        captured = capfd.readouterr()
        assert tree(ground.folder, tmp_path) == before
        return code, captured.out, captured.err

    return run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize("recipe", runs.METHODS)
def test_it_shows_what_a_run_then_does(recipe, check, ground, output, tmp_path):
    arguments = [*ground.arguments(output), *runs.COMMON, *runs.METHODS[recipe], "run.epochs=2"]
    code, out, err = check(recipe, *arguments)
    assert code == 0 and "Traceback" not in err

    config, _, rest = out.partition("pictures: ")
    file = tmp_path / "resolved.toml"
    file.write_text(config)
    schema = importlib.import_module(f"recipes.{recipe}").Config
    assert load(schema, file) == load(schema, None, arguments)  # the config, with its defaults

    assert rest.startswith("7 of 7 used, in 4 buckets\n")
    buckets = {(int(w), int(h)): int(n) for w, h, n in re.findall(r"^ +(\d+) x (\d+) +(\d+)$", rest, re.MULTILINE)}
    assert buckets == {(56, 72): 2, (64, 64): 3, (72, 56): 1, (80, 48): 1}
    assert "enlarged" not in rest
    assert len(re.findall(r"^  \d\.png: '.*' \(\d+ tokens\)$", rest, re.MULTILINE)) == 7
    assert "0 of 7 are longer than the text encoder sees" in rest
    assert "run: 14 samples, 4 updates of 4, 2.00 epochs" in rest
    rates = [float(rate) for rate in re.findall(r"^  update \d+: (\S+)$", rest, re.MULTILINE)]
    learns = {name: (int(n.replace(",", "")), float(lr)) for name, n, lr in re.findall(
        r"^learns: (\w+), ([\d,]+) parameters in \d+ tensors, at up to (\S+)$", rest, re.MULTILINE)}  # fmt: skip

    assert ground.run(recipe, output, "run.epochs=2") == 0
    done = runs.updates(output)
    assert [update["lr"] for update in done] == pytest.approx(rates, rel=1e-3)
    assert done[-1]["update"] == 4 and done[-1]["samples_seen"] == 16
    from tuner.training.checkpoint import Checkpoints

    checkpoint, _ = Checkpoints(folder=output / "checkpoints", keep=2).newest()
    assert checkpoint is not None
    state = checkpoint.tensors("trainable")
    counts = {name: sum(t.numel() for key, t in state.items() if key.startswith(f"{name}.")) for name in learns}
    assert {name: count for name, (count, _) in learns.items()} == counts and len(learns) == 2
    assert learns["unet"][1] == 1e-3 and learns["text_encoder"][1] == (3e-4 if recipe == "lora" else 1e-3)


def test_pictures_that_are_enlarged_are_counted(check, ground, output):
    code, out, _ = check("lora", *ground.arguments(output), "run.updates=1", "pictures.resolution=72")
    assert code == 0 and "  5 are smaller than their bucket and are enlarged, the first is 0.png" in out


def test_what_the_cache_still_lacks_is_counted(check, ground, output, tmp_path):
    own = (*ground.arguments(output), "run.updates=1", f"run.cache='{tmp_path / 'cache'}'", "pictures.resolution=48")
    for more, count in (
        ((), 7),
        (("pictures.flip=true",), 14),
        (("pictures={augment={hue=10.0},variants=3,flip=true,resolution=48}",), 42),
        (("pictures={resolution=[32,48],areas='each'}",), 14),
    ):
        code, out, _ = check("lora", *own, *more)
        assert code == 0 and f"\n  {count} encoded pictures are still to be made for the cache\n" in out
    assert "pictures: 7 of 7 used" in out and "run: 4 samples, 1 updates of 4, 0.29 epochs" in out  # of 14


def test_the_captions_are_those_that_the_first_epoch_shows(check, ground, output):
    shown = set()
    for dropout in ("0.0", "1.0"):
        code, out, _ = check(
            "lora", *ground.arguments(output), "run.updates=1", f"captions={{prefix='photo of ',dropout={dropout}}}"
        )
        assert code == 0
        shown |= set(re.findall(r"^  3\.png: (.*)$", out, re.MULTILINE))
    tokens = len(tiny.tokenizer()("photo of the red cat at 3").input_ids) - 2
    assert shown == {f"'photo of the red cat at 3' ({tokens} tokens)", "'' (0 tokens)"}


def test_long_captions_are_counted_with_what_is_cut(check, ground, output):
    long = "the " * 80
    code, out, err = check("lora", *ground.arguments(output), "run.updates=1", f"captions={{prefix='{long}'}}")
    assert code == 0 and re.search(r"3\.png: 'the the .*' \(\d+ tokens, \d+ are cut\)", out)
    tokens, cut = map(int, re.findall(r"3\.png: .* \((\d+) tokens, (\d+) are cut\)", out)[0])
    assert tokens - cut == 75 and tokens > 80
    assert "7 of 7 are longer than the text encoder sees" in out and "sequence length" not in err


def test_class_pictures_that_are_still_to_be_made_count(check, ground, output, tmp_path):
    data = (
        f"data={{subject='{ground.pictures}',prompt='a sks cat',class_folder='{tmp_path / 'class'}',"
        "class_prompt='a cat',class_count=20}"
    )
    arguments = [argument for argument in ground.arguments(output) if not argument.startswith("data")]
    code, out, _ = check("dreambooth", *arguments, data, "run.epochs=1")
    assert code == 0
    assert f"class pictures: 20 are missing, a run makes them in {tmp_path / 'class'}" in out
    assert "pictures: 27 of 27 used" in out and "run: 41 samples" in out  # 7 subjects thrice, and 20
    assert "0.png: 'a sks cat'" in out and re.search(r"learns: unet, [\d,]+ parameters", out)


def test_a_base_that_a_run_would_download_is_said_and_the_data_looked_at(check, ground, output, monkeypatch):
    """It may as well be a folder whose name has a slip in it, so both are said."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code, out, _ = check("lora", *ground.arguments(output), "model.base='models/mybase'", "run.updates=1")
    assert code == 0
    assert out.endswith(
        "model.base: 'models/mybase' is no folder here, nor a model in the hub's local cache; a run "
        "looks for it on the hub. --check downloads and makes nothing, so it looks at the data only\npictures: 7\n"
    )


def test_a_base_that_a_run_would_refuse_is_refused(check, ground, output, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = check("lora", *ground.arguments(output), "model.base='models/mybase'", "run.updates=1")
    assert code == 3 and "is no folder here and could not be had from the hub (offline)" in err
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "home" / "models").mkdir()
    (tmp_path / "home" / "models" / "my.safetensors").write_text("")
    code, _, err = check("lora", *ground.arguments(output), "model.base='models/my.safetensors'", "run.updates=1")
    assert code == 3 and "model.base: models/my.safetensors: only 0 bytes long" in err


def test_a_single_file_that_a_run_would_make_into_a_folder_is_looked_at_and_left(check, ground, output, tmp_path):
    convert(ground.folder / "base", tmp_path / "my.safetensors", layout="ldm")
    single = (f"model.base='{tmp_path / 'my.safetensors'}'", f"run.cache='{tmp_path / 'cache'}'", "run.updates=1")
    config = f"model.config='{ground.folder / 'base'}'"
    code, out, _ = check("lora", *ground.arguments(output), *single, config)
    assert code == 0 and not (tmp_path / "cache").exists()
    assert f"is a single file; a run makes it into a folder in {tmp_path / 'cache'}, once. --check downloads" in out
    code, _, err = check("lora", *ground.arguments(output), *single)
    assert code == 3 and "no whole sd1 of the published size; name a folder whose configs fit with model.config" in err


def test_held_out_pictures_are_looked_at(check, ground, output, tmp_path):
    validation = f"observers=[{{type='validation',data=[{{type='folder',path='{tmp_path / 'held out'}'}}]}}]"
    code, _, err = check("lora", *ground.arguments(output), "run.updates=1", validation)
    assert code == 3 and "held out: no such folder" in err
    (tmp_path / "held out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "held out" / "a.png")
    (tmp_path / "held out" / "a.txt").write_text("a thing")
    code, out, _ = check("lora", *ground.arguments(output), "run.updates=1", validation)
    assert code == 0 and "validation: 1 pictures" in out


def test_every_picture_that_cannot_be_decoded_is_named(check, ground, output, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        values = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.jpg")
    for index in (1, 3):
        (folder / f"{index}.jpg").write_bytes((folder / f"{index}.jpg").read_bytes()[:1000])
    code, _, err = check(
        "lora", *ground.arguments(output), "run.updates=1", f"data=[{{type='folder',path='{folder}',prompt='a thing'}}]"
    )
    errors = [line for line in err.split("\n") if line.startswith("error:")]
    assert code == 3 and [Path(line.split(": ")[1]).name for line in errors] == ["1.jpg", "3.jpg"]
