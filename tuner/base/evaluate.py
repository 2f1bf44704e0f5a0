"""How good the base model is, measured on pictures that it was never shown.

    python -m tuner.base.evaluate --model FOLDER --pictures FOLDER --out FOLDER

prints three figures, and writes them as `evaluation.json` beside a sample grid:

- the background's colour in samples of object x colour pairs that were held out;
- the share of captions whose sample's nearest training picture (Euclidean, in the autoencoder's latents) shows the
  object that was named, top-1 and top-5, beside the same with the captions shuffled among the samples;
- the loss on held-out pairs on fixed noise, with their captions and with the empty caption.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tuner.base.pictures import COLOURS, caption, objects
from tuner.data.buckets import centre_crop
from tuner.data.images import load_picture, to_pixels
from tuner.diffusion.batch import Batch
from tuner.diffusion.objective import Objective
from tuner.families.base import OpenedModel, Sampling
from tuner.families.source import BaseModel
from tuner.rng import Position, generator_at
from tuner.training.observers.previews import grid
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import save_safetensors

SAMPLING = Sampling(steps=25, guidance=3.0)
BORDER = 4
"""Width in pixels of the frame in which a sample's background colour is read."""
STEPS = 32
"""Of 8-bit latents: so many make one standard deviation."""
LEVELS = 8
"""Noise levels at which the loss is taken."""


@dataclass(frozen=True)
class Pair:
    """An object on a background."""

    icon: str
    colour: str

    @property
    def caption(self) -> str:
        return caption(self.icon, self.colour)


def pairs_in(folder: Path) -> list[Pair]:
    """What the pictures of a folder show, by their names, each once."""
    names = (file.stem.split("--") for file in sorted(folder.glob("*.png")))
    return list(dict.fromkeys(Pair(icon, colour) for icon, colour, _ in names))


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` of them, chosen by a fixed shuffle."""
    order = torch.randperm(len(pairs), generator=generator_at("evaluate", len(pairs))).tolist()
    return [pairs[i] for i in order[:count]]


def background(picture: Image.Image) -> str:
    """The colour of the table nearest to the median of a picture's frame."""
    pixels = to_pixels(picture, centre_crop(picture.size, picture.size), flip=False)
    inner = torch.zeros(pixels.shape[1:], dtype=torch.bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    seen = (pixels[:, ~inner].median(1).values + 1) * 127.5
    return min(COLOURS, key=lambda name: float((seen - torch.tensor(COLOURS[name])).square().sum()))


@torch.no_grad()
def latents_of(model: OpenedModel, pictures: Sequence[Image.Image]) -> Tensor:
    """Mean latents, `[N, C * h * w]`."""
    bucket = (model.resolution, model.resolution)
    pixels = (to_pixels(picture, centre_crop(picture.size, bucket), flip=False) for picture in pictures)
    return torch.stack([model.encode_images(p[None]).mean[0].flatten() for p in pixels])


@dataclass(frozen=True)
class Known:
    """Pictures by what they show and their latents."""

    pairs: Sequence[Pair]
    latents: Tensor
    """`[N, C * h * w]`"""

    @property
    def icons(self) -> list[str]:
        return [pair.icon for pair in self.pairs]

    def write(self, file: Path) -> None:
        """As 8-bit values, a byte each: what the tests look samples up in."""
        coarse = (self.latents * STEPS).round().clamp(-127, 127).to(torch.int8)
        pairs = json.dumps([[pair.icon, pair.colour] for pair in self.pairs])
        save_safetensors(file, {"latents": coarse}, {"pairs": pairs})

    @staticmethod
    def read(file: Path) -> "Known":
        """What `write` wrote, to a 64th of a standard deviation."""
        store = SafetensorsFile(file)
        pairs = [Pair(icon, colour) for icon, colour in json.loads(store.metadata["pairs"])]
        return Known(pairs, store.read("latents").float() / STEPS)


def known(model: OpenedModel, files: Sequence[Path]) -> Known:
    """Pictures in files, by their names."""
    pairs = [Pair(*file.stem.split("--")[:2]) for file in files]
    return Known(pairs, latents_of(model, [load_picture(file, "white") for file in files]))


def named(samples: Tensor, icons: Sequence[str], training: Tensor, shown: Sequence[str]) -> tuple[float, float]:
    """The shares of samples among whose nearest 1 and 5 distinct objects the named one is."""
    first = fifth = 0
    for sample, icon in zip(samples, icons, strict=True):
        nearest = torch.cdist(sample[None], training)[0].argsort().tolist()
        ranked = list(dict.fromkeys(shown[i] for i in nearest))[:5]
        first += ranked[0] == icon
        fifth += icon in ranked
    return first / len(icons), fifth / len(icons)


@torch.no_grad()
def held_out_loss(model: OpenedModel, captions: Sequence[str], pictures: Tensor) -> float:
    """The mean loss of latents `[N, C * h * w]` under `captions`, at fixed noise and evenly spread times."""
    steps, side = model.schedule.steps, model.resolution // model.resolution_step
    times = torch.tensor([(2 * level + 1) * steps // (2 * LEVELS) for level in range(LEVELS)])
    total = 0.0
    for index, (latents, text) in enumerate(zip(pictures, captions, strict=True)):
        batch = Batch(
            latents=latents.view(1, -1, side, side).expand(LEVELS, -1, -1, -1),
            captions=[text] * LEVELS,
            conditioning=model.encode_text([text] * LEVELS),
            weight=torch.ones(LEVELS),
            positions=[Position(0, level, index) for level in range(LEVELS)],
        )
        total += float(Objective().loss(model, batch, times).plain.mean())
    return total / len(captions)


def evaluate(model: OpenedModel, pictures: Path, out: Path, named_captions: int) -> dict[str, Any]:
    """All three figures; the sample grid goes to `out`."""
    held = spread(pairs_in(pictures / "validation"), 16)
    samples = model.sample([p.caption for p in held], list(range(len(held))), SAMPLING)
    right = [background(sample) == pair.colour for sample, pair in zip(samples, held, strict=True)]

    training = known(model, sorted((pictures / "train").glob("*.png")))
    every = [Pair(icon, colour) for icon in objects()["shown"] for colour in COLOURS]
    asked = spread(every, named_captions)
    answers = model.sample([p.caption for p in asked], list(range(len(asked))), SAMPLING)
    latents = latents_of(model, answers)
    top1, top5 = named(latents, [p.icon for p in asked], training.latents, training.icons)
    shuffled = [p.icon for p in asked[1:] + asked[:1]]
    chance1, chance5 = named(latents, shuffled, training.latents, training.icons)

    validation = known(model, sorted((pictures / "validation").glob("*.png"))[::4])
    told = [pair.caption for pair in validation.pairs]
    out.mkdir(parents=True, exist_ok=True)
    rows = [("", answers[i : i + 8]) for i in range(0, min(40, len(answers)), 8)]
    grid(rows, []).save(out / "named.png")
    grid([("", samples[:8]), ("", samples[8:])], []).save(out / "held-out.png")
    return {
        "background right on held-out pairs": f"{sum(right)}/{len(right)}",
        "named object, top-1": top1,
        "named object, top-5": top5,
        "shuffled captions, top-1": chance1,
        "shuffled captions, top-5": chance5,
        "held-out loss": held_out_loss(model, told, validation.latents),
        "held-out loss, empty caption": held_out_loss(model, [""] * len(told), validation.latents),
        "sampling": f"DDIM, {SAMPLING.steps} steps, guidance {SAMPLING.guidance}",
        "captions of the grid": [p.caption for p in asked[:40]],
        "held-out captions": [p.caption for p in held],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a diffusers folder, or the name of an embedded base")
    parser.add_argument("--pictures", type=Path, required=True, help="the folder that tuner.base.pictures made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=100, help="how many samples are looked up")
    parser.add_argument("--reference", type=Path, help="also write the pictures' latents here, for the tests")
    arguments = parser.parse_args()
    model = BaseModel(base=arguments.model).open(torch.device("cpu"))
    if arguments.reference is not None:
        train = sorted((arguments.pictures / "train").glob("*--0.png"))
        known(model, train).write(arguments.reference / "train.safetensors")
        held = sorted((arguments.pictures / "validation").glob("*.png"))
        known(model, held).write(arguments.reference / "validation.safetensors")
    figures = evaluate(model, arguments.pictures, arguments.out, arguments.captions)
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    (arguments.out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    for name, figure in figures.items():
        if isinstance(figure, str | float):
            print(f"{name}: {figure}")


if __name__ == "__main__":
    main()
