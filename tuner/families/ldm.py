"""Latent diffusion told text (Rombach et al. 2022, arXiv:2112.10752, section 4.3.1), Stable Diffusion's predecessor:
`CompVis/ldm-text2im-large-256`. Its text encoder is like BERT, and learned together with the U-Net.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel, LDMTextToImagePipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import BertTokenizer

from tuner.diffusion.batch import Conditioning
from tuner.errors import ConfigError
from tuner.families._diffusers import DiffusersModel, load, load_encoder, load_tokenizer, set_attention
from tuner.families._discrete import DiscreteFamily
from tuner.families.base import Attention, Family, OpenedModel, Sampling
from tuner.families.ddpm import autoencoder

TITLE = "latent diffusion"


@dataclass(kw_only=True)
class LdmModel(DiffusersModel):
    """An opened latent diffusion model."""

    text_encoders: Sequence[str] = ("bert",)
    architecture: str = "latent-diffusion"
    usual_guidance: float = 6.0
    adapter_targets: Mapping[str, str] = field(
        default_factory=lambda: {"unet": r"\.attentions\.", "bert": r"\.layers\.\d+\.(self_attn\.|fc\d)"}
    )
    unused: Mapping[str, str] = field(default_factory=lambda: {"bert": r"\.to_logits\."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prefixes: Mapping[str, str] = {**self.prefixes, "vae": "vqvae."}

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        return Conditioning(tokens=self.networks["bert"](self.ids("bert", captions))[0])

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.networks["unet"](x_t.to(self.dtype), t, conditioning.tokens.to(self.dtype), return_dict=False)[0]

    def checkpoint_gradients(self) -> None:
        """Of the U-Net alone: diffusers' text encoder cannot, with transformers 5."""
        self.raw("unet").enable_gradient_checkpointing()

    def scheduler(self) -> Any:
        return DDIMScheduler.from_config(dict(self.scheduler_config))

    def pipeline(self) -> Any:
        return LDMTextToImagePipeline(
            vqvae=self.raw("vae"), bert=self.raw("bert"), tokenizer=self.tokenizers["bert"],
            unet=self.raw("unet"), scheduler=self.scheduler(),
        )  # fmt: skip

    def guided(self, prompt: str, sampling: Sampling) -> dict[str, Any]:
        if sampling.negative_prompt:
            raise ConfigError(
                f"sampling.negative_prompt: {self.source}'s pipeline leads away from an empty text alone; leave it out"
            )
        return {"prompt": prompt, "guidance_scale": sampling.guidance}


@dataclass(frozen=True, kw_only=True)
class Ldm(DiscreteFamily):
    """The family: what opens it."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        networks = {
            "unet": load(folder, "unet", UNet2DConditionModel, family=TITLE),
            "bert": load_encoder(folder, "bert", LDMBertModel, family=TITLE),
            "vae": autoencoder(folder, TITLE),
        }
        set_attention(networks["unet"], attention, device)
        _without_dropout(networks["bert"])
        return LdmModel(
            source=source,
            folder=folder,
            networks={name: network.to(device) for name, network in networks.items()},
            tokenizers={"bert": load_tokenizer(folder, "tokenizer", BertTokenizer, family=TITLE)},
            scheduler_config=self.read_scheduler(folder),
            device=device,
        )


def _without_dropout(encoder: Any) -> None:
    """The original learned without, and diffusers' default of 0.1 is drawn from torch's own numbers, so that a resumed
    run would not be the unbroken one."""
    for module in encoder.modules():
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


SPEC: type[Family] = Ldm
