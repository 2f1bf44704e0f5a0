"""What the training recipes have in common: the parts of their config, and the sentence that each of them is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import torch

from tuner.config.writer import to_toml
from tuner.data.broken import find_broken
from tuner.data.cache import Cache, address, default_folder
from tuner.data.captions import Captions
from tuner.data.example import Example
from tuner.data.images import Pictures
from tuner.data.sources.base import Source, every_example, without
from tuner.data.split import hold_out
from tuner.diffusion.objective import Objective
from tuner.errors import ConfigError
from tuner.families.base import OpenedModel
from tuner.families.source import BaseModel, NotHere
from tuner.methods.base import Method
from tuner.methods.textual_inversion import TextualInversion, WordsTrainable
from tuner.optim.adamw import AdamW
from tuner.optim.base import AnyOptimizer
from tuner.optim.schedules.base import AnyLearningRate
from tuner.optim.schedules.constant import Constant
from tuner.rng import Position
from tuner.training.observers.base import AnyObserver
from tuner.training.observers.forgetting import Forgetting
from tuner.training.observers.validation import Validation
from tuner.training.outcome import write_outcome
from tuner.training.run import Run, RunConfig, base_contents, prepare
from tuner.training.untrained import keep_untrained
from tuner.training.watchers import shown

SHOWN = 8
"""Captions that `--check` prints."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The parts that every training recipe has."""

    run: RunConfig
    """How long it trains, and where it writes."""
    model: BaseModel
    """The checkpoint it starts from."""
    pictures: Pictures = field(default_factory=Pictures)
    """How pictures become what the model sees."""
    captions: Captions = field(default_factory=Captions)
    """What becomes of captions."""
    objective: Objective = field(default_factory=Objective)
    """What is minimized."""
    optimizer: AnyOptimizer = field(default_factory=AdamW)
    """How gradients become updates."""
    learning_rate: AnyLearningRate = field(default_factory=Constant)
    """The learning rate over the run, as a share of the optimizer's."""
    observers: tuple[AnyObserver, ...] = ()
    """What else watches the run: previews, validation, wandb."""

    def __post_init__(self) -> None:
        validations = [observer for observer in self.observers if isinstance(observer, Validation)]
        if sum(observer.best for observer in validations) > 1:
            raise ValueError("observers: two validations have `best`; only one may choose the weights to be published")
        if sum(observer.share > 0 for observer in validations) > 1:
            raise ValueError("observers: two validations have a `share`; only one may hold out training pictures")
        if len({observer.kind for observer in validations}) < len(validations):
            raise ValueError("observers: two validations have one name in the metrics; give each a `name` of its own")
        if sum(isinstance(observer, Forgetting) for observer in self.observers) > 1:
            raise ValueError("observers: 'forgetting' is there twice; give one of them all prompts")


def train(config: Training, sources: Sequence[Source], method: Method, trigger: str | None) -> None:
    """Train, and write what was learned."""
    with Run.start(config.run, config) as run:
        run.read(sources, config.pictures, measured(config))
        model = config.model.open(run.device, config.run.cache, run.say)
        examples = run.examples(sources, model)
        examples = run.hold_out(examples, held_out_share(config), config.pictures)
        refuse_unsaid(method, examples, config.captions)
        encoded = run.encode(model, examples, config.pictures, config.captions, learns_text=method.text_encoder)
        trainable = method.attach(model, config.run.seed)
        model.cast_frozen(run.frozen_dtype)
        if isinstance(trainable, WordsTrainable) and (others := {*model.text_encoders} - trainable.tables.keys()):
            run.say(f"{', '.join(sorted(others))} learns no words: T5 is told them as they are written")
        if any(example.prior for example in examples):
            kept = keep_untrained(model, trainable) / 2**20
            run.say(f"prior prediction: what learns is also kept as it is now, which takes {kept:,.0f} MiB")
        stream = run.stream(model, encoded, config.captions, trainable)
        trainer = run.trainer(
            model, trainable, config.objective, stream, config.optimizer, config.learning_rate, config.observers
        )
        trainer.fit()
        run.leave_if_stopped(trainer)
        if trainer.ended:
            run.say(f"ended at {trainer.samples_seen} of {trainer.samples} samples: {trainer.ended}")
        write_outcome(
            run,
            trainer,
            model,
            images=len(examples),
            resolution=encoded.buckets.resolution,
            trigger=trigger,
            observers=config.observers,
        )


def held_out_share(config: Training) -> float:
    """The share of the training pictures that validation is to have for itself."""
    return sum((observer.share for observer in config.observers if isinstance(observer, Validation)), 0.0)


def measured(config: Training) -> list[Source]:
    """The sources that validation has for itself."""
    return [source for observer in config.observers if isinstance(observer, Validation) for source in observer.data]


def check(config: Training, sources: Sequence[Source], method: Method) -> None:
    """Say what a run would do, from config and data alone: nothing is downloaded, trained or written."""
    print(to_toml(config))
    model = None
    try:
        config.model.locate(download=False, cache=config.run.cache)
        model = config.model.open(torch.device("cpu"), config.run.cache)
    except NotHere as absent:
        print(f"{absent}. --check downloads and makes nothing, so it looks at the data only")
    contents = None if model is None else address(**base_contents(model))
    wanted = [w for source in sources for w in source.wanted(config.model.base, contents)]
    if wanted:
        print(f"class pictures: {len(wanted)} are missing, a run makes them in {wanted[0].image.parent}")
    held_out = len(every_example(measured(config), captioned=model is None or model.captioned))
    if held_out:
        print(f"validation: {held_out} pictures")
    cache = Cache(config.run.cache or default_folder(), read_only=True)
    broken = find_broken(sources, config.pictures, cache, shown)
    size = (1, 1) if model is None else (model.resolution, model.resolution)
    examples, left_out = without(sources, broken, captioned=model is None or model.captioned, unmade=size)
    for error in left_out:
        print(f"left out: {error}")
    if model is None:
        print(f"pictures: {len(examples)}")
        return
    examples = _trained_on(config, examples, cache)
    refuse_unsaid(method, examples, config.captions)
    trainable = method.attach(model, config.run.seed)  # before captions are counted: it may teach words
    _check_data(config, model, examples, cache, len(left_out))
    for group in trainable.groups:
        count = sum(p.numel() for p in group.parameters.values())
        peak = group.peak(config.optimizer.lr)
        print(f"learns: {group.name}, {count:,} parameters in {len(group.parameters)} tensors, at up to {peak:.3e}")


def _trained_on(config: Training, examples: Sequence[Example], cache: Cache) -> Sequence[Example]:
    """Those that validation does not hold out; class pictures that are still to be made can show none of them."""
    there = [example for example in examples if example.image.exists()]
    training, held_out = hold_out(there, held_out_share(config), config.pictures.background, cache, shown)
    if held_out:
        taught = sum(example.source != "class" for example in there)
        print(f"validation: {len(held_out)} of {taught} pictures are held out")
    used = {*training}
    return [example for example in examples if example in used or not example.image.exists()]


def _check_data(config: Training, model: OpenedModel, examples: Sequence[Example], cache: Cache, left_out: int) -> None:
    encoded = prepare(model, examples, config.pictures, cache, config.captions)
    there = replace(encoded, examples=[example for example in encoded.examples if example.image.exists()])
    missing = there.missing_latents()
    if config.pictures.broken == "refuse":  # else they have been decoded
        there.refuse_broken(missing, shown)
    total, buckets = len(examples) + left_out, len(set(encoded.sizes))
    print(f"pictures: {len(examples)} of {total} used, in {buckets} buckets")
    examples = encoded.examples  # of several areas each picture may be one in each
    for (width, height), count in sorted(Counter(encoded.sizes).items()):
        print(f"  {width:>5} x {height:<5} {count}")
    small = [e for e, size in zip(examples, encoded.sizes, strict=True) if e.size[0] < size[0] or e.size[1] < size[1]]
    if small:
        print(f"  {len(small)} are smaller than their bucket and are enlarged, the first is {small[0].image.name}")
    print(f"  {len(missing)} encoded pictures are still to be made for the cache")
    print(f"captions, the first {min(SHOWN, len(examples))} as epoch 0 shows them ({model.max_tokens} tokens fit):")
    cut = sample = 0
    for index, example in enumerate(examples):
        caption = config.captions.at(example.caption, Position(config.run.seed, 0, sample))
        sample += example.repeats
        tokens = model.count_tokens(caption)
        cut += model.count_tokens(config.captions.plain(example.caption)) > model.max_tokens
        if index < SHOWN:
            note = f", {tokens - model.max_tokens} are cut" if tokens > model.max_tokens else ""
            print(f"  {example.image.name}: {caption!r} ({tokens} tokens{note})")
    print(f"  {cut} of {len(examples)} are longer than the text encoder sees")
    samples = config.run.total_samples(an_epoch=sample)
    updates = ceil(samples / config.run.batch_size)
    print(f"run: {samples} samples, {updates} updates of {config.run.batch_size}, {samples / sample:.2f} epochs")
    print("learning rate:")
    for update in sorted({0, updates // 4, updates // 2, 3 * updates // 4, updates - 1}):
        factor = config.learning_rate.factor(update, updates)
        print(f"  update {update + 1}: {config.optimizer.lr * factor:.3e}")


def refuse_unsaid(method: Method, examples: Sequence[Example], captions: Captions) -> None:
    """Raises: ConfigError: no caption holds a new word, which so would learn nothing."""
    if isinstance(method, TextualInversion):
        around = {captions.prefix, captions.suffix, captions.trigger}
        texts = "\n".join(around | {example.caption for example in examples}).lower()
        for token in method.tokens:
            if token.lower() not in texts:
                raise ConfigError(
                    f"method.tokens: no caption holds {token!r}, so it would learn nothing; write it into captions, "
                    "or into a source's prompt"
                )


def refuse_empty(sources: Sequence[Source]) -> None:
    """Raises: ConfigError: no source."""
    if not sources:
        raise ConfigError("data: empty; give at least one source, such as [[data]] type = 'folder', path = 'pictures'")
