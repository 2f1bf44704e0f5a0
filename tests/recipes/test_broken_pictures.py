"""A run that leaves out broken pictures is the run on a folder without them, and says what it left out."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import runs
from tests.recipes.test_several_processes import furthest, launch
from tests.tuner.data.test_broken import changed
from tuner.cli import main
from tuner.families.source import BaseModel

SKIP = "pictures.broken='skip'"
SHORT = ("run.updates=3", "run.checkpoint_every=4")
SHARE = "observers=[{type='validation',share=0.4,every=1000}]"


@pytest.fixture(scope="module", autouse=True)
def no_outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
        yield


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven whole pictures, and two broken ones among them: one by its header, one by its pixels."""
    folder = tmp_path / "pictures"
    runs.draw_pictures(folder)
    for name, content in (("0b", b"<html>"), ("3b", changed((folder / "3.png").read_bytes()))):
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text("the blue cat")
    return folder


@pytest.fixture
def whole(pictures: Path, tmp_path: Path) -> Path:
    """The same without the broken ones."""
    folder = Path(shutil.copytree(pictures, tmp_path / "whole"))
    for file in folder.glob("?b.*"):
        file.unlink()
    return folder


def data(folder: Path) -> str:
    return f"data=[{{type='folder',path='{folder}'}}]"


def listed(output: Path) -> list[str]:
    """The names in the list of what was left out, which says why of each."""
    lines = (output / "left-out.txt").read_text().splitlines()
    assert all("not a readable picture (" in line for line in lines)
    return [Path(line.split(": ")[0]).name for line in lines]


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("more", [(), (SHARE,)], ids=["all", "a share held out"])
def test_a_run_that_leaves_them_out_is_the_run_on_a_folder_without_them(more, ground, pictures, whole, tmp_path, capfd):
    output, other = tmp_path / "run", tmp_path / "other"
    assert ground.run("lora", output, data(pictures), *SHORT, *more) == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [Path(line.split(": ")[1]).name for line in lines] == ["0b.png", "3b.png"]
    assert not (output / "left-out.txt").exists() and not (output / "checkpoints").exists()

    assert ground.run("lora", output, data(pictures), SKIP, *SHORT, *more) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    file = output / "left-out.txt"
    assert said == [f"pictures: 2 cannot be decoded and are left out, such as 0b.png; see {file}"]
    assert listed(output) == ["0b.png", "3b.png"]
    assert ground.run("lora", other, data(whole), SKIP, *SHORT, *more) == 0
    assert runs.digests(output) == runs.digests(other) and runs.updates(output) == runs.updates(other)
    assert not (other / "left-out.txt").exists() and "left out" not in capfd.readouterr().out

    told = []
    for folder in (output, other):
        assert main(["ledger", str(folder), "--json"]) == 0
        told.append(json.loads(capfd.readouterr().out.replace(str(pictures), "").replace(str(whole), "")))
    assert told[0] == told[1] and told[0]["an_epoch"] == (7 if not more else told[0]["sources"][0]["pictures"])


def test_a_run_goes_on_without_them_and_not_with_others(ground, pictures, whole, tmp_path, capfd):
    output, straight = tmp_path / "run", tmp_path / "straight"

    def resume(*more: str) -> tuple[int, str]:
        capfd.readouterr()
        code = ground.run("lora", output, data(pictures), SKIP, *constant, *more)
        return code, capfd.readouterr().out

    constant = ("learning_rate={type='constant'}", *SHORT)
    assert ground.run("lora", straight, data(whole), *constant, "run.updates=5") == 0
    assert resume()[0] == 0
    before = tree(output)

    kept = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(kept[:-9])  # one more breaks
    code, out = resume("run.updates=5")
    assert code == 2 and "changed since samples-0000000012: left out now: 5.png\n" in out and tree(output) == before
    (pictures / "5.png").write_bytes(kept)

    broken = (pictures / "3b.png").read_bytes()
    Image.new("RGB", (64, 64)).save(pictures / "3b.png")  # one is mended
    code, out = resume("run.updates=5")
    assert code == 2 and tree(output) == before
    assert "changed since samples-0000000012: left out then, and not now: 3b.png\n" in out
    (pictures / "3b.png").write_bytes(broken)

    for file in pictures.glob("3b.*"):  # nothing of the course changes when it is removed
        file.unlink()
    assert resume("run.updates=4")[0] == 0 and listed(output) == ["0b.png"]
    for file in pictures.glob("0b.*"):
        file.unlink()
    assert resume("run.updates=5", "pictures.broken='refuse'")[0] == 0
    assert not (output / "left-out.txt").exists()
    assert runs.digests(output) == runs.digests(straight)


def test_two_processes_leave_out_the_same(ground, pictures, whole, tmp_path):
    settings = (*SHORT, "run.micro_batch=2", "optimizer={type='adamw',lr=1e-4}")
    arguments = ground.arguments(tmp_path / "two", *runs.COMMON, *runs.METHODS["lora"], data(pictures), SKIP, *settings)
    launched = launch(2, "recipes/lora", *arguments)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stdout.count("pictures: 2 cannot be decoded") == 1
    assert listed(tmp_path / "two") == ["0b.png", "3b.png"]
    assert ground.run("lora", tmp_path / "one", data(whole), *settings) == 0
    assert furthest(tmp_path / "two", tmp_path / "one") <= 1e-6


def test_checks_say_what_would_be_left_out(ground, pictures, tmp_path, capfd):
    from recipes import lora
    from tuner.config.command_line import run

    arguments = ground.arguments(tmp_path / "run", data(pictures), SKIP, "run.updates=1", f"run.cache='{tmp_path}/c'")
    assert run(lora.Config, lora.main, [*arguments, "--check"], check=lora.check) == 0
    out = capfd.readouterr().out
    assert "pictures: 7 of 9 used" in out and out.count("left out: ") == 2
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists()

    file = tmp_path / "my.toml"
    file.write_text(
        f"[run]\noutput = '{tmp_path}/run'\nepochs = 1\n[model]\nbase = '{ground.folder}/base'\n"
        f"[[data]]\ntype = 'folder'\npath = '{pictures}'\n"
    )

    def findings(code: int, *more: str) -> list[tuple[str, str]]:
        assert main(["check", str(file), "--samples", "0", *more]) == code
        found = json.loads((tmp_path / "run" / "check" / "report.json").read_text())["findings"]
        return [(f["severity"], Path(f["files"][0]).name) for f in found if f["kind"] == "picture"]

    assert findings(3) == [("error", "0b.png"), ("error", "3b.png")]
    assert findings(10, SKIP) == [("warning", "0b.png"), ("warning", "3b.png")]
    measured = f"observers=[{{type='validation',data=[{{type='folder',path='{pictures}',prompt='x'}}]}}]"
    assert ("error", "0b.png") in findings(3, SKIP, measured)
    for picture in pictures.glob("*.png"):
        picture.write_bytes(b"?")
    assert {severity for severity, _ in findings(3, SKIP)} == {"warning"}


def test_pictures_to_measure_on_are_never_left_out(ground, pictures, whole, tmp_path, capfd):
    measured = f"observers=[{{type='validation',data=[{{type='folder',path='{pictures}'}}]}}]"
    assert ground.run("lora", tmp_path / "run", data(whole), SKIP, *SHORT, measured) == 3
    assert "0b.png: not a readable picture" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("gone", "code", "words"),
    [
        (
            ["0b.txt"],
            3,
            ["error: {folder}/0b.png: not a", "warning: {folder}: 1 of 9 pictures have no"],
        ),
        (["0b.png", "3b.png"], 0, []),
        (["0b.png", "3b.png", "4.txt"], 0, ["warning: {folder}: 1 of 7 pictures have no caption, the first is 4.png"]),
    ],
    ids=["broken, and no caption", "whole", "no caption"],
)
def test_what_is_wrong_with_the_data_is_said_before_the_base_is_opened(
    gone, code, words, ground, pictures, tmp_path, capfd, monkeypatch
):
    said: list[str] = []

    def opened(*_: Any, **__: Any) -> None:
        captured = capfd.readouterr()
        said.append(captured.out + captured.err)
        raise SystemExit(0)

    for name in gone:
        (pictures / name).unlink()
    monkeypatch.setattr(BaseModel, "open", opened)
    assert ground.run("lora", tmp_path / "run", data(pictures), *SHORT) == code
    captured = capfd.readouterr()
    text = captured.out + captured.err if code else said[0]
    assert all(f"{word.format(folder=pictures)}" in text for word in words) and len(said) == (code == 0)
    assert ("warning: " in text) == any(word.startswith("warning: ") for word in words)
