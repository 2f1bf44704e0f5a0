"""Which family a diffusers folder holds, from its configs alone."""

import json
from pathlib import Path
from typing import Any

from tuner.errors import DataError

PIPELINES = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionInpaintPipeline": "sd1",
    "StableDiffusionDepth2ImgPipeline": "sd1",
    "StableDiffusionInstructPix2PixPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLInstructPix2PixPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "LDMTextToImagePipeline": "ldm",
    "LDMPipeline": "ddpm",
    "DDPMPipeline": "ddpm",
    "DDIMPipeline": "ddpm",
}
"""The family of the pipelines that `model_index.json` may name; `sd2` is told by its U-Net."""
CHANNELS = {"Inpaint": (4, 9), "Depth2Img": (5,), "InstructPix2Pix": (8,)}
"""How many channels the U-Net takes, by what its pipeline is called after; 4 for others."""
SUPPORTED = f"supported: {', '.join(PIPELINES)}; give a base of one of them"


def detect(folder: Path) -> str:
    """The name of the family module for `folder`.

    Raises:
        DataError: no diffusers folder, or of a family that is not supported; the message names which.
    """
    if not (folder / "model_index.json").exists():
        raise DataError(f"{folder}: {_instead(folder)}")
    kind = str(read_config(folder / "model_index.json").get("_class_name"))
    if kind not in PIPELINES:
        raise DataError(f"{folder}: holds a {kind}; {SUPPORTED}")
    family = PIPELINES[kind]
    if family in ("sd1", "sdxl"):
        unet = read_config(folder / "unet" / "config.json")
        fitting = next((channels for name, channels in CHANNELS.items() if name in kind), (4,))
        if unet.get("in_channels") not in fitting:
            raise DataError(
                f"{folder}: holds a U-Net of {unet.get('in_channels')} input channels, which a {kind} has not; "
                f"{SUPPORTED}"
            )
        if (unet.get("addition_embed_type") == "text_time") != (family == "sdxl"):
            other = "Stable Diffusion XL" if family == "sd1" else "another than Stable Diffusion XL"
            raise DataError(f"{folder}: its index says {kind}, but its U-Net is of {other}; download it again")
        if family == "sd1" and unet.get("use_linear_projection"):
            return "sd2"
    return family


def _instead(folder: Path) -> str:
    """What a folder is that is no diffusers folder, and what to give instead."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    files = [name for name in names if Path(name).suffix in (".safetensors", ".ckpt")]
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return "holds a LoRA and no model (no model_index.json); give the base that it is for"
    if "config.json" in names:
        kind = read_config(folder / "config.json").get("_class_name", "one network")
        return f"holds {kind} alone, and model_index.json is missing; give the folder of a whole model"
    if files:
        return f"model_index.json is missing, as it is no diffusers folder; give a file in it, such as {files[0]}"
    return f"model_index.json is missing; {'is the download complete?' if names else 'the folder is empty'}"


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
