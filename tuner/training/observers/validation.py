"""Loss by noise level on fixed noise: the curve that tells whether a run learns, which the training loss does not."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.data.cache import address
from tuner.data.encode import Encoded
from tuner.data.example import Example
from tuner.data.hashes import file_hashes
from tuner.data.sources.base import AnySource, every_example
from tuner.diffusion.batch import Batch, Conditioning
from tuner.diffusion.model import DiffusionModel
from tuner.diffusion.objective import Objective
from tuner.diffusion.timesteps.base import Timesteps
from tuner.errors import CheckpointError, ConfigError
from tuner.rng import Position
from tuner.training.metrics import read_metrics
from tuner.training.observers.base import Observer, Scene
from tuner.training.trainer import StepReport, Trainer, Watcher
from tuner.training.watchers import passed
from tuner.weights.writer import save_safetensors

BEST = "best.safetensors"
"""In the run's folder: the weights of the best measurement so far."""
SEED = 1_000_003
"""Validation noise is the same in every run, whatever the run's own seed."""
CONFIDENT = NormalDist().inv_cdf(0.975)
"""Standard errors to either side of a mean within which the true one lies with 95 %."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The mean squared error of the network's output on pictures, noise and times that never change.

    The times are in the middle of equally likely parts of those that training draws. It is measured before the first
    update, every so often, and at the end, of the weights that would be published.
    """

    name: str | None = None
    """What its rows of metrics are called, `validation/name`; plainly `validation` where left out. Of several
    validations each has a name of its own."""
    every: int = 1000
    """Samples between measurements."""
    data: tuple[AnySource, ...] = ()
    """Held-out pictures; where left out, and `share` too, the training pictures serve, which shows learning but not its
    transfer."""
    share: float = 0.0
    """This share of the training pictures is held out, chosen by what they hold; copies stay on one side."""
    pictures: int = 32
    """How many of them are used, evenly spread."""
    levels: int = 8
    """At how many noise levels each is looked at."""
    patience: int | None = None
    """Stop the run after so many measurements, one after the other, that were no better than the best."""
    best: bool = False
    """Publish the weights of the best measurement, not the last ones."""

    def __post_init__(self) -> None:
        for name in ("every", "pictures", "levels", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.share < 1:
            raise ValueError(f"share must lie in [0, 1), got {self.share}")
        if self.share and self.data:
            raise ValueError("share has no effect with data, which says what is held out; give one of them")
        if self.name is not None and not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"name must be of letters, digits, _ and -, got {self.name!r}")

    @property
    def kind(self) -> str:
        """What the rows of its measurements are called."""
        return "validation" if self.name is None else f"validation/{self.name}"

    @torch.no_grad()
    def watch(self, scene: Scene) -> Watcher:
        if (self.patience or self.best) and not (self.data or self.share):
            what = "patience" if self.patience else "best"
            raise ConfigError(f"observers: validation.{what}: needs held-out pictures; give data, or share = 0.1")
        own = every_example(self.data, captioned=scene.model.captioned)
        _say_what_is_trained_on(scene, own)
        held_out = scene.held_out if self.share else own
        examples = held_out or scene.encoded.examples
        count = min(self.pictures, len(examples))
        chosen = [examples[i * len(examples) // count] for i in range(count)]
        encoded = replace(scene.encoded, examples=chosen, pictures=scene.encoded.pictures.plain)
        encoded.check_guides(scene.model.guide)  # of `data` too
        captions = [scene.captions.plain(example.caption) for example in chosen]
        if scene.accelerator.is_main_process:
            encoded.fill_latents(scene.model, encoded.missing_latents(), scene.progress)
        scene.accelerator.wait_for_everyone()
        device, model = scene.accelerator.device, scene.model
        learns_text = any(p.requires_grad for name in model.text_encoders for p in model.networks[name].parameters())
        return ValidationWatcher(
            scene=scene,
            kind=self.kind,
            every=self.every,
            levels=self.levels,
            timesteps=scene.objective.timesteps or model.timesteps,
            latents=[encoded.latents(i, flip=False)[0].to(device) for i in range(count)],
            captions=captions,
            frames=torch.tensor([crop.frame() for crop in encoded.crops]).float().to(device),
            guides=lambda index: guides_of(scene.model, encoded, index, self.levels, SEED),
            texts=None if learns_text else [model.encode_text([caption]) for caption in captions],
            sources=[example.source for example in chosen],
            buckets=[f"{width}x{height}" for width, height in encoded.sizes],
            measured=address(
                **encoded.contents(),
                latents=[encoded.latents_address(i, flip=False) for i in range(count)],
                texts=captions,
                guide=repr(encoded.pictures.guides),
                levels=self.levels,
                timesteps=repr(scene.objective.timesteps or model.timesteps),
            ),
            patience=self.patience,
            keep_best=self.best,
        )


@dataclass(kw_only=True)
class ValidationWatcher:
    """Measures, on all processes together."""

    scene: Scene
    kind: str
    """What the rows of its measurements are called."""
    every: int
    levels: int
    timesteps: Timesteps
    latents: Sequence[Tensor]
    captions: Sequence[str]
    frames: Tensor
    """How each picture was cut, `[pictures, 6]`."""
    guides: Callable[[int], Tensor | None]
    """What stands beside a picture's latents, for each noise level; None for a model that is told captions alone."""
    texts: Sequence[Conditioning] | None
    """The captions encoded; None where a text encoder learns."""
    sources: Sequence[str]
    buckets: Sequence[str]
    measured: str
    """A hash of pictures, captions and levels: losses of others say nothing about these."""
    patience: int | None = None
    keep_best: bool = False
    _measured: list[tuple[int, list[float]]] = field(default_factory=list[tuple[int, list[float]]], init=False)
    """Samples seen, and each picture's loss then."""

    def start(self, trainer: Trainer) -> None:
        """The measurement before the first update, which later ones are compared with.

        Also the first one of what the run has not measured before, and one that a kill after its checkpoint left out.
        """
        seen = trainer.samples_seen
        if seen and self.scene.metrics.file.exists():  # a run that goes on
            mine = (self.kind, self.measured)
            every = read_metrics(self.scene.metrics.file)
            rows = [row for row in every if (row["kind"], row.get("measured")) == mine]
            self._measured = [(row["samples_seen"], row["by_picture"]) for row in rows]
        there = any(at == seen for at, _ in self._measured)
        if not self._measured or (not there and passed(self.every, seen, trainer.batch_size)):
            self._measure(trainer)
        self._end_if_it_got_no_better(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if passed(self.every, report.samples_seen, trainer.batch_size):
            self._measure(trainer)

    def finish(self, trainer: Trainer) -> None:
        if trainer.complete and (not self._measured or self._measured[-1][0] != trainer.samples_seen):
            self._measure(trainer)
        if trainer.complete and self.keep_best:
            self.scene.accelerator.wait_for_everyone()
            trainer.best_at = self._best
            trainer.best = self._read_best

    @property
    def _best(self) -> int:
        """The samples seen at the lowest loss, the earliest of equals."""
        return min(self._measured, key=lambda each: sum(each[1]))[0]

    def _read_best(self) -> dict[str, Tensor]:
        file = self.scene.folder / BEST
        try:
            with safe_open(file, framework="pt") as opened:
                at = int((opened.metadata() or {})["samples_seen"])
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}); set validation.best = false, and go on"
            ) from error
        if at != self._best:
            raise CheckpointError(
                f"{file}: holds the weights at {at} samples, but those at {self._best} were the best; set "
                "validation.best = false to publish the last ones"
            )
        return weights

    def _measure(self, trainer: Trainer) -> None:
        with trainer.published_weights(), torch.no_grad(), self.scene.accelerator.autocast():
            table = self.losses()
        by_picture = table.mean(1).tolist()
        self._measured.append((trainer.samples_seen, by_picture))
        mean, margin = _mean(by_picture)
        change, change_margin = _mean([now - was for now, was in zip(by_picture, self._measured[0][1], strict=True)])
        best = self._best
        self.scene.metrics.write(
            self.kind,
            trainer.samples_seen,
            loss=mean,
            loss_95=margin,
            change=change,
            change_95=change_margin,
            change_since=self._measured[0][0],
            best_at=best,
            by_time={f"{float(t):g}": loss for t, loss in zip(self._mean_times(), table.mean(0).tolist(), strict=True)},
            by_source=_means(self.sources, by_picture),
            by_bucket=_means(self.buckets, by_picture),
            by_picture=by_picture,
            pictures=len(self.latents),
            measured=self.measured,
        )
        if self.keep_best and best == trainer.samples_seen and self.scene.accelerator.is_main_process:
            with trainer.published_weights():
                weights = {name: tensor.detach().cpu() for name, tensor in trainer.trainable.state().items()}
            save_safetensors(self.scene.folder / BEST, weights, {"samples_seen": str(trainer.samples_seen)})
        self._end_if_it_got_no_better(trainer)

    def _end_if_it_got_no_better(self, trainer: Trainer) -> None:
        since = sum(at > self._best for at, _ in self._measured)
        if self.patience is not None and since >= self.patience:
            trainer.end(
                f"the loss on held-out pictures has not fallen in the last {since} measurements; it was best at "
                f"{self._best} samples"
            )

    def losses(self) -> Tensor:
        """The loss of each picture at each noise level, `[pictures, levels]` float64."""
        accelerator, model = self.scene.accelerator, self.scene.model
        table = torch.zeros(len(self.latents), self.levels, dtype=torch.float64)
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
                image=self.guides(index),
            )
            times = self._times((latents.shape[2], latents.shape[3]))
            table[index] = Objective().loss(model, batch, times).plain.double().cpu()
        if accelerator.num_processes == 1:
            return table
        summed = accelerator.reduce(table.to(accelerator.device, torch.float32), "sum")
        return summed.cpu().double()  # pyright: ignore[reportAttributeAccessIssue]

    def _at_each_level(self, part: Tensor) -> Tensor:
        return part.expand(self.levels, *part.shape[1:])

    def _times(self, size: tuple[int, int]) -> Tensor:
        """The middles of as many equally likely parts of what training draws, for latents of `size`."""
        middles = (torch.arange(self.levels, dtype=torch.float64) + 0.5) / self.levels
        return self.scene.model.schedule.time_at(self.timesteps.quantile(middles, size))

    def _mean_times(self) -> Tensor:
        """The levels' times, each the mean over pictures: they may go by a picture's size."""
        return torch.stack([self._times((x.shape[1], x.shape[2])).double() for x in self.latents]).mean(0)


def guides_of(model: DiffusionModel, encoded: Encoded, index: int, levels: int, seed: int) -> Tensor | None:
    """What stands beside the latents of an example at each of `levels`, `[levels, C, h, w]`; None where nothing does.

    It is the same whenever it is asked, with masks that are drawn by `seed`, and never left out.
    """
    if model.guide is None:
        return None
    places = [Position(seed, level, index) for level in range(levels)]
    return model.encode_guide(torch.stack([encoded.guide(model.guide, index, False, at) for at in places]))


def _say_what_is_trained_on(scene: Scene, own: Sequence[Example]) -> None:
    """A warning where pictures of validation are among those that are learned."""
    cache = scene.encoded.cache
    of_training, of_own = (
        file_hashes([example.image for example in examples], cache.folder, cache.read_only) if own else []
        for examples in (scene.encoded.examples, own)
    )
    trained = {*of_training}
    both = [example.image for example, digest in zip(own, of_own, strict=True) if digest in trained]
    if both:
        scene.say(
            f"warning: validation: {len(both)} of its {len(own)} pictures are trained on, too, the first is {both[0]}; "
            "their loss falls whether or not anything is learned of others"
        )


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over pictures, and how far off it may be with 95 % confidence; None for a single picture."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, CONFIDENT * math.sqrt(variance / len(values))


def _means(kinds: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    members: dict[str, list[float]] = defaultdict(list)
    for kind, value in zip(kinds, values, strict=True):
        members[kind].append(value)
    return {kind: math.fsum(of) / len(of) for kind, of in sorted(members.items())}


SPEC: type[Observer] = Validation
