"""What the header of a LoRA says that was made of checkpoints or of other LoRAs.

It keeps what its sources agree on and what is still true, and says anew what is of this file: ranks, alphas, checksums
and the names of what it was made of. Like that of a trained LoRA (`tuner.weights.modelspec`) it says nothing but fields
that are known to be public.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner import __version__
from tuner.weights.adapters.base import Change
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.modelspec import MAX_TEXT, hashes, public

FAMILIES: Mapping[str, tuple[dict[str, str], dict[str, str]]] = {
    "sd1": (
        {"ss_v2": "False", "ss_base_model_version": "sd_v1"},
        {"architecture": "stable-diffusion-v1/lora", "resolution": "512x512"},
    ),
    "sd2": ({"ss_v2": "True", "ss_base_model_version": "sd_v2"}, {}),
    "sdxl": (
        {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"},
        {"architecture": "stable-diffusion-xl-v1-base/lora", "resolution": "1024x1024"},
    ),
}
"""What programs call a family of networks: sd-scripts' texts, and ModelSpec's. ModelSpec has several words for the
versions of Stable Diffusion 2, which weights do not tell apart."""

OF_ONE_FILE = {
    *("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module", "ss_output_name"),
    *("modelspec.title", "modelspec.hash_sha256", "modelspec.date", "sshs_model_hash", "sshs_legacy_hash", "format"),
    *("modelspec.sai_model_spec", "modelspec.implementation", "modelspec.implementation_version"),
    "modelspec.merged_from",
}
"""What is not true any more of a file that is made of others."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is said of a file, in addition to what its tensors say themselves."""

    name: str
    """How the file is called, without its ending."""
    family: str | None = None
    """One of `FAMILIES`; None when it is not known."""
    made_of: Sequence[str] = ()
    """The names of the models that it is made of."""
    sources: Sequence[Mapping[str, str]] = ()
    """The headers of the LoRAs among them."""

    def texts(self, changes: Iterable[Change], tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The metadata of a file that holds `changes` as `tensors`."""
        training, spec = FAMILIES.get(self.family or "", ({}, {}))
        kept = self._kept()
        training = training | {key: text for key, text in kept.items() if key.startswith("ss_")} | _network(changes)
        training["ss_output_name"] = self.name
        digest, legacy = hashes(tensors, training)
        spec = {f"modelspec.{key}": text for key, text in spec.items()}
        spec |= {key: text for key, text in kept.items() if key.startswith("modelspec.")}
        spec |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": "diffusers",
            "modelspec.implementation_version": f"diffusion-tuner {__version__}",
            "modelspec.title": self.name,
            "modelspec.hash_sha256": f"0x{digest}",
            "modelspec.merged_from": ", ".join(self.made_of),
        }
        texts = {key: text[:MAX_TEXT] for key, text in (training | spec).items() if text}
        return {"format": "pt", **texts, "sshs_model_hash": digest, "sshs_legacy_hash": legacy}

    def _kept(self) -> dict[str, str]:
        """What all sources say alike, of what is public and stays true."""
        if not self.sources:
            return {}
        first, *others = (public(source) for source in self.sources)
        return {
            key: text
            for key, text in first.items()
            if key not in OF_ONE_FILE and all(other.get(key) == text for other in others)
        }


def _network(changes: Iterable[Change]) -> dict[str, str]:
    """sd-scripts' words for ranks and alphas; `Dynamic` where layers differ."""
    plain = True
    ranks: dict[bool, set[int]] = {False: set(), True: set()}
    alphas: dict[bool, set[float]] = {False: set(), True: set()}
    for change in changes:
        inner = change.inner if isinstance(change, Decomposed) else change
        plain = plain and isinstance(change, LowRank)
        if isinstance(inner, LowRank):
            conv = inner.shape[2:] not in ((), (1, 1))
            ranks[conv].add(inner.rank)
            alphas[conv].add(round(inner.scale * inner.rank, 6))
        elif isinstance(inner, Full):
            plain = False

    def one(values: Iterable[float]) -> str:
        found = list(values)
        return f"{found[0]:g}" if len(found) == 1 else "Dynamic"

    linear = ranks[False] or ranks[True]
    arguments = {"conv_dim": one(ranks[True]), "conv_alpha": one(alphas[True])} if ranks[True] else {}
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": one(linear),
        "ss_network_alpha": one(alphas[False] or alphas[True]),
        "ss_network_args": json.dumps(arguments),
    }
