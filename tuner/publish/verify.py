"""Reading a LoRA file as its users will, and comparing what it changes with what was trained.

diffusers drops what it does not know with a warning, if with one at all. So the modules that it adapts are counted and
compared, not the words that it says.

diffusers is imported when a file is checked and not before. The networks are built from their configs alone, without
the base's weights: these do not matter to what is added, and so the check takes next to no memory.
"""

import copy
import io
import logging
import math
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Product
from tuner.weights.adapters.comparison import adds_nothing, distance
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.embeddings import keys
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.modules import Modules
from tuner.weights.store import SafetensorsFile, TensorMeta

TOLERANCE = 1e-3
"""Half precision rounds both matrices to 11 bits, which makes 0.0004 of a product."""

ADAPTER = "check"

Networks = Mapping[str, nn.Module]
"""Networks by diffusers' names of a pipeline's components."""


class LoraError(Exception):
    """A file does not give what was trained; the message says where."""


def modules_of(networks: Networks) -> Modules:
    """The modules of networks like these; adapters that are attached to them do not count."""
    metas: dict[str, TensorMeta] = {}
    for component, network in networks.items():
        for name, tensor in _like(network).state_dict().items():
            metas[canonical(component, name)] = TensorMeta(tuple(tensor.shape), torch.float32)
    return Modules.of_network(metas)


def in_stock(networks: Networks) -> bool:
    """Whether diffusers has a pipeline of such networks that reads LoRAs: of older ones than Stable Diffusion none."""
    return "bert" not in networks and all(type(network).__name__ != "UNet2DModel" for network in networks.values())


def check_in_diffusers(file: Path, written: Adapters, networks: Networks) -> float:
    """Load `file` into a stock pipeline of networks like these, and compare every module's change.

    Returns: the largest relative error, of Frobenius norms.

    Raises:
        LoraError: diffusers cannot read it, adapts other modules, or changes one in another way.
    """
    pipeline = _pipeline(networks)
    with listening() as heard:
        try:
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER, local_files_only=True)
        except Exception as error:
            raise LoraError(f"diffusers cannot read it: {error}") from error
    try:
        return compare(_attached(pipeline), written)
    except LoraError as error:
        raise LoraError(f"diffusers: {error}" + "".join(f"; it said: {text[:300]}" for text in heard[:3])) from error


def check_in_kohya(file: Path, written: Adapters, modules: Modules) -> float:
    """Read `file` by kohya's rules, as A1111, Forge and ComfyUI do, and compare every module's change.

    Returns: the largest relative error, of Frobenius norms.

    Raises:
        LoraError: a name that belongs to no module, or a module that is changed in another way.
    """
    try:
        return compare(read_adapters(file, modules), written)
    except (DataError, LoraError) as error:
        raise LoraError(f"kohya's names: {error}") from error


def check_words(
    files: Mapping[str, Path],
    words: Mapping[str, Mapping[str, Tensor]],
    architecture: str,
    networks: Networks,
    tokenizers: Mapping[str, Any],
) -> bool:
    """Load each word's file into a stock pipeline of networks like these, and compare the text encoders' vectors.

    Returns: whether there is such a pipeline: that of Stable Diffusion 3 reads no words.

    Args:
        files: by word.
        words: by word, and by text encoder.
        architecture: the family, which decides the names in files.
        networks: those of a pipeline.
        tokenizers: of each text encoder that has words; they are not changed.

    Raises:
        LoraError: diffusers cannot read a file, or has other vectors then.
    """
    pipeline, called = _pipeline(networks), keys(architecture)
    if not hasattr(pipeline, "load_textual_inversion"):
        return False
    for component, tokenizer in tokenizers.items():
        own, encoder = copy.deepcopy(tokenizer), getattr(pipeline, component)
        names = {token: f"{token}-again" for token in files}  # as the tokenizer knows the words already
        with listening():
            try:
                given = [  # a file of one tensor is read by itself
                    SafetensorsFile(file).read(called[component]) if len(called) > 1 else str(file)
                    for file in files.values()
                ]
                pipeline.load_textual_inversion(
                    given, token=[*names.values()], tokenizer=own, text_encoder=encoder, local_files_only=True
                )
            except Exception as error:
                raise LoraError(f"diffusers cannot read a word: {error}") from error
        table = encoder.get_input_embeddings().weight
        for token, name in names.items():
            expected = words[token][component]
            tokens = own.convert_tokens_to_ids([name, *(f"{name}_{i}" for i in range(1, len(expected)))])
            if not torch.equal(table[tokens].to(expected), expected):
                raise LoraError(f"diffusers: {token} has other vectors in {component} than were learned")
    return True


def compare(read: Adapters, written: Adapters) -> float:
    """The largest relative difference of the changes that were read from those of `written`.

    Raises:
        LoraError: other modules, another shape, or a difference above `TOLERANCE`.
    """
    silent = {name for name in set(written.changes) - set(read.changes) if adds_nothing(written.changes[name])}
    if lost := sorted(set(written.changes) - set(read.changes) - silent):
        raise LoraError(f"{lost[0]}: trained, but not in what was read ({len(lost)} of {len(written.changes)} such)")
    if extra := sorted(set(read.changes) - set(written.changes)):
        raise LoraError(f"{extra[0]}: read, but not trained ({len(extra)} such)")
    worst = 0.0
    for name, change in sorted(written.changes.items()):
        if name in silent:
            continue
        other = read.changes[name]
        if other.shape != change.shape:
            raise LoraError(f"{name}: read with shape {other.shape}, trained with {change.shape}")
        apart, size, _ = distance(change, other)
        error = apart / size if size else (math.inf if apart else 0.0)
        if not error <= TOLERANCE:
            raise LoraError(f"{name}: what was read differs from what was trained by {error:.2g} of it")
        worst = max(worst, error)
    return worst


def _pipeline(networks: Networks) -> Any:
    """A stock pipeline of networks built like these, whose weights are nowhere."""
    import inspect

    import diffusers

    kinds = {type(network).__name__ for network in networks.values()}
    name = "StableDiffusionXLPipeline" if "text_encoder_2" in networks else "StableDiffusionPipeline"
    name = "StableDiffusion3Pipeline" if "SD3Transformer2DModel" in kinds else name
    stock: Any = getattr(diffusers, "FluxPipeline" if "FluxTransformer2DModel" in kinds else name)
    parts: dict[str, Any] = {
        part: None
        for part, parameter in inspect.signature(stock).parameters.items()
        if parameter.default is inspect.Parameter.empty or part in ("safety_checker", "feature_extractor")
    }
    with listening():
        for component, network in networks.items():
            parts[component] = _like(network)
            for module in parts[component].modules():
                for own, parameter in [*module.named_parameters(recurse=False)]:
                    nothing = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)  # one number, seen often
                    setattr(module, own, nn.Parameter(nothing, requires_grad=False))
                for own, buffer in [*module.named_buffers(recurse=False)]:
                    setattr(module, own, torch.zeros(buffer.shape, dtype=buffer.dtype))
        if "requires_safety_checker" in inspect.signature(stock).parameters:
            parts["requires_safety_checker"] = False
        return stock(**parts)


def _like(network: nn.Module) -> Any:
    """A network of the same config on torch's meta device: without weights, and without adapters."""
    kind, config = (cast(Any, thing) for thing in (type(network), network.config))
    with torch.device("meta"), listening():
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _attached(pipeline: Any) -> Adapters:
    """The adapter as it lies in the pipeline's networks: peft's layers and the factor that it multiplies with."""
    changes: dict[str, Change] = {}
    for component, network in pipeline.components.items():
        for name, module in network.named_modules() if isinstance(network, nn.Module) else ():
            if ADAPTER in getattr(module, "lora_A", ()):  # peft's layer, which is not imported for its name's sake
                layer: Any = module
                down, up = (part[ADAPTER].weight.detach() for part in (layer.lora_A, layer.lora_B))
                change = LowRank(Product(up.flatten(1), down), layer.scaling[ADAPTER])
                vector = getattr(module, "lora_magnitude_vector", {})
                magnitude = vector[ADAPTER].weight.detach().flatten() if ADAPTER in vector else None
                key = f"{canonical(component, name)}.weight"
                changes[key] = change if magnitude is None else Decomposed(change, magnitude)
    return Adapters(changes)


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
