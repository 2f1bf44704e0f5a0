"""`tuner check` names every fault of a folder and nothing else, and a clean one gives no alarm."""

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tuner.cli import main

TRIGGER = "sks"


def picture(seed: int, size: tuple[int, int] = (96, 96), mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(seed)
    made = Image.new(mode, size, tuple(int(v) for v in draw.integers(0, 256, 3)))
    for _ in range(7):
        x, y, w, h = (int(v) for v in draw.integers(0, min(size), 4))
        ImageDraw.Draw(made).ellipse(
            (x, y, x + w // 2 + 9, y + h // 2 + 9), tuple(int(v) for v in draw.integers(0, 256, 3))
        )
    return made


def add(folder: Path, name: str, seed: int, caption: str | bytes | None = "a sks thing", **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    picture(seed, **options).save(folder / name)  # pyright: ignore[reportArgumentType]
    if caption is not None:
        content = caption if isinstance(caption, bytes) else caption.encode()
        (folder / name).with_suffix(".txt").write_bytes(content)
    return folder / name


def clean(folder: Path, seeds: range = range(12)) -> None:
    for seed in seeds:
        add(folder, f"p{seed:02}.png", seed, f"a sks thing {'abcdefghijklmnopqrstuvwxyz'[seed % 26]}")


def transparent(folder: Path) -> None:
    made = picture(70).convert("RGBA")
    made.paste((0, 0, 0, 0), (0, 0, 30, 30))
    made.save(folder / "x.png")
    (folder / "x.txt").write_text("a sks thing")


def truncated(folder: Path) -> None:
    path = add(folder, "x.png", 50)
    path.write_bytes(path.read_bytes()[:400])


def animated(folder: Path) -> None:
    frames = [picture(60), picture(61)]
    frames[0].save(folder / "x.gif", save_all=True, append_images=frames[1:])
    (folder / "x.txt").write_text("a sks thing")


def copied(folder: Path) -> None:
    shutil.copy(folder / "p03.png", folder / "x.png")
    shutil.copy(folder / "p03.txt", folder / "x.txt")


def saved_again(folder: Path) -> None:
    Image.open(folder / "p03.png").save(folder / "x.jpg", quality=70)
    shutil.copy(folder / "p03.txt", folder / "x.txt")


def another_caption(folder: Path) -> None:
    shutil.copy(folder / "p03.png", folder / "x.png")
    (folder / "x.txt").write_text("a sks dog")


def leaked(folder: Path) -> None:
    shutil.copy(folder / "p05.png", folder.parent / "held out" / "x.png")
    (folder.parent / "held out" / "x.txt").write_text("a sks thing")


def bomb(folder: Path) -> None:
    written = io.BytesIO()
    Image.new("1", (20000, 20000)).save(written, "png")
    (folder / "x.png").write_bytes(written.getvalue())
    (folder / "x.txt").write_text("a sks thing")


def of_one_colour(folder: Path) -> None:
    Image.new("RGB", (96, 96), "green").save(folder / "x.png")
    (folder / "x.txt").write_text("a sks thing")


def said(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if not name.endswith(".txt"):
            (folder / name).with_suffix(".txt").write_text("a sks thing")

    return write


def described(caption: str | bytes | None) -> Callable[[Path], None]:
    return lambda folder: add(folder, "x.png", 50, caption) and None


FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "truncated picture": (truncated, "error", "picture", "x.png"),
    "empty file": (said("x.png", b""), "error", "picture", "x.png"),
    "a web page": (said("x.png", b"<html>404</html>"), "error", "picture", "x.png"),
    "animation": (animated, "error", "picture", "x.gif: has 2 frames"),
    "bomb": (bomb, "error", "picture", "pixels"),
    "other kind": (said("x.heic", b"?"), "error", "kind", "x.heic"),
    "no caption": (described(None), "error", "caption missing", "x.png: has no caption; write x.txt"),
    "empty caption": (described(" \n"), "error", "caption", "x.txt: is empty"),
    "caption in UTF-16": (described("a sks cat".encode("utf-16")), "error", "caption", "x.txt: not UTF-8 at byte 0"),
    "caption with a NUL": (described(b"a sks\0cat"), "error", "caption", "x.txt: holds a NUL byte"),
    "long caption": (described("a sks thing " + "z " * 90), "warning", "caption long", "are cut off"),
    "no trigger": (described("a thing"), "warning", "trigger", "x.png: its caption lacks 'sks'"),
    "shared caption": (lambda f: picture(50).save(f / "p00.jpg"), "error", "caption shared", "p00.jpg and p00.png"),
    "two captions": (
        lambda f: (f / "p00.caption").write_text("x"),
        "error",
        "caption twice",
        "p00.png: has two captions",
    ),
    "caption alone": (lambda f: (f / "x.txt").write_text("x"), "warning", "caption alone", "x.txt"),
    "copy": (copied, "warning", "copies", "x.png"),
    "saved again": (saved_again, "warning", "copies", "look alike"),
    "copy with another caption": (another_caption, "warning", "captions differ", "x.png"),
    "copy in validation": (leaked, "error", "leak", "both trained on and validated with"),
    "small": (lambda f: add(f, "x.png", 50, size=(40, 40)), "warning", "small", "x.png: 40 x 40 is smaller than"),
    "long and narrow": (lambda f: add(f, "x.png", 50, size=(900, 100)), "warning", "cut", "are cut off"),
    "one colour": (of_one_colour, "warning", "flat", "x.png: shows one colour only"),
    "transparent": (transparent, "note", "transparent", "x.png: is transparent"),
}
BESIDE = {"shared caption": {"caption shared"}}
"""Faults that show in more than one way."""


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    clean(tmp_path / "pictures")
    clean(tmp_path / "held out", range(20, 24))
    (tmp_path / "my.toml").write_text(
        f"""
trigger = "{TRIGGER}"
[run]
output = "{tmp_path / "run"}"
epochs = 1.0
[model]
base = "{base}"
[[data]]
type = "folder"
path = "{tmp_path / "pictures"}"
[[observers]]
type = "validation"
data = [{{ type = "folder", path = "{tmp_path / "held out"}" }}]
"""
    )
    return tmp_path / "my.toml"


def check(config: Path, *more: str) -> tuple[int, list[dict[str, str]]]:
    code = main(["check", str(config), "--samples", "0", *more])
    return code, json.loads((config.parent / "run" / "check" / "report.json").read_text())["findings"]


def test_a_clean_set_gives_no_alarm(config, capsys):
    assert check(config) == (0, [])
    assert re.search("0 errors, 0 warnings, 0 notes; made .*report.html", capsys.readouterr().out)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_else(name, config):
    fault, severity, kind, words = FAULTS[name]
    fault(config.parent / "pictures")
    code, found = check(config)
    assert [(f["severity"], f["kind"]) for f in found] == [(severity, kind)], found
    assert words in found[0]["message"]
    assert code == {"error": 3, "warning": 10, "note": 0}[severity]


def test_twenty_faults_in_one_folder_are_all_named_at_once(config):
    folder = config.parent / "pictures"
    names = [name for name in FAULTS if name not in ("shared caption", "two captions", "copy in validation")]
    for number, name in enumerate(names):
        aside = config.parent / "aside"
        clean(aside, range(6))
        before = {path.name for path in aside.iterdir()}
        FAULTS[name][0](aside)
        for path in aside.iterdir():
            if path.name not in before:
                (folder / f"{number:02}").mkdir(exist_ok=True)
                shutil.move(path, folder / f"{number:02}" / path.name)
        shutil.rmtree(aside)
    _, found = check(config)
    for number, name in enumerate(names):
        own = [f for f in found if any(f"/{number:02}/" in file for file in f["files"])]
        kinds = {f["kind"] for f in own}
        assert FAULTS[name][2] in kinds or kinds & {"copies", "captions differ"}, (name, own)
    assert len(names) >= 20


def test_class_pictures_that_show_the_subject_are_named(base, tmp_path):
    for seed in range(4):
        add(tmp_path / "subject", f"{seed}.png", seed, None)
        add(tmp_path / "class", f"{seed}.png", seed + 10, None)
    shutil.copy(tmp_path / "subject" / "2.png", tmp_path / "class" / "x.png")
    (tmp_path / "my.toml").write_text(
        f"""
[run]
output = "{tmp_path / "run"}"
epochs = 1.0
[model]
base = "{base}"
[data]
subject = "{tmp_path / "subject"}"
prompt = "a sks thing"
class_folder = "{tmp_path / "class"}"
class_prompt = "a thing"
"""
    )
    code, found = check(tmp_path / "my.toml")
    assert code == 10 and [f["kind"] for f in found] == ["in two sets"]


def test_the_page_shows_samples_as_the_model_gets_them(config):
    assert main(["check", str(config), "--samples", "3", "pictures.flip=true", "captions.prefix='<b>photo: '"]) == 0
    html = (config.parent / "run" / "check" / "report.html").read_text()
    assert html.count("<div class=sample>") == 3 and html.count("data:image/png;base64,") == 6
    assert "&lt;b&gt;photo: a sks thing" in html and "<b>photo" not in html  # what is text stays text
    told = json.loads((config.parent / "run" / "check" / "report.json").read_text())["samples"]
    assert all(sample["bucket"] == "64 x 64" and sample["size"] == "96 x 96" for sample in told)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_browser_shows_the_page(config, tmp_path):
    """Every picture is drawn: the page has as many colours as they have, and the pictures stand where they should."""
    main(["check", str(config), "--samples", "2"])
    page, shot = config.parent / "run" / "check" / "report.html", tmp_path / "shot.png"
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}", "--window-size=1000,1400",
         page.as_uri()], check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(shot) as drawn:
        assert drawn.size == (1000, 1400)
        assert len(drawn.convert("RGB").getcolors(1 << 24) or ()) > 500


def test_a_config_that_no_recipe_reads_is_refused_by_its_nearest(config, capsys):
    config.write_text(config.read_text().replace("epochs", "epoch"))
    assert main(["check", str(config)]) == 2
    assert "run.epoch: unknown key" in capsys.readouterr().err


def test_a_share_is_held_out_as_a_run_would_do_it(config, capsys):
    pictures = config.parent / "pictures"
    for seed in range(12):  # near copies are on one side, so none of them is a leak
        Image.open(pictures / f"p{seed:02}.png").save(pictures / f"x{seed:02}.jpg", quality=70)
        shutil.copy(pictures / f"p{seed:02}.txt", pictures / f"x{seed:02}.txt")
    code, found = check(config, "observers=[{type='validation',share=0.4}]")
    report = json.loads((config.parent / "run" / "check" / "report.json").read_text())
    trained, held = (int(report["facts"][name].split()[0]) for name in ("train", "validation"))
    assert trained + held == 24 and 0 < held < 24
    assert report["facts"]["showings an epoch"] == f"{trained}" and sum(report["buckets"].values()) == trained
    assert code == 10 and {finding["kind"] for finding in found} == {"copies"} and len(found) > 6  # no leak

    code, found = check(config, "observers=[{type='validation',share=1e-9}]")
    assert code == 3 and "of 24 pictures none would be held out" in next(
        finding["message"] for finding in found if finding["kind"] == "share"
    )
