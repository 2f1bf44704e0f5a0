"""What families of diffusion transformers have in common: T5 beside CLIP, and pictures that flow out of noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tuner.diffusion.prediction import FlowVelocity
from tuner.diffusion.schedule import Flow
from tuner.diffusion.timesteps.base import Timesteps
from tuner.diffusion.timesteps.logit_normal import LogitNormal
from tuner.diffusion.timesteps.shifted import Shifted
from tuner.diffusion.timesteps.shifted_by_size import FEWEST, MOST, ShiftedBySize
from tuner.errors import ConfigError
from tuner.families._diffusers import DiffusersModel, load, load_encoder, load_tokenizer
from tuner.families.base import Attention

CLIP_LAYERS = r"\.(self_attn|mlp)\."
T5_LAYERS = r"\.(SelfAttention|DenseReluDense)\."


@dataclass(kw_only=True)
class FlowModel(DiffusersModel):
    """An opened checkpoint of a diffusion transformer that is told by T5 among others."""

    t5: str
    """The component that T5 is, where it is there."""
    t5_length: int
    """How many tokens T5 gives, its end and what fills it up included."""
    denoiser: str = "transformer"
    patch: int = 2

    def set_schedule(self) -> None:
        """Straight lines; noise levels as the scheduler moves them for pictures, logit-normal before that."""
        config = self.scheduler().config
        self.prediction_type = "flow_prediction"
        self.prediction = FlowVelocity()
        self.schedule = Flow(int(config["num_train_timesteps"]))
        self.timesteps = _timesteps(config)

    def encode_t5(self, captions: Sequence[str]) -> Tensor:
        """`[B, t5_length, D]`: zeros where there is no T5, as the stock pipelines have it.

        What fills short captions up is looked at like words: so these models were trained.
        """
        if self.t5 in self.networks:
            return self.networks[self.t5](self.ids(self.t5, captions))[0]
        width = int(self.raw(self.denoiser).config["joint_attention_dim"])
        return torch.zeros(len(captions), self.t5_length, width, device=self.device)

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
        return cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config))


def load_networks(
    folder: Path, kinds: dict[str, Any], *, family: str, device: torch.device, attention: Attention
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The networks on `device`, one after the other so that the CPU holds one at a time, and the tokenizers.

    Args:
        folder: a diffusers folder.
        kinds: the classes of the denoiser and the text encoders, by component.
        family: the name for messages.
        device: where the networks go.
        attention: how it is computed; torch's fused kernels are the fastest for these on every device.

    Raises:
        ConfigError: attention in plain matrix products was asked for.
    """
    if attention == "math":
        raise ConfigError(f"model.attention: {family} has no 'math'; leave it at 'auto'")
    networks: dict[str, nn.Module] = {}
    tokenizers: dict[str, Any] = {}
    for component, kind in {**kinds, "vae": AutoencoderKL}.items():
        if component.startswith("text_encoder"):
            networks[component] = load_encoder(folder, component, kind, family=family).to(device)
            words = T5TokenizerFast if kind is T5EncoderModel else CLIPTokenizer
            place = component.replace("text_encoder", "tokenizer")
            tokenizers[component] = load_tokenizer(folder, place, words, family=family)
        else:
            networks[component] = load(folder, component, kind, family=family).to(device)
        if kind is T5EncoderModel:
            _never_drop(networks[component])
    return networks, tokenizers


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
