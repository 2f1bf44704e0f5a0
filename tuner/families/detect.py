"""Which family a diffusers folder holds, from its configs alone."""

import json
from pathlib import Path
from typing import Any

from tuner.errors import DataError

SUPPORTED = "supported now: Stable Diffusion 1 text-to-image; give such a base"
KNOWN = {
    "StableDiffusionXLPipeline": "Stable Diffusion XL pipeline",
    "StableDiffusion3Pipeline": "Stable Diffusion 3 pipeline",
    "FluxPipeline": "Flux pipeline",
    "StableDiffusionInpaintPipeline": "Stable Diffusion pipeline for inpainting",
}
"""Pipelines that people are likely to give, by the class that their `model_index.json` names."""


def detect(folder: Path) -> str:
    """The name of the family module for `folder`.

    Raises:
        DataError: no diffusers folder, or of a family that is not supported; the message names which.
    """
    index = read_config(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if kind != "StableDiffusionPipeline":
        raise DataError(f"{folder}: holds a {KNOWN.get(kind, kind)}; {SUPPORTED}")
    unet = read_config(folder / "unet" / "config.json")
    if unet.get("use_linear_projection"):
        raise DataError(f"{folder}: holds Stable Diffusion 2; {SUPPORTED}")
    if unet.get("in_channels") != 4:
        raise DataError(f"{folder}: holds a U-Net of {unet.get('in_channels')} input channels, not 4; {SUPPORTED}")
    return "sd1"


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a diffusers folder.

    Raises:
        DataError: missing, or none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: is missing; a diffusers folder has it, is the download complete?") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: is no JSON object; download it again")
    return content
