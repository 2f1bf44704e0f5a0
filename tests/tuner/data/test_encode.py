"""What has changed is encoded anew, and nothing else."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from tuner.data.augment import Augment
from tuner.data.buckets import centre_crop
from tuner.data.cache import address
from tuner.data.captions import Captions
from tuner.data.encode import Encoded
from tuner.data.images import Pictures, load_picture
from tuner.data.sources.folder import PictureFolder
from tuner.errors import DataError, DivergedError
from tuner.families.source import BaseModel
from tuner.training.run import Run, RunConfig


@dataclass
class Setting:
    """All that the encoded forms depend on."""

    model: Any
    folder: Path
    output: Path
    cache: Path
    pictures: Pictures = field(default_factory=lambda: Pictures(resolution=64))
    captions: Captions = field(default_factory=lambda: Captions(dropout=0.1))
    masks: Path | None = None
    guides: Path | None = None
    seed: int = 0
    precision: Any = "fp32"

    def encode(self) -> Encoded:
        config = RunConfig(output=self.output, updates=1, precision=self.precision, cache=self.cache, seed=self.seed)
        examples = PictureFolder(path=self.folder, masks=self.masks, guides=self.guides).examples()
        with Run.start(config, config) as run:
            return run.encode(self.model, examples, self.pictures, self.captions)


@pytest.fixture
def setting(base: Path, tmp_path: Path) -> Setting:
    """Four pictures: a and d are opaque and square, b is wide, c is transparent."""
    folder = tmp_path / "写真 と 絵"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, size in {"a": (64, 64), "b": (128, 64), "c": (70, 70), "d": (100, 100)}.items():
        values = draw.integers(0, 256, (size[1], size[0], 4 if name == "c" else 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"the {name}")
    model = BaseModel(base=str(base)).open(torch.device("cpu"))
    return Setting(model=model, folder=folder, output=tmp_path / "out", cache=tmp_path / "a cache")


class Counter:
    """Counts calls of the encoders."""

    def __init__(self, model: Any) -> None:
        self.pictures = self.texts = 0
        self.watch(model)

    def watch(self, model: Any) -> None:
        """Count those of another model, too."""
        encode_images, encode_text = model.encode_images, model.encode_text

        def images(pixels: torch.Tensor) -> Any:
            self.pictures += len(pixels)
            return encode_images(pixels)

        def text(captions: list[str]) -> Any:
            self.texts += len(captions)
            return encode_text(captions)

        model.encode_images, model.encode_text = images, text


def rewrite(file: Path, change: Callable[[Image.Image], Image.Image | None]) -> None:
    with Image.open(file) as picture:
        picture.load()
    (change(picture) or picture).save(file)


def one_pixel(setting: Setting) -> None:
    rewrite(setting.folder / "a.png", lambda picture: picture.putpixel((3, 3), (1, 2, 3)))


def turn(setting: Setting) -> None:
    with Image.open(setting.folder / "b.png") as picture:
        picture.load()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(setting.folder / "b.png", exif=exif)


def one_weight(component: str, name: str) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        weight = setting.model.networks[component].get_parameter(name)
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3

    return change


def another_word(setting: Setting) -> None:
    from transformers import CLIPTokenizer

    tokenizer = setting.model.tokenizers["text_encoder"]
    words = tokenizer.get_vocab()
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>"), ("o", "t"), ("r", "e"), ("re", "d</w>")]  # without c at
    setting.model.tokenizers["text_encoder"] = CLIPTokenizer(
        vocab=words, merges=merges, pad_token=tokenizer.pad_token, model_max_length=77
    )


def activation(setting: Setting) -> None:
    setting.model.networks["text_encoder"].config.hidden_act = "gelu"


def scaling(setting: Setting) -> None:
    setting.model.networks["vae"].register_to_config(scaling_factor=0.2)
    setting.model.scaling = 0.2


def pictures(**changes: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.pictures = replace(setting.pictures, **changes)

    return change


def captions(**changes: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.captions = replace(setting.captions, **changes)

    return change


def add(setting: Setting) -> None:
    Image.new("RGB", (64, 64)).save(setting.folder / "e.png")
    (setting.folder / "e.txt").write_text("the e")


def copy(setting: Setting) -> None:
    for suffix in (".png", ".txt"):
        (setting.folder / f"z{suffix}").write_bytes((setting.folder / f"a{suffix}").read_bytes())


CHANGES: dict[str, tuple[Callable[[Setting], object], int, int]] = {
    "nothing": (lambda s: None, 0, 0),
    "one pixel": (one_pixel, 1, 0),
    "one caption": (lambda s: (s.folder / "a.txt").write_text("another"), 0, 1),
    "a caption to another's": (lambda s: (s.folder / "a.txt").write_text("the b"), 0, 0),
    "EXIF": (turn, 1, 0),
    "autoencoder": (one_weight("vae", "encoder.conv_in.weight"), 4, 0),
    "what an autoencoder decodes with": (one_weight("vae", "decoder.conv_in.weight"), 0, 0),
    "denoiser": (one_weight("unet", "conv_in.weight"), 0, 0),
    "scaling factor": (scaling, 4, 0),
    "text encoder": (one_weight("text_encoder", "final_layer_norm.bias"), 0, 5),
    "text encoder's activation": (activation, 0, 5),
    "tokenizer's merges": (another_word, 0, 5),
    "resolution": (pictures(resolution=128), 4, 0),
    "bucket step": (pictures(bucket_step=32), 1, 0),
    "largest ratio": (pictures(max_ratio=1.2), 1, 0),
    "background": (pictures(background="red"), 1, 0),
    "background in other words": (pictures(background="#ffffff"), 0, 0),
    "flip": (pictures(flip=True), 4, 0),
    "mean latents": (pictures(latents="mean"), 0, 0),
    "prefix": (captions(prefix="photo of "), 0, 4),
    "no dropout": (captions(dropout=0.0), 0, 0),
    "shuffle": (captions(shuffle=True), 0, 0),
    "one more": (add, 1, 1),
    "a copy": (copy, 0, 0),
    "a name": (lambda s: [(s.folder / f"b{x}").rename(s.folder / f"y{x}") for x in (".png", ".txt")], 0, 0),
    "a date": (lambda s: (s.folder / "a.png").touch(), 0, 0),
}
"""What is changed, and how many pictures and captions are then encoded."""


def entries(setting: Setting) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in setting.cache.rglob("*.safetensors") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("what", CHANGES)
def test_of_a_change_exactly_the_affected_entries_are_encoded_anew(what, setting: Setting):
    change, images, texts = CHANGES[what]
    prove(setting, change, (4, 5), (images, texts))  # the fifth caption is the empty one


def prove(setting: Setting, change: Callable[[Setting], object], first: tuple[int, int], more: tuple[int, int]) -> None:
    """At first so many pictures and captions are encoded, after the change so many more, and then none."""
    model, counter = setting.model, Counter(setting.model)
    setting.encode()
    assert (counter.pictures, counter.texts) == first
    before = entries(setting)
    setting.encode()
    assert (counter.pictures, counter.texts) == first

    change(setting)
    if setting.model is not model:
        counter.watch(setting.model)
    encoded = setting.encode()
    assert (counter.pictures - first[0], counter.texts - first[1]) == more
    after = entries(setting)
    assert all(after[path] == content for path, content in before.items()) and len(after) == len(before) + sum(more)
    setting.encode()
    assert (counter.pictures - first[0], counter.texts - first[1]) == more

    setting.cache = setting.cache.with_name("fresh")
    fresh = setting.encode()
    flips = (False, True) if setting.pictures.flip else (False,)
    for index, example in enumerate(encoded.examples):
        for flip, number in product(flips, range(setting.pictures.variants if setting.pictures.varied else 1)):
            pairs = zip(encoded.latents(index, flip, number), fresh.latents(index, flip, number), strict=True)
            assert all(torch.equal(cached, computed) for cached, computed in pairs)
            shape = encoded.latents(index, flip)[0].shape
            masks = [each.weights(index, flip, (shape[2], shape[1]), number) for each in (encoded, fresh)]
            assert masks[0] is masks[1] is None or torch.equal(*masks)
        for caption in setting.captions.variants(example.caption) or ():
            assert torch.equal(encoded.text(caption)["tokens"], fresh.text(caption)["tokens"])


def opened_with(**options: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        guide = setting.model.guide
        setting.model = BaseModel(base=setting.model.source, **options).open(torch.device("cpu"))
        setting.model.guide = guide

    return change


def augment(**changes: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        setting.pictures = replace(setting.pictures, augment=replace(setting.pictures.augment, **changes))

    return change


def run_with(**changes: Any) -> Callable[[Setting], None]:
    def change(setting: Setting) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in changes.items():
            setattr(setting, name, value)

    return change


VARIED: dict[str, tuple[Callable[[Setting], object], int, int]] = {
    "nothing": (lambda s: None, 0, 0),
    "one pixel": (one_pixel, 2, 0),
    "a mask's pixel": (lambda s: rewrite(s.masks / "a.png", lambda p: p.putpixel((9, 9), 7)), 0, 0),  # read each time
    "a guide's pixel": (lambda s: rewrite(s.guides / "a.png", lambda p: p.putpixel((9, 9), (7, 7, 7))), 0, 0),
    "no masks": (run_with(masks=None), 0, 0),
    "one caption": (lambda s: (s.folder / "a.txt").write_text("another"), 0, 1),
    "autoencoder": (one_weight("vae", "encoder.conv_in.weight"), 8, 0),
    "text encoder": (one_weight("text_encoder", "final_layer_norm.bias"), 0, 5),
    "skipped layers": (opened_with(clip_skip=1), 0, 5),
    "chunks": (opened_with(chunks=2), 0, 5),
    "empty captions": (opened_with(empty_caption="zeros"), 0, 5),
    "the same base again": (opened_with(), 0, 0),
    "precision": (run_with(precision="bf16"), 0, 0),
    "seed": (run_with(seed=1), 0, 0),
    "background": (pictures(background="red"), 2, 0),
    "largest ratio": (pictures(max_ratio=1.2), 2, 0),
    "resolution": (pictures(resolution=48), 8, 0),
    "an area too large to fill": (pictures(resolution=(64, 256)), 0, 0),
    "a smaller area": (pictures(resolution=(48, 64)), 0, 0),
    "a smaller area for each": (pictures(resolution=(48, 64), areas="each"), 8, 0),
    "mirrors": (pictures(flip=True), 8, 0),
    "more variants": (pictures(variants=3), 4, 0),
    "nothing varied": (lambda s: run_with(pictures=s.pictures.plain)(s), 4, 0),
    "mean latents": (pictures(latents="mean"), 0, 0),
    **{name: (augment(**{name: value}), 8, 0) for name, value in
       {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 10.0, "rotation": 5.0}.items()},
    "a name": (lambda s: [next(iter(f.glob("b.png"))).rename(f / "y.png") for f in (s.folder, s.masks, s.guides)] and
               (s.folder / "b.txt").rename(s.folder / "y.txt"), 0, 0),
}  # fmt: skip
"""As `CHANGES`, of pictures with masks and guides in two variants each."""


@pytest.mark.parametrize("what", VARIED)
def test_of_a_change_exactly_the_affected_variants_are_encoded_anew(what, setting: Setting, tmp_path: Path):
    setting.masks, setting.guides = tmp_path / "masks", tmp_path / "guides"
    for file in setting.folder.glob("*.png"):
        for folder, mode in ((setting.masks, "L"), (setting.guides, "RGB")):
            folder.mkdir(exist_ok=True)
            with Image.open(file) as picture:
                picture.convert(mode).save(folder / file.name)
    setting.model.guide = "picture"
    rotated = Augment(brightness=0.2, rotation=10)
    setting.pictures = Pictures(resolution=64, crop="random", augment=rotated, variants=2)
    change, images, texts = VARIED[what]
    prove(setting, change, (8, 5), (images, texts))


def test_random_cuts_are_encoded_where_there_is_room_for_them(setting: Setting):
    """Square pictures are cut in one way only, so they are encoded once, and not anew."""
    setting.encode()
    counter = Counter(setting.model)
    setting.pictures = Pictures(resolution=64, crop="random", variants=4)
    encoded = setting.encode()
    crops = {number: encoded.variant(1, number).crop for number in range(4)}
    assert len(set(crops.values())) > 1
    assert counter.pictures == len({*crops.values()} - {centre_crop((128, 64), encoded.sizes[1])})
    assert {encoded.latents_address(0, False, number) for number in range(4)} == {encoded.latents_address(0, False)}


def test_a_picture_is_decoded_once_for_all_that_is_made_of_it(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    loaded: list[str] = []

    def load(file: Path, background: str) -> Image.Image:
        loaded.append(file.name)
        return load_picture(file, background)

    monkeypatch.setattr("tuner.data.encode.load_picture", load)
    counter = Counter(setting.model)
    setting.pictures = Pictures(resolution=(48, 64), areas="each", flip=True, augment=Augment(hue=5), variants=3)
    setting.encode()
    assert counter.pictures == 4 * 2 * 2 * 3 and sorted(loaded) == ["a.png", "b.png", "c.png", "d.png"]


def test_the_address_of_a_picture_that_is_not_varied_has_stayed_the_same(setting: Setting):
    """Else every cache that there is would be made anew."""
    encoded = setting.encode()
    picture = hashlib.sha256((setting.folder / "b.png").read_bytes()).hexdigest()
    crop = centre_crop((128, 64), encoded.sizes[1])
    told = {"picture": picture, "bucket": encoded.sizes[1], "cut": (crop.left, crop.top), "flip": False}
    assert encoded.latents_address(1, False) == address(**told, background=None, autoencoder=encoded.autoencoder)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 5000])
def test_a_torn_entry_is_encoded_anew(damage, setting: Setting):
    encoded = setting.encode()
    whole = encoded.cache.path(encoded.latents_address(1, False)).read_bytes()
    torn = [encoded.latents_address(1, False), encoded.text_address("the a")]
    for key in torn:
        encoded.cache.path(key).write_bytes(damage)
    counter = Counter(setting.model)
    setting.encode()
    assert (counter.pictures, counter.texts) == (1, 1)
    assert encoded.cache.path(torn[0]).read_bytes() == whole


def test_a_killed_run_has_lost_no_entry_that_was_whole(setting: Setting):
    calls = iter(range(10))
    encode_images = setting.model.encode_images

    def dies(pixels: torch.Tensor) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode_images(pixels)

    setting.model.encode_images = dies
    with pytest.raises(KeyboardInterrupt):
        setting.encode()
    counter = Counter(setting.model)
    setting.encode()
    assert (counter.pictures, counter.texts) == (2, 5)


def test_the_precision_of_a_run_does_not_change_what_its_captions_mean(setting: Setting):
    """Frozen weights are cast after the cache is filled; a text encoded later must still be the same."""
    encoded = setting.encode()
    setting.model.cast_frozen(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(setting.model.encode_text(["the a"]).tokens[0], encoded.text("the a")["tokens"])
    assert encoded.text("the a")["tokens"].dtype == torch.float32


def test_all_pictures_that_cannot_be_decoded_are_named_and_the_others_are_kept(setting: Setting):
    for name in ("a.png", "c.png"):
        whole = (setting.folder / name).read_bytes()
        middle = len(whole) // 2  # a header, and an end, but damage between them
        (setting.folder / name).write_bytes(whole[:middle] + bytes(16) + whole[middle + 16 :])
    setting.pictures = replace(setting.pictures, flip=True)
    with pytest.raises(DataError) as caught:
        setting.encode()
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == [
        str(setting.folder / name) for name in ("a.png", "c.png")
    ]
    assert len(entries(setting)) == 4  # b and d, both ways


def test_latents_that_are_not_finite_are_refused_by_their_picture(setting: Setting):
    with torch.no_grad():
        setting.model.networks["vae"].get_parameter("encoder.conv_in.bias")[0] = float("nan")
    with pytest.raises(DivergedError, match=r"a.png: its latents are not finite"):
        setting.encode()
    assert entries(setting) == {}


def test_a_flipped_picture_has_the_latents_of_its_mirror(setting: Setting):
    setting.pictures = replace(setting.pictures, flip=True)
    encoded = setting.encode()
    with Image.open(setting.folder / "a.png") as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(setting.folder / "a.png")
    mirrored = setting.encode()
    for flip in (False, True):
        assert torch.equal(encoded.latents(0, flip)[0], mirrored.latents(0, not flip)[0])
    assert not torch.equal(encoded.latents(0, False)[0], encoded.latents(0, True)[0])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
