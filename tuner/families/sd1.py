"""Stable Diffusion 1 (Rombach et al. 2022, arXiv:2112.10752): a U-Net on latents, told by a CLIP text encoder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.model import LatentDistribution
from tuner.diffusion.prediction import Epsilon, Prediction, Velocity
from tuner.diffusion.schedule import Schedule, VariancePreserving
from tuner.errors import DataError
from tuner.families.base import Attention, Family, OpenedModel, Sampling

PREDICTIONS: Mapping[str, Prediction] = {"epsilon": Epsilon(), "v_prediction": Velocity()}


@dataclass(kw_only=True)
class Sd1Model:
    """An opened Stable Diffusion 1 checkpoint."""

    source: str
    folder: Path
    networks: dict[str, nn.Module]
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    device: torch.device
    prefixes: Mapping[str, str]
    denoiser: str = "unet"
    text_encoders: Sequence[str] = ("text_encoder",)
    architecture: str = "stable-diffusion-v1"
    latent_channels: int = 4
    schedule: Schedule = field(init=False)
    prediction: Prediction = field(init=False)

    def __post_init__(self) -> None:
        scheduler = self._scheduler()
        self.prediction_type = str(scheduler.config["prediction_type"])
        config = self.folder / "scheduler" / "scheduler_config.json"
        if self.prediction_type not in PREDICTIONS:
            raise DataError(f"{config}: prediction_type {self.prediction_type!r} is none of {', '.join(PREDICTIONS)}")
        self.prediction = PREDICTIONS[self.prediction_type]
        self.schedule = VariancePreserving(scheduler.alphas_cumprod.float())
        if scheduler.config["rescale_betas_zero_snr"] and self.prediction_type == "epsilon":
            raise DataError(f"{config}: rescale_betas_zero_snr needs v_prediction: pure noise says nothing of a picture")
        vae, unet = self._raw("vae"), self._raw("unet")
        self.scaling = float(vae.config["scaling_factor"])
        self.resolution_step = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.resolution = int(unet.config["sample_size"]) * self.resolution_step
        self.adapter_targets: Mapping[str, str] = {
            "unet": r"\.attentions\.",
            "text_encoder": r"\.(self_attn|mlp)\.",
        }

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        posterior = self.networks["vae"].encode(pixels.to(self.device)).latent_dist  # pyright: ignore[reportCallIssue]
        return LatentDistribution(posterior.mean * self.scaling, posterior.std * self.scaling)

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return Conditioning(tokens=self.networks["text_encoder"](ids.to(self.device))[0])

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, add_special_tokens=False).input_ids)

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.model_max_length - 2

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self._raw("unet").conv_in.weight.dtype
        return self.networks["unet"](x_t.to(dtype), t, conditioning.tokens.to(dtype), return_dict=False)[0]

    def cast_frozen(self, dtype: torch.dtype) -> None:
        for component, network in self.networks.items():
            if component != "vae":
                for p in network.parameters():
                    if not p.requires_grad:
                        p.data = p.data.to(dtype)

    def checkpoint_gradients(self) -> None:
        self._raw("unet").enable_gradient_checkpointing()
        self._raw("text_encoder").gradient_checkpointing_enable()

    def fingerprint(self, component: str) -> str:
        network = self._raw(component)
        digest = hashlib.sha256(type(network).__name__.encode())
        if component == "text_encoder":
            vocabulary = cast(dict[str, int], self.tokenizer.get_vocab())
            digest.update(json.dumps([vocabulary, self.tokenizer.model_max_length], sort_keys=True).encode())
        else:
            digest.update(repr(self.scaling).encode())
        for name, tensor in sorted(network.state_dict().items()):
            if component == "vae" and not name.startswith(("encoder.", "quant_conv.")):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def pipeline(self) -> StableDiffusionPipeline:
        """A stock pipeline over these very networks."""
        build: Any = StableDiffusionPipeline
        return build(
            vae=self._raw("vae"), text_encoder=self._raw("text_encoder"), tokenizer=self.tokenizer,
            unet=self._raw("unet"), scheduler=self._scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Image.Image]:
        width, height = sampling.width or self.resolution, sampling.height or self.resolution
        shape = (self.latent_channels, height // self.resolution_step, width // self.resolution_step)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        training = {name: network.training for name, network in self.networks.items()}
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for name in self.networks:
            self._raw(name).eval()
        try:
            pictures: list[Image.Image] = []
            for prompt, latents in zip(prompts, noise, strict=True):
                dtype = self._raw("unet").conv_in.weight.dtype
                result = pipeline(
                    prompt, width=width, height=height, num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance, negative_prompt=sampling.negative_prompt,
                    latents=latents[None].to(self.device, dtype),
                )  # fmt: skip
                pictures += cast(list[Image.Image], result.images)  # pyright: ignore[reportAttributeAccessIssue]
            return pictures
        finally:
            for name, mode in training.items():
                self._raw(name).train(mode)

    def _scheduler(self) -> DDIMScheduler:
        return cast(DDIMScheduler, DDIMScheduler.from_config(dict(self.scheduler_config)))

    def _raw(self, component: str) -> Any:
        """The network itself, without a wrapper for several processes."""
        network = self.networks[component]
        return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


@dataclass(frozen=True, kw_only=True)
class Sd1:
    """The family: what opens it."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        def load(kind: Any, component: str) -> Any:
            if not (folder / component).is_dir():
                raise DataError(f"{folder}: has no {component}/; a Stable Diffusion 1 folder has one")
            try:
                if kind is CLIPTokenizer:
                    return CLIPTokenizer.from_pretrained(folder / component)
                return kind.from_pretrained(folder / component, torch_dtype=torch.float32, use_safetensors=True)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise DataError(
                    f"{folder / component}: cannot be loaded ({reason}); is the download complete?"
                ) from error

        unet, text_encoder = load(UNet2DConditionModel, "unet"), load(CLIPTextModel, "text_encoder")
        if attention == "math" or (attention == "auto" and device.type == "cpu"):
            unet.set_attn_processor(AttnProcessor())  # on CPUs its backward pass is several times faster
        networks = {"unet": unet, "text_encoder": text_encoder, "vae": load(AutoencoderKL, "vae")}
        flat = not hasattr(text_encoder, "text_model")  # since transformers 5.6; files keep the prefix
        return Sd1Model(
            source=source,
            folder=folder,
            networks={name: network.to(device) for name, network in networks.items()},
            tokenizer=load(CLIPTokenizer, "tokenizer"),
            scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")),
            device=device,
            prefixes={
                "unet": "unet.",
                "text_encoder": "text_encoder.text_model." if flat else "text_encoder.",
                "vae": "vae.",
            },
        )


SPEC: type[Family] = Sd1
