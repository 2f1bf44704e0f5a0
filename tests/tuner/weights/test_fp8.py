from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.checkpoint import open_files, open_store
from tuner.weights.store import TensorMeta
from tuner.weights.writer import save_safetensors


def quantized(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, rows: bool = False) -> tuple[Tensor, Tensor]:
    """q and scale with scale · q ≈ weight: the largest weight (of each row) becomes the largest number there is."""
    largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()
    scale = largest / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


WEIGHT = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
KINDS = {
    "older": ("scale_weight", {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, False),
    "older, of a part": ("scale_weight", {"model.scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, False),
    "newer": ("weight_scale", {"a.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}')).byte()}, False),
    "newer, by rows": ("weight_scale", {}, True),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_weights_are_read_as_what_they_mean(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    suffix, marks, rows = KINDS[kind]
    numbers, scale = quantized(WEIGHT, dtype, rows)
    others = {"a.bias": torch.ones(6, dtype=torch.float16), "plain.weight": torch.ones(2).to(dtype)}
    inputs = {"a.scale_input": torch.tensor(1.0), "b.input_scale": torch.tensor(1.0)}
    tensors = {"a.weight": numbers, f"a.{suffix}": scale, **marks, **inputs, **others}
    save_safetensors(tmp_path / "x.safetensors", tensors)
    store = open_store(tmp_path / "x.safetensors")
    assert store.metas == {
        "a.weight": TensorMeta((6, 5), torch.float32),
        "a.bias": TensorMeta((6,), torch.float16),
        "plain.weight": TensorMeta((2,), dtype),
    }
    meant = store.read("a.weight")
    assert torch.equal(meant, numbers.float() * scale)
    assert (meant - WEIGHT).norm() / WEIGHT.norm() < {torch.float8_e4m3fn: 0.04, torch.float8_e5m2: 0.08}[dtype]
    assert store.locate("a.weight") is None
    assert store.locate("a.bias") == open_files(tmp_path / "x.safetensors").locate("a.bias")
    assert store.locate("plain.weight") is not None
    for name in (f"a.{suffix}", *marks, *inputs):
        for ask in (store.read, store.locate):
            with pytest.raises(KeyError):
                ask(name)


NUMBERS = quantized(WEIGHT)[0]
REFUSED = {
    "scales no weight": {"a.scale_weight": torch.tensor(1.0)},
    "has another scale": {
        "a.weight": NUMBERS, "a.scale_weight": torch.tensor(1.0), "a.weight_scale": torch.tensor(1.0)
    },
    "other than 8-bit floats": {"a.weight": torch.ones(6, 5, dtype=torch.int8), "a.weight_scale": torch.tensor(1.0)},
    "expected one number": {"a.weight": NUMBERS, "a.weight_scale": torch.ones(3, 5)},
    "a quantization that is not read": {
        "a.weight": NUMBERS, "a.weight_scale": torch.tensor(1.0), "a.weight_scale_2": torch.tensor(1.0)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_scales_that_are_not_understood_are_refused(message: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", REFUSED[message])
    with pytest.raises(DataError, match=rf"x\.safetensors: '.*{message}"):
        open_store(tmp_path / "x.safetensors")
    assert open_files(tmp_path / "x.safetensors").metas
