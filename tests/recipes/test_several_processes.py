"""How the work is split does not matter: not into micro-batches, and not among processes."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests import runs
from tuner.training.checkpoint import Checkpoints
from tuner.training.run import lost_peer

ROOT = Path(__file__).parent.parent.parent
UPDATES = 20
WHOLE = (f"run.updates={UPDATES}", "run.batch_size=8", "run.checkpoint_every=1000")
RATES = {"lora": 1e-4, "full": 1e-5}
"""The recipes' own. Adam makes steps of about this size even of a gradient that is nothing but rounding, as that of an
attention's key bias is, so that splits differ in proportion to it there."""


@pytest.fixture(scope="module", autouse=True)
def no_outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
        yield


def newest(output: Path) -> Any:
    checkpoint, skipped = Checkpoints(folder=output / "checkpoints").newest()
    assert checkpoint is not None and not skipped
    return checkpoint


def furthest(left: Path, right: Path, name: str = "trainable") -> float:
    ours, theirs = newest(left), newest(right)
    assert ours.samples_seen == theirs.samples_seen
    a, b = ours.tensors(name), theirs.tensors(name)
    assert a.keys() == b.keys() and len(a) > 50
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def launch(processes: int, recipe: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`accelerate launch`, as the documentation says it for CPUs."""
    several = ("--multi_gpu", "--num_processes", str(processes)) if processes > 1 else ("--num_processes", "1")
    command = (sys.executable, "-m", "accelerate.commands.launch", *several, f"{recipe}.py", *arguments)
    environment = runs.environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("recipe", runs.METHODS)
def test_a_batch_of_8_is_the_same_in_parts_and_on_two_processes(recipe, ground, tmp_path):
    """8 = 4 + 4 accumulated = 3 + 3 + 2 = two processes with 4 each; in mixed buckets, of which none is full."""
    settings = (*WHOLE, f"optimizer={{type='adamw',lr={RATES[recipe]}}}")
    outputs = {micro: tmp_path / f"micro-{micro}" for micro in (8, 4, 3)}
    for micro, output in outputs.items():
        assert ground.run(recipe, output, *settings, f"run.micro_batch={micro}") == 0
    two, whole = tmp_path / "two", outputs[8]
    arguments = ground.arguments(two, *runs.COMMON, *runs.METHODS[recipe], *settings, "run.micro_batch=4")
    launched = launch(2, f"recipes/{recipe}", *arguments)
    assert launched.returncode == 0, launched.stderr[-3000:]

    for output in (outputs[4], outputs[3], two):
        assert furthest(output, whole) <= 1e-6, output.name
        assert furthest(output, whole, "ema") <= 1e-6, output.name
        ours, theirs = runs.updates(output), runs.updates(whole)
        assert len(ours) == UPDATES
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-5)
    base = load_file(ground.folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    begun = {f"unet.{name}": tensor for name, tensor in base.items()}  # and B of a LoRA begins at zero
    moved = [
        float((tensor - begun.get(name, torch.zeros(()))).abs().max())
        for name, tensor in newest(whole).tensors("trainable").items()
        if name in begun or ".lora_B." in name
    ]
    assert len(moved) > 20 and min(moved) > 3 * RATES[recipe], "nothing is trained"
    assert runs.digests(two)["trainable.safetensors"] != runs.digests(whole)["trainable.safetensors"], (
        "nothing is split"
    )

    for output in (two, whole):  # and what two processes have begun, one goes on with
        assert ground.run(recipe, output, *settings, f"run.updates={UPDATES + 2}") == 0
    assert furthest(two, whole) <= 1e-6


ELSEWHERE = """
import os
os.chdir(os.environ["RANK"])
from recipes import lora
from tuner.config.command_line import run
raise SystemExit(run(lora.Config, lora.main))
"""


def test_processes_that_see_other_pictures_or_captions_do_not_train_together(ground, tmp_path):
    """As on two machines, each with a copy of the data of its own, of which one is older."""
    for rank in "01":
        shutil.copytree(ground.pictures, tmp_path / rank / "pictures")
    (tmp_path / "1" / "pictures" / "0.txt").write_text("a corrected caption")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    data = "data=[{type='folder',path='pictures'}]"
    arguments = ground.arguments(tmp_path / "run", *runs.COMMON, *runs.METHODS["lora"], data, "run.updates=1")
    launched = launch(2, str(tmp_path / "elsewhere"), *arguments, cwd=tmp_path)
    assert launched.returncode != 0 and not (tmp_path / "run" / "checkpoints").exists()
    assert "error: the captions: not the same in all processes; start them with the same" in launched.stderr


@pytest.fixture
def of_several(monkeypatch):
    """What a launcher tells the first of two processes, where each of them will believe that it is alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)  # it would wait for the other
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the processes find each other")
def test_processes_that_would_train_alone_are_refused(of_several, ground, tmp_path, capfd):
    assert ground.run("lora", tmp_path / "run", *WHOLE) == 9
    error = capfd.readouterr().err
    assert "[process 0] error: 2 processes were launched, but each believes it is one of 1" in error
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionError("the hub cannot be reached"), False),
    ],
)
def test_that_another_process_is_gone_is_no_bug_of_this_one(error, lost):
    assert lost_peer(error) == lost
