"""Every file in examples/ is read or run: the configs with a network small enough for it, and a few updates."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState

from tuner import cli
from tuner.config.loader import load

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.rglob("*.toml"))
LAUNCHES = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
READ_ELSEWHERE = {".png", ".txt", ".md", ".py"}  # pictures and captions by the configs; the program by test_demo.py


def name_of(file: Path) -> str:
    return file.relative_to(EXAMPLES).as_posix()


def recipe_of(file: Path) -> str:
    """A config's recipe is its folder's name, or its own."""
    return file.parent.name if file.parent.name in cli.recipes() else file.stem


ELSEWHERE = {"merge", "loras"}
"""Folders whose configs tests of their own run."""
TRAINING = [file for file in CONFIGS if recipe_of(file) != "publish" and file.parent.name not in ELSEWHERE]
PUBLISHING = [file for file in CONFIGS if recipe_of(file) == "publish"]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the configs name, as the one in which somebody types the commands."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    for folder in ("pictures", "more-pictures", "held-out"):
        shutil.copytree(EXAMPLES / "demo" / "held-out", tmp_path / folder)
    shutil.copytree(EXAMPLES / "demo" / "subject", tmp_path / "subject")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)  # a program has one precision; here are many in one
    return tmp_path


def in_small(file: Path, base: Path) -> dict[str, Any]:
    """The config of `file` with two updates of a small batch on `base`, and else as it is."""
    table = tomllib.loads(file.read_text("utf-8"))
    table["model"]["base"] = str(base)
    for key in ("samples", "epochs", "updates"):
        table["run"].pop(key, None)
    table["run"] |= {"updates": 2, "batch_size": 2}
    table["run"].pop("micro_batch", None)
    if "resolution" in table.get("pictures", {}):
        table["pictures"]["resolution"] = 64
    if "class_count" in table["data"]:
        table["data"]["class_count"] = 2
    for observer in table.get("observers", []):
        observer["every"] = 2
        if observer["type"] == "previews":
            observer["sampling"] = {"steps": 2}
        if observer["type"] == "validation":
            observer |= {"pictures": 2, "levels": 2}
    return table


def train(file: Path, base: Path) -> Path:
    """Run the recipe of `file` in small; the answer is its output folder."""
    table = in_small(file, base)
    small = Path("small.toml")
    small.write_text(tomli_w.dumps(table), encoding="utf-8")
    assert cli.main([recipe_of(file), str(small)]) == 0
    return Path(table["run"]["output"])


@pytest.mark.parametrize("file", CONFIGS, ids=name_of)
def test_a_config_loads_with_its_recipe_and_says_the_command_that_runs_it(file):
    recipe = recipe_of(file)
    config = load(cli.recipe_module(recipe).Config, file)
    assert f"tuner {recipe} {file.relative_to(ROOT).as_posix()}" in file.read_text("utf-8")
    if hasattr(config, "model"):
        assert config.model.base == "pocket" or config.model.base.count("/") == 1


@pytest.mark.parametrize("file", TRAINING, ids=name_of)
def test_a_training_config_trains_and_leaves_what_it_promises(file, base, workshop):
    output = train(file, base)
    table = tomllib.loads(file.read_text("utf-8"))
    full = recipe_of(file) == "full" or table.get("method", {}).get("type") == "full"
    name = table["run"]["name"]
    in_peft = table.get("method", {}).get("type", "lora") in ("loha", "lokr", "ia3")
    other = "peft/unet/adapter_config.json" if in_peft else f"{name}-diffusers.safetensors"
    made = ["model/model_index.json"] if full else [f"lora/{name}.safetensors", f"lora/{other}"]
    if recipe_of(file) == "textual_inversion":
        bundle = [*made, f"lora/{name}-bundle.safetensors"] if "adapter" in table["method"] else []
        made = [*bundle, *(f"embeddings/{name}-{token.strip('<>')}.safetensors" for token in table["method"]["tokens"])]
    for path in (*made, "metrics.jsonl", "config.toml", "release.json"):
        assert (output / path).is_file(), path
    assert (output / "samples" / "grid.png").is_file() == any(
        o["type"] == "previews" for o in table.get("observers", [])
    )


@pytest.mark.parametrize("file", PUBLISHING, ids=name_of)
def test_a_publishing_config_lists_what_it_would_send(file, base, workshop, capsys):
    train(EXAMPLES / "quickstart" / "lora.toml", base)
    assert cli.main(["publish", str(file), "release=runs/quickstart", "--check"]) == 0
    shown = capsys.readouterr().out
    for name in ("README.md", "white-bear.safetensors", "white-bear-diffusers.safetensors", "images/grid.png"):
        assert name in shown


@pytest.mark.parametrize("file", LAUNCHES, ids=name_of)
def test_a_launch_config_is_one_that_accelerate_reads(file):
    said = yaml.safe_load(file.read_text("utf-8"))
    read = load_config_from_file(str(file))
    for key, value in said.items():
        assert getattr(read, key) == value or getattr(read, key).value == value


def test_two_processes_on_cpus_launch_as_their_config_says(base, workshop):
    """And see each other: alone, each would refuse to start."""
    small = workshop / "small.toml"
    table = in_small(EXAMPLES / "quickstart" / "lora.toml", base)
    del table["observers"]
    small.write_text(tomli_w.dumps(table), encoding="utf-8")
    file = EXAMPLES / "accelerate" / "two_cpu_processes.yaml"
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
            *("--main_process_port", "0", str(ROOT / "recipes" / "lora.py"), str(small)),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=workshop,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert Path(table["run"]["output"], "lora", "white-bear.safetensors").is_file()


def test_no_file_of_the_examples_is_left_out():
    others = {file for file in EXAMPLES.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    others -= {*CONFIGS, *LAUNCHES}
    assert {file.suffix for file in others} <= READ_ELSEWHERE, sorted(map(str, others))
