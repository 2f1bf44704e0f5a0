"""What can be wrong with pictures and captions. Every check looks at all of the data; none stops at the first fault."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from PIL import Image

from tuner.data.buckets import Buckets, Crop, centre_crop
from tuner.data.cache import Cache
from tuner.data.captions import read_caption, says
from tuner.data.encode import Encoded
from tuner.data.example import Example, Size
from tuner.data.hashes import file_hashes
from tuner.data.images import (
    OTHER_SUFFIXES,
    SUFFIXES,
    BrokenPicture,
    Pictures,
    is_transparent,
    load_alpha,
    load_depth,
    load_mask,
    load_picture,
    upright_size,
)
from tuner.data.lookalikes import groups, look, looks
from tuner.data.sources.base import Source
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.sources.folder import PictureFolder, below, captions_of, find_pictures
from tuner.data.sources.kohya import Kohya
from tuner.errors import DataError, UnsafeError, UserError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
LOST = 0.35
"""Of a picture's area; where more is cut off to fit the bucket, it is said."""
JPEGS = {".jpg", ".jpeg", ".jfif"}
"""Files of one picture that may hold more behind it; of all others several are refused."""
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
    skips: bool = False
    """Whether a run leaves out pictures that cannot be decoded, for which they then are no errors."""

    def add(self, severity: Severity, kind: str, message: str, *files: Path) -> None:
        """Put one down."""
        self.found.append(Finding(severity, kind, message, tuple(str(file) for file in files)))

    def add_unreadable(self, error: UserError, kind: str, *files: Path) -> None:
        """Put down why a picture cannot be read."""
        skipped = self.skips and isinstance(error, BrokenPicture)
        said = f"{error}; pictures.broken = 'skip' leaves it out" if skipped else str(error)
        for line in said.splitlines():
            self.add("warning" if skipped else "error", kind, line, *files)


Progress = Callable[[Sequence[str], str], Iterable[str]]


def read_source(source: Source, findings: Findings, progress: Progress) -> list[Example]:
    """The examples of a source that are whole; what is wrong with the others is put down."""
    try:
        match source:
            case PictureFolder():
                return _read_folder(source, findings, progress)
            case Dreambooth():
                return _read_dreambooth(source, findings, progress)
            case Kohya():
                folders, wrong = source.folders()
                _put_down(wrong, findings)
                return [e for folder in folders for e in _read_folder(folder, findings, progress)]
            case _:
                examples, wrong = source.read()
                _put_down(wrong, findings)
                return _decoded(examples, "data", findings, progress)
    except (DataError, UnsafeError) as error:
        _put_down([error], findings)
        return []


def _put_down(wrong: Iterable[UserError], findings: Findings) -> None:
    for error in wrong:
        findings.add_unreadable(error, "source")


def _read_dreambooth(source: Dreambooth, findings: Findings, progress: Progress) -> list[Example]:
    """Both sides; class pictures that the base has still to make are left out."""
    subject = PictureFolder(path=source.subject, prompt=source.prompt, repeats=source.repeats, source="subject")
    read = _read_folder(subject, findings, progress)
    if source.class_folder is None or not source.class_folder.expanduser().is_dir():
        return read
    prior = PictureFolder(path=source.class_folder, prompt=source.class_prompt, weight=source.prior_weight)
    if not find_pictures(source.class_folder):
        return read
    others = _read_folder(prior, findings, progress)
    return source.balanced(read, others) if read and others else [*read, *others]


def _read_folder(source: PictureFolder, findings: Findings, progress: Progress) -> list[Example]:
    root = source.path.expanduser()
    if not root.is_dir():
        findings.add("error", "source", f"{source.path}: no such folder", source.path)
        return []
    seen, unread = below(root)
    seen.sort()
    _put_down(map(DataError, unread), findings)
    others = {path for path in seen if path.suffix.lower() in OTHER_SUFFIXES}
    for path in seen:
        if path in others:
            findings.add("error", "kind", f"{path}: a kind of picture that is not read; save it as PNG or JPEG", path)
    pictures = [path for path in seen if path.suffix.lower() in SUFFIXES]
    if not pictures:
        findings.add("error", "source", f"{source.path}: no picture in it", source.path)
    beside = [what for what, there in (("mask", source.masks), ("guide", source.guides)) if there is not None]
    captioned: dict[Path, list[Path]] = defaultdict(list)
    for image in pictures:
        captioned[image.with_suffix("")].append(image)
    for stem, images in captioned.items():
        for what in [*(["caption"] if source.prompt is None else []), *beside]:
            if len(images) > 1:
                names = " and ".join(image.name for image in images)
                findings.add("error", f"{what} shared", f"{stem}: {names} share one {what}; rename one", *images)
    captions = captions_of(seen)
    if source.prompt is None:
        for stem in sorted(captions.keys() - captioned.keys() - {other.with_suffix("") for other in others}):
            for path in captions[stem]:
                message = f"{path}: a caption without a picture; is the picture named otherwise, or gone?"
                findings.add("warning", "caption alone", message, path)
    masks, guides = _by_stem(source.masks, findings), _by_stem(source.guides, findings)
    found: list[Example] = []
    for image in pictures:
        try:
            size = upright_size(image)
        except DataError as error:
            findings.add_unreadable(error, "picture", image)
            continue
        caption = source.prompt
        if caption is None:
            caption = _caption(image, captions[image.with_suffix("")], source.fallback, findings)
        if caption is not None:
            found.append(
                Example(
                    image=image,
                    size=size,
                    caption=caption,
                    mask=_beside(source, image, size, masks, "mask", findings),
                    guide=_beside(source, image, size, guides, "guide", findings),
                    weight=source.weight,
                    repeats=source.repeats,
                    source=source.source,
                )
            )
    return _decoded(found, str(source.path), findings, progress)


def _caption(image: Path, there: Sequence[Path], fallback: str | None, findings: Findings) -> str | None:
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


@dataclass(frozen=True)
class _Beside:
    """A folder of masks or guides."""

    folder: Path
    by_stem: Mapping[Path, list[Path]]
    """Its pictures by their paths without the ending."""


def _by_stem(folder: Path | None, findings: Findings) -> _Beside | None:
    if folder is None:
        return None
    root = folder.expanduser()
    seen, wrong = below(root)
    _put_down(map(DataError, wrong), findings)
    by_stem: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(seen):
        if file.suffix.lower() in SUFFIXES:
            by_stem[file.with_suffix("")].append(file)
    return _Beside(root, by_stem)


def _beside(
    source: PictureFolder, image: Path, size: Size, beside: _Beside | None, what: str, findings: Findings
) -> Path | None:
    """The picture's mask or guide in another folder."""
    if beside is None:
        return None
    stem = beside.folder / image.relative_to(source.path.expanduser()).with_suffix("")
    there = beside.by_stem.get(stem, [])
    if not there:
        findings.add("error", what, f"{image}: has no {what} {stem}.png; make it, or leave `{what}s` out", image)
        return None
    if len(there) > 1:
        names = " and ".join(file.name for file in there)
        findings.add("error", what, f"{image}: has two {what}s, {names}; remove one of them", *there)
        return None
    try:
        if upright_size(there[0]) != size:
            message = f"{there[0]}: is not of its picture's size, {size[0]} x {size[1]}; make it so"
            findings.add("error", what, message, there[0])
            return None
    except DataError as error:
        findings.add("error", what, str(error), there[0])
        return None
    return there[0]


def _decoded(examples: Sequence[Example], place: str, findings: Findings, progress: Progress) -> list[Example]:
    """Those whose pixels can be read; flat pictures are put down, and that nothing is left of `place`."""
    by_name = {f"{index}": example for index, example in enumerate(examples)}
    whole: list[Example] = []
    for name in progress(list(by_name), "reading pictures"):
        example = by_name[name]
        try:
            picture = load_picture(example.image, "white")
        except DataError as error:
            findings.add_unreadable(error, "picture", example.image)
            continue
        if float(look(picture).thumbnail.std(axis=(0, 1)).max()) < FLAT:
            findings.add("warning", "flat", f"{example.image}: shows one colour only", example.image)
        whole.append(example)
    if findings.skips and not whole:
        findings.add("error", "source", f"{place}: no picture of it is left, and no run leaves out all; mend them")
    return whole


def look_at_sizes(examples: Sequence[Example], buckets: Buckets, findings: Findings) -> Counter[tuple[int, int]]:
    """How many pictures each bucket has; those that are enlarged or lose much are put down."""
    shares: Counter[tuple[int, int]] = Counter()
    cut: set[Path] = set()
    for example in examples:
        bucket = buckets.of(example)
        shares[bucket] += 1
        crop = centre_crop(example.size, bucket)
        if crop.scale > 1:
            message = (
                f"{example.image}: {example.size[0]} x {example.size[1]} is smaller than its bucket {bucket[0]} x "
                f"{bucket[1]}, so it is enlarged by {crop.scale:.2f}; find a larger one, or lower the resolution"
            )
            findings.add("warning", "small", message, example.image)
        lost = 1 - _area(crop) / (example.size[0] * example.size[1])
        if lost > LOST and example.image not in cut:
            cut.add(example.image)
            message = f"{example.image}: {lost:.0%} of it are cut off; crop it yourself, or raise pictures.max_ratio"
            findings.add("warning", "cut", message, example.image)
    return shares


def _area(crop: Crop) -> float:
    left, top, right, bottom = crop.box
    return (right - left) * (bottom - top)


def look_at_transparency(
    examples: Sequence[Example], pictures: Pictures, unmasked_weight: float, findings: Findings
) -> None:
    """Pictures behind which the background shows; and such that have more than one picture in their file."""
    for example in examples:
        if is_transparent(example.image):
            masks = pictures.alpha == "mask" and example.mask is None
            counts = ", and the loss counts where it is opaque" if masks else ""
            message = (
                f"{example.image}: is transparent; it is put on pictures.background, {pictures.background}{counts}"
            )
            findings.add("note", "transparent", message, example.image)
            if masks and load_alpha(example.image).getbbox() is None:
                _nothing_counts(example.image, "is transparent all over", unmasked_weight, findings)
        if example.image.suffix.lower() in JPEGS:
            with Image.open(example.image) as picture:
                count = getattr(picture, "n_frames", 1)
            if count > 1:
                message = f"{example.image}: holds {count} pictures, such as a depth map; the first is taken"
                findings.add("note", "first of several", message, example.image)


def look_at_masks(examples: Sequence[Example], unmasked_weight: float, findings: Findings, progress: Progress) -> None:
    """Masks by which nothing counts, or that cannot be read."""
    by_name = {str(example.mask): example.mask for example in examples if example.mask is not None}
    for name in progress(list(by_name), "reading masks"):
        try:
            if load_mask(by_name[name]).getbbox() is None:
                _nothing_counts(by_name[name], "is black all over", unmasked_weight, findings)
        except DataError as error:
            findings.add("error", "mask", str(error), by_name[name])


def _nothing_counts(file: Path, why: str, unmasked_weight: float, findings: Findings) -> None:
    if unmasked_weight:
        message = f"{file}: {why}; by objective.unmasked_weight the whole picture counts, as if it had no mask"
        findings.add("warning", "mask", message, file)
    else:
        findings.add("error", "mask", f"{file}: {why}, so nothing counts; draw it, or leave the picture out", file)


def look_at_cut_masks(encoded: Encoded, cell: int, findings: Findings) -> None:
    """Masks of which a cut leaves nothing, in cells of `cell` x `cell` pixels; not those that are black anyway."""
    pictures = encoded.pictures
    for index, example in enumerate(encoded.examples):
        if example.mask is None and pictures.alpha != "mask":
            continue
        with suppress(DataError):  # it was put down
            width, height = encoded.sizes[index]
            numbers = range(pictures.variants if pictures.varied else 1)
            grid = (width // cell, height // cell)
            cuts = (encoded.weights(index, False, grid, number) for number in numbers)
            if all(cut is None or cut.any() for cut in cuts):
                continue
            mask = load_alpha(example.image) if example.mask is None else load_mask(example.mask)
            if mask.getbbox() is not None:
                file = example.mask or example.image
                why = "some cuts leave" if pictures.varied else "the cut leaves"
                message = f"{file}: {why} nothing that counts; crop the picture, or set objective.unmasked_weight"
                findings.add("error", "mask", message, file)


GUIDES = {"depth": "depth map", "picture": "picture as it was before the edit"}


def look_at_guides(examples: Sequence[Example], kind: str | None, findings: Findings, progress: Progress) -> None:
    """Guides that are absent or say nothing to the base, which is told pictures of `kind`, or of none."""
    if kind is None:
        if given := [example.guide for example in examples if example.guide is not None]:
            message = f"{given[0].parent}: {len(given)} guides, but the base is told captions alone; leave `guides` out"
            findings.add("error", "guide", message, *given)
        return
    for index in progress([str(index) for index in range(len(examples))], "reading guides"):
        example = examples[int(index)]
        if example.guide is None:
            if kind in GUIDES:
                message = f"{example.image}: has no {GUIDES[kind]}, which the base is told; give the source's `guides`"
                findings.add("error", "guide", message, example.image)
            continue
        try:
            if says := _says_nothing(kind, example.image, example.guide):
                findings.add("warning", "guide", f"{example.guide}: {says}", example.guide)
        except DataError as error:
            findings.add("error", "guide", str(error), example.guide)


def _says_nothing(kind: str, image: Path, guide: Path) -> str | None:
    """Why a guide teaches nothing, if so."""
    if kind == "depth":
        low, high = cast(tuple[float, float], load_depth(guide).getextrema())
        return "is of one depth all over, so it tells nothing; is it the right file?" if low == high else None
    if kind == "picture":
        same = load_picture(guide, "white").tobytes() == load_picture(image, "white").tobytes()
        return "is the same as its picture, so there is no edit to learn; is it the right file?" if same else None
    low, high = cast(tuple[int, int], load_mask(guide).getextrema())
    if high < 128:  # as `encode_guide` takes it
        return "is black all over, so nothing is to be painted; draw what is, white"
    return "is white all over, so nothing of the picture is told; draw what is left, black" if low >= 128 else None


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
            count = tokens(final)
        except DataError as error:
            findings.add("error", "caption", f"{example.image}: {error}", example.image)
            continue
        if count > most:
            message = f"{example.image}: its caption has {count} tokens, of which {count - most} are cut off"
            findings.add("warning", "caption long", message, example.image)
        if trigger and example.source != "class" and not says(final, trigger):
            message = f"{example.image}: its caption lacks {trigger!r}; write it in, or set captions.trigger"
            findings.add("warning", "trigger", message, example.image)
