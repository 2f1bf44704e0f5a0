"""What the header of a LoRA says that was made of checkpoints or of other LoRAs.

It keeps what its sources agree on and what is still true, and says anew what is of this file: ranks, alphas, checksums
and the names of what it was made of. Like that of a trained LoRA (`tuner.weights.modelspec`) it says nothing but fields
that are known to be public.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner import __version__
from tuner.weights.adapters.base import Change
from tuner.weights.layouts.modules import Dialect
from tuner.weights.modelspec import base_version, cut, hashes, implementation, network, public

FAMILIES: Mapping[str, dict[str, str]] = {
    "sd1": {"architecture": "stable-diffusion-v1", "resolution": "512x512"},
    "sd2": {},
    "sdxl": {"architecture": "stable-diffusion-xl-v1-base", "resolution": "1024x1024"},
    "sdxl-refiner": {"architecture": "stable-diffusion-xl-v1-refiner", "resolution": "1024x1024"},
    "sd3": {"resolution": "1024x1024"},
    "flux": {"resolution": "1024x1024"},
    "ldm": {"architecture": "latent-diffusion", "resolution": "256x256"},
    "ddpm": {},
}
"""What ModelSpec calls a family of networks. It has several words for the versions of Stable Diffusion 2 and 3 and of
Flux, which the weights of a LoRA do not tell apart."""
VAGUE = {"sd2": "stable-diffusion-v2", "sd3": "stable-diffusion-3", "flux": "flux-1", "ddpm": "ddpm"}
"""How those words start."""

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
    dialect: Dialect = "kohya"
    """In whose names it is written."""
    made_of: Sequence[str] = ()
    """The names of the models that it is made of."""
    sources: Sequence[Mapping[str, str]] = ()
    """The headers of the LoRAs among them."""

    def texts(self, changes: Iterable[Change], tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The metadata of a file that holds `changes` as `tensors`."""
        spec = FAMILIES.get(self.family or "", {})
        architecture = spec.get("architecture", VAGUE.get(self.family or "", ""))
        kept = self._kept()
        training = base_version(architecture) if architecture else {}
        training |= {key: text for key, text in kept.items() if key.startswith("ss_")} | network(changes, architecture)
        training["ss_output_name"] = self.name
        digest, legacy = hashes(tensors, training)
        spec = {f"modelspec.{key}": text for key, text in spec.items()}
        if "modelspec.architecture" in spec:
            spec["modelspec.architecture"] += "/lora"
        spec |= {key: text for key, text in kept.items() if key.startswith("modelspec.")}
        spec |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": implementation(architecture, self.dialect),
            "modelspec.implementation_version": f"diffusion-tuner {__version__}",
            "modelspec.title": self.name,
            "modelspec.hash_sha256": f"0x{digest}",
            "modelspec.merged_from": ", ".join(self.made_of),
        }
        texts = {key: kept for key, text in (training | spec).items() if (kept := cut(key, text))}
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
