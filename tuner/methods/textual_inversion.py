"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): new words learn what they mean; no weight of the base learns.

A word is one vector or several in every text encoder that takes words. With an adapter that learns beside them it is
pivotal tuning (Roich et al. 2021, arXiv:2106.05744, of GANs): words find the subject, the adapter what they cannot say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.diffusion.model import DiffusionModel, TakesWords
from tuner.errors import ConfigError
from tuner.methods.base import AnyAdapter, Method, ParameterGroup, Trainable, freeze
from tuner.rng import Position, generator_at


@dataclass(frozen=True, kw_only=True)
class Word:
    """How a new word begins."""

    init: str = ""
    """The words that it begins as. Where they are more tokens than `vectors`, each vector begins as the mean of its
    share of them; where they are fewer, they are repeated; where left out, every vector is drawn like one of the
    base's."""
    vectors: int = 1
    """How many vectors it is; each takes the room of a token in a prompt."""

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise ValueError(f"vectors must be at least 1, got {self.vectors}")


class Vocabulary(nn.Module):
    """A text encoder's table of vectors, and rows of its own for the tokens from `first` on."""

    def __init__(self, base: nn.Embedding, first: int, vectors: Tensor) -> None:
        super().__init__()
        self.base = base
        self.first = first
        self.vectors = nn.Parameter(vectors)
        """`[K, D]` float32. As the base's rows are another tensor, nothing can move them."""

    def forward(self, ids: Tensor) -> Tensor:
        new = (ids >= self.first) & (ids < self.first + len(self.vectors))
        of_base = self.base(torch.where(new, 0, ids))
        of_new = self.vectors[torch.where(new, ids - self.first, 0)]  # always, so that there is a gradient, if of zeros
        return torch.where(new[..., None], of_new.to(of_base.dtype), of_base)


@dataclass(frozen=True, kw_only=True)
class WordsTrainable(Trainable):
    """New words in some text encoders, and what else learns with them."""

    tables: Mapping[str, Vocabulary]
    """By text encoder."""
    rows: Mapping[str, slice]
    """Of each word, its rows among the new ones."""
    adapter: Trainable | None
    """Its groups are among `groups` too."""

    def words(self) -> dict[str, dict[str, Tensor]]:
        """For each word and each text encoder, its vectors `[n, D]`: float32, on the CPU, copies."""
        return {
            word: {
                component: table.vectors[rows].detach().to("cpu", copy=True) for component, table in self.tables.items()
            }
            for word, rows in self.rows.items()
        }

    def at(self, positions: Sequence[Position]) -> None:
        if self.adapter is not None:
            self.adapter.at(positions)


@dataclass(frozen=True, kw_only=True)
class TextualInversion:
    """Learn new words."""

    tokens: dict[str, Word]
    """The new words as captions and prompts say them, each a word that the base has not, such as `<my-cat>`. CLIP's
    encoders learn them; T5 reads them as they are written."""
    embeddings_lr: float | None = None
    """The words' learning rate; the optimizer's own where left out."""
    embeddings_until: float = 1.0
    """The share of the run after which the words stay as they are and the adapter learns alone."""
    adapter: AnyAdapter | None = None
    """What learns with the words (pivotal tuning), such as a LoRA; nothing where left out."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens must hold at least one word, such as { '<my-cat>' = { init = 'cat' } }")
        names = {token: re.sub(r"[^a-z0-9_-]", "", token).strip("-") for token in self.tokens}
        for token in self.tokens:
            if not re.fullmatch(r"[a-z0-9_<>*+#@$-]+", token) or not re.search(r"[a-z0-9]", token):
                # CLIP reads capitals as small letters, and diffusers loses words of several vectors over it
                raise ValueError(f"tokens: {token!r} must be one word of small letters, digits and < > _ - + * # @ $")
            others = [other for other in self.tokens if other != token]
            if any(token in other for other in others):
                raise ValueError(f"tokens: {token!r} is a part of another; choose words that do not hold each other")
            if names[token] in (names[other] for other in others):
                raise ValueError(f"tokens: {token!r} and another would have the same file; choose another word")
        if self.embeddings_lr is not None and self.embeddings_lr <= 0:
            raise ValueError(f"embeddings_lr must be positive, got {self.embeddings_lr}")
        if not 0 < self.embeddings_until <= 1:
            raise ValueError(f"embeddings_until must lie in (0, 1], got {self.embeddings_until}")
        if self.embeddings_until < 1 and self.adapter is None:
            raise ValueError("embeddings_until leaves nothing to learn without an adapter; leave it out, or give one")

    @property
    def text_encoder(self) -> bool:
        """What the text encoders make of captions changes while words learn."""
        return True

    def attach(self, model: DiffusionModel, seed: int) -> WordsTrainable:
        """As every method; the model knows the words from then on.

        Raises:
            ConfigError: the model takes no words, or has one of these; an `init` holds nothing.
        """
        if not isinstance(model, TakesWords) or not model.word_tables:
            raise ConfigError("method: this base's text encoders take no new words; choose another method")
        freeze(model)
        adapter = None if self.adapter is None else self.adapter.attach(model, seed)
        begun = {  # before words are added, so that none begins as another
            component: [_begun(model, component, token, word, seed) for token, word in self.tokens.items()]
            for component in model.word_tables
        }
        added = model.add_words({token: word.vectors for token, word in self.tokens.items()})
        groups: list[ParameterGroup] = []
        tables: dict[str, Vocabulary] = {}
        for component, name in model.word_tables.items():
            network: Any = model.networks[component]
            base = network.get_submodule(name)
            ids = [i for token in self.tokens for i in added[component][token]]
            assert ids == [*range(ids[0], ids[0] + len(ids))], f"{component}: tokens do not follow one another"
            table = Vocabulary(base, ids[0], torch.cat(begun[component]).to(base.weight.device))
            network.set_submodule(name, table)
            tables[component] = table
            groups.append(
                ParameterGroup(
                    name=component,
                    parameters={f"{model.prefixes[component]}{name}.vectors": table.vectors},
                    lr=self.embeddings_lr,
                    decays=False,
                    until=self.embeddings_until,
                )
            )
            network.train()
        ends = torch.tensor([word.vectors for word in self.tokens.values()]).cumsum(0).tolist()
        rows = {
            token: slice(end - word.vectors, end) for (token, word), end in zip(self.tokens.items(), ends, strict=True)
        }
        others = () if adapter is None else adapter.groups
        return WordsTrainable(groups=[*groups, *others], tables=tables, rows=rows, adapter=adapter)


def _begun(model: Any, component: str, token: str, word: Word, seed: int) -> Tensor:
    """What a word's vectors are in the beginning, `[n, D]` float32 on the CPU."""
    table = model.networks[component].get_submodule(model.word_tables[component]).weight.detach()
    if word.init:
        ids = model.word_ids(component, word.init)
        if not ids:
            raise ConfigError(f"method.tokens.{token}.init: {word.init!r} holds no word; give one, or leave it out")
        repeated = (ids * -(-word.vectors // len(ids)))[: max(word.vectors, len(ids))]
        pieces = table[repeated].to("cpu", torch.float32)
        return torch.stack([share.mean(0) for share in pieces.tensor_split(word.vectors)])
    own = table.to("cpu", torch.float32)
    drawn = torch.randn(word.vectors, own.shape[1], generator=generator_at(seed, "new word", component, token))
    return own.mean(0) + own.std(0) * drawn


SPEC: type[Method] = TextualInversion
