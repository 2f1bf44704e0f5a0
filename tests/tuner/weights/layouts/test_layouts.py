"""The laws of every layout, on a network with every kind of layer that Stable Diffusion 1 has, and its fixed names."""

import pytest
import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.layouts import kohya, peft
from tuner.weights.lora import LoraWeights

MODULES = {
    "unet.conv_in": (8, 4, 3, 3),
    "unet.time_embedding.linear_1": (8, 4),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (8, 8),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (8, 8),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": (64, 8),
    "unet.down_blocks.0.attentions.1.proj_in": (8, 8, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "unet.down_blocks.0.resnets.0.time_emb_proj": (8, 8),
    "unet.down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    "unet.mid_block.resnets.1.conv_shortcut": (8, 8, 1, 1),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (32, 8),
}


def make(ranks: tuple[int, ...] = (4,), alphas: tuple[float, ...] = (2.0,)) -> LoraWeights:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for number, (name, (out, *rest)) in enumerate(MODULES.items()):
        rank = ranks[number % len(ranks)]
        ones = [1] * (len(rest) - 1)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *rest, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, *ones, generator=generator)
    return LoraWeights(tensors, {name: alphas[n % len(alphas)] for n, name in enumerate(MODULES)})


MIXED = {"ranks": (4, 1, 7), "alphas": (1.0, 0.3, 16.0, 5.5)}


@pytest.mark.parametrize("kind", [{}, MIXED])
def test_kohyas_restore_is_the_inverse_of_rename(kind: dict[str, tuple[int, ...]]) -> None:
    lora = make(**kind)
    file = kohya.rename(lora)
    back = kohya.restore(file, MODULES)
    assert back.alphas == pytest.approx(lora.alphas)
    assert set(back.tensors) == set(lora.tensors)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in lora.tensors.items())
    again = kohya.rename(back)
    assert set(again) == set(file) and all(torch.equal(again[name], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("kind", [{}, MIXED])
def test_pefts_restore_is_the_inverse_of_rename_up_to_where_alpha_is_kept(kind: dict[str, tuple[int, ...]]) -> None:
    lora = make(**kind)
    file = peft.rename(lora)
    back = peft.restore(file)
    assert all(lora.distance(back, module) < 1e-6 for module in lora.modules)
    again = peft.rename(back)
    assert set(again) == set(file) and all(torch.equal(again[name], tensor) for name, tensor in file.items())
    for component in ("unet.", "text_encoder."):
        ranks = {tensor.shape[0] for name, tensor in file.items() if name.startswith(component) and "lora_A" in name}
        assert len(ranks) == 1
    assert all(back.alphas[module] == back.rank(module) for module in back.modules)


def test_names_are_those_that_others_write() -> None:
    down = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    file = kohya.rename(make())
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"
    assert torch.equal(file[f"{name}.lora_down.weight"], make().tensors[f"{down}.lora_A.weight"])
    assert torch.equal(file[f"{name}.lora_up.weight"], make().tensors[f"{down}.lora_B.weight"])
    assert file[f"{name}.alpha"].shape == () and file[f"{name}.alpha"].item() == 2
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in file
    assert "lora_unet_mid_block_resnets_1_conv_shortcut.lora_up.weight" in file
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in peft.rename(make())


def test_flat_text_encoder_names_of_transformers_5_are_read() -> None:
    file = {name.replace("text_model.", ""): tensor for name, tensor in peft.rename(make()).items()}
    assert peft.restore(file).modules == make().modules


@pytest.mark.parametrize(
    ("layout", "module"),
    [
        (kohya, "vae.decoder.conv_in"),
        (kohya, "text_encoder_2.text_model.x"),
        (kohya, "transformer.blocks.0"),
        (peft, "vae.decoder.conv_in"),
        (peft, "text_encoder_3.encoder.x"),
    ],
)
def test_a_module_that_cannot_be_said_is_an_error(layout, module: str) -> None:
    tensors = {f"{module}.lora_A.weight": torch.ones(1, 2), f"{module}.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(DataError, match=module):
        layout.rename(LoraWeights(tensors, {module: 1.0}))


def test_a_flat_text_encoder_name_is_never_written() -> None:
    tensors = {f"text_encoder.encoder.fc1.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    with pytest.raises(DataError, match=r"text_encoder\.encoder"):
        peft.rename(LoraWeights(tensors, {"text_encoder.encoder.fc1": 1.0}))


def test_two_modules_of_one_name_are_an_error() -> None:
    tensors = {f"unet.{name}.lora_{side}.weight": torch.ones(1, 1) for name in ("a.b", "a_b") for side in "AB"}
    with pytest.raises(DataError, match="both"):
        kohya.rename(LoraWeights(tensors, {"unet.a.b": 1.0, "unet.a_b": 1.0}))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"lora_unet_nowhere.alpha": torch.tensor(1.0)}),
        lambda t: t.update({"lora_unet_conv_in.dora_scale": torch.ones(8)}),
        lambda t: t.update({"conv_in": torch.ones(8)}),
        lambda t: t.pop("lora_unet_conv_in.alpha"),
        lambda t: t.pop("lora_unet_conv_in.lora_up.weight"),
        lambda t: t.pop("lora_unet_conv_in.lora_down.weight"),
    ],
)
def test_nothing_in_a_kohya_file_is_dropped(change) -> None:
    file = kohya.rename(make())
    change(file)
    with pytest.raises(DataError):
        kohya.restore(file, MODULES)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"unet.conv_in.alpha": torch.tensor(1.0)}),
        lambda t: t.update({"unet.conv_in.lora_magnitude_vector": torch.ones(8)}),
        lambda t: t.pop("unet.conv_in.lora_A.weight"),
        lambda t: t.pop("unet.conv_in.lora_B.weight"),
        lambda t: t.update({"vae.conv_in.lora_A.weight": t.pop("unet.conv_in.lora_A.weight")}),
    ],
)
def test_nothing_in_a_peft_file_is_dropped(change) -> None:
    file = peft.rename(make())
    change(file)
    with pytest.raises(DataError):
        peft.restore(file)
