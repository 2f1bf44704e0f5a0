"""What is known of a checkpoint beside its weights: what it predicts, and whether it was trained down to no signal.

Weights do not say it. A folder says it in its scheduler, files of Stable Diffusion XL in marks, and others in a header
or in the `.yaml` beside them, by which user interfaces go.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tuner.weights import published
from tuner.weights.architecture import TRANSFORMERS, V_PREDICTION, ZERO_TERMINAL_SNR, Architecture, identify
from tuner.weights.folder import DiffusersFolder
from tuner.weights.fp8 import Scaled
from tuner.weights.store import SafetensorsFile, TensorStore
from tuner.weights.views import Extended

PREDICTION = "modelspec.prediction_type"
"""The header's text about it."""
SCHEDULER = "scheduler/scheduler_config.json"
MAX_YAML_BYTES = 1_000_000
V_NORMS = {
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
}
V_SPREAD = 0.09
"""Stable Diffusion 2 predicts velocity where the numbers of this layer spread more than that, as ComfyUI tells it."""


@dataclass(frozen=True)
class Facts:
    """What of a checkpoint is not in its weights."""

    known: Architecture
    prediction: Literal["epsilon", "v"] | None = None
    """What it says that it predicts; None when it says nothing."""
    zero_terminal_snr: bool = False
    guessed: bool = False
    """Whether the prediction is told from numbers, and not said."""

    @staticmethod
    def of(source: Path, given: TensorStore, made: TensorStore) -> "Facts":
        """What marks, a scheduler, a header or a `.yaml` say, in this order.

        Where nothing says what a Stable Diffusion 2 predicts, it is told from its numbers.

        Args:
            source: the file or folder.
            given: its tensors as they were opened.
            made: the same by the names that they get.
        """
        known = identify(made.metas)
        if known.marks or known.family in (None, *TRANSFORMERS):
            return Facts(known, known.prediction, known.zero_terminal_snr)
        opened = given.store if isinstance(given, Scaled) else given
        if isinstance(opened, DiffusersFolder):
            scheduler = published.read_json(source / SCHEDULER) if (source / SCHEDULER).is_file() else {}
            predicted = "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"
            return Facts(known, predicted, scheduler.get("rescale_betas_zero_snr") is True)
        said = opened.metadata.get(PREDICTION) if isinstance(opened, SafetensorsFile) else None
        said = _said_beside(source) if said is None else said
        if said is not None:
            return Facts(known, "v" if said in ("v", "v_prediction") else "epsilon")
        if known.family == "sd2" and known.channels == 4 and (norm := V_NORMS & made.metas.keys()):
            spread = float(made.read(norm.pop()).float().std(correction=0))
            return Facts(known, "v" if spread > V_SPREAD else "epsilon", guessed=True)
        return Facts(known)

    @property
    def released(self) -> str | None:
        """The released model (`tuner.weights.published`) whose configs fit; None when none is known to."""
        if self.known.family == "sd2" and self.known.channels == 4:
            return "sd2" if self.prediction == "v" else "sd2-base"
        return self.known.variant

    @property
    def needs_yaml(self) -> bool:
        """Whether a single file cannot say what it predicts in the way that its family has for it."""
        return self.prediction == "v" and self.known.family in ("sd1", "sd2") and not self.guessed

    def marked(self, store: TensorStore) -> TensorStore:
        """The single file `store`, of Stable Diffusion XL with the marks that say what its folder says."""
        known = self.known
        if known.family != "sdxl" or known.layout != "ldm" or known.marks or self.prediction != "v":
            return store
        marks = (V_PREDICTION, ZERO_TERMINAL_SNR) if self.zero_terminal_snr else (V_PREDICTION,)
        return Extended(store, {mark: torch.zeros(0) for mark in marks})


def text_beside(source: Path) -> str | None:
    """The `.yaml` beside a single file; None where there is none."""
    place = source.with_suffix(".yaml")
    if not place.is_file() or place.stat().st_size > MAX_YAML_BYTES:
        return None
    return place.read_text("utf-8", errors="replace")


def velocity_in(text: str) -> bool:
    """Whether a `.yaml` says that velocity is predicted."""
    return re.search(r"^\s*parameterization:\s*[\"']?v\b", text, re.MULTILINE) is not None


def _said_beside(source: Path) -> str | None:
    """What the `.yaml` beside a single file says that it predicts; None where there is none."""
    text = text_beside(source) if source.is_file() else None
    return None if text is None else "v" if velocity_in(text) else "epsilon"
