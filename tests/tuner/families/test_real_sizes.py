"""Stable Diffusion 1 as published, at its real sizes, on torch's meta device, which computes shapes only."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests import tiny
from tests.tuner.families.published import (
    KOHYA_MODULES,
    PARAMETERS,
    SD14_SCHEDULER,
    SD15_SCHEDULER,
    SD15_TEXT_ENCODER,
    SD15_UNET,
    SD15_VAE,
)
from tuner.families.sd1 import Sd1Model
from tuner.methods.lora import Lora
from tuner.weights.adapters.file import Adapters
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.lora import LoraWeights


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(SD15_UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15_TEXT_ENCODER)),
            "vae": AutoencoderKL.from_config(SD15_VAE),
        }


def opened(networks: dict[str, nn.Module], scheduler: dict[str, Any]) -> Sd1Model:
    return Sd1Model(
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        folder=Path("sd15"),
        networks=dict(networks),
        tokenizers={"text_encoder": tiny.tokenizer()},
        scheduler_config=scheduler,
        device=torch.device("meta"),
    )


@pytest.mark.parametrize("component", PARAMETERS)
def test_every_network_has_the_published_number_of_parameters(component, networks):
    assert sum(p.numel() for p in networks[component].parameters()) == PARAMETERS[component]


@pytest.mark.parametrize("scheduler", [SD15_SCHEDULER, SD14_SCHEDULER], ids=["1.5", "1.4"])
def test_the_model_is_what_its_configs_say(scheduler, networks):
    model = opened(networks, scheduler)
    assert (model.resolution, model.resolution_step, model.scaling) == (512, 8, 0.18215)
    assert (model.prediction_type, model.architecture) == ("epsilon", "stable-diffusion-v1")
    assert model.max_tokens == 75
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha, sigma = model.schedule.alpha_sigma(torch.arange(1000))
    assert torch.allclose((alpha**2).double(), (1 - betas).cumprod(0), atol=1e-6)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert model.pipeline().scheduler.config["clip_sample"] is False
    assert not said


@pytest.mark.parametrize(("width", "height"), [(512, 512), (448, 576), (768, 512), (520, 344)])
def test_shapes_go_through_from_pixels_to_the_output(width, height, networks):
    model = opened(networks, SD15_SCHEDULER)
    latents = model.encode_images(torch.zeros(1, 3, height, width))
    assert latents.mean.shape == latents.std.shape == (1, 4, height // 8, width // 8)
    conditioning = model.encode_text(["a red cat", ""])
    assert conditioning.tokens.shape == (2, 77, 768)
    x_t = latents.mean.expand(2, -1, -1, -1)
    assert model.denoise(x_t, torch.zeros(2, dtype=torch.long, device="meta"), conditioning).shape == x_t.shape


def kohya_list(network: nn.Module, prefix: str, blocks: set[str]) -> set[str]:
    """The layers that sd-scripts adapts by default: linear ones and 1 x 1 convolutions in blocks of these classes."""
    return {
        f"{prefix}{block_name}.{name}"
        for block_name, block in network.named_modules()
        if type(block).__name__ in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    }


BLOCKS = {"unet": {"Transformer2DModel"}, "text_encoder": {"CLIPAttention", "CLIPMLP"}}


def test_a_lora_learns_by_default_what_every_program_expects(networks):
    model = opened(networks, SD15_SCHEDULER)
    for component, blocks in BLOCKS.items():
        chosen = Lora(text_encoder=True)._choose(model, component)
        prefix = model.prefixes[component]
        assert {prefix + name for name in chosen} == kohya_list(networks[component], prefix, blocks)
        assert len(chosen) == KOHYA_MODULES[component]


def test_their_names_in_files_are_the_well_known_ones(networks):
    model = opened(networks, SD15_SCHEDULER)
    names = [
        model.prefixes[component] + name
        for component in BLOCKS
        for name in Lora(text_encoder=True)._choose(model, component)
    ]
    factors = {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for name in names for side in "AB"}
    written = to_tensors(Adapters.of_lora(LoraWeights(factors, dict.fromkeys(names, 1.0))), "kohya")
    assert len(written) == 3 * 264
    for known in (
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_k",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_11_mlp_fc2",
    ):
        assert {f"{known}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= written.keys()
