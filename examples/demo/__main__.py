"""Teaches the embedded base model a bear that it never saw, from six pictures, and shows what changed.

    make demo

It is `tuner dreambooth` and `tuner publish` with the two configs beside this file, and then pictures and figures about
what they made. It takes a few minutes on two CPU cores; stopped and started again, it goes on. Arguments change values
of dreambooth.toml: `python -m examples.demo run.output=runs/other data.prior_weight=0.5`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from tuner.cli import recipe_module
from tuner.config.command_line import guarded
from tuner.config.loader import load
from tuner.families.base import Sampling
from tuner.publish.verify import listening
from tuner.training.metrics import read_metrics
from tuner.training.observers.previews import Previews

from .measure import drift, similarity
from .setting import HERE, begin, say
from .show import before_and_after, losses

SEEDS = range(16)
SAMPLING = Sampling(steps=20, guidance=3.0)


def main(overrides: Sequence[str]) -> None:
    """Train, publish, measure, show."""
    began = time.monotonic()
    config = begin(overrides)
    dreambooth, publish = recipe_module("dreambooth"), recipe_module("publish")
    run = config.run.output

    say(f"DreamBooth: {config.data.prompt!r} from the pictures in {config.data.subject}, {config.run.samples} samples")
    dreambooth.main(config)
    say("a release folder, with its model card")
    publish.main(load(publish.Config, HERE / "publish.toml", [f"release={run}", f"target.path={run / 'published'}"]))

    prompt = config.data.prompt
    say(f"measuring: {len(SEEDS)} pictures of {prompt!r} by the base, and by the base with the LoRA")
    subject = [Image.open(file).convert("RGB") for file in sorted(config.data.subject.glob("*.png"))]
    model = config.model.open(torch.device("cpu"))
    before = model.sample([prompt] * len(SEEDS), SEEDS, SAMPLING)
    with listening():  # it remarks that there is nothing for the text encoder
        model.pipeline().load_lora_weights(run / "lora", weight_name=f"{config.run.name}-diffusers.safetensors")
    after = model.sample([prompt] * len(SEEDS), SEEDS, SAMPLING)

    previews = next(observer for observer in config.observers if isinstance(observer, Previews))
    rows = sampled(run, previews)
    before_and_after(subject, rows).save(run / "before-and-after.png")
    metrics = read_metrics(run / "metrics.jsonl")
    losses(metrics).savefig(run / "loss.png", dpi=100)
    first, *_, last = (row["loss"] for row in metrics if row["kind"] == "validation")
    near, far = similarity(model, before, subject), similarity(model, after, subject)
    moved = {prompt: drift(model, *pictures) for prompt, pictures in rows.items()}

    print(f"""
Done in {time.monotonic() - began:.0f} seconds. What was measured:
  loss on held-out pictures of the subject, fixed noise: {first:.4f} before, {last:.4f} after
  similarity to the subject (cosine, {len(SEEDS)} seeds): {near:.2f} before, {far:.2f} after
  how far samples moved, relative: {", ".join(f"{moved[p]:.2f} {p!r}" for p in previews.prompts)}
What was made, in {run}/:
  before-and-after.png   look at this first
  loss.png               the loss over the run, and by noise level
  lora/                  {config.run.name}.safetensors for A1111, ComfyUI and Forge, and one for diffusers
  published/             both, with the model card: what `tuner publish` would send to the Hub""")


def sampled(run: Path, previews: Previews) -> dict[str, tuple[list[Image.Image], list[Image.Image]]]:
    """The run's first and last previews of each prompt."""
    folders = sorted((run / "samples").glob("samples-*"))
    first, last = (
        [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]
        for folder in (folders[0], folders[-1])
    )
    count = len(previews.seeds)
    pieces = {prompt: slice(i * count, (i + 1) * count) for i, prompt in enumerate(previews.prompts)}
    return {prompt: (first[piece], last[piece]) for prompt, piece in pieces.items()}


if __name__ == "__main__":
    raise SystemExit(guarded(lambda: main(sys.argv[1:])))
