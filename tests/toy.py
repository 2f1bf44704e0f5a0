"""A diffusion model small enough to train in a test, with the parts of a real one: blocks, samplers, a text encoder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.order import Order, Showing, share
from tuner.diffusion.batch import Batch, Conditioning, GlobalBatch
from tuner.diffusion.model import Guide, LatentDistribution
from tuner.diffusion.prediction import Epsilon, Prediction
from tuner.diffusion.schedule import scaled_linear
from tuner.diffusion.timesteps.uniform import Uniform
from tuner.rng import Position, generator_at

SIZES = ((8, 8), (8, 8), (6, 10), (8, 8), (6, 10), (10, 6), (8, 8))
"""Of each sample's latents, height first: three buckets, of four, two and one."""
WEIGHTS = (1.0, 1.0, 0.5, 1.0, 2.0, 0.25, 1.0)
CAPTIONS = tuple(f"a picture of thing {i}" for i in range(len(SIZES)))


class Attention(nn.Module):
    """Not attention, but its layers: two linear ones and a 1 x 1 convolution, told by the text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, 1)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(6, width, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        told = self.to_k(tokens).mean(1)[:, None, None, :]
        return x + (torch.tanh(self.to_q(self.proj_in(x).movedim(1, -1))) * (1 + told)).movedim(-1, 1)


class Denoiser(nn.Module):
    """`x_t`, a time and tokens to something shaped as `x_t`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(2, width)
        self.attentions = nn.ModuleList([Attention(width), Attention(width)])
        self.resnet = nn.ModuleDict({"conv1": nn.Conv2d(width, width, 3, padding=1)})
        self.conv_out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        angle = t.to(x.dtype) / 1000
        x = self.conv_in(x) + self.time(torch.stack([angle.sin(), angle.cos()], 1))[:, :, None, None]
        for attention in self.attentions:
            x = attention(x, tokens)
        return self.conv_out(x + torch.tanh(self.resnet["conv1"](x)))


class TextEncoder(nn.Module):
    """Bytes `[B, L]` to tokens `[B, L, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 6)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(6, 6)})

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.self_attn["q_proj"](self.embedding(ids)))


class ToyModel:
    """A `DiffusionModel`, always of the same weights."""

    def __init__(self, prediction: Prediction | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.networks: dict[str, nn.Module] = {"unet": Denoiser(), "text_encoder": TextEncoder()}
        self.denoiser = "unet"
        self.text_encoders = ("text_encoder",)
        self.prefixes = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
        self.adapter_targets = {"unet": r"\.attentions\.", "text_encoder": r"\.self_attn\."}
        self.unused: dict[str, str] = {}
        self.guide: Guide | None = None
        self.schedule = scaled_linear()
        self.prediction: Prediction = prediction or Epsilon()
        self.timesteps = Uniform()
        self.untrained: Any = None
        self.word_tables = {"text_encoder": "embedding"}
        self.words: dict[str, list[int]] = {}

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        raise AssertionError("a toy has no pictures")

    def encode_guide(self, guide: Tensor) -> Tensor:
        raise AssertionError("a toy is told no pictures")

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        blank = [ord(" ")] * 24
        ids = torch.tensor([(self.word_ids("text_encoder", caption) + blank)[:24] for caption in captions])
        return Conditioning(tokens=self.networks["text_encoder"](ids))

    def word_ids(self, component: str, text: str) -> list[int]:
        """Its bytes, but for words that were added."""
        if not self.words:
            return [*text.encode()]
        parts = re.split("|".join(f"({re.escape(word)})" for word in self.words), text)
        return [i for part in parts if part for i in self.words.get(part, part.encode())]

    def add_words(self, words: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
        for word, count in words.items():
            first = 256 + sum(map(len, self.words.values()))
            self.words[word] = [*range(first, first + count)]
        return {"text_encoder": self.words}

    def count_tokens(self, caption: str) -> int:
        return len(self.word_ids("text_encoder", caption))

    @property
    def max_tokens(self) -> int:
        return 24

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = next(self.networks["unet"].parameters()).dtype
        return self.networks["unet"](x_t.to(dtype), t, conditioning.tokens.to(dtype))


def latents(sample: int) -> Tensor:
    """A sample's latents, `[4, h, w]`: what is to be learned is that they are smooth."""
    height, width = SIZES[sample]
    level = torch.randn(4, 1, 1, generator=generator_at("toy", sample))
    return level + 0.3 * torch.randn(4, height, width, generator=generator_at("toy detail", sample))


def batch(showings: Sequence[Showing], seed: int = 0) -> Batch:
    """Showings of one bucket, as the data would make them; captions are encoded by the objective."""
    return Batch(
        latents=torch.stack([latents(showing.sample) for showing in showings]),
        captions=[CAPTIONS[showing.sample] for showing in showings],
        conditioning=None,
        weight=torch.tensor([WEIGHTS[showing.sample] for showing in showings]),
        positions=[Position(seed, at.epoch, at.sample, at.stratum) for at in showings],
    )


def stream(batch_size: int, micro_batch: int, rank: int = 0, world: int = 1, seed: int = 0):
    """What `DataStream` is for a real run: from the samples seen to the global batches that follow."""
    order = Order(buckets=SIZES, seed=seed, batch_size=batch_size)

    def batches(samples_seen: int) -> Iterator[GlobalBatch]:
        for showings in order.batches(samples_seen):
            yield GlobalBatch(
                micro_batches=[batch(part, seed) for part in share(showings, SIZES, micro_batch, rank, world)],
                samples=len(showings),
                weight=sum(WEIGHTS[showing.sample] for showing in showings),
            )

    return batches


def trainer(model: ToyModel, trainable: Any, *, micro_batch: int = 8, seed: int = 0, **options: Any) -> Any:
    """The project's own loop over a toy, with global batches of 8 unless said otherwise."""
    from accelerate import Accelerator

    from tuner.diffusion.objective import Objective
    from tuner.optim.adamw import AdamW
    from tuner.optim.schedules.constant import Constant
    from tuner.training.trainer import Trainer

    settings = {"learning_rate": Constant(), "objective": Objective(), "batch_size": 8, "samples": 10**9, **options}
    optimizer = settings.pop("optimizer", AdamW(lr=1e-2))
    return Trainer(
        accelerator=settings.pop("accelerator", None) or Accelerator(cpu=True),
        model=model,
        trainable=trainable,
        stream=stream(settings["batch_size"], micro_batch, seed=seed),
        optimizer=optimizer.build(trainable.groups),
        **settings,
    )


def train(trainer: Any, updates: int) -> list[Any]:
    """So many updates from where the trainer stands; their reports."""
    batches = trainer.stream(trainer.samples_seen)
    return [trainer.train_step(next(batches)) for _ in range(updates)]


def outputs(model: ToyModel) -> list[Tensor]:
    """What the networks say to inputs that never change."""
    with torch.no_grad():
        x_t = torch.randn(3, 4, 6, 10, generator=generator_at("toy input"))
        told = model.encode_text(CAPTIONS[:3])
        return [told.tokens, model.denoise(x_t, torch.tensor([1, 500, 999]), told)]


def fixed_loss(model: ToyModel) -> float:
    """The loss of every sample on noise and at times that never change."""
    from tuner.diffusion.objective import Objective

    with torch.no_grad():
        times = range(50, 1000, 100)
        losses = [
            Objective().loss(model, batch([Showing(t, sample)], seed=-1), torch.tensor([t])).plain
            for sample in range(len(SIZES))
            for t in times
        ]
    return float(torch.cat(losses).mean())
