"""Reading a LoRA file as its users will, and comparing what it changes with what was trained.

diffusers drops what it does not know with a warning, if with one at all. So the modules that it adapts are counted and
compared, not the words that it says.

diffusers is imported when a file is checked and not before. The networks are built from their configs alone, without
the base's weights: these do not matter to what is added, and so the check takes next to no memory.
"""

import io
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.weights.layouts import kohya
from tuner.weights.lora import A, B, LoraWeights
from tuner.weights.store import SafetensorsFile

TOLERANCE = 1e-3
"""Half precision rounds both matrices to 11 bits, which makes 0.0004 of a product."""

ADAPTER = "check"


class LoraError(Exception):
    """A file does not give what was trained; the message says where."""


def check_in_diffusers(file: Path, lora: LoraWeights, unet: nn.Module, text_encoder: nn.Module) -> float:
    """Load `file` into a stock pipeline of networks like `unet` and `text_encoder`, and compare every module's change.

    Returns: the largest relative error, of Frobenius norms.

    Raises:
        LoraError: diffusers cannot read it, adapts other modules, or changes one in another way.
    """
    pipeline = _pipeline(unet, text_encoder)
    with listening() as heard:
        try:
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER, local_files_only=True)
        except Exception as error:
            raise LoraError(f"diffusers cannot read it: {error}") from error
    try:
        return compare(_attached(pipeline), lora)
    except LoraError as error:
        raise LoraError(f"diffusers: {error}" + "".join(f"; it said: {text[:300]}" for text in heard[:3])) from error


def check_in_kohya(file: Path, lora: LoraWeights, unet: nn.Module, text_encoder: nn.Module) -> float:
    """Read `file` by kohya's rules, as A1111, Forge and ComfyUI do, and compare every module's change.

    Returns: the largest relative error, of Frobenius norms.

    Raises:
        LoraError: a name that belongs to no module, or a module that is changed in another way.
    """
    pipeline = _pipeline(unet, text_encoder)
    modules = [
        prefix + name
        for prefix, network in (("unet.", pipeline.unet), ("text_encoder.", pipeline.text_encoder))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    store = SafetensorsFile(file)
    try:
        read = kohya.restore({name: store.read(name) for name in store.metas}, map(canonical_text_name, modules))
        return compare(read, lora)
    except (DataError, LoraError) as error:
        raise LoraError(f"kohya's names: {error}") from error


def compare(read: LoraWeights, lora: LoraWeights) -> float:
    """The largest relative difference of the changes that were read from those of `lora`.

    Raises:
        LoraError: other modules, another shape, or a difference above `TOLERANCE`.
    """
    if lost := sorted(set(lora.modules) - set(read.modules)):
        raise LoraError(f"{lost[0]}: trained, but not in what was read ({len(lost)} of {len(lora.modules)} such)")
    if extra := sorted(set(read.modules) - set(lora.modules)):
        raise LoraError(f"{extra[0]}: read, but not trained ({len(extra)} such)")
    worst = 0.0
    for module in lora.modules:
        if read.shape(module) != lora.shape(module):
            raise LoraError(f"{module}: read with shape {read.shape(module)}, trained with {lora.shape(module)}")
        error = lora.distance(read, module)
        if not error <= TOLERANCE:
            raise LoraError(f"{module}: what was read differs from what was trained by {error:.2g} of it")
        worst = max(worst, error)
    return worst


def canonical_text_name(name: str) -> str:
    """A text encoder's module with the `text_model.` that transformers 5 leaves out; others as they are."""
    prefix, full = "text_encoder.", "text_encoder.text_model."
    return name.replace(prefix, full, 1) if name.startswith(prefix) and not name.startswith(full) else name


def _pipeline(unet: nn.Module, text_encoder: nn.Module) -> Any:
    """A stock pipeline of networks built like these, whose weights are whatever is in memory."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    stock, unets, encoders = cast(tuple[Any, Any, Any], (StableDiffusionPipeline, type(unet), type(text_encoder)))
    absent = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    with listening():
        with torch.device("meta"):
            networks = {"unet": unets.from_config(unet.config), "text_encoder": encoders(text_encoder.config)}
        networks = {name: network.to_empty(device="cpu") for name, network in networks.items()}
        return stock(**networks, **absent, requires_safety_checker=False)


def _attached(pipeline: Any) -> LoraWeights:
    """The adapter as it lies in the pipeline's networks: peft's two layers and the factor that it multiplies with."""
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for prefix in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, prefix).named_modules():
            if ADAPTER in getattr(module, "lora_A", ()):  # peft's layer, which is not imported for its name's sake
                module_name = canonical_text_name(f"{prefix}.{name}")
                tensors[module_name + A] = module.lora_A[ADAPTER].weight.detach()
                tensors[module_name + B] = module.lora_B[ADAPTER].weight.detach()
                alphas[module_name] = module.scaling[ADAPTER] * module.r[ADAPTER]
    return LoraWeights(tensors, alphas)


@contextmanager
def listening() -> Generator[list[str]]:
    """What the libraries log at warning level and above, collected and kept off the screen."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [Listener(logging.WARNING)], False
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(io.StringIO()):  # the latter for bars
            warnings.simplefilter("always")
            yield heard
        heard.extend(str(warning.message) for warning in caught)
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
