"""New words for CLIP text encoders: tokens that follow on the base's own, whose vectors a method provides."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tuner.errors import ConfigError
from tuner.families._diffusers import DiffusersModel


@dataclass(kw_only=True)
class WordsModel(DiffusersModel):
    """An opened checkpoint whose CLIP encoders can be taught words: see `tuner.diffusion.model.TakesWords`.

    Other encoders, T5, are told a new word as it is written.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expansions: dict[str, str] = {}
        """Words of several tokens, in lower case, as all of their tokens."""
        for name in self.word_tables:
            network = self.raw(name)
            if network.config.eos_token_id == 2:  # old configs; transformers would pool at the highest token: a new one
                inner(network).eos_token_id = self.tokenizers[name].eos_token_id

    @property
    def word_tables(self) -> Mapping[str, str]:
        """See `tuner.diffusion.model.TakesWords`."""
        return {
            name: f"{'text_model.' if hasattr(self.raw(name), 'text_model') else ''}embeddings.token_embedding"
            for name in self.text_encoders
            if isinstance(self.raw(name), CLIPTextModel | CLIPTextModelWithProjection)
        }

    def add_words(self, words: Mapping[str, int]) -> Mapping[str, Mapping[str, list[int]]]:
        """See `tuner.diffusion.model.TakesWords`. The tokens are called as diffusers calls them: `w`, `w_1`, `w_2`."""
        added: dict[str, dict[str, list[int]]] = {}
        for component in self.word_tables:
            tokenizer = self.tokenizers[component]
            own = added.setdefault(component, {})
            for word, count in words.items():
                names = [word, *(f"{word}_{i}" for i in range(1, count))]
                read = {*names, *(name.lower() for name in names)}  # CLIP reads capitals as small letters
                if {*read, *(f"{name}</w>" for name in read)} & tokenizer.get_vocab().keys():
                    raise ConfigError(f"method.tokens: {word!r} is a word of the base already; choose another")
                tokenizer.add_tokens(names)
                own[word] = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]
                if count > 1:
                    self.expansions[word.lower()] = " ".join(names)
        return added

    def word_ids(self, component: str, text: str) -> list[int]:
        """The tokens of a text, without start and end; all of them."""
        return self.tokenizers[component](self._expanded(text), add_special_tokens=False, verbose=False).input_ids

    def ids(self, component: str, captions: Sequence[str]) -> Tensor:
        taught = component in self.word_tables
        return super().ids(component, [self._expanded(text) for text in captions] if taught else captions)

    def _expanded(self, text: str) -> str:
        """A text with each word of several tokens as all of them."""
        if not self.expansions:
            return text
        every = "|".join(re.escape(word) for word in sorted(self.expansions, key=len, reverse=True))
        return re.sub(every, lambda found: self.expansions[found[0].lower()], text, flags=re.IGNORECASE)


def inner(network: Any) -> Any:
    """The transformer itself, with or without a projection around it."""
    return getattr(network, "text_model", network)
