"""What families whose networks are of diffusers and transformers have in common: opening, hashing, sampling."""

import hashlib
import inspect
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers.models import attention_processor
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.model import Guide, LatentDistribution
from tuner.diffusion.prediction import Epsilon, Prediction, Velocity
from tuner.diffusion.schedule import Schedule, VariancePreserving, rescale_zero_terminal_snr
from tuner.diffusion.timesteps.base import Timesteps
from tuner.diffusion.timesteps.uniform import Uniform
from tuner.errors import ConfigError, DataError
from tuner.families.base import Attention, Sampling

PREDICTIONS: Mapping[str, Prediction] = {"epsilon": Epsilon(), "v_prediction": Velocity()}
RESCALE = 0.7
"""How much of guidance's contrast is taken back where the schedule ends in pure noise (Lin et al. 2023)."""
ENCODER = ("encoder.", "quant_conv.")
"""The half of an autoencoder that decides what latents are."""


@dataclass(kw_only=True)
class DiffusersModel:
    """An opened checkpoint; a family says how its text encoders and its denoiser are called."""

    source: str
    folder: Path
    networks: dict[str, nn.Module]
    tokenizers: Mapping[str, Any]
    """The tokenizer of each text encoder."""
    scheduler_config: Mapping[str, Any]
    device: torch.device
    denoiser: str = "unet"
    text_encoders: Sequence[str] = ("text_encoder",)
    architecture: str = ""
    guidance: float | None = None
    usual_guidance: float = 7.5
    """Of pictures, where it is left out."""
    patch: int = 1
    """The side, in latents, of the squares that the denoiser takes as one."""
    schedule: Schedule = field(init=False)
    prediction: Prediction = field(init=False)
    prediction_type: str = field(init=False)
    timesteps: Timesteps = field(default_factory=Uniform)
    captioned: bool = True
    untrained: Callable[[], AbstractContextManager[None]] | None = None
    guide: Guide | None = field(init=False, default=None)
    adapter_targets: Mapping[str, str] = field(default_factory=dict[str, str])
    unused: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        vae = self.raw("vae").config
        self.scaling = float(vae["scaling_factor"])
        self.shift = float(vae.get("shift_factor") or 0)
        self.shrinks = 2 ** (len(vae["block_out_channels"]) - 1)
        """Pixels of a side that are one of latents."""
        self.resolution_step = self.shrinks * self.patch
        self.latent_channels = int(vae["latent_channels"])
        self.resolution = int(self.raw(self.denoiser).config.get("sample_size", 128)) * self.shrinks
        self.prefixes: Mapping[str, str] = {
            name: f"{name}.{_published(network)}" for name, network in self.networks.items()
        }
        self.set_schedule()

    def set_schedule(self) -> None:
        """Takes `schedule`, `prediction` and `prediction_type` from the scheduler's config.

        Raises:
            DataError: it names a prediction that there is none of, or one that cannot be with its schedule.
        """
        scheduler = self.scheduler()
        file = self.folder / "scheduler" / "scheduler_config.json"
        self.prediction_type = str(scheduler.config["prediction_type"])
        if self.prediction_type not in PREDICTIONS:
            raise DataError(f"{file}: prediction_type {self.prediction_type!r} is none of {', '.join(PREDICTIONS)}")
        self.prediction = PREDICTIONS[self.prediction_type]
        to_zero = scheduler.config["rescale_betas_zero_snr"]
        if to_zero and self.prediction_type == "epsilon":
            raise DataError(f"{file}: rescale_betas_zero_snr needs v_prediction: pure noise says nothing of a picture")
        plain = type(scheduler).from_config({**scheduler.config, "rescale_betas_zero_snr": False})
        own = VariancePreserving(plain.alphas_cumprod.float())
        self.schedule = rescale_zero_terminal_snr(own) if to_zero else own

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        with exactly(self.device):
            encoded = self.raw("vae").encode(pixels.to(self.device))
        if isinstance(encoded, VQEncoderOutput):  # which is quantized by the decoder, and no distribution
            return LatentDistribution(encoded.latents * self.scaling, torch.zeros_like(encoded.latents))
        posterior = encoded.latent_dist
        return LatentDistribution((posterior.mean - self.shift) * self.scaling, posterior.std * self.scaling)

    def decode_latents(self, latents: Tensor) -> Tensor:
        with exactly(self.device):
            return self.raw("vae").decode(latents.to(self.device) / self.scaling + self.shift).sample

    def encode_guide(self, guide: Tensor) -> Tensor:
        raise AssertionError(f"{self.source} is told captions alone")

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        raise NotImplementedError

    def words(self, caption: str) -> list[str]:
        whole = [(self._ids(tokenizer, caption), tokenizer) for tokenizer in self.tokenizers.values()]
        ids, tokenizer = max(whole, key=lambda each: len(each[0]))
        return [tokenizer.decode([i]) for i in ids]

    @staticmethod
    def _ids(tokenizer: Any, caption: str) -> list[int]:
        return tokenizer(caption, add_special_tokens=False, verbose=False).input_ids

    def count_tokens(self, caption: str) -> int:
        return max(len(self._ids(tokenizer, caption)) for tokenizer in self.tokenizers.values())

    @property
    def max_tokens(self) -> int:
        return min(self.length(name) for name in self.text_encoders) - 2

    def length(self, component: str) -> int:
        """How many tokens a text encoder takes, start and end included."""
        config = self.raw(component).config
        return min(self.tokenizers[component].model_max_length, config.max_position_embeddings)

    def ids(self, component: str, captions: Sequence[str]) -> Tensor:
        """Captions as a text encoder takes them: `[B, L]`, padded and cut off to its length."""
        tokenizer = self.tokenizers[component]
        taken = tokenizer(
            list(captions), padding="max_length", max_length=self.length(component), truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return taken.input_ids.to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """That the denoiser computes in; what of it learns may be kept in another."""
        return next(p for p in self.raw(self.denoiser).parameters() if p.is_floating_point()).dtype

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        raise NotImplementedError

    def cast_frozen(self, dtype: torch.dtype) -> None:
        for p in self.networks[self.denoiser].parameters():
            if not p.requires_grad and p.is_floating_point():  # others are quantized
                p.data = p.data.to(dtype)

    def rest(self, *components: str) -> None:
        """These are small enough to stay."""

    def checkpoint_gradients(self) -> None:
        self.raw(self.denoiser).enable_gradient_checkpointing()
        for name in self.text_encoders:
            self.raw(name).gradient_checkpointing_enable()

    def fingerprint(self, component: str) -> str:
        network = self.raw(component)
        facts: dict[str, Any] = {"class": type(network).__name__, "config": _architecture(network)}
        if component in self.tokenizers:
            tokenizer = self.tokenizers[component]
            words = json.loads(tokenizer.backend_tokenizer.to_str())
            del words["padding"], words["truncation"]  # as the last call set them
            facts |= {"words": words, "padding": tokenizer.pad_token_id, "length": self.length(component) - 2}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(network.state_dict().items()):
            if component == "vae" and not name.startswith(ENCODER):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def scheduler(self) -> Any:
        """The stock scheduler that pictures are made with."""
        raise NotImplementedError

    def pipeline(self) -> Any:
        """A stock pipeline over these very networks."""
        raise NotImplementedError

    def noise(self, seed: int, width: int, height: int) -> Tensor:
        """What a picture of a size in pixels begins as, as `pipeline` takes it: `[1, ...]` float32."""
        shape = (1, self.latent_channels, height // self.shrinks, width // self.shrinks)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def guided(self, prompt: str, sampling: Sampling) -> dict[str, Any]:
        """The pipeline's arguments that say what to paint."""
        return {
            "prompt": prompt,
            "negative_prompt": sampling.negative_prompt,
            "guidance_scale": sampling.guidance,
            **({"guidance_rescale": RESCALE} if self._rescaled() else {}),
        }

    def _rescaled(self) -> bool:
        """Whether guidance's contrast is to be taken back, and the pipeline can."""
        to_zero = bool(self.scheduler_config.get("rescale_betas_zero_snr"))
        return to_zero and "guidance_rescale" in inspect.signature(type(self.pipeline()).__call__).parameters

    def beginning(self, seed: int, width: int, height: int, sampling: Sampling) -> dict[str, Any]:
        """The pipeline's arguments that say what a picture begins as, and what else it is told."""
        for name in ("image", "guide", "strength"):
            if getattr(sampling, name) is not None:
                raise ConfigError(f"sampling.{name}: {self.source} is told a prompt and nothing else; leave it out")
        return {"width": width, "height": height, "latents": self.noise(seed, width, height).to(self.device)}

    def draw(
        self, pipeline: Any, prompt: str, seed: int, width: int, height: int, sampling: Sampling
    ) -> list[Image.Image]:
        """What `pipeline` makes of a prompt."""
        result = pipeline(
            **self.guided(prompt, sampling), **self.beginning(seed, width, height, sampling),
            num_inference_steps=sampling.steps,
        )  # fmt: skip
        return cast(list[Image.Image], result.images)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Image.Image]:
        width, height = sampling.width or self.resolution, sampling.height or self.resolution
        if sampling.guidance is None:
            sampling = replace(sampling, guidance=self.usual_guidance)
        training = {name: network.training for name, network in self.networks.items()}
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for name in self.networks:
            self.raw(name).eval()
        try:
            pictures: list[Image.Image] = []
            with ExitStack() as stack:
                stack.enter_context(decoding_exactly(self.raw("vae"), self.device))
                if self.dtype != torch.float32:  # the other networks are in float32
                    stack.enter_context(torch.autocast(self.device.type, self.dtype))
                for prompt, seed in zip(prompts, seeds, strict=True):
                    pictures += self.draw(pipeline, prompt, seed, width, height, sampling)
            return pictures
        finally:
            for name, mode in training.items():
                self.raw(name).train(mode)

    def raw(self, component: str) -> Any:
        """The network itself, without a wrapper for several processes."""
        network = self.networks[component]
        return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


@contextmanager
def exactly(device: torch.device) -> Generator[None]:
    """Each operation in its inputs' own precision, also within autocast.

    Autoencoders need it: Stable Diffusion XL's goes beyond what float16 holds.
    """
    with torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext():
        yield


@contextmanager
def decoding_exactly(autoencoder: Any, device: torch.device) -> Generator[None]:
    """Within it the autoencoder, in float32 itself, encodes and decodes in float32 though autocast is on."""
    own = {name: getattr(autoencoder, name) for name in ("encode", "decode")}

    def exact(name: str) -> Callable[..., Any]:
        def call(given: Tensor, *args: Any, **options: Any) -> Any:
            with exactly(device):
                return own[name](given.float(), *args, **options)

        return call

    for name in own:
        setattr(autoencoder, name, exact(name))
    try:
        yield
    finally:
        for name in own:
            delattr(autoencoder, name)


def picture(file: Path, width: int, height: int, what: str) -> Image.Image:
    """A picture that sampling is told, upright and of a size.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(file.expanduser()) as opened:
            upright = ImageOps.exif_transpose(opened)
            grey = upright.mode in ("I", "F") or upright.mode.startswith("I;16")
            return upright.convert("F" if grey else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError) as error:
        raise DataError(f"sampling.{what}: {file}: cannot be read ({error}); give another picture") from error


def load(
    folder: Path, component: str, kind: Any, *, family: str, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A network of a diffusers folder in `dtype`, every tensor of it from its files.

    Raises:
        DataError: it is not there, cannot be read, or lacks tensors; the libraries would go on with random ones.
    """
    place = _place(folder, component, family)
    try:
        with quiet():
            network, found = kind.from_pretrained(
                place, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{place}: cannot be loaded ({reason}); is the download complete?") from error
    lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if lacking:
        raise DataError(
            f"{place}: its weights lack {lacking[0]}, or have it in another shape than config.json"
            f" says ({len(lacking)} such tensors); was it saved with a LoRA attached? download it again"
        )
    return network


def load_encoder(folder: Path, component: str, kind: Any, *, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """As `load`, for a network of transformers: they raise at the first tensor of another shape unless told not to."""
    return load(folder, component, kind, family=family, dtype=dtype, ignore_mismatched_sizes=True)


def load_tokenizer(folder: Path, component: str, kind: Any, *, family: str) -> PreTrainedTokenizerBase:
    """Raises: DataError: its words are missing; the library would open one of two words then."""
    place = _place(folder, component, family)
    names = {path.name for path in place.iterdir()}
    alone = {"tokenizer.json", "spiece.model", "vocab.txt"}  # of which one is enough
    if not (alone & names or {"vocab.json", "merges.txt"} <= names):
        raise DataError(f"{place}: has neither tokenizer.json nor vocab.json with merges.txt; download them again")
    try:
        return kind.from_pretrained(place)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{place}: cannot be loaded ({reason}); is the download complete?") from error


def set_attention(unet: Any, attention: Attention, device: torch.device) -> None:
    """How a U-Net's attention is computed."""
    if attention == "math" or (attention == "auto" and device.type == "cpu"):
        for module in unet.modules():
            if isinstance(module, attention_processor.Attention):  # on CPUs its backward pass is several times faster
                module.set_processor(attention_processor.AttnProcessor())


def _place(folder: Path, component: str, family: str) -> Path:
    if not (folder / component).is_dir():
        raise DataError(f"{folder}: has no {component}/; a {family} folder has one")
    return folder / component


def _published(network: nn.Module) -> str:
    """What published files put before the names of a network's parameters: transformers leaves a part of it out."""
    return "text_model." if type(network).__name__ == "CLIPTextModel" and not hasattr(network, "text_model") else ""


def _architecture(network: Any) -> dict[str, Any]:
    """What a network's config says of its arithmetic: not where it came from, nor which version wrote it."""
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    return {
        key: config[key] for key in config if not key.startswith("_") and key not in ("transformers_version", "dtype")
    }


@contextmanager
def quiet() -> Generator[None]:
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
