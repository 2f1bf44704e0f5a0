"""The networks of every family: as released, on torch's meta device, and a few numbers wide."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.modules import Modules
from tuner.weights.store import TensorMeta

XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
UNETS: Mapping[str, dict[str, Any]] = {
    "sd1": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        **XL, "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "tiny sd1": SMALL,
    "tiny sd2": {**SMALL, "attention_head_dim": [2, 4], "use_linear_projection": True},
    "tiny sdxl": {
        **SMALL, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8, "cross_attention_dim": 32 + 64,
    },
}  # fmt: skip
TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "sd3": {
        "sample_size": 128, "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38,
        "joint_attention_dim": 4096, "caption_projection_dim": 2432, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    },
    "flux": {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    },
    "tiny sd3": {
        "sample_size": 16, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 96, "caption_projection_dim": 32,
        "pooled_projection_dim": 32 + 64, "pos_embed_max_size": 32, "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "tiny flux": {
        "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
    },
}  # fmt: skip
TRANSFORMERS = {
    **TRANSFORMERS,
    "sd3 medium": {
        **TRANSFORMERS["sd3"], "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
        "dual_attention_layers": tuple(range(13)),
    },
}  # fmt: skip
WIDTHS: Mapping[str, tuple[int, int, int]] = {"l": (768, 12, 12), "h": (1024, 23, 16), "g": (1280, 32, 20)}
REAL = ("sd1", "sd2", "sdxl", "sd3", "sd3 medium", "flux")
TINY = ("tiny sd1", "tiny sd2", "tiny sdxl", "tiny sd3", "tiny flux")


def clip(kind: str, size: str, tiny: bool) -> nn.Module:
    width, layers, heads = ({"l": 32, "h": 32, "g": 64}[size], 2, 4) if tiny else WIDTHS[size]
    config = CLIPTextConfig(
        vocab_size=100 if tiny else 49408, hidden_size=width, intermediate_size=(2 if tiny else 4) * width,
        num_hidden_layers=layers, num_attention_heads=heads, projection_dim=width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if kind == "projection" else CLIPTextModel)(config)


def t5(tiny: bool, width: int) -> nn.Module:
    sizes = (width, 8, 64, 2, 4) if tiny else (4096, 64, 10240, 24, 64)
    keys = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return T5EncoderModel(
        T5Config(vocab_size=100, feed_forward_proj="gated-gelu", **dict(zip(keys, sizes, strict=True)))
    )


def build(family: str) -> dict[str, nn.Module]:
    """The networks that LoRAs are made of, by diffusers' names of components."""
    tiny, name = family.startswith("tiny"), family.removeprefix("tiny ")
    if name in ("sd1", "sd2"):
        return {
            "unet": UNet2DConditionModel(**UNETS[family]),
            "text_encoder": clip("", "l" if name == "sd1" else "h", tiny),
        }
    if name == "sdxl":
        return {
            "unet": UNet2DConditionModel(**UNETS[family]),
            "text_encoder": clip("", "l", tiny),
            "text_encoder_2": clip("projection", "g", tiny),
        }
    if name == "flux":
        transformer = FluxTransformer2DModel(**TRANSFORMERS[family])
        return {"transformer": transformer, "text_encoder": clip("", "l", tiny), "text_encoder_2": t5(tiny, 32)}
    return {
        "transformer": SD3Transformer2DModel(**TRANSFORMERS[family]),
        "text_encoder": clip("projection", "l", tiny),
        "text_encoder_2": clip("projection", "g", tiny),
        "text_encoder_3": t5(tiny, 96),
    }


@cache
def metas(family: str) -> dict[str, TensorMeta]:
    """The tensors of a family's networks by canonical name."""
    with torch.device("meta"):
        networks = build(family)
    return {
        canonical(component, name): TensorMeta(tuple(tensor.shape), torch.float32)
        for component, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


@cache
def modules(family: str) -> Modules:
    return Modules.of_network(metas(family))


def t5s(family: str) -> str:
    """How the names of the modules of a family's T5 start, which diffusers reads no LoRA of."""
    return "text_encoder_3." if "sd3" in family else "text_encoder_2." if "flux" in family else "none"


def layers(family: str) -> dict[str, tuple[int, ...]]:
    """The weights of every linear layer and convolution, by the layer's name."""
    return {
        name.removesuffix(".weight"): meta.shape
        for name, meta in metas(family).items()
        if name.endswith(".weight") and len(meta.shape) in (2, 4)
        and not name.endswith(("token_embedding.weight", "position_embedding.weight", "shared.weight",
                               "embed_tokens.weight", "relative_attention_bias.weight"))
    }  # fmt: skip
