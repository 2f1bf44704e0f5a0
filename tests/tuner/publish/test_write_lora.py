import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests import tiny
from tuner.errors import DataError, DivergedError
from tuner.publish import release
from tuner.publish.provenance import Provenance
from tuner.publish.release import LoraFiles, write_lora
from tuner.publish.verify import TOLERANCE
from tuner.weights.adapters.file import read_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.modules import Modules
from tuner.weights.lora import LoraWeights

PROVENANCE = Provenance(
    name="robot", base="pocket", prediction="v", resolution=64, method="lora", images=5, samples=80, updates=20, seed=1
)


def modules(pipeline: object) -> dict[str, nn.Module]:
    """Every linear layer and convolution of the U-Net and the text encoder, by canonical name."""
    return {
        canonical(component, name): module
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipeline, component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def make_lora(
    layers: Mapping[str, nn.Module],
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float, ...] = (2.0,),
    strength: float = 0.02,
) -> LoraWeights:
    """As after a training: A of usual size, B small."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for number, (name, layer) in enumerate(layers.items()):
        rank = ranks[number % len(ranks)]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) / 8
        ones = [1] * (weight.ndim - 2)
        tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *ones, generator=generator) * strength
        scales[name] = alphas[number % len(alphas)]
    return LoraWeights(tensors, scales)


@pytest.fixture(scope="module")
def pipeline():
    return tiny.sd1()


def write(folder: Path, lora: LoraWeights, pipeline, dtype: torch.dtype = torch.float16) -> LoraFiles:
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return write_lora(folder, lora, PROVENANCE, networks=networks, dtype=dtype)


def picture(pipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipeline("the red cat", num_inference_steps=3, generator=generator, output_type="pt").images
    return images[0] * 255


@pytest.mark.parametrize("kind", ["attention", "everything", "ranks and alphas of all sorts", "no text encoder"])
def test_both_files_give_the_trained_models_pictures_in_a_stock_pipeline(kind: str, pipeline, tmp_path: Path) -> None:
    layers = modules(pipeline)
    match kind:
        case "attention":
            lora = make_lora({name: layer for name, layer in layers.items() if "attn" in name}, strength=0.5)
        case "everything":
            lora = make_lora(layers)
        case "no text encoder":
            lora = make_lora({name: layer for name, layer in layers.items() if name.startswith("unet.")})
        case _:
            lora = make_lora(layers, ranks=(1, 2, 5), alphas=(1.0, 0.3, 7.0, 16.0))
    files = write(tmp_path, lora, pipeline)
    assert files.error <= TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["robot-diffusers.safetensors", "robot.safetensors"]

    trained = tiny.sd1()
    for name, layer in modules(trained).items():
        if name in lora.alphas:
            layer.weight.data += lora.delta(name)
    expected, before = picture(trained), picture(tiny.sd1())
    effect = (expected - before).abs().max()
    assert effect > 10
    for file in files.all:
        stock = tiny.sd1()
        stock.load_lora_weights(tmp_path, weight_name=file.name)
        assert (picture(stock) - expected).abs().max() <= min(2, effect / 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_file_holds_the_deltas_whatever_reads_it(dtype: torch.dtype, pipeline, tmp_path: Path) -> None:
    lora = make_lora(modules(pipeline), alphas=(1.0, 8.0))
    files = write(tmp_path, lora, pipeline, dtype)
    for file in files.all:
        read = read_adapters(file, Modules(tuple(modules(pipeline)))).changes
        assert list(read) == [f"{module}.weight" for module in lora.modules]
        for module in lora.modules:
            change = read[f"{module}.weight"]
            assert isinstance(change, LowRank)
            delta = lora.delta(module).flatten(1)
            assert (change.dense() - delta).norm() / delta.norm() < (1e-6 if dtype == torch.float32 else 1e-3)


def test_the_same_lora_is_the_same_bytes(pipeline, tmp_path: Path) -> None:
    lora = make_lora(modules(pipeline))
    first = [file.read_bytes() for file in write(tmp_path / "1", lora, pipeline).all]
    again = LoraWeights(dict(reversed(lora.tensors.items())), dict(reversed(lora.alphas.items())))
    assert [file.read_bytes() for file in write(tmp_path / "2", again, pipeline).all] == first


def drop(tensors: dict[str, Tensor], ending: str, at: int = 3) -> None:
    del tensors[[name for name in sorted(tensors) if name.endswith(ending)][at]]


def rename_one(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name][:2]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def swap(tensors: dict[str, Tensor], ending: str) -> None:
    name = next(name for name in sorted(tensors) if "to_q" in name and name.endswith(ending))
    tensors[name] = tensors[name].T.contiguous().reshape(tensors[name].shape)


def scale(tensors: dict[str, Tensor], ending: str) -> None:
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name] = tensors[name] * 1.01


def flatten_text(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "text_model" in name]:
        tensors[name.replace("text_model", "text")] = tensors.pop(name)


FAULTS = {
    ("kohya", "a wrong prefix"): lambda t: rename_one(t, "lora_unet_", "lora_transformer_"),
    ("kohya", "all prefixes wrong"): lambda t: [rename_one(t, "lora_unet_", "unet_") for _ in range(500)],
    ("kohya", "a missing alpha"): lambda t: drop(t, ".alpha"),
    ("kohya", "a missing up"): lambda t: drop(t, ".lora_up.weight"),
    ("kohya", "a missing module"): lambda t: [drop(t, end) for end in (".alpha", "_down.weight", "_up.weight")],
    ("kohya", "a swapped axis"): lambda t: swap(t, ".lora_down.weight"),
    ("kohya", "a wrong alpha"): lambda t: scale(t, ".alpha"),
    ("kohya", "a wrong value"): lambda t: scale(t, ".lora_up.weight"),
    ("kohya", "a name without a module"): lambda t: rename_one(t, "attn1_to_q", "attn9_to_q"),
    ("peft", "a wrong prefix"): lambda t: rename_one(t, "unet.", "transformer."),
    ("peft", "no prefix"): lambda t: [rename_one(t, "unet.", "") for _ in range(500)],
    ("peft", "text encoder under another name"): flatten_text,
    ("peft", "a missing B"): lambda t: drop(t, ".lora_B.weight"),
    ("peft", "a missing A"): lambda t: drop(t, ".lora_A.weight"),
    ("peft", "a missing module"): lambda t: [drop(t, end) for end in (".lora_A.weight", ".lora_B.weight")],
    ("peft", "a swapped axis"): lambda t: swap(t, ".lora_A.weight"),
    ("peft", "alpha not folded in"): lambda t: [
        t.update({name: tensor * 2}) for name, tensor in list(t.items()) if name.endswith(".lora_B.weight")
    ],
    ("peft", "a wrong value"): lambda t: scale(t, ".lora_B.weight"),
    ("peft", "a name without a module"): lambda t: rename_one(t, "attn1.to_q", "attn9.to_q"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: " ".join(fault))
def test_a_fault_in_the_writing_is_found_before_anything_is_there(fault, pipeline, tmp_path: Path, monkeypatch) -> None:
    lora = make_lora(modules(pipeline))
    right = release.to_tensors

    def wrong(adapters, dialect, *rest) -> dict[str, Tensor]:
        tensors = right(adapters, dialect, *rest)
        if (dialect == "kohya") == (fault[0] == "kohya"):
            FAULTS[fault](tensors)
        return tensors

    monkeypatch.setattr(release, "to_tensors", wrong)
    ending = ".safetensors" if fault[0] == "kohya" else "-diffusers.safetensors"
    with pytest.raises(DataError, match="robot" + ending):
        write(tmp_path, lora, pipeline)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_not_written(pipeline, tmp_path: Path) -> None:
    lora = make_lora(modules(pipeline))
    name = next(iter(lora.tensors))
    bad = LoraWeights({**lora.tensors, name: torch.full_like(lora.tensors[name], float("nan"))}, lora.alphas)
    with pytest.raises(DivergedError):
        write(tmp_path, bad, pipeline)
    assert list(tmp_path.iterdir()) == []


def test_the_check_is_silent_and_leaves_the_libraries_logging_as_it_was(pipeline, tmp_path: Path, capfd) -> None:
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    layers = modules(pipeline)
    capfd.readouterr()
    write(tmp_path, make_lora(layers), pipeline)
    write(tmp_path, make_lora({name: layer for name, layer in layers.items() if name.startswith("unet.")}), pipeline)
    assert capfd.readouterr() == ("", "")
    assert [(logger.handlers, logger.propagate) for logger in loggers] == before


def test_an_attached_adapter_does_not_disturb_the_check(tmp_path: Path) -> None:
    import peft as library

    pipeline = tiny.sd1()
    layers = modules(pipeline)
    lora = make_lora({name: layer for name, layer in layers.items() if "attn1" in name})
    library.inject_adapter_in_model(library.LoraConfig(r=4, target_modules=["to_q"]), pipeline.unet)
    assert write(tmp_path, lora, pipeline).error <= TOLERANCE


def test_every_module_of_the_real_network_has_a_name_that_both_readers_know(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    layers = modules(SimpleNamespace(unet=unet, text_encoder=text_encoder))
    assert len(layers) == 282 + 72
    lora = make_lora(layers, ranks=(1, 2), alphas=(1.0, 0.5))
    files = write_lora(tmp_path, lora, PROVENANCE, networks={"unet": unet, "text_encoder": text_encoder})
    assert files.error <= TOLERANCE
