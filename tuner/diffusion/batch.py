"""What the objective is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.rng import Position


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a denoiser is told besides the noisy latents and the time; a model leaves None what it does not take.

    `tokens`, `pooled`, `mask` and `labels` come of the caption (`DiffusionModel.encode_text`); `frame` and `image` of
    the picture, and the objective adds them.
    """

    tokens: Tensor
    """`[B, L, D]`: the text, one vector a token; `[B, 0, 0]` for a model that takes no text."""
    pooled: Tensor | None = None
    """`[B, P]`: the text as one vector."""
    mask: Tensor | None = None
    """`[B, L]` bool: the tokens that are looked at; all, where left out."""
    labels: Tensor | None = None
    """`[B]` int64: the class, for a model told by classes."""
    frame: Tensor | None = None
    """`[B, 6]` float32: how the picture was cut, as `tuner.data.buckets.Crop.frame` says it."""
    image: Tensor | None = None
    """`[B, C, h, w]`: channels that stand beside `x_t`, such as a mask and the latents of what it leaves."""

    def text(self) -> dict[str, Tensor]:
        """What came of the caption, by field."""
        parts = {name: getattr(self, name) for name in ("tokens", "pooled", "mask", "labels")}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return self.each(lambda part: part.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Every part changed alike."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})

    @classmethod
    def stack(cls, texts: Sequence[Mapping[str, Tensor]]) -> Self:
        """The texts of several examples, each as `text` gives it, without its batch dimension.

        Where some have fewer tokens, they are filled up with zeros that are not looked at.
        """
        longest = max(len(text["tokens"]) for text in texts)
        if any(len(text["tokens"]) < longest for text in texts):
            texts = [_filled(text, longest) for text in texts]
        return cls(**{name: torch.stack([text[name] for text in texts]) for name in texts[0]})


def _filled(text: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """A text of so many tokens, of which the last are zeros that the mask hides."""
    tokens = text["tokens"]
    rest = length - len(tokens)
    mask = text.get("mask", torch.ones(len(tokens), dtype=torch.bool))
    return {**text, "tokens": pad(tokens, (0, 0, 0, rest)), "mask": pad(mask, (0, rest))}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B examples of one bucket, so of one size."""

    latents: Tensor
    """`[B, C, h, w]` float32, scaled as the denoiser takes them."""
    captions: Sequence[str]
    """B final captions, after templates and dropout."""
    conditioning: Conditioning | None
    """The captions encoded; None where a text encoder learns, so that the objective encodes them with gradient."""
    weight: Tensor
    """`[B]` float32: 1 for a plain example, the prior weight for a class picture of DreamBooth."""
    positions: Sequence[Position]
    """B places in the run; the objective draws noise and times from them."""
    frame: Tensor | None = None
    """`[B, 6]` float32: how the pictures were cut, as `tuner.data.buckets.Crop.frame` says it."""
    image: Tensor | None = None
    """`[B, C, h, w]`: what stands beside the noisy latents, for models that are told a picture."""
    mask: Tensor | None = None
    """`[B, 1, h, w]` float32 in [0, 1]: how much each place of the latents counts; alike, where left out."""
    prior: Tensor | None = None
    """`[B]` bool, on the CPU: the examples whose target is what the untrained model predicts; none, where left out."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """What one update sees: this process's part of it, and what all parts add up to."""

    micro_batches: Sequence[Batch]
    """This process's share, one forward and backward each; never empty."""
    samples: int
    """How many examples all processes together see."""
    weight: float
    """The sum of their weights over all processes; the update's loss is the weighted mean."""
