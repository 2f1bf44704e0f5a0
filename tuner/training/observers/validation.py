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
            frames=torch.tensor([crop.frame() for crop in encoded.crops]).float().to(device),
            texts=None if learns_text else [model.encode_text([caption]) for caption in captions],
        )


@dataclass(kw_only=True)
class ValidationWatcher:
    """Measures, on all processes together."""

    scene: Scene
    every: int
    levels: int
    latents: Sequence[Tensor]
    captions: Sequence[str]
    frames: Tensor
    """How each picture was cut, `[pictures, 6]`."""
    texts: Sequence[Conditioning] | None
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
        self.scene.metrics.write(
            "validation",
            trainer.samples_seen,
            loss=sum(by_level) / self.levels,
            by_time={f"{float(t):g}": loss for t, loss in zip(self._times(), by_level, strict=True)},
            pictures=len(self.latents),
        )

    def losses(self) -> Tensor:
        """The mean loss at each noise level, `[levels]`."""
        accelerator, model = self.scene.accelerator, self.scene.model
        total = torch.zeros(self.levels, dtype=torch.float64)
        times = self._times()
        for index in range(accelerator.process_index, len(self.latents), accelerator.num_processes):
            latents = self.latents[index].expand(self.levels, -1, -1, -1)
            text = None if self.texts is None else self.texts[index].each(self._at_each_level)
            batch = Batch(
                latents=latents,
                captions=[self.captions[index]] * self.levels,
                conditioning=text,
                weight=torch.ones(self.levels, device=latents.device),
                positions=[Position(SEED, level, index) for level in range(self.levels)],
                frame=self._at_each_level(self.frames[index][None]),
            )
            total += Objective().loss(model, batch, times).plain.double().cpu()
        summed = accelerator.reduce(total.to(accelerator.device, torch.float32), "sum")
        return summed.cpu() / len(self.latents)  # pyright: ignore[reportAttributeAccessIssue]

    def _at_each_level(self, part: Tensor) -> Tensor:
        return part.expand(self.levels, *part.shape[1:])

    def _times(self) -> Tensor:
        """The middles of as many equal parts of the schedule."""
        shares = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / self.levels
        return self.scene.model.schedule.time_at(shares)


SPEC: type[Observer] = Validation
