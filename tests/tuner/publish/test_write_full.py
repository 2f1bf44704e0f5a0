import json
from pathlib import Path, PurePosixPath

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from tests import tiny
from tests.tuner.weights import pipelines
from tuner.errors import DataError, DivergedError
from tuner.publish import full
from tuner.publish.full import write_full
from tuner.publish.release import _released as released
from tuner.weights.store import SafetensorsFile


@pytest.fixture(scope="module")
def pipeline():
    return tiny.sd1()


@pytest.fixture(scope="module")
def base(pipeline, tmp_path_factory) -> Path:
    """The tokenizer folder of a base, as transformers 5 saves it."""
    folder = tmp_path_factory.mktemp("base") / "tokenizer"
    pipeline.tokenizer.save_pretrained(folder)
    return folder


def picture(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("the red cat", num_inference_steps=2, generator=generator, output_type="pt").images[0] * 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_stock_pipeline_reads_the_folder_and_gives_the_same_pictures(dtype, pipeline, base, tmp_path: Path) -> None:
    write_full(tmp_path / "model", pipeline, base, dtype=dtype)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert {part.dtype for part in (stock.unet, stock.vae, stock.text_encoder)} == {torch.float32}
    assert (picture(stock) - picture(pipeline)).abs().max() <= (0.01 if dtype == torch.float32 else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["sd2", "sdxl", "sd35-medium", "flux-dev"])
def test_every_familys_folder_is_opened_with_the_same_pictures(variant: str, tmp_path: Path) -> None:
    base = pipelines.write(variant, tmp_path / "base")
    pipeline = pipelines.opened(base)
    folder = write_full(tmp_path / "model", pipeline, base / "tokenizer", dtype=torch.float32)
    assert (pipelines.drawn(pipelines.opened(folder)) - pipelines.drawn(pipeline)).abs().max() < 1e-5
    written = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert all(released(PurePosixPath(path)) for path in written)
    index = json.loads((folder / "model_index.json").read_text())
    own = json.loads((base / "model_index.json").read_text())
    for name, value in own.items():
        if not name.startswith("_") and value not in (None, [None, None]):
            assert index[name] == value, name


def test_the_text_encoder_has_the_names_that_every_version_reads(pipeline, base, tmp_path: Path) -> None:
    folder = write_full(tmp_path / "model", pipeline, base, dtype=torch.float32)
    names = set(SafetensorsFile(folder / "text_encoder" / "model.safetensors").metas)
    assert "text_model.embeddings.token_embedding.weight" in names
    assert all(name.startswith("text_model.") for name in names)
    read, report = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in pipeline.text_encoder.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


def test_the_tokenizer_is_the_bases_own_with_the_files_of_older_readers(pipeline, base, tmp_path: Path) -> None:
    folder = write_full(tmp_path / "model", pipeline, base) / "tokenizer"
    for path in base.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert json.loads((folder / "vocab.json").read_text()) == pipeline.tokenizer.get_vocab()
    assert (folder / "merges.txt").read_text().splitlines()[1:3] == ["t h", "th e</w>"]


def test_the_same_model_is_the_same_bytes(pipeline, base, tmp_path: Path) -> None:
    folders = [write_full(tmp_path / name, pipeline, base) for name in "ab"]
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert contents[0] == contents[1]
    assert not any(str(tmp_path).encode() in content for content in contents[0].values())


def test_an_attached_lora_is_refused_and_the_old_folder_stays(base, tmp_path: Path) -> None:
    import peft

    pipeline = tiny.sd1()
    write_full(tmp_path / "model", pipeline, base)
    before = (tmp_path / "model" / "unet" / "config.json").read_bytes()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), pipeline.unet)
    with pytest.raises(DataError, match="a LoRA is attached"):
        write_full(tmp_path / "model", pipeline, base)
    assert (tmp_path / "model" / "unet" / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_finite_is_not_written(base, tmp_path: Path) -> None:
    pipeline = tiny.sd1()
    pipeline.unet.conv_in.weight.data[0] = 1e6  # more than half precision holds
    with pytest.raises(DivergedError, match=r"conv_in\.weight"):
        write_full(tmp_path / "model", pipeline, base)
    assert list(tmp_path.iterdir()) == []


def test_names_that_a_reader_does_not_know_are_found(pipeline, base, tmp_path: Path, monkeypatch) -> None:
    right = full.canonical
    monkeypatch.setattr(full, "canonical", lambda part, name: right(part, name).replace("self_attn", "attention"))
    with pytest.raises(DataError, match="text_encoder: "):
        write_full(tmp_path / "model", pipeline, base)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_found(pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    pipeline.tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="tokenizer"):
        write_full(tmp_path / "model", pipeline, folder)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        write_full(tmp_path / "model", pipeline, tmp_path / "none")
