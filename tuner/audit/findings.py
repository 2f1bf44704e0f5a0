"""What can be wrong with pictures and captions. Every check looks at all of the data; none stops at the first fault."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from tuner.data.buckets import Buckets, Crop, centre_crop
from tuner.data.cache import Cache
from tuner.data.captions import read_caption
from tuner.data.example import Example
from tuner.data.hashes import file_hashes
from tuner.data.images import OTHER_SUFFIXES, SUFFIXES, Pictures, is_transparent, load_mask, load_picture, upright_size
from tuner.data.lookalikes import groups, look, looks
from tuner.data.sources.base import Source
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.sources.folder import CAPTIONS, PictureFolder
from tuner.data.sources.kohya import Kohya
from tuner.errors import DataError, UnsafeError

Severity = Literal["error", "warning", "note"]
LOST = 0.35
"""Of a picture's area; where more is cut off to fit the bucket, it is said."""
FLAT = 2.0
"""Of 255: a picture whose values spread less shows nothing."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, or worth a look."""

    severity: Severity
    """`error`: a run would stop or be worthless; `warning`: it would learn something else than is meant; `note`: it is
    dealt with, as said."""
    kind: str
    message: str
    files: tuple[str, ...]


@dataclass
class Findings:
    """All that was found."""

    found: list[Finding] = field(default_factory=list[Finding])

    def add(self, severity: Severity, kind: str, message: str, *files: Path) -> None:
        """Put one down."""
        self.found.append(Finding(severity, kind, message, tuple(str(file) for file in files)))

    @property
    def worst(self) -> Severity | None:
        """The severest there is."""
        for severity in ("error", "warning", "note"):
            if any(finding.severity == severity for finding in self.found):
                return severity
        return None


Progress = Callable[[Sequence[str], str], Iterable[str]]


def read_source(source: Source, findings: Findings, progress: Progress) -> list[Example]:
    """The examples of a source that are whole; what is wrong with the others is put down."""
    match source:
        case PictureFolder():
            return _read_folder(source, findings, progress)
        case Dreambooth():
            subject = PictureFolder(path=source.subject, prompt=source.prompt, source="subject")
            read = _read_folder(subject, findings, progress)
            if source.class_folder is not None and source.class_folder.expanduser().is_dir():
                prior = PictureFolder(
                    path=source.class_folder, prompt=source.class_prompt, weight=source.prior_weight, source="class"
                )
                read += _read_folder(prior, findings, progress)
            return read
        case Kohya():
            try:
                return [e for folder in source.folders() for e in _read_folder(folder, findings, progress)]
            except DataError as error:
                return _all_wrong(error, findings)
        case _:
            try:
                examples = list(source.examples())
            except (DataError, UnsafeError) as error:
                return _all_wrong(error, findings)
            return [e for e in _decoded(examples, findings, progress)]


def _all_wrong(error: Exception, findings: Findings) -> list[Example]:
    for line in str(error).splitlines():
        findings.add("error", "source", line)
    return []


def _read_folder(source: PictureFolder, findings: Findings, progress: Progress) -> list[Example]:
    root = source.path.expanduser()
    if not root.is_dir():
        findings.add("error", "source", f"{source.path}: no such folder", source.path)
        return []
    seen = [p for p in sorted(root.rglob("*")) if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    others = {path for path in seen if path.suffix.lower() in OTHER_SUFFIXES}
    for path in seen:
        if path in others:
            findings.add("error", "kind", f"{path}: a kind of picture that is not read; save it as PNG or JPEG", path)
    pictures = [path for path in seen if path.suffix.lower() in SUFFIXES]
    if not pictures:
        findings.add("error", "source", f"{source.path}: no picture in it", source.path)
    captioned: dict[Path, list[Path]] = defaultdict(list)
    for image in pictures:
        captioned[image.with_suffix("")].append(image)
    for stem, images in captioned.items():
        if source.prompt is None and len(images) > 1:
            names = " and ".join(image.name for image in images)
            findings.add("error", "caption shared", f"{stem}: {names} share one caption; rename one of them", *images)
    if source.prompt is None:
        for path in seen:
            stem = path.with_suffix("")
            if path.suffix in CAPTIONS and stem not in captioned and not any(o.with_suffix("") == stem for o in others):
                message = f"{path}: a caption without a picture; is the picture named otherwise, or gone?"
                findings.add("warning", "caption alone", message, path)
    found: list[Example] = []
    for image in pictures:
        try:
            size = upright_size(image)
        except DataError as error:
            findings.add("error", "picture", str(error), image)
            continue
        caption = source.prompt if source.prompt is not None else _caption(image, source.fallback, findings)
        if caption is not None:
            found.append(
                Example(
                    image=image,
                    size=size,
                    caption=caption,
                    mask=_mask(source, image, findings),
                    weight=source.weight,
                    repeats=source.repeats,
                    source=source.source,
                )
            )
    return _decoded(found, findings, progress)


def _caption(image: Path, fallback: str | None, findings: Findings) -> str | None:
    there = [file for end in CAPTIONS if (file := image.with_suffix(end)).is_file()]
    if len(there) > 1:
        names = " and ".join(file.name for file in there)
        findings.add("error", "caption twice", f"{image}: has two captions, {names}; remove one of them", image)
        return None
    if not there:
        if fallback is None:
            message = f"{image}: has no caption; write {image.with_suffix('.txt').name}"
            findings.add("error", "caption missing", message, image)
        return fallback
    try:
        return read_caption(there[0])
    except DataError as error:
        findings.add("error", "caption", str(error), there[0])
        return None


def _mask(source: PictureFolder, image: Path, findings: Findings) -> Path | None:
    if source.masks is None:
        return None
    stem = source.masks.expanduser() / image.relative_to(source.path.expanduser()).with_suffix("")
    there = [file for suffix in sorted(SUFFIXES) if (file := stem.with_suffix(suffix)).is_file()]
    if not there:
        findings.add("error", "mask", f"{image}: has no mask {stem}.png; draw it, or leave `masks` out", image)
        return None
    return there[0]


def _decoded(examples: Sequence[Example], findings: Findings, progress: Progress) -> list[Example]:
    """Those whose pixels can be read; flat pictures and empty masks are put down."""
    by_name = {f"{index}": example for index, example in enumerate(examples)}
    whole: list[Example] = []
    for name in progress(list(by_name), "reading pictures"):
        example = by_name[name]
        try:
            picture = load_picture(example.image, "white")
            if example.mask is not None and np.asarray(load_mask(example.mask)).max() == 0:
                findings.add("error", "mask", f"{example.mask}: is black all over, so nothing counts", example.mask)
        except DataError as error:
            findings.add("error", "picture", str(error), example.image)
            continue
        if float(look(picture).thumbnail.std(axis=(0, 1)).max()) < FLAT:
            findings.add("warning", "flat", f"{example.image}: shows one colour only", example.image)
        whole.append(example)
    return whole


def look_at_sizes(examples: Sequence[Example], buckets: Buckets, findings: Findings) -> Counter[tuple[int, int]]:
    """How many pictures each bucket has; those that are enlarged or lose much are put down."""
    shares: Counter[tuple[int, int]] = Counter()
    for example in examples:
        bucket = buckets.nearest(example.size)
        shares[bucket] += 1
        crop = centre_crop(example.size, bucket)
        if crop.scale > 1:
            message = (
                f"{example.image}: {example.size[0]} x {example.size[1]} is smaller than its bucket {bucket[0]} x "
                f"{bucket[1]}, so it is enlarged by {crop.scale:.2f}; find a larger one, or lower the resolution"
            )
            findings.add("warning", "small", message, example.image)
        lost = 1 - _area(crop) / (example.size[0] * example.size[1])
        if lost > LOST:
            message = f"{example.image}: {lost:.0%} of it are cut off; crop it yourself, or raise pictures.max_ratio"
            findings.add("warning", "cut", message, example.image)
    return shares


def _area(crop: Crop) -> float:
    left, top, right, bottom = crop.box
    return (right - left) * (bottom - top)


def look_at_transparency(examples: Sequence[Example], pictures: Pictures, findings: Findings) -> None:
    """Pictures behind which the background shows."""
    for example in examples:
        if is_transparent(example.image):
            counts = ", and the loss counts where it is opaque" if pictures.alpha == "mask" else ""
            message = (
                f"{example.image}: is transparent; it is put on pictures.background, {pictures.background}{counts}"
            )
            findings.add("note", "transparent", message, example.image)


def look_for_copies(
    sets: Mapping[str, Sequence[Example]], background: str, cache: Cache, findings: Findings, progress: Progress
) -> None:
    """Pictures that show the same, within a set and between sets (`train`, `class`, `validation`)."""
    every = [(name, example) for name, examples in sets.items() for example in examples]
    files = [example.image for _, example in every]
    hashes = file_hashes(files, cache.folder)
    for group in groups(looks(files, hashes, background, cache, progress)):
        names = {every[i][0] for i in group}
        members = [every[i][1] for i in group]
        same = "copies" if len({hashes[i] for i in group}) == 1 else "look alike"
        listed = ", ".join(str(member.image) for member in members)
        if "validation" in names and len(names) > 1:
            message = f"{listed}: {same}, and are both trained on and validated with; remove them from one"
            findings.add("error", "leak", message, *(member.image for member in members))
            continue
        if len(names) > 1:
            message = f"{listed}: {same}, and are in {' and '.join(sorted(names))}; remove them from one"
            findings.add("warning", "in two sets", message, *(member.image for member in members))
            continue
        if len({member.caption for member in members}) > 1:
            message = f"{listed}: {same}, with different captions; keep one"
            findings.add("warning", "captions differ", message, *(member.image for member in members))
            continue
        message = f"{listed}: {same}, so they count {len(members)} times; keep one, or use `repeats` if that is meant"
        findings.add("warning", "copies", message, *(member.image for member in members))


def look_at_captions(
    examples: Sequence[Example],
    plain: Callable[[str], str],
    tokens: Callable[[str], int],
    most: int,
    trigger: str | None,
    findings: Findings,
) -> None:
    """Captions that are cut off by the text encoder, or lack the word that is to call what is learned."""
    for example in examples:
        try:
            final = plain(example.caption)
        except DataError as error:
            findings.add("error", "caption", f"{example.image}: {error}", example.image)
            continue
        if (count := tokens(final)) > most:
            message = f"{example.image}: its caption has {count} tokens, of which {count - most} are cut off"
            findings.add("warning", "caption long", message, example.image)
        if trigger and example.source != "class" and trigger.casefold() not in final.casefold():
            message = f"{example.image}: its caption lacks {trigger!r}; write it in, or set captions.trigger"
            findings.add("warning", "trigger", message, example.image)
