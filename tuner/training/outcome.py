"""What a complete run leaves: weights that were read back before they count, and `release.json` about them."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tuner.families.base import OpenedModel
from tuner.methods._adapter import AdapterTrainable
from tuner.methods.base import Trainable
from tuner.methods.textual_inversion import WordsTrainable
from tuner.publish.embeddings import FOLDER, file_of, write_bundle, write_words
from tuner.publish.full import write_full
from tuner.publish.provenance import (
    Picture,
    Provenance,
    public_base,
    public_settings,
    versions,
    write_provenance,
)
from tuner.publish.release import LoraFiles
from tuner.publish.trained import PEFT, write_adapter
from tuner.training.observers.base import Observer
from tuner.training.observers.previews import Previews
from tuner.training.run import Run
from tuner.training.trainer import Trainer
from tuner.weights.adapters.file import Adapters

PREDICTIONS: Mapping[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
"""What a model predicts, in headers; others follow a flow."""
AUTOENCODERS = ("vae", "vqvae")
"""What pipelines call a part of which nothing learns."""


def write_outcome(
    run: Run,
    trainer: Trainer,
    model: OpenedModel,
    *,
    images: int,
    resolution: int,
    trigger: str | None,
    observers: tuple[Observer, ...],
) -> None:
    """Write the weights that were learned (their average where there is one) and say where they are.

    Raises:
        DataError: what was read back is not what was trained; nothing was written. The checkpoint is there still.
    """
    if run.main:
        provenance = _provenance(run, trainer, model, images, resolution, trigger, observers)
        with trainer.final_weights():
            made = _write(run.config.output, provenance, model, trainer.trainable)
        write_provenance(run.config.output, provenance)
        if trainer.best_at is not None:
            made += f"; of the best measurement, at {trainer.best_at} samples"
        run.say(made)
    run.accelerator.wait_for_everyone()


def _write(output: Path, provenance: Provenance, model: OpenedModel, trainable: Trainable) -> str:
    pipeline = model.pipeline()
    parts: dict[str, Any] = pipeline.components
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name not in AUTOENCODERS}
    if isinstance(trainable, WordsTrainable):
        words = trainable.words()
        tokenizers = {name: parts[name.replace("text_encoder", "tokenizer")] for name in trainable.tables}
        made = [f"made {write_words(output / FOLDER, words, provenance, networks=networks, tokenizers=tokenizers)}"]
        if isinstance(trainable.adapter, AdapterTrainable):
            said, files = _write_adapter(output, provenance, networks, trainable.adapter)
            made += [said, f"made {write_bundle(files.kohya, words, provenance)}: that and the words in one file"]
        return "\n".join(made)
    if isinstance(trainable, AdapterTrainable):
        return _write_adapter(output, provenance, networks, trainable)[0]
    folder = write_full(output / "model", pipeline, model.folder / "tokenizer")
    return f"made {folder}: a diffusers folder, read back and compared tensor by tensor"


def _write_adapter(
    output: Path, provenance: Provenance, networks: Mapping[str, nn.Module], trainable: AdapterTrainable
) -> tuple[str, LoraFiles]:
    in_peft = trainable.in_peft()
    files = write_adapter(output / "lora", Adapters(trainable.changes()), in_peft, provenance, networks=networks)
    return f"made {files}" + (f"; and {output / 'lora' / PEFT} (peft)" if in_peft else ""), files


def _kind(trainable: Trainable) -> str:
    """What was learned, as `Provenance.method` says it."""
    if isinstance(trainable, WordsTrainable):
        return "textual_inversion" if trainable.adapter is None else _kind(trainable.adapter)
    return trainable.method.kind if isinstance(trainable, AdapterTrainable) else "full"


def _provenance(
    run: Run,
    trainer: Trainer,
    model: OpenedModel,
    images: int,
    resolution: int,
    trigger: str | None,
    observers: tuple[Observer, ...],
) -> Provenance:
    table = tomllib.loads(run.resolved)
    pipeline = model.pipeline()
    tokens = trainer.trainable.rows if isinstance(trainer.trainable, WordsTrainable) else ()
    provenance = Provenance(
        name=run.config.name,
        base=public_base(model.source),
        architecture=model.architecture,
        prediction=PREDICTIONS.get(model.prediction_type, "flow"),
        resolution=resolution,
        method=_kind(trainer.trainable),
        images=images,
        samples=trainer.samples_seen if trainer.best_at is None else trainer.best_at,
        updates=trainer.update,
        seed=run.config.seed,
        learning_rate=table["optimizer"]["lr"],
        optimizer=table["optimizer"]["type"],
        guidance=model.guidance,
        trigger=trigger,
        tokens={token: file_of(run.config.name, token) for token in tokens},
        date=datetime.now(UTC).date().isoformat(),
        zero_terminal_snr=bool(pipeline.scheduler.config.get("rescale_betas_zero_snr")),
        pipeline=type(pipeline).__name__,
        guide=model.guide,
        own_schedule=any(table["model"].get(name) is not None for name in ("prediction", "zero_terminal_snr")),
        settings=public_settings(table),
        versions=versions(),
    )
    previews = next((o for o in observers if isinstance(o, Previews)), None)
    if previews is None:
        return provenance
    folder = run.config.output / "samples" / f"samples-{trainer.samples_seen:010d}"
    prompts = [prompt for prompt in previews.prompts for _ in previews.seeds]
    files = sorted(folder.glob("*.png"))
    return replace(
        provenance,
        pictures=tuple(
            Picture(file=file.relative_to(run.config.output).as_posix(), prompt=prompt)
            for file, prompt in zip(files, prompts, strict=False)
        ),
        grid="samples/grid.png",
    )
