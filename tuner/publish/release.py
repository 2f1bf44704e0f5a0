"""What a run gives to the world: a LoRA in two files that were read back before they count, and where they came from.

A finished run's output folder holds

    lora/NAME.safetensors             in kohya's names, for A1111, Forge and ComfyUI
    lora/NAME-diffusers.safetensors   in diffusers' names: pipeline.load_lora_weights(FOLDER, weight_name=…)
    lora/peft/COMPONENT/              instead of the latter, for LoHa, LoKr and (IA)³: what peft reads
    embeddings/*.safetensors          the new words, where there are any: see `tuner.publish.embeddings`
    model/                            instead of lora/ after a full fine-tune: a diffusers folder
    release.json                      a `Provenance`
    samples/*.png                     pictures that it names

and `build` makes from it a folder in which nothing lies but what is meant for everybody.
"""

import base64
import hashlib
import io
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from tuner.errors import DataError, UnsafeError
from tuner.publish import card
from tuner.publish.provenance import Provenance
from tuner.publish.verify import LoraError, Networks, check_in_diffusers, check_in_kohya, in_stock, modules_of
from tuner.weights.adapters.file import Adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.writing import in_diffusers, to_tensors
from tuner.weights.layouts.modules import Dialect
from tuner.weights.lora import LoraWeights
from tuner.weights.modelspec import MAX_THUMBNAIL, ModelSpec, public
from tuner.weights.store import SafetensorsFile
from tuner.weights.writer import (
    atomic_write_text,
    header_of,
    resource_error,
    save_safetensors,
    sync_folder,
    whole_folder,
)

RELEASED = (
    "README.md",
    "settings.toml",
    "*.safetensors",
    "embeddings/*.safetensors",
    "peft/*/adapter_config.json",
    "peft/*/adapter_model.safetensors",
    "images/*.png",
    "model_index.json",
    "scheduler/scheduler_config.json",
    *("depth_estimator/config.json", "depth_estimator/model.safetensors", "feature_extractor/preprocessor_config.json"),
    *(f"tokenizer{n}/{file}" for n in ("", "_2", "_3") for file in ("*.json", "merges.txt", "spiece.model")),
    *("tokenizer/vocab.txt", "bert/config.json", "bert/model.safetensors"),
    *(f"text_encoder{n}/{file}" for n in ("", "_2", "_3") for file in ("config.json", "model.safetensors")),
    *(
        f"{network}/{file}"
        for network in ("unet", "transformer", "vae", "vqvae")
        for file in ("config.json", "diffusion_pytorch_model.safetensors")
    ),
)
"""The only files that are ever published."""
DENOISERS = ("unet/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
"""Of a whole model's folder, the file whose header says what it is."""
CHUNK = 1 << 22
"""Bytes that are copied at a time."""
THUMBNAIL = 256
"""The longest side of the picture in a header, in pixels."""


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA as it was written."""

    kohya: Path
    diffusers: Path | None
    """None where diffusers has no words for any of it: it reads LoRA and DoRA alone, and none of a T5."""
    error: float
    """The largest relative difference between a change that was trained and the one that was read back."""
    layers: int
    """How many are changed."""
    left_out: tuple[str, ...] = ()
    """The tensors that the file for diffusers does not tell of."""
    stock: bool = True
    """Whether other programs have the network that it is for."""

    def __str__(self) -> str:
        if not self.stock:
            files = " and ".join(str(file) for file in self.all)
            return (
                f"{files}: {self.layers} layers, read back with none unmatched and a largest error of "
                f"{self.error:.1e}; no other program reads a LoRA of this family, so bake it in with tuner merge"
            )
        diffusers = f" and {self.diffusers} (diffusers)" if self.diffusers else ""
        less = f"; diffusers reads nothing of {len(self.left_out)}, such as {self.left_out[0]}" if self.left_out else ""
        return (
            f"{self.kohya} (A1111, ComfyUI, Forge){diffusers}: {self.layers} layers, read back with none unmatched and "
            f"a largest error of {self.error:.1e}{less}"
        )

    @property
    def all(self) -> tuple[Path, ...]:
        """Those that were written."""
        return (self.kohya,) if self.diffusers is None else (self.kohya, self.diffusers)


def write_lora(
    folder: Path,
    lora: LoraWeights | Adapters,
    provenance: Provenance,
    *,
    networks: Networks,
    dtype: torch.dtype = torch.float16,
) -> LoraFiles:
    """Write a LoRA for everybody: `NAME.safetensors` (kohya) and `NAME-diffusers.safetensors`.

    Each is read back and must change the same modules in the same way before it appears under its name: kohya's by its
    rules, and by a stock diffusers pipeline as far as that reads such files, diffusers' by a stock pipeline.

    Args:
        folder: where the files go; made if it is not there.
        lora: what was trained; adapters of other kinds than LoRA go into kohya's file alone.
        networks: those that were trained, by the names of a pipeline's components, and the others of it. Only their
            `config` is used, so adapters may be attached.
        dtype: of the values in the files.

    Raises:
        DivergedError: a value is not finite.
        DataError: what was read back is not what was trained; nothing was written.
        ResourceError: the disk is full.
    """
    first, second = f"{provenance.name}.safetensors", f"{provenance.name}-diffusers.safetensors"
    modules = modules_of(networks)
    trained = Adapters.of_lora(lora) if isinstance(lora, LoraWeights) else lora
    balanced = Adapters.of_lora(lora.balanced()) if isinstance(lora, LoraWeights) else lora
    alike = Adapters.of_lora(lora.balanced().with_one_alpha()) if isinstance(lora, LoraWeights) else lora
    left_out = tuple(name for name, change in trained.changes.items() if not in_diffusers(name, change))
    plain = not left_out and all(
        isinstance(change, LowRank) and ".text_projection." not in name  # of which diffusers does not look up the rank
        for name, change in trained.changes.items()
    )
    told = {name: change for name, change in balanced.changes.items() if name not in left_out}
    contents: list[tuple[str, Adapters, Dialect]] = [(first, alike, "kohya")]
    if told:
        contents.append((second, replace(balanced, changes=told), "diffusers"))
    errors: list[float] = []
    stock = in_stock(networks)
    with apart(folder) as aside:
        for name, stored, dialect in contents:
            tensors = to_tensors(stored, dialect, modules, dtype)
            texts = provenance.spec().texts(stored.changes.values(), tensors, dialect)
            save_safetensors(aside / name, tensors, texts)
            expected = replace(trained, changes={key: trained.changes[key] for key in stored.changes})
            try:
                if dialect == "kohya" or not stock:
                    errors.append(check_in_kohya(aside / name, expected, modules))
                if stock and (dialect == "diffusers" or (plain and "unet" in networks)):
                    errors.append(check_in_diffusers(aside / name, expected, networks))
            except LoraError as error:
                raise DataError(f"{folder / name}: {error}; not written, please report it") from error
        (folder / second).unlink(missing_ok=True)  # an older one, where there is none now
        for name, _, _ in contents:
            (aside / name).replace(folder / name)
        sync_folder(folder)
    diffusers = folder / second if told else None
    return LoraFiles(folder / first, diffusers, max(errors), len(trained.changes), left_out, stock)


def build(run: Path, folder: Path, provenance: Provenance, thumbnail: bool = True) -> list[Path]:
    """Make the folder that is published from the output folder `run`; an older one in its place is replaced.

    Weights are copied tensor by tensor, with the metadata that `provenance` gives; pictures are drawn anew, so that
    nothing is in them but the picture; with `thumbnail` the first of them, small, is in the header, too.

    Returns: the files, relative to `folder`.

    Raises:
        DataError: a file is missing or damaged.
        UnsafeError: a file is a symbolic link, or lies outside of `run`.
    """
    spec = provenance.spec()
    if thumbnail and provenance.pictures:
        spec = replace(spec, thumbnail=_thumbnail(_picture(run, provenance.pictures[0].file)))
    with whole_folder(folder) as aside:
        if (run / "model" / "model_index.json").is_file():
            for path in _files(run / "model"):
                if _released(path):
                    (aside / path).parent.mkdir(exist_ok=True)
                    if path.as_posix() in DENOISERS:
                        _copy_network(run / "model" / path, aside / path, spec)
                    else:
                        shutil.copyfile(run / "model" / path, aside / path)
        elif provenance.method != "textual_inversion":
            _copy_weights(run / "lora" / f"{provenance.name}.safetensors", aside, spec)
            for more in ("diffusers", "bundle"):  # of which the first is not where it has no words for it
                if (run / "lora" / f"{provenance.name}-{more}.safetensors").exists():
                    _copy_weights(run / "lora" / f"{provenance.name}-{more}.safetensors", aside, spec)
            if (run / "lora" / "peft").is_dir():
                for path in _files(run / "lora" / "peft"):
                    if _released(PurePosixPath("peft") / path):
                        (aside / "peft" / path).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(run / "lora" / "peft" / path, aside / "peft" / path)
        for name in provenance.tokens.values():
            (aside / "embeddings").mkdir(exist_ok=True)
            _copy_weights(run / "embeddings" / name, aside / "embeddings", spec, negative=provenance.negative)
        (aside / "images").mkdir()
        pictures = tuple(
            replace(picture, file=_copy_picture(run, picture.file, aside, f"images/{number}.png"))
            for number, picture in enumerate(provenance.pictures)
        )
        grid = provenance.grid and _copy_picture(run, provenance.grid, aside, "images/grid.png")
        settings = "".join(f"{key} = {_toml(value)}\n" for key, value in provenance.settings.items())
        atomic_write_text(aside / "settings.toml", settings)
        shown = replace(provenance, pictures=pictures, grid=grid)
        atomic_write_text(aside / "README.md", card.write(shown))
    return release_files(folder)


def release_files(folder: Path) -> list[Path]:
    """What of a release folder is published, relative to it and sorted.

    Raises:
        UnsafeError: something in it is a symbolic link.
        DataError: it has no card.
    """
    files = [path for path in _files(folder) if _released(path)]
    if PurePosixPath("README.md") not in files:
        raise DataError(f"{folder}: no README.md; give a folder that tuner publish made")
    return [Path(path) for path in files]


def _files(folder: Path) -> list[PurePosixPath]:
    """All files under `folder`, relative and sorted; a link is refused, wherever it leads."""
    found: list[PurePosixPath] = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UnsafeError(f"{path}: a symbolic link, which could publish something else; remove it")
        if path.is_file():
            found.append(PurePosixPath(path.relative_to(folder).as_posix()))
    return found


def _released(path: PurePosixPath) -> bool:
    """Whether `path`, relative to a release folder, may be published."""
    patterns = [PurePosixPath(pattern) for pattern in RELEASED]
    return not path.name.startswith(".") and any(
        len(path.parts) == len(pattern.parts) and path.match(str(pattern)) for pattern in patterns
    )


def _inside(run: Path, name: str) -> Path:
    """The file that `name` says, in the folder `run`."""
    path = run / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnsafeError(f"{run / 'release.json'}: {name!r} is outside of the run's folder; remove it there")
    for part in (path, *path.parents):
        if part == run:
            break
        if part.is_symlink():
            raise UnsafeError(f"{part}: a symbolic link, which could publish something else; remove it")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the output folder of a finished run")
    return path


def _copy_weights(source: Path, aside: Path, spec: ModelSpec, negative: bool = False) -> None:
    """The same tensors, with the header that is meant for everybody."""
    file = SafetensorsFile(_inside(source.parent.parent, f"{source.parent.name}/{source.name}"))
    tensors = {name: file.read(name) for name in file.metas}
    now = {**spec.said(), "modelspec.is_negative_embedding": "true" if negative else ""}
    metadata = {key: value for key, value in {**file.metadata, **now}.items() if value}
    save_safetensors(aside / source.name, tensors, public(metadata))


def _copy_network(source: Path, target: Path, spec: ModelSpec) -> None:
    """The same values, however many, behind the header that is meant for everybody."""
    file = SafetensorsFile(source)
    values = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        read.seek(file.header.data_start)
        while part := read.read(CHUNK):
            values.update(part)
        read.seek(file.header.data_start)
        write.write(header_of(file.header, spec.of_network(values.hexdigest())))
        shutil.copyfileobj(read, write, CHUNK)


def _copy_picture(run: Path, name: str, aside: Path, place: str) -> str:
    """Draw the picture again as `place`, without the texts and the camera data that a file can hold."""
    _picture(run, name).save(aside / place, format="PNG")
    return place


def _picture(run: Path, name: str) -> Image.Image:
    """The pixels of a picture of the run."""
    path = _inside(run, name)
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no PNG picture: {error}; make it again") from error
    clean = Image.new("RGB", pixels.size)
    clean.paste(pixels)
    return clean


def _thumbnail(picture: Image.Image) -> str:
    """The picture as a URL that holds it, small enough for a header."""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    for quality in (85, 70, 50, 30, 10):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality, optimize=True)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(url) <= MAX_THUMBNAIL:
            return url
    return ""


def _toml(value: bool | int | float | str) -> str:
    return json.dumps(value)


@contextmanager
def apart(folder: Path) -> Generator[Path]:
    """A new folder inside of `folder` that is gone in the end."""
    aside = folder / f".tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise resource_error(folder, error) from error
