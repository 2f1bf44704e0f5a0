"""`tuner check` on what lies beside the pictures (masks, guides), on tables and archives, and without a base."""

import base64
import csv
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from recipes.lora import Config as Lora
from tests import tiny
from tests.tuner.audit.test_audit import add, clean, picture
from tuner.cli import main
from tuner.config.loader import load
from tuner.data.cache import Cache
from tuner.data.order import Order
from tuner.data.stream import DataStream, expand
from tuner.families.source import BaseModel
from tuner.training.run import prepare
from tuner.training.watchers import quiet

COUNT = 4


def config(folder: Path, base: Path | str, *sources: str, more: str = "") -> Path:
    file = folder / "my.toml"
    rows = "\n".join(f"[[data]]\n{source}" for source in sources)
    file.write_text(f'{more}\n[run]\noutput = "{folder / "run"}"\nepochs = 1.0\n[model]\nbase = "{base}"\n{rows}\n')
    return file


def found(file: Path, *more: str) -> list[tuple[str, str, str]]:
    """Each finding's severity, kind and message."""
    main(["check", str(file), "--samples", "0", *more])
    report = json.loads((file.parent / "run" / "check" / "report.json").read_text())
    return [(each["severity"], each["kind"], each["message"]) for each in report["findings"]]


def facts(file: Path) -> dict[str, str]:
    main(["check", str(file), "--samples", "0"])
    return json.loads((file.parent / "run" / "check" / "report.json").read_text())["facts"]


# Masks and guides


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Callable[[str], Path]:
    """A base that is told pictures of a kind beside captions; not to be written into."""

    @cache
    def made(kind: str) -> Path:
        channels, name = {
            "mask": (9, "StableDiffusionInpaintPipeline"),
            "depth": (5, "StableDiffusionDepth2ImgPipeline"),
            "picture": (8, "StableDiffusionInstructPix2PixPipeline"),
        }[kind]
        parts = {part: network for part, network in tiny.sd1(in_channels=channels).components.items()}
        if kind == "depth":
            parts = {part: parts[part] for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
            parts |= {"depth_estimator": None, "feature_extractor": None}
        else:
            parts = {part: network for part, network in parts.items() if part != "image_encoder"}
            parts["requires_safety_checker"] = False
        place = tmp_path_factory.mktemp("told") / "base"
        getattr(diffusers, name)(**parts).save_pretrained(place)
        return place

    return made


def half() -> Image.Image:
    made = Image.new("L", (96, 96))
    made.paste(255, (0, 0, 48, 96))
    return made


def beside(folder: Path) -> Path:
    """A whole guide, of any kind, for each picture."""
    clean(folder / "pictures", range(COUNT))
    (folder / "beside").mkdir()
    for seed in range(COUNT):
        half().save(folder / "beside" / f"p{seed:02}.png")
    return folder / "beside"


def truncated(file: Path) -> None:
    picture(9).save(file)
    file.write_bytes(file.read_bytes()[:600])


BESIDE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "absent": (lambda f: f.unlink(), "error", "p02.png: has no {what} "),
    "another's size": (lambda f: picture(9, (96, 64)).save(f), "error", "is not of its picture's size, 96 x 96"),
    "truncated": (truncated, "error", "not a readable picture"),
    "no picture": (lambda f: f.write_bytes(b"?"), "error", "not a readable picture"),
    "two": (lambda f: half().save(f.with_suffix(".webp")), "error", "has two {what}s, p02.png and p02.webp"),
    "black": (lambda f: Image.new("L", (96, 96)).save(f), "error", "is black all over, so nothing counts"),
}


@pytest.mark.parametrize("fault", BESIDE)
@pytest.mark.parametrize("what", ["mask", "guide"])
def test_a_fault_of_what_lies_beside_a_picture_is_named_and_nothing_else(what, fault, base, told, tmp_path):
    change, severity, words = BESIDE[fault]
    place = beside(tmp_path)
    model = told("mask") if what == "guide" else base
    file = config(tmp_path, model, f'type = "folder"\npath = "{tmp_path / "pictures"}"\n{what}s = "{place}"')
    if fault == "absent":  # the first time round, since all of it is long
        assert found(file) == []
    change(place / "p02.png")
    if (what, fault) == ("guide", "black"):
        severity, words = "warning", "is black all over, so nothing is to be painted"
    ((said, kind, message),) = found(file)
    assert (said, kind) == (severity, what) and words.format(what=what) in message and "p02" in message


def test_a_mask_that_shows_nothing_of_what_is_left_by_the_cut_is_named(base, tmp_path):
    place = beside(tmp_path)
    wide = picture(9, (300, 96))
    wide.save(tmp_path / "pictures" / "p02.png")
    mask = Image.new("L", (300, 96))
    mask.paste(255, (0, 0, 20, 96))
    mask.save(place / "p02.png")
    file = config(tmp_path, base, f'type = "folder"\npath = "{tmp_path / "pictures"}"\nmasks = "{place}"')
    kinds = {kind: message for _, kind, message in found(file)}
    assert kinds.keys() == {"mask", "cut"} and "the cut leaves nothing that counts" in kinds["mask"]


def test_black_masks_and_pictures_that_are_transparent_all_over_count_where_the_config_says_so(base, tmp_path):
    place = beside(tmp_path)
    Image.new("L", (96, 96)).save(place / "p01.png")
    add(tmp_path / "other", "clear.png", 7)
    Image.new("RGBA", (96, 96), (9, 9, 9, 0)).save(tmp_path / "other" / "clear.png")
    sources = (
        f'type = "folder"\npath = "{tmp_path / "pictures"}"\nmasks = "{place}"',
        f'type = "folder"\npath = "{tmp_path / "other"}"',
    )
    file = config(tmp_path, base, *sources)
    without = [each for each in found(file, "pictures.alpha='mask'") if each[1] == "mask"]
    assert [severity for severity, _, _ in without] == ["error", "error"]
    assert ["p01" in message or "clear" in message for _, _, message in without] == [True, True]
    weighed = [
        each for each in found(file, "pictures.alpha='mask'", "objective.unmasked_weight=0.1") if each[1] == "mask"
    ]
    assert [severity for severity, _, _ in weighed] == ["warning", "warning"]


NOTHING = {
    "mask": (lambda: Image.new("L", (96, 96), 255), "is white all over, so nothing of the picture is told"),
    "depth": (lambda: Image.new("L", (96, 96), 90), "is of one depth all over"),
    "picture": (lambda: picture(2), "is the same as its picture, so there is no edit to learn"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_guide_that_says_nothing_is_named(kind, told, tmp_path):
    place = beside(tmp_path)
    file = config(tmp_path, told(kind), f'type = "folder"\npath = "{tmp_path / "pictures"}"\nguides = "{place}"')
    assert found(file) == []
    make, words = NOTHING[kind]
    make().save(place / "p02.png")
    ((severity, what, message),) = found(file)
    assert (severity, what) == ("warning", "guide") and f"p02.png: {words}" in message


def test_guides_that_the_base_needs_or_does_not_take_are_named(base, told, tmp_path):
    place = beside(tmp_path)
    bare = f'type = "folder"\npath = "{tmp_path / "pictures"}"'
    needed = found(config(tmp_path, told("depth"), bare))
    assert [(s, k) for s, k, _ in needed] == [("error", "guide")] * COUNT and "has no depth map" in needed[0][2]
    assert found(config(tmp_path, told("mask"), bare)) == []  # inpainting draws its own
    ((severity, kind, message),) = found(config(tmp_path, base, f'{bare}\nguides = "{place}"'))
    assert (severity, kind) == ("error", "guide") and "4 guides, but the base is told captions alone" in message


# Tables and archives


def jsonl(folder: Path) -> str:
    """One whole row, and a row for each thing that can be wrong."""
    for name in ("a", "cut", "d"):
        add(folder, f"{name}.png", ord(name[0]), None)
    truncated(folder / "cut.png")
    (folder / "page.png").write_bytes(b"<html>")
    rows = [
        {"file_name": "a.png", "text": "a thing"},
        {"file_name": "cut.png", "text": "another thing"},
        {"file_name": "page.png", "text": "a page"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "../my.toml", "text": "x"},
        {"file_name": "http://127.0.0.1:9/x.png", "text": "x"},
        {"file_name": "d.png", "text": " "},
        {"text": "x"},
        ["a.png"],
    ]
    lines = [json.dumps(row) for row in rows] + ["{", "[" * 100_000]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    add(folder, "unlisted.png", 77, None)
    return f'type = "table"\npath = "{folder / "metadata.jsonl"}"'


def comma(folder: Path) -> str:
    for name in ("a", "b"):
        add(folder, f"{name}.png", ord(name), None)
    with (folder / "list.csv").open("w", newline="") as opened:
        table = csv.writer(opened)
        table.writerows(
            [
                ["file_name", "text", "times"],
                ["a.png", "a thing", 1],
                ["b.png", "x"],
                ["c.png", "x", 1],
                ["b.png", "b", 0],
            ]
        )
    return f'type = "table"\npath = "{folder / "list.csv"}"\nrepeats = "times"'


def png(seed: int) -> bytes:
    written = io.BytesIO()
    picture(seed).save(written, "png")
    return written.getvalue()


def tar(folder: Path) -> str:
    members = {
        "0/a.png": png(1), "0/a.txt": b"a thing", "0/b.png": b"?", "0/b.txt": b"x", "0/c.png": png(2),
        "0/d.png": png(3), "0/d.txt": "größer".encode("latin-1"), "0/e.txt": b"x", "0/f.png": png(4), "0/f.json": b"{",
        "1/g.png": png(5), "1/g.json": b'{"caption": ["another", "thing"]}',
    }  # fmt: skip
    for shard in "01":
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for name, content in members.items():
                if name.startswith(shard):
                    member = tarfile.TarInfo(name[2:])
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    whole = (folder / "1.tar").read_bytes()
    (folder / "2.tar").write_bytes(whole[:700])
    return f'type = "webdataset"\npath = "{folder}"'


def parquet(folder: Path) -> str:
    import datasets

    rows: list[Any] = [
        ({"bytes": png(1), "path": None}, "a thing"),
        ({"bytes": b"?", "path": None}, "x"),
        ({"bytes": None, "path": None}, "x"),
        ({"bytes": None, "path": "../my.toml"}, "x"),
        ({"bytes": None, "path": "/etc/passwd"}, "x"),
        ({"bytes": None, "path": "http://127.0.0.1:9/x.png"}, "x"),
        ({"bytes": None, "path": "gone.png"}, "x"),
        ({"bytes": png(2), "path": None}, None),
        ({"bytes": png(3), "path": None}, "another thing"),
    ]
    table = {"image": [row[0] for row in rows], "text": [row[1] for row in rows]}
    datasets.Dataset.from_dict(table).to_parquet(str(folder / "rows.parquet"))
    return f'type = "dataset"\npath = "{folder / "rows.parquet"}"'


TABLES: dict[str, tuple[Callable[[Path], str], int, list[str]]] = {
    "jsonl": (
        jsonl,
        1,
        [
            "cut.png: not a readable",
            "page.png: not a readable",
            "line 4: file_name: there is no file",
            "line 5: file_name: '../my.toml' is not inside",
            "line 6: file_name: 'http://127.0.0.1:9/x.png' is not inside",
            "line 7: text: is empty",
            "line 8: has no 'file_name'",
            "line 9: no JSON object",
            "line 10: no JSON",
            "line 11: no JSON",
            "1 pictures beside it are not listed, the first is unlisted.png",
        ],
    ),
    "csv": (
        comma,
        1,
        ["line 3: has more or fewer columns", "line 4: file_name: there is no", "line 5: times: must be"],
    ),
    "tar": (
        tar,
        2,
        [
            "0.tar: b: not a readable",
            "0.tar: c: its caption is empty",
            "d.txt: cannot be read",
            "0.tar: e: has a caption and no picture",
            "f.json: cannot be read",
            "2.tar: g: cannot be read",
        ],
    ),
    "parquet": (
        parquet,
        2,
        [
            "row 1: not a readable",
            "row 2: image: holds no picture's bytes",
            "row 3: image: '../my.toml' is not inside",
            "row 4: image: '/etc/passwd' is not inside",
            "row 5: image: 'http://127.0.0.1:9/x.png' is not inside",
            "row 6: image: there is no file",
            "row 7: its caption is empty",
        ],
    ),
}
"""What makes it, its whole rows, and what is said of each of the others."""


@pytest.mark.parametrize("kind", TABLES)
def test_all_that_is_wrong_with_a_table_or_archive_is_said_and_the_rest_is_looked_at(kind, base, tmp_path):
    make, whole, words = TABLES[kind]
    (tmp_path / "data").mkdir()
    source = make(tmp_path / "data")
    file = config(tmp_path, base, source)
    listed = found(file)
    assert [severity for severity, _, _ in listed] == ["error"] * len(words), listed
    messages = [message for _, _, message in listed]
    for said in words:
        assert sum(said in message for message in messages) == 1, (said, messages)
    assert facts(file)["train"] == f"{whole} pictures"


def test_folders_of_kohya_with_wrong_names_do_not_hide_what_is_in_the_others(base, tmp_path):
    for name in ("3_sks thing", "cats", "dogs"):
        add(tmp_path / "data" / name, "x.png", 1, None)
    truncated(tmp_path / "data" / "3_sks thing" / "y.png")
    messages = [
        message for _, _, message in found(config(tmp_path, base, f'type = "kohya"\npath = "{tmp_path / "data"}"'))
    ]
    assert len(messages) == 3 and "cats: a folder" in messages[0] and "dogs: a folder" in messages[1]
    assert "y.png: not a readable" in messages[2]


# DreamBooth


def dreambooth(folder: Path, base: Path | str) -> Path:
    for seed in range(3):
        add(folder / "subject", f"{seed}.png", seed, None)
    for seed in range(8):
        add(folder / "class", f"{seed}.png", seed + 10, None)
    file = folder / "my.toml"
    file.write_text(
        f'[run]\noutput = "{folder / "run"}"\nepochs = 1.0\n[model]\nbase = "{base}"\n[data]\n'
        f'subject = "{folder / "subject"}"\nprompt = "a sks thing"\nclass_folder = "{folder / "class"}"\n'
        'class_prompt = "a thing"\nclass_count = 10\n'
    )
    return file


def test_dreambooths_facts_are_those_of_the_run(base, tmp_path):
    file = dreambooth(tmp_path, base)
    assert found(file) == []
    said = facts(file)
    assert (said["train"], said["class"]) == ("3 pictures", "8 pictures")
    assert said["showings an epoch"] == str(3 * 3 + 10)  # 10 / 3 is about 3
    assert said["still to be made by the base"] == "2 class pictures"
    shutil.rmtree(tmp_path / "class")
    assert facts(file)["showings an epoch"] == str(3 * 3 + 10)
    told = (line for line in file.read_text().splitlines() if not line.startswith(("class_folder", "class_count")))
    file.write_text("\n".join([*told, "prior_prediction = true"]))
    assert facts(file)["showings an epoch"] == str(3 + 3)  # each as the subject, and as one of its class


def test_class_pictures_that_another_base_made_are_named(base, tmp_path):
    file = dreambooth(tmp_path, base)
    record = {"base": "another", "contents": "1f", "prompt": "a thing", "pictures": ["0.png"]}
    (tmp_path / "class" / "generated.json").write_text(json.dumps(record))
    ((severity, kind, message),) = found(file)
    assert (severity, kind) == ("error", "class") and "was made by the base 'another', not by" in message


# The base


def test_all_that_is_wrong_with_pictures_is_said_before_a_base_is_opened_and_also_without_one(
    base, tmp_path, monkeypatch
):
    clean(tmp_path / "pictures", range(COUNT))
    truncated(tmp_path / "pictures" / "p01.png")
    (tmp_path / "pictures" / "p02.png").write_bytes(b"")
    shutil.copy(tmp_path / "pictures" / "p03.png", tmp_path / "pictures" / "p03 copy.png")
    (tmp_path / "pictures" / "p03 copy.txt").write_text("a sks {thing")
    source = f'type = "folder"\npath = "{tmp_path / "pictures"}"'
    words = [
        ("error", "picture", "p01.png: not a readable"),
        ("error", "picture", "p02.png: not a readable"),
        ("warning", "captions differ", "p03 copy.png"),
        ("error", "base", "is no folder here"),
        ("error", "caption", "is not closed"),
    ]
    listed = found(config(tmp_path, "no/where", source), "captions.wildcards=true")
    assert [each[:2] for each in listed] == [each[:2] for each in words]
    assert all(said in each[2] for each, (_, _, said) in zip(listed, words, strict=True))

    opened: list[int] = []
    open_ = BaseModel.open

    def opening(self: BaseModel, *arguments: Any) -> Any:
        opened.append(1)
        assert (tmp_path / "cache" / "hashes.sqlite").is_file()  # the copies have been looked for
        return open_(self, *arguments)

    monkeypatch.setattr(BaseModel, "open", opening)
    assert len(found(config(tmp_path, base, source), f"run.cache='{tmp_path / 'cache'}'")) == 3 and opened


# What the page shows


def test_samples_are_what_the_first_epoch_of_a_run_shows(base, tmp_path):
    """With all that chance does on: cuts, variants, mirrors, areas, repeats, and words of captions."""
    for index, size in enumerate([(96, 64), (64, 150), (200, 90)]):
        add(tmp_path / "pictures", f"{index}.png", index, "a {red|blue|green} thing, b, c, d", size=size)
    chance = [
        "pictures={resolution=[64,32],areas='each',crop='random',variants=3,flip=true}",
        "captions={wildcards=true,shuffle=true}",
        "run.seed=5",
    ]
    source = f'type = "folder"\npath = "{tmp_path / "pictures"}"\nrepeats = 3'
    file = config(tmp_path, base, source)
    assert main(["check", str(file), "--samples", "99", *chance]) == 0
    report = json.loads((tmp_path / "run" / "check" / "report.json").read_text())

    settings = load(Lora, file, chance)
    model = settings.model.open(torch.device("cpu"))
    examples = settings.data[0].examples()
    encoded = prepare(model, examples, settings.pictures, Cache(tmp_path / "cache"), settings.captions)
    encoded.fill_latents(model, encoded.missing_latents(), quiet)
    samples = expand([example.repeats for example in encoded.examples])
    order = Order(buckets=tuple(encoded.sizes[i] for i in samples), seed=5, batch_size=len(samples))
    stream = DataStream(
        model=model, encoded=encoded, captions=settings.captions, order=order, micro_batch=4, rank=0, world=1,
        device=torch.device("cpu"), learns_text=True,
    )  # fmt: skip
    shown: dict[int, tuple[str, list[int]]] = {}
    for micro in next(stream(0)).micro_batches:
        assert micro.frame is not None
        frames = [[int(value) for value in frame] for frame in micro.frame.tolist()]
        shown |= {at.sample: row for at, *row in zip(micro.positions, micro.captions, frames, strict=True)}
    first = [shown[3 * example] for example in range(len(encoded.examples))]
    expected = sorted(
        (Path(example.image).name, caption, f"{width} x {height}", f"{across} x {down}", f"{left}, {top}")
        for example, (caption, (height, width, top, left, down, across)) in zip(encoded.examples, first, strict=True)
    )
    keys = ("caption", "size", "bucket", "cut at")
    assert sorted((Path(s["name"]).name, *(s[key] for key in keys)) for s in report["samples"]) == expected
    assert len(expected) == 6 and report["facts"]["showings an epoch"] == str(len(samples)) == "18"
    assert report["facts"]["resolution"].startswith("64, 32, in steps of 8")


def pictures_of(page: str) -> list[np.ndarray]:
    """All that a page draws, `[H, W, 3]` each."""
    found = re.findall(r"data:image/png;base64,([^']+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")).astype(int) for each in found]


@pytest.mark.parametrize("kind", ["mask", "depth", "picture"])
def test_the_page_shows_what_counts_and_what_the_model_is_told(kind, told, tmp_path):
    place = beside(tmp_path)
    for file in sorted(place.iterdir())[1:]:
        for folder in (place, tmp_path / "pictures"):
            (folder / file.name).unlink()
    Image.linear_gradient("L").resize((96, 96)).save(tmp_path / "depth.png")
    (tmp_path / "guides").mkdir()
    shutil.copy(tmp_path / "depth.png" if kind == "depth" else place / "p00.png", tmp_path / "guides" / "p00.png")
    source = f'type = "folder"\npath = "{tmp_path / "pictures"}"\nmasks = "{place}"\nguides = "{tmp_path / "guides"}"'
    assert (
        main(["check", str(config(tmp_path, told(kind), source)), "--samples", "1"]) == 10
    )  # captions without pictures
    page = (tmp_path / "run" / "check" / "report.html").read_text()
    seen, decoded, counts, guide = pictures_of(page)
    assert seen.shape == decoded.shape == guide.shape == (64, 64, 3) and counts.shape == (8, 8, 3)
    assert counts[:, :4].min() == 255 and counts[:, 4:].max() == 0
    if kind == "depth":
        assert guide[0].mean() == 0 and guide[-1].mean() == 255 and np.diff(guide.mean((1, 2))).min() >= 0
    else:
        assert guide[:, :28].min() > 250 and guide[:, 36:].max() < 5
    words = {"mask": "to be painted (white)", "depth": "depth, told", "picture": "before the edit, told"}
    assert "what counts in the loss (white)" in page and words[kind] in page


def test_findings_show_the_pictures_that_they_are_about(base, tmp_path):
    clean(tmp_path / "pictures", range(COUNT))
    shutil.copy(tmp_path / "pictures" / "p01.png", tmp_path / "pictures" / "x.png")
    shutil.copy(tmp_path / "pictures" / "p01.txt", tmp_path / "pictures" / "x.txt")
    truncated(tmp_path / "pictures" / "p02.png")
    file = config(tmp_path, base, f'type = "folder"\npath = "{tmp_path / "pictures"}"')
    assert main(["check", str(file), "--samples", "0"]) == 3
    one, other = pictures_of((tmp_path / "run" / "check" / "report.html").read_text())
    assert (one == other).all() and (one == np.asarray(picture(1)).astype(int)).all()


def test_a_picture_whose_caption_cannot_be_read_is_named_and_not_shown(base, tmp_path):
    clean(tmp_path / "pictures", range(COUNT))
    (tmp_path / "pictures" / "p01.txt").write_text("a {thing")
    file = config(tmp_path, base, f'type = "folder"\npath = "{tmp_path / "pictures"}"')
    assert main(["check", str(file), "captions.wildcards=true"]) == 3
    report = json.loads((tmp_path / "run" / "check" / "report.json").read_text())
    assert [each["kind"] for each in report["findings"]] == ["caption"] and len(report["samples"]) == COUNT - 1


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_a_mask_of_which_some_cuts_leave_nothing_is_named_where_there_are_such(crop, base, tmp_path):
    place = beside(tmp_path)
    picture(9, (600, 96)).save(tmp_path / "pictures" / "p02.png")
    mask = Image.new("L", (600, 96))
    mask.paste(255, (295, 40, 305, 50))  # in the middle
    mask.save(place / "p02.png")
    file = config(tmp_path, base, f'type = "folder"\npath = "{tmp_path / "pictures"}"\nmasks = "{place}"')
    options = ["pictures.crop='random'", "pictures.variants=16"] if crop == "random" else []
    messages = [message for _, kind, message in found(file, *options) if kind == "mask"]
    assert len(messages) == (crop == "random") and all("p02.png: some cuts leave nothing" in m for m in messages)


def test_a_base_that_is_told_nothing_needs_no_captions_and_what_they_are_is_no_matter(tmp_path):
    tiny.ddpm().save_pretrained(tmp_path / "base")
    clean(tmp_path / "pictures", range(COUNT))
    (tmp_path / "pictures" / "p01.txt").unlink()
    (tmp_path / "pictures" / "p02.txt").write_bytes(b"\xff")
    jsonl = tmp_path / "listed" / "metadata.jsonl"
    add(tmp_path / "listed", "a.png", 20, None)
    jsonl.write_text('{"file_name": "a.png"}')
    truncated(tmp_path / "pictures" / "p03.png")
    sources = [f'type = "folder"\npath = "{tmp_path / "pictures"}"', f'type = "table"\npath = "{jsonl}"']
    file = config(tmp_path, tmp_path / "base", *sources)
    ((severity, kind, message),) = found(file)
    assert (severity, kind) == ("error", "picture") and "p03.png" in message
    assert facts(file)["train"] == "4 pictures"
    assert main(["check", str(file), "--samples", "9"]) == 3
    report = json.loads((tmp_path / "run" / "check" / "report.json").read_text())
    assert [sample["caption"] for sample in report["samples"]] == [""] * 4
    kinds = [kind for _, kind, _ in found(file, "captions.prefix='photo of '")]
    assert kinds == ["picture", "captions"]


def test_a_caption_that_is_no_class_of_the_base_is_named(tmp_path):
    tiny.ddpm(num_class_embeds=2).save_pretrained(tmp_path / "base")
    clean(tmp_path / "pictures", range(2))
    for name, caption in (("p00", "cat"), ("p01", "dgo")):
        (tmp_path / "pictures" / f"{name}.txt").write_text(caption)
    source = f'type = "folder"\npath = "{tmp_path / "pictures"}"'
    ((severity, kind, message),) = found(config(tmp_path, tmp_path / "base", source), "model.classes=['cat','dog']")
    assert (severity, kind) == ("error", "caption") and "p01.png: caption 'dgo': is no class" in message
    assert "did you mean 'dog'?" in message


# Files of several pictures, and links


def test_a_telephones_picture_of_several_is_noted_and_a_link_to_a_folder_is_said(base, tmp_path):
    clean(tmp_path / "pictures", range(COUNT))
    written = io.BytesIO()
    picture(30).save(written, "MPO", save_all=True, append_images=[picture(31)])
    (tmp_path / "pictures" / "photo.jpg").write_bytes(written.getvalue())
    (tmp_path / "pictures" / "photo.txt").write_text("a sks thing")
    clean(tmp_path / "more", range(10, 12))
    (tmp_path / "pictures" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "pictures" / "loop").symlink_to(tmp_path / "pictures")
    listed = found(config(tmp_path, base, f'type = "folder"\npath = "{tmp_path / "pictures"}"'))
    assert [each[:2] for each in listed] == [("error", "source"), ("error", "source"), ("note", "first of several")]
    assert "photo.jpg: holds 2 pictures, such as a depth map; the first is taken" in listed[2][2]
    assert "loop: is a link to a folder, which is not followed" in listed[0][2]


def test_captions_in_capitals_are_read_and_those_without_a_picture_said(base, tmp_path):
    clean(tmp_path / "pictures", range(COUNT))
    pictures = tmp_path / "pictures"
    (pictures / "p00.txt").rename(pictures / "p00.TXT")
    (pictures / "gone.Txt").write_text("a sks thing")
    listed = found(config(tmp_path, base, f'type = "folder"\npath = "{pictures}"\nfallback = "a thing"'))
    assert [each[:2] for each in listed] == [("warning", "caption alone")]
    assert "gone.Txt: a caption without a picture" in listed[0][2]
