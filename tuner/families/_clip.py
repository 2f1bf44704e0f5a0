"""Text through CLIP encoders, for the families whose denoiser sees their layers: Stable Diffusion 1, 2 and XL.

Captions longer than an encoder's 75 tokens go through it in chunks; prompts of pictures may weigh their words.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tuner.diffusion.batch import Conditioning
from tuner.errors import ConfigError
from tuner.families._words import WordsModel, inner
from tuner.families.base import Sampling

EmptyCaption = Literal["encode", "zeros"]
Spans = Sequence[tuple[str, float]]
"""Parts of a prompt and how much each weighs."""
BRACKET = 1.1
"""How much `(word)` weighs; `[word]` weighs its inverse."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of families told by CLIP.

    `clip_skip` is diffusers' number (there None is 0) and OneTrainer's `layer_skip`; kohya's and A1111's "clip skip" is
    one more for Stable Diffusion 1 and 2 (1 is nothing left out), and is nothing that kohya knows for XL.
    """

    clip_skip: int = 0
    """How many more hidden layers are left out from the end than the base leaves out."""
    chunks: int = 1
    """How many chunks of 75 tokens a caption may have."""
    empty_caption: EmptyCaption | None = None
    """What an empty caption is told as."""

    def __post_init__(self) -> None:
        if self.clip_skip < 0:
            raise ValueError(f"clip_skip must not be negative, got {self.clip_skip}")
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {self.chunks}")


@dataclass(kw_only=True)
class ClipModel(WordsModel):
    """An opened checkpoint whose denoiser sees a layer of each CLIP encoder, side by side."""

    leaves_out: ClassVar[int] = 0
    """How many layers from the end the base was trained without."""
    normed: ClassVar[bool] = True
    """Whether the encoder's last norm is put on the layer that is taken."""
    pooled_of: ClassVar[str | None] = None
    """The encoder whose projection is the text as one vector."""

    text: TextOptions = field(default_factory=TextOptions)
    zeros_for_empty: bool = False
    """Whether an empty text is told as zeros and not as its encoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        left_out = self.leaves_out + self.text.clip_skip
        for name in self.text_encoders:
            config = self.raw(name).config
            layers = int(config.num_hidden_layers)
            if self.text.clip_skip and left_out >= layers:
                raise ConfigError(
                    f"model.clip_skip: {self.source}'s {name} has {layers} layers, so at most "
                    f"{layers - 1 - self.leaves_out} can be left out; lower it"
                )
            if left_out and name != self.pooled_of:
                unseen = "|".join(str(layer) for layer in range(layers - left_out, layers))
                norm = "" if self.normed else r"|\.final_layer_norm\."
                self.unused: Mapping[str, str] = {**self.unused, name: rf"\.layers\.({unseen})\.{norm}"}

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """As many chunks as the longest caption needs, and a mask where others need fewer.

        What an encoder drops while it learns must not depend on the company, so then all have as many as there may be.
        """
        texts = [[(caption, 1.0)] for caption in captions]
        learning = any(self.raw(name).training for name in self.text_encoders)
        counts = [min(self._count(text), self.text.chunks) for text in texts]
        rows = self.text.chunks if learning else max(counts)
        tokens, pooled = self._encode(texts, rows)
        mask = None
        if min(counts) < rows:
            ends = torch.tensor(counts, device=tokens.device)[:, None] * (tokens.shape[1] // rows)
            mask = torch.arange(tokens.shape[1], device=tokens.device) < ends
        return Conditioning(tokens=tokens, pooled=pooled, mask=mask)

    def guided(self, prompt: str, sampling: Sampling) -> dict[str, Any]:
        """Both prompts encoded here: of any length, weighed, and as the captions were.

        A shorter one is filled up with chunks of nothing, as A1111 does.
        """
        texts = [weighted(prompt), weighted(sampling.negative_prompt)]
        rows = max(self._count(text) for text in texts)
        (tokens, pooled), (away, pooled_away) = (self._encode([text], rows) for text in texts)
        told = {
            "prompt_embeds": tokens,
            "negative_prompt_embeds": away,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": pooled_away,
        }
        others = super().guided(prompt, sampling)
        del others["prompt"], others["negative_prompt"]
        return others | {name: part for name, part in told.items() if part is not None}

    def fingerprint(self, component: str) -> str:
        own = super().fingerprint(component)
        if component not in self.text_encoders:
            return own
        facts = {
            "empty is zero": self.zeros_for_empty,
            f"{self.text.clip_skip} layers skipped": self.text.clip_skip,
            f"{self.text.chunks} chunks": self.text.chunks > 1,
        }
        return ", ".join([own, *(fact for fact, holds in facts.items() if holds)])

    @property
    def max_tokens(self) -> int:
        return self._size * self.text.chunks

    def count_tokens(self, caption: str) -> int:
        return max(len(self.word_ids(name, caption)) for name in self.text_encoders)

    @property
    def _size(self) -> int:
        """How many tokens a chunk has, without start and end."""
        return min(self.length(name) for name in self.text_encoders) - 2

    def _count(self, text: Spans) -> int:
        """How many chunks a text needs."""
        most = max(sum(len(self.word_ids(name, part)) for part, _ in text) for name in self.text_encoders)
        return max(1, -(-most // self._size))

    def _encode(self, texts: Sequence[Spans], rows: int) -> tuple[Tensor, Tensor | None]:
        """`[B, rows L, D]` and `[B, P]`: so many chunks of each text, the layers side by side, the first one's vector.

        What does not fit is cut off. Weights are ComfyUI's: each token goes from what an empty text has in its place
        through itself, so far as it weighs.
        """
        layers: list[Tensor] = []
        pooled: Tensor | None = None
        for name in self.text_encoders:
            chunks = [chunk for text in texts for chunk in self._chunks(name, text, rows)]
            hidden, vector = self._layer(name, torch.tensor([ids for ids, _ in chunks], device=self.device))
            weights = torch.tensor([weights for _, weights in chunks], device=self.device)
            if any(weight != 1 for _, of in chunks for weight in of):
                ids, _ = self._chunks(name, [], 1)[0]
                empty, _ = self._layer(name, torch.tensor([ids], device=self.device))
                hidden = torch.where(weights[..., None] == 1, hidden, empty + (hidden - empty) * weights[..., None])
            layers.append(hidden.unflatten(0, (len(texts), rows)).flatten(1, 2))
            if name == self.pooled_of:
                pooled = vector.unflatten(0, (len(texts), rows))[:, 0]
        tokens = torch.cat(layers, -1)
        if self.zeros_for_empty:  # multiplied, so that every process has a gradient, if one of zeros
            told = torch.tensor([float(any(part for part, _ in text)) for text in texts], device=tokens.device)
            tokens, pooled = tokens * told[:, None, None], None if pooled is None else pooled * told[:, None]
        return tokens, pooled

    def _chunks(self, component: str, text: Spans, rows: int) -> list[tuple[list[int], list[float]]]:
        """So many chunks of tokens and their weights, each with a start, an end, and filled up."""
        tokenizer, size = self.tokenizers[component], self._size
        length = self.length(component)
        words = [(i, weight) for part, weight in text for i in self.word_ids(component, part)]
        chunks: list[tuple[list[int], list[float]]] = []
        for row in range(rows):
            own = words[row * size : (row + 1) * size]
            ids = [tokenizer.bos_token_id, *(i for i, _ in own), tokenizer.eos_token_id]
            weights = [1.0, *(weight for _, weight in own), 1.0]
            rest = length - len(ids)
            chunks.append((ids + [tokenizer.pad_token_id] * rest, weights + [1.0] * rest))
        return chunks

    def _layer(self, component: str, ids: Tensor) -> tuple[Tensor, Any]:
        """The layer that the denoiser sees, `[rows, L, D]`, and the projection of the whole."""
        network = self.networks[component]
        left_out = self.leaves_out + self.text.clip_skip
        if not left_out and self.normed:
            return network(ids)[0], None
        output = network(ids, output_hidden_states=True)
        hidden = output.hidden_states[-1 - left_out]
        if self.normed:
            hidden = inner(self.raw(component)).final_layer_norm(hidden)
        return hidden, getattr(output, "text_embeds", None)


def weighted(prompt: str) -> list[tuple[str, float]]:
    r"""The parts of a prompt and how much they weigh, in A1111's words.

    `(word:1.3)` weighs 1.3; `(word)` 1.1, `[word]` 1 / 1.1; brackets in brackets multiply; `\(`, `\)`, `\[`, `\]` and
    `\\` are the characters themselves.

    Raises:
        ConfigError: a bracket without its other.
    """
    parts: list[tuple[str, float]] = []
    open_brackets: list[tuple[str, int]] = []
    given: float | None = None
    pattern = r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*(?=\))|[^\\()\[\]:]+|."
    for piece in re.findall(pattern, prompt, re.DOTALL):
        if piece in ("(", "["):
            open_brackets.append((piece, len(parts)))
        elif piece in (")", "]"):
            if not open_brackets or open_brackets[-1][0] != {")": "(", "]": "["}[piece]:
                raise ConfigError(f"prompt {prompt!r}: a {piece!r} closes nothing; write '\\{piece}' for the character")
            factor = 1 / BRACKET if piece == "]" else BRACKET if given is None else given
            given, (_, begin) = None, open_brackets.pop()
            parts[begin:] = [(text, weight * factor) for text, weight in parts[begin:]]
        elif piece[0] == ":" and len(piece) > 1 and open_brackets and open_brackets[-1][0] == "(":
            given = float(piece[1:])
        else:
            parts.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    if open_brackets:
        bracket = open_brackets[-1][0]
        raise ConfigError(f"prompt {prompt!r}: a {bracket!r} is not closed; write '\\{bracket}' for the character")
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:  # so that what is weighed alike is one text
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined
