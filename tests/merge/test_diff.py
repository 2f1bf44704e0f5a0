"""`tuner merge diff`, from its words to what it prints and writes."""

import json

import pytest

from merge.diff import Config, called, main, read
from tests.merge.models import network, saved, tuned
from tuner.errors import ConfigError
from tuner.weights.checkpoint import open_store
from tuner.weights.layouts.ldm import from_diffusers
from tuner.weights.views import Assembled

BASE = network(1)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A base, two of its fine-tunes, and the working directory."""
    saved(tmp_path / "base.safetensors", BASE)
    for name, seed in (("a", 2), ("b", 3)):
        saved(tmp_path / f"{name}.safetensors", tuned(BASE, seed, 0.05))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_models_are_compared_and_written_where_asked(files, capsys):
    main(read(["a.safetensors", "b.safetensors", "plot=diff.png", "json=diff.json", "tensors=2"]))
    shown = capsys.readouterr().out
    assert shown.startswith("b compared with a\n")
    assert shown.count("  unet.") == 2
    assert "unet: of one base (cosine 0.99" in shown
    plain = json.loads((files / "diff.json").read_text())
    assert plain["models"] == ["a", "b"]
    assert plain["kinship"] == "of one base"
    assert len(plain["tensors"]) == len(BASE)
    assert (files / "diff.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_a_base_are_compared_as_changes_of_it(files, capsys):
    main(read(["a.safetensors", "b.safetensors", "base=base.safetensors", "plot=diff.png", "json=diff.json"]))
    shown = capsys.readouterr().out
    assert shown.startswith("a, b as changes of base\n")
    assert "their plain sum keeps each in full" in shown
    assert json.loads((files / "diff.json").read_text())["base"] == "base"
    assert (files / "diff.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_compared_with_a_single_file_by_the_names_of_the_first(base, tmp_path, capsys):
    folder = open_store(base)
    single = Assembled(folder, from_diffusers(folder.metas).pieces)
    saved(tmp_path / "one.safetensors", {name: single.read(name) for name in single.metas})
    for words in ([str(base), str(tmp_path / "one.safetensors")], [str(tmp_path / "one.safetensors"), str(base)]):
        main(read(words))
        assert "identical: every number is the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.safetensors"], "models: expected two, or more with a base, got 1"),
        (["a.safetensors", "b.safetensors", "base.safetensors"], "models: expected two, or more with a base, got 3"),
        (["a.safetensors", "b.safetensors", "bse=x"], "command line: bse: unknown key; did you mean 'base'?"),
        (["a.safetensors", "b.safetensors", "tensors=-1"], "tensors: must be 0 or more, got -1"),
        (["a.safetensors", "b.safetensors", "json=b.safetensors"], "json: b.safetensors is one of the models; choose"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(files, words, message):
    before = {path: path.read_bytes() for path in files.iterdir()}
    with pytest.raises(ConfigError) as error:
        main(read(words))
    assert message in str(error.value)
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_models_are_called_by_as_much_of_their_paths_as_tells_them_apart(tmp_path):
    assert called([tmp_path / "a.safetensors", tmp_path / "sd1.5"]) == ["a", "sd1.5"]
    assert called([tmp_path / "x" / "unet.safetensors", tmp_path / "y" / "unet.safetensors"]) == ["x/unet", "y/unet"]
    assert len(set(called([tmp_path / "a.safetensors"] * 2))) == 2


def test_a_file_name_with_an_equals_sign_is_a_file(files):
    (files / "a.safetensors").rename(files / "t=0.3.safetensors")
    assert [path.name for path in read(["t=0.3.safetensors", "b.safetensors"]).models] == [
        "t=0.3.safetensors",
        "b.safetensors",
    ]
    assert isinstance(read(["t=0.3.safetensors", "b.safetensors"]), Config)
