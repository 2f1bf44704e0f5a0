"""Outputs that are folders: shards and their index, and going on where an interrupted merge has stopped."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge import command, execute
from merge.folder import size_of
from tests.merge.test_faults import ask, at_block
from tests.merge.test_run import folder, model, tiny
from tuner.weights.checkpoint import open_store
from tuner.weights.store import ShardedFile


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        folder(Path(name), seed)


def tree(place: str) -> dict[str, str]:
    """Every file in a folder, by its content."""
    files = [path for path in Path(place).rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def merge(*words: str) -> int:
    return command.main(words)


LERP = ("lerp", "one", "two", "t=0.25")


def same_tensors(one: Path, other: Path) -> bool:
    stores = [open_store(path) for path in (one, other)]
    assert set(stores[0].metas) == set(stores[1].metas)
    return all(torch.equal(stores[0].read(name), stores[1].read(name)) for name in stores[0].metas)


# Shards


def test_a_folders_large_files_come_in_shards_that_hold_the_same(capsys):
    assert merge(*LERP, "to=whole") == 0
    assert merge(*LERP, "max_shard_size=3KB", "to=cut") == 0
    assert same_tensors(Path("whole"), Path("cut"))
    files = sorted(str(path.relative_to("cut")) for path in Path("cut").rglob("*.safetensors"))
    assert files == [
        "text_encoder/model.safetensors",
        *(f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)),
        *(f"vae/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    ]
    index = json.loads(Path("cut/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * 40 * 30 * 2}
    assert set(index["weight_map"]) == {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"}
    assert merge(*LERP, "max_shard_size=3KB", "threads=1", "to=again") == 0
    assert tree("again") == tree("cut")
    assert merge("rebuild", "cut", "--sources", ".") == 0
    assert tree("cut-rebuilt") == tree("cut")


def test_a_single_file_becomes_a_folder_of_shards(capsys):
    for seed, name in enumerate(("a", "b")):
        model(Path(f"{name}.safetensors"), seed)
    assert merge("lerp", "a.safetensors", "b.safetensors", "to=whole.safetensors") == 0
    assert merge("lerp", "a.safetensors", "b.safetensors", "max_shard_size=4KB", "to=cut") == 0
    store = ShardedFile(Path("cut/model.safetensors.index.json"))
    whole = load_file("whole.safetensors")
    assert set(store.metas) == set(whole) and all(torch.equal(store.read(name), whole[name]) for name in whole)
    for path in Path("cut").glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(sizes) <= 4000 or len(sizes) == 1  # a tensor is never cut
    assert merge("rebuild", "cut", "--sources", ".", "--to", "again") == 0
    assert tree("again") == tree("cut")
    capsys.readouterr()
    shutil.rmtree("again")  # as it holds the same, it would be found too
    assert merge("lerp", "cut/model.safetensors.index.json", "b.safetensors", "to=next.safetensors") == 0
    assert merge("rebuild", "next.safetensors", "--sources", ".") == 0
    capsys.readouterr()
    assert merge("tree", "next.safetensors") == 0
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["next.safetensors", "model", "a", "b", "b"]


def test_a_weight_and_its_scale_stay_in_one_shard():
    for seed, name in enumerate(("a", "b")):
        tiny(Path(f"{name}.safetensors"), seed)
    words = ("lerp", "a.safetensors", "b.safetensors", "dtype=float8_e4m3fn_scaled")
    assert merge(*words, "to=whole.safetensors") == 0
    assert merge(*words, "max_shard_size=500KB", "to=cut") == 0
    files = [load_file(path) for path in Path("cut").glob("*.safetensors")]
    assert len(files) > 5
    for tensors in files:
        scales = {name for name in tensors if name.endswith(".scale_weight")}
        assert {name.replace(".scale_weight", ".weight") for name in scales} <= set(tensors)
    store, whole = ShardedFile(Path("cut/model.safetensors.index.json")), load_file("whole.safetensors")
    assert set(store.metas) == set(whole)
    assert all(
        torch.equal(store.read(name).view(torch.uint8), whole[name].view(torch.uint8))
        for name in whole
        if whole[name].ndim
    )


def test_shards_keep_a_variants_name_and_other_libraries_read_them(base):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    shutil.copytree(base, "sd")
    for path in (*Path("sd/unet").glob("*.safetensors"), *Path("sd/text_encoder").glob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert merge("lerp", "sd", "sd", "max_shard_size=60KB", "to=cut") == 0
    assert len(list(Path("cut/unet").glob("diffusion_pytorch_model.fp16-*.safetensors"))) > 1
    assert Path("cut/unet/diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert same_tensors(Path("sd"), Path("cut"))
    for kind, component, variant in (
        (UNet2DConditionModel, "unet", "fp16"),
        (AutoencoderKL, "vae", None),
        (CLIPTextModel, "text_encoder", "fp16"),
    ):
        loaded = kind.from_pretrained(f"cut/{component}", variant=variant).state_dict()
        expected = kind.from_pretrained(base / component).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert merge("lerp", "cut", "cut", "to=again") == 0  # from shards, whole again, under the same name
    assert Path("again/unet/diffusion_pytorch_model.fp16.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("max_shard_size=5XB", "to=out"), "'5XB' is no size; expected such as 5GB"),
        (("max_shard_size=0GB", "to=out"), "'0GB' is no size"),
        (("max_shard_size=5GB", "to=out.safetensors"), "shards and their index make a folder"),
    ],
)
def test_what_is_no_size_is_said(capsys, words, said):
    assert merge(*LERP, *words) == 2
    assert said in capsys.readouterr().err


def test_sizes_are_read_as_other_libraries_read_them():
    sizes = {"5GB": 5 * 10**9, "1.5 MB": 1_500_000, "2GiB": 2**31, "7b": 7, "": None}
    assert {text: size_of(text) for text in sizes} == sizes


# Going on


def interrupted(block: int, *words: str) -> None:
    """A merge into `out` that is stopped before the given block."""
    with at_block(block, ask()), pytest.raises(SystemExit):
        merge(*LERP, *words, "to=out", "threads=1")


@pytest.fixture
def written(monkeypatch):
    """The files that are made from now on, by their component."""
    made: list[str] = []
    run = execute.execute

    def noted(plan, target, *rest, **more):
        made.append(target.parent.name)
        return run(plan, target, *rest, **more)

    monkeypatch.setattr(execute, "execute", noted)
    return made


def test_files_that_were_finished_are_not_made_again(written):
    assert merge(*LERP, "to=expected") == 0
    assert written == ["text_encoder", "unet", "vae"]
    interrupted(2)
    assert sorted(path.name for path in Path(".out.part/text_encoder").iterdir()) == ["model.safetensors"]
    del written[:]
    assert merge(*LERP, "to=out", "--resume") == 0
    assert written == ["vae"]
    assert tree("out") == tree("expected")
    assert not list(Path().glob(".*")) and not list(Path("out").rglob(".*"))


@pytest.mark.parametrize("fault", ["a number", "the header", "gone", "cut short", "no journal", "another folder in it"])
def test_what_is_not_what_was_written_is_made_again(written, fault):
    assert merge(*LERP, "to=expected") == 0
    interrupted(2)
    file = Path(".out.part/text_encoder/model.safetensors")
    content = bytearray(file.read_bytes())
    match fault:
        case "a number":
            content[-1] ^= 1
            file.write_bytes(content)
        case "the header":
            at = content.index(b'merge.root":"') + 20
            content[at : at + 1] = b"f" if content[at : at + 1] != b"f" else b"e"
            file.write_bytes(content)
        case "gone":
            file.unlink()
        case "cut short":
            file.write_bytes(content[:-1])
        case "no journal":
            Path(".out.part/.journal").unlink()
        case _:
            (Path(".out.part") / "safety_checker").mkdir()
    del written[:]
    assert merge(*LERP, "to=out", "--resume") == 0
    again = {"no journal": ["text_encoder", "unet", "vae"], "another folder in it": ["vae"]}
    assert written == again.get(fault, ["text_encoder", "vae"])
    assert tree("out") == tree("expected")
    assert {path.name for path in Path("out").iterdir()} == {path.name for path in Path("expected").iterdir()}


@pytest.mark.parametrize("change", ["another number", "another input"])
def test_what_was_finished_by_another_merge_is_not_gone_on_with(capsys, change):
    interrupted(2, *(["t=0.5"] if change == "another number" else []))
    if change == "another input":
        shutil.rmtree("two")
        folder(Path("two"), 7)
    capsys.readouterr()
    assert merge(*LERP, "to=out", "--resume") == 2
    assert "merge without --resume" in capsys.readouterr().err
    assert merge(*LERP, "to=out") == 0
    assert merge(*LERP, "to=expected") == 0
    assert tree("out") == tree("expected")
