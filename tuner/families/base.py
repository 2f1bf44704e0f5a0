"""What a model family tells the rest of the project about itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from tuner.diffusion.model import DiffusionModel

Attention = Literal["auto", "torch", "math"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are made from a model."""

    width: int | None = None
    """In pixels; the base's own size where left out."""
    height: int | None = None
    """In pixels; the base's own size where left out."""
    steps: int = 25
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance scale (Ho and Salimans 2022, arXiv:2207.12598); 1 is none. Where left out 7.5;
    7 for Stable Diffusion 3, and 3.5 for Flux, which is told the scale and computes once. 6 for latent diffusion; of
    classes 4, and none where the base has no class of nothing."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    image: Path | None = None
    """A picture to begin with, for bases that take one: what is painted into, or what a refiner refines."""
    guide: Path | None = None
    """A picture that is told besides the prompt, for bases that are: the mask of what is to be painted (white), a
    depth map (near is bright), or the picture to edit."""
    strength: float | None = None
    """How far `image` is noised, of 1; the base's usual value where left out."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")


class OpenedModel(DiffusionModel, Protocol):
    """A diffusion model as a family opens it: it can be sampled, and it knows what its files say of it."""

    source: str
    """Where it came from, as the user said it: a name, a hub id or a folder."""
    folder: Path
    """Its diffusers folder."""
    architecture: str
    """The `modelspec.architecture` written into published files."""
    prediction_type: str
    """`epsilon` or `v_prediction`, as schedulers' configs say it."""
    guidance: float | None
    """The guidance that the denoiser is told while it learns; None for one that is told none."""
    resolution_step: int
    """Widths and heights of pictures are multiples of this, in pixels."""
    resolution: int
    """The side of the square pictures it was made for, in pixels."""
    captioned: bool
    """Whether captions tell it anything: a text, or a class."""

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, h, w]`, scaled as the denoiser takes them, to pixels `[B, 3, H, W]` in about [-1, 1]."""
        ...

    def words(self, caption: str) -> list[str]:
        """The tokens of a caption as text, without start and end; all, also those that are cut off."""
        ...

    def fingerprint(self, component: str) -> str:
        """A hash of everything that decides a component's output; caches are addressed by it.

        For `captions`, where a model has no text encoders, of what a caption is told as.
        """
        ...

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Image.Image]:
        """One picture a prompt, by a stock diffusers pipeline over the networks as they are now.

        The noise of each picture comes from its own seed, so it is the same in any company.
        """
        ...

    def pipeline(self) -> Any:
        """A stock diffusers pipeline over these very networks."""
        ...

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Hold what of the denoiser does not learn in `dtype`.

        Autoencoder and text encoders stay as they are: what they give is cached, and has to be the same whenever it
        is made; a full fine-tune's release holds them, too.
        """
        ...

    def rest(self, *components: str) -> None:
        """Components that are rarely called from now on: large ones leave the device but for the time of a call."""
        ...

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""
        ...


class Family(Protocol):
    """A kind of checkpoint this project can open, train and write."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        """Load a diffusers folder of this family: in float32, if no option of the family says otherwise.

        Raises:
            UserError: the folder holds another family or lacks a part; the message names it.
        """
        ...
