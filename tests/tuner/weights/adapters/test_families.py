"""LoRAs of every family, in every dialect: all layers have names, and what is translated does the same."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tuner.weights.adapters.memory import Memory, drawn
from tests.tuner.weights.adapters.networks import REAL, layers, metas, modules, t5s
from tuner.weights.adapters.base import Change
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.ldm import from_diffusers
from tuner.weights.layouts.modules import Dialect


def lora(family: str, ranks: tuple[int, ...] = (1,), scale: float = 1.0, t5: bool = True) -> Adapters:
    """A LoRA of every layer of a family's networks, by diffusers' names."""
    tensors: dict[str, Tensor] = {}
    for number, (name, (out, *rest)) in enumerate(layers(family).items()):
        if t5 or not name.startswith(t5s(family)):
            rank = ranks[number % len(ranks)]
            tensors[f"{name}.lora_A.weight"] = drawn(rank, *rest, seed=number)
            tensors[f"{name}.lora_B.weight"] = drawn(out, rank, *(1,) * (len(rest) - 1), seed=number + 1)
            tensors[f"{name}.alpha"] = torch.tensor(rank * scale)
    return parse_adapters(Memory(tensors), modules(family))


def matrices(change: Change) -> tuple[Tensor, Tensor]:
    assert isinstance(change, LowRank)
    left, right = change.product.single
    return change.scale * left, right


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers"])
@pytest.mark.parametrize("family", REAL)
def test_every_layer_of_the_real_networks_has_a_name_and_returns_to_the_bit(family: str, dialect: Dialect) -> None:
    whole = lora(family, t5=dialect != "diffusers")
    tensors = to_tensors(whole, dialect, modules(family))
    back = parse_adapters(Memory(tensors), modules(family))
    assert back.dialect == dialect and set(back.changes) == set(whole.changes)
    for name, change in whole.changes.items():
        for own, other in zip(matrices(change), matrices(back.changes[name]), strict=True):
            assert torch.equal(own, other), name


TRAINED = {
    "sd1": ("lora_te_", {"lora_unet_": 192, "lora_te_": 72}),
    "sd2": ("lora_te_", {"lora_unet_": 192, "lora_te_": 23 * 6}),
    "sdxl": ("lora_te1_", {"lora_unet_": 722, "lora_te1_": 72, "lora_te2_": 192}),
    "flux": ("lora_te1_", {"lora_unet_": 304, "lora_te1_": 72}),
}
"""How many layers sd-scripts says that it makes LoRAs of: those of the attention blocks, and of the text encoders."""


@pytest.mark.parametrize("family", TRAINED)
def test_kohyas_names_are_as_many_as_sd_scripts_counts(family: str) -> None:
    chosen = r"^(unet\..*\.attentions\.|transformer\.\w+_blocks\.|text_encoder(_2)?\.text_model\.)"
    whole = lora(family, t5=False)
    changes = {name: change for name, change in whole.changes.items() if re.search(chosen, name)}
    tensors = to_tensors(replace(whole, changes=changes), "kohya", modules(family))
    names = {name.partition(".")[0] for name in tensors}
    found = Counter(next(prefix for prefix in TRAINED[family][1] if name.startswith(prefix)) for name in names)
    assert found == TRAINED[family][1]


NAMES = {
    "sd1": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ],
    "sd2": ["lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_22_self_attn_out_proj"],
    "sdxl": [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_output_blocks_2_2_conv",
        "lora_unet_label_emb_0_0", "lora_unet_input_blocks_3_0_op", "lora_unet_middle_block_0_in_layers_2",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
        "lora_te2_text_projection",
    ],
    "sd3": [
        "lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_joint_blocks_37_context_block_attn_qkv",
        "lora_unet_joint_blocks_37_context_block_adaLN_modulation_1", "lora_unet_joint_blocks_0_x_block_mlp_fc1",
        "lora_unet_final_layer_adaLN_modulation_1", "lora_unet_context_embedder", "lora_unet_x_embedder_proj",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
    ],
    "sd3 medium": ["lora_unet_joint_blocks_12_x_block_attn2_qkv", "lora_unet_joint_blocks_12_x_block_attn2_proj"],
    "flux": [
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_18_txt_attn_proj",
        "lora_unet_double_blocks_0_img_mod_lin", "lora_unet_double_blocks_0_txt_mlp_2",
        "lora_unet_single_blocks_37_linear1", "lora_unet_single_blocks_0_linear2",
        "lora_unet_single_blocks_0_modulation_lin", "lora_unet_img_in", "lora_unet_time_in_in_layer",
        "lora_unet_final_layer_linear", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_kohyas_names_are_those_of_files_in_use_and_comfys_those_of_single_files(family: str) -> None:
    kohya = to_tensors(lora(family), "kohya", modules(family))
    assert {f"{name}.lora_up.weight" for name in NAMES[family]} <= set(kohya)
    comfy = {name.removesuffix(".lora_up.weight") for name in to_tensors(lora(family), "comfy", modules(family))}
    transformer = from_diffusers(metas(family)).pieces
    own = {name.removeprefix("model.").removesuffix(".weight") for name in transformer if "diffusion_model." in name}
    assert {
        name for name in comfy if name.startswith("diffusion_model.") and "alpha" not in name and "down" not in name
    } <= own
