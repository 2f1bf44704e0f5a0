"""Pictures and captions through the frozen encoders, once, into the cache."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageColor
from torch import Tensor

from tuner.data.ahead import Latest, ahead, workers
from tuner.data.buckets import Buckets, Crop
from tuner.data.cache import Cache, address
from tuner.data.example import Example, Size
from tuner.data.guides import Guides
from tuner.data.hashes import file_hash, file_hashes
from tuner.data.images import (
    Pictures,
    is_transparent,
    load_alpha,
    load_depth,
    load_mask,
    load_picture,
    unloadable,
)
from tuner.data.variants import Variant, variant
from tuner.diffusion.model import DiffusionModel, Guide
from tuner.errors import ConfigError, DataError, DivergedError
from tuner.rng import Position

Missing = dict[str, tuple[int, bool, int]]
"""Addresses that a cache lacks, each with the example, whether it is mirrored, and the variant."""
Progress = Callable[[Sequence[str], str], Iterable[str]]
"""Wraps a list of addresses, with a word on what is done, to show how far it is."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Where the encoded forms of examples and captions are."""

    examples: Sequence[Example]
    buckets: Buckets
    pictures: Pictures
    cache: Cache
    autoencoder: str
    """Fingerprint of the autoencoder."""
    text_encoder: str | None
    """Fingerprint of the text encoders; None where captions are not cached."""

    @cached_property
    def sizes(self) -> list[Size]:
        """Each example's bucket."""
        return [self.buckets.of(example) for example in self.examples]

    @cached_property
    def crops(self) -> list[Crop]:
        """How each example becomes its bucket's size, in its first variant."""
        return [self.variant(example, 0).crop for example in range(len(self.examples))]

    def variant(self, example: int, number: int) -> Variant:
        """How an example is cut and changed in its variant `number`."""
        digest = self._hashes[example] if self.pictures.varied else ""
        return variant(self.pictures, self.examples[example].size, self.sizes[example], digest, number)

    @cached_property
    def _hashes(self) -> list[str]:
        images = [example.image for example in self.examples]
        return file_hashes(images, self.cache.folder, self.cache.read_only)

    @cached_property
    def _backgrounds(self) -> list[Sequence[int] | None]:
        """The colour that shows behind each picture; None behind those that are opaque."""
        colour = ImageColor.getrgb(self.pictures.background)
        return [colour if is_transparent(example.image) else None for example in self.examples]

    def latents_address(self, example: int, flip: bool, number: int = 0) -> str:
        """Where the latent distribution of an example's variant is."""
        of = self.variant(example, number)
        return address(
            picture=self._hashes[example],
            bucket=self.sizes[example],
            cut=(of.crop.left, of.crop.top),
            flip=flip,
            background=self._backgrounds[example],
            autoencoder=self.autoencoder,
            **({} if of.change is None else {"change": asdict(of.change)}),
        )

    def text_address(self, caption: str) -> str:
        """Where the encoding of a final caption is."""
        return address(caption=caption, text_encoder=self.text_encoder)

    def contents(self) -> dict[str, str]:
        """Hashes of what the examples hold, in their order, wherever their files are."""
        return {
            "the pictures": address(pictures=self._hashes),
            "the masks": address(masks=[None if e.mask is None else file_hash(e.mask) for e in self.examples]),
            "the guides": address(guides=[None if e.guide is None else file_hash(e.guide) for e in self.examples]),
            "the captions": address(captions=[example.caption for example in self.examples]),
            "the pictures' weights": address(weights=[example.weight for example in self.examples]),
            "the pictures' repeats": address(repeats=[example.repeats for example in self.examples]),
            "the pictures' targets": address(prior=[example.prior for example in self.examples]),
        }

    def latents(self, example: int, flip: bool, number: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of an example's variant, `[C, h, w]` float32."""
        entry = self.cache.read(self.latents_address(example, flip, number))
        return entry["mean"], entry["std"]

    def weights(self, example: int, flip: bool, size: Size, number: int = 0) -> Tensor | None:
        """How much each place of the latents of an example's variant counts, `[1, h, w]`; None where all count alike.

        `size` is the latents' width and height.
        """
        mask = self._mask(example)
        return None if mask is None else self.variant(example, number).weights(mask, flip, size)

    def _mask(self, example: int) -> Image.Image | None:
        of = self.examples[example]
        if of.mask is not None:
            return load_mask(of.mask)
        if self.pictures.alpha == "mask" and self._backgrounds[example] is not None:
            return load_alpha(of.image)
        return None

    def refuse_blank(self, examples: Sequence[int], progress: Progress) -> None:
        """Look whether something counts of each of `examples`, which are encoded, in each of its variants.

        Raises:
            DataError: pictures of which nothing does, all named.
        """
        masked = {str(i): i for i in examples if self.examples[i].mask or self.pictures.alpha == "mask"}
        looked_at = progress(list(masked), "looking at masks")
        with closing(ahead(masked.values(), self._is_blank)) as blank:
            found = dict.fromkeys(self.examples[masked[name]].image for name in looked_at if next(blank)())
        where = "in some of its cuts" if self.pictures.varied else "where it is cut"
        remedy = "draw the mask, leave the picture out, or set objective.unmasked_weight above 0"
        if found:
            lines = (f"{image}: its mask is black {where}, so that nothing of it counts; {remedy}" for image in found)
            raise DataError("\n".join(lines))

    def _is_blank(self, example: int) -> bool:
        mask = self._mask(example)
        if mask is None:
            return False
        height, width = self.latents(example, False)[0].shape[1:]
        numbers = range(self.pictures.variants if self.pictures.varied else 1)
        return not all(self.variant(example, n).weights(mask, False, (width, height)).any() for n in numbers)

    def guide(self, kind: Guide, example: int, flip: bool, at: Position, number: int = 0) -> Tensor:
        """What a model is told of an example besides its caption, cut and mirrored as its variant is: `[K, H, W]`.

        For `mask` the mask, drawn from `at` where no file has one, and the picture; for `depth` the map; for `picture`
        the picture that was edited, whose colours are changed like its own. See `DiffusionModel.encode_guide`.
        """
        of, seen = self.examples[example], self.variant(example, number)
        if kind == "mask":
            if of.guide is None:
                mask = self.pictures.guides.mask(seen.crop.bucket, at.generator("guide"))
            else:
                mask = seen.weights(load_mask(of.guide), flip, seen.crop.bucket)
            return torch.cat([mask, seen.pixels(load_picture(of.image, self.pictures.background), flip)])
        assert of.guide is not None
        if kind == "depth":
            return seen.depth(load_depth(of.guide), flip)
        return seen.pixels(load_picture(of.guide, self.pictures.background), flip)

    def check_guides(self, kind: Guide | None) -> None:
        """Refuse data that tells a model what it does not take, or not what it needs.

        Raises:
            DataError: an example without a guide, or with one.
            ConfigError: options that would do nothing.
        """
        given, own = self.pictures.guides, Guides()
        if kind != "mask" and (given.whole, given.nothing) != (own.whole, own.nothing):
            raise ConfigError("pictures.guides: the base is not one for inpainting; leave whole and nothing out")
        if kind != "picture" and given.dropout:
            raise ConfigError("pictures.guides: the base does not edit pictures; leave dropout out")
        for example in self.examples:
            if kind is None and example.guide is not None:
                raise DataError(f"{example.guide}: the base is told captions alone; leave `guides` out")
            if kind in ("depth", "picture") and example.guide is None:
                what = "depth map" if kind == "depth" else "picture as it was before the edit"
                raise DataError(f"{example.image}: has no {what}, which the base is told; give the source's `guides`")

    def text(self, caption: str) -> dict[str, Tensor]:
        """The encoding of a final caption: the fields of `Conditioning.text`, such as tokens `[L, D]`."""
        return self.cache.read(self.text_address(caption))

    def missing_latents(self) -> Missing:
        """What the cache lacks, each once."""
        flips = (False, True) if self.pictures.flip else (False,)
        numbers = range(self.pictures.variants if self.pictures.varied else 1)
        missing: Missing = {}
        for what in product(range(len(self.examples)), flips, numbers):
            key = self.latents_address(*what)
            if key not in missing and not self.cache.has(key):
                missing[key] = what
        return missing

    def missing_texts(self, captions: Iterable[str]) -> dict[str, str]:
        """The addresses that the cache lacks, with the caption, each once."""
        every = {self.text_address(caption): caption for caption in captions}
        return {key: caption for key, caption in every.items() if not self.cache.has(key)}

    def refuse_broken(self, missing: Missing, progress: Progress) -> None:
        """Decode the pictures that are still to be encoded.

        Raises:
            DataError: pictures that cannot be decoded, all named.
        """
        files = {str(self.examples[example].image): self.examples[example].image for example, *_ in missing.values()}
        wrong = unloadable(files[name] for name in progress(list(files), "reading pictures"))
        if wrong:
            raise DataError("\n".join(map(str, wrong)))

    @torch.no_grad()
    def fill_latents(self, model: DiffusionModel, missing: Missing, progress: Progress) -> None:
        """Encode pictures one by one, so that an entry depends on its own picture only.

        Raises:
            DataError: pictures that cannot be decoded, all named.
            DivergedError: latents that are not finite; the picture is named.
        """
        broken: list[str] = []
        by_file: dict[Path, list[str]] = {}  # what is made of one picture comes together, so that it is decoded once
        for key, (index, *_) in missing.items():
            by_file.setdefault(self.examples[index].image, []).append(key)
        keys = [key for group in by_file.values() for key in group]
        load = Latest[Path, Image.Image](lambda file: load_picture(file, self.pictures.background), workers())
        with closing(ahead([missing[key] for key in keys], lambda what: self._pixels(*what, load))) as read:
            for key in progress(keys, "encoding pictures"):
                try:
                    pixels = next(read)()
                except DataError as error:
                    broken.append(str(error))
                    continue
                latents = model.encode_images(pixels[None])
                if not (torch.isfinite(latents.mean).all() and torch.isfinite(latents.std).all()):
                    image = self.examples[missing[key][0]].image
                    raise DivergedError(f"{image}: its latents are not finite; the base's autoencoder is damaged")
                self.cache.write(key, {"mean": latents.mean[0].float(), "std": latents.std[0].float()})
        if broken:
            raise DataError("\n".join(dict.fromkeys(broken)))

    def _pixels(self, example: int, flip: bool, number: int, load: Callable[[Path], Image.Image]) -> Tensor:
        """An example's variant as the autoencoder gets it, `[3, H, W]` in [-1, 1]."""
        return self.variant(example, number).pixels(load(self.examples[example].image), flip)

    @torch.no_grad()
    def fill_texts(self, model: DiffusionModel, missing: dict[str, str], progress: Progress) -> None:
        """Encode captions one by one."""
        for key in progress(list(missing), "encoding captions"):
            encoded = model.encode_text([missing[key]]).text()
            self.cache.write(key, {name: part[0] for name, part in encoded.items()})
