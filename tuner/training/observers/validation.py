"""Loss by noise level on fixed noise: the curve that tells whether a run learns, which the training loss does not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuner.data.sources.base import AnySource
from tuner.diffusion.batch import Batch, Conditioning
from tuner.diffusion.objective import Objective
from tuner.rng import Position
from tuner.training.observers.base import Observer, Scene
from tuner.training.trainer import StepReport, Trainer, Watcher
from tuner.training.watchers import passed

SEED = 1_000_003
"""Validation noise is the same in every run, whatever the run's own seed."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The mean squared error of the network's output on pictures, noise and times that never change.

    It is measured before the first update, every so often, and at the end, of the weights that would be published.
    """

    every: int = 1000
    """Samples between measurements."""
    data: tuple[AnySource, ...] = ()
    """Held-out pictures; where left out, the training pictures serve, which shows learning but not its transfer."""
    pictures: int = 32
    """How many of them are used, evenly spread."""
    levels: int = 8
    """At how many noise levels each is looked at: the middles of as many equal parts of the schedule."""

    def __post_init__(self) -> None:
        for name in ("every", "pictures", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @torch.no_grad()
    def watch(self, scene: Scene) -> Watcher:
        examples = [example for source in self.data for example in source.examples()] or scene.encoded.examples
        count = min(self.pictures, len(examples))
        chosen = [examples[i * len(examples) // count] for i in range(count)]
        encoded = replace(scene.encoded, examples=chosen, pictures=replace(scene.encoded.pictures, flip=False))
        captions = [scene.captions.plain(example.caption) for example in chosen]
        if scene.accelerator.is_main_process:
            encoded.fill_latents(scene.model, encoded.missing_latents(), scene.progress)
        scene.accelerator.wait_for_everyone()
        device, model = scene.accelerator.device, scene.model
        learns_text = any(p.requires_grad for name in model.text_encoders for p in model.networks[name].parameters())
        return ValidationWatcher(
            scene=scene,
            every=self.every,
            levels=self.levels,
            latents=[encoded.latents(i, flip=False)[0].to(device) for i in range(count)],
            captions=captions,
            tokens=None if learns_text else [model.encode_text([caption]).tokens[0] for caption in captions],
        )


@dataclass(kw_only=True)
class ValidationWatcher:
    """Measures, on all processes together."""

    scene: Scene
    every: int
    levels: int
    latents: Sequence[Tensor]
    captions: Sequence[str]
    tokens: Sequence[Tensor] | None
    """The captions encoded; None where a text encoder learns."""
    _measured_at: int = -1

    def start(self, trainer: Trainer) -> None:
        """The measurement before the first update, which later ones are compared with."""
        if trainer.samples_seen == 0:
            self._measure(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if passed(self.every, report.samples_seen, trainer.batch_size):
            self._measure(trainer)

    def finish(self, trainer: Trainer) -> None:
        if trainer.complete and self._measured_at != trainer.samples_seen:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        with trainer.published_weights(), torch.no_grad(), self.scene.accelerator.autocast():
            by_level = self.losses().tolist()
        self._measured_at = trainer.samples_seen
        steps = self.scene.model.schedule.steps
        times = [_middle(level, self.levels, steps) for level in range(self.levels)]
        self.scene.metrics.write(
            "validation",
            trainer.samples_seen,
            loss=sum(by_level) / self.levels,
            by_time={str(t): loss for t, loss in zip(times, by_level, strict=True)},
            pictures=len(self.latents),
        )

    def losses(self) -> Tensor:
        """The mean loss at each noise level, `[levels]`."""
        accelerator, model = self.scene.accelerator, self.scene.model
        total = torch.zeros(self.levels, dtype=torch.float64)
        times = torch.tensor([_middle(level, self.levels, model.schedule.steps) for level in range(self.levels)])
        for index in range(accelerator.process_index, len(self.latents), accelerator.num_processes):
            latents = self.latents[index].expand(self.levels, -1, -1, -1)
            tokens = None if self.tokens is None else self.tokens[index].expand(self.levels, -1, -1)
            batch = Batch(
                latents=latents,
                captions=[self.captions[index]] * self.levels,
                conditioning=None if tokens is None else Conditioning(tokens=tokens),
                weight=torch.ones(self.levels, device=latents.device),
                positions=[Position(SEED, level, index) for level in range(self.levels)],
            )
            total += Objective().loss(model, batch, times).plain.double().cpu()
        summed = accelerator.reduce(total.to(accelerator.device, torch.float32), "sum")
        return summed.cpu() / len(self.latents)  # pyright: ignore[reportAttributeAccessIssue]


def _middle(level: int, levels: int, steps: int) -> int:
    return (2 * level + 1) * steps // (2 * levels)


SPEC: type[Observer] = Validation
