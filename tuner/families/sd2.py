"""Stable Diffusion 2 (Stability AI 2022): Stable Diffusion 1's networks with a larger text encoder, OpenCLIP's ViT-H.

Its last layer is left out of the diffusers folder, so the encoder's output is the penultimate layer's, normalised.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.families._clip import TextOptions
from tuner.families._discrete import DiscreteFamily
from tuner.families.base import Attention, Family, OpenedModel
from tuner.families.sd1 import open_sd


@dataclass(frozen=True, kw_only=True)
class Sd2(DiscreteFamily, TextOptions):
    """The family: what opens it."""

    def open(self, folder: Path, source: str, *, device: torch.device, attention: Attention) -> OpenedModel:
        scheduler = self.read_scheduler(folder)
        v = scheduler.get("prediction_type") == "v_prediction"
        architecture = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
        return open_sd(folder, source, scheduler, device, attention, architecture, "Stable Diffusion 2", self)


SPEC: type[Family] = Sd2
