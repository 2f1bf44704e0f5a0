"""Training of the base model's autoencoder, on the project's own loop.

    accelerate launch -m tuner.base.autoencoder tuner/base/autoencoder.toml

learns from the cut-outs that `tuner.base.pictures` draws, each on a background of a random colour, and writes a
diffusers `AutoencoderKL` whose latents have mean 0 and variance 1 in each channel.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from tuner.base.linear_start import start_linear
from tuner.config.command_line import run as run_command
from tuner.data.buckets import centre_crop
from tuner.data.images import load_picture, to_pixels
from tuner.diffusion.batch import GlobalBatch
from tuner.diffusion.objective import Loss
from tuner.methods.full import Full
from tuner.optim.adamw import AdamW
from tuner.optim.base import AnyOptimizer
from tuner.optim.schedules.base import AnyLearningRate
from tuner.optim.schedules.cosine import Cosine
from tuner.rng import Position, generator_at
from tuner.training.run import Run, RunConfig

SIZE = 64
"""Side of the base model's pictures, in pixels."""
HELD_OUT = 32
"""One drawing in this many is never trained on."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The autoencoder of the base model."""

    run: RunConfig
    glyphs: Path
    """The folder of cut-outs."""
    pictures: Path
    """The folder of pictures whose latents are to have mean 0 and variance 1."""
    widths: tuple[int, ...] = (32, 48, 64)
    """Channels of each level; each level but the first halves the picture's sides."""
    kl: float = 2e-5
    """The weight of the latents' divergence from N(0, 1), a mean over elements."""
    edges: float = 0.5
    """The weight of errors in the differences of neighbouring pixels."""
    decoder_from: Path | None = None
    """A trained autoencoder whose decoder alone goes on learning, so that its latents stay what they are."""
    optimizer: AnyOptimizer = field(default_factory=lambda: AdamW(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0))
    """How gradients become updates."""
    learning_rate: AnyLearningRate = field(default_factory=lambda: Cosine(warmup=50))
    """The learning rate over the run."""


class Reconstructor(nn.Module):
    """An autoencoder as one call, which is how several processes share a gradient."""

    def __init__(self, vae: AutoencoderKL, decoder_only: bool) -> None:
        super().__init__()
        self.vae, self.decoder_only = vae, decoder_only

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction `[B, 3, H, W]`, and mean and log-variance of the latents `[B, C, h, w]`."""
        with torch.set_grad_enabled(not self.decoder_only and torch.is_grad_enabled()):
            posterior = self.vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar  # pyright: ignore[reportAttributeAccessIssue]


class Autoencoder:
    """What the loop and the method see of it."""

    denoiser = "vae"
    text_encoders = ()
    prefixes = {"vae": ""}  # noqa: RUF012 (the same for all)

    def __init__(self, vae: AutoencoderKL, decoder_only: bool) -> None:
        vae.set_attn_processor(AttnProcessor())
        self.networks: dict[str, nn.Module] = {"vae": Reconstructor(vae, decoder_only)}


@dataclass(frozen=True, kw_only=True)
class PixelBatch:
    """B pictures of one size."""

    pixels: Tensor
    """`[B, 3, H, W]` in [-1, 1]."""
    weight: Tensor
    positions: Sequence[Position]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Absolute and squared error of pixels, absolute error of their differences, and a little divergence."""

    kl: float
    edges: float
    factor: int
    """How many pixels a latent is wide."""

    def loss(self, model: Autoencoder, batch: PixelBatch) -> Loss:
        pixels = batch.pixels
        shape = (4, pixels.shape[2] // self.factor, pixels.shape[3] // self.factor)
        noise = torch.stack([torch.randn(shape, generator=at.generator("noise")) for at in batch.positions])
        rebuilt, mean, logvar = model.networks["vae"](pixels, noise.to(pixels.device))
        error = rebuilt.float() - pixels
        plain = error.square().flatten(1).mean(1)
        across = error.diff(dim=3).abs().flatten(1).mean(1) + error.diff(dim=2).abs().flatten(1).mean(1)
        divergence = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).flatten(1).mean(1)
        weighted = error.abs().flatten(1).mean(1) + 5 * plain + self.edges * across + self.kl * divergence
        return Loss(weighted, plain.detach(), torch.zeros(len(pixels)))


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """Cut-outs on random backgrounds: endless, and a pure function of seed and place."""

    files: Sequence[Path]
    seed: int
    batch_size: int
    rank: int
    world: int
    device: torch.device

    def __call__(self, samples_seen: int) -> Iterator[GlobalBatch]:
        with ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(self._batch, samples_seen)
            while True:
                samples_seen += self.batch_size
                batch, waiting = waiting.result(), reader.submit(self._batch, samples_seen)
                yield batch

    def _batch(self, start: int) -> GlobalBatch:
        positions = [Position(self.seed, 0, start + i) for i in range(self.rank, self.batch_size, self.world)]
        pixels = torch.stack([self._pixels(at) for at in positions]).to(self.device)
        weight = torch.ones(len(positions), device=self.device)
        batch = PixelBatch(pixels=pixels, weight=weight, positions=positions)
        return GlobalBatch(micro_batches=[batch], samples=self.batch_size, weight=self.batch_size)  # pyright: ignore[reportArgumentType]

    def _pixels(self, at: Position) -> Tensor:
        rng = at.generator("glyph")
        file = self.files[int(torch.randint(len(self.files), (), generator=rng))]
        red, green, blue = torch.randint(256, (3,), generator=rng).tolist()
        flip = bool(torch.rand((), generator=rng) < 0.5)
        return glyph_pixels(file, f"#{red:02x}{green:02x}{blue:02x}", flip)


def glyph_pixels(file: Path, background: str, flip: bool = False) -> Tensor:
    """A cut-out on a background, `[3, H, W]` in [-1, 1]."""
    picture = load_picture(file, background)
    return to_pixels(picture, centre_crop(picture.size, (SIZE, SIZE)), flip)


def evenly(files: Sequence[Path], count: int) -> list[Tensor]:
    """About `count` pictures out of them."""
    return [glyph_pixels(file, "white") for file in files[:: max(1, len(files) // count)]]


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """Training and held-out cut-outs."""
    files = sorted(folder.glob("*.png"))
    held = files[::HELD_OUT]
    return [file for file in files if file not in set(held)], held


def fresh(widths: Sequence[int], seed: int) -> AutoencoderKL:
    """Stable Diffusion 1's autoencoder, two layers a level, in narrow; it passes plain colours from the start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoencoderKL
        vae = build(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=SIZE,
            scaling_factor=1.0,
        )
    start_linear(vae)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, files: Sequence[Path]) -> float:
    """Peak signal-to-noise ratio over cut-outs on backgrounds of fixed colours, in dB."""
    errors: list[float] = []
    for index, file in enumerate(files):
        red, green, blue = torch.randint(256, (3,), generator=generator_at("psnr", index)).tolist()
        pixels = glyph_pixels(file, f"#{red:02x}{green:02x}{blue:02x}")[None]
        rebuilt = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)  # pyright: ignore[reportAttributeAccessIssue]
        errors.append(float((rebuilt - pixels).square().mean()) / 4)
    return float(-10 * torch.tensor(errors).log10().mean())


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Sequence[Tensor]) -> None:
    """Scale and shift each latent channel to mean 0 and variance 1 over `pixels` (`[3, H, W]` each), in place.

    What the encoder gains the decoder loses, so reconstructions stay as they are.
    """
    moments = [vae.encode(p[None]).latent_dist for p in pixels]  # pyright: ignore[reportAttributeAccessIssue]
    means = torch.cat([m.mean.flatten(2) for m in moments], 2)[0] if len({m.mean.shape for m in moments}) == 1 else None
    assert means is not None, "pictures of one size are needed"
    variance = torch.stack([m.var.mean((0, 2, 3)) for m in moments]).mean(0)
    mean, std = means.mean(1), (means.var(1) + variance).sqrt()
    channels = len(mean)
    assert vae.quant_conv is not None and vae.post_quant_conv is not None
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant.bias is not None and post.bias is not None
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()


def main(config: Config) -> None:
    """Train, whiten, and write `<output>/vae`."""
    with Run.start(config.run, config) as run:
        decoder_only = config.decoder_from is not None
        vae: Any = (
            AutoencoderKL.from_pretrained(config.decoder_from)
            if decoder_only
            else fresh(config.widths, config.run.seed)
        )
        model = Autoencoder(vae.to(run.device), decoder_only)
        trainable = Full().attach(model, config.run.seed)  # pyright: ignore[reportArgumentType]
        if decoder_only:
            vae.encoder.requires_grad_(False)
            assert vae.quant_conv is not None
            vae.quant_conv.requires_grad_(False)
            for group in trainable.groups:
                frozen = [name for name, p in group.parameters.items() if not p.requires_grad]
                for name in frozen:
                    del group.parameters[name]  # pyright: ignore[reportIndexIssue]
        files, held = split(config.glyphs)
        stream = Glyphs(
            files=files,
            seed=config.run.seed,
            batch_size=config.run.batch_size,
            rank=run.accelerator.process_index,
            world=run.accelerator.num_processes,
            device=run.device,
        )
        objective = Reconstruction(kl=config.kl, edges=config.edges, factor=2 ** (len(config.widths) - 1))
        samples = config.run.total_samples(len(files))
        trainer = run.loop(model, trainable, objective, stream, config.optimizer, config.learning_rate, samples=samples)  # pyright: ignore[reportArgumentType]
        trainer.fit()
        run.leave_if_stopped(trainer)
        if run.main:
            if trainer.ema is not None:
                trainable.load_state(trainer.ema.average)
            vae = vae.cpu().float().eval()
            if not decoder_only:
                whiten(vae, evenly(sorted(config.pictures.glob("*.png")), 256))
            vae.save_pretrained(config.run.output / "vae")
            run.say(f"made {config.run.output / 'vae'}: {psnr(vae, held):.2f} dB on {len(held)} unseen drawings")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main))
