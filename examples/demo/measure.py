"""How much a subject was learned, and how much else was changed by it.

Pictures are compared in the autoencoder's latents, each less the latents of a plain picture in its own background's
colour: what is left is the object, wherever it stands.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from tuner.data.buckets import centre_crop
from tuner.data.images import to_pixels
from tuner.diffusion.batch import Conditioning
from tuner.families.base import OpenedModel
from tuner.rng import generator_at

FRAME = 16
"""One part in this many of a picture's side is the frame in which its background's colour is read."""


@torch.no_grad()
def object_latents(model: OpenedModel, pictures: Sequence[Image.Image]) -> Tensor:
    """`[N, C, h, w]`: what stands before the backgrounds of `pictures`."""
    found: list[Tensor] = []
    for picture in pictures:
        pixels = to_pixels(picture, centre_crop(picture.size, (model.resolution, model.resolution)), flip=False)
        plain = background(pixels)[:, None, None].expand_as(pixels)
        latents = model.encode_images(torch.stack([pixels, plain])).mean
        found.append(latents[0] - latents[1])
    return torch.stack(found)


def background(pixels: Tensor) -> Tensor:
    """The median colour of the frame of a picture `[3, H, W]`."""
    width = max(1, pixels.shape[1] // FRAME)
    inner = torch.zeros(pixels.shape[1:], dtype=torch.bool)
    inner[width:-width, width:-width] = True
    return pixels[:, ~inner].median(1).values


def similarity(model: OpenedModel, pictures: Sequence[Image.Image], subject: Sequence[Image.Image]) -> float:
    """The cosine of each picture to the picture of the subject that is nearest to it, a mean over `pictures`."""
    drawn = torch.nn.functional.normalize(object_latents(model, pictures).flatten(1))
    wanted = torch.nn.functional.normalize(object_latents(model, subject).flatten(1))
    return float((drawn @ wanted.T).max(1).values.mean())


def drift(model: OpenedModel, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """How far `others` are from the `pictures` of the same seeds: the relative distance of their latents."""
    before, after = object_latents(model, pictures), object_latents(model, others)
    return float((after - before).flatten(1).norm(dim=1).mean() / before.flatten(1).norm(dim=1).mean())


@torch.no_grad()
def predictions(model: OpenedModel, prompt: str, pictures: Sequence[Image.Image], levels: int = 8) -> Tensor:
    """The denoiser's outputs at `prompt`, for pictures under fixed noise at evenly spread times."""
    steps = model.schedule.steps
    t = torch.tensor([(2 * level + 1) * steps // (2 * levels) for level in range(levels)])
    alpha, sigma = (value[:, None, None, None] for value in model.schedule.alpha_sigma(t))
    tokens = model.encode_text([prompt]).tokens.expand(levels, -1, -1)
    found: list[Tensor] = []
    for index, picture in enumerate(pictures):
        pixels = to_pixels(picture, centre_crop(picture.size, (model.resolution, model.resolution)), flip=False)
        x_0 = model.encode_images(pixels[None]).mean
        noise = torch.randn(levels, *x_0.shape[1:], generator=generator_at("demo", index))
        found.append(model.denoise(alpha * x_0 + sigma * noise, t, Conditioning(tokens=tokens)))
    return torch.cat(found)
