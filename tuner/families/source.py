"""The base model of a run: where it comes from, and how it is opened."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

import tuner
from tuner.errors import ConfigError, DataError, UserError
from tuner.families.base import Attention, Family, OpenedModel
from tuner.families.detect import detect
from tuner.plugins import Folder
from tuner.weights.single_file import SingleFile, default_folder
from tuner.weights.store import check_model_folder

EMBEDDED = Path(tuner.__file__).parent / "base"
"""Each folder in it with a `model_index.json` is a base model known by the folder's name."""
WEIGHTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae", "vqvae", "bert")
DOWNLOADED = (
    *("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"),  # of a base that lies flat
    *("model_index.json", "scheduler/*", "tokenizer*/*", *(f"{part}/*.json" for part in WEIGHTS)),
    *("depth_estimator/*.json", "depth_estimator/*.safetensors", "feature_extractor/*.json"),  # of a base for depth
)
OF_FAMILIES = (
    "clip_skip",
    "chunks",
    "empty_caption",
    "prediction",
    "zero_terminal_snr",
    "precision",
    "quantize",
    "t5_length",
    "guidance",
    "classes",
    "null_class",
)
"""The options that only some families have."""


class NotHere(DataError):
    """The base would have to be fetched or made first, which was not to be done; the message says what a run does."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The checkpoint a run starts from."""

    base: str
    """An embedded base by name (`pocket`), a diffusers folder, a single file (.safetensors or .ckpt), or a Hugging Face
    hub id."""
    add: tuple[Path, ...] = ()
    """With a single file: files of what it lacks, such as Flux' text encoders and autoencoder."""
    config: str | None = None
    """With a single file: whose configs and tokenizers it gets, a released model's name as `tuner convert --config`
    takes it, or a folder. Where left out, those of the released model that it has the tensors of."""
    revision: str | None = None
    """Of a hub id: a branch, tag or commit."""
    attention: Attention = "auto"
    """How attention is computed: by torch's fused kernels, or in plain matrix products, which train faster on CPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """Stable Diffusion 3 and Flux: what all but the autoencoder is opened in; where left out `auto`, as its files are.
    Others are opened in fp32. What learns is fp32 in any case."""
    quantize: Literal["nf4", "int8"] | None = None
    """Stable Diffusion 3 and Flux: keep the denoiser's blocks in 4 or 8 bits, beside which a LoRA learns (QLoRA,
    Dettmers et al. 2023, arXiv:2305.14314)."""
    t5_length: int | None = None
    """Stable Diffusion 3 and Flux: how many tokens T5 gives, at most 512; where left out 256, and 512 for Flux.1 dev.
    """
    guidance: float | None = None
    """Flux.1 dev: the guidance that the denoiser is told while it learns; 1 where left out. Pictures are made with that
    of their own `sampling`."""
    clip_skip: int | None = None
    """Stable Diffusion 1, 2 and XL: how many more of the text encoders' last layers are left out than the base leaves
    out; 0 where left out. It is diffusers' number; kohya's and A1111's is one more (1 is nothing left out)."""
    chunks: int | None = None
    """Stable Diffusion 1, 2 and XL: how many chunks of 75 tokens a caption may have; 1 where left out. Each goes
    through the text encoders by itself; what is longer is cut off."""
    empty_caption: Literal["encode", "zeros"] | None = None
    """Stable Diffusion 1, 2 and XL: what an empty caption, such as one dropped out, and an empty negative prompt are
    told as: the text encoders' output, as A1111 and ComfyUI do, or zeros, as diffusers does for XL. Where left out, as
    the base's `force_zeros_for_empty_prompt` says."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """Stable Diffusion 1, 2 and XL: what the network is trained to predict, where not what the base predicts."""
    zero_terminal_snr: bool | None = None
    """Stable Diffusion 1, 2 and XL: whether the last time is nothing but noise (Lin et al. 2023, arXiv:2305.08891),
    where that is to be otherwise than in the base; it needs v-prediction."""
    classes: tuple[str, ...] | None = None
    """Models without text that are told a class: what the classes are called, in the order of their numbers, so that a
    caption may be a name; it may be a number in any case."""
    null_class: int | None = None
    """Models without text that are told a class: the class that stands for none, which an empty caption is told as, and
    guidance leads away from."""

    def open(
        self, device: torch.device, cache: Path | None = None, say: Callable[[str], object] = print
    ) -> OpenedModel:
        """Load it, to be used on `device`.

        Args:
            device: where its networks go.
            cache: where the folder is kept that a single file becomes; the user's own where None.
            say: told what there is to know of a single file.

        Raises:
            UserError: it is not there, not whole, or of no supported family; the message says what was looked for.
        """
        folder = self.locate(cache=cache, say=say)
        check_model_folder(folder, WEIGHTS)
        model = self._family(detect(folder)).open(folder, self.base, device=device, attention=self.attention)
        if self.gradient_checkpointing:
            model.checkpoint_gradients()
        return model

    def _family(self, name: str) -> Family:
        """What opens a base of the family `name`, with the options that are its own."""
        kind = Folder("tuner.families").find(name)
        given = {option: getattr(self, option) for option in OF_FAMILIES if getattr(self, option) is not None}
        if foreign := sorted(given.keys() - {field.name for field in fields(kind)}):
            raise ConfigError(f"model.{foreign[0]}: {self.base!r} is of the family {name}, without it; leave it out")
        try:
            return kind(**given)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error

    def locate(self, download: bool = True, cache: Path | None = None, say: Callable[[str], object] = print) -> Path:
        """The diffusers folder: fetched from the hub or made of a single file where it has to be, if `download`.

        Raises:
            NotHere: without `download`, where the hub may have it, or a single file is still to be made into a folder.
            DataError: it is nowhere, or a single file is no whole base.
        """
        found = Path(self.base).expanduser()
        file = self.base not in embedded() and bool(self.base) and found.exists() and not found.is_dir()
        if not file and (given := [name for name in ("add", "config") if getattr(self, name)]):
            raise ConfigError(f"model.{given[0]}: {self.base!r} is no single file; leave it out")
        if self.base in embedded():
            return EMBEDDED / self.base
        if self.base and found.is_dir():
            return found
        if file:
            return self._made(found, download, cache or default_folder(), say)
        if self.base.count("/") != 1 or self.base.startswith((".", "~", "/")):  # it can be no hub id
            raise DataError(
                f"model.base: {self.base!r} is no folder, and none of the embedded bases {embedded()}; "
                "give one of them, a diffusers folder, a checkpoint's file, or a hub id such as 'owner/name'"
            )
        return self._snapshot(download)

    def _made(self, file: Path, make: bool, cache: Path, say: Callable[[str], object]) -> Path:
        """The folder that a single file becomes."""
        source = SingleFile(file, tuple(path.expanduser() for path in self.add), self.config)
        try:
            if make:
                return source.folder(cache, lambda line: say(f"model.base: {_in_a_config(line)}"))
            if (folder := source.kept(cache)) is not None:
                return folder
            source.check()
        except UserError as error:
            raise type(error)(f"model.base: {_in_a_config(str(error))}") from error
        raise NotHere(f"model.base: {self.base!r} is a single file; a run makes it into a folder in {cache}, once")

    def _snapshot(self, download: bool) -> Path:
        import huggingface_hub  # here: most runs need no hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    self.base,
                    revision=self.revision,
                    local_files_only=offline or not download,
                    allow_patterns=[*DOWNLOADED, *(f"{part}/*.safetensors" for part in WEIGHTS)],
                    ignore_patterns=["*.fp16.safetensors", "*.non_ema.safetensors", "*.fp16-*.safetensors"],
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            if not download and not offline:
                raise NotHere(
                    f"model.base: {self.base!r} is no folder here, nor a model in the hub's local cache; a run looks "
                    "for it on the hub"
                ) from error
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"model.base: {self.base!r} is no folder here and could not be had from the hub"
                f"{' (offline)' if offline else ''}: {reason}; give a diffusers folder, or download it first"
            ) from error
        return folder


def _in_a_config(text: str) -> str:
    """What `tuner convert` says of its options, as this config calls them."""
    return text.replace("--config", "model.config").replace("--add", "model.add")


def embedded() -> list[str]:
    """The names of the base models that come with the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/model_index.json"))
