"""A base in a single file is the folder that it came from: as it is opened, sampled and trained."""

import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs, tiny
from tests.tuner.weights import pipelines
from tuner.data.cache_tool import entries
from tuner.errors import ConfigError, DataError, UnsafeError, UserError
from tuner.families.base import Sampling
from tuner.families.source import BaseModel, NotHere
from tuner.weights import published
from tuner.weights.checkpoint import open_store
from tuner.weights.convert import convert
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

CPU = torch.device("cpu")
PARTS = ("model.diffusion_model.", "vae.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.")
"""How the parts of a Flux begin in a single file."""


def nothing(_: str) -> None:
    """For what is said along the way."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A small folder of a released model and the same as a single file, each made once."""
    place = tmp_path_factory.mktemp("bases")

    def make(variant: str) -> tuple[Path, Path]:
        folder, file = place / variant, place / f"{variant}.safetensors"
        if not file.exists():
            pipelines.write(variant, folder)
            convert(folder, file, layout="ldm")
        return folder, file

    return make


def opened(base: Path, **given: Any) -> Any:
    return BaseModel(base=str(base), **given).open(CPU, say=nothing)


def same(one: Any, other: Any) -> None:
    """All numbers of two models."""
    for name, network in one.networks.items():
        mine, theirs = network.state_dict(), other.networks[name].state_dict()
        assert mine.keys() == theirs.keys()
        for own, tensor in mine.items():
            assert tensor.dtype == theirs[own].dtype and torch.equal(tensor, theirs[own]), own


@pytest.mark.parametrize("variant", pipelines.SMALL)
def test_a_single_file_opens_as_the_folder_it_came_from(variant: str, made) -> None:
    folder, file = made(variant)
    one, other = opened(folder), opened(file, config=str(folder))
    assert (other.source, other.folder.parent.name) == (str(file), "bases")
    assert one.networks.keys() == other.networks.keys() and len(one.networks) >= 3
    same(one, other)
    assert all(one.fingerprint(name) == other.fingerprint(name) for name in one.networks)
    assert dict(one.scheduler_config) == dict(other.scheduler_config)
    assert (one.prediction_type, one.architecture, one.guidance) == (
        other.prediction_type,
        other.architecture,
        other.guidance,
    )
    if variant in ("sd1", "flux-dev"):
        sampling = Sampling(steps=2, width=64, height=64)
        assert one.sample(["a cat"], [3], sampling)[0].tobytes() == other.sample(["a cat"], [3], sampling)[0].tobytes()


@pytest.mark.parametrize(
    ("make", "own"), [(tiny.sd1, ()), (tiny.flux, ("model.t5_length=16", "pictures.resolution=64"))]
)
def test_training_from_a_single_file_is_training_from_the_folder_bit_for_bit(make, own, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    runs.draw_pictures(tmp_path / "pictures")
    convert(tmp_path / "base", tmp_path / "base.ckpt.safetensors", layout="ldm")
    ground = runs.Ground(tmp_path)
    single = (f"model.base='{tmp_path / 'base.ckpt.safetensors'}'", f"model.config='{tmp_path / 'base'}'")
    more = ("run.updates=2", "objective={}", "method={rank=4,text_encoder=true}", "pictures.flip=false", *own)
    learned = []
    for name, base in (("folder", ()), ("single", single)):
        assert ground.run("lora", tmp_path / name, *more, *base) == 0
        files = {file.name: file.read_bytes() for file in (tmp_path / name / "lora").glob("*.safetensors")}
        learned.append((runs.digests(tmp_path / name), {n: hashlib.sha256(b).hexdigest() for n, b in files.items()}))
    assert len(learned[0][1]) == 2 and learned[0] == learned[1]
    for text in ("release.json", "lora/model.safetensors"):
        assert str(tmp_path).encode() not in (tmp_path / "single" / text).read_bytes()
    if not own:  # the folder's run goes on from the file
        assert ground.run("lora", tmp_path / "folder", *more, "run.updates=3", *single) == 0


@pytest.fixture
def released(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As if the small pipeline of a variant were the released model; gives its folder and single file."""

    def release(variant: str) -> tuple[Path, Path]:
        folder, file = made(variant)
        pipelines.write_configs(variant, tmp_path / "shipped" / variant, tokenizers=False)
        shapes = {name: list(meta.shape) for name, meta in open_store(folder).metas.items()}
        parts = sorted({name.partition(".")[0] for name in shapes})
        lists = [{n.partition(".")[2]: s for n, s in shapes.items() if n.startswith(f"{part}.")} for part in parts]
        monkeypatch.setattr(published, "FOLDER", tmp_path / "shipped")
        monkeypatch.setattr(published, "_lists", lambda: (lists, {variant: {p: i for i, p in enumerate(parts)}}))
        return folder, file

    return release


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "sd35-medium", "flux-schnell"])
def test_of_a_released_model_nothing_but_the_file_is_needed(variant: str, released) -> None:
    folder, file = released(variant)
    same(opened(folder), opened(file))  # but for the tokenizers: by which texts are filled up, is told from widths


def test_a_pickled_checkpoint_is_read_and_nothing_in_it_runs(made, tmp_path: Path) -> None:
    folder, file = made("sd1")
    store = SafetensorsFile(file)
    tensors = {name: store.read(name) for name in store.metas}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt")
    found = opened(tmp_path / "old.ckpt", config=str(folder))
    assert found.fingerprint("unet") == opened(folder).fingerprint("unet")

    class Canary:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "canary", "sung"))

    torch.save({"state_dict": tensors, "epoch": Canary()}, tmp_path / "bad.ckpt")
    with pytest.raises(UnsafeError, match=r"^model\.base: .*bad\.ckpt"):
        opened(tmp_path / "bad.ckpt", config=str(folder))
    assert not (tmp_path / "canary").exists()


def split(file: Path, place: Path) -> list[Path]:
    """Flux in a file for each of its parts, with the names that each has by itself."""
    store = SafetensorsFile(file)
    for prefix in PARTS:
        own = {name.removeprefix(prefix): store.read(name) for name in store.metas if name.startswith(prefix)}
        save_safetensors(place / f"{prefix}safetensors", own)
    return [place / f"{prefix}safetensors" for prefix in PARTS]


def test_what_a_file_lacks_is_named_and_taken_from_others(made, tmp_path: Path) -> None:
    folder, file = made("flux-dev")
    transformer, *others = split(file, tmp_path)
    with pytest.raises(DataError) as caught:
        opened(transformer, config=str(folder))
    assert "holds no text_encoder, text_encoder_2, vae, which a FluxPipeline needs" in str(caught.value)
    assert str(caught.value).endswith("give their files with model.add") and "\n" not in str(caught.value)
    found = opened(transformer, config=str(folder), add=tuple(others))
    assert all(found.fingerprint(name) == opened(folder).fingerprint(name) for name in found.networks)


def test_stable_diffusion_3_is_opened_without_t5_and_that_is_said(made, tmp_path: Path) -> None:
    folder, file = made("sd35-medium")
    store = SafetensorsFile(file)
    save_safetensors(tmp_path / "a.safetensors", {n: store.read(n) for n in store.metas if "t5xxl" not in n})
    said: list[str] = []
    model = BaseModel(base=str(tmp_path / "a.safetensors"), config=str(folder)).open(CPU, say=said.append)
    assert tuple(model.text_encoders) == ("text_encoder", "text_encoder_2")
    assert "made into a folder, once" in said[0] and "text_encoder_3" in said[1] and len(said) == 2
    again: list[str] = []
    BaseModel(base=str(tmp_path / "a.safetensors"), config=str(folder)).open(CPU, say=again.append)
    assert again == said[1:]


WRONG = {
    "lora": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4, 1, 1)}, "a LoRA for"),
    "autoencoder": ({"decoder.up.0.block.0.conv1.weight": torch.zeros(1)}, "an autoencoder alone"),
    "text encoder": ({"text_model.embeddings.token_embedding.weight": torch.zeros(1, 1)}, "a CLIP text encoder alone"),
    "words": ({"emb_params": torch.zeros(2, 8)}, "a textual inversion"),
    "nothing": ({}, "an unknown network"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_base_is_said_to_be_what_it_is(kind: str, tmp_path: Path) -> None:
    tensors, said = WRONG[kind]
    save_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(DataError, match=rf"^model\.base: .*a\.safetensors: .*{said}.*; give ") as caught:
        opened(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_network_of_another_size_is_refused_with_the_way_out(made) -> None:
    with pytest.raises(DataError, match=r"expected .*no whole sd1 of the published size; .* with model\.config$"):
        opened(made("sd1")[1])


def test_options_of_single_files_go_with_single_files_only(made, tmp_path: Path) -> None:
    folder, file = made("sd1")
    for base in (str(folder), "pocket", "owner/name"):
        with pytest.raises(ConfigError, match=r"^model\.config: '.*' is no single file; leave it out$"):
            BaseModel(base=base, config="sd1").locate(download=False)
        with pytest.raises(ConfigError, match=r"^model\.add: '.*' is no single file; leave it out$"):
            BaseModel(base=base, add=(file,)).locate(download=False)
    with pytest.raises(ConfigError, match=r"^model\.base: .*'sd8': no published model"):
        opened(file, config="sd8")
    with pytest.raises(UserError, match=r"^model\.base: .*nowhere"):
        opened(file, config=str(folder), add=(tmp_path / "nowhere.safetensors",))


def test_a_folder_is_made_once_and_anew_when_the_file_is_another(made, tmp_path: Path) -> None:
    folder, file = made("sd1")
    cache, own = tmp_path / "cache", tmp_path / "own.safetensors"
    base = BaseModel(base=str(own), config=str(folder))
    own.write_bytes(file.read_bytes())
    times = own.stat()
    with pytest.raises(NotHere, match="a run makes it into a folder"):
        base.locate(download=False, cache=cache)
    assert not cache.exists()
    first = base.locate(cache=cache, say=nothing)
    weights = first / "unet" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert base.locate(cache=cache, say=pytest.fail) == base.locate(download=False, cache=cache) == first
    assert weights.stat().st_mtime_ns == written
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    own.write_bytes(content)
    os.utime(own, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    second = base.locate(cache=cache, say=nothing)
    assert second != first
    one, other = open_store(first), open_store(second)
    assert sum(not torch.equal(one.read(name), other.read(name)) for name in one.metas) == 1
    kinds = {entry.path: (entry.kind, entry.bytes > own.stat().st_size) for entry in entries(cache)}
    assert kinds == {first: ("single files as folders", True), second: ("single files as folders", True)}


def _locate(base: BaseModel, cache: Path, said) -> None:
    base.locate(cache=cache, say=said.put)


def test_of_several_processes_one_makes_the_folder_and_the_others_wait(made, tmp_path: Path) -> None:
    folder, file = made("sd1")
    base = BaseModel(base=str(file), config=str(folder))
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    processes = [context.Process(target=_locate, args=(base, tmp_path / "cache", said)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert "made into a folder, once" in said.get(timeout=10) and said.empty()
    assert len([path for path in (tmp_path / "cache" / "bases").iterdir() if path.is_dir()]) == 1
