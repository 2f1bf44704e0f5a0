"""Pipelines small enough for tests, made in code: 64 px, random, a tokenizer of letters."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """Byte pairs over lower-case letters, with a handful of merges; other characters are unknown.

    `pad` fills texts up: `!` for text encoders that OpenCLIP trained.
    """
    letters = string.ascii_lowercase + string.digits + ",."
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>"), ("o", "t"), ("r", "e"), ("re", "d</w>"), ("c", "at</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    if pad != END:
        words.append(pad)
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, pad_token=pad, model_max_length=77
    )


def text_config(words: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 32,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})


def unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def autoencoder(**changes: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (16,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 64,
    }
    return AutoencoderKL(**{**settings, **changes})


def scheduler(**changes: Any) -> DDIMScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**settings, **changes})


LINEAR: dict[str, Any] = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
"""What the U-Nets of Stable Diffusion 2 and XL have otherwise than 1."""
OPEN_CLIP: dict[str, Any] = {"hidden_act": "gelu", "num_hidden_layers": 3}


def sd1(seed: int = 0, **unets: Any) -> StableDiffusionPipeline:
    """Every component in evaluation mode, as `from_pretrained` gives them."""
    return _sd(seed, tokenizer(), {}, unets, {})


def sd2(seed: int = 0, prediction: str = "v_prediction", **unets: Any) -> StableDiffusionPipeline:
    """The 768 model, or with `epsilon` the 512 one: OpenCLIP's encoder without its last layer."""
    settings = {**LINEAR, **unets}
    return _sd(seed, tokenizer("!"), OPEN_CLIP, settings, {"prediction_type": prediction})


def _sd(seed: int, words: CLIPTokenizer, text: Any, unets: Any, schedule: Any) -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=autoencoder().eval(),
            text_encoder=CLIPTextModel(text_config(words, **text)).eval(),
            tokenizer=words,
            unet=unet(**unets).eval(),
            scheduler=scheduler(**schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl(seed: int = 0, **unets: Any) -> StableDiffusionXLPipeline:
    """The base: two text encoders, six numbers of how the picture was cut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(text_encoder=_first(), tokenizer=tokenizer(), **_xl(96, 6, unets))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refiner(seed: int = 0) -> StableDiffusionXLImg2ImgPipeline:
    """The second text encoder alone, and a score of beauty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLImg2ImgPipeline(
            text_encoder=None, tokenizer=None, requires_aesthetics_score=True, **_xl(64, 5, {})
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _first() -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer())).eval()


def _xl(tokens: int, numbers: int, unets: Any) -> dict[str, Any]:
    words = tokenizer("!")
    settings = {
        **LINEAR,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": tokens,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 8 * numbers,
    }
    second = text_config(words, **OPEN_CLIP, hidden_size=64, projection_dim=64)
    return {
        "vae": autoencoder(scaling_factor=0.13025, force_upcast=True).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(second).eval(),
        "tokenizer_2": words,
        "unet": unet(**{**settings, **unets}).eval(),
        "scheduler": scheduler(),
        "add_watermarker": False,
    }
