"""Stable Diffusion 1 (Rombach et al. 2022, arXiv:2112.10752): a U-Net on latents, told by a CLIP text encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_depth2img import StableDiffusionDepth2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.model import Guide
from tuner.families._clip import ClipModel, TextOptions
from tuner.families._diffusers import load, load_encoder, load_tokenizer, set_attention
from tuner.families._discrete import DiscreteFamily
from tuner.families._guides import GuidedModel
from tuner.families.base import Attention, Family, OpenedModel

STOCK: Mapping[Guide | None, Any] = {
    None: StableDiffusionPipeline,
    "mask": StableDiffusionInpaintPipeline,
    "depth": StableDiffusionDepth2ImgPipeline,
    "picture": StableDiffusionInstructPix2PixPipeline,
}
"""The stock pipelines by what the U-Net is told besides text."""


@dataclass(kw_only=True)
class Sd1Model(ClipModel, GuidedModel):
    """An opened Stable Diffusion 1 or 2 checkpoint."""

    architecture: str = "stable-diffusion-v1"
    adapter_targets: Mapping[str, str] = field(
        default_factory=lambda: {"unet": r"\.attentions\.", "text_encoder": r"\.(self_attn|mlp)\."}
    )

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = conditioning.tokens.to(self.dtype)
        return self.networks["unet"](
            self.beside(x_t, conditioning).to(self.dtype),
            t,
            tokens,
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )[0]

    def pipeline(self) -> Any:
        unwanted = {"depth_estimator": None} if self.guide == "depth" else {
            "safety_checker": None, "requires_safety_checker": False,
        }  # fmt: skip
        return STOCK[self.guide](
            vae=self.raw("vae"), text_encoder=self.raw("text_encoder"), tokenizer=self.tokenizers["text_encoder"],
            unet=self.raw("unet"), scheduler=self.scheduler(), feature_extractor=None, **unwanted,
        )  # fmt: skip

    def scheduler(self) -> DDIMScheduler:
        # what a stock pipeline sets, with a warning, where a base's config leaves it out: latents are no pixels to clip
        settled = {"clip_sample": False, "steps_offset": 1}
        return cast(DDIMScheduler, DDIMScheduler.from_config({**self.scheduler_config, **settled}))


@dataclass(frozen=True, kw_only=True)
class Sd1(DiscreteFamily, TextOptions):
    """The family: what opens it."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        scheduler = self.read_scheduler(folder)
        return open_sd(folder, source, scheduler, device, attention, "stable-diffusion-v1", "Stable Diffusion 1", self)


def open_sd(
    folder: Path,
    source: str,
    scheduler: Mapping[str, Any],
    device: torch.device,
    attention: Attention,
    architecture: str,
    family: str,
    text: TextOptions,
) -> OpenedModel:
    """Open a checkpoint of one CLIP text encoder, an autoencoder and a U-Net."""
    networks = {
        "unet": load(folder, "unet", UNet2DConditionModel, family=family),
        "text_encoder": load_encoder(folder, "text_encoder", CLIPTextModel, family=family),
        "vae": load(folder, "vae", AutoencoderKL, family=family),
    }
    set_attention(networks["unet"], attention, device)
    return Sd1Model(
        source=source,
        folder=folder,
        networks={name: network.to(device) for name, network in networks.items()},
        tokenizers={"text_encoder": load_tokenizer(folder, "tokenizer", CLIPTokenizer, family=family)},
        scheduler_config=scheduler,
        device=device,
        architecture=architecture,
        text=text,
        zeros_for_empty=text.empty_caption == "zeros",
    )


SPEC: type[Family] = Sd1
