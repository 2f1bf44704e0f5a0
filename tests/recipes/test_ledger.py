"""`tuner ledger` says what a run has shown, and does not say what it cannot know."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import runs
from tuner.cli import main
from tuner.data.stream import DataStream

NEVER = "run.checkpoint_every=1000"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each picture was in a batch that a run has trained on."""
    found: Counter[str] = Counter()
    place = DataStream._place

    def placed(self: Any, batch: Any) -> Any:
        found.update(Path(self.name_of(at.sample)).name for micro in batch.micro_batches for at in micro.positions)
        return place(self, batch)

    monkeypatch.setattr(DataStream, "_place", placed)
    monkeypatch.setattr("tuner.training.recipe.write_outcome", lambda *_, **__: None)
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    runs.draw_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


def ledger(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main(["ledger", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["ledger", *map(str, arguments)]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_it_says_what_was_shown_of_a_run_that_was_stopped_and_gone_on_with(
    ground, pictures, tmp_path, shown, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "run"
    more = (f"data=[{{type='folder',path='{pictures}',repeats=2}}]", "pictures.resolution=[32,64]", NEVER)
    assert ground.run("lora", output, *more, "run.updates=2") == 0
    assert ground.run("lora", output, *more, "run.updates=5") == 0
    told = ledger(capsys, output, "--csv", tmp_path / "seen.csv", "--ends", 7)
    assert (told["samples_seen"], told["planned"], told["an_epoch"], told["notes"]) == (20, 20, 14, [])
    assert {Path(line["name"]).name: line["seen"] for line in told["most"]} == dict(shown)
    (source,) = told["sources"]
    assert source["seen"] == [min(shown.values()), max(shown.values())] and source["showings"] == 20
    with (tmp_path / "seen.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["picture"]).name: int(row["seen"]) for row in rows} == dict(shown)
    assert {row["an_epoch"] for row in rows} == {"2"}

    assert main(["ledger", str(output)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("20 of 20 samples seen, 1.43 epochs of 14 samples\n") and "data" in out
    later = ledger(capsys, output, "--samples", 28)  # two epochs
    assert later["sources"][0]["seen"] == [4, 4]


def test_pictures_that_are_held_out_are_not_in_it(ground, pictures, tmp_path, shown, capsys):
    held_out = "observers=[{type='validation',share=0.4,every=1000}]"
    data = f"data=[{{type='folder',path='{pictures}'}}]"
    assert ground.run("lora", tmp_path / "run", data, held_out, "run.updates=5", NEVER) == 0
    told = ledger(capsys, tmp_path / "run", "--ends", 7)
    assert {Path(line["name"]).name: line["seen"] for line in told["least"]} == dict(shown) and 0 < len(shown) < 7


def test_of_a_config_it_says_what_a_run_will_show(ground, tmp_path, capsys):
    file = tmp_path / "my.toml"
    source = f"[[data]]\ntype = 'folder'\npath = '{ground.pictures}'\n"
    file.write_text(
        f"[run]\noutput = '{tmp_path / 'none'}'\nepochs = 8\nbatch_size = 4\n"
        f"[model]\nbase = '{ground.folder / 'base'}'\n{source}{source}source = 'other'\nrepeats = 3\n"
    )
    told = ledger(capsys, file)
    assert told["samples_seen"] == told["planned"] == 8 * 28
    assert [(of["source"], of["an_epoch"], of["seen"]) for of in told["sources"]] == [
        ("data", [1, 1], [8, 8]),
        ("other", [3, 3], [24, 24]),
    ]
    assert ledger(capsys, file, "run.epochs=1")["samples_seen"] == 28


def test_what_it_cannot_know_any_more_it_does_not_say(ground, pictures, tmp_path, shown, capsys):
    output = tmp_path / "run"
    data = f"data=[{{type='folder',path='{pictures}'}}]"
    assert "has no whole checkpoint yet" in refusal_of_none(capsys, ground, output, data)
    assert ground.run("lora", output, data, "run.updates=3", NEVER) == 0

    (pictures / "3.txt").write_text("another caption")
    (pictures / "4.txt").unlink()
    assert ledger(capsys, output)["notes"] == []
    (note,) = ledger(capsys, output, data.replace("}]", ",weight=0.5}]"))["notes"]
    assert note.startswith("the pictures' weights: changed since") and note.endswith("which moves no count")

    Image.new("RGB", (64, 64)).save(pictures / "7.png")
    (pictures / "7.txt").write_text("a new one")
    said = refusal(capsys, output)
    assert said.startswith("error: the pictures, the pictures' repeats: changed since") and "--anyway" in said
    told = ledger(capsys, output, "--anyway")
    assert told["an_epoch"] == 8 and "the counts are of what is there now" in told["notes"][0]
    for file in pictures.glob("7.*"):
        file.unlink()

    said = refusal(capsys, output, "run.seed=1", "pictures.resolution=32")
    assert said.startswith("error: run.seed, pictures.resolution: changed since")
    (note,) = ledger(capsys, output, "run.accept_changes=true")["notes"]
    assert note.startswith("run.accept_changes is set")


def refusal_of_none(capsys: pytest.CaptureFixture[str], ground: runs.Ground, output: Path, data: str) -> str:
    """What is said of a run that has not got to its first checkpoint."""
    assert ground.run("lora", output, data, "run.updates=1", NEVER) == 0
    for file in (output / "checkpoints").rglob("*.json"):
        file.unlink()
    said = refusal(capsys, output)
    for file in sorted(output.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    return said


def test_its_own_mistakes_are_said_in_a_line(tmp_path, capsys):
    for arguments, code, words in (
        ((tmp_path / "none.toml",), 2, "none.toml"),
        ((tmp_path,), 2, "config.toml"),
        ((tmp_path, "--samples", "-1"), 2, "--samples must not be negative"),
        ((tmp_path, "--ends", "-1"), 2, "--ends must not be negative"),
    ):
        assert main(["ledger", *map(str, arguments)]) == code
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and err.startswith("error: ")


def test_check_counts_what_a_run_trains_on_and_writes_nothing(
    ground, pictures, tmp_path, capsys: pytest.CaptureFixture[str]
):
    """Of pictures some of which are held out."""
    output, cache = tmp_path / "run", tmp_path / "cache"
    more = (f"data=[{{type='folder',path='{pictures}'}}]", f"run.cache='{cache}'", "run.epochs=2", "captions.dropout=0")
    held_out = "observers=[{type='validation',share=0.4,every=1000,pictures=1,levels=1}]"
    capsys.readouterr()
    assert ground.run("lora", output, *more, held_out, "--check") == 0
    said = capsys.readouterr().out
    assert not cache.exists() and not output.exists()
    assert ground.run("lora", output, *more, held_out) == 0
    count = ledger(capsys, output)["an_epoch"]
    assert 0 < count < len(runs.SIZES)
    assert f"validation: {len(runs.SIZES) - count} of {len(runs.SIZES)} pictures are held out" in said
    assert f"pictures: {count} of {count} used" in said and f"run: {2 * count} samples" in said
