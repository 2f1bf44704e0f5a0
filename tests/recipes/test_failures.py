"""What ends a run before its time: a line that says what and what to do, an exit code, and nothing lost."""

import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import runs
from tuner.data.encode import Encoded
from tuner.diffusion.objective import Objective
from tuner.training.lock import lock

BEFORE, WHOLE = "run.updates=3", "run.updates=5"


@pytest.fixture(scope="module", autouse=True)
def no_outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def begun(ground, tmp_path_factory) -> Path:
    """A LoRA run of 12 samples, with checkpoints at 8 and 12."""
    output = tmp_path_factory.mktemp("begun") / "run"
    assert ground.run("lora", output, BEFORE, "learning_rate={type='constant'}") == 0
    return output


@pytest.fixture(scope="module")
def unbroken(ground, tmp_path_factory) -> dict[str, Any]:
    """What the run has become at 20 samples when nothing happens to it."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert ground.run("lora", output, WHOLE, "learning_rate={type='constant'}") == 0
    return runs.digests(output)


@pytest.fixture
def output(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture
def resume(ground, output) -> Any:
    """Goes on to 20 samples, with what is changed."""
    return lambda *changed: ground.run("lora", output, WHOLE, "learning_rate={type='constant'}", *changed)


def tree(folder: Path) -> dict[str, str]:
    """Every file but the lock, by its content."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that was said, without a traceback."""
    lines = [line for line in capfd.readouterr().err.split("\n") if line.startswith(("error:", "Traceback"))]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), lines
    return lines[0]


def test_the_resumed_run_is_the_unbroken_one_when_nothing_is_changed(resume, output, unbroken):
    """The valid twin of all that follows."""
    assert resume() == 0 and runs.digests(output) == unbroken


def test_what_moves_no_weight_may_change(resume, output, unbroken, capfd):
    changed = ("run.keep=5", "run.checkpoint_every=4", "run.micro_batch=3", "run.name='other'", "trigger='cat'")
    assert resume(*changed) == 0 and runs.digests(output) == unbroken
    assert "changed since samples-0000000012: run.keep: 2 -> 5" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ("run.seed=1", "run.seed: 0 -> 1"),
        ("run.batch_size=8", "run.batch_size: 4 -> 8"),
        ("run.ema=0.5", "run.ema: 0.95 -> 0.5"),
        ("run.clip_norm=0.5", "run.clip_norm: 1.0 -> 0.5"),
        ("optimizer.lr=0.002", "optimizer.lr: 0.001 -> 0.002"),
        ("optimizer={type='adamw8bit'}", 'optimizer.type: "adamw" -> "adamw8bit"'),
        ("method.rank=8", "method.rank: 4 -> 8"),
        ("pictures.flip=false", "pictures.flip: true -> false"),
        ("captions.dropout=0.0", "captions.dropout: 0.3 -> 0.0"),
        ("objective={}", 'objective.weighting.type: "min_snr" -> "uniform"'),
        ("learning_rate={type='linear'}", 'learning_rate.type: "constant" -> "linear"'),
    ],
)
def test_a_change_of_course_is_listed_and_refused(changed, line, resume, output, capfd):
    before = tree(output)
    assert resume("learning_rate={type='constant'}", changed) == 2
    captured = capfd.readouterr()
    assert f"changed since samples-0000000012: {line}" in captured.out
    error = next(text for text in captured.err.split("\n") if text.startswith("error:"))
    assert line.split(":")[0] in error and "run.accept_changes = true" in error
    assert tree(output) == before


def test_an_accepted_change_takes_effect(resume, output, unbroken):
    assert resume("optimizer.weight_decay=0.5", "run.accept_changes=true") == 0
    changed = runs.digests(output)
    assert changed["samples_seen"] == 20 and changed["trainable.safetensors"] != unbroken["trainable.safetensors"]
    groups = dict(dict(changed["optimizer"]["items"])["param_groups"]["list"][0]["items"])
    assert groups["weight_decay"] == 0.5


def test_another_optimizer_begins_anew_where_it_is_accepted(resume, output, capfd):
    pytest.importorskip("bitsandbytes")
    assert resume("optimizer={type='adamw8bit',lr=1e-3}", "run.accept_changes=true") == 0
    assert "the optimizer is another one now and begins anew" in capfd.readouterr().out
    assert runs.places(output)[-1] == 20


def test_weights_of_another_shape_do_not_fit_though_the_change_is_accepted(resume, output, capfd):
    before = tree(output)
    assert resume("method.rank=8", "run.accept_changes=true") == 8
    assert "does not fit this run" in (error := refusal(capfd)) and "samples-0000000012" in error
    assert tree(output) == before


@pytest.fixture
def moved(ground, tmp_path) -> runs.Ground:
    """Base and pictures at another place."""
    return runs.Ground(Path(shutil.copytree(ground.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))))


def test_base_and_data_may_be_moved(moved, output, unbroken, capfd):
    assert moved.run("lora", output, WHOLE, "learning_rate={type='constant'}") == 0
    assert runs.digests(output) == unbroken
    out = capfd.readouterr().out
    assert "changed since samples-0000000012: model.base: " in out and "going on from" in out


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def another_schedule(moved: runs.Ground) -> None:
    file = moved.folder / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("scaled_linear", "linear"))


OTHER = {
    "the captions": lambda moved: (moved.pictures / "0.txt").write_text("the red dog"),
    "the pictures": lambda moved: Image.new("RGB", runs.SIZES[0]).save(moved.pictures / "0.png"),
    "the base's unet": lambda moved: flip_a_bit(moved.folder / "base" / "unet" / "diffusion_pytorch_model.safetensors"),
    "the base's text_encoder": lambda moved: flip_a_bit(moved.folder / "base" / "text_encoder" / "model.safetensors"),
    "the base's schedule": another_schedule,
}


@pytest.mark.parametrize("what", OTHER)
def test_other_contents_are_refused_by_what_they_are_of_wherever_they_lie(what, moved, output, capfd):
    before = tree(output)
    OTHER[what](moved)
    assert moved.run("lora", output, WHOLE, "learning_rate={type='constant'}") == 2
    assert refusal(capfd).startswith(f"error: {what}: changed since {output}/checkpoints/samples-0000000012; ")
    assert tree(output) == before


@pytest.mark.parametrize(
    ("setting", "what"),
    [("weight=2.0", "the pictures' weights"), ("repeats=2", "the pictures' repeats"), ("prompt='a'", "the captions")],
)
def test_other_settings_of_the_data_are_refused_by_what_they_change(setting, what, resume, ground, output, capfd):
    before = tree(output)
    assert resume(f"data=[{{type='folder',path='{ground.pictures}',{setting}}}]") == 2
    captured = capfd.readouterr()
    assert setting.split("=")[0] in next(
        line for line in captured.out.split("\n") if "samples-0000000012: data" in line
    )
    assert f"error: {what}: changed since {output}/checkpoints/samples-0000000012; " in captured.err
    assert tree(output) == before


def test_a_torn_newest_checkpoint_is_skipped_with_a_warning(resume, output, unbroken, capfd):
    file = output / "checkpoints" / "samples-0000000012" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert resume() == 0 and runs.digests(output) == unbroken
    out = capfd.readouterr().out
    assert out.count("warning: skipped") == 1 and str(file) in out and "going on from" in out
    assert [row["samples_seen"] for row in runs.updates(output)] == [4, 8, 12, 16, 20]  # 12 was done again


def test_a_torn_checkpoint_that_is_asked_for_by_name_is_refused(resume, output, capfd):
    folder = output / "checkpoints" / "samples-0000000012"
    (folder / "trainable.safetensors").write_bytes(b"")
    before = tree(output)
    assert resume(f"run.resume='{folder}'") == 8
    assert str(folder) in refusal(capfd) and tree(output) == before
    assert resume("run.resume='nowhere'") == 8
    assert "nowhere" in refusal(capfd)


def test_a_run_whose_checkpoints_are_all_torn_does_not_begin_anew_in_silence(resume, output, capfd):
    for folder in (output / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    before = tree(output)
    assert resume() == 8
    assert "no whole checkpoint is left; choose another run.output" in refusal(capfd) and tree(output) == before


def test_a_run_can_go_back_to_an_older_checkpoint_and_on_from_there(resume, output, unbroken):
    assert resume(f"run.resume='{output / 'checkpoints' / 'samples-0000000008'}'") == 0
    assert runs.digests(output) == unbroken
    assert [row["samples_seen"] for row in runs.updates(output)] == [4, 8, 12, 16, 20]


def test_a_used_folder_is_refused_where_nothing_is_to_be_resumed(resume, output, capfd):
    before = tree(output)
    assert resume("run.resume='never'") == 2
    assert "holds a run already; choose another, or resume = 'auto'" in refusal(capfd) and tree(output) == before


def test_a_loss_that_is_not_finite_stops_before_the_update(resume, output, unbroken, monkeypatch, capfd):
    loss, first = Objective.loss, []

    def spoilt(self: Objective, model: Any, batch: Any, t: Any = None) -> Any:
        good = loss(self, model, batch, t)
        if not first:
            first.append(batch.positions[0].sample)
            good.weighted.data[0] = float("nan")
        return good

    before = tree(output / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "loss", spoilt)
        assert resume() == 6
    error = refusal(capfd)
    assert "the loss is not finite" in error
    assert f"/{first[0]}.png; " in error and error.count(".png") == 1 and "lower optimizer.lr" in error
    assert tree(output / "checkpoints") == before
    assert resume() == 0 and runs.digests(output) == unbroken


def test_a_learning_rate_that_explodes_leaves_nothing_that_is_not_finite_on_the_disk(ground, tmp_path, capfd):
    code = ground.run(
        "lora", tmp_path, "run.updates=20", "optimizer.lr=1e30", "run.checkpoint_every=4", "run.clip_norm=0.0"
    )
    assert code == 6 and "not finite" in refusal(capfd)
    files = list(tmp_path.rglob("*.safetensors"))
    assert all(torch.isfinite(tensor).all() for file in files for tensor in load_file(file).values())


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """`full_disk(n)`: no file can grow past n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_checkpoints_and_the_run_goes_on_once_there_is_room(
    resume, output, unbroken, full_disk, capfd
):
    before = tree(output / "checkpoints")
    full_disk(60_000)  # the weights do not fit
    assert resume() == 5
    full_disk(resource.RLIM_INFINITY)
    error = refusal(capfd)
    assert "larger than a file may be here" in error and str(output / "checkpoints") in error
    assert tree(output / "checkpoints") == before and not list(output.rglob(".tmp*"))
    assert resume() == 0 and runs.digests(output) == unbroken


def test_a_folder_in_use_is_refused_naming_its_holder_who_is_not_disturbed(resume, output, capfd):
    before = tree(output)
    with lock(output):
        assert resume() == 7
    assert f"is in use by process {os.getpid()} on " in refusal(capfd) and tree(output) == before
    assert resume() == 0  # and the lock that was let go does not block


def test_an_output_that_is_a_file_is_refused(ground, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert ground.run("lora", tmp_path / "file", BEFORE) == 5
    assert "run.output" in refusal(capfd)


def test_half_precision_on_a_cpu_is_refused_for_it_would_silently_be_full(ground, tmp_path, capfd, monkeypatch):
    assert ground.run("lora", tmp_path, BEFORE, "run.precision='fp16'") == 2
    assert "run.precision: fp16 needs a GPU" in refusal(capfd)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # what `accelerate launch --mixed_precision fp16` says
    assert ground.run("lora", tmp_path, BEFORE, "run.precision='auto'") == 2
    assert "run.precision: fp16 needs a GPU" in refusal(capfd)


def test_a_signal_before_the_first_update_ends_the_program_at_once(ground, tmp_path, monkeypatch):
    """While pictures are encoded, which may take hours, there is nothing to be saved."""

    def asked(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(Encoded, "fill_latents", asked)
    assert ground.run("lora", tmp_path, BEFORE) == 143
    assert not (tmp_path / "checkpoints").exists()


def test_an_unreadable_picture_is_named_and_the_run_has_not_begun(ground, tmp_path, capfd):
    copy = runs.Ground(tmp_path / "copy")
    shutil.copytree(ground.folder, copy.folder)
    whole = (copy.pictures / "2.png").read_bytes()
    (copy.pictures / "2.png").write_bytes(whole[: len(whole) // 2])
    assert copy.run("lora", tmp_path / "run", BEFORE) == 3
    assert "2.png" in refusal(capfd) and not (tmp_path / "run" / "checkpoints").exists()
    Image.open(copy.pictures / "3.png").save(copy.pictures / "2.png")
    assert copy.run("lora", tmp_path / "run", BEFORE) == 0
