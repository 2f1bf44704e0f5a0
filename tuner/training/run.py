"""A run: its processes, its output folder, its data, and how it begins, goes on and ends."""

import json
import math
import os
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from tuner.config.writer import to_toml
from tuner.data.broken import find_broken
from tuner.data.buckets import Buckets, default_step, in_each_area
from tuner.data.cache import Cache, address, default_folder
from tuner.data.captions import Captions
from tuner.data.encode import Encoded
from tuner.data.example import Example
from tuner.data.images import BrokenPicture, Pictures
from tuner.data.order import Order
from tuner.data.sources.base import Captioned, Source, read_all, told_apart, whole, without
from tuner.data.sources.dreambooth import record
from tuner.data.split import hold_out
from tuner.data.stream import DataStream, expand
from tuner.diffusion.objective import Objective
from tuner.errors import CheckpointError, ConfigError, PeerError, UserError
from tuner.families.base import OpenedModel, Sampling
from tuner.methods.base import Trainable
from tuner.optim.base import Optimizer
from tuner.optim.schedules.base import LearningRate
from tuner.training.checkpoint import Checkpoint, Checkpoints, flatten, unflatten
from tuner.training.ema import Ema
from tuner.training.lock import lock
from tuner.training.metrics import Metrics
from tuner.training.observers.base import Observer, Scene
from tuner.training.signals import StopSignal
from tuner.training.trainer import Stream, Trainer
from tuner.training.watchers import Progress, Saving, StepMetrics, quiet, shown
from tuner.weights.writer import atomic_write_text

LEFT_OUT = "left-out.txt"
"""In a run's folder: a line about each picture that was left out; not there where none was."""
T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MAY_CHANGE = ("run.samples", "run.epochs", "run.updates", "run.output", "run.micro_batch", "run.checkpoint_every",
              "run.keep", "run.resume", "run.accept_changes", "run.cache", "run.name", "trigger", "pictures.broken",
              "observers")  # fmt: skip
"""What a resumed run may change without being asked: nothing of this moves a weight that was still to come, but that
a longer run stretches a learning rate that falls."""
COMPARED_BY_CONTENT = ("data", "model.base", "model.revision", "model.add", "model.config")
"""What a resumed run may find at another place, or under another name: it is compared by what is in it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long and how a run trains, and where it writes."""

    output: Path
    """The folder that everything is written into."""
    name: str = "model"
    """The name of what is made: of its files, and on its card."""
    samples: int | None = None
    """How many samples the run sees; give this, `epochs` or `updates`."""
    epochs: float | None = None
    """How many times the run sees the data, repeats included."""
    updates: int | None = None
    """How many updates the run makes."""
    batch_size: int = 4
    """Samples an update, over all processes; one update is the same however it is split."""
    micro_batch: int | None = None
    """Samples that one process takes at once; where left out, its whole share. Smaller takes less memory."""
    seed: int = 0
    """Decides order, noise, times, dropout, flips and initial values."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16 arithmetic; what learns is always float32. `auto`: as `accelerate launch` was told, else
    bf16 on a GPU that has it, else fp32."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it, once an update; 0 never does."""
    ema: float | None = None
    """The decay of an average of the weights, which is then what is published; 0.999 is usual, left out for none."""
    checkpoint_every: int | None = None
    """A checkpoint each time so many samples are seen, besides the one at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint in `output`, `never` refuses a used folder, a path goes on from
    that checkpoint."""
    accept_changes: bool = False
    """Whether a resumed run may differ in what changes its course (data, method, optimizer)."""
    cache: Path | None = None
    """Where encoded pictures and captions are kept, shared by all runs; where left out, `$TUNER_CACHE` or the user's
    cache folder."""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.samples, self.epochs, self.updates)) != 1:
            raise ValueError("give exactly one of samples, epochs and updates")
        for name in ("samples", "epochs", "updates", "batch_size", "micro_batch", "checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm must not be negative, got {self.clip_norm}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, got {self.ema}")
        if not self.name or set(self.name) & set('/\\:*?"<>|\0') or self.name.startswith("."):
            raise ValueError(f"name must be usable as a file's name, got {self.name!r}")

    def total_samples(self, an_epoch: int) -> int:
        """How many samples the run sees, where an epoch has `an_epoch`."""
        if self.updates is not None:
            return self.updates * self.batch_size
        return self.samples if self.samples is not None else max(1, round((self.epochs or 0) * an_epoch))


@dataclass(kw_only=True)
class Run:
    """A started run. Used as `with Run.start(...) as run:`; it lets go of folder, signals and processes at the end."""

    config: RunConfig
    resolved: str
    """The recipe's whole config as TOML."""
    accelerator: Accelerator
    metrics: Metrics
    signal: StopSignal
    _held: ExitStack
    _base: dict[str, str] = field(default_factory=dict[str, str], init=False)
    _held_out: list[Example] = field(default_factory=list[Example], init=False)
    """Hashes of the base's parts, which a resumed run has to share; once they are known."""
    _data: dict[str, str] = field(default_factory=dict[str, str], init=False)
    """The same of the data."""
    _broken: dict[Path, str] = field(default_factory=dict[Path, str], init=False)
    """Pictures that cannot be decoded and are to be left out."""
    _left_out: list[BrokenPicture] = field(default_factory=list[BrokenPicture], init=False)
    """What is wrong with those of them that the data hold."""
    _areas: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]], init=False)
    """Resolution and step of the buckets of each area."""

    @classmethod
    def start(cls, config: RunConfig, resolved: object) -> Self:
        """Join the other processes, take the output folder, and write the resolved config into it.

        Raises:
            UserError: the processes do not find each other, the precision is not to be had, the folder is in use.
        """
        accelerator = start_accelerator(config.precision)
        held = ExitStack()
        signal = StopSignal()
        text = to_toml(resolved)
        if accelerator.is_main_process:
            held.enter_context(lock(config.output))
            if config.resume == "never" and (config.output / "checkpoints").exists():
                held.close()
                raise ConfigError(
                    f"run.output: {config.output} holds a run already; choose another, or resume = 'auto'"
                )
        signal.listen()
        held.callback(signal.forget)
        run = cls(
            config=config,
            resolved=text,
            accelerator=accelerator,
            metrics=Metrics(config.output / "metrics.jsonl", accelerator.is_main_process),
            signal=signal,
            _held=held,
        )
        run._agree("the config", text)
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        self._held.close()
        if self._world == 1:
            return
        if error is not None and lost_peer(error):
            raise PeerError("another process of this run has failed; what it said is the reason") from error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def frozen_dtype(self) -> torch.dtype:
        """What the weights that do not learn are held in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def progress(self) -> Any:
        """Shows progress, on the main process."""
        return shown if self.main else quiet

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.main:
            print(text, flush=True)

    def read(self, sources: Sequence[Source], pictures: Pictures, measured: Sequence[Source] = ()) -> None:
        """Read the headers of all pictures, so that what is wrong is said before a base is fetched and opened.

        With `pictures.broken = "skip"`, those of `sources` that cannot be decoded are found, and left out of all that
        follows: the main process looks, and the others are told. None of those that are `measured` is left out. What
        is wrong with captions is no error yet, since it is the base that knows whether it is told any.

        Raises:
            UserError: see `Source.read`; all that is wrong, but for captions.
        """
        cache = Cache(self.config.cache or default_folder())
        self._broken = self._of_main(find_broken(sources, pictures, cache, self.progress) if self.main else {})
        every, wrong = self._look(sources, measured, captioned=True)
        certain = wrong
        if wrong and any(isinstance(source, Captioned) for source in [*sources, *measured]):
            every, certain = self._look(sources, measured, captioned=False)
        for line in sorted(set(map(str, wrong)) - set(map(str, certain))):
            self.say(f"warning: {line}; the run ends with that, unless its base is told no captions")
        whole(every, certain)
        if self._left_out:
            first, file = self._left_out[0].file.name, self.config.output / LEFT_OUT
            self.say(f"pictures: {len(self._left_out)} cannot be decoded and are left out, such as {first}; see {file}")
        if not self.checkpoints.folder.exists():  # else what is there belongs to them until the run goes on
            self._list_left_out()

    def _look(
        self, sources: Sequence[Source], measured: Sequence[Source], captioned: bool
    ) -> tuple[list[Example], list[UserError]]:
        """All that can be read of them, and what is wrong with the others, but for what is left out of `sources`."""
        found, wrong = read_all(sources, self._broken, captioned=captioned, unmade=(1, 1))
        self._left_out, wrong = told_apart(wrong, self._broken)
        others, more = read_all(measured, captioned=captioned)
        return [*found, *others], [*wrong, *more]

    def _list_left_out(self) -> None:
        """Write down what is left out, or remove what was written of it before."""
        file = self.config.output / LEFT_OUT
        if self.main and self._left_out:
            atomic_write_text(file, "".join(f"{error}\n" for error in self._left_out))
        elif self.main:
            file.unlink(missing_ok=True)

    def examples(self, sources: Sequence[Source], model: OpenedModel) -> list[Example]:
        """Every picture of `sources`, after the base model has made those that are still wanted."""
        contents = self._contents(model)
        wanted = [w for source in sources for w in source.wanted(model.source, contents)]
        if wanted:
            if self.main:
                record(wanted, model.source, contents)
            self.accelerator.wait_for_everyone()
            by_name = {str(w.image): w for w in wanted}
            for name in self.progress(list(by_name)[self.accelerator.process_index :: self._world], "class pictures"):
                w = by_name[name]
                (picture,) = model.sample([w.prompt], [w.seed], Sampling())
                partial = w.image.with_name(f".{w.image.name}")
                picture.save(partial, format="png")
                partial.replace(w.image)
            self.accelerator.wait_for_everyone()
        if not model.captioned:
            self.say(f"captions: {model.source} is told nothing, so none is read")
        found, self._left_out = without(sources, self._broken, captioned=model.captioned)
        return found

    def hold_out(self, examples: Sequence[Example], share: float, pictures: Pictures) -> list[Example]:
        """The examples to train on; about `share` of them, chosen by what they hold, are kept for validation.

        Raises:
            DataError: one of both would be none.
        """
        if not share:
            return list(examples)
        cache = Cache(self.config.cache or default_folder())
        parts = hold_out(examples, share, pictures.background, cache, self.progress) if self.main else None
        self.accelerator.wait_for_everyone()
        training, self._held_out = parts or hold_out(examples, share, pictures.background, cache, quiet)
        taught = sum(example.source != "class" for example in examples)
        self.say(f"validation: {len(self._held_out)} of {taught} pictures are held out")
        if neither := len(examples) - len(training) - len(self._held_out):
            self.say(f"validation: {neither} class pictures show what is held out, and are left out")
        return training

    def encode(
        self,
        model: OpenedModel,
        examples: Sequence[Example],
        pictures: Pictures,
        captions: Captions,
        *,
        learns_text: bool = False,
    ) -> Encoded:
        """The examples' latents, computed once and kept on disk.

        So are captions, unless they are too many to list or, with `learns_text`, what they give is going to change.
        """
        encoded = prepare(model, examples, pictures, Cache(self.config.cache or default_folder()), captions)
        if learns_text:
            encoded = replace(encoded, text_encoder=None)
        self._contents(model)
        self._data = encoded.contents()
        for what, content in self._data.items():
            self._agree(what, content)
        self._areas = [(resolution, of.step) for resolution, of in encoded.buckets.areas.items()]
        encoded.fill_latents(model, self._mine(encoded.missing_latents()), self.progress)
        if encoded.text_encoder is not None:
            texts = {text for example in examples for text in captions.variants(example.caption) or ()}
            encoded.fill_texts(model, self._mine(encoded.missing_texts(sorted(texts))), self.progress)
        self.accelerator.wait_for_everyone()
        model.rest("vae", *(model.text_encoders if encoded.text_encoder is not None else ()))
        return encoded

    def stream(self, model: OpenedModel, encoded: Encoded, captions: Captions, trainable: Trainable) -> DataStream:
        """This process's share of the data, as an endless stream."""
        if self.config.batch_size < self._world:
            raise ConfigError(
                f"run.batch_size: {self.config.batch_size} is fewer than the {self._world} processes; raise it"
            )
        samples = expand([example.repeats for example in encoded.examples])
        share = math.ceil(self.config.batch_size / self._world)
        return DataStream(
            model=model,
            encoded=encoded,
            captions=captions,
            order=Order(
                buckets=tuple(encoded.sizes[i] for i in samples),
                seed=self.config.seed,
                batch_size=self.config.batch_size,
            ),
            micro_batch=min(self.config.micro_batch or share, share),
            rank=self.accelerator.process_index,
            world=self._world,
            device=self.device,
            learns_text=any(group.name in model.text_encoders for group in trainable.groups),
        )

    def trainer(
        self,
        model: OpenedModel,
        trainable: Trainable,
        objective: Objective,
        stream: DataStream,
        optimizer: Optimizer,
        learning_rate: LearningRate,
        observers: Sequence[Observer] = (),
    ) -> Trainer:
        """The training loop with everything that watches it, at the place where a checkpoint left off."""
        if not objective.unmasked_weight:
            every = range(len(stream.encoded.examples))
            stream.encoded.refuse_blank(every[self.accelerator.process_index :: self._world], self.progress)
        trainer = self.loop(
            model,
            trainable,
            objective,
            stream,
            optimizer,
            learning_rate,
            samples=self.config.total_samples(len(stream.samples)),
        )
        trainer.name_of = stream.name_of
        scene = Scene(
            folder=self.config.output,
            accelerator=self.accelerator,
            model=model,
            encoded=stream.encoded,
            held_out=self._held_out,
            objective=objective,
            captions=stream.captions,
            metrics=self.metrics,
            config=tomllib.loads(self.resolved),
            progress=self.progress,
            say=self.say,
        )
        trainer.watchers = [*trainer.watchers, *(observer.watch(scene) for observer in observers)]
        return trainer

    def loop(
        self,
        model: Any,
        trainable: Trainable,
        objective: Any,
        stream: Stream,
        optimizer: Optimizer,
        learning_rate: LearningRate,
        samples: int,
    ) -> Trainer:
        """The training loop over any model and objective, with progress, metrics and checkpoints."""
        progress = Progress(self.main)
        self._held.callback(progress.close)
        trainer = Trainer(
            accelerator=self.accelerator,
            model=model,
            trainable=trainable,
            objective=objective,
            stream=stream,
            optimizer=optimizer.build(trainable.groups),
            learning_rate=learning_rate,
            batch_size=self.config.batch_size,
            samples=samples,
            clip_norm=self.config.clip_norm or None,
            ema=None if self.config.ema is None else Ema(decay=self.config.ema),
            watchers=[
                progress,
                StepMetrics(self.metrics),
                Saving(self.save, self.config.checkpoint_every),
            ],
            stop_asked=lambda: self.signal.asked,
        )
        self._resume(trainer)
        if self.main:
            atomic_write_text(self.config.output / "config.toml", self.resolved)
        self._list_left_out()
        self.signal.patient = True
        return trainer

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(folder=self.config.output / "checkpoints", keep=self.config.keep)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint; every process waits until it is on the disk."""
        if self.main:
            optimizer, tensors = flatten(trainer.optimizer.state_dict())
            saved = {"trainable": trainer.trainable.state(), "optimizer": tensors}
            facts: dict[str, Any] = {
                "samples_seen": trainer.samples_seen,
                "config": tomllib.loads(self.resolved),
                "identity": self._base | self._data,
                "areas": self._areas,
                "left_out": sorted(error.file.name for error in self._left_out),
                "optimizer": optimizer,
            }
            if trainer.ema is not None:
                saved["ema"] = trainer.ema.average
                facts["ema_updates"] = trainer.ema.updates
            if self.accelerator.scaler is not None:
                facts["scaler"] = self.accelerator.scaler.state_dict()
            self.checkpoints.save(trainer.samples_seen, saved, facts)
        self.accelerator.wait_for_everyone()

    def leave_if_stopped(self, trainer: Trainer) -> None:
        """End the program where the run was asked to stop, with a word on how it goes on.

        Raises:
            SystemExit: 143 after SIGTERM, 130 after Ctrl-C.
        """
        self.signal.patient = False
        if not trainer.stopped:
            return
        self.say(
            f"stopped at {trainer.samples_seen} of {trainer.samples} samples; saved in {self.checkpoints.folder}; "
            "the same command goes on from there"
        )
        raise SystemExit(self.signal.exit_code or 143)

    def _resume(self, trainer: Trainer) -> None:
        checkpoint = self._checkpoint()
        if checkpoint is None:
            self.metrics.rewind(-1)
            return
        facts = checkpoint.facts()
        self._refuse_changes(facts, checkpoint)
        try:
            optimizer = None
            if _kind(facts["config"]) == _kind(tomllib.loads(self.resolved)):
                optimizer = unflatten(facts["optimizer"], checkpoint.tensors("optimizer"))
            else:
                self.say("the optimizer is another one now and begins anew")
            averaged = facts.get("ema_updates")
            trainer.load_state(
                checkpoint.samples_seen,
                checkpoint.tensors("trainable"),
                optimizer,
                None if averaged is None else checkpoint.tensors("ema"),
                averaged or 0,
            )
            if self.accelerator.scaler is not None and "scaler" in facts:
                self.accelerator.scaler.load_state_dict(facts["scaler"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}: does not fit this run ({error}); choose another run.output"
            ) from error
        self.metrics.rewind(checkpoint.samples_seen)
        self.say(f"going on from {checkpoint.folder} at {checkpoint.samples_seen} samples")

    def _checkpoint(self) -> Checkpoint | None:
        if self.config.resume == "never":
            return None
        if self.config.resume != "auto":
            return Checkpoints.open(Path(self.config.resume).expanduser())
        checkpoint, skipped = self.checkpoints.newest()
        for line in skipped:
            self.say(f"warning: skipped {line}")
        if checkpoint is None and skipped:
            raise CheckpointError(f"{self.checkpoints.folder}: no whole checkpoint is left; choose another run.output")
        return checkpoint

    def _refuse_changes(self, facts: dict[str, Any], checkpoint: Checkpoint) -> None:
        identity = facts.get("identity", {})
        changes = _differences(facts["config"], tomllib.loads(self.resolved))
        for line in changes.values():
            self.say(f"changed since {checkpoint.folder.name}: {line}")
        refused = [path for path in changes if not path.startswith((*MAY_CHANGE, *COMPARED_BY_CONTENT))]
        refused += [what for what, key in (self._base | self._data).items() if identity.get(what) != key]
        if "the pictures" in refused:
            was, now = set(facts.get("left_out", ())), {error.file.name for error in self._left_out}
            for what, names in (("left out now", now - was), ("left out then, and not now", was - now)):
                if names:
                    self.say(f"changed since {checkpoint.folder.name}: {what}: {', '.join(sorted(names)[:8])}")
        if refused and not self.config.accept_changes:
            raise ConfigError(
                f"{', '.join(refused)}: changed since {checkpoint.folder}; choose another run.output, "
                "or set run.accept_changes = true"
            )

    def _contents(self, model: OpenedModel) -> str:
        """A hash of all that the base holds, taken before anything of it learns."""
        self._base = self._base or base_contents(model)
        return address(**self._base)

    @property
    def _world(self) -> int:
        return self.accelerator.num_processes

    def _mine(self, missing: dict[str, T]) -> dict[str, T]:
        """This process's part of missing cache entries.

        It goes by their addresses, hexadecimal hashes, since the processes may see different lists: what one has
        written already, another does not miss.
        """
        rank = self.accelerator.process_index
        return {key: what for key, what in missing.items() if int(key[:8], 16) % self._world == rank}

    def _of_main(self, value: T) -> T:
        """What the main process has, on every process."""
        values = [value]
        if self._world > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def _agree(self, what: str, text: str) -> None:
        """Every process says the same, or none goes on."""
        if self._world > 1:
            texts: list[Any] = [None] * self._world
            torch.distributed.all_gather_object(texts, text)
            if any(other != texts[0] for other in texts):
                raise PeerError(f"{what}: not the same in all processes; start them with the same")


def start_accelerator(precision: Precision) -> Accelerator:
    """accelerate's view of the processes, checked against what the launcher meant.

    Raises:
        ConfigError: a precision that this machine lacks, or a launcher's engine that this version does not know.
        PeerError: several processes were launched that do not know each other.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if precision == "auto":
        own = "bf16" if cuda and torch.cuda.is_bf16_supported() else "no"
        chosen = launched if launched in ("bf16", "fp16") else own
    else:
        chosen = "no" if precision == "fp32" else precision
    if chosen == "fp16" and not cuda:
        raise ConfigError("run.precision: fp16 needs a GPU (on CPUs it would silently be fp32); use bf16 or fp32")
    accelerator = Accelerator(
        mixed_precision=chosen,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # over what the environment says: a
        # trainer's micro-batches add up to the mean by themselves
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{accelerator.distributed_type.value} is not supported: networks are whole in every process; "
            "launch with --multi_gpu"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise PeerError(
            f"{world} processes were launched, but each believes it is one of {accelerator.num_processes}; "
            "on CPUs launch with: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is what an exchange between processes raises once one of them is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error)


def prepare(
    model: OpenedModel, examples: Sequence[Example], pictures: Pictures, cache: Cache, captions: Captions
) -> Encoded:
    """The examples' buckets and cache addresses under `model`; nothing is encoded yet.

    Raises:
        ConfigError: options that mean nothing for the model.
    """
    if not model.captioned and captions != Captions():
        raise ConfigError(f"captions: {model.source} is told nothing; leave `captions` out")
    buckets = chosen_buckets(model, pictures)
    unlisted = sum(captions.variants(example.caption) is None for example in examples)  # also looks at each
    encoded = Encoded(
        examples=in_each_area(examples, buckets) if pictures.areas == "each" else examples,
        buckets=buckets,
        pictures=pictures,
        cache=cache,
        autoencoder=model.fingerprint("vae"),
        text_encoder="+".join(model.fingerprint(of) for of in model.text_encoders or ["captions"])
        if not unlisted
        else None,
    )
    encoded.check_guides(model.guide)
    return encoded


def chosen_buckets(model: OpenedModel, pictures: Pictures) -> Buckets:
    """The sizes that pictures are brought to.

    Raises:
        ConfigError: the model cannot take such sizes.
    """
    found: Buckets | None = None
    for resolution in sorted(pictures.resolutions or (model.resolution,)):
        step = pictures.bucket_step or default_step(resolution, model.resolution_step)
        if step % model.resolution_step:
            raise ConfigError(f"pictures.bucket_step: must be a multiple of {model.resolution_step}, got {step}")
        try:
            found = Buckets(resolution=resolution, step=step, max_ratio=pictures.max_ratio, smaller=found)
        except ValueError as error:
            raise ConfigError(f"pictures: {error}") from error
    assert found is not None
    return found


def base_contents(model: OpenedModel) -> dict[str, str]:
    """Hashes of the base's parts: of all that decides what is made of it, and not of where it is."""
    alpha, sigma = model.schedule.alpha_sigma(torch.linspace(0, model.schedule.steps - 1, 16).long())
    rounded = [f"{value:.4g}" for value in [*alpha.tolist(), *sigma.tolist()]]  # libraries differ in the last digits
    return {
        **{f"the base's {name}": model.fingerprint(name) for name in sorted(model.networks)},
        "the base's schedule": address(
            prediction=model.prediction_type, steps=model.schedule.steps, alpha_sigma=rounded
        ),
    }


def _kind(config: dict[str, Any]) -> object:
    """Which optimizer a resolved config has, if it has one."""
    return config.get("optimizer", {}).get("type")


def _differences(was: Any, now: Any, path: str = "") -> dict[str, str]:
    """Each dotted path whose value changed, with a line that says from what to what."""
    if isinstance(was, dict) and isinstance(now, dict):
        found: dict[str, str] = {}
        for key in sorted({*was, *now}):
            found |= _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if was == now else {path: f"{path}: {json.dumps(was)} -> {json.dumps(now)}"}
