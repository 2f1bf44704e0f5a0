"""Flux.1, dev and schnell (Black Forest Labs 2024): a transformer of pictures and text together, told by T5, and by
CLIP in one vector.

Its denoiser takes squares of 2 x 2 latents as one token; outside of `denoise`, latents are pictures as everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from tuner.diffusion.batch import Conditioning
from tuner.errors import ConfigError
from tuner.families._flow import CLIP_LAYERS, T5_LAYERS, FlowFamily, FlowModel, check_t5_length
from tuner.families.base import Attention, Family, OpenedModel, Sampling
from tuner.families.detect import read_config

FAMILY = "Flux.1"
T5 = "text_encoder_2"


@dataclass(kw_only=True)
class FluxModel(FlowModel):
    """An opened Flux.1 checkpoint."""

    t5: str = T5
    usual_guidance: float = 3.5
    adapter_targets: Mapping[str, str] = field(
        default_factory=lambda: {
            "transformer": r"\.transformer_blocks\.\d+\.(attn|ff|ff_context)\."
            r"|\.single_transformer_blocks\.\d+\.(attn\.|proj_mlp$|proj_out$)",
            "text_encoder": CLIP_LAYERS,
            T5: T5_LAYERS,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.architecture = "flux-1-schnell" if self.guidance is None else "flux-1-dev"

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """T5's tokens; CLIP's last layer, normalised, at the end of the text is pooled."""
        with self.present(*self.text_encoders):
            pooled = self.networks["text_encoder"](self.ids("text_encoder", captions)).pooler_output
            return Conditioning(tokens=self.encode_t5(captions), pooled=pooled)

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None
        tokens = conditioning.tokens.to(self.dtype)
        height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
        output = self.networks["transformer"](
            hidden_states=pack(x_t.to(self.dtype)),
            timestep=t / self.schedule.steps,
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance, dtype=torch.float32),
            encoder_hidden_states=tokens,
            pooled_projections=conditioning.pooled.to(self.dtype),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x_t.device),
            img_ids=places(height, width).to(x_t.device),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def pipeline(self) -> FluxPipeline:
        build: Any = FluxPipeline
        return build(
            vae=self.raw("vae"), transformer=self.raw("transformer"), scheduler=self.scheduler(),
            text_encoder=self.raw("text_encoder"), tokenizer=self.tokenizers["text_encoder"],
            text_encoder_2=self.raw(T5), tokenizer_2=self.tokenizers[T5],
        )  # fmt: skip

    def noise(self, seed: int, width: int, height: int) -> Tensor:
        return pack(super().noise(seed, width, height))

    def guided(self, prompt: str, sampling: Sampling) -> dict[str, Any]:
        """The text encoded as for training, in float32 as the noise is."""
        if sampling.negative_prompt:
            raise ConfigError("negative_prompt: Flux.1 is told guidance and leads away from nothing; leave it out")
        told = self.encode_text([prompt]).each(torch.Tensor.float)
        return {
            "prompt_embeds": told.tokens,
            "pooled_prompt_embeds": told.pooled,
            "guidance_scale": sampling.guidance,
        }


def pack(latents: Tensor) -> Tensor:
    """`[B, C, 2h, 2w]` to `[B, h w, 4 C]`: each square of 2 x 2 is a token, row by row, channels first in it."""
    squares = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # B, C, h, 2, w, 2
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for h = `height` and w = `width`."""
    squares = tokens.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))  # B, h, w, C, 2, 2
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def places(height: int, width: int) -> Tensor:
    """`[height width, 3]`: where each token is: 0, its row, its column."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())


@dataclass(frozen=True, kw_only=True)
class Flux(FlowFamily):
    """The family: what opens it."""

    t5_length: int | None = None
    """How many tokens T5 gives: 512 for dev and 256 for schnell where left out."""
    guidance: float | None = None
    """The guidance that the denoiser is told while it learns: 1 where left out; schnell is told none."""

    def __post_init__(self) -> None:
        if self.t5_length is not None:
            check_t5_length(self.t5_length)

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        kinds = {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, T5: T5EncoderModel}
        networks, tokenizers = self.load_networks(folder, kinds, family=FAMILY, device=device, attention=attention)
        transformer: Any = networks["transformer"]
        told = bool(transformer.config["guidance_embeds"])
        if self.guidance is not None and not told:
            raise ConfigError(f"model.guidance: {source} is told none, as Flux.1 schnell is; leave it out")
        return FluxModel(
            source=source,
            folder=folder,
            networks=networks,
            tokenizers=tokenizers,
            scheduler_config=read_config(folder / "scheduler" / "scheduler_config.json"),
            device=device,
            text_encoders=("text_encoder", T5),
            t5_length=self.t5_length or (512 if told else 256),
            guidance=(1.0 if self.guidance is None else self.guidance) if told else None,
        )


SPEC: type[Family] = Flux
