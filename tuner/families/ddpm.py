"""Denoising without text: of pixels (DDPM, Ho et al. 2020, arXiv:2006.11239), or of latents (Rombach et al. 2022,
arXiv:2112.10752, section 4.1), by a U-Net that is told nothing, or a class.

A model that is told a class takes it for the caption: its number, or its name where `model.classes` names them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput, VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from tuner.diffusion.batch import Conditioning
from tuner.errors import ConfigError, DataError, did_you_mean
from tuner.families._diffusers import DiffusersModel, load, set_attention
from tuner.families._discrete import DiscreteFamily
from tuner.families.base import Attention, Family, OpenedModel, Sampling
from tuner.families.detect import read_config
from tuner.weights.store import check_model_folder

STOCK: Mapping[str, Any] = {"DDPMPipeline": DDPMPipeline, "DDIMPipeline": DDIMPipeline, "LDMPipeline": LDMPipeline}
AUTOENCODERS: Mapping[str, Any] = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
GREY = (0.299, 0.587, 0.114)
"""How much red, green and blue make of a grey (ITU-R BT.601, as Pillow has it)."""
GUIDANCE = 4.0
"""Of classes, where there is a class of nothing to lead away from; that of diffusers' `DiTPipeline`."""


class Pixels(nn.Module):
    """What stands for the autoencoder where there is none: pixels are latents, of three channels, or of one, grey."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = {"scaling_factor": 1.0, "block_out_channels": (0,), "latent_channels": channels}

    def encode(self, pixels: Tensor) -> VQEncoderOutput:
        if self.config["latent_channels"] == 1:
            pixels = (pixels * pixels.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
        return VQEncoderOutput(latents=pixels)

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=latents.expand(-1, 3, -1, -1))


class Told(nn.Module):
    """A U-Net that is told a class, called as pipelines call one that is told nothing."""

    def __init__(self, unet: Any, label: int, nothing: int | None, guidance: float) -> None:
        super().__init__()
        self.unet, self.label, self.nothing, self.guidance = unet, label, nothing, guidance
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, x_t: Tensor, t: Any) -> Any:
        """The prediction, led by classifier-free guidance away from that of the class of nothing."""
        output = self.unet(x_t, t, class_labels=self._labels(x_t, self.label))
        if self.guidance != 1:
            assert self.nothing is not None
            away = self.unet(x_t, t, class_labels=self._labels(x_t, self.nothing)).sample
            output.sample = away + self.guidance * (output.sample - away)
        return output

    def _labels(self, x_t: Tensor, label: int) -> Tensor:
        return torch.full((len(x_t),), label, device=x_t.device)


@dataclass(kw_only=True)
class DdpmModel(DiffusersModel):
    """An opened model without text."""

    kind: str
    """The stock pipeline's name."""
    text_encoders: Sequence[str] = ()
    architecture: str = "ddpm"
    adapter_targets: Mapping[str, str] = field(default_factory=lambda: {"unet": r"\.(attentions|resnets)\."})
    classes: tuple[str, ...] = ()
    null_class: int | None = None

    def __post_init__(self) -> None:
        config = self.raw("unet").config
        self.patch = 2 ** (len(config["block_out_channels"]) - 1)
        self.by_number = config["class_embed_type"] == "timestep"
        """Whether classes are embedded as times are, so that there is no end of them."""
        self.count: int = config["num_class_embeds"] or 0
        self.captioned = self.by_number or self.count > 0
        self._check_options()
        self.usual_guidance = 1.0 if self.null_class is None else GUIDANCE
        if self.captioned:
            self.architecture = "ddpm-class"
        super().__post_init__()
        self.prefixes: Mapping[str, str] = {"unet": "unet.", "vae": "vqvae."}

    def _check_options(self) -> None:
        """Raises: ConfigError: classes that it cannot be told."""
        if not self.captioned and (self.classes or self.null_class is not None):
            option = "classes" if self.classes else "null_class"
            raise ConfigError(f"model.{option}: {self.source!r} is told no classes; leave it out")
        if len(self.classes) != len(set(self.classes)) or any(not n or n.strip() != n for n in self.classes):
            raise ConfigError("model.classes: must differ, and be names without blanks around them")
        if number := next((name for name in self.classes if name.isdecimal()), None):
            raise ConfigError(f"model.classes: {number!r} would be a class's number; give it another name")
        if self.by_number:
            return
        if len(self.classes) > self.count:
            raise ConfigError(
                f"model.classes: {len(self.classes)} names, and {self.source!r} has {self.count} classes; give fewer"
            )
        if self.null_class is not None and not 0 <= self.null_class < self.count and self.captioned:
            raise ConfigError(f"model.null_class: must lie in 0 ... {self.count - 1}, got {self.null_class}")

    def label(self, caption: str) -> int:
        """The class that a caption names.

        Raises:
            DataError: none of the base's.
        """
        said = caption.strip()
        if not said:
            if self.null_class is None:
                raise DataError(
                    f"an empty caption: {self.source} has no class of nothing (model.null_class) and is told one of "
                    "its own; write the class's number or name, and leave captions.dropout out"
                )
            return self.null_class
        if said in self.classes:
            return self.classes.index(said)
        if said.isdecimal() and (self.by_number or int(said) < self.count):
            return int(said)
        if said.isdecimal():
            raise DataError(f"caption {said!r}: {self.source} has classes 0 ... {self.count - 1}; give one of them")
        names = "a name in model.classes" if self.classes else "named in model.classes"
        hint = did_you_mean(said, list(self.classes))
        raise DataError(f"caption {said!r}: is no class of {self.source}: neither a number nor {names}{hint}")

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """What nothing is told of but a class: no tokens."""
        labels = torch.tensor([self.label(caption) for caption in captions]) if self.captioned else None
        tokens = torch.zeros(len(captions), 0, 0, device=self.device)
        return Conditioning(tokens=tokens, labels=None if labels is None else labels.to(self.device))

    def words(self, caption: str) -> list[str]:
        return [caption.strip()] if self.count_tokens(caption) else []

    def count_tokens(self, caption: str) -> int:
        """One for a class.

        Raises:
            DataError: none of the base's.
        """
        if not self.captioned:
            return 0
        self.label(caption)
        return int(bool(caption.strip()))

    @property
    def max_tokens(self) -> int:
        return int(self.captioned)

    def fingerprint(self, component: str) -> str:
        if component == "captions":
            return f"classes {self.count} {self.by_number} {self.classes} {self.null_class}"
        return super().fingerprint(component)

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.networks["unet"](
            x_t.to(self.dtype), t, class_labels=conditioning.labels, return_dict=False,
        )[0]  # fmt: skip

    def scheduler(self) -> Any:
        own = self.scheduler_config.get("_class_name") == "DDPMScheduler" and self.kind == "DDPMPipeline"
        return (DDPMScheduler if own else DDIMScheduler).from_config(dict(self.scheduler_config))

    def pipeline(self) -> Any:
        """The base's own, which gives a class-conditional U-Net no class: see `draw`."""
        latent = {"vqvae": self.raw("vae")} if self.kind == "LDMPipeline" else {}
        return STOCK[self.kind](unet=self.raw("unet"), scheduler=self.scheduler(), **latent)

    def draw(
        self, pipeline: Any, prompt: str, seed: int, width: int, height: int, sampling: Sampling
    ) -> list[Image.Image]:
        self._check_asked(prompt, width, height, sampling)
        if self.captioned:
            guidance = sampling.guidance
            assert guidance is not None
            told = Told(self.raw("unet"), self.label(prompt), self.null_class, guidance)
            pipeline.register_modules(unet=told)
        generator = torch.Generator().manual_seed(seed)
        return cast(list[Image.Image], pipeline(generator=generator, num_inference_steps=sampling.steps).images)

    def _check_asked(self, prompt: str, width: int, height: int, sampling: Sampling) -> None:
        """Raises: ConfigError: something is asked for that would do nothing."""
        if not self.captioned and prompt.strip():
            raise ConfigError(f"prompt {prompt!r}: {self.source} is told nothing; give an empty one, ''")
        for name in ("image", "guide", "strength"):
            if getattr(sampling, name) is not None:
                raise ConfigError(f"sampling.{name}: {self.source} begins with noise; leave it out")
        if sampling.negative_prompt:
            raise ConfigError(f"sampling.negative_prompt: {self.source} is told no text; leave it out")
        if sampling.guidance != 1 and self.null_class is None:
            what = "has no class of nothing (model.null_class)" if self.captioned else "is told nothing"
            raise ConfigError(f"sampling.guidance: {self.source} {what} to lead away from; leave it out")
        if (width, height) != (self.resolution, self.resolution):
            raise ConfigError(
                f"sampling: its pipeline makes pictures of {self.resolution} x {self.resolution} alone, and {width} x "
                f"{height} are asked for; leave width and height out"
            )


@dataclass(frozen=True, kw_only=True)
class Ddpm(DiscreteFamily):
    """The family: what opens it."""

    title: ClassVar[str] = "DDPM"
    classes: tuple[str, ...] = ()
    """What its classes are called, in the order of their numbers."""
    null_class: int | None = None
    """The class of pictures of which none is told."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        """Those of diffusers' first days lie flat: the U-Net's files beside `model_index.json`."""
        kind = str(read_config(folder / "model_index.json")["_class_name"])
        place = "unet" if (folder / "unet").is_dir() or not (folder / "config.json").is_file() else "."
        if place == ".":
            check_model_folder(folder, [place])
        unet = load(folder, place, UNet2DModel, family=self.title)
        _check(folder / place, unet.config, kind == "LDMPipeline")
        vae = autoencoder(folder, self.title) if kind == "LDMPipeline" else Pixels(unet.config["in_channels"])
        set_attention(unet, attention, device)
        without_dropout(unet)
        return DdpmModel(
            source=source,
            folder=folder,
            kind=kind,
            networks={"unet": unet.to(device), "vae": vae.to(device)},
            tokenizers={},
            scheduler_config=self.read_scheduler(folder),
            device=device,
            classes=self.classes,
            null_class=self.null_class,
        )


def autoencoder(folder: Path, family: str) -> Any:
    """The autoencoder in `vqvae`, of either kind.

    A VQ config that says no `scaling_factor` is of a time when latents were not scaled, and such models learned them as
    they are (`CompVis/ldm-celebahq-256`); what diffusers puts in its place today, 0.18215, makes noise of their
    pictures.

    Raises:
        DataError: of neither kind.
    """
    config = read_config(folder / "vqvae" / "config.json")
    kind = AUTOENCODERS.get(str(config.get("_class_name")))
    if kind is None:
        raise DataError(f"{folder / 'vqvae'}: is a {config.get('_class_name')}; expected {' or '.join(AUTOENCODERS)}")
    vae = load(folder, "vqvae", kind, family=family)
    if kind is VQModel and "scaling_factor" not in config:
        vae.register_to_config(scaling_factor=1.0)
    return vae


def without_dropout(network: nn.Module) -> None:
    """A network that drops nothing while it learns: what it dropped would depend on the company."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _check(place: Path, config: Mapping[str, Any], latent: bool) -> None:
    """Raises: DataError: a U-Net that is none of these."""
    file = place / "config.json"
    if not isinstance(config["sample_size"], int):
        raise DataError(f"{file}: sample_size: {config['sample_size']!r}, expected the side of square pictures")
    if config["class_embed_type"] not in (None, "timestep"):
        raise DataError(f"{file}: class_embed_type: {config['class_embed_type']!r}, supported: none and 'timestep'")
    if config["out_channels"] != config["in_channels"]:
        raise DataError(
            f"{file}: gives {config['out_channels']} channels for {config['in_channels']}, such as a variance"
        )
    if not latent and config["in_channels"] not in (1, 3):
        raise DataError(f"{file}: in_channels: {config['in_channels']}, and pixels have 3, or 1 of grey")


SPEC: type[Family] = Ddpm
