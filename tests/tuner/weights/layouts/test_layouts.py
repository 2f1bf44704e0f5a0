"""The laws of every layout, on a network with every kind of layer that Stable Diffusion 1 has, and its fixed names."""

import pytest
import torch
from torch import Tensor

from tests.tuner.weights.adapters.memory import Memory
from tuner.errors import DataError
from tuner.weights.adapters.file import Adapters, parse_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts import peft
from tuner.weights.layouts.modules import Dialect, Modules
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


def written(lora: LoraWeights, dialect: Dialect) -> dict[str, Tensor]:
    return to_tensors(Adapters.of_lora(lora), dialect, Modules(tuple(MODULES)))


@pytest.mark.parametrize("kind", [{}, MIXED])
def test_kohyas_file_is_the_factors_and_alphas_themselves(kind: dict[str, tuple[int, ...]]) -> None:
    lora = make(**kind)
    file = written(lora, "kohya")
    back = parse_adapters(Memory(file), Modules(tuple(MODULES)))
    for module in lora.modules:
        change = back.changes[f"{module}.weight"]
        assert isinstance(change, LowRank) and change.shape == lora.shape(module)
        assert torch.equal(change.product.left, lora.tensors[f"{module}.lora_B.weight"].flatten(1))
        assert torch.equal(change.product.right, lora.tensors[f"{module}.lora_A.weight"])
        assert change.scale * change.rank == pytest.approx(lora.alphas[module])
    again = to_tensors(back, "kohya", Modules(tuple(MODULES)))
    assert set(again) == set(file) and all(torch.equal(again[name], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("kind", [{}, MIXED])
def test_pefts_file_gives_the_same_up_to_where_alpha_is_kept(kind: dict[str, tuple[int, ...]]) -> None:
    lora = make(**kind)
    file = peft.rename(lora)
    back = parse_adapters(Memory(file), Modules(tuple(MODULES)))
    for module in lora.modules:
        change = back.changes[f"{module}.weight"]
        delta = lora.delta(module).flatten(1).double()
        assert isinstance(change, LowRank) and change.scale == 1
        assert (change.dense() - delta).norm() < 1e-6 * delta.norm()
    again = to_tensors(back, "diffusers", Modules(tuple(MODULES)))
    assert set(again) == set(file) and all(torch.equal(again[name], tensor) for name, tensor in file.items())
    for component in ("unet.", "text_encoder."):
        ranks = {tensor.shape[0] for name, tensor in file.items() if name.startswith(component) and "lora_A" in name}
        assert len(ranks) == 1


def test_names_are_those_that_others_write() -> None:
    down = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    file = written(make(), "kohya")
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"
    assert torch.equal(file[f"{name}.lora_down.weight"], make().tensors[f"{down}.lora_A.weight"])
    assert torch.equal(file[f"{name}.lora_up.weight"], make().tensors[f"{down}.lora_B.weight"])
    assert file[f"{name}.alpha"].shape == () and file[f"{name}.alpha"].item() == 2
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in file
    assert "lora_unet_mid_block_resnets_1_conv_shortcut.lora_up.weight" in file
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in peft.rename(make())


@pytest.mark.parametrize(
    ("dialect", "module", "words"),
    [
        ("kohya", "vae.decoder.conv_in", "no word"),
        ("kohya", "transformer.blocks.0", "give the LoRA's base"),
        ("comfy", "transformer.blocks.0", "give the LoRA's base"),
        ("diffusers", "vae.decoder.conv_in", "not in diffusers' names"),
        ("diffusers", "text_encoder_3.encoder.x", "not in diffusers' names"),
        ("diffusers", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "no LoRA of a T5; leave it out"),
        ("diffusers", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "no LoRA of a T5; leave it out"),
        ("diffusers", "text_encoder.encoder.fc1", "not in diffusers' names"),
    ],
)
def test_a_module_that_cannot_be_said_is_an_error(dialect: Dialect, module: str, words: str) -> None:
    tensors = {f"{module}.lora_A.weight": torch.ones(1, 2), f"{module}.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(DataError, match=words):
        to_tensors(Adapters.of_lora(LoraWeights(tensors, {module: 1.0})), dialect)
