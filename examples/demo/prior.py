"""What prior preservation is worth: how far the class is changed with it, and without.

    python -m examples.demo.prior

It goes on from what `make demo` made, or makes it, and then trains once more without class pictures, showing the
subject as often. Arguments change values of dreambooth.toml; this takes half the time:

    python -m examples.demo.prior run.output=runs/short run.samples=500
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tuner.cli import recipe_module
from tuner.config.command_line import guarded
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.sources.folder import find_pictures
from tuner.errors import ConfigError
from tuner.publish.verify import listening
from tuner.training.metrics import read_metrics
from tuner.training.observers.validation import Validation

from .measure import predictions
from .setting import begin, say


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a run has changed."""

    run: Path
    drift: float
    """The mean squared change of the network's output at the class prompt, on class pictures under fixed noise."""
    loss: tuple[float, float]
    """On held-out pictures of the subject, under fixed noise: before the first update, and after the last."""


def compare(config: Any) -> tuple[Learned, Learned]:
    """Train as `config` says and without its class pictures, and measure both.

    Raises:
        ConfigError: it has none.
    """
    if config.data.class_folder is None:
        raise ConfigError("data.class_folder: left out; prior preservation needs one, and a class_prompt")
    dreambooth = recipe_module("dreambooth")
    say(f"with prior preservation: {config.data.prompt!r} and {config.data.class_prompt!r}")
    dreambooth.main(config)
    alone = without_class_pictures(config)
    say(f"without: {config.data.prompt!r} alone, {alone.run.samples} samples")
    dreambooth.main(alone)

    say(f"measuring: what has become of {config.data.class_prompt!r}")
    model = config.model.open(torch.device("cpu"))
    pictures = [Image.open(file).convert("RGB") for file in find_pictures(config.data.class_folder)]
    before = predictions(model, config.data.class_prompt, pictures)

    def learned(run: Path) -> Learned:
        with listening():  # it remarks that there is nothing for the text encoder
            model.pipeline().load_lora_weights(run / "lora", weight_name=f"{config.run.name}-diffusers.safetensors")
        after = predictions(model, config.data.class_prompt, pictures)
        model.pipeline().unload_lora_weights()
        losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "validation"]
        return Learned(run=run, drift=float((after - before).square().mean()), loss=(losses[0], losses[-1]))

    return learned(config.run.output), learned(alone.run.output)


def without_class_pictures(config: Any) -> Any:
    """The same run without class pictures, into a folder beside it, until it has shown the subject as often."""
    examples = config.data.examples()
    an_epoch = sum(example.repeats for example in examples)
    subject = sum(example.repeats for example in examples if example.source == "subject")
    output = config.run.output.with_name(f"{config.run.output.name}-without-class")
    samples = round(config.run.total_samples(an_epoch) * subject / an_epoch)
    return replace(
        config,
        run=replace(config.run, output=output, samples=samples, epochs=None, updates=None),
        data=Dreambooth(subject=config.data.subject, prompt=config.data.prompt),
        observers=tuple(observer for observer in config.observers if isinstance(observer, Validation)),
    )


def report(config: Any, kept: Learned, alone: Learned) -> str:
    """Both, side by side."""
    share = kept.drift / alone.drift
    first, last, other = kept.loss[0], kept.loss[1], alone.loss[1]
    return f"""
What was measured, with pictures of {config.data.class_prompt!r} in the training, and without:
  how far {config.data.class_prompt!r} moved: {kept.drift:.4f} with, {alone.drift:.4f} without; {share:.0%} of that
    (mean squared change of the network's output at this prompt, on class pictures under fixed noise)
  loss on held-out pictures of the subject, {first:.4f} before: {last:.4f} with, {other:.4f} without"""


def main(overrides: Sequence[str]) -> None:
    """Train both, measure, print."""
    config = begin(overrides)
    print(report(config, *compare(config)))


if __name__ == "__main__":
    raise SystemExit(guarded(lambda: main(sys.argv[1:])))
