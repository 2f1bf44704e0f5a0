"""The base model before its training: a Stable Diffusion 1 pipeline in narrow, with a trained autoencoder.

The U-Net has Stable Diffusion 1's exact topology, so every layer has the name that it has there.

python -m tuner.base.initial --vae FOLDER --out FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from tuner.base import tokenizer
from tuner.base.tokenizer import LENGTH

WIDTH = 128
"""Of the text encoder's vectors."""
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's U-Net, four levels of two layers, in narrow; random.

    As in the reference, residual branches and the output begin at zero (Dhariwal and Nichol 2021, arXiv:2105.05233).
    """
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 128, 128),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=32,
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".conv2." in name or ".proj_out." in name or name.startswith("conv_out."):
                parameter.zero_()
    return network


def text_encoder() -> CLIPTextModel:
    """CLIP's text encoder, small; random."""
    words: Any = tokenizer.tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def write(vae: Path, out: Path, seed: int) -> None:
    """The whole folder, as `StableDiffusionPipeline.from_pretrained` loads it."""
    torch.manual_seed(seed)
    unet().save_pretrained(out / "unet")
    encoder = text_encoder()
    state = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
    encoder.save_pretrained(out / "text_encoder", state_dict=state)
    AutoencoderKL.from_pretrained(vae).save_pretrained(out / "vae")
    scheduler().save_pretrained(out / "scheduler")
    tokenizer.write(out / "tokenizer")
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vae", type=Path, required=True, help="the trained autoencoder's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write(arguments.vae, arguments.out, arguments.seed)
    print(f"made {arguments.out}")


if __name__ == "__main__":
    main()
