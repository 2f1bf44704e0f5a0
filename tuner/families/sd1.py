"""Stable Diffusion 1 (Rombach et al. 2022, arXiv:2112.10752): a U-Net on latents, told by a CLIP text encoder."""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers.utils.logging
import torch
import transformers.utils.logging
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
from tuner.families.detect import read_config

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
            raise DataError(
                f"{config}: rescale_betas_zero_snr needs v_prediction: pure noise says nothing of a picture"
            )
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
            list(captions), padding="max_length", max_length=self.max_tokens + 2, truncation=True, return_tensors="pt"
        ).input_ids
        return Conditioning(tokens=self.networks["text_encoder"](ids.to(self.device))[0])

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self._raw("text_encoder").config.max_position_embeddings) - 2

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self._raw("unet").conv_in.weight.dtype
        return self.networks["unet"](x_t.to(dtype), t, conditioning.tokens.to(dtype), return_dict=False)[0]

    def cast_frozen(self, dtype: torch.dtype) -> None:
        for p in self.networks["unet"].parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)

    def checkpoint_gradients(self) -> None:
        self._raw("unet").enable_gradient_checkpointing()
        self._raw("text_encoder").gradient_checkpointing_enable()

    def fingerprint(self, component: str) -> str:
        network = self._raw(component)
        facts: dict[str, Any] = {"class": type(network).__name__, "config": _architecture(network)}
        if component == "text_encoder":
            words = json.loads(self.tokenizer.backend_tokenizer.to_str())
            del words["padding"], words["truncation"]  # as the last call set them
            facts |= {"words": words, "padding": self.tokenizer.pad_token_id, "length": self.max_tokens}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
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
        dtype = self._raw("unet").conv_in.weight.dtype
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for name in self.networks:
            self._raw(name).eval()
        try:
            pictures: list[Image.Image] = []
            with ExitStack() as stack:
                if dtype != torch.float32:  # the other networks are in float32
                    stack.enter_context(torch.autocast(self.device.type, dtype))
                for prompt, latents in zip(prompts, noise, strict=True):
                    result = pipeline(
                        prompt, width=width, height=height, num_inference_steps=sampling.steps,
                        guidance_scale=sampling.guidance, negative_prompt=sampling.negative_prompt,
                        latents=latents[None].to(self.device),
                    )  # fmt: skip
                    pictures += cast(list[Image.Image], result.images)  # pyright: ignore[reportAttributeAccessIssue]
            return pictures
        finally:
            for name, mode in training.items():
                self._raw(name).train(mode)

    def _scheduler(self) -> DDIMScheduler:
        # what a stock pipeline sets, with a warning, where a base's config leaves it out: latents are no pixels to clip
        settled = {"clip_sample": False, "steps_offset": 1}
        return cast(DDIMScheduler, DDIMScheduler.from_config({**self.scheduler_config, **settled}))

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
                    return _tokenizer(folder / component)
                own = {"ignore_mismatched_sizes": True} if component == "text_encoder" else {}  # then it says which
                with _quiet():
                    network, found = kind.from_pretrained(
                        folder / component,
                        torch_dtype=torch.float32,
                        use_safetensors=True,
                        output_loading_info=True,
                        **own,
                    )
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise DataError(
                    f"{folder / component}: cannot be loaded ({reason}); is the download complete?"
                ) from error
            # the libraries would go on with random weights
            lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
            if lacking:
                raise DataError(
                    f"{folder / component}: its weights lack {lacking[0]}, or have it in another shape than config.json"
                    f" says ({len(lacking)} such tensors); was it saved with a LoRA attached? download it again"
                )
            return network

        unet, text_encoder = load(UNet2DConditionModel, "unet"), load(CLIPTextModel, "text_encoder")
        if attention == "math" or (attention == "auto" and device.type == "cpu"):
            unet.set_attn_processor(AttnProcessor())  # on CPUs its backward pass is several times faster
        networks = {"unet": unet, "text_encoder": text_encoder, "vae": load(AutoencoderKL, "vae")}
        return Sd1Model(
            source=source,
            folder=folder,
            networks={name: network.to(device) for name, network in networks.items()},
            tokenizer=load(CLIPTokenizer, "tokenizer"),
            scheduler_config=read_config(folder / "scheduler" / "scheduler_config.json"),
            device=device,
            prefixes={
                "unet": "unet.",
                "text_encoder": "text_encoder.text_model.",  # as in published files; transformers leaves it out
                "vae": "vae.",
            },
        )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Raises: DataError: its words are missing; the library would open one of two words then."""
    names = {path.name for path in folder.iterdir()}
    if not ("tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names):
        raise DataError(f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt; download them again")
    return CLIPTokenizer.from_pretrained(folder)


def _architecture(network: Any) -> dict[str, Any]:
    """What a network's config says of its arithmetic: not where it came from, nor which version wrote it."""
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    return {
        key: config[key] for key in config if not key.startswith("_") and key not in ("transformers_version", "dtype")
    }


@contextmanager
def _quiet() -> Generator[None]:
    """No progress bars and no warnings of what loading finds: what matters of it is an error here."""
    libraries: list[Any] = [diffusers.utils.logging, transformers.utils.logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


SPEC: type[Family] = Sd1
