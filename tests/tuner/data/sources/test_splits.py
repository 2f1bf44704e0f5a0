"""Files of another split than the one that was asked for are never read: nobody trains on what is held out."""

import io
from pathlib import Path

import pytest
from PIL import Image

from tuner.data.sources.dataset import Dataset, split_of
from tuner.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))


def write(file: Path, caption: str) -> None:
    import datasets

    written = io.BytesIO()
    Image.new("RGB", (8, 8), f"#{abs(hash(caption)) % 0xFFFFFF:06x}").save(written, "png")
    rows = {"image": [{"bytes": written.getvalue(), "path": None}], "text": [caption]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows).to_parquet(str(file))


def captions(source: Dataset) -> list[str]:
    return [example.caption for example in source.examples()]


LAYOUTS = {
    "shards": ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    "names": ("my train_0.parquet", "my_test.parquet"),
    "folders": ("default/train/0000.parquet", "default/test/0000.parquet"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_parquet_files_gives_the_split_that_was_asked_for(layout, tmp_path: Path):
    for name, caption in zip(LAYOUTS[layout], ("to learn", "to be held out"), strict=True):
        write(tmp_path / "set" / name, caption)
    path = str(tmp_path / "set")
    assert captions(Dataset(path=path)) == ["to learn"]
    assert captions(Dataset(path=path, split="test")) == ["to be held out"]
    with pytest.raises(DataError, match="has no split 'validation', only test, train"):
        Dataset(path=path, split="validation").examples()
    write(tmp_path / "set" / "more.parquet", "of which side?")
    with pytest.raises(DataError, match=r"more\.parquet: its name tells no split, but those of others do"):
        Dataset(path=path).examples()


def test_parquet_files_whose_names_tell_nothing_are_training_pictures(tmp_path: Path):
    for number in range(2):
        write(tmp_path / "set" / f"{number}.parquet", f"picture {number}")
    assert captions(Dataset(path=str(tmp_path / "set"))) == ["picture 0", "picture 1"]
    with pytest.raises(DataError, match="has no split 'test', only train"):
        Dataset(path=str(tmp_path / "set"), split="test").examples()


def test_a_file_that_is_named_is_read_whatever_it_is_called_and_options_of_the_hub_are_refused(tmp_path: Path):
    file = tmp_path / "test.parquet"
    write(file, "a test picture")
    assert captions(Dataset(path=str(file))) == captions(Dataset(path=str(file), split="test")) == ["a test picture"]
    with pytest.raises(DataError, match="does not say that it is 'validation'"):
        Dataset(path=str(file), split="validation").examples()
    for source in (Dataset(path=str(file), revision="main"), Dataset(path=str(file), name="main")):
        with pytest.raises(ConfigError, match=r"(revision|name) is said of .* which is here and not on the hub"):
            source.examples()


@pytest.mark.parametrize(
    "name",
    [
        "data/train-00000-of-00003-0a1b.parquet", "data/random-00000-of-00003.parquet", "valid.parquet",
        "a/dev/0.parquet", "my-training 3.parquet", "evaluation_0.parquet", "x.parquet", "contest.parquet",
    ],
)  # fmt: skip
def test_names_tell_the_split_that_the_hubs_library_takes_them_for(name, tmp_path: Path):
    from datasets.data_files import get_data_patterns

    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert [split_of(name) or "train"] == [str(split) for split in get_data_patterns(str(tmp_path))]
