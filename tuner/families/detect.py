"""Which family a diffusers folder holds, from its configs alone."""

import json
from pathlib import Path
from typing import Any

from tuner.errors import DataError


def detect(folder: Path) -> str:
    """The name of the family module for `folder`.

    Raises:
        DataError: no diffusers folder, or of a family that is not supported; the message names which.
    """
    index = _read(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    unet = _read(folder / "unet" / "config.json") if (folder / "unet").is_dir() else {}
    channels, linear = unet.get("in_channels"), unet.get("use_linear_projection", False)
    if kind == "StableDiffusionPipeline" and channels == 4 and not linear:
        return "sd1"
    what = f"{kind} with {channels} input channels" if unet else kind
    raise DataError(f"{folder}: holds a {what}; supported now: Stable Diffusion 1 text-to-image ('sd1')")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); a diffusers folder has it") from error
