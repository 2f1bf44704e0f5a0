"""What the objective, the data and the methods need of a model; the families implement it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.prediction import Prediction
from tuner.diffusion.schedule import Schedule
from tuner.diffusion.timesteps.base import Timesteps

Guide = Literal["mask", "depth", "picture"]
"""What a denoiser may be told of a picture besides its caption: what of it is left where a mask is black, its depth, or
what it was before an edit."""


@dataclass(frozen=True)
class LatentDistribution:
    """The autoencoder's posterior of some pictures, in the scale the denoiser takes."""

    mean: Tensor
    """`[B, C, h, w]` float32."""
    std: Tensor
    """`[B, C, h, w]` float32."""


class DiffusionModel(Protocol):
    """An opened checkpoint: networks on a device, and how to call them."""

    networks: dict[str, nn.Module]
    """Every network by its component name (`unet`, `text_encoder`, `vae`). A trainer may replace a value by its
    distributed wrapper; the methods of this class always call what stands here."""
    denoiser: str
    """The name of the denoiser among `networks`."""
    text_encoders: Sequence[str]
    """The names of the text encoders among `networks`."""
    prefixes: Mapping[str, str]
    """For each component, what stands before a parameter's own name in files and checkpoints."""
    adapter_targets: Mapping[str, str]
    """For each component that adapters can go into, a regular expression of its layers that they take by default."""
    unused: Mapping[str, str]
    """For each component of which a part decides nothing, a regular expression of that part's parameters, by their
    names in files. They cannot learn, and several processes would wait for their gradients for ever."""
    schedule: Schedule
    prediction: Prediction
    timesteps: Timesteps
    """The noise levels that the base was trained on, for an objective that names none."""
    guide: Guide | None
    """What the denoiser is told of a picture besides its caption."""
    untrained: Callable[[], AbstractContextManager[None]] | None
    """Within it the networks are as they were before training, without dropout; None where that was not kept."""

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        """Pixels `[B, 3, H, W]` in [-1, 1] to the distribution of their latents."""
        ...

    def encode_guide(self, guide: Tensor) -> Tensor:
        """What is told of pictures to what stands beside `x_t`, `Conditioning.image` `[B, C, h, w]`.

        `guide` is `[B, K, H, W]`: for `mask` a mask, 1 where it is to be painted, and the picture's pixels; for `depth`
        a map of any range, near is higher; for `picture` its pixels.
        """
        ...

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Captions, already templated and dropped out, to what `denoise` takes; with gradient where enabled."""
        ...

    def count_tokens(self, caption: str) -> int:
        """How many tokens `caption` has, without start and end."""
        ...

    @property
    def max_tokens(self) -> int:
        """How many tokens of a caption are seen; more are cut off."""
        ...

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's raw output, shaped as `x_t`; `t` is `[B]`."""
        ...


@runtime_checkable
class TakesWords(Protocol):
    """A model whose text encoders can be taught new words."""

    word_tables: Mapping[str, str]
    """For each text encoder that takes words, the name of its `nn.Embedding` of them."""

    def add_words(self, words: Mapping[str, int]) -> Mapping[str, Mapping[str, list[int]]]:
        """Make each word so many new tokens, whose numbers follow one another and on the highest of the base's.

        Returns: for each text encoder, the tokens of each word. Their vectors are for the caller to provide.

        Raises:
            ConfigError: the base has such a word.
        """
        ...

    def word_ids(self, component: str, text: str) -> list[int]:
        """The tokens of a text as a text encoder counts them, without start and end; all of them."""
        ...
