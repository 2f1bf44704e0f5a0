"""What the project's training costs beside a loop that does nothing but train.

    python -m benchmarks.overhead

runs three contenders over the same network, pictures, batch size and optimizer, in turns of a few updates each, and
prints the samples per second of each and their ratios, as medians over the rounds; then the peak memory of each, in a
process of its own:

    tuner       everything a run does: order, cache, captions, noise, loss, clipping, update, metrics and progress bar
    bare        one fixed batch: forward, backward, clipping, update, and nothing else
    diffusers   a loop as diffusers' train_text_to_image_lora.py has it: pictures through a DataLoader, the autoencoder
                and the text encoder in each step, accelerate
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tuner.data.captions import Captions
from tuner.data.images import Pictures
from tuner.data.sources.folder import PictureFolder
from tuner.diffusion.batch import Conditioning
from tuner.diffusion.objective import Objective
from tuner.families.base import OpenedModel
from tuner.families.source import BaseModel
from tuner.methods.base import Method
from tuner.methods.full import Full
from tuner.methods.lora import Lora
from tuner.optim.adamw import AdamW
from tuner.optim.schedules.constant import Constant
from tuner.training.run import Run, RunConfig

PICTURES = Path(__file__).parent.parent / "examples" / "demo" / "subject"
PROMPT = "sks bear"
METHODS: dict[str, Method] = {"lora": Lora(rank=16), "full": Full()}
OPTIMIZER = AdamW(lr=1e-4)
CLIP = 1.0
ROUND = 6
"""Updates of a turn."""
MEMORY_UPDATES = 12
GOAL_SPEED, GOAL_MEMORY = 0.95, 1.05


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders share."""

    base: str
    method: str
    attention: Any
    batch: int
    device: torch.device

    def open(self) -> OpenedModel:
        """A copy of the base of one's own."""
        return BaseModel(base=self.base, attention=self.attention).open(self.device)


Step = Callable[[], float]
"""One update; the answer is its loss."""


def tuner(setting: Setting, held: ExitStack) -> Step:
    """`Trainer.fit`, taken apart so that it can be paused."""
    folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
    config = RunConfig(
        output=folder / "run", updates=1_000_000, batch_size=setting.batch, clip_norm=CLIP, precision="fp32",
        cache=folder / "cache",
    )  # fmt: skip
    run = held.enter_context(Run.start(config, config))
    model = setting.open()
    captions = Captions()
    examples = run.examples([PictureFolder(path=PICTURES, prompt=PROMPT)], model)
    encoded = run.encode(model, examples, Pictures(), captions)
    trainable = METHODS[setting.method].attach(model, 0)
    model.cast_frozen(run.frozen_dtype)
    stream = run.stream(model, encoded, captions, trainable)
    trainer = run.trainer(model, trainable, Objective(), stream, OPTIMIZER, Constant())
    batches = trainer.stream(0)
    for watcher in trainer.watchers:
        watcher.start(trainer)

    def step() -> float:
        report = trainer.train_step(next(batches))
        for watcher in trainer.watchers:
            watcher.after_step(trainer, report)
        return report.loss

    return step


def bare(setting: Setting, held: ExitStack) -> Step:
    """The least that trains."""
    model = setting.open()
    trainable = METHODS[setting.method].attach(model, 0)
    parameters = list(trainable.parameters().values())
    optimizer = OPTIMIZER.build(trainable.groups)
    with torch.no_grad():
        x_0 = torch.cat([model.encode_images(p).mean for p, _ in pixels(model, setting.batch)])
        tokens = model.encode_text([PROMPT] * setting.batch).tokens
    t = torch.arange(setting.batch, device=setting.device) * model.schedule.steps // setting.batch
    alpha, sigma = (value[:, None, None, None] for value in model.schedule.alpha_sigma(t))
    noise = torch.randn_like(x_0)
    x_t, target = alpha * x_0 + sigma * noise, model.prediction.target(x_0, noise, alpha, sigma)

    def step() -> float:
        loss = mse_loss(model.denoise(x_t, t, Conditioning(tokens=tokens)), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def diffusers(setting: Setting, held: ExitStack) -> Step:
    """The usual script's loop."""
    model = setting.open()
    trainable = METHODS[setting.method].attach(model, 0)
    parameters = list(trainable.parameters().values())
    pipeline = model.pipeline()
    unet, vae, text_encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    scheduler = cast(Any, DDPMScheduler.from_config(pipeline.scheduler.config))
    accelerator = Accelerator(mixed_precision="no")
    loader = DataLoader(Folder(model.resolution, tokenizer), batch_size=setting.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(
        parameters, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )
    rate = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=1_000_000)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    bar = tqdm(total=1_000_000, desc="steps", disable=not accelerator.is_local_main_process)

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def step() -> float:
        batch = next(batches)
        with accelerator.accumulate(unet):
            with torch.no_grad():
                latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                states = text_encoder(batch["input_ids"], return_dict=False)[0]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            v_prediction = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
            output = unet(noisy, timesteps, states, return_dict=False)[0]
            loss = mse_loss(output.float(), target.float())
            mean_loss = cast(Tensor, accelerator.gather(loss.repeat(setting.batch))).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            bar.update(1)
        bar.set_postfix(step_loss=loss.detach().item(), lr=rate.get_last_lr()[0])
        return mean_loss.item()

    return step


@dataclass
class Folder(Dataset[dict[str, Tensor]]):
    """The pictures and the prompt's tokens."""

    resolution: int
    tokenizer: Any

    def __post_init__(self) -> None:
        self.files = sorted(PICTURES.glob("*.png")) * 16

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self.files[index]) as picture:
            scaled = picture.convert("RGB").resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)
        tokens = self.tokenizer(
            PROMPT, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return {
            "pixel_values": torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 127.5 - 1,
            "input_ids": tokens.input_ids[0],
        }


def pixels(model: OpenedModel, count: int) -> Iterator[tuple[Tensor, str]]:
    """`count` pictures, `[1, 3, H, W]`, with the name of each."""
    pictures = Folder(model.resolution, model.pipeline().tokenizer)
    for index in range(count):
        yield pictures[index]["pixel_values"][None], pictures.files[index].name


CONTENDERS: dict[str, Callable[[Setting, ExitStack], Step]] = {"tuner": tuner, "bare": bare, "diffusers": diffusers}


@dataclass(frozen=True)
class Speed:
    """Samples per second of one turn."""

    wall: float
    cpu: float
    """Per second of processor time, of all threads: what other programs on the machine do hardly changes it."""


def speeds(setting: Setting, held: ExitStack, seconds: float) -> dict[str, list[Speed]]:
    """The speed of each contender in each round; turns alternate, and each is first as often as last."""
    steps = {name: make(setting, held) for name, make in CONTENDERS.items()}
    for step in steps.values():
        for _ in range(2):
            step()
    measured: dict[str, list[Speed]] = {name: [] for name in steps}
    order = list(steps)
    spent = 0.0
    while spent < seconds * len(steps) or len(measured["bare"]) < 3:
        for name in order:
            since, cpu_since = now(setting.device), time.process_time()
            for _ in range(ROUND):
                steps[name]()
            took, cpu_took = now(setting.device) - since, time.process_time() - cpu_since
            samples = ROUND * setting.batch
            measured[name].append(Speed(samples / took, samples / cpu_took))
            spent += took
        order.reverse()
    return measured


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(setting: Setting, name: str, held: ExitStack) -> dict[str, float]:
    """MB at the peak of a short run in this process, on the device, and what of it the opened model already took."""
    opened = CONTENDERS[name](setting, held)
    before = peak(setting.device)
    for _ in range(MEMORY_UPDATES):
        opened()
    return {"peak": peak(setting.device), "before": before}


def peak(device: torch.device) -> float:
    """The most memory that was ever in use, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage's counts the parent of a child, too
    return float(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    """Measure, print, and say whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="pocket", help="an embedded base, a diffusers folder, or a hub id")
    parser.add_argument("--method", choices=sorted(METHODS), default="lora")
    parser.add_argument("--attention", choices=["auto", "torch", "math"], default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60, help="time for each contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--memory-of", choices=sorted(CONTENDERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(
        base=given.base, method=given.method, attention=given.attention, batch=given.batch,
        device=torch.device(given.device),
    )  # fmt: skip
    with ExitStack() as held:
        if given.memory_of:
            print(json.dumps(memory(setting, given.memory_of, held)))
            return
        print(f"{given.base}, {given.method}, batches of {given.batch}, {given.device}, {given.threads} thread(s), "
              f"torch {torch.__version__}")  # fmt: skip
        measured = speeds(setting, held, given.seconds)
    processor = {type(p).__name__ for p in setting.open().pipeline().unet.attn_processors.values()}
    print(f"attention of all contenders: {', '.join(sorted(processor))}")
    used = {name: in_a_child(name) for name in CONTENDERS}
    report(measured, used)
    if given.json:
        figures = {
            "setting": {key: str(value) for key, value in vars(given).items()},
            "samples per second": {name: [vars(turn) for turn in turns] for name, turns in measured.items()},
            "MB": used,
        }
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def in_a_child(name: str) -> dict[str, float]:
    """The memory of one contender, alone in a process with the same arguments."""
    command = [sys.executable, "-m", "benchmarks.overhead", *sys.argv[1:], "--memory-of", name]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(answer.strip().splitlines()[-1])


def report(measured: dict[str, list[Speed]], used: dict[str, dict[str, float]]) -> None:
    """The table, and whether the goals are met."""
    head = ("samples/s", "beside bare", "by processor time", "peak MB", "beside bare")
    print(f"\n{'':10}" + "".join(f"{title:>20}" for title in head))
    for name, turns in measured.items():
        ratios = [beside(turns, measured["bare"], clock) for clock in ("wall", "cpu")]
        cells = (
            f"{statistics.median(turn.wall for turn in turns):.2f}",
            *(f"{middle:.3f} ({low:.3f}-{high:.3f})" for low, middle, high in ratios),
            f"{used[name]['peak']:.0f}",
            f"{used[name]['peak'] / used['bare']['peak']:.3f}",
        )
        print(f"{name:10}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{len(measured['bare'])} rounds of {ROUND} updates; medians, and the middle half of the rounds")
    for other in ("bare", "diffusers"):
        speed = beside(measured["tuner"], measured[other], "wall")[1]
        space = used["tuner"]["peak"] / used[other]["peak"]
        line = f"tuner beside {other}: speed {speed:.3f}, memory {space:.3f}"
        if other == "bare":
            line += f" (goals: {GOAL_SPEED} {met(speed >= GOAL_SPEED)}, {GOAL_MEMORY} {met(space <= GOAL_MEMORY)})"
        print(line)


def beside(turns: list[Speed], others: list[Speed], clock: str) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    ratios = sorted(getattr(a, clock) / getattr(b, clock) for a, b in zip(turns, others, strict=True))
    return ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]


def met(good: bool) -> str:
    """A word for it."""
    return "met" if good else "missed"


if __name__ == "__main__":
    main()
