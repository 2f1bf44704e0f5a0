"""Stable Diffusion XL, base and refiner (Podell et al. 2023, arXiv:2307.01952): a U-Net told by two text encoders, the
text as one vector, and how the picture was cut.

The refiner has the second text encoder only, is told a score of beauty instead of the cut's size, and knows the last
fifth of the noise levels alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_instruct_pix2pix import (
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.timesteps.base import Timesteps
from tuner.diffusion.timesteps.uniform import Uniform
from tuner.errors import ConfigError
from tuner.families._clip import ClipModel, TextOptions
from tuner.families._diffusers import (
    load,
    load_encoder,
    load_tokenizer,
    picture,
    set_attention,
)
from tuner.families._discrete import DiscreteFamily
from tuner.families._guides import GuidedModel
from tuner.families.base import Attention, Family, OpenedModel, Sampling
from tuner.families.detect import read_config

FAMILY = "Stable Diffusion XL"
STOCK: Mapping[str | None, Any] = {
    None: StableDiffusionXLPipeline,
    "mask": StableDiffusionXLInpaintPipeline,
    "picture": StableDiffusionXLInstructPix2PixPipeline,
    "refiner": StableDiffusionXLImg2ImgPipeline,
}
"""The stock pipelines by what the U-Net is told besides text, and the refiner's."""
BEAUTY = 6.0
"""The score that the refiner is told of every picture, as its pipeline does by default."""
REFINED = 0.2
"""The share of the noise levels that the refiner was trained on, from none on (section 2.5)."""
STRENGTH = 0.3
"""How far the refiner's pipeline noises a picture by default."""


@dataclass(kw_only=True)
class SdxlModel(ClipModel, GuidedModel):
    """An opened Stable Diffusion XL checkpoint: told by the penultimate layers of both encoders, not normalised."""

    leaves_out: ClassVar[int] = 1
    normed: ClassVar[bool] = False
    pooled_of: ClassVar[str | None] = "text_encoder_2"

    adapter_targets: Mapping[str, str] = field(
        default_factory=lambda: {
            "unet": r"\.attentions\.",
            "text_encoder": r"\.(self_attn|mlp)\.",
            "text_encoder_2": r"\.(self_attn|mlp)\.",
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.raw("unet").config
        pooled = int(self.raw("text_encoder_2").config.projection_dim)
        told = int(config["projection_class_embeddings_input_dim"]) - pooled
        self.is_refiner = told // int(config["addition_time_embed_dim"]) == 5
        self.architecture = "stable-diffusion-xl-v1-refiner" if self.is_refiner else "stable-diffusion-xl-v1-base"
        if self.is_refiner:
            self.timesteps: Timesteps = Uniform(end=REFINED)

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None
        assert conditioning.frame is not None, "Stable Diffusion XL is told how each picture was cut"
        frame = conditioning.frame.to(x_t.device)  # stays float32: bfloat16 has no 1023
        if self.is_refiner:
            frame = torch.cat([frame[:, :4], torch.full_like(frame[:, :1], BEAUTY)], 1)
        added = {"text_embeds": conditioning.pooled.to(self.dtype), "time_ids": frame}
        return self.networks["unet"](
            self.beside(x_t, conditioning).to(self.dtype), t, conditioning.tokens.to(self.dtype),
            encoder_attention_mask=conditioning.mask, added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip

    def pipeline(self) -> Any:
        own = {"requires_aesthetics_score": True} if self.is_refiner else {}
        first = "text_encoder" in self.networks
        return STOCK["refiner" if self.is_refiner else self.guide](
            vae=self.raw("vae"), unet=self.raw("unet"), scheduler=self.scheduler(),
            text_encoder=self.raw("text_encoder") if first else None,
            tokenizer=self.tokenizers["text_encoder"] if first else None,
            text_encoder_2=self.raw("text_encoder_2"), tokenizer_2=self.tokenizers["text_encoder_2"],
            force_zeros_for_empty_prompt=self.zeros_for_empty, add_watermarker=False, **own,
        )  # fmt: skip

    def beginning(self, seed: int, width: int, height: int, sampling: Sampling) -> dict[str, Any]:
        if not self.is_refiner:
            own = super().beginning(seed, width, height, sampling)
            return {**own, "width": width, "height": height}  # which its editing pipeline does not see in the picture
        if sampling.image is None or sampling.guide is not None:
            raise ConfigError(f"sampling.image: {self.source} refines pictures; give one, and no guide")
        return {
            "image": picture(sampling.image, width, height, "image"),
            "strength": sampling.strength or STRENGTH,
            "aesthetic_score": BEAUTY,
            "generator": torch.Generator().manual_seed(seed),
        }

    def scheduler(self) -> DDIMScheduler:
        settled = {"clip_sample": False, "steps_offset": 1}
        return cast(DDIMScheduler, DDIMScheduler.from_config({**self.scheduler_config, **settled}))


@dataclass(frozen=True, kw_only=True)
class Sdxl(DiscreteFamily, TextOptions):
    """The family: what opens it."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        index = read_config(folder / "model_index.json")
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        encoders = [name for name in kinds if (index.get(name) or [None])[0] is not None]
        networks: dict[str, Any] = {"unet": load(folder, "unet", UNet2DConditionModel, family=FAMILY)}
        networks |= {name: load_encoder(folder, name, kinds[name], family=FAMILY) for name in encoders}
        networks["vae"] = load(folder, "vae", AutoencoderKL, family=FAMILY)
        set_attention(networks["unet"], attention, device)
        return SdxlModel(
            source=source,
            folder=folder,
            networks={name: network.to(device) for name, network in networks.items()},
            tokenizers={
                name: load_tokenizer(folder, name.replace("text_encoder", "tokenizer"), CLIPTokenizer, family=FAMILY)
                for name in encoders
            },
            scheduler_config=self.read_scheduler(folder),
            device=device,
            text_encoders=tuple(encoders),
            text=self,
            zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True))  # as its own pipeline does
            if self.empty_caption is None
            else self.empty_caption == "zeros",
        )


SPEC: type[Family] = Sdxl
