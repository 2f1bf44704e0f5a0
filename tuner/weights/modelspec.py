"""What the header of a file says about it: a LoRA, new words, or a whole network.

Two vocabularies: Stability's ModelSpec 1.0.1 (`modelspec.*`), and the `ss_*` of sd-scripts, which A1111 and Forge show
and sort by. A header is public: nothing goes into it but the fields of `ModelSpec`, so neither path nor caption can.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tuner.weights.adapters.base import Change
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.modules import Dialect
from tuner.weights.writer import chunks

MAX_TEXT = 1000
"""Characters of a text field that are kept."""
MAX_THUMBNAIL = 65_536
"""Characters of a thumbnail; a longer one is left out, as a part of it is no picture."""
THUMBNAIL = "modelspec.thumbnail"
TIMES = 1000
"""Of the schedules of all families."""

BEFORE = ("ddpm", "latent-diffusion")
"""How architectures are called that were before Stable Diffusion, and that sd-scripts has no words for."""

TRAINING = (
    *("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args", "output_name"),
    *("sd_model_name", "resolution", "num_train_images", "steps", "max_train_steps", "seed", "model_prediction_type"),
    *("learning_rate", "optimizer", "guidance_scale", "lr_scheduler", "total_batch_size", "clip_skip"),
    *("zero_terminal_snr", "noise_offset", "min_snr_gamma", "caption_dropout_rate"),
)
SPEC = (
    *("sai_model_spec", "architecture", "implementation", "implementation_version", "title", "resolution"),
    *("prediction_type", "hash_sha256", "trigger_phrase", "license", "date", "merged_from"),
    *("description", "author", "tags", "usage_hint", "thumbnail", "timestep_range", "encoder_layer"),
    "is_negative_embedding",
)
KEYS = {
    "format",
    "sshs_model_hash",
    "sshs_legacy_hash",
    *(f"ss_{key}" for key in TRAINING),
    *(f"modelspec.{key}" for key in SPEC),
}
"""Every key that a header of ours may have."""


Setting = bool | int | float | str


def cut(key: str, text: str) -> str:
    """What is kept of a text in a header; nothing of a picture that is too large."""
    return text[:MAX_TEXT] if key != THUMBNAIL else text if len(text) <= MAX_THUMBNAIL else ""


def public(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of `metadata` is ours, and so is known to hold nothing private."""
    return {key: value for key, value in metadata.items() if key in KEYS}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The facts that a header states; all of them are made public."""

    name: str
    """How the file is called, without its ending."""
    title: str
    architecture: str
    """ModelSpec's name for the network, such as `stable-diffusion-v1`."""
    prediction: Literal["epsilon", "v", "flow"]
    resolution: int
    """Side of the training pictures, in pixels; the square root of their area where they are not square."""
    base: str
    """Public name of the base model."""
    images: int
    samples: int
    updates: int
    seed: int
    learning_rate: float | None = None
    optimizer: str | None = None
    guidance: float | None = None
    """That the network was told while it learned, where it is told one."""
    trigger: str | None = None
    license: str | None = None
    date: str | None = None
    """ISO 8601."""
    version: str = ""
    """This program's name and version."""
    description: str | None = None
    author: str | None = None
    tags: tuple[str, ...] = ()
    usage_hint: str | None = None
    thumbnail: str | None = None
    """A small picture, as the URL `data:image/jpeg;base64,…`."""
    negative: bool = False
    """Of new words: whether they belong into negative prompts."""
    zero_terminal_snr: bool = False
    """Whether the last time of its schedule is nothing but noise."""
    settings: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    """The resolved config's numbers, switches and kinds, flat, such as `model.clip_skip`."""

    def texts(
        self, changes: Iterable[Change] | None, tensors: Mapping[str, Tensor], dialect: Dialect
    ) -> dict[str, str]:
        """The metadata of a file that holds `changes` as `tensors`, in the names of `dialect`; None for new words."""
        training = {
            **base_version(self.architecture, self.prediction),
            **({} if changes is None else network(changes, self.architecture)),
            "ss_output_name": self.name,
            "ss_sd_model_name": self.base,
            "ss_resolution": f"({self.resolution}, {self.resolution})",
            "ss_num_train_images": str(self.images),
            "ss_steps": str(self.updates),
            "ss_max_train_steps": str(self.updates),
            "ss_seed": str(self.seed),
            "ss_model_prediction_type": {"epsilon": "epsilon", "v": "v_prediction", "flow": "raw"}[self.prediction],
            "ss_zero_terminal_snr": str(self.zero_terminal_snr),
            **self._settings(),
        }
        if self.learning_rate is not None:
            training["ss_learning_rate"] = f"{self.learning_rate:g}"
        if self.optimizer is not None:
            training["ss_optimizer"] = self.optimizer
        if self.guidance is not None:
            training["ss_guidance_scale"] = f"{self.guidance:g}"
        digest, legacy = hashes(tensors, training)
        kind = "textual-inversion" if changes is None else "lora"
        return {
            "format": "pt",
            **{key: cut(key, value) for key, value in training.items()},
            **self._spec(f"{self.architecture}/{kind}", implementation(self.architecture, dialect), digest),
            **({"modelspec.is_negative_embedding": "true"} if self.negative and changes is None else {}),
            "sshs_model_hash": digest,
            "sshs_legacy_hash": legacy,
        }

    def of_network(self, digest: str) -> dict[str, str]:
        """The metadata of a whole network's file in diffusers' names, whose values have the SHA-256 `digest`."""
        return {"format": "pt", **self._spec(self.architecture, "diffusers", digest)}

    def said(self) -> dict[str, str]:
        """What of a header its maker says, and no run knows; what is not said is empty."""
        spec = {
            "title": self.title,
            "trigger_phrase": self.trigger,
            "license": self.license,
            "description": self.description,
            "author": self.author,
            "tags": ", ".join(self.tags),
            "usage_hint": self.usage_hint,
            "thumbnail": self.thumbnail,
        }
        keyed = {f"modelspec.{key}": value or "" for key, value in spec.items()}
        return {key: cut(key, value) for key, value in keyed.items()}

    def _spec(self, architecture: str, implementation: str, digest: str) -> dict[str, str]:
        """ModelSpec's words, of which those without a value are left out."""
        start, end = (self.settings.get(f"objective.timesteps.{name}") for name in ("start", "end"))
        spec = {
            "sai_model_spec": "1.0.1",
            "architecture": architecture,
            "implementation": implementation,
            "implementation_version": self.version,
            "resolution": f"{self.resolution}x{self.resolution}",
            "prediction_type": None if self.prediction == "flow" else self.prediction,  # it has no word for that
            "hash_sha256": f"0x{digest}",
            "date": self.date,
            "timestep_range": f"{round(TIMES * float(start or 0))},{round(TIMES * float(1 if end is None else end))}",
            "encoder_layer": self._encoder_layer(),
        }
        own = {f"modelspec.{key}": value[:MAX_TEXT] for key, value in spec.items() if value}
        return own | {key: value for key, value in self.said().items() if value}

    def _encoder_layer(self) -> str | None:
        """Which of CLIP's layers is looked at, counted from the last, which is 1; None where T5 is, too.

        Stable Diffusion 2's and XL's makers leave out one, as folders of 2 do by having none.
        """
        usual = {"stable-diffusion-v1": 1, "stable-diffusion-v2": 2, "stable-diffusion-xl": 2}
        own = next((layer for start, layer in usual.items() if self.architecture.startswith(start)), None)
        return None if own is None else str(own + int(self.settings.get("model.clip_skip", 0)))

    def _settings(self) -> dict[str, str]:
        """sd-scripts' words for settings that other programs show."""
        chosen, said = self.settings, dict[str, str]()
        for key, setting in (
            ("lr_scheduler", "learning_rate.type"),
            ("total_batch_size", "run.batch_size"),
            ("caption_dropout_rate", "captions.dropout"),
        ):
            if setting in chosen:
                said[f"ss_{key}"] = str(chosen[setting])
        if "model.clip_skip" in chosen:
            said["ss_clip_skip"] = str(int(chosen["model.clip_skip"]) + 1)  # its 1 is nothing left out
        if chosen.get("objective.noise.type") == "offset":
            said["ss_noise_offset"] = str(chosen["objective.noise.strength"])
        if chosen.get("objective.weighting.type") == "min_snr":
            said["ss_min_snr_gamma"] = str(chosen["objective.weighting.gamma"])
        return said


def base_version(architecture: str, prediction: str | None = None) -> dict[str, str]:
    """sd-scripts' words for the base model that ModelSpec calls `architecture`."""
    second = architecture.startswith("stable-diffusion-v2")
    version = "sd_v2" if second else "sd_v1"
    if architecture.startswith("stable-diffusion-xl"):
        version = "sdxl_base_v1-0"
    elif architecture.startswith("flux"):
        version = "flux1"
    elif sd3 := re.fullmatch(r"stable-diffusion-3(?:\.5|-5)?(?:-(\w+))?", architecture):
        half = "-5" if architecture.startswith(("stable-diffusion-3.5", "stable-diffusion-3-5")) else ""
        version = f"3{half}-{sd3[1]}" if sd3[1] else "sd3"
    elif architecture.startswith(BEFORE):
        version = architecture
    elif prediction == "v":
        version += "_v"
    return {"ss_v2": str(second), "ss_base_model_version": version}


def implementation(architecture: str, dialect: Dialect) -> str:
    """Where the names in a file come from, as ModelSpec wants to know: single files' names are their authors'."""
    if dialect != "diffusers" and architecture.startswith(("stable-diffusion-xl", "stable-diffusion-3")):
        return "https://github.com/Stability-AI/generative-models"
    if dialect != "diffusers" and architecture.startswith("flux"):
        return "https://github.com/black-forest-labs/flux"
    return "diffusers"


def network(changes: Iterable[Change], architecture: str = "") -> dict[str, str]:
    """sd-scripts' words for the kind of adapters, their ranks and alphas; `Dynamic` where layers differ."""
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

    def one(values: Iterable[float]) -> str:
        found = list(values)
        return f"{found[0]:g}" if len(found) == 1 else "Dynamic"

    linear = ranks[False] or ranks[True]
    arguments = {"conv_dim": one(ranks[True]), "conv_alpha": one(alphas[True])} if ranks[True] else {}
    own = (
        "_flux" if architecture.startswith("flux") else "_sd3" if re.match(r"stable-diffusion-3", architecture) else ""
    )
    return {
        "ss_network_module": f"networks.lora{own}" if plain else "lycoris.kohya",
        "ss_network_dim": one(linear),
        "ss_network_alpha": one(alphas[False] or alphas[True]),
        "ss_network_args": json.dumps(arguments),
    }


def hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> tuple[str, str]:
    """A file's two checksums as A1111 computes them, for the file that `save_safetensors` would write.

    The first is the SHA-256 of the values (not of the header). The second, eight digits, is of the 64 KiB at 1 MiB in
    the file with no metadata but `training`.
    """
    values = hashlib.sha256()
    window = hashlib.sha256()
    position = 0
    for number, chunk in enumerate(chunks(tensors, training)):
        if number:  # the first is the header
            values.update(chunk)
        first, last = 0x100000 - position, 0x110000 - position
        window.update(chunk[max(first, 0) : max(last, 0)])
        position += len(chunk)
    return values.hexdigest(), window.hexdigest()[:8]
