"""U-Nets that are told a picture beside the noisy latents: inpainting, depth, and editing by instruction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from tuner.diffusion.batch import Conditioning
from tuner.diffusion.model import Guide
from tuner.errors import ConfigError
from tuner.families._diffusers import DiffusersModel, picture
from tuner.families.base import Sampling

GUIDES: Mapping[int, Guide | None] = {0: None, 1: "depth", 4: "picture", 5: "mask"}
"""What a U-Net is told, by the channels that it takes beside the latents'."""
GREY = (127, 127, 127)
DEPTH_STRENGTH = 0.8
"""How far the depth pipeline noises a picture by default."""


@dataclass(kw_only=True)
class GuidedModel(DiffusersModel):
    """A model whose U-Net may take more channels than the latents have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.guide: Guide | None = GUIDES[int(self.raw("unet").config["in_channels"]) - self.latent_channels]

    def encode_guide(self, guide: Tensor) -> Tensor:
        """What stands beside `x_t`, as the stock pipelines make it, but that of latents the mean is taken.

        For `mask` (Rombach et al. 2022, section 4.5) the mask and the latents of the picture with grey where it is
        white; for `depth` the map, from -1 to 1 in each picture; for `picture` (Brooks et al. 2023, arXiv:2211.09800)
        its latents, which are not scaled there.
        """
        guide = guide.to(self.device)
        size = (guide.shape[2] // self.shrinks, guide.shape[3] // self.shrinks)
        if self.guide == "depth":
            depth = interpolate(guide, size, mode="bicubic", align_corners=False)
            low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
            return 2 * (depth - low) / (high - low).clamp(min=1e-12) - 1
        if self.guide == "picture":
            return self.encode_images(guide).mean / self.scaling
        assert self.guide == "mask"
        mask = (guide[:, :1] >= 0.5).float()
        left = guide[:, 1:] * (1 - mask)
        return torch.cat([interpolate(mask, size), self.encode_images(left).mean], 1)

    def beside(self, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the U-Net takes: `x_t`, and the channels that it is told beside it."""
        if self.guide is None:
            return x_t
        assert conditioning.image is not None, f"{self.source} is told a {self.guide}"
        return torch.cat([x_t, conditioning.image.to(x_t)], 1)

    def beginning(self, seed: int, width: int, height: int, sampling: Sampling) -> dict[str, Any]:
        if self.guide is None:
            return super().beginning(seed, width, height, sampling)
        if self.guide != "mask" and sampling.guide is None:
            what = {"depth": "a depth map", "picture": "the picture that it edits"}[self.guide]
            raise ConfigError(f"sampling.guide: {self.source} needs {what}; give one")
        if self.guide == "picture" and sampling.image is not None:
            raise ConfigError(f"sampling.image: {self.source} begins with noise, and edits `guide`; leave it out")
        if self.guide != "depth" and sampling.strength is not None:
            raise ConfigError(f"sampling.strength: {self.source} begins with noise; leave it out")
        size = (width, height)
        told = None if sampling.guide is None else picture(sampling.guide, *size, "guide")
        image = Image.new("RGB", size, GREY)
        if sampling.image is not None:
            image = picture(sampling.image, *size, "image")
        noise = {"latents": self.noise(seed, width, height).to(self.device)}
        generator = torch.Generator().manual_seed(seed)
        if self.guide == "mask":  # all of it, where there is none
            mask = Image.new("L", size, 255) if told is None else told.convert("L")
            own = {"image": image, "mask_image": mask, "width": width, "height": height, "strength": 1.0}
            return {**own, **noise, "generator": generator}
        assert told is not None
        if self.guide == "picture":
            return {"image": told, **noise, "generator": generator}
        map_ = torch.frombuffer(bytearray(told.convert("F").tobytes()), dtype=torch.float32).reshape(1, height, width)
        usual = 1.0 if sampling.image is None else DEPTH_STRENGTH
        return {"image": image, "depth_map": map_, "strength": sampling.strength or usual, "generator": generator}
