"""What families of diffusion transformers have in common: T5 beside CLIP, and pictures that flow out of noise."""

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tuner.diffusion.model import LatentDistribution
from tuner.diffusion.prediction import FlowVelocity, Prediction
from tuner.diffusion.schedule import Flow, Schedule
from tuner.diffusion.timesteps.base import Timesteps
from tuner.diffusion.timesteps.logit_normal import LogitNormal
from tuner.diffusion.timesteps.shifted import Shifted
from tuner.diffusion.timesteps.shifted_by_size import FEWEST, MOST, ShiftedBySize
from tuner.errors import ConfigError
from tuner.families._diffusers import load, load_encoder, load_tokenizer
from tuner.families._quantized import Quantization, quantize
from tuner.families._words import WordsModel
from tuner.families.base import Attention, Sampling
from tuner.weights.folder import component as files_of
from tuner.weights.store import SafetensorsFile

CLIP_LAYERS = r"\.(self_attn|mlp)\."
T5_LAYERS = r"\.(SelfAttention|DenseReluDense)\."
BLOCKS = r"^(single_)?transformer_blocks\."
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class FlowModel(WordsModel):
    """An opened checkpoint of a diffusion transformer that is told by T5 among others."""

    t5: str
    """The component that T5 is, where it is there."""
    t5_length: int
    """How many tokens T5 gives, its end and what fills it up included."""
    denoiser: str = "transformer"
    patch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resting: set[str] = set()
        """Of the components, those that are on the device for the time of a call only."""

    def set_schedule(self) -> None:
        """Straight lines; noise levels as the scheduler moves them for pictures, logit-normal before that."""
        config = self.scheduler().config
        self.prediction_type = "flow_prediction"
        self.prediction: Prediction = FlowVelocity()
        self.schedule: Schedule = Flow(int(config["num_train_timesteps"]))
        self.timesteps: Timesteps = _timesteps(config)

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        with self.present("vae"):
            return super().encode_images(pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        with self.present("vae"):
            return super().decode_latents(latents)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        super().cast_frozen(dtype)
        self.raw(self.denoiser).to(self.device)

    def rest(self, *components: str) -> None:
        """As these networks are large, all begin on the CPU, and each comes to the device when it is first called."""
        self._resting |= {*components}
        for name in components:
            self.raw(name).to("cpu")

    @contextmanager
    def present(self, *components: str) -> Generator[None]:
        """For the time of a `with`, these are on the device."""
        for name in components:
            if (network := self.raw(name)).device != self.device:
                network.to(self.device)
        try:
            yield
        finally:
            for name in self._resting.intersection(components):
                self.raw(name).to("cpu")

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Image.Image]:
        with self.present("vae", self.denoiser):  # texts are encoded by `guided`
            return super().sample(prompts, seeds, sampling)

    def encode_t5(self, captions: Sequence[str]) -> Tensor:
        """`[B, t5_length, D]`: zeros where there is no T5, as the stock pipelines have it.

        What fills short captions up is looked at like words: so these models were trained.
        """
        if self.t5 in self.networks:
            return self.networks[self.t5](self.ids(self.t5, captions))[0]
        width = int(self.raw(self.denoiser).config["joint_attention_dim"])
        dtype = self.raw("text_encoder").dtype
        return torch.zeros(len(captions), self.t5_length, width, device=self.device, dtype=dtype)

    def length(self, component: str) -> int:
        return self.t5_length if component == self.t5 else super().length(component)

    def count_tokens(self, caption: str) -> int:
        """As the encoder counts that sees most of a caption, which is T5 where it is there."""
        tokenizer = self.tokenizers.get(self.t5) or self.tokenizers["text_encoder"]
        return len(tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)

    @property
    def max_tokens(self) -> int:
        return self.t5_length - 1 if self.t5 in self.networks else super().max_tokens

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return cast(
            FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config({**self.scheduler_config})
        )


@dataclass(frozen=True, kw_only=True)
class FlowFamily:
    """Options of families whose networks are large."""

    precision: Precision = "auto"
    """What all but the autoencoder is opened in. `auto`: each network as its files are, so that nothing is lost."""
    quantize: Quantization | None = None
    """What the blocks of the denoiser are kept in, where they do not learn themselves."""

    def load_networks(
        self, folder: Path, kinds: dict[str, Any], *, family: str, device: torch.device, attention: Attention
    ) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """The networks in the CPU's memory, and the text encoders' tokenizers.

        Args:
            folder: a diffusers folder.
            kinds: the classes of the denoiser and the text encoders, by component.
            family: the name for messages.
            device: where a quantized denoiser goes, as it is made there.
            attention: how it is computed; torch's fused kernels are the fastest for these on every device.

        Raises:
            ConfigError: attention in plain matrix products was asked for.
        """
        if attention == "math":
            raise ConfigError(f"model.attention: {family} has no 'math'; leave it at 'auto'")
        networks: dict[str, nn.Module] = {"vae": load(folder, "vae", AutoencoderKL, family=family)}
        tokenizers: dict[str, Any] = {}
        for component, kind in kinds.items():
            dtype = stored_dtype(folder / component) if self.precision == "auto" else DTYPES[self.precision]
            if component.startswith("text_encoder"):
                networks[component] = load_encoder(folder, component, kind, family=family, dtype=dtype)
                words = T5Tokenizer if kind is T5EncoderModel else CLIPTokenizer
                place = component.replace("text_encoder", "tokenizer")
                tokenizers[component] = load_tokenizer(folder, place, words, family=family)
            else:
                networks[component] = load(folder, component, kind, family=family, dtype=dtype)
                if self.quantize is not None:
                    exact = files_of(folder / component)
                    quantize(networks[component], BLOCKS, self.quantize, device, exact)
            if kind is T5EncoderModel:
                _never_drop(networks[component])
        return networks, tokenizers


def stored_dtype(folder: Path) -> torch.dtype:
    """What most numbers of a network are stored in; bfloat16 for less than half precision, and float32 for none."""
    numbers: Counter[torch.dtype] = Counter()
    for file in folder.glob("*.safetensors"):
        if "." not in file.stem:  # else it is of a variant, such as `model.fp16.safetensors`
            for meta in SafetensorsFile(file).metas.values():
                numbers[meta.dtype] += prod(meta.shape)
    most = max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)
    return torch.bfloat16 if most.itemsize == 1 else most if most in DTYPES.values() else torch.float32


def check_t5_length(length: int) -> None:
    """Raises: ValueError: not one that T5, and the stock pipelines, take."""
    if not 2 <= length <= 512:
        raise ValueError(f"t5_length must lie between 2 and 512, got {length}")


def _never_drop(t5: nn.Module) -> None:
    """T5 drops a tenth of everything while it learns, which nobody fine-tunes it with."""
    for module in cast(Any, t5).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def _timesteps(scheduler: Any) -> Timesteps:
    """The noise levels that a flow scheduler with this config goes by, drawn logit-normally."""
    if not scheduler["use_dynamic_shifting"]:
        return LogitNormal() if scheduler["shift"] == 1 else Shifted(shift=float(scheduler["shift"]))
    fewest, most = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (most - fewest)
    base, top = (scheduler["base_shift"] + slope * (tokens - fewest) for tokens in (FEWEST, MOST))
    return ShiftedBySize(base=base, max=top)
