"""Pictures that cannot be decoded are all named, or left out as if they were not there; nothing else is left out."""

import errno
import gc
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tuner.data.sources import test_every_source as every_source
from tests.tuner.data.test_faults import large_png, without_rights
from tests.tuner.data.test_images import quadrants
from tuner.data import images, lookalikes
from tuner.data.broken import find_broken
from tuner.data.cache import Cache
from tuner.data.example import Example
from tuner.data.images import BrokenPicture, Pictures, load_picture
from tuner.data.sources.base import Source, every_example, without
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.sources.folder import PictureFolder
from tuner.data.sources.table import Table
from tuner.errors import DataError, UnsafeError
from tuner.training.watchers import quiet

SKIP = Pictures(broken="skip")


def changed(content: bytes) -> bytes:
    """With other pixels than their check sum is of; the header is whole, and so is the end."""
    place = content.index(b"IDAT") + 10
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "half.png": lambda content: content[: len(content) // 2],
    "end.png": lambda content: content[:-16],
    "header.png": lambda content: content[:33],
    "empty.png": lambda content: b"",
    "page.png": lambda content: b"<!DOCTYPE html><title>404</title>",
    "sum.png": changed,
    "half.jpg": lambda content: content[: len(content) // 2],
    "end.jpg": lambda content: content[:-16],
}


def broken_folder(folder: Path) -> set[str]:
    """Three whole pictures and every fault; the names of those that are broken."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(["a.png", "m.jpg", "z.png", *FAULTS, "rights.png"]):
        quadrants().resize((64 + 4 * number, 64)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("a thing")
        if name in FAULTS:
            (folder / name).write_bytes(FAULTS[name]((folder / name).read_bytes()))
    for name in ("half", "end"):  # of which there are two
        (folder / f"{name}.jpg").rename(folder / f"{name}2.jpg")
        (folder / f"{name}2.txt").write_text("a thing")
    (folder / "rights.png").chmod(0)
    (folder / "folder.png").mkdir()
    return {file.name for file in folder.iterdir() if file.suffix != ".txt"} - {"a.png", "m.jpg", "z.png"}


def skipping(sources: list[Any], cache: Path) -> tuple[list[Example], list[BrokenPicture]]:
    return without(sources, find_broken(sources, SKIP, Cache(cache), quiet))


def test_those_that_are_refused_and_those_that_are_left_out_are_those_that_are_broken():
    with without_rights() as folder:
        names = broken_folder(folder / "pictures")
        assert len(names) == 10
        source = PictureFolder(path=folder / "pictures")
        with pytest.raises(DataError) as caught:
            every_example([source])
        lines = str(caught.value).splitlines()
        assert len(lines) == 10 and {Path(line.split(": ")[0]).name for line in lines} == names

        examples, left_out = skipping([source], folder / "cache")
        assert [example.image.name for example in examples] == ["a.png", "m.jpg", "z.png"]
        assert sorted(map(str, left_out)) == sorted(lines)
        assert {error.file.name for error in left_out} == names and len(left_out) == 10


def test_nothing_is_looked_for_where_it_is_refused(tmp_path: Path):
    broken_folder(tmp_path)
    assert find_broken([PictureFolder(path=tmp_path)], Pictures(), Cache(tmp_path / ".cache"), quiet) == {}


@pytest.mark.parametrize("fault", ["header.png", "sum.png"])
@pytest.mark.parametrize("kind", every_source.SOURCES)
def test_what_is_left_of_every_kind_of_source_is_as_if_the_picture_had_never_been_there(
    kind, fault, tmp_path: Path, monkeypatch
):
    for place in ("with", "without"):
        (tmp_path / place).mkdir()
    with monkeypatch.context() as patch:
        contents = every_source.CONTENTS
        patch.setattr(every_source, "CONTENTS", {**contents, "b": FAULTS[fault](contents["b"])})
        source = every_source.SOURCES[kind](tmp_path / "with")
    if kind in ("tar", "saved", "parquet") and fault == "header.png":
        with pytest.raises(DataError, match=r"(tar: x/b|(parquet|saved): row 1): "):
            source.examples()
    examples: list[Example] = []
    for _ in range(2):  # the second time from what was unpacked and found before
        examples, (error,) = skipping([source], tmp_path / "cache")
        place = {"tar": "tar: x/b: ", "saved": "saved: row 1: ", "parquet": "parquet: row 1: "}.get(kind, "b.png: ")
        assert place in str(error)
        if kind in ("tar", "saved", "parquet"):
            monkeypatch.setattr(type(source), "_read", None)
    monkeypatch.undo()
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "other cache"))
    for name in ("CONTENTS", "CAPTIONS"):
        kept = {key: value for key, value in getattr(every_source, name).items() if key != "b"}
        monkeypatch.setattr(every_source, name, kept)
    never = every_source.SOURCES[kind](tmp_path / "without").examples()

    def held(found: Any) -> list[Any]:
        return [(replace(e, image=Path(), mask=None), e.image.read_bytes()) for e in found]

    assert held(examples) == held(never) and len(never) == 2


def two_frames(folder: Path) -> Source:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "b.png", save_all=True, append_images=frames[1:])
    return PictureFolder(path=folder, prompt="x")


def too_large(folder: Path) -> Source:
    (folder / "b.png").write_bytes(large_png(20_000, 20_000))
    return PictureFolder(path=folder, prompt="x")


def of_unknown_range(folder: Path) -> Source:
    Image.new("F", (8, 8)).save(folder / "b.tif")
    return PictureFolder(path=folder, prompt="x")


def without_caption(folder: Path) -> Source:
    (folder / "a.txt").write_text("a thing")
    quadrants().save(folder / "b.png")
    return PictureFolder(path=folder)


def masked(folder: Path, content: Callable[[Path], object]) -> Source:
    (folder / "masks").mkdir()
    quadrants().save(folder / "b.png")
    for name in ("a", "b", "broken"):
        Image.new("L", quadrants().size, 255).save(folder / "masks" / f"{name}.png")
    content(folder / "masks" / "b.png")
    (folder / "pictures").mkdir()
    for file in folder.glob("*.png"):
        file.rename(folder / "pictures" / file.name)
    return PictureFolder(path=folder / "pictures", prompt="x", masks=folder / "masks")


def outside(folder: Path) -> Source:
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "broken.png", "/b.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Table(path=folder / "metadata.jsonl")


def none_whole(folder: Path) -> Source:
    (folder / "a.png").write_bytes(b"b.png")
    return PictureFolder(path=folder, prompt="x")


KEPT: dict[str, tuple[Callable[[Path], Source], str]] = {
    "several frames": (two_frames, r"b.png: has 2 frames; save the one you mean"),
    "too many pixels": (too_large, r"b.png: has too many pixels|b.png: 20000 x 20000 pixels are too many"),
    "unknown range": (of_unknown_range, r"b.tif: holds floating-point values"),
    "no caption": (without_caption, r"1 of 3 pictures have no caption, the first is b.png"),
    "a broken mask": (lambda f: masked(f, lambda m: m.write_bytes(b"?")), r"masks/b.png: not a readable picture"),
    "a mask of another size": (
        lambda f: masked(f, lambda m: Image.new("L", (9, 9)).save(m)),
        r"masks/b.png: is not of its picture's size",
    ),
    "a file elsewhere": (outside, r"line 3: file_name: '/b.png' is not inside"),
    "nothing whole": (none_whole, r"a.png: not a readable picture \(.*\n.*broken.png: not a readable picture"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_wrong_but_not_broken_is_refused_though_broken_pictures_are_left_out(kind, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    quadrants().save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"?")
    (folder / "broken.txt").write_text("a thing")
    make, words = KEPT[kind]
    source = make(folder)
    with pytest.raises((DataError, UnsafeError), match=words) as caught:
        skipping([source], tmp_path / "cache")
    assert kind == "nothing whole" or "broken.png" not in str(caught.value)


def test_a_picture_is_decoded_once_and_a_broken_one_each_time(tmp_path: Path, monkeypatch):
    for number, name in enumerate(["a.png", "b.png", "c.png"]):
        quadrants().resize((64 + number, 64)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(changed((tmp_path / "b.png").read_bytes()))
    (tmp_path / "copy.png").write_bytes((tmp_path / "b.png").read_bytes())
    decoded: list[str] = []

    def load(file: Path, background: str) -> Image.Image:
        decoded.append(file.name)
        return load_picture(file, background)

    monkeypatch.setattr(lookalikes, "load_picture", load)
    source = PictureFolder(path=tmp_path, prompt="x")
    cache = tmp_path / ".cache"
    examples, left_out = skipping([source], cache)
    assert sorted(decoded) == ["a.png", "b.png", "c.png"]
    decoded.clear()
    assert skipping([source], cache)[0] == examples and decoded == ["b.png"]
    assert [error.file.name for error in left_out] == ["b.png", "copy.png"]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())  # it is mended
    assert [e.image.name for e in skipping([source], cache)[0]] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("kind", ["folder", "jsonl", "tar"])
def test_errors_that_are_kept_hold_no_thread_and_no_picture(kind, tmp_path: Path, monkeypatch):
    """Else the threads would be there until these are cleared away."""
    contents = every_source.CONTENTS
    monkeypatch.setattr(every_source, "CONTENTS", {**contents, "b": FAULTS["header.png"](contents["b"])})
    source = every_source.SOURCES[kind](tmp_path)
    gc.disable()
    try:
        examples, wrong = source.read()
        assert len(examples) == 2 and len(wrong) == 1
        for thread in [each for each in threading.enumerate() if each.name.startswith("ahead")]:
            thread.join(20)
            assert not thread.is_alive()
        assert all(e.__traceback__ is e.__cause__ is e.__context__ is None for e in wrong)
    finally:
        gc.enable()


def test_a_cache_that_is_only_read_stays_as_it_is(tmp_path: Path):
    broken_folder(tmp_path / "data")
    (tmp_path / "cache").mkdir()
    sources = [PictureFolder(path=tmp_path / "data")]
    found = find_broken(sources, SKIP, Cache(tmp_path / "cache", read_only=True), quiet)
    assert len(found) >= 9 and not list((tmp_path / "cache").iterdir())
    assert found == find_broken(sources, SKIP, Cache(tmp_path / "cache"), quiet)


def test_trouble_of_the_machine_is_no_fault_of_a_picture(tmp_path: Path, monkeypatch):
    quadrants().save(tmp_path / "a.png")

    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(images.Image, "open", fails)
    with pytest.raises(DataError, match=r"a.png: cannot be read now \(.*Too many open files\)") as caught:
        load_picture(tmp_path / "a.png", "white")
    assert not isinstance(caught.value, BrokenPicture)


def test_a_broken_class_picture_is_left_out_and_none_is_made_in_its_place(tmp_path: Path):
    for folder, count in (("subject", 2), ("class", 5)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            quadrants().save(tmp_path / folder / f"{number}.png")
    whole = (tmp_path / "class" / "0.png").read_bytes()
    source = Dreambooth(
        subject=tmp_path / "subject", prompt="sks", class_folder=tmp_path / "class", class_prompt="a", class_count=5
    )
    (tmp_path / "class" / "4.png").write_bytes(changed(whole))
    examples, left_out = skipping([source], tmp_path / "cache")
    assert [error.file.name for error in left_out] == ["4.png"] and source.wanted("base", None) == []
    assert [(e.source, e.repeats) for e in examples] == [("subject", 2)] * 2 + [("class", 1)] * 4  # as of 4, not of 5

    for file in (tmp_path / "class").iterdir():
        file.write_bytes(changed(whole))
    with pytest.raises(DataError, match=r"class/0.png: not a readable"):
        skipping([source], tmp_path / "cache")
