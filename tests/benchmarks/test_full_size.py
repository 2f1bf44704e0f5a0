"""The file that stands for a released model is one: whole, and opened like one."""

from pathlib import Path

import pytest
import torch

from benchmarks.full_size import Drawn, write
from tests.tuner.weights import pipelines
from tuner.families.source import BaseModel
from tuner.weights import published
from tuner.weights.checkpoint import open_store
from tuner.weights.convert import convert


def test_a_drawn_file_is_a_whole_single_file_and_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipelines.write("sd1", tmp_path / "small")
    shapes = {name: meta.shape for name, meta in open_store(folder).metas.items()}
    monkeypatch.setattr(published, "tensors", lambda variant: shapes)
    write("sd1", torch.float16, tmp_path / "drawn.safetensors")
    convert(folder, tmp_path / "same.safetensors", layout="ldm", dtype="float16")
    assert open_store(tmp_path / "drawn.safetensors").metas == open_store(tmp_path / "same.safetensors").metas
    model = BaseModel(base=str(tmp_path / "drawn.safetensors"), config=str(folder)).open(torch.device("cpu"))
    assert model.encode_text(["a cat"]).tokens.isfinite().all()


def test_numbers_are_the_same_each_time_and_of_the_released_shapes() -> None:
    one, other = (Drawn.of("sd1", torch.float16) for _ in range(2))
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert one.read(name).shape == (320, 768) and torch.equal(one.read(name), other.read(name))
    assert 0.019 < one.read(name).float().std() < 0.021 and one.metas.keys() == published.tensors("sd1").keys()
