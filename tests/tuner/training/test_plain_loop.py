"""Our training step beside the one that a plain script on diffusers and peft makes, with the same noise and times."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr

from tests import tiny
from tuner.diffusion.batch import Batch, Conditioning, GlobalBatch
from tuner.diffusion.noises.gaussian import Gaussian
from tuner.diffusion.objective import Objective
from tuner.diffusion.schedule import scaled_linear
from tuner.diffusion.weightings.base import Weighting
from tuner.diffusion.weightings.min_snr import MinSnr
from tuner.diffusion.weightings.uniform import Uniform
from tuner.families.source import BaseModel
from tuner.methods.base import Method
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.optim.adamw import AdamW
from tuner.optim.schedules.constant import Constant
from tuner.rng import Position, generator_at
from tuner.training.trainer import Trainer

PREDICTIONS = ["epsilon", "v_prediction"]
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02}
CLIP = 0.005
UPDATES = 3
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module", params=PREDICTIONS)
def base(request, tmp_path_factory) -> Path:
    """A tiny base that predicts one or the other."""
    pipeline = tiny.sd1()
    pipeline.scheduler.register_to_config(prediction_type=request.param)
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return folder


def batch(update: int) -> Batch:
    rng = torch.Generator().manual_seed(100 + update)
    return Batch(
        latents=torch.randn(4, 4, 8, 8, generator=rng),
        captions=["the red cat"] * 4,
        conditioning=Conditioning(tokens=torch.randn(4, 77, 32, generator=rng)),
        weight=torch.ones(4),
        positions=[Position(3, update, sample) for sample in range(4)],
    )


@dataclass
class Plain:
    """What is in every tutorial, and nothing of this project."""

    unet: Any
    scheduler: DDPMScheduler
    gamma: float | None

    def train(self, batches: list[Batch], noises: list[torch.Tensor], times: list[torch.Tensor]) -> list[float]:
        learning = [p for p in self.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, **ADAMW)
        losses: list[float] = []
        for batch, noise, timesteps in zip(batches, noises, times, strict=True):
            noisy = self.scheduler.add_noise(batch.latents, noise, timesteps)
            predicted = self.unet(noisy, timesteps, batch.conditioning.tokens).sample
            v = self.scheduler.config.prediction_type == "v_prediction"
            target = self.scheduler.get_velocity(batch.latents, noise, timesteps) if v else noise
            if self.gamma is None:
                loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
            else:
                snr = compute_snr(self.scheduler, timesteps)
                weights = torch.stack([snr, self.gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
                weights = weights / (snr + 1 if v else snr)
                loss = F.mse_loss(predicted.float(), target.float(), reduction="none")
                loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


def time(at: Position) -> int:
    return int(torch.randint(1000, (), generator=at.generator("timestep")))


def plain_lora(unet: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """peft's LoRA on `unet`, begun at the values of `state`."""
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights="gaussian", target_modules=LAYERS))
    parameters = {name.replace(".default.", "."): p for name, p in unet.named_parameters() if p.requires_grad}
    assert {f"unet.{name}" for name in parameters} == state.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[f"unet.{name}"])
    return parameters


@pytest.mark.parametrize("weighting", [Uniform(), MinSnr(gamma=1.0)], ids=["plain", "min-SNR"])
@pytest.mark.parametrize(
    "method",
    [Full(), Lora(rank=4, alpha=2.0, targets=(r"attn.*\.(to_[qkv]|to_out\.0)$",))],
    ids=["full", "lora"],
)
def test_our_updates_are_those_of_a_plain_diffusers_loop(method: Method, weighting: Weighting, base: Path):
    model = BaseModel(base=str(base)).open(torch.device("cpu"))
    trainable = method.attach(model, seed=0)
    for name, tensor in trainable.state().items():
        if ".lora_B." in name:  # not at zero, where A would not move
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator_at(name)))
    begun = {name: tensor.clone() for name, tensor in trainable.state().items()}
    batches = [batch(update) for update in range(UPDATES)]
    trainer = Trainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        trainable=trainable,
        objective=Objective(weighting=weighting),
        stream=lambda seen: iter(()),
        optimizer=AdamW(**ADAMW).build(trainable.groups),
        learning_rate=Constant(),
        batch_size=4,
        samples=100,
        clip_norm=CLIP,
    )
    reports = [trainer.train_step(GlobalBatch(micro_batches=[b], samples=4, weight=4.0)) for b in batches]
    assert max(report.grad_norm for report in reports) > CLIP, "the test does not clip"

    unet = UNet2DConditionModel.from_pretrained(base / "unet").train()
    theirs = plain_lora(unet, begun) if isinstance(method, Lora) else dict(unet.named_parameters())
    plain = Plain(unet, DDPMScheduler.from_pretrained(base / "scheduler"), getattr(weighting, "gamma", None))
    losses = plain.train(
        batches,
        [torch.stack([Gaussian().draw((4, 8, 8), at.generator("noise")) for at in b.positions]) for b in batches],
        [torch.tensor([time(at) for at in b.positions]) for b in batches],
    )

    assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-6)
    assert trainable.state().keys() == {f"unet.{name}" for name in theirs}
    moved = max(float((tensor - begun[name]).abs().max()) for name, tensor in trainable.state().items())
    assert moved > 1e-4, "the test does not train"
    apart = {name: float((trainable.state()[f"unet.{name}"] - p.detach()).abs().max()) for name, p in theirs.items()}
    assert max(apart.values()) <= 1e-6, max(apart.items(), key=lambda item: item[1])


def test_the_schedule_is_the_schedulers_own(base: Path):
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    model = BaseModel(base=str(base)).open(torch.device("cpu"))
    assert torch.equal(model.schedule.alphas_cumprod, scheduler.alphas_cumprod)
    torch.testing.assert_close(scaled_linear().alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)

    every = torch.arange(1000)
    x_0, noise = torch.randn(2, 1000, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (level[:, None, None, None] for level in model.schedule.alpha_sigma(every))
    noised = alpha * x_0 + sigma * noise
    torch.testing.assert_close(noised, scheduler.add_noise(x_0, noise, every), rtol=0, atol=1e-6)
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x_0, noise, every) if v else noise
    torch.testing.assert_close(model.prediction.target(x_0, noise, alpha, sigma), target, rtol=0, atol=1e-6)
