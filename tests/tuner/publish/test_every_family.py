"""Releases of every family do in stock pipelines what was trained, and what diffusers does not read is said."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.tuner.publish.test_write_lora import PROVENANCE, make_lora
from tests.tuner.weights import pipelines
from tuner.errors import DataError
from tuner.publish.release import write_lora
from tuner.publish.verify import modules_of
from tuner.weights.adapters.base import Change, Product
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.lora import LoraWeights

ARCHITECTURES = {
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd35-medium": "stable-diffusion-3.5-medium",
    "flux-dev": "flux-1-dev",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A stock pipeline of a family, the same each time."""
    folders: dict[str, Path] = {}

    def opened(variant: str) -> Any:
        if variant not in folders:
            folders[variant] = pipelines.write(variant, tmp_path_factory.mktemp(variant))
        return pipelines.opened(folders[variant])

    return opened


def networks(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and name != "vae"}


def layers(pipeline: Any, t5: bool = False) -> dict[str, nn.Module]:
    """Every linear layer and convolution by canonical name."""
    return {
        canonical(component, name): module
        for component, network in networks(pipeline).items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and (t5 or type(network).__name__ != "T5EncoderModel")
    }


def changed(pipeline: Any, adapters: Adapters) -> Tensor:
    """The picture of a pipeline with the adapters in its weights."""
    own = layers(pipeline, t5=True)
    for name, change in adapters.changes.items():
        weight: Any = own[name.removesuffix(".weight")].weight
        if isinstance(change, Decomposed):
            weight.data = change.effect(weight.data)
        else:
            assert isinstance(change, LowRank)
            weight.data += change.dense().reshape(weight.shape).float()
    return pipelines.drawn(pipeline)


def close(one: Tensor, other: Tensor, untouched: Tensor) -> bool:
    effect = (other - untouched).abs().max()
    assert effect > 0.05
    return bool((one - other).abs().max() < 1e-3 + 0.01 * effect)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_both_files_give_the_trained_pictures(variant: str, base, tmp_path: Path, monkeypatch) -> None:
    pipeline = base(variant)
    chosen = layers(pipeline)
    if variant == "flux-dev":  # diffusers leaves what is before and after the blocks out of kohya's files, in silence
        chosen = {name: layer for name, layer in chosen.items() if "_blocks." in name or "text_model" in name}
    chosen = {name: layer for name, layer in chosen.items() if "text_projection" not in name}
    lora = make_lora(chosen, ranks=(2, 2, 2, 2, 3), strength=0.5)
    provenance = replace(PROVENANCE, architecture=ARCHITECTURES[variant])
    files = write_lora(tmp_path, lora, provenance, networks=networks(pipeline), dtype=torch.float32)
    assert files.layers == len(chosen) and files.error < 1e-5 and not files.left_out
    untouched, trained = pipelines.drawn(pipeline), changed(base(variant), Adapters.of_lora(lora))
    stock = base(variant)
    stock.load_lora_weights(tmp_path, weight_name=files.all[1].name)
    assert close(pipelines.drawn(stock), trained, untouched)

    stock = base(variant)
    if variant == "flux-dev":
        with_sizes(monkeypatch, 32, 128)
    stock.load_lora_weights(tmp_path, weight_name=files.kohya.name)
    if variant == "sd35-medium":  # diffusers reads nothing of kohya's names for Stable Diffusion 3, without a word
        assert torch.equal(pipelines.drawn(stock), untouched)
    else:
        assert close(pipelines.drawn(stock), trained, untouched)
    with safe_open(files.kohya, "pt") as file:
        names, texts = {name.partition(".")[0] for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert texts["modelspec.architecture"] == f"{ARCHITECTURES[variant]}/lora"
    assert {
        "sd2": "lora_te_text_model_encoder_layers_1_mlp_fc1",
        "sdxl": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "sd35-medium": "lora_unet_joint_blocks_0_x_block_attn2_qkv",
        "flux-dev": "lora_unet_single_blocks_1_linear1",
    }[variant] in names
    assert {"sd2": "True"}.get(variant, "False") == texts["ss_v2"]


def with_sizes(monkeypatch: pytest.MonkeyPatch, width: int, inner: int) -> None:
    """diffusers' reader of kohya's files for Flux, for another size than the released one, which is written into it."""
    from diffusers.loaders import lora_conversion_utils, lora_pipeline

    name = "_convert_kohya_flux_lora_to_diffusers"
    source = inspect.getsource(getattr(lora_conversion_utils, name))
    old, new = "dims=[3072, 3072, 3072, 12288]", f"dims=[{width}, {width}, {width}, {inner}]"
    assert old in source
    own = dict(vars(lora_conversion_utils))
    exec(source.replace(old, new), own)
    monkeypatch.setattr(lora_pipeline, name, own[name])


def test_what_diffusers_reads_nothing_of_is_in_kohyas_file_and_said(base, tmp_path: Path) -> None:
    pipeline = base("flux-dev")
    t5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    chosen = {name: layer for name, layer in layers(pipeline, t5=True).items() if "attn.to_q" in name or name == t5}
    files = write_lora(tmp_path, make_lora(chosen), PROVENANCE, networks=networks(pipeline))
    assert files.left_out == (f"{t5}.weight",) and f"diffusers reads nothing of 1, such as {t5}" in str(files)
    modules = modules_of(networks(pipeline))
    assert set(read_adapters(files.kohya, modules).changes) == {f"{name}.weight" for name in chosen}
    assert files.diffusers is not None
    assert set(read_adapters(files.diffusers, modules).changes) == {f"{name}.weight" for name in chosen if name != t5}
    with safe_open(files.kohya, "pt") as file:
        assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha" in file.keys()  # noqa: SIM118

    only = write_lora(tmp_path, make_lora({t5: chosen[t5]}), PROVENANCE, networks=networks(pipeline))
    assert only.diffusers is None and [file.name for file in tmp_path.iterdir()] == ["robot.safetensors"]


def test_a_projection_of_another_rank_is_written_though_diffusers_cannot_open_it_in_kohyas_names(base, tmp_path):
    pipeline = base("sdxl")
    last = "text_encoder_2.text_projection"
    chosen = {name: layer for name, layer in layers(pipeline).items() if name.startswith("text_encoder_2.")}
    own = make_lora({last: chosen.pop(last)}, ranks=(3,))
    others = make_lora(chosen, ranks=(2,))
    lora = LoraWeights({**others.tensors, **own.tensors}, {**others.alphas, **own.alphas})
    files = write_lora(tmp_path, lora, PROVENANCE, networks=networks(pipeline))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        base("sdxl").load_lora_weights(tmp_path, weight_name=files.kohya.name)
    base("sdxl").load_lora_weights(tmp_path, weight_name=files.all[1].name)


def test_a_layer_that_did_not_learn_is_no_fault(base, tmp_path: Path) -> None:
    """In a layer that holds several it has no directions, and so is not there."""
    pipeline = base("flux-dev")
    lora = make_lora({name: layer for name, layer in layers(pipeline).items() if ".attn.to_" in name})
    for name, tensor in lora.tensors.items():
        if "to_k.lora_B" in name:
            tensor.zero_()
    assert write_lora(tmp_path, lora, PROVENANCE, networks=networks(pipeline)).error < 1e-3


def other_kinds(pipeline: Any, decomposed: bool) -> Adapters:
    changes: dict[str, Change] = {}
    for name, layer in layers(pipeline).items():
        weight: Any = layer.weight
        shape = tuple(weight.shape)
        if len(shape) == 2 and decomposed:
            left, right = torch.randn(shape[0], 2) / 4, torch.randn(2, shape[1]) / 4
            norm = weight.detach().norm(dim=1)
            changes[f"{name}.weight"] = Decomposed(
                LowRank(Product(left, right), 0.5), norm * (1 + torch.rand(shape[0]))
            )
        elif not decomposed:
            changes[f"{name}.weight"] = Full(torch.randn(shape) / 50)
    return Adapters(changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["sdxl", "flux-dev"])
def test_dora_is_in_both_files(variant: str, base, tmp_path: Path) -> None:
    pipeline = base(variant)
    adapters = other_kinds(pipeline, decomposed=True)
    files = write_lora(tmp_path, adapters, PROVENANCE, networks=networks(pipeline), dtype=torch.float32)
    untouched, trained = pipelines.drawn(pipeline), changed(base(variant), adapters)
    stock = base(variant)
    stock.load_lora_weights(tmp_path, weight_name=files.all[1].name)
    assert close(pipelines.drawn(stock), trained, untouched)
    with safe_open(files.kohya, "pt") as file:
        assert sum(name.endswith(".dora_scale") for name in file.keys()) > 20  # noqa: SIM118
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"


def test_kinds_that_diffusers_has_no_words_for_are_in_kohyas_file_alone(base, tmp_path: Path) -> None:
    pipeline = base("sdxl")
    adapters = other_kinds(pipeline, decomposed=False)
    files = write_lora(tmp_path, adapters, PROVENANCE, networks=networks(pipeline))
    assert files.diffusers is None and files.left_out == tuple(adapters.changes) and files.error < 1e-3


def test_another_familys_lora_is_refused(base, tmp_path: Path) -> None:
    lora = make_lora({"unet.nowhere": nn.Linear(4, 4)})
    with pytest.raises(DataError, match=r"unet\.nowhere"):
        write_lora(tmp_path, lora, PROVENANCE, networks=networks(base("flux-dev")))
    assert list(tmp_path.iterdir()) == []
