"""The audit of a training config's data: everything is read, all that is wrong is said, and samples are shown."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tuner.audit.findings import (
    Finding,
    Findings,
    look_at_captions,
    look_at_cut_masks,
    look_at_guides,
    look_at_masks,
    look_at_sizes,
    look_at_transparency,
    look_for_copies,
    read_source,
)
from tuner.audit.page import Sample, page
from tuner.data.buckets import Buckets, in_each_area
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.encode import Encoded
from tuner.data.example import Example
from tuner.data.images import SUFFIXES, Pictures, load_picture
from tuner.data.sources.base import Captioned, Source, read_all
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.split import hold_out
from tuner.data.variants import flip_at, number_at
from tuner.errors import DataError, UserError
from tuner.families.base import OpenedModel
from tuner.rng import Position
from tuner.weights.writer import atomic_write_text, resource_error

TOLD = {
    "mask": "to be painted (white)",
    "depth": "depth, told beside the caption",
    "picture": "before the edit, told beside the caption",
}
"""What stands under a guide, by its kind."""


@dataclass(frozen=True)
class Report:
    """What an audit found."""

    findings: list[Finding]
    facts: dict[str, str]
    buckets: dict[tuple[int, int], int]
    samples: list[Sample]

    def write(self, folder: Path, title: str) -> None:
        """`report.html` with its pictures inside, and `report.json` without.

        Raises:
            ResourceError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise resource_error(folder, error) from error
        html = page(title, self.findings, self.facts, self.buckets, self.samples, _small)
        atomic_write_text(folder / "report.html", html)
        told: dict[str, Any] = {
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
            "buckets": {f"{width}x{height}": count for (width, height), count in self.buckets.items()},
            "samples": [{"name": s.name, "caption": s.caption, "tokens": [*s.tokens], **s.facts} for s in self.samples],
        }
        atomic_write_text(folder / "report.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")


def audit(
    base: Callable[[], tuple[OpenedModel, str, Buckets]],
    sources: Sequence[Source],
    validation: Sequence[Source],
    pictures: Pictures,
    captions: Captions,
    cache: Cache,
    *,
    share: float,
    unmasked_weight: float,
    trigger: str | None,
    samples: int,
    seed: int,
    progress: Callable[[Sequence[str], str], Iterable[str]],
) -> Report:
    """Look at all of the data as it would be trained on, and at `samples` showings of it, chosen by `seed`.

    A `share` of the training pictures is held out as a run would do it: what is said of showings, buckets and samples
    is of the others, and every picture is looked at. `base` opens the model, and says a hash of what it holds and the
    sizes that it takes. It is asked behind all that can be seen without, and what it refuses is a finding, too.
    """
    findings = Findings(skips=pictures.broken == "skip")
    training = [example for source in sources for example in read_source(source, findings, progress)]
    findings.skips = False  # what is measured is never left out
    held_out = [example for source in validation for example in read_source(source, findings, progress)]
    every = training
    try:
        training, shared = hold_out(every, share, pictures.background, cache, progress)
    except DataError as error:
        findings.add("error", "share", f"observers: validation.share: {error}")
        shared = []
    sets = {
        "train": [example for example in training if example.source != "class"],
        "class": [example for example in training if example.source == "class"],
        "validation": [*held_out, *shared],
    }
    look_for_copies(sets, pictures.background, cache, findings, progress)
    look_at_transparency(every, pictures, unmasked_weight, findings)
    look_at_masks(every, unmasked_weight, findings, progress)
    areas = len(pictures.resolutions) if pictures.areas == "each" else 1
    facts = {
        **{name: f"{len(of)} pictures" for name, of in sets.items() if of},
        "showings an epoch": str(_an_epoch(sources, every, training) * areas),
    }
    try:
        model, contents, buckets = base()
    except UserError as error:
        findings.add("error", "base", str(error))
        look_at_captions(every, captions.plain, lambda caption: 0, 0, trigger, findings)
        return Report(findings.found, facts, {}, [])
    if not model.captioned:
        bare, also = ([s.uncaptioned() if isinstance(s, Captioned) else s for s in of] for of in (sources, validation))
        if [*bare, *also] != [*sources, *validation]:  # none of what was found of captions is meant
            return audit(
                lambda: (model, contents, buckets), bare, also, pictures, captions, cache,
                share=share, unmasked_weight=unmasked_weight, trigger=trigger, samples=samples, seed=seed,
                progress=progress,
            )  # fmt: skip
        if captions != Captions():
            findings.add("error", "captions", f"captions: {model.source} is told nothing; leave `captions` out")
        training = [replace(example, caption="") for example in training]
    wanted = _wanted(sources, model.source, contents, findings)
    shown = in_each_area(training, buckets) if pictures.areas == "each" else training
    shares = look_at_sizes(shown, buckets, findings)
    encoded = Encoded(
        examples=shown, buckets=buckets, pictures=pictures, cache=cache, autoencoder="", text_encoder=None
    )
    if not unmasked_weight:
        look_at_cut_masks(encoded, model.resolution_step, findings)
    look_at_guides([*every, *held_out], model.guide, findings, progress)
    if model.captioned:
        look_at_captions(every, captions.plain, model.count_tokens, model.max_tokens, trigger, findings)
    facts = {
        "base": model.source,
        **facts,
        **({"still to be made by the base": f"{wanted} class pictures"} if wanted else {}),
        "resolution": f"{', '.join(map(str, buckets.areas))}, in steps of {buckets.step}, buckets used: {len(shares)}",
        "tokens that fit": str(model.max_tokens),
    }
    chosen = torch.randperm(len(shown), generator=Position(seed, 0, 0).generator("audit")).tolist()[:samples]
    made: list[Sample] = []
    for i in chosen:
        with suppress(DataError):  # of the caption, which was put down
            at = Position(seed, 0, _showings(shown[:i]))
            made.append(_sample(model, encoded, i, at, captions))
    return Report(findings.found, facts, dict(shares), made)


def _an_epoch(sources: Sequence[Source], whole: Sequence[Example], training: Sequence[Example]) -> int:
    """How many samples an epoch will have, of `sources` of which `whole` is there, and `training` not held out.

    DreamBooth's pictures are shown as often as those that are still to be made, or shown as others, ask for.
    """
    if not any(isinstance(source, Dreambooth) for source in sources):
        return _showings(training)
    usable, used = {example.image for example in whole}, {example.image for example in training}
    found, _ = read_all(sources, captioned=False, unmade=(1, 1))
    broken = {e.image: "" for e in found if e.image.exists() and e.image not in usable}
    found, _ = read_all(sources, broken, captioned=False, unmade=(1, 1))
    return _showings([example for example in found if example.image in used or not example.image.exists()])


def _showings(examples: Sequence[Example]) -> int:
    return sum(example.repeats for example in examples)


def _wanted(sources: Sequence[Source], base: str, contents: str, findings: Findings) -> int:
    """How many pictures the base is still to make."""
    count = 0
    for source in sources:
        try:
            count += len(source.wanted(base, contents))
        except UserError as error:
            findings.add("error", "class", str(error))
    return count


@torch.no_grad()
def _sample(model: OpenedModel, encoded: Encoded, index: int, at: Position, captions: Captions) -> Sample:
    """A showing of an example, as a run would make it."""
    example, pictures = encoded.examples[index], encoded.pictures
    number, flip = number_at(pictures, at), flip_at(pictures, at)
    seen = encoded.variant(index, number)
    pixels = seen.pixels(load_picture(example.image, pictures.background), flip)
    decoded = model.decode_latents(model.encode_images(pixels[None]).mean)[0]
    caption = captions.at(example.caption, at)
    height, width, top, left, across_down, across = seen.crop.frame(flip)
    beside: dict[str, Image.Image] = {}
    cells = across // model.resolution_step, across_down // model.resolution_step
    counts = encoded.weights(index, flip, cells, number)
    if counts is not None:
        beside["what counts in the loss (white)"] = _picture(2 * counts.expand(3, -1, -1) - 1)
    with suppress(DataError):  # it was put down
        if model.guide is not None and (model.guide == "mask" or example.guide is not None):
            beside[TOLD[model.guide]] = _told(encoded.guide(model.guide, index, flip, at, number))
    times = "once" if example.repeats == 1 else f"{example.repeats} times"
    return Sample(
        name=str(example.image),
        seen=_picture(pixels),
        decoded=_picture(decoded.float().cpu()),
        beside=beside,
        caption=caption,
        tokens=model.words(caption),
        most=model.max_tokens,
        facts={
            "size": f"{width} x {height}",
            "bucket": f"{across} x {across_down}",
            "cut at": f"{left}, {top}",
            "mirrored": "yes" if flip else "no",
            **({"variant": f"{number + 1} of {pictures.variants}"} if pictures.varied else {}),
            "source": f"{example.source}, weight {example.weight:g}, shown {times} an epoch",
        },
    )


def _told(guide: Tensor) -> Image.Image:
    """A guide as `Encoded.guide` gives it: the mask of mask and picture, a depth map, or a picture."""
    if len(guide) == 3:
        return _picture(guide)
    levels = guide[:1] - guide[:1].min() if len(guide) == 1 else guide[:1]
    return _picture((2 * levels / levels.max().clamp(min=1e-12) - 1).expand(3, -1, -1))


def _small(file: str) -> Image.Image | None:
    """The picture in a file; None where there is none, or a damaged one."""
    if Path(file).suffix.lower() not in SUFFIXES:
        return None
    try:
        picture = load_picture(Path(file), "white")
    except DataError:
        return None
    picture.thumbnail((128, 128))
    return picture


def _picture(pixels: Tensor) -> Image.Image:
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
