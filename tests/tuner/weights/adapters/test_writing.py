"""Dialects: what is written reads back as the same changes, and twice there and back is the same file."""

import pytest
import torch

from tests.tuner.weights.adapters.memory import (
    CONV,
    FILES,
    K_CONV,
    K_LINEAR,
    K_POINT,
    LINEAR,
    NETWORK,
    Memory,
    drawn,
    network,
)
from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Transform
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Dialect, Modules

SINGLE = {
    name: name.removeprefix("unet.").replace("down_blocks.0", "input_blocks.1") for name in NETWORK if "unet" in name
}
MODULES = Modules(NETWORK, SINGLE)
XL = Modules([*NETWORK, *(name.replace("text_encoder.", "text_encoder_2.") for name in NETWORK)], SINGLE)
WRITTEN = list(FILES)
LORAS = ["lora", "lora without alpha", "locon", "locon of one point", "locon with a middle"]


def read(kind: str) -> Adapters:
    return parse_adapters(Memory(FILES[kind]), MODULES)


def effect(change: Change, name: str) -> torch.Tensor:
    if isinstance(change, Difference):
        return change.dense()
    assert isinstance(change, Transform)
    return change.effect(network()[name].double())


def same(one: Adapters, other: Adapters, rtol: float = 1e-6) -> bool:
    assert set(one.changes) == set(other.changes)
    return all(
        torch.allclose(effect(change, name), effect(other.changes[name], name), rtol=rtol, atol=rtol)
        for name, change in one.changes.items()
    )


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_every_kind_reads_back_as_itself(kind: str, dialect: Dialect) -> None:
    tensors = to_tensors(read(kind), dialect, MODULES)
    back = parse_adapters(Memory(tensors), MODULES)
    assert back.dialect == dialect and same(read(kind), back)
    again = to_tensors(back, dialect, MODULES)
    assert set(again) == set(tensors) and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind != "glora of another age"])
def test_kohyas_dialect_gives_a_kohya_file_again_to_the_bit(kind: str) -> None:
    for adapters, modules in ((read(kind), MODULES), (parse_adapters(Memory(FILES[kind])), None)):
        tensors = to_tensors(adapters, "kohya", modules)
        assert set(tensors) - set(FILES[kind]) <= {f"{K_LINEAR}.alpha"}
        for name, tensor in FILES[kind].items():
            if name.endswith("alpha"):
                whole = kind.endswith("whole factors") or kind == "lokr of a convolution"
                assert torch.equal(tensors[name], torch.tensor(1.0) if whole else tensor)
            else:
                assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("kind", [*LORAS, "dora", "dora of a convolution"])
def test_diffusers_dialect_gives_the_same_effect(kind: str) -> None:
    tensors = to_tensors(read(kind), "diffusers", MODULES)
    assert all(name.startswith(("unet.", "text_encoder.text_model.")) for name in tensors)
    assert not any("alpha" in name for name in tensors)
    back = parse_adapters(Memory(tensors), MODULES)
    assert back.dialect == "diffusers" and same(read(kind), back)
    assert same(read(kind), parse_adapters(Memory(to_tensors(back, "kohya", MODULES)), MODULES))


def test_one_component_has_one_rank_in_diffusers_dialect() -> None:
    file = {**FILES["locon"], **FILES["locon of one point"]}
    file[f"{K_POINT}.lora_up.weight"], file[f"{K_POINT}.lora_down.weight"] = drawn(8, 2, 1, 1), drawn(2, 8, 1, 1)
    adapters = parse_adapters(Memory(file), MODULES)
    tensors = to_tensors(adapters, "diffusers", MODULES)
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {3}
    assert same(adapters, parse_adapters(Memory(tensors), MODULES))


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind not in [*LORAS, "dora", "dora of a convolution"]])
def test_what_a_dialect_has_no_word_for_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="no word for"):
        to_tensors(read(kind), "diffusers", MODULES)


@pytest.mark.parametrize(
    ("modules", "dialect", "conv", "linear"),
    [
        (MODULES, "kohya", K_CONV, K_LINEAR),
        (XL, "kohya", "lora_unet_input_blocks_1_resnets_0_conv1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        (Modules(XL.names), "kohya", K_CONV, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        (MODULES, "diffusers", CONV, LINEAR),
        (MODULES, "comfy", f"diffusion_model.{SINGLE[CONV]}", f"text_encoders.clip_l.transformer.{LINEAR[13:]}"),
    ],
)  # fmt: skip
def test_names_are_those_that_others_read(modules: Modules, dialect: Dialect, conv: str, linear: str) -> None:
    assert modules.spell(CONV, dialect) == conv
    assert modules.spell(LINEAR, dialect) == linear
    assert modules.find(conv) == CONV and modules.find(linear) == LINEAR


@pytest.mark.parametrize("modules", [MODULES, XL, Modules(NETWORK), Modules(XL.names)])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
def test_a_spelling_is_found_again(modules: Modules, dialect: Dialect) -> None:
    for module in modules.names:
        if dialect == "comfy" and module.startswith("unet.") and not modules.single_file:
            with pytest.raises(DataError, match="not known"):
                modules.spell(module, dialect)
        else:
            assert modules.find(modules.spell(module, dialect)) == module


@pytest.mark.parametrize(("module", "dialect"), [("vae.decoder.conv_in", "kohya"), ("vae.decoder.conv_in", "comfy")])
def test_a_module_without_a_word_is_refused(module: str, dialect: Dialect) -> None:
    with pytest.raises(DataError, match="no word"):
        Modules([module]).spell(module, dialect)


def test_two_modules_of_one_spelling_are_not_written() -> None:
    with pytest.raises(DataError, match="several"):
        Modules(["unet.a.b", "unet.a_b"]).spell("unet.a.b", "kohya")


def test_another_dialect_needs_the_networks_modules() -> None:
    unresolved = parse_adapters(Memory(FILES["lora"]))
    with pytest.raises(DataError, match="give its base"):
        to_tensors(unresolved, "diffusers")


def test_one_rounding_to_the_dtype_that_is_asked_for() -> None:
    adapters = read("locon")
    for dialect in ("kohya", "diffusers"):
        tensors = to_tensors(adapters, dialect, MODULES, torch.float16)
        assert {tensor.dtype for name, tensor in tensors.items() if "alpha" not in name} == {torch.float16}
        assert same(adapters, parse_adapters(Memory(tensors), MODULES), rtol=1e-2)
    whole = to_tensors(adapters, "diffusers", MODULES)
    for name, tensor in to_tensors(adapters, "diffusers", MODULES, torch.float16).items():
        assert torch.equal(tensor, whole[name].half())
