import json
import os
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.tuner.weights.test_store import DAMAGED
from tuner import cli
from tuner.errors import ConfigError, DataError, UserError
from tuner.weights import convert as module
from tuner.weights.convert import DTYPES, convert
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

TENSORS = {
    "unet.a": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    "unet.b": torch.randn(7, generator=torch.Generator().manual_seed(1)).half(),
    "vae.c": torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "vae.ids": torch.arange(9),
    "vae.marker": torch.zeros(0),
}


def sources(folder: Path) -> dict[str, Path]:
    """The same tensors in every way in which they may come."""
    folder.mkdir(exist_ok=True)
    save_safetensors(folder / "one.safetensors", TENSORS)
    (folder / "renamed.ckpt").write_bytes((folder / "one.safetensors").read_bytes())
    torch.save({"state_dict": TENSORS, "epoch": 1}, folder / "pickled.ckpt")
    torch.save(TENSORS, folder / "pickled.safetensors")
    place = folder / "pipeline"
    for part in ("unet", "vae"):
        (place / part).mkdir(parents=True)
        own = {name.removeprefix(f"{part}."): tensor for name, tensor in TENSORS.items() if name.startswith(part)}
        save_safetensors(place / part / "diffusion_pytorch_model.safetensors", own)
    (folder / "shards").mkdir()
    files = {name: f"{name[:3]}.safetensors" for name in TENSORS}
    for file in set(files.values()):
        save_safetensors(folder / "shards" / file, {name: TENSORS[name] for name in files if files[name] == file})
    index = folder / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return {path.stem: path for path in (*folder.glob("*.*"), place, index, folder / "shards")}


@pytest.mark.parametrize("kind", ["one", "renamed", "pickled", "pipeline", "model.safetensors.index", "shards"])
def test_every_kind_of_checkpoint_becomes_the_same_file(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    done = convert(sources(tmp_path / "in")[kind], target)
    read = safetensors.torch.load_file(target)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert (done.tensors, done.bytes) == (len(TENSORS), target.stat().st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.safetensors"]


def test_a_pickle_by_another_name_is_known_by_its_content(tmp_path: Path) -> None:
    convert(sources(tmp_path / "in")["one"].with_name("pickled.safetensors"), tmp_path / "out.safetensors")
    assert set(SafetensorsFile(tmp_path / "out.safetensors").metas) == set(TENSORS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_floats_are_cast_with_one_rounding_and_integers_stay(
    dtype: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    convert(sources(tmp_path / "in")["one"], tmp_path / "out.safetensors", dtype=dtype)
    read = SafetensorsFile(tmp_path / "out.safetensors")
    for name, tensor in TENSORS.items():
        expected = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        assert read.metas[name].dtype == expected.dtype
        assert torch.equal(read.read(name).float(), expected.float())


def test_the_command_offers_the_choices_that_there_are() -> None:
    assert set(cli.FLOATS) == set(DTYPES)
    assert set(cli.LAYOUTS) == set(get_args(module.Layout))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_numbers_that_are_too_large_are_refused_and_the_old_file_stays(dtype: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(3), "b": torch.tensor([1.0, 1e9, -1e9])})
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    with pytest.raises(DataError, match=rf"x\.safetensors: 'b': 2 numbers are too large for torch\.{dtype}"):
        convert(tmp_path / "x.safetensors", target, dtype=dtype, overwrite=True)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "x.safetensors"]


def test_what_was_not_finite_before_is_no_overflow(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1.0, float("inf"), float("nan")])}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "out.safetensors", dtype="float16")
    values = SafetensorsFile(tmp_path / "out.safetensors").read("a")
    assert values.isinf().tolist() == [False, True, False] and values.isnan().tolist() == [False, False, True]


def test_a_source_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = sources(tmp_path / "in")
    one, inside = given["one"], given["pipeline"] / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "link.safetensors").symlink_to(one)
    os.link(one, tmp_path / "hard.safetensors")
    monkeypatch.chdir(one.parent)
    before = {path: path.read_bytes() for path in (one, inside)}
    pairs = [
        (one, one),
        (one, Path("one.safetensors")),
        (Path("one.safetensors"), Path("../in/./one.safetensors")),
        (one, tmp_path / "link.safetensors"),
        (tmp_path / "link.safetensors", one),
        (one, tmp_path / "hard.safetensors"),
        (given["pipeline"], inside),
        (given["shards"], given["shards"] / "vae.safetensors"),
    ]
    for source, target in pairs:
        with pytest.raises(ConfigError, match="is read from"):
            convert(source, target, overwrite=True)
    assert before == {path: path.read_bytes() for path in before}


def test_a_file_that_is_there_is_replaced_on_demand_only(tmp_path: Path) -> None:
    source = sources(tmp_path / "in")["one"]
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    with pytest.raises(ConfigError, match="is there already"):
        convert(source, target)
    assert target.read_text() == "old"
    convert(source, target, overwrite=True)
    assert SafetensorsFile(target).metas
    with pytest.raises(ConfigError, match=r"end in \.safetensors"):
        convert(source, tmp_path / "out.ckpt")


def test_a_source_that_shrinks_meanwhile_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    source = sources(tmp_path / "in")["one"]
    target = tmp_path / "out.safetensors"
    target.write_text("old")

    def shrink(written: int, total: int) -> None:
        source.write_bytes(source.read_bytes()[:-1])

    with pytest.raises(DataError, match="changed its size"):
        convert(source, target, overwrite=True, progress=shrink)
    assert target.read_text() == "old"


def test_a_header_keeps_what_is_still_true(tmp_path: Path) -> None:
    texts = {"modelspec.title": "x", "modelspec.hash_sha256": "0x0", "sshs_model_hash": "0", "ss_seed": "1"}
    save_safetensors(tmp_path / "x.safetensors", TENSORS, texts)
    convert(tmp_path / "x.safetensors", tmp_path / "out.safetensors")
    assert SafetensorsFile(tmp_path / "out.safetensors").metadata == {"modelspec.title": "x", "ss_seed": "1"}


def test_scaled_weights_stay_or_become_what_they_mean(tmp_path: Path) -> None:
    numbers = torch.ones(2, 2).to(torch.float8_e4m3fn)
    texts = {"_quantization_metadata": "{}"}
    save_safetensors(tmp_path / "x.safetensors", {"a.weight": numbers, "a.weight_scale": torch.tensor(3.0)}, texts)
    convert(tmp_path / "x.safetensors", tmp_path / "same.safetensors")
    same = SafetensorsFile(tmp_path / "same.safetensors")
    assert set(same.metas) == {"a.weight", "a.weight_scale"} and same.metadata == texts
    convert(tmp_path / "x.safetensors", tmp_path / "meant.safetensors", dtype="float16")
    meant = SafetensorsFile(tmp_path / "meant.safetensors")
    assert set(meant.metas) == {"a.weight"} and meant.read("a.weight").tolist() == [[3, 3], [3, 3]]
    assert "_quantization_metadata" not in meant.metadata


def test_a_folder_becomes_a_single_file_by_its_original_names_and_returns(tmp_path: Path) -> None:
    base = Path(cli.__file__).parent / "base" / "pocket"
    there = convert(base, tmp_path / "single.safetensors", layout="ldm")
    single = SafetensorsFile(tmp_path / "single.safetensors")
    assert "model.diffusion_model.input_blocks.0.0.weight" in single.metas
    assert there.architecture == "Stable Diffusion 1" and there.left_out == 0
    convert(tmp_path / "single.safetensors", tmp_path / "back.safetensors", layout="diffusers")
    convert(base, tmp_path / "direct.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes()[8:] == (tmp_path / "direct.safetensors").read_bytes()[8:]
    again = convert(tmp_path / "single.safetensors", tmp_path / "same.safetensors", layout="ldm")
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "single.safetensors").read_bytes()
    assert again.tensors == there.tensors
    save_safetensors(tmp_path / "x.safetensors", {"unet.strange.weight": torch.ones(1)})
    with pytest.raises(DataError, match=r"x\.safetensors: 'unet\.strange\.weight'"):
        convert(tmp_path / "x.safetensors", tmp_path / "out.safetensors", layout="ldm")


def test_progress_is_told_in_bytes_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    target = tmp_path / "out.safetensors"
    convert(sources(tmp_path / "in")["one"], target, progress=lambda *bytes: told.append(bytes))
    assert told == sorted(told) and told[-1] == (target.stat().st_size, target.stat().st_size)


def test_the_command_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = sources(tmp_path / "in")
    target = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(given["pipeline"]), str(target), "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{target}: 5 tensors of an unknown network, {target.stat().st_size / 1e6:.1f} MB\n"
    assert shown.err == ""
    assert cli.main(["convert", str(given["pipeline"]), str(target)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {target}: is there already")


class Canary:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.place}",)


def test_the_command_runs_nothing_and_says_what_a_pickle_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Tensor | Canary] = {"w": torch.ones(2), "x": Canary(tmp_path / "canary")}
    torch.save({"state_dict": values}, tmp_path / "x.ckpt")
    torch.save({"state_dict": values}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    for name in ("x.ckpt", "legacy.ckpt"):
        assert cli.main(["convert", str(tmp_path / name), str(tmp_path / "out.safetensors")]) == 4
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and name in shown and "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["legacy.ckpt", "x.ckpt"]


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_refused_before_anything_is_written(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(DAMAGED[fault][0])
    assert cli.main(["convert", str(tmp_path / "bad.safetensors"), str(tmp_path / "out.safetensors")]) == 3
    shown = capsys.readouterr().err
    assert "bad.safetensors" in shown and shown.count("\n") == 1 and shown.removesuffix("\n").isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"GGUF"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.gguf"])
def test_what_is_no_checkpoint_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        convert(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
