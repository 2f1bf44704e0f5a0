"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): a transformer of pictures and text together, told
by two CLIP encoders and T5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.model import LatentDistribution
from tuner.errors import ConfigError
from tuner.families._flow import CLIP_LAYERS, T5_LAYERS, FlowFamily, FlowModel, check_t5_length
from tuner.families.base import Attention, Family, OpenedModel, Sampling
from tuner.families.detect import read_config

FAMILY = "Stable Diffusion 3"
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


@dataclass(kw_only=True)
class Sd3Model(FlowModel):
    """An opened Stable Diffusion 3 or 3.5 checkpoint."""

    t5: str = T5
    usual_guidance: float = 7.0
    adapter_targets: Mapping[str, str] = field(
        default_factory=lambda: {
            "transformer": r"\.transformer_blocks\.\d+\.(attn2?|ff|ff_context)\.",
            "text_encoder": CLIP_LAYERS,
            "text_encoder_2": CLIP_LAYERS,
            T5: T5_LAYERS,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.raw("transformer").config
        version = "3.5" if config["qk_norm"] else "3"
        self.architecture = f"stable-diffusion-{version}-{'large' if config['num_layers'] > 24 else 'medium'}"
        self.longest_side = int(config["pos_embed_max_size"]) * self.resolution_step
        """In pixels: the transformer knows no place beyond."""

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        self._refuse_larger(pixels.shape[3], pixels.shape[2])
        return super().encode_images(pixels)

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """CLIP's penultimate layers, not normalised, side by side and as wide as T5's tokens, which come after them;
        CLIP's projections are pooled.
        """
        with self.present(*self.text_encoders):
            outputs = [self.networks[name](self.ids(name, captions), output_hidden_states=True) for name in CLIPS]
            t5 = self.encode_t5(captions)
        clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return Conditioning(
            tokens=torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])).to(t5.dtype), t5], 1),
            pooled=torch.cat([output.text_embeds for output in outputs], -1),
        )

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None
        return self.networks["transformer"](
            hidden_states=x_t.to(self.dtype),
            timestep=t,
            encoder_hidden_states=conditioning.tokens.to(self.dtype),
            pooled_projections=conditioning.pooled.to(self.dtype),
            return_dict=False,
        )[0]

    def pipeline(self) -> StableDiffusion3Pipeline:
        build: Any = StableDiffusion3Pipeline
        return build(
            vae=self.raw("vae"), transformer=self.raw("transformer"), scheduler=self.scheduler(),
            text_encoder=self.raw("text_encoder"), tokenizer=self.tokenizers["text_encoder"],
            text_encoder_2=self.raw("text_encoder_2"), tokenizer_2=self.tokenizers["text_encoder_2"],
            text_encoder_3=self.raw(T5) if T5 in self.networks else None, tokenizer_3=self.tokenizers.get(T5),
        )  # fmt: skip

    def noise(self, seed: int, width: int, height: int) -> Tensor:
        self._refuse_larger(width, height)
        return super().noise(seed, width, height)

    def guided(self, prompt: str, sampling: Sampling) -> dict[str, Any]:
        """The texts encoded as for training, in float32 as the noise is."""
        told, against = (
            self.encode_text([text]).each(torch.Tensor.float) for text in (prompt, sampling.negative_prompt)
        )
        return {
            "prompt_embeds": told.tokens,
            "pooled_prompt_embeds": told.pooled,
            "negative_prompt_embeds": against.tokens,
            "negative_pooled_prompt_embeds": against.pooled,
            "guidance_scale": sampling.guidance,
        }

    def _refuse_larger(self, width: int, height: int) -> None:
        if max(width, height) > self.longest_side:
            raise ConfigError(
                f"pictures.resolution: a picture of {width} x {height} pixels has a side longer than "
                f"{self.longest_side}, and {self.source} knows no place beyond; lower it, or pictures.max_ratio"
            )


@dataclass(frozen=True, kw_only=True)
class Sd3(FlowFamily):
    """The family: what opens it."""

    t5_length: int = 256
    """How many tokens T5 gives; 77 and 256 are usual."""

    def __post_init__(self) -> None:
        check_t5_length(self.t5_length)

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        index = read_config(folder / "model_index.json")
        kinds: dict[str, Any] = {"transformer": SD3Transformer2DModel}
        kinds |= dict.fromkeys(CLIPS, CLIPTextModelWithProjection)
        if (index.get(T5) or [None])[0] is not None:
            kinds[T5] = T5EncoderModel
        networks, tokenizers = self.load_networks(folder, kinds, family=FAMILY, device=device, attention=attention)
        return Sd3Model(
            source=source,
            folder=folder,
            networks=networks,
            tokenizers=tokenizers,
            scheduler_config=read_config(folder / "scheduler" / "scheduler_config.json"),
            device=device,
            text_encoders=tuple(name for name in networks if name.startswith("text_encoder")),
            t5_length=self.t5_length,
        )


SPEC: type[Family] = Sd3
