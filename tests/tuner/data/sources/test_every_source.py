"""Every kind of source gives the same pictures and captions, and says what is wrong with what it is given."""

import csv
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tuner.data.sources.dataset import Dataset
from tuner.data.sources.folder import PictureFolder
from tuner.data.sources.kohya import Kohya
from tuner.data.sources.table import Table
from tuner.data.sources.webdataset import WebDataset
from tuner.errors import DataError, UnsafeError

CAPTIONS = {"a": "a red cat", "b": "赤い猫, größer", "c": "two lines\nof words"}


def png(number: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8 + number, 16), (number * 40, 0, 0)).save(written, "png")
    return written.getvalue()


CONTENTS = {name: png(number) for number, name in enumerate(CAPTIONS)}


def folder(root: Path) -> PictureFolder:
    for name, caption in CAPTIONS.items():
        (root / f"{name}.png").write_bytes(CONTENTS[name])
        (root / f"{name}.caption").write_text(caption, encoding="utf-8")
    return PictureFolder(path=root)


def kohya(root: Path) -> Kohya:
    (root / "1_cat").mkdir()
    folder(root / "1_cat")
    return Kohya(path=root)


def jsonl(root: Path) -> Table:
    for name, content in CONTENTS.items():
        (root / f"{name}.png").write_bytes(content)
    lines = [
        json.dumps({"file_name": f"{n}.png", "text": c.splitlines()}, ensure_ascii=False) for n, c in CAPTIONS.items()
    ]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Table(path=root / "metadata.jsonl")


def comma(root: Path) -> Table:
    for name, content in CONTENTS.items():
        (root / f"{name}.png").write_bytes(content)
    with (root / "list.csv").open("w", encoding="utf-8-sig", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["image", "said", "times"])
        table.writerows([f"{name}.png", caption, 1] for name, caption in CAPTIONS.items())
    return Table(path=root / "list.csv", image="image", caption="said", repeats="times")


def tar(root: Path) -> WebDataset:
    for shard, names in enumerate([["a", "b"], ["c"]]):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for name in filter(CAPTIONS.__contains__, names):
                words = CAPTIONS[name].encode() if shard else json.dumps({"caption": CAPTIONS[name]}).encode()
                for ending, content in (("png", CONTENTS[name]), ("txt" if shard else "json", words)):
                    member = tarfile.TarInfo(f"x/{name}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return WebDataset(path=root / "*.tar")


def table():
    import datasets

    said = {
        "image": [{"bytes": c, "path": None} for c in CONTENTS.values()],
        "text": [c.splitlines() for c in CAPTIONS.values()],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    return datasets.Dataset.from_dict(said, features=features)


def saved(root: Path) -> Dataset:
    table().save_to_disk(str(root / "saved"))
    return Dataset(path=str(root / "saved"))


def parquet(root: Path) -> Dataset:
    import datasets

    rows = table().cast_column("image", datasets.Image(decode=False))
    rows.to_parquet(str(root / "rows.parquet"))
    return Dataset(path=str(root / "rows.parquet"))


SOURCES = {
    "folder": folder,
    "kohya": kohya,
    "jsonl": jsonl,
    "csv": comma,
    "tar": tar,
    "saved": saved,
    "parquet": parquet,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_gives_the_same_pictures_with_their_captions(kind, tmp_path: Path):
    source = SOURCES[kind](tmp_path)
    for _ in range(2):  # the second time from what was unpacked
        examples = source.examples()
        assert [example.caption for example in examples] == list(CAPTIONS.values())
        assert [example.image.read_bytes() for example in examples] == list(CONTENTS.values())
        assert [example.size for example in examples] == [(8, 16), (9, 16), (10, 16)]


@pytest.mark.parametrize("kind", ["tar", "saved", "parquet"])
def test_what_is_unpacked_once_is_not_unpacked_again_unless_it_changed(kind, tmp_path: Path, monkeypatch):
    source = SOURCES[kind](tmp_path)
    first = source.examples()
    monkeypatch.setattr(type(source), "_read", None)
    assert replace(source, repeats=2).examples() == [replace(example, repeats=2) for example in first]
    for file in tmp_path.rglob("*"):
        os.utime(file, (1, 1))
    with pytest.raises(TypeError):
        source.examples()


def test_pictures_beside_a_parquet_file_are_read_again_where_they_changed_or_are_gone(tmp_path: Path):
    import datasets

    for name, content in CONTENTS.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    rows = {"image": [{"bytes": None, "path": f"{name}.png"} for name in CAPTIONS], "text": [*CAPTIONS.values()]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "list.parquet"))
    source = Dataset(path=str(tmp_path / "list.parquet"))
    first = source.examples()
    assert [example.image.read_bytes() for example in first] == [*CONTENTS.values()]
    (tmp_path / "b.png").write_bytes(png(5))
    second = source.examples()
    assert [example.image.read_bytes() for example in second] == [CONTENTS["a"], png(5), CONTENTS["c"]]
    assert [example.size for example in second] == [(8, 16), (13, 16), (10, 16)]
    assert (second[0], second[2]) == (first[0], first[2])
    (tmp_path / "c.png").unlink()
    with pytest.raises(DataError, match=r"list\.parquet: row 2: image: there is no file .*c\.png"):
        source.examples()


def test_a_caption_column_of_classes_gives_their_names(tmp_path: Path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a cat", "赤い猫"])})
    rows = {"image": [{"bytes": each, "path": None} for each in CONTENTS.values()], "label": [1, 0, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for place in ("saved", "rows.parquet"):
        source = Dataset(path=str(tmp_path / place), caption="label")
        assert [example.caption for example in source.examples()] == ["赤い猫", "a cat", "赤い猫"]
    datasets.Dataset.from_dict({**rows, "label": [1, -1, 0]}, features=features).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(DataError, match="row 1: its caption is empty, or no text"):
        Dataset(path=str(tmp_path / "bare"), caption="label").examples()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_unpacking_that_was_stopped_goes_on(kind, tmp_path: Path, monkeypatch):
    source = SOURCES[kind](tmp_path)
    read = type(source)._read

    def stops(self, *arguments):
        yield next(read(self, *arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(source), "_read", stops)
        with pytest.raises(KeyboardInterrupt):
            source.examples()
    assert [example.caption for example in source.examples()] == list(CAPTIONS.values())


OUTSIDE = ["../secret.png", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x.png", "link.png", "loop"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_table_cannot_reach_outside_its_folder(name, tmp_path: Path):
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(CONTENTS["a"])
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    if name == "loop":
        (inside / "loop").symlink_to(inside / "loop")
    with pytest.raises((UnsafeError, DataError), match=r"metadata.jsonl: line 1: file_name: ") as caught:
        Table(path=inside / "metadata.jsonl").examples()
    assert name == "loop" or isinstance(caught.value, UnsafeError)


WRONG = {
    "no such column": ({"file_name": "a.png", "caption": "x"}, "has no 'text', only 'file_name', 'caption'"),
    "no such file": ({"file_name": "z.png", "text": "x"}, "there is no file"),
    "empty caption": ({"file_name": "a.png", "text": "  "}, "text: is empty"),
    "no caption": ({"file_name": "a.png", "text": None}, "text: is null"),
    "no object": ([1], "no JSON object"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_line_of_a_table_is_named(kind, tmp_path: Path):
    row, message = WRONG[kind]
    (tmp_path / "a.png").write_bytes(CONTENTS["a"])
    (tmp_path / "metadata.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        Table(path=tmp_path / "metadata.jsonl", unlisted="ignore").examples()


def test_a_fifo_is_no_picture_and_nothing_waits_for_it(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    with pytest.raises(DataError, match="there is no file"):
        Table(path=tmp_path / "metadata.jsonl").examples()


def test_pictures_that_a_table_does_not_list_are_not_passed_over(tmp_path: Path):
    source = jsonl(tmp_path)
    (tmp_path / "d.png").write_bytes(CONTENTS["a"])
    with pytest.raises(DataError, match=r"1 pictures beside it are not listed, the first is d.png"):
        source.examples()
    assert len(replace(source, unlisted="ignore").examples()) == 3


@pytest.mark.parametrize("said", ["0", "-1", "1.5", "x", ""])
def test_repeats_of_a_table_are_whole_numbers_above_0(said, tmp_path: Path):
    source = comma(tmp_path)
    text = (tmp_path / "list.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "list.csv").write_text(text.replace("cat,1", f"cat,{said}"), encoding="utf-8")
    with pytest.raises(DataError, match=r"list.csv: line 2: .*times"):
        source.examples()


def test_kohyas_folders_mean_what_their_names_say(tmp_path: Path):
    for name in ("3_sks cat", "1_dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(CONTENTS["a"])
    (tmp_path / "1_dog" / "x.txt").write_text("a brown dog")
    assert [(e.caption, e.repeats) for e in Kohya(path=tmp_path).examples()] == [("a brown dog", 1), ("sks cat", 3)]
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="cats: a folder whose name does not begin with a number"):
        Kohya(path=tmp_path).examples()


def test_masks_belong_to_pictures_by_name_and_size(tmp_path: Path):
    pictures, masks = tmp_path / "p", tmp_path / "m"
    pictures.mkdir(), masks.mkdir()
    source = replace(folder(pictures), masks=masks)
    with pytest.raises(DataError, match=r"3 of 3 pictures have no mask, the first is a.png"):
        source.examples()
    for number, name in enumerate(CAPTIONS):
        Image.new("L", (8 + number, 16)).save(masks / f"{name}.jpg")
    assert [example.mask for example in source.examples()] == [masks / f"{name}.jpg" for name in CAPTIONS]
    Image.new("L", (9, 9)).save(masks / "b.jpg")
    with pytest.raises(DataError, match=r"b.jpg: is not of its picture's size, 9 x 16"):
        source.examples()


def test_two_captions_of_one_picture_are_ambiguous(tmp_path: Path):
    source = folder(tmp_path)
    (tmp_path / "b.txt").write_text("another")
    with pytest.raises(DataError, match=r"b.png: has two captions, b.caption and b.txt"):
        source.examples()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_picture_that_cannot_be_read_is_named_by_its_place_in_the_archive(kind, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(CONTENTS, "b", b"\x89PNG, so it says")
    with pytest.raises(DataError, match=r"(tar: x/b|parquet: row 1): not a readable picture"):
        SOURCES[kind](tmp_path).examples()


def test_a_damaged_tar_file_is_named(tmp_path: Path):
    source = tar(tmp_path)
    file = tmp_path / "0.tar"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"0.tar: "):
        source.examples()


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"has no column 'caption', only image, text; name it in the source's `caption`"
    ):
        replace(parquet(tmp_path), caption="caption").examples()


def test_a_data_set_that_is_nowhere_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"me/pictures: is no file or folder here and could not be had from the hub"):
        Dataset(path="me/pictures").examples()
    with pytest.raises(DataError, match="neither a saved data set nor a folder of parquet files"):
        Dataset(path=str(tmp_path)).examples()


@pytest.mark.parametrize("kind", ["folder", "kohya"])
def test_a_caption_is_found_whatever_the_case_of_its_ending_and_never_passed_over_for_another(kind, tmp_path: Path):
    beside = tmp_path / "10_sks cat"
    beside.mkdir()
    (beside / "a.PNG").write_bytes(png(0))
    (beside / "a.TXT").write_bytes("\ufeffa black cat\r\n".encode())
    source = Kohya(path=tmp_path) if kind == "kohya" else PictureFolder(path=tmp_path, fallback="sks cat")
    assert [example.caption for example in source.examples()] == ["a black cat"]
    (beside / "a.TXT").unlink()
    (beside / "a.txt").symlink_to("gone.txt")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        source.examples()
