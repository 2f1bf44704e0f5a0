"""How far the model has gone from its base where it was not asked to: on prompts that have nothing to do with the data.

Nothing is sampled: the base's output for fixed noise, times and prompts is kept, and the tuned model's is compared with
it. 0 is a model that says there what the base says; where it grows, what the base knew is being overwritten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.data.cache import address
from tuner.diffusion.batch import Conditioning
from tuner.errors import CheckpointError
from tuner.rng import Position
from tuner.training.metrics import read_metrics
from tuner.training.observers.base import Observer, Scene
from tuner.training.observers.validation import guides_of
from tuner.training.trainer import StepReport, Trainer, Watcher
from tuner.training.watchers import passed
from tuner.weights.writer import save_safetensors

SEED = 2_000_003
"""The noise is the same in every run, whatever the run's own seed."""
KIND = "forgetting"
"""What the rows of its measurements are called."""
BASE = "forgetting.safetensors"
"""In the run's folder: what the base said."""
PROMPTS = (
    "a photo of a person in a street",
    "a dog running on a beach",
    "a wooden chair in a bright room",
    "a mountain lake at sunset",
    "an oil painting of a sailing ship",
    "a plate of fruit, studio light",
    "a red car parked in front of a house",
    "a pencil drawing of a tree",
)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The mean squared difference between tuned and base output, over that of the base's output itself."""

    every: int = 1000
    """Samples between measurements."""
    prompts: tuple[str, ...] = PROMPTS
    """What the model is asked for; words that it is being taught do not belong here."""
    levels: int = 4
    """At how many noise levels each prompt is looked at: the middles of equally likely parts of what training draws."""

    def __post_init__(self) -> None:
        for name in ("every", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.prompts:
            raise ValueError("prompts must not be empty")

    @torch.no_grad()
    def watch(self, scene: Scene) -> Watcher:
        device, model = scene.accelerator.device, scene.model
        learns_text = any(p.requires_grad for name in model.text_encoders for p in model.networks[name].parameters())
        examples = scene.encoded.examples
        chosen = [examples[i * len(examples) // len(self.prompts)] for i in range(len(self.prompts))]
        encoded = replace(scene.encoded, examples=chosen, pictures=scene.encoded.pictures.plain)
        if scene.accelerator.is_main_process:
            encoded.fill_latents(model, encoded.missing_latents(), scene.progress)
        scene.accelerator.wait_for_everyone()
        return ForgettingWatcher(
            scene=scene,
            every=self.every,
            levels=self.levels,
            prompts=self.prompts,
            latents=[encoded.latents(i, flip=False)[0].to(device) for i in range(len(chosen))],
            frames=torch.tensor([crop.frame() for crop in encoded.crops]).float().to(device),
            guides=lambda index: guides_of(model, encoded, index, self.levels, SEED),
            measured=address(
                **({} if model.guide is None else {"guides": encoded.contents()["the guides"]}),
                **({} if model.guide is None else {"drawn": repr(encoded.pictures.guides)}),
                prompts=self.prompts,
                latents=[encoded.latents_address(i, flip=False) for i in range(len(chosen))],
                levels=self.levels,
                timesteps=repr(scene.objective.timesteps or model.timesteps),
            ),
            texts=None if learns_text else [model.encode_text([prompt]) for prompt in self.prompts],
        )


@dataclass(kw_only=True)
class ForgettingWatcher:
    """Measures, on the main process."""

    scene: Scene
    every: int
    levels: int
    prompts: Sequence[str]
    latents: Sequence[Tensor]
    """Of the run's pictures: what the noise is put over."""
    frames: Tensor
    guides: Callable[[int], Tensor | None]
    """What stands beside their latents, for each noise level; None for a model that is told captions alone."""
    measured: str
    """A hash of prompts, pictures and levels: what the base said to others is nothing to compare with."""
    texts: Sequence[Conditioning] | None
    """The prompts encoded; None where a text encoder learns."""
    _base: list[Tensor] = field(default_factory=list[Tensor], init=False)
    _measured_at: int = field(default=0, init=False)
    """The samples seen at the last measurement; at 0 the base is compared with itself."""

    def start(self, trainer: Trainer) -> None:
        """Take down what the base says; where the run goes on, read it, and make up for what a kill has left out."""
        file = self.scene.folder / BASE
        if trainer.samples_seen == 0:
            with torch.no_grad(), self.scene.accelerator.autocast():
                self._base = self.outputs()
            if self.scene.accelerator.is_main_process:
                outputs = {str(i): output.cpu() for i, output in enumerate(self._base)}
                save_safetensors(file, outputs, {"measured": self.measured})
            return
        try:
            with safe_open(file, framework="pt") as opened:
                measured = (opened.metadata() or {}).get("measured")
                kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            self._base = [kept[str(i)].to(self.latents[i].device) for i in range(len(self.prompts))]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{file}: what the base said before the run began cannot be read ({error}); leave the observer "
                "'forgetting' out, or choose another run.output"
            ) from error
        if measured != self.measured:
            raise CheckpointError(
                f"{file}: what the base said before the run began was said to other prompts, pictures or levels; "
                "give the observer 'forgetting' those it had, leave it out, or choose another run.output"
            )
        if self.scene.metrics.file.exists():
            rows = [row for row in read_metrics(self.scene.metrics.file) if row["kind"] == KIND]
            self._measured_at = max((row["samples_seen"] for row in rows), default=0)
        if passed(self.every, trainer.samples_seen, trainer.batch_size):
            self._measure(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if passed(self.every, report.samples_seen, trainer.batch_size):
            self._measure(trainer)

    def finish(self, trainer: Trainer) -> None:
        """The measurement at the end, wherever it is: what ends a run may not be known when its last update is."""
        if trainer.complete:
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        """Once at each place."""
        if self._measured_at == trainer.samples_seen:
            return
        self._measured_at = trainer.samples_seen
        with trainer.published_weights(), torch.no_grad(), self.scene.accelerator.autocast():
            now = self.outputs()
        moved = [float((a - b).square().mean()) for a, b in zip(now, self._base, strict=True)]
        said = [float(b.square().mean()) for b in self._base]
        self.scene.metrics.write(
            KIND,
            trainer.samples_seen,
            distance=sum(moved) / sum(said),
            by_prompt={p: a / b for p, a, b in zip(self.prompts, moved, said, strict=True)},
        )

    def outputs(self) -> list[Tensor]:
        """The network's output for each prompt at each noise level, `[levels, C, h, w]` float32 each."""
        model = self.scene.model
        timesteps = self.scene.objective.timesteps or model.timesteps
        found: list[Tensor] = []
        for index, x_0 in enumerate(self.latents):
            middles = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / self.levels
            times = model.schedule.time_at(timesteps.quantile(middles, (x_0.shape[1], x_0.shape[2]))).to(x_0.device)
            alpha, sigma = (part[:, None, None, None] for part in model.schedule.alpha_sigma(times))
            noise = torch.stack(
                [
                    torch.randn(x_0.shape, generator=Position(SEED, level, index).generator("noise"))
                    for level in range(self.levels)
                ]
            ).to(x_0.device)
            text = model.encode_text([self.prompts[index]]) if self.texts is None else self.texts[index]
            text = replace(text, frame=self.frames[index][None]).each(self._at_each_level)
            text = replace(text, image=self.guides(index))
            found.append(model.denoise(alpha * x_0 + sigma * noise, times, text).float())
        return found

    def _at_each_level(self, part: Tensor) -> Tensor:
        return part.expand(self.levels, *part.shape[1:])


SPEC: type[Observer] = Forgetting
